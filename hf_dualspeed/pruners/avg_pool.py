"""2-D average pooling to the budget: the second honest baseline."""

from __future__ import annotations

import torch

from .base import Pruner
from .grid import cells, centres, pool
from .ops import counts, in_source_order
from .registry import register_pruner
from .tokens import PrunedTokens, VisualTokens, gather_rows


@register_pruner("avg_pool")
class AveragePoolPruner(Pruner):
    """Averages the tokens of each of K equal cells.

    Cells tile the image evenly and are near square; each average takes the position of its cell's centre. A baseline,
    not a published method. Inputs: the grid; without one, cells are runs in raster order. Cost: O(N D).
    """

    needs = frozenset({"grid"})
    merges = True

    def reduce(self, tokens: VisualTokens, lengths: list[int]) -> PrunedTokens:
        most = max(lengths)
        with torch.no_grad():
            # Cell of each token (B, N), its centre token (B, K), both then in source order of the centres.
            cell = cells(tokens, lengths)
            middle = centres(tokens, cell, most)
            positions, order, valid = in_source_order(middle, lengths, cell.shape[1])
            sizes = counts(cell, most).gather(1, order)

        def merge(features: torch.Tensor) -> torch.Tensor:
            # Average (B, N, D') to (B, K, D') in float32: a bfloat16 sum over a large cell loses the small terms.
            return gather_rows(pool(features.float(), cell, most).to(features.dtype), order)

        return PrunedTokens(merge(tokens.features), positions, valid, lengths, merge, sizes)
