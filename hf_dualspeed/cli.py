"""The `dualspeed` command: a table of subcommands, each of which is a module of `hf_dualspeed.commands`."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from importlib import import_module

COMMANDS: dict[str, tuple[str, str]] = {  # name: (module:function in `commands`, help)
    "train": ("train:main", "train a model from a recipe"),
    "pruners": ("pruners:main", "list the pruners"),
    "push-pruner": ("push_pruner:main", "publish a pruner on the Hub"),
    "push-metric": ("push_metric:main", "publish a metric on the Hub"),
    "push": ("push:push_command", "publish a finished run on the Hub"),
    "card": ("push:card_command", "write a run's model card anew"),
    "evaluate": ("evaluate:main", "answer a data set's questions and score the answers"),
    "merge": ("merge:main", "merge trained adapters into their base model"),
    "check": ("check:main", "check whether a model works with DualSpeed"),
    "convert": ("convert:main", "bring data into a file that training reads"),
    "assemble": ("assemble:main", "join two small pretrained models to a LLaVA"),
    "demo": ("space:demo_command", "ask models side by side in the browser"),
    "space": ("space:space_command", "publish the demo as a Space on the Hub"),
    "estimate": ("estimate:main", "tell memory, batch size and speed-up before training"),
    "bench": ("bench:main", "time fast and slow training steps"),
}


def main(argv: list[str] | None = None) -> int:
    """Runs a subcommand and returns its exit code.

    Args:
        argv (`list[str]`, *optional*): The words after `dualspeed`; by default those of the command line.
    """
    from . import __version__

    parser = argparse.ArgumentParser(
        prog="dualspeed", description="Fine-tunes vision-language models faster, on pruned visual tokens."
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    for name, (_, help_text) in COMMANDS.items():
        commands.add_parser(name, help=help_text)
    arguments = sys.argv[1:] if argv is None else argv
    # Only the first word: a subcommand parses its own words, its --help included.
    module, function = COMMANDS[parser.parse_args(arguments[:1]).command][0].split(":")
    # Imported in the call, so that `dualspeed --help` does not wait for torch.
    return call(lambda: getattr(import_module(f"hf_dualspeed.commands.{module}"), function)(arguments[1:]))


def call(command: Callable[[], int | None]) -> int:
    """Runs a command and returns its exit code. An error of the user is one line on stderr, and the code 2."""
    try:
        return command() or 0
    # transformers reports a model it cannot find as an OSError. What nests too deeply is a file of the user's.
    except (ValueError, OSError, ImportError, RecursionError) as error:
        if os.environ.get("DUALSPEED_DEBUG") == "1":
            raise
        _print_error(error)
        return 2


def _print_error(error: Exception) -> None:
    from rich.console import Console
    from rich.text import Text

    line = " ".join(str(error).split()) or type(error).__name__
    hint = "(DUALSPEED_DEBUG=1 shows where.)"
    Console(stderr=True, soft_wrap=True).print(Text(f"Error: {line} {hint}", style="red"))


if __name__ == "__main__":
    sys.exit(main())
