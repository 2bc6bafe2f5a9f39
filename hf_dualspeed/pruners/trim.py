"""TRIM: what the instruction asks for, and the mean of the rest (arXiv 2409.10994)."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .base import Pruner
from .clustering import on_device, real_tokens
from .ops import in_source_order, top_k
from .registry import register_pruner
from .tokens import PrunedTokens, VisualTokens, gather_rows


@register_pruner("trim")
class TrimPruner(Pruner):
    """Keeps the K - 1 tokens most similar to the instruction, and the mean of all others.

    TRIM, arXiv 2409.10994. Similarity is the cosine of a token with the mean embedding of the instruction; without an
    instruction, with the image's own mean token. The mean of the others stands at the position of the one nearest to
    it; a budget of 1 leaves only this mean. Needs the instruction. Cost: O(N D).

    The paper keeps as many tokens as are outliers among the similarities (more than 1.5 interquartile ranges above the
    third quartile); here the pruning ratio sets the budget. The official code compares in CLIP's space, which most
    models lack, ranks by the negated similarity there, counts outliers over the whole batch, and puts the mean behind
    all kept tokens.
    """

    needs = frozenset({"text"})
    merges = True

    def reduce(self, tokens: VisualTokens, lengths: list[int]) -> PrunedTokens:
        with torch.no_grad(), torch.autocast(tokens.features.device.type, enabled=False):
            ranked, share, centre = self.split(tokens, lengths)
        positions, _, valid = in_source_order(ranked, lengths, tokens.features.shape[1])
        # sizes (B, K): the mean stands for N - K + 1 tokens, every other one for itself.
        others = on_device([n - k + 1 for n, k in zip(tokens.lengths, lengths, strict=True)], tokens)
        sizes = torch.where(positions == centre, others.float(), 1.0)
        sizes = sizes if valid is None else sizes * valid

        def merge(features: torch.Tensor) -> torch.Tensor:
            # Mean (B, 1, D') of (B, N, D'), in float32 as `share` is; a matrix product would follow autocast.
            mean = (share[..., None] * features).sum(1, keepdim=True).to(features.dtype)
            return torch.where((positions == centre)[..., None], mean, gather_rows(features, positions))

        return PrunedTokens(merge(tokens.features), positions, valid, lengths, merge, sizes)

    def split(self, tokens: VisualTokens, lengths: list[int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Kept positions `(B, K)`, the mean's last; each token's share in the mean `(B, N)`; its position `(B, 1)`."""
        features = tokens.features.detach().float()
        real = real_tokens(tokens)
        # Similarity (B, N) to the instruction (B, D), or to the image's mean (B, D) where there is none.
        whole = features.masked_fill(~real[..., None], 0).sum(1) / real.sum(1, keepdim=True).clamp(min=1)
        asked = instruction(tokens)
        direction = torch.where((asked != 0).any(1, keepdim=True), asked, whole)
        similarity = F.cosine_similarity(features, direction[:, None], dim=-1)

        # rest (B, N): real tokens that rank K-th or later; the mean takes an equal share of each.
        count = features.shape[1]
        order = top_k(similarity, tokens.valid, count)
        last = on_device(lengths, tokens) - 1
        slot = torch.arange(count, device=features.device)
        rest = torch.zeros_like(real).scatter(1, order, slot >= last) & real
        share = rest / rest.sum(1, keepdim=True).clamp(min=1)
        # The one of them nearest to the mean gives its position, (B, 1).
        mean = (share[..., None] * features).sum(1, keepdim=True)
        distance = torch.linalg.vector_norm(features - mean, dim=-1).masked_fill(~rest, float("inf"))
        centre = distance.argmin(1, keepdim=True)
        most = max(lengths)
        return torch.where(slot[:most] == last, centre, order[:, :most]), share, centre


def instruction(tokens: VisualTokens) -> torch.Tensor:
    """Mean embedding of each image's instruction in float32, `(B, D)`; zeros without an instruction.

    Raises:
        ValueError: `tokens.text` is not as wide as `tokens.features`.
    """
    text, valid = tokens.text.detach().float(), tokens.text_valid
    if text.shape[-1] != tokens.features.shape[-1]:
        raise ValueError(
            f"`text` must be as wide as `features`, {tokens.features.shape[-1]}, got {text.shape[-1]}. Choose a pruner "
            "that needs no instruction, such as 'divprune'."
        )
    if valid is None:
        return text.mean(1)
    return torch.where(valid[..., None], text, 0).sum(1) / valid.sum(1, keepdim=True).clamp(min=1)
