"""Odd samples: each is read as expected, or refused with its name, the key, the value and the remedy."""

from __future__ import annotations

import json
from dataclasses import dataclass

import pytest
from data_cases import picture, supervised
from PIL import Image
from tiny import QWEN_TEMPLATE, tiny_llava_processor, tiny_qwen2_5_vl_processor

from hf_dualspeed.data.collators import VisionLanguageCollator

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
    "question and answer": ({"id": "x", "question": "q", "answer": "a"}, Read("a<|im_end|>", "user\nq<|im_end|>")),
    "question and answer, a number": ({"id": "x", "question": "q", "answer": 7}, Read("7<|im_end|>")),
    "question and answers": ({"id": "x", "question": "q", "answers": ["b", "a", "a"]}, A),
    "question and VQAv2's answers": (
        {"id": "x", "question": "q", "answers": [{"answer": "a", "answer_id": 1}, {"answer": "b"}, {"answer": "a"}]},
        A,
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
CASES = ROLES | SPEAKERS | BESIDES | TEXTS


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
        with pytest.raises(ValueError, match=f"(?s)sample 0 of the batch, id 'x'\\).*{expected.pattern}") as error:
            collator([example])
        assert len(str(error.value)) < 700
        return
    batch = collator([example])
    assert supervised(qwen, batch, 0) == expected.learned
    assert expected.shows in qwen.tokenizer.decode(batch["input_ids"][0])


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
