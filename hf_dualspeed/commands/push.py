"""`dualspeed push` and `dualspeed card`: publish a finished run on the Hub, and write its card."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.text import Text

from ..publishing.files import left_out, published_files
from ..publishing.model_card import read_card
from ..publishing.push import push, render
from ..publishing.results import read_results
from ..utils.constants import CARD_NAME, RESULTS_NAME
from ..utils.progress import Work
from ..utils.validation import Parser


def push_command(argv: list[str]) -> None:
    """Pushes a run's folder.

    Args:
        argv (`list[str]`): The words after `dualspeed push`.
    """
    parser = Parser(
        prog="dualspeed push",
        description="Publishes the folder of a finished run on the Hub: model, isolator, pruner, results and card.",
        epilog="The token is that of `hf auth login` or of the environment variable HF_TOKEN.",
    )
    parser.add_argument("folder", help="the run's output folder")
    parser.add_argument("repo", help="the Hub repo, user/name; made where it does not exist")
    parser.add_argument("--private", action="store_true", help="make a new repo private")
    parser.add_argument("--revision", help="the branch to push to; made where it does not exist")
    parser.add_argument("--commit_message", help="what the repo's history says")
    options = parser.parse_args(argv)
    folder = Path(options.folder)
    with Work(f"Pushing {folder}"):
        commit = push(folder, options.repo, options.private or None, options.revision, options.commit_message)
    errors = Console(stderr=True, soft_wrap=True)
    if not read_results(folder):
        errors.print(Text(f"No {RESULTS_NAME} in {folder}: the card says nothing of the training."))
    others = left_out(folder, published_files(folder, read_card(folder / CARD_NAME)))
    if others:
        errors.print(Text(f"Left out: {', '.join(map(ascii, others))}. Add what belongs there by `hf upload`."))
    print(commit.commit_url)


def card_command(argv: list[str]) -> None:
    """Renders a run's card again.

    Args:
        argv (`list[str]`): The words after `dualspeed card`.
    """
    parser = Parser(
        prog="dualspeed card",
        description=f"Writes README.md anew from {RESULTS_NAME}; sections that a person wrote there stay.",
    )
    parser.add_argument("folder", help="the run's output folder")
    folder = Path(parser.parse_args(argv).folder)
    with Work("Writing the card"):  # which may ask the Hub for licences
        path = render(folder)
    print(path)
