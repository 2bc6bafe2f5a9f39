"""`dualspeed bench --same-memory`: each trainer at the largest micro-batch that fits, in steps of as many samples.

A step is what a user's is: forward and backward of all its micro-batches and, with an optimizer, clipping and the
optimizer's update. Its samples are about those of the larger of the two micro-batches; the other trainer accumulates.
Slow steps run in as many parts as `slow_mode_splits` says, or in more where those do not fit.
"""

from __future__ import annotations

import gc
import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from accelerate.utils.memory import should_reduce_batch_size
from rich.console import Console
from transformers.integrations.liger import apply_liger_kernel

from ..publishing.plots import describe, figure_of, save_figure
from ..trainer.fused_loss import without_ligers_layers
from ..trainer.schedule import FAST, SLOW
from ..trainer.setup import compile_regions
from ..utils.devices import synchronize
from ..utils.memory import GIB
from ..utils.progress import Work
from ..utils.text import markdown_table
from ..utils.writing import write_file
from .counters import flops_of, peak_memory
from .options import BenchArguments
from .plots import FULL_STEP, PART_STYLE, model_size
from .report import (
    check_format,
    expected_speedup,
    milliseconds,
    model_line,
    print_table,
    quartiles,
    setting_line,
    spread,
)

if TYPE_CHECKING:
    from .measure import Bench

KIND = "optimizer steps at the same memory"
STEPS = ("plain", "fast", "slow")
LABELS = {"plain": "Trainer", "fast": "fast", "slow": "slow"}
MOST = 64  # samples of a step: above them, batches are as fast and no longer usual
SPARE = 0.95  # of a card's free memory, because an allocator cannot use all of it
BACKEND = "inductor"  # of `torch.compile`
LR = 0.0  # an update costs the same, and all rounds see the same weights
HEADER = (
    "shape",
    "checkpointing",
    "optimizer",
    "kernels",
    "samples of a step",
    "micro-batch: Trainer / fast",
    "parts of a slow one",
    "Trainer, ms",
    "fast, ms",
    "slow, ms",
    "speed-up",
    "FLOP limit",
    "GiB: Trainer / fast / slow",
)


def measure(options: BenchArguments) -> dict:
    """All trials: each shape with each setting of checkpointing, kernels and optimizer."""
    from .measure import measured

    return measured(options, list(STEPS), derive, trials, KIND)


def budget_of(options: BenchArguments, device: torch.device) -> int:
    """The bytes that a step may hold, weights included."""
    if options.memory_gib is not None:
        return int(options.memory_gib * GIB)
    if device.type != "cuda":
        raise ValueError(
            "`memory_gib` is unset, but there is no card whose memory could be filled. Use --memory-gib 4."
        )
    free, _ = torch.cuda.mem_get_info(device)
    return int(SPARE * (free + torch.cuda.memory_reserved(device)))


def trials(bench: Bench, names: list[str]) -> dict:
    """One run: both trainers at each setting of kernels, of recomputation in fast steps and of the optimizer.

    The kernels come last, because layers keep them. The bench keeps what there is after each trial.
    """
    budget, found, start = budget_of(bench.options, bench.device), [], {}
    # With checkpointing on, fast steps leave it out, or have it for larger micro-batches (`fast_mode_checkpointing`).
    recomputing = [False, True] if bench.checkpointing == "on" else [False]
    for kernels in sorted(bench.options.kernels):  # "off", then "on"
        with kernels_of(bench) if kernels == "on" else nullcontext({}) as used:
            for optimizer, recomputes in product(bench.options.optimizer, recomputing):
                bench.dual.selective_checkpointing.always = recomputes
                fitted = Fitted(bench, optimizer, budget)
                trial = {"kernels": kernels, **used, "optimizer": optimizer, "fast_mode_checkpointing": recomputes}
                trial |= fitted.fit(start.get((optimizer, recomputes), {}))
                start[optimizer, recomputes] = trial["micro_batch"]
                # Counting sees no operation inside of compiled layers.
                trial["flops"] = {name: fitted.flops(name) for name in names} if kernels == "off" else None
                found.append({**trial, "seconds_by_round": fitted.seconds(names)})
                fitted.close()
                run = {**bench.subject.said, "checkpointing": bench.checkpointing, "budget_bytes": budget}
                run |= {"trials": found, "losses": bench.losses}
                bench.keep(run)
    return run


