"""Images to choose tokens from, farthest first, and the rule token by token.

Run as a program with TRITON_INTERPRET=1, which has to be set before triton loads, it runs the Triton kernel on the CPU
and prints what that chose of each case.
"""

from __future__ import annotations

import json
import sys

import torch
import torch.nn.functional as F


def random(count: int, width: int = 24) -> torch.Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(count))


def ties(count: int) -> torch.Tensor:
    """Signs, of 16 numbers: all similarities are exact in any precision, most are shared, many tokens are equal."""
    return torch.randint(0, 2, (count, 16), generator=torch.Generator().manual_seed(count)) * 2.0 - 1


def clustered(count: int, noise: float | torch.Tensor = 0.3) -> torch.Tensor:
    """Tokens near few directions."""
    return random(12)[torch.arange(count) % 12] + noise * random(count)


# The tokens of each image, and how many to choose of each.
CASES = {
    "lengths": ([random(50), random(20), random(1), random(33)], [10, 4, 1, 3]),
    "one": ([random(65), random(64)], [1, 1]),
    "all": ([random(30), random(9)], [30, 9]),
    "two": ([random(2), random(2)], [2, 1]),
    "none": ([random(12), random(0)], [5, 0]),
    "large": ([random(600), clustered(513)], [60, 51]),
    "clustered": ([clustered(200), clustered(150)], [20, 60]),
    "ties": ([ties(120), ties(77)], [40, 30]),
    "equal": ([torch.ones(40, 16), ties(6).repeat(5, 1)], [12, 20]),
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def given(name: str, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor | None, list[int], list[int]]:
    """Features `(B, N, D)` with padding that is no number, where they are valid, tokens and choices of each image."""
    images, keep = CASES[name]
    counts = [len(image) for image in images]
    features = torch.nn.utils.rnn.pad_sequence(images, batch_first=True, padding_value=0.5).to(dtype)
    valid = torch.arange(max(counts)) < torch.tensor(counts)[:, None]
    return features, None if min(counts) == max(counts) else valid, counts, keep


def expected(name: str, dtype: torch.dtype) -> list[list[list[int]]]:
    """Of each image the chosen tokens in order, and the rank of each token's most similar one; of equals the first."""
    features, _, counts, keep = given(name, dtype)
    return [rule(image[:n].double(), k) for image, n, k in zip(features, counts, keep, strict=True)]


def rule(features: torch.Tensor, keep: int) -> list[list[int]]:
    unit = F.normalize(features, dim=-1)
    similarity = (unit @ unit.mT).mul(2**40).round()  # equal ones tie, whatever their rounding
    others = similarity.clone().fill_diagonal_(-torch.inf)
    chosen = []
    for _ in range(keep):
        nearest = similarity[:, chosen].amax(1) if chosen else others.amax(1)
        nearest[chosen] = torch.inf
        chosen.append(int(nearest.argmin()))
    ranks = [
        chosen.index(i) if i in chosen else int(similarity[i, chosen].argmax()) for i in range(len(unit) * (keep > 0))
    ]
    return [chosen, ranks]


def as_lists(found: tuple[torch.Tensor, torch.Tensor], counts: list[int], keep: list[int]) -> list[list[list[int]]]:
    """What was found, in the form of [`expected`]."""
    ranked, nearest = found
    sizes = enumerate(zip(counts, keep, strict=True))
    return [[ranked[i, :k].tolist(), nearest[i, : n * (k > 0)].tolist()] for i, (n, k) in sizes]


if __name__ == "__main__":
    from hf_dualspeed.pruners.farthest import kernel

    found = {}
    for case in CASES:
        for dtype in DTYPES:
            features, valid, counts, keep = given(case, DTYPES[dtype])
            found[f"{case}-{dtype}"] = as_lists(kernel.farthest_first(features, valid, counts, keep), counts, keep)
    json.dump(found, sys.stdout)
