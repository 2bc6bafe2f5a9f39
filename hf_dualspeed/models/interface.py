"""What a model says about itself: its modalities, their encoders and their placeholders.

transformers' protocol: `get_image_features` and similar methods encode, `forward(mm_encoder_outputs=...)` takes the
result in place of pixels. `families.py` describes single families that need more.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, partial

from torch import nn

from .families import family_of


@dataclass(frozen=True)
class Modality:
    """The names of one modality.

    Args:
        name (`str`): its key in `mm_encoder_outputs`.
        method (`str`): the model's encoder.
        tokens (`tuple[str, ...]`): names of its placeholder id in configs.
        raw (`tuple[str, ...]`): names of the inputs that the encoder turns into tokens.
    """

    name: str
    method: str
    tokens: tuple[str, ...]
    raw: tuple[str, ...]


MODALITIES = (
    Modality(
        "image",
        "get_image_features",
        ("image_token_id", "image_token_index"),
        ("pixel_values", "pixel_values_images", "image_patches"),
    ),
    Modality("video", "get_video_features", ("video_token_id", "video_token_index"), ("pixel_values_videos",)),
    Modality(
        "audio",
        "get_audio_features",
        ("audio_token_id", "audio_token_index"),
        ("input_features", "input_values", "audio_input_ids"),
    ),
)
RAW_KEYS = tuple(key for modality in MODALITIES for key in modality.raw)


def unwrap(model: nn.Module) -> nn.Module:
    """The transformers model inside the wrappers of PEFT and distributed training."""
    while True:
        if hasattr(model, "get_base_model"):
            model = model.get_base_model()
        elif isinstance(model, nn.parallel.DistributedDataParallel) or hasattr(model, "_orig_mod"):
            model = model.module if hasattr(model, "module") else model._orig_mod
        else:
            return model


def argument_names(method: Callable) -> tuple[str, ...]:
    """The named arguments of a method, read once per class."""
    given, function = 0, method
    if isinstance(method, partial):
        given, function = len(method.args), method.func
    elif inspect.ismethod(method):
        given, function = 1, method.__func__
    return _argument_names(function)[given:]


@cache
def _argument_names(function: Callable) -> tuple[str, ...]:
    parameters = inspect.signature(function).parameters.values()
    return tuple(p.name for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD))


@dataclass(frozen=True)
class ForwardInterface:
    """The arguments of the `forward` of a class of models.

    Args:
        names (`frozenset[str]`): named arguments.
        required (`frozenset[str]`): those without a default.
        takes_any (`bool`): whether it accepts others, too.
    """

    names: frozenset[str]
    required: frozenset[str]
    takes_any: bool

    @property
    def takes_cache(self) -> bool:
        """Whether `use_cache` can be passed."""
        return "use_cache" in self.names or self.takes_any


@cache
def forward_interface(kind: type[nn.Module]) -> ForwardInterface:
    """The arguments of a class's `forward`, read once per class."""
    parameters = list(inspect.signature(kind.forward).parameters.values())[1:]
    named = [p for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    return ForwardInterface(
        frozenset(p.name for p in named),
        frozenset(p.name for p in named if p.default is p.empty),
        any(p.kind is p.VAR_KEYWORD for p in parameters),
    )


def slices_logits(outer: nn.Module) -> bool:
    """Whether the model can compute logits at chosen positions only."""
    return "logits_to_keep" in forward_interface(type(outer)).names and family_of(outer.config).slices_logits


def encoder_owner(outer: nn.Module, method: str) -> nn.Module | None:
    """The module that has `method`. The inner model comes first, because some outer classes hide its arguments."""
    return next((m for m in (getattr(outer, "model", None), outer) if hasattr(m, method)), None)


def encoder_of(outer: nn.Module, modality: Modality) -> tuple[nn.Module | None, Callable | None]:
    """The encoder of `modality` and the module that owns it. Some models encode videos with the image encoder."""
    family = family_of(outer.config, modality.name)
    if family.encode is not None:
        owner = getattr(outer, "model", outer)
        return owner, partial(family.encode, owner)
    methods = [modality.method, *([MODALITIES[0].method] if modality.name == "video" else [])]
    found = ((encoder_owner(outer, method), method) for method in methods)
    owner, method = next((pair for pair in found if pair[0] is not None), (None, ""))
    return owner, None if owner is None else getattr(owner, method)


def reads(outer: nn.Module, modality: Modality) -> bool:
    """Whether the model has an encoder and a placeholder for `modality`."""
    return encoder_of(outer, modality)[0] is not None and placeholder_id(outer.config, modality) is not None


def towers(outer: nn.Module) -> dict[str, nn.Module]:
    """The encoder of each modality that the model reads; some share one."""
    return {m.name: outer.get_encoder(modality=m.name) for m in MODALITIES if reads(outer, m)}


def modalities_in(inputs: Mapping) -> set[str]:
    """The modalities whose raw inputs are in a batch."""
    return {m.name for m in MODALITIES if any(inputs.get(key) is not None for key in m.raw)}


def raw_keys(config) -> list[str]:
    """The inputs that are encoded outside the model's forward."""
    return [key for modality in MODALITIES if not family_of(config, modality.name).whole for key in modality.raw]


def check_protocol(model: nn.Module) -> None:
    """Raises a `ValueError` that names what is missing, unless `model` takes encoded images or has an audio encoder."""
    outer = unwrap(model)
    image, _, audio = MODALITIES
    if reads(outer, audio) and not family_of(outer.config, audio.name).whole:
        return
    missing = []
    if "mm_encoder_outputs" not in forward_interface(type(outer)).names:
        missing.append("its forward takes no `mm_encoder_outputs`")
    if encoder_owner(outer, image.method) is None:
        missing.append(f"it has no `{image.method}`")
    if placeholder_id(outer.config, image) is None:
        missing.append("its config has no `image_token_id`")
    if missing:
        raise ValueError(
            f"{type(outer).__name__} cannot be pruned: {' and '.join(missing)}. Use a vision-language model of "
            "transformers that takes pre-encoded images (a ...ForConditionalGeneration such as LLaVA or Qwen2.5-VL) or "
            "an audio language model that has `get_audio_features` and an `audio_token_id` (such as Voxtral)."
        )


def position_scheme(model: nn.Module, scheme: str) -> str:
    """Resolves "auto" for this model; other schemes stay as they are.

    "auto" is "original" if the model's positions have rows and columns (M-RoPE), which renumbering would remove, and
    "compact" otherwise.

    Raises:
        ValueError: the model cannot take positions with gaps.
    """
    outer = unwrap(model)
    places = family_of(outer.config).places
    if scheme == "auto":
        return "compact" if places or encoder_owner(outer, "compute_3d_position_ids") is None else "original"
    if scheme == "original" and places:
        raise ValueError(
            f"position_ids='original' does not work with {type(outer).__name__}: its attention takes position ids for "
            "places in the sequence, so that tokens would see those behind them. Set position_ids='compact'."
        )
    return scheme


def placeholder_id(config, modality: Modality) -> int | None:
    """The placeholder token id of `modality`, or None."""
    image, video, _ = MODALITIES
    if modality is video and family_of(config).shares_placeholder:
        modality = image
    ids = (getattr(config, name, None) for name in modality.tokens)
    return next((i for i in ids if i is not None), None)


def visual_token_ids(config) -> list[int]:
    """Every placeholder id of the model."""
    ids = (placeholder_id(config, modality) for modality in MODALITIES)
    return list(dict.fromkeys(i for i in ids if i is not None))
