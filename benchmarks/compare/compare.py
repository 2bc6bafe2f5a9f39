"""`python -m benchmarks.compare`: one training with and without DualSpeed, as a results file, a table and a plot."""

from __future__ import annotations

import gc
import shlex
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from datasets import Dataset
from rich.console import Console
from transformers import Trainer, set_seed

from hf_dualspeed.data.easy_vqa import DATASETS as EASY_VQA
from hf_dualspeed.data.easy_vqa import majority_accuracy
from hf_dualspeed.data.loading import load_examples
from hf_dualspeed.evaluation.generation import answer_accuracy
from hf_dualspeed.evaluation.pruned_prompts import check_prompt_pruner
from hf_dualspeed.publishing.results import run_record
from hf_dualspeed.recipes.arguments import RecipeArguments, parse_recipe
from hf_dualspeed.recipes.run import collator_of, load_model, prepare_model
from hf_dualspeed.trainer.trainer import DualSpeedTrainer
from hf_dualspeed.trainer.training_args import DualSpeedTrainingArguments
from hf_dualspeed.utils.environment import machine, versions
from hf_dualspeed.utils.text import without_paths
from hf_dualspeed.utils.validation import Parser, check_range, surprises_named
from hf_dualspeed.utils.writing import write_json

from ..common import KeptRun, pruned_prompts, ratio, stored_results, summary_of, timed_training
from .report import write_card, write_report

COMMAND = "python -m benchmarks.compare"
RESULTS = "docs/results/compare.json"
# Only training may happen inside train(): its wall time is compared.
TRAIN_ONLY = ("--eval_strategy", "no", "--save_strategy", "no", "--load_best_model_at_end", "false")
TRAIN_ONLY += ("--speedup_rounds", "0", "--push_to_hub", "false")
NO_SLOW_STEPS = ("--slow_mode_ratio", "0", "--slow_warmup_steps", "0", "--slow_tail_ratio", "0")
NO_EXTRAS = ("--isolator_length", "0", "--distillation_weight", "0")
LOSSES = ("loss", "fast_loss", "slow_loss", "distillation_loss", "train_loss")
# Equal in all runs, so the results file has them once.
COMMON = ("fingerprint", "parameters", "training", "versions", "machine", "seeds")
# The summary's columns, read from a run and the baseline's run of the same seed.
COLUMNS = {
    "accuracy_full": lambda run, base: run["accuracy_full"],
    "accuracy_pruned": lambda run, base: run["accuracy_pruned"],
    "retention": lambda run, base: ratio(run["accuracy_full"], base["accuracy_full"]),
    "speed_up": lambda run, base: ratio(base["seconds"]["total"], run["seconds"]["total"]),
    "train_seconds": lambda run, base: run["seconds"]["total"],
    "steps_per_second": lambda run, base: run["steps_per_second"],
}


@dataclass(frozen=True)
class Variant:
    """A way to train: its names, and the options that it changes in the recipe."""

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
class Run(KeptRun):
    """A variant with a seed: its recipe, its training arguments, and the data."""

    variant: Variant
    recipe: RecipeArguments
    args: DualSpeedTrainingArguments
    train: Dataset
    test: Dataset

    @property
    def folder(self) -> Path:
        return Path(self.args.output_dir)

    def depends_on(self) -> list:
        """The folder is left out, so results may move."""
        settings = {key: value for key, value in self.args.to_dict().items() if key != "output_dir"}
        return [self.variant.key, asdict(self.recipe), settings, versions(), machine()]


def main(argv: list[str]) -> None:
    """Compares and renders the results, or only renders those of an earlier call.

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
    results = stored_results("results", path)
    with surprises_named(f"`results` {options.results!r} holds no results of `{COMMAND}`"):
        write_report(results, path)
    if options.card is not None:
        write_card(results, path, Path(options.card))


def compare(words: list[str], seeds: list[int], command: str = COMMAND) -> dict:
    """Trains every variant with every seed, except for finished runs, and sums up.

    Args:
        words (`list[str]`): The recipe, as on the command line of `dualspeed train`.
        seeds (`list[int]`): Each seed gives all four variants the same initial weights and order of data.
        command (`str`, *optional*): The command that the results name.
    """
    recipe, args = parse_recipe(words, prog=COMMAND)
    _check(recipe, args, seeds)
    train = load_examples(recipe.dataset, recipe.dataset_split, recipe.image_folder, recipe.image_column)
    test = load_examples(recipe.eval_dataset, recipe.eval_split, recipe.image_folder, recipe.eval_columns)
    plan, results, warm = list(order(seeds)), [], False
    for number, (variant, seed) in enumerate(plan, start=1):
        folder = Path(args.output_dir) / f"{variant.key}-seed{seed}"
        own = [*words, *variant.changes, "--seed", str(seed), "--output_dir", str(folder), *TRAIN_ONLY]
        run = Run(variant, *parse_recipe(own), train, test)
        result = run.finished()
        note = "" if result is None else " (finished before)"
        Console().print(f"run {number} of {len(plan)}: {variant.name}, seed {seed}{note}")
        if result is None:
            if not warm:
                # The first step of a process does set-up, which must be in no run's time.
                build_trainer(Run(BASELINE, *parse_recipe([*own, "--max_steps", "1"]), train, test)).train()
            warm, result = True, execute(run)
        results.append(result)
    head = {"command": command, **_description(recipe, results), "seeds": seeds}
    if recipe.dataset == recipe.eval_dataset and recipe.dataset in EASY_VQA:
        head["majority_accuracy"] = majority_accuracy(train, test.select(range(head["n"])))
    runs = [{key: value for key, value in result.items() if key not in COMMON} for result in results]
    return without_paths({**head, "summary": summarise(results), "runs": runs})


def without_token(words: list[str]) -> list[str]:
    """The words of a command line without the Hub's token, because they are published."""
    flag, hidden = "--hub_token", "<HUB_TOKEN>"
    kept = [hidden if before == flag else word for before, word in zip(["", *words], words, strict=False)]
    return [f"{flag}={hidden}" if word.startswith(f"{flag}=") else word for word in kept]


