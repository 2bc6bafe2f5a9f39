"""Counts the memory of a call: on CUDA by the allocator, on other devices by each tensor's storage."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterable

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

GIB = 2**30


def bytes_of(tensors: Iterable[torch.Tensor]) -> int:
    """The bytes of tensors, of which several may share memory."""
    return sum({id(tensor.untyped_storage()): tensor.untyped_storage().nbytes() for tensor in tensors}.values())


class LiveMemory(TorchDispatchMode):
    """Counts the bytes of tensors that are made inside it. `peak` is the most that lived at one time.

    Args:
        known (`Iterable[torch.Tensor]`): Tensors from before. They and their views do not count.
    """

    def __init__(self, known: Iterable[torch.Tensor]):
        super().__init__()
        self.live = self.peak = 0
        # By the id of a storage's Python object, which lives as long as the storage.
        self._seen: dict[int, weakref.ref | None] = {}
        for tensor in known:
            self._seen[id(tensor.untyped_storage())] = None
        self._known = list(known)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self._count(tensor.untyped_storage())
        return out

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = id(storage), storage.nbytes()
        if key in self._seen:
            return

        def free(_: weakref.ref) -> None:
            self.live -= size
            del self._seen[key]

        self._seen[key] = weakref.ref(storage, free)
        self.live += size
        self.peak = max(self.peak, self.live)


def peak_memory(run: Callable[[], object], known: list[torch.Tensor]) -> int:
    """The most bytes that `run` held at one time, without what lived before it.

    Args:
        run (`Callable`): A call on CUDA or a CPU.
        known (`list[torch.Tensor]`): All tensors from before that it uses. CUDA reads only their device.
    """
    if known[0].is_cuda:
        gc.collect()
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with LiveMemory(known) as memory:
        run()
    return memory.peak
