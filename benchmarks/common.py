"""What `compare` and `ablation` share: kept results, timed trainings, ratios to a baseline, tables."""

from __future__ import annotations

import hashlib
import io
import json
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import mean

from PIL import Image
from rich.console import Console
from rich.table import Column, Table
from transformers import Trainer

from hf_dualspeed.evaluation.pruned_prompts import PrunedPrompts, prompts_of
from hf_dualspeed.models.interface import ModelInterface
from hf_dualspeed.trainer.callbacks import ModeClock
from hf_dualspeed.trainer.schedule import SLOW
from hf_dualspeed.trainer.setup import resolve_pruner
from hf_dualspeed.trainer.trainer import DualSpeedTrainer
from hf_dualspeed.trainer.training_args import DualSpeedTrainingArguments
from hf_dualspeed.utils.text import parse_json, spread
from hf_dualspeed.utils.writing import write_json


class KeptRun:
    """A training, one `variant` of several. `folder` keeps result.json, and `depends_on()` lists what that depends on.

    In result files the variant's key is called "way".
    """

    def fingerprint(self) -> str:
        """A hash of all that the result depends on. Results with different ones must not be mixed."""
        return hashlib.sha256(json.dumps(self.depends_on(), sort_keys=True, default=str).encode()).hexdigest()

    def finished(self) -> dict | None:
        """The kept result, or None where there is none with this fingerprint."""
        path = self.folder / "result.json"
        found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        return {**found, "way": self.variant.key} if found.get("fingerprint") == self.fingerprint() else None

    def keep(self, result: dict) -> dict:
        """Writes the result with its fingerprint, and returns both."""
        result = {**result, "fingerprint": self.fingerprint()}
        write_json(self.folder / "result.json", result)
        return result


def timed_training(trainer: Trainer, now: Callable[[], float] = time.perf_counter) -> tuple[ModeClock, float]:
    """Trains; returns the steps by mode and the seconds that `train()` took by the clock `now()`."""
    # All steps of the plain trainer are on all tokens, which is slow mode.
    clock = trainer.clock if isinstance(trainer, DualSpeedTrainer) else ModeClock(SLOW)
    if not isinstance(trainer, DualSpeedTrainer):
        trainer.add_callback(clock)
    started = now()
    trainer.train()
    return clock, now() - started


def pruned_prompts(trainer: Trainer, args: DualSpeedTrainingArguments) -> PrunedPrompts | None:
    """Prunes prompts as fast steps do, with the isolator where there is one; None for an untrained pruner."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    if isinstance(trainer, DualSpeedTrainer):
        return prompts_of(trainer.dual_forward, model, args.seed)
    pruner = resolve_pruner(None, args, ModelInterface(model)).to(args.device)
    options = (args.position_ids, args.video_budget, args.proportional_attention)
    return None if pruner.state_dict() else PrunedPrompts(model, pruner, None, *options, args.seed)


def summary_of(runs: list[dict], keys: Iterable[str], baseline: str, columns: dict[str, Callable]) -> dict[str, dict]:
    """Each column's [`spread`] over the runs of each variant, named by its key, and the mean steps by mode.

    A column is read from a run and the baseline's run of the same seed, or None where there is none.
    """
    base, summary = {run["seed"]: run for run in runs if run["way"] == baseline}, {}
    for key in keys:
        own = [run for run in runs if run["way"] == key]
        if own:
            pairs = [(run, base.get(run["seed"])) for run in own]
            summary[key] = {name: spread([read(*pair) for pair in pairs]) for name, read in columns.items()}
            summary[key]["steps"] = {mode: mean(run["steps"][mode] for run in own) for mode in own[0]["steps"]}
    return summary


def ratio(value: float, baseline: float) -> float | None:
    return value / baseline if baseline else None


def stored_results(option: str, path: Path) -> dict:
    """The results file, or a `FileNotFoundError` that names the option."""
    if not path.is_file():
        raise FileNotFoundError(f"`{option}` is {str(path)!r}, but there is no such file to render.")
    try:
        found = parse_json(path.read_bytes())
    except ValueError as error:
        raise ValueError(
            f"`{option}` is {str(path)!r}, which is not valid JSON: {error}. Restore or measure it."
        ) from None
    if not isinstance(found, dict):
        raise ValueError(f"`{option}` is {str(path)!r}, which must hold a JSON mapping, got a {type(found).__name__}.")
    return found


def print_table(header: tuple[str, ...] | list[str], rows: list, title: str | None = None) -> None:
    """Prints a table. Long cells wrap."""
    table = Table(*(Column(name, overflow="fold") for name in header), title=title)
    for row in rows:
        table.add_row(*row)
    Console().print(table)


def cell(values: dict[str, float] | None, form: str, unit: str = "") -> str:
    """Mean, smallest and largest value, each in the format `form`; `unit` follows the mean."""
    if values is None:
        return "n/a"
    center, low, high = (form.format(values[key]) for key in ("mean", "min", "max"))
    return f"{center}{unit}" if low == high else f"{center}{unit} ({low} to {high})"


def small(png: bytes) -> bytes:
    """A PNG in at most 256 colours, for pictures in the docs: about half of the size."""
    buffer = io.BytesIO()
    Image.open(io.BytesIO(png)).convert("RGB").quantize(256, dither=Image.Dither.NONE).save(
        buffer, "PNG", optimize=True
    )
    return buffer.getvalue()
