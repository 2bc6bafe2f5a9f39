"""Trainings in several processes, started by `accelerate launch`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
DDP = ROOT / "trainer_configs" / "accelerate" / "cpu_ddp.yaml"
FSDP2 = HERE / "fsdp2_cpu.yaml"
ZERO3 = HERE / "deepspeed_zero3_cpu.yaml"


def run(out: Path, *options: str, config: Path | None = None) -> list[dict]:
    """Trains and returns what each rank reports."""
    done = launched(out, *options, config=config)
    assert done.returncode == 0, done.stderr[-12000:]  # the launcher's own trace comes last, a rank's before it
    return [json.loads(path.read_text()) for path in sorted(out.glob("rank*.json"))]


def launched(out: Path, *options: str, config: Path | None = None) -> subprocess.CompletedProcess:
    """The processes of a training, which are done."""
    out.mkdir(parents=True, exist_ok=True)
    launcher = [sys.executable]
    if config is not None:
        launcher = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config)]
        launcher += ["--main_process_port", "0"]
    return subprocess.run(
        [*launcher, str(HERE / "distributed_run.py"), "--out", str(out), *options],
        env={**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"},
        capture_output=True,
        text=True,
        timeout=900,  # a rank that waits for another waits for ever; a busy machine takes minutes
    )


def numbers(report: dict) -> torch.Tensor:
    return torch.tensor([[-1.0 if v is None else v for v in entry] for entry in report["history"]])


def assert_same_training(one: Path, two: Path, alone: dict, ranks: list[dict], world: int = 2) -> None:
    assert [r["world"] for r in ranks] == [world] * world
    assert {"fast", "slow"} == set(alone["modes"])
    for rank, report in enumerate(ranks):
        assert report["modes"] == alone["modes"]
        assert report["steps"] == alone["steps"]
        own = [mode == "fast" for mode in alone["modes"]]
        assert report["moved"] == own[-len(report["moved"]) :]  # a resumed run has seen the last steps alone
        assert report["eval_loss"] == pytest.approx(alone["eval_loss"], rel=1e-4)
        torch.testing.assert_close(numbers(report), numbers(alone), rtol=1e-4, atol=1e-5)
        expected, weights = (load_file(f / f"rank{r}.safetensors") for f, r in ((one, 0), (two, rank)))
        assert expected.keys() == weights.keys()
        for name, weight in weights.items():
            torch.testing.assert_close(weight, expected[name], rtol=1e-4, atol=1e-5, msg=name)
