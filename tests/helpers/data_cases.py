"""Conversations with pictures, and what of a batch is supervised."""

from __future__ import annotations

import numpy as np
from PIL import Image
from tiny import tiny_llava_next_processor, tiny_llava_processor, tiny_qwen2_5_vl_processor

PROCESSORS = {
    "llava": (tiny_llava_processor, "</s>"),
    "llava_next": (tiny_llava_next_processor, "</s>"),
    "qwen2_5_vl": (tiny_qwen2_5_vl_processor, "<|im_end|>"),
}


def picture(width: int = 20, height: int = 12, mode: str = "RGB") -> Image.Image:
    pixels = np.random.default_rng(width * height).integers(0, 255, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


def talk(*turns: str, images: list | None = None, **columns) -> dict:
    """A conversation whose user and assistant take turns."""
    roles = ("user", "assistant")
    messages = [{"role": roles[i % 2], "content": text} for i, text in enumerate(turns)]
    return {"messages": messages, "images": images or [], **columns}


def placeholders(messages: list[dict]) -> list[int]:
    return [sum(part["type"] == "image" for part in message["content"]) for message in messages]


def mixed_batch() -> list[dict]:
    """One image, none, two images in two turns, and a portrait in grey."""
    return [
        talk("What is it?", "A cat, né.", images=[picture()]),
        talk("Hello?", "Hi!"),
        talk(
            "See <image> here.",
            "Yes",
            "And <image>?",
            "A much longer answer",
            images=[picture(), picture(9, 30)],
        ),
        talk("<image>\nColour", "grey", images=[picture(8, 16, "L")]),
    ]


def supervised(processor, batch: dict, row: int) -> str:
    labels = batch["labels"][row]
    return processor.tokenizer.decode(labels[labels != -100])
