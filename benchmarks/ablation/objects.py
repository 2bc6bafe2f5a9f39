"""Grids of objects: the pictures of Debian's package tuxpaint-stamps-default (tuxpaint.org), each with a name.

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
LEFT_OUT = "symbols"  # letters, digits and coins


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
    """The pictures by name, the letters of the file's name: horse of animals/mammals/horse_2.png, for example."""
    folder = Path(os.environ.get("TUXPAINT_STAMPS", FOLDER))
    found: dict[str, list[Path]] = {}
    for path in sorted(folder.rglob("*.png")):
        name = re.sub(r"[^a-z]", "", path.stem.lower())
        # Each has a sentence, as text beside it. Others are parts of a picture, such as its mirror image.
        if name and path.with_suffix(".txt").is_file() and LEFT_OUT not in path.relative_to(folder).parts:
            found.setdefault(name, []).append(path)
    if len(found) < 2:
        raise FileNotFoundError(
            f"`TUXPAINT_STAMPS` is {str(folder)!r}, but there are no pictures with sentences in it. Install Debian's "
            f"package {PACKAGE}, or set TUXPAINT_STAMPS to a folder with its stamps."
        )
    return found


def _tile(path: Path) -> np.ndarray:
    """A picture on white, `(168, 168, 3)`."""
    picture = Pillow.open(path).convert("RGBA")
    picture.thumbnail((LARGE_TILE, LARGE_TILE))
    whole = Pillow.new("RGBA", (LARGE_TILE, LARGE_TILE), "white")
    whole.alpha_composite(picture, ((LARGE_TILE - picture.width) // 2, (LARGE_TILE - picture.height) // 2))
    return np.asarray(whole.convert("RGB"))
