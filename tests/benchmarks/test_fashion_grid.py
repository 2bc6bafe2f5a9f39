"""Grids of Fashion-MNIST: places, answers and sources."""

import random
import re
from collections import Counter

import numpy as np
import pytest
from tiny import write_fashion_mnist

from benchmarks.ablation import fashion_grid
from benchmarks.ablation.fashion_grid import ITEMS, LABELS, Grid, conversations, grids


@pytest.fixture(autouse=True)
def files(tmp_path, monkeypatch):
    """Files in the authors' format, with tiles whose brightness is set by their label."""
    write_fashion_mnist(tmp_path, tiles=40)
    monkeypatch.setenv("FASHION_MNIST", str(tmp_path))


def test_tiles_lie_where_the_questions_say():
    for grid in grids("test", 20):
        pixels = np.asarray(grid.image())
        assert pixels.shape == (168, 168, 3)
        for place, item in enumerate(grid.items):
            row, column = divmod(place, 2)
            label = list(LABELS)[item]
            assert (pixels[row * 84 + 42, column * 84 + 42] == 20 * label + 10).all()
        for question in grid.questions(random.Random(0)):
            if question.kind == "item":
                row, column = (int(digit) - 1 for digit in re.findall(r"\d", question.text))
                assert question.answer == ITEMS[grid.items[2 * row + column]]


def test_answers_are_right():
    asked = Grid(np.zeros((4, 28, 28), np.uint8), tuple(map(ITEMS.index, ("bag", "dress", "bag", "bag")))).questions(
        random.Random(1)
    )
    assert Counter(question.kind for question in asked) == {"item": 4, "count": 2, "same": 2}
    numbers = {"how often is there a bag?": "three", "how often is there a dress?": "one"}
    for question in asked:
        if question.kind == "count":
            assert question.answer == numbers.get(question.text, "zero")
        if question.kind == "same":
            assert question.answer == ("no" if "row 1, column 2" in question.text else "yes")


def test_grids_are_always_the_same_and_splits_apart():
    first, again = grids("train", 5), grids("train", 12)
    assert [grid.items for grid in first] == [grid.items for grid in again[:5]]
    assert conversations("train", first) == conversations("train", again)[:5]
    assert [grid.items for grid in first] != [grid.items for grid in grids("test", 5)]


def test_wrong_words_and_missing_files(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="`split` must be one of 'train', 'test', got 'tset'. Did you mean 'test'"):
        grids("tset")
    with pytest.raises(ValueError, match="`count` must be in"):
        grids("test", 0)
    monkeypatch.setenv("FASHION_MNIST", str(tmp_path / "elsewhere"))
    with pytest.raises(FileNotFoundError, match="`FASHION_MNIST` is .*elsewhere.* no t10k-images-idx3-ubyte.gz"):
        grids("test")


def test_without_files_the_hub_is_asked(monkeypatch):
    monkeypatch.delenv("FASHION_MNIST")
    monkeypatch.setattr(fashion_grid, "FOLDER", "/nowhere")

    def offline(name, split):
        raise ConnectionError("offline")

    monkeypatch.setattr(fashion_grid, "load_dataset", offline)
    with pytest.raises(FileNotFoundError, match="dataset-fashion-mnist, or set FASHION_MNIST"):
        grids("test")
