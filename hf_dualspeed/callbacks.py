"""Wall time and losses by mode, collected without waiting for the device."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import nn
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from .schedule import FAST, SLOW


class ModeClock(TrainerCallback, ExportableState):
    """Optimizer steps and their wall seconds by mode, which `mode_of` tells of the model; kept in the checkpoint.

    A step is timed from its first micro-batch to the end of the optimizer step; loading data, evaluating and saving
    are not in it.
    """

    def __init__(self, mode_of: Callable[[nn.Module], str] = lambda model: model.dualspeed.last_mode):
        self.mode_of = mode_of
        self.steps = {FAST: 0, SLOW: 0}
        self.seconds = {FAST: 0.0, SLOW: 0.0}
        self._begun = 0.0
        self._logged = ({FAST: 0, SLOW: 0}, time.perf_counter())

    def on_train_begin(self, args, state, control, **kwargs):
        # The Trainer restores callbacks by building them anew, on request only; this one restores itself.
        saved = state.stateful_callbacks.get(type(self).__name__) if state.global_step else None
        values = saved["attributes"] if saved else {"steps": {FAST: 0, SLOW: 0}, "seconds": {FAST: 0.0, SLOW: 0.0}}
        self.steps, self.seconds = dict(values["steps"]), dict(values["seconds"])
        self._logged = (dict(self.steps), time.perf_counter())

    def on_step_begin(self, args, state, control, **kwargs):
        self._begun = time.perf_counter()

    def on_step_end(self, args, state, control, model=None, **kwargs):
        mode = self.mode_of(model)
        self.steps[mode] += 1
        self.seconds[mode] += time.perf_counter() - self._begun

    def window(self) -> dict:
        """Steps by mode and steps per second since the last call."""
        steps, since = self._logged
        now = time.perf_counter()
        new = {mode: self.steps[mode] - steps[mode] for mode in self.steps}
        self._logged = (dict(self.steps), now)
        return {**new, "steps_per_second": round(sum(new.values()) / max(now - since, 1e-9), 3)}

    def state(self) -> dict:
        return {"args": {}, "attributes": {"steps": self.steps, "seconds": self.seconds}}


class ModeLosses(TrainerCallback):
    """Sums of the losses since the last log, on the device; a callback, so that each start of training clears them."""

    def __init__(self):
        self._sums: dict[str, torch.Tensor] = {}

    def on_train_begin(self, args, state, control, **kwargs):
        self._sums = {}

    def add(self, name: str, loss: torch.Tensor) -> None:
        loss = loss.detach().float()
        self._sums[name] = self._sums[name] + loss if name in self._sums else loss

    def pop(self, accelerator, window: dict, reduction: str) -> dict:
        """Mean loss per optimizer step of each kind, over all ranks, beside the window's step counts.

        `reduction` over ranks is "sum" where each rank's loss is its share of the step's, else "mean".
        """
        steps = {"fast_loss": FAST, "pruner_loss": FAST, "slow_loss": SLOW, "distillation_loss": SLOW}
        names = sorted(self._sums)
        logs = {
            "fast_steps": window[FAST],
            "slow_steps": window[SLOW],
            "steps_per_second": window["steps_per_second"],
        }
        if names:
            sums = torch.stack([self._sums[name] for name in names])
            means = accelerator.reduce(sums, reduction=reduction).tolist()
            logs |= {name: mean / max(1, window[steps[name]]) for name, mean in zip(names, means, strict=True)}
        self._sums = {}
        return logs
