"""Pruners, one file each; importing this package registers them."""

from . import avg_pool, cls_attention, divprune, dynamicvit, grid, prumerge, random, token_learner, tome, visionzip
from .base import (
    AutoPruner,
    PrunedTokens,
    Pruner,
    PrunerConfig,
    VisualTokens,
    available_pruners,
    budget,
    pruner_class,
    register_pruner,
)

__all__ = [
    "AutoPruner",
    "PrunedTokens",
    "Pruner",
    "PrunerConfig",
    "VisualTokens",
    "available_pruners",
    "avg_pool",
    "budget",
    "cls_attention",
    "divprune",
    "dynamicvit",
    "grid",
    "prumerge",
    "pruner_class",
    "random",
    "register_pruner",
    "token_learner",
    "tome",
    "visionzip",
]
