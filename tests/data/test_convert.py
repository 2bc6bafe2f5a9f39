"""`dualspeed convert`: what it writes is what `load_examples` reads."""

from __future__ import annotations

import json
import re
import shlex
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


def test_one_question_for_a_whole_table(place):
    source = put(place / "t.jsonl", json.dumps({"image": "a.png", "answer": ["one", "uno"]}))
    words = ("--question", "What?", "--image_folder", str(place / "pics"))
    assert converted(place, "table", source, *words) == [("What?", ["one", "uno"])]


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


@pytest.mark.parametrize(
    ("layout", "text", "words", "message"),
    [
        ("table", "image,question,answer\npics/a.png,What?,\n", (), r"Row 0 of 's.csv' has nothing in \['answer'\]"),
        ("table", "picture,q,a\n1,2,3\n", (), "--columns IMAGE QUESTION ANSWER"),
        ("table", "image,question,answer\nno.png,What?,x\n", (), "1 of 1 pictures are not there: .*no.png"),
        ("table", "image,question,answer\n", (), "holds nothing of the layout 'table'"),
        ("table", "image,question,answer\npics/a.png,What?,  \n", (), "Row 0 of .* has an empty answer"),
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
    source = put(place / ("s.csv" if layout == "table" else "s.json"), text)
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


def test_commands_of_the_page_are_understood(place, monkeypatch):
    seen = []
    monkeypatch.setattr("hf_dualspeed.commands.convert.convert", lambda layout, words, *more: seen.append(layout) or 1)
    monkeypatch.chdir(place)
    for name in re.findall(r"dualspeed convert \w+ (\S+)|--annotations (\S+)", PAGE):
        path = place / (name[0] or name[1])
        path.touch() if path.suffix else path.mkdir()
    commands = re.findall(r"^dualspeed (convert .*)$", PAGE, re.MULTILINE)
    assert [cli.main(shlex.split(command)) for command in commands] == [0] * 5
    assert set(seen) == {"table", "coco", "vqa", "folder"}
