"""`dualspeed bench --selection`: what choosing tokens costs, beside the fast step and of single images.

With a part of a real model's layers (`--scale full --layers N`), the time of a step of all layers is computed: the
operations of two depths say those of the whole model, and time is taken to go with them.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F
from rich.console import Console

from ..pruners import AutoPruner, Pruner, VisualTokens
from ..pruners.farthest import batched, triton_runs
from ..publishing.plots import describe, figure_of, save_figure
from ..trainer.schedule import FAST
from ..utils.devices import synchronize
from ..utils.text import markdown_table
from ..utils.writing import write_file
from .options import BenchArguments
from .plots import LINES
from .report import check_format, milliseconds, print_table, quartiles, setting_line, times_of
from .shapes import SHAPES

KIND = "selection of visual tokens"
# What is timed, and what it is called: as in fast steps; in plain PyTorch, where that is another way; and how much of
# that the similarities of all pairs are.
OWN, PLAIN, PAIRS = "selection", "selection_plain", "similarities"
WAYS = {OWN: "as in fast steps", PLAIN: "plain PyTorch", PAIRS: "similarities of all pairs"}
STYLES = {OWN: LINES["fast"], PLAIN: LINES["plain"], PAIRS: LINES["mix"]}
TOKENS, WIDTHS = (576, 1024, 2928), (1024, 4096)
IMAGES = {"regions": "regions", "noise": "noise"}


def measure(options: BenchArguments) -> dict:
    """Selection of each shape beside its fast step, and of single images of several sizes."""
    from .measure import default_device, default_dtype, measured

    results, fewer = measured(options, [], derive, timed), fewer_layers(options)
    whole = []
    if fewer is not None:
        counted = measured(replace(options, layers=fewer), [], lambda run, slow_ratio: {}, count)
        whole = [whole_model(*runs) for runs in zip(results["runs"], counted["runs"], strict=True)]
    device, threads = default_device(), torch.get_num_threads()
    try:
        if options.threads is not None:
            torch.set_num_threads(options.threads)
        pruner = AutoPruner.from_name(options.pruner, pruning_ratio=options.pruning_ratio).to(device)
        sizes = [(kind, count, width) for kind in IMAGES for count in TOKENS for width in WIDTHS]
        found = [sized(pruner, *size, device, default_dtype(device), options.rounds) for size in sizes]
    finally:
        torch.set_num_threads(threads)
    return {**results, "benchmark": KIND, "whole": whole, "sizes": found}


def fewer_layers(options: BenchArguments) -> int | None:
    """Layers of another depth to count operations of; None unless the options ask for a part of a real model."""
    if options.scale != "full" or options.layers is None:
        return None
    if options.layers < 2:
        raise ValueError(
            f"`layers` is {options.layers}, but --selection compares two depths of a real model. Use --layers 2 or "
            "more, or --scale small."
        )
    return options.layers // 2


def ways_of(pruner: Pruner, tokens: VisualTokens) -> dict[str, Callable[[], object]]:
    """What of selecting from `tokens` is timed. Plain PyTorch is another way only where DivPrune's kernel runs."""
    ways = {OWN: partial(pruner, tokens)}
    if pruner.config.pruner_type != "divprune":
        return ways
    if triton_runs(tokens.features.device):
        ways[PLAIN] = partial(plainly, pruner, ways[OWN])
    return {**ways, PAIRS: partial(pairs, tokens)}


def pairs(tokens: VisualTokens) -> object:
    """The similarities of all pairs, which the choice in plain PyTorch begins with."""
    units = batched.units_of(tokens.features)
    padding = None if tokens.valid is None else ~tokens.valid
    return batched.similarities(units, padding, whole=0 < len(units) <= batched.fitting(units.shape[1]))


def timed(bench, names: list[str]) -> dict:
    """Seconds by round of the fast step and of selection from its tokens; the operations of a part of a real model."""
    bench.dual.mode = FAST
    bench.variants |= ways_of(bench.dual.dual_forward.pruner, bench.tokens)
    counts = {} if fewer_layers(bench.options) is None else count(bench, names)
    seconds = bench.measure(["fast", *(name for name in WAYS if name in bench.variants)])
    return {**bench.subject.said, **counts, "seconds_by_round": seconds}


