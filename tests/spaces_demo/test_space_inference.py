"""The Space's checkpoints and their answers, what it draws, and what it refuses. No gradio."""

from __future__ import annotations

import ast
import copy
import json
import shutil
import struct
import zlib
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import inference
import numpy as np
import overlay
import pytest
import slots as places
import torch
import views
from inference import Answer, Checkpoint, InputError, check_question, pruner_names, read_image
from overlay import COLOURS, EXAMPLES, PHOTO_QUESTIONS, drawn_shape, write_examples
from PIL import Image
from slots import Pair, Slot, ask, chosen_names, load_slot
from tiny_models import FAMILIES, picture
from tiny_runs import QUESTION, TOKENS

from hf_dualspeed import AutoPruner, available_pruners, prune_inputs
from hf_dualspeed.evaluation import visualize as kept_tokens
from hf_dualspeed.evaluation.visualize import View, draw
from hf_dualspeed.pruners.config import budget
from hf_dualspeed.pruners.registry import pruner_class

SPACE = Path(inference.__file__).parent
IMAGE = drawn_shape("circle", COLOURS["blue"])


@pytest.fixture
def checkpoints(slots) -> dict[str, Checkpoint]:
    assert [slot.problem for slot in slots] == ["", "", ""]
    return {slot.key: slot.checkpoint for slot in slots}


