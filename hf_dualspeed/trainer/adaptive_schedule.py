"""`mode_schedule="adaptive"`: the slow ratio follows the difference of full-token and pruned losses.

In each slow step, student and teacher answer the same batch from all tokens and from pruned ones. If the full view is
worse, training on pruned tokens has led the model away from the view that it will be used with, and slow steps bring it
back. If it is better, as more tokens should be, fewer slow steps are needed. arXiv 2602.03815 leaves this open.
"""

from __future__ import annotations

import math
import random
from bisect import bisect_right
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from ..pruners import Pruner
from ..utils.devices import on_host
from .callbacks import ModeLosses
from .schedule import FAST, SLOW, ModeSchedule
from .training_args import DualSpeedArguments

# The gap is `full / pruned - 1`. Each slow step multiplies the ratio by exp(GAIN * (gap + its trend)), limited to
# [exp(-MOST), exp(MOST)]. A gap of 10 % multiplies it by 1.5, and so does a gap that grows by 10 %.
GAIN, MOST = 4.0, 0.5
SMOOTHING = 0.5  # weight of the newest gap in the moving average, because batches differ
# Options that it is made of, beside the ratio.
BOUNDS = ("min_slow_mode_ratio", "max_slow_mode_ratio", "min_pruning_ratio")
ADAPTIVE = ("mode_schedule", *BOUNDS)


