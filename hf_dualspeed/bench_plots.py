"""Pictures of `dualspeed bench`. Okabe and Ito's colours: colour-blind readers can tell them apart."""

from __future__ import annotations

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator, PercentFormatter

from hf_dualspeed.bench_report import FAST_PARTS, PARTS, REST, STEPS, milliseconds

# A hatching too, so that the parts are told apart in black and white.
PART_STYLE = {
    "encoder": ("#0072B2", "//"),
    "selection": ("#D55E00", ""),
    "shortening": ("#009E73", ""),
    "rest": ("#56B4E9", ""),
}
FULL_STEP, MARK = "#999999", "#CC79A7"
ARMS = {"random": ("#999999", "", "batches at random"), "grouped": ("#0072B2", "//", "batches of like length")}
LINES = {"plain": ("#999999", "s"), "fast": ("#56B4E9", "o"), "mix": ("#0072B2", "^"), "slow": ("#D55E00", "v")}


def figure_of(width: float, height: float, rows: int, columns: int) -> tuple[Figure, list[list[Axes]]]:
    """A figure of its own rather than pyplot's: no display, and no state shared with the caller's figures."""
    figure = Figure(figsize=(width, height), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, squeeze=False)


def plot_steps(results: dict, path: Path) -> Path:
    """Draws each run's median step times, the fast one in its parts, with marks at what FLOPs alone would give."""
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
    figure.suptitle(
        f"{settings['pruner']} removing {settings['pruning_ratio']:.0%}, {settings['slow_ratio']:.0%} slow steps "
        f"({results['device']}, {results['dtype']})",
        fontsize=11,
    )
    figure.savefig(path)
    return path


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
        axis.annotate(f"{milliseconds(middle)} ms", (max(high, mark), row), **place)
    style = {"linestyle": "none", "marker": "|", "markersize": 20, "markeredgewidth": 2, "color": MARK}
    axis.plot(by_flops, list(places), label="if time went with FLOPs", **style)
    axis.set_ylim(len(steps) - 0.5, -0.5)
    axis.xaxis.set_major_locator(MaxNLocator(5))
    axis.set_xlim(0, 1.22 * max([seconds[name]["q3"] for name in places.values()] + by_flops))
    speedup = run["ratios"]["expected_speedup"]["median"]
    axis.set_title(f"{run['shape']}, checkpointing {run['checkpointing']}: {speedup:.2f} x", fontsize=10)
    axis.spines[["top", "right"]].set_visible(False)


def _stack_parts(axis: Axes, row: int, run: dict) -> None:
    """The fast bar: its parts by their share of each round, so that they end where the step does."""
    whole, left = run["seconds"]["fast"]["median"], 0.0
    for name in (*FAST_PARTS, "rest"):
        width = whole - left if name == "rest" else whole * run["ratios"][f"{name}_share"]["median"]
        colour, hatch = PART_STYLE[name]
        label = f"fast: {PARTS.get(name, REST)}"
        axis.barh(row, width, 0.6, left, color=colour, hatch=hatch, edgecolor="white", linewidth=0, label=label)
        left += width


def plot_profile(results: dict, path: Path) -> Path:
    """Draws what a fast step consists of: its phases, and the operators that compute meanwhile."""
    from hf_dualspeed.bench_profile import PHASES

    runs = results["runs"]
    figure, axes = figure_of(10, 0.8 + 2.6 * len(runs), len(runs), 2)
    for row, run in zip(axes, runs, strict=True):
        for axis, parts, title in zip(row, ("phases", "operators"), ("by phase", "by kind of operator"), strict=True):
            names = [PHASES.get(name, name) for name in run[parts]]
            values = [1000 * value["median"] for value in run[parts].values()]
            axis.barh(names, values, height=0.65, color=PART_STYLE["encoder"][0])
            for place, value in enumerate(values):
                share = value / 1000 / run["seconds"]["median"]
                axis.annotate(
                    f"{share:.1%}", (value, place), (4, 0), textcoords="offset points", va="center", fontsize=9
                )
            axis.invert_yaxis()
            axis.set_xlim(0, 1.18 * max(values))
            axis.set_xlabel("milliseconds")
            axis.set_title(f"{run['shape']}, a fast step {title}", fontsize=10)
            axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)
    return path


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
    figure.suptitle(
        f"{run['shape']}, batch {run['batch']}, checkpointing {run['checkpointing']}, {settings['pruner']} removing "
        f"{settings['pruning_ratio']:.0%} ({results['device']}, {results['dtype']})",
        fontsize=11,
    )
    figure.savefig(path)
    return path


def _draw_line(axis: Axes, name: str, line: dict, unit: float, results: dict) -> None:
    from hf_dualspeed.bench_growth import label_of

    colour, marker = LINES[name]
    tokens = [point["visual_tokens"] for point in line["points"]]
    values = [point["median"] / unit for point in line["points"]]
    label = f"{label_of(name, results)}: {line['exponent']:.2f}"
    axis.plot(tokens, values, color=colour, marker=marker, markersize=6, linewidth=1.8, label=label)


def plot_lengths(results: dict, path: Path) -> Path:
    """Draws the share of padding, and the time of a step over one of random batches, by kind of steps."""
    from hf_dualspeed.bench_lengths import GROUPED, RANDOM, labels, shares

    figure, (axes,) = figure_of(9, 3.6, 1, 2)
    run, names = results["runs"][0], labels(results)
    seconds = {arm: run["seconds"][arm] for arm in (RANDOM, GROUPED)}
    panels = {
        "padding, share of tokens": {arm: list(shares(results, arm).values()) for arm in seconds},
        "time of a step, random batches = 1": {
            RANDOM: [1.0] * len(names),
            GROUPED: [1 / run["gains"][name]["median"] for name in names],
        },
    }
    for axis, (label, values) in zip(axes, panels.items(), strict=True):
        form = "{:.0%}" if label.startswith("padding") else "{:.2f}"
        for offset, (arm, (colour, hatch, said)) in zip((-0.2, 0.2), ARMS.items(), strict=True):
            places = [place + offset for place in range(len(names))]
            style = {"color": colour, "hatch": hatch, "edgecolor": "white", "linewidth": 0, "label": said}
            bars = axis.bar(places, values[arm], 0.38, **style)
            axis.bar_label(bars, [form.format(value) for value in values[arm]], padding=2, fontsize=9)
        axis.set_xticks(range(len(names)), list(names.values()))
        axis.set_ylabel(label)
        if label.startswith("padding"):
            axis.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        axis.set_ylim(0, 1.15 * max(max(column) for column in values.values()))
        axis.spines[["top", "right"]].set_visible(False)
    handles, said = axes[0].get_legend_handles_labels()
    figure.legend(handles, said, frameon=False, loc="outside lower center", ncols=2)
    settings = results["settings"]
    figure.suptitle(
        f"{run['shape']}, batch {run['batch']}, texts of drawn lengths, {settings['pruner']} removing "
        f"{settings['pruning_ratio']:.0%} ({results['device']}, {results['dtype']})",
        fontsize=11,
    )
    figure.savefig(path)
    return path
