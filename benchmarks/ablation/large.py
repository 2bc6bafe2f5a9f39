"""`python -m benchmarks.ablation.large`: full tokens, the paper's way and ours on one GPU, in a few minutes.

A language model of 70 M parameters answers questions about grids of 2 x 2 letters, 576 visual tokens. It needs no
files: letters are drawn, and the tower that reads them is trained first. Each call trains as many seeds as fit into its
time, beginning with the first that is missing, and adds them to the results of the card. All is written after each run.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

import torch

from hf_dualspeed.cli import call
from hf_dualspeed.utils.environment import machine, versions
from hf_dualspeed.utils.text import without_paths
from hf_dualspeed.utils.validation import Parser, check_range
from hf_dualspeed.utils.writing import write_json

from ..gpu.gpu import card_of
from . import plan
from .ablation import Run, Settings, execute, settings_of, summarise
from .plan import FORMAT, GROUPS, SETUPS, Setup, Variant
from .report import write_report
from .task import language_parameters, majority

KIND = "ablation on one GPU"
COMMAND = "python -m benchmarks.ablation.large"
FOLDER = "docs/results"
GROUP = "large"
SECONDS = 520  # of a call, so that `make gpu` has room for it
TINY = Setup(
    "letters",
    {
        "hidden_size": 16,
        "layers": 2,
        "heads": 2,
        "pretraining_steps": 2,
        "start_steps": 2,
        "train_grids": 8,
        "test_grids": 2,
    },
    batch_size=2,
    learning_rate=1e-3,
    curve=2,
)
STEPS, TINY_STEPS, WARM_UP = 400, 4, 6
RESERVE = 5  # seconds for the last report


@dataclass(frozen=True)
class CardRun(Run):
    """A run that another machine with the same card may have done: its fingerprint names the card alone."""

    card: str = "cpu"

    def depends_on(self) -> list:
        return [*super().depends_on()[:-1], self.card]


def main(argv: list[str]) -> int:
    """Adds runs to the card's results, as many as fit.

    Raises:
        ValueError: an option is unknown or out of range, or there is no GPU.
    """
    options = _parser().parse_args(argv)
    check_range("seconds", options.seconds, 1, off=f"{SECONDS} is usual.")
    if not (options.tiny or torch.cuda.is_available()):
        raise ValueError("PyTorch finds no GPU. Use --tiny to try the command in a tiny size.")
    end = time.monotonic() + options.seconds
    card = card_of()
    usual = Path(options.earlier) / f"gpu_{card}_{'tiny_' if options.tiny else ''}ablation_large.json"
    path = Path(options.output) if options.output else usual
    settings = settings_for(options)
    kept = kept_runs(path, usual)
    head = {
        "benchmark": KIND,
        "format": FORMAT,
        "command": shlex.join([*COMMAND.split(), *without_paths(argv)]),
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M"),
        "card": card,
        "settings": asdict(settings),
        "jobs": 1,
        "timed": True,
        "versions": versions(),
        "machine": machine(),
    }
    prepared = time.monotonic()
    task = settings.task()
    head |= {"n": len(task.test), "majority": majority(task)}
    head["language_model_parameters"] = language_parameters(settings.size, task.world)
    warm_up(settings)
    print(f"prepared in {time.monotonic() - prepared:.0f} s", flush=True)

    def written(found: dict[tuple[str, int], dict]) -> None:
        # Fingerprints stay in the file: by them a later call knows the runs. A run of other settings stays out.
        report = {**summarise(found, [GROUP]), "seeds": sorted({seed for _, seed in found})}
        prints = {f"{key}, seed {seed}": result["fingerprint"] for (key, seed), result in found.items()}
        write_json(path, without_paths({**head, **report, "fingerprints": prints}))

    found = add_runs(settings, card, kept, end, written)
    if not found:
        print(f"No run fitted into {options.seconds} s.", file=sys.stderr)
        return 1
    written(found)
    write_report(json.loads(path.read_text(encoding="utf-8")), path)
    return 0


def add_runs(
    settings: Settings, card: str, kept: dict[str, dict], end: float, written: Callable
) -> dict[tuple[str, int], dict]:
    """All runs of these settings: those `kept`, by fingerprint, and new ones while the clock is before `end`.

    Of a seed, the variants come in the order of the group, and a seed begins when the one before it is whole.
    """
    found: dict[tuple[str, int], dict] = {}
    longest, seed = {}, 0
    while True:
        for variant in GROUPS[GROUP]:
            run = CardRun(variant, seed, steps_of(variant, seed, settings.steps, found), settings, card)
            own = kept.get(run.fingerprint())
            if own is None:
                # The last run of this variant says how long this one takes; of the first, nobody knows.
                if not fits(longest.get(variant.key, 0), end):
                    return found
                begun = time.monotonic()
                own = execute(run)
                longest[variant.key] = max(longest.get(variant.key, 0), time.monotonic() - begun)
                print(f"{variant.name}, seed {seed}: {own['full']['all']:.1%} in {own['seconds']:.1f} s", flush=True)
            found[variant.key, seed] = {**own, "way": variant.key}
            written(found)
        seed += 1


def fits(seconds: float, end: float) -> bool:
    """Whether a run of so many seconds ends in time."""
    return time.monotonic() + seconds + RESERVE < end


def steps_of(variant: Variant, seed: int, steps: int, found: dict[tuple[str, int], dict]) -> int:
    """The steps of all, or as many as fit into the reference's time with this seed."""
    if not variant.same_time:
        return steps
    reference, own = found[plan.TODAYS.key, seed], found[variant.key.removeprefix(plan.TIMED), seed]
    return max(1, round(steps * reference["seconds"] / own["seconds"]))


def kept_runs(*paths: Path) -> dict[str, dict]:
    """The runs of earlier results, by fingerprint."""
    found = {}
    for path in paths:
        results = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        prints = results.get("fingerprints", {})
        for run in results.get("runs", ()):
            own = prints[f"{run['way']}, seed {run['seed']}"]
            found[own] = {**run, "fingerprint": own}
    return found


def warm_up(settings: Settings) -> None:
    """A few steps each way, which no result counts: the first ones of a process are slow."""
    short = replace(settings, steps=WARM_UP, curve=0)
    for variant in GROUPS[GROUP][:3]:
        execute(Run(variant, 2**20, min(WARM_UP, settings.steps), short))


def settings_for(options: argparse.Namespace) -> Settings:
    """The settings on a GPU, or tiny ones."""
    given = {"steps": TINY_STEPS if options.tiny else STEPS}
    if options.tiny:
        return settings_of(TINY, given, threads=1, numbered=True)
    return settings_of(SETUPS[GROUP], given, cpu=False, numbered=True)


def _parser() -> Parser:
    parser = Parser(prog=COMMAND, allow_abbrev=False, description=__doc__.partition(": ")[2])
    parser.add_argument("--seconds", type=int, default=SECONDS, help=f"Of this call (default: {SECONDS}).")
    parser.add_argument("--earlier", default=FOLDER, help=f"Folder of the cards' results (default: {FOLDER}).")
    parser.add_argument("--output", help="Another file for the result: that of the card and the new runs together.")
    parser.add_argument("--tiny", action="store_true", help="A tiny model, on a CPU too: a trial of the command.")
    return parser


if __name__ == "__main__":  # spawned processes import this module, too
    sys.exit(call(lambda: main(sys.argv[1:])))
