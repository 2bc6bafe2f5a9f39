"""The metrics on odd answers and references: what the score must be, or that there is none."""

from __future__ import annotations

import inspect
from importlib import import_module

import pytest

from hf_dualspeed.metrics import CLASSES, load_metric
from hf_dualspeed.metrics.multiple_choice.multiple_choice import LETTERS, checked, chosen

TEN = 10
ANIMALS = ["a cat", "a dog", "a black dog", "a bird"]
LANGUAGES = ["C++", "C#", "Java"]
GENES = ["FF", "Ff", "ff"]
UNITS = ["mW", "MW"]


def compute(name: str, prediction, references, **columns) -> float:
    return load_metric(name).compute(predictions=[prediction], references=[references], **columns)[name]


# --- scores -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("metric", "prediction", "references", "expected"),
    [
        # One letter with its accent, or two characters: the same text.
        *((name, "cafe\u0301", ["caf\u00e9"], 1) for name in ("exact_match", "relaxed_accuracy", "anls")),
        # All ten agree: the official script compares what is written.
        ("vqa_accuracy", "", ["A"] * TEN, 0),
        ("vqa_accuracy", "A", ["A"] * TEN, 1),
        ("vqa_accuracy", "the", ["A"] * TEN, 0),
        ("vqa_accuracy", "", ["?"] * TEN, 0),
        ("vqa_accuracy", "?", ["?"] * TEN, 1),
        ("vqa_accuracy", "!", ["?"] * TEN, 0),
        ("vqa_accuracy", " \n", ["the"] * TEN, 0),
        ("vqa_accuracy", "yes", ["yes"] * TEN, 1),
        ("vqa_accuracy", " yes\n", ["yes"] * TEN, 1),
        ("vqa_accuracy", "two", ["2"] * TEN, 0),
        ("vqa_accuracy", "yes.", ["yes"] * TEN, 0),
        # They do not: the normal form, and as written where it leaves nothing.
        ("vqa_accuracy", "two", ["2"] * 9 + ["3"], 1),
        ("vqa_accuracy", "Yes.", ["yes"] * 9 + ["no"], 1),
        ("vqa_accuracy", "", ["A"] * 5 + ["?"] * 5, 0),
        ("vqa_accuracy", "a", ["A"] * 5 + ["?"] * 5, 1),
        ("vqa_accuracy", "?", ["A"] * 9 + ["?"], 0.3),
        ("vqa_accuracy", "", ["A"], 0),
        ("vqa_accuracy", "a", ["A"], 1),
        ("vqa_accuracy", "the red", ["red"], 1),
        ("vqa_accuracy", "", ["red"] * 9 + [""], 0.3),
        ("relaxed_accuracy", "5", "1e999", 0),
        ("relaxed_accuracy", "1e999", "5", 0),
        ("relaxed_accuracy", "1e999", "1E999", 1),
        ("relaxed_accuracy", "-1e999", "1e999", 0),
        ("relaxed_accuracy", "1e999%", "5", 0),
        ("relaxed_accuracy", "inf", "inf", 1),
        ("relaxed_accuracy", "5", "inf", 0),
        ("relaxed_accuracy", "infinity", "inf", 0),
        ("relaxed_accuracy", "nan", "5", 0),
        ("relaxed_accuracy", "−5", "-5", 1),
        ("relaxed_accuracy", "-5", "−5", 1),
        ("relaxed_accuracy", "−5", "5", 0),
        ("relaxed_accuracy", "−1,200.5", "-1200.5", 1),
        ("relaxed_accuracy", "1e−3", "0.001", 1),
        ("relaxed_accuracy", "−", "-", 1),  # texts
        ("relaxed_accuracy", "１２％", "12%", 1),
        ("relaxed_accuracy", "", "0", 0),
        ("relaxed_accuracy", " ", "0", 0),
        ("relaxed_accuracy", "%", "0", 0),
        ("relaxed_accuracy", "1e-400", "0", 1),
        ("exact_match", "", "red", 0),
        ("exact_match", " \n\t", "red", 0),
        ("exact_match", "−5", "-5", 0),
        ("exact_match", "-5", "5", 0),
        ("exact_match", "C++", "C#", 0),
        ("exact_match", "red", ["blue", "", "red"], 1),
        ("exact_match", "", ["blue", " "], 0),
        ("anls", " ", ["blue", ""], 0),
        ("relaxed_accuracy", "", ["5", "\n"], 0),
        ("anls", "", "", 1),
        ("anls", " ", "red", 0),
        ("anls", "red", [""], 0),
        ("anls", "-5", "5", 0),
        ("anls", "É", "é", 1),
    ],
)
def test_scores(metric, prediction, references, expected):
    assert compute(metric, prediction, references) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("text", "options", "letter"),
    [
        # Signs and symbols count, and case where it alone tells.
        ("-5", ["-5", "5"], "A"),
        ("5", ["-5", "5"], "B"),
        ("5.", ["-5", "5"], "B"),
        ("It is -5.", ["-5", "5"], "A"),
        ("It is 5", ["-5", "5"], "B"),
        ("C++", LANGUAGES, "A"),
        ("C#", LANGUAGES, "B"),
        ("I like C++.", LANGUAGES, "A"),
        ("java", LANGUAGES, "C"),
        ("Na+", ["Na", "Na+"], "B"),
        ("It is the ion Na+ here", ["Na", "Na+"], "B"),
        ("It is Na", ["Na", "Na+"], "A"),
        ("ff", GENES, "C"),
        ("It is Ff.", GENES, "B"),
        ("fF", GENES, None),
        ("It is fF.", GENES, None),
        ("MW", UNITS, "B"),
        ("mw", UNITS, None),
        ("5%", ["5", "5%"], "B"),
        ("It is 5", ["5", "5%"], "A"),
        ("about 5.5 m", ["5", "5.5"], "B"),
        ("It is 1,000", ["1", "1,000"], "B"),
        ("[1, 2]", ["(1, 2)", "[1, 2]"], "B"),
        ("<", ["<", ">", "="], "A"),
        ("?", ["!", "?"], "B"),
        ("10²", ["102", "10²"], "B"),
        ("AB", ["A", "B", "AB", "O"], "C"),
        ("", ["", "x"], None),
        # What is denied is not chosen.
        ("It is not A", ANIMALS, None),
        ("The answer is not A", ANIMALS, None),
        ("The answer isn't A.", ANIMALS, None),
        ("It isn’t (B)", ANIMALS, None),
        ("neither A nor B", ANIMALS, None),
        ("It is neither A nor B but C", ANIMALS, "C"),
        ("not A but B", ANIMALS, "B"),
        ("B, not A", ANIMALS, "B"),
        ("B rather than A", ANIMALS, "B"),
        ("Not A. B.", ANIMALS, "B"),
        ("Option A is wrong, so B", ANIMALS, "B"),
        ("A is incorrect", ANIMALS, None),
        ("A is not right and B is", ANIMALS, "B"),
        ("B is right because A is not", ANIMALS, "B"),
        ("A can be ruled out. B", ANIMALS, "B"),
        ("I do not think it is A, it is C", ANIMALS, "C"),
        ("It can't be A or B, so it is C", ANIMALS, "C"),
        ("A is wrong. The answer is D", ANIMALS, "D"),
        ("A is not wrong", ANIMALS, "A"),
        ("It is not a cat", ANIMALS, None),
        ("It is not a cat; it is a bird", ANIMALS, "D"),
        ("No, it is not", ["yes", "no"], "B"),
        ("It is not red", ["red", "not red"], "B"),
        ("The one that is not red is B", ANIMALS, "B"),
        # Several are none.
        ("A or B", ANIMALS, None),
        ("A and B", ANIMALS, None),
        ("A, B", ANIMALS, None),
        ("A/B", ANIMALS, None),
        ("(A) or (B)", ANIMALS, None),
        ("Option A or option B", ANIMALS, None),
        ("The answer is A or B", ANIMALS, None),
        ("A or B? The answer is B", ANIMALS, "B"),
        # Other letters than ASCII's.
        ("Ｂ", ANIMALS, "B"),
        ("ｂ", ANIMALS, "B"),
        ("（Ｂ）", ANIMALS, "B"),
        ("Ｂ。", ANIMALS, "B"),
        ("The answer is Ｂ", ANIMALS, "B"),
        ("−5", ["-5", "5"], "A"),
        (" \n ", ANIMALS, None),
        ("A is correct", ANIMALS, "A"),
    ],
)
def test_choices(text, options, letter):
    place = chosen(text, checked(options))
    assert (None if place is None else LETTERS[place]) == letter


