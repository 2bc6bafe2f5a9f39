"""Images that a batch holds several times: each is encoded once, and its tokens stand in all its places.

Shapes: U images, R rows of pixels, T tokens of the batch, D hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

REPEATS = "image_repeats"  # key in the batch; the trainer removes it before the model's forward
PIXELS = "pixel_values"
COUNTS = "batch_num_images"  # images of each sample, of which LLaVA-OneVision cuts those into tiles that are alone
BESIDE = ("pixel_", "image_", "spatial_", "target_")  # prefixes of inputs with a value for each image
VIDEO = "video"  # part of the names of video inputs, which do not count
SAMPLED = 64  # values of an image that are compared before all of them are


@dataclass
class Repeats:
    """Which images of a batch are the same.

    Args:
        first (`list[int]`): the distinct images, by the place where each comes first.
        places (`list[int]`): for each of the U images, its place in `first`.
        sizes (`list[int]`): rows of pixels of each of the U images: 1, or its patches.
    """

    first: list[int]
    places: list[int]
    sizes: list[int]

    def to(self, *given: Any, **options: Any) -> Repeats:
        """Itself: it holds no tensors. accelerate moves a batch by this."""
        return self

    def distinct(self, inputs: Mapping) -> dict:
        """The inputs with the distinct images only."""
        # Pixels (R, ...): the rows of each image. Other values of images: one row each.
        ends = [0]
        for size in self.sizes:
            ends.append(ends[-1] + size)
        pixels = [inputs[PIXELS][ends[index] : ends[index + 1]] for index in self.first]
        beside = {key: torch.stack([inputs[key][index] for index in self.first]) for key in values_of_images(inputs)}
        return {**inputs, **beside, PIXELS: torch.cat(pixels)}


def values_of_images(inputs: Mapping) -> list[str]:
    """The inputs beside pixels that hold values of images."""
    prefixes = (*BESIDE, COUNTS)
    return [key for key in inputs if key.startswith(prefixes) and key not in (PIXELS, REPEATS) and VIDEO not in key]


def reads_more(names: Iterable[str], inputs: Mapping) -> bool:
    """Whether an encoder with arguments of these `names` reads tensors that are not known to be values of images, such
    as the questions that InstructBLIP's reads beside its images."""
    known = {PIXELS, *values_of_images(inputs)}
    return any(isinstance(inputs.get(name), torch.Tensor) for name in set(names) - known)


def repeats_of(batch: Mapping) -> Repeats | None:
    """Which images of a batch are the same, to the bit; None if all differ or they are in no known form."""
    pixels, grid, beside = batch.get(PIXELS), batch.get("image_grid_thw"), values_of_images(batch)
    if not isinstance(pixels, torch.Tensor) or pixels.dim() < 2:
        return None
    counts = batch.get(COUNTS)
    if counts is not None and (torch.as_tensor(counts) != 1).any():  # they are no values of single images
        return None
    # Patches (R, C * h * w), whose number for each image the grid (U, 3) says, or a row for each image.
    sizes = [1] * len(pixels) if grid is None else grid.prod(-1).tolist()
    values = [batch[key] for key in beside]
    if sum(sizes) != len(pixels) or not all(isinstance(v, torch.Tensor) and len(v) == len(sizes) for v in values):
        return None
    units = [[rows, *(value[i] for value in values)] for i, rows in enumerate(pixels.split(sizes))]
    # Images with some equal values are compared in full.
    first, places, seen = [], [], {}
    for index, unit in enumerate(units):
        flat = unit[0].flatten()
        alike = seen.setdefault((len(flat), *flat[:: max(1, len(flat) // SAMPLED)].tolist()), [])
        same = next((place for place in alike if all(map(torch.equal, units[first[place]], unit))), None)
        if same is None:
            same = len(first)
            alike.append(same)
            first.append(index)
        places.append(same)
    return Repeats(first, places, sizes) if len(first) < len(places) else None


class WithRepeats:
    """Wraps a collator and adds the batch's [`Repeats`], if there are any.

    Args:
        collator (`Callable`): makes a batch.
    """

    def __init__(self, collator: Callable[[list], dict[str, Any]]):
        self.collator = collator

    def __call__(self, examples: list) -> dict[str, Any]:
        batch = self.collator(examples)
        repeats = repeats_of(batch)
        return batch if repeats is None else {**batch, REPEATS: repeats}
