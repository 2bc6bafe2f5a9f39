"""`dualspeed push` and `dualspeed card`: push a finished run's folder to the Hub, or render its card again."""

from __future__ import annotations

import logging
import tempfile
from functools import partial
from pathlib import Path

from huggingface_hub import CommitInfo

from ..hub.source import is_repo_id
from ..hub.upload import push_files
from ..utils.constants import CARD_NAME, RESULTS_NAME
from ..utils.writing import write_file
from .files import check_checkpoint, is_stale, published_files
from .model_card import adopt_published_card, read_card, with_latest_words, write_model_card
from .results import read_results, write_results

logger = logging.getLogger(__name__)


def render(folder: Path) -> Path:
    """Writes the card of a run's folder from its results file.

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

    Only known files are pushed, see [`published_files`]. A failed push leaves `folder` unchanged and can be repeated.
    Hand-written parts of the card on the Hub are kept.

    Raises:
        ValueError: `folder` holds no whole checkpoint, broken results, or a token or key, or `repo_id` is none.
        HfHubHTTPError, ConnectionError: the Hub refuses, fails or cannot be reached.
    """
    if not is_repo_id(repo_id):
        raise ValueError(f"`repo` must be a Hub repo 'user/name', got {repo_id!r}.")
    check_checkpoint(folder)
    texts = renewed_texts(folder, repo_id, revision)
    files = published_files(folder, texts.get(CARD_NAME, b"").decode("utf-8"))
    # The card comes from `texts`, which leaves out PEFT's empty form.
    contents: dict[str, Path | bytes] = {name: folder / name for name in files if name != CARD_NAME} | texts
    message = commit_message or "Upload a model trained with DualSpeed"
    options = {"stale": partial(is_stale, files=contents), "renew": with_latest_words, "folder": folder}
    commit = push_files(contents, repo_id, message, private=private, revision=revision, **options)
    _write_texts(folder, texts)
    return commit


def renewed_texts(folder: Path, repo_id: str, revision: str | None) -> dict[str, bytes]:
    """Results and card to push; nothing in `folder` changes."""
    results = read_results(folder)
    with tempfile.TemporaryDirectory() as aside:
        if read_card(folder / CARD_NAME):
            write_file(Path(aside) / CARD_NAME, (folder / CARD_NAME).read_bytes())
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
            write_file(folder / name, data)
        except OSError as error:
            logger.warning("Pushed, but the local %s is still the earlier one: %s.", name, error)
