"""A batch in parts of whole samples, each with its share of the encoded tokens.

A batch sized for fast steps may be too large for a slow one, which then runs part by part and accumulates gradients.
Images are encoded once for all parts: the parts leave their gradients at the encoded tokens, and the last one's
backward takes them on to the encoder. Shapes: B batch, S sequence, T tokens of the batch, D hidden.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import accumulate

import torch
from torch import nn

from ..models.families import family_of
from ..models.interface import modalities_in, unwrap
from ..pruning.encoding import VisualEncoding
from ..pruning.inputs import absent_inputs, full_positions, mask_of
from ..pruning.instructions import unit_places
from ..pruning.packing import Packing


class BatchParts:
    """A batch whose samples are taken in parts of nearly equal numbers.

    Args:
        model (`nn.Module`): a vision-language model.
        inputs (`Mapping`): the batch; padded, not packed.
        encodings (`list[VisualEncoding]`): what was encoded of it, with gradients or without.
        count (`int`): number of parts, at most B.
    """

    def __init__(self, model: nn.Module, inputs: Mapping, encodings: list[VisualEncoding], count: int):
        self.count, self.ends = count, []
        self._encodings, self._leaves = encodings, [each_tensor(e, leaf) for e in encodings]
        mask = mask_of(inputs)
        consumed = set().union(*(e.consumed for e in encodings))
        inputs = {**inputs, "attention_mask": mask, "position_ids": full_positions(model, inputs, mask)}
        left = {key: value for key, value in inputs.items() if key not in consumed}
        self._inputs = left | absent_inputs(model, consumed)
        self._bounds = [len(mask) * index // count for index in range(count + 1)]
        self._rows = rows_of_units(inputs["input_ids"], encodings)

    def __getitem__(self, index: int) -> tuple[dict, list[VisualEncoding]]:
        """Inputs and encoded tokens of part `index`; ask for the last one last.

        Its encoded tokens lead on to the encoder, with the gradients that the other parts have left, also where none
        of them is its own: `ends` has to be in its loss.
        """
        begin, end = self._bounds[index : index + 2]
        encodings = self._leaves
        if index == self.count - 1:
            pairs = zip(self._encodings, self._leaves, strict=True)
            encodings = [joined(encoding, leaves) for encoding, leaves in pairs]
            ends = zip(map(tensors_of, encodings), map(tensors_of, self._leaves), strict=True)
            # What no part has used gets no gradient, not even a zero, which would let its weights decay.
            self.ends = [end for pair in ends for end, own in zip(*pair, strict=True) if own.grad is not None]
        own = []
        for encoding, rows in zip(encodings, self._rows, strict=True):
            first, last = (sum(row < bound for row in rows) for bound in (begin, end))
            own += [units(encoding, first, last)] if first < last else []
        return {key: self._rows_between(value, begin, end) for key, value in self._inputs.items()}, own

    def _rows_between(self, value: object, begin: int, end: int) -> object:
        by_row = isinstance(value, torch.Tensor) and value.shape[-2:] == self._inputs["attention_mask"].shape
        return value[..., begin:end, :] if by_row else value


def can_be_split(model: nn.Module, inputs: Mapping) -> bool:
    """Whether a batch can be taken in parts: not where its rows are packed, or `forward` is left to encode itself."""
    config = unwrap(model).config
    return Packing.of(model, inputs) is None and not any(
        family_of(config, modality).whole for modality in modalities_in(inputs)
    )


class WithGradientsOf(torch.autograd.Function):
    """A tensor as it is; backward adds the gradient that a leaf in its place has collected."""

    @staticmethod
    def forward(ctx, tensor: torch.Tensor, leaf: torch.Tensor) -> torch.Tensor:
        ctx.leaf = leaf
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx, gradient: torch.Tensor):
        collected = ctx.leaf.grad
        return gradient if collected is None else gradient + collected, None


def leaf(tensor: torch.Tensor) -> torch.Tensor:
    """Where the gradients of a tensor that needs some are collected."""
    return tensor.detach().requires_grad_(tensor.requires_grad)


def joined(encoding: VisualEncoding, leaves: VisualEncoding) -> VisualEncoding:
    """An encoding whose backward goes on from what its leaves have collected."""
    collected = iter(tensors_of(leaves))

    def join(tensor: torch.Tensor) -> torch.Tensor:
        own = next(collected)
        return WithGradientsOf.apply(tensor, own) if tensor.requires_grad else tensor

    return each_tensor(encoding, join)


def tensors_of(encoding: VisualEncoding) -> list[torch.Tensor]:
    """All that was encoded, in the order of [`each_tensor`]."""
    levels = [level for levels in encoding.companions.values() for level in levels]
    return [encoding.features, *levels, *shared(encoding).values()]


def each_tensor(encoding: VisualEncoding, change: Callable[[torch.Tensor], torch.Tensor]) -> VisualEncoding:
    """An encoding with all that was encoded changed."""
    features, output = change(encoding.features), copy.copy(encoding.output)
    companions = {name: [change(level) for level in levels] for name, levels in encoding.companions.items()}
    for name, tensor in shared(encoding).items():
        setattr(output, name, change(tensor))
    return replace(encoding, features=features, companions=companions, output=output)


def shared(encoding: VisualEncoding) -> dict[str, torch.Tensor]:
    """What else of the encoder's output has gradients, such as Ovis2's marks around images; it has no row per token."""
    rows = {encoding.family.field, *encoding.companions}
    fields = {name: value for name, value in encoding.output.items() if name not in rows}
    return {name: value for name, value in fields.items() if isinstance(value, torch.Tensor) and value.requires_grad}


def units(encoding: VisualEncoding, first: int, last: int) -> VisualEncoding:
    """Units `first` to `last` (excluded) of an encoding."""
    places = list(accumulate(encoding.lengths, initial=0))
    rows = slice(places[first], places[last])
    companions = {name: [level[rows] for level in levels] for name, levels in encoding.companions.items()}
    cut = replace(encoding, features=encoding.features[rows], companions=companions)
    for name in ("lengths", "grids", "attention", "keys", "text", "text_valid"):
        values = getattr(cut, name)
        setattr(cut, name, None if values is None else values[first:last])
    return replace(cut, output=cut.with_features(cut.features, cut.companions, cut.lengths))


def rows_of_units(ids: torch.Tensor, encodings: list[VisualEncoding]) -> list[list[int]]:
    """The row that each unit of each encoding lies in. Waits for the device."""
    rows = [unit_places(ids, encoding.token_id, encoding.lengths)[0] for encoding in encodings]
    found = iter(torch.cat(rows).tolist() if rows else [])
    return [[next(found) for _ in encoding.lengths] for encoding in encodings]
