"""Grids of objects: the pictures of Debian's package tuxpaint-stamps-default (tuxpaint.org), by their kinds.

The pictures are the same in both splits. The grids are not, so what is held out is how they are put together.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

import numpy as np
from PIL import Image as Pillow

from .fashion_grid import LARGE_TILE, Grids, Pictures

# The folder of the package. TUXPAINT_STAMPS names another one.
FOLDER = "/usr/share/tuxpaint/stamps"
PACKAGE = "tuxpaint-stamps-default"
OBJECTS_SHOWN = "grids of objects"
LEFT_OUT = {"symbols", "seasonal"}  # letters, digits and coins; things of all kinds that belong to a feast
LEAST = 10  # pictures of a kind: of most names there is one alone


def objects() -> Grids:
    """Grids of 2 x 2 objects.

    Raises:
        FileNotFoundError: the pictures are not there.
    """
    named = stamps()
    names = tuple(sorted(named))

    def pictures(split: str) -> Pictures:
        tiles, indices = [], []
        for name in names:
            indices.append(list(range(len(tiles), len(tiles) + len(named[name]))))
            tiles += [_tile(path) for path in named[name]]
        return np.stack(tiles), indices

    return Grids("objects", OBJECTS_SHOWN, names, pictures, "objects", LARGE_TILE)


def stamps() -> dict[str, list[Path]]:
    """The pictures by kind, the name of the second folder, or of the first: birds of animals/birds/owl.png, clothes of
    clothes/shirt.png, for example."""
    folder, found = Path(os.environ.get("TUXPAINT_STAMPS", FOLDER)), {}
    for path in sorted(folder.rglob("*.png")):
        folders = [name for name in path.relative_to(folder).parts[:-1] if name != "cartoon"]  # a style, no kind
        # Each has a sentence, as text beside it. Others are parts of a picture, such as its mirror image.
        if folders and path.with_suffix(".txt").is_file() and not LEFT_OUT & set(folders):
            found.setdefault(re.sub(r"[^a-z]", "", folders[:2][-1]), []).append(path)
    found = {kind: paths for kind, paths in found.items() if len(paths) >= LEAST}
    if len(found) < 2:
        raise FileNotFoundError(
            f"`TUXPAINT_STAMPS` is {str(folder)!r}, but there are no two kinds of {LEAST} pictures with sentences in "
            f"it. Install Debian's package {PACKAGE}, or set TUXPAINT_STAMPS to a folder with its stamps."
        )
    return found


def _tile(path: Path) -> np.ndarray:
    """A picture on white, `(168, 168, 3)`."""
    picture = Pillow.open(path).convert("RGBA")
    picture.thumbnail((LARGE_TILE, LARGE_TILE))
    whole = Pillow.new("RGBA", (LARGE_TILE, LARGE_TILE), "white")
    whole.alpha_composite(picture, ((LARGE_TILE - picture.width) // 2, (LARGE_TILE - picture.height) // 2))
    return np.asarray(whole.convert("RGB"))
