"""Settings of a pruner, the token budget that follows from them, and the pruning ratio over training."""

from __future__ import annotations

import logging
import math
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from ..hub.source import Source, code_file, find_source, load_class, read_json
from ..utils.constants import PRUNER_CONFIG_NAME
from ..utils.validation import check_choice, check_fields, check_range, fits, hints_of
from ..utils.writing import write_json
from .registry import available_pruners, is_fetched, keep_class, known_class, pruner_class

if TYPE_CHECKING:
    from .base import Pruner

logger = logging.getLogger(__name__)

AUTO_CLASS = "AutoPruner"  # the key of a pruner's code in `auto_map`
SCHEDULES = ("constant", "linear", "cosine")
MERGE, DISCARD = "merge", "discard"


def budget(tokens: int, pruning_ratio: float) -> int:
    """Tokens kept of `tokens`: `max(1, floor(tokens * (1 - pruning_ratio)))`, 57 of 576 at 0.9."""
    # The small term undoes the rounding of 1 - ratio: 10 * (1 - 0.9) is 0.9999999999999998.
    return max(1, math.floor(tokens * (1 - pruning_ratio) + 1e-6)) if tokens else 0


@dataclass
class PrunerConfig:
    """Registered name and settings of a pruner, saved as `pruner_config.json`.

    Args:
        pruning_ratio (`float`): fraction of the tokens removed, at the end of training if it changes.
        pruning_schedule (`str`): "constant", or how the ratio leaves `initial_pruning_ratio`: "linear" or "cosine".
        initial_pruning_ratio (`float`, *optional*): the ratio at the start of training, if it changes.
        dropped_tokens (`str`): what a selecting pruner does with dropped tokens: "merge" averages each into the most
            similar kept token; "discard" removes them, as the papers do. Pruners with a merging rule of their own have
            no such setting.
    """

    pruner_type: ClassVar[str] = ""
    merges: ClassVar[bool] = False

    pruning_ratio: float = 0.9
    pruning_schedule: str = "constant"
    initial_pruning_ratio: float | None = None
    dropped_tokens: str = MERGE

    def __post_init__(self):
        check_fields(self)
        check_range("pruning_ratio", self.pruning_ratio, 0, 1, right_open=True, off="Use 0.0 to turn pruning off.")
        check_choice("pruning_schedule", self.pruning_schedule, SCHEDULES)
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
        """The pruning ratio after the fraction `progress` of training."""
        if self.pruning_schedule == "constant" or progress >= 1:
            return self.pruning_ratio
        done = progress if self.pruning_schedule == "linear" else (1 - math.cos(math.pi * progress)) / 2
        return self.initial_pruning_ratio + done * (self.pruning_ratio - self.initial_pruning_ratio)

    def merged(self, proportional_attention: bool) -> bool:
        """Whether kept tokens stand for all of an image: the others are merged into them, and attention counts them."""
        return self.dropped_tokens == MERGE and proportional_attention

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
    def from_dict(cls, values: dict, where: str = PRUNER_CONFIG_NAME) -> PrunerConfig:
        """Builds the config from a file's values; unknown keys, as of a newer version, are dropped with a warning.

        Raises:
            ValueError: a value has the wrong type or is out of range; the message names file, key and value.
        """
        known = {f.name for f in fields(cls)}
        unknown = sorted(set(values) - known - {"pruner_type", "auto_map"})
        if unknown:
            logger.warning("%s does not know %s of %s: ignored.", cls.__name__, ", ".join(unknown), where)
        hints = hints_of(cls)
        for key in sorted(known & values.keys()):
            if not fits(values[key], hints.get(key, Any)):
                kind = getattr(hints[key], "__name__", str(hints[key]))
                raise ValueError(f"`{key}` in {where} must be of type {kind}, got {str(values[key])[:100]!r}.")
        try:
            return cls(**{key: value for key, value in values.items() if key in known})
        except ValueError as error:
            raise ValueError(f"In {where}: {error}") from None

    def save_pretrained(self, folder: str | Path, **extra) -> None:
        """Writes `pruner_config.json`, with `extra` keys beside the settings."""
        write_json(Path(folder) / PRUNER_CONFIG_NAME, {**self.to_dict(), **extra})

    @staticmethod
    def from_pretrained(name: str | Path, *, trust_remote_code: bool = False, **hub) -> PrunerConfig:
        """Reads the config of any pruner from a folder or Hub repo; see [`AutoPruner.from_pretrained`]."""
        return load_config(name, trust_remote_code, hub)[1]


def load_config(name: str | Path, trust_remote_code: bool, hub: dict) -> tuple[Source, PrunerConfig]:
    """The config and its source, pinned to the commit that all other files are read from; registers the class."""
    source = find_source(name, available_pruners(), **hub)
    path = source.fetch(PRUNER_CONFIG_NAME)
    source = source.pinned(path)
    values = read_json(path, source)
    cls = _class_of(values, source, trust_remote_code)
    return source, cls.config_class.from_dict(values, f"{PRUNER_CONFIG_NAME} of {source}")


def _class_of(values: dict, source: Source, trust_remote_code: bool) -> type[Pruner]:
    name = values.get("pruner_type")
    auto_map = values.get("auto_map")
    reference = auto_map.get(AUTO_CLASS) if isinstance(auto_map, dict) else auto_map
    known = known_class(name)
    if reference is None or (known is not None and not is_fetched(known)):
        return pruner_class(name)
    file = code_file(reference, source)
    if not trust_remote_code:
        if known is not None and getattr(known, "fetched_from", None) == str(source):  # trusted before
            return known
        pin = "" if source.local else f" and revision={source.commit!r}"
        raise ValueError(
            f"The pruner {name!r} of {source} is code of its own, {file}, which is not run unasked. Read it; to run "
            f"it, load with trust_remote_code=True{pin}. Or import a module of yours that registers {name!r}."
        )
    return _fetched_class(name, reference, source)


def _fetched_class(name: object, reference: str, source: Source) -> type[Pruner]:
    cls = load_class(reference, source)
    config = getattr(cls, "config_class", None)
    if not (isinstance(config, type) and issubclass(config, PrunerConfig)) or config.pruner_type != name:
        raise ValueError(f"{reference} of {source} is no pruner that is registered as {name!r}.")
    cls.fetched_from = str(source)
    keep_class(name, cls)
    return cls
