"""The answers of an evaluation on disk: appended batch by batch, a data set once all are there."""

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
    """The answers of one view of a model to one data set: `view.parquet`, and `view.jsonl` until that is written.

    `view.json` holds what the answers depend on. Answers of something else are never gone on with.

    Args:
        folder (`str` or `Path`): Where the files are; made where it does not exist.
        view (`str`): Which visual tokens the model saw; the files' name.
        identity (`dict`): All that the answers depend on, by names that the user knows. Of JSON's types alone.
        batch_size (`int`): Rows that are answered at once. Only whole batches count.
        overwrite (`bool`, *optional*, defaults to `False`): Begin anew, whatever is there.

    Raises:
        ValueError: answers of something else are there, and `overwrite` is False; the message names what differs.
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
        """The data set, once it is there."""
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
        """The answers so far, of whole batches; what an interruption left of another one is taken off the file."""
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
        """Adds the answers of one batch, so that no interruption of this process or machine loses them again."""
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
        """Writes the data set, in place of the lines."""
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
