"""Hyperparameter search and `model_init`: each training follows its own arguments, whatever the last one's were."""

from __future__ import annotations

import pytest
import torch
from tiny_models import FAMILIES
from training import DATA, QUIET, SAMPLES, Collator, history
from transformers.integrations import integration_utils
from transformers.trainer_utils import HPSearchBackend

from hf_dualspeed import DualSpeedTrainer, DualSpeedTrainingArguments
from hf_dualspeed.data.collators import MaskVisualLabels

OPTIONS = {"max_steps": 3, "per_device_train_batch_size": 2, "learning_rate": 1e-2, "pruning_ratio": 0.5, "seed": 1}


LENGTHS = [
    {**example, "length": len(text) + 16 * len(images), "visual_length": [16] * len(images)}
    for example, (text, images) in zip(DATA, SAMPLES, strict=True)
]


def trainer_of(tmp_path, frozen=(), **options):
    family = FAMILIES["llava"]
    _, processor = family.build()

    def build():
        model, _ = family.build()
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(not any(part in name for part in frozen))
        return model

    return DualSpeedTrainer(
        model_init=build,
        args=DualSpeedTrainingArguments(str(tmp_path), **{**QUIET, **OPTIONS, **options}),
        train_dataset=LENGTHS,
        eval_dataset=DATA,
        data_collator=Collator(family, processor),
    )


@pytest.fixture(autouse=True)
def no_backend_installed(monkeypatch):
    """The Trainer tells the kind of a trial by the backend that is installed."""
    monkeypatch.setattr(integration_utils, "is_ray_tune_available", lambda: True)


class Trial(dict):
    """What a search passes, with its parameters chosen."""

    def __init__(self, number: int, params: dict):
        super().__init__(params)
        self.number, self.params = number, params


def tries(trainer, *trials):
    """Trains a trial after the other as a search by Optuna does, and yields after each."""
    trainer.hp_search_backend, trainer.hp_name = HPSearchBackend.OPTUNA, None
    trainer.hp_space = dict
    for number, params in enumerate(trials):
        trainer.train(trial=Trial(number, params))
        yield trainer


def outcome(trainer):
    weights = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    return history(trainer, "loss", "grad_norm", "fast_loss", "slow_loss"), weights


FIRST = {"pruner": "random", "isolator_length": 2, "slow_mode_ratio": 0.0, "position_ids": "original"}
TRIALS = {
    "another pruner": {"pruner": "token_learner"},
    "a pruner that asks for the text": {"pruner": "cdpruner"},
    "ratios": {"pruning_ratio": 0.75, "slow_mode_ratio": 0.5},
    "no isolator": {"isolator_length": 0},
    "a longer isolator": {"isolator_length": 8, "position_ids": "compact"},
    "a seed": {"seed": 3, "slow_mode_ratio": 0.5},
    "parts": {"slow_mode_ratio": 1.0, "slow_mode_splits": "auto"},
    "a schedule": {"mode_schedule": "adaptive", "slow_mode_ratio": 0.5, "max_slow_mode_ratio": 0.9},
    "grouping": {"train_sampling_strategy": "group_by_length", "slow_mode_ratio": 0.5},
    "attention": {"proportional_attention": False, "pruner_kwargs": {"dropped_tokens": "discard"}},
    "logits": {"supervised_logits_only": False},
}


@pytest.mark.parametrize("name", TRIALS)
def test_a_trial_is_the_run_of_its_own_arguments(tmp_path, name):
    options = {"pruner": "divprune", **TRIALS[name]}
    searched = trainer_of(tmp_path)
    _, *_ = tries(searched, FIRST, {**FIRST, **options})
    # The model is built before the trial's arguments are known, from the seed that the trainer has.
    alone = trainer_of(tmp_path, **{**FIRST, **options})
    alone.train()
    (logs, weights), (expected_logs, expected) = outcome(searched), outcome(alone)
    assert logs == expected_logs
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[key], expected[key]) for key in weights)
    settings = searched.summary(), alone.summary()
    for summary in settings:
        summary.pop("seconds")
    assert settings[0] == settings[1]
    searched.save_model(tmp_path / "saved")
    assert (tmp_path / "saved" / "mode_isolator.safetensors").exists() == (searched.dual_forward.isolator is not None)


