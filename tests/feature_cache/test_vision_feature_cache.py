"""The cache of vision features: the same training with fewer calls of the tower, and what it refuses."""

from __future__ import annotations

import copy
import importlib
import os
import pickle
from functools import partial
from pathlib import Path

import pytest
import torch
from families import FAMILIES as TINY
from families import MIXED
from families import batch as mixed_batch
from feature_cases import files, numbered, opened, stored
from launching import DDP, assert_same_training, run
from safetensors.torch import load_file
from tiny_models import FAMILIES
from training import DATA, QUIET, SAMPLES, history, make
from transformers import TrainerCallback

from hf_dualspeed import AutoPruner, DualSpeedTrainingArguments
from hf_dualspeed.bench.counters import count_syncs
from hf_dualspeed.feature_cache import cache as feature_cache
from hf_dualspeed.feature_cache.cache import FeatureCache, feature_cache_of, fingerprint, obstacle
from hf_dualspeed.feature_cache.store import MARKER, FeatureStore, last_use
from hf_dualspeed.feature_cache.tower_outputs import assembled
from hf_dualspeed.feature_cache.units import UNITS, WithImageUnits, units_of
from hf_dualspeed.models.interface import ModelInterface
from hf_dualspeed.pruning.encoding import encode
from hf_dualspeed.trainer.speedup import SpeedupMeter

ONCE = [*DATA[:4], *DATA[5:]]  # without the one sample whose picture another has too


def cached(folder, family="llava", cache=None, model=None, **options):
    """A trainer with a frozen tower, for two epochs, and how many rows of pixels the tower was given in each step."""
    model = model or FAMILIES[family].build()[0]
    tower = model.get_encoder(modality="image").requires_grad_(False)
    options = {"max_steps": 8, "mode_schedule": "periodic", "slow_mode_ratio": 0.5, "optim": "sgd", **options}
    trainer = make(folder, family, model=model, vision_feature_cache=cache and str(cache), **options)
    calls: list[tuple[int, int]] = []
    inner = tower.forward

    def counted(*args, **kwargs):
        pixels = args[0] if args else kwargs["pixel_values"]
        calls.append((trainer.state.global_step, len(pixels)))
        return inner(*args, **kwargs)

    tower.forward = counted
    return trainer, calls


def assert_same(ours, expected):
    keys = ("loss", "grad_norm", "fast_loss", "slow_loss", "distillation_loss")
    numbers = [torch.tensor([[v or 0.0 for v in row] for row in history(t, *keys)]) for t in (ours, expected)]
    torch.testing.assert_close(*numbers, rtol=1e-4, atol=1e-6)
    theirs = dict(expected.model.named_parameters())
    for name, weight in ours.model.named_parameters():
        torch.testing.assert_close(weight, theirs[name], rtol=1e-4, atol=1e-6, msg=name)


# --- training -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "options"),
    [
        *((family, {}) for family in FAMILIES),
        ("llava", {"distillation_weight": 0.0}),
        ("qwen2_5_vl", {"slow_mode_splits": 2, "activation_checkpointing": True}),
        ("llava_next", {"pruner": "cdpruner", "gradient_accumulation_steps": 2, "max_steps": 4}),
    ],
)
def test_training_is_the_same_and_the_tower_rests(tmp_path, family, options):
    expected, plain = cached(tmp_path / "plain", family, **options)
    expected.train()
    trainer, calls = cached(tmp_path / "cached", family, tmp_path / "cache", **options)
    trainer.train()
    assert_same(trainer, expected)
    second = trainer.state.max_steps // 2  # the step that begins the second epoch
    assert {step for step, _ in plain} == {*range(trainer.state.max_steps)}
    assert not [step for step, _ in calls if step >= second]
    rates = [entry["vision_cache_hit_rate"] for entry in trainer.state.log_history if "loss" in entry]
    assert rates[second:] == [1.0] * second
    assert rates[0] == 0.0
    assert not any("vision_cache_hit_rate" in entry for entry in expected.state.log_history)


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_each_image_is_encoded_once(tmp_path, family):
    options = {"data": ONCE, "per_device_train_batch_size": 1, "max_steps": 14}
    trainer, calls = cached(tmp_path, family, tmp_path / "cache", **options)
    trainer.feature_cache._alike = True  # by itself it encodes one image once more, to see that it comes out alike
    trainer.train()
    images = trainer.data_collator(ONCE)
    assert sum(count for _, count in calls) == len(images["pixel_values"])
    assert len(files(tmp_path / "cache")) == sum(len(SAMPLES[e["index"]][1]) for e in ONCE)


