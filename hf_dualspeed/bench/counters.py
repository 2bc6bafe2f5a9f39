"""What is counted of a step: floating-point operations, memory, and waits for the device.

[`cached_batch`] makes the batch of a step whose vision features come from the cache.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial, wraps
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode, bmm_flop, sdpa_backward_flop_count, sdpa_flop_count

from ..feature_cache.cache import FeatureCache
from ..feature_cache.units import UNITS, units_of
from ..pruning.encoding import encode
from ..trainer.trainer import DualSpeedTrainer
from ..utils.memory import LiveMemory, peak_memory

__all__ = ["LiveMemory", "cached_batch", "count_syncs", "device_waits", "flops_of", "peak_memory"]

FLOP_COUNTING = (
    "torch.utils.flop_counter.FlopCounterMode over one training_step with SDPA; CPU flash attention by "
    "torch's own attention formulas, registered through custom_mapping; causal masks not deducted"
)


def flops_of(run: Callable[[], object]) -> int:
    """The floating-point operations of a call, with its backward if it runs one."""
    with FlopCounterMode(display=False, custom_mapping=OWN_FORMULAS) as counter:
        run()
    return counter.get_total_flops()


def with_heads_of(query: torch.Size, *shapes: torch.Size) -> list[tuple[int, ...]]:
    """Shapes of keys and values `(B, H', S, d)`, with the H heads of the query `(B, H, S, d)`.

    The formulas of torch before 2.11 do not know grouped heads.
    """
    return [(shape[0], query[1], *shape[2:]) for shape in shapes]


# FlopCounterMode has no formulas for the CPU's flash attention, and torch 2.13's of `bmm` fails where the type of the
# result is given, as in DivPrune's kernel.
OWN_FORMULAS = {
    torch.ops.aten.bmm: lambda one, other, *_, **__: bmm_flop(one, other),
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
