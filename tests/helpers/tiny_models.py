"""Tiny random-weight models of each family, and mixed batches for them, made by the real processors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from tiny import (
    IMAGE_SIZE,
    PATCH_SIZE,
    tiny_llava_next_processor,
    tiny_llava_processor,
    tiny_qwen2_5_vl_processor,
)
from transformers import (
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
)

HIDDEN = 32
EDGE = IMAGE_SIZE


def text_config(processor, **extra) -> dict:
    tokenizer = processor.tokenizer
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": HIDDEN,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        **extra,
    }


def clip_config() -> dict:
    return {
        "model_type": "clip_vision_model",
        "hidden_size": 24,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "image_size": IMAGE_SIZE,
        "patch_size": PATCH_SIZE,
        "projection_dim": 24,
    }


def llava(processor) -> LlavaForConditionalGeneration:
    config = LlavaConfig(
        vision_config=clip_config(),
        text_config={"model_type": "llama", **text_config(processor)},
        image_token_id=processor.image_token_id,
        vision_feature_layer=-2,
    )
    return LlavaForConditionalGeneration(config)


def llava_next(processor) -> LlavaNextForConditionalGeneration:
    config = LlavaNextConfig(
        vision_config=clip_config(),
        text_config={"model_type": "llama", **text_config(processor)},
        image_token_id=processor.image_token_id,
        image_grid_pinpoints=[list(p) for p in processor.image_processor.image_grid_pinpoints],
    )
    return LlavaNextForConditionalGeneration(config)


def qwen2_5_vl(processor) -> Qwen2_5_VLForConditionalGeneration:
    ids = processor.tokenizer.convert_tokens_to_ids
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
    config = Qwen2_5_VLConfig(
        vision_config={
            "depth": 3,
            "hidden_size": 24,
            "intermediate_size": 48,
            "num_heads": 2,
            "patch_size": PATCH_SIZE,
            "spatial_merge_size": 2,
            "window_size": 16,
            "fullatt_block_indexes": [1],
            "out_hidden_size": HIDDEN,
        },
        text_config=text_config(processor, rope_parameters=rope),
        image_token_id=ids("<|image_pad|>"),
        video_token_id=ids("<|video_pad|>"),
        vision_start_token_id=ids("<|vision_start|>"),
        vision_end_token_id=ids("<|vision_end|>"),
    )
    return Qwen2_5_VLForConditionalGeneration(config)


@dataclass(frozen=True)
class Family:
    name: str
    processor: Callable
    model: Callable
    image: str  # how the template writes an image

    def build(self, padding_side: str = "right", seed: int = 0):
        """Model in eval mode and processor."""
        processor = self.processor(padding_side)
        torch.manual_seed(seed)
        return self.model(processor).eval(), processor


FAMILIES = {
    f.name: f
    for f in (
        Family("llava", tiny_llava_processor, llava, "<image>"),
        Family("llava_next", tiny_llava_next_processor, llava_next, "<image>"),
        Family("qwen2_5_vl", tiny_qwen2_5_vl_processor, qwen2_5_vl, "<|vision_start|><|image_pad|><|vision_end|>"),
    )
}


def picture(width: int = EDGE, height: int = EDGE, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


# Two images, none, and one, of different shapes, beside texts of different lengths.
MIXED = [
    ("what and{image} why{image}?", [(16, 16), (40, 24)]),
    ("no image", []),
    ("{image} a rather longer question", [(20, 44)]),
]


def batch(family: Family, processor, samples=None, labels: bool = True) -> dict:
    """Processor output of a mixed batch, with every third text token supervised."""
    samples = MIXED if samples is None else samples
    texts = [text.format(image=family.image) for text, _ in samples]
    # Pictures follow from the sample alone, so that it is the same in every batch.
    images = [picture(w, h, seed=10 * len(text) + j) for text, sizes in samples for j, (w, h) in enumerate(sizes)]
    inputs = dict(processor(text=texts, images=images or None, padding=True, return_tensors="pt"))
    if labels:
        ids = inputs["input_ids"]
        keep = (torch.arange(ids.shape[1]) % 3 == 2) & inputs["attention_mask"].bool()
        keep &= ids != processor.image_token_id
        keep[:, 0] = False
        inputs["labels"] = torch.where(keep, ids, -100)
    return inputs
