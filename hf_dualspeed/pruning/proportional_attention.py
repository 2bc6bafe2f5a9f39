"""Proportional attention: a key that stands for s tokens gets log(s) added to its attention logits (arXiv 2210.09461).

With a tenth of the visual tokens, an image would get a tenth of the attention mass, and training would adapt to that.
All layers of the language model look up their attention function at each call, so it is there that the bias goes in,
and no family needs code of its own. Shapes: B batch, S sequence, Q queries, K keys, H heads, d head width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from threading import get_ident

import torch
import torch.nn.functional as F
from torch import nn
from transformers import Cache
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from ..models.attention import allowed_rows, change_calls
from ..models.interface import unwrap

# Where modules of a language model find its `KeySizes`; no parameter and no buffer, so in no checkpoint.
ATTRIBUTE = "_dualspeed_key_sizes"
HOOKED = "_dualspeed_takes_sizes"
# Beside the encoders' outputs in `mm_encoder_outputs`, which `generate` hands on to the prefill.
CARRIED = "dualspeed_key_log_sizes"
REMEDY = "Set proportional_attention=False."
EXTRA_WIDTH = 8  # FlashAttention's kernels take head widths in multiples of 8 ...
LARGEST_WIDTH = 256  # ... up to this
PIECES = 3  # numbers of 8 bits that make up one of 24, so that nothing is lost in half precision


@dataclass
class KeySizes:
    """What the layers of one language model add to their attention logits now.

    Args:
        log_sizes (`torch.Tensor` of shape `(B, S)`, *optional*): of each key, in float32; those behind them stand for
            themselves. None: plain attention.
        total (`int`): keys that there are, those in a cache included.
        taken_by (*optional*): who decides on them now: a training pass, or the model that is being called.
        used (`bool`): whether an attention function has taken them since they were set.
    """

    log_sizes: torch.Tensor | None = None
    total: int = 0
    taken_by: object = None
    used: bool = False
    _masks: list[tuple] = field(default_factory=list, repr=False)
    _thread: int = 0

    def set(self, log_sizes: torch.Tensor | None, total: int = 0) -> None:
        """From now on, keys have these sizes `(B, S)`; None: each stands for itself."""
        total = 0 if log_sizes is None else max(total, log_sizes.shape[1])
        if log_sizes is not self.log_sizes or total != self.total:
            self.log_sizes, self.total, self.used, self._masks = log_sizes, total, False, []

    def take(self, owner: object) -> bool:
        """Whether `owner` decides from now on, which it does not inside the call of another one.

        Raises:
            RuntimeError: the model is running in another thread.
        """
        if self.taken_by is not None and self._thread != get_ident():
            raise RuntimeError(
                "The model is running in another thread, and its layers know the sizes of one batch at a time. Let "
                "calls of one model wait for each other, or pass proportional_attention=False."
            )
        if self.taken_by not in (None, owner):  # itself, where an interrupt has ended its last call
            return False
        self.taken_by, self._thread = owner, get_ident()
        return True

    def __getstate__(self) -> dict:
        """For copies and pickles, which are not in the middle of a pass."""
        return {"log_sizes": None}

    def __setstate__(self, state: dict) -> None:
        self.__init__()

    def of_keys(self, batch: int, count: int) -> torch.Tensor:
        """The bias `(batch, count)` of an attention's keys.

        A cache holds the prompt first; a sliding one its end alone; a static one empty places at the end. Beams repeat
        each sample.

        Raises:
            ValueError: the keys are not those of the batch.
        """
        sizes = self.log_sizes
        rows, known = sizes.shape
        if batch % rows:
            raise ValueError(
                f"Proportional attention knows the sizes of {rows} samples, but is asked for those of {batch}. "
                "Prune the very batch that the model is called with."
            )
        if batch != rows:
            sizes = sizes.repeat_interleave(batch // rows, dim=0)
        if count == known == self.total:
            return sizes
        start = max(0, self.total - count)
        return F.pad(sizes, (0, max(self.total, count) - known))[:, start : start + count]

    def attend(self, implementation: str, function: Callable, module: nn.Module, query, key, value, mask, options):
        """Calls an attention function with the bias of its keys, in the way that this one takes it."""
        self.used = True
        bias = self.of_keys(key.shape[0], key.shape[2]).to(query.device, non_blocking=True)
        if "flash" in implementation:
            if options.get("softcap") is not None:
                raise ValueError(
                    f"{type(module).__name__} caps its attention logits (softcap), and FlashAttention leaves no way to "
                    "add sizes behind the cap. Set attn_implementation='eager', or proportional_attention=False."
                )
            if query.shape[-1] + EXTRA_WIDTH <= LARGEST_WIDTH:
                return widened(function, module, query, key, value, mask, options, bias)
            mask = biased_mask(allowed_rows(module, query, key.shape[2], mask, options), False, query, bias)
            return sdpa_attention_forward(module, query, key, value, mask, **options)
        if "flex" in implementation:
            own = options.pop("position_bias", None)
            bias = bias[:, None, None].to(query.dtype)
            bias = bias.expand(-1, query.shape[1], query.shape[2], -1) if own is None else own + bias
            return function(module, query, key, value, mask, position_bias=bias, **options)
        mask = self.added(module, query, mask, options, bias, implementation)
        return function(module, query, key, value, mask, **options)

    def added(self, module: nn.Module, query, mask, options: dict, bias: torch.Tensor, implementation: str):
        """A mask `(B, 1, Q, K)` to be added to the logits, of the bias `(B, K)` and a layer's own mask.

        Layers are often handed the same mask, so the last ones are kept.
        """
        causal = None
        if mask is None:  # SDPA is causal then, unless it decodes or is told otherwise; eager attention is not
            causal = options.get("is_causal")
            causal = getattr(module, "is_causal", True) if causal is None else causal
            causal = bool(causal) and query.shape[2] > 1 and implementation != "eager"
        facts = (causal, query.shape[2], bias.shape, query.dtype, query.device)
        kept = None if torch.compiler.is_compiling() else self._masks
        for known, by, result in kept or ():
            if known is mask and by == facts:
                return result
        result = biased_mask(mask, causal, query, bias)
        if kept is not None:
            self._masks = [*kept[-3:], (mask, facts, result)]
        return result


def biased_mask(
    mask: torch.Tensor | None, causal: bool | None, query: torch.Tensor, bias: torch.Tensor
) -> torch.Tensor:
    """The bias `(B, K)` where a query may look and the lowest number elsewhere: `(B, 1, Q, K)`, or `(B, 1, 1, K)`
    where all queries see all keys."""
    lowest = torch.finfo(query.dtype).min
    bias = bias[:, None, None].to(query.dtype)
    if mask is None and not causal:
        return bias
    if mask is None:
        length, count = query.shape[2], bias.shape[-1]
        mask = torch.ones(length, count, dtype=torch.bool, device=bias.device).tril()
    mask = mask[..., : bias.shape[-1]]
    return torch.where(mask, bias, lowest) if mask.dtype == torch.bool else mask + bias


def widened(function: Callable, module: nn.Module, query, key, value, mask, options: dict, bias: torch.Tensor):
    """Attention with the bias `(B, K)` in more head dimensions, for kernels that take no mask to add.

    Queries have ones there, keys the bias over the scale, so that their products add it. It is split into numbers of
    few bits, whose sum is exact in any precision.
    """
    width, value_width = query.shape[-1], value.shape[-1]
    scaling = options.get("scaling")
    scaling = width**-0.5 if scaling is None else scaling
    left, pieces = bias.float() / scaling, []
    for _ in range(PIECES):
        pieces.append(left.bfloat16().float())
        left = left - pieces[-1]
    # (B, H', K, 8) for the keys, and ones (B, H, Q, 8) beside the queries.
    beside = F.pad(torch.stack(pieces, dim=-1), (0, EXTRA_WIDTH - PIECES)).to(key.dtype)
    key = torch.cat([key, beside[:, None].expand(-1, key.shape[1], -1, -1)], dim=-1)
    query = F.pad(query, (0, EXTRA_WIDTH), value=1.0)
    value = F.pad(value, (0, width + EXTRA_WIDTH - value_width))
    states, *rest = function(module, query, key, value, mask, **{**options, "scaling": scaling})
    return states[..., :value_width], *rest


def change_call(implementation: str, function: Callable, module: nn.Module) -> Callable | None:
    """What stands in for an attention function where the keys of a layer have sizes; None elsewhere."""
    sizes = module.__dict__.get(ATTRIBUTE)
    if sizes is None or sizes.log_sizes is None:
        return None

    def attend(module, query, key, value, mask, *rest, **options):
        if rest:
            raise ValueError(f"{type(module).__name__} calls its attention in a way that is not known. {REMEDY}")
        return sizes.attend(implementation, function, module, query, key, value, mask, options)

    return attend


def key_sizes_of(model: nn.Module) -> KeySizes:
    """The [`KeySizes`] of a model's language model, which its layers know from now on."""
    decoder = unwrap(model).get_decoder()
    sizes = decoder.__dict__.get(ATTRIBUTE)
    if sizes is None:
        sizes = KeySizes()
        decoder.register_forward_pre_hook(_forget_sizes)
    for module in decoder.modules():  # layers may have come since
        module.__dict__.setdefault(ATTRIBUTE, sizes)
    change_calls(change_call)
    return sizes