class AdaptiveSchedule(TrainerCallback, ExportableState):
    """The slow ratio of the past and of now, saved in the checkpoint and the same on every rank.

    A measurement is read one slow step later, so no step waits for the device.

    Args:
        losses ([`ModeLosses`]): holds the sums of `slow_loss` and `pruned_loss`.
        reduced (`Callable`): maps a tensor to its mean over all ranks.
        start (`float`): the initial ratio.
        bounds (`tuple[float, float]`): of the ratio.
        pruner (`Pruner`, *optional*): whose pruning ratio changes as well.
        min_pruning_ratio (`float`, *optional*): its minimum; the maximum is its configured value.
    """

    def __init__(
        self,
        losses: ModeLosses,
        reduced: Callable[[torch.Tensor], torch.Tensor],
        start: float,
        bounds: tuple[float, float],
        pruner: Pruner | None = None,
        min_pruning_ratio: float | None = None,
    ):
        self.losses, self.reduced, self.bounds = losses, reduced, bounds
        self.start, self.pruner, self.min_pruning_ratio = float(start), pruner, min_pruning_ratio
        self.max_pruning_ratio = None if pruner is None else pruner.config.pruning_ratio
        self._restore({})

    def _restore(self, values: dict) -> None:
        # `ratios[i]` holds from `steps[i]` on.
        self.steps, self.ratios = list(values.get("steps", [0])), list(values.get("ratios", [self.start]))
        self.gap: float | None = values.get("gap")
        self._waiting: tuple[torch.Tensor, torch.cuda.Event | None] | None = None
        if values.get("waiting") is not None:
            self._waiting = torch.tensor(values["waiting"]), None
        self._before: dict[str, torch.Tensor] = {}
        if self.pruner is not None:
            ratio = values.get("pruning_ratio", self.max_pruning_ratio)
            self.pruner.reconfigure(pruning_ratio=max(self.min_pruning_ratio, min(self.max_pruning_ratio, ratio)))

    @property
    def ratio(self) -> float:
        """The slow ratio of the next step."""
        return self.ratios[-1]

    @property
    def pruning_ratio(self) -> float | None:
        """The pruning ratio of the next step; None if it stays as configured."""
        return None if self.pruner is None else self.pruner.config.pruning_ratio

    def mode_at(self, schedule: ModeSchedule, step: int) -> str:
        """ "fast" or "slow". A future step uses the current ratio."""
        if schedule.is_fixed(step):
            return SLOW
        ratio = self.ratios[bisect_right(self.steps, step) - 1]
        return SLOW if random.Random(f"{schedule.seed}:{step}").random() < ratio else FAST

    # --- while training runs --------------------------------------------------------------------------------------

    def on_train_begin(self, args, state, control, **kwargs):
        saved = state.stateful_callbacks.get(type(self).__name__) if state.global_step else None
        self._restore(saved["attributes"] if saved else {})
        ratio = self._bounded(self.ratio)
        if ratio != self.ratio:  # of a run with other bounds
            self.steps.append(state.global_step)
            self.ratios.append(ratio)

    def on_step_begin(self, args, state, control, **kwargs):
        self._before = dict(self.losses.sums)

    def on_step_end(self, args, state, control, **kwargs):
        measured = [self._of_step(name) for name in ("slow_loss", "pruned_loss")]
        if None in measured:  # a fast step
            return
        # Apply the previous measurement, whose copy is complete, and start the copy of this one.
        if self._waiting is not None:
            self._follow(*self._read(), state.global_step)
        both = self.reduced(torch.stack(measured))
        copied = torch.cuda.Event() if both.is_cuda else None
        self._waiting = on_host(both), copied
        if copied is not None:
            copied.record()

    def on_train_end(self, args, state, control, **kwargs):
        self.end()

    def end(self) -> None:
        """Gives the pruner its configured ratio again."""
        if self.pruner is not None:
            self.pruner.reconfigure(pruning_ratio=self.max_pruning_ratio)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Gives the pruner its configured ratio for the body, in which it is saved, described or given others."""
        now = self.pruner and self.pruner.config.pruning_ratio
        self.end()
        try:
            yield
        finally:
            if self.pruner is not None:
                self.pruner.reconfigure(pruning_ratio=now)

    def _of_step(self, name: str) -> torch.Tensor | None:
        """The loss that the step has added to a sum; None if it added nothing."""
        now, before = self.losses.sums.get(name), self._before.get(name)
        if now is before:
            return None
        return now if before is None else now - before

    def _read(self) -> list[float]:
        host, copied = self._waiting
        if copied is not None:
            copied.synchronize()  # from the previous slow step
        return host.tolist()

    def _follow(self, full: float, pruned: float, step: int) -> None:
        """Changes the ratios from `step` on by the measurement of an earlier slow step.

        A step without targets, or whose loss has overflowed, says nothing; its gap would stay in the average.
        """
        if not (full < math.inf and 0 < pruned < math.inf):
            return
        # Smooth the gap and turn it, with its trend, into a factor.
        gap = full / max(pruned, 1e-6) - 1
        before = gap if self.gap is None else self.gap
        self.gap = before + SMOOTHING * (gap - before)
        change = math.exp(min(MOST, max(-MOST, GAIN * (self.gap + self.gap - before))))
        # The ratio within its bounds, from this step on.
        self.steps.append(step)
        self.ratios.append(self._bounded(self.ratio * change))
        # The kept fraction changes by the same factor.
        if self.pruner is not None:
            kept = (1 - self.pruner.config.pruning_ratio) * change
            ratio = 1 - min(1 - self.min_pruning_ratio, max(1 - self.max_pruning_ratio, kept))
            self.pruner.reconfigure(pruning_ratio=ratio)

    def _bounded(self, ratio: float) -> float:
        low, high = self.bounds
        return min(high, max(low, ratio))

    # --- logs and checkpoints -------------------------------------------------------------------------------------

    def window(self) -> dict[str, float]:
        """The logged values: the current slow ratio, and the gap once it is known."""
        logs = {"slow_mode_ratio": round(self.ratio, 6)}
        if self.gap is not None:
            logs["mode_gap"] = round(self.gap, 6)
        if self.pruner is not None:
            logs["pruning_ratio"] = round(self.pruner.config.pruning_ratio, 6)
        return logs

    def state(self) -> dict:
        values = {"steps": self.steps, "ratios": self.ratios, "gap": self.gap}
        values["waiting"] = None if self._waiting is None else self._read()
        if self.pruner is not None:
            values["pruning_ratio"] = self.pruner.config.pruning_ratio
        return {"args": {}, "attributes": values}


def adaptive_schedule_of(
    args: DualSpeedArguments,
    start: float,
    pruner: Pruner,
    losses: ModeLosses,
    reduced: Callable[[torch.Tensor], torch.Tensor],
) -> AdaptiveSchedule | None:
    """The schedule that arguments ask for; None for other kinds.

    Args:
        args (`DualSpeedArguments`): of the training.
        start (`float`): the initial slow ratio; 0, as in projector-only training, leaves nothing to adapt.
        pruner (`Pruner`): whose pruning ratio changes as well, if `min_pruning_ratio` is set.
        losses, reduced: as in [`AdaptiveSchedule`].

    Raises:
        ValueError: the arguments do not fit it; the message says why.
    """
    if args.mode_schedule != "adaptive" or not start:
        return None
    if args.train_sampling_strategy == "group_by_length":
        raise ValueError(
            "`mode_schedule` is 'adaptive', but train_sampling_strategy='group_by_length' needs to know the modes of a "
            "whole epoch beforehand. Use mode_schedule='random', or another sampling strategy."
        )
    if args.min_pruning_ratio is not None:
        most = pruner.config.pruning_ratio
        if pruner.config.pruning_schedule != "constant" or args.min_pruning_ratio > most:
            raise ValueError(
                f"`min_pruning_ratio` is {args.min_pruning_ratio}, but the pruner has pruning_ratio={most} with the "
                f"pruning_schedule {pruner.config.pruning_schedule!r}. Use a constant ratio that is no smaller, or "
                "min_pruning_ratio=None to leave it alone."
            )
    bounds = args.min_slow_mode_ratio, args.max_slow_mode_ratio
    changing = None if args.min_pruning_ratio is None else pruner
    return AdaptiveSchedule(losses, reduced, start, bounds, changing, args.min_pruning_ratio)
