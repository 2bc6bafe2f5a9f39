"""Tiny processors (and models) built from configurations alone: nothing here needs the Hub."""

from __future__ import annotations

import gzip
import string

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.llava import LlavaProcessor
from transformers.models.llava_next import LlavaNextProcessor
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.models.qwen2_5_vl import Qwen2_5_VLProcessor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

IMAGE_SIZE = 16
PATCH_SIZE = 4

# After llava-1.5-7b-hf's template (plus its end-of-sequence token), llava-v1.6-mistral-7b's and Qwen2.5-VL's.
LLAVA_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] != 'system' %}{{ message['role'].upper() + ': ' }}{% endif %}"
    "{% for content in message['content'] if content['type'] == 'image' %}{{ '<image>\n' }}{% endfor %}"
    "{% for content in message['content'] if content['type'] == 'text' %}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ content['text'] + '</s>' }}{% endgeneration %}"
    "{% else %}{{ content['text'] + ' ' }}{% endif %}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
LLAVA_NEXT_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'user' %}{{ '[INST] ' }}{% endif %}"
    "{% for content in message['content'] if content['type'] == 'image' %}{{ '<image>\n' }}{% endfor %}"
    "{% for content in message['content'] if content['type'] == 'text' %}{{ content['text'] }}{% endfor %}"
    "{% if message['role'] == 'user' %}{{ ' [/INST]' }}{% elif message['role'] == 'assistant' %}{{ '</s>' }}"
    "{% endif %}{% endfor %}"
)
QWEN_TEMPLATE = (
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}"
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
    "<|im_start|>{{ message['role'] }}\n{% for content in message['content'] %}"
    "{% if content['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% else %}{{ content['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


class ImageOnlyQwenProcessor(Qwen2_5_VLProcessor):
    """Qwen2.5-VL's processor without its video processor, which needs torchvision."""

    def check_argument_for_proper_class(self, argument_name, argument):
        return (
            None
            if argument_name == "video_processor"
            else super().check_argument_for_proper_class(argument_name, argument)
        )


def tiny_tokenizer(
    specials: dict[str, str], *, bos: bool = False, padding_side: str = "right"
) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer without merges: encodes any text, one token per byte, and decodes it exactly."""
    names = [*dict.fromkeys(specials.values())]
    letters = sorted({*pre_tokenizers.ByteLevel.alphabet(), *string.ascii_letters})
    vocab = {token: index for index, token in enumerate([*names, *letters])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    if bos:
        token = specials["bos_token"]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{token} $A", special_tokens=[(token, vocab[token])]
        )
    standard = {key: specials[key] for key in ("bos_token", "eos_token", "pad_token", "unk_token") if key in specials}
    extra = {key: value for key, value in specials.items() if key not in standard}
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, padding_side=padding_side, extra_special_tokens=extra, **standard
    )


def _llava_tokenizer(padding_side: str) -> PreTrainedTokenizerFast:
    specials = {
        "unk_token": "<unk>",
        "pad_token": "<pad>",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "image_token": "<image>",
    }
    return tiny_tokenizer(specials, bos=True, padding_side=padding_side)


def tiny_llava_processor(padding_side: str = "right") -> LlavaProcessor:
    """LLaVA-1.5's processor: 16 visual tokens per image, BOS written by the tokenizer."""
    return LlavaProcessor(
        image_processor=CLIPImageProcessorPil(
            size={"shortest_edge": IMAGE_SIZE}, crop_size={"height": IMAGE_SIZE, "width": IMAGE_SIZE}
        ),
        tokenizer=_llava_tokenizer(padding_side),
        patch_size=PATCH_SIZE,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=LLAVA_TEMPLATE,
    )


def tiny_llava_next_processor(padding_side: str = "right") -> LlavaNextProcessor:
    """LLaVA-NeXT's processor: the number of visual tokens depends on the image's shape."""
    edge = IMAGE_SIZE
    return LlavaNextProcessor(
        image_processor=LlavaNextImageProcessorPil(
            size={"shortest_edge": edge},
            crop_size={"height": edge, "width": edge},
            image_grid_pinpoints=[[edge, 2 * edge], [2 * edge, edge], [2 * edge, 2 * edge]],
        ),
        tokenizer=_llava_tokenizer(padding_side),
        patch_size=PATCH_SIZE,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=LLAVA_NEXT_TEMPLATE,
    )


def tiny_qwen2_5_vl_processor(padding_side: str = "right") -> Qwen2_5_VLProcessor:
    """Qwen2.5-VL's processor: native resolution, 2 x 2 patches merged into a visual token, no BOS."""
    specials = {
        "pad_token": "<|endoftext|>",
        "eos_token": "<|im_end|>",
        "turn_token": "<|im_start|>",
        "vision_start_token": "<|vision_start|>",
        "vision_end_token": "<|vision_end|>",
        "image_token": "<|image_pad|>",
        "video_token": "<|video_pad|>",
    }
    image_processor = Qwen2VLImageProcessorPil(
        patch_size=PATCH_SIZE, merge_size=2, size={"shortest_edge": 8 * 8, "longest_edge": 32 * 32}
    )
    return ImageOnlyQwenProcessor(
        image_processor=image_processor,
        tokenizer=tiny_tokenizer(specials, padding_side=padding_side),
        video_processor=None,
        chat_template=QWEN_TEMPLATE,
    )


def write_fashion_mnist(folder, tiles):
    """Fashion-MNIST's four files (IDX, gzipped) with few tiles, each as bright as its label tells: 20 * label + 10."""
    labels = np.arange(tiles, dtype=np.uint8) % 10
    pixels = np.broadcast_to((20 * labels + 10)[:, None, None], (tiles, 28, 28))
    for prefix in ("train", "t10k"):
        for name, array in (("images-idx3-ubyte", pixels), ("labels-idx1-ubyte", labels)):
            head = bytes([0, 0, 8, array.ndim]) + b"".join(size.to_bytes(4, "big") for size in array.shape)
            (folder / f"{prefix}-{name}.gz").write_bytes(gzip.compress(head + array.tobytes()))
