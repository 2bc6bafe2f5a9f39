"""Formats numbers and tables as text."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePath
from statistics import mean, stdev
from typing import Any

# Results, configs and tables are far flatter.
DEEPEST = 100


def parse_json(text: str | bytes) -> object:
    """The value of a JSON text that can be walked through.

    Raises:
        ValueError: it is no JSON, holds NaN or Infinity, or is nested more than 100 deep.
    """
    value = loads(text, parse_constant=_refuse_constant)
    level, depth = [value], 0
    while level:
        inner = [part.values() if isinstance(part, dict) else part for part in level if isinstance(part, (dict, list))]
        level, depth = [item for items in inner for item in items], depth + 1
        if depth > DEEPEST:
            raise ValueError(f"it is nested more than {DEEPEST} deep")
    return value


def loads(text: str | bytes, **options) -> Any:
    """`json.loads`, whose error of a text that is nested too deeply is a `JSONDecodeError` as well."""
    try:
        return json.loads(text, **options)
    except RecursionError:
        raise json.JSONDecodeError("it is nested too deeply", "", 0) from None


def _refuse_constant(word: str):
    raise ValueError(f"{word} is no JSON number")


def finite(value: object) -> object:
    """The value with None in place of each number that is NaN or infinite, which JSON does not have."""
    if isinstance(value, dict):
        return {key: finite(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def one_line(error: BaseException) -> str:
    """An error's message without line breaks, at most 300 characters."""
    return " ".join(str(error).split())[:300] or type(error).__name__


def spread(values: list[float | None]) -> dict[str, float] | None:
    """Mean, minimum, maximum and standard deviation; None if a value is missing."""
    if None in values:
        return None
    deviation = stdev(values) if len(values) > 1 else 0.0
    return {"mean": mean(values), "min": min(values), "max": max(values), "sd": deviation}


def without_paths(value: object) -> object:
    """The value with each absolute path replaced by the path's last part."""
    if isinstance(value, dict):
        return {key: without_paths(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_paths(inner) for inner in value]
    if isinstance(value, (str, PurePath)) and Path(value).is_absolute():
        return Path(value).name
    return value


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[object]], words: bool = False) -> str:
    """A Markdown table; all columns but the first are aligned right, or left if they hold `words`.

    Cells may contain bars and line breaks; None gives an empty cell.
    """
    rule = ("---", *["---" if words else "---:"] * (len(header) - 1))
    return "\n".join(f"| {' | '.join(map(_cell, row))} |" for row in (header, rule, *rows))


def _cell(value: object) -> str:
    return "" if value is None else " ".join(str(value).split()).replace("|", "\\|")


def percent(share: float | None) -> str | None:
    """A share as a percentage, or None if it was not measured."""
    return None if share is None else f"{share:.1%}"


def in_thousands(count: float) -> str:
    """A count in words as short as 950, 1.4 M, 7.06 B."""
    for size, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if count >= size:
            return f"{three_digits(count / size)} {letter}"
    return f"{count:.0f}"


def in_bytes(size: float) -> str:
    """A size in MiB, or in GiB from one on."""
    return f"{three_digits(size / 2**30)} GiB" if size >= 2**30 else f"{three_digits(size / 2**20)} MiB"


def three_digits(value: float) -> str:
    """A number rounded to three digits that count, without an exponent up to a million."""
    return f"{float(f'{value:.3g}'):,g}"
