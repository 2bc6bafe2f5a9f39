"""The Space's page on 127.0.0.1, in this process, and a watch over what it connects to."""

from __future__ import annotations

import ipaddress
import socket
from dataclasses import dataclass

import pytest
from slots import Slot


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
        _, url, _ = app.launch(page, server_name="127.0.0.1", prevent_thread_lock=True, quiet=True)
        yield Server(url, page, outside)
        page.close()
