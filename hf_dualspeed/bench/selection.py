"""`dualspeed bench --selection`: what choosing tokens costs, in plain PyTorch and in the way of the device."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F
from rich.console import Console

from ..pruners import AutoPruner, Pruner, VisualTokens
from ..publishing.plots import figure_of, save_figure
from ..trainer.schedule import FAST
from ..utils.devices import synchronize
from ..utils.text import markdown_table
from ..utils.writing import write_file
from .options import BenchArguments
from .plots import LINES
from .report import check_format, milliseconds, print_table, quartiles, setting_line, times_of

KIND = "selection of visual tokens"
WAYS = {"plain": "plain PyTorch", "fast": "as in fast steps"}
TOKENS, WIDTHS = (576, 1024, 2928), (1024, 4096)
IMAGES = {"regions": "regions", "noise": "noise"}
HEADER = ("shape", "batch", "visual tokens", "fast step, ms", "plain, ms", "share", "as in fast steps, ms", "share")
SIZE_HEADER = ("tokens", "visual tokens", "width", "plain, ms", "as in fast steps, ms", "times as fast")


def measure(options: BenchArguments) -> dict:
    """Selection of each shape beside its fast step, and of single images of several sizes."""
    from .measure import default_device, default_dtype, measured

    results = measured(options, [], derive, timed)
    device, threads = default_device(), torch.get_num_threads()
    try:
        if options.threads is not None:
            torch.set_num_threads(options.threads)
        pruner = AutoPruner.from_name(options.pruner, pruning_ratio=options.pruning_ratio).to(device)
        sizes = [(kind, count, width) for kind in IMAGES for count in TOKENS for width in WIDTHS]
        found = [sized(pruner, *size, device, default_dtype(device), options.rounds) for size in sizes]
    finally:
        torch.set_num_threads(threads)
    return {**results, "benchmark": KIND, "sizes": found}


def timed(bench, names: list[str]) -> dict:
    """Seconds by round of the fast step, and of selection both ways, on its tokens."""
    bench.dual.mode = FAST
    pruner, select = bench.dual.dual_forward.pruner, bench.variants["selection"]
    bench.variants["selection_plain"] = partial(plainly, pruner, select)
    return {**bench.subject.said, "seconds_by_round": bench.measure(["fast", "selection", "selection_plain"])}


def plainly(pruner: Pruner, select: Callable[[], object]) -> None:
    """Selects in plain PyTorch."""
    pruner.plain_path = True
    try:
        select()
    finally:
        pruner.plain_path = False


def derive(run: dict, slow_ratio: float) -> dict:
    """Medians and quartiles of the times, and of their ratios within a round."""
    times = {name: torch.tensor(values, dtype=torch.float64) for name, values in run["seconds_by_round"].items()}
    ratios = {
        "share": times["selection"] / times["fast"],
        "plain_share": times["selection_plain"] / times["fast"],
        "gain": times["selection_plain"] / times["selection"],
    }
    return {
        "seconds": {name: quartiles(values) for name, values in times.items()},
        "ratios": {name: quartiles(values) for name, values in ratios.items()},
    }


def sized(
    pruner: Pruner, kind: str, count: int, width: int, device: torch.device, dtype: torch.dtype, rounds: int
) -> dict:
    """Seconds of selecting from one image of `count` tokens, both ways, one after the other in each round."""
    tokens = VisualTokens(image(kind, count, width).to(device, dtype))
    seconds = {"plain": [], "fast": []}
    for number in range(-1, rounds):  # one to warm up
        for name in seconds:
            synchronize(device)
            begun = time.perf_counter()
            plainly(pruner, partial(pruner, tokens)) if name == "plain" else pruner(tokens)
            synchronize(device)
            if number >= 0:
                seconds[name].append(time.perf_counter() - begun)
    gain = median(p / f for p, f in zip(*seconds.values(), strict=True))
    spreads = {name: quartiles(torch.tensor(values, dtype=torch.float64)) for name, values in seconds.items()}
    return {"tokens": kind, "visual_tokens": count, "width": width, "seconds": spreads, "gain": gain}


def image(kind: str, count: int, width: int) -> torch.Tensor:
    """Tokens `(1, count, width)`: independent noise, or tokens that share directions by regions."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(count, width, generator=generator)
    if kind == "noise":
        return noise[None]
    # A direction for each of 4 x 4 regions of a grid of at least `count` cells, (1, D, E, E).
    edge = -(-count // int(count**0.5))
    coarse = torch.randn(1, width, 4, 4, generator=generator)
    field = F.interpolate(coarse, size=(edge, edge), mode="nearest")
    # Noise of log-normal strength: most tokens have a near twin, some have none.
    strength = 0.05 * (0.7 * torch.randn(count, 1, generator=generator)).exp()
    return (field.flatten(2)[0, :, :count].mT + strength * noise)[None]


def report(results: dict, path: Path) -> None:
    """Prints the tables; writes Markdown and plot beside the JSON file `path`."""
    check_format(results, KIND)
    console = Console()
    console.print(setting_line(results), highlight=False)
    print_table(console, HEADER, run_rows(results))
    print_table(console, SIZE_HEADER, size_rows(results))
    plot = plot_selection(results, path.with_suffix(".png"))
    write_file(path.with_suffix(".md"), markdown(results, plot.name))


def run_rows(results: dict) -> list[tuple[str, ...]]:
    """A row per shape: its fast step, and selection both ways."""
    rows = []
    for run in results["runs"]:
        seconds, ratios = run["seconds"], run["ratios"]
        plain, own = (times_of(seconds[name]) for name in ("selection_plain", "selection"))
        shares = [f"{ratios[name]['median']:.1%}" for name in ("plain_share", "share")]
        step = milliseconds(seconds["fast"]["median"])
        rows.append(
            (run["shape"], str(run["batch"]), f"{run['visual_tokens']:.0f}", step, plain, shares[0], own, shares[1])
        )
    return rows


def size_rows(results: dict) -> list[tuple[str, ...]]:
    """A row per kind and size of image."""
    return [
        (
            IMAGES[size["tokens"]],
            f"{size['visual_tokens']:,}",
            f"{size['width']:,}",
            *(times_of(size["seconds"][name]) for name in WAYS),
            f"{size['gain']:.1f} x",
        )
        for size in results["sizes"]
    ]


def readme_table(results: dict) -> str:
    """Settings and tables, for a page that shows the plot itself."""
    check_format(results, KIND)
    tables = (markdown_table(HEADER, run_rows(results)), markdown_table(SIZE_HEADER, size_rows(results)))
    return "\n\n".join([setting_line(results), *tables])


def markdown(results: dict, plot: str) -> str:
    """The Markdown page."""
    parts = [
        "# Selecting visual tokens",
        "Selection alone, with merging and sizes: of the tokens of a shape's batch, beside its fast step, and of one "
        "image. 'Regions' are tokens near 16 directions, most of them with a near twin; 'noise' has nothing in "
        "common. Both ways are measured one after the other in each round.",
        readme_table(results),
        f"![Selection]({plot})",
        f"Measured {results['date']} UTC with `dualspeed bench --selection`.",
    ]
    return "\n\n".join(parts) + "\n"


def plot_selection(results: dict, path: Path) -> Path:
    """Draws the time of each way against the number of tokens, for each kind of image and width."""
    figure, axes = figure_of(9, 4, 1, len(WIDTHS))
    for axis, width in zip(axes[0], WIDTHS, strict=True):
        for kind, style in zip(IMAGES, ("-", ":"), strict=True):
            sizes = [size for size in results["sizes"] if (size["tokens"], size["width"]) == (kind, width)]
            counts = [size["visual_tokens"] for size in sizes]
            for way, label in WAYS.items():
                colour, marker = LINES[way]
                values = [1000 * size["seconds"][way]["median"] for size in sizes]
                said = f"{label}, {IMAGES[kind]}"
                axis.plot(counts, values, style, color=colour, marker=marker, linewidth=1.8, label=said)
        axis.set_xlabel("visual tokens")
        axis.set_ylabel("milliseconds an image")
        axis.set_title(f"width {width:,}", fontsize=10)
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0, 0].legend(frameon=False, fontsize=9)
    return save_figure(figure, path)
