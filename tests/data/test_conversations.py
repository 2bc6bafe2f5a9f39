"""Layouts of conversations: each is read, or refused with the sample's name, the key, the value and the remedy."""

from __future__ import annotations

import base64
import copy
import csv
import io
import json

import numpy as np
import pytest
import torch
from data_cases import picture, supervised, talk
from datasets import Dataset, Features, List, Value
from datasets import Image as ImageFeature
from tiny import tiny_llava_processor, tiny_qwen2_5_vl_processor

from hf_dualspeed.data.checking import check_samples
from hf_dualspeed.data.collators import VisionLanguageCollator
from hf_dualspeed.data.conversations import sample_name, to_messages, warn_of_size
from hf_dualspeed.data.loading import load_examples, undecoded
from hf_dualspeed.evaluation.generation import prompts

PICTURE = picture(6, 4)


def png(image=PICTURE) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


BASE64 = base64.b64encode(png()).decode()
DATA_URL = f"data:image/png;base64,{BASE64}"
TEXT = {"type": "text", "text": "What?"}
ANSWER = {"role": "assistant", "content": [{"type": "text", "text": "That."}]}


def asked(*parts, **columns) -> dict:
    """A sample with id "x" whose user says `parts`."""
    return {"id": "x", "messages": [{"role": "user", "content": list(parts)}, ANSWER], **columns}


# pictures within the content

PARTS = {
    "Qwen, path": ({"type": "image", "image": "a.png"}, "a.png"),
    "Qwen, file URL": ({"type": "image", "image": "file:///d/a.png"}, "file:///d/a.png"),
    "Qwen, base64": ({"type": "image", "image": DATA_URL, "min_pixels": 4}, DATA_URL),
    "PIL": ({"type": "image", "image": PICTURE}, PICTURE),
    "bytes": ({"type": "image", "image": png()}, png()),
    "record": ({"type": "image", "image": {"bytes": png(), "path": None}}, {"bytes": png(), "path": None}),
    "transformers, path": ({"type": "image", "path": "a.png"}, "a.png"),
    "transformers, url": ({"type": "image", "url": "a.png"}, "a.png"),
    "transformers, base64": ({"type": "image", "base64": BASE64}, f"data:;base64,{BASE64}"),
    "OpenAI": ({"type": "image_url", "image_url": {"url": DATA_URL, "detail": "low"}}, DATA_URL),
    "OpenAI, short": ({"type": "image_url", "image_url": "a.png"}, "a.png"),
    "without a type": ({"image": "a.png"}, "a.png"),
    "Arrow": ({"type": "image", "text": None, "image": None, "path": "a.png", "image_url": None}, "a.png"),
}


@pytest.mark.parametrize("name", PARTS)
def test_pictures_are_taken_from_the_parts(name):
    part, expected = PARTS[name]
    example = asked(part, TEXT)
    sample = to_messages(example)
    assert sample["messages"][0]["content"] == [{"type": "image"}, TEXT]
    assert sample["images"] == [expected]
    assert example["messages"][0]["content"][0] is part


def test_sizes_of_single_pictures_are_said_once_not_to_be_read(caplog):
    warn_of_size.cache_clear()
    parts = [{"type": "image", "image": "a.png", "max_pixels": pixels} for pixels in (None, 50176, 50176)]
    for content in (parts, json.dumps(parts)):
        sample = {"messages": [{"role": "user", "content": content}, ANSWER]}
        assert to_messages(sample)["images"] == ["a.png"] * 3
    assert caplog.text.count("`max_pixels`, a size of one picture or clip, which is not read") == 1


def test_the_parts_pictures_reach_the_batch(tmp_path):
    PICTURE.save(tmp_path / "a.png")
    collator = VisionLanguageCollator(tiny_llava_processor(), image_folder=str(tmp_path))
    sources = [PICTURE, png(), DATA_URL, "a.png", {"bytes": png(), "path": None}]
    batch = collator([asked({"type": "image", "image": source}, TEXT) for source in sources])
    expected = collator([asked({"type": "image"}, TEXT, images=[PICTURE])])
    assert all(torch.equal(pixels, expected["pixel_values"][0]) for pixels in batch["pixel_values"])
    assert all(torch.equal(ids, expected["input_ids"][0]) for ids in batch["input_ids"])


@pytest.mark.parametrize(
    ("parts", "images", "expected"),
    [
        (["a", "b"], [], ["a", "b"]),
        (["a", None, "b"], ["c"], ["a", "c", "b"]),
        # As many pictures in the column as placeholders: the column's, as TRL writes both.
        (["a", "b"], ["c", "d"], ["c", "d"]),
        ([None, None], ["c", "d"], ["c", "d"]),
    ],
)
def test_pictures_of_parts_and_columns_come_in_their_order(parts, images, expected):
    content = [{"type": "image", "image": part} for part in parts]
    assert to_messages(asked(*content, TEXT, images=images))["images"] == expected


