"""Callbacks of the ablation's trainings."""

from __future__ import annotations

import random
import time
from collections.abc import Callable

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_dualspeed.pruners import Pruner


class LearningCurve(TrainerCallback):
    """Measures at even distances while a model trains. That time, `paused` in seconds, is none of the training's.

    `points` are lists of a step, the seconds of training so far by the clock `now()`, and what `measure(model)` gave.
    """

    def __init__(
        self, count: int, measure: Callable[[torch.nn.Module], float], now: Callable[[], float] = time.perf_counter
    ):
        self.count, self.measure, self.now = count, measure, now
        self.points: list[list[float]] = []
        self.started = self.paused = 0.0

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **others) -> None:
        self.started = self.now()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: torch.nn.Module, **others
    ) -> None:
        done, every = state.global_step, state.max_steps / self.count if self.count else 0
        if not every or done // every == (done - 1) // every:
            return
        wait_for_device()
        begun = self.now()
        value = self.measure(model)
        model.train()
        self.points.append([done, round(begun - self.started - self.paused, 3), value])
        self.paused += self.now() - begun


class DrawnBudgets(TrainerCallback):
    """Draws the pruning ratio of each step anew, by seed and step alone. At the end it is what it was.

    Args:
        pruner (`Pruner`): The one of fast steps.
        budgets (`tuple[tuple[float, float], ...]`): Weights and pruning ratios.
        seed (`int`): Of the draws.
    """

    def __init__(self, pruner: Pruner, budgets: tuple[tuple[float, float], ...], seed: int):
        self.pruner, self.budgets, self.seed = pruner, budgets, seed
        self.usual = pruner.pruning_ratio

    def ratio_at(self, step: int) -> float:
        """The pruning ratio of a step, counted from 0."""
        weights, ratios = zip(*self.budgets, strict=True)
        return random.Random(f"budgets:{self.seed}:{step}").choices(ratios, weights)[0]

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **others) -> None:
        self.pruner.reconfigure(pruning_ratio=self.ratio_at(state.global_step))

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **others) -> None:
        self.pruner.reconfigure(pruning_ratio=self.usual)


def wait_for_device() -> None:
    """Waits until a GPU has done all that it was given, so that a clock tells the truth."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
