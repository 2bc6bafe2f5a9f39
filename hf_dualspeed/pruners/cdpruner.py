"""CDPruner: diverse tokens that matter to the instruction (arXiv 2506.10967)."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .base import Pruner
from .ops import top_k
from .registry import register_pruner
from .tokens import VisualTokens
from .trim import instruction

# Relevance of the least relevant token; avoids a division by zero where all relevances are equal.
EPSILON = 1e-6
# A token adds nothing if its gain is below this fraction of its own kernel entry. Smaller gains are float32 rounding.
NOTHING_NEW = 1e-4


@register_pruner("cdpruner")
class CDPruner(Pruner):
    """Keeps tokens that are diverse and relevant to the instruction, by greedy inference of a DPP.

    CDPruner, arXiv 2506.10967. The determinantal point process has the kernel diag(r) S diag(r). S is the cosine
    similarity of projected tokens; r is the relevance of each to the instruction, min-max scaled within its image. Each
    step keeps the token that raises the kernel's log-determinant most. If all remaining tokens are combinations of the
    kept ones (duplicates, or a budget beyond the tokens' width), the most relevant come next. Needs the instruction;
    without one, all tokens are equally relevant. Cost: O(K N (D + K)) time and O(N (D + K)) memory, by a Cholesky
    factor that grows by a row per step (Chen et al., arXiv 1709.05135), batched over images.

    Relevance is the cosine of the token with the mean embedding of the instruction, because most models have no CLIP
    text tower. The official code takes CLIP's relevance with its sign flipped, scales over the whole batch, holds the
    (N, N) kernel, and divides by the root of the remaining gain even where that is negative.
    """

    needs = frozenset({"text"})

    def rank(self, tokens: VisualTokens, k: int) -> torch.Tensor:
        # Cosine of each token (B, N, D) with its instruction (B, D), scaled, (B, N, 1).
        units = F.normalize(tokens.features.detach().float(), dim=-1)
        relevance = scaled(units @ F.normalize(instruction(tokens), dim=-1)[..., None], tokens.valid)
        return greedy_map(units, relevance[..., 0], tokens.valid, k)


def scaled(relevance: torch.Tensor, valid: torch.Tensor | None) -> torch.Tensor:
    """Relevance `(B, N, 1)`, min-max scaled to (0, 1] over each image's own tokens; 1 if all are equal."""
    padding = torch.zeros_like(relevance, dtype=torch.bool) if valid is None else ~valid[..., None]
    low = relevance.masked_fill(padding, float("inf")).amin(1, keepdim=True)
    high = relevance.masked_fill(padding, float("-inf")).amax(1, keepdim=True)
    return ((relevance - low + EPSILON) / (high - low + EPSILON)).masked_fill(padding, 0)


def greedy_map(units: torch.Tensor, relevance: torch.Tensor, valid: torch.Tensor | None, most: int) -> torch.Tensor:
    """Greedy MAP inference of the DPP: indices of `most` of the unit vectors `(B, N, D)`, `(B, most)`.

    The kernel holds the inner products of the vectors, weighted by `relevance` `(B, N)` in [0, 1]. Tokens that add
    nothing come last, the most relevant first.
    """
    batch, count, width = units.shape
    images, vectors = torch.arange(batch, device=units.device), units * relevance[..., None]
    # Kernel diagonal, (B, N). From relevance, because rounding of measured norms would break ties between tokens.
    own = relevance.square() * (units != 0).any(-1)
    # gain (B, N): log(gain) is what a token adds to the log-determinant. barred (B, N): kept tokens and padding.
    gain = own.clone()
    barred = torch.zeros_like(own, dtype=torch.bool) if valid is None else ~valid
    # Rows of the Cholesky factor, (B, steps, N); at most D vectors are linearly independent.
    steps = min(most, width)
    factor = vectors.new_zeros(batch, steps, count)

    def score() -> torch.Tensor:
        # The gain, (B, N); tokens that add nothing score below 0, by relevance.
        return torch.where(gain > NOTHING_NEW * own, gain, relevance - 2).masked_fill(barred, float("-inf"))

    chosen = []
    for step in range(steps):
        best, pick = score().max(dim=1)
        # Next row of the factor, (B, N): the pick's kernel row minus its projection on earlier rows, divided by
        # sqrt(gain); zero if the pick adds nothing.
        row = (vectors @ vectors[images, pick, :, None])[..., 0]
        row = row - (factor[images, :step, pick][:, None] @ factor[:, :step])[:, 0]
        row = torch.where(best[:, None] > 0, row * best[:, None].clamp(min=EPSILON**4).rsqrt(), 0.0)
        factor[:, step] = row
        # Subtract what the pick explains of each token.
        gain = gain - row.square()
        barred = barred.scatter(1, pick[:, None], True)
        chosen.append(pick)
    # Beyond D picks the rest follows by relevance, (B, most).
    ranked = torch.stack(chosen, dim=1)
    return torch.cat([ranked, top_k(score(), None, most - steps)], dim=1) if steps < most else ranked