def _forget_sizes(decoder: nn.Module, args: tuple) -> None:
    """A call on whose sizes nobody decides is plain. Layers that are computed again in backward do not come by here,
    and find the sizes of the last call."""
    sizes = decoder.__dict__[ATTRIBUTE]
    if sizes.taken_by is None:
        sizes.set(None)


def check_used(model: nn.Module, sizes: KeySizes) -> None:
    """Raises a `ValueError` where the language model has run and none of its layers took the sizes."""
    if sizes.log_sizes is not None and not sizes.used:
        raise ValueError(
            f"{type(unwrap(model)).__name__} does not call transformers' attention functions, so its attention cannot "
            f"be made proportional to how many tokens each one stands for. {REMEDY}"
        )


def carry(model: nn.Module, inputs: dict, log_sizes: torch.Tensor) -> dict:
    """Inputs that bring the sizes of their keys `(B, S)` along, for `forward` and `generate` of this model."""
    watch_calls(model)
    return inputs | {"mm_encoder_outputs": {**(inputs.get("mm_encoder_outputs") or {}), CARRIED: log_sizes}}


def watch_calls(model: nn.Module) -> KeySizes:
    """Hooks by which the model takes sizes out of its arguments and its cache: calls may enter at the model as it is
    given, or at the transformers model in it."""
    sizes = key_sizes_of(model)
    for module in {id(m): m for m in (model, unwrap(model))}.values():
        if module.__dict__.get(HOOKED) is None:
            module.__dict__[HOOKED] = sizes  # beside the hooks, so that copies of the model have both
            module.register_forward_pre_hook(_take_sizes, with_kwargs=True)
            module.register_forward_hook(_leave_sizes, with_kwargs=True, always_call=True)
    return sizes


