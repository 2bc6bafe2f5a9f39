"""`python -m benchmarks.ablation`: what each part, ratio, pruner and schedule of DualSpeed is worth on real images.

All variants with one seed start from the same weights and see the same batches in the same order.
"""

from __future__ import annotations

import argparse
import os
import random
import shlex
import time
from collections.abc import Callable, Iterable
from concurrent.futures import as_completed
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import UTC, datetime
from pathlib import Path
from statistics import mean

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers import Trainer, set_seed

from hf_dualspeed.trainer.trainer import DualSpeedTrainer
from hf_dualspeed.trainer.training_args import DualSpeedTrainingArguments
from hf_dualspeed.utils.environment import machine, versions
from hf_dualspeed.utils.text import spread, without_paths
from hf_dualspeed.utils.validation import Parser, check_choice, check_range, surprises_named
from hf_dualspeed.utils.writing import write_json

from ..common import KeptRun, pruned_prompts, ratio, stored_results, summary_of, timed_training
from ..workers import worker_pool
from .callbacks import DrawnBudgets, LearningCurve, wait_for_device
from .language import Size
from .plan import (
    BASELINE,
    CURVE_QUESTIONS,
    FORMAT,
    GROUPS,
    PLAIN_SETUP,
    REFERENCE,
    TIMED,
    TODAYS,
    Setup,
    Variant,
    setup_of,
)
from .report import write_report
from .task import STORE, Task, accuracy, build_model, language_parameters, load_task, majority, patches_of
from .worlds import world_of

# The groups that one call trains unless told otherwise.
FIRST = ("parts", "slow ratios", "equal time", "positions", "schedules", "pruning ratios", "pruners")
COMMAND = "python -m benchmarks.ablation"
RESULTS = "docs/results/ablation.json"
RUNS = Path("runs/ablation")
# The summary's columns, read from a run and the baseline's run of the same seed (None: not trained).
COLUMNS = {
    "full": lambda run, base: run["full"]["all"],
    "item": lambda run, base: run["full"].get("item"),
    "pruned": lambda run, base: run["pruned"] and run["pruned"]["all"],
    "retention": lambda run, base: base and ratio(run["full"]["all"], base["full"]["all"]),
    "seconds": lambda run, base: run["seconds"],
    "speed_up": lambda run, base: base and ratio(base["seconds"], run["seconds"]),
}


@dataclass(frozen=True)
class Settings:
    """What all runs have in common. `threads` counts those of one process; 0 is PyTorch's own number."""

    steps: int = 400
    batch_size: int = 16
    learning_rate: float = 1e-3
    weight_decay: float = 0.01
    warmup: float = 0.05  # share of the steps
    size: Size = field(default_factory=Size)
    cpu: bool = True
    threads: int = 0
    # Where these are as here, they leave fingerprints alone, so that earlier runs stay valid.
    world: str = PLAIN_SETUP.world
    decay: float = PLAIN_SETUP.decay
    curve: int = PLAIN_SETUP.curve
    bf16: bool = PLAIN_SETUP.bf16
    numbered: bool = False  # features lie on the device, which batches need not bring

    def depends_on(self) -> dict:
        """All settings but those of later versions that are as ever."""
        later = {name: getattr(PLAIN, name) for name in ("world", "decay", "curve", "bf16", "numbered")}
        return {name: value for name, value in asdict(self).items() if name not in later or value != later[name]}

    @property
    def by_processor(self) -> bool:
        """Whether seconds are processor time, which other work beside a run of one thread hardly changes."""
        return self.cpu and self.threads == 1

    def task(self) -> Task:
        return load_task(self.size, STORE, world_of(self.world), self.numbered, self.bf16)


PLAIN = Settings()
QUESTIONS_TOKENS = 14_400  # visual tokens that are asked at once


@dataclass(frozen=True)
class Run(KeptRun):
    """A variant with a seed, trained for a number of steps."""

    variant: Variant
    seed: int
    steps: int
    settings: Settings

    @property
    def folder(self) -> Path:
        """The fingerprint is in its name, so results of other settings lie beside it."""
        return RUNS / f"seed{self.seed}-{self.fingerprint()[:16]}"

    def depends_on(self) -> list:
        """No names: variants of several groups that train alike, for as many steps, are one run."""
        trained = [self.variant.plain, self.variant.options]
        if self.variant.budgets:
            trained.append(self.variant.budgets)
        clock = ["processor time"] if self.settings.by_processor else []
        return [trained, self.seed, self.steps, self.settings.depends_on(), versions(), *clock, _hardware()]


