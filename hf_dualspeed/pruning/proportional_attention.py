"""Proportional attention: a key that stands for s tokens gets log(s) added to its attention logits (arXiv 2210.09461).

With a tenth of the visual tokens, an image would get a tenth of the attention mass, and training would adapt to that.
All layers of the language model look up their attention function at each call. The bias is added there, so no family
needs code of its own.

Shapes: B batch, S sequence, P cached tokens, Q queries, K keys, H heads of queries, H' heads of keys, d head width.
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
from ..models.interface import ModelInterface
from .packing import VARLEN, one_sample
from .sample_rows import REMEDY as PADDED
from .sample_rows import SampleRows, layer_kinds

# Attribute by which modules of a language model find its `KeySizes`. Not a parameter or buffer, so in no checkpoint.
ATTRIBUTE = "_dualspeed_key_sizes"
HOOKED = "_dualspeed_takes_sizes"
# Key of the sizes in `mm_encoder_outputs`, which `generate` passes on to the prefill.
CARRIED = "dualspeed_key_log_sizes"
UNPACKED = "dualspeed_unpacked"  # beside them, where each row is one sample
REMEDY = "Set proportional_attention=False."
KEEPS_PROMPT = "reference_sliding_attention"  # layers whose window is one of generated tokens, as in Unlimited-OCR
EXTRA_WIDTH = 8  # FlashAttention's kernels take head widths in multiples of 8 ...
LARGEST_WIDTH = 256  # ... up to this one
PIECES = 3  # three numbers of 8 bits hold the 24 bits of a float32 exactly in half precision


@dataclass
class KeySizes:
    """What the layers of one language model currently add to their attention logits.

    Args:
        log_sizes (`torch.Tensor` of shape `(B, S)`, *optional*): of the first S keys, in float32; later keys stand for
            themselves. None: plain attention.
        total (`int`): number of keys, those in a cache included.
        taken_by (*optional*): the owner that sets them now: a training pass, or the model that is being called.
        used (`bool`): whether an attention function has used them since they were set.
        model_name (`str`): what errors call the model.
        keeps_prompt (`bool`): whether sliding caches keep the prompt, and slide over what follows it.
        rows (`SampleRows`, *optional*): the samples of a row that attention has to see each by itself.
    """

    log_sizes: torch.Tensor | None = None
    total: int = 0
    taken_by: object = None
    used: bool = False
    model_name: str = "The model"
    keeps_prompt: bool = False
    rows: SampleRows | None = None
    _masks: list[tuple] = field(default_factory=list, repr=False)
    _thread: int = 0

    def set(self, log_sizes: torch.Tensor | None, total: int = 0, rows: SampleRows | None = None) -> None:
        """Sets the sizes of the keys `(B, S)`; None: each stands for itself. With `rows`, those of the row `(1, T)`."""
        if rows is not None:
            log_sizes = rows.log_sizes(log_sizes)
        total = 0 if log_sizes is None else max(total, log_sizes.shape[1])
        if log_sizes is not self.log_sizes or total != self.total or rows is not self.rows:
            self.log_sizes, self.total, self.rows, self.used, self._masks = log_sizes, total, rows, False, []

    def take(self, owner: object) -> bool:
        """Makes `owner` the one that sets the sizes; False inside the call of another owner.

        Raises:
            RuntimeError: the model is running in another thread.
        """
        if self.taken_by is not None and self._thread != get_ident():
            raise RuntimeError(
                "The model is running in another thread, and its layers know the sizes of one batch at a time. Let "
                "calls of one model wait for each other, or pass proportional_attention=False."
            )
        if self.taken_by not in (None, owner):  # it is `owner` after an interrupted call
            return False
        self.taken_by, self._thread = owner, get_ident()
        return True

    def release(self, owner: object) -> None:
        """Ends what `owner` decided: each key stands for itself again."""
        if self.taken_by is owner:
            self.set(None)
            self.taken_by = None

    def end_call(self, model: nn.Module, kwargs: Mapping, output: object) -> None:
        """Ends a call of `model` that took them, and stores them on its cache, for later calls.

        Layers keep them, for a backward pass that recomputes activations. `output` is None after an error.
        """
        if self.taken_by is not model:
            return
        self.taken_by = None
        if output is not None:
            self.check_used()
            note(self, kwargs, output)

    def check_used(self) -> None:
        """Raises a `ValueError` if the language model has run and none of its layers used the sizes, or the rows."""
        if self.used or (self.log_sizes is None and self.rows is None):
            return
        aim, remedy = "be made proportional to how many tokens each one stands for", REMEDY
        if self.rows is not None:
            aim, remedy = "keep the samples of one row apart", PADDED
        raise ValueError(
            f"{self.model_name} does not call transformers' attention functions, so its attention cannot {aim}. "
            f"{remedy}"
        )

    def __getstate__(self) -> dict:
        """The state of copies and pickles, which are not in the middle of a pass."""
        return {"model_name": self.model_name, "keeps_prompt": self.keeps_prompt}

    def __setstate__(self, state: dict) -> None:
        self.__init__(**state)

    def of_keys(self, batch: int, count: int) -> torch.Tensor:
        """The bias `(batch, count)` of the keys of an attention call.

        A cache holds the prompt first; a sliding one only the end, unless it keeps the prompt; a static one has empty
        places at the end. Beams repeat each sample.

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
        # Beams: (B, S) -> (batch, S).
        if batch != rows:
            sizes = sizes.repeat_interleave(batch // rows, dim=0)
        # Keys of a plain forward pass.
        if count == known == self.total:
            return sizes
        # Zeros for tokens after the prompt and for empty places, then the `count` keys that the cache holds.
        start = 0 if self.keeps_prompt else max(0, self.total - count)
        return F.pad(sizes, (0, max(self.total, count) - known))[:, start : start + count]

    def attend(self, implementation: str, function: Callable, module: nn.Module, query, key, value, mask, options):
        """Calls an attention function and adds the bias of its keys in the form that the function supports.

        The samples of one row come apart before it, and together after it.
        """
        self.used = True
        if self.rows is not None:
            query, key, value, mask = self.apart(implementation, module, query, key, value, mask, options)
        if self.log_sizes is None:
            states, *rest = function(module, query, key, value, mask, **options)
        else:
            states, *rest = self.biased(implementation, function, module, query, key, value, mask, options)
        return (states, *rest) if self.rows is None else (self.rows.joined(states), None)

    def apart(self, implementation: str, module: nn.Module, query, key, value, mask, options: dict):
        """Queries, keys, values and mask of each sample of the row.

        Raises:
            ValueError: the layer attends to something else than the row, or in a way that is not known.
        """
        total = len(self.rows.slots)
        lengths = (query.shape[2], key.shape[2], *(() if mask is None else mask.shape[-2:]))
        if options.get("position_bias") is not None or len(query) != 1 or set(lengths) != {total}:
            raise ValueError(
                f"{type(module).__name__} attends in a way in which the samples of one row cannot be kept apart: "
                f"queries, keys and mask of {', '.join(map(str, lengths))} tokens in a row of {total}, "
                f"{'with' if options.get('position_bias') is not None else 'without'} a position bias. {PADDED}"
            )
        causal = mask is None and is_causal(module, options, query, implementation)
        return (*map(self.rows.apart, (query, key, value)), self.rows.mask(mask, causal, query.dtype))

    def biased(self, implementation: str, function: Callable, module: nn.Module, query, key, value, mask, options):
        """Calls an attention function with the bias of its keys."""
        # log(s) of each key, (B, K).
        bias = self.of_keys(key.shape[0], key.shape[2]).to(query.device, non_blocking=True)
        if "flash" in implementation:
            if options.get("softcap") is not None:
                raise ValueError(
                    f"{type(module).__name__} caps its attention logits (softcap), and FlashAttention leaves no way to "
                    "add sizes behind the cap. Set attn_implementation='eager', or proportional_attention=False."
                )
            # FlashAttention takes no additive mask: extra head dimensions hold the bias, or SDPA runs.
            if query.shape[-1] + EXTRA_WIDTH <= LARGEST_WIDTH:
                return widened(function, module, query, key, value, mask, options, bias)
            mask = biased_mask(allowed_rows(module, query, key.shape[2], mask, options), False, query, bias)
            return sdpa_attention_forward(module, query, key, value, mask, **options)
        if "flex" in implementation:
            # FlexAttention takes a bias, (B, 1, 1, K) -> (B, H, Q, K).
            own = options.pop("position_bias", None)
            bias = bias[:, None, None].to(query.dtype)
            bias = bias.expand(-1, query.shape[1], query.shape[2], -1) if own is None else own + bias
            return function(module, query, key, value, mask, position_bias=bias, **options)
        # SDPA and eager attention take an additive mask.
        mask = self.added(module, query, mask, options, bias, implementation)
        return function(module, query, key, value, mask, **options)

    def added(self, module: nn.Module, query, mask, options: dict, bias: torch.Tensor, implementation: str):
        """An additive mask `(B, 1, Q, K)` from the bias `(B, K)` and a layer's own mask.

        Layers often receive the same mask, so the last results are cached.
        """
        causal = None if mask is not None else is_causal(module, options, query, implementation)
        # Reuse the mask of an earlier layer.
        facts = (causal, query.shape[2], bias.shape, query.dtype, query.device)
        kept = None if torch.compiler.is_compiling() else self._masks
        for known, by, result in kept or ():
            if known is mask and by == facts:
                return result
        result = biased_mask(mask, causal, query, bias)
        if kept is not None:
            self._masks = [*kept[-3:], (mask, facts, result)]
        return result


def is_causal(module: nn.Module, options: dict, query: torch.Tensor, implementation: str) -> bool:
    """Whether attention without a mask is causal: SDPA is unless it decodes or `is_causal` is False, eager is not."""
    causal = options.get("is_causal")
    causal = getattr(module, "is_causal", True) if causal is None else causal
    return bool(causal) and query.shape[2] > 1 and implementation != "eager"


def biased_mask(
    mask: torch.Tensor | None, causal: bool | None, query: torch.Tensor, bias: torch.Tensor
) -> torch.Tensor:
    """The bias `(B, K)` at keys that a query may see and the lowest number elsewhere, `(B, 1, Q, K)`.

    `(B, 1, 1, K)` if all queries see all keys.
    """
    lowest = torch.finfo(query.dtype).min
    bias = bias.view(len(bias), 1, 1, -1).to(query.dtype)
    if mask is None and not causal:
        return bias
    if mask is None:
        # Causal: the lower triangle, (Q, K).
        length, count = query.shape[2], bias.shape[-1]
        mask = torch.ones(length, count, dtype=torch.bool, device=bias.device).tril()
    # A static mask may be wider than the keys. Boolean masks select, additive ones are summed: (B, 1, Q, K).
    mask = mask if mask.shape[-1] == bias.shape[-1] else mask[..., : bias.shape[-1]]
    return torch.where(mask, bias, lowest) if mask.dtype == torch.bool else mask + bias


def widened(function: Callable, module: nn.Module, query, key, value, mask, options: dict, bias: torch.Tensor):
    """Attention with the bias `(B, K)` in extra head dimensions, for kernels that take no additive mask.

    Extra dimensions of queries are 1 and those of keys hold bias / scaling, so their products add the bias. It is split
    into numbers of few bits, whose sum is exact in any precision.
    """
    width, value_width = query.shape[-1], value.shape[-1]
    scaling = options.get("scaling")
    scaling = width**-0.5 if scaling is None else scaling
    # bias / scaling as a sum of bfloat16 numbers, each the rounded rest of the ones before, (B, K) each.
    left, pieces = bias.float() / scaling, []
    for _ in range(PIECES):
        pieces.append(left.bfloat16().float())
        left = left - pieces[-1]
    # Keys: (B, H', K, d) -> (B, H', K, d + 8); queries: ones, (B, H, Q, d) -> (B, H, Q, d + 8).
    beside = F.pad(torch.stack(pieces, dim=-1), (0, EXTRA_WIDTH - PIECES)).to(key.dtype)
    key = torch.cat([key, beside[:, None].expand(-1, key.shape[1], -1, -1)], dim=-1)
    query = F.pad(query, (0, EXTRA_WIDTH), value=1.0)
    # Values need the same width: zeros, which are cut off the result again.
    value = F.pad(value, (0, width + EXTRA_WIDTH - value_width))
    states, *rest = function(module, query, key, value, mask, **{**options, "scaling": scaling})
    return states[..., :value_width], *rest


def change_call(implementation: str, function: Callable, module: nn.Module) -> Callable | None:
    """A replacement for an attention function if keys of the layer have sizes or samples share a row, else None."""
    sizes = sizes_of(module)
    if sizes is None or (sizes.log_sizes is None and sizes.rows is None):
        return None

    def attend(module, query, key, value, mask, *rest, **options):
        if rest:
            raise ValueError(f"{type(module).__name__} calls its attention in a way that is not known. {REMEDY}")
        return sizes.attend(implementation, function, module, query, key, value, mask, options)

    return attend


def key_sizes_of(interface: ModelInterface) -> KeySizes:
    """The [`KeySizes`] of a model's language model. Its layers refer to them from then on."""
    decoder = interface.outer.get_decoder()
    sizes = sizes_of(decoder)
    if sizes is None:
        sizes = KeySizes(model_name=interface.name, keeps_prompt=KEEPS_PROMPT in layer_kinds(interface.text_config))
        decoder.register_forward_pre_hook(_forget_sizes)
    # Every module refers to the same object.
    for module in decoder.modules():  # layers may have been added since
        module.__dict__.setdefault(ATTRIBUTE, sizes)
    change_calls(change_call)
    return sizes


def _forget_sizes(decoder: nn.Module, args: tuple) -> None:
    """Makes attention plain in a call for which nobody set sizes.

    Layers that backward recomputes do not pass here, and use the sizes of the last call.
    """
    sizes = sizes_of(decoder)
    if sizes.taken_by is None:
        sizes.set(None)


def sizes_of(module: nn.Module) -> KeySizes | None:
    """The sizes that a module of the language model reads."""
    return module.__dict__.get(ATTRIBUTE)


def set_sizes_of(layer: nn.Module, sizes: KeySizes) -> None:
    """Lets all modules of a layer read `sizes`, in place of those of the whole model."""
    for module in layer.modules():
        module.__dict__[ATTRIBUTE] = sizes


def handed_on(interface: ModelInterface, model: nn.Module, inputs: dict, log_sizes: torch.Tensor | None) -> dict:
    """The inputs for `forward` and `generate` of this model, with the sizes of the keys `(B, S)`, if they have any.

    `generate` passes all arguments on to each step but these, so boundaries of the prompt as one sample go with them.
    """
    carried = {} if log_sizes is None else {CARRIED: log_sizes}
    mask = inputs.get("attention_mask")
    if mask is not None and (carried or VARLEN[0] in inputs):  # the rows are no packed samples
        carried[UNPACKED] = mask.new_ones(len(mask), 1)
        inputs = {key: value for key, value in inputs.items() if key not in VARLEN}
    if not carried:
        return inputs
    watch_calls(interface, model)
    return inputs | {"mm_encoder_outputs": {**(inputs.get("mm_encoder_outputs") or {}), **carried}}


def watch_calls(interface: ModelInterface, model: nn.Module) -> KeySizes:
    """Registers hooks that take sizes from the model's arguments and from its cache.

    A call may enter at the given model or at the transformers model inside it.
    """
    sizes = key_sizes_of(interface)
    for module in {id(m): m for m in (model, interface.outer)}.values():
        if module.__dict__.get(HOOKED) is None:
            module.__dict__[HOOKED] = sizes  # stored with the hooks, so copies of the model have both
            module.register_forward_pre_hook(_take_sizes, with_kwargs=True)
            module.register_forward_hook(_leave_sizes, with_kwargs=True, always_call=True)
    return sizes


def _take_sizes(model: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
    """Sets the sizes in the arguments of `forward`, or those on the cache that the call continues."""
    sizes: KeySizes = model.__dict__[HOOKED]
    if not sizes.take(model):
        return None
    kwargs, given, unpacked = dict(kwargs), None, False
    outputs, cache = kwargs.get("mm_encoder_outputs"), kwargs.get("past_key_values")
    if isinstance(outputs, Mapping) and not {CARRIED, UNPACKED}.isdisjoint(outputs):
        outputs = dict(outputs)  # `generate` passes the same dict at each step
        given, unpacked = outputs.pop(CARRIED, None), outputs.pop(UNPACKED, None) is not None
        kwargs["mm_encoder_outputs"] = outputs
        if not outputs:  # some models accept no empty dict
            del kwargs["mm_encoder_outputs"]
    # Number of tokens in this call, from ids (B, S) or embeddings (B, S, D).
    states = next((kwargs[name] for name in ("input_ids", "inputs_embeds") if kwargs.get(name) is not None), None)
    states = args[0] if states is None else states
    # `generate` leaves a mask out that hides nothing. Without a cache, gaps in positions would then tell samples apart,
    # and to FlashAttention with an empty one, too.
    if unpacked and kwargs.get("attention_mask") is None and cache is None:
        kwargs["attention_mask"] = states.new_ones(states.shape[:2], dtype=torch.long)
    if unpacked and (cache is None or not cache.get_seq_length()):
        kwargs |= one_sample(ModelInterface(model), states)
    sizes.set(*continued(cache, given, states.shape[1]))
    return args, kwargs


def continued(cache: object, given: torch.Tensor | None, length: int) -> tuple[torch.Tensor | None, int]:
    """The sizes of the P tokens in a cache and of the `length` tokens of a call, and the number of all these tokens.

    `given` `(B, n)` are the known sizes of the call's tokens. Returns None and 0 if all tokens stand for themselves.

    Raises:
        ValueError: the call has fewer tokens than sizes.
    """
    before = getattr(cache, CARRIED, None)
    if given is None and before is None:
        return None, 0
    past = 0 if cache is None else int(cache.get_seq_length())
    # Tokens after the known ones stand for themselves.
    if given is None:
        return before, past + length
    if given.shape[1] > length:
        raise ValueError(
            f"The model is called with {length} tokens, but with the sizes of {given.shape[1]}. Call it with all that "
            "`prune_inputs` returned."
        )
    if not past:  # without a cache, generated tokens follow the prompt
        return given, length
    # With a cache, the prompt of a later turn is at the end of the call: (B, P) and (B, length) -> (B, P + length).
    before = given.new_zeros(len(given), past) if before is None else F.pad(before, (0, past - before.shape[1]))
    return torch.cat([before, F.pad(given, (length - given.shape[1], 0))], dim=1), past + length


def _leave_sizes(model: nn.Module, args: tuple, kwargs: dict, output: object) -> None:
    model.__dict__[HOOKED].end_call(model, kwargs, output)


def note(sizes: KeySizes, kwargs: Mapping, output: object) -> None:
    """Stores the sizes on the cache of a call, whether given or created by the model."""
    parts = output if isinstance(output, tuple) else (getattr(output, "past_key_values", None),)
    for cache in (kwargs.get("past_key_values"), *parts):
        if isinstance(cache, Cache) and sizes.log_sizes is not None:
            setattr(cache, CARRIED, sizes.log_sizes)
