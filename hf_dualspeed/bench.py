"""`dualspeed bench`: what a fast step costs beside a full one, in time and in floating-point operations.

One LLaVA in random weights, one batch, and the trainers' own `training_step` (forward and backward; the
optimizer's update, alike for all, is not in it). Every round measures every variant once, in changing order,
so that noise meets all of them alike; ratios are taken within a round.

FLOPs are those of `torch.utils.flop_counter.FlopCounterMode` over the same call, with a formula added for the
CPU's flash attention, which it would leave out. It counts attention without regard to the causal mask.
"""

from __future__ import annotations

import argparse
import copy
import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import torch
from rich.progress import Progress
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Trainer,
    TrainingArguments,
)

from hf_dualspeed.arguments import DualSpeedTrainingArguments, check_choice, check_range, nearest
from hf_dualspeed.bench_report import PARTS, STEPS, derive, print_report, write_report
from hf_dualspeed.encoding import encode
from hf_dualspeed.fast_pass import shorten_inputs
from hf_dualspeed.host_waits import host_waits
from hf_dualspeed.model_roles import freeze_roles, parameter_roles
from hf_dualspeed.pruners import PrunedTokens, Pruner, PrunerConfig, VisualTokens, available_pruners, pruner_class
from hf_dualspeed.results import machine, versions, without_paths
from hf_dualspeed.trainer import DualSpeedTrainer

VOCABULARY = 8192
IMAGE_ID = 3
SUPERVISED_TOKENS = 64
SEEDS = {"weights": 0, "batch": 0, "training": 0}
WARM_UP_ROUNDS = 1
FLOP_COUNTING = (
    "torch.utils.flop_counter.FlopCounterMode over one training_step with SDPA; CPU flash attention by "
    "torch's own attention formulas, registered through custom_mapping; causal masks not deducted"
)


