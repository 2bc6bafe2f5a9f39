"""What is published of a pruner: its settings, the budget that follows from them, and its ratio over training."""

from __future__ import annotations

import json
import logging
import math
import sys
import types
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import ClassVar, Union, get_args, get_origin, get_type_hints

from ..arguments import check_choice, check_range
from ..hub_io import CONFIG_NAME

logger = logging.getLogger(__name__)

LARGEST_INTEGER = 2**31 - 1
SCHEDULES = ("constant", "linear", "cosine")
MERGE, DISCARD = "merge", "discard"


def budget(tokens: int, pruning_ratio: float) -> int:
    """Tokens kept of `tokens`: `max(1, floor(tokens * (1 - pruning_ratio)))`, 57 of 576 at 0.9."""
    # The small term undoes the rounding of 1 - ratio: 10 * (1 - 0.9) is 0.9999999999999998.
    return max(1, math.floor(tokens * (1 - pruning_ratio) + 1e-6)) if tokens else 0


@dataclass
class PrunerConfig:
    """What is published of a pruner: its registered name and its settings, as `pruner_config.json`.

    Args:
        pruning_ratio (`float`): fraction of the tokens removed; where it changes over training, at the end.
        pruning_schedule (`str`): "constant", or how it gets from `initial_pruning_ratio` there: "linear" or "cosine".
        initial_pruning_ratio (`float`, *optional*): the ratio at the start of training, where it changes.
        dropped_tokens (`str`): what becomes of the tokens that a selecting pruner does not keep: "merge" averages each
            into the kept one that is most similar to it; "discard" leaves them out, as the papers do. Pruners that
            merge by a rule of their own have no such setting.
    """

    pruner_type: ClassVar[str] = ""
    merges: ClassVar[bool] = False

    pruning_ratio: float = 0.9
    pruning_schedule: str = "constant"
    initial_pruning_ratio: float | None = None
    dropped_tokens: str = MERGE

    def __post_init__(self):
        check_range("pruning_ratio", self.pruning_ratio, 0, 1, right_open=True, off="Use 0.0 to turn pruning off.")
        check_choice("pruning_schedule", self.pruning_schedule, SCHEDULES)
        for setting in fields(self):
            value = getattr(self, setting.name)
            if setting.type in ("int", int) and (not isinstance(value, int) or isinstance(value, bool)):
                raise ValueError(f"`{setting.name}` must be a whole number, got {value!r}.")
        check_choice("dropped_tokens", self.dropped_tokens, (MERGE, DISCARD))
        if self.merges and self.dropped_tokens != MERGE:
            raise ValueError(
                f"`dropped_tokens` is {self.dropped_tokens!r}, but the pruner {self.pruner_type!r} merges tokens by a "
                "rule of its own. Leave it out, or choose a selecting pruner, such as 'divprune'."
            )
        initial = self.initial_pruning_ratio
        if self.pruning_schedule == "constant" and initial is not None:
            raise ValueError(
                f"`initial_pruning_ratio` is {initial!r}, but with pruning_schedule='constant' the ratio never "
                "changes. Set pruning_schedule='linear' or 'cosine', or leave it out."
            )
        if self.pruning_schedule != "constant":
            off = f"pruning_schedule={self.pruning_schedule!r} starts from it."
            check_range("initial_pruning_ratio", initial, 0, 1, right_open=True, off=off)

    def ratio_at(self, progress: float) -> float:
        """The pruning ratio when the fraction `progress` of training is done."""
        if self.pruning_schedule == "constant" or progress >= 1:
            return self.pruning_ratio
        done = progress if self.pruning_schedule == "linear" else (1 - math.cos(math.pi * progress)) / 2
        return self.initial_pruning_ratio + done * (self.pruning_ratio - self.initial_pruning_ratio)

    @property
    def lowest_ratio(self) -> float:
        """The pruning ratio where most tokens are kept."""
        return self.pruning_ratio if self.initial_pruning_ratio is None else min(self.ratio_at(0), self.pruning_ratio)

    def to_dict(self) -> dict:
        settings = asdict(self)
        if self.pruning_schedule == "constant":
            del settings["pruning_schedule"], settings["initial_pruning_ratio"]
        if self.merges:
            del settings["dropped_tokens"]
        return {"pruner_type": self.pruner_type, **settings}

    @classmethod
    def from_dict(cls, values: dict, where: str = CONFIG_NAME) -> PrunerConfig:
        """Builds the config of what a file holds, dropping keys of a newer version with a warning.

        Raises:
            ValueError: a value is of the wrong type or outside its range; the message names file, key and value.
        """
        known = {f.name for f in fields(cls)}
        unknown = sorted(set(values) - known - {"pruner_type", "auto_map"})
        if unknown:
            logger.warning("%s does not know %s of %s: ignored.", cls.__name__, ", ".join(unknown), where)
        hints = get_type_hints(cls)
        for key in sorted(known & values.keys()):
            if not fits(values[key], hints[key]):
                kind = getattr(hints[key], "__name__", str(hints[key]))
                raise ValueError(f"`{key}` in {where} must be of type {kind}, got {str(values[key])[:100]!r}.")
        try:
            return cls(**{key: value for key, value in values.items() if key in known})
        except ValueError as error:
            raise ValueError(f"In {where}: {error}") from None

    def save_pretrained(self, folder: str | Path, **extra) -> None:
        """Writes `pruner_config.json`, with `extra` keys beside the settings."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / CONFIG_NAME).write_text(json.dumps({**self.to_dict(), **extra}, indent=2) + "\n", encoding="utf-8")

    @staticmethod
    def from_pretrained(name: str | Path, *, trust_remote_code: bool = False, **hub) -> PrunerConfig:
        """Reads the config of whichever pruner the folder or Hub repo names; see [`AutoPruner.from_pretrained`]."""
        from .auto import load_config  # which knows the pruners, and they their configs

        return load_config(name, trust_remote_code, hub)[1]


def fits(value: object, hint: object) -> bool:
    """Whether a value from JSON is of a setting's type, and a number neither infinite nor beyond 32 bits."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return any(fits(value, option) for option in inner)
    if hint is float:
        return type(value) in (int, float) and abs(value) <= sys.float_info.max
    if hint is int:
        return type(value) is int and abs(value) <= LARGEST_INTEGER
    if origin in (list, tuple):
        return isinstance(value, (list, tuple)) and all(fits(item, inner[0]) for item in value)
    return isinstance(value, hint) if hint in (str, bool, list, dict, type(None)) else True
