"""`dualspeed space` against a Hub on this machine, and the Space's folder as Spaces read it."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import tomllib
import types
import venv
from pathlib import Path

import pytest
import slots
import yaml
from loopback_hub import TOKEN
from packaging.requirements import Requirement
from space_server import started

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


def own(files: dict[str, bytes]) -> set[str]:
    """The Space's files beside the library's source."""
    return {name for name in files if not name.startswith("hf_dualspeed/")}


# --- the folder ---------------------------------------------------------------------------------------------------


def test_the_folder_is_a_space():
    head, body = split_front_matter((SPACE / "README.md").read_text(encoding="utf-8"))
    assert (head["sdk"], head["app_file"], head["license"]) == ("gradio", "app.py", "apache-2.0")
    assert len(head["short_description"]) <= 60  # the Hub refuses more
    assert body.strip().startswith("# ")
    # What the library and adapters need, in the versions that CI tests: the library itself travels with the Space.
    lines = (SPACE / "requirements.txt").read_text(encoding="utf-8").split()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    asked = [Requirement(one).name for one in (*project["dependencies"], *extras["peft"], *extras["demo"])]
    assert [line.partition("==")[0] for line in lines] == asked
    assert set(lines) <= set((ROOT / "constraints.txt").read_text(encoding="utf-8").split())
    assert f"gradio=={head['sdk_version']}" in lines


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
    for name in ("compare.md", "compare.png", "ablation_equal_time.png"):
        (tmp_path / "docs/results" / name).write_bytes((ROOT / "docs/results" / name).read_bytes())
    words = ["space", "--push", REPO, "--private", "--dualspeed", "user/fast", "--baseline", "user/full"]
    assert cli.main(words) == 0
    out = capsys.readouterr().out
    assert "spaces/tester/demo" in out
    files = pushed(hub)
    assert own(files) == {*space.FILES, "checkpoints.json", "compare.md", "compare.png", "equal_time.png"}
    source = {name for name in files if name.startswith("hf_dualspeed/")}
    assert source == {f"hf_dualspeed/{path}" for path in map(str, space.library_files())}
    assert {"hf_dualspeed/__init__.py", "hf_dualspeed/publishing/templates/model_card.md.jinja"} <= source
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
    assert own(pushed(hub)) == {*space.FILES, "checkpoints.json"}
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


# --- what is pushed runs ------------------------------------------------------------------------------------------


def pushed_space(folder):
    """A Space as it is pushed, whose library says from where it is loaded."""
    folder.mkdir()
    space.write_space(folder, {})
    with (folder / "hf_dualspeed" / "__init__.py").open("a") as file:
        file.write('print("library:", __file__, flush=True)\n')
    return folder / "app.py"


def answers(tiny_runs, tmp_path, python=sys.executable):
    """Whether the pushed Space answers, from the library that it brings along."""
    app = pushed_space(tmp_path / "pushed")
    (tmp_path / "work").mkdir()
    with started(tiny_runs, tmp_path / "work", app, python) as page:
        said = page.ask({"path": page.upload(), "meta": {"_type": "gradio.FileData"}})
    assert "event: complete" in said
    assert f"library: {tmp_path / 'pushed' / 'hf_dualspeed' / '__init__.py'}" in (tmp_path / "work/log.txt").read_text()


def test_a_pushed_space_runs_on_its_own_library(tiny_runs, tmp_path):
    pytest.importorskip("gradio")
    answers(tiny_runs, tmp_path)


@pytest.mark.slow
def test_a_pushed_space_runs_in_a_fresh_environment(tiny_runs, tmp_path):
    """With nothing installed but its requirements."""
    venv.create(tmp_path / "venv", with_pip=True)
    python = str(tmp_path / "venv" / "bin" / "python")
    subprocess.run([python, "-m", "pip", "install", "-q", "-r", str(SPACE / "requirements.txt")], check=True)
    answers(tiny_runs, tmp_path, python)


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


def test_a_port_in_use_is_named_before_anything_is_loaded(capsys):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert cli.main(["demo", "--port", str(port)]) == 2
    line = capsys.readouterr().err
    assert f"`port` {port} cannot be used: Address already in use. Choose another" in line
    assert line.count("\n") == 1
