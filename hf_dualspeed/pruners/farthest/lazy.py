"""Farthest-first choice on a CPU, where reading a value costs nothing: only the similarities that decide are computed.

Both parts take shortcuts that bounds prove right. N tokens of D numbers; K are chosen.
"""

from __future__ import annotations

import math

import numpy as np
import torch

from . import batched
from .batched import FARTHEST, units_of

FEWEST = 512  # tokens; for fewer, one product of all pairs is as quick
COLUMNS = 32  # tokens that the candidates for the first choice are compared with at first; twice as many each time
FEW = 8  # candidates that are compared with all tokens at once
SHARE = 32  # of all tokens, one in so many is a candidate for the next choices
DEARER = 1.6  # what a product costs here beside one of all pairs, for smaller blocks and moved rows
ROUNDING = 1e-5  # more than products of other shapes differ by


def farthest_first(features: torch.Tensor, counts: list[int], lengths: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Chosen positions `(B, K)` and the rank of each token's nearest one `(B, N)`, of `features` `(B, N, D)`.

    Args:
        counts, lengths (`list[int]`): tokens of each image, and how many of them to choose.
    """
    ranked = torch.zeros(len(features), max(lengths), dtype=torch.long)
    nearest = torch.zeros(features.shape[:2], dtype=torch.long)
    for row, (count, keep) in enumerate(zip(counts, lengths, strict=True)):
        if keep:
            ranked[row, :keep], nearest[row, :count] = choose(units_of(features[row, :count]), keep)
    return ranked, nearest


def choose(units: torch.Tensor, keep: int) -> list[torch.Tensor]:
    """The `keep` chosen of the units `(N, D)`, and the rank of each token's nearest one `(N,)`.

    Choices come in rounds. All tokens know their similarity to those chosen before the round. It can only grow, so
    whatever is chosen among the least similar ones while it stays below that of all others is chosen rightly. One
    product then compares all tokens with the round's choices.
    """
    count = len(units)
    chosen, picks = [], loneliest(units, keep)
    if picks is None:
        return [found[0] for found in batched.farthest_first(units[None], None, [keep])]
    # Similarity to the nearest chosen token, and that one's rank, (N,).
    similar, rank = units.new_full((count,), FARTHEST), torch.zeros(count, dtype=torch.long)
    while True:
        # Compare all tokens with the picks, (P, N). Infinite similarity to itself keeps a token from another choice.
        rows = compare(units, picks, float("inf"))
        # Of those that are more similar to one of them than to any before, note the first such, (M,).
        closer = (rows.amax(dim=0) > similar).nonzero()[:, 0]
        similar[closer], at = rows[:, closer].max(dim=0)
        rank[closer] = at + len(chosen)
        chosen += picks.tolist()
        if len(chosen) == keep:
            return [torch.tensor(chosen), rank]
        picks = next_picks(units, similar, keep - len(chosen))


def next_picks(units: torch.Tensor, similar: torch.Tensor, most: int) -> torch.Tensor:
    """The next choices, at least one and at most `most`, after those that the tokens are `similar` `(N,)` to."""
    # The least similar tokens, in source order so that of equals the first wins, and the least of the others.
    few = min(max(FEW, len(similar) // SHARE), len(similar) - 1)
    values, candidates = similar.topk(few + 1, largest=False)
    bound = values[-1].item()
    candidates = candidates[:few].sort().values
    # Choose among them: (C, C) similarities, and those to the nearest chosen one, (C,).
    own = units[candidates]
    among, own = (own @ own.mT).fill_diagonal_(float("inf")).numpy(), similar[candidates].numpy()
    picks = []
    while len(picks) < most:
        pick = own.argmin()
        if own[pick] >= bound:
            break
        picks.append(pick)
        np.maximum(own, among[pick], out=own)
    # Where more tokens are equally far than there are candidates, the first of all.
    return candidates[picks] if picks else similar.argmin()[None]


def loneliest(units: torch.Tensor, keep: int) -> torch.Tensor | None:
    """Position `(1,)` of the token of `units` `(N, D)` whose most similar other token is least similar.

    None where finding it and choosing `keep` tokens is expected to cost more than comparing all pairs.

    A similarity to any token is a lower bound of that to the most similar one, and each token's own is an upper bound
    of the least. So candidates are compared with more and more tokens, and those above the bound drop out.
    """
    count = len(units)
    # Tokens in strides over the image, (N,), and the place of each in that order.
    order = torch.arange(-(-count // COLUMNS) * COLUMNS).view(COLUMNS, -1).mT.flatten()
    order = order[order < count]
    place = torch.empty_like(order).scatter_(0, order, torch.arange(count))
    left, nearest, bound = torch.arange(count), units.new_full((count,), FARTHEST), float("inf")
    start, end = 0, COLUMNS
    while len(left) > FEW and start < count:
        # Similarity of the L tokens left to the next n of that order, (L, n), leaving out that to themselves.
        part = (units[left] if start else units) @ units[order[start:end]].mT
        at = place[left] - start
        own = ((at >= 0) & (at < part.shape[1])).nonzero()[:, 0]
        part[own, at[own]] = FARTHEST
        nearest = torch.maximum(nearest, part.amax(dim=1))
        # Compare the most promising ones with all tokens.
        few = left[nearest.topk(min(FEW, len(left)), largest=False).indices]
        bound = min(bound, compare(units, few, FARTHEST).amax(dim=1).min().item() + ROUNDING)
        near = nearest <= bound
        # If as many go on dropping out per token compared with, so many products (in rows of N) are still to come.
        gone = math.log(len(left) / int(near.sum()))
        left, nearest = left[near], nearest[near]
        to_come = len(left) / count * part.shape[1] / max(gone, 1e-9)
        if start and len(left) > FEW and DEARER * (to_come + keep) > count / 2:
            return None
        start, end = end, 2 * end
    # Compare the last ones with all tokens, (L, N), alike in both directions, so that of two neighbours the first wins.
    rows = compare(units, left, FARTHEST)
    rows[:, left] = torch.maximum(rows[:, left], rows[:, left].mT)
    return left[rows.amax(dim=1).argmin()][None]


def compare(units: torch.Tensor, picks: torch.Tensor, own: float) -> torch.Tensor:
    """Similarities of the `picks` `(P,)` to all `units` `(N, D)`, `(P, N)`, with `own` for that to themselves."""
    return (units[picks] @ units.mT).scatter_(1, picks[:, None], own)
