"""Hashes of what answers depend on, by content: a copied folder has the same ones, a changed file has others."""

from __future__ import annotations

import hashlib
import json
import tempfile
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase, ProcessorMixin
from transformers.utils import ADAPTER_CONFIG_NAME, CONFIG_NAME, GENERATION_CONFIG_NAME

from ..pruners import Pruner
from ..utils.constants import ISOLATOR_WEIGHTS_NAME, PRUNER_WEIGHTS_NAME
from ..utils.text import one_line

# What a model is loaded from, and files of like names that it is not loaded from.
MODEL_FILES = (
    *(CONFIG_NAME, GENERATION_CONFIG_NAME, ADAPTER_CONFIG_NAME),
    *("*.safetensors", "*.bin", "*.index.json", "*.py"),
)
OTHER_FILES = (ISOLATOR_WEIGHTS_NAME, PRUNER_WEIGHTS_NAME, "training_args.bin", "optimizer.bin", "scheduler.bin")
# Keys of configs that tell where and by what a file was written.
ORIGIN = {
    *("_name_or_path", "name_or_path", "base_model_name_or_path", "transformers_version", "peft_version"),
    *("is_local", "local_files_only"),
}
HASH = "sha256:"


def hash_of(value: bytes | Any) -> str:
    """A short hash of bytes, or of a value in types of JSON."""
    data = value if isinstance(value, bytes) else json.dumps(value, sort_keys=True, default=str).encode()
    return HASH + hashlib.sha256(data).hexdigest()[:16]


def hash_of_file(path: Path) -> str:
    """A short hash of a file's content; in a config, keys of places and versions do not count."""
    if path.name.endswith("config.json"):
        try:
            return hash_of_config(path.read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{str(path)!r} is no JSON: {one_line(error)}. Restore it.") from None
    with path.open("rb") as file:
        return HASH + hashlib.file_digest(file, "sha256").hexdigest()[:16]


def hash_of_config(text: str) -> str:
    """A short hash of JSON text, without keys of places and versions."""

    def without_origin(found: dict[str, Any]) -> dict[str, Any]:
        return {key: value for key, value in found.items() if key not in ORIGIN}

    return hash_of(json.loads(text, object_hook=without_origin))


def model_files(folder: Path) -> dict[str, str]:
    """The hashes of the files that a model is loaded from, by name."""
    paths = {path for pattern in MODEL_FILES for path in folder.glob(pattern) if path.name not in OTHER_FILES}
    return {path.name: hash_of_file(path) for path in sorted(paths)}


def processor_parts(processor: ProcessorMixin) -> dict[str, str]:
    """The hashes of a processor's settings, its chat template, and the files that its tokenizers save."""
    found = {"settings": hash_of_config(processor.to_json_string()), "chat template": hash_of(processor.chat_template)}
    parts = {name: getattr(processor, name, None) for name in processor.get_attributes()}
    with tempfile.TemporaryDirectory() as folder:
        for name, part in parts.items():
            if isinstance(part, PreTrainedTokenizerBase):
                part.save_pretrained(Path(folder) / name)
        paths = sorted(path for path in Path(folder).rglob("*") if path.is_file())
        return found | {path.relative_to(folder).as_posix(): hash_of_file(path) for path in paths}


def pruner_code(pruner: Pruner) -> dict[str, str]:
    """The hashes of the files of a pruner's own code."""
    with tempfile.TemporaryDirectory() as folder:
        pruner.save_pretrained(folder)
        return {path.name: hash_of_file(path) for path in sorted(Path(folder).glob("*.py"))}


def differences(earlier: dict[str, Any], now: dict[str, Any], within: str = "") -> list[str]:
    """What differs between two identities, in words: `batch_size was 2, is 3`, `pictures changed`."""
    found = []
    for key in dict.fromkeys([*earlier, *now]):
        name = f"{within} {key}".strip()
        before, after = earlier.get(key), now.get(key)
        if isinstance(before, dict) or isinstance(after, dict):
            found += differences(before or {}, after or {}, name)
        elif before != after and str(before or after).startswith(HASH):
            found.append(f"{name} {'is new' if before is None else 'is gone' if after is None else 'changed'}")
        elif before != after:
            found.append(f"{name} was {before!r}, is {after!r}")
    return found
