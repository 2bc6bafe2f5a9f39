"""Selects the files of a run's folder that may be published: whole checkpoints, known file names, no links."""

from __future__ import annotations

import json
import re
from collections.abc import Container, Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from urllib.parse import unquote

from safetensors import SafetensorError, safe_open
from transformers.dynamic_module_utils import get_relative_imports
from transformers.utils import (
    ADAPTER_CONFIG_NAME,
    ADAPTER_SAFE_WEIGHTS_NAME,
    CONFIG_NAME,
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
)

from ..hub.source import CODE_NAME, REFERENCE
from ..utils.constants import (
    CARD_NAME,
    ISOLATOR_WEIGHTS_NAME,
    PRUNER_WEIGHTS_NAME,
    RESULTS_NAME,
    SAVING_NAME,
    UNFINISHED_NAME,
)

# Files that transformers, tokenizers, PEFT and this library write into a model's folder. Any other file may be private.
TOKENIZERS = ("tokenizer*.json", "tokenizer*.model", "special_tokens_map.json", "added_tokens.json", "merges.txt")
TOKENIZERS += ("vocab*.json", "vocab*.txt", "spiece.model", "sentencepiece*.model", "spm*.model", "bpe.codes")
TOKENIZERS += ("*.tiktoken", "tekken.json", "normalizer.json", "chat_template.jinja", "chat_template.json")
CONFIGS = ("config.json", "generation_config.json", "processor_config.json", "preprocessor_config.json")
CONFIGS += ("video_preprocessor_config.json", "audio_tokenizer_config.json", "pruner_config.json")
WEIGHTS = ("*.safetensors", "*.safetensors.index.json")
ADAPTER = (ADAPTER_CONFIG_NAME, *WEIGHTS)
RECORD = (CARD_NAME, RESULTS_NAME, "learning_curve.png", "LICENSE*")
# Optional files of the fast view; a run without them deletes those of an earlier run.
PARTS = (ISOLATOR_WEIGHTS_NAME, PRUNER_WEIGHTS_NAME)
# The weights of a whole model, and adapters, which would be loaded in place of another whole model.
WHOLE_MODEL = r"model(-\d+-of-\d+)?\.safetensors(\.index\.json)?"
WHOLE_MODEL += "|" + "|".join(map(re.escape, (ADAPTER_CONFIG_NAME, ADAPTER_SAFE_WEIGHTS_NAME)))
TOP = (*CONFIGS, *TOKENIZERS, *ADAPTER, *RECORD)
TEMPLATES = "additional_chat_templates"
# What else a checkpoint needs to be resumed from, and the subfolders of FSDP and DeepSpeed.
STATE = ("trainer_state.json", "optimizer.pt", "optimizer.bin", "scheduler.pt", "scaler.pt", "rng_state*.pth")
STATE += ("pytorch_model_fsdp*.bin", "latest")
SHARDS = {"pytorch_model_fsdp_*": ("*.distcp", ".metadata"), "optimizer_*": ("*.distcp", ".metadata")}
SHARDS |= {"global_step*": ("*_states.pt",)}
IMAGE = re.compile(r"[^\s()\[\]<>\"'=]+\.(?:png|jpe?g|gif|webp|svg)\b", re.IGNORECASE)


def published_files(folder: Path, card: str = "", resumable: bool = False) -> list[str]:
    """The files to push, relative to `folder`: known names, code that a config names, and images in the card.

    Links and hidden files are left out. Of subfolders, only chat templates and further PEFT adapters are taken; with
    `resumable`, also what training goes on from.
    """
    names = known_files(folder, resumable)
    images = {unquote(match).removeprefix("./") for match in IMAGE.findall(card)}
    configs = [name for name in names if "/" not in name and name.endswith("config.json")]
    extra = code_files(folder, configs) | images
    return names + sorted(name for name in extra if "/" not in name and is_plain(folder / name) and name not in names)


def known_files(folder: Path, resumable: bool = False) -> list[str]:
    """The files in `folder` whose names tell what they are, as in [`published_files`]."""
    names = _named(folder, (*TOP, *STATE) if resumable else TOP)
    for part in sorted(path for path in folder.iterdir() if path.is_dir() and not path.is_symlink()):
        if not part.name.startswith(("checkpoint-", "last-", ".", "_")):
            names += [f"{part.name}/{name}" for name in _named(part, _patterns(part, resumable))]
    return names


def _patterns(part: Path, resumable: bool) -> tuple[str, ...]:
    """What is published of a subfolder."""
    if part.name == TEMPLATES:
        return ("*.jinja",)
    if is_plain(part / ADAPTER_CONFIG_NAME):
        return ADAPTER
    shards = [patterns for name, patterns in SHARDS.items() if fnmatchcase(part.name, name)]
    return shards[0] if resumable and shards else ()


def left_out(folder: Path, files: list[str]) -> list[str]:
    """Everything in `folder` that is not pushed: files, and folders that hold none of `files`."""
    parts = {name.split("/")[0] for name in files if "/" in name}
    inner = [path for part in sorted(parts) for path in (folder / part).iterdir()]
    paths = [path for path in (*folder.iterdir(), *inner) if path.name not in parts or path.parent != folder]
    names = {path.relative_to(folder).as_posix() + ("/" if path.is_dir() else "") for path in paths}
    return sorted(names.difference(files))


