"""Families that listen: language models with an audio encoder, some of them with a vision tower as well."""

from __future__ import annotations

import math

import torch
from transformers import (
    AudioFlamingo3Config,
    AudioFlamingo3ForConditionalGeneration,
    FunAsrNanoConfig,
    FunAsrNanoForConditionalGeneration,
    GlmAsrConfig,
    GlmAsrForConditionalGeneration,
    GraniteSpeechConfig,
    GraniteSpeechForConditionalGeneration,
    MuseSparkConfig,
    MuseSparkForConditionalGeneration,
    MusicFlamingoConfig,
    MusicFlamingoForConditionalGeneration,
    Qwen2AudioConfig,
    Qwen2AudioForConditionalGeneration,
    Qwen3ASRConfig,
    Qwen3ASRForConditionalGeneration,
    VibeVoiceAsrConfig,
    VibeVoiceAsrForConditionalGeneration,
    VoxtralConfig,
    VoxtralForConditionalGeneration,
)

from .base import AUDIO, HIDDEN, Family, noise
from .image_models import IMAGE, PATCH, VIDEO, pick, text, vision
from .other_models import muse_glimmer_clip, packed_clips, packed_patches

MELS = 8
WINDOW = 64  # mel frames that an encoder of fixed length takes
LENGTHS = [64, 40, 53]  # mel frames of a clip, by its seed
START, END = 5, 6


def seeds_of(rows: list[list[int]]) -> list[int]:
    return [seed for row in rows for seed in row]


def tower(model_type: str, **extra) -> dict:
    """Settings of a tiny audio encoder of Whisper's build: two mel frames to a position, `WINDOW` of them."""
    return {
        "model_type": model_type,
        "num_mel_bins": MELS,
        "hidden_size": 24,
        "intermediate_size": 96,  # four positions side by side
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_source_positions": WINDOW // 2,
        "initializer_range": 0.1,
        **extra,
    }


