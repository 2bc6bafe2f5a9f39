"""Options of a training recipe, from a YAML file and the command line."""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from importlib.util import find_spec
from pathlib import Path
from typing import get_args, get_origin

import yaml
from transformers import HfArgumentParser

from ..models.adapters import lora_config
from ..trainer.training_args import DualSpeedArguments, DualSpeedTrainingArguments
from ..utils.constants import CHECKED_SAMPLES, LONG_SAMPLES, UNREADABLE_IMAGES
from ..utils.text import one_line
from ..utils.validation import (
    as_dict,
    check_choice,
    check_fields,
    check_range,
    checked,
    hints_of,
    nearest,
    shortened,
    words_of,
)

NULL = "tag:yaml.org,2002:null"
DTYPES = ("float32", "bfloat16", "auto")

# Where `--help` shows the options of a recipe and those of DualSpeed; others follow in the order of their classes.
TOPICS = {
    "model": (
        "model_name_or_path",
        "tiny_llava",
        "dtype",
        "attn_implementation",
        "lora",
        "load_in_4bit",
        "trust_remote_code",
    ),
    "what is trained, and how long": (
        "train_vision_tower",
        "train_projector",
        "train_language_model",
        "early_stopping_patience",
    ),
    "data": ("dataset", "dataset_split", "max_length", "long_samples", "check_data"),
    "pictures": (
        "image_folder",
        "image_column",
        "max_pixels",
        "processor_options",
        "unreadable_images",
        "image_cache_mib",
        "jpeg_draft",
    ),
    "evaluation and model card": (
        "eval_dataset",
        "eval_split",
        "eval_image_column",
        "eval_batch_size",
        "max_new_tokens",
        "eval_limit",
        "card_images",
    ),
    "pruning": (
        "pruner",
        "pruning_ratio",
        "pruner_kwargs",
        "pruner_revision",
        "isolator_length",
        "position_ids",
        "proportional_attention",
        "video_budget",
    ),
    "batch and memory": (
        "per_device_train_batch_size",
        "global_batch_size",
        "slow_mode_splits",
        "memory_gib",
        "tell_size",
    ),
    "fast and slow steps": (
        "slow_mode_ratio",
        "mode_schedule",
        "min_slow_mode_ratio",
        "max_slow_mode_ratio",
        "min_pruning_ratio",
        "slow_warmup_steps",
        "slow_tail_ratio",
        "distillation_weight",
        "distillation_temperature",
        "fast_only_parameters",
        "slow_only_parameters",
    ),
}
METAVARS = {int: "N", float: "X"}


