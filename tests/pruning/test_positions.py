"""Positions on several axes are numbered in the collator, as the model would, and not in a step."""

from __future__ import annotations

import json
import pickle

import pytest
import supported_models
import torch
from families import FAMILIES
from families.cases import batch_of
from tiny_models import FAMILIES as TRAINED
from training import DATA, history, make

from hf_dualspeed.bench.counters import count_syncs
from hf_dualspeed.models.interface import ModelInterface
from hf_dualspeed.pruning.positions import POSITIONS, WithPositions, numbered, taken

TABLE = json.loads(supported_models.RESULT.read_text(encoding="utf-8"))["families"]
MROPE = [(f["model"], modality) for f in TABLE if f["positions"] == "M-RoPE" for modality in f["modalities"]]


@pytest.mark.parametrize(("name", "modality"), MROPE)
def test_the_collator_numbers_as_the_model_does(name, modality):
    model = FAMILIES[name].model()
    interface, inputs = ModelInterface(model), dict(batch_of(FAMILIES[name], model, modality, "left").inputs)
    owner = interface.positions_owner
    expected = numbered(owner, inputs, inputs["attention_mask"])
    collator = pickle.loads(pickle.dumps(WithPositions(same, interface)))  # as a worker gets it
    assert not list(collator.owner.parameters())
    batch = collator([inputs])
    rest, positions = taken(batch)
    assert batch[POSITIONS].shape[::2] == inputs["input_ids"].shape
    assert torch.equal(positions["position_ids"], expected)
    assert rest == inputs
    # The model's forward gives the same with them, without numbering.
    with torch.no_grad():
        plain = model(**inputs).logits
        owner.compute_3d_position_ids = never
        given = model(**inputs, **positions).logits
    assert torch.equal(given, plain)


def same(examples):
    return examples[0]


def never(*args, **kwargs):
    raise AssertionError("numbered in the step")


@pytest.mark.parametrize("position_ids", ["original", "compact"])
def test_a_training_is_the_same_and_no_step_numbers(position_ids, tmp_path, monkeypatch):
    runs = []
    options = {"slow_mode_ratio": 0.5, "mode_schedule": "periodic", "position_ids": position_ids, "slow_mode_splits": 2}
    for ahead in (False, True):
        trainer = make(tmp_path, "qwen2_5_vl", **options)
        if ahead:
            trainer.dual_forward.interface.positions_owner.compute_3d_position_ids = never
        else:
            monkeypatch.setattr(WithPositions, "__call__", lambda self, examples: self.collator(examples))
        trainer.train()
        runs.append(history(trainer, "loss", "grad_norm"))
        monkeypatch.undo()
    assert runs[0] == runs[1]


@pytest.mark.parametrize("mode", ["fast", "slow"])
def test_a_step_reads_nothing_off_the_device_for_positions(mode, tmp_path):
    reads = {}
    for plain in (False, True):
        trainer = make(tmp_path, "qwen2_5_vl")
        trainer.current_gradient_accumulation_steps = 1
        inputs, places = taken(next(iter(trainer.get_train_dataloader())))
        assert places["position_ids"].shape[1:] == inputs["input_ids"].shape
        inputs = inputs if plain else {**inputs, **places}
        with count_syncs() as waits:
            trainer.step_in_mode(mode, trainer.model, inputs)
        reads[plain] = len(waits)
    owner, mask = trainer.dual_forward.interface.positions_owner, inputs["attention_mask"]
    with count_syncs() as own:
        numbered(owner, inputs, mask)
    assert len(own) > 8
    assert reads[False] <= reads[True] - len(own)


def test_batches_that_bring_positions_or_are_packed_stay_as_they_are():
    model, _ = TRAINED["qwen2_5_vl"].build()
    collator = WithPositions(same, ModelInterface(model))
    ids = torch.arange(6)[None]
    for batch in ({"input_ids": ids, "attention_mask": ids, "position_ids": ids}, {"input_ids": ids}):
        assert collator([batch]) is batch


@pytest.mark.parametrize("more", [-1, 1], ids=["cut", "without_an_image"])
def test_placeholders_that_no_image_fits_are_an_error_with_a_remedy(more):
    """Of a truncated image, and of one too many, at which the model's own StopIteration would end the epoch."""
    model, _ = TRAINED["qwen2_5_vl"].build()
    interface = ModelInterface(model)
    image, text = interface.config.image_token_id, 9
    ids = torch.tensor([[text, image, image, image, image, text, image]])
    ids = ids[:, :4] if more < 0 else ids
    grid = torch.tensor([[1, 4, 4]])  # four tokens
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "image_grid_thw": grid}
    batch |= {"pixel_values": torch.zeros(16, 1), "mm_token_type_ids": (ids == image).int()}
    with pytest.raises(ValueError, match="cannot number the tokens of a batch .*Give the processor .*raise max_length"):
        WithPositions(same, interface)([batch])


def test_types_of_tokens_are_asked_for_where_there_are_images(tmp_path):
    """A collator may leave texts alone to the tokenizer, which makes none."""
    trainer = make(tmp_path, "qwen2_5_vl", data=[DATA[2]] * 4, slow_mode_ratio=0.5, slow_mode_splits=2)
    collate = trainer.data_collator.collator

    def untyped(examples):
        return {key: value for key, value in collate(examples).items() if key != "mm_token_type_ids"}

    trainer.data_collator.collator = untyped
    trainer.train()
    assert {trainer.mode_at(step) for step in range(4)} == {"fast", "slow"}
    trainer.train_dataset = DATA
    with pytest.raises(ValueError, match="lacks `mm_token_type_ids`.*processor.create_mm_token_type_ids"):
        next(iter(trainer.get_train_dataloader()))


def test_evaluation_and_the_plain_path_number_in_the_step(tmp_path):
    trainer = make(tmp_path, "qwen2_5_vl", plain_path=True)
    assert POSITIONS not in next(iter(trainer.get_train_dataloader()))
    trainer = make(tmp_path, "qwen2_5_vl")
    assert POSITIONS in next(iter(trainer.get_train_dataloader()))
    assert POSITIONS not in next(iter(trainer.get_eval_dataloader(trainer.train_dataset)))
