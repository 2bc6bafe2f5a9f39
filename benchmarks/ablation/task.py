"""The ablation's model and data: a LLaVA with a small language model, on stored features of a world's scenes.

The tower is frozen, so each image is encoded once for all runs, as `vision_feature_cache` does within one run.

Shapes: B samples, S positions, N patches (144 or 576), D features (384).
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
from transformers import Dinov2Config, LlamaModel, LlavaConfig, LlavaForConditionalGeneration
from transformers.modeling_outputs import BaseModelOutput

from hf_dualspeed.data.collators import IGNORED
from hf_dualspeed.recipes.assemble import VISION
from hf_dualspeed.recipes.dinov2_onnx import read_vision_tower
from hf_dualspeed.recipes.tiny_llava import IMAGE, random_model
from hf_dualspeed.recipes.wheels import default_cache, fetch

from .fashion_grid import FASHION, Question
from .language import (
    Size,
    language_model_config,
    prefix_of,
    pretrained_language_model,
    save_whole,
    talk,
    tokenizer,
    train_plainly,
)
from .letters import LETTERS
from .reading import READING
from .tower import letter_tower, pixel_values
from .worlds import Scene, World

PATCH, FEATURES = 14, 384
ENCODED_AT_ONCE = 32
ASKED = 4  # questions per grid of the test split
START_BATCH, START_LEARNING_RATE = 16, 1e-3
# Features, language model and common start of all runs.
STORE = Path("runs/ablation/store")


def patches_of(world: World) -> int:
    return (world.pixels // PATCH) ** 2


def stored_features(
    split: str, count: int, folder: Path, world: World = FASHION, steps: int = 0, bf16: bool = False
) -> np.ndarray:
    """The tower's last states, after its norm, of a split's first scenes: `(count, 1 + N, D)` in float16.

    They are read from `folder`, or encoded and stored there. `steps` are those of [`tower_of`].
    """
    path = folder / f"{prefix_of(world, bf16)}{split}-{count}.npy"
    if not path.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        # By way of a second file, so that an interruption leaves no partial file.
        part = path.with_suffix(".part")
        tower = tower_of(world, folder, steps)
        _encode(tower, world.scenes(split, count), part, f"encoding the {split} images", bf16)
        part.replace(path)
    return np.load(path, mmap_mode="r")


@torch.no_grad()
def _encode(tower: nn.Module, made: list[Scene], path: Path, description: str, bf16: bool) -> None:
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    tower.to(device)
    shape = (len(made), 1 + (made[0].image().width // PATCH) ** 2, FEATURES)
    out = np.lib.format.open_memmap(path, "w+", np.float16, shape)
    for first in track(range(0, len(made), ENCODED_AT_ONCE), description=description):
        scenes = made[first : first + ENCODED_AT_ONCE]
        # States (b, 1 + N, D) of images (b, 3, H, W).
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16 and device.type == "cpu"):
            states = tower(pixel_values(scenes, device)).last_hidden_state
        out[first : first + len(scenes)] = states.half().cpu().numpy()
    out.flush()


def tower_of(world: World, folder: Path, steps: int) -> nn.Module:
    """The frozen tower: a pretrained DINOv2-small, or where there is something to read, one trained for `steps`."""
    if world.name in (LETTERS.name, READING.name):
        return letter_tower(world, folder, steps)
    return read_vision_tower(fetch(VISION, default_cache()))


@dataclass(frozen=True)
class Task:
    """Rows, features `(scenes, 1 + N, D)` by split, the common start's weights, and what the images show.

    A row has a scene's number, `input_ids`, `labels` and the kind of its last question.
    """

    train: list[dict[str, Any]]
    test: list[dict[str, Any]]
    features: dict[str, np.ndarray]
    start: dict[str, torch.Tensor]
    world: World = FASHION
    numbered: bool = False  # batches hold numbers of scenes, whose features the model holds
    bf16: bool = False  # products of matrices, in training and in answers

    def collator(self, split: str) -> Callable[[list[dict]], dict[str, torch.Tensor]]:
        """The collator for rows of a split."""
        if self.numbered:
            # In the table, those of the test come behind those of the training.
            return _collator(np.arange(len(self.features[split])) + self.first(split))
        return _collator(self.features[split])

    def first(self, split: str) -> int:
        return 0 if split == "train" else len(self.features["train"])

    def table(self) -> torch.Tensor:
        """Features of all scenes, `(scenes, 1 + N, D)` in float16."""
        return torch.from_numpy(np.concatenate([self.features["train"], self.features["test"]]))


def _collator(features: np.ndarray) -> Callable[[list[dict]], dict[str, torch.Tensor]]:
    """Collates rows to ids, mask and labels `(B, S)`, and stored features `(B, 1 + N, D)` as pixel values.

    Where `features` are numbers `(scenes,)`, pixel values are numbers `(B, 1, 1, 1)`.
    """
    pad = tokenizer().pad_token_id

    def collate(rows: list[dict]) -> dict[str, torch.Tensor]:
        ids = pad_sequence([torch.tensor(row["input_ids"]) for row in rows], True, pad)
        labels = pad_sequence([torch.tensor(row["labels"]) for row in rows], True, IGNORED)
        stored = np.stack([features[row["grid"]] for row in rows]).astype(np.float32)
        stored = stored.reshape(-1, 1, 1, 1) if stored.ndim == 1 else stored
        return {
            "input_ids": ids,
            "attention_mask": (ids != pad).long(),
            "labels": labels,
            "pixel_values": torch.from_numpy(stored),
        }

    return collate


@cache
def load_task(
    size: Size, folder: Path = STORE, world: World = FASHION, numbered: bool = False, bf16: bool = False
) -> Task:
    """Rows, features and start. What `folder` lacks is computed and stored there."""
    counts = {"train": size.train_grids, "test": size.test_grids}
    asked = {split: world.conversations(split, world.scenes(split, count)) for split, count in counts.items()}
    train = [encoded(number, questions, world) for number, questions in enumerate(asked["train"])]
    test = [
        encoded(number, [one], world) for number, questions in enumerate(asked["test"]) for one in questions[:ASKED]
    ]
    features = {
        split: stored_features(split, count, folder, world, size.pretraining_steps, bf16)
        for split, count in counts.items()
    }
    # The first half of the images trains the common start, the second half the runs.
    half = len(train) // 2
    start = _start(size, folder, world, train[:half], _collator(features["train"]), bf16)
    return Task(train[half:], test, features, start, world, numbered, bf16)


def encoded(grid: int, questions: list[Question], world: World = FASHION) -> dict[str, Any]:
    """A row of a conversation about a scene: the image's placeholders, then questions and supervised answers."""
    ids, labels = talk(questions, world)
    image = [tokenizer(world).convert_tokens_to_ids(IMAGE)] * patches_of(world)
    return {
        "grid": grid,
        "input_ids": [tokenizer(world).bos_token_id, *image, *ids],
        "labels": [IGNORED] * (1 + len(image)) + labels,
        "kind": questions[-1].kind,
    }


