"""Processes that work for another one and end with it, however it ends."""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor


def worker_pool(jobs: int, begin: Callable[..., None], *arguments: object) -> ProcessPoolExecutor:
    """A pool of `jobs` processes, each of which calls `begin(*arguments)` first."""
    # Spawned, because PyTorch's threads and a device's context do not survive a fork.
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(jobs, context, _begin, (begin, *arguments))


def _begin(begin: Callable[..., None], *arguments: object) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    begin(*arguments)


def _end_with_parent() -> None:
    """Waits for the end of the parent, of which a kill is one, then ends this process and its data loaders."""
    multiprocessing.parent_process().join()
    for child in multiprocessing.active_children():
        child.kill()
    os._exit(1)
