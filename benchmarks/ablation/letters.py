"""Grids of letters in several fonts, sizes and shades: pictures that need no files.

The fonts are those that matplotlib brings along.
"""

from __future__ import annotations

import random
from functools import cache
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image as Pillow
from PIL import ImageDraw, ImageFont

from .fashion_grid import LARGE_TILE, Grids, Pictures

EDGE = 28  # pixels of a tile
EACH = {"train": 200, "test": 40}  # pictures of a letter
NAMES = tuple("bcdefghjklmnopqrstuvwxyz")  # without a, the article, and i, which looks like l
FONTS = ("DejaVuSans", "DejaVuSans-Bold", "DejaVuSans-Oblique", "DejaVuSansMono", "DejaVuSerif", "DejaVuSerif-Bold")


@cache
def font(name: str, size: int) -> ImageFont.FreeTypeFont:
    """One of matplotlib's fonts."""
    return ImageFont.truetype(str(Path(matplotlib.get_data_path(), "fonts", "ttf", f"{name}.ttf")), size)


def pictures(split: str) -> Pictures:
    """Tiles `(n, 28, 28)` of a split, and their indices by letter. They are the same in every call."""
    generator = random.Random(f"letters:{split}")
    tiles = [_tile(name, generator) for name in NAMES for _ in range(EACH[split])]
    return np.stack(tiles), np.arange(len(tiles)).reshape(len(NAMES), -1).tolist()


def _tile(letter: str, generator: random.Random) -> np.ndarray:
    size, dark = generator.randint(14, 24), generator.randint(0, 90)
    page = Pillow.new("L", (EDGE, EDGE), generator.randint(160, 255))
    place = (EDGE // 2 + generator.randint(-3, 3), EDGE // 2 + generator.randint(-3, 3))
    ImageDraw.Draw(page).text(place, letter, dark, font(generator.choice(FONTS), size), anchor="mm")
    return np.asarray(
        page.rotate(generator.randint(-15, 15), Pillow.Resampling.BILINEAR, fillcolor=page.getpixel((0, 0)))
    )


LETTERS = Grids("letters", "grids of letters", NAMES, pictures, "letters", LARGE_TILE)