def main(argv: list[str]) -> None:
    """Trains what is not trained yet and renders the results, or only renders those of an earlier call.

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
        missing = missing_world(options.groups)
        if missing:
            Console().print(f"{', '.join(options.groups)}: skipped. {missing}", soft_wrap=True)
            return
        ablate(options, path, shlex.join([*COMMAND.split(), *without_paths(argv)]))
    with surprises_named(f"`output` {options.output!r} holds no results of `{COMMAND}`"):
        write_report(stored_results("output", path), path)


def ablate(options: argparse.Namespace, path: Path, command: str) -> None:
    """Trains the chosen groups. Writes the results so far after each group."""
    settings = _settings(options)
    task = settings.task()
    head = {
        "format": FORMAT,
        "command": command,
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M"),
        "settings": asdict(settings),
        "seeds": options.seeds,
        "jobs": options.jobs,
        "timed": not options.untimed,
        "by_processor": settings.by_processor,
        "n": len(task.test),
        "majority": majority(task),
        "language_model_parameters": language_parameters(settings.size, task.world),
        "versions": versions(),
        "machine": _hardware(),
    }
    found: dict[tuple[str, int], dict] = {}
    for group in options.groups:
        for same_time in (False, True):  # the times of the first set the steps of the second
            plan = [
                Run(variant, seed, _steps(variant, settings, found), settings)
                for seed in options.seeds
                for variant in GROUPS[group]
                if variant.same_time is same_time and (variant.key, seed) not in found
            ]
            found |= train_all(plan, options.jobs, group)
        write_json(path, without_paths({**head, **summarise(found, options.groups)}))


def train_all(plan: list[Run], jobs: int, group: str) -> dict[tuple[str, int], dict]:
    """The results of all runs of a plan. Trains the unfinished ones, `jobs` at a time."""
    results = {(run.variant.key, run.seed): run.finished() for run in plan}
    missing = [run for run in plan if results[run.variant.key, run.seed] is None]
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=Console()) as progress:
        bar = progress.add_task(group, total=len(plan), completed=len(plan) - len(missing))
        for run, result in _executed(missing, jobs):
            results[run.variant.key, run.seed] = result
            shares = ", ".join(f"{result[view]['all']:.1%}" for view in ("full", "pruned") if result[view])
            progress.console.print(f"{run.variant.name}, seed {run.seed}: {shares} in {result['seconds']:.0f} s")
            progress.advance(bar)
    return results


def _executed(runs: list[Run], jobs: int) -> Iterable[tuple[Run, dict]]:
    """Runs and their results, in the order in which they finish."""
    if jobs == 1 or not runs:
        yield from ((run, execute(run)) for run in runs)
        return
    with worker_pool(jobs, _begin_process, runs[0].settings.threads) as pool:
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
    """Trains, answers the test questions from all and from pruned visual tokens, and writes result.json."""
    task, args = run.settings.task(), _arguments(run)
    if run.variant.options.get("pruner") == "kmeans":
        from . import kmeans  # noqa: F401, which registers it, where it is used alone
    set_seed(run.seed)
    model = build_model(task, run.settings.size)
    kind = Trainer if run.variant.plain else DualSpeedTrainer
    trainer = kind(model=model, args=args, train_dataset=task.train, data_collator=task.collator("train"))
    few = random.Random(0).sample(task.test, min(CURVE_QUESTIONS, len(task.test)))
    size = max(1, QUESTIONS_TOKENS // patches_of(task.world))
    now = time.process_time if run.settings.by_processor else time.perf_counter

    def answered(prepare: Callable | None = None, asked: list[dict] | None = None) -> dict[str, float]:
        return accuracy(model, task, prepare, size, asked)

    curve = LearningCurve(curve_points(run.variant, run.settings), lambda model: answered(asked=few)["all"], now)
    trainer.add_callback(curve)
    if run.variant.budgets:
        trainer.add_callback(DrawnBudgets(trainer.dual_forward.pruner, run.variant.budgets, run.seed))
    wait_for_device()
    clock, seconds = timed_training(trainer, now)
    shortens = run.variant.plain or not trainer.dual_forward.pruner.in_language_model
    prepare = pruned_prompts(trainer, args) if shortens else None
    result = {
        "way": run.variant.key,
        "seed": run.seed,
        "seconds": round(seconds - curve.paused, 2),
        "steps": dict(clock.steps),
        "full": answered(),
        "pruned": None if prepare is None else answered(prepare),
        "slow_ratios": [entry["slow_mode_ratio"] for entry in trainer.state.log_history if "slow_mode_ratio" in entry],
    }
    return run.keep({**result, "curve": curve.points} if curve.points else result)


def curve_points(variant: Variant, settings: Settings) -> int:
    """Points of a variant's learning curve: of runs in the reference's time, the end alone, which is what matters."""
    return min(1, settings.curve) if variant.same_time else settings.curve


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
        **_schedule(run),
        bf16=settings.bf16,
        logging_steps=max(1, run.steps // 20),
        save_strategy="no",
        report_to=[],
        use_cpu=settings.cpu,
        disable_tqdm=True,
        log_level="error",
        speedup_rounds=0,
        **run.variant.options,
    )


def _schedule(run: Run) -> dict:
    """Options of the learning rate: a cosine, or a plateau with a linear decay to zero."""
    if not run.settings.decay:
        return {"lr_scheduler_type": "cosine"}
    decayed = max(1, round(run.settings.decay * run.steps))
    kwargs = {"num_decay_steps": decayed, "decay_type": "linear"}
    return {"lr_scheduler_type": "warmup_stable_decay", "lr_scheduler_kwargs": kwargs}


def missing_world(groups: list[str]) -> str | None:
    """Why groups cannot be trained here: pictures that are not installed."""
    try:
        world_of(setup_of(groups[0]).world)
    except FileNotFoundError as error:
        return str(error)
    return None


def _steps(variant: Variant, settings: Settings, found: dict[tuple[str, int], dict]) -> int:
    """Steps of a variant: those of all, or as many as fit into the reference's time. The runs so far give times."""
    if not variant.same_time:
        return round(settings.steps / variant.speed_up)

    def of(*keys: str) -> float:
        return mean(result["seconds"] for (own, _), result in found.items() if own in keys)

    return max(1, round(settings.steps * of(REFERENCE, TODAYS.key) / of(variant.key.removeprefix(TIMED))))


