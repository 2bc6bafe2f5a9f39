"""One sample of an image and a text, as a model's processor makes it, for models whose weights nobody reads.

Where the processor's files are at hand, it makes the sample. A configuration alone is enough for the families in
[`FAMILIES`], with the published limits of their processors; all others are refused by name.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from importlib import import_module

import torch
from transformers import PreTrainedConfig

from ..models.interface import visual_token_ids
from .shapes import supervised_tokens

Made = tuple[dict[str, torch.Tensor], list[int]]
# Numbers of pixels that the published processors of Qwen2-VL and Qwen2.5-VL, and of Qwen3-VL, leave alone.
QWEN_PIXELS = {"qwen3_vl": (256 * 256, 4096 * 4096), "qwen3_vl_moe": (256 * 256, 4096 * 4096)}
QWEN2_PIXELS = (56 * 56, 3584 * 3584)
IDEFICS_EDGE = 4  # published processors enlarge an image to so many tiles along its longer edge


def sample_from_config(config: PreTrainedConfig, width: int, height: int, text_tokens: int) -> dict[str, torch.Tensor]:
    """A batch of one image of `width` x `height` pixels and `text_tokens` tokens of text, the last supervised.

    Marks around the image and its tiles are text tokens, in addition.

    Raises:
        ValueError: the family is not among those that can be written without a processor.
    """
    kind = config.model_type
    if kind not in FAMILIES:
        raise ValueError(
            f"There is no processor beside the config of this {kind!r} model, and an image for it cannot be written "
            f"without one, as it can for {', '.join(sorted(FAMILIES))}. Put the processor's files "
            "(preprocessor_config.json, tokenizer.json, ...) into a folder with the config, and name the folder."
        )
    inputs, image = FAMILIES[kind](config, width, height)
    # Ids (1, S): two words, the image with its marks, the other words; any id serves that is no placeholder or mark.
    special = {*visual_token_ids(config), *image}
    word = next(number for number in range(10, config.get_text_config().vocab_size) if number not in special)
    ids = torch.tensor([[word] * 2 + image + [word] * (text_tokens - 2)])
    labels = ids.clone()
    labels[:, : -supervised_tokens(text_tokens)] = -100
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels, **inputs}
    if kind in TYPE_IDS:
        batch[TYPE_IDS[kind]] = (ids == image_id(config)).long()
    return batch


def image_id(config: PreTrainedConfig) -> int:
    """The id of the image placeholder."""
    return visual_token_ids(config)[0]


def tiles_of(count: int, edge: int) -> torch.Tensor:
    """White tiles `(count, 3, edge, edge)`; black ones count as padding in some families."""
    return torch.ones(count, 3, edge, edge)


def edge_of(config: PreTrainedConfig, name: str) -> int:
    """An edge in pixels of the vision config, which may name both."""
    value = getattr(config.vision_config, name)
    return value[0] if isinstance(value, (list, tuple)) else value


def llava(config: PreTrainedConfig, width: int, height: int) -> Made:
    """One tile of fixed size."""
    edge = edge_of(config, "image_size")
    tokens = (edge // edge_of(config, "patch_size")) ** 2 + (config.vision_feature_select_strategy == "full")
    return {"pixel_values": tiles_of(1, edge)}, [image_id(config)] * tokens


def llava_next(config: PreTrainedConfig, width: int, height: int) -> Made:
    """The whole image, and tiles of the resolution that fits best, cropped, with a mark at the end of each row."""
    code = import_module("transformers.models.llava_next.modeling_llava_next")
    edge, pinpoints = edge_of(config, "image_size"), config.image_grid_pinpoints
    side = edge // edge_of(config, "patch_size")
    rows, columns = code.get_anyres_image_grid_shape((height, width), pinpoints, edge)
    detail = code.unpad_image(torch.zeros(1, rows * side, columns * side), (height, width))
    tokens = side**2 + detail.shape[1] * (detail.shape[2] + 1)
    tiles = tiles_of(code.image_size_to_num_patches((height, width), pinpoints, edge), edge)
    return {"pixel_values": tiles[None], "image_sizes": torch.tensor([[height, width]])}, [image_id(config)] * tokens


def qwen(config: PreTrainedConfig, width: int, height: int) -> Made:
    """Patches of the image in its own resolution."""
    code, vision = import_module("transformers.models.qwen2_vl.image_processing_pil_qwen2_vl"), config.vision_config
    patch, merge = edge_of(config, "patch_size"), vision.spatial_merge_size
    low, high = QWEN_PIXELS.get(config.model_type, QWEN2_PIXELS)
    rows, columns = (
        size // patch for size in code.smart_resize(height, width, patch * merge, min_pixels=low, max_pixels=high)
    )
    values = 3 * edge_of(config, "temporal_patch_size") * patch**2
    inputs = {
        "pixel_values": torch.ones(rows * columns, values),
        "image_grid_thw": torch.tensor([[1, rows, columns]]),
    }
    tokens = [image_id(config)] * (rows * columns // merge**2)
    return inputs, [config.vision_start_token_id, *tokens, config.vision_end_token_id]


def idefics(config: PreTrainedConfig, width: int, height: int) -> Made:
    """Tiles with a mark before each, and the whole image."""
    edge = edge_of(config, "image_size")
    code = import_module("transformers.models.idefics3.image_processing_pil_idefics3")
    processor = code.Idefics3ImageProcessorPil(
        size={"longest_edge": IDEFICS_EDGE * edge}, max_image_size={"longest_edge": edge}
    )
    count, rows, columns = processor.get_number_of_image_patches(height, width)
    # Any ids serve as marks: two before each tile, a line break after each row, and four around the whole image.
    mark, tile = (
        9,
        [image_id(config)] * math.ceil((edge // edge_of(config, "patch_size")) ** 2 / config.scale_factor**2),
    )
    image = ([mark, mark, *tile] * columns + [mark]) * rows + [mark, mark, mark, *tile, mark]
    pixels = tiles_of(count, edge)[None]
    return {"pixel_values": pixels, "pixel_attention_mask": torch.ones_like(pixels[:, :, 0]).long()}, image


def gemma3(config: PreTrainedConfig, width: int, height: int) -> Made:
    """One tile of fixed size, between marks and blank lines."""
    tokens = [image_id(config)] * config.mm_tokens_per_image
    image = [9, config.boi_token_index, *tokens, config.eoi_token_index, 9]
    return {"pixel_values": tiles_of(1, edge_of(config, "image_size"))}, image


def internvl(config: PreTrainedConfig, width: int, height: int) -> Made:
    """Up to twelve tiles, and the whole image."""
    edge = edge_of(config, "image_size")
    code = import_module("transformers.models.got_ocr2.image_processing_pil_got_ocr2")
    processor = code.GotOcr2ImageProcessorPil(size={"height": edge, "width": edge}, crop_to_patches=True)
    count = processor.get_number_of_image_patches(height, width, {})
    return {"pixel_values": tiles_of(count, edge)}, [9, *[image_id(config)] * (count * config.image_seq_length), 9]


FAMILIES: dict[str, Callable[[PreTrainedConfig, int, int], Made]] = {
    "llava": llava,
    "llava_next": llava_next,
    **dict.fromkeys(("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe"), qwen),
    **dict.fromkeys(("smolvlm", "idefics3"), idefics),
    "gemma3": gemma3,
    "internvl": internvl,
}
# What processors of a family call the kinds of its tokens.
TYPE_IDS = {
    **dict.fromkeys(("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe"), "mm_token_type_ids"),
    "gemma3": "token_type_ids",
}
