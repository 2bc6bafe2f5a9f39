"""Workers of a pool end with their parent."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

PROGRAM = """
import os, sys, time
from pathlib import Path
from benchmarks.workers import worker_pool

class Data:
    def __len__(self):
        return 9
    def __getitem__(self, index):
        Path(f"loader.{os.getpid()}").touch()
        time.sleep(1000)

def begin(word):
    Path(f"{word}.{os.getpid()}").touch()

def work(loads):
    if loads:
        from torch.utils.data import DataLoader
        next(iter(DataLoader(Data(), num_workers=1)))
    time.sleep(1000)

if __name__ == "__main__":
    with worker_pool(2, begin, "worker") as pool:
        list(pool.map(work, [True, False]))
"""


def runs(process: int) -> bool:
    """Whether a process is there and no zombie."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def waited(holds, seconds: float = 60) -> bool:
    end = time.monotonic() + seconds
    while not holds() and time.monotonic() < end:
        time.sleep(0.05)
    return holds()


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="asks /proc")
def test_no_worker_and_no_data_loader_outlives_its_parent(tmp_path):
    (tmp_path / "program.py").write_text(PROGRAM)
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    parent = subprocess.Popen([sys.executable, "program.py"], cwd=tmp_path, env=environment)
    started = []

    def all_work():
        started[:] = [int(path.suffix[1:]) for name in ("worker", "loader") for path in tmp_path.glob(f"{name}.*")]
        return len(started) == 3

    try:
        assert waited(all_work)
        assert all(map(runs, started))
        parent.kill()
        parent.wait()
        assert waited(lambda: not any(map(runs, started)), 20)
    finally:
        for process in (parent.pid, *started):
            if runs(process):
                os.kill(process, signal.SIGKILL)
        parent.wait()
