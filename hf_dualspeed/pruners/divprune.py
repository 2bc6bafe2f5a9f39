"""DivPrune: the most diverse subset by max-min distance (arXiv 2503.02175)."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .base import Pruner
from .ops import take
from .registry import register_pruner
from .tokens import PrunedTokens, VisualTokens

# Most memory for the (N, N) similarities of a group of images. Without them, each kept token costs a product with all
# N; with them, it costs one read.
MATRIX_BYTES = 2**30
# Rows of similarities per product. Small blocks skip nearly half of the symmetric matrix.
BLOCK = 256
FARTHEST = -2.0  # below every cosine


@register_pruner("divprune")
class DivPrune(Pruner):
    """Keeps the most diverse tokens, by greedy max-min cosine distance.

    DivPrune, arXiv 2503.02175. The first token is the one whose nearest neighbour is farthest; each next one is
    farthest from those already kept. Inputs: features alone. Cost: one product per pair of tokens and O(K N) for the
    choice, batched over images, without host synchronisation. The official code loops over images in Python and
    recomputes the minimum over all kept tokens at each step; the running minimum here makes the same choice.
    """

    def reduce(self, tokens: VisualTokens, lengths: list[int]) -> PrunedTokens:
        with torch.no_grad(), torch.autocast(tokens.features.device.type, enabled=False):
            ranked, similarity = self.choose(tokens, max(lengths))
        return take(tokens, ranked, lengths, self.config.dropped_tokens, similarity)

    def choose(self, tokens: VisualTokens, most: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Kept positions in the order of choice `(B, K)`, and similarities of all tokens to them `(B, K, N)`."""
        units = F.normalize(tokens.features.detach().float(), dim=-1)
        # Groups of as many images as fit in MATRIX_BYTES; if not even one fits, the whole batch without matrices.
        fitting = MATRIX_BYTES // (units.element_size() * units.shape[1] ** 2)
        if 0 < len(units) <= fitting:
            return farthest_first(units, tokens.valid, most, whole=True)
        together = units.split(fitting or len(units))
        valid = [None] * len(together) if tokens.valid is None else tokens.valid.split(fitting or len(units))
        chosen = [farthest_first(*group, most, whole=fitting > 0) for group in zip(together, valid, strict=True)]
        ranked, similarity = zip(*chosen, strict=True)
        return torch.cat(ranked), torch.cat(similarity)


def farthest_first(
    units: torch.Tensor, valid: torch.Tensor | None, most: int, whole: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Greedy farthest-first choice from unit vectors `(B, N, D)`, of which `valid` `(B, N)` count.

    With `whole`, all similarities are held in memory.

    Returns:
        Chosen tokens `(B, most)`, and similarities of all tokens to them `(B, most, N)`, infinite to themselves.
    """
    batch, count, _ = units.shape
    images = torch.arange(batch, device=units.device)
    # The first pick (B,) is the token least similar to its nearest neighbour; padding is never picked.
    padding = None if valid is None else ~valid
    nearest, similarity = similarities(units, padding, whole)
    pick = (nearest if padding is None else nearest.masked_fill_(padding, float("inf"))).argmin(dim=1)
    # Infinite similarity to itself keeps a chosen token from being picked again.
    if similarity is not None:
        similarity.diagonal(dim1=1, dim2=2).fill_(float("inf"))
    # nearest (B, N): similarity of each token to its nearest chosen one. rows (B, N, N), or (B, N, D) without matrix.
    nearest = units.new_full((batch, count), FARTHEST)
    nearest = nearest if padding is None else nearest.masked_fill_(padding, float("inf"))
    rows = units if similarity is None else similarity
    chosen, similar = [pick], []
    while True:
        # Similarity of every token to the pick, (B, N): a row of the matrix, or a product.
        to_pick = rows[images, pick]
        if similarity is None:
            to_pick = (units @ to_pick[..., None])[..., 0].scatter_(1, pick[:, None], float("inf"))
        similar.append(to_pick)
        if len(chosen) == most:
            return torch.stack(chosen, dim=1), torch.stack(similar, dim=1)
        # Running maximum; the next pick is the token least similar to all chosen ones.
        nearest = torch.maximum(nearest, to_pick)
        pick = nearest.argmin(dim=1)
        chosen.append(pick)


def similarities(
    units: torch.Tensor, padding: torch.Tensor | None, whole: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Similarity of each token to its nearest other one, `(B, N)`, and, if `whole`, all similarities `(B, N, N)`.

    Each pair is multiplied once; the other half of the symmetric matrix is a copy. `padding` `(B, N)` counts for none.
    """
    batch, count, _ = units.shape
    matrix = units.new_empty(batch, count, count) if whole else None
    nearest = units.new_full((batch, count), FARTHEST)
    for start in range(0, count, BLOCK):
        end = min(start + BLOCK, count)
        # Rows start:end of the upper triangle, (B, n, N - start).
        part = units[:, start:end] @ units[:, start:].mT
        # Fill these rows of the matrix; the part left of the diagonal is a transposed earlier block.
        if matrix is not None:
            matrix[:, start:end, start:] = part
            if start:
                matrix[:, start:end, :start] = matrix[:, :start, start:end].mT
        # Leave out a token's similarity to itself and to padding.
        part.diagonal(dim1=1, dim2=2).fill_(FARTHEST)
        if padding is not None:
            part.masked_fill_(padding[:, start:end, None] | padding[:, None, start:], FARTHEST)
        # Update the block's tokens by row and the later tokens by column.
        nearest[:, start:end] = torch.maximum(nearest[:, start:end], part.amax(dim=2))
        if end < count:
            nearest[:, end:] = torch.maximum(nearest[:, end:], part[:, :, end - start :].amax(dim=1))
    return nearest, matrix
