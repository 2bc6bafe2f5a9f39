"""Accuracy by generation, on a tiny model that has learned four answers by heart."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from datasets import Dataset
from PIL import Image
from tiny_models import FAMILIES, picture

from hf_dualspeed.data.collators import VisionLanguageCollator
from hf_dualspeed.data.easy_vqa import FEATURES
from hf_dualspeed.evaluation import generation
from hf_dualspeed.evaluation.evaluate import score
from hf_dualspeed.evaluation.generation import (
    answer_accuracy,
    answers,
    answers_in_batches,
    prompts,
    question_and_answers,
)
from hf_dualspeed.evaluation.pruned_prompts import PrunedPrompts
from hf_dualspeed.metrics import CLASSES
from hf_dualspeed.pruners import AutoPruner
from hf_dualspeed.recipes.tiny_llava import build_tiny_llava

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
def test_learned_answers_are_found_whatever_the_padding(trained, batch_size):
    result = answer_accuracy(*trained, rows(ANSWERS), batch_size=batch_size)
    assert result == {"accuracy": 1.0, "n": 4, "predictions": list(ANSWERS.values())}


def test_case_and_white_space_do_not_count(trained):
    result = answer_accuracy(*trained, rows(ANSWERS | {"one?": " Red ", "so?": "wrong"}))
    assert result["accuracy"] == 0.75


def test_thoughts_are_kept_and_not_scored(trained, monkeypatch):
    """Templates of thinking models open them in the prompt: an answer that was learned without any begins behind."""
    said = ["hm, red\n</think>\n\nblue"] * 2
    monkeypatch.setattr(generation, "answers", lambda *_: said)
    result = answer_accuracy(*trained, rows({"one?": "blue", "two?": "red"}))
    assert result == {"accuracy": 0.5, "n": 2, "predictions": said}
    table = [{"references": ["blue"], "options": ["red", "blue"]}]
    assert [score(name, table, said[:1]) for name in CLASSES] == [1.0] * len(CLASSES)


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


def test_prepare_may_embed_the_prompt(trained):
    """As `prune_inputs` does where `forward` takes no encoded images: Llama 4."""
    model, processor = trained

    def embedded(inputs: dict) -> dict:
        states = model.get_input_embeddings()(inputs["input_ids"])
        return {**inputs, "input_ids": None, "inputs_embeds": states}

    result = answer_accuracy(model, processor, rows(ANSWERS), prepare=embedded)
    assert result["predictions"] == list(ANSWERS.values())


def test_arguments(trained):
    with pytest.raises(ValueError, match="`dataset` has no rows"):
        answer_accuracy(*trained, rows(ANSWERS).select([]))
    with pytest.raises(ValueError, match=r"`limit` must be in \[1, inf\), got 0. Use None"):
        answer_accuracy(*trained, rows(ANSWERS), limit=0)
    with pytest.raises(ValueError, match="`batch_size` must be"):
        answer_accuracy(*trained, rows(ANSWERS), batch_size=0)
    unanswered = rows(ANSWERS, column=False).to_list()
    unanswered[0]["messages"].pop()
    with pytest.raises(ValueError, match="says nothing of what is right. It must end with the assistant's answer"):
        answer_accuracy(*trained, Dataset.from_list(unanswered))


def test_where_the_question_and_what_is_right_stand(trained):
    user, assistant = rows(ANSWERS)[0]["messages"]
    for row in (
        {"messages": [user, assistant]},
        {"messages": [user], "answer": "red"},
        {"messages": [user, assistant], "answer": "red"},
        {"question": "one?", "answers": ["red"]},
        {"question": "one?", "answer": "no", "answers": [{"answer": "red", "answer_confidence": "yes"}]},
        {"prompt": "one?", "completion": "red"},
    ):
        asked, right = question_and_answers(row)
        assert right == ["red"], row
        assert [message["role"] for message in asked["messages"]] == ["user"]
        assert answers(*trained, [row], 8) == ["red"]
    asked, right = question_and_answers({"question": "one?", "image": Image.new("RGB", (9, 8)), "answer": 3})
    assert [part["type"] for part in asked["messages"][0]["content"]] == ["image", "text"]
    assert right == ["3"]
    with pytest.raises(ValueError, match="says nothing of what is right"):
        question_and_answers({"messages": [user, assistant], "answers": []})
    with pytest.raises(ValueError, match=r"\(id 7\) asks nothing"):
        question_and_answers({"id": 7, "messages": [assistant]})


def test_several_answers_may_be_right(trained):
    table = [{"question": question, "answers": ["no", answer.upper()]} for question, answer in ANSWERS.items()]
    assert answer_accuracy(*trained, Dataset.from_list(table))["accuracy"] == 1.0


@pytest.mark.parametrize("start", [0, 2, 3])
def test_batches_begin_where_they_are_told(trained, start):
    batches = list(answers_in_batches(*trained, rows(ANSWERS), batch_size=2, max_new_tokens=8, start=start))
    assert [answer for batch in batches for answer in batch] == list(ANSWERS.values())[start:]
    assert [len(batch) for batch in batches] == {0: [2, 2], 2: [2], 3: [1]}[start]


@pytest.mark.parametrize("name", ["llava_next", "qwen2_5_vl"])
def test_other_families_answer_the_same_alone_and_in_a_batch(name):
    model, processor = FAMILIES[name].build()
    pruner = AutoPruner.from_name("divprune", pruning_ratio=0.5)
    table = [
        {"question": text, "image": picture(30 + 9 * n, 30), "answer": "x"} for n, text in enumerate(("a?", "bcd?"))
    ]
    for prepare in (None, PrunedPrompts(model, pruner)):
        together = answers(model, processor, table, 3, prepare)
        assert together == [answers(model, processor, [row], 3, prepare)[0] for row in table]


def test_draws_depend_on_the_batch_alone():
    model, processor = FAMILIES["llava"].build()
    pruner = AutoPruner.from_name("random", pruning_ratio=0.5)
    inputs = prompts(model, processor, [{"question": "a?", "image": picture(16, 16), "answer": "x"}])
    # Original positions tell which tokens were kept.
    pruned = partial(PrunedPrompts, model, pruner, position_ids="original")
    first = pruned(seed=3)
    draws = [first(inputs)["position_ids"] for _ in range(3)]
    again = pruned(seed=3, batch=2)(inputs)["position_ids"]
    assert torch.equal(again, draws[2])
    assert not torch.equal(draws[0], draws[2])
    assert not torch.equal(draws[0], pruned(seed=4)(inputs)["position_ids"])
