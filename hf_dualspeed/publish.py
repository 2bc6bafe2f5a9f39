"""`dualspeed push` and `dualspeed card`: a finished run's folder on the Hub, and its card written anew."""

from __future__ import annotations

import argparse
import logging
import shutil
import tempfile
from pathlib import Path

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi
from rich.console import Console
from rich.text import Text

from hf_dualspeed.hub_io import CARD_NAME, WEIGHTS_NAME, explained, is_repo_id
from hf_dualspeed.isolator import WEIGHTS_NAME as ISOLATOR_NAME
from hf_dualspeed.model_card import adopt_published_card, read_card, write_model_card
from hf_dualspeed.published_files import check_checkpoint, check_no_token, left_out, published_files
from hf_dualspeed.results import RESULTS_NAME, read_results, write_results

logger = logging.getLogger(__name__)


def push_command(argv: list[str]) -> None:
    """Pushes a run's folder.

    Args:
        argv (`list[str]`): The words after `dualspeed push`.
    """
    parser = argparse.ArgumentParser(
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
    commit = push(folder, options.repo, options.private or None, options.revision, options.commit_message)
    errors = Console(stderr=True, soft_wrap=True)
    if not read_results(folder):
        errors.print(Text(f"No {RESULTS_NAME} in {folder}: the card says nothing of the training."))
    others = left_out(folder, published_files(folder, read_card(folder / CARD_NAME)))
    if others:
        errors.print(Text(f"Left out: {', '.join(map(ascii, others))}. Add what belongs there by `hf upload`."))
    print(commit.commit_url)


def card_command(argv: list[str]) -> None:
    """Renders a run's card anew.

    Args:
        argv (`list[str]`): The words after `dualspeed card`.
    """
    parser = argparse.ArgumentParser(
        prog="dualspeed card",
        description=f"Writes README.md anew from {RESULTS_NAME}; sections that a person wrote there stay.",
    )
    parser.add_argument("folder", help="the run's output folder")
    print(render(Path(parser.parse_args(argv).folder)))


def render(folder: Path) -> Path:
    """Writes the card of a run's folder from its results.

    Raises:
        FileNotFoundError: the folder holds no results.
    """
    results = read_results(folder)
    if not results:
        raise FileNotFoundError(f"No {RESULTS_NAME} in {str(folder)!r}: `trainer.save_model()` writes one.")
    return write_model_card(folder, results)


def push(
    folder: Path,
    repo_id: str,
    private: bool | None = None,
    revision: str | None = None,
    commit_message: str | None = None,
) -> CommitInfo:
    """Publishes the checkpoint in `folder` with isolator, pruner, results and a card that names the repo.

    Only files of names that a published model has are pushed: see [`published_files`]. A push that fails changes
    nothing in `folder` and can be run again; what the card on the Hub says beyond the local one is kept.

    Raises:
        ValueError: `folder` holds no whole checkpoint, broken results, or a Hub token; or `repo_id` is no "user/name".
        HfHubHTTPError, ConnectionError: the Hub refuses, fails or cannot be reached.
    """
    if not is_repo_id(repo_id):
        raise ValueError(f"`repo` must be a Hub repo 'user/name', got {repo_id!r}.")
    check_checkpoint(folder)
    texts = renewed_texts(folder, repo_id, revision)
    files = published_files(folder, texts.get(CARD_NAME, b"").decode("utf-8"))
    # PEFT's empty card is none.
    contents: dict[str, Path | bytes] = {name: folder / name for name in files if name != CARD_NAME} | texts
    check_no_token(folder, contents)
    api = HfApi()
    with explained("push to", f"the Hub repo {repo_id!r}"):
        api.create_repo(repo_id, private=private, exist_ok=True)
        if revision is not None:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        # An earlier run's isolator or learnt pruner, which this one has not.
        stale = {WEIGHTS_NAME, ISOLATOR_NAME}.intersection(api.list_repo_files(repo_id, revision=revision)) - set(files)
        commit = api.create_commit(
            repo_id,
            [CommitOperationAdd(name, content) for name, content in contents.items()]
            + [CommitOperationDelete(name) for name in sorted(stale)],
            revision=revision,
            commit_message=commit_message or "Upload a model trained with DualSpeed",
        )
    _write_texts(folder, texts)
    return commit


def renewed_texts(folder: Path, repo_id: str, revision: str | None) -> dict[str, bytes]:
    """Results and card as they are to be pushed; nothing in `folder` changes."""
    results = read_results(folder)
    with tempfile.TemporaryDirectory() as aside:
        if read_card(folder / CARD_NAME):
            shutil.copy(folder / CARD_NAME, aside)
        adopt_published_card(aside, repo_id, revision)
        if results:
            results["hub"] = {**results.get("hub", {}), "repo_id": repo_id}
            write_results(aside, results)
            write_model_card(aside, results)
        names = [RESULTS_NAME] if results else []
        names += [CARD_NAME] if read_card(Path(aside) / CARD_NAME) else []
        return {name: (Path(aside) / name).read_bytes() for name in names}


def _write_texts(folder: Path, texts: dict[str, bytes]) -> None:
    for name, data in texts.items():
        try:
            (folder / name).write_bytes(data)
        except OSError as error:
            logger.warning("Pushed, but the local %s is still the earlier one: %s.", name, error)
