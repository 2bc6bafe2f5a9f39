"""Accuracy of short answers, by greedy generation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from datasets import Dataset
from rich.progress import track
from transformers import PreTrainedModel, ProcessorMixin

from hf_dualspeed.arguments import check_range
from hf_dualspeed.data import encode, open_image, to_messages


def answer_accuracy(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    dataset: Dataset,
    *,
    batch_size: int = 64,
    max_new_tokens: int = 8,
    prepare: Callable[[dict[str, Any]], dict[str, Any]] | None = None,
    limit: int | None = None,
    description: str = "evaluating",
) -> dict[str, Any]:
    """The share of rows whose generated answer equals the expected one, but for case and outer spaces.

    Args:
        model (`PreTrainedModel`): Generates on its own device; its training mode is restored.
        processor (`ProcessorMixin`): The model's processor, with a chat template.
        dataset (`datasets.Dataset`): Conversations; expected is `answer`, else the last assistant message.
        batch_size (`int`, *optional*, defaults to 64): Rows that generate at once.
        max_new_tokens (`int`, *optional*, defaults to 8): Longest answer.
        prepare (`Callable`, *optional*): Makes `generate`'s inputs from the processor's, to prune for
            example.
        limit (`int`, *optional*): Only the first so many rows.
        description (`str`, *optional*, defaults to `"evaluating"`): Caption of the progress bar.

    Returns:
        `dict` with `accuracy` (`float`), `n` (`int`) and `predictions` (`list[str]`, in the order of the
        rows).
    """
    check_range("batch_size", batch_size, 1)
    check_range("max_new_tokens", max_new_tokens, 1)
    if limit is not None:
        check_range("limit", limit, 1, off="Use None for all rows.")
        dataset = dataset.select(range(min(limit, len(dataset))))
    if not len(dataset):
        raise ValueError("`dataset` has no rows to evaluate on.")
    predictions, expected = [], []
    training = model.training
    model.eval()
    try:
        for start in track(range(0, len(dataset), batch_size), description=description, transient=True):
            rows = [dataset[index] for index in range(start, min(start + batch_size, len(dataset)))]
            prompts, answers = zip(*map(_prompt_and_answer, rows), strict=True)
            predictions += _generate(model, processor, prompts, prepare, max_new_tokens)
            expected += answers
    finally:
        model.train(training)
    hits = [_normal(guess) == _normal(answer) for guess, answer in zip(predictions, expected, strict=True)]
    return {"accuracy": sum(hits) / len(hits), "n": len(hits), "predictions": predictions}


@torch.no_grad()
def _generate(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    prompts: list[dict[str, list]],
    prepare: Callable[[dict[str, Any]], dict[str, Any]] | None,
    max_new_tokens: int,
) -> list[str]:
    texts = [
        processor.apply_chat_template(prompt["messages"], tokenize=False, add_generation_prompt=True)
        for prompt in prompts
    ]
    images = [[open_image(image) for image in prompt["images"]] for prompt in prompts]
    # Generation continues the last column, which therefore must not be padding.
    inputs = dict(encode(processor, texts, images, padding_side="left").to(model.device, model.dtype))
    if prepare is not None:
        inputs = prepare(inputs)
    output = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
    # A `prepare` that prunes shortens the prompt, so its length is that of what `generate` got.
    return processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def _prompt_and_answer(row: dict[str, Any]) -> tuple[dict[str, list], str]:
    sample = to_messages(row)
    *messages, last = sample["messages"]
    if last["role"] != "assistant":
        raise ValueError(
            f"Every row of `dataset` must end with the assistant's answer, got a last message of {last['role']!r}."
        )
    answer = row.get("answer")
    if answer is None:
        answer = "".join(part.get("text", "") for part in last["content"])
    return {"messages": messages, "images": sample["images"]}, answer


def _normal(text: str) -> str:
    return text.strip().lower()
