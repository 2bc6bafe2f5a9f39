"""Families whose processors or vision towers follow no common scheme."""

from __future__ import annotations

import math

import torch
from transformers import (
    AriaConfig,
    AriaForConditionalGeneration,
    Blip2Config,
    Blip2ForConditionalGeneration,
    ChameleonConfig,
    ChameleonForConditionalGeneration,
    DeepseekOcr2Config,
    DeepseekOcr2ForConditionalGeneration,
    DeepseekVLConfig,
    DeepseekVLForConditionalGeneration,
    DeepseekVLHybridConfig,
    DeepseekVLHybridForConditionalGeneration,
    Dots3NoteConfig,
    Dots3NoteForConditionalGeneration,
    Emu3Config,
    Emu3ForConditionalGeneration,
    FuyuConfig,
    FuyuForCausalLM,
    Gemma4Config,
    Gemma4ForConditionalGeneration,
    Glm5NextConfig,
    Glm5NextForConditionalGeneration,
    Granite4VisionConfig,
    Granite4VisionForConditionalGeneration,
    GraniteDoclingConfig,
    GraniteDoclingForConditionalGeneration,
    Idefics2Config,
    Idefics2ForConditionalGeneration,
    Inkling2Config,
    Inkling2ForConditionalGeneration,
    InklingConfig,
    InklingForConditionalGeneration,
    JanusConfig,
    JanusForConditionalGeneration,
    Kimi_K25Config,
    Kimi_K25ForConditionalGeneration,
    Lfm3VlConfig,
    Lfm3VlForConditionalGeneration,
    LightOnOcrConfig,
    LightOnOcrForConditionalGeneration,
    MiniCPMV4_6Config,
    MiniCPMV4_6ForConditionalGeneration,
    MiniMaxM3SparseForConditionalGeneration,
    MiniMaxM3VLConfig,
    MistralLarge4Config,
    MistralLarge4ForConditionalGeneration,
    Molmo2Config,
    Molmo2ForConditionalGeneration,
    MuseGlimmerConfig,
    MuseGlimmerForConditionalGeneration,
    NemotronH_Omni_Reasoning_V3,
    NemotronH_Omni_Reasoning_V3_Config,
    QianfanOCRConfig,
    QianfanOCRForConditionalGeneration,
    Step3p7Config,
    Step3p7ForConditionalGeneration,
)
from transformers.image_processing_utils import select_best_resolution

from . import image_models
from .base import AUDIO, BOS, HIDDEN, PAD, VOCABULARY, Family, noise
from .image_models import EDGE, IMAGE, PATCH, square_images

VIDEO = 61
START, END, ROW, STAMP = 3, 4, 5, 6  # separators
PINPOINTS = [[EDGE, 2 * EDGE], [2 * EDGE, EDGE], [2 * EDGE, 2 * EDGE]]


def text(model_type: str = "llama", **extra) -> dict:
    """Settings of a tiny language model, with weights so large that positions matter."""
    return image_models.text(model_type, **{"initializer_range": 0.1, **extra})


def vision(model_type: str = "clip_vision_model", **extra) -> dict:
    return image_models.vision(model_type, **{"initializer_range": 0.1, **extra})


def flat(rows: list[list[int]]) -> list[int]:
    return [seed for row in rows for seed in row]


