"""Answers of an evaluation on disk: appended batch by batch, and a data set once all are there."""

from __future__ import annotations

import json
import logging
import os
from io import BytesIO
from pathlib import Path
from typing import Any

from datasets import Dataset, Features, List, Value
from pyarrow import ArrowException
from pyarrow.parquet import read_table

from ..utils.text import parse_json
from ..utils.writing import write_file, write_json
from .fingerprint import HASH, differences, hash_of

logger = logging.getLogger(__name__)

FEATURES = Features(
    {
        "index": Value("int64"),
        "id": Value("string"),
        "question": Value("string"),
        "references": List(Value("string")),
        "options": List(Value("string")),
        "prediction": Value("string"),
        "seconds": Value("float64"),
    }
)
EARLIER = "earlier"
SHOWN = 8  # changes that a warning names
REMEDY = "Begin anew with --overwrite, or name another folder with --output."


class Predictions:
    """Answers of one view of a model to one data set: in `view.jsonl` until all are there, then in `view.parquet`.

    `view.json` holds the identity of the answers. Answers of another identity are never gone on with: they are moved to
    the folder `earlier`, with a warning that names what differs, and taken up again where their identity comes back.

    Args:
        folder (`str` or `Path`): Folder of the files. It is made where it does not exist.
        view (`str`): Name of the view and of the files.
        identity (`dict`): All that the answers depend on, by names that the user knows, in types of JSON.
        batch_size (`int`): Questions per batch. Only whole batches count.
        overwrite (`bool`, *optional*, defaults to `False`): Delete what is there first.

    Raises:
        ValueError: a file is damaged.
    """

    def __init__(
        self, folder: str | Path, view: str, identity: dict[str, Any], batch_size: int, overwrite: bool = False
    ):
        self.folder, self.view, self.batch_size = Path(folder), view, batch_size
        self._settings, self._lines, self._table = _files(self.folder, view)
        self.identity = json.loads(json.dumps(identity))
        if overwrite:
            for path in (self._table, self._lines, self._settings):
                path.unlink(missing_ok=True)
        else:
            self._change()
        self.rows = self._read()

    @property
    def finished(self) -> bool:
        """Whether all answers are there."""
        return self._table.is_file()

    @property
    def path(self) -> Path:
        """The file of the data set."""
        return self._table

    def _change(self) -> None:
        """Moves answers of another identity away, and those of this one back."""
        changes = changes_of(self.folder, self.view, self.identity)
        if changes:
            set_aside(self.folder, self.view, changes)
        settings, *answers = _aside(self.folder, self.view, self.identity)
        there = self._lines.is_file() or self._table.is_file()
        if not there and _identity(settings) == self.identity:
            # What answered is known before the answers come, and as long as they are here.
            write_json(self._settings, self.identity)
            for path, home in zip(answers, (self._lines, self._table), strict=True):
                if path.is_file():
                    path.replace(home)
            settings.unlink()
            logger.warning("%s: the answers (%s) of these settings are taken up again.", self.folder, self.view)

    def _read(self) -> list[dict[str, Any]]:
        """The answers of whole batches so far. Cuts an incomplete batch off the file."""
        if self.finished:
            try:
                rows = read_table(self._table).to_pylist()
            except (ArrowException, OSError) as error:
                raise ValueError(f"{str(self._table)!r} is damaged: {error}. {REMEDY}") from None
            return _in_order(self._table, rows)
        if not self._lines.is_file():
            return []
        lines = self._lines.read_bytes().split(b"\n")[:-1]
        lines = lines[: len(lines) // self.batch_size * self.batch_size]
        rows = [_json(self._lines, line) for line in lines]
        os.truncate(self._lines, sum(len(line) + 1 for line in lines))
        return _in_order(self._lines, rows)

    def append(self, rows: list[dict[str, Any]]) -> None:
        """Adds the answers of one batch and syncs them to disk, so no interruption loses them."""
        if not self._settings.is_file():
            write_json(self._settings, self.identity)
        with self._lines.open("ab") as file:
            file.write("".join(json.dumps(row) + "\n" for row in rows).encode())
            file.flush()
            os.fsync(file.fileno())
        self.rows += rows

    def finish(self) -> None:
        """Writes the data set and deletes the lines."""
        buffer = BytesIO()
        Dataset.from_list(self.rows, features=FEATURES).to_parquet(buffer)
        write_file(self._table, buffer.getvalue())
        self._lines.unlink(missing_ok=True)

    def refer_to(self, table: list[dict[str, Any]]) -> None:
        """Puts what `table` says of each question, such as changed references, in place of what the answers say.

        Raises:
            ValueError: there are fewer or more answers than questions.
        """
        if len(table) != len(self.rows):
            counts = f"{len(self.rows)} answers to {len(table)} questions"
            raise ValueError(f"{str(self._table)!r} is damaged: it holds {counts}. {REMEDY}")
        rows = [{**row, **asked} for row, asked in zip(self.rows, table, strict=True)]
        if rows != self.rows:
            self.rows = rows
            self.finish()


def set_others_aside(folder: Path, views: list[str], source: dict[str, Any]) -> None:
    """Moves answers of views that are not asked now into `earlier` where another model gave them.

    Args:
        folder (`Path`): Folder of the answers.
        views (`list[str]`): Names of the views that are asked.
        source (`dict`): The part of the identity that all views of a model share.
    """
    there = {path.stem for ending in ("jsonl", "parquet") for path in folder.glob(f"*.{ending}")}
    for view in sorted(there - {*views}):
        changes = changes_of(folder, view, source, only=tuple(source))
        if changes:
            set_aside(folder, view, changes)


def changes_of(folder: Path, view: str, identity: dict[str, Any], only: tuple[str, ...] | None = None) -> list[str]:
    """What differs, in words, between another identity and that of the answers that lie there; with `only`, of keys."""
    settings, lines, table = _files(folder, view)
    earlier = _identity(settings)
    if earlier is None:
        there = any(path.is_file() for path in (settings, lines, table))
        return [f"{settings.name} is missing or damaged, so nobody knows what answered"] if there else []
    return differences(earlier if only is None else {key: earlier.get(key) for key in only}, identity)


def set_aside(folder: Path, view: str, changes: list[str]) -> None:
    """Moves the answers of a view into `earlier`, and says why."""
    paths = _files(folder, view)
    aside = _aside(folder, view, _identity(paths[0]) or {})
    aside[0].parent.mkdir(exist_ok=True)
    if any(path.is_file() for path in paths[1:]):
        for place in aside[1:]:
            place.unlink(missing_ok=True)
    # What answered stays until all answers are away: a kill in between takes none, and the next call goes on here.
    for path, place in list(zip(paths, aside, strict=True))[::-1]:
        if path.is_file():
            path.replace(place)
    logger.warning(
        "%s: %s starts anew, because what its answers depend on has changed: %s. The earlier ones are kept as %s.*",
        folder,
        view,
        "; ".join(changes[:SHOWN] + [f"{len(changes) - SHOWN} more"] * (len(changes) > SHOWN)),
        aside[0].with_suffix("").relative_to(folder),
    )


def _files(folder: Path, view: str) -> tuple[Path, Path, Path]:
    settings, lines, table = (folder / f"{view}.{ending}" for ending in ("json", "jsonl", "parquet"))
    return settings, lines, table


def _aside(folder: Path, view: str, identity: dict[str, Any]) -> tuple[Path, Path, Path]:
    return _files(folder / EARLIER, f"{view}-{hash_of(identity).removeprefix(HASH)[:8]}")


def _identity(settings: Path) -> dict[str, Any] | None:
    """The identity of answers; None where its file is missing or damaged."""
    try:
        found = parse_json(settings.read_bytes())
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def _json(path: Path, text: str | bytes) -> dict[str, Any]:
    try:
        found = parse_json(text)
    except ValueError as error:
        raise ValueError(f"{str(path)!r} is damaged: {error}. {REMEDY}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{str(path)!r} is damaged: {str(found)[:100]!r} is no answer. {REMEDY}")
    return found


def _in_order(path: Path, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows, if they are those of the first questions, one each."""
    if [row.get("index") for row in rows] != list(range(len(rows))):
        raise ValueError(
            f"{str(path)!r} is damaged: its rows are not those of the first {len(rows)} questions in their order. Did "
            f"two evaluations write into it at once? {REMEDY}"
        )
    return rows
