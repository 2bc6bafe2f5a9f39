"""`python -m benchmarks.ablation.selection_cost`: how long the choices of the group `selection` take, side by side.

Each is timed on one image, merging and sizes included, in the same round as DivPrune's, which it is compared with.
"""

from __future__ import annotations

import sys
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from statistics import median

import torch
from rich.progress import track

from hf_dualspeed.bench.selection import TOKENS, WIDTHS, image, seconds_of
from hf_dualspeed.cli import call
from hf_dualspeed.pruners import AutoPruner, Pruner, VisualTokens
from hf_dualspeed.utils.environment import machine, versions
from hf_dualspeed.utils.text import markdown_table, spread, without_paths
from hf_dualspeed.utils.validation import Parser, check_range
from hf_dualspeed.utils.writing import write_json

from .plan import CHOICES, KMEANS_ROUNDS

RESULTS = "docs/results/ablation_selection_cost.json"
RATIO, BASE = 0.9, "divprune"


def main(argv: list[str]) -> None:
    """Times all choices, writes the results and prints them as a table."""
    parser = Parser(prog="python -m benchmarks.ablation.selection_cost", allow_abbrev=False, description=__doc__)
    parser.add_argument("--output", default=RESULTS, help=f"The JSON file to write (default: {RESULTS}).")
    parser.add_argument("--rounds", type=int, default=5, help="Measurements of each choice (default: 5).")
    options = parser.parse_args(argv)
    check_range("rounds", options.rounds, 1)
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    pruners = {name: pruner.to(device) for name, pruner in choices().items()}
    sizes = [(count, width) for count in TOKENS for width in WIDTHS]
    found = [sized(pruners, *size, device, options.rounds) for size in track(sizes, description="choosing tokens")]
    head = {"date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M"), "machine": machine(), "versions": versions()}
    results = without_paths({**head, "rounds": options.rounds, "pruning_ratio": RATIO, "sizes": found})
    write_json(Path(options.output), results)
    print(readme_table(results))


def choices() -> dict[str, Pruner]:
    """The pruners of the group by name: each choice alone, and with rounds of k-means after it."""
    from . import kmeans  # noqa: F401, which registers it, where it is used alone

    found = {}
    for name in CHOICES:
        found[name] = AutoPruner.from_name(name, pruning_ratio=RATIO)
        for rounds in KMEANS_ROUNDS:
            options = {"pruning_ratio": RATIO, "start": name, "rounds": rounds}
            found[f"{name}, k-means {rounds}x"] = AutoPruner.from_name("kmeans", **options)
    return found


def sized(pruners: dict[str, Pruner], count: int, width: int, device: torch.device, rounds: int) -> dict:
    """Seconds of each choice from one image of `count` tokens, and its ratio to the baseline's in the same round."""
    tokens = VisualTokens(image("regions", count, width).to(device))
    seconds = seconds_of({name: partial(pruner, tokens) for name, pruner in pruners.items()}, device, rounds)
    over = {
        name: spread([own / base for own, base in zip(values, seconds[BASE], strict=True)])
        for name, values in seconds.items()
    }
    medians = {name: median(values) for name, values in seconds.items()}
    return {"visual_tokens": count, "width": width, "seconds": medians, "over_divprune": over}


def readme_table(results: dict) -> str:
    """Settings and Markdown table, for docs/ablation.md: the baseline's milliseconds, and the others over them."""
    sizes = results["sizes"]
    header = ("chosen by", *(f"{size['visual_tokens']:,} x {size['width']:,}" for size in sizes))
    rows = [(BASE, *(f"{1000 * size['seconds'][BASE]:.1f} ms" for size in sizes))]
    for name in sizes[0]["seconds"]:
        if name != BASE:
            rows.append((name, *(f"{size['over_divprune'][name]['mean']:.2f}" for size in sizes)))
    here = results["machine"]
    where = here["accelerator"] or f"{here['cpu']}, {here['threads']} threads"
    said = (
        f"Time of keeping {1 - results['pruning_ratio']:.0%} of one image's tokens (number x width), merging included, "
        f"over that of {BASE} in the same round; mean of {results['rounds']} rounds. {where}; torch "
        f"{results['versions']['torch']}."
    )
    return f"{said}\n\n{markdown_table(header, rows)}"


if __name__ == "__main__":
    sys.exit(call(lambda: main(sys.argv[1:])))