@contextmanager
def kernels_of(bench: Bench) -> Iterator[dict]:
    """What `use_liger_kernel` and `compile_regions` do, for both trainers' one model.

    Liger also replaces functions and classes of the modules that define the model. They are put back at the end.
    """
    view = bench.dual.dual_forward
    reason = without_ligers_layers(view.interface, bench.device)
    defining = {type(module).__module__ for module in bench.model.modules()}
    before = {name: dict(vars(sys.modules[name])) for name in defining}
    if reason is None:
        apply_liger_kernel(bench.model, {"fused_linear_cross_entropy": False})
    compile_regions(view.interface, view.pruner, BACKEND)
    compiled = sum(module._compiled_call_impl is not None for module in bench.model.modules())
    try:
        yield {"liger": reason is None, "why_no_liger": reason, "compiled_layers": compiled}
    finally:
        for name, names in before.items():
            vars(sys.modules[name]).update(names)


def largest(fits: Callable[[int], bool], start: int, most: int) -> int:
    """The largest number up to `most` that fits, to within an eighth below it; 0 if one does not. Doubles from `start`
    on, then bisects."""
    low, high, tried = 0, most + 1, min(start, most)
    while high - low > max(1, low // 8):
        low, high = (tried, high) if fits(tried) else (low, tried)
        tried = min(2 * low, most) if high > most else (low + high) // 2
    return low


class Fitted:
    """Both trainers of a bench with one optimizer, within `budget` bytes.

    Args:
        bench (`Bench`): of one sample, which is repeated.
        optimizer (`str`): "none" or "adamw".
    """

    def __init__(self, bench: Bench, optimizer: str, budget: int):
        self.bench, self.model, self.device, self.budget = bench, bench.model, bench.device, budget
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = bench.dual.create_optimizer() if optimizer == "adamw" else None
        self.states: list[torch.Tensor] = []
        if self.optimizer is not None:
            for group in self.optimizer.param_groups:
                group["lr"] = LR
            # A first update makes the optimizer's state, which stays.
            self._zero_gradients()
            self.optimizer.step()
            states = self.optimizer.state.values()
            self.states = [value for state in states for value in state.values() if isinstance(value, torch.Tensor)]
            self.model.zero_grad()

    def close(self) -> None:
        """Frees the optimizer."""
        self.optimizer = self.bench.dual.optimizer = None
        self.states = []
        self._collect()

    def fit(self, start: dict[str, int]) -> dict:
        """The largest micro-batches, the samples of a step, the parts of a slow one, and the bytes that each holds."""
        most = self.bench.options.batch or MOST
        sizes = {}
        for name in ("plain", "fast"):
            sizes[name] = largest(lambda rows, name=name: self.fits(name, rows), start.get(name, 1), most)
            if not sizes[name]:
                raise ValueError(
                    f"One sample of {self.bench.subject.said['shape']} does not fit into {self.budget / GIB:.2f} GiB "
                    f"in the {LABELS[name]} step, checkpointing {self.bench.checkpointing}. Use a larger --memory-gib, "
                    "--lora, --optimizer none or --checkpointing on."
                )
        # A step of about the larger one, in micro-batches of the smaller one: 12 of 13 samples in one, not in two.
        small, large = sorted(sizes.values())
        self.samples, self.sizes = min(large, small * max(1, round(large / small))), sizes
        self.fits("fast", sizes["fast"])  # slow_mode_splits="auto" reads the size of the last fast batch
        return {
            "samples": self.samples,
            "micro_batch": sizes,
            "slow_parts": self.fit_parts(),
            "memory": {name: self.held(name, self.micro(name)) for name in STEPS},
        }

    def fit_parts(self) -> int:
        """The parts of a slow micro-batch: those of `slow_mode_splits`, or twice as many until they fit."""
        bench, rows = self.bench, self.micro("slow")
        bench.dual.args.slow_mode_splits = bench.splits
        parts, _ = bench.dual._slow_parts(self.model, self.batch(rows), bench.items * rows)
        while not self.fits("slow", rows):
            if parts >= rows:
                raise ValueError(
                    f"A slow step of {bench.subject.said['shape']} does not fit into {self.budget / GIB:.2f} GiB, not "
                    f"even in {parts} parts of one sample, checkpointing {bench.checkpointing}. Use a larger "
                    "--memory-gib, --lora, --optimizer none or --checkpointing on."
                )
            parts = min(rows, 2 * parts)
            bench.dual.args.slow_mode_splits = parts
        return parts

    def micro(self, name: str) -> int:
        """Samples of the largest micro-batch of a step, whose micro-batches are of like size."""
        passes = math.ceil(self.samples / self.sizes["plain" if name == "plain" else "fast"])
        return math.ceil(self.samples / passes)

    def batch(self, rows: int) -> dict[str, torch.Tensor]:
        """The bench's one sample, `rows` times."""
        return {key: torch.cat([value] * rows) for key, value in self.bench.batch.items()}

    def step(self, name: str, batches: list[dict]) -> None:
        """One optimizer step over micro-batches, through the trainer's own `training_step`."""
        bench = self.bench
        bench.dual.mode = FAST if name == "fast" else SLOW
        trainer = bench.plain if name == "plain" else bench.dual
        trainer.current_gradient_accumulation_steps = len(batches)
        samples = sum(len(batch["input_ids"]) for batch in batches)
        losses = [trainer.training_step(self.model, batch, bench.items * samples) for batch in batches]
        if self.optimizer is not None:
            trainer.accelerator.clip_grad_norm_(self.trained, trainer.args.max_grad_norm)
            self.optimizer.step()
        bench.loss = sum(losses)

    def batches(self, name: str) -> list[dict]:
        """The micro-batches of a whole step, of like size."""
        passes = math.ceil(self.samples / self.sizes["plain" if name == "plain" else "fast"])
        return [self.batch((self.samples + number) // passes) for number in range(passes)]

    def held(self, name: str, rows: int) -> int | None:
        """Bytes at the peak of a step of one micro-batch that adds to gradients; None where memory runs out."""
        batch, out = self.batch(rows), False
        self._collect()
        try:
            self._zero_gradients()
            fixed = [*self.model.parameters(), *self.model.buffers(), *batch.values(), *self.states]
            fixed += [p.grad for p in self.trained]
            known = [*fixed, *self.bench.batch.values(), self.bench.items, *self.bench.encoded]
            peak = peak_memory(lambda: self.step(name, [batch]), known)
        except RuntimeError as error:  # torch.OutOfMemoryError is one
            if not (isinstance(error, torch.OutOfMemoryError) or should_reduce_batch_size(error)):
                raise
            out = True
        # Outside of `except`, because the error keeps the failed attempt's tensors alive.
        self.model.zero_grad()
        if out:
            self._collect()
            return None
        self.bench._clean(name)
        return peak + sum({tensor.untyped_storage().data_ptr(): tensor.nbytes for tensor in fixed}.values())

    def fits(self, name: str, rows: int) -> bool:
        held = self.held(name, rows)
        return held is not None and held <= self.budget

    def flops(self, name: str) -> int:
        """Floating-point operations of a whole step."""
        batches = self.batches(name)
        flops = flops_of(lambda: self.step(name, batches))
        self.bench._clean(name)
        return flops

    def seconds(self, names: list[str]) -> dict[str, list[float]]:
        """Seconds of a whole step of each kind, by round."""
        from .measure import WARM_UP_ROUNDS, order

        rounds = self.bench.options.rounds
        seconds: dict[str, list[float]] = {name: [] for name in names}
        with Work(self.bench.subject.said["shape"], (rounds + WARM_UP_ROUNDS) * len(names)) as work:
            for number in range(-WARM_UP_ROUNDS, rounds):
                for name in order(names, number):
                    batches = self.batches(name)
                    synchronize(self.device)
                    begun = time.perf_counter()
                    self.step(name, batches)
                    synchronize(self.device)
                    taken = time.perf_counter() - begun
                    self.bench._clean(name)
                    work.advance()
                    if number >= 0:
                        seconds[name].append(taken)
        return seconds

    def _zero_gradients(self) -> None:
        for parameter in self.trained:
            parameter.grad = torch.zeros_like(parameter)

    def _collect(self) -> None:
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


def derive(run: dict, slow_ratio: float) -> dict:
    """Adds medians and quartiles of times and of the speed-up within a round, and its FLOP limit, to each trial."""
    found = []
    for trial in run["trials"]:
        # Times, and the speed-up within each round: (rounds,).
        times = {name: torch.tensor(values, dtype=torch.float64) for name, values in trial["seconds_by_round"].items()}
        speedup = expected_speedup(times, slow_ratio, "plain")
        times["mix"] = times["plain"] / speedup
        limit = expected_speedup(trial["flops"], slow_ratio, "plain") if trial["flops"] else None
        seconds = {name: quartiles(values) for name, values in times.items()}
        found.append({**trial, "seconds": seconds, "expected_speedup": quartiles(speedup), "flop_limit": limit})
    return {"trials": found}


def shown(results: dict) -> list[tuple[dict, dict]]:
    """Each trial with its run."""
    return [(run, trial) for run in results["runs"] for trial in run["trials"]]


def rows_of(results: dict) -> list[tuple[str, ...]]:
    """A row per trial."""
    return [
        (
            run["shape"],
            checkpointing_in_words(run, trial),
            trial["optimizer"],
            kernels_in_words(trial),
            str(trial["samples"]),
            f"{trial['micro_batch']['plain']} / {trial['micro_batch']['fast']}",
            str(trial["slow_parts"]),
            *(milliseconds(trial["seconds"][name]["median"]) for name in STEPS),
            spread(trial["expected_speedup"], 2) + " x",
            f"{trial['flop_limit']:.2f} x" if trial["flop_limit"] else "n/a",
            " / ".join(f"{trial['memory'][name] / GIB:.2f}" for name in STEPS),
        )
        for run, trial in shown(results)
    ]


def checkpointing_in_words(run: dict, trial: dict) -> str:
    """The setting of checkpointing of a trial in words."""
    return f"{run['checkpointing']}, fast steps too" if trial.get("fast_mode_checkpointing") else run["checkpointing"]


def kernels_in_words(trial: dict) -> str:
    """The kernels of a trial in words."""
    if trial["kernels"] == "off":
        return "off"
    return "Liger, compiled layers" if trial["liger"] else "compiled layers"


def absent_lines(results: dict) -> list[str]:
    """Why Liger's kernels are in no trial, in words."""
    reasons = {trial.get("why_no_liger") for _, trial in shown(results)} - {None}
    return [f"Without Liger's kernels: {reason}." for reason in sorted(reasons)]


def best_lines(results: dict) -> list[str]:
    """For each shape and optimizer, the speed-up where each trainer has its fastest setting, per sample."""
    groups: dict[tuple[str, str], list[tuple[dict, dict]]] = {}
    for run, trial in shown(results):
        groups.setdefault((run["shape"], trial["optimizer"]), []).append((run, trial))
    lines = []
    for (shape, optimizer), members in groups.items():
        fastest = {}
        for name in ("plain", "mix"):
            run, trial = min(members, key=lambda pair: pair[1]["seconds"][name]["median"] / pair[1]["samples"])
            per_sample = trial["seconds"][name]["median"] / trial["samples"]
            said = f"checkpointing {checkpointing_in_words(run, trial)}, kernels {kernels_in_words(trial)}"
            fastest[name] = (per_sample, said)
        (plain, plain_setting), (mix, mix_setting) = fastest["plain"], fastest["mix"]
        lines.append(
            f"{shape}, optimizer {optimizer}, each at its fastest setting: {plain / mix:.2f} x (Trainer "
            f"{milliseconds(plain)} ms a sample with {plain_setting}; DualSpeed {milliseconds(mix)} ms with "
            f"{mix_setting})."
        )
    return lines


def budget_line(results: dict) -> str:
    """The memory in words."""
    budgets = " and ".join(dict.fromkeys(f"{run['budget_bytes'] / GIB:.2f}" for run in results["runs"]))
    return f"At most {budgets} GiB of weights, gradients, optimizer and activations. {setting_line(results)}"


def report(results: dict, path: Path) -> None:
    """Prints the table; writes Markdown and plot beside the JSON file `path`."""
    check_format(results, KIND)
    console = Console()
    console.print(budget_line(results), highlight=False)
    rows = rows_of(results)
    # Transposed, a column per trial: that fits a terminal.
    print_table(console, ("", *(", ".join(row[:4]) for row in rows)), list(zip(HEADER, *rows, strict=True))[4:])
    for line in (*best_lines(results), *absent_lines(results)):
        console.print(line, highlight=False)
    plot = plot_memory(results, path.with_suffix(".png"))
    write_file(path.with_suffix(".md"), markdown(results, plot.name))


def readme_table(results: dict) -> str:
    """Settings and the table of trials, for a page that shows the plot itself."""
    check_format(results, KIND)
    return "\n\n".join(
        [budget_line(results), markdown_table(HEADER, rows_of(results)), *best_lines(results), *absent_lines(results)]
    )


def markdown(results: dict, plot: str) -> str:
    """The Markdown page."""
    parts = [
        "# Steps at the same memory",
        "Each trainer has the largest micro-batch that fits, found by trying: doubled, then bisected to within an "
        "eighth. A step has about the samples of the larger of the two, and the other trainer accumulates gradients "
        "over as many. 'Fast' and 'slow' are DualSpeedTrainer's; a slow micro-batch runs in parts "
        "(`slow_mode_splits`). 'Fast steps too' is `fast_mode_checkpointing`, which makes room for more samples. With "
        "an optimizer, a step clips gradients and updates the weights. Kernels are Liger's (`use_liger_kernel`), where "
        "it has any, and compiled layers (`compile_regions`), in the model that both trainers step. "
        "Speed-ups are taken within a round, over a Trainer with the same settings. The FLOP limit is what a speed-up "
        "would be if time went with the FLOPs of these very steps.",
        readme_table(results),
        f"![Seconds per sample]({plot})",
        *dict.fromkeys(f"{run['shape']}: {model_line(run)}" for run in results["runs"]),
        "A batch of one above is the sample that is repeated.",
        f"FLOPs: {results['flop_counting']}.",
        f"Memory: {results['memory_counting']}. Weights, gradients and the optimizer's state are added.",
        f"Measured {results['date']} UTC with `dualspeed bench --same-memory`.",
    ]
    return "\n\n".join(parts) + "\n"


def plot_memory(results: dict, path: Path) -> Path:
    """Draws the time of a sample in the plain trainer, in fast steps and in the mix, for each trial."""
    found = shown(results)
    figure, axes = figure_of(9, 1.2 + 0.9 * len(found), 1, 1)
    axis = axes[0][0]
    styles = {
        "plain": ("Trainer", FULL_STEP, ""),
        "mix": (f"DualSpeed, {results['settings']['slow_ratio']:.0%} slow", PART_STYLE["encoder"][0], "//"),
        "fast": ("fast steps", PART_STYLE["rest"][0], ""),
    }
    for place, (name, (label, colour, hatch)) in enumerate(styles.items()):
        values = [trial["seconds"][name]["median"] / trial["samples"] for _, trial in found]
        rows = [row + 0.27 * (place - 1) for row in range(len(found))]
        axis.barh(rows, values, 0.25, color=colour, hatch=hatch, edgecolor="white", linewidth=0, label=label)
        for row, value, (_, trial) in zip(rows, values, found, strict=True):
            said = f"{milliseconds(value)} ms"
            said += f", {trial['expected_speedup']['median']:.2f} x" if name == "mix" else ""
            axis.annotate(said, (value, row), (4, 0), textcoords="offset points", va="center", fontsize=8)
    labels = [
        f"{run['shape']}, checkpointing {checkpointing_in_words(run, trial)}\noptimizer {trial['optimizer']}, kernels "
        f"{kernels_in_words(trial)}\nmicro-batch {trial['micro_batch']['plain']} / {trial['micro_batch']['fast']}"
        for run, trial in found
    ]
    axis.set_yticks(range(len(found)), labels, fontsize=8)
    axis.invert_yaxis()
    axis.set_xlim(0, 1.25 * max(trial["seconds"]["plain"]["median"] / trial["samples"] for _, trial in found))
    axis.set_xlabel("seconds per sample")
    axis.spines[["top", "right"]].set_visible(False)
    figure.legend(frameon=False, fontsize=9, loc="outside lower center", ncols=3)
    settings = results["settings"]
    title = f"In the same memory: {settings['pruner']} removing {settings['pruning_ratio']:.0%}"
    describe(figure, title, results, model_size(results))
    return save_figure(figure, path)