def _take_sizes(model: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
    """Sets the sizes that the arguments of `forward` bring along, or those of the cache that they go on from."""
    sizes: KeySizes = model.__dict__[HOOKED]
    if not sizes.take(model):
        return None
    kwargs, given = dict(kwargs), None
    outputs = kwargs.get("mm_encoder_outputs")
    if isinstance(outputs, Mapping) and CARRIED in outputs:
        outputs = dict(outputs)  # `generate` hands the same one on at each step
        given = outputs.pop(CARRIED)
        kwargs["mm_encoder_outputs"] = outputs
        if not outputs:  # some models take none
            del kwargs["mm_encoder_outputs"]
    states = next((kwargs[name] for name in ("input_ids", "inputs_embeds") if kwargs.get(name) is not None), None)
    length = (args[0] if states is None else states).shape[1]
    sizes.set(*continued(kwargs.get("past_key_values"), given, length))
    return args, kwargs


def continued(cache: object, given: torch.Tensor | None, length: int) -> tuple[torch.Tensor | None, int]:
    """Sizes of the P tokens in a cache and of the `length` ones of a call, of which `given` `(B, n)` are known, and how
    many tokens that are; None where all of them stand for themselves.

    Raises:
        ValueError: the call has fewer tokens than sizes.
    """
    before = getattr(cache, CARRIED, None)
    if given is None and before is None:
        return None, 0
    past = 0 if cache is None else int(cache.get_seq_length())
    if given is None:
        return before, past + length
    if given.shape[1] > length:
        raise ValueError(
            f"The model is called with {length} tokens, but with the sizes of {given.shape[1]}. Call it with all that "
            "`prune_inputs` returned."
        )
    if not past:  # without a cache, what was generated stands behind the prompt
        return given, length
    # A later turn stands at the end of what is new.
    before = given.new_zeros(len(given), past) if before is None else F.pad(before, (0, past - before.shape[1]))
    return torch.cat([before, F.pad(given, (length - given.shape[1], 0))], dim=1), past + length


def _leave_sizes(model: nn.Module, args: tuple, kwargs: dict, output: object) -> None:
    """Notes the sizes on the cache, for what is generated from it. Layers keep them, for a backward pass that
    recomputes activations."""
    sizes: KeySizes = model.__dict__[HOOKED]
    if sizes.taken_by is model:
        sizes.taken_by = None
        if output is not None:  # None after an error
            check_used(model, sizes)
            note(sizes, kwargs, output)


def note(sizes: KeySizes, kwargs: Mapping, output: object) -> None:
    """Notes the sizes on the cache of a call, be it given or made by the model."""
    parts = output if isinstance(output, tuple) else (getattr(output, "past_key_values", None),)
    for cache in (kwargs.get("past_key_values"), *parts):
        if isinstance(cache, Cache) and sizes.log_sizes is not None:
            setattr(cache, CARRIED, sizes.log_sizes)
