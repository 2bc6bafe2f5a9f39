"""Silences lines of other packages that a user can do nothing about."""

from __future__ import annotations

import logging
import os
import sys
import warnings

# What turns off the bars of transformers and the Hub's client, and those of datasets: before their import and after it.
BARS = (
    ("HF_HUB_DISABLE_PROGRESS_BARS", "transformers.utils.logging", "disable_progress_bar"),
    ("HF_DATASETS_DISABLE_PROGRESS_BARS", "datasets", "disable_progress_bars"),
)


def quiet() -> None:
    """Runs before the library loads these packages."""
    # PEFT imports bitsandbytes, which looks for a kernel for 4-bit weights on CPUs and warns where there is none.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    # PEFT asks a model for what transformers calls otherwise by now.
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)


def quiet_command() -> None:
    """Runs before a command loads anything, for its process alone.

    Bars of other packages are for a terminal, and for the first process. Elsewhere, lines of our own say how far a
    command is.
    """
    if not (sys.stderr.isatty() and is_first_process()):
        hide_bars()
    # DDP advises, in each process, against looking for unused parameters, which the modes need.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")


def is_first_process() -> bool:
    """Whether a launcher started this process as the first one, or none did."""
    return os.environ.get("RANK", "0") == "0"


def hide_bars() -> None:
    """Turns off the bars of other packages for the rest of the process, unless the environment asks for them."""
    for variable, module, switch in BARS:
        if os.environ.setdefault(variable, "1") == "1" and module in sys.modules:
            getattr(sys.modules[module], switch)()
