"""Transfers between devices and the host, and of what several devices share."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext

import torch


def on_host(tensor: torch.Tensor) -> torch.Tensor:
    """A copy on the host, of the same shape; from CUDA it is asynchronous, so synchronise before reading it."""
    tensor = tensor.detach()
    host = torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda)
    return host.copy_(tensor, non_blocking=tensor.is_cuda)


def synchronize(device: torch.device) -> None:
    """Waits until an accelerator has finished its work."""
    if device.type != "cpu":
        torch.accelerator.synchronize()


def gathered(parameters: Iterable[torch.nn.Parameter]) -> AbstractContextManager:
    """Makes parameters whole that DeepSpeed's ZeRO-3 has partitioned; all ranks enter it together."""
    parameters = list(parameters)
    if not any(hasattr(parameter, "ds_id") for parameter in parameters):
        return nullcontext()
    from deepspeed import zero

    return zero.GatheredParameters(parameters)
