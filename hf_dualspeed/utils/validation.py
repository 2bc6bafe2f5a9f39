"""Checks of arguments; their errors name the argument, the value and the remedy."""

from __future__ import annotations

import argparse
import difflib
import inspect
import json
import math
import os
import sys
import types
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import fields
from enum import Enum
from functools import cache, wraps
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import numpy as np

from .text import one_line

Function = TypeVar("Function", bound=Callable)

SEVERAL = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
LARGEST_INTEGER = 2**32 - 1
# How errors name a type; others are named as in Python.
NAMES = {
    bool: "True or False",
    int: "a whole number",
    float: "a finite number",
    str: "a text",
    dict: "a mapping",
    list: "a list",
    tuple: "a list",
    type(None): "None",
}


class Help(argparse.HelpFormatter):
    """Help with short names of values, and one spelling of each option."""

    def _get_default_metavar_for_optional(self, action: argparse.Action) -> str:
        return {int: "N", float: "X"}.get(action.type) or action.dest.rpartition("_")[2].upper()


class Parser(argparse.ArgumentParser):
    """An argument parser that raises a `ValueError` for a wrong word, in place of printing its usage and leaving.

    Its options may be written with hyphens or underscores between their words, as those of `dualspeed train`.
    """

    def __init__(self, *args, formatter_class: type[argparse.HelpFormatter] = Help, **options):
        super().__init__(*args, formatter_class=formatter_class, **options)

    def parse_known_args(self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None):
        known = {option.replace("_", "-"): option for option in self._option_string_actions}
        words = []
        for word in sys.argv[1:] if args is None else args:
            option, equals, value = word.partition("=")
            same = option.replace("_", "-") if option.startswith("--") else None
            words.append(f"{known[same]}{equals}{value}" if same in known else word)
        return super().parse_known_args(words, namespace)

    def error(self, message: str) -> None:
        raise ValueError(f"{message}. `{self.prog} --help` lists the options.")


def checked(function: Function) -> Function:
    """Decorator: calls with a value that its parameter's annotation does not allow raise a `ValueError` naming both.

    Scalars of NumPy become Python's numbers. What Python itself refuses, such as an unknown argument, stays a
    `TypeError`.
    """
    signature = inspect.signature(function)

    @wraps(function)
    def call(*args, **kwargs):
        try:
            bound = signature.bind(*args, **kwargs)
        except TypeError:
            return function(*args, **kwargs)  # raises it from the right place
        hints = hints_of(function)
        for name, value in bound.arguments.items():
            if name in hints and signature.parameters[name].kind not in SEVERAL:
                bound.arguments[name] = as_type(name, value, hints[name])
        return function(*bound.args, **bound.kwargs)

    return call


def check_fields(options: Any, names: Iterable[str] | None = None, wider: Mapping[str, Any] | None = None) -> None:
    """Brings the fields of a dataclass into their annotated types. A field's own default is as its class means it.

    Args:
        options: The instance; frozen ones too.
        names (`Iterable[str]`, *optional*): The fields to look at; default: all that `__init__` takes.
        wider (`Mapping`, *optional*): Types of fields that allow more than their annotation says.

    Raises:
        ValueError: a field holds another type; the message names it, its value and what is allowed.
    """
    hints = {**hints_of(type(options)), **(wider or {})}
    known = {field.name: field for field in fields(options)}
    for name in [name for name, field in known.items() if field.init] if names is None else names:
        value = getattr(options, name)
        if value is known[name].default:  # such as `str = None`, as many scripts write it
            continue
        typed = as_type(name, value, hints.get(name, Any))
        if typed is not value:
            object.__setattr__(options, name, typed)


@cache
def hints_of(annotated: Callable) -> dict[str, Any]:
    """The annotations of a function, or of a class and its bases, without those that only type checkers can read."""
    hints = {}
    for owner in reversed(getattr(annotated, "__mro__", (annotated,))):
        scope = vars(sys.modules.get(owner.__module__, types))
        for name, hint in inspect.get_annotations(owner).items():
            with suppress(NameError):
                hints[name] = get_type_hints(type("", (), {"__annotations__": {name: hint}}), scope)[name]
    return hints


def as_type(name: str, value: Any, hint: Any) -> Any:
    """A value of an annotated type; NumPy's scalars become Python's, and a path becomes a text where one is wanted.

    Raises:
        ValueError: the value is of another type; the message names argument, value and what is allowed.
    """
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, os.PathLike) and not fits(value, hint) and fits("", hint):
        value = os.fspath(value)
    if not fits(value, hint):
        given = f"a {type(value).__name__}" if "token" in name.split("_") else shortened(value)
        large = type(value) is int and fits(0, hint)
        allowed = f"at most {LARGEST_INTEGER:,}" if large else words_of(hint)
        raise ValueError(f"`{name}` must be {allowed}, got {given}.")
    return value


