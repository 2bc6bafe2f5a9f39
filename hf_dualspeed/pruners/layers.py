"""What pruners share that drop tokens between the layers of the language model."""

from __future__ import annotations

from typing import ClassVar

import torch

from .base import Pruner, VisualTokens, highest


class LayerPruner(Pruner):
    """Drops visual tokens between layers of the language model: the first layers see all of them.

    [`stages`] says where, and how many; [`rank`] which: by default those that the last instruction token attends to
    least. Nothing is dropped from the inputs, so `prune_inputs` refuses such a pruner; the trainer and
    `prune_visual_tokens` take it. Called by itself, it keeps what its last stage would keep, in one step.

    At a stage `rank` is given the hidden states as `VisualTokens.features` `(U, N, D)` and, as
    `VisualTokens.attention` `(U, N)`, the attention that the last instruction token pays to each visual token, mean
    over heads, in the layer before. N counts the tokens that earlier stages left.
    """

    in_language_model: ClassVar[bool] = True

    def stages(self, layers: int) -> dict[int, float]:
        """Where tokens are dropped in a language model of so many layers: {index of the layer in front of which, from
        1 to `layers - 1`: fraction of each image's tokens that is gone from there on}."""
        raise NotImplementedError(f"{type(self).__name__} must implement `stages`.")

    def rank(self, tokens: VisualTokens, most: int) -> torch.Tensor:
        if tokens.attention is None:
            raise ValueError(f"The pruner {self.config.pruner_type!r} needs `VisualTokens.attention`, got None.")
        return highest(tokens.attention, tokens.valid, most)
