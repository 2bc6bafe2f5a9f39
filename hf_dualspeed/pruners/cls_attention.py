"""FasterVLM: what the vision tower itself attends to (arXiv 2412.01818)."""

from __future__ import annotations

import torch

from .base import Pruner, VisualTokens, highest, register_pruner


@register_pruner("cls_attention")
class ClsAttentionPruner(Pruner):
    """Keeps the tokens that receive the most attention in the vision tower's penultimate layer.

    The head-mean attention of [CLS]; where the tower has no [CLS] (SigLIP, Qwen), the mean over all queries. Cost:
    one row of one layer's attention, or that layer's whole attention without a [CLS].
    """

    needs = frozenset({"attention"})

    def rank(self, tokens: VisualTokens, most: int) -> torch.Tensor:
        return highest(tokens.attention, tokens.valid, most)
