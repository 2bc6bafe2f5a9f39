"""Tables and plot of `python -m benchmarks.ablation`, from the results file alone."""

from __future__ import annotations

from itertools import accumulate
from pathlib import Path
from statistics import mean

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from hf_dualspeed.publishing.plots import describe, figure_of, save_figure
from hf_dualspeed.utils.text import in_thousands, markdown_table

from ..common import cell, print_table
from .plan import (
    BASELINE,
    CURVE_QUESTIONS,
    FORMAT,
    MEASURED,
    MERGED_ONLY,
    ORIGINAL,
    PAPER,
    PLAIN_SETUP,
    REFERENCE,
    TIMED,
    TODAYS,
    of_seven_billion,
)
from .worlds import SHOWN

HEADER = ("trained with", "all tokens", "pruned tokens", "retention", "seconds", "speed-up", "steps", "slow")
SECONDS = slice(4, 6)  # the timed columns
# Okabe and Ito's colours: colour-blind readers can tell them apart.
MERGED, DISCARDED, KEPT = "merged, log(size)", "discarded, as in the paper", "original positions"
LOOKS = {
    MERGED: ("#0072B2", "o"),
    DISCARDED: ("#D55E00", "s"),
    KEPT: ("#009E73", "^"),
    "full tokens": ("#000000", "D"),
}
# Colours and names in learning curves, where a table's order does not explain its names.
CURVES = {
    BASELINE: (LOOKS["full tokens"][0], "full tokens"),
    PAPER + REFERENCE: (LOOKS[DISCARDED][0], "the paper's DualSpeed, 10 % slow steps"),
    MERGED_ONLY.key: ("#56B4E9", "pruned only, others merged"),
    REFERENCE: (LOOKS[MERGED][0], "DualSpeed, others merged, 5 % slow steps"),
    TODAYS.key: (LOOKS[KEPT][0], "DualSpeed, others merged, original positions, 5 % slow steps"),
}
SAME_TIME = "equal time"  # the group that is drawn over time
PLAIN = {BASELINE, *(of_seven_billion(speed_up).key for speed_up in MEASURED)}


def write_report(results: dict, path: Path) -> None:
    """Prints the tables, and draws the plot beside the results file `path`."""
    for group in results["groups"]:
        print_table(header(results), group_rows(results, group), group)
    plot(results, path.with_suffix(".png"))
    if results.get("timed", True) and any(run.get("curve") for run in results["runs"]):
        plot_curves(results, path.with_name(f"{path.stem}_curve.png"))


def readme_table(results: dict) -> str:
    """Caption and Markdown tables of all groups, for docs/ablation.md."""
    tables = [f"**{group.capitalize()}**\n\n{group_table(results, group)}" for group in results["groups"]]
    return "\n\n".join([caption(results), *tables])


def caption(results: dict) -> str:
    """Describes the numbers of the tables."""
    settings, here, installed = results["settings"], results["machine"], results["versions"]
    size, shows = settings["size"], SHOWN[world_named(settings)]
    scenes = shows.partition(" of ")[0]  # "grids", of "grids of Fashion-MNIST"
    decay, precision = settings.get("decay"), " Products of matrices are in bfloat16." if settings.get("bf16") else ""
    rate = f" Learning rate: a plateau, and a linear decay over the last {decay:.0%} of the steps." if decay else ""
    where = here["cpu"] if settings["cpu"] else here["accelerator"]
    clock = " Seconds are processor time of one thread." if results.get("by_processor") else ""
    compared = (
        f"Retention and speed-up compare with full tokens of the same seed; the vision tower, whose features are "
        f"stored, is in no time.{clock}"
        if results.get("timed", True)
        else "Retention compares with full tokens of the same seed. Other work ran beside some runs, so none is timed."
    )
    return (
        f"{settings['steps']} optimizer steps of {settings['batch_size']} conversations about "
        f"{size['train_grids'] // 2:,} {shows}; accuracy on {results['n']:,} questions about "
        f"{size['test_grids']:,} {scenes} of the test split, of which the most frequent answer to each kind of "
        f"question has {results['majority']:.1%}. Mean over {len(results['seeds'])} seed(s), in brackets the "
        f"smallest and the largest value.{rate}{precision} {compared} Machine: {where}, {results['jobs']} run(s) at a "
        f"time with {settings['threads']} CPU thread(s) each; torch {installed['torch']}, transformers "
        f"{installed['transformers']}. Command: `{results['command']}`"
    )


