"""`python -m benchmarks.gpu.packages` says what `make gpu` lacks. Itself it needs no more than Python and packaging."""

from __future__ import annotations

import sys
import tomllib
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from packaging.requirements import Requirement

from hf_dualspeed.cli import call

PROJECT = Path(__file__).parents[2] / "pyproject.toml"
# Beside the library's own dependencies: LoRA and the tests.
NEEDED = ("peft>=0.20", "pytest>=8")


def check_packages() -> None:
    """Raises a `ValueError` that names each package that is missing or too old."""
    project = tomllib.loads(PROJECT.read_text(encoding="utf-8"))["project"]
    wrong = []
    for need in (Requirement(words) for words in (*project["dependencies"], *NEEDED)):
        try:
            found = version(need.name)
        except PackageNotFoundError:
            found = None
        if found is None or not need.specifier.contains(found, prereleases=True):
            wrong.append(f"{need} ({'missing' if found is None else f'found {found}'})")
    if wrong:
        raise ValueError(
            f"{sys.executable} lacks {', '.join(wrong)}. Install them, or where nothing can be downloaded bring their "
            "wheels in a folder: make gpu WHEELS=folder."
        )


if __name__ == "__main__":
    sys.exit(call(check_packages))
