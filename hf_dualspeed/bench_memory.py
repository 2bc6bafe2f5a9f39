"""The most memory that a call needs beside what lives before it."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterable

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

MEMORY_COUNTING = (
    "bytes of live tensors at the peak of a call, less those from before it (weights, and gradients, which exist "
    "beforehand as in gradient accumulation); on CUDA by the allocator, on a CPU by each tensor's storage, "
    "without what kernels use inside"
)


class LiveMemory(TorchDispatchMode):
    """Counts the bytes of tensors that come to life inside it; `peak` is the most there were at a time.

    Args:
        known: tensors from before, which do not count, nor do views of them.
    """

    def __init__(self, known: Iterable[torch.Tensor]):
        super().__init__()
        self.live = self.peak = 0
        # Python's object of a storage lives as long as the storage does.
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
    """The most bytes that `run` held at a time beside what lived before it.

    Args:
        run: a call on CUDA or a CPU.
        known (`list[torch.Tensor]`): all tensors from before that it uses; asked for on a CPU alone.
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
