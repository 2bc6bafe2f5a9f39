"""The record of a training run (results.json)."""

from __future__ import annotations

import re
from collections.abc import Iterator
from datetime import UTC, datetime
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING

from ..hub.source import is_repo_id
from ..utils.constants import RESULTS_NAME
from ..utils.environment import machine, versions
from ..utils.text import finite, parse_json, without_paths
from ..utils.validation import checked, fits
from ..utils.writing import write_json

if TYPE_CHECKING:
    from ..trainer.training_args import DualSpeedTrainingArguments

# Results of particular weights; they no longer hold after more training.
OF_WEIGHTS = (
    "accuracy",
    "n",
    "majority_accuracy",
    "eval_dataset",
    "eval_split",
    "eval_part",
    "evaluation",
    "evaluations",
    "progress",
)
# Builders of `datasets` that name a storage format, not a data set.
STORAGE = ("arrow", "audiofolder", "csv", "generator", "imagefolder", "json", "pandas", "parquet", "text", "webdataset")
# Of files that hold a data set.
DATA_FILES = (".arrow", ".csv", ".json", ".jsonl", ".parquet", ".tsv", ".txt", ".zip")

# Kinds of values: how an error names one, and whether a value is one. Null passes for a word or a number.
WORD = ("a word", lambda value: value is None or isinstance(value, str))
WORD_OR_LIST = ("a word", lambda value: value is None or isinstance(value, (str, list)))
NUMBER = ("a number", lambda value: fits(value, float | None))
WORDS = ("a list of words", lambda value: isinstance(value, list) and all(isinstance(item, str) for item in value))
MAPPING = ("a mapping", lambda value: isinstance(value, dict))
MAPPINGS = ("a list of mappings", lambda value: isinstance(value, list))

# The parts of results.json that a card or a later run reads. {...} is a mapping, whose keys may have a "*"; [{...}] is
# a list of mappings. Other keys may hold anything.
SHAPE = {
    **dict.fromkeys(("name", "base_model", "date", "license", "learning_curve", "kept_tokens"), WORD),
    **dict.fromkeys(("eval_dataset", "eval_split", "eval_part"), WORD),
    **dict.fromkeys(("accuracy", "majority_accuracy", "n", "data_wait"), NUMBER),
    "datasets": WORDS,
    "tags": WORDS,
    "language": WORD_OR_LIST,
    "settings": {
        "pruner": {"pruner_type": WORD, "pruning_schedule": WORD, "*ratio": NUMBER},
        "min_pruning_ratio": NUMBER,
    },
    "training": {"processes": NUMBER},
    "seeds": {},
    "versions": {},
    "machine": {},
    "steps": {"*": NUMBER},
    "seconds": {"*": NUMBER},
    "progress": {"*": NUMBER},
    "evaluation": {"*": NUMBER},
    "evaluations": [
        {
            **dict.fromkeys(("dataset", "split", "part", "metric", "view", "pruner", "date", "*_hash"), WORD),
            **dict.fromkeys(("pruning_ratio", "isolator_length", "value", "n", "seconds"), NUMBER),
        }
    ],
    "parameters": {"*": NUMBER},
    "visual_tokens": {"*": NUMBER},
    "peak_memory": {"bytes": NUMBER, "of": WORD},
    "speedup": {"*": NUMBER},
    "hub": {"repo_id": WORD, "base_model": WORD, "datasets": WORDS, "license*": WORD},
}
# A card shows each of them.
MOST_EVALUATIONS = 1000
# Keys that each part needs if it is there at all.
NEEDED = {
    "progress": ("step", "of"),
    "visual_tokens": ("full", "kept"),
    "peak_memory": ("bytes", "of"),
    "speedup": ("speedup", "slow_share", "samples", "rounds"),
}


def run_record(args: DualSpeedTrainingArguments, summary: dict, total_seconds: float) -> dict:
    """The record of a run: settings, steps, seconds, seeds, versions, machine and date.

    Args:
        args ([`DualSpeedTrainingArguments`]): The run's arguments.
        summary (`dict`): The return value of [`DualSpeedTrainer.summary`].
        total_seconds (`float`): Wall-clock seconds of the training.
    """
    return {
        "steps": summary["steps"],
        "seconds": {"total": round(total_seconds, 3), **summary["seconds"]},
        "settings": {key: value for key, value in summary.items() if key not in ("steps", "seconds")},
        "training": _training_settings(args),
        "seeds": {"seed": args.seed, "data_seed": args.data_seed},
        "versions": versions(),
        "machine": machine(args.device),
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M"),
    }


def dataset_name(dataset: object) -> str | None:
    """The name of a data set of `datasets`: the Hub repo that it came from, else its builder's name."""
    info = getattr(dataset, "info", None)
    for source in getattr(info, "download_checksums", None) or ():
        match = re.match(r"hf://datasets/([\w.-]+/[\w.-]+)@", source)
        if match:
            return match[1]
    name = getattr(info, "dataset_name", None)
    return None if name in STORAGE else name


