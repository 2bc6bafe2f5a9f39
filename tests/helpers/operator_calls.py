"""Counts the operator calls of a training step that are not the model's own, by the function that makes them."""

from __future__ import annotations

import sys
from collections import Counter
from contextlib import ExitStack, contextmanager
from functools import wraps
from unittest.mock import patch

from torch.utils._python_dispatch import TorchDispatchMode

OURS = "hf_dualspeed"


class OperatorCalls(TorchDispatchMode):
    """Calls of operators by our innermost function that makes them, views included.

    What the model does on its own, in forward, encoder and backward, is left out, except for what our functions add
    inside of it.
    """

    def __init__(self):
        super().__init__()
        self.calls: Counter = Counter()
        self.model_runs = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        place = None if func.namespace == "profiler" else self.place()  # ranges of a profile
        if place is not None:
            self.calls[place] += 1
        return func(*args, **(kwargs or {}))

    def place(self) -> str | None:
        """The function that calls; None if it is the model's."""
        frame = sys._getframe(2)
        while frame is not None:
            module = frame.f_globals.get("__name__", "")
            if module.startswith(OURS):
                return f"{module.removeprefix(OURS)[1:]}.{frame.f_code.co_qualname}"
            if self.model_runs and module.startswith("transformers."):
                return None
            frame = frame.f_back
        return None if self.model_runs else "trainer"

    @contextmanager
    def left_out(self, owner, name: str):
        """What `owner`'s function `name` does is the model's."""
        function = getattr(owner, name)

        @wraps(function)
        def run(*args, **kwargs):
            self.model_runs += 1
            try:
                return function(*args, **kwargs)
            finally:
                self.model_runs -= 1

        with patch.object(owner, name, run):
            yield


def calls_of_step(trainer, inputs, mode: str = "fast") -> OperatorCalls:
    """The calls of a step of a trainer in `mode`, after one that warms up.

    Positions that the model numbers by a function of its own are its own.
    """
    model, trainer.current_gradient_accumulation_steps = trainer.model, 1
    trainer.step_in_mode(mode, model, dict(inputs))
    counter, interface = OperatorCalls(), trainer.dual_forward.interface
    encoder = interface.encoders["image"]
    own = [(model, "forward"), (encoder.owner, encoder.method), (trainer.accelerator, "backward")]
    if interface.positions_owner is not None:
        own.append((interface.positions_owner, "compute_3d_position_ids"))
    with ExitStack() as stack:
        for owner, name in own:
            stack.enter_context(counter.left_out(owner, name))
        stack.enter_context(counter)
        trainer.step_in_mode(mode, model, dict(inputs))
    return counter
