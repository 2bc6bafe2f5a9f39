"""The speed-up over plain steps on all tokens, measured on micro-batches of the training after its end."""

from __future__ import annotations

import logging
import math
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from statistics import median

import numpy as np
import torch
from accelerate.utils import recursively_apply
from torch import nn
from transformers import Trainer

from ..publishing.display import is_silent
from ..utils.devices import on_host, synchronize
from ..utils.progress import Work
from ..utils.text import one_line
from .schedule import FAST, SLOW

logger = logging.getLogger(__name__)

PLAIN = "plain"
# A round has two plain passes, a fast and a slow one over a micro-batch, which take as long as about ten fast steps of
# one micro-batch. With 100 optimizer steps per round, the measurement takes about a tenth of the training.
STEPS_PER_ROUND = 100


class SpeedupMeter:
    """Keeps micro-batches of a training, and times plain, fast and slow passes over them after its end.

    Args:
        rounds (`int`): rounds of timing; 0 measures nothing.
    """

    def __init__(self, rounds: int):
        self.rounds = rounds
        self.batches: list[tuple[dict, float | None]] = []  # with the pruning ratio, where a schedule moved it
        self.reason: str | None = "speedup_rounds=0"  # why nothing is measured

    def observe(
        self,
        inputs: dict,
        step: int,
        total_steps: int,
        micro: int,
        micro_batches: int,
        pruning_ratio: float | None = None,
    ) -> None:
        """Keeps a micro-batch if one is due, without waiting for the device.

        Picks are spread over training, because early batches may be longest, and over the micro-batches of a step, for
        the same reason.

        Args:
            inputs (`dict`): micro-batch `micro` of the `micro_batches` of optimizer step `step`, of `total_steps`.
            pruning_ratio (`float`, *optional*): that of the step, where an adaptive schedule moves it.
        """
        kept, wanted = len(self.batches), self.rounds + 1 if self.rounds else 0
        due = kept < wanted and step >= int((kept + 0.5) * total_steps / wanted)
        if due and micro == kept % micro_batches:
            self.batches.append((recursively_apply(on_host, dict(inputs)), pruning_ratio))

    def measure(self, trainer, steps: int) -> dict | None:
        """Times plain, fast and slow passes, forward and backward, and forgets the micro-batches. Returns None, with a
        log message, if that is impossible or interrupted.

        A plain pass is `transformers.Trainer`'s own: the model's loss on all tokens. Fast and slow passes are those of
        training, also in the pruning ratio that the micro-batch had. Rounds are interleaved, the first one is a
        warm-up, and medians are compared. The speed-up is `plain / ((1 - r) * fast + r * slow)`, where r is the share
        of slow steps in the training. Gradients are dropped, and weights, buffers, random states and counters do not
        change. Each of several processes measures without exchanging gradients, and the means over processes are
        compared. Call it on all of them.

        Args:
            trainer (`DualSpeedMixin`): after training.
            steps (`int`): optimizer steps of this call of `train`.
        """
        batches, self.batches = self.batches, []
        if not self.rounds:
            return None
        self.reason = not_measurable(trainer, batches, steps, self.rounds)
        if self.reason is not None:
            logger.info("Speed-up not measured: %s.", self.reason)
            return None
        modes = [mode for mode in (FAST, SLOW) if trainer.clock.steps[mode]]
        times, passes = None, self.rounds * (len(modes) + 2) + len(modes) + 1
        try:
            told = Work("Measuring the speed-up", passes, is_silent(trainer.args))
            with untouched(trainer), trainer.as_configured(), told as work:
                times = time_rounds(trainer, batches, modes, self.rounds, work)
        # Neither a failure here, such as too little memory for a plain pass, nor Ctrl-C, which ends the measurement
        # alone, must lose a training that is not saved yet.
        except (Exception, KeyboardInterrupt) as error:
            self.reason = f"{type(error).__name__}: {one_line(error)}".removesuffix(": ")
            logger.warning("Speed-up not measured: %s", self.reason)
        medians = [median(times[name]) if times else float("nan") for name in (PLAIN, *modes)]
        means = trainer.accelerator.reduce(torch.tensor(medians, device=trainer.args.device), "mean").tolist()
        if any(math.isnan(mean) for mean in means):  # some process failed
            return None
        seconds = dict(zip((PLAIN, *modes), means, strict=True))
        samples = max(len(batch["input_ids"]) for batch, _ in batches)  # of the largest micro-batch
        return summary(seconds, trainer.clock.steps, self.rounds, samples)


def summary(seconds: dict[str, float], steps: dict[str, int], rounds: int, count: int) -> dict:
    """The record of a measurement, from the seconds of each kind of pass and the steps of the training."""
    share = steps[SLOW] / (steps[FAST] + steps[SLOW])
    trained = (1 - share) * seconds.get(FAST, 0.0) + share * seconds.get(SLOW, 0.0)
    return {
        **{f"{name}_seconds": round(value, 6) for name, value in seconds.items()},
        "slow_share": round(share, 6),
        "speedup": round(seconds[PLAIN] / trained, 4),
        "rounds": rounds,
        "samples": count,
    }


