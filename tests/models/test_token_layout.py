"""Where visual tokens lie: the shapes that batches tell, and what is done where they tell none."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from families import FAMILIES, batch
from families.cases import CASES, batch_of

from hf_dualspeed.models.interface import ModelInterface
from hf_dualspeed.models.token_layout import clips, fit, frames, shapes
from hf_dualspeed.pruning.encoding import encode

GRID = frozenset({"grid"})
PATCHES = ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_5", "glm4v", "video_llama_3", "cosmos3_edge", "exaone4_5"]
PATCHES += ["kimi_k25", "lfm3_vl", "muse_glimmer", "muse_spark", "minimax_m3_vl", "dots3_note", "glm5_next"]
# Patches (or pixels) along each side that make one token; the tiny models of all these have patches of 4 pixels.
SIDES = {
    ("mistral3", "image"): ("image_sizes", 8),
    ("mistral_large4", "image"): ("image_sizes", 8),
    ("lighton_ocr", "image"): ("image_sizes", 8),
    ("lfm2_vl", "image"): ("spatial_shapes", 2),
    ("nemotron_h_omni", "image"): ("image_grid_hw", 2),
    ("minicpmv4_6", "image"): ("target_sizes", 4),
    ("minicpmv4_6", "video"): ("target_sizes_videos", 4),
    ("minicpmv4_7", "image"): ("target_sizes", 4),
    ("minicpmv4_7", "video"): ("target_sizes_videos", 4),
    ("molmo2", "video"): ("video_grids", 1),
    ("inkling2", "image"): ("image_grid_thw", 1),
    **{(name, "image"): ("image_grid_thw", 2) for name in PATCHES},
    **{(name, "video"): ("video_grid_thw", 2) for name in PATCHES},
}


def shape(grid: torch.Tensor) -> list[tuple[int, int]]:
    """Rows and columns of each frame or view of a full grid."""
    views = [grid[grid[:, 0] == t, 1:] for t in grid[:, 0].unique()]
    sides = [tuple((view.amax(0) - view.amin(0) + 1).tolist()) for view in views]
    assert [rows * columns for rows, columns in sides] == [len(view) for view in views]
    return sides


@cache
def model_of(name: str):
    return FAMILIES[name].model()


def encoded(name: str, modality: str, budget: str = "clip", **changes):
    """The tokens of a family's mixed batch, and the batch."""
    model = model_of(name)
    inputs = {**batch_of(FAMILIES[name], model, modality, "left").inputs, **changes}
    with torch.no_grad():
        return encode(ModelInterface(model), inputs, GRID, budget), inputs


