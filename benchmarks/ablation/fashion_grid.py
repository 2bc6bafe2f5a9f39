"""Fashion-MNIST (github.com/zalandoresearch/fashion-mnist) as grids of items, with questions that need their places.

Pruning hurts here: an answer depends on a few of the image's tokens, and only the question says on which.
"""

from __future__ import annotations

import gzip
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
SIDE = 2  # tiles in a row, and in a column
TILE, LARGE_TILE = 84, 168  # pixels, three and six times those of the data set
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
    """Four tiles row by row, grey `(4, h, w)` or RGB `(4, h, w, 3)`, and their items as indices into `names`."""

    tiles: np.ndarray
    items: tuple[int, ...]
    names: tuple[str, ...] = ITEMS

    edge: int = TILE  # pixels of a tile in the image

    def image(self) -> Pillow.Image:
        """The grid as an image: 168 x 168 pixels for tiles of 84."""
        whole = Pillow.new("RGB", (SIDE * self.edge, SIDE * self.edge))
        for place, tile in enumerate(self.tiles):
            row, column = divmod(place, SIDE)
            enlarged = Pillow.fromarray(tile).resize((self.edge, self.edge), Pillow.Resampling.BILINEAR)
            whole.paste(enlarged, (column * self.edge, row * self.edge))
        return whole

    def patches(self, side: int) -> np.ndarray:
        """The item of each of side x side patches, `(side, side)`."""
        return np.kron(np.reshape(self.items, (SIDE, SIDE)), np.ones((side // SIDE, side // SIDE), dtype=int))

    def questions(self, generator: random.Random) -> list[Question]:
        """Eight questions in random order: all four items, two counts, two comparisons."""
        asked = [
            Question("item", f"which item is in {_place(place)}?", self.names[item])
            for place, item in enumerate(self.items)
        ]
        # The first count is of an item that is there, the second of any item.
        for there in (True, False):
            item = generator.choice(self.items) if there else generator.randrange(len(self.names))
            number = NUMBERS[self.items.count(item)]
            asked.append(Question("count", f"how often is there a {self.names[item]}?", number))
        pairs = [(one, other) for other in range(len(self.items)) for one in range(other)]
        for one, other in generator.sample(pairs, 2):
            answer = "yes" if self.items[one] == self.items[other] else "no"
            asked.append(Question("same", f"is the item in {_place(one)} that in {_place(other)}?", answer))
        generator.shuffle(asked)
        return asked


def _place(index: int) -> str:
    row, column = divmod(index, SIDE)
    return f"row {row + 1}, column {column + 1}"


# Pictures `(n, h, w)` or `(n, h, w, 3)` of a split, and for each item the indices of its pictures.
Pictures = tuple[np.ndarray, list[list[int]]]


@dataclass(frozen=True)
class Grids:
    """A world of grids of 2 x 2 tiles: what a task's images show, and how they are asked about.

    Args:
        name (`str`): In file names and in results.
        shows (`str`): In captions.
        names (`tuple[str, ...]`): Of the items, one word each.
        pictures (`Callable`): The pictures of a split.
        seed (`str`): Of the grids and their questions.
        edge (`int`): Pixels of a tile in an image.
    """

    name: str
    shows: str
    names: tuple[str, ...]
    pictures: Callable[[str], Pictures]
    seed: str
    edge: int = TILE
    kinds: tuple[str, ...] = KINDS

    @property
    def pixels(self) -> int:
        """The edge of an image."""
        return SIDE * self.edge

    @property
    def codes(self) -> int:
        return len(self.names)

    @property
    def layout(self) -> list[int]:
        """The place of each of 8 x 8 patches."""
        per = 8 // SIDE
        return [row // per * SIDE + column // per for row in range(8) for column in range(8)]

    @property
    def texts(self) -> list[str]:
        """Texts that hold all words of questions and answers."""
        generator = random.Random(0)
        asked = [one.text for _ in range(100) for one in self.drawn(generator).questions(generator)]
        return [*asked, *self.names, *NUMBERS, "yes no"]

    def drawn(self, generator: random.Random) -> Grid:
        """A grid of items without tiles."""
        return Grid(np.empty(0), draw_items(generator, len(self.names)), self.names, self.edge)

    def scenes(self, split: str, count: int) -> list[Grid]:
        """The first `count` grids of a split. They are the same in every call."""
        images, indices = self.pictures(split)
        generator = random.Random(f"{self.seed}:{split}")
        stacks = [generator.sample(own, len(own)) for own in indices]
        taken = [0] * len(self.names)
        made = []
        for _ in range(count):
            items, tiles = draw_items(generator, len(self.names)), []
            for item in items:
                tiles.append(stacks[item][taken[item] % len(stacks[item])])
                taken[item] += 1
            made.append(Grid(images[tiles], items, self.names, self.edge))
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


def draw_items(generator: random.Random, known: int = len(ITEMS)) -> tuple[int, ...]:
    """Items of a grid, of two to four kinds, so that comparisons and counts have several answers."""
    shown = generator.sample(range(known), generator.randint(2, min(SIDE**2, known)))
    return tuple(generator.choices(shown, k=SIDE**2))


def conversations(split: str, made: list[Grid]) -> list[list[Question]]:
    """Eight questions on each grid of a split, the same in every call."""
    return FASHION.conversations(split, made)


def fashion_pictures(split: str) -> Pictures:
    """Fashion-MNIST's tiles `(n, 28, 28)` of a split, by item."""
    images, labels = _read(split)
    return images, [np.flatnonzero(labels == label).tolist() for label in LABELS]


FASHION = Grids("grids", "grids of Fashion-MNIST", ITEMS, fashion_pictures, NAME)
# The same grids, four times as large: 576 visual tokens.
FASHION_336 = Grids("grids-336", "large grids of Fashion-MNIST", ITEMS, fashion_pictures, NAME, LARGE_TILE)


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
