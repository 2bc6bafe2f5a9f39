"""A pruner for the ablation alone: another pruner's choice, moved by rounds of k-means.

It costs products of matrices alone where the other pruner does.

Shapes: B images, N visual tokens, K kept tokens, D hidden.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from hf_dualspeed.pruners import AutoPruner, register_pruner
from hf_dualspeed.pruners.clustering import ClusteringPruner, averaged
from hf_dualspeed.pruners.config import PrunerConfig
from hf_dualspeed.pruners.ops import counts, means, nearest_kept
from hf_dualspeed.pruners.tokens import PrunedTokens, VisualTokens
from hf_dualspeed.utils.validation import check_range

NAME = "kmeans"


@dataclass
class KMeansConfig(PrunerConfig):
    """[`PrunerConfig`], the pruner whose choice is refined, and the number of rounds."""

    start: str = "random"
    rounds: int = 1

    def __post_init__(self):
        super().__post_init__()
        check_range("rounds", self.rounds, 1)


@register_pruner(NAME)
class KMeans(ClusteringPruner):
    """Replaces kept tokens by means of clusters: those around another pruner's choice, after rounds of k-means.

    A round moves each centre to the mean of its tokens, and each token to the most similar centre (cosine). A cluster
    lies where its most similar token lies, which stays in it, so that none becomes empty.
    """

    config_class = KMeansConfig

    def __init__(self, config: KMeansConfig):
        super().__init__(config)
        self.first = AutoPruner.from_name(config.start, pruning_ratio=config.pruning_ratio)

    @property
    def deterministic(self) -> bool:
        return self.first.deterministic

    def reduce(self, tokens: VisualTokens, lengths: list[int]) -> PrunedTokens:
        with torch.no_grad(), torch.autocast(tokens.features.device.type, enabled=False):
            chosen = self.first.reduce(tokens, lengths)
            home = refined(tokens, chosen.positions, chosen.valid, self.config.rounds)
        return averaged(tokens, home, lengths, drops=False)


def refined(tokens: VisualTokens, positions: torch.Tensor, valid: torch.Tensor | None, rounds: int) -> torch.Tensor:
    """The position that each token is merged into, `(B, N)`, N on padding, after rounds from `positions` `(B, K)`."""
    count, most = tokens.features.shape[1], positions.shape[1]
    units = F.normalize(tokens.features.detach().float(), dim=-1)
    owner = nearest_kept(tokens, positions, valid)
    slots = torch.arange(most, device=positions.device)
    for _ in range(rounds):
        # Centres (B, K, D), and their similarity to each token, (B, N, K).
        centres = F.normalize(means(units, owner, counts(owner, most)), dim=-1)
        similarity = units @ centres.mT
        # The token of each cluster that is most like its centre (B, K), in none of the others.
        inside = owner[..., None] == slots
        positions = similarity.masked_fill(~inside, float("-inf")).argmax(1)
        # Each token goes to the most similar centre (B, N), and those tokens to their own.
        hidden = similarity if valid is None else similarity.masked_fill(~valid[:, None], float("-inf"))
        at = positions if valid is None else positions.masked_fill(~valid, count)
        owner = F.pad(hidden.argmax(2), (0, 1)).scatter(1, at, slots.expand_as(at))[:, :count]
        owner = owner if tokens.valid is None else owner.masked_fill(~tokens.valid, most)
    # Slots to positions (B, N); slot K, that of padding, is position N.
    homes = F.pad(positions if valid is None else positions.masked_fill(~valid, count), (0, 1), value=count)
    return homes.gather(1, owner)
