"""Where each visual token lies in its image, and which patch of the vision tower made it."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise

import torch
from torch import nn


@dataclass
class TokenLayout:
    """The visual tokens of each image of a batch, on the CPU.

    Args:
        grids (`list[torch.Tensor]`): (t, row, column) of each token, `(n_i, 3)`.
        patches (`list[torch.Tensor]`): its place in the tower's flattened output, `(n_i,)`; -1 where no patch made it.
        total (`int`): patches that the tower puts out for the whole batch; 0 where tokens have no patch of their own.
    """

    grids: list[torch.Tensor]
    patches: list[torch.Tensor]
    total: int


def token_layout(
    owner: nn.Module, inputs: Mapping, modality: str, parts: list[list[int]], lengths: list[int]
) -> TokenLayout:
    """The layout of what `owner` encoded from `inputs`.

    Args:
        owner (`nn.Module`): the module that owns the encoder.
        inputs (`Mapping`): the batch.
        modality (`str`): "image", "video" or "audio".
        parts (`list[list[int]]`): tokens of each part (frame) of each image or clip.
        lengths (`list[int]`): tokens of each unit of the result, in the same order.
    """
    if modality == "audio":  # time alone: one row
        return one_patch_each([rectangle(1, 1, sum(unit)) for unit in parts], lengths)
    sides = frame_sides(owner, inputs, modality, [sum(unit) for unit in parts])
    if sides is not None:
        grids = [rectangle(sum(unit) // (h * w), h, w) for unit, (h, w) in zip(parts, sides, strict=True)]
        return one_patch_each(grids, lengths)
    if modality == "image" and hasattr(owner, "image_newline") and inputs.get("image_sizes") is not None:
        return any_resolution_layout(owner, inputs)
    return one_patch_each([frames(unit) for unit in parts], lengths)


def frame_sides(owner: nn.Module, inputs: Mapping, modality: str, lengths: list[int]) -> list[tuple[int, int]] | None:
    """Rows and columns of the tokens of each image, or of each clip's frames, of `lengths` tokens; None without a
    grid. Grids count patches, which the tower merges in squares, or tokens."""
    grid_thw = inputs.get(f"{modality}_grid_thw")
    if grid_thw is None or len(grid_thw) != len(lengths):
        return None
    vision = getattr(owner.config, "vision_config", None)
    sizes = (getattr(config, "spatial_merge_size", None) for config in (vision, owner.config))
    options = [[(t, h // merge, w // merge) for t, h, w in grid_thw.tolist()] for merge in (*filter(None, sizes), 1)]
    # Some towers merge neighbouring frames too, so that fewer tokens than frames * rows * columns are also right.
    for fits in (lambda n, t, h, w: n == t * h * w, lambda n, t, h, w: h * w and n % (h * w) == 0):
        for grids in options:
            if all(fits(n, *grid) for n, grid in zip(lengths, grids, strict=True)):
                return [(h, w) for _, h, w in grids]
    return None


def one_patch_each(grids: list[torch.Tensor], lengths: list[int]) -> TokenLayout:
    """The layout where the tower's patches, in order, are the tokens."""
    total = sum(lengths)
    return TokenLayout(list(torch.cat(grids).split(lengths)), list(torch.arange(total).split(lengths)), total)


def frames(sizes: list[int]) -> torch.Tensor:
    """Grid of one image or clip, a square per frame, `(sum sizes, 3)`."""
    grids = [square(n) for n in sizes]
    for index, grid in enumerate(grids):
        grid[:, 0] = index
    return torch.cat(grids)


def clips(owner: nn.Module, parts: list[list[int]], inputs: Mapping) -> list[list[int]]:
    """Tokens of each frame of each clip, from those of each part of each unit that the video encoder returned.

    Units may be clips, with or without their frames told apart, or frames. What is left over when a clip's tokens are
    divided among its frames, such as a closing newline, goes to the last.
    """
    grid_thw, pixels = inputs.get("video_grid_thw"), inputs.get("pixel_values_videos")
    if grid_thw is not None:
        counts = grid_thw[:, 0].tolist()
    elif isinstance(pixels, torch.Tensor) and pixels.dim() >= 5:
        counts = [pixels.shape[1]] * pixels.shape[0]
    else:
        return parts
    flat = [n for unit in parts for n in unit]
    if len(flat) == sum(counts):  # a part is a frame
        each = iter(flat)
        return [[next(each) for _ in range(count)] for count in counts]
    if len(parts) != len(counts):
        return parts
    sides = frame_sides(owner, inputs, "video", [sum(unit) for unit in parts]) or [None] * len(parts)
    return [split_frames(sum(unit), count, side) for unit, count, side in zip(parts, counts, sides, strict=True)]


