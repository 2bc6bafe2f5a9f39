"""Which tokens of a batch instruct: what text-conditioned pruners may see. Never an answer, nor what follows one.

Shapes: B batch, S sequence, U units (images, clips).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from ..models.interface import unwrap, visual_token_ids
from .packing import Packing


@dataclass
class Instructions:
    """The instruction that goes with each unit of a batch.

    It is the text of the unit's sample that no label supervises, up to the first supervised token behind the unit:
    text from there on could tell the answer. Without labels it is all text of the sample.

    Args:
        rows (`torch.LongTensor` of shape `(U,)`): the row that a unit lies in.
        valid (`torch.BoolTensor` of shape `(U, S)`): True at the instruction's tokens in that row.
    """

    rows: torch.Tensor
    valid: torch.Tensor

    def embedded(self, model: nn.Module, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Input embeddings `(U, T, D)` of the instructions, without gradients, and where they are real, `(U, T)`.

        T is the longest instruction's length, for which this waits for the device: rows are much longer.
        """
        most = max(1, int(self.valid.sum(1).amax()))
        real, order = self.valid.byte().sort(dim=1, descending=True, stable=True)
        real = real[:, :most].bool()
        # In place of other tokens, some of which are no row of the embedding, any text.
        text = ids[self.rows].gather(1, order[:, :most]).masked_fill(~real, 0)
        with torch.no_grad():
            return unwrap(model).get_input_embeddings()(text), real


def instructions(model: nn.Module, inputs: Mapping, token_id: int, lengths: list[int]) -> Instructions:
    """The instructions of the units whose placeholders are `token_id`; unit i has `lengths[i]` of them.

    Finding them does not wait for the device.
    """
    ids = inputs["input_ids"]
    length, device = ids.shape[1], ids.device
    rows, columns = unit_places(ids, token_id, lengths)
    visual, labels, mask = is_visual(model, ids), inputs.get("labels"), inputs.get("attention_mask")
    supervised = torch.zeros_like(visual) if labels is None else (labels != -100) & ~visual
    text = ~visual & ~supervised
    if mask is not None:
        text &= mask.bool()
    place = torch.arange(length, device=device)
    behind = supervised[rows] & (place > columns[:, None])
    end = torch.where(behind, place, length).amin(1, keepdim=True)
    valid = text[rows] & (place < end)
    packing = Packing.of(model, inputs)
    if packing is not None:
        sample = packing.sample[rows]
        valid &= sample == sample.gather(1, columns[:, None])
    return Instructions(rows, valid)


def unit_places(ids: torch.Tensor, token_id: int, lengths: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Row and column of the first placeholder of each unit, `(U,)`."""
    starts = torch.tensor([0, *lengths[:-1]]).cumsum(0).to(ids.device, non_blocking=True)
    first = flat_places(ids, token_id, starts)
    return first // ids.shape[1], first % ids.shape[1]


def flat_places(ids: torch.Tensor, token_id: int, order: torch.Tensor) -> torch.Tensor:
    """Where in the flattened batch the placeholders of these numbers lie, counted from 0, in the shape of `order`."""
    seen = (ids == token_id).flatten().cumsum(0)
    return torch.searchsorted(seen, order + 1).clamp(max=ids.numel() - 1)  # where a count is off, shortening says so


def is_visual(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """`(B, S)`, True at placeholders of any modality."""
    placeholders = torch.tensor(visual_token_ids(unwrap(model).config)).to(ids.device, non_blocking=True)
    return torch.isin(ids, placeholders)
