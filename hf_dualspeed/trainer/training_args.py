"""Training arguments: the options of DualSpeed, on top of transformers' own."""

from __future__ import annotations

import copy
import json
import logging
import os
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from accelerate.utils import ParallelismConfig
from transformers import TrainingArguments
from transformers.debug_utils import DebugOption
from transformers.integrations import integration_utils
from transformers.trainer_pt_utils import AcceleratorConfig

from ..utils.constants import POSITION_IDS, VIDEO_BUDGETS
from ..utils.validation import as_count, as_dict, check_choice, check_fields, check_range

logger = logging.getLogger(__name__)

MODE_SCHEDULES = ("random", "periodic", "growing", "shrinking", "adaptive")

FUSED_HEAD_LOSSES = ("auto", "on", "off")

# Mappings that the command line gives as JSON.
DICTS = ("activation_checkpointing_kwargs", "gradient_checkpointing_kwargs", "lr_scheduler_kwargs")
# Options that allow more types than their annotations say, which are for a command-line parser.
WIDER = {
    "slow_mode_splits": Any,  # a count or "auto", checked by name below
    "fused_head_loss": str | bool,
    "accelerator_config": dict | str | AcceleratorConfig | None,
    "parallelism_config": ParallelismConfig | None,
    "resume_from_checkpoint": str | bool | None,
    "fsdp": str | list | bool | None,
    "debug": str | list[DebugOption] | None,
}

# Trackers whose name is not that of transformers' probe, of their package, or of both: probe and package.
TRACKERS = {
    **{name: (name, '"hf-dualspeed[tracking]"') for name in ("tensorboard", "trackio")},
    "azure_ml": ("azureml", "azureml-sdk"),
    "comet_ml": ("comet", "comet-ml"),
    "flyte": ("flytekit", "flytekit"),
}

# Ranges of the numbers of `TrainingArguments` and `SFTConfig`, most of which are taken in silence there.
COUNT, SHARE, SEED = {"low": 1}, {"low": 0, "high": 1, "right_open": True}, {"low": 0, "high": 2**32 - 1}
ABOVE_0, NOT_BELOW_0 = {"low": 0, "left_open": True}, {"low": 0}
RANGES = {
    **dict.fromkeys(("per_device_train_batch_size", "per_device_eval_batch_size"), COUNT),
    **dict.fromkeys(("gradient_accumulation_steps", "global_batch_size"), COUNT),
    **dict.fromkeys(("eval_accumulation_steps", "torch_empty_cache_steps", "dataloader_prefetch_factor"), COUNT),
    **dict.fromkeys(("save_total_limit", "max_length", "dataset_num_proc", "ddp_timeout"), COUNT),
    **dict.fromkeys(("save_steps", "logging_steps", "eval_steps", "num_train_epochs", "neftune_noise_alpha"), ABOVE_0),
    **dict.fromkeys(("learning_rate", "weight_decay", "warmup_steps", "eval_delay", "adam_epsilon"), NOT_BELOW_0),
    **dict.fromkeys(("dataloader_num_workers", "ddp_bucket_cap_mb", "router_aux_loss_coef"), NOT_BELOW_0),
    **dict.fromkeys(("adam_beta1", "adam_beta2", "label_smoothing_factor"), SHARE),
    **dict.fromkeys(("seed", "data_seed"), SEED),
    "max_grad_norm": {"low": 0, "off": "Use 0 not to clip gradients."},
}


# What a launcher writes into the environment.
TRUE = ("1", "true", "True", "yes")


class Default(float):
    """A number that the user has not set: equal to the same number, but of another type."""


class Chosen(int):
    """A number that the trainer chooses when training begins; 0 until then.

    Args:
        value (`int`): the number.
        asked (`int` or `str`): what the user has set.
    """

    def __new__(cls, value: int = 0, asked: int | str = "auto"):
        chosen = super().__new__(cls, value)
        chosen.asked = asked
        return chosen


