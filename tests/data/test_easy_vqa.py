"""The quickstart's data set and the accuracy of guessing without looking."""

from __future__ import annotations

import sys

import pytest
from datasets import Dataset
from PIL import Image

from hf_dualspeed.data.conversations import to_messages
from hf_dualspeed.data.easy_vqa import load_easy_vqa, majority_accuracy
from hf_dualspeed.data.loading import load_examples

pytest.importorskip("easy_vqa")


@pytest.mark.parametrize(
    ("questions", "train_rows", "test_rows", "guessed"),
    [("open", 10168, 2537, 0.233), ("color", 5166, 1280, 0.120), ("all", 38575, 9673, 0.670)],
)
def test_sizes_and_guessing(questions, train_rows, test_rows, guessed):
    train, test = load_easy_vqa("train", questions), load_easy_vqa("test", questions)
    assert (len(train), len(test)) == (train_rows, test_rows)
    assert majority_accuracy(train, test) == pytest.approx(guessed, abs=5e-4)
    assert ({"yes", "no"} <= set(test["answer"])) == (questions == "all")


def test_rows_are_conversations_about_an_image():
    row = load_easy_vqa("test")[0]
    assert list(row) == ["messages", "images", "question", "answer"]
    sample = to_messages(row)
    question, answer = sample["messages"]
    assert question["content"] == [{"type": "image"}, {"type": "text", "text": row["question"]}]
    assert answer["content"] == [{"type": "text", "text": row["answer"]}]
    assert isinstance(sample["images"][0], Image.Image)
    assert sample["images"][0].size == (64, 64)


def test_images_are_stored_as_paths():
    table = load_easy_vqa("test").data.column("images")[0].as_py()
    assert table[0]["bytes"] is None
    assert table[0]["path"].endswith(".png")


def test_by_name_images_stay_undecoded():
    image = load_examples("easy-vqa", split="test")[0]["images"][0]
    assert image["path"].endswith(".png")


def test_unknown_question_gets_the_most_frequent_answer():
    train = Dataset.from_dict({"question": ["a", "b", "b"], "answer": ["x", "y", "y"]})
    test = Dataset.from_dict({"question": ["a", "c", "b"], "answer": ["x", "y", "x"]})
    assert majority_accuracy(train, test) == pytest.approx(2 / 3)


def test_arguments():
    with pytest.raises(ValueError, match=r"`split` must be one of 'train', 'test', got 'tset'. Did you mean 'test'"):
        load_easy_vqa("tset")
    with pytest.raises(ValueError, match="`questions` must be one of 'open', 'color', 'all', got 'closed'"):
        load_easy_vqa(questions="closed")


def test_missing_package_names_the_remedy(monkeypatch):
    monkeypatch.setitem(sys.modules, "easy_vqa", None)
    with pytest.raises(ImportError, match=r"pip install hf-dualspeed\[quickstart\]"):
        load_easy_vqa()