@dataclass
class RecipeArguments:
    """Model, data and evaluation of a recipe. The options of training are [`DualSpeedTrainingArguments`].

    Raises:
        ValueError: a value is not allowed. The message names the option, its value and the remedy.
    """

    model_name_or_path: str | None = field(
        default=None, metadata={"help": "Vision-language model to fine-tune: a Hub name or a folder."}
    )
    tiny_llava: dict | str | None = field(
        default=None,
        metadata={"help": "Train a small LLaVA from scratch instead: arguments of build_tiny_llava (JSON)."},
    )
    dataset: str | None = field(
        default=None,
        metadata={"help": "Training data: a Hub name, a JSON, JSONL, CSV, TSV or Parquet file, a folder, or easy-vqa."},
    )
    dataset_split: str = field(default="train", metadata={"help": "Split of the training data."})
    eval_dataset: str | None = field(
        default=None, metadata={"help": "Data with answers to measure accuracy on, with all visual tokens."}
    )
    eval_split: str = field(default="test", metadata={"help": "Split of the evaluation data."})
    image_folder: str | None = field(
        default=None, metadata={"help": "Folder that the data's relative image paths start from."}
    )
    image_column: list[str] | None = field(
        default=None,
        metadata={"help": "Columns that hold the pictures, in their order. Unset: `images` or `image`."},
    )
    eval_image_column: list[str] | None = field(
        default=None, metadata={"help": "The same for eval_dataset. Unset: as image_column."}
    )
    max_pixels: int | None = field(
        default=None,
        metadata={"help": "Most pixels of a picture, where the processor has such a limit, as that of Qwen-VL."},
    )
    processor_options: dict | str | None = field(
        default=None,
        metadata={"help": 'Options of the image processor in place of its own (JSON), such as {"size": {...}}.'},
    )
    max_length: int | None = field(
        default=None,
        metadata={"help": "Longest sequence in tokens, visual ones included. Unset: no limit."},
    )
    long_samples: str = field(
        default="truncate",
        metadata={
            "help": "Samples longer than max_length: 'truncate' cuts off their end, but no visual tokens; 'raise' "
            "stops; 'skip' leaves them out."
        },
    )
    unreadable_images: str = field(
        default="raise",
        metadata={
            "help": "Pictures that cannot be read, or that the processor refuses: 'raise' stops, 'skip' leaves their "
            "samples out."
        },
    )
    image_cache_mib: float = field(
        default=64.0,
        metadata={
            "help": "MiB of decoded pictures that each data loader worker keeps for later batches. Within a batch, a "
            "picture is read once in any case."
        },
    )
    jpeg_draft: bool = field(
        default=False,
        metadata={
            "help": "Decode large JPEGs at a reduced size, which is faster and changes pixels a little. For processors "
            "that bring all pictures to one size."
        },
    )
    check_data: bool | None = field(
        default=None,
        metadata={
            "help": "Look at the data before training, for missing files, samples that are too long or teach nothing. "
            f"Unset: at up to {CHECKED_SAMPLES:,} samples, evenly spread; true: at all; false: at none."
        },
    )
    train_vision_tower: bool = field(default=False, metadata={"help": "Train the vision tower."})
    train_projector: bool = field(
        default=True,
        metadata={"help": "Train the projector, and what belongs to neither tower nor language model."},
    )
    train_language_model: bool = field(default=True, metadata={"help": "Train the language model."})
    early_stopping_patience: int | None = field(
        default=None,
        metadata={
            "help": "Stop after so many evaluations in a row without a lower loss. It needs eval_strategy and "
            "load_best_model_at_end. Unset: train to the end."
        },
    )
    lora: dict | str | None = field(
        default=None,
        metadata={"help": "Train LoRA adapters instead of weights: arguments of peft.LoraConfig (JSON)."},
    )
    load_in_4bit: bool = field(
        default=False,
        metadata={"help": "QLoRA: quantize the loaded weights to 4 bits with bitsandbytes; `lora` trains on top."},
    )
    dtype: str = field(default="float32", metadata={"help": "Type of the loaded weights: float32, bfloat16 or auto."})
    attn_implementation: str | None = field(
        default=None, metadata={"help": "Attention of transformers: sdpa, eager, flash_attention_2, ..."}
    )
    eval_batch_size: int = field(default=64, metadata={"help": "Questions answered at a time."})
    max_new_tokens: int = field(default=8, metadata={"help": "Longest answer in evaluation, in tokens."})
    eval_limit: int | None = field(
        default=None, metadata={"help": "Evaluate on the first so many questions only. Unset: on all."}
    )
    card_images: int = field(
        default=0,
        metadata={
            "help": "So many images of eval_dataset, or of dataset, are drawn with their kept tokens for the model "
            "card, with which they are published."
        },
    )
    trust_remote_code: bool = field(
        default=False, metadata={"help": "Run Python code that the repositories of model and pruner bring along."}
    )

    def __post_init__(self):
        check_fields(self)
        for name, value in vars(self).items():
            if value == "":
                raise ValueError(f"`{name}` is an empty text. Write a value, or leave it out.")
        for name in ("tiny_llava", "lora", "processor_options"):
            setattr(self, name, as_dict(name, getattr(self, name)))
        if self.lora is not None and find_spec("peft") is not None:
            lora_config(self.lora)
        if self.max_pixels is not None:
            check_range("max_pixels", self.max_pixels, 1)
            if "max_pixels" in (self.processor_options or {}):
                raise ValueError("`max_pixels` is set twice, in `processor_options` too. Set it once.")
            self.processor_options = {**(self.processor_options or {}), "max_pixels": self.max_pixels}
        if self.processor_options and self.tiny_llava is not None:
            raise ValueError("`processor_options` are for a loaded model. Set the image_size of `tiny_llava` instead.")
        check_choice("dtype", self.dtype, DTYPES)
        for name, usual in {"dtype": "float32", "attn_implementation": None}.items():
            if self.tiny_llava is not None and getattr(self, name) != usual:
                raise ValueError(
                    f"`{name}` is {getattr(self, name)!r}, but `tiny_llava` loads no weights: it makes new ones in "
                    "float32, under SDPA. Leave it out; bf16=true trains in bfloat16."
                )
        for name in (
            "eval_batch_size",
            "max_new_tokens",
            "eval_limit",
            "max_length",
            "early_stopping_patience",
        ):  # used after the training, when it is too late
            if getattr(self, name) is not None:
                check_range(name, getattr(self, name), 1)
        check_range("card_images", self.card_images, 0, off="Use 0 for a card without images.")
        check_range("image_cache_mib", self.image_cache_mib, 0, off="Use 0 to keep no pictures beyond a batch.")
        check_choice("unreadable_images", self.unreadable_images, UNREADABLE_IMAGES)
        check_choice("long_samples", self.long_samples, LONG_SAMPLES)
        if self.long_samples != "truncate" and self.max_length is None:
            raise ValueError(f"`long_samples` is {self.long_samples!r}, but `max_length` is not set. Set it.")
        if self.eval_image_column is not None and self.eval_dataset is None:
            raise ValueError(
                f"`eval_image_column` is {self.eval_image_column!r}, but there is no `eval_dataset`. Set it, or leave "
                "the column out."
            )
        if (self.model_name_or_path is None) == (self.tiny_llava is None):
            raise ValueError(
                f"Set exactly one of `model_name_or_path` (got {self.model_name_or_path!r}) and `tiny_llava` "
                f"(got {self.tiny_llava!r}): one fine-tunes a model, the other trains one anew."
            )
        if self.load_in_4bit and (self.lora is None or self.model_name_or_path is None):
            raise ValueError(
                "`load_in_4bit` is True, but 4-bit weights cannot be trained themselves: it needs `model_name_or_path` "
                f"(got {self.model_name_or_path!r}) and `lora` (got {self.lora!r}). Set both, or load_in_4bit=False."
            )
        if self.dataset is None:
            raise ValueError("`dataset` is not set. Name the training data, e.g. `--dataset easy-vqa`.")
        if not (self.train_vision_tower or self.train_projector or self.train_language_model):
            raise ValueError(
                "`train_vision_tower`, `train_projector` and `train_language_model` are all False: nothing "
                "would be trained. Set at least one of them to True."
            )

    @property
    def eval_columns(self) -> list[str] | None:
        """The columns of the evaluation's pictures: its own, or those of the training."""
        return self.image_column if self.eval_image_column is None else self.eval_image_column


