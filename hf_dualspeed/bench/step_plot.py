"""The plot of `dualspeed bench`: the time of each step, and of the fast step's parts."""

from __future__ import annotations

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from ..publishing.plots import describe, figure_of, save_figure
from .plots import FULL_STEP, MARK, PART_STYLE, model_size
from .report import FAST_PARTS, PARTS, REST, STEPS


def plot_steps(results: dict, path: Path) -> Path:
    """Draws median step times of each run, the fast step in parts, with marks where times follow FLOPs."""
    runs = results["runs"]
    columns = 1 if len(runs) == 1 else 2
    rows = -(-len(runs) // columns)
    figure, axes = figure_of(5 * columns if columns > 1 else 8, 0.8 + 2.1 * rows, rows, columns)
    panels = [axis for row in axes for axis in row]
    steps = {name: label for name, label in STEPS.items() if any(name in run["seconds"] for run in runs)}
    for number, (axis, run) in enumerate(zip(panels, runs, strict=False)):
        _draw_run(axis, run, list(steps))
        axis.set_yticks(range(len(steps)), list(steps.values()) if number % columns == 0 else [""] * len(steps))
    for axis in panels[len(runs) :]:
        axis.set_axis_off()
    for axis in panels[max(0, len(runs) - columns) : len(runs)]:
        axis.set_xlabel("seconds per step, forward and backward")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, frameon=False, fontsize=9, loc="outside lower center", ncols=3, markerscale=0.5)
    settings = results["settings"]
    title = f"{settings['pruner']} removing {settings['pruning_ratio']:.0%}, {settings['slow_ratio']:.0%} slow steps"
    describe(figure, f"Time of a training step: {title}", results, model_size(results))
    return save_figure(figure, path)


def _draw_run(axis: Axes, run: dict, steps: list[str]) -> None:
    seconds, flops = run["seconds"], run["flops"]
    places = {row: name for row, name in enumerate(steps) if name in seconds}
    by_flops = [seconds["plain"]["median"] * flops[name] / flops["plain"] for name in places.values()]
    for (row, name), mark in zip(places.items(), by_flops, strict=True):
        low, middle, high = (seconds[name][key] for key in ("q1", "median", "q3"))
        if name == "fast":
            _stack_parts(axis, row, run)
        else:
            axis.barh(row, middle, height=0.6, color=FULL_STEP)
        axis.errorbar(middle, row, xerr=[[middle - low], [high - middle]], color="black", capsize=3, linewidth=1)
        place = {"xytext": (7, 0), "textcoords": "offset points", "va": "center", "fontsize": 9}
        axis.annotate(f"{middle:.3g} s", (max(high, mark), row), **place)
    style = {"linestyle": "none", "marker": "|", "markersize": 20, "markeredgewidth": 2, "color": MARK}
    axis.plot(by_flops, list(places), label="if time went with FLOPs", **style)
    axis.set_ylim(len(steps) - 0.5, -0.5)
    axis.xaxis.set_major_locator(MaxNLocator(5))
    axis.set_xlim(0, 1.22 * max([seconds[name]["q3"] for name in places.values()] + by_flops))
    speedup = run["ratios"]["expected_speedup"]["median"]
    axis.set_title(f"{run['shape']}, checkpointing {run['checkpointing']}: {speedup:.2f}x as fast", fontsize=10)
    axis.spines[["top", "right"]].set_visible(False)


def _stack_parts(axis: Axes, row: int, run: dict) -> None:
    """Draws the fast bar in parts, by their share of a round. "The rest" ends where the step does."""
    whole, left = run["seconds"]["fast"]["median"], 0.0
    for name in (*FAST_PARTS, "rest"):
        width = whole - left if name == "rest" else whole * run["ratios"][f"{name}_share"]["median"]
        colour, hatch = PART_STYLE[name]
        label = f"fast: {PARTS.get(name, REST)}"
        axis.barh(row, width, 0.6, left, color=colour, hatch=hatch, edgecolor="white", linewidth=0, label=label)
        left += width
