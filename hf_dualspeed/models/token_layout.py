"""Where each visual token lies in its image, and which patch of the vision tower made it.

A unit is an image or clip of n_i tokens; its parts are tiles, views or frames. Shapes: B batch, S sequence, T tokens of
the batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from itertools import accumulate, pairwise

import torch
from torch import nn

from .interface import argument_names


@dataclass
class TokenLayout:
    """The visual tokens of each image of a batch, on the CPU.

    Args:
        grids (`list[torch.Tensor]`): (t, row, column) of each token, `(n_i, 3)`.
        patches (`list[torch.Tensor]`): its index in the tower's flattened output, `(n_i,)`; -1 if no patch made it.
        total (`int`): patches that the tower returns for the whole batch; 0 if tokens have no patch of their own.
    """

    grids: list[torch.Tensor]
    patches: list[torch.Tensor]
    total: int


def token_layout(
    owner: nn.Module,
    inputs: Mapping,
    modality: str,
    parts: list[list[int]],
    lengths: list[int],
    kept: torch.Tensor | None = None,
) -> TokenLayout:
    """The layout of what `owner` encoded from `inputs`.

    Args:
        owner (`nn.Module`): the module that owns the encoder.
        inputs (`Mapping`): the batch.
        modality (`str`): "image", "video" or "audio".
        parts (`list[list[int]]`): tokens of each part (frame) of each image or clip.
        lengths (`list[int]`): tokens of each unit of the result, in the same order.
        kept (`torch.Tensor`, *optional*): which of the tokens of `parts` are in the result, `(T,)`; all by default.
    """
    units = [unit for unit in parts if sum(unit)]
    if modality == "audio":  # time only: one row
        grids = [rectangle(1, 1, sum(unit)) for unit in units]
    elif modality == "image" and hasattr(owner, "pack_image_features") and inputs.get("image_sizes") is not None:
        return any_resolution_layout(owner, inputs)
    # The batch gives sizes that fit the numbers of tokens.
    elif (found := shapes(owner, inputs, modality, units)) is not None:
        grids = [shape.grid() for shape in found]
    else:
        # Otherwise the shape follows from the pixels, or each part is one row.
        edges = pixel_edges(owner, inputs, modality, units)
        grids = [frames(unit, edges) for unit in units]
    return one_patch_each(torch.cat(grids), lengths, kept)


def one_patch_each(grid: torch.Tensor, lengths: list[int], kept: torch.Tensor | None = None) -> TokenLayout:
    """The layout if the tower's patches, in order, are the tokens, or if the `kept` ones are."""
    total = len(grid)
    patches = torch.arange(total)
    # Rows of the tokens that are left, (T, 3) and (T,).
    if kept is not None:
        grid, patches = grid[kept.cpu()], patches[kept.cpu()]
    return TokenLayout(list(grid.split(lengths)), list(patches.split(lengths)), total)


# --- shapes that follow from the batch's sizes --------------------------------------------------------------------

View = tuple[int, int, int]  # frames, rows, columns


@dataclass
class Shape:
    """Tokens of one image or clip: consecutive views, and possibly one extra token at either end.

    Args:
        views (`list[View]`): frames, rows and columns of each.
        ends (`int`): tokens at either end.
    """

    views: list[View]
    ends: int = 0

    def grid(self) -> torch.Tensor:
        """(t, row, column) of each token, `(n, 3)`. End tokens lie in the first and in the last row."""
        # The views' grids, each shifted in time to come after the ones before.
        begins = accumulate((count for count, _, _ in self.views), initial=0)
        offsets = [torch.tensor([begin, 0, self.ends]) for begin in begins]
        grid = torch.cat([rectangle(*view) + offset for view, offset in zip(self.views, offsets, strict=False)])
        # An end token lies one column beyond its neighbour.
        step = torch.tensor([0, 0, 1])
        return torch.cat([grid[:1] - step, grid, grid[-1:] + step]) if self.ends else grid


def frames_rows_columns(table: torch.Tensor) -> list[list[View]]:
    return [[tuple(row)] for row in table.tolist()]


def rows_columns(table: torch.Tensor) -> list[list[View]]:
    return [[(1, *row)] for row in table.tolist()]


def overview_and_detail(table: torch.Tensor) -> list[list[View]]:
    return [[(1, *row[:2]), (1, *row[2:])] for row in table.tolist()]


def furthest(places: torch.Tensor) -> list[list[View]]:
    """Rows and columns from the (x, y) of each patch, which is -1 on padding."""
    return rows_columns(places.amax(1).flip(-1) + 1)


