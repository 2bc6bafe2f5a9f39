"""Farthest-first choice of tokens, and which chosen one each token is most similar to, in two ways.

`batched` is plain PyTorch for any device, and the reference. `kernel` makes the choice of an image in one launch of a
Triton kernel. Rounding aside, they choose the same.
"""

from __future__ import annotations

import logging
import os
from importlib.util import find_spec

import torch

from ...utils.text import one_line
from ..tokens import VisualTokens
from . import batched

logger = logging.getLogger(__name__)

SWITCH = "DUALSPEED_TRITON"  # environment variable; "0" leaves Triton out
TRITON_DEVICES = ("cuda",)
_broken: list[Exception] = []  # why the kernel could not run


@torch.no_grad()
def farthest_first(tokens: VisualTokens, lengths: list[int], plain: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """Chooses `lengths[b]` tokens of image b: first the one whose nearest neighbour is farthest, then always the one
    that is farthest from all chosen ones, by cosine. Of equally far ones the first wins.

    Args:
        tokens ([`VisualTokens`]): B images of N tokens.
        lengths (`list[int]`): tokens to choose of each.
        plain (`bool`): in plain PyTorch for all devices alike.

    Returns:
        Chosen positions in the order of choice, `(B, K)` with anything behind `lengths[b]` of them, and for each token
        the rank in that order of the one that it is most similar to, itself if it is chosen, `(B, N)`.
    """
    features, valid, counts = tokens.features, tokens.valid, tokens.lengths
    plain = plain or torch.compiler.is_compiling()
    if not plain and batched.fitting(features.shape[1]) and triton_runs(features.device):
        from . import kernel

        try:
            with torch.cuda.device_of(features):  # where Triton launches, which is not always the current device
                return kernel.farthest_first(features, valid, counts, lengths)
        except Exception as error:  # no compiler, a card that Triton does not know, ...
            if isinstance(error, torch.OutOfMemoryError):
                raise
            _broken.append(error)
            logger.warning(
                "The Triton kernel that chooses tokens does not run (%s: %s). PyTorch's operations choose them, which "
                "takes longer. %s=0 leaves the kernel out from the start.",
                *(type(error).__name__, one_line(error)[:200], SWITCH),
            )
    return batched.farthest_first(features, valid, lengths)


def triton_runs(device: torch.device) -> bool:
    """Whether there is Triton for such a device, not switched off, and not found to fail."""
    if os.environ.get(SWITCH) == "0" or _broken or device.type not in TRITON_DEVICES:
        return False
    return find_spec("triton") is not None
