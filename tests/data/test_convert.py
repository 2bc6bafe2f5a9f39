"""`dualspeed convert`: what it writes is what `load_examples` reads."""

from __future__ import annotations

import io
import json
import re
import shlex
import tarfile
from pathlib import Path

import pytest
from tiny_models import picture

from hf_dualspeed import cli
from hf_dualspeed.data import load_examples


@pytest.fixture
def place(tmp_path):
    """A folder of pictures, under the names of each layout."""
    for name in ("pics/a.png", "pics/cat/b.png", "pics/COCO_train2014_000000000007.jpg", "pics/x.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        picture().save(tmp_path / name)
    return tmp_path


def put(path, value):
    path.write_text(value if isinstance(value, str) else json.dumps(value), encoding="utf-8")
    return str(path)


def converted(place, *words):
    assert cli.main(["convert", *words[:2], str(place / "out" / "made.jsonl"), *words[2:]]) == 0
    rows = load_examples(str(place / "out" / "made.jsonl"))
    assert all(row["images"] for row in rows)
    return [(row["messages"][0]["content"][-1]["text"], row["answers"]) for row in rows]


def test_a_table_under_any_names(place):
    source = put(place / "t.csv", 'file;asked;said\npics/a.png;"Was ist, was?";007\npics/x.png;Two?;"a; b"\n')
    words = ("--columns", "file", "asked", "said")
    assert converted(place, "table", source, *words) == [("Was ist, was?", ["007"]), ("Two?", ["a; b"])]


def test_the_next_command_is_one_of_paths_with_spaces_too(place, capsys):
    source = put(place / "t.json", [{"image": "pics/a.png", "question": "What?", "answer": "red"}])
    made = str(place / "my data" / "made.jsonl")
    assert cli.main(["convert", "table", source, made]) == 0
    assert shlex.split(capsys.readouterr().out.partition("Next: ")[2])[-2:] == ["--dataset", made]


def test_one_question_for_a_whole_table(place):
    source = put(place / "t.jsonl", json.dumps({"image": "a.png", "answer": ["one", "uno"]}))
    words = ("--question", "What?", "--image_folder", str(place / "pics"))
    assert converted(place, "table", source, *words) == [("What?", ["one", "uno"])]


def test_a_list_of_one_picture_and_a_mark_of_its_place(place):
    row = {"instruction": "<image>What?", "input": "", "output": "red", "images": ["pics/a.png"]}
    source = put(place / "t.json", [row])
    words = ("--columns", "images", "instruction", "output")
    assert converted(place, "table", source, *words) == [("What?", ["red"])]


def test_a_file_in_a_linked_folder_has_paths_that_lead_out_of_it(place, tmp_path_factory):
    (place / "out").symlink_to(tmp_path_factory.mktemp("disk"))
    source = put(place / "t.jsonl", json.dumps({"image": "pics/a.png", "question": "q", "answer": "a"}))
    converted(place, "table", source)
    assert Path(load_examples(str(place / "out" / "made.jsonl"))[0]["images"][0]).samefile(place / "pics" / "a.png")


def test_captions_of_coco(place):
    images = [{"id": 1, "file_name": "a.png"}, {"id": 2, "file_name": "x.png"}]
    said = [{"image_id": 2, "caption": " A cat.\n"}, {"image_id": 1, "caption": "ein Hund"}]
    source = put(place / "c.json", {"images": images, "annotations": said})
    found = converted(place, "coco", source, "--image_folder", str(place / "pics"))
    assert found == [("Describe the picture.", ["A cat."]), ("Describe the picture.", ["ein Hund"])]


def test_questions_and_annotations_of_vqa(place):
    source = put(place / "q.json", {"questions": [{"question_id": 70, "image_id": 7, "question": "How many?"}]})
    answers = [{"answer": "2", "answer_id": 1}, {"answer": "two", "answer_id": 2}]
    known = put(place / "a.json", {"annotations": [{"question_id": 70, "answers": answers}]})
    words = ("--annotations", known, "--image_folder", str(place / "pics"))
    assert converted(place, "vqa", source, *words) == [("How many?", ["2", "two"])]


def test_folders_with_texts_or_called_as_answers(place):
    (place / "pics" / "COCO_train2014_000000000007.jpg").unlink()
    (place / "pics" / "x.png").unlink()
    put(place / "pics" / "a.txt", "a dog\n")
    found = converted(place, "folder", str(place / "pics"))
    assert found == [("What is in the picture?", ["a dog"]), ("What is in the picture?", ["cat"])]


def test_a_forgotten_text_is_no_folder_of_answers(place, capsys):
    for name in ("cat/b.png", "cat/c.png", "dog/d.png", "dog/.ipynb_checkpoints/d-checkpoint.png", "dog/._d.png"):
        (place / "sets" / name).parent.mkdir(parents=True, exist_ok=True)
        picture().save(place / "sets" / name)
    put(place / "sets" / "cat" / "b.TXT", "a cat")
    assert cli.main(["convert", "folder", str(place / "sets"), str(place / "made.jsonl")]) == 2
    assert re.search(r"cat/c\.png' has no text: put a file c\.txt", " ".join(capsys.readouterr().err.split()))
    put(place / "sets" / "cat" / "c.caption", "two cats")
    answers = [answers for _, answers in converted(place, "folder", str(place / "sets"))]
    assert answers == [["a cat"], ["two cats"], ["dog"]]


ROW = '{"image": "pics/a.png", "question": "q", "answer": "a"}'
TWICE = '{"images": [{"id": 1, "file_name": "a"}, {"id": 1, "file_name": "b"}], "annotations": []}'
QUESTIONS = '{"questions": [{"question_id": 1, "image_id": 7, "question": "?"}]}'


@pytest.mark.parametrize(
    ("layout", "text", "words", "message"),
    [
        ("table", "image,question,answer\npics/a.png,What?,\n", (), r"Row 0 of 's.csv' has nothing in \['answer'\]"),
        ("table", "picture,q,a\n1,2,3\n", (), "--columns IMAGE QUESTION ANSWER"),
        ("table", "image,question,answer\nno.png,What?,x\n", (), "1 of 1 pictures are not there: .*no.png"),
        ("table", "image,question,answer\n", (), "holds nothing of the layout 'table'"),
        ("table", "image,question,answer\npics/a.png,What?,  \n", (), "Row 0 of .* has an empty answer"),
        ("table", ROW.replace('"a"', "[]"), (), "Row 0 of .* has an empty answer"),
        ("table", ROW.replace('"a"', "null"), (), r"Row 0 of 's.jsonl' has nothing in \['answer'\]"),
        ("table", ROW.replace('"a"', "[null]"), (), "Row 0 of .* has an empty answer"),
        ("table", ROW.replace('"a"', '[{"a": 1}]'), (), "Row 0 of .* has an empty answer"),
        ("table", ROW.replace('"a"', "NaN"), (), "Row 0 of .* neither text nor number"),
        ("table", ROW.replace('"a"', "true"), (), "Row 0 of .* neither text nor number"),
        ("table", ROW.replace('"q"', '["q"]'), (), "Row 0 of .* has an empty question"),
        (
            "table",
            ROW.replace('"pics/a.png"', '["pics/a.png", "pics/x.png"]'),
            (),
            "Row 0 of .* has no path of a picture",
        ),
        ("table", ROW, ("--question", " "), "Row 0 of .* has an empty question"),
        ("table", ROW, ("--annotations", "pics"), "`annotations` is given, but the layout 'table' does not read it"),
        ("coco", "{}", ("--columns", "a", "b", "c"), "`columns` is given, but the layout 'coco'"),
        ("coco", '{"images": [{"id": [1], "file_name": "a"}]}', (), r"Record 0 of 'images' .* lacks \['id'\]"),
        ("coco", '{"images": [{"id": 1, "file_name": ["a"]}]}', (), r"Record 0 .* lacks \['file_name'\]"),
        ("coco", '{"images": NaN}', (), "NaN is no JSON number"),
        ("coco", TWICE, (), "two records of `id` 1 under 'images'"),
        *(
            ("vqa", QUESTIONS, ("--image_name", name), "does not fit image_id 7")
            for name in ("{image_id[0]}", "{image_id.foo}", "{image_id:99999999999d}", "{x.y}", "{")
        ),
        ("coco", "[]", (), "an object with a list under 'images'"),
        ("coco", "{", (), "not valid JSON"),
        ("coco", '{"images": [{"id": 1}], "annotations": []}', (), r"Record 0 of 'images' .* lacks \['file_name'\]"),
        ("coco", '{"images": [], "annotations": [{"image_id": 1, "caption": "x"}]}', (), "caption of image 1"),
        (
            "vqa",
            '{"questions": [{"question_id": 1, "image_id": "x", "question": "?"}]}',
            (),
            "does not fit image_id 'x'",
        ),
        ("folder", "", (), "is read from a folder"),
    ],
)
def test_what_is_wrong_is_named(place, capsys, layout, text, words, message):
    table = "s.jsonl" if text.startswith("{") else "s.csv"
    source = put(place / (table if layout == "table" else "s.json"), text)
    words = [str(place / word) if word == "pics" else word for word in words]
    assert cli.main(["convert", layout, source, str(place / "made.jsonl"), *words]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert re.search(message, said), said
    assert not (place / "made.jsonl").exists()


def test_nothing_is_overwritten(place, capsys):
    kept = put(place / "made.jsonl", "mine")
    source = put(place / "t.csv", "image,question,answer\npics/a.png,What?,x\n")
    assert cli.main(["convert", "table", source, kept]) == 2
    assert "is there already" in capsys.readouterr().err
    assert (place / "made.jsonl").read_text() == "mine"
    assert cli.main(["convert", "folder", str(place / "pics"), str(place / "made.txt")]) == 2
    assert "must be a .jsonl file" in capsys.readouterr().err
    assert cli.main(["convert", "folder", str(place / "pics"), str(place / "new.jsonl")]) == 2
    assert "has no text" in capsys.readouterr().err


@pytest.mark.parametrize("answers", [[{"text": "x"}], [None], None, {"no": "x"}])
def test_annotations_without_an_answer_are_named(place, capsys, answers):
    known = put(place / "known.json", {"annotations": [{"question_id": 1, "answers": answers}]})
    words = ("--annotations", known, "--image_folder", str(place / "pics"), "--image_name", "a.png")
    source = put(place / "q.json", QUESTIONS)
    assert cli.main(["convert", "vqa", source, str(place / "made.jsonl"), *words]) == 2
    assert "Row 0 of" in capsys.readouterr().err


def test_sources_are_regular_files_and_pictures_of_pixels(place, capsys):
    (place / "dev.json").symlink_to("/dev/ptmx")  # reading it would wait for ever
    for layout, source in (("coco", "dev.json"), ("table", "dev.json"), ("table", "pics/a.png")):
        assert cli.main(["convert", layout, str(place / source), str(place / "made.jsonl")]) == 2
        assert "is no regular file" in " ".join(capsys.readouterr().err.split())
    put(place / "pics" / "cat" / "c.eps", "%!PS-Adobe-3.0 EPSF-3.0")
    put(place / "pics" / "cat" / "b.txt", "x")
    (place / "pics" / "cat" / "b.txt").write_bytes(b"\xff\xfe")
    assert cli.main(["convert", "folder", str(place / "pics" / "cat"), str(place / "made.jsonl")]) == 2
    assert "b.txt' is no text in UTF-8" in " ".join(capsys.readouterr().err.split())
    (place / "pics" / "cat" / "b.txt").write_text("a cat")
    assert converted(place, "folder", str(place / "pics" / "cat")) == [("What is in the picture?", ["a cat"])]


def test_numbers_stay_as_they_are_written(place):
    source = put(place / "t.jsonl", '{"image": "pics/a.png", "question": "q", "answer": [1.50, 2]}')
    assert converted(place, "table", source) == [("q", ["1.50", "2"])]


PAGE = (Path(__file__).parents[2] / "docs" / "data.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("row", re.findall(r"```json\n(.*?)```", PAGE, re.DOTALL), ids=str)
def test_rows_of_the_page_are_read(tmp_path, row):
    (tmp_path / "photos").mkdir()
    picture().save(tmp_path / "photos" / "one.jpg")
    put(tmp_path / "rows.json", f"[{row}]")
    (found,) = load_examples(str(tmp_path / "rows.json"))
    assert found["images"] == [str(tmp_path / "photos" / "one.jpg")]
    assert [message["role"] for message in found["messages"]] == ["user", "assistant"]


def test_the_table_of_the_page_is_read(tmp_path):
    (table,) = re.findall(r"```csv\n(.*?)```", PAGE, re.DOTALL)
    (found,) = load_examples(put(tmp_path / "rows.csv", table))
    assert (found["question"], found["answer"]) == ("What colour is the car, please?", "red")


def shard(path):
    """A WebDataset of one picture with its text."""
    buffer = io.BytesIO()
    picture().save(buffer, "PNG")
    with tarfile.open(path, "w") as file:
        for name, content in (("0.png", buffer.getvalue()), ("0.txt", b"a cat")):
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            file.addfile(entry, io.BytesIO(content))


def test_shards_are_read_as_the_page_says(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "shards").mkdir()
    shard("shards/0.tar")
    (code,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    exec(code, {})
    (found,) = load_examples("data/train")
    assert (found["question"], found["answer"]) == ("What is in the picture?", "a cat")
    assert found["image"]["bytes"].startswith(b"\x89PNG")
    with pytest.raises(ValueError, match=r"0\.tar', whose ending is none of \.json, .*`save_to_disk`"):
        load_examples("shards/0.tar")


def test_tables_parted_by_tabs(place):
    (found,) = load_examples(put(place / "t.tsv", "image\tquestion\tanswer\npics/a.png\tWhat, then?\tred\n"))
    assert (found["question"], found["answer"]) == ("What, then?", "red")


def test_a_table_with_other_names_is_told_what_to_do(place):
    with pytest.raises(ValueError, match=r"has no conversation.*`dualspeed convert table`"):
        load_examples(put(place / "t.csv", "file_name,text\npics/a.png,red\n"))


def test_commands_of_the_page_are_understood(place, monkeypatch):
    seen = []
    monkeypatch.setattr("hf_dualspeed.commands.convert.convert", lambda layout, words, *more: seen.append(layout) or 1)
    monkeypatch.chdir(place)
    for name in re.findall(r"dualspeed convert \w+ (\S+)|--annotations (\S+)", PAGE):
        path = place / (name[0] or name[1])
        path.touch() if path.suffix else path.mkdir()
    commands = re.findall(r"^dualspeed (convert .*)$", PAGE, re.MULTILINE)
    assert [cli.main(shlex.split(command)) for command in commands] == [0] * 6
    assert set(seen) == {"table", "coco", "vqa", "folder"}