def test_clips_are_taken_from_the_parts():
    frames = [PICTURE, PICTURE]
    sample = to_messages(asked({"type": "video", "video": frames}, TEXT))
    assert sample["videos"] == [frames]
    assert sample["messages"][0]["content"][0] == {"type": "video"}


@pytest.mark.parametrize("ending", ["json", "jsonl", "parquet", "csv"])
def test_paths_in_parts_start_at_the_files_folder(tmp_path, ending):
    rows = [asked({"type": "image", "image": path}, TEXT) for path in ("a.png", DATA_URL, "/b/c.png")]
    file = tmp_path / f"data.{ending}"
    if ending == "json":
        file.write_text(json.dumps(rows), encoding="utf-8")
    elif ending == "jsonl":
        file.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    elif ending == "parquet":
        Dataset.from_list(rows).to_parquet(file)
    else:
        with open(file, "w", newline="", encoding="utf-8") as out:
            csv.writer(out).writerows([["messages"], *([json.dumps(row["messages"])] for row in rows)])
    found = [to_messages(row)["images"] for row in load_examples(str(file))]
    assert found == [[str(tmp_path / "a.png")], [DATA_URL], ["/b/c.png"]]


def test_pictures_within_messages_stay_encoded():
    part = {"type": Value("string"), "text": Value("string"), "image": ImageFeature()}
    features = Features({"messages": List({"role": Value("string"), "content": List(part)}), "id": Value("string")})
    content = [{"type": "image", "text": None, "image": {"bytes": b"broken", "path": None}}, {**TEXT, "image": None}]
    row = {"id": "x", "messages": [{"role": "user", "content": content}]}
    data = Dataset.from_list([row], features=features)
    assert to_messages(undecoded(data)[0])["images"] == [{"bytes": b"broken", "path": None}]


# turns

