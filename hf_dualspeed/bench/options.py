"""The options of `dualspeed bench`."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

from ..pruners import available_pruners, pruner_class
from ..utils.validation import Parser, as_count, check_choice, check_fields, check_range, nearest
from .shapes import HEAD, SHAPES, Shape

SCALES = ("small", "full")
SETTINGS = ("on", "off")  # of activation checkpointing, and of kernels
OPTIMIZERS = ("none", "adamw")
# Switches that change what fast steps on batches of several lengths cost.
SWITCHES = (ROW, ROUNDED, COMPILED) = ("padding_free", "fast_length_multiple", "compile_regions")
GROWTH_TOKENS = (144, 576, 2304, 9216)
STEPS = {"shape": ["llava-1.5", "llava-next"], "checkpointing": list(SETTINGS), "text_tokens": 200, "rounds": 8}
# The kinds of measurement, and the defaults of each.
KINDS = {
    "steps": STEPS,
    "growth": {**STEPS, "shape": ["llava-1.5"], "checkpointing": ["on"]},
    "profile": {**STEPS, "shape": ["llava-1.5"], "checkpointing": ["on"]},
    "lengths": {
        "shape": ["llava-1.5"],
        "checkpointing": ["off"],
        "text_tokens": 1024,
        "rounds": 2,
        "steps": 24,
        "switches": [ROW],
    },
    "loader": {**STEPS, "rounds": 3},
    "selection": {**STEPS, "checkpointing": ["off"]},
    "same_memory": {**STEPS, "shape": ["llava-1.5"], "rounds": 3, "optimizer": list(OPTIMIZERS), "kernels": ["off"]},
}
# The shapes whose loader is measured, and the questions about each picture, where one comes again.
LOADED = ("llava-1.5", "llava-next")
QUESTIONS = 4
# Options that a single kind has.
OWN = {
    "steps": "lengths",
    "switches": "lengths",
    **dict.fromkeys(("optimizer", "kernels", "memory_gib"), "same_memory"),
}
# Options that most kinds read, and these do not: a loader is that of a real processor on one core, and fast steps leave
# checkpointing out.
TRAINED = ("checkpointing", "slow_splits")
MODEL = ("scale", "lora", "text_tokens", "image_size", "hidden_size", "layers", "pruner", "pruning_ratio", "slow_ratio")
UNREAD = {"loader": (*TRAINED, *MODEL, "threads"), **dict.fromkeys(("profile", "selection"), TRAINED)}


def flag(name: str) -> str:
    """An option as the command line spells it."""
    return "--" + name.replace("_", "-")


def defaults(option: str) -> str:
    """An option's defaults in words."""

    def words(value: object) -> str:
        return " and ".join(value) if isinstance(value, list) else str(value)

    usual = words(KINDS["steps"][option])
    kinds: dict[str, list[str]] = {}  # by their default
    for kind, of in KINDS.items():
        kinds.setdefault(words(of[option]), []).append(flag(kind))
    del kinds[usual]
    others = [f"{value} with {', '.join(flags)}" for value, flags in kinds.items()]
    return f"Unset: {'; '.join([usual, *others])}."


