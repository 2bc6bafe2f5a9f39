"""Checks of arguments: what they let through, and that their errors name argument, value and remedy."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Literal

import numpy as np
import pytest

from hf_dualspeed.utils.validation import (
    Parser,
    as_count,
    as_dict,
    check_choice,
    check_fields,
    check_keys,
    check_range,
    checked,
    require,
    surprises_named,
)


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


Kind = Enum("Kind", {"A": "a", "B": "b"})


@dataclass
class Options:
    whole: int = 1
    share: float | None = None
    flag: bool = False
    name: str = ""
    names: list[str] = field(default_factory=list)
    depths: tuple[float, ...] = ()
    kind: Kind | str = "a"
    token: str | None = None
    more: dict | str | None = None
    size: Literal["big", 2] = 2

    def __post_init__(self):
        check_fields(self)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"whole": True}, "`whole` must be a whole number, got True."),
        ({"whole": 2.0}, "`whole` must be a whole number, got 2.0."),
        ({"whole": np.bool_(True)}, "`whole` must be a whole number, got True."),
        ({"whole": 2**40}, "`whole` must be at most 4,294,967,295, got 1099511627776."),
        ({"share": "0.5"}, "`share` must be a finite number or None, got '0.5'."),
        ({"share": np.float32("nan")}, "`share` must be a finite number or None, got nan."),
        ({"share": -np.inf}, "`share` must be a finite number or None, got -inf."),
        ({"flag": "false"}, "`flag` must be True or False, got 'false'."),
        ({"flag": 1}, "`flag` must be True or False, got 1."),
        ({"name": None}, "`name` must be a text, got None."),
        ({"name": b"x"}, "`name` must be a text, got b'x'."),
        ({"names": "*lora*"}, "`names` must be a list, each item a text, got '*lora*'."),
        ({"names": ["a", 3]}, "`names` must be a list, each item a text, got ['a', 3]."),
        ({"names": ("a",)}, "`names` must be a list, each item a text, got ('a',)."),
        ({"depths": [0.5, "x"]}, "`depths` must be a list, each item a finite number, got [0.5, 'x']."),
        ({"kind": "c"}, "`kind` must be one of 'a', 'b', got 'c'."),
        ({"token": 123}, "`token` must be a text or None, got a int."),
        ({"more": [1]}, "`more` must be a mapping or a text or None, got [1]."),
        ({"size": 3}, "`size` must be 'big' or 2, got 3."),
        ({"name": ["x" * 200]}, f"`name` must be a text, got ['{'x' * 95}...."),
    ],
)
def test_fields_of_a_wrong_type_are_named(given, said):
    with pytest.raises(ValueError, match=f"^{re.escape(said)}$"):
        Options(**given)


def test_scalars_of_numpy_and_paths_become_what_is_asked_for():
    options = Options(np.int64(3), np.float32(0.5), np.bool_(True), Path("a/b"), ["x"], [0.5, 1], "b")
    assert [type(value) for value in vars(options).values()][:4] == [int, float, bool, str]
    assert (options.whole, options.share, options.flag, options.name) == (3, 0.5, True, "a/b")
    assert Options(share=3).share == 3


def test_calls_are_checked_by_their_annotations():
    @checked
    def scaled(rows: Sequence[str], factor: int = 1, *others: int, model: Undefined = None, **more: int) -> list[str]:  # noqa: F821
        return [*rows * factor, others, model, more]

    assert scaled(["a"], np.int8(2), "x", model=3, further="y") == ["a", "a", ("x",), 3, {"further": "y"}]
    assert scaled.__name__ == "scaled"
    with pytest.raises(ValueError, match=r"^`rows` must be a list, each item a text, got 'abc'\.$"):
        scaled("abc")
    with pytest.raises(ValueError, match=r"^`factor` must be a whole number, got None\.$"):
        scaled([], factor=None)
    with pytest.raises(TypeError, match=r"scaled\(\) missing 1 required positional argument: 'rows'"):
        scaled()


def test_what_a_file_does_not_hold_is_said():
    with (
        pytest.raises(ValueError, match=r"^'a.json' holds no results: KeyError: 'seed'\. Restore it"),
        surprises_named("'a.json' holds no results"),
    ):
        {}["seed"]


def test_a_field_may_be_left_at_its_default():
    """Many scripts extend the training arguments by fields such as `str = None`."""

    @dataclass
    class Script(Options):
        exclude: str = None
        bits: int = field(default=None)

    assert Script().exclude is None
    assert Script(exclude="visual", bits=np.int8(4)).bits == 4
    with pytest.raises(ValueError, match=r"^`exclude` must be a text, got 3\.$"):
        Script(exclude=3)
