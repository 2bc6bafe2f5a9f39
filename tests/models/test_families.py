"""What single families need: training in both modes, host waits, bidirectional prefixes, and errors by name."""

from __future__ import annotations

import math
from functools import wraps

import pytest
import torch
from families import FAMILIES, MIXED, MIXED_VIDEO, batch
from families.cases import batch_of
from transformers.models.qwen2_vl.modeling_qwen2_vl import apply_rotary_pos_emb_vision
from transformers.vision_utils import get_vision_window_index

from hf_dualspeed import AutoPruner, DualSpeedTrainer, DualSpeedTrainingArguments, ModeIsolator, prune_inputs
from hf_dualspeed.bench.counters import count_syncs
from hf_dualspeed.models.attention import penultimate_layer
from hf_dualspeed.models.interface import ModelInterface
from hf_dualspeed.pruning.encoding import encode
from hf_dualspeed.pruning.inputs import shorten_inputs
from hf_dualspeed.trainer.dual_forward import DualForward
from hf_dualspeed.trainer.schedule import FAST, SLOW

TRAINED = [
    ("smolvlm", MIXED),
    ("gemma3", MIXED),
    ("internvl", MIXED),
    ("llama4", MIXED),
    ("qwen3_vl", MIXED),
    ("qwen3_vl", MIXED_VIDEO),
    ("glm4v", MIXED_VIDEO),
    ("llava_onevision", MIXED_VIDEO),
    ("molmo2", MIXED),
    ("chameleon", MIXED),
    ("blip_2", MIXED),
]

POSITION_INPUTS = ("input_ids", "inputs_embeds", "image_grid_thw", "attention_mask", "mm_token_type_ids")


def pruner(ratio=0.75, name="divprune", **settings):
    return AutoPruner.from_name(name, pruning_ratio=ratio, **settings)


def arguments(folder, **options) -> DualSpeedTrainingArguments:
    quiet = {"report_to": "none", "disable_tqdm": True, "use_cpu": True, "logging_steps": 1, "save_strategy": "no"}
    return DualSpeedTrainingArguments(str(folder), **{**quiet, "max_steps": 8, "learning_rate": 1e-2, **options})


@pytest.mark.parametrize(("name", "rows"), TRAINED, ids=lambda value: value if isinstance(value, str) else "")
def test_training_in_both_modes(tmp_path, name, rows):
    family = FAMILIES[name]
    model = family.model()
    trainer = DualSpeedTrainer(
        model,
        arguments(tmp_path, slow_mode_ratio=0.3, pruning_ratio=0.5, video_budget="frame", seed=1),
        train_dataset=[{"row": row} for row in range(3)],
        data_collator=lambda examples: batch(family, model, [rows[e["row"]] for e in examples]),
    )
    trainer.args.per_device_train_batch_size = 3
    before = trainer.dual_forward.isolator.prompt.detach().clone()
    trainer.train()
    assert {trainer.mode_at(step) for step in range(8)} == {FAST, SLOW}
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert all(map(math.isfinite, losses))
    assert losses[-1] < losses[0]
    assert not torch.equal(trainer.dual_forward.isolator.prompt, before)
    trainer.save_model()
    loaded, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    inputs = batch_of(family, model, "video" if rows is MIXED_VIDEO else "image", "left").inputs
    with torch.no_grad():
        torch.testing.assert_close(loaded.eval()(**inputs).logits, model.eval()(**inputs).logits)


@pytest.mark.parametrize("name", ["llava", "internvl", "qwen3_vl", "llama4", "mistral3"])
def test_shortening_waits_for_the_device_once(name, monkeypatch):
    family = FAMILIES[name]
    model = family.model()
    inputs = batch(family, model)
    encodings = encode(ModelInterface(model), inputs)
    isolator = ModeIsolator.for_model(model, 2)
    inner = getattr(model, "model", model)
    if hasattr(inner, "compute_3d_position_ids"):  # the model's own code numbers positions on the host
        numbered = inner.compute_3d_position_ids(**{key: inputs.get(key) for key in POSITION_INPUTS})
        monkeypatch.setattr(
            inner, "compute_3d_position_ids", wraps(inner.compute_3d_position_ids)(lambda **_: numbered)
        )
    with count_syncs() as waits:
        shorten_inputs(ModelInterface(model), inputs, encodings, pruner(name="random"), isolator, "original")
    assert waits == ["tolist"]
    assert "tolist" not in vars(torch.Tensor)


