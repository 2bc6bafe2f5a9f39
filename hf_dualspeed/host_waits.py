"""Counts how often code waits for the device: each time it asks a tensor for its values."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path

import torch

# What hands values of a tensor to Python; on an accelerator each of them waits for all work before it.
VALUES = ("item", "tolist", "__bool__", "__int__", "__float__", "__index__", "nonzero", "cpu", "numpy")


@contextmanager
def host_waits() -> Iterator[list[str]]:
    """A list that gets the name of each method of [`VALUES`] that is called inside the context.

    It counts the same on a CPU, where nothing waits. Boolean indexing, which waits too, is not seen.
    """
    waits: list[str] = []

    def counted(name: str):
        original = getattr(torch.Tensor, name)

        @wraps(original)
        def call(tensor, *args, **kwargs):
            waits.append(name)
            return original(tensor, *args, **kwargs)

        return call

    for name in VALUES:
        setattr(torch.Tensor, name, counted(name))
    try:
        yield waits
    finally:
        for name in VALUES:  # Tensor inherits all of them
            delattr(torch.Tensor, name)


@contextmanager
def device_waits() -> Iterator[list[str]]:
    """A list that gets where each wait for a CUDA device inside the context was: "folder/file.py:line".

    CUDA itself tells them, boolean indexing and copies from the host included; the list is filled at the end.
    """
    before, places = torch.cuda.get_sync_debug_mode(), []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield places
        finally:
            torch.cuda.set_sync_debug_mode(before)
    told = [warning for warning in caught if "synchronizing CUDA operation" in str(warning.message)]
    places += ["/".join(Path(warning.filename).parts[-2:]) + f":{warning.lineno}" for warning in told]
