"""Attention that visual tokens receive, in the vision tower or the language model, under any implementation.

SDPA and FlashAttention return no attention maps. So the queries and keys of one layer are captured as they reach its
attention function, after norms and rotary positions, and only the needed mean is computed from them.

Shapes: U images or tiles, N tokens of each, P patches of the batch; in the language model B batch, S sequence,
Q queries, K keys, M chosen queries; H heads of queries, H' heads of keys, d head width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from threading import Lock
from typing import Protocol

import torch
from torch import nn
from transformers import AttentionInterface

ROWS_AT_ONCE = 1024  # queries whose scores (U, H, rows, N) are in memory at a time
REMEDY = "Choose a pruner that needs no attention, such as 'divprune'."
# Other arguments of transformers' attention functions that change the weights; the capture refuses them.
UNKNOWN = ("softcap", "s_aux", "position_bias", "sliding_window", "cache", "position_ids")


@dataclass
class Call:
    """One call of an attention function: `query` and `key` `(U, H, N, d)`, `mask` `(U, 1, N, N)` or None."""

    query: torch.Tensor
    key: torch.Tensor
    mask: torch.Tensor | None
    scaling: float
    bounds: torch.Tensor | None  # boundaries of sequences packed in one row

    def sequences(self) -> Iterator[Call]:
        """Yields the packed sequences one by one. Waits for the device if sequences are packed."""
        if self.bounds is None:
            yield self
            return
        sizes = self.bounds.diff().tolist()
        for query, key in zip(self.query.split(sizes, dim=2), self.key.split(sizes, dim=2), strict=True):
            yield Call(query, key, None, self.scaling, None)


class AttentionObserver(Protocol):
    """Receives the calls of attention functions; see [`attention_hook`]."""

    def observes(self, module: nn.Module) -> bool:
        """Whether it wants the calls of this attention layer."""

    def on_attention(
        self,
        module: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        mask: torch.Tensor | None,
        rest: tuple,
        options: dict,
    ) -> None:
        """Receives one call: `query` `(B, H, S, d)`, `key` `(B, H', S, d)`, and the other arguments."""


class AttentionCapture:
    """Captures the calls of one attention layer's attention function while the tower runs."""

    def __init__(self, tower: nn.Module):
        self.tower = type(tower).__name__
        self.layer = penultimate_layer(tower)
        self.class_token = has_class_token(tower)
        self.calls: list[Call] = []
        self.obstacle: str | None = None

    def observes(self, module: nn.Module) -> bool:
        return module is self.layer

    def on_attention(self, module, query, key, mask, rest: tuple, options: dict) -> None:
        """Keeps a call, or the reason why its attention cannot be known."""
        self.obstacle = self.obstacle or obstacle_of(self.layer, query, key, mask, rest, options)
        if self.obstacle is None:
            # Grouped heads share a key: (U, H', N, d) -> (U, H, N, d).
            key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
            scaling = options.get("scaling")
            scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
            mask = None if mask is None else mask.detach()
            self.calls.append(Call(query.detach(), key.detach(), mask, scaling, options.get("cu_seq_lens_q")))

    def received(self) -> torch.Tensor:
        """Returns the attention that each patch receives, `(P,)` in float32, in the order of the layer's tokens.

        Raises:
            ValueError: the attention is unknown.
        """
        mean = class_row if self.class_token else column_mean
        # [CLS]'s row (U, N - 1), or the mean over queries (U, N), of each sequence; flattened to (P,).
        return torch.cat([mean(part).flatten() for call in self._known() for part in call.sequences()])

    def keys(self) -> torch.Tensor:
        """Returns the key of each patch, averaged over heads, `(P, d)`, in the order of the layer's tokens.

        Raises:
            ValueError: the keys are unknown.
        """
        # Without [CLS]: (U, H, N, d) -> (U, N, d) -> (P, d).
        return torch.cat([call.key.mean(1)[:, int(self.class_token) :].flatten(0, 1) for call in self._known()])

    def _known(self) -> list[Call]:
        obstacle = self.obstacle or (None if self.calls else "did not call transformers' attention function")
        if obstacle:
            raise ValueError(
                f"The attention of {self.tower} is unknown: its {type(self.layer).__name__} {obstacle}. {REMEDY}"
            )
        return self.calls


