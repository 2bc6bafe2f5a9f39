"""Odd samples: each is read as expected, or refused with its name, the key, the value and the remedy."""

from __future__ import annotations

import base64
import io
import json
import struct
import tracemalloc
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from data_cases import picture, supervised
from datasets import ClassLabel, Dataset, Features, List, Value
from datasets import Image as ImageFeature
from PIL import Image
from tiny import QWEN_TEMPLATE, tiny_llava_processor, tiny_qwen2_5_vl_processor

from hf_dualspeed.data.collators import VisionLanguageCollator
from hf_dualspeed.data.files import rows_of
from hf_dualspeed.data.loading import load_examples
from hf_dualspeed.evaluation.generation import question_and_answers

USER = {"role": "user", "content": "q"}
ANSWER = {"role": "assistant", "content": "a"}
CALL = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
TOOL = {"type": "function", "function": {"name": "f"}}
# Writes what Qwen's own template writes of tools, calls and thoughts.
TOOLS_TEMPLATE = QWEN_TEMPLATE.replace(
    "<|im_end|>\n{% endfor %}",
    "{% if message.reasoning_content %}<think>{{ message.reasoning_content }}</think>{% endif %}"
    "{% for call in message.tool_calls or [] %}<call>{{ call.function | tojson }}{% endfor %}<|im_end|>\n{% endfor %}",
).replace(
    "{% for message in messages %}", "{% if tools %}[{{ tools | tojson }}]{% endif %}{% for message in messages %}", 1
)


@dataclass
class Read:
    """The sample is read: what is learned of it, and a part of the whole text."""

    learned: str
    shows: str = ""


@dataclass
class Refused:
    """The sample is refused by a `ValueError` that matches this pattern behind the sample's name."""

    pattern: str


def chat(*turns, **columns) -> dict:
    return {"id": "x", "messages": list(turns), **columns}


def llava(*turns, **columns) -> dict:
    return {"id": "x", "conversations": [{"from": role, "value": text} for role, text in turns], **columns}


def written(image: Image.Image, form: str) -> bytes:
    file = io.BytesIO()
    image.save(file, form)
    return file.getvalue()


