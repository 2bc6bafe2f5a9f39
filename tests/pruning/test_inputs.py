"""The fast pass on tiny models of three families: lengths, logits, positions, gradients, errors."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from families import FAMILIES as CONFORMING
from families import batch as mixed
from pruner_cases import build, shortens
from tiny_models import FAMILIES, HIDDEN, MIXED, batch
from transformers import Blip2ForConditionalGeneration, OPTConfig, T5Config

from hf_dualspeed import ModeIsolator, available_pruners, freeze_roles, prune_inputs, prune_visual_tokens
from hf_dualspeed.data import MaskVisualLabels
from hf_dualspeed.models.families import RULE
from hf_dualspeed.models.interface import ModelInterface
from hf_dualspeed.pruners import budget
from hf_dualspeed.pruning.encoding import encode, encoder_arguments, frozen_tower, tokens_of

SIDES = ("right", "left")
SHORTENING = [name for name in available_pruners() if shortens(name)]


def pruner(name="divprune", ratio=0.75, **settings):
    return build(name, HIDDEN, pruning_ratio=ratio, **settings)


def real(tensor, mask):
    return tensor[mask.bool()]


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("family", FAMILIES)
def test_ratio_zero_without_isolator_is_the_plain_forward(family, side):
    model, processor = FAMILIES[family].build(side)
    inputs = batch(FAMILIES[family], processor)
    with torch.no_grad():
        plain = model(**inputs)
        for scheme in ("original", "compact"):
            short = prune_inputs(model, inputs, pruner(ratio=0.0), position_ids=scheme)
            assert "pixel_values" not in short
            out = model(**short)
            if scheme == "original" or family != "qwen2_5_vl":  # renumbering changes M-RoPE's positions
                expected = real(plain.logits, inputs["attention_mask"])
                torch.testing.assert_close(real(out.logits, short["attention_mask"]), expected)
                torch.testing.assert_close(out.loss, plain.loss)
        with prune_visual_tokens(model, pruner(ratio=0.0)):
            inside = model(**inputs)
    torch.testing.assert_close(inside.loss, plain.loss)
    torch.testing.assert_close(model(**inputs).loss.detach(), plain.loss)  # the context is over


def test_an_encoder_and_a_decoder_are_refused_by_name():
    """Labels are another sequence than what is shortened, and the decoder's own keys have no sizes."""
    family = CONFORMING["blip_2"]
    config = family.model().config
    config.use_decoder_only_language_model = False
    config.text_config = T5Config(vocab_size=100, d_model=HIDDEN, d_ff=32, num_layers=1, num_heads=4, d_kv=8)
    model = Blip2ForConditionalGeneration(config)
    with pytest.raises(ValueError, match="Blip2.* cannot be pruned: its language model is an encoder and a decoder"):
        prune_inputs(model, mixed(family, model, [["image", 5]]), pruner())


