"""Examples in the usual layouts (TRL's, LLaVA's) as messages and images, and data sets of them."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict, Features, Image, List, Value, load_dataset, load_from_disk

from hf_dualspeed.arguments import check_choice
from hf_dualspeed.easy_vqa import DATASETS, MESSAGES, load_easy_vqa
from hf_dualspeed.fashion_grid import NAME as FASHION_GRID
from hf_dualspeed.fashion_grid import load_fashion_grid

PLACEHOLDERS = {"image": "<image>", "video": "<video>"}
ROLES = {"human": "user", "gpt": "assistant", "system": "system", "user": "user", "assistant": "assistant"}
FILE_TYPES = (".json", ".jsonl", ".parquet", ".csv")
EXTRA_COLUMNS = ("id", "question", "answer")
# What people answered, and what there is to choose from.
LIST_COLUMNS = ("answers", "options")


def to_messages(example: dict[str, Any]) -> dict[str, list]:
    """Brings an example of any layout into one: messages with lists of parts, images and videos.

    Understood are TRL's `messages` and `prompt` + `completion`, each with `images` or `image`, and LLaVA's
    `conversations` with `image`; `videos` or `video`, each a list of frames, go the same way. A `<image>` in a
    plain text becomes a placeholder, and where there are videos, so does a `<video>`; where plain texts hold none,
    the placeholders of all images (of all videos) go to the front of the first user message. The example is left as
    it is.

    Returns:
        `dict` with `messages`, `images` and `videos`, with as many parts of type `"image"` as images and of type
        `"video"` as videos.

    Raises:
        ValueError: the layout is unknown, or the numbers of images or videos and of placeholders differ.
    """
    media = {"image": _as_list(example.get("images") or example.get("image")), "video": _videos(example)}
    turns = _turns(example)
    written = {kind: text for kind, text in PLACEHOLDERS.items() if kind == "image" or media[kind]}
    messages = [{**turn, "content": _parts(turn["content"], written)} for turn in turns]
    plain = all(isinstance(turn["content"], str) for turn in turns)
    for kind, items in media.items():
        _add_placeholders(messages, kind, items, plain, sample_name(example))
    return {"messages": messages, "images": media["image"], "videos": media["video"]}


def _add_placeholders(messages: list[dict], kind: str, items: list, plain: bool, name: str) -> None:
    placeholders = sum(part["type"] == kind for message in messages for part in message["content"])
    first_user = next((message for message in messages if message["role"] == "user"), None)
    if items and not placeholders and first_user and plain:
        first_user["content"] = [{"type": kind} for _ in items] + first_user["content"]
        placeholders = len(items)
    if placeholders != len(items):
        raise ValueError(
            f"The sample ({name}) has {len(items)} {kind}(s) but {placeholders} {kind} placeholder(s) in its "
            f"messages. Put one {PLACEHOLDERS[kind]} (or a part of type {kind!r}) per {kind}."
        )


def _videos(example: dict[str, Any]) -> list:
    """The clips of an example; `video` is one clip, whose frames may be a list."""
    if example.get("videos") is not None:
        return list(example["videos"])
    video = example.get("video")
    return [] if video is None or (isinstance(video, str) and not video) else [video]


def _turns(example: dict[str, Any]) -> list[dict]:
    if example.get("conversations"):
        for turn in example["conversations"]:
            check_choice("from", turn.get("from"), list(ROLES))
        return [{"role": ROLES[t["from"]], "content": t["value"]} for t in example["conversations"]]
    if example.get("messages"):
        return list(example["messages"])
    if example.get("prompt") and example.get("completion"):
        sides = (("user", example["prompt"]), ("assistant", example["completion"]))
        turns = [[{"role": role, "content": side}] if isinstance(side, str) else side for role, side in sides]
        return [*turns[0], *turns[1]]
    raise ValueError(
        f"The sample ({sample_name(example)}) has no conversation. Its columns are {sorted(example)}; needed "
        "is a filled `messages`, `prompt` and `completion`, or `conversations`."
    )


def _parts(content: str | list[dict] | None, placeholders: dict[str, str]) -> list[dict]:
    """The content of a message as fresh parts, without the empty fields that Arrow adds."""
    if not isinstance(content, str):
        for part in content or []:
            check_choice("type", part.get("type"), (*PLACEHOLDERS, "text"))
        return [
            {"type": "text", "text": part["text"]} if part["type"] == "text" else {"type": part["type"]}
            for part in content or []
        ]
    pieces = re.split(f"({'|'.join(placeholders.values())})", content)
    if len(pieces) == 1:
        return [{"type": "text", "text": content}]
    kinds = {text: kind for kind, text in placeholders.items()}
    # The line breaks around LLaVA's placeholders are the template's business.
    pieces = [piece.strip("\n") for piece in pieces]
    return [{"type": kinds[p]} if p in kinds else {"type": "text", "text": p} for p in pieces if p]


def _as_list(value: Any) -> list:
    if value is None or value == "":
        return []
    return list(value) if isinstance(value, (list, tuple)) else [value]


def sample_name(example: dict[str, Any]) -> str:
    """What a person finds the sample by: its id, else its first image's path."""
    if example.get("id") is not None:
        return f"id {example['id']!r}"
    for image in _as_list(example.get("images") or example.get("image")):
        path = image.get("path") if isinstance(image, dict) else image
        if isinstance(path, (str, os.PathLike)):
            return f"image {str(path)!r}"
    return "without id"


