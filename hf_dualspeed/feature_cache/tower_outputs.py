"""Records which tensors of a vision tower's output are read, and builds outputs that hold only those."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, make_dataclass
from functools import lru_cache
from typing import Any

import torch
from transformers.utils import ModelOutput

from .units import REMEDY

LAYERS = "hidden_states"


class Watched(ModelOutput):
    """Temporarily replaces an output's class and records which of the tower's tensors are read."""

    def __getattribute__(self, name: str):
        value = super().__getattribute__(name)
        watched = super().__getattribute__("__dict__").get("_watched")
        # A value that the encoder has put in place of a tensor is not the tower's.
        if name.startswith("_") or watched is None or value is None or watched.fields.get(name) is not value:
            return value
        if name == LAYERS:
            return Levels(value, watched.noted)
        watched.noted.update(names_of(name, value))
        return value

    def __getitem__(self, key):
        if not isinstance(key, str) and key != 0:
            raise ValueError(f"`vision_feature_cache` is set, but the tower's output is read by position. {REMEDY}")
        return getattr(self, key if isinstance(key, str) else next(iter(self.keys())))


class Levels(tuple):
    """Hidden states that record which of them are read."""

    def __new__(cls, values: Sequence[torch.Tensor], noted: set[str]):
        levels = super().__new__(cls, values)
        levels.noted = noted
        return levels

    def __getitem__(self, index):
        names = names_of(LAYERS, self)[index]
        self.noted.update([names] if isinstance(names, str) else names)
        return super().__getitem__(index)

    def __iter__(self):
        return (self[level] for level in range(len(self)))


class SomeLevels(Sequence):
    """Hidden states of which only some are present."""

    def __init__(self, levels: dict[int, torch.Tensor], count: int):
        self.levels, self.count = levels, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> torch.Tensor:
        level = range(self.count)[index]
        if level not in self.levels:
            raise ValueError(f"`vision_feature_cache` holds no hidden state {level} of the tower. {REMEDY}")
        return self.levels[level]


@dataclass
class Watching:
    """The record of an output: its fields as the tower returned them, and the names of the tensors that were read."""

    fields: dict[str, Any]
    noted: set[str]


@lru_cache
def watched_class(kind: type[ModelOutput]) -> type[ModelOutput]:
    """A subclass of `kind` that records reads."""
    return type(kind.__name__, (Watched, kind), {"_kind": kind})


def watch(output: ModelOutput) -> ModelOutput:
    """Records from now on which tensors of `output` are read."""
    output.__dict__["_watched"] = Watching(dict(output.items()), set())
    output.__class__ = watched_class(type(output))
    return output


def unwatch(output: ModelOutput) -> tuple[str, ...]:
    """Ends [`watch`] and returns the names of the tensors that were read."""
    output.__class__ = type(output)._kind
    return tuple(sorted(output.__dict__.pop("_watched").noted))


def names_of(field: str, value: object) -> list[str]:
    """Names of the tensors in a field: its own, or one per level, which includes the number of levels."""
    if isinstance(value, torch.Tensor):
        return [field]
    levels = len(value) if isinstance(value, (list, tuple)) else 0
    return [f"{field}.{level}.{levels}" for level in range(levels)]


def tensors_in(output: ModelOutput) -> dict[str, torch.Tensor]:
    """All tensors of the tower's output by their names."""
    found = {}
    for field, value in output.items():
        values = [value] if isinstance(value, torch.Tensor) else value
        found |= dict(zip(names_of(field, value), values, strict=False)) if value is not None else {}
    return found


def assembled(tensors: Mapping[str, torch.Tensor]) -> ModelOutput:
    """An output that holds these tensors."""
    fields: dict[str, Any] = {}
    # "field" is a tensor, "field.level.count" one of `count` hidden states.
    for name, tensor in tensors.items():
        field, *place = name.split(".")
        if place:
            level, count = map(int, place)
            fields.setdefault(field, SomeLevels({}, count)).levels[level] = tensor
        else:
            fields[field] = tensor
    # Complete lists of hidden states become plain lists.
    for field, value in fields.items():
        if isinstance(value, SomeLevels) and len(value.levels) == value.count:
            fields[field] = [value.levels[level] for level in range(value.count)]
    output = output_class(tuple(fields))()
    for field, value in fields.items():  # not as arguments: ModelOutput takes a single one for pairs
        output[field] = value
    return output


@lru_cache
def output_class(fields: tuple[str, ...]) -> type[ModelOutput]:
    """A class of outputs with these fields, and with those that are empty in some towers' outputs."""
    fields = dict.fromkeys([*fields, LAYERS, "attentions", "pooler_output"])
    return make_dataclass("TowerOutput", [(name, Any, None) for name in fields], bases=(ModelOutput,))
