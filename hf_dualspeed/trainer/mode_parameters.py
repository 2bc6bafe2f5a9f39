"""Parameters that only one of the two modes updates."""

from __future__ import annotations

from fnmatch import fnmatchcase

from torch import nn

from .schedule import FAST, SLOW


class ModeParameters:
    """Splits the trainable parameters into shared, fast-only and slow-only ones.

    Before an optimizer step, [`drop_gradients`] removes the gradients of parameters that the mode does not own.
    Optimizers skip a parameter whose `.grad` is None, including weight decay and momentum, so it stays the same to the
    bit.

    Args:
        model (`nn.Module`): the model as given to the trainer.
        fast_only, slow_only (`list[str]`): glob patterns of parameter names.

    Raises:
        ValueError: a pattern matches no trainable parameter, or a parameter is in both lists.
    """

    def __init__(self, model: nn.Module, fast_only: list[str], slow_only: list[str]):
        trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
        names = {
            FAST: matching(trainable, fast_only, "fast_only_parameters"),
            SLOW: matching(trainable, slow_only, "slow_only_parameters"),
        }
        both = sorted(names[FAST] & names[SLOW])
        if both:
            raise ValueError(f"`fast_only_parameters` and `slow_only_parameters` both match {both[0]!r}. Name it once.")
        self.names = names
        self._model = model

    def drop_gradients(self, mode: str) -> None:
        """Sets `.grad` of the parameters that `mode` does not own to None."""
        others = self.names[SLOW if mode == FAST else FAST]
        if not others:
            return
        for name, parameter in self._model.named_parameters():
            if name.replace("_checkpoint_wrapped_module.", "") in others:  # renamed by FSDP's checkpointing
                parameter.grad = None


def matching(trainable: dict[str, nn.Parameter], patterns: list[str], argument: str) -> set[str]:
    """Names of the trainable parameters that match the glob `patterns` of `argument`."""
    found = set()
    for pattern in patterns:
        hits = {name for name in trainable if fnmatchcase(name, pattern)}
        if not hits:
            raise ValueError(
                f"`{argument}` pattern {pattern!r} matches no trainable parameter. "
                f"Trainable are, for example: {', '.join(list(trainable)[:3])}."
            )
        found |= hits
    return found
