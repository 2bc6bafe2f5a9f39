"""Prompts with pruned visual tokens, to generate from."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from ..pruners import AutoPruner, Pruner, available_pruners, pruner_class
from ..pruning.api import prune_inputs
from ..pruning.isolator import ModeIsolator
from ..publishing.files import read_mapping
from ..trainer.dual_forward import DualForward
from ..utils.constants import POSITION_IDS, PRUNER_CONFIG_NAME, VIDEO_BUDGETS
from ..utils.validation import check_choice, check_fields, checked
from .checkpoint import Checkpoint


@dataclass
class PrunedPrompts:
    """Prunes batches of prompts. It is a `prepare` of [`answer_accuracy`].

    Args:
        model (`nn.Module`): The model that generates, PEFT-wrapped or not.
        pruner ([`Pruner`]): A pruner in front of the language model.
        isolator ([`ModeIsolator`], *optional*): Learned tokens in front of each image's kept tokens.
        position_ids (`str`, *optional*, defaults to `"auto"`): As in [`prune_inputs`].
        video_budget (`str`, *optional*, defaults to `"clip"`): As in [`prune_inputs`].
        proportional_attention (`bool`, *optional*, defaults to `True`): As in [`prune_inputs`].
        seed (`int`, *optional*, defaults to 0): Seed of random pruners.
        batch (`int`, *optional*, defaults to 0): Number of the next batch. It is part of the seed, so a resumed
            evaluation prunes like an uninterrupted one.
    """

    model: nn.Module
    pruner: Pruner
    isolator: ModeIsolator | None = None
    position_ids: str = "auto"
    video_budget: str = "clip"
    proportional_attention: bool = True
    seed: int = 0
    batch: int = 0

    def __post_init__(self):
        check_fields(self)
        check_choice("position_ids", self.position_ids, POSITION_IDS)
        check_choice("video_budget", self.video_budget, VIDEO_BUDGETS)

    def __call__(self, inputs: dict[str, Any]) -> dict[str, Any]:
        # A CPU generator uses only the lower 32 bits of a seed.
        generator = torch.Generator(self.model.device).manual_seed((self.seed * 1_000_003 + self.batch) % 2**32)
        self.batch += 1
        return prune_inputs(
            self.model,
            inputs,
            self.pruner,
            self.isolator,
            self.position_ids,
            generator,
            self.video_budget,
            self.proportional_attention,
        )


@checked
def prompts_of(dual_forward: DualForward, model: nn.Module, seed: int = 0) -> PrunedPrompts:
    """Prunes prompts as a training's fast steps do."""
    return PrunedPrompts(
        model,
        dual_forward.pruner,
        dual_forward.isolator,
        dual_forward.position_ids,
        dual_forward.video_budget,
        dual_forward.proportional_attention,
        seed,
    )


def check_prompt_pruner(name: str) -> None:
    """Raises a `ValueError` for a pruner inside the language model, which shortens no prompt."""
    if name in available_pruners() and pruner_class(name).in_language_model:
        raise ValueError(
            f"`pruner` is {name!r}, which drops tokens inside the language model: it shortens no prompt to "
            "answer from. Name one that works in front of it, such as 'divprune'."
        )


def prompt_pruner(name: str | None, checkpoint: Checkpoint, ratio: float | None) -> Pruner:
    """A pruner to answer with: the run's own, with its settings and weights, or another one.

    Args:
        name (`str`, *optional*): A registered pruner, a folder, or a Hub repo. By default the run's own.
        checkpoint ([`Checkpoint`]): The run. It says whether a pruner's own code is run.
        ratio (`float`, *optional*): Fraction of the visual tokens removed. By default the pruner's own.

    Raises:
        ValueError: there is no pruner, it is learned and has no weights, it shortens no prompt, or it is code that is
            not trusted.
    """
    load = partial(AutoPruner.from_pretrained, trust_remote_code=checkpoint.trust_remote_code)
    config = checkpoint.beside and checkpoint.beside / PRUNER_CONFIG_NAME
    own = config is not None and config.is_file()
    if name is None and not own:
        raise ValueError("`pruner` is not set, and the checkpoint brings none along. Name one, such as 'divprune'.")
    if name is not None:
        check_prompt_pruner(name)
    if own and (name is None or name == read_mapping(config).get("pruner_type")):
        pruner = load(checkpoint.name, revision=checkpoint.commit)
    elif name in available_pruners():
        pruner = AutoPruner.from_name(name)
        if pruner.state_dict():
            raise ValueError(f"`pruner` is {name!r}, which is learned, but the checkpoint holds no weights of it.")
    else:
        pruner = load(name)
    check_prompt_pruner(pruner.config.pruner_type)
    if ratio is not None:
        pruner.reconfigure(pruning_ratio=ratio)
    return pruner
