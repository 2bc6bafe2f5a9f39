"""`python -m benchmarks.ablation`: what each part, ratio, pruner and schedule of DualSpeed is worth on real images.

All ways with one seed start from the same weights and see the same batches in the same order.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import os
import shlex
import time
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from statistics import mean

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers import Trainer, set_seed

from benchmarks.compare.compare import pruned_prompts
from hf_dualspeed.trainer.callbacks import ModeClock
from hf_dualspeed.trainer.schedule import SLOW
from hf_dualspeed.trainer.trainer import DualSpeedTrainer
from hf_dualspeed.trainer.training_args import DualSpeedTrainingArguments
from hf_dualspeed.utils.environment import machine, versions
from hf_dualspeed.utils.text import spread, without_paths, write_json
from hf_dualspeed.utils.validation import check_choice, check_range

from .language import Size
from .plan import BASELINE, FORMAT, GROUPS, REFERENCE, TIMED, Variant
from .report import write_report
from .task import accuracy, build_model, load_task, majority

COMMAND = "python -m benchmarks.ablation"
RESULTS = "docs/results/ablation.json"
RUNS = Path("runs/ablation")


@dataclass(frozen=True)
class Settings:
    """What all runs have in common; `threads` is each process's, 0 stands for PyTorch's own number."""

    steps: int = 400
    batch_size: int = 16
    learning_rate: float = 1e-3
    weight_decay: float = 0.01
    warmup: float = 0.05  # share of the steps
    size: Size = field(default_factory=Size)
    cpu: bool = True
    threads: int = 0


@dataclass(frozen=True)
class Run:
    """A way to train with a seed, for a number of steps."""

    way: Variant
    seed: int
    steps: int
    settings: Settings

    @property
    def folder(self) -> Path:
        """Where its result is kept, beside those of other settings, for another start to find it."""
        return RUNS / f"seed{self.seed}-{self.fingerprint()[:16]}"

    def fingerprint(self) -> str:
        """Tells apart runs whose numbers may not be mixed: by options, seed, settings, versions and machine. Ways of
        several groups that train alike, for as many steps, are one run."""
        way = [self.way.plain, self.way.options]
        own = [way, self.seed, self.steps, asdict(self.settings), versions(), _hardware()]
        return hashlib.sha256(json.dumps(own, sort_keys=True).encode()).hexdigest()

    def finished(self) -> dict | None:
        """What it has found, if it is over."""
        path = self.folder / "result.json"
        found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        return found | {"way": self.way.key} if found.get("fingerprint") == self.fingerprint() else None


def main(argv: list[str]) -> None:
    """Trains what is not trained yet, or renders an earlier ablation anew.

    Args:
        argv (`list[str]`): The words after `python -m benchmarks.ablation`.

    Raises:
        ValueError: an option is unknown or out of range.
        FileNotFoundError: with `--render-only`, there is no results file.
    """
    options = _parser().parse_args(argv)
    path = Path(options.output)
    if not options.render_only:
        _check(options)
        command = shlex.join([*COMMAND.split(), *without_paths(argv)])
        write_json(path, without_paths(ablate(options, path, command)))
    elif not path.is_file():
        raise FileNotFoundError(f"`output` is {str(path)!r}, but there is no such file to render.")
    write_report(json.loads(path.read_text(encoding="utf-8")), path)


def ablate(options: argparse.Namespace, path: Path, command: str) -> dict:
    """Trains the groups that are asked for, and sums up. The results so far are written after each group."""
    settings = _settings(options)
    task = load_task(settings.size)
    head = {
        "format": FORMAT,
        "command": command,
        "settings": asdict(settings),
        "seeds": options.seeds,
        "jobs": options.jobs,
        "timed": not options.untimed,
        "n": len(task.test),
        "majority": majority(task),
        "versions": versions(),
        "machine": _hardware(),
    }
    found: dict[tuple[str, int], dict] = {}
    for group in options.groups:
        for same_time in (False, True):  # the former tell how long the latter may take
            plan = [
                Run(way, seed, _steps(way, settings, found), settings)
                for seed in options.seeds
                for way in GROUPS[group]
                if way.same_time is same_time and (way.key, seed) not in found
            ]
            found |= train_all(plan, options.jobs, group)
        write_json(path, without_paths({**head, **summarise(found, options.groups)}))
    return {**head, **summarise(found, options.groups)}


def train_all(plan: list[Run], jobs: int, group: str) -> dict[tuple[str, int], dict]:
    """The results of runs, of which those that are not finished are trained, `jobs` at a time."""
    results = {(run.way.key, run.seed): run.finished() for run in plan}
    missing = [run for run in plan if results[run.way.key, run.seed] is None]
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=Console()) as progress:
        bar = progress.add_task(group, total=len(plan), completed=len(plan) - len(missing))
        for run, result in _executed(missing, jobs):
            results[run.way.key, run.seed] = result
            shares = ", ".join(f"{share:.1%}" for share in (result["full"]["all"], *_pruned(result)))
            progress.console.print(f"{run.way.name}, seed {run.seed}: {shares} in {result['seconds']:.0f} s")
            progress.advance(bar)
    return results


def _executed(runs: list[Run], jobs: int) -> Iterable[tuple[Run, dict]]:
    if jobs == 1:
        yield from ((run, execute(run)) for run in runs)
    if jobs == 1 or not runs:
        return
    # New processes, not forks: threads of PyTorch and a device's context do not outlive a fork.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, context, _begin_process, (runs[0].settings.threads,)) as pool:
        futures = {pool.submit(execute, run): run for run in runs}
        try:
            for future in as_completed(futures):
                yield futures[future], future.result()
        finally:
            pool.shutdown(cancel_futures=True)


def _begin_process(threads: int) -> None:
    if threads:
        torch.set_num_threads(threads)


def execute(run: Run) -> dict:
    """Trains, answers the test questions from all visual tokens and from pruned ones, and writes result.json."""
    task, args = load_task(run.settings.size), _arguments(run)
    set_seed(run.seed)
    model = build_model(task, run.settings.size)
    kind = Trainer if run.way.plain else DualSpeedTrainer
    trainer = kind(model=model, args=args, train_dataset=task.train, data_collator=task.collator("train"))
    # The plain trainer's steps all train on all tokens, which is what slow means.
    clock = ModeClock(SLOW) if run.way.plain else trainer.clock
    if run.way.plain:
        trainer.add_callback(clock)
    started = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - started
    shortens = run.way.plain or not trainer.dual_forward.pruner.in_language_model
    prepare = pruned_prompts(trainer, args) if shortens else None
    result = {
        "way": run.way.key,
        "seed": run.seed,
        "seconds": round(seconds, 2),
        "steps": dict(clock.steps),
        "full": accuracy(model, task),
        "pruned": None if prepare is None else accuracy(model, task, prepare),
        "slow_ratios": [entry["slow_mode_ratio"] for entry in trainer.state.log_history if "slow_mode_ratio" in entry],
        "fingerprint": run.fingerprint(),
    }
    write_json(run.folder / "result.json", result)
    return result


def _arguments(run: Run) -> DualSpeedTrainingArguments:
    settings = run.settings
    return DualSpeedTrainingArguments(
        output_dir=str(run.folder),
        seed=run.seed,
        max_steps=run.steps,
        per_device_train_batch_size=settings.batch_size,
        learning_rate=settings.learning_rate,
        weight_decay=settings.weight_decay,
        warmup_steps=settings.warmup,
        lr_scheduler_type="cosine",
        logging_steps=max(1, run.steps // 20),
        save_strategy="no",
        report_to=[],
        use_cpu=settings.cpu,
        disable_tqdm=True,
        log_level="error",
        speedup_rounds=0,
        **run.way.options,
    )


def _steps(way: Variant, settings: Settings, found: dict[tuple[str, int], dict]) -> int:
    """Steps of a way: those of all, or as many as it takes in the time of the reference, by the runs so far."""
    if not way.same_time:
        return round(settings.steps / way.speed_up)

    def of(key: str) -> float:
        return mean(result["seconds"] for (own, _), result in found.items() if own == key)

    return max(1, round(settings.steps * of(REFERENCE) / of(way.key.removeprefix(TIMED))))


def summarise(found: dict[tuple[str, int], dict], groups: list[str]) -> dict:
    """Per way, mean and spread over the seeds; ratios are taken to the baseline's run of the same seed."""
    ways = {way.key: way for group in groups for way in GROUPS[group]}
    runs = [result for (key, _), result in found.items() if key in ways]
    base = {result["seed"]: result for result in runs if result["way"] == BASELINE}
    summary = {}
    for key in ways:
        own = [result for result in runs if result["way"] == key]
        if not own:
            continue
        pairs = [(result, base.get(result["seed"])) for result in own]
        summary[key] = {
            "full": spread([result["full"]["all"] for result in own]),
            "item": spread([result["full"]["item"] for result in own]),
            "pruned": spread([share for result in own for share in _pruned(result)] or [None]),
            "retention": spread([b and a["full"]["all"] / b["full"]["all"] for a, b in pairs]),
            "seconds": spread([result["seconds"] for result in own]),
            "speed_up": spread([b and b["seconds"] / a["seconds"] for a, b in pairs]),
            "steps": {mode: mean(result["steps"][mode] for result in own) for mode in own[0]["steps"]},
            "seeds": len(own),
        }
    shown = {group: [[way.key, way.name] for way in GROUPS[group] if way.key in summary] for group in groups}
    kept = [{key: value for key, value in result.items() if key != "fingerprint"} for result in runs]
    return {"groups": shown, "summary": summary, "runs": kept}


