"""Pushes files to the Hub: the one place from which anything is uploaded."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError

from ..utils.constants import CARD_NAME
from .errors import explained
from .secrets import check_no_secret
from .source import Source

# How often a push looks at the repo again: those at the same time, such as of a sweep, each get through once.
ATTEMPTS = 10
# What the Hub writes into the card of a new Space.
NEW_SPACE = re.compile(r"\A---\n.*\n---\s*Check out the configuration reference at \S+\s*\Z", re.DOTALL)


def card_text(path: Path, what: str) -> str:
    """The text of a card; a `ValueError` names `what` if it is not UTF-8."""
    try:
        return path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{what} is no text in UTF-8: {error}. Save it as UTF-8 there.") from None


def published_card(repo_id: str, revision: str | None, token: str | bool | None) -> str:
    """The current card of a model on the Hub, that of the main branch if `revision` is new; "" if there is none."""
    try:
        with explained("load", f"the Hub repo {repo_id!r}", CARD_NAME):
            head = HfApi(token=token).model_info(repo_id, revision=revision).sha
    except RevisionNotFoundError:
        return published_card(repo_id, None, token) if revision is not None else ""
    except RepositoryNotFoundError:
        return ""
    return _card_of(Source(repo_id, local=False, revision=revision, token=token, commit=head))


def _card_of(source: Source) -> str:
    """The card at a commit: at a branch, it may change between two requests. "" if there is none but the Hub's own."""
    try:
        card = card_text(source.fetch(CARD_NAME), f"{CARD_NAME} of {replace(source, commit=None)}")
    except EntryNotFoundError:
        return ""
    return "" if source.space and NEW_SPACE.search(card) else card


def push_files(
    contents: Mapping[str, Path | bytes],
    repo_id: str,
    commit_message: str,
    *,
    space: bool = False,
    create: bool = True,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    stale: Callable[[str], bool] | None = None,
    renew: Callable[[str, str], str] | None = None,
    folder: str | Path = "",
) -> CommitInfo:
    """Pushes files in one commit, once it is sure that none is a link or holds a secret.

    A failed push changes nothing in the repo and can be repeated. An upload may take hours: where a person or another
    push commits meanwhile, the repo is looked at again, and what is uploaded already is not sent twice.

    Args:
        contents (`Mapping[str, Path or bytes]`): names in the repo, with files or their bytes.
        repo_id (`str`): "user/name".
        commit_message (`str`): what the repo's history says.
        space (`bool`, *optional*): whether the repo is a Space of gradio, not a model.
        create (`bool`, *optional*): whether to make the repo, `private` or not, and the branch where they are missing.
        private, token, revision: those of [`~huggingface_hub.HfApi.create_commit`] and `create_repo`.
        stale (`Callable`, *optional*): says by its name whether a file of the repo is to go if it is not in `contents`.
        renew (`Callable`, *optional*): makes the card of the repo's, "" if it has none, and the one in `contents`.
        folder (`str` or `Path`, *optional*): where they come from, for messages.

    Raises:
        ValueError: a file holds a token or key, or is a link.
        HfHubHTTPError, ConnectionError: the Hub refuses, fails or cannot be reached.
    """
    for path in contents.values():
        if isinstance(path, Path) and (path.is_symlink() or not path.is_file()):
            raise ValueError(f"{str(path)!r} is a link or no file, and is not pushed. Put the file itself there.")
    check_no_secret(contents, [token], folder)
    api, kind = HfApi(token=token), "space" if space else "model"
    with explained("push to", f"the Space {repo_id!r}" if space else f"the Hub repo {repo_id!r}"):
        if create:
            sdk = "gradio" if space else None
            api.create_repo(repo_id, repo_type=kind, space_sdk=sdk, private=private, exist_ok=True)
        if create and revision is not None:
            api.create_branch(repo_id, repo_type=kind, branch=revision, exist_ok=True)
        for left in reversed(range(ATTEMPTS)):
            head = api.repo_info(repo_id, repo_type=kind, revision=revision).sha
            there = api.list_repo_files(repo_id, repo_type=kind, revision=head) if stale else ()
            gone = sorted(name for name in there if name not in contents and stale(name))
            files = dict(contents)
            if renew is not None and CARD_NAME in contents:
                card = contents[CARD_NAME]
                card = card if isinstance(card, bytes) else card.read_bytes()
                source = Source(repo_id, local=False, revision=revision, token=token, commit=head, space=space)
                files[CARD_NAME] = renew(_card_of(source), card.decode("utf-8")).encode("utf-8")
                check_no_secret({CARD_NAME: files[CARD_NAME]}, [token], folder)
            operations = [*map(CommitOperationAdd, files, files.values()), *map(CommitOperationDelete, gone)]
            options = {"repo_type": kind, "revision": revision, "commit_message": commit_message}
            try:
                return api.create_commit(repo_id, operations, parent_commit=head, **options)
            except HfHubHTTPError as error:
                if error.response.status_code != 412 or not left:  # 412: there is a newer commit than `head`
                    raise
