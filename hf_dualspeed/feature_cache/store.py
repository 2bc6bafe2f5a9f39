"""Features of the vision tower on disk.

Nothing here waits for a device. Keys are hashed and files are read while a batch is collated, in a data loader's
workers if there are any.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import torch
from huggingface_hub.utils import WeakFileLock
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

ABANDONED = 3600.0  # seconds after which a half-written file counts as abandoned
IN_USE = 24 * 3600.0  # seconds that a tower is kept after its last use, to bridge the runs of a series

# The folder may hold the user's files, so only files with these names are counted or removed.
LEDGER, LOCK = "dualspeed_features.bytes", "dualspeed_features.lock"
MARKER = "dualspeed_features"  # a file in each tower's folder, whose time is that of the last use
TOWER = re.compile(r"tower-[0-9a-f]{32}")
PART = "[0-9a-f][0-9a-f]"  # glob of the folders in a tower's folder
OWN = re.compile(r"[0-9a-f]{32}\.(safetensors|\d+\.tmp)")


class FeatureStore:
    """A folder with one file per unit and a subfolder per tower. All towers together never exceed a bound.

    A file is written under another name and then moved, so every process reads it whole or not at all. Unreadable files
    count as missing. Writers hold a lock and add up sizes in another file, so the bound holds for all processes. The
    object holds only paths and numbers, so it can be sent to workers.

    A tower that was not used for a day makes room for others. Other files in the folder are neither counted nor
    removed.

    Args:
        root (`str`): the folder of all towers.
        tower (`str`): the fingerprint of this one, 32 hexadecimal digits.
        bound (`int`): the most bytes that the files of all towers may take.
    """

    def __init__(self, root: str, tower: str, bound: int):
        self.root, self.folder, self.bound = Path(root), Path(root) / f"tower-{tower}", bound
        self.full = False
        self.refused = 0  # bytes of the unit that did not fit

    def open(self, count: bool = True) -> None:
        """Creates the folder and marks it as used. With `count`, adds up the bytes of all towers.

        Files may have been removed by hand, or written by a run that was killed before it noted them.
        """
        self.root.mkdir(parents=True, exist_ok=True)
        with WeakFileLock(self.root / LOCK):
            self._mark()
            if count:
                self._note(sum(size_of(tower) for tower in self._towers()))

    def use(self) -> None:
        """Marks the folder as used, so no other run removes it for a day."""
        with WeakFileLock(self.root / LOCK):
            self._mark()

    def path(self, key: str) -> Path:
        """The file of a unit, whose key has 32 hexadecimal digits."""
        return self.folder / key[:2] / f"{key}.safetensors"

    def read(self, key: str) -> dict[str, torch.Tensor] | None:
        """The tensors of a unit, mapped from disk; None if the file is missing or incomplete."""
        try:
            with safe_open(self.path(key), framework="pt") as file:
                return {name: file.get_tensor(name) for name in sorted(file.keys())}
        except (OSError, SafetensorError):
            return None

    def write(self, units: dict[str, dict[str, torch.Tensor]]) -> None:
        """Stores units by their keys while there is room. Unused towers make room, the longest unused first."""
        with WeakFileLock(self.root / LOCK):
            self._mark()
            used = self._used()
            try:
                for key, tensors in units.items():
                    if self.read(key) is not None:
                        continue
                    data = save({name: tensor.contiguous() for name, tensor in tensors.items()})
                    if used + len(data) > self.bound:
                        used = self._make_room(len(data))
                    self.full = used + len(data) > self.bound
                    if self.full:
                        self.refused = len(data)
                        break
                    used += len(data)
                    self._put(self.path(key), data)
            finally:
                self._note(used)

    def held(self) -> tuple[int, int, int]:
        """The number of stored units of this tower, their bytes, and the bytes of all towers."""
        with WeakFileLock(self.root / LOCK):
            units = sum(path.suffix != ".tmp" for path in own_files(self.folder))
            return units, size_of(self.folder), sum(size_of(tower) for tower in self._towers())

    def _mark(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / MARKER).touch()

    def _put(self, path: Path, data: bytes) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(f".{os.getpid()}.tmp")
        partial.write_bytes(data)
        partial.replace(path)

    def _make_room(self, size: int) -> int:
        """Removes unused towers until `size` more bytes fit, or none if even all were not enough.

        Returns the bytes of the remaining towers, counted from their files.
        """
        sizes = {tower: size_of(tower) for tower in self._towers()}
        used = sum(sizes.values())
        unused = [tower for tower in sizes if tower != self.folder and time.time() - last_use(tower) > IN_USE]
        if used + size - sum(sizes[tower] for tower in unused) <= self.bound:
            for tower in unused:
                if used + size > self.bound:
                    remove(tower)
                    used -= sizes[tower]
        return used

    def _towers(self) -> list[Path]:
        """The towers' folders, the longest unused first."""
        marked = [path.parent for path in self.root.glob(f"tower-*/{MARKER}")]
        return sorted((folder for folder in marked if TOWER.fullmatch(folder.name)), key=last_use)

    def _used(self) -> int:
        try:
            return int((self.root / LEDGER).read_text())
        except (OSError, ValueError):  # missing, or truncated by a crash
            return sum(size_of(tower) for tower in self._towers())

    def _note(self, used: int) -> None:
        (self.root / LEDGER).write_text(str(used))


def last_use(tower: Path) -> float:
    """The time of a tower's last use, in seconds since the epoch."""
    return (tower / MARKER).stat().st_mtime


def own_files(tower: Path) -> Iterator[Path]:
    """The files that stores have written to a tower's folder, without the marker."""
    for path in tower.glob(f"{PART}/*"):
        if OWN.fullmatch(path.name) and path.name[:2] == path.parent.name and path.is_file():
            yield path


def size_of(tower: Path) -> int:
    """Bytes of a tower's files. Half-written files of dead processes are removed instead."""
    total = 0
    for path in own_files(tower):
        try:
            status = path.stat()
            if path.suffix == ".tmp" and time.time() - status.st_mtime > ABANDONED:
                path.unlink()
            else:
                total += status.st_size
        except FileNotFoundError:  # moved or removed by another process in the meantime
            continue
    return total


def remove(tower: Path) -> None:
    """Removes a tower's files, the marker last, and folders that are empty then. Other files stay."""
    for path in [*own_files(tower)]:
        path.unlink(missing_ok=True)
    for part in [*tower.glob(PART)]:
        remove_empty(part)
    (tower / MARKER).unlink(missing_ok=True)
    remove_empty(tower)


def remove_empty(folder: Path) -> None:
    """Removes a folder if it is empty."""
    with suppress(OSError):
        folder.rmdir()
