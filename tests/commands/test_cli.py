import subprocess
import sys
import types

import pytest

import hf_dualspeed
from hf_dualspeed import __version__, cli


def test_pruners_are_listed_with_what_they_do(capsys):
    assert cli.main(["pruners"]) == 0
    out = capsys.readouterr().out
    assert "divprune" in out
    assert "random" in out


@pytest.mark.parametrize("name", ["evaluate", "bench"])
def test_subcommands_hand_their_words_on(monkeypatch, name):
    seen = []
    module = types.ModuleType(f"hf_dualspeed.commands.{name}")
    module.main = lambda argv: seen.append(argv)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    assert cli.main([name, "--steps", "3", "--help"]) == 0
    assert seen == [["--steps", "3", "--help"]]


def test_user_errors_are_one_line(capsys, monkeypatch):
    monkeypatch.delenv("DUALSPEED_DEBUG", raising=False)
    assert cli.main(["train", "--learning_rat", "1"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert "Unknown argument `--learning_rat`. Did you mean '--learning_rate'?" in captured.err


def test_debug_raises(monkeypatch):
    monkeypatch.setenv("DUALSPEED_DEBUG", "1")
    with pytest.raises(FileNotFoundError, match=r"no\.yaml"):
        cli.main(["train", "--config", "no.yaml"])


def test_help_lists_the_commands(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["--help"])
    assert stop.value.code == 0
    out = capsys.readouterr().out
    for name, (_, what) in cli.COMMANDS.items():
        assert f" {name} {what}" in " ".join(out.split())


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_help_of_each_command(capsys, name, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        cli.main([name, "--help"])
    assert stop.value.code == 0
    captured = capsys.readouterr()
    usage, _, rest = captured.out.partition("\n\n")
    assert usage.startswith(f"usage: dualspeed {name} ")
    assert "options:" in rest
    description = rest.partition("\n\n")[0]
    assert description.strip()
    assert not description.startswith("options:")  # a line of what it does comes first
    assert not captured.err
    assert not list(tmp_path.iterdir())


def test_unknown_command(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["trian"])
    assert stop.value.code == 2
    assert "train" in capsys.readouterr().err


@pytest.mark.parametrize("words", [None, "--help", "--version"])
def test_no_torch_is_loaded_to_say_what_there_is(words):
    """Loading it takes seconds, also for `import hf_dualspeed`."""
    code = "import sys, hf_dualspeed\n"
    if words:
        code += f"from hf_dualspeed import cli\ntry:\n    cli.main([{words!r}])\nexcept SystemExit:\n    pass\n"
    code += "heavy = {'torch', 'transformers', 'datasets', 'numpy', 'matplotlib', 'rich'} & sys.modules.keys()\n"
    code += "assert not heavy, heavy\nassert 'DualSpeedTrainer' in dir(hf_dualspeed)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)


def test_version(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out == f"dualspeed {__version__}\n"


def test_every_public_name_is_there():
    for name in hf_dualspeed.__all__:
        assert getattr(hf_dualspeed, name).__name__ == name
    code = "import hf_dualspeed; hf_dualspeed.data.VisionLanguageCollator; from hf_dualspeed import *; DualSpeedTrainer"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)
    with pytest.raises(AttributeError, match="has no attribute 'DualSpedTrainer'"):
        _ = hf_dualspeed.DualSpedTrainer
