"""What `dualspeed bench` makes of its measurements: ratios, targets, tables and a Markdown page."""

from __future__ import annotations

import torch
from rich.console import Console
from rich.table import Table

from ..utils.text import markdown_table

STEPS = {
    "plain": "Trainer",
    "slow_without_distillation": "slow, no distillation",
    "slow": "slow",
    "fast": "fast",
    "fast_cached": "fast, cached features",
    "fast_discarding": "fast, others discarded, plain attention",
}
PARTS = {
    "encoder": "vision encoder",
    "selection": "selection",
    "shortening": "shortening",
    "teacher": "teacher",
}
FAST_PARTS = ("encoder", "selection", "shortening")
REST = "the rest"
# The least speed-up over a Trainer with the same setting of activation checkpointing, at the defaults.
SPEEDUPS = {
    ("llava-1.5", "on"): 3.7,
    ("llava-next", "on"): 7.0,
    ("llava-1.5", "off"): 2.7,
    ("llava-next", "off"): 6.0,
}
# What merging and proportional attention may add to a fast step.
VIEW_COST = 1.03
SHARE_OF_LIMIT, SLOW_OVER_FAST_MEMORY, SELECTION_SHARE, SHORTENING_SHARE = 0.95, 1.25, 0.03, 0.02
HOST_WAITS = 1  # tensors need a size
OWN = ("hf_dualspeed", "pruners")  # folders


def check_format(results: dict, kind: str = "training steps, forward and backward") -> None:
    """Raises a `ValueError` unless `results` are those of this version's benchmark of a `kind`."""
    if not isinstance(results, dict) or "runs" not in results:
        raise ValueError(
            "`output` holds no `runs`: it was written by an earlier version of `dualspeed bench`, or by something "
            "else. Measure anew, without --render-only."
        )
    if results["benchmark"] != kind:
        raise ValueError(
            f"`output` holds {results['benchmark']!r}, not {kind!r}. Give --growth or --lengths or "
            "--profile, or none of them, as it was measured."
        )


def derive(run: dict, slow_ratio: float) -> dict:
    """Medians and quartiles of the times and of the ratios within each round, the FLOP limit, and the targets."""
    times = {name: torch.tensor(values, dtype=torch.float64) for name, values in run["seconds_by_round"].items()}
    fast = times["fast"]
    limit = expected_speedup(run["flops"], slow_ratio, "plain")
    speedup = expected_speedup(times, slow_ratio, "plain")
    steps = [name for name in steps_of(run) if name != "plain"]
    ratios = {
        **{f"{name}_over_plain": times[name] / times["plain"] for name in steps},
        **{f"{part}_share": times[part] / fast for part in FAST_PARTS},
        "rest_share": 1 - sum(times[part] for part in FAST_PARTS) / fast,
        "expected_speedup": speedup,
        "share_of_limit": speedup / limit,
        "expected_speedup_by_pruning": expected_speedup(times, slow_ratio, "slow_without_distillation"),
    }
    if "fast_discarding" in times:
        ratios["fast_over_discarding"] = fast / times["fast_discarding"]
    if "fast_cached" in times:  # its slow steps are given no cache
        cached = {**times, "fast": times["fast_cached"]}
        ratios["expected_speedup_cached"] = expected_speedup(cached, slow_ratio, "plain")
    flops, memory = run["flops"], run["memory"]
    derived = {
        "seconds": {name: quartiles(values) for name, values in times.items()},
        "ratios": {name: quartiles(values) for name, values in ratios.items()},
        "flop_ratios": {
            **{f"{name}_over_plain": flops[name] / flops["plain"] for name in steps},
            "expected_speedup": limit,
            "expected_speedup_by_pruning": expected_speedup(flops, slow_ratio, "slow_without_distillation"),
        },
        "memory_ratios": {
            "slow_over_fast": memory["slow"] / memory["fast"],
            "plain_over_fast": memory["plain"] / memory["fast"],
        },
    }
    return {**derived, "targets": targets({**run, **derived})}