TURNS = {
    "messages, from and value": {"messages": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
    "conversations, role and content": {
        "conversations": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    },
    "conversations, human and gpt as roles": {
        "conversations": [{"role": "human", "content": "q"}, {"role": "gpt", "content": "a"}]
    },
    "Arrow's empty keys": {
        "messages": [
            {"role": "user", "content": "q", "from": None, "value": None},
            {"role": None, "content": None, "from": "gpt", "value": "a"},
        ]
    },
    "prompt and completion, from and value": {
        "prompt": [{"from": "human", "value": "q"}],
        "completion": [{"from": "gpt", "value": "a"}],
    },
    "value as parts": {
        "conversations": [
            {"from": "human", "value": [{"type": "text", "text": "q"}]},
            {"from": "gpt", "value": [{"type": "text", "text": "a"}]},
        ]
    },
    "texts as parts": {"messages": [{"role": "user", "content": ["q"]}, {"role": "assistant", "content": ["a"]}]},
    "JSON text": {"messages": '[{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]'},
    "JSON text, LLaVA": {"conversations": '[{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]'},
    "a dict of lists": {"conversations": {"from": ["human", "gpt"], "value": ["q", "a"]}},
}


@pytest.mark.parametrize("name", TURNS)
def test_turns_of_every_layout(name):
    example = TURNS[name]
    before = copy.deepcopy(example)
    assert to_messages(example)["messages"] == [
        {"role": "user", "content": [{"type": "text", "text": "q"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "a"}]},
    ]
    assert example == before


def test_a_turn_of_tool_calls_needs_no_text_and_keeps_its_keys():
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f"}}]}
    sample = to_messages({"messages": [{"role": "user", "content": "q"}, call, {"role": "tool", "content": "3"}]})
    assert sample["messages"][1] == {**call, "content": []}
    assert sample["messages"][2]["role"] == "tool"


# what is refused

LONG = "z" * 5000
REFUSED = {
    "text null": (asked({"type": "text", "text": None}), r"has None under `text`: .*Fill it, or leave"),
    "text a number": (asked({"type": "text", "text": 7}), "has 7 under `text`"),
    "text missing": (asked({"type": "text"}), "has None under `text`"),
    "value null": (
        {"id": "x", "conversations": [{"from": "human", "value": None}]},
        "has None under `value`: the turn of 'human' has no text. Fill it",
    ),
    "no value": ({"id": "x", "conversations": [{"from": "human"}]}, "has None under `value`"),
    "value a number": ({"id": "x", "conversations": [{"from": "human", "value": 7}]}, "has 7 under `value`: .*a text"),
    "content null": (
        {"id": "x", "messages": [{"role": "user", "content": None}]},
        "has None under `content`: the turn of 'user' has no text",
    ),
    "content a dict": (
        {"id": "x", "messages": [{"role": "user", "content": TEXT}]},
        "`content`: .*list of parts",
    ),
    "part a list": (asked(["q"]), r"has \['q'\] under `content`: each part must be a dict"),
    "unknown type": (asked({"type": "img", "img": "a.png"}), "`type` must be one of 'image'.*got 'img'.*Correct it"),
    "no type": (asked({"words": "q"}), "`type` must be one of .*got None"),
    "no role": ({"id": "x", "messages": [{"content": "q"}]}, "under `messages`: .*no speaker.*'role' or 'from'"),
    "unknown from": ({"id": "x", "conversations": [{"from": "robot", "value": "q"}]}, "`from` must be .*got 'robot'"),
    "unknown role": ({"id": "x", "conversations": [{"role": "robot", "content": "q"}]}, "`role` must be .*got 'robot'"),
    "long role": ({"id": "x", "conversations": [{"from": LONG, "value": "q"}]}, r"`from` must be one .*zz\.\.\.zz"),
    "text, no JSON": (
        {"id": "x", "messages": "user: q"},
        "has 'user: q' under `messages`: it is no JSON ",
    ),
    "JSON of a text": ({"id": "x", "messages": '"q"'}, "under `messages`: needed is a list of turns"),
    "nested turns": ({"id": "x", "messages": [[{"role": "user", "content": "q"}]]}, "under `messages`: .*flatten"),
    "completion a number": (
        {"id": "x", "prompt": "q", "completion": 7},
        "has 7 under `completion`: .*a text or a list",
    ),
    "unequal lists": ({"id": "x", "messages": {"role": ["user"], "content": []}}, "under `messages`: .*list of turns"),
    "texts as turns": ({"id": "x", "messages": ["q", "a"]}, "has 'q' under `messages`: .*list of turns"),
    "a web picture": (
        asked({"type": "image", "image": "https://x.org/a.png"}),
        "has 'https://x.org/a.png' under `image`: it is on the web.*Download the picture and give its path",
    ),
    "a web picture, OpenAI": (
        asked({"type": "image_url", "image_url": {"url": "http://x.org/a.png"}}),
        "has 'http://x.org/a.png' under `image_url`: .*Download",
    ),
    "a web picture, column": (
        talk("q", "a", images=["https://x.org/a.png"], id="x"),
        "has 'https://x.org/a.png' under `images`: .*Download",
    ),
    "a picture that is a dict": (asked({"type": "image", "image": {"file": "a"}}), "under `image`: .*'bytes', 'path'"),
    "nested pictures": (talk("q", "a", images=[["a.png"]], id="x"), r"has \['a.png'\] under `images`: .*Flatten"),
    "a placeholder in a part": (
        asked({"type": "image"}, {"type": "text", "text": "<image>\nWhat?"}, images=["a.png"]),
        r"has '<image>\\nWhat\?' under `text`: <image> in the text of a part is no placeholder.*type 'image'",
    ),
    "a placeholder beside the part's own": (
        asked({"type": "image", "image": "a.png"}, {"type": "text", "text": "<image>"}),
        "has '<image>' under `text`",
    ),
    "a placeholder instead of a part": (
        asked({"type": "text", "text": "<image> What?"}, images=["a.png"]),
        "has '<image> What.' under `text`",
    ),
    "too many pictures": (
        asked({"type": "image", "image": "a"}, {"type": "image"}, images=["b", "c", "d"]),
        r"3 image\(s\) in its columns but 1 image placeholder\(s\) without one of their own: 1 part",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusals_name_sample_key_value_and_remedy(name):
    example, message = REFUSED[name]
    with pytest.raises(ValueError, match=f"(?s)The sample \\(id 'x'\\).*{message}") as error:
        to_messages(example)
    assert len(str(error.value)) < 600


def test_json_rows_are_named(tmp_path):
    rows = [talk("q", "a"), asked({"type": "text", "text": None})]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    with pytest.raises(ValueError, match=r"row 1 of 'data.jsonl', id 'x'\) has None under `text`"):
        load_examples(str(tmp_path / "data.jsonl"))
    for image in (None, 7, {"bytes": "aa"}):
        (tmp_path / "data.json").write_text(json.dumps([{**talk("q", "a"), "images": [image]}]), encoding="utf-8")
        with pytest.raises(ValueError, match=r"row 0 of 'data.json'.*under `images`: .*must be a path"):
            load_examples(str(tmp_path / "data.json"))


def test_the_collator_names_the_sample_of_the_batch():
    with pytest.raises(ValueError, match=r"sample 1 of the batch, without id\) has None under `content`"):
        VisionLanguageCollator(tiny_llava_processor())([talk("q", "a"), {"messages": [{"role": "user"}]}])


def test_the_collator_names_a_picture_of_another_type():
    with pytest.raises(TypeError, match=r"sample 0 of the batch, id 'x'\): An image must be .*got 7 of <class 'int'>"):
        VisionLanguageCollator(tiny_llava_processor())([asked({"type": "image", "image": 7}, TEXT)])


def test_long_names_are_shortened():
    assert len(sample_name({"image": DATA_URL * 99})) < 120
    assert len(sample_name({"id": LONG})) < 120


# placeholders of the processor in texts


@pytest.mark.parametrize(
    ("build", "text", "mark"),
    [
        (tiny_qwen2_5_vl_processor, "see <|image_pad|>", "<|image_pad|>"),
        (tiny_qwen2_5_vl_processor, "see <|video_pad|>", "<|video_pad|>"),
        (tiny_llava_processor, [{"type": "text", "text": "The tag <image>"}], "<image>"),
    ],
)
@pytest.mark.parametrize("images", [0, 1])
def test_a_text_with_the_processors_placeholder_is_refused(build, text, mark, images):
    processor = build()
    content = text if isinstance(text, list) else [{"type": "text", "text": text}]
    example = asked(*[{"type": "image", "image": PICTURE}] * images, *content)
    with pytest.raises(ValueError, match=r"\(.*id 'x'\) has .* under `text`: .*") as error:
        VisionLanguageCollator(processor)([example])
    assert mark in str(error.value)
    with pytest.raises(ValueError, match=r"\(id 'x'\) has .* under `text`: .*"):
        prompts(torch.nn.Linear(1, 1), processor, [example])


def test_llavas_placeholder_in_plain_text_stays_one():
    processor = tiny_llava_processor()
    batch = VisionLanguageCollator(processor)([talk("<image>\nColour", "grey", images=[PICTURE])])
    assert supervised(processor, batch, 0) == " grey</s>"
    assert (batch["input_ids"] == processor.image_token_id).sum() == 16


def test_a_tag_in_a_text_only_sample_is_text_where_the_processor_has_no_such_mark():
    processor = tiny_qwen2_5_vl_processor()
    batch = VisionLanguageCollator(processor)([asked({"type": "text", "text": "The tag <image>"})])
    assert "<image>" in processor.tokenizer.decode(batch["input_ids"][0])


# columns of pictures that are not read

UNREAD = [
    ("img", "a.png"),
    ("image_1", "a.png"),
    ("image_path", "folder/a"),
    ("imagePath", "a.png"),
    ("Image", "a.png"),
    ("IMAGES", ["a.png"]),
    ("picture", PICTURE),
    ("pictures", [PICTURE]),
    ("image_url", "https://x.org/a.png"),
    ("photo", {"bytes": png(), "path": None}),
    ("image_bytes", png()),
    ("image_base64", BASE64),
    ("left_image", "a.JPG"),
    ("file_name", "a.webp"),
    ("scan", PICTURE),
    ("x", png()),
    ("x", {"bytes": png(), "path": "a"}),
    ("x", [{"bytes": png(), "path": None}]),
    ("x", f"data:image/png;base64,{BASE64}"),
    ("figure", "a.png"),
    ("jpg", "a.jpg"),
]


@pytest.mark.parametrize(("column", "value"), UNREAD)
def test_unread_pictures_are_named(column, value):
    with pytest.raises(ValueError, match=rf"\(id 'x'\) has .* under '{column}'.*image_column='{column}'.*rename_col"):
        to_messages(talk("q", "a", id="x") | {column: value})


@pytest.mark.parametrize(
    "columns",
    [
        {"image_id": 7, "image_width": 640},
        {"image_id": "a7", "image_caption": "a cat", "image_classes": ["cat"]},
        {"img": None, "image_path": "", "pictures": []},
        {"topic": "a.png", "source": "web/a.png"},
        {"path": "books/a.txt", "file_name": "a.json", "media": "radio"},
        {"audio": {"bytes": b"1", "path": "a.wav"}},
        {"sound": {"bytes": b"RIFF0000WAVE", "path": None}, "frame": "inertial", "blob": b"BM"},
        {"id": "a.png", "answers": ["a.png"]},
    ],
)
def test_text_only_samples_pass(columns):
    assert to_messages(talk("q", "a") | columns)["images"] == []


def test_a_path_beside_its_picture_passes_and_a_second_picture_does_not():
    example = talk("q", "a", images=[PICTURE], id="x")
    assert to_messages(example | {"image_path": "a.png", "picture": "a.png"})["images"] == [PICTURE]
    with pytest.raises(ValueError, match="under 'image_2'"):
        to_messages(example | {"image_2": "b.png"})


def test_image_beside_images_is_one_of_them():
    other = picture(4, 4)
    example = talk("q", "a", images=[PICTURE, other], id="x")
    assert len(to_messages(example | {"image": PICTURE.copy()})["images"]) == 2
    assert len(to_messages(example | {"image": None})["images"]) == 2
    for images, image in (([PICTURE], other), (["a.png"], "b.png"), ([np.zeros((4, 4))], np.ones((4, 4)))):
        with pytest.raises(ValueError, match="under `image`: it is none of `images`.*image_column='images'"):
            to_messages(example | {"images": images, "image": image})


def table(tmp_path, ending: str, columns: dict) -> str:
    """A file with two samples: texts and `columns`."""
    rows = [
        {"prompt": "q", "completion": "a"} | {key: values[row] for key, values in columns.items()} for row in (0, 1)
    ]
    file = tmp_path / f"data.{ending}"
    if ending == "json":
        file.write_text(json.dumps(rows), encoding="utf-8")
    elif ending == "csv":
        with open(file, "w", newline="", encoding="utf-8") as out:
            csv.writer(out).writerows([list(rows[0]), *(list(row.values()) for row in rows)])
    else:
        Dataset.from_list(rows).to_parquet(file)
    return str(file)


def checked(dataset: Dataset, name: str) -> None:
    collator = VisionLanguageCollator(tiny_llava_processor())
    check_samples(dataset, collator, name=name).settle(collator)


@pytest.mark.parametrize("ending", ["json", "csv", "parquet"])
def test_files_with_unread_pictures(tmp_path, ending):
    file = table(tmp_path, ending, {"img": ["a.png", "b.png"], "note": ["n", "n"]})
    with pytest.raises(ValueError, match=r"row 0 of '.*has '.*a.png' under 'img'.*image_column='img'"):
        checked(load_examples(file), file)
    found = [to_messages(row)["images"] for row in load_examples(file, image_column="img")]
    assert found == [[str(tmp_path / "a.png")], [str(tmp_path / "b.png")]]
    assert [to_messages(row)["images"] for row in load_examples(file, image_column=[])] == [[], []]
    with pytest.raises(ValueError, match=r"`image_column` names 'igm', which is not among.*Did you mean 'img'"):
        load_examples(file, image_column="igm")


@pytest.mark.parametrize("ending", ["json", "csv", "parquet"])
def test_several_columns_of_pictures(tmp_path, ending):
    file = table(tmp_path, ending, {"image_1": ["a.png", "b.png"], "image_2": ["c.png", ""]})
    with pytest.raises(ValueError, match="under 'image_1'"):
        checked(load_examples(file), file)
    found = [to_messages(row)["images"] for row in load_examples(file, image_column=["image_2", "image_1"])]
    assert found == [[str(tmp_path / name) for name in names] for names in (["c.png", "a.png"], ["b.png"])]


@pytest.mark.parametrize("name", ["scan", "image_2", "picture"])
def test_image_features_that_nobody_reads(tmp_path, name):
    features = Features(
        {"prompt": Value("string"), "completion": Value("string"), "image": ImageFeature(), name: ImageFeature()}
    )
    rows = [{"prompt": "q", "completion": "a", "image": PICTURE, name: picture(3, 3)}]
    Dataset.from_list(rows, features=features).save_to_disk(str(tmp_path / "both"))
    with pytest.raises(ValueError, match=rf"not read: \['{name}'\].*image_column=\['image', '{name}'\]"):
        load_examples(str(tmp_path / "both"))
    rows = [
        to_messages(load_examples(str(tmp_path / "both"), image_column=chosen)[0])["images"]
        for chosen in ("image", name, ["image", name])
    ]
    first, second = {"bytes": png(), "path": None}, {"bytes": png(picture(3, 3)), "path": None}
    assert rows == [[first], [second], [first, second]]


def test_a_table_of_texts_with_image_ids_loads(tmp_path):
    file = table(tmp_path, "csv", {"image_id": [1, 2], "image_note": ["x", "y"]})
    assert len(load_examples(file)) == 2


def test_arrays_of_numpy_formats_are_pictures():
    pixels = np.asarray(PICTURE)
    assert to_messages(talk("q", "a") | {"image": pixels})["images"][0] is pixels
