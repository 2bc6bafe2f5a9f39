"""Converts between the containers of encoder outputs and flat rows of visual tokens.

A container is a tensor `(..., N, D)`, or a list or tuple of containers. Shapes: U units, N tokens of a unit, T tokens
of the batch, D hidden.
"""

from __future__ import annotations

import torch

Container = torch.Tensor | list | tuple


def flat_rows(container: Container) -> torch.Tensor:
    """All tokens of a container in order, `(T, D)`."""
    if isinstance(container, torch.Tensor):
        return container.flatten(0, -2)
    return torch.cat([flat_rows(part) for part in container])


def part_lengths(container: Container) -> list[list[int]] | None:
    """Tokens of each part of each unit; None for a flat `(T, D)` tensor, in which units cannot be separated.

    A tensor `(U, N, D)` holds U units. A list holds one unit per element, whose own leading dimensions are its parts,
    such as the frames of a clip.
    """
    if isinstance(container, torch.Tensor) and container.dim() == 2:
        return None
    # A unit (..., N, D) has as many parts of N tokens as its leading dimensions hold.
    return [[unit.shape[-2]] * unit.shape[:-2].numel() for unit in container]


def refill(container: Container, rows: torch.Tensor, lengths: list[int]) -> Container:
    """A container of the same kind that holds `rows` `(T, D)` as units of `lengths` tokens.

    Units stay separate, because `generate` repeats the units of a sample for each beam. If a tensor cannot hold units
    of different lengths, each token becomes a unit.
    """
    # A list or tuple: one element (n_i, 1, ..., D) per unit, with as many dimensions as before.
    if not isinstance(container, torch.Tensor):
        units = [shaped(unit, container[0].dim()) for unit in rows.split(lengths)]
        return units if isinstance(container, list) else tuple(units)
    # A tensor with units of equal length: (T, D) -> (U, N, D).
    if container.dim() == 3 and min(lengths) == max(lengths):
        return rows.view(len(lengths), lengths[0], rows.shape[-1])
    # A flat tensor stays flat; units of different lengths become units of one token, (T, 1, D).
    return shaped(rows, container.dim())


def shaped(rows: torch.Tensor, dimensions: int) -> torch.Tensor:
    """Inserts dimensions of size 1: `(T, D)` to `(T, 1, ..., D)`."""
    return rows if dimensions == 2 else rows.view(len(rows), *(1,) * (dimensions - 2), rows.shape[-1])
