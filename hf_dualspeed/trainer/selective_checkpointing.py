"""Activation checkpointing by mode: slow steps recompute activations where the user asked for it, fast ones need not.

A fast step, or a slow one in parts of its size, holds the activations of a fraction of the tokens: more memory than
with recomputation, which is a fourth of its time, and far less than a whole slow step without.
"""

from __future__ import annotations

import logging
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from transformers import TrainerCallback

logger = logging.getLogger(__name__)


class SelectiveCheckpointing(TrainerCallback):
    """Leaves out, in steps on few tokens, the recomputation that the user asked for.

    Args:
        always (`bool`): never leave it out. Otherwise so from when memory runs short.
    """

    def __init__(self, always: bool = False):
        self.always = always
        self._checkpointed: list[nn.Module] = []

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        # The Trainer switches checkpointing on right before; FSDP's own wrappers are left alone.
        self._checkpointed = [m for m in model.modules() if getattr(m, "gradient_checkpointing", False)]

    @property
    def skips(self) -> bool:
        """Whether there is recomputation that small steps leave out."""
        return bool(self._checkpointed) and not self.always

    @contextmanager
    def left_out(self, small: bool) -> Iterator[None]:
        """Runs the body, forward and backward of a micro-batch, without recomputation if it is `small`."""
        if not small or not self.skips:
            yield
            return
        self._switch(False)
        try:
            yield
        finally:
            self._switch(True)

    def retries(self, error: torch.OutOfMemoryError, small: bool, alone: bool) -> None:
        """Turns recomputation on for good where a small micro-batch ran out of memory without it, so that it can be run
        again; raises the error elsewhere.

        Args:
            small (`bool`): whether the micro-batch went without recomputation.
            alone (`bool`): whether it can be run again: no other gradients are there, and no other rank waits.
        """
        if not small or not self.skips:
            raise error
        if not alone:
            raise torch.OutOfMemoryError(
                f"{error} A step ran out of memory without activation checkpointing: set "
                "fast_mode_checkpointing=True, or a smaller per_device_train_batch_size."
            ) from error
        traceback.clear_frames(error.__traceback__)  # which hold the activations of the failed attempt
        self.fall_back("ran out of memory")

    def fall_back(self, reason: str) -> None:
        """All steps recompute from now on."""
        self.always = True
        logger.warning(
            "A step without activation checkpointing %s; fast steps use it from now on, too. "
            "Set fast_mode_checkpointing=True to begin so.",
            reason,
        )

    def _switch(self, on: bool) -> None:
        for module in self._checkpointed:
            module.gradient_checkpointing = on
