"""Brings data sets in other layouts into a table of questions: JSONL with `id`, `image`, `question` and `answers`."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from PIL import Image

from ..utils.text import parse_json
from ..utils.validation import check_choice
from ..utils.writing import write_file
from .files import rows_of
from .media import RASTERS, shown

Row = dict[str, Any]
CAPTION_FILES = (".txt", ".caption")
# Of the missing pictures, so many are named.
NAMED = 3


def csv_table(source: Path, columns: tuple[str, str, str], question: str | None) -> Iterator[Row]:
    """A CSV, TSV, JSON or JSONL file with a picture, a question and an answer in each row, under any names.

    With `question`, every row gets this one, and the column of questions is not read.
    """
    image, asked, answer = columns
    for number, row in enumerate(rows_of(source)):
        needed = [image, answer] + [asked] * (question is None)
        missing = [column for column in needed if row.get(column) in (None, "")]
        if missing:
            raise ValueError(
                f"Row {number} of {source.name!r} has nothing in {missing}; its columns are {sorted(row)}. Name the "
                "columns by --columns IMAGE QUESTION ANSWER, or give one --question for all rows."
            )
        asks = row[asked] if question is None else question
        picture = row[image][0] if isinstance(row[image], list) and len(row[image]) == 1 else row[image]
        yield {"image": picture, "question": asks, "answers": _listed(row[answer])}


def coco_captions(source: Path, question: str) -> Iterator[Row]:
    """COCO's captions (`images` with `file_name`, `annotations` with `caption`): a row for each caption."""
    names = _by(source, "images", "id", ("file_name",))
    for found in _part(source, "annotations", ("image_id", "caption")):
        if found["image_id"] not in names:
            raise ValueError(
                f"{source.name!r} has a caption of image {found['image_id']}, which `images` does not name."
            )
        caption = str(found["caption"]).strip()
        yield {"image": names[found["image_id"]]["file_name"], "question": question, "answers": [caption]}


def vqa(source: Path, annotations: Path | None, image_name: str) -> Iterator[Row]:
    """VQAv2's questions (`question_id`, `image_id`, `question`) with its annotations, all of whose answers are kept."""
    known = {}
    if annotations is not None:
        for number, found in _by(annotations, "annotations", "question_id").items():
            given = found.get("answers") or found.get("multiple_choice_answer")
            known[number] = [one.get("answer") if isinstance(one, dict) else one for one in _listed(given)]
    for asked in _part(source, "questions", ("question_id", "image_id", "question")):
        number = asked["question_id"]
        if annotations is not None and not known.get(number):
            raise ValueError(f"{annotations.name!r} has no answer to question {number} of {source.name!r}.")
        try:
            image = image_name.format(image_id=asked["image_id"])
        except (ValueError, LookupError, TypeError, AttributeError, MemoryError, OverflowError) as error:
            raise ValueError(
                f"--image_name {image_name!r} does not fit image_id {asked['image_id']!r}: {error}. Write it like "
                "COCO_train2014_{image_id:012d}.jpg."
            ) from None
        row = {"id": str(number), "image": image, "question": asked["question"]}
        yield {**row, "answers": known[number]} if known else row


def folder(source: Path, question: str) -> Iterator[Row]:
    """A folder of pictures, each with a text of the same name beside it, or in a subfolder called as its answer.

    A subfolder that has a text beside one of its pictures has one beside each. Hidden files and folders do not count.
    """
    known = {ending for ending, kind in Image.registered_extensions().items() if kind in RASTERS}
    paths = sorted(path for path in source.rglob("*") if path.is_file())
    paths = [path for path in paths if not any(part.startswith(".") for part in path.relative_to(source).parts)]
    pictures = [path for path in paths if path.suffix.lower() in known]
    texts = {path.with_suffix(""): path for end in CAPTION_FILES[::-1] for path in paths if path.suffix.lower() == end}
    described = {path.parent for path in pictures if path.with_suffix("") in texts}
    for path in pictures:
        beside = texts.get(path.with_suffix(""))
        if beside is None and path.parent in {source, *described}:
            raise ValueError(
                f"{str(path)!r} has no text: put a file {path.stem}.txt beside it, or sort the pictures into folders "
                "that are called as the answers."
            )
        try:
            answer = path.parent.name if beside is None else beside.read_text(encoding="utf-8").strip()
        except UnicodeDecodeError as error:
            raise ValueError(f"{str(beside)!r} is no text in UTF-8: {error}. Save it as UTF-8.") from None
        yield {"image": str(path.relative_to(source)), "question": question, "answers": [answer]}


