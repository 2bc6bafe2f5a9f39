"""Errors of the Hub's client, with messages that say what failed and what to do."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)


@contextmanager
def explained(action: str, what: str, filename: str = "") -> Iterator[None]:
    """Rewrites messages of errors of the Hub's client: they say what failed and what to do, and hold no token.

    Errors keep their type; failed connections become a `ConnectionError`.
    """
    try:
        yield
    except Exception as error:
        # The client wraps a failed upload in a RuntimeError, and a failure under `force_download` in a ValueError.
        hidden = type(error) in (RuntimeError, ValueError) and isinstance(error.__cause__, (HTTPError, OSError))
        helpful = _helpful(error.__cause__ if hidden else error, f"Cannot {action} {what}: ", filename)
        if helpful is error:
            raise
        raise helpful from None if hidden else error


def _helpful(error: Exception, cannot: str, filename: str) -> Exception:
    """The error with a helpful message; errors of other kinds stay as they are."""
    words = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, HfHubHTTPError):
        error.args = (cannot + _remedy(error, filename),)
        return error
    if isinstance(error, LocalEntryNotFoundError):
        return ConnectionError(
            f"{cannot}the Hub was not asked or not reached, and {filename} is not in the cache. Check the connection, "
            "and unset HF_HUB_OFFLINE and `local_files_only` to download it."
        )
    if isinstance(error, (HTTPError, ConnectionError)):
        return ConnectionError(f"{cannot}the connection failed ({words}). Check it and run this again.")
    if isinstance(error, OSError) and "Consistency check failed" in words:
        return ConnectionError(f"{cannot}the download of {filename} was cut short. Run this again.")
    return error


def _remedy(error: HfHubHTTPError, filename: str) -> str:
    status = error.response.status_code
    if isinstance(error, GatedRepoError):
        return "it is gated. Ask for access on its page and log in with `hf auth login`."
    if isinstance(error, RepositoryNotFoundError):
        return (
            "it does not exist, or is private and your token has no access. Check its name; for a private repo log in "
            "with `hf auth login`, set HF_TOKEN, or pass `token`."
        )
    if isinstance(error, RevisionNotFoundError):
        return "there is no such revision. Give a branch, a tag or a commit of this repo."
    if isinstance(error, EntryNotFoundError):
        return f"it has no {filename}. Is it a pruner's? `pruner.push_to_hub` publishes one."
    if status == 401 and "authorization" not in error.response.request.headers:
        return "there is no token. Log in with `hf auth login`, set HF_TOKEN, or pass `token`."
    if status == 401:
        return "the Hub does not accept the token. Log in with `hf auth login`, or correct HF_TOKEN or `token`."
    if status == 403:
        return f"it is not allowed (HTTP 403: {error.server_message}). Use a token of its owner with the right to it."
    if status == 412:
        return "it changed meanwhile (HTTP 412). Run this again."
    if status == 429:
        return "the Hub got too many requests (HTTP 429). Wait a few minutes and run this again."
    if status >= 500:
        return f"the Hub failed (HTTP {status}). Nothing local has changed; run this again."
    return f"the Hub refused (HTTP {status}: {error.server_message})."
