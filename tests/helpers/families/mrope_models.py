"""Families whose visual tokens have positions in time, height and width, and the other families with `grid_thw`."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from transformers import (
    CohereCompassConfig,
    CohereCompassForConditionalGeneration,
    Cosmos3EdgeConfig,
    Cosmos3EdgeForConditionalGeneration,
    Ernie4_5_VLMoeConfig,
    Ernie4_5_VLMoeForConditionalGeneration,
    Exaone4_5_Config,
    Exaone4_5_ForConditionalGeneration,
    Glm4vConfig,
    Glm4vForConditionalGeneration,
    Glm4vMoeConfig,
    Glm4vMoeForConditionalGeneration,
    Glm46VConfig,
    Glm46VForConditionalGeneration,
    GlmOcrConfig,
    GlmOcrForConditionalGeneration,
    HunYuanVLConfig,
    HunYuanVLForConditionalGeneration,
    HyperCLOVAXVisionV2Config,
    HyperCLOVAXVisionV2ForConditionalGeneration,
    MiniCPMV4_7Config,
    MiniCPMV4_7ForConditionalGeneration,
    PaddleOCRVLConfig,
    PaddleOCRVLForConditionalGeneration,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5OmniThinkerConfig,
    Qwen2_5OmniThinkerForConditionalGeneration,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen3_5Config,
    Qwen3_5ForConditionalGeneration,
    Qwen3_5MoeConfig,
    Qwen3_5MoeForConditionalGeneration,
    Qwen3OmniMoeThinkerConfig,
    Qwen3OmniMoeThinkerForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLMoeConfig,
    Qwen3VLMoeForConditionalGeneration,
    VideoLlama3Config,
    VideoLlama3ForConditionalGeneration,
)

from .audio_models import flamingo_tokens, masked_audios, qwen3_asr_tokens
from .base import AUDIO, HIDDEN, Family, noise
from .image_models import IMAGE, PATCH, text, vision

VIDEO = 61  # the video placeholder
IMAGE_START, IMAGE_END, VIDEO_START, VIDEO_END = 3, 4, 5, 6
MERGE = 2  # 2 x 2 patches make one token
# The default of 0.02 is meant for wide layers: narrow towers would hardly be heard in the logits.
SPREAD = {"initializer_range": 0.1}
PLACEHOLDERS = {"image_token_id": IMAGE, "video_token_id": VIDEO}
MROPE = ("mm_token_type_ids",)


def mrope(model_type: str, sections: list[int], heads: int = 4, **extra) -> dict:
    """Settings of a tiny language model with `sections` of its rotations for time, height and width."""
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": sections, **extra.pop("rope", {})}
    head = {"num_attention_heads": heads, "num_key_value_heads": heads // 2}
    return text(model_type, **head, rope_parameters=rope, **SPREAD, **extra)


def tower(model_type: str, **extra) -> dict:
    """Settings of a tiny tower for images of any size."""
    return {
        "model_type": model_type,
        "depth": 3,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_heads": 2,
        "patch_size": PATCH,
        "spatial_merge_size": MERGE,
        "temporal_patch_size": 2,
        "out_hidden_size": HIDDEN,
        **SPREAD,
        **extra,
    }


def size(seed: int) -> tuple[int, int]:
    """Rows and columns of patches of a picture."""
    return 2 * MERGE + MERGE * (seed % 2), 2 * MERGE + MERGE * (seed % 4)


def flat(rows: Iterable[list]) -> list:
    return [value for row in rows for value in row]


def patches(seeds: list[int], grids: list[list[int]], features: int) -> torch.Tensor:
    """Pictures in the packed layout: one row per patch."""
    return torch.cat([noise((t * h * w, features), s) for s, (t, h, w) in zip(seeds, grids, strict=True)])


def grid_images(before: tuple[int, ...] = (IMAGE_START,), after: tuple[int, ...] = (IMAGE_END,), depth: int = 2):
    """Images of any size, `pixel_values` with `depth` frames in each patch, and `image_grid_thw`."""

    def make(model, rows):
        seeds = flat(rows)
        grids = [[1, *size(seed)] for seed in seeds]
        pixels = patches(seeds, grids, 3 * depth * PATCH**2)
        tokens = [[*before, *[IMAGE] * (h * w // MERGE**2), *after] for _, h, w in grids]
        return {"pixel_values": pixels, "image_grid_thw": torch.tensor(grids)}, tokens

    return make


def grid_videos(write, depth: int = 2, step: int = 1, **timing):
    """Clips of two to four frames, or `step` times as many; `write` makes tokens of the numbers of frames and of tokens
    in each."""

    def make(model, rows):
        seeds = flat(rows)
        grids = [[step * (2 + seed % 3), *size(seed)] for seed in seeds]
        inputs = {
            "pixel_values_videos": patches(seeds, grids, 3 * depth * PATCH**2),
            "video_grid_thw": torch.tensor(grids),
            **{name: torch.tensor([value(seed) for seed in seeds]) for name, value in timing.items()},
        }
        return inputs, [write(t, h * w // MERGE**2) for t, h, w in grids]

    return make


def seconds(seed: int) -> float:
    """Time between the frames of a clip."""
    return 0.5 + 0.5 * (seed % 3)


def whole(frames: int, tokens: int) -> list[int]:
    """All frames of a clip in one piece."""
    return [IMAGE_START, *[VIDEO] * (frames * tokens), IMAGE_END]


def stamped(frames: int, tokens: int) -> list[int]:
    """Each frame of a clip after its time."""
    return [t for frame in range(frames) for t in (7, 8 + frame % 2, IMAGE_START, *[VIDEO] * tokens, IMAGE_END)]


def as_images(frames: int, tokens: int) -> list[int]:
    """Frames of a clip as images, each before its time."""
    written = [t for frame in range(frames) for t in (IMAGE_START, *[IMAGE] * tokens, IMAGE_END, 7, 8 + frame % 2)]
    return [VIDEO_START, *written, VIDEO_END]


# Most layers of such towers attend within windows of 2 x 2 tokens.
WINDOWS = {"window_size": 16, "fullatt_block_indexes": [1]}


def qwen2_5_vl():
    config = Qwen2_5_VLConfig(
        vision_config=tower("qwen2_5_vl_vision", **WINDOWS),
        text_config=mrope("qwen2_5_vl_text", [2, 1, 1]),
        vision_start_token_id=IMAGE_START,
        vision_end_token_id=IMAGE_END,
        **PLACEHOLDERS,
    )
    return Qwen2_5_VLForConditionalGeneration(config)


def qwen2_vl():
    config = Qwen2VLConfig(
        vision_config=tower("qwen2_vl_vision", embed_dim=32, mlp_ratio=2),
        text_config=mrope("qwen2_vl_text", [2, 1, 1]),
        vision_start_token_id=IMAGE_START,
        vision_end_token_id=IMAGE_END,
        **PLACEHOLDERS,
    )
    return Qwen2VLForConditionalGeneration(config)


def qwen3(config_class, model_class, name: str, sections: list[int], extra: dict, **settings):
    """The models of the Qwen3 era: interleaved rotations, learned positions of 6 x 6 patches."""

    def build():
        rope = {"mrope_interleaved": True, **settings.get("rope", {})}
        config = config_class(
            vision_config=tower(f"{name}_vision", num_position_embeddings=36, **extra),
            text_config=mrope(f"{name}_text", sections, **{"head_dim": 8, **settings, "rope": rope}),
            vision_start_token_id=IMAGE_START,
            vision_end_token_id=IMAGE_END,
            **PLACEHOLDERS,
        )
        return model_class(config)

    return build


EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
DEEPSTACK = {"deepstack_visual_indexes": [0, 1]}
LINEAR = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "head_dim": 16,
    "rope": {"partial_rotary_factor": 0.5},
}


def glm(config_class, model_class, name: str, **settings):
    """The GLM models; half of each head is rotated."""

    def build():
        config = config_class(
            vision_config=tower(f"{name}_vision", image_size=16),
            text_config=mrope(f"{name}_text", [2, 1, 1], heads=2, rope={"partial_rotary_factor": 0.5}, **settings),
            image_start_token_id=IMAGE_START,
            image_end_token_id=IMAGE_END,
            video_start_token_id=VIDEO_START,
            video_end_token_id=VIDEO_END,
            **PLACEHOLDERS,
        )
        return model_class(config)

    return build


GLM_EXPERTS = {
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "first_k_dense_replace": 1,
    "n_shared_experts": 1,
}


def ernie4_5_vl_moe():
    config = Ernie4_5_VLMoeConfig(
        vision_config=tower("ernie4_5_vl_moe_vision", temporal_merge_size=2),
        text_config=mrope(
            "ernie4_5_vl_moe_text",
            [1, 1, 2],
            moe_num_experts=4,
            moe_k=2,
            moe_intermediate_size=[16, 16],
            moe_num_shared_experts=1,
        ),
        image_start_token_id=IMAGE_START,
        image_end_token_id=IMAGE_END,
        video_start_token_id=VIDEO_START,
        video_end_token_id=VIDEO_END,
        **PLACEHOLDERS,
    )
    return Ernie4_5_VLMoeForConditionalGeneration(config)


def paddleocr_vl():
    config = PaddleOCRVLConfig(
        vision_config=vision("paddleocr_vl_vision", hidden_size=32, spatial_merge_size=MERGE, **SPREAD),
        text_config=mrope("paddleocr_vl_text", [2, 1, 1], head_dim=8),
        vision_start_token_id=IMAGE_START,
        vision_end_token_id=IMAGE_END,
        **PLACEHOLDERS,
    )
    return PaddleOCRVLForConditionalGeneration(config)


def paddle_images(model, rows):
    """Like the others of the packed layout, but with square patches."""
    inputs, tokens = grid_images(depth=1)(model, rows)
    return {**inputs, "pixel_values": inputs["pixel_values"].view(-1, 3, PATCH, PATCH)}, tokens


def video_llama_3():
    config = VideoLlama3Config(
        vision_config=vision("video_llama_3_vision", hidden_size=32, **SPREAD),
        text_config=text("qwen2", **SPREAD),
        **PLACEHOLDERS,
    )
    return VideoLlama3ForConditionalGeneration(config)


def video_llama_images(model, rows):
    inputs, tokens = grid_images(before=(), after=(), depth=1)(model, rows)
    return {**inputs, "image_merge_sizes": torch.full((len(tokens),), MERGE)}, tokens


def video_llama_videos(model, rows):
    """Clips whose later frames lose the tokens that changed little; only kept tokens have a placeholder."""
    inputs, whole_clips = grid_videos(whole, depth=1)(model, rows)
    masks, tokens = [], []
    for (t, h, w), seed in zip(inputs["video_grid_thw"].tolist(), flat(rows), strict=True):
        kept = noise((t, h * w // MERGE**2), seed + 1) > -0.5
        kept[0], kept[:, 0] = True, True
        masks.append(kept.flatten())
        frames = [[7, 8, *[VIDEO] * count] for count in kept.sum(1).tolist()]
        tokens.append(flat([9, *frame] for frame in frames)[1:])
    merged = torch.full((len(whole_clips),), MERGE)
    return {**inputs, "video_merge_sizes": merged, "video_compression_mask": torch.cat(masks)}, tokens


def hunyuan_vl():
    config = HunYuanVLConfig(
        vision_config=vision(
            "hunyuan_vl_vision",
            hidden_size=32,
            spatial_merge_size=MERGE,
            out_hidden_size=HIDDEN,
            text_hidden_size=HIDDEN,
            max_image_size=64,
            **SPREAD,
        ),
        text_config=mrope("hunyuan_vl_text", [1, 1, 1, 1], head_dim=8),
        image_token_id=IMAGE,
        im_start_id=IMAGE_START,
        im_end_id=IMAGE_END,
    )
    return HunYuanVLForConditionalGeneration(config)


def hunyuan_images(model, rows):
    """Each row of an image ends with a token of its own, and each image has one more at either end."""
    inputs, _ = grid_images(depth=1)(model, rows)
    sizes = [(h // MERGE, w // MERGE) for _, h, w in inputs["image_grid_thw"].tolist()]
    return inputs, [[IMAGE_START, *[IMAGE] * (h * (w + 1) + 2), IMAGE_END] for h, w in sizes]


def cosmos3_edge():
    config = Cosmos3EdgeConfig(
        vision_config=vision("cosmos3_edge_vision", hidden_size=32, num_patches=16, spatial_merge_size=MERGE, **SPREAD),
        text_config=mrope("cosmos3_edge_text", [2, 1, 1], head_dim=8),
        projector_hidden_size=64,
        vision_start_token_id=IMAGE_START,
        vision_end_token_id=IMAGE_END,
        **PLACEHOLDERS,
    )
    return Cosmos3EdgeForConditionalGeneration(config)


def cohere_compass():
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1], "mrope_interleaved": True}
    config = CohereCompassConfig(
        vision_config=tower("cohere_compass_vision", num_position_embeddings=36, **DEEPSTACK),
        text_config=text("cohere_compass_text", rope_parameters={"full_attention": rope}, **SPREAD),
        vision_start_token_id=IMAGE_START,
        vision_end_token_id=IMAGE_END,
        **PLACEHOLDERS,
    )
    return CohereCompassForConditionalGeneration(config)


def qwen2_5_omni():
    audio = {"d_model": 32, "encoder_layers": 2, "encoder_attention_heads": 2, "encoder_ffn_dim": 48}
    config = Qwen2_5OmniThinkerConfig(
        vision_config=tower("qwen2_5_omni_vision_encoder", **WINDOWS),
        audio_config={**audio, "num_mel_bins": 8, "output_dim": HIDDEN, **SPREAD},
        text_config=mrope("qwen2_5_omni_text", [2, 1, 1]),
        image_token_index=IMAGE,
        video_token_index=VIDEO,
        audio_token_index=AUDIO,
        vision_start_token_id=IMAGE_START,
        vision_end_token_id=IMAGE_END,
        audio_start_token_id=8,
        audio_end_token_id=9,
        **SPREAD,
    )
    return Qwen2_5OmniThinkerForConditionalGeneration(config)


def qwen3_omni_moe():
    audio = {"d_model": 32, "encoder_layers": 2, "encoder_attention_heads": 2, "encoder_ffn_dim": 48}
    windows = {"n_window": 50, "n_window_infer": 200, "downsample_hidden_size": 4}
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    config = Qwen3OmniMoeThinkerConfig(
        vision_config=tower("qwen3_omni_moe_vision_encoder", num_position_embeddings=36, **DEEPSTACK),
        audio_config={**audio, **windows, "num_mel_bins": 8, "output_dim": HIDDEN, **SPREAD},
        text_config=mrope("qwen3_omni_moe_text", [2, 1, 1], head_dim=8, rope={"mrope_interleaved": True}, **experts),
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        audio_token_id=AUDIO,
        vision_start_token_id=IMAGE_START,
        vision_end_token_id=IMAGE_END,
        audio_start_token_id=8,
        audio_end_token_id=9,
        **SPREAD,
    )
    return Qwen3OmniMoeThinkerForConditionalGeneration(config)


def exaone4_5():
    config = Exaone4_5_Config(
        vision_config=tower("exaone4_5_vision", num_key_value_heads=1, **WINDOWS),
        text_config=text("exaone4", layer_types=["sliding_attention", "full_attention"], **SPREAD),
        **PLACEHOLDERS,
    )
    return Exaone4_5_ForConditionalGeneration(config)


def hyperclovax_vision_v2():
    config = HyperCLOVAXVisionV2Config(
        vision_config=tower("qwen2_5_vl_vision", **WINDOWS), text_config=text("hyperclovax", **SPREAD), **PLACEHOLDERS
    )
    return HyperCLOVAXVisionV2ForConditionalGeneration(config)


def minicpmv4_7():
    settings = {key: value for key, value in LINEAR.items() if key != "rope"}
    rope = {"mrope_interleaved": True, **LINEAR["rope"]}
    config = MiniCPMV4_7Config(
        vision_config=vision("minicpmv4_7_vision", hidden_size=32, image_size=64, **SPREAD),
        text_config=mrope("qwen3_5_text", [2, 1, 1], rope=rope, **settings),
        insert_layer_id=1,
        image_start_id=IMAGE_START,
        image_end_id=IMAGE_END,
        slice_start_id=VIDEO_START,
        slice_end_id=VIDEO_END,
        newline_id=7,
        **PLACEHOLDERS,
    )
    return MiniCPMV4_7ForConditionalGeneration(config)


def crops(sizes: list[list[int]], seed: int) -> torch.Tensor:
    """Crops as strips of patches, one after the other."""
    return torch.cat([noise((1, 3, PATCH, h * w * PATCH), 7 * seed + i) for i, (h, w) in enumerate(sizes)], dim=-1)


def minicpm_images(model, rows):
    """A small version of the picture, and, with some seeds, slices of the whole in rows; 4 x 4 patches a token."""
    seeds = flat(rows)
    pixels, sizes, tokens = [], [], []
    for seed in seeds:
        down, across = [(0, 0), (0, 0), (1, 2), (2, 2)][(seed + seed // 100) % 4]
        parts = [[8, 8 + 4 * (seed % 3)], *[[8, 8]] * (down * across)]
        slices = [[VIDEO_START, *[IMAGE] * 4, VIDEO_END] * across for _ in range(down)]
        lines = flat([7, *line] for line in slices)[1:]
        pixels.append(crops(parts, seed))
        sizes += parts
        tokens.append([8, 9, IMAGE_START, *[IMAGE] * (parts[0][0] * parts[0][1] // 16), IMAGE_END, *lines])
    return {"pixel_values": torch.cat(pixels, dim=-1), "target_sizes": torch.tensor(sizes)}, tokens


def minicpm_videos(model, rows):
    """A small image for each frame."""
    seeds = flat(rows)
    clips = [[[8, 8 + 4 * (seed % 2)]] * (2 + seed % 3) for seed in seeds]
    pixels = torch.cat([crops(clip, seed) for clip, seed in zip(clips, seeds, strict=True)], dim=-1)
    tokens = [flat([IMAGE_START, *[VIDEO] * (h * w // 16), IMAGE_END] for h, w in clip) for clip in clips]
    return {"pixel_values_videos": pixels, "target_sizes_videos": torch.tensor(flat(clips))}, tokens


def merged_frames(frames: int, tokens: int) -> list[int]:
    """A clip with a token for each two frames."""
    return [VIDEO_START, *[VIDEO] * (frames // 2 * tokens), VIDEO_END]


GLM_NOTE = "video frames are written with the image placeholder"
LINEAR_NOTE = "linear attention"

FAMILIES = [
    Family(
        "qwen2_5_vl",
        qwen2_5_vl,
        grid_images(),
        grid_videos(whole, second_per_grid_ts=seconds),
        MROPE,
    ),
    Family("qwen2_vl", qwen2_vl, grid_images(), grid_videos(whole), MROPE),
    Family(
        "qwen3_vl",
        qwen3(Qwen3VLConfig, Qwen3VLForConditionalGeneration, "qwen3_vl", [2, 1, 1], DEEPSTACK),
        grid_images(),
        grid_videos(stamped),
        MROPE,
    ),
    Family(
        "qwen3_vl_moe",
        qwen3(Qwen3VLMoeConfig, Qwen3VLMoeForConditionalGeneration, "qwen3_vl_moe", [2, 1, 1], DEEPSTACK, **EXPERTS),
        grid_images(),
        grid_videos(stamped),
        MROPE,
    ),
    Family(
        "qwen3_5",
        qwen3(Qwen3_5Config, Qwen3_5ForConditionalGeneration, "qwen3_5", [2, 1, 1], {}, **LINEAR),
        grid_images(),
        grid_videos(stamped),
        MROPE,
        masks_tokens=False,
        notes=LINEAR_NOTE,
    ),
    Family(
        "qwen3_5_moe",
        qwen3(
            Qwen3_5MoeConfig,
            Qwen3_5MoeForConditionalGeneration,
            "qwen3_5_moe",
            [2, 1, 1],
            {},
            shared_expert_intermediate_size=16,
            **LINEAR,
            **EXPERTS,
        ),
        grid_images(),
        grid_videos(stamped),
        MROPE,
        masks_tokens=False,
        notes=LINEAR_NOTE,
    ),
    Family(
        "glm4v",
        glm(Glm4vConfig, Glm4vForConditionalGeneration, "glm4v"),
        grid_images(),
        grid_videos(as_images),
        MROPE,
        no_beams=("video",),
        notes=GLM_NOTE,
    ),
    Family(
        "glm46v",
        glm(Glm46VConfig, Glm46VForConditionalGeneration, "glm4v"),
        grid_images(),
        grid_videos(as_images),
        MROPE,
        no_beams=("video",),
        notes=GLM_NOTE,
    ),
    Family(
        "glm4v_moe",
        glm(Glm4vMoeConfig, Glm4vMoeForConditionalGeneration, "glm4v_moe", **GLM_EXPERTS),
        grid_images(),
        grid_videos(as_images),
        MROPE,
        no_beams=("video",),
        notes=GLM_NOTE,
    ),
    Family(
        "glm_ocr",
        glm(GlmOcrConfig, GlmOcrForConditionalGeneration, "glm_ocr"),
        grid_images(),
        grid_videos(as_images),
        MROPE,
        no_beams=("video",),
        notes=GLM_NOTE,
    ),
    Family(
        "ernie4_5_vl_moe",
        ernie4_5_vl_moe,
        grid_images(depth=1),
        grid_videos(merged_frames, depth=1, step=2),
        (*MROPE, "moe_mm_token_type_ids"),
        notes="visual tokens have experts of their own",
    ),
    Family("paddleocr_vl", paddleocr_vl, paddle_images, type_ids=MROPE),
    Family(
        "video_llama_3",
        video_llama_3,
        video_llama_images,
        video_llama_videos,
        no_beams=("video",),
        notes="the video processor already drops tokens of still regions",
    ),
    Family(
        "hunyuan_vl",
        hunyuan_vl,
        hunyuan_images,
        type_ids=MROPE,
        rows_alone=False,
        notes="row ends and image borders are visual tokens too; positions number the images of the whole batch",
    ),
    Family("cosmos3_edge", cosmos3_edge, grid_images(depth=1), grid_videos(stamped, depth=1), MROPE),
    Family("cohere_compass", cohere_compass, grid_images(), grid_videos(stamped), MROPE),
    Family(
        "qwen2_5_omni",
        qwen2_5_omni,
        grid_images(),
        grid_videos(whole, video_second_per_grid=seconds),
        audios=masked_audios(flamingo_tokens, "feature_attention_mask", start=8, end=9),
        notes="the thinker",
    ),
    Family(
        "qwen3_omni_moe",
        qwen3_omni_moe,
        grid_images(),
        grid_videos(whole, video_second_per_grid=seconds),
        audios=masked_audios(qwen3_asr_tokens, "feature_attention_mask", window=200, start=8, end=9),
        notes="the thinker",
    ),
    Family("exaone4_5", exaone4_5, grid_images(), grid_videos(whole)),
    Family("hyperclovax_vision_v2", hyperclovax_vision_v2, grid_images(), grid_videos(whole)),
    Family("minicpmv4_7", minicpmv4_7, minicpm_images, minicpm_videos, MROPE, masks_tokens=False, notes=LINEAR_NOTE),
]
