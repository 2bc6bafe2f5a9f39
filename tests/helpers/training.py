"""Short trainings of tiny models."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from tiny_models import FAMILIES, batch
from transformers import Trainer, TrainerCallback, TrainingArguments

from hf_dualspeed import DualSpeedTrainer, DualSpeedTrainingArguments, Pruner, PrunerConfig, register_pruner
from hf_dualspeed.pruners.ops import take, top_k
from hf_dualspeed.pruners.registry import _REGISTRY
from hf_dualspeed.pruners.tokens import gather_rows

QUIET = {
    "report_to": "none",
    "disable_tqdm": True,
    "use_cpu": True,
    "logging_steps": 1,
    "save_strategy": "no",
}
SAMPLES = [
    ("{image} one?", [(16, 16)]),
    ("{image}{image} two of them?", [(16, 16), (24, 40)]),
    ("none here, only text", []),
    ("{image} a longer question than the others", [(40, 20)]),
    ("{image} five", [(16, 16)]),
    ("first{image}and then{image}", [(16, 40), (16, 16)]),
    ("{image} seven?", [(32, 32)]),
    ("{image} eight!", [(16, 16)]),
]


class Collator:
    """Collates indices of SAMPLES through the family's own processor."""

    def __init__(self, family, processor):
        self.family, self.processor = family, processor

    def __call__(self, examples):
        return batch(self.family, self.processor, [SAMPLES[e["index"]] for e in examples])


DATA = [{"index": i} for i in range(len(SAMPLES))]


class Watch(TrainerCallback):
    """Notes what the weights do at each optimizer step."""

    def __init__(self, names):
        self.names, self.moved, self._before = names, [], {}

    def values(self, model):
        return {n: p.detach().clone() for n, p in model.named_parameters() if n in self.names}

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        self._before = self.values(model)

    def on_step_end(self, args, state, control, model=None, **kwargs):
        after = self.values(model)
        self.moved.append({n: not torch.equal(after[n], self._before[n]) for n in self.names})


def make(
    tmp_path, family="llava", cls=DualSpeedTrainer, model=None, callbacks=None, data=None, processor=None, **options
):
    family = FAMILIES[family]
    built, its_processor = family.build()
    processor = processor or its_processor
    options = {
        **QUIET,
        "output_dir": str(tmp_path),
        "max_steps": 4,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "weight_decay": 0.1,
        **options,
    }
    arguments = TrainingArguments if cls is Trainer else DualSpeedTrainingArguments
    options.setdefault("remove_unused_columns", False)
    return cls(
        model=model or built,
        args=arguments(**options),
        train_dataset=data or DATA,
        eval_dataset=DATA,
        data_collator=Collator(family, processor),
        processing_class=processor,
        callbacks=callbacks,
    )


def history(trainer, *keys):
    return [[entry.get(key) for key in keys] for entry in trainer.state.log_history if "loss" in entry]


@pytest.fixture
def learned_pruner():
    """A registered pruner with weights: keeps the tokens of the highest learned score, scaled by it."""

    @dataclass
    class ScoredConfig(PrunerConfig):
        hidden_size: int = 1

    @register_pruner("scored")
    class Scored(Pruner):
        config_class = ScoredConfig

        def __init__(self, config):
            super().__init__(config)
            self.score = torch.nn.Linear(config.hidden_size, 1)

        def reduce(self, tokens, lengths):
            scores = self.score(tokens.features)
            kept = take(tokens, top_k(scores[..., 0].detach(), tokens.valid, max(lengths)), lengths)
            kept.features = kept.features * gather_rows(scores, kept.positions).sigmoid()
            return kept

    yield Scored
    _REGISTRY.pop("scored")


ADAPTIVE = {"mode_schedule": "adaptive", "slow_mode_ratio": 0.5, "max_slow_mode_ratio": 0.9, "pruning_ratio": 0.5}