def grid_of(seed: int, unit: int = 1) -> tuple[int, int]:
    """Height and width of an image or clip, in units."""
    return unit * (1 + seed % 3), unit * (2 + seed // 2 % 2)


def frames_of(seed: int) -> int:
    return 1 + seed % 3


def spread(*parameters: torch.nn.Parameter, std: float = 0.2) -> None:
    """Random values where the family starts with equal ones, which would hide the image or its tokens' order."""
    with torch.no_grad():
        for parameter in parameters:
            parameter.normal_(std=std)


def padded(images: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Images of several sizes in one tensor, and the mask of their own pixels."""
    height, width = (max(image.shape[side] for image in images) for side in (-2, -1))
    pixels = torch.zeros(len(images), 3, height, width)
    mask = torch.zeros(len(images), height, width, dtype=torch.long)
    for image, plane, own in zip(images, pixels, mask, strict=True):
        plane[:, : image.shape[-2], : image.shape[-1]] = image
        own[: image.shape[-2], : image.shape[-1]] = 1
    return pixels, mask


def idefics2():
    config = Idefics2Config(
        vision_config=vision("idefics2_vision"),
        text_config=text("mistral"),
        perceiver_config={
            "hidden_size": HIDDEN,
            "resampler_n_latents": 6,
            "resampler_depth": 2,
            "resampler_n_heads": 4,
            "resampler_head_dim": 8,
            "num_key_value_heads": 2,
        },
        image_token_id=IMAGE,
    )
    model = Idefics2ForConditionalGeneration(config)
    spread(model.model.connector.perceiver_resampler.latents)
    return model


def idefics2_images(model, rows):
    """Rows of images of several sizes, `(B, most images, 3, H, W)`; every image becomes as many latents."""
    seeds = flat(rows)
    pixels, mask = padded([noise((3, *grid_of(s, PATCH)), s) for s in seeds])
    most = max(len(row) for row in rows)
    values = torch.zeros(len(rows), most, *pixels.shape[1:])
    masks = torch.zeros(len(rows), most, *mask.shape[1:], dtype=torch.long)
    images = iter(zip(pixels, mask, strict=True))
    for row, row_values, row_masks in zip(rows, values, masks, strict=True):
        for place in range(len(row)):
            row_values[place], row_masks[place] = next(images)
    return {"pixel_values": values, "pixel_attention_mask": masks}, [[START, *[IMAGE] * 6, START] for _ in seeds]


def aria():
    config = AriaConfig(
        vision_config=vision("idefics3_vision"),
        text_config=text("aria_text", intermediate_size=32, moe_num_experts=4, moe_num_shared_experts=1),
        projector_patch_to_query_dict={16: 6},
        image_token_index=IMAGE,
    )
    model = AriaForConditionalGeneration(config)
    spread(model.model.multi_modal_projector.query)
    return model


def aria_images(model, rows):
    """One or two crops of each image, with padding below."""
    seeds = flat(rows)
    crops = [1 + s % 2 for s in seeds]
    pixels = torch.cat([noise((n, 3, EDGE, EDGE), s) for n, s in zip(crops, seeds, strict=True)])
    mask = torch.ones(len(pixels), EDGE, EDGE, dtype=torch.bool)
    mask[:, EDGE - PATCH :] = False
    return {"pixel_values": pixels, "pixel_mask": mask}, [[IMAGE] * 6 * n for n in crops]


def gemma4():
    config = Gemma4Config(
        text_config=text(
            "gemma4_text",
            head_dim=8,
            global_head_dim=8,
            hidden_size_per_layer_input=4,
            vocab_size_per_layer_input=VOCABULARY,
            layer_types=["sliding_attention", "full_attention"],
            use_bidirectional_attention="vision",
        ),
        vision_config=vision(
            "gemma4_vision", num_key_value_heads=2, head_dim=12, pooling_kernel_size=2, position_embedding_size=32
        ),
        audio_config={
            "hidden_size": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "subsampling_conv_channels": [128, 2],  # the first is taken for the number of mels too
            "output_proj_dims": 24,
        },
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        audio_token_id=AUDIO,
    )
    model = Gemma4ForConditionalGeneration(config)
    spread(model.model.vision_tower.patch_embedder.position_embedding_table)
    return model


def gemma4_patches(model, grids, seeds):
    """Patches and their (x, y), padded to 36 patches with -1."""
    patches, places = torch.zeros(len(grids), 36, 3 * PATCH**2), torch.full((len(grids), 36, 2), -1)
    for (height, width), seed, own, place in zip(grids, seeds, patches, places, strict=True):
        own[: height * width] = noise((height * width, own.shape[-1]), seed).sigmoid()
        y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
        place[: height * width] = torch.stack([x.flatten(), y.flatten()], -1)
    return patches, places


def gemma4_images(model, rows):
    seeds = flat(rows)
    grids = [grid_of(s, 2) for s in seeds]
    patches, places = gemma4_patches(model, grids, seeds)
    tokens = [[START, *[IMAGE] * (h * w // 4), END] for h, w in grids]
    return {"pixel_values": patches, "image_position_ids": places}, tokens


def gemma4_audios(model, rows):
    """Mel features `(U, 64, 128)`; a token for four frames."""
    seeds = flat(rows)
    frames = [(64, 40, 53)[seed % 3] for seed in seeds]
    mask = torch.arange(64) < torch.tensor(frames)[:, None]
    features = torch.stack([noise((64, 128), seed) for seed in seeds]) * mask[..., None]
    tokens = [[START, *[AUDIO] * math.ceil(n / 4), END] for n in frames]
    return {"input_features": features, "input_features_mask": mask}, tokens


def gemma4_videos(model, rows):
    seeds = flat(rows)
    frames = [(seed, frame) for seed in seeds for frame in range(frames_of(seed))]
    grids = [grid_of(seed, 2) for seed, _ in frames]
    patches, places = gemma4_patches(model, grids, [1000 * seed + frame for seed, frame in frames])
    inputs = {
        "pixel_values_videos": patches,
        "video_position_ids": places,
        "num_frames_per_video": torch.tensor([frames_of(s) for s in seeds]),
    }
    tokens = [[STAMP, START, *[VIDEO] * (grid_of(s, 2)[0] * grid_of(s, 2)[1] // 4), END] * frames_of(s) for s in seeds]
    return inputs, tokens


def deepseek_vl():
    config = DeepseekVLConfig(text_config=text(), vision_config=vision("siglip_vision_model"), image_token_id=IMAGE)
    return DeepseekVLForConditionalGeneration(config)


def deepseek_vl_hybrid():
    config = DeepseekVLHybridConfig(
        text_config=text(),
        vision_config=vision("siglip_vision_model"),
        high_res_vision_config={
            "model_type": "sam_vision_model",
            "hidden_size": 16,
            "output_channels": 8,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 64,
            "patch_size": PATCH,
            "window_size": 4,
            "num_pos_feats": 8,
            "mlp_dim": 32,
            "global_attn_indexes": [1],
        },
        image_token_id=IMAGE,
    )
    model = DeepseekVLHybridForConditionalGeneration(config)
    spread(model.model.high_res_vision_alpha)
    return model


def deepseek_vl_hybrid_images(model, rows):
    seeds = flat(rows)
    inputs = {
        "pixel_values": torch.stack([noise((3, EDGE, EDGE), s) for s in seeds]),
        "high_res_pixel_values": torch.stack([noise((3, 64, 64), s) for s in seeds]),
    }
    return inputs, [[IMAGE] * 16 for _ in seeds]


def janus():
    config = JanusConfig(
        text_config=text(),
        vision_config={
            **vision("janus_vision_model"),
            "projection_dim": HIDDEN,
            "num_image_tokens": 16,
            "mlp_ratio": 2.0,
        },
        vq_config={
            "base_channels": 32,
            "channel_multiplier": [1],
            "num_res_blocks": 1,
            "latent_channels": 8,
            "num_embeddings": 16,
            "projection_dim": HIDDEN,
            "image_token_embed_dim": HIDDEN,
        },
        image_token_id=IMAGE,
    )
    return JanusForConditionalGeneration(config)


# The names of Chameleon's image codes in its vocabulary; their last letters spell the code's number.
CODES = {f"IMGIMG{'ABCDEFGHIJ'[i // 10]}{'ABCDEFGHIJ'[i % 10]}Z": 64 + i for i in range(16)}


def chameleon():
    config = ChameleonConfig(
        **{k: v for k, v in text().items() if k != "model_type"},
        vq_config={
            "base_channels": 32,
            "channel_multiplier": [1, 1, 1],
            "num_res_blocks": 1,
            "num_embeddings": 16,
            "embed_dim": 8,
            "latent_channels": 8,
            "resolution": EDGE,
        },
        vocabulary_map={"<image>": IMAGE, **CODES},
    )
    return ChameleonForConditionalGeneration(config)


def emu3():
    config = Emu3Config(
        text_config=text("emu3_text_model", attention_dropout=0.0),
        vq_config={
            "codebook_size": 16,
            "embed_dim": 4,
            "base_channels": 32,
            "channel_multiplier": [1, 1, 1],
            "num_res_blocks": 1,
            "hidden_size": 32,
            "attn_resolutions": [],
            "temporal_downsample_factor": 1,
        },
        vocabulary_map={
            "<image>": IMAGE,
            "<|extra_200|>": 7,
            **{f"<|visual token {i:06d}|>": 64 + i for i in range(16)},
        },
    )
    return Emu3ForConditionalGeneration(config)


def emu3_images(model, rows):
    """Each line of codes ends in a placeholder of its own. The canvas is fixed, since the codes depend on it."""
    seeds = flat(rows)
    factor = model.model.vqmodel.vision_spatial_factor
    sizes = [grid_of(s, factor) for s in seeds]
    pixels = torch.zeros(len(seeds), 3, 3 * factor, 3 * factor)
    for plane, (height, width), seed in zip(pixels, sizes, seeds, strict=True):
        plane[:, :height, :width] = noise((3, height, width), seed)
    tokens = [[START, 8, 6, 8, START, *[IMAGE] * (h // factor * (w // factor + 1)), 9, END] for h, w in sizes]
    return {"pixel_values": pixels, "image_sizes": torch.tensor(sizes)}, tokens


def query_transformer(model_type: str) -> dict:
    return {
        "model_type": model_type,
        "vocab_size": VOCABULARY,
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    }


def blip_2():
    config = Blip2Config(
        vision_config=vision("blip_2_vision_model", initializer_range=0.1),
        qformer_config={**query_transformer("blip_2_qformer"), "initializer_range": 0.2},
        text_config=text("llama"),
        num_query_tokens=6,
        image_token_index=IMAGE,
    )
    model = Blip2ForConditionalGeneration(config)
    spread(model.query_tokens)
    return model


def fuyu():
    config = FuyuConfig(
        text_config=text("persimmon", hidden_dropout=0.0, attention_dropout=0.0),
        image_size=EDGE,
        patch_size=PATCH,
        image_token_id=IMAGE,
    )
    return FuyuForCausalLM(config)


def fuyu_images(model, rows):
    """Patches of all images in one matrix, as its processor joins them; lines of patches end in newline tokens."""
    seeds = flat(rows)
    patches = torch.cat([noise((8, 3 * PATCH**2), s) for s in seeds])
    return {"pixel_values": patches}, [[*[IMAGE] * 4, ROW] * 2 + [BOS] for _ in seeds]


# Molmo 2 gives its structure tokens the type of images as well, hence ids of placeholders.
MOLMO_START, MOLMO_END, MOLMO_COLUMN, MOLMO_LOW, MOLMO_FRAME, MOLMO_FRAME_END = range(70, 76)


def molmo2():
    tower = {"hidden_size": 24, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 12}
    config = Molmo2Config(
        vision_config={
            **tower,
            "intermediate_size": 48,
            "num_hidden_layers": 3,
            "image_size": [EDGE, EDGE],
            "patch_size": PATCH,
            "initializer_range": 0.2,
        },
        adapter_config={
            **tower,
            "vision_feature_layer": [2, 1],
            "intermediate_size": 48,
            "text_hidden_size": HIDDEN,
            "initializer_range": 0.2,
        },
        text_config=text("molmo2_text", head_dim=8, additional_vocab_size=4),
        image_patch_id=IMAGE,
    )
    return Molmo2ForConditionalGeneration(config)


def pooling_windows(height: int, width: int, start: int) -> torch.Tensor:
    """The four patches of each 2 x 2 window of a patch grid that begins at `start`."""
    grid = start + torch.arange(height * width).view(height // 2, 2, width // 2, 2)
    return grid.permute(0, 2, 1, 3).reshape(-1, 4)


def molmo2_images(model, rows):
    """A low-resolution crop and one or two side by side."""
    seeds = flat(rows)
    crops, windows, grids, tokens, start = [], [], [], [], 0
    for seed in seeds:
        high = 1 + seed % 2
        crops.append(noise((1 + high, 16, 3 * PATCH**2), seed))
        windows += [pooling_windows(4, 4, start), pooling_windows(4, 4 * high, start + 16)]
        grids.append([2, 2, 2, 2 * high])
        tokens.append([MOLMO_LOW, *[IMAGE, IMAGE, MOLMO_COLUMN] * 2, MOLMO_END])
        tokens[-1] += [MOLMO_START, *[*[IMAGE] * 2 * high, MOLMO_COLUMN] * 2, MOLMO_END]
        start += 16 * (1 + high)
    inputs = {
        "pixel_values": torch.cat(crops),
        "image_token_pooling": torch.cat(windows),
        "image_grids": torch.tensor(grids),
        "image_num_crops": torch.tensor([len(c) for c in crops]),
    }
    return inputs, tokens


def molmo2_videos(model, rows):
    seeds = flat(rows)
    crops = torch.cat([noise((frames_of(s), 16, 3 * PATCH**2), s) for s in seeds])
    inputs = {
        "pixel_values_videos": crops,
        "video_token_pooling": torch.cat([pooling_windows(4, 4, 16 * i) for i in range(len(crops))]),
        "video_grids": torch.tensor([[frames_of(s), 2, 2] for s in seeds]),
    }
    frame = [STAMP, MOLMO_FRAME, *[IMAGE] * 4, MOLMO_FRAME_END]
    return inputs, [frame * frames_of(s) for s in seeds]


def lighton_ocr():
    config = LightOnOcrConfig(
        vision_config=vision("pixtral", head_dim=12),
        text_config=text("qwen3", head_dim=8),
        image_token_id=IMAGE,
    )
    return LightOnOcrForConditionalGeneration(config)


def lighton_ocr_images(model, rows):
    seeds = flat(rows)
    sizes = [grid_of(s, 2 * PATCH) for s in seeds]
    pixels, _ = padded([noise((3, *size), s) for size, s in zip(sizes, seeds, strict=True)])
    tokens = [[IMAGE] * (h * w // (2 * PATCH) ** 2) for h, w in sizes]
    return {"pixel_values": pixels, "image_sizes": torch.tensor(sizes)}, tokens


def granite4_vision():
    config = Granite4VisionConfig(
        # The query transformers have one head for each 64 channels.
        vision_config=vision(hidden_size=64),
        text_config=text("granite4_vision_text", num_hidden_layers=3),
        qformer_config={**query_transformer("blip_2_qformer"), "num_hidden_layers": 1, "cross_attention_frequency": 1},
        image_token_index=IMAGE,
        image_grid_pinpoints=PINPOINTS,
        downsample_rate="1/2",
        deepstack_layer_map=[[-2, 1], [-1, 0]],  # the lowest layer comes last, as in the published models
        spatial_vision_layer=-2,
        spatial_target_layers=[2],
        projector_dropout=0.0,
    )
    return Granite4VisionForConditionalGeneration(config)


def granite4_vision_images(model, rows):
    """Any-resolution tiles of four tokens, the padding cut off, and a newline after each line of the whole."""
    seeds = flat(rows)
    sizes = [[(14, 30), (32, 12), (24, 32), (10, 40)][s % 4] for s in seeds]
    pixels, tokens = [], []
    for (height, width), seed in zip(sizes, seeds, strict=True):
        lines, columns = (side // EDGE for side in select_best_resolution([height, width], PINPOINTS))
        pixels.append(torch.zeros(5, 3, EDGE, EDGE))
        pixels[-1][: 1 + lines * columns] = noise((1 + lines * columns, 3, EDGE, EDGE), seed)
        high, wide = 2 * lines, 2 * columns
        if width / height > wide / high:
            high -= (high - int(round(height * wide / width, 7))) // 2 * 2
        else:
            wide -= (wide - int(round(width * high / height, 7))) // 2 * 2
        tokens.append([IMAGE] * (4 + high * (wide + 1)))
    return {"pixel_values": torch.stack(pixels), "image_sizes": torch.tensor(sizes)}, tokens


def kimi_k25():
    config = Kimi_K25Config(
        vision_config=vision("kimi_k25_vision", pos_emb_height=4, pos_emb_width=4),
        text_config=text(
            "deepseek_v3",
            num_key_value_heads=4,
            moe_intermediate_size=32,
            n_routed_experts=4,
            num_experts_per_tok=2,
            n_group=1,
            topk_group=1,
            first_k_dense_replace=1,
            kv_lora_rank=8,
            q_lora_rank=16,
            qk_rope_head_dim=4,
            qk_nope_head_dim=4,
            v_head_dim=8,
        ),
        projection_hidden_size=24,
        image_token_id=IMAGE,
        video_token_id=VIDEO,
    )
    return Kimi_K25ForConditionalGeneration(config)


def kimi_k25_images(model, rows):
    seeds = flat(rows)
    grids = [(1, *grid_of(s, 2)) for s in seeds]
    pixels = torch.cat([noise((h * w, 3, PATCH, PATCH), s) for (_, h, w), s in zip(grids, seeds, strict=True)])
    tokens = [[IMAGE] * (h * w // 4) for _, h, w in grids]
    return {"pixel_values": pixels, "image_grid_thw": torch.tensor(grids)}, tokens


def kimi_k25_videos(model, rows):
    """One or two chunks, each a row of the grids, of one frame: transformers 5.23 fails with the usual two to four."""
    seeds = flat(rows)
    pixels, grids, tokens = [], [], []
    for seed in seeds:
        height, width = grid_of(seed, 2)
        tokens.append([])
        for chunk in range(1 + seed % 2):
            grids.append((1, height, width))
            pixels.append(noise((height * width, 3, PATCH, PATCH), 1000 * seed + chunk))
            tokens[-1] += [STAMP, START, 7, 8, *[VIDEO] * (height * width // 4), END]
    return {"pixel_values_videos": torch.cat(pixels), "video_grid_thw": torch.tensor(grids)}, tokens


def packed_patches(channels: int, separators: tuple[list[int], list[int]] = ([], [])):
    """Images of patches in one matrix, `(patches, channels)`, merged two by two."""

    def make(model, rows):
        seeds = flat(rows)
        grids = [(1, *grid_of(s, 2)) for s in seeds]
        pixels = torch.cat([noise((h * w, channels), s) for (_, h, w), s in zip(grids, seeds, strict=True)])
        tokens = [[*separators[0], *[IMAGE] * (h * w // 4), *separators[1]] for _, h, w in grids]
        return {"pixel_values": pixels, "image_grid_thw": torch.tensor(grids)}, tokens

    return make


def packed_clips(channels: int, write):
    """Clips of patches in one matrix; `write` gives the tokens of so many frames of so many tokens."""

    def make(model, rows):
        seeds = flat(rows)
        grids = [(frames_of(s), *grid_of(s, 2)) for s in seeds]
        pixels = torch.cat([noise((t * h * w, channels), s) for (t, h, w), s in zip(grids, seeds, strict=True)])
        inputs = {"pixel_values_videos": pixels, "video_grid_thw": torch.tensor(grids)}
        return inputs, [write(t, h * w // 4) for t, h, w in grids]

    return make


def lfm3_vl():
    config = Lfm3VlConfig(
        vision_config=vision("lfm3_vl_vision", num_key_value_heads=2, layer_types=["conv", "full_attention", "conv"]),
        text_config=text(
            "lfm3", head_dim=8, num_hidden_layers=3, layer_types=["conv", "sliding_attention", "full_attention"]
        ),
        projector_hidden_size=48,
        image_token_id=IMAGE,
        video_token_id=VIDEO,
    )
    return Lfm3VlForConditionalGeneration(config)


def muse_glimmer():
    config = MuseGlimmerConfig(
        vision_config=vision("muse_glimmer_vision", pos_emb_height=4, pos_emb_width=4),
        text_config=text(
            "muse_glimmer_text", head_dim=8, layer_types=["sliding_attention", "full_attention"], output_multiplier=1.0
        ),
        out_hidden_size=96,
        projector_hidden_size=48,
        image_token_id=IMAGE,
        video_token_id=VIDEO,
    )
    return MuseGlimmerForConditionalGeneration(config)


def muse_glimmer_clip(frames: int, tokens: int) -> list[int]:
    groups = [STAMP, *[VIDEO] * tokens, ROW] * frames
    return [START, *groups[:-1], END]


def minicpmv4_6():
    config = MiniCPMV4_6Config(
        vision_config=vision("minicpmv4_6_vision"),
        text_config=text(
            "qwen3_5_text",
            head_dim=8,
            layer_types=["linear_attention", "full_attention"],
            linear_key_head_dim=8,
            linear_value_head_dim=8,
            linear_num_key_heads=2,
            linear_num_value_heads=4,
            rope_parameters={
                "rope_type": "default",
                "rope_theta": 10000.0,
                "partial_rotary_factor": 0.5,
                "mrope_section": [1, 1, 0],
            },
        ),
        insert_layer_id=0,
        image_token_id=IMAGE,
        video_token_id=VIDEO,
    )
    return MiniCPMV4_6ForConditionalGeneration(config)


def packed_strips(units: list[tuple[int, int]], seed: int) -> torch.Tensor:
    """Pixels of patches laid side by side, `(3, patch, patches * patch)`."""
    return noise((3, PATCH, PATCH * sum(h * w for h, w in units)), seed)


def minicpmv4_6_images(model, rows):
    """An overview and, for every other image, two slices side by side."""
    seeds = flat(rows)
    strips, sizes, tokens = [], [], []
    for seed in seeds:
        units = [grid_of(seed, 4), *[(4, 4)] * (2 * (seed % 2))]
        strips.append(packed_strips(units, seed))
        sizes += units
        first, *others = ([IMAGE] * (h * w // 16) for h, w in units)
        tokens.append([START, *first, END])
        for other in others:
            tokens[-1] += [5, *other, 6]
    inputs = {"pixel_values": torch.cat(strips, -1)[None], "target_sizes": torch.tensor(sizes, dtype=torch.int32)}
    return inputs, tokens


def minicpmv4_6_videos(model, rows):
    seeds = flat(rows)
    units = [[grid_of(s, 4)] * frames_of(s) for s in seeds]
    strips = [packed_strips(own, s) for own, s in zip(units, seeds, strict=True)]
    inputs = {
        "pixel_values_videos": torch.cat(strips, -1)[None],
        "target_sizes_videos": torch.tensor([unit for own in units for unit in own], dtype=torch.int32),
    }
    return inputs, [[token for h, w in own for token in (START, *[VIDEO] * (h * w // 16), END)] for own in units]


def granite_docling():
    config = GraniteDoclingConfig(
        vision_config=vision(
            "granite_docling_vision", out_hidden_size=HIDDEN, scale_factor=2, deepstack_visual_indexes=[0, 1]
        ),
        text_config=text(
            "granite_docling_text",
            embedding_multiplier=1.0,
            logits_scaling=1.0,
            residual_multiplier=1.0,
            attention_multiplier=0.35,
        ),
        image_token_id=IMAGE,
        pad_token_id=PAD,
    )
    return GraniteDoclingForConditionalGeneration(config)


def granite_docling_images(model, rows):
    """All tiles of a row, `(B, most tiles, 3, H, W)`: one, or a grid and an overview."""
    grids = [[(1 + s % 2, 1 + s // 2 % 2) for s in row] for row in rows]
    counts = [[h * w + (h * w > 1) for h, w in row] for row in grids]
    most = max(sum(row) for row in counts)
    pixels = torch.zeros(len(rows), most, 3, EDGE, EDGE)
    mask = torch.zeros(len(rows), most, dtype=torch.bool)
    for row, own, plane, real in zip(rows, counts, pixels, mask, strict=True):
        start = 0
        for seed, count in zip(row, own, strict=True):
            plane[start : start + count] = noise((count, 3, EDGE, EDGE), seed)
            start += count
        real[:start] = True
    tokens = []
    for height, width in flat(grids):
        lines = [*[START, 7, *[IMAGE] * 4] * width, ROW] * height
        tokens.append(lines + ([ROW, START, 8, *[IMAGE] * 4, START] if height * width > 1 else []))
    return {"pixel_values": pixels, "pixel_attention_mask": mask}, tokens


def qianfan_ocr():
    config = QianfanOCRConfig(
        vision_config=vision("qianfan_ocr_vision", drop_path_rate=0.0),
        text_config=text("qwen3", head_dim=8),
        image_token_id=IMAGE,
        image_seq_length=4,
    )
    model = QianfanOCRForConditionalGeneration(config)
    embeddings = model.model.vision_tower.embeddings
    spread(embeddings.cls_token, embeddings.position_embeddings)
    return model


def qianfan_ocr_images(model, rows):
    seeds = flat(rows)
    tiles = [1 + s % 3 for s in seeds]
    pixels = torch.cat([noise((n, 3, EDGE, EDGE), s) for n, s in zip(tiles, seeds, strict=True)])
    return {"pixel_values": pixels}, [[START, *[IMAGE] * 4 * n, END] for n in tiles]


def deepseek_ocr2():
    config = DeepseekOcr2Config(
        vision_config={
            "sam_config": {
                "hidden_size": 16,
                "output_channels": 8,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "image_size": 64,
                "patch_size": PATCH,
                "window_size": 4,
                "global_attn_indexes": [1],
                "mlp_dim": 32,
                "downsample_channels": [16, 24],
                "initializer_range": 0.1,
            },
            "encoder_config": {
                "hidden_size": 24,
                "intermediate_size": 48,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "num_key_value_heads": 2,
                "initializer_range": 0.2,
            },
        },
        text_config=text(
            "deepseek_ocr2_text",
            n_routed_experts=4,
            n_shared_experts=1,
            num_experts_per_tok=2,
            moe_intermediate_size=16,
            mlp_layer_types=["dense", "sparse"],
        ),
        image_token_id=IMAGE,
    )
    model = DeepseekOcr2ForConditionalGeneration(config)
    # As many queries as a tile of 64 pixels has patches; the family's own tiles have 144.
    model.model.vision_tower.query_768_resolution = torch.nn.Embedding(16, 24)
    spread(model.model.vision_tower.sam_encoder.pos_embed, model.model.vision_tower.query_768_resolution.weight)
    return model


def local_tiles(edge: int, tile: int, write):
    """Whole images and tiles of some of them; `write` gives the tokens of an image of so many tiles."""

    def make(model, rows):
        seeds = flat(rows)
        counts = [seed % 3 for seed in seeds]
        inputs = {
            "pixel_values": torch.stack([noise((3, edge, edge), s) for s in seeds]),
            "num_local_patches": torch.tensor(counts),
        }
        if any(counts):
            tiles = [noise((n, 3, tile, tile), 1000 + s) for n, s in zip(counts, seeds, strict=True)]
            inputs["pixel_values_local"] = torch.cat(tiles)
        return inputs, [write(n) for n in counts]

    return make


def step3p7():
    config = Step3p7Config(
        vision_config=vision("step3p5_vision", image_size=48, mlp_ratio=2.0),
        text_config=text(
            "step3p5",
            head_dim=8,
            num_experts_per_tok=2,
            n_routed_experts=4,
            moe_intermediate_size=16,
            share_expert_dim=16,
            mlp_layer_types=["dense", "sparse"],
            sliding_window=512,
        ),
        image_token_id=IMAGE,
    )
    return Step3p7ForConditionalGeneration(config)


def minimax_m3_vl():
    config = MiniMaxM3VLConfig(
        vision_config=vision("minimax_m3_vl_vision"),
        text_config=text(
            "minimax_m3_vl_text",
            head_dim=8,
            rotary_dim=4,
            num_local_experts=4,
            num_experts_per_tok=2,
            dense_intermediate_size=64,
            shared_intermediate_size=16,
            index_n_heads=2,
            index_head_dim=8,
            layer_types=["full_attention", "minimax_m3_sparse"],
            mlp_layer_types=["dense", "sparse"],
        ),
        projector_hidden_size=48,
        image_token_index=IMAGE,
        video_token_index=VIDEO,
    )
    return MiniMaxM3SparseForConditionalGeneration(config)


def mistral_large4():
    config = MistralLarge4Config(
        vision_config=vision("pixtral", head_dim=12),
        text_config=text(
            "mistral_large4_text",
            num_key_value_heads=4,
            moe_intermediate_size=16,
            n_routed_experts=4,
            num_experts_per_tok=2,
            kv_lora_rank=8,
            q_lora_rank=16,
            qk_rope_head_dim=4,
            qk_nope_head_dim=4,
            v_head_dim=8,
            index_n_heads=2,
            index_head_dim=8,
        ),
        image_token_index=IMAGE,
    )
    return MistralLarge4ForConditionalGeneration(config)


def inkling():
    config = InklingConfig(
        vision_config={"patch_size": PATCH, "num_hidden_layers": 4},
        audio_config={"n_mel_bins": 4, "mel_vocab_size": 8},
        text_config=text(
            "inkling_text",
            head_dim=8,
            swa_num_attention_heads=4,
            swa_num_key_value_heads=2,
            swa_head_dim=8,
            d_rel=4,
            rel_extent=64,
            moe_intermediate_size=16,
            n_routed_experts=4,
            num_experts_per_tok=2,
            n_shared_experts=1,
            logits_mup_width_multiplier=1.0,
            layer_types=["hybrid_sliding", "hybrid"],
            mlp_layer_types=["dense", "sparse"],
        ),
        image_token_id=IMAGE,
        audio_token_id=62,
    )
    return InklingForConditionalGeneration(config)


def inkling_images(model, rows):
    """One token of each patch, which is no longer grouped by image."""
    seeds = flat(rows)
    grids = [grid_of(s, 2) for s in seeds]
    pixels = torch.cat([noise((h * w, 2, PATCH, PATCH, 3), s) for (h, w), s in zip(grids, seeds, strict=True)])
    return {"pixel_values": pixels}, [[IMAGE] * (h * w) for h, w in grids]


def inkling2():
    config = Inkling2Config(
        vision_config={
            "hidden_size": 24,
            "num_hidden_layers": 3,
            "num_attention_heads": 2,
            "patch_size": PATCH,
            "mlp_ratio": 2.0,
            "posemb_grid_size": 4,
            "projection_hidden_dim": 48,
            "text_hidden_size": HIDDEN,
        },
        text_config=text(
            "inkling2_text",
            unpadded_vocab_size=VOCABULARY,
            head_dim=8,
            swa_num_attention_heads=4,
            swa_num_key_value_heads=2,
            swa_head_dim=8,
            d_rel=4,
            rel_extent=64,
            n_routed_experts=4,
            num_experts_per_tok=2,
            layer_types=["hybrid_sliding", "hybrid"],
            n_layers_per_attn_res_block=1,
        ),
        image_token_id=IMAGE,
    )
    return Inkling2ForConditionalGeneration(config)


def inkling2_images(model, rows):
    seeds = flat(rows)
    grids = [(1, *grid_of(s)) for s in seeds]
    edge = 2 * PATCH
    pixels = torch.cat([noise((h * w, edge, edge, 3), s) for (_, h, w), s in zip(grids, seeds, strict=True)])
    return {"pixel_values": pixels, "image_grid_thw": torch.tensor(grids)}, [[IMAGE] * (h * w) for _, h, w in grids]


def dots3_note():
    config = Dots3NoteConfig(
        vision_config=vision(
            "dots3_note_vision_encoder",
            moe_intermediate_size=16,
            adapter_in_dim=24,
            adapter_out_dim=HIDDEN,
            mlp_layer_types=["dense", "dense", "sparse"],
            num_local_experts=4,
        ),
        audio_config={
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "feature_size": 8,
            "downsample_hidden_size": 8,
            "adapter_input_size": 16,
            "adapter_out_dim": HIDDEN,
        },
        text_config=text(
            "dots3_note_text",
            num_key_value_heads=4,
            moe_intermediate_size=16,
            shared_experts_intermediate_size=16,
            n_routed_experts=4,
            num_experts_per_tok=2,
            kv_lora_rank=8,
            q_lora_rank=16,
            qk_rope_head_dim=4,
            qk_nope_head_dim=4,
            v_head_dim=8,
            head_dim=8,
            index_n_heads=2,
            index_head_dim=8,
            layer_types=["sliding_attention", "indexed_attention"],
            swa_num_attention_heads=4,
            swa_num_key_value_heads=4,
            swa_q_lora_rank=16,
            swa_kv_lora_rank=8,
            swa_head_dim=8,
            swa_qk_nope_head_dim=4,
            swa_v_head_dim=8,
        ),
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        audio_token_id=62,
    )
    return Dots3NoteForConditionalGeneration(config)


def glm5_next():
    config = Glm5NextConfig(
        vision_config={
            **vision("glm5_next_vision"),
            "out_hidden_size": HIDDEN,
            "projection_intermediate_size": 48,
        },
        text_config=text(
            "glm5_next_text",
            num_key_value_heads=4,
            moe_intermediate_size=16,
            n_routed_experts=4,
            num_experts_per_tok=2,
            kv_lora_rank=8,
            q_lora_rank=16,
            qk_nope_head_dim=8,
            v_head_dim=8,
            index_n_heads=2,
            index_head_dim=8,
            linear_head_dim=8,
            linear_num_heads=4,
            layer_types=["linear_attention", "indexed_attention"],
            mlp_layer_types=["dense", "sparse"],
        ),
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        image_start_token_id=START,
        image_end_token_id=END,
        video_start_token_id=7,
        video_end_token_id=8,
    )
    return Glm5NextForConditionalGeneration(config)


def nemotron_h_omni():
    config = NemotronH_Omni_Reasoning_V3_Config(
        vision_config={
            "model_type": "radio",
            "hidden_size": 24,
            "num_hidden_layers": 3,
            "num_attention_heads": 2,
            "mlp_ratio": 2.0,
            "patch_size": PATCH,
            "image_size": EDGE,
            "max_img_size": 2 * EDGE,
            "video_temporal_patch_size": 2,
        },
        text_config=text(
            "nemotron_h",
            num_hidden_layers=3,
            layers_block_type=["linear_attention", "full_attention", "mlp"],
            head_dim=8,
            ssm_state_size=8,
            mamba_num_heads=8,
            mamba_head_dim=8,
            n_groups=2,
            chunk_size=8,
        ),
        audio_config={
            "model_type": "parakeet_encoder",
            "hidden_size": 24,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "intermediate_size": 48,
            "conv_kernel_size": 3,
            "subsampling_factor": 4,
            "subsampling_conv_channels": 4,
            "num_mel_bins": 8,
            "layerdrop": 0.0,
            "projection_hidden_size": 48,
            "projection_bias": False,
        },
        vision_hidden_size=24,
        projector_hidden_size=48,
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        audio_token_id=AUDIO,
    )
    return NemotronH_Omni_Reasoning_V3(config)


def nemotron_h_omni_images(model, rows):
    seeds = flat(rows)
    grids = [grid_of(s, 2) for s in seeds]
    pixels = torch.cat([noise((h * w, 3 * PATCH**2), s) for (h, w), s in zip(grids, seeds, strict=True)])
    tokens = [[START, *[IMAGE] * (h * w // 4), END] for h, w in grids]
    return {"pixel_values": pixels, "image_grid_hw": torch.tensor(grids)}, tokens


def nemotron_h_omni_audios(model, rows):
    """Mel features `(U, 64, 8)` and their mask, which lacks the last frame; a token for four frames."""
    seeds = flat(rows)
    frames = [(64, 40, 52)[seed % 3] for seed in seeds]
    mask = torch.arange(64) < torch.tensor(frames)[:, None] - 1
    features = torch.stack([noise((64, 8), seed) for seed in seeds]) * mask[..., None]
    return {"input_features": features, "input_features_mask": mask}, [
        [START, *[AUDIO] * (n // 4), END] for n in frames
    ]


FAMILIES = [
    Family("idefics2", idefics2, idefics2_images),
    Family("aria", aria, aria_images),
    Family(
        "gemma4",
        gemma4,
        gemma4_images,
        gemma4_videos,
        type_ids=("mm_token_type_ids",),
        audios=gemma4_audios,
        prunes_audio=False,
        notes="image tokens attend to each other; audio is left whole, for each layer looks up ids",
    ),
    Family("deepseek_vl", deepseek_vl, square_images([IMAGE] * 16)),
    Family("deepseek_vl_hybrid", deepseek_vl_hybrid, deepseek_vl_hybrid_images),
    Family("janus", janus, square_images([START, *[IMAGE] * 16, END])),
    Family(
        "chameleon",
        chameleon,
        square_images([START, *[IMAGE] * 16, END]),
        trains_encoder=False,
        notes="images are looked up in a codebook, no gradient reaches their encoder",
    ),
    Family(
        "emu3",
        emu3,
        emu3_images,
        trains_encoder=False,
        notes="images are looked up in a codebook, no gradient reaches their encoder",
    ),
    Family("fuyu", fuyu, fuyu_images, no_beams=("image",)),
    Family(
        "blip_2",
        blip_2,
        square_images([IMAGE] * 6),
        generates=False,
        notes="no batch without an image; its `generate` wants pixels",
    ),
    Family(
        "molmo2",
        molmo2,
        molmo2_images,
        molmo2_videos,
        type_ids=("mm_token_type_ids",),
        video_type=1,
        notes="image tokens attend to each other; video frames are written with the image placeholder",
    ),
    Family("lighton_ocr", lighton_ocr, lighton_ocr_images),
    Family("granite4_vision", granite4_vision, granite4_vision_images, notes="image features enter several layers"),
    Family(
        "kimi_k25",
        kimi_k25,
        kimi_k25_images,
        kimi_k25_videos,
        notes="video chunks of several frames fail in transformers 5.23",
    ),
    Family(
        "lfm3_vl",
        lfm3_vl,
        packed_patches(6 * PATCH**2),
        packed_clips(6 * PATCH**2, lambda frames, tokens: [STAMP, START, *[VIDEO] * tokens, END] * frames),
        masks_tokens=False,
        notes="convolutions in the language model",
    ),
    Family(
        "minicpmv4_6",
        minicpmv4_6,
        minicpmv4_6_images,
        minicpmv4_6_videos,
        masks_tokens=False,
        notes="linear attention in the language model",
    ),
    Family("granite_docling", granite_docling, granite_docling_images, notes="image features enter several layers"),
    Family("qianfan_ocr", qianfan_ocr, qianfan_ocr_images),
    Family("deepseek_ocr2", deepseek_ocr2, local_tiles(64, 64, lambda tiles: [IMAGE] * (16 * tiles + 17))),
    Family(
        "step3p7",
        step3p7,
        local_tiles(48, 32, lambda tiles: [*[7, *[IMAGE] * 4, 8] * tiles, START, *[IMAGE] * 9, END]),
    ),
    Family(
        "muse_glimmer",
        muse_glimmer,
        packed_patches(6 * PATCH**2, ([START], [END])),
        packed_clips(6 * PATCH**2, muse_glimmer_clip),
    ),
    Family(
        "minimax_m3_vl",
        minimax_m3_vl,
        packed_patches(6 * PATCH**2, ([START], [END])),
        packed_clips(6 * PATCH**2, lambda frames, tokens: [STAMP, START, *[VIDEO] * tokens, END] * frames),
        position_ids="compact",
        notes="compact positions only: its attention masks by them",
    ),
    Family("mistral_large4", mistral_large4, lighton_ocr_images),
    Family("inkling", inkling, inkling_images, masks_tokens=False, notes="convolutions in the language model"),
    Family("inkling2", inkling2, inkling2_images, masks_tokens=False, notes="convolutions in the language model"),
    Family(
        "dots3_note",
        dots3_note,
        packed_patches(3 * PATCH**2),
        packed_clips(3 * PATCH**2, lambda frames, tokens: [VIDEO] * frames * tokens),
    ),
    Family(
        "glm5_next",
        glm5_next,
        packed_patches(6 * PATCH**2),
        packed_clips(6 * PATCH**2, lambda frames, tokens: [7, *[START, *[IMAGE] * tokens, END, STAMP] * frames, 8]),
        no_beams=("video",),
        masks_tokens=False,
        notes="linear attention in the language model; video frames are written with the image placeholder",
    ),
    Family(
        "nemotron_h_omni",
        nemotron_h_omni,
        nemotron_h_omni_images,
        masks_tokens=False,
        audios=nemotron_h_omni_audios,
        notes="Mamba layers; videos fail in transformers 5.23",
    ),
]