def obstacle_of(layer: nn.Module, query, key, mask, rest: tuple, options: dict) -> str | None:
    """Why a call's attention cannot be computed from its queries, keys and mask; None if it can."""
    if query.dim() != 4 or query.shape[2] != key.shape[2] or query.shape[1] % key.shape[1]:
        return f"attends with queries of shape {tuple(query.shape)} to keys of shape {tuple(key.shape)}"
    unknown = [name for name in UNKNOWN if options.get(name) is not None]
    if unknown or rest:
        return f"takes {unknown or 'unnamed arguments'}"
    # Without a mask, attention is known unless it is causal; masks must be (U, 1, N, N).
    causal = options.get("is_causal")
    causal = getattr(layer, "is_causal", True) if causal is None else causal
    if mask is None:
        return "is causal" if causal and query.shape[2] > 1 else None
    square = mask.dim() == 4 and mask.shape[1] == 1 and tuple(mask.shape[2:]) == (query.shape[2], key.shape[2])
    if not square or options.get("cu_seq_lens_q") is not None:
        return f"takes a mask of shape {tuple(mask.shape)}"
    return None


_observer: ContextVar[AttentionObserver | None] = ContextVar("observer", default=None)
_lock, _open = Lock(), 0
_lookup = AttentionInterface.get_interface
_change: Callable[[str, Callable, nn.Module], Callable | None] | None = None


def _observed_lookup(self, attn_implementation: str, default: Callable) -> Callable:
    """Replaces `AttentionInterface.get_interface`; returns an attention function that reports its calls."""
    function = _lookup(self, attn_implementation, default)
    # Compiled code cannot read a ContextVar, and observed layers are never compiled.
    observer = None if torch.compiler.is_compiling() else _observer.get()

    def observed(module, query, key, value, attention_mask=None, *rest, **options):
        if observer is not None and observer.observes(module):
            observer.on_attention(module, query, key, attention_mask, rest, options)
        changed = None if _change is None else _change(attn_implementation or "eager", function, module)
        call = function if changed is None else changed  # some compilers cannot trace `or`
        return call(module, query, key, value, attention_mask, *rest, **options)

    return function if observer is None and _change is None else observed


def change_calls(change: Callable[[str, Callable, nn.Module], Callable | None]) -> None:
    """Installs `change(implementation, function, layer)`.

    It may return a function to call in place of the layer's attention function, or None.
    """
    global _change
    with _lock:
        _change = change
        AttentionInterface.get_interface = _observed_lookup


@contextmanager
def attention_hook(observer: AttentionObserver) -> Iterator[None]:
    """Reports the calls of attention functions in this thread to `observer` while the body runs.

    Layers look up their attention function at each call. That lookup is replaced while any thread has an observer.
    """
    global _open
    with _lock:
        _open += 1
        AttentionInterface.get_interface = _observed_lookup
    token = _observer.set(observer)
    try:
        yield
    finally:
        _observer.reset(token)
        with _lock:
            _open -= 1
            if not _open and _change is None:
                AttentionInterface.get_interface = _lookup


@contextmanager
def capture_attention(tower: nn.Module) -> Iterator[AttentionCapture]:
    """Captures queries and keys of [`penultimate_layer`] while the body runs the tower in this thread."""
    capture = AttentionCapture(tower)
    with attention_hook(capture):
        yield capture


def attention_layers(tower: nn.Module) -> list[nn.Module]:
    """The tower's attention modules in order: those that own a query projection or a fused one."""
    projections = (("qkv",), ("q_proj", "k_proj"), ("q", "k"))
    return [m for m in tower.modules() if any(all(hasattr(m, name) for name in names) for names in projections)]