def mels(seed: int, frames: int, most: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A clip of `frames` mel frames, `(MELS, most)`, zeros after its end, and its mask `(most,)`."""
    mask = torch.arange(most) < frames
    return noise((MELS, most), seed) * mask, mask.long()


def masked_audios(
    tokens_of, mask_name: str = "input_features_mask", window: int = WINDOW, start: int = START, end: int = END
):
    """Clips of different lengths, padded to `window` mel frames: `(U, MELS, window)` and a mask."""

    def make(model, rows):
        seeds = seeds_of(rows)
        frames = [pick(LENGTHS, seed) * window // WINDOW for seed in seeds]
        features, masks = zip(*(mels(s, n, window) for s, n in zip(seeds, frames, strict=True)), strict=True)
        inputs = {"input_features": torch.stack(features), mask_name: torch.stack(masks)}
        return inputs, [[start, *[AUDIO] * tokens_of(n), end] for n in frames]

    return make


def voxtral():
    return VoxtralForConditionalGeneration(
        VoxtralConfig(audio_config=tower("voxtral_encoder"), text_config=text(head_dim=8), audio_token_id=AUDIO)
    )


def voxtral_audios(model, rows):
    """Long clips are cut into windows, `(W, MELS, WINDOW)`; one run of placeholders for all windows of a clip."""
    seeds = seeds_of(rows)
    windows = [pick([2, 1, 2], seed) for seed in seeds]
    features = torch.cat([noise((n, MELS, WINDOW), seed) for n, seed in zip(windows, seeds, strict=True)])
    return {"input_features": features}, [[START, *[AUDIO] * (n * WINDOW // 8)] for n in windows]


def audioflamingo3():
    return AudioFlamingo3ForConditionalGeneration(
        AudioFlamingo3Config(
            audio_config=tower("audioflamingo3_encoder"), text_config=text("qwen2"), audio_token_id=AUDIO
        )
    )


def flamingo_tokens(frames: int) -> int:
    """A convolution of stride 2, then pairs are averaged."""
    return ((frames - 1) // 2 + 1 - 2) // 2 + 1


def musicflamingo():
    return MusicFlamingoForConditionalGeneration(
        MusicFlamingoConfig(
            audio_config=tower("audioflamingo3_encoder"),
            text_config=text("qwen2"),
            audio_token_id=AUDIO,
            audio_bos_token_id=START,
            audio_eos_token_id=END,
        )
    )


def glmasr():
    settings = tower("glmasr_encoder", max_position_embeddings=WINDOW // 2)
    settings.pop("max_source_positions")
    return GlmAsrForConditionalGeneration(
        GlmAsrConfig(
            audio_config=settings, text_config=text(head_dim=8), audio_token_id=AUDIO, tie_word_embeddings=False
        )
    )


def glmasr_tokens(frames: int) -> int:
    """A convolution of stride 2, then four positions side by side."""
    return ((frames - 1) // 2 + 1 - 4) // 4 + 1


def granite_speech():
    return GraniteSpeechForConditionalGeneration(
        GraniteSpeechConfig(
            encoder_config={
                "input_dim": MELS,
                "num_layers": 2,
                "hidden_dim": 24,
                "num_heads": 2,
                "output_dim": 8,
                "context_size": 16,
                "max_pos_emb": 32,
                "conv_kernel_size": 3,
            },
            projector_config={
                "model_type": "blip_2_qformer",
                "hidden_size": 24,
                "encoder_hidden_size": 24,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "intermediate_size": 48,
            },
            text_config=text("granite"),
            audio_token_index=AUDIO,
            has_lora_adapter=False,
            window_size=8,
            downsample_rate=2,
        )
    )


def granite_audios(model, rows):
    """Clips `(U, WINDOW, MELS)`, padded alike; the mask is of tokens, four to a window of eight frames."""
    seeds = seeds_of(rows)
    frames = [pick(LENGTHS, seed) for seed in seeds]
    counts = [math.ceil(n / 8) * 4 for n in frames]
    features = [mels(s, n, WINDOW)[0].T for s, n in zip(seeds, frames, strict=True)]
    mask = torch.arange(WINDOW // 2) < torch.tensor(counts)[:, None]
    inputs = {"input_features": torch.stack(features), "input_features_mask": mask}
    return inputs, [[AUDIO] * n for n in counts]


def qwen3_asr():
    return Qwen3ASRForConditionalGeneration(
        Qwen3ASRConfig(
            audio_config={
                "num_mel_bins": MELS,
                "encoder_layers": 2,
                "encoder_attention_heads": 2,
                "encoder_ffn_dim": 48,
                "d_model": 24,
                "n_window": 50,
                "n_window_infer": 200,
                "output_dim": HIDDEN,
                "downsample_hidden_size": 4,
                "max_position_embeddings": 16,
            },
            text_config=text("qwen3", head_dim=8),
            audio_token_id=AUDIO,
            timestamp_token_id=7,
            pad_token_id=0,
            eos_token_id=2,
            tie_word_embeddings=False,
        )
    )


def qwen3_asr_tokens(frames: int) -> int:
    """Three convolutions of stride 2 over each chunk of 100 frames."""
    rest = frames % 100
    for _ in range(3):
        rest = (rest - 1) // 2 + 1
    return rest + frames // 100 * 13


def qwen2_audio():
    return Qwen2AudioForConditionalGeneration(
        Qwen2AudioConfig(
            audio_config={
                "num_mel_bins": MELS,
                "encoder_layers": 2,
                "encoder_attention_heads": 2,
                "encoder_ffn_dim": 48,
                "d_model": 24,
                "max_source_positions": WINDOW // 2,
            },
            text_config=text("qwen2"),
            audio_token_index=AUDIO,
        )
    )


def fun_asr_nano():
    return FunAsrNanoForConditionalGeneration(
        FunAsrNanoConfig(
            audio_config={
                "num_mel_bins": MELS,
                "num_stacked_frames": 2,
                "hidden_size": 24,
                "num_attention_heads": 2,
                "intermediate_size": 48,
                "num_hidden_layers": 2,
                "num_timestamp_prediction_layers": 1,
                "fsmn_kernel_size": 3,
            },
            adaptor_config={
                "hidden_size": HIDDEN,
                "num_attention_heads": 2,
                "intermediate_size": HIDDEN // 4,
                "num_hidden_layers": 1,
                "projector_hidden_size": 48,
            },
            text_config=text("qwen3", head_dim=8),
            audio_token_id=AUDIO,
            tie_word_embeddings=False,
        )
    )


def fun_asr_nano_audios(model, rows):
    """Pairs of mel frames are stacked, `(U, WINDOW / 2, 2 * MELS)`; each pair is a token."""
    inputs, _ = masked_audios(lambda n: n)(model, rows)
    stacked = inputs["input_features"].mT.reshape(-1, WINDOW // 2, 2 * MELS)
    counts = [pick([16, 9, 12], seed) for seed in seeds_of(rows)]
    mask = (torch.arange(WINDOW // 2) < torch.tensor(counts)[:, None]).long()
    inputs = {"input_features": stacked * mask[..., None], "input_features_mask": mask}
    return inputs, [[AUDIO] * n for n in counts]


def vibevoice_asr():
    codec = {"num_filters": 4, "downsampling_ratios": [2, 2], "depths": [1, 1, 1], "kernel_size": 3}
    return VibeVoiceAsrForConditionalGeneration(
        VibeVoiceAsrConfig(
            acoustic_tokenizer_encoder_config={
                "model_type": "vibevoice_acoustic_tokenizer_encoder",
                "hidden_size": 8,
                **codec,
            },
            semantic_tokenizer_encoder_config={
                "model_type": "vibevoice_acoustic_tokenizer_encoder",
                "hidden_size": 12,
                **codec,
            },
            text_config=text("qwen2"),
            audio_token_id=AUDIO,
            audio_bos_token_id=START,
            audio_eos_token_id=END,
            acoustic_tokenizer_chunk_size=400,
        )
    )


def vibevoice_audios(model, rows):
    """Waveforms `(U, 1, samples)`, padded to the longest; a token for four samples. Without the codec's noise."""
    seeds = seeds_of(rows)
    frames = [pick(LENGTHS, seed) for seed in seeds]
    most = max(frames) + -max(frames) % 4
    mask = torch.arange(most) < torch.tensor(frames)[:, None]
    waves = torch.stack([noise((1, WINDOW), seed)[:, :most] for seed in seeds]) * mask[:, None]
    inputs = {"input_values": waves, "padding_mask": mask, "sample": False}
    return inputs, [[START, *[AUDIO] * math.ceil(n / 4), END] for n in frames]


def muse_spark():
    return MuseSparkForConditionalGeneration(
        MuseSparkConfig(
            vision_config=vision("muse_spark_vision", pos_emb_height=4, pos_emb_width=4),
            text_config=text(
                "muse_spark_text",
                head_dim=8,
                layer_types=["sliding_attention", "full_attention"],
                output_multiplier=1.0,
                num_local_experts=4,
                num_experts_per_tok=2,
                moe_intermediate_size=16,
                moe_hidden_size=16,
            ),
            audio_config={
                "patch_sizes": [2, 2],
                "hidden_sizes": [8, 16],
                "depths": [1, 1],
                "num_hidden_layers": 2,
                "conv_kernel_size": 3,
                "out_hidden_size": HIDDEN,
                "initializer_range": 0.1,
            },
            out_hidden_size=96,
            projector_hidden_size=48,
            image_token_id=IMAGE,
            video_token_id=VIDEO,
            audio_token_id=AUDIO,
        )
    )


def muse_spark_audios(model, rows):
    """Waveforms `(U, samples)`, padded alike; a token for four samples."""
    seeds = seeds_of(rows)
    lengths = [pick(LENGTHS, seed) for seed in seeds]
    mask = torch.arange(WINDOW) < torch.tensor(lengths)[:, None]
    waves = torch.stack([noise((WINDOW,), seed) for seed in seeds]) * mask
    inputs = {"input_values": waves, "input_values_mask": mask.long()}
    return inputs, [[START, *[AUDIO] * math.ceil(n / 4), END] for n in lengths]


FAMILIES = [
    Family(
        "voxtral",
        voxtral,
        audios=voxtral_audios,
        no_beams=("audio",),
        notes="a clip of several windows is one unit",
    ),
    Family("audioflamingo3", audioflamingo3, audios=masked_audios(flamingo_tokens)),
    Family("musicflamingo", musicflamingo, audios=masked_audios(flamingo_tokens)),
    Family("glmasr", glmasr, audios=masked_audios(glmasr_tokens)),
    Family(
        "granite_speech", granite_speech, audios=granite_audios, notes="`generate` turns its LoRA off for pruned audio"
    ),
    Family("qwen3_asr", qwen3_asr, audios=masked_audios(qwen3_asr_tokens, window=200)),
    Family(
        "qwen2_audio",
        qwen2_audio,
        audios=masked_audios(flamingo_tokens, "feature_attention_mask"),
        notes="forward encodes by itself; its lines are repeated",
    ),
    Family("fun_asr_nano", fun_asr_nano, audios=fun_asr_nano_audios),
    Family(
        "muse_spark",
        muse_spark,
        packed_patches(6 * PATCH**2, ([START], [END])),
        packed_clips(6 * PATCH**2, muse_glimmer_clip),
        audios=muse_spark_audios,
    ),
    Family(
        "vibevoice_asr",
        vibevoice_asr,
        audios=vibevoice_audios,
        generates=False,
        notes="its codec takes no gradients; its generate takes no embeddings, so pruning is for training alone",
    ),
]
