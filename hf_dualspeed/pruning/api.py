"""Pruning for inference: prunes a batch without a trainer, for `forward` or `generate`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn

from ..models.interface import ModelInterface, check_media
from ..pruners import Pruner
from ..utils.constants import POSITION_IDS, VIDEO_BUDGETS
from ..utils.validation import check_choice, checked
from .decoder import LayerPass
from .encoding import encode
from .inputs import check_inputs, check_pruner, shorten_inputs
from .isolator import ModeIsolator
from .positions import remember
from .proportional_attention import handed_on, watch_calls


@checked
def prune_inputs(
    model: nn.Module,
    inputs: Mapping,
    pruner: Pruner,
    isolator: ModeIsolator | None = None,
    position_ids: str = "auto",
    generator: torch.Generator | None = None,
    video_budget: str = "clip",
    proportional_attention: bool = True,
) -> dict:
    """Encodes the images of a batch, prunes their tokens and shortens every `[B, S]` tensor accordingly.

    Args:
        model (`nn.Module`): a vision-language model of transformers, PEFT-wrapped or not.
        inputs (`Mapping`): what its processor or collator returns, with or without labels.
        pruner (`Pruner`): keeps K tokens of each image, before the language model.
        isolator (`ModeIsolator`, *optional*): l learned tokens before each image's kept tokens.
        position_ids (`str`): "original": each kept token keeps its position, and the isolator takes its image's first;
            "compact": the shortened sequence is renumbered 0, 1, ... (on all three axes for M-RoPE); "auto": original
            for M-RoPE, and where dropped tokens are merged and attention is proportional, otherwise compact, as for
            models that cannot attend or answer with gaps in between.
        generator (`torch.Generator`, *optional*): for pruners that sample.
        video_budget (`str`): "clip": the tokens of a video are pruned as one; "frame": those of each frame separately,
            each frame after its own isolator.
        proportional_attention (`bool`): a kept token that stands for s tokens gets log(s) added to its attention
            logits in every layer of the language model. False as in the paper.

    Returns:
        `dict`: for `model(**short)` and `model.generate(**short)` of the same model, whose new hooks read the sizes in
        it. It holds no pixels. A batch of text alone is returned unchanged.

        - If activations are recomputed, run backward before the model's next call.
        - `generate` expands the tensors in place for beams, so make a new dict for each call.
        - To continue from its cache, prune with `position_ids="compact"`, because transformers numbers later tokens by
          counting.
        - Call the model itself, not its `forward`, and leave `prefill_chunk_size` unset, or pass
          `proportional_attention=False`.

    Raises:
        ValueError: the model does not support the protocol, the batch has placeholders without images (or videos, or
            audio) or is encoded already, the numbers of features and placeholders differ, the pruner drops tokens
            inside the language model, or (when the model is called) its attention cannot be made proportional.
    """
    merged = pruner.config.merged(proportional_attention)
    interface, position_ids = checked_interface(model, position_ids, video_budget, isolator, merged)
    if inputs.get("mm_encoder_outputs") is not None:
        raise ValueError(
            "`inputs` hold `mm_encoder_outputs`, images that are encoded already and perhaps pruned. Pass on what the "
            "processor returns; `prune_inputs` encodes it."
        )
    check_inputs(inputs)
    check_media(inputs["input_ids"], inputs, interface.media)
    encodings = encode(interface, inputs, pruner.needs, video_budget)
    short = shorten_inputs(interface, inputs, encodings, pruner, isolator, position_ids, generator)
    if encodings and inputs.get("labels") is None:  # a later turn may follow
        remember(interface.positions_owner, short.inputs)
    return handed_on(interface, model, short.inputs, short.log_sizes if proportional_attention else None)


@checked
@contextmanager
def prune_visual_tokens(
    model: nn.Module,
    pruner: Pruner,
    isolator: ModeIsolator | None = None,
    position_ids: str = "auto",
    generator: torch.Generator | None = None,
    video_budget: str = "clip",
    proportional_attention: bool = True,
) -> Iterator[nn.Module]:
    """[`prune_inputs`] as a context: `model(**inputs)` runs pruned inside it.

    Pruners that drop tokens inside the language model work here too, without a cache, and their logits have the full
    length. `model.generate` shortens its own masks while it decodes, so it needs `model.generate(**prune_inputs(...))`
    and raises inside this context.
    """
    merged = pruner.config.merged(proportional_attention)
    interface, position_ids = checked_interface(model, position_ids, video_budget, isolator, merged)
    check_pruner(interface, pruner)
    layer_passes: list[LayerPass] = []
    key_sizes = watch_calls(interface, model)

    def shorten(module, args, kwargs):
        if args:
            raise ValueError("Inside `prune_visual_tokens` call the model with keyword arguments: model(**inputs).")
        if kwargs.get("mm_encoder_outputs") is not None or kwargs.get("past_key_values") is not None:
            raise ValueError("`prune_visual_tokens` covers forward. Use model.generate(**prune_inputs(model, ...)).")
        check_inputs(kwargs)
        check_media(kwargs["input_ids"], kwargs, interface.media)
        # Encode and shorten before the model's forward.
        encodings = encode(interface, kwargs, pruner.needs, video_budget)
        layers = None
        if pruner.in_language_model:
            layers = LayerPass(interface, pruner, proportional_attention)
            layer_passes.append(layers)
        short = shorten_inputs(interface, kwargs, encodings, pruner, isolator, position_ids, generator, layers)
        if encodings and kwargs.get("labels") is None:  # a later turn may follow
            remember(interface.positions_owner, short.inputs)
        # Proportional attention for this call; `close` ends it.
        key_sizes.take(model)
        key_sizes.set(short.log_sizes if proportional_attention else None)
        if layers is None:
            return (), short.inputs
        layers.open()
        return (), {**short.inputs, "use_cache": False}

    def close(module, args, kwargs, output):
        while layer_passes:
            layer_passes.pop().close()
        key_sizes.end_call(model, kwargs, output)

    handles = [
        model.register_forward_pre_hook(shorten, with_kwargs=True),
        model.register_forward_hook(close, with_kwargs=True, always_call=True),
    ]
    try:
        yield model
    finally:
        close(model, (), {}, None)
        for handle in handles:
            handle.remove()


def checked_interface(
    model: nn.Module, position_ids: str, video_budget: str, isolator: ModeIsolator | None, merged: bool
) -> tuple[ModelInterface, str]:
    """The model's interface and its position scheme.

    Raises:
        ValueError: the model cannot be pruned, or not with these options or this isolator.
    """
    check_choice("position_ids", position_ids, POSITION_IDS)
    check_choice("video_budget", video_budget, VIDEO_BUDGETS)
    interface = ModelInterface(model)
    interface.check_protocol()
    width = interface.text_config.hidden_size
    if isolator is not None and isolator.hidden_size != width:
        raise ValueError(
            f"`isolator` has the width {isolator.hidden_size}, but the model {width}. Use the one that was trained "
            "with it, or ModeIsolator.for_model(model, length)."
        )
    return interface, interface.position_scheme(position_ids, merged)
