"""The images of a batch, identified by hashes of their contents, which are the keys of the feature cache.

Shapes: B samples, I images or tiles of a sample, U units, P patches of the batch, C channels, h height, w width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from hashlib import blake2b
from typing import Any

import torch

from ..pruning.repeats import BESIDE, VIDEO
from .store import FeatureStore

UNITS = "image_units"  # key in the batch; the trainer removes it before the model's forward
PIXELS = ("pixel_values", "pixel_values_images")
REMEDY = "Set vision_feature_cache=None to train without the cache."


@dataclass
class ImageUnits:
    """The units of a batch that the tower encodes independently, and their stored features.

    Args:
        keys (`list[str]`): a hash of each unit's pixels and of the tower's further inputs for it.
        padding (`list[bool]`): whether a unit is all zeros, like the tiles that fill up a batch.
        sizes (`list[int]`): rows of the tower's pixels per unit: 1, or its patches.
        found (`list[str]`): keys of the stored units, each once.
        lengths (`dict[str, list[int]]`): rows of each stored unit in each tensor.
        features (`dict[str, torch.Tensor]`): their concatenated tensors.
    """

    keys: list[str]
    padding: list[bool]
    sizes: list[int]
    found: list[str]
    lengths: dict[str, list[int]]
    features: dict[str, torch.Tensor]

    def to(self, device: torch.device | str, non_blocking: bool = False) -> ImageUnits:
        """A copy with features on `device`, as accelerate moves a batch."""
        moved = {name: tensor.to(device, non_blocking=non_blocking) for name, tensor in self.features.items()}
        return replace(self, features=moved)

    def pin_memory(self) -> ImageUnits:
        """A copy in pinned memory, as a data loader asks for."""
        return replace(self, features={name: tensor.pin_memory() for name, tensor in self.features.items()})


class WithImageUnits:
    """Wraps a collator and adds the batch's [`ImageUnits`] with their features from `cache.store`.

    Args:
        collator (`Callable`): makes a batch.
        cache: has the `store` once training has started.
    """

    def __init__(self, collator: Callable[[list], dict[str, Any]], cache: Any):
        self.collator, self.cache = collator, cache

    def __call__(self, examples: list) -> dict[str, Any]:
        batch = self.collator(examples)
        units = None if self.cache.store is None else units_of(batch, self.cache.store)
        return batch if units is None else {**batch, UNITS: units}


def units_of(batch: dict[str, Any], store: FeatureStore) -> ImageUnits | None:
    """The units of a batch's images; None if it has none.

    Raises:
        ValueError: its pixels are in no known form.
    """
    name = next((key for key in PIXELS if batch.get(key) is not None), None)
    if name is None:
        return None
    keys, padding, sizes = keyed(batch, name)
    # Read each key once; drop units whose tensors have other names than the first stored one's.
    read = {key: store.read(key) for key in dict.fromkeys(keys)}
    stored = {key: tensors for key, tensors in read.items() if tensors is not None}
    names = [*next(iter(stored.values()), {})]
    stored = {key: tensors for key, tensors in stored.items() if [*tensors] == names}
    # Concatenate the stored units, tensor by tensor.
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
        # Patches of all images (P, C * h * w): the grid gives the patches of each image.
        sizes = grid.prod(-1).tolist()
        units = pixels.split(sizes)
        extras = [[value[i] for value in beside.values() if len(value) == len(grid)] for i in range(len(grid))]
    elif grid is None and isinstance(pixels, torch.Tensor) and pixels.dim() in (3, 4, 5):
        # Images (U, C, h, w), or tiles of samples (B, I, C, h, w): one row per unit.
        shape = pixels.shape[:2] if pixels.dim() == 5 else pixels.shape[:1]
        units, sizes = pixels.flatten(0, len(shape) - 1), [1] * shape.numel()
        extras = [[] for _ in sizes]
        for value in beside.values():
            if len(value) == shape[0]:  # one for each unit, or for all units of a sample
                rows = value.flatten(0, 1) if value.shape[: len(shape)] == shape and len(shape) == 2 else value
                for i, own in enumerate(extras):
                    own.append(rows[i * len(rows) // len(extras)])
    else:
        form = tuple(pixels.shape) if isinstance(pixels, torch.Tensor) else type(pixels).__name__
        raise ValueError(
            f"`vision_feature_cache` is set, but the batch's `{name}` ({form}) is neither images or tiles in rows nor "
            f"patches with `image_grid_thw`, so single images cannot be told apart. {REMEDY}"
        )
    keys = [digest([unit, *more]) for unit, more in zip(units, extras, strict=True)]
    return keys, [not unit.any() for unit in units], sizes


def digest(tensors: list[torch.Tensor]) -> str:
    """A hash of the values, shapes and dtypes of tensors, which are copied to the host if necessary."""
    found = blake2b(digest_size=16)
    for tensor in tensors:
        found.update(f"{tuple(tensor.shape)}{tensor.dtype}".encode())
        found.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return found.hexdigest()
