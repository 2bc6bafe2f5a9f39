"""The metrics, against examples worked by hand, as evaluate and the Hub see them."""

from __future__ import annotations

import ast
import re
import sys

import evaluate
import pytest
from datasets import DownloadConfig
from huggingface_hub import RepoCard

from hf_dualspeed import cli
from hf_dualspeed.metrics import CLASSES, load_metric, metric_folder
from hf_dualspeed.metrics.anls.anls import edit_distance
from hf_dualspeed.metrics.multiple_choice.multiple_choice import LETTERS, chosen
from hf_dualspeed.metrics.vqa_accuracy import vqa_accuracy


def scored(name: str, prediction: str, references, **columns) -> float:
    result = load_metric(name).compute(predictions=[prediction], references=[references], **columns)
    assert list(result) == [name]
    return result[name]


@pytest.mark.parametrize(
    ("prediction", "references", "expected"),
    [
        ("red", ["red"], 1),
        (" Red\n", ["red"], 1),
        ("a  red circle", ["A red circle"], 1),
        ("red", ["blue", "RED"], 1),
        ("red", "red", 1),
        ("red.", ["red"], 0),
        ("reddish", ["red"], 0),
        ("", ["red"], 0),
    ],
)
def test_exact_match(prediction, references, expected):
    assert scored("exact_match", prediction, references) == expected


# --- VQA accuracy -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("agreeing", "people", "expected"),
    [
        # Ten people, m of whom agree: of the ten ways to leave one out, m leave m - 1 of them and 10 - m leave m.
        (0, 10, 0),
        (1, 10, 9 * (1 / 3) / 10),  # 0.3
        (2, 10, (2 * 1 / 3 + 8 * 2 / 3) / 10),  # 0.6
        (3, 10, (3 * 2 / 3 + 7 * 1) / 10),  # 0.9
        (4, 10, 1),
        (10, 10, 1),
        # Five people: (3 leave 2 of them: 2/3) and (2 leave 3: 1).
        (3, 5, (3 * 2 / 3 + 2 * 1) / 5),
        # Three people: both others have to agree.
        (2, 3, (2 * 1 / 2 + 1 * 1) / 3),
        (3, 3, 1),
        (1, 2, (0 + 1) / 2),
        (2, 2, 1),
        (1, 1, 1),
        (0, 1, 0),
    ],
)
def test_vqa_accuracy_counts_people(agreeing, people, expected):
    answers = ["red"] * agreeing + [f"other {number}" for number in range(people - agreeing)]
    assert scored("vqa_accuracy", "red", answers) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The Two Dogs", "2 dogs"),
        ("none", "0"),
        ("ten", "10"),
        ("dont", "don't"),
        ("couldnt've", "couldn't've"),
        ("couldn'tve", "couldn't've"),
        ("well", "well"),
        ("yes, sir", "yes sir"),  # beside a space it goes
        ("black-white", "black white"),  # else a space takes its place
        ("1,000 people-ish", "1000 peopleish"),  # and with a thousands separator all of it goes
        ("2.5 m.", "2.5 m"),
        ("u.s.", "us"),
        ("what?!", "what"),
        ("a\nred\tcar ", "red car"),
    ],
)
def test_official_normal_form(text, expected):
    assert " ".join(vqa_accuracy.normalized(text).split()) == expected
    assert scored("vqa_accuracy", text, [expected]) == 1


def test_vqa_accuracy_of_several_questions_is_their_mean():
    result = load_metric("vqa_accuracy").compute(
        predictions=["two", "red"], references=[["2"] * 9 + ["3"], ["red"] + ["blue"] * 9]
    )
    assert result["vqa_accuracy"] == pytest.approx((1 + 0.3) / 2)


