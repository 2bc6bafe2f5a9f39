"""`dualspeed bench --model`: the largest fast micro-batch that fits, and `slow_mode_splits` for it.

It is what training chooses for `per_device_train_batch_size="auto"`, on copies of one sample.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ..trainer.schedule import FAST, SLOW
from ..trainer.sizing.choice import Limits, choose
from ..trainer.sizing.probe import budget_of, probing
from ..utils.text import in_bytes

if TYPE_CHECKING:
    from .measure import Bench

MOST = 1024  # samples; larger batches are not looked for


def largest_batch(bench: Bench) -> dict | None:
    """The samples that fit, `slow_mode_splits` for them, and what each step holds then; None if no memory is named.

    Args:
        bench (`Bench`): of a model and one of its samples.
    """
    trainer, sample = bench.dual, bench.subject.sample
    budget = None if sample is None else budget_of(trainer)
    if budget is None:
        return None

    def repeated(samples: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        return {key: torch.cat([one[key] for one in samples]) for key in sample}

    with probing(trainer, ({FAST: sample, SLOW: sample}, repeated)) as probe:
        limits = Limits(budget, MOST, splits=bench.splits, whole=probe.whole)
        rows, splits = choose(probe.held, limits)
        found = {"budget_bytes": budget, "micro_batch": rows, "slow_mode_splits": splits, "tokens": probe.length}
        held = {mode: probe.held(mode, rows, splits) for mode in (FAST, SLOW)} if rows else {}
        return {**found, **{f"{mode}_bytes": value for mode, value in held.items()}}


def size_lines(results: dict) -> list[str]:
    """A line for each run that looked for the largest batch."""
    return [size_line(run) for run in results["runs"] if run.get("largest_batch")]


def size_line(run: dict) -> str:
    """The largest batch of a run in words."""
    found, said = run["largest_batch"], f"{run['shape']}, checkpointing {run['checkpointing']}"
    budget = f"{in_bytes(found['budget_bytes'])} of weights, gradients, AdamW's moments and activations"
    if not found["micro_batch"]:
        return f"{said}: not even one sample of {found['tokens']:,} tokens fits into {budget}."
    held = ", ".join(f"{mode} step {in_bytes(found[f'{mode}_bytes'])}" for mode in (FAST, SLOW))
    return (
        f"{said}: the largest fast micro-batch within {budget} has {found['micro_batch']:,} samples of "
        f"{found['tokens']:,} tokens, with slow_mode_splits={found['slow_mode_splits']} ({held})."
    )
