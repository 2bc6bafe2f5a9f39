"""`transformers.Trainer` and `DualSpeedTrainer` side by side: with full-token steps only, a user sees the same.

A case is what a user asks for. Both trainers get the same model, data and seed, and everything that they show is
compared, as `side_by_side` tells, which also has the tables of differences on purpose.
"""

from __future__ import annotations

import contextlib
import copy
import re
import sys
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import numpy as np
import pytest
import torch
from datasets import Dataset
from families import FAMILIES as MODELS
from families.cases import CASES as MODEL_CASES
from families.cases import batch_of
from peft import IA3Config, LoraConfig, PromptTuningConfig, get_peft_model
from side_by_side import (
    ADDED_CALLBACKS,
    ADDED_FILES,
    ADDED_KEYS,
    OTHER_DEFAULTS,
    PEER,
    Case,
    Pad,
    Peer,
    Streamed,
    built,
    equal_rows,
    make,
    pictured,
    rows,
    shown,
    side_by_side,
    table,
    text_only,
    train,
    without,
)
from transformers import (
    BatchFeature,
    DefaultFlowCallback,
    EarlyStoppingCallback,
    HfArgumentParser,
    SchedulerType,
    Trainer,
    TrainerCallback,
    TrainerState,
    TrainingArguments,
)
from transformers import trainer as peer
from transformers.trainer_callback import ExportableState
from transformers.trainer_pt_utils import AcceleratorConfig
from transformers.training_args import OptimizerNames

from hf_dualspeed import DualSpeedTrainer, DualSpeedTrainingArguments

CASES: list[Case] = []
SPECIAL = {f.name for f in fields(Case)} - {"name", "options"}


def case(name: str, **settings) -> None:
    """Adds a case; settings that are no fields of one are options of the training arguments."""
    options = {key: value for key, value in settings.items() if key not in SPECIAL}
    CASES.append(Case(name, options, **{key: value for key, value in settings.items() if key in SPECIAL}))


def cases(group: str, act: Callable = train, common: dict | None = None, **table: dict) -> None:
    for name, settings in table.items():
        case(f"{group}-{name}", **{"act": act, **(common or {}), **settings})


# --- cases: optimisation ----------------------------------------------------------------------------------------------


def freeze(*parts) -> Callable:
    def frozen(model):
        for name, parameter in model.named_parameters():
            if any(part in name for part in parts):
                parameter.requires_grad = False
        return model

    return frozen


COMPILED = {"torch_compile": True, "torch_compile_backend": "eager", "max_steps": 2, "slow": True}
EPOCHS = {"max_steps": -1}
EVALS = {"eval_strategy": "steps", "eval_steps": 1}
SAVES = {"save_strategy": "steps", "save_steps": 1}
BEST = {**EVALS, **SAVES, "load_best_model_at_end": True}

