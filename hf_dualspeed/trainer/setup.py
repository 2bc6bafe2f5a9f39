"""What a trainer chooses and checks before its first step."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields
from functools import partial
from pathlib import Path

import torch
from torch import nn
from transformers import TrainerCallback
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import is_accelerate_available

from ..models.components import language_parts
from ..models.interface import ModelInterface, foreign_module
from ..pruners import AutoPruner, Pruner, available_pruners, pruner_class
from ..pruners.registry import check_name
from ..pruning.encoding import IN_TOWER
from ..utils.validation import check_keys, shortened
from .checkpoints import in_shards
from .dual_forward import DualForward
from .training_args import Chosen, Default, DualSpeedArguments

logger = logging.getLogger(__name__)

# The first accelerate whose whole checkpoints of FSDP2 hold all that is trained beside adapters.
KEEPS_ALL_TRAINED = "1.15.0"
# Options that are followed where the trainer attaches to the model, and never again.
AT_CONSTRUCTION = (
    "pruner",
    "pruner_revision",
    "pruner_kwargs",
    "pruning_ratio",
    "isolator_length",
    "position_ids",
    "video_budget",
    "proportional_attention",
    "padding_free",
    "supervised_logits_only",
    "fast_length_multiple",
    "fast_mode_checkpointing",
    "fused_head_loss",
    "vision_feature_cache",
    "vision_feature_cache_gib",
    "compile_regions",
    "plain_path",
    "fast_only_parameters",
    "slow_only_parameters",
)


PLAIN = (str, bytes, bool, int, float)
# Arguments that the Trainer takes as they are: how an error names what is allowed, and whether a value is that.
GIVEN = {
    "processing_class": ("a processor or tokenizer", lambda value: not isinstance(value, PLAIN)),
    "train_dataset": ("a data set", lambda value: not isinstance(value, PLAIN)),
    "eval_dataset": ("a data set, or several by name", lambda value: not isinstance(value, PLAIN)),
    "data_collator": ("a function of a list of samples", callable),
    "model_init": ("a function that makes a model", callable),
    "compute_metrics": ("a function of predictions", callable),
    "callbacks": (
        "a list of TrainerCallback",
        lambda value: isinstance(value, (list, tuple)) and all(map(is_callback, value)),
    ),
    "optimizers": (
        "a pair of optimizer and scheduler",
        lambda value: isinstance(value, (list, tuple)) and len(value) == 2,
    ),
}


def is_callback(value: object) -> bool:
    return issubclass(value if isinstance(value, type) else type(value), TrainerCallback)


def check_given(arguments: Mapping[str, object]) -> None:
    """Raises a `ValueError` that names the first of a trainer's arguments that is of another type than it takes."""
    for name, (allowed, fits) in GIVEN.items():
        value = arguments.get(name)
        if value is not None and not fits(value):
            raise ValueError(f"`{name}` must be {allowed}, got {shortened(value)}.")


def resolve_pruner(pruner: Pruner | None, args: DualSpeedArguments, interface: ModelInterface) -> Pruner:
    """The pruner to train with: the given object, or `args.pruner` as a registered name, a folder or a Hub repo.

    `args.pruning_ratio` wins over the ratio of a saved pruner if it is set. A pruner built by name whose config has a
    `hidden_size`, such as a learned one, gets the model's.

    Raises:
        ValueError: an option would not be followed, or the pruner takes none of its name or value.
    """
    ratio = (args.pruner_kwargs or {}).get("pruning_ratio", args.pruning_ratio)
    if ratio != args.pruning_ratio and not isinstance(args.pruning_ratio, Default):
        raise ValueError(
            f"`pruning_ratio` is {args.pruning_ratio}, but `pruner_kwargs` has {ratio!r} for it. Leave it out there."
        )
    if args.pruner_revision is not None:
        of_repo = pruner is None and args.pruner not in available_pruners() and not Path(args.pruner).is_dir()
        if not of_repo:
            given = repr(args.pruner) if pruner is None else f"a {type(pruner).__name__} already"
            raise ValueError(
                f"`pruner_revision` is {args.pruner_revision!r}, but `pruner` is {given}, which is not read from a Hub "
                "repo. Leave it out, or name a repo 'user/name'."
            )
    if pruner is None:
        if args.pruner in available_pruners():
            settings = {"pruning_ratio": float(args.pruning_ratio), **(args.pruner_kwargs or {})}
            known = [f.name for f in fields(pruner_class(args.pruner).config_class)]
            check_keys("pruner_kwargs", settings, known)
            if "hidden_size" in known and "hidden_size" not in settings:
                settings["hidden_size"] = interface.text_config.hidden_size
            return AutoPruner.from_name(args.pruner, **settings)
        pruner = AutoPruner.from_pretrained(args.pruner, revision=args.pruner_revision, token=args.hub_token)
    check_name(type(pruner), pruner.config.pruner_type)
    given = dict(args.pruner_kwargs or {})
    if not isinstance(args.pruning_ratio, Default):
        given["pruning_ratio"] = args.pruning_ratio
    check_keys("pruner_kwargs", given, [f.name for f in fields(pruner.config)])
    if given:
        pruner.reconfigure(**given)
    return pruner


