"""The `dualspeed` command: a table of subcommands, each of which is a module of `hf_dualspeed.commands`."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from difflib import get_close_matches
from importlib import import_module

from .utils.constants import INTERRUPTED
from .utils.quiet import is_first_process, quiet_command

COMMANDS: dict[str, tuple[str, str]] = {  # name: (module:function in `commands`, help)
    "check": ("check:main", "check whether a model works with DualSpeed"),
    "estimate": ("estimate:main", "tell memory, batch size and speed-up before training"),
    "convert": ("convert:main", "bring data into a file that training reads"),
    "train": ("train:main", "train a model from a recipe"),
    "evaluate": ("evaluate:main", "answer a data set's questions and score the answers"),
    "merge": ("merge:main", "merge trained adapters into their base model"),
    "push": ("push:push_command", "publish a finished run on the Hub"),
    "card": ("push:card_command", "write a run's model card anew"),
    "demo": ("space:demo_command", "ask models side by side in the browser"),
    "space": ("space:space_command", "publish the demo as a Space on the Hub"),
    "pruners": ("pruners:main", "list the pruners"),
    "push-pruner": ("push_pruner:main", "publish a pruner on the Hub"),
    "push-metric": ("push_metric:main", "publish a metric on the Hub"),
    "bench": ("bench:main", "time fast and slow training steps"),
    "assemble": ("assemble:main", "join two small pretrained models to a LLaVA"),
}


def main(argv: list[str] | None = None) -> int:
    """Runs a subcommand and returns its exit code.

    Args:
        argv (`list[str]`, *optional*): The words after `dualspeed`; by default those of the command line.
    """
    from . import __version__

    listed = "\n".join(f"  {name:<13}{help_text}" for name, (_, help_text) in COMMANDS.items())
    parser = argparse.ArgumentParser(
        prog="dualspeed",
        usage="%(prog)s COMMAND ...",
        description="Fine-tunes vision-language models faster, on pruned visual tokens.",
        epilog=f"commands:\n{listed}\n\n`dualspeed COMMAND --help` lists the options of a command.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}", help="show the version")
    parser.add_argument("command", metavar="COMMAND", help=argparse.SUPPRESS)
    arguments = sys.argv[1:] if argv is None else argv
    # Only the first word: a subcommand parses its own words, its --help included.
    name = parser.parse_args(arguments[:1] or ["--help"]).command
    if name not in COMMANDS:
        near = "".join(f" Did you mean {one!r}?" for one in get_close_matches(name, COMMANDS, n=1))
        parser.error(f"There is no command {name!r}.{near}")
    module, function = COMMANDS[name][0].split(":")
    return call(lambda: run(module, function, arguments[1:]))


def run(module: str, function: str, words: list[str]) -> int | None:
    """Runs a command's function. It is imported here, so that `dualspeed --help` does not wait for torch."""
    from .utils.progress import Work

    quiet_command()
    asked = any(word.replace("-", "_").startswith("__disable_tqdm") for word in words)
    with Work("Loading the libraries", disable=asked or not is_first_process()):
        command = getattr(import_module(f"hf_dualspeed.commands.{module}"), function)
    return command(words)


def call(command: Callable[[], int | None]) -> int:
    """Runs a command and returns its exit code.

    An error of the user is one line on stderr, which is broken between words on a terminal, and the code 2. Ctrl-C is
    one line too, with the message of the `KeyboardInterrupt`.
    """
    try:
        return command() or 0
    except KeyboardInterrupt as stop:
        if os.environ.get("DUALSPEED_DEBUG") == "1":
            raise
        if is_first_process():
            print(f"Interrupted. {stop}".strip(), file=sys.stderr)
        return INTERRUPTED
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
    Console(stderr=True, soft_wrap=not sys.stderr.isatty()).print(Text(f"Error: {line} {hint}", style="red"))


if __name__ == "__main__":
    sys.exit(main())
