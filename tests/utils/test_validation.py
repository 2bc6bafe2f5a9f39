"""Checks of arguments: what they let through, and that their errors name argument, value and remedy."""

from __future__ import annotations

import math
import re

import pytest

from hf_dualspeed.utils.validation import Parser, as_count, as_dict, check_choice, check_keys, check_range, require


@pytest.mark.parametrize(
    ("value", "options", "allowed"),
    [
        (-0.1, {}, "[0, 1]"),
        (1.1, {}, "[0, 1]"),
        (0, {"left_open": True}, "(0, 1]"),
        (1, {"right_open": True}, "[0, 1)"),
        (-1, {"high": None}, "[0, inf)"),
        (math.nan, {}, "[0, 1]"),
        (True, {}, "[0, 1]"),
        ("0.5", {}, "[0, 1]"),
        (None, {}, "[0, 1]"),
    ],
)
def test_what_lies_outside_of_a_range_is_named(value, options, allowed):
    said = f"`ratio` must be in {allowed}, got {value!r}. Use 0.0."
    with pytest.raises(ValueError, match=f"^{re.escape(said)}$"):
        check_range("ratio", value, **{"low": 0, "high": 1, "off": "Use 0.0.", **options})


@pytest.mark.parametrize(
    ("value", "options"),
    [(0, {}), (1.0, {}), (1e9, {"high": None}), (0.5, {"left_open": True, "right_open": True})],
)
def test_a_range_holds_its_ends_unless_they_are_open(value, options):
    check_range("ratio", value, **{"low": 0, "high": 1, **options})


@pytest.mark.parametrize("value", [0, -1, True, 2.0, "2.0", "two", None])
def test_counts_are_whole_and_at_least_one(value):
    assert (as_count("parts", 2), as_count("parts", "2")) == (2, 2)
    said = f"`parts` must be a whole number of at least 1 or 'auto', got {value!r}."
    with pytest.raises(ValueError, match=re.escape(said)):
        as_count("parts", value, "or 'auto'")


def test_choices_and_keys_are_listed_and_the_nearest_is_offered():
    known = ["linear", "cosine"]
    check_choice("schedule", "linear", known)
    check_keys("options", {"cosine": 1}, known)
    with pytest.raises(ValueError, match="must be one of 'linear', 'cosine', got 'linaer'. Did you mean 'linear'"):
        check_choice("schedule", "linaer", known)
    with pytest.raises(ValueError, match=r"one of 'linear', 'cosine', got 3\.$"):
        check_choice("schedule", 3, known)
    with pytest.raises(ValueError, match=r"`options` has an unknown key 'cosin'\. Did you mean 'cosine'\?"):
        check_keys("options", {"linear": 1, "cosin": 2}, known)


def test_mappings_may_be_json():
    assert as_dict("lora", '{"r": 4}') == as_dict("lora", {"r": 4}) == {"r": 4}
    assert as_dict("lora", None) is None
    for wrong in ("[4]", [4]):
        with pytest.raises(ValueError, match=r"`lora` must be a mapping, got \[4\]. Write it like"):
            as_dict("lora", wrong)
    with pytest.raises(ValueError, match="`lora` must be a JSON mapping, got 'r=4'"):
        as_dict("lora", "r=4")


def test_a_batch_without_a_key_is_named():
    require({"labels": 1}, "labels")
    with pytest.raises(ValueError, match=r"batch has no `labels`, only \['a', 'b'\]\. Return it"):
        require({"b": 1, "a": 2}, "labels")


def test_a_wrong_word_ends_no_process():
    with pytest.raises(ValueError, match="unrecognized arguments: --that"):
        Parser().parse_args(["--that"])