def steps_of(run: dict) -> dict[str, str]:
    """The steps of a run and their labels: where features cannot be cached, there is none with a cache."""
    return {name: label for name, label in STEPS.items() if name in run["flops"]}


def expected_speedup(costs: dict, slow_ratio: float, over: str):
    """The cost of the steps `over` by that of a mix of fast and slow ones."""
    return costs[over] / ((1 - slow_ratio) * costs["fast"] + slow_ratio * costs["slow"])


def quartiles(values: torch.Tensor) -> dict[str, float]:
    """Median and quartiles of one value per round."""
    points = torch.tensor([0.25, 0.5, 0.75], dtype=values.dtype)
    low, middle, high = values.quantile(points).tolist()
    return {"median": middle, "q1": low, "q3": high}


def targets(run: dict) -> dict[str, dict]:
    """What a run should reach, what it does, and whether that is within the target."""
    ratios, waits = run["ratios"], run["host_waits"]
    least, most = {}, {}
    if (run["shape"], run["checkpointing"]) in SPEEDUPS:
        wanted = SPEEDUPS[run["shape"], run["checkpointing"]]
        least["speedup"] = (ratios["expected_speedup"]["median"], wanted)
    least["share_of_limit"] = (ratios["share_of_limit"]["median"], SHARE_OF_LIMIT)
    if run["slow_splits"] == "auto":
        most["slow_over_fast_memory"] = (run["memory_ratios"]["slow_over_fast"], SLOW_OVER_FAST_MEMORY)
    if "fast_over_discarding" in ratios:
        most["view_cost"] = (ratios["fast_over_discarding"]["median"], VIEW_COST)
    most["selection_share"] = (ratios["selection_share"]["median"], SELECTION_SHARE)
    most["shortening_share"] = (ratios["shortening_share"]["median"], SHORTENING_SHARE)
    most["host_waits"] = (waits["selection"] + waits["shortening"], HOST_WAITS)
    rows = {name: {"value": v, "at_least": limit, "met": v >= limit} for name, (v, limit) in least.items()}
    return rows | {name: {"value": v, "at_most": limit, "met": v <= limit} for name, (v, limit) in most.items()}


# --- tables -------------------------------------------------------------------------------------------------------

HEADER = (
    "shape",
    "checkpointing",
    "Trainer, ms",
    "fast, ms",
    "slow, ms",
    "speed-up",
    "FLOP limit",
    "share of it",
    "with cached features",
    "activations, MB: fast / slow / Trainer",
)
TARGETS = {
    "speedup": ("speed-up", "{:.2f}"),
    "share_of_limit": (f"share of FLOP limit >= {SHARE_OF_LIMIT}", "{:.2f}"),
    "slow_over_fast_memory": (f"memory, slow / fast <= {SLOW_OVER_FAST_MEMORY}", "{:.2f}"),
    "view_cost": (f"merged and proportional, over neither <= {VIEW_COST}", "{:.3f}"),
    "selection_share": (f"selection <= {SELECTION_SHARE:.0%}", "{:.1%}"),
    "shortening_share": (f"shortening <= {SHORTENING_SHARE:.0%}", "{:.1%}"),
    "host_waits": (f"host waits <= {HOST_WAITS}", "{:d}"),
}
TARGET_HEADER = ("shape", "checkpointing", *(title for title, _ in TARGETS.values()))
STEP_HEADER = ("step", "time, ms", "over Trainer", "GFLOP", "over Trainer", "activations, MB")


def run_rows(results: dict) -> list[tuple[str, ...]]:
    """A line per run: times, speed-up, its limit, and memory."""
    return [
        (
            run["shape"],
            run["checkpointing"],
            *(milliseconds(run["seconds"][name]["median"]) for name in ("plain", "fast", "slow")),
            spread(run["ratios"]["expected_speedup"], 2) + " x",
            f"{run['flop_ratios']['expected_speedup']:.2f} x",
            f"{run['ratios']['share_of_limit']['median']:.2f}",
            cached_speedup(run),
            " / ".join(megabytes(run["memory"][name]) for name in ("fast", "slow", "plain")),
        )
        for run in results["runs"]
    ]


