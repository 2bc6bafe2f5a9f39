"""What `dualspeed evaluate` reads: pictures in any column and form, and what is right in any layout, or it refuses."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from datasets import ClassLabel, Dataset, Features, Value
from datasets import Image as ImageFeature
from evaluation_cases import VISUAL, evaluate, kept, rows, write_rows
from PIL import Image
from pyarrow import parquet

from hf_dualspeed.data.conversations import given_texts
from hf_dualspeed.evaluation import evaluate as evaluate_command
from hf_dualspeed.evaluation.generation import question_and_answers
from hf_dualspeed.evaluation.questions import load_questions
from hf_dualspeed.evaluation.visualize import first_images


@pytest.fixture
def unloaded(monkeypatch):
    """Loading a model fails the test: what can be known before is said before."""
    monkeypatch.setattr(evaluate_command.Checkpoint, "model", lambda self: pytest.fail("loaded"))


def picture_bytes(colour: str, kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (20, 16), colour).save(file, kind)
    return file.getvalue()


def table(**columns) -> dict[str, list]:
    return {"question": ["which colour is it ?"] * 2, "answer": ["red", "green"], **columns}


PICTURES = [picture_bytes("red"), picture_bytes("green")]

# --- pictures -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "column"),
    [
        ("image", pa.array(PICTURES, pa.binary())),
        ("image", pa.array(PICTURES, pa.large_binary())),
        ("images", pa.array([[one] for one in PICTURES], pa.list_(pa.binary()))),
        ("image", pa.array([{"bytes": one, "path": "a.png"} for one in PICTURES])),
        ("image", pa.array([{"bytes": one, "path": None} for one in PICTURES])),
        ("images", pa.array([[{"bytes": one}] for one in PICTURES])),
    ],
)
@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_raw_bytes_in_a_column_are_pictures(folder, asked, name, column, kind):
    found, place = pa.table(table(**{name: column})), "raw.parquet"
    if kind == "parquet":
        parquet.write_table(found, place)
    else:
        place = "raw"
        Dataset(found).save_to_disk(place)
    assert evaluate(data=place) == 0
    assert [shape[1] > VISUAL for shape in asked] == [True]
    (answers,) = Path("run/evaluations").glob("raw*")
    assert len(kept("full", str(answers))) == 2


@pytest.mark.parametrize(
    "broken",
    [b"no picture", PICTURES[0][:60], picture_bytes("red", "JPEG")[:300]],
    ids=["text", "png", "jpeg"],
)
@pytest.mark.parametrize("kind", [pa.binary(), pa.large_binary()])
def test_the_check_opens_raw_bytes_as_the_run_does(folder, unloaded, broken, kind):
    parquet.write_table(pa.table(table(image=pa.array([PICTURES[0], broken], kind))), "raw.parquet")
    with pytest.raises(ValueError, match=r"Row 1 of 'raw\.parquet' \(columns: .*cannot be evaluated") as error:
        evaluate(data="raw.parquet")
    assert len(str(error.value)) < 500


def test_pictures_whose_brightness_is_unknown_are_named_before_a_model_is_loaded(folder, unloaded):
    Image.fromarray(np.full((16, 20), 7.5, np.float32)).save("white.tiff")
    found = rows()
    found[3]["image"] = "white.tiff"
    write_rows(Path("data.json"), found)
    with pytest.raises(ValueError, match=r"Row 3 of 'data\.json' .*its float pixels range from 7\.5 to 7\.5"):
        evaluate()


@pytest.mark.parametrize("name", ["img", "picture", "photo", "image_1", "Image", "screenshot"])
@pytest.mark.parametrize("how", ["bytes", "features", "paths"])
def test_pictures_in_another_column_are_refused_by_name_or_mapped(folder, unloaded, name, how):
    columns = {
        "bytes": pa.array(PICTURES, pa.binary()),
        "features": [{"bytes": one, "path": None} for one in PICTURES],
        "paths": ["red.png", "green.png"],
    }[how]
    found = Dataset(pa.table(table(**{name: columns}))) if how != "features" else None
    if found is None:
        features = Features({"question": Value("string"), "answer": Value("string"), name: ImageFeature()})
        found = Dataset.from_dict(table(**{name: columns}), features=features)
    found.to_parquet("other.parquet")
    with pytest.raises(ValueError, match=rf"'{name}'.*In this command, it is --image_column"):
        evaluate(data="other.parquet")
    asked = load_questions("other.parquet", "test", image_column=name)
    assert len(question_and_answers(asked.dataset[0])[0]["images"]) == 1
    blind = load_questions("other.parquet", "test", image_column=[])
    assert question_and_answers(blind.dataset[0])[0]["images"] == []
    assert blind.asked["pictures"] != asked.asked["pictures"]


def test_another_column_is_asked_about(folder, asked):
    found = rows()
    for row in found:
        row["img"] = row.pop("image")
    write_rows(Path("data.json"), found)
    with pytest.raises(ValueError, match="'img', which looks like a picture but is not read"):
        evaluate()
    assert not asked
    assert evaluate("--image_column", "img", "--batch_size", "7") == 0
    assert asked[0][1] > VISUAL


def test_several_columns_are_the_pictures_of_a_sample(folder, unloaded):
    columns = {"left": pa.array(PICTURES, pa.binary()), "right": pa.array(PICTURES[::-1], pa.binary())}
    parquet.write_table(pa.table(table(**columns)), "two.parquet")
    found = load_questions("two.parquet", "test", image_column=["left", "right"])
    assert len(question_and_answers(found.dataset[0])[0]["images"]) == 2
    assert found.asked != load_questions("two.parquet", "test", image_column=["right", "left"]).asked


def test_a_picture_is_the_same_in_a_file_and_in_a_column(folder):
    for colour, data in zip(("red", "green"), PICTURES, strict=True):
        Path(f"{colour}.png").write_bytes(data)
    parquet.write_table(pa.table(table(image=pa.array(PICTURES, pa.binary()))), "raw.parquet")
    parquet.write_table(pa.table(table(image=["red.png", "green.png"])), "paths.parquet")
    assert load_questions("raw.parquet", "test").asked == load_questions("paths.parquet", "test").asked


def test_the_same_path_is_the_same_picture(folder):
    write_rows(Path("data.json"), [*rows()[:1] * 3, *rows()[1:3]])
    shown = first_images(load_questions("data.json", "test").dataset, 2)
    assert [Path(row["images"][0]).name for row in shown] == ["red.png", "green.png"]


def test_pictures_of_one_name_are_told_apart(folder):
    images = [{"bytes": data, "path": "image.png"} for data in (PICTURES[0], *PICTURES)]
    table = Dataset.from_list([{"question": "q", "answer": "a", "image": image} for image in images])
    assert [row["image"]["bytes"] for row in first_images(table, 2)] == PICTURES


# --- what is right ------------------------------------------------------------------------------------------------

PEOPLE = [{"answer": "red", "answer_id": 1}, {"answer": "dark red", "answer_id": 2}]


@pytest.mark.parametrize(
    ("value", "column", "expected"),
    [
        ("red", "answer", ["red"]),
        ("[1, 2]", "answer", ["[1, 2]"]),  # a text
        (3, "answer", ["3"]),
        (0, "answer", ["0"]),
        (False, "answer", ["False"]),
        (["red", "RED"], "answer", ["red", "RED"]),
        ("red", "answers", ["red"]),
        (["red", " "], "answers", ["red", " "]),  # nobody is left out
        (PEOPLE, "answers", ["red", "dark red"]),
        ({"answer": ["red", "dark red"], "answer_id": [1, 2]}, "answers", ["red", "dark red"]),
        ({"answer": "red", "answer_id": 1}, "answers", ["red"]),
        ({"text": ["red"], "answer_start": [3]}, "answers", ["red"]),
        ('["red", "dark red"]', "answers", ["red", "dark red"]),
        (json.dumps(PEOPLE), "answers", ["red", "dark red"]),
        (' {"answer": ["red"]}', "answers", ["red"]),
        (np.array(["red", "blue"]), "answers", ["red", "blue"]),
        ('["a", "b"]', "options", ["a", "b"]),
        ({"A": "cat", "B": "dog"}, "options", ["cat", "dog"]),
        ([], "answers", []),
        (None, "answers", []),
    ],
)
def test_layouts_of_answers_and_options_are_read(value, column, expected):
    assert given_texts(value, column) == expected


@pytest.mark.parametrize(
    ("value", "column"),
    [
        ([None, "red"], "answers"),
        (["a", None, "b"], "options"),
        ({"A": "a", "B": None, "C": "c"}, "options"),
        ({"answer": ["red", None]}, "answers"),
        ([{"answer": None}, {"answer": "red"}], "answers"),
        ([{"label": "red"}], "answers"),
        ({"label": ["red"]}, "answers"),
        ({"B": "b", "A": "a"}, "options"),
        ([["red"], ["blue"]], "answers"),
        ([math.nan, "red"], "answers"),
        (math.nan, "answer"),
        ("['red', 'blue']", "answers"),  # as pandas writes lists
        ('["red", ', "options"),
        ('[null, "a"]', "options"),
        (b"red", "answer"),
    ],
)
def test_layouts_that_would_lose_something_are_refused(value, column):
    with pytest.raises(ValueError, match=f"`{column}` is "):
        given_texts(value, column)


@pytest.mark.parametrize("kind", ["json", "jsonl", "parquet"])
@pytest.mark.parametrize(
    ("metric", "more", "said"),
    [
        ("exact_match", {"answers": ["red", None]}, "`answers` is "),
        ("multiple_choice", {"answer": "B", "options": ["red", None, "blue"]}, "`options` is "),
        ("multiple_choice", {"answer": "A", "options": ["red", "red"]}, "two of its options are 'red'"),
        ("multiple_choice", {"answer": "A", "options": ["B", "A"]}, "which is also the letter of another one"),
        ("exact_match", {"answers": []}, "says nothing of what is right"),
        ("exact_match", {"answers": [" ", ""]}, "says nothing of what is right"),
        ("exact_match", {"answer": "\n"}, "says nothing of what is right"),
    ],
)
def test_what_is_right_is_checked_before_a_model_is_loaded(folder, unloaded, kind, metric, more, said):
    found = rows(**{"answer": "red", "options": ["red", "blue"], "answers": None})
    for row in found:
        row.pop("answers")
    if "answers" in more:
        for row in found:
            row["answers"] = ["red"]
    found[4] = {**found[4], **more}
    if kind == "json":
        write_rows(Path("odd.json"), found)
    elif kind == "jsonl":
        Path("odd.jsonl").write_text("\n".join(map(json.dumps, found)))
    else:
        Dataset.from_list(found).to_parquet("odd.parquet")
    with pytest.raises(ValueError, match=said) as error:
        evaluate("--metric", metric, data=f"odd.{kind}")
    assert "4" in str(error.value)


@pytest.mark.parametrize("kind", ["json", "jsonl", "parquet"])
def test_a_dict_of_lists_is_read_from_every_file(folder, unloaded, kind):
    found = rows(answers={"answer": ["red", "dark red"], "answer_id": [1, 2]})
    if kind == "json":
        write_rows(Path("people.json"), found)
    elif kind == "jsonl":
        Path("people.jsonl").write_text("\n".join(map(json.dumps, found)))
    else:
        Dataset.from_list(found).to_parquet("people.parquet")
    assert load_questions(f"people.{kind}", "test").table[0]["references"] == ["red", "dark red"]


def test_classes_are_read_by_their_names(folder, unloaded):
    kinds = Features({"question": Value("string"), "answer": ClassLabel(names=["no", "yes"])})
    Dataset.from_dict({"question": ["is it red ?"] * 2, "answer": [1, 0]}, features=kinds).save_to_disk("classes")
    assert [row["references"] for row in load_questions("classes", "test").table] == [["yes"], ["no"]]


@pytest.mark.parametrize(("column", "warned"), [(None, True), ([], False)])
def test_questions_without_any_picture_are_pointed_out(folder, caplog, column, warned):
    Dataset.from_dict({"question": ["is it red ?"], "image": [None], "answer": ["no"]}).save_to_disk("blind")
    load_questions("blind", "test", image_column=column)
    assert ("No question of 'blind' has a picture" in caplog.text) == warned


def test_lists_in_a_csv_file_are_json_text(folder, unloaded):
    lines = ["question,image,answers,options", '"which ?",red.png,"[""A""]","[""red"", ""blue""]"']
    Path("lists.csv").write_text("\n".join(lines))
    (entry,) = load_questions("lists.csv", "test").table
    assert (entry["references"], entry["options"]) == (["A"], ["red", "blue"])


def test_a_placeholder_in_a_text_is_named_before_a_model_is_loaded(folder, unloaded):
    text = [{"type": "image"}, {"type": "text", "text": "what is <image> ?"}]
    row = {"messages": [{"role": "user", "content": text}], "images": ["red.png"], "answer": "red"}
    write_rows(Path("data.json"), [row])
    with pytest.raises(ValueError, match="<image>"):
        evaluate()


def test_a_template_that_refuses_a_question_is_known_before_a_model_is_loaded(folder, unloaded):
    path = Path("run/chat_template.jinja")
    refusal = "{% if messages | length > 1 %}{{ raise_exception('one turn only') }}{% endif %}"
    path.write_text(refusal + path.read_text())
    found = rows()
    found[5]["conversations"] = [*found[5]["conversations"], *found[5]["conversations"]]
    found[5]["conversations"][2] = {"from": "human", "value": "and now ?"}
    write_rows(Path("data.json"), found)
    with pytest.raises(ValueError, match=r"Row 5 of 'data\.json' .*one turn only"):
        evaluate()
