"""Attention that visual tokens receive: the tower's own in every family that supplies it, refused elsewhere."""

from __future__ import annotations

import threading

import pytest
import torch
from families import FAMILIES, MIXED, MIXED_VIDEO, batch
from families.cases import CASES, ROWS
from tower_cases import SUPPLY, identity, patches_of_tokens
from transformers import AttentionInterface, AttentionMaskInterface, PixtralVisionConfig, PixtralVisionModel
from transformers.masking_utils import eager_mask

from hf_dualspeed.models.attention import attention_of, capture_attention, penultimate_layer
from hf_dualspeed.models.interface import ModelInterface, unwrap
from hf_dualspeed.pruning.encoding import encode

ATTENTION = frozenset({"attention"})
MAPS: list[tuple[torch.nn.Module, torch.Tensor]] = []


def reference(module, query, key, value, attention_mask=None, scaling=None, **options):
    """Plain attention that keeps its maps."""
    groups = query.shape[1] // key.shape[1]
    key, value = (states.repeat_interleave(groups, dim=1) for states in (key, value))
    scores = query @ key.transpose(-1, -2) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    maps = (scores if attention_mask is None else scores + attention_mask).softmax(-1)
    MAPS.append((module, maps.detach()))
    return (maps @ value).transpose(1, 2).contiguous(), None


def flash(module, query, key, value, attention_mask=None, cu_seq_lens_q=None, **options):
    """FlashAttention's way to call: all sequences in one row."""
    sizes = cu_seq_lens_q.diff().tolist()
    split = zip(*(states.split(sizes, dim=2) for states in (query, key, value)), strict=True)
    return torch.cat([reference(module, *states, **options)[0] for states in split], dim=1), None


for function in (reference, flash):
    AttentionInterface.register(f"{function.__name__}_test", function)
    AttentionMaskInterface.register(f"{function.__name__}_test", eager_mask)


def expected_attention(model, inputs, modality, index) -> torch.Tensor:
    tower = unwrap(model).get_encoder(modality=modality)
    layer = penultimate_layer(tower)
    model.set_attn_implementation("reference_test")
    MAPS.clear()
    with torch.no_grad():
        encode(ModelInterface(model), inputs)
    row = (lambda m: m[:, 0]) if type(tower).__name__ == "CLIPVisionModel" else (lambda m: m.mean(1))
    scores = torch.cat([row(maps.mean(1)).flatten() for module, maps in MAPS if module is layer])
    made_of = patches_of_tokens(model, inputs, modality, index)
    means = (made_of * scores).sum(1) / made_of.sum(1)
    return means.masked_fill(~made_of.any(1), float("-inf"))


