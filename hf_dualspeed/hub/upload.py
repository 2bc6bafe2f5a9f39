"""Uploads folders and cards to the Hub."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import CommitInfo, HfApi
from huggingface_hub.errors import EntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError

from ..utils.constants import CARD_NAME
from .errors import explained
from .source import Source, is_repo_id


def card_text(path: Path, what: str) -> str:
    """The text of a card; a `ValueError` names `what` if it is not UTF-8."""
    try:
        return path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{what} is no text in UTF-8: {error}. Save it as UTF-8 there.") from None


def published_card(repo_id: str, revision: str | None, token: str | bool | None) -> str:
    """The current card on the Hub, that of the main branch if `revision` is new; "" if there is none."""
    source = Source(repo_id, local=False, revision=revision, token=token, force_download=True)
    try:
        return card_text(source.fetch(CARD_NAME), f"{CARD_NAME} of {source}")
    except RevisionNotFoundError:
        return published_card(repo_id, None, token) if revision is not None else ""
    except (EntryNotFoundError, RepositoryNotFoundError):
        return ""


def push_folder(
    folder: Path,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    commit_message: str,
    delete: list[str] | None = None,
) -> CommitInfo:
    """Pushes a folder's files in one commit; creates repo and branch if needed.

    A failed push changes no files, neither in the folder nor in the repo, and can be repeated.

    Raises:
        ValueError: `repo_id` is not "user/name".
        HfHubHTTPError, ConnectionError: the Hub refuses, fails or cannot be reached.
    """
    if not is_repo_id(repo_id):
        raise ValueError(f"`repo_id` must be a Hub repo 'user/name', got {repo_id!r}.")
    api = HfApi(token=token)
    with explained("push to", f"the Hub repo {repo_id!r}"):
        api.create_repo(repo_id, private=private, exist_ok=True)
        if revision is not None:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        return api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            revision=revision,
            commit_message=commit_message,
            delete_patterns=delete,
        )
