"""The record of a training run: results.json, and the table printed at its end."""

from __future__ import annotations

import json
import re
from datetime import UTC, datetime
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from ..utils.constants import RESULTS_NAME
from ..utils.environment import machine, versions
from ..utils.text import percent, without_paths, write_json

if TYPE_CHECKING:
    from ..trainer.training_args import DualSpeedTrainingArguments

# What weights answered, or how far they were: no longer true of weights that have been trained on.
OF_WEIGHTS = (
    "accuracy",
    "n",
    "majority_accuracy",
    "eval_dataset",
    "eval_split",
    "evaluation",
    "evaluations",
    "progress",
)
# Builders of `datasets` that say how data is stored, not what it is.
STORAGE = ("arrow", "audiofolder", "csv", "generator", "imagefolder", "json", "pandas", "parquet", "text", "webdataset")

# What results.json may hold where a card or a later run reads it: the type of a value, a mapping of such, [...] for a
# list of either, and "*" for any other key. Other keys may hold anything.
NUMBER = (int, float)
SHAPE = {
    **dict.fromkeys(
        ("name", "base_model", "date", "license", "eval_dataset", "eval_split", "learning_curve", "kept_tokens"), str
    ),
    **dict.fromkeys(("accuracy", "majority_accuracy", "n"), NUMBER),
    "datasets": [str],
    "tags": [str],
    "language": (str, list),
    "settings": {"pruner": {"pruner_type": str, "pruning_schedule": str, "*ratio": NUMBER}},
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
            **dict.fromkeys(("dataset", "split", "metric", "view", "pruner", "date"), str),
            **dict.fromkeys(("pruning_ratio", "isolator_length", "value", "n", "seconds"), NUMBER),
        }
    ],
    "visual_tokens": {"*": NUMBER},
    "peak_memory": {"bytes": NUMBER, "of": str},
    "speedup": {"*": NUMBER},
    "hub": {"repo_id": str, "base_model": str, "datasets": [str]},
}
# Keys without which the one that holds them says nothing.
NEEDED = {
    "settings.pruner": ("pruner_type", "pruning_ratio"),
    "progress": ("step", "of"),
    "visual_tokens": ("full", "kept"),
    "peak_memory": ("bytes", "of"),
    "speedup": ("speedup", "slow_share", "samples", "rounds"),
}


def run_record(args: DualSpeedTrainingArguments, summary: dict, total_seconds: float) -> dict:
    """What a run was and how long it took: settings, steps, seconds, seeds, versions, machine and date.

    Args:
        args ([`DualSpeedTrainingArguments`]): The run's arguments.
        summary (`dict`): [`DualSpeedTrainer.summary`]'s answer.
        total_seconds (`float`): Wall seconds of the training.
    """
    return {
        "steps": summary["steps"],
        "seconds": {"total": round(total_seconds, 3), **summary["seconds"]},
        "settings": {key: value for key, value in summary.items() if key not in ("steps", "seconds")},
        "training": _training_settings(args),
        "seeds": {"seed": args.seed, "data_seed": args.data_seed},
        "versions": versions(),
        "machine": machine(),
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M"),
    }


def dataset_name(dataset: object) -> str | None:
    """What a data set of `datasets` calls itself: the Hub repo that it came from, else the name of its builder."""
    info = getattr(dataset, "info", None)
    for source in getattr(info, "download_checksums", None) or ():
        match = re.match(r"hf://datasets/([\w.-]+/[\w.-]+)@", source)
        if match:
            return match[1]
    name = getattr(info, "dataset_name", None)
    return None if name in STORAGE else name


def is_hub_id(name: str | None) -> bool:
    """Whether `name` looks like a repo of the Hub and is no local folder."""
    return name is not None and re.fullmatch(r"[\w.-]+/[\w.-]+", name) is not None and not Path(name).exists()


def read_results(folder: str | Path) -> dict:
    """What results.json in `folder` holds; nothing where there is none.

    Raises:
        ValueError: it is no JSON mapping, or a key that a card shows holds something else than a run writes there; the
            message names file and key.
    """
    path = Path(folder) / RESULTS_NAME
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{str(path)!r} is not valid JSON: {error}. Restore it, or train again.") from None
    if not isinstance(found, dict):
        raise ValueError(f"{str(path)!r} must hold a JSON mapping, got a {type(found).__name__}.")
    wrong = _misfit(found, SHAPE) or _missing(found)
    if wrong:
        raise ValueError(f"{str(path)!r} holds no results of a run: {wrong}. Restore it, or train again.")
    return found


