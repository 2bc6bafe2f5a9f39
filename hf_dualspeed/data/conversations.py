"""Conversations in all common layouts, brought into the messages of a chat template."""

from __future__ import annotations

import os
import re
from typing import Any

from ..utils.validation import check_choice

PLACEHOLDERS = {"image": "<image>", "video": "<video>"}
ROLES = {"human": "user", "gpt": "assistant", "system": "system", "user": "user", "assistant": "assistant"}

EXTRA_COLUMNS = ("id", "question", "answer")


def to_messages(example: dict[str, Any]) -> dict[str, list]:
    """Converts an example of any known layout to messages with lists of parts, images and videos.

    Known layouts are TRL's `messages` and `prompt` + `completion`, each with `images` or `image`, and LLaVA's
    `conversations` with `image`. Videos work the same way, as `videos` or `video`, each a list of frames. An `<image>`
    in plain text becomes a placeholder, and so does a `<video>` if there are videos. If the plain texts hold no
    placeholders, those of all images (or videos) go to the front of the first user message. The example stays
    unchanged.

    Returns:
        `dict` with `messages`, `images` and `videos`; the messages hold one part of type `"image"` per image and one of
        type `"video"` per video.

    Raises:
        ValueError: the layout is unknown, or the number of placeholders differs from that of images or videos.
    """
    media = {"image": _as_list(example.get("images") or example.get("image")), "video": _videos(example)}
    turns = _turns(example)
    written = {kind: text for kind, text in PLACEHOLDERS.items() if kind == "image" or media[kind]}
    messages = [{**turn, "content": _parts(turn["content"], written)} for turn in turns]
    plain = all(isinstance(turn["content"], str) for turn in turns)
    for kind, items in media.items():
        _add_placeholders(messages, kind, items, plain, sample_name(example))
    return {"messages": messages, "images": media["image"], "videos": media["video"]}


def _add_placeholders(messages: list[dict], kind: str, items: list, plain: bool, name: str) -> None:
    placeholders = sum(part["type"] == kind for message in messages for part in message["content"])
    first_user = next((message for message in messages if message["role"] == "user"), None)
    if items and not placeholders and first_user and plain:
        first_user["content"] = [{"type": kind} for _ in items] + first_user["content"]
        placeholders = len(items)
    if placeholders != len(items):
        raise ValueError(
            f"The sample ({name}) has {len(items)} {kind}(s) but {placeholders} {kind} placeholder(s) in its "
            f"messages. Put one {PLACEHOLDERS[kind]} (or a part of type {kind!r}) per {kind}."
        )


def _videos(example: dict[str, Any]) -> list:
    """The clips of an example; `video` is one clip, whose frames may be a list."""
    if example.get("videos") is not None:
        return list(example["videos"])
    video = example.get("video")
    return [] if video is None or (isinstance(video, str) and not video) else [video]


def _turns(example: dict[str, Any]) -> list[dict]:
    if example.get("conversations"):
        for turn in example["conversations"]:
            check_choice("from", turn.get("from"), list(ROLES))
        return [{"role": ROLES[t["from"]], "content": t["value"]} for t in example["conversations"]]
    if example.get("messages"):
        return list(example["messages"])
    if example.get("prompt") and example.get("completion"):
        sides = (("user", example["prompt"]), ("assistant", example["completion"]))
        turns = [[{"role": role, "content": side}] if isinstance(side, str) else side for role, side in sides]
        return [*turns[0], *turns[1]]
    raise ValueError(
        f"The sample ({sample_name(example)}) has no conversation. Its columns are {sorted(example)}; needed "
        "is a filled `messages`, `prompt` and `completion`, or `conversations`."
    )


def _parts(content: str | list[dict] | None, placeholders: dict[str, str]) -> list[dict]:
    """The content of a message as new parts, without the empty fields that Arrow adds."""
    if not isinstance(content, str):
        for part in content or []:
            check_choice("type", part.get("type"), (*PLACEHOLDERS, "text"))
        return [
            {"type": "text", "text": part["text"]} if part["type"] == "text" else {"type": part["type"]}
            for part in content or []
        ]
    pieces = re.split(f"({'|'.join(placeholders.values())})", content)
    if len(pieces) == 1:
        return [{"type": "text", "text": content}]
    kinds = {text: kind for kind, text in placeholders.items()}
    # Drop line breaks around LLaVA's placeholders; the template writes its own.
    pieces = [piece.strip("\n") for piece in pieces]
    return [{"type": kinds[p]} if p in kinds else {"type": "text", "text": p} for p in pieces if p]


def _as_list(value: Any) -> list:
    if value is None or value == "":
        return []
    return list(value) if isinstance(value, (list, tuple)) else [value]


def sample_name(example: dict[str, Any]) -> str:
    """Words that identify a sample to a person: its id, else the path of its first image."""
    if example.get("id") is not None:
        return f"id {example['id']!r}"
    for image in _as_list(example.get("images") or example.get("image")):
        path = image.get("path") if isinstance(image, dict) else image
        if isinstance(path, (str, os.PathLike)):
            return f"image {str(path)!r}"
    return "without id"


def texts_of(value: Any) -> list[str]:
    """One or several texts as a list; takes the text from VQAv2's answer records."""
    values = [item.get("answer") if isinstance(item, dict) else item for item in _as_list(value)]
    return [str(item) for item in values if item is not None]
