"""Where each visual token lies in its image, and which patch of the vision tower made it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn


@dataclass
class TokenLayout:
    """The visual tokens of each image of a batch, on the CPU.

    Args:
        grids (`list[torch.Tensor]`): (t, row, column) of each token, `(n_i, 3)`.
        patches (`list[torch.Tensor]`): its place in the tower's flattened output, `(n_i,)`; -1 where no patch made it.
        total (`int`): patches that the tower puts out for the whole batch.
    """

    grids: list[torch.Tensor]
    patches: list[torch.Tensor]
    total: int


def token_layout(owner: nn.Module, inputs: Mapping, modality: str, lengths: list[int]) -> TokenLayout:
    """The layout of images of `lengths` tokens each, that `owner` encoded from `inputs`."""
    grid_thw = inputs.get(f"{modality}_grid_thw")
    if grid_thw is not None:  # Qwen-VL: native resolution, patches merged in squares
        merge = owner.config.vision_config.spatial_merge_size
        return one_patch_each([rectangle(t, h // merge, w // merge) for t, h, w in grid_thw.tolist()])
    if hasattr(owner, "image_newline") and inputs.get("image_sizes") is not None:
        return any_resolution_layout(owner, inputs)
    return one_patch_each([square(n) for n in lengths])


def one_patch_each(grids: list[torch.Tensor]) -> TokenLayout:
    """The layout where the tower's patches, in order, are the tokens."""
    lengths = [len(grid) for grid in grids]
    return TokenLayout(grids, list(torch.arange(sum(lengths)).split(lengths)), sum(lengths))


def rectangle(frames: int, rows: int, columns: int) -> torch.Tensor:
    """(t, row, column) of a full grid in raster order, `(frames * rows * columns, 3)`."""
    return torch.cartesian_prod(torch.arange(frames), torch.arange(rows), torch.arange(columns)).view(-1, 3)


def square(count: int) -> torch.Tensor:
    """A square grid; one row where `count` is no square."""
    side = math.isqrt(count)
    return rectangle(1, side, side) if side * side == count else rectangle(1, 1, count)


def any_resolution_layout(owner: nn.Module, inputs: Mapping) -> TokenLayout:
    """LLaVA-NeXT: a base view, then the tiles merged, cut to the image's shape and ended by a newline per row.

    The model's own packing is run on patch indices in place of features, with -1 as the newline, so that the layout
    can't differ from it.
    """
    from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

    vision, sizes = owner.config.vision_config, inputs["image_sizes"].cpu()
    side = vision.image_size // vision.patch_size
    tiles = [image_size_to_num_patches(s, owner.config.image_grid_pinpoints, vision.image_size) for s in sizes.tolist()]
    # float64, because packing wants floats and must not round an index
    index = torch.arange(sum(tiles) * side * side, dtype=torch.float64).view(-1, side * side, 1)
    packed, _ = owner.pack_image_features(
        list(index.split(tiles)),
        sizes,
        vision_feature_select_strategy=owner.config.vision_feature_select_strategy,
        image_newline=torch.full((1,), -1.0, dtype=torch.float64),
    )
    patches = [rows[:, 0].long() for rows in packed]
    return TokenLayout([any_resolution_grid(rows, side) for rows in patches], patches, index.numel())


def any_resolution_grid(patches: torch.Tensor, side: int) -> torch.Tensor:
    """Grid of one packed image: `side * side` base tokens at t = 0, then rows that end in a newline at t = 1."""
    rest = patches[side * side :]
    if not len(rest):  # an image so thin that nothing of its tiles is left
        return rectangle(1, side, side)
    width = int((rest == -1).nonzero()[0]) + 1
    detail = rectangle(1, len(rest) // width, width)
    detail[:, 0] = 1
    return torch.cat([rectangle(1, side, side), detail])
