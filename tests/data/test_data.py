"""Messages, loading, collating and the guard of the labels."""

from __future__ import annotations

import copy
import csv
import io
import json
import logging

import pytest
import torch
from data_cases import PROCESSORS, mixed_batch, picture, placeholders, supervised, talk
from datasets import Dataset, DatasetDict, Features, List, Value
from datasets import Image as ImageFeature
from PIL import Image
from tiny import tiny_llava_processor, tiny_qwen2_5_vl_processor

from hf_dualspeed.data.collators import MaskVisualLabels, VisionLanguageCollator
from hf_dualspeed.data.conversations import to_messages
from hf_dualspeed.data.loading import load_examples

# to_messages


def test_plain_messages_get_the_placeholders_at_the_front():
    example = talk("Which differs?", "the second", images=["a.png", "b.png"])
    before = copy.deepcopy(example)
    sample = to_messages(example)
    image, text = {"type": "image"}, {"type": "text", "text": "Which differs?"}
    assert sample["messages"][0]["content"] == [image, image, text]
    assert sample["images"] == ["a.png", "b.png"]
    sample["messages"][0]["content"].clear()
    sample["images"].clear()
    assert example == before


def test_system_message_comes_first_but_the_user_gets_the_image():
    example = {
        "messages": [{"role": "system", "content": "Be brief."}, *talk("q", "a")["messages"]],
        "image": "a.png",
    }
    assert placeholders(to_messages(example)["messages"]) == [0, 1, 0]


def test_content_lists_lose_the_empty_fields_of_arrow():
    content = [{"type": "text", "text": "a"}, {"type": "image", "text": None}]
    example = {"messages": [{"role": "user", "content": content}], "images": ["a.png"]}
    parts = to_messages(example)["messages"][0]["content"]
    assert parts == [{"type": "text", "text": "a"}, {"type": "image"}]


@pytest.mark.parametrize(
    "example",
    [
        {"prompt": "q", "completion": "a", "image": "a.png"},
        {
            "prompt": [{"role": "user", "content": "q"}],
            "completion": [{"role": "assistant", "content": "a"}],
            "images": ["a.png"],
        },
    ],
)
def test_prompt_and_completion(example):
    sample = to_messages(example)
    assert [message["role"] for message in sample["messages"]] == ["user", "assistant"]
    assert placeholders(sample["messages"]) == [1, 0]
    assert sample["images"] == ["a.png"]


@pytest.mark.parametrize(("image", "count"), [("a.png", 1), (["a.png", "b.png"], 2), (None, 0)])
def test_llava_conversations(image, count):
    turns = [{"from": "human", "value": "<image>\n" * count + "What?"}, {"from": "gpt", "value": "That."}]
    example = {"id": 3, "conversations": turns} | ({} if image is None else {"image": image})
    before = copy.deepcopy(example)
    sample = to_messages(example)
    question, answer = [{"type": "text", "text": "What?"}], [{"type": "text", "text": "That."}]
    assert sample["messages"][0]["content"] == [{"type": "image"}] * count + question
    assert sample["messages"][1] == {"role": "assistant", "content": answer}
    assert len(sample["images"]) == count
    assert example == before


@pytest.mark.parametrize(
    ("example", "message"),
    [
        (talk("<image> q", "a", id="x7"), r"id 'x7'.* 0 image\(s\) but 1 image placeholder"),
        (talk("<image> q", "a", images=["a.png", "b.png"]), r"image 'a.png'.* 2 image\(s\) but 1 "),
        ({"messages": [{"role": "assistant", "content": "a"}], "images": ["a.png"]}, r"1 image\(s\) but 0 "),
        ({"text": "q"}, r"without id.* no conversation.*\['text'\].*`conversations`"),
        ({"conversations": [{"from": "robot", "value": ""}]}, "`from` must be one of 'human'.* got 'robot'"),
        (
            {"messages": [{"role": "user", "content": [{"type": "video"}]}]},
            r"0 video\(s\) but 1 video placeholder.*one <video>",
        ),
    ],
)
def test_bad_examples_are_named(example, message):
    with pytest.raises(ValueError, match=message):
        to_messages(example)


# load_examples


