"""Tiny processors of many families: each family's own class and its way to write a conversation."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module

from tiny import IMAGE_SIZE, PATCH_SIZE, tiny_tokenizer
from transformers import ProcessorMixin

EDGE = IMAGE_SIZE
SQUARE = {"height": EDGE, "width": EDGE}
CHATML = {"turn_token": "<|im_start|>", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
LLAMA3 = {
    "bos_token": "<|begin_of_text|>",
    "eos_token": "<|eot_id|>",
    "pad_token": "<|pad|>",
    "header_token": "<|start_header_id|>",
    "header_end_token": "<|end_header_id|>",
}
CHATML_TURNS = ("<|im_start|>user\n", "<|im_end|>\n", "<|im_start|>assistant\n", "<|im_end|>\n")
LLAMA3_TURNS = (
    "<|start_header_id|>user<|end_header_id|>\n\n",
    "<|eot_id|>",
    "<|start_header_id|>assistant<|end_header_id|>\n\n",
    "<|eot_id|>",
)


def template(image: str, turns: tuple[str, str, str, str], start: str = "", video: str = "") -> str:
    """A chat template that writes what comes before and after a user's and an assistant's turn."""
    start, image, video, *turns = ("{{ " + json.dumps(text) + " }}" for text in (start, image, video, *turns))
    user, user_end, assistant, assistant_end = turns
    parts = (
        "{% for part in message['content'] %}"
        f"{{% if part['type'] == 'image' %}}{image}{{% elif part['type'] == 'video' %}}{video}"
        "{% else %}{{ part['text'] }}{% endif %}{% endfor %}"
    )
    return (
        f"{start}{{% for message in messages %}}{{% if message['role'] == 'assistant' %}}{assistant}{parts}"
        f"{assistant_end}{{% else %}}{user}{parts}{user_end}{{% endif %}}{{% endfor %}}"
        f"{{% if add_generation_prompt %}}{assistant}{{% endif %}}"
    )


def load(family: str, name: str) -> type:
    """A class of a family by its name; `...Pil` is the image processor that needs no torchvision."""
    module = "processing"
    if "ImageProcessor" in name:
        module = "image_processing_pil" if name.endswith("Pil") else "image_processing"
    if "VideoProcessor" in name:
        module = "video_processing"
    return getattr(import_module(f"transformers.models.{family}.{module}_{family}"), name)


def without_video(processor: type[ProcessorMixin]) -> type[ProcessorMixin]:
    """The class, content with no video processor: all of transformers' need torchvision."""

    class ImagesOnly(processor):
        def check_argument_for_proper_class(self, argument_name, argument):
            if argument_name != "video_processor":
                super().check_argument_for_proper_class(argument_name, argument)

    ImagesOnly.__name__ = processor.__name__
    return ImagesOnly


@dataclass(frozen=True)
class Family:
    """One family's processor.

    Args:
        build: makes it, given the side its tokenizer pads on.
        end (`str`): what an assistant's turn ends with.
        needs (`tuple[str, ...]`): packages it cannot be built without.
        images (`tuple[int, ...]`): how many images of a sample it takes.
    """

    build: Callable[[str], ProcessorMixin]
    end: str
    needs: tuple[str, ...] = ()
    images: tuple[int, ...] = (0, 1, 2)


def gemma3(side: str = "right"):
    specials = {
        "pad_token": "<pad>",
        "bos_token": "<bos>",
        "eos_token": "<end_of_turn>",
        "turn_token": "<start_of_turn>",
        "boi_token": "<start_of_image>",
        "eoi_token": "<end_of_image>",
        "image_token": "<image_soft_token>",
    }
    turns = ("<start_of_turn>user\n", "<end_of_turn>\n", "<start_of_turn>model\n", "<end_of_turn>\n")
    return load("gemma3", "Gemma3Processor")(
        image_processor=load("gemma3", "Gemma3ImageProcessorPil")(size=SQUARE),
        tokenizer=tiny_tokenizer(specials, bos=True, padding_side=side),
        image_seq_length=4,
        chat_template=template("<start_of_image>", turns, start="<bos>"),
    )


