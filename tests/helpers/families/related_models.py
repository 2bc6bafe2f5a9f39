"""Families made of the parts of others."""

from __future__ import annotations

import torch
from transformers import (
    Cosmos3OmniConfig,
    Cosmos3OmniForConditionalGeneration,
    Gemma4UnifiedConfig,
    Gemma4UnifiedForConditionalGeneration,
    InstructBlipConfig,
    InstructBlipForConditionalGeneration,
    Qwen4ExpConfig,
    Qwen4ExpForConditionalGeneration,
)

from .base import AUDIO, TEXT_IDS, Family
from .image_models import IMAGE, PATCH, VIDEO, square_images
from .mrope_models import FAMILIES as MROPE_FAMILIES
from .other_models import END, START, flat, gemma4_patches, grid_of, query_transformer, spread, text, vision

QUERIES = 6
QWEN3, QWEN35 = (next(f for f in MROPE_FAMILIES if f.name == name) for name in ("qwen3_vl", "qwen3_5"))


def instructblip():
    config = InstructBlipConfig(
        vision_config=vision("instructblip_vision_model"),
        qformer_config=query_transformer("instructblip_qformer"),
        text_config=text("llama"),
        num_query_tokens=QUERIES,
        image_token_index=IMAGE,
    )
    model = InstructBlipForConditionalGeneration(config)
    spread(model.query_tokens)
    return model


def instructblip_images(model, rows):
    """Images, each with the question that the Q-Former reads beside it."""
    inputs, tokens = square_images([IMAGE] * QUERIES)(model, rows)
    draws = [torch.Generator().manual_seed(seed) for seed in flat(rows)]
    inputs["qformer_input_ids"] = torch.stack(
        [torch.randint(TEXT_IDS.start, TEXT_IDS.stop, (7,), generator=draw) for draw in draws]
    )
    inputs["qformer_attention_mask"] = torch.ones_like(inputs["qformer_input_ids"])
    return inputs, tokens


def cosmos3_omni():
    config = QWEN3.build().config.to_dict()
    config = {key: value for key, value in config.items() if key not in ("model_type", "architectures")}
    return Cosmos3OmniForConditionalGeneration(Cosmos3OmniConfig(**config))


def gemma4_unified():
    config = Gemma4UnifiedConfig(
        text_config=text(
            "gemma4_unified_text",
            head_dim=8,
            global_head_dim=8,
            layer_types=["sliding_attention", "full_attention"],
            use_bidirectional_attention="vision",
        ),
        vision_config={
            "patch_size": PATCH,
            "pooling_kernel_size": 1,
            "mm_embed_dim": 24,
            "mm_posemb_size": 32,
            "output_proj_dims": 24,
        },
        audio_config=None,
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        audio_token_id=AUDIO,
    )
    return Gemma4UnifiedForConditionalGeneration(config)


def gemma4_unified_images(model, rows):
    seeds = flat(rows)
    grids = [grid_of(seed, 2) for seed in seeds]
    pixels, places = gemma4_patches(model, grids, seeds)
    tokens = [[START, *[IMAGE] * (h * w), END] for h, w in grids]
    return {"pixel_values": pixels, "image_position_ids": places}, tokens


def qwen4_exp():
    like = QWEN35.build().config
    own = ("depth", "hidden_size", "intermediate_size", "num_heads", "in_channels", "patch_size", "spatial_merge_size")
    own += ("temporal_patch_size", "out_hidden_size", "num_position_embeddings")
    rope = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5, "mrope_section": [1, 1, 0]}
    config = Qwen4ExpConfig(
        text_config=text(
            "qwen4_exp_text",
            head_dim=8,
            layer_types=["linear_attention", "full_attention"],
            linear_key_head_dim=8,
            linear_value_head_dim=8,
            linear_num_key_heads=2,
            linear_num_value_heads=4,
            num_experts=4,
            num_experts_per_tok=2,
            moe_intermediate_size=16,
            shared_expert_intermediate_size=16,
            rope_parameters={**rope, "mrope_interleaved": True},
            hc_count=2,
            hc_lowrank=8,
            indexer_n_heads=2,
            indexer_kv_heads=1,
            indexer_head_dim=8,
            indexer_budget=64,
            indexer_compress_ratio=4,
            ple_layer_ids=[1],
            ple_embed_dim=8,
            ngram_vocab_size_base=200,
            heads_per_ngram=2,
            make_ngram_vocab_size_divisible_by=8,
            split_ngram_parts=2,
        ),
        vision_config={key: value for key, value in like.vision_config.to_dict().items() if key in own},
        image_token_id=like.image_token_id,
        video_token_id=like.video_token_id,
        vision_start_token_id=like.vision_start_token_id,
        vision_end_token_id=like.vision_end_token_id,
    )
    return Qwen4ExpForConditionalGeneration(config)


FAMILIES = [
    Family(
        "instructblip",
        instructblip,
        instructblip_images,
        generates=False,
        notes="no batch without an image; its `generate` wants pixels",
    ),
    Family("cosmos3_omni", cosmos3_omni, QWEN3.images, QWEN3.videos, QWEN3.type_ids),
    Family(
        "gemma4_unified",
        gemma4_unified,
        gemma4_unified_images,
        type_ids=("mm_token_type_ids",),
        notes="image tokens attend to each other",
    ),
    Family(
        "qwen4_exp",
        qwen4_exp,
        QWEN35.images,
        QWEN35.videos,
        QWEN35.type_ids,
        masks_tokens=False,
        notes=QWEN35.notes,
    ),
]
