"""One call of a frozen vision tower, which runs only on units that are not stored yet.

Shapes: U units (images or tiles), R rows of an output tensor.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers.utils import ModelOutput

from .tower_outputs import assembled, tensors_in, unwatch, watch
from .units import REMEDY, ImageUnits

CLOSE = 0.05  # largest relative distance between a unit's features alone and in a batch


class TowerCall:
    """The tower's `forward` for the units of a batch.

    Args:
        tower (`nn.Module`): the vision tower.
        units (`ImageUnits`): of the batch.
        names (`tuple[str, ...]`): the tensors that are read of its output; empty if unknown.
    """

    def __init__(self, tower: nn.Module, units: ImageUnits, names: tuple[str, ...]):
        self.tower, self.forward, self.names = tower, tower.forward, names
        self.units = units.to(next(tower.parameters()).device, non_blocking=True)
        self.keys, self.sizes = units.keys, units.sizes
        self.missing: list[int] = []  # indices of the units that were encoded
        self.called = self.plain = False
        self._output: ModelOutput | None = None
        self._encoded: dict[str, torch.Tensor] = {}

    def __call__(self, *args, **kwargs):
        if self.called:
            raise ValueError(f"{self._said()} is called more than once for a batch. {REMEDY}")
        self.called, self._args, self._kwargs = True, args, kwargs
        if not self._matched():
            self.plain = True
            return self.forward(*args, **kwargs)
        # First batch: run on all units and watch which output tensors the encoder reads.
        if not self.names:
            self.missing = [*range(len(self.keys))]
            self._output = self.forward(*args, **kwargs)
            if not isinstance(self._output, ModelOutput):
                raise ValueError(f"{self._said()} returns a {type(self._output).__name__}. {REMEDY}")
            self._encoded = tensors_in(self._output)
            return watch(self._output)
        # Later: run on units that are not stored, each once, and assemble the output from stored and new rows.
        found = set(self.units.found) if self.names == tuple(self.units.features) else set()
        first: dict[str, int] = {}
        for index, key in enumerate(self.keys):
            first.setdefault(key, index)
        self.missing = [index for key, index in first.items() if key not in found]
        if self.missing:
            every = len(self.missing) == len(self.keys)
            self._encoded = tensors_in(self.forward(*args, **kwargs) if every else self.run(self.missing))
        return assembled({name: self._rows(name) for name in self.names})

    @property
    def hits(self) -> int:
        """Number of units that were not encoded."""
        return len(self.keys) - len(self.missing)

    def end(self) -> tuple[str, ...] | None:
        """Names of the tensors that were read; None if nothing is to be stored."""
        if not self.called:
            raise ValueError(f"{self._said()} is not called where the model encodes images. {REMEDY}")
        if not self.plain and not self.names:
            self.names = unwatch(self._output)
        return None if self.plain else self.names

    def check_alone(self, names: tuple[str, ...]) -> None:
        """Raises a `ValueError` unless the tower encodes a unit alone as in a batch. Waits for the device."""
        # Run the first new unit alone and compare each tensor that is read, (rows, ...), in relative norm.
        with torch.no_grad():
            alone = tensors_in(self.run(self.missing[:1]))
        for name in names:
            (rows, lengths), own = self.encoded(name), alone[name]
            same = len(own) == lengths[0] and own.shape[1:] == rows.shape[1:]
            if not same or (own - rows[: len(own)]).float().norm() > CLOSE * own.float().norm():
                raise ValueError(f"{self._said()} does not encode an image alone as it does in a batch. {REMEDY}")

    def encoded(self, name: str) -> tuple[torch.Tensor, list[int]]:
        """A tensor of the encoded units, `(R, ...)`, and the rows of each unit."""
        rows, sizes = self._encoded[name], [self.sizes[index] for index in self.missing]
        # R is shared out in proportion to the units' input rows: 1 each, or their patches.
        count, total = len(rows), sum(sizes)
        lengths = [count * size // total for size in sizes]
        if sum(lengths) != count or any(count * size % total for size in sizes) or total == len(sizes) != count:
            raise ValueError(
                f"{self._said()} returns `{name}` of shape {tuple(rows.shape)} for {len(sizes)} images, which cannot "
                f"be told apart. {REMEDY}"
            )
        return rows, lengths

    def run(self, indices: list[int]) -> ModelOutput:
        """The tower's output for some of the units."""
        # Where each unit's input rows begin and end.
        ends = [0]
        for size in self.sizes:
            ends.append(ends[-1] + size)

        def cut(value: Any) -> Any:
            if not isinstance(value, torch.Tensor) or not value.dim():
                return value
            # Tensors with a row per input row, such as pixels, or with a row per unit, such as sizes.
            if len(value) == ends[-1]:
                return torch.cat([value[ends[index] : ends[index + 1]] for index in indices])
            return torch.cat([value[index : index + 1] for index in indices])

        return self.forward(*map(cut, self._args), **{name: cut(value) for name, value in self._kwargs.items()})

    def _matched(self) -> bool:
        """Whether the tower's inputs are those of the units, possibly without padding."""
        values = (*self._args, *self._kwargs.values())
        given = [len(value) for value in values if isinstance(value, torch.Tensor) and value.dim()]
        # All units first, then those that are not padding.
        for real in ([*range(len(self.keys))], [i for i, empty in enumerate(self.units.padding) if not empty]):
            self.keys, self.sizes = [[of[i] for i in real] for of in (self.units.keys, self.units.sizes)]
            if given[:1] == [sum(self.sizes)] and {*given} <= {sum(self.sizes), len(real)}:
                return True
        if self.names:  # for example a real tile of zeros, which looked like padding
            return False
        raise ValueError(
            f"{self._said()} is given tensors of {given} rows for {len(self.units.keys)} images or tiles, which cannot "
            f"be told apart. {REMEDY}"
        )

    def _rows(self, name: str) -> torch.Tensor:
        """A tensor of all units, stored and encoded ones, `(R, ...)` in the order of the batch."""
        features = self.units.features.get(name)
        # All units are stored, in this order.
        if not self.missing and self.units.found == self.keys:
            return features
        # Rows of each unit by key: the stored ones, then the encoded ones.
        parts: dict[str, torch.Tensor] = {}
        if features is not None:
            parts = dict(zip(self.units.found, features.split(self.units.lengths[name]), strict=True))
        if self.missing:
            rows, lengths = self.encoded(name)
            if len(self.missing) == len(self.keys):
                return rows
            keys = [self.keys[index] for index in self.missing]
            parts |= dict(zip(keys, rows.split(lengths), strict=True))
        return torch.cat([parts[key] for key in self.keys])

    def _said(self) -> str:
        return f"`vision_feature_cache` is set, but the model's {type(self.tower).__name__}"
