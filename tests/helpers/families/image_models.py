"""Families with one-dimensional positions that read images, some of them videos as well."""

from __future__ import annotations

import re
from types import SimpleNamespace

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    AyaVisionConfig,
    AyaVisionForConditionalGeneration,
    AyaVisionProcessor,
    Cohere2VisionConfig,
    Cohere2VisionForConditionalGeneration,
    Cohere2VisionProcessor,
    FastVlmConfig,
    FastVlmForConditionalGeneration,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3Processor,
    GotOcr2Config,
    GotOcr2ForConditionalGeneration,
    GotOcr2Processor,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    Idefics3Processor,
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLProcessor,
    Lfm2VlConfig,
    Lfm2VlForConditionalGeneration,
    Lfm2VlProcessor,
    Llama4Config,
    Llama4ForConditionalGeneration,
    Llama4Processor,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextProcessor,
    LlavaNextVideoConfig,
    LlavaNextVideoForConditionalGeneration,
    LlavaNextVideoProcessor,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionProcessor,
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    Ovis2Config,
    Ovis2ForConditionalGeneration,
    Ovis2Processor,
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
    PerceptionLMConfig,
    PerceptionLMForConditionalGeneration,
    PerceptionLMProcessor,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
    SmolVLMProcessor,
    VideoLlavaConfig,
    VideoLlavaForConditionalGeneration,
    VideoLlavaProcessor,
    VipLlavaConfig,
    VipLlavaForConditionalGeneration,
)
from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches
from transformers.models.smolvlm.processing_smolvlm import (
    DEFAULT_MEDIA_OUTTRO,
    DEFAULT_VIDEO_INTRO,
    FRAME_TIMESTAMP_MESSAGE,
    get_image_prompt_string,
)

from .base import BOS, EOS, HIDDEN, PAD, TEXT_IDS, VOCABULARY, Family, noise

IMAGE, VIDEO = 60, 61  # the placeholders
EDGE, PATCH = 16, 4
TILE = 24  # the edge of a tile: 36 patches, 9 tokens where four of them are merged
GRIDS = [(2, 2), (1, 1), (1, 2)]  # rows and columns of tiles, by the image's seed
SIZES = [(20, 50), (40, 33), (64, 27)]  # of images that any-resolution families cut into tiles
PINPOINTS = [[EDGE, 2 * EDGE], [2 * EDGE, EDGE], [2 * EDGE, 2 * EDGE]]
FRAMES = 3  # clips of one batch are stacked, so that all have as many
WINDOW = 4096  # of attention, longer than any row
NEWLINES = "a learned newline after each line of tiles"


def text(model_type: str = "llama", **extra) -> dict:
    """Settings of a tiny language model."""
    return {
        "model_type": model_type,
        "vocab_size": VOCABULARY,
        "hidden_size": HIDDEN,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "initializer_range": 0.1,  # at the usual 0.02, so small a model hardly sees positions
        "pad_token_id": PAD,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
        **extra,
    }


def vision(model_type: str = "clip_vision_model", **extra) -> dict:
    """Settings of a tiny vision tower: 16 patches of an image."""
    return {
        "model_type": model_type,
        "hidden_size": 24,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "image_size": EDGE,
        "patch_size": PATCH,
        **extra,
    }


def square_images(tokens: list[int], edge: int = EDGE):
    """Images of one size, `(U, 3, edge, edge)`, each written as `tokens`."""

    def make(model, rows):
        seeds = [seed for row in rows for seed in row]
        return {"pixel_values": torch.stack([noise((3, edge, edge), s) for s in seeds])}, [tokens for _ in seeds]

    return make


def pick(options: list, seed: int):
    """The option that belongs to a seed."""
    return options[seed % len(options)]


def rules(processor: type, **attributes):
    """A processor without tokenizer, for its rule of how images are written."""
    made = object.__new__(processor)
    vars(made).update({"image_token": "<image>", "video_token": "<video>"} | attributes)
    return made


def spell(written: str, specials: dict[str, int] | None = None) -> list[int]:
    """Ids of what a processor writes for an image; `specials` are regular expressions and their ids."""
    specials = {"<image>": IMAGE, "<video>": VIDEO} | (specials or {})
    ids = []
    for token in re.findall("|".join([*specials, r"\n", r"\w+", r"[^\w\s]"]), written):
        special = [i for pattern, i in specials.items() if re.fullmatch(pattern, token)]
        ids += special or [TEXT_IDS.start + sum(map(ord, token)) % len(TEXT_IDS)]
    return ids


