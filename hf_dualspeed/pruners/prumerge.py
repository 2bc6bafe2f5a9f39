"""LLaVA-PruMerge: outliers of attention, spatial samples, and what lies near them (arXiv 2403.15388)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from ..utils.validation import check_range
from .base import Pruner
from .clustering import first, on_device, patches, real_tokens
from .config import PrunerConfig
from .ops import kept_mask, top_k
from .registry import register_pruner
from .tokens import PrunedTokens, VisualTokens, gather_rows

WHISKER = 1.5  # an outlier lies more than so many interquartile ranges above the third quartile


@dataclass
class PruMergeConfig(PrunerConfig):
    """Settings of `prumerge`.

    Args:
        neighbours (`int`): how many of the image's other tokens each kept one absorbs; 0 absorbs none.
    """

    neighbours: int = 32

    def __post_init__(self):
        super().__post_init__()
        check_range("neighbours", self.neighbours, 0, off="Use 0 to select without merging.")


@register_pruner("prumerge")
class PruMergePruner(Pruner):
    """Keeps the outliers of attention and evenly spaced tokens, and adds to each what has similar keys.

    Outliers are tokens whose attention lies more than 1.5 interquartile ranges above the third quartile. They are kept
    first; if there are more than the budget, the most attended of them. Evenly spaced tokens fill the budget (the
    spatial samples of PruMerge+), and where those are outliers already, the most attended of the others. Each kept
    token absorbs the tokens with the most similar keys (cosine; other kept ones may be among them), weighted by their
    attention, itself by 1. Inputs: the vision tower's attention and keys. Cost: the (K, N) similarities, sorted, one
    product of (K, N) with the features, and the attention of `cls_attention`.

    The original keeps as many tokens as there are outliers, PruMerge+ a multiple of that; here the budget is exact. The
    official code sums without dividing by the weights, which makes norms grow, and appends a token that sums up all
    pruned ones. Here each token is a weighted mean, and no token is appended. The official code takes attention and
    keys of the last layer over all heads at once; ours are means over the heads of the penultimate layer. Tokens that
    come from no patch (newlines) are kept last and take no part in merging.
    """

    config_class = PruMergeConfig
    needs = frozenset({"attention", "keys"})
    merges = True

    def reduce(self, tokens: VisualTokens, lengths: list[int]) -> PrunedTokens:
        device = tokens.features.device
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            # Kept positions (B, K), and the weights with which they absorb all tokens (B, K, N).
            positions = first(chosen(tokens, lengths), max(lengths))
            weights = absorbed(tokens, positions, self.config.neighbours)

        def merge(features: torch.Tensor) -> torch.Tensor:
            # Weighted mean of (B, N, D') to (B, K, D'), the kept token itself with weight 1.
            with torch.autocast(device.type, enabled=False):
                sums = gather_rows(features, positions).float() + weights @ features.float()
                return (sums / (1 + weights.sum(-1, keepdim=True))).to(features.dtype)

        return PrunedTokens(merge(tokens.features), positions, kept_mask(lengths, device), lengths, merge)


def chosen(tokens: VisualTokens, lengths: list[int]) -> torch.Tensor:
    """`(B, N)`, True on the `lengths[b]` kept tokens of image b."""
    count = tokens.features.shape[1]
    # All positions by attention, best first; outliers; and evenly spaced tokens for the rest of the budget, (B, N).
    patch = patches(tokens)
    attention = tokens.attention.float()
    by_attention = top_k(attention.masked_fill(~patch, float("-inf")), real_tokens(tokens), count)
    outlier = patch & (attention > upper_fence(attention, patch))
    spatial = spaced(patch, (on_device(lengths, tokens) - outlier.sum(1, keepdim=True)).clamp(min=0), max(lengths))
    # Sort stably by tier: outliers (2), spatial samples (1), others (0); keep the first `lengths[b]`.
    tier = torch.where(outlier, 2, spatial.long()).gather(1, by_attention)
    order = by_attention.gather(1, tier.sort(dim=1, descending=True, stable=True).indices)
    return order.argsort(dim=1) < on_device(lengths, tokens)


def upper_fence(values: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """The bound above which a row's values `(B, N)` are outliers, `(B, 1)`; NaN if no value is valid."""
    values = values.masked_fill(~valid, float("nan"))
    low, high = (torch.nanquantile(values, q, dim=1, keepdim=True) for q in (0.25, 0.75))
    return high + WHISKER * (high - low)


def spaced(valid: torch.Tensor, wanted: torch.Tensor, most: int) -> torch.Tensor:
    """`(B, N)`, True on `wanted` `(B, 1)` evenly spaced ones, at most `most`, of the `valid` `(B, N)` tokens."""
    count = valid.shape[1]
    # Middles of `wanted` equal runs of the valid tokens, and the positions of those tokens, (B, most).
    slot = torch.arange(most, device=valid.device)
    place = (2 * slot + 1) * valid.sum(1, keepdim=True) // (2 * wanted.clamp(min=1))
    there = first(valid, count).gather(1, place.clamp(max=count - 1))
    # Slots beyond `wanted` write to column N, which is cut off.
    mask = F.pad(torch.zeros_like(valid), (0, 1)).scatter(1, torch.where(slot < wanted, there, count), True)
    return mask[:, :count] & valid


def absorbed(tokens: VisualTokens, positions: torch.Tensor, neighbours: int) -> torch.Tensor:
    """Weights with which the tokens at `positions` `(B, K)` absorb all tokens, `(B, K, N)`; 0 for themselves."""
    patch = patches(tokens)
    # Cosine of keys (B, K, N); -inf for the token itself and for tokens that come from no patch.
    keys = F.normalize(tokens.keys.float(), dim=-1)
    similarity = gather_rows(keys, positions) @ keys.mT
    similarity = similarity.masked_fill(~patch[:, None], float("-inf")).scatter(2, positions[..., None], float("-inf"))
    # near (B, K, N): 1 on the most similar `neighbours`, weighted by attention.
    order = similarity.sort(dim=2, descending=True, stable=True).indices[..., :neighbours]
    near = torch.zeros_like(similarity).scatter(2, order, 1.0)
    near = near.masked_fill(similarity.isneginf() | ~patch.gather(1, positions)[..., None], 0)
    return near * tokens.attention.float().masked_fill(~patch, 0)[:, None]