def write_llava_json(folder):
    rows = [
        {"id": 1, "image": "sub/a.png", "conversations": conversation("<image>\nq")},
        {"id": "two", "image": ["sub/a.png", "sub/b.png"], "conversations": conversation("<image><image>q")},
        {"conversations": conversation("text only")},
    ]
    (folder / "sub").mkdir()
    picture().save(folder / "sub/a.png")
    picture(5, 5).save(folder / "sub/b.png")
    (folder / "data.json").write_text(json.dumps(rows), encoding="utf-8")
    (folder / "data.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n", encoding="utf-8")


def conversation(question: str) -> list[dict]:
    return [{"from": "human", "value": question}, {"from": "gpt", "value": "a\u2028b"}]


@pytest.mark.parametrize("name", ["data.json", "data.jsonl"])
def test_llava_json_from_disk_to_a_batch(tmp_path, name):
    write_llava_json(tmp_path)
    dataset = load_examples(str(tmp_path / name))
    assert dataset["id"][:] == ["1", "two", None]
    assert [len(images) for images in dataset["images"]] == [1, 2, 0]
    assert dataset[0]["images"] == [str(tmp_path / "sub/a.png")]
    batch = VisionLanguageCollator(tiny_llava_processor())(list(dataset))
    assert batch["pixel_values"].shape[0] == 3


def test_json_image_folder_and_lazy_images(tmp_path):
    write_llava_json(tmp_path)
    dataset = load_examples(str(tmp_path / "data.json"), image_folder="/elsewhere")
    assert dataset[1]["images"] == ["/elsewhere/sub/a.png", "/elsewhere/sub/b.png"]


def test_trl_json(tmp_path):
    row = talk("q", "a", images=["a.png"], answer="a")
    (tmp_path / "trl.jsonl").write_text(json.dumps(row), encoding="utf-8")
    dataset = load_examples(str(tmp_path / "trl.jsonl"))
    assert dataset.column_names == ["messages", "images", "answer"]
    assert dataset[0]["messages"][1] == {"role": "assistant", "content": [{"type": "text", "text": "a"}]}
    assert dataset["answer"][:] == ["a"]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("bad.json", '{"a": 1}\n{"a": 2}', "not valid JSON.*jsonl"),
        ("dict.json", '{"a": 1}', "list of samples"),
    ],
)
def test_broken_json(tmp_path, name, text, message):
    (tmp_path / name).write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        load_examples(str(tmp_path / name))


def test_missing_file():
    with pytest.raises(FileNotFoundError, match=r"`path_or_name`.*nowhere\.parquet"):
        load_examples("nowhere.parquet")


def test_saved_folder_keeps_images_encoded(tmp_path):
    rows = [talk("q", "a", images=[picture()])]
    features = Features(
        {
            "messages": List({"role": Value("string"), "content": Value("string")}),
            "images": List(ImageFeature()),
        }
    )
    dataset = Dataset.from_list(rows, features=features)
    DatasetDict(train=dataset, test=dataset).save_to_disk(str(tmp_path / "saved"))
    loaded = load_examples(str(tmp_path / "saved"), split="test")
    assert set(loaded[0]["images"][0]) == {"bytes", "path"}
    assert VisionLanguageCollator(tiny_llava_processor())([loaded[0]])["pixel_values"].shape[0] == 1
    with pytest.raises(ValueError, match=r"`split` must be one of 'train', 'test', got 'tests'. Did you"):
        load_examples(str(tmp_path / "saved"), split="tests")


