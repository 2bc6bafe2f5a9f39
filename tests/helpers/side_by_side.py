"""Runs `transformers.Trainer` and `DualSpeedTrainer` side by side, and compares all that a user sees of them.

That is: what calls return, logs, state, events of callbacks, weights, files with their contents, and random states.
Where the two differ on purpose, the tables below say so.
"""

from __future__ import annotations

import copy
import json
import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields, replace
from functools import cache
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from tiny_models import FAMILIES, batch
from training import SAMPLES
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainerState, TrainingArguments
from transformers import trainer as peer

from hf_dualspeed import DualSpeedTrainer, DualSpeedTrainingArguments

# --- differences on purpose -------------------------------------------------------------------------------------------

# What only our trainer shows, by its key or file name, and why.
ADDED_KEYS = {
    "fast_loss": "losses are logged by mode",
    "slow_loss": "losses are logged by mode",
    "router_loss": "a loss that balances experts is logged by itself",
    "distillation_loss": "slow steps have a second loss",
    "fast_steps": "steps are logged by mode",
    "slow_steps": "steps are logged by mode",
    "steps_per_second": "a training log has the speed since the last one",
    "data_wait": "a training log has the share of time that steps waited for their batches",
    "fast_step_seconds": "a training log has the seconds of a step of each mode",
    "slow_step_seconds": "a training log has the seconds of a step of each mode",
    "speedup_over_slow_steps": "a training log has the speed so far against slow steps alone",
    "seconds_left": "a training log has the seconds of the steps to come",
    "least_seconds_left": "the same, as long as one mode has not been timed",
    "visual_tokens_saved": "a training log has the share of visual tokens that fast steps saved",
    "ModeClock": "the checkpoint holds steps and seconds by mode",
}
ADDED_FILES = {
    "pruner_config.json": "the pruner stands beside the model",
    "mode_isolator.safetensors": "the isolator stands beside the model",
    "results.json": "a saved model has the measurements of its run",
    "learning_curve.png": "a saved model has the losses of its run",
}
ADDED_CALLBACKS = {"ModeClock", "ModeLosses", "SelectiveCheckpointing", "EpochBegin", "RunDisplay"}
# In their place, ours shows a run.
REPLACED_CALLBACKS = {"PrinterCallback", "ProgressCallback"}
# Arguments of ours with another default: (the peer's, ours, why). A case sets ours for both.
OTHER_DEFAULTS = {
    "remove_unused_columns": (True, False, "a collator makes the batch from columns that forward does not name"),
    "dataloader_pin_memory": (True, False, "torch warns about it in every loader without an accelerator"),
    "accelerator_config": (None, {"dispatch_batches": False}, "a batch of B samples holds any number of images"),
}


class Peer(Trainer):
    """`Trainer`, mended where 5.23 goes wrong with vision-language models and ours does not."""

    # It reads checkpoints by module name, and not strictly. `save_pretrained` writes other names, so nothing is loaded.
    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        read_back(self.model, resume_from_checkpoint)

    def _load_best_model(self):
        super()._load_best_model()
        read_back(self.model, self.state.best_model_checkpoint)

    # It shifts smoothed labels only for models that are listed as causal language models.
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if self.label_smoother is None:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        names = peer.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES | {"": type(peer.unwrap_peft_model(model)).__name__}
        with patch.object(peer, "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES", names):
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)


def read_back(model, folder) -> None:
    if isinstance(model, PreTrainedModel):
        model.load_state_dict(type(model).from_pretrained(folder).state_dict())


# --- model and data ---------------------------------------------------------------------------------------------------

PEER = {
    "max_steps": 3,
    "per_device_train_batch_size": 2,
    "per_device_eval_batch_size": 3,
    "learning_rate": 0.05,
    # Adam would blow the rounding noise of gradients that should be zero (key biases) up to whole steps.
    "optim": "sgd",
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
    "use_cpu": True,
    "seed": 7,
    **{name: ours for name, (_, ours, _) in OTHER_DEFAULTS.items()},
}
# Every step trains on all tokens, and nothing is added to its loss.
OURS = {"slow_mode_ratio": 1.0, "isolator_length": 0, "distillation_weight": 0.0}


@cache
def built(family: str = "llava"):
    with torch.random.fork_rng():  # the first caller must not see other random numbers than later ones
        return FAMILIES[family].build()


@cache
def rows(family: str = "llava") -> list[dict]:
    """The samples as the collator takes them: ids and labels as lists, images (n, 3, 16, 16) where there are any."""
    found = []
    for sample in SAMPLES:
        made = batch(FAMILIES[family], built(family)[1], [sample])
        lists = {key: made.pop(key)[0].tolist() for key in Pad.keys if key in made}
        found.append(lists | made)
    return found


