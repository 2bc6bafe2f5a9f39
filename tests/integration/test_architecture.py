"""Imports point downwards: the folders of the library stand above one another, and no module imports itself back."""

from __future__ import annotations

import ast
import re
import tomllib
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import hf_dualspeed

PACKAGE = Path(hf_dualspeed.__file__).parent
# Lowest first; a module may import from its own folder and from the layers below. CONTRIBUTING.md shows the same line.
LINE = (
    "utils < hub < metrics < publishing < pruners < models < pruning < feature_cache, data < trainer < "
    "conformance, evaluation, bench < recipes < commands < cli"
)
LAYER = {folder: level for level, folders in enumerate(LINE.split(" < ")) for folder in folders.split(", ")}


def name_of(path: Path) -> tuple[str, ...]:
    """ "pruners/base.py" as ("pruners", "base"), a package's `__init__.py` as ("pruners",)."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return parts[:-1] if parts[-1] == "__init__" else parts


MODULES = {name_of(path): path for path in sorted(PACKAGE.rglob("*.py"))}
OTHERS = {"benchmarks", "tests", "spaces_demo"}


def imported(source: str, package: tuple[str, ...]) -> set[tuple[str, ...]]:
    """The modules of the library that a source in the folder `package` imports, in functions too, but for types alone.
    A name of the library itself stands for the module that it is loaded from."""
    tree = ast.parse(source)
    conditional = [node for node in ast.walk(tree) if isinstance(node, ast.If)]
    for_types = {
        id(inner) for node in conditional if ast.unparse(node.test) == "TYPE_CHECKING" for inner in ast.walk(node)
    }
    found = set()
    for node in ast.walk(tree):
        if id(node) in for_types or not isinstance(node, (ast.Import, ast.ImportFrom)):
            continue
        if isinstance(node, ast.Import):
            paths = [tuple(alias.name.split(".")) for alias in node.names]
        else:
            words = tuple((node.module or "").split(".")) if node.module else ()
            home = ("hf_dualspeed", *package[: len(package) - node.level + 1]) if node.level else ()
            paths = [(*home, *words, alias.name) for alias in node.names]
        for first, *rest in paths:
            assert first not in OTHERS, f"{first} is no part of the library"
            if first != "hf_dualspeed":
                continue
            place = tuple(rest)
            if place[:1] and place[0] in hf_dualspeed._MODULES:  # `from hf_dualspeed import DualSpeedTrainer`
                place = tuple(hf_dualspeed._MODULES[place[0]].split("."))
            while place and place not in MODULES:  # a name in a module
                place = place[:-1]
            found.add(place)
    return found - {()}


def imports_of(module: tuple[str, ...]) -> set[tuple[str, ...]]:
    path = MODULES[module]
    return imported(path.read_text(encoding="utf-8"), path.parent.relative_to(PACKAGE).parts) - {module}


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("import hf_dualspeed.cli", {("cli",)}),
        ("from hf_dualspeed import DualSpeedTrainer", {("trainer", "trainer")}),
        ("from .. import DualSpeedTrainer, __version__", {("trainer", "trainer")}),
        ("from ..trainer import trainer", {("trainer", "trainer")}),
        ("from ..trainer.trainer import DualSpeedTrainer", {("trainer", "trainer")}),
        ("def late():\n    from .text import percent", {("utils", "text")}),
        ("if TYPE_CHECKING:\n    from ..cli import main", set()),
    ],
)
def test_imports_are_seen(source, expected):
    assert imported(source, ("utils",)) == expected


@pytest.mark.parametrize("source", ["import benchmarks.common", "from spaces_demo import app"])
def test_what_is_no_part_of_the_library_is_not_imported(source):
    with pytest.raises(AssertionError, match="is no part of the library"):
        imported(source, ("utils",))


@pytest.mark.parametrize("module", [m for m in MODULES if m], ids=".".join)
def test_imports_point_downwards(module):
    own = module[0]
    wrong = [other for other in imports_of(module) if other[0] != own and LAYER[other[0]] >= LAYER[own]]
    assert not [".".join(other) for other in wrong]


def test_no_module_imports_itself_back():
    try:
        TopologicalSorter({module: imports_of(module) for module in MODULES}).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(".".join(module) for module in error.args[1]))


def test_folders_can_be_surveyed():
    """One pruner per file aside, a folder holds at most twenty modules, and the root a handful."""
    for folder in {path.parent for path in MODULES.values()} - {PACKAGE / "pruners"}:
        rooms = [path for path in folder.glob("*.py") if path.name != "__init__.py"]
        assert len(rooms) <= (5 if folder == PACKAGE else 20), folder


def test_the_wheel_holds_every_folder_and_every_file():
    project = tomllib.loads((PACKAGE.parent / "pyproject.toml").read_text(encoding="utf-8"))
    setuptools = project["tool"]["setuptools"]
    folders = {".".join(("hf_dualspeed", *path.parent.relative_to(PACKAGE).parts)) for path in MODULES.values()}
    assert set(setuptools["packages"]) == {*folders, "hf_dualspeed.space_files"}
    carried = {path for pattern in setuptools["package-data"]["hf_dualspeed"] for path in PACKAGE.glob(pattern)}
    assert carried == {path for path in PACKAGE.rglob("*.*") if path.suffix not in (".py", ".pyc")}


def test_the_public_names_are_where_they_are_said_to_be():
    assert hf_dualspeed.__all__ == [*hf_dualspeed._MODULES]


def test_contributing_shows_the_folders_and_their_order():
    text = (PACKAGE.parent / "CONTRIBUTING.md").read_text(encoding="utf-8")
    assert LINE in " ".join(text.split())
    tree = re.search(r"```\nhf_dualspeed/ .*?```", text, re.DOTALL)[0]
    entries = set(re.findall(r"^  ([\w.]+)/? ", tree, re.MULTILINE))
    files = (path for path in PACKAGE.iterdir() if not path.name.startswith("_"))
    assert entries == {path.name for path in files if path.is_dir() or path.suffix == ".py"}
