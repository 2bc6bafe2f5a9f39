"""`dualspeed bench --growth`: how a step's time and memory grow with the number of visual tokens."""

from __future__ import annotations

import math
from pathlib import Path
from statistics import linear_regression

import torch
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator
from rich.console import Console

from ..publishing.plots import describe, figure_of, save_figure
from ..utils.text import markdown_table
from ..utils.writing import write_file
from .options import BenchArguments
from .plots import LINES, model_size
from .report import check_format, expected_speedup, megabytes, print_table, quartiles, setting_line, times_of

KIND = "growth of training steps with visual tokens"
VARIANTS = ("plain", "fast", "slow")
LABELS = {"plain": "Trainer", "fast": "fast steps", "slow": "slow steps"}
HEADER = ("checkpointing", "visual tokens", "Trainer, ms", "fast, ms", "mix, ms", "speed-up", "FLOP limit")
MEMORY_HEADER = ("checkpointing", "visual tokens", "Trainer, MB", "fast, MB", "slow, MB")


def measure(options: BenchArguments) -> dict:
    """Measures all runs and fits lines to those of the first setting of checkpointing."""
    from .measure import measured

    results = measured(options, list(VARIANTS), derive)
    return {**results, "benchmark": KIND, "growth": growth(results["runs"])}


def derive(run: dict, slow_ratio: float) -> dict:
    """Medians and quartiles of the times, the time of a mix of fast and slow steps, and the speed-up."""
    # Times and the speed-up within each round: (rounds,).
    times = {name: torch.tensor(values, dtype=torch.float64) for name, values in run["seconds_by_round"].items()}
    speedup = expected_speedup(times, slow_ratio, "plain")
    times["mix"] = times["plain"] / speedup
    return {
        "seconds": {name: quartiles(values) for name, values in times.items()},
        "ratios": {"expected_speedup": quartiles(speedup)},
        "flop_ratios": {"expected_speedup": expected_speedup(run["flops"], slow_ratio, "plain")},
    }


def growth(runs: list[dict]) -> dict:
    """Lines of time and memory: points by visual tokens, and the exponent fitted to all points but the first."""
    runs = [run for run in runs if run["checkpointing"] == runs[0]["checkpointing"]]
    found = {"fitted_from": runs[min(1, len(runs) - 2)]["visual_tokens"], "seconds": {}, "memory": {}}
    for name in ("plain", "fast", "mix"):
        found["seconds"][name] = [{"visual_tokens": r["visual_tokens"], **r["seconds"][name]} for r in runs]
    for name in VARIANTS:
        found["memory"][name] = [{"visual_tokens": r["visual_tokens"], "median": r["memory"][name]} for r in runs]
    for lines in (found["seconds"], found["memory"]):
        for name, points in lines.items():
            upper = [point for point in points if point["visual_tokens"] >= found["fitted_from"]]
            lines[name] = {"points": points, "exponent": exponent(upper)}
    return found


def exponent(points: list[dict]) -> float:
    """The exponent of a power law: the slope of the least-squares line through the points' logarithms."""
    tokens = [math.log(point["visual_tokens"]) for point in points]
    return linear_regression(tokens, [math.log(point["median"]) for point in points]).slope


def report(results: dict, path: Path) -> None:
    """Prints the tables; writes Markdown and plot beside the JSON file `path`."""
    check_format(results, KIND)
    console = Console()
    console.print(setting_line(results), highlight=False)
    print_table(console, HEADER, time_rows(results))
    print_table(console, MEMORY_HEADER, memory_rows(results))
    console.print(exponent_line(results), highlight=False)
    plot = plot_growth(results, path.with_suffix(".png"))
    write_file(path.with_suffix(".md"), markdown(results, plot.name))


def label_of(name: str, results: dict) -> str:
    """The label of a line."""
    return LABELS.get(name) or f"DualSpeed, {results['settings']['slow_ratio']:.0%} slow"


def time_rows(results: dict) -> list[tuple[str, ...]]:
    """A row per run: times and speed-up."""
    return [
        (
            run["checkpointing"],
            f"{run['visual_tokens']:.0f}",
            *(times_of(run["seconds"][name]) for name in ("plain", "fast", "mix")),
            f"{run['ratios']['expected_speedup']['median']:.2f} x",
            f"{run['flop_ratios']['expected_speedup']:.2f} x",
        )
        for run in results["runs"]
    ]


