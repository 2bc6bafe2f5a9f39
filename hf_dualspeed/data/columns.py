"""Columns that look like pictures, by name and value: one that nobody reads would leave a model blind."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import Any
from urllib.parse import urlsplit

import numpy as np
from PIL import Image

# Columns that are read, or hold clips or conversations.
READ = ("image", "images", "video", "videos", "messages", "conversations", "prompt", "completion")
WORDS = r"(?:img|image|picture|pic|photo|screenshot)s?"
# What may stand beside such a word in a name of pictures: `img`, `image_1`, `image_path`, `Images`, `photoURL`.
PLACE = r"(?:paths?|files?|filenames?|names?|urls?|uris?|lists?|bytes|base|b|data)"
NAMED = re.compile(rf"(?:input|main|source|raw)?{WORDS}{PLACE}*")
# Names of files, which may be pictures: their values tell.
FILES = re.compile(
    r"(?:media|visual)?(?:files?|filenames?|filepaths?|paths?)|media|visuals?"
    rf"|(?:figure|fig|frame|thumbnail|snapshot|chart|diagram|scan|view|jpe?g|png|webp)s?{PLACE}*"
)
# Columns that are texts, or name the sample: "007.jpg" may be an id, or an answer.
TEXTS = ("id", "question", "answer", "answers", "options", "tools", "system")
# What the bytes of a picture's file begin with, whatever the column's name.
MAGIC = re.compile(rb"\x89PNG|\xff\xd8\xff|GIF8|II\*\0|MM\0\*|RIFF....WEBP", re.DOTALL)
ENDINGS = (".jpg", ".jpeg", ".jfif", ".png", ".gif", ".webp", ".bmp", ".tif", ".tiff", ".avif", ".heic", ".jp2", ".ppm")


def filled(value: Any) -> bool:
    """Whether a cell holds something: not None, no empty text and no empty list. A file of no bytes is something."""
    if hasattr(value, "ndim"):  # an array or a tensor
        return 0 not in value.shape
    return value is not None and not (isinstance(value, (str, list, tuple, dict)) and not len(value))


def unread_picture(row: Mapping[str, Any], blind: bool) -> str | None:
    """The first column of a row that holds a picture by name and value, but is not read.

    Args:
        row (`Mapping`): A sample, pictures decoded or not.
        blind (`bool`): Whether nothing of the row is read as a picture. If not, only numbered columns count:
            `image_path` beside `image` is the same picture, `image_2` is another one.
    """
    for column, value in row.items():
        if column in (*READ, *TEXTS) or not filled(value):
            continue
        named, about = kind_of_name(column)
        numbered = named and any(letter.isdigit() for letter in column)
        if (blind or numbered) and _looks_unread(value, named, about):
            return column
    return None


def _looks_unread(value: Any, named: bool, about: bool) -> bool:
    if isinstance(value, (list, tuple)):
        return any(_looks_unread(item, named, about) for item in value)
    return _is_file(value) or ((named or about) and _is_picture(value, by_name=named))


def _is_file(value: Any) -> bool:
    """Whether a value shows by itself that it is a picture, decoded or encoded. A path may be a note of its source."""
    if isinstance(value, Mapping):
        return set(value) == {"bytes", "path"} and any(map(_is_file, value.values()))
    if isinstance(value, str):
        return value.startswith("data:image")
    return isinstance(value, Image.Image) or (isinstance(value, bytes) and MAGIC.match(value) is not None)


def _is_picture(value: Any, by_name: bool) -> bool:
    """Whether a value is a picture, or the path of one; `by_name`, any text counts as a path."""
    if isinstance(value, (list, tuple)):
        return any(_is_picture(item, by_name) for item in value)
    if isinstance(value, Mapping):
        return any(_is_picture(value.get(key), by_name) for key in ("bytes", "path", "url"))
    if isinstance(value, (str, os.PathLike)):
        text = str(value).strip()
        ending = urlsplit(text).path if "://" in text else text
        return bool(text) and (by_name or text.startswith("data:image") or ending.lower().endswith(ENDINGS))
    return isinstance(value, (Image.Image, bytes)) or (by_name and isinstance(value, np.ndarray))


@lru_cache(maxsize=4096)
def kind_of_name(column: str) -> tuple[bool, bool]:
    """Whether a column's name says that it holds pictures, and whether its values have to tell."""
    # "imagePath" and "image-path-1" as "image_path".
    words = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", str(column)).lower()
    words = [word for word in re.split(r"[^a-z]+", words) if word]
    whole = "".join(words)
    about = FILES.fullmatch(whole) or any(re.fullmatch(WORDS, word) for word in words)
    return bool(NAMED.fullmatch(whole)), bool(about)


def suspects(columns: Iterable[str]) -> list[str]:
    """The columns that are not read though their names allow pictures in them."""
    return [column for column in columns if column not in READ and any(kind_of_name(column))]
