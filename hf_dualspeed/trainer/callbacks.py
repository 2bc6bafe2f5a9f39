"""Wall time and losses by mode, collected without waiting for the device."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Iterator
from statistics import fmean
from typing import Any

import torch
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from .schedule import FAST, SLOW

logger = logging.getLogger(__name__)

# The share of waiting that is worth a hint, and the steps before which it is not given.
WAITS_MUCH, HINT_AFTER = 0.1, 50
# The steps of a mode whose mean time is that of the next ones.
RECENT = 64
# Ends the names of spans that are a mode's steps without their waits.
WORK = "_work"


class DataWait:
    """The time of steps, and the share of it that they wait for their batches, measured without waiting for the device.

    A step lasts from where it asks for its batches to the optimizer's update; evaluation, saving and what callbacks do
    behind it are none of it. On a CUDA device, all times are those of its stream, between events: it waits from the end
    of all work that it was given until the batch has come and been copied to it. A batch for which the host waits while
    the device is still at work costs nothing. On other devices, the times are the host's.

    Args:
        waited (`float`), seconds (`float`): of an earlier part of the run.
        work (`dict[str, float]`, *optional*): seconds of the steps of each mode from their first micro-batch on, to
            which those to come are added.
    """

    def __init__(self, waited: float = 0.0, seconds: float = 0.0, work: dict[str, float] | None = None):
        self.sums = {"waited": waited, "seconds": seconds}
        self.work = {} if work is None else work
        self.device = torch.device("cpu")
        self.steps = 0  # since training began here
        self._spans: list[tuple[str, Any, Any]] = []  # whose end the device may not have reached
        # Seconds of the last steps of each mode, their wait included, without the first one, which takes longer.
        self.recent: dict[str, deque[float]] = {}
        self._begun = self._work_begun = None
        self._logged = dict(self.sums)
        self._hinted = False

    def batches(self, batches: Iterator) -> Iterator:
        """The batches, which the next step is to run on. The time until each is there counts as waiting."""
        self._begun, ended = self._mark(), object()
        while True:
            begun, batch = self._mark(), next(batches, ended)
            self._spans.append(("waited", begun, self._mark()))
            if batch is ended:
                return
            yield batch

    def begin_work(self) -> None:
        """Begins the first micro-batch of a step, whose batches have come."""
        self._work_begun = self._mark()

    def end_step(self, mode: str | None = None) -> None:
        """Ends the step that the last batches were for, and that was of this mode."""
        begun, work_begun, ended = self._begun, self._work_begun, self._mark()
        self._begun = self._work_begun = None
        if work_begun is not None and mode is not None:
            self._spans.append((f"{mode}{WORK}", work_begun, ended))
        if begun is not None:  # a `get_batch_samples` in front of ours may not call it
            self._spans.append(("seconds", begun, ended))
            if mode is not None:
                self._spans.append((mode, begun, ended))
            self.steps += 1
        self.settle()

    def shares(self) -> tuple[float, float]:
        """The share of waiting since the last log, and that of the whole run; 0 before the first step."""
        self.settle()
        since = {name: value - self._logged[name] for name, value in self.sums.items()}
        return share_of(since), share_of(self.sums)

    def logged(self) -> None:
        """Begins the time up to the next log."""
        self._logged = dict(self.sums)

    def hint(self, recent: float, whole: float, workers: int) -> None:
        """Says once what to do where steps wait long, since the last log and in the whole run, after its start."""
        if self._hinted or self.steps < HINT_AFTER or min(recent, whole) <= WAITS_MUCH:
            return
        self._hinted = True
        more = f"more than the {workers} of now" if workers else "4, for example, in place of 0"
        logger.warning(
            "Steps wait for their batches %.0f%% of the time (`data_wait`). In this order: set dataloader_num_workers "
            "to %s; let the collator decode large JPEGs at a reduced size (jpeg_draft=True); use smaller images, or a "
            "smaller size or `max_pixels` of the processor. vision_feature_cache saves the encoder's time, but not "
            "this one: images are still read and processed.",
            100 * whole,
            more,
        )

    def _mark(self) -> Any:
        """A point in time: an event on the device's stream, or the host's seconds."""
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event

    def settle(self) -> None:
        """Adds up the spans whose end is past."""
        while self._spans:
            name, begun, ended = self._spans[0]
            if isinstance(ended, float):
                taken = ended - begun
            elif ended.query():
                taken = begun.elapsed_time(ended) / 1000
            else:
                return
            self._spans.pop(0)
            if name in self.sums:
                self.sums[name] += taken
            elif name.endswith(WORK):
                mode = name.removesuffix(WORK)
                self.work[mode] = self.work.get(mode, 0.0) + taken
            else:
                self._note(name, taken)

    def _note(self, mode: str, taken: float) -> None:
        if mode not in self.recent:
            self.recent[mode] = deque([taken], maxlen=1)
        elif self.recent[mode].maxlen == 1:
            self.recent[mode] = deque([taken], maxlen=RECENT)
        else:
            self.recent[mode].append(taken)


def share_of(sums: dict[str, float]) -> float:
    return min(1.0, sums["waited"] / sums["seconds"]) if sums["seconds"] > 0 else 0.0


class ModeClock(TrainerCallback, ExportableState):
    """Optimizer steps and their seconds by mode, saved in the checkpoint.

    A step is timed from its first micro-batch to the optimizer's update, as [`DataWait`] does it: on a CUDA device by
    the device, which the host does not wait for, so that work of a slow step is not counted in the next fast one. Data
    loading, evaluation, saving and other callbacks count in `total_seconds` only. `visual_tokens` are those of the fast
    steps of this process, before and after pruning; the checkpoint holds `all_visual_tokens`, the sum over all
    processes, which the trainer sets. `fast_tokens` are the tokens of the largest batch of a fast step, padding
    included. `data` times how long steps wait for their batches; `data_wait` is that share in the process that waits
    longest, which the trainer sets.
    """

    def __init__(self, mode: str | None = None):
        self.size: dict = {}  # of a micro-batch, so that a run resumes with the same
        self.view: dict = {}  # settings of the pruned view, for whoever answers from the checkpoint
        self.unsaid: dict = {}  # those that a checkpoint had which says none, because it is older
        self._restore({})
        self._mode = mode  # of the last micro-batch; of all steps if micro-batches are not counted
        self._logged = ({FAST: 0, SLOW: 0}, time.perf_counter())

    def _restore(self, values: dict) -> None:
        self.steps = dict(values.get("steps", {FAST: 0, SLOW: 0}))
        self.seconds = dict(values.get("seconds", {FAST: 0.0, SLOW: 0.0}))
        self.total_seconds = values.get("total_seconds", 0.0)
        self.visual_tokens = dict(values.get("visual_tokens", {"full": 0, "kept": 0}))
        self.all_visual_tokens = dict(self.visual_tokens)
        self.fast_tokens = values.get("fast_tokens", 0)
        self.data = DataWait(**values.get("data_times", {}), work=self.seconds)
        self.data_wait: float | None = None
        self._seen: float | None = None

    def on_train_begin(self, args, state, control, **kwargs):
        # The Trainer restores callbacks on request only, as new objects. This one restores itself.
        saved = state.stateful_callbacks.get(type(self).__name__) if state.global_step else None
        self._restore(saved["attributes"] if saved else {})
        earlier = saved["attributes"].get("view", self.unsaid) if saved else {}
        changed = [name for name in earlier if earlier[name] != self.view.get(name)]
        if changed:
            before, now = (", ".join(f"{name}={of.get(name)!r}" for name in changed) for of in (earlier, self.view))
            logger.warning(
                "The checkpoint's fast steps had %s, and those of the resumed run have %s. Set %s to go on as before.",
                *(before, now, before),
            )
        if not state.is_world_process_zero:  # one process continues from the sum
            self.visual_tokens = {"full": 0, "kept": 0}
        self.data.device = args.device
        self._seen = time.perf_counter()
        self._logged = (dict(self.steps), self._seen)

    def on_step_begin(self, args, state, control, **kwargs):
        self.data.begin_work()

    def on_optimizer_step(self, args, state, control, **kwargs):
        self.data.end_step(self._mode)

    def on_step_end(self, args, state, control, **kwargs):
        if self._mode is None:
            raise ValueError(
                "A step ended without a fast or slow pass: a `training_step` in front of DualSpeed's does not call it. "
                "Call super().training_step(...) there."
            )
        self.steps[self._mode] += 1
        self.pass_time()

    def on_train_end(self, args, state, control, **kwargs):
        self.pass_time()
        self._seen = None

    def pass_time(self) -> None:
        """Updates `total_seconds` while training runs, and `seconds`."""
        self.data.settle()
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

    def pace(self, left: dict[str, int]) -> dict[str, float]:
        """What people and trackers follow, of this process: seconds of a step of each mode and of all steps that are
        left, how many times as fast as slow steps alone the steps so far have been, and the share of visual tokens that
        fast steps have saved.

        Args:
            left (`dict[str, int]`): the steps to come, by mode.
        """
        seconds = {mode: fmean(self.data.recent[mode]) for mode in (FAST, SLOW) if mode in self.data.recent}
        found = {f"{mode}_step_seconds": round(value, 4) for mode, value in seconds.items()}
        if seconds:
            known = all(mode in seconds for mode, count in left.items() if count)
            least = min(seconds.values())  # a mode that has not been timed takes no less than a fast step
            total = sum(seconds.get(mode, least) * count for mode, count in left.items())
            found["seconds_left" if known else "least_seconds_left"] = round(total, 1)
        if len(seconds) == 2:
            taken = sum(seconds[mode] * count for mode, count in self.steps.items())
            found["speedup_over_slow_steps"] = round(seconds[SLOW] * sum(self.steps.values()) / taken, 2)
        full, kept = self.visual_tokens["full"], self.visual_tokens["kept"]
        return {**found, "visual_tokens_saved": round(1 - kept / full, 4)} if full else found

    def state(self) -> dict:
        self.pass_time()
        values = {"steps": self.steps, "seconds": self.seconds, "total_seconds": self.total_seconds}
        values |= {"visual_tokens": self.all_visual_tokens, "fast_tokens": self.fast_tokens}
        values |= {"data_times": dict(self.data.sums), "size": self.size, "view": self.view}
        return {"args": {}, "attributes": values}


def saved_by_clock(state: dict) -> dict:
    """What a [`ModeClock`] has saved in the Trainer's state; {} if there was none."""
    clock = (state.get("stateful_callbacks") or {}).get(ModeClock.__name__) or {}
    return clock.get("attributes") or {}


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

    def pop(self, accelerator, window: dict, shares: int) -> dict:
        """Mean loss of each kind per optimizer step over all ranks, and the window's step counts. Clears the sums.

        A step's loss is the sum of so many `shares`, of which each rank has one.
        """
        steps = {
            "fast_loss": window[FAST],
            "pruner_loss": window[FAST],
            "slow_loss": window[SLOW],
            "pruned_loss": window[SLOW],
            "distillation_loss": window[SLOW],
            "router_loss": window[FAST] + window[SLOW],
        }
        # In all processes the same, though the batches of one may have had no images, and so no loss of the pruner.
        names = sorted(steps) if self.sums else []
        logs = {
            "fast_steps": window[FAST],
            "slow_steps": window[SLOW],
            "steps_per_second": window["steps_per_second"],
        }
        if names:
            # One reduction over ranks and one wait for the device for all losses, and for which of them there are.
            zero = next(iter(self.sums.values())).new_zeros(())
            sums = [self.sums.get(name, zero) for name in names]
            there = [zero + (name in self.sums) for name in names]
            means = accelerator.reduce(torch.stack([*sums, *there]), reduction="mean").tolist()
            found = zip(names, means[: len(names)], means[len(names) :], strict=True)
            logs |= {name: shares * mean / max(1, steps[name]) for name, mean, there in found if there}
        self.sums = {}
        return logs