def test_deepstack_features_are_pruned_like_the_tokens():
    family = FAMILIES["qwen3_vl"]
    model = family.model()
    inputs = batch(family, model)
    encoding = encode(ModelInterface(model), inputs)[0]
    bare = pruner(0.5, dropped_tokens="discard")
    kept = bare(encoding.tokens())
    short = prune_inputs(model, inputs, bare, ModeIsolator.for_model(model, 2))["mm_encoder_outputs"]["image"]
    starts = torch.tensor([0, *encoding.lengths[:-1]]).cumsum(0)
    levels = encoding.output.deepstack_features
    assert len(levels) > 1
    for level, whole in zip(short.deepstack_features, levels, strict=True):
        rows, whole = torch.cat(level), torch.cat(whole)
        expected = []
        for start, places, count in zip(starts, kept.positions, kept.lengths, strict=True):
            expected += [torch.zeros(2, whole.shape[1]), whole[start + places[:count]]]  # the isolator adds nothing
        torch.testing.assert_close(rows, torch.cat(expected))


def test_the_isolator_enters_the_lowest_layer():
    """Granite 4 Vision lists its layers from above: [9, 6, 3, 0, 12, ...] in the published models, [1, 0, 2] here."""
    family, model = FAMILIES["granite4_vision"], FAMILIES["granite4_vision"].model()
    inputs = batch(family, model)
    encoding = encode(ModelInterface(model), inputs)[0]
    levels = dict(encoding.output.deepstack_features)
    assert list(levels) == [1, 0, 2]
    torch.testing.assert_close(encoding.features, torch.cat(levels[0]))
    isolator = ModeIsolator.for_model(model, 2)
    short = prune_inputs(model, inputs, pruner(0.5, dropped_tokens="discard"), isolator)["mm_encoder_outputs"]["image"]
    kept = pruner(0.5, dropped_tokens="discard")(encoding.tokens())
    assert [layer for layer, _ in short.deepstack_features] == [1, 0, 2]
    for layer, rows in short.deepstack_features:
        prompt = isolator.prompt if layer == 0 else torch.zeros_like(isolator.prompt)
        tokens = levels[layer][0][kept.positions[0, : kept.lengths[0]]]
        torch.testing.assert_close(rows[0].view(-1, rows[0].shape[-1]), torch.cat([prompt, tokens]))


@pytest.mark.parametrize("name", ["avg_pool", "divprune"])
def test_merging_pruners_merge_deepstack_features_too(name):
    family = FAMILIES["qwen3_vl"]
    model = family.model()
    inputs = batch(family, model)
    encoding = encode(ModelInterface(model), inputs, frozenset({"grid"}))[0]
    averaged = pruner(0.5, name)(encoding.tokens())
    level = encoding.companions["deepstack_features"][0]
    carried = averaged.apply_to(encoding.padded(level))
    twice = averaged.apply_to(encoding.padded(encoding.features))
    torch.testing.assert_close(twice, averaged.features)
    assert carried.shape == (*averaged.positions.shape, level.shape[1])
    # Means of cells: the mean over all kept tokens, weighted by the cells, is that of the image; here of equal cells.
    assert not torch.equal(carried[0], encoding.padded(level)[0][averaged.positions[0]])


def test_paligemma_prefix_stays_bidirectional():
    """As its processor writes it: type 0 is the prefix of image and question, type 1 the answer."""
    family = FAMILIES["paligemma"]
    model = family.model()
    inputs = batch(family, model)
    mask, ids = inputs["attention_mask"], inputs["input_ids"]
    place = torch.arange(ids.shape[1]).expand_as(ids)
    inputs["token_type_ids"] = ((place > mask.sum(1, keepdim=True) - 4) & mask.bool()).long()
    with torch.no_grad():
        plain = model(**inputs).logits
        causal = model(**{**inputs, "token_type_ids": torch.ones_like(ids)}).logits
        assert not torch.allclose(plain[mask.bool()], causal[mask.bool()], atol=1e-4)
        short = prune_inputs(model, inputs, pruner(0.0))
        torch.testing.assert_close(model(**short).logits[mask.bool()], plain[mask.bool()], rtol=1e-4, atol=1e-5)
        encoding = encode(ModelInterface(model), inputs)[0]
        kept = pruner()(encoding.tokens())
        keep = torch.zeros(sum(encoding.lengths), dtype=torch.long)
        keep[(kept.positions + torch.arange(3)[:, None] * encoding.lengths[0]).flatten()] = 1
        hidden = mask.clone()
        hidden[ids == encoding.token_id] = keep
        bare = pruner(dropped_tokens="discard")
        short = prune_inputs(model, inputs, bare, position_ids="original", proportional_attention=False)
        masked = model(**{**inputs, "attention_mask": hidden, "position_ids": place}).logits
        pruned = model(**short).logits[short["attention_mask"].bool()]
        torch.testing.assert_close(pruned, masked[hidden.bool()], rtol=1e-4, atol=1e-5)
        assert torch.equal(
            short["token_type_ids"][short["attention_mask"].bool()], inputs["token_type_ids"][hidden.bool()]
        )


