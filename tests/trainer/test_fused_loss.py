"""The head at supervised positions alone, in all passes, and fused with its loss, against plain passes."""

from __future__ import annotations

import copy
import functools
import json
import math
import os
import subprocess
import sys
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from families import FAMILIES as SUPPORTED
from families.cases import CASES, batch_of
from head_cases import STEPS, StandIn, assert_same_training, logged
from peft import LoraConfig, get_peft_model
from tiny_models import FAMILIES
from torch.utils._python_dispatch import TorchDispatchMode
from training import DATA, Collator, history, make
from transformers import Trainer

from hf_dualspeed import AutoPruner, DualSpeedTrainer, DualSpeedTrainingArguments
from hf_dualspeed.recipes.arguments import parse_recipe
from hf_dualspeed.trainer import fused_loss as head
from hf_dualspeed.trainer.dual_forward import EVALUATION, DualForward
from hf_dualspeed.trainer.plain_evaluation import has_plain_loss


def rows_of_head(trainer) -> list[int]:
    """Notes in how many rows the head is run."""
    seen = []
    count = lambda module, args: seen.append(args[0].shape[:-1].numel())  # noqa: E731
    trainer.model.get_output_embeddings().register_forward_pre_hook(count)
    return seen


# --- at supervised positions alone --------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_one_argument_runs_the_head_at_all_positions_instead(tmp_path, family):
    ours, plain = (make(tmp_path, family, supervised_logits_only=only, **STEPS) for only in (True, False))
    few, all_of_them = rows_of_head(ours), rows_of_head(plain)
    ours.train()
    plain.train()
    assert_same_training(ours, plain)
    assert len(few) == len(all_of_them)
    assert all(a < b for a, b in zip(few, all_of_them, strict=True))


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("family", FAMILIES)
def test_evaluation_gives_the_models_own_loss(tmp_path, family, smoothing):
    options = {"label_smoothing_factor": smoothing, "per_device_eval_batch_size": 3}
    ours, plain = (make(tmp_path, family, supervised_logits_only=only, **options) for only in (True, False))
    few, all_of_them = rows_of_head(ours), rows_of_head(plain)
    expected = plain.evaluate()["eval_loss"]
    assert ours.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-6)
    supervised = [int((ours.data_collator(DATA[i : i + 3])["labels"][:, 1:] != -100).sum()) for i in (0, 3, 6)]
    assert few == supervised
    assert all(a < b for a, b in zip(few, all_of_them, strict=True))
    if not smoothing:
        trainer = make(tmp_path, family, Trainer, model=copy.deepcopy(plain.model), per_device_eval_batch_size=3)
        assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-6)
    # One of text alone, and back to training.
    assert ours.evaluate([DATA[2]])["eval_loss"] == pytest.approx(plain.evaluate([DATA[2]])["eval_loss"], rel=1e-6)
    assert ours.dual_forward.mode is None


def test_evaluation_within_training_changes_nothing(tmp_path):
    evaluated = make(tmp_path, eval_strategy="steps", eval_steps=1, **STEPS)
    evaluated.train()
    plain = make(tmp_path, supervised_logits_only=False, **STEPS)
    plain.train()
    assert_same_training(evaluated, plain)
    assert evaluated.summary()["steps"] == plain.summary()["steps"]


def test_evaluation_of_packed_samples_is_that_of_each_apart(tmp_path):
    # The model's own, with a cache, lets packed samples see each other.
    trainer = make(tmp_path)
    single = [{k: v for k, v in trainer.data_collator([DATA[i]]).items() if k != "attention_mask"} for i in (0, 4)]
    packed = {key: torch.cat([s[key] for s in single], 1) for key in ("input_ids", "labels")}
    packed["labels"][:, single[0]["labels"].shape[1]] = -100
    packed["position_ids"] = torch.cat([torch.arange(s["labels"].shape[1]) for s in single])[None]
    packed["pixel_values"] = torch.cat([s["pixel_values"] for s in single])
    counts = [int((s["labels"][:, 1:] != -100).sum()) for s in single]
    apart = sum(n * trainer.evaluate([DATA[i]])["eval_loss"] for n, i in zip(counts, (0, 4), strict=True)) / sum(counts)
    trainer.data_collator = lambda examples: dict(packed)
    assert trainer.evaluate([DATA[0]])["eval_loss"] == pytest.approx(apart, rel=1e-5)


