"""Counters around a step: floating-point operations, memory, waits for the device, and features from the cache."""

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

ROOM = 8.0  # GiB, more than the features of any batch


def cached_batch(trainer: DualSpeedTrainer, batch: dict, folder: str) -> dict | None:
    """The batch with its features, as a data loader hands them over in a second epoch, and a cache for the trainer.

    None where they cannot be cached: the tower is trained in part, say, or the pruner reads its attention.
    """
    cache = FeatureCache(folder, ROOM, trainer.dual_forward.pruner, trainer.accelerator.mixed_precision)
    try:
        cache.begin(trainer.model)
        with torch.no_grad():
            encode(trainer.model, batch, served=partial(cache.serving, units_of(batch, cache.store)))
    except ValueError:
        return None
    cache.flush()
    trainer.feature_cache = cache
    return {**batch, UNITS: units_of(batch, cache.store).to(trainer.args.device)}


FLOP_COUNTING = (
    "torch.utils.flop_counter.FlopCounterMode over one training_step with SDPA; CPU flash attention by "
    "torch's own attention formulas, registered through custom_mapping; causal masks not deducted"
)


def flops_of(run: Callable[[], object]) -> int:
    """The floating-point operations of a call, backward included where it goes backward."""
    cpu = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    formulas = {
        cpu: lambda query, key, value, *_, **__: sdpa_flop_count(query, *with_heads_of(query, key, value)),
        backward: lambda gradient, query, key, value, *_, **__: sdpa_backward_flop_count(
            gradient, query, *with_heads_of(query, key, value)
        ),
    }
    with FlopCounterMode(display=False, custom_mapping=formulas) as counter:
        run()
    return counter.get_total_flops()


def with_heads_of(query: torch.Size, *shapes: torch.Size) -> list[tuple[int, ...]]:
    """Shapes of keys and values `(B, H', S, d)` whose heads are shared by groups of the query's, with a head for each:
    the formulas of torch before 2.11 know no groups."""
    return [(shape[0], query[1], *shape[2:]) for shape in shapes]


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


# What hands values of a tensor to Python; on an accelerator each of them waits for all work before it.
VALUES = ("item", "tolist", "__bool__", "__int__", "__float__", "__index__", "nonzero", "cpu", "numpy")


@contextmanager
def count_syncs() -> Iterator[list[str]]:
    """A list that gets the name of each method of [`VALUES`] that is called inside the context.

    It counts the same on a CPU, where nothing waits. Boolean indexing, which waits too, is not seen.
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
    """A list that gets where each wait for a CUDA device inside the context was: "folder/file.py:line".

    CUDA itself tells them, boolean indexing and copies from the host included; the list is filled at the end.
    """
    before, places = torch.cuda.get_sync_debug_mode(), []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield places
        finally:
            torch.cuda.set_sync_debug_mode(before)
    told = [warning for warning in caught if "synchronizing CUDA operation" in str(warning.message)]
    places += ["/".join(Path(warning.filename).parts[-2:]) + f":{warning.lineno}" for warning in told]
