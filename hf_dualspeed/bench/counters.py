"""What is counted of a step: floating-point operations, memory, and waits for the device.

[`cached_batch`] makes the batch of a step whose vision features come from the cache.
"""

from __future__ import annotations

import gc
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial, wraps
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from ..feature_cache.cache import FeatureCache
from ..feature_cache.units import UNITS, units_of
from ..pruning.encoding import encode
from ..trainer.trainer import DualSpeedTrainer

FLOP_COUNTING = (
    "torch.utils.flop_counter.FlopCounterMode over one training_step with SDPA; CPU flash attention by "
    "torch's own attention formulas, registered through custom_mapping; causal masks not deducted"
)


def flops_of(run: Callable[[], object]) -> int:
    """The floating-point operations of a call, with its backward if it runs one."""
    with FlopCounterMode(display=False, custom_mapping=CPU_FORMULAS) as counter:
        run()
    return counter.get_total_flops()


def with_heads_of(query: torch.Size, *shapes: torch.Size) -> list[tuple[int, ...]]:
    """Shapes of keys and values `(B, H', S, d)`, with the H heads of the query `(B, H, S, d)`.

    The formulas of torch before 2.11 do not know grouped heads.
    """
    return [(shape[0], query[1], *shape[2:]) for shape in shapes]


# FlopCounterMode has no formulas for the CPU's flash attention.
CPU_FORMULAS = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: lambda query, key, value, *_, **__: sdpa_flop_count(
        query, *with_heads_of(query, key, value)
    ),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda gradient, query, key, value, *_, **__: (
        sdpa_backward_flop_count(gradient, query, *with_heads_of(query, key, value))
    ),
}

MEMORY_COUNTING = (
    "bytes of live tensors at the peak of a call, less those from before it (weights, and gradients, which exist "
    "beforehand as in gradient accumulation); on CUDA by the allocator, on a CPU by each tensor's storage, "
    "without what kernels use inside"
)


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


# Methods that hand a tensor's values to Python. On an accelerator, each waits for all earlier work.
VALUES = ("item", "tolist", "__bool__", "__int__", "__float__", "__index__", "nonzero", "cpu", "numpy")


@contextmanager
def count_syncs() -> Iterator[list[str]]:
    """Yields a list of the calls of [`VALUES`] inside the context, by name.

    The list is the same on a CPU, where nothing waits. Boolean indexing also waits, but is not in it.
    """
    waits: list[str] = []

    def counted(name: str):
        original = getattr(torch.Tensor, name)

        @wraps(original)
        def call(tensor, *args, **kwargs):
            waits.append(name)
            return original(tensor, *args, **kwargs)

        return call

    for name in VALUES:
        setattr(torch.Tensor, name, counted(name))
    try:
        yield waits
    finally:
        for name in VALUES:  # Tensor inherits all of them
            delattr(torch.Tensor, name)


@contextmanager
def device_waits() -> Iterator[list[str]]:
    """Yields a list of the waits for a CUDA device inside the context, each as "folder/file.py:line".

    CUDA reports them, boolean indexing and copies from the host included. The list is filled at the end.
    """
    before, places = torch.cuda.get_sync_debug_mode(), []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield places
        finally:
            torch.cuda.set_sync_debug_mode(before)
    found = [warning for warning in caught if "synchronizing CUDA operation" in str(warning.message)]
    places += ["/".join(Path(warning.filename).parts[-2:]) + f":{warning.lineno}" for warning in found]


ROOM = 8.0  # GiB, more than the features of any batch take


def cached_batch(trainer: DualSpeedTrainer, batch: dict, folder: str) -> dict | None:
    """The batch with its vision features, as a data loader makes it in a later epoch. Gives the trainer the cache.

    None where features cannot be cached, for example because the tower is trained or the pruner reads its attention.
    """
    cache = FeatureCache(folder, ROOM, trainer.dual_forward.pruner, trainer.accelerator.mixed_precision)
    try:
        cache.begin(trainer.model)
        with torch.no_grad():
            encode(trainer.dual_forward.interface, batch, served=partial(cache.serving, units_of(batch, cache.store)))
    except ValueError:
        return None
    cache.flush()
    trainer.feature_cache = cache
    return {**batch, UNITS: units_of(batch, cache.store).to(trainer.args.device)}