def majority(task: Task) -> float:
    """Accuracy of always giving the most frequent answer to each kind of question. It needs no image."""
    answers: dict[str, list[tuple]] = {kind: [] for kind in task.world.kinds}
    for row in task.test:
        answers[row["kind"]].append(tuple(label for label in row["labels"] if label != IGNORED))
    return sum(max(map(given.count, set(given)), default=0) for given in answers.values()) / len(task.test)


class StoredStates(nn.Module):
    """A tower that returns stored states `(B, 1 + N, D)`: its input, or those of a table that its input numbers."""

    def __init__(self, table: torch.Tensor | None = None):
        super().__init__()
        self.register_buffer("table", table, persistent=False)

    def forward(self, pixel_values: torch.Tensor, **kwargs) -> BaseModelOutput:
        # Numbers (B, 1, 1, 1) to states (B, 1 + N, D).
        states = pixel_values if self.table is None else self.table[pixel_values.flatten().long()].float()
        return BaseModelOutput(last_hidden_state=states, hidden_states=(states,))


def language_parameters(size: Size, world: World) -> int:
    """Parameters of the language model, whose head is its embeddings."""
    with torch.device("meta"):
        model = LlamaModel(language_model_config(size, patches_of(world), world))
    return sum(weight.numel() for weight in model.parameters())


