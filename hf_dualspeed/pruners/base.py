"""What every pruner shares: its inputs and outputs, the choice of tokens, weights, and the registry.

Shapes: B images, N visual tokens, K kept tokens, D hidden, T text tokens.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import ClassVar

import torch
import torch.nn.functional as F
from huggingface_hub import CommitInfo
from safetensors.torch import load_file, save_file
from torch import nn

from ..arguments import check_choice, check_keys
from ..hub_io import (
    WEIGHTS_NAME,
    check_weights,
    save_code,
)
from ..shortening import check_finite
from .config import DISCARD, MERGE, PrunerConfig, budget

logger = logging.getLogger(__name__)

AUTO_CLASS = "AutoPruner"  # the key of a pruner's code in `auto_map`
NEEDS = frozenset({"grid", "attention", "keys", "text"})
# Tokens that are compared with the kept ones at a time.
CHUNK = 1024


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
        checked_later (`bool`): the caller reads `PrunedTokens.finite` itself, where it waits for the device anyway.
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
    checked_later: bool = False

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
        sizes (`torch.Tensor` of shape `(B, K)`, *optional*): how many source tokens each one stands for, in float32;
            N in each row together, 0 on padding. Left out by `reduce`, they are counted by the nearest kept token.
        finite (`torch.BoolTensor` of no dimensions, *optional*): whether the features were; None where none was pruned.
    """

    features: torch.Tensor
    positions: torch.Tensor
    valid: torch.Tensor | None
    lengths: list[int]
    merge: Callable[[torch.Tensor], torch.Tensor] | None = None
    sizes: torch.Tensor | None = None
    finite: torch.Tensor | None = None

    def carry(self, features: torch.Tensor) -> torch.Tensor:
        """Other features of the same tokens, `(B, N, D')`, pruned alike: `(B, K, D')`."""
        return self.merge(features) if self.merge is not None else rows_at(features, self.positions)


