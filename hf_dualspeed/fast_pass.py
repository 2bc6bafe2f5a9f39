"""The fast pass: encode, select, isolate, shorten. The model's own forward does the rest.

Shapes: B batch, S sequence, S' shortened sequence, U images, K kept tokens, l isolator tokens, D hidden.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn

from .arguments import POSITION_IDS, check_choice
from .encoding import (
    PIXEL_KEYS,
    VisualEncoding,
    check_needs,
    check_protocol,
    encode,
    encoder_owner,
    unwrap,
    visual_token_ids,
)
from .isolator import ModeIsolator
from .pruners import PrunedTokens, Pruner
from .shortening import FILL, Shortening, plan_shortening


def prune_inputs(
    model: nn.Module,
    inputs: Mapping,
    pruner: Pruner,
    isolator: ModeIsolator | None = None,
    position_ids: str = "original",
    generator: torch.Generator | None = None,
) -> dict:
    """Encodes the images of a batch, prunes their tokens and shortens every `[B, S]` tensor alike.

    Args:
        model (`nn.Module`): a vision-language model of transformers, PEFT-wrapped or not.
        inputs (`Mapping`): what its processor or collator gives, labels included or not.
        pruner (`Pruner`): keeps K tokens of each image.
        isolator (`ModeIsolator`, *optional*): l learnt tokens in front of each image's kept tokens.
        position_ids (`str`): "original": each kept token keeps its place, the isolator takes its image's first;
            "compact": the shortened sequence is renumbered 0, 1, ... (on all three axes for M-RoPE).
        generator (`torch.Generator`, *optional*): for pruners that draw.

    Returns:
        `dict`: for `model(**short)` and `model.generate(**short)`. It holds no pixels. A batch without images comes
        back as it is.

    Raises:
        ValueError: the model does not speak the protocol, or features and placeholders differ in number.
    """
    check_choice("position_ids", position_ids, POSITION_IDS)
    check_protocol(model)
    check_needs(pruner)
    check_inputs(inputs)
    encodings = encode(model, inputs, pruner.needs)
    return shorten_inputs(model, inputs, encodings, pruner, isolator, position_ids, generator)


@contextmanager
def prune_visual_tokens(
    model: nn.Module,
    pruner: Pruner,
    isolator: ModeIsolator | None = None,
    position_ids: str = "original",
    generator: torch.Generator | None = None,
) -> Iterator[nn.Module]:
    """[`prune_inputs`] as a context: `model(**inputs)` runs pruned inside it.

    `model.generate` shortens its own masks while it decodes, so it needs `model.generate(**prune_inputs(...))` and
    raises inside this context.
    """
    check_choice("position_ids", position_ids, POSITION_IDS)
    check_protocol(model)

    def shorten(module, args, kwargs):
        if args:
            raise ValueError("Inside `prune_visual_tokens` call the model with keyword arguments: model(**inputs).")
        if kwargs.get("mm_encoder_outputs") is not None or kwargs.get("past_key_values") is not None:
            raise ValueError("`prune_visual_tokens` covers forward. Use model.generate(**prune_inputs(model, ...)).")
        return (), prune_inputs(model, kwargs, pruner, isolator, position_ids, generator)

    handle = model.register_forward_pre_hook(shorten, with_kwargs=True)
    try:
        yield model
    finally:
        handle.remove()


def check_inputs(inputs: Mapping) -> None:
    """Raises a `ValueError` for a batch that cannot be shortened."""
    ids = inputs.get("input_ids")
    if ids is None or ids.dim() != 2:
        raise ValueError("`inputs` must hold `input_ids` of shape (B, S): placeholders are found by their token id.")
    mask = inputs.get("attention_mask")
    if mask is not None and mask.shape != ids.shape:
        raise ValueError(
            f"`attention_mask` must be of shape {tuple(ids.shape)} like `input_ids`, got {tuple(mask.shape)}. "
            "Masks of other shapes cannot be shortened."
        )


def shorten_inputs(
    model: nn.Module,
    inputs: Mapping,
    encodings: list[VisualEncoding],
    pruner: Pruner,
    isolator: ModeIsolator | None,
    position_ids: str,
    generator: torch.Generator | None = None,
) -> dict:
    """[`prune_inputs`] after encoding."""
    if not encodings:
        return dict(inputs)
    ids = inputs["input_ids"]
    mask = inputs.get("attention_mask")
    mask = torch.ones_like(ids) if mask is None else mask
    prompt = isolator() if isolator is not None and isolator.length else None
    outputs, copies = {}, {}
    for encoding in encodings:
        pruned = pruner(encoding.tokens(generator))
        rows, repeats = kept_rows(pruned, encoding.lengths, 0 if prompt is None else len(prompt))
        outputs[encoding.modality] = encoding.with_features(isolated(pruned, prompt).index_select(0, rows))
        copies[encoding.token_id] = repeats
    plan = plan_shortening(ids, mask, copies)
    short = shorten_tensors(model, inputs, plan, set().union(*(e.consumed for e in encodings)))
    short["position_ids"] = shortened_positions(model, inputs, mask, plan, position_ids)
    short["mm_encoder_outputs"] = outputs
    return short


def isolated(pruned: PrunedTokens, prompt: torch.Tensor | None) -> torch.Tensor:
    """Kept tokens behind the isolator, flattened: `(U * (l + K), D)`."""
    features = pruned.features
    if prompt is not None:
        prompt = prompt.to(features.dtype).expand(len(features), -1, -1)
        features = torch.cat([prompt, features], dim=1)
    return features.flatten(0, 1)


def kept_rows(pruned: PrunedTokens, lengths: list[int], isolator_length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Which rows of [`isolated`] are real, and how often each placeholder appears in the shortened batch.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: rows `(sum (l + K_i),)` and repeats `(sum N_i,)`. All sizes are known on
        the host, so nothing here waits for the device.
    """
    device = pruned.positions.device
    slots, first, rows, kept, starts = pruned.positions.shape[1], 0, [], [], []
    for image, (count, keep) in enumerate(zip(lengths, pruned.lengths, strict=True)):
        begin = image * (isolator_length + slots)
        rows.append(torch.arange(begin, begin + isolator_length + keep))
        kept.append(torch.arange(image * slots, image * slots + keep))
        starts.append(first)
        first += count
    starts = torch.tensor(starts).to(device, non_blocking=True)
    positions = (pruned.positions + starts[:, None]).flatten()
    positions = positions[torch.cat(kept).to(device, non_blocking=True)]
    repeats = torch.zeros(first, dtype=torch.long, device=device)
    repeats[positions] = 1
    repeats[starts] += isolator_length
    return torch.cat(rows).to(device, non_blocking=True), repeats


