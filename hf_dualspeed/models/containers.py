"""Encoder outputs hold visual tokens in several containers; here they become flat rows and go back again.

A container is a tensor `(..., N, D)` or a list or tuple of containers. Shapes: T tokens of the batch, D hidden.
"""

from __future__ import annotations

import torch

Container = torch.Tensor | list | tuple


def flat_rows(container: Container) -> torch.Tensor:
    """All tokens of a container, in order, `(T, D)`."""
    if isinstance(container, torch.Tensor):
        return container.flatten(0, -2)
    return torch.cat([flat_rows(part) for part in container])


def part_lengths(container: Container) -> list[list[int]] | None:
    """Tokens of each part of each unit; None where one flat `(T, D)` tensor tells no units apart.

    A tensor `(U, N, D)` holds U units; a list holds one unit per element, whose own leading dimensions are its parts,
    such as the frames of a clip.
    """
    if isinstance(container, torch.Tensor) and container.dim() == 2:
        return None
    return [parts(unit) for unit in container]


def parts(unit: torch.Tensor) -> list[int]:
    """Tokens of each part of one unit `(..., N, D)`."""
    return [unit.shape[-2]] * unit.shape[:-2].numel()


def refill(container: Container, rows: torch.Tensor, lengths: list[int]) -> Container:
    """A container like this one that holds `rows` `(T, D)` as units of `lengths` tokens.

    `generate` repeats the units of a sample for each beam, so they stay apart; in a tensor that cannot hold units of
    different lengths, each token becomes a unit.
    """
    if not isinstance(container, torch.Tensor):
        units = [shaped(unit, container[0].dim()) for unit in rows.split(lengths)]
        return units if isinstance(container, list) else tuple(units)
    if container.dim() == 3 and min(lengths) == max(lengths):
        return rows.view(len(lengths), lengths[0], rows.shape[-1])
    return shaped(rows, container.dim())


def shaped(rows: torch.Tensor, dimensions: int) -> torch.Tensor:
    """`(T, D)` as `(T, 1, ..., D)`."""
    return rows.view(len(rows), *(1,) * (dimensions - 2), rows.shape[-1])
