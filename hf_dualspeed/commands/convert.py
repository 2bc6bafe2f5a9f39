"""`dualspeed convert`: brings data in other layouts into a file that `dualspeed train` and `evaluate` read."""

from __future__ import annotations

import shlex
from pathlib import Path

from rich.console import Console

from ..data.convert import LAYOUTS, OPTIONS, convert
from ..utils.progress import Work
from ..utils.validation import Parser

COLUMNS = ("image", "question", "answer")


def main(argv: list[str]) -> None:
    """Converts, and prints how the file is used.

    Args:
        argv (`list[str]`): The words after `dualspeed convert`.
    """
    parser = Parser(
        prog="dualspeed convert",
        description="Writes questions about pictures as JSONL: from a table, COCO's captions, VQAv2, or a folder.",
        epilog="docs/data.md has a row of each layout. Files of conversations need no conversion.",
    )
    parser.add_argument("layout", choices=list(LAYOUTS), help="how the source is written")
    parser.add_argument("source", type=Path, help="a .csv, .tsv, .json or .jsonl file, or a folder")
    parser.add_argument("output", type=Path, help="the .jsonl file to write; it must not exist")
    where = "where paths of pictures begin (default: the source's folder)"
    parser.add_argument("--image_folder", type=Path, help=where)
    names = {"nargs": 3, "default": COLUMNS, "metavar": tuple(map(str.upper, COLUMNS))}
    parser.add_argument("--columns", help="table: its columns (default: image question answer)", **names)
    parser.add_argument("--question", help="table, coco, folder: one question for all pictures")
    parser.add_argument("--annotations", type=Path, help="vqa: the file of answers; without it, rows have none")
    name = "vqa: a picture's name (default: %(default)s)"
    parser.add_argument("--image_name", default="COCO_train2014_{image_id:012d}.jpg", help=name)
    words = parser.parse_args(argv)
    others = {name for names in OPTIONS.values() for name in names}.difference(OPTIONS[words.layout])
    for name in sorted(others):
        if getattr(words, name) != parser.get_default(name):
            raise ValueError(f"`{name}` is given, but the layout {words.layout!r} does not read it. Leave it out.")
    for path in filter(None, (words.source, words.annotations)):
        if not path.exists():
            raise FileNotFoundError(f"There is no file or folder {str(path)!r}.")
    if words.source.is_dir() != (words.layout == "folder"):
        kind = "folder" if words.layout == "folder" else "file"
        raise ValueError(f"`source` is {str(words.source)!r}, but the layout {words.layout!r} is read from a {kind}.")
    start = words.image_folder or (words.source if words.source.is_dir() else words.source.parent)
    console = Console(soft_wrap=True, highlight=False, markup=False)
    with Work(f"Reading {words.source}"):
        count = convert(words.layout, words, words.output, start)
    console.print(f"{count:,} questions: {words.output}")
    console.print(f"Next: dualspeed train --config ... --dataset {shlex.quote(str(words.output))}")
