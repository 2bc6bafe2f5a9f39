"""Trainings that are killed in file operations end, resumed, as unbroken ones, and no person's words are gone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HELPERS = Path(__file__).parents[1] / "helpers"
SHARES = ("0.1", "0.3", "0.45", "0.6", "0.75", "0.99")


@pytest.mark.parametrize(
    "kills", [SHARES, pytest.param(("--random", "40"), marks=pytest.mark.slow)], ids=["few", "many"]
)
def test_killed_trainings_resume_to_the_bit(tmp_path, kills):
    paths = os.pathsep.join([str(HELPERS), str(HELPERS.parents[1])])
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    words = [sys.executable, str(HELPERS / "kill_training.py"), str(tmp_path), *kills]
    done = subprocess.run(words, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    tally = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    print(*tally, sep="\n")
    assert len(tally) == (40 if "--random" in kills else len(kills))
    assert all(one["killed"] and one["equal"] and one["kept"] for one in tally), f"{tally}\n{done.stderr[-4000:]}"
