"""HoloV: a budget for every part of the image (arXiv 2510.02912)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from ..utils.validation import check_range
from .base import Pruner
from .config import PrunerConfig
from .grid import cells
from .ops import top_k
from .registry import register_pruner
from .tokens import VisualTokens

ROWS_AT_ONCE = 256  # rows of similarities in memory at a time
EPSILON = 1e-6


@dataclass
class HoloVConfig(PrunerConfig):
    """Settings of HoloV.

    Args:
        crops (`int`): number of parts that an image is split into.
        variance_weight (`float`): weight of the variance of a token's similarities, relative to its attention.
    """

    crops: int = 16
    variance_weight: float = 0.09

    def __post_init__(self):
        super().__post_init__()
        check_range("crops", self.crops, 1, off="16 is the official code's.")
        check_range("variance_weight", self.variance_weight, 0, off="Use 0.0 for attention alone.")


@register_pruner("holov")
class HoloVPruner(Pruner):
    """Keeps the best tokens of each crop of the image, of each crop as many as it deserves.

    HoloV, arXiv 2510.02912. A token's score is the attention that it receives plus `variance_weight` times the variance
    of its cosine similarities to the other tokens of its crop, scaled to the crop's mean attention. Crops share the
    budget in proportion to their mean scores, and each keeps its tokens of highest score. Needs the tower's attention,
    and the grid for square crops; without one, crops are runs in raster order. Cost: one (N, N) product in chunks and a
    few sorts, batched over images.

    Webster's method shares the budget: the j-th token of a crop ranks at the crop's score over j - 1/2, and the K best
    ranks of the image are kept. Budgets are whole and add up to K; what a small crop cannot use goes to the others. The
    official code rounds down, gives leftovers to the highest scores, loses what a crop cannot use and fills up with
    zeros. Its crops are runs, it ranks inside a crop by attention alone, and it counts a token's similarity to itself
    as 0. Tokens that come from no patch (newlines) have no attention and come last.
    """

    config_class = HoloVConfig
    needs = frozenset({"attention", "grid"})

    def rank(self, tokens: VisualTokens, k: int) -> torch.Tensor:
        crops = [min(self.config.crops, n) for n in tokens.lengths]
        seen = tokens.attention.isfinite() if tokens.valid is None else tokens.attention.isfinite() & tokens.valid
        attention = tokens.attention.float().masked_fill(~seen, 0)
        # Crop of each token, (B, N); C = max(crops) stands for tokens without attention.
        crop = cells(tokens, crops).masked_fill(~seen, max(crops))
        # One-hot crops (B, N, C + 1) and their sizes (B, 1, C + 1), for means by product: the sums of scatter_add vary
        # from run to run on accelerators.
        member = (crop[..., None] == torch.arange(max(crops) + 1, device=crop.device)).float()
        size = member.sum(1, keepdim=True).clamp(min=1)

        def mean(values: torch.Tensor) -> torch.Tensor:  # over each token's crop, (B, N)
            return ((values[:, None] @ member) / size)[:, 0].gather(1, crop)

        # Variance scaled to the crop's mean attention, then the scores, all (B, N).
        variance = similarity_variance(tokens.features, crop)
        variance = variance * mean(attention) / (mean(variance) + EPSILON)
        scores = attention + self.config.variance_weight * variance
        # Webster's method: the crop's score over the token's place in its crop plus 1/2, (B, N).
        seats = mean(scores) / (place_in_crop(scores, crop) + 0.5)
        return top_k(seats.masked_fill(~seen, -1), tokens.valid, k)


def similarity_variance(features: torch.Tensor, crop: torch.Tensor) -> torch.Tensor:
    """Variance of each token's cosine similarities to the other tokens of its `crop` `(B, N)`, `(B, N)`."""
    units = F.normalize(features.detach().float(), dim=-1)
    parts = []
    for start in range(0, units.shape[1], ROWS_AT_ONCE):
        rows = slice(start, start + ROWS_AT_ONCE)
        # Similarities of n tokens to all, and which are to others of the same crop, both (B, n, N).
        similarity = units[:, rows] @ units.mT
        fellow = crop[:, rows, None] == crop[:, None]
        fellow.diagonal(start, 1, 2).fill_(False)
        # Their masked mean (B, n, 1) and variance (B, n).
        others = fellow.sum(-1, keepdim=True).clamp(min=1)
        mean = (similarity * fellow).sum(-1, keepdim=True) / others
        parts.append(((similarity - mean).square() * fellow).sum(-1) / others[..., 0])
    return torch.cat(parts, dim=1)


def place_in_crop(scores: torch.Tensor, crop: torch.Tensor) -> torch.Tensor:
    """Rank from 0 of each token in its `crop` `(B, N)` by `scores` `(B, N)`, `(B, N)`; ties go to the earlier one."""
    # Sort by score, then stably by crop: each crop's tokens stand together, best first, (B, N).
    order = scores.sort(dim=1, descending=True, stable=True).indices
    grouped, within = crop.gather(1, order).sort(dim=1, stable=True)
    order = order.gather(1, within)
    # Rank = place in the sorted row minus the place where the crop begins, put back into source order.
    begins = torch.searchsorted(grouped, grouped)
    return torch.zeros_like(order).scatter(1, order, torch.arange(crop.shape[1], device=crop.device) - begins)
