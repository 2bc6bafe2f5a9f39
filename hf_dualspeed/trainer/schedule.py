"""Which optimizer steps are fast and which are slow, as a function of the seed and the step."""

from __future__ import annotations

import logging
import random
from dataclasses import dataclass

from ..utils.validation import check_choice, check_fields, check_range
from .training_args import MODE_SCHEDULES

logger = logging.getLogger(__name__)

FAST, SLOW = "fast", "slow"
# The modes of so many future steps are looked up; of more, an even sample stands for all.
PLANNED = 20_000
CHANGING = ("growing", "shrinking")


@dataclass(frozen=True)
class ModeSchedule:
    """`mode_at(step)` gives the same answer on every rank, for every micro-batch and after resuming.

    Args:
        ratio (`float`): fraction of slow steps.
        kind (`str`): "random": each step is slow with probability `ratio`; "growing" and "shrinking": with a
            probability that changes evenly from 0 to twice `ratio`, or back; "periodic": the last of every `round(1 /
            ratio)` steps is slow; "adaptive": as "random", until an [`AdaptiveSchedule`] changes the ratio.
        seed (`int`): of the random schedule.
        warmup_steps (`int`): number of slow steps at the start.
        tail_ratio (`float`): the last fraction of `total_steps` that is slow.
        total_steps (`int`, *optional*): optimizer steps of the whole run; needed for a tail and for ratios that change.
    """

    ratio: float = 0.05
    kind: str = "random"
    seed: int = 0
    warmup_steps: int = 0
    tail_ratio: float = 0.0
    total_steps: int | None = None

    def __post_init__(self):
        check_fields(self)
        check_range("warmup_steps", self.warmup_steps, 0, off="Use 0 for no slow warm-up.")
        if self.total_steps is not None:
            check_range("total_steps", self.total_steps, 0)
        check_range("ratio", self.ratio, 0, 1, off="Use 0.0 for fast steps only.")
        check_choice("kind", self.kind, MODE_SCHEDULES)
        check_range("tail_ratio", self.tail_ratio, 0, 1, off="Use 0.0 for no slow tail.")
        if self.tail_ratio and not self.total_steps:
            raise ValueError("`tail_ratio` needs `total_steps`, got None. Set total_steps or tail_ratio=0.0.")
        if self.kind in CHANGING and not self.total_steps:
            raise ValueError(f"`kind` {self.kind!r} needs `total_steps`, got None. Set total_steps or kind='random'.")
        if self.kind in CHANGING and self.ratio > 0.5:
            logger.warning(
                "A %s schedule of ratio %s goes to twice that, more than 1, and is cut off there: fewer steps are "
                "slow. Use 0.5 or less, or 'random'.",
                self.kind,
                self.ratio,
            )
        if self.kind == "periodic" and self.ratio and abs(1 / self.period - self.ratio) > 0.1 * self.ratio:
            logger.warning(
                "A periodic schedule of ratio %s is slow every %d step(s), a ratio of %.2f. Use 1/N, or 'random'.",
                self.ratio,
                self.period,
                1 / self.period,
            )

    @property
    def period(self) -> int:
        """Steps from one slow step of the periodic schedule to the next; 0 if there are none."""
        return round(1 / self.ratio) if self.ratio else 0

    def ratio_at(self, step: int) -> float:
        """The probability that step `step` is slow, for the random kinds."""
        if self.kind not in CHANGING:
            return self.ratio
        done = (step + 0.5) / self.total_steps
        return min(1.0, 2 * self.ratio * (done if self.kind == "growing" else 1 - done))

    def is_fixed(self, step: int) -> bool:
        """Whether the step is always slow: in the warm-up, or in the tail."""
        tail = self.tail_ratio and step >= self.total_steps - round(self.tail_ratio * self.total_steps)
        return step < self.warmup_steps or bool(tail)

    def mode_at(self, step: int) -> str:
        """ "fast" or "slow" for optimizer step `step`, counted from 0."""
        if self.is_fixed(step):
            return SLOW
        if self.kind == "periodic":
            return SLOW if self.period and step % self.period == self.period - 1 else FAST
        # One generator per step, seeded by a string: Python guarantees that seeding and `random()` stay stable.
        return SLOW if random.Random(f"{self.seed}:{step}").random() < self.ratio_at(step) else FAST


class StepsLeft:
    """How many fast and slow steps are still to come, counted once for each schedule and then down."""

    def __init__(self):
        self._of: tuple[ModeSchedule | None, int, float] = (None, 0, 0.0)

    def __call__(self, schedule: ModeSchedule, step: int, last: int) -> dict[str, int]:
        """The steps of each mode from `step` on, before the step `last`."""
        known, since, slow = self._of
        if known is not schedule or step < since:
            every = max(1, -(-(last - step) // PLANNED))
            found = [schedule.mode_at(s) == SLOW for s in range(step, last, every)]
            slow = sum(found) * (last - step) / max(1, len(found))
        else:
            slow -= sum(schedule.mode_at(s) == SLOW for s in range(since, min(step, last)))
        self._of = (schedule, step, slow)
        slow = min(max(0, round(slow)), max(0, last - step))
        return {FAST: max(0, last - step) - slow, SLOW: slow}
