"""Writes files whole: an interruption, a kill or a full disk leaves the earlier file as it was."""

from __future__ import annotations

import glob
import json
import os
import re
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import BinaryIO

from .constants import UNFINISHED_NAME

# Seconds without a change after which a part counts as left behind, if its process is gone.
ABANDONED = 24 * 3600


def write_file(path: str | Path, data: bytes | str) -> Path:
    """Puts bytes, or text in UTF-8 with its line breaks as they are, in place of a file; its folder is made if needed.

    The data go to `_NAME.PID.part` beside it, which takes the file's place once it is on the disk. Parts that killed
    processes left a day ago are deleted. A link stays, and the file behind it is replaced. Access rights stay.

    Raises:
        OSError: the disk is full, the file is protected from writing, or `path` is no regular file.
    """
    path = Path(path).resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists() and not path.is_file():
        raise OSError(f"{str(path)!r} is no regular file. Name another one.")
    if path.exists() and not os.access(path, os.W_OK):
        raise PermissionError(f"{str(path)!r} is protected from writing. Name another file, or allow writing to it.")
    with _aside(path) as file:
        file.write(data.encode("utf-8") if isinstance(data, str) else data)
    return path


def copy_file(source: str | Path, path: str | Path) -> Path:
    """Copies a file in the same way, and follows no link: one at `path` is replaced by the copy.

    Raises:
        OSError: the disk is full, or `source` is a link or no regular file.
    """
    source, path = Path(source), Path(path)
    if source.is_symlink() or not source.is_file():
        raise OSError(f"{str(source)!r} is a link or no regular file, and is not copied. Put the file itself there.")
    path.parent.mkdir(parents=True, exist_ok=True)
    with source.open("rb") as read, _aside(path) as file:
        shutil.copyfileobj(read, file, 2**22)
    return path


@contextmanager
def _aside(path: Path) -> Iterator[BinaryIO]:
    """A file beside `path` that takes its place and its access rights once the body is done and all is on the disk."""
    part = path.with_name(f"_{path.name}.{os.getpid()}.part")
    clear_abandoned(path)
    try:
        with part.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        if path.is_file() and not path.is_symlink():
            shutil.copymode(path, part)
        part.replace(path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def clear_abandoned(path: Path) -> None:
    """Deletes parts of a file or folder, `_NAME.PID.part` or `_NAME.PID.*.part`, that killed processes have left.

    Only those that nothing was written to for a day, and whose process does not run here: others may be written at this
    moment, in a shared folder also by another machine.
    """
    for part in path.parent.glob(f"_{glob.escape(path.name)}.*.part"):
        writer = re.fullmatch(r"\.(\d+)(\.\w+)?\.part", part.name.removeprefix(f"_{path.name}"))
        try:
            if writer is None or time.time() - part.stat().st_mtime < ABANDONED or runs(int(writer[1])):
                continue
            if part.is_dir():
                shutil.rmtree(part)
            else:
                part.unlink()
        except OSError:  # another process has deleted it, or it belongs to somebody else
            continue


def runs(process: int) -> bool:
    """Whether this machine has a process of that number, as far as the system tells without disturbing it."""
    if os.name != "posix":
        return False
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # somebody else's
        pass
    return True


def check_new_folder(name: str, folder: str | Path) -> None:
    """Raises a `ValueError` that names an argument unless its folder is empty, or can be made: it may hold a model."""
    folder = Path(folder)
    if "\0" in str(folder):
        raise ValueError(f"`{name}` is {str(folder)!r}, which is no name of a folder. Name a new folder.")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"`{name}` is {str(folder)!r}, which is not empty. Name a new folder, or delete this one.")
    above = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
        raise ValueError(f"`{name}` is {str(folder)!r}, but nothing can be written into {str(above)!r}. Name another.")


@contextmanager
def new_folder(folder: str | Path) -> Iterator[Path]:
    """A folder aside whose files become those of a new or empty one once the body is done and all is on the disk."""
    folder = Path(folder)
    there = folder.is_dir()  # it may be a mount, or where the user's shell is
    folder.parent.mkdir(parents=True, exist_ok=True)
    clear_abandoned(folder)
    name = folder.resolve().name
    place = {"prefix": f"_{name}.{os.getpid()}.", "suffix": ".part", "dir": folder if there else folder.parent}
    with TemporaryDirectory(**place) as aside:
        part = Path(aside) / name
        part.mkdir()
        yield part
        if there:
            take_place(part, folder, stale="")
        else:
            sync_files(part)
            part.replace(folder)


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Lets processes that change what a folder's files hold wait for each other, where the system can."""
    if os.name != "posix":
        yield
        return
    import fcntl

    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # some network file systems cannot
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def write_json(path: str | Path, value: object) -> Path:
    """Writes a JSON file by [`write_file`]."""
    return write_file(path, json.dumps(value, indent=2) + "\n")


def take_place(aside: Path, folder: Path, stale: str) -> None:
    """Moves all files of a folder into another, where they replace those of their names, and deletes the first.

    Files beside them whose name matches `stale` and that have no successor are deleted. `UNFINISHED_NAME` lies there
    from the first change to the last. Without any file to move, nothing changes.

    Args:
        aside (`Path`): A folder on the same disk.
        folder (`Path`): The folder whose files are replaced.
        stale (`str`): A regular expression of a whole name.
    """
    names = [path.relative_to(aside) for path in sorted(aside.rglob("*")) if path.is_file()]
    if not names:
        shutil.rmtree(aside, ignore_errors=True)
        return
    sync_files(aside)
    write_file(folder / UNFINISHED_NAME, "")
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (aside / name).replace(folder / name)
    for path in folder.iterdir():
        if re.fullmatch(stale, path.name) and Path(path.name) not in names:
            path.unlink()
    for part in {folder / name.parent for name in names}:
        sync_folder(part)
    (folder / UNFINISHED_NAME).unlink()
    shutil.rmtree(aside)


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
