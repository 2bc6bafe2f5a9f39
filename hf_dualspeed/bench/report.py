"""Reports of `dualspeed bench`: ratios, tables and a Markdown page."""

from __future__ import annotations

import torch
from rich.console import Console
from rich.table import Table

from ..utils.text import markdown_table
from .largest_batch import size_line

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
OWN = ("hf_dualspeed", "pruners")  # this library's folders in the names of places


def check_format(results: dict, kind: str = "training steps, forward and backward") -> None:
    """Raises a `ValueError` unless `results` are those of this version's benchmark of a `kind`."""
    if not isinstance(results, dict) or "runs" not in results:
        raise ValueError(
            "`output` holds no `runs`: it was written by an earlier version of `dualspeed bench`, or by something "
            "else. Measure anew, without --render-only."
        )
    if results["benchmark"] != kind:
        raise ValueError(
            f"`output` holds {results['benchmark']!r}, not {kind!r}. Give --growth, --lengths, --loader, --profile, "
            "--same-memory or --selection, or none of them, as it was measured."
        )


def derive(run: dict, slow_ratio: float) -> dict:
    """Medians and quartiles of times and of ratios within a round, and ratios of FLOPs and memory.

    The FLOP limit is the expected speed-up if time were proportional to FLOPs.
    """
    # Times, and their ratios within each round: (rounds,).
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
    if "fast_cached" in times:  # slow steps run without the cache
        cached = {**times, "fast": times["fast_cached"]}
        ratios["expected_speedup_cached"] = expected_speedup(cached, slow_ratio, "plain")
    flops, memory = run["flops"], run["memory"]
    return {
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


def steps_of(run: dict) -> dict[str, str]:
    """Names and labels of the steps that a run has. Not every pruner and model has all of them."""
    return {name: label for name, label in STEPS.items() if name in run["flops"]}


def expected_speedup(costs: dict, slow_ratio: float, over: str):
    """The cost of the steps `over`, divided by that of a mix of fast and slow steps."""
    return costs[over] / ((1 - slow_ratio) * costs["fast"] + slow_ratio * costs["slow"])


def quartiles(values: torch.Tensor) -> dict[str, float]:
    """Median and quartiles of values `(rounds,)`."""
    points = torch.tensor([0.25, 0.5, 0.75], dtype=values.dtype)
    low, middle, high = values.quantile(points).tolist()
    return {"median": middle, "q1": low, "q3": high}


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
MORE_HEADER = (
    "shape",
    "checkpointing",
    "memory, slow / fast",
    "time, fast / others discarded",
    "selection, share of fast",
    "shortening, share of fast",
    "host waits in both",
)
STEP_HEADER = ("step", "time, ms", "over Trainer", "GFLOP", "over Trainer", "activations, MB")


def run_rows(results: dict) -> list[tuple[str, ...]]:
    """A row per run: times, speed-up, its limit, and memory."""
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


def more_rows(results: dict) -> list[tuple[str, ...]]:
    """A row per run: memory, cost of merging and proportional attention, shares of pruning, waits for the device."""
    rows = []
    for run in results["runs"]:
        ratios = run["ratios"]
        view = f"{ratios['fast_over_discarding']['median']:.3f}" if "fast_over_discarding" in ratios else "n/a"
        shares = (f"{ratios[name]['median']:.1%}" for name in ("selection_share", "shortening_share"))
        waits = run["host_waits"]["selection"] + run["host_waits"]["shortening"]
        memory = f"{run['memory_ratios']['slow_over_fast']:.2f}"
        rows.append((run["shape"], run["checkpointing"], memory, view, *shares, str(waits)))
    return rows


def step_rows(run: dict) -> list[tuple[str, ...]]:
    """A row per step, then a row per part: time, FLOPs and memory."""
    seconds, flops, ratios = run["seconds"], run["flops"], run["ratios"]
    rows = []
    for name, label in steps_of(run).items():
        ratio = "1" if name == "plain" else spread(ratios[f"{name}_over_plain"], 3)
        work = (f"{flops[name] / 1e9:.2f}", f"{flops[name] / flops['plain']:.3f}")
        rows.append((label, times_of(seconds[name]), ratio, *work, megabytes(run["memory"][name])))
    for name, label in PARTS.items():
        share = f"{ratios[f'{name}_share']['median']:.1%} of fast" if name in FAST_PARTS else ""
        work = (f"{flops[name] / 1e9:.2f}", f"{flops[name] / flops['plain']:.3f}")
        rows.append((label, times_of(seconds[name]), share, *work, megabytes(run["memory"][name])))
    return [*rows, (REST, "", f"{ratios['rest_share']['median']:.1%} of fast", "", "", "")]


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
    """How often each step waits for a CUDA device, in all and in this library."""
    counts = []
    for name, label in steps_of(run).items():
        waits = run["device_waits"][name]
        own = sum(count for place, count in waits.items() if place.split("/")[0] in OWN)
        counts.append(f"{label} {sum(waits.values())} ({own})")
    return f"Waits for the device, and in brackets those in the library itself: {'; '.join(counts)}."


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
    for header, rows in ((HEADER, run_rows(results)), (MORE_HEADER, more_rows(results))):
        # Transposed, a column per run: that fits a terminal.
        print_table(console, ("", *(", ".join(row[:2]) for row in rows)), list(zip(header, *rows, strict=True))[2:])


def print_table(console: Console, header: tuple[str, ...], rows: list[tuple[str, ...]]) -> None:
    """Prints a table. All columns but the first are aligned right."""
    table = Table(header[0])
    for title in header[1:]:
        table.add_column(title, justify="right")
    for row in rows:
        # Brackets hold quartiles and are no markup of rich.
        table.add_row(*(cell.replace("[", r"\[") for cell in row))
    console.print(table)


def readme_table(results: dict) -> str:
    """Settings and the table of runs, for a page that shows the plot itself.

    Raises:
        ValueError: the results are of another kind or of an earlier version.
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
        "## Also measured",
        markdown_table(MORE_HEADER, more_rows(results)),
    ]
    for run in results["runs"]:
        parts += [f"## {run['shape']}, checkpointing {run['checkpointing']}", run_line(run)]
        parts += [size_line(run)] if run.get("largest_batch") else []
        parts += [markdown_table(STEP_HEADER, step_rows(run))]
        parts += [waits_line(run)] if "device_waits" in run else []
    parts += [f"FLOPs: {results['flop_counting']}.", f"Memory: {results['memory_counting']}."]
    parts += [f"Measured {results['date']} UTC with `dualspeed bench`."]
    return "\n\n".join(parts) + "\n"