def test_learned_positions_are_counted_without_padding():
    """OPT, BLIP-2's language model, looks up its positions, so that left padding may not shift them."""
    family = CONFORMING["blip_2"]
    config, sizes = family.model().config, {"hidden_size": HIDDEN, "ffn_dim": 32, "word_embed_proj_dim": HIDDEN}
    config.text_config = OPTConfig(
        vocab_size=100,
        num_hidden_layers=2,
        num_attention_heads=4,
        init_std=0.2,
        bos_token_id=1,
        eos_token_id=2,
        **sizes,
    )
    model = Blip2ForConditionalGeneration(config).eval()
    inputs = mixed(family, model, [[3, "image", 5], ["image", 9]], side="left")
    short = prune_inputs(model, inputs, pruner(ratio=0.0), position_ids="original")
    expected = real(model(**inputs).logits, inputs["attention_mask"])
    torch.testing.assert_close(real(model(**short).logits, short["attention_mask"]), expected)


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", SHORTENING)
def test_pruned_batch_has_the_expected_length_and_gradients(family, side, name):
    model, processor = FAMILIES[family].build(side)
    inputs = batch(FAMILIES[family], processor)
    isolator = ModeIsolator.for_model(model, 3)
    lengths = encode(ModelInterface(model), inputs)[0].lengths
    assert len(lengths) == 3
    short = prune_inputs(model, inputs, pruner(name), isolator)
    tokens = inputs["attention_mask"].sum(1)
    images = [2, 0, 1]
    per_row = [sum(lengths[:2]), 0, lengths[2]]
    kept = [sum(budget(n, 0.75) for n in lengths[:2]), 0, budget(lengths[2], 0.75)]
    expected = [int(t) - v + k + 3 * i for t, v, k, i in zip(tokens, per_row, kept, images, strict=True)]
    assert short["attention_mask"].sum(1).tolist() == expected
    assert short["input_ids"].shape == (3, max(expected))
    visual = (short["input_ids"] == processor.image_token_id).sum()
    assert visual == sum(kept) + 3 * 3
    assert all(t.shape[-2:] == short["input_ids"].shape for k, t in short.items() if k != "mm_encoder_outputs")
    # Text is untouched, in its order; so are the labels.
    for row in range(3):
        full_row, short_row = (
            (
                x["input_ids"][row][x["attention_mask"][row].bool()],
                x["labels"][row][x["attention_mask"][row].bool()],
            )
            for x in (inputs, short)
        )
        for (ids, labels), (short_ids, short_labels) in [(full_row, short_row)]:
            text, short_text = ids != processor.image_token_id, short_ids != processor.image_token_id
            assert torch.equal(ids[text], short_ids[short_text])
            assert torch.equal(labels[text], short_labels[short_text])
            assert (short_labels[~short_text] == -100).all()
    if side == "left" and min(expected) < max(expected):
        assert short["attention_mask"][1, 0] == 0
        assert short["attention_mask"][:, -1].all()
    model(**short).loss.backward()
    projector = model.model.visual.merger if family == "qwen2_5_vl" else model.model.multi_modal_projector
    assert isolator.prompt.grad.abs().sum() > 0
    assert all(p.grad.abs().sum() > 0 for p in projector.parameters() if p.dim() > 1)


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("family", FAMILIES)
def test_original_positions_equal_masking_the_dropped_tokens(family, side):
    model, processor = FAMILIES[family].build(side)
    inputs = batch(FAMILIES[family], processor, labels=False)
    encoding = encode(ModelInterface(model), inputs)[0]
    positions = pruner("divprune")(encoding.tokens())
    dropped = torch.ones(sum(encoding.lengths), dtype=torch.bool)
    for start, row, keep in zip(
        torch.tensor([0, *encoding.lengths]).cumsum(0), positions.positions, positions.lengths, strict=False
    ):
        dropped[start + row[:keep]] = False
    mask = inputs["attention_mask"].clone()
    mask[inputs["input_ids"] == processor.image_token_id] = (~dropped).long()
    full_positions = torch.arange(mask.shape[1]).expand_as(mask)
    if family == "qwen2_5_vl":
        full_positions, _ = model.model.get_rope_index(
            inputs["input_ids"],
            inputs["mm_token_type_ids"],
            inputs["image_grid_thw"],
            attention_mask=inputs["attention_mask"],
        )
    with torch.no_grad():
        masked = model(**{**inputs, "attention_mask": mask, "position_ids": full_positions}).logits
        bare, options = pruner("divprune", dropped_tokens="discard"), {"proportional_attention": False}
        short = prune_inputs(model, inputs, bare, position_ids="original", **options)
        out = model(**short).logits
    torch.testing.assert_close(real(out, short["attention_mask"]), real(masked, mask), rtol=1e-4, atol=1e-5)
    compact = prune_inputs(model, inputs, pruner("divprune"), position_ids="compact")["position_ids"]
    rows = compact.view(-1, *short["input_ids"].shape)
    for axis in rows:
        for ids, kept in zip(axis, short["attention_mask"].bool(), strict=True):
            assert ids[kept].tolist() == list(range(int(kept.sum())))