def test_csv_and_parquet(tmp_path):
    with open(tmp_path / "data.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([["prompt", "completion", "image"], ["q", "a", "a.png"]])
    row = load_examples(str(tmp_path / "data.csv"))[0]
    assert to_messages(row)["images"] == [str(tmp_path / "a.png")]
    Dataset.from_list([row]).to_parquet(str(tmp_path / "data.parquet"))
    row = load_examples(str(tmp_path / "data.parquet"), image_folder="/x")[0]
    assert to_messages(row)["images"] == [str(tmp_path / "a.png")]


# VisionLanguageCollator


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", PROCESSORS)
def test_labels_are_the_assistants_words(name, side):
    build, end = PROCESSORS[name]
    processor = build(side)
    examples = mixed_batch()
    before = copy.deepcopy(examples)
    batch = VisionLanguageCollator(processor)(examples)
    space = " " if name == "llava" else ""
    answers = [["A cat, né."], ["Hi!"], ["Yes", "A much longer answer"], ["grey"]]
    for row, turns in enumerate(answers):
        assert supervised(processor, batch, row) == "".join(f"{space}{turn}{end}" for turn in turns)
    kept = batch["labels"] != -100
    assert torch.equal(batch["labels"][kept], batch["input_ids"][kept])
    assert not kept[batch["attention_mask"] == 0].any()
    assert not kept[batch["input_ids"] == processor.image_token_id].any()
    assert all(isinstance(value, torch.Tensor) for value in batch.values())
    assert "offset_mapping" not in batch
    assert examples == before


def test_visual_tokens_match_the_processor():
    processor = tiny_llava_processor()
    batch = VisionLanguageCollator(processor)(mixed_batch())
    assert (batch["input_ids"] == processor.image_token_id).sum(1).tolist() == [16, 0, 32, 16]
    assert batch["pixel_values"].shape == (4, 3, 16, 16)


def test_text_only_batch_and_unanswered_sample():
    processor = tiny_qwen2_5_vl_processor()
    batch = VisionLanguageCollator(processor)([talk("Hello?", "Hi!"), talk("Nobody answers")])
    assert "pixel_values" not in batch
    assert supervised(processor, batch, 0) == "Hi!<|im_end|>"
    assert (batch["labels"][1] == -100).all()


def test_images_of_every_kind_give_the_same_pixels(tmp_path):
    image = picture()
    image.save(tmp_path / "a.png")
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    kinds = [image, str(tmp_path / "a.png"), tmp_path / "a.png", {"bytes": buffer.getvalue(), "path": None}]
    kinds += [{"bytes": None, "path": str(tmp_path / "a.png")}, "a.png"]
    collator = VisionLanguageCollator(tiny_llava_processor(), image_folder=str(tmp_path))
    pixels = collator([talk("q", "a", images=[kind]) for kind in kinds])["pixel_values"]
    assert all(torch.equal(pixels[0], other) for other in pixels[1:])
    with pytest.raises(TypeError, match="a PIL image, a path or a dict"):
        collator([talk("q", "a", images=[3])])


def test_bos_of_the_template_is_not_doubled():
    processor = tiny_llava_processor()
    processor.chat_template = "<s>" + processor.chat_template
    ids = VisionLanguageCollator(processor)([talk("q", "a")])["input_ids"]
    assert (ids == processor.tokenizer.bos_token_id).sum() == 1


def broken_images(tmp_path) -> list:
    picture(60, 60).save(tmp_path / "cut.png")
    whole = (tmp_path / "cut.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "empty.jpg").write_bytes(b"")
    (tmp_path / "chunk.png").write_bytes(whole[:12] + b"XXXX" + whole[16:])
    missing = str(tmp_path / "missing.png")
    files = [str(tmp_path / name) for name in ("cut.png", "empty.jpg", "chunk.png")]
    return [missing, *files, Image.new("RGB", (0, 4)), None, {"bytes": b"no", "path": None}]


def test_unreadable_images_raise(tmp_path):
    collator = VisionLanguageCollator(tiny_llava_processor())
    for image in broken_images(tmp_path):
        with pytest.raises(ValueError, match=r"cannot be read \(sample 1 of the batch, id 'x'\).*='skip'"):
            collator([talk("q", "a"), talk("q", "a", images=[image], id="x")])
    with pytest.raises(ValueError, match=r"sample 0 of the batch, image '.*missing.png'"):
        collator([talk("q", "a", images=[str(tmp_path / "missing.png")])])


def test_unreadable_images_skip(tmp_path, caplog):
    processor = tiny_llava_processor()
    collator = VisionLanguageCollator(processor, unreadable_images="skip")
    broken = [talk("q", "a", images=[image]) for image in broken_images(tmp_path)]
    with caplog.at_level(logging.WARNING):
        batch = collator([*broken, talk("q", "kept", images=[picture()])])
    assert supervised(processor, batch, 0) == " kept</s>"
    assert len(batch["labels"]) == len(batch["pixel_values"]) == 1
    assert collator.skipped == len(broken) == caplog.text.count("Left out sample")
    assert f"({len(broken)} so far)" in caplog.text


def strip() -> Image.Image:
    """A picture that Qwen's processors refuse, for one side is more than 200 times the other."""
    return Image.new("RGB", (900, 4))


def test_skip_covers_what_the_processor_refuses(caplog):
    processor = tiny_qwen2_5_vl_processor()
    collator = VisionLanguageCollator(processor, unreadable_images="skip")
    examples = [talk("q", "one", images=[picture()]), talk("q", "a", images=[strip()], id="x"), talk("q", "two")]
    batch = collator(examples)
    assert [supervised(processor, batch, row) for row in range(2)] == ["one<|im_end|>", "two<|im_end|>"]
    expected = VisionLanguageCollator(processor)([examples[0], examples[2]])
    assert all(torch.equal(batch[key], value) for key, value in expected.items())
    assert collator.skipped == 1
    assert "Left out sample 1 of the batch, id 'x' (1 so far): absolute aspect ratio must be" in caplog.text
    with pytest.raises(ValueError, match=r"cannot read the sample \(sample 1 of the batch, id 'x'\): absolute aspect"):
        VisionLanguageCollator(processor)(examples)


@pytest.mark.parametrize("name", PROCESSORS)
def test_a_batch_without_a_readable_sample_is_a_picture_without_labels(name, caplog):
    processor = PROCESSORS[name][0]()
    collator = VisionLanguageCollator(processor, unreadable_images="skip", long_samples="skip", max_length=5)
    for examples in ([talk("q", "a", images=[b"no"])] * 2, [talk("q", "a longer text")]):
        batch = collator(examples)
        assert (batch["labels"] == -100).all()
        assert (batch["input_ids"] == processor.image_token_id).any()
        assert len(batch["pixel_values"])
    assert collator.skipped == 3
    assert collator.unsupervised == 0


def test_data_without_a_readable_sample_is_an_error():
    collator = VisionLanguageCollator(tiny_llava_processor(), unreadable_images="skip")
    broken = [talk("q", "a", images=["none.png"])] * 16
    for _ in range(3):
        collator(broken)
    with pytest.raises(ValueError, match="The first 64 samples were all left out.*`image_folder`"):
        collator(broken)


def test_an_error_that_no_sample_causes_alone_is_raised(monkeypatch):
    processor = tiny_qwen2_5_vl_processor()
    collator = VisionLanguageCollator(processor, unreadable_images="skip")
    whole = type(processor).__call__

    def call(self, **inputs):
        if len(inputs["text"]) > 1:
            raise RuntimeError("too many")
        return whole(self, **inputs)

    monkeypatch.setattr(type(processor), "__call__", call)
    with pytest.raises(RuntimeError, match="too many"):
        collator([talk("q", "a", images=[picture()])] * 2)


@pytest.mark.parametrize("side", ["left", "right"])
def test_long_samples_are_cut_skipped_or_refused(side, caplog):
    processor = tiny_qwen2_5_vl_processor(side)
    examples = [talk("q", "short", images=[picture()]), talk("q", "x" * 300, images=[picture(30, 20)], id="long")]
    options = {"processor": processor, "max_length": 150}
    assert VisionLanguageCollator(**options)(examples)["input_ids"].shape == (2, 150)
    with pytest.raises(
        ValueError, match=r"id 'long'\) has \d+ tokens, more than `max_length`=150\. Use a larger.*'skip'"
    ):
        VisionLanguageCollator(**options, long_samples="raise")(examples)
    collator = VisionLanguageCollator(**options, long_samples="skip")
    batch = collator(examples)
    expected = VisionLanguageCollator(processor)(examples[:1])
    assert all(torch.equal(batch[key], value) for key, value in expected.items())
    assert collator.skipped == 1
    assert "Left out sample 1 of the batch, id 'long'" in caplog.text


def test_samples_without_a_token_to_learn_are_counted_and_shown(caplog):
    processor = tiny_llava_processor()
    collator = VisionLanguageCollator(processor)
    nothing = talk("Nobody answers", id="x")
    for _ in range(12):
        collator([talk("q", "a"), nothing])
    assert (collator.unsupervised, collator.seen) == (12, 24)
    lines = [record.getMessage() for record in caplog.records if "no token to learn" in record.getMessage()]
    assert [line[:32] for line in lines] == ["1 of 2 samples so far had no tok", "10 of 20 samples so far had no t"]
    assert "id 'x'" in lines[0]


def test_samples_that_all_teach_nothing_are_an_error():
    nothing = [talk("Nobody answers", id="x")] * 8
    with pytest.raises(ValueError, match=r"None of the first 8 samples has a token to learn; .*id 'x'.*max_length"):
        VisionLanguageCollator(tiny_llava_processor())(nothing)
    collator = VisionLanguageCollator(tiny_llava_processor())
    collator([*nothing, talk("q", "a")])
    collator(nothing)
    cut = VisionLanguageCollator(tiny_llava_processor(), max_length=8)
    with pytest.raises(ValueError, match="None of the first 64"):
        [cut([talk("A long question", "a")] * 16) for _ in range(4)]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", PROCESSORS)
def test_truncation_cuts_text_at_the_end(name, side):
    build, _ = PROCESSORS[name]
    processor = build(side)
    examples = [talk("q", "short", images=[picture()]), talk("q", "x" * 300, images=[picture()])]
    whole = VisionLanguageCollator(processor)(examples)
    length = int(whole["attention_mask"][0].sum()) + 3
    cut = VisionLanguageCollator(processor, max_length=length)(examples)
    assert cut["input_ids"].shape == cut["labels"].shape == (2, length)
    assert cut["attention_mask"].sum(1).tolist() == [length - 3, length]
    assert supervised(processor, cut, 0) == supervised(processor, whole, 0)
    for key in ("input_ids", "labels"):
        full, part = (batch[key][1][batch["attention_mask"][1] == 1] for batch in (whole, cut))
        assert torch.equal(part, full[:length])


def test_truncation_never_cuts_visual_tokens():
    collator = VisionLanguageCollator(tiny_llava_processor(), max_length=20)
    collator([talk("short", "s")])
    with pytest.raises(ValueError, match=r"`max_length`=20 would cut 3 visual tokens .* 41 tokens .*id 9.*least 41"):
        collator([talk("See", "x", images=[picture()], id=9)] * 2)


def test_template_that_rewrites_history_is_refused():
    processor = tiny_qwen2_5_vl_processor()
    processor.chat_template = "{{ messages | length }}" + processor.chat_template
    with pytest.raises(ValueError, match=r"chat template does not render .* step by step.*`chat_template`"):
        VisionLanguageCollator(processor)([talk("q", "a", "q", "b")])


def test_template_without_end_of_turn_warns_once(caplog):
    processor = tiny_llava_processor()
    processor.chat_template = processor.chat_template.replace("</s>", " ")
    collator = VisionLanguageCollator(processor)
    collator([talk("q", "a")])
    batch = collator([talk("q", "a")])
    assert supervised(processor, batch, 0) == " a"
    assert caplog.text.count("no end-of-turn token") == 1


class SlowTokenizer:
    is_fast = False
    chat_template = None


def test_collator_arguments():
    processor = tiny_llava_processor()
    with pytest.raises(ValueError, match="`unreadable_images` must be one of 'raise', 'skip', got 'skp'"):
        VisionLanguageCollator(processor, unreadable_images="skp")
    with pytest.raises(ValueError, match=r"`max_length` must be in \[1, inf\), got 0. Use None"):
        VisionLanguageCollator(processor, max_length=0)
    with pytest.raises(ValueError, match="`long_samples` is 'skip', but no sample is too long without a `max_length`"):
        VisionLanguageCollator(processor, long_samples="skip")
    processor.chat_template = None
    with pytest.raises(ValueError, match="no chat template"):
        VisionLanguageCollator(processor)
    processor.tokenizer = SlowTokenizer()
    with pytest.raises(ValueError, match="fast tokenizer, got SlowTokenizer"):
        VisionLanguageCollator(processor)


def test_processor_that_changes_the_text_is_refused(monkeypatch):
    processor = tiny_llava_processor()
    monkeypatch.setattr(
        type(processor), "get_text_with_replacements", lambda self, text, *_: ([t.lower() for t in text], [])
    )
    with pytest.raises(ValueError, match=r"LlavaProcessor.*'USER: .*labels cannot be placed: it changed the text.*own"):
        VisionLanguageCollator(processor)([talk("q", "A")])


def test_processor_that_tokenizes_behind_our_back_is_refused(monkeypatch):
    processor = tiny_llava_processor()
    whole = type(processor).__call__

    def call(self, **inputs):
        batch = whole(self, **inputs)
        batch["input_ids"] = batch["input_ids"] + 1
        return batch

    monkeypatch.setattr(type(processor), "__call__", call)
    with pytest.raises(ValueError, match="labels cannot be placed: it does not tokenize a conversation as a whole"):
        VisionLanguageCollator(processor)([talk("q", "a")])


# MaskVisualLabels


@pytest.fixture
def fresh_warning(monkeypatch):
    monkeypatch.setattr(MaskVisualLabels, "_warned", False)


def bad_collator(batch: dict):
    return lambda examples: batch


def test_visual_labels_are_masked_with_one_warning(fresh_warning, caplog):
    ids = torch.tensor([[1, 7, 7, 8, 5]])
    batch = {"input_ids": ids, "labels": ids.clone(), "pixel_values_videos": torch.zeros(1), "extra": "kept"}
    collator = bad_collator(batch)
    for wrapped in (MaskVisualLabels(collator, [7, 8]), MaskVisualLabels(collator, [7, 8])):
        out = wrapped([{}])
        assert out["labels"].tolist() == [[1, -100, -100, -100, 5]]
        assert out["extra"] == "kept"
        assert wrapped.collator is collator
    assert torch.equal(batch["labels"], ids)
    assert caplog.text.count("held 3 visual tokens") == 1


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_and_first_tokens_are_no_labels(side):
    ids = torch.tensor([[3, 4, 5, 6], [3, 4, 0, 0] if side == "right" else [0, 0, 3, 4]])
    batch = {"input_ids": ids, "attention_mask": (ids != 0).long(), "labels": ids.clone()}
    out = MaskVisualLabels(bad_collator(batch), [7])([{}])
    assert [row[row != -100].tolist() for row in out["labels"]] == [[4, 5, 6], [4]]


def test_good_batches_pass_without_warning(fresh_warning, caplog):
    processor = tiny_llava_processor()
    inner = VisionLanguageCollator(processor)
    examples = mixed_batch()
    out = MaskVisualLabels(inner, [processor.image_token_id])(examples)
    assert all(torch.equal(out[key], value) for key, value in inner(examples).items())
    assert not caplog.text


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (["labels"], "no `input_ids`.*VisionLanguageCollator"),
        (["input_ids", "labels"], "1 placeholders .* but nothing for them.*remove_unused_columns=False"),
    ],
)
def test_unusable_batches_are_refused(keys, message):
    batch = {key: torch.tensor([[7, 1]]) for key in keys}
    with pytest.raises(ValueError, match=message):
        MaskVisualLabels(bad_collator(batch), [7])([{}])


