"""Fashion-MNIST (github.com/zalandoresearch/fashion-mnist) as grids of items, with questions that need their places.

Pruning hurts here: an answer depends on a few of the image's tokens, and only the question says on which.
"""

from __future__ import annotations

import gzip
import os
import random
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
    """Tiles `(4, 28, 28)` of grey values, row by row, and their items as indices into `ITEMS`."""

    tiles: np.ndarray
    items: tuple[int, ...]

    def image(self) -> Pillow.Image:
        """The grid as an image of 168 x 168 pixels."""
        whole = Pillow.new("L", (SIDE * TILE, SIDE * TILE))
        for place, tile in enumerate(self.tiles):
            row, column = divmod(place, SIDE)
            enlarged = Pillow.fromarray(tile).resize((TILE, TILE), Pillow.Resampling.BILINEAR)
            whole.paste(enlarged, (column * TILE, row * TILE))
        return whole.convert("RGB")

    def questions(self, generator: random.Random) -> list[Question]:
        """Eight questions in random order: four items, two counts, two comparisons."""
        asked = [Question("item", f"which item is in {_place(p)}?", ITEMS[item]) for p, item in enumerate(self.items)]
        # The first count is of an item that is there, the second of any item.
        for item in (generator.choice(self.items), generator.randrange(len(ITEMS))):
            number = NUMBERS[self.items.count(item)]
            asked.append(Question("count", f"how often is there a {ITEMS[item]}?", number))
        pairs = [(one, other) for other in range(SIDE**2) for one in range(other)]
        for one, other in generator.sample(pairs, 2):
            answer = "yes" if self.items[one] == self.items[other] else "no"
            asked.append(Question("same", f"is the item in {_place(one)} that in {_place(other)}?", answer))
        generator.shuffle(asked)
        return asked


def _place(index: int) -> str:
    row, column = divmod(index, SIDE)
    return f"row {row + 1}, column {column + 1}"


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
    images, labels = _read(split)
    generator = random.Random(f"{NAME}:{split}")
    stacks = [generator.sample(indices, len(indices)) for indices in _by_label(labels)]
    taken = [0] * len(ITEMS)
    made = []
    for _ in range(count):
        items, tiles = draw_items(generator), []
        for item in items:
            tiles.append(stacks[item][taken[item] % len(stacks[item])])
            taken[item] += 1
        made.append(Grid(images[tiles], items))
    return made


def draw_items(generator: random.Random) -> tuple[int, ...]:
    """Items of a grid, of two to four kinds, so that comparisons and counts have several answers."""
    shown = generator.sample(range(len(ITEMS)), generator.randint(2, SIDE**2))
    return tuple(generator.choices(shown, k=SIDE**2))


def conversations(split: str, made: list[Grid]) -> list[list[Question]]:
    """Eight questions on each grid of a split, the same in every call."""
    return [grid.questions(random.Random(f"{NAME}:{split}:{index}")) for index, grid in enumerate(made)]


def _by_label(labels: np.ndarray) -> list[list[int]]:
    return [np.flatnonzero(labels == label).tolist() for label in LABELS]


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
