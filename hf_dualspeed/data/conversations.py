"""Conversations in all common layouts, brought into the messages of a chat template."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from ..utils.validation import check_choice
from .columns import filled, unread_picture
from .media import DOWNLOAD, is_web, shown

PLACEHOLDERS = {"image": "<image>", "video": "<video>"}
ROLES = {"human": "user", "gpt": "assistant", "system": "system", "user": "user", "assistant": "assistant"}
# Roles of tools, which chat templates know as they are.
TOOL_ROLES = ("tool", "developer")

EXTRA_COLUMNS = ("id", "question", "answer")

# Keys of a content part that hold its picture or clip, as Qwen, OpenAI, Unsloth and transformers write them.
SOURCES = {"image": ("image", "image_url", "path", "url", "base64"), "video": ("video",)}
LEAVE_OUT = "Correct it, or leave the sample out."


def to_messages(example: dict[str, Any], name: str | None = None) -> dict[str, list]:
    """Converts an example of any known layout to messages with lists of parts, images and videos.

    Known layouts are TRL's `messages` and `prompt` + `completion`, each with `images` or `image`, and LLaVA's
    `conversations` with `image`. Turns may have the keys `role` and `content`, or `from` and `value`; a conversation
    may be JSON text. Videos work the same way, as `videos` or `video`, each a list of frames. An `<image>` in plain
    text becomes a placeholder, and so does a `<video>` if there are videos. If the plain texts hold no placeholders,
    those of all images (or videos) go to the front of the first user message. A part may hold its picture itself, as
    `{"type": "image", "image": ...}`, with `path` or `url`, or as `{"type": "image_url", "image_url": {"url": ...}}`.
    Pictures of the columns belong to the parts without one, or to all parts where there are as many. The example stays
    unchanged.

    Args:
        example (`dict`): The example.
        name (`str`, *optional*): What errors call it; default: [`sample_name`].

    Returns:
        `dict` with `messages`, `images` and `videos`; the messages hold one part of type `"image"` per image and one of
        type `"video"` per video.

    Raises:
        ValueError: the layout is unknown, a text is missing, the number of placeholders differs from that of images or
            videos, a picture is on the web, or a column that looks like pictures is not read. The message names the
            sample, the key and the remedy.
    """
    name = name or sample_name(example)
    given = {"image": _pictures(example), "video": _videos(example)}
    turns = _turns(example, name)
    written = {kind: text for kind, text in PLACEHOLDERS.items() if kind == "image" or given[kind]}
    # The picture or clip of each placeholder; None where it comes from a column.
    own: dict[str, list] = {kind: [] for kind in PLACEHOLDERS}
    messages = [{**turn, "content": _parts(turn["content"], written, own, name)} for turn in turns]
    media = {kind: _merged(kind, own[kind], given[kind], name) for kind in PLACEHOLDERS}
    check_pictures_read(example, name, blind=not any(media.values()))
    plain = all(isinstance(turn["content"], str) for turn in turns)
    for kind, items in media.items():
        _refuse_written(turns, messages, kind, items, name)
        _add_placeholders(messages, kind, items, plain, name)
    for image in media["image"]:
        _check_image(image, name)
    return {"messages": messages, "images": media["image"], "videos": media["video"]}


def check_pictures_read(example: Mapping[str, Any], name: str, blind: bool) -> None:
    """Raises a `ValueError` where a column looks like a picture but is not read.

    Args:
        example (`Mapping`): The sample.
        name (`str`): What the error calls it.
        blind (`bool`): Whether nothing else of the sample is a picture; if not, only numbered columns count.
    """
    column = unread_picture(example, blind)
    if column is not None:
        raise ValueError(
            f"The sample ({name}) has {shown(example[column])} under {column!r}, which looks like a picture but is not "
            f"read: pictures are in `image` or `images`. Pass image_column={column!r} to load_examples or the recipe "
            "(a list where several columns hold pictures), "
            f'rename it with dataset.rename_column({column!r}, "image"), or remove it to train on text alone.'
        )


def _refused(name: str, key: str, value: Any, why: str) -> ValueError:
    return ValueError(f"The sample ({name}) has {shown(value)} under `{key}`: {why}")


def _check_choice(name: str, key: str, value: Any, choices: list[str] | tuple[str, ...]) -> None:
    value = value if isinstance(value, str) and len(value) < 100 else value and shown(value)
    try:
        check_choice(key, value, choices)
    except ValueError as error:
        raise ValueError(f"The sample ({name}) cannot be read: {error} {LEAVE_OUT}") from None


def _check_image(image: Any, name: str) -> None:
    if isinstance(image, (list, tuple)):
        raise _refused(name, "images", image, "a picture within a list of pictures is itself a list. Flatten it.")
    path = image.get("path") if isinstance(image, dict) and not image.get("bytes") else image
    if is_web(path):
        raise _refused(name, "images", path, f"it is on the web, and nothing is downloaded while training. {DOWNLOAD}.")


def _merged(kind: str, own: list, given: list, name: str) -> list:
    """The pictures or clips of all placeholders, from the parts and from the columns."""
    bare = sum(item is None for item in own)
    if bare == len(own) or len(given) == len(own):
        return given
    if bare != len(given):
        raise ValueError(
            f"The sample ({name}) has {len(given)} {kind}(s) in its columns but {bare} {kind} placeholder(s) without "
            f"one of their own: {len(own) - bare} part(s) hold their {kind}. Leave the columns out, or give them one "
            "for each placeholder."
        )
    rest = iter(given)
    return [next(rest) if item is None else item for item in own]


def _refuse_written(turns: list[dict], messages: list[dict], kind: str, items: list, name: str) -> None:
    """Refuses a placeholder that stands in the text of a part, where it is none, beside real pictures."""
    for turn, message in zip(turns, messages, strict=True):
        for part in [] if isinstance(turn["content"], str) or not items else message["content"]:
            if PLACEHOLDERS[kind] in part.get("text", ""):
                raise _refused(
                    name,
                    "text",
                    part["text"],
                    f"{PLACEHOLDERS[kind]} in the text of a part is no placeholder. Write a part of type {kind!r} in "
                    "its place, or make the content one plain text.",
                )


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


def _pictures(example: dict[str, Any]) -> list:
    """The pictures of the columns `images` or `image`."""
    for column in ("images", "image"):
        if filled(example.get(column)):
            return _as_list(example[column])
    return []


def _videos(example: dict[str, Any]) -> list:
    """The clips of an example; `video` is one clip, whose frames may be a list."""
    if example.get("videos") is not None:
        return list(example["videos"])
    video = example.get("video")
    return [] if video is None or (isinstance(video, str) and not video) else [video]


def _turns(example: dict[str, Any], name: str) -> list[dict]:
    """The conversation as turns with `role` and `content`, which is a text or a list of parts."""
    for column in ("conversations", "messages"):
        if filled(example.get(column)):
            return [_turn(turn, column, name) for turn in _conversation(example[column], column, name)]
    prompt, completion = example.get("prompt"), example.get("completion")
    if filled(prompt) and filled(completion):
        turns = []
        for role, column, side in (("user", "prompt", prompt), ("assistant", "completion", completion)):
            if isinstance(side, str):
                turns.append({"role": role, "content": side})
            else:
                turns += [_turn(turn, column, name) for turn in _conversation(side, column, name)]
        return turns
    raise ValueError(
        f"The sample ({name}) has no conversation. Its columns are {sorted(example)}; needed "
        "is a filled `messages`, `prompt` and `completion`, or `conversations`."
    )


def _conversation(value: Any, column: str, name: str) -> list[dict]:
    """The turns of a column as a list of dicts; also from JSON text, and from a dict of lists (`Sequence`)."""
    wanted = "a list of turns, each a dict with 'role' and 'content' or with 'from' and 'value'"
    if column in ("prompt", "completion"):
        wanted = f"a text or {wanted}"
    if isinstance(value, str):
        value = _json_list(name, column, value, wanted)
    listed = isinstance(value, Mapping) and all(isinstance(items, (list, tuple)) for items in value.values())
    if listed and len({len(items) for items in value.values()}) == 1:
        value = [dict(zip(value, items, strict=True)) for items in zip(*value.values(), strict=True)]
    if not isinstance(value, (list, tuple, np.ndarray)):
        raise _refused(name, column, value, f"it must be {wanted}. {LEAVE_OUT}")
    for turn in value:
        if not isinstance(turn, Mapping):
            raise _refused(name, column, turn, f"the column must be {wanted}; flatten nested lists.")
    return list(value)


def _json_list(name: str, column: str, text: str, wanted: str) -> list:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise _refused(name, column, text, f"it is no JSON ({error}). Give {wanted}, or that as JSON text.") from None
    if not isinstance(value, list):
        raise _refused(name, column, text, f"needed is {wanted}, or that as JSON text.")
    return value


def _turn(turn: Mapping[str, Any], column: str, name: str) -> dict:
    """A turn with `role` and `content` from `from` and `value`, too. Keys that Arrow filled with None do not count."""
    role_key = next((key for key in ("role", "from") if turn.get(key) is not None), None)
    if role_key is None:
        raise _refused(name, column, dict(turn), "the turn has no speaker. Give it a key 'role' or 'from'.")
    role = turn[role_key]
    if role_key == "from":
        _check_choice(name, "from", role, list(ROLES))
    elif column == "conversations" or not isinstance(role, str):
        _check_choice(name, "role", role, [*ROLES, *TOOL_ROLES])
    keys = ("content", "value") if role_key == "role" else ("value", "content")
    content_key = next((key for key in keys if turn.get(key) is not None), None)
    if content_key is None and not turn.get("tool_calls"):
        where = next((key for key in keys if key in turn), keys[0])
        raise _refused(name, where, None, f"the turn of {role!r} has no text. Fill it, or leave the sample out.")
    content = turn[content_key] if content_key else []
    if not isinstance(content, (str, list, tuple, np.ndarray)):
        raise _refused(name, content_key, content, "it must be a text, or a list of parts such as {'type': 'text'}.")
    extra = {} if role_key == "from" else {key: turn[key] for key in turn if key not in ("from", "value")}
    return {**extra, "role": ROLES.get(role, role), "content": content}


def _parts(content: str | list, placeholders: dict[str, str], own: dict[str, list], name: str) -> list[dict]:
    """The content of a message as new parts, without the empty fields that Arrow adds.

    Appends to `own[kind]`, for each placeholder, the picture or clip that its part holds, or None.
    """
    if not isinstance(content, str):
        return [_part(part, own, name) for part in content]
    pieces = re.split(f"({'|'.join(placeholders.values())})", content)
    if len(pieces) == 1:
        return [{"type": "text", "text": content}]
    kinds = {text: kind for kind, text in placeholders.items()}
    # Drop line breaks around LLaVA's placeholders; the template writes its own.
    pieces = [piece.strip("\n") for piece in pieces]
    parts = [{"type": kinds[p]} if p in kinds else {"type": "text", "text": p} for p in pieces if p]
    for part in parts:
        if part["type"] in own:
            own[part["type"]].append(None)
    return parts


def _part(part: Any, own: dict[str, list], name: str) -> dict:
    if isinstance(part, str):
        part = {"type": "text", "text": part}
    if not isinstance(part, Mapping):
        raise _refused(name, "content", part, "each part must be a dict with a 'type', or a text.")
    kinds = (*PLACEHOLDERS, "text", "image_url")
    # Qwen's templates take a part without a type for what its key says.
    kind = part.get("type") or next((kind for kind in kinds if filled(part.get(kind))), None)
    _check_choice(name, "type", kind, kinds)
    kind = "image" if kind == "image_url" else kind
    if kind == "text":
        if not isinstance(part.get("text"), str):
            why = "a part of type 'text' must hold a text. Fill it, or leave the part out."
            raise _refused(name, "text", part.get("text"), why)
        return {"type": "text", "text": part["text"]}
    own[kind].append(_source(part, kind, name))
    return {"type": kind}


def _source(part: Mapping[str, Any], kind: str, name: str) -> Any:
    """The picture or clip that a part holds, or None."""
    key = next((key for key in SOURCES[kind] if filled(part.get(key))), None)
    if key is None:
        return None
    value = part[key]
    if isinstance(value, Mapping) and not {"bytes", "path"} & set(value):
        if "url" not in value:
            raise _refused(name, key, value, "it must be a picture, or a dict with 'bytes', 'path' or 'url'.")
        value = value["url"]
    if kind == "image" and isinstance(value, Mapping) and not filled(value.get("bytes")) and not value.get("path"):
        return None
    if is_web(value):
        raise _refused(name, key, value, f"it is on the web, and nothing is downloaded while training. {DOWNLOAD}.")
    return f"data:;base64,{value}" if key == "base64" else value


def located_parts(conversation: Any, locate: Callable[[str], str]) -> Any:
    """A copy of a conversation in which `locate` has changed the paths that content parts hold."""
    if isinstance(conversation, str):
        try:
            turns = json.loads(conversation)
        except json.JSONDecodeError:
            return conversation
        return json.dumps(located_parts(turns, locate)) if isinstance(turns, list) else conversation
    if not isinstance(conversation, list):
        return conversation
    return [
        {key: _located(value, locate) if key in ("content", "value") else value for key, value in turn.items()}
        if isinstance(turn, dict)
        else turn
        for turn in conversation
    ]


def _located(content: Any, locate: Callable[[str], str]) -> Any:
    if isinstance(content, list):
        return [_located(part, locate) for part in content]
    if not isinstance(content, dict):
        return content
    changed = dict(content)
    for key in SOURCES["image"]:
        value = content.get(key)
        if isinstance(value, dict):
            changed[key] = _located(value, locate)
        elif isinstance(value, str) and value and key != "base64":
            changed[key] = locate(value)
    return changed


def _as_list(value: Any) -> list:
    if not filled(value):
        return []
    return list(value) if isinstance(value, (list, tuple)) else [value]


def sample_name(example: dict[str, Any]) -> str:
    """Words that identify a sample to a person: its id, else the path of its first image."""
    if example.get("id") is not None:
        return f"id {shown(example['id'])}"
    for column in ("images", "image"):
        for image in _as_list(example.get(column)):
            path = image.get("path") if isinstance(image, dict) else image
            if isinstance(path, (str, os.PathLike)):
                return f"image {shown(str(path))}"
    return "without id"


def texts_of(value: Any) -> list[str]:
    """One or several texts as a list; takes the text from VQAv2's answer records."""
    values = [item.get("answer") if isinstance(item, dict) else item for item in _as_list(value)]
    return [str(item) for item in values if item is not None]
