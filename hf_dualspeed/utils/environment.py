"""Describes what results depend on besides the code: versions, machine and memory."""

from __future__ import annotations

import os
import platform
import sys
from importlib.metadata import version
from pathlib import Path

import torch

from .. import __version__

PACKAGES = ("torch", "transformers", "accelerate")


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that a result depends on."""
    found = {name: version(name) for name in PACKAGES}
    # Its own does not ask for an installed package: a checkout may be run as it is, and a Space brings the source.
    return {**found, "hf_dualspeed": __version__, "python": platform.python_version()}


def machine(device: torch.device | None = None) -> dict[str, str | int | None]:
    """CPU model, number of cores, threads of this process, and the accelerator's name or None.

    Args:
        device (`torch.device`, *optional*): What ran. An accelerator that lies idle beside a CPU is not named.
    """
    used = torch.accelerator.is_available() and (device is None or device.type != "cpu")
    accelerator = torch.accelerator.current_accelerator() if used else None
    if accelerator is not None and accelerator.type == "cuda":
        accelerator = torch.cuda.get_device_name()
    return {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "accelerator": None if accelerator is None else str(accelerator),
    }


def reset_peak_memory(device: torch.device) -> None:
    """Resets [`peak_memory`] on CUDA; the peak of a process cannot be reset."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_memory(device: torch.device) -> dict | None:
    """Peak memory: on CUDA PyTorch's since [`reset_peak_memory`], on a CPU the process's since its start, else None."""
    if device.type == "cuda":
        return {"bytes": torch.cuda.max_memory_allocated(device), "of": "accelerator"}
    try:
        import resource
    except ImportError:  # not on Windows
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    held = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return {"bytes": held, "of": "process"} if device.type == "cpu" else None


def _cpu_model() -> str:
    # platform.processor() names only the architecture on Linux.
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
