"""Parameters of one mode alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import hf_dualspeed
from hf_dualspeed.trainer.mode_parameters import ModeParameters

PACKAGE = Path(hf_dualspeed.__file__).parent


def test_views_drop_the_gradients_of_the_other_mode():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2))
    views = ModeParameters(model, ["0.*"], ["1.weight"])
    assert views.names == {"fast": {"0.weight", "0.bias"}, "slow": {"1.weight"}}
    for mode, expected in (("fast", {"1.weight"}), ("slow", {"0.weight", "0.bias"})):
        model(torch.ones(1, 2)).sum().backward()
        views.drop_gradients(mode)
        assert {n for n, p in model.named_parameters() if p.grad is None} == expected
        model.zero_grad()


@pytest.mark.parametrize("optimizer_class", [torch.optim.AdamW, torch.optim.SGD, torch.optim.Adagrad])
def test_an_optimizer_of_flat_groups_moves_what_the_mode_owns(optimizer_class):
    # As under ZeRO: one flat tensor stands for the parameters of a group, and has a gradient in every step.
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2))
    views = ModeParameters(model, ["0.*"], ["1.weight"])
    groups = views.split({"params": list(model.parameters()), "weight_decay": 0.1})
    owned = {group["modes"]: len(group["params"]) for group in groups}
    assert owned == {"fast": 2, "slow": 1, "both": 3}
    for group in groups:
        group["params"] = [nn.Parameter(torch.cat([p.detach().flatten() for p in group["params"]]))]
    options = {"momentum": 0.9} if optimizer_class is torch.optim.SGD else {}
    optimizer = optimizer_class(groups, lr=0.1, **options)
    modes = []
    for _ in range(2):  # as where the same engine trains again
        views.skip_groups(optimizer, lambda: modes[-1])
    for mode in ("fast", "slow", "slow", "fast"):
        modes.append(mode)
        before = {group["modes"]: group["params"][0].detach().clone() for group in groups}
        for group in groups:
            group["params"][0].grad = torch.full_like(group["params"][0], float(group["modes"] in ("both", mode)))
        optimizer.step()
        moved = {g["modes"] for g in groups if not torch.equal(g["params"][0], before[g["modes"]])}
        assert moved == {"both", mode}
        assert optimizer.param_groups == groups


def test_backward_leaves_zeros_for_the_other_mode():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    modes = [None]
    ModeParameters(model, ["0.weight"], ["1.weight"]).zero_gradients(lambda: modes[-1])
    for mode, zeros in ((None, set()), ("fast", {"1.weight"}), ("slow", {"0.weight"})):
        modes.append(mode)
        model.zero_grad()
        model(torch.ones(1, 2)).sum().backward()
        assert {name for name, p in model.named_parameters() if not p.grad.any()} == zeros
