"""What every pruner shares: the budget, its inputs and outputs, its published config, and the registry.

Shapes: B images, N visual tokens, K kept tokens, D hidden, T text tokens.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import ClassVar

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from ..arguments import check_choice, check_range
from ..shortening import check_finite

logger = logging.getLogger(__name__)

CONFIG_NAME = "pruner_config.json"
WEIGHTS_NAME = "pruner.safetensors"
NEEDS = frozenset({"grid", "attention", "keys", "text"})
SCHEDULES = ("constant", "linear", "cosine")


@dataclass
class VisualTokens:
    """The visual tokens of B images, padded to N.

    Args:
        features (`torch.Tensor` of shape `(B, N, D)`): projected visual tokens.
        valid (`torch.BoolTensor` of shape `(B, N)`, *optional*): False on padding, which lies at the end of a row.
        grid (`torch.LongTensor` of shape `(B, N, 3)`, *optional*): (t, row, column) of each token.
        attention (`torch.Tensor` of shape `(B, N)`, *optional*): attention each token receives in the vision tower.
        keys (`torch.Tensor` of shape `(B, N, Dk)`, *optional*): attention keys of the vision tower, mean over heads;
            zeros where no patch made the token.
        text (`torch.Tensor` of shape `(B, T, D)`, *optional*): instruction embeddings; never answer tokens.
        text_valid (`torch.BoolTensor` of shape `(B, T)`, *optional*): False where `text` is no instruction token; an
            image may have none at all.
        generator (`torch.Generator`, *optional*): source of randomness, on the features' device.
        lengths (`list[int]`, *optional*): tokens per image. Given beside `valid`, it spares a host synchronisation.
    """

    features: torch.Tensor
    valid: torch.Tensor | None = None
    grid: torch.Tensor | None = None
    attention: torch.Tensor | None = None
    keys: torch.Tensor | None = None
    text: torch.Tensor | None = None
    text_valid: torch.Tensor | None = None
    generator: torch.Generator | None = None
    lengths: list[int] | None = None

    def __post_init__(self):
        if self.features.dim() != 3:
            raise ValueError(f"`features` must be of shape (B, N, D), got {tuple(self.features.shape)}.")
        batch, count, _ = self.features.shape
        for name in ("valid", "grid", "attention", "keys"):
            tensor = getattr(self, name)
            if tensor is not None and tensor.shape[:2] != (batch, count):
                raise ValueError(
                    f"`{name}` must begin with the shape ({batch}, {count}) of `features`, got {tuple(tensor.shape)}."
                )
        if self.text is not None and (self.text.dim() != 3 or len(self.text) != batch):
            raise ValueError(f"`text` must be of shape ({batch}, T, D), got {tuple(self.text.shape)}.")
        if self.text_valid is not None and (self.text is None or self.text_valid.shape != self.text.shape[:2]):
            raise ValueError(f"`text_valid` must be of the shape (B, T) of `text`, got {tuple(self.text_valid.shape)}.")
        if self.lengths is None:
            self.lengths = [count] * batch if self.valid is None else self.valid.sum(1).tolist()


@dataclass
class PrunedTokens:
    """What a pruner returns.

    Args:
        features (`torch.Tensor` of shape `(B, K, D)`): kept or merged tokens.
        positions (`torch.LongTensor` of shape `(B, K)`): their source positions, ascending in each row.
        valid (`torch.BoolTensor` of shape `(B, K)`, *optional*): False on padding; None where every row holds K.
        lengths (`list[int]`): kept tokens per image.
        merge (`Callable`, *optional*): what a merging pruner did to the features, to be done to others of the same
            tokens: `(B, N, D')` to `(B, K, D')`.
        finite (`torch.BoolTensor` of no dimensions, *optional*): whether the features were, where reading it would
            have waited for the device; see [`check_finite`].
    """

    features: torch.Tensor
    positions: torch.Tensor
    valid: torch.Tensor | None
    lengths: list[int]
    merge: Callable[[torch.Tensor], torch.Tensor] | None = None
    finite: torch.Tensor | None = None

    def carry(self, features: torch.Tensor) -> torch.Tensor:
        """Other features of the same tokens, `(B, N, D')`, pruned alike: `(B, K, D')`."""
        return self.merge(features) if self.merge is not None else rows_at(features, self.positions)


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
    """

    pruner_type: ClassVar[str] = ""

    pruning_ratio: float = 0.9
    pruning_schedule: str = "constant"
    initial_pruning_ratio: float | None = None

    def __post_init__(self):
        check_range("pruning_ratio", self.pruning_ratio, 0, 1, right_open=True, off="Use 0.0 to turn pruning off.")
        check_choice("pruning_schedule", self.pruning_schedule, SCHEDULES)
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

    def to_dict(self) -> dict:
        settings = asdict(self)
        if self.pruning_schedule == "constant":
            del settings["pruning_schedule"], settings["initial_pruning_ratio"]
        return {"pruner_type": self.pruner_type, **settings}

    @classmethod
    def from_dict(cls, values: dict) -> PrunerConfig:
        """Builds the config, dropping keys of a newer version with a warning."""
        known = {f.name for f in fields(cls)}
        unknown = sorted(set(values) - known - {"pruner_type"})
        if unknown:
            logger.warning("%s does not know %s: ignored.", cls.__name__, ", ".join(unknown))
        return cls(**{key: value for key, value in values.items() if key in known})

    def save_pretrained(self, folder: str | Path) -> None:
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / CONFIG_NAME).write_text(json.dumps(self.to_dict(), indent=2) + "\n", encoding="utf-8")

    @staticmethod
    def from_pretrained(folder: str | Path) -> PrunerConfig:
        """Reads the config of whichever registered pruner the folder names.

        Raises:
            FileNotFoundError: the folder holds no `pruner_config.json`.
            ValueError: the file names no registered pruner.
        """
        path = Path(folder) / CONFIG_NAME
        if not path.is_file():
            raise FileNotFoundError(f"No {CONFIG_NAME} in {str(folder)!r}: save one with `pruner.save_pretrained`.")
        values = json.loads(path.read_text(encoding="utf-8"))
        return pruner_class(values.get("pruner_type", "")).config_class.from_dict(values)