def _misfit(value: object, shape: object, place: str = "") -> str:
    """What of a value does not fit a part of `SHAPE`, in words; "" where all of it does. Single values may be null."""
    if isinstance(shape, dict):
        if not isinstance(value, dict):
            return f"`{place}` must be a mapping, got {str(value)[:100]!r}"
        kinds = {key: next((shape[k] for k in shape if fnmatchcase(key, k)), None) for key in value}
        problems = (_misfit(value[k], kind, f"{place}.{k}".strip(".")) for k, kind in kinds.items() if kind is not None)
        return next(filter(None, problems), "")
    if isinstance(shape, list) and isinstance(shape[0], dict) and isinstance(value, list):
        problems = (_misfit(item, shape[0], f"{place}[{number}]") for number, item in enumerate(value))
        return next(filter(None, problems), "")
    if isinstance(shape, list):
        of_words = shape[0] is str
        fits = of_words and isinstance(value, list) and all(isinstance(item, str) for item in value)
        words = "a list of words" if of_words else "a list of mappings"
    else:
        fits = value is None or (isinstance(value, shape) and not isinstance(value, bool))
        words = "a number" if shape is NUMBER else "a word"
    return "" if fits else f"`{place}` must be {words}, got {str(value)[:100]!r}"


def _missing(found: dict) -> str:
    """Which needed key is missing, in words; "" where none is."""
    if found.get("accuracy") is not None and found.get("n") is None:
        return "`n` is missing"
    for place, keys in NEEDED.items():
        holder = found
        for key in place.split("."):
            holder = holder.get(key, {})
        if holder.get("pruning_schedule", "constant") != "constant":
            keys = (*keys, "initial_pruning_ratio")
        missing = [key for key in keys if holder and holder.get(key) is None]
        if missing:
            return f"`{place}.{missing[0]}` is missing"
    for number, entry in enumerate(found.get("evaluations", [])):
        missing = [key for key in ("dataset", "metric", "view", "value", "n") if entry.get(key) is None]
        if missing:
            return f"`evaluations[{number}].{missing[0]}` is missing"
    return ""


def write_results(output_dir: str | Path, results: dict) -> Path:
    """Writes results.json, with the last part of each absolute path, so that it may be published."""
    path = Path(output_dir) / RESULTS_NAME
    write_json(path, without_paths(results))
    return path


def merged_evaluations(earlier: list[dict], new: list[dict]) -> list[dict]:
    """Results of evaluations, of which new ones replace those of the same data, metric and visual tokens."""

    def key(entry: dict) -> tuple:
        return tuple(entry.get(name) for name in ("dataset", "split", "metric", "view"))

    replaced = {key(entry) for entry in new}
    return [entry for entry in earlier if key(entry) not in replaced] + new


def print_results(results: dict, output_dir: str | Path) -> None:
    """Prints the run's main numbers as a table."""
    seconds, steps = results["seconds"], results["steps"]
    rows = {
        "accuracy, all visual tokens": percent(results.get("accuracy")),
        "most frequent answer, without the image": percent(results.get("majority_accuracy")),
        "training time": f"{seconds['total']:.1f} s",
        "fast steps": f"{steps['fast']} in {seconds['fast']:.1f} s",
        "slow steps": f"{steps['slow']} in {seconds['slow']:.1f} s",
        "written to": str(output_dir),
    }
    table = Table(show_header=False)
    for name, value in rows.items():
        if value is not None:
            table.add_row(name, value)
    Console().print(table)


def _training_settings(args: DualSpeedTrainingArguments) -> dict:
    batch = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    return {
        "processes": args.world_size,
        "global_batch_size": batch,
        "learning_rate": args.learning_rate,
        "lr_scheduler_type": args.lr_scheduler_type.value,
        "warmup_steps": args.warmup_steps,
        "mixed_precision": args.mixed_precision,
    }
