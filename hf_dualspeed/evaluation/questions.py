"""The questions of an evaluation, all checked before the model answers the first one."""

from __future__ import annotations

import io
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from PIL import Image
from transformers import ProcessorMixin

from ..data.conversations import given_texts, sample_name
from ..data.files import rows_of
from ..data.loading import FILE_TYPES, ROW_FILES, load_examples
from ..data.media import IMAGE_ERRORS, open_image, open_video, source_of
from ..utils.progress import Work
from ..utils.validation import checked
from .fingerprint import hash_of
from .generation import first_rows, prompt_text, question_and_answers

logger = logging.getLogger(__name__)

# Columns of what is right, which are read from the rows of a file: `load_examples` makes texts of all that they hold.
RIGHT = ("answer", "answers", "options")


@dataclass(frozen=True)
class Questions:
    """Questions and right answers.

    Args:
        dataset (`datasets.Dataset`): The rows to answer.
        table (`list[dict]`): The `index`, `id`, `question`, `references` and `options` of each row.
        asked (`dict[str, str]`): Hashes of what the model is asked: of `questions`, and of `pictures` (and clips), both
            in the order of the rows.
        name (`str`): The data set's name, without the folders above it.
        split (`str`, *optional*): None where the data set has no splits.
        part (`str`, *optional*): Which rows of the data set these are, such as "first 200"; None where they are all.
    """

    dataset: Dataset
    table: list[dict[str, Any]]
    asked: dict[str, str]
    name: str
    split: str | None
    part: str | None = None

    @property
    def fingerprint(self) -> str:
        """A hash of questions, pictures and right answers."""
        right = [[row["references"], row["options"]] for row in self.table]
        return hash_of([self.asked, right])


@checked
def load_questions(
    name: str,
    split: str,
    image_folder: str | None = None,
    limit: int | None = None,
    image_column: str | Sequence[str] | None = None,
    processor: ProcessorMixin | None = None,
) -> Questions:
    """Loads a data set for evaluation, as [`load_examples`] does, and checks every row as the run will read it.

    Args:
        name (`str`): The data set, as for [`load_examples`].
        split (`str`): Split of a data set that has splits.
        image_folder (`str`, *optional*): Folder that relative image paths start from.
        limit (`int`, *optional*): Number of rows, from the first on.
        image_column (`str` or `list[str]`, *optional*): Columns of pictures, as for [`load_examples`].
        processor (`ProcessorMixin`, *optional*): Renders the prompts. With it, they are checked too.

    Raises:
        ValueError: a row has no question or no right answer, an image is missing or unreadable, or a column of pictures
            is not read. The message names the row.
    """
    whole = load_examples(name, split=split, image_folder=image_folder, image_column=image_column)
    dataset = first_rows(whole, limit)
    table, messages, media, opened = [], [], [], set()
    with Work("checking the questions", len(dataset)) as work:
        for index, row in enumerate(_rows(dataset, Path(name))):
            try:
                sample, right = question_and_answers(row)
                if processor is not None:
                    prompt_text(processor, sample, sample_name(row))
                media.append(_media_hashes(sample, opened))
                table.append(_entry(index, row, sample["messages"], right))
            except (*IMAGE_ERRORS, TypeError) as error:
                where = f"Row {index} of {name!r} (columns: {', '.join(dataset.column_names)})"
                raise ValueError(f"{where} cannot be evaluated: {error}") from error
            said, tools = sample["messages"], sample["tools"]
            messages.append(hash_of([said, tools] if tools else said))
            work.advance()
    if not any(media) and image_column != []:
        logger.warning("No question of %r has a picture: all are asked of text alone.", name)
    part = f"first {len(dataset)}" if len(dataset) < len(whole) else None
    asked = {"questions": hash_of(messages), "pictures": hash_of(media)}
    return Questions(dataset, table, asked, *label(name, split), part)


def label(name: str, split: str) -> tuple[str, str | None]:
    """A data set's name without the folders above it, and its split, if it has splits."""
    path = Path(name)
    splits = path.suffix.lower() not in FILE_TYPES and not (path / "state.json").is_file()
    return path.resolve().name if path.exists() else name, split if splits else None


def _rows(dataset: Dataset, path: Path) -> Iterator[dict[str, Any]]:
    """The rows, with what is right as a file has it."""
    written = rows_of(path) if path.suffix.lower() in ROW_FILES else repeat({})
    for row, raw in zip(dataset, written, strict=False):
        yield row | {key: raw[key] for key in RIGHT if key in raw}


def _entry(index: int, row: dict, messages: list[dict], right: list[str]) -> dict[str, Any]:
    asked = row.get("question") or " ".join(part["text"] for part in messages[-1]["content"] if part.get("text"))
    name = None if row.get("id") is None else str(row["id"])
    options = given_texts(row.get("options"), "options") or None
    return {"index": index, "id": name, "question": asked, "references": right, "options": options}


def _media_hashes(sample: dict[str, list], opened: set[str]) -> list[str]:
    """Hashes of a sample's pictures and clips. Those that are not in `opened` yet are opened, as for a prompt.

    Raises:
        OSError, ValueError, ...: see [`open_image`].
    """
    clips = [_pixel_hash(open_video(clip)) for clip in sample["videos"]]
    return [_picture_hash(image, opened) for image in sample["images"]] + clips


def _picture_hash(image: Any, opened: set[str]) -> str:
    """A hash of a picture's file, or of its pixels."""
    source = source_of(image)
    if isinstance(source, Image.Image):
        return _pixel_hash(np.asarray(open_image(source)))
    found = hash_of(source.getvalue() if isinstance(source, io.BytesIO) else Path(source).read_bytes())
    if found not in opened:
        open_image(image)
        opened.add(found)
    return found


def _pixel_hash(pixels: np.ndarray) -> str:
    return hash_of([pixels.shape, hash_of(pixels.tobytes())])


def check_options(questions: Questions, metric: str) -> None:
    """Raises a `ValueError` where a row lacks the options that `metric` needs."""
    for entry in questions.table:
        if not entry["options"]:
            raise ValueError(
                f"`metric` {metric!r} needs the options of each question, in a column `options` (a list of texts), but "
                f"row {entry['index']} of {questions.name!r} ({sample_name(entry)}) has none."
            )
