"""Padding-free passes under SDPA and eager attention: one row for all layers, a row per sample inside attention.

A row of all samples needs no padding in norms, projections, experts and head, which are most of the work. But one dense
mask over it would cost as much as all samples together squared. So attention functions get each sample in a row of its
own. Whatever mask the model has made for the long row, cut to the tokens of a sample, is the mask of that sample:
causal, sliding, or between the tokens of an image.

Shapes: C samples, L tokens of the longest, T tokens of the row, H heads, d head width, Q queries, K keys.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from ..models.interface import ModelInterface
from ..pruners import Pruner

# Kinds of layers that mix tokens by attention alone, and see the places within a sample as they would alone.
SEPARABLE = {"full_attention", "sliding_attention"}
REMEDY = "Set padding_free=False."


@dataclass
class SampleRows:
    """Where the tokens of each sample lie in one row.

    Args:
        places (`torch.LongTensor` of shape `(C, L)`): place in the row of each token of each sample; the last one's on
            padding.
        slots (`torch.LongTensor` of shape `(T,)`): place in the flattened `(C, L)` of each token of the row.
        real (`torch.BoolTensor` of shape `(C, L)`): False on padding.
    """

    places: torch.Tensor
    slots: torch.Tensor
    real: torch.Tensor
    _masks: list[tuple] = field(default_factory=list, repr=False)

    @classmethod
    def of(cls, lengths: torch.Tensor, longest: int, total: int) -> SampleRows:
        """The rows of samples of `lengths` `(C,)`. All sizes are known, so nothing here waits for the device."""
        ends, place = lengths.cumsum(0), torch.arange(longest, device=lengths.device)
        # (C, L): whether a sample is so long, and the place of its token in the row.
        real = place < lengths[:, None]
        places = ((ends - lengths)[:, None] + torch.minimum(place, lengths[:, None] - 1)).clamp(min=0)
        # (T,): the sample of each token, and its place behind the samples of L tokens before it.
        index = torch.arange(total, device=lengths.device)
        sample = torch.searchsorted(ends, index, right=True)
        return cls(places, index - (ends - lengths)[sample] + sample * longest, real)

    def apart(self, states: torch.Tensor) -> torch.Tensor:
        """Queries, keys or values of the row `(1, H, T, d)` as those of the samples `(C, H, L, d)`."""
        rows = Regrouped.apply(states[0].transpose(0, 1), self.places.flatten(), self.slots, None)
        return rows.unflatten(0, self.places.shape).transpose(1, 2)

    def joined(self, states: torch.Tensor) -> torch.Tensor:
        """The attention's result `(C, L, H, d)` as that of the row `(1, T, H, d)`."""
        return Regrouped.apply(states.flatten(0, 1), self.slots, self.places.flatten(), self.real.flatten())[None]

    def log_sizes(self, row: torch.Tensor | None) -> torch.Tensor | None:
        """Sizes of the row's keys `(1, T)` as those of the samples `(C, L)`."""
        return None if row is None else row[0][self.places]

    def mask(self, mask: torch.Tensor | None, causal: bool, dtype: torch.dtype) -> torch.Tensor | None:
        """The samples' mask `(C, 1, L, L)` from the row's `(1, 1, T, T)`, boolean or additive.

        None where causal attention needs none: padding is behind all tokens of its sample. Layers often receive the
        same mask, so the last results are cached.
        """
        if mask is None and causal:
            return None
        real = self.real[:, None, None]
        if mask is None:
            return torch.zeros(real.shape, dtype=dtype, device=real.device).masked_fill(~real, torch.finfo(dtype).min)
        kept = None if torch.compiler.is_compiling() else self._masks
        for known, result in kept or ():
            if known is mask:
                return result
        # Rows and columns of each sample, (h, C, L, L), then (C, h, L, L); no key is padding.
        cut = mask[0][:, self.places[:, :, None], self.places[:, None]].transpose(0, 1)
        cut = cut & real if mask.dtype == torch.bool else cut.masked_fill(~real, torch.finfo(dtype).min)
        if kept is not None:
            self._masks = [*kept[-3:], (mask, cut)]
        return cut


class Regrouped(torch.autograd.Function):
    """Rows `index` of a tensor. Backward takes rows `inverse` of the gradient, where `real`: no rows are added up."""

    @staticmethod
    def forward(
        ctx, states: torch.Tensor, index: torch.Tensor, inverse: torch.Tensor, real: torch.Tensor | None
    ) -> torch.Tensor:
        ctx.save_for_backward(inverse, real)
        return states.index_select(0, index)

    @staticmethod
    def backward(ctx, upstream: torch.Tensor):
        inverse, real = ctx.saved_tensors
        gradient = upstream.index_select(0, inverse)
        if real is not None:
            gradient = gradient.masked_fill(~real.view(-1, *[1] * (gradient.dim() - 1)), 0)
        return gradient, None, None, None


def layer_kinds(config) -> set[str]:
    """What kinds of layers a language model has, as its config calls them; none if all are alike."""
    return set(getattr(config, "layer_types", None) or getattr(config, "layers_block_type", None) or ())


def check_padding_free(interface: ModelInterface, pruner: Pruner) -> None:
    """Raises a `ValueError` if the samples of one row could not be kept apart in this model, or under this pruner."""
    config, reason = interface.text_config, None
    foreign = sorted(layer_kinds(config) - SEPARABLE)
    if pruner.in_language_model:
        reason = f"the pruner {pruner.config.pruner_type!r} drops tokens between layers, row by row"
    elif interface.family.places:
        reason = f"the attention of {interface.name} takes position ids for places in the sequence"
    elif foreign:
        names = ", ".join(map(repr, foreign))
        reason = f"{interface.name} has layers of kind {names}, which would see one row as one sample"
    if reason:
        raise ValueError(f"`padding_free` is True, but {reason}. {REMEDY}")
