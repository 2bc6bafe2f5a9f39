"""FasterVLM: what the vision tower itself attends to (arXiv 2412.01818)."""

from __future__ import annotations

import torch

from .base import Pruner
from .ops import top_k
from .registry import register_pruner
from .tokens import VisualTokens


@register_pruner("cls_attention")
class ClsAttentionPruner(Pruner):
    """Keeps the tokens that receive the most attention in the vision tower's penultimate layer.

    FasterVLM's rule (arXiv 2412.01818, v1): the attention of [CLS] to each patch, mean over heads. In a tower without
    [CLS] (SigLIP, Qwen), the mean over all queries is taken, which the paper does not cover. A token that merges
    several patches gets their mean. Inputs: the tower's attention. It is computed from queries and keys and works under
    SDPA and FlashAttention; the official code needs eager attention and keeps all maps of that layer. Cost: one row of
    one layer's attention, or that layer's whole attention without a [CLS].
    """

    needs = frozenset({"attention"})

    def rank(self, tokens: VisualTokens, k: int) -> torch.Tensor:
        return top_k(tokens.attention, tokens.valid, k)