def test_original_positions_of_mrope_are_each_tokens_own():
    family = FAMILIES["qwen2_5_vl"]
    model = family.model()
    inputs = batch(family, model, [[2, "video", 3]])
    whole, _ = model.model.get_rope_index(
        inputs["input_ids"],
        inputs["mm_token_type_ids"],
        video_grid_thw=inputs["video_grid_thw"],
        second_per_grid_ts=inputs.get("second_per_grid_ts"),
        attention_mask=inputs["attention_mask"],
    )
    encoding = encode(ModelInterface(model), inputs)[0]
    kept = pruner(0.5)(encoding.tokens()).positions[0]
    is_video = inputs["input_ids"][0] == encoding.token_id
    keep = ~is_video
    keep[is_video.nonzero()[kept, 0]] = True
    short = prune_inputs(model, inputs, pruner(0.5))
    assert torch.equal(short["position_ids"][:, 0], whole[:, 0, keep])
    compact = prune_inputs(model, inputs, pruner(0.5), position_ids="compact")["position_ids"]
    assert torch.equal(compact[:, 0], torch.arange(int(keep.sum())).expand(3, -1))
    assert getattr(model.model, "rope_deltas", None) is None  # left as it was


def test_a_budget_for_a_clip_or_for_each_frame():
    family = FAMILIES["llava_next_video"]
    model = family.model()
    inputs = batch(family, model, MIXED_VIDEO)
    frames = encode(ModelInterface(model), inputs, video_budget="frame")[0].lengths
    for budget, units in (("clip", [12, 12]), ("frame", [4] * 6)):
        assert encode(ModelInterface(model), inputs, video_budget=budget)[0].lengths == units
        short = prune_inputs(model, inputs, pruner(0.75), ModeIsolator.for_model(model, 2), video_budget=budget)
        expected = sum(n // 4 + 2 for n in units)
        assert (short["input_ids"] == model.config.video_token_id).sum() == expected
    assert len(frames) == 6
    with pytest.raises(ValueError, match="`video_budget` must be one of 'clip', 'frame', got 'second'"):
        prune_inputs(model, inputs, pruner(), video_budget="second")
    with pytest.raises(ValueError, match="Did you mean 'frame'"):
        DualSpeedTrainingArguments("out", video_budget="frames")


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen2_5_vl"])
def test_attention_of_videos_is_that_within_each_frame(name):
    family = FAMILIES[name]
    model = family.model()
    inputs = batch(family, model, MIXED_VIDEO)
    tower, calls = model.model.visual, []
    layer = penultimate_layer(tower)
    handle = layer.register_forward_pre_hook(lambda m, args, kwargs: calls.append((args, kwargs)), with_kwargs=True)
    encoding = encode(ModelInterface(model), inputs, frozenset({"attention"}))[0]
    handle.remove()
    ((hidden, *_), keywords) = calls[0]
    query, key, _ = layer.qkv(hidden).reshape(len(hidden), 3, layer.num_heads, -1).unbind(1)
    query, key = apply_rotary_pos_emb_vision(query, key, *keywords["position_embeddings"])
    merged, start = [], 0
    for frames, height, width in inputs["video_grid_thw"].tolist():
        for _ in range(frames):
            q, k = (t[start : start + height * width] for t in (query, key))
            maps = torch.einsum("qhd,khd->hqk", q, k).mul(layer.scaling).softmax(-1)
            merged.append(maps.mean((0, 1)).view(-1, tower.spatial_merge_size**2).mean(1))
            start += height * width
    expected = torch.cat(merged)
    if name == "qwen2_5_vl":  # whose tower runs in window order
        order, _ = get_vision_window_index(
            inputs["video_grid_thw"], tower.spatial_merge_size, tower.window_size, tower.patch_size
        )
        expected = expected[torch.argsort(order)]
    torch.testing.assert_close(torch.cat(encoding.attention), expected, rtol=1e-4, atol=1e-6)
    short = prune_inputs(model, inputs, pruner(0.5, "cls_attention"), video_budget="frame")
    assert torch.isfinite(model(**short).loss)


def test_images_and_videos_of_one_placeholder_are_refused():
    family = FAMILIES["glm4v"]
    model = family.model()
    inputs = batch(family, model, [["image", 3], ["video", 4]])
    with pytest.raises(ValueError, match="images and videos with one placeholder .* images or videos, not both"):
        prune_inputs(model, inputs, pruner())


def test_positions_that_a_family_cannot_take(tmp_path):
    family = FAMILIES["minimax_m3_vl"]
    model = family.model()
    with pytest.raises(
        ValueError, match="position_ids='original' does not work with MiniMaxM3.*Set position_ids='compact'"
    ):
        prune_inputs(model, batch(family, model), pruner(), position_ids="original")
    with pytest.raises(ValueError, match="Set position_ids='compact'"):
        DualSpeedTrainer(model, arguments(tmp_path, position_ids="original"), train_dataset=[{}])


@pytest.mark.parametrize("mode", [FAST, SLOW])
@pytest.mark.parametrize("rows", [[[4], [6]], [["image", 3], [5]], [["audio", 3], [5]], [["image", 3], ["audio", 5]]])
def test_every_trainable_parameter_is_in_the_graph_of_each_batch(mode, rows):
    """DDP waits for each of them, also for those of a tower that a batch has nothing for."""
    family = FAMILIES["qwen2_5_omni"]
    model = family.model()
    assert len(set(map(id, ModelInterface(model).towers().values()))) == 2
    full = batch(family, model, [["image", 3], ["audio", 5]])
    forward = DualForward(pruner(0.5), ModeIsolator.for_model(model, 2), "original")
    forward.attach(model)

    def in_graph(inputs):
        model.zero_grad()
        with forward.in_mode(mode, distil=True):
            out = model(**inputs)
            (out.logits.sum() + out.loss).backward()
        return {name for name, p in model.named_parameters() if p.grad is not None}

    assert in_graph(full) <= in_graph(batch(family, model, rows)) | {"dualspeed.isolator.prompt"}
    forward.detach()


def test_beams_keep_their_own_images():
    family = FAMILIES["llava"]
    model = family.model()
    rows = [[3, "image", 5, "image", 2], [2, "image", 9], [5]]
    together = batch(family, model, rows, "left", labels=False)
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "num_beams": 3}
    short = model.generate(**prune_inputs(model, together, pruner(0.75)), **options)[:, -5:]
    for seed, row in enumerate(rows):
        alone = batch(family, model, [row], labels=False, seeds=[seed])
        inputs = prune_inputs(model, alone, pruner(0.75))
        assert torch.equal(model.generate(**inputs, **options)[0, -5:], short[seed])


