"""`dualspeed bench --lengths`: what grouping samples by length saves. Fast steps are grouped by pruned length.

The same samples, in the same modes, are batched at random and by length, and the steps of both are timed in turn, fast
ones also with switches that change what such batches cost (`--switches`). Text lengths are not those of a data set:
they are drawn from a log-normal distribution, cut to a range.
"""

from __future__ import annotations

import math
import tempfile
from functools import partial
from pathlib import Path

import torch
from matplotlib.ticker import PercentFormatter
from rich.console import Console

from ..data.lengths import SampleLengths
from ..publishing.plots import describe, figure_of, save_figure
from ..trainer.length_grouping import MEGABATCH, ModeLengthSampler, grouped
from ..trainer.schedule import FAST, SLOW, ModeSchedule
from ..trainer.setup import compile_regions
from ..utils.progress import Work
from ..utils.text import markdown_table, one_line
from ..utils.writing import write_file
from .measure import Bench, order, surroundings
from .options import COMPILED, ROUNDED, ROW, BenchArguments
from .plots import ARMS, model_size
from .report import check_format, milliseconds, print_table, quartiles, run_line, setting_line, spread
from .shapes import PAD, supervised_tokens

KIND = "steps on batches of like length"
RANDOM, GROUPED = "random", "grouped"
LEAST_SLOW = 4  # steps
MEDIAN, SIGMA, SHORTEST, SEED = 60, 0.9, 16, 0
EPOCH_STEPS = 200  # steps whose padding is counted, enough for groups as large as in a long training
MULTIPLE, BACKEND = 64, "inductor"  # what lengths are rounded up to, and what compiles layers
SAID = {
    ROW: "the samples of a batch in one row (`padding_free`)",
    ROUNDED: f"lengths rounded up (`fast_length_multiple={MULTIPLE}`)",
    COMPILED: "compiled layers (`compile_regions`)",
}
SWITCH_HEADER = ("fast steps", "batches", "padded, ms", "switched, ms", "gain", "gain by FLOPs")
HEADER = ("steps", "padding, random", "padding, by length", "random, ms", "by length, ms", "gain", "gain by FLOPs")


def measure(options: BenchArguments) -> dict:
    """Times both kinds of batches with the first setting of checkpointing."""
    threads = torch.get_num_threads()
    try:
        if options.threads is not None:
            torch.set_num_threads(options.threads)
        with tempfile.TemporaryDirectory() as folder:
            run = LengthBench(options, folder).run_steps()
        run |= derive(run, options.slow_ratio)
        return {**surroundings(options), "benchmark": KIND, "runs": [run]}
    finally:
        torch.set_num_threads(threads)


def drawn_lengths(count: int, longest: int) -> list[int]:
    """Text tokens of each sample, log-normally distributed and cut to the range."""
    generator = torch.Generator().manual_seed(SEED)
    lengths = torch.exp(math.log(MEDIAN) + SIGMA * torch.randn(count, generator=generator))
    return lengths.round().clamp(SHORTEST, longest).long().tolist()


def padding(batches: list[list[int]], lengths: torch.Tensor) -> dict[str, int]:
    """Tokens of batches of samples of `lengths` `(samples,)`, and how many of them are padding."""
    # Each batch (rows,) is padded to its longest sample.
    shares = [lengths[torch.tensor(batch)] for batch in batches]
    tokens = sum(len(share) * share.amax().item() for share in shares)
    return {"tokens": tokens, "padding": tokens - sum(share.sum().item() for share in shares)}


