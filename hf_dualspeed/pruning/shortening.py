"""Shortens every `[B, S]` tensor of a batch alike. Shapes: B batch, S sequence, S' shortened sequence."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..utils.validation import check_finite

FILL = {"labels": -100, "attention_mask": 0}


@dataclass
class Shortening:
    """Where each token of the shortened batch comes from.

    Args:
        source (`torch.LongTensor` of shape `(B, S')`): position in the full sequence.
        mask (`torch.BoolTensor` of shape `(B, S')`): False on padding.
    """

    source: torch.Tensor
    mask: torch.Tensor

    def apply(self, tensor: torch.Tensor, fill: int = 0) -> torch.Tensor:
        """Shortens the last two dimensions, `(..., B, S)` to `(..., B, S')`."""
        source = self.source.expand(*tensor.shape[:-1], -1)
        return tensor.gather(-1, source).masked_fill(~self.mask, fill)


def plan_shortening(
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    copies: dict[int, torch.Tensor],
    finite: Sequence[torch.Tensor] = (),
) -> Shortening:
    """Plans the removal and repetition of placeholders, padding on the side the batch was padded on.

    Args:
        input_ids (`torch.LongTensor` of shape `(B, S)`).
        attention_mask (`torch.Tensor` of shape `(B, S)`): padding is dropped before rows are padded again.
        copies (`dict[int, torch.LongTensor]`): for each placeholder id, how often each of its placeholders, in the
            order of the flattened batch, appears in the result: 0 drops it.
        finite (`Sequence[torch.BoolTensor]`): whether the features behind them are finite, each of no dimensions.

    Raises:
        ValueError: a placeholder's number in the batch differs from its features' (both are named), or features are
            not finite.
    """
    count = attention_mask.bool().long()
    found = []
    for token_id, repeats in copies.items():
        is_visual = input_ids == token_id
        rank = is_visual.flatten().cumsum(0).view_as(input_ids) - 1
        count = torch.where(is_visual, repeats[rank.clamp(0, len(repeats) - 1)], count)
        found.append(is_visual.sum())
    length = count.sum(1)
    # The one host synchronisation of shortening: tensors need a size.
    longest, *found = torch.stack([length.amax(), *found, *finite]).tolist()
    check_finite(all(found[len(copies) :]))
    for (token_id, repeats), placeholders in zip(copies.items(), found, strict=False):
        check_count(token_id, placeholders, len(repeats))
    padded_left = (attention_mask[:, 0] == 0).any()
    slot = torch.arange(longest, device=input_ids.device) - torch.where(padded_left, longest - length, 0)[:, None]
    mask = (slot >= 0) & (slot < length[:, None])
    # Slot j holds the first token up to which more than j tokens are kept.
    source = torch.searchsorted(count.cumsum(1), slot.clamp(min=0), right=True).clamp(max=input_ids.shape[1] - 1)
    return Shortening(source, mask)


def check_count(token_id: int, placeholders: int, features: int) -> None:
    """Raises a `ValueError` unless a batch has as many placeholders as the model made features."""
    if placeholders != features:
        raise ValueError(
            f"The batch has {placeholders} placeholders (token id {token_id}) but the model made {features} visual "
            "features. Give the processor as many images (or videos, or audios) as placeholders, and do not truncate "
            "them (raise max_length)."
        )