@dataclass
class Pad:
    """Pads the columns of text on the right and joins those of images."""

    kind: type = dict
    keys: tuple = ("input_ids", "attention_mask", "labels", "mm_token_type_ids")
    fill: dict = field(default_factory=lambda: {"labels": -100})

    def __call__(self, examples: list[dict]) -> dict:
        width = max(len(e["input_ids"]) for e in examples)
        made = {}
        for key in self.keys:
            if key in examples[0]:
                padded = [list(e[key]) + [self.fill.get(key, 0)] * (width - len(e[key])) for e in examples]
                made[key] = torch.tensor(padded)
        for key in ("pixel_values", "image_sizes", "image_grid_thw"):
            units = [torch.as_tensor(unit) for e in examples if e.get(key) is not None for unit in e[key]]
            if units:  # images, padded to as many tiles, or patches
                made[key] = torch.nn.utils.rnn.pad_sequence(units, batch_first=True)
        return self.kind(made)


class Streamed(torch.utils.data.IterableDataset):
    def __init__(self, items):
        self.items = items

    def __iter__(self):
        return iter(self.items)


def table(items=None) -> Dataset:
    lists = {"pixel_values": torch.Tensor.tolist}
    plain = [{key: lists.get(key, list)(value) for key, value in row.items()} for row in items or rows()]
    return Dataset.from_list([{**row, "note": "x"} for row in plain])


def pictured() -> list[dict]:
    return [row for row in rows() if "pixel_values" in row]


def without(*keys) -> list[dict]:
    return [{key: value for key, value in row.items() if key not in keys} for row in rows()]


def text_only() -> list[dict]:
    image = built()[0].config.image_token_id
    return [
        {
            key: [v for v, i in zip(row[key], row["input_ids"], strict=True) if i != image]
            for key in Pad.keys
            if key in row
        }
        for row in rows()
    ]


def equal_rows() -> list[dict]:
    """Samples of one length with one image (3, 16, 16) each, for collators of transformers."""
    pictures = [row["pixel_values"][0] for row in pictured() if len(row["pixel_values"]) == 1]
    ids = [[built()[0].config.image_token_id] * 16 + [*range(60 + n, 70 + n)] for n in range(len(pictures))]
    labels = [[-100] * 20 + row[20:] for row in ids]
    pixels = [picture.numpy() for picture in pictures]
    keys = ("input_ids", "attention_mask", "labels", "pixel_values")
    return [
        dict(zip(keys, values, strict=True)) for values in zip(ids, [[1] * 26] * len(ids), labels, pixels, strict=True)
    ]


# --- what a user sees -------------------------------------------------------------------------------------------------

EVENTS = [name for name in vars(TrainerCallback) if name.startswith("on_")]


def noted(event: str) -> Callable:
    def note(self, args, state, control, **kwargs):
        shown = {key: copy.deepcopy(kwargs[key]) for key in ("logs", "metrics") if key in kwargs}
        seen = {"event": event, "step": state.global_step, "epoch": state.epoch, "of": state.max_steps}
        self.events.append({**seen, "best": state.best_metric, "given": sorted(kwargs), **shown, **vars(control)})

    return note


class Recorder(TrainerCallback):
    """Notes every event with the state, the control and what it was given."""

    def __init__(self):
        self.events: list[dict] = []


for name in EVENTS:
    setattr(Recorder, name, noted(name))


def train(trainer, *args, **kwargs):
    return trainer.train(*args, **kwargs)


@dataclass(frozen=True)
class Case:
    """What a user asks for.

    Args:
        options: of the training arguments.
        act: what is done with the trainer; returns what it shows.
        given: further arguments of the trainer, made for the model.
        mixin: the user's own subclass.
        raises: the error that both raise.
        refused: what our `ValueError` says, where we refuse what the peer does.
        ours: options of ours alone.
        family: the tiny model, of `tiny_models`.
        model: makes the model from the common one.
        rtol: relative tolerance of numbers; a hundredth of it is the absolute one.
        slow: whether it takes seconds.
    """

    name: str
    options: dict
    act: Callable = train
    given: Callable = lambda model: {}
    mixin: type | None = None
    raises: type | tuple = ()
    refused: str = ""
    ours: dict = field(default_factory=dict)
    family: str = "llava"
    model: Callable = lambda model: model
    rtol: float = 1e-4
    slow: bool = False


def make(case: Case, cls: type, folder: Path):
    model = case.model(copy.deepcopy(built(case.family)[0]))
    ours = issubclass(cls, DualSpeedTrainer)
    options = copy.deepcopy(PEER | {"output_dir": str(folder / "out")} | case.options)  # the Trainer writes into them
    args = DualSpeedTrainingArguments(**options | OURS | case.ours) if ours else TrainingArguments(**options)
    defaults = {"model": model, "train_dataset": rows(case.family), "eval_dataset": rows(case.family)[:4]}
    defaults |= {"data_collator": Pad(), "callbacks": [], **case.given(model)}
    recorder = Recorder()
    defaults["callbacks"] = [*defaults["callbacks"], recorder]
    trainer = (type(cls.__name__, (case.mixin, cls), {}) if case.mixin else cls)(args=args, **defaults)
    trainer.recorder, trainer.folder, trainer.case, trainer.cls = recorder, folder, case, cls
    return trainer


