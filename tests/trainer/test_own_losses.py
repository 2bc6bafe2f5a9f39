"""Losses of subclasses: `outputs.loss` is the whole loss of a mode, and what never takes it is refused."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from tiny_models import FAMILIES
from torch import nn
from training import DATA, QUIET, Collator, history, make
from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments, Trainer

from hf_dualspeed import DualSpeedTrainer
from hf_dualspeed.trainer.trainer import DualSpeedMixin
from hf_dualspeed.trainer.training_args import DualSpeedArguments

LOGGED = ("loss", "grad_norm", "fast_loss", "slow_loss", "distillation_loss", "pruner_loss")
OPTIONS = {"slow_mode_ratio": 0.5, "pruning_ratio": 0.5, "seed": 1, "max_steps": 6}


class First(DualSpeedTrainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(**inputs)
        return (outputs[0], outputs) if return_outputs else outputs[0]


class Forgetful(DualSpeedTrainer):
    """Passes no count of items on, as trainers of older versions did."""

    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        return super().compute_loss(model, inputs, return_outputs)


class OfTheOutput(DualSpeedTrainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(**inputs)
        return (outputs.loss, outputs) if return_outputs else outputs.loss


class Twice(DualSpeedTrainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        return (2 * loss, outputs) if return_outputs else 2 * loss


@pytest.mark.parametrize("own", [OfTheOutput, First, Forgetful])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"gradient_accumulation_steps": 2, "slow_mode_splits": 2, "label_smoothing_factor": 0.1},
        {"pruner": "dynamicvit", "average_tokens_across_devices": False},
        {"plain_path": True},
    ],
)
def test_the_outputs_loss_is_that_of_training_and_evaluation(tmp_path, options, own):
    logs, losses, weights = [], [], []
    for cls in (DualSpeedTrainer, own):
        trainer = make(tmp_path, cls=cls, **{**OPTIONS, **options})
        trainer.train()
        logs.append(history(trainer, *LOGGED))
        losses.append(trainer.evaluate()["eval_loss"])
        weights.append([p.detach().clone() for p in trainer.model.parameters()])
    assert {trainer.mode_at(step) for step in range(6)} == {"fast", "slow"}
    assert logs[0] == logs[1]
    assert all(torch.equal(one, other) for one, other in zip(*weights, strict=True))
    if own is Forgetful or not options.get(
        "label_smoothing_factor"
    ):  # outside of training, a model's own loss has none
        assert losses[0] == losses[1]


def test_what_a_subclass_makes_of_the_loss_is_trained_on(tmp_path):
    one, two = (make(tmp_path, cls=cls, optim="sgd", max_steps=1, max_grad_norm=0) for cls in (DualSpeedTrainer, Twice))
    one.train()
    two.train()
    (loss, norm), (doubled, other) = (history(t, "loss", "grad_norm")[0] for t in (one, two))
    assert (doubled, other) == pytest.approx((2 * loss, 2 * norm), rel=1e-5)


class MeanOfTwo(DualSpeedTrainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        return (model(**inputs).loss + model(**inputs).loss) / 2


def test_a_loss_that_calls_the_model_twice(tmp_path):
    one, two = (make(tmp_path, cls=cls, **OPTIONS) for cls in (DualSpeedTrainer, MeanOfTwo))
    for trainer in (one, two):
        trainer.train()
    expected, logs = (torch.tensor([[v or 0 for v in row] for row in history(t, *LOGGED)]) for t in (one, two))
    torch.testing.assert_close(logs, expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="The model was called again for a batch whose 2 parts it has run.*splits=1"):
        make(tmp_path, cls=MeanOfTwo, slow_mode_ratio=1.0, slow_mode_splits=2).train()


def of_all_positions(self, model, inputs, return_outputs=False, num_items_in_batch=None):
    logits = model(**inputs).logits
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), inputs["labels"][:, 1:].flatten())


def of_hidden_states(self, model, inputs, return_outputs=False, num_items_in_batch=None):
    outputs = model(**inputs, output_hidden_states=True)
    return outputs.loss + outputs.hidden_states[-1].square().mean()


@pytest.mark.parametrize("loss", [of_all_positions, of_hidden_states])
def test_a_loss_that_expects_other_outputs_is_told_what_they_are(tmp_path, loss):
    kind = type("Other", (DualSpeedTrainer,), {"compute_loss": loss})
    with pytest.raises((ValueError, AttributeError)) as caught:
        make(tmp_path, cls=kind, max_steps=1).train()
    assert "Other.compute_loss gets a DualSpeedOutput" in caught.value.__notes__[0]


def of_logits(self, model, inputs, return_outputs=False, num_items_in_batch=None):
    outputs = model(**inputs)
    return nn.functional.cross_entropy(outputs.logits, outputs.targets, label_smoothing=0.5)


def behind_the_hooks(self, model, inputs, return_outputs=False, num_items_in_batch=None):
    return model.forward(**inputs).loss


@pytest.mark.parametrize("loss", [of_logits, behind_the_hooks])
def test_a_step_that_leaves_the_loss_out_is_an_error(tmp_path, loss):
    kind = type("Other", (DualSpeedTrainer,), {"compute_loss": loss})
    with pytest.raises(ValueError, match=r"The loss of Other.compute_loss does not depend on `outputs.loss`"):
        make(tmp_path, cls=kind, max_steps=1).train()


def test_a_step_that_leaves_the_modes_out_is_an_error(tmp_path):
    kind = type("Other", (DualSpeedTrainer,), {"training_step": Trainer.training_step})
    with pytest.raises(ValueError, match=r"A step ended without a fast or slow pass: .*super\(\).training_step"):
        make(tmp_path, cls=kind, max_steps=1).train()


class Weighted(Trainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        return 2 * super().compute_loss(model, inputs, return_outputs, num_items_in_batch)


class Further(Weighted):
    pass


@pytest.mark.parametrize("behind", [Weighted, Further])
def test_a_loss_behind_ours_is_refused(tmp_path, behind):
    kind = type("Mine", (DualSpeedMixin, behind), {})
    with pytest.raises(ValueError, match=r"Mine puts DualSpeed in front of Weighted, whose `compute_loss` would never"):
        make(tmp_path, cls=kind)
    # In front it works: it gets ours.
    make(tmp_path, cls=type("Mine", (behind, DualSpeedTrainer), {}), max_steps=1).train()


def test_a_loss_put_in_the_trainers_place_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(Trainer, "compute_loss", OfTheOutput.compute_loss)
    with pytest.raises(
        ValueError, match=r"front of Trainer, whose `compute_loss` \(now that of test_own_losses\) would"
    ):
        make(tmp_path)


def test_a_trainer_that_generates(tmp_path):
    @dataclass
    class Arguments(DualSpeedArguments, Seq2SeqTrainingArguments):
        pass

    family = FAMILIES["llava"]
    model, processor = family.build()
    trainer = type("Generating", (DualSpeedMixin, Seq2SeqTrainer), {})(
        model=model,
        args=Arguments(str(tmp_path), max_steps=1, predict_with_generate=True, **QUIET),
        train_dataset=DATA,
        eval_dataset=DATA[:2],
        data_collator=Collator(family, processor),
        processing_class=processor,
    )
    trainer.train()
    assert trainer.evaluate(max_new_tokens=2)["eval_loss"] > 0
    predicted = trainer.predict(DATA[:2], max_new_tokens=2).predictions
    assert predicted.shape[0] == 2


def test_losses_of_trl(tmp_path):
    pytest.importorskip("trl")
    from sft_training import make as make_sft
    from sft_training import messages
    from trl import DPOTrainer, SFTTrainer

    from hf_dualspeed import DualSpeedSFTTrainer

    with pytest.raises(ValueError, match="Mine puts DualSpeed in front of DPOTrainer"):
        make(tmp_path, cls=type("Mine", (DualSpeedMixin, DPOTrainer), {}))
    own = type("Own", (SFTTrainer,), {"compute_loss": Weighted.compute_loss})
    with pytest.raises(ValueError, match="Mine puts DualSpeed in front of Own"):
        make_sft(tmp_path, messages(), cls=type("Mine", (DualSpeedSFTTrainer, own), {}))
    plain = make_sft(tmp_path, messages(), max_steps=2)
    plain.train()
    taken = type("Taken", (DualSpeedSFTTrainer,), {"compute_loss": OfTheOutput.compute_loss})
    trainer = make_sft(tmp_path, messages(), cls=taken, max_steps=2)
    trainer.train()
    assert history(trainer, "loss", "grad_norm") == history(plain, "loss", "grad_norm")


@pytest.mark.parametrize("splits", [1, 2])
def test_a_batch_without_supervised_tokens_reaches_the_loss(tmp_path, splits):
    trainer = make(tmp_path, slow_mode_ratio=1.0, slow_mode_splits=splits, max_steps=1)
    collate = trainer.given_collator
    trainer.data_collator.collator = lambda examples: {
        **(batch := collate(examples)),
        "labels": torch.full_like(batch["labels"], -100),
    }
    trainer.train()
    assert history(trainer, "loss") == [[0.0]]
    assert len(trainer.train_dataset) == len(DATA)