def deep_png(value: int, channels: int) -> bytes:
    """A PNG of 16 bits each, which Pillow cannot write in colour."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    row = b"\0" + struct.pack(">H", value) * channels * 16
    header = struct.pack(">IIBBBBB", 16, 16, 16, {1: 0, 3: 2, 4: 6}[channels], 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(row * 16)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def rows_with_pictures() -> Dataset:
    features = {
        "id": Value("string"),
        "prompt": Value("string"),
        "completion": Value("string"),
        "image": ImageFeature(),
    }
    rows = [{"id": "x", "prompt": "q", "completion": "a", "image": picture()}]
    return Dataset.from_list(rows, features=Features(features))


def said(role: str, **keys) -> dict:
    return {"role": role, "content": "a", **keys}


A = Read("a<|im_end|>")
ROLES = {
    "role human and gpt": (chat({"role": "human", "content": "q"}, said("gpt")), A),
    "role model": (chat(USER, said("model")), A),
    "role bot": (chat(USER, said("bot")), A),
    "role in capitals": (chat({"role": "User", "content": "q"}, said("ASSISTANT")), A),
    "role tool": (chat(USER, said("tool"), ANSWER), Read("a<|im_end|>", "<|im_start|>tool\na<|im_end|>")),
    "role developer": (chat({"role": "developer", "content": "d"}, USER, ANSWER), Read("a<|im_end|>", "developer\nd")),
    "role observation": (llava(("human", "q"), ("observation", "3"), ("gpt", "a")), Read("a<|im_end|>", "tool\n3")),
    "from model": (llava(("user", "q"), ("model", "a")), A),
    "from bot": (llava(("user", "q"), ("bot", "a")), A),
    "from chatgpt": (llava(("human", "q"), ("chatgpt", "a")), A),
    "unknown role": (chat(USER, said("robot")), Refused("`role` must be one of .*'assistant'.*got 'robot'")),
    "misspelt role": (chat(USER, said("asistant")), Refused("got 'asistant'.*Did you mean 'assistant'")),
    "role under prompt": (
        {"id": "x", "prompt": [said("robot")], "completion": "a"},
        Refused("`role` must be .*'robot'"),
    ),
    "role a number": (chat(USER, {"role": 3, "content": "a"}), Refused("`role` must be .*got '3'")),
    "unknown from": (llava(("human", "q"), ("function_call", "{}")), Refused("`from` must be .*got 'function_call'")),
}
SPEAKERS = {
    "assistant first": (chat(ANSWER, USER, ANSWER), Read("a<|im_end|>a<|im_end|>", "You are a helpful")),
    "assistant alone": (chat(ANSWER), Read("a<|im_end|>", "You are a helpful")),
    "assistant behind a system message": (
        chat({"role": "system", "content": "S"}, ANSWER),
        Read("a<|im_end|>", "system\nS<|im_end|>"),
    ),
    "two answers in a row": (chat(USER, ANSWER, ANSWER), Read("a<|im_end|>a<|im_end|>")),
    "weight 0": (chat(USER, said("assistant", weight=0), USER, said("assistant", content="b")), Read("b<|im_end|>")),
    "weight 1": (chat(USER, said("assistant", weight=1)), A),
    "weight of a ShareGPT turn": (
        {
            "id": "x",
            "conversations": [
                {"from": "human", "value": "q"},
                {"from": "gpt", "value": "n", "weight": 0.0},
                {"from": "gpt", "value": "a", "weight": None},
            ],
        },
        A,
    ),
    "weight of a half": (chat(USER, said("assistant", weight=0.5)), Refused("has 0.5 under `weight`: .*Write 0 or 1")),
    "weight 2": (chat(USER, said("assistant", weight=2)), Refused("has 2 under `weight`")),
    "weight a list": (chat(USER, said("assistant", weight=[1, 0])), Refused(r"has \[1, 0\] under `weight`")),
    "weight a tensor": (chat(USER, said("assistant", weight=torch.ones(2))), Refused(r"tensor.* under `weight`")),
    "role an array": (chat(USER, {"role": np.zeros(2), "content": "a"}), Refused("`role` must be .*got 'array")),
    "loss a number": (
        chat(USER, said("assistant", loss=0), USER, said("assistant", content="b", loss=1.0)),
        Read("b<|im_end|>"),
    ),
    "loss false": (
        chat(USER, said("assistant", loss=False), USER, said("assistant", content="b", loss=True)),
        Read("b<|im_end|>"),
    ),
    "train false, of a ShareGPT turn": (
        {
            "id": "x",
            "conversations": [
                {"from": "human", "value": "q"},
                {"from": "gpt", "value": "n", "train": False, "weight": 1},
                {"from": "gpt", "value": "a", "train": True},
            ],
        },
        A,
    ),
    "weight as text": (chat(USER, said("assistant", weight="0")), Refused("has '0' under `weight`")),
}
BESIDES = {
    "system column": (
        llava(("human", "q"), ("gpt", "a"), system="Be S."),
        Read("a<|im_end|>", "system\nBe S.<|im_end|>"),
    ),
    "system column beside the same message": (
        chat({"role": "system", "content": "S"}, USER, ANSWER, system="S"),
        Read("a<|im_end|>", "<|im_start|>system\nS<|im_end|>\n<|im_start|>user"),
    ),
    "system column empty": (chat(USER, ANSWER, system=""), Read("a<|im_end|>", "You are a helpful")),
    "system column of a question": (
        {"id": "x", "question": "q", "answer": "a", "system": "S"},
        Read("a<|im_end|>", "system\nS<|im_end|>"),
    ),
    "two system messages": (
        chat({"role": "system", "content": "T"}, USER, ANSWER, system="S"),
        Refused("has 'S' under `system`: the conversation has another"),
    ),
    "system a list": (chat(USER, ANSWER, system=["S"]), Refused(r"has \['S'\] under `system`: it must be a text")),
    "tool calls": (
        chat(USER, {"role": "assistant", "content": None, "tool_calls": [CALL]}),
        Read('<call>{"name": "f", "arguments": {"x": 1}}<|im_end|>'),
    ),
    "tool calls beside a text": (
        chat(USER, {**ANSWER, "tool_calls": [CALL]}),
        Read('a<call>{"name": "f", "arguments": {"x": 1}}<|im_end|>'),
    ),
    "tool calls, OpenAI's arguments": (
        chat(USER, {**ANSWER, "tool_calls": [{"function": {"name": "f", "arguments": '{"x": 1}'}}]}),
        Read('a<call>{"name": "f", "arguments": {"x": 1}}<|im_end|>'),
    ),
    "tool calls, keys that Arrow filled": (
        chat(USER, {**ANSWER, "tool_calls": [{"function": {"name": "f", "arguments": {"x": 1, "y": None}}}]}),
        Read('a<call>{"name": "f", "arguments": {"x": 1}}<|im_end|>'),
    ),
    "tool calls as JSON text": (
        chat(USER, {**ANSWER, "tool_calls": json.dumps([CALL])}),
        Read('a<call>{"name": "f", "arguments": {"x": 1}}<|im_end|>'),
    ),
    "tool calls of a ShareGPT turn": (
        {
            "id": "x",
            "conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "", "tool_calls": [CALL]}],
        },
        Read('<call>{"name": "f", "arguments": {"x": 1}}<|im_end|>'),
    ),
    "tool calls, a text": (
        chat(USER, {**ANSWER, "tool_calls": "f(1)"}),
        Refused(r"has 'f\(1\)' under `tool_calls`: it is no JSON"),
    ),
    "tool calls, arguments no JSON": (
        chat(USER, {**ANSWER, "tool_calls": [{"function": {"name": "f", "arguments": "x=1"}}]}),
        Refused("has 'x=1' under `arguments`: it is no JSON"),
    ),
    "tool calls, texts": (chat(USER, {**ANSWER, "tool_calls": ["f"]}), Refused(r"has \['f'\] under `tool_calls`")),
    "neither text nor calls": (
        chat(USER, {"role": "assistant", "content": None, "tool_calls": []}),
        Refused("has None under `content`"),
    ),
    "tools": (
        chat(USER, ANSWER, tools=[TOOL]),
        Read("a<|im_end|>", '[[{"type": "function", "function": {"name": "f"}}]]'),
    ),
    "tools as JSON text": (chat(USER, ANSWER, tools=json.dumps([TOOL])), Read("a<|im_end|>", '[[{"type": "function"')),
    "tools as JSON texts": (chat(USER, ANSWER, tools=[json.dumps(TOOL)]), Read("a<|im_end|>", '[[{"type": "function"')),
    "tools empty": (chat(USER, ANSWER, tools="[]"), A),
    "tools, keys that Arrow filled": (
        chat(USER, ANSWER, tools=[{"type": "function", "function": {"name": "f", "strict": None}}]),
        Read("a<|im_end|>", '[[{"type": "function", "function": {"name": "f"}}]]'),
    ),
    "tools, an empty text": (chat(USER, ANSWER, tools=[""]), Refused(r"has \[''\] under `tools`: it must be a list")),
    "tools, no JSON": (chat(USER, ANSWER, tools="f"), Refused("has 'f' under `tools`: it is no JSON")),
    "tools, a name": (chat(USER, ANSWER, tools=[7]), Refused(r"has \[7\] under `tools`: it must be a list of tools")),
    "reasoning": (
        chat(USER, said("assistant", reasoning_content="r")),
        Read("a<think>r</think><|im_end|>"),
    ),
    "reasoning of a ShareGPT turn": (
        {
            "id": "x",
            "conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a", "reasoning_content": "r"}],
        },
        Read("a<think>r</think><|im_end|>"),
    ),
}
TEXTS = {
    "parts as JSON text": (
        chat({"role": "user", "content": '[{"type": "text", "text": "q"}]'}, ANSWER),
        Read("a<|im_end|>", "user\nq<|im_end|>"),
    ),
    "parts as JSON text, with a picture of a column": (
        chat(
            {"role": "user", "content": ' [{"type": "image"}, {"type": "text", "text": "q"}]'}, ANSWER, image=picture()
        ),
        Read("a<|im_end|>", "<|image_pad|><|vision_end|>q<|im_end|>"),
    ),
    "an answer that is JSON": (
        chat(USER, said("assistant", content='[{"type": "text", "bbox": [1]}]')),
        Read('[{"type": "text", "bbox": [1]}]<|im_end|>'),
    ),
    "an answer that is JSON of parts": (
        chat(USER, said("assistant", content='[{"type": "text", "text": "a"}]')),
        Read('[{"type": "text", "text": "a"}]<|im_end|>'),
    ),
    "an answer that is JSON of a page": (
        chat(USER, said("assistant", content='[{"type": "title", "text": "a"}]')),
        Read('[{"type": "title", "text": "a"}]<|im_end|>'),
    ),
    "parts of all turns as JSON text": (
        chat(
            {"role": "user", "content": '[{"type": "text", "text": "q"}]'},
            said("assistant", content='[{"type": "text", "text": "a"}]'),
        ),
        Read("a<|im_end|>", "user\nq<|im_end|>"),
    ),
    "parts of prompt and completion as JSON text": (
        {
            "id": "x",
            "prompt": [{"role": "user", "content": '[{"type": "text", "text": "q"}]'}],
            "completion": [said("assistant", content='[{"type": "text", "text": "a"}]')],
        },
        Read("a<|im_end|>", "user\nq<|im_end|>"),
    ),
    "an answer that is an empty list": (chat(USER, said("assistant", content="[]")), Read("[]<|im_end|>")),
    "question and answer": ({"id": "x", "question": "q", "answer": "a"}, Read("a<|im_end|>", "user\nq<|im_end|>")),
    "question and answer, a number": ({"id": "x", "question": "q", "answer": 7}, Read("7<|im_end|>")),
    "question and a choice's number": (
        {"id": "x", "question": "q", "choices": ["a", "b"], "answer": 1},
        Refused("has 1 under `answer`: it seems to number one of the `choices`.*in words"),
    ),
    "question and a choice's number as text": (
        {"id": "x", "question": "q", "options": ["a", "b"], "answer": "1"},
        Refused("has '1' under `answer`: it seems to number one of the `options`.*in words"),
    ),
    "question and a number that numbers no choice": (
        {"id": "x", "question": "q", "options": ["a", "b"], "answer": "12"},
        Read("12<|im_end|>"),
    ),
    "question and a choice that is a number": (
        {"id": "x", "question": "q", "options": ["1", "2"], "answer": 2},
        Read("2<|im_end|>"),
    ),
    "question and answers": ({"id": "x", "question": "q", "answers": ["b", "a", "a"]}, A),
    "question and VQAv2's answers": (
        {"id": "x", "question": "q", "answers": [{"answer": "a", "answer_id": 1}, {"answer": "b"}, {"answer": "a"}]},
        A,
    ),
    "question and answers as a dict of lists": (
        {"id": "x", "question": "q", "answers": {"answer": ["b", "a", "a"]}},
        A,
    ),
    "question and SQuAD's answers": ({"id": "x", "question": "q", "answers": {"text": ["a"], "answer_start": [1]}}, A),
    "question and answers as JSON text": ({"id": "x", "question": "q", "answers": '["b", "a", "a"]'}, A),
    "question, a blank answer and answers": ({"id": "x", "question": "q", "answer": " ", "answers": ["a"]}, A),
    "question and answers, the first ones blank": ({"id": "x", "question": "q", "answers": ["", " ", "", "a"]}, A),
    "question and blank answers alone": ({"id": "x", "question": "q", "answers": ["", " "]}, Read("")),
    "question and answer NaN": (
        {"id": "x", "question": "q", "answer": float("nan")},
        Refused("cannot be read: `answer` is nan.*leave out the whole row"),
    ),
    "question and answer bytes": ({"id": "x", "question": "q", "answer": b"a"}, Refused("`answer` is b'a'")),
    "question and answers with None": (
        {"id": "x", "question": "q", "answers": ["a", None]},
        Refused(r"`answers` is \['a', None\]"),
    ),
    "question, answer and answers": ({"id": "x", "question": "q", "answer": "a", "answers": ["b", "b"]}, A),
    "question beside a conversation": (chat(USER, ANSWER, question="other", answer="other"), A),
    "question a list": (
        {"id": "x", "question": ["q"], "answer": "a"},
        Refused(r"has \['q'\] under `question`: .*a text"),
    ),
    "half of a surrogate pair": (
        chat(USER, said("assistant", content="so \ud83d")),
        Refused("`content`: character 3 is"),
    ),
    "half of a surrogate pair in a part": (
        chat({"role": "user", "content": [{"type": "text", "text": "\udc00"}]}, ANSWER),
        Refused("under `text`: character 0 is half of a surrogate pair.*Replace it"),
    ),
    "half of a surrogate pair in a value": (llava(("human", "\ud83d"), ("gpt", "a")), Refused("half of a surrogate")),
    "half of a surrogate pair in a thought": (
        chat(USER, said("assistant", reasoning_content="r\ud83d")),
        Refused(r"cannot be rendered: The text .*\\ud83d.* half of a surrogate"),
    ),
    "whole surrogate pair": (chat(USER, said("assistant", content="\U0001f600")), Read("\U0001f600<|im_end|>")),
    "empty answer": (chat(USER, {"role": "assistant", "content": ""}), Read("<|im_end|>")),
    "boxes beside the text": (
        chat(USER, said("assistant", content="<bbox>"), objects={"ref": [], "bbox": [[1, 2, 3, 4]]}),
        Refused(r"has '<bbox>' under `content`: .*`objects`.*Write what it stands for"),
    ),
    "names of objects in a part": (
        chat({"role": "user", "content": [{"type": "text", "text": "a <ref-object>"}]}, ANSWER, objects={"ref": ["c"]}),
        Refused(r"has 'a <ref-object>' under `text`: .*`objects`"),
    ),
    "sounds": (
        chat({"role": "user", "content": "<audio>q"}, ANSWER, audios=["a.wav"]),
        Refused("has '<audio>q' under `content`: .*`audios`.*is not read"),
    ),
    "words like placeholders": (chat(USER, said("assistant", content="<bbox>")), Read("<bbox><|im_end|>")),
    "placeholder in a thought": (
        chat(USER, said("assistant", reasoning_content="<|image_pad|>")),
        Refused(r"has '<\|image_pad\|>' under `reasoning_content`"),
    ),
    "placeholder in a call": (
        chat(USER, {**ANSWER, "tool_calls": [{"function": {"name": "f", "arguments": {"x": "<|image_pad|>"}}}]}),
        Refused(r"has '<\|image_pad\|>' under `x`"),
    ),
    "placeholder in a tool": (
        chat(USER, ANSWER, tools=[{"description": "see <|image_pad|>"}]),
        Refused(r"has 'see <\|image_pad\|>' under `description`"),
    ),
    "placeholder in a system column": (
        chat(USER, ANSWER, system="<|video_pad|>"),
        Refused(r"<\|video_pad\|>' under `text`"),
    ),
    "picture too long for the processor": (
        chat(USER, ANSWER, images=[Image.new("RGB", (900, 4))]),
        Refused("absolute aspect ratio.*unreadable_images='skip'"),
    ),
    "picture too wide for the processor, in a part": (
        chat({"role": "user", "content": [{"type": "image", "image": picture(3, 700)}]}, ANSWER),
        Refused("aspect ratio"),
    ),
}
PNG = written(picture(300, 300), "PNG")
BASE64 = base64.b64encode(PNG).decode()


def shown(image, **columns) -> dict:
    """A sample of prompt and completion with a picture in the column `image`."""
    return {"id": "x", "prompt": "q", "completion": "a", "image": image, **columns}


def unreadable(pattern: str) -> Refused:
    return Refused(f"{pattern}.*Repair or remove the sample, or pass unreadable_images='skip'")


ONE_PICTURE = Read("a<|im_end|>", "<|image_pad|><|vision_end|>q")


def anthropic(**source) -> dict:
    part = {"type": "image", "source": source}
    return chat({"role": "user", "content": [part, {"type": "text", "text": "q"}]}, ANSWER)


PICTURES = {
    "picture, base64 behind data:": (shown(f"data:image/png;base64,{BASE64}"), ONE_PICTURE),
    "picture, a tensor (C, H, W)": (shown(torch.zeros(3, 12, 20, dtype=torch.uint8)), ONE_PICTURE),
    "picture, Anthropic's": (anthropic(type="base64", media_type="image/png", data=BASE64), ONE_PICTURE),
    "picture, Anthropic's, on the web": (
        anthropic(type="url", url="https://x.org/a.png"),
        Refused("under `url`: it is on the web"),
    ),
    "picture, base64 in lines": (shown(f"data:image/png;base64,\n{BASE64[:76]}\n{BASE64[76:]}\n"), ONE_PICTURE),
    "picture, a tensor of bfloat16": (shown(torch.zeros(3, 12, 20, dtype=torch.bfloat16)), ONE_PICTURE),
    "picture, a tensor (H, W)": (shown(torch.zeros(12, 20)), ONE_PICTURE),
    "picture, an array": (shown(np.zeros((12, 20, 3), np.uint8)), ONE_PICTURE),
    "pictures, an array (N, H, W, C)": (
        shown(None, images=np.zeros((2, 12, 20, 3), np.uint8)),
        Read("a<|im_end|>", "<|vision_end|><|vision_start|>"),
    ),
    "pictures, a tensor (N, C, H, W)": (
        shown(None, images=torch.zeros(2, 3, 12, 20)),
        Read("a<|im_end|>", "<|vision_end|><|vision_start|>"),
    ),
    "picture, bare base64": (shown(BASE64), unreadable(r"'iVBOR\w+\.\.\..*' is no path. If it is base64, write data:")),
    "picture, broken base64": (shown("data:image/png;base64,%%" + BASE64), unreadable(r"'data:.*\.\.\..* no base64")),
    "picture, half of one": (shown(PNG[:5000]), unreadable("truncated")),
    "picture, other bytes": (shown(b"x" * 9999), unreadable(r"b'xxx.*\.\.\.xx.*is no picture that Pillow can read")),
    "picture, no bytes": (shown(b""), unreadable("it is b''")),
    "picture, an empty record": (shown({"bytes": None, "path": None}), unreadable("it is None")),
    "picture, a record of no bytes": (shown({"bytes": 7, "path": None}), unreadable("'int' has no len")),
    "picture, a folder": (shown("/"), unreadable("is no regular file, but a folder")),
    "picture, a name of no file": (shown("none.png"), unreadable("No such file or directory: 'none.png'")),
    "picture, None in a list": (shown(None, images=[PNG, None]), unreadable("number 2 of 2: it is None")),
    "picture, a number": (shown(7), unreadable("An image must be .*got 7 of <class 'int'>")),
    "picture, a set": (shown({"a.png"}), unreadable("got {'a.png'} of <class 'set'>")),
    "picture, an array of five channels": (shown(np.zeros((4, 4, 5))), unreadable(r"got \(4, 4, 5\)")),
    "picture, complex pixels": (shown(np.zeros((4, 4), complex)), unreadable("pixels are of type complex128")),
    "picture, floats up to 1000": (shown(np.full((4, 4), 1000.0)), unreadable("from 1000 to 1000")),
    "picture, 12 bits of 16 in colour": (shown(deep_png(4000, 3)), unreadable("hold 12 bits or less.*Save it with 8")),
    "picture, 12 bits of 16 with transparency": (shown(deep_png(4000, 4)), unreadable("hold 12 bits or less")),
    "picture, 12 bits of 16 in grey": (shown(deep_png(4000, 1)), ONE_PICTURE),
    "picture, 16 bits in colour": (shown(deep_png(40000, 3)), ONE_PICTURE),
    "picture, 16 bits in colour, black": (shown(deep_png(0, 3)), ONE_PICTURE),
    "picture, a list in a list": (shown([["a.png"]]), Refused(r"has \['a.png'\] under `image`: .*Flatten it")),
    "picture, another dict": (shown({"file": "a"}), Refused("has {'file': 'a'} under `image`: .*'bytes' or 'path'")),
    "picture, on the web": (shown("HTTPS://x.org/a.png"), Refused("under `image`: it is on the web.*Download")),
}
FORMATS = {
    f"format {form}": (rows_with_pictures().with_format(form)[0], ONE_PICTURE) for form in (None, "numpy", "torch")
} | {
    f"format {form}": (
        rows_with_pictures().with_format(form)[0],
        Refused(r"must be a dict, got \w+. Set dataset.with_form"),
    )
    for form in ("pandas", "arrow")
}
CASES = ROLES | SPEAKERS | BESIDES | TEXTS | PICTURES | FORMATS


@pytest.fixture(scope="module")
def qwen():
    processor = tiny_qwen2_5_vl_processor()
    processor.chat_template = TOOLS_TEMPLATE
    return processor


@pytest.mark.parametrize("name", CASES)
def test_odd_samples_are_read_or_refused_by_name(name, qwen):
    example, expected = CASES[name]
    collator = VisionLanguageCollator(qwen)
    if isinstance(expected, Refused):
        name = "sample 0 of the batch, id 'x'\\)" if isinstance(example, dict) else "A sample"
        with pytest.raises(ValueError, match=f"(?s){name}.*{expected.pattern}") as error:
            collator([example])
        assert len(str(error.value)) < 700
        return
    batch = collator([example])
    assert supervised(qwen, batch, 0) == expected.learned
    assert expected.shows in qwen.tokenizer.decode(batch["input_ids"][0])


# files


def json_of(*rows, encoding: str = "utf-8") -> bytes:
    return json.dumps(rows, ensure_ascii=False).encode(encoding)


def answers(*texts: str) -> Read:
    """What is learned of each row of a file."""
    return Read("|".join(texts))


ROW = {"prompt": "q", "completion": "é"}
LETTERS = "prompt,completion\nq,é\n"
FILES = {
    "CSV, numbers.csv": (b"prompt,completion\nq,007\nq,1.50\nq,1e3\n", answers("007", "1.50", "1e3")),
    "CSV, 23 digits.csv": (b"prompt,completion\nq,12345678901234567890123\n", answers("12345678901234567890123")),
    "CSV, truth.csv": (b"prompt,completion\nq,true\nq,False\n", answers("true", "False")),
    "CSV, words that pandas drops.csv": (
        b"prompt,completion\nq,N/A\nq,null\nq,NaN\nq,None\n",
        answers("N/A", "null", "NaN", "None"),
    ),
    "CSV, dates.csv": (b"prompt,completion\nq,2024-01-02\n", answers("2024-01-02")),
    "CSV, spaces.csv": (b'prompt,completion\nq," a "\n', answers(" a ")),
    "CSV, quotes and lines.csv": (b'prompt,completion\r\nq,"a ""b""\r\nc"\r\n\r\n', answers('a "b"\r\nc')),
    "CSV, semicolons.csv": (b"prompt;completion\nq;1,5\n", answers("1,5")),
    "CSV, tabs.csv": (b"prompt\tcompletion\nq\ta,b\n", answers("a,b")),
    "CSV, byte order mark.csv": (LETTERS.encode("utf-8-sig"), answers("é")),
    "CSV, UTF-16.csv": (LETTERS.encode("utf-16"), answers("é")),
    "CSV, UTF-16 without mark.csv": (LETTERS.encode("utf-16-le"), answers("é")),
    "CSV, UTF-16, big end first.csv": (LETTERS.encode("utf-16-be"), answers("é")),
    "CSV, cp1252.csv": (LETTERS.encode("cp1252"), Refused("is not in UTF-8: it holds the byte 0xe9.*iconv -f cp1252")),
    "CSV, a cell too many.csv": (b"prompt,completion\nq,a\nq,a,b\n", Refused("Row 1 of .* has 3 cells, but 2.*quotes")),
    "CSV, a cell too few.csv": (b"prompt,completion\nq\n", Refused("Row 0 of .* has 1 cells, but 2 columns")),
    "CSV, open quote.csv": (b'prompt,completion\n"q,a\n', Refused("Line 2 of .* is not valid CSV")),
    "CSV, twice the same column.csv": (b"prompt,prompt\nq,a\n", Refused("must name each column once, got .*'prompt'")),
    "CSV, empty.csv": (b"", Refused("must name each column once")),
    "CSV, no rows.csv": (b"prompt,completion\n", Refused("has no rows")),
    "CSV, no completion.csv": (b"prompt,completion\nq,\n", Refused(r"\(row 0 of .* has no conversation")),
    "CSV, questions.csv": (b"question,answer\nq,07\n", answers("07")),
    "CSV, answers.csv": (b'question,answers\nq,"[""b"", ""a"", ""a""]"\nq,c\n', answers("a", "c")),
    "CSV, answers as Python.csv": (
        b"question,answers\nq,\"['a']\"\n",
        Refused(r"Row 0 of .* under `answers`, which is no JSON list.*Write lists"),
    ),
    "CSV, messages.csv": (
        b'messages\n"[{""role"": ""user"", ""content"": ""q""}, {""role"": ""bot"", ""content"": ""a""}]"\n',
        answers("a"),
    ),
    "JSON, byte order mark.json": (json_of(ROW, encoding="utf-8-sig"), answers("é")),
    "JSON, UTF-16.json": (json_of(ROW, encoding="utf-16"), answers("é")),
    "JSONL, byte order mark.jsonl": (json.dumps(ROW).encode("utf-8-sig"), answers("é")),
    "JSON, cp1252.json": (json_of(ROW, encoding="cp1252"), Refused("is not in UTF-8: it holds the byte 0xe9")),
    "JSON, a long sample.json": (json_of({**ROW, "note": "q" * 600_000}, ROW), answers("é", "é")),
    "JSON, questions.json": (json_of({"question": "q", "answer": 7}), answers("7")),
    "JSON, a number.json": (
        json_of({"id": "x", "prompt": "q", "completion": 7}),
        Refused("id 'x'\\) has 7 under `completion`"),
    ),
    "JSON, rows of other keys.json": (
        json_of(
            ROW,
            {"messages": [USER, {**ANSWER, "tool_calls": [CALL], "reasoning_content": "r"}], "tools": [TOOL]},
            {
                "conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "b", "weight": 1}],
                "image": None,
            },
        ),
        answers("é", 'a<think>r</think><call>{"name": "f", "arguments": {"x": 1}}', "b"),
    ),
    "JSON, large numbers in calls.json": (
        json_of(
            {
                "messages": [
                    USER,
                    {**ANSWER, "tool_calls": [{"function": {"arguments": {"x": 12345678901234567890123}}}]},
                ]
            }
        ),
        answers('a<call>{"arguments": {"x": 12345678901234567890123}}'),
    ),
    "JSON, half of a surrogate pair.json": (
        b'[{"id": "x", "prompt": "q", "completion": "\\ud83d"}]',
        Refused(r"row 0 of .*id 'x'\) has '\\ud83d' under `content`"),
    ),
    "JSON, cut off.json": (json_of(ROW, ROW)[:-9], Refused("not valid JSON from row 1 on")),
    "JSON, without an end.json": (json_of(ROW)[:-1], Refused("not valid JSON from row 1 on")),
    "JSON, something behind it.json": (json_of(ROW) + b" x", Refused("goes on behind its list of samples, with 'x'")),
    "JSON, an object.json": (b'{"data": []}', Refused(r"must hold a list of samples.*begins with '{\"data.*jsonl")),
    "JSON, texts.json": (b'["q"]', Refused("Row 0 of .* must be an object with a conversation, got 'q'")),
    "JSON, empty.json": (b"", Refused("must hold a list of samples.*begins with ''")),
    "JSON, no rows.json": (b"[]", Refused("has no rows")),
    "JSONL, empty.jsonl": (b"\n\n", Refused("has no rows")),
    "JSONL, a broken line.jsonl": (
        b'{"prompt": "q", "completion": "a"}\n\n{"prompt"\n',
        Refused("Line 3 of .* not valid JSON"),
    ),
}


@pytest.mark.parametrize("name", FILES)
def test_odd_files_are_read_or_refused_by_name(name, qwen, tmp_path):
    data, expected = FILES[name]
    (tmp_path / name).write_bytes(data)
    if isinstance(expected, Refused):
        with pytest.raises(ValueError, match=f"(?s){expected.pattern}") as error:
            load_examples(str(tmp_path / name))
        assert name in str(error.value)
        assert len(str(error.value)) < 500
        return
    batch = VisionLanguageCollator(qwen)(list(load_examples(str(tmp_path / name))))
    learned = [supervised(qwen, batch, row).removesuffix("<|im_end|>") for row in range(len(batch["labels"]))]
    assert "|".join(learned) == expected.learned


def test_pictures_of_a_csv_file(tmp_path):
    rows = b'prompt,completion,image,images\nq,a,"[""a.png"", ""b.png""]",\nq,a,[1].png,\nq,a,,"[""c.png""]"\n'
    (tmp_path / "data.csv").write_bytes(rows)
    found = [[Path(path).name for path in row["images"]] for row in load_examples(str(tmp_path / "data.csv"))]
    assert found == [["a.png", "b.png"], ["[1].png"], ["c.png"]]


def test_a_file_is_read_once_and_again_when_it_changes(tmp_path):
    file = tmp_path / "data.json"
    file.write_bytes(json_of(ROW))
    first = load_examples(str(file))
    assert load_examples(str(file)).cache_files == first.cache_files != []
    file.write_bytes(json_of(ROW, ROW))
    assert len(load_examples(str(file))) == 2
    other = load_examples(str(file), image_folder="/elsewhere")
    assert other.cache_files != first.cache_files


def test_a_large_file_is_never_in_memory(tmp_path):
    rows = [{"prompt": "q" * 900, "completion": f"a{index}"} for index in range(20_000)]
    (tmp_path / "large.json").write_bytes(json_of(*rows))
    del rows
    tracemalloc.start()
    count = sum(1 for _ in rows_of(tmp_path / "large.json"))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 20_000
    assert peak < 4 * 2**20 < (tmp_path / "large.json").stat().st_size / 4


def test_what_the_template_never_mentions_is_named_once(caplog):
    collator = VisionLanguageCollator(tiny_llava_processor())
    example = chat(USER, {**ANSWER, "tool_calls": [CALL], "mood": "good", "weight": 1}, tools=[TOOL])
    for _ in range(2):
        collator([example])
    lines = [record.getMessage() for record in caplog.records if "never mentions" in record.getMessage()]
    assert [line.split("'")[1] for line in lines] == ["mood", "tool_calls", "tools"]
    assert "end its turn where it should call" in lines[1]


def test_a_template_that_raises_names_the_sample():
    processor = tiny_qwen2_5_vl_processor()
    processor.chat_template = (
        "{% for message in messages %}{% if message.role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
        "{{ message.role + message.content[0].text + '<|im_end|>' }}{% endfor %}"
    )
    collator = VisionLanguageCollator(processor)
    with pytest.raises(ValueError, match=r"sample 1 of the batch, id 'x'\) cannot be rendered: .*no system.*Correct"):
        collator([chat(USER, ANSWER), chat(USER, ANSWER, system="S")])
    with pytest.raises(ValueError, match=r"sample 0 of the batch, id 'x'\) cannot be rendered: .*UndefinedError"):
        collator([chat({"role": "user", "content": []}, ANSWER)])


PARTS = "{% for part in message.content %}{{ '<image>' if part.type == 'image' else part.text }}{% endfor %}"


@pytest.mark.parametrize(
    ("written", "messages", "expected"),
    [
        ("{{ message.content | trim }}", [{"role": "system", "content": "S"}, USER, ANSWER], "S</s>q</s>a</s>"),
        ("{{ message.content | tojson }}", [USER, {"role": "tool", "content": "4"}, ANSWER], 'q</s>"4"</s>a</s>'),
        ("{{ 'A' + message.content }}", [USER, ANSWER, USER, ANSWER], "q</s>Aa</s>q</s>Aa</s>"),
    ],
)
def test_a_template_gets_plain_texts_where_it_takes_no_parts(written, messages, expected):
    """As those of Llama 3.2 Vision and Pixtral do: a list of parts would be learned as Python prints it."""
    processor, odd = tiny_llava_processor(), {"'A'": "assistant", "json": "tool"}
    role = next((role for mark, role in odd.items() if mark in written), "system")
    turn = f"{{% if message.role == '{role}' %}}{written}{{% else %}}{PARTS}{{% endif %}}</s>"
    processor.chat_template = f"{{% for message in messages %}}{turn}{{% endfor %}}"
    batch = VisionLanguageCollator(processor)([chat(*messages)])
    assert processor.tokenizer.decode(batch["input_ids"][0]).removeprefix("<s>") == expected
    assert supervised(processor, batch, 0).endswith("a</s>")


@pytest.mark.parametrize("written", ["{{ message.content }}", "{{ 'A' + message.content }}"])
def test_a_template_without_a_place_for_pictures_is_refused(written):
    processor = tiny_llava_processor()
    processor.chat_template = f"{{% for message in messages %}}{written}</s>{{% endfor %}}"
    assert VisionLanguageCollator(processor)([chat({"role": "system", "content": "S"}, ANSWER)])["labels"].numel()
    with pytest.raises(ValueError, match=r"id 'x'\) cannot be rendered: .*(no place for a picture|concatenate)"):
        VisionLanguageCollator(processor)([chat(USER, ANSWER, images=[picture()])])


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"answer": ["a", "b", "b"]}, ["a", "b", "b"]),
        ({"answer": {"text": "a"}}, ["a"]),
        ({"answers": {"answer": ["a", "b"], "answer_id": [1, 2]}}, ["a", "b"]),
        ({"answers": '["a", "b"]'}, ["a", "b"]),
        ({"answer": 7.0}, ["7.0"]),
        ('{"question": "q", "answer": 1.50}', ["1.50"]),
        ('{"question": "q", "answers": [1e3, 0.10]}', ["1e3", "0.10"]),
    ],
)
def test_a_recipe_scores_the_answers_that_a_file_has(tmp_path, given, expected):
    path = tmp_path / "rows.json"
    path.write_text(f"[{given}]" if isinstance(given, str) else json.dumps([{"question": "q", **given}]))
    assert question_and_answers(load_examples(str(path))[0])[1] == expected


def test_classes_are_learned_by_their_names(tmp_path):
    kind = ClassLabel(names=["no", "yes"])
    features = Features({"question": Value("string"), "answer": kind, "answers": List(kind)})
    rows = {"question": ["q", "r"], "answer": [1, None], "answers": [[], [0, 1]]}
    Dataset.from_dict(rows, features=features).save_to_disk(tmp_path)
    found = load_examples(str(tmp_path))
    assert found["answer"][:] == ["yes", None]
    assert found["answers"][:] == [[], ["no", "yes"]]


@pytest.mark.parametrize("key", ["id", "question", "image", "options"])
def test_half_of_a_surrogate_pair_in_a_column_names_the_row(tmp_path, key):
    row = {"messages": [USER, ANSWER], key: ["x\ud83d"] if key == "options" else "x\ud83d"}
    (tmp_path / "rows.json").write_text(json.dumps([row]))
    with pytest.raises(ValueError, match="row 0 of 'rows.json'.* is half of a surrogate pair") as error:
        load_examples(str(tmp_path / "rows.json"))
    assert not isinstance(error.value, UnicodeError)
