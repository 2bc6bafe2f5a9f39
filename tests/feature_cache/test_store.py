"""The store of vision features: its bound, which towers make room, and that nothing else in its folder is touched."""

from __future__ import annotations

import multiprocessing
import os
import threading
from pathlib import Path

import pytest
import torch
from feature_cases import aged, files, folders, key, named, numbered, opened, stored, towers, unit
from huggingface_hub.utils import WeakFileLock
from safetensors.torch import load_file

from hf_dualspeed.feature_cache.store import LEDGER, LOCK, MARKER, FeatureStore, remove


@pytest.mark.parametrize("damage", ["cut", "empty", "gone"])
def test_damaged_files_are_misses_and_are_repaired(tmp_path, damage):
    store, damaged = opened(tmp_path), "ab" * 16
    assert store.read(damaged) is None
    store.write({damaged: unit()})
    path = store.path(damaged)
    kept = {"cut": path.read_bytes()[:-5], "empty": b"", "gone": None}[damage]
    path.unlink() if kept is None else path.write_bytes(kept)
    assert store.read(damaged) is None
    store.write({damaged: unit()})
    assert torch.equal(store.read(damaged)["last_hidden_state"], unit()["last_hidden_state"])


def test_the_bound_holds_and_nothing_of_its_own_is_removed(tmp_path):
    store = opened(tmp_path)
    store.write(numbered(*range(5)))
    size = stored(tmp_path) // 5
    assert not store.full
    store.write(numbered(*range(16)))
    assert store.full
    assert stored(tmp_path) == 10_000 // size * size
    assert [path.stem for path in files(tmp_path)] == [*numbered(*range(10_000 // size))]
    (tmp_path / LEDGER).write_text("")  # cut short by a crash
    again = FeatureStore(str(tmp_path), named("tower"), 10_000)
    again.write(numbered(255))
    assert again.full
    assert stored(tmp_path) <= 10_000


def test_what_was_removed_by_hand_or_left_by_a_killed_run_is_counted_anew(tmp_path):
    store = opened(tmp_path)
    store.write(numbered(1, 2))
    store.path(key(1)).unlink()
    left = store.path(key(2)).with_suffix(".123.tmp")
    left.write_bytes(b"half")
    os.utime(left, (1e9, 1e9))
    opened(tmp_path)
    assert not left.exists()
    assert stored(tmp_path) == store.path(key(2)).stat().st_size


def test_a_ledger_that_says_too_much_removes_nothing(tmp_path):
    other = opened(tmp_path, "other")
    other.write(numbered(1, 2))
    store = opened(tmp_path)
    aged(other, 1e9)
    (tmp_path / LEDGER).write_text("9999")
    store.write(numbered(1))
    assert not store.full
    assert len(files(other.folder)) == 2
    assert stored(tmp_path) <= 10_000


def test_towers_unused_for_longest_make_room(tmp_path):
    for age, tower in enumerate(("old", "older", "oldest")):
        store = opened(tmp_path, tower)
        store.write(numbered(1, 2))
        os.utime(store.folder / MARKER, (1e9 - age, 1e9 - age))
    size = stored(tmp_path) // 6
    store = opened(tmp_path)
    store.write(numbered(*range(10_000 // size - 6)))
    assert folders(tmp_path) == towers("old", "older", "oldest", "tower")
    store.write(numbered(100))
    assert folders(tmp_path) == towers("old", "older", "tower")
    opened(tmp_path, "older")  # used again
    store.write(numbered(101, 102))
    assert folders(tmp_path) == towers("older", "tower")
    assert not store.full
    assert stored(tmp_path) <= 10_000


HOUR = 3600.0


@pytest.mark.parametrize("used", ["opened", "marked", "written", "23 hours ago", None])
def test_a_tower_used_within_a_day_stays_and_the_bound_holds(tmp_path, used):
    live = opened(tmp_path, "live")
    live.write(numbered(1, 2))
    size = stored(tmp_path) // 2
    aged(live, (23 if used == "23 hours ago" else 25) * HOUR)
    uses = {
        "opened": lambda: opened(tmp_path, "live"),
        "marked": live.use,
        "written": lambda: live.write(numbered(3)),
    }
    uses.get(used, lambda: None)()
    before, room = files(live.folder), 10_000 // size
    store = opened(tmp_path)
    store.write(numbered(*range(room)))
    assert files(live.folder) == (before if used else [])
    assert len(files(store.folder)) == (room - len(before) if used else room)
    assert store.full == bool(used)
    assert stored(tmp_path) <= 10_000


@pytest.mark.parametrize("helps", [False, True])
def test_a_smaller_bound_removes_nothing_in_use_and_nothing_in_vain(tmp_path, helps):
    live, unused = opened(tmp_path, "live"), opened(tmp_path, "unused")
    for store in (live, unused):
        store.write(numbered(1, 2, 3))
    size = stored(tmp_path) // 6
    aged(unused, 25 * HOUR)
    store = opened(tmp_path, bound=size * (5 if helps else 3) + 10)
    store.write(numbered(*range(9)))
    assert store.full
    assert [len(files(s.folder)) for s in (live, unused, store)] == ([3, 0, 2] if helps else [3, 3, 0])
    stored(tmp_path)


OLD = f"tower-{named('old')}"
OURS = f"ab/{'ab' * 16}.safetensors"  # as the store would call a file
FOREIGN = (
    "lock",
    "bytes",
    "half.tmp",
    "coco/img.jpg",
    f"coco/{OURS}",
    f"coco/ab/{'ab' * 16}.1.tmp",
    f"tower-{named('theirs')}/img.jpg",  # called like a tower, but not marked
    f"tower-{named('theirs')}/{OURS}",
    f"tower-photos/{MARKER}",  # marked, but called otherwise
    f"tower-photos/{OURS}",
    f"{OLD}/notes.txt",
    f"{OLD}/half.tmp",
    f"{OLD}/ab/half.tmp",
    f"{OLD}/ab/{'cd' * 16}.safetensors",
    f"{OLD}/ab/{'ab' * 17}.safetensors",
    f"{OLD}/more/{OURS}",
)


def test_what_is_not_the_caches_own_is_neither_counted_nor_touched(tmp_path):
    old = opened(tmp_path, "old")
    old.write(numbered(1, 2))
    size = old.path(key(1)).stat().st_size
    half = old.path(key(2)).with_suffix(".1.tmp")
    for place in (*FOREIGN, str(half.relative_to(tmp_path))):
        (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / place).write_text(place * 200)
        os.utime(tmp_path / place, (1e9, 1e9))
    (tmp_path / "coco" / "empty").mkdir()
    (old.folder / "empty").mkdir()

    def counted() -> int:
        assert all((tmp_path / place).read_text() == place * 200 for place in FOREIGN)
        assert (tmp_path / "coco" / "empty").is_dir()
        assert (old.folder / "empty").is_dir()
        return int((tmp_path / LEDGER).read_text())

    opened(tmp_path, "old")
    assert counted() == 2 * size
    assert not half.exists()
    aged(old, 25 * HOUR)
    store, room = opened(tmp_path), 10_000 // size
    store.write(numbered(*range(room)))  # the old tower makes room
    assert not store.full
    assert counted() == room * size
    assert not [path for path in (old.folder / MARKER, old.path(key(1)), old.path(key(2)).parent) if path.exists()]
    store.write(numbered(room))
    opened(tmp_path)
    assert store.full
    assert counted() == room * size


def test_a_tower_removed_under_a_run_is_made_anew(tmp_path):
    store = opened(tmp_path)
    store.write(numbered(1, 2))
    remove(store.folder)
    assert folders(tmp_path) == set()
    store.use()
    assert folders(tmp_path) == towers("tower")
    remove(store.folder)
    store.write(numbered(3))
    opened(tmp_path, "other")  # counts what is marked
    assert stored(tmp_path) == store.path(key(3)).stat().st_size


@pytest.mark.parametrize("call", ["open", "use"])
def test_a_tower_is_made_and_marked_while_no_other_process_removes(tmp_path, call):
    store = FeatureStore(str(tmp_path), named("tower"), 10_000)
    thread = threading.Thread(target=getattr(store, call), daemon=True)
    with WeakFileLock(tmp_path / LOCK):
        thread.start()
        thread.join(0.3)
        assert thread.is_alive()
        assert not store.folder.exists()
    thread.join(30)
    assert (store.folder / MARKER).exists()


def _fill(folder: str, first: int) -> None:
    torch.set_num_threads(1)
    store = opened(Path(folder), bound=40_000)
    for number in range(first, first + 40, 4):
        store.write(numbered(*(n % 60 for n in range(number, number + 4))))


@pytest.mark.distributed
def test_processes_write_to_one_folder(tmp_path):
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=_fill, args=(str(tmp_path), first)) for first in (0, 10, 20)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
        assert worker.exitcode == 0
    size = files(tmp_path)[0].stat().st_size
    assert stored(tmp_path) == 40_000 // size * size
    for path in files(tmp_path):
        assert torch.equal(load_file(path)["last_hidden_state"], unit(int(path.stem[:2], 16))["last_hidden_state"])
    assert not list(tmp_path.rglob("*.tmp"))
