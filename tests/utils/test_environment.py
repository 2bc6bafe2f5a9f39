"""What results say of versions, machine and memory."""

from __future__ import annotations

import platform

import torch

from hf_dualspeed.utils.environment import machine, peak_memory, reset_peak_memory, versions

CPU, CUDA = torch.device("cpu"), torch.device("cuda:0")


def test_versions_are_those_installed():
    found = versions()
    assert list(found) == ["torch", "transformers", "accelerate", "hf_dualspeed", "python"]
    assert found["python"] == platform.python_version()
    assert torch.__version__.startswith(found["torch"])


def test_the_machine_has_names_and_numbers(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    found = machine()
    assert found["cpu"]
    assert (found["threads"], found["accelerator"]) == (torch.get_num_threads(), None)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: CUDA)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    assert machine()["accelerator"] == machine(CUDA)["accelerator"] == "a GPU"
    assert machine(CPU)["accelerator"] is None  # which pictures and cards would name in place of what ran


def test_peak_memory_is_that_of_the_process_or_of_the_device(monkeypatch):
    asked = []
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: asked.append(device) or 7)
    before = peak_memory(CPU)
    held = torch.ones(2**25)  # 128 MiB
    after = peak_memory(CPU)
    assert after["of"] == "process"
    assert held.nbytes <= after["bytes"] < 2**40
    assert after["bytes"] >= before["bytes"]
    assert peak_memory(CUDA) == {"bytes": 7, "of": "accelerator"}
    assert asked == [CUDA]
    assert peak_memory(torch.device("meta")) is None


def test_only_a_devices_peak_is_reset(monkeypatch):
    reset = []
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", reset.append)
    for device in (CPU, CUDA):
        reset_peak_memory(device)
    assert reset == [CUDA]
