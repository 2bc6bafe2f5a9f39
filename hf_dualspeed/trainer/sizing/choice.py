"""The largest micro-batch that fits, and the parts of a slow one, from what steps of other sizes hold.

Nothing here runs a step: `held` and `Need` say what one holds, be it measured or read off a line.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from ..schedule import FAST, SLOW

# Of a GPU's memory, of what is free of it or, on paper, of all: the rest goes to CUDA's context, gaps between tensors,
# kernels' workspaces and samples that are longer than those that were measured.
USABLE = 0.9
# The next size that is tried is at most so many times the last one that fits.
GROWTH = 8


def line(first: float, low: float, second: float, high: float, place: float) -> float:
    """The value at `place` on the line through `low` at `first` and `high` at `second`."""
    return low + (high - low) * (place - first) / (second - first)


def largest(held: Callable[[int], int | None], budget: int, most: int) -> int:
    """The largest number from 1 to `most` whose `held` is within the budget; 0 if that of 1 is not.

    The next try lies where the line through the last two sizes meets the budget, so that it takes four tries where
    memory grows along a line.

    Args:
        held (`Callable`): the bytes of a size, which grow with it; None where memory runs out.
    """
    low, high, known, tried, bent = 0, most + 1, {}, 1, False
    while high - low > 1:
        value = held(tried)
        low, high = (tried, high) if value is not None and value <= budget else (low, tried)
        if value is not None:
            known[tried] = value
        # The two known sizes that are nearest to the end of what fits.
        near = sorted(sorted(known, key=lambda size: abs(size - low))[:2])
        bent = high <= most and not bent  # a line has misled: every other try halves what is left
        if bent:
            tried = (low + high) // 2
        elif len(near) == 2 and known[near[1]] > known[near[0]]:
            meets = line(known[near[0]], near[0], known[near[1]], near[1], budget)
            tried = min(math.floor(meets), GROWTH * low)
        else:
            tried = 2 * low
        tried = min(max(tried, low + 1), high - 1)
    return low


class Need(Protocol):
    """The bytes that a step of `rows` samples holds, None where memory runs out.

    A slow step runs in the parts that `splits` asks for.
    """

    def __call__(self, mode: str, rows: int, splits: int | str = 1) -> int | None: ...


@dataclass(frozen=True)
class Limits:
    """What a choice is bound to.

    Args:
        budget (`int`): bytes that a step may hold, weights included.
        most (`int`): samples of a micro-batch, at most.
        share (`int`, *optional*): samples of an optimizer step on this process, which micro-batches must divide.
        splits (`int` or `str`): `slow_mode_splits`, or the least of them.
        modes (`tuple[str, ...]`): "fast" and "slow", as far as the run has such steps.
        whole (`bool`): whether slow batches cannot run in parts.
    """

    budget: int
    most: int
    share: int | None = None
    splits: int | str = 1
    modes: tuple[str, ...] = (FAST, SLOW)
    whole: bool = False

    def allowed(self, rows: int) -> int:
        """The largest micro-batch of at most so many samples."""
        if not self.share:
            return rows
        return max((size for size in range(1, min(rows, self.share) + 1) if self.share % size == 0), default=0)


def choose(need: Need, limits: Limits) -> tuple[int, int | str]:
    """The samples of the largest micro-batch, and `slow_mode_splits` for it: as given, or more where those do not fit.

    0 samples where not even one fits.
    """
    rows, budget = limits.most, limits.budget
    if FAST in limits.modes:
        rows = largest(lambda rows: need(FAST, rows), budget, rows)
    rows = limits.allowed(rows)
    while rows and SLOW in limits.modes:
        splits = splits_for(need, limits, rows)
        if splits is not None:
            return rows, splits
        # Slow steps of one sample at a time hold the encoded images of all samples.
        fits = largest(lambda rows: need(SLOW, rows, limits.splits if limits.whole else rows), budget, rows - 1)
        rows = limits.allowed(fits)
    return rows, limits.splits


def splits_for(need: Need, limits: Limits, rows: int) -> int | str | None:
    """`slow_mode_splits` with which a slow step of so many samples fits; None if it never does."""
    whole = need(SLOW, rows, limits.splits)
    if whole is not None and whole <= limits.budget:
        return limits.splits
    # More parts: fewer samples in each.
    few = 1 if limits.splits == "auto" else min(rows, limits.splits)
    samples = 0
    if not limits.whole:
        samples = largest(lambda size: need(SLOW, rows, math.ceil(rows / size)), limits.budget, rows // few)
    return math.ceil(rows / samples) if samples else None
