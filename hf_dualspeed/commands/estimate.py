"""`dualspeed estimate`: what training a model takes and what it gains, from its configuration alone."""

from __future__ import annotations

import argparse
import json
import re
import sys
from itertools import product
from pathlib import Path

from rich.console import Console
from rich.table import Table
from transformers.utils import logging

from ..bench.estimate import (
    DTYPES,
    GIB,
    PLAIN,
    REACHED,
    ROLES,
    ROWS,
    TRAINS,
    USABLE,
    WORDS,
    Settings,
    Subject,
    activations,
    as_json,
    batches,
    estimate,
    expected,
    gpu_size,
    limits,
    parameters_of,
    readme_table,
    subject_of,
    ways,
)
from ..bench.options import SETTINGS
from ..trainer.schedule import FAST, SLOW
from ..utils.environment import versions
from ..utils.progress import Work
from ..utils.text import in_thousands, parse_json, without_paths
from ..utils.validation import Parser, check_range, surprises_named
from ..utils.writing import write_file, write_json

DESCRIPTION = """Tells parameters, visual tokens before and after pruning, memory, the largest batch that fits and the
expected speed-up. Reads the config, and the processor where there is one; no weights. Takes about half a minute for
each way to train."""
MARKED = re.compile(r"(<!-- memory-table-start -->\n).*?(<!-- memory-table-end -->)", re.DOTALL)


def main(argv: list[str]) -> None:
    """Estimates, prints tables or JSON, and writes what is asked for."""
    options, verbosity = parse(argv), logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        run(options)
    finally:
        logging.set_verbosity(verbosity)


def run(options: argparse.Namespace) -> None:
    path = Path(options.json) if options.json not in (None, "-") else None
    gpus = sorted(map(gpu_size, options.gpu))
    results = {**held(path), "gpus": gpus}
    console = Console()
    for name in options.model:
        with Work(f"Reading {name}"):
            subject = subject_of(name)
        for size in options.image_size:
            shown, settings = [], settings_of(options, size)
            for train, setting in product(options.train, options.checkpointing):
                found = known(results["models"], subject, settings, train, setting) if options.resume else None
                if found is None:
                    with Work(f"Estimating {subject.name}"):
                        found = without_paths(estimate(subject, settings, train, setting, tell))
                results["models"], shown = joined(held(path, results)["models"], found), joined(shown, found)
                if path is not None:
                    write_json(path, results)
            if options.json != "-":
                show(console, shown[0], gpus)
    if options.json == "-":
        print(json.dumps(results, indent=2))
    if options.page is not None:
        write_table(Path(options.page), results)


def held(path: Path | None, otherwise: dict | None = None) -> dict:
    """What the file holds, which other calls write to meanwhile; `otherwise`, or nothing, where there is no file.

    Raises:
        ValueError: it holds something else.
    """
    if path is None or not path.is_file():
        return otherwise or {"models": []}
    with surprises_named(f"`json` {str(path)!r} holds no results of `dualspeed estimate`"):
        results = parse_json(path.read_bytes())
        for found in results["models"]:
            needed = {"model", "settings", "versions", "parameters", "runs"} - found.keys()
            if needed:
                raise ValueError(f"{', '.join(sorted(needed))} of a model")
        return results


def tell(words: str) -> None:
    print(words, file=sys.stderr)


def parse(argv: list[str]) -> argparse.Namespace:
    """Parses and checks the command line.

    Raises:
        ValueError: an option is unknown or out of range, or there is nothing to do.
    """
    default = Settings()
    parser = Parser(prog="dualspeed estimate", description=DESCRIPTION, allow_abbrev=False)
    parser.add_argument("model", nargs="*", help="Hub ids, folders, or files such as config.json")
    add = parser.add_argument
    size = "x".join(map(str, default.image_size))
    add("--image_size", nargs="+", default=[size], help=f"of an image: WIDTHxHEIGHT, or several (default: {size})")
    add("--text_tokens", type=int, default=default.text_tokens, help="beside the image (default: %(default)s)")
    removed = "fraction of the visual tokens removed in fast steps (default: %(default)s)"
    add("--pruning_ratio", type=float, default=default.pruning_ratio, help=removed)
    slow = "fraction of slow steps (default: %(default)s)"
    add("--slow_mode_ratio", type=float, default=default.slow_mode_ratio, help=slow)
    add("--train", nargs="+", choices=TRAINS, default=list(TRAINS), help="what is trained (default: each of the three)")
    add("--lora_rank", type=int, default=default.lora_rank, help="of the adapters (default: %(default)s)")
    add("--dtype", choices=DTYPES, default=default.dtype, help="of the weights (default: %(default)s)")
    add("--checkpointing", nargs="+", choices=SETTINGS, default=["on"], help="activation checkpointing (default: on)")
    sizes = ["16gb", "24gb", "48gb", "80gb"]
    add("--gpu", nargs="+", default=sizes, help=f"memory sizes (default: {' '.join(sizes)})")
    add("--json", nargs="?", const="-", help="print JSON in place of tables, or also add the results to a JSON file")
    add("--resume", action="store_true", help="leave out what the --json file has from these versions")
    add("--page", help="put the table of all results of the --json file into a marked place of a Markdown page")
    options = parser.parse_args(argv)
    if options.resume and options.json in (None, "-"):
        raise ValueError("`resume` needs a --json file, which holds what was estimated before.")
    if not options.model and (options.page is None or options.json in (None, "-")):
        raise ValueError("`model` is missing. Name a Hub id, a folder or a config.json; --page needs a --json file.")
    check_range("text_tokens", options.text_tokens, 4, off="200 is usual.")
    check_range("pruning_ratio", options.pruning_ratio, 0, 1, right_open=True, off="0.9 is usual.")
    check_range("slow_mode_ratio", options.slow_mode_ratio, 0, 1, off="0.05 is usual.")
    check_range("lora_rank", options.lora_rank, 1, off="16 is usual.")
    options.image_size = [image_size(words) for words in options.image_size]
    for words in options.gpu:
        gpu_size(words)
    return options