cases(
    "accumulation",
    one={"gradient_accumulation_steps": 1},
    two={"gradient_accumulation_steps": 2},
    three={"gradient_accumulation_steps": 3},
    remainder={"gradient_accumulation_steps": 3, "max_steps": -1, "num_train_epochs": 2},
    more_than_an_epoch={"gradient_accumulation_steps": 16, "max_steps": 2},
    batch_of_all={"per_device_train_batch_size": 64, "max_steps": 2},
    batch_of_one={"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4},
    tokens_of_one_device={"gradient_accumulation_steps": 2, "average_tokens_across_devices": False},
    llava_next={"family": "llava_next", "gradient_accumulation_steps": 2},
)
cases(
    "duration",
    one_step={"max_steps": 1},
    no_epoch={"max_steps": -1, "num_train_epochs": 0, "refused": "`num_train_epochs` must be in"},
    half_an_epoch={"max_steps": -1, "num_train_epochs": 0.5},
    an_epoch={"max_steps": -1, "num_train_epochs": 1},
    epoch_and_a_half={"max_steps": -1, "num_train_epochs": 1.5},
    two_epochs={"max_steps": -1, "num_train_epochs": 2},
    steps_beyond_an_epoch={"max_steps": 5},
    steps_override_epochs={"max_steps": 1, "num_train_epochs": 3},
)
SCHEDULED = {"max_steps": 4, "learning_rate": 0.05}
for kind in SchedulerType:
    extra = {
        "cosine_with_restarts": {"lr_scheduler_kwargs": {"num_cycles": 2}},
        "polynomial": {"lr_scheduler_kwargs": {"power": 2.0}},
        "cosine_with_min_lr": {"lr_scheduler_kwargs": {"min_lr": 0.01}},
        "cosine_warmup_with_min_lr": {"lr_scheduler_kwargs": {"min_lr": 0.01}, "warmup_steps": 2},
        "warmup_stable_decay": {"lr_scheduler_kwargs": {"num_decay_steps": 2}, "warmup_steps": 1},
        "constant_with_warmup": {"warmup_steps": 2},
        "reduce_lr_on_plateau": {**EVALS, "metric_for_best_model": "loss", "lr_scheduler_kwargs": {"patience": 0}},
        "greedy": {**EVALS, "metric_for_best_model": "loss"},
    }.get(kind.value, {})
    case(f"schedule-{kind.value}", lr_scheduler_type=kind.value, **SCHEDULED | extra)
cases(
    "warmup",
    steps={"warmup_steps": 2},
    fraction={"warmup_steps": 0.5},
    with_accumulation={"warmup_steps": 2, "gradient_accumulation_steps": 2},
)
cases(
    "decay",
    none={"weight_decay": 0.0},
    some={"weight_decay": 0.1},
    much={"weight_decay": 2.0, "gradient_accumulation_steps": 2},
)
# Large enough that noise in place of a zero gradient moves nothing.
CALM = {"learning_rate": 1e-3, "adam_epsilon": 1e-3, "rtol": 2e-3, "model": freeze("k_proj.bias")}
OPTIMIZERS = {
    "adamw_torch": {"optim_args": "amsgrad=True"},
    "adamw_torch_fused": {},
    "adafactor": {},
    "sgd": {"optim_args": "momentum=0.9,nesterov=True"},
    "adagrad": {"optim_args": "eps=0.001"},
    "rmsprop": {"optim_args": "eps=0.001,momentum=0.5"},
}
ANY = (ImportError, ValueError, RuntimeError, AssertionError, TypeError)


def tried(trainer):
    """Trains, or tells which error came of it: optimizers of other packages may be there or not."""
    try:
        return trainer.train()
    except ANY as error:
        return type(error).__name__


for optimizer in OptimizerNames:
    settings = {"act": tried, "rtol": 1e-2 if "8bit" in optimizer.value else CALM["rtol"]}
    case(f"optimizer-{optimizer.value}", optim=optimizer.value, **CALM | OPTIMIZERS.get(optimizer.value, settings))

cases(
    "clipping",
    off={"max_grad_norm": 0},
    small={"max_grad_norm": 1e-3},
    large={"max_grad_norm": 1e6},
    none={"max_grad_norm": None, "refused": "`max_grad_norm` must be a finite number", "raises": TypeError},
    with_accumulation={"max_grad_norm": 0.1, "gradient_accumulation_steps": 2},
)
cases(
    "arithmetic",
    smoothing={"label_smoothing_factor": 0.1},
    smoothing_and_accumulation={"label_smoothing_factor": 0.2, "gradient_accumulation_steps": 2},
    bf16={"bf16": True, "rtol": 0.05},
    fp16={"fp16": True, "rtol": 0.05},
    bf16_evaluated={"bf16": True, "rtol": 0.05, **EVALS},
    neftune={"neftune_noise_alpha": 5.0},
    neftune_and_accumulation={"neftune_noise_alpha": 5.0, "gradient_accumulation_steps": 2},
    checkpointing={"activation_checkpointing": True},
    checkpointing_with_options={
        "activation_checkpointing": True,
        "activation_checkpointing_kwargs": {"use_reentrant": False},
    },
    checkpointing_every_second_layer={
        "activation_checkpointing": True,
        "activation_checkpointing_kwargs": {"every_n_layers": 2},
    },
    gradient_checkpointing={"gradient_checkpointing": True},
    compiled=COMPILED,
    empty_cache={"torch_empty_cache_steps": 1},
    use_cache={"use_cache": True},
    detected_overflow={"debug": "underflow_overflow", "max_steps": 1},
    bf16_full_eval={"bf16_full_eval": True, **EVALS},
)

# --- cases: logs, evaluation, checkpoints -----------------------------------------------------------------------------

UNSUPERVISED = [{**row, "labels": [-100] * len(row["labels"])} for row in rows()[:2]] + rows()[2:]
cases(
    "logging",
    every_second={"logging_steps": 2, "max_steps": 5},
    fraction={"logging_steps": 0.5, "max_steps": 4},
    first_step={"logging_steps": 3, "logging_first_step": True},
    never={"logging_strategy": "no"},
    each_epoch={"logging_strategy": "epoch", "max_steps": -1, "num_train_epochs": 2},
    longer_than_training={"logging_steps": 100},
    with_accumulation={"logging_steps": 2, "gradient_accumulation_steps": 2, "max_steps": 4},
    tokens_seen={"include_num_input_tokens_seen": "all"},
    tokens_seen_without_padding={"include_num_input_tokens_seen": "non_padding"},
    tokens_seen_as_a_flag={"include_num_input_tokens_seen": True, "gradient_accumulation_steps": 2},
    memory={"skip_memory_metrics": False},
    bars={"disable_tqdm": False},
    quiet={"log_level": "error"},
    unfiltered={"logging_nan_inf_filter": False},
    run_name={"run_name": "mine", **SAVES},
)
cases(
    "evaluation",
    each_step=EVALS,
    every_second={"eval_strategy": "steps", "eval_steps": 2, "max_steps": 4},
    fraction={"eval_strategy": "steps", "eval_steps": 0.5, "max_steps": 4},
    each_epoch={"eval_strategy": "epoch", "max_steps": -1, "num_train_epochs": 2},
    on_start={"eval_on_start": True, **EVALS},
    on_start_only={"eval_on_start": True},
    delayed_steps={**EVALS, "eval_delay": 2},
    delayed_epochs={"eval_strategy": "epoch", "eval_delay": 1, "max_steps": -1, "num_train_epochs": 2},
    follows_logging={"eval_strategy": "steps", "logging_steps": 2, "max_steps": 4},
    loss_only={**EVALS, "prediction_loss_only": True},
    batch_of_one={**EVALS, "per_device_eval_batch_size": 1},
    smoothed={**EVALS, "label_smoothing_factor": 0.1},
    of_text={**EVALS, "given": lambda model: {"eval_dataset": text_only()}},
    of_several={**EVALS, "given": lambda model: {"eval_dataset": {"a": rows()[:2], "b": rows()[2:4]}}},
    with_compiled_model={**EVALS, **COMPILED},
)


def scores(prediction) -> dict:
    """Sums of all that metrics are given."""
    flat = lambda value: value[0] if isinstance(value, tuple) else value  # noqa: E731
    found = {"logits": float(np.abs(flat(prediction.predictions)).sum()), "labels": float(prediction.label_ids.sum())}
    if prediction.inputs is not None:
        found["inputs"] = float(np.asarray(prediction.inputs).sum())
    if prediction.losses is not None:
        found["losses"] = float(prediction.losses.sum())
    return found


class Batchwise:
    """Metrics of batches, of which the last one gives the result."""

    def __init__(self):
        self.sums = []

    def __call__(self, prediction, compute_result):
        logits = prediction.predictions[0] if isinstance(prediction.predictions, tuple) else prediction.predictions
        losses = [] if prediction.losses is None else [prediction.losses.sum().item()]
        self.sums += [logits.abs().sum().item(), *losses, len(prediction.inputs or ())]
        return {f"sum_{n}": value for n, value in enumerate(self.sums)} if compute_result else {}


def measured(model, **more) -> dict:
    return {"compute_metrics": scores, **more}


def best_tokens(logits, labels):
    return (logits[0] if isinstance(logits, tuple) else logits).argmax(-1)


FEW = {"max_steps": 2, **EVALS, "given": measured}
cases(
    "metrics",
    computed=FEW,
    with_inputs={**FEW, "include_for_metrics": ["inputs"]},
    with_loss={**FEW, "include_for_metrics": ["loss"]},
    with_both={**FEW, "include_for_metrics": ["inputs", "loss"]},
    in_parts={**FEW, "eval_accumulation_steps": 1},
    in_larger_parts={
        **FEW,
        "eval_accumulation_steps": 2,
        "per_device_eval_batch_size": 1,
        "given": lambda model: measured(model, eval_dataset=pictured()),
    },
    preprocessed={**FEW, "given": lambda model: measured(model, preprocess_logits_for_metrics=best_tokens)},
    loss_only={**FEW, "prediction_loss_only": True},
    by_batch={**FEW, "batch_eval_metrics": True, "given": lambda model: {"compute_metrics": Batchwise()}},
    by_batch_with_all={
        **FEW,
        "batch_eval_metrics": True,
        "include_for_metrics": ["inputs", "loss"],
        "given": lambda model: {"compute_metrics": Batchwise()},
    },
    gathered_objects={**FEW, "eval_use_gather_object": True},
    of_several={**FEW, "given": lambda model: measured(model, eval_dataset={"a": rows()[:2], "b": rows()[2:4]})},
    smoothed={**FEW, "label_smoothing_factor": 0.1},
    of_lists={
        **FEW,
        "eval_do_concat_batches": False,
        "given": lambda model: {"compute_metrics": lambda p: {"batches": len(p.predictions), "of": len(p.label_ids)}},
    },
)

cases(
    "saving",
    each_step=SAVES,
    every_second={"save_strategy": "steps", "save_steps": 2, "max_steps": 4},
    fraction={"save_strategy": "steps", "save_steps": 0.5, "max_steps": 4},
    each_epoch={"save_strategy": "epoch", "max_steps": -1, "num_train_epochs": 2},
    never={"save_strategy": "no"},
    at_the_end_only={"save_strategy": "steps", "save_steps": 100},
    limit_one={**SAVES, "save_total_limit": 1},
    limit_two={**SAVES, "save_total_limit": 2, "max_steps": 4},
    model_only={**SAVES, "save_only_model": True},
    best={**EVALS, "save_strategy": "best", "metric_for_best_model": "loss"},
    best_by_metric={**FEW, "save_strategy": "best", "metric_for_best_model": "logits", "greater_is_better": True},
    on_each_node={**SAVES, "save_on_each_node": True},
    with_adam={**SAVES, **CALM, "optim": "adamw_torch"},
    without_processor={**SAVES, "given": lambda model: {"processing_class": None}},
    with_processor={**SAVES, "max_steps": 1, "given": lambda model: {"processing_class": built()[1]}},
    with_tokenizer={**SAVES, "max_steps": 1, "given": lambda model: {"processing_class": built()[1].tokenizer}},
    on_signals={**SAVES, "enable_jit_checkpoint": True},
    with_remainder={**SAVES, "gradient_accumulation_steps": 3, "max_steps": -1, "num_train_epochs": 1},
)
cases(
    "best",
    loaded=BEST,
    by_loss={**BEST, "metric_for_best_model": "eval_loss", "greater_is_better": False},
    worst_loss={**BEST, "metric_for_best_model": "loss", "greater_is_better": True},
    by_metric={**FEW, **BEST, "metric_for_best_model": "logits", "greater_is_better": False},
    limited={**BEST, "save_total_limit": 1},
    each_epoch={
        "eval_strategy": "epoch",
        "save_strategy": "epoch",
        "load_best_model_at_end": True,
        "max_steps": -1,
        "num_train_epochs": 2,
    },
    saved_best={**BEST, "save_strategy": "best", "metric_for_best_model": "loss"},
    of_several={
        **BEST,
        "metric_for_best_model": "b_loss",
        "given": lambda model: {"eval_dataset": {"a": rows()[:2], "b": rows()[2:4]}},
    },
    model_only={**BEST, "save_only_model": True},
    sometimes_saved={**BEST, "save_steps": 2, "max_steps": 4},
    metric_missing={**BEST, "metric_for_best_model": "accuracy", "raises": KeyError},
    stopped_early={
        **BEST,
        "max_steps": 6,
        "metric_for_best_model": "loss",
        "greater_is_better": True,
        "given": lambda model: {"callbacks": [EarlyStoppingCallback(early_stopping_patience=1)]},
    },
    stopped_early_by_threshold={
        **BEST,
        "max_steps": 6,
        "metric_for_best_model": "loss",
        "given": lambda model: {"callbacks": [EarlyStoppingCallback(1, early_stopping_threshold=10.0)]},
    },
    early_stopping_without_best={
        **EVALS,
        "metric_for_best_model": "loss",
        "given": lambda model: {"callbacks": [EarlyStoppingCallback(1)]},
    },
)


# --- cases: resuming --------------------------------------------------------------------------------------------------


def then(second: Callable, **changes) -> Callable:
    """Trains, makes the trainer anew with other options, and goes on."""

    def act(trainer):
        first = trainer.train()
        following = make(replace(trainer.case, options=trainer.case.options | changes), trainer.cls, trainer.folder)
        return first, second(following), shown(following)

    return act


def resumed(trainer):
    return trainer.train(resume_from_checkpoint=True)


def resumed_from(step: int) -> Callable:
    return lambda trainer: trainer.train(resume_from_checkpoint=str(trainer.folder / "out" / f"checkpoint-{step}"))


class Counting(TrainerCallback, ExportableState):
    """A callback whose state is kept in checkpoints."""

    def __init__(self, by: int = 1):
        self.by, self.count = by, 0

    def on_step_end(self, args, state, control, **kwargs):
        self.count += self.by

    def state(self):
        return {"args": {"by": self.by}, "attributes": {"count": self.count}}


def counted(trainer):
    trainer.train(resume_from_checkpoint=True)
    return [vars(c) for c in trainer.callback_handler.callbacks if isinstance(c, Counting)]


LONG = {**SAVES, "max_steps": 4}
SHORT = {**SAVES, "max_steps": 2}
cases(
    "resume",
    last={**SHORT, "act": then(resumed, max_steps=4)},
    first={**LONG, "act": then(resumed_from(1))},
    middle={**LONG, "act": then(resumed_from(3))},
    second_epoch={**SAVES, "max_steps": 5, "act": then(resumed, max_steps=7)},
    end_of_epoch={**LONG, "act": then(resumed, max_steps=6)},
    without_skipping={**SHORT, "act": then(resumed, max_steps=4, ignore_data_skip=True)},
    with_accumulation={**SHORT, "gradient_accumulation_steps": 2, "act": then(resumed, max_steps=4)},
    with_momentum={**SHORT, "optim_args": "momentum=0.9", "act": then(resumed, max_steps=4)},
    with_adam={**SHORT, **CALM, "optim": "adamw_torch", "act": then(resumed, max_steps=4)},
    other_batch_size={**SHORT, "act": then(resumed, max_steps=4, per_device_train_batch_size=4)},
    with_neftune={**SHORT, "neftune_noise_alpha": 5.0, "act": then(resumed, max_steps=4)},
    with_best={**BEST, "max_steps": 2, "act": then(resumed, max_steps=4)},
    with_limit={**SHORT, "save_total_limit": 1, "act": then(resumed, max_steps=4)},
    with_workers={**SHORT, "dataloader_num_workers": 1, "act": then(resumed, max_steps=3)},
    fewer_steps={**LONG, "act": then(resumed, max_steps=2)},
    epochs={**SAVES, "max_steps": -1, "num_train_epochs": 1, "act": then(resumed, num_train_epochs=2)},
    streaming={
        **SHORT,
        "given": lambda model: {"train_dataset": Streamed(rows())},
        "act": then(resumed, max_steps=3),
    },
    callback_state={
        **SHORT,
        "restore_callback_states_from_checkpoint": True,
        "given": lambda model: {"callbacks": [Counting(3)]},
        "act": then(counted, max_steps=3),
    },
    callback_state_left={
        **SHORT,
        "given": lambda model: {"callbacks": [Counting(3)]},
        "act": then(counted, max_steps=4),
    },
    early_stopping_state={
        **BEST,
        "restore_callback_states_from_checkpoint": True,
        "given": lambda model: {"callbacks": [EarlyStoppingCallback(2)]},
        "act": then(resumed, max_steps=4),
    },
    tokens_seen={**SHORT, "include_num_input_tokens_seen": "all", "act": then(resumed, max_steps=3)},
    false={"act": lambda trainer: trainer.train(resume_from_checkpoint=False)},
    nothing_there={"act": resumed, "raises": ValueError},
    missing_folder={"act": lambda trainer: trainer.train("nowhere"), "raises": (ValueError, OSError)},
    # Not without the optimizer's state; and a finished run, which the Trainer trains one step more, stays as it is.
    model_only={**SHORT, "save_only_model": True, "act": then(resumed, max_steps=4), "refused": "no whole checkpoint"},
)

# --- cases: callbacks and control -------------------------------------------------------------------------------------


class Doing(TrainerCallback):
    """Sets flags of the control at the end of a step."""

    def __init__(self, step: int, **flags):
        self.step, self.flags = step, flags

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            vars(control).update(self.flags)
            return control


class AtEpochEnd(TrainerCallback):
    def on_epoch_end(self, args, state, control, **kwargs):
        control.should_evaluate = control.should_save = control.should_log = True


class Gradients(TrainerCallback):
    """Notes the gradients and learning rates that callbacks see."""

    def __init__(self):
        self.seen = []

    def on_pre_optimizer_step(self, args, state, control, model=None, optimizer=None, lr_scheduler=None, **kwargs):
        norms = {n: p.grad.norm().item() for n, p in model.named_parameters() if p.grad is not None}
        self.seen.append((norms, lr_scheduler.get_last_lr(), optimizer.param_groups[0]["lr"]))


class Asking(TrainerCallback):
    """Calls the model between steps, with gradients and without."""

    def __init__(self):
        self.seen = []

    def on_step_end(self, args, state, control, model=None, train_dataloader=None, **kwargs):
        batch = Pad()(rows()[:2])
        self.seen.append(model(**batch).loss)
        with torch.no_grad():
            self.seen.append(model.eval()(**batch).logits)
        self.seen.append(len(train_dataloader))


class Calling(TrainerCallback):
    """Calls the trainer between steps."""

    def __init__(self, call):
        self.call, self.trainer, self.seen = call, None, []

    def on_step_end(self, args, state, control, **kwargs):
        self.seen.append(self.call(self.trainer))


def calls(call: Callable) -> Callable:
    def act(trainer):
        callback = Calling(call)
        callback.trainer = trainer
        trainer.add_callback(callback)
        return trainer.train(), callback.seen

    return act


class Failing(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        raise LookupError("a user's own error")


def calling(*callbacks) -> Callable:
    return lambda model: {"callbacks": [c() if callable(c) else c for c in callbacks]}


def doing(step: int, **flags) -> Callable:
    return lambda model: {"callbacks": [Doing(step, **{f"should_{flag}": True for flag in flags})]}


def notes(trainer):
    trainer.train()
    return next(c.seen for c in trainer.callback_handler.callbacks if isinstance(c, (Gradients, Asking)))


class Interrupting(TrainerCallback):
    """Ctrl-C in the second step."""

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 2:
            raise KeyboardInterrupt


def after_interruption(trainer):
    with contextlib.suppress(KeyboardInterrupt):
        trainer.train()
    trainer.remove_callback(Interrupting)
    return trainer.train(resume_from_checkpoint=True)


def after_failure(trainer):
    """Trains, fails in the middle, and trains again."""
    trainer.add_callback(Failing)
    with contextlib.suppress(LookupError):
        trainer.train()
    trainer.remove_callback(Failing)
    return trainer.train(), trainer.evaluate()


def removed(trainer):
    first = trainer.pop_callback(Counting)
    trainer.remove_callback(AtEpochEnd)
    trainer.add_callback(Doing(1, should_training_stop=True))
    return type(first).__name__, trainer.train()


cases(
    "callbacks",
    stop={"given": doing(2, training_stop=1)},
    stop_epoch={"given": doing(2, epoch_stop=1), "max_steps": 6},
    evaluate={"given": doing(2, evaluate=1)},
    save={"given": doing(2, save=1)},
    log={"given": doing(2, log=1), "logging_strategy": "no"},
    all_at_once={"given": doing(2, save=1, evaluate=1, log=1), "logging_strategy": "no"},
    at_epoch_end={"given": calling(AtEpochEnd), **EPOCHS, "num_train_epochs": 1, "logging_strategy": "no"},
    gradients={"given": calling(Gradients), "act": notes},
    gradients_accumulated={"given": calling(Gradients), "act": notes, "gradient_accumulation_steps": 2},
    as_class={"given": lambda model: {"callbacks": [AtEpochEnd]}, **EPOCHS, "num_train_epochs": 1},
    removed={"given": calling(Counting, AtEpochEnd), "act": removed},
    stateful={**SAVES, "given": calling(lambda: Counting(2))},
    stateful_twice={**SAVES, "given": lambda model: {"callbacks": [Counting(2), Counting(5)]}},
    asks_model={"given": calling(Asking), "act": notes},
    evaluates={"act": calls(lambda t: t.evaluate())},
    predicts={"act": calls(lambda t: t.predict(rows()[:2]))},
    saves={"act": calls(lambda t: t.save_model(str(t.folder / f"step-{t.state.global_step}")))},
    asks_loss={"act": calls(lambda t: t.compute_loss(t.model, Pad()(rows()[:2])).item())},
    failing={"given": calling(Failing), "raises": LookupError},
    interrupted={"given": calling(Interrupting), "raises": KeyboardInterrupt, **SAVES},
    resumed_after_interruption={
        **SAVES,
        "given": calling(Interrupting),
        "act": after_interruption,
    },
    after_failure={"act": after_failure, "gradient_accumulation_steps": 2},
    default_flow_removed={"act": lambda t: (t.remove_callback(DefaultFlowCallback), t.train()), "max_steps": 2},
    stop_in_accumulation={"given": doing(1, training_stop=1), "gradient_accumulation_steps": 3},
)

# --- cases: evaluation and prediction by hand -------------------------------------------------------------------------


def evaluate(*args, **kwargs) -> Callable:
    return lambda trainer: trainer.evaluate(*args, **kwargs)


def predict(data=None, **kwargs) -> Callable:
    return lambda trainer: trainer.predict(rows()[:4] if data is None else data(), **kwargs)


TWO = {"given": lambda model: {"eval_dataset": {"a": rows()[:2], "b": rows()[2:4]}}}
cases(
    "evaluate",
    untrained={"act": evaluate()},
    prefix={"act": evaluate(metric_key_prefix="held_out")},
    other_data={"act": lambda t: t.evaluate(rows()[3:6])},
    of_several={**TWO, "act": evaluate()},
    of_several_with_prefix={**TWO, "act": evaluate(metric_key_prefix="test")},
    by_name={**TWO, "act": lambda t: t.evaluate("b")},
    unknown_name={**TWO, "act": lambda t: t.evaluate("c"), "raises": KeyError},
    given_several={"act": lambda t: t.evaluate({"x": rows()[:2], "y": rows()[4:7]})},
    ignore_keys={"act": evaluate(ignore_keys=["image_hidden_states", "past_key_values"]), "given": measured},
    no_ignored_keys={"act": evaluate(ignore_keys=[]), "given": measured, "raises": TypeError},
    metrics={"act": evaluate(), "given": measured},
    without_labels={"act": lambda t: t.evaluate(without("labels"))},
    without_labels_with_metrics={"act": lambda t: t.evaluate(without("labels")), "given": measured},
    unsupervised={"act": lambda t: t.evaluate(UNSUPERVISED), "per_device_eval_batch_size": 2},
    unsupervised_unfiltered={
        "act": lambda t: t.evaluate(UNSUPERVISED),
        "per_device_eval_batch_size": 2,
        "logging_nan_inf_filter": False,
    },
    empty={"act": lambda t: t.evaluate([])},
    no_data={"act": evaluate(), "given": lambda model: {"eval_dataset": None}, "raises": ValueError},
    text={"act": lambda t: t.evaluate(text_only())},
    stream={"act": lambda t: t.evaluate(Streamed(rows()[:5]))},
    table={"act": lambda t: t.evaluate(table())},
    workers={"act": evaluate(), "dataloader_num_workers": 1},
    persistent_workers={
        "act": lambda t: (t.evaluate(), t.evaluate()),
        "dataloader_num_workers": 1,
        "dataloader_persistent_workers": True,
        "slow": True,
    },
    drop_last={"act": evaluate(), "dataloader_drop_last": True},
    smoothed={"act": evaluate(), "label_smoothing_factor": 0.1},
    bf16={"act": evaluate(), "bf16": True, "rtol": 0.02},
    bf16_full={"act": evaluate(), "bf16_full_eval": True, "rtol": 0.02},
    bf16_full_metrics={"act": evaluate(), "bf16_full_eval": True, "rtol": 0.05, "given": measured},
    compiled={"act": evaluate(), **COMPILED},
    memory={"act": evaluate(), "skip_memory_metrics": False},
    qwen2_5_vl={"act": evaluate(), "family": "qwen2_5_vl"},
    llava_next={"act": evaluate(), "family": "llava_next", "given": measured},
    without_train_data={"act": evaluate(), "given": lambda model: {"train_dataset": None}},
    after_training={"act": lambda t: (t.train(), t.evaluate(metric_key_prefix="final"))},
    numpy_metrics={"act": evaluate(), "given": lambda m: {"compute_metrics": lambda p: {"a": np.float32(1), "b": [2]}}},
)
cases(
    "predict",
    plain={"act": predict()},
    prefix={"act": predict(metric_key_prefix="p")},
    metrics={"act": predict(), "given": measured},
    preprocessed={"act": predict(), "given": lambda m: {"preprocess_logits_for_metrics": best_tokens}},
    without_labels={"act": predict(lambda: without("labels"))},
    text={"act": predict(text_only)},
    stream={"act": predict(lambda: Streamed(rows()[:3]))},
    loss_only={"act": predict(), "prediction_loss_only": True},
    in_parts={"act": predict(pictured), "eval_accumulation_steps": 1, "per_device_eval_batch_size": 1},
    lists={"act": predict(), "eval_do_concat_batches": False},
    gathered_objects={"act": predict(), "eval_use_gather_object": True},
    ignore_keys={"act": predict(ignore_keys=["image_hidden_states", "past_key_values"])},
    with_cache={"act": predict(ignore_keys=["past_key_values"]), "use_cache": True},
    inputs={"act": predict(), "given": measured, "include_for_metrics": ["inputs", "loss"]},
    by_batch={"act": predict(), "batch_eval_metrics": True, "given": lambda m: {"compute_metrics": Batchwise()}},
    smoothed={"act": predict(), "label_smoothing_factor": 0.1},
    bf16={"act": predict(), "bf16": True, "rtol": 0.05},
    bf16_full={"act": predict(), "bf16_full_eval": True, "rtol": 0.05},
    no_label_names={"act": predict(), "label_names": []},
    two_label_names={"act": predict(), "label_names": ["labels", "input_ids"]},
    missing_label_name={"act": predict(), "label_names": ["answers"]},
    after_training={"act": lambda t: (t.train(), t.predict(rows()[:3]))},
    qwen2_5_vl={"act": lambda t: t.predict(rows("qwen2_5_vl")[:3]), "family": "qwen2_5_vl"},
    table={"act": predict(table)},
    table_without_unused={"act": predict(table), "remove_unused_columns": True},
)

# --- cases: data ------------------------------------------------------------------------------------------------------


def on(train_dataset: Callable, **more) -> Callable:
    return lambda model: {"train_dataset": train_dataset(), **more}


class Reversed:
    """A user's own order of samples."""

    def _get_train_sampler(self, *args):
        return list(range(len(self.train_dataset)))[::-1]


class OwnLoader:
    def get_train_dataloader(self):
        loader = torch.utils.data.DataLoader(self.train_dataset, batch_size=3, collate_fn=self.data_collator)
        return self.accelerator.prepare(loader)


class OwnBatches:
    """Trains on the first micro-batch of each step only."""

    def get_batch_samples(self, *args):
        batches, items = super().get_batch_samples(*args)
        return batches[:1], items


def batches(trainer):
    loaders = trainer.get_train_dataloader(), trainer.get_eval_dataloader(), trainer.get_test_dataloader(rows()[:3])
    return [([dict(b) for b in loader], len(loader), trainer.num_examples(loader)) for loader in loaders]


def failing_collator(examples):
    raise LookupError("a user's own error")


class Indexed(torch.utils.data.Dataset):
    def __len__(self):
        return len(rows())

    def __getitem__(self, index):
        return rows()[index]


class Broken(Indexed):
    def __getitem__(self, index):
        raise LookupError("a user's own error")


def stock(collator, **more) -> Callable:
    """Data for transformers' collators."""
    return lambda model: {"train_dataset": equal_rows(), "data_collator": collator, **more}


class WithTokenizer(Pad):
    """A collator that holds a tokenizer, which the Trainer saves where no processing class is given."""

    @property
    def tokenizer(self):
        return built()[1].tokenizer


class Shifted(Pad):
    """A collator that shifts the labels by itself, which the Trainer and the models' loss take for the labels."""

    def __init__(self, by: int = 1):
        super().__init__()
        self.by = by

    def __call__(self, examples):
        made = super().__call__(examples)
        filled = torch.full_like(made["labels"][:, : self.by], -100)
        return made | {"shift_labels": torch.cat([made["labels"][:, self.by :], filled], 1)}


class With(Pad):
    """A collator that adds to the batch, or writes over what it holds."""

    def __init__(self, **added):
        super().__init__()
        self.added = added

    def __call__(self, examples):
        made = super().__call__(examples)
        return made | {key: value(made) if callable(value) else value for key, value in self.added.items()}


class Positioned(Pad):
    def __call__(self, examples):
        made = super().__call__(examples)
        return made | {"position_ids": (made["attention_mask"].cumsum(1) - 1).clamp(min=0)}


cases(
    "data",
    batches={"act": batches},
    batches_in_order={"act": batches, "train_sampling_strategy": "sequential", "dataloader_drop_last": True},
    streamed={"given": on(lambda: Streamed(rows()))},
    streamed_over_epochs={"given": on(lambda: Streamed(rows())), "max_steps": 6},
    streamed_too_short={"given": on(lambda: Streamed(rows()[:3])), "max_steps": 3, "gradient_accumulation_steps": 2},
    streamed_with_workers={"given": on(lambda: Streamed(rows())), "dataloader_num_workers": 1},
    table={"given": on(table)},
    table_without_unused={"given": on(table), "remove_unused_columns": True},
    table_streamed={"given": on(lambda: table().to_iterable_dataset())},
    table_in_shards={"given": on(lambda: table().to_iterable_dataset(num_shards=2)), "dataloader_num_workers": 1},
    table_shuffled={"given": on(lambda: table().to_iterable_dataset().shuffle(seed=3, buffer_size=4))},
    indexed={"given": on(Indexed)},
    lists_without_unused={"given": on(lambda: [{**r, "note": "x"} for r in rows()]), "remove_unused_columns": True},
    text={"given": on(text_only)},
    images_only={"given": on(pictured)},
    one_sample={"given": on(lambda: rows()[:1]), "max_steps": 2},
    no_mask={"given": on(lambda: without("attention_mask")), "per_device_train_batch_size": 1},
    empty={"given": on(list), "raises": ANY},
    none={"given": on(lambda: None), "raises": ValueError},
    broken={"given": on(Broken), "raises": LookupError},
    worker={"dataloader_num_workers": 1},
    workers={"dataloader_num_workers": 2, "max_steps": 2},
    persistent_workers={
        "dataloader_num_workers": 1,
        "dataloader_persistent_workers": True,
        "slow": True,
        "max_steps": 5,
        "dataloader_prefetch_factor": 1,
    },
    forked_workers={"dataloader_num_workers": 1, "dataloader_multiprocessing_context": "fork"},
    drop_last={"dataloader_drop_last": True, "per_device_train_batch_size": 3, "max_steps": 4},
    drop_last_epochs={"dataloader_drop_last": True, "per_device_train_batch_size": 3, "max_steps": -1},
    sequential={"train_sampling_strategy": "sequential"},
    rebalanced={"train_sampling_strategy": "batch_rebalance", "max_steps": 5},
    seed={"seed": 11},
    data_seed={"data_seed": 3},
    deterministic={"full_determinism": True},
    split_batches={"accelerator_config": {"split_batches": True}},
    even_batches={"accelerator_config": {"even_batches": False, "dispatch_batches": False}},
    seedable_sampler={"accelerator_config": {"use_seedable_sampler": False}, "max_steps": 5},
    dispatched={
        "accelerator_config": {"dispatch_batches": True},
        "given": on(lambda: Streamed(pictured()[:1] * 6)),
    },
    dispatched_with_other_numbers_of_images={
        "accelerator_config": {"dispatch_batches": True},
        "given": on(lambda: Streamed(rows())),
        "raises": ValueError,
    },
    gradients_of_each_batch={
        "accelerator_config": {"gradient_accumulation_kwargs": {"sync_each_batch": True}},
        "gradient_accumulation_steps": 2,
    },
    accelerator_object={"accelerator_config": AcceleratorConfig(non_blocking=True)},
    subset={"given": on(lambda: torch.utils.data.Subset(rows(), [5, 1, 3]))},
    several_sets={"given": on(lambda: torch.utils.data.ConcatDataset([rows()[:3], rows()[4:]])), "max_steps": 4},
    own_sampler={"mixin": Reversed},
    own_loader={"mixin": OwnLoader},
    own_batches={"mixin": OwnBatches, "gradient_accumulation_steps": 2},
    feature={"given": lambda model: {"data_collator": Pad(BatchFeature)}, **EVALS},
    default_collator={"given": stock(None)},
    collator_of_tokenizer={"given": lambda model: stock(None, processing_class=built()[1].tokenizer)(model)},
    collator_with_tokenizer={
        **SAVES,
        "given": lambda model: {"data_collator": WithTokenizer()},
    },
    shifted_labels={"given": lambda model: {"data_collator": Shifted()}},
    other_shifted_labels={
        "given": lambda model: {"data_collator": Shifted(by=2)},
        "refused": "shift_labels",
    },
    no_labels_for_prediction={
        "act": predict(),
        "given": lambda model: {"data_collator": With(labels=None)},
    },
    mask_of_none={
        "given": lambda model: {"data_collator": With(attention_mask=None)},
        "per_device_train_batch_size": 1,
        "per_device_eval_batch_size": 1,
        **EVALS,
    },
    mask_of_numbers={
        "given": lambda model: {"data_collator": With(attention_mask=lambda b: b["attention_mask"] * 1.0)}
    },
    pixels_of_none={
        "given": lambda model: {"data_collator": With(pixel_values=lambda b: b.get("pixel_values"))},
        "per_device_train_batch_size": 1,
        "max_steps": 8,
    },
    asked_for_hidden_states={"given": lambda model: {"data_collator": With(output_hidden_states=True)}},
    asked_for_a_cache={"given": lambda model: {"data_collator": With(use_cache=True)}},
    positions={"given": lambda model: {"data_collator": Positioned()}},
    failing_collator={"given": lambda model: {"data_collator": failing_collator}, "raises": LookupError},
    unsupervised_step={"given": on(lambda: UNSUPERVISED), "train_sampling_strategy": "sequential"},
    unsupervised_batch={
        "given": on(lambda: UNSUPERVISED[:2] + rows()[2:], eval_dataset=None),
        "train_sampling_strategy": "sequential",
        "gradient_accumulation_steps": 2,
    },
)

# --- cases: models and optimizers -------------------------------------------------------------------------------------


LORA = {"target_modules": r".*language_model.*\.(q_proj|v_proj)", "r": 2, "init_lora_weights": False}


def lora(model, **more):
    torch.manual_seed(3)
    return get_peft_model(model, LoraConfig(**LORA, **more))


def lora_with(**changes) -> Callable:
    """LoRA with other options."""

    def adapt(model):
        torch.manual_seed(3)
        return get_peft_model(model, LoraConfig(**LORA | changes))

    return adapt


def two_adapters(model):
    model = lora(model)
    model.add_adapter("other", LoraConfig(**LORA))
    return model


def ia3(model):
    return get_peft_model(model, IA3Config(target_modules=["k_proj", "v_proj"], feedforward_modules=[]))


def merged(trainer):
    """The model without its adapter, which has become a part of it."""
    trainer.train()
    return trainer.model.merge_and_unload()(**Pad()(rows()[:2])).loss


def with_hidden_states(model):
    model.config.output_hidden_states = True
    return model


def with_more(model):
    """A parameter and a buffer of the user's own."""
    model.register_parameter("mine", torch.nn.Parameter(torch.ones(3)))
    model.register_buffer("also_mine", torch.ones(3))
    return model


def with_weight_norm(model):
    torch.nn.utils.parametrizations.weight_norm(model.lm_head)
    return model


def adapted(model):
    torch.manual_seed(3)
    model.add_adapter(LoraConfig(**LORA))
    return model


def dropping(model):
    """With dropout in attention, of tower and language model, which takes random numbers."""
    for module in model.modules():
        for name in ("attention_dropout", "dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.2)
    return model


def tied(model):
    model.lm_head.weight = model.get_input_embeddings().weight
    model.config.tie_word_embeddings = model.config.text_config.tie_word_embeddings = True
    return model


def from_init(init: Callable = lambda: copy.deepcopy(built()[0])) -> Callable:
    return lambda model: {"model": None, "model_init": init}


def for_trial(trial):
    """The model that a search asks for: of another precision in each trial."""
    return copy.deepcopy(built()[0]).to(torch.bfloat16 if trial and trial["seed"] else torch.float16).float()


def own_optimizer(model) -> dict:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.5)
    return {"optimizers": (optimizer, torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5))}


def own_optimizer_alone(model) -> dict:
    return {"optimizers": (torch.optim.SGD(model.parameters(), lr=0.02), None)}


def own_class(model) -> dict:
    return {"optimizer_cls_and_kwargs": (torch.optim.SGD, {"lr": 0.02, "momentum": 0.3})}


class OwnOptimizer:
    def create_optimizer(self, model=None):
        self.optimizer = torch.optim.SGD((model or self.model).parameters(), lr=0.03, nesterov=True, momentum=0.4)
        return self.optimizer


class OwnScheduler:
    def create_scheduler(self, num_training_steps, optimizer=None):
        self.lr_scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer or self.optimizer, 0.7)
        return self.lr_scheduler


