"""Accuracy by generation, on a tiny model that has learnt four answers by heart."""

from __future__ import annotations

import copy

import pytest
import torch
from datasets import Dataset
from PIL import Image

from hf_dualspeed.data import VisionLanguageCollator
from hf_dualspeed.easy_vqa import FEATURES
from hf_dualspeed.evaluation import answer_accuracy
from hf_dualspeed.tiny_llava import build_tiny_llava

ANSWERS = {"one?": "red", "which of the two?": "a circle", "and then what?": "blue", "so?": "green"}


def rows(answers: dict[str, str], column: bool = True) -> Dataset:
    table = [
        {
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": question}]},
                {"role": "assistant", "content": [{"type": "text", "text": answer}]},
            ],
            "images": [],
        }
        | ({"question": question, "answer": answer} if column else {})
        for question, answer in answers.items()
    ]
    features = copy.deepcopy(FEATURES)
    if not column:
        del features["question"], features["answer"]
    return Dataset.from_list(table, features=features)


def with_images(dataset: Dataset) -> Dataset:
    """The same questions, each about an image."""
    table = dataset.to_list()
    for row in table:
        row["messages"][0]["content"].insert(0, {"type": "image", "text": None})
        row["images"] = [Image.new("RGB", (9, 8), "red")]
    return Dataset.from_list(table, features=FEATURES)


@pytest.fixture(scope="module")
def trained():
    model, processor = build_tiny_llava(
        [*ANSWERS, *ANSWERS.values()], image_size=8, vision_hidden_size=16, hidden_size=32, layers=1, heads=2
    )
    batch = VisionLanguageCollator(processor)(list(rows(ANSWERS)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()
    return model, processor


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_learnt_answers_are_found_whatever_the_padding(trained, batch_size):
    result = answer_accuracy(*trained, rows(ANSWERS), batch_size=batch_size)
    assert result == {"accuracy": 1.0, "n": 4, "predictions": list(ANSWERS.values())}


def test_case_and_white_space_do_not_count(trained):
    result = answer_accuracy(*trained, rows(ANSWERS | {"one?": " Red ", "so?": "wrong"}))
    assert result["accuracy"] == 0.75


def test_without_answer_column_the_last_message_is_expected(trained):
    result = answer_accuracy(*trained, rows(ANSWERS | {"so?": "wrong"}, column=False))
    assert result["accuracy"] == 0.75


def test_limit(trained):
    assert answer_accuracy(*trained, rows(ANSWERS), limit=2)["n"] == 2
    assert answer_accuracy(*trained, rows(ANSWERS), limit=9)["n"] == 4


@pytest.mark.parametrize("training", [True, False])
def test_mode_is_restored_and_nothing_trains(trained, training):
    model, processor = trained
    model.train(training)
    seen = []

    def prepare(inputs: dict) -> dict:
        seen.append((model.training, torch.is_grad_enabled()))
        return inputs

    answer_accuracy(model, processor, rows(ANSWERS), prepare=prepare)
    assert seen == [(False, False)]
    assert model.training is training


def test_mode_is_restored_after_an_error(trained):
    model, processor = trained
    model.train()

    def fail(inputs: dict) -> dict:
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        answer_accuracy(model, processor, rows(ANSWERS), prepare=fail)
    assert model.training


def test_prepare_may_shorten_the_prompt(trained):
    model, processor = trained
    dataset = with_images(rows(ANSWERS))
    visual = model.config.image_token_id

    def without_images(inputs: dict) -> dict:
        kept = inputs["input_ids"] != visual
        assert not kept.all()
        assert "pixel_values" in inputs
        return {key: inputs[key][kept][None] for key in ("input_ids", "attention_mask")}

    result = answer_accuracy(model, processor, dataset, batch_size=1, prepare=without_images)
    assert result["predictions"] == list(ANSWERS.values())


def test_arguments(trained):
    with pytest.raises(ValueError, match="`dataset` has no rows"):
        answer_accuracy(*trained, rows(ANSWERS).select([]))
    with pytest.raises(ValueError, match=r"`limit` must be in \[1, inf\), got 0. Use None"):
        answer_accuracy(*trained, rows(ANSWERS), limit=0)
    with pytest.raises(ValueError, match="`batch_size` must be"):
        answer_accuracy(*trained, rows(ANSWERS), batch_size=0)
    unanswered = rows(ANSWERS).to_list()
    unanswered[0]["messages"].pop()
    with pytest.raises(ValueError, match="must end with the assistant's answer, got a last message of 'user'"):
        answer_accuracy(*trained, Dataset.from_list(unanswered, features=FEATURES))