def check_evaluation(recipe: RecipeArguments, args: DualSpeedTrainingArguments) -> None:
    """Checks what evaluation during training needs of both: data, the loss as metric, and what early stopping asks for.

    Raises:
        ValueError: something is missing, which would show only once the weights are loaded, or in the first evaluation.
    """
    evaluates, metric = args.eval_strategy != "no", args.metric_for_best_model
    if evaluates and recipe.eval_dataset is None:
        raise ValueError(
            f"`eval_strategy` is {args.eval_strategy.value!r}, but there is no `eval_dataset`. Set it, or "
            "eval_strategy=no."
        )
    if evaluates and metric not in (None, "loss", "eval_loss"):
        raise ValueError(
            f"`metric_for_best_model` is {metric!r}, but evaluation during a recipe's training measures the loss "
            "alone. Set it to loss."
        )
    if evaluates and args.greater_is_better and metric is not None:
        raise ValueError(
            "`greater_is_better` is True, but the best checkpoint is chosen by the loss, of which less is better. Set "
            "it to false."
        )
    if recipe.early_stopping_patience is not None and not (evaluates and args.load_best_model_at_end):
        raise ValueError(
            f"`early_stopping_patience` is {recipe.early_stopping_patience}, which needs evaluations and their best "
            f"checkpoint: `eval_strategy` is {args.eval_strategy.value!r} and `load_best_model_at_end` "
            f"{args.load_best_model_at_end}. Set eval_strategy and save_strategy to epoch, or both to steps, and "
            "load_best_model_at_end=True."
        )


