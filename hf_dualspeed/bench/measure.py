"""`dualspeed bench`: what a fast step costs beside a full one, in time, in floating-point operations and in memory.

A step is the trainers' own `training_step` on one model in random weights and one batch: forward and backward, without
the optimizer's update, which is the same for all. Each round measures each variant once, in changing order, to spread
noise evenly; ratios are taken within a round. Both trainers use their own option for activation checkpointing.
"""

from __future__ import annotations

import gc
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import torch
from torch import nn
from transformers import Trainer, TrainingArguments

from ..feature_cache.units import UNITS
from ..models.components import parameter_roles
from ..models.interface import unwrap, visual_token_ids
from ..pruners import PrunedTokens, VisualTokens
from ..pruners.config import DISCARD
from ..pruning.encoding import encode
from ..pruning.inputs import shorten_inputs
from ..trainer.schedule import FAST, SLOW
from ..trainer.trainer import DualSpeedTrainer
from ..trainer.training_args import DualSpeedTrainingArguments
from ..utils.devices import synchronize
from ..utils.environment import machine, versions
from ..utils.progress import Work
from ..utils.text import one_line, without_paths
from ..utils.writing import write_file, write_json
from .counters import FLOP_COUNTING, MEMORY_COUNTING, cached_batch, count_syncs, device_waits, flops_of, peak_memory
from .largest_batch import largest_batch, size_lines
from .options import BenchArguments
from .report import PARTS, STEPS, check_format, derive, markdown, print_report
from .shapes import Shape, build_batch, build_model, encoder_ratio, given_batch, given_model
from .step_plot import plot_steps

SEEDS = {"weights": 0, "batch": 0, "training": 0}
WARM_UP_ROUNDS = 1
PART = ".part.json"  # the runs so far, for an interrupted measurement


def write(results: dict, path: Path) -> None:
    """Writes the results as JSON."""
    write_json(path, without_paths(results))


def report(results: dict, path: Path) -> None:
    """Prints the tables; writes Markdown and plot beside the JSON file `path`."""
    check_format(results)
    print_report(results)
    for words in size_lines(results):
        print(words)
    plot = plot_steps(results, path.with_suffix(".png"))
    write_file(path.with_suffix(".md"), markdown(results, plot.name))


def measure(options: BenchArguments) -> dict:
    """All runs: each shape with each setting of checkpointing."""
    return measured(options, list(STEPS) + list(PARTS), derive)


def measured(
    options: BenchArguments,
    names: list[str],
    evaluate: Callable[[dict, float], dict],
    run_of: Callable[[Bench, list[str]], dict] = lambda bench, names: bench.run(names),
    benchmark: str = "training steps, forward and backward",
) -> dict:
    """Results of all runs: `run_of` measures the variants `names` of each shape and setting of checkpointing.

    `evaluate` maps a run and the slow ratio to what is added to the run. `benchmark` says what was measured.
    """
    threads, runs = torch.get_num_threads(), []

    def kept(run: dict) -> dict:
        """The results up to a run, which are kept for an interrupted measurement."""
        found = [*runs, {**run, **evaluate(run, options.slow_ratio)}]
        results = {**surroundings(options), "benchmark": benchmark, "runs": found}
        if options.kind in ("steps", "same_memory"):  # other reports need all runs
            write(results, Path(options.output).with_suffix(PART))
        return results

    try:
        if options.threads is not None:
            torch.set_num_threads(options.threads)
        for shape in options.shapes() or [None]:
            for checkpointing in options.checkpointing:
                gc.collect()  # frees the last run's model
                with tempfile.TemporaryDirectory() as folder:
                    run = run_or_say(options, shape, checkpointing, folder, partial(run_of, names=names), kept)
                results = kept(run)
                runs = results["runs"]
        return results
    finally:
        torch.set_num_threads(threads)


def run_or_say(
    options: BenchArguments,
    shape: Shape | None,
    checkpointing: str,
    folder: str,
    run: Callable[[Bench], dict],
    keep: Callable[[dict], object],
) -> dict:
    """One run, or a `ValueError` with the remedy where memory runs out. `keep` is the bench's."""
    try:
        return run(Bench(options, shape, checkpointing, folder, keep))
    except torch.OutOfMemoryError as error:
        raise ValueError(
            f"{options.model or shape.name} with a batch of {options.rows(shape)} and checkpointing {checkpointing} "
            f"does not fit into memory ({one_line(error)}). Use a smaller --batch, --lora, or --checkpointing on."
        ) from error


