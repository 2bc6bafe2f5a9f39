"""What single model families need beyond the protocol, each with its reason. All others need nothing.

Shapes: U audios, M mel bins, F frames, T tokens of the batch, D hidden.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_outputs import BaseModelOutputWithPooling


@dataclass(frozen=True)
class Family:
    """How a family departs from the rule, which the defaults describe. Images and audio have one each.

    Args:
        field (`str`): the field of the encoder's output with the tokens that `forward` merges.
        layered (`bool`): the field is a list of (layer, tokens), added to the hidden states of several layers. Those of
            the lowest layer are pruned, and the isolator stands before them.
        runs (`bool`): a unit is a run of placeholders, because the encoder returns tiles of an image, or all images of
            a sample.
        lines (`bool`): an image's placeholders stand in lines, with one other token between two of them.
        shares_placeholder (`bool`): video frames use the image placeholder.
        row_mask (`str`): the input that selects the rows of the encoder's output that `forward` takes.
        project (`Callable`, *optional*): `forward` projects the encoder's output itself, which leaves no room for the
            isolator. So the projection is made here, and the tokens go in as input embeddings.
        places (`bool`): `forward` reads position ids as places in the sequence and masks by them, so with gaps tokens
            would see later ones.
        counts (`bool`): `generate` drops position ids and numbers tokens by counting them.
        slices_logits (`bool`): `logits_to_keep` may be a mask, if `forward` takes it at all.
        encode (`Callable`, *optional*): the encoder of a model without one of its own, whose `forward` encodes.
        whole (`bool`): the tokens are never pruned, and `forward` encodes them.
    """

    field: str = "pooler_output"
    layered: bool = False
    runs: bool = False
    lines: bool = False
    shares_placeholder: bool = False
    row_mask: str = ""
    project: Callable[[nn.Module, torch.Tensor], torch.Tensor] | None = None
    slices_logits: bool = True
    places: bool = False
    counts: bool = False
    encode: Callable[..., BaseModelOutputWithPooling] | None = None
    whole: bool = False


def encode_qwen2_audio(
    model: nn.Module, input_features: torch.Tensor, feature_attention_mask: torch.Tensor, **_
) -> BaseModelOutputWithPooling:
    """The encoding in Qwen2-Audio's `forward`: mel features `(U, M, F)` and their mask `(U, F)` to tokens `(T, D)`."""
    tower = model.audio_tower
    # Frames after the convolution (stride 2), and tokens after pooling: (U,) each.
    convolved, lengths = tower._get_feat_extract_output_lengths(feature_attention_mask.sum(-1))
    places = torch.arange((input_features.shape[-1] - 2) // 2 + 1, device=convolved.device)
    # Attention mask of the real frames, from a padding mask (U, F / 2).
    mask = create_bidirectional_mask(
        config=tower.config,
        inputs_embeds=torch.empty(len(convolved), len(places), 1, dtype=tower.dtype, device=tower.device),
        attention_mask=(places < convolved[:, None]).long(),
    )
    # Tower and projector: (U, M, F) -> (U, N, D), then the real tokens, (T, D).
    features = model.multi_modal_projector(tower(input_features, attention_mask=mask).last_hidden_state)
    real = torch.arange(features.shape[1], device=lengths.device) < lengths[:, None]
    return BaseModelOutputWithPooling(pooler_output=features[real])


RULE = Family()
TILES = Family(runs=True)  # an image's tiles are adjacent: one budget and one isolator per image
SAMPLES = Family(runs=True)  # each tile has separator tokens: a budget and an isolator per tile
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
    "inkling": SAMPLES,  # the encoder returns single patches
    "smolvlm": SAMPLES,
    "glm4v": SHARED,
    "glm4v_moe": SHARED,
    "glm46v": SHARED,
    "glm_ocr": SHARED,
    "glm5_next": SHARED,
    "exaone4_5": Family(counts=True),
    "hyperclovax_vision_v2": Family(counts=True),
    "chameleon": Family(slices_logits=False),  # its forward writes into logits (B, S, V)
    "fuyu": Family(field="last_hidden_state", lines=True),
    "granite4_vision": Family(field="deepstack_features", layered=True),
    "llama4": Family(field="last_hidden_state", project=lambda owner, rows: owner.multi_modal_projector(rows)),
    "minimax_m3_vl": Family(places=True),
    "video_llama_3": Family(row_mask="video_compression_mask"),  # frames similar to the one before are left out
}

# Their forward needs ids in each layer, or for its masks, so input embeddings alone are not enough.
NEEDS_IDS = Family(whole=True)
AUDIO_FAMILIES = {
    "gemma3n": NEEDS_IDS,
    "gemma4": NEEDS_IDS,
    "gemma4_unified": NEEDS_IDS,
    "granite_speech": Family(row_mask="input_features_mask"),
    "granite_speech_plus": Family(row_mask="input_features_mask"),
    "inkling": Family(whole=True),  # codes, not features; untested
    "qwen2_5_omni_thinker": Family(field="last_hidden_state"),
    "qwen2_audio": Family(encode=encode_qwen2_audio),
    "qwen3_omni_moe_thinker": Family(field="last_hidden_state"),
}


def family_of(config, modality: str = "image") -> Family:
    """The family of a model's config; videos follow images."""
    families = AUDIO_FAMILIES if modality == "audio" else FAMILIES
    return families.get(config.model_type, RULE)
