"""Layers of learned pruners; they compute in float32, whatever the dtype of their weights."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn


class Float32Linear(nn.Linear):
    """A linear layer in float32: sharded and half-precision training may hold its weights in bfloat16.

    Its call takes `rows` `(..., in_features)` and, optionally, `most`, and returns the first `most` outputs,
    `(..., most)`. The caller turns autocast off.
    """

    def forward(self, rows: torch.Tensor, most: int | None = None) -> torch.Tensor:
        bias = None if self.bias is None else self.bias[:most].float()
        return F.linear(rows.float(), self.weight[:most].float(), bias)


def check_width(features: torch.Tensor, hidden_size: int) -> None:
    """Raises a `ValueError` unless `features` `(B, N, D)` have the width of the learned pruner."""
    if features.shape[-1] != hidden_size:
        raise ValueError(
            f"`hidden_size` is {hidden_size}, but the visual tokens are {features.shape[-1]} wide. Set "
            f"hidden_size={features.shape[-1]}, or leave it to the trainer, which takes the model's; a pruner that is "
            "already trained fits models of its own width only."
        )
