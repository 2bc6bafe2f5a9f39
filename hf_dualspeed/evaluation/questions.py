"""The questions of an evaluation, all checked before the model answers the first one."""

from __future__ import annotations

import hashlib
import io
import json
import os
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset
from PIL import Image

from ..data.conversations import sample_name, texts_of
from ..data.loading import FILE_TYPES, load_examples
from ..data.media import IMAGE_ERRORS, source_of
from .generation import first_rows, question_and_answers


@dataclass(frozen=True)
class Questions:
    """Questions and right answers.

    Args:
        dataset (`datasets.Dataset`): The rows to answer.
        table (`list[dict]`): The `index`, `id`, `question`, `references` and `options` of each row.
        fingerprint (`str`): A hash of questions, images and right answers.
        name (`str`): The data set's name, without the folders above it.
        split (`str`, *optional*): None where the data set has no splits.
    """

    dataset: Dataset
    table: list[dict[str, Any]]
    fingerprint: str
    name: str
    split: str | None


def load_questions(name: str, split: str, image_folder: str | None = None, limit: int | None = None) -> Questions:
    """Loads a data set for evaluation, as [`load_examples`] does, and checks every row.

    Args:
        name (`str`): The data set, as for [`load_examples`].
        split (`str`): Split of a data set that has splits.
        image_folder (`str`, *optional*): Folder that relative image paths start from.
        limit (`int`, *optional*): Number of rows, from the first on.

    Raises:
        ValueError: a row has no question or no right answer, or an image is missing or unreadable. The message names
            the row.
    """
    dataset = first_rows(load_examples(name, split=split, image_folder=image_folder), limit)
    table, digest = [], hashlib.sha256()
    for index, row in enumerate(dataset):
        try:
            sample, right = question_and_answers(row)
            marks = [_image_mark(image) for image in sample["images"]]
        except (*IMAGE_ERRORS, TypeError) as error:
            columns = ", ".join(dataset.column_names)
            raise ValueError(f"Row {index} of {name!r} (columns: {columns}) cannot be evaluated: {error}") from error
        options = None if row.get("options") is None else texts_of(row["options"])
        digest.update(json.dumps([sample["messages"], right, options, marks]).encode())
        table.append(_entry(index, row, sample["messages"], right, options))
    path = Path(name)
    splits = path.suffix.lower() not in FILE_TYPES and not (path / "state.json").is_file()
    label = path.resolve().name if path.exists() else name
    return Questions(dataset, table, digest.hexdigest()[:16], label, split if splits else None)


def _entry(index: int, row: dict, messages: list[dict], right: list[str], options: list[str] | None) -> dict[str, Any]:
    asked = row.get("question") or " ".join(part["text"] for part in messages[-1]["content"] if part.get("text"))
    name = None if row.get("id") is None else str(row["id"])
    return {"index": index, "id": name, "question": asked, "references": right, "options": options}


def _image_mark(image: Any) -> list:
    """Name, size and length or checksum of an image. A file is not decoded: only its header is read.

    Raises:
        OSError, ValueError: the image is missing, or is none.
    """
    image = source_of(image)
    if isinstance(image, Image.Image):
        return [image.size, zlib.crc32(image.tobytes())]
    if isinstance(image, io.BytesIO):
        with Image.open(image) as opened:
            return [opened.size, zlib.crc32(image.getvalue())]
    with Image.open(image) as opened:
        return [os.path.basename(image), opened.size, os.path.getsize(image)]


def check_options(questions: Questions, metric: str) -> None:
    """Raises a `ValueError` where a row lacks the options that `metric` needs."""
    for entry in questions.table:
        if not entry["options"]:
            raise ValueError(
                f"`metric` {metric!r} needs the options of each question, in a column `options` (a list of texts), but "
                f"row {entry['index']} of {questions.name!r} ({sample_name(entry)}) has none."
            )
