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
    budgets: tuple[tuple[float, float], ...] = ()  # shares of the fast steps, and their pruning ratios


@dataclass(frozen=True)
class Setup:
    """What the groups of one results file have in common, where it is not as in the first groups.

    Args:
        world (`str`): What the images show.
        size (`dict`): Fields of [`Size`] that differ.
        batch_size, learning_rate: Of the settings; None leaves them.
        decay (`float`): The last share of the steps, in which the learning rate falls evenly from its peak to zero; 0
            for a cosine.
        curve (`int`): Points of a learning curve of accuracy with all tokens.
        bf16 (`bool`): Whether matrix products are in bfloat16, which new processors multiply several times as fast.
    """

    world: str = "grids"
    size: dict[str, int] = field(default_factory=dict, hash=False)
    batch_size: int | None = None
    learning_rate: float | None = None
    decay: float = 0.0
    curve: int = 0
    bf16: bool = False


CURVE_QUESTIONS = 240  # that a point of a learning curve asks
FORMAT = 2  # of result files; in format 1, all variants discarded the pruned tokens
BASELINE, REFERENCE = "full-tokens", "dualspeed"
TIMED, ORIGINAL, PAPER = "time:", ":original", "paper:"
# The fast view. MERGED: the other tokens are averaged into the kept ones, which count for as many in attention.
# DISCARDED, as in the paper: kept tokens stay as they are, the others are dropped.
# Kept tokens are renumbered.
MERGED = {"proportional_attention": True, "position_ids": "compact"}
DISCARDED = {**MERGED, "proportional_attention": False, "pruner_kwargs": {"dropped_tokens": "discard"}}
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


def at_ratios(*ratios: float) -> tuple[Variant, ...]:
    """The paper's view and ours at pruning ratios."""
    kinds = ((PAPER, "the paper's: ", PAPERS[-1].options), ("", "merged: ", DUALSPEED.options))
    return tuple(
        Variant(f"{kind}pruning-{ratio}", f"{name}{ratio:.0%} pruned", {**options, "pruning_ratio": ratio})
        for kind, name, options in kinds
        for ratio in ratios
    )


PRUNING_RATIOS = at_ratios(0.5, 0.75, 0.9, 0.95)
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


# With all that is today's default: kept tokens stay in their places.
TODAYS = original(DUALSPEED)
# A deeper model of many tokens: images of 336 pixels are 576 tokens.
DEEP = {"hidden_size": 128, "layers": 12, "heads": 2, "test_grids": 300}
DEEPER, OBJECTS = Setup("grids-336", DEEP, curve=10, bf16=True), Setup("objects", DEEP, bf16=True)

# When slow steps come, at a learning rate that is still high.
COOL_DOWN = tuple(
    Variant(f"{kind}{key}", f"{name}{words}", {**options, **chosen})
    for kind, name, options in ((PAPER, "the paper's: ", PAPERS_10), ("", "merged: ", DUALSPEED.options))
    for key, words, chosen in (
        ("slow-0.0", "no slow", slow(0.0)),
        ("slow-0.02", "2 % spread", slow(0.02)),
        ("slow-0.05", "5 % spread", slow(0.05)),
        ("tail-0.05", "5 %, half of the decay", {**slow(0.0), "slow_tail_ratio": 0.05}),
        ("tail-0.1", "10 %, all of the decay", {**slow(0.0), "slow_tail_ratio": 0.1}),
    )
)
# 5 % of the steps whole, 10 % at half, 85 % at 7 % of the tokens: 16 % on average. The others cost as much.
DRAWN = ((0.10, 0.5), (0.85, 0.93))
BUDGETS = tuple(
    variant
    for kind, name, options in ((PAPER, "the paper's: ", PAPERS_5), ("", "merged: ", DUALSPEED.options))
    for variant in (
        Variant(f"{kind}fixed-budget", f"{name}5 % whole, others at 11.5 %", {**options, "pruning_ratio": 0.885}),
        Variant(f"{kind}budgets", f"{name}5 % whole, 10 % at half, 85 % at 7 %", options, budgets=DRAWN),
        Variant(f"{kind}fixed-0.9", f"{name}5 % whole, others at 10 %", {**options, "pruning_ratio": 0.9}),
    )
)
# Pruners that show all tokens to the first layers.
FIRST_LAYERS = (
    Variant(TODAYS.key, "divprune", TODAYS.options),
    *(
        Variant(
            f"fastv-{layer}{ORIGINAL}",
            f"fastv, k = {layer}",
            {**TODAYS.options, "pruner": "fastv", "pruner_kwargs": {"layer": layer}},
        )
        for layer in (1, 2)
    ),
    Variant(f"pruner-pyramiddrop{ORIGINAL}", "pyramiddrop", {**TODAYS.options, "pruner": "pyramiddrop"}),
)
# What the choice of tokens is worth once the others are merged into them, and rounds of k-means after it.
CHOICES, KMEANS_ROUNDS = ("random", "grid", "divprune", "tome"), (1, 2)
SELECTION = tuple(
    variant
    for ratio in (0.9, 0.97)
    for name in CHOICES
    for variant in (
        Variant(
            f"{name}-{ratio}", f"{name}, {ratio:.0%}", {**DUALSPEED.options, "pruner": name, "pruning_ratio": ratio}
        ),
        *(
            Variant(
                f"{name}-{ratio}:kmeans-{rounds}",
                f"{name}, {ratio:.0%}, k-means {rounds}x",
                {
                    **DUALSPEED.options,
                    "pruner": "kmeans",
                    "pruning_ratio": ratio,
                    "pruner_kwargs": {"start": name, "rounds": rounds},
                },
            )
            for rounds in KMEANS_ROUNDS
        ),
    )
)
READ = at_ratios(0.5, 0.75, 0.9)[3:]
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
    "deeper": (FULL, MERGED_ONLY, PAPERS[-1], DUALSPEED, timed(FULL), timed(MERGED_ONLY), timed(PAPERS[-1])),
    "deeper-positions": (FULL, DUALSPEED, TODAYS),
    "reading": (FULL, at_ratios(0.9)[0], *READ, *map(original, READ)),
    "objects": (FULL, DUALSPEED, TODAYS, original(at_ratios(0.75)[1]), timed(FULL)),
    "objects-shallow": (FULL, DUALSPEED, TODAYS, timed(FULL)),
    "cool-down": (FULL, *COOL_DOWN),
    "budgets": (FULL, *BUDGETS),
    "first-layers": (FULL, *FIRST_LAYERS),
    "selection": (FULL, *SELECTION),
    "large": (FULL, TODAYS, PAPERS[-1], timed(FULL)),
}
# For one GPU: a language model of 71 M parameters.
LARGE = {
    "hidden_size": 768,
    "layers": 12,
    "heads": 12,
    "pretraining_steps": 600,
    "start_steps": 300,
    "train_grids": 8000,
    "test_grids": 400,
}
# Groups that differ in more than variants from the first ones. Those of one results file have one setup.
PLAIN_SETUP = Setup()
SETUPS = {
    "deeper": DEEPER,
    "deeper-positions": DEEPER,
    "reading": Setup("reading", {"heads": 2, "test_grids": 300}, bf16=True),
    "objects": OBJECTS,
    "objects-shallow": Setup("objects", {"heads": 2, "test_grids": 300}, bf16=True),
    "cool-down": Setup(decay=0.1),
    "first-layers": OBJECTS,
    "large": Setup("letters", LARGE, batch_size=64, learning_rate=4e-4, curve=10, bf16=True),
}


def setup_of(group: str) -> Setup:
    return SETUPS.get(group, PLAIN_SETUP)
