"""Transfers between devices and the host."""

from __future__ import annotations

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
