"""Finds the parameters of a model's vision tower, projector and language model."""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel

from ..utils.validation import checked

# Names in transformers' models: the projector is the only role without an accessor.
PROJECTOR_NAMES = (
    "multi_modal_projector",
    "connector",
    "merger",
    "deepstack_merger_list",
    "mm_projector",
    "aligner",
    "embed_vision",
    "vision_projection",
    "language_projection",
    "modality_projection",
    "projector",
    "patch_merger",
    "resampler_model",
    "visual_embeddings_table",
    "layerwise_projectors",
    "spatial_projectors",
)


@checked
def freeze_roles(
    model: nn.Module,
    *,
    train_vision_tower: bool = False,
    train_projector: bool = True,
    train_language_model: bool = True,
) -> None:
    """Freezes the roles that are not to be trained, adapters inside them included. Unfreezes nothing.

    Args:
        model ([`~transformers.PreTrainedModel`]): the model, without a PEFT wrapper.
        train_vision_tower (`bool`): whether to leave the vision tower as it is.
        train_projector (`bool`): whether to leave the projector, and parameters without a role, as they are.
        train_language_model (`bool`): whether to leave the language model, with its head, as it is.

    Raises:
        ValueError: a role is to be frozen, but the model has no module for one of the roles, or is none of
            transformers.
    """
    if train_vision_tower and train_projector and train_language_model:
        return
    train = {"vision_tower": train_vision_tower, "language_model": train_language_model}
    for name, role in parameter_roles(model).items():
        if not train.get(role, train_projector):
            model.get_parameter(name).requires_grad_(False)


def parameter_roles(model: PreTrainedModel) -> dict[str, str]:
    """The role of each parameter by its name: `"vision_tower"`, `"projector"` or `"language_model"`."""
    modules = role_modules(model)
    # The projector comes last and wins, because it may lie inside the vision tower (Qwen's merger).
    owner = {
        id(parameter): role
        for role in ("language_model", "vision_tower", "projector")
        for module in modules[role]
        for parameter in module.parameters()
    }
    # Other parameters join the modalities (LLaVA-NeXT's image_newline, a Q-Former) and count as projector.
    return {name: owner.get(id(parameter), "projector") for name, parameter in model.named_parameters()}


def language_parts(model: PreTrainedModel) -> list[nn.Module]:
    """The language model and its head, for a model without a PEFT wrapper."""
    return [part for part in (model.get_decoder(), model.get_output_embeddings()) if part is not None]


def role_modules(model: PreTrainedModel) -> dict[str, list[nn.Module]]:
    """The modules of each role, found by transformers' accessors and by the names of its projectors."""
    if not hasattr(model, "get_decoder"):
        raise ValueError(f"`model` must be a vision-language model of transformers, got a {type(model).__name__}.")
    decoder = model.get_decoder()
    # transformers returns the model itself if it finds nothing.
    whole = (model, model.base_model)
    towers = [model.get_encoder(modality=modality) for modality in ("image", "video", "audio")]
    modules = {
        "vision_tower": [tower for tower in towers if tower not in whole],
        "projector": [m for name, m in model.named_modules() if name.rpartition(".")[2] in PROJECTOR_NAMES],
        "language_model": [] if decoder in whole else language_parts(model),
    }
    for role, found in modules.items():
        if not found:
            raise ValueError(
                f"{type(model).__name__} has no module that is known to be its {role}, so roles cannot be "
                "frozen. Set `train_vision_tower`, `train_projector` and `train_language_model` to True, and "
                "freeze parameters yourself before you pass the model to DualSpeedTrainer."
            )
    return modules


def parameter_counts(model: PreTrainedModel, fast_view: nn.Module) -> dict[str, dict[str, int]]:
    """Trained and frozen parameters of each role, and the bytes that they take.

    Roles are those of [`parameter_roles`], or `"model"` where they are not known, and `"fast_view"`, the isolator and
    a learned pruner. Weights of 4 bits count as they were before they were packed, and shards as the whole.
    """
    try:
        roles = parameter_roles(model)
    except ValueError:
        roles = {}
    ours = {id(parameter) for parameter in fast_view.parameters()}
    of = [(roles.get(name, "model"), p) for name, p in model.named_parameters() if id(p) not in ours]
    of += [("fast_view", parameter) for parameter in fast_view.parameters()]
    found: dict[str, dict[str, int]] = {}
    for role, parameter in of:
        counts = found.setdefault(role, {"trained": 0, "frozen": 0, "bytes": 0})
        held = getattr(parameter, "ds_numel", parameter.numel())  # ZeRO-3 leaves an empty parameter
        counts["bytes"] += held * parameter.element_size()
        packed = 2 * parameter.element_size() if type(parameter).__name__ == "Params4bit" else 1
        counts["trained" if parameter.requires_grad else "frozen"] += held * packed
    return found
