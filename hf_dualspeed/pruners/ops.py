"""Tensor operations shared by pruners.

Shapes: B images, N visual tokens, K kept tokens, D hidden. An `owner` `(B, N)` names the slot, 0 to K - 1, that each
token belongs to, and K where it belongs to none.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .config import DISCARD, MERGE
from .tokens import PrunedTokens, VisualTokens, gather_rows

CHUNK = 1024  # tokens compared with the kept ones at a time


def unpruned(tokens: VisualTokens) -> PrunedTokens:
    """All tokens, in the form that a pruner returns."""
    # positions and sizes (B, N): each token is its own and stands for itself.
    device = tokens.features.device
    positions = torch.arange(tokens.features.shape[1], device=device).expand(len(tokens.lengths), -1)
    sizes = torch.ones(positions.shape, device=device) if tokens.valid is None else tokens.valid.float()
    return PrunedTokens(tokens.features, positions, tokens.valid, list(tokens.lengths), sizes=sizes)


def kept_mask(lengths: list[int], device: torch.device) -> torch.Tensor | None:
    """`(B, K)`, True on the first `lengths[b]` slots of row b; None if all rows are full."""
    most = max(lengths)
    if min(lengths) == most:
        return None
    counts = torch.tensor([[length] for length in lengths]).to(device, non_blocking=True)
    return torch.arange(most, device=device) < counts


def in_source_order(
    ranked: torch.Tensor, lengths: list[int], count: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Sorts the first `lengths[b]` of the `(B, K)` positions ascending.

    Returns:
        Positions, the ranks they had, and which are valid (None if all are), each `(B, K)`.
    """
    valid = kept_mask(lengths, ranked.device)
    # Padding gets a position beyond all real ones and sorts to the end, (B, K).
    if valid is not None:
        ranked = ranked.masked_fill(~valid, count)
    positions, order = ranked.sort(dim=1)
    return positions.clamp(max=count - 1), order, valid


def take(
    tokens: VisualTokens,
    ranked: torch.Tensor,
    lengths: list[int],
    dropped_tokens: str = MERGE,
    nearest: torch.Tensor | None = None,
) -> PrunedTokens:
    """Keeps the first `lengths[b]` of the `ranked` `(B, K)` positions, in source order.

    Each dropped token belongs to its most similar kept token: it is averaged into it ("merge") or only counted for it
    ("discard").

    Args:
        nearest (`torch.LongTensor` of shape `(B, N)`, *optional*): the rank of each token's most similar kept one, its
            own if it is kept, if the pruner knows them.
    """
    most = ranked.shape[1]
    positions, order, valid = in_source_order(ranked, lengths, tokens.features.shape[1])
    if nearest is None:
        owner = nearest_kept(tokens, positions, valid)
    else:
        # The slot that each token's rank was sorted into, (B, N).
        owner = order.argsort(dim=1).gather(1, nearest)
        owner = owner if tokens.valid is None else owner.masked_fill(~tokens.valid, most)
    sizes = counts(owner, most)
    if dropped_tokens == DISCARD:
        return PrunedTokens(gather_rows(tokens.features, positions), positions, valid, lengths, sizes=sizes)

    def merge(features: torch.Tensor) -> torch.Tensor:
        return means(features, owner, sizes)

    return PrunedTokens(merge(tokens.features), positions, valid, lengths, merge, sizes)


@torch.no_grad()
def nearest_kept(tokens: VisualTokens, positions: torch.Tensor, valid: torch.Tensor | None) -> torch.Tensor:
    """The `owner` `(B, N)` of each token: the slot of its most similar (cosine) kept token, at `positions` `(B, K)`.

    A kept token owns itself. Of equally similar ones the first wins.
    """
    most, count = positions.shape[1], tokens.features.shape[1]
    # Cosine of each token with each kept one, in chunks (B, n, K), and its argmax (B, N).
    with torch.autocast(tokens.features.device.type, enabled=False):
        units = F.normalize(tokens.features.detach().float(), dim=-1)
        kept = gather_rows(units, positions).mT
        hidden = None if valid is None else ~valid[:, None]
        parts = [part @ kept for part in units.split(CHUNK, dim=1)]
        parts = parts if hidden is None else [part.masked_fill_(hidden, float("-inf")) for part in parts]
        owner = torch.cat([part.argmax(dim=2) for part in parts], dim=1)
    # Kept tokens own themselves, even if another one equals them. Padding slots write to column N, which is cut off.
    slots = torch.arange(most, device=positions.device).expand_as(positions)
    at = positions if valid is None else positions.masked_fill(~valid, count)
    owner = F.pad(owner, (0, 1)).scatter(1, at, slots)[:, :count]
    return owner if tokens.valid is None else owner.masked_fill(~tokens.valid, most)


def counts(owner: torch.Tensor, most: int) -> torch.Tensor:
    """How many tokens belong to each of `most` slots, `(B, most)`."""
    # One more column for tokens without a slot.
    found = torch.zeros(len(owner), most + 1, device=owner.device)
    return found.scatter_add_(1, owner, torch.ones_like(owner, dtype=found.dtype))[:, :most]


def means(features: torch.Tensor, owner: torch.Tensor, sizes: torch.Tensor) -> torch.Tensor:
    """The mean of the `features` `(B, N, D)` in each slot, `(B, K, D)`, summed in float32; `sizes` is `(B, K)`."""
    batch, most = sizes.shape
    # Row of sums of each token, (B, N): K rows for an image's slots and one for tokens without a slot.
    rows = owner + torch.arange(0, batch * (most + 1), most + 1, device=owner.device)[:, None]
    # Sum tokens by row, (B * (K + 1), D), and cut the last row of each image off, (B, K, D).
    sums = torch.zeros(batch * (most + 1), features.shape[-1], device=features.device)
    sums = sums.index_add(0, rows.flatten(), features.flatten(0, 1).float()).view(batch, most + 1, -1)[:, :most]
    return (sums / sizes.clamp(min=1)[..., None]).to(features.dtype)


def members(owner: torch.Tensor, most: int) -> torch.Tensor:
    """1 where a token belongs to a slot and 0 elsewhere, `(B, most, N)`."""
    batch, count = owner.shape
    found = torch.zeros(batch, most + 1, count, device=owner.device)
    return found.scatter_(1, owner[:, None], 1.0)[:, :most]


def top_k(scores: torch.Tensor, valid: torch.Tensor | None, k: int) -> torch.Tensor:
    """Positions of the `k` highest `(B, N)` scores, best first, `(B, k)`; ties go to the earlier position."""
    scores = scores.float()
    if valid is not None:
        scores = scores.masked_fill(~valid, float("-inf"))
    return scores.sort(dim=1, descending=True, stable=True).indices[:, :k]