def test_each_trial_gets_a_batch_of_its_own_size(tmp_path):
    options = {"per_device_train_batch_size": "auto", "memory_gib": 2e6 / 2**30, "slow_mode_ratio": 0.0, "max_steps": 1}
    trials = {"learning_rate": 1e-3}, {"global_batch_size": 4}, {"learning_rate": 1e-4}
    sizes = [
        (t._train_batch_size, t.args.gradient_accumulation_steps)
        for t in tries(trainer_of(tmp_path, **options), *trials)
    ]
    assert sizes == [(3, 1), (2, 2), (2, 2)]
    (trainer,) = tries(trainer_of(tmp_path, **options), {"per_device_train_batch_size": 4})
    assert (trainer._train_batch_size, trainer.size) == (4, None)


def test_what_follows_from_the_arguments_is_made_once_for_each_trial(tmp_path):
    adaptive = {"mode_schedule": "adaptive", "slow_mode_ratio": 0.5, "max_slow_mode_ratio": 0.9}
    cached = {"vision_feature_cache": str(tmp_path / "features"), "speedup_rounds": 1, "fast_mode_checkpointing": True}
    search = tries(
        trainer_of(tmp_path, frozen=["vision_tower"]),
        {**adaptive, "min_pruning_ratio": 0.2, **cached},
        {**adaptive, "min_pruning_ratio": 0.2, "pruner": "cdpruner", "fast_mode_checkpointing": False},
        {"mode_schedule": "random", "speedup_rounds": 0},
    )
    trainer = next(search)
    first = trainer.adaptive_schedule, trainer.feature_cache
    assert trainer.feature_cache.store is not None
    assert (trainer.speedup_meter.rounds, trainer.selective_checkpointing.always) == (1, True)
    next(search)
    assert trainer.adaptive_schedule.pruner is trainer.feature_cache.pruner is trainer._pruner
    assert not trainer.selective_checkpointing.always
    assert not set(first) & set(trainer.callback_handler.callbacks)
    assert isinstance(trainer.data_collator, MaskVisualLabels)
    assert trainer.data_collator.collator is trainer.given_collator
    next(search)
    assert trainer.adaptive_schedule is None
    assert trainer.speedup_meter.rounds == 0
    kinds = [type(callback) for callback in trainer.callback_handler.callbacks]
    assert len(kinds) == len(set(kinds))


def test_a_ratio_of_a_trial_is_no_default(tmp_path):
    # Left alone, the ratio is 0 where the language model is frozen.
    trainer = trainer_of(tmp_path, frozen=["language_model", "lm_head"])
    assert trainer.slow_mode_ratio == 0
    next(tries(trainer, {"slow_mode_ratio": 0.5}))
    assert trainer.slow_mode_ratio == 0.5


def test_a_trial_outside_of_an_options_range_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="`pruning_ratio`.*1.5"):
        next(tries(trainer_of(tmp_path), {"pruning_ratio": 1.5}))
    with pytest.raises(ValueError, match="'divprun'"):
        next(tries(trainer_of(tmp_path), {"pruner": "divprun"}))


def test_trainings_of_new_models_have_schedules_of_their_own_pruner(tmp_path):
    options = {"mode_schedule": "adaptive", "slow_mode_ratio": 0.5, "max_slow_mode_ratio": 0.9}
    trainer = trainer_of(tmp_path, min_pruning_ratio=0.2, **options)
    outcomes = []
    for _ in range(2):
        trainer.train()
        assert trainer.adaptive_schedule.pruner is trainer.dual_forward.pruner
        outcomes.append(outcome(trainer)[0])
    assert outcomes[0] == outcomes[1]


def test_an_option_that_changes_after_attaching_does_not_break_saving(tmp_path):
    trainer = trainer_of(tmp_path, isolator_length=0, max_steps=1)
    trainer.train()
    trainer.args.isolator_length = 4
    trainer.save_model()
    assert not (tmp_path / "mode_isolator.safetensors").exists()
