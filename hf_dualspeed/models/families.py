"""What single model families need beyond the protocol, each with its reason. All others need nothing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_outputs import BaseModelOutputWithPooling


@dataclass(frozen=True)
class Family:
    """Where a family departs from the rule, which the defaults are. Images and audio have one each.

    Args:
        field (`str`): the field of the encoder's output that holds the tokens which `forward` merges.
        layered (`bool`): that field is a list of (layer, tokens), added to the hidden states of several layers.
        runs (`bool`): a unit is a run of placeholders rather than what the encoder returns, which is a tile of an image
            or all images of a sample.
        shares_placeholder (`bool`): video frames are written with the image placeholder.
        row_mask (`str`): the input that says which rows of the encoder's output `forward` takes.
        project (`Callable`, *optional*): `forward` itself still projects what the encoder returned, behind which the
            isolator could not go in. The projection is made here and the tokens go in as input embeddings.
        places (`bool`): `forward` takes position ids for places in the sequence and masks by them, so that positions
            with gaps would let tokens see those behind them.
        slices_logits (`bool`): `logits_to_keep` may be a mask, as it may wherever `forward` has it.
        encode (`Callable`, *optional*): the encoder of a model that has none by itself: `forward` encodes.
        whole (`bool`): the tokens are never pruned, and `forward` encodes them.
    """

    field: str = "pooler_output"
    layered: bool = False
    runs: bool = False
    shares_placeholder: bool = False
    row_mask: str = ""
    project: Callable[[nn.Module, torch.Tensor], torch.Tensor] | None = None
    slices_logits: bool = True
    places: bool = False
    encode: Callable[..., BaseModelOutputWithPooling] | None = None
    whole: bool = False


def encode_qwen2_audio(
    model: nn.Module, input_features: torch.Tensor, feature_attention_mask: torch.Tensor, **_
) -> BaseModelOutputWithPooling:
    """What Qwen2-Audio's `forward` makes of mel features `(U, M, F)` and their mask `(U, F)`: tokens `(T, D)`."""
    tower = model.audio_tower
    convolved, lengths = tower._get_feat_extract_output_lengths(feature_attention_mask.sum(-1))
    places = torch.arange((input_features.shape[-1] - 2) // 2 + 1, device=convolved.device)
    mask = create_bidirectional_mask(
        config=tower.config,
        inputs_embeds=torch.empty(len(convolved), len(places), 1, dtype=tower.dtype, device=tower.device),
        attention_mask=(places < convolved[:, None]).long(),
    )
    features = model.multi_modal_projector(tower(input_features, attention_mask=mask).last_hidden_state)
    real = torch.arange(features.shape[1], device=lengths.device) < lengths[:, None]
    return BaseModelOutputWithPooling(pooler_output=features[real])


RULE = Family()
TILES = Family(runs=True)  # an image's tiles lie side by side: one budget and one isolator for the image
SAMPLES = Family(runs=True)  # each tile is set off by tokens of its own: a budget and an isolator for each
SHARED = Family(shares_placeholder=True)
FAMILIES = {
    "aria": TILES,
    "cohere2_vision": TILES,
    "got_ocr2": TILES,
    "internvl": TILES,
    "ovis2": TILES,
    "perception_lm": TILES,
    "qianfan_ocr": TILES,
    "granite_docling": SAMPLES,
    "idefics2": SAMPLES,
    "idefics3": SAMPLES,
    "inkling": SAMPLES,  # which returns patch by patch
    "smolvlm": SAMPLES,
    "glm4v": SHARED,
    "glm4v_moe": SHARED,
    "glm46v": SHARED,
    "glm_ocr": SHARED,
    "glm5_next": SHARED,
    "chameleon": Family(slices_logits=False),  # it writes into logits (B, S, V)
    "fuyu": Family(field="last_hidden_state"),
    "granite4_vision": Family(field="deepstack_features", layered=True),
    "llama4": Family(field="last_hidden_state", project=lambda owner, rows: owner.multi_modal_projector(rows)),
    "minimax_m3_vl": Family(places=True),
    "video_llama_3": Family(row_mask="video_compression_mask"),  # frames too like the one before are left out
}

# Their forward looks ids up in each layer, or masks by them, so input embeddings alone would not do.
NEEDS_IDS = Family(whole=True)
AUDIO_FAMILIES = {
    "gemma3n": NEEDS_IDS,
    "gemma4": NEEDS_IDS,
    "gemma4_unified": NEEDS_IDS,
    "granite_speech": Family(row_mask="input_features_mask"),
    "granite_speech_plus": Family(row_mask="input_features_mask"),
    "inkling": Family(whole=True),  # codes rather than features; not tried
    "qwen2_5_omni_thinker": Family(field="last_hidden_state"),
    "qwen2_audio": Family(encode=encode_qwen2_audio),
    "qwen3_omni_moe_thinker": Family(field="last_hidden_state"),
}


def family_of(config, modality: str = "image") -> Family:
    """The family of a model's config; videos follow images."""
    families = AUDIO_FAMILIES if modality == "audio" else FAMILIES
    return families.get(config.model_type, RULE)
