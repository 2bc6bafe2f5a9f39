"""`python -m benchmarks.gpu`: tests, benches and profile on one GPU of 80 GB, most valuable first, in nine minutes.

Each part is a process of its own and has a result file of its own, which is put in place whole when the part has ended.
So the command may be cut off at any time; called again, it goes on with the parts that this version lacks, and comes
last to those that were stopped at their limit before: they would leave no time for the others again.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections import deque
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from threading import Thread

import torch

from hf_dualspeed.bench.measure import PART
from hf_dualspeed.utils.environment import machine, versions
from hf_dualspeed.utils.text import without_paths
from hf_dualspeed.utils.validation import Parser, check_choice, check_range
from hf_dualspeed.utils.writing import write_file, write_json

from ..common import print_table
from .packages import check_packages
from .parts import ROOT, Part, plan

RESULTS = "docs/results"
PUBLISHED = ROOT / RESULTS
BUDGET = 540  # seconds
RESERVE = 10  # seconds kept for stopping a part and writing what is there
PREFIX = "gpu"
# The module that renders each kind of result.
RENDERED = {
    "training steps, forward and backward": "measure",
    "profile of a fast step": "profile",
    "optimizer steps at the same memory": "same_memory",
}


def main(argv: list[str]) -> int:
    """Runs the parts that are missing, within the budget, and says what is there. 1 where a part failed, else 0.

    Raises:
        ValueError: an option is unknown or out of range, packages are missing, or there is no GPU.
    """
    options = _parser().parse_args(argv)
    begun, folder = time.monotonic(), Path(options.output)
    parts = plan(options.tiny)
    if options.parts:
        for key in options.parts:
            check_choice("parts", key, tuple(part.key for part in parts))
        parts = [part for part in parts if part.key in options.parts]
    check_range("budget", options.budget, 1, off=f"{BUDGET} is usual.")
    if options.render_only:
        render(folder)
        return 0
    if not options.dry_run:
        check_packages()
        if not (options.tiny or torch.cuda.is_available()):
            raise ValueError("PyTorch finds no GPU. Use --tiny to try the parts in tiny shapes, or --dry-run.")
    session = Session(folder, card_of(), begun + options.budget, commit_of(options.commit))
    for part in sorted(parts, key=session.was_stopped):
        session.take(part, options.dry_run, options.again)
    print_table(("part", "state", "seconds", "result"), session.rows(), f"{session.card}, {folder}")
    if not options.dry_run and options.pages:
        render(folder)
    return int("failed" in {entry["state"] for entry in session.entries.values()})


class Session:
    """The parts so far, on one card, until the time `end` of the monotonic clock. `source` is [`commit_of`]."""

    def __init__(self, folder: Path, card: str, end: float, source: dict):
        self.folder, self.card, self.end, self.source = folder, card, end, source
        self.entries: dict[str, dict] = {}

    @property
    def left(self) -> float:
        return self.end - time.monotonic()

    def path_of(self, part: Part) -> Path:
        return self.folder / f"{PREFIX}_{self.card}_{part.key}.json"

    def take(self, part: Part, dry_run: bool, again: bool) -> None:
        """Runs a part, unless its result is there or there is no time for it; notes which, and writes the summary."""
        path, limit = self.path_of(part), min(part.most, self.left - RESERVE)
        if self.is_there(part) and not again:
            entry = {"state": "there"}
        elif limit < part.least:
            entry = {"state": "no time left", "needs": part.least}
        elif dry_run:
            entry = {"state": "to be run", "limit": part.most}
        else:
            print(f"--- {part.key}, at most {limit:.0f} s, {self.left:.0f} s left", flush=True)
            self.entries[part.key] = {"state": "running"}
            self.summarise()
            entry = self.run(part, path, limit)
            print(f"--- {part.key}: {entry['state']} after {entry['seconds']:.0f} s", flush=True)
        self.entries[part.key] = {**entry, "command": shlex.join(part.words)}
        if not dry_run:
            self.summarise()

    def is_there(self, part: Part) -> bool:
        """Whether there is a whole result of this version of the sources, in the folder or among the published ones."""
        return any(self.results(part))

    def was_stopped(self, part: Part) -> bool:
        """Whether there is no more than what a part of this version of the sources had when it was stopped."""
        results = self.results(part)
        return bool(results) and not any(results)

    def results(self, part: Part) -> list[bool]:
        """Whether each result of this version of the sources is whole."""
        paths = {folder / self.path_of(part).name for folder in (self.folder, PUBLISHED)}
        found = [json.loads(path.read_text(encoding="utf-8")) for path in paths if path.is_file()]
        wanted = part.depends_on()
        origins = [one.get("origin", {}) for one in found]
        return [bool(origin.get("whole")) for origin in origins if origin.get("depends_on") == wanted]

    def run(self, part: Part, path: Path, limit: float) -> dict:
        """Runs a part in a folder of its own, and puts its JSON file in place with its origin added."""
        begun, origin = time.monotonic(), {"depends_on": part.depends_on(), **self.source}
        with tempfile.TemporaryDirectory() as folder:
            output = Path(folder) / f"{part.key}.json"
            if part.grows and path.is_file():
                write_file(output, path.read_bytes())
            code, tail = executed(part.command(output), limit)
            entry = {"seconds": round(time.monotonic() - begun, 1)}
            # A part that was stopped may have left what it had, a bench that of whole runs.
            output = next((path for path in (output, output.with_suffix(PART)) if path.is_file()), None)
            if output is not None:
                whole = {"whole": code == 0, "seconds": entry["seconds"], "command": shlex.join(part.words)}
                result = {**json.loads(output.read_text(encoding="utf-8")), "origin": {**origin, **whole}}
                if code == 0 or not self.is_there(part):
                    write_json(path, without_paths(result))
                    entry["file"] = path.name
        if code == 0:
            return {"state": "done", **entry}
        state = "stopped at its limit" if code is None else "failed"
        return {"state": state, **entry, "exit_code": code, "last_lines": tail}

    def summarise(self) -> None:
        """Writes what is there so far."""
        head = {"card": self.card, "machine": machine(), "versions": versions(), **self.source}
        write_json(self.folder / f"{PREFIX}_{self.card}_summary.json", without_paths({**head, "parts": self.entries}))

    def rows(self) -> list[tuple[str, ...]]:
        """A row per part."""
        rows = []
        for key, entry in self.entries.items():
            said = entry.get("file") or (entry.get("last_lines") or [""])[-1] or entry["command"]
            state = entry["state"] + (f", needs {entry['needs']} s" if "needs" in entry else "")
            rows.append((key, state, str(entry.get("seconds", "")), said))
        return rows


def executed(command: list[str], limit: float) -> tuple[int | None, list[str]]:
    """The exit code of a command, None where it was stopped after `limit` seconds, and its last lines.

    Its output is shown as it comes. It has a process group of its own, which ends with it and with this process.
    """
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "errors": "replace"}
    process = subprocess.Popen(command, cwd=ROOT, env=environment, process_group=0, **pipes)
    tail: deque[str] = deque(maxlen=20)

    def show() -> None:
        for line in process.stdout:
            print(line, end="", flush=True)
            tail.append(line.rstrip())

    reader = Thread(target=show, daemon=True)
    reader.start()
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that `finally` ends the part, too
    try:
        code = process.wait(limit)
    except subprocess.TimeoutExpired:
        code = None
    finally:
        end(process)
        signal.signal(signal.SIGTERM, before)
    reader.join(timeout=2)
    return code, list(tail)


def end(process: subprocess.Popen) -> None:
    """Ends what is left of a process and of those that it started."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def card_of() -> str:
    """The card's name in a file's name, "h100" of "NVIDIA H100 80GB HBM3" for example; "cpu" without one."""
    if not torch.cuda.is_available():
        return "cpu"
    name = torch.cuda.get_device_name().lower()
    model = re.search(r"\b[a-z]{1,4}\d{2,4}[a-z]{0,2}\b", name)
    return model[0] if model else re.sub(r"\W+", "_", name)


