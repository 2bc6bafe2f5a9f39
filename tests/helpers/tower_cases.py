"""What the towers of the families supply to pruners."""

from __future__ import annotations

import copy

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask

from hf_dualspeed.models.attention import penultimate_layer
from hf_dualspeed.models.interface import ModelInterface, unwrap
from hf_dualspeed.pruning.encoding import encode

IMAGES = "llava llava_next vipllava llava_onevision paligemma llava_next_video video_llava deepseek_vl janus"
IMAGES += " deepseek_vl_hybrid ernie4_5_vl_moe"
VIDEOS = "qwen2_5_vl qwen2_vl qwen3_vl qwen3_vl_moe qwen3_5 qwen3_5_moe glm4v glm46v glm4v_moe glm_ocr cosmos3_edge"
VIDEOS += " cohere_compass qwen2_5_omni qwen3_omni_moe exaone4_5 hyperclovax_vision_v2 lfm3_vl minimax_m3_vl"
VIDEOS += " dots3_note glm5_next cosmos3_omni qwen4_exp"
SUPPLY = {(name, "image") for name in f"{IMAGES} {VIDEOS}".split()} | {(name, "video") for name in VIDEOS.split()}
SUPPLY |= {("qwen3_omni_moe", "audio"), ("qwen3_omni_moe", "image and audio"), ("qwen3_asr", "audio")}


def identity(module, query, key, value, attention_mask=None, **options):
    """Each token attends to itself alone."""
    return value.repeat_interleave(query.shape[1] // value.shape[1], dim=1).transpose(1, 2).contiguous(), None


AttentionInterface.register("identity_test", identity)
AttentionMaskInterface.register("identity_test", eager_mask)


def patches_of_tokens(model, inputs, modality, index) -> torch.Tensor:
    """Which of the layer's tokens each visual token is made of, `(T, P)`: those its gradient reaches while no token
    sees another."""
    model = copy.deepcopy(model)
    layer = penultimate_layer(unwrap(model).get_encoder(modality=modality))
    model.set_attn_implementation("identity_test")
    for module in model.modules():
        if isinstance(module, torch.nn.Conv2d) and module.padding != (0, 0):  # which sees neighbours
            torch.nn.init.zeros_(module.weight)
    entered = []

    def enter(module, args, kwargs):
        hidden = (args[0] if args else kwargs["hidden_states"]).detach().requires_grad_()
        entered.append(hidden)
        return ((hidden, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": hidden})

    handle = layer.register_forward_pre_hook(enter, with_kwargs=True)
    features = encode(ModelInterface(model), inputs)[index].features
    handle.remove()
    (hidden,) = entered
    probe = features @ torch.randn(features.shape[-1], generator=torch.Generator().manual_seed(0))
    rows = []
    for token in probe:
        (grad,) = torch.autograd.grad(token, hidden, retain_graph=True, allow_unused=True)
        rows.append(grad.flatten(0, -2).norm(dim=-1))
    return torch.stack(rows) > 0
