"""`python -m benchmarks.ablation.estimate`: about how long each group of the ablation would take here.

One step of each kind, one answer to a few questions, one batch of encoding and one step of pretraining are measured at
their true size, in random weights and features, as processor time of one thread. So other work beside it matters
little, and a group's hours are those of all its runs, one on each core.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
from transformers import LlamaForCausalLM, Trainer, TrainerCallback

from hf_dualspeed.cli import call
from hf_dualspeed.trainer.trainer import DualSpeedTrainer
from hf_dualspeed.utils.environment import machine, versions
from hf_dualspeed.utils.text import markdown_table, without_paths
from hf_dualspeed.utils.validation import Parser, check_range
from hf_dualspeed.utils.writing import write_json

from . import task as tasks
from .ablation import QUESTIONS_TOKENS, Run, Settings, _arguments, curve_points, settings_of
from .language import BATCH, WRITTEN_SIDE, WrittenGrids, collate, language_model_config, written
from .plan import CURVE_QUESTIONS, GROUPS, SETUPS, Variant, setup_of
from .task import ASKED, Task, accuracy, encoded, patches_of
from .worlds import world_of

RESULTS = "docs/results/estimate_ablation.json"
SEEDS, STEPS = 3, 2  # seeds of a group; steps of a measurement, of which the last counts
# Groups that this command says something of: those with a call of their own.
# Without "deeper-positions": three runs more than "deeper".
ESTIMATED = (*(group for group in SETUPS if group not in ("large", "deeper-positions")), "budgets", "selection")


class LastStep(TrainerCallback):
    """Processor seconds of the last optimizer step."""

    seconds = 0.0

    def on_step_begin(self, *given, **others) -> None:
        self.begun = time.process_time()

    def on_step_end(self, *given, **others) -> None:
        self.seconds = time.process_time() - self.begun


def main(argv: list[str]) -> None:
    """Measures and writes the estimates, and prints them as a table."""
    parser = Parser(prog="python -m benchmarks.ablation.estimate", allow_abbrev=False, description=__doc__)
    parser.add_argument("--output", default=RESULTS, help=f"The JSON file to write (default: {RESULTS}).")
    parser.add_argument("--groups", nargs="+", default=list(ESTIMATED), help="(default: all with a call of their own)")
    parser.add_argument("--cores", type=int, default=2, help="Runs at a time (default: 2).")
    options = parser.parse_args(argv)
    check_range("cores", options.cores, 1)
    torch.set_num_threads(1)
    found, known = {}, {}
    for group in options.groups:
        try:
            found[group] = estimated(group, options.cores, known)
        except FileNotFoundError as error:
            found[group] = {"skipped": str(error)}
        head = {"cores": options.cores, "seeds": SEEDS, "machine": machine(), "versions": versions()}
        results = without_paths({**head, "groups": found})
        write_json(Path(options.output), results)
    print(readme_table(results))


def readme_table(results: dict) -> str:
    """Machine and Markdown table, for benchmarks/README.md."""
    header = ("group", "runs", "full step, s", "fast step, s", "preparation, h", "all, h")
    rows = []
    for group, own in results["groups"].items():
        if "skipped" in own:
            rows.append((group, "skipped", "", "", "", ""))
            continue
        seconds = (f"{own['seconds'][kind]:.1f}" for kind in ("full", "fast"))
        hours = (f"{own[kind]:.1f}" for kind in ("preparation_hours", "hours"))
        rows.append((f"`{group}`", str(own["runs"]), *seconds, *hours))
    where = f"{results['machine']['cpu']}, {results['cores']} runs at a time, torch {results['versions']['torch']}"
    return f"Estimated on {where}; {results['seeds']} seeds.\n\n{markdown_table(header, rows)}"


def estimated(group: str, cores: int, known: dict) -> dict:
    """What a group would take: processor seconds of each kind of work, and hours with a run on each core."""
    settings = settings_of(setup_of(group), {}, threads=1)
    key = (settings.world, settings.size, settings.bf16)
    if key not in known:
        known[key] = measured(settings)
    seconds = known[key]
    size, questions = settings.size, settings.size.test_grids * ASKED
    runs = 0.0
    for variant in GROUPS[group]:
        runs += steps_cost(variant, settings, seconds)
        # Answers from all tokens and from pruned ones, which cost less; a curve's points come on top.
        pruned = seconds["fast"] / seconds["full"]
        runs += seconds["question"] * (questions * (1 + pruned) + curve_points(variant, settings) * CURVE_QUESTIONS)
    first = seconds["image"] * (size.train_grids + size.test_grids)
    first += seconds["pretraining"] * size.pretraining_steps + seconds["full"] * size.start_steps
    return {
        "runs": SEEDS * len(GROUPS[group]),
        "steps": settings.steps,
        "size": asdict(size),
        "seconds": {name: round(value, 4) for name, value in seconds.items()},
        # Nothing runs beside the preparation, which uses all cores.
        "preparation_hours": round(first / cores / 3600, 2),
        "hours": round((first + SEEDS * runs) / cores / 3600, 2),
    }


def steps_cost(variant: Variant, settings: Settings, seconds: dict[str, float]) -> float:
    """Processor seconds of a variant's steps. Those of the reference's time take the reference's."""
    if variant.plain and not variant.same_time:
        return settings.steps * seconds["full"] / variant.speed_up
    slow = max(variant.options.get("slow_mode_ratio", 0.05), variant.options.get("slow_tail_ratio", 0.0))
    kept = 1 - variant.options.get("pruning_ratio", 0.9)
    # A fast step at another ratio lies between that at 0.9 and one on all tokens; layers in front see all.
    fast = seconds["fast"] + (seconds["full"] - seconds["fast"]) * max(0.0, kept - 0.1) / 0.9
    if variant.options.get("pruner") in ("fastv", "pyramiddrop"):
        fast = (seconds["fast"] + seconds["full"]) / 2
    if variant.same_time:
        slow, fast = 0.05, seconds["fast"]
    return settings.steps * (slow * seconds["slow"] + (1 - slow) * fast)