def commit_of(given: str | None) -> dict:
    """The checkout's commit, and whether files differ from it; the `given` one and None where there is no git."""
    words = ["git", "-C", str(ROOT)]
    try:
        head = subprocess.run([*words, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        changes = [*words, "status", "--porcelain", "--untracked-files=no"]
        changed = bool(subprocess.run(changes, capture_output=True, text=True, check=True).stdout)
    except (OSError, subprocess.CalledProcessError):
        return {"commit": given, "changed": None}
    return {"commit": head, "changed": changed}


def render(folder: Path) -> None:
    """Makes page and plot of each result that has one."""
    for path in sorted(folder.glob(f"{PREFIX}_*.json")):
        results = json.loads(path.read_text(encoding="utf-8"))
        if results.get("benchmark") in RENDERED:
            import_module(f"hf_dualspeed.bench.{RENDERED[results['benchmark']]}").report(results, path)


def _parser() -> Parser:
    parser = Parser(prog="python -m benchmarks.gpu", allow_abbrev=False, description=__doc__.partition(": ")[2])
    parser.add_argument("--output", default=RESULTS, help=f"Folder of the result files (default: {RESULTS}).")
    parser.add_argument("--budget", type=int, default=BUDGET, help=f"Seconds of all parts (default: {BUDGET}).")
    parser.add_argument("--parts", nargs="+", help="Only these parts.")
    parser.add_argument("--again", action="store_true", help="Run parts whose results are there, too.")
    parser.add_argument("--pages", action="store_true", help="At the end make a page and a plot of each result.")
    parser.add_argument("--commit", help="The sources' commit, for a copy without git.")
    parser.add_argument("--tiny", action="store_true", help="Tiny shapes, on a CPU too: a trial of the command.")
    parser.add_argument("--dry-run", action="store_true", help="Say what would be run, and run nothing.")
    parser.add_argument(
        "--render-only", action="store_true", help="Make pages and plots of the results that are there."
    )
    return parser