def shorten_tensors(model: nn.Module, inputs: Mapping, plan: Shortening, consumed: set[str]) -> dict:
    """Shortens every `[B, S]` tensor that the language model reads; what only the encoder reads is left out."""
    shape = inputs["input_ids"].shape
    config = unwrap(model).config
    short = {}
    for key, value in inputs.items():
        if key in consumed or key in PIXEL_KEYS or key == "position_ids":
            continue
        if isinstance(value, torch.Tensor) and value.shape == shape:
            value = plan.apply(value, fill_value(config) if key == "input_ids" else FILL.get(key, 0))
        short[key] = value
    short["attention_mask"] = plan.mask.to(short.get("attention_mask", plan.source).dtype)
    if "labels" in short:  # the two modes must count the same tokens
        for token_id in visual_token_ids(config):
            short["labels"] = short["labels"].masked_fill(short["input_ids"] == token_id, -100)
    return short


def fill_value(config) -> int:
    """A padding id that is no placeholder."""
    pad = config.get_text_config().pad_token_id
    taken = visual_token_ids(config)
    return pad if pad is not None and pad not in taken else next(i for i in range(len(taken) + 1) if i not in taken)


def shortened_positions(
    model: nn.Module, inputs: Mapping, mask: torch.Tensor, plan: Shortening, scheme: str
) -> torch.Tensor:
    """Position ids of the shortened batch, `(B, S')`, or `(3, B, S')` for M-RoPE."""
    full = full_positions(model, inputs, mask)
    if scheme == "original":
        return plan.apply(full)
    compact = (plan.mask.long().cumsum(1) - 1).clamp(min=0)
    return compact.expand(*full.shape[:-2], -1, -1)


def full_positions(model: nn.Module, inputs: Mapping, mask: torch.Tensor) -> torch.Tensor:
    """The positions that the model would give the full sequence, `(B, S)` or `(3, B, S)`."""
    given = inputs.get("position_ids")
    if given is not None:
        return given
    ids = inputs["input_ids"]
    owner = encoder_owner(model, "get_rope_index")
    if owner is None:
        return torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
    names = inspect.signature(owner.get_rope_index).parameters
    if "mm_token_type_ids" in names and inputs.get("mm_token_type_ids") is None:
        raise ValueError(
            "`inputs` lacks `mm_token_type_ids`, without which the model numbers image tokens as text. "
            "Let the collator pass on all that the processor returns."
        )
    arguments = {key: inputs[key] for key in names if inputs.get(key) is not None}
    return owner.get_rope_index(**{**arguments, "attention_mask": mask})[0]