class Pruner(nn.Module):
    """Keeps `budget(N, pruning_ratio)` visual tokens of each image.

    A selecting pruner implements [`rank`]; a merging one overrides [`reduce`]. Ranking runs in float32 without
    gradients; gathering and merging stay differentiable.

    Attributes:
        progress (`float`): fraction of training that is done, for a ratio that changes; 1 outside of training.
        auxiliary_loss (`torch.Tensor`, *optional*): what the last call in training mode adds to the loss, a mean over
            its images, already weighted. Learnt pruners may set it.
    """

    config_class: ClassVar[type[PrunerConfig]] = PrunerConfig
    needs: ClassVar[frozenset[str]] = frozenset()
    deterministic: ClassVar[bool] = True
    merges: ClassVar[bool] = False
    in_language_model: ClassVar[bool] = False

    def __init__(self, config: PrunerConfig):
        super().__init__()
        self.config = config
        self.progress = 1.0
        self.auxiliary_loss: torch.Tensor | None = None

    @property
    def pruning_ratio(self) -> float:
        """The fraction of tokens removed now."""
        return self.config.ratio_at(self.progress)

    def rank(self, tokens: VisualTokens, most: int) -> torch.Tensor:
        """Source positions in the order in which they are kept, `(B, most)`; padding last. No gradients here."""
        raise NotImplementedError(f"{type(self).__name__} must implement `rank` or override `reduce`.")

    def reduce(self, tokens: VisualTokens, lengths: list[int]) -> PrunedTokens:
        """Keeps the first `lengths[b]` ranked positions of image b, in their source order."""
        with torch.no_grad(), torch.autocast(tokens.features.device.type, enabled=False):
            positions = self.rank(tokens, max(lengths))
        return take(tokens, positions, lengths)

    def forward(self, tokens: VisualTokens) -> PrunedTokens:
        """Prunes.

        Raises:
            ValueError: `tokens` lacks a field that the pruner needs, or its features hold NaN or infinity. On an
                accelerator the latter is left to who waits for it next: [`check_finite`].
        """
        missing = sorted(need for need in self.needs - {"grid"} if getattr(tokens, need) is None)
        if missing:
            raise ValueError(f"The pruner {self.config.pruner_type!r} needs `VisualTokens.{missing[0]}`, got None.")
        lengths = [budget(n, self.pruning_ratio) for n in tokens.lengths]
        device = tokens.features.device
        if lengths == list(tokens.lengths):
            positions = torch.arange(tokens.features.shape[1], device=device)
            return PrunedTokens(tokens.features, positions.expand(len(lengths), -1), tokens.valid, lengths)
        finite = tokens.features.detach().isfinite().all()
        if device.type == "cpu":
            check_finite(bool(finite))
        pruned = self.reduce(tokens, lengths)
        pruned.finite = finite
        return pruned

    def save_pretrained(self, folder: str | Path, state_dict: dict[str, torch.Tensor] | None = None) -> None:
        """Writes `pruner_config.json` and, for a learnt pruner, `pruner.safetensors`.

        `state_dict` stands in for its own weights, where those are sharded.
        """
        self.config.save_pretrained(folder)
        weights = self.state_dict() if state_dict is None else state_dict
        if weights:
            whole = {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}
            save_file(whole, Path(folder) / WEIGHTS_NAME, metadata={"format": "pt"})

    def load_weights(self, folder: str | Path) -> None:
        """Loads a learnt pruner's weights from `folder`.

        Raises:
            FileNotFoundError: the pruner is learnt and the folder holds no weights.
            RuntimeError: they are those of another pruner.
        """
        if not self.state_dict():
            return
        path = Path(folder) / WEIGHTS_NAME
        if not path.is_file():
            raise FileNotFoundError(
                f"No {WEIGHTS_NAME} in {str(folder)!r}, which the learnt pruner {self.config.pruner_type!r} needs. "
                "Save it with `pruner.save_pretrained`."
            )
        self.load_state_dict(load_file(path))

    def extra_repr(self) -> str:
        return f"pruning_ratio={self.config.pruning_ratio}"