def count(bench, names: list[str]) -> dict:
    """Operations of the fast step and of its encoder."""
    return {**bench.subject.said, "flops": {name: bench.count_flops(name) for name in ("fast", "encoder")}}


def plainly(pruner: Pruner, select: Callable[[], object]) -> None:
    """Selects in plain PyTorch."""
    pruner.plain_path = True
    try:
        select()
    finally:
        pruner.plain_path = False


def derive(run: dict, slow_ratio: float) -> dict:
    """Medians and quartiles of the times, and of their shares of the fast step within a round."""
    times = {name: torch.tensor(values, dtype=torch.float64) for name, values in run["seconds_by_round"].items()}
    shares = {name: quartiles(times[name] / times["fast"]) for name in WAYS if name in times}
    return {"seconds": {name: quartiles(values) for name, values in times.items()}, "shares": shares}


def whole_model(run: dict, fewer: dict) -> dict:
    """The fast step of all layers and selection's share of it, from a run and the operations with `fewer` layers.

    Operations outside of the encoder grow by as many with each layer of the language model, and the encoder's with each
    of the tower.
    """
    real, flops, before = SHAPES[run["shape"]].real, run["flops"], fewer["flops"]
    layer = (flops["fast"] - flops["encoder"] - before["fast"] + before["encoder"]) / (run["layers"] - fewer["layers"])
    more = run["tower_layers"] - fewer["tower_layers"]
    # Between towers as deep as each other, all of the encoder counts as that of layers.
    tower = (flops["encoder"] - before["encoder"]) / more if more else flops["encoder"] / run["tower_layers"]
    added = layer * (real.layers - run["layers"]) + tower * (real.tower_layers - run["tower_layers"])
    fast, own = run["seconds"]["fast"]["median"], run["seconds"][OWN]["median"]
    whole = fast * (1 + added / flops["fast"])
    return {
        "shape": run["shape"],
        "layers": real.layers,
        "tower_layers": real.tower_layers,
        "layer": fast * layer / flops["fast"],
        "tower_layer": fast * tower / flops["fast"],
        "fast": whole,
        "share": own / whole,
    }


def sized(
    pruner: Pruner, kind: str, count: int, width: int, device: torch.device, dtype: torch.dtype, rounds: int
) -> dict:
    """Seconds of selecting from one image of `count` tokens, each way after the other in each round."""
    seconds = seconds_of(ways_of(pruner, VisualTokens(image(kind, count, width).to(device, dtype))), device, rounds)
    own = seconds[OWN]
    over = {name: median(v / o for v, o in zip(values, own, strict=True)) for name, values in seconds.items()}
    spreads = {name: quartiles(torch.tensor(values, dtype=torch.float64)) for name, values in seconds.items()}
    return {"tokens": kind, "visual_tokens": count, "width": width, "seconds": spreads, "over_own": over}