def count_or_auto(word: str) -> int | str:
    """A number on the command line, or "auto"."""
    return word if word == "auto" else int(word)


class RecipeHelp(argparse.ArgumentDefaultsHelpFormatter):
    """Names defaults that say something, and choices below their option, where they can be broken into lines."""

    def _get_help_string(self, action):
        words = action.help or ""
        if action.choices is not None and len(action.choices) > 3:
            words += f" One of {', '.join(map(str, action.choices))}."
        shown = action.default not in (None, "", [], argparse.SUPPRESS)
        return f"{words} (default: %(default)s)" if shown else words

    def _format_action_invocation(self, action):
        action = copy.copy(action)  # `--some-option` is also taken, and not shown
        action.option_strings = [name for name in action.option_strings if "-" not in name.strip("-")]
        return super()._format_action_invocation(action)


class RecipeParser(HfArgumentParser):
    """[`~transformers.HfArgumentParser`] with defaults from a YAML file, and help by topic. Errors are exceptions."""

    def __init__(self, prog: str | None = None):
        super().__init__(
            (RecipeArguments, DualSpeedTrainingArguments),
            prog=prog,
            usage="%(prog)s [--config RECIPE.yaml] [--OPTION VALUE ...]",
            description="Fine-tunes a vision-language model with DualSpeed. Options stand in a recipe, a YAML file, or "
            "here, which overrides it. A BOOL is true or false, and alone it means true.",
            allow_abbrev=False,
            formatter_class=RecipeHelp,
        )
        self.add_argument("--config", metavar="RECIPE.yaml", help="YAML file of defaults for the options below.")
        for action in self._actions:
            switch = action.nargs == "?" and action.const is True
            few = action.choices is not None and len(action.choices) <= 3
            if action.metavar is None and action.nargs != 0 and not few:
                action.metavar = "BOOL" if switch else METAVARS.get(action.type, "VALUE")
            if action.dest == "per_device_train_batch_size":
                action.type = count_or_auto
        self.keys = [f.name for kind in self.dataclass_types for f in fields(kind) if f.init]

    def error(self, message: str) -> None:
        raise ValueError(message)

    def format_help(self) -> str:
        """Help by topic: the recipe's options, those of DualSpeed, and last transformers' own."""
        formatter = self._get_formatter()
        formatter.add_usage(self.usage, self._actions, [])
        formatter.add_text(self.description)
        for title, names in self._sections():
            formatter.start_section(title)
            # `--no_NAME` says the same as `--NAME false`.
            formatter.add_arguments(
                [a for a in self._actions if a.dest in names and not a.option_strings[0].startswith("--no_")]
            )
            formatter.end_section()
        return formatter.format_help()

    def _sections(self) -> Iterator[tuple[str, list[str]]]:
        left = [action.dest for action in self._actions]
        ours = {f.name for kind in (RecipeArguments, DualSpeedArguments) for f in fields(kind)}
        others = [name for name in left if name in ours and not any(name in names for names in TOPICS.values())]
        known = {*ours, *others}
        yield "recipe", ["help", "config"]
        yield from TOPICS.items()
        yield "further options of DualSpeed", others
        theirs = [name for name in left if name not in known and name not in ("help", "config")]
        yield "training: transformers' own options", theirs

    def set_defaults_from_yaml(self, path: str) -> None:
        """Makes the file's values the defaults, converted as on the command line."""
        types = {name: hint for kind in self.dataclass_types for name, hint in hints_of(kind).items()}
        defaults = {}
        for key, value in read_recipe(path).items():
            if key not in self.keys:
                raise ValueError(f"{path}: unknown key `{key}`.{nearest(key, self.keys)}")
            # The command line cannot express an empty list.
            defaults[key] = [] if value == [] else self._convert(path, key, value)
            allowed = {get_origin(option) or option for option in (types[key], *get_args(types[key]))}
            if type(value) is not str and type(value) not in allowed:
                raise ValueError(f"{path}: `{key}` must be {words_of(types[key])}, got {shortened(value)}.")
        self.set_defaults(**defaults)

    def _convert(self, path: str, key: str, value: str | list[str] | dict):
        said = json.dumps(value) if isinstance(value, dict) else value
        words = [f"--{key}", *value] if isinstance(value, list) else [f"--{key}={said}"]
        try:
            return getattr(self.parse_args(words), key)
        except ValueError as error:
            raise ValueError(f"{path}: `{key}` is {shortened(value)}: {error}") from None

    def check_flags(self, unknown: list[str]) -> None:
        """Raises a `ValueError` for an unknown word, with the nearest flag."""
        if unknown:
            flag = unknown[0].split("=")[0]
            raise ValueError(f"Unknown argument `{flag}`.{nearest(flag, [f'--{key}' for key in self.keys])}")


