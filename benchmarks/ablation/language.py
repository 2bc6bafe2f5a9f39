"""The ablation's language model: its words, and what it has learned before it sees a picture."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, Trainer, TrainingArguments

from hf_dualspeed.data.collators import IGNORED
from hf_dualspeed.recipes.tiny_llava import language_config, word_tokenizer

from .fashion_grid import ITEMS, NUMBERS, SIDE, Grid, Question, draw_items

WRITTEN_SIDE = 8  # patches in a row of a written grid
BATCH, LEARNING_RATE = 32, 1e-3


class WrittenGrids(nn.Module):
    """A language model that reads written grids and answers questions about them."""

    def __init__(self, language: LlamaForCausalLM):
        super().__init__()
        self.language = language
        width = language.config.hidden_size
        self.item, self.place = nn.Embedding(len(ITEMS), width), nn.Embedding(SIDE**2, width)
        for table in (self.item, self.place):
            nn.init.normal_(table.weight, std=2 * language.config.initializer_range)
        half = WRITTEN_SIDE // SIDE
        tiles = [row // half * SIDE + column // half for row in range(WRITTEN_SIDE) for column in range(WRITTEN_SIDE)]
        self.register_buffer("tile_of", torch.tensor(tiles), persistent=False)

    def forward(self, items: torch.Tensor, input_ids: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        """The loss of answers `(B, S)` about grids of `items` `(B, 4)`; `input_ids` begin with the BOS."""
        words = self.language.get_input_embeddings()(input_ids)
        patches = self.item(items[:, self.tile_of]) + self.place(self.tile_of)
        embeddings = torch.cat([words[:, :1], patches, words[:, 1:]], 1)
        unread = labels.new_full(patches.shape[:2], IGNORED)
        labels = torch.cat([labels[:, :1], unread, labels[:, 1:]], 1)
        return {"loss": self.language(inputs_embeds=embeddings, labels=labels).loss}


def pretrained_language_model(size: Size, folder: Path) -> dict[str, torch.Tensor]:
    """The weights of the language model without its head, trained where `folder` does not hold them yet."""
    steps = size.pretraining_steps
    path = folder / f"language-{size.hidden_size}x{size.layers}x{size.heads}-{steps}.safetensors"
    if not path.is_file():
        torch.manual_seed(0)
        model = WrittenGrids(LlamaForCausalLM(language_model_config(size, WRITTEN_SIDE**2)))
        rows = [written(number) for number in range(steps * BATCH)]
        train_plainly(model, rows, collate, steps, BATCH, LEARNING_RATE)
        save_whole(model.language.model.state_dict(), path)
    return load_file(path)


def train_plainly(
    model: nn.Module, rows: list[dict], collate: Callable, steps: int, batch: int, learning_rate: float
) -> None:
    """Trains with transformers' own Trainer, and leaves the model on the CPU."""
    args = TrainingArguments(
        output_dir="runs/ablation/store",
        max_steps=steps,
        per_device_train_batch_size=batch,
        learning_rate=learning_rate,
        adam_beta2=0.98,
        weight_decay=0.01,
        warmup_steps=0.05,
        lr_scheduler_type="cosine",
        logging_steps=max(1, steps // 10),
        save_strategy="no",
        report_to=[],
        use_cpu=not torch.accelerator.is_available(),
        remove_unused_columns=False,
    )
    Trainer(model, args, train_dataset=rows, data_collator=collate).train()
    model.cpu()


def save_whole(weights: dict[str, torch.Tensor], path: Path) -> None:
    """Saves through a second file, so that an interruption leaves no half of it behind."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    # Tied weights are one in memory.
    save_file({name: weight.clone().contiguous() for name, weight in weights.items()}, part)
    part.replace(path)


def collate(rows: list[dict]) -> dict[str, torch.Tensor]:
    """Batches of [`written`]'s rows."""
    fill = {"items": 0, "input_ids": tokenizer().pad_token_id, "labels": IGNORED}
    return {key: pad_sequence([torch.tensor(row[key]) for row in rows], True, value) for key, value in fill.items()}


def written(number: int) -> dict[str, list[int]]:
    """The written grid of a number, with eight questions."""
    generator = random.Random(f"written:{number}")
    grid = written_grid(generator)
    ids, labels = talk(grid.questions(generator))
    start = [tokenizer().bos_token_id]
    return {"items": list(grid.items), "input_ids": start + ids, "labels": [IGNORED, *labels]}


@dataclass(frozen=True)
class Size:
    """The language model, its steps on written grids, those of the model to start from, and how much data there is."""

    hidden_size: int = 128
    layers: int = 3
    heads: int = 4
    pretraining_steps: int = 1000
    start_steps: int = 250
    train_grids: int = 4000
    test_grids: int = 600


@cache
def tokenizer() -> PreTrainedTokenizerFast:
    """One token for each word of the questions and answers."""
    generator = random.Random(0)
    asked = [question.text for _ in range(100) for question in written_grid(generator).questions(generator)]
    return word_tokenizer([*asked, *ITEMS, *NUMBERS, "yes no"])


def written_grid(generator: random.Random) -> Grid:
    """A grid that has no tiles, only items."""
    return Grid(np.empty(0), draw_items(generator))


def language_model_config(size: Size, visual_tokens: int) -> LlamaConfig:
    """The language model's shape."""
    config = language_config(tokenizer(), size.hidden_size, size.layers, size.heads, visual_tokens)
    config.initializer_range = 0.04  # so narrow a model learns faster from it than from the usual 0.02
    return config


def talk(questions: list[Question]) -> tuple[list[int], list[int]]:
    """Ids and labels of questions and answers, one after the other."""
    ids, labels = [], []
    for question in questions:
        asked, right = _ids(f"USER: {question.text} ASSISTANT:"), [*_ids(question.answer), tokenizer().eos_token_id]
        ids += [*asked, *right]
        labels += [IGNORED] * len(asked) + right
    return ids, labels


@cache
def _ids(text: str) -> tuple[int, ...]:
    return tuple(tokenizer()(text, add_special_tokens=False)["input_ids"])
