"""The parts of `make gpu`, most valuable first."""

from __future__ import annotations

import hashlib
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
LIBRARY = ("hf_dualspeed/**/*.py",)
TESTED = (*LIBRARY, "tests/conftest.py", "tests/helpers/**/*.py", "tests/integration/test_gpu.py")
BENCH = ("-m", "hf_dualspeed.cli", "bench")
TESTS = ("-m", "benchmarks.gpu.tests")
ABLATION = ("-m", "benchmarks.ablation.large")
ABLATED = (*LIBRARY, "benchmarks/common.py", "benchmarks/ablation/*.py")
FULL = ("--scale", "full")
# What a card of 80 GB has. On a larger one, as many more samples would take longer than the parts may.
MEMORY_GIB = ("--memory-gib", "74")
# Shapes that a CPU steps in seconds.
TINY = ("--image-size", "56", "--text-tokens", "12", "--hidden-size", "64", "--layers", "2", "--rounds", "2")


@dataclass(frozen=True)
class Part:
    """One measurement in a process of its own, with a result file of its own.

    Args:
        key (`str`): what its file is called, after the card.
        words (`tuple[str]`): of Python's command line, without `--output`.
        least, most (`int`): seconds that must be left for it to begin, and after which it is stopped.
        reads (`tuple[str]`): patterns of the files in the checkout that its result depends on.
        grows (`bool`): whether it adds to its earlier result, which it then finds where it writes.
    """

    key: str
    words: tuple[str, ...]
    least: int
    most: int
    reads: tuple[str, ...] = LIBRARY
    grows: bool = False

    def command(self, output: Path) -> list[str]:
        """The whole command line, which writes the JSON file `output`."""
        return [sys.executable, *self.words, "--output", str(output)]

    def depends_on(self) -> str:
        """A hash of the words and of the sources. A result with another one is of another version."""
        found = hashlib.sha256(repr(self.words).encode())
        for path in sorted({path for pattern in self.reads for path in ROOT.glob(pattern)}):
            found.update(path.relative_to(ROOT).as_posix().encode() + path.read_bytes())
        return found.hexdigest()


def bench(key: str, least: int, most: int, *words: str) -> Part:
    return Part(key, (*BENCH, *words), least, most)


def plan(tiny: bool) -> list[Part]:
    """All parts: at 7 B parameters on a card of 80 GB, or `tiny` ones on whatever there is."""
    memory, shaped = ("--same-memory", *MEMORY_GIB, "--batch", "64", "--rounds", "2"), ("--shape", "llava-1.5")
    if tiny:
        memory = ("--same-memory", *TINY, "--batch", "4", "--memory-gib", "0.25")
        same, profile = (*shaped, *TINY, "--batch", "2"), ("--profile", *TINY)
        return [
            bench("llava_1_5", 5, 300, *same),
            bench("memory_llava_1_5", 5, 300, *memory),
            bench("profile", 5, 300, *profile),
            Part("tests", (*TESTS, "-k", "captured or large_images"), 5, 300, TESTED),
            Part("ablation_large", (*ABLATION, "--tiny", "--seconds", "20"), 20, 300, ABLATED, grows=True),
        ]
    adamw, lora, on = ("--optimizer", "adamw"), ("--lora",), ("--checkpointing", "on")
    next_shape = ("--shape", "llava-next")
    # LLaVA-NeXT without activation checkpointing fits in no larger batch than two.
    return [
        bench("llava_1_5", 45, 150, *FULL, *shaped, "--rounds", "4"),
        bench("memory_llava_1_5", 80, 240, *FULL, *memory, *shaped, *adamw),
        bench("llava_next", 45, 120, *FULL, *next_shape, "--rounds", "4", "--batch", "2"),
        Part("tests", TESTS, 40, 240, TESTED),
        bench("profile", 30, 90, *FULL, "--profile", *shaped, "--rounds", "4"),
        bench("memory_llava_next", 100, 300, *FULL, *memory, *next_shape, *adamw, *on),
        bench("memory_kernels", 150, 400, *FULL, *memory, *shaped, *adamw, *on, "--kernels", "on"),
        bench("memory_lora", 100, 400, *FULL, *memory, *shaped, *lora, *on, "--optimizer", "none", "adamw"),
        Part("ablation_large", ABLATION, 240, 540, ABLATED, grows=True),
    ]
