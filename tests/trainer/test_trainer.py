"""The trainer against plain `Trainer`, hand-made invariants, and resumed runs."""

from __future__ import annotations

import copy
import logging
import math
import os
import pickle
import signal
import sys
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import FAMILIES, batch
from torch.utils.data import DataLoader
from training import DATA, QUIET, SAMPLES, Collator, Watch, history, make
from transformers import Trainer, TrainerCallback
from transformers.integrations import integration_utils

from hf_dualspeed import (
    AutoPruner,
    DualSpeedTrainer,
    DualSpeedTrainingArguments,
    ModeSchedule,
)
from hf_dualspeed.data.collators import MaskVisualLabels
from hf_dualspeed.trainer.setup import check_ddp


@pytest.mark.parametrize("family", FAMILIES)
def test_slow_only_without_distillation_is_plain_trainer(tmp_path, family):
    # SGD: Adam would blow the rounding noise of gradients that should be zero (key biases) up to full steps.
    plain = make(tmp_path, family, Trainer, optim="sgd")
    plain.train()
    ours = make(tmp_path, family, slow_mode_ratio=1.0, distillation_weight=0.0, optim="sgd")
    ours.train()
    torch.testing.assert_close(
        torch.tensor(history(ours, "loss", "grad_norm")), torch.tensor(history(plain, "loss", "grad_norm"))
    )
    expected = dict(plain.model.named_parameters())
    for name, parameter in ours.model.named_parameters():
        if not name.startswith("dualspeed."):
            torch.testing.assert_close(parameter, expected[name])


@pytest.mark.parametrize("optim", ["adamw_torch", "sgd"])
@pytest.mark.parametrize("ratio", [0.0, 1.0])
def test_what_a_batch_does_not_reach_does_not_move(tmp_path, optim, ratio):
    # One sample to a batch, every other of text alone: weight decay and momentum would move what has a gradient.
    watch = Watch([])
    options = {
        "optim": optim,
        "optim_args": "momentum=0.9" if optim == "sgd" else None,
        "train_sampling_strategy": "sequential",
    }
    options |= {"per_device_train_batch_size": 1, "max_steps": 6, "data": [{"index": 2}, DATA[0]]}
    ours = make(tmp_path, slow_mode_ratio=ratio, distillation_weight=0.0, callbacks=[watch], **options)
    watch.names = [name for name, _ in ours.model.named_parameters()]
    ours.train()
    beyond = ("vision_tower", "multi_modal_projector", "dualspeed")
    moved = [{name for name, moves in step.items() if moves and any(b in name for b in beyond)} for step in watch.moved]
    assert [bool(names) for names in moved] == [False, True] * 3
    assert any("dualspeed" in name for name in moved[1]) == (ratio == 0)
    if ratio == 1:
        plain = make(tmp_path, cls=Trainer, **options)
        plain.train()
        expected = dict(plain.model.named_parameters())
        for name, parameter in ours.model.named_parameters():
            if any(b in name for b in beyond[:2]):
                # Adam blows the rounding noise of key biases, whose gradients should be zero, up to full steps.
                atol = 1.0 if name.endswith("k_proj.bias") else 1e-4
                torch.testing.assert_close(parameter, expected[name], rtol=1e-3, atol=atol, msg=name)


