"""A stand-in for Liger's loss, and trainings that should be the same."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from training import history

# Not Adam: it would blow the rounding noise of gradients that should be zero (key biases) up to full steps.
STEPS = {"optim": "sgd", "slow_mode_ratio": 0.5, "pruning_ratio": 0.5, "seed": 1}
KEYS = ("loss", "grad_norm", "fast_loss", "slow_loss", "distillation_loss")


def logged(trainer) -> torch.Tensor:
    return torch.tensor([[-1.0 if v is None else v for v in entry] for entry in history(trainer, *KEYS)])


def assert_same_training(ours, plain) -> None:
    assert {"fast", "slow"} == {ours.mode_at(step) for step in range(ours.args.max_steps)}
    torch.testing.assert_close(logged(ours), logged(plain), rtol=1e-5, atol=1e-6)
    expected = dict(plain.model.named_parameters())
    for name, parameter in ours.model.named_parameters():
        torch.testing.assert_close(parameter, expected[name], rtol=1e-5, atol=1e-6, msg=name)


class StandIn(torch.autograd.Function):
    """What Liger's function computes: its gradients already in forward, by whether the hidden states have one."""

    @staticmethod
    def forward(ctx, hidden, weight, targets, bias, smoothing):
        with torch.enable_grad():
            given = [t.detach().requires_grad_() for t in (hidden, weight, bias) if t is not None]
            logits = F.linear(*given)
            loss = F.cross_entropy(logits.float(), targets, reduction="sum", label_smoothing=smoothing)
        gradients = torch.autograd.grad(loss, given) if hidden.requires_grad else [None] * len(given)
        ctx.gradients = [*gradients, None][:3]
        return loss.detach()

    @staticmethod
    def backward(ctx, upstream):
        grads = [None if g is None else g * upstream for g in ctx.gradients]
        return grads[0], grads[1], None, grads[2], None