# --- relaxed accuracy ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prediction", "reference", "expected"),
    [
        ("95", "100", 1),  # exactly 5 % off
        ("105", "100", 1),
        ("105.1", "100", 0),
        ("94.9", "100", 0),
        ("0.95", "1", 1),
        ("1,234", "1234", 1),
        ("1,234.5", "1200", 1),
        ("12,34", "1234", 0),  # no thousands separator
        ("12%", "12 %", 1),
        ("12%", "0.12", 1),
        ("12", "12%", 0),
        ("-10", "-10.4", 1),
        ("-10", "10", 0),
        ("0", "0.0", 1),
        ("0.01", "0", 0),
        ("1e3", "1000", 1),
        ("Blue", "blue", 1),
        ("blues", "blue", 0),
        ("nan", "NaN", 1),  # a word
        ("inf", "5", 0),
        ("five", "5", 0),
        (".", ".", 1),
        ("", "5", 0),
    ],
)
def test_relaxed_accuracy(prediction, reference, expected):
    assert scored("relaxed_accuracy", prediction, [reference]) == expected


def test_relaxed_accuracy_takes_the_best_reference_and_another_tolerance():
    assert scored("relaxed_accuracy", "10", ["20", "10.2"]) == 1
    assert scored("relaxed_accuracy", "10", ["20", "10.2"], tolerance=0.01) == 0


# --- ANLS ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [("kitten", "sitting", 3), ("", "abc", 3), ("abc", "", 3), ("flaw", "lawn", 2), ("same", "same", 0), ("", "", 0)],
)
def test_edit_distance(first, second, expected):
    assert edit_distance(first, second) == expected


@pytest.mark.parametrize(
    ("prediction", "references", "expected"),
    [
        ("2001", ["2001"], 1),
        ("New  York", ["new york"], 1),
        ("kitten", ["sitting"], 1 - 3 / 7),
        ("abcd", ["abxy"], 0),  # half of it is wrong: not below the threshold
        ("abcde", ["abcxy"], 1 - 2 / 5),
        ("xyz", ["abc"], 0),
        ("", ["abc"], 0),
        ("hello", ["world", "hallo"], 1 - 1 / 5),  # the best one counts
    ],
)
def test_anls(prediction, references, expected):
    assert scored("anls", prediction, references) == pytest.approx(expected)


def test_anls_threshold():
    assert scored("anls", "abcd", ["abxy"], threshold=0.6) == pytest.approx(0.5)


# --- multiple choice ----------------------------------------------------------------------------------------------

OPTIONS = ["a cat", "a dog", "a black dog", "a bird"]


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("B", "B"),
        ("b", "B"),
        ("B.", "B"),
        ("(b) because it barks", "B"),
        ("B) a dog", "B"),
        ("**C**", "C"),
        ("D: it has wings", "D"),
        ("The answer is B", "B"),
        ("The answer is B.", "B"),
        ("the answer is (c).", "C"),
        ("Answer: D", "D"),
        ("I would choose option C here", "C"),
        ("The answer is A. No, the answer is D.", "D"),
        ("The correct choice is b.", "B"),
        ("a dog", "B"),
        ("A dog.", "B"),
        ("It is a black dog", "C"),
        ("A cat sits there", "A"),
        ("The answer is a bird", "D"),
        ("I think B fits", "B"),
        ("It must be (d), I guess", "D"),
        ("a cat and a bird", None),
        ("B or C", None),
        ("E", None),
        ("A fish", None),
        ("I cannot tell", None),
        ("concatenate", None),
        ("", None),
    ],
)
def test_the_choice_is_read_out_of_free_text(text, letter):
    place = chosen(text, OPTIONS)
    assert (None if place is None else LETTERS[place]) == letter


@pytest.mark.parametrize("reference", ["B", "b", "A dog", ["B"]])
def test_multiple_choice_takes_a_letter_or_an_options_text(reference):
    result = load_metric("multiple_choice").compute(
        predictions=["The answer is B", "D"], references=[reference, reference], options=[OPTIONS, OPTIONS]
    )
    assert result == {"multiple_choice": 0.5}


def test_a_reference_that_is_no_option_is_an_error():
    with pytest.raises(ValueError, match=r"reference 'E' is neither a letter of 'ABCD' nor one of the options"):
        scored("multiple_choice", "B", "E", options=[OPTIONS])


