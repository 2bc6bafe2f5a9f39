"""Fashion-MNIST (github.com/zalandoresearch/fashion-mnist) as grids of items, with questions that need their places.

Pruning hurts here: an answer depends on a few of the image's tokens, and only the question says on which.
"""

from __future__ import annotations

import gzip
import math
import os
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from datasets import load_dataset
from PIL import Image as Pillow

from hf_dualspeed.utils.validation import check_choice, check_range

NAME = "fashion-grid"
# Default number of grids of each split. No tile of the test split is in two grids.
GRIDS = {"train": 8000, "test": 800}
# Items by label. Pullover, coat and shirt are left out: a vision tower can hardly tell them apart at this size.
LABELS = {0: "t-shirt", 1: "trousers", 3: "dress", 5: "sandal", 7: "sneaker", 8: "bag", 9: "boot"}
ITEMS = tuple(LABELS.values())
NUMBERS = ("zero", "one", "two", "three", "four")
KINDS = ("item", "count", "same")
SIDE = 2  # tiles in a row, and in a column, of the first grids
KINDS_SHOWN = 7  # at most, in a grid that has room for them
TILE = 84  # pixels, three times those of the data set
# The folder of Debian's package dataset-fashion-mnist. FASHION_MNIST names another one.
FOLDER = "/usr/share/datasets/fashion-mnist"
FILES = {"train": "train", "test": "t10k"}
HUB = "zalando-datasets/fashion_mnist"


@dataclass(frozen=True)
class Question:
    """A question about a grid: its kind ("item", "count" or "same"), its text, and the right answer, one word."""

    kind: str
    text: str
    answer: str


@dataclass(frozen=True)
class Grid:
    """Tiles row by row, grey `(side^2, h, w)` or RGB `(side^2, h, w, 3)`, and their items as indices into `names`."""

    tiles: np.ndarray
    items: tuple[int, ...]
    names: tuple[str, ...] = ITEMS

    @property
    def side(self) -> int:
        return math.isqrt(len(self.items))

    def image(self) -> Pillow.Image:
        """The grid as an image of 84 pixels a tile: 168 x 168 for 2 x 2 tiles."""
        whole = Pillow.new("RGB", (self.side * TILE, self.side * TILE))
        for place, tile in enumerate(self.tiles):
            row, column = divmod(place, self.side)
            enlarged = Pillow.fromarray(tile).resize((TILE, TILE), Pillow.Resampling.BILINEAR)
            whole.paste(enlarged, (column * TILE, row * TILE))
        return whole

    def questions(self, generator: random.Random) -> list[Question]:
        """Eight questions in random order: four items, two counts, two comparisons. Large grids count within a row."""
        small = self.side == SIDE
        asked = [
            Question("item", f"which item is in {self._place(place)}?", self.names[self.items[place]])
            for place in (range(SIDE**2) if small else generator.sample(range(len(self.items)), 4))
        ]
        # The first count is of an item that is there, the second of any item.
        for there in (True, False):
            row = 0 if small else generator.randrange(self.side)
            counted = self.items if small else self.items[row * self.side : (row + 1) * self.side]
            item = generator.choice(counted) if there else generator.randrange(len(self.names))
            where = "" if small else f" in row {row + 1}"
            number = NUMBERS[counted.count(item)]
            asked.append(Question("count", f"how often is there a {self.names[item]}{where}?", number))
        pairs = [(one, other) for other in range(len(self.items)) for one in range(other)]
        for one, other in generator.sample(pairs, 2):
            answer = "yes" if self.items[one] == self.items[other] else "no"
            asked.append(Question("same", f"is the item in {self._place(one)} that in {self._place(other)}?", answer))
        generator.shuffle(asked)
        return asked

    def _place(self, index: int) -> str:
        row, column = divmod(index, self.side)
        return f"row {row + 1}, column {column + 1}"


# Pictures `(n, h, w)` or `(n, h, w, 3)` of a split, and for each item the indices of its pictures.
Pictures = tuple[np.ndarray, list[list[int]]]