def group_table(results: dict, group: str) -> str:
    """The Markdown table of a group."""
    return markdown_table(header(results), group_rows(results, group))


def header(results: dict) -> tuple[str, ...]:
    """The columns of a group's table."""
    return HEADER if results.get("timed", True) else (*HEADER[: SECONDS.start], *HEADER[SECONDS.stop :])


def group_rows(results: dict, group: str) -> list[tuple[str, ...]]:
    """The rows of a group's table."""
    rows = []
    for key, name in results["groups"][group]:
        own = results["summary"][key]
        shares = [cell(own[column], "{:.1%}") for column in ("full", "pruned", "retention")]
        times = [f"{own['seconds']['mean']:.0f}", cell(own["speed_up"], "{:.2f}", "x")]
        times = times if results.get("timed", True) else []
        steps = own["steps"]
        rows.append((name, *shares, *times, f"{sum(steps.values()):.0f}", f"{steps['slow']:.0f}"))
    return rows


def kind_of(key: str, results: dict) -> str:
    """The kind of a variant's fast view. Files of the first format have only the paper's."""
    if key.endswith(BASELINE) or key in PLAIN:
        return "full tokens"
    if key.endswith(ORIGINAL):
        return KEPT
    return DISCARDED if PAPER in key or results.get("format", 1) < FORMAT else MERGED


def plot(results: dict, path: Path) -> None:
    """Draws accuracy with all tokens: a panel per group, small marks for seeds and large ones for their mean. Runs that
    were given the same time are drawn over the time that they took."""
    groups = list(results["groups"])
    columns = min(2, len(groups))
    lines = -(-len(groups) // columns)
    most = max(len(results["groups"][group]) for group in groups)
    figure, axes = figure_of(
        (9 if groups == [SAME_TIME] else 7) * columns,
        lines * (1.6 + (0.45 if groups == [SAME_TIME] else 0.3) * most),
        lines,
        columns,
    )
    panels = axes.flatten()
    for axis, group in zip(panels, groups, strict=False):
        draw = _draw_times if group == SAME_TIME and results.get("timed", True) else _draw_group
        draw(axis, results, group)
    for axis in panels[len(groups) :]:
        axis.set_axis_off()
    handles = {
        label: handle for axis in panels for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)
    }
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=3, frameon=False, fontsize=10)
    entitle(figure, results)
    save_figure(figure, path, dpi=130)


def entitle(figure: Figure, results: dict) -> None:
    """Titles a figure with task, steps, seeds, size of the language model, hardware and date."""
    settings = results["settings"]
    shows, size = SHOWN[world_named(settings)], settings["size"]
    title = f"{shows[0].upper()}{shows[1:]}, {settings['steps']} steps of {settings['batch_size']}"
    seeds, whole = len(results["seeds"]), results.get("language_model_parameters")
    of = f"{in_thousands(whole)} parameters" if whole else f"{size['layers']} layers of {size['hidden_size']}"
    describe(figure, f"{title}, {seeds} seed{'s' * (seeds > 1)}", results, f"language model of {of}")


