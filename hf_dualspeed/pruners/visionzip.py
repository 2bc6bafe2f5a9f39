"""VisionZip: the most attended tokens, and a few that stand for the rest (arXiv 2412.04467)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from ..utils.validation import check_range
from .clustering import ClusteringPruner, nearest, on_device, patches, real_tokens
from .config import PrunerConfig
from .ops import top_k
from .registry import register_pruner
from .tokens import VisualTokens, gather_rows


@dataclass
class VisionZipConfig(PrunerConfig):
    """Settings of `visionzip`.

    Args:
        contextual_ratio (`float`): contextual fraction of the kept tokens, rounded half up; the others are dominant.
            The official example keeps 54 + 10.
    """

    contextual_ratio: float = 10 / 64

    def __post_init__(self):
        super().__post_init__()
        check_range("contextual_ratio", self.contextual_ratio, 0, 1, off="Use 0.0 to keep dominant tokens alone.")


@register_pruner("visionzip")
class VisionZipPruner(ClusteringPruner):
    """Keeps the most attended tokens and merges the rest into a few contextual ones by key similarity.

    Dominant tokens receive the most attention in the vision tower's penultimate layer. Evenly spaced ones of the rest
    are targets. Each other token joins the target with the most similar key (cosine, mean over heads), and the target
    becomes the mean of its tokens. Inputs: the vision tower's attention and keys. Cost: one (N, C) product for C
    contextual tokens, and the attention of `cls_attention`.

    The official code adds the mean of the joining tokens to the target, which makes its norm grow; here the target is
    the mean of all. The official code spaces targets by whole steps, which leaves the end of the image without a target
    if C does not divide the rest; here they are spread over the whole image. One of its dominant tokens is [CLS], which
    models drop before we see their tokens. Tokens that come from no patch (newlines) have no key: they join nothing,
    and become targets only if there are too few others.
    """

    config_class = VisionZipConfig
    drops = True
    needs = frozenset({"attention", "keys"})

    def homes(self, tokens: VisualTokens, lengths: list[int]) -> torch.Tensor:
        batch, count = tokens.features.shape[:2]
        contextual = [math.floor(keep * self.config.contextual_ratio + 0.5) for keep in lengths]
        most = max(contextual)
        # Kept and contextual tokens of each image, (B, 1).
        kept, aside = on_device(lengths, tokens), on_device(contextual, tokens)
        index = torch.arange(count, device=kept.device).expand(batch, -1)

        # dominant (B, N): ranks of attention below the dominant budget; these keep their own home.
        dominant = top_k(tokens.attention, tokens.valid, count).argsort(dim=1) < kept - aside
        home = torch.where(dominant, index, count)
        if not most:
            return home
        slot = torch.arange(most, device=kept.device).expand(batch, -1)
        # The rest in source order, tokens with a key first, (B, N).
        rest = real_tokens(tokens) & ~dominant
        comparable = rest & patches(tokens)
        in_line = (comparable.byte() + rest.byte()).sort(dim=1, descending=True, stable=True).indices
        # Positions of the targets, evenly spaced over it, (B, C).
        spread = torch.maximum(comparable.sum(1, keepdim=True), aside)
        place = torch.where(slot < aside, slot * spread // aside.clamp(min=1), 0)
        targets = in_line.gather(1, place)

        # The target with the most similar key becomes each token's home, (B, N). Without contextual tokens, an image
        # drops the rest.
        keys = F.normalize(tokens.keys.float(), dim=-1)
        _, joined = nearest(keys, gather_rows(keys, targets), slot < aside)
        home = torch.where(comparable & (aside > 0), targets.gather(1, joined), home)
        # Targets are their own home; slots beyond an image's C write to column N, which is cut off.
        own = F.pad(home, (0, 1)).scatter(1, torch.where(slot < aside, targets, count), targets)
        return own[:, :count]
