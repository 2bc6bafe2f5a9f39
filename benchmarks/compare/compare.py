"""`python -m benchmarks.compare`: one training with and without DualSpeed, as a results file, a table and a plot."""

from __future__ import annotations

import argparse
import gc
import hashlib
import json
import shlex
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean

import torch
from datasets import Dataset
from rich.console import Console
from transformers import Trainer, set_seed

from hf_dualspeed.data.collators import VisionLanguageCollator
from hf_dualspeed.data.easy_vqa import DATASETS as EASY_VQA
from hf_dualspeed.data.easy_vqa import majority_accuracy
from hf_dualspeed.data.loading import load_examples
from hf_dualspeed.evaluation.generation import answer_accuracy
from hf_dualspeed.evaluation.pruned_prompts import PrunedPrompts, check_prompt_pruner, prompts_of
from hf_dualspeed.publishing.results import run_record
from hf_dualspeed.recipes.arguments import RecipeArguments, parse_recipe
from hf_dualspeed.recipes.run import load_model, prepare_model
from hf_dualspeed.trainer.callbacks import ModeClock
from hf_dualspeed.trainer.schedule import SLOW
from hf_dualspeed.trainer.trainer import DualSpeedTrainer, resolve_pruner
from hf_dualspeed.trainer.training_args import DualSpeedTrainingArguments
from hf_dualspeed.utils.environment import machine, versions
from hf_dualspeed.utils.text import spread, without_paths, write_json
from hf_dualspeed.utils.validation import check_range

from .report import write_card, write_report

COMMAND = "python -m benchmarks.compare"
RESULTS = "docs/results/compare.json"
# Nothing but training may happen inside train(), whose wall time is compared.
TRAIN_ONLY = ("--eval_strategy", "no", "--save_strategy", "no", "--load_best_model_at_end", "false")
TRAIN_ONLY += ("--speedup_rounds", "0", "--push_to_hub", "false")
NO_SLOW_STEPS = ("--slow_mode_ratio", "0", "--slow_warmup_steps", "0", "--slow_tail_ratio", "0")
NO_EXTRAS = ("--isolator_length", "0", "--distillation_weight", "0")
LOSSES = ("loss", "fast_loss", "slow_loss", "distillation_loss", "train_loss")
# What all runs have in common is published once.
COMMON = ("fingerprint", "training", "versions", "machine", "seeds")


@dataclass(frozen=True)
class Variant:
    """One of the ways to train: its names, and what it changes in the recipe."""

    key: str
    name: str
    changes: tuple[str, ...]
    trainer: type[Trainer] = DualSpeedTrainer


# The first is the baseline.
VARIANTS = (
    Variant("full-tokens", "full tokens", (), Trainer),
    Variant("pruned-only", "pruned only (NaivePrune)", (*NO_SLOW_STEPS, *NO_EXTRAS)),
    Variant("fast-slow", "fast-slow, no isolator, no distillation", NO_EXTRAS),
    Variant("dualspeed", "DualSpeed", ()),
)
BASELINE = VARIANTS[0]


@dataclass(frozen=True)
class Run:
    """A way to train with a seed: what the recipe makes of it, and the data."""

    way: Variant
    recipe: RecipeArguments
    args: DualSpeedTrainingArguments
    train: Dataset
    test: Dataset


def main(argv: list[str]) -> None:
    """Compares, or renders an earlier comparison anew.

    Args:
        argv (`list[str]`): The words after `python -m benchmarks.compare`.

    Raises:
        ValueError: an option is unknown or out of range, or the recipe cannot be compared.
        FileNotFoundError: there is no such recipe, or with `--render-only` no results file.
    """
    options, words = _parser().parse_known_args(argv)
    path = Path(options.results)
    if not options.render_only:
        command = shlex.join([*COMMAND.split(), *without_paths(without_token(argv))])
        write_json(path, compare(words, options.seeds, command))
    elif not path.is_file():
        raise FileNotFoundError(f"`results` is {str(path)!r}, but there is no such file to render.")
    results = json.loads(path.read_text(encoding="utf-8"))
    write_report(results, path)
    if options.card is not None:
        write_card(results, path, Path(options.card))


