"""CDPruner: diverse tokens that matter to the instruction (arXiv 2506.10967)."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .base import Pruner
from .ops import top_k
from .registry import register_pruner
from .tokens import VisualTokens
from .trim import instruction

# Relevance of the least relevant token, and what keeps equal relevances from being scaled by zero.
EPSILON = 1e-6
# A token of which the kept ones leave less than this unexplained, relative to its own kernel entry, adds nothing: not
# far below it, float32 shows rounding only.
NOTHING_NEW = 1e-4


@register_pruner("cdpruner")
class CDPruner(Pruner):
    """Keeps tokens that are diverse and relevant to the instruction, by greedy inference of a DPP.

    CDPruner, arXiv 2506.10967. The determinantal point process has the kernel diag(r) S diag(r): S is the cosine
    similarity of projected tokens, r the relevance of each to the instruction, min-max scaled within its image. Each
    step keeps the token that raises the kernel's log-determinant most. Where all that is left is a combination of the
    kept tokens (duplicates, or a budget beyond the tokens' width), the most relevant come next. Needs the instruction;
    without one all tokens are equally relevant. Cost: O(K N (D + K)) time and O(N (D + K)) memory by a Cholesky factor
    that grows by a row per step (Chen et al., arXiv 1709.05135), batched over images.

    Relevance is the cosine of the token with the mean embedding of the instruction, since models have no CLIP text
    tower in general. The official code takes CLIP's with its sign flipped, scales over the whole batch, holds the
    (N, N) kernel, and divides by the root of whatever gain is left, be it negative.
    """

    needs = frozenset({"text"})

    def rank(self, tokens: VisualTokens, k: int) -> torch.Tensor:
        units = F.normalize(tokens.features.detach().float(), dim=-1)
        relevance = scaled(units @ F.normalize(instruction(tokens), dim=-1)[..., None], tokens.valid)
        return greedy_map(units, relevance[..., 0], tokens.valid, k)


def scaled(relevance: torch.Tensor, valid: torch.Tensor | None) -> torch.Tensor:
    """Relevance `(B, N, 1)`, min-max scaled to (0, 1] over each image's own tokens; 1 where all are equal."""
    padding = torch.zeros_like(relevance, dtype=torch.bool) if valid is None else ~valid[..., None]
    low = relevance.masked_fill(padding, float("inf")).amin(1, keepdim=True)
    high = relevance.masked_fill(padding, float("-inf")).amax(1, keepdim=True)
    return ((relevance - low + EPSILON) / (high - low + EPSILON)).masked_fill(padding, 0)


def greedy_map(units: torch.Tensor, relevance: torch.Tensor, valid: torch.Tensor | None, most: int) -> torch.Tensor:
    """Greedy choice of `most` of the unit vectors `(B, N, D)`, weighted by `relevance` `(B, N)` in [0, 1], by the
    log-determinant of the inner products of those chosen; `(B, most)`.

    Those that add nothing come last, the most relevant first.
    """
    batch, count, width = units.shape
    images, vectors = torch.arange(batch, device=units.device), units * relevance[..., None]
    # Not the vectors' measured norms, whose rounding would choose the first of equally relevant tokens.
    own = relevance.square() * (units != 0).any(-1)
    gain = own.clone()  # exp of what each token would add to the log-determinant
    barred = torch.zeros_like(own, dtype=torch.bool) if valid is None else ~valid
    steps = min(most, width)  # no more can be linearly independent
    factor = vectors.new_zeros(batch, steps, count)

    def score() -> torch.Tensor:
        return torch.where(gain > NOTHING_NEW * own, gain, relevance - 2).masked_fill(barred, float("-inf"))

    chosen = []
    for step in range(steps):
        best, pick = score().max(dim=1)
        row = (vectors @ vectors[images, pick, :, None])[..., 0]
        row = row - (factor[images, :step, pick][:, None] @ factor[:, :step])[:, 0]
        row = torch.where(best[:, None] > 0, row * best[:, None].clamp(min=EPSILON**4).rsqrt(), 0.0)
        factor[:, step] = row
        gain = gain - row.square()
        barred = barred.scatter(1, pick[:, None], True)
        chosen.append(pick)
    ranked = torch.stack(chosen, dim=1)
    return torch.cat([ranked, top_k(score(), None, most - steps)], dim=1) if steps < most else ranked