def test_samples_without_instruction_are_warned_of_where_the_pruner_goes_by_it(caplog, monkeypatch):
    ids = torch.tensor([[7, 7, 1, 2, 3], [1, 2, 3, 4, 5]])
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": torch.zeros(1)}
    answers = {**batch, "labels": torch.where(torch.isin(ids, torch.tensor([7, 1])), -100, ids)}
    everything = {**batch, "labels": torch.where(ids == 7, -100, ids)}
    for labelled, asks, warned in ((everything, None, 0), (answers, "trim", 0), (everything, "trim", 1)):
        monkeypatch.setattr(MaskVisualLabels, "_warned_of_instructions", False)
        caplog.clear()
        for _ in range(2):
            MaskVisualLabels(lambda _, labelled=labelled: labelled, [7], asks)([{}])
        assert caplog.text.count("the pruner 'trim' finds no instruction") == warned


@pytest.mark.parametrize("column", ["image", "images"])
def test_records_of_paths_start_from_the_image_folder(tmp_path, column):
    (tmp_path / "here").mkdir()
    picture().save(tmp_path / "here" / "a.png")
    record = {"bytes": None, "path": "a.png"}
    row = {"prompt": "q", "completion": "a", column: record if column == "image" else [record]}
    Dataset.from_list([row]).to_parquet(tmp_path / "rows.parquet")
    (found,) = load_examples(str(tmp_path / "rows.parquet"), image_folder=str(tmp_path / "here"))
    assert "pixel_values" in VisionLanguageCollator(tiny_llava_processor())([found])


def test_pictures_of_a_table_may_begin_behind_many_rows_of_text(tmp_path):
    """`datasets` infers types from the first thousand rows."""
    many = 1001
    rows = {"image": [None] * many + ["one.png"], "question": ["what?"] * (many + 1), "answer": ["noise"] * (many + 1)}
    Dataset.from_dict(rows).to_parquet(tmp_path / "rows.parquet")
    found = load_examples(str(tmp_path / "rows.parquet"))
    assert found[0]["image"] == []
    assert found[many]["image"] == [str(tmp_path / "one.png")]
    assert to_messages(found[0])["images"] == []
