"""The ablation's model and data: a LLaVA with a small language model, on stored DINOv2 features of [`fashion_grid`].

The tower is frozen, so each image is encoded once for all runs, as `vision_feature_cache` does within one run.

Shapes: B samples, S positions, N patches (144), D features (384).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.progress import track
from safetensors.torch import load_file
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from transformers import Dinov2Config, LlavaConfig, LlavaForConditionalGeneration
from transformers.modeling_outputs import BaseModelOutput

from hf_dualspeed.data.collators import IGNORED
from hf_dualspeed.recipes.assemble import IMAGENET_MEAN, IMAGENET_STD, VISION
from hf_dualspeed.recipes.dinov2_onnx import read_vision_tower
from hf_dualspeed.recipes.tiny_llava import IMAGE, random_model
from hf_dualspeed.recipes.wheels import default_cache, fetch

from .fashion_grid import KINDS, Grid, Question, conversations, grids
from .language import Size, language_model_config, pretrained_language_model, save_whole, talk, tokenizer, train_plainly

PATCHES, FEATURES = 144, 384
ENCODED_AT_ONCE = 32
ASKED = 4  # questions per grid of the test split
START_BATCH, START_LEARNING_RATE = 16, 1e-3
# Features, language model and common start of all runs.
STORE = Path("runs/ablation/store")


def stored_features(split: str, count: int, folder: Path) -> np.ndarray:
    """The tower's last states, after its norm, of a split's first grids: `(count, 1 + N, D)` in float16.

    They are read from `folder`, or encoded and stored there.
    """
    path = folder / f"{split}-{count}.npy"
    if not path.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        # By way of a second file, so that an interruption leaves no partial file.
        part = path.with_suffix(".part")
        _encode(grids(split, count), part, f"encoding the {split} images")
        part.replace(path)
    return np.load(path, mmap_mode="r")


@torch.no_grad()
def _encode(made: list[Grid], path: Path, description: str) -> None:
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    tower = read_vision_tower(fetch(VISION, default_cache())).to(device)
    out = np.lib.format.open_memmap(path, "w+", np.float16, (len(made), 1 + PATCHES, FEATURES))
    mean, std = (torch.tensor(values, device=device).view(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
    for first in track(range(0, len(made), ENCODED_AT_ONCE), description=description):
        images = [np.array(grid.image()) for grid in made[first : first + ENCODED_AT_ONCE]]
        # Pixels (b, H, W, 3) in bytes to (b, 3, H, W), normalised; states (b, 1 + N, D).
        pixels = torch.from_numpy(np.stack(images)).to(device).movedim(-1, 1) / 255
        states = tower((pixels - mean) / std).last_hidden_state
        out[first : first + len(images)] = states.half().cpu().numpy()
    out.flush()


@dataclass(frozen=True)
class Task:
    """Rows, features `(grids, 1 + N, D)` by split, and the common start's weights.

    A row has a grid's number, `input_ids`, `labels` and the kind of its last question.
    """

    train: list[dict[str, Any]]
    test: list[dict[str, Any]]
    features: dict[str, np.ndarray]
    start: dict[str, torch.Tensor]

    def collator(self, split: str) -> Callable[[list[dict]], dict[str, torch.Tensor]]:
        """The collator for rows of a split."""
        return _collator(self.features[split])


def _collator(features: np.ndarray) -> Callable[[list[dict]], dict[str, torch.Tensor]]:
    """Collates rows to ids, mask and labels `(B, S)`, and stored features `(B, 1 + N, D)` as pixel values."""
    pad = tokenizer().pad_token_id

    def collate(rows: list[dict]) -> dict[str, torch.Tensor]:
        ids = pad_sequence([torch.tensor(row["input_ids"]) for row in rows], True, pad)
        labels = pad_sequence([torch.tensor(row["labels"]) for row in rows], True, IGNORED)
        stored = np.stack([features[row["grid"]] for row in rows]).astype(np.float32)
        return {
            "input_ids": ids,
            "attention_mask": (ids != pad).long(),
            "labels": labels,
            "pixel_values": torch.from_numpy(stored),
        }

    return collate


@cache
def load_task(size: Size, folder: Path = STORE) -> Task:
    """Rows, features and start. What `folder` lacks is computed and stored there."""
    counts = {"train": size.train_grids, "test": size.test_grids}
    asked = {split: conversations(split, grids(split, count)) for split, count in counts.items()}
    train = [encoded(number, questions) for number, questions in enumerate(asked["train"])]
    test = [encoded(number, [one]) for number, questions in enumerate(asked["test"]) for one in questions[:ASKED]]
    features = {split: stored_features(split, count, folder) for split, count in counts.items()}
    # The first half of the images trains the common start, the second half the runs.
    half = len(train) // 2
    return Task(train[half:], test, features, _start(size, folder, train[:half], _collator(features["train"])))


def encoded(grid: int, questions: list[Question]) -> dict[str, Any]:
    """A row of a conversation about a grid: the image's placeholders, then questions and supervised answers."""
    ids, labels = talk(questions)
    image = [tokenizer().convert_tokens_to_ids(IMAGE)] * PATCHES
    return {
        "grid": grid,
        "input_ids": [tokenizer().bos_token_id, *image, *ids],
        "labels": [IGNORED] * (1 + PATCHES) + labels,
        "kind": questions[-1].kind,
    }


