"""Input and output of a pruner."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from ..utils.validation import check_fields, shortened

NEEDS = frozenset({"grid", "attention", "keys", "text"})


@dataclass
class VisualTokens:
    """The visual tokens of B images, padded to N.

    Args:
        features (`torch.Tensor` of shape `(B, N, D)`): projected visual tokens.
        valid (`torch.BoolTensor` of shape `(B, N)`, *optional*): False on padding, at the end of a row.
        grid (`torch.LongTensor` of shape `(B, N, 3)`, *optional*): (t, row, column) of each token.
        attention (`torch.Tensor` of shape `(B, N)`, *optional*): attention each token receives in the vision tower.
        keys (`torch.Tensor` of shape `(B, N, Dk)`, *optional*): attention keys of the vision tower, mean over heads;
            zeros for tokens that come from no patch.
        text (`torch.Tensor` of shape `(B, T, D)`, *optional*): instruction embeddings; never answer tokens.
        text_valid (`torch.BoolTensor` of shape `(B, T)`, *optional*): True on instruction tokens; an image may have
            none.
        generator (`torch.Generator`, *optional*): source of randomness, on the features' device.
        lengths (`list[int]`, *optional*): tokens per image. With `valid`, it saves a host synchronisation.
        defer_checks (`bool`): the caller reads `PrunedTokens.finite` itself, where it waits for the device anyway.
    """

    features: torch.Tensor
    valid: torch.Tensor | None = None
    grid: torch.Tensor | None = None
    attention: torch.Tensor | None = None
    keys: torch.Tensor | None = None
    text: torch.Tensor | None = None
    text_valid: torch.Tensor | None = None
    generator: torch.Generator | None = None
    lengths: list[int] | None = None
    defer_checks: bool = False

    def __post_init__(self):
        check_fields(self)
        if self.features.dim() != 3:
            raise ValueError(f"`features` must be of shape (B, N, D), got {tuple(self.features.shape)}.")
        if not self.features.is_floating_point():
            raise ValueError(f"`features` must hold floating-point numbers, got {self.features.dtype}.")
        batch, count, _ = self.features.shape
        for name in ("valid", "grid", "attention", "keys"):
            tensor = getattr(self, name)
            if tensor is not None and tensor.shape[:2] != (batch, count):
                raise ValueError(
                    f"`{name}` must begin with the shape ({batch}, {count}) of `features`, got {tuple(tensor.shape)}."
                )
        if self.text is not None and (self.text.dim() != 3 or len(self.text) != batch):
            raise ValueError(f"`text` must be of shape ({batch}, T, D), got {tuple(self.text.shape)}.")
        if self.text_valid is not None and (self.text is None or self.text_valid.shape != self.text.shape[:2]):
            raise ValueError(f"`text_valid` must be of the shape (B, T) of `text`, got {tuple(self.text_valid.shape)}.")
        for name in ("valid", "text_valid"):
            mask = getattr(self, name)
            if mask is not None and mask.dtype != torch.bool:
                raise ValueError(f"`{name}` must hold True and False, got {mask.dtype}.")
        if self.lengths is not None and (len(self.lengths) != batch or not all(0 <= n <= count for n in self.lengths)):
            raise ValueError(f"`lengths` must be {batch} numbers from 0 to {count}, got {shortened(self.lengths)}.")
        if self.lengths is None:
            self.lengths = [count] * batch if self.valid is None else self.valid.sum(1).tolist()


def gather_rows(features: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Gathers rows of `features` `(B, N, D)` at `positions` `(B, K)`, `(B, K, D)`."""
    return features.gather(1, positions[..., None].expand(-1, -1, features.shape[-1]))


@dataclass
class PrunedTokens:
    """Output of a pruner.

    Args:
        features (`torch.Tensor` of shape `(B, K, D)`): kept or merged tokens.
        positions (`torch.LongTensor` of shape `(B, K)`): their source positions, ascending in each row.
        valid (`torch.BoolTensor` of shape `(B, K)`, *optional*): False on padding; None if every row holds K.
        lengths (`list[int]`): kept tokens per image.
        merge (`Callable`, *optional*): merges other features of the same tokens alike, `(B, N, D')` to `(B, K, D')`.
        sizes (`torch.Tensor` of shape `(B, K)`, *optional*): source tokens that each one stands for, in float32; a row
            sums to its source tokens, padding is 0. If `reduce` gives none, they are counted by the nearest kept token.
        finite (scalar `torch.BoolTensor`, *optional*): whether the features are finite; None if none was pruned.
        auxiliary_loss (scalar `torch.Tensor`, *optional*): loss of a learned pruner in training mode, weighted, mean
            over images. The trainer takes the mean over micro-batches.
    """

    features: torch.Tensor
    positions: torch.Tensor
    valid: torch.Tensor | None
    lengths: list[int]
    merge: Callable[[torch.Tensor], torch.Tensor] | None = None
    sizes: torch.Tensor | None = None
    finite: torch.Tensor | None = None
    auxiliary_loss: torch.Tensor | None = None

    def __post_init__(self):
        batch, most = len(self.lengths), max(self.lengths)
        width = self.positions.shape[-1]
        for name in ("positions", "features", "valid", "sizes"):
            tensor = getattr(self, name)
            if tensor is not None and tensor.shape[:2] != (batch, width):
                raise ValueError(
                    f"`{name}` must begin with the shape (B, K), ({batch}, {width}) by `lengths` and `positions`, got "
                    f"{tuple(tensor.shape)}."
                )
        if width < most or (self.valid is None and width > min(self.lengths)):
            raise ValueError(
                f"`lengths` are {shortened(self.lengths)}, but rows hold {width} tokens, `valid` is "
                f"{'None' if self.valid is None else 'given'}: rows are as long as the most of `lengths`, and `valid` "
                "is False behind the tokens of those that keep fewer."
            )

    def apply_to(self, features: torch.Tensor) -> torch.Tensor:
        """Prunes other features `(B, N, D')` of the same tokens alike, `(B, K, D')`."""
        return self.merge(features) if self.merge is not None else gather_rows(features, self.positions)
