"""Activation checkpointing by mode: slow steps recompute, fast ones do not unless memory runs short."""

from __future__ import annotations

import weakref

import pytest
import torch
from training import history, make

LAYERS = 2  # of the tiny language model


def watched(folder, **options):
    """A trainer, and how often the language model's layers ran in each step."""
    options = {"activation_checkpointing": True, "mode_schedule": "periodic", "slow_mode_ratio": 0.5, **options}
    trainer = make(folder, optim="sgd", **options)
    runs: dict[int, int] = {}
    for layer in trainer.model.model.language_model.layers:
        # Of a submodule: hooks on the layer run once, outside of the checkpoint.
        layer.mlp.register_forward_pre_hook(
            lambda *_: runs.update({trainer.state.global_step: runs.get(trainer.state.global_step, 0) + 1})
        )
    return trainer, runs


def test_fast_steps_run_each_layer_once(tmp_path):
    trainer, runs = watched(tmp_path, distillation_weight=0.0)
    trainer.train()
    assert [trainer.mode_at(step) for step in range(4)] == ["fast", "slow"] * 2
    assert runs == {0: LAYERS, 1: 2 * LAYERS, 2: LAYERS, 3: 2 * LAYERS}
    assert trainer.model.model.language_model.layers[0].gradient_checkpointing  # back on for what comes next


def test_one_argument_turns_it_off(tmp_path):
    trainer, runs = watched(tmp_path, distillation_weight=0.0, fast_mode_checkpointing=True)
    trainer.train()
    assert set(runs.values()) == {2 * LAYERS}


@pytest.fixture
def short_memory(monkeypatch):
    """A language model that has room for the activations of one layer."""

    def tighten(trainer):
        layer = trainer.model.model.language_model.layers[1]
        forward = layer.mlp.forward

        def limited(*args):
            if not layer.gradient_checkpointing:
                raise torch.OutOfMemoryError("no room.")
            return forward(*args)

        monkeypatch.setattr(layer.mlp, "forward", limited)

    return tighten


def test_where_memory_runs_short_fast_steps_recompute(tmp_path, short_memory, caplog):
    expected, _ = watched(tmp_path)
    expected.train()
    trainer, runs = watched(tmp_path)
    short_memory(trainer)
    trainer.train()
    assert caplog.text.count("fast steps use it from now on") == 1
    assert runs[2] == 2 * LAYERS
    torch.testing.assert_close(
        torch.tensor(history(trainer, "loss", "grad_norm")), torch.tensor(history(expected, "loss", "grad_norm"))
    )


def test_an_engine_of_deepspeed_does_not_run_a_failed_pass_again(tmp_path, monkeypatch):
    trainer, _ = watched(tmp_path)

    def full(*_):
        trainer.is_deepspeed_enabled = True  # its engine may hold gradients of the failed attempt
        raise torch.OutOfMemoryError("no room.")

    monkeypatch.setattr(trainer.model.model.language_model.layers[1].mlp, "forward", full)
    with pytest.raises(torch.OutOfMemoryError, match="set fast_mode_checkpointing=True"):
        trainer.train()


def test_the_failed_pass_is_gone_before_the_next(tmp_path, monkeypatch):
    trainer, _ = watched(tmp_path)
    layer, held, alive = trainer.model.model.language_model.layers[1], [], []
    forward = layer.mlp.forward

    def limited(states):
        if layer.gradient_checkpointing:
            alive.append([reference() is not None for reference in held])
            return forward(states)
        kept = states * 2  # with a graph back to the first layer
        held.append(weakref.ref(kept))
        raise torch.OutOfMemoryError("no room.")

    monkeypatch.setattr(layer.mlp, "forward", limited)
    trainer.train()
    assert alive[0] == [False]


def test_what_a_failed_pass_has_counted_and_drawn_is_forgotten(tmp_path, monkeypatch):
    # It runs out of memory in backward, when its loss has been added up.
    expected, _ = watched(tmp_path, pruner="random")
    expected.train()
    trainer, _ = watched(tmp_path, pruner="random")
    backward, failures = trainer.accelerator.backward, [torch.OutOfMemoryError("no room.")]

    def limited(loss, **options):
        if failures:
            raise failures.pop()
        backward(loss, **options)

    monkeypatch.setattr(trainer.accelerator, "backward", limited)
    trainer.train()
    assert not failures
    keys = ("loss", "fast_loss", "slow_loss")
    ours, theirs = (torch.tensor([[v or 0.0 for v in row] for row in history(t, *keys)]) for t in (trainer, expected))
    torch.testing.assert_close(ours, theirs)
    assert trainer.clock.visual_tokens == expected.clock.visual_tokens


def test_parts_of_slow_steps_fall_back_too(tmp_path, short_memory, caplog):
    options = {"per_device_train_batch_size": 4, "pruning_ratio": 0.9, "slow_mode_splits": "auto"}
    expected, _ = watched(tmp_path, **options)
    expected.train()
    trainer, _ = watched(tmp_path, **options)
    layer = trainer.model.model.language_model.layers[1]
    forward, slow = layer.mlp.forward, []

    def limited(*args):
        if trainer.mode_at(trainer.state.global_step) == "slow" and not layer.gradient_checkpointing:
            slow.append(trainer.state.global_step)
            raise torch.OutOfMemoryError("no room.")
        return forward(*args)

    layer.mlp.forward = limited
    trainer.train()
    assert slow == [1]  # before that there was none without recomputation, after that neither
    assert caplog.text.count("fast steps use it from now on") == 1
    ours, theirs = (torch.tensor(history(t, "loss", "grad_norm")) for t in (trainer, expected))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_gradients_of_earlier_micro_batches_are_not_lost_silently(tmp_path, monkeypatch):
    trainer, _ = watched(tmp_path, gradient_accumulation_steps=2, per_device_train_batch_size=1)
    layer, calls = trainer.model.model.language_model.layers[1], []
    forward = layer.mlp.forward

    def second_time(*args):
        calls.append(1)
        if len(calls) == 2:
            raise torch.OutOfMemoryError("no room.")
        return forward(*args)

    monkeypatch.setattr(layer.mlp, "forward", second_time)
    with pytest.raises(torch.OutOfMemoryError, match="no room.*set fast_mode_checkpointing=True"):
        trainer.train()


@pytest.mark.parametrize("frozen", [True, False])
def test_nothing_is_carried_back_through_a_frozen_tower(tmp_path, frozen):
    trainer, _ = watched(tmp_path)
    tower = trainer.model.get_encoder(modality="image").requires_grad_(not frozen)
    carried = []
    tower.register_forward_hook(lambda module, args, out: carried.append(out[0].requires_grad))
    projector = trainer.model.model.multi_modal_projector.linear_1.weight
    before = projector.detach().clone()
    trainer.train()
    # In steps that encode through the fast view, which with distillation are all.
    assert set(carried) == {not frozen}
    assert not torch.equal(projector, before)
    assert torch.is_grad_enabled()