def tiles_then_whole(inputs: Mapping) -> list[list[View]]:
    """Views of images with separate tiles, which are encoded before the whole image."""
    tile, whole = (inputs.get(name) for name in ("pixel_values_local", "pixel_values"))
    counts = torch.as_tensor(inputs["num_local_patches"]).tolist()
    return [[*([(1, *tile.shape[-2:])] * count if count else []), (1, *whole.shape[-2:])] for count in counts]


# Inputs with the views of every image or clip, or of every part of one, in pixels, patches or tokens. Towers merge
# squares of them.
SIZES: dict[str, dict[str, Callable[[torch.Tensor], list[list[View]]]]] = {
    "image": {
        "image_grid_thw": frames_rows_columns,
        "image_grid_hw": rows_columns,
        "image_grids": overview_and_detail,
        "image_sizes": rows_columns,
        "spatial_shapes": rows_columns,
        "target_sizes": rows_columns,
        "image_position_ids": furthest,
    },
    "video": {
        "video_grid_thw": frames_rows_columns,
        "video_grids": frames_rows_columns,
        "target_sizes_videos": rows_columns,
        "video_position_ids": furthest,
    },
}
PIXELS = {"image": "pixel_values", "video": "pixel_values_videos"}
# Config settings for the number of patches in a row of the square that becomes one token.
MERGES = ("spatial_merge_size", "merge_kernel_size", "merge_size")
# Config settings of learned queries, whose tokens have no place in the image.
QUERIES = ("qformer_config", "perceiver_config", "projector_patch_to_query_dict")
# Pairs: extra tokens at the end of each row (a newline), and tokens at either end of an image.
EXTRAS = ((0, 0), (1, 0), (1, 1))


def given_sizes(inputs: Mapping, modality: str) -> dict[str, list[list[View]]]:
    """The views of the batch's images or clips, by the name of the input that gives them."""
    present = {name: read for name, read in SIZES[modality].items() if inputs.get(name) is not None}
    views = {name: read(torch.as_tensor(inputs[name])) for name, read in present.items()}
    if modality == "image" and inputs.get("num_local_patches") is not None:
        views["num_local_patches"] = tiles_then_whole(inputs)
    return views


def shapes(owner: nn.Module, inputs: Mapping, modality: str, units: list[list[int]]) -> list[Shape] | None:
    """The shape of each of `units`, given as tokens of their parts; None if no size in the batch fits them all."""
    configs = (getattr(owner.config, "vision_config", None), owner.config)
    values = [getattr(config, name, None) for config in configs for name in MERGES]
    known = [value[-1] if isinstance(value, (list, tuple)) else value for value in values if value]
    for views in given_sizes(inputs, modality).values():
        # Sizes may be those of whole units or of their parts.
        for pieces in ([[sum(unit)] for unit in units], units):
            counts = [count for unit in pieces for count in unit]
            if len(counts) != len(views):
                continue
            for extra in EXTRAS:
                found = [fit(count, own, known, *extra) for count, own in zip(counts, views, strict=True)]
                if None not in found:
                    each = iter(found)
                    return [joined([next(each) for _ in unit]) for unit in pieces]
    return None


def joined(found: list[Shape]) -> Shape:
    """Combines the shapes of an image's parts into one."""
    return found[0] if len(found) == 1 else Shape([view for shape in found for view in shape.views])