def order(seeds: list[int]) -> Iterator[tuple[Variant, int]]:
    """All runs, seed by seed. Each seed begins with another variant, to spread a machine's slow phases over all."""
    for index, seed in enumerate(seeds):
        first = index % len(VARIANTS)
        yield from ((variant, seed) for variant in (*VARIANTS[first:], *VARIANTS[:first]))


def execute(run: Run) -> dict:
    """Trains, answers the test questions from all and from pruned visual tokens, and writes result.json."""
    # The last run's memory is freed first.
    gc.collect()
    torch.cuda.empty_cache()
    trainer = build_trainer(run)
    clock, seconds = timed_training(trainer)
    times = {"steps": clock.steps, "seconds": {mode: round(s, 3) for mode, s in clock.seconds.items()}}
    answer = partial(
        answer_accuracy,
        trainer.accelerator.unwrap_model(trainer.model),
        trainer.processing_class,
        run.test,
        batch_size=run.recipe.eval_batch_size,
        max_new_tokens=run.recipe.max_new_tokens,
        limit=run.recipe.eval_limit,
    )
    full = answer(description="accuracy with all visual tokens")
    prepare = pruned_prompts(trainer, run.args)
    pruned = prepare and answer(prepare=prepare, description="accuracy with pruned visual tokens")
    result = {
        "way": run.variant.key,
        "seed": run.args.seed,
        "trainer": type(trainer).__name__,
        "accuracy_full": full["accuracy"],
        "accuracy_pruned": pruned and pruned["accuracy"],
        "n": full["n"],
        "parameters": trainer.parameters if isinstance(trainer, DualSpeedTrainer) else None,
        "steps_per_second": round(sum(clock.steps.values()) / seconds, 4),
        "losses": {key: log[key] for log in trainer.state.log_history for key in LOSSES if key in log},
        **run_record(run.args, trainer.summary() if isinstance(trainer, DualSpeedTrainer) else times, seconds),
    }
    return run.keep(result)


def build_trainer(run: Run) -> Trainer:
    """The variant's trainer, with a model whose initial weights depend on the seed alone."""
    set_seed(run.args.seed)
    model, processor = load_model(run.recipe, run.train, run.args.seed)
    return run.variant.trainer(
        model=prepare_model(model, run.recipe),
        args=run.args,
        train_dataset=run.train,
        processing_class=processor,
        data_collator=collator_of(run.recipe, processor),
    )


def summarise(results: list[dict]) -> dict[str, dict]:
    """Name, [`COLUMNS`] and steps of each variant."""
    summary = summary_of(results, [variant.key for variant in VARIANTS], BASELINE.key, COLUMNS)
    return {variant.key: {"name": variant.name, **summary[variant.key]} for variant in VARIANTS}


def _description(recipe: RecipeArguments, results: list[dict]) -> dict:
    """Model, data, settings, versions and machine."""
    dualspeed = next(run for run in results if run["way"] == "dualspeed")
    return {
        "model": recipe.model_name_or_path or {"tiny_llava": recipe.tiny_llava},
        **{key: getattr(recipe, key) for key in ("dataset", "dataset_split", "eval_dataset", "eval_split")},
        "steps": sum(dualspeed["steps"].values()),
        "parameters": dualspeed.get("parameters"),
        **{key: dualspeed[key] for key in ("n", "settings", "training", "versions", "machine")},
        "date": max(run["date"] for run in results),
    }


def _parser() -> Parser:
    about = "Trains a recipe with full tokens, pruned tokens, fast and slow steps, and DualSpeed; compares them."
    epilog = "All options of `dualspeed train` work as well; --config names the recipe."
    parser = Parser(prog=COMMAND, allow_abbrev=False, description=about, epilog=epilog)
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