def tile_counts(grids: list[tuple[int, int]]) -> list[int]:
    """How many tiles each image has: those of its grid and, with several of these, the whole image."""
    return [r * c + (r * c > 1) for r, c in grids]


def tiled_images(processor, specials: dict[str, int] | None = None, edge: int = TILE, around: str = "{}", **arguments):
    """Images cut into tiles, all tiles of the batch in one tensor `(T, 3, edge, edge)`."""

    def make(model, rows):
        seeds = [seed for row in rows for seed in row]
        grids = [pick(GRIDS, seed) for seed in seeds]
        counts = tile_counts(grids)
        tiles = torch.cat([noise((n, 3, edge, edge), seed) for n, seed in zip(counts, seeds, strict=True)])
        described = {
            "pixel_values": tiles[:, None],
            "num_patches": counts,
            "num_crops": [n - 1 for n in counts],
            "aspect_ratios": grids,
            "grids": torch.tensor(grids),
        }
        written = [processor.replace_image_token(described, i, **arguments) for i in range(len(seeds))]
        return {"pixel_values": tiles}, [spell(around.format(w), specials) for w in written]

    return make


def anyres_images(processor, counts_images: bool = False):
    """Images of any resolution: a thumbnail and tiles, `(U, most tiles, 3, edge, edge)`, zeros after an image's last.

    With `counts_images`, images of a row with several are not cut into tiles.
    """

    def make(model, rows):
        seeds = [seed for row in rows for seed in row]
        alone = [len(row) == 1 or not counts_images for row in rows for _ in row]
        sizes = [pick(SIZES, seed) for seed in seeds]
        counts = [image_size_to_num_patches(s, PINPOINTS, EDGE) if a else 1 for s, a in zip(sizes, alone, strict=True)]
        tiles = [noise((n, 3, EDGE, EDGE), seed) for n, seed in zip(counts, seeds, strict=True)]
        inputs = {"pixel_values": pad_sequence(tiles, batch_first=True), "image_sizes": torch.tensor(sizes)}
        if counts_images:
            inputs["batch_num_images"] = torch.tensor([len(row) for row in rows])
        return inputs, [spell(processor.replace_image_token(inputs, i)) for i in range(len(seeds))]

    return make


def stacked_videos(processor, edge: int = EDGE):
    """Clips `(V, FRAMES, 3, edge, edge)`."""

    def make(model, rows):
        clips = torch.stack([noise((FRAMES, 3, edge, edge), seed) for row in rows for seed in row])
        inputs = {"pixel_values_videos": clips}
        return inputs, [spell(processor.replace_video_token(inputs, i)) for i in range(len(clips))]

    return make


def llava():
    config = LlavaConfig(vision_config=vision(), text_config=text(), image_token_id=IMAGE, vision_feature_layer=-2)
    return LlavaForConditionalGeneration(config)


def vipllava():
    return VipLlavaForConditionalGeneration(
        VipLlavaConfig(
            vision_config=vision(), text_config=text(), image_token_index=IMAGE, vision_feature_layer=(-2, -3, 1)
        )
    )


ANYRES = {
    "patch_size": PATCH,
    "image_processor": SimpleNamespace(image_grid_pinpoints=PINPOINTS),
    "num_additional_image_tokens": 1,
    "vision_feature_select_strategy": "default",
}


def llava_next():
    return LlavaNextForConditionalGeneration(
        LlavaNextConfig(
            vision_config=vision(), text_config=text(), image_token_index=IMAGE, image_grid_pinpoints=PINPOINTS
        )
    )


def llava_next_video():
    return LlavaNextVideoForConditionalGeneration(
        LlavaNextVideoConfig(
            vision_config=vision(),
            text_config=text(),
            image_token_index=IMAGE,
            video_token_index=VIDEO,
            image_grid_pinpoints=PINPOINTS,
        )
    )