# What each layout is made by, from the words of the command.
LAYOUTS: dict[str, Callable[[Any], Iterator[Row]]] = {
    "table": lambda words: csv_table(words.source, tuple(words.columns), words.question),
    "coco": lambda words: coco_captions(words.source, _asked(words, "Describe the picture.")),
    "vqa": lambda words: vqa(words.source, words.annotations, words.image_name),
    "folder": lambda words: folder(words.source, _asked(words, "What is in the picture?")),
}
# The options that each layout reads.
OPTIONS = {
    "table": ("columns", "question"),
    "coco": ("question",),
    "vqa": ("annotations", "image_name"),
    "folder": ("question",),
}


def convert(layout: str, words: Any, output: str | Path, image_folder: str | Path) -> int:
    """Writes the rows of a source as JSONL, whose paths of pictures begin at its own folder; returns their number.

    Args:
        layout (`str`): A key of [`LAYOUTS`].
        words: What the layout needs: `source`, and of `columns`, `question`, `annotations` and `image_name`.
        output (`str` or `Path`): The `.jsonl` file to write, which must not exist.
        image_folder (`str` or `Path`): Where the source's paths of pictures begin.

    Raises:
        ValueError: a row lacks something, a question or an answer is empty or no text, pictures are missing, or there
            are no rows; the message names file, row and remedy.
        FileExistsError: `output` exists.
    """
    check_choice("layout", layout, list(LAYOUTS))
    output, missing, lines = Path(output), [], []
    if output.suffix.lower() != ".jsonl":
        raise ValueError(f"`output` must be a .jsonl file, got {str(output)!r}.")
    if output.exists():
        raise FileExistsError(f"{str(output)!r} is there already. Name another file, or delete this one.")
    for number, row in enumerate(LAYOUTS[layout](words)):
        wrong = _wrong(row)
        if wrong:
            raise ValueError(f"Row {number} of {str(words.source)!r} has {wrong}: {shown(row)}.")
        if "answers" in row:
            row["answers"] = [str(answer) for answer in row["answers"]]
        path = Path(image_folder) / str(row["image"])
        if not path.is_file():
            missing.append(str(path))
        place = os.path.relpath(path, output.parent)
        if place.startswith(os.pardir):  # which leads up from where a link points to
            place = os.path.relpath(os.path.realpath(path), os.path.realpath(output.parent))
        lines.append(json.dumps({"id": str(number), **row, "image": place}, ensure_ascii=False))
    if missing:
        raise ValueError(
            f"{len(missing)} of {len(lines)} pictures are not there: {', '.join(missing[:NAMED])}"
            f"{', ...' * (len(missing) > NAMED)}. Paths begin at --image_folder {str(image_folder)!r}."
        )
    if not lines:
        raise ValueError(f"{str(words.source)!r} holds nothing of the layout {layout!r}.")
    write_file(output, "\n".join(lines) + "\n")
    return len(lines)


def _asked(words: Any, default: str) -> str:
    return default if words.question is None else words.question


def _wrong(row: Row) -> str:
    """What of a row is no picture's path, question or answer, in words; "" if nothing is."""
    answers = row.get("answers", ["none is needed"])
    said = {
        "no path of a picture": _is_word(row["image"]),
        "an empty question, or one that is no text": isinstance(row["question"], str) and _is_word(row["question"]),
        "an empty answer, or one that is neither text nor number": answers and all(map(_is_word, answers)),
    }
    return next((what for what, fits in said.items() if not fits), "")


def _is_word(value: Any) -> bool:
    """Whether a value is a text with something in it, or a finite number."""
    if isinstance(value, str):
        return bool(value.strip())
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _listed(value: Any) -> list:
    return value if isinstance(value, list) else [value]


def _by(path: Path, key: str, name: str, needed: tuple[str, ...] = ()) -> dict[Any, dict]:
    """The records of [`_part`] by their value under `name`, which each has for itself."""
    records: dict[Any, dict] = {}
    for record in _part(path, key, (name, *needed)):
        if records.setdefault(record[name], record) is not record:
            raise ValueError(f"{path.name!r} has two records of `{name}` {record[name]!r} under {key!r}. Keep one.")
    return records


def _part(path: Path, key: str, needed: tuple[str, ...]) -> list[dict]:
    """The list of records under `key` of a JSON file, each of which has a word or number under the keys `needed`."""
    if not path.is_file():
        raise ValueError(f"{str(path)!r} is no regular file. Give a JSON file.")
    try:
        whole = parse_json(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{str(path)!r} is not valid JSON: {error}.") from None
    records = whole.get(key) if isinstance(whole, dict) else None
    if not isinstance(records, list):
        raise ValueError(f"{str(path)!r} must be an object with a list under {key!r}. Is this another layout?")
    for number, record in enumerate(records):
        absent = [name for name in needed if not isinstance(record, dict) or not _is_word(record.get(name))]
        if absent:
            raise ValueError(f"Record {number} of {key!r} in {path.name!r} lacks {absent}: {shown(record)}.")
    return records
