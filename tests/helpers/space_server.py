"""The Space's page on 127.0.0.1: in this process, with a watch over what it connects to, and in one of its own."""

from __future__ import annotations

import contextlib
import ipaddress
import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
import slots as space
from overlay import COLOURS, drawn_shape
from slots import Slot
from tiny_runs import QUESTION

ROOT = Path(__file__).parents[2]


@dataclass
class Server:
    """A running page: its address, and the hosts beyond this machine that the process tried to reach."""

    url: str
    page: object
    outside: list[str]


def is_outside(address: object) -> bool:
    """Whether an address to connect to is not on this machine. Sockets of files are."""
    if not isinstance(address, tuple):
        return False
    try:
        return not ipaddress.ip_address(address[0]).is_loopback
    except ValueError:  # a name
        return address[0] != "localhost"


@pytest.fixture(scope="session")
def server(slots: list[Slot]):
    """The page around the three tiny runs. Connections beyond this machine fail, and are noted."""
    app = pytest.importorskip("app", reason='needs gradio: pip install "hf-dualspeed[demo]"')
    outside: list[str] = []
    connect = socket.socket.connect

    def watched(self, address):
        if is_outside(address):
            outside.append(str(address))
            raise ConnectionRefusedError(f"{address} is not on this machine")
        return connect(self, address)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", watched)
        page = app.build(slots)
        _, url, _ = app.launch(page, server_name="127.0.0.1", wait=False, quiet=True)
        yield Server(url, page, outside)
        page.close()
        page.worker.join()  # a thread within torch would abort the process at its end


# --- in a process of its own --------------------------------------------------------------------------------------


@dataclass
class Space:
    """A page in another process, talked to as by a program.

    Args:
        http (`httpx.Client`): A client of the page's API; requests fail after a minute.
        process (`subprocess.Popen`): The process.
        folder (`Path`): Its working folder; what is below it is no upload.
    """

    http: httpx.Client
    process: subprocess.Popen
    folder: Path

    def upload(self, data: bytes | None = None) -> str:
        """The path on the server of an upload; by default, of a small picture."""
        data = data or (self.folder / "private.png").read_bytes()
        answer = self.http.post("upload", files={"files": ("picture.png", data)})
        answer.raise_for_status()
        return answer.json()[0]

    def call(self, *values: object, **body: object) -> httpx.Response:
        """The answer to a question's POST, which names an event."""
        return self.http.post("call/ask", json={"data": [*values], **body})

    def ask(self, image: object, question: object = QUESTION, pruner: object = "grid", ratio: object = 0.5) -> str:
        """The stream of events that answers a question, as text."""
        answer = self.call(image, question, pruner, ratio)
        answer.raise_for_status()
        return self.http.get(f"call/ask/{answer.json()['event_id']}").text

    def memory(self) -> float:
        """MiB that the process has in memory."""
        return int(re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{self.process.pid}/status").read_text())[1]) / 1024


@contextlib.contextmanager
def started(
    runs: dict[str, str], folder: Path, app: Path | None = None, python: str = sys.executable
) -> Iterator[Space]:
    """A page around the runs, whose working folder holds a picture, `private.png`; by default, the checkout's."""
    drawn_shape("circle", COLOURS["red"]).save(folder / "private.png")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    names = {f"DEMO_{role.upper()}": run for role, run in runs.items()}
    offline = {"HF_HUB_OFFLINE": "1", "GRADIO_SERVER_PORT": str(port), "GRADIO_SERVER_NAME": "127.0.0.1"}
    environment = {**os.environ, **names, **offline, "PYTHONUNBUFFERED": "1", "DEMO_TIMED": "0"}
    environment["PYTHONPATH"] = str(ROOT) if app is None else ""
    command = [python, str(app or Path(space.__file__).with_name("app.py"))]
    with (folder / "log.txt").open("w") as log:
        process = subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=subprocess.STDOUT)
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}/gradio_api/", timeout=60, trust_env=False) as http:
            for _ in range(600):
                with contextlib.suppress(httpx.TransportError):
                    http.get("info").raise_for_status()
                    break
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(0.2)
                    raise RuntimeError((folder / "log.txt").read_text())
            yield Space(http, process, folder)
    finally:
        process.kill()
        process.wait()


@pytest.fixture(scope="session")
def space_process(tiny_runs, tmp_path_factory):
    """The page around the three tiny runs, in a process of its own."""
    pytest.importorskip("gradio", reason='needs gradio: pip install "hf-dualspeed[demo]"')
    with started(tiny_runs, tmp_path_factory.mktemp("space")) as found:
        yield found
