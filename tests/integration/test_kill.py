"""Runs that are killed in file operations end, resumed, as unbroken ones, and nothing of a person's is gone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HELPERS = Path(__file__).parents[1] / "helpers"
FEW = {"random": 0, "chosen": 4, "full": 1}
MANY = {"random": 40, "chosen": 42, "full": 6}


@pytest.mark.distributed
@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
@pytest.mark.parametrize("counts", [FEW, pytest.param(MANY, marks=pytest.mark.slow)], ids=["few", "many"])
def test_killed_runs_resume_to_the_bit(tmp_path, counts):
    paths = os.pathsep.join([str(HELPERS), str(HELPERS.parents[1])])
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    options = [word for name, count in counts.items() for word in (f"--{name}", str(count))]
    words = [sys.executable, str(HELPERS / "kill_training.py"), str(tmp_path), *options]
    done = subprocess.run(words, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    _, *ends, tally = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"')]
    print(done.stdout)
    bad = [one for one in ends if not (one["ended"] and one["whole"] and one["equal"] and one["kept"])]
    assert not bad, f"{bad}\n{done.stderr[-4000:]}"
    assert len(ends) == tally["tally"]["good"] == sum(counts.values())