def is_hub_id(name: str | None) -> bool:
    """Whether `name` looks like a Hub repo, "user/name", and is neither a local path nor the name of a data file."""
    return name is not None and is_repo_id(name) and Path(name).suffix not in DATA_FILES and not Path(name).exists()


@checked
def read_results(folder: str | Path) -> dict:
    """The contents of results.json in `folder`; {} if there is none.

    Raises:
        ValueError: the file is not a JSON mapping, or a key that a card shows holds something that no run writes; the
            message names file and key.
    """
    path = Path(folder) / RESULTS_NAME
    if not path.is_file():
        return {}
    try:
        found = parse_json(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{str(path)!r} is not valid JSON: {error}. Restore it, or train again.") from None
    if not isinstance(found, dict):
        raise ValueError(f"{str(path)!r} must hold a JSON mapping, got a {type(found).__name__}.")
    missing = (
        f"`{place}{key}` is missing" for place, part, keys in _needed(found) for key in keys if part.get(key) is None
    )
    wrong = _misfit(found, SHAPE) or next(missing, "")
    if not wrong and len(found.get("evaluations", [])) > MOST_EVALUATIONS:
        wrong = f"`evaluations` has {len(found['evaluations']):,} entries, more than {MOST_EVALUATIONS:,}"
    if wrong:
        raise ValueError(f"{str(path)!r} holds no results of a run: {wrong}. Restore it, or train again.")
    return found


def _misfit(value: object, shape: tuple | dict | list, place: str = "") -> str:
    """The first part of `value` that does not fit a part of `SHAPE`, in words; "" if all of it fits."""
    kind, fitting = MAPPING if isinstance(shape, dict) else MAPPINGS if isinstance(shape, list) else shape
    if not fitting(value):
        return f"`{place}` must be {kind}, got {str(value)[:100]!r}"
    parts = []
    if isinstance(shape, dict):
        for key, inner in value.items():
            parts += [(inner, shape[k], f"{place}.{key}".strip(".")) for k in shape if fnmatchcase(key, k)]
    elif isinstance(shape, list):
        parts = [(item, shape[0], f"{place}[{number}]") for number, item in enumerate(value)]
    return next(filter(None, (_misfit(*part) for part in parts)), "")


def _needed(found: dict) -> Iterator[tuple[str, dict, tuple[str, ...]]]:
    """The parts of results.json that need certain keys: place, part, and its keys."""
    if found.get("accuracy") is not None:
        yield "", found, ("n",)
    pruner = found.get("settings", {}).get("pruner")
    if pruner:
        changes = pruner.get("pruning_schedule", "constant") != "constant"
        yield "settings.pruner.", pruner, ("pruner_type", "pruning_ratio", *["initial_pruning_ratio"] * changes)
    for name, keys in NEEDED.items():
        if found.get(name):
            yield f"{name}.", found[name], keys
    for number, entry in enumerate(found.get("evaluations", [])):
        yield f"evaluations[{number}].", entry, ("dataset", "metric", "view", "value", "n")


@checked
def write_results(output_dir: str | Path, results: dict) -> Path:
    """Writes results.json; absolute paths are cut to their last part, because the file may be published.

    A number that is NaN or infinite, as of a training that diverged, is written as null.
    """
    return write_json(Path(output_dir) / RESULTS_NAME, finite(without_paths(results)))


@checked
def merged_evaluations(earlier: list[dict], new: list[dict]) -> tuple[list[dict], list[dict]]:
    """Earlier and new evaluations, without earlier ones of the same data, metric and visual tokens, and stale ones.

    A score of a part of the data replaces none of all of it. An earlier evaluation is stale where it is of another
    model, of other questions under the same name, or of other answers of the same view, such as longer ones.

    Returns:
        `tuple` of the evaluations to keep and the stale ones.
    """

    def values(entry: dict, *names: str) -> tuple:
        return tuple(entry.get(name) for name in names)

    data, view = ("dataset", "split", "part"), ("metric", "view")
    replaced, models = ({values(entry, *names) for entry in new} for names in ((*data, *view), ("model_hash",)))
    questions = {values(entry, *data): entry.get("questions_hash") for entry in new}
    answers = {values(entry, *data, "view"): entry.get("answers_hash") for entry in new}
    kept, stale = [], []
    for entry in earlier:
        if values(entry, *data, *view) not in replaced:
            asked, answered = entry.get("questions_hash"), entry.get("answers_hash")
            same = values(entry, "model_hash") in models and questions.get(values(entry, *data), asked) == asked
            same = same and answers.get(values(entry, *data, "view"), answered) == answered
            (kept if same else stale).append(entry)
    return kept + new, stale


def _training_settings(args: DualSpeedTrainingArguments) -> dict:
    batch = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    return {
        "processes": args.world_size,
        "global_batch_size": batch,
        "per_device_train_batch_size": args.per_device_train_batch_size,
        "gradient_accumulation_steps": args.gradient_accumulation_steps,
        "slow_mode_splits": args.slow_mode_splits,
        "learning_rate": args.learning_rate,
        "lr_scheduler_type": str(getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type)),  # set later: a text
        "warmup_steps": args.warmup_steps,
        "mixed_precision": args.mixed_precision,
    }
