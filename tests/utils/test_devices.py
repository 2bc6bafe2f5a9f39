"""Transfers between devices and the host."""

from __future__ import annotations

import torch

from hf_dualspeed.utils.devices import on_host, synchronize


def test_a_copy_on_the_host_is_its_own():
    tensor = torch.arange(3.0, requires_grad=True)
    copy = on_host(tensor)
    assert copy.equal(tensor)
    assert (copy.device.type, copy.requires_grad) == ("cpu", False)
    copy.zero_()
    assert tensor.tolist() == [0, 1, 2]


def test_only_an_accelerator_is_waited_for(monkeypatch):
    waited = []
    monkeypatch.setattr(torch.accelerator, "synchronize", lambda: waited.append(True))
    synchronize(torch.device("cpu"))
    assert not waited
    synchronize(torch.device("cuda"))
    assert waited
