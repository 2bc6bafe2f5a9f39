"""FastV: half of the visual tokens are worth little behind the second layer (arXiv 2403.06764)."""

from __future__ import annotations

from dataclasses import dataclass

from ..utils.validation import check_range
from .base import LayerPruner
from .config import PrunerConfig
from .registry import register_pruner


@dataclass
class FastVConfig(PrunerConfig):
    """[`PrunerConfig`] and where tokens are dropped.

    Args:
        layer (`int`): number of language-model layers in front of the drop; the paper's K.
    """

    layer: int = 2

    def __post_init__(self):
        super().__post_init__()
        check_range("layer", self.layer, 1, off="The paper's is 2.")


@register_pruner("fastv")
class FastV(LayerPruner):
    """Keeps the tokens that the instruction attends to most, from behind the language model's first layers on.

    The score is the attention of the last instruction token in layer `layer` (the paper's K, counted from 1), mean over
    heads. Inputs: queries and keys of that layer. Cost: `layer` layers run on all tokens; one row of attention per
    image.

    The official code is made for generation: it queries from the last token of the first sample, keeps a fixed number
    of tokens at a fixed place of every sequence, and drops nothing under gradient checkpointing. Here each image has
    its own budget, wherever it stands. The query is the token in front of the first answer behind the image, so no
    answer takes part in the choice. Gradients flow; those of dropped tokens pass through the first layers only.
    """

    config_class = FastVConfig

    def stages(self, layers: int, pruning_ratio: float) -> dict[int, float]:
        return {self.config.layer: pruning_ratio}
