"""Data sets from files, folders and the Hub."""

from __future__ import annotations

import json
import os
from pathlib import Path

from datasets import Dataset, DatasetDict, Features, Image, List, Value, load_dataset, load_from_disk

from ..utils.validation import check_choice
from .conversations import EXTRA_COLUMNS, _as_list, texts_of, to_messages
from .easy_vqa import DATASETS, MESSAGES, load_easy_vqa

FILE_TYPES = (".json", ".jsonl", ".parquet", ".csv")

# Accepted answers, and the options of a multiple-choice question.
LIST_COLUMNS = ("answers", "options")


def load_examples(path_or_name: str, split: str = "train", image_folder: str | None = None) -> Dataset:
    """Loads conversations; images stay encoded, and [`VisionLanguageCollator`] decodes them.

    Args:
        path_or_name (`str`): A `.json` or `.jsonl` file in LLaVA's or TRL's layout, a `.parquet` or `.csv` file, a
            folder written by `save_to_disk`, `easy-vqa`, `easy-vqa-color`, or a data set on the Hub.
        split (`str`, *optional*, defaults to `"train"`): Split of a data set that has splits; a file has none.
        image_folder (`str`, *optional*): Folder that image paths start from; default: the file's own folder.
    """
    path = Path(path_or_name)
    is_file = path.suffix.lower() in FILE_TYPES
    if is_file and not path.is_file():
        raise FileNotFoundError(f"`path_or_name` names a file that does not exist: {str(path)!r}.")
    if path.suffix.lower() in (".json", ".jsonl"):
        return _load_json(path, image_folder or path.parent)
    if path_or_name in DATASETS:
        dataset = load_easy_vqa(split, DATASETS[path_or_name])
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
    """Normalises row by row, because Arrow refuses LLaVA's `image`, which may be a text, a list or absent."""
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


def undecoded(dataset: Dataset) -> Dataset:
    """Turns image decoding off: the collator, not the loader, handles unreadable images."""
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
