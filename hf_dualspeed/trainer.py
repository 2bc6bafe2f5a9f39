"""The trainer: fast and slow optimizer steps over `transformers.Trainer`."""

from __future__ import annotations

import logging
import shutil
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel, Trainer, TrainerState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, HubStrategy
from transformers.utils import CONFIG_NAME

from .adapters import check_adapter, load_adapters
from .arguments import Default, DualSpeedArguments, DualSpeedTrainingArguments, check_keys
from .callbacks import ModeClock, ModeLosses
from .data import MaskVisualLabels
from .distillation import self_distillation_loss, supervised_cross_entropy
from .isolator import WEIGHTS_NAME, ModeIsolator, save_isolator, saved_length
from .mode_pass import NAME, ModePass
from .model_card import adopt_published_card, kept_card, write_model_card
from .model_roles import language_parts
from .parameter_views import ParameterViews
from .protocol import check_positions, check_protocol, unwrap, visual_token_ids
from .pruners import AutoPruner, Pruner, available_pruners, pruner_class
from .pruners.base import CONFIG_NAME as PRUNER_CONFIG_NAME
from .pruners.base import WEIGHTS_NAME as PRUNER_WEIGHTS_NAME
from .results import (
    OF_WEIGHTS,
    dataset_name,
    is_hub_id,
    one_line,
    peak_memory,
    read_results,
    run_record,
    without_paths,
    write_results,
)
from .schedule import FAST, ModeSchedule
from .speedup import measure_speedup, set_aside

logger = logging.getLogger(__name__)


