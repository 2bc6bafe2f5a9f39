"""Base classes of pruners: selection, weights, saving and publishing.

Shapes: B images, N visual tokens, K kept tokens, D hidden, T text tokens.
"""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path
from typing import ClassVar

import torch
from huggingface_hub import CommitInfo
from safetensors.torch import load_file, save
from torch import nn

from ..hub.source import check_numbers, check_weights, save_code
from ..utils.constants import PRUNER_WEIGHTS_NAME
from ..utils.validation import check_finite, check_keys, checked
from ..utils.writing import write_file
from .card import push_pruner
from .config import AUTO_CLASS, PrunerConfig, budget
from .ops import counts, nearest_kept, take, top_k, unpruned
from .registry import check_name, is_own
from .tokens import PrunedTokens, VisualTokens


class Pruner(nn.Module):
    """Keeps `budget(N, pruning_ratio)` visual tokens of each image.

    A selecting pruner implements [`rank`]; its setting `dropped_tokens` decides what happens to the other tokens. A
    pruner with a merging rule of its own overrides [`reduce`]. Ranking runs in float32 without gradients; gathering
    and merging stay differentiable.
    """

    config_class: ClassVar[type[PrunerConfig]] = PrunerConfig
    needs: ClassVar[frozenset[str]] = frozenset()  # optional fields of `VisualTokens` that it reads
    deterministic: ClassVar[bool] = True
    merges: ClassVar[bool] = False  # by a rule of its own
    in_language_model: ClassVar[bool] = False
    plain_path: bool = False  # plain PyTorch alone, to find out whether a faster way causes a problem

    @checked
    def __init__(self, config: PrunerConfig):
        super().__init__()
        # Registering gives a class a config class of its own, which knows its name: a config of the one that it derives
        # from does as well.
        own = type(self).config_class
        if type(config) is not own and issubclass(own, type(config)):
            config = own(**{f.name: getattr(config, f.name) for f in fields(config) if f.init})
        self.config = config

    @property
    def pruning_ratio(self) -> float:
        """The fraction of tokens removed, at the end of training if it changes."""
        return self.config.pruning_ratio

    def reconfigure(self, **settings) -> None:
        """Changes settings that leave the sizes of learned weights as they are.

        Raises:
            ValueError: a setting is unknown, outside its range, or changes the size of a weight.
        """
        check_keys("settings", settings, [f.name for f in fields(self.config)])
        config = replace(self.config, **settings)
        other = planned_weights(type(self), config, f"the settings {settings}")
        if {k: t.shape for k, t in other.items()} != {k: t.shape for k, t in self.state_dict().items()}:
            raise ValueError(
                f"The settings {settings} do not fit the weights that the pruner {config.pruner_type!r} has learned. "
                "Leave out what changes their sizes, or train a new one by its name."
            )
        self.config = config

    def rank(self, tokens: VisualTokens, k: int) -> torch.Tensor:
        """Source positions, best first, `(B, k)`; padding last. Runs without gradients."""
        raise NotImplementedError(f"{type(self).__name__} must implement `rank` or override `reduce`.")

    def checked_rank(self, tokens: VisualTokens, k: int) -> torch.Tensor:
        """What [`rank`] returns, `(B, k)`, found without gradients.

        Raises:
            ValueError: it is of another shape, or holds no positions.
        """
        with torch.no_grad(), torch.autocast(tokens.features.device.type, enabled=False):
            ranked = self.rank(tokens, k)
        known, shape = isinstance(ranked, torch.Tensor), (len(tokens.features), k)
        if not known or ranked.shape != shape or ranked.is_floating_point() or ranked.dtype == torch.bool:
            given = f"{ranked.dtype} of shape {tuple(ranked.shape)}" if known else f"a {type(ranked).__name__}"
            raise ValueError(
                f"`rank` of {type(self).__name__} must return the positions of the {k} best tokens of each image, "
                f"whole numbers of shape {shape}, got {given}. `hf_dualspeed.pruners.ops.top_k(scores, tokens.valid, "
                "k)` makes them of scores."
            )
        return ranked

    def reduce(self, tokens: VisualTokens, lengths: list[int]) -> PrunedTokens:
        """Keeps the first `lengths[b]` ranked positions of image b, in source order."""
        return take(tokens, self.checked_rank(tokens, max(lengths)), lengths, self.config.dropped_tokens)

    def forward(self, tokens: VisualTokens, progress: float = 1.0) -> PrunedTokens:
        """Prunes the tokens of each image.

        Args:
            tokens ([`VisualTokens`]): B images of N tokens.
            progress (`float`): fraction of training done, for a ratio that changes.

        Raises:
            ValueError: `tokens` is none, lacks a field that the pruner needs, or its features hold NaN or infinity.
        """
        if not isinstance(tokens, VisualTokens):
            raise ValueError(f"`tokens` must be VisualTokens, got a {type(tokens).__name__}.")
        missing = sorted(need for need in self.needs - {"grid"} if getattr(tokens, need) is None)
        if missing:
            raise ValueError(f"The pruner {self.config.pruner_type!r} needs `VisualTokens.{missing[0]}`, got None.")
        ratio = self.config.ratio_at(progress)
        lengths = [budget(n, ratio) for n in tokens.lengths]
        if lengths == list(tokens.lengths):
            return unpruned(tokens)
        # One flag on the device. Attention may be -inf: tokens that come from no patch have that.
        low, high = tokens.features.detach().aminmax()  # one pass, in which NaN wins
        finite = (low > float("-inf")) & (high < float("inf"))
        for known in (tokens.attention, tokens.keys):
            finite = finite if known is None else finite & ~known.isnan().any()
        if not tokens.defer_checks:
            check_finite(bool(finite))
        pruned = self.reduce(tokens, lengths)
        # sizes (B, K): every source token (B, N) counts for the kept one nearest to it.
        if pruned.sizes is None:
            owner = nearest_kept(tokens, pruned.positions, pruned.valid)
            pruned.sizes = counts(owner, pruned.positions.shape[1])
        pruned.finite = finite
        return pruned

    @checked
    def save_pretrained(self, folder: str | Path, state_dict: dict[str, torch.Tensor] | None = None) -> None:
        """Writes `pruner_config.json` and, for a learned pruner, `pruner.safetensors`.

        `state_dict` replaces the pruner's own weights where those are sharded.

        Raises:
            ValueError: the class is not registered, so that its config has no name, or that of another class which it
                derives from.
        """
        check_name(type(self), self.config.pruner_type)
        Path(folder).mkdir(parents=True, exist_ok=True)
        self.config.save_pretrained(folder, **({} if is_own(type(self)) else save_code(self, AUTO_CLASS, Path(folder))))
        weights = self.state_dict() if state_dict is None else state_dict
        if weights:
            whole = {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}
            write_file(Path(folder) / PRUNER_WEIGHTS_NAME, save(whole, metadata={"format": "pt"}))

    def load_weights(self, folder: str | Path) -> None:
        """Loads a learned pruner's weights from `folder`.

        Raises:
            FileNotFoundError: the pruner is learned and the folder holds no weights.
            ValueError: the weights are another pruner's, or the file is damaged.
        """
        expected = self.state_dict()
        if expected:
            path = weights_file(folder, expected, self.config)
            weights = load_file(path)
            check_numbers(path, weights)
            self.load_state_dict(weights)

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
        """Publishes config, weights, custom code and a card on the Hub, in one commit.

        Card sections that a person wrote stay.

        Args:
            repo_id (`str`): "user/name"; created if missing.
            private (`bool`, *optional*): whether a new repo is private.
            token (`str`, *optional*): replaces the token of `hf auth login` or HF_TOKEN.
            commit_message (`str`, *optional*): message of the commit.
            revision (`str`, *optional*): the branch; created if missing.
            results (`dict` or `list[dict]`, *optional*): measured values for the card: names and values, or rows.

        Raises:
            ValueError: `repo_id` is not "user/name", the published card's front matter cannot be read, or the class
                of the pruner lies in no module whose code could be pushed: in a script, a notebook or a function.
            HfHubHTTPError, ConnectionError: the Hub refuses, fails or cannot be reached. Nothing local changes.
        """
        return push_pruner(self, repo_id, results, commit_message, private=private, token=token, revision=revision)

    def extra_repr(self) -> str:
        return f"pruning_ratio={self.config.pruning_ratio}"