def shown(trainer) -> dict:
    """What a trainer shows at any time."""
    state, parameters = trainer.state, dict(trainer.model.named_parameters())
    callbacks = [type(callback).__name__ for callback in trainer.callback_handler.callbacks]
    return {
        "events": trainer.recorder.events,
        "state": {f.name: getattr(state, f.name) for f in fields(TrainerState)},
        "control": vars(trainer.control),
        "callbacks": [name for name in callbacks if name not in ADDED_CALLBACKS | REPLACED_CALLBACKS],
        "weights": {name: p.detach() for name, p in parameters.items() if not name.startswith("dualspeed.")},
        "trained": [name for name, p in parameters.items() if p.requires_grad],
        "config": trainer.model.config.to_dict(),
    }


def observed(case: Case, cls: type, folder: Path) -> dict:
    """All that a user sees of a case."""
    seen, trainer = {}, None
    torch.manual_seed(0)
    try:
        trainer = make(case, cls, folder)
        seen["returned"] = case.act(trainer)
    except case.raises as error:
        seen["raised"] = type(error).__name__
    if trainer is not None:
        seen |= shown(trainer)
        seen["random"] = [random.random(), np.random.random(), torch.rand(()).item()]
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    # PEFT's empty form beside the adapters of a checkpoint, where ours leaves none.
    paths = [path for path in paths if not (path.name == "README.md" and path.parent.name.startswith("checkpoint-"))]
    seen["files"] = {str(path.relative_to(folder)): contents(path) for path in paths if path.name not in ADDED_FILES}
    return seen


def contents(path: Path):
    """The contents of a file, as far as they are the trainers' own."""
    if path.suffix == ".json":
        return json.loads(path.read_text())
    if path.suffix == ".safetensors":
        return load_file(path)
    if path.name == "training_args.bin":
        args = torch.load(path, weights_only=False)
        return {f.name: str(getattr(args, f.name)) for f in fields(TrainingArguments)}
    if path.suffix in (".pt", ".pth"):
        return torch.load(path, weights_only=False)
    return path.read_bytes() if path.suffix in (".jinja", ".txt") else None


MEASURED = re.compile(r".*(_runtime|_per_second|_time|_mem_cpu.*)")


def differences(ours, theirs, folders: tuple[str, str], rtol: float, at: str = "") -> Iterator[str]:
    """Where two observations differ; measured times are compared by their presence."""
    within = []
    if hasattr(theirs, "_asdict"):
        ours, theirs = ours._asdict(), theirs._asdict()
    if isinstance(theirs, dict):
        others = (set(ours) ^ set(theirs)) - (set(ADDED_KEYS) - set(theirs))
        if others:
            yield f"{at}: keys {sorted(map(str, others))}"
        within = [key for key in theirs if key in ours and not MEASURED.fullmatch(str(key))]
    elif isinstance(theirs, (list, tuple)):
        if len(ours) != len(theirs):
            yield f"{at}: {len(ours)} entries, not {len(theirs)}"
        within = range(min(len(ours), len(theirs)))
    elif isinstance(theirs, (torch.Tensor, np.ndarray)):
        a, b = (torch.as_tensor(value).detach().double().numpy() for value in (ours, theirs))
        if (ours.dtype, a.shape) != (theirs.dtype, b.shape):
            yield f"{at}: {ours.dtype} {a.shape}, not {theirs.dtype} {b.shape}"
        elif not np.allclose(a, b, rtol, rtol / 100, equal_nan=True):
            yield f"{at}: differs by {np.nanmax(np.abs(a - b)):.2e}"
    elif isinstance(theirs, float) and isinstance(ours, float):
        if not np.isclose(ours, theirs, rtol, rtol / 100, equal_nan=True):
            yield f"{at}: {ours}, not {theirs}"
    elif isinstance(theirs, str) and isinstance(ours, str):
        if ours.replace(folders[0], "") != theirs.replace(folders[1], ""):
            yield f"{at}: {ours!r}, not {theirs!r}"
    elif type(ours) is not type(theirs) or (ours != theirs and not hasattr(theirs, "__dict__")):
        yield f"{at}: {ours!r}, not {theirs!r}"
    for key in within:
        yield from differences(ours[key], theirs[key], folders, rtol, f"{at}/{key}")


def side_by_side(case: Case, folder: Path) -> list[str]:
    """Runs both trainers and returns where they differ."""
    folders = folder / "ours", folder / "peer"
    theirs = observed(case, Peer, folders[1])
    assert ("raised" in theirs) == bool(case.raises), f"the peer raised {theirs.get('raised')}, not {case.raises}"
    if case.refused:
        with pytest.raises(ValueError, match=case.refused):
            observed(replace(case, raises=()), DualSpeedTrainer, folders[0])
        return []
    ours = observed(case, DualSpeedTrainer, folders[0])
    return list(differences(ours, theirs, (str(folders[0]), str(folders[1])), case.rtol))
