"""What `dualspeed bench` makes of its measurements: ratios, targets, tables, a Markdown page and a plot."""

from __future__ import annotations

from pathlib import Path

import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from hf_dualspeed.results import markdown_table

STEPS = {
    "plain": "Trainer",
    "slow_without_distillation": "slow, no distillation",
    "slow": "slow, distillation",
    "fast": "fast",
}
PARTS = {
    "encoder": "vision encoder",
    "selection": "selection",
    "shortening": "shortening",
}
REST = "the rest"
# Okabe and Ito's colours, and a hatching each, so that the parts are told apart in black and white.
PART_STYLE = {
    "encoder": ("#0072B2", "//"),
    "selection": ("#D55E00", ""),
    "shortening": ("#009E73", ""),
    "rest": ("#56B4E9", ""),
}
FULL_STEP = "#999999"


TIME_OVER_FLOPS, SELECTION_SHARE, SHORTENING_SHARE, SLOW_OVER_PLAIN = 1.15, 0.03, 0.02, 1.02
HOST_WAITS = 1  # tensors need a size


def derive(seconds: dict[str, list[float]], flops: dict[str, int], waits: dict[str, int], slow_ratio: float) -> dict:
    """Medians and quartiles of the times and of the ratios within each round, and the targets."""
    times = {name: torch.tensor(values, dtype=torch.float64) for name, values in seconds.items()}
    plain, fast, slow = times["plain"], times["fast"], times["slow"]
    mixed = (1 - slow_ratio) * fast + slow_ratio * slow
    ratios = {
        "fast_over_plain": fast / plain,
        "fast_over_slow_without_distillation": fast / times["slow_without_distillation"],
        "slow_without_distillation_over_plain": times["slow_without_distillation"] / plain,
        "slow_over_plain": slow / plain,
        **{f"{part}_share": times[part] / fast for part in PARTS},
        "rest_share": 1 - sum(times[part] for part in PARTS) / fast,
        "expected_speedup": plain / mixed,
        "expected_speedup_by_pruning": times["slow_without_distillation"] / mixed,
    }
    flop_mixed = (1 - slow_ratio) * flops["fast"] + slow_ratio * flops["slow"]
    flop_ratios = {
        "fast_over_plain": flops["fast"] / flops["plain"],
        "fast_over_slow_without_distillation": flops["fast"] / flops["slow_without_distillation"],
        "slow_without_distillation_over_plain": flops["slow_without_distillation"] / flops["plain"],
        "slow_over_plain": flops["slow"] / flops["plain"],
        "expected_speedup": flops["plain"] / flop_mixed,
        "expected_speedup_by_pruning": flops["slow_without_distillation"] / flop_mixed,
    }
    summary = {name: quartiles(values) for name, values in ratios.items()}
    return {
        "flop_ratios": flop_ratios,
        "seconds": {name: quartiles(values) for name, values in times.items()},
        "ratios": summary,
        "host_waits": waits,
        "targets": targets(summary, flop_ratios, waits),
        "seconds_by_round": seconds,
    }


def quartiles(values: torch.Tensor) -> dict[str, float]:
    """Median and quartiles of one value per round."""
    points = torch.tensor([0.25, 0.5, 0.75], dtype=values.dtype)
    low, middle, high = values.quantile(points).tolist()
    return {"median": middle, "q1": low, "q3": high}


def targets(ratios: dict[str, dict], flop_ratios: dict[str, float], waits: dict[str, int]) -> list[dict]:
    """What a step should cost, what it does, and whether that is within the target."""
    excess = {
        full: ratios[key]["median"] / flop_ratios[key]
        for full, key in (
            ("plain step", "fast_over_plain"),
            ("slow step without distillation", "fast_over_slow_without_distillation"),
        )
    }
    rows = (
        *((f"time ratio over FLOP ratio, fast to {full}", value, TIME_OVER_FLOPS) for full, value in excess.items()),
        ("selection, share of a fast step", ratios["selection_share"]["median"], SELECTION_SHARE),
        ("shortening, share of a fast step", ratios["shortening_share"]["median"], SHORTENING_SHARE),
        (
            "slow step without distillation over plain step",
            ratios["slow_without_distillation_over_plain"]["median"],
            SLOW_OVER_PLAIN,
        ),
        (
            "times that selection and shortening wait for the device",
            waits["selection"] + waits["shortening"],
            HOST_WAITS,
        ),
    )
    return [{"name": name, "value": value, "limit": limit, "met": value <= limit} for name, value, limit in rows]


