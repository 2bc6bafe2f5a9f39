"""Cuts the arguments of a decoder layer, other than its hidden states, to the kept tokens.

Shapes: B batch, S sequence, L shortened sequence after a stage, L' before it, D hidden, d rotary width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from ..models.interface import argument_names

ROTARY = ("position_embeddings", "freqs_cis")


@dataclass
class Cut:
    """The decision of a stage. Rows hold their tokens in order, then fillers that no token sees.

    Args:
        places (`torch.LongTensor` of shape `(B, L)`): position of each slot's token in the model's input.
        slots (`torch.LongTensor` of shape `(B, L)`): its slot before this stage.
        back (`torch.LongTensor` of shape `(B, S)`): slot of each position; for a dropped one, of the last kept token
            before it.
        filler (`torch.BoolTensor` of shape `(B, L)`, *optional*): True on fillers; None if there are none.
        merge (`Callable`, *optional*): maps hidden states before this stage `(B, L', D)` and after it `(B, L, D)` to
            the latter with the means of merged tokens.
        log_sizes (`torch.Tensor` of shape `(B, L)`, *optional*): the log of how many tokens each one stands for.
    """

    places: torch.Tensor
    slots: torch.Tensor
    back: torch.Tensor
    filler: torch.Tensor | None
    merge: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None
    log_sizes: torch.Tensor | None = None


def names_of(layer: nn.Module, args: tuple) -> list[str]:
    """The names of a layer's positional arguments."""
    inner = getattr(layer, "_checkpoint_wrapped_module", layer)
    names = argument_names(inner.forward)
    return [names[i] if i < len(names) else f"argument {i}" for i in range(len(args))]


def cut_argument(name: str, value, cut: Cut):
    """Cuts an argument of a layer to the tokens of `cut`.

    Raises:
        ValueError: it has a value per token in an unknown layout.
    """
    batch, length = cut.back.shape
    if name == "attention_mask":
        return cut_mask(value, cut)
    # Several rotary embeddings, such as (cos, sin) or one per kind of layer.
    if name.startswith(ROTARY) and not isinstance(value, torch.Tensor):
        if isinstance(value, Mapping):
            return {key: cut_argument(name, part, cut) for key, part in value.items()}
        return tuple(cut_argument(name, part, cut) for part in value)
    shape = tuple(value.shape) if isinstance(value, torch.Tensor) else ()
    # (..., B, S) or (..., 1, S) -> (..., B, L)
    if name == "position_ids" and shape[-1:] == (length,) and shape[-2:-1] in ((batch,), (1,)):
        wide = value.expand(*shape[:-2], batch, length)
        return wide.gather(-1, cut.places.expand(*shape[:-2], -1, -1))
    # (B, S, d), (1, S, d) or (3, B, S, d) -> (..., B, L, d)
    if name.startswith(ROTARY) and shape[-2:-1] == (length,) and shape[:-2] in ((1,), (batch,), (3, batch)):
        wide = value.expand(*shape[:-3], batch, length, shape[-1])
        return wide.gather(-2, cut.places[..., None].expand(*wide.shape[:-2], -1, shape[-1]))
    # Anything else that may run over the sequence is refused rather than guessed.
    if any(length in tensor.shape for tensor in tensors_in(value)):
        raise ValueError(f"is handed `{name}`, {describe(value)}, which it is not known how to cut")
    return value


def cut_mask(mask: torch.Tensor, cut: Cut) -> torch.Tensor:
    """Cuts an attention mask `(B, S)` or `(B, 1, S, S)`; no token sees fillers."""
    batch, length = cut.back.shape
    shape = tuple(mask.shape) if isinstance(mask, torch.Tensor) else ()
    # Padding mask: (B, S) -> (B, L).
    if shape == (batch, length):
        short = mask.gather(1, cut.places)
        return short if cut.filler is None else short.masked_fill(cut.filler, 0)
    if len(shape) != 4 or shape[0] not in (1, batch) or shape[2:] != (length, length):
        raise ValueError(f"is handed an attention mask, {describe(mask)}, which it is not known how to cut")
    # Full mask: rows of queries, then columns of keys, (B, 1, S, S) -> (B, 1, L, S) -> (B, 1, L, L).
    short = mask.expand(batch, -1, -1, -1)
    short = short.gather(2, cut.places[:, None, :, None].expand(-1, shape[1], -1, length))
    short = short.gather(3, cut.places[:, None, None].expand(-1, shape[1], cut.places.shape[1], -1))
    # No query sees fillers.
    if cut.filler is not None:
        hidden = False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min
        short = short.masked_fill(cut.filler[:, None, None], hidden)
    return short


def tensors_in(value) -> Iterator[torch.Tensor]:
    """The tensors in a value, also inside containers."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (Mapping, list, tuple)):
        for part in value.values() if isinstance(value, Mapping) else value:
            yield from tensors_in(part)


def describe(value) -> str:
    shapes = ", ".join(str(tuple(tensor.shape)) for tensor in tensors_in(value))
    return f"a {type(value).__name__} of shape {shapes}" if shapes else f"a {type(value).__name__}"
