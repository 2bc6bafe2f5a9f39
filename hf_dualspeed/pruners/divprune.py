"""DivPrune: the most diverse subset by max-min distance (arXiv 2503.02175)."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .base import Pruner, VisualTokens, register_pruner

# Above this many tokens the (N, N) similarities of one image no longer fit in memory beside a model.
MATRIX_TOKENS = 4096


@register_pruner("divprune")
class DivPrune(Pruner):
    """Greedy max-min cosine distance.

    The first token is the one whose nearest neighbour is farthest; each next one is the token farthest from those
    already kept. Cost: one (N, N) product and O(K N) for the choice, batched over images, with no host
    synchronisation. The official code loops over images in Python and recomputes the minimum over all kept tokens
    at each step; the running minimum here gives the same choice.
    """

    def rank(self, tokens: VisualTokens, most: int) -> torch.Tensor:
        units = F.normalize(tokens.features.detach().float(), dim=-1)
        batch, count, _ = units.shape
        rows = torch.arange(batch, device=units.device)
        excluded = units.new_zeros(batch, count)
        if tokens.valid is not None:
            excluded = excluded.masked_fill(~tokens.valid, float("inf"))
        similarity = units @ units.mT if count <= MATRIX_TOKENS else None
        nearest = nearest_similarity(units, similarity, tokens.valid)

        chosen = []
        # `nearest` is the similarity to the closest kept token (before the first choice: to the closest other
        # token); adding infinity to padding and to kept tokens takes them out of the argmin.
        pick = (nearest + excluded).argmin(dim=1)
        nearest = torch.full_like(nearest, -2.0)
        for _ in range(most - 1):
            chosen.append(pick)
            excluded[rows, pick] = float("inf")
            to_pick = similarity[rows, pick] if similarity is not None else (units @ units[rows, pick, :, None])[..., 0]
            nearest = torch.maximum(nearest, to_pick)
            pick = (nearest + excluded).argmin(dim=1)
        chosen.append(pick)
        return torch.stack(chosen, dim=1)


def nearest_similarity(
    units: torch.Tensor, similarity: torch.Tensor | None, valid: torch.Tensor | None, chunk: int = 1024
) -> torch.Tensor:
    """Similarity of each token to its nearest other token, `(B, N)`, in chunks of rows."""
    count = units.shape[1]
    columns = torch.arange(count, device=units.device)
    parts = []
    for start in range(0, count, chunk):
        part = similarity[:, start : start + chunk] if similarity is not None else units[:, start : start + chunk] @ units.mT
        part = part.masked_fill(columns[start : start + chunk, None] == columns, -2.0)
        if valid is not None:
            part = part.masked_fill(~valid[:, None], -2.0)
        parts.append(part.amax(dim=-1))
    return torch.cat(parts, dim=1)