def compare(words: list[str], seeds: list[int], command: str = COMMAND) -> dict:
    """Trains every way with every seed, but for runs that are finished, and sums up.

    Args:
        words (`list[str]`): The recipe, as on the command line of `dualspeed train`.
        seeds (`list[int]`): Each seed gives all four ways the same initial weights and order of data.
        command (`str`, *optional*): What the results name as their origin.
    """
    recipe, args = parse_recipe(words, prog=COMMAND)
    _check(recipe, args, seeds)
    train = load_examples(recipe.dataset, split=recipe.dataset_split, image_folder=recipe.image_folder)
    test = load_examples(recipe.eval_dataset, split=recipe.eval_split, image_folder=recipe.image_folder)
    plan, results, warm = list(order(seeds)), [], False
    for number, (way, seed) in enumerate(plan, start=1):
        folder = Path(args.output_dir) / f"{way.key}-seed{seed}"
        own = [*words, *way.changes, "--seed", str(seed), "--output_dir", str(folder), *TRAIN_ONLY]
        run = Run(way, *parse_recipe(own), train, test)
        result = finished(run)
        note = "" if result is None else " (finished before)"
        Console().print(f"run {number} of {len(plan)}: {way.name}, seed {seed}{note}")
        if result is None:
            if not warm:
                # The process's first step pays for set-up that later ones find done.
                build_trainer(Run(BASELINE, *parse_recipe([*own, "--max_steps", "1"]), train, test)).train()
            warm, result = True, execute(run)
        results.append(result)
    head = {"command": command, **_description(recipe, results), "seeds": seeds}
    if recipe.dataset == recipe.eval_dataset and recipe.dataset in EASY_VQA:
        head["majority_accuracy"] = majority_accuracy(train, test.select(range(head["n"])))
    runs = [{key: value for key, value in result.items() if key not in COMMON} for result in results]
    return without_paths({**head, "summary": summarise(results), "runs": runs})


def without_token(words: list[str]) -> list[str]:
    """The words of a command line without the Hub's token, for they are published."""
    flag, hidden = "--hub_token", "<HUB_TOKEN>"
    kept = [hidden if before == flag else word for before, word in zip(["", *words[:-1]], words, strict=True)]
    return [f"{flag}={hidden}" if word.startswith(f"{flag}=") else word for word in kept]


def order(seeds: list[int]) -> Iterator[tuple[Variant, int]]:
    """All runs, seed by seed, each seed beginning with another way: slow times of a machine hit all."""
    for index, seed in enumerate(seeds):
        first = index % len(VARIANTS)
        yield from ((way, seed) for way in (*VARIANTS[first:], *VARIANTS[:first]))


def fingerprint(run: Run) -> str:
    """Tells apart runs whose numbers may not be mixed: by recipe, way, seed, versions and machine."""
    settings = {key: value for key, value in run.args.to_dict().items() if key != "output_dir"}
    parts = [run.way.key, asdict(run.recipe), settings, versions(), machine()]
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def finished(run: Run) -> dict | None:
    """The result that the run's folder holds, unless it is that of another run."""
    path = Path(run.args.output_dir) / "result.json"
    found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return found if found.get("fingerprint") == fingerprint(run) else None


def execute(run: Run) -> dict:
    """Trains, evaluates with all visual tokens and with pruned ones, and writes the run's result.json."""
    # Every run starts without the memory of the one before.
    gc.collect()
    torch.cuda.empty_cache()
    trainer = build_trainer(run)
    ours = isinstance(trainer, DualSpeedTrainer)
    # The plain trainer's steps all train on all tokens, which is what slow means.
    clock = trainer.clock if ours else ModeClock(SLOW)
    if not ours:
        trainer.add_callback(clock)
    started = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - started
    times = {"steps": clock.steps, "seconds": {mode: round(s, 3) for mode, s in clock.seconds.items()}}
    full = _accuracy(trainer, run, None, "all visual tokens")
    prepare = pruned_prompts(trainer, run.args)
    pruned = None if prepare is None else _accuracy(trainer, run, prepare, "pruned visual tokens")
    result = {
        "way": run.way.key,
        "seed": run.args.seed,
        "trainer": type(trainer).__name__,
        "accuracy_full": full["accuracy"],
        "accuracy_pruned": pruned and pruned["accuracy"],
        "n": full["n"],
        "steps_per_second": round(sum(clock.steps.values()) / seconds, 4),
        "losses": {key: log[key] for log in trainer.state.log_history for key in LOSSES if key in log},
        **run_record(run.args, trainer.summary() if ours else times, seconds),
        "fingerprint": fingerprint(run),
    }
    write_json(Path(run.args.output_dir) / "result.json", result)
    return result


def build_trainer(run: Run) -> Trainer:
    """The way's trainer, around a model whose initial weights depend on the seed alone."""
    set_seed(run.args.seed)
    model, processor = load_model(run.recipe, run.train, run.args.seed)
    collator = VisionLanguageCollator(
        processor, max_length=run.recipe.max_length, unreadable_images=run.recipe.unreadable_images
    )
    return run.way.trainer(
        model=prepare_model(model, run.recipe),
        args=run.args,
        train_dataset=run.train,
        processing_class=processor,
        data_collator=collator,
    )


