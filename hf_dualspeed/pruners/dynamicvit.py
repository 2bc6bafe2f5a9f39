"""DynamicViT: learned keep-scores from each token and the whole image (arXiv 2106.02034)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from ..utils.validation import check_range
from .base import Pruner
from .config import PrunerConfig
from .learned import Float32Linear, check_width
from .ops import take, top_k
from .registry import register_pruner
from .tokens import PrunedTokens, VisualTokens, gather_rows


@dataclass
class DynamicViTSettings(PrunerConfig):
    """Settings of `dynamicvit`.

    Args:
        hidden_size (`int`): width D of the visual tokens, equal to the language model's; the trainer fills it in.
        scorer_size (`int`): width of the scoring MLP, a multiple of 4; the tokens' width in the official code.
        temperature (`float`): temperature of the relaxed choice that trains the scores; 1 in the official code.
        ratio_weight (`float`): weight of the loss that pulls the mean keep-probability to the share kept. It is 2 in
            the official code, where it controls how many tokens are kept. Here K is exact without it, so it is off; it
            would only make the scores readable as probabilities.
    """

    hidden_size: int = 4096
    scorer_size: int = 256
    temperature: float = 1.0
    ratio_weight: float = 0.0

    def __post_init__(self):
        super().__post_init__()
        check_range("hidden_size", self.hidden_size, 1)
        check_range("scorer_size", self.scorer_size, 4)
        check_range("temperature", self.temperature, 0, left_open=True, off="1.0 is usual.")
        check_range("ratio_weight", self.ratio_weight, 0, off="Use 0.0 to turn the ratio loss off.")
        if self.scorer_size % 4:
            raise ValueError(
                f"`scorer_size` must be a multiple of 4, got {self.scorer_size!r}: its layers halve it twice."
            )


@register_pruner("dynamicvit")
class DynamicViT(Pruner):
    """Keeps the tokens of the highest learned scores, drawn by Gumbel top-K while it trains.

    DynamicViT (arXiv 2106.02034): an MLP scores each token from half of its own hidden features and the mean of the
    other half over the image. Training draws K tokens by Gumbel noise on the scores, from `tokens.generator`;
    evaluation keeps the K best.

    Differences from the official code:

    - It only masks tokens in training and decides on each alone. Here dropped tokens are removed, and exactly K stay:
      the highest of scores plus noise, which draws K without replacement in proportion to exp(score).
    - The loss cannot reach removed tokens, so the choice is relaxed as a whole, in the backward pass alone
      (straight-through Gumbel-softmax, as there). Each kept token stands for the mean of itself and the dropped ones,
      weighted by a softmax of (score + noise) / temperature. So a dropped token's score learns what the token would be
      worth in a kept one's place. A gate that fades a token to zero teaches almost nothing here: it never sees the
      dropped tokens, and language models normalise their inputs.
    - The visual tokens get no gradient through the choice. It is an estimate for the scores, and the projector serves a
      model that is deployed without them.
    - One stage, in front of the language model. `scorer_size` replaces the width of the tokens. No distillation losses:
      slow steps do that. The ratio loss is off, see [`DynamicViTSettings`].

    Inputs: features. Cost: O(N D s + N s^2) for a scorer of width s, a sort, and O(N D) more in training.
    """

    config_class = DynamicViTSettings
    deterministic = False

    def __init__(self, config: DynamicViTSettings):
        super().__init__(config)
        width = config.scorer_size
        self.embed = Float32Linear(config.hidden_size, width)
        self.score = nn.Sequential(
            Float32Linear(width, width // 2),
            nn.GELU(),
            Float32Linear(width // 2, width // 4),
            nn.GELU(),
            Float32Linear(width // 4, 1, bias=False),  # a bias changes no choice
        )

    def reduce(self, tokens: VisualTokens, lengths: list[int]) -> PrunedTokens:
        check_width(tokens.features, self.config.hidden_size)
        with torch.autocast(tokens.features.device.type, enabled=False):
            # Scores (B, N), with noise in training; the K highest are kept, features (B, K, D).
            scores = self.scores(tokens)
            noisy = scores + gumbel_like(scores, tokens.generator) if self.training else scores
            ranked = top_k(noisy.detach(), tokens.valid, max(lengths))
            kept = take(tokens, ranked, lengths, self.config.dropped_tokens)
            if self.training:
                kept.features = relaxed(kept, noisy / self.config.temperature, tokens)
                kept.auxiliary_loss = self.ratio_loss(scores, tokens, lengths)
        return kept

    def scores(self, tokens: VisualTokens) -> torch.Tensor:
        """The score of each token, `(B, N)`."""
        rows = F.layer_norm(tokens.features.detach().float(), tokens.features.shape[-1:])
        # Embed to width s, keep one half per token (B, N, s/2), average the other over the image, and score both.
        own, whole = F.gelu(self.embed(rows)).chunk(2, dim=-1)
        whole = masked_mean(whole, tokens)[:, None].expand_as(own)
        return self.score(torch.cat([own, whole], dim=-1))[..., 0]

    def ratio_loss(self, scores: torch.Tensor, tokens: VisualTokens, lengths: list[int]) -> torch.Tensor | None:
        """Weighted squared distance of the mean keep-probability from the share kept, mean over images; None if off."""
        if not self.config.ratio_weight:
            return None
        # Share kept and mean keep-probability of each image, (B,).
        share = torch.tensor([k / n for k, n in zip(lengths, tokens.lengths, strict=True)])
        share = share.to(scores.device, non_blocking=True)
        probability = masked_mean(scores.sigmoid()[..., None], tokens)[:, 0]
        return self.config.ratio_weight * (probability - share).square().mean()


def masked_mean(rows: torch.Tensor, tokens: VisualTokens) -> torch.Tensor:
    """Mean of `rows` `(B, N, D)` over the real tokens of each image, `(B, D)`, in float32."""
    rows = rows.float()
    if tokens.valid is not None:
        rows = rows.masked_fill(~tokens.valid[..., None], 0)
    counts = torch.tensor(tokens.lengths).to(rows.device, non_blocking=True)
    return rows.sum(1) / counts.clamp(min=1)[:, None]


def gumbel_like(scores: torch.Tensor, generator: torch.Generator | None) -> torch.Tensor:
    """Standard Gumbel noise of the shape of `scores`."""
    draws = torch.empty_like(scores).exponential_(generator=generator)
    return -draws.clamp(min=torch.finfo(draws.dtype).tiny).log()


def relaxed(kept: PrunedTokens, scores: torch.Tensor, tokens: VisualTokens) -> torch.Tensor:
    """The kept features `(B, K, D)`, unchanged, with the gradient of the relaxed choice by `scores` `(B, N)`.

    The relaxed choice replaces each kept token by a softmax-weighted mean of it and the dropped ones.
    """
    features = tokens.features.detach().float()
    # dropped (B, N): real tokens that were not kept.
    dropped = torch.ones_like(scores, dtype=torch.bool) if tokens.valid is None else tokens.valid.clone()
    dropped = dropped.scatter(1, kept.positions, False)
    # Scores of dropped tokens, (B, N). The floor is finite: if none was dropped, the kept one has all weight, not NaN.
    others = scores.masked_fill(~dropped, torch.finfo(scores.dtype).min)
    # Mean of the dropped tokens (B, D), and the weight of each kept one against them (B, K, 1).
    instead = (others.softmax(1)[:, None] @ features)[:, 0]
    own = (scores.gather(1, kept.positions) - others.logsumexp(1, keepdim=True)).sigmoid()[..., None]
    # The mixture (B, K, D) adds exactly zero to the values, only its gradient.
    mixed = own * gather_rows(features, kept.positions) + (1 - own) * instead[:, None]
    return (kept.features.float() + (mixed - mixed.detach())).to(kept.features.dtype)
