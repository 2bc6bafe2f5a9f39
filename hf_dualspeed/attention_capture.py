"""Attention that visual tokens receive in the vision tower, under any attention implementation.

SDPA and FlashAttention return no attention maps, so the queries and keys of one layer are caught by hooks and only
the needed mean is computed from them. Shapes: U images or tiles, N tokens of each, H heads, d head width.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

ROWS_AT_ONCE = 1024


class AttentionCapture:
    """Queries and keys of one attention layer, filled while the tower runs."""

    def __init__(self, layer: nn.Module):
        self.layer = layer
        self.query: torch.Tensor | None = None
        self.key: torch.Tensor | None = None
        self.rotary: tuple[torch.Tensor, torch.Tensor] | None = None

    def _on_call(self, module, args, kwargs):
        self.rotary = kwargs.get("position_embeddings")

    def _on_fused(self, module, args, output):
        query, key, _ = output.detach().unflatten(-1, (3, -1)).unbind(-2)
        self.query, self.key = query, key

    def heads(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Queries and keys with rotary positions applied, `(..., N, H, d)`, in float32."""
        if self.query is None or self.key is None:
            raise ValueError(
                f"The vision tower did not call {type(self.layer).__name__}'s projections: its attention is unknown. "
                "Choose a pruner that needs no attention, such as 'divprune'."
            )
        count = getattr(self.layer, "num_heads", None) or self.layer.config.num_attention_heads
        query, key = (t.float().unflatten(-1, (count, -1)) for t in (self.query, self.key))
        if self.rotary is not None:
            query, key = (rotate(t, *self.rotary) for t in (query, key))
        return query, key


def rotate(states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary positions on `(..., N, H, d)` with `cos`, `sin` of shape `(N, d)`."""
    first, second = states.chunk(2, dim=-1)
    half = torch.cat([-second, first], dim=-1)
    return states * cos.float().unsqueeze(-2) + half * sin.float().unsqueeze(-2)


def attention_layers(tower: nn.Module) -> list[nn.Module]:
    """The tower's attention modules, in order: those that own a query projection or a fused one."""
    return [m for m in tower.modules() if hasattr(m, "qkv") or (hasattr(m, "q_proj") and hasattr(m, "k_proj"))]


def penultimate_layer(tower: nn.Module) -> nn.Module:
    """The penultimate attention layer; where some layers see only windows, the last that sees the whole image.

    Raises:
        ValueError: the tower has no layer with known query and key projections.
    """
    layers = attention_layers(tower)
    if not layers:
        raise ValueError(
            f"{type(tower).__name__} has no attention layer with `q_proj`/`k_proj` or `qkv`. "
            "Choose a pruner that needs no attention, such as 'divprune'."
        )
    whole = getattr(tower, "fullatt_block_indexes", None)
    return layers[max(whole)] if whole else layers[max(len(layers) - 2, 0)]


@contextmanager
def capture_attention(tower: nn.Module) -> Iterator[AttentionCapture]:
    """Catches queries and keys of [`penultimate_layer`] while the body runs the tower."""
    layer = penultimate_layer(tower)
    capture = AttentionCapture(layer)
    handles = [layer.register_forward_pre_hook(capture._on_call, with_kwargs=True)]
    if hasattr(layer, "qkv"):
        handles.append(layer.qkv.register_forward_hook(capture._on_fused))
    else:
        handles.append(layer.q_proj.register_forward_hook(lambda m, a, out: setattr(capture, "query", out.detach())))
        handles.append(layer.k_proj.register_forward_hook(lambda m, a, out: setattr(capture, "key", out.detach())))
    try:
        yield capture
    finally:
        for handle in handles:
            handle.remove()


def has_class_token(tower: nn.Module) -> bool:
    """Whether the tower puts a [CLS] token in front of the patches."""
    return any(name.rsplit(".", 1)[-1] in ("class_embedding", "cls_token") for name, _ in tower.named_parameters())


def class_row(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """Head-mean attention from [CLS] to each patch, `(U, N - 1)` of `(U, N, H, d)`."""
    scores = torch.einsum("uhd,unhd->uhn", query[:, 0], key) * query.shape[-1] ** -0.5
    return scores.softmax(-1).mean(1)[:, 1:]


def column_mean(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """Attention each token receives, mean over heads and queries, `(U, N)` of `(U, N, H, d)`, in chunks of rows."""
    total = query.new_zeros(query.shape[0], key.shape[1])
    for part in query.split(ROWS_AT_ONCE, dim=1):
        scores = torch.einsum("uqhd,unhd->uhqn", part, key) * query.shape[-1] ** -0.5
        total += scores.softmax(-1).mean(1).sum(1)
    return total / query.shape[1]