HELP = {
    "shape": f"One or several of {', '.join(SHAPES)}. {defaults('shape')}",
    "model": "In place of shapes: a folder or Hub id with a model and its processor.",
    "scale": "'small': language models of about 25 M parameters; 'full': real sizes, on a GPU or with a few --layers.",
    "lora": "Train LoRA adapters (r=128) and the projector in place of the whole language model.",
    "checkpointing": f"Activation checkpointing 'on', 'off' or both. {defaults('checkpointing')}",
    "slow_splits": "Parts of a slow step's batch, or 'auto'. Unset: 1; 'auto' with checkpointing on and no --lengths.",
    "batch": "Samples, with one image each. Unset: 8 of llava-1.5, 6 of other shapes, 4 of --model, 1 with --growth. "
    "With --same-memory the most that are tried. Unset: 64. With --loader a multiple of 4. Unset: 8.",
    "text_tokens": "Text tokens per sample, at most 64 of them supervised; with --lengths at most so many. "
    f"{defaults('text_tokens')}",
    "image_size": "Edge of the image in pixels, for llava-1.5 and --model. Unset: 336.",
    "hidden_size": "Width of the language model, a multiple of 64. Unset: the shape's.",
    "layers": "Layers of the language model. Unset: the shape's.",
    "rounds": f"Rounds; each measures every variant once. {defaults('rounds')}",
    "pruner": "Registered pruner.",
    "pruning_ratio": "Fraction of visual tokens removed, [0, 1).",
    "slow_ratio": "Slow steps in the expected speed-up, [0, 1].",
    "threads": "CPU threads. Unset: PyTorch's choice.",
    "growth": "Measure llava-1.5 of 144 to 9216 visual tokens instead, one sample per batch.",
    "profile": "Profile fast steps instead: where their time goes.",
    "lengths": "Measure batches at random against batches of like length instead, with texts of drawn lengths.",
    "loader": "Measure a data loader worker on JPEGs of 1 to 12 megapixels instead: samples per second.",
    "selection": "Measure the choice of tokens alone instead, in plain PyTorch and as in fast steps.",
    "steps": "Steps of --lengths, with each kind of batches. Unset: 24.",
    "switches": f"With --lengths: what fast steps are also measured with, of {', '.join(SWITCHES)}, or several of them "
    f"joined by pluses. Unset: {ROW}.",
    "same_memory": "Measure each trainer at the largest micro-batch that fits instead, in steps of as many samples.",
    "memory_gib": "GiB that --same-memory may fill: weights, gradients, optimizer and activations. A CPU needs it. "
    "Unset: 95 %% of what is free on the card. With --model, it tells the largest fast micro-batch within them; unset: "
    "within 90 %% of what is free on the card.",
    "optimizer": "With --same-memory: steps without the optimizer's, 'none', with AdamW's, 'adamw', or both. Unset: "
    "none and adamw.",
    "kernels": "With --same-memory: Liger's kernels, where installed, and compiled layers 'off', 'on' or both, in both "
    "trainers. Unset: off.",
    "output": "JSON file; .md and .png beside it. Unset: docs/results/bench.json, or bench_growth.json etc.",
    "render_only": "Render the JSON of an earlier run anew.",
}


