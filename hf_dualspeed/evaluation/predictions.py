"""Answers of an evaluation on disk: appended batch by batch, and a data set once all are there."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from datasets import Dataset, Features, List, Value
from pyarrow.parquet import read_table

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


class Predictions:
    """Answers of one view of a model to one data set: in `view.jsonl` until all are there, then in `view.parquet`.

    `view.json` holds the identity of the answers. Answers of another identity are never continued.

    Args:
        folder (`str` or `Path`): Folder of the files. It is made where it does not exist.
        view (`str`): Name of the view and of the files.
        identity (`dict`): All that the answers depend on, by names that the user knows, in types of JSON.
        batch_size (`int`): Questions per batch. Only whole batches count.
        overwrite (`bool`, *optional*, defaults to `False`): Delete what is there first.

    Raises:
        ValueError: answers of another identity are there and `overwrite` is False. The message names what differs.
    """

    def __init__(
        self, folder: str | Path, view: str, identity: dict[str, Any], batch_size: int, overwrite: bool = False
    ):
        self.folder, self.view, self.batch_size = Path(folder), view, batch_size
        self._settings, self._lines, self._table = (
            self.folder / f"{view}.{ending}" for ending in ("json", "jsonl", "parquet")
        )
        self.identity = json.loads(json.dumps(identity))
        if overwrite:
            for path in (self._table, self._lines, self._settings):
                path.unlink(missing_ok=True)
        self._check_identity()
        self.rows = self._read()

    @property
    def finished(self) -> bool:
        """Whether all answers are there."""
        return self._table.is_file()

    @property
    def path(self) -> Path:
        """The file of the data set."""
        return self._table

    def _check_identity(self) -> None:
        if not self._settings.is_file():
            if self._lines.is_file() or self._table.is_file():
                raise ValueError(f"{str(self._settings)!r} is missing: nobody knows what answered there. {REMEDY}")
            return
        earlier = _json(self._settings, self._settings.read_text(encoding="utf-8"))
        keys = [key for key in {**earlier, **self.identity} if earlier.get(key) != self.identity.get(key)]
        if keys:
            changes = "; ".join(f"{key} was {earlier.get(key)!r}, is {self.identity.get(key)!r}" for key in keys)
            raise ValueError(f"{str(self.folder)!r} holds answers ({self.view}) of something else: {changes}. {REMEDY}")

    def _read(self) -> list[dict[str, Any]]:
        """The answers of whole batches so far. Cuts an incomplete batch off the file."""
        if self.finished:
            return read_table(self._table).to_pylist()
        if not self._lines.is_file():
            return []
        lines = self._lines.read_bytes().split(b"\n")[:-1]
        lines = lines[: len(lines) // self.batch_size * self.batch_size]
        rows = [_json(self._lines, line) for line in lines]
        os.truncate(self._lines, sum(len(line) + 1 for line in lines))
        return rows

    def append(self, rows: list[dict[str, Any]]) -> None:
        """Adds the answers of one batch and syncs them to disk, so no interruption loses them."""
        if not self._settings.is_file():
            self.folder.mkdir(parents=True, exist_ok=True)
            part = self._settings.with_suffix(".json.part")
            part.write_text(json.dumps(self.identity, indent=2) + "\n", encoding="utf-8")
            part.replace(self._settings)
        with self._lines.open("ab") as file:
            file.write("".join(json.dumps(row) + "\n" for row in rows).encode())
            file.flush()
            os.fsync(file.fileno())
        self.rows += rows

    def finish(self) -> None:
        """Writes the data set and deletes the lines."""
        part = self._table.with_suffix(".parquet.part")
        Dataset.from_list(self.rows, features=FEATURES).to_parquet(part)
        part.replace(self._table)
        self._lines.unlink(missing_ok=True)


REMEDY = "Begin anew with --overwrite, or name another folder with --output."


def _json(path: Path, text: str | bytes) -> dict[str, Any]:
    try:
        return json.loads(text)
    except ValueError as error:
        raise ValueError(f"{str(path)!r} is damaged: {error}. {REMEDY}") from None
