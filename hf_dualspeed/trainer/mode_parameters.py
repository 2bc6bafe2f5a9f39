"""Parameters that only one of the two modes updates."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from fnmatch import fnmatchcase
from functools import partial

import torch
from torch import nn

from .schedule import FAST, SLOW

BOTH = "both"
SKIPS = "_dualspeed_skips"  # attribute of an optimizer that skips groups


class ModeParameters:
    """Splits the trainable parameters into shared, fast-only and slow-only ones.

    Before an optimizer step, [`drop_gradients`] removes the gradients of parameters that the mode does not own.
    Optimizers skip a parameter whose `.grad` is None, including weight decay and momentum, so it stays the same to the
    bit. Where an optimizer sees no single parameters, [`split`], [`skip_groups`] and [`zero_gradients`] do the same.

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
        for parameter, owner in self._owned():
            if owner != mode:
                parameter.grad = None

    def split(self, group: dict) -> list[dict]:
        """An optimizer's group in parts, one for each of the `modes` that update its parameters."""
        owners = {id(parameter): owner for parameter, owner in self._owned()}
        parts: dict[str, list[nn.Parameter]] = {}
        for parameter in group["params"]:
            parts.setdefault(owners.get(id(parameter), BOTH), []).append(parameter)
        return [{**group, "params": parameters, "modes": modes} for modes, parameters in parts.items()]

    def skip_groups(self, optimizer: torch.optim.Optimizer, mode: Callable[[], str | None]) -> None:
        """Makes an optimizer skip the groups of [`split`] that the current `mode` does not update.

        It may hold the parameters of a group as one flat tensor, which has a gradient in every step. An optimizer that
        skips already, from an earlier training, stays as it is.
        """
        if getattr(optimizer, SKIPS, False):
            return
        setattr(optimizer, SKIPS, True)

        def leave_out(optimizer, args, kwargs) -> None:
            self._groups = optimizer.param_groups
            optimizer.param_groups = [group for group in self._groups if group["modes"] in (BOTH, mode())]

        def restore(optimizer, args, kwargs) -> None:
            optimizer.param_groups = self._groups

        optimizer.register_step_pre_hook(leave_out)
        optimizer.register_step_post_hook(restore)

    def zero_gradients(self, mode: Callable[[], str | None]) -> None:
        """Makes backward leave zeros in place of the gradients of parameters that the current `mode` does not own.

        So they do not count in the norm by which gradients are clipped, where a step follows before they can be
        dropped.
        """

        def kept(gradient: torch.Tensor, owner: str) -> torch.Tensor:
            return gradient if mode() in (owner, None) else torch.zeros_like(gradient)

        for parameter, owner in self._owned():
            parameter.register_hook(partial(kept, owner=owner))

    def _owned(self) -> Iterator[tuple[nn.Parameter, str]]:
        """The parameters of one mode alone, with the mode."""
        owners = {name: mode for mode, names in self.names.items() for name in names}
        for name, parameter in self._model.named_parameters() if owners else ():
            owner = owners.get(name.replace("_checkpoint_wrapped_module.", ""))  # renamed by FSDP's checkpointing
            if owner is not None:
                yield parameter, owner


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