@dataclass
class DualSpeedArguments:
    """The options of DualSpeed (arXiv 2602.03815); put it before any [`~transformers.TrainingArguments`].

    Raises:
        ValueError: an option is outside its range; the message names it, its value and the remedy.
    """

    pruner: str = field(
        default="divprune",
        metadata={"help": "Name of a registered pruner, a folder that holds a pruner_config.json, or a Hub repo."},
    )
    pruner_revision: str | None = field(
        default=None,
        metadata={"help": "Branch, tag or commit of the pruner's Hub repo; a commit never changes."},
    )
    pruning_ratio: float = field(
        default=Default(0.9),
        metadata={
            "help": "Fraction of the visual tokens removed in fast mode, in [0, 1). Left alone, a saved pruner keeps "
            "its own."
        },
    )
    pruner_kwargs: dict | str | None = field(
        default=None,
        metadata={
            "help": 'Further settings of the pruner (JSON), such as {"pruning_schedule": "linear", '
            '"initial_pruning_ratio": 0.5}.'
        },
    )
    slow_mode_ratio: float = field(
        default=Default(0.05),
        metadata={
            "help": "Fraction of optimizer steps that train on all tokens, in [0, 1]. Left alone, it is 0 where the "
            "language model is frozen (projector-only training)."
        },
    )
    mode_schedule: str = field(
        default="random",
        metadata={
            "help": "'random': each step is slow with probability slow_mode_ratio; 'periodic': every 1/ratio; "
            "'growing', 'shrinking': with a probability that goes from 0 to twice slow_mode_ratio, or back; "
            "'adaptive': with one that starts at slow_mode_ratio and grows while losses on all tokens lag behind those "
            "on pruned ones."
        },
    )
    min_slow_mode_ratio: float = field(
        default=0.02, metadata={"help": "The least slow_mode_ratio of mode_schedule='adaptive', in (0, 1]."}
    )
    max_slow_mode_ratio: float = field(
        default=0.2, metadata={"help": "The greatest slow_mode_ratio of mode_schedule='adaptive', in (0, 1]."}
    )
    min_pruning_ratio: float | None = field(
        default=None,
        metadata={
            "help": "With mode_schedule='adaptive', the pruning ratio moves too, between this and pruning_ratio. None: "
            "it stays."
        },
    )
    slow_warmup_steps: int = field(
        default=0,
        metadata={"help": "The first so many optimizer steps are slow, whatever the schedule says."},
    )
    slow_tail_ratio: float = field(
        default=0.0, metadata={"help": "The last fraction of all optimizer steps that is slow, in [0, 1]."}
    )
    isolator_length: int = field(
        default=4, metadata={"help": "Learned tokens in front of each image's kept tokens; 0 turns them off."}
    )
    distillation_weight: float = field(
        default=1.0,
        metadata={"help": "Weight of KL(teacher || student) in slow steps; 0 turns distillation off."},
    )
    distillation_temperature: float = field(default=1.0, metadata={"help": "Temperature of the distillation."})
    position_ids: str = field(
        default="auto",
        metadata={
            "help": "'compact': kept tokens are renumbered, as in the paper; 'original': they keep their positions; "
            "'auto': 'original' for models whose positions have rows and columns (M-RoPE), and where dropped tokens "
            "are merged and attention is proportional, else 'compact', as for models that cannot take gaps."
        },
    )
    proportional_attention: bool = field(
        default=True,
        metadata={
            "help": "In fast mode, and for the teacher, add log(s) to the attention logits of a kept token that stands "
            "for s tokens, so that an image keeps its share of the attention. False is the paper's."
        },
    )
    padding_free: bool = field(
        default=False,
        metadata={
            "help": "Lay the shortened samples of a fast micro-batch, and of the teacher's, end to end in one row, in "
            "place of padding them to the longest. Losses and gradients stay the same."
        },
    )
    video_budget: str = field(
        default="clip",
        metadata={
            "help": "'clip': the tokens of a video are pruned as one; 'frame': those of each frame by themselves."
        },
    )
    slow_mode_splits: str = field(  # or a number; a command-line parser needs one type
        default=1,
        metadata={
            "help": "Slow steps run each batch in so many parts and accumulate gradients, so that a batch sized for "
            "fast steps fits; 'auto': in parts about as large as a fast step's batch."
        },
    )
    per_device_train_batch_size: int = field(  # or "auto", which becomes a number that is still to be chosen
        default=8,
        metadata={
            "help": "Samples of a micro-batch on each device; 'auto': the largest fast micro-batch that fits into "
            "memory, measured when training begins, with more slow_mode_splits where slow steps need them."
        },
    )
    global_batch_size: int | None = field(
        default=None,
        metadata={
            "help": "Samples of an optimizer step, of all micro-batches and processes together, which "
            "per_device_train_batch_size='auto' keeps by its choice of gradient_accumulation_steps. None: "
            "gradient_accumulation_steps stays, and the step grows with the micro-batch."
        },
    )
    memory_gib: float | None = field(
        default=None,
        metadata={
            "help": "GiB that a step may hold on each device, weights, gradients and optimizer included, where the "
            "size of the micro-batch is told or chosen. None: nine tenths of what is free on the GPU."
        },
    )
    tell_size: bool = field(
        default=True,
        metadata={
            "help": "When training begins, measure on a GPU, or within memory_gib, what the micro-batch takes and what "
            "would fit, and say it. It takes about as long as three steps."
        },
    )
    fast_mode_checkpointing: bool = field(
        default=False,
        metadata={
            "help": "Recompute activations in fast steps too, where `activation_checkpointing` is on. Left off, fast "
            "steps are faster and fall back to it where memory runs short."
        },
    )
    supervised_logits_only: bool = field(
        default=True,
        metadata={
            "help": "Run the head at supervised positions only, in training and where evaluation asks for the loss "
            "alone. False: at all positions."
        },
    )
    fused_head_loss: str = field(  # or a boolean, because YAML reads on and off as true and false
        default="auto",
        metadata={
            "help": "Compute head and cross-entropy by Liger's fused kernel, without logits, wherever there is no "
            "distillation: 'auto' where it applies, and no `compute_loss` of a subclass may read logits, 'on' or an "
            "error that says why not, 'off'."
        },
    )
    fast_length_multiple: int = field(
        default=1,
        metadata={
            "help": "Pad shortened batches to a multiple of so many tokens, so that compiled graphs meet few lengths, "
            "such as 64."
        },
    )
    compile_regions: str | None = field(
        default=None,
        metadata={
            "help": "Compile each layer of the language model and the towers by itself, by this backend of "
            "torch.compile, such as 'inductor'. Layers of a tower whose attention the pruner reads are left out. "
            "None: no layer."
        },
    )
    plain_path: bool = field(
        default=False,
        metadata={
            "help": "Take the plain path in place of all that makes a step fast beside pruning, to find out whether "
            "that is to blame for something: fast steps recompute activations as slow ones do, slow batches run whole, "
            "logits are made at all positions, losses in float32 at once, teacher and student each encode the images, "
            "samples are padded, a frozen tower keeps its graph, and pruners choose in plain PyTorch."
        },
    )
    fast_only_parameters: list[str] = field(
        default_factory=list,
        metadata={"help": "Glob patterns of parameters that only fast steps update (e.g. '*lora_*.fast.*')."},
    )
    slow_only_parameters: list[str] = field(
        default_factory=list, metadata={"help": "Glob patterns of parameters that only slow steps update."}
    )
    vision_feature_cache: str | None = field(
        default=None,
        metadata={
            "help": "Folder in which a frozen vision tower's outputs are stored for later epochs and runs, so that "
            "each image is encoded once; several processes may share it. None turns it off."
        },
    )
    vision_feature_cache_gib: float = field(
        default=20.0,
        metadata={
            "help": "The most that the features in vision_feature_cache may take, in GiB. Those of towers that were "
            "not used for a day make room, the longest unused first; what finds none is encoded in each epoch. "
            "LLaVA-1.5 in bf16 stores 577 x 1024 values of 2 bytes, 1.18 MB, for each image, so that 20 GiB hold about "
            "18,000."
        },
    )
    speedup_rounds: int = field(
        default=3,
        metadata={
            "help": "Rounds in which the speed-up over plain full-token steps is measured after training, for the "
            "model card. Each takes four forward and backward passes over one micro-batch, three of them on all "
            "tokens, and one more round warms up; skipped where fewer than 100 optimizer steps per round were run. "
            "0 turns it off."
        },
    )
    # The collator makes batches from columns that are not arguments of the model's forward.
    remove_unused_columns: bool = field(
        default=False, metadata={"help": "Drop data set columns that the model's forward does not name."}
    )

    def check_options(self) -> None:
        """Brings the options of DualSpeed into their form, as `__init__` does; may be called again after a change.

        Raises:
            ValueError: one is outside its range; the message names it, its value and the remedy.
        """
        self._check_batch_size()
        check_fields(self, [option.name for option in fields(DualSpeedArguments)], WIDER)
        self.pruner_kwargs = as_dict("pruner_kwargs", self.pruner_kwargs)
        check_range("pruning_ratio", self.pruning_ratio, 0, 1, right_open=True, off="Use 0.0 to turn pruning off.")
        check_range("slow_mode_ratio", self.slow_mode_ratio, 0, 1, off="Use 0.0 for fast steps only.")
        check_range("slow_tail_ratio", self.slow_tail_ratio, 0, 1, off="Use 0.0 for no slow tail.")
        check_range("slow_warmup_steps", self.slow_warmup_steps, 0, off="Use 0 for no slow warm-up.")
        check_range("isolator_length", self.isolator_length, 0, off="Use 0 to train without an isolator.")
        check_range("distillation_weight", self.distillation_weight, 0, off="Use 0.0 to turn distillation off.")
        check_range("distillation_temperature", self.distillation_temperature, 0, left_open=True, off="1.0 is usual.")
        off = "Use vision_feature_cache=None to train without the cache."
        if self.vision_feature_cache is not None:
            self.vision_feature_cache = os.path.expanduser(self.vision_feature_cache)
        gib = self.vision_feature_cache_gib
        check_range("vision_feature_cache_gib", gib, 0, left_open=True, off=off)
        check_range("speedup_rounds", self.speedup_rounds, 0, off="Use 0 not to measure the speed-up.")
        if self.slow_mode_splits != "auto":
            self.slow_mode_splits = as_count("slow_mode_splits", self.slow_mode_splits, "or 'auto'")
        self.fast_length_multiple = as_count("fast_length_multiple", self.fast_length_multiple)
        if self.compile_regions is not None:
            check_choice("compile_regions", self.compile_regions, torch.compiler.list_backends(()))
        check_choice("mode_schedule", self.mode_schedule, MODE_SCHEDULES)
        self._check_adaptive_schedule()
        check_choice("position_ids", self.position_ids, POSITION_IDS)
        check_choice("video_budget", self.video_budget, VIDEO_BUDGETS)
        if self.plain_path:
            self.fast_mode_checkpointing, self.supervised_logits_only = True, False
            self.fused_head_loss, self.slow_mode_splits, self.padding_free = "off", 1, False
        if self.padding_free and self.fast_length_multiple > 1:
            raise ValueError(
                f"`padding_free` is True, and `fast_length_multiple` is {self.fast_length_multiple}, which pads each "
                "sample. Set one of them."
            )
        spoken = {"true": "on", "false": "off"}
        self.fused_head_loss = spoken.get(str(self.fused_head_loss).lower(), self.fused_head_loss)
        check_choice("fused_head_loss", self.fused_head_loss, FUSED_HEAD_LOSSES)

    def __post_init__(self):
        if self.per_device_train_batch_size == "auto":
            self.per_device_train_batch_size = Chosen()
        check_fields(self, wider=WIDER)
        # A text that is no mapping would be an error of Python's in the middle of the training.
        for name in DICTS:
            given = getattr(self, name)
            value = as_dict(name, given)
            # transformers reads texts by itself, and takes "false" within them for False.
            setattr(self, name, json.dumps(value) if isinstance(given, str) else value)
        self.check_options()
        self._check_ranges()
        # Without an accelerator, torch warns about pinned memory in every data loader.
        if self.use_cpu or not torch.accelerator.is_available():
            self.dataloader_pin_memory = False
        chosen = isinstance(self.accelerator_config, dict) and "non_blocking" in self.accelerator_config
        chosen |= self.accelerator_config is not None and not isinstance(self.accelerator_config, dict)
        super().__post_init__()
        if self.compile_regions is not None and self.torch_compile:
            raise ValueError(
                f"`compile_regions` is {self.compile_regions!r} and `torch_compile` is True, which compiles the whole "
                "model. Set one of them."
            )
        # Batches in pinned memory need not be waited for.
        if self.dataloader_pin_memory and not chosen:
            self.accelerator_config.non_blocking = True
        check_trackers(self.report_to)
        # With dispatch_batches, accelerate collates streamed data on one rank and cuts every tensor to B rows, but a
        # batch of B samples may hold another number of images.
        if self.accelerator_config.dispatch_batches is None:
            self.accelerator_config.dispatch_batches = False

    def _check_ranges(self) -> None:
        """Checks the numbers of the arguments behind this class, which its own `__post_init__` may take in silence."""
        for name, allowed in RANGES.items():
            value = getattr(self, name, None)
            if value is not None and not isinstance(value, Chosen):
                check_range(name, value, **allowed)
        if self.max_steps != -1:
            check_range("max_steps", self.max_steps, 1, off="Use -1 to train for num_train_epochs.")

    def _check_batch_size(self) -> None:
        size = self.per_device_train_batch_size
        if self.memory_gib is not None:
            check_range("memory_gib", self.memory_gib, 0, left_open=True, off="Use None for the GPU's free memory.")
        if not isinstance(size, Chosen):
            if self.global_batch_size is not None:
                raise ValueError(
                    f"`global_batch_size` is {self.global_batch_size}, but with per_device_train_batch_size={size} a "
                    "step has that many samples, times gradient_accumulation_steps and processes. Leave it out, or "
                    "set per_device_train_batch_size='auto'."
                )
            return
        passes = self.gradient_accumulation_steps
        if self.global_batch_size is not None and passes != 1 and not isinstance(passes, Chosen):
            raise ValueError(
                f"`gradient_accumulation_steps` is {passes}, but it follows from "
                f"global_batch_size={self.global_batch_size} and the micro-batch that is chosen. Leave one of them out."
            )
        sharded = {"deepspeed": self.deepspeed, "fsdp": self.fsdp}
        launched = (name for name in sharded if os.environ.get(f"ACCELERATE_USE_{name.upper()}", "") in TRUE)
        by = next((name for name, value in sharded.items() if value), next(launched, None))
        others = {"auto_find_batch_size=True": self.auto_find_batch_size, f"{by}": by}
        other = next((name for name, value in others.items() if value), None)
        if other is not None:
            raise ValueError(
                f"`per_device_train_batch_size` is 'auto', which does not go with {other}"
                f"{', of which one process cannot run a step to measure it' if other == by else ', which tries too'}. "
                "Set a number: `dualspeed estimate MODEL` tells one."
            )

    def _check_adaptive_schedule(self) -> None:
        adaptive = "mode_schedule='adaptive'"
        for name in ("min_slow_mode_ratio", "max_slow_mode_ratio"):
            check_range(name, getattr(self, name), 0, 1, left_open=True, off=f"It bounds {adaptive}.")
        if self.min_pruning_ratio is not None:
            check_range(
                "min_pruning_ratio", self.min_pruning_ratio, 0, 1, right_open=True, off="Use None to leave it alone."
            )
        check_order(self, "min_slow_mode_ratio", "max_slow_mode_ratio")
        if self.mode_schedule != "adaptive":  # which the trainer compares with the pruner's own
            check_order(self, "min_pruning_ratio", "pruning_ratio")
            if self.min_pruning_ratio is not None:
                logger.warning(
                    "`min_pruning_ratio` is %s, but `mode_schedule` is %r, with which the pruning ratio stays. "
                    "Set mode_schedule='adaptive', or leave it out.",
                    self.min_pruning_ratio,
                    self.mode_schedule,
                )
            return
        low, start, high = self.min_slow_mode_ratio, self.slow_mode_ratio, self.max_slow_mode_ratio
        if not low <= start <= high:
            raise ValueError(
                f"`slow_mode_ratio` is {start}, but {adaptive} starts there and keeps between "
                f"min_slow_mode_ratio={low} and max_slow_mode_ratio={high}. Set the three in this order."
            )
        if not self.distillation_weight:
            raise ValueError(
                f"`distillation_weight` is 0, but {adaptive} compares the teacher's loss with the student's. Set it "
                "above 0, or choose another schedule."
            )

    def __getstate__(self) -> dict:
        """Leaves out the Hub's token, because the Trainer pickles its arguments into the published model folder."""
        return {**self.__dict__, "hub_token": None}

    def __copy__(self):
        copied = object.__new__(type(self))
        copied.__dict__.update(self.__dict__)  # copies in memory keep the token
        return copied

    def __deepcopy__(self, memo: dict):
        copied = memo[id(self)] = object.__new__(type(self))
        copied.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return copied


def check_trackers(names: list[str]) -> None:
    """Raises for a tracker of `report_to` that transformers does not know, or finds no package of.

    Raises:
        ValueError: there is no such tracker.
        ImportError: its package is not installed; the message has the line that installs it.
    """
    for name in names:
        check_choice("report_to", name, [*integration_utils.INTEGRATION_TO_CALLBACK, "all", "none"])
        probe, package = TRACKERS.get(name, (name, name))
        if not getattr(integration_utils, f"is_{probe}_available", bool)():
            raise ImportError(
                f"`report_to` has {name!r}, which is not installed or not set up. Run `pip install {package}`, or "
                "leave it out."
            )


def check_order(options: object, low: str, high: str) -> None:
    """Raises a `ValueError` where the option `low` is set above the option `high`."""
    least, most = getattr(options, low), getattr(options, high)
    if least is not None and least > most:
        raise ValueError(f"`{low}` is {least}, more than `{high}`, which is {most}. Set it to {most} or less.")


@dataclass
class DualSpeedTrainingArguments(DualSpeedArguments, TrainingArguments):
    """[`~transformers.TrainingArguments`] plus the options of [`DualSpeedArguments`].

    Raises:
        ValueError: an option is outside its range; the message names it, its value and the remedy.
    """