@pytest.mark.parametrize(
    ("reference", "options", "letter"),
    [
        ("-5", ["-5", "5"], "A"),
        ("C#", LANGUAGES, "B"),
        ("Ｂ", LANGUAGES, "B"),
        ("ff", GENES, "C"),
        ("O", ["A", "O"], "B"),
    ],
)
def test_references_name_one_option(reference, options, letter):
    assert compute("multiple_choice", letter, reference, options=[options]) == 1


# --- no scores ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("metric", CLASSES)
@pytest.mark.parametrize("references", [[], [None], ["x", None], None])
def test_missing_references_are_named(metric, references):
    options = {"options": [["x", "y"]] * 2} if metric == "multiple_choice" else {}
    with pytest.raises(ValueError, match=r"`references`\[1\] is .*a text is missing"):
        load_metric(metric).compute(predictions=["x", "x"], references=[["x"], references], **options)


@pytest.mark.parametrize("metric", CLASSES)
def test_a_missing_answer_is_named(metric):
    options = {"options": [["x", "y"]] * 2} if metric == "multiple_choice" else {}
    with pytest.raises(ValueError, match=r"`predictions`\[1\] is None: a text is missing"):
        load_metric(metric).compute(predictions=["x", None], references=[["x"], ["x"]], **options)


