"""Lines of other packages that a user can do nothing about."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import types
import warnings

import pytest

from hf_dualspeed.utils import quiet as module
from hf_dualspeed.utils.quiet import hide_bars, quiet, quiet_command


def test_a_missing_kernel_of_bitsandbytes_is_not_told(monkeypatch):
    logger = logging.getLogger("bitsandbytes.backends.cpu.ops")
    assert not logger.isEnabledFor(logging.WARNING)  # the import of the library is enough
    monkeypatch.setattr(logger, "level", logger.level)  # brought back afterwards
    logger.setLevel(logging.NOTSET)
    quiet()
    assert not logger.isEnabledFor(logging.WARNING)
    assert logger.isEnabledFor(logging.ERROR)


def test_what_other_packages_call_by_an_old_name_is_not_told():
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        quiet()
        warnings.warn("`is_gradient_checkpointing` is deprecated, and will go.", FutureWarning, stacklevel=1)
        warnings.warn("`is_gradient_checkpointing` is something else", FutureWarning, stacklevel=1)
    assert [str(one.message) for one in told] == ["`is_gradient_checkpointing` is something else"]


@pytest.fixture
def others(monkeypatch):
    """A package with bars, and what turned them off."""
    calls = []
    package = types.ModuleType("others")
    package.off = lambda: calls.append("off")
    monkeypatch.setitem(sys.modules, "others", package)
    monkeypatch.setattr(module, "BARS", (("OTHERS_WITHOUT_BARS", "others", "off"), ("LATER", "not_imported", "off")))
    for name in ("OTHERS_WITHOUT_BARS", "LATER", "RANK", "TORCH_CPP_LOG_LEVEL"):
        monkeypatch.setenv(name, "")  # so that it is brought back
        monkeypatch.delenv(name)
    return calls


def test_bars_are_hidden_from_files_and_in_all_processes_but_the_first(others, monkeypatch):
    monkeypatch.setattr(sys, "stderr", types.SimpleNamespace(isatty=lambda: True))
    quiet_command()
    assert others == []
    assert "LATER" not in os.environ
    monkeypatch.setenv("RANK", "1")
    quiet_command()
    assert others == ["off"]
    monkeypatch.delenv("RANK")
    monkeypatch.setattr(sys, "stderr", types.SimpleNamespace(isatty=lambda: False))
    quiet_command()
    assert others == ["off", "off"]
    assert os.environ["LATER"] == "1"  # for a package that is imported later
    assert os.environ["TORCH_CPP_LOG_LEVEL"] == "ERROR"


def test_bars_that_are_asked_for_stay(others, monkeypatch):
    monkeypatch.setenv("OTHERS_WITHOUT_BARS", "0")
    hide_bars()
    assert others == []


def test_the_names_of_switches_are_right():
    """In a process of its own, as they last."""
    code = """
from hf_dualspeed.utils.quiet import hide_bars
import datasets, transformers.utils.logging as of_transformers
from huggingface_hub.utils import are_progress_bars_disabled
assert of_transformers.is_progress_bar_enabled()
hide_bars()
assert not of_transformers.is_progress_bar_enabled()
assert are_progress_bars_disabled()
assert datasets.are_progress_bars_disabled()
"""
    environment = {key: value for key, value in os.environ.items() if key not in [name for name, *_ in module.BARS]}
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300, env=environment)