def test_evaluation_in_half_precision(tmp_path):
    ours, plain = (make(tmp_path, supervised_logits_only=only, bf16_full_eval=True) for only in (True, False))
    assert ours.evaluate()["eval_loss"] == pytest.approx(plain.evaluate()["eval_loss"], rel=1e-6)


def test_evaluation_of_adapters(tmp_path):
    losses = []
    for only in (True, False):
        model, _ = FAMILIES["llava"].build()
        torch.manual_seed(0)
        adapted = get_peft_model(model, LoraConfig(target_modules=["q_proj", "lm_head"], init_lora_weights=False))
        losses.append(make(tmp_path, model=adapted, supervised_logits_only=only).evaluate()["eval_loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_predictions_that_were_asked_for_are_whole(tmp_path):
    shapes = []

    def metrics(prediction):
        logits = prediction.predictions[0] if isinstance(prediction.predictions, tuple) else prediction.predictions
        shapes.append((logits.shape[:2], prediction.label_ids.shape))
        return {}

    trainer = make(tmp_path, per_device_eval_batch_size=len(DATA))
    expected = trainer.evaluate()["eval_loss"]
    trainer.compute_metrics = metrics
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-6)
    assert shapes[0][0] == shapes[0][1]


def test_batches_without_supervised_tokens_or_labels_are_evaluated_as_ever(tmp_path):
    for only in (True, False):
        trainer = make(tmp_path, supervised_logits_only=only)
        inputs = trainer.data_collator(DATA[:2])
        none = {**inputs, "labels": torch.full_like(inputs["labels"], -100)}
        loss, logits, labels = trainer.prediction_step(trainer.model, none, True)
        assert math.isnan(loss)
        assert logits is labels is None
        unlabelled = {key: value for key, value in inputs.items() if key != "labels"}
        assert trainer.prediction_step(trainer.model, unlabelled, True)[0] is None


def test_other_losses_of_models_stay_their_own(tmp_path):
    trainer = make(tmp_path)
    rows = rows_of_head(trainer)
    inputs = trainer.data_collator(DATA[:2])
    trainer.prediction_step(trainer.model, inputs, True)
    trainer.model.config.text_config.output_router_logits = True
    trainer.prediction_step(trainer.model, inputs, True)
    trainer.model.config.text_config.output_router_logits = False
    trainer.model.loss_function = lambda logits, labels, vocab_size, **kwargs: logits.sum() * 0 + 7
    assert trainer.prediction_step(trainer.model, inputs, True)[0].item() == 7
    assert rows[0] < rows[1] == rows[2] == inputs["labels"].numel()


# --- fused with its loss ------------------------------------------------------------------------------------------


class LogitsMade(TorchDispatchMode):
    """Notes each tensor as wide as the vocabulary, but for the weights' own, their gradients and what `loss` makes."""

    def __init__(self, trainer):
        super().__init__()
        self.vocabulary = trainer.model.get_output_embeddings().out_features
        self.made, self.in_loss = [], False

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out.dim() > 1 and out.shape[-1] == self.vocabulary and not self.in_loss:
            self.made.append(tuple(out.shape))
        return out

    @contextmanager
    def looking_away(self):
        self.in_loss = True
        yield
        self.in_loss = False


@pytest.fixture
def fused(monkeypatch):
    """A stand-in for Liger's kernel, on the CPU; returns the shapes that it is called with."""
    calls = []

    def loss(hidden, weight, targets, bias, label_smoothing):
        calls.append(tuple(hidden.shape))
        return StandIn.apply(hidden, weight, targets, bias, label_smoothing)

    monkeypatch.setattr(head, "DEVICES", ("cpu",))
    monkeypatch.setattr(head, "find_spec", lambda name: name)
    monkeypatch.setattr(head, "fused_loss", loss)
    return calls


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("family", FAMILIES)
def test_fused_training_equals_plain_training(tmp_path, family, smoothing, fused):
    options = {**STEPS, "distillation_weight": 0.0, "label_smoothing_factor": smoothing, "max_steps": 5}
    ours, plain = (make(tmp_path, family, fused_head_loss=choice, **options) for choice in ("on", "off"))
    plain.train()
    assert not fused
    ours.train()
    assert len(fused) == ours.args.max_steps - 1  # the first pass is watched
    assert all(len(shape) == 2 and shape[1] == 32 for shape in fused)
    assert_same_training(ours, plain)
    assert ours.evaluate()["eval_loss"] == pytest.approx(plain.evaluate()["eval_loss"], rel=1e-5)
    assert len(fused) == ours.args.max_steps  # one more in evaluation


def test_a_loss_of_ones_own_finds_logits_unless_it_asks_for_none(tmp_path, fused):
    class Own(DualSpeedTrainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
            widths.append(outputs.logits.shape[-1])
            return (loss, outputs) if return_outputs else loss

    for choice in ("auto", "on"):
        widths: list[int] = []
        trainer = make(tmp_path, cls=Own, fused_head_loss=choice, slow_mode_ratio=0.0, max_steps=2)
        trainer.train()
        vocabulary = trainer.model.get_output_embeddings().out_features
        assert widths == [vocabulary, vocabulary if choice == "auto" else 32]


def test_steps_with_distillation_have_logits(tmp_path, fused):
    ours, plain = (make(tmp_path, fused_head_loss=choice, max_steps=6, **STEPS) for choice in ("auto", "off"))
    ours.train()
    plain.train()
    assert_same_training(ours, plain)
    fast = [ours.mode_at(step) for step in range(6)].count("fast")
    assert 0 < len(fused) == fast - 1


@pytest.mark.parametrize("options", [{"slow_mode_splits": 2}, {"bf16": True}, {"supervised_logits_only": False}])
def test_fused_steps_go_with_other_options(tmp_path, fused, options):
    options = {**STEPS, "distillation_weight": 0.0, **options}
    ours, plain = (make(tmp_path, fused_head_loss=choice, **options) for choice in ("on", "off"))
    ours.train()
    plain.train()
    assert len(fused) >= 3
    if "bf16" in options:
        torch.testing.assert_close(logged(ours), logged(plain), rtol=1e-2, atol=1e-3)
    else:
        assert_same_training(ours, plain)


def test_no_logits_are_made(tmp_path, fused, monkeypatch):
    trainer = make(tmp_path, fused_head_loss="on", slow_mode_ratio=0.0)
    inputs = trainer.data_collator(DATA[:2])
    items = (inputs["labels"][:, 1:] != -100).sum()
    trainer.model.train()
    stand_in = head.fused_loss
    for number in range(3):
        with LogitsMade(trainer) as logits:

            def loss(*args, logits=logits):
                with logits.looking_away():
                    return stand_in(*args)

            monkeypatch.setattr(head, "fused_loss", loss)
            with trainer.dual_forward.in_mode("fast"):
                trainer.compute_loss(trainer.model, inputs, num_items_in_batch=items)
        assert bool(logits.made) == (number == 0)  # the first pass is watched
        assert "forward" not in vars(trainer.model.lm_head)


def test_a_head_that_trains_alone_and_a_batch_without_labels_need_no_kernel(tmp_path, fused):
    models = []
    for choice in ("on", "off"):
        model, _ = FAMILIES["llava"].build()
        model.requires_grad_(False)
        model.lm_head.requires_grad_(True)
        options = {"slow_mode_ratio": 1.0, "distillation_weight": 0.0, "optim": "sgd", "isolator_length": 0}
        trainer = make(tmp_path, model=model, fused_head_loss=choice, **options)
        trainer.train()
        models.append(trainer.model)
    assert not fused
    torch.testing.assert_close(models[0].lm_head.weight, models[1].lm_head.weight)
    assert not torch.equal(models[0].lm_head.weight, FAMILIES["llava"].build()[0].lm_head.weight)

    family = FAMILIES["llava"]
    trainer = make(tmp_path, fused_head_loss="on", slow_mode_ratio=0.0, weight_decay=0.0)
    collate, calls = Collator(family, family.build()[1]), []

    def second_without(examples):
        inputs = collate(examples)
        calls.append(1)
        return inputs if len(calls) != 2 else {**inputs, "labels": torch.full_like(inputs["labels"], -100)}

    trainer.data_collator.collator = second_without
    trainer.train()
    assert history(trainer, "loss", "grad_norm")[1] == [0.0, 0.0]
    assert len(fused) == 2


def changed(model, change):
    """A model whose forward does something to the logits behind the head."""
    forward = model.forward

    @functools.wraps(forward)
    def changing(*args, **kwargs):
        output = forward(*args, **kwargs)
        output["logits"] = change(output.logits)
        return output

    model.forward = changing
    return model


def capped(logits):  # as Gemma does
    return 30 * torch.tanh(logits / 30)


def written(logits):  # into what the head returned, as Chameleon does
    logits[..., 0] -= 1
    return logits


@pytest.mark.parametrize("change", [capped, written])
def test_logits_that_are_changed_behind_the_head_are_found_out(tmp_path, fused, change):
    results = []
    for choice in ("auto", "off"):
        trainer = make(tmp_path, model=changed(FAMILIES["llava"].build()[0], change), fused_head_loss=choice, **STEPS)
        trainer.train()
        results.append(trainer)
    assert not fused
    assert_same_training(*results)
    trainer = make(
        tmp_path, model=changed(FAMILIES["llava"].build()[0], change), fused_head_loss="on", slow_mode_ratio=0.0
    )
    with pytest.raises(ValueError, match="`fused_head_loss` is 'on', but the model's logits are not what its head"):
        trainer.train()
    assert "forward" not in vars(trainer.model.lm_head)


def test_a_pass_that_fails_leaves_the_head_as_it_was(tmp_path, fused, monkeypatch):
    trainer = make(tmp_path, fused_head_loss="on", slow_mode_ratio=0.0)
    trainer.train()
    norm = trainer.model.model.language_model.norm

    def fail(*args):
        raise RuntimeError("no room")

    monkeypatch.setattr(norm, "forward", fail)
    inputs = trainer.data_collator(DATA[:2])
    for run in (lambda: trainer.training_step(trainer.model, inputs), lambda: trainer.evaluate()):
        with pytest.raises(RuntimeError, match="no room"):
            run()
        assert "forward" not in vars(trainer.model.lm_head)
        assert trainer.dual_forward.mode is None
    monkeypatch.undo()
    assert trainer.model.eval()(**inputs).logits.shape[-1] == trainer.model.lm_head.out_features


def adapted(model):
    return get_peft_model(model, LoraConfig(target_modules=["lm_head"]))


def placed(model):
    model.lm_head.forward = model.lm_head.forward
    return model


def quantized(model):
    class Packed(torch.nn.Parameter):
        pass

    model.lm_head.weight = Packed(model.lm_head.weight.data)
    return model


@pytest.mark.parametrize(
    ("options", "change", "reason"),
    [
        ({}, adapted, "the model's head is peft.tuners.lora.layer.Linear, not a plain nn.Linear: adapted"),
        ({}, placed, "the forward of the model's head has been replaced"),
        ({}, quantized, "the weight of the model's head is a Packed: sharded or quantized"),
        ({"torch_compile": True}, None, "`torch_compile` would compile the head"),
    ],
)
def test_where_it_does_not_apply(tmp_path, fused, options, change, reason):
    build = lambda: change(FAMILIES["llava"].build()[0]) if change else None  # noqa: E731
    assert make(tmp_path, model=build(), **options).dual_forward.fused_head is None
    with pytest.raises(ValueError, match=f"`fused_head_loss` is 'on', but {reason}.*Use 'auto'"):
        make(tmp_path, model=build(), fused_head_loss="on", **options)


def test_without_liger_or_a_gpu(tmp_path, monkeypatch):
    monkeypatch.setattr(head, "find_spec", lambda name: None)
    assert make(tmp_path).dual_forward.fused_head is None
    with pytest.raises(ValueError, match=r'liger-kernel is not installed \(pip install "hf-dualspeed\[liger\]"\)'):
        make(tmp_path, fused_head_loss="on")
    monkeypatch.setattr(head, "find_spec", lambda name: name)
    assert make(tmp_path).dual_forward.fused_head is None
    with pytest.raises(ValueError, match="its kernels run on cuda, and the model is trained on cpu"):
        make(tmp_path, fused_head_loss="on")


@pytest.mark.parametrize(
    ("given", "meant"), [(True, "on"), ("true", "on"), ("False", "off"), (False, "off"), ("auto", "auto"), ("on", "on")]
)
def test_the_option_is_read_from_yaml_and_the_command_line(tmp_path, given, meant):
    assert DualSpeedTrainingArguments("out", use_cpu=True, fused_head_loss=given).fused_head_loss == meant
    recipe = tmp_path / "recipe.yaml"
    needed = "model_name_or_path: org/model\ndataset: easy-vqa\noutput_dir: out\nuse_cpu: true\n"
    recipe.write_text(f"{needed}fused_head_loss: {given}\n")
    assert parse_recipe(["--config", str(recipe)])[1].fused_head_loss == meant
    assert parse_recipe(["--config", str(recipe), "--fused_head_loss", "off"])[1].fused_head_loss == "off"
    with pytest.raises(ValueError, match="`fused_head_loss` must be one of 'auto', 'on', 'off', got 'liger'"):
        DualSpeedTrainingArguments("out", use_cpu=True, fused_head_loss="liger")


def test_ligers_own_forward_is_refused(tmp_path):
    with pytest.raises(ValueError, match="fused_linear_cross_entropy=True, which puts Liger's .* fused_head_loss='on'"):
        make(tmp_path, use_liger_kernel=True, liger_kernel_config={"fused_linear_cross_entropy": True})


def test_ligers_other_kernels_are_asked_for_without_its_loss(tmp_path, monkeypatch):
    applied = []
    monkeypatch.setattr("transformers.trainer.apply_liger_kernel", lambda model, config: applied.append(config))
    monkeypatch.setattr(head, "without_ligers_layers", lambda interface, device: None)
    make(tmp_path, use_liger_kernel=True, liger_kernel_config={"swiglu": False}, max_steps=1).train()
    assert applied == [{"fused_linear_cross_entropy": False, "swiglu": False}]


def test_ligers_other_kernels_that_would_replace_nothing_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(head, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="`use_liger_kernel` is True, but liger-kernel is not installed"):
        make(tmp_path, use_liger_kernel=True)
    monkeypatch.setattr(head, "find_spec", lambda name: name)
    with pytest.raises(ValueError, match="its kernels run on cuda, and the model is trained on cpu.*kernel=False"):
        make(tmp_path, use_liger_kernel=True)
    # Liger says of a model that it does not know no more than a line of its log.
    monkeypatch.setattr(head, "DEVICES", ("cpu",))
    monkeypatch.setattr(head, "version", lambda name: "0.8")
    known = SimpleNamespace(MODEL_TYPE_TO_APPLY_LIGER_FN={"llava": None, "llama": None})
    monkeypatch.setitem(sys.modules, "liger_kernel", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers.monkey_patch", known)
    make(tmp_path, use_liger_kernel=True)
    with pytest.raises(ValueError, match=r"0\.8 has no kernels for models of type 'llava_next'; those of .*'llama'\)"):
        make(tmp_path, "llava_next", use_liger_kernel=True)
    with pytest.raises(ValueError, match="has no kernels for models of type 'qwen2_5_vl'. Set use_liger_kernel=False"):
        make(tmp_path, "qwen2_5_vl", use_liger_kernel=True)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "modality"), CASES)
@torch.no_grad()
def test_evaluation_gives_each_familys_own_loss(name, modality, fused):
    model = SUPPORTED[name].model().eval()
    batch = batch_of(SUPPORTED[name], model, modality, "right")
    expected = model(**batch.inputs).loss
    forward = DualForward(AutoPruner.from_name("grid"), None, batch.position_ids, batch.video_budget)
    forward.attach(model)
    if not forward.slices_logits or not has_plain_loss(forward.interface, batch.inputs):
        pytest.skip("evaluated as ever")
    forward.fused_head = head.fused_head(forward.interface, "auto", torch.device("cpu"))
    for _ in range(2):  # watched, and fused if it may be
        with forward.in_mode(EVALUATION):
            out = model(**batch.inputs)
            mean = forward.cross_entropy(out.logits, out.targets, hidden=out.hidden) / len(out.targets)
        torch.testing.assert_close(mean, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.skipif(find_spec("liger_kernel") is None, reason="needs liger-kernel and triton")
def test_ligers_own_kernel_in_tritons_interpreter():
    run = subprocess.run(
        [sys.executable, str(Path(__file__).parents[1] / "helpers" / "liger_run.py")],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert run.returncode == 0, run.stderr[-4000:]
    fused, plain, calls = (torch.tensor(values) for values in json.loads(run.stdout.splitlines()[-1]))
    assert calls == 5  # of the six fast steps all but the first, which is watched
    torch.testing.assert_close(fused, plain, rtol=1e-4, atol=1e-5)