def step_rows(results: dict) -> list[tuple[str, ...]]:
    """Each step's time, FLOPs, and both over the plain step's; below them the fast step's parts."""
    seconds, flops, ratios = results["seconds"], results["flops"], results["ratios"]
    rows = []
    for name, label in STEPS.items():
        ratio = "1" if name == "plain" else spread(ratios[f"{name}_over_plain"], 3)
        work = flops[name] / flops["plain"]
        rows.append((label, milliseconds(seconds[name]), ratio, f"{flops[name] / 1e9:.2f}", f"{work:.3f}"))
    for name, label in PARTS.items():
        share = ratios[f"{name}_share"]
        rows.append((f"  {label}", milliseconds(seconds[name]), f"{share['median']:.1%} of fast", "", ""))
    rows.append((f"  {REST}", "", f"{ratios['rest_share']['median']:.1%} of fast", "", ""))
    return rows


HEADER = ("step", "time, ms", "time ratio", "GFLOP", "FLOP ratio")


def target_rows(results: dict) -> list[tuple[str, ...]]:
    """Each target, its limit, what was measured, and the verdict."""
    return [
        (
            target["name"],
            f"<= {target['limit']:g}",
            f"{target['value']:.3f}",
            "yes" if target["met"] else "NO",
        )
        for target in results["targets"]
    ]


TARGET_HEADER = ("target", "limit", "measured", "met")


def speedup_line(results: dict) -> str:
    """The expected speed-up in words."""
    measured, limits = results["ratios"], results["flop_ratios"]
    over, pruning = "expected_speedup", "expected_speedup_by_pruning"
    return (
        f"Expected speed-up with {results['settings']['slow_ratio']:.0%} slow steps: "
        f"{spread(measured[over], 2)} x over Trainer (by FLOPs alone {limits[over]:.2f} x), "
        f"{spread(measured[pruning], 2)} x over slow steps without distillation ({limits[pruning]:.2f} x)."
    )


def setting_line(results: dict) -> str:
    """Model, batch and machine in words."""
    shape, settings, machine = results["shape"], results["settings"], results["machine"]
    size = shape["parameters"]["language_model_without_embeddings"] / 1e6
    where = machine["accelerator"] if results["device"] != "cpu" else f"{machine['cpu']}, {machine['threads']} threads"
    return (
        f"LLaVA with a {size:.1f} M language model (without embeddings), batch {settings['batch']}, "
        f"{shape['visual_tokens']} visual and {shape['text_tokens']} text tokens, {settings['pruner']} "
        f"removing {settings['pruning_ratio']:.0%}; {results['dtype']} on {where}; "
        f"torch {results['versions']['torch']}, transformers {results['versions']['transformers']}; "
        f"{results['rounds']} rounds."
    )


def spread(value: dict, digits: int) -> str:
    """Median with its quartiles in brackets."""
    low, middle, high = (f"{value[key]:.{digits}f}" for key in ("q1", "median", "q3"))
    return f"{middle} [{low}, {high}]"


def milliseconds(value: dict) -> str:
    """[`spread`] of seconds, in milliseconds."""
    return spread({key: 1000 * number for key, number in value.items()}, 1)


def print_report(results: dict) -> None:
    """Prints the tables."""
    console = Console()
    console.print(setting_line(results), highlight=False)
    for header, rows in ((HEADER, step_rows(results)), (TARGET_HEADER, target_rows(results))):
        table = Table(header[0])
        for title in header[1:]:
            table.add_column(title, justify="right")
        for row in rows:
            # Brackets are quartiles here, not rich's markup.
            table.add_row(*(cell.replace("[", r"\[") for cell in row))
        console.print(table)
    console.print(speedup_line(results), markup=False, highlight=False)


