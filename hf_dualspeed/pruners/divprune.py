"""DivPrune: the most diverse subset by max-min distance (arXiv 2503.02175)."""

from __future__ import annotations

import torch

from .base import Pruner
from .farthest import farthest_first
from .ops import take
from .registry import register_pruner
from .tokens import PrunedTokens, VisualTokens


@register_pruner("divprune")
class DivPrune(Pruner):
    """Keeps the most diverse tokens, by greedy max-min cosine distance.

    DivPrune, arXiv 2503.02175. The first token is the one whose nearest neighbour is farthest; each next one is
    farthest from those already kept. Inputs: features alone. Cost: on accelerators one product per pair of tokens and
    O(K N) for the choice, in one Triton kernel where triton is installed, without host synchronisation; on CPUs O(K N)
    products and, for the first token, those of fewer pairs. The official code loops over images in Python and
    recomputes the minimum over all kept tokens at each step; all three ways here make the same choice.
    """

    def reduce(self, tokens: VisualTokens, lengths: list[int]) -> PrunedTokens:
        with torch.no_grad(), torch.autocast(tokens.features.device.type, enabled=False):
            ranked, nearest = farthest_first(tokens, lengths, self.plain_path)
        return take(tokens, ranked, lengths, self.config.dropped_tokens, nearest)