def penultimate_layer(tower: nn.Module) -> nn.Module:
    """The penultimate attention layer. If some layers see only windows, the last one that sees the whole image.

    Raises:
        ValueError: the tower has no layer with known query and key projections.
    """
    layers = attention_layers(tower)
    if not layers:
        raise ValueError(f"{type(tower).__name__} has no attention layer with `q_proj`/`k_proj` or `qkv`. {REMEDY}")
    whole = [i for i in getattr(tower, "fullatt_block_indexes", None) or () if i < len(layers)]
    return layers[max(whole, default=max(len(layers) - 2, 0))]


def has_class_token(tower: nn.Module) -> bool:
    """Whether the tower puts a [CLS] token before the patches."""
    return any(name.rsplit(".", 1)[-1] in ("class_embedding", "cls_token") for name, _ in tower.named_parameters())


def weights(query: torch.Tensor, call: Call, mask: torch.Tensor | None) -> torch.Tensor:
    """Attention weights of some of a call's queries `(U, H, q, d)`, averaged over heads, `(U, q, N)`."""
    # Scaled dot products with all keys in float32: (U, H, q, d) @ (U, H, d, N) -> (U, H, q, N).
    scores = query.float() @ call.key.float().transpose(-1, -2) * call.scaling
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask
    # Softmax over keys, mean over heads: (U, H, q, N) -> (U, q, N).
    return scores.softmax(-1).mean(1)


def class_row(call: Call) -> torch.Tensor:
    """Attention from [CLS] to each patch, `(U, N - 1)`."""
    mask = None if call.mask is None else call.mask[:, :, :1]
    # [CLS] is token 0: the row of its query, without its own key.
    return weights(call.query[:, :, :1], call, mask)[:, 0, 1:]


def column_mean(call: Call) -> torch.Tensor:
    """Attention that each token receives, averaged over heads and over the queries that see it, `(U, N)`."""
    # Every query sees every key: the mean over queries, in chunks of rows.
    if call.mask is None:
        return sum(weights(part, call, None).sum(1) for part in call.query.split(ROWS_AT_ONCE, 2)) / call.query.shape[2]
    # Real queries (U, N, 1): padding does not see itself.
    total = seen_by = 0
    real = seen(call.mask.diagonal(dim1=-2, dim2=-1)).transpose(-1, -2)
    # Sums over real queries, chunk by chunk: attention (U, N), and how many queries see each key (U, N).
    for part, mask, rows in zip(
        *(tensor.split(ROWS_AT_ONCE, 2) for tensor in (call.query, call.mask)), real.split(ROWS_AT_ONCE, 1), strict=True
    ):
        total = total + (weights(part, call, mask) * rows).nan_to_num().sum(1)
        seen_by = seen_by + (seen(mask[:, 0]) & rows).sum(1)
    # Mean over the queries that see the key; 0 for padding.
    return total / seen_by.clamp(min=1)


def seen(mask: torch.Tensor) -> torch.Tensor:
    """Whether a mask, boolean or additive, lets a query see a key."""
    return mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2


# --- single queries of a causal language model --------------------------------------------------------------------

# Arguments that change the weights in ways that cannot be recomputed here.
OPAQUE = ("s_aux", "position_bias", "cache")


def query_obstacle(query: torch.Tensor, key: torch.Tensor, mask, rest: tuple, options: dict) -> str | None:
    """Why [`attention_of`] cannot compute a call's weights; None if it can."""
    if query.dim() != 4 or query.shape[2] != key.shape[2] or query.shape[1] % key.shape[1]:
        return f"attends with queries of shape {tuple(query.shape)} to keys of shape {tuple(key.shape)}"
    unknown = [name for name in OPAQUE if options.get(name) is not None]
    if unknown or rest:
        return f"takes {unknown or 'unnamed arguments'}"
    length = query.shape[2]
    shape = tuple(mask.shape) if isinstance(mask, torch.Tensor) else ()
    known = mask is None or (len(shape) == 4 and shape[2:] == (length, length)) or shape == (len(query), length)
    return None if known else f"takes a mask of type {type(mask).__name__} and shape {shape}"


