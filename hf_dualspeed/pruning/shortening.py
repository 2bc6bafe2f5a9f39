"""Shortens every `[B, S]` tensor of a batch in the same way.

Shapes: B batch, S sequence, S' shortened sequence, T real tokens of the shortened batch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F

from ..utils.validation import check_finite

FILL = {"labels": -100}


@dataclass
class Shortening:
    """The source of each token of the shortened batch.

    Args:
        source (`torch.LongTensor` of shape `(B, S')`): position in the full sequence; with the samples in one row,
            `(1, T)` in the flattened batch.
        mask (`torch.BoolTensor` of shape `(B, S')`): False on padding.
        longest (`int`): tokens of the longest sample.
        lengths (`torch.LongTensor` of shape `(B,)`, *optional*): tokens of each sample, where samples lie end to end
            in one row, without padding.
    """

    source: torch.Tensor
    mask: torch.Tensor
    longest: int
    lengths: torch.Tensor | None = None

    def apply(self, tensor: torch.Tensor, fill: int = 0) -> torch.Tensor:
        """Shortens the last two dimensions, `(..., B, S)` to `(..., B, S')`, or to `(..., 1, T)`."""
        if self.lengths is not None:
            return tensor.flatten(-2)[..., self.source]
        source = self.source.expand(*tensor.shape[:-1], -1)
        return tensor.gather(-1, source).masked_fill(~self.mask, fill)

    def apply_to_all(self, tensors: Mapping[str, torch.Tensor], fills: Mapping[str, int]) -> dict[str, torch.Tensor]:
        """Shortens tensors `(B, S)` or `(A, B, S)` by name, with one gather for all of a dtype.

        Args:
            tensors (`Mapping`): all on one device.
            fills (`Mapping`): what stands on padding, by name; 0 for others.
        """
        short = {}
        for dtype in {tensor.dtype: None for tensor in tensors.values()}:
            group = {name: tensor for name, tensor in tensors.items() if tensor.dtype == dtype}
            layers = {name: tensor.unbind() if tensor.dim() == 3 else (tensor,) for name, tensor in group.items()}
            values = tuple(fills.get(name, 0) for name, rows in layers.items() for _ in rows)
            # All of them on top of each other, (L, B, S) -> (L, B, S').
            stacked = torch.stack([row for rows in layers.values() for row in rows])
            if self.lengths is None:
                gathered = stacked.gather(-1, self.source.expand(len(stacked), -1, -1))
                gathered = torch.where(self.mask, gathered, constants(values, dtype, gathered.device))
            else:  # one row has no padding
                gathered = self.apply(stacked)
            parts = gathered.split([len(rows) for rows in layers.values()])
            short |= {
                name: part if group[name].dim() == 3 else part[0] for name, part in zip(group, parts, strict=True)
            }
        return short


@cache
def constants(values: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Numbers `(L, 1, 1)` that are copied to the device once, not in each step."""
    with torch.inference_mode(False):
        return torch.tensor(values, dtype=dtype).view(-1, 1, 1).to(device)


def plan_shortening(
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    copies: dict[int, torch.Tensor],
    finite: Sequence[torch.Tensor] = (),
    multiple: int = 1,
    one_row: bool = False,
    generates: bool = False,
) -> Shortening:
    """Plans the removal and repetition of placeholders. The result is padded on the same side as the batch.

    A batch without padding, which shows no side, is padded on the right, or on the left where it `generates`.

    Args:
        input_ids (`torch.LongTensor` of shape `(B, S)`).
        attention_mask (`torch.Tensor` of shape `(B, S)`): padding is dropped before rows are padded again.
        copies (`dict[int, torch.LongTensor]`): for each placeholder id, how often each of its placeholders appears in
            the result, in the order of the flattened batch; 0 drops it.
        finite (`Sequence[torch.BoolTensor]`): whether the features of each modality are finite, without dimensions.
        multiple (`int`): S' is padded to a multiple of it; a single row on the right.
        one_row (`bool`): lay the samples end to end in one row instead of padding them.
        generates (`bool`): generation may continue the rows.

    Raises:
        ValueError: the numbers of placeholders and features differ (the message names both), or features are not
            finite.
    """
    # How often each token appears in the result, (B, S): 1 for text, 0 for padding, `repeats` for placeholders.
    real = attention_mask.bool()
    count, found = real.long(), []
    for token_id, repeats in copies.items():
        is_visual = input_ids == token_id
        # Enough of them for any number of placeholders, which is checked below.
        count = count.masked_scatter(is_visual, F.pad(repeats, (0, input_ids.numel() - len(repeats))))
        found.append(is_visual.sum())
    # Tokens up to each one, (B, S), and of each shortened row, (B, 1).
    ends = count.cumsum(1)
    length = ends.narrow(1, -1, 1)
    # The one host synchronisation of shortening: tensors need a size.
    begins = real.select(1, 0).all()
    begins = begins & ~real.all() if generates else begins
    sizes = [length.amax(), begins, *([length.sum()] if one_row else [])]
    longest, begins, *found = torch.stack([*sizes, *found, *finite]).tolist()
    total = found.pop(0) if one_row else None
    check_finite(all(found[len(copies) :]))
    for (token_id, repeats), placeholders in zip(copies.items(), found, strict=False):
        check_count(token_id, placeholders, len(repeats))
    if one_row:
        # Tokens up to each one of the flattened batch, (1, B * S), and the token in each slot of the row, (1, T).
        ends = count.view(1, -1).cumsum(1)
        slot = torch.arange(total, device=input_ids.device)[None]
        source = torch.searchsorted(ends, slot, right=True).clamp_(max=ends.shape[1] - 1)
        return Shortening(source, slot >= 0, longest, length[:, 0])
    width = -(-longest // multiple) * multiple
    # Number of the token in each slot, (B, S'): negative on left padding, `length` or more on right padding.
    slot = torch.arange(width, device=input_ids.device)
    padded_left = not begins and len(input_ids) > 1
    slot = slot - (width - length) if padded_left else slot.repeat(len(input_ids), 1)
    mask = slot >= 0 if padded_left else slot < length
    # Slot j holds the first token at which the count of kept tokens exceeds j, (B, S').
    source = torch.searchsorted(ends, slot, right=True).clamp_(max=input_ids.shape[1] - 1)
    return Shortening(source, mask, longest)


def check_count(token_id: int, placeholders: int, features: int) -> None:
    """Raises a `ValueError` unless a batch has as many placeholders as the model made features."""
    if placeholders != features:
        raise ValueError(
            f"The batch has {placeholders} placeholders (token id {token_id}) but the model made {features} visual "
            "features. Give the processor as many images (or videos, or audios) as placeholders, and do not truncate "
            "them (raise max_length)."
        )
