"""Kills runs at file operations and resumes them: `kill_training.py FOLDER --random COUNT --chosen COUNT --full COUNT`.

A run is a recipe that saves, rotates, pushes, evaluates and writes its card, and `dualspeed evaluate` on what it has
trained. Each is a process of its own, forked from this one, which has imported everything and runs nothing itself.
Prints one line of JSON for each kill or full disk, and last the tally.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import sys
import threading
import traceback
from collections import Counter
from collections.abc import Callable, Iterable
from functools import wraps
from pathlib import Path

import pytest
import torch
import transformers.modeling_utils
import transformers.trainer
from evaluation_cases import rows, write_rows
from loopback_hub import LoopbackHub, point_client_to
from PIL import Image
from pyarrow.parquet import read_table
from recipe_cases import TINY
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from hf_dualspeed.commands.evaluate import main as evaluate
from hf_dualspeed.publishing.plots import plot_learning_curve
from hf_dualspeed.recipes import run as recipes
from hf_dualspeed.recipes.arguments import parse_recipe
from hf_dualspeed.trainer.trainer import DualSpeedTrainer
from hf_dualspeed.utils.constants import UNFINISHED_NAME

STEPS = 3  # over an epoch's end
# Later ones stand inside earlier ones: the innermost counts.
PHASES = {
    "save": (DualSpeedTrainer, "_save_checkpoint"),
    "rotation": (transformers.trainer, "rotate_checkpoints"),
    "push": (DualSpeedTrainer, "_push_from_checkpoint"),
    "final push": (DualSpeedTrainer, "push_to_hub"),
    "final save": (DualSpeedTrainer, "save_model"),
    "card": (DualSpeedTrainer, "create_model_card"),
}
CHOSEN = ("save", "rotation", "final save", "evaluation", "card", "push", "final push")
CHANGES = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "shutil.rmtree")
SAFETENSORS = "model.safetensors"
# What a person, or an earlier run, has left in the output folder.
OTHERS = {
    "notes.txt": "mine",
    "evaluations/other.json/full.parquet": "earlier answers",
    "evaluations/other.json/evaluation.json": '{"evaluations": []}',
    "private/id.txt": "mine, too",
}
MINE = "\n## What I found\n\nMy own words.\n"


class Operations:
    """Counts what a run does to files in its folder, and ends it at the operation `last`, a phase and a number.

    A process that is killed leaves the file that it was about to write empty or half-written. On a full disk, this
    operation and all later ones that need space raise an `OSError`.
    """

    def __init__(self, folder: Path, last: tuple[str, int] | None, full: bool = False):
        self.folder, self.last, self.full = str(folder), last, full
        self.phase, self.seen, self.reached, self.quiet = "other", Counter(), False, False
        for phase, (owner, name) in PHASES.items():
            self.follow(owner, name, phase)
        self.cut(torch, "save", 1)
        self.cut(transformers.modeling_utils, "safe_save_file", 1)
        shutil._use_fd_functions = False  # by descriptors, deletions would not name their folder
        sys.addaudithook(self.audit)

    def follow(self, owner: object, name: str, phase: str) -> None:
        """Counts what `owner.name` does as `phase`."""
        inner = getattr(owner, name)

        @wraps(inner)
        def followed(*args, **kwargs):
            checkpoint = phase == "final save" and self.phase == "save"
            before, self.phase = self.phase, self.phase if checkpoint else phase
            try:
                return inner(*args, **kwargs)
            finally:
                self.phase = before

        setattr(owner, name, followed)

    def cut(self, owner: object, name: str, place: int) -> None:
        """Counts a function that writes a file without Python's `open`, and leaves half of it."""
        inner = getattr(owner, name)

        def half(*args, **kwargs):
            inner(*args, **kwargs)
            path = args[place] if len(args) > place else kwargs["filename"]
            if self.folder in str(path):
                self.note(path, lambda: os.truncate(path, os.path.getsize(path) // 2))

        setattr(owner, name, half)

    def audit(self, event: str, arguments: tuple) -> None:
        path = arguments[0] if arguments else None
        if self.quiet or not isinstance(path, (str, os.PathLike)) or self.folder not in str(path):
            return
        mode = arguments[1] if event == "open" and isinstance(arguments[1], str) else ""
        writes = bool({*mode} & {*"wax+"})
        if writes or event in CHANGES or ("push" in self.phase and mode):  # a push reads
            self.note(path, lambda: leave(path, mode if writes else ""), grows=writes or event == "os.mkdir")

    def note(self, path: object, leave_half: Callable[[], None], grows: bool = True) -> None:
        if threading.current_thread() is not threading.main_thread():
            return  # a push in the background, which comes at any time
        self.seen[self.phase] += 1
        if self.last == (self.phase, self.seen[self.phase]):
            self.reached = True
        elif not (self.full and self.reached and grows):
            return
        if self.full and grows:
            raise OSError(28, "No space left on device", str(path))
        if not self.full:
            self.quiet = True
            leave_half()
            os.kill(os.getpid(), signal.SIGKILL)


def leave(path: object, mode: str) -> None:
    """What is left of a file that was opened to be written."""
    if mode:
        with open(path, mode if "b" in mode else f"{mode}b") as file:
            file.write(b'{"ind' if "a" in mode else b"")


def words(folder: Path) -> list[str]:
    options = {
        **{"output_dir": folder, "dataset": "data.json", "eval_dataset": "data.json", "max_steps": STEPS, "seed": 1},
        **{"save_strategy": "steps", "save_steps": 1, "save_total_limit": 1, "resume_from_checkpoint": "last"},
        **{"per_device_train_batch_size": 4, "learning_rate": 0.01, "use_cpu": True, "report_to": "none"},
        **{"pruner": "random", "pruning_ratio": 0.75, "slow_mode_ratio": 0.5, "speedup_rounds": 0},
        **{"disable_tqdm": True, "logging_steps": 1, "max_new_tokens": 2, "eval_batch_size": 4},
        **{"push_to_hub": True, "hub_model_id": f"tester/{folder.name}", "hub_always_push": True},
    }
    return [word for name, value in options.items() for word in (f"--{name}", str(value))]


def work(folder: Path, operations: Operations) -> None:
    recipe, args = parse_recipe([*words(folder), "--tiny_llava", json.dumps(TINY)])
    recipes.run_recipe(recipe, args)
    operations.phase = "evaluation"
    asked = ["--dataset", "data.json", "--batch_size", "2", "--max_new_tokens", "2", "--metric", "exact_match"]
    assert not evaluate([str(folder), *asked, "--pruning_ratio", "0.5"])


def forked(folder: Path, log: Path, last: tuple[str, int] | None = None, full: bool = False) -> int:
    """Runs in a process of its own, which is ended in the operation `last`; returns its exit code, -9 for a kill."""
    log.write_text("{}")
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    code = 1
    try:
        os.dup2(2, 1)
        operations = Operations(folder, last, full)
        try:
            work(folder, operations)
            code = 0
        finally:
            operations.quiet = True
            log.write_text(json.dumps({"seen": operations.seen, "reached": operations.reached}))
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def begin(folder: Path) -> Path:
    """An output folder that a person wrote into, with the model of an earlier run."""
    for name, text in OTHERS.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    (folder / "README.md").write_text(MINE)
    save_file({"earlier": torch.ones(3)}, folder / SAFETENSORS)
    return folder


def whole(folder: Path) -> bool:
    """Whether the output folder holds a whole model, or says that it does not."""
    try:
        return bool(load_file(folder / SAFETENSORS)) or True
    except SafetensorError:
        return (folder / UNFINISHED_NAME).exists()


def kept(folder: Path) -> bool:
    there = all((folder / name).read_text() == text for name, text in OTHERS.items())
    return there and MINE.strip() in (folder / "README.md").read_text()


def flat(value: object, place: str = "") -> Iterable[tuple[str, object]]:
    """All values in nested mappings and lists, by place, without names, times and measurements of the machine."""
    noise = ("seconds", "date", "runtime", "per_second", "hub", "name", "memory", "hash", "versions", "flos")
    noise += ("data_wait", "data_times", "speedup_over_slow_steps")
    if isinstance(value, (dict, list)):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            if not any(part in str(key) for part in noise):
                yield from flat(inner, f"{place}/{key}")
    else:
        yield place, value


def outcome(folder: Path) -> dict:
    """All that a run leaves: weights, optimizer, random states, logs, answers and scores."""
    last, found = folder / f"checkpoint-{STEPS}", {}
    for path in sorted([*folder.glob("*.safetensors"), *last.glob("*.safetensors")]):
        found |= {f"{path.relative_to(folder)} {key}": value for key, value in load_file(path).items()}
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        found |= flat(torch.load(last / name, weights_only=False), name)
    for name in ("results.json", f"checkpoint-{STEPS}/trainer_state.json", "evaluations/data.json/evaluation.json"):
        found |= flat(json.loads((folder / name).read_text()), name)
    for path in sorted((folder / "evaluations" / "data.json").glob("*.parquet")):
        found |= flat(read_table(path).to_pylist(), path.name)
    # Parts of files that no one has put in place are no loss.
    found["files"] = sorted(path.name for path in folder.iterdir() if path.suffix != ".part")
    return found


def differences(found: dict, expected: dict) -> list[str]:
    def same(one: object, two: object) -> bool:
        return torch.equal(one, two) if isinstance(one, torch.Tensor) else str(one) == str(two)

    keys = found.keys() | expected.keys()
    return sorted(k for k in keys if k not in found or k not in expected or not same(found[k], expected[k]))


def choices(counts: Counter, options: argparse.Namespace) -> Iterable[tuple[tuple[str, int], bool]]:
    """Operations and whether the disk is full: some at random, and as many of each phase, evenly spread."""
    everywhere = [(phase, number + 1) for phase in sorted(counts) for number in range(counts[phase])]
    draw = random.Random(0)
    yield from ((last, False) for last in draw.sample(everywhere, min(options.random, len(everywhere))))
    for number in range(options.chosen):
        phase, turn = CHOSEN[number % len(CHOSEN)], number // len(CHOSEN)
        share = (turn + 0.5) / -(-options.chosen // len(CHOSEN))
        yield (phase, 1 + int(share * counts[phase])), False
    yield from ((last, True) for last in draw.sample(everywhere, min(options.full, len(everywhere))))


def main(root: Path, options: argparse.Namespace) -> None:
    plot_learning_curve([{"step": 1, "fast_loss": 1.0}], root / "warm.png", "")  # matplotlib, which is imported late
    write_rows(root / "data.json", [{**row, "answer": row["conversations"][1]["value"]} for row in rows()])
    for row in rows():
        Image.new("RGB", (20, 16), row["image"].removesuffix(".png")).save(root / row["image"])
    os.chdir(root)
    hub, log = LoopbackHub(), root / "log.json"
    patch = pytest.MonkeyPatch()
    point_client_to(hub.url, root, patch)
    patch.setenv("HF_TOKEN", hub.token)
    reference = begin(root / "whole")
    assert forked(reference, log) == 0
    expected, counts = outcome(reference), Counter(json.loads(log.read_text())["seen"])
    print(json.dumps({"operations": counts}), flush=True)
    tally = Counter()
    for number, (last, full) in enumerate(choices(counts, options)):
        folder = begin(root / f"run{number}")
        code = forked(folder, log, last, full)
        ended = code == -signal.SIGKILL or (full and json.loads(log.read_text())["reached"])
        left = whole(folder)
        done = forked(folder, log) == 0
        apart = differences(outcome(folder), expected) if done else ["it did not resume"]
        one = {"phase": last[0], "operation": last[1], "of": counts[last[0]], "full_disk": full, "ended": ended}
        one |= {"whole": left, "equal": not apart, "kept": kept(folder), "apart": apart[:5]}
        print(json.dumps(one), flush=True)
        tally[f"{last[0]}{', full disk' if full else ''}"] += 1
        tally["good"] += one["ended"] and one["whole"] and one["equal"] and one["kept"]
        if one["equal"] and one["kept"]:
            shutil.rmtree(folder)
    print(json.dumps({"tally": tally}), flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("root", type=Path)
    for name in ("random", "chosen", "full"):
        parser.add_argument(f"--{name}", type=int, default=0)
    given = parser.parse_args()
    main(given.root, given)