class Pruner(nn.Module):
    """Keeps `budget(N, pruning_ratio)` visual tokens of each image.

    A selecting pruner implements [`rank`], and what becomes of the other tokens is a setting, `dropped_tokens`; one
    that merges by a rule of its own overrides [`reduce`]. Ranking runs in float32 without gradients; gathering and
    merging stay differentiable.

    Attributes:
        progress (`float`): fraction of training that is done, for a ratio that changes; 1 outside of training.
        auxiliary_loss (`torch.Tensor`, *optional*): what the last call in training mode adds to the loss, a mean over
            its images, already weighted. Learnt pruners may set it. The trainer takes the mean over micro-batches.
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

    def reconfigure(self, **settings) -> None:
        """Changes settings, but for those that the sizes of learnt weights follow from.

        Raises:
            ValueError: a setting is unknown, outside its range, or one of those.
        """
        check_keys("settings", settings, [f.name for f in fields(self.config)])
        config = replace(self.config, **settings)
        other = planned_weights(type(self), config, f"the settings {settings}")
        if {k: t.shape for k, t in other.items()} != {k: t.shape for k, t in self.state_dict().items()}:
            raise ValueError(
                f"The settings {settings} do not fit the weights that the pruner {config.pruner_type!r} has learnt. "
                "Leave out what changes their sizes, or train a new one by its name."
            )
        self.config = config

    def __getstate__(self) -> dict:
        return {**self.__dict__, "auxiliary_loss": None}  # a part of a graph can't be copied

    def rank(self, tokens: VisualTokens, most: int) -> torch.Tensor:
        """Source positions in the order in which they are kept, `(B, most)`; padding last. No gradients here."""
        raise NotImplementedError(f"{type(self).__name__} must implement `rank` or override `reduce`.")

    def reduce(self, tokens: VisualTokens, lengths: list[int]) -> PrunedTokens:
        """Keeps the first `lengths[b]` ranked positions of image b, in their source order."""
        with torch.no_grad(), torch.autocast(tokens.features.device.type, enabled=False):
            ranked = self.rank(tokens, max(lengths))
        return take(tokens, ranked, lengths, self.config.dropped_tokens)

    def forward(self, tokens: VisualTokens) -> PrunedTokens:
        """Prunes.

        Raises:
            ValueError: `tokens` lacks a field that the pruner needs, or its features hold NaN or infinity.
        """
        self.auxiliary_loss = None
        missing = sorted(need for need in self.needs - {"grid"} if getattr(tokens, need) is None)
        if missing:
            raise ValueError(f"The pruner {self.config.pruner_type!r} needs `VisualTokens.{missing[0]}`, got None.")
        lengths = [budget(n, self.pruning_ratio) for n in tokens.lengths]
        if lengths == list(tokens.lengths):
            return unpruned(tokens)
        finite = tokens.features.detach().isfinite().all()
        for known in (tokens.attention, tokens.keys):  # rows that no patch made have an attention of -inf
            finite = finite if known is None else finite & ~known.isnan().any()
        if not tokens.checked_later:
            check_finite(bool(finite))
        pruned = self.reduce(tokens, lengths)
        if pruned.sizes is None:
            owner = nearest_kept(tokens, pruned.positions, pruned.valid)
            pruned.sizes = counts(owner, pruned.positions.shape[1])
        pruned.finite = finite
        return pruned

    def save_pretrained(self, folder: str | Path, state_dict: dict[str, torch.Tensor] | None = None) -> None:
        """Writes `pruner_config.json` and, for a learnt pruner, `pruner.safetensors`.

        `state_dict` stands in for its own weights, where those are sharded.
        """
        Path(folder).mkdir(parents=True, exist_ok=True)
        self.config.save_pretrained(folder, **({} if is_own(type(self)) else save_code(self, AUTO_CLASS, Path(folder))))
        weights = self.state_dict() if state_dict is None else state_dict
        if weights:
            whole = {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}
            save_file(whole, Path(folder) / WEIGHTS_NAME, metadata={"format": "pt"})

    def load_weights(self, folder: str | Path) -> None:
        """Loads a learnt pruner's weights from `folder`.

        Raises:
            FileNotFoundError: the pruner is learnt and the folder holds no weights.
            ValueError: they are those of another pruner, or the file is damaged.
        """
        expected = self.state_dict()
        if expected:
            self.load_state_dict(load_file(weights_file(folder, expected, self.config)))

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        token: str | bool | None = None,
        commit_message: str | None = None,
        revision: str | None = None,
        results: dict | list[dict] | None = None,
    ) -> CommitInfo:
        """Publishes config, weights, code of its own and a card on the Hub, in one commit; sections that a person
        wrote into the card stay.

        Args:
            repo_id (`str`): "user/name"; made where it does not exist.
            private (`bool`, *optional*): whether a new repo is private.
            token (`str`, *optional*): in place of that of `hf auth login` or HF_TOKEN.
            commit_message (`str`, *optional*): what the history says.
            revision (`str`, *optional*): the branch, made where it does not exist.
            results (`dict` or `list[dict]`, *optional*): measured values for the card: names and values, or rows.

        Raises:
            ValueError: `repo_id` is no "user/name", or the published card's front matter cannot be read.
            HfHubHTTPError, ConnectionError: the Hub refuses, fails or cannot be reached. Nothing local has changed.
        """
        from .card import push_pruner

        return push_pruner(self, repo_id, results, commit_message, private=private, token=token, revision=revision)

    def extra_repr(self) -> str:
        return f"pruning_ratio={self.config.pruning_ratio}"


def unpruned(tokens: VisualTokens) -> PrunedTokens:
    """All tokens, as a pruner returns them."""
    device = tokens.features.device
    positions = torch.arange(tokens.features.shape[1], device=device).expand(len(tokens.lengths), -1)
    sizes = torch.ones(positions.shape, device=device) if tokens.valid is None else tokens.valid.float()
    return PrunedTokens(tokens.features, positions, tokens.valid, list(tokens.lengths), sizes=sizes)


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


def take(
    tokens: VisualTokens,
    ranked: torch.Tensor,
    lengths: list[int],
    dropped_tokens: str = MERGE,
    similarity: torch.Tensor | None = None,
) -> PrunedTokens:
    """Keeps the first `lengths[b]` of the `ranked` `(B, K)` positions, in their source order.

    Each dropped token belongs to the kept one that is most similar to it, which it is averaged into ("merge") or merely
    counted for ("discard").

    Args:
        similarity (`torch.Tensor` of shape `(B, K, N)`, *optional*): of all tokens to the ranked ones, where a pruner
            knows it; of these to themselves infinite.
    """
    most = ranked.shape[1]
    positions, order, valid = in_source_order(ranked, lengths, tokens.features.shape[1])
    if similarity is None:
        owner = nearest_kept(tokens, positions, valid)
    else:
        # The first ranks are the kept ones, as the first slots are.
        similarity = similarity if valid is None else similarity.masked_fill(~valid[..., None], float("-inf"))
        # From ranks to the slots that they are sorted into.
        owner = order.argsort(dim=1).gather(1, similarity.argmax(dim=1))
        owner = owner if tokens.valid is None else owner.masked_fill(~tokens.valid, most)
    sizes = counts(owner, most)
    if dropped_tokens == DISCARD:
        return PrunedTokens(rows_at(tokens.features, positions), positions, valid, lengths, sizes=sizes)

    def merge(features: torch.Tensor) -> torch.Tensor:
        return means(features, owner, sizes)

    return PrunedTokens(merge(tokens.features), positions, valid, lengths, merge, sizes)


@torch.no_grad()
def nearest_kept(tokens: VisualTokens, positions: torch.Tensor, valid: torch.Tensor | None) -> torch.Tensor:
    """The slot `(B, N)` of the kept token, of those at `positions` `(B, K)`, that each token is most similar to
    (cosine): its own where it is kept, the first one's where several are equal, and K on padding."""
    most, count = positions.shape[1], tokens.features.shape[1]
    with torch.autocast(tokens.features.device.type, enabled=False):
        units = F.normalize(tokens.features.detach().float(), dim=-1)
        kept = rows_at(units, positions).mT
        hidden = None if valid is None else ~valid[:, None]
        parts = [part @ kept for part in units.split(CHUNK, dim=1)]  # (B, n, K)
        parts = parts if hidden is None else [part.masked_fill_(hidden, float("-inf")) for part in parts]
        owner = torch.cat([part.argmax(dim=2) for part in parts], dim=1)
    # A kept token is its own, though another one may equal it. Slots of padding write beyond the last token.
    slots = torch.arange(most, device=positions.device).expand_as(positions)
    at = positions if valid is None else positions.masked_fill(~valid, count)
    owner = F.pad(owner, (0, 1)).scatter(1, at, slots)[:, :count]
    return owner if tokens.valid is None else owner.masked_fill(~tokens.valid, most)