class LengthBench(Bench):
    """Steps of one trainer on the same samples, batched at random and by length."""

    def __init__(self, options: BenchArguments, folder: str):
        shape = options.shapes()[0]
        super().__init__(options, shape, options.checkpointing[0], folder)
        self.whole, self.visual, self.compiled = self.batch, shape.visual_tokens, {}
        steps, rows = options.steps, len(self.batch["input_ids"])
        # A few more slow steps than the ratio asks for: one or two say little. Costs are weighted by the ratio.
        slow = min(steps - 1, max(min(LEAST_SLOW, steps // 2), round(steps * options.slow_ratio)))
        self.modes = [SLOW if step < slow else FAST for step in range(steps)]
        self.texts = drawn_lengths(max(steps, EPOCH_STEPS) * rows, options.text_tokens)
        self.lengths = self.lengths_of(self.texts)
        chunks = torch.arange(steps * rows).split(rows)  # in random order, because lengths are drawn
        generator = torch.Generator().manual_seed(SEED)
        self.plans = {
            RANDOM: [chunk.tolist() for chunk in chunks],
            GROUPED: grouped(chunks, self.modes, self.lengths, generator),
        }
        # Fast steps run padded and with each of the switches that work here.
        self.left_out = self._compile_layers() if any(COMPILED in given for given in options.switches) else {}
        self.switches = [given for given in options.switches if not self.left_out.keys() & given.split("+")]
        names = [
            [(arm, step, given) for arm in self.plans for given in ("", *(self.switches if mode == FAST else []))]
            for step, mode in enumerate(self.modes)
        ]
        self.names, self.variants = names, {name: partial(self.run_step, *name) for step in names for name in step}

    def lengths_of(self, texts: list[int]) -> dict[str, torch.Tensor]:
        """Lengths `(samples,)` by mode, of samples with one image each."""
        lengths = SampleLengths([text + self.visual for text in texts], [[self.visual]] * len(texts))
        return {FAST: lengths.pruned(self.options.pruning_ratio, self.dual.args.isolator_length), SLOW: lengths.full}

    def _compile_layers(self) -> dict[str, str]:
        """Compiles the layers, without using it yet. Returns why they cannot be, by the name of the switch."""
        try:
            torch.compile(torch.sin, backend=BACKEND)(torch.ones(1, device=self.device))
        except Exception as error:  # no compiler, or one that does not work
            return {COMPILED: one_line(error)}
        compile_regions(self.dual.dual_forward.interface, self.dual.dual_forward.pruner, BACKEND)
        compiled = [part for part in self.model.modules() if part._compiled_call_impl is not None]
        self.compiled = {layer: layer._compiled_call_impl for layer in compiled}
        return {}

    def run_step(self, arm: str, step: int, switches: str = "") -> None:
        """Forward and backward of one of the batches, padded or with `switches`, joined by pluses."""
        given, view = switches.split("+"), self.dual.dual_forward
        view.padding_free, view.length_multiple = ROW in given, MULTIPLE if ROUNDED in given else 1
        for layer, call in self.compiled.items():
            layer._compiled_call_impl = call if COMPILED in given else None
        self.batch = padded(self.whole, self.visual, [self.texts[sample] for sample in self.plans[arm][step]])
        self.items = (self.batch["labels"] != -100).sum()
        self.step(self.modes[step])

    def run_steps(self) -> dict:
        """Counts and times all steps of both kinds of batches."""
        kinds = [(SLOW, ""), *((FAST, given) for given in ("", *self.switches))]
        flops = {arm: dict.fromkeys(kinds, 0) for arm in self.plans}
        seconds = {arm: {kind: [0.0] * self.options.rounds for kind in kinds} for arm in self.plans}
        with Work("batches", (self.options.rounds + 1) * len(self.variants)) as work:
            for number in range(-1, self.options.rounds):
                for step, mode in enumerate(self.modes):
                    for name in order(self.names[step], number + step):
                        arm, _, given = name
                        if number >= 0:
                            seconds[arm][mode, given][number] += self._time(name)
                        elif COMPILED in given:  # counting sees no operation inside of compiled layers
                            self._time(name)
                        else:  # counting FLOPs is the warm-up
                            flops[arm][mode, given] += self.count_flops(name)
                        work.advance()
        texts = self.texts[: len(self.modes) * len(self.whole["input_ids"])]
        return {
            **self.subject.said,
            "text_tokens": sum(texts) / len(texts),
            "supervised_tokens": sum(map(supervised_tokens, texts)) / len(texts),
            "checkpointing": self.checkpointing,
            "slow_splits": self.splits,
            "slow_parts": self.dual._slow_parts(self.model, self.whole, self.items)[0],
            "text_lengths": texts,
            "steps": {mode: self.modes.count(mode) for mode in (FAST, SLOW)},
            "padding": {arm: self.padding_of(plan, self.modes) for arm, plan in self.plans.items()},
            "epoch_padding": self.epoch_padding(),
            "flops": {arm: {mode: flops[arm][mode, ""] for mode in (FAST, SLOW)} for arm in self.plans},
            "seconds_by_round": {arm: {mode: seconds[arm][mode, ""] for mode in (FAST, SLOW)} for arm in self.plans},
            "switches": {
                given: {
                    arm: {"flops": flops[arm][FAST, given] or None, "seconds_by_round": seconds[arm][FAST, given]}
                    for arm in self.plans
                }
                for given in self.switches
            },
            "left_out": self.left_out,
        }

    def padding_of(self, batches: list[list[int]], modes: list[str]) -> dict[str, dict[str, int]]:
        """Padding by mode."""
        return {
            mode: padding([b for b, m in zip(batches, modes, strict=True) if m == mode], self.lengths[mode])
            for mode in (FAST, SLOW)
        }

    def epoch_padding(self) -> dict[str, dict]:
        """Padding of an epoch in the trainer's order and in random order."""
        rows, schedule = len(self.whole["input_ids"]), ModeSchedule(self.options.slow_ratio, "periodic")
        sampler = ModeLengthSampler(self.lengths, rows, schedule.mode_at, seed=SEED)
        modes = [schedule.mode_at(step) for step in range(sampler.steps_per_epoch)]
        at_random = [chunk.tolist() for chunk in torch.arange(len(sampler)).split(rows)]
        plans = {RANDOM: at_random, GROUPED: sampler.plan(0)[0]}
        return {arm: self.padding_of(plan, modes) for arm, plan in plans.items()}


def padded(whole: dict[str, torch.Tensor], visual: int, texts: list[int]) -> dict[str, torch.Tensor]:
    """Cuts each row of a batch `(B, S)` to its number of text tokens, pads on the right and supervises the ends."""
    device = whole["input_ids"].device
    # A row's visual and text tokens are real, the rest of (B, S') is padding; labels are the last ones of a row.
    text = torch.tensor(texts, device=device)[:, None]
    supervised = torch.tensor([supervised_tokens(count) for count in texts], device=device)[:, None]
    ids = whole["input_ids"][:, : visual + max(texts)]
    place = torch.arange(ids.shape[1], device=device)
    mask = place < visual + text
    ids = ids.masked_fill(~mask, PAD)
    labels = ids.masked_fill(~mask | (place < visual + text - supervised), -100)
    return {**whole, "input_ids": ids, "attention_mask": mask.long(), "labels": labels}


def derive(run: dict, slow_ratio: float) -> dict:
    """Seconds and FLOPs per step, also of a mix of fast and slow ones, and their gain: random over by length."""
    steps, shares = run["steps"], {FAST: 1 - slow_ratio, SLOW: slow_ratio}
    # Seconds per step in each round, (rounds,), and FLOPs per step.
    seconds, flops, gains = {}, {}, {}
    for arm in (RANDOM, GROUPED):
        rounds = run["seconds_by_round"][arm]
        times = {mode: torch.tensor(rounds[mode], dtype=torch.float64) / steps[mode] for mode in shares}
        seconds[arm] = {**times, "mix": sum(share * times[mode] for mode, share in shares.items())}
        work = {mode: run["flops"][arm][mode] / steps[mode] for mode in shares}
        flops[arm] = {**work, "mix": sum(share * work[mode] for mode, share in shares.items())}
    for name in (FAST, SLOW, "mix"):
        gains[name] = {
            **quartiles(seconds[RANDOM][name] / seconds[GROUPED][name]),
            "by_flops": flops[RANDOM][name] / flops[GROUPED][name],
        }
    times = {arm: {name: quartiles(values) for name, values in seconds[arm].items()} for arm in seconds}
    # Fast steps with switches, and their gain: padded over switched.
    switched: dict[str, dict] = {}
    for given, arms in run["switches"].items():
        for arm, own in arms.items():
            rounds = torch.tensor(own["seconds_by_round"], dtype=torch.float64) / steps[FAST]
            gain = quartiles(seconds[arm][FAST] / rounds)
            gain["by_flops"] = run["flops"][arm][FAST] / own["flops"] if own["flops"] else None
            switched.setdefault(given, {})[arm] = {**own, "seconds": quartiles(rounds), "gain": gain}
    return {"seconds": times, "flops_per_step": flops, "gains": gains, "switches": switched}


def share_of_padding(padding: dict[str, dict[str, int]], name: str, slow_ratio: float, steps: dict[str, int]) -> float:
    """Padding over tokens in fast, slow, or a mix of steps."""
    weights = {FAST: (1 - slow_ratio) / steps[FAST], SLOW: slow_ratio / steps[SLOW]}
    modes = weights if name == "mix" else [name]
    tokens, padded = (sum(weights[mode] * padding[mode][key] for mode in modes) for key in ("tokens", "padding"))
    return padded / tokens if tokens else 0.0


def report(results: dict, path: Path) -> None:
    """Prints the table; writes Markdown and plot beside the JSON file `path`."""
    check_format(results, KIND)
    console = Console()
    console.print(setting_line(results), highlight=False)
    print_table(console, HEADER, rows(results))
    if switch_rows(results):
        print_table(console, SWITCH_HEADER, switch_rows(results))
    for line in (*left_out_lines(results), epoch_line(results)):
        console.print(line, highlight=False)
    plot = plot_lengths(results, path.with_suffix(".png"))
    write_file(path.with_suffix(".md"), markdown(results, plot.name))


def labels(results: dict) -> dict[str, str]:
    """Labels of the kinds of steps."""
    return {FAST: "fast", SLOW: "slow", "mix": f"mix, {results['settings']['slow_ratio']:.0%} slow"}


def shares(results: dict, arm: str) -> dict[str, float]:
    """The share of padding by kind of steps."""
    run, ratio = results["runs"][0], results["settings"]["slow_ratio"]
    return {name: share_of_padding(run["padding"][arm], name, ratio, run["steps"]) for name in labels(results)}


def rows(results: dict) -> list[tuple[str, ...]]:
    """A row per kind of steps."""
    run = results["runs"][0]
    at_random, by_length = shares(results, RANDOM), shares(results, GROUPED)
    return [
        (
            label,
            f"{at_random[name]:.1%}",
            f"{by_length[name]:.1%}",
            *(milliseconds(run["seconds"][arm][name]["median"]) for arm in (RANDOM, GROUPED)),
            spread(run["gains"][name], 2) + " x",
            f"{run['gains'][name]['by_flops']:.2f} x",
        )
        for name, label in labels(results).items()
    ]


def epoch_line(results: dict) -> str:
    """The padding of an epoch in words."""
    run = results["runs"][0]
    found = run["epoch_padding"]
    both = {
        mode: " in place of ".join(
            f"{found[arm][mode]['padding'] / max(1, found[arm][mode]['tokens']):.1%}" for arm in (GROUPED, RANDOM)
        )
        for mode in (FAST, SLOW)
    }
    return (
        f"In an epoch of {max(EPOCH_STEPS, sum(run['steps'].values()))} steps, of which the trainer groups up to "
        f"{MEGABATCH} at a time, padding is "
        f"{both[FAST]} of the tokens of fast steps, and {both[SLOW]} of those of slow ones."
    )


def switch_rows(results: dict) -> list[tuple[str, ...]]:
    """A row per switch and kind of batches, of results that have them."""
    run = results["runs"][0]
    return [
        (
            " and ".join(SAID[name] for name in given.split("+")),
            ARMS[arm][2].removeprefix("batches "),
            milliseconds(run["seconds"][arm][FAST]["median"]),
            milliseconds(of["seconds"]["median"]),
            spread(of["gain"], 2) + " x",
            f"{of['gain']['by_flops']:.2f} x" if of["gain"]["by_flops"] else "n/a",
        )
        for given, arms in run.get("switches", {}).items()
        for arm, of in arms.items()
    ]


def left_out_lines(results: dict) -> list[str]:
    """Which switches could not be turned on, and why."""
    return [f"Without {SAID[name]}: {why}." for name, why in results["runs"][0].get("left_out", {}).items()]


def readme_table(results: dict) -> str:
    """Settings and table, for a page that shows the plot itself."""
    check_format(results, KIND)
    lines = [setting_line(results), markdown_table(HEADER, rows(results))]
    lines += [markdown_table(SWITCH_HEADER, switch_rows(results))] if switch_rows(results) else []
    return "\n\n".join([*lines, *left_out_lines(results), epoch_line(results)])


def markdown(results: dict, plot: str) -> str:
    """The Markdown page."""
    run = results["runs"][0]
    texts = torch.tensor(run["text_lengths"], dtype=torch.float64)
    parts = [
        "# Batches of samples of like length",
        f"{len(texts)} samples, each with one image of {run['visual_tokens']:.0f} visual tokens, in batches of "
        f'{run["batch"]}: once at random, once grouped as `train_sampling_strategy="group_by_length"` does, by the '
        f"pruned length for the {run['steps'][FAST]} fast steps and by the whole length for the {run['steps'][SLOW]} "
        f"slow ones. The lengths of the texts are drawn, not those of a data set: log-normal with a median of {MEDIAN} "
        f"tokens and sigma {SIGMA}, cut to {SHORTEST} to {results['settings']['text_tokens']} (drawn: median "
        f"{texts.median():.0f}, mean {texts.mean():.0f}, longest {texts.max():.0f}). With other texts the gain is "
        "another. Both see the same samples in the same modes; their steps are timed in turn, and the gain is taken "
        "within a round.",
        readme_table(results),
        f"![Padding and time]({plot})",
        run_line(run),
        f"FLOPs: {results['flop_counting']}.",
        f"Measured {results['date']} UTC with `dualspeed bench --lengths`.",
    ]
    return "\n\n".join(parts) + "\n"


def plot_lengths(results: dict, path: Path) -> Path:
    """Draws, by kind of steps, the share of padding and the time relative to random batches."""
    figure, (axes,) = figure_of(9, 3.6, 1, 2)
    run, names = results["runs"][0], labels(results)
    seconds = {arm: run["seconds"][arm] for arm in (RANDOM, GROUPED)}
    panels = {
        "padding, share of tokens": {arm: list(shares(results, arm).values()) for arm in seconds},
        "time of a step, random = 1": {
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
    title = (
        f"{run['shape']}, batch {run['batch']}, texts of drawn lengths, {settings['pruner']} removing "
        f"{settings['pruning_ratio']:.0%}"
    )
    describe(figure, title, results, model_size(results))
    return save_figure(figure, path)
