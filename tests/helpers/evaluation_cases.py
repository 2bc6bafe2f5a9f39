"""A tiny checkpoint, questions about pictures, and the command that asks them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from datasets import load_dataset
from PIL import Image
from transformers import LlavaForConditionalGeneration

from hf_dualspeed import AutoPruner, ModeIsolator
from hf_dualspeed.commands.evaluate import main
from hf_dualspeed.recipes.tiny_llava import build_tiny_llava

COLOURS = ["red", "green", "blue", "white", "black", "orange", "purple"]
VISUAL, ISOLATOR = 16, 2
SIZES = {"image_size": 16, "vision_hidden_size": 8, "vision_layers": 1, "hidden_size": 16, "layers": 1, "heads": 2}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A run's folder, and seven questions about images of one colour each."""
    folder = tmp_path_factory.mktemp("made")
    model, processor = build_tiny_llava(["which colour is it ?", " ".join(COLOURS)], **SIZES)
    with torch.no_grad():  # as drawn, all answers would be the same
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(15)
    run = folder / "run"
    model.save_pretrained(run)
    processor.save_pretrained(run)
    torch.manual_seed(0)
    ModeIsolator(ISOLATOR, SIZES["hidden_size"], std=1.0).save_pretrained(run)
    AutoPruner.from_name("random", pruning_ratio=0.75).save_pretrained(run)
    settings = {"pruner": {"pruner_type": "random", "pruning_ratio": 0.75}, "position_ids": "compact"}
    (run / "results.json").write_text(
        json.dumps({"name": "run", "settings": settings, "steps": {"fast": 3, "slow": 1}})
    )
    (run / "README.md").write_text("## Mine\n\nMy words.\n")
    for colour in COLOURS:
        Image.new("RGB", (20, 16), colour).save(folder / f"{colour}.png")
    write_rows(folder / "data.json", rows())
    return folder


def rows(**more) -> list[dict]:
    def row(number: int, colour: str) -> dict:
        question = "<image>\n" + "which colour is it ? " * (1 + number % 3)
        turns = [{"from": "human", "value": question}, {"from": "gpt", "value": colour}]
        return {"id": number, "image": f"{colour}.png", "conversations": turns, **more}

    return [row(number, colour) for number, colour in enumerate(COLOURS)]


def write_rows(path: Path, table: list[dict]) -> None:
    path.write_text(json.dumps(table))


@pytest.fixture
def folder(made, tmp_path, monkeypatch):
    """A copy of it, where the test runs."""
    shutil.copytree(made, tmp_path / "made")
    monkeypatch.chdir(tmp_path / "made")
    monkeypatch.delenv("DUALSPEED_DEBUG", raising=False)
    return tmp_path / "made"


@pytest.fixture
def asked(monkeypatch):
    """The shapes of the prompts that models generate from; `asked.stop_at` interrupts before that call."""

    class Asked(list):
        stop_at = None

    seen, generate = Asked(), LlavaForConditionalGeneration.generate

    def spy(model, **inputs):
        if len(seen) == seen.stop_at:
            raise KeyboardInterrupt
        seen.append(tuple(inputs["input_ids"].shape))
        return generate(model, **inputs)

    monkeypatch.setattr(LlavaForConditionalGeneration, "generate", spy)
    return seen


def evaluate(*words: str, checkpoint: str = "run", data: str = "data.json") -> int:
    return main([checkpoint, "--dataset", data, "--batch_size", "2", "--max_new_tokens", "3", *words])


def kept(view: str, folder: str = "run/evaluations/data.json") -> list[dict]:
    return load_dataset("parquet", data_files=f"{folder}/{view}.parquet", split="train").to_list()


def texts(*where: str) -> list[str]:
    return [row["prediction"] for row in kept(*where)]
