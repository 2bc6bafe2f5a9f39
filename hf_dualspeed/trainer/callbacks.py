"""Wall time and losses by mode, collected without waiting for the device."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from .schedule import FAST, SLOW


class ModeClock(TrainerCallback, ExportableState):
    """Optimizer steps and their wall seconds by mode, saved in the checkpoint.

    A step is timed from its first micro-batch to the end of the optimizer step. Data loading, evaluation and saving
    count in `total_seconds` only. `visual_tokens` are those of the fast steps of this process, before and after
    pruning; the checkpoint holds `all_visual_tokens`, the sum over all processes, which the trainer sets. `fast_tokens`
    are the tokens of the largest batch of a fast step, padding included.
    """

    def __init__(self, mode: str | None = None):
        self._restore({})
        self._mode = mode  # of the last micro-batch; of all steps if micro-batches are not counted
        self._begun = 0.0
        self._logged = ({FAST: 0, SLOW: 0}, time.perf_counter())

    def _restore(self, values: dict) -> None:
        self.steps = dict(values.get("steps", {FAST: 0, SLOW: 0}))
        self.seconds = dict(values.get("seconds", {FAST: 0.0, SLOW: 0.0}))
        self.total_seconds = values.get("total_seconds", 0.0)
        self.visual_tokens = dict(values.get("visual_tokens", {"full": 0, "kept": 0}))
        self.all_visual_tokens = dict(self.visual_tokens)
        self.fast_tokens = values.get("fast_tokens", 0)
        self._seen: float | None = None

    def on_train_begin(self, args, state, control, **kwargs):
        # The Trainer restores callbacks on request only, as new objects. This one restores itself.
        saved = state.stateful_callbacks.get(type(self).__name__) if state.global_step else None
        self._restore(saved["attributes"] if saved else {})
        if not state.is_world_process_zero:  # one process continues from the sum
            self.visual_tokens = {"full": 0, "kept": 0}
        self._seen = time.perf_counter()
        self._logged = (dict(self.steps), self._seen)

    def on_step_begin(self, args, state, control, **kwargs):
        self._begun = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        if self._mode is None:
            raise ValueError(
                "A step ended without a fast or slow pass: a `training_step` in front of DualSpeed's does not call it. "
                "Call super().training_step(...) there."
            )
        self.steps[self._mode] += 1
        self.seconds[self._mode] += time.perf_counter() - self._begun
        self.pass_time()

    def on_train_end(self, args, state, control, **kwargs):
        self.pass_time()
        self._seen = None

    def pass_time(self) -> None:
        """Updates `total_seconds` while training runs."""
        if self._seen is not None:
            now = time.perf_counter()
            self.total_seconds, self._seen = self.total_seconds + now - self._seen, now

    def count(self, mode: str, tokens: int, full: int, kept: int) -> None:
        """Counts a micro-batch: its mode, its tokens, and its visual tokens before and after pruning if it is fast."""
        self._mode = mode
        if mode == FAST:
            self.fast_tokens = max(self.fast_tokens, tokens)
        self.visual_tokens["full"] += full
        self.visual_tokens["kept"] += kept

    def set_total(self, full: int, kept: int) -> None:
        """Sets the visual tokens of all processes together."""
        self.all_visual_tokens = {"full": full, "kept": kept}

    def window(self) -> dict:
        """Steps by mode and steps per second since the last call."""
        steps, since = self._logged
        now = time.perf_counter()
        new = {mode: self.steps[mode] - steps[mode] for mode in self.steps}
        self._logged = (dict(self.steps), now)
        return {**new, "steps_per_second": round(sum(new.values()) / max(now - since, 1e-9), 3)}

    def state(self) -> dict:
        self.pass_time()
        values = {"steps": self.steps, "seconds": self.seconds, "total_seconds": self.total_seconds}
        values |= {"visual_tokens": self.all_visual_tokens, "fast_tokens": self.fast_tokens}
        return {"args": {}, "attributes": values}


class ModeLosses(TrainerCallback):
    """Sums of the losses since the last log, on the device. A callback, so each start of training clears them."""

    def __init__(self):
        self.sums: dict[str, torch.Tensor] = {}

    def on_train_begin(self, args, state, control, **kwargs):
        self.sums = {}

    def add(self, name: str, loss: torch.Tensor) -> None:
        loss = loss.detach().float()
        self.sums[name] = self.sums[name] + loss if name in self.sums else loss

    def snapshot(self) -> Callable[[], None]:
        """Returns a function that restores the current sums."""
        sums = dict(self.sums)

        def restore() -> None:
            self.sums = sums

        return restore

    def pop(self, accelerator, window: dict, reduction: str) -> dict:
        """Mean loss of each kind per optimizer step over all ranks, and the window's step counts. Clears the sums.

        `reduction` over ranks is "sum" if each rank's loss is its share of the step's, else "mean".
        """
        steps = {
            "fast_loss": window[FAST],
            "pruner_loss": window[FAST],
            "slow_loss": window[SLOW],
            "pruned_loss": window[SLOW],
            "distillation_loss": window[SLOW],
            "router_loss": window[FAST] + window[SLOW],
        }
        names = sorted(self.sums)
        logs = {
            "fast_steps": window[FAST],
            "slow_steps": window[SLOW],
            "steps_per_second": window["steps_per_second"],
        }
        if names:
            # One reduction over ranks and one wait for the device for all losses.
            sums = torch.stack([self.sums[name] for name in names])
            means = accelerator.reduce(sums, reduction=reduction).tolist()
            logs |= {name: mean / max(1, steps[name]) for name, mean in zip(names, means, strict=True)}
        self.sums = {}
        return logs
