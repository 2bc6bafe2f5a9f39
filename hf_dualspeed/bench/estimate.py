"""`dualspeed estimate`: what training a model takes and what it gains, before anything is downloaded or trained.

Memory is the sum of weights, gradients and the optimizer's state, which follow from the parameters, and of what a step
makes at its peak. That is measured on paper ([`Steps`]) at two batch sizes and two depths of the language model, and is
linear in between and beyond. Slow steps run in parts (`slow_mode_splits="auto"`), so that from the batch on whose parts
are small, what counts is the samples of a part.
"""

from __future__ import annotations

import copy
import math
import re
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path

import torch
from torch import nn
from transformers import AutoConfig, AutoProcessor, PreTrainedConfig, PreTrainedModel, ProcessorMixin

from ..models.adapters import add_lora
from ..models.components import freeze_roles, parameter_roles
from ..models.interface import ModelInterface
from ..trainer.batch_splitting import SMALL, parts_of
from ..trainer.schedule import FAST, SLOW
from ..trainer.sizing.choice import USABLE
from ..utils.environment import versions
from ..utils.memory import GIB
from ..utils.text import markdown_table
from .on_paper import PLAIN, PRUNER, RECOMPUTED, Steps, empty_model, without_data
from .samples import sample_from_config
from .shapes import given_batch

TRAINS = ("full", "lora", "qlora")
DTYPES = ("bfloat16", "float32")
WORDS = {"full": "full", "lora": "LoRA", "qlora": "QLoRA"}
ROLES = ("vision_tower", "projector", "language_model")
ROWS = (1, 8)  # batch sizes at which steps are measured
LEAST_LAYERS = 3  # of the shallower of the two models that stand for a deep one
MOST = 1024  # samples; larger batches are not looked for
# Bytes of a weight in 4-bit NormalFloat: half a byte, and the scale of each block of 64, itself in 8 bits and blocks of
# 256 ("double quantization").
NF4 = 0.5 + 1 / 64 + 4 / (64 * 256)
PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json")
COUNTING = (
    "activations: bytes of live tensors at the peak of the trainers' own training_step on tensors without data, with "
    "the batch's; gradients exist beforehand, as in gradient accumulation; pruner 'random', so that what a selecting "
    "pruner needs while it selects is left out. Weights, gradients and AdamW's two moments, in the parameters' own "
    "precision, and 4-bit weights are arithmetic"
)


@dataclass(frozen=True)
class Settings:
    """What is estimated.

    Args:
        image_size (`tuple[int, int]`): width and height in pixels of a sample's one image.
        text_tokens (`int`): tokens of a sample's text, marks around the image not counted.
        pruning_ratio, slow_mode_ratio (`float`): those of training.
        dtype (`str`): of the weights. Under bfloat16, steps run as with `bf16=True`.
        lora_rank (`int`): of the adapters on all linear layers of the language model.
    """

    image_size: tuple[int, int] = (1024, 768)
    text_tokens: int = 200
    pruning_ratio: float = 0.9
    slow_mode_ratio: float = 0.05
    dtype: str = "bfloat16"
    lora_rank: int = 16


def as_json(settings: Settings) -> dict:
    """The settings as a results file has them."""
    return {**asdict(settings), "image_size": list(settings.image_size)}


@dataclass
class Subject:
    """A model to be: its name, configuration, and processor if its files are at hand."""

    name: str
    config: PreTrainedConfig
    processor: ProcessorMixin | None

    def sample(self, settings: Settings) -> dict[str, torch.Tensor]:
        """One collated sample in the precision of training."""
        size, text, dtype = settings.image_size, settings.text_tokens, getattr(torch, settings.dtype)
        if self.processor is None:
            sample = sample_from_config(self.config, *size, text)
        else:
            sample = given_batch(self.processor, 1, text, *size)
        return {key: value.to(dtype) if value.is_floating_point() else value for key, value in sample.items()}


def subject_of(name: str) -> Subject:
    """The model of a Hub id, a folder, or a configuration's file, of which no weights are read.

    Raises:
        OSError, ValueError: there is no such model, or transformers does not know its kind.
    """
    path = Path(name)
    if path.is_absolute() and not path.exists():
        raise ValueError(f"`model` is {name!r}, but there is no such file or folder.")
    alone = path.is_file() or (path.is_dir() and not any((path / file).is_file() for file in PROCESSOR_FILES))
    config = AutoConfig.from_pretrained(name)
    processor = None if alone else AutoProcessor.from_pretrained(name)
    return Subject(path.stem if path.is_file() else name, config, processor)