class OwnGroups:
    def get_decay_parameter_names(self, model):
        return [name for name in super().get_decay_parameter_names(model) if "language_model" in name]


class TwoRates:
    def create_optimizer(self, model=None):
        groups = {}
        for name, parameter in self.model.named_parameters():
            groups.setdefault("vision" in name, []).append(parameter)
        self.optimizer = torch.optim.SGD([{"params": groups[k], "lr": 0.01 * (1 + k)} for k in groups])
        return self.optimizer


def groups(trainer):
    trainer.train()
    return [{k: v if k != "params" else len(v) for k, v in g.items()} for g in trainer.optimizer.param_groups]


ADAPTED = {"learning_rate": 0.1, "max_steps": 2, **EVALS, **SAVES}
cases(
    "model",
    frozen_tower={"model": freeze("vision_tower")},
    frozen_tower_and_projector={"model": freeze("vision_tower", "projector")},
    frozen_language_model={"model": freeze("language_model", "lm_head")},
    frozen_embeddings={"model": freeze("embed_tokens")},
    given_in_training_mode={"model": lambda model: model.train(), **EVALS},
    lora={"model": lora, "learning_rate": 0.2},
    lora_saved={"model": lora, "learning_rate": 0.2, **SAVES},
    lora_resumed={"model": lora, "learning_rate": 0.2, **SHORT, "act": then(resumed, max_steps=4)},
    lora_best={"model": lora, "learning_rate": 0.2, **BEST},
    lora_with_dropout={"model": lambda model: lora(model, lora_dropout=0.3), "learning_rate": 0.2},
    lora_with_saved_modules={
        "model": lambda model: lora(model, modules_to_save=["multi_modal_projector"]),
        "learning_rate": 0.2,
        **SAVES,
    },
    lora_checkpointing={"model": lora, "activation_checkpointing": True},
    lora_accumulated={"model": lora, "gradient_accumulation_steps": 2},
    lora_smoothed={"model": lora, "label_smoothing_factor": 0.1},
    dora={"model": lora_with(use_dora=True), **ADAPTED},
    lora_of_head={"model": lora_with(target_modules=["lm_head", "q_proj"]), **ADAPTED},
    lora_of_embeddings={"model": lora_with(target_modules=["embed_tokens", "q_proj"]), **ADAPTED},
    lora_of_all={"model": lora_with(target_modules="all-linear"), **ADAPTED, "rtol": 1e-3},
    lora_of_tower={"model": lora_with(target_modules=r".*vision_tower.*(q_proj|v_proj)"), **ADAPTED},
    lora_with_biases={"model": lora_with(bias="all"), **ADAPTED},
    lora_with_tokens={"model": lora_with(trainable_token_indices=[3, 4]), **ADAPTED},
    lora_from_init={"given": from_init(lambda: lora(copy.deepcopy(built()[0]))), **ADAPTED},
    lora_merged={"model": lora, **ADAPTED, "act": merged},
    two_adapters={"model": two_adapters, **ADAPTED},
    two_adapters_resumed={"model": two_adapters, **SHORT, "act": then(resumed, max_steps=3)},
    saved_modules_resumed={
        "model": lora_with(modules_to_save=["multi_modal_projector", "lm_head"]),
        **SHORT,
        "act": then(resumed, max_steps=3),
    },
    ia3={"model": ia3, **ADAPTED},
    hidden_states={"model": with_hidden_states, **EVALS},
    hidden_states_predicted={"model": with_hidden_states, "act": lambda t: t.predict(rows()[:2])},
    more_parameters={"model": with_more, **SAVES},
    weight_norm={"model": with_weight_norm},
    float64={"model": lambda model: model.double(), **EVALS},
    added_adapter={"model": adapted, "learning_rate": 0.2},
    dropout={"model": dropping},
    dropout_accumulated={"model": dropping, "gradient_accumulation_steps": 2},
    dropout_checkpointing={"model": dropping, "activation_checkpointing": True},
    dropout_resumed={"model": dropping, **SHORT, "act": then(resumed, max_steps=4)},
    tied={"model": tied, **SAVES},
    more_tokens={"model": lambda model: model.resize_token_embeddings(400) and model, **SAVES},
    bfloat16={"model": lambda model: model.to(torch.bfloat16), "rtol": 0.05},
    eager={"model": lambda model: model.set_attn_implementation("eager") or model},
    from_init={"given": from_init()},
    from_init_twice={"given": from_init(), "act": lambda t: (t.train(), t.train())},
    from_init_of_trial={"given": from_init(for_trial)},
    from_init_evaluated={"given": from_init(), "act": evaluate()},
    own_optimizer={"given": own_optimizer},
    own_optimizer_alone={"given": own_optimizer_alone},
    own_optimizer_resumed={"given": own_optimizer, **SHORT, "act": then(resumed, max_steps=3)},
    own_class={"given": own_class},
    create_optimizer={"mixin": OwnOptimizer},
    create_scheduler={"mixin": OwnScheduler},
    decay_names={"mixin": OwnGroups, "weight_decay": 0.5, "act": groups},
    decay_groups={"weight_decay": 0.5, "act": groups},
    two_rates={"mixin": TwoRates, "act": groups},
    qwen2_5_vl={"family": "qwen2_5_vl", **EVALS, **SAVES},
    llava_next={"family": "llava_next", **EVALS, **SAVES},
)