def cached_speedup(run: dict) -> str:
    """The speed-up with `vision_feature_cache` in fast steps."""
    found = run["ratios"].get("expected_speedup_cached")
    return "n/a" if found is None else spread(found, 2) + " x"


def target_rows(results: dict) -> list[tuple[str, ...]]:
    """A line per run: each target's value and verdict."""
    rows = []
    for run in results["runs"]:
        cells = []
        for name, (_, form) in TARGETS.items():
            target = run["targets"].get(name)
            if target is None:
                cells.append("n/a")
                continue
            wanted = f" (>= {target['at_least']:g})" if name == "speedup" else ""
            cells.append(f"{form.format(target['value'])}{wanted}, {'yes' if target['met'] else 'NO'}")
        rows.append((run["shape"], run["checkpointing"], *cells))
    return rows


def step_rows(run: dict) -> list[tuple[str, ...]]:
    """Each step's time, FLOPs and memory; below them parts of steps."""
    seconds, flops, ratios = run["seconds"], run["flops"], run["ratios"]
    rows = []
    for name, label in steps_of(run).items():
        ratio = "1" if name == "plain" else spread(ratios[f"{name}_over_plain"], 3)
        work = (f"{flops[name] / 1e9:.2f}", f"{flops[name] / flops['plain']:.3f}")
        rows.append((label, times_of(seconds[name]), ratio, *work, megabytes(run["memory"][name])))
    for name, label in PARTS.items():
        share = f"{ratios[f'{name}_share']['median']:.1%} of fast" if name in FAST_PARTS else ""
        work = (f"{flops[name] / 1e9:.2f}", f"{flops[name] / flops['plain']:.3f}")
        rows.append((f"  {label}", times_of(seconds[name]), share, *work, megabytes(run["memory"][name])))
    return [*rows, (f"  {REST}", "", f"{ratios['rest_share']['median']:.1%} of fast", "", "", "")]


def setting_line(results: dict) -> str:
    """Machine and settings in words."""
    settings, machine = results["settings"], results["machine"]
    where = machine["accelerator"] if results["device"] != "cpu" else f"{machine['cpu']}, {machine['threads']} threads"
    lora = ", LoRA" if settings["lora"] else ""
    return (
        f"{settings['pruner']} removing {settings['pruning_ratio']:.0%}, {settings['slow_ratio']:.0%} slow "
        f"steps{lora}; {results['dtype']} on {where}; torch {results['versions']['torch']}, transformers "
        f"{results['versions']['transformers']}; medians of {results['rounds']} interleaved rounds, quartiles in "
        "brackets."
    )


def model_line(run: dict) -> str:
    """Model and batch of a run in words."""
    size = run["parameters"]["language_model_without_embeddings"] / 1e6
    tower = run["parameters"]["vision_tower"] / 1e6
    return (
        f"Language model of {size:.1f} M parameters without embeddings, vision tower of {tower:.1f} M, batch "
        f"{run['batch']}, per sample {run['visual_tokens']:.0f} visual and {run['text_tokens']:.0f} text tokens, "
        f"{run['supervised_tokens']:.0f} of them supervised."
    )


def run_line(run: dict) -> str:
    """Model, batch and splits of a run in words."""
    parts = "in one part" if run["slow_parts"] == 1 else f"in {run['slow_parts']} parts"
    ratio = ""
    if "encoder_ratio" in run:
        ratio = (
            f" Encoding a visual token takes {run['encoder_ratio']:.3g} times the FLOPs of its forward pass in the "
            f"language model's layers; in {run['like']} {run['real_encoder_ratio']:.3g} times."
        )
    return (
        f"{model_line(run)} Activation checkpointing {run['checkpointing']}, slow "
        f"steps {parts} (slow_mode_splits={run['slow_splits']!r}).{ratio}"
    )