def surroundings(options: BenchArguments) -> dict:
    """What all runs have in common."""
    device = default_device()
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M"),
        "machine": machine(device),
        "versions": versions(),
        "device": device.type,
        "dtype": str(default_dtype(device)).removeprefix("torch."),
        "rounds": options.rounds,
        "seeds": SEEDS,
        "settings": options.recorded(),
        "flop_counting": FLOP_COUNTING,
        "memory_counting": MEMORY_COUNTING,
    }


def default_device() -> torch.device:
    """A CUDA device where there is one, else the CPU. Memory is counted on these two only."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def default_dtype(device: torch.device) -> torch.dtype:
    """The precision of weights and activations on a device."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


@dataclass
class Subject:
    """A model, a batch on its device, and their description in the results file."""

    model: nn.Module
    batch: dict[str, torch.Tensor]
    said: dict
    sample: dict[str, torch.Tensor] | None = None  # a batch of one sample, of a model that the options name


def build_subject(options: BenchArguments, shape: Shape | None, device: torch.device) -> Subject:
    """The model and batch of a shape in random weights, or of the model that the options name."""
    dtype, rows, sample = default_dtype(device), options.rows(shape), None
    if shape is None:
        model, processor = given_model(options.model, dtype, device, options.lora)
        batch = given_batch(processor, rows, options.text_tokens, options.image_size or 336)
        sample = given_batch(processor, 1, options.text_tokens, options.image_size or 336)
        said = {"shape": Path(options.model).name, "like": type(unwrap(model)).__name__}
    else:
        if options.scale == "full" and device.type != "cuda" and options.layers is None:
            raise ValueError(
                "`scale` is 'full', but PyTorch finds no GPU, which 7 B parameters need. Use small, or give --layers 2 "
                "for so many layers of that width."
            )
        sizes = shape.sizes(options.scale, options.hidden_size, options.layers)
        model = build_model(shape, sizes, options.text_tokens, dtype, device, SEEDS["weights"], options.lora)
        batch = build_batch(shape, sizes, rows, options.text_tokens, SEEDS["batch"])
        ratios = {"encoder_ratio": encoder_ratio(shape, sizes), "real_encoder_ratio": encoder_ratio(shape, shape.real)}
        said = {"shape": shape.name, "like": shape.like, **ratios}
        said |= {"layers": sizes.layers, "tower_layers": sizes.tower_layers}
    batch, sample = (on_device(made, dtype, device) for made in (batch, sample))
    return Subject(model, batch, {**said, **counted(unwrap(model), batch)}, sample)


def on_device(batch: dict[str, torch.Tensor] | None, dtype: torch.dtype, device: torch.device) -> dict | None:
    """A batch on a device, its pixels in the precision of training."""
    if batch is None:
        return None
    return {key: value.to(device, dtype if value.is_floating_point() else None) for key, value in batch.items()}


def counted(model: nn.Module, batch: dict[str, torch.Tensor]) -> dict:
    """Parameters by role, and the batch's tokens by kind."""
    # Visual tokens are the placeholders among ids (B, S).
    ids = batch["input_ids"]
    placeholders = torch.tensor(sorted(visual_token_ids(model.config)), device=ids.device)
    visual = torch.isin(ids, placeholders).sum().item()
    sizes = {"language_model_without_embeddings": 0, "vision_tower": 0, "projector": 0, "embeddings": 0}
    tables = {id(table.weight) for table in (model.get_input_embeddings(), model.get_output_embeddings())}
    roles = parameter_roles(model)
    for name, parameter in model.named_parameters():
        role = roles[name].replace("language_model", "language_model_without_embeddings")
        sizes["embeddings" if id(parameter) in tables else role] += parameter.numel()
    return {
        "batch": len(ids),
        "visual_tokens": visual / len(ids),
        "text_tokens": (batch["attention_mask"].sum().item() - visual) / len(ids),
        "supervised_tokens": (batch["labels"] != -100).sum().item() / len(ids),
        "parameters": sizes,
        "trainable_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
    }