# --- cases: subclasses ------------------------------------------------------------------------------------------------


class Logging:
    def log(self, logs, start_time=None):
        super().log({**logs, "mine": 1.0}, start_time)


class Doubled:
    """The loss doubled by the user's subclass."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        found = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        return (2 * found[0], found[1]) if return_outputs else 2 * found


class FromOutputs:
    """The loss taken from the model's output, as the Trainer's documentation shows."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(**inputs)
        loss = 2 * outputs.loss
        return (loss, outputs) if return_outputs else loss


class FromLogits:
    """The loss computed from the model's logits."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = inputs.pop("labels")
        outputs = model(**inputs)
        logits = outputs.logits[:, :-1].flatten(0, 1)
        loss = torch.nn.functional.cross_entropy(logits.float(), labels[:, 1:].flatten())
        return (loss, outputs) if return_outputs else loss


class Stepping:
    """Notes each step's loss, and scales what is returned."""

    def training_step(self, *args, **kwargs):
        loss = super().training_step(*args, **kwargs)
        self.control.mine = [*getattr(self.control, "mine", []), loss.item()]
        return loss


class OwnStep:
    """A user's own training step, without that of the Trainer."""

    def training_step(self, model, inputs, num_items_in_batch=None):
        model.train()
        loss = self.compute_loss(model, self._prepare_inputs(inputs), num_items_in_batch=num_items_in_batch)
        self.accelerator.backward(loss)
        return loss.detach()