@checked
def parse_recipe(argv: list[str], prog: str | None = None) -> tuple[RecipeArguments, DualSpeedTrainingArguments]:
    """Reads the command line and the YAML file of its `--config`. The command line overrides the file.

    Args:
        argv (`list[str]`): The words of the command line, without the program's name.
        prog (`str`, *optional*): The program's name in `--help`.

    Raises:
        ValueError: an option is unknown, cannot be converted or is out of range.
        FileNotFoundError: there is no such YAML file.

    Example:

    ```python
    recipe_args, training_args = parse_recipe(["--config", "recipe.yaml", "--learning_rate", "2e-5"])
    ```
    """
    parser = RecipeParser(prog)
    namespace, unknown = parser.parse_known_args(argv)
    parser.check_flags(unknown)
    if namespace.config is not None:
        parser.set_defaults_from_yaml(namespace.config)
    recipe_args, training_args, _ = parser.parse_args_into_dataclasses(argv, look_for_args_file=False)
    check_evaluation(recipe_args, training_args)
    return recipe_args, training_args


class RecipeLoader(yaml.SafeLoader):
    """Reads YAML whose scalars are kept as written, because YAML 1.1 reads `2e-5` as a text and `no` as False.

    Keys that stand twice, anchors that are used and tags are refused.
    """

    def compose_node(self, parent, index):
        event = self.peek_event()
        place = f"line {event.start_mark.line + 1}"
        if isinstance(event, yaml.AliasEvent):
            raise ValueError(f"{place} refers to an anchor, '*{event.anchor}'. Write its value there.")
        if getattr(event, "tag", None) is not None:
            raise ValueError(f"{place} has the tag {event.tag!r}. Write the value without a tag.")
        return super().compose_node(parent, index)

    def compose_mapping_node(self, anchor):
        node = super().compose_mapping_node(anchor)
        seen = {}
        for key, _ in node.value:
            line = key.start_mark.line + 1
            if not isinstance(key, yaml.ScalarNode):
                raise ValueError(f"line {line} has a key that is no text. Write `key: value`.")
            if key.value in seen:
                raise ValueError(f"`{key.value}` stands in lines {seen[key.value]} and {line}. Remove one of them.")
            seen[key.value] = line
        return node


def read_recipe(path: str) -> dict[str, str | list[str] | dict]:
    """The keys of a recipe, without nulls. Texts and lists of texts are as written; mappings have YAML's types.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no YAML file of `key: value` lines; the message names file and line.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"`config` is {path!r}, but there is no such file.")
    loader = None
    try:
        loader = RecipeLoader(Path(path).read_bytes())
        node = loader.get_single_node()
        if not isinstance(node, yaml.MappingNode):
            held = {"sequence": "a list", "scalar": "a text"}.get(getattr(node, "id", None), "None")
            raise ValueError(f"must hold `key: value` lines, but holds {held}")
        return {key.value: _value(key.value, value, loader) for key, value in node.value if value.tag != NULL}
    except RecursionError:
        raise ValueError(f"{path}: is nested too deeply. Write `key: value` lines.") from None
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: not valid YAML: {one_line(error)}") from None
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    finally:
        if loader is not None:
            loader.dispose()


def _value(key: str, node: yaml.Node, loader: RecipeLoader) -> str | list[str] | dict:
    """The value of a key: a text, a list of texts, or a mapping."""
    if isinstance(node, yaml.ScalarNode):
        return node.value
    if isinstance(node, yaml.MappingNode):
        return loader.construct_document(node)
    for item in node.value:
        if not isinstance(item, yaml.ScalarNode) or item.tag == NULL:
            raise ValueError(f"`{key}` must be a list of texts, got something else in line {item.start_mark.line + 1}.")
    return [item.value for item in node.value]
