"""`dualspeed merge`: merges trained adapters into their base model."""

from __future__ import annotations

import shlex

from rich.console import Console

from ..evaluation.merge import merge
from ..recipes.arguments import DTYPES
from ..utils.progress import Work
from ..utils.validation import Parser


def main(argv: list[str]) -> None:
    """Merges, and prints how the result is used.

    Args:
        argv (`list[str]`): The words after `dualspeed merge`.
    """
    parser = Parser(
        prog="dualspeed merge",
        description="Merges LoRA or QLoRA adapters into their base model: an ordinary checkpoint with its processor.",
        epilog="An adapter that was trained over 4-bit weights is merged into the unquantized ones.",
    )
    parser.add_argument("adapter", help="a run's folder, any adapter's, or a Hub repo")
    parser.add_argument("output", help="the folder to write; it must be empty or not exist yet")
    parser.add_argument("--base", help="the base model, in place of the one that the adapter names")
    types = "type of the merged weights (default: that of the base model)"
    parser.add_argument("--dtype", default="auto", choices=DTYPES, help=types)
    code = "run code that the base model brings along"
    parser.add_argument("--trust_remote_code", action="store_true", help=code)
    words = parser.parse_args(argv)
    console = Console(soft_wrap=True, highlight=False, markup=False)
    with Work(f"Merging {words.adapter}"):
        found = merge(words.adapter, words.output, words.base, words.dtype, words.trust_remote_code)
    console.print(f"Merged {words.adapter} into {found.base}: {words.output}")
    folder = shlex.quote(words.output)
    console.print(f"Next: dualspeed evaluate {folder} --dataset ..., dualspeed push {folder} user/name")
