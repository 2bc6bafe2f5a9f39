"""The ablation's language model: its tokenizer, and its pretraining on written grids."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from safetensors.torch import load_file, save
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, Trainer, TrainingArguments

from hf_dualspeed.data.collators import IGNORED
from hf_dualspeed.recipes.tiny_llava import language_config, word_tokenizer
from hf_dualspeed.utils.writing import write_file

from .fashion_grid import FASHION, Question
from .worlds import World

WRITTEN_SIDE = 8  # patches in a row of a written scene
BATCH, LEARNING_RATE = 32, 1e-3


class WrittenGrids(nn.Module):
    """A language model that answers questions about written scenes: embeddings of items and places, no images."""

    def __init__(self, language: LlamaForCausalLM, world: World = FASHION):
        super().__init__()
        self.language = language
        width = language.config.hidden_size
        places = max(world.layout) + 1
        self.item, self.place = nn.Embedding(world.codes, width), nn.Embedding(places, width)
        for table in (self.item, self.place):
            nn.init.normal_(table.weight, std=2 * language.config.initializer_range)
        # The place of each of 8 x 8 patches: (64,).
        self.register_buffer("tile_of", torch.tensor(world.layout), persistent=False)

    def forward(self, items: torch.Tensor, input_ids: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        """The loss of answers `(B, S)` about scenes of `items` `(B, places)`. `input_ids` begin with the BOS."""
        # Embed words (B, S, D) and patches (B, 64, D), and put the patches behind the BOS.
        words = self.language.get_input_embeddings()(input_ids)
        patches = self.item(items[:, self.tile_of]) + self.place(self.tile_of)
        embeddings = torch.cat([words[:, :1], patches, words[:, 1:]], 1)
        # No loss on patches: labels become (B, S + 64).
        unread = labels.new_full(patches.shape[:2], IGNORED)
        labels = torch.cat([labels[:, :1], unread, labels[:, 1:]], 1)
        return {"loss": self.language(inputs_embeds=embeddings, labels=labels).loss}


def pretrained_language_model(
    size: Size, folder: Path, world: World = FASHION, bf16: bool = False
) -> dict[str, torch.Tensor]:
    """The language model's weights without its head, from `folder`, or trained and stored there."""
    steps = size.pretraining_steps
    path = folder / f"{prefix_of(world, bf16)}language-{size.shape}-{steps}.safetensors"
    if not path.is_file():
        torch.manual_seed(0)
        model = WrittenGrids(LlamaForCausalLM(language_model_config(size, WRITTEN_SIDE**2, world)), world)
        rows = [written(number, world) for number in range(steps * BATCH)]
        train_plainly(model, rows, collate, steps, BATCH, LEARNING_RATE, bf16)
        save_whole(model.language.model.state_dict(), path)
    return load_file(path)


def prefix_of(world: World, bf16: bool = False) -> str:
    """What files of a world and a precision begin with; those of the first world in float32 with nothing."""
    return ("" if world.name == FASHION.name else f"{world.name}-") + ("bf16-" if bf16 else "")


def train_plainly(
    model: nn.Module,
    rows: list[dict],
    collate: Callable,
    steps: int,
    batch: int,
    learning_rate: float,
    bf16: bool = False,
) -> None:
    """Trains with `transformers.Trainer` and moves the model to the CPU."""
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
        bf16=bf16 or torch.cuda.is_available(),
        remove_unused_columns=False,
    )
    Trainer(model, args, train_dataset=rows, data_collator=collate).train()
    model.cpu()


def save_whole(weights: dict[str, torch.Tensor], path: Path) -> None:
    """Saves weights; safetensors refuses tied ones, which share memory, so they are copied."""
    write_file(path, save({name: weight.clone().contiguous() for name, weight in weights.items()}))


def collate(rows: list[dict]) -> dict[str, torch.Tensor]:
    """Pads rows of [`written`] to a batch."""
    fill = {"items": 0, "input_ids": tokenizer().pad_token_id, "labels": IGNORED}
    return {key: pad_sequence([torch.tensor(row[key]) for row in rows], True, value) for key, value in fill.items()}


def written(number: int, world: World = FASHION) -> dict[str, list[int]]:
    """A row of a written scene with eight questions. The number is its seed."""
    generator = random.Random(f"written:{number}")
    scene = world.drawn(generator)
    ids, labels = talk(scene.questions(generator), world)
    start = [tokenizer(world).bos_token_id]
    return {"items": list(scene.items), "input_ids": start + ids, "labels": [IGNORED, *labels]}


@dataclass(frozen=True)
class Size:
    """Sizes of the language model, steps of its pretraining and of the common start, and numbers of grids."""

    hidden_size: int = 128
    layers: int = 3
    heads: int = 4
    pretraining_steps: int = 1000
    start_steps: int = 250
    train_grids: int = 4000
    test_grids: int = 600

    @property
    def shape(self) -> str:
        """The language model's, in file names."""
        return f"{self.hidden_size}x{self.layers}x{self.heads}"


@cache
def tokenizer(world: World = FASHION) -> PreTrainedTokenizerFast:
    """A tokenizer with one token per word of questions and answers."""
    return word_tokenizer(world.texts)


def language_model_config(size: Size, visual_tokens: int, world: World = FASHION) -> LlamaConfig:
    """The configuration of the language model."""
    config = language_config(tokenizer(world), size.hidden_size, size.layers, size.heads, visual_tokens)
    config.initializer_range = 0.04  # a narrow model learns faster than with the usual 0.02
    return config


def talk(questions: list[Question], world: World = FASHION) -> tuple[list[int], list[int]]:
    """Token ids and labels of a conversation. Only answers are supervised."""
    ids, labels = [], []
    for question in questions:
        asked = _ids(f"USER: {question.text} ASSISTANT:", world)
        right = [*_ids(question.answer, world), tokenizer(world).eos_token_id]
        ids += [*asked, *right]
        labels += [IGNORED] * len(asked) + right
    return ids, labels


@cache
def _ids(text: str, world: World) -> tuple[int, ...]:
    return tuple(tokenizer(world)(text, add_special_tokens=False)["input_ids"])
