"""A model's answers to the questions of a data set, by greedy generation, and their accuracy."""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import Any

import torch
from datasets import Dataset
from torch import nn
from transformers import PreTrainedModel, ProcessorMixin

from ..data.collators import encode
from ..data.conversations import given_texts, sample_name, to_messages
from ..data.labels import check_texts
from ..data.media import IMAGE_ERRORS, open_image, open_video
from ..data.rendering import render
from ..metrics import load_metric
from ..utils.progress import Work
from ..utils.validation import check_range, checked

CONVERSATIONS = ("messages", "prompt", "conversations")
THOUGHT = "</think>"


@checked
def answer_accuracy(
    model: nn.Module,
    processor: ProcessorMixin,
    dataset: Dataset,
    *,
    batch_size: int = 64,
    max_new_tokens: int = 8,
    prepare: Callable[[dict[str, Any]], dict[str, Any]] | None = None,
    limit: int | None = None,
    description: str = "evaluating",
    silent: bool = False,
) -> dict[str, Any]:
    """The share of rows whose generated answer equals an expected one, apart from case and white space.

    Args:
        model (`nn.Module`): Generates on its own device; its training mode is restored.
        processor (`ProcessorMixin`): The model's processor, with a chat template.
        dataset (`datasets.Dataset`): Questions and expected answers, as [`question_and_answers`] reads them.
        batch_size (`int`, *optional*, defaults to 64): Questions per batch.
        max_new_tokens (`int`, *optional*, defaults to 8): Longest answer in tokens.
        prepare (`Callable`, *optional*): Maps the processor's output to `generate`'s inputs. It may prune.
        limit (`int`, *optional*): Number of rows, from the first on.
        description (`str`, *optional*, defaults to `"evaluating"`): Caption of the progress bar.
        silent (`bool`, *optional*, defaults to `False`): Show no progress.

    Returns:
        `dict` with `accuracy` (`float`), `n` (`int`) and `predictions` (`list[str]`, in the order of the rows).
    """
    check_range("batch_size", batch_size, 1)
    check_range("max_new_tokens", max_new_tokens, 1)
    dataset = first_rows(dataset, limit)
    expected = [question_and_answers(row)[1] for row in dataset]
    options = {"batch_size": batch_size, "max_new_tokens": max_new_tokens, "prepare": prepare}
    batches = answers_in_batches(model, processor, dataset, description=description, silent=silent, **options)
    predictions = [answer for batch in batches for answer in batch]
    said = list(map(without_thoughts, predictions))
    accuracy = load_metric("exact_match").compute(predictions=said, references=expected)["exact_match"]
    return {"accuracy": accuracy, "n": len(predictions), "predictions": predictions}


def without_thoughts(text: str) -> str:
    """What an answer says behind its thoughts. Their beginning may stand in the prompt, as templates write it there."""
    return text.rpartition(THOUGHT)[2]


def first_rows(dataset: Dataset, limit: int | None) -> Dataset:
    """The first `limit` rows, or all. Raises a `ValueError` where there are none."""
    if limit is not None:
        check_range("limit", limit, 1, off="Use None for all rows.")
        dataset = dataset.select(range(min(limit, len(dataset))))
    if not len(dataset):
        raise ValueError("`dataset` has no rows to evaluate on.")
    return dataset


def answers_in_batches(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    dataset: Dataset,
    *,
    batch_size: int,
    max_new_tokens: int,
    prepare: Callable[[dict[str, Any]], dict[str, Any]] | None = None,
    start: int = 0,
    description: str = "evaluating",
    silent: bool = False,
) -> Generator[list[str], None, None]:
    """Yields the answers of each batch, in the order of the rows.

    The arguments are those of [`answer_accuracy`], and `start` is the first row to answer.
    """
    check_range("batch_size", batch_size, 1)
    check_range("max_new_tokens", max_new_tokens, 1)
    training = model.training
    model.eval()
    try:
        with Work(description, len(dataset) - start, silent) as work:
            for first in range(start, len(dataset), batch_size):
                rows = [dataset[index] for index in range(first, min(first + batch_size, len(dataset)))]
                yield answers(model, processor, rows, max_new_tokens, prepare)
                work.advance(len(rows))
    finally:
        model.train(training)