def imported(name: str) -> set[str]:
    nodes = list(ast.walk(ast.parse((SPACE / name).read_text(encoding="utf-8"))))
    modules = {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
    modules |= {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    return {module.partition(".")[0] for module in modules}


def test_page_and_inference_are_apart():
    for path in SPACE.glob("*.py"):
        assert (path.name in ("app.py", "limits.py")) == ("gradio" in imported(path.name)), path.name
    assert not (imported("app.py") | imported("limits.py")) & {"torch", "transformers", "hf_dualspeed"}


# --- answers ------------------------------------------------------------------------------------------------------


def test_an_answer_from_all_tokens_is_that_of_generate_with_its_probability(checkpoints):
    for checkpoint in checkpoints.values():
        answer = checkpoint.answer(IMAGE, QUESTION)
        inputs = checkpoint._inputs(IMAGE, QUESTION)
        prompt = inputs["input_ids"].shape[1]
        whole = checkpoint.model.generate(**inputs, max_new_tokens=inference.MAX_NEW_TOKENS, do_sample=False)
        text = checkpoint.processor.batch_decode(whole[:, prompt:], skip_special_tokens=True)[0].strip()
        assert (answer.text, answer.used, answer.total, answer.view) == (text, TOKENS, TOKENS, None)
        forced = {**inputs, "input_ids": whole, "attention_mask": torch.ones_like(whole)}
        logs = checkpoint.model(**forced).logits[:, prompt - 1 : -1].log_softmax(-1)
        expected = logs.gather(-1, whole[:, prompt:, None]).sum().exp().item()
        assert answer.probability == pytest.approx(expected, rel=1e-4)
        assert answer.seconds > 0


@pytest.mark.parametrize("ratio", [0.0, 0.5, 0.9])
def test_an_answer_from_pruned_tokens_is_that_of_prune_inputs(checkpoints, ratio):
    for key, checkpoint in checkpoints.items():
        answer = checkpoint.answer(IMAGE, QUESTION, checkpoint.pruner("divprune", ratio))
        assert (answer.used, answer.total) == (budget(TOKENS, ratio), TOKENS)
        assert answer.isolator == (4 if key == "dualspeed" else 0)
        assert (checkpoint.isolator is None) == (key != "dualspeed")
        inputs = checkpoint._inputs(IMAGE, QUESTION)
        pruner = AutoPruner.from_name("divprune", pruning_ratio=ratio)
        short = prune_inputs(checkpoint.model, inputs, pruner, checkpoint.isolator)
        new = checkpoint.model.generate(**short, max_new_tokens=inference.MAX_NEW_TOKENS, do_sample=False)
        new = new[:, short["input_ids"].shape[1] :]
        assert answer.text == checkpoint.processor.batch_decode(new, skip_special_tokens=True)[0].strip()


def test_the_isolator_is_the_trained_one_and_counts(checkpoints, monkeypatch):
    checkpoint = checkpoints["dualspeed"]
    before = checkpoint.answer(IMAGE, QUESTION, checkpoint.pruner("grid", 0.9)).probability
    monkeypatch.setattr(checkpoint.isolator.prompt, "data", 5 * checkpoint.isolator.prompt.data)
    assert checkpoint.answer(IMAGE, QUESTION, checkpoint.pruner("grid", 0.9)).probability != before


@pytest.mark.parametrize(("key", "value"), [("position_ids", "compact"), ("proportional_attention", False)])
def test_the_pruned_view_is_that_of_the_training(tiny_runs, tmp_path, checkpoints, key, value):
    folder = tmp_path / "other"
    shutil.copytree(tiny_runs["dualspeed"], folder)
    results = json.loads((folder / "results.json").read_text())
    assert results["settings"][key] != value
    results["settings"][key] = value
    (folder / "results.json").write_text(json.dumps(results))
    both = (checkpoints["dualspeed"], Checkpoint(str(folder)))
    asked = [checkpoint.answer(IMAGE, QUESTION, checkpoint.pruner("grid", 0.9)) for checkpoint in both]
    assert asked[0].probability != asked[1].probability


def test_kept_tokens_are_those_of_the_pruner(checkpoints):
    checkpoint = checkpoints["baseline"]
    # Of a grid of 8 x 8, a quarter evenly spaced; divprune keeps others.
    view = checkpoint.answer(IMAGE, QUESTION, checkpoint.pruner("grid", 0.75)).view
    assert (view.rows, view.columns, len(view.kept), view.elsewhere) == (8, 8, 16, 0)
    assert {row for row, _ in view.kept} == {column for _, column in view.kept}
    assert len({row for row, _ in view.kept}) == 4
    other = checkpoint.answer(IMAGE, QUESTION, checkpoint.pruner("divprune", 0.75)).view
    assert len(other.kept) == 16
    assert other.kept != view.kept
    assert len(checkpoint.answer(IMAGE, QUESTION, checkpoint.pruner("grid", 0.0)).view.kept) == TOKENS


def test_every_pruner_that_is_offered_answers(checkpoints):
    names = pruner_names(list(checkpoints.values()))
    inside = {name for name in available_pruners() if pruner_class(name).in_language_model}
    assert inside >= {"fastv", "pyramiddrop"}
    assert not inside & set(names)
    assert not {"token_learner", "dynamicvit"} & set(names)  # which nobody has taught
    assert {"divprune", "tome", "visionzip", "random"} <= set(names)
    for name in names:
        answer = checkpoints["dualspeed"].answer(IMAGE, QUESTION, checkpoints["dualspeed"].pruner(name, 0.75))
        assert (answer.used, len(answer.view.kept)) == (16, 16), name


def test_a_learned_pruner_is_offered_where_its_weights_are(checkpoints, monkeypatch):
    own = AutoPruner.from_name("dynamicvit", hidden_size=32, pruning_ratio=0.9)
    checkpoint = checkpoints["pruned"]
    monkeypatch.setattr(checkpoint, "own_pruner", own.to(checkpoint.model.device))
    assert "dynamicvit" in pruner_names(list(checkpoints.values()))
    pruner = checkpoint.pruner("dynamicvit", 0.5)
    assert checkpoint.answer(IMAGE, QUESTION, pruner).used == 32
    assert all(torch.equal(a, b) for a, b in zip(own.parameters(), pruner.parameters(), strict=True))
    assert own.pruning_ratio == 0.9
    with pytest.raises(InputError, match="was not trained with the learned pruner dynamicvit"):
        checkpoints["baseline"].pruner("dynamicvit", 0.5)


def test_tiles_show_the_whole_image_and_count_the_rest(tmp_path):
    model, processor = FAMILIES["llava_next"].build()
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    checkpoint = Checkpoint(str(tmp_path))
    answer = checkpoint.answer(picture(32, 16), "why?", checkpoint.pruner("grid", 0.5))
    view = answer.view
    assert (view.rows, view.columns) == (4, 4)
    assert view.elsewhere > 0
    assert len(view.kept) + view.elsewhere == answer.used
    assert view.image.size == (16, 16)
    assert f"{view.elsewhere} lie in tiles" in views.figure_caption(answer, view, "grid")


def test_the_placeholder_of_images_is_no_question(checkpoints):
    with pytest.raises(InputError, match="may not contain <image>"):
        checkpoints["baseline"].answer(IMAGE, "what is <image>?")
    processor = SimpleNamespace(image_token="<image>", video_token="<video>", boi_token="<start>")
    odd = Checkpoint.__new__(Checkpoint)
    odd.processor = processor
    for mark in vars(processor).values():
        with pytest.raises(InputError, match=f"may not contain {mark}"):
            odd.answer(IMAGE, f"what is {mark}?")


def test_the_latency_is_the_median_after_a_warm_up(checkpoints, monkeypatch):
    checkpoint = checkpoints["dualspeed"]
    times = iter([0.4, 0.03, 0.01, 0.02])
    monkeypatch.setattr(checkpoint, "_generate", lambda *_: ("blue", 0.5, next(times)))
    answer = checkpoint.answer(IMAGE, QUESTION)
    assert (answer.seconds, answer.timed) == (0.02, 3)
    assert '<dt>Median latency</dt><dd class="latency">20 ms<' in views.answer("All tokens", "full", answer)
    times = iter([0.6])  # slow: visitors wait for no other one
    answer = checkpoint.answer(IMAGE, QUESTION)
    assert (answer.seconds, answer.timed) == (0.6, 0)
    assert "<dt>Latency, once</dt>" in views.answer("All tokens", "full", answer)


# --- pictures -----------------------------------------------------------------------------------------------------


def test_the_picture_is_what_the_model_saw(checkpoints):
    wide = Image.new("RGB", (96, 32), "red")
    wide.paste((0, 0, 255), (32, 0, 64, 32))  # the middle third, which the processor cuts out
    view = checkpoints["baseline"].answer(wide, QUESTION, checkpoints["baseline"].pruner("grid", 0.5)).view
    assert view.image.size == (32, 32)
    assert {colour for _, colour in view.image.getcolors()} == {(0, 0, 255)}


def test_kept_tokens_are_in_colour_and_others_grey():
    out = draw(View(Image.new("RGB", (32, 32), (20, 60, 210)), 4, 4, {(0, 0), (2, 3)}))
    cell = kept_tokens.EDGE // 4

    def middle(row: int, column: int) -> tuple[int, int, int]:
        return out.getpixel((column * cell + cell // 2, row * cell + cell // 2))

    assert out.size == (kept_tokens.EDGE, kept_tokens.EDGE)
    for row in range(4):
        for column in range(4):
            if (row, column) in {(0, 0), (2, 3)}:
                assert middle(row, column) == (20, 60, 210)
                assert out.getpixel((column * cell, row * cell)) == kept_tokens.FRAME
            else:
                red, green, blue = middle(row, column)
                assert red == green == blue


def test_without_a_veil_the_page_is_seen_through_other_tokens():
    view = View(Image.new("RGB", (32, 32), (20, 60, 210)), 1, 2, {(0, 0)})
    out = draw(view, veil=None)
    pages = [Image.alpha_composite(Image.new("RGBA", out.size, colour), out) for colour in ("white", "black")]
    kept, other = (100, 100), (kept_tokens.EDGE - 100, 100)
    assert [page.getpixel(kept)[:3] for page in pages] == 2 * [(20, 60, 210)]
    white, black = (page.getpixel(other)[:3] for page in pages)
    assert all(a > 150 and b < 60 for a, b in zip(white, black, strict=True))
    assert white == pytest.approx(draw(view).getpixel(other), abs=2)


def test_examples_are_photographs_and_shapes(tmp_path):
    pytest.importorskip("gradio")
    photos, shapes = list(PHOTO_QUESTIONS), [question for *_, question in EXAMPLES]
    assert [question for _, question in write_examples(tmp_path, shapes_first=False)] == photos + shapes
    rows = write_examples(tmp_path, shapes_first=True)
    assert [question for _, question in rows] == shapes + photos
    assert all(min(read_image(path).size) > 200 for path, _ in rows)
    assert len({path for path, _ in rows}) == len(rows)
    assert overlay.photograph("matplotlib", "no/such.jpg") is overlay.photograph("no_such_package", "a.jpg") is None
    known = [SimpleNamespace(results=results) for results in ({"datasets": ["easy-vqa"]}, {"datasets": ["a"]}, {})]
    for checkpoint, alone in zip(known, (True, False, False), strict=True):
        assert places.know_shapes_alone([Slot("pruned"), Slot("dualspeed", "x", checkpoint)]) == alone
    assert not places.know_shapes_alone([Slot("pruned")])


def test_a_picture_of_another_shape_keeps_it():
    assert draw(View(Image.new("RGB", (64, 16)), 2, 8, {(1, 7)})).size == (kept_tokens.EDGE, kept_tokens.EDGE // 4)


# --- what visitors give -------------------------------------------------------------------------------------------


def png_claiming(path: Path, width: int, height: int) -> str:
    """A PNG whose header names a size, and hardly any data."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b""))
    return str(path)


@pytest.mark.parametrize(("width", "height"), [(8000, 6000), (12000, 9000), (60000, 60000)])
def test_huge_images_are_refused_unread(tmp_path, width, height):
    with pytest.raises(InputError, match="at most 40 megapixels"):
        read_image(png_claiming(tmp_path / "bomb.png", width, height))


def test_what_is_no_image_is_refused(tmp_path):
    with pytest.raises(InputError, match="choose an image"):
        read_image(None)
    whole = tmp_path / "whole.png"
    picture(64, 64).save(whole)
    files = {"text.png": b"hello", "empty.jpg": b"", "cut.png": whole.read_bytes()[:2000], "code.svg": b"<svg/>"}
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(InputError, match="damaged, or no image"):
            read_image(str(tmp_path / name))
    with pytest.raises(InputError, match="damaged"):
        read_image(png_claiming(tmp_path / "short.png", 500, 500))
    with pytest.raises(InputError, match="damaged"):
        read_image(str(tmp_path / "gone.png"))


def test_images_come_upright_small_and_opaque(tmp_path):
    turned = Image.new("RGB", (40, 20), "red")
    exif = turned.getexif()
    exif[274] = 6
    turned.save(tmp_path / "turned.jpg", exif=exif)
    assert read_image(str(tmp_path / "turned.jpg")).size == (20, 40)
    Image.new("L", (5000, 2500), 7).save(tmp_path / "large.jpg")
    large = read_image(str(tmp_path / "large.jpg"))
    assert (large.mode, max(large.size)) == ("RGB", 2048)
    Image.new("RGBA", (9, 9), (0, 0, 0, 0)).save(tmp_path / "clear.png")
    assert read_image(str(tmp_path / "clear.png")).getpixel((4, 4)) == (255, 255, 255)
    Image.fromarray(np.full((9, 9), 2**15, dtype=np.uint16)).save(tmp_path / "deep.png")
    assert read_image(str(tmp_path / "deep.png")).getpixel((4, 4)) == (128, 128, 128)


def test_questions():
    assert check_question("  what? ") == "what?"
    for empty in (None, "", "  \n"):
        with pytest.raises(InputError, match="type a question"):
            check_question(empty)
    assert check_question("x" * 300) == "x" * 300
    with pytest.raises(InputError, match="has 301 characters. Please ask in at most 300"):
        check_question("x" * 301)


# --- checkpoints --------------------------------------------------------------------------------------------------


def test_what_cannot_be_loaded_says_why(tmp_path):
    assert "--pruned FOLDER" in load_slot("pruned", None).problem
    missing = load_slot("pruned", str(tmp_path / "no" / "such" / "run"))
    assert missing.checkpoint is None
    assert "neither a folder nor a Hub id" in missing.problem
    (tmp_path / "config.json").write_text("{}")
    assert "Could not be loaded: " in load_slot("pruned", str(tmp_path)).problem
    with pytest.raises(InputError, match="No checkpoint is loaded"):
        ask([missing], IMAGE, QUESTION, "grid", 0.5)


def test_a_template_that_refuses_a_question_leaves_the_other_slots(tiny_runs, tmp_path):
    run = shutil.copytree(tiny_runs["pruned"], tmp_path / "run")
    (run / "chat_template.jinja").write_text("{{ raise_exception('no users') }}")
    slot = load_slot("pruned", str(run))
    assert "Could not be loaded: The chat template fails" in slot.problem
    assert "no users" in slot.problem


def test_a_picture_that_one_model_refuses_leaves_the_others(slots, monkeypatch):
    """As Qwen-VL's processor refuses very long ones."""

    def refuse(*_):
        raise ValueError("absolute aspect ratio must be smaller than 200")

    monkeypatch.setattr(slots[1].checkpoint, "_inputs", refuse)
    page = views.cards(slots, ask(slots, IMAGE, QUESTION, "grid", 0.5), "grid")
    assert page.count("aspect ratio") == 2
    assert page.count("<figure>") == 2


def test_the_others_answer_where_one_is_missing(slots):
    some = [slots[0], Slot("dualspeed", "gone/away", problem="Could not be loaded: gone"), slots[2]]
    answers = ask(some, IMAGE, QUESTION, "grid", 0.5)
    assert answers.keys() == {"baseline", "pruned"}
    page = views.cards(some, answers, "grid")
    assert page.count("<figure>") == 2
    assert "Could not be loaded: gone" in page


def test_a_pruner_that_a_model_does_not_let_in_leaves_the_full_answer(slots, monkeypatch):
    def refuse(name, ratio):
        raise ValueError("patches are pooled into tokens")

    monkeypatch.setattr(slots[0].checkpoint, "pruner", refuse)
    pair = ask(slots[:1], IMAGE, QUESTION, "cls_attention", 0.5)["baseline"]
    assert pair.full.used == TOKENS
    assert pair.pruned == "patches are pooled into tokens"
    assert "patches are pooled" in views.cards(slots[:1], {"baseline": pair}, "cls_attention")


def test_names_are_given_or_set_or_listed_or_the_quickstarts(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(places, "CHECKPOINTS", tmp_path / "checkpoints.json")
    none = dict.fromkeys(places.ROLES)
    assert chosen_names({}) == none
    Path("runs/quickstart").mkdir(parents=True)
    assert chosen_names({}) == {**none, "dualspeed": "runs/quickstart"}
    (tmp_path / "checkpoints.json").write_text(json.dumps({"dualspeed": "user/listed", "pruned": "user/pruned"}))
    assert chosen_names({}) == {**none, "dualspeed": "user/listed", "pruned": "user/pruned"}
    monkeypatch.setenv("DEMO_DUALSPEED", "user/set")
    assert chosen_names({})["dualspeed"] == "user/set"
    assert chosen_names({"dualspeed": "user/given"})["dualspeed"] == "user/given"


@pytest.mark.parametrize("text", ["", "{", "[]", "NaN", '{"dualspeed": 3}', '{"dualspeed": ["a/b"]}', "[" * 5000])
def test_a_broken_list_of_checkpoints_is_named(tmp_path, monkeypatch, text):
    monkeypatch.setattr(places, "CHECKPOINTS", tmp_path / "checkpoints.json")
    (tmp_path / "checkpoints.json").write_text(text)
    with pytest.raises(ValueError, match=r"checkpoints\.json' cannot be read"):
        chosen_names({})


def test_a_checkpoint_comes_from_the_hub_without_code_and_pickles(hub, tiny_runs):
    files = {path.name: path.read_bytes() for path in Path(tiny_runs["dualspeed"]).iterdir() if path.is_file()}
    hub.put("tester/run", {**files, "evil.py": "raise SystemExit", "pytorch_model.bin": b"pickle"})
    checkpoint = Checkpoint("tester/run")
    held = {path.name for path in checkpoint.folder.iterdir()}
    assert {"model.safetensors", "mode_isolator.safetensors", "results.json", "learning_curve.png"} <= held
    assert not held & {"evil.py", "pytorch_model.bin", "training_args.bin"}
    assert checkpoint.isolator.length == 4
    missing = load_slot("dualspeed", "tester/none")
    assert "does not exist, or is private" in missing.problem


# --- what the results say ---------------------------------------------------------------------------------------


def test_a_slot_says_what_its_results_say(slots):
    """Whatever the slot is called."""
    for slot, title in zip(slots, ("Full-token baseline", "DualSpeed", "Pruned-trained"), strict=True):
        assert Slot("dualspeed", "x", slot.checkpoint).title() == title
    results = {
        "model": "a model",
        "datasets": ["some/data"],
        "accuracy": 0.667,
        "steps": {"fast": 1365, "slow": 35},
        "seconds": {"total": 3000.4},
        "speedup": {"speedup": 2.743},
        "settings": {"pruning_ratio": 0.9, "pruner": {"pruner_type": "visionzip"}},
    }
    slot = Slot("baseline", "x", SimpleNamespace(results=results))
    assert views.trained(slot) == "a model on some/data: 1,365 steps on 10% of the tokens (by visionzip), 35 on all."
    card = views.cards([slot])
    assert all(words in card for words in (">DualSpeed<", ">66.7%<", ">50 min<", ">2.74x<"))
    results |= {"steps": {"fast": 0, "slow": 400}}
    assert views.trained(slot) == "a model on some/data: 400 steps on all."
    unknown = Slot("pruned", "x", SimpleNamespace(results={}))
    assert unknown.title() == "Pruned-trained"
    assert "No results.json says how it was trained." in views.cards([unknown])


@pytest.mark.parametrize("odd", ["words", 7, [1], None, float("nan"), {"fast": [], "total": {}}])
def test_results_of_others_may_hold_anything(odd):
    keys = ("steps", "seconds", "speedup", "settings", "datasets", "model", "accuracy", "machine", "date")
    slot = Slot("dualspeed", "x", SimpleNamespace(results=dict.fromkeys(keys, odd)))
    assert "DualSpeed" in views.cards([slot])
    assert "DualSpeed" in views.runs_table([slot])


def test_links_are_those_that_are_known(monkeypatch):
    monkeypatch.delenv("DEMO_CODE", raising=False)
    own = SimpleNamespace(results={}, on_hub=False)
    pushed = SimpleNamespace(results={}, on_hub=True)
    slots = [Slot("baseline", "runs/own", own), Slot("dualspeed", "user/model", pushed), Slot("pruned", "user/gone")]
    page = views.header(slots)
    assert page.count("<a ") == 2
    assert views.PAPER in page
    assert '/user/model"' in page
    monkeypatch.setenv("DEMO_CODE", "https://example.org/code?a=1&b=2")
    assert 'href="https://example.org/code?a=1&amp;b=2"' in views.header(slots)
    monkeypatch.delenv("DEMO_CODE")
    monkeypatch.setenv("SPACE_ID", "user/demo")  # a Space holds the library's source
    assert '/spaces/user/demo/tree/main"' in views.header(slots)
    for bad in ("javascript:alert(1)", "example.org", 'https://a"onclick=', "ftp://a"):
        monkeypatch.setenv("DEMO_CODE", bad)
        with pytest.raises(ValueError, match="DEMO_CODE must be the address of the code"):
            views.header(slots)


def test_every_pruner_has_a_line(checkpoints):
    names = pruner_names(list(checkpoints.values()))
    lines = inference.explained_pruners(names)
    assert list(lines) == names
    assert all(line.endswith(".") and 20 < len(line) < 120 for line in lines.values())
    assert f"`grid`: {lines['grid']}" in views.about(lines)


def test_an_accuracy_of_a_part_of_the_questions_says_so():
    results = {"accuracy": 0.5, "eval_part": "first 200 <b>"}
    slot = Slot("dualspeed", "run", SimpleNamespace(results=results))
    assert "<dd>50.0% (first 200 &lt;b&gt;)</dd>" in views.figures(slot)
    assert "50.0% <span>(first 200 &lt;b&gt;)</span>" in views.runs_table([slot])
    del results["eval_part"]
    assert "<dd>50.0%</dd>" in views.figures(slot)


@pytest.mark.parametrize(
    ("timed", "said"), [(0, "the last token. Each question is answered once."), (5, "the median of 5 more. A model")]
)
def test_the_page_says_how_often_an_answer_is_timed(monkeypatch, timed, said):
    monkeypatch.setattr(views, "TIMED", timed, raising=False)
    assert said in views.about({})
    assert "cut after 32 tokens" in views.about({})


# --- the page's words ---------------------------------------------------------------------------------------------


def test_answers_and_names_are_shown_as_text():
    evil = "<script>alert(1)</script>"
    slot = Slot("dualspeed", evil, checkpoint=SimpleNamespace(results={}))
    pair = Pair(Answer(evil, 0.0123, 0.5, 64, 64), evil)
    page = views.cards([slot, Slot("pruned", evil, problem=evil)], {"dualspeed": pair})
    assert evil not in page
    assert page.count("&lt;script&gt;") == 5
    assert "12 ms" in page
    assert "50.0%" in page
    assert "64 of 64" in page


def test_small_numbers_and_merging_pruners_are_told_apart():
    assert views.probability(1e-6) == "below 0.1%"
    assert views.duration(2.5) == "2.50 s"
    answer = Answer("x", 1, 1, 16, 64, 4, View(IMAGE, 8, 8, {(0, 0)}))
    assert "means that stand for others" in views.figure_caption(replace(answer, merged=True), answer.view, "tome")
    assert views.figure_caption(answer, answer.view, "grid") == "16 of 64 tokens (25%) kept by grid, + 4 learned."


def test_results_of_the_runs(slots, tmp_path, monkeypatch):
    table = views.runs_table(slots)
    assert table.count("<tr>") == 4
    for slot in slots:
        assert slot.role.title in table
    assert [title for title, _ in views.learning_curves(slots)] == [slot.role.title for slot in slots]
    monkeypatch.chdir(SPACE.parent)
    text, plot = views.comparison()
    assert "pruned only <span>(NaivePrune)</span>" in text
    assert plot.is_file()
    monkeypatch.setattr(views, "COMPARE", (tmp_path / "none.json",))
    assert views.comparison() is None
    assert "brings a results.json" in views.runs_table([])


def test_the_page_shows_no_markup_of_others(checkpoints):
    """Of a model's name, its answers, its results, its problem, and a comparison's file."""
    mark = '<img src=x onerror="alert(1)">'
    checkpoint = copy.copy(checkpoints["dualspeed"])
    checkpoint.results = {"steps": {"fast": mark, "slow": mark}}
    slot, given = Slot("dualspeed", mark, checkpoint), Answer(mark, 0.1, 0.5, 3, 4)
    pages = [views.cards([slot], {"dualspeed": Pair(given, mark)}, mark), views.runs_table([slot])]
    pages.append(views.cards([Slot("dualspeed", mark, problem=mark)]))
    for page in pages:
        assert "&lt;img src=x onerror=" in page
        assert "<img src=x" not in page