def test_a_second_run_hits_from_the_first_step(tmp_path):
    first, _ = cached(tmp_path / "first", cache=tmp_path / "cache", max_steps=4)
    first.train()
    before = {path: path.stat().st_mtime_ns for path in files(tmp_path / "cache")}
    second, calls = cached(tmp_path / "second", cache=tmp_path / "cache", max_steps=4)
    second.train()
    assert not calls
    assert {path: path.stat().st_mtime_ns for path in files(tmp_path / "cache")} == before
    assert_same(second, first)


def test_workers_read_the_cache(tmp_path):
    expected, _ = cached(tmp_path / "plain")
    expected.train()
    trainer, calls = cached(tmp_path / "cached", cache=tmp_path / "cache", dataloader_num_workers=2)
    trainer.train()
    assert {step for step, _ in calls} == {0, 1, 2, 3}
    assert_same(trainer, expected)


def test_a_changed_tower_has_other_features(tmp_path):
    first, _ = cached(tmp_path / "first", cache=tmp_path / "cache", max_steps=4)
    first.train()
    changed = FAMILIES["llava"].build()[0]
    with torch.no_grad():
        changed.get_encoder(modality="image").embeddings.class_embedding[0] += 1
    expected, _ = cached(tmp_path / "plain", model=copy.deepcopy(changed), max_steps=4)
    expected.train()
    second, calls = cached(tmp_path / "second", cache=tmp_path / "cache", model=changed, max_steps=4)
    second.train()
    assert {step for step, _ in calls} == {0, 1, 2, 3}
    assert_same(second, expected)
    assert len([folder for folder in (tmp_path / "cache").iterdir() if folder.is_dir()]) == 2


def test_resumed_training_is_the_same(tmp_path):
    whole, _ = cached(tmp_path / "whole", cache=tmp_path / "cache", save_strategy="steps", save_steps=3)
    whole.train()
    resumed, calls = cached(tmp_path / "resumed", cache=tmp_path / "cache")
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    assert not calls
    theirs = dict(whole.model.named_parameters())
    for name, weight in resumed.model.named_parameters():
        torch.testing.assert_close(weight, theirs[name], rtol=1e-5, atol=1e-6, msg=name)


