"""Blocks of a frozen vision tower that are counted once, and then repeated without running.

A tower's blocks are alike, and every step runs them on images of one size. On tensors without data a block in which
nothing is learned makes the same tensors each time, so that one count stands for all that are like it. Qwen2.5-VL's
blocks go window by window, and would take most of the time of an estimate.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import _get_current_dispatch_mode
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from ..models.components import role_modules
from ..models.interface import unwrap
from .counters import LiveMemory

PLAIN = (bool, int, float, str, tuple, list, type(None))
PLACES = ("layer_idx", "layer_index")  # settings of a block that do not change what it makes


@dataclass(frozen=True)
class Made:
    """What a block made.

    Args:
        peak (`int`): bytes at its peak, beyond those from before it.
        flops (`int`): its operations.
        tensors (`list`): shape, strides and type of each tensor that it returned.
        structure (`TreeSpec`): how it returned them.
    """

    peak: int
    flops: int
    tensors: list[tuple[torch.Size, tuple[int, ...], torch.dtype]]
    structure: TreeSpec


def repeat_blocks(model: nn.Module) -> None:
    """Lets the frozen blocks of a vision tower without data run once for each kind of block and of inputs."""
    known: dict[Hashable, Made | None] = {}
    modules = [module for tower in role_modules(unwrap(model))["vision_tower"] for module in tower.modules()]
    for block in (block for module in modules if isinstance(module, nn.ModuleList) for block in module):
        parameters = list(block.parameters())
        if parameters and not any(parameter.requires_grad for parameter in parameters):
            block.forward = repeated(block.forward, kind_of(block), parameters[0], known)


def repeated(forward: Callable, kind: Hashable, parameter: FakeTensor, known: dict[Hashable, Made | None]) -> Callable:
    """A block's forward, which runs where nothing is counted, something is learned, or its like has not run yet."""

    def call(*args, **kwargs):
        counts, (inputs, structure) = _get_current_dispatch_mode(), tree_flatten((args, kwargs))
        tensors = [value for value in inputs if isinstance(value, torch.Tensor)]
        learns = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
        if learns or not isinstance(counts, LiveMemory):
            return forward(*args, **kwargs)
        key = kind, torch.is_autocast_enabled("cpu"), structure, *map(told, inputs)
        if known.get(key) is None:
            out, known[key] = measured(counts, forward, args, kwargs, tensors)
            return out
        made = known[key]
        counts.flops += made.flops
        counts.peak = max(counts.peak, counts.live + made.peak)
        out = [parameter.new_empty_strided(size, strides, dtype=dtype) for size, strides, dtype in made.tensors]
        return tree_unflatten(out, made.structure)

    return call


def measured(
    counts: LiveMemory, forward: Callable, args: tuple, kwargs: dict, inputs: list[torch.Tensor]
) -> tuple[object, Made | None]:
    """Runs a block. What it made is None if it is not to be repeated: it returned a view, or a thing with data."""
    before, live, flops = counts.peak, counts.live, counts.flops
    counts.peak = live
    out = forward(*args, **kwargs)
    tensors, structure = tree_flatten(out)
    peak, counts.peak = counts.peak - live, max(before, counts.peak)
    if not all(isinstance(tensor, FakeTensor) for tensor in tensors):
        return out, None
    storages = [tensor.untyped_storage() for tensor in tensors]
    apart = len({*map(id, storages)}) == len(storages) and not {*map(id, storages)} & {
        id(tensor.untyped_storage()) for tensor in inputs
    }
    whole = all(storage.nbytes() == tensor.nbytes for storage, tensor in zip(storages, tensors, strict=True))
    shapes = [(tensor.shape, tensor.stride(), tensor.dtype) for tensor in tensors]
    return out, Made(peak, counts.flops - flops, shapes, structure) if apart and whole else None


def kind_of(block: nn.Module) -> Hashable:
    """What tells blocks apart: their modules with plain settings, and the shapes of their parameters."""
    modules = []
    for name, module in block.named_modules():
        settings = {key: value for key, value in vars(module).items() if isinstance(value, PLAIN) and key not in PLACES}
        modules.append((name, type(module), repr(settings)))
    return *modules, *((name, p.shape, p.dtype) for name, p in block.named_parameters())


def told(value: object) -> Hashable:
    """What tells inputs apart: the shape of tensors, the numbers of whole ones with data, and what else there is."""
    if not isinstance(value, torch.Tensor):
        return value if isinstance(value, Hashable) else repr(value)
    numbers = () if isinstance(value, FakeTensor) or value.is_floating_point() else value.numpy(force=True).tobytes()
    return value.shape, value.stride(), value.dtype, numbers
