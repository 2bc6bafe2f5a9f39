"""`dualspeed space` against a Hub on this machine, and the Space's folder as Spaces read it."""

from __future__ import annotations

import json
import sys
import tomllib
import types
from pathlib import Path

import pytest
import slots
import yaml
from loopback_hub import TOKEN
from packaging.requirements import Requirement

from hf_dualspeed import cli
from hf_dualspeed.commands import space
from hf_dualspeed.publishing.cards import split_front_matter

ROOT = Path(__file__).parents[2]
SPACE = ROOT / "spaces_demo"
REPO = "tester/demo"


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """A folder without runs, so that nothing of this machine's is published."""
    monkeypatch.chdir(tmp_path)


def pushed(hub) -> dict[str, bytes]:
    return hub.files(f"spaces/{REPO}")


# --- the folder ---------------------------------------------------------------------------------------------------


def test_the_folder_is_a_space():
    head, body = split_front_matter((SPACE / "README.md").read_text(encoding="utf-8"))
    assert (head["sdk"], head["app_file"], head["license"]) == ("gradio", "app.py", "apache-2.0")
    assert len(head["short_description"]) <= 60  # the Hub refuses more
    assert body.strip().startswith("# ")
    lines = (SPACE / "requirements.txt").read_text(encoding="utf-8").split()
    needed = {requirement.name: requirement.specifier for requirement in map(Requirement, lines)}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert needed.keys() == {"hf-dualspeed", "gradio"}
    assert project["version"] in needed["hf-dualspeed"]
    assert f"gradio{needed['gradio']}" in project["optional-dependencies"]["demo"]
    assert head["sdk_version"] in needed["gradio"]
    assert f"gradio=={head['sdk_version']}\n" in (ROOT / "constraints.txt").read_text(encoding="utf-8")


def test_all_its_files_are_installed_and_pushed():
    held = {path.name for path in SPACE.iterdir() if path.is_file() and path.name != space.CHECKPOINTS}
    assert held == set(space.FILES)
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    assert settings["package-dir"]["hf_dualspeed.space_files"] == "spaces_demo"
    data = settings["package-data"]["hf_dualspeed.space_files"]
    assert {name for name in held if not name.endswith(".py")} == set(data)
    packages = {".".join(path.parent.relative_to(ROOT).parts) for path in (ROOT / "hf_dualspeed").rglob("__init__.py")}
    assert {*packages, "hf_dualspeed.space_files"} == set(settings["packages"])


def test_roles_and_their_runs_are_the_same_here_and_there():
    assert {key: role.default for key, role in slots.ROLES.items()} == space.RUNS


# --- pushing ------------------------------------------------------------------------------------------------------


def test_a_space_is_pushed_with_the_models_it_loads(hub, tmp_path, capsys):
    (tmp_path / "docs/results").mkdir(parents=True)
    for name in ("compare.md", "compare.png"):
        (tmp_path / "docs/results" / name).write_bytes((ROOT / "docs/results" / name).read_bytes())
    words = ["space", "--push", REPO, "--private", "--dualspeed", "user/fast", "--baseline", "user/full"]
    assert cli.main(words) == 0
    out = capsys.readouterr().out
    assert "spaces/tester/demo" in out
    files = pushed(hub)
    assert files.keys() == {*space.FILES, "checkpoints.json", "compare.md", "compare.png"}
    assert json.loads(files["checkpoints.json"]) == {"baseline": "user/full", "dualspeed": "user/fast"}
    head = yaml.safe_load(files["README.md"].decode().split("---")[1])
    assert head["models"] == ["user/fast", "user/full"]
    assert hub.repos[f"spaces/{REPO}"].private
    assert REPO not in hub.repos
    for name in set(space.FILES) - {"README.md"}:
        assert files[name] == (SPACE / name).read_bytes()
    assert not [name for name, data in files.items() if TOKEN.encode() in data]


def test_runs_that_were_pushed_are_found(hub, tmp_path, capsys):
    run = tmp_path / "runs/quickstart"
    run.mkdir(parents=True)
    (run / "results.json").write_text(json.dumps({"hub": {"repo_id": "tester/quick"}}))
    assert cli.main(["space", "--push", REPO, "--pruned", "user/pruned"]) == 0
    assert json.loads(pushed(hub)["checkpoints.json"]) == {"dualspeed": "tester/quick", "pruned": "user/pruned"}
    assert "no model yet" not in capsys.readouterr().err


def test_a_space_can_be_pushed_again_and_without_models(hub, capsys):
    assert cli.main(["space", "--push", REPO, "--dualspeed", "user/one"]) == 0
    assert cli.main(["space", "--push", REPO]) == 0
    assert pushed(hub).keys() == {*space.FILES, "checkpoints.json"}
    assert json.loads(pushed(hub)["checkpoints.json"]) == {}
    assert "The Space has no model yet" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--push", "demo"], "`push` must be a Space 'user/name', got 'demo'"),
        (
            ["--push", REPO, "--pruned", "runs/mine"],
            "`pruned` must be a model on the Hub, 'user/name', got 'runs/mine'",
        ),
        (["--push", REPO, "--compare", "gone.md"], "`compare` is 'gone.md', but there is no such file"),
        (["--push", "somebody/demo"], "it is not allowed (HTTP 403"),
    ],
)
def test_what_cannot_be_pushed_is_one_line(hub, tmp_path, capsys, words, message):
    (tmp_path / "runs/mine").mkdir(parents=True)
    assert cli.main(["space", *words]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not hub.repos


def test_a_token_is_never_pushed(hub, tmp_path, capsys):
    (tmp_path / "compare.md").write_text(json.dumps({"command": f"--hub_token {TOKEN}"}))
    assert cli.main(["space", "--push", REPO, "--compare", "compare.md"]) == 2
    assert "holds your Hub token and is not pushed" in capsys.readouterr().err
    assert not hub.repos


# --- running ------------------------------------------------------------------------------------------------------


def test_the_demo_without_gradio_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setattr(space, "find_spec", lambda name: None)
    assert cli.main(["demo"]) == 2
    assert 'pip install "hf-dualspeed[demo]"' in capsys.readouterr().err


def test_files_that_are_missing_are_told(monkeypatch, tmp_path):
    monkeypatch.setattr(space, "PLACES", (tmp_path,))
    with pytest.raises(FileNotFoundError, match="missing from this installation"):
        space.source_folder()


def test_the_demo_hands_its_words_to_the_page(monkeypatch):
    seen = []
    page = types.ModuleType("app")
    page.main = lambda *words: seen.append(words)
    monkeypatch.setitem(sys.modules, "app", page)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(space, "find_spec", lambda name: name)
    assert cli.main(["demo", "--dualspeed", "user/fast", "--webcam", "--port", "8000"]) == 0
    assert seen == [({"baseline": None, "dualspeed": "user/fast", "pruned": None}, True, 8000)]
    assert sys.path[0] == str(SPACE)
