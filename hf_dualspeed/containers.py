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
    if isinstance(container, torch.Tensor):
        if container.dim() == 2:
            return None
        return [parts(unit) for unit in container]
    return [parts(unit) for unit in container]


def parts(unit: torch.Tensor) -> list[int]:
    """Tokens of each part of one unit `(..., N, D)`."""
    return [unit.shape[-2]] * unit.shape[:-2].numel()


def refill(container: Container, rows: torch.Tensor) -> Container:
    """A container like this one that holds `rows` `(T, D)` as its one unit."""
    if isinstance(container, torch.Tensor):
        return rows.view(*(1,) * (container.dim() - 2), *rows.shape)
    return type(container)([refill(container[0], rows)])
