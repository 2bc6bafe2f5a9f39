"""Farthest-first choice in plain PyTorch, batched over images, without waiting for the device."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ..ops import kept_mask

# Most memory for the (N, N) similarities of a group of images. Without them, each kept token costs a product with all
# N; with them, it costs one read.
MATRIX_BYTES = 2**30
# Rows of similarities per product. Small blocks skip nearly half of the symmetric matrix.
BLOCK = 256
FARTHEST = -2.0  # below every cosine


def fitting(count: int) -> int:
    """How many images of `count` tokens have similarities that fit in MATRIX_BYTES together."""
    return MATRIX_BYTES // (4 * max(1, count) ** 2)


def units_of(features: torch.Tensor) -> torch.Tensor:
    """Unit vectors in float32."""
    return F.normalize(features.float(), dim=-1)


def table_of(counts: list[int], lengths: list[int], device: torch.device) -> torch.Tensor:
    """Tokens of each image and how many of them to choose, `(B, 2)`, as whole numbers of 32 bits on a device.

    Where images are alike, nothing is copied from the host, which a CUDA graph cannot capture.
    """
    if min(counts) < max(counts) or min(lengths) < max(lengths):
        return torch.tensor([counts, lengths], dtype=torch.int32).mT.contiguous().to(device, non_blocking=True)
    alike = [torch.full((len(counts),), own[0], dtype=torch.int32, device=device) for own in (counts, lengths)]
    return torch.stack(alike, dim=1)


def farthest_first(
    features: torch.Tensor, valid: torch.Tensor | None, lengths: list[int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Chosen positions `(B, K)` and the rank of each token's nearest one `(B, N)`, of `features` `(B, N, D)`.

    Args:
        valid (`torch.BoolTensor` of shape `(B, N)`, *optional*): False on padding.
        lengths (`list[int]`): tokens to choose of each image.
    """
    units = units_of(features)
    whole, most = fitting(units.shape[1]), max(lengths)
    if 0 < len(units) <= whole:
        ranked, similarity = choose(units, valid, most, whole=True)
    else:  # groups of as many images as fit in MATRIX_BYTES; if not even one fits, the whole batch without matrices
        together = units.split(whole or len(units))
        masks = [None] * len(together) if valid is None else valid.split(whole or len(units))
        chosen = [choose(*group, most, whole=whole > 0) for group in zip(together, masks, strict=True)]
        ranked, similarity = (torch.cat(parts) for parts in zip(*chosen, strict=True))
    # Most similar of an image's ranks, (B, N); on a CPU, `max` is ten times as fast as `argmax`. Both take the first.
    within = kept_mask(lengths, units.device)
    similarity = similarity if within is None else similarity.masked_fill_(~within[..., None], float("-inf"))
    return ranked, similarity.max(dim=1).indices


def choose(
    units: torch.Tensor, valid: torch.Tensor | None, most: int, whole: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Greedy farthest-first choice from unit vectors `(B, N, D)`, of which `valid` `(B, N)` count.

    With `whole`, all similarities are held in memory.

    Returns:
        Chosen tokens `(B, most)`, and similarities of all tokens to them `(B, most, N)`, infinite to themselves.
    """
    images = torch.arange(len(units), device=units.device)
    # The first pick (B,) is the token least similar to its nearest neighbour; padding is never picked.
    padding = None if valid is None else ~valid
    nearest, similarity = similarities(units, padding, whole)
    pick = (nearest if padding is None else nearest.masked_fill_(padding, float("inf"))).argmin(dim=1)
    # Infinite similarity to itself keeps a chosen token from being picked again.
    if similarity is not None:
        similarity.diagonal(dim1=1, dim2=2).fill_(float("inf"))
    # rows (B, N, N), or (B, N, D) without matrix. nearest (B, N): similarity of each token to its nearest chosen one.
    rows = units if similarity is None else similarity
    nearest, chosen, similar = None, [pick], []
    while True:
        # Similarity of every token to the pick, (B, N): a row of the matrix, or a product.
        to_pick = rows[images, pick]
        if similarity is None:
            to_pick = (units @ to_pick[..., None])[..., 0].scatter_(1, pick[:, None], float("inf"))
        similar.append(to_pick)
        if len(chosen) == most:
            return torch.stack(chosen, dim=1), torch.stack(similar, dim=1)
        # Running maximum; the next pick is the token least similar to all chosen ones.
        if nearest is not None:
            nearest = torch.maximum(nearest, to_pick)
        else:
            nearest = to_pick if padding is None else to_pick.masked_fill(padding, float("inf"))
        pick = nearest.argmin(dim=1)
        chosen.append(pick)


def similarities(
    units: torch.Tensor, padding: torch.Tensor | None, whole: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Similarity of each token to its nearest other one, `(B, N)`, and, if `whole`, all similarities `(B, N, N)`.

    Each pair is multiplied once; the other half of the symmetric matrix is a copy. `padding` `(B, N)` counts for none.
    """
    batch, count, _ = units.shape
    matrix = units.new_empty(batch, count, count) if whole else None
    nearest = units.new_full((batch, count), FARTHEST)
    for start in range(0, count, BLOCK):
        end = min(start + BLOCK, count)
        # Rows start:end of the upper triangle, (B, n, N - start).
        part = units[:, start:end] @ units[:, start:].mT
        # Fill these rows of the matrix; the part left of the diagonal is a transposed earlier block.
        if matrix is not None:
            matrix[:, start:end, start:] = part
            if start:
                matrix[:, start:end, :start] = matrix[:, :start, start:end].mT
        # Leave out a token's similarity to itself and to padding.
        part.diagonal(dim1=1, dim2=2).fill_(FARTHEST)
        if padding is not None:
            part.masked_fill_(padding[:, start:end, None] | padding[:, None, start:], FARTHEST)
        # Update the block's tokens by row and the later tokens by column.
        own = part.amax(dim=2)
        nearest[:, start:end] = torch.maximum(nearest[:, start:end], own) if start else own
        if end < count:
            nearest[:, end:] = torch.maximum(nearest[:, end:], part[:, :, end - start :].amax(dim=1))
    return nearest, matrix
