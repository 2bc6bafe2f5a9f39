"""Settings of all tests."""

import os

# Tiny models gain nothing from threads, and wait for each other very long where other programs use the cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from evaluation_cases import asked, folder, made  # noqa: F401
from loopback_hub import hub  # noqa: F401
from space_server import server  # noqa: F401
from tiny_runs import slots, tiny_runs  # noqa: F401
from training import learned_pruner  # noqa: F401
