"""Activation checkpointing by mode: slow steps recompute activations as the user asked, fast steps do not.

A fast step, or a slow one in parts of its size, holds the activations of a fraction of the tokens. Without
recomputation it saves a fourth of its time, and needs far less memory than a whole slow step without it.
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
    """In steps on few tokens, turns off the recomputation that the user asked for.

    Args:
        always (`bool`): never turn it off; becomes True when memory runs out.
    """

    def __init__(self, always: bool = False):
        self.always = always
        self._checkpointed: list[nn.Module] = []

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        # The Trainer has just turned checkpointing on. FSDP's own wrappers are left alone.
        self._checkpointed = [m for m in model.modules() if getattr(m, "gradient_checkpointing", False)]

    @property
    def skips(self) -> bool:
        """Whether small steps skip recomputation."""
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
        """Turns recomputation on for the rest of training if a small micro-batch ran out of memory without it, which
        can then be repeated. Raises the error otherwise.

        Args:
            small (`bool`): whether the micro-batch ran without recomputation.
            alone (`bool`): whether it can be repeated: there are no other gradients, and no other rank waits.
        """
        if not small or not self.skips:
            raise error
        if not alone:
            raise torch.OutOfMemoryError(
                f"{error} A step ran out of memory without activation checkpointing: set "
                "fast_mode_checkpointing=True, or a smaller per_device_train_batch_size."
            ) from error
        traceback.clear_frames(error.__traceback__)  # they hold the activations of the failed attempt
        self.fall_back("ran out of memory")

    def fall_back(self, reason: str) -> None:
        """Makes all later steps recompute."""
        self.always = True
        logger.warning(
            "A step without activation checkpointing %s; fast steps use it from now on, too. "
            "Set fast_mode_checkpointing=True to begin so.",
            reason,
        )

    def _switch(self, on: bool) -> None:
        for module in self._checkpointed:
            module.gradient_checkpointing = on
