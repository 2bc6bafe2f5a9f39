"""Finds the text that instructs, for text-conditioned pruners: never an answer, nor what follows one.

Shapes: B batch, S sequence, U units (images, clips), T tokens of the longest instruction, D hidden.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from ..models.interface import ModelInterface
from .packing import Packing


@dataclass
class Instructions:
    """The instruction of each unit of a batch.

    It is the unsupervised text of the unit's sample up to the first supervised token after the unit, because later text
    could reveal the answer. Without labels, it is all text of the sample.

    Args:
        rows (`torch.LongTensor` of shape `(U,)`): the batch row of each unit.
        valid (`torch.BoolTensor` of shape `(U, S)`): True at the instruction's tokens in that row.
    """

    rows: torch.Tensor
    valid: torch.Tensor

    def embedded(self, outer: nn.Module, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Input embeddings of the instructions `(U, T, D)`, without gradients, and their mask `(U, T)`.

        Waits for the device to learn T, because rows are much longer.
        """
        most = max(1, int(self.valid.sum(1).amax()))
        # Instruction tokens first, in order: (U, S) -> (U, T).
        real, order = self.valid.byte().sort(dim=1, descending=True, stable=True)
        real = real[:, :most].bool()
        # Any text id on padding, because some placeholder ids have no row in the embedding.
        text = ids[self.rows].gather(1, order[:, :most]).masked_fill(~real, 0)
        embeddings = outer.get_input_embeddings()
        # NEFTune's noise is for what the language model reads, and larger for few tokens: pruners get none.
        training, embeddings.training = embeddings.training, False
        try:
            with torch.no_grad():
                return embeddings(text), real
        finally:
            embeddings.training = training


def instructions(interface: ModelInterface, inputs: Mapping, token_id: int, lengths: list[int]) -> Instructions:
    """The instructions of the units whose placeholders are `token_id`; unit i has `lengths[i]` of them.

    Does not wait for the device.
    """
    ids = inputs["input_ids"]
    length, device = ids.shape[1], ids.device
    # Row and column where each unit begins, (U,) each.
    rows, columns = unit_places(ids, token_id, lengths)
    # Kinds of tokens, (B, S): placeholders, supervised ones, and instructing text.
    visual, labels, mask = is_visual(interface, ids), inputs.get("labels"), inputs.get("attention_mask")
    supervised = torch.zeros_like(visual) if labels is None else (labels != -100) & ~visual
    text = ~visual & ~supervised
    if mask is not None:
        text &= mask.bool()
    # First supervised token after each unit, (U, 1); text before it in the unit's row, (U, S).
    place = torch.arange(length, device=device)
    behind = supervised[rows] & (place > columns[:, None])
    end = torch.where(behind, place, length).amin(1, keepdim=True)
    valid = text[rows] & (place < end)
    # In a packed row, only the unit's own sample.
    packing = Packing.of(interface, inputs)
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
    """Positions in the flattened batch of the placeholders with the numbers `order`, counted from 0, in its shape."""
    # Placeholders up to each position, (B * S,): number j is the first position with j + 1 of them.
    seen = (ids == token_id).flatten().cumsum(0)
    return torch.searchsorted(seen, order + 1).clamp(max=ids.numel() - 1)  # shortening checks the counts


def is_visual(interface: ModelInterface, ids: torch.Tensor) -> torch.Tensor:
    """True at placeholders of any modality, `(B, S)`."""
    placeholders = torch.tensor(interface.visual_token_ids).to(ids.device, non_blocking=True)
    return torch.isin(ids, placeholders)
