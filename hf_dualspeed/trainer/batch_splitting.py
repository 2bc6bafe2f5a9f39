"""Splits a batch into parts of whole samples, each with its share of the encoded tokens.

A batch sized for fast steps may be too large for a slow one, which then runs part by part and accumulates gradients.
Images are encoded once for all parts: the parts leave their gradients at the encoded tokens, and backward of the last
part passes them on to the encoder.

Shapes: B batch, b samples of a part, S sequence, U units (images, clips), T tokens of the batch, D hidden.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import accumulate

import torch

from ..models.interface import ModelInterface, modalities_in
from ..pruning.encoding import VisualEncoding
from ..pruning.inputs import absent_inputs, full_positions, mask_of
from ..pruning.instructions import unit_places
from ..pruning.packing import is_packed

# A part of a slow batch counts as small up to this multiple of the tokens of a fast step's batch.
SMALL = 1.25


def parts_of(rows: int, length: int, fast_tokens: int, splits: int | str, whole: bool = False) -> tuple[int, bool]:
    """The number of parts of a slow batch, and whether each is about as small as a fast step's batch.

    Args:
        rows, length (`int`): samples of the batch, and tokens of each.
        fast_tokens (`int`): those of a fast step's batch; 0 before the first one.
        splits (`int` or `str`): `slow_mode_splits`.
        whole (`bool`): whether the batch cannot be split.
    """
    # Samples that fit into a small part.
    together = int(SMALL * fast_tokens / length)
    wanted = math.ceil(rows / max(1, together)) if splits == "auto" else splits
    parts = 1 if whole else min(rows, wanted)
    return parts, splits != 1 and math.ceil(rows / parts) <= together


class BatchParts:
    """The parts of a batch, with nearly equal numbers of samples.

    Args:
        interface (`ModelInterface`): of the model.
        inputs (`Mapping`): the batch; padded, not packed.
        encodings (`list[VisualEncoding]`): its encoded tokens, with or without gradients.
        count (`int`): number of parts, at most B.
    """

    def __init__(self, interface: ModelInterface, inputs: Mapping, encodings: list[VisualEncoding], count: int):
        self.count, self.ends = count, []
        # Leaves (T, D) collect the gradients of all parts.
        self._encodings, self._leaves = encodings, [each_tensor(e, leaf) for e in encodings]
        mask = mask_of(inputs)
        consumed = set().union(*(e.consumed for e in encodings))
        # Positions are numbered before splitting; pixels are not needed any more.
        inputs = {**inputs, "attention_mask": mask, "position_ids": full_positions(interface, inputs, mask)}
        left = {key: value for key, value in inputs.items() if key not in consumed}
        self._inputs = left | absent_inputs(interface, consumed)
        # Boundaries of the parts in samples (count + 1), and the row of each unit.
        self._bounds = [len(mask) * index // count for index in range(count + 1)]
        self._rows = rows_of_units(inputs["input_ids"], encodings)

    def __getitem__(self, index: int) -> tuple[dict, list[VisualEncoding]]:
        """Inputs and encoded tokens of part `index`; ask for the last one last.

        The encoded tokens of the last part are connected to the encoder and carry the gradients of the other parts. Its
        loss must include `ends`, because it may have no tokens of its own.
        """
        begin, end = self._bounds[index : index + 2]
        encodings = self._leaves
        if index == self.count - 1:
            pairs = zip(self._encodings, self._leaves, strict=True)
            encodings = [joined(encoding, leaves) for encoding, leaves in pairs]
            ends = zip(map(tensors_of, encodings), map(tensors_of, self._leaves), strict=True)
            # Unused tokens get no gradient, not even a zero, which would let weight decay change their parameters.
            self.ends = [end for pair in ends for end, own in zip(*pair, strict=True) if own.grad is not None]
        # Units whose rows lie in the part: samples are in order, so they are consecutive.
        own = []
        for encoding, rows in zip(encodings, self._rows, strict=True):
            first, last = (sum(row < bound for row in rows) for bound in (begin, end))
            own += [units(encoding, first, last)] if first < last else []
        # (..., B, S) -> (..., b, S)
        return {key: self._rows_between(value, begin, end) for key, value in self._inputs.items()}, own

    def _rows_between(self, value: object, begin: int, end: int) -> object:
        by_row = isinstance(value, torch.Tensor) and value.shape[-2:] == self._inputs["attention_mask"].shape
        return value[..., begin:end, :] if by_row else value


def can_be_split(interface: ModelInterface, inputs: Mapping) -> bool:
    """Whether a batch can be split: not if its rows are packed, or if `forward` encodes by itself."""
    return not is_packed(inputs) and not any(interface.encoders[name].family.whole for name in modalities_in(inputs))


class WithGradientsOf(torch.autograd.Function):
    """The identity. Backward adds the gradient that a leaf with the same values has collected."""

    @staticmethod
    def forward(ctx, tensor: torch.Tensor, leaf: torch.Tensor) -> torch.Tensor:
        ctx.leaf = leaf
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx, gradient: torch.Tensor):
        collected = ctx.leaf.grad
        return gradient if collected is None else gradient + collected, None


def leaf(tensor: torch.Tensor) -> torch.Tensor:
    """A detached copy of a tensor that collects its gradients, if it needs any."""
    return tensor.detach().requires_grad_(tensor.requires_grad)


def joined(encoding: VisualEncoding, leaves: VisualEncoding) -> VisualEncoding:
    """An encoding whose backward starts from the gradients that its leaves have collected."""
    # Each tensor goes with the leaf in its place.
    collected = iter(tensors_of(leaves))

    def join(tensor: torch.Tensor) -> torch.Tensor:
        own = next(collected)
        return WithGradientsOf.apply(tensor, own) if tensor.requires_grad else tensor

    return each_tensor(encoding, join)


def tensors_of(encoding: VisualEncoding) -> list[torch.Tensor]:
    """All encoded tensors, in the order of [`each_tensor`]."""
    levels = [level for levels in encoding.companions.values() for level in levels]
    return [encoding.features, *levels, *shared(encoding).values()]


def each_tensor(encoding: VisualEncoding, change: Callable[[torch.Tensor], torch.Tensor]) -> VisualEncoding:
    """Applies `change` to all encoded tensors of an encoding."""
    features, output = change(encoding.features), copy.copy(encoding.output)
    # Companions by level, then other tensors in a copy of the encoder's output.
    companions = {name: [change(level) for level in levels] for name, levels in encoding.companions.items()}
    for name, tensor in shared(encoding).items():
        setattr(output, name, change(tensor))
    return replace(encoding, features=features, companions=companions, output=output)


def shared(encoding: VisualEncoding) -> dict[str, torch.Tensor]:
    """Other tensors of the encoder's output with gradients, such as Ovis2's marks around images.

    They have no row per token.
    """
    rows = {encoding.family.field, *encoding.companions}
    fields = {name: value for name, value in encoding.output.items() if name not in rows}
    return {name: value for name, value in fields.items() if isinstance(value, torch.Tensor) and value.requires_grad}


def units(encoding: VisualEncoding, first: int, last: int) -> VisualEncoding:
    """Units `first` to `last` (excluded) of an encoding."""
    # Tokens of these units: (T, D) -> (n, D).
    places = list(accumulate(encoding.lengths, initial=0))
    rows = slice(places[first], places[last])
    companions = {name: [level[rows] for level in levels] for name, levels in encoding.companions.items()}
    cut = replace(encoding, features=encoding.features[rows], companions=companions)
    # Values per unit, such as grids and instructions.
    for name in ("lengths", "grids", "attention", "keys", "text", "text_valid"):
        values = getattr(cut, name)
        setattr(cut, name, None if values is None else values[first:last])
    return replace(cut, output=cut.with_features(cut.features, cut.companions, cut.lengths))


def rows_of_units(ids: torch.Tensor, encodings: list[VisualEncoding]) -> list[list[int]]:
    """The batch row of each unit of each encoding. Waits for the device."""
    rows = [unit_places(ids, encoding.token_id, encoding.lengths)[0] for encoding in encodings]
    found = iter(torch.cat(rows).tolist() if rows else [])
    return [[next(found) for _ in encoding.lengths] for encoding in encodings]
