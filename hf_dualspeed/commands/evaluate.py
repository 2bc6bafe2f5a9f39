"""`dualspeed evaluate`: answers a data set's questions from all visual tokens and from pruned ones, and scores them."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from rich.console import Console
from rich.table import Table

from ..evaluation.evaluate import Evaluation, evaluate, prepare, record
from ..metrics import CLASSES
from ..recipes.arguments import DTYPES
from ..utils.constants import INTERRUPTED
from ..utils.validation import Parser, check_range


def main(argv: list[str]) -> int:
    """Evaluates, and prints the scores and the places of answers and results.

    Args:
        argv (`list[str]`): The words after `dualspeed evaluate`.

    Raises:
        ValueError: an option is out of range, the checkpoint is no vision-language model, the data cannot be
            evaluated, or answers in the output folder are damaged.
    """
    options = parse(argv)
    try:
        evaluation = prepare(options)
    except ValueError as error:
        if "image_column=" in str(error):
            raise ValueError(f"{error} In this command, it is --image_column.") from error
        raise
    try:
        entries = evaluate(evaluation)
    except KeyboardInterrupt:
        same = "the command without --overwrite" if options.overwrite else "the same command"
        print(f"Interrupted. Rerun {same} to resume.", file=sys.stderr)
        return INTERRUPTED
    record(evaluation, entries)
    show(evaluation, entries)
    return 0


def parser() -> argparse.ArgumentParser:
    words = Parser(
        prog="dualspeed evaluate",
        description="Answers a data set's questions from all visual tokens and from pruned ones, and scores them.",
        epilog="Rerun an interrupted command to resume. docs/evaluation.md has examples.",
    )
    words.add_argument("checkpoint", help="a run's folder, any checkpoint's, or a Hub repo")
    add_questions(words.add_argument_group("what is asked"))
    add_views(words.add_argument_group("what the model sees"))
    words.add_argument("--batch_size", type=int, default=16, help="questions answered at a time (default: 16)")
    words.add_argument("--max_new_tokens", type=int, default=16, help="longest answer, in tokens (default: 16)")
    types = "type of the loaded weights (default: the checkpoint's)"
    words.add_argument("--dtype", default="auto", choices=DTYPES, help=types)
    places = "where the answers go (default: evaluations in the checkpoint's folder, or in runs)"
    words.add_argument("--output", help=places)
    words.add_argument("--overwrite", action="store_true", help="begin anew, whatever lies there")
    code = "run code that checkpoint and pruner bring along"
    words.add_argument("--trust_remote_code", action="store_true", help=code)
    return words


def add_questions(group) -> None:
    data = "a JSON, JSONL, CSV, TSV or Parquet file, a folder, a Hub repo, easy-vqa"
    group.add_argument("--dataset", required=True, help=data)
    group.add_argument("--split", default="test", help="split of a data set that has splits (default: test)")
    group.add_argument("--image_folder", help="where relative image paths start")
    columns = "columns that hold the pictures, none to ask of text alone (default: image or images)"
    group.add_argument("--image_column", nargs="*", metavar="COLUMN", help=columns)
    group.add_argument("--limit", type=int, help="the first so many questions only; no score of the whole data set")
    names = {"choices": CLASSES, "metavar": "METRIC", "help": f"of {', '.join(CLASSES)}"}
    group.add_argument("--metric", nargs="+", default=["exact_match"], **names)


def add_views(group) -> None:
    own = "pruners to answer with, all tokens besides; default: the run's own, given a ratio"
    group.add_argument("--pruner", nargs="+", help=own)
    shares = "fractions of the visual tokens removed, in [0, 1)"
    group.add_argument("--pruning_ratio", type=float, nargs="+", help=shares)
    group.add_argument("--no_isolator", action="store_true", help="leave out the run's isolator")
    group.add_argument("--seed", type=int, default=0, help="for pruners that draw")


def parse(argv: list[str]) -> argparse.Namespace:
    """Parses the options and checks their ranges."""
    options = parser().parse_args(argv)
    for name in ("batch_size", "max_new_tokens"):
        check_range(name, getattr(options, name), 1)
    check_range("seed", options.seed, 0, 2**32 - 1)
    for ratio in options.pruning_ratio or []:
        check_range("pruning_ratio", ratio, 0, 1, right_open=True, off="All tokens are evaluated in any case.")
    options.metric = list(dict.fromkeys(options.metric))
    return options


def show(evaluation: Evaluation, entries: list[dict[str, Any]]) -> None:
    """Prints a row per view, with its scores."""
    metrics = evaluation.options.metric
    table = Table("visual tokens", *metrics, "questions", "seconds")
    for view in evaluation.views:
        own = {one["metric"]: one for one in entries if one["view"] == view.name}
        first = own[metrics[0]]
        values = [f"{own[metric]['value']:.4f}" for metric in metrics]
        table.add_row(view.name, *values, first.get("part", str(first["n"])), f"{first['seconds']:.1f}")
    Console().print(table)
    print(f"Answers: {evaluation.folder}")
    if evaluation.checkpoint.run is not None:
        print(f"Results and card: {evaluation.checkpoint.run}")