def _pruned(result: dict) -> list[float]:
    return [] if result["pruned"] is None else [result["pruned"]["all"]]


def _settings(options: argparse.Namespace) -> Settings:
    size = Size(**{f.name: getattr(options, f.name) for f in fields(Size)})
    threads = options.threads or max(1, (os.cpu_count() or 1) // options.jobs)
    cpu = options.cpu or not torch.accelerator.is_available()
    return Settings(options.steps, options.batch_size, options.learning_rate, size=size, cpu=cpu, threads=threads)


def _hardware() -> dict:
    """The machine, whatever the number of threads of this process."""
    return {key: value for key, value in machine().items() if key != "threads"}


def _check(options: argparse.Namespace) -> None:
    for name in ("steps", "batch_size", "jobs", *(f.name for f in fields(Size))):
        check_range(name, getattr(options, name), 1)
    for group in options.groups:
        check_choice("groups", group, tuple(GROUPS))
    for seed in options.seeds:
        check_range("seeds", seed, 0, off="Use --seeds 0 1 2.")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:
        raise ValueError(message)


def _parser() -> _Parser:
    own = Settings()
    parser = _Parser(prog=COMMAND, allow_abbrev=False, description=__doc__.partition(": ")[2].partition("\n")[0])
    parser.add_argument("--groups", nargs="+", default=list(GROUPS), help=f"Of {', '.join(GROUPS)} (default: all).")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="Seeds (default: 0 1 2).")
    parser.add_argument("--steps", type=int, default=own.steps, help=f"Optimizer steps (default: {own.steps}).")
    parser.add_argument("--batch_size", type=int, default=own.batch_size)
    parser.add_argument("--learning_rate", type=float, default=own.learning_rate)
    for name, value in asdict(own.size).items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="Runs at a time (default: one a core).")
    parser.add_argument("--threads", type=int, default=0, help="Of each run (default: cores / jobs).")
    parser.add_argument("--untimed", action="store_true", help="Other work ran beside it: show no seconds.")
    parser.add_argument("--cpu", action="store_true", help="Leave an accelerator alone.")
    parser.add_argument("--output", default=RESULTS, help=f"The JSON file to write (default: {RESULTS}).")
    parser.add_argument("--render-only", action="store_true", help="Train nothing, render the JSON file.")
    return parser
