"""The scripts in examples/ and the notebooks run as they stand, on a tiny model."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import pytest
from datasets import Dataset
from recipe_cases import TINY
from tiny_models import picture
from transformers import AutoModelForImageTextToText

from hf_dualspeed.evaluation.merge import merge
from hf_dualspeed.recipes.tiny_llava import build_tiny_llava

ROOT = Path(__file__).parents[2]
SCRIPTS = sorted((ROOT / "examples").glob("*.py"))


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a model, ten pictures and a question about each."""
    folder = tmp_path_factory.mktemp("examples")
    model, processor = build_tiny_llava(["What is it ?", "noise", "on the table"], **{**TINY, "image_size": 64})
    model.save_pretrained(folder / "model")
    processor.save_pretrained(folder / "model")
    rows = [{"image": f"{number}.png", "question": "What is it ?", "answer": "noise"} for number in range(10)]
    for row in rows:
        picture().save(folder / row["image"])
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def start(monkeypatch, name, *words):
    monkeypatch.setattr(sys, "argv", [name, *map(str, words)])
    monkeypatch.setenv("CI", "true")  # TRL sends no telemetry then
    return runpy.run_path(str(ROOT / "examples" / name), run_name="__main__")


def test_scripts_are_short():
    assert len(SCRIPTS) == 3
    assert [path.name for path in SCRIPTS if len(path.read_text(encoding="utf-8").splitlines()) >= 40] == []


def test_lora_on_data_of_ones_own(place, tmp_path, monkeypatch):
    start(monkeypatch, "lora.py", place / "model", place / "train.jsonl", tmp_path / "run", "--cpu")
    assert "DualSpeed" in (tmp_path / "run" / "README.md").read_text()
    merge(str(tmp_path / "run"), tmp_path / "merged")
    _, info = AutoModelForImageTextToText.from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not any(info.values())


@pytest.mark.parametrize("of_trl", [False, True])
def test_sft(place, tmp_path, monkeypatch, of_trl):
    """On a file of one's own, and on a data set in TRL's columns, which holds the pictures themselves."""
    pytest.importorskip("trl")
    data = place / "train.jsonl"
    if of_trl:
        turns = {"prompt": ("user", "What is it ?"), "completion": ("assistant", "noise")}
        row = {column: [{"role": role, "content": text}] for column, (role, text) in turns.items()}
        Dataset.from_list([{**row, "images": [picture()]}] * 4).save_to_disk(tmp_path / "data")
        data = tmp_path / "data"
    ran = start(monkeypatch, "sft.py", place / "model", data, tmp_path / "run", "--cpu")
    assert sum(ran["trainer"].clock.steps.values()) == ran["trainer"].state.max_steps > 0
    assert (tmp_path / "run" / "adapter_model.safetensors").is_file()


def test_pruned_answers(place, monkeypatch, capsys):
    start(monkeypatch, "pruned_answers.py", place / "model", place / "0.png", "What is it ?")
    first, *rest = capsys.readouterr().out.splitlines()
    assert first.split()[0] == "all:"
    assert [line.split(":")[0].strip() for line in rest] == ["divprune", "grid", "random", "tome"]
    lengths = [int(line.split()[1]) for line in (first, *rest)]
    assert max(lengths[1:]) < lengths[0]


# What notebooks leave to a real model, and tests have to keep small.
SMALL = {
    "STEPS = 400": "STEPS = 4",
    "patch_size=4, vision_hidden_size=64, vision_layers=2, hidden_size=128": "patch_size=16, hidden_size=32",
    "layers=4, heads=4": "layers=2, heads=2",
    "runs/notebook": "run",
    "HuggingFaceTB/SmolVLM-256M-Instruct": "{place}/model",
    "llava-hf/llava-1.5-7b-hf": "{place}/model",
    "train.jsonl": "{place}/train.jsonl",
    "runs/mine": "run",
    "photo.jpg": "{place}/0.png",
    "What is in the picture?": "What is it ?",
    "dtype=torch.bfloat16": "dtype=torch.float32",
    "    activation_checkpointing=True,": "    activation_checkpointing=True, use_cpu=True,",
    "    max_steps=STEPS,": "    max_steps=STEPS, speedup_rounds=0,",
}


@pytest.mark.parametrize("path", sorted((ROOT / "notebooks").glob("*.ipynb")), ids=lambda path: path.stem)
def test_notebooks_run_from_the_first_cell_to_the_last(place, tmp_path, monkeypatch, path):
    if path.stem == "quickstart":
        pytest.importorskip("easy_vqa")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "agg")
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    scope: dict = {}
    for cell in cells:
        if cell["cell_type"] == "code":
            code = "".join(cell["source"])
            for large, small in SMALL.items():
                code = code.replace(large, small.format(place=place))
            exec(compile(code, f"{path.name}, {cell['id']}", "exec"), scope)
    if "trainer" in scope:
        assert scope["trainer"].state.global_step == scope["trainer"].state.max_steps
        assert (tmp_path / "run" / "results.json").is_file()
    else:
        assert list(scope["pictures"]) == ["all tokens", *scope["PRUNERS"]]
        assert scope["pictures"]["grid"] is not scope["image"]


def test_every_replacement_has_something_to_replace():
    texts = "".join(
        "".join(cell["source"])
        for path in (ROOT / "notebooks").glob("*.ipynb")
        for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]
    )
    assert [large for large in SMALL if large not in texts] == []