@dataclass
class BenchArguments:
    """Options of `dualspeed bench`.

    Raises:
        ValueError: an option is outside its range; the message names it, its value and the remedy.
    """

    shape: list[str] | None = None
    model: str | None = None
    scale: str = "small"
    lora: bool = False
    checkpointing: list[str] | None = None
    slow_splits: str | None = None
    batch: int | None = None
    text_tokens: int | None = None
    image_size: int | None = None
    hidden_size: int | None = None
    layers: int | None = None
    rounds: int | None = None
    pruner: str = "divprune"
    pruning_ratio: float = 0.9
    slow_ratio: float = 0.05
    threads: int | None = None
    growth: bool = False
    profile: bool = False
    lengths: bool = False
    loader: bool = False
    selection: bool = False
    steps: int | None = None
    switches: list[str] | None = None
    same_memory: bool = False
    memory_gib: float | None = None
    optimizer: list[str] | None = None
    kernels: list[str] | None = None
    output: str | None = None
    render_only: bool = False

    def __post_init__(self):
        check_fields(self, wider={"slow_splits": str | int | None})
        for option in fields(self):
            if option.name in UNREAD.get(self.kind, ()) and getattr(self, option.name) != option.default:
                raise ValueError(
                    f"`{option.name}` is {getattr(self, option.name)!r}, but {flag(self.kind)} does not read it. Leave "
                    "it out."
                )
        self._fill()
        for name, low in {"batch": 1, "layers": 1, "text_tokens": 4, "rounds": 2, "steps": 2}.items():
            if getattr(self, name) is not None:
                check_range(name, getattr(self, name), low, off=f"Use {flag(name)} {low} or more.")
        if self.threads is not None:
            check_range("threads", self.threads, 1, off="Leave it out for PyTorch's choice.")
        check_range("pruning_ratio", self.pruning_ratio, 0, 1, right_open=True, off="0.9 is usual.")
        check_range("slow_ratio", self.slow_ratio, 0, 1, off="0.05 is usual.")
        check_choice("pruner", self.pruner, available_pruners())
        if pruner_class(self.pruner).in_language_model:
            raise ValueError(
                f"`pruner` is {self.pruner!r}, which drops tokens inside the language model: there is no selection nor "
                "shortening in front of it to be timed. Choose one that works there, such as 'divprune'."
            )
        check_choice("scale", self.scale, SCALES)
        for option, allowed in {"checkpointing": SETTINGS, "optimizer": OPTIMIZERS, "kernels": SETTINGS}.items():
            for name in getattr(self, option) or []:
                check_choice(option, name, allowed)
        for name in [name for given in self.switches or [] for name in given.split("+")]:
            check_choice("switches", name, SWITCHES)
        if self.memory_gib is not None:
            check_range("memory_gib", self.memory_gib, 0, left_open=True, off="Use --memory-gib 24, for example.")
        if self.slow_splits not in (None, "auto"):
            self.slow_splits = as_count("slow_splits", self.slow_splits, "or 'auto'")
        if self.hidden_size is not None:
            check_multiple("hidden_size", self.hidden_size, HEAD)
        if Path(self.output).suffix != ".json":
            raise ValueError(f"`output` must end in .json, got {self.output!r}. Use bench.json, for example.")
        for option, kind in OWN.items():
            sizes = option == "memory_gib" and self.kind == "steps" and self.model is not None
            if getattr(self, option) is not None and kind != self.kind and not sizes:
                raise ValueError(
                    f"`{option}` is {getattr(self, option)!r}, but only {flag(kind)} reads it. Leave it out, or give "
                    f"{flag(kind)}."
                )
        self._check_shapes()

    def _fill(self) -> None:
        self._given = self.shape is not None
        for option, value in KINDS[self.kind].items():
            if getattr(self, option) is None:
                setattr(self, option, value)
        self.output = self.output or f"docs/results/bench{'' if self.kind == 'steps' else f'_{self.kind}'}.json"

    @property
    def kind(self) -> str:
        """The kind of measurement, a key of [`KINDS`]."""
        chosen = [name for name in list(KINDS)[1:] if getattr(self, name)]
        if len(chosen) > 1:
            raise ValueError(
                f"`{chosen[0]}` and `{chosen[1]}` are measured one at a time. Give {flag(chosen[0])} or "
                f"{flag(chosen[1])}."
            )
        return chosen[0] if chosen else "steps"

    def _check_shapes(self) -> None:
        for name in self.shape:
            check_choice("shape", name, list(SHAPES))
        if self.growth and (self.shape != ["llava-1.5"] or self.model or self.image_size):
            raise ValueError(
                "`growth` is measured on llava-1.5 with images of several sizes. Leave --shape, --model and "
                "--image-size out."
            )
        if self.lengths and (self.shape != ["llava-1.5"] or self.model):
            raise ValueError("`lengths` is measured on llava-1.5. Leave --shape and --model out.")
        if self.lengths and len(self.checkpointing) > 1:
            raise ValueError("`lengths` is measured with one setting of checkpointing. Give --checkpointing on or off.")
        if self.loader and (self.model or not set(self.shape) <= set(LOADED)):
            raise ValueError(
                f"`loader` is measured with the processors of {' and '.join(LOADED)}. Leave --model and other --shape "
                "out."
            )
        if self.loader and self.batch is not None:
            check_multiple("batch", self.batch, QUESTIONS)
        if self.model is not None and (self._given or self.hidden_size or self.layers or self.scale == "full"):
            raise ValueError(
                f"`model` is {self.model!r}, which brings its own sizes. Leave --shape, --scale, --hidden-size and "
                "--layers out, or --model."
            )
        if self.image_size is not None and self.model is None:
            if self.shape != ["llava-1.5"]:
                raise ValueError(
                    f"`image_size` is {self.image_size}, but of {', '.join(self.shape)} the images are of one size. "
                    "Use it with --shape llava-1.5 or --model."
                )
            check_multiple("image_size", self.image_size, SHAPES["llava-1.5"].patch)
        for shape in self.shapes():
            if self.text_tokens < shape.separators + 4:
                raise ValueError(
                    f"`text_tokens` is {self.text_tokens}, but {shape.name} has {shape.separators} of them between "
                    f"its tiles. Use --text-tokens {shape.separators + 4} or more."
                )

    def shapes(self) -> list[Shape]:
        """The shapes to measure, with the given image size. None where a model is given."""
        if self.model is not None:
            return []
        if self.growth:
            edges = [round(tokens**0.5) * SHAPES["llava-1.5"].patch for tokens in GROWTH_TOKENS]
            return [replace(SHAPES["llava-1.5"], image_size=edge) for edge in edges]
        chosen = [SHAPES[name] for name in self.shape]
        return [replace(s, image_size=self.image_size) for s in chosen] if self.image_size else chosen

    def rows(self, shape: Shape | None) -> int:
        """Samples of a batch. [`same_memory`] makes larger ones of one."""
        if self.same_memory:
            return 1
        if self.batch is not None:
            return self.batch
        return 1 if self.growth else 4 if shape is None else shape.batch

    def splits(self, checkpointing: str) -> int | str:
        """`slow_mode_splits` with a setting of checkpointing."""
        return self.slow_splits or ("auto" if checkpointing == "on" and not self.lengths else 1)

    def recorded(self) -> dict:
        """The options that the results file keeps."""
        left = {"output", "threads", "render_only", *KINDS, *OWN, "shape", "checkpointing", "slow_splits", "batch"}
        left -= {option for option, kind in OWN.items() if kind == self.kind}
        return {key: value for key, value in asdict(self).items() if key not in left}


