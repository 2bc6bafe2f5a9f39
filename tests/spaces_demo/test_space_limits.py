"""The Space against visitors who send what the page would not: the raw API of a page in another process."""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from tiny_runs import QUESTION

pytest.importorskip("gradio", reason='needs gradio: pip install "hf-dualspeed[demo]"')

META = {"meta": {"_type": "gradio.FileData"}}
NO_UPLOAD = "The image is no upload of this page"


def forms(path: object) -> list[object]:
    """The ways to name a picture: as the page does, without `meta`, as a stream, as text."""
    return [{"path": path, **META}, {"path": path}, {"path": path, "is_stream": True, **META}, path]


@pytest.fixture
def upload(space_process) -> str:
    return space_process.upload()


def test_an_upload_is_answered_whatever_stands_beside_its_path(space_process, upload):
    for value in (*forms(upload)[:3], {"path": upload, "url": {"path": "http://127.0.0.1:9/x.png", **META}}):
        assert space_process.ask(value).startswith("event: complete"), value


def test_files_of_the_server_are_no_uploads(space_process, upload):
    """Devices and pipes would hang the page, and pictures would come back."""
    folder, uploads = space_process.folder, os.path.dirname(os.path.dirname(upload))
    os.mkfifo(os.path.join(uploads, "pipe.png"))
    os.symlink(folder / "private.png", os.path.join(uploads, "link.png"))
    os.symlink(folder, os.path.join(uploads, "folder"))
    inside = [os.path.join(uploads, name) for name in ("pipe.png", "link.png", "folder/private.png", "", "gone.png")]
    outside = ["/dev/ptmx", "/dev/zero", "/dev/stdin", "/etc/passwd", "private.png", str(folder / "private.png")]
    odd = [f"{uploads}/../{folder.name}/private.png", f"{upload}\0", "x" * 10_000, 3, ["/dev/ptmx"], {"path": upload}]
    odd += ["http://127.0.0.1:9/x.png", "https://example.org/x.png", "file:///dev/ptmx"]
    for path in (*inside, *outside, *odd):
        for value in forms(path):
            if value != {"path": upload}:
                answer = space_process.ask(value)
                assert answer.startswith("event: error"), value
                assert NO_UPLOAD in answer or value == "", (value, answer)
    assert space_process.ask({"path": upload}).startswith("event: complete")


def test_the_page_s_own_events_are_checked_too(space_process):
    """A check of an upload answers with the picture: it would copy a file of the server to where it can be fetched."""
    config = space_process.http.get(str(space_process.http.base_url.join("/config"))).json()
    own = [one for one in config["dependencies"] if one["inputs"] and one["backend_fn"]]
    own = [one["id"] for one in own if one["api_name"] != "ask"]
    assert len(own) >= 2
    for index in own:
        for value in forms(str(space_process.folder / "private.png")):
            body = {"fn_index": index, "session_hash": "own", "data": [value, "what?", "grid", 0.5]}
            assert space_process.http.post("queue/join", json=body).status_code == 200
            with space_process.http.stream("GET", "queue/data", params={"session_hash": "own"}) as stream:
                events = "".join(stream.iter_text())
            assert '"success":false' in events, events
            assert "private" not in events.replace("upload of this page", "")


@pytest.mark.parametrize("path", ["private.png", "log.txt"])
def test_files_of_the_server_are_not_served(space_process, path):
    for place in (path, str(space_process.folder / path)):
        assert space_process.http.get(f"file={place}").status_code in (403, 404)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"question": {"path": "https://example.org/x.png", **META}}, "Question may not be of type dict"),
        ({"question": ["a"]}, "Question may not be of type list"),
        ({"pruner": {"path": "/etc/passwd", **META}}, "Pruner may not be of type dict"),
        ({"ratio": "0.5"}, "Tokens removed may not be of type str"),
        ({"ratio": True}, "Tokens removed may not be of type bool"),
        ({"question": "x" * 301}, "Please ask in at most 300"),
    ],
)
def test_values_of_other_types_are_refused_by_name(space_process, upload, values, message):
    answer = space_process.ask({"path": upload}, **values)
    assert answer.startswith("event: error")
    assert message in answer


