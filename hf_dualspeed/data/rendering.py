"""Conversations through a chat template: the text, what of it is to be learned, and what the template leaves out."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from transformers import ProcessorMixin

from .media import shown

PRINTED = ("'type': 'text'", '"type": "text"')  # of a part of text, as Python and JSON print it


def render(
    processor: ProcessorMixin,
    messages: list[dict],
    tools: list | None = None,
    template: str | None = None,
    add_generation_prompt: bool = False,
) -> str:
    """The text of messages and tools as [`to_messages`] returns them, through the processor's or another `template`.

    Raises:
        ValueError: the template fails or takes no parts, or the text is no Unicode.
    """
    options = {"chat_template": template, "tools": tools, "add_generation_prompt": add_generation_prompt}
    try:
        text = _written(partial(processor.apply_chat_template, tokenize=False, **options), messages)
        text.encode()
    except UnicodeEncodeError as error:
        near = shown(text[max(0, error.start - 20) : error.end + 20])
        raise ValueError(f"The text {near} holds half of a surrogate pair. Replace the character.") from None
    # A template may raise anything: its own refusals, or Python's errors.
    except Exception as error:
        roles = [message["role"] for message in messages]
        raise ValueError(
            f"The chat template fails on messages with the roles {shown(roles)}: {type(error).__name__}: {error}. "
            "Correct the conversation, or set another `chat_template`."
        ) from error
    return text


def _written(write: Callable[[list[dict]], str], messages: list[dict]) -> str:
    """What `write` makes of messages, with plain texts in place of parts where the template takes no others.

    Some do so for the system, the assistant or tools: they join a list to a text, which fails, or print it as Python or
    JSON does.
    """
    text, failure = "", None
    try:
        text = write(messages)
        places = _printed(messages, text)
    except Exception as error:
        failure, places = error, [place for place, message in enumerate(messages) if message["role"] != "user"]
    plain = [place for place in places if all(part["type"] == "text" for part in messages[place]["content"])]
    changed = list(messages)
    for place in plain:
        changed[place] = {**messages[place], "content": "".join(part["text"] for part in messages[place]["content"])}
    if plain:
        try:
            text = write(changed)
        except Exception as error:
            raise failure or error from None
    # Where it failed, it may also have looked for parts in the texts, and written none of them.
    if failure and not (plain and all(changed[place]["content"].strip() in text for place in plain)):
        raise failure
    if _printed(changed, text):
        raise TypeError("it takes plain texts and no parts, so it has no place for a picture")
    return text


def _printed(messages: list[dict], text: str) -> list[int]:
    """The places of messages of which a part stands in the text as Python or JSON prints it."""
    if not any(mark in text for mark in PRINTED):
        return []
    return [place for place, message in enumerate(messages) if any(form in text for form in _forms(message))]


def _forms(message: dict) -> Iterator[str]:
    for part in message["content"] if isinstance(message["content"], list) else []:
        if part["type"] == "text":
            yield from (str(part), json.dumps(part, ensure_ascii=False))


def rendered(processor: ProcessorMixin, sample: dict[str, Any]) -> tuple[str, list[tuple[int, int]]]:
    """The text of a sample as [`to_messages`] returns it, and [`assistant_spans`] in it."""
    return assistant_spans(partial(render, processor, tools=sample["tools"]), sample["messages"])


def assistant_spans(render: Callable[..., str], messages: list[dict]) -> tuple[str, list[tuple[int, int]]]:
    """Renders a conversation and finds the characters that the assistant has to produce.

    A turn starts where the messages before it (with the generation prompt) end, and ends where the messages up to it
    end. This works for every template that renders these as prefixes of the whole conversation. A turn of `weight` 0 is
    left out.

    Returns:
        The rendered text, and `(start, end)` of each assistant turn, including its end-of-turn token.

    Raises:
        ValueError: the template does not render prefixes.
    """
    text = render(messages)
    spans = []
    for index, message in enumerate(messages):
        if message["role"] != "assistant" or message.get("weight") == 0:
            continue
        after = render(messages[: index + 1])
        before = render(messages[:index], add_generation_prompt=True) if index else _opening(render, message, after)
        for what, prefix in (("before it plus the generation prompt", before), ("up to it", after)):
            if not text.startswith(prefix):
                raise ValueError(
                    f"The chat template does not render conversations step by step: the messages {what} "
                    f"(assistant message {index}) render to {prefix[-80:]!r}, which the whole conversation "
                    "does not begin with. Pass a processor whose `chat_template` keeps earlier turns "
                    "unchanged, such as a training template."
                )
        spans.append((len(before), len(before) + len(after[len(before) :].rstrip())))
    return text, spans


def _opening(render: Callable[..., str], message: dict, text: str) -> str:
    """What stands before the answer where the assistant speaks first, such as a default system prompt.

    Most templates fail on an empty conversation, so the generation prompt is that behind a question.
    """
    question = [{"role": "user", "content": [{"type": "text", "text": "?"}]}]
    asked = render(question)
    prompt = render(question, add_generation_prompt=True).removeprefix(asked)
    first = prompt or next((part["text"] for part in message["content"] if part.get("text")), "")
    start = text.find(first)
    if start < 0:
        raise ValueError(
            f"The assistant speaks first, but the chat template writes no {prompt!r} in front of the answer, so its "
            "beginning is unknown. Begin with a user's message."
        )
    return text[: start + len(prompt)]


def ignored_keys(processor: ProcessorMixin, sample: dict[str, Any]) -> list[str]:
    """What of a sample's messages and tools its chat template never mentions, and so leaves out."""
    known = str(processor.chat_template or processor.tokenizer.chat_template)
    keys = {key for message in sample["messages"] for key in message if key not in ("role", "content", "weight")}
    if sample["tools"]:
        keys.add("tools")
    return sorted(key for key in keys if key not in known)
