"""Kills trainings at chosen file operations and resumes them: `kill_training.py FOLDER SHARE...`, or `--random COUNT`.

Each training is a process of its own, forked from this one, which has imported everything and trains nothing itself.
Prints one line of JSON for each kill.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import sys
import traceback
from pathlib import Path

import torch
from safetensors.torch import load_file
from training import make

OPTIONS = {"max_steps": 5, "save_strategy": "steps", "save_steps": 1, "save_total_limit": 2, "pruner": "random"}
OPTIONS |= {"slow_mode_ratio": 0.5, "pruning_ratio": 0.5, "speedup_rounds": 0, "seed": 1}
EVENTS = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "shutil.rmtree")
MINE = "\n## What I found\n\nMy own words.\n"


class Operations:
    """Counts what is done to files in a folder. The process dies in the operation of a number, a file half-written."""

    def __init__(self, folder: Path, last: int):
        self.folder, self.last, self.seen = str(folder), last, []
        shutil._use_fd_functions = False  # by descriptors, deletions would not name their folder
        sys.addaudithook(self.audit)
        save = torch.save

        def cut_off(value, path, *args, **kwargs):
            save(value, path, *args, **kwargs)
            if self.folder in str(path) and self.note(f"torch.save {path}"):
                os.truncate(path, os.path.getsize(path) // 2)
                os._exit(9)

        torch.save = cut_off

    def audit(self, event, arguments):
        writes = event == "open" and isinstance(arguments[1], str) and {*arguments[1]} & {*"wax+"}
        inside = arguments and isinstance(arguments[0], (str, os.PathLike)) and self.folder in str(arguments[0])
        if inside and (writes or event in EVENTS) and self.note(f"{event} {arguments[0]}"):
            os._exit(9)

    def note(self, what: str) -> bool:
        self.seen.append(what.replace(self.folder, ""))
        return len(self.seen) == self.last


def train(folder: Path) -> None:
    trainer = make(folder, **OPTIONS)
    resumes = any(folder.glob("checkpoint-*"))
    try:
        trainer.train(resume_from_checkpoint=resumes)
    except ValueError as error:
        if not resumes or "no whole checkpoint" not in str(error):
            raise
        trainer.train()
    trainer.save_model()
    trainer.create_model_card()


def forked(folder: Path, last: int, log: Path) -> int:
    """Trains in a process of its own, which dies in file operation `last` (0 for none); returns its exit code."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    os.dup2(2, 1)
    try:
        operations = Operations(folder, last)
        train(folder)
        log.write_text(json.dumps(operations.seen))
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        os._exit(1)


def begin(folder: Path) -> Path:
    folder.mkdir()
    (folder / "README.md").write_text(MINE)
    (folder / "notes.txt").write_text("mine")
    return folder


def outcome(folder: Path) -> dict:
    """All that resuming goes on from."""
    last = folder / f"checkpoint-{OPTIONS['max_steps']}"
    parts = [
        load_file(place / name)
        for place in (folder, last)
        for name in ("model.safetensors", "mode_isolator.safetensors")
    ]
    optimizer = torch.load(last / "optimizer.pt", weights_only=True)["state"]
    return {f"{i} {k}": v for i, part in enumerate(parts) for k, v in part.items()} | {
        f"optimizer {i} {k}": v for i, state in optimizer.items() for k, v in state.items()
    }


def main(root: Path, *words: str) -> None:
    whole = begin(root / "whole")
    assert forked(whole, 0, root / "log.json") == 0
    count, expected = len(json.loads((root / "log.json").read_text())), outcome(whole)
    if words[0] == "--random":
        chosen = random.Random(0).sample(range(1, count + 1), int(words[1]))
    else:
        chosen = [max(1, round(float(share) * count)) for share in words]
    for last in chosen:
        folder = begin(root / "run")
        killed = forked(folder, last, root / "log.json")
        done = forked(folder, 0, root / "log.json") == 0
        found = outcome(folder) if done else {}
        kept = (folder / "notes.txt").read_text() == "mine" and MINE.strip() in (folder / "README.md").read_text()
        equal = done and found.keys() == expected.keys() and all(torch.equal(found[k], expected[k]) for k in expected)
        print(
            json.dumps({"operation": last, "of": count, "killed": killed == 9, "equal": equal, "kept": kept}),
            flush=True,
        )
        shutil.rmtree(folder)


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
