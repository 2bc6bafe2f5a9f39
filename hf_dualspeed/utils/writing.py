"""Writes files whole: an interruption, a kill or a full disk leaves the earlier file as it was."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path


def write_file(path: str | Path, data: bytes | str) -> Path:
    """Puts bytes, or text in UTF-8 with its line breaks as they are, in place of a file; its folder is made if needed.

    The data go to `_NAME.PID.part` beside it, which takes the file's place once it is on the disk. A link stays, and
    the file behind it is replaced. Access rights stay.

    Raises:
        OSError: the disk is full, the file is protected from writing, or `path` is no regular file.
    """
    path = Path(path).resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    there = path.exists()
    if there and not path.is_file():
        raise OSError(f"{str(path)!r} is no regular file. Name another one.")
    if there and not os.access(path, os.W_OK):
        raise PermissionError(f"{str(path)!r} is protected from writing. Name another file, or allow writing to it.")
    part = path.with_name(f"_{path.name}.{os.getpid()}.part")
    try:
        with part.open("wb") as file:
            file.write(data.encode("utf-8") if isinstance(data, str) else data)
            file.flush()
            os.fsync(file.fileno())
        if there:
            shutil.copymode(path, part)
        part.replace(path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)
    return path


def write_json(path: str | Path, value: object) -> Path:
    """Writes a JSON file by [`write_file`]."""
    return write_file(path, json.dumps(value, indent=2) + "\n")


def sync_files(folder: Path) -> None:
    """Brings all files in a folder and its subfolders to the disk."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Brings the names in a folder to the disk, where the system can."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        except OSError:  # some network file systems cannot
            pass
        finally:
            os.close(descriptor)
