"""Conversations in all common layouts, brought into the messages of a chat template."""

from __future__ import annotations

import json
import logging
import os
import re
import string
from collections import Counter
from collections.abc import Callable, Mapping
from functools import cache
from numbers import Integral, Real
from typing import Any

import numpy as np

from ..utils.text import loads
from ..utils.validation import check_choice
from .columns import filled, unread_picture
from .media import DOWNLOAD, is_web, shown

logger = logging.getLogger(__name__)

PLACEHOLDERS = {"image": "<image>", "video": "<video>"}
# Roles that data sets write, and those of chat templates.
ROLES = {
    **{"human": "user", "gpt": "assistant", "model": "assistant", "bot": "assistant", "chatgpt": "assistant"},
    **{"function": "tool", "observation": "tool"},
    **{role: role for role in ("system", "user", "assistant", "tool", "developer")},
}

EXTRA_COLUMNS = ("id", "question", "answer")
CHOICES = ("choices", "options")  # columns of texts, one of which an answer may number

# Keys of a content part that hold its picture or clip, as Qwen, OpenAI, Unsloth and transformers write them.
SOURCES = {"image": ("image", "image_url", "path", "url", "base64"), "video": ("video",)}
# Keys by which Qwen's parts give a picture or clip a size of its own.
SIZES = ("min_pixels", "max_pixels", "total_pixels", "resized_height", "resized_width")
LEAVE_OUT = "Correct it, or leave the sample out."
# Further keys of a turn that say whether it is learned, as ms-swift and Axolotl write them.
LEARNED = ("loss", "train")
# Placeholders of ms-swift and LLaMA-Factory for what stands in columns that are not read.
UNREAD = {"<audio>": ("audios", "audio"), "<bbox>": ("objects",), "<ref-object>": ("objects",)}


def to_messages(example: dict[str, Any], name: str | None = None) -> dict[str, list]:
    """Converts an example of any known layout to messages with lists of parts, images and videos.

    Known layouts are TRL's `messages` and `prompt` + `completion`, each with `images` or `image`, LLaVA's
    `conversations` with `image`, and a table of `question` and `answer` (or `answers`, of which the most frequent one
    is taken). Turns may have the keys `role` and `content`, or `from` and `value`; a conversation
    may be JSON text. Videos work the same way, as `videos` or `video`, each a list of frames. An `<image>` in plain
    text becomes a placeholder, and so does a `<video>` if there are videos. If the plain texts hold no placeholders,
    those of all images (or videos) go to the front of the first user message. A part may hold its picture itself, as
    `{"type": "image", "image": ...}`, with `path` or `url`, or as `{"type": "image_url", "image_url": {"url": ...}}`.
    Pictures of the columns belong to the parts without one, or to all parts where there are as many.

    A turn keeps what it holds besides, such as `tool_calls` or `reasoning_content`; `weight: 0` stays, and says that
    the turn is not to be learned, as `loss: false` and `train: false` do, which become it. A text in the column
    `system` becomes the first message, and the column `tools` (a list, or JSON text) is returned. The example stays
    unchanged.

    Args:
        example (`dict`): The example.
        name (`str`, *optional*): What errors call it; default: [`sample_name`].

    Returns:
        `dict` with `messages`, `images`, `videos` and `tools`; the messages hold one part of type `"image"` per image
        and one of type `"video"` per video.

    Raises:
        ValueError: the layout or a role is unknown, a text is missing or no Unicode, a weight is neither 0 nor 1, the
            number of placeholders differs from that of images or videos, a placeholder stands for a column that is not
            read, a picture is on the web, or a column that looks like pictures is not read. The message names the
            sample, the key and the remedy.
    """
    if not isinstance(example, Mapping):
        raise ValueError(
            f"A sample must be a dict, got {type(example).__name__}. Set dataset.with_format(None) to get dicts."
        )
    name = name or sample_name(example)
    given = {"image": _pictures(example, name), "video": _videos(example)}
    turns = _with_system(example, _turns(example, name), name)
    written = {kind: text for kind, text in PLACEHOLDERS.items() if kind == "image" or given[kind]}
    # The picture or clip of each placeholder; None where it comes from a column.
    own: dict[str, list] = {kind: [] for kind in PLACEHOLDERS}
    messages = [{**turn, "content": _parts(turn["content"], written, own, name)} for turn in turns]
    media = {kind: _merged(kind, own[kind], given[kind], name) for kind in PLACEHOLDERS}
    check_pictures_read(example, name, blind=not any(media.values()))
    _refuse_unread(example, turns, messages, name)
    plain = all(isinstance(turn["content"], str) for turn in turns)
    for kind, items in media.items():
        _refuse_written(turns, messages, kind, items, name)
        _add_placeholders(messages, kind, items, plain, name)
    column = "images" if filled(example.get("images")) else "image"
    for image in media["image"]:
        _check_image(image, column, name)
    tools = _tools(example, name)
    return {"messages": messages, "images": media["image"], "videos": media["video"], "tools": tools}


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
    if value is not None and not (isinstance(value, str) and len(value) < 100):
        value = shown(value)
    try:
        check_choice(key, value, choices)
    except ValueError as error:
        raise ValueError(f"The sample ({name}) cannot be read: {error} {LEAVE_OUT}") from None


