"""Words, conversations and language model of the ablation."""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import cache

import numpy as np
from transformers import LlamaConfig, PreTrainedTokenizerFast

from hf_dualspeed.data import IGNORED
from hf_dualspeed.fashion_grid import ITEMS, NUMBERS, Grid, Question, draw_items
from hf_dualspeed.tiny_llava import language_config, word_tokenizer


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
