"""Pruners, one file each; importing this package registers them."""

from . import (
    avg_pool,
    cdpruner,
    cls_attention,
    divprune,
    dynamicvit,
    fastv,
    grid,
    holov,
    prumerge,
    pyramiddrop,
    random,
    token_learner,
    tome,
    trim,
    visionzip,
    vispruner,
)
from .auto import AutoPruner
from .base import LayerPruner, Pruner
from .config import PrunerConfig, budget
from .registry import available_pruners, pruner_class, register_pruner
from .tokens import PrunedTokens, VisualTokens

__all__ = [
    "AutoPruner",
    "LayerPruner",
    "PrunedTokens",
    "Pruner",
    "PrunerConfig",
    "VisualTokens",
    "available_pruners",
    "avg_pool",
    "budget",
    "cdpruner",
    "cls_attention",
    "divprune",
    "dynamicvit",
    "fastv",
    "grid",
    "holov",
    "prumerge",
    "pruner_class",
    "pyramiddrop",
    "random",
    "register_pruner",
    "token_learner",
    "tome",
    "trim",
    "visionzip",
    "vispruner",
]
