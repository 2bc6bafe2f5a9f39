"""A recipe in two processes whose data has faults."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from data_cases import picture
from launching import DDP, ROOT
from recipe_cases import TINY


@pytest.mark.distributed
@pytest.mark.parametrize("policy", ["raise", "skip"])
def test_ranks_share_the_look_at_the_data_and_agree(tmp_path, policy):
    rows = []
    for index in range(8):
        picture(40, 40).save(tmp_path / f"{index}.png")
        rows.append({"id": index, "question": "what colour ?", "answer": "red", "image": f"{index}.png"})
    for index in (2, 5):  # a row of each rank
        (tmp_path / f"{index}.png").unlink()
    for index in (4, 7):  # cut off behind their headers, which is all that the look reads
        whole = (tmp_path / f"{index}.png").read_bytes()
        (tmp_path / f"{index}.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "data.json").write_text(json.dumps(rows), encoding="utf-8")
    options = {"tiny_llava": json.dumps(TINY), "dataset": str(tmp_path / "data.json"), "unreadable_images": policy}
    options |= {"output_dir": str(tmp_path / "run"), "use_cpu": "true", "max_steps": "3", "report_to": "none"}
    options |= {"per_device_train_batch_size": "1", "save_strategy": "no", "logging_steps": "1"}
    words = [word for key, value in options.items() for word in (f"--{key}", value)]
    launcher = ["-m", "accelerate.commands.launch", "--config_file", str(DDP), "--main_process_port", "0"]
    done = subprocess.run(
        [sys.executable, *launcher, str(ROOT / "train.py"), *words],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    said = done.stdout + done.stderr
    if policy == "raise":
        assert done.returncode != 0
        assert "'data.json': 2 of 8 samples cannot be used" in said
        assert not (tmp_path / "run").exists()
        return
    assert done.returncode == 0, said[-5000:]
    assert said.count("'data.json': 2 of 8 samples are left out") == 1
    assert "Left out sample 0 of the batch" in said
    assert sum(json.loads((tmp_path / "run" / "results.json").read_text())["steps"].values()) == 3