class SteppedTrainer(DualSpeedTrainer):
    """A trainer whose steps are in the mode that was set last."""

    mode = FAST

    def mode_at(self, step: int) -> str:
        return self.mode


class FixedPruner:
    """Returns a given result in place of a pruner, to time shortening without selection."""

    in_language_model = False

    def __init__(self, answer: PrunedTokens):
        self.answer = answer

    def __call__(self, tokens: VisualTokens, progress: float = 1.0) -> PrunedTokens:
        return self.answer


class Bench:
    """The steps of two trainers on one model, and the parts of the fast step.

    `keep` takes what a long run has so far.
    """

    def __init__(
        self,
        options: BenchArguments,
        shape: Shape | None,
        checkpointing: str,
        folder: str,
        keep: Callable[[dict], object] = lambda run: None,
    ):
        self.options, self.checkpointing, self.keep = options, checkpointing, keep
        self.device = default_device()
        self.subject = build_subject(options, shape, self.device)
        self.model, self.batch = self.subject.model, self.subject.batch
        # Supervised tokens, which training counts over all micro-batches of a step.
        self.items = (self.batch["labels"] != -100).sum()
        common = {"output_dir": folder, "report_to": "none", "save_strategy": "no", "seed": SEEDS["training"]}
        common |= {"activation_checkpointing": checkpointing == "on", "disable_tqdm": True}
        common |= {"use_cpu": self.device.type == "cpu"}
        self.splits = options.splits(checkpointing)
        settings = {"pruner": options.pruner, "pruning_ratio": options.pruning_ratio, "slow_mode_splits": self.splits}
        settings |= {"memory_gib": options.memory_gib}
        self.dual = SteppedTrainer(model=self.model, args=DualSpeedTrainingArguments(**settings, **common))
        self.plain = Trainer(model=self.model, args=TrainingArguments(**common))
        self._begin()
        self.losses: dict[str, float] = {}
        self.dropped_tokens = self.dual.dual_forward.pruner.config.dropped_tokens
        self.step("fast")  # slow_mode_splits="auto" needs the size of a fast step
        self._clean("fast")
        # Only the kind "steps" measures cached features.
        self.cached = cached_batch(self.dual, self.batch, f"{folder}/features") if options.kind == "steps" else None
        absent = {"fast_cached"} if self.cached is None else set()
        absent |= {"fast_discarding"} if self.dual.dual_forward.pruner.merges else set()  # it always merges
        self.steps = [name for name in STEPS if name not in absent]
        self.variants = {**{name: partial(self.step, name) for name in self.steps}, **self._parts()}

    def _begin(self) -> None:
        """What `train` does before the first step."""
        if self.plain.args.activation_checkpointing:
            self.model.activation_checkpointing_enable()
        for trainer in (self.plain, self.dual):
            trainer.current_gradient_accumulation_steps = 1
            trainer.callback_handler.on_train_begin(trainer.args, trainer.state, trainer.control)

    def step(self, name: str) -> None:
        """Forward and backward of one micro-batch, through the trainer's own `training_step`."""
        self.dual.mode = FAST if name.startswith("fast") else SLOW
        self.dual.args.distillation_weight = 0.0 if name == "slow_without_distillation" else 1.0
        trainer, dual_forward = self.plain if name == "plain" else self.dual, self.dual.dual_forward
        if not dual_forward.pruner.merges:
            dropped = DISCARD if name == "fast_discarding" else self.dropped_tokens
            dual_forward.pruner.config = replace(dual_forward.pruner.config, dropped_tokens=dropped)
        dual_forward.proportional_attention = name != "fast_discarding"
        batch = self.cached if name == "fast_cached" else self.batch
        self.loss = trainer.training_step(self.model, batch, self.items)

    def _parts(self) -> dict[str, Callable]:
        """Parts of steps alone: the fast step's encoding, selection and shortening, and the slow step's teacher."""
        model, dual_forward = self.model.train(), self.dual.dual_forward
        interface, pruner = dual_forward.interface, dual_forward.pruner
        with torch.no_grad():
            encodings = encode(interface, self.batch, pruner.needs)
        generator = torch.Generator(self.device).manual_seed(SEEDS["training"])
        tokens = self.tokens = encodings[0].tokens(generator)
        pruned = pruner(tokens)
        shorten = partial(shorten_inputs, interface, self.batch, encodings, FixedPruner(pruned))

        def teach() -> None:
            with dual_forward.in_mode(SLOW, distil=True, generator=generator) as state:
                dual_forward.teach(model, self.batch, encodings, state)

        self.encoded = [tensor for encoding in encodings for tensor in _tensors(vars(encoding).values())]
        self.encoded += _tensors(self.cached[UNITS].features.values() if self.cached else [])
        self.encoded += [*_tensors(vars(pruned).values()), *_tensors(vars(tokens).values())]
        return {
            "teacher": teach,
            "encoder": partial(encode, interface, self.batch, pruner.needs),
            "selection": partial(pruner, tokens),
            "shortening": partial(shorten, dual_forward.isolator, dual_forward.position_ids),
        }

    def run(self, names: list[str]) -> dict:
        """Counts and times those variants of `names` that exist."""
        names = [name for name in names if name in self.variants]
        parts, _ = self.dual._slow_parts(self.model, self.batch, self.items)
        counts = {
            "flops": {name: self.count_flops(name) for name in names},
            "memory": {name: self.count_memory(name) for name in names},
            "host_waits": {name: sum(self.count_syncs(name).values()) for name in names if name in PARTS},
        }
        if self.device.type == "cuda":
            counts["device_waits"] = {name: self.count_syncs(name, device_waits) for name in names}
        gradients = sum(p.nbytes for p in self.model.parameters() if p.requires_grad)
        return {
            **self.subject.said,
            "checkpointing": self.checkpointing,
            "slow_splits": self.splits,
            "slow_parts": parts,
            "weights_bytes": sum(p.nbytes for p in self.model.parameters()),
            "gradients_bytes": gradients,
            **counts,
            "largest_batch": largest_batch(self),
            "seconds_by_round": self.measure(names),
            "losses": self.losses,
        }

    def count_flops(self, name: str) -> int:
        """Floating-point operations of one variant."""
        flops = flops_of(self.variants[name])
        self._clean(name)
        return flops

    def count_memory(self, name: str) -> int:
        """The most bytes that a variant holds at one time, without weights and gradients."""
        known = [*self.model.parameters(), *self.model.buffers(), *self.batch.values(), self.items, *self.encoded]
        for parameter in self.model.parameters():
            if parameter.requires_grad:
                parameter.grad = torch.zeros_like(parameter)
                known.append(parameter.grad)
        peak = peak_memory(self.variants[name], known)
        self._clean(name)
        return peak

    def count_syncs(self, name: str, watch: Callable[[], AbstractContextManager] = count_syncs) -> dict[str, int]:
        """How often a variant waits for the device, by the names that `watch` collects."""
        with watch() as waits:
            self.variants[name]()
        self._clean(name)
        return dict(Counter(waits))

    def measure(self, names: list[str]) -> dict[str, list[float]]:
        """Seconds of each variant by round."""
        seconds: dict[str, list[float]] = {name: [] for name in names}
        said = f"{self.subject.said['shape']}, checkpointing {self.checkpointing}"
        with Work(said, (self.options.rounds + WARM_UP_ROUNDS) * len(names)) as work:
            for number in range(-WARM_UP_ROUNDS, self.options.rounds):
                for name in order(names, number):
                    taken = self._time(name)
                    work.advance()
                    if number >= 0:
                        seconds[name].append(taken)
        return seconds

    def _time(self, name: str) -> float:
        synchronize(self.device)
        begun = time.perf_counter()
        self.variants[name]()
        synchronize(self.device)
        taken = time.perf_counter() - begun
        self._clean(name)
        return taken

    def _clean(self, name: str) -> None:
        if name in STEPS:
            self.losses[name] = self.loss.item()
        self.model.zero_grad()


def _tensors(values) -> list[torch.Tensor]:
    """The tensors among values and lists of them."""
    flat = [item for value in values for item in (value if isinstance(value, list) else [value])]
    return [item for item in flat if isinstance(item, torch.Tensor)]


def order(names: list[str], number: int) -> list[str]:
    """The names, rotated by the round's number. Odd rounds are reversed, to change neighbours too."""
    start = number % len(names)
    rotated = names[start:] + names[:start]
    return rotated[::-1] if number % 2 else rotated
