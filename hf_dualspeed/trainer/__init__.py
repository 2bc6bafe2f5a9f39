"""Training in two modes: fast steps on pruned visual tokens, slow ones on all of them."""

from .trainer import DualSpeedTrainer
from .training_args import DualSpeedTrainingArguments

__all__ = ["DualSpeedTrainer", "DualSpeedTrainingArguments"]
