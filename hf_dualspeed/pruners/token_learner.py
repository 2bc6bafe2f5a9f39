"""TokenLearner: a few learned weighted sums of all tokens (arXiv 2106.11297)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from ..utils.validation import check_range
from .base import Pruner
from .config import PrunerConfig, budget
from .learned import Float32Linear, check_width
from .ops import in_source_order
from .registry import register_pruner
from .tokens import PrunedTokens, VisualTokens

# Multiples of these, modulo 1, cover a line, a square and a cube evenly, however many there are: powers of the inverse
# of the plastic number for (row, column), and its counterpart of the next dimension for t.
SPREAD = (0.8191725134, 0.7548776662, 0.5698402910)


@dataclass
class TokenLearnerSettings(PrunerConfig):
    """Settings of `token_learner`.

    Args:
        hidden_size (`int`): width D of the visual tokens, equal to the language model's; the trainer fills it in.
        max_tokens (`int`): number of learned maps, the most tokens that an image may keep.
        bottleneck_size (`int`): width of the bottleneck between tokens and maps; 64 in the official code.
    """

    hidden_size: int = 4096
    max_tokens: int = 1024
    bottleneck_size: int = 64

    def __post_init__(self):
        super().__post_init__()
        for name in ("hidden_size", "max_tokens", "bottleneck_size"):
            check_range(name, getattr(self, name), 1)


@register_pruner("token_learner")
class TokenLearner(Pruner):
    """Learns K maps over the tokens and keeps the sum that each of them weighs out (merges).

    TokenLearner 1.1 (arXiv 2106.11297, and its official code): an MLP with a bottleneck scores each token for each
    map; a softmax over the positions turns scores into weights. It learns from the loss of fast steps, end to end.

    Differences: K follows from the image and the ratio, so there are `max_tokens` maps, and an image uses the first K.
    The official maps are trained with their vision transformer, whose features contain positions. Ours start behind any
    tower, from noise that would make all K sums the same mean. So map k starts as a round region around a place of its
    own, with a learned reach (`focus`) that can widen to the whole image. For any K, the first K places cover the image
    evenly. Places are fixed; without a grid they lie on the line of the tokens.

    A merged token stands where its map is highest. If maps share a place, later ones move to the next free place, so
    positions are unique. The tokens come in the order of their positions.

    Inputs: features, and the grid if there is one. Cost: O(N D b + N K (b + D)) for a bottleneck of b.
    """

    config_class = TokenLearnerSettings
    needs = frozenset({"grid"})
    merges = True

    def __init__(self, config: TokenLearnerSettings):
        super().__init__(config)
        self.project = Float32Linear(config.hidden_size, config.bottleneck_size)
        self.maps = Float32Linear(config.bottleneck_size, config.max_tokens, bias=False)  # a softmax drops a bias
        self.focus = nn.Parameter(torch.zeros(config.max_tokens))

    def forward(self, tokens: VisualTokens, progress: float = 1.0) -> PrunedTokens:
        if isinstance(tokens, VisualTokens):
            self.check(tokens, progress)
        return super().forward(tokens, progress)

    def reduce(self, tokens: VisualTokens, lengths: list[int]) -> PrunedTokens:
        device = tokens.features.device
        # Maps (B, K, N), sorted by the position (B, K) at which each one is highest.
        with torch.autocast(device.type, enabled=False):
            weights = self.weights(tokens, lengths)
        with torch.no_grad():
            positions, order, valid = unique_places(weights.argmax(-1), lengths, tokens.lengths, weights.shape[-1])
        weights = weights.gather(1, order[..., None].expand_as(weights))
        # sizes (B, K): every map weighs all tokens, so each stands for an equal share, N / K.
        shares = torch.tensor([[n / max(1, k)] for n, k in zip(tokens.lengths, lengths, strict=True)])
        sizes = shares.to(device, non_blocking=True).expand(positions.shape)
        sizes = sizes if valid is None else sizes * valid

        def merge(features: torch.Tensor) -> torch.Tensor:
            # (B, K, N) @ (B, N, D') to (B, K, D').
            with torch.autocast(device.type, enabled=False):
                return (weights @ features.float()).to(features.dtype)

        return PrunedTokens(merge(tokens.features), positions, valid, lengths, merge, sizes)

    def weights(self, tokens: VisualTokens, lengths: list[int]) -> torch.Tensor:
        """The first `max(lengths)` maps of each image, `(B, K, N)`. Each sums to 1; padding is 0."""
        # Scores of the MLP (B, K, N), minus the distance from the map's place, scaled by its focus.
        rows = F.layer_norm(tokens.features.float(), tokens.features.shape[-1:])
        scores = self.maps(F.gelu(self.project(rows)), max(lengths)).mT
        scores = scores - self.focus[: max(lengths)].float().exp()[:, None] * distances(tokens, lengths)
        if tokens.valid is not None:
            scores = scores.masked_fill(~tokens.valid[:, None], float("-inf"))
        return scores.softmax(-1)

    def check(self, tokens: VisualTokens, progress: float) -> None:
        """Raises a `ValueError` if the tokens have another width, or an image keeps more of them than there are maps.

        In training, the lowest ratio of a schedule counts. A ratio that never prunes needs no maps.
        """
        check_width(tokens.features, self.config.hidden_size)
        changes = (self.training or progress < 1) and self.config.pruning_schedule != "constant"
        ratio = self.config.lowest_ratio if changes else self.config.pruning_ratio
        count = max(tokens.lengths)
        most = budget(count, ratio)
        if most > self.config.max_tokens and (changes or most < count):
            raise ValueError(
                f"`max_tokens` is {self.config.max_tokens}, but an image of {count} tokens keeps {most} at the pruning "
                f"ratio {ratio:g}. Set max_tokens={most} or more, or prune more (pruning_ratio, and "
                "initial_pruning_ratio of a schedule)."
            )


def distances(tokens: VisualTokens, lengths: list[int]) -> torch.Tensor:
    """Squared distance of each token from each of the K places, `(B, K, N)`.

    Its scale makes exp(-distance) a normal distribution whose sigma is half the width of a place's share.
    """
    device, most = tokens.features.device, max(lengths)
    at, used = coordinates(tokens)
    # places (K, 3) of a low-discrepancy sequence; differences along the used axes, (B, K, N, 3).
    places = (
        torch.arange(1, most + 1, device=device)[:, None] * torch.tensor(SPREAD).to(device, non_blocking=True) + 0.5
    ) % 1
    apart = (at[:, None] - places[:, None]) * used[:, None, None]
    # Squared inverse width of a place's share, (B,): K ** (2 / number of used axes).
    kept = torch.tensor(lengths, dtype=torch.float32).to(device, non_blocking=True)
    share = kept ** (2 / used.sum(-1).clamp(min=1))
    return 2 * share[:, None, None] * apart.square().sum(-1)


def coordinates(tokens: VisualTokens) -> tuple[torch.Tensor, torch.Tensor]:
    """(t, row, column) of each token in [0, 1], `(B, N, 3)`, and 1 on the axes that an image uses, `(B, 3)`."""
    batch, count = tokens.features.shape[:2]
    grid = tokens.grid
    # Without a grid, all tokens lie in one row, (B, N, 3).
    if grid is None:
        line = torch.arange(count, device=tokens.features.device)
        grid = torch.stack([torch.zeros_like(line), torch.zeros_like(line), line], -1).expand(batch, -1, -1)
    real = grid if tokens.valid is None else grid.masked_fill(~tokens.valid[..., None], 0)
    extent = real.amax(1) + 1
    return (grid + 0.5) / extent[:, None], (extent > 1).float()


def unique_places(
    places: torch.Tensor, lengths: list[int], counts: list[int], most_tokens: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Sorts places `(B, K)` ascending and moves each that is taken to the next free one.

    Args:
        lengths, counts (`list[int]`): kept and all tokens of each image.
        most_tokens (`int`): N, with padding.

    Returns:
        Positions, the maps that they belong to, and which are valid (None if all are), each `(B, K)`.
    """
    device, most = places.device, places.shape[1]
    slot = torch.arange(most, device=device)
    # Sort by a key of place and map, (B, K): maps of one place follow their number.
    keys, order, valid = in_source_order(places * most + slot, lengths, most_tokens * most)
    # Strictly ascending positions, each at most as late as leaves room for those that follow.
    positions = (keys // most - slot).cummax(1).values + slot
    spare = torch.tensor([n - k for n, k in zip(counts, lengths, strict=True)]).to(device, non_blocking=True)
    positions = torch.minimum(positions, spare[:, None] + slot)
    return positions.clamp(max=most_tokens - 1), order, valid