@dataclass
class BenchArguments:
    """Options of `dualspeed bench`.

    Raises:
        ValueError: an option is outside its range; the message names it, its value and the remedy.
    """

    batch: int = field(default=4, metadata={"help": "Samples, with one image each."})
    image_size: int = field(default=336, metadata={"help": "Edge of the images in pixels."})
    patch_size: int = field(default=14, metadata={"help": "Edge of a patch: (size / patch)^2 visual tokens."})
    text_tokens: int = field(default=200, metadata={"help": "Text tokens per sample, at most 64 supervised."})
    hidden_size: int = field(default=512, metadata={"help": "Width of the language model, a multiple of 64."})
    layers: int = field(default=8, metadata={"help": "Layers of the language model."})
    rounds: int = field(default=14, metadata={"help": "Rounds; each measures every variant once."})
    pruner: str = field(default="divprune", metadata={"help": "Registered pruner."})
    pruning_ratio: float = field(default=0.9, metadata={"help": "Fraction of visual tokens removed, [0, 1)."})
    slow_ratio: float = field(default=0.1, metadata={"help": "Slow steps in the expected speed-up, [0, 1]."})
    threads: int | None = field(default=None, metadata={"help": "CPU threads. Unset: PyTorch's choice."})
    output: str = field(default="docs/results/bench.json", metadata={"help": "JSON file; .md and .png beside it."})

    def __post_init__(self):
        for name, low in {"batch": 1, "patch_size": 1, "layers": 1, "text_tokens": 4, "rounds": 2}.items():
            check_range(name, getattr(self, name), low, off=f"Use --{name.replace('_', '-')} {low} or more.")
        if self.threads is not None:
            check_range("threads", self.threads, 1, off="Leave it out for PyTorch's choice.")
        check_range("pruning_ratio", self.pruning_ratio, 0, 1, right_open=True, off="0.9 is usual.")
        check_range("slow_ratio", self.slow_ratio, 0, 1, off="0.1 is usual.")
        check_choice("pruner", self.pruner, available_pruners())
        if pruner_class(self.pruner).in_language_model:
            raise ValueError(
                f"`pruner` is {self.pruner!r}, which drops tokens inside the language model: there is no selection nor "
                "shortening in front of it to be timed. Choose one that works there, such as 'divprune'."
            )
        check_multiple("image_size", self.image_size, self.patch_size)
        check_multiple("hidden_size", self.hidden_size, 64)
        if Path(self.output).suffix != ".json":
            raise ValueError(f"`output` must end in .json, got {self.output!r}. Use bench.json, for example.")

    @property
    def visual_tokens(self) -> int:
        """Visual tokens per image."""
        return (self.image_size // self.patch_size) ** 2


def check_multiple(name: str, value: int, step: int) -> None:
    """Raises a `ValueError` with the nearest usable value unless `value` is a positive multiple of `step`."""
    if value < step or value % step:
        usable = step * max(1, round(value / step))
        raise ValueError(f"`{name}` must be a positive multiple of {step}, got {value}. Use {usable}, for example.")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:
        raise ValueError(message)


def parse_arguments(argv: list[str]) -> tuple[BenchArguments, bool]:
    """The options, and whether to draw an earlier measurement anew instead of measuring.

    Raises:
        ValueError: an option is unknown, cannot be converted or is out of range.
    """
    parser = _Parser(
        prog="dualspeed bench",
        description="Times fast and slow training steps of a LLaVA in random weights against plain ones.",
        allow_abbrev=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    kinds = {"float": float, "str": str}
    for option in fields(BenchArguments):
        flag = "--" + option.name.replace("_", "-")
        kind = kinds.get(str(option.type), int)
        parser.add_argument(flag, type=kind, default=option.default, help=option.metadata["help"])
    parser.add_argument("--render-only", action="store_true", help="render the JSON of an earlier run anew")
    namespace, unknown = parser.parse_known_args(argv)
    if unknown:
        flag = unknown[0].split("=")[0]
        raise ValueError(f"Unknown argument `{flag}`.{nearest(flag, list(parser._option_string_actions))}")
    options = vars(namespace)
    render_only = options.pop("render_only")
    return BenchArguments(**options), render_only


def main(argv: list[str]) -> None:
    """Measures, or reads an earlier measurement, and writes JSON, Markdown and plot.

    Args:
        argv (`list[str]`): The words after `dualspeed bench`.
    """
    options, render_only = parse_arguments(argv)
    path = Path(options.output)
    if render_only:
        if not path.is_file():
            raise FileNotFoundError(
                f"`output` is {options.output!r}, but there is no such file to render. Measure first."
            )
        results = json.loads(path.read_text(encoding="utf-8"))
    else:
        path.parent.mkdir(parents=True, exist_ok=True)
        results = run_bench(options)
        path.write_text(json.dumps(without_paths(results), indent=2) + "\n", encoding="utf-8")
    print_report(results)
    write_report(results, path)


def run_bench(options: BenchArguments) -> dict:
    """Builds model and batch, counts, measures, and derives what the report shows."""
    threads = torch.get_num_threads()
    try:
        if options.threads is not None:
            torch.set_num_threads(options.threads)
        with tempfile.TemporaryDirectory() as folder:
            bench = Bench(options, folder)
            flops = {name: bench.count_flops(name) for name in STEPS}
            waits = {name: bench.count_waits(name) for name in PARTS}
            seconds = bench.measure()
        return {**describe(bench), "flops": flops, **derive(seconds, flops, waits, options.slow_ratio)}
    finally:
        torch.set_num_threads(threads)


# --- model, batch, variants ---------------------------------------------------------------------------------


def build_model(options: BenchArguments, dtype: torch.dtype) -> LlavaForConditionalGeneration:
    """A LLaVA in random weights, about in LLaVA-1.5's proportions, with a frozen vision tower as there."""
    width = options.hidden_size
    text = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=width,
        intermediate_size=width * 43 // 16,
        num_hidden_layers=options.layers,
        num_attention_heads=width // 64,
        max_position_embeddings=options.visual_tokens + options.text_tokens,
        pad_token_id=0,
    )
    vision_heads = max(1, round(width * 3 / 8 / 64))
    vision = CLIPVisionConfig(
        image_size=options.image_size,
        patch_size=options.patch_size,
        hidden_size=64 * vision_heads,
        intermediate_size=4 * 64 * vision_heads,
        num_hidden_layers=max(2, options.layers * 3 // 4),
        num_attention_heads=vision_heads,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=IMAGE_ID,
        image_seq_length=options.visual_tokens,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEEDS["weights"])
        model = LlavaForConditionalGeneration(config).to(dtype)
    freeze_roles(model, train_vision_tower=False, train_projector=True, train_language_model=True)
    return model


def build_batch(options: BenchArguments, device: torch.device, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """A batch without padding: one token, the image, the rest of the text; its last tokens are supervised."""
    generator = torch.Generator().manual_seed(SEEDS["batch"])
    rows, visual, text = options.batch, options.visual_tokens, options.text_tokens
    words = torch.randint(IMAGE_ID + 1, VOCABULARY, (rows, text), generator=generator)
    ids = torch.cat([words[:, :1], torch.full((rows, visual), IMAGE_ID), words[:, 1:]], dim=1)
    labels = ids.clone()
    labels[:, : -supervised_tokens(options)] = -100
    pixels = torch.randn(rows, 3, options.image_size, options.image_size, generator=generator)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    return {key: value.to(device) for key, value in {**batch, "pixel_values": pixels.to(dtype)}.items()}


def supervised_tokens(options: BenchArguments) -> int:
    """Supervised positions per sample."""
    return min(SUPERVISED_TOKENS, options.text_tokens // 2)


class Known(Pruner):
    """A pruner whose answer is known beforehand, which leaves all the rest of shortening."""

    def __init__(self, pruned: PrunedTokens):
        super().__init__(PrunerConfig())
        self.pruned = pruned

    def forward(self, tokens: VisualTokens) -> PrunedTokens:
        return self.pruned


class Bench:
    """The four steps, each with its own trainer and copy of the model, and the parts of the fast step."""

    def __init__(self, options: BenchArguments, folder: str):
        self.options = options
        common = {"output_dir": folder, "report_to": "none", "save_strategy": "no", "seed": SEEDS["training"]}
        plain = TrainingArguments(**common)
        self.device = plain.device
        self.dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        self.model = build_model(options, self.dtype)
        self.batch = build_batch(options, self.device, self.dtype)
        # As training counts them over the accumulated batches of a step.
        self.items = (self.batch["labels"] != -100).sum()
        dual = partial(DualSpeedTrainingArguments, pruner=options.pruner, pruning_ratio=options.pruning_ratio, **common)
        self.trainers = {
            "plain": Trainer(model=copy.deepcopy(self.model), args=plain),
            "slow_without_distillation": self._dual(dual(slow_mode_ratio=1.0, distillation_weight=0.0)),
            "fast": self._dual(dual(slow_mode_ratio=0.0)),
            "slow": self._dual(dual(slow_mode_ratio=1.0)),
        }
        self.losses: dict[str, float] = {}
        self.variants = {**{name: partial(self.step, name) for name in STEPS}, **self._parts()}

    def _dual(self, args: DualSpeedTrainingArguments) -> DualSpeedTrainer:
        return DualSpeedTrainer(model=copy.deepcopy(self.model), args=args)

    def step(self, name: str) -> None:
        """Forward and backward of one micro-batch, through the trainer's own `training_step`."""
        trainer = self.trainers[name]
        self.loss = trainer.training_step(trainer.model, self.batch, self.items)

    def _parts(self) -> dict[str, Callable]:
        """The fast step's parts alone: encoding, the pruner, and what else shortens the batch."""
        trainer = self.trainers["fast"]
        model, mode_pass = trainer.model.train(), trainer.mode_pass
        pruner = mode_pass.pruner
        encodings = encode(model, self.batch, pruner.needs)
        generator = torch.Generator(self.device).manual_seed(SEEDS["training"])
        tokens = encodings[0].tokens(generator)
        pruned = pruner(tokens)
        shorten = partial(shorten_inputs, model, self.batch, encodings)
        return {
            "encoder": partial(encode, model, self.batch, pruner.needs),
            "selection": partial(pruner, tokens),
            "shortening": partial(shorten, Known(pruned), mode_pass.isolator, mode_pass.position_ids),
        }

    def count_flops(self, name: str) -> int:
        """Floating-point operations of one step."""
        cpu = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        formulas = {
            cpu: lambda query, key, value, *_, **__: sdpa_flop_count(query, key, value),
            backward: lambda *shapes, **__: sdpa_backward_flop_count(*shapes[:4]),
        }
        with FlopCounterMode(display=False, custom_mapping=formulas) as counter:
            self.step(name)
        self._clean(name)
        return counter.get_total_flops()

    def count_waits(self, name: str) -> int:
        """How often one of the parts waits for the device."""
        with host_waits() as waits:
            self.variants[name]()
        return len(waits)

    def measure(self) -> dict[str, list[float]]:
        """Seconds of each variant by round."""
        seconds: dict[str, list[float]] = {name: [] for name in self.variants}
        with Progress(transient=True) as progress:
            task = progress.add_task("rounds", total=(self.options.rounds + WARM_UP_ROUNDS) * len(self.variants))
            for number in range(-WARM_UP_ROUNDS, self.options.rounds):
                for name in order(list(self.variants), number):
                    taken = self._time(name)
                    progress.advance(task)
                    if number >= 0:
                        seconds[name].append(taken)
        return seconds

    def _time(self, name: str) -> float:
        self._synchronize()
        begun = time.perf_counter()
        self.variants[name]()
        self._synchronize()
        taken = time.perf_counter() - begun
        self._clean(name)
        return taken

    def _clean(self, name: str) -> None:
        if name in self.trainers:
            self.losses[name] = self.loss.item()
            self.trainers[name].model.zero_grad()

    def _synchronize(self) -> None:
        if self.device.type != "cpu":
            torch.accelerator.synchronize()


def order(names: list[str], number: int) -> list[str]:
    """The names, rotated by the round's number; every other round backwards, to change neighbours too."""
    start = number % len(names)
    rotated = names[start:] + names[:start]
    return rotated[::-1] if number % 2 else rotated


# --- results ------------------------------------------------------------------------------------------------


def describe(bench: Bench) -> dict:
    """What was measured, on what."""
    options, model = bench.options, bench.model
    settings = {key: value for key, value in asdict(options).items() if key not in ("output", "threads")}
    sizes = {"language_model_without_embeddings": 0, "vision_tower": 0, "projector": 0, "embeddings": 0}
    outer = [model.get_input_embeddings().weight, model.get_output_embeddings().weight]
    tables = {id(weight) for weight in outer}
    roles = parameter_roles(model)
    for name, parameter in model.named_parameters():
        role = roles[name].replace("language_model", "language_model_without_embeddings")
        sizes["embeddings" if id(parameter) in tables else role] += parameter.numel()
    return {
        "benchmark": "training steps, forward and backward",
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M"),
        "machine": machine(),
        "versions": versions(),
        "device": bench.device.type,
        "dtype": str(bench.dtype).removeprefix("torch."),
        "rounds": options.rounds,
        "seeds": SEEDS,
        "settings": settings,
        "shape": {
            "visual_tokens": options.visual_tokens,
            "text_tokens": options.text_tokens,
            "supervised_tokens": supervised_tokens(options),
            "vocabulary": VOCABULARY,
            "parameters": sizes,
        },
        "flop_counting": FLOP_COUNTING,
        "losses": bench.losses,
    }


if __name__ == "__main__":
    import sys

    main(sys.argv[1:])