@torch.no_grad()
def answers(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    rows: list[dict[str, Any]],
    max_new_tokens: int,
    prepare: Callable[[dict[str, Any]], dict[str, Any]] | None = None,
) -> list[str]:
    """Answers the questions of one batch, greedily."""
    inputs = prompts(model, processor, rows)
    if prepare is not None:
        inputs = prepare(inputs)
    output = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False, num_beams=1)
    # Answers are the tokens behind the prompt (B, S'), which `prepare` may have shortened. Behind embeddings, as some
    # families get them, `generate` returns the answers alone.
    ids = inputs.get("input_ids")
    return processor.batch_decode(output if ids is None else output[:, ids.shape[1] :], skip_special_tokens=True)


def prompts(model: PreTrainedModel, processor: ProcessorMixin, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The questions of a batch as model inputs: ids and mask `(B, S)`, padded on the left, and pixels."""
    samples = [question(row)[0] for row in rows]
    texts = [prompt_text(processor, sample, sample_name(row)) for sample, row in zip(samples, rows, strict=True)]
    images, videos = [], []
    for row, sample in zip(rows, samples, strict=True):
        try:
            images.append([open_image(image) for image in sample["images"]])
            videos.append([open_video(video) for video in sample["videos"]])
        except IMAGE_ERRORS as error:
            raise ValueError(f"An image or a video cannot be read ({sample_name(row)}): {error}") from error
    # Padding goes to the left, because generation continues the last column.
    return dict(encode(processor, texts, images, videos, padding_side="left").to(model.device, model.dtype))


def prompt_text(processor: ProcessorMixin, sample: dict[str, list], name: str) -> str:
    """A question as the processor's chat template writes it.

    Raises:
        ValueError: a text holds a placeholder, or the template refuses the messages.
    """
    check_texts(processor, [sample["messages"], sample["tools"]], name)
    try:
        return render(processor, sample["messages"], sample["tools"], add_generation_prompt=True)
    except ValueError as error:
        raise ValueError(f"The sample ({name}) cannot be asked: {error}") from error


def question_and_answers(row: dict[str, Any]) -> tuple[dict[str, list], list[str]]:
    """A row's question and its right answers.

    The question is all messages before the assistant's last one. A row without a conversation has it in the column
    `question`. Right answers are in the column `answers` (texts, or VQAv2's records), else in `answer`, else in the
    last message.

    Returns:
        `dict` with `messages`, `images` and `videos`, and `list[str]`.

    Raises:
        ValueError: the row has neither conversation nor question, or no right answer.
    """
    sample, right = question(row)
    for column in ("answer", "answers"):
        right = right if row.get(column) is None else given_texts(row[column], column)
    if not any(text.strip() for text in right):
        raise ValueError(
            f"The sample ({sample_name(row)}) says nothing of what is right. It must end with the assistant's answer, "
            "or have a column `answer` or `answers` that is not empty; leave it out, or name a split with answers."
        )
    return sample, right


def question(row: dict[str, Any]) -> tuple[dict[str, list], list[str]]:
    """A row's question, as [`question_and_answers`] gives it, and the assistant's answer behind it, if there is one."""
    if row.get("question") and not any(row.get(key) for key in CONVERSATIONS):
        row = {**row, "messages": [{"role": "user", "content": row["question"]}]}
    sample = to_messages(row)
    messages, right = sample["messages"], []
    if messages[-1]["role"] == "assistant":
        *messages, last = messages
        right = ["".join(part.get("text", "") for part in last["content"])]
    if not messages:
        raise ValueError(f"The sample ({sample_name(row)}) asks nothing: the assistant's message is its only one.")
    return {**sample, "messages": messages}, right
