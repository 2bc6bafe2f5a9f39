"""Formats numbers and tables as text."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path, PurePath
from statistics import mean, stdev


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