def _check_image(image: Any, column: str, name: str) -> None:
    if isinstance(image, (list, tuple)):
        raise _refused(name, column, image, "a picture within a list of pictures is itself a list. Flatten it.")
    if isinstance(image, Mapping) and not {"bytes", "path"} & set(image):
        raise _refused(name, column, dict(image), "it must be a picture, or a dict with 'bytes' or 'path'.")
    path = image.get("path") if isinstance(image, Mapping) and not filled(image.get("bytes")) else image
    if is_web(path):
        raise _refused(name, column, path, f"it is on the web, and nothing is downloaded while training. {DOWNLOAD}.")


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


def _refuse_unread(example: Mapping[str, Any], turns: list[dict], messages: list[dict], name: str) -> None:
    """Refuses a placeholder for what stands in a column that is not read: it would be learned as it is written."""
    for mark, columns in UNREAD.items():
        column = next((column for column in columns if filled(example.get(column))), None)
        for turn, message in () if column is None else zip(turns, messages, strict=True):
            text = next((part["text"] for part in message["content"] if mark in part.get("text", "")), None)
            if text is not None:
                key = "content" if isinstance(turn["content"], str) else "text"
                why = f"{mark} in it stands for something in the column `{column}`, which is not read. "
                raise _refused(name, key, text, why + "Write what it stands for in its place, or remove the column.")


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


def _pictures(example: dict[str, Any], name: str) -> list:
    """The pictures of the columns `images` or `image`. Both may be filled where `image` is one of the others."""
    images, image = (_as_list(example.get(column)) for column in ("images", "image"))
    if images and not all(any(_same(one, other) for other in images) for one in image):
        why = (
            "it is none of `images`, and one of the two columns is read. Pass image_column='images' or 'image' to "
            "load_examples or the recipe (or both in a list, where all belong to the sample), or remove one."
        )
        raise _refused(name, "image", example["image"], why)
    return images or image


def _same(one: Any, other: Any) -> bool:
    """Whether two pictures are equal; arrays compare by element."""
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return set(one) == set(other) and all(_same(one[key], other[key]) for key in one)
    if hasattr(one, "ndim") and hasattr(other, "ndim"):
        return np.array_equal(np.asarray(one), np.asarray(other))
    return type(one) is type(other) and not hasattr(one, "ndim") and one == other


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
            return _with_parts([_turn(turn, column, name) for turn in _conversation(example[column], column, name)])
    prompt, completion = example.get("prompt"), example.get("completion")
    if filled(prompt) and filled(completion):
        turns = []
        for role, column, side in (("user", "prompt", prompt), ("assistant", "completion", completion)):
            if isinstance(side, str):
                turns.append({"role": role, "content": side})
            else:
                turns += [_turn(turn, column, name) for turn in _conversation(side, column, name)]
        return _with_parts(turns)
    question = example.get("question")
    if filled(question):
        if not isinstance(question, str):
            raise _refused(name, "question", question, "it must be a text. Correct it, or leave the sample out.")
        number = example.get("answer")
        text = isinstance(number, str) and number.strip().isdecimal()  # as all cells of a CSV file are
        for key in CHOICES if text or (isinstance(number, Integral) and not isinstance(number, bool)) else ():
            choices = example.get(key)
            listed = filled(choices) and isinstance(choices, (list, tuple))
            if listed and str(number).strip() not in map(str, choices) and (not text or int(number) <= len(choices)):
                why = f"it seems to number one of the `{key}`, and would be trained on as it stands."
                raise _refused(
                    name, "answer", number, f"{why} Write the answer in words, and the choices into the question."
                )
        try:
            known = (given_texts(example.get(column), column) for column in ("answer", "answers"))
            # A blank answer is none, as in an evaluation.
            right = next(filter(None, ([text for text in texts if text.strip()] for texts in known)), [])
        except ValueError as error:
            raise ValueError(f"The sample ({name}) cannot be read: {error}") from None
        # Of VQAv2's ten answers, most people's.
        answer = [{"role": "assistant", "content": text} for text, _ in Counter(right).most_common(1)]
        return [{"role": "user", "content": question}, *answer]
    raise ValueError(
        f"The sample ({name}) has no conversation. Its columns are {sorted(example)}; needed is a filled `messages`, "
        "`prompt` and `completion`, `conversations`, or `question` and `answer`. A table with other names is brought "
        "into these by `dualspeed convert table`."
    )