def write_report(results: dict, path: Path) -> None:
    """Writes the Markdown page and the plot beside the JSON file `path`."""
    plot = plot_steps(results, path.with_suffix(".png"))
    path.with_suffix(".md").write_text(markdown(results, plot.name), encoding="utf-8")


def readme_table(results: dict) -> str:
    """Steps, targets and what was measured, for a page that shows the plot itself."""
    tables = (markdown_table(HEADER, step_rows(results)), markdown_table(TARGET_HEADER, target_rows(results)))
    return "\n\n".join([setting_line(results), *tables, speedup_line(results)])


def markdown(results: dict, plot: str) -> str:
    """The Markdown page."""
    parts = [
        "# Step times",
        "A step is forward and backward of one batch by the trainer's own `training_step`. Each round "
        "measures each variant once; shown are medians, with quartiles in brackets, of times and of ratios "
        "within a round. Trainer computes logits at all positions, DualSpeedTrainer at supervised ones only: "
        "'slow, no distillation' shows how much of the gain that is; the rest of it is pruning.",
        readme_table(results),
        f"FLOPs: {results['flop_counting']}.",
        f"![Step times]({plot})",
        f"Measured {results['date']} UTC with `dualspeed bench`.",
    ]
    return "\n\n".join(parts) + "\n"


def plot_steps(results: dict, path: Path) -> Path:
    """Draws the steps' median times, the fast one in its parts, with marks at what FLOPs alone would give."""
    figure = Figure(figsize=(8.5, 3.6), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    seconds, flops = results["seconds"], results["flops"]
    by_flops = [seconds["plain"]["median"] * flops[name] / flops["plain"] for name in STEPS]
    for row, (name, mark) in enumerate(zip(STEPS, by_flops, strict=True)):
        low, middle, high = (seconds[name][key] for key in ("q1", "median", "q3"))
        if name == "fast":
            _stack_parts(axis, row, results)
        else:
            axis.barh(row, middle, height=0.6, color=FULL_STEP)
        axis.errorbar(middle, row, xerr=[[middle - low], [high - middle]], color="black", capsize=3, linewidth=1)
        place = {"xytext": (6, 0), "textcoords": "offset points", "va": "center", "fontsize": 9}
        axis.annotate(f"{1000 * middle:.{0 if middle > 0.1 else 1}f} ms", (max(high, mark), row), **place)
    style = {"linestyle": "none", "marker": "|", "markersize": 26, "markeredgewidth": 2, "color": "#CC79A7"}
    axis.plot(by_flops, range(len(STEPS)), label="if time went with FLOPs", **style)
    _finish(axis, results)
    figure.savefig(path)
    return path


def _stack_parts(axis: Axes, row: int, results: dict) -> None:
    """The fast bar: its parts by their share of each round, so that they end where the step does."""
    whole, left = results["seconds"]["fast"]["median"], 0.0
    for name, label in {**PARTS, "rest": REST}.items():
        width = whole - left if name == "rest" else whole * results["ratios"][f"{name}_share"]["median"]
        colour, hatch = PART_STYLE[name]
        share = f"fast: {label} ({results['ratios'][f'{name}_share']['median']:.1%})"
        axis.barh(row, width, 0.6, left, color=colour, hatch=hatch, edgecolor="white", linewidth=0, label=share)
        left += width


def _finish(axis: Axes, results: dict) -> None:
    axis.set_yticks(range(len(STEPS)), list(STEPS.values()))
    axis.invert_yaxis()
    longest = max(results["seconds"][name]["q3"] for name in STEPS)
    axis.set_xlim(0, 1.15 * longest)
    axis.set_xlabel("seconds per step, forward and backward")
    shape, settings = results["shape"], results["settings"]
    axis.set_title(
        f"{shape['visual_tokens']} visual + {shape['text_tokens']} text tokens, batch {settings['batch']}, "
        f"{settings['pruner']} removing {settings['pruning_ratio']:.0%} "
        f"({results['device']}, {results['dtype']})",
        fontsize=10,
    )
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, fontsize=8, loc="upper center", bbox_to_anchor=(0.45, -0.18), ncols=2, markerscale=0.4)
