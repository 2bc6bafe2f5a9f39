"""DualSpeed training of vision-language models on the Hugging Face stack (arXiv 2602.03815)."""

from .arguments import DualSpeedTrainingArguments
from .distillation import self_distillation_loss
from .fast_pass import prune_inputs, prune_visual_tokens
from .isolator import ModeIsolator
from .pruners import (
    AutoPruner,
    PrunedTokens,
    Pruner,
    PrunerConfig,
    VisualTokens,
    available_pruners,
    register_pruner,
)
from .schedule import ModeSchedule
from .trainer import DualSpeedTrainer

__version__ = "0.1.0"

__all__ = [
    "AutoPruner",
    "DualSpeedTrainer",
    "DualSpeedTrainingArguments",
    "ModeIsolator",
    "ModeSchedule",
    "PrunedTokens",
    "Pruner",
    "PrunerConfig",
    "VisualTokens",
    "available_pruners",
    "prune_inputs",
    "prune_visual_tokens",
    "register_pruner",
    "self_distillation_loss",
]
