"""What the ablation trains: ways to train, and the groups in which they are compared."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Way:
    """A way to train: its key, its name in tables, and its options of [`DualSpeedTrainingArguments`]."""

    key: str
    name: str
    options: dict[str, Any] = field(default_factory=dict, hash=False)
    plain: bool = False  # transformers.Trainer on all tokens
    same_time: bool = False  # as many steps as the reference's time allows, not as many as the reference has


BASELINE, REFERENCE = "full-tokens", "dualspeed"
TIMED, ORIGINAL = "time:", ":original"
NO_DISTILLATION = {"distillation_weight": 0.0}
BARE = {"isolator_length": 0, **NO_DISTILLATION}
FULL = Way(BASELINE, "full tokens", plain=True)
# The paper's own ablation: each has one thing more than the one before.
PARTS = (
    Way("pruned-only", "pruned only", {"slow_mode_ratio": 0.0, **BARE}),
    Way("fast-slow", "+ fast-slow", BARE),
    Way("isolator", "+ isolator", NO_DISTILLATION),
    Way(REFERENCE, "+ distillation: DualSpeed"),
)
SLOW_RATIOS = (
    Way("slow-0", "0 % slow steps", {"slow_mode_ratio": 0.0}),
    Way("slow-0.05", "5 % slow steps", {"slow_mode_ratio": 0.05}),
    Way(REFERENCE, "10 % slow steps"),
    Way("slow-0.2", "20 % slow steps", {"slow_mode_ratio": 0.2}),
)
PRUNING_RATIOS = (
    Way("pruning-0.5", "50 % pruned", {"pruning_ratio": 0.5}),
    Way("pruning-0.75", "75 % pruned", {"pruning_ratio": 0.75}),
    Way(REFERENCE, "90 % pruned"),
    Way("pruning-0.95", "95 % pruned", {"pruning_ratio": 0.95}),
)
# Those that need no more of the tower than what it returns.
PRUNERS = (
    Way(REFERENCE, "divprune"),
    *(
        Way(f"pruner-{name}", name, {"pruner": name})
        for name in (
            "random",
            "grid",
            "avg_pool",
            "tome",
            "cdpruner",
            "trim",
            "token_learner",
            "dynamicvit",
            "fastv",
            "pyramiddrop",
        )
    ),
)
# With about half of the reference's slow steps, or, like the adaptive one, with as many as it finds worth their time.
FEWER_SLOW = (
    Way("slow-0.05", "random, 5 %", {"slow_mode_ratio": 0.05}),
    Way("growing-0.05", "growing, 5 % on average", {"slow_mode_ratio": 0.05, "mode_schedule": "growing"}),
    Way("shrinking-0.05", "shrinking, 5 % on average", {"slow_mode_ratio": 0.05, "mode_schedule": "shrinking"}),
    Way("tail-0.05", "the last 5 %", {"slow_mode_ratio": 0.0, "slow_tail_ratio": 0.05}),
    Way("adaptive", "adaptive", {"mode_schedule": "adaptive"}),
)
SCHEDULES = (
    Way(REFERENCE, "random, 10 %"),
    Way("periodic-0.1", "every 10th", {"mode_schedule": "periodic"}),
    Way("growing-0.1", "growing, 10 % on average", {"mode_schedule": "growing"}),
    Way("shrinking-0.1", "shrinking, 10 % on average", {"mode_schedule": "shrinking"}),
    Way("tail-0.1", "the last 10 %", {"slow_mode_ratio": 0.0, "slow_tail_ratio": 0.1}),
    *FEWER_SLOW,
)

EXTREMES = (FULL, PARTS[0], PARTS[-1])
# Those that are trained for the time of the reference as well: the extremes, and those with fewer slow steps, whose
# time goes into more of the fast ones.
IN_TIME = (*EXTREMES, *FEWER_SLOW)


def original(way: Way) -> Way:
    """The same with the positions that the kept tokens had."""
    return Way(way.key + ORIGINAL, f"{way.name}, original", {**way.options, "position_ids": "original"})


def timed(way: Way) -> Way:
    """The same, for the time of the reference."""
    return Way(TIMED + way.key, f"{way.name}, same time", way.options, way.plain, same_time=True)


# What is compared in one table, in the order of training.
GROUPS: dict[str, tuple[Way, ...]] = {
    "parts": (FULL, *PARTS, *map(original, PARTS)),
    "parts in equal time": (*EXTREMES, timed(FULL), timed(PARTS[0])),
    "schedules": (FULL, *SCHEDULES),
    "slow ratios": (FULL, *SLOW_RATIOS, *map(original, SLOW_RATIOS)),
    "pruning ratios": (FULL, *PRUNING_RATIOS),
    "pruners": (FULL, *PRUNERS),
    "equal time": (*IN_TIME, *(timed(way) for way in IN_TIME if way.key != REFERENCE)),
}