def pruned_prompts(trainer: Trainer, args: DualSpeedTrainingArguments) -> PrunedPrompts | None:
    """Prunes prompts as the recipe's fast steps do, behind the trained isolator where there is one; None where the
    pruner is learned, and this training has not taught it."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    if isinstance(trainer, DualSpeedTrainer):
        return prompts_of(trainer.dual_forward, model, args.seed)
    pruner = resolve_pruner(None, args, model).to(args.device)
    if pruner.state_dict():
        return None
    options = (args.position_ids, args.video_budget, args.proportional_attention)
    return PrunedPrompts(model, pruner, None, *options, args.seed)


def _accuracy(trainer: Trainer, run: Run, prepare: PrunedPrompts | None, tokens: str) -> dict:
    return answer_accuracy(
        trainer.accelerator.unwrap_model(trainer.model),
        trainer.processing_class,
        run.test,
        batch_size=run.recipe.eval_batch_size,
        max_new_tokens=run.recipe.max_new_tokens,
        limit=run.recipe.eval_limit,
        prepare=prepare,
        description=f"accuracy with {tokens}",
    )


def summarise(results: list[dict]) -> dict[str, dict]:
    """Per way, mean and spread over the seeds; ratios are taken to the baseline's run of the same seed."""
    base = {run["seed"]: run for run in results if run["way"] == BASELINE.key}
    summary = {}
    for way in VARIANTS:
        own = [run for run in results if run["way"] == way.key]
        pairs = [(run, base[run["seed"]]) for run in own]
        summary[way.key] = {
            "name": way.name,
            **{key: spread([run[key] for run in own]) for key in ("accuracy_full", "accuracy_pruned")},
            "retention": spread([_ratio(a["accuracy_full"], b["accuracy_full"]) for a, b in pairs]),
            "speed_up": spread([_ratio(b["seconds"]["total"], a["seconds"]["total"]) for a, b in pairs]),
            "train_seconds": spread([run["seconds"]["total"] for run in own]),
            "steps_per_second": spread([run["steps_per_second"] for run in own]),
            "steps": {mode: mean(run["steps"][mode] for run in own) for mode in own[0]["steps"]},
        }
    return summary


def _ratio(value: float, baseline: float) -> float | None:
    return value / baseline if baseline else None


def _description(recipe: RecipeArguments, results: list[dict]) -> dict:
    """What was trained, on what, with what and where."""
    dualspeed = next(run for run in results if run["way"] == "dualspeed")
    return {
        "model": recipe.model_name_or_path or {"tiny_llava": recipe.tiny_llava},
        **{key: getattr(recipe, key) for key in ("dataset", "dataset_split", "eval_dataset", "eval_split")},
        "steps": sum(dualspeed["steps"].values()),
        **{key: dualspeed[key] for key in ("n", "settings", "training", "versions", "machine")},
        "date": max(run["date"] for run in results),
    }


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:
        raise ValueError(message)


def _parser() -> _Parser:
    about = "Trains a recipe with full tokens, pruned tokens, fast and slow steps, and DualSpeed; compares them."
    epilog = "All options of `dualspeed train` work as well; --config names the recipe."
    parser = _Parser(prog=COMMAND, allow_abbrev=False, description=about, epilog=epilog)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="Seeds (default: 0 1 2).")
    parser.add_argument("--results", default=RESULTS, help=f"The JSON file to write (default: {RESULTS}).")
    parser.add_argument("--card", metavar="FOLDER", help="Write a model card of the DualSpeed runs into this folder.")
    parser.add_argument("--render-only", action="store_true", help="Train nothing, render the JSON file.")
    return parser


def _check(recipe: RecipeArguments, args: DualSpeedTrainingArguments, seeds: list[int]) -> None:
    for seed in seeds:
        check_range("seeds", seed, 0, off="Use --seeds 0 1 2.")
    if len(set(seeds)) < len(seeds):
        raise ValueError(f"`seeds` must differ from each other, got {seeds}. Use --seeds 0 1 2.")
    check_prompt_pruner(args.pruner)
    if recipe.eval_dataset is None:
        raise ValueError("`eval_dataset` is None, but accuracy needs questions. Set it to easy-vqa, say.")
    devices = args.world_size * max(1, args.n_gpu)
    if devices > 1:
        raise ValueError(f"`{COMMAND}` measures one device, got {devices}. Set CUDA_VISIBLE_DEVICES=0.")
