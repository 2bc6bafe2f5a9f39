"""Settings of all tests."""

import os

# Tiny models gain nothing from threads, and wait for each other very long where other programs use the cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from collections import Counter
from types import SimpleNamespace

import pytest
from accelerate.utils import memory
from evaluation_cases import asked, folder, made  # noqa: F401
from loopback_hub import hub  # noqa: F401
from space_server import server, space_process  # noqa: F401
from tiny_runs import slots, tiny_runs  # noqa: F401
from training import learned_pruner  # noqa: F401
from transformers.utils import logging


@pytest.fixture(autouse=True, scope="session")
def little_to_collect():
    """accelerate collects garbage around each training, which takes ten times as long as the steps of a tiny model."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(memory, "gc", SimpleNamespace(collect=int))
        yield


VERBOSITY = logging.get_verbosity()


@pytest.fixture(autouse=True)
def same_verbosity():
    """A trainer, that of a module's fixture too, sets transformers' level of logging for the whole process, by which
    later ones may be silent."""
    logging.set_verbosity(VERBOSITY)
    yield
    logging.set_verbosity(VERBOSITY)


@pytest.hookimpl(trylast=True)  # behind the choice by marks
def pytest_collection_modifyitems(items):
    """Files that start several processes come first, then those of most tests: xdist hands files out in this order, and
    what takes minutes would keep one process busy when the others are done."""
    count = Counter(item.path for item in items)
    several = {item.path for item in items if item.get_closest_marker("distributed")}
    items.sort(key=lambda item: (item.path not in several, -count[item.path]))
