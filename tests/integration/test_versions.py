"""What pyproject.toml allows, constraints-min.txt installs at its lowest and constraints.txt at its newest."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = PROJECT["optional-dependencies"].values()
REQUIREMENTS = [Requirement(r) for r in [*PROJECT["dependencies"], *(r for extra in EXTRAS for r in extra)]]
DECLARED = [requirement for requirement in REQUIREMENTS if requirement.name != PROJECT["name"]]


def pins(file: str) -> dict[str, Version]:
    lines = (ROOT / file).read_text(encoding="utf-8").splitlines()
    named = [line.split("==") for line in lines if not line.startswith("#")]
    return {name: Version(version) for name, version in named}


NEWEST, LOWEST = pins("constraints.txt"), pins("constraints-min.txt")


@pytest.mark.parametrize("requirement", DECLARED, ids=str)
def test_bounds_are_installed_by_ci_and_explained(requirement):
    (bound,) = requirement.specifier
    assert bound.operator in (">=", "==")
    assert LOWEST[requirement.name] == Version(bound.version)
    assert NEWEST[requirement.name] in requirement.specifier
    assert f"| {requirement.name} | {bound.version} |" in (ROOT / "docs" / "versions.md").read_text(encoding="utf-8")


def test_what_we_do_not_declare_is_the_same_in_both():
    declared = {requirement.name for requirement in DECLARED}
    undeclared = LOWEST.keys() - declared
    assert {name: LOWEST[name] for name in undeclared} == {name: NEWEST[name] for name in NEWEST.keys() - declared}


def test_workflows_citation_and_project_name_the_same_versions():
    read = {
        path.name: yaml.safe_load(path.read_text(encoding="utf-8")) for path in ROOT.glob(".github/workflows/*.yml")
    }
    tested = read["tests.yml"]["jobs"]["test"]["strategy"]["matrix"]["python"]
    assert PROJECT["requires-python"] == f">={tested[0]}"
    said = [
        c.rpartition(" ")[2] for c in PROJECT["classifiers"] if c.startswith("Programming Language :: Python :: 3.")
    ]
    assert tested == said
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))["version"] == PROJECT["version"]