@pytest.mark.parametrize(("name", "modality"), CASES)
def test_attention_is_the_towers_own_or_refused(name, modality):
    family = FAMILIES[name]
    model = family.model()
    inputs = batch(family, model, ROWS[modality])
    if (name, modality) not in SUPPLY:
        with pytest.raises(ValueError, match=r"(?s)attention.* Choose a pruner that needs no attention"):
            encode(ModelInterface(model), inputs, ATTENTION)
        return
    for index, encoding in enumerate(encode(ModelInterface(model), inputs, ATTENTION)):
        expected = expected_attention(model, inputs, encoding.modality, index)
        torch.testing.assert_close(torch.cat(encoding.attention), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("rows", [MIXED, MIXED_VIDEO], ids=["image", "video"])
@pytest.mark.parametrize("name", ["qwen2_5_vl", "glm_ocr", "minimax_m3_vl"])
def test_sequences_packed_in_one_row_attend_apart(name, rows):
    model = FAMILIES[name].model()
    inputs = batch(FAMILIES[name], model, rows)
    expected = encode(ModelInterface(model), inputs, ATTENTION)[0]
    calls = len(MAPS)
    for module in unwrap(model).get_encoder(modality="image").modules():
        if hasattr(module, "config"):
            module.config._attn_implementation_internal = "flash_test"
    received = encode(ModelInterface(model), inputs, ATTENTION)[0]
    assert len(MAPS) > calls
    torch.testing.assert_close(received.attention, expected.attention, rtol=1e-4, atol=1e-6)


def pixtral() -> PixtralVisionModel:
    sizes = {"hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 2}
    return PixtralVisionModel(PixtralVisionConfig(**sizes, image_size=32, patch_size=4)).eval()


@pytest.mark.parametrize("boolean", [False, True])
def test_masked_tokens_are_left_out(monkeypatch, boolean):
    """Pixtral packs images in one row under a mask; here a last image is padding."""
    monkeypatch.setattr("hf_dualspeed.models.attention.ROWS_AT_ONCE", 5)
    tower = pixtral()
    pixels, sizes = torch.randn(2, 3, 16, 16), torch.tensor([[16, 8], [12, 16]])
    with torch.no_grad(), capture_attention(tower) as capture:
        tower(pixels, sizes)
    tower.set_attn_implementation("eager")
    with torch.no_grad():
        maps = tower(pixels, sizes, output_attentions=True).attentions[-2].mean(1)[0]
    expected = [maps[:8, :8].mean(0), maps[8:, 8:].mean(0)]
    if boolean:
        capture.calls[0].mask = capture.calls[0].mask > -1
        capture.calls[0].mask[:, :, :, 8:] = False
        expected[1] = torch.zeros(12)
    torch.testing.assert_close(capture.received(), torch.cat(expected), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "mask", "message"),
    [
        ({"softcap": 5.0}, None, r"takes \['softcap'\]"),
        ({"is_causal": True}, None, "is causal"),
        ({}, torch.zeros(1, 4), r"takes a mask of shape \(1, 4\)"),
    ],
)
def test_attention_of_other_rules_is_refused(options, mask, message):
    tower = pixtral()
    states = torch.randn(1, 2, 4, 12)
    with capture_attention(tower) as capture:
        function = AttentionInterface().get_interface("identity_test", identity)
        function(capture.layer, states, states, states, mask, scaling=1.0, **options)
    with pytest.raises(ValueError, match=f"PixtralVisionModel is unknown.*{message}.*such as 'divprune'"):
        capture.received()


def test_threads_capture_apart_and_leave_the_lookup_as_it_was():
    lookup, towers = AttentionInterface.get_interface, []
    together = threading.Barrier(2, timeout=300)
    captures = {}

    def work(name):
        model = FAMILIES["llava"].model()
        tower = model.model.vision_tower
        with capture_attention(tower) as captures[name]:
            together.wait()
            with torch.no_grad():
                tower(torch.randn(len(name), 3, 16, 16))
            towers.append(tower)

    threads = [threading.Thread(target=work, args=(name,)) for name in ("a", "bb")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(towers) == 2
    assert {name: capture.calls[0].query.shape[0] for name, capture in captures.items()} == {"a": 1, "bb": 2}
    assert AttentionInterface.get_interface is lookup


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("padded", [False, True])
def test_attention_of_single_queries_is_that_of_all(softcap, window, padded):
    torch.manual_seed(0)
    query, key = torch.randn(2, 4, 7, 8), torch.randn(2, 2, 7, 8)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1] * 7]) if padded else None
    places = torch.tensor([[6, 3], [5, 2]])
    scores = query @ key.repeat_interleave(2, 1).mT * 8**-0.5
    scores = scores if softcap is None else (scores / softcap).tanh() * softcap
    index = torch.arange(7)
    seen = index <= index[:, None]
    seen = seen if window is None else seen & (index > index[:, None] - window)
    seen = seen if mask is None else seen & mask[:, None, None].bool()
    whole = scores.masked_fill(~seen, float("-inf")).softmax(-1).mean(1)
    options = {"softcap": softcap, "sliding_window": window, "is_causal": True}
    found = attention_of(torch.nn.Module(), places, query, key, mask, options)
    torch.testing.assert_close(found, torch.stack([rows[at] for rows, at in zip(whole, places, strict=True)]))
