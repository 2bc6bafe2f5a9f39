"""PyramidDrop: a falling share of the visual tokens, stage by stage (arXiv 2410.17247)."""

from __future__ import annotations

from dataclasses import dataclass

from ..utils.validation import check_range
from .base import LayerPruner
from .config import PrunerConfig
from .registry import register_pruner


@dataclass
class PyramidDropConfig(PrunerConfig):
    """[`PrunerConfig`] and the stages; `pruning_ratio` holds behind the last one.

    Args:
        stages (`tuple[float, ...]`): depths at which tokens are dropped, ascending fractions of the number of layers.
    """

    stages: tuple[float, ...] = (0.25, 0.5, 0.75)

    def __post_init__(self):
        super().__post_init__()
        if not self.stages:
            raise ValueError(f"`stages` must be a list of depths such as [0.25, 0.5, 0.75], got {self.stages!r}.")
        for depth in self.stages:
            check_range("stages", depth, 0, 1, left_open=True, right_open=True, off="Depths are fractions of layers.")
        if sorted(set(self.stages)) != list(self.stages):
            raise ValueError(f"`stages` must ascend, got {self.stages!r}. Sort the depths, each once.")
        self.stages = tuple(self.stages)  # a list in JSON


@register_pruner("pyramiddrop")
class PyramidDrop(LayerPruner):
    """Keeps a share of the tokens that falls with the language model's depth, by the instruction's attention.

    Stage i of n leaves the fraction `(1 - pruning_ratio) ** (i / n)` of each image's tokens, so each stage drops the
    same share of what the one before left. `pruning_ratio=0.875` with three stages gives the paper's 1/2, 1/4 and 1/8.
    The score is the attention of the last instruction token, mean over heads, in the layer before the stage. Inputs:
    queries and keys of these layers. Cost: the average share of tokens over all layers, far more than that of a pruner
    in front of the language model at the same ratio; one row of attention per image and stage.

    A stage at depth f of L layers lies behind `floor(f * L)` of them (8, 16 and 24 of 32, as in the paper), but at
    least behind the first. If several stages fall on one layer, the last counts.

    The official code scores by projecting the stage's hidden states again with the next layer's weights. Here the
    attention is that of the layer before, which costs no projection and fits any architecture. The official code
    averages the queries in front of all answers of a conversation, so later turns choose for earlier ones; here the
    query is the token in front of the first answer behind the image. It renumbers positions at each stage; here tokens
    keep theirs. Padding may be on either side.
    """

    config_class = PyramidDropConfig

    def stages(self, layers: int, pruning_ratio: float) -> dict[int, float]:
        depths, kept = self.config.stages, 1 - pruning_ratio
        # The last stage takes the ratio itself: `1 - kept` may round differently.
        gone = [1 - kept ** (i / len(depths)) for i in range(1, len(depths))] + [pruning_ratio]
        return {max(1, int(depth * layers + 1e-6)): share for depth, share in zip(depths, gone, strict=True)}