def check_wrapper(model: nn.Module) -> None:
    """Raises a `ValueError` for a model in a wrapper that passes in two modes cannot go through."""
    if not isinstance(model, nn.Module):
        raise ValueError(
            f"`model` must be a module, got {shortened(model)}. Load it by AutoModelForImageTextToText.from_pretrained."
        )
    if isinstance(model, nn.DataParallel):
        raise ValueError(
            "`model` is an nn.DataParallel, which DualSpeed does not support. Pass the model inside it "
            "(model.module), and start one process per device: accelerate launch train.py."
        )
    if type(model).__name__ == "PeftMixedModel":
        raise ValueError(
            "`model` is a PeftMixedModel, whose adapters PEFT itself cannot save. Use get_peft_model(..., "
            "mixed=False), with adapters of one kind."
        )
    if hasattr(model, "_orig_mod") or getattr(model, "_compiled_call_impl", None) is not None:
        raise ValueError(
            "`model` has been compiled as a whole, so that its passes can no longer be pruned. Pass the model from "
            "before torch.compile; to compile its layers, use layer.compile() on each of them."
        )


def check_head(interface: ModelInterface) -> None:
    """Raises a `ValueError` for a model without a head."""
    if "labels" not in interface.forward.names:
        raise ValueError(
            f"{interface.name} computes no loss: its forward takes no `labels`, because it has no head. Load the whole "
            "model, for example with AutoModelForImageTextToText.from_pretrained(...)."
        )


def slow_ratio(args: DualSpeedArguments, interface: ModelInterface) -> float:
    """The slow ratio. All steps are fast in projector-only training, unless the user set the ratio."""
    frozen = isinstance(args.slow_mode_ratio, Default) and language_model_is_frozen(interface)
    return 0.0 if frozen else args.slow_mode_ratio


def language_model_is_frozen(interface: ModelInterface) -> bool:
    """Whether no parameter of the language model (adapters included) or its head is trainable."""
    return not any(p.requires_grad for part in language_parts(interface.outer) for p in part.parameters())


def check_trained(model: nn.Module, dual_forward: DualForward) -> None:
    """Raises a `ValueError` if nothing is trained but the isolator, which no answer is made of."""
    ours = {id(p) for p in dual_forward.parameters()}
    trained = any(p.requires_grad and id(p) not in ours for p in model.parameters())
    if not trained and not any(p.requires_grad for p in dual_forward.pruner.parameters()):
        raise ValueError(
            "All parameters of the model are frozen, so that nothing would be trained but the isolator. Unfreeze what "
            "is to learn; adapters that are read by PeftModel.from_pretrained need is_trainable=True."
        )


def check_optimizer(optimizer: torch.optim.Optimizer | None, dual_forward: DualForward) -> None:
    """Raises a `ValueError` if an optimizer that was made earlier lacks the isolator or a learned pruner."""
    if optimizer is None:
        return
    known = {id(p) for group in optimizer.param_groups for p in group["params"]}
    missing = [name for name, p in dual_forward.named_parameters() if p.requires_grad and id(p) not in known]
    if missing:
        raise ValueError(
            f"The optimizer lacks {', '.join(missing)}, parameters of the fast view: `optimizers` was made before "
            "them, or `create_optimizer` leaves them out. Pass optimizer_cls_and_kwargs instead, take all of "
            "trainer.model.parameters(), or set isolator_length=0 and choose a pruner that is not learned."
        )


def steps_in_backward(args: DualSpeedArguments) -> bool:
    """Whether the optimizer updates parameters inside backward."""
    return str(getattr(args.optim, "value", args.optim)).endswith(("lomo", "layerwise"))


def check_optim(args: DualSpeedArguments, own: Iterable[str]) -> None:
    """Raises a `ValueError` for an optimizer that updates parameters inside backward, if modes differ in what they
    update, which is `own` of one of them, or a step may have several backward passes."""
    if not steps_in_backward(args):
        return
    one, reason = next(iter(own), None), None
    if one is not None:
        reason = (
            f"so parameters of one mode, such as {one}, would move in steps of the other. Choose another, or train "
            "without them: isolator_length=0, a pruner that is not learned, no fast_only_parameters or "
            "slow_only_parameters."
        )
    elif args.slow_mode_splits != 1 or isinstance(args.per_device_train_batch_size, Chosen):
        reason = (
            "so each part of a slow batch would be a step of its own. Choose another, or set slow_mode_splits=1 and a "
            "number for per_device_train_batch_size."
        )
    if reason is not None:
        name = str(getattr(args.optim, "value", args.optim))
        raise ValueError(f"`optim` is {name!r}, which updates parameters inside backward, {reason}")