def test_evaluation_and_checkpoints_know_nothing_of_it(tmp_path):
    expected, _ = cached(tmp_path / "plain", eval_strategy="steps", eval_steps=4)
    expected.train()
    trainer, calls = cached(tmp_path / "out", cache=tmp_path / "cache", eval_strategy="steps", eval_steps=4)
    trainer.train()
    losses = [[e["eval_loss"] for e in t.state.log_history if "eval_loss" in e] for t in (trainer, expected)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert [step for step, _ in calls if step >= 4]  # the evaluations'
    assert UNITS not in next(iter(trainer.get_eval_dataloader()))
    assert UNITS in next(iter(trainer.get_train_dataloader()))
    assert type(trainer.data_collator).__name__ == "MaskVisualLabels"
    trainer.save_model()
    saved = {p.name for p in (tmp_path / "out").iterdir()}
    expected.save_model()
    assert saved == {p.name for p in (tmp_path / "plain").iterdir()}
    assert "feature_cache" not in (tmp_path / "out" / "config.json").read_text()
    assert (
        load_file(tmp_path / "out" / "model.safetensors").keys()
        == load_file(tmp_path / "plain" / "model.safetensors").keys()
    )
    copy.deepcopy(trainer.model)


def test_batches_aside_for_the_speedup_hold_no_features(tmp_path, monkeypatch):
    aside = []
    monkeypatch.setattr(SpeedupMeter, "measure", lambda meter, *given: aside.extend(meter.batches))
    trainer, _ = cached(tmp_path, cache=tmp_path / "cache", speedup_rounds=1)
    trainer.train()
    assert [UNITS in inputs for inputs in aside] == [False, False]


@pytest.mark.distributed
def test_two_processes_share_a_folder(tmp_path):
    plain, cached = tmp_path / "plain", tmp_path / "cached"
    options = ("--family", "llava", "--max-steps", "8")
    (alone,) = run(plain, "--batch", "2", *options)
    ranks = run(cached, "--batch", "1", *options, "--cache", str(tmp_path / "cache"), config=DDP)
    assert_same_training(plain, cached, alone, ranks)
    assert [rank["hit_rates"][-1] for rank in ranks] == [1.0, 1.0]
    assert len(files(tmp_path / "cache")) == sum(len(SAMPLES[e["index"]][1]) for e in ONCE)


# --- what is served is what the tower made ------------------------------------------------------------------------

SERVED = (
    "llava",
    "llava_next",
    "llava_onevision",
    "vipllava",
    "smolvlm",
    "internvl",
    "gemma3",
    "paligemma",
    "lfm2_vl",
    "fast_vlm",
    "llama4",
    "qwen2_5_vl",
    "qwen3_vl",
    "glm4v",
    "ernie4_5_vl_moe",
    "molmo2",
    "blip_2",
    "granite4_vision",
    "inkling2",
)
REFUSED = {
    "mistral3": "PixtralVisionModel returns `hidden_states",
    "gemma4": "returns `last_hidden_state` of shape",
    "paddleocr_vl": r"is given tensors of \[1, 3\] rows",
    "minicpmv4_7": r"is given tensors of \[1, 9\] rows",
    "deepseek_ocr2": "is called more than once for a batch",
    "nemotron_h_omni": "single images cannot be told apart",
    "emu3": "has no vision tower of its own",
}


def frozen(name: str):
    return TINY[name].model().requires_grad_(False)


def cache_for(folder, model, pruner="divprune", gib=1.0) -> FeatureCache:
    cache = FeatureCache(str(folder), gib, AutoPruner.from_name(pruner))
    cache.begin(model)
    return cache


def served(cache: FeatureCache, model, inputs: dict):
    """The encoding of a batch through the cache, and the share of its units that it had."""
    encoding = encode(ModelInterface(model), inputs, served=partial(cache.serving, units_of(inputs, cache.store)))[0]
    cache.flush()
    return encoding, cache.window()["vision_cache_hit_rate"]


def assert_encodings(ours, expected, **tolerance):
    torch.testing.assert_close(ours.features, expected.features, **tolerance)
    assert ours.lengths == expected.lengths
    for name, levels in expected.companions.items():
        for own, level in zip(ours.companions[name], levels, strict=True):
            torch.testing.assert_close(own, level, **tolerance)


@pytest.mark.parametrize("name", SERVED)
def test_hits_misses_and_mixtures_are_what_the_model_encodes(tmp_path, name):
    model = frozen(name)
    one = mixed_batch(TINY[name], model, MIXED)
    two = mixed_batch(TINY[name], model, [MIXED[2], MIXED[0], [4, "image"]], seeds=[2, 0, 7])
    cache = cache_for(tmp_path, model)
    exact = {"rtol": 0, "atol": 0}
    plain = [encode(ModelInterface(model), inputs)[0] for inputs in (one, two)]
    first, rate = served(cache, model, one)
    assert rate == 0.0
    assert_encodings(first, plain[0], **exact)
    again, rate = served(cache, model, one)
    assert rate == 1.0
    assert_encodings(again, plain[0], **exact)
    mixture, rate = served(cache, model, two)
    assert 0 < rate < 1
    assert_encodings(mixture, plain[1], rtol=1e-4, atol=1e-5)
    doubled = mixed_batch(TINY[name], model, [MIXED[2]] * 3, seeds=[2, 2, 2])
    expected = encode(ModelInterface(model), doubled)[0]
    assert_encodings(served(cache, model, doubled)[0], expected, rtol=1e-4, atol=1e-5)
    # A new process, which has not seen the tower's output.
    other, rate = served(cache_for(tmp_path, model), model, one)
    assert rate == 1.0
    assert_encodings(other, plain[0], **exact)


@pytest.mark.parametrize(("name", "reason"), REFUSED.items())
def test_towers_of_other_forms_are_refused(tmp_path, name, reason):
    model = frozen(name)
    inputs = mixed_batch(TINY[name], model, MIXED)
    with pytest.raises(ValueError, match=f"`vision_feature_cache` is set, but .*{reason}.*vision_feature_cache=None"):
        served(cache_for(tmp_path, model), model, inputs)
    assert "forward" not in vars(model.get_encoder(modality="image"))


def test_a_tower_whose_images_see_each_other_is_refused(tmp_path):
    model = frozen("gemma3")
    tower = model.get_encoder(modality="image")
    tower.register_module("mixer", torch.nn.Identity())
    norm = tower.post_layernorm if hasattr(tower, "post_layernorm") else tower.vision_model.post_layernorm
    inner = norm.forward
    norm.forward = lambda states: inner(states) + inner(states).mean(0, keepdim=True)
    with pytest.raises(ValueError, match="does not encode an image alone as it does in a batch"):
        served(cache_for(tmp_path, model), model, mixed_batch(TINY["gemma3"], model, MIXED))


def test_half_precision_is_stored_as_it_is(tmp_path):
    model = frozen("llava").bfloat16()
    inputs = mixed_batch(TINY["llava"], model, MIXED)
    cache = cache_for(tmp_path, model)
    expected = encode(ModelInterface(model), inputs)[0]
    for rate in (0.0, 1.0):
        encoding, found = served(cache, model, inputs)
        assert found == rate
        assert_encodings(encoding, expected, rtol=0, atol=0)
    assert {tensor.dtype for path in files(tmp_path) for tensor in load_file(path).values()} == {torch.bfloat16}


def test_only_what_is_read_is_stored(tmp_path):
    model = frozen("llava")
    cache = cache_for(tmp_path, model)
    served(cache, model, mixed_batch(TINY["llava"], model, MIXED))
    layers = model.get_encoder(modality="image").config.num_hidden_layers
    assert [list(load_file(path)) for path in files(tmp_path)] == [[f"hidden_states.{layers - 1}.{layers + 1}"]] * 3
    output = assembled({"hidden_states.2.4": torch.zeros(1)})
    assert output.hidden_states[-2] is output.hidden_states[2]
    with pytest.raises(ValueError, match="holds no hidden state 3 of the tower.*vision_feature_cache=None"):
        output.hidden_states[-1]
    with pytest.raises(AttributeError, match="last_hidden_state"):
        _ = output.last_hidden_state


@pytest.mark.parametrize("name", ["llava", "llava_next", "smolvlm", "qwen2_5_vl"])
def test_the_step_waits_for_the_device_no_more_than_without(tmp_path, name):
    model = frozen(name)
    one = mixed_batch(TINY[name], model, MIXED)
    two = mixed_batch(TINY[name], model, [MIXED[2], MIXED[0], [4, "image"]], seeds=[2, 0, 7])
    cache, counts = cache_for(tmp_path, model), []
    served(cache, model, one)
    for inputs, rate in ((one, 1.0), (two, None)):
        units = units_of(inputs, cache.store)
        for serve in (None, partial(cache.serving, units)):
            with count_syncs() as waits:
                encode(ModelInterface(model), inputs, served=serve)
            counts.append(len(waits))
        assert rate is None or cache.window()["vision_cache_hit_rate"] == rate
    assert counts[1] <= counts[0]  # of hits
    assert counts[3] <= counts[2]  # of hits and misses


def test_gradients_reach_the_projector(tmp_path):
    model = TINY["llava"].model()
    model.get_encoder(modality="image").requires_grad_(False)
    inputs = mixed_batch(TINY["llava"], model, MIXED)
    cache, found = cache_for(tmp_path, model), []
    weight = model.model.multi_modal_projector.linear_1.weight
    encode(ModelInterface(model), inputs)[0].features.sum().backward()
    for _ in range(2):
        found.append(weight.grad.clone())
        model.zero_grad()
        served(cache, model, inputs)[0].features.sum().backward()
    torch.testing.assert_close(weight.grad, found[0])
    torch.testing.assert_close(found[1], found[0])


def test_a_black_tile_in_the_middle_is_encoded_as_always(tmp_path):
    model, _ = FAMILIES["llava_next"].build()
    model.requires_grad_(False)
    inputs = make(tmp_path / "out", "llava_next").data_collator(DATA[:2])
    cache = cache_for(tmp_path / "cache", model)
    served(cache, model, inputs)
    black = {**inputs, "pixel_values": inputs["pixel_values"].clone()}
    black["pixel_values"][0, 1] = 0.0
    expected = encode(ModelInterface(model), black)[0]
    encoding = encode(ModelInterface(model), black, served=partial(cache.serving, units_of(black, cache.store)))[0]
    torch.testing.assert_close(encoding.features, expected.features)
    assert cache.window() == {"vision_cache_hit_rate": 0.0}


# --- keys ---------------------------------------------------------------------------------------------------------


def keys_of(batch: dict, folder) -> list[str]:
    return units_of(batch, FeatureStore(str(folder), "tower", 1)).keys


def test_keys_follow_pixels_and_what_the_tower_is_told(tmp_path):
    pixels = torch.randn(2, 3, 4, 4)
    first = keys_of({"pixel_values": pixels}, tmp_path)
    assert len(set(first)) == 2
    assert keys_of({"pixel_values": pixels.flip(0)}, tmp_path) == first[::-1]
    other = pixels.clone()
    other[1, 0, 0, 0] += 1e-6
    assert keys_of({"pixel_values": other}, tmp_path)[0] == first[0]
    assert keys_of({"pixel_values": other}, tmp_path)[1] != first[1]
    assert not set(first) & set(keys_of({"pixel_values": pixels.mul(0.5)}, tmp_path))  # another processor's
    masked = {"pixel_values": pixels, "pixel_attention_mask": torch.ones(2, 4, 4).bool()}
    whole = keys_of(masked, tmp_path)
    masked["pixel_attention_mask"][1, 0, 0] = False
    assert [a == b for a, b in zip(whole, keys_of(masked, tmp_path), strict=True)] == [True, False]
    patches = {"pixel_values": torch.ones(8, 6), "image_grid_thw": torch.tensor([[1, 2, 2], [1, 1, 4]])}
    assert len(set(keys_of(patches, tmp_path))) == 2  # the same patches in another shape
    row = {"pixel_values": torch.ones(1, 3, 2, 16)}  # patches of one image in a row
    wide, high = (keys_of({**row, "target_sizes": torch.tensor([sizes])}, tmp_path) for sizes in ((2, 4), (4, 2)))
    assert wide != high
    assert units_of({"input_ids": torch.ones(1, 1)}, None) is None
    with pytest.raises(ValueError, match=r"`pixel_values` \(\(8, 6\)\) is neither.*Set vision_feature_cache=None"):
        keys_of({"pixel_values": torch.ones(8, 6)}, tmp_path)


@pytest.mark.parametrize(
    "images",
    [
        {"pixel_values": torch.ones(2, 3, 4, 4)},
        {"pixel_values": torch.ones(8, 6), "image_grid_thw": torch.tensor([[1, 2, 2], [1, 1, 4]])},
    ],
    ids=["rows", "patches"],
)
def test_keys_of_images_do_not_follow_as_many_videos_beside_them(tmp_path, images):
    alone = keys_of(images, tmp_path)
    videos = {"pixel_values_videos": torch.randn(2, 8, 3, 4, 4), "image_sizes_videos": torch.tensor([[4, 4], [4, 8]])}
    assert keys_of({**images, **videos}, tmp_path) == alone


def test_fingerprints_follow_all_that_the_output_depends_on():
    model = frozen("llava")
    prints = {fingerprint(model, "no"), fingerprint(model, "bf16"), fingerprint(frozen("llava").bfloat16(), "no")}
    assert fingerprint(frozen("llava"), "no") in prints
    assert len(prints) == 3
    other = frozen("llava")
    other.config.vision_feature_layer = -1
    prints.add(fingerprint(other, "no"))
    other = frozen("llava")
    other.get_encoder(modality="image").config._attn_implementation = "eager"
    prints.add(fingerprint(other, "no"))
    other = frozen("llava")
    list(other.get_encoder(modality="image").parameters())[-1].view(-1)[-1] += 1e-3
    prints.add(fingerprint(other, "no"))
    assert len(prints) == 6
    other = frozen("llava")  # what comes behind the tower changes nothing
    other.model.multi_modal_projector.linear_1.weight += 1
    assert fingerprint(other, "no") == fingerprint(model, "no")


def test_fingerprints_follow_code_that_a_model_brings_along(tmp_path, monkeypatch):
    """Of the same class and weights, as that of a repo whose code has changed."""
    monkeypatch.syspath_prepend(tmp_path)
    prints = set()
    for number, factor in enumerate((1, 2, 2)):
        name = f"tower_code_{number}"
        (tmp_path / f"{name}.py").write_text(
            "from torch import nn\n\n\nclass Norm(nn.Identity):\n"
            f"    def forward(self, states):\n        return {factor} * states\n"
        )
        model = frozen("llava")
        model.get_encoder(modality="image").norm = importlib.import_module(name).Norm()
        prints.add(fingerprint(model, "no"))
    assert len(prints) == 2  # wherever the same code lies
    assert fingerprint(frozen("llava"), "no") not in prints


# --- marks, room and failures while training -----------------------------------------------------------------------


class Ages(TrainerCallback):
    """From the end of the first epoch on, notes whether the tower was marked since the last look, and unmarks it."""

    def __init__(self, cache: FeatureCache):
        self.cache, self.marked = cache, []

    def look(self, args, state, control, **kwargs):
        if state.global_step >= 4:
            self.cache.flush()
            self.marked.append(last_use(self.cache.store.folder) > 1e9 + 1)
            os.utime(self.cache.store.folder / MARKER, (1e9, 1e9))

    on_epoch_begin = on_epoch_end = on_step_end = look


@pytest.mark.parametrize("hour_is_over", [False, True])
def test_a_training_that_only_reads_marks_its_tower(tmp_path, monkeypatch, hour_is_over):
    monkeypatch.setattr(feature_cache, "MARK_EVERY", -1.0 if hour_is_over else 3600.0)
    trainer, calls = cached(tmp_path / "out", cache=tmp_path / "cache")
    ages = Ages(trainer.feature_cache)
    trainer.add_callback(ages)
    trainer.train()
    assert not [step for step, _ in calls if step >= 4]
    # The fourth step, the end of its epoch, the begin of the second, its four steps, its end.
    assert ages.marked == [True, True, True, *[hour_is_over] * 4, True]


def test_a_training_beyond_the_bound_says_so_and_goes_on(tmp_path, caplog):
    expected, _ = cached(tmp_path / "plain")
    expected.train()
    bound = 5000 / 2**30
    trainer, calls = cached(tmp_path / "out", cache=tmp_path / "cache", vision_feature_cache_gib=bound)
    trainer.train()
    assert caplog.text.count("takes all of vision_feature_cache_gib") == 1
    sizes = [path.stat().st_size for path in files(tmp_path / "cache")]
    assert 0 < sum(sizes) <= 5000
    numbers = f"{sum(sizes) / 2**30:.3g} GiB, of {len(sizes)} images or tiles of this vision tower"
    each = f"{sum(sizes) / len(sizes) / 1e6:.3g} MB each on average"
    assert f"{str(tmp_path / 'cache')!r} holds {numbers}, {each}. Further" in caplog.text
    assert [step for step, _ in calls if step >= 4]
    assert sum(entry["vision_cache_hit_rate"] for entry in trainer.state.log_history[4:8]) > 0
    assert_same(trainer, expected)


def test_other_towers_that_leave_no_room_are_said_once_and_stay(tmp_path, caplog):
    other = opened(tmp_path, "other")
    other.write(numbered(1, 2, 3))
    taken, model = stored(tmp_path), frozen("llava")
    cache = cache_for(tmp_path, model, gib=(taken + 100) / 2**30)
    for seeds in ([0, 1, 2], [3, 4, 5]):
        inputs = mixed_batch(TINY["llava"], model, MIXED, seeds=seeds)
        expected = encode(ModelInterface(model), inputs)[0]
        for _ in range(2):
            encoding, rate = served(cache, model, inputs)
            assert rate == 0.0
            assert_encodings(encoding, expected, rtol=0, atol=0)
    assert stored(tmp_path) == taken
    assert len(files(other.folder)) == 3
    assert caplog.text.count("takes all of vision_feature_cache_gib") == 1
    assert f"{str(tmp_path)!r} holds {taken / 2**30:.3g} GiB, of 0 images or tiles of this vision tower" in caplog.text
    others = f"and {taken / 2**30:.3g} GiB of other towers, which stay for 24 hours after their last use"
    assert f"{others}. Further ones are encoded in each epoch. Raise vision_feature_cache_gib" in caplog.text
    assert "or set vision_feature_cache to another folder" in caplog.text


@pytest.mark.parametrize("call", ["write", "use"])
def test_a_disk_that_fails_is_reported_and_training_goes_on(tmp_path, caplog, monkeypatch, call):
    def broken(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(FeatureStore, call, broken)
    trainer, _ = cached(tmp_path / "out", cache=tmp_path / "cache")
    trainer.train()
    assert caplog.text.count("Vision features are no longer stored: [Errno 28] No space left") == 1
    assert trainer.state.global_step == 8


# --- refusals -----------------------------------------------------------------------------------------------------


def test_a_trained_tower_is_refused(tmp_path):
    with pytest.raises(ValueError, match="`vision_feature_cache` is set, but `.*` of the vision tower is trained"):
        make(tmp_path, vision_feature_cache=str(tmp_path / "cache"))
    trainer, _ = cached(tmp_path, cache=tmp_path / "cache")
    trainer.model.get_encoder(modality="image").requires_grad_(True)
    with pytest.raises(ValueError, match="of the vision tower is trained.*Set vision_feature_cache=None"):
        trainer.train()


def test_adapters_on_the_tower_are_refused_and_elsewhere_are_not(tmp_path):
    peft = pytest.importorskip("peft")
    for part in ("vision_tower", "language_model"):
        model = FAMILIES["llava"].build()[0]
        adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=rf".*{part}.*\.(q_proj|v_proj)"))
        reason = obstacle(adapted.get_base_model(), AutoPruner.from_name("divprune"))
        assert (reason is not None) == (part == "vision_tower")
    trainer = make(tmp_path, model=adapted, vision_feature_cache=str(tmp_path / "cache"), max_steps=8)
    trainer.train()
    assert trainer.state.log_history[-2]["vision_cache_hit_rate"] == 1.0