def not_measurable(trainer, batches: list, steps: int, rounds: int) -> str | None:
    """Why the speed-up cannot be measured, or not without changing the trained model; None if it can."""
    if not batches or not sum(trainer.clock.steps.values()):
        return "nothing was trained"
    if steps < STEPS_PER_ROUND * rounds:
        return (
            f"{steps} optimizer steps are too few for speedup_rounds={rounds}, which takes "
            f"{STEPS_PER_ROUND} for each round"
        )
    if trainer.is_sharded or trainer.get_tp_size() > 1:
        return "the model is sharded, so that a plain pass cannot be run beside the training"
    if trainer.model_wrapped is not trainer.model and trainer.is_compiled and trainer.args.world_size > 1:
        return "a compiled model of several processes has no pass without exchanging gradients"
    if any(p._backward_hooks or p._post_accumulate_grad_hooks for p in trainer.model.parameters()):
        return f"hooks on the parameters, such as those of optim={str(trainer.args.optim)!r}, act in backward"
    return None


def time_rounds(
    trainer, batches: list[tuple[dict, float | None]], modes: list[str], rounds: int, work: Work
) -> dict[str, list[float]]:
    """Seconds of each kind of pass by round, without the warm-up round.

    Each round first runs its micro-batch plainly without timing it: the first pass over a shape takes longer, and
    training may have run this one only shortened.
    """
    seconds: dict[str, list[float]] = {name: [] for name in (PLAIN, *modes)}
    # DistributedDataParallel would exchange gradients, so several processes run the model inside it.
    model = trainer.model_wrapped if trainer.args.world_size == 1 else trainer.model
    for number in range(-1, rounds):
        inputs, ratio = batches[number % len(batches)]
        if ratio is not None:
            trainer._pruner.reconfigure(pruning_ratio=ratio)
        # Evenly spread over training, for pruning ratios that change.
        progress = (max(number, 0) + 0.5) / rounds
        passes = {PLAIN: partial(plain_pass, trainer, model, inputs)}
        passes |= {mode: partial(pass_in_mode, trainer, model, inputs, mode, progress) for mode in modes}
        if number >= 0:
            timed(trainer, model, passes[PLAIN])
            work.advance()
        for name in rotated(list(passes), number):
            taken = timed(trainer, model, passes[name])
            work.advance()
            if number >= 0:
                seconds[name].append(taken)
    return seconds


def rotated(names: list[str], number: int) -> list[str]:
    """The names, starting with another one in each round."""
    start = number % len(names)
    return names[start:] + names[:start]


def plain_pass(trainer, model: nn.Module, inputs: dict) -> None:
    """Forward and backward on all tokens, as in `transformers.Trainer`."""
    model.train()
    inputs = trainer._prepare_inputs(dict(inputs))
    with trainer.compute_loss_context_manager():
        loss = Trainer.compute_loss(trainer, model, inputs)
    trainer.accelerator.backward(loss)


def pass_in_mode(trainer, model: nn.Module, inputs: dict, mode: str, progress: float) -> None:
    """Forward and backward in a mode, as in training."""
    inputs = trainer._prepare_inputs(dict(inputs))
    items = (inputs["labels"] != -100).sum()
    trainer.step_in_mode(mode, model, inputs, items, progress=progress)


def timed(trainer, model: nn.Module, run: Callable[[], None]) -> float:
    """Seconds of a pass, whose gradients are dropped."""
    synchronize(trainer.args.device)
    begun = time.perf_counter()
    run()
    synchronize(trainer.args.device)
    taken = time.perf_counter() - begun
    model.zero_grad()
    return taken


@contextmanager
def untouched(trainer) -> Iterator[None]:
    """Restores what passes change: random states, buffers, training mode and the trainer's counters."""
    model, device = trainer.model, trainer.args.device
    modes = {module: module.training for module in model.modules()}
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    python, numpy = random.getstate(), np.random.get_state()
    # Hide the optimizer: a training step calls its `train()`, which swaps the weights of a schedule-free one.
    kept = {name: getattr(trainer, name) for name in ("optimizer", "loss_is_scaled_for_ga")}
    trainer.optimizer, restore_losses = None, trainer.mode_losses.snapshot()
    devices = [] if device.type == "cpu" else [torch.accelerator.current_device_index()]
    try:
        with torch.random.fork_rng(devices, device_type="cuda" if device.type == "cpu" else device.type):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        for name, value in kept.items():
            setattr(trainer, name, value)
        restore_losses()
        model.zero_grad()
        for module, training in modes.items():
            module.training = training
        with torch.no_grad():
            for name, buffer in model.named_buffers():
                buffer.copy_(buffers[name])