def check_unchanged(args: DualSpeedArguments, attached: dict) -> None:
    """Raises a `ValueError` if options that only a new trainer follows are not what they were when it was made."""
    for name, before in attached.items():
        now = getattr(args, name)
        if now != before:
            raise ValueError(
                f"`{name}` was {before!r} when the trainer was made, and is {now!r} now, which it would not follow. "
                "Set it ahead of that, or make a new trainer of the same model."
            )


def check_loss_func(given: Callable | None) -> None:
    """Raises a `ValueError` for a `compute_loss_func`."""
    if given is not None:
        raise ValueError(
            "`compute_loss_func` is not supported: DualSpeed computes cross-entropy and distillation at the "
            "supervised positions itself. Leave it out; `label_smoothing_factor` works."
        )


def check_losses(kind: type, ours: type, known: tuple[type, ...]) -> None:
    """Raises a `ValueError` if a class behind `ours` in the method resolution order of `kind` has a loss of its own,
    which would never be called; `known` ones may, unless a script has put another in its place."""
    behind = kind.__mro__[kind.__mro__.index(ours) + 1 :]
    foreign = {c: foreign_module(c, "compute_loss") for c in behind if "compute_loss" in vars(c)}
    other = next((c for c in foreign if c not in known or foreign[c]), None)
    if other is not None:
        replaced = f" (now that of {foreign[other]})" if foreign[other] else ""
        raise ValueError(
            f"{kind.__name__} puts DualSpeed in front of {other.__name__}, whose `compute_loss`{replaced} would never "
            "be called: DualSpeed computes cross-entropy and distillation itself. For a loss beside them, derive from "
            "DualSpeedTrainer and add to what super().compute_loss(...) returns; other losses, such as preference "
            "losses, are not supported."
        )


def check_router_loss(interface: ModelInterface, pruner: Pruner) -> None:
    """Raises a `ValueError` for a loss over the experts of all layers if layers differ in their tokens."""
    if pruner.in_language_model and interface.asks_for_router_logits:
        raise ValueError(
            f"The pruner {pruner.config.pruner_type!r} drops tokens between layers, but the model's config has "
            "output_router_logits=True, whose loss needs the same tokens in each layer. Set it to False "
            "(router_aux_loss_coef=0.0 with DualSpeedSFTTrainer), or choose a pruner that works ahead of the language "
            "model."
        )


def check_ddp(args: DualSpeedArguments, model: nn.Module) -> None:
    """Warns of options of DDP that are not followed, and raises a `ValueError` for those that cannot work, the model's
    own checkpointing among them."""
    passes = "passes of DualSpeed differ in the parameters that they use, between modes, batches and ranks"
    if args.ddp_find_unused_parameters is False:
        logger.warning("ddp_find_unused_parameters=False is taken as True, because %s.", passes)
    if args.ddp_static_graph:
        raise ValueError(f"`ddp_static_graph` is True, but {passes}. Leave it out.")
    unseen = f"but {passes}, and DDP cannot see what is used inside reentrant checkpoints."
    if args.activation_checkpointing:  # the Trainer turns it on anew
        given = args.activation_checkpointing_kwargs or {}
        of_torch = given.keys() - {"every_n_layers", "offload"}  # without any, transformers asks for False
        if of_torch and given.get("use_reentrant") is not False:
            has = "use_reentrant=True" if "use_reentrant" in given else "no use_reentrant, which torch takes for True"
            raise ValueError(f"`activation_checkpointing_kwargs` has {has}, {unseen} Set it to False.")
    elif is_reentrant(model):
        raise ValueError(
            "The model's own activation checkpointing is reentrant, as PEFT's prepare_model_for_kbit_training makes "
            f"it, {unseen} Set activation_checkpointing=True in the arguments, or pass "
            "gradient_checkpointing_kwargs={'use_reentrant': False} where you turn it on."
        )


def is_reentrant(model: nn.Module) -> bool:
    """Whether layers of a model recompute activations in torch's reentrant way, which is its default."""
    layers = (part for part in model.modules() if getattr(part, "gradient_checkpointing", False))
    calls = (getattr(layer, "_gradient_checkpointing_func", None) for layer in layers)
    return any(call.keywords.get("use_reentrant") is not False for call in calls if isinstance(call, partial))