class DualSpeedMixin:
    """What DualSpeed adds to a `Trainer`; put it in front of any subclass of [`~transformers.Trainer`].

    Fast steps train on pruned visual tokens behind the mode isolator; slow steps on all of them, with the pruned
    view as teacher. Evaluation and prediction use all tokens and no isolator. Losses are divided by the supervised
    tokens of the whole step, also for models whose plain training averages the means of micro-batches (Qwen2.5-VL).

    Args:
        model: a vision-language model of transformers that takes `mm_encoder_outputs`, PEFT-wrapped or not.
        args (`DualSpeedArguments`): options, such as [`DualSpeedTrainingArguments`].
        pruner (`Pruner`, *optional*): in place of `args.pruner`.
        kwargs: those of the trainer.

    Raises:
        ValueError: the model, the arguments or the first batch cannot be trained this way; the message says why.
    """

    def __init__(
        self,
        model=None,
        args: DualSpeedArguments | None = None,
        *,
        pruner: Pruner | None = None,
        **kwargs,
    ):
        if args is None:
            args = DualSpeedTrainingArguments(output_dir="tmp_trainer")
        if not isinstance(args, DualSpeedArguments):
            raise ValueError(f"`args` must be DualSpeedTrainingArguments, got {type(args).__name__}.")
        if kwargs.get("compute_loss_func") is not None:
            raise ValueError(
                "`compute_loss_func` is not supported: DualSpeed computes cross-entropy and distillation at the "
                "supervised positions itself. Leave it out; `label_smoothing_factor` works."
            )
        self._given_pruner = pruner
        # What the card says beyond what the trainer knows: keys of results.json, set by who has measured them.
        self.facts: dict = {}
        self._begin_record()
        if model is not None:
            self._attach_given(model, args)
        super().__init__(model=model, args=args, **kwargs)
        if self.args.n_gpu > 1:
            raise ValueError(
                f"{self.args.n_gpu} devices in one process mean nn.DataParallel, which DualSpeed does not support. "
                "Start one process per device: accelerate launch train.py."
            )
        check_optimizer(self.optimizer, self.mode_pass)
        if self.is_fsdp_enabled:
            wrap_existing_layers(self.accelerator.state.fsdp_plugin, self.model)
        self.mode_pass.autocast = self.accelerator.autocast
        self.data_collator = MaskVisualLabels(self.data_collator, visual_token_ids(unwrap(self.model).config))
        # The loss is always summed and divided by the items of the whole step, whatever the model would do.
        self.model_accepts_loss_kwargs = True
        self._loss_shifts_labels = True
        self.add_callback(ModeClock())
        self._losses = ModeLosses()
        self.add_callback(self._losses)
        self._micro = (-1, 0)

    # --- set-up ---------------------------------------------------------------------------------------------------

    def _attach_given(self, model: nn.Module, args: DualSpeedArguments) -> None:
        """Attaches to the model as it was given; a trainer that loads or wraps models attaches later instead."""
        self._attach(model, args)

    def _attach(self, model: nn.Module, args: DualSpeedArguments) -> None:
        check_adapter(getattr(model, "active_peft_config", None))
        check_protocol(model)
        check_positions(model, args.position_ids)
        with torch.random.fork_rng(devices=[]):  # what is learnt starts from the seed, and shifts no other draw
            torch.manual_seed(args.seed)
            isolator = ModeIsolator.for_model(unwrap(model), args.isolator_length) if args.isolator_length else None
            self._pruner = resolve_pruner(self._given_pruner, args, model)
        base = Path(getattr(unwrap(model), "name_or_path", "") or "")
        if isolator is not None and (base / WEIGHTS_NAME).is_file():
            isolator.load_pretrained(base)  # learnt since the projector stage
            logger.info("Mode isolator taken from %s.", base)
        self._schedule: ModeSchedule | None = None
        self.mode_pass = ModePass(self._pruner, isolator, args.position_ids, args.video_budget)
        self.mode_pass.attach(model)
        fast_only = [f"{NAME}.*"] if any(p.requires_grad for p in self.mode_pass.parameters()) else []
        self.views = ParameterViews(model, [*fast_only, *args.fast_only_parameters], args.slow_only_parameters)
        self.mode_pass.reserve_adapters(model, self.views.names[FAST])
        self.slow_mode_ratio = args.slow_mode_ratio
        if isinstance(self.slow_mode_ratio, Default) and language_model_is_frozen(model):
            self.slow_mode_ratio = 0.0

    def call_model_init(self, trial=None):
        model = super().call_model_init(trial)
        self._attach(model, self.args)
        self.mode_pass.autocast = self.accelerator.autocast
        return model

    @property
    def clock(self) -> ModeClock:
        """Steps and seconds by mode; looked up, for the Trainer may put a restored one in its place."""
        return next(c for c in self.callback_handler.callbacks if isinstance(c, ModeClock))

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
        return self._schedule.mode_at(step)

    def _planned_steps(self) -> int | None:
        """Optimizer steps of the whole run, asked before it starts; only a slow tail needs them."""
        if self.args.max_steps > 0 or not self.args.slow_tail_ratio:
            return max(self.args.max_steps, 0) or None
        return self.set_initial_training_values(self.args, self.get_train_dataloader())[-1]

    def training_step(self, model, inputs, num_items_in_batch=None):
        """One micro-batch in the mode of the current optimizer step; gradients of the other mode are dropped."""
        step = self.state.global_step
        if self.args.speedup_rounds and self.is_in_train and len(self._aside) <= self.args.speedup_rounds:
            self._aside.append(set_aside(inputs))
        mode = self.mode_at(step)
        loss = self.step_in_mode(mode, step / max(1, self.state.max_steps - 1), model, inputs, num_items_in_batch)
        self.clock.count_visual_tokens(*self.mode_pass.visual_tokens)
        if self.accelerator.sync_gradients:
            self.views.drop_gradients(mode)
        return loss

    def step_in_mode(self, mode: str, progress: float, model, inputs, num_items_in_batch=None):
        """Forward and backward of a micro-batch in `mode`, when the fraction `progress` of training is done."""
        self._pruner.progress = progress
        self.mode_pass.begin(mode, self.args.distillation_weight > 0, self._step_generator())
        try:
            return super().training_step(model, inputs, num_items_in_batch)
        finally:
            self.mode_pass.end()
            self._pruner.progress = 1.0

    def _step_generator(self) -> torch.Generator | None:
        """Randomness of pruners: a function of seed, step, micro-batch and rank, so a resumed run draws the same."""
        if self._pruner.deterministic:
            return None
        step = self.state.global_step
        self._micro = (step, self._micro[1] + 1 if self._micro[0] == step else 0)
        seed = hash((self.args.seed, *self._micro, self.args.process_index)) % 2**63
        return torch.Generator(self.args.device).manual_seed(seed)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Cross-entropy, and in slow steps the distillation; plain outside of training."""
        mode_pass = self.mode_pass
        if mode_pass.mode is None:
            if self.label_smoother is None or "labels" not in inputs:
                return super().compute_loss(model, inputs, return_outputs)
            # The Trainer shifts smoothed labels for the names of plain causal models only.
            outputs = model(**inputs)
            loss = self.label_smoother(outputs, inputs["labels"], shift_labels=True)
            return (loss, outputs) if return_outputs else loss
        outputs = model(**inputs)
        smoothing = self.args.label_smoothing_factor
        entropy = supervised_cross_entropy(outputs.logits, mode_pass.targets, num_items_in_batch, smoothing)
        self._losses.add(f"{mode_pass.mode}_loss", entropy)
        loss = entropy + outputs.loss
        if mode_pass.teacher_logits is not None:
            temperature = self.args.distillation_temperature
            divergence = self_distillation_loss(
                outputs.logits, mode_pass.teacher_logits, temperature, num_items_in_batch
            )
            self._losses.add("distillation_loss", divergence)
            loss = loss + self.args.distillation_weight * divergence
        self.loss_is_scaled_for_ga = num_items_in_batch is not None
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            # The items were counted over all ranks, and DDP averages over them: undo one of the two.
            loss = loss * (self.accelerator.num_processes // self.get_tp_size())
        auxiliary, micro_batches = mode_pass.auxiliary_loss, self.current_gradient_accumulation_steps
        if auxiliary is not None:  # a mean over the images of this micro-batch
            ranks = self.accelerator.num_processes if self.args.average_tokens_across_devices else 1
            self._losses.add("pruner_loss", auxiliary / (micro_batches * ranks))
            loss = loss + auxiliary / (micro_batches if self.loss_is_scaled_for_ga else 1)
        return (loss, outputs) if return_outputs else loss

    # --- what is shown --------------------------------------------------------------------------------------------

    def log(self, logs, start_time=None):
        if "loss" in logs:  # a training log, written on every rank at the same step
            shares = "sum" if self.args.average_tokens_across_devices else "mean"
            logs.update(self._losses.pop(self.accelerator, self.clock.window(), shares))
        super().log(logs, start_time)

    def summary(self) -> dict:
        """Settings, steps and wall seconds by mode, as the results file and the model card show them."""
        return {
            "pruner": self._pruner.config.to_dict(),
            "pruning_ratio": self._pruner.config.pruning_ratio,
            "slow_mode_ratio": self.slow_mode_ratio,
            "mode_schedule": self.args.mode_schedule,
            "slow_warmup_steps": self.args.slow_warmup_steps,
            "slow_tail_ratio": self.args.slow_tail_ratio,
            "position_ids": self.args.position_ids,
            "video_budget": self.args.video_budget,
            "isolator_length": self.args.isolator_length,
            "distillation_weight": self.args.distillation_weight,
            "distillation_temperature": self.args.distillation_temperature,
            "steps": dict(self.clock.steps),
            "seconds": {mode: round(seconds, 3) for mode, seconds in self.clock.seconds.items()},
        }

    # --- what is published of a run -------------------------------------------------------------------------------

    def train(self, resume_from_checkpoint=None, *args, **kwargs):
        self._begin_record()
        if resume_from_checkpoint:
            self._earlier = read_results(self.args.output_dir)
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _begin_record(self) -> None:
        self._aside: list[dict] = []
        self._earlier: dict = {}
        self._speedup: dict | None = None
        self._peak: dict | None = None

    def _finalize_training(self, *args, **kwargs):
        output = super()._finalize_training(*args, **kwargs)
        self.add_up()  # before plain passes, which take more memory
        steps = self.state.global_step - self._initial_global_step
        self._speedup, self._aside = measure_speedup(self, self._aside, steps), []
        if self._speedup is not None:
            logger.info("Speed-up over plain full-token steps: %s.", self._speedup)
        return output

    def add_up(self) -> None:
        """Sums the visual tokens of all processes, and takes the most memory of any. Call it in all of them."""
        clock, peak = self.clock, peak_memory(self.args.device)
        clock.all_visual_tokens = dict(clock.visual_tokens)
        if self.accelerator.num_processes > 1:
            counts = torch.tensor([*clock.visual_tokens.values(), 0], device=self.args.device)
            full, kept, _ = self.accelerator.reduce(counts, "sum").tolist()
            shared = self.get_tp_size()  # tensor parallel ranks are given the same batch
            clock.all_visual_tokens = {"full": full // shared, "kept": kept // shared}
            held = torch.tensor([peak["bytes"] if peak else 0], device=self.args.device)
            peak = peak and {**peak, "bytes": self.accelerator.gather(held).max().item()}
        self._peak = peak

    def record(self, folder: str | Path | None = None) -> dict:
        """What is known of the run so far, as results.json in `folder` holds it and the model card shows it.

        What an earlier part of a resumed run has measured stays, but for what its weights answered. In several
        processes, visual tokens and memory are those of the last checkpoint, or of the end.
        """
        if self.is_in_train and self.accelerator.num_processes == 1:
            self.add_up()
        model = unwrap(self.model)
        results = {"name": Path(folder or self.args.output_dir).resolve().name}
        results |= {key: value for key, value in self._earlier.items() if key not in (*results, *OF_WEIGHTS)}
        known = [dataset_name(self.train_dataset)]
        results |= {"base_model": getattr(model, "name_or_path", "") or None, "datasets": [n for n in known if n]}
        results |= {"eval_dataset": dataset_name(self.eval_dataset)}
        results |= {"adapter": bool(getattr(self.model, "peft_config", None))}
        results |= {"processor": self.processing_class is not None, **self.facts}
        results |= run_record(self.args, self.summary(), self.clock.total_seconds)
        results |= {"progress": progress(self.state), "evaluation": self._evaluated()}
        results |= {"visual_tokens": self.clock.all_visual_tokens if self.clock.all_visual_tokens["full"] else None}
        results |= {"peak_memory": larger(self._peak, self._earlier.get("peak_memory"))}
        results |= {"speedup": self._speedup or self._earlier.get("speedup")}
        results |= {"pruned_in_language_model": self._pruner.in_language_model or None}
        repo_id = self.hub_model_id or self.args.hub_model_id
        on_hub = {
            "repo_id": repo_id if repo_id and "/" in repo_id else None,
            "base_model": results["base_model"] if is_hub_id(results["base_model"]) else None,
            "datasets": [name for name in results["datasets"] if is_hub_id(name)],
        }
        results |= {"hub": {key: value for key, value in on_hub.items() if value}}
        return without_paths({key: value for key, value in results.items() if value is not None})

    def _evaluated(self) -> dict | None:
        """Metrics of the Trainer's evaluation of the weights as they are; None where there was none."""
        state = self.state
        best = self.args.load_best_model_at_end and not self.is_in_train and state.best_global_step
        found = {}
        for entry in state.log_history:
            if entry["step"] == (best or state.global_step):
                found |= {k: v for k, v in entry.items() if k.startswith("eval_") and isinstance(v, (int, float))}
        return found or None

    def write_results(self, folder: str | Path | None = None) -> dict:
        """Writes results.json and, where losses were logged, learning_curve.png to `folder`; returns the results."""
        from .plots import CURVE_NAME, plot_learning_curve  # matplotlib takes its time

        folder = Path(folder or self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        results, history = self.record(folder), self.state.log_history
        if any("fast_loss" in entry or "slow_loss" in entry for entry in history):
            of = f" on {', '.join(results['datasets'])}" if results["datasets"] else ""
            plot_learning_curve(history, folder / CURVE_NAME, f"{results['name']}: training{of}")
            results["learning_curve"] = CURVE_NAME
        write_results(folder, results)
        return results

    def create_model_card(
        self,
        language=None,
        license=None,
        tags=None,
        model_name=None,
        finetuned_from=None,
        tasks=None,
        dataset_tags=None,
        dataset=None,
        dataset_args=None,
    ) -> None:
        """Writes results.json and README.md from what was measured; sections that a person wrote there stay.

        `model_name`, `tasks` and `dataset_args` are not used: the card's name is that of folder or repo, and the rest
        is in the results.
        """
        given = {"language": language, "license": license, "tags": as_list(tags), "base_model": finetuned_from}
        given["datasets"] = list(dict.fromkeys([*as_list(dataset), *as_list(dataset_tags)]))
        self.facts |= {key: value for key, value in given.items() if value}
        if self.is_world_process_zero():
            write_model_card(self.args.output_dir, self.write_results())

    # --- pushing --------------------------------------------------------------------------------------------------

    def init_hf_repo(self, token=None, private=None):
        super().init_hf_repo(token, private)
        if self.is_world_process_zero():
            revision = self.args.hub_revision
            adopt_published_card(self.args.output_dir, self.hub_model_id, revision, token or self.args.hub_token)

    def push_to_hub(self, *args, **kwargs):
        try:
            return super().push_to_hub(*args, **kwargs)
        except Exception as error:
            raise OSError(f"The push to the Hub failed ({one_line(error)}). {self._push_later()}") from error

    def _push_from_checkpoint(self, checkpoint_folder):
        self._report_failed_pushes()
        busy = self.push_in_progress is not None and not self.push_in_progress.is_done()
        ends = self.args.hub_strategy == HubStrategy.END
        if self.is_world_process_zero() and not ends and (self.args.hub_always_push or not busy):
            # The Trainer takes over files that it knows by name, and these are not among them.
            for name in (WEIGHTS_NAME, PRUNER_CONFIG_NAME, PRUNER_WEIGHTS_NAME):
                if (Path(checkpoint_folder) / name).is_file():
                    shutil.copy(Path(checkpoint_folder) / name, self.args.output_dir)
            self.create_model_card()
        super()._push_from_checkpoint(checkpoint_folder)

    def _finish_current_push(self):
        super()._finish_current_push()
        self._report_failed_pushes()

    def _report_failed_pushes(self) -> None:
        """Pushes during training run in the background, where the Trainer lets their errors go unseen."""
        pushing = getattr(self, "push_in_progress", None)
        for job in list(pushing.jobs) if pushing is not None else ():
            if job.done() and not job.cancelled() and job.exception() is not None:
                pushing.jobs.remove(job)
                logger.warning("A push to the Hub failed (%s). %s", one_line(job.exception()), self._push_later())

    def _push_later(self) -> str:
        repo_id = self.hub_model_id or self.args.hub_model_id or "user/repo"
        return (
            f"Nothing on this machine is lost. When training has ended and the model is saved, push it with: "
            f"dualspeed push {self.args.output_dir} {repo_id}"
        )

    # --- saving and resuming --------------------------------------------------------------------------------------

    def _save(self, output_dir=None, state_dict=None):
        # Sharded training hands over the gathered weights, from which saving takes the isolator's out.
        gathered = {k.removeprefix(f"{NAME}."): v for k, v in (state_dict or {}).items() if k.startswith(f"{NAME}.")}
        if state_dict is None and getattr(self.model, "peft_config", None):
            state_dict = self.model.state_dict()
        if state_dict is not None:  # PEFT picks weights by pattern, a learnt pruner's biases among them
            state_dict = {key: value for key, value in state_dict.items() if not key.startswith(f"{NAME}.")}
        with interrupts_deferred(), kept_card(Path(output_dir or self.args.output_dir)):
            super()._save(output_dir, state_dict)
        if self.args.should_save:
            folder = output_dir or self.args.output_dir
            parts = gathered or self.mode_pass.state_dict()
            prefix = "pruner."
            self._pruner.save_pretrained(
                folder, {k.removeprefix(prefix): v for k, v in parts.items() if k.startswith(prefix)}
            )
            if self.args.isolator_length:
                save_isolator(parts["isolator.prompt"], folder)
            if self.state.global_step and not Path(folder).name.startswith(PREFIX_CHECKPOINT_DIR):
                self.write_results(folder)

    def _save_checkpoint(self, model, trial):
        self.add_up()
        with interrupts_deferred():
            super()._save_checkpoint(model, trial)

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        check_isolator(resume_from_checkpoint, self.args.isolator_length)
        if not (self._load_plain(resume_from_checkpoint) or self._load_adapters(resume_from_checkpoint)):
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        self._load_fast_view(resume_from_checkpoint)

    def _load_best_model(self):
        best = self.state.best_model_checkpoint
        if not (self._load_plain(best) or self._load_adapters(best)):
            super()._load_best_model()
        self._load_fast_view(best)

    def _load_plain(self, folder) -> bool:
        """Loads a full checkpoint that `save_pretrained` wrote; False for adapters, FSDP and DeepSpeed.

        `save_pretrained` writes the published names of the weights, which for most vision-language models differ
        from those of the modules. The Trainer of transformers 5.23 reads them back by module name with
        `strict=False` and so loads nothing; `from_pretrained` knows both.
        """
        model = self.accelerator.unwrap_model(self.model)
        sharded = self.is_fsdp_enabled or self.is_deepspeed_enabled
        if sharded or not isinstance(model, PreTrainedModel) or not (Path(folder) / CONFIG_NAME).is_file():
            return False
        weights = type(model).from_pretrained(folder, dtype="auto").state_dict()
        model.load_state_dict(weights, strict=False)
        return True

    def _load_adapters(self, folder) -> bool:
        """Loads the PEFT adapters of a checkpoint; False for whole models, FSDP and DeepSpeed."""
        sharded = self.is_fsdp_enabled or self.is_deepspeed_enabled
        return not sharded and load_adapters(self.accelerator.unwrap_model(self.model), folder)

    def _load_fast_view(self, folder) -> None:
        # Sharded checkpoints hold isolator and pruner among the model's own weights.
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            return
        if self.args.isolator_length:
            self.mode_pass.isolator.load_pretrained(folder)
        self._pruner.load_weights(folder)


def progress(state: TrainerState) -> dict | None:
    """The optimizer step of a run that has not reached its last one."""
    return {"step": state.global_step, "of": state.max_steps} if state.global_step < state.max_steps else None


def larger(peak: dict | None, other: dict | None) -> dict | None:
    """The larger of two peaks of memory of one kind."""
    comparable = peak and other and peak["of"] == other["of"]
    return max(peak, other, key=lambda measured: measured["bytes"]) if comparable else peak or other


def as_list(value: str | list[str] | None) -> list[str]:
    """One name, several or none as a list."""
    return [value] if isinstance(value, str) else list(value or ())


class DualSpeedTrainer(DualSpeedMixin, Trainer):
    """[`~transformers.Trainer`] with fast and slow steps; see [`DualSpeedMixin`]."""


def resolve_pruner(pruner: Pruner | None, args: DualSpeedArguments, model: nn.Module) -> Pruner:
    """The pruner to train with: an object, or by `args.pruner` a registered name, a folder or a Hub repo.

    `args.pruning_ratio` wins where set. A pruner built by name whose config has a `hidden_size`, as a learnt one does,
    gets the model's.
    """
    if pruner is None:
        if args.pruner in available_pruners():
            settings = {"pruning_ratio": float(args.pruning_ratio), **(args.pruner_kwargs or {})}
            known = [f.name for f in fields(pruner_class(args.pruner).config_class)]
            check_keys("pruner_kwargs", settings, known)
            if "hidden_size" in known:
                settings["hidden_size"] = unwrap(model).config.get_text_config().hidden_size
            return AutoPruner.from_name(args.pruner, **settings)
        pruner = AutoPruner.from_pretrained(args.pruner, revision=args.pruner_revision, token=args.hub_token)
    given = dict(args.pruner_kwargs or {})
    if not isinstance(args.pruning_ratio, Default):
        given["pruning_ratio"] = args.pruning_ratio
    check_keys("pruner_kwargs", given, [f.name for f in fields(pruner.config)])
    pruner.config = replace(pruner.config, **given)
    return pruner


def language_model_is_frozen(model: nn.Module) -> bool:
    """Whether no parameter of the language model (adapters included) or its head is trainable."""
    return not any(p.requires_grad for part in language_parts(unwrap(model)) for p in part.parameters())


def check_optimizer(optimizer: torch.optim.Optimizer | None, mode_pass: ModePass) -> None:
    """Raises a `ValueError` where an optimizer made beforehand lacks the isolator or a learnt pruner."""
    if optimizer is None:
        return
    known = {id(p) for group in optimizer.param_groups for p in group["params"]}
    missing = [name for name, p in mode_pass.named_parameters() if p.requires_grad and id(p) not in known]
    if missing:
        raise ValueError(
            f"`optimizers` was made before the fast view's parameters and lacks {', '.join(missing)}. Pass "
            "optimizer_cls_and_kwargs instead, or set isolator_length=0."
        )


def wrap_existing_layers(plugin, model: nn.Module) -> None:
    """Names the layers that FSDP wraps: those of the model's `_no_split_modules` that it really has.

    accelerate 1.15 wraps all of them and fails where one does not occur, as CLIP's text embeddings in LLaVA.
    """
    if plugin.transformer_cls_names_to_wrap:
        return
    present = {type(module).__name__ for module in model.modules()}
    named = getattr(unwrap(model), "_no_split_modules", None) or ()
    plugin.transformer_cls_names_to_wrap = sorted(present.intersection(named)) or None


def check_isolator(folder: str | Path, length: int) -> None:
    """Raises a `ValueError` where `folder` holds an isolator of another length than `length`, or none."""
    saved = saved_length(folder)
    if saved is None and not (Path(folder) / "pruner_config.json").is_file():
        return  # not written by `save_model`: sharded, or no checkpoint at all, which the Trainer says
    if (saved or 0) != length:
        raise ValueError(
            f"`isolator_length` is {length}, but the checkpoint {str(folder)!r} was trained with {saved or 0}. "
            f"Set isolator_length={saved or 0} to resume it."
        )


@contextmanager
def interrupts_deferred() -> Iterator[None]:
    """Holds Ctrl-C back until the body is done, so that no half-written checkpoint is left behind."""
    before = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or getattr(before, "defers", False):
        yield
        return
    caught = []

    def hold(*event):
        caught.append(event)

    hold.defers = True
    signal.signal(signal.SIGINT, hold)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if caught:
        raise KeyboardInterrupt
