"""Shortens every `[B, S]` tensor of a batch in the same way.

Shapes: B batch, S sequence, S' shortened sequence, T real tokens of the shortened batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..utils.validation import check_finite

FILL = {"labels": -100, "attention_mask": 0}


@dataclass
class Shortening:
    """The source of each token of the shortened batch.

    Args:
        source (`torch.LongTensor` of shape `(B, S')`): position in the full sequence; with the samples in one row,
            `(1, T)` in the flattened batch.
        mask (`torch.BoolTensor` of shape `(B, S')`): False on padding.
        lengths (`torch.LongTensor` of shape `(B,)`): tokens of each sample.
        longest (`int`): the most of them.
        one_row (`bool`): whether the samples lie end to end in one row, without padding.
    """

    source: torch.Tensor
    mask: torch.Tensor
    lengths: torch.Tensor
    longest: int
    one_row: bool = False

    def apply(self, tensor: torch.Tensor, fill: int = 0) -> torch.Tensor:
        """Shortens the last two dimensions, `(..., B, S)` to `(..., B, S')`, or to `(..., 1, T)`."""
        if self.one_row:
            return tensor.flatten(-2)[..., self.source]
        source = self.source.expand(*tensor.shape[:-1], -1)
        return tensor.gather(-1, source).masked_fill(~self.mask, fill)


def plan_shortening(
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    copies: dict[int, torch.Tensor],
    finite: Sequence[torch.Tensor] = (),
    one_row: bool = False,
) -> Shortening:
    """Plans the removal and repetition of placeholders. The result is padded on the same side as the batch.

    Args:
        input_ids (`torch.LongTensor` of shape `(B, S)`).
        attention_mask (`torch.Tensor` of shape `(B, S)`): padding is dropped before rows are padded again.
        copies (`dict[int, torch.LongTensor]`): for each placeholder id, how often each of its placeholders appears in
            the result, in the order of the flattened batch; 0 drops it.
        finite (`Sequence[torch.BoolTensor]`): whether the features of each modality are finite, without dimensions.
        one_row (`bool`): lay the samples end to end in one row instead of padding them.

    Raises:
        ValueError: the numbers of placeholders and features differ (the message names both), or features are not
            finite.
    """
    # How often each token appears in the result, (B, S): 1 for text, 0 for padding, `repeats` for placeholders.
    count = attention_mask.bool().long()
    found = []
    for token_id, repeats in copies.items():
        is_visual = input_ids == token_id
        # Number of each placeholder in the flattened batch, (B, S).
        rank = is_visual.flatten().cumsum(0).view_as(input_ids) - 1
        count = torch.where(is_visual, repeats[rank.clamp(0, len(repeats) - 1)], count)
        found.append(is_visual.sum())
    # Tokens of each shortened sample, (B,).
    lengths = length = count.sum(1)
    # The samples as one row without gaps: (B, S) -> (1, B * S) and (B,) -> (1,).
    if one_row:
        count, length = count.view(1, -1), lengths.sum(0, keepdim=True)
        found.insert(0, length[0])
    # The one host synchronisation of shortening: tensors need a size.
    longest, *found = torch.stack([lengths.amax(), *found, *finite]).tolist()
    width = found.pop(0) if one_row else longest
    check_finite(all(found[len(copies) :]))
    for (token_id, repeats), placeholders in zip(copies.items(), found, strict=False):
        check_count(token_id, placeholders, len(repeats))
    # Number of the token in each slot, (B, S'): negative on left padding, `length` or more on right padding.
    padded_left = (attention_mask[:, 0] == 0).any()
    slot = torch.arange(width, device=input_ids.device) - torch.where(padded_left, width - length, 0)[:, None]
    mask = (slot >= 0) & (slot < length[:, None])
    # Slot j holds the first token at which the count of kept tokens exceeds j, (B, S').
    source = torch.searchsorted(count.cumsum(1), slot.clamp(min=0), right=True).clamp(max=count.shape[1] - 1)
    return Shortening(source, mask, lengths, longest, one_row)


def check_count(token_id: int, placeholders: int, features: int) -> None:
    """Raises a `ValueError` unless a batch has as many placeholders as the model made features."""
    if placeholders != features:
        raise ValueError(
            f"The batch has {placeholders} placeholders (token id {token_id}) but the model made {features} visual "
            "features. Give the processor as many images (or videos, or audios) as placeholders, and do not truncate "
            "them (raise max_length)."
        )
