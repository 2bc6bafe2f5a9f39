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

# Multiples of these, modulo 1, fill a line, a square and a cube evenly from the first one on: powers of the inverse
# of the plastic number for (row, column), and the like of the next dimension for t.
SPREAD = (0.8191725134, 0.7548776662, 0.5698402910)


@dataclass
class TokenLearnerSettings(PrunerConfig):
    """Settings of `token_learner`.

    Args:
        hidden_size (`int`): width D of the visual tokens, that of the language model; the trainer fills it in.
        max_tokens (`int`): learned maps, the most tokens that an image may keep.
        bottleneck_size (`int`): width in which tokens and maps meet; 64 in the official code.
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
    map, a softmax over the positions makes the scores weights. It learns from the loss of fast steps, end to end.

    Where we part from it: K follows from the image and the ratio, so there are `max_tokens` maps, of which an image
    uses the first K. The official maps see positions in the features of a vision transformer trained with them; ours
    start behind any tower, from noise that would make all K sums the same mean. So map k begins as a round region
    about a place of its own, the first K of which cover the image evenly for any K, with a learned reach (`focus`)
    that can widen to the whole image. Places are fixed; without a grid they lie on the line of the tokens.

    A merged token stands where its map is highest. Maps that share a place move on to the next free ones, in the
    order of their number, so that positions are unique; the tokens come in the order of their positions.

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
        self.check(tokens)
        return super().forward(tokens, progress)

    def reduce(self, tokens: VisualTokens, lengths: list[int]) -> PrunedTokens:
        device = tokens.features.device
        with torch.autocast(device.type, enabled=False):
            weights = self.weights(tokens, lengths)
        with torch.no_grad():
            positions, order, valid = unique_places(weights.argmax(-1), lengths, tokens.lengths, weights.shape[-1])
        weights = weights.gather(1, order[..., None].expand_as(weights))
        # Every map weighs all tokens, so each stands for an equal share of them.
        shares = torch.tensor([[n / k] for n, k in zip(tokens.lengths, lengths, strict=True)])
        sizes = shares.to(device, non_blocking=True).expand(positions.shape)
        sizes = sizes if valid is None else sizes * valid

        def merge(features: torch.Tensor) -> torch.Tensor:
            with torch.autocast(device.type, enabled=False):
                return (weights @ features.float()).to(features.dtype)

        return PrunedTokens(merge(tokens.features), positions, valid, lengths, merge, sizes)

    def weights(self, tokens: VisualTokens, lengths: list[int]) -> torch.Tensor:
        """The first `max(lengths)` maps of each image, `(B, K, N)`, each of sum 1; 0 on padding."""
        rows = F.layer_norm(tokens.features.float(), tokens.features.shape[-1:])
        scores = self.maps(F.gelu(self.project(rows)), max(lengths)).mT
        scores = scores - self.focus[: max(lengths)].float().exp()[:, None] * distances(tokens, lengths)
        if tokens.valid is not None:
            scores = scores.masked_fill(~tokens.valid[:, None], float("-inf"))
        return scores.softmax(-1)

    def check(self, tokens: VisualTokens) -> None:
        """Raises a `ValueError` for tokens of another width, and for more of them than there are maps, be it later in
        training. Where nothing is ever pruned, there need be no maps."""
        check_width(tokens.features, self.config.hidden_size)
        changes = self.training and self.config.pruning_schedule != "constant"
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

    In the unit in which exp(-distance) is a normal distribution with a sigma half as broad as a place's share.
    """
    device, most = tokens.features.device, max(lengths)
    at, used = coordinates(tokens)
    places = (
        torch.arange(1, most + 1, device=device)[:, None] * torch.tensor(SPREAD).to(device, non_blocking=True) + 0.5
    ) % 1
    apart = (at[:, None] - places[:, None]) * used[:, None, None]
    kept = torch.tensor(lengths, dtype=torch.float32).to(device, non_blocking=True)
    share = kept ** (2 / used.sum(-1).clamp(min=1))
    return 2 * share[:, None, None] * apart.square().sum(-1)


def coordinates(tokens: VisualTokens) -> tuple[torch.Tensor, torch.Tensor]:
    """(t, row, column) of each token in [0, 1], `(B, N, 3)`, and along which of them an image extends, `(B, 3)`."""
    batch, count = tokens.features.shape[:2]
    grid = tokens.grid
    if grid is None:
        line = torch.arange(count, device=tokens.features.device)
        grid = torch.stack([torch.zeros_like(line), torch.zeros_like(line), line], -1).expand(batch, -1, -1)
    real = grid if tokens.valid is None else grid.masked_fill(~tokens.valid[..., None], 0)
    extent = real.amax(1) + 1
    return (grid + 0.5) / extent[:, None], (extent > 1).float()


def unique_places(
    places: torch.Tensor, lengths: list[int], counts: list[int], most_tokens: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Sorts places `(B, K)` ascending and moves each that is taken to the next free one: positions, order, validity.

    Args:
        lengths, counts (`list[int]`): kept and all tokens of each image.
        most_tokens (`int`): N, with padding.
    """
    device, most = places.device, places.shape[1]
    slot = torch.arange(most, device=device)
    # One key for place and map, so that maps of one place sort by their number.
    keys, order, valid = in_source_order(places * most + slot, lengths, most_tokens * most)
    # Ascending by at least one each, then as far from the image's end as those that follow need.
    positions = (keys // most - slot).cummax(1).values + slot
    spare = torch.tensor([n - k for n, k in zip(counts, lengths, strict=True)]).to(device, non_blocking=True)
    positions = torch.minimum(positions, spare[:, None] + slot)
    return positions.clamp(max=most_tokens - 1), order, valid