@pytest.mark.parametrize(
    ("reference", "options", "said"),
    [
        ("a", ["a", "b", "a"], "two of its options are 'a'"),
        ("a", ["a", " a "], "two of its options are 'a'"),
        ("x", [None, "x"], "its options are .*None.*would give others its letter"),
        ("x", ["x", None], "a text is missing"),
        ("x", [], "a text is missing"),
        ("A", ["O", "A", "B"], "option B is 'A', which is also the letter of another one"),
        ("A", ["b", "x"], "option A is 'b', which is also the letter"),
        ("fF", GENES, r"reference 'fF' may be each of the options \['FF', 'Ff', 'ff'\]"),
        ("c", ["C++", "C#"], "reference 'c' is neither a letter of 'AB' nor one of the options"),
        ("", ["x", "y"], "reference '' is neither"),
        ("AB", ["x", "y"], "reference 'AB' is neither"),
    ],
)
def test_options_that_cannot_be_told_apart(reference, options, said):
    with pytest.raises(ValueError, match=rf"Question 0 cannot be scored: .*{said}"):
        compute("multiple_choice", "x", reference, options=[options])


@pytest.mark.parametrize(
    ("metric", "option", "values"),
    [
        ("relaxed_accuracy", "tolerance", [-0.1, float("nan"), float("inf")]),
        ("anls", "threshold", [0, -1, 1.5, float("nan")]),
    ],
)
def test_limits_are_checked(metric, option, values):
    for value in values:
        with pytest.raises(ValueError, match=f"`{option}` must be "):
            compute(metric, "1", "1", **{option: value})


def test_all_metrics_look_for_missing_texts_in_the_same_way():
    """Each module stands alone, so each has the function; the copies must not drift apart. VQA's counts blank texts."""
    modules = [import_module(f"hf_dualspeed.metrics.{name}.{name}") for name in CLASSES]
    sources = {inspect.getsource(module.pairs).partition("        #")[0] for module in modules}
    assert len({source.removesuffix("        yield prediction, accepted\n") for source in sources}) == 1


@pytest.mark.parametrize("text", ["All but A", "anything but A", "I would rule out A", "This rules out option A."])
def test_an_option_that_is_ruled_out_is_not_chosen(text):
    assert chosen(text, ["cat", "dog"]) is None
    assert chosen(f"{text.rstrip('.')}, so B", ["cat", "dog"]) == 1


def test_an_accent_is_one_character_or_two():
    assert chosen("un cafe\u0301", ["th\u00e9", "caf\u00e9"]) == 1
    assert compute("multiple_choice", "caf\u00e9", "cafe\u0301", options=[["th\u00e9", "caf\u00e9"]]) == 1
    with pytest.raises(ValueError, match="two of its options"):
        checked(["caf\u00e9", "cafe\u0301"])
