"""A batch in parts: the gradients of the whole, through one encoding, for every family."""

from __future__ import annotations

import pytest
import torch
from families import FAMILIES, batch
from families.cases import CASES, ROWS
from tiny_models import FAMILIES as TINY
from training import history, make

from hf_dualspeed import DualSpeedTrainingArguments
from hf_dualspeed.models.interface import ModelInterface
from hf_dualspeed.pruning.encoding import encode
from hf_dualspeed.pruning.inputs import whole_inputs
from hf_dualspeed.trainer.batch_splitting import BatchParts, can_be_split


def loss_of(model, inputs, encodings):
    """Sum of the cross-entropies."""
    inputs = whole_inputs(ModelInterface(model), inputs, encodings)
    labels = inputs.pop("labels")
    logits = model(**inputs, use_cache=False).logits
    shifted = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), shifted.flatten(), reduction="sum")


def gradients(model):
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return {name: grad for name, grad in found.items() if grad.abs().max() > 0}


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize(("name", "modality"), CASES)
def test_parts_add_up_to_the_whole(name, modality, side):
    family = FAMILIES[name]
    if not family.rows_alone:
        pytest.skip("a sample's result depends on its batch")
    if not family.prunes_audio and "audio" in modality:
        pytest.skip("raw audio is left to forward, which the trainer does not split")
    if name in ("blip_2", "instructblip"):
        pytest.skip("transformers itself takes no sample without an image")
    model, rows = family.model(), ROWS[modality]
    inputs = batch(family, model, rows, side)
    whole = loss_of(model, inputs, encode(ModelInterface(model), inputs))
    whole.backward()
    expected, total = gradients(model), 0.0
    encodings = encode(ModelInterface(model), inputs)
    parts = BatchParts(ModelInterface(model), inputs, encodings, len(rows))
    for index in range(parts.count):
        part, own = parts[index]
        assert len(part["input_ids"]) == 1
        loss = loss_of(model, part, own)
        total += loss.detach()
        (loss + sum(end.flatten()[:0].sum() for end in parts.ends)).backward()
    torch.testing.assert_close(total, whole.detach(), rtol=1e-4, atol=1e-5)
    actual = gradients(model)
    assert actual.keys() == expected.keys()
    for key, grad in expected.items():
        torch.testing.assert_close(actual[key], grad, rtol=2e-3, atol=1e-4 * float(grad.abs().max()) + 5e-6)


OPTIONS = {"mode_schedule": "periodic", "slow_mode_ratio": 0.5, "pruning_ratio": 0.5, "optim": "sgd"}


@pytest.mark.parametrize("splits", [2, 3, "auto"])
@pytest.mark.parametrize("distillation", [0.0, 1.0])
@pytest.mark.parametrize("family", TINY)
def test_slow_steps_in_parts_train_the_same_model(tmp_path, family, distillation, splits):
    options = {**OPTIONS, "distillation_weight": distillation, "per_device_train_batch_size": 4}
    whole, split = (make(tmp_path, family, slow_mode_splits=n, **options) for n in (1, splits))
    parts = counted(split)
    whole.train()
    split.train()
    keys = ("loss", "grad_norm", "slow_loss", "fast_loss", "distillation_loss")
    for ours, theirs in zip(history(split, *keys), history(whole, *keys), strict=True):
        assert [x is None for x in ours] == [x is None for x in theirs]
        pairs = [(a, b) for a, b in zip(ours, theirs, strict=True) if a is not None]
        torch.testing.assert_close(*torch.tensor(pairs).T, rtol=1e-4, atol=1e-6)
    expected = dict(whole.model.named_parameters())
    for name, parameter in split.model.named_parameters():
        torch.testing.assert_close(parameter, expected[name], rtol=1e-3, atol=1e-5)
    assert parts[0] == parts[2] == 1
    assert splits == "auto" or parts[1] == splits


def counted(trainer) -> dict[int, int]:
    """How often the model is called in each step."""
    calls: dict[int, int] = {}

    def count(*_):
        if trainer.model.training:
            step = trainer.state.global_step
            calls[step] = calls.get(step, 0) + 1

    trainer.model.register_forward_hook(count)
    return calls


def test_accumulated_parts_equal_one_batch(tmp_path):
    options = {**OPTIONS, "slow_mode_ratio": 1.0, "max_steps": 1}
    large = make(tmp_path, per_device_train_batch_size=8, **options)
    large.train()
    small = make(tmp_path, per_device_train_batch_size=4, gradient_accumulation_steps=2, slow_mode_splits=2, **options)
    small.train()
    expected = dict(large.model.named_parameters())
    for name, parameter in small.model.named_parameters():
        torch.testing.assert_close(parameter, expected[name], rtol=1e-3, atol=1e-5)


def test_parts_as_small_as_a_fast_step_need_no_recomputation(tmp_path):
    options = {**OPTIONS, "activation_checkpointing": True, "per_device_train_batch_size": 4, "pruning_ratio": 0.9}
    runs = {}
    for splits in (1, "auto"):
        trainer = make(tmp_path, slow_mode_splits=splits, distillation_weight=0.0, **options)
        tokens: dict[int, int] = {}
        trainer.model.model.language_model.layers[1].mlp.register_forward_pre_hook(
            lambda _, args, trainer=trainer, tokens=tokens: tokens.update(
                {trainer.state.global_step: tokens.get(trainer.state.global_step, 0) + args[0].shape[:2].numel()}
            )
        )
        trainer.train()
        runs[splits] = tokens
    assert runs[1][1] == 2 * runs["auto"][1]  # forward, and once more in backward


def test_packed_batches_stay_whole():
    model = FAMILIES["llava"].model()
    inputs = batch(FAMILIES["llava"], model, [["image", 4]])
    assert can_be_split(ModelInterface(model), inputs)
    packed = {**inputs, "position_ids": torch.arange(inputs["input_ids"].shape[1])[None]}
    packed.pop("attention_mask")
    assert not can_be_split(ModelInterface(model), packed)


@pytest.mark.parametrize("value", [0, -1, "many", 1.5, True])
def test_bad_counts_are_named(value):
    with pytest.raises(ValueError, match="`slow_mode_splits` must be a whole number of at least 1 or 'auto', got"):
        DualSpeedTrainingArguments("out", slow_mode_splits=value)
