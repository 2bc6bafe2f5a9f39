"""DualSpeed training of vision-language models on the Hugging Face stack (arXiv 2602.03815)."""

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING

from .utils.quiet import quiet

if TYPE_CHECKING:
    from .models.components import freeze_roles as freeze_roles
    from .pruners.auto import AutoPruner as AutoPruner
    from .pruners.base import Pruner as Pruner
    from .pruners.config import PrunerConfig as PrunerConfig
    from .pruners.registry import available_pruners as available_pruners
    from .pruners.registry import register_pruner as register_pruner
    from .pruners.tokens import PrunedTokens as PrunedTokens
    from .pruners.tokens import VisualTokens as VisualTokens
    from .pruning.api import prune_inputs as prune_inputs
    from .pruning.api import prune_visual_tokens as prune_visual_tokens
    from .pruning.isolator import ModeIsolator as ModeIsolator
    from .trainer.losses import self_distillation_loss as self_distillation_loss
    from .trainer.schedule import ModeSchedule as ModeSchedule
    from .trainer.sft_trainer import DualSpeedSFTConfig as DualSpeedSFTConfig
    from .trainer.sft_trainer import DualSpeedSFTTrainer as DualSpeedSFTTrainer
    from .trainer.trainer import DualSpeedTrainer as DualSpeedTrainer
    from .trainer.training_args import DualSpeedTrainingArguments as DualSpeedTrainingArguments

__version__ = "0.1.0"

quiet()

# Where each public name stands. Modules are loaded on first use, so that `import hf_dualspeed` does not wait for torch.
_MODULES = {
    "AutoPruner": "pruners",
    "DualSpeedTrainer": "trainer.trainer",
    "DualSpeedTrainingArguments": "trainer.training_args",
    "ModeIsolator": "pruning.isolator",
    "ModeSchedule": "trainer.schedule",
    "PrunedTokens": "pruners",
    "Pruner": "pruners",
    "PrunerConfig": "pruners",
    "VisualTokens": "pruners",
    "available_pruners": "pruners",
    "freeze_roles": "models.components",
    "prune_inputs": "pruning.api",
    "prune_visual_tokens": "pruning.api",
    "register_pruner": "pruners",
    "self_distillation_loss": "trainer.losses",
}
# These need TRL; not in `__all__`, so that a star import needs none.
_NEED_TRL = {"DualSpeedSFTConfig": "trainer.sft_trainer", "DualSpeedSFTTrainer": "trainer.sft_trainer"}

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
    "freeze_roles",
    "prune_inputs",
    "prune_visual_tokens",
    "register_pruner",
    "self_distillation_loss",
]


if not TYPE_CHECKING:  # which would take any name for granted

    def __getattr__(name: str):
        module = (_MODULES | _NEED_TRL).get(name)
        if module is not None:
            value = globals()[name] = getattr(import_module(f".{module}", __name__), name)
            return value
        if not name.startswith("_") and find_spec(f"{__name__}.{name}") is not None:  # a folder, such as `data`
            return import_module(f".{name}", __name__)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES, *(_NEED_TRL if find_spec("trl") else ())})