def measured(settings: Settings) -> dict[str, float]:
    """Processor seconds of a step on all tokens, a fast and a slow one, a question, an image and a pretraining step."""
    world, size = world_of(settings.world), settings.size
    scenes = world.scenes("train", settings.batch_size)
    rows = [encoded(number, asked, world) for number, asked in enumerate(world.conversations("train", scenes))]
    asked = [encoded(number, [one[0]], world) for number, one in enumerate(world.conversations("train", scenes))]
    shape = (len(rows), 1 + patches_of(world), tasks.FEATURES)
    features = np.random.default_rng(0).standard_normal(shape).astype(np.float16)
    task = Task(rows * STEPS, asked, {"train": features, "test": features}, {}, world, bf16=settings.bf16)
    with patch.object(tasks, "pretrained_language_model", lambda *given: weights_of(settings)):
        full, fast, slow = (
            step_of(task, settings, Variant("estimate", "", options, plain))
            for options, plain in (({}, True), ({"slow_mode_ratio": 0.0}, False), ({"slow_mode_ratio": 1.0}, False))
        )
        model = tasks.build_model(task, size).eval()
        question = clocked(lambda: accuracy(model, task, None, QUESTIONS_TOKENS // patches_of(world)))
    tower = tasks.tower_of(world, Path(tasks.STORE), 0)
    precision = torch.autocast("cpu", torch.bfloat16, enabled=settings.bf16)
    with torch.no_grad(), precision:
        image = clocked(lambda: tower(tasks.pixel_values(scenes[:4], torch.device("cpu"))))
    writing = WrittenGrids(language_of(settings), world)
    batch = collate([written(number, world) for number in range(BATCH)])
    with precision:
        pretraining = clocked(lambda: writing(**batch)["loss"].backward())
    return {
        "full": full,
        "fast": fast,
        "slow": slow,
        "question": question / len(asked),
        "image": image / 4,
        "pretraining": pretraining,
    }


def language_of(settings: Settings) -> torch.nn.Module:
    config = language_model_config(settings.size, WRITTEN_SIDE**2, world_of(settings.world))
    return LlamaForCausalLM(config)


def weights_of(settings: Settings) -> dict[str, torch.Tensor]:
    return language_of(settings).model.state_dict()


def step_of(task: Task, settings: Settings, variant: Variant) -> float:
    """Processor seconds of the second of two steps: the first one warms up."""
    model, last = tasks.build_model(task, settings.size), LastStep()
    args = _arguments(Run(variant, 0, STEPS, settings))
    kind = Trainer if variant.plain else DualSpeedTrainer
    trainer = kind(model=model, args=args, train_dataset=task.train, data_collator=task.collator("train"))
    trainer.add_callback(last)
    trainer.train()
    return last.seconds


def clocked(work: Callable[[], object]) -> float:
    begun = time.process_time()
    work()
    return time.process_time() - begun


if __name__ == "__main__":
    sys.exit(call(lambda: main(sys.argv[1:])))