def test_postscript_is_no_image(space_process):
    answer = space_process.ask(
        {"path": space_process.upload(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EOF\n")}
    )
    assert "damaged, or no image" in answer


# --- disk ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("bound", "value", "left"), [("MAX_HELD", 10_000, 3), ("MAX_FILES", 3, 3), ("MAX_AGE", -1, 0)])
def test_uploads_have_a_bound_together(server, monkeypatch, bound, value, left):
    """Those that gradio itself never removes, too: files of another field. The page's own stay."""
    limits = pytest.importorskip("limits")
    monkeypatch.setattr(limits, bound, value)
    with httpx.Client(base_url=f"{server.url}gradio_api/", timeout=60, trust_env=False) as http:
        for field in ("files", "others", "files", "others", "files", "files"):
            answer = http.post("upload", files={field: ("a.png", os.urandom(3000))})
    for _ in range(100):  # room is made behind the answer
        found = [path for path in limits.within(limits.FOLDER) if path.is_file()]
        held = set()
        for path in found:
            with contextlib.suppress(FileNotFoundError):  # deleted in between
                held |= {str(path)} if path.stat().st_size == 3000 else set()
        if len(held) == left and server.page.upload_file_set <= held:
            break
        time.sleep(0.05)
    assert len(held) == left
    assert (answer.json()[0] in held) is (left > 0)
    assert server.page.upload_file_set <= held
    assert any(path.parent.name.startswith("examples-") for path in found)


def test_a_folder_may_vanish_while_uploads_are_counted(server, monkeypatch):
    """As gradio removes what is older than an hour."""
    limits = pytest.importorskip("limits")
    (limits.FOLDER / "upload").mkdir()
    (limits.FOLDER / "upload" / "a.png").write_bytes(b"")

    def scanned(path):
        if str(path).endswith("upload"):
            shutil.rmtree(path, ignore_errors=True)
        return scan(path)

    scan = os.scandir
    monkeypatch.setattr(os, "scandir", scanned)
    limits.BodyLimit(None, server.page).make_room()
    assert not (limits.FOLDER / "upload").exists()


# --- memory -------------------------------------------------------------------------------------------------------

LARGE = 20 * 2**20


def chunks(size: int):
    """A body whose length is not told."""
    yield b'{"data": ["'
    for _ in range(size // 2**16):
        yield b"x" * 2**16


def test_large_requests_are_refused(space_process):
    http = space_process.http
    for path in ("call/ask", "queue/join", "run/ask", "component_server", "cancel", "upload"):
        for content in (b"x" * LARGE, chunks(LARGE)):
            with contextlib.suppress(httpx.TransportError):  # hung up while the body was sent
                answer = http.post(path, content=content, headers={"Content-Type": "application/json"})
                assert answer.status_code >= 400, path
    assert http.post("call/ask", json={"data": ["x" * 20_000]}).status_code == 413
    assert http.post("upload", files={"files": ("a.png", b"x" * 11 * 2**20)}).status_code == 413
    many = [("files", (f"{number}.png", b"x" * 2**20)) for number in range(12)]
    assert http.post("upload", files=many).status_code == 413
    assert http.post("upload", files={"files": ("a.png", b"x" * 9 * 2**20)}).status_code == 200


def test_sessions_are_bounded(space_process, upload):
    values = [{"path": upload}, "", "grid", 0.5]  # is refused when it is asked, after the queue
    assert space_process.call(*values, session_hash="x" * 65).status_code in (400, 422)
    seen = [space_process.http.post("queue/join", json=body).status_code for body in joined("same", values, 12)]
    assert seen.count(200) <= 8
    assert 503 in seen


def joined(session: str, values: list, times: int) -> list[dict]:
    return [{"fn_index": 0, "session_hash": session, "data": values}] * times


def test_300_requests_leave_the_memory_as_it_was(space_process, upload):
    """Refused and answered, fetched and not, each in a session of its own."""
    large = b'{"data": [{"path": "a"}, "%s", "grid", 0.5]}' % (b"x" * LARGE)

    def request(number: int) -> None:
        kind, session = number % 10, f"session {number}"
        try:
            if kind == 0:
                space_process.http.post("call/ask", content=large, headers={"Content-Type": "application/json"})
            elif kind == 1:
                space_process.call({"path": "/dev/ptmx"}, "y" * 9000, "grid", 0.5, session_hash=session)
            elif kind == 2:
                space_process.ask({"path": upload})
            elif kind == 3:
                space_process.call({"path": upload}, QUESTION, "grid", 0.5, session_hash=session)
            elif kind == 4:
                space_process.http.post("upload", files={"files": ("a.png", b"x" * 2**20 + session.encode())})
            else:
                space_process.http.post("run/ask", json={"data": [{"path": upload}, "z" * 15_000, "grid", 0.5]})
        except (httpx.TransportError, httpx.HTTPStatusError):
            pass

    for number in range(60):
        request(number)
    before = space_process.memory()
    for number in range(60, 360):
        request(number)
    assert space_process.ask({"path": upload}).startswith("event: complete")
    assert space_process.memory() - before < 50


def test_50_at_once_are_answered_or_told_why(space_process, upload):
    """The queue takes 20. The others are told that it is full, and the page goes on."""

    def visit(number: int) -> str:
        try:
            return space_process.ask({"path": upload}, f"{QUESTION} {number}")
        except httpx.HTTPStatusError as error:
            return error.response.text

    with ThreadPoolExecutor(50) as pool:
        answers = list(pool.map(visit, range(50)))
    answered = ["event: complete" in answer for answer in answers]  # behind a heartbeat, where it took long
    assert sum(answered) >= 20
    assert all(good or "Queue is full" in answer for good, answer in zip(answered, answers, strict=True))
    assert space_process.ask({"path": upload}).startswith("event: complete")