def memory_rows(results: dict) -> list[tuple[str, ...]]:
    """A row per run: activation memory."""
    return [
        (run["checkpointing"], f"{run['visual_tokens']:.0f}", *(megabytes(run["memory"][name]) for name in VARIANTS))
        for run in results["runs"]
    ]


def exponent_line(results: dict) -> str:
    """The fitted exponents in words."""
    lines = results["growth"]
    said = {
        quantity: ", ".join(f"{label_of(name, results)} {line['exponent']:.2f}" for name, line in lines[word].items())
        for quantity, word in (("time", "seconds"), ("memory", "memory"))
    }
    return (
        f"Exponents, fitted to the logarithms from {lines['fitted_from']:.0f} visual tokens on: time: {said['time']}; "
        f"memory of activations: {said['memory']}."
    )


def readme_table(results: dict) -> str:
    """Settings, times, speed-up and exponents, for a page that shows the plot itself."""
    check_format(results, KIND)
    return "\n\n".join([setting_line(results), markdown_table(HEADER, time_rows(results)), exponent_line(results)])


def markdown(results: dict, plot: str) -> str:
    """The Markdown page."""
    run = results["runs"][0]
    parts = [
        "# Growth with the number of visual tokens",
        f"{run['shape']} with one square image per sample, of more and more patches, batch {run['batch']} and "
        f"{run['text_tokens']:.0f} text tokens. 'Mix' is the expected time of a step, "
        f"{results['settings']['slow_ratio']:.0%} of them slow. A training needs the memory of its slow steps; one "
        "sample cannot be split.",
        readme_table(results),
        f"![Growth]({plot})",
        markdown_table(MEMORY_HEADER, memory_rows(results)),
        f"FLOPs: {results['flop_counting']}.",
        f"Memory: {results['memory_counting']}.",
        f"Measured {results['date']} UTC with `dualspeed bench --growth`.",
    ]
    return "\n\n".join(parts) + "\n"


def _draw_line(axis: Axes, name: str, line: dict, unit: float, results: dict) -> None:
    colour, marker = LINES[name]
    tokens = [point["visual_tokens"] for point in line["points"]]
    values = [point["median"] / unit for point in line["points"]]
    label = f"{label_of(name, results)}: {line['exponent']:.2f}"
    axis.plot(tokens, values, color=colour, marker=marker, markersize=6, linewidth=1.8, label=label)


def plot_growth(results: dict, path: Path) -> Path:
    """Draws time and memory against the number of visual tokens on logarithmic axes."""
    figure, axes = figure_of(9, 4.4, 1, 2)
    settings = results["settings"]
    panels = {"seconds": ("seconds per step", 1), "memory": ("peak of activations, GB", 1e9)}
    for axis, (quantity, (label, unit)) in zip(axes[0], panels.items(), strict=True):
        for name, points in results["growth"][quantity].items():
            _draw_line(axis, name, points, unit, results)
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        tokens = [point["visual_tokens"] for point in results["growth"][quantity]["plain"]["points"]]
        axis.set_xticks(tokens, [f"{number:,.0f}" for number in tokens])
        axis.xaxis.set_minor_locator(NullLocator())
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.yaxis.set_minor_locator(NullLocator())
        axis.set_xlabel("visual tokens")
        axis.set_ylabel(label)
        axis.grid(alpha=0.3, which="major")
        axis.spines[["top", "right"]].set_visible(False)
        fitted = f"exponents from {results['growth']['fitted_from']:,.0f} tokens on"
        place = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.16)}
        axis.legend(frameon=False, fontsize=9, title=fitted, title_fontsize=9, **place)
    run = results["runs"][0]
    title = (
        f"{run['shape']}, batch {run['batch']}, checkpointing {run['checkpointing']}, {settings['pruner']} removing "
        f"{settings['pruning_ratio']:.0%}"
    )
    describe(figure, title, results, model_size(results))
    return save_figure(figure, path)