def _with_parts(turns: list[dict]) -> list[dict]:
    """The turns with their parts decoded, where a table holds these as JSON text.

    The assistant's are decoded where others' are, too: alone, they are JSON that a model is to answer.
    """
    read = [{**turn, "content": _json_parts(turn["content"])} for turn in turns]
    known = any(one["role"] != "assistant" and one != turn for one, turn in zip(read, turns, strict=True))
    return read if known else turns


def _with_system(example: Mapping[str, Any], turns: list[dict], name: str) -> list[dict]:
    """The turns behind the text of the column `system`, as ShareGPT has it."""
    system = example.get("system")
    if not filled(system):
        return turns
    if not isinstance(system, str):
        raise _refused(name, "system", system, "it must be a text, which becomes the first message.")
    first = turns[0] if turns and turns[0]["role"] == "system" else None
    if first is None:
        return [{"role": "system", "content": system}, *turns]
    if first["content"] != system:
        raise _refused(name, "system", system, "the conversation has another system message. Leave one of them out.")
    return turns


def _tools(example: Mapping[str, Any], name: str) -> list | None:
    """The column `tools`, for the chat template."""
    given = example.get("tools")
    if not filled(given):
        return None
    wanted = "a list of tools, each a dict such as {'type': 'function', 'function': ...}"
    tools = _json_list(name, "tools", given, wanted) if isinstance(given, str) else given
    if not isinstance(tools, (list, tuple, np.ndarray)):
        raise _refused(name, "tools", given, f"it must be {wanted}.")
    tools = [_decoded(tool) for tool in tools]
    if not all(isinstance(tool, Mapping) for tool in tools):
        raise _refused(name, "tools", given, f"it must be {wanted}.")
    return [without_nulls(tool) for tool in tools] or None


def without_nulls(value: Any) -> Any:
    """A copy without the keys that Arrow fills with None, because other rows have them."""
    if isinstance(value, Mapping):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    return [without_nulls(item) for item in value] if isinstance(value, (list, tuple)) else value


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
    value = [_decoded(turn) for turn in value]
    for turn in value:
        if not isinstance(turn, Mapping):
            raise _refused(name, column, turn, f"the column must be {wanted}; flatten nested lists.")
    return value


def _decoded(item: Any) -> Any:
    """A turn or tool that is JSON text, decoded."""
    try:
        return loads(item) if isinstance(item, str) and item.startswith("{") else item
    except json.JSONDecodeError:
        return item


def _json_list(name: str, column: str, text: str, wanted: str) -> list:
    try:
        value = loads(text)
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
    if not isinstance(role, str) or role.lower() not in ROLES:
        _check_choice(name, role_key, role, list(ROLES))
    keys = ("content", "value") if role_key == "role" else ("value", "content")
    content_key = next((key for key in keys if turn.get(key) is not None), None)
    if content_key is None and not filled(turn.get("tool_calls")):
        where = next((key for key in keys if key in turn), keys[0])
        raise _refused(name, where, None, f"the turn of {role!r} has no text. Fill it, or leave the sample out.")
    content = turn[content_key] if content_key else []
    if not isinstance(content, (str, list, tuple, np.ndarray)):
        raise _refused(name, content_key, content, "it must be a text, or a list of parts such as {'type': 'text'}.")
    extra = {key: value for key, value in turn.items() if key not in ("role", "from", *keys) and filled(value)}
    weight = extra.pop("weight", 1)
    if not isinstance(weight, Real) or weight not in (0, 1):
        why = "a turn is learned (1) or not (0), and nothing between. Write 0 or 1, or leave the weight out."
        raise _refused(name, "weight", weight, why)
    for key in LEARNED:
        if isinstance(extra.get(key), Real) and extra[key] in (0, 1):  # a table may hold numbers
            weight = min(weight, extra.pop(key))
    if weight == 0:
        extra["weight"] = 0
    if "tool_calls" in extra:
        extra["tool_calls"] = _tool_calls(extra["tool_calls"], name)
    return {**extra, "role": ROLES[role.lower()], "content": content}


def _json_parts(content: Any) -> Any:
    """Content whose parts are written as JSON text, as tables hold them, decoded; any other stays as it is."""
    keys = {"type", "text", *SOURCES["image"], *SOURCES["video"], *SIZES}
    try:
        parts = loads(content) if isinstance(content, str) and content.lstrip().startswith("[") else None
    except json.JSONDecodeError:
        return content
    # Objects with other keys, such as boxes, are what a model is to answer.
    known = isinstance(parts, list) and all(
        isinstance(part, dict) and "type" in part and set(part) <= keys for part in parts
    )
    return parts if known and parts else content


