"""The images of a batch by their contents, as keys of the feature cache."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from hashlib import blake2b
from typing import Any

import torch

from .store import FeatureStore

UNITS = "image_units"  # the batch's key; the trainer takes it out before the model sees the batch
PIXELS = ("pixel_values", "pixel_values_images")
BESIDE = ("pixel_", "image_", "spatial_")  # tensors that tell the tower more of each image begin with these
VIDEO = "video"  # and those of videos have this in their names
REMEDY = "Set vision_feature_cache=None to train without the cache."


@dataclass
class ImageUnits:
    """The units of a batch that the tower encodes each by itself, and what is stored of them.

    Args:
        keys (`list[str]`): a hash of each unit's pixels and of what else the tower is told of it.
        padding (`list[bool]`): whether a unit is all zeros, as tiles are that fill a batch up.
        sizes (`list[int]`): rows of the tower's pixels that each unit takes: 1, or its patches.
        found (`list[str]`): keys of the units that were found, each once.
        lengths (`dict[str, list[int]]`): rows of each of them in each tensor.
        features (`dict[str, torch.Tensor]`): their tensors, one behind the other.
    """

    keys: list[str]
    padding: list[bool]
    sizes: list[int]
    found: list[str]
    lengths: dict[str, list[int]]
    features: dict[str, torch.Tensor]

    def to(self, device: torch.device | str, non_blocking: bool = False) -> ImageUnits:
        """The same with features on `device`, as accelerate moves a batch."""
        moved = {name: tensor.to(device, non_blocking=non_blocking) for name, tensor in self.features.items()}
        return replace(self, features=moved)

    def pin_memory(self) -> ImageUnits:
        """The same in pinned memory, as a data loader wants it."""
        return replace(self, features={name: tensor.pin_memory() for name, tensor in self.features.items()})


class WithImageUnits:
    """Wraps a collator: adds the batch's [`ImageUnits`], with what `cache.store` holds of them.

    Args:
        collator (`Callable`): makes a batch.
        cache: has the `store`, from when training starts.
    """

    def __init__(self, collator: Callable[[list], dict[str, Any]], cache: Any):
        self.collator, self.cache = collator, cache

    def __call__(self, examples: list) -> dict[str, Any]:
        batch = self.collator(examples)
        units = None if self.cache.store is None else units_of(batch, self.cache.store)
        return batch if units is None else {**batch, UNITS: units}


def units_of(batch: dict[str, Any], store: FeatureStore) -> ImageUnits | None:
    """The units of a batch's images, or None where it has none.

    Raises:
        ValueError: its pixels are of no known form.
    """
    name = next((key for key in PIXELS if batch.get(key) is not None), None)
    if name is None:
        return None
    keys, padding, sizes = keyed(batch, name)
    read = {key: store.read(key) for key in dict.fromkeys(keys)}
    stored = {key: tensors for key, tensors in read.items() if tensors is not None}
    names = [*next(iter(stored.values()), {})]
    stored = {key: tensors for key, tensors in stored.items() if [*tensors] == names}
    lengths = {name: [len(tensors[name]) for tensors in stored.values()] for name in names}
    features = {name: torch.cat([tensors[name] for tensors in stored.values()]) for name in names}
    return ImageUnits(keys, padding, sizes, [*stored], lengths, features)


def keyed(batch: dict[str, Any], name: str) -> tuple[list[str], list[bool], list[int]]:
    """Keys of the units of `batch[name]`, whether each is padding, and the rows of each."""
    pixels, grid = batch[name], batch.get("image_grid_thw")
    beside = {
        key: value
        for key, value in batch.items()
        if key.startswith(BESIDE) and key not in PIXELS and VIDEO not in key
        if isinstance(value, torch.Tensor) and value.dim()
    }
    if grid is not None and isinstance(pixels, torch.Tensor) and grid.prod(-1).sum() == len(pixels):
        sizes = grid.prod(-1).tolist()
        units = pixels.split(sizes)
        told = [[value[i] for value in beside.values() if len(value) == len(grid)] for i in range(len(grid))]
    elif grid is None and isinstance(pixels, torch.Tensor) and pixels.dim() in (3, 4, 5):
        shape = pixels.shape[:2] if pixels.dim() == 5 else pixels.shape[:1]
        units, sizes = pixels.flatten(0, len(shape) - 1), [1] * shape.numel()
        told = [[] for _ in sizes]
        for value in beside.values():
            if len(value) == shape[0]:  # one for each unit, or for all units of a sample
                rows = value.flatten(0, 1) if value.shape[: len(shape)] == shape and len(shape) == 2 else value
                for i, own in enumerate(told):
                    own.append(rows[i * len(rows) // len(told)])
    else:
        form = tuple(pixels.shape) if isinstance(pixels, torch.Tensor) else type(pixels).__name__
        raise ValueError(
            f"`vision_feature_cache` is set, but the batch's `{name}` ({form}) is neither images or tiles in rows nor "
            f"patches with `image_grid_thw`, so single images cannot be told apart. {REMEDY}"
        )
    keys = [digest([unit, *more]) for unit, more in zip(units, told, strict=True)]
    return keys, [not unit.any() for unit in units], sizes


def digest(tensors: list[torch.Tensor]) -> str:
    """A hash of the values, shapes and types of tensors, which lie on the host or are copied there."""
    found = blake2b(digest_size=16)
    for tensor in tensors:
        found.update(f"{tuple(tensor.shape)}{tensor.dtype}".encode())
        found.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return found.hexdigest()