@pytest.mark.parametrize(
    ("family", "settings", "proportional", "scheme"),
    [
        ("llava", {}, True, "original"),
        ("llava", {}, False, "compact"),
        ("llava", {"dropped_tokens": "discard"}, True, "compact"),
        ("qwen2_5_vl", {"dropped_tokens": "discard"}, False, "original"),
    ],
)
def test_positions_left_alone_are_those_that_fit_view_and_model(family, settings, proportional, scheme):
    """Merged tokens stand where they stood, and renumbering would take rows and columns away from M-RoPE."""
    model, processor = FAMILIES[family].build("right")
    inputs, given = batch(FAMILIES[family], processor, labels=False), {"proportional_attention": proportional}
    own = build("divprune", pruning_ratio=0.6, **settings)
    chosen = prune_inputs(model, inputs, own, **given)["position_ids"]
    assert torch.equal(chosen, prune_inputs(model, inputs, own, position_ids=scheme, **given)["position_ids"])
    others = {"original": "compact", "compact": "original"}
    other = prune_inputs(model, inputs, own, position_ids=others[scheme], **given)["position_ids"]
    assert not torch.equal(chosen, other)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", [n for n in SHORTENING if n != "random"])
def test_pruning_a_sample_alone_or_in_a_batch_is_the_same(family, name):
    model, processor = FAMILIES[family].build()
    together = prune_inputs(model, batch(FAMILIES[family], processor), pruner(name))
    alone = prune_inputs(model, batch(FAMILIES[family], processor, [MIXED[2]]), pruner(name))
    mask = together["attention_mask"][2].bool()
    assert torch.equal(together["input_ids"][2][mask], alone["input_ids"][0])
    assert torch.equal(together["position_ids"][..., 2, :][..., mask], alone["position_ids"][..., 0, :])
    with torch.no_grad():
        logits = model(**together).logits[2][mask]
        torch.testing.assert_close(logits, model(**alone).logits[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_captured_attention_equals_the_towers_own(family, attention):
    model, processor = FAMILIES[family].build()
    inputs = batch(FAMILIES[family], processor, labels=False)
    model.set_attn_implementation(attention)
    encoding = encode(ModelInterface(model), inputs, frozenset({"attention"}))[0]
    model.set_attn_implementation("eager")
    if family == "qwen2_5_vl":
        layer = model.model.visual.blocks[1].attn
        outputs = []
        handle = layer.register_forward_pre_hook(lambda m, a, k: outputs.append((a, k)), with_kwargs=True)
        encode(ModelInterface(model), inputs)
        handle.remove()
        expected = [slow_qwen_attention(model, layer, outputs[0], i, inputs) for i in range(3)]
    else:
        tower, maps = model.model.vision_tower, []
        handle = tower.encoder.layers[-2].self_attn.register_forward_hook(lambda m, a, out: maps.append(out[1]))
        encode(ModelInterface(model), inputs)
        handle.remove()
        rows = maps[0].mean(1)[:, 0, 1:]
        expected = list(rows) if family == "llava" else [tile_attention(model, rows, inputs, i) for i in range(3)]
    for received, wanted in zip(encoding.attention, expected, strict=True):
        torch.testing.assert_close(received, wanted, rtol=1e-4, atol=1e-6)


def tile_attention(model, rows, inputs, image):
    """Attention of one packed any-resolution image, tile by tile; -inf on newlines, which no patch made."""
    from transformers.models.llava_next.modeling_llava_next import get_anyres_image_grid_shape, unpad_image

    size, pinpoints = model.config.vision_config.image_size, model.config.image_grid_pinpoints
    shapes = [get_anyres_image_grid_shape(s, pinpoints, size) for s in inputs["image_sizes"].tolist()]
    first = sum(h * w + 1 for h, w in shapes[:image])
    height, width = shapes[image]
    tiles = rows[first + 1 : first + 1 + height * width].view(height, width, 4, 4)
    whole = tiles.permute(0, 2, 1, 3).reshape(1, height * 4, width * 4)
    whole = unpad_image(whole, inputs["image_sizes"][image])[0]
    ended = torch.cat([whole, torch.full((whole.shape[0], 1), float("-inf"))], dim=1)
    return torch.cat([rows[first], ended.flatten()])


def slow_qwen_attention(model, layer, call, image, inputs):
    """Mean attention each merged token of one image receives, from the layer's inputs, patch by patch."""
    from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import apply_rotary_pos_emb_vision
    from transformers.vision_utils import get_vision_window_index

    (hidden, *_), keywords = call
    visual = model.model.visual
    qkv = layer.qkv(hidden).reshape(hidden.shape[0], 3, layer.num_heads, -1)
    q, k = apply_rotary_pos_emb_vision(qkv[:, 0], qkv[:, 1], *keywords["position_embeddings"])
    sizes = inputs["image_grid_thw"].prod(1).tolist()
    begin = sum(sizes[:image])
    q, k = q[begin : begin + sizes[image]], k[begin : begin + sizes[image]]
    maps = torch.einsum("qhd,khd->hqk", q, k).mul(layer.scaling).softmax(-1)
    merged = maps.mean((0, 1)).view(-1, 4).mean(1)
    index, _ = get_vision_window_index(
        inputs["image_grid_thw"], visual.spatial_merge_size, visual.window_size, visual.patch_size
    )
    index = index[begin // 4 : (begin + sizes[image]) // 4] - begin // 4
    return merged[torch.argsort(index)]


def test_any_resolution_layout_matches_the_packed_features():
    model, processor = FAMILIES["llava_next"].build()
    inputs = batch(FAMILIES["llava_next"], processor, labels=False)
    newline = torch.full_like(model.model.image_newline, 7.0)
    model.model.image_newline.data = newline
    encoding = encode(ModelInterface(model), inputs, frozenset({"grid"}))[0]
    for unit, grid in zip(encoding.units, encoding.grids, strict=True):
        assert len(unit) == len(grid)
        is_newline = (unit == 7.0).all(1)
        last = grid[:, 2] == grid[grid[:, 0] == 1][:, 2].max()
        assert torch.equal(is_newline, last & (grid[:, 0] == 1))
        assert grid.unique(dim=0).shape == grid.shape


@pytest.mark.parametrize(
    "size", [(16, 16), (24, 40), (40, 24), (30, 20), (20, 44), (64, 16), (33, 31), (200, 5), (16, 1), (1, 60)]
)
@pytest.mark.parametrize("name", ["cls_attention", "grid"])
def test_any_resolution_of_every_shape(size, name):
    model, processor = FAMILIES["llava_next"].build()
    inputs = batch(FAMILIES["llava_next"], processor, [("{image} hi", [size])])
    (count,) = encode(ModelInterface(model), inputs)[0].lengths
    short = prune_inputs(model, inputs, pruner(name, 0.5))
    assert (short["input_ids"] == processor.image_token_id).sum() == budget(count, 0.5)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("side", SIDES)
def test_generation(family, side):
    model, processor = FAMILIES[family].build(side)
    inputs = batch(FAMILIES[family], processor, labels=False)
    if side == "right":  # generation from a right-padded batch continues its padding: one row only
        inputs = batch(FAMILIES[family], processor, [MIXED[0]], labels=False)
    options = {"max_new_tokens": 6, "do_sample": False}
    plain = model.generate(**inputs, **options)[:, inputs["input_ids"].shape[1] :]
    short = prune_inputs(model, inputs, pruner(ratio=0.0))
    assert torch.equal(model.generate(**short, **options)[:, short["input_ids"].shape[1] :], plain)
    short = prune_inputs(model, inputs, pruner(ratio=0.75))
    generated = model.generate(**short, **options, min_new_tokens=6)
    assert generated.shape[1] == short["input_ids"].shape[1] + 6
    with (
        prune_visual_tokens(model, pruner()),
        pytest.raises(ValueError, match=r"model\.generate\(\*\*prune_inputs"),
    ):
        model.generate(**inputs, **options)


def test_generation_goes_on_behind_rows_that_were_of_one_length():
    """No row was padded, and pruning leaves them of different lengths."""
    model, processor = FAMILIES["llava"].build("left")
    alone = batch(FAMILIES["llava"], processor, [MIXED[0]], labels=False)
    ids = alone["input_ids"]
    words = torch.full_like(ids, ids[0, -1])
    both = {**alone, "input_ids": torch.cat([ids, words]), "attention_mask": torch.ones_like(torch.cat([ids, words]))}
    short = prune_inputs(model, both, pruner())
    assert short["attention_mask"][:, -1].all()
    assert not short["attention_mask"].all()
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    expected = model.generate(**prune_inputs(model, alone, pruner()), **options)
    assert torch.equal(model.generate(**short, **options)[0, -6:], expected[0, -6:])
    # A batch to train on is padded on the right, as before.
    assert prune_inputs(model, {**both, "labels": both["input_ids"]}, pruner())["attention_mask"][:, 0].all()


@pytest.mark.parametrize("family", FAMILIES)
def test_text_only_batch_comes_back_as_it_is(family):
    model, processor = FAMILIES[family].build()
    inputs = batch(FAMILIES[family], processor, [("only text", []), ("and more of it", [])])
    inputs.pop("pixel_values", None)
    short = prune_inputs(model, inputs, pruner(), ModeIsolator.for_model(model, 2))
    assert short.keys() == inputs.keys()
    assert all(torch.equal(short[key], inputs[key]) for key in inputs)


MEDIA = {
    "llava": ("pixel_values", "pixel_values_images", "image_patches"),
    "qwen2_5_vl": ("pixel_values", "pixel_values_images", "image_patches"),
    "glm4v": ("pixel_values", "pixel_values_images", "image_patches", "pixel_values_videos"),
}


@pytest.mark.parametrize("name", MEDIA)
def test_placeholders_without_pixels_are_refused(name):
    """The model would read the embedding of the placeholder itself, 16 or more times for an image."""
    family = CONFORMING[name]
    model = family.model()
    whole = mixed(family, model)
    inputs = {key: value for key, value in whole.items() if key != "pixel_values"} | {"pixel_values_other": None}
    count = int((inputs["input_ids"] == model.config.image_token_id).sum())
    message = f"{count} placeholders .* but nothing for them: it has none of {', '.join(f'`{k}`' for k in MEDIA[name])}"
    with pytest.raises(ValueError, match=message):
        prune_inputs(model, inputs, pruner())
    with prune_visual_tokens(model, pruner()), pytest.raises(ValueError, match=message):
        model(**inputs)
    with pytest.raises(ValueError, match="are encoded already"):
        prune_inputs(model, {**inputs, "mm_encoder_outputs": {"image": None}}, pruner())


def test_placeholders_of_videos_beside_images_need_videos():
    family = CONFORMING["qwen2_5_vl"]
    model = family.model()
    inputs = mixed(family, model)
    inputs["input_ids"][0, 2] = model.config.video_token_id
    with pytest.raises(ValueError, match=f"1 placeholders .*{model.config.video_token_id}.*`pixel_values_videos`"):
        prune_inputs(model, inputs, pruner())
    media = ModelInterface(model).media
    with pytest.raises(ValueError, match="1 placeholders .*`pixel_values_videos`"):
        MaskVisualLabels(lambda _: inputs, list(media), media=media)([])


def test_bad_batches_are_named():
    model, processor = FAMILIES["llava"].build()
    inputs = batch(FAMILIES["llava"], processor)
    with pytest.raises(ValueError, match="48 placeholders .* 32 visual features"):
        prune_inputs(model, {**inputs, "pixel_values": inputs["pixel_values"][:2]}, pruner())
    with pytest.raises(ValueError, match="`attention_mask` must be of shape"):
        prune_inputs(model, {**inputs, "attention_mask": torch.ones(3, 1, 4, 4)}, pruner())
    with pytest.raises(
        ValueError, match="pad samples in place of packing them"
    ):  # ends of packed ones, as Qwen's script
        prune_inputs(model, {**inputs, "attention_mask": torch.tensor([0, 20, 44])}, pruner())
    with pytest.raises(ValueError, match="`input_ids`"):
        prune_inputs(model, {"pixel_values": inputs["pixel_values"]}, pruner())
    with pytest.raises(ValueError, match="Did you mean 'original'"):
        prune_inputs(model, inputs, pruner(), position_ids="origin")
    qwen, processor = FAMILIES["qwen2_5_vl"].build()
    inputs = batch(FAMILIES["qwen2_5_vl"], processor)
    inputs.pop("mm_token_type_ids")
    with pytest.raises(ValueError, match="mm_token_type_ids"):
        prune_inputs(qwen, inputs, pruner())
    output = type("Output", (), {"pooler_output": None})()
    with pytest.raises(ValueError, match="not supported yet"):
        tokens_of(output, RULE, "SomeModel")
    with pytest.raises(ValueError, match="holds no image data"):
        prune_inputs(
            model, {**inputs, "input_ids": inputs["input_ids"], "pixel_values": torch.zeros(3, 3, 0, 0)}, pruner()
        )


def test_inputs_are_not_changed():
    model, processor = FAMILIES["llava"].build()
    inputs = batch(FAMILIES["llava"], processor)
    before = {key: value.clone() for key, value in inputs.items()}
    prune_inputs(model, inputs, pruner(), ModeIsolator.for_model(model, 2))
    assert inputs.keys() == before.keys()
    assert all(torch.equal(inputs[key], value) for key, value in before.items())


def test_peft_model_is_pruned_like_its_base():
    from peft import LoraConfig, get_peft_model

    model, processor = FAMILIES["llava"].build()
    inputs = batch(FAMILIES["llava"], processor)
    expected = model(**prune_inputs(model, inputs, pruner())).logits
    wrapped = get_peft_model(model, LoraConfig(target_modules=["q_proj"], r=2)).eval()
    torch.testing.assert_close(wrapped(**prune_inputs(wrapped, inputs, pruner())).logits, expected)
    with prune_visual_tokens(wrapped, pruner()):
        torch.testing.assert_close(wrapped(**inputs).logits, expected)


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen2_5_vl"])
def test_nothing_is_carried_back_to_frozen_blocks_of_a_tower_with_a_trained_part(name):
    """Qwen's projector lies inside the tower, whose embeddings activation checkpointing makes require gradients."""
    model = CONFORMING[name].model().train()
    inputs = mixed(CONFORMING[name], model)
    freeze_roles(model)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.enable_input_require_grads()
    carried, gradients, interface = [], [], ModelInterface(model)
    model.get_encoder(modality="image").blocks[0].register_forward_hook(
        lambda module, args, out: carried.append(out.requires_grad)
    )
    image = interface.encoders["image"]
    for context in (nullcontext(), frozen_tower(model, image.modality)):
        model.zero_grad()
        arguments, _ = encoder_arguments(image, inputs)
        with context:
            encoded = getattr(image.owner, image.method)(**arguments)
        torch.cat([rows.sum()[None] for rows in encoded.pooler_output]).sum().backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert carried == [True, False]
    assert gradients[0].keys() == gradients[1].keys() != set()
    assert all(torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[0])