def is_stale(name: str, files: Container[str]) -> bool:
    """Whether a file of an earlier push would be taken for a part of a model that consists of `files`."""
    whole = SAFE_WEIGHTS_NAME in files or SAFE_WEIGHTS_INDEX_NAME in files
    return name in PARTS or (whole and re.fullmatch(WHOLE_MODEL, name) is not None)


def is_plain(path: Path) -> bool:
    """Whether the path is a file and not a link."""
    return path.is_file() and not path.is_symlink()


def _named(folder: Path, patterns: tuple[str, ...]) -> list[str]:
    """The plain files in a folder whose names match; a hidden one needs a pattern of a hidden one."""
    names = sorted(path.name for path in folder.iterdir() if is_plain(path))
    return [name for name in names if any(fnmatchcase(name, p) and (name[0] != "." or p[0] == ".") for p in patterns)]


def code_files(folder: Path, configs: list[str], links: bool = False) -> set[str]:
    """The Python files in `folder` that the `auto_map` of a config names, and those that they import.

    With `links`, these may be links, as in the cache of the Hub.

    Raises:
        ValueError: a config is not a JSON mapping, or a Python file is not UTF-8.
    """
    names = [f"{match[1]}.py" for name in configs for match in _references(folder / name)]
    found: set[str] = set()
    while names:
        name = names.pop()
        there = (folder / name).is_file() if links else is_plain(folder / name)
        if name in found or not CODE_NAME.fullmatch(name) or not there:
            continue
        found.add(name)
        try:
            names += [f"{module}.py" for module in get_relative_imports(folder / name)]
        except ValueError as error:
            raise ValueError(f"{str(folder / name)!r} is no Python file in UTF-8: {error}.") from None
    return found


def _references(config: Path) -> Iterator[re.Match]:
    """The "file.ClassName" references in a config's `auto_map`; tokenizers have two, and one may be null."""
    auto_map = read_mapping(config).get("auto_map")
    values = list(auto_map.values()) if isinstance(auto_map, dict) else [auto_map]
    flat = [item for value in values for item in (value if isinstance(value, list) else [value])]
    return filter(None, (REFERENCE.fullmatch(item) for item in flat if isinstance(item, str)))


def read_mapping(path: Path) -> dict:
    """The JSON mapping in a file of the checkpoint; a `ValueError` names the file if it holds none."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{str(path)!r} is no JSON: {error}. Save the model again.") from None
    if not isinstance(values, dict):
        raise ValueError(f"{str(path)!r} must hold a JSON mapping, got {str(values)[:100]!r}. Save the model again.")
    return values


def check_checkpoint(folder: Path, links: bool = False) -> None:
    """Raises a `ValueError` unless the folder holds a config and all of its weights, in safetensors.

    With `links`, these may be links, which are never pushed.
    """
    if not folder.is_dir():
        raise ValueError(f"`folder` is {str(folder)!r}, but there is no such folder. Name a run's output folder.")
    check_finished(folder)
    adapter = (folder / ADAPTER_CONFIG_NAME).is_file()
    if not adapter and not (folder / CONFIG_NAME).is_file():
        raise ValueError(
            f"{str(folder)!r} holds no checkpoint: neither {CONFIG_NAME} nor {ADAPTER_CONFIG_NAME} is there. Save the "
            "model by `trainer.save_model()`, or name one of the run's checkpoint folders."
        )
    weights = [ADAPTER_SAFE_WEIGHTS_NAME] if adapter else _weights(folder)
    for name in (ADAPTER_CONFIG_NAME if adapter else CONFIG_NAME, *weights, CARD_NAME, RESULTS_NAME):
        if not links and (folder / name).is_symlink():
            raise ValueError(f"{str(folder / name)!r} is a link, and links are not pushed. Put the file itself there.")
    for name in weights:
        _check_weights(folder / name)


def check_finished(folder: Path) -> None:
    """Raises a `ValueError` if a save into the folder was cut off while files took their places."""
    if (folder / UNFINISHED_NAME).exists():
        rest = f"Its other files are in {SAVING_NAME}. " if (folder / SAVING_NAME).is_dir() else ""
        raise ValueError(
            f"{str(folder)!r} holds no whole checkpoint: its saving was cut off. {rest}Resume the run and save again, "
            "or name another checkpoint of it."
        )


def _weights(folder: Path) -> list[str]:
    """The weight files of a whole model."""
    index = folder / SAFE_WEIGHTS_INDEX_NAME
    if (folder / SAFE_WEIGHTS_NAME).is_file() or not index.is_file():
        return [SAFE_WEIGHTS_NAME]
    shards = read_mapping(index).get("weight_map")
    names = set(shards.values()) if isinstance(shards, dict) and all(map(is_shard, shards.values())) else None
    if not names:
        raise ValueError(f"{str(index)!r} names no files of weights beside it. Save the model again.")
    return sorted(names)


def is_shard(name: object) -> bool:
    """Whether `name` is a plain file name of safetensors, as pushed shards have."""
    return isinstance(name, str) and re.fullmatch(r"\w[\w.-]*\.safetensors", name) is not None


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
