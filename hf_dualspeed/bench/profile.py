"""`dualspeed bench --profile`: where the time of a fast step goes, by `torch.profiler`."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from rich.console import Console
from torch import nn
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

from ..models.components import language_parts
from ..models.interface import unwrap
from ..publishing.plots import describe, figure_of, save_figure
from ..utils.devices import synchronize
from ..utils.text import markdown_table
from ..utils.writing import write_file
from .options import BenchArguments
from .plots import PART_STYLE, model_size
from .report import check_format, milliseconds, model_line, print_table, quartiles, setting_line

KIND = "profile of a fast step"
# Ranges of the profiler, in the order of a step.
PHASES = {
    "dualspeed.encode": "vision encoder",
    "dualspeed.select": "selection",
    "dualspeed.shorten": "shortening",
    "bench.language_model": "language model, forward",
    "bench.head": "head, forward",
    "bench.backward": "backward",
}
STEP, REST = "bench.step", "losses and the rest"
INSIDE = {"dualspeed.shorten": ("dualspeed.select",)}  # inner ranges, whose time is subtracted
# The first pattern that matches an operator's name decides its kind.
OPERATORS = {
    "matrix products": r"mm$|linear|convolution|matmul",
    "attention": r"attention",
    "views and allocation": r"view|reshape|transpose|permute|expand|slice|strided|detach|squeeze|empty|alias|flatten"
    r"|split|chunk|unbind|narrow|result_type|::(t|to|select|diagonal|set_|resize_|lift_fresh)$",
    "copies and indices": r"copy|cat|index|gather|scatter|embedding|fill|zero|one|sort|where|arange|clone|nonzero|full",
    "element-wise and reductions": r"",
}
IDLE = "no operator"
HEADER = ("phase", "ms", "share")
OPERATOR_HEADER = ("operators", "ms", "share", "calls")


def measure(options: BenchArguments) -> dict:
    """Profiles the fast step of each shape. Checkpointing is not in it: fast steps leave it out."""
    from .measure import measured

    results = measured(options, [], lambda run, slow_ratio: {}, profiled)
    return {**results, "benchmark": KIND}


def profiled(bench, names: list[str]) -> dict:
    """Seconds by phase and by kind of operator, over `rounds` fast steps after one warm-up step."""
    rounds = bench.options.rounds
    with marked(bench):
        steps = [profiled_step(bench) for _ in range(rounds + 1)][1:]
    phases = {name: [step["phases"][name] for step in steps] for name in steps[0]["phases"]}
    operators = {name: [step["operators"][name] for step in steps] for name in steps[0]["operators"]}
    seconds = [step["seconds"] for step in steps]
    return {
        **bench.subject.said,
        "seconds": spread_of(seconds),
        "phases": {name: spread_of(values) for name, values in phases.items()},
        "operators": {name: spread_of(values) for name, values in operators.items()},
        "calls": steps[-1]["calls"],
    }


def spread_of(values: list[float]) -> dict[str, float]:
    """Median and quartiles."""
    return quartiles(torch.tensor(values, dtype=torch.float64))


def profiled_step(bench) -> dict:
    """One fast step under the profiler."""
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (bench.device.type == "cuda")
    with profile(activities=activities) as profiler, record_function(STEP):
        bench.step("fast")
        synchronize(bench.device)
    bench._clean("fast")
    return read_profile(profiler, on_device=bench.device.type == "cuda")


def read_profile(profiler: profile, on_device: bool) -> dict:
    """Seconds of one step by phase and by kind of operator, and calls of operators.

    Phases are wall time on the host. On an accelerator, that is the time in which the host launches their work.
    Operators are time on the device that computes.
    """
    events = profiler.key_averages()
    # On an accelerator, each range appears a second time, on the device.
    wall = {event.key: event.cpu_time_total / 1e6 for event in events if event.device_type == DeviceType.CPU}
    phases = {name: wall.get(name, 0.0) for name in PHASES}
    for name, inner in INSIDE.items():
        phases[name] -= sum(phases[key] for key in inner)
    whole = wall[STEP]
    seconds, calls = dict.fromkeys(OPERATORS, 0.0), dict.fromkeys(OPERATORS, 0)
    for event in events:
        if not event.key.startswith("aten::"):
            continue
        kind = kind_of(event.key)
        seconds[kind] += (event.self_device_time_total if on_device else event.self_cpu_time_total) / 1e6
        calls[kind] += event.count
    return {
        "seconds": whole,
        "phases": {**phases, REST: whole - sum(phases.values())},
        "operators": {**seconds, IDLE: whole - sum(seconds.values())},
        "calls": calls,
    }


def kind_of(operator: str) -> str:
    """The kind of an operator; "aten::mm", for example, is a matrix product."""
    return next(kind for kind, pattern in OPERATORS.items() if re.search(pattern, operator))


@contextmanager
def marked(bench) -> Iterator[None]:
    """Marks ranges that the library does not mark itself: language model, head and backward."""
    outer = unwrap(bench.model)
    head = outer.get_output_embeddings()
    with ExitStack() as stack:
        for part in language_parts(outer):
            if part is not head:
                stack.enter_context(ranged(part, "bench.language_model"))
        stack.enter_context(ranged(head, "bench.head"))
        accelerator = bench.dual.accelerator
        backward = accelerator.backward

        def recorded(*args, **kwargs):
            with record_function("bench.backward"):
                return backward(*args, **kwargs)

        accelerator.backward = recorded
        stack.callback(accelerator.__dict__.pop, "backward")
        yield


@contextmanager
def ranged(module: nn.Module, name: str) -> Iterator[None]:
    """Marks each forward of a module as a range."""
    opened = []

    def begin(*_) -> None:
        opened.append(record_function(name))
        opened[-1].__enter__()

    def end(*_) -> None:
        opened.pop().__exit__(None, None, None)

    handles = [module.register_forward_pre_hook(begin), module.register_forward_hook(end)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def report(results: dict, path: Path) -> None:
    """Prints the tables; writes Markdown and plot beside the JSON file `path`."""
    check_format(results, KIND)
    console = Console()
    console.print(setting_line(results), highlight=False)
    for run in results["runs"]:
        print_table(console, HEADER, phase_rows(run))
        print_table(console, OPERATOR_HEADER, operator_rows(run))
    plot = plot_profile(results, path.with_suffix(".png"))
    write_file(path.with_suffix(".md"), markdown(results, plot.name))


def phase_rows(run: dict) -> list[tuple[str, ...]]:
    """A row per phase, and one of the step."""
    labels = {**PHASES, REST: REST}
    rows = [(labels[name], *time_and_share(value, run)) for name, value in run["phases"].items()]
    return [*rows, ("step", *time_and_share(run["seconds"], run))]


def operator_rows(run: dict) -> list[tuple[str, ...]]:
    """A row per kind of operator."""
    calls = {IDLE: "", **{name: f"{count:,}" for name, count in run["calls"].items()}}
    return [(name, *time_and_share(value, run), calls[name]) for name, value in run["operators"].items()]


def time_and_share(value: dict, run: dict) -> tuple[str, str]:
    """Milliseconds, and their share of the step."""
    return milliseconds(value["median"]), f"{value['median'] / run['seconds']['median']:.1%}"


def readme_table(results: dict) -> str:
    """The tables of each run, for a page that shows the plot itself."""
    check_format(results, KIND)
    parts = [setting_line(results)]
    for run in results["runs"]:
        parts += [f"{run['shape']}: {model_line(run)}"]
        parts += [markdown_table(HEADER, phase_rows(run)), markdown_table(OPERATOR_HEADER, operator_rows(run))]
    return "\n\n".join(parts)


def markdown(results: dict, plot: str) -> str:
    """The Markdown page."""
    parts = [
        "# Where the time of a fast step goes",
        "A fast step, forward and backward, under `torch.profiler`, which itself slows the host down a little. On an "
        "accelerator, phases are the time in which the host hands out their work, operators that in which the device "
        "computes.",
        readme_table(results),
        f"![Profile]({plot})",
        f"'{IDLE.capitalize()}' is the time in which no operator computes: Python, dispatch, and the profiler itself.",
        f"Measured {results['date']} UTC with `dualspeed bench --profile`.",
    ]
    return "\n\n".join(parts) + "\n"


def plot_profile(results: dict, path: Path) -> Path:
    """Draws the time of a fast step by phase, and by kind of operator."""
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
    settings = results["settings"]
    title = f"A fast step with {settings['pruner']} removing {settings['pruning_ratio']:.0%}"
    describe(figure, title, results, model_size(results))
    return save_figure(figure, path)