def image_size(words: str) -> tuple[int, int]:
    """Width and height from words such as "1024x768"; one number is both."""
    match = re.fullmatch(r"(\d+)(?:x(\d+))?", words.lower())
    if match is None or not all(map(int, filter(None, match.groups()))):
        raise ValueError(f"`image_size` must be pixels such as 1024x768, got {words!r}.")
    return int(match[1]), int(match[2] or match[1])


def settings_of(options: argparse.Namespace, size: tuple[int, int]) -> Settings:
    """The settings of one image size."""
    return Settings(
        size, options.text_tokens, options.pruning_ratio, options.slow_mode_ratio, options.dtype, options.lora_rank
    )


def joined(models: list[dict], found: dict) -> list[dict]:
    """The estimates with one more, which replaces its way to train wherever that has the same settings.

    Those of other versions, or of a config of other sizes, stay apart until all of their ways are replaced.
    """

    def key(model: dict) -> tuple:
        return model["model"].lower(), json.dumps(model["settings"], sort_keys=True)

    def way(run: dict) -> tuple:
        return TRAINS.index(run["train"]), SETTINGS.index(run["checkpointing"])

    def origin(model: dict) -> tuple:
        return model["versions"], model["parameters"]

    new, others = {way(run): run for run in found["runs"]}, []
    runs = dict(new)
    for model in models:
        if key(model) != key(found):
            others.append(model)
            continue
        left = [run for run in model["runs"] if way(run) not in new]
        if origin(model) == origin(found):
            runs |= {way(run): run for run in left}
        elif left:
            others.append({**model, "runs": left})
    return sorted([*others, {**found, "runs": [runs[number] for number in sorted(runs)]}], key=key)


def known(models: list[dict], subject: Subject, settings: Settings, train: str, checkpointing: str) -> dict | None:
    """The estimate of a way to train among those made before, by the same versions from a config of the same sizes."""
    same = {"model": subject.name, "settings": as_json(settings), "versions": versions()}
    for found in models:
        runs = [run for run in found["runs"] if (run["train"], run["checkpointing"]) == (train, checkpointing)]
        if runs and same.items() <= found.items() and found["parameters"] == parameters_of(subject.config):
            return {**found, "runs": runs}
    return None


def show(console: Console, found: dict, gpus: list[float]) -> None:
    """Prints an estimate in tables of at most 80 columns."""
    parameters, settings = found["parameters"], found["settings"]
    roles = ", ".join(f"{role.replace('_', ' ')} {in_thousands(parameters[role])}" for role in ROLES)
    console.print(f"\n[bold]{found['model']}[/] ({found['kind']}), {in_thousands(sum(parameters.values()))} parameters")
    console.print(roles)
    width, height = settings["image_size"]
    console.print(
        f"an image of {width} x {height}: [bold]{found['visual_tokens']:,}[/] visual tokens, "
        f"[bold]{found['kept_tokens']:,}[/] after pruning {settings['pruning_ratio']:.0%} "
        f"(from the {found['sample_from']}); {found['tokens']:,} tokens with text"
    )
    rows = ROWS[-1]
    memory = Table("trained", "ckpt", "weights", "grads", "AdamW", "plain", "fast", "slow")
    memory.title = f"GiB held, and activations of {rows} samples, {settings['dtype']}"
    fits = Table("trained", "ckpt", *(f"{gib:g} GB" for gib in gpus), "FLOP limit", "expected")
    fits.title = "largest micro-batch, Trainer / DualSpeed; speed-up"
    if any("recomputed" in ways(run) for run in found["runs"]):
        fits.title += "\n(in brackets: with fast_mode_checkpointing, to which training falls back)"
    for run in found["runs"]:
        label = f"{WORDS[run['train']]}, {in_thousands(run['trainable'])}"
        held = (run[name] for name in ("weights_bytes", "gradients_bytes", "optimizer_bytes"))
        peaks = (activations(run, name, rows) for name in (PLAIN, FAST, SLOW))
        memory.add_row(label, run["checkpointing"], *(f"{size / GIB:.2f}" for size in (*held, *peaks)))
        limit, likely = (words(run, settings["slow_mode_ratio"]) for words in (limits, expected))
        fits.add_row(label, run["checkpointing"], *(batches(run, gib) for gib in gpus), limit, likely)
    console.print(memory)
    console.print(fits)
    console.print(
        f"{1 - USABLE:.0%} of a GPU is left free. 4-bit weights are arithmetic; what a selecting pruner needs while it "
        f"selects is not counted. Expected: {REACHED[0]} to {REACHED[1]} of the limit, as on an H100 at 7 B "
        "parameters, with equal batches.",
        style="dim",
    )


def write_table(page: Path, results: dict) -> None:
    """Puts the table between its marks in a Markdown page."""
    text = page.read_text(encoding="utf-8")
    if not results["models"]:
        raise ValueError("There are no estimates for the table yet. Name models.")
    table = readme_table(results)
    written, count = MARKED.subn(lambda marks: f"{marks[1]}{table}\n{marks[2]}", text)
    if not count:
        raise ValueError(f"`page` {str(page)!r} has no line '<!-- memory-table-start -->' with an end. Add both.")
    write_file(page, written)
