"""What merging pruners share: which token each one ends in, and averages over those that end in the same.

A `home` `(B, N)` gives for each token the source position of the token that it ends in: its own where it is kept, N
where it is dropped.
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
    """A pruner each of whose tokens is the mean of those that end in it; it implements [`homes`].

    Attributes:
        drops (`bool`): whether some tokens end in none; they count for the kept one that is most similar to them.
    """

    merges: ClassVar[bool] = True
    drops: ClassVar[bool] = False

    def homes(self, tokens: VisualTokens, lengths: list[int]) -> torch.Tensor:
        """The `home` of every token, `(B, N)`, with `lengths[b]` kept ones in row b. No gradients here."""
        raise NotImplementedError(f"{type(self).__name__} must implement `homes`.")

    def reduce(self, tokens: VisualTokens, lengths: list[int]) -> PrunedTokens:
        with torch.no_grad(), torch.autocast(tokens.features.device.type, enabled=False):
            home = self.homes(tokens, lengths)
        return averaged(tokens, home, lengths, self.drops)


def averaged(tokens: VisualTokens, home: torch.Tensor, lengths: list[int], drops: bool) -> PrunedTokens:
    """The mean of the tokens that share a home, at its position; each token weighs the same."""
    most = max(lengths)
    positions, cluster = slots(home, most)
    valid, owner = kept_mask(lengths, home.device), cluster
    if drops:
        dropped = real_tokens(tokens) & (cluster == most)
        owner = torch.where(dropped, nearest_kept(tokens, positions, valid), cluster)

    def merge(features: torch.Tensor) -> torch.Tensor:
        # Means are taken in float32: a bfloat16 sum over a large cluster loses the small terms.
        return pool(features.float(), cluster, most).to(features.dtype)

    return PrunedTokens(merge(tokens.features), positions, valid, lengths, merge, counts(owner, most))


def slots(home: torch.Tensor, most: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Positions of the kept tokens, ascending, `(B, most)`, and the slot among them where each token ends, `(B, N)`.

    What is dropped ends in the slot one past the last.
    """
    count = home.shape[1]
    kept = home == torch.arange(count, device=home.device)
    slot = F.pad(kept.cumsum(1) - 1, (0, 1), value=most).gather(1, home)
    return first(kept, most), slot


def first(mask: torch.Tensor, most: int) -> torch.Tensor:
    """Positions where `mask` `(B, N)` is True, ascending, then the others: the first `most`, `(B, most)`."""
    return (~mask).byte().sort(dim=1, stable=True).indices[:, :most]


def real_tokens(tokens: VisualTokens) -> torch.Tensor:
    """`(B, N)`, False on padding."""
    if tokens.valid is not None:
        return tokens.valid
    return torch.ones(tokens.features.shape[:2], dtype=torch.bool, device=tokens.features.device)


def patches(tokens: VisualTokens) -> torch.Tensor:
    """`(B, N)`, True on tokens that a patch made: those with attention and a key. Newline rows have neither."""
    return real_tokens(tokens) & ~tokens.attention.isneginf() & (tokens.keys != 0).any(-1)


def on_device(counts: list[int], tokens: VisualTokens) -> torch.Tensor:
    """Counts per image as a column `(B, 1)`, without a host synchronisation."""
    return torch.tensor(counts).to(tokens.features.device, non_blocking=True)[:, None]


def nearest(
    queries: torch.Tensor, targets: torch.Tensor, valid: torch.Tensor, chunk: int = 1024
) -> tuple[torch.Tensor, torch.Tensor]:
    """Similarity of each query `(B, Q, D)` to its most similar valid target `(B, T, D)`, and which, both `(B, Q)`."""
    parts = [
        (part @ targets.mT).masked_fill(~valid[:, None], float("-inf")).max(dim=-1) for part in queries.split(chunk, 1)
    ]
    return torch.cat([part.values for part in parts], 1), torch.cat([part.indices for part in parts], 1)