def paligemma(side: str = "right"):
    specials = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>", "image_token": "<image>"}
    image_processor = load("siglip", "SiglipImageProcessorPil")(size=SQUARE)
    image_processor.image_seq_length = (EDGE // PATCH_SIZE) ** 2
    tokenizer = tiny_tokenizer(specials, padding_side=side)
    return load("paligemma", "PaliGemmaProcessor")(
        image_processor=image_processor,
        tokenizer=tokenizer,
        chat_template=template("<image>", ("", "\n", "", "<eos>")),
    )


def idefics_parts(side: str) -> dict:
    tiles = [f"<row_{row + 1}_col_{column + 1}>" for row in range(6) for column in range(6)]
    specials = {
        "bos_token": "<|begin_of_text|>",
        "eos_token": "<end_of_utterance>",
        "pad_token": "<pad>",
        "image_token": "<image>",
        "fake_image_token": "<fake_token_around_image>",
        "global_image_token": "<global-img>",
        "video_token": "<video>",
        **{f"tile_{index}_token": token for index, token in enumerate(tiles)},
    }
    return {
        "tokenizer": tiny_tokenizer(specials, bos=True, padding_side=side),
        "image_seq_len": 4,
        "chat_template": template(
            "<image>",
            ("User:", "<end_of_utterance>\n", "Assistant:", "<end_of_utterance>\n"),
            start="<|begin_of_text|>",
            video="<video>",
        ),
    }


def idefics_image_processor(family: str, name: str):
    return load(family, name)(size={"longest_edge": 2 * EDGE}, max_image_size={"longest_edge": EDGE})


def idefics3(side: str = "right"):
    image_processor = idefics_image_processor("idefics3", "Idefics3ImageProcessorPil")
    return load("idefics3", "Idefics3Processor")(image_processor=image_processor, **idefics_parts(side))


def smolvlm(side: str = "right"):
    return load("smolvlm", "SmolVLMProcessor")(
        image_processor=idefics_image_processor("smolvlm", "SmolVLMImageProcessorPil"),
        video_processor=load("smolvlm", "SmolVLMVideoProcessor")(size={"longest_edge": EDGE}),
        **idefics_parts(side),
    )


def idefics2(side: str = "right"):
    specials = {
        "bos_token": "<s>",
        "eos_token": "</s>",
        "pad_token": "<unk>",
        "image_token": "<image>",
        "image_boundary_token": "<fake_token_around_image>",
        "end_token": "<end_of_utterance>",
    }
    return load("idefics2", "Idefics2Processor")(
        image_processor=load("idefics2", "Idefics2ImageProcessorPil")(
            size={"shortest_edge": EDGE, "longest_edge": 2 * EDGE}
        ),
        tokenizer=tiny_tokenizer(specials, bos=True, padding_side=side),
        image_seq_len=4,
        chat_template=template("<image>", ("User:", "<end_of_utterance>\n", "Assistant: ", "<end_of_utterance>\n")),
    )


def internvl(side: str = "right"):
    specials = CHATML | {
        "start_image_token": "<img>",
        "end_image_token": "</img>",
        "context_image_token": "<IMG_CONTEXT>",
        "video_token": "<video>",
    }
    return without_video(load("internvl", "InternVLProcessor"))(
        image_processor=load("got_ocr2", "GotOcr2ImageProcessorPil")(size=SQUARE, max_patches=2),
        tokenizer=tiny_tokenizer(specials, padding_side=side),
        video_processor=None,
        image_seq_length=4,
        chat_template=template("<IMG_CONTEXT>\n", CHATML_TURNS),
    )


def lfm2_vl(side: str = "right"):
    tiles = [f"<|img_row_{row + 1}_col_{column + 1}|>" for row in range(10) for column in range(10)]
    specials = CHATML | {
        "bos_token": "<|startoftext|>",
        "image_token": "<image>",
        "image_start_token": "<|image_start|>",
        "image_end_token": "<|image_end|>",
        "image_thumbnail_token": "<|img_thumbnail|>",
        **{f"tile_{index}_token": token for index, token in enumerate(tiles)},
    }
    return load("lfm2_vl", "Lfm2VlProcessor")(
        image_processor=load("lfm2_vl", "Lfm2VlImageProcessor")(
            encoder_patch_size=4, tile_size=EDGE, min_image_tokens=2, max_image_tokens=4
        ),
        tokenizer=tiny_tokenizer(specials, bos=True, padding_side=side),
        chat_template=template("<image>", CHATML_TURNS, start="<|startoftext|>"),
    )


def llava_onevision(side: str = "right"):
    specials = CHATML | {"image_token": "<image>", "video_token": "<video>"}
    return without_video(load("llava_onevision", "LlavaOnevisionProcessor"))(
        image_processor=load("llava_onevision", "LlavaOnevisionImageProcessorPil")(
            size=SQUARE, image_grid_pinpoints=[[EDGE, EDGE], [EDGE, 2 * EDGE], [2 * EDGE, EDGE]]
        ),
        tokenizer=tiny_tokenizer(specials, padding_side=side),
        video_processor=None,
        num_image_tokens=(EDGE // PATCH_SIZE) ** 2,
        vision_feature_select_strategy="full",
        chat_template=template("<image>\n", CHATML_TURNS),
    )


def pixtral(side: str = "right"):
    specials = {
        "bos_token": "<s>",
        "eos_token": "</s>",
        "pad_token": "<pad>",
        "image_token": "[IMG]",
        "image_break_token": "[IMG_BREAK]",
        "image_end_token": "[IMG_END]",
        "inst_token": "[INST]",
        "inst_end_token": "[/INST]",
    }
    return load("pixtral", "PixtralProcessor")(
        image_processor=load("pixtral", "PixtralImageProcessorPil")(
            size={"longest_edge": 2 * EDGE}, patch_size={"height": PATCH_SIZE, "width": PATCH_SIZE}
        ),
        tokenizer=tiny_tokenizer(specials, bos=True, padding_side=side),
        patch_size=PATCH_SIZE,
        spatial_merge_size=2,
        chat_template=template("[IMG]", ("[INST]", "[/INST]", "", "</s>"), start="<s>"),
    )


def aya_vision(side: str = "right"):
    specials = {
        "bos_token": "<BOS_TOKEN>",
        "pad_token": "<PAD>",
        "eos_token": "<|END_OF_TURN_TOKEN|>",
        "turn_token": "<|START_OF_TURN_TOKEN|>",
        "user_token": "<|USER_TOKEN|>",
        "chatbot_token": "<|CHATBOT_TOKEN|>",
        "image_token": "<image>",
        "start_of_img_token": "<|START_OF_IMG|>",
        "end_of_img_token": "<|END_OF_IMG|>",
        "img_patch_token": "<|IMG_PATCH|>",
        "tile_global_token": "TILE_GLOBAL",
    }
    end = "<|END_OF_TURN_TOKEN|>"
    turns = ("<|START_OF_TURN_TOKEN|><|USER_TOKEN|>", end, "<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>", end)
    return load("aya_vision", "AyaVisionProcessor")(
        image_processor=load("got_ocr2", "GotOcr2ImageProcessorPil")(size=SQUARE, max_patches=2),
        tokenizer=tiny_tokenizer(specials, bos=True, padding_side=side),
        patch_size=8,
        img_size=EDGE,
        chat_template=template("<image>", turns, start="<BOS_TOKEN>"),
    )


def cohere2_vision(side: str = "right"):
    specials = {
        "bos_token": "<BOS_TOKEN>",
        "pad_token": "<PAD>",
        "eos_token": "<|END_OF_TURN_TOKEN|>",
        "turn_token": "<|START_OF_TURN_TOKEN|>",
        "boi_token": "<|START_OF_IMG|>",
        "eoi_token": "<|END_OF_IMG|>",
        "image_token": "<|IMG_PATCH|>",
        "img_line_break_token": "<|IMG_LINE_BREAK|>",
    }
    end = "<|END_OF_TURN_TOKEN|>"
    return load("cohere2_vision", "Cohere2VisionProcessor")(
        image_processor=load("cohere2_vision", "Cohere2VisionImageProcessor")(size=SQUARE, patch_size=2, max_patches=2),
        tokenizer=tiny_tokenizer(specials, bos=True, padding_side=side),
        chat_template=template(
            "<|IMG_PATCH|>",
            ("<|START_OF_TURN_TOKEN|>USER ", end, "<|START_OF_TURN_TOKEN|>CHATBOT ", end),
            start="<BOS_TOKEN>",
        ),
    )


def got_ocr2(side: str = "right"):
    specials = CHATML | {"image_token": "<imgpad>", "img_start_token": "<img>", "img_end_token": "</img>"}
    return load("got_ocr2", "GotOcr2Processor")(
        image_processor=load("got_ocr2", "GotOcr2ImageProcessorPil")(size=SQUARE),
        tokenizer=tiny_tokenizer(specials, padding_side=side),
        chat_template=template("<img><imgpad></img>\n", CHATML_TURNS),
    )


def qwen(family: str, name: str, image: str = "<|vision_start|><|image_pad|><|vision_end|>"):
    def build(side: str = "right"):
        specials = CHATML | {
            "vision_start_token": "<|vision_start|>",
            "vision_end_token": "<|vision_end|>",
            "image_token": "<|image_pad|>",
            "video_token": "<|video_pad|>",
        }
        return without_video(load(family, name))(
            image_processor=load("qwen2_vl", "Qwen2VLImageProcessorPil")(
                patch_size=PATCH_SIZE, merge_size=2, size={"shortest_edge": 8 * 8, "longest_edge": 32 * 32}
            ),
            tokenizer=tiny_tokenizer(specials, padding_side=side),
            video_processor=None,
            chat_template=template(image, CHATML_TURNS, video="<|vision_start|><|video_pad|><|vision_end|>"),
        )

    return build


def glm4v(side: str = "right"):
    specials = {
        "pad_token": "<|endoftext|>",
        "eos_token": "<|user|>",
        "mask_token": "[gMASK]",
        "sop_token": "<sop>",
        "assistant_token": "<|assistant|>",
        "boi_token": "<|begin_of_image|>",
        "eoi_token": "<|end_of_image|>",
        "bov_token": "<|begin_of_video|>",
        "eov_token": "<|end_of_video|>",
        "image_token": "<|image|>",
        "video_token": "<|video|>",
    }
    turns = ("<|user|>\n", "", "<|assistant|>\n", "")  # published like this, without an end of turn
    return without_video(load("glm4v", "Glm4vProcessor"))(
        image_processor=load("glm4v", "Glm4vImageProcessorPil")(
            patch_size=PATCH_SIZE, merge_size=2, size={"shortest_edge": 8 * 8, "longest_edge": 2 * 32 * 32}
        ),
        tokenizer=tiny_tokenizer(specials, padding_side=side),
        video_processor=None,
        chat_template=template("<|begin_of_image|><|image|><|end_of_image|>", turns, start="[gMASK]<sop>\n"),
    )


def perception_lm(side: str = "right"):
    specials = LLAMA3 | {"image_token": "<|image|>", "video_token": "<|video|>"}
    return without_video(load("perception_lm", "PerceptionLMProcessor"))(
        video_processor=None,
        image_processor=load("perception_lm", "PerceptionLMImageProcessor")(
            size=SQUARE, tile_size=EDGE, max_num_tiles=2
        ),
        tokenizer=tiny_tokenizer(specials, bos=True, padding_side=side),
        patch_size=PATCH_SIZE,
        chat_template=template("<|image|>", LLAMA3_TURNS, start="<|begin_of_text|>"),
    )


def llama4(side: str = "right"):
    specials = LLAMA3 | {
        "image_token": "<|image|>",
        "patch_token": "<|patch|>",
        "start_of_image_token": "<|image_start|>",
        "end_of_image_token": "<|image_end|>",
        "tile_x_token": "<|tile_x_separator|>",
        "tile_y_token": "<|tile_y_separator|>",
    }
    return load("llama4", "Llama4Processor")(
        image_processor=load("llama4", "Llama4ImageProcessor")(size=SQUARE, max_patches=2),
        tokenizer=tiny_tokenizer(specials, bos=True, padding_side=side),
        patch_size=PATCH_SIZE,
        chat_template=template("<|image|>", LLAMA3_TURNS, start="<|begin_of_text|>"),
    )


def mllama(side: str = "right"):
    specials = LLAMA3 | {"image_token": "<|image|>", "python_token": "<|python_tag|>"}
    return load("mllama", "MllamaProcessor")(
        image_processor=load("mllama", "MllamaImageProcessorPil")(size=SQUARE, max_image_tiles=2),
        tokenizer=tiny_tokenizer(specials, bos=True, padding_side=side),
        chat_template=template("<|image|>", LLAMA3_TURNS, start="<|begin_of_text|>"),
    )


def ovis2(side: str = "right"):
    names = ("<IMG_START>", "<IMG_ATOM>", "<IMG_GRID>", "<IMG_COL>", "<IMG_ROW>", "<IMG_END>")
    specials = CHATML | {"image_token": "<image>"} | {f"part_{index}_token": name for index, name in enumerate(names)}
    return load("ovis2", "Ovis2Processor")(
        image_processor=load("ovis2", "Ovis2ImageProcessorPil")(size=SQUARE, crop_to_patches=True, max_patches=2),
        tokenizer=tiny_tokenizer(specials, padding_side=side),
        image_seq_length=4,
        chat_template=template("<image>\n", CHATML_TURNS),
    )


def janus(side: str = "right"):
    specials = {
        "bos_token": "<bos>",
        "eos_token": "<eos>",
        "pad_token": "<pad>",
        "image_token": "<image_placeholder>",
        "boi_token": "<begin_of_image>",
        "eoi_token": "<end_of_image>",
    }
    return load("janus", "JanusProcessor")(
        image_processor=load("janus", "JanusImageProcessorPil")(size=SQUARE, min_size=EDGE),
        tokenizer=tiny_tokenizer(specials, bos=True, padding_side=side),
        num_image_tokens=4,
        chat_template=template("<image_placeholder>\n", ("User: ", "\n\n", "Assistant:", "<eos>")),
    )


def emu3(side: str = "right"):
    specials = {
        "bos_token": "<|extra_203|>",
        "eos_token": "<|extra_204|>",
        "pad_token": "<|endoftext|>",
        "image_token": "<image>",
        "boi_token": "<|image start|>",
        "eoi_token": "<|image end|>",
        "image_wrapper_token": "<|image token|>",
        "eof_token": "<|extra_201|>",
    }
    return load("emu3", "Emu3Processor")(
        image_processor=load("emu3", "Emu3ImageProcessor")(min_pixels=EDGE * EDGE, max_pixels=4 * EDGE * EDGE),
        tokenizer=tiny_tokenizer(specials, padding_side=side),
        chat_template=template("<image>", ("User: ", "", " Assistant: ", "<|extra_204|>")),
    )


def aria(side: str = "right"):
    specials = CHATML | {"image_token": "<|img|>"}
    return load("aria", "AriaProcessor")(
        image_processor=load("aria", "AriaImageProcessorPil")(max_image_size=490, min_image_size=336),
        tokenizer=tiny_tokenizer(specials, padding_side=side),
        size_conversion={490: 4, 980: 8},
        chat_template=template("<fim_prefix><|img|><fim_suffix>", CHATML_TURNS),
    )


FAMILIES = {
    "gemma3": Family(gemma3, "<end_of_turn>"),
    "paligemma": Family(paligemma, "<eos>", images=(1, 2)),
    "idefics2": Family(idefics2, "<end_of_utterance>"),
    "idefics3": Family(idefics3, "<end_of_utterance>"),
    "smolvlm": Family(smolvlm, "<end_of_utterance>", needs=("num2words", "torchvision")),
    "internvl": Family(internvl, "<|im_end|>"),
    "llava_onevision": Family(llava_onevision, "<|im_end|>"),
    "pixtral": Family(pixtral, "</s>", needs=("torchvision",)),
    "aya_vision": Family(aya_vision, "<|END_OF_TURN_TOKEN|>"),
    "got_ocr2": Family(got_ocr2, "<|im_end|>", images=(1,)),
    "qwen2_vl": Family(qwen("qwen2_vl", "Qwen2VLProcessor"), "<|im_end|>"),
    "qwen3_vl": Family(qwen("qwen3_vl", "Qwen3VLProcessor"), "<|im_end|>"),
    "glm4v": Family(glm4v, ""),
    "ovis2": Family(ovis2, "<|im_end|>"),
    "mllama": Family(mllama, "<|eot_id|>"),
    "janus": Family(janus, "<eos>"),
    "aria": Family(aria, "<|im_end|>"),
    "lfm2_vl": Family(lfm2_vl, "<|im_end|>", needs=("torchvision",)),
    "cohere2_vision": Family(cohere2_vision, "<|END_OF_TURN_TOKEN|>", needs=("torchvision",)),
    "perception_lm": Family(perception_lm, "<|eot_id|>", needs=("torchvision",)),
    "llama4": Family(llama4, "<|eot_id|>", needs=("torchvision",)),
    "emu3": Family(emu3, "<|extra_204|>", needs=("torchvision",)),
}