def quantized(model: nn.Module) -> set[str]:
    """The names of the weights that QLoRA keeps in 4 bits: those of all linear layers but the head."""
    head = model.get_output_embeddings()
    layers = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and module is not head]
    return {f"{name}.weight" for name in layers}


def trained_model(config: PreTrainedConfig, train: str, settings: Settings) -> tuple[nn.Module, dict]:
    """The model on the meta device as it is trained, with a frozen tower, and the bytes that its training holds."""
    model = empty_model(config, getattr(torch, settings.dtype))
    ModelInterface(model).check_protocol()
    small = quantized(model) if train == "qlora" else set()
    if train == "qlora":  # PEFT's `prepare_model_for_kbit_training` keeps the others in float32
        for name, parameter in model.named_parameters():
            if name not in small:
                parameter.data = parameter.data.float()
    weights = {name: p.numel() * NF4 if name in small else p.nbytes for name, p in model.named_parameters()}
    outer = model if train == "full" else with_adapters(model, settings.lora_rank)
    freeze_roles(model, train_projector=train == "full")
    trainable = [p for p in outer.parameters() if p.requires_grad]
    adapters = 0 if train == "full" else sum(p.nbytes for p in trainable)
    gradients = sum(p.nbytes for p in trainable)
    return outer, {
        "trainable": sum(p.numel() for p in trainable),
        "weights_bytes": round(sum(weights.values())) + adapters,
        "gradients_bytes": gradients,
        "optimizer_bytes": 2 * gradients,
    }


def with_adapters(model: PreTrainedModel, rank: int) -> nn.Module:
    """The model with LoRA adapters on all linear layers of its language model, as the recipes have them."""
    decoder = model.get_decoder()
    inside = {id(module) for module in decoder.modules() if isinstance(module, nn.Linear)}
    targets = [name for name, module in model.named_modules() if id(module) in inside]
    options = {"r": rank, "lora_alpha": 2 * rank, "lora_dropout": 0.05, "target_modules": targets}
    with torch.device("meta"):
        return add_lora(model, options)


def parameters_of(config: PreTrainedConfig) -> dict[str, int]:
    """Parameters by role."""
    model = empty_model(config, torch.bfloat16)
    roles, counts = parameter_roles(model), dict.fromkeys(ROLES, 0)
    for name, parameter in model.named_parameters():
        counts[roles[name]] += parameter.numel()
    return counts


def layers_of(config: PreTrainedConfig) -> int:
    """Layers of the language model."""
    return config.get_text_config().num_hidden_layers


def shallow(config: PreTrainedConfig, layers: int) -> PreTrainedConfig:
    """The configuration with so many layers in the language model."""
    config = copy.deepcopy(config)
    text = config.get_text_config()
    if layers != text.num_hidden_layers:
        text.num_hidden_layers = layers
        if getattr(text, "layer_types", None):
            text.layer_types = text.layer_types[:layers]
    return config


def depths_of(config: PreTrainedConfig) -> tuple[int, ...]:
    """The layers at which steps are measured: two small numbers, from which the whole follows on a line, or all.

    All where the model is shallow, or its parameters do not lie on the line, because its layers differ.
    """
    layers, types = layers_of(config), getattr(config.get_text_config(), "layer_types", None) or []
    # Whole periods of the kinds of layers (sliding and full attention), and at least those that deepstack reaches.
    period = next(n for n in range(1, layers + 1) if types[n:] == types[: max(0, len(types) - n)])
    few = period * math.ceil(LEAST_LAYERS / period)
    if layers <= 2 * few:
        return (layers,)
    counts = {depth: sum(parameters_of(shallow(config, depth)).values()) for depth in (few, 2 * few, layers)}
    return (few, 2 * few) if line(few, counts[few], 2 * few, counts[2 * few], layers) == counts[layers] else (layers,)


def line(first: float, low: float, second: float, high: float, place: float) -> float:
    """The value at `place` on the line through `low` at `first` and `high` at `second`."""
    return low + (high - low) * (place - first) / (second - first)


def deeper(few: tuple[int, dict], more: tuple[int, dict], layers: int) -> dict:
    """What was measured at two depths, continued to the whole model's."""
    (first, low), (second, high) = few, more
    if not isinstance(low, dict):
        return round(line(first, low, second, high, layers))
    return {key: deeper((first, low[key]), (second, high[key]), layers) for key in low}


