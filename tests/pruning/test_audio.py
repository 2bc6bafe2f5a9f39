"""Audio language models: how clips are laid out, trained on, and what is refused."""

from __future__ import annotations

import pytest
import torch
from families import FAMILIES, MIXED_AUDIO, MIXED_BOTH, batch
from families.base import AUDIO
from transformers import (
    TrainerCallback,
    VoxtralForConditionalGeneration,
    VoxtralRealtimeConfig,
    VoxtralRealtimeForConditionalGeneration,
)

from hf_dualspeed import AutoPruner, DualSpeedTrainer, DualSpeedTrainingArguments, prune_inputs
from hf_dualspeed.models.interface import ModelInterface
from hf_dualspeed.pruning.encoding import encode
from hf_dualspeed.pruning.inputs import whole_inputs

FAMILY = FAMILIES["voxtral"]
# Clips in the beginning, the middle and nowhere; each example is a row of its own seed.
ROWS = [[3, "audio", 6], ["audio", 9], [8], [2, "audio", 3, "audio", 4]]
DATA = [{"index": i} for i in range(len(ROWS))]


class AudioCollator:
    """Mel features and texts written by hand; labels cover clips too, as a careless collator's would."""

    def __init__(self, model):
        self.model = model

    def __call__(self, examples):
        seeds = [e["index"] for e in examples]
        made = batch(FAMILY, self.model, [ROWS[seed] for seed in seeds], seeds=seeds)
        labels = made["input_ids"].masked_fill(made["attention_mask"] == 0, -100)
        return {**made, "labels": labels}


class Watch(TrainerCallback):
    """Notes in which steps the isolator moved."""

    def __init__(self):
        self.moved, self.before = [], None

    def prompt(self, model):
        return model.dualspeed.isolator.prompt.detach().clone()

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        self.before = self.prompt(model)

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.moved.append(not torch.equal(self.prompt(model), self.before))


def pruner(name="grid", ratio=0.75):
    return AutoPruner.from_name(name, pruning_ratio=ratio)


@pytest.mark.parametrize("name", ["voxtral", "audioflamingo3"])
def test_a_clip_is_one_row_of_its_tokens(name):
    family = FAMILIES[name]
    model = family.model()
    inputs = batch(family, model, MIXED_AUDIO)
    (encoding,) = encode(ModelInterface(model), inputs, frozenset({"grid"}))
    assert 16 in encoding.lengths  # which would make a square
    for grid, length in zip(encoding.grids, encoding.lengths, strict=True):
        assert grid.tolist() == [[0, 0, i] for i in range(length)]


def test_grid_keeps_evenly_spaced_moments():
    model = FAMILY.model()
    (encoding,) = encode(ModelInterface(model), batch(FAMILY, model, MIXED_AUDIO), frozenset({"grid"}))
    kept = pruner()(encoding.tokens())
    for row, count, length in zip(kept.positions, kept.lengths, encoding.lengths, strict=True):
        assert row[:count].diff().unique().tolist() == [4], f"{row.tolist()} of {length}"


def test_average_pooling_merges_neighbours_in_time():
    model = FAMILY.model()
    (encoding,) = encode(ModelInterface(model), batch(FAMILY, model, MIXED_AUDIO), frozenset({"grid"}))
    kept = pruner("avg_pool")(encoding.tokens())
    for unit, row, count in zip(encoding.units, kept.features, kept.lengths, strict=True):
        torch.testing.assert_close(row[:count], unit.unflatten(0, (count, 4)).mean(1))


def test_trains_on_clips_in_both_modes(tmp_path):
    model, watch = FAMILY.model(), Watch()
    trainer = DualSpeedTrainer(
        model=model,
        args=DualSpeedTrainingArguments(
            output_dir=str(tmp_path),
            max_steps=12,
            per_device_train_batch_size=4,
            learning_rate=5e-3,
            lr_scheduler_type="constant",
            logging_steps=1,
            save_strategy="no",
            remove_unused_columns=False,
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
            pruner="divprune",
            pruning_ratio=0.75,
            slow_mode_ratio=0.25,
            mode_schedule="periodic",
        ),
        train_dataset=DATA,
        data_collator=AudioCollator(model),
        callbacks=[watch],
    )
    collated = trainer.data_collator(DATA)
    assert (collated["input_ids"] == AUDIO).any()
    assert (collated["labels"][collated["input_ids"] == AUDIO] == -100).all()
    trainer.train()
    losses = {
        mode: [entry[f"{mode}_loss"] for entry in trainer.state.log_history if f"{mode}_loss" in entry]
        for mode in ("fast", "slow", "distillation")
    }
    assert [len(losses[mode]) for mode in ("fast", "slow", "distillation")] == [9, 3, 3]
    assert all(torch.isfinite(torch.tensor(values)).all() for values in losses.values())
    assert losses["fast"][-1] < 0.8 * losses["fast"][0]
    assert losses["slow"][-1] < losses["slow"][0]
    assert watch.moved == [trainer.mode_at(step) == "fast" for step in range(12)]
    trainer.save_model()
    loaded, loading = VoxtralForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(loading[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    inputs = batch(FAMILY, model, MIXED_AUDIO)
    torch.testing.assert_close(loaded(**inputs).logits, model.eval()(**inputs).logits)


def test_text_only_batch_passes_unchanged():
    model = FAMILY.model()
    inputs = batch(FAMILY, model, [[5], [3]])
    assert prune_inputs(model, inputs, pruner()).keys() == inputs.keys()
    assert "mm_encoder_outputs" not in whole_inputs(ModelInterface(model), inputs, [])


def test_audio_that_cannot_be_pruned_is_left_whole_beside_pruned_images():
    family = FAMILIES["gemma4"]
    model = family.model()
    inputs = batch(family, model, MIXED_BOTH)
    for change in (
        lambda: prune_inputs(model, inputs, pruner()),
        lambda: whole_inputs(ModelInterface(model), inputs, []),
    ):
        changed = change()
        assert torch.equal(changed["input_features"], inputs["input_features"])
        assert torch.equal(changed["input_features_mask"], inputs["input_features_mask"])
        assert (changed["input_ids"] == AUDIO).sum() == (inputs["input_ids"] == AUDIO).sum()
    sounds = batch(family, model, MIXED_AUDIO)
    assert prune_inputs(model, sounds, pruner()).keys() == sounds.keys()


def test_audio_without_placeholders_is_refused():
    """Voxtral Realtime adds its audio to every token, so nothing can be shortened."""
    config = VoxtralRealtimeConfig(audio_config={"num_hidden_layers": 1}, text_config={"num_hidden_layers": 1})
    with torch.device("meta"):
        model = VoxtralRealtimeForConditionalGeneration(config)
    with pytest.raises(ValueError, match="an audio language model that has"):
        ModelInterface(model).check_protocol()


def test_generation_that_takes_no_embeddings_says_so():
    """VibeVoice ASR is pruned and trained, but its `generate` takes ids alone."""
    family = FAMILIES["vibevoice_asr"]
    model = family.model()
    inputs = batch(family, model, MIXED_AUDIO, "left", labels=False)
    with pytest.raises(ValueError, match="inputs_embeds"):
        model.generate(**prune_inputs(model, inputs, pruner()), max_new_tokens=2)


def test_attention_that_matches_no_token_is_refused():
    model = FAMILY.model()
    with pytest.raises(ValueError, match="needs no attention"):
        prune_inputs(model, batch(FAMILY, model, MIXED_AUDIO), pruner("cls_attention"))