def split_frames(tokens: int, count: int, side: tuple[int, int] | None) -> list[int]:
    """Tokens of each frame of a clip of `tokens`; some towers merge neighbouring frames."""
    if side is not None:
        return [side[0] * side[1]] * (tokens // (side[0] * side[1]))
    each = tokens // count
    return [each] * (count - 1) + [tokens - each * (count - 1)]


def units_by_runs(parts: list[list[int]], runs: list[int]) -> list[list[int]]:
    """Tokens of each part of each run of placeholders; a run that is not made of whole parts is one part."""
    flat = [n for unit in parts for n in unit if n]
    if sum(flat) != sum(runs):  # placeholders and features differ, which shortening reports
        return parts
    units, ends = [], [0, *torch.tensor(flat).cumsum(0).tolist()]
    begin = 0
    for length in runs:
        inside = [end for end in ends if begin <= end <= begin + length]
        whole = len(inside) > 1 and inside[0] == begin and inside[-1] == begin + length
        units.append([b - a for a, b in pairwise(inside)] if whole else [length])
        begin += length
    return units


def masked_parts(parts: list[list[int]], kept: torch.Tensor) -> list[list[int]]:
    """What is left of each part where a mask `(T,)` takes rows out. Waits for the device."""
    counts = iter(piece.sum() for piece in kept.split([n for unit in parts for n in unit]))
    return [[int(next(counts)) for _ in unit] for unit in parts]


def placeholder_runs(input_ids: torch.Tensor, token_id: int) -> list[int]:
    """Lengths of the runs of placeholders in the rows of `(B, S)`: the units of an encoder that returns one flat
    tensor. Waits for the device."""
    is_token = torch.nn.functional.pad(input_ids == token_id, (1, 0))
    begins = (is_token[:, 1:] & ~is_token[:, :-1]).flatten()
    run = begins.cumsum(0)[is_token[:, 1:].flatten()]
    return torch.bincount(run)[1:].tolist()


def rectangle(frames: int, rows: int, columns: int) -> torch.Tensor:
    """(t, row, column) of a full grid in raster order, `(frames * rows * columns, 3)`."""
    return torch.cartesian_prod(torch.arange(frames), torch.arange(rows), torch.arange(columns)).view(-1, 3)


def square(count: int) -> torch.Tensor:
    """A square grid; one row where `count` is no square."""
    side = math.isqrt(count)
    return rectangle(1, side, side) if side * side == count else rectangle(1, 1, count)


def any_resolution_layout(owner: nn.Module, inputs: Mapping) -> TokenLayout:
    """LLaVA-NeXT and its like: a base view, then the tiles merged, cut to the image's shape, with a newline per row.

    The model's own packing is run on patch indices in place of features, with -1 as the newline, so that the layout
    can't differ from it. Where LLaVA-OneVision interpolates, no single patch makes a token: `total` is 0 then.
    """
    from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

    config, sizes = owner.config, inputs["image_sizes"].cpu()
    vision = config.vision_config
    shrinks = Fraction(getattr(config, "downsample_rate", None) or 1)
    side = int(vision.image_size // vision.patch_size * shrinks)
    images = inputs.get("batch_num_images")
    alone = [n == 1 for n in images.tolist() for _ in range(n)] if images is not None else [True] * len(sizes)
    tiles = [
        image_size_to_num_patches(size, config.image_grid_pinpoints, vision.image_size) if single else 1
        for size, single in zip(sizes.tolist(), alone, strict=True)
    ]
    # float64, because packing wants floats and must not round an index
    index = torch.arange(sum(tiles) * side * side, dtype=torch.float64).view(-1, side * side, 1)
    options = {
        "image_newline": torch.full((1,), -1.0, dtype=torch.float64),
        "vision_feature_select_strategy": getattr(config, "vision_feature_select_strategy", None),
        "vision_aspect_ratio": getattr(config, "vision_aspect_ratio", None),
    }
    names = inspect.signature(owner.pack_image_features).parameters
    options = {key: value for key, value in options.items() if key in names}
    packed = owner.pack_image_features(list(index.split(tiles)), sizes, **options)
    packed = packed[0] if isinstance(packed, tuple) else packed  # most give the lengths beside it
    exact = shrinks == 1 and all(torch.equal(rows, rows.round()) for rows in packed)
    patches = [rows[:, 0].round().long() for rows in packed]
    grids = [any_resolution_grid(rows, side) for rows in patches]
    return TokenLayout(grids, patches, index.numel() if exact else 0)


def any_resolution_grid(patches: torch.Tensor, side: int) -> torch.Tensor:
    """Grid of one packed image: `side * side` base tokens at t = 0, then rows that end in a newline at t = 1."""
    rest = patches[side * side :]
    if not len(rest):  # an image so thin that nothing of its tiles is left
        return rectangle(1, side, side)
    width = int((rest == -1).nonzero()[0]) + 1
    detail = rectangle(1, len(rest) // width, width)
    detail[:, 0] = 1
    return torch.cat([rectangle(1, side, side), detail])
