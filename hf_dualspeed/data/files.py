"""Rows of JSON, JSONL and CSV files, one after the other, as they are written: no type is guessed."""

from __future__ import annotations

import codecs
import csv
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from ..utils.text import loads
from .media import shown

ROW_FILES = (".json", ".jsonl", ".csv", ".tsv")
DELIMITERS = ",;\t"
CHUNK = 2**18
# Columns whose cells may be lists, as JSON text. A file's name may begin with a bracket, too.
LISTS = ("image", "images", "answers", "options")
BETWEEN = re.compile(r"[\s,]*")
BYTE_ORDER_MARKS = {
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}


class Written(float):
    """A number of a JSON file, whose text is the one that stands there: 1.50, 1e3."""

    def __new__(cls, text: str) -> Written:
        number = super().__new__(cls, text)
        number.text = text
        return number

    def __str__(self) -> str:
        return self.text


def rows_of(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a `.json` (a list of objects), `.jsonl`, `.csv` or `.tsv` file, in UTF-8 or UTF-16.

    A file is never in memory as a whole. Cells of a CSV file are texts, and lists where `image`, `images`,
    `answers` or `options` hold JSON; its columns are parted by commas, semicolons or tabs.

    Raises:
        ValueError: it is no regular file of these endings, is in another encoding, or no such list, or a row has too
            many or too few cells. The message names file and row.
    """
    kinds = {".json": _json_rows, ".jsonl": _jsonl_rows, ".csv": _csv_rows, ".tsv": _csv_rows}
    read = kinds.get(path.suffix.lower())
    if read is None or not path.is_file():
        raise ValueError(f"{str(path)!r} is no regular file with one of the endings {', '.join(ROW_FILES)}.")
    with open(path, "rb") as file:
        head = file.read(4)
    encoding = next((name for mark, name in BYTE_ORDER_MARKS.items() if head.startswith(mark)), None)
    if encoding is None:
        # Without a mark, every second byte of Latin letters in UTF-16 is 0.
        encoding = {(True, False): "utf-16-be", (False, True): "utf-16-le"}.get(
            (head[:1] == b"\0", head[1:2] == b"\0"), "utf-8"
        )
    try:
        with open(path, encoding=encoding, newline="") as file:
            yield from read(file, path.name)
    except RecursionError:
        raise ValueError(f"{str(path)!r} is nested too deeply. It must hold samples.") from None
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{str(path)!r} is not in UTF-8: it holds the byte {error.object[error.start]:#04x}. Save it as UTF-8, for "
            f"example with `iconv -f cp1252 -t utf-8` if it comes from Excel on Windows."
        ) from None


def _json_rows(file: TextIO, name: str) -> Iterator[dict]:
    """The objects of a list, each decoded as soon as it is read."""
    decoder, buffer, count = json.JSONDecoder(parse_float=Written), file.read(CHUNK).lstrip(), 0
    if not buffer.startswith("["):
        raise ValueError(
            f"{name!r} is not valid JSON of samples: it must hold a list of samples, each an object with its "
            f"conversation, but begins with {shown(buffer[:20])}. One sample per line needs `.jsonl`."
        )
    position = 1
    while True:
        position = BETWEEN.match(buffer, position).end()
        if buffer[position : position + 1] == "]":
            rest = buffer[position + 1 :].strip() or file.read(CHUNK).strip()
            if rest:
                raise ValueError(f"{name!r} goes on behind its list of samples, with {shown(rest[:30])}.")
            return
        try:
            row, position = decoder.raw_decode(buffer, position)
        except json.JSONDecodeError as error:
            # Read as much again as is left, so that a long object is not decoded too often.
            more = file.read(max(CHUNK, len(buffer) - position))
            if not more:
                raise ValueError(
                    f"{name!r} is not valid JSON from row {count} on: {error.msg}: "
                    f"{shown(buffer[error.pos : error.pos + 30])}. One sample per line needs `.jsonl`."
                ) from None
            buffer, position = buffer[position:] + more, 0
            continue
        yield _checked(row, name, count)
        count += 1


def _jsonl_rows(file: TextIO, name: str) -> Iterator[dict]:
    lines = (line for line in enumerate(file, 1) if line[1].strip())
    for count, (number, line) in enumerate(lines):
        try:
            row = loads(line.strip(), parse_float=Written)
        except json.JSONDecodeError as error:
            raise ValueError(f"Line {number} of {name!r} is not valid JSON: {error}.") from None
        yield _checked(row, name, count)


def _checked(row: Any, name: str, index: int) -> dict:
    if not isinstance(row, dict):
        raise ValueError(f"Row {index} of {name!r} must be an object with a conversation, got {shown(row)}.")
    return row


def _csv_rows(file: TextIO, name: str) -> Iterator[dict]:
    header = file.readline()
    file.seek(0)
    # Cells may hold whole pictures as base64.
    csv.field_size_limit(2**31 - 1)
    reader = csv.reader(file, delimiter=max(DELIMITERS, key=header.count), strict=True)
    try:
        columns = next(reader, [])
        if not columns or len(set(columns)) < len(columns):
            raise ValueError(f"The first line of {name!r} must name each column once, got {shown(columns)}.")
        for count, cells in enumerate(cells for cells in reader if cells):
            if len(cells) != len(columns):
                raise ValueError(
                    f"Row {count} of {name!r} has {len(cells)} cells, but {len(columns)} columns are named: "
                    f"{shown(cells)}. Put quotes around texts that hold the separator."
                )
            yield {column: _cell(column, cell, name, count) for column, cell in zip(columns, cells, strict=True)}
    except csv.Error as error:
        raise ValueError(f"Line {reader.line_num} of {name!r} is not valid CSV: {error}.") from None


def _cell(column: str, text: str, name: str, index: int) -> Any:
    if column not in LISTS or not text.startswith("["):
        return text
    try:
        return loads(text)
    except json.JSONDecodeError as error:
        if column == "image":
            return text
        raise ValueError(
            f"Row {index} of {name!r} has {shown(text)} under `{column}`, which is no JSON list: {error}. Write lists "
            'like ["a", "b"].'
        ) from None
