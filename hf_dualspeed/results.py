"""The record of a training run: results.json, and the table printed at its end."""

from __future__ import annotations

import json
import os
import platform
import re
import sys
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path, PurePath

import torch
from rich.console import Console
from rich.table import Table

from hf_dualspeed.arguments import DualSpeedTrainingArguments

RESULTS_NAME = "results.json"
PACKAGES = ("torch", "transformers", "accelerate", "hf-dualspeed")
# What weights answered, or how far they were: no longer true of weights that have been trained on.
OF_WEIGHTS = ("accuracy", "n", "majority_accuracy", "eval_dataset", "eval_split", "evaluation", "progress")
# Builders of `datasets` that say how data is stored, not what it is.
STORAGE = ("arrow", "audiofolder", "csv", "generator", "imagefolder", "json", "pandas", "parquet", "text", "webdataset")


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


def versions() -> dict[str, str]:
    """The versions that a result depends on."""
    found = {name.replace("-", "_"): version(name) for name in PACKAGES}
    return {**found, "python": platform.python_version()}


def machine() -> dict[str, str | int | None]:
    """CPU model, its cores, the threads this process uses, and the accelerator's name or None."""
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if accelerator is not None and accelerator.type == "cuda":
        accelerator = torch.cuda.get_device_name()
    return {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "accelerator": None if accelerator is None else str(accelerator),
    }


def peak_memory(device: torch.device) -> dict | None:
    """The most memory so far: on CUDA what PyTorch held on the device, on a CPU the whole process's; else None."""
    if device.type == "cuda":
        return {"bytes": torch.cuda.max_memory_allocated(device), "of": "accelerator"}
    try:
        import resource
    except ImportError:  # not on Windows
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    held = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return {"bytes": held, "of": "process"} if device.type == "cpu" else None


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


def one_line(error: BaseException) -> str:
    """An error's message without line breaks, not too long."""
    return " ".join(str(error).split())[:300] or type(error).__name__


def read_results(folder: str | Path) -> dict:
    """What results.json in `folder` holds; nothing where there is none.

    Raises:
        ValueError: it is no JSON mapping.
    """
    path = Path(folder) / RESULTS_NAME
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{str(path)!r} is not valid JSON: {error}. Restore it, or train again.") from None
    if not isinstance(found, dict):
        raise ValueError(f"{str(path)!r} must hold a JSON mapping, got a {type(found).__name__}.")
    return found


def write_results(output_dir: str | Path, results: dict) -> Path:
    """Writes results.json, with the last part of each absolute path, so that it may be published."""
    path = Path(output_dir) / RESULTS_NAME
    # Through a second file, so that an interruption leaves the earlier one whole.
    part = path.with_name(f"_{path.name}.part")
    part.write_text(json.dumps(without_paths(results), indent=2) + "\n", encoding="utf-8")
    part.replace(path)
    return path


def without_paths(value: object) -> object:
    """The value with each absolute path in it replaced by the path's last part."""
    if isinstance(value, dict):
        return {key: without_paths(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_paths(inner) for inner in value]
    if isinstance(value, (str, PurePath)) and Path(value).is_absolute():
        return Path(value).name
    return value


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


def markdown_table(header: tuple[str, ...], rows: list[tuple[str, ...]], words: bool = False) -> str:
    """A Markdown table whose columns but the first are aligned right, or left where they are of words."""
    rule = ("---", *["---" if words else "---:"] * (len(header) - 1))
    return "\n".join("| " + " | ".join(row) + " |" for row in (header, rule, *rows))


def percent(share: float | None) -> str | None:
    """A share in words, or None where it was not measured."""
    return None if share is None else f"{share:.1%}"


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


def _cpu_model() -> str:
    # platform.processor() names only the architecture on Linux.
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