def _tool_calls(calls: Any, name: str) -> list:
    """Calls whose arguments are dicts, as chat templates write them; OpenAI has JSON text there."""
    if isinstance(calls, str):
        calls = _json_list(name, "tool_calls", calls, "a list of calls")
    if not isinstance(calls, (list, tuple, np.ndarray)) or not all(isinstance(call, Mapping) for call in calls):
        raise _refused(name, "tool_calls", calls, "it must be a list of calls, each a dict with a 'function'.")
    calls = [without_nulls(call) for call in calls]
    for call in calls:
        function = call.get("function", call)
        if isinstance(function, dict) and isinstance(function.get("arguments"), str):
            try:
                function["arguments"] = loads(function["arguments"])
            except json.JSONDecodeError as error:
                why = f"it is no JSON ({error}). Give the arguments as a dict, or as JSON text."
                raise _refused(name, "arguments", function["arguments"], why) from None
    return calls


def _parts(content: str | list, placeholders: dict[str, str], own: dict[str, list], name: str) -> list[dict]:
    """The content of a message as new parts, without the empty fields that Arrow adds.

    Appends to `own[kind]`, for each placeholder, the picture or clip that its part holds, or None.
    """
    if not isinstance(content, str):
        return [_part(part, own, name) for part in content]
    check_unicode(name, "content", content)
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


def check_unicode(name: str, key: str, text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        near = text[max(0, error.start - 20) : error.end + 20]
        why = f"character {error.start} is half of a surrogate pair, which no tokenizer reads. Replace it."
        raise _refused(name, key, near, why) from None


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
        check_unicode(name, "text", part["text"])
        return {"type": "text", "text": part["text"]}
    for key in SIZES:
        if filled(part.get(key)):
            warn_of_size(key)
    own[kind].append(_source(part, kind, name))
    return {"type": kind}


@cache
def warn_of_size(key: str) -> None:
    """Says once that a size under `key` is not read."""
    logger.warning(
        "Parts of the data hold `%s`, a size of one picture or clip, which is not read: the processor has one rule for "
        "all. Set that, by max_pixels or processor_options in a recipe, or resize the pictures themselves.",
        key,
    )


def _source(part: Mapping[str, Any], kind: str, name: str) -> Any:
    """The picture or clip that a part holds, or None."""
    source = part.get("source")
    if isinstance(source, Mapping):  # as Anthropic writes it
        part = {**part, "base64": source.get("data"), "url": source.get("url")}
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
            turns = loads(conversation)
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
    # numpy's and torch's formats make one array of a list: (N,), or (N, H, W, C) of pictures of one size.
    many = isinstance(value, (list, tuple)) or getattr(value, "ndim", None) in (1, 4)
    return list(value) if many else [value]


def sample_name(example: dict[str, Any]) -> str:
    """Words that identify a sample to a person: its id, else the path of its first image."""
    if not isinstance(example, Mapping):
        return f"a {type(example).__name__}"
    if example.get("id") is not None:
        return f"id {shown(example['id'])}"
    for column in ("images", "image"):
        for image in _as_list(example.get(column)):
            path = image.get("path") if isinstance(image, dict) else image
            if isinstance(path, (str, os.PathLike)):
                return f"image {shown(str(path))}"
    return "without id"


def given_texts(value: Any, column: str) -> list[str]:
    """One or several texts of a column as a list.

    It reads a text or number, a list of them, VQAv2's records (`answer`) and SQuAD's (`text`), each as a list of dicts
    or a dict of lists, options by letter (`{"A": ..., "B": ...}`), and all of these as JSON text; but a text in the
    column `answer` stays one, whatever it looks like.

    Raises:
        ValueError: it holds something else, or None (NaN) among others, which would shift letters and shares.
    """
    if isinstance(value, str) and column != "answer" and value.lstrip().startswith(("[", "{")):
        try:
            value = loads(value)
        except json.JSONDecodeError as error:
            raise ValueError(f"`{column}` is {shown(value)}, which is no JSON: {error}. Write it as JSON.") from None
    value = value.tolist() if isinstance(value, np.ndarray) else value
    if value is None:
        return []
    values = value if isinstance(value, (list, tuple)) else [value]
    if isinstance(value, Mapping):
        letters = list(value) == list(string.ascii_uppercase[: len(value)])
        record = value.get("answer", value.get("text"))
        values = list(value.values()) if letters else record if isinstance(record, (list, tuple)) else [record]
    values = [item.get("answer", item.get("text")) if isinstance(item, Mapping) else item for item in values]
    # NaN, which stands for nothing in tables, is the value that does not equal itself.
    if any(not isinstance(item, (str, int, float)) or item != item for item in values):
        raise ValueError(
            f"`{column}` is {shown(value)}, which has something among its texts that is none. Give a text or a list of "
            "texts, and leave out the whole row where one is missing."
        )
    return [str(item) for item in values]