def check_multiple(name: str, value: int, step: int) -> None:
    """Raises a `ValueError` with the nearest usable value unless `value` is a positive multiple of `step`."""
    if value < step or value % step:
        usable = step * max(1, round(value / step))
        raise ValueError(f"`{name}` must be a positive multiple of {step}, got {value}. Use {usable}, for example.")


DESCRIPTION = """Times fast and slow training steps against plain ones, in random weights. On two CPU cores, very
roughly: a round of llava-1.5 takes half a minute and one of llava-next two minutes, with each setting of checkpointing;
one of --growth two minutes, one of --lengths a minute and a half, one of --loader a minute."""


def parse_arguments(argv: list[str]) -> BenchArguments:
    """Parses and checks the command line.

    Raises:
        ValueError: an option is unknown, cannot be converted or is out of range.
    """
    parser = Parser(prog="dualspeed bench", description=DESCRIPTION, allow_abbrev=False)
    for known in fields(BenchArguments):
        kind = str(known.type).removesuffix(" | None")
        default = "" if known.default in (None, False) else f" (default: {known.default})"
        words = {"default": known.default, "help": HELP[known.name] + default}
        if kind == "bool":
            words["action"] = "store_true"
        else:
            words["type"] = {"int": int, "float": float}.get(kind, str)
            words |= {"nargs": "+"} if kind.startswith("list") else {}
        parser.add_argument(flag(known.name), **words)
    namespace, unknown = parser.parse_known_args(argv)
    if unknown:
        word = unknown[0].split("=")[0]
        raise ValueError(f"Unknown argument `{word}`.{nearest(word, list(parser._option_string_actions))}")
    return BenchArguments(**vars(namespace))