@torch.no_grad()
def attention_of(
    layer: nn.Module,
    places: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    mask: torch.Tensor | None,
    options: dict,
    log_sizes: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention of the queries at `places` `(B, M)` to all keys, averaged over heads, in float32, `(B, M, S)`.

    Args:
        query (`torch.Tensor` of shape `(B, H, S, d)`), key (`torch.Tensor` of shape `(B, H', S, d)`): groups of heads
            share a key.
        mask (`torch.Tensor`, *optional*): `(B, 1, S, S)`, boolean or additive, or FlashAttention's padding mask
            `(B, S)`.
        log_sizes (`torch.Tensor` of shape `(B, S)`, *optional*): what proportional attention adds to the logits.
    """
    batch, heads, length, width = query.shape
    scaling, softcap = options.get("scaling"), options.get("softcap")
    scaling = width**-0.5 if scaling is None else scaling
    with torch.autocast(query.device.type, enabled=False):
        # The asked queries in float32: (B, H, S, d) -> (B, H, M, d).
        asked = query.gather(2, places[:, None, :, None].expand(-1, heads, -1, width)).float()
        # Heads of one key side by side, then their logits: (B, H', H/H' * M, d) -> (B, H, M, S).
        asked = asked.unflatten(1, (key.shape[1], -1)).flatten(2, 3)
        scores = (asked @ key.float().mT * scaling).view(batch, heads, -1, length)
        if softcap is not None:
            scores = (scores / softcap).tanh() * softcap
        # Proportional attention: log(s) for a key that stands for s tokens, (B, S) over heads and queries.
        if log_sizes is not None:
            scores = scores + log_sizes[:, None, None]
        # Mask, softmax over keys, mean over heads: (B, H, M, S) -> (B, M, S).
        allowed = rows_of_mask(layer, places, length, mask, options)
        scores = scores.masked_fill(~allowed, float("-inf")) if allowed.dtype == torch.bool else scores + allowed
        return scores.softmax(-1).mean(1)


def rows_of_mask(
    layer: nn.Module, places: torch.Tensor, length: int, mask: torch.Tensor | None, options: dict
) -> torch.Tensor:
    """Which keys the queries at `places` `(B, M)` may see: `(B, 1, M, S)`, boolean or additive."""
    # A full mask (B, 1, S, S) has a row per query.
    if mask is not None and mask.dim() == 4:
        mask = mask.expand(len(places), -1, -1, -1)
        return mask.gather(2, places[:, None, :, None].expand(-1, mask.shape[1], -1, length))
    # Without one, causality and window follow from the places: (B, 1, M, 1) against (S,).
    causal, window = options.get("is_causal"), options.get("sliding_window")
    causal = getattr(layer, "is_causal", True) if causal is None else causal
    keys, places = torch.arange(length, device=places.device), places[:, None, :, None]
    allowed = keys <= places if causal else torch.ones_like(keys <= places)
    if window is not None:
        allowed = allowed & (keys > places - window)
    # FlashAttention's mask (B, S) hides padding.
    return allowed if mask is None else allowed & mask[:, None, None].bool()


def allowed_rows(
    layer: nn.Module, query: torch.Tensor, keys: int, mask: torch.Tensor | None, options: dict
) -> torch.Tensor:
    """Which of the last `keys` keys the queries `(B, H, Q, d)` may see under FlashAttention: `(B, 1, Q, K)`, boolean.

    `mask` `(B, K)` is False on padding; `options` give the window and the boundaries of packed samples.
    """
    index = torch.arange(keys, device=query.device)
    # With a cache, queries are the last Q of K places.
    places = index[keys - query.shape[2] :]
    allowed = rows_of_mask(layer, places.expand(len(query), -1), keys, mask, options)
    # Packed samples: a query sees the keys of its own sample, (Q, K).
    ends = options.get("cu_seq_lens_k")
    if ends is not None:
        sample = torch.searchsorted(ends, index, right=True)
        allowed = allowed & (sample[places][:, None] == sample)
    return allowed
