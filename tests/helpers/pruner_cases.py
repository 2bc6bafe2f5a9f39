"""Random visual tokens for the tests of pruners."""

from __future__ import annotations

from dataclasses import fields

import torch

from hf_dualspeed import AutoPruner, Pruner, VisualTokens
from hf_dualspeed.pruners import pruner_class

TEXT, WIDTH = 5, 16


def shortens(name: str) -> bool:
    """Whether a pruner shortens the batch itself, as all do but those inside the language model."""
    return not pruner_class(name).in_language_model


def build(name: str, width: int = WIDTH, **settings) -> Pruner:
    """A pruner out of training; a learned one for tokens of `width`."""
    if "hidden_size" in {f.name for f in fields(pruner_class(name).config_class)}:
        settings = {"hidden_size": width, **settings}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return AutoPruner.from_name(name, **settings).eval()


def grid(rows: int, columns: int, frame: int = 0) -> torch.Tensor:
    cells = torch.cartesian_prod(torch.tensor([frame]), torch.arange(rows), torch.arange(columns))
    return cells.view(-1, 3)


def tokens(*shapes, seed=0, dtype=torch.float32, width=WIDTH) -> VisualTokens:
    """Images of the given (rows, columns), padded; two views of different width where a shape holds four numbers."""
    generator = torch.Generator().manual_seed(seed)
    grids = [grid(*s) if len(s) == 2 else torch.cat([grid(*s[:2]), grid(*s[2:], frame=1)]) for s in shapes]
    lengths = [len(g) for g in grids]
    features = [torch.randn(n, width, generator=generator) for n in lengths]
    attention = [torch.rand(n, generator=generator) for n in lengths]
    keys = [torch.randn(n, 8, generator=generator) for n in lengths]
    words = torch.arange(TEXT) < torch.arange(len(shapes))[:, None] % 3 + 2
    pad = lambda rows: torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)  # noqa: E731
    valid = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    return VisualTokens(
        features=pad(features).to(dtype),
        valid=None if min(lengths) == max(lengths) else valid,
        grid=pad(grids),
        attention=pad(attention),
        keys=pad(keys),
        text=torch.randn(len(shapes), TEXT, width, generator=generator).to(dtype),
        text_valid=words,
        generator=torch.Generator().manual_seed(1),
    )


def image(batch: VisualTokens, index: int) -> VisualTokens:
    """One image of a batch, on its own and without padding."""
    n = batch.lengths[index]
    one = slice(index, index + 1)
    cut = {name: getattr(batch, name)[one, :n] for name in ("features", "grid", "attention", "keys")}
    return VisualTokens(**cut, text=batch.text[one], text_valid=batch.text_valid[one])