def fits(value: Any, hint: Any) -> bool:
    """Whether a value is of an annotated type. Floats must be finite, integers fit 32 bits; True is no number."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return any(fits(value, option) for option in alternatives(hint))
    if origin is Literal:
        return value in inner
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= sys.float_info.max
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool) and abs(value) <= LARGEST_INTEGER
    kind = origin or hint
    if hint is Any or not isinstance(kind, type):
        return True
    if issubclass(kind, Enum):
        return isinstance(value, kind) or value in [one.value for one in kind]
    if kind is tuple and inner[1:] == (...,):  # any number of items: a list does as well
        kind, inner = (list, tuple), inner[:1]
    if not isinstance(value, kind) or (isinstance(value, (str, bytes)) and kind in (Sequence, Iterable)):
        return False
    if isinstance(value, (list, tuple)) and inner:
        each = inner if kind is tuple else inner[:1] * len(value)
        return len(each) == len(value) and all(map(fits, value, each))
    return True


def alternatives(union: Any) -> list[Any]:
    """The types of a union; beside an enumeration, no text but its values is allowed."""
    inner = get_args(union)
    listed = any(isinstance(option, type) and issubclass(option, Enum) for option in inner)
    return [option for option in inner if not (listed and option is str)]


def words_of(hint: Any) -> str:
    """An annotated type in words, such as "a whole number or None"."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(map(words_of, alternatives(hint))))
    if origin is Literal:
        return " or ".join(map(repr, inner))
    kind = origin or hint
    if isinstance(kind, type) and issubclass(kind, Enum):
        return f"one of {', '.join(repr(one.value) for one in kind)}"
    if kind in (list, tuple, Sequence, Iterable) and inner:
        return f"a list, each item {words_of(inner[0])}"
    return NAMES.get(kind) or f"of type {getattr(kind, '__name__', kind)}"


def shortened(value: Any) -> str:
    """A value as Python writes it, at most 100 characters."""
    try:
        written = " ".join(repr(value).split("\n"))
    except Exception:  # too deep, or of a class whose own `__repr__` fails
        written = f"a {type(value).__name__}"
    return written if len(written) <= 100 else f"{written[:97]}..."


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
    if high is None:
        high, right_open = math.inf, True
    number = isinstance(value, (int, float, np.number)) and not isinstance(value, bool)
    above = number and (value > low if left_open else value >= low)
    below = number and (value < high if right_open else value <= high)
    if above and below:
        return
    allowed = f"{'(' if left_open else '['}{low}, {high}{')' if right_open else ']'}"
    raise ValueError(f"`{name}` must be in {allowed}, got {shortened(value)}. {off}".strip())


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
        raise ValueError(f"`{name}` must be a whole number of at least 1 {otherwise}, got {shortened(value)}.")
    return count


def check_choice(name: str, value: str, choices: tuple[str, ...] | list[str]) -> None:
    """Raises a `ValueError` that lists the choices and the nearest one unless `value` is among them."""
    if value not in choices:
        raise ValueError(
            f"`{name}` must be one of {', '.join(map(repr, choices))}, got {shortened(value)}.{nearest(value, choices)}"
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
            raise ValueError(f"`{name}` must be a JSON mapping, got {shortened(value)}: {error}.") from None
    if value is not None and not isinstance(value, dict):
        raise ValueError(f'`{name}` must be a mapping, got {shortened(value)}. Write it like {{"key": 1}}.')
    return value


def require(batch: dict, key: str) -> None:
    """Raises a `ValueError` unless a collated batch has `key`."""
    if key not in batch:
        raise ValueError(
            f"The data collator's batch has no `{key}`, only {sorted(batch)}. Return it, or use hf_dualspeed's "
            "VisionLanguageCollator."
        )


@contextmanager
def loading(name: str | Path) -> Iterator[None]:
    """Around the loading of a model or processor: errors of any kind become a `ValueError` with its name."""
    try:
        yield
    except (OSError, ImportError):
        raise
    except Exception as error:
        if isinstance(error, ValueError) and str(name) in str(error):
            raise
        said = f"{type(error).__name__}: {one_line(error)}"
        raise ValueError(f"{str(name)!r} cannot be loaded: {said}. Restore its files, or name another one.") from error


@contextmanager
def surprises_named(what: str) -> Iterator[None]:
    """Around code that walks through a file's contents: what is not as expected there becomes a `ValueError`.

    An error of ours, which begins with the name of an argument, stays as it is.
    """
    try:
        yield
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, ArithmeticError) as error:
        if isinstance(error, ValueError) and str(error).startswith("`"):
            raise
        reason = f"{type(error).__name__}: {shortened(error.args[0] if error.args else '')}"
        raise ValueError(f"{what}: {reason}. Restore it, or measure again.") from error


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
