"""VisPruner: what the vision tower attends to, and what is left without duplicates (arXiv 2412.01818)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from ..utils.validation import check_range
from .base import Pruner
from .clustering import nearest
from .config import PrunerConfig
from .ops import take, top_k
from .registry import register_pruner
from .tokens import PrunedTokens, VisualTokens, gather_rows

# The official code drops 8 of 576 tokens a round. Larger images drop the same fraction, which keeps the rounds few.
FEWEST_DROPPED, MOST_ROUNDS = 8, 72


@dataclass
class VisPrunerConfig(PrunerConfig):
    """Settings of VisPruner.

    Args:
        important_share (`float`): fraction of the kept tokens chosen by attention, in [0, 1].
    """

    important_share: float = 0.5

    def __post_init__(self):
        super().__post_init__()
        check_range("important_share", self.important_share, 0, 1, off="0.5 is the paper's.")


@register_pruner("vispruner")
class VisPruner(Pruner):
    """Keeps the tokens that the vision tower attends to most, and of the others those that are no duplicates.

    VisPruner, arXiv 2412.01818; its first version was FasterVLM, our `cls_attention`. `important_share` of the budget
    goes to the most attended tokens. The others, most attended first, are thinned in rounds until the budget is met.
    Each round compares the even-numbered tokens with the odd-numbered ones and drops the even ones most similar to an
    odd one. Needs the tower's attention. Cost: at most 72 rounds, together about six (N, N) products, batched over
    images.

    The official code compares tower features; we compare projected ones. It drops 8 tokens per round from each tile of
    576 and fails on an odd number of them. We drop the same fraction of larger images, and odd numbers work.
    """

    config_class = VisPrunerConfig
    needs = frozenset({"attention"})

    def reduce(self, tokens: VisualTokens, lengths: list[int]) -> PrunedTokens:
        with torch.no_grad(), torch.autocast(tokens.features.device.type, enabled=False):
            ranked = self.ranked(tokens, lengths)
        return take(tokens, ranked, lengths, self.config.dropped_tokens)

    def ranked(self, tokens: VisualTokens, lengths: list[int]) -> torch.Tensor:
        """The most attended positions and then the diverse ones, `(B, K)`."""
        count, device = tokens.features.shape[1], tokens.features.device
        important = [int(keep * self.config.important_share) for keep in lengths]
        diverse = [keep - n for keep, n in zip(lengths, important, strict=True)]
        left = [n - i if d else 0 for n, i, d in zip(tokens.lengths, important, diverse, strict=True)]
        # All positions by attention, best first (B, N); the most attended of each image, (B, 1).
        order = top_k(tokens.attention, tokens.valid, count)
        first = torch.tensor(important).to(device, non_blocking=True)[:, None]
        # The others in that order (B, R), thinned.
        slot = torch.arange(count, device=device)
        rest = order.gather(1, (first + slot[: max(left)]).clamp(max=count - 1))
        rest = without_duplicates(tokens.features, rest, schedule(left, diverse, tokens.lengths))
        # The first ranks of `order`, then those of `rest`, (B, K).
        both = torch.cat([order, rest], dim=1)
        slot = slot[: max(lengths)]
        return both.gather(1, torch.where(slot < first, slot, count + slot - first).clamp(max=both.shape[1] - 1))


def schedule(left: list[int], keep: list[int], counts: list[int]) -> list[tuple[list[int], list[int]]]:
    """Per round, the tokens of each image before it and those dropped in it.

    Args:
        left, keep (`list[int]`): tokens of each image to thin, and to keep of them.
        counts (`list[int]`): all tokens of each image, which set the size of a round.
    """
    rounds, most = [], [max(FEWEST_DROPPED, math.ceil(n / MOST_ROUNDS)) for n in counts]
    while True:
        drop = [min(m, n - k, (n + 1) // 2) if k else 0 for m, n, k in zip(most, left, keep, strict=True)]
        if not any(drop):
            return rounds
        rounds.append((left, drop))
        left = [n - d for n, d in zip(left, drop, strict=True)]


def without_duplicates(
    features: torch.Tensor, rest: torch.Tensor, rounds: list[tuple[list[int], list[int]]]
) -> torch.Tensor:
    """Thins the positions `rest` `(B, R)` of `features` `(B, N, D)` in `rounds`; what is left stands first."""
    units = F.normalize(features.detach().float(), dim=-1)
    # All rounds on the device at once: (rounds, 2, B, 1).
    table = torch.tensor(rounds).to(rest.device, non_blocking=True)[..., None]
    for (left, drop), (counts, dropped) in zip(rounds, table, strict=True):
        # Split in two halves, (B, R/2), and mark what lies within each image's count.
        even, odd = rest[:, ::2], rest[:, 1::2]
        index = torch.arange(even.shape[1], device=rest.device)
        real_even, real_odd = 2 * index < counts, 2 * index[: odd.shape[1]] + 1 < counts
        # Even tokens by similarity to their nearest odd one, most similar first, (B, R/2).
        similarity, _ = nearest(gather_rows(units, even), gather_rows(units, odd), real_odd)
        order = similarity.masked_fill(~real_even, float("-inf")).sort(dim=1, descending=True, stable=True).indices
        # Drop the first `dropped` of them, and move what stays to the front.
        stays = torch.cat([(index >= dropped) & real_even, real_odd], dim=1)
        most = max(n - d for n, d in zip(left, drop, strict=True))
        front = stays.int().sort(dim=1, descending=True, stable=True).indices[:, :most]
        rest = torch.cat([even.gather(1, order), odd], dim=1).gather(1, front)
    return rest