class Predicting:
    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        loss, logits, labels = super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        return loss + 1, logits, labels


class Preparing:
    def _prepare_inputs(self, inputs):
        inputs = super()._prepare_inputs(inputs)
        labels = inputs["labels"].clone()
        labels[0] = -100
        return {**inputs, "labels": labels}


class Evaluating:
    def evaluate(self, *args, **kwargs):
        return super().evaluate(*args, **kwargs) | {"eval_mine": 3.0}


class Looping:
    def evaluation_loop(self, *args, **kwargs):
        output = super().evaluation_loop(*args, **kwargs)
        output.metrics["eval_mine"] = 4.0
        return output


class Flops:
    def floating_point_ops(self, inputs):
        return inputs["input_ids"].numel()


class Saving:
    def _save(self, output_dir=None, state_dict=None):
        super()._save(output_dir, state_dict)
        (Path(output_dir or self.args.output_dir) / "mine.txt").write_text("mine")


class TooLarge:
    """Batches of more than two samples do not fit."""

    def training_step(self, model, inputs, *args, **kwargs):
        if len(inputs["input_ids"]) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return super().training_step(model, inputs, *args, **kwargs)


def too_large(model):
    def check(module, args, kwargs):
        if len(kwargs["input_ids"]) > 2 and module.training:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    model.register_forward_pre_hook(check, with_kwargs=True)
    return model