def planned_weights(cls: type[Pruner], config: PrunerConfig, where: str) -> dict[str, torch.Tensor]:
    """The weights of a pruner with this config, on the device "meta": they take no memory, however large they are.

    A user's class that cannot be built on "meta" is built on the default device.

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
    """The path of a learned pruner's weights; checks the file's header, loads no weights."""
    path = Path(folder) / PRUNER_WEIGHTS_NAME
    if not path.is_file():
        raise FileNotFoundError(
            f"No {PRUNER_WEIGHTS_NAME} in {str(folder)!r}, which the learned pruner {config.pruner_type!r} needs. "
            "Save it with `pruner.save_pretrained`."
        )
    check_weights(path, expected)
    return path


class LayerPruner(Pruner):
    """Drops visual tokens between layers of the language model: the first layers see all of them.

    [`stages`] says where and how many tokens are dropped. [`rank`] says which; by default, those that the last
    instruction token attends to least. The inputs keep all tokens, so `prune_inputs` refuses these pruners; the trainer
    and `prune_visual_tokens` take them. Called directly, such a pruner keeps what its last stage keeps, in one step.

    At a stage, `rank` gets the hidden states of U units (images or clips) as `VisualTokens.features` `(U, N, D)`, and
    the last instruction token's attention to each visual token, mean over heads, in the layer before, as
    `VisualTokens.attention` `(U, N)`. N counts the tokens that earlier stages left.
    """

    in_language_model: ClassVar[bool] = True

    def stages(self, layers: int, pruning_ratio: float) -> dict[int, float]:
        """Where a language model of `layers` layers drops tokens, as {layer index: fraction removed}.

        Tokens are dropped in front of that layer, 1 to `layers - 1`. The fraction counts all of an image's tokens that
        are gone from there on. `pruning_ratio` is the current one if it changes over training.
        """
        raise NotImplementedError(f"{type(self).__name__} must implement `stages`.")

    def rank(self, tokens: VisualTokens, k: int) -> torch.Tensor:
        if tokens.attention is None:
            raise ValueError(f"The pruner {self.config.pruner_type!r} needs `VisualTokens.attention`, got None.")
        return top_k(tokens.attention, tokens.valid, k)
