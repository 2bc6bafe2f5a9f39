"""Checks of arguments; their errors name the argument, the value and the remedy."""

from __future__ import annotations

import argparse
import difflib
import json
from collections.abc import Iterable
from pathlib import Path


class Parser(argparse.ArgumentParser):
    """An argument parser that raises a `ValueError` for a wrong word."""

    def error(self, message: str) -> None:
        raise ValueError(message)


def check_range(
    name: str,
    value: float,
    low: float,
    high: float | None = None,
    *,
    left_open: bool = False,
    right_open: bool = False,
    off: str = "",
) -> None:
    """Raises a `ValueError` naming argument, value, range and remedy unless `value` lies in the range."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    above = number and (value > low if left_open else value >= low)
    below = number and (high is None or (value < high if right_open else value <= high))
    if above and below:
        return
    upper = "inf)" if high is None else f"{high}{')' if right_open else ']'}"
    allowed = f"{'(' if left_open else '['}{low}, {upper}"
    raise ValueError(f"`{name}` must be in {allowed}, got {value!r}. {off}".strip())


def as_count(name: str, value: int | str, otherwise: str = "") -> int:
    """A whole number of at least 1, from an int or a word of the command line.

    Raises:
        ValueError: `value` is not such a number.
    """
    try:
        count = int(value) if isinstance(value, str) else value
    except ValueError:
        count = None
    if not isinstance(count, int) or isinstance(count, bool) or count < 1:
        raise ValueError(f"`{name}` must be a whole number of at least 1 {otherwise}, got {value!r}.")
    return count


def check_choice(name: str, value: str, choices: tuple[str, ...] | list[str]) -> None:
    """Raises a `ValueError` that lists the choices and the nearest one unless `value` is among them."""
    if value not in choices:
        raise ValueError(
            f"`{name}` must be one of {', '.join(map(repr, choices))}, got {value!r}.{nearest(value, choices)}"
        )


def check_keys(name: str, given: dict, known: list[str]) -> None:
    """Raises a `ValueError` that names the argument and the key unless all keys of `given` are known."""
    for key in given:
        if key not in known:
            raise ValueError(f"`{name}` has an unknown key {key!r}.{nearest(key, known)}")


def nearest(word: str, known: tuple[str, ...] | list[str]) -> str:
    """The words " Did you mean 'x'?", or "" if no known word is close."""
    close = difflib.get_close_matches(word, list(known), n=1) if isinstance(word, str) else []
    return f" Did you mean {close[0]!r}?" if close else ""


def as_dict(name: str, value: dict | str | None) -> dict | None:
    """A mapping, parsed if the command line gives it as JSON; a `ValueError` names the argument if it is neither."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except json.JSONDecodeError as error:
            raise ValueError(f"`{name}` must be a JSON mapping, got {value!r}: {error}.") from None
    if value is not None and not isinstance(value, dict):
        raise ValueError(f'`{name}` must be a mapping, got {value!r}. Write it like {{"key": 1}}.')
    return value


def require(batch: dict, key: str) -> None:
    """Raises a `ValueError` unless a collated batch has `key`."""
    if key not in batch:
        raise ValueError(
            f"The data collator's batch has no `{key}`, only {sorted(batch)}. Return it, or use hf_dualspeed's "
            "VisionLanguageCollator."
        )


def check_tensors(where: str | Path, missing: Iterable[str] = (), foreign: Iterable[str] = ()) -> None:
    """Raises a `ValueError` that names tensors which `where` lacks, and those which the model does not know."""
    said = []
    for what, names in (("lacks tensors of the model", missing), ("holds others", foreign)):
        names = sorted(map(str, names))
        if names:
            said.append(f"{what}: {', '.join(names[:3])}{', ...' * (len(names) > 3)} ({len(names)})")
    if said:
        raise ValueError(f"{str(where)!r} {' and '.join(said)}. Name a whole checkpoint of this model.")


def check_finite(finite: bool) -> None:
    """Raises a `ValueError` unless the features of a pruner's input are finite."""
    if not finite:
        raise ValueError(
            "`features` holds NaN or infinite values, so tokens cannot be compared. The vision tower or projector has "
            "diverged, or overflows in its precision: lower the learning rate, or use bfloat16 instead of float16."
        )