class Clipping:
    def _clip_grad_norm(self, model):
        norm = super()._clip_grad_norm(model)
        return norm * 2


FITTING = {"auto_find_batch_size": True, "per_device_train_batch_size": 8}
cases(
    "subclass",
    log={"mixin": Logging, **EVALS},
    compute_loss={"mixin": Doubled},
    compute_loss_evaluated={"mixin": Doubled, **FEW},
    loss_of_outputs={"mixin": FromOutputs},
    loss_of_logits={
        "mixin": FromLogits,
        "refused": "compute_loss",
    },
    own_training_step={
        "mixin": OwnStep,
        "refused": "training_step",
    },
    training_step={"mixin": Stepping, "gradient_accumulation_steps": 2},
    prediction_step={"mixin": Predicting, **EVALS},
    prediction_step_with_metrics={"mixin": Predicting, **FEW},
    prepare_inputs={"mixin": Preparing, **EVALS},
    evaluate={"mixin": Evaluating, **EVALS, "metric_for_best_model": "mine", **SAVES},
    evaluation_loop={"mixin": Looping, **EVALS},
    floating_point_ops={"mixin": Flops},
    save={"mixin": Saving, **SAVES},
    clip_grad_norm={"mixin": Clipping},
    finds_batch_size={"mixin": TooLarge, **FITTING},
    finds_batch_size_of_model={"model": too_large, **FITTING},
    finds_batch_size_with_checkpointing={"model": too_large, **FITTING, "activation_checkpointing": True},
    out_of_memory={"mixin": TooLarge, "per_device_train_batch_size": 8, "raises": RuntimeError},
)


# --- cases: what is done one after the other --------------------------------------------------------------------------


def changed(**arguments) -> Callable:
    """Trains, changes arguments, trains again."""

    def act(trainer):
        first = trainer.train()
        for name, value in arguments.items():
            setattr(trainer.args, name, value)
        return first, trainer.train()

    return act


def other_data(trainer):
    trainer.train()
    trainer.train_dataset = rows()[4:]
    return trainer.train()


def another(trainer, cls):
    """A second trainer on the same model."""
    args = trainer.args if cls is not Trainer else TrainingArguments(**PEER, output_dir=trainer.args.output_dir)
    second = cls(model=trainer.model, args=args, train_dataset=rows()[3:], data_collator=Pad())
    return second.train(), second.state.log_history


def saved_model(trainer):
    """The model, saved by itself."""
    trainer.train()
    trainer.model.save_pretrained(trainer.folder / "alone", max_shard_size="40KB")


def copied_model(trainer):
    """A copy of the model, which trains on by itself."""
    trainer.train()
    copied = copy.deepcopy(trainer.model)
    loss = copied(**Pad()(rows()[:2])).loss
    loss.backward()
    return loss, [p.grad for n, p in copied.named_parameters() if p.grad is not None]


def saved(trainer):
    trainer.train()
    trainer.save_model(str(trainer.folder / "final"))
    trainer.save_model()
    trainer.save_state()
    read = type(built()[0]).from_pretrained(trainer.folder / "final")
    return dict(read.state_dict())


def metrics_files(trainer):
    result = trainer.train()
    trainer.log_metrics("train", result.metrics)
    trainer.save_metrics("train", result.metrics)
    trainer.save_metrics("eval", trainer.evaluate())
    return result.metrics


def losses_by_hand(trainer):
    """What a user gets who calls the trainer's parts."""
    batch = next(iter(trainer.get_eval_dataloader()))
    model = trainer.model.eval()
    loss, outputs = trainer.compute_loss(model, dict(batch), return_outputs=True)
    step = trainer.prediction_step(model, dict(batch), False)
    only = trainer.prediction_step(model, dict(batch), True)
    plain = trainer.compute_loss(model, dict(batch))
    return loss, outputs.logits, step, only, plain


def model_by_hand(trainer):
    """The model itself, before and after training."""
    batch = Pad()(rows()[:2])
    before = trainer.model(**batch)
    trainer.train()
    trainer.model.eval()
    after = trainer.model(**batch)
    generated = trainer.model.generate(
        input_ids=batch["input_ids"][1:],
        attention_mask=batch["attention_mask"][1:],
        max_new_tokens=3,
        do_sample=False,
        pixel_values=batch["pixel_values"][1:],
    )
    return before.loss, before.logits, after.loss, after.logits, generated


def step_by_hand(trainer):
    """One training step outside of `train`."""
    trainer.create_optimizer_and_scheduler(num_training_steps=2)
    trainer.current_gradient_accumulation_steps = 1
    batch = Pad()(rows()[:2])
    loss = trainer.training_step(trainer.model, dict(batch), torch.tensor(7))
    gradients = {n: p.grad for n, p in trainer.model.named_parameters() if p.grad is not None}
    return loss, gradients


def facts(trainer):
    """What a user may ask of a trainer before training."""
    args, loader = trainer.args, trainer.get_train_dataloader()
    return {
        "arguments": [args.train_batch_size, args.eval_batch_size, args.world_size, str(args.device)],
        "warmup": args.get_warmup_steps(10),
        "steps": trainer.set_initial_training_values(args, loader),
        "batch": trainer.get_total_train_batch_size(args),
        "total_flos": float(trainer.floating_point_ops(Pad()(rows()[:2]))),
        "labels": (trainer.label_names, trainer.can_return_loss),
        "first": (trainer.is_world_process_zero(), trainer.is_local_process_zero()),
    }


class Search:
    """A search backend of two trials, in place of one that would need another package."""

    def ensure_available(self):
        pass

    @staticmethod
    def default_hp_space(trial):
        return {}

    def run(self, trainer, n_trials, direction, **kwargs):
        found = []
        for number in range(n_trials):
            trainer.train(trial={"learning_rate": 0.01 * (number + 1), "seed": number})
            found.append((trainer.state.log_history, trainer.evaluate()))
        return found


def searched(trainer):
    backends = patch.dict(peer.ALL_HYPERPARAMETER_SEARCH_BACKENDS, {peer.HPSearchBackend.WANDB: Search})
    wandb = patch.dict(sys.modules, wandb=SimpleNamespace(run=SimpleNamespace(id="1", name="one")))
    with backends, wandb, patch("transformers.integrations.hp_params", dict):
        return trainer.hyperparameter_search(backend="wandb", n_trials=2)


def positional(trainer):
    """All arguments by their places, as `Trainer` takes them."""
    again = type(trainer)(trainer.model, trainer.args, Pad(), rows(), rows()[:4])
    return again.train(), again.evaluate()


def by_default(trainer):
    """A trainer without arguments."""
    with contextlib.chdir(trainer.folder):
        made = type(trainer)(copy.deepcopy(built()[0]), train_dataset=rows(), data_collator=Pad())
        return made.args.output_dir, made.args.num_train_epochs, made.args.optim, made.evaluate(rows()[:2])


def by_setters(trainer):
    """Options set by the methods of the arguments."""
    args = trainer.args
    args.set_training(learning_rate=0.03, batch_size=4, num_epochs=1, gradient_accumulation_steps=2)
    args.set_evaluate(strategy="epoch", batch_size=2, delay=0)
    args.set_save(strategy="epoch", total_limit=1)
    args.set_logging(strategy="steps", steps=2)
    args.set_optimizer(name="sgd", learning_rate=0.02, weight_decay=0.3)
    args.set_lr_scheduler(name="cosine", num_epochs=2, warmup_steps=1)
    args.set_dataloader(train_batch_size=2, eval_batch_size=2, drop_last=True)
    return trainer.train()


def parsed(trainer):
    """Options from a command line, a dictionary and YAML."""
    kind, parse = type(trainer.args), HfArgumentParser(type(trainer.args))
    line = ["--output_dir", "x", "--learning_rate", "0.1", "--bf16", "--optim_args", "momentum=0.1", "--use_cpu", "1"]
    line += ["--lr_scheduler_kwargs", '{"min_lr": 0.1}', "--logging_steps", "0.5", "--label_names", "a", "b"]
    written = trainer.folder / "options.yaml"
    written.write_text("output_dir: y\nlearning_rate: 0.2\neval_strategy: steps\neval_steps: 3\nuse_cpu: true\n")
    given = {"output_dir": "z", "seed": 3, "use_cpu": True}
    made = [parse.parse_args_into_dataclasses(line)[0], parse.parse_dict(given)[0]]
    made += [parse.parse_yaml_file(str(written))[0], kind("w", use_cpu=True), copy.deepcopy(trainer.args)]
    theirs = [f.name for f in fields(TrainingArguments) if f.name not in OTHER_DEFAULTS]
    return [{name: str(args.to_dict()[name]) for name in theirs} for args in made]