def kept_mask(lengths: list[int], device: torch.device) -> torch.Tensor | None:
    """`(B, K)`, True on the first `lengths[b]` slots of row b; None where all rows are full."""
    most = max(lengths)
    if min(lengths) == most:
        return None
    counts = torch.tensor(lengths).to(device, non_blocking=True)
    return torch.arange(most, device=device) < counts[:, None]


def in_source_order(
    ranked: torch.Tensor, lengths: list[int], count: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Sorts the first `lengths[b]` of the `(B, K)` positions ascending: positions, their order, validity."""
    valid = kept_mask(lengths, ranked.device)
    if valid is not None:  # beyond every real position, so that padding sorts to the end
        ranked = ranked.masked_fill(~valid, count)
    positions, order = ranked.sort(dim=1)
    return positions.clamp(max=count - 1), order, valid


def take(tokens: VisualTokens, ranked: torch.Tensor, lengths: list[int]) -> PrunedTokens:
    """Gathers the first `lengths[b]` of the `ranked` `(B, K)` positions, in their source order."""
    positions, _, valid = in_source_order(ranked, lengths, tokens.features.shape[1])
    return PrunedTokens(rows_at(tokens.features, positions), positions, valid, lengths)


def rows_at(features: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Gathers rows of `features` `(B, N, D)` at `positions` `(B, K)`: `(B, K, D)`."""
    return features.gather(1, positions[..., None].expand(-1, -1, features.shape[-1]))


def highest(scores: torch.Tensor, valid: torch.Tensor | None, most: int) -> torch.Tensor:
    """Positions of the `most` highest `(B, N)` scores, best first, the earlier one where they tie."""
    scores = scores.float()
    if valid is not None:
        scores = scores.masked_fill(~valid, float("-inf"))
    return scores.sort(dim=1, descending=True, stable=True).indices[:, :most]


_REGISTRY: dict[str, type[Pruner]] = {}


def register_pruner(name: str) -> Callable[[type[Pruner]], type[Pruner]]:
    """Class decorator that makes a pruner known to configs, arguments and the command line under `name`.

    Raises:
        ValueError: another class holds the name, or the class's `needs` names an unknown input.
    """

    def register(cls: type[Pruner]) -> type[Pruner]:
        known = _REGISTRY.get(name)
        # A class of the same qualified name replaces itself, so that a notebook cell can be run twice.
        if known is not None and (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__):
            raise ValueError(f"`name` {name!r} is taken by {known.__qualname__}. Choose another name.")
        unknown = sorted(cls.needs - NEEDS)
        if unknown:
            raise ValueError(f"`needs` of {cls.__name__} must be among {sorted(NEEDS)}, got {unknown}.")
        # A config of its own, so that pruners that share their settings still differ in name; pickle finds it here.
        known_as = {"pruner_type": name, "__module__": cls.__module__, "__doc__": cls.config_class.__doc__}
        config = type(f"{cls.__name__}Config", (cls.config_class,), known_as)
        config.__qualname__ = f"{cls.__qualname__}.config_class"
        cls.config_class = dataclass(config)
        _REGISTRY[name] = cls
        return cls

    return register


def available_pruners() -> list[str]:
    """Sorted names of the registered pruners."""
    return sorted(_REGISTRY)


def pruner_class(name: str) -> type[Pruner]:
    """The class registered under `name`; a `ValueError` lists the known names."""
    check_choice("pruner", name, available_pruners())
    return _REGISTRY[name]


class AutoPruner:
    """Builds pruners by registered name or from a folder that holds `pruner_config.json`."""

    def __init__(self):
        raise TypeError("AutoPruner is not instantiated: use AutoPruner.from_name or AutoPruner.from_pretrained.")

    @staticmethod
    def from_name(name: str, **settings) -> Pruner:
        """`AutoPruner.from_name("divprune", pruning_ratio=0.9)`.

        Raises:
            ValueError: unknown name (the message lists the known ones) or a setting outside its range.
            TypeError: a setting that the pruner does not have.
        """
        cls = pruner_class(name)
        return cls(cls.config_class(**settings))

    @staticmethod
    def from_pretrained(folder: str | Path) -> Pruner:
        """Loads from a local folder; see [`PrunerConfig.from_pretrained`] for the errors."""
        config = PrunerConfig.from_pretrained(folder)
        pruner = pruner_class(config.pruner_type)(config)
        pruner.load_weights(folder)
        return pruner
