"""What the ablation's images may show, by name."""

from __future__ import annotations

import random
from functools import cache
from typing import Protocol

import numpy as np
from PIL import Image as Pillow

from hf_dualspeed.utils.validation import check_choice

from .fashion_grid import FASHION, FASHION_336, Question
from .letters import LETTERS
from .objects import OBJECTS_SHOWN, objects
from .reading import READING


class Scene(Protocol):
    """What one image shows: `items`, a code for each place, in words only where it is to be read as text."""

    items: tuple[int, ...]

    def image(self) -> Pillow.Image: ...

    def patches(self, side: int) -> np.ndarray: ...

    def questions(self, generator: random.Random) -> list[Question]: ...


class World(Protocol):
    """A kind of scenes.

    Attributes:
        name, shows (`str`): In file names, and in captions.
        pixels (`int`): The edge of an image, a multiple of 14.
        kinds (`tuple[str, ...]`): Of questions.
        codes (`int`): Number of different items.
        layout (`list[int]`): The place of each of 8 x 8 patches.
        texts (`list[str]`): They hold all words of questions and answers.
    """

    name: str
    shows: str
    pixels: int
    kinds: tuple[str, ...]
    codes: int
    layout: list[int]
    texts: list[str]

    def drawn(self, generator: random.Random) -> Scene: ...

    def scenes(self, split: str, count: int) -> list[Scene]: ...

    def conversations(self, split: str, made: list[Scene]) -> list[list[Question]]: ...


WORLDS = {
    FASHION.name: lambda: FASHION,
    FASHION_336.name: lambda: FASHION_336,
    LETTERS.name: lambda: LETTERS,
    READING.name: lambda: READING,
    "objects": objects,
}
# What each shows, for captions, without a look at its files.
SHOWN = {one.name: one.shows for one in (FASHION, FASHION_336, LETTERS, READING)} | {"objects": OBJECTS_SHOWN}


@cache
def world_of(name: str) -> World:
    """The world of a name.

    Raises:
        ValueError: there is none of this name.
        FileNotFoundError: its pictures are not installed.
    """
    check_choice("world", name, tuple(WORLDS))
    return WORLDS[name]()