def state_on_disk(trainer):
    """Argument and state files, written and read again."""
    trainer.train()
    trainer.state.save_to_json(str(trainer.folder / "state.json"))
    read = TrainerState.load_from_json(str(trainer.folder / "state.json"))
    kept = trainer.args.to_sanitized_dict()
    return vars(read), {name: kept[name] for name in ("learning_rate", "optim", "max_steps", "eval_strategy")}


def flags(trainer):
    """What a trainer says of itself before, during and after training."""
    told = [(trainer.is_in_train, trainer.model_wrapped is trainer.model, trainer.model.training)]
    trainer.train()
    told.append((trainer.is_in_train, trainer.model_wrapped is trainer.model, trainer.model.training))
    trainer.evaluate()
    trainer.end()
    return [*told, trainer.model.training, len(trainer.optimizer.param_groups), trainer.lr_scheduler.last_epoch]


cases(
    "sequence",
    ignore_keys={
        **FEW,
        "act": lambda t: t.train(ignore_keys_for_eval=["image_hidden_states", "past_key_values"]),
    },
    another_trainer={"act": lambda t: (t.train(), another(t, type(t)))},
    the_plain_trainer={"act": lambda t: (t.train(), another(t, Trainer))},
    saved_model={"act": saved_model},
    copied_model={"act": copied_model},
    twice={"act": lambda t: (t.train(), t.train())},
    thrice_with_evaluation={"act": lambda t: (t.train(), t.evaluate(), t.train(), t.evaluate(), t.train())},
    evaluate_then_train={"act": lambda t: (t.evaluate(), t.train())},
    predict_then_train={"act": lambda t: (t.predict(rows()[:2]), t.train())},
    other_learning_rate={"act": changed(learning_rate=0.01, weight_decay=0.2)},
    other_length={"act": changed(max_steps=5)},
    other_accumulation={"act": changed(gradient_accumulation_steps=3)},
    other_seed={"act": changed(seed=1)},
    other_logging={"act": changed(logging_steps=3)},
    other_data={"act": other_data},
    saved={"act": saved},
    metrics_files={"act": metrics_files},
    losses={"act": losses_by_hand},
    losses_smoothed={"act": losses_by_hand, "label_smoothing_factor": 0.1},
    model={"act": model_by_hand},
    step={"act": step_by_hand},
    facts={"act": facts},
    flags={"act": flags},
    positional={"act": positional},
    by_default={"act": by_default},
    by_setters={"act": by_setters, "max_steps": -1},
    parsed={"act": parsed},
    state_on_disk={"act": state_on_disk},
    facts_of_epochs={"act": facts, "max_steps": -1, "gradient_accumulation_steps": 3},
    search={"act": searched, "given": from_init(for_trial)},
    search_without_init={"act": searched, "raises": RuntimeError},
    search_without_backend={"act": lambda t: t.hyperparameter_search(), "raises": RuntimeError},
)

# --- cases: mistakes --------------------------------------------------------------------------------------------------

cases(
    "mistake",
    common={"raises": ValueError},
    best_without_saving={**EVALS, "load_best_model_at_end": True},
    best_with_other_strategy={**EVALS, "save_strategy": "epoch", "load_best_model_at_end": True},
    best_with_other_steps={**EVALS, "eval_steps": 2, **SAVES, "save_steps": 3, "load_best_model_at_end": True},
    best_with_fractions={**EVALS, "eval_steps": 0.3, **SAVES, "save_steps": 2, "load_best_model_at_end": True},
    best_without_metric={"save_strategy": "best"},
    logging_steps_of_zero={"logging_steps": 0},
    logging_steps_of_one_and_a_half={"logging_steps": 1.5},
    eval_steps_of_one_and_a_half={"eval_strategy": "steps", "eval_steps": 1.5},
    save_steps_of_one_and_a_half={"save_strategy": "steps", "save_steps": 1.5},
    eval_steps_of_zero={"eval_strategy": "steps", "eval_steps": 0, "logging_steps": 0},
    unknown_eval_strategy={"eval_strategy": "sometimes"},
    unknown_save_strategy={"save_strategy": "sometimes"},
    unknown_logging_strategy={"logging_strategy": "sometimes"},
    unknown_schedule={"lr_scheduler_type": "sometimes"},
    unknown_optimizer={"optim": "guess"},
    unknown_tracker={"report_to": "guess"},
    unknown_hub_strategy={"hub_strategy": "guess"},
    unknown_debug={"debug": "guess"},
    plateau_without_evaluation={"lr_scheduler_type": "reduce_lr_on_plateau"},
    greedy_without_evaluation={"lr_scheduler_type": "greedy"},
    both_precisions={"fp16": True, "bf16": True},
    both_precisions_of_evaluation={"fp16_full_eval": True, "bf16_full_eval": True},
    negative_warmup={"warmup_steps": -1},
    prefetch_without_workers={"dataloader_prefetch_factor": 2},
    no_empty_cache_steps={"torch_empty_cache_steps": 0},
    no_eval_data={**EVALS, "given": lambda model: {"eval_dataset": None}},
    stream_without_steps={"given": on(lambda: Streamed(rows())), "max_steps": -1},
    metrics_without_result={"batch_eval_metrics": True, "given": measured},
    unused_columns_of_all={"given": on(lambda: Dataset.from_list([{"a": 1}])), "remove_unused_columns": True},
    model_and_init={"given": lambda model: {"model_init": lambda: model}},
    no_model={"given": lambda model: {"model": None}, "raises": RuntimeError},
    init_of_nothing={"given": lambda model: {"model": None, "model_init": lambda: None}, "raises": RuntimeError},
    init_with_optimizer={"given": lambda model: own_optimizer(model) | from_init()(model), "raises": RuntimeError},
    two_optimizers={"given": lambda model: own_optimizer(model) | own_class(model), "raises": RuntimeError},
    collator_without_call={
        "given": lambda model: {"data_collator": SimpleNamespace(collate_batch=print)},
        "refused": "`data_collator` must be a function",
        "raises": TypeError,
    },
    unknown_option={"learning_rat": 0.1, "raises": TypeError},
    unknown_argument={"given": lambda model: {"modle": model}, "raises": TypeError},
    persistent_without_workers={"dataloader_persistent_workers": True},
    negative_workers={"dataloader_num_workers": -1, "refused": "`dataloader_num_workers` must be in"},
    batch_of_none={"per_device_train_batch_size": 0, "refused": "`per_device_train_batch_size` must be"},
    unknown_schedule_option={"lr_scheduler_kwargs": {"guess": 1}, "lr_scheduler_type": "cosine", "raises": TypeError},
    dictionary_of_arguments={"accelerator_config": {"guess": 1}, "raises": TypeError},
    early_stopping_without_evaluation={
        "given": lambda model: {"callbacks": [EarlyStoppingCallback(1)]},
        "metric_for_best_model": "loss",
        "raises": AssertionError,
    },
    early_stopping_without_metric={
        **EVALS,
        "given": lambda model: {"callbacks": [EarlyStoppingCallback(1)]},
        "raises": AssertionError,
    },
    failing_metrics={**EVALS, "given": lambda m: {"compute_metrics": lambda p: p.guess}, "raises": AttributeError},
)

# What the peer does and we refuse, by name.


def summed(outputs, labels, num_items_in_batch=None):
    return outputs.logits.sum()


def causal(batch):
    """A mask (B, 1, S, S)."""
    mask = batch["attention_mask"].bool()
    return mask[:, None, None] & torch.ones(mask.shape[1], mask.shape[1], dtype=torch.bool).tril()


def prompts(model):
    sizes = {"num_layers": 2, "token_dim": 32, "num_attention_heads": 4}
    return get_peft_model(model, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2, **sizes))


cases(
    "refused",
    loss_function={"given": lambda model: {"compute_loss_func": summed}, "refused": "compute_loss_func"},
    model_without_head={
        "given": lambda model: {"model": model.model},
        "raises": ValueError,
        "refused": "LlavaModel",
    },
    language_model={
        "given": lambda model: {"model": model.model.language_model},
        "raises": (AttributeError, TypeError, ValueError),
        "refused": "LlamaModel",
    },
    liger={
        "use_liger_kernel": True,
        "liger_kernel_config": {"fused_linear_cross_entropy": True},
        "act": lambda t: None,
        "refused": "liger",
    },
    plain_arguments={"act": lambda t: type(t)(t.model, TrainingArguments("out")) and None, "refused": "args"},
    prompt_tuning={"model": prompts, "refused": "PromptTuningConfig"},
    batch_without_images={
        "given": on(lambda: without("pixel_values")),
        "refused": "placeholders .* but nothing for them",
    },
    mask_of_four_dimensions={
        "given": lambda model: {"data_collator": With(attention_mask=causal)},
        "per_device_train_batch_size": 1,
        "refused": "Masks of other shapes",
    },
    grouped_ids={"train_sampling_strategy": "group_by_length", "refused": "Give the data set a column 'length'"},
    unlabelled_training={"given": on(lambda: without("labels")), "raises": ValueError, "refused": "labels"},
)


def marked(case: Case):
    return pytest.param(case, id=case.name, marks=[pytest.mark.slow] * case.slow)


@pytest.mark.parametrize("case", map(marked, CASES))
def test_side_by_side(case, tmp_path):
    assert side_by_side(case, tmp_path) == []


# Evidence that the same holds in other settings, as far as it can: trained with an isolator, which slow steps leave
# alone, everything is equal; in both modes, all but numbers.
SETTINGS = {
    "isolator": ({"isolator_length": 4}, 1),
    "both modes": (
        {"slow_mode_ratio": 0.5, "mode_schedule": "periodic", "isolator_length": 4, "distillation_weight": 1.0},
        1e13,
    ),
}
# What has the isolator's parameters: the optimizer, and counts of them.
PARAMETERS = re.compile(r"optimizer\.pt|/trained|dualspeed\.|params:|total_parameters|total_flos")


