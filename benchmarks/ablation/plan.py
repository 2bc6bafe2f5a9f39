"""The ablation's variants, and the groups in which they are compared.

Each variant sets all options that it depends on, so results keep their meaning when defaults change.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Variant:
    """A way to train: its key, its name in tables, and its options of [`DualSpeedTrainingArguments`]."""

    key: str
    name: str
    options: dict[str, Any] = field(default_factory=dict, hash=False)
    plain: bool = False  # transformers.Trainer on all tokens
    same_time: bool = False  # trains for the reference's time, not for its steps
    speed_up: float = 1.0  # divides the number of steps


FORMAT = 2  # of result files; in format 1, all variants discarded the pruned tokens
BASELINE, REFERENCE = "full-tokens", "dualspeed"
TIMED, ORIGINAL, PAPER = "time:", ":original", "paper:"
# The fast view. MERGED: the other tokens are averaged into the kept ones, which count for as many in attention.
# DISCARDED, as in the paper: kept tokens stay as they are, the others are dropped.
MERGED = {"proportional_attention": True}
DISCARDED = {"proportional_attention": False, "pruner_kwargs": {"dropped_tokens": "discard"}}
# The parts beside the fast view.
NONE = {"slow_mode_ratio": 0.0, "isolator_length": 0, "distillation_weight": 0.0}
ISOLATED, DISTILLED = {"isolator_length": 4}, {"distillation_weight": 1.0}
ALL = {**ISOLATED, **DISTILLED}


def slow(ratio: float) -> dict[str, float]:
    return {"slow_mode_ratio": ratio}


FULL = Variant(BASELINE, "full tokens", plain=True)
DUALSPEED = Variant(REFERENCE, "DualSpeed", {**MERGED, **NONE, **ALL, **slow(0.05)})
# The paper's own ablation: each variant adds one part.
PAPERS = (
    Variant("paper:pruned-only", "the paper's: pruned only", {**DISCARDED, **NONE}),
    Variant("paper:fast-slow", "the paper's: + 10 % slow", {**DISCARDED, **NONE, **slow(0.1)}),
    Variant("paper:isolator", "the paper's: + isolator", {**DISCARDED, **NONE, **slow(0.1), **ISOLATED}),
    Variant("paper:dualspeed", "the paper's: + distillation", {**DISCARDED, **NONE, **slow(0.1), **ALL}),
)
# The same parts with merged tokens and proportional attention.
MERGED_ONLY = Variant("pruned-only", "merged, log(size)", {**MERGED, **NONE})
PARTS = (
    Variant("sizes-only", "log(size), others gone", {**DISCARDED, **MERGED, **NONE}),
    Variant("merged-only", "merged, no log(size)", {"proportional_attention": False, **NONE}),
    MERGED_ONLY,
    Variant("fast-slow", "+ 5 % slow", {**MERGED, **NONE, **slow(0.05)}),
    Variant("isolator", "+ isolator", {**MERGED, **NONE, **slow(0.05), **ISOLATED}),
    DUALSPEED,
)
SLOW_RATIOS = (
    *(
        Variant(f"{PAPER}slow-{ratio}", f"the paper's: {ratio:.0%} slow", {**DISCARDED, **NONE, **ALL, **slow(ratio)})
        for ratio in (0.0, 0.02, 0.05)
    ),
    PAPERS[-1],
    *(
        Variant(f"slow-{ratio}", f"merged: {ratio:.0%} slow", {**MERGED, **NONE, **ALL, **slow(ratio)})
        for ratio in (0.0, 0.02, 0.05, 0.1)
    ),
)
RATIOS = (0.5, 0.75, 0.9, 0.95)
PRUNING_RATIOS = tuple(
    Variant(f"{kind}pruning-{ratio}", f"{name}{ratio:.0%} pruned", {**options, "pruning_ratio": ratio})
    for kind, name, options in ((PAPER, "the paper's: ", PAPERS[-1].options), ("", "merged: ", DUALSPEED.options))
    for ratio in RATIOS
)
# Pruners that read only the tower's output: the stored features have nothing else.
OTHERS = (
    "random",
    "grid",
    "cdpruner",
    "dynamicvit",
    "avg_pool",
    "tome",
    "trim",
    "token_learner",
    "fastv",
    "pyramiddrop",
)
PRUNERS = (
    PAPERS[-1],
    Variant(REFERENCE, "divprune", DUALSPEED.options),
    *(Variant(f"pruner-{name}", name, {**DUALSPEED.options, "pruner": name}) for name in OTHERS),
)

# Schedules of slow steps, in the paper's view: only there do slow steps have much to repair.
PAPERS_10 = PAPERS[-1].options
PAPERS_5, TAIL = {**PAPERS_10, **slow(0.05)}, {**PAPERS_10, **slow(0.0)}
SCHEDULES = (
    Variant(f"{PAPER}dualspeed", "random, 10 %", PAPERS_10),
    Variant(f"{PAPER}periodic-0.1", "every 10th", {**PAPERS_10, "mode_schedule": "periodic"}),
    Variant(f"{PAPER}growing-0.1", "growing, 10 % on average", {**PAPERS_10, "mode_schedule": "growing"}),
    Variant(f"{PAPER}shrinking-0.1", "shrinking, 10 % on average", {**PAPERS_10, "mode_schedule": "shrinking"}),
    Variant(f"{PAPER}tail-0.1", "the last 10 %", {**TAIL, "slow_tail_ratio": 0.1}),
    Variant(f"{PAPER}slow-0.05", "random, 5 %", PAPERS_5),
    Variant(f"{PAPER}growing-0.05", "growing, 5 % on average", {**PAPERS_5, "mode_schedule": "growing"}),
    Variant(f"{PAPER}shrinking-0.05", "shrinking, 5 % on average", {**PAPERS_5, "mode_schedule": "shrinking"}),
    Variant(f"{PAPER}tail-0.05", "the last 5 %", {**TAIL, "slow_tail_ratio": 0.05}),
    Variant(f"{PAPER}adaptive", "adaptive", {**PAPERS_10, "mode_schedule": "adaptive"}),
)


def original(variant: Variant) -> Variant:
    """The same variant with original positions."""
    return Variant(variant.key + ORIGINAL, f"{variant.name}, original", {**variant.options, "position_ids": "original"})


def timed(variant: Variant) -> Variant:
    """The same variant, trained for the reference's time."""
    return Variant(TIMED + variant.key, f"{variant.name}, same time", variant.options, variant.plain, same_time=True)


def of_seven_billion(speed_up: float) -> Variant:
    """Full tokens, trained for DualSpeed's time at the given speed-up, measured at 7 B parameters."""
    return Variant(f"7b:{speed_up}", f"full tokens, same time at {speed_up}x", plain=True, speed_up=speed_up)


# The speed-ups of the paper's DualSpeed measured at 7 B parameters, LLaVA-1.5 and LLaVA-NeXT.
MEASURED = (2.83, 3.81)
# One table each, in the order of training.
GROUPS: dict[str, tuple[Variant, ...]] = {
    "parts": (FULL, *PAPERS, *PARTS),
    "slow ratios": (FULL, *SLOW_RATIOS),
    "equal time": (
        FULL,
        PAPERS[-1],
        MERGED_ONLY,
        DUALSPEED,
        timed(FULL),
        timed(PAPERS[-1]),
        timed(MERGED_ONLY),
        *map(of_seven_billion, MEASURED),
    ),
    "positions": (FULL, *(variant for own in (MERGED_ONLY, DUALSPEED) for variant in (own, original(own)))),
    "schedules": (FULL, *SCHEDULES),
    "pruning ratios": (FULL, *PRUNING_RATIOS),
    "pruners": (FULL, *PRUNERS),
}