def summarise(found: dict[tuple[str, int], dict], groups: list[str]) -> dict:
    """Groups, [`COLUMNS`] and steps of each variant, and all runs."""
    variants = {variant.key: variant for group in groups for variant in GROUPS[group]}
    runs = [result for (key, _), result in found.items() if key in variants]
    summary = summary_of(runs, variants, BASELINE, COLUMNS)
    for key, own in summary.items():
        results = [run for run in runs if run["way"] == key]
        # Earlier runs may lack answers from pruned tokens: the others count.
        own["pruned"] = spread([run["pruned"]["all"] for run in results if run["pruned"]] or [None])
        own["seeds"] = len(results)
    shown = {group: [[one.key, one.name] for one in GROUPS[group] if one.key in summary] for group in groups}
    kept = [{key: value for key, value in result.items() if key != "fingerprint"} for result in runs]
    return {"groups": shown, "summary": summary, "runs": kept}


def _settings(options: argparse.Namespace) -> Settings:
    threads = options.threads or max(1, (os.cpu_count() or 1) // options.jobs)
    cpu = options.cpu or not torch.accelerator.is_available()
    return settings_of(setup_of(options.groups[0]), vars(options), cpu=cpu, threads=threads)


def settings_of(setup: Setup, chosen: dict, **others) -> Settings:
    """The settings of a setup, but for those that are `chosen`, of which None leaves one alone."""
    given = {name: value for name, value in chosen.items() if value is not None}
    size = Size(**{f.name: given.get(f.name, setup.size.get(f.name, f.default)) for f in fields(Size)})
    own = Settings(size=size, world=setup.world, decay=setup.decay, curve=setup.curve, bf16=setup.bf16, **others)
    rest = {"steps": None, "batch_size": setup.batch_size, "learning_rate": setup.learning_rate, **given}
    return replace(own, **{name: rest[name] for name in list(rest)[:3] if rest[name] is not None})


def _hardware() -> dict:
    """The machine, without the number of threads of this process."""
    return {key: value for key, value in machine().items() if key != "threads"}


def _check(options: argparse.Namespace) -> None:
    for name in ("steps", "batch_size", "jobs", *(f.name for f in fields(Size))):
        if getattr(options, name) is not None:
            check_range(name, getattr(options, name), 1)
    for group in options.groups:
        check_choice("groups", group, tuple(GROUPS))
    setups = {group: setup_of(group) for group in options.groups}
    if len(set(setups.values())) > 1:
        raise ValueError(
            f"`groups` is {options.groups}, whose tasks or models differ. Give each a call and an --output of its own."
        )
    for seed in options.seeds:
        check_range("seeds", seed, 0, off="Use --seeds 0 1 2.")


def _parser() -> Parser:
    own = Settings()
    parser = Parser(prog=COMMAND, allow_abbrev=False, description=__doc__.partition(": ")[2].partition("\n")[0])
    parser.add_argument(
        "--groups", nargs="+", default=list(FIRST), help=f"Of {', '.join(GROUPS)} (default: {', '.join(FIRST)})."
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="Seeds (default: 0 1 2).")
    parser.add_argument("--steps", type=int, help=f"Optimizer steps (default: {own.steps}).")
    parser.add_argument("--batch_size", type=int, help=f"(default: {own.batch_size})")
    parser.add_argument("--learning_rate", type=float, help=f"(default: {own.learning_rate})")
    for name, value in asdict(own.size).items():
        parser.add_argument(f"--{name}", type=int, help=f"(default: {value}; groups with a model of their own differ)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="Runs at a time (default: one a core).")
    parser.add_argument("--threads", type=int, default=0, help="Of each run (default: cores / jobs).")
    parser.add_argument("--untimed", action="store_true", help="Other work ran beside it: show no seconds.")
    parser.add_argument("--cpu", action="store_true", help="Leave an accelerator alone.")
    parser.add_argument("--output", default=RESULTS, help=f"The JSON file to write (default: {RESULTS}).")
    parser.add_argument("--render-only", action="store_true", help="Train nothing, render the JSON file.")
    return parser
