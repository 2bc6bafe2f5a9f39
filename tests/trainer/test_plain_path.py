"""One argument takes the plain path in place of every optimisation, and trains the same model."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from head_cases import assert_same_training
from tiny_models import FAMILIES
from training import make

from hf_dualspeed import DualSpeedTrainingArguments
from hf_dualspeed.trainer.losses import CrossEntropy, ForwardKL

OPTIONS = {"optim": "sgd", "mode_schedule": "periodic", "slow_mode_ratio": 0.5, "pruning_ratio": 0.5}
OPTIONS |= {"activation_checkpointing": True, "slow_mode_splits": 2, "distillation_temperature": 2.0}


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_plain_path_trains_the_same_model(tmp_path, monkeypatch, family, smoothing):
    trainers, encoded, sliced = [], {}, {}
    for plain in (False, True):
        trainer = make(tmp_path, family, plain_path=plain, label_smoothing_factor=smoothing, **OPTIONS)
        tower = trainer.model.get_encoder(modality="image").requires_grad_(False)
        tower.register_forward_hook(
            lambda module, args, out, plain=plain: encoded.setdefault(plain, []).append(out[0].requires_grad)
        )
        calls = sliced.setdefault(plain, [])
        for function in (CrossEntropy, ForwardKL):
            apply = function.apply
            monkeypatch.setattr(
                function, "apply", lambda *args, apply=apply, calls=calls: calls.append(1) or apply(*args)
            )
        trainer.train()
        monkeypatch.undo()
        trainers.append(trainer)
    ours, plain = trainers
    assert_same_training(ours, plain)
    assert sliced[False]
    assert not sliced[True]
    assert len(encoded[True]) > len(encoded[False])  # slow steps encode for teacher and student
    assert True in encoded[True]  # transformers' checkpointing makes a frozen tower carry gradients
    assert set(encoded[False]) == {False}


def test_what_it_stands_for():
    args = DualSpeedTrainingArguments("out", plain_path=True, slow_mode_splits="auto", fused_head_loss="on")
    chosen = (args.fast_mode_checkpointing, args.supervised_logits_only, args.fused_head_loss, args.slow_mode_splits)
    assert chosen == (True, False, "off", 1)


def test_the_plain_losses_are_pytorchs(monkeypatch):
    from hf_dualspeed import self_distillation_loss
    from hf_dualspeed.trainer.losses import supervised_cross_entropy

    student, teacher, targets = torch.randn(5, 9), torch.randn(5, 9), torch.arange(5)
    for sliced in (False, True):
        entropy = supervised_cross_entropy(student, targets, 1, 0.1, sliced=sliced)
        torch.testing.assert_close(entropy, F.cross_entropy(student, targets, reduction="sum", label_smoothing=0.1))
        divergence = self_distillation_loss(student, teacher, 2.0, 1, sliced=sliced)
        logs = [F.log_softmax(logits / 2, -1) for logits in (student, teacher)]
        torch.testing.assert_close(divergence, 4 * F.kl_div(*logs, log_target=True, reduction="sum"))