def estimate(
    subject: Subject,
    settings: Settings,
    train: str,
    checkpointing: str,
    say: Callable[[str], None] = lambda words: None,
) -> dict:
    """What training takes, for a way to train and a setting of activation checkpointing.

    Args:
        say (`Callable`): is told what is being measured, which takes half a minute on a large model.

    Raises:
        ValueError: the model cannot be trained with DualSpeed, or its inputs cannot be made.
    """
    sample, config, found = subject.sample(settings), subject.config, {}
    say(f"{subject.name}: {WORDS[train]}, activation checkpointing {checkpointing}")
    _, held = trained_model(config, train, settings)
    for depth in depths_of(config):
        model, _ = trained_model(shallow(config, depth), train, settings)
        with tempfile.TemporaryDirectory() as folder:
            on, autocast = checkpointing == "on", settings.dtype == "bfloat16"
            steps = Steps(without_data(model), sample, folder, settings.pruning_ratio, on, autocast)
            found[depth] = measured(steps, on)
    run = deeper(*found.items(), layers_of(config)) if len(found) > 1 else found[layers_of(config)]
    # The encoder's peak stays the same in deeper models, and that of the rest grows: the higher one counts.
    peaks = run["activation_bytes"].items()
    run["activation_bytes"] = {name: {rows: max(n.values()) for rows, n in by.items()} for name, by in peaks}
    return {
        "model": subject.name,
        "kind": config.model_type,
        "sample_from": "config" if subject.processor is None else "processor",
        "settings": as_json(settings),
        "visual_tokens": steps.visual["full"],
        "kept_tokens": steps.visual["kept"],
        "tokens": steps.length,
        "parameters": parameters_of(config),
        "measured_layers": list(found),
        "pruner": PRUNER,
        "counting": COUNTING,
        "versions": versions(),
        "runs": [{"train": train, "checkpointing": checkpointing, **held, **run}],
    }


def measured(steps: Steps, recomputes: bool) -> dict:
    """Bytes at the peak of each step by the batch's samples, and operations for each sample.

    Where activation checkpointing is on, fast steps are measured without and with it.
    """
    found = {name: {rows: steps.need(name, rows) for rows in ROWS} for name in (PLAIN, FAST)}
    sizes = {"tokens": steps.length, "fast_tokens": steps.fast_length}
    few = few_rows(sizes)
    found[SLOW] = {rows: steps.need(SLOW, rows) for rows in sorted({1, few, 4 * few})}
    if recomputes:
        found[FAST + RECOMPUTED] = {rows: steps.need(FAST + RECOMPUTED, rows) for rows in ROWS}
        found[SLOW + RECOMPUTED] = {rows: steps.need(SLOW + RECOMPUTED, rows) for rows in (1, 4 * few)}
    return {
        **sizes,
        "activation_bytes": {
            name: {str(rows): {"encoder": n.encoder, "rest": n.rest} for rows, n in by.items()}
            for name, by in found.items()
        },
        "flops": {name: by[max(by)].flops / max(by) for name, by in found.items()},
    }


def activations(run: dict, name: str, rows: int) -> float:
    """Bytes at the peak of a step of `rows` samples: on the line through the two measured sizes around, or the last."""
    points = sorted((int(key), value) for key, value in run["activation_bytes"][name].items())
    pairs = list(pairwise(points))
    (first, low), (second, high) = next((pair for pair in pairs if rows <= pair[1][0]), pairs[-1])
    if name.startswith(SLOW) and part_rows(run, first) < part_rows(run, second):
        first, second, rows = (part_rows(run, place) for place in (first, second, rows))
    return line(first, low, second, high, rows)


def part_rows(run: dict, rows: int) -> int:
    """Samples of the largest part of a slow step of `rows` samples, as the trainer chooses them."""
    return math.ceil(rows / parts_of(rows, run["tokens"], rows * run["fast_tokens"], "auto")[0])


def few_rows(run: dict) -> int:
    """The fewest samples of a batch whose slow step has small parts."""
    return max(1, math.ceil(run["tokens"] / (SMALL * run["fast_tokens"])))


def ways(run: dict) -> dict[str, tuple[str, ...]]:
    """The kinds of steps of each way to train that was measured: the Trainer's, ours, and ours with recomputation."""
    found = {"plain": (PLAIN,), "ours": (FAST, SLOW), "recomputed": (FAST + RECOMPUTED, SLOW + RECOMPUTED)}
    return {way: names for way, names in found.items() if names[0] in run["flops"]}


def needed(run: dict, way: str, rows: int) -> float:
    """Bytes that a way to train holds at most, in the step with the highest peak."""
    held = run["weights_bytes"] + run["gradients_bytes"] + run["optimizer_bytes"]
    return held + max(activations(run, name, rows) for name in ways(run)[way])


def largest(run: dict, way: str, gib: float) -> int:
    """The most samples of a micro-batch that fit into a GPU of `gib` GiB; 0 if one does not."""
    return max((rows for rows in range(1, MOST + 1) if needed(run, way, rows) <= USABLE * gib * GIB), default=0)


