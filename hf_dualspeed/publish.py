"""`dualspeed push` and `dualspeed card`: a finished run's folder on the Hub, and its card written anew."""

from __future__ import annotations

import argparse
import json
from fnmatch import fnmatch
from pathlib import Path

from huggingface_hub import CommitInfo, HfApi, get_token
from rich.console import Console
from safetensors import SafetensorError, safe_open
from transformers.utils import (
    ADAPTER_CONFIG_NAME,
    ADAPTER_SAFE_WEIGHTS_NAME,
    CONFIG_NAME,
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
)

from hf_dualspeed.hub_io import explained, is_repo_id
from hf_dualspeed.model_card import adopt_published_card, is_written, write_model_card
from hf_dualspeed.results import RESULTS_NAME, read_results, write_results

# What a published folder may hold. No pickles: neither training_args.bin nor the optimizer's state.
ENDINGS = (".safetensors", ".json", ".jinja", ".model", ".tiktoken", ".txt", ".md", ".png", ".py")
LEFT_OUT = (".*", "_*", "trainer_state.json", "optimizer*", "scheduler*")
TEMPLATES = "additional_chat_templates"


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
    if not read_results(folder):
        Console(stderr=True).print(f"No {RESULTS_NAME} in {folder}: the card says nothing of the training.")
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

    Only what a published model may hold is pushed: no pickles, no `checkpoint-*` folders, no optimizer state. A push
    that fails can be run again; what the card on the Hub says beyond the local one is kept.

    Raises:
        ValueError: `folder` holds no whole checkpoint, or the user's token; or `repo_id` is no "user/name".
        HfHubHTTPError, ConnectionError: the Hub refuses, fails or cannot be reached.
    """
    if not is_repo_id(repo_id):
        raise ValueError(f"`repo` must be a Hub repo 'user/name', got {repo_id!r}.")
    check_checkpoint(folder)
    api = HfApi()
    with explained("push to", f"the Hub repo {repo_id!r}"):
        api.create_repo(repo_id, private=private, exist_ok=True)
        if revision is not None:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
    adopt_published_card(folder, repo_id, revision)
    results = read_results(folder)
    if results:
        results["hub"] = {**results.get("hub", {}), "repo_id": repo_id}
        write_results(folder, results)
        write_model_card(folder, results)
    files = published_files(folder)
    check_no_token(folder, files)
    with explained("push to", f"the Hub repo {repo_id!r}"):
        return api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            revision=revision,
            commit_message=commit_message or "Upload a model trained with DualSpeed",
            allow_patterns=files,
        )


def check_checkpoint(folder: Path) -> None:
    """Raises a `ValueError` unless the folder holds a config and all of its weights, in safetensors."""
    if not folder.is_dir():
        raise ValueError(f"`folder` is {str(folder)!r}, but there is no such folder. Name a run's output folder.")
    adapter = (folder / ADAPTER_CONFIG_NAME).is_file()
    if not adapter and not (folder / CONFIG_NAME).is_file():
        raise ValueError(
            f"{str(folder)!r} holds no checkpoint: neither {CONFIG_NAME} nor {ADAPTER_CONFIG_NAME} is there. Save the "
            "model by `trainer.save_model()`, or name one of the run's checkpoint folders."
        )
    names = [ADAPTER_SAFE_WEIGHTS_NAME] if adapter else _weights(folder)
    for name in names:
        _check_weights(folder / name)


def _weights(folder: Path) -> list[str]:
    """The files that hold the weights of a whole model."""
    index = folder / SAFE_WEIGHTS_INDEX_NAME
    if (folder / SAFE_WEIGHTS_NAME).is_file() or not index.is_file():
        return [SAFE_WEIGHTS_NAME]
    try:
        return sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, AttributeError):
        raise ValueError(f"{str(index)!r} names no files of weights. Save the model again.") from None


def _check_weights(path: Path) -> None:
    if not path.is_file():
        raise ValueError(
            f"{str(path.parent)!r} holds no whole checkpoint: {path.name} is missing. Only weights in safetensors are "
            "pushed; save the model again by `trainer.save_model()`."
        )
    try:
        with safe_open(path, framework="pt"):
            pass
    except SafetensorError as error:
        raise ValueError(f"{str(path)!r} is no whole safetensors file: {error}. Save the model again.") from None


def published_files(folder: Path) -> list[str]:
    """The files to push, relative to `folder`: its own, those of further adapters, and chat templates."""
    inner = [path for path in folder.iterdir() if path.is_dir() and not path.name.startswith(("checkpoint-", "last-"))]
    parts = [path for path in inner if path.name == TEMPLATES or (path / ADAPTER_CONFIG_NAME).is_file()]
    files = [path for part in (folder, *parts) for path in sorted(part.iterdir()) if path.is_file()]
    return [path.relative_to(folder).as_posix() for path in files if is_published(path)]


def is_published(path: Path) -> bool:
    """Whether a file's name is one of those that a model's repo holds; PEFT's empty card is none."""
    if any(fnmatch(path.name, pattern) for pattern in LEFT_OUT) or path.is_symlink():
        return False
    known = path.suffix in ENDINGS or path.name.startswith("LICENSE")
    return known and (path.name != "README.md" or is_written(path))


def check_no_token(folder: Path, files: list[str]) -> None:
    """Raises a `ValueError` where the user's token stands in a file that is about to be published."""
    token = get_token()
    for name in files if token else ():
        path = folder / name
        if path.suffix != ".safetensors" and token.encode() in path.read_bytes():
            raise ValueError(f"{str(path)!r} holds your Hub token and is not pushed. Take it out, and renew the token.")