def majority(task: Task) -> float:
    """Accuracy of always giving the most frequent answer to each kind of question. It needs no image."""
    answers: dict[str, list[int]] = {kind: [] for kind in KINDS}
    for row in task.test:
        answers[row["kind"]].append(row["labels"][-2])
    return sum(max(map(given.count, set(given))) for given in answers.values()) / len(task.test)


class StoredStates(nn.Module):
    """A tower that returns its input `(B, 1 + N, D)`, the stored states."""

    def forward(self, pixel_values: torch.Tensor, **kwargs) -> BaseModelOutput:
        return BaseModelOutput(last_hidden_state=pixel_values, hidden_states=(pixel_values,))


def build_model(task: Task, size: Size) -> LlavaForConditionalGeneration:
    """The model that all runs start from. It is trained on all tokens, like models that are fine-tuned."""
    model = _new_model(size, STORE)
    model.load_state_dict(task.start, strict=False)
    return model


def _new_model(size: Size, folder: Path) -> LlavaForConditionalGeneration:
    """The pretrained language model with a new projector."""
    config = LlavaConfig(
        vision_config=Dinov2Config(hidden_size=FEATURES, num_hidden_layers=1, image_size=168, patch_size=14),
        text_config=language_model_config(size, PATCHES),
        image_token_id=tokenizer().convert_tokens_to_ids(IMAGE),
        image_seq_length=PATCHES,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        tie_word_embeddings=True,
    )
    model = random_model(config, 0)
    model.model.vision_tower = StoredStates()
    model.model.language_model.load_state_dict(pretrained_language_model(size, folder))
    return model


def _start(size: Size, folder: Path, rows: list[dict], collate: Callable) -> dict[str, torch.Tensor]:
    """The weights that all runs start from, from `folder`, or trained and stored there."""
    path = folder / f"start-{size.hidden_size}x{size.layers}x{size.heads}-{size.start_steps}-{len(rows)}.safetensors"
    if not path.is_file():
        model = _new_model(size, folder)
        train_plainly(model, rows, collate, size.start_steps, START_BATCH, START_LEARNING_RATE)
        save_whole(model.state_dict(), path)
    return load_file(path)


@torch.no_grad()
def accuracy(
    model: nn.Module,
    task: Task,
    prepare: Callable[[dict[str, Any]], dict[str, Any]] | None = None,
    batch_size: int = 100,
) -> dict[str, float]:
    """The share of test questions whose answer, one word, is the most probable next token: in all, and by kind.

    Args:
        model (`nn.Module`): A trained model of [`build_model`].
        task ([`Task`]): Questions and features.
        prepare (`Callable`, *optional*): Maps the collator's batch to the model's inputs. It may prune.
        batch_size (`int`, *optional*, defaults to 100): Questions per batch.
    """
    model.eval()
    device = next(model.parameters()).device
    collate, hits = task.collator("test"), []
    for first in range(0, len(task.test), batch_size):
        batch = {key: value.to(device) for key, value in collate(task.test[first : first + batch_size]).items()}
        batch = batch if prepare is None else prepare(batch)
        labels = batch.pop("labels")
        # The answer's place (B,) is the first supervised one; its logits (B, V) stand one place before.
        place = (labels != IGNORED).int().argmax(1)
        rows = torch.arange(len(labels), device=device)
        answers = model(**batch).logits[rows, place - 1].argmax(-1)
        hits += (answers == labels[rows, place]).tolist()
    shares = {kind: [hit for hit, row in zip(hits, task.test, strict=True) if row["kind"] == kind] for kind in KINDS}
    return {"all": sum(hits) / len(hits), **{kind: sum(own) / len(own) for kind, own in shares.items()}}
