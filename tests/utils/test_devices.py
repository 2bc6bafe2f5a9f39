"""Transfers between devices and the host."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import distributed

from hf_dualspeed.utils.devices import on_host, others_wait, synchronize


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


def test_others_wait_for_the_first_process_however_long_it_takes(monkeypatch):
    """Threads stand for processes."""
    store, rank, told = distributed.HashStore(), threading.local(), []
    monkeypatch.setattr(distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(distributed, "get_rank", lambda: rank.value)
    monkeypatch.setattr(distributed.distributed_c10d, "_get_default_store", lambda: store)
    monkeypatch.setattr("hf_dualspeed.utils.devices.BODIES", [0, 0].__iter__())

    def other():
        rank.value = 1
        with others_wait():
            pass
        told.append("on")

    rank.value, waiting = 0, threading.Thread(target=other)
    with others_wait():
        waiting.start()
        waiting.join(0.2)
        told.append("done")
    waiting.join()
    assert told == ["done", "on"]
    with pytest.raises(ValueError, match="broken"), others_wait():
        raise ValueError("broken")