@pytest.mark.slow
@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("case", [pytest.param(c, id=c.name) for c in CASES if not (c.refused or c.raises)])
def test_side_by_side_in_other_settings(case, setting, tmp_path):
    ours, tolerance = SETTINGS[setting]
    case = replace(case, ours=ours, rtol=case.rtol * tolerance)
    if case.given in (own_optimizer, own_optimizer_alone):
        case = replace(case, refused="`optimizers` was made before")
    assert [line for line in side_by_side(case, tmp_path) if not PARAMETERS.search(line)] == []


# --- every family of models -------------------------------------------------------------------------------------------


def with_batch(inputs: dict) -> Callable:
    """A data set whose only batch is `inputs`."""
    return lambda model: {
        "train_dataset": [{}, {}],
        "eval_dataset": [{}, {}],
        "data_collator": lambda examples: dict(inputs),
    }


def family_case(name: str, **settings) -> Case:
    model = MODELS[name].model()
    modality = next(modality for family, modality in MODEL_CASES if family == name)
    inputs = batch_of(MODELS[name], model, modality, "right").inputs
    options = {"max_steps": 1, **settings.pop("options", {})}
    change = settings.pop("model", lambda model: model)
    return Case(name, options, given=with_batch(inputs), model=lambda _: change(copy.deepcopy(model)), **settings)


# A fourth of the families without being asked, because conformance tests run all of them.
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (n % 4 > 0)) for n, name in enumerate(MODELS)]
)
def test_a_step_of_every_family(name, tmp_path):
    assert side_by_side(family_case(name, options=EVALS), tmp_path) == []


def ask_for_router_loss(model):
    for config in (model.config, model.config.get_text_config()):
        config.output_router_logits = True
    return model


@pytest.mark.parametrize("name", ["qwen3_vl_moe", "qwen3_5_moe", "ernie4_5_vl_moe", "qwen3_omni_moe", "minimax_m3_vl"])
def test_the_loss_of_routers_counts(name, tmp_path):
    assert side_by_side(family_case(name, model=ask_for_router_loss), tmp_path) == []


# --- the comparison, and the differences on purpose -------------------------------------------------------------------


@pytest.mark.parametrize(
    "ours",
    [
        {"slow_mode_ratio": 0.0},
        {"slow_mode_ratio": 1.0, "distillation_weight": 1.0},
        {"learning_rate": 0.0501},
        {"seed": 8},
        {"logging_steps": 2},
        {"save_steps": 2, "save_strategy": "steps"},
        {"max_steps": 4},
        {"lr_scheduler_type": "constant"},
        {"label_smoothing_factor": 0.01},
    ],
    ids=str,
)
def test_the_comparison_sees_other_settings(ours, tmp_path):
    assert side_by_side(Case("other", {}, ours=ours), tmp_path) != []


def test_other_defaults_are_those_of_the_table():
    with patch("torch.accelerator.is_available", return_value=False):
        theirs, ours = TrainingArguments("out"), DualSpeedTrainingArguments("out")
    theirs, ours = ({f.name: getattr(args, f.name) for f in fields(TrainingArguments)} for args in (theirs, ours))
    told = {name: (theirs[name], ours[name]) for name in ours if str(theirs[name]) != str(ours[name])}
    assert set(told) == set(OTHER_DEFAULTS)
    assert told["remove_unused_columns"] == (True, False)
    assert told["dataloader_pin_memory"] == (True, False)
    assert ours["accelerator_config"].dispatch_batches is False


def test_what_is_added_is_that_of_the_tables(tmp_path):
    trainer = make(Case("added", SAVES, ours=SETTINGS["both modes"][0]), DualSpeedTrainer, tmp_path)
    theirs = make(Case("added", SAVES), Peer, tmp_path / "peer")
    for each in (trainer, theirs):
        each.train()
        each.save_model()
    names = lambda folder: {path.name for path in (folder / "out").rglob("*")}  # noqa: E731
    assert names(tmp_path) - names(tmp_path / "peer") == set(ADDED_FILES)
    callbacks = [{type(c).__name__ for c in each.callback_handler.callbacks} for each in (trainer, theirs)]
    assert callbacks[0] - callbacks[1] == ADDED_CALLBACKS
    logs, others = ([e for e in each.state.log_history if "loss" in e] for each in (trainer, theirs))
    added = {key for ours, peers in zip(logs, others, strict=True) for key in ours.keys() - peers.keys()}
    stateful = trainer.state.stateful_callbacks.keys() - theirs.state.stateful_callbacks.keys()
    assert added | stateful == set(ADDED_KEYS) - {"router_loss"}  # of a mixture of experts
    # What is added is true.
    assert [(log["fast_steps"], log["slow_steps"]) for log in logs] == [(1, 0), (0, 1), (1, 0)]
    parts = [[log.get(f"{kind}_loss", 0.0) for kind in ("fast", "slow", "distillation")] for log in logs]
    assert [sum(losses) for losses in parts] == pytest.approx([log["loss"] for log in logs])


def test_micro_batches_weigh_by_tokens_for_every_model(tmp_path):
    """Qwen2.5-VL's own training averages the means of micro-batches. Ours divides by the tokens of the step."""
    options = {"max_steps": 1, "train_sampling_strategy": "sequential"}
    small = {**options, "gradient_accumulation_steps": 2}
    large = {**options, "per_device_train_batch_size": 4}
    losses = [
        make(Case("mean", o, family="qwen2_5_vl"), cls, tmp_path).train().training_loss
        for cls, o in ((DualSpeedTrainer, small), (DualSpeedTrainer, large), (Peer, large), (Peer, small))
    ]
    assert losses[:2] == pytest.approx([losses[2]] * 2, rel=1e-5)
    assert losses[3] != pytest.approx(losses[2], rel=1e-3)


def test_a_step_without_labels_has_a_loss_of_zero_and_not_nan(tmp_path):
    """The peer divides zero by zero. Its weights stay, but what it shows is NaN from then on."""
    in_order = {"train_sampling_strategy": "sequential", "logging_nan_inf_filter": False}
    case = Case("unsupervised", in_order, given=on(lambda: UNSUPERVISED))
    ours, theirs = (make(case, cls, tmp_path) for cls in (DualSpeedTrainer, Peer))
    losses = []
    for trainer in (ours, theirs):
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert losses[0][0] == 0.0 < min(losses[0][1:])
    assert np.isnan(losses[1]).all()


def test_labels_of_visual_tokens_are_not_trained_on(tmp_path):
    """No model predicts a placeholder. The peer trains on its label where a collator leaves it."""
    labelled = [{**row, "labels": row["input_ids"]} for row in rows()]
    image = built()[0].config.image_token_id
    masked = [{**row, "labels": [-100 if i == image else i for i in row["input_ids"]]} for row in rows()]
    losses = [
        make(Case("labelled", {"max_steps": 1}, given=on(lambda data=data: data)), cls, tmp_path).train().training_loss
        for cls, data in ((DualSpeedTrainer, labelled), (Peer, masked), (Peer, labelled))
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert losses[2] != pytest.approx(losses[1], rel=1e-3)


def test_groups_by_length_are_of_the_lengths_in_each_mode(tmp_path):
    """The order within an epoch is ours, which also knows pruned lengths, and evaluation goes in order."""
    lengths = {"length": [len(row["input_ids"]) for row in rows()]}
    lengths["visual_length"] = [[16] * len(row.get("pixel_values", ())) for row in rows()]
    data = table()
    for name, column in lengths.items():
        data = data.add_column(name, column)
    options = {"max_steps": -1, "num_train_epochs": 2, "train_sampling_strategy": "group_by_length"}
    case = Case("grouped", options, given=lambda model: {"train_dataset": data, "eval_dataset": data})
    ours, theirs = (make(case, cls, tmp_path) for cls in (DualSpeedTrainer, Peer))
    steps, orders, evaluated = [], [], []
    for trainer in (ours, theirs):
        trainer.train()
        steps.append(trainer.state.global_step)
        orders.append([len(ids) for batch in trainer.get_train_dataloader() for ids in batch["labels"]])
        texts = [ids for batch in trainer.get_eval_dataloader() for ids in batch["input_ids"]]
        evaluated.append([ids[ids != 0].tolist() for ids in texts])
    assert steps == [8, 8]
    assert len(orders[0]) == len(orders[1]) == len(data)
    in_order = [[i for i in row["input_ids"] if i] for row in rows()]
    assert evaluated[0] == in_order != evaluated[1]
    assert sorted(evaluated[1]) == sorted(in_order)


@pytest.mark.parametrize("option", ["resume_from_checkpoint", "load_best_model_at_end"])
def test_the_peer_reads_nothing_back(option, tmp_path):
    """Why `Peer` is mended: `Trainer` of 5.23 leaves a vision-language model as it is when it loads a checkpoint."""
    case = Case("read", BEST | {"max_steps": 2, "metric_for_best_model": "loss", "greater_is_better": True})
    first = make(case, Trainer, tmp_path)
    first.train()
    if option == "load_best_model_at_end":
        model, folder = first.model, first.state.best_model_checkpoint
        assert folder.endswith("-1")
    else:
        again = make(case, Trainer, tmp_path)
        folder = str(tmp_path / "out" / "checkpoint-2")
        again._load_from_checkpoint(folder)
        model = again.model
    saved = type(model).from_pretrained(folder).state_dict()
    assert any(not torch.equal(value, saved[name]) for name, value in model.state_dict().items())
    ours = make(case, DualSpeedTrainer, tmp_path)
    ours._load_from_checkpoint(folder)
    assert all(torch.equal(value, saved[name]) for name, value in ours.model.state_dict().items())


def test_the_peer_does_not_shift_smoothed_labels(tmp_path):
    """Why `Peer` is mended: `Trainer` of 5.23 scores each token against itself where labels are smoothed."""
    case = Case("smoothed", {"label_smoothing_factor": 0.1})
    mended, plain = (make(case, cls, tmp_path).evaluate()["eval_loss"] for cls in (Peer, Trainer))
    assert plain != pytest.approx(mended, rel=1e-4)