def test_frozen_adapters_on_the_tower_are_refused_until_they_are_merged(tmp_path):
    peft = pytest.importorskip("peft")
    model, pruner = FAMILIES["llava"].build()[0], AutoPruner.from_name("divprune")
    config = peft.LoraConfig(target_modules=r".*vision_tower.*\.(q_proj|v_proj)", init_lora_weights=False)
    adapted = peft.get_peft_model(model, config).requires_grad_(False)
    reason = "`.*_proj` of the vision tower is a PEFT adapter.*merge_and_unload.*Set vision_feature_cache=None"
    with pytest.raises(ValueError, match=reason):
        cache_for(tmp_path, adapted.get_base_model())
    adapted.merge_adapter()  # it can be taken out again
    assert "is a PEFT adapter" in obstacle(adapted.get_base_model(), pruner)
    assert obstacle(adapted.merge_and_unload(), pruner) is None


def test_what_changes_the_towers_output_is_refused():
    model, pruner = frozen("llava"), AutoPruner.from_name("divprune")
    tower = model.get_encoder(modality="image")
    assert obstacle(model, pruner) is None
    attention = next(m for m in tower.modules() if hasattr(m, "dropout"))
    attention.dropout = 0.1
    assert "drops at random" in obstacle(model, pruner)
    attention.dropout = 0.0
    tower.extra = torch.nn.Dropout(0.1)
    assert "drops at random" in obstacle(model, pruner)
    tower.extra = torch.nn.BatchNorm1d(3).requires_grad_(False)
    assert "normalizes over the batch" in obstacle(model, pruner)
    del tower.extra
    assert "reads attention of the tower" in obstacle(model, AutoPruner.from_name("cls_attention"))
    assert "attention and keys" in obstacle(model, AutoPruner.from_name("visionzip"))