@pytest.mark.parametrize(("name", "modality"), [case for case in CASES if case in SIDES])
def test_grids_are_those_of_the_images(name, modality):
    told, side = SIDES[name, modality]
    # Else tokens are missing from the grids of clips.
    changes = {"video_compression_mask": None} if name == "video_llama_3" and modality == "video" else {}
    (encoding,), inputs = encoded(name, modality, **changes)
    sizes = [(1, *row)[-3:] for row in inputs[told].tolist()]
    true = [[(rows // side, columns // side)] * count for count, rows, columns in sizes]
    assert [shape(grid) for grid in encoding.grids] == true


@pytest.mark.parametrize("modality", ["image", "video"])
def test_grids_from_positions_of_patches(modality):
    (encoding,), inputs = encoded("gemma4", modality)
    places = inputs[f"{modality}_position_ids"]
    frames = [((y + 1) // 2, (x + 1) // 2) for x, y in places.amax(1).tolist()]
    found = [shape(grid) for grid in encoding.grids]
    assert [frame for unit in found for frame in unit] == frames
    assert [len(unit) for unit in found] == (
        inputs["num_frames_per_video"].tolist() if modality == "video" else [1] * len(frames)
    )


def test_grids_with_views_of_two_sizes():
    (encoding,), inputs = encoded("molmo2", "image")
    assert [shape(grid) for grid in encoding.grids] == [
        [(a, b), (c, d)] for a, b, c, d in inputs["image_grids"].tolist()
    ]
    (encoding,), inputs = encoded("step3p7", "image")
    tiles = inputs["num_local_patches"].tolist()
    assert [shape(grid) for grid in encoding.grids] == [[*[(2, 2)] * count, (3, 3)] for count in tiles]


def test_grids_with_newlines_and_ends():
    (encoding,), inputs = encoded("emu3", "image")
    sizes = [(h // 4, w // 4 + 1) for h, w in inputs["image_sizes"].tolist()]
    assert [shape(grid) for grid in encoding.grids] == [[size] for size in sizes]
    (encoding,), inputs = encoded("hunyuan_vl", "image")
    for grid, (_, rows, columns) in zip(encoding.grids, inputs["image_grid_thw"].tolist(), strict=True):
        assert shape(grid[1:-1]) == [(rows // 2, columns // 2 + 1)]
        assert grid[0].tolist() == [0, 0, 0]
        assert grid[-1].tolist() == [0, rows // 2 - 1, columns // 2 + 2]
    (encoding,), _ = encoded("llava_onevision", "video")  # a newline closes the clip
    for grid in encoding.grids:
        assert shape(grid[:-1]) == [(2, 2)] * 3
        assert grid[-1].tolist() == [2, 1, 2]


def test_grids_of_masked_clips():
    (encoding,), inputs = encoded("video_llama_3", "video")
    mask, sizes = inputs["video_compression_mask"].bool(), inputs["video_grid_thw"].tolist()
    whole = [torch.cartesian_prod(*(torch.arange(n) for n in (t, h // 2, w // 2))) for t, h, w in sizes]
    kept = torch.cat(whole)[mask]
    assert torch.equal(torch.cat(encoding.grids), kept)


def test_a_square_count_is_no_square_image():
    model = model_of("mistral3")
    inputs = {
        "input_ids": torch.tensor([[1, *[model.config.image_token_id] * 16, 20]]),
        "pixel_values": torch.randn(1, 3, 16, 64),
        "image_sizes": torch.tensor([[16, 64]]),
    }
    (encoding,) = encode(ModelInterface(model), inputs, GRID)
    assert shape(encoding.grids[0]) == [(2, 8)]
    # Neither are tokens of learned queries, nor images whose told size does not fit.
    for name, rows in (("deepseek_ocr2", [33, 17, 49]), ("aria", [6, 6, 6, 6, 6]), ("blip_2", [6, 6, 6])):
        (encoding,), _ = encoded(name, "image")
        assert [size for grid in encoding.grids for size in shape(grid)] == [(1, count) for count in rows]
    assert shape(frames([16], None)) == [(1, 16)]
    assert shape(frames([16], (16, 64))) == [(2, 8)]
    assert shape(frames([16], (384, 384))) == [(4, 4)]


def test_lines_of_an_image_are_one_unit():
    """Fuyu writes a newline behind each line of patches, and its encoder returns those of all images in one matrix."""
    (encoding,), inputs = encoded("fuyu", "image")
    assert encoding.features.shape[0] == inputs["pixel_values"].shape[0] == 24
    assert encoding.lengths == [8, 8, 8]


def test_merged_frames_are_believed_of_known_merges_only():
    assert fit(16, [(4, 8, 8)], [2]).views == [(1, 4, 4)]
    assert fit(16, [(4, 8, 8)], []).views == [(4, 2, 2)]
    assert fit(32, [(4, 8, 8)], [1, 2]).views == [(2, 4, 4)]
    assert fit(17, [(1, 8, 8)], [2]) is None
    owner = model_of("llava")
    assert shapes(owner, {"image_sizes": torch.tensor([[8, 8], [8, 4]])}, "image", [[4], [3]]) is None


@pytest.mark.parametrize(("name", "modality"), CASES)
def test_every_token_has_a_place_of_its_own(name, modality):
    encodings, inputs = encoded(name, modality)
    for encoding in encodings:
        assert [len(grid) for grid in encoding.grids] == encoding.lengths
        assert all(len(grid.unique(dim=0)) == len(grid) for grid in encoding.grids)
        assert sum(encoding.lengths) == len(encoding.features)
    if modality != "video" or encodings[0].modality != "video":
        return
    with torch.no_grad():
        (by_frame,) = encode(ModelInterface(model_of(name)), inputs, GRID, "frame")
    assert sum(by_frame.lengths) == sum(encodings[0].lengths)
    assert all(len(grid[:, 0].unique()) == 1 for grid in by_frame.grids)
    assert len(by_frame.lengths) == sum(len(grid[:, 0].unique()) for grid in encodings[0].grids)


def test_frames_that_cannot_be_told_apart():
    owner = model_of("llava")
    assert clips(owner, [[8], [2]], {"num_frames_per_video": torch.tensor([2, 1])}, "frame") == [[4, 4], [2]]
    for inputs in ({}, {"num_frames_per_video": torch.tensor([3])}, {"num_frames_per_video": torch.tensor([3, 3, 3])}):
        parts = [[8]] if len(inputs) else [[8], [2]]
        assert clips(owner, parts, inputs) == parts
        with pytest.raises(ValueError, match='nothing in the batch tells.*video_budget="clip"'):
            clips(owner, parts, inputs, "frame")


def test_frame_budgets_of_gemma4():
    model = model_of("gemma4")
    inputs = batch(FAMILIES["gemma4"], model, [["video", 3], ["video", 2]], seeds=[1, 2])
    with torch.no_grad():
        by_clip, by_frame = (
            encode(ModelInterface(model), inputs, GRID, budget)[0].lengths for budget in ("clip", "frame")
        )
    counts = inputs["num_frames_per_video"].tolist()
    assert len(by_clip) == 2
    assert by_frame == [whole // count for whole, count in zip(by_clip, counts, strict=True) for _ in range(count)]
    assert len(by_frame) == sum(counts) > 2
