"""DualSpeed over TRL: `trl.SFTTrainer` with fast and slow optimizer steps."""

from __future__ import annotations

from dataclasses import MISSING, dataclass, fields

import torch
from torch import nn
from transformers import PreTrainedModel, Trainer

from ..models.adapters import check_adapter
from ..pruners import Pruner
from .dual_forward import DualSpeedOutput
from .trainer import DualSpeedMixin
from .training_args import DualSpeedArguments

try:
    from trl import SFTConfig, SFTTrainer
except ModuleNotFoundError as error:
    if error.name != "trl":
        raise
    raise ImportError(
        'DualSpeedSFTTrainer and DualSpeedSFTConfig need TRL: pip install "hf-dualspeed[trl]".'
    ) from error


@dataclass
class DualSpeedSFTConfig(DualSpeedArguments, SFTConfig):
    """[`~trl.SFTConfig`], with its defaults, plus the options of [`DualSpeedArguments`].

    Raises:
        ValueError: an option is outside its range; the message names it, its value and the remedy.
    """


class AttachLast(Trainer):
    """Attaches DualSpeed to the model right before [`~transformers.Trainer`] receives it.

    It comes after SFTTrainer in the method resolution order. By then SFTTrainer has loaded a model given by name,
    resized its embeddings and wrapped it in PEFT, so the hooks sit on the outermost model.
    """

    def __init__(self, model: nn.Module, args: DualSpeedSFTConfig, **kwargs):
        args.padding_free = self._padding_free
        self._attach(model, args)
        super().__init__(model=model, args=args, **kwargs)


class CardlessCheckpoints:
    """Skips SFTTrainer's writing of a card beside each checkpoint: ours would keep the first one's figures."""

    def _save_checkpoint(self, model, trial):
        super(SFTTrainer, self)._save_checkpoint(model, trial)