def _draw_times(axis: Axes, results: dict, group: str) -> None:
    ends = []
    for key, name in results["groups"][group]:
        kind, own = kind_of(key, results), results["summary"][key]
        colour, marker = LOOKS[kind]
        runs = [run for run in results["runs"] if run["way"] == key]
        axis.scatter(
            [run["seconds"] for run in runs], [run["full"]["all"] for run in runs], s=12, color=colour, marker=marker
        )
        place = (own["seconds"]["mean"], own["full"]["mean"])
        axis.scatter(*place, s=110, facecolors="none", edgecolors=colour, marker=marker, linewidths=1.8, label=kind)
        ends.append((place[1], place[0], name, colour))
    # Names stand in a column on the right, in the order of their points, and as near to their heights as there is room:
    # in the middle between where they come from below, and from above.
    ends.sort()
    room = (axis.get_ylim()[1] - axis.get_ylim()[0]) / max(14, len(ends))
    heights = [height for height, *_ in ends]
    above = list(accumulate(heights, lambda before, height: max(height, before + room)))
    below = list(accumulate(reversed(heights), lambda before, height: min(height, before - room)))[::-1]
    for (height, seconds, name, colour), *places in zip(ends, above, below, strict=True):
        line = {"arrowstyle": "-", "color": colour, "linewidth": 0.6, "alpha": 0.5, "shrinkB": 7, "relpos": (0, 0.5)}
        at = {"xytext": (1.04, mean(places)), "textcoords": axis.get_yaxis_transform(), "va": "center"}
        axis.annotate(name, (seconds, height), fontsize=9, color=colour, arrowprops=line, **at)
    axis.set_xlim(0, 1.05 * max(seconds for _, seconds, *_ in ends))
    axis.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axis.set_xlabel("seconds of training (small: each seed, large: their mean)")
    axis.set_ylabel("accuracy with all tokens")
    axis.set_title(group.capitalize(), fontsize=12)
    axis.grid(alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)


def plot_curves(results: dict, path: Path) -> None:
    """Draws accuracy with all tokens against seconds of training: a line per variant, the mean over its seeds, in a
    band from their smallest to their largest value. Variants that were given the same time are marks at their ends."""
    figure, axes = figure_of(9, 5.5, 1, 1)
    (axis,) = axes.flatten()
    names = dict(pair for group in results["groups"].values() for pair in group)
    for key, name in names.items():
        curves = [run["curve"] for run in results["runs"] if run["way"] == key and run.get("curve")]
        if not curves:
            continue
        # Seeds of one variant measure at the same steps: means (points,) and extremes over them.
        points = list(zip(*curves, strict=True))
        seconds = [mean(second for _, second, _ in at) for at in points]
        low, middle, high = ([of([share for *_, share in at]) for at in points] for of in (min, mean, max))
        colour, label = CURVES.get(key.removeprefix(TIMED), (LOOKS[kind_of(key, results)][0], name))
        if key.startswith(TIMED):
            lengths = [[middle[-1] - low[-1]], [high[-1] - middle[-1]]]
            mark = {"fmt": "D", "markersize": 8, "markerfacecolor": "white", "capsize": 4, "zorder": 5}
            axis.errorbar(seconds[-1], middle[-1], lengths, color=colour, label=f"{label}, in DualSpeed's time", **mark)
        else:
            axis.fill_between(seconds, low, high, color=colour, alpha=0.12, linewidth=0)
            axis.plot(seconds, middle, color=colour, marker="o", markersize=3, label=label)
    axis.set_xlabel("processor seconds of training" if results.get("by_processor") else "seconds of training")
    axis.set_ylabel(f"accuracy with all tokens, on {min(results['n'], CURVE_QUESTIONS)} questions")
    axis.set_xlim(left=0)
    axis.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axis.grid(alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, fontsize=9, loc="lower right")
    entitle(figure, results)
    save_figure(figure, path, dpi=130)


def world_named(settings: dict) -> str:
    """The world of results, which the first ones do not name."""
    return settings.get("world", PLAIN_SETUP.world)


def _draw_group(axis: Axes, results: dict, group: str) -> None:
    variants = results["groups"][group]
    for row, (key, _) in enumerate(variants):
        kind = kind_of(key, results)
        colour, marker = LOOKS[kind]
        own = [run["full"]["all"] for run in results["runs"] if run["way"] == key]
        axis.scatter(own, [row] * len(own), s=14, color=colour, marker=marker, linewidths=0)
        center = results["summary"][key]["full"]["mean"]
        axis.scatter(
            center, row, s=110, facecolors="none", edgecolors=colour, marker=marker, linewidths=1.8, label=kind
        )
    base = results["summary"].get(BASELINE)
    if base is not None:
        axis.axvline(base["full"]["mean"], color="#000000", linestyle="--", linewidth=1)
    axis.set_yticks(range(len(variants)), [name for _, name in variants], fontsize=10)
    axis.set_ylim(len(variants) - 0.4, -0.6)
    axis.xaxis.set_major_formatter(PercentFormatter(1))
    axis.set_xlabel("accuracy with all tokens")
    axis.set_title(group.capitalize(), fontsize=12)
    axis.grid(axis="x", alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)
