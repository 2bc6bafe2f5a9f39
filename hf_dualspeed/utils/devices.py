"""Transfers between devices and the host, and what several devices share or wait for."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import count

import torch
from torch import distributed

# Numbers the bodies of `others_wait`, alike in all processes.
BODIES = count()


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


@contextmanager
def others_wait() -> Iterator[None]:
    """At the end of the body, all processes wait for the first one, however long its body takes.

    A barrier alone would end all of them at the timeout of collectives, which is half an hour.
    """
    yield
    if not distributed.is_initialized():
        return
    store, past = distributed.distributed_c10d._get_default_store(), f"hf_dualspeed/past/{next(BODIES)}"
    if distributed.get_rank() == 0:
        store.set(past, "1")
    while not store.check([past]):
        time.sleep(0.1)
