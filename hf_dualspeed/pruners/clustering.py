"""Shared parts of merging pruners: the token that each one is merged into, and the averages.

Shapes: B images, N visual tokens, K kept tokens, D hidden. A `home` `(B, N)` gives the source position of the token
that each one is merged into: its own if it is kept, N if it is dropped.
"""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F

from .base import Pruner
from .grid import pool
from .ops import counts, kept_mask, nearest_kept
from .tokens import PrunedTokens, VisualTokens


class ClusteringPruner(Pruner):
    """A pruner that replaces each kept token by the mean of those merged into it; subclasses implement [`homes`].

    Attributes:
        drops (`bool`): whether some tokens are dropped; each counts for its most similar kept token.
    """

    merges: ClassVar[bool] = True
    drops: ClassVar[bool] = False

    def homes(self, tokens: VisualTokens, lengths: list[int]) -> torch.Tensor:
        """The `home` of every token, `(B, N)`, with `lengths[b]` kept ones in row b. Runs without gradients."""
        raise NotImplementedError(f"{type(self).__name__} must implement `homes`.")

    def reduce(self, tokens: VisualTokens, lengths: list[int]) -> PrunedTokens:
        with torch.no_grad(), torch.autocast(tokens.features.device.type, enabled=False):
            home = self.homes(tokens, lengths)
        return averaged(tokens, home, lengths, self.drops)


def averaged(tokens: VisualTokens, home: torch.Tensor, lengths: list[int], drops: bool) -> PrunedTokens:
    """The mean of the tokens that share a `home`, at its position; each token weighs the same."""
    most = max(lengths)
    # Kept positions (B, K) and the slot of each token (B, N), K if it is dropped.
    positions, cluster = slots(home, most)
    valid, owner = kept_mask(lengths, home.device), cluster
    # Dropped tokens count for the nearest kept one, but stay out of the means.
    if drops:
        dropped = real_tokens(tokens) & (cluster == most)
        owner = torch.where(dropped, nearest_kept(tokens, positions, valid), cluster)

    def merge(features: torch.Tensor) -> torch.Tensor:
        # Average (B, N, D') to (B, K, D') in float32: a bfloat16 sum over a large cluster loses the small terms.
        return pool(features.float(), cluster, most).to(features.dtype)

    return PrunedTokens(merge(tokens.features), positions, valid, lengths, merge, counts(owner, most))


def slots(home: torch.Tensor, most: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Positions of the kept tokens, ascending, `(B, most)`, and the slot that each token goes to, `(B, N)`.

    Dropped tokens go to slot `most`, one past the last.
    """
    # Kept tokens are their own home, (B, N).
    count = home.shape[1]
    kept = home == torch.arange(count, device=home.device)
    # Number the kept tokens and look up each token's home, (B, N); column N stands for dropped ones.
    slot = F.pad(kept.cumsum(1) - 1, (0, 1), value=most).gather(1, home)
    return first(kept, most), slot


def first(mask: torch.Tensor, most: int) -> torch.Tensor:
    """The first `most` positions, `(B, most)`: those where `mask` `(B, N)` is True, ascending, then the others."""
    return (~mask).byte().sort(dim=1, stable=True).indices[:, :most]


def real_tokens(tokens: VisualTokens) -> torch.Tensor:
    """`(B, N)`, False on padding."""
    if tokens.valid is not None:
        return tokens.valid
    return torch.ones(tokens.features.shape[:2], dtype=torch.bool, device=tokens.features.device)


def patches(tokens: VisualTokens) -> torch.Tensor:
    """`(B, N)`, True on tokens that come from a patch. Others, such as newlines, have attention -inf and key 0."""
    return real_tokens(tokens) & ~tokens.attention.isneginf() & (tokens.keys != 0).any(-1)


def on_device(counts: list[int], tokens: VisualTokens) -> torch.Tensor:
    """Counts per image as a column `(B, 1)`, without a host synchronisation."""
    return torch.tensor(counts).to(tokens.features.device, non_blocking=True)[:, None]


def nearest(
    queries: torch.Tensor, targets: torch.Tensor, valid: torch.Tensor, chunk: int = 1024
) -> tuple[torch.Tensor, torch.Tensor]:
    """Similarity of each query `(B, Q, D)` to its most similar valid target `(B, T, D)`, and the target's index.

    Both are `(B, Q)`; `valid` is `(B, T)`.
    """
    # Similarities in chunks of queries, (B, q, T), and their maximum over targets.
    parts = [
        (part @ targets.mT).masked_fill(~valid[:, None], float("-inf")).max(dim=-1) for part in queries.split(chunk, 1)
    ]
    return torch.cat([part.values for part in parts], 1), torch.cat([part.indices for part in parts], 1)
