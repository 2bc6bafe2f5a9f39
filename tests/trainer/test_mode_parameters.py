"""Parameters of one mode alone."""

from __future__ import annotations

from pathlib import Path

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
