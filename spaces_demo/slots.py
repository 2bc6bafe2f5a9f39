"""The three slots for checkpoints: what fills them, and their answers."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from inference import LOAD_ERRORS, Answer, Checkpoint, InputError
from overlay import SHAPES_DATA
from PIL import Image

from hf_dualspeed.utils.text import parse_json

HERE = Path(__file__).parent
CHECKPOINTS = HERE / "checkpoints.json"  # written by `dualspeed space`


@dataclass(frozen=True)
class Role:
    """What a slot is for, and its default run. What was trained in truth, the checkpoint's results say."""

    title: str
    default: str


ROLES = {
    "baseline": Role("Full-token baseline", "runs/quickstart_full"),
    "dualspeed": Role("DualSpeed", "runs/quickstart"),
    "pruned": Role("Pruned-trained", "runs/quickstart_pruned"),
}


@dataclass
class Slot:
    """A role with its checkpoint, or the reason why there is none."""

    key: str
    name: str | None = None
    checkpoint: Checkpoint | None = None
    problem: str = ""

    @property
    def role(self) -> Role:
        return ROLES[self.key]

    def told(self, *path: str) -> object:
        """What the checkpoint's results.json, which may be anybody's, holds at a path of keys; None for nothing."""
        found = self.checkpoint and self.checkpoint.results
        for key in path:
            found = found.get(key) if isinstance(found, dict) else None
        return found

    def number(self, *path: str) -> float | None:
        """What results.json holds there, where it is a number."""
        found = self.told(*path)
        return found if type(found) in (int, float) and math.isfinite(found) else None

    def title(self) -> str:
        """The role that the checkpoint's own steps tell of; that of the slot where they are unknown."""
        fast, slow = self.number("steps", "fast"), self.number("steps", "slow")
        if fast is None or slow is None:
            return self.role.title
        return ROLES["baseline" if not fast else "dualspeed" if slow else "pruned"].title


@dataclass
class Pair:
    """A checkpoint's answers from all and from pruned tokens, each an answer or the reason why there is none."""

    full: Answer | str
    pruned: Answer | str


def chosen_names(given: Mapping[str, str | None]) -> dict[str, str | None]:
    """The checkpoint of each role: the given one, else from the environment, checkpoints.json or the default run."""
    listed = listed_names()
    names = {}
    for key, role in ROLES.items():
        default = role.default if Path(role.default).is_dir() else None
        names[key] = given.get(key) or os.environ.get(f"DEMO_{key.upper()}") or listed.get(key) or default
    return names


def listed_names() -> dict[str, str]:
    """The names in checkpoints.json, by role; {} without such a file.

    Raises:
        ValueError: it holds anything else.
    """
    try:
        listed = parse_json(CHECKPOINTS.read_bytes()) if CHECKPOINTS.is_file() else {}
        if not isinstance(listed, dict) or not all(isinstance(name, str) for name in listed.values()):
            raise ValueError(f"it must hold names of checkpoints by role, got {str(listed)[:100]!r}")
    except ValueError as error:
        raise ValueError(f"{str(CHECKPOINTS)!r} cannot be read: {error}. Push the Space again.") from None
    return listed


def load_slots(names: Mapping[str, str | None]) -> list[Slot]:
    """Loads all checkpoints. A slot whose checkpoint cannot be loaded holds the reason."""
    return [load_slot(key, names.get(key)) for key in ROLES]


def load_slot(key: str, name: str | None) -> Slot:
    if name is None:
        return Slot(key, problem=f"No checkpoint. Start with --{key} FOLDER or a Hub id.")
    try:
        return Slot(key, name, Checkpoint(name))
    except LOAD_ERRORS as error:
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        return Slot(key, name, problem=f"Could not be loaded: {reason}")


def loaded(slots: Iterable[Slot]) -> list[Checkpoint]:
    return [slot.checkpoint for slot in slots if slot.checkpoint is not None]


def know_shapes_alone(slots: list[Slot]) -> bool:
    """Whether all loaded checkpoints, and there is one, were trained on drawn shapes and on nothing else."""
    known = [slot.told("datasets") for slot in slots if slot.checkpoint is not None]
    return bool(known) and all(names == [SHAPES_DATA] for names in known)


def ask(slots: list[Slot], image: Image.Image, question: str, pruner: str, ratio: float) -> dict[str, Pair]:
    """The answers of all checkpoints, by role.

    Raises:
        InputError: no checkpoint is loaded.
    """
    if not loaded(slots):
        raise InputError("No checkpoint is loaded, so nobody can answer. The cards below say why.")
    return {slot.key: pair(slot.checkpoint, image, question, pruner, ratio) for slot in slots if slot.checkpoint}


def pair(checkpoint: Checkpoint, image: Image.Image, question: str, pruner: str, ratio: float) -> Pair:
    full = None
    try:
        full = checkpoint.answer(image, question)
        return Pair(full, checkpoint.answer(image, question, checkpoint.pruner(pruner, ratio)))
    except ValueError as error:  # the picture, or the pruner, does not work with this model
        if full is None and isinstance(error, InputError):
            raise
        reason = " ".join(str(error).split())[:300]
        return Pair(full or reason, reason)
