"""Evenly spaced tokens, and the grid cells that pooling uses too.

Shapes: B images, N visual tokens, K kept tokens, D hidden.
"""

from __future__ import annotations

import torch

from .base import Pruner
from .ops import counts, means, take
from .registry import register_pruner
from .tokens import PrunedTokens, VisualTokens


def row_layout(grid: torch.Tensor, valid: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Start index and width, both `(B, N)`, of the image row that each token lies in.

    A row is a run of tokens of equal (t, row) in `grid` `(B, N, 3)`, so frames, tiles and newline columns of any width
    work.
    """
    index = torch.arange(grid.shape[1], device=grid.device).expand(grid.shape[:2])
    # A row begins where (t, row) changes, (B, N); each token takes the last such index before it.
    change = (grid[:, 1:, :2] != grid[:, :-1, :2]).any(-1)
    begins = torch.cat([torch.ones_like(change[:, :1]), change], dim=1)
    start = torch.where(begins, index, 0).cummax(dim=1).values
    # Count the valid tokens with the same start, (B, N).
    width = torch.zeros_like(index).scatter_add_(1, start, valid.long()).gather(1, start)
    return start, width.clamp(min=1)


def cells(tokens: VisualTokens, lengths: list[int]) -> torch.Tensor:
    """Assigns every token to one of `lengths[b]` cells that tile the image evenly, `(B, N)`.

    The rows are cut into bands of equal token count and each band into columns: cells are near square and never empty.
    Without a grid, or with a budget close to the token count, cells are runs in raster order. Padding goes to cell K,
    one past the last.
    """
    device = tokens.features.device
    batch, most = tokens.features.shape[:2]
    # Tokens and cells of each image, (B, 1).
    count = torch.tensor(tokens.lengths).to(device, non_blocking=True)[:, None]
    kept = torch.tensor(lengths).to(device, non_blocking=True)[:, None]
    # Fallback: the cell of each token as a run in raster order, (B, N).
    index = torch.arange(most, device=device).expand(batch, -1)
    valid = index < count
    runs = index * kept // count.clamp(min=1)
    if tokens.grid is not None:
        # Bounds on the bands, (B, 1): a band has at most as many columns as the narrowest row has tokens, and at least
        # one row, or cells would be empty.
        start, width = row_layout(tokens.grid, valid)
        narrowest = width.masked_fill(~valid, most).min(1, keepdim=True).values
        widest = width.masked_fill(~valid, 1).max(1, keepdim=True).values
        fewest_bands = (kept + narrowest - 1) // narrowest
        most_bands = count // widest
        # Square cells: bands / (kept / bands) = height / width, with height = count / width.
        bands = (kept * count).sqrt().div(widest).round().long()
        bands = torch.minimum(torch.maximum(bands, fewest_bands), most_bands).clamp(min=1)
        # Band of each token, columns of its band, and its cell, all (B, N).
        band = start * bands // count.clamp(min=1)
        columns = (band + 1) * kept // bands - band * kept // bands
        tiled = band * kept // bands + (index - start) * columns // width
        runs = torch.where(fewest_bands <= most_bands, tiled, runs)
    return torch.where(valid, runs, kept.amax())


def centres(tokens: VisualTokens, cell: torch.Tensor, most: int) -> torch.Tensor:
    """The token nearest the middle of each cell, `(B, most)`; ties go to the earlier token."""
    # (row, column) of each token, (B, N, 2), or without a grid its index, (B, N, 1).
    index = torch.arange(cell.shape[1], device=cell.device)
    place = tokens.grid[..., 1:].float() if tokens.grid is not None else index[None, :, None].float()
    place = place.expand(*cell.shape, place.shape[-1])
    # Middle of each token's own cell, (B, N, 2) or (B, N, 1).
    mean = pool(place, cell, most).gather(1, cell.clamp(max=most - 1)[..., None].expand_as(place))
    # Squared distance as an integer key, (B, N): rounding makes equal ones tie exactly, the index breaks the tie.
    far = ((place - mean).square().sum(-1) * 64).round().long() * cell.shape[1] + index
    # Smallest key of each cell, (B, most); modulo N it is the token's index.
    best = torch.full((cell.shape[0], most + 1), torch.iinfo(torch.long).max, device=cell.device)
    best = best.scatter_reduce_(1, cell, far, reduce="amin")[:, :most]
    return best % cell.shape[1]


def pool(features: torch.Tensor, cell: torch.Tensor, most: int) -> torch.Tensor:
    """Mean of `features` `(B, N, D)` over each `cell` `(B, N)`, `(B, most, D)`."""
    return means(features, cell, counts(cell, most))


@register_pruner("grid")
class GridPruner(Pruner):
    """Keeps evenly spaced tokens: the centres of equal cells of the image.

    A baseline, not a published method. Inputs: the grid; without one, tokens are evenly spaced in raster order.
    Cost: O(N).
    """

    needs = frozenset({"grid"})

    def reduce(self, tokens: VisualTokens, lengths: list[int]) -> PrunedTokens:
        with torch.no_grad():
            positions = centres(tokens, cells(tokens, lengths), max(lengths))
        return take(tokens, positions, lengths, self.config.dropped_tokens)
