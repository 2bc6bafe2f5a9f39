"""ToMe: the most similar tokens become one (arXiv 2210.09461)."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .clustering import ClusteringPruner, nearest, on_device, real_tokens, slots
from .grid import pool
from .ops import top_k
from .registry import register_pruner
from .tokens import VisualTokens


@register_pruner("tome")
class ToMePruner(ClusteringPruner):
    """Merges the most similar tokens, by rounds of bipartite soft matching.

    Each round splits the tokens alternately into A and B. Each token of A picks its most similar one of B (cosine), and
    the r most similar pairs are merged into their mean, weighted by the tokens that each one stands for. r is what is
    left to remove, but at most half of the tokens, so 90% takes four rounds. A merged token lies where its token of B
    lies. Inputs: features alone. Cost: one (N/2, N/2) product in the first round, a quarter of that or less in each
    next one.

    The paper merges a few tokens in every layer of the vision tower, by its keys. Here the tower stays as it is and its
    projected tokens are merged behind it: all models have them, and a cluster's mean, unlike keys of single patches,
    says what the merged token is. The official code puts the unmerged tokens of A in front of B for the next round;
    here tokens stay in source order, so alternate ones are neighbours in the image.
    """

    def homes(self, tokens: VisualTokens, lengths: list[int]) -> torch.Tensor:
        batch, count = tokens.features.shape[:2]
        features = tokens.features.detach().float()
        # home (B, N): every real token is its own at first, padding is dropped.
        index = torch.arange(count, device=features.device).expand(batch, -1)
        home, left = torch.where(real_tokens(tokens), index, count), list(tokens.lengths)
        # Each round removes what is left to remove, at most half; tokens follow their home to its new one.
        while left != lengths:
            removed = [min(n - keep, n // 2) for n, keep in zip(left, lengths, strict=True)]
            parent = parents(features, home, on_device(left, tokens), on_device(removed, tokens), max(left))
            home = parent.gather(1, home)
            left = [n - r for n, r in zip(left, removed, strict=True)]
        return home


def parents(
    features: torch.Tensor, home: torch.Tensor, left: torch.Tensor, removed: torch.Tensor, most: int
) -> torch.Tensor:
    """One round: the position that each position's token moves to, its own if it stays, `(B, N + 1)`.

    Args:
        features (`torch.Tensor` of shape `(B, N, D)`): in float32.
        home (`torch.LongTensor` of shape `(B, N)`): where each token is before the round.
        left, removed (`torch.LongTensor` of shape `(B, 1)`): tokens before the round, and removed by it.
        most (`int`): the largest of `left`, M below.
    """
    count = home.shape[1]
    # Unit mean of each current token (B, M, D), and which are real (B, M).
    positions, cluster = slots(home, most)
    units = F.normalize(pool(features, cluster, most), dim=-1)
    there = torch.arange(most, device=home.device) < left
    # Most similar token of B (odd slots) for each of A (even slots), and the rank of that similarity, (B, M/2).
    similarity, match = nearest(units[:, ::2], units[:, 1::2], there[:, 1::2])
    rank = top_k(similarity, there[:, ::2], most).argsort(dim=1)
    # The best `removed` of A move to their match; those that stay write to column N.
    source = torch.where(rank < removed, positions[:, ::2], count)
    target = positions[:, 1::2].gather(1, match)
    parent = torch.arange(count + 1, device=home.device).repeat(len(home), 1).scatter(1, source, target)
    parent[:, count] = count  # restore column N: dropped tokens stay dropped
    return parent