# --- as evaluate and the Hub see them -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """Where evaluate keeps copies of the modules that it loads."""
    folder = str(tmp_path_factory.mktemp("modules"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate.config, "HF_MODULES_CACHE", folder)
        patch.syspath_prepend(folder)
        yield folder


@pytest.mark.parametrize("name", CLASSES)
def test_evaluate_loads_the_folder(name, cache):
    options = {"options": [["x", "y"]]} if name == "multiple_choice" else {}
    metric = evaluate.load(str(metric_folder(name)), cache_dir=cache)
    assert isinstance(metric, evaluate.Metric)
    assert metric.compute(predictions=["B"], references=[["B"]], **options) == {name: 1.0}
    assert metric.description
    assert name in metric.inputs_description


@pytest.mark.parametrize("name", CLASSES)
def test_a_module_stands_alone(name):
    tree = ast.parse((metric_folder(name) / f"{name}.py").read_text())
    imports = [node for node in ast.walk(tree) if isinstance(node, (ast.Import, ast.ImportFrom))]
    assert all(isinstance(node, ast.Import) and len(node.names) == 1 for node in imports)
    modules = {node.names[0].name for node in imports}
    assert modules - {"datasets", "evaluate"} <= sys.stdlib_module_names


def test_unknown_metrics_are_named():
    with pytest.raises(ValueError, match=r"`metric` must be one of 'exact_match', .* Did you mean 'anls'"):
        load_metric("anl")


@pytest.mark.parametrize("name", CLASSES)
def test_a_cards_example_gives_what_it_says(name, cache):
    card = (metric_folder(name) / "README.md").read_text(encoding="utf-8")
    code = re.search(r"```python\n(.*?)```", card, re.DOTALL)[1]
    *_, said = code.strip().splitlines()
    *lines, _ = code.replace("path/to/this/folder", str(metric_folder(name))).strip().splitlines()
    head, call = "\n".join(lines).split("metric.compute", 1)
    scope: dict = {}
    exec(f"{head}result = metric.compute{call}", scope)
    expected = ast.literal_eval(said.removeprefix("# "))
    assert scope["result"] == {key: pytest.approx(value) for key, value in expected.items()}
    assert RepoCard(card).data.to_dict()["tags"] == ["evaluate", "metric"]


# --- on the Hub ---------------------------------------------------------------------------------------------------


def test_a_metric_is_pushed_and_stands_alone(hub, cache, tmp_path, monkeypatch, capsys):
    hub.put("spaces/tester/our_vqa", {"README.md": "---\ntitle: Old\n---\n\n## Mine\n\nMy words.\n"})
    assert cli.main(["push-metric", "vqa_accuracy", "tester/our_vqa"]) == 0
    assert 'evaluate.load("tester/our_vqa")' in capsys.readouterr().out
    files = {name: data.decode() for name, data in hub.files("spaces/tester/our_vqa").items()}
    assert files.keys() == {"our_vqa.py", "README.md", "app.py", "requirements.txt"}
    assert 'evaluate.load("tester/our_vqa")' in files["app.py"]
    assert 'evaluate.load("tester/our_vqa")' in files["README.md"]
    assert "My words." in files["README.md"]
    assert "title: VQA Accuracy" in files["README.md"]
    monkeypatch.setattr(evaluate.config, "HUB_EVALUATE_URL", hub.url + "/spaces/{path}/resolve/{revision}/{name}")
    monkeypatch.setattr(evaluate.loading, "increase_load_count", lambda *args, **options: None)
    download = DownloadConfig(cache_dir=tmp_path, token=hub.token)
    metric = evaluate.load("tester/our_vqa", revision="main", cache_dir=cache, download_config=download)
    assert metric.compute(predictions=["two"], references=[["2"]]) == {"vqa_accuracy": 1.0}


def test_a_new_space_is_made(hub):
    assert cli.main(["push-metric", "anls", "tester/anls", "--private"]) == 0
    assert hub.repos["spaces/tester/anls"].private
    assert hub.asked("POST /api/spaces/tester/anls/commit") == 1


def test_a_space_that_python_cannot_import(hub, capsys):
    assert cli.main(["push-metric", "anls", "tester/our-anls"]) == 2
    assert "without hyphens, got 'tester/our-anls'" in " ".join(capsys.readouterr().err.split())
    assert not hub.repos


def test_a_space_that_refuses(hub, capsys):
    hub.fail(403, path="/commit/")
    assert cli.main(["push-metric", "anls", "tester/anls"]) == 2
    assert "Cannot push to the Space 'tester/anls'" in capsys.readouterr().err