def speedup(run: dict, way: str, slow_ratio: float) -> float:
    """How many times fewer operations a step has on average: the limit of the speed-up at equal batch."""
    fast, slow = (run["flops"][name] for name in ways(run)[way])
    return run["flops"][PLAIN] / ((1 - slow_ratio) * fast + slow_ratio * slow)


# The shares of the limit that steps reached at 7 B parameters on an H100; see docs/speed.md.
REACHED = (0.68, 0.91)


def expected(run: dict, slow_ratio: float) -> str:
    """The speed-ups that these shares of the limit are."""
    low, high = (share * speedup(run, "ours", slow_ratio) for share in REACHED)
    return f"{low:.1f} to {high:.1f} x"


def gpu_size(words: str) -> float:
    """GiB from words such as "24gb" or "24".

    Raises:
        ValueError: they are no size.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(?:gb|gib|g)?", words.strip().lower())
    if match is None or not float(match[1]):
        raise ValueError(f"`gpu` must be sizes such as 24gb, got {words!r}.")
    return float(match[1])


def samples(count: int) -> str:
    """A number of samples in words."""
    return "-" if not count else f"{MOST}+" if count == MOST else str(count)


def batches(run: dict, gib: float) -> str:
    """The largest micro-batches: the Trainer's, ours, and ours with recomputation in brackets."""
    found = {way: samples(largest(run, way, gib)) for way in ways(run)}
    last = f" ({found['recomputed']})" if "recomputed" in found else ""
    return f"{found['plain']} / {found['ours']}{last}"


def limits(run: dict, slow_ratio: float) -> str:
    """The limits of the speed-up, with recomputation in brackets."""
    found = {way: f"{speedup(run, way, slow_ratio):.2f}" for way in ways(run) if way != "plain"}
    last = f" ({found['recomputed']})" if "recomputed" in found else ""
    return f"{found['ours']}{last} x"


HEADER = ("model", "image", "tokens", "trained", "weights", "+ optimizer")


def checkpointings(results: dict) -> list[str]:
    """The settings of activation checkpointing among the estimates."""
    return sorted({run["checkpointing"] for found in results["models"] for run in found["runs"]}, reverse=True)


def table_rows(results: dict) -> Iterator[tuple]:
    """Rows of the table: a model and a way to train it, with the largest micro-batches, plain and ours."""
    several = len(checkpointings(results)) > 1
    for found in results["models"]:
        width, height = found["settings"]["image_size"]
        size, tokens = sum(found["parameters"].values()), f"{found['visual_tokens']:,} → {found['kept_tokens']:,}"
        for run in found["runs"]:
            state = run["weights_bytes"] + run["gradients_bytes"] + run["optimizer_bytes"]
            setting = f", checkpointing {run['checkpointing']}" if several else ""
            yield (
                f"{found['model']}, {size / 1e9:.2f} B",
                f"{width} x {height}",
                tokens,
                f"{WORDS[run['train']]}, {run['trainable'] / 1e6:,.0f} M{setting}",
                f"{run['weights_bytes'] / GIB:.1f}",
                f"{state / GIB:.1f}",
                *(batches(run, gib) for gib in results["gpus"]),
                limits(run, found["settings"]["slow_mode_ratio"]),
            )


def readme_table(results: dict) -> str:
    """The table of `docs/memory.md`.

    Raises:
        ValueError: the estimates differ in what stands above the table, once for all of its rows.
    """
    above = [{**found["versions"], **found["settings"]} for found in results["models"]]
    first = above[0]
    same = ("torch", "transformers", *(name for name in results["models"][0]["settings"] if name != "image_size"))
    differ = [name for name in same if any(other[name] != first[name] for other in above)]
    if differ:
        raise ValueError(
            f"The estimates differ in {', '.join(differ)}, which stand above the table for all of its rows. Estimate "
            "the models with the same ones, or put those with others into another --json file."
        )
    said = (
        f"{first['dtype']}, activation checkpointing {' and '.join(checkpointings(results))}, {first['text_tokens']} "
        f"text tokens, {first['pruning_ratio']:.0%} pruned, {first['slow_mode_ratio']:.0%} slow steps, LoRA of "
        f"rank {first['lora_rank']}; GiB of the weights, and with gradients and AdamW's state; the largest "
        f"micro-batch by GPU, Trainer / DualSpeed, in brackets with `fast_mode_checkpointing`; torch {first['torch']}, "
        f"transformers {first['transformers']}."
    )
    header = (*HEADER, *(f"{gib:g} GB" for gib in results["gpus"]), "FLOP limit")
    return f"{said}\n\n{markdown_table(header, table_rows(results))}"
