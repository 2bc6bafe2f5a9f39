"""The trainer: fast and slow optimizer steps over `transformers.Trainer`."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from copy import copy
from functools import partial
from importlib.util import find_spec

import torch
from accelerate import DistributedDataParallelKwargs
from accelerate.utils import DynamoBackend
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from transformers import ProcessorMixin, Trainer
from transformers.trainer_callback import ExportableState, TrainerCallback

from ..data.collators import MaskVisualLabels, mask_labels
from ..feature_cache.cache import dropout_rates, feature_cache_of, image_tower
from ..feature_cache.units import WithImageUnits
from ..models.adapters import check_adapter, remember_origins, unsaved
from ..models.components import parameter_counts
from ..models.interface import ModelInterface, argument_names
from ..pruners import Pruner, available_pruners
from ..pruning import positions
from ..pruning.isolator import ModeIsolator
from ..pruning.repeats import REPEATS, WithRepeats
from ..publishing.display import RunDisplay, takes_the_place_of_defaults
from ..utils.constants import ISOLATOR_WEIGHTS_NAME, VIEW_SETTINGS
from ..utils.validation import checked
from .adaptive_schedule import ADAPTIVE, BOUNDS, AdaptiveSchedule, adaptive_schedule_of
from .batch_splitting import can_be_split, parts_of
from .callbacks import ModeClock, ModeLosses
from .checkpoints import CheckpointMixin
from .deepspeed_engine import DeepSpeedMixin
from .dual_forward import EVALUATION, NAME, DualForward, DualSpeedOutput
from .earlier_stage import folder_of_fast_view, holds_weights_of, take_over
from .fused_loss import check_ligers_layers, fused_head, without_ligers_loss
from .length_grouping import LengthGroupingMixin
from .losses import divisor, self_distillation_loss
from .mode_parameters import ModeParameters
from .plain_evaluation import PlainEvaluationMixin
from .run_record import RunRecordMixin
from .schedule import CHANGING, FAST, SLOW, ModeSchedule, StepsLeft
from .selective_checkpointing import SelectiveCheckpointing
from .setup import (
    AT_CONSTRUCTION,
    check_compiled,
    check_ddp,
    check_fsdp,
    check_given,
    check_head,
    check_loading,
    check_loss_func,
    check_losses,
    check_optim,
    check_optimizer,
    check_router_loss,
    check_shards,
    check_trained,
    check_unchanged,
    check_whole_samples,
    check_wrapper,
    compile_regions,
    resolve_pruner,
    slow_ratio,
    wrap_existing_layers,
)
from .sizing.mixin import SizingMixin
from .training_args import Chosen, Default, DualSpeedArguments, DualSpeedTrainingArguments

logger = logging.getLogger(__name__)

if find_spec("peft") is not None:  # which the Trainer has imported by now
    remember_origins()


class DualSpeedMixin(
    RunRecordMixin, CheckpointMixin, DeepSpeedMixin, PlainEvaluationMixin, LengthGroupingMixin, SizingMixin
):
    """What DualSpeed adds to a `Trainer`; put it before any subclass of [`~transformers.Trainer`].

    Fast steps train on the mode isolator and pruned visual tokens. Slow steps train on all visual tokens, with the
    pruned view as teacher. Evaluation and prediction use all tokens and no isolator. Losses are divided by the
    supervised tokens of the whole step, even for models whose plain training averages the means of micro-batches
    (Qwen2.5-VL).

    Args:
        model: a vision-language model of transformers that takes `mm_encoder_outputs`, PEFT-wrapped or not.
        args (`DualSpeedArguments`): options, such as [`DualSpeedTrainingArguments`].
        pruner (`Pruner`, *optional*): replaces `args.pruner`.
        positional, kwargs: further arguments of the trainer, in its order or by name.

    Raises:
        ValueError: the model, the arguments or the first batch cannot be trained this way; the message says why.
    """

    # Classes behind this one whose `compute_loss` it knows how to replace.
    known_losses: tuple[type, ...] = ()

    @checked
    def __init__(
        self,
        model=None,
        args: DualSpeedArguments | None = None,
        *positional,
        pruner: Pruner | None = None,
        **kwargs,
    ):
        # The trainer's further arguments may be given by their places.
        kwargs = dict(zip(argument_names(super().__init__)[2:], positional, strict=False)) | kwargs
        given = kwargs.get("callbacks") or []
        if args is None:
            args = DualSpeedTrainingArguments(output_dir="tmp_trainer")
        if not isinstance(args, DualSpeedArguments):
            raise ValueError(f"`args` must be DualSpeedTrainingArguments, got {type(args).__name__}.")
        check_given(kwargs)
        if kwargs.get("processing_class") is None:  # so that it is saved with the model
            processor = getattr(kwargs.get("data_collator"), "processor", None)
            kwargs["processing_class"] = processor if isinstance(processor, ProcessorMixin) else None
        check_loss_func(kwargs.get("compute_loss_func"))
        without_ligers_loss(args)
        check_losses(type(self), DualSpeedMixin, (Trainer, *self.known_losses))

        # Attach pruner and isolator to the model before the Trainer moves, wraps or shards it.
        self._given_pruner = pruner
        self.facts: dict = {}  # further keys of results.json, set by callers that measured them
        self._begin_record()
        if model is not None:
            self._attach_given(model, args)
        super().__init__(model=model, args=args, **kwargs)

        if self.args.n_gpu > 1:
            raise ValueError(
                f"{self.args.n_gpu} devices in one process mean nn.DataParallel, which DualSpeed does not support. "
                "Start one process per device (accelerate launch train.py), or let it see one: CUDA_VISIBLE_DEVICES=0."
            )
        self.given_collator = self.data_collator  # tells how long samples are
        # The loss is always a sum divided by the items of the whole step, for any model.
        self.model_accepts_loss_kwargs = True
        self._loss_shifts_labels = True

        # Clock, losses by mode, activation checkpointing, schedule and data order follow the training as callbacks.
        self.clock, self.mode_losses = ModeClock(), ModeLosses()
        self.selective_checkpointing = SelectiveCheckpointing()
        self.adaptive_schedule = self.feature_cache = None
        self._begin_length_grouping()
        self._steps_left = StepsLeft()
        self._micro = (-1, 0)  # the current optimizer step and micro-batch
        self._modalities: set[str] = set()  # in the current optimizer step
        self._items: torch.Tensor | int | None = None  # supervised tokens of the current optimizer step, if known
        self._share_run = 1.0  # of the last micro-batch's tokens, those that the language model ran on
        self._follow_arguments()
        in_place = takes_the_place_of_defaults(self.callback_handler.callbacks, given)
        self.display = RunDisplay(self.run_facts, self.pace, self.kept_of, in_place)
        self.add_callback(self.display)

    # --- set-up ---------------------------------------------------------------------------------------------------

    def _attach_given(self, model: nn.Module, args: DualSpeedArguments) -> None:
        """Attaches to the given model. A trainer that loads or wraps models attaches later instead."""
        self._attach(model, args)

    def _attach(self, model: nn.Module, args: DualSpeedArguments) -> None:
        check_wrapper(model)
        check_adapter(getattr(model, "active_peft_config", None))
        interface = ModelInterface(model)
        interface.check_protocol()
        check_head(interface)

        # New weights depend on the seed only, and their creation leaves the global random state unchanged.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(args.seed)
            isolator = ModeIsolator.for_model(interface.outer, args.isolator_length) if args.isolator_length else None
            self._pruner = resolve_pruner(self._given_pruner, args, interface)
        # The Trainer moves no quantized model, nor one on several devices, and so nothing that is attached to it.
        self._pruner.to(interface.outer.get_input_embeddings().weight.device)
        merged = self._pruner.config.merged(args.proportional_attention)
        positions = interface.position_scheme(args.position_ids, merged)

        # A model that was trained with DualSpeed has its fast view with it, or beside its weights or its adapters'.
        by_name = self._given_pruner is None and args.pruner in available_pruners()
        taken = take_over(model, isolator, self._pruner if by_name else None)
        folder = None if taken else folder_of_fast_view(model)
        if folder is not None and isolator is not None and (folder / ISOLATOR_WEIGHTS_NAME).is_file():
            isolator.load_pretrained(folder)
            logger.info("Mode isolator taken from %s.", folder)
        if folder is not None and by_name and holds_weights_of(folder, self._pruner):
            self._pruner.load_weights(folder)
            logger.info("Weights of the pruner %r taken from %s.", args.pruner, folder)

        # Hooks on the model, then the parameters that each mode updates.
        self.dual_forward = DualForward(
            self._pruner,
            isolator,
            positions,
            args.video_budget,
            args.supervised_logits_only,
            args.plain_path,
            args.proportional_attention,
            args.padding_free,
            args.fast_length_multiple,
        )
        self.dual_forward.trained = taken
        self.dual_forward.attach(model)
        fast_only = [f"{NAME}.*"] if any(p.requires_grad for p in self.dual_forward.parameters()) else []
        self.mode_parameters = ModeParameters(
            model, [*fast_only, *args.fast_only_parameters], args.slow_only_parameters
        )
        self.dual_forward.reserve_adapters(model, self.mode_parameters.names[FAST])
        self._followed: tuple | None = None  # what the schedule follows, once it is made
        self._attached = {name: copy(getattr(args, name)) for name in AT_CONSTRUCTION}

    def _follow_arguments(self) -> None:
        """Checks what needs the accelerator, and makes what follows from arguments, model and pruner.

        Called again wherever these change: for each model of `model_init`, and so for each trial of a search.
        """
        args = self.args
        self.clock.view = {name: getattr(self.dual_forward, name) for name in VIEW_SETTINGS}
        # Merged tokens were renumbered, too, when checkpoints said nothing of their view.
        self.clock.unsaid = {"position_ids": self.dual_forward.interface.position_scheme(args.position_ids)}
        check_optimizer(self.optimizer, self.dual_forward)
        check_optim(args, (name for names in self.mode_parameters.names.values() for name in names))
        self.check_deepspeed()
        if args.world_size > 1 and not self.is_sharded:
            check_ddp(args, self.model)
        if args.slow_mode_splits != 1 and self.is_sharded:
            raise ValueError(
                f"`slow_mode_splits` is {args.slow_mode_splits!r}, but sharded training runs each batch in one piece. "
                "Set slow_mode_splits=1, or use DDP."
            )
        self._check_sizing()
        interface = self.dual_forward.interface
        check_router_loss(interface, self._pruner)
        check_ligers_layers(args, interface)
        if self.is_compiled:
            check_compiled(args, self._pruner)
        if args.compile_regions is not None:
            compile_regions(interface, self._pruner, args.compile_regions)
        check_loading(self.is_distributed_loading_by_transformers, self.get_tp_size(), args.world_size)
        check_whole_samples(self.get_cp_size() * self.get_sp_size())
        if self.is_fsdp_enabled:
            check_fsdp(self.accelerator.state.fsdp_plugin)
            check_shards(self.accelerator.state.fsdp_plugin, self.model, self.dual_forward)
            wrap_existing_layers(self.accelerator.state.fsdp_plugin, interface)

        # Passes run in the precision of training. Labels of visual tokens are masked in the collator.
        self._run_as_trained()
        asks = "text" in self._pruner.needs or self._pruner.in_language_model
        visual, name = interface.visual_token_ids, self._pruner.config.pruner_type
        self._masking = partial(
            MaskVisualLabels, visual_token_ids=visual, asks=name if asks else None, media=interface.media
        )
        self.data_collator = self._masking(self.given_collator)

        self.selective_checkpointing.always = args.fast_mode_checkpointing
        self._leave_out(self.feature_cache)
        self.feature_cache = feature_cache_of(
            args.vision_feature_cache,
            args.vision_feature_cache_gib,
            self.model,
            self._pruner,
            self.accelerator.mixed_precision,
            separable=not (
                self.is_sharded or self.get_tp_size() > 1 or self.is_compiled or args.compile_regions is not None
            ),
            dispatched=bool(self.accelerator.dispatch_batches) and self.accelerator.num_processes > 1,
        )
        self._follow_schedule()

    def _follow_schedule(self) -> None:
        """Takes in what the schedule of modes follows: arguments, and whether the language model is trained."""
        self.slow_mode_ratio, self._schedule = slow_ratio(self.args, self.dual_forward.interface), None
        followed = self.slow_mode_ratio, *(getattr(self.args, name) for name in ADAPTIVE)
        if followed != self._followed:
            self._leave_out(self.adaptive_schedule)
            self.adaptive_schedule = adaptive_schedule_of(
                self.args, self.slow_mode_ratio, self._pruner, self.mode_losses, self._reduced
            )
            self._followed = followed
        self._add_own_callbacks()

    def as_configured(self) -> AbstractContextManager:
        """A context in which the pruner has the ratio that was asked for, wherever an adaptive schedule moved it."""
        return nullcontext() if self.adaptive_schedule is None else self.adaptive_schedule.paused()

    def _leave_out(self, callback: TrainerCallback | None) -> None:
        if callback in self.callback_handler.callbacks:
            self.remove_callback(callback)

    def _add_own_callbacks(self) -> None:
        """Adds what the trainer itself needs, also if the list of callbacks has been emptied since."""
        own = (self.clock, self.mode_losses, self.selective_checkpointing, self._epoch_begin)
        for callback in filter(None, (*own, self.adaptive_schedule, self.feature_cache)):
            if callback not in self.callback_handler.callbacks:
                self.add_callback(callback)

    def call_model_init(self, trial=None):
        model = super().call_model_init(trial)
        if not getattr(self, "is_in_train", False):  # otherwise the trial's arguments are still to come
            self._attach(model, self.args)
        return model

    def _hp_search_setup(self, trial):
        """Takes the arguments of a trial, if there is one, and attaches to the new model if there is one.

        Otherwise, takes in what was changed since construction.
        """
        searches = self.hp_search_backend is not None and trial is not None
        if searches:
            self._forget_size()
        before = dict(vars(self.args))
        if searches:  # the Trainer casts to the type of the old value, and "auto" is no number
            self.args.slow_mode_splits = str(self.args.slow_mode_splits)
        super()._hp_search_setup(trial)
        if searches:
            for name, value in vars(self.args).items():
                if isinstance(value, (Default, Chosen)) and value is not before.get(name):
                    plain = float if isinstance(value, Default) else int
                    setattr(self.args, name, plain(value))  # the trial's choice is no default
            self.args.check_options()
        elif not (self._is_sized or self.args.auto_find_batch_size):
            self._train_batch_size = self.args.train_batch_size  # which the Trainer takes from where it was made
        if self.model_init is not None:
            self._attach(self.model, self.args)
            if self.place_model_on_device:
                self._move_model_to_device(self.model, self.args.device)
            self._follow_arguments()
        else:
            check_unchanged(self.args, self._attached)
            self._follow_schedule()

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self._run_as_trained()  # a copied model belongs to the copied trainer

    def _run_as_trained(self) -> None:
        """Sets the precision and the head of training, which are known once the accelerator exists."""
        sharded = self.is_sharded or self.is_distributed_loading_by_transformers
        reasons = {
            "this trainer reads more off the logits than the loss": self.reads_logits,
            "its `compute_loss` may read logits": self.loss_is_its_own and self.args.fused_head_loss == "auto",
            "the model is sharded": sharded or self.get_tp_size() > 1,
            "`torch_compile` would compile the head": self.is_compiled,
        }
        otherwise = next((reason for reason, holds in reasons.items() if holds), None)
        head = fused_head(self.dual_forward.interface, self.args.fused_head_loss, self.args.device, otherwise)
        self.dual_forward.run_as_trained(self.accelerator.autocast, head, sharded, self.loss_in_mode)

    def _build_accelerator_args(self, **kwargs) -> dict:
        """The Trainer's, but DDP always looks for parameters that a pass does not use, also with activation
        checkpointing: ranks differ in what their batches reach. What no rank has used keeps no gradient."""
        built = super()._build_accelerator_args(**kwargs)
        for handler in built["kwargs_handlers"]:
            if isinstance(handler, DistributedDataParallelKwargs):
                handler.find_unused_parameters = True
        return built

    def _prepare_for_training(self, max_steps, train_dataloader, resume_from_checkpoint):
        """Checks that the model is still the trainer's, then makes the optimizer and wraps the model."""
        adapted = hasattr(self.model, "peft_config") and NAME not in dict(self.model.named_children())
        if adapted or getattr(self.model, NAME, None) is not self.dual_forward:
            raise ValueError(
                "`trainer.model` is no longer the model that this trainer was made for, or has adapters since, or "
                "another DualSpeedTrainer has been made for it. Make a new trainer."
            )
        check_loss_func(self.compute_loss_func)
        check_trained(self.model, self.dual_forward)
        lost = unsaved(self.model, (f"{NAME}.",))
        if lost:
            logger.warning(
                "PEFT saves adapters alone, and so save_model() and ordinary checkpoints lack %d parameters that are "
                "trained beside them, such as %s: a resumed run begins with their old values. Name their modules in "
                "`modules_to_save` of the adapters' config, or save trainer.model.merge_and_unload() as well.",
                len(lost),
                lost[0],
            )
        self._micro = (-1, 0)  # of an earlier call, which may have ended within a step
        self._roles = parameter_counts(self.dual_forward.interface.outer, self.dual_forward)  # before they are sharded
        mask_labels(train_dataloader, self._masking)
        prepared = super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
        if not self.is_sharded:  # which puts parameters of its own in place
            check_optimizer(self.optimizer, self.dual_forward)
        return prepared

    def _load_callback_state(self) -> None:
        # The trainer's own callbacks restore themselves where training begins, and stay the same objects.
        saved, own = self.state.stateful_callbacks, (ModeClock.__name__, AdaptiveSchedule.__name__)
        self.state.stateful_callbacks = {name: value for name, value in saved.items() if name not in own}
        super()._load_callback_state()
        # Those that the checkpoint does not know, such as another schedule's, have a place in the next one.
        exported = [c for c in self.callback_handler.callbacks if isinstance(c, ExportableState)]
        self.state.stateful_callbacks = {type(c).__name__: c.state() for c in exported} | saved

    def get_train_dataloader(self):
        if self.train_dataset is not None and not self._train_batch_size:
            raise ValueError(
                "`per_device_train_batch_size` is 'auto', which is chosen when training begins. Call train() first, or "
                "set a number."
            )
        # The Trainer takes `data_collator` for all loaders. Training looks its images up in the cache, or for those
        # that come again, and numbers tokens ahead of the step; evaluation does not.
        collator, interface = self.data_collator, self.dual_forward.interface
        if self.feature_cache is not None:
            self.data_collator = WithImageUnits(collator, self.feature_cache)
        elif self.encodes_once:
            self.data_collator = WithRepeats(collator)
        if interface.positions_owner is not None and not self.args.plain_path:
            self.data_collator = positions.WithPositions(self.data_collator, interface)
        try:
            return super().get_train_dataloader()
        finally:
            self.data_collator = collator

    @property
    def encodes_once(self) -> bool:
        """Whether images that a batch holds several times may share an encoding: not one that is random or compiled,
        nor one that depends on the batch, nor those of a batch that is collated for all ranks and cut into theirs."""
        if self.accelerator.dispatch_batches:
            return False
        tower = image_tower(self.dual_forward.interface.outer)
        if tower is None or self.args.plain_path or self.is_compiled or self.is_sharded:
            return False
        parts = list(tower.modules())
        return not any(rate > 0 for part in parts for rate in dropout_rates(part)) and not any(
            isinstance(part, _BatchNorm) for part in parts
        )

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        return super().get_batch_samples(self.clock.data.batches(epoch_iterator), num_batches, device)

    # --- modes ----------------------------------------------------------------------------------------------------

    def mode_at(self, step: int) -> str:
        """ "fast" or "slow" for optimizer step `step`, counted from 0; the same on every rank and after resuming."""
        running = self.state.max_steps
        if self._schedule is None or running not in (0, self._schedule.total_steps):
            self._schedule = ModeSchedule(
                self.slow_mode_ratio,
                self.args.mode_schedule,
                self.args.seed,
                self.args.slow_warmup_steps,
                self.args.slow_tail_ratio,
                running or self._planned_steps(),
            )
        adaptive = self.adaptive_schedule
        return self._schedule.mode_at(step) if adaptive is None else adaptive.mode_at(self._schedule, step)

    def steps_left(self) -> dict[str, int]:
        """Steps still to come by mode. An adaptive schedule is supposed to keep its ratio of now."""
        step, last = self.state.global_step, self.state.max_steps
        if self.adaptive_schedule is not None:
            slow = round(self.adaptive_schedule.ratio * max(0, last - step))
            return {FAST: max(0, last - step) - slow, SLOW: slow}
        self.mode_at(step)  # makes the schedule
        return self._steps_left(self._schedule, step, last)

    def _planned_steps(self) -> int | None:
        """Optimizer steps of the whole run, before it starts. Only a slow tail and changing ratios need them."""
        if self.args.max_steps > 0 or not (self.args.slow_tail_ratio or self.args.mode_schedule in CHANGING):
            return max(self.args.max_steps, 0) or None
        return self.set_initial_training_values(self.args, self.get_train_dataloader())[-1]

    def training_step(self, model, inputs, num_items_in_batch=None):
        """One micro-batch, forward and backward, in the mode of the current optimizer step."""
        # Schedule: fast or slow? One answer per optimizer step, the same on every rank.
        step = self.state.global_step
        mode, progress = self.mode_at(step), step / max(1, self.state.max_steps - 1)
        self._micro = (step, self._micro[1] + 1 if self._micro[0] == step else 0)
        self._modalities = self._modalities if self._micro[1] else set()
        self._check_ranks(inputs)

        # Feature cache: stored outputs of a frozen vision tower replace its forward.
        inputs, served = (inputs, None) if self.feature_cache is None else self.feature_cache.taken(inputs)
        # Images that the batch holds several times are encoded once.
        repeats = inputs.get(REPEATS)
        if repeats is not None:
            inputs = {key: value for key, value in inputs.items() if key != REPEATS}
        # Positions on several axes, which the collator has numbered.
        inputs, places = positions.taken(inputs)
        # Keep some micro-batches to measure the speed-up after training.
        if self.is_in_train:
            place = step, self.state.max_steps, self._micro[1], self.current_gradient_accumulation_steps
            ratio = None if self.adaptive_schedule is None else self.adaptive_schedule.pruning_ratio
            self.speedup_meter.observe(inputs, *place, ratio)

        # Encode, prune, forward, loss and backward.
        inputs = {**inputs, **places}
        loss, done = self.step_in_mode(mode, model, inputs, num_items_in_batch, progress, served, repeats)
        self.clock.count(mode, done.tokens, *done.visual_tokens)
        tokens, fast_tokens = inputs["input_ids"].numel(), done.tokens if mode == FAST else None
        self.display.saw(done.lengths, done.visual_tokens, tokens, fast_tokens)
        self._modalities |= done.modalities
        self._share_run = 1.0 if fast_tokens is None else fast_tokens / tokens

        # Parameters of the other mode do not move: the optimizer skips those without a gradient.
        if self.accelerator.sync_gradients:
            self.mode_parameters.drop_gradients(mode)
            # Neither do those that the step has not used. Shards got zeros for them; DDP finds them by itself.
            if self.dual_forward.sharded and not self.is_deepspeed_enabled and not self._modalities:
                self.dual_forward.drop_gradients()
        return loss

    def floating_point_ops(self, inputs):
        """The Trainer's estimate for a micro-batch that was just run, whose tokens a fast step has pruned."""
        return self._share_run * super().floating_point_ops(inputs)

    @property
    def loss_is_its_own(self) -> bool:
        """Whether a subclass has a `compute_loss` of its own."""
        return not type(self).compute_loss.__module__.startswith(__package__)

    @property
    def is_compiled(self) -> bool:
        """Whether the model is compiled as a whole, by `torch_compile` or by accelerate's configuration."""
        return self.args.torch_compile or self.accelerator.state.dynamo_plugin.backend != DynamoBackend.NO

    @property
    def is_sharded(self) -> bool:
        """Whether FSDP or DeepSpeed, of any stage, runs the model."""
        return self.is_fsdp_enabled or self.is_deepspeed_enabled

    @property
    def parameters_are_sharded(self) -> bool:
        """Whether ranks gather parameters together, under FSDP or ZeRO-3."""
        zero = self.accelerator.state.deepspeed_plugin if self.is_deepspeed_enabled else None
        return self.is_fsdp_enabled or (zero is not None and zero.zero_stage == 3)

    def _check_ranks(self, inputs: dict) -> None:
        """Raises a `ValueError` on all ranks if parameters are sharded and ranks differ in the towers that they run.

        Each rank holds a shard of a tower, so that those that run it would wait for the others for ever. The only wait
        for the device that is not that of a step's own, and only where parameters are sharded.
        """
        if not self.parameters_are_sharded:
            return
        own = torch.tensor(self.dual_forward.tower_runs(inputs), device=self.args.device)
        runs = self.accelerator.gather(own[None]).tolist()
        if any(others != runs[0] for others in runs):
            without = [rank for rank, counts in enumerate(runs) if not any(counts)]
            raise ValueError(
                f"At step {self.state.global_step}, ranks differ in the kinds of media of their batches"
                f"{f': ranks {without} have none' if without else ''}. Shards of a vision tower are gathered by all "
                "ranks together. Leave samples without images out (or those of other kinds), sort them into batches of "
                "their own, or use DDP or ZeRO-2."
            )

    def step_in_mode(
        self, mode: str, model, inputs, num_items_in_batch=None, progress: float = 1.0, served=None, repeats=None
    ):
        """Forward and backward of a micro-batch in `mode`, at the fraction `progress` of training.

        Images are encoded inside `served(tower)` if given, and those that are the same by `repeats` once. Returns the
        loss and the counts of [`DualForward.in_mode`].
        """
        # Fast: one pass. Slow: in parts, if a batch sized for fast steps may be too large with all tokens.
        parts, small = (1, True) if mode == FAST else self._slow_parts(model, inputs, num_items_in_batch)
        distil, self._items = self.args.distillation_weight > 0, num_items_in_batch
        restore = self._snapshot()
        while True:
            try:
                # Small passes keep activations instead of recomputing them.
                with (
                    self.selective_checkpointing.left_out(small),
                    self.dual_forward.in_mode(
                        mode,
                        distil=distil,
                        generator=self._step_generator(),
                        parts=parts,
                        progress=progress,
                        served=served,
                        repeats=repeats,
                    ) as done,
                ):
                    losses = []
                    # Each part is one call of the model, whose hooks encode, prune and teach.
                    # Ranks exchange gradients in the last one.
                    with self.accelerator.no_sync(model) if parts > 1 else nullcontext():
                        for _ in range(parts - 1):
                            losses.append(super().training_step(model, inputs, num_items_in_batch))
                    loss = sum(losses, super().training_step(model, inputs, num_items_in_batch))
                break
            except torch.OutOfMemoryError as error:
                # Retry with recomputation, unless that loses gradients of earlier micro-batches or other ranks wait.
                alone = self.accelerator.num_processes == 1 and not (self._micro[1] or self.is_deepspeed_enabled)
                self.selective_checkpointing.retries(error, small, alone)
            except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
                if self.loss_is_its_own:
                    error.add_note(
                        f"{type(self).__name__}.compute_loss gets a DualSpeedOutput while training: `loss` is the "
                        "whole loss, `logits` (M, V) are those of the M supervised positions, already shifted, and "
                        "`targets` (M,) their labels. It holds no hidden states and attentions."
                    )
                raise
            # Outside of `except`, because the error keeps the failed attempt's tensors alive.
            restore()
            model.zero_grad()
            if torch.accelerator.is_available():
                torch.accelerator.empty_cache()
        if not done.reached:
            raise ValueError(
                f"The loss of {type(self).__name__}.compute_loss does not depend on `outputs.loss` of the model, which "
                "holds cross-entropy and distillation, so that nothing would be learned from them. Return "
                "`outputs.loss` or super().compute_loss(...), or add to it what else it should be."
            )
        return loss, done

    def _snapshot(self) -> Callable[[], None]:
        """Returns a function that restores the counters, for the retry of a pass that ran out of memory."""
        return self.mode_losses.snapshot()

    def _slow_parts(self, model, inputs, num_items_in_batch) -> tuple[int, bool]:
        """The number of parts of a slow micro-batch, and whether each is about as small as a fast step's batch."""
        whole = num_items_in_batch is None or not can_be_split(self.dual_forward.interface, inputs)
        rows, length = inputs["input_ids"].shape
        return parts_of(rows, length, self.clock.fast_tokens, self.args.slow_mode_splits, whole)

    def _step_generator(self) -> torch.Generator | None:
        """Random generator for pruners, seeded by seed, step, micro-batch and rank, so a resumed run draws the same.

        Tensor parallel ranks receive the same batch, of which all have to keep the same tokens.
        """
        if self._pruner.deterministic:
            return None
        seed = hash((self.args.seed, *self._micro, self.args.process_index // self.get_tp_size())) % 2**63
        return torch.Generator(self.args.device).manual_seed(seed)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The `loss` of the model's output, which [`loss_in_mode`] makes; the plain loss outside of training."""
        if self.dual_forward.mode in (None, EVALUATION):
            return self.plain_loss(model, inputs, return_outputs)
        if num_items_in_batch is not None:  # otherwise those of the step, which a subclass may not have passed on
            self._items = num_items_in_batch
        # The hooks of `DualForward` run the mode: pruned view (fast), or teacher and all tokens (slow).
        outputs = model(**inputs)
        return (outputs.loss, outputs) if return_outputs else outputs.loss

    def loss_in_mode(self, outputs: DualSpeedOutput) -> torch.Tensor:
        """Cross-entropy, auxiliary losses, and in slow steps the distillation, scaled as the Trainer expects it. In
        evaluation, the mean cross-entropy."""
        mode, smoothing, items = self.dual_forward.mode, self.args.label_smoothing_factor, self._items
        # Logged once for a batch, however often a loss calls the model.
        logged = ModeLosses() if outputs.again else self.mode_losses
        # Both modes: cross-entropy of logits (M, V) against targets (M,) at the supervised positions.
        logits, teacher = outputs.logits, outputs.teacher_logits
        entropy = self.dual_forward.cross_entropy(logits, outputs.targets, smoothing, outputs.hidden)
        if mode == EVALUATION:
            return entropy / len(outputs.targets)
        entropy = entropy / divisor(items, logits)
        logged.add(f"{mode}_loss", entropy)
        loss = entropy + outputs.loss  # a zero that connects other parameters

        # Slow steps: KL(teacher || student). The pruned view teaches the full one at the same M positions.
        if teacher is not None:
            temperature, sliced = self.args.distillation_temperature, not self.dual_forward.plain
            divergence = self_distillation_loss(logits, teacher, temperature, items, sliced=sliced)
            logged.add("distillation_loss", divergence)
            if self.adaptive_schedule is not None:
                pruned = self.dual_forward.cross_entropy(teacher, outputs.targets, smoothing)
                logged.add("pruned_loss", pruned / divisor(items, logits))
            loss = loss + self.args.distillation_weight * divergence

        self.loss_is_scaled_for_ga = items is not None
        if items is not None and self.args.average_tokens_across_devices:
            # Items are counted over all ranks and DDP averages over them, which divides by the ranks twice: undo one.
            loss = loss * self.loss_shares

        # The auxiliary loss of a learned pruner (fast steps) and that of a mixture of experts, means over this
        # micro-batch.
        for name, auxiliary in (("pruner_loss", outputs.auxiliary_loss), ("router_loss", outputs.router_loss)):
            if auxiliary is not None:
                micro_batches = self.current_gradient_accumulation_steps
                logged.add(name, auxiliary / (micro_batches * self.loss_shares))
                loss = loss + auxiliary / (micro_batches if self.loss_is_scaled_for_ga else 1)
        return loss

    # --- what is shown --------------------------------------------------------------------------------------------

    def log(self, logs, start_time=None):
        if "loss" in logs:  # a training log, written on every rank at the same step
            logs.update(self.mode_losses.pop(self.accelerator, self.clock.window(), self.loss_shares))
            # Read after the losses, for which the host has waited.
            recent, whole = self.longest_data_wait()
            logs["data_wait"] = round(recent, 4)
            logs.update(self.pace())
            self.clock.data.logged()
            self.clock.data.hint(recent, whole, self.args.dataloader_num_workers)
            logs.update(self.adaptive_schedule.window() if self.adaptive_schedule is not None else {})
            logs.update(self.feature_cache.window() if self.feature_cache is not None else {})
        super().log(logs, start_time)

    def pace(self) -> dict[str, float]:
        """Seconds of steps by mode, and of the steps left; see [`ModeClock.pace`]."""
        return self.clock.pace(self.steps_left())

    def longest_data_wait(self) -> tuple[float, float]:
        """The shares of [`DataWait.shares`] in the processes that wait longest. Call it in all of them."""
        shares = self.clock.data.shares()
        if self.accelerator.num_processes > 1:
            every = self.accelerator.gather(torch.tensor([shares], device=self.args.device))
            shares = tuple(every.amax(0).tolist())
        self.clock.data_wait = shares[1]
        return shares

    def _reduced(self, shares: torch.Tensor) -> torch.Tensor:
        """Mean losses of the step over all ranks."""
        return self.accelerator.reduce(shares, reduction="mean")

    @property
    def loss_shares(self) -> int:
        """Of how many shares, one for each batch of a rank's own, the losses of a step are the sum. Tensor parallel
        ranks receive the same batch. 1 if each rank's losses are means of their own."""
        if not self.args.average_tokens_across_devices:
            return 1
        return self.accelerator.num_processes // self.get_tp_size()

    def summary(self) -> dict:
        """Settings, steps and wall seconds by mode, for the results file and the model card."""
        with self.as_configured():
            pruner = self._pruner.config.to_dict()
        bounds = {} if self.adaptive_schedule is None else {name: getattr(self.args, name) for name in BOUNDS}
        return {
            "pruner": pruner,
            "pruning_ratio": pruner["pruning_ratio"],
            "slow_mode_ratio": self.slow_mode_ratio,
            "mode_schedule": self.args.mode_schedule,
            **bounds,
            "slow_warmup_steps": self.args.slow_warmup_steps,
            "slow_tail_ratio": self.args.slow_tail_ratio,
            "position_ids": self.dual_forward.position_ids,
            "video_budget": self.args.video_budget,
            "proportional_attention": self.args.proportional_attention,
            "isolator_length": self.args.isolator_length,
            "distillation_weight": self.args.distillation_weight,
            "distillation_temperature": self.args.distillation_temperature,
            "steps": dict(self.clock.steps),
            "seconds": {mode: round(seconds, 3) for mode, seconds in self.clock.seconds.items()},
        }


class DualSpeedTrainer(DualSpeedMixin, Trainer):
    """[`~transformers.Trainer`] with fast and slow steps; see [`DualSpeedMixin`]."""