@pytest.mark.parametrize("name", [name for name, family in FAMILIES.items() if family.generates])
def test_answers_see_the_positions_that_training_saw(name):
    family, model = FAMILIES[name], FAMILIES[name].model()
    kind = next(kind for kind in ("image", "audio") if getattr(family, f"{kind}s"))
    inputs = batch(family, model, [[5, kind, 4]], labels=False)
    options = {"max_new_tokens": 1, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    with torch.no_grad():
        answer = model.generate(**prune_inputs(model, inputs, pruner(0.5)), **options)
        forward = model(**prune_inputs(model, inputs, pruner(0.5))).logits[:, -1]
    torch.testing.assert_close(answer.logits[0], forward, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("scheme", ["original", "compact"])
def test_a_later_turn_counts_on_from_the_pruned_prompt(scheme):
    """Its model adds to the count what the last prompt has lacked that it numbered itself, here one on all tokens."""
    family, model = FAMILIES["qwen2_5_vl"], FAMILIES["qwen2_5_vl"].model()
    inputs = batch(family, model, [[5, "image", 4]], labels=False)
    options = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False, "suppress_tokens": [60, 61]}
    model.generate(**inputs, **options)
    short = prune_inputs(model, inputs, pruner(0.5), position_ids=scheme)
    end = int(short["position_ids"].max())
    first = model.generate(**short, **options, return_dict_in_generate=True)
    ids = torch.cat([first.sequences, torch.tensor([[20, 21]])], dim=1)
    given = []
    model.model.language_model.rotary_emb.register_forward_pre_hook(lambda _, args: given.append(args[1]))
    model.generate(ids, past_key_values=first.past_key_values, **options)
    # The last answered token has not been read yet, and two more follow it.
    assert (given[0] == end + torch.tensor([3, 4, 5])).all()


def test_padding_of_a_prompt_takes_no_position():
    """Mistral Large 4 scales attention by the position, which `generate` counts without padding."""
    family, model = FAMILIES["mistral_large4"], FAMILIES["mistral_large4"].model()
    for name, parameter in model.named_parameters():
        if name.endswith("softmax_scaling.scale"):
            torch.nn.init.ones_(parameter)
    alone, together = (
        batch(family, model, rows, "left", labels=False) for rows in ([["image", 4]], [["image", 4], [90]])
    )
    options = {"max_new_tokens": 1, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    for ratio in (0.0, 0.5):
        first, second = (
            model.generate(**prune_inputs(model, inputs, pruner(ratio), position_ids="original"), **options).logits[0][
                0
            ]
            for inputs in (alone, together)
        )
        torch.testing.assert_close(first, second, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("distil", [False, True])
@pytest.mark.parametrize("mode", [FAST, SLOW])
def test_packed_samples_do_not_see_each_other_in_training(mode, distil):
    """Also where the Trainer turned the cache off in the outer config alone."""
    model = FAMILIES["llava"].model()
    model.config.use_cache = False
    assert model.config.get_text_config().use_cache
    forward = DualForward(pruner(0.5), None, "original")
    forward.attach(model)
    samples = [batch(FAMILIES["llava"], model, [[6, "image", 4]], seeds=[seed]) for seed in (0, 1)]
    packed = {key: torch.cat([s[key] for s in samples], dim=1) for key in ("input_ids", "labels")}
    length = samples[0]["input_ids"].shape[1]
    packed["position_ids"] = torch.arange(length).repeat(2)[None]
    packed["pixel_values"] = torch.cat([s["pixel_values"] for s in samples])
    logits = []
    for ids in (packed["input_ids"], packed["input_ids"].clone()):
        ids[0, 1] = 10 + len(logits)  # another word in the first sample
        with forward.in_mode(mode, distil=distil):
            out = model(**{**packed, "input_ids": ids})
        logits.append([made for made in (out.logits, out.teacher_logits) if made is not None])
    own = int((samples[1]["labels"] != -100).sum())
    for first, second in zip(*logits, strict=True):
        torch.testing.assert_close(first[-own:], second[-own:])
        assert not torch.allclose(first[:-own], second[:-own])


def test_running_layers_and_packing_are_refused():
    for name in ("lfm2_vl", "qwen3_5"):
        model = FAMILIES[name].model()
        inputs = batch(FAMILIES[name], model, [[3, "image", 4]])
        inputs["position_ids"] = torch.arange(inputs["input_ids"].shape[1])[None]
        if name == "qwen3_5":
            inputs["position_ids"] = inputs["position_ids"].expand(4, 1, -1)
        inputs.pop("attention_mask")
        with pytest.raises(ValueError, match="layers of kind .* do not go together"):
            prune_inputs(model, inputs, pruner())


def test_placeholders_and_features_are_compared_for_audio_too():
    model = FAMILIES["voxtral"].model()
    inputs = batch(FAMILIES["voxtral"], model, [[3, "audio", 5]], labels=False)
    for end in (2, 6):
        cut = {key: value[:, :end] if value.dim() == 2 else value for key, value in inputs.items()}
        with pytest.raises(ValueError, match=r"placeholders \(token id 62\) but the model made"):
            prune_inputs(model, cut, pruner())


def test_images_and_videos_of_video_llama_in_one_batch():
    model = FAMILIES["video_llama_3"].model()
    inputs = batch(FAMILIES["video_llama_3"], model, [[3, "image", 2, "video", 5], [6]])
    with torch.no_grad():
        mask = inputs["attention_mask"].bool()
        plain = model(**inputs).logits[mask]
        torch.testing.assert_close(model(**prune_inputs(model, inputs, pruner(0.0))).logits[mask], plain)


@pytest.mark.parametrize(("name", "kind"), [("got_ocr2", "image"), ("granite_speech", "audio"), ("qwen2_vl", "image")])
def test_half_precision_models_take_float32_inputs(name, kind):
    model = FAMILIES[name].model().bfloat16()
    inputs = batch(FAMILIES[name], model, [[3, kind, 5], [6]])
    with torch.no_grad():
        mask = inputs["attention_mask"].bool()
        plain = model(**inputs).logits[mask]
        torch.testing.assert_close(model(**prune_inputs(model, inputs, pruner(0.0))).logits[mask], plain)


def test_an_encoder_that_names_no_arguments():
    model = FAMILIES["llava"].model()
    inputs = batch(FAMILIES["llava"], model)
    expected = prune_inputs(model, inputs, pruner())["mm_encoder_outputs"]["image"].pooler_output
    named = model.model.get_image_features
    model.model.get_image_features = lambda *args, **kwargs: named(*args, **kwargs)
    short = prune_inputs(model, inputs, pruner())["mm_encoder_outputs"]["image"].pooler_output
    torch.testing.assert_close(torch.cat(short), torch.cat(expected))