@dataclass(frozen=True)
class Grids:
    """A world of grids: what a task's images show, and how they are asked about.

    Args:
        name (`str`): In file names and in results.
        shows (`str`): In captions.
        side (`int`): Tiles in a row.
        names (`tuple[str, ...]`): Of the items, one word each.
        pictures (`Callable`): The pictures of a split.
        seed (`str`): Of the grids and their questions.
    """

    name: str
    shows: str
    side: int
    names: tuple[str, ...]
    pictures: Callable[[str], Pictures]
    seed: str
    kinds: tuple[str, ...] = KINDS

    @property
    def pixels(self) -> int:
        """The edge of an image."""
        return self.side * TILE

    @property
    def codes(self) -> int:
        return len(self.names)

    @property
    def layout(self) -> list[int]:
        """The place of each of 8 x 8 patches."""
        per = 8 // self.side
        return [row // per * self.side + column // per for row in range(8) for column in range(8)]

    @property
    def texts(self) -> list[str]:
        """Texts that hold all words of questions and answers."""
        generator = random.Random(0)
        asked = [one.text for _ in range(100) for one in self.drawn(generator).questions(generator)]
        return [*asked, *self.names, *NUMBERS, "yes no"]

    def drawn(self, generator: random.Random) -> Grid:
        """A grid of items without tiles."""
        return Grid(np.empty(0), draw_items(generator, self.side, len(self.names)), self.names)

    def scenes(self, split: str, count: int) -> list[Grid]:
        """The first `count` grids of a split. They are the same in every call."""
        images, indices = self.pictures(split)
        generator = random.Random(f"{self.seed}:{split}")
        stacks = [generator.sample(own, len(own)) for own in indices]
        taken = [0] * len(self.names)
        made = []
        for _ in range(count):
            items, tiles = draw_items(generator, self.side, len(self.names)), []
            for item in items:
                tiles.append(stacks[item][taken[item] % len(stacks[item])])
                taken[item] += 1
            made.append(Grid(images[tiles], items, self.names))
        return made

    def conversations(self, split: str, made: list[Grid]) -> list[list[Question]]:
        """Eight questions on each grid of a split, the same in every call."""
        return [grid.questions(random.Random(f"{self.seed}:{split}:{index}")) for index, grid in enumerate(made)]


def grids(split: str, count: int | None = None) -> list[Grid]:
    """The first `count` grids of a split. They are the same in every call.

    Args:
        split (`str`): `"train"` or `"test"`. Tiles come from the same split of Fashion-MNIST.
        count (`int`, *optional*): Number of grids; by default [`GRIDS`].

    Raises:
        ValueError: there is no such split, or `count` is below 1.
        FileNotFoundError: the folder that the environment variable FASHION_MNIST names lacks the data.
    """
    check_choice("split", split, tuple(GRIDS))
    count = GRIDS[split] if count is None else count
    check_range("count", count, 1, off="Use None for all grids of the split.")
    return FASHION.scenes(split, count)


def draw_items(generator: random.Random, side: int = SIDE, known: int = len(ITEMS)) -> tuple[int, ...]:
    """Items of a grid, of two to four kinds, or seven, so that comparisons and counts have several answers."""
    shown = generator.sample(range(known), generator.randint(2, min(side**2, known, KINDS_SHOWN)))
    return tuple(generator.choices(shown, k=side**2))


def conversations(split: str, made: list[Grid]) -> list[list[Question]]:
    """Eight questions on each grid of a split, the same in every call."""
    return FASHION.conversations(split, made)


def fashion_pictures(split: str) -> Pictures:
    """Fashion-MNIST's tiles `(n, 28, 28)` of a split, by item."""
    images, labels = _read(split)
    return images, [np.flatnonzero(labels == label).tolist() for label in LABELS]


FASHION = Grids("grids", "grids of Fashion-MNIST", SIDE, ITEMS, fashion_pictures, NAME)
FASHION_4X4 = Grids("grids-4x4", "4 x 4 grids of Fashion-MNIST", 4, ITEMS, fashion_pictures, f"{NAME}-4x4")


def _read(split: str) -> tuple[np.ndarray, np.ndarray]:
    """Images `(n, 28, 28)` and labels `(n,)` from a folder, or from the Hub where there is none."""
    folder = Path(os.environ.get("FASHION_MNIST", FOLDER))
    paths = [folder / f"{FILES[split]}-{kind}.gz" for kind in ("images-idx3-ubyte", "labels-idx1-ubyte")]
    if all(path.is_file() for path in paths):
        pixels, labels = (np.frombuffer(gzip.decompress(path.read_bytes()), np.uint8) for path in paths)
        # The IDX format has a header of 4 bytes, and of 4 for each dimension.
        return pixels[16:].reshape(-1, 28, 28), labels[8:]
    if "FASHION_MNIST" in os.environ:
        raise FileNotFoundError(f"`FASHION_MNIST` is {str(folder)!r}, but there is no {paths[0].name} in it.")
    try:
        loaded = load_dataset(HUB, split=split)
    except (OSError, ValueError) as error:
        raise FileNotFoundError(
            f"Fashion-MNIST is neither in {FOLDER} nor can it be loaded from the Hub ({HUB}): {error}. Install "
            "Debian's package dataset-fashion-mnist, or set FASHION_MNIST to a folder with its authors' four .gz files."
        ) from error
    images = np.stack([np.asarray(image.convert("L")) for image in loaded["image"]])
    return images, np.asarray(loaded["label"])