def test_folders_and_bounds_that_cannot_be(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="`vision_feature_cache` must be a folder that can be written, got '.*file'"):
        cached(tmp_path / "out", cache=tmp_path / "file")
    with pytest.raises(ValueError, match=r"`vision_feature_cache_gib` must be in \(0, inf\), got 0"):
        DualSpeedTrainingArguments("out", vision_feature_cache_gib=0)
    for bound in (float("inf"), float("nan")):
        with pytest.raises(ValueError, match=f"`vision_feature_cache_gib` must be a finite number, got {bound}"):
            DualSpeedTrainingArguments("out", vision_feature_cache_gib=bound)
    for value in (True, False, 5, ["folder"]):
        with pytest.raises(ValueError, match="`vision_feature_cache` must be a text or None, got"):
            DualSpeedTrainingArguments("out", vision_feature_cache=value)


def test_folders_may_lie_in_the_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    for value in ("~/features", Path("~/features"), str(tmp_path / "features")):
        args = DualSpeedTrainingArguments(str(tmp_path / "out"), vision_feature_cache=value, **QUIET)
        assert args.vision_feature_cache == str(tmp_path / "features")


def test_sharded_training_is_refused(tmp_path):
    trainer, _ = cached(tmp_path)
    with pytest.raises(ValueError, match="a sharded tower has to run in all processes.*vision_feature_cache=None"):
        feature_cache_of(str(tmp_path), 1.0, trainer.model, trainer._pruner, "no", separable=False)


def test_batches_that_one_process_makes_for_all_are_refused(tmp_path):
    trainer, _ = cached(tmp_path)
    given = (str(tmp_path), 1.0, trainer.model, trainer._pruner, "no")
    with pytest.raises(ValueError, match="Set dispatch_batches=False.*vision_feature_cache=None"):
        feature_cache_of(*given, separable=True, dispatched=True)


def test_collators_are_wrapped_for_training_alone_and_pickled(tmp_path):
    model = frozen("llava")
    cache = cache_for(tmp_path, model)
    inputs = mixed_batch(TINY["llava"], model, MIXED)
    served(cache, model, inputs)
    again = pickle.loads(pickle.dumps(WithImageUnits(dict, cache)))
    units = again({"pixel_values": inputs["pixel_values"]})[UNITS]
    assert units.found == units.keys
    assert units.to("cpu").features.keys() == units.features.keys()