class DualSpeedSFTTrainer(DualSpeedMixin, CardlessCheckpoints, SFTTrainer, AttachLast):
    """[`~trl.SFTTrainer`] with fast and slow steps; see [`DualSpeedMixin`].

    Data sets, TRL's collator, `peft_config` and models given by name work as in SFTTrainer, except that visual tokens
    are never labels. Training logs `mean_token_accuracy` (of the tokens in the step: pruned in fast steps) and
    `num_tokens` (before pruning), but no `entropy`. Evaluation is SFTTrainer's own, on all tokens.

    Args:
        model (`str`, `PreTrainedModel` or `PeftModel`): a vision-language model that takes `mm_encoder_outputs`.
        args (`DualSpeedSFTConfig` or `trl.SFTConfig`, *optional*): options; an SFTConfig gets DualSpeed's defaults.
        pruner (`Pruner`, *optional*): replaces `args.pruner`.
        peft_config (`PeftConfig`, *optional*): adapters to train in place of the weights.
        kwargs: arguments of SFTTrainer.

    Raises:
        ValueError: the model, an option or the first batch cannot be trained this way; the message says why.
    """

    _tag_names = ["trl", "sft", "dualspeed"]
    reads_logits = True  # for TRL's metrics
    known_losses = (SFTTrainer,)

    def __init__(
        self,
        model: str | PreTrainedModel,
        args: SFTConfig | None = None,
        *,
        pruner: Pruner | None = None,
        peft_config=None,
        **kwargs,
    ):
        args = dualspeed_config(args, model)
        check_sft_options(args)
        check_adapter(peft_config or getattr(model, "active_peft_config", None))
        # SFTTrainer refuses `padding_free` with images, and would collate texts in its own way: it sees it unset.
        self._padding_free, args.padding_free = args.padding_free, False
        try:
            super().__init__(model, args, pruner=pruner, peft_config=peft_config, **kwargs)
        finally:
            args.padding_free = self._padding_free
        self.dual_forward.offloads = args.activation_offloading
        interface = self.dual_forward.interface
        if self.aux_loss_enabled and not interface.takes_router_logits:
            raise ValueError(
                f"`router_aux_loss_coef` is {self.router_aux_loss_coef} (yours, or the model's own), but "
                f"{interface.name} computes no load-balancing loss of its experts. Set router_aux_loss_coef=0.0."
            )
        # Correct, supervised and all tokens that this rank trained on, summed over ranks for logs.
        self._token_counts = torch.zeros(3, dtype=torch.long, device=self.args.device)
        self._shown_counts = [0, 0]

    def _attach_given(self, model, args) -> None:
        """Does nothing, because SFTTrainer has not loaded or wrapped the model yet. [`AttachLast`] attaches later."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """DualSpeed's losses in training, SFTTrainer's own otherwise."""
        if self.dual_forward.mode is None:
            return SFTTrainer.compute_loss(self, model, inputs, return_outputs, num_items_in_batch)
        inputs = {**inputs, "use_cache": False}  # as in SFTTrainer, where checkpointing would warn about the cache
        try:
            loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        except ValueError as error:
            if "Image features and image tokens do not match" not in str(error) or self.args.max_length is None:
                raise
            raise ValueError(
                f"`max_length`={self.args.max_length} cuts visual tokens off a sample ({error}). Raise it, or set "
                "max_length=None."
            ) from error
        if self.is_in_train:  # not while the speed-up is measured
            self._count(outputs, inputs)
        return (loss, outputs) if return_outputs else loss

    # --- TRL's metrics --------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _count(self, outputs: DualSpeedOutput, inputs: dict) -> None:
        """Adds up the counts of TRL's metrics on the device, from logits `(M, V)`."""
        targets = outputs.targets
        right = outputs.logits.argmax(-1) == targets
        # Every part of a split batch receives the whole batch: count its tokens (B, S) with the first part.
        seen = inputs.get("attention_mask", inputs["input_ids"] >= 0) * (not outputs.part)
        new = torch.stack([right.sum(), torch.ones_like(targets).sum(), seen.sum()])
        self._token_counts = self._token_counts + new

    def _snapshot(self):
        restore, counts = super()._snapshot(), self._token_counts

        def restore_all() -> None:
            restore()
            self._token_counts = counts

        return restore_all

    def _gather_counts(self) -> tuple[int, int]:
        """Correct and supervised tokens so far, over all ranks; sets `_total_train_tokens`. Call it on every rank."""
        right, supervised, seen = self.accelerator.reduce(self._token_counts, reduction="sum").tolist()
        self._total_train_tokens = seen // self._tp_size  # tensor parallel ranks receive the same batch
        return right, supervised

    def evaluate(self, *args, **kwargs):
        self._gather_counts()
        return super().evaluate(*args, **kwargs)

    def log(self, logs, start_time=None):
        if "loss" in logs:  # a training log, written on every rank at the same step
            counts = self._gather_counts()
            right, supervised = (new - old for new, old in zip(counts, self._shown_counts, strict=True))
            self._shown_counts = counts
            logs.update(mean_token_accuracy=right / max(1, supervised), num_tokens=self._total_train_tokens)
        super().log(logs, start_time)

    # --- saving ---------------------------------------------------------------------------------------------------

    def create_model_card(self, model_name=None, dataset_name=None, tags=None):
        """Writes results.json and README.md from the measurements; `model_name` is not used."""
        super().create_model_card(dataset=dataset_name, tags=tags)


def dualspeed_config(args: SFTConfig | None, model: str | nn.Module) -> DualSpeedSFTConfig:
    """The options of `args`, completed by DualSpeed's defaults.

    Raises:
        ValueError: `args` is no `SFTConfig`.
    """
    if args is None:
        name = model if isinstance(model, str) else getattr(model.config, "name_or_path", "")
        return DualSpeedSFTConfig(f"{name.rstrip('/').split('/')[-1] or 'model'}-SFT")
    if isinstance(args, DualSpeedSFTConfig):
        return args
    if not isinstance(args, SFTConfig):
        raise ValueError(f"`args` must be DualSpeedSFTConfig or trl.SFTConfig, got {type(args).__name__}.")
    # Copied, not constructed: options were changed by `__init__` already and may not pass through it twice.
    config = object.__new__(DualSpeedSFTConfig)
    config.__dict__.update(args.__dict__)
    for option in fields(DualSpeedArguments):
        if option.name not in config.__dict__:
            factory = option.default_factory
            config.__dict__[option.name] = option.default if factory is MISSING else factory()
    return config


def check_sft_options(args: SFTConfig) -> None:
    """Raises a `ValueError` for options of TRL that DualSpeed does not support."""
    if args.packing:
        raise ValueError(
            "`packing`=True is not supported: TRL puts no samples with images into one row. Set padding_free=True, "
            "which lays the samples of each fast micro-batch into one, or pack them in your own collator and use "
            "DualSpeedTrainer."
        )
    if args.loss_type != "nll":
        raise ValueError(
            f"`loss_type`={args.loss_type!r} is not supported: DualSpeed computes cross-entropy and distillation "
            "itself. Use loss_type='nll'."
        )
