"""DualSpeed training of vision-language models on the Hugging Face stack (arXiv 2602.03815)."""

from importlib.util import find_spec
from typing import TYPE_CHECKING

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

if TYPE_CHECKING:
    from .sft import DualSpeedSFTConfig as DualSpeedSFTConfig
    from .sft import DualSpeedSFTTrainer as DualSpeedSFTTrainer

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

# Loaded on first use, since they need TRL; not in `__all__`, so that a star import needs none.
_NEED_TRL = ("DualSpeedSFTConfig", "DualSpeedSFTTrainer")


def __getattr__(name: str):
    if name not in _NEED_TRL:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from . import sft

    return getattr(sft, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *(_NEED_TRL if find_spec("trl") else ())})