def load_examples(path_or_name: str, split: str = "train", image_folder: str | None = None) -> Dataset:
    """Loads conversations; images stay encoded, for [`VisionLanguageCollator`] to decode.

    Args:
        path_or_name (`str`): A `.json` or `.jsonl` file in LLaVA's or TRL's layout, a `.parquet` or `.csv` file, a
            folder written by `save_to_disk`, `easy-vqa`, `easy-vqa-color`, `fashion-grid`, or a data set on the Hub.
        split (`str`, *optional*, defaults to `"train"`): Split of a data set that has splits; a file has
            none.
        image_folder (`str`, *optional*): What image paths are relative to; default: the file's own folder.
    """
    path = Path(path_or_name)
    is_file = path.suffix.lower() in FILE_TYPES
    if is_file and not path.is_file():
        raise FileNotFoundError(f"`path_or_name` names a file that does not exist: {str(path)!r}.")
    if path.suffix.lower() in (".json", ".jsonl"):
        return _load_json(path, image_folder or path.parent)
    if path_or_name in DATASETS:
        dataset = load_easy_vqa(split, DATASETS[path_or_name])
    elif path_or_name == FASHION_GRID:
        dataset = load_fashion_grid(split)
    elif is_file:
        dataset = load_dataset(path.suffix.lower()[1:], data_files=str(path), split="train")
    elif any((path / name).is_file() for name in ("state.json", "dataset_dict.json")):
        dataset = load_from_disk(str(path))
    else:
        dataset = load_dataset(path_or_name, split=split)
    if isinstance(dataset, DatasetDict):
        check_choice("split", split, list(dataset))
        dataset = dataset[split]
    return _with_paths(undecoded(dataset), image_folder or (path.parent if is_file else None))


def _load_json(path: Path, image_folder: str | Path) -> Dataset:
    """Normalises row by row, for Arrow refuses LLaVA's `image` that is a text, a list or absent."""
    text = path.read_text(encoding="utf-8")
    try:
        lines = [line for line in text.split("\n") if line.strip()]
        rows = [json.loads(line) for line in lines] if path.suffix.lower() == ".jsonl" else json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{str(path)!r} is not valid JSON: {error}. One sample per line needs `.jsonl`.") from error
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"{str(path)!r} must hold a list of samples, each an object with its conversation.")
    samples = [to_messages(row) for row in rows]
    if any(sample["videos"] for sample in samples):
        raise ValueError(f"{str(path)!r} names videos, which are not decoded here. Pass a data set with their frames.")
    columns = {
        "messages": [sample["messages"] for sample in samples],
        "images": [[os.path.join(image_folder, image) for image in sample["images"]] for sample in samples],
    }
    features = Features({"messages": MESSAGES, "images": List(Value("string"))})
    for key in EXTRA_COLUMNS:
        if any(key in row for row in rows):
            columns[key] = [None if row.get(key) is None else str(row[key]) for row in rows]
            features[key] = Value("string")
    for key in LIST_COLUMNS:
        if any(key in row for row in rows):
            columns[key] = [None if row.get(key) is None else texts_of(row[key]) for row in rows]
            features[key] = List(Value("string"))
    return Dataset.from_dict(columns, features=features)


def texts_of(value: Any) -> list[str]:
    """One or several texts as a list; VQAv2's records of an answer are its text."""
    values = [item.get("answer") if isinstance(item, dict) else item for item in _as_list(value)]
    return [str(item) for item in values if item is not None]


def undecoded(dataset: Dataset) -> Dataset:
    """Turns decoding off, so that an unreadable image meets the collator's policy, not the loader."""
    for column, feature in dataset.features.items():
        if isinstance(feature, Image):
            dataset = dataset.cast_column(column, Image(decode=False))
        elif isinstance(feature, List) and isinstance(feature.feature, Image):
            dataset = dataset.cast_column(column, List(Image(decode=False)))
    return dataset


def _with_paths(dataset: Dataset, image_folder: str | Path | None) -> Dataset:
    texts = {name: getattr(feature, "feature", feature) for name, feature in dataset.features.items()}
    columns = [name for name in ("image", "images") if getattr(texts.get(name), "dtype", "").endswith("string")]
    if image_folder is None or not columns:
        return dataset

    def resolve(row: dict) -> dict:
        return {name: [os.path.join(image_folder, path) for path in _as_list(row[name])] for name in columns}

    return dataset.map(resolve)
