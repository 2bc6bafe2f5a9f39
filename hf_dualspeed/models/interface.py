"""What a model says about itself: its modalities, their encoders and their placeholders.

transformers' protocol: `get_image_features` and similar methods encode, `forward(mm_encoder_outputs=...)` takes the
result in place of pixels. `families.py` describes single families that need more.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, cached_property, partial

import torch
from torch import nn

from .families import Family, family_of


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
        if "module" in model._modules:  # DDP's, FSDP's and DeepSpeed's wrappers, which pass on other names
            model = model.module
        elif hasattr(model, "get_base_model"):
            model = model.get_base_model()
        elif hasattr(model, "_orig_mod"):
            model = model._orig_mod
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
def forward_interface(forward: Callable) -> ForwardInterface:
    """The arguments of a class's `forward`, read once."""
    parameters = list(inspect.signature(forward).parameters.values())[1:]
    named = [p for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    return ForwardInterface(
        frozenset(p.name for p in named),
        frozenset(p.name for p in named if p.default is p.empty),
        any(p.kind is p.VAR_KEYWORD for p in parameters),
    )


def foreign_module(kind: type, method: str) -> str | None:
    """The module of a method that was put into a class in place of its own; None where it is the class's own."""
    owner = next(c for c in kind.__mro__ if method in vars(c))
    module = getattr(vars(owner)[method], "__module__", None)
    return None if module == owner.__module__ else module


@dataclass(frozen=True)
class Encoder:
    """How a model reads one modality.

    Args:
        modality (`Modality`): its names.
        family (`Family`): how its tokens reach the model's `forward`.
        token_id (`int`, *optional*): the placeholder.
        owner (`nn.Module`, *optional*): the module that has the encoder.
        method (`str`): the encoder's name.
        arguments (`tuple[str, ...]`): names of the encoder's arguments.
    """

    modality: Modality
    family: Family
    token_id: int | None
    owner: nn.Module | None
    method: str
    arguments: tuple[str, ...] = ()

    @property
    def missing(self) -> bool:
        """Whether the model lacks an encoder or a placeholder for the modality."""
        return self.owner is None or self.token_id is None

    @property
    def function(self) -> Callable:
        """The encoder itself."""
        return partial(self.family.encode, self.owner) if self.family.encode else getattr(self.owner, self.method)


class ModelInterface:
    """What is known of a model. It is made once, where a trainer or a call meets the model, and passed on from there.

    Args:
        model (`nn.Module`): a vision-language model of transformers, wrapped or not.
    """

    def __init__(self, model: nn.Module):
        self.outer = unwrap(model)

    @property
    def name(self) -> str:
        """The model's class, as errors call it."""
        return type(self.outer).__name__

    @property
    def config(self):
        return self.outer.config

    @cached_property
    def text_config(self):
        """The language model's."""
        return self.config.get_text_config()

    @cached_property
    def family(self) -> Family:
        """What is special about its images."""
        return family_of(self.config)

    @cached_property
    def forward(self) -> ForwardInterface:
        return forward_interface(type(self.outer).forward)

    @cached_property
    def slices_logits(self) -> bool:
        """Whether the model can compute logits at chosen positions only."""
        return "logits_to_keep" in self.forward.names and self.family.slices_logits

    @property
    def takes_router_logits(self) -> bool:
        """Whether the model computes a loss that balances its experts (`aux_loss`) if asked for router logits."""
        return "output_router_logits" in self.forward.names

    @property
    def asks_for_router_logits(self) -> bool:
        """Whether the model adds a loss that balances its experts to its own, as its config says."""
        return self.takes_router_logits and bool(getattr(self.text_config, "output_router_logits", False))

    @property
    def router_weight(self) -> float:
        """The weight of `aux_loss` in the model's own loss."""
        return getattr(self.text_config, "router_aux_loss_coef", 0.0)

    @cached_property
    def encoders(self) -> dict[str, Encoder]:
        """The encoder of each modality, also of those that the model does not read."""
        return {modality.name: self._encoder(modality) for modality in MODALITIES}

    def _encoder(self, modality: Modality) -> Encoder:
        family, token_id = family_of(self.config, modality.name), placeholder_id(self.config, modality)
        if family.encode is not None:
            owner = getattr(self.outer, "model", self.outer)
            return Encoder(modality, family, token_id, owner, "", argument_names(family.encode)[1:])
        # Some models encode videos with the image encoder.
        methods = [modality.method, *([MODALITIES[0].method] if modality.name == "video" else [])]
        found = ((self.owner_of(method), method) for method in methods)
        owner, method = next((pair for pair in found if pair[0] is not None), (None, modality.method))
        arguments = () if owner is None else argument_names(getattr(owner, method))
        return Encoder(modality, family, token_id, owner, method, arguments)

    def owner_of(self, method: str) -> nn.Module | None:
        """The module that has `method`. The inner model comes first: some outer classes hide its arguments."""
        return next((m for m in (getattr(self.outer, "model", None), self.outer) if hasattr(m, method)), None)

    @cached_property
    def positions_owner(self) -> nn.Module | None:
        """The module that numbers positions on three axes (M-RoPE), if the model has them."""
        return self.owner_of("compute_3d_position_ids")

    @cached_property
    def skips_padding(self) -> bool:
        """Whether the language model numbers tokens by the mask: its learned positions are looked up so (OPT)."""
        tables = (module for module in self.outer.modules() if isinstance(module, nn.Embedding))
        return any("attention_mask" in argument_names(table.forward) for table in tables)

    @cached_property
    def visual_token_ids(self) -> list[int]:
        """Every placeholder id."""
        return visual_token_ids(self.config)

    @cached_property
    def media(self) -> dict[int, tuple[str, ...]]:
        """For each placeholder id, the names of the inputs of which a batch with it holds one."""
        found: dict[int, tuple[str, ...]] = {}
        for encoder in self.encoders.values():
            if encoder.token_id is not None:  # images and videos may share one
                found[encoder.token_id] = found.get(encoder.token_id, ()) + encoder.modality.raw
        return found

    @cached_property
    def raw_keys(self) -> list[str]:
        """The inputs that are encoded outside the model's forward."""
        return [key for encoder in self.encoders.values() if not encoder.family.whole for key in encoder.modality.raw]

    def towers(self) -> dict[str, nn.Module]:
        """The tower of each modality that the model reads; some share one."""
        read = [name for name, encoder in self.encoders.items() if not encoder.missing]
        return {name: self.outer.get_encoder(modality=name) for name in read}

    def check_protocol(self) -> None:
        """Raises a `ValueError` that names what is missing, unless the model takes encoded images or reads audio.

        What an encoder and a decoder share is not one sequence: labels are no part of what is shortened, and the
        decoder's own keys have other sizes.
        """
        image, audio = self.encoders["image"], self.encoders["audio"]
        missing = []
        if getattr(self.text_config, "is_encoder_decoder", False):
            missing.append("its language model is an encoder and a decoder")
        elif not audio.missing and not audio.family.whole:
            return
        if "mm_encoder_outputs" not in self.forward.names:
            missing.append("its forward takes no `mm_encoder_outputs`")
        if self.owner_of(image.modality.method) is None:
            missing.append(f"it has no `{image.modality.method}`")
        if image.token_id is None:
            missing.append("its config has no `image_token_id`")
        if missing and (patch := foreign_module(type(self.outer), "forward")):
            raise ValueError(
                f"{self.name} cannot be pruned: {' and '.join(missing)}. It is that of {patch}, which has taken the "
                "place of the model's own. Leave that patch out (Liger's: fused_linear_cross_entropy=False)."
            )
        if missing:
            raise ValueError(
                f"{self.name} cannot be pruned: {' and '.join(missing)}. Use a vision-language model of transformers "
                "that takes pre-encoded images (a ...ForConditionalGeneration such as LLaVA or Qwen2.5-VL) or an audio "
                "language model that has `get_audio_features` and an `audio_token_id` (such as Voxtral)."
            )

    def position_scheme(self, scheme: str, merged: bool = False) -> str:
        """Resolves "auto" for this model; other schemes stay as they are.

        "auto" is "original" if the model's positions have rows and columns (M-RoPE), which renumbering would remove, or
        if the kept tokens are `merged`: they stand for the whole image, and for attention, too. Else it is "compact",
        and so it is where the model would answer from counted positions, whatever it was trained with.

        Raises:
            ValueError: the model cannot take positions with gaps.
        """
        places = self.family.places
        if scheme == "auto":
            gaps = (merged or self.positions_owner is not None) and not (places or self.family.counts)
            return "original" if gaps else "compact"
        if scheme == "original" and places:
            raise ValueError(
                f"position_ids='original' does not work with {self.name}: its attention takes position ids for places "
                "in the sequence, so that tokens would see those behind them. Set position_ids='compact'."
            )
        return scheme


def modalities_in(inputs: Mapping) -> set[str]:
    """The modalities whose raw inputs are in a batch."""
    return {m.name for m in MODALITIES if any(inputs.get(key) is not None for key in m.raw)}


def check_media(ids: torch.Tensor, inputs: Mapping, media: Mapping[int, tuple[str, ...]]) -> None:
    """Raises a `ValueError` if `ids` `(B, S)` hold placeholders, and the batch nothing to put in their places.

    The model would read the placeholder's own embedding there. Waits for the device of the ids where a batch lacks
    some kind of `media`, which are those of [`ModelInterface.media`].
    """
    for token_id, keys in media.items():
        lacks = all(inputs.get(key) is None for key in keys)
        count = int((ids == token_id).sum()) if lacks else 0
        if count:
            given = sorted(key for key, value in inputs.items() if value is not None)
            raise ValueError(
                f"The batch has {count} placeholders (token id {token_id}) in `input_ids` but nothing for them: it has "
                f"none of {', '.join(f'`{key}`' for key in keys)}, only {given}. Pass on all that the processor makes "
                "(in a trainer with remove_unused_columns=False), or leave the placeholders out."
            )


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
