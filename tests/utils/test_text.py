"""Numbers and tables as text."""

from __future__ import annotations

import pytest

from hf_dualspeed.utils.text import (
    finite,
    in_bytes,
    in_thousands,
    markdown_table,
    one_line,
    parse_json,
    percent,
    spread,
    without_paths,
)


def test_errors_are_one_short_line():
    assert one_line(ValueError("a\n  b\tc")) == "a b c"
    assert one_line(ValueError("x" * 400)) == "x" * 300
    assert one_line(KeyboardInterrupt()) == "KeyboardInterrupt"


def test_spread_by_hand():
    assert spread([1.0, 2.0, 6.0]) == {"mean": 3.0, "min": 1.0, "max": 6.0, "sd": pytest.approx(7**0.5)}
    assert spread([2.0])["sd"] == 0
    assert spread([2.0, None]) is None


def test_no_absolute_paths_are_kept(tmp_path):
    value = {"a": [str(tmp_path / "model"), "org/model"], "b": (tmp_path,)}
    assert without_paths(value) == {"a": ["model", "org/model"], "b": [tmp_path.name]}


def test_tables():
    rows = [("x", 1), ("y|z\nw", None)]
    assert markdown_table(("a", "b"), rows) == "| a | b |\n| --- | ---: |\n| x | 1 |\n| y\\|z w |  |"
    assert markdown_table(("a", "b"), [], words=True) == "| a | b |\n| --- | --- |"


def test_shares():
    assert (percent(0.1255), percent(None)) == ("12.6%", None)


def test_sizes_have_no_exponents():
    assert [in_bytes(mib * 2**20) for mib in (0.125, 3.07, 999.6, 1010, 1023.9)] == [
        "0.125 MiB",
        "3.07 MiB",
        "1,000 MiB",
        "1,010 MiB",
        "1,020 MiB",
    ]
    assert [in_bytes(gib * 2**30) for gib in (1, 23.456, 1500)] == ["1 GiB", "23.5 GiB", "1,500 GiB"]
    assert [in_thousands(count) for count in (950, 806_080, 999_900, 7.06e9)] == ["950", "806 k", "1,000 k", "7.06 B"]


def test_json_is_read_strictly():
    assert parse_json(b'{"a": [1, 2.5, null]}') == {"a": [1, 2.5, None]}
    assert parse_json("[" * 99 + "]" * 99)
    for text, said in (
        ("NaN", "NaN is no JSON number"),
        ('{"a": [-Infinity]}', "-Infinity is no JSON number"),
        ("[" * 101 + "]" * 101, "nested more than 100 deep"),
        ('{"a": ' * 50_000, "nested too deeply"),
        ("", "Expecting value"),
    ):
        with pytest.raises(ValueError, match=said):
            parse_json(text)


def test_numbers_that_json_lacks_become_null():
    found = {"a": [1.5, float("nan"), (float("inf"), "x")], "b": -float("inf")}
    assert finite(found) == {"a": [1.5, None, [None, "x"]], "b": None}
