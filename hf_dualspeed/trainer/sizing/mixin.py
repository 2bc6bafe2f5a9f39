"""The size of a micro-batch, told before the first step, and chosen where it is "auto"."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import TypeVar

from accelerate.utils import gather_object
from transformers.trainer import TRAINER_STATE_NAME

from ...publishing.display import is_silent
from ...utils.environment import reset_peak_memory
from ...utils.text import in_bytes, one_line
from ..callbacks import saved_by_clock
from ..schedule import FAST, SLOW
from ..training_args import Chosen
from .choice import Limits, choose
from .probe import NO_CARD, Probe, budget_of, probing, why_not_measured

logger = logging.getLogger(__name__)

Found = TypeVar("Found")


class SizingMixin:
    """Tells what the micro-batch takes and what would fit, and chooses it for `per_device_train_batch_size="auto"`."""

    size: dict | None = None  # what is known of the micro-batch

    def _inner_training_loop(
        self, batch_size=None, args=None, resume_from_checkpoint=None, trial=None, ignore_keys_for_eval=None
    ):
        self.size = None
        if self.train_dataset is None:
            pass  # the Trainer says so
        elif self._is_sized:
            self._choose_size(resume_from_checkpoint)
        elif batch_size in (None, self.args.train_batch_size):  # not another try of `auto_find_batch_size`
            self._tell_size()
        rows = batch_size if self.args.auto_find_batch_size else self._train_batch_size
        self.clock.size = {"micro_batch": rows, "slow_mode_splits": self.args.slow_mode_splits}
        return super()._inner_training_loop(batch_size, args, resume_from_checkpoint, trial, ignore_keys_for_eval)

    @property
    def _is_sized(self) -> bool:
        """Whether the micro-batch is to be chosen."""
        return isinstance(self.args.per_device_train_batch_size, Chosen)

    def _check_sizing(self) -> None:
        """Raises a `ValueError` where the micro-batch is "auto" and cannot be chosen."""
        reason = why_not_measured(self) if self._is_sized else None
        if reason is not None:
            raise ValueError(
                f"`per_device_train_batch_size` is 'auto', but {reason}"
                f"{', or a number' if reason == NO_CARD else '. Set a number: `dualspeed estimate MODEL` tells one'}."
            )

    def _forget_size(self) -> None:
        """Takes back what was chosen for an earlier training."""
        for name in ("slow_mode_splits", "gradient_accumulation_steps"):
            if isinstance(getattr(self.args, name), Chosen):
                setattr(self.args, name, getattr(self.args, name).asked)
        if self._is_sized:
            self.args.per_device_train_batch_size = Chosen()

    # --- chosen ---------------------------------------------------------------------------------------------------

    def _choose_size(self, checkpoint: str | None) -> None:
        """Sets the micro-batch, gradient accumulation and the parts of slow steps."""
        self._forget_size()
        args, share = self.args, self._share()
        saved = saved_size(checkpoint) if checkpoint else None
        if saved is None:
            self._check_sizing()
            rows, splits = self._chosen_size(share)
        else:
            splits, asked = saved.get("slow_mode_splits", args.slow_mode_splits), args.slow_mode_splits
            if asked != "auto" and (asked > 1 if splits == "auto" else asked > splits):
                splits = asked  # more parts than then take no more memory
            rows = Limits(0, 0, share).allowed(saved["micro_batch"])
            self.size = {"resumed": True}
        args.per_device_train_batch_size, self._train_batch_size = Chosen(rows), rows
        if share:
            args.gradient_accumulation_steps = Chosen(share // rows, args.gradient_accumulation_steps)
        if splits != args.slow_mode_splits:
            args.slow_mode_splits = splits if splits == "auto" else Chosen(splits, args.slow_mode_splits)
        self.size |= {
            "chosen": True,
            "micro_batch": rows,
            "gradient_accumulation_steps": args.gradient_accumulation_steps,
            "processes": args.world_size,
            "global_batch_size": rows * args.gradient_accumulation_steps * args.world_size,
            "slow_mode_splits": splits,
        }
        self._say_size()

    def _share(self) -> int | None:
        """Samples of an optimizer step on this process, if the user has set those of all."""
        wanted, ranks = self.args.global_batch_size, self.args.world_size
        if wanted is not None and wanted % ranks:
            raise ValueError(
                f"`global_batch_size` is {wanted}, which {ranks} processes cannot share evenly. Use "
                f"{max(1, round(wanted / ranks)) * ranks}, for example."
            )
        return wanted and wanted // ranks

    def _chosen_size(self, share: int | None) -> tuple[int, int | str]:
        """Measures the largest micro-batch on all processes, which take the smallest one together."""
        with ExitStack() as stack:
            opened: list[Probe] = []
            together(lambda: opened.append(stack.enter_context(probing(self))))
            (probe,) = opened
            limits = self._limits(probe, share)
            while True:
                found = together(lambda limits=limits: fitting(probe, limits))
                rows = min(rows for rows, _ in found)
                if all(own == rows for own, _ in found):
                    break
                limits = self._limits(probe, share, rows)
            # The most parts that a process needs.
            splits = max((splits for _, splits in found), key=lambda splits: 0 if splits == "auto" else splits)
            self.size = self._known(probe, limits, rows, splits, probe.held)
        reset_peak_memory(self.args.device)
        return rows, splits

    def _limits(self, probe: Probe, share: int | None = None, most: int | None = None) -> Limits:
        args = self.args
        most = most or max(1, len(self.train_dataset) // args.world_size)
        slow = self.slow_mode_ratio or args.slow_warmup_steps or args.slow_tail_ratio
        modes = ((FAST,) if self.slow_mode_ratio < 1 else ()) + ((SLOW,) if slow else ())
        return Limits(budget_of(self), most, share, args.slow_mode_splits, modes, probe.whole)

    def _known(self, probe: Probe, limits: Limits, rows: int, splits: int | str, need) -> dict:
        """What is told of a micro-batch: bytes of its steps, which are None where memory runs out."""
        held = {f"{mode}_bytes": need(mode, rows, splits) for mode in limits.modes}
        return {**held, "budget_bytes": limits.budget, "tokens": probe.length}

    # --- told -----------------------------------------------------------------------------------------------------

    def _tell_size(self) -> None:
        """Measures what the micro-batch takes and what would fit, in the first process, and says it."""
        if not self.args.tell_size or is_silent(self.args):
            return
        reason = why_not_measured(self)
        if reason is None and not type(self).compute_loss.__module__.startswith(("hf_dualspeed.", "trl.")):
            reason = f"{type(self).__name__}.compute_loss would be called more often than there are steps"
        if reason == NO_CARD:
            logger.info("The size of the micro-batch is not measured: %s.", reason)
            return
        if reason is None:
            rows, splits = self._train_batch_size, self.args.slow_mode_splits
            try:
                with probing(self) as probe:
                    limits = self._limits(probe)
                    self.size = self._known(probe, limits, rows, splits, probe.held)
                    fits, parts = choose(probe.on_lines, limits)
                self.size |= {"micro_batch": rows, "slow_mode_splits": splits}
                self.size |= {"fits": fits, "fits_slow_mode_splits": parts}
            # A failure here, such as that of a loss that counts its calls, must not end a training that may go well.
            except Exception as error:
                reason = f"{type(error).__name__}: {one_line(error)}"
            reset_peak_memory(self.args.device)
        if reason is not None:
            self.size = {"why": reason}
        self._say_size()

    def _say_size(self) -> None:
        self.display.tell_size(self.args, self.size)
        logger.info("Size of the micro-batch: %s", self.size)


def together(run: Callable[[], Found]) -> list[Found]:
    """What `run` returns in each process; raises in all of them where it fails in one."""
    found = error = None
    try:
        found = run()
    except Exception as raised:
        error = raised
    every = gather_object([(found, None if error is None else f"{type(error).__name__}: {one_line(error)}")])
    if error is not None:
        raise error
    failure = next((words for _, words in every if words is not None), None)
    if failure is not None:
        raise ValueError(f"The micro-batch cannot be chosen, because another process failed: {failure}")
    return [found for found, _ in every]


def fitting(probe: Probe, limits: Limits) -> tuple[int, int | str]:
    """[`choose`] by what steps are measured to hold; a `ValueError` where not even one sample fits."""
    found = choose(probe.held, limits)
    if not found[0]:
        raise ValueError(too_large(probe, limits.budget))
    return found


def saved_size(checkpoint: str) -> dict | None:
    """The micro-batch of the run that a checkpoint continues, and `slow_mode_splits` where it is known."""
    try:
        state = json.loads((Path(checkpoint) / TRAINER_STATE_NAME).read_text(encoding="utf-8"))
    except OSError:
        return None
    size = saved_by_clock(state).get("size")
    return size or (state.get("train_batch_size") and {"micro_batch": state["train_batch_size"]}) or None


def too_large(probe: Probe, budget: int) -> str:
    """The message for a sample that does not fit."""
    parts = ", ".join(f"{name} {in_bytes(size)}" for name, size in probe.fixed.items())
    return (
        f"`per_device_train_batch_size` is 'auto', but not even one sample of {probe.length} tokens fits into "
        f"{in_bytes(budget)}, of which are taken before it: {parts}. Use activation_checkpointing=True, LoRA "
        "or smaller images, or more memory."
    )