def test_what_one_micro_batch_reaches_moves(tmp_path):
    options = {"slow_mode_ratio": 0.0, "train_sampling_strategy": "sequential", "max_steps": 1, "optim": "sgd"}
    options |= {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2}
    moved = []
    for data in ([DATA[0], DATA[2]], [DATA[2], DATA[0]]):
        trainer = make(tmp_path, data=data, **options)
        before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
        trainer.train()
        moved.append({name: p.detach() - before[name] for name, p in trainer.model.named_parameters()})
    for name, step in moved[0].items():
        torch.testing.assert_close(moved[1][name], step, rtol=1e-3, atol=1e-6, msg=name)
    assert moved[0]["dualspeed.isolator.prompt"].any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ddp_static_graph": True}, r"`ddp_static_graph` is True, but passes of DualSpeed differ"),
        (
            {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": True}},
            "`activation_checkpointing_kwargs` has use_reentrant=True",
        ),
        (
            {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"preserve_rng_state": False}},
            "`activation_checkpointing_kwargs` has no use_reentrant, which torch takes for True",
        ),
    ],
)
def test_options_that_ddp_cannot_follow_are_refused(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        check_ddp(DualSpeedTrainingArguments(str(tmp_path), use_cpu=True, **options), FAMILIES["llava"].build()[0])


def test_checkpointing_of_the_model_itself_that_ddp_cannot_follow_is_refused(tmp_path):
    """PEFT's prepare_model_for_kbit_training turns it on so; the arguments turn it on anew, and not reentrant."""
    model, arguments = FAMILIES["llava"].build()[0], DualSpeedTrainingArguments(str(tmp_path), use_cpu=True)
    for given in ({}, {"use_reentrant": True}):
        model.activation_checkpointing_enable(given)
        with pytest.raises(ValueError, match="reentrant, as PEFT's .* Set activation_checkpointing=True"):
            check_ddp(arguments, model)
    for kwargs in (None, {"every_n_layers": 2}, {"use_reentrant": False, "preserve_rng_state": False}):
        options = {"activation_checkpointing": True, "activation_checkpointing_kwargs": kwargs}
        check_ddp(DualSpeedTrainingArguments(str(tmp_path), use_cpu=True, **options), model)
    model.activation_checkpointing_enable({"use_reentrant": False})
    check_ddp(arguments, model)


def test_ddp_always_looks_for_parameters_that_a_pass_leaves_out(tmp_path, caplog):
    trainer = make(tmp_path, activation_checkpointing=True, ddp_find_unused_parameters=False)
    assert trainer.accelerator.ddp_handler.find_unused_parameters
    with caplog.at_level(logging.WARNING):
        check_ddp(trainer.args, trainer.model)
    assert "ddp_find_unused_parameters=False is taken as True" in caplog.text


def test_a_frozen_language_model_takes_a_batch_of_text_alone(tmp_path):
    model, _ = FAMILIES["llava"].build()
    model.requires_grad_(False)
    model.model.multi_modal_projector.requires_grad_(True)
    trainer = make(tmp_path, model=model, data=[DATA[2]], max_steps=1)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    trainer.train()
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("ratio", [0.0, 1.0])
def test_accumulation_equals_one_batch(tmp_path, family, ratio):
    options = {"slow_mode_ratio": ratio, "max_steps": 1, "pruning_ratio": 0.5, "optim": "sgd"}
    large = make(tmp_path, family, per_device_train_batch_size=8, **options)
    large.train()
    small = make(tmp_path, family, per_device_train_batch_size=1, gradient_accumulation_steps=8, **options)
    small.train()
    keys = ("loss", "grad_norm", "fast_loss", "slow_loss", "distillation_loss")
    large_log, small_log = ([v for v in history(t, *keys)[0] if v is not None] for t in (large, small))
    torch.testing.assert_close(torch.tensor(small_log), torch.tensor(large_log), rtol=1e-4, atol=1e-6)
    expected = dict(large.model.named_parameters())
    for name, parameter in small.model.named_parameters():
        torch.testing.assert_close(parameter, expected[name], rtol=1e-3, atol=1e-5)


def test_modes_follow_the_schedule_and_losses_are_logged_by_mode(tmp_path):
    trainer = make(tmp_path, slow_mode_ratio=0.5, max_steps=8, seed=3)
    trainer.train()
    schedule = ModeSchedule(0.5, seed=3, total_steps=8)
    modes = [schedule.mode_at(step) for step in range(8)]
    assert {"fast", "slow"} == set(modes)
    assert [trainer.mode_at(step) for step in range(8)] == modes
    for mode, (fast, slow, kl, fast_steps, slow_steps, rate) in zip(
        modes,
        history(
            trainer,
            "fast_loss",
            "slow_loss",
            "distillation_loss",
            "fast_steps",
            "slow_steps",
            "steps_per_second",
        ),
        strict=True,
    ):
        assert (fast is None, slow is None, kl is None) == (mode == "slow", mode == "fast", mode == "fast")
        assert (fast_steps, slow_steps) == (int(mode == "fast"), int(mode == "slow"))
        assert rate > 0
    summary = trainer.summary()
    assert summary["steps"] == {"fast": modes.count("fast"), "slow": modes.count("slow")}
    assert all(seconds > 0 for seconds in summary["seconds"].values())


def test_tensor_parallel_ranks_log_the_loss_of_their_batch_once(tmp_path, monkeypatch):
    trainer = make(tmp_path, slow_mode_ratio=0.5, mode_schedule="periodic", max_steps=2, distillation_weight=0.5)

    def of_two(own, reduction="mean", scale=1.0):  # which receive the same batch
        return 2 * own if reduction == "sum" else own

    monkeypatch.setattr(trainer, "get_tp_size", lambda: 2)
    monkeypatch.setattr(type(trainer.accelerator), "num_processes", 2)
    monkeypatch.setattr(trainer.accelerator, "reduce", of_two)
    trainer.train()
    (fast, fast_loss, *_), (slow, _, slow_loss, kl) = history(
        trainer, "loss", "fast_loss", "slow_loss", "distillation_loss"
    )
    assert fast_loss == pytest.approx(fast)
    assert slow_loss + 0.5 * kl == pytest.approx(slow)


def test_trackers_get_the_metrics_of_each_mode(tmp_path, monkeypatch):
    """By `report_to`, through transformers' own callback of TensorBoard, with a writer that remembers."""
    written = {}

    class Writer:
        def __init__(self, log_dir):
            pass

        def add_scalar(self, name, value, step):
            written[name, step] = value

        def add_text(self, *given):
            pass

        flush = close = add_text

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", SimpleNamespace(SummaryWriter=Writer))
    monkeypatch.setattr(integration_utils, "is_tensorboard_available", lambda: True)
    options = {"slow_mode_ratio": 0.5, "mode_schedule": "periodic", "report_to": "tensorboard"}
    trainer = make(tmp_path, **options)
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(logged) == 4
    for entry in logged:
        mode = "slow" if entry["slow_steps"] else "fast"
        names = (f"{mode}_loss", "fast_steps", "slow_steps", "steps_per_second")
        names += ("distillation_loss",) if mode == "slow" else ()
        assert {name: written[f"train/{name}", entry["step"]] for name in names} == {n: entry[n] for n in names}


@pytest.mark.parametrize(
    ("tracker", "remedy"),
    [
        ("tensorboard", r'pip install "hf-dualspeed\[tracking\]"'),
        ("trackio", r'pip install "hf-dualspeed\[tracking\]"'),
        ("wandb", "pip install wandb`"),
        ("comet_ml", "pip install comet-ml`"),
        ("azure_ml", "pip install azureml-sdk`"),
        ("flyte", "pip install flytekit`"),
    ],
)
def test_a_tracker_that_is_not_installed_is_refused_with_the_arguments(tmp_path, monkeypatch, tracker, remedy):
    probe = {"comet_ml": "comet", "azure_ml": "azureml", "flyte": "flytekit"}.get(tracker, tracker)
    monkeypatch.setattr(integration_utils, f"is_{probe}_available", lambda: False)
    for given in (tracker, [tracker]):
        with pytest.raises(ImportError, match=f"`report_to` has '{tracker}', which is not installed .*{remedy}"):
            DualSpeedTrainingArguments(str(tmp_path), report_to=given)
    monkeypatch.setattr(integration_utils, f"is_{probe}_available", lambda: True)
    assert DualSpeedTrainingArguments(str(tmp_path), report_to=tracker).report_to == [tracker]
    with pytest.raises(ValueError, match="`report_to` must be one of .* Did you mean 'tensorboard'"):
        DualSpeedTrainingArguments(str(tmp_path), report_to="tensorbord")
    assert DualSpeedTrainingArguments(str(tmp_path), report_to="none").report_to == []


def test_operations_are_those_of_the_tokens_that_were_run(tmp_path):
    options = {"pruning_ratio": 0.75, "isolator_length": 0, "max_steps": 1, "per_device_train_batch_size": 8}
    fast, slow = (make(tmp_path, slow_mode_ratio=ratio, **options) for ratio in (0.0, 1.0))
    for trainer in (fast, slow):
        trainer.train()
    whole = batch(FAMILIES["llava"], fast.processing_class, SAMPLES)["input_ids"].numel()
    assert fast.clock.fast_tokens < whole
    assert fast.state.total_flos == pytest.approx(slow.state.total_flos * fast.clock.fast_tokens / whole)
    assert slow.state.total_flos == 6 * whole * slow.model.num_parameters(exclude_embeddings=True)


def test_slow_tail_counts_the_steps_of_the_epochs(tmp_path):
    trainer = make(tmp_path, max_steps=-1, num_train_epochs=2, slow_mode_ratio=0.0, slow_tail_ratio=0.25)
    modes = [trainer.mode_at(step) for step in range(8)]
    assert modes == ["fast"] * 6 + ["slow"] * 2
    trainer.train()
    assert trainer.summary()["steps"] == {"fast": 6, "slow": 2}


def test_isolator_follows_from_the_seed(tmp_path):
    prompts = []
    for seed, ambient in ((0, 1), (0, 2), (5, 1)):
        model = FAMILIES["llava"].build(seed=3)[0]
        torch.manual_seed(ambient)
        trainer = make(tmp_path, model=model, seed=seed)
        prompts.append(trainer.dual_forward.isolator.prompt.detach())
    assert torch.equal(prompts[0], prompts[1])
    assert not torch.equal(prompts[0], prompts[2])


def test_slow_loss_is_cross_entropy_plus_weighted_distillation(tmp_path):
    trainer = make(tmp_path, slow_mode_ratio=1.0, max_steps=2, distillation_weight=0.3)
    trainer.train()
    for loss, entropy, divergence in history(trainer, "loss", "slow_loss", "distillation_loss"):
        assert divergence > 0
        assert loss == pytest.approx(entropy + 0.3 * divergence, rel=1e-4)


def test_parameters_of_the_other_mode_stay_the_same_to_the_bit(tmp_path):
    # Adam with momentum and weight decay would move a parameter whose gradient is merely zero.
    projector, head = "model.multi_modal_projector.linear_1.weight", "lm_head.weight"
    watch = Watch(["dualspeed.isolator.prompt", projector, head, "model.multi_modal_projector.linear_2.weight"])
    trainer = make(
        tmp_path,
        callbacks=[watch],
        slow_mode_ratio=0.5,
        max_steps=10,
        fast_only_parameters=["*linear_1*"],
        slow_only_parameters=["lm_head.*"],
    )
    trainer.train()
    modes = [trainer.mode_at(step) for step in range(10)]
    assert modes.count("fast") > 2
    assert modes.count("slow") > 2
    for mode, moved in zip(modes, watch.moved, strict=True):
        assert moved["dualspeed.isolator.prompt"] == (mode == "fast")
        assert moved[projector] == (mode == "fast")
        assert moved[head] == (mode == "slow")
        assert moved["model.multi_modal_projector.linear_2.weight"]


@pytest.mark.parametrize("pruner", ["divprune", "random"])
def test_resumed_run_equals_the_unbroken_one(tmp_path, pruner):
    options = {
        "slow_mode_ratio": 0.5,
        "max_steps": 6,
        "pruner": pruner,
        "pruning_ratio": 0.5,
        "save_strategy": "steps",
        "save_steps": 3,
        "seed": 1,
    }
    unbroken = make(tmp_path / "a", **options)
    unbroken.train()
    resumed = make(tmp_path / "a", **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-3"))
    keys = ("loss", "grad_norm", "fast_loss", "slow_loss", "fast_steps")
    assert history(resumed, *keys) == history(unbroken, *keys)
    for (name, ours), (_, theirs) in zip(
        resumed.model.named_parameters(), unbroken.model.named_parameters(), strict=True
    ):
        assert torch.equal(ours, theirs), name
    assert resumed.summary()["steps"] == unbroken.summary()["steps"]


def test_checkpoint_is_an_ordinary_one(tmp_path, caplog):
    from transformers import AutoModelForImageTextToText

    trainer = make(tmp_path, slow_mode_ratio=0.5)
    trainer.train()
    trainer.save_model()
    assert {"mode_isolator.safetensors", "pruner_config.json", "model.safetensors"} <= set(os.listdir(tmp_path))
    loaded, info = AutoModelForImageTextToText.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    trained = dict(trainer.model.named_parameters())
    assert all(torch.equal(p, trained[n]) for n, p in loaded.named_parameters())
    # Saving the model itself leaves the fast view out as well.
    trainer.model.save_pretrained(tmp_path / "direct")
    _, info = AutoModelForImageTextToText.from_pretrained(tmp_path / "direct", output_loading_info=True)
    assert not info["unexpected_keys"]
    # The next stage starts from the isolator that this one learned.
    stage = make(tmp_path / "next", model=loaded)
    assert torch.equal(stage.dual_forward.isolator.prompt, trainer.dual_forward.isolator.prompt)


def test_evaluation_uses_all_tokens_and_no_isolator(tmp_path):
    trainer = make(tmp_path)
    plain = make(tmp_path, cls=Trainer, model=copy.deepcopy(trainer.model))
    assert trainer.evaluate(DATA)["eval_loss"] == pytest.approx(plain.evaluate(DATA)["eval_loss"], rel=1e-6)


def test_frozen_language_model_trains_fast_only(tmp_path):
    model, _ = FAMILIES["llava"].build()
    model.requires_grad_(False)
    model.model.multi_modal_projector.requires_grad_(True)
    trainer = make(tmp_path, model=model)
    assert trainer.slow_mode_ratio == 0.0
    assert {trainer.mode_at(step) for step in range(200)} == {"fast"}
    trainer.train()
    assert make(tmp_path, model=model, slow_mode_ratio=0.2).slow_mode_ratio == 0.2
    assert make(tmp_path).slow_mode_ratio == 0.05


def test_images_are_encoded_once_in_a_slow_step(tmp_path):
    trainer = make(tmp_path, slow_mode_ratio=1.0, max_steps=3)
    calls = []
    trainer.model.model.vision_tower.register_forward_hook(lambda *a: calls.append(1))
    trainer.train()
    assert len(calls) == 3


def test_the_head_runs_at_supervised_positions_only(tmp_path):
    trainer = make(tmp_path, slow_mode_ratio=1.0, max_steps=1)
    seen = []
    trainer.model.lm_head.register_forward_pre_hook(lambda module, args: seen.append(tuple(args[0].shape)))
    trainer.train()
    (rows,) = {shape[0] for shape in seen}  # teacher and student alike
    assert [len(shape) for shape in seen] == [2, 2]
    assert 0 < rows < 2 * 20


@pytest.mark.parametrize(
    ("places", "apart"), [({"": "cpu"}, False), ({"model": "cpu", "lm_head": "disk"}, False), ({"a": 0, "b": 1}, True)]
)
def test_a_head_on_another_device_makes_all_logits(tmp_path, places, apart):
    """The mask of supervised positions lies with the inputs, and cannot choose from states on another device."""
    trainers = []
    for given in ({}, {"hf_device_map": places}):
        model, _ = FAMILIES["llava"].build()
        vars(model).update(given)
        trainers.append(make(tmp_path, model=model, slow_mode_ratio=0.5, max_steps=2, optim="sgd"))
        trainers[-1].train()
    assert [trainer.dual_forward.slices_logits for trainer in trainers] == [True, not apart]
    one, other = (history(trainer, "loss", "grad_norm") for trainer in trainers)
    assert other == [pytest.approx(entry, rel=1e-5) for entry in one]


def test_batch_without_supervised_token_gives_a_finite_zero(tmp_path):
    family = FAMILIES["llava"]
    _, processor = family.build()

    def unsupervised(examples):
        inputs = Collator(family, processor)(examples)
        return {**inputs, "labels": torch.full_like(inputs["labels"], -100)}

    for ratio in (0.0, 1.0):
        trainer = make(tmp_path, slow_mode_ratio=ratio, max_steps=1, weight_decay=0.0)
        trainer.data_collator.collator = unsupervised
        before = copy.deepcopy(trainer.model.state_dict())
        trainer.train()
        assert history(trainer, "loss", "grad_norm") == [[0.0, 0.0]]
        assert all(torch.equal(value, before[name]) for name, value in trainer.model.state_dict().items())


def test_label_smoothing_is_shifted_in_training_and_evaluation(tmp_path):
    # The plain Trainer forgets the shift: it knows the names of plain causal models only.
    trainer = make(tmp_path, slow_mode_ratio=1.0, distillation_weight=0.0, label_smoothing_factor=0.1, max_steps=1)
    trainer.args.per_device_eval_batch_size = trainer.args.per_device_train_batch_size = len(DATA)
    inputs = trainer.data_collator(DATA)
    with torch.no_grad():
        log_p = (
            trainer.model.eval()(**{k: v for k, v in inputs.items() if k != "labels"}).logits[:, :-1].log_softmax(-1)
        )
    targets = inputs["labels"][:, 1:]
    kept = targets != -100
    hits = log_p[kept].gather(1, targets[kept][:, None])
    expected = (-0.9 * hits - 0.1 * log_p[kept].mean(-1, keepdim=True)).mean().item()
    assert trainer.evaluate(DATA)["eval_loss"] == pytest.approx(expected, rel=1e-5)
    trainer = make(
        tmp_path,
        slow_mode_ratio=1.0,
        distillation_weight=0.0,
        label_smoothing_factor=0.1,
        max_steps=1,
        per_device_train_batch_size=len(DATA),
    )
    trainer.train()
    assert history(trainer, "loss")[0][0] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_activation_checkpointing_changes_nothing(tmp_path, family):
    logs = []
    for checkpointing in (False, True):
        trainer = make(
            tmp_path,
            family,
            slow_mode_ratio=0.5,
            pruning_ratio=0.5,
            activation_checkpointing=checkpointing,
            optim="sgd",
        )
        trainer.train()
        logs.append(torch.tensor(history(trainer, "loss", "grad_norm")))
    torch.testing.assert_close(logs[1], logs[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16_autocast_covers_what_runs_before_forward(tmp_path, family):
    exact, mixed = (
        make(tmp_path, family, slow_mode_ratio=0.5, pruner="grid", pruning_ratio=0.5, bf16=bf16)
        for bf16 in (False, True)
    )
    seen = []
    tower = mixed.model.get_encoder(modality="image")
    linear = next(m for m in tower.modules() if isinstance(m, torch.nn.Linear))
    linear.register_forward_hook(lambda module, args, out: seen.append(out.dtype))
    for trainer in (exact, mixed):
        trainer.train()
    assert set(seen) == {torch.bfloat16}
    # The teacher runs without gradients on the same weights, whose casts autocast must not keep for the student.
    torch.testing.assert_close(
        torch.tensor(history(mixed, "loss", "grad_norm")),
        torch.tensor(history(exact, "loss", "grad_norm")),
        rtol=0.2,
        atol=0.05,
    )


def test_left_padding_trains_like_right_padding(tmp_path):
    logs = []
    for side in ("right", "left"):
        trainer = make(tmp_path, slow_mode_ratio=0.5, pruning_ratio=0.5)
        _, processor = FAMILIES["llava"].build(side)
        right = FAMILIES["llava"].processor("right")

        def collate(examples, processor=processor, right=right):
            inputs, labelled = (Collator(FAMILIES["llava"], p)(examples) for p in (processor, right))
            labels = torch.full_like(inputs["labels"], -100)
            labels[inputs["attention_mask"].bool()] = labelled["labels"][labelled["attention_mask"].bool()]
            return {**inputs, "labels": labels}

        trainer.data_collator.collator = collate
        trainer.train()
        logs.append(torch.tensor(history(trainer, "loss", "grad_norm")))
    torch.testing.assert_close(logs[1], logs[0], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("ratio", [0.0, 1.0])
def test_labels_on_padding_count_in_no_mode(tmp_path, ratio):
    def supervised(trainer, padding: bool) -> list:
        inner = trainer.data_collator.collator

        def collator(examples):
            made = inner(examples)
            real = made["attention_mask"].bool() | padding
            return {**made, "labels": torch.where(real, made["input_ids"], -100)}

        trainer.data_collator.collator = collator
        trainer.train()
        return history(trainer, "loss", "grad_norm")

    losses = [
        supervised(make(tmp_path, slow_mode_ratio=ratio, max_steps=1, per_device_train_batch_size=4), padding)
        for padding in (False, True)
    ]
    assert losses[0] == losses[1]


def test_best_model_and_sharded_checkpoints_are_read_back(tmp_path):
    trainer = make(
        tmp_path,
        slow_mode_ratio=0.5,
        max_steps=6,
        save_strategy="steps",
        save_steps=2,
        eval_strategy="steps",
        eval_steps=2,
        load_best_model_at_end=True,
        greater_is_better=True,  # for the last weights are the best
        learning_rate=0.5,
    )
    save = trainer.model.save_pretrained
    trainer.model.save_pretrained = lambda *args, **options: save(*args, max_shard_size="100KB", **options)
    trainer.train()
    best = trainer.state.best_model_checkpoint
    assert not best.endswith("-6")
    assert len(list(Path(best).glob("model-*.safetensors"))) > 1
    loaded, _ = FAMILIES["llava"].build(seed=9)
    loaded = type(loaded).from_pretrained(best)
    trained = dict(trainer.model.named_parameters())
    assert all(torch.equal(p, trained[n]) for n, p in loaded.named_parameters())
    isolator = load_file(Path(best) / "mode_isolator.safetensors")["prompt"]
    assert torch.equal(isolator, trainer.dual_forward.isolator.prompt)
    resumed = make(tmp_path, slow_mode_ratio=0.5, max_steps=6, save_strategy="steps", save_steps=2)
    resumed._load_from_checkpoint(best)
    assert all(torch.equal(p, trained[n]) for n, p in resumed.model.named_parameters())


def test_learned_pruner_is_fast_only_saved_and_resumed(tmp_path, learned_pruner):
    watch = Watch(["dualspeed.pruner.score.weight"])
    options = {"pruner": "scored", "slow_mode_ratio": 0.5, "max_steps": 6, "save_strategy": "steps", "save_steps": 3}
    trainer = make(tmp_path, callbacks=[watch], **options)
    trainer.train()
    trainer.save_model()
    modes = [trainer.mode_at(step) for step in range(6)]
    assert [m["dualspeed.pruner.score.weight"] for m in watch.moved] == [mode == "fast" for mode in modes]
    resumed = make(tmp_path, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    weight = trainer.dual_forward.pruner.score.weight
    assert torch.equal(resumed.dual_forward.pruner.score.weight, weight)
    loaded = AutoPruner.from_pretrained(tmp_path)
    settings = {"pruning_ratio": 0.9, "dropped_tokens": "merge", "hidden_size": 32}
    assert loaded.config.to_dict() == {"pruner_type": "scored", **settings}
    assert torch.equal(loaded.score.weight, weight)
    (tmp_path / "pruner.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"No pruner\.safetensors .* learned pruner 'scored' needs"):
        AutoPruner.from_pretrained(tmp_path)


def test_streaming_data_trains(tmp_path):
    from datasets import Dataset

    trainer = make(tmp_path, data=Dataset.from_list(DATA).to_iterable_dataset())
    trainer.train()
    assert trainer.state.global_step == 4


def test_second_run_starts_its_logs_anew(tmp_path):
    trainer = make(tmp_path, max_steps=3, logging_steps=2, slow_mode_ratio=0.0, learning_rate=0.0)
    for _ in range(2):
        trainer.train()
        for loss, fast in history(trainer, "loss", "fast_loss"):
            assert fast == pytest.approx(loss, rel=1e-5)
        assert trainer.summary()["steps"] == {"fast": 3, "slow": 0}


def test_restored_callbacks_go_on_counting(tmp_path):
    options = {"save_strategy": "steps", "save_steps": 2, "restore_callback_states_from_checkpoint": True}
    make(tmp_path, **options).train()
    resumed = make(tmp_path, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert sum(resumed.summary()["steps"].values()) == 4


def test_model_is_copied_and_pickled_with_its_fast_view(tmp_path):
    trainer = make(tmp_path, max_steps=1)
    copied = copy.deepcopy(trainer.model)
    again = pickle.loads(pickle.dumps(trainer.model))
    for model in (copied, again):
        assert torch.equal(model.dualspeed.isolator.prompt, trainer.dual_forward.isolator.prompt)
        assert model.dualspeed.mode is None
    trainer.train()
    other = make(tmp_path, model=copied, max_steps=1)
    other.train()
    assert history(other, "loss") == history(trainer, "loss")


def test_model_init_builds_the_fast_view(tmp_path):
    family = FAMILIES["llava"]
    _, processor = family.build()
    args = DualSpeedTrainingArguments(**QUIET, output_dir=str(tmp_path), max_steps=2, per_device_train_batch_size=2)
    trainer = DualSpeedTrainer(
        model_init=lambda: family.build()[0], args=args, train_dataset=DATA, data_collator=Collator(family, processor)
    )
    trainer.train()
    assert trainer.model.dualspeed is trainer.dual_forward
    assert sum(trainer.summary()["steps"].values()) == 2


def test_labels_on_visual_tokens_are_masked_with_one_warning(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(MaskVisualLabels, "_warned", False)  # it may have warned in an earlier test
    family = FAMILIES["llava"]
    _, processor = family.build()

    def everything(examples):
        inputs = Collator(family, processor)(examples)
        return {**inputs, "labels": torch.where(inputs["attention_mask"].bool(), inputs["input_ids"], -100)}

    def no_visual(examples):
        inputs = everything(examples)
        return {
            **inputs,
            "labels": inputs["labels"].masked_fill(inputs["input_ids"] == processor.image_token_id, -100),
        }

    class OwnBatches(DualSpeedTrainer):
        def get_train_dataloader(self):
            order = self._get_train_sampler()
            return self.accelerator.prepare(DataLoader(DATA, batch_size=2, sampler=order, collate_fn=everything))

    def inside(trainer):
        trainer.data_collator.collator = everything

    def in_its_place(trainer):
        trainer.data_collator = everything

    def without(trainer):
        trainer.data_collator.collator = no_visual

    logs = []
    for kind, place in ((DualSpeedTrainer, inside), (DualSpeedTrainer, in_its_place), (OwnBatches, without)):
        trainer = make(tmp_path, cls=kind, slow_mode_ratio=0.5, max_steps=2)
        place(trainer)
        with caplog.at_level(logging.WARNING):
            trainer.train()
        logs.append(history(trainer, "loss"))
    trainer = make(tmp_path, slow_mode_ratio=0.5, max_steps=2)
    without(trainer)
    trainer.train()
    assert logs == 3 * [history(trainer, "loss")]
    assert sum("-100" in r.getMessage() for r in caplog.records) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pruning_ratio": 1.0}, r"`pruning_ratio` must be in \[0, 1\), got 1.0"),
        ({"slow_mode_ratio": -0.1}, r"`slow_mode_ratio` must be in \[0, 1\], got -0.1"),
        ({"slow_tail_ratio": 1.5}, "`slow_tail_ratio`"),
        ({"isolator_length": -1}, "`isolator_length`"),
        ({"distillation_temperature": 0.0}, "`distillation_temperature`"),
        ({"mode_schedule": "perodic"}, "Did you mean 'periodic'"),
        ({"position_ids": "orginal"}, "Did you mean 'original'"),
        (
            {"pruner": "divprun"},
            "'avg_pool', .*'random'.*Did you mean 'divprune'",
        ),
        ({"fast_only_parameters": ["*nothing*"]}, "matches no trainable parameter"),
        ({"fast_only_parameters": ["lm_head*"], "slow_only_parameters": ["lm_head*"]}, "both match"),
    ],
)
def test_bad_options_are_named(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        make(tmp_path, **options)


def test_pruner_from_a_folder_or_as_an_object(tmp_path):
    AutoPruner.from_name("grid", pruning_ratio=0.5).save_pretrained(tmp_path / "pruner")
    folder = str(tmp_path / "pruner")
    assert make(tmp_path, pruner=folder).summary()["pruner"] == {
        "pruner_type": "grid",
        "pruning_ratio": 0.5,
        "dropped_tokens": "merge",
    }
    assert make(tmp_path, pruner=folder, pruning_ratio=0.75).summary()["pruning_ratio"] == 0.75
    assert make(tmp_path, pruner="random").summary()["pruner"]["pruner_type"] == "random"
    trainer = make(tmp_path)
    given = DualSpeedTrainer(trainer.model, trainer.args, pruner=AutoPruner.from_name("random", pruning_ratio=0.25))
    assert given.summary()["pruner"]["pruning_ratio"] == 0.25


def test_optimizer_made_beforehand_must_know_the_isolator(tmp_path):
    family = FAMILIES["llava"]
    model, processor = family.build()
    args = DualSpeedTrainingArguments(**QUIET, output_dir=str(tmp_path), max_steps=1, slow_mode_ratio=0.0)
    options = {"args": args, "train_dataset": DATA, "data_collator": Collator(family, processor)}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match=r"The optimizer lacks isolator\.prompt.*optimizer_cls_and_kwargs"):
        DualSpeedTrainer(model, optimizers=(optimizer, None), **options)
    trainer = DualSpeedTrainer(model, optimizer_cls_and_kwargs=(torch.optim.SGD, {"lr": 0.1}), **options)
    before = trainer.dual_forward.isolator.prompt.detach().clone()
    trainer.train()
    assert not torch.equal(trainer.dual_forward.isolator.prompt, before)


def test_model_outside_the_protocol_is_refused(tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    )
    with pytest.raises(ValueError, match="takes no `mm_encoder_outputs` and it has no `get_image_features`"):
        make(tmp_path, model=model)


def test_collator_that_drops_pixels_fails_before_training(tmp_path):
    trainer = make(tmp_path)
    collator = trainer.data_collator.collator
    trainer.data_collator.collator = lambda examples: {
        k: v for k, v in collator(examples).items() if k != "pixel_values"
    }
    with pytest.raises(ValueError, match="pixel_values"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_collator_without_labels_fails_before_training_and_serves_prediction(tmp_path):
    trainer = make(tmp_path)
    collator = trainer.data_collator.collator
    trainer.data_collator.collator = lambda examples: {k: v for k, v in collator(examples).items() if k != "labels"}
    with pytest.raises(ValueError, match="called without `labels`: the data collator returns none"):
        trainer.train()
    assert trainer.state.global_step == 0
    assert trainer.predict(DATA[:2]).predictions[0].shape[0] == 2


def test_image_and_placeholder_counts_that_differ_are_both_named(tmp_path):
    trainer = make(tmp_path, max_steps=1)
    collator = trainer.data_collator.collator

    def one_image_short(examples):
        inputs = collator([DATA[0], DATA[1]])
        return {**inputs, "pixel_values": inputs["pixel_values"][:-1]}

    trainer.data_collator.collator = one_image_short
    with pytest.raises(ValueError, match=r"48 placeholders .* 32 visual features"):
        trainer.train()


def test_processes_wait_for_pushes_of_the_first_one_ahead_of_what_they_add_up(tmp_path, monkeypatch):
    said = []

    @contextmanager
    def others_wait():
        yield
        said.append("waited")

    monkeypatch.setattr("hf_dualspeed.trainer.run_record.others_wait", others_wait)
    trainer = make(tmp_path, max_steps=1)
    monkeypatch.setattr(trainer, "_finish_current_push", lambda: said.append("pushed"))
    monkeypatch.setattr(trainer, "add_up", lambda: said.append("added up"))
    trainer.train()
    assert said[:3] == ["pushed", "waited", "added up"]


def test_isolator_of_another_length_is_refused(tmp_path):
    options = {"save_strategy": "steps", "save_steps": 2, "max_steps": 2}
    make(tmp_path, isolator_length=4, **options).train()
    make(tmp_path / "none", isolator_length=0, **options).train()
    for folder, length, saved in (("", 8, 4), ("", 0, 4), ("none", 4, 0)):
        trainer = make(tmp_path / folder, isolator_length=length, **{**options, "max_steps": 4})
        expected = f"`isolator_length` is {length}.*trained with {saved}.*isolator_length={saved}"
        with pytest.raises(ValueError, match=expected):
            trainer.train(resume_from_checkpoint=True)


def test_ctrl_c_while_saving_leaves_the_checkpoint_whole(tmp_path):
    class PressCtrlC(TrainerCallback):
        def on_train_begin(self, args, state, control, processing_class=None, **kwargs):
            save = processing_class.save_pretrained

            def interrupted(*a, **k):
                os.kill(os.getpid(), signal.SIGINT)
                return save(*a, **k)

            processing_class.save_pretrained = interrupted

    options = {"save_strategy": "steps", "save_steps": 2, "slow_mode_ratio": 0.5, "max_steps": 4}
    trainer = make(tmp_path, callbacks=[PressCtrlC()], **options)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert trainer.state.global_step == 2
    resumed = make(tmp_path, **options)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 4
    assert all(math.isfinite(loss) for (loss,) in history(resumed, "loss"))