def counts(owner: torch.Tensor, most: int) -> torch.Tensor:
    """How many tokens belong to each of `most` slots, of which `owner` `(B, N)` names one each: `(B, most)`."""
    found = torch.zeros(len(owner), most + 1, device=owner.device)
    return found.scatter_add_(1, owner, torch.ones_like(owner, dtype=found.dtype))[:, :most]


def means(features: torch.Tensor, owner: torch.Tensor, sizes: torch.Tensor) -> torch.Tensor:
    """The mean of the `features` `(B, N, D)` that belong to each slot, `(B, K, D)`, summed in float32."""
    batch, most = sizes.shape
    # A row of sums for each slot of each image, and one for what belongs to none.
    rows = owner + torch.arange(batch, device=owner.device)[:, None] * (most + 1)
    sums = torch.zeros(batch * (most + 1), features.shape[-1], device=features.device)
    sums = sums.index_add(0, rows.flatten(), features.flatten(0, 1).float()).view(batch, most + 1, -1)[:, :most]
    return (sums / sizes.clamp(min=1)[..., None]).to(features.dtype)


def members(owner: torch.Tensor, most: int) -> torch.Tensor:
    """1 where a token belongs to a slot, of which `owner` `(B, N)` names one each, and 0 elsewhere: `(B, most, N)`."""
    batch, count = owner.shape
    found = torch.zeros(batch, most + 1, count, device=owner.device)
    return found.scatter_(1, owner[:, None], 1.0)[:, :most]


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
        # A class of the same qualified name replaces itself, so that a notebook cell can be run twice; code from the
        # Hub gives way, so that two revisions can be loaded.
        twin = known is None or (known.__module__, known.__qualname__) == (cls.__module__, cls.__qualname__)
        if not twin and not is_fetched(known):
            raise ValueError(f"`name` {name!r} is taken by {known.__qualname__}. Choose another name.")
        unknown = sorted(cls.needs - NEEDS)
        if unknown:
            raise ValueError(f"`needs` of {cls.__name__} must be among {sorted(NEEDS)}, got {unknown}.")
        # A config of its own, so that pruners that share their settings still differ in name; pickle finds it here.
        known_as = {"pruner_type": name, "merges": cls.merges}
        known_as |= {"__module__": cls.__module__, "__doc__": cls.config_class.__doc__}
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


def known_class(name: object) -> type[Pruner] | None:
    """The class registered under `name`, or None."""
    return _REGISTRY.get(name) if isinstance(name, str) else None


def keep_class(name: str, cls: type[Pruner]) -> None:
    """Registers a fetched class, in place of an earlier one of that name."""
    _REGISTRY[name] = cls


def is_own(cls: type[Pruner]) -> bool:
    """Whether the class is one of this library."""
    return cls.__module__.partition(".")[0] == __name__.partition(".")[0]


def is_fetched(cls: type[Pruner]) -> bool:
    """Whether the class is code that was loaded beside a config, and not registered by the user's own program."""
    return cls.__module__.startswith("transformers_modules.")


def planned_weights(cls: type[Pruner], config: PrunerConfig, where: str) -> dict[str, torch.Tensor]:
    """The weights that a pruner of this config has, without memory for them, so that a config can ask for any size.

    A class of a user's own that cannot be built on the device "meta" is built as it is.

    Raises:
        ValueError: a class of this library asks for sizes that no tensor can have; the message names `where`.
    """
    try:
        with torch.device("meta"):
            return cls(config).state_dict()
    except Exception as error:
        if not is_own(cls):
            return cls(config).state_dict()
        if isinstance(error, ValueError):
            raise
        problem = " ".join(str(error).split())[:200]
        raise ValueError(f"The pruner {config.pruner_type!r} cannot have the sizes of {where}: {problem}.") from None


def weights_file(folder: str | Path, expected: dict[str, torch.Tensor], config: PrunerConfig) -> Path:
    """A learnt pruner's file of weights, of which the header alone has been read: it fits."""
    path = Path(folder) / WEIGHTS_NAME
    if not path.is_file():
        raise FileNotFoundError(
            f"No {WEIGHTS_NAME} in {str(folder)!r}, which the learnt pruner {config.pruner_type!r} needs. "
            "Save it with `pruner.save_pretrained`."
        )
    check_weights(path, expected)
    return path