def check_compiled(args: DualSpeedArguments, pruner: Pruner) -> None:
    """Raises a `ValueError` for what does not go with a model that is compiled as a whole."""
    by = "`torch_compile`" if args.torch_compile else "accelerate's configuration (`dynamo_config`)"
    reason = None
    if pruner.in_language_model or pruner.needs & IN_TOWER:
        reason = (
            f"the pruner {pruner.config.pruner_type!r} reads the attention of layers, which compiled ones do not show. "
            "Leave it out, or choose a pruner that reads none, such as 'divprune'."
        )
    elif args.compile_regions is not None:
        reason = f"`compile_regions` is {args.compile_regions!r}, which compiles each layer by itself. Set one of them."
    if reason is not None:
        raise ValueError(f"The model is compiled as a whole by {by}, but {reason}")


def compile_regions(interface: ModelInterface, pruner: Pruner, backend: str) -> None:
    """Compiles the layers of the language model and the towers in place, each by itself, by a `backend`.

    Names of weights, hooks and checkpoints stay as they are. Layers of equal class and shapes share what is compiled.

    Raises:
        ValueError: the pruner works between the layers.
    """
    if pruner.in_language_model:
        raise ValueError(
            f"`compile_regions` is {backend!r}, but the pruner {pruner.config.pruner_type!r} works between the layers "
            "and reads their attention, which compiled ones do not show. Set compile_regions=None, or choose a pruner "
            "that works ahead of the language model."
        )
    left_out = set()
    if pruner.needs & IN_TOWER:
        left_out = {part for tower in interface.towers().values() for part in tower.modules()}
    layers = [part for part in interface.outer.modules() if isinstance(part, GradientCheckpointingLayer)]
    for layer in layers:
        if layer not in left_out:
            layer.compile(backend=backend)


def check_fsdp(plugin) -> None:
    """Raises a `ValueError` for FSDP of version 1."""
    if plugin.fsdp_version != 2:
        raise ValueError(
            f"FSDP is of version {plugin.fsdp_version}, whose shards DualSpeed does not know. Set `fsdp_version: 2` in "
            "accelerate's configuration, which means 1 where it says nothing (trainer_configs/accelerate/fsdp2.yaml is "
            "one), or leave `version` out of `fsdp_config`."
        )


def check_shards(plugin, model: nn.Module, dual_forward: DualForward) -> None:
    """Raises a `ValueError` if FSDP's checkpoints would lack the fast view: of a model with adapters, accelerate keeps
    these alone where checkpoints are shards, and before 1.15 in whole ones, too, which hold all that is trained now."""
    trained = any(parameter.requires_grad for parameter in dual_forward.parameters())
    whole = not in_shards(plugin) and is_accelerate_available(KEEPS_ALL_TRAINED)
    if hasattr(model, "get_base_model") and trained and not whole:
        raise ValueError(
            "FSDP's checkpoints would hold the adapters alone, so that isolator and learned pruner would be lost where "
            "training is resumed. Set `fsdp_state_dict_type: FULL_STATE_DICT` in accelerate's configuration, not "
            f"SHARDED_STATE_DICT, with accelerate {KEEPS_ALL_TRAINED} or newer: with adapters, such a checkpoint holds "
            "what is trained and no more."
        )


def check_loading(sharded: bool, tensor_parallel: int, processes: int) -> None:
    """Raises a `ValueError` for a model that transformers has `sharded` as it was loaded over more of the `processes`
    than share its batches: those with other batches run, and wait for, other layers."""
    if sharded and tensor_parallel < processes:
        raise ValueError(
            "The model was sharded as it was loaded (`distributed_config`), which DualSpeed supports for tensor "
            f"parallelism alone: that of {tensor_parallel} of {processes} processes. Load it whole, and let accelerate "
            "shard it, by FSDP2 (trainer_configs/accelerate/fsdp2.yaml) or DeepSpeed."
        )


def check_whole_samples(processes: int) -> None:
    """Raises a `ValueError` if so many processes share each sample."""
    if processes > 1:
        raise ValueError(
            f"By `parallelism_config`, {processes} processes share each sample (cp_size, sp_size), so that none has a "
            "whole image to prune. Leave it out: FSDP2 and DeepSpeed share the model instead."
        )


def wrap_existing_layers(plugin, interface: ModelInterface) -> None:
    """Sets the layers that FSDP wraps to those of `_no_split_modules` that the model has.

    accelerate 1.15 wraps all of them, and fails if one is missing, such as CLIP's text embeddings in LLaVA.
    """
    if plugin.transformer_cls_names_to_wrap:
        return
    present = {type(module).__name__ for module in interface.outer.modules()}
    named = getattr(interface.outer, "_no_split_modules", None) or ()
    plugin.transformer_cls_names_to_wrap = sorted(present.intersection(named)) or None