def seconds_of(ways: dict[str, Callable[[], object]], device: torch.device, rounds: int) -> dict[str, list[float]]:
    """Seconds of each way by round, one after the other in each round."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(-1, rounds):  # one to warm up
        for name, run in ways.items():
            synchronize(device)
            begun = time.perf_counter()
            run()
            synchronize(device)
            if number >= 0:
                seconds[name].append(time.perf_counter() - begun)
    return seconds


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
    for header, rows in tables(results):
        print_table(console, header, rows)
    for line in whole_lines(results):
        console.print(line, highlight=False)
    plot = plot_selection(results, path.with_suffix(".png"))
    write_file(path.with_suffix(".md"), markdown(results, plot.name))


def tables(results: dict) -> list[tuple[tuple[str, ...], list[tuple[str, ...]]]]:
    """Header and rows of both tables: a row per run, and a row per kind and size of image."""
    ways = {name: label for name, label in WAYS.items() if name in results["runs"][0]["seconds"]}
    header = ("shape", "layers", "batch", "visual tokens", "fast step, ms")
    header += tuple(title for label in ways.values() for title in (f"{label}, ms", "share"))
    rows = [
        (
            run["shape"],
            f"{run['layers']} and {run['tower_layers']}" if "layers" in run else "-",
            str(run["batch"]),
            f"{run['visual_tokens']:,.0f}",
            milliseconds(run["seconds"]["fast"]["median"]),
            *(cell for way in ways for cell in (times_of(run["seconds"][way]), f"{run['shares'][way]['median']:.1%}")),
        )
        for run in results["runs"]
    ]
    others = [way for way in ways if way != OWN]
    size_header = ("tokens", "visual tokens", "width", *(f"{label}, ms" for label in ways.values()))
    size_header += tuple(f"{WAYS[way]}, over the first" for way in others)
    size_rows = [
        (
            IMAGES[size["tokens"]],
            f"{size['visual_tokens']:,}",
            f"{size['width']:,}",
            *(times_of(size["seconds"][way]) for way in ways),
            *(f"{size['over_own'][way]:.2f}" for way in others),
        )
        for size in results["sizes"]
    ]
    return [(header, rows), (size_header, size_rows)]


def whole_lines(results: dict) -> list[str]:
    """What follows for the whole models, in words."""
    return [
        f"{of['shape']} with all {of['layers']} layers and {of['tower_layers']} of the tower, computed by their "
        f"operations ({milliseconds(of['layer'])} ms for each layer, {milliseconds(of['tower_layer'])} ms for each of "
        f"the tower): a fast step of {of['fast']:.0f} s, of which selection is {of['share']:.2%}."
        for of in results["whole"]
    ]


def readme_table(results: dict) -> str:
    """Settings and tables, for a page that shows the plot itself."""
    check_format(results, KIND)
    runs, sizes = (markdown_table(*table) for table in tables(results))
    return "\n\n".join([setting_line(results), runs, *whole_lines(results), sizes])


def markdown(results: dict, plot: str) -> str:
    """The Markdown page."""
    parts = [
        "# Selecting visual tokens",
        "Selection alone, with merging and sizes: of the tokens of a shape's batch, beside its fast step, and of one "
        "image. Layers are those of the language model and of the tower. 'Regions' are tokens near 16 directions, most "
        "of them with a near twin; 'noise' has nothing in common. All ways are measured one after the other in each "
        "round; similarities of all pairs are the part of it that DivPrune in plain PyTorch cannot do without.",
        readme_table(results),
        f"![Selection]({plot})",
        f"Measured {results['date']} UTC with `dualspeed bench --selection`.",
    ]
    return "\n\n".join(parts) + "\n"


def plot_selection(results: dict, path: Path) -> Path:
    """Draws the time of each way against the number of tokens, for each kind of image and width."""
    widths = list(dict.fromkeys(size["width"] for size in results["sizes"]))
    figure, axes = figure_of(9, 4, 1, len(widths))
    for axis, width in zip(axes[0], widths, strict=True):
        for kind, style in zip(IMAGES, ("-", ":"), strict=True):
            sizes = [size for size in results["sizes"] if (size["tokens"], size["width"]) == (kind, width)]
            counts = [size["visual_tokens"] for size in sizes]
            for way in sizes[0]["seconds"]:
                colour, marker = STYLES[way]
                values = [1000 * size["seconds"][way]["median"] for size in sizes]
                said = f"{WAYS[way]}, {IMAGES[kind]}"
                axis.plot(counts, values, style, color=colour, marker=marker, linewidth=1.8, label=said)
        axis.set_xlabel("visual tokens")
        axis.set_ylabel("milliseconds an image")
        axis.set_title(f"width {width:,}", fontsize=10)
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0, 0].legend(frameon=False, fontsize=9)
    settings = results["settings"]
    title = f"Selecting the visual tokens of one image: {settings['pruner']} removing {settings['pruning_ratio']:.0%}"
    describe(figure, title, results, f"selection alone, in {results['dtype']}")
    return save_figure(figure, path)
