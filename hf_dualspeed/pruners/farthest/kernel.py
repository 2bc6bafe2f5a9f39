"""Farthest-first choice of an image in one launch of a Triton kernel, after one batched product."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from . import batched

HALF = (torch.bfloat16, torch.float16)


def farthest_first(
    features: torch.Tensor, valid: torch.Tensor | None, counts: list[int], lengths: list[int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Chosen positions `(B, K)` and the rank of each token's nearest one `(B, N)`, of `features` `(B, N, D)`.

    Args:
        valid (`torch.BoolTensor` of shape `(B, N)`, *optional*): False on padding.
        counts, lengths (`list[int]`): tokens of each image, and how many of them to choose.
    """
    batch, count, _ = features.shape
    ranked = torch.zeros(batch, max(lengths), dtype=torch.long, device=features.device)
    nearest = torch.zeros(batch, count, dtype=torch.long, device=features.device)
    table = batched.table_of(counts, lengths, features.device)
    block = triton.next_power_of_2(count)
    # Groups of as many images as have similarities that fit into memory, each one launch with a program per image.
    size = batched.fitting(count)
    for start in range(0, batch, size):
        group = slice(start, start + size)
        matrix, alone = similarities(features[group], None if valid is None else valid[group])
        given = (matrix, alone, table[group], ranked[group], nearest[group])
        choose[(len(alone),)](*given, count, ranked.shape[1], BLOCK=block, num_warps=warps_for(block))
    return ranked, nearest


def warps_for(block: int) -> int:
    """Warps of a program of `block` tokens: eight tokens a thread, as far as it goes."""
    return min(32, max(1, block // 256))


def similarities(features: torch.Tensor, valid: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines of all tokens `(B, N, N)`, and of each with its most similar other one `(B, N)`."""
    if features.dtype not in HALF:
        alone, matrix = batched.similarities(batched.units_of(features), None if valid is None else ~valid, whole=True)
        return matrix, alone
    # Products of half precision are exact in float32, and many times as fast as those of float32.
    if features.is_cuda:
        matrix = torch.bmm(features, features.mT, out_dtype=torch.float32)
    else:
        matrix = features.float() @ features.float().mT
    # Divide by both norms (B, N, 1), by one factor, so that both halves of the matrix stay equal.
    scale = 1 / torch.linalg.vector_norm(features, dim=-1, keepdim=True, dtype=torch.float32).clamp(min=1e-12)
    matrix *= scale * scale.mT
    # Leave out the similarity to itself and to padding, which the kernel does not read.
    matrix.diagonal(dim1=1, dim2=2).fill_(batched.FARTHEST)
    if valid is not None:
        matrix.masked_fill_(~valid[:, None], batched.FARTHEST)
    return matrix, matrix.amax(dim=2)


@triton.jit
def choose(matrix, alone, table, ranked, nearest, count, most, BLOCK: tl.constexpr):
    """One program per image.

    Args:
        matrix: similarities `(B, N, N)`.
        alone: similarity of each token to its most similar other one, `(B, N)`.
        table: tokens and choices of each image, `(B, 2)`.
        ranked, nearest: the results `(B, K)` and `(B, N)`.
        count, most: N and K.
        BLOCK: a power of two, N or more.
    """
    image = tl.program_id(0).to(tl.int64)
    tokens = tl.load(table + 2 * image)
    choices = tl.load(table + 2 * image + 1)
    index = tl.arange(0, BLOCK)
    real = index < tokens
    # Similarity to the nearest chosen token, infinite for padding, and that one's rank, (N,).
    similar = tl.where(real, -2.0, float("inf"))
    rank = tl.zeros([BLOCK], tl.int32)
    pick = tl.argmin(tl.load(alone + image * count + index, real, other=float("inf")), 0)
    # No `for`: NumPy 2.4 takes the bound of one for an array in the interpreter of triton 3.6.
    step = 0
    while step < choices:
        tl.store(ranked + image * most + step, pick.to(tl.int64))
        row = tl.load(matrix + (image * count + pick) * count + index, real, other=float("inf"))
        # Infinite similarity to itself keeps a chosen token from being picked again.
        row = tl.where(index == pick, float("inf"), row)
        rank = tl.where(row > similar, step, rank)
        similar = tl.maximum(similar, row)
        pick = tl.argmin(similar, 0)
        step += 1
    tl.store(nearest + image * count + index, rank.to(tl.int64), index < count)
