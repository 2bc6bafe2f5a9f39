"""Distillation and cross-entropy, by hand and in slices."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import hf_dualspeed
from hf_dualspeed import self_distillation_loss
from hf_dualspeed.trainer import losses
from hf_dualspeed.trainer.callbacks import ModeLosses
from hf_dualspeed.trainer.losses import supervised_cross_entropy

PACKAGE = Path(hf_dualspeed.__file__).parent


def test_distillation_by_hand():
    # Teacher (0.8, 0.2), student (0.5, 0.5): 0.8 ln 1.6 + 0.2 ln 0.4 = 0.19274...
    teacher, student = torch.tensor([[0.8, 0.2]]).log(), torch.tensor([[0.5, 0.5]]).log()
    by_hand = 0.8 * math.log(1.6) + 0.2 * math.log(0.4)
    assert self_distillation_loss(student, teacher).item() == pytest.approx(by_hand)
    assert self_distillation_loss(teacher, teacher).item() == pytest.approx(0.0, abs=1e-7)
    # Not symmetric: the teacher comes first in the divergence.
    assert self_distillation_loss(teacher, student).item() != pytest.approx(by_hand, rel=1e-2)
    twice = self_distillation_loss(student.repeat(2, 1), teacher.repeat(2, 1), num_items_in_batch=8)
    assert twice.item() == pytest.approx(by_hand * 2 / 8)
    # At temperature 2 the teacher is (2/3, 1/3) and the sum is multiplied by 4.
    warm = 4 * (2 / 3 * math.log(4 / 3) + 1 / 3 * math.log(2 / 3))
    assert self_distillation_loss(student, teacher, temperature=2.0).item() == pytest.approx(warm)


def test_distillation_teaches_the_student_alone():
    student, teacher = (torch.randn(3, 5, requires_grad=True) for _ in range(2))
    self_distillation_loss(student, teacher).backward()
    assert student.grad.abs().sum() > 0
    assert teacher.grad is None
    with pytest.raises(ValueError, match=r"`student_logits` \(3, 5\) and `teacher_logits` \(2, 5\) must agree"):
        self_distillation_loss(student, teacher[:2])
    low = self_distillation_loss(student.bfloat16(), teacher.bfloat16())
    assert low.dtype == torch.float32


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocabulary", [7, 16, 50])
def test_distillation_in_slices_is_that_of_the_whole(monkeypatch, temperature, dtype, vocabulary):
    monkeypatch.setattr("hf_dualspeed.trainer.losses.VOCABULARY_SLICE", 16)
    torch.manual_seed(0)
    student = (3 * torch.randn(9, vocabulary)).to(dtype).requires_grad_()
    teacher = (3 * torch.randn(9, vocabulary)).to(dtype)
    self_distillation_loss(student, teacher, temperature, num_items_in_batch=4).mul(3).backward()
    again = student.detach().clone().requires_grad_()
    logs = [F.log_softmax(logits.double() / temperature, -1) for logits in (again, teacher)]
    expected = F.kl_div(*logs, log_target=True, reduction="sum") * temperature**2 / 4
    expected.mul(3).backward()
    sliced = self_distillation_loss(student, teacher, temperature, num_items_in_batch=4)
    torch.testing.assert_close(sliced.double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(student.grad, again.grad)


class Float32Sizes(TorchDispatchMode):
    """Notes the elements of each float32 tensor that is made."""

    def __init__(self):
        super().__init__()
        self.made = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out.dtype == torch.float32 and out._base is None:
            self.made.append(out.numel())
        return out


def test_distillation_keeps_no_further_copy_of_the_logits(monkeypatch):
    monkeypatch.setattr("hf_dualspeed.trainer.losses.VOCABULARY_SLICE", 8)
    student, teacher = torch.randn(4, 64, dtype=torch.bfloat16, requires_grad=True), torch.randn(4, 64)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t), Float32Sizes() as sizes:
        self_distillation_loss(student, teacher.bfloat16()).backward()
    assert max(sizes.made) < student.numel()
    assert sum(t.numel() for t in kept) == 2 * student.numel() + 2 * len(student)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "slices"), [(1, 1), (5, 3), (50, 16)])
def test_cross_entropy_in_slices_is_that_of_the_whole(monkeypatch, smoothing, dtype, rows, slices):
    monkeypatch.setattr(losses, "SLICE", 64)
    torch.manual_seed(0)
    logits = (3 * torch.randn(rows, 37)).to(dtype).requires_grad_()
    assert losses.row_slices(logits) == slices
    targets = torch.randint(37, (rows,))
    sliced = supervised_cross_entropy(logits, targets, 4, smoothing)
    sliced.mul(3).backward()
    again = logits.detach().clone().requires_grad_()
    expected = F.cross_entropy(again.double(), targets, reduction="sum", label_smoothing=smoothing) / 4
    expected.mul(3).backward()
    torch.testing.assert_close(sliced.double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(logits.grad, again.grad)
    assert logits.grad.dtype == dtype


def test_cross_entropy_keeps_no_further_copy_of_the_logits(monkeypatch):
    logits, targets = torch.randn(64, 32, dtype=torch.bfloat16, requires_grad=True), torch.randint(32, (64,))
    monkeypatch.setattr(losses, "SLICE", logits.numel() // 100)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t), Float32Sizes() as sizes:
        supervised_cross_entropy(logits, targets, label_smoothing=0.1).backward()
    assert max(sizes.made) < logits.numel() / 8
    assert sum(t.numel() for t in kept) == logits.numel() + len(targets)


def test_slices_of_logits_are_few_and_change_no_gradient(monkeypatch):
    logits, targets = torch.randn(64, 32), torch.randint(32, (64,))
    assert losses.row_slices(logits) == 1
    found = []
    for size, parts in ((64 * 32, 1), (1000, 3), (1, losses.ROW_SLICES)):
        monkeypatch.setattr(losses, "SLICE", size)
        assert losses.row_slices(logits) == parts
        leaf = logits.clone().requires_grad_()
        loss = supervised_cross_entropy(leaf, targets, 7, label_smoothing=0.1)
        loss.backward()
        found.append((loss.detach(), leaf.grad))
    for loss, gradient in found[1:]:
        torch.testing.assert_close(loss, found[0][0])
        assert torch.equal(gradient, found[0][1])


def test_losses_of_nothing_are_zero_and_reach_the_graph():
    logits = torch.zeros(0, 7, requires_grad=True)
    for items in (None, 0, torch.tensor(0)):
        loss = supervised_cross_entropy(logits, torch.zeros(0, dtype=torch.long), items)
        loss = loss + self_distillation_loss(logits, logits, num_items_in_batch=items)
        assert loss.item() == 0.0
        loss.backward()


def test_ranks_exchange_logged_losses_of_one_shape():
    """Where the batches of one had no images, it has no loss of a learned pruner."""
    given = {"fast_loss": 2.0, "pruner_loss": 4.0}, {"fast_loss": 6.0}
    window = {"fast": 2, "slow": 0, "steps_per_second": 1.0}
    sent, logs = [], []
    for reduce in (lambda own, reduction: (sent.append(own), own)[1], lambda own, reduction: sum(sent[:2]) / 2):
        for sums in given:
            kept = ModeLosses()
            for name, loss in sums.items():
                kept.add(name, torch.tensor(loss))
            logs.append(kept.pop(SimpleNamespace(reduce=reduce), window, 2))
    assert sent[0].shape == sent[1].shape
    steps = {"fast_steps": 2, "slow_steps": 0, "steps_per_second": 1.0}
    assert logs[:2] == [{**steps, "fast_loss": 2.0, "pruner_loss": 4.0}, {**steps, "fast_loss": 6.0}]
    assert logs[2:] == [{**steps, "fast_loss": 4.0, "pruner_loss": 2.0}] * 2