# At most two tiles' worth of tokens, so that the largest grid is scaled down.
ONEVISION = ANYRES | {
    "num_image_tokens": (EDGE // PATCH) ** 2,
    "vision_feature_select_strategy": "full",
    "vision_aspect_ratio": "anyres_max_2",
}


def llava_onevision():
    return LlavaOnevisionForConditionalGeneration(
        LlavaOnevisionConfig(
            vision_config=vision("siglip_vision_model", vision_use_head=False),
            text_config=text("qwen2"),
            image_token_index=IMAGE,
            video_token_index=VIDEO,
            image_grid_pinpoints=PINPOINTS,
            vision_aspect_ratio=ONEVISION["vision_aspect_ratio"],
        )
    )


def video_llava():
    return VideoLlavaForConditionalGeneration(
        VideoLlavaConfig(vision_config=vision(), text_config=text(), image_token_index=IMAGE, video_token_index=VIDEO)
    )


IDEFICS_TOWER = {
    "hidden_size": 24,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": TILE,
    "patch_size": PATCH,
}
IDEFICS_SPECIALS = {"<fake>": 3, "<global>": 4, r"<row_\d_col_\d>": 5}
SEQUENCE = 9  # tokens of a tile
IDEFICS = {"image_seq_len": SEQUENCE, "fake_image_token": "<fake>"} | dict.fromkeys(
    ("global_image_token", "global_image_tag"), "<global>"
)


def smolvlm():
    return SmolVLMForConditionalGeneration(
        SmolVLMConfig(vision_config=IDEFICS_TOWER, text_config=text(), image_token_id=IMAGE, pad_token_id=PAD)
    )


def idefics3():
    return Idefics3ForConditionalGeneration(
        Idefics3Config(vision_config=IDEFICS_TOWER, text_config=text(), image_token_id=IMAGE, pad_token_id=PAD)
    )


def idefics_images(processor):
    """The tiles of each row's images, `(B, most tiles, 3, TILE, TILE)`; zeros where a row has fewer."""

    def make(model, rows):
        grids = [[pick(GRIDS, seed) for seed in row] for row in rows]
        tiles = [
            torch.cat(
                [
                    torch.zeros(0, 3, TILE, TILE),
                    *(noise((n, 3, TILE, TILE), s) for n, s in zip(tile_counts(g), row, strict=True)),
                ]
            )
            for g, row in zip(grids, rows, strict=True)
        ]
        inputs = {
            "pixel_values": pad_sequence(tiles, batch_first=True),
            "pixel_attention_mask": pad_sequence(
                [torch.ones(len(t), TILE, TILE, dtype=torch.long) for t in tiles], batch_first=True
            ),
        }
        # A picture that is not cut has no rows and columns.
        described = {
            "rows": [[r if r * c > 1 else 0 for r, c in row] for row in grids],
            "cols": [[c if r * c > 1 else 0 for r, c in row] for row in grids],
        }
        return inputs, [
            spell(processor.replace_image_token(described, i), IDEFICS_SPECIALS) for i in range(sum(map(len, rows)))
        ]

    return make


def smolvlm_videos(model, rows):
    """Clips `(V, FRAMES, 3, TILE, TILE)` in place of images, each frame after its time."""
    clips = torch.stack([noise((FRAMES, 3, TILE, TILE), seed) for row in rows for seed in row])
    inputs = {"pixel_values": clips, "pixel_attention_mask": torch.ones(*clips.shape[:2], TILE, TILE).long()}
    # As the processor's own method, which needs num2words.
    frame = get_image_prompt_string(0, 0, SEQUENCE, "<fake>", "<image>", "<global>")
    written = DEFAULT_VIDEO_INTRO.format(frame_count="three", video_duration="0:00:03")
    written += "".join(FRAME_TIMESTAMP_MESSAGE.format(timestamp=f"00:0{i}") + frame for i in range(FRAMES))
    return inputs, [spell(written + DEFAULT_MEDIA_OUTTRO, IDEFICS_SPECIALS) for _ in clips]


def internvl():
    return InternVLForConditionalGeneration(
        InternVLConfig(
            vision_config=vision("internvl_vision", image_size=[TILE, TILE], patch_size=[PATCH, PATCH]),
            text_config=text("qwen2"),
            image_token_id=IMAGE,
            image_seq_length=SEQUENCE,
        )
    )


INTERNVL = rules(InternVLProcessor, image_seq_length=SEQUENCE, start_image_token="<img>", end_image_token="</img>")
INTERNVL_SPECIALS = {"<img>": 3, "</img>": 4}


def internvl_videos(model, rows):
    """Frames in place of tiles, `(V * FRAMES, 3, TILE, TILE)`, all written with the image placeholder."""
    clips = torch.stack([noise((FRAMES, 3, TILE, TILE), seed) for row in rows for seed in row])
    written = [INTERNVL.replace_video_token({"pixel_values_videos": clips}, i) for i in range(len(clips))]
    return {"pixel_values": clips.flatten(0, 1)}, [spell(w, INTERNVL_SPECIALS) for w in written]


def gemma3():
    model = Gemma3ForConditionalGeneration(
        Gemma3Config(
            vision_config=vision("siglip_vision_model", vision_use_head=False, image_size=TILE),
            text_config=text(
                "gemma3_text",
                head_dim=8,
                query_pre_attn_scalar=8,
                sliding_window=WINDOW,
                layer_types=["sliding_attention", "full_attention"],
            ),
            image_token_index=IMAGE,
            boi_token_index=3,
            eoi_token_index=4,
            mm_tokens_per_image=SEQUENCE,
        )
    )
    # Starts as zeros.
    torch.nn.init.normal_(model.model.multi_modal_projector.mm_input_projection_weight, std=0.1)
    return model


GEMMA3 = rules(Gemma3Processor, full_image_sequence="\n\n<boi>" + "<image>" * SEQUENCE + "<eoi>\n\n")


def paligemma():
    return PaliGemmaForConditionalGeneration(
        PaliGemmaConfig(
            vision_config=vision("siglip_vision_model", vision_use_head=False),
            text_config=text("gemma", head_dim=8),
            image_token_index=IMAGE,
            vocab_size=VOCABULARY,
            hidden_size=HIDDEN,
            projection_dim=HIDDEN,
        )
    )


def mistral3():
    return Mistral3ForConditionalGeneration(
        Mistral3Config(
            vision_config=vision("pixtral", image_size=64, head_dim=12),
            text_config=text("mistral", head_dim=8, sliding_window=None),
            image_token_index=IMAGE,
        )
    )


def mistral3_images(model, rows):
    """Images of different sizes, padded to the largest, `(U, 3, H, W)`."""
    seeds = [seed for row in rows for seed in row]
    sizes = [pick([(16, 24), (24, 24), (32, 16)], seed) for seed in seeds]
    height, width = (max(side) for side in zip(*sizes, strict=True))
    images = torch.zeros(len(seeds), 3, height, width)
    for image, (h, w), seed in zip(images, sizes, seeds, strict=True):
        image[:, :h, :w] = noise((3, h, w), seed)
    # A break after each line of tokens, the end after the last. Its processor's own rule needs torchvision.
    merged = 2 * PATCH
    lines = [[*[IMAGE] * (w // merged), 3] * (h // merged) for h, w in sizes]
    return {"pixel_values": images, "image_sizes": torch.tensor(sizes)}, [[*line[:-1], 4] for line in lines]


def aya_vision():
    return AyaVisionForConditionalGeneration(
        AyaVisionConfig(
            vision_config=vision("siglip_vision_model", vision_use_head=False, image_size=TILE),
            text_config=text("cohere2", sliding_window=WINDOW),
            image_token_index=IMAGE,
            alignment_intermediate_size=64,
        )
    )


AYA = rules(
    AyaVisionProcessor,
    img_size=TILE,
    patch_size=2 * PATCH,
    img_patch_token="<image>",
    start_of_img_token="<start>",
    end_of_img_token="<end>",
    tile_token="TILE",
    tile_global_token="TILE_GLOBAL",
)


def cohere2_vision():
    return Cohere2VisionForConditionalGeneration(
        Cohere2VisionConfig(
            vision_config=vision("siglip_vision_model", vision_use_head=False, image_size=TILE),
            text_config=text("cohere2", sliding_window=WINDOW),
            image_token_id=IMAGE,
            alignment_intermediate_size=64,
        )
    )


# Its patch_size is the number of tokens along a tile's side.
COHERE2 = rules(
    Cohere2VisionProcessor, patch_size=3, boi_token="<boi>", eoi_token="<eoi>", img_line_break_token="<break>"
)


def lfm2_vl():
    return Lfm2VlForConditionalGeneration(
        Lfm2VlConfig(
            vision_config=vision("siglip2_vision_model", vision_use_head=False, num_patches=(TILE // PATCH) ** 2),
            text_config=text("lfm2", layer_types=["conv", "full_attention"], block_multiple_of=8),
            image_token_id=IMAGE,
            projector_hidden_size=40,
        )
    )


def lfm2_images(model, rows):
    """Patches of tiles and thumbnails, `(T, 36, 48)`, with the shape of each and zeros after its last patch."""
    processor = rules(
        Lfm2VlProcessor,
        image_start_token="<start>",
        image_end_token="<end>",
        image_thumbnail_token="<thumbnail>",
        image_processor=SimpleNamespace(
            use_thumbnail=True, tile_size=TILE, downsample_factor=2, encoder_patch_size=PATCH
        ),
    )
    specials = {"<start>": 3, "<end>": 4, "<thumbnail>": 5, r"<\|img_row_\d_col_\d\|>": 6}
    tile = TILE // PATCH
    shapes, patches, written = [], [], []
    for seed in [seed for row in rows for seed in row]:
        grid_rows, grid_cols = pick(GRIDS, seed)
        size = pick([(24, 24), (16, 24), (16, 32)], seed)
        cut = grid_rows * grid_cols if grid_rows * grid_cols > 1 else 0
        parts = [(tile, tile)] * cut + [(size[0] // PATCH, size[1] // PATCH)]
        values = noise((len(parts), tile * tile, 3 * PATCH * PATCH), seed)
        patches += [part[: h * w] for part, (h, w) in zip(values, parts, strict=True)]
        shapes += parts
        described = {"image_rows": [grid_rows], "image_cols": [grid_cols], "image_sizes": [size]}
        written.append(spell(processor.replace_image_token(described, 0, use_image_special_tokens=True), specials))
    inputs = {
        "pixel_values": torch.zeros(len(shapes), tile * tile, 3 * PATCH * PATCH),
        "pixel_attention_mask": torch.zeros(len(shapes), tile * tile, dtype=torch.long),
        "spatial_shapes": torch.tensor(shapes),
    }
    for i, values in enumerate(patches):
        inputs["pixel_values"][i, : len(values)] = values
        inputs["pixel_attention_mask"][i, : len(values)] = 1
    return inputs, written


OVIS2_SPECIALS = {
    "<IMG_START>": 3,
    "<IMG_GRID>": 4,
    "<IMG_COL>": 5,
    "<IMG_ROW>": 6,
    "<IMG_END>": 7,
    "<IMG_ATOM>": IMAGE,
}


def ovis2():
    return Ovis2ForConditionalGeneration(
        Ovis2Config(
            vision_config=vision(image_size=TILE, hidden_stride=2, vocab_size=50) | {"model_type": "ovis2_vision"},
            text_config=text("qwen2"),
            image_token_id=IMAGE,
            visual_indicator_token_ids=list(OVIS2_SPECIALS.values())[:5],
            vocab_size=VOCABULARY,
            hidden_size=HIDDEN,
        )
    )


def got_ocr2():
    return GotOcr2ForConditionalGeneration(
        GotOcr2Config(
            vision_config={
                "hidden_size": 24,
                "output_channels": 16,
                "num_hidden_layers": 3,
                "num_attention_heads": 2,
                "image_size": 48,
                "patch_size": PATCH,
                "window_size": 4,
                "global_attn_indexes": [2],
                "mlp_dim": 48,
                "initializer_range": 0.02,  # the default leaves next to nothing of an image
            },
            text_config=text("qwen2"),
            image_token_index=IMAGE,
        )
    )


def perception_lm():
    # The real tower is timm's; one of transformers with the same outputs stands in, so that tests need no timm.
    return PerceptionLMForConditionalGeneration(
        PerceptionLMConfig(
            vision_config=vision(model_args={"embed_dim": 24}),
            text_config=text(),
            image_token_id=IMAGE,
            video_token_id=VIDEO,
            projector_pooling_ratio=2,
        )
    )


PERCEPTION_LM = rules(PerceptionLMProcessor, patch_size=PATCH, pooling_ratio=2)


def perception_lm_images(model, rows):
    """A thumbnail and two tiles of each image, `(U, 3, 3, EDGE, EDGE)`: images of a batch are stacked."""
    images = torch.stack([noise((3, 3, EDGE, EDGE), seed) for row in rows for seed in row])
    inputs = {"pixel_values": images}
    return inputs, [spell(PERCEPTION_LM.replace_image_token(inputs, i)) for i in range(len(images))]


def fast_vlm():
    # The real tower is timm's; a convolutional one of transformers stands in: both give (U, channels, height, width).
    tower = {"model_type": "convnext", "num_stages": 2, "depths": [1, 1], "hidden_sizes": [8, 24], "hidden_size": 24}
    return FastVlmForConditionalGeneration(
        FastVlmConfig(vision_config=tower, text_config=text("qwen2"), image_token_index=IMAGE)
    )


def llama4():
    return Llama4ForConditionalGeneration(
        Llama4Config(
            vision_config=vision(
                "llama4_vision_model",
                image_size=TILE,
                intermediate_size=96,  # four patches side by side
                projector_input_dim=24,
                projector_output_dim=24,
                vision_output_dim=24,
            ),
            text_config=text(
                "llama4_text",
                head_dim=8,
                intermediate_size_mlp=64,
                num_local_experts=2,
                moe_layers=[1],
                no_rope_layers=[1, 0],
                attention_chunk_size=WINDOW,
            ),
            image_token_index=IMAGE,
            boi_token_index=3,
            eoi_token_index=4,
        )
    )


LLAMA4 = rules(Llama4Processor, patch_size=PATCH, downsample_ratio=4)
LLAMA4_SPECIALS = {
    r"<\|image_start\|>": 3,
    r"<\|image_end\|>": 4,
    r"<\|tile_x_separator\|>": 5,
    r"<\|tile_y_separator\|>": 6,
    r"<\|image\|>": 7,
    r"<\|patch\|>": IMAGE,
}


FAMILIES = [
    Family("llava", llava, square_images([IMAGE] * 16)),
    Family("llava_next", llava_next, anyres_images(rules(LlavaNextProcessor, **ANYRES)), notes=NEWLINES),
    Family(
        "llava_onevision",
        llava_onevision,
        anyres_images(rules(LlavaOnevisionProcessor, **ONEVISION), counts_images=True),
        stacked_videos(rules(LlavaOnevisionProcessor, **ONEVISION)),
        notes=NEWLINES + "; one after each clip",
    ),
    Family("vipllava", vipllava, square_images([IMAGE] * 16)),
    Family(
        "smolvlm",
        smolvlm,
        idefics_images(rules(SmolVLMProcessor, **IDEFICS)),
        smolvlm_videos,
        notes="features come per sample; frames are written with the image placeholder",
    ),
    Family(
        "idefics3",
        idefics3,
        idefics_images(rules(Idefics3Processor, **IDEFICS)),
        notes="features come per sample",
    ),
    Family(
        "internvl",
        internvl,
        tiled_images(INTERNVL, INTERNVL_SPECIALS),
        internvl_videos,
        notes="frames are written with the image placeholder",
    ),
    Family(
        "gemma3",
        gemma3,
        tiled_images(GEMMA3, {"<boi>": 3, "<eoi>": 4}),
        type_ids=("token_type_ids",),
        notes="tokens of an image attend to each other",
    ),
    Family(
        "paligemma",
        paligemma,
        square_images([IMAGE] * 16),
        type_ids=("token_type_ids",),
        notes="image and prompt attend to each other",
    ),
    Family("mistral3", mistral3, mistral3_images),
    Family("aya_vision", aya_vision, tiled_images(AYA, {"<start>": 3, "<end>": 4, r"TILE_\d": 5, "TILE_GLOBAL": 6})),
    Family("cohere2_vision", cohere2_vision, tiled_images(COHERE2, {"<boi>": 3, "<eoi>": 4, "<break>": 5})),
    Family("lfm2_vl", lfm2_vl, lfm2_images, masks_tokens=False, notes="short convolutions see masked tokens"),
    Family(
        "ovis2",
        ovis2,
        tiled_images(rules(Ovis2Processor, image_seq_length=SEQUENCE), OVIS2_SPECIALS),
        notes="separators of images are embedded by the vision side",
    ),
    Family(
        "got_ocr2",
        got_ocr2,
        tiled_images(
            rules(GotOcr2Processor),
            {"<img>": 3, "</img>": 4},
            48,
            "<img>{}</img>",
            num_image_tokens=SEQUENCE,
            num_pages_per_batch=[1] * 100,
            patch_indices=range(1, 101),
        ),
    ),
    Family("perception_lm", perception_lm, perception_lm_images, stacked_videos(PERCEPTION_LM)),
    Family("fast_vlm", fast_vlm, square_images([IMAGE] * 16, 32)),
    Family(
        "llama4",
        llama4,
        tiled_images(LLAMA4, LLAMA4_SPECIALS),
        no_beams=("image",),
        notes="the projector runs in forward",
    ),
    Family(
        "llava_next_video",
        llava_next_video,
        anyres_images(rules(LlavaNextVideoProcessor, **ANYRES)),
        stacked_videos(rules(LlavaNextVideoProcessor, **ANYRES)),
        notes=NEWLINES,
    ),
    Family(
        "video_llava",
        video_llava,
        square_images([IMAGE] * 16),
        stacked_videos(rules(VideoLlavaProcessor, patch_size=PATCH, num_additional_image_tokens=1)),
        notes="each frame has a class token",
    ),
]