def build_model(task: Task, size: Size) -> LlavaForConditionalGeneration:
    """The model that all runs start from. It is trained on all tokens, like models that are fine-tuned."""
    model = _new_model(size, STORE, task.world, task.bf16)
    model.load_state_dict(task.start, strict=False)
    if task.numbered:
        model.model.vision_tower = StoredStates(task.table())
    return model


def _new_model(size: Size, folder: Path, world: World, bf16: bool = False) -> LlavaForConditionalGeneration:
    """The pretrained language model with a new projector."""
    patches = patches_of(world)
    config = LlavaConfig(
        vision_config=Dinov2Config(
            hidden_size=FEATURES, num_hidden_layers=1, image_size=world.pixels, patch_size=PATCH
        ),
        text_config=language_model_config(size, patches, world),
        image_token_id=tokenizer(world).convert_tokens_to_ids(IMAGE),
        image_seq_length=patches,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        tie_word_embeddings=True,
    )
    model = random_model(config, 0)
    model.model.vision_tower = StoredStates()
    model.model.language_model.load_state_dict(pretrained_language_model(size, folder, world, bf16))
    return model


def _start(
    size: Size, folder: Path, world: World, rows: list[dict], collate: Callable, bf16: bool
) -> dict[str, torch.Tensor]:
    """The weights that all runs start from, from `folder`, or trained and stored there."""
    path = folder / f"{prefix_of(world, bf16)}start-{size.shape}-{size.start_steps}-{len(rows)}.safetensors"
    if not path.is_file():
        model = _new_model(size, folder, world, bf16)
        train_plainly(model, rows, collate, size.start_steps, START_BATCH, START_LEARNING_RATE, bf16)
        save_whole(model.state_dict(), path)
    return load_file(path)


@torch.no_grad()
def accuracy(
    model: nn.Module,
    task: Task,
    prepare: Callable[[dict[str, Any]], dict[str, Any]] | None = None,
    batch_size: int = 100,
    rows: list[dict[str, Any]] | None = None,
) -> dict[str, float]:
    """The share of test questions to which the model gives the right answer, greedily: in all, and by kind.

    Args:
        model (`nn.Module`): A trained model of [`build_model`].
        task ([`Task`]): Questions and features.
        prepare (`Callable`, *optional*): Maps the collator's batch to the model's inputs. It may prune.
        batch_size (`int`, *optional*, defaults to 100): Questions per batch.
        rows (`list[dict]`, *optional*): The questions; by default all of the test.
    """
    asked = task.test if rows is None else rows
    model.eval()
    device = next(model.parameters()).device
    collate, hits = task.collator("test"), []
    for first in range(0, len(asked), batch_size):
        batch = {key: value.to(device) for key, value in collate(asked[first : first + batch_size]).items()}
        with torch.autocast(device.type, torch.bfloat16, enabled=task.bf16):
            batch = batch if prepare is None else prepare(batch)
            labels = batch.pop("labels")
            logits = model(**batch).logits
        # Tokens of the answer, (B, S): the supervised ones but the last, which ends it.
        answer = labels != IGNORED
        answer &= answer.flip(1).cumsum(1).flip(1) > 1
        # Each has to be the most probable one behind those before it.
        right = logits[:, :-1].argmax(-1) == labels[:, 1:]
        hits += (right | ~answer[:, 1:]).all(1).tolist()
    shares = {
        kind: [hit for hit, row in zip(hits, asked, strict=True) if row["kind"] == kind] for kind in task.world.kinds
    }
    return {"all": sum(hits) / len(hits), **{kind: sum(own) / len(own) for kind, own in shares.items() if own}}