def fit(count: int, views: list[View], known: list[int], newline: int = 0, ends: int = 0) -> Shape | None:
    """The shape of `count` tokens that `views` become if squares of them are merged.

    The sides in `known` are tried first. Merging of neighbouring frames is assumed only together with a known side.
    """
    # Sides of squares that divide all rows and columns.
    common = math.gcd(*(side for _, *sides in views for side in sides))
    known = [side for side in known if common % side == 0]
    divisors = [side for side in range(1, common + 1) if common % side == 0]
    # Known sides, known sides with merged frames, then any divisor: the first that gives `count` tokens wins.
    tries = [(side, False) for side in known] + [(side, True) for side in known if side > 1]
    for side, merges_frames in [*tries, *((side, False) for side in divisors), (1, True)]:
        # Views in tokens: squares of `side` merged, and a newline added to each row.
        small = [(t, rows // side, columns // side + newline) for t, rows, columns in views]
        if merges_frames and len(small) == 1:
            t, rows, columns = small[0]
            merged = count // max(1, rows * columns)
            small = [(merged, rows, columns)] if 1 <= merged <= t else []
        if small and sum(math.prod(view) for view in small) + 2 * ends == count:
            return Shape(small, ends)
    return None


def pixel_edges(owner: nn.Module, inputs: Mapping, modality: str, units: list[list[int]]) -> tuple[int, int] | None:
    """Height and width in pixels of every part of `units`.

    None if they are unknown, or if parts may not be whole views in raster order.
    """
    pixels = inputs.get(PIXELS[modality])
    if not isinstance(pixels, torch.Tensor) or pixels.dim() < 4 or pixels.shape[-3] not in (1, 3):
        return None  # packed patches
    queries = any(getattr(owner.config, name, None) is not None for name in QUERIES)
    whole = modality == "video" and [len(unit) for unit in units] != frame_counts(inputs)
    return None if queries or whole or given_sizes(inputs, modality) else tuple(pixels.shape[-2:])


def frames(sizes: list[int], edges: tuple[int, int] | None) -> torch.Tensor:
    """The grid of one image or clip from the tokens of its views or frames, `(sum sizes, 3)`."""
    grids = [part_grid(count, edges) for count in sizes]
    # A newline at the end of the clip: one more column in the last frame's last row.
    if len(sizes) > 1 and sizes[-1] == sizes[0] + 1:
        grids[-1] = torch.cat([grids[0], grids[0][-1:] + torch.tensor([0, 0, 1])])
    # t is the number of the view or frame.
    for index, grid in enumerate(grids):
        grid[:, 0] = index
    return torch.cat(grids)


def part_grid(count: int, edges: tuple[int, int] | None) -> torch.Tensor:
    """The grid of one view with `edges` in pixels; one row in raster order if its shape is unknown."""
    # A square view has a square grid; another shape is merged from its pixels.
    if edges is not None and edges[0] == edges[1]:
        return square(count)
    shape = fit(count, [(1, *edges)], []) if edges is not None else None
    return rectangle(1, 1, count) if shape is None else shape.grid()


def square(count: int) -> torch.Tensor:
    """A square grid; one row if `count` is not a square number."""
    side = math.isqrt(count)
    return rectangle(1, side, side) if side * side == count else rectangle(1, 1, count)


def frame_counts(inputs: Mapping) -> list[int] | None:
    """Frames of each clip of the batch; None if unknown."""
    if inputs.get("num_frames_per_video") is not None:
        return inputs["num_frames_per_video"].tolist()
    pixels = inputs.get(PIXELS["video"])
    for views in given_sizes(inputs, "video").values():
        return [sum(count for count, _, _ in own) for own in views]
    if isinstance(pixels, torch.Tensor) and pixels.dim() >= 5:
        return [pixels.shape[1]] * pixels.shape[0]
    return None


def clips(owner: nn.Module, parts: list[list[int]], inputs: Mapping, budget: str = "clip") -> list[list[int]]:
    """Tokens of each frame of each clip, from the tokens of each part of each unit that the video encoder returned.

    Units may be clips, with or without separate frames, or frames. A newline at the end of a clip goes to its last
    frame.

    Raises:
        ValueError: `budget` is "frame", but frames cannot be separated.
    """
    counts, flat = frame_counts(inputs), [n for unit in parts for n in unit]
    if counts is not None and len(flat) == sum(counts):  # a part is a frame
        each = iter(flat)
        return [[next(each) for _ in range(count)] for count in counts]
    # Units are clips: split each by the shape of its frames, or evenly.
    units = [None] * len(parts)
    if counts is not None and len(parts) == len(counts):
        found = shapes(owner, inputs, "video", parts) or units
        units = [split_frames(sum(unit), count, shape) for unit, count, shape in zip(parts, counts, found, strict=True)]
    if budget == "frame" and None in units:
        raise ValueError(
            f'video_budget="frame" needs the frames of each clip, but nothing in the batch tells those that '
            f'{type(owner).__name__} encoded apart. Take video_budget="clip".'
        )
    return [unit if frames is None else frames for unit, frames in zip(parts, units, strict=True)]


def split_frames(tokens: int, count: int, shape: Shape | None) -> list[int] | None:
    """Tokens of each of `count` frames of a clip, of which the tower may have merged some; None if unknown."""
    if shape is not None:
        return [rows * columns for t, rows, columns in shape.views for _ in range(t)]
    each, left = divmod(tokens, count)
    return [each] * (count - 1) + [each + left] if left <= 1 and each else None


def units_by_runs(parts: list[list[int]], runs: list[int]) -> list[list[int]]:
    """Tokens of each part of each run of placeholders. A run that does not consist of whole parts is one part."""
    flat = [n for unit in parts for n in unit if n]
    if sum(flat) != sum(runs):  # placeholders and features differ: shortening raises
        return parts
    units, ends = [], [0, *torch.tensor(flat).cumsum(0).tolist()]
    begin = 0
    # Boundaries of parts inside each run; the run is made of parts if it begins and ends with one.
    for length in runs:
        inside = [end for end in ends if begin <= end <= begin + length]
        whole = len(inside) > 1 and inside[0] == begin and inside[-1] == begin + length
        units.append([b - a for a, b in pairwise(inside)] if whole else [length])
        begin += length
    return units


def masked_parts(parts: list[list[int]], kept: torch.Tensor) -> list[list[int]]:
    """Tokens of each part that a row mask `(T,)` leaves. Waits for the device."""
    counts = iter(piece.sum() for piece in kept.split([n for unit in parts for n in unit]))
    return [[int(next(counts)) for _ in unit] for unit in parts]


def placeholder_runs(input_ids: torch.Tensor, token_id: int, lines: bool = False) -> list[int]:
    """Lengths of the runs of placeholders in `(B, S)`, row by row. Waits for the device.

    The runs are the units of an encoder that returns one flat tensor. With `lines`, one other token ends none.
    """
    # A run begins at a placeholder whose left neighbour is none; a zero column (B, S + 1) starts each row.
    is_token = torch.nn.functional.pad(input_ids == token_id, (1, 0))
    inside = is_token.clone()
    if lines:  # so is a token between two placeholders
        inside[:, 1:-1] |= is_token[:, :-2] & is_token[:, 2:]
    begins = (inside[:, 1:] & ~inside[:, :-1]).flatten()
    # Number of the run of each placeholder, (T,), and tokens of each run.
    run = begins.cumsum(0)[is_token[:, 1:].flatten()]
    return torch.bincount(run)[1:].tolist()


def rectangle(frames: int, rows: int, columns: int) -> torch.Tensor:
    """(t, row, column) of a full grid in raster order, `(frames * rows * columns, 3)`."""
    return torch.cartesian_prod(torch.arange(frames), torch.arange(rows), torch.arange(columns)).view(-1, 3)


def any_resolution_layout(owner: nn.Module, inputs: Mapping) -> TokenLayout:
    """LLaVA-NeXT and similar models: a base view, then the merged tiles, cropped to the image's shape, each row with a
    newline.

    The model's own packing runs on patch indices in place of features, with -1 as the newline, so the layout cannot
    differ from it. If LLaVA-OneVision interpolates, no single patch makes a token, and `total` is 0.
    """
    from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

    config, sizes = owner.config, inputs["image_sizes"].cpu()
    vision = config.vision_config
    shrinks = Fraction(getattr(config, "downsample_rate", None) or 1)
    side = int(vision.image_size // vision.patch_size * shrinks)
    # Tiles of each image: only an image that is alone in its sample is tiled.
    images = inputs.get("batch_num_images")
    alone = [n == 1 for n in images.tolist() for _ in range(n)] if images is not None else [True] * len(sizes)
    tiles = [
        image_size_to_num_patches(size, config.image_grid_pinpoints, vision.image_size) if single else 1
        for size, single in zip(sizes.tolist(), alone, strict=True)
    ]
    # Patch indices as features, (tiles, side * side, 1), in float64: packing needs floats and must not round an index.
    index = torch.arange(sum(tiles) * side * side, dtype=torch.float64).view(-1, side * side, 1)
    options = {
        "image_newline": torch.full((1,), -1.0, dtype=torch.float64),
        "vision_feature_select_strategy": getattr(config, "vision_feature_select_strategy", None),
        "vision_aspect_ratio": getattr(config, "vision_aspect_ratio", None),
    }
    names = argument_names(owner.pack_image_features)
    options = {key: value for key, value in options.items() if key in names}
    packed = owner.pack_image_features(list(index.split(tiles)), sizes, **options)
    packed = packed[0] if isinstance(packed, tuple) else packed  # most return the lengths, too
    # Interpolated indices are no longer whole numbers.
    exact = shrinks == 1 and all(torch.equal(rows, rows.round()) for rows in packed)
    patches = [rows[:, 0].round().long() for rows in packed]
    grids = [any_resolution_grid(rows, side) for rows in patches]
    return TokenLayout(grids, patches, index.numel() if exact else 0)


def any_resolution_grid(patches: torch.Tensor, side: int) -> torch.Tensor:
    """The grid of one packed image: `side * side` base tokens at t = 0, then rows that end in a newline at t = 1."""
    rest = patches[side * side :]
    if not len(rest):  # a very thin image, whose tiles are cropped away
        return rectangle(1, side, side)
    # The first newline ends the first row.
    width = int((rest == -1).nonzero()[0]) + 1
    detail = rectangle(1, len(rest) // width, width)
    detail[:, 0] = 1
    return torch.cat([rectangle(1, side, side), detail])
