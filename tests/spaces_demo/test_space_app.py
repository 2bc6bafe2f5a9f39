"""The Space's page through gradio's own API: answers, refusals, limits."""

from __future__ import annotations

import json
import re
from pathlib import Path
from urllib.request import Request, urlopen

import pytest

app = pytest.importorskip("app", reason='needs gradio: pip install "hf-dualspeed[demo]"')
gradio_client = pytest.importorskip("gradio_client")

from gradio_client import Client, handle_file  # noqa: E402
from gradio_client.exceptions import AppError  # noqa: E402
from overlay import COLOURS, drawn_shape  # noqa: E402
from slots import load_slots  # noqa: E402
from tiny_runs import QUESTION, TOKENS  # noqa: E402


@pytest.fixture(scope="module")
def client(server):
    return Client(server.url, verbose=False)


@pytest.fixture
def image(tmp_path):
    path = tmp_path / "shape.png"
    drawn_shape("triangle", COLOURS["green"]).save(path)
    return str(path)


def ask(client, path, question=QUESTION, pruner="divprune", ratio=0.75) -> str:
    return client.predict(handle_file(path), question, pruner, ratio, api_name="/ask")


def test_all_three_answer(client, image):
    page = ask(client, image)
    assert page.count('class="answer full"') == page.count('class="answer pruned"') == 3
    assert page.count(f">{TOKENS} of {TOKENS}<") == 3
    assert page.count(f">16 of {TOKENS}<") == 3
    assert page.count("data:image/webp;base64,") == 3


def test_ratio_and_pruner_change_the_picture(client, image):
    pictures = {
        tuple(re.findall(r'src="(data:[^"]+)"', ask(client, image, pruner=pruner, ratio=ratio)))
        for pruner, ratio in (("grid", 0.5), ("grid", 0.75), ("divprune", 0.75))
    }
    assert len(pictures) == 3
    assert all(len(found) == 3 for found in pictures)


def test_refusals_say_what_to_do(client, image, tmp_path):
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no image at all")
    for arguments, message in (
        ((str(broken),), "damaged, or no image"),
        ((image, "  "), "Please type a question"),
        ((image, "x" * 301), "at most 300"),
    ):
        with pytest.raises(AppError, match=message):
            ask(client, *arguments)
    with pytest.raises(AppError, match="choose an image"):
        client.predict(None, QUESTION, "grid", 0.5, api_name="/ask")


def upload(server, path: str) -> str:
    """Uploads a file as the page does; the path that it gets on the server."""
    body = b'--edge\r\nContent-Disposition: form-data; name="files"; filename="shape.png"\r\n\r\n'
    body += Path(path).read_bytes() + b"\r\n--edge--\r\n"
    headers = {"Content-Type": "multipart/form-data; boundary=edge"}
    with urlopen(Request(f"{server.url}gradio_api/upload", body, headers), timeout=300) as answer:
        return json.load(answer)[0]


def test_a_path_of_the_server_is_no_upload(server, client, image):
    """Only what was uploaded can be asked about: no caller reads other images of this machine."""

    def call(path: str) -> str:
        data = [{"path": path, "meta": {"_type": "gradio.FileData"}}, QUESTION, "grid", 0.5]
        body = json.dumps({"data": data}).encode()
        request = Request(f"{server.url}gradio_api/call/ask", body, {"Content-Type": "application/json"})
        with urlopen(request, timeout=300) as answer:
            event = json.load(answer)["event_id"]
        with urlopen(f"{server.url}gradio_api/call/ask/{event}", timeout=300) as stream:
            return stream.read().decode()

    assert call(image).startswith("event: error")
    assert call(upload(server, image)).startswith("event: complete")


@pytest.mark.parametrize(("pruner", "ratio"), [("fastv", 0.5), ("no such", 0.5), ("grid", 1.5)])
def test_what_the_page_does_not_offer_is_refused(client, image, pruner, ratio):
    with pytest.raises(AppError):
        ask(client, image, pruner=pruner, ratio=ratio)


def test_the_page_is_limited_and_says_nothing_to_others(server):
    config = server.page.config
    assert server.page._queue.max_size == app.QUEUE
    assert server.page.max_file_size == 10 * 1024 * 1024
    assert config["analytics_enabled"] is False
    opening = [fn for fn in server.page.fns.values() if fn.name == "example"]
    assert [(fn.concurrency_limit, fn.inputs) for fn in opening] == [(None, [])]  # nothing to send, nobody to wait for
    asking = [fn for fn in server.page.fns.values() if fn.concurrency_id == "models"]
    assert len(asking) == 2
    assert {fn.concurrency_limit for fn in asking} == {1}
    (picture,) = [c for c in config["components"] if c["props"].get("elem_id") == "image"]
    assert picture["props"]["sources"] == ["upload", "clipboard"]


def test_the_webcam_is_there_where_it_is_wanted(slots):
    config = app.build(slots, webcam=True).config
    (picture,) = [c for c in config["components"] if c["props"].get("elem_id") == "image"]
    assert "webcam" in picture["props"]["sources"]


def test_a_first_example_that_fails_leaves_the_page(slots, monkeypatch, capsys):
    def fail(*args):
        raise RuntimeError("out of memory")

    page = app.build(slots)
    monkeypatch.setattr(app, "ask", fail)
    page.worker.run()
    assert "The first example has no answer: out of memory" in capsys.readouterr().err
    page = app.build(load_slots({}))  # nobody to answer: nothing is asked
    (question,) = [c for c in page.config["components"] if c["props"].get("elem_id") == "question"]
    assert page.worker is None
    assert not question["props"]["value"]


def test_the_page_stands_without_any_checkpoint(tmp_path):
    page = app.build(load_slots({"dualspeed": str(tmp_path / "gone/away/for/good")}))
    (cards,) = [c for c in page.config["components"] if c["props"].get("elem_id") == "cards"]
    assert cards["props"]["value"].count("problem") == 3


def test_only_listed_calls_are_open_to_programs(client):
    assert list(client.view_api(return_format="dict", print_info=False)["named_endpoints"]) == ["/ask"]


def test_nothing_left_this_machine(server, client, image):
    ask(client, image)
    assert server.outside == []
