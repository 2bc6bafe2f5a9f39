"""Tensor operations that several pruners share."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .config import DISCARD, MERGE
from .tokens import PrunedTokens, VisualTokens, gather_rows

# Tokens that are compared with the kept ones at a time.
CHUNK = 1024


def unpruned(tokens: VisualTokens) -> PrunedTokens:
    """All tokens, as a pruner returns them."""
    device = tokens.features.device
    positions = torch.arange(tokens.features.shape[1], device=device).expand(len(tokens.lengths), -1)
    sizes = torch.ones(positions.shape, device=device) if tokens.valid is None else tokens.valid.float()
    return PrunedTokens(tokens.features, positions, tokens.valid, list(tokens.lengths), sizes=sizes)


def kept_mask(lengths: list[int], device: torch.device) -> torch.Tensor | None:
    """`(B, K)`, True on the first `lengths[b]` slots of row b; None where all rows are full."""
    most = max(lengths)
    if min(lengths) == most:
        return None
    counts = torch.tensor(lengths).to(device, non_blocking=True)
    return torch.arange(most, device=device) < counts[:, None]


def in_source_order(
    ranked: torch.Tensor, lengths: list[int], count: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Sorts the first `lengths[b]` of the `(B, K)` positions ascending: positions, their order, validity."""
    valid = kept_mask(lengths, ranked.device)
    if valid is not None:  # beyond every real position, so that padding sorts to the end
        ranked = ranked.masked_fill(~valid, count)
    positions, order = ranked.sort(dim=1)
    return positions.clamp(max=count - 1), order, valid


def take(
    tokens: VisualTokens,
    ranked: torch.Tensor,
    lengths: list[int],
    dropped_tokens: str = MERGE,
    similarity: torch.Tensor | None = None,
) -> PrunedTokens:
    """Keeps the first `lengths[b]` of the `ranked` `(B, K)` positions, in their source order.

    Each dropped token belongs to the kept one that is most similar to it, which it is averaged into ("merge") or merely
    counted for ("discard").

    Args:
        similarity (`torch.Tensor` of shape `(B, K, N)`, *optional*): of all tokens to the ranked ones, where a pruner
            knows it; of these to themselves infinite.
    """
    most = ranked.shape[1]
    positions, order, valid = in_source_order(ranked, lengths, tokens.features.shape[1])
    if similarity is None:
        owner = nearest_kept(tokens, positions, valid)
    else:
        # The first ranks are the kept ones, as the first slots are.
        similarity = similarity if valid is None else similarity.masked_fill(~valid[..., None], float("-inf"))
        # From ranks to the slots that they are sorted into.
        owner = order.argsort(dim=1).gather(1, similarity.argmax(dim=1))
        owner = owner if tokens.valid is None else owner.masked_fill(~tokens.valid, most)
    sizes = counts(owner, most)
    if dropped_tokens == DISCARD:
        return PrunedTokens(gather_rows(tokens.features, positions), positions, valid, lengths, sizes=sizes)

    def merge(features: torch.Tensor) -> torch.Tensor:
        return means(features, owner, sizes)

    return PrunedTokens(merge(tokens.features), positions, valid, lengths, merge, sizes)


@torch.no_grad()
def nearest_kept(tokens: VisualTokens, positions: torch.Tensor, valid: torch.Tensor | None) -> torch.Tensor:
    """The slot `(B, N)` of the kept token, of those at `positions` `(B, K)`, that each token is most similar to
    (cosine): its own where it is kept, the first one's where several are equal, and K on padding."""
    most, count = positions.shape[1], tokens.features.shape[1]
    with torch.autocast(tokens.features.device.type, enabled=False):
        units = F.normalize(tokens.features.detach().float(), dim=-1)
        kept = gather_rows(units, positions).mT
        hidden = None if valid is None else ~valid[:, None]
        parts = [part @ kept for part in units.split(CHUNK, dim=1)]  # (B, n, K)
        parts = parts if hidden is None else [part.masked_fill_(hidden, float("-inf")) for part in parts]
        owner = torch.cat([part.argmax(dim=2) for part in parts], dim=1)
    # A kept token is its own, though another one may equal it. Slots of padding write beyond the last token.
    slots = torch.arange(most, device=positions.device).expand_as(positions)
    at = positions if valid is None else positions.masked_fill(~valid, count)
    owner = F.pad(owner, (0, 1)).scatter(1, at, slots)[:, :count]
    return owner if tokens.valid is None else owner.masked_fill(~tokens.valid, most)


def counts(owner: torch.Tensor, most: int) -> torch.Tensor:
    """How many tokens belong to each of `most` slots, of which `owner` `(B, N)` names one each: `(B, most)`."""
    found = torch.zeros(len(owner), most + 1, device=owner.device)
    return found.scatter_add_(1, owner, torch.ones_like(owner, dtype=found.dtype))[:, :most]


def means(features: torch.Tensor, owner: torch.Tensor, sizes: torch.Tensor) -> torch.Tensor:
    """The mean of the `features` `(B, N, D)` that belong to each slot, `(B, K, D)`, summed in float32."""
    batch, most = sizes.shape
    # A row of sums for each slot of each image, and one for what belongs to none.
    rows = owner + torch.arange(batch, device=owner.device)[:, None] * (most + 1)
    sums = torch.zeros(batch * (most + 1), features.shape[-1], device=features.device)
    sums = sums.index_add(0, rows.flatten(), features.flatten(0, 1).float()).view(batch, most + 1, -1)[:, :most]
    return (sums / sizes.clamp(min=1)[..., None]).to(features.dtype)


def members(owner: torch.Tensor, most: int) -> torch.Tensor:
    """1 where a token belongs to a slot, of which `owner` `(B, N)` names one each, and 0 elsewhere: `(B, most, N)`."""
    batch, count = owner.shape
    found = torch.zeros(batch, most + 1, count, device=owner.device)
    return found.scatter_(1, owner[:, None], 1.0)[:, :most]


def top_k(scores: torch.Tensor, valid: torch.Tensor | None, most: int) -> torch.Tensor:
    """Positions of the `most` highest `(B, N)` scores, best first, the earlier one where they tie."""
    scores = scores.float()
    if valid is not None:
        scores = scores.masked_fill(~valid, float("-inf"))
    return scores.sort(dim=1, descending=True, stable=True).indices[:, :most]