def waits_line(run: dict) -> str:
    """How often each step waits for a CUDA device, and how often of that in this library."""
    told = []
    for name, label in steps_of(run).items():
        waits = run["device_waits"][name]
        own = sum(count for place, count in waits.items() if place.split("/")[0] in OWN)
        told.append(f"{label} {sum(waits.values())} ({own})")
    return f"Waits for the device, and in brackets those in the library itself: {'; '.join(told)}."


def spread(value: dict, digits: int) -> str:
    """Median with its quartiles in brackets."""
    low, middle, high = (f"{value[key]:.{digits}f}" for key in ("q1", "median", "q3"))
    return f"{middle} [{low}, {high}]"


def times_of(value: dict) -> str:
    """[`spread`] of seconds, in milliseconds."""
    return spread({key: 1000 * number for key, number in value.items()}, 1)


def milliseconds(seconds: float) -> str:
    """Seconds as milliseconds, without needless digits."""
    return f"{1000 * seconds:.{0 if seconds > 0.1 else 1}f}"


def megabytes(count: float) -> str:
    """Bytes as megabytes, without needless digits."""
    return f"{count / 1e6:.{0 if count > 1e7 else 1}f}"


def print_report(results: dict) -> None:
    """Prints the tables."""
    console = Console()
    console.print(setting_line(results), highlight=False)
    for header, rows in ((HEADER, run_rows(results)), (TARGET_HEADER, target_rows(results))):
        # A column per run, which fits a terminal.
        print_table(console, ("", *(", ".join(row[:2]) for row in rows)), list(zip(header, *rows, strict=True))[2:])


def print_table(console: Console, header: tuple[str, ...], rows: list[tuple[str, ...]]) -> None:
    """Prints a table whose columns but the first are aligned right."""
    table = Table(header[0])
    for title in header[1:]:
        table.add_column(title, justify="right")
    for row in rows:
        # Brackets are quartiles here, not rich's markup.
        table.add_row(*(cell.replace("[", r"\[") for cell in row))
    console.print(table)


def readme_table(results: dict) -> str:
    """The runs, for a page that shows the plot itself.

    Raises:
        ValueError: an earlier version has written the results.
    """
    check_format(results)
    return "\n\n".join([setting_line(results), markdown_table(HEADER, run_rows(results))])


def markdown(results: dict, plot: str) -> str:
    """The Markdown page."""
    parts = [
        "# Step times",
        "A step is forward and backward of one batch by the trainer's own `training_step`. Each round measures each "
        "variant once; speed-ups and other ratios are taken within a round, over a Trainer with the same setting of "
        "activation checkpointing. The FLOP limit is what the speed-up would be if time went with the FLOPs of these "
        "very steps. Trainer computes logits at all positions, DualSpeedTrainer at supervised ones only: 'slow, no "
        "distillation' shows how much of the gain that is. 'Teacher' is the pruned forward pass in a slow step. 'Fast, "
        "cached features' is a fast step of a later epoch with `vision_feature_cache`; hashing the pixels and reading "
        "the features, which data loader workers do, and copying them to the device are not in it. 'Fast, others "
        "discarded, plain attention' is the paper's fast step, with dropped_tokens='discard' and "
        "proportional_attention=False.",
        readme_table(results),
        f"![Step times]({plot})",
        "What is aimed at, and whether it is reached:",
        markdown_table(TARGET_HEADER, target_rows(results)),
    ]
    for run in results["runs"]:
        parts += [f"## {run['shape']}, checkpointing {run['checkpointing']}", run_line(run)]
        parts += [markdown_table(STEP_HEADER, step_rows(run))]
        parts += [waits_line(run)] if "device_waits" in run else []
    parts += [f"FLOPs: {results['flop_counting']}.", f"Memory: {results['memory_counting']}."]
    parts += [f"Measured {results['date']} UTC with `dualspeed bench`."]
    return "\n\n".join(parts) + "\n"
