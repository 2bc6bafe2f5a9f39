"""The `dualspeed` command."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Callable
from dataclasses import fields

from rich.console import Console
from rich.table import Table
from rich.text import Text


def main(argv: list[str] | None = None) -> int:
    """Runs a subcommand and returns its exit code: 2, after one line on stderr, where the user made an error.

    Args:
        argv (`list[str]`, *optional*): The words after `dualspeed`; by default those of the command line.
    """
    parser = argparse.ArgumentParser(
        prog="dualspeed", description="Fine-tunes vision-language models faster, on pruned visual tokens."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    for name, (help_text, _) in COMMANDS.items():
        commands.add_parser(name, help=help_text)
    arguments = sys.argv[1:] if argv is None else argv
    # Only the first word: a subcommand parses its own words, its --help included.
    name = parser.parse_args(arguments[:1]).command
    try:
        return COMMANDS[name][1](arguments[1:]) or 0
    # transformers reports a model it cannot find as an OSError.
    except (ValueError, OSError, ImportError) as error:
        if os.environ.get("DUALSPEED_DEBUG") == "1":
            raise
        _print_error(error)
        return 2


def _train(argv: list[str]) -> None:
    # Imported late, here and below, so that `dualspeed --help` does not wait for torch.
    from hf_dualspeed.recipe_arguments import parse_recipe

    arguments = parse_recipe(argv, prog="dualspeed train")
    from hf_dualspeed.recipe import run_recipe

    run_recipe(*arguments)


def _pruners(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="dualspeed pruners", description="Lists the registered pruners.")
    parser.parse_args(argv)
    import hf_dualspeed
    from hf_dualspeed.pruners.base import pruner_class

    table = Table("pruner", "needs", "kind", "what it does")
    for name in hf_dualspeed.available_pruners():
        cls = pruner_class(name)
        needs = ", ".join(sorted(cls.needs - {"grid"}))  # which every model gives
        table.add_row(name, needs, kind_of(cls), (cls.__doc__ or "").strip().partition("\n")[0])
    Console().print(table)


def kind_of(cls) -> str:
    """What sets a class of pruners apart from those that select tokens by a fixed rule."""
    learnt = "hidden_size" in {f.name for f in fields(cls.config_class)}
    kinds = {"learnt": learnt, "merges": cls.merges, "in the LLM": cls.in_language_model}
    return ", ".join(kind for kind, is_so in kinds.items() if is_so) or "selects"


def _module(name: str, function: str = "main") -> Callable[[list[str]], int | None]:
    return lambda argv: getattr(importlib.import_module(f"hf_dualspeed.{name}"), function)(argv)


def _print_error(error: Exception) -> None:
    line = " ".join(str(error).split()) or type(error).__name__
    hint = "(DUALSPEED_DEBUG=1 shows where.)"
    Console(stderr=True, soft_wrap=True).print(Text(f"Error: {line} {hint}", style="red"))


COMMANDS: dict[str, tuple[str, Callable[[list[str]], int | None]]] = {
    "train": ("train a model from a recipe", _train),
    "pruners": ("list the pruners", _pruners),
    "push-pruner": ("publish a pruner on the Hub", _module("push_pruner")),
    "push-metric": ("publish a metric on the Hub", _module("push_metric")),
    "push": ("publish a finished run on the Hub", _module("publish", "push_command")),
    "card": ("write a run's model card anew", _module("publish", "card_command")),
    "evaluate": ("answer a data set's questions and score the answers", _module("evaluate_command")),
    "compare": ("compare training with and without DualSpeed", _module("compare")),
    "ablation": ("compare the parts, ratios, pruners and schedules of DualSpeed", _module("ablation")),
    "check": ("check whether a model works with DualSpeed", _module("check")),
    "assemble": ("join two small pretrained models to a LLaVA", _module("assemble")),
    "demo": ("ask models side by side in the browser", _module("space", "demo_command")),
    "space": ("publish the demo as a Space on the Hub", _module("space", "space_command")),
    "bench": ("time fast and slow training steps", _module("bench")),
}

if __name__ == "__main__":
    sys.exit(main())
