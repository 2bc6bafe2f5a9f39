"""Random subset: the first honest baseline."""

from __future__ import annotations

import torch

from .base import Pruner
from .ops import top_k
from .registry import register_pruner
from .tokens import VisualTokens


@register_pruner("random")
class RandomPruner(Pruner):
    """Keeps a uniformly random subset, drawn anew on each call.

    A baseline, not a published method. Inputs: `tokens.generator`, which the trainer seeds by step, micro-batch and
    rank. Cost: O(N log N).
    """

    deterministic = False

    def rank(self, tokens: VisualTokens, k: int) -> torch.Tensor:
        shape = tokens.features.shape[:2]
        draws = torch.rand(shape, generator=tokens.generator, device=tokens.features.device)
        return top_k(draws, tokens.valid, k)
