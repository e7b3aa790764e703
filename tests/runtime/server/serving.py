"""Served on loopback in a thread, and asked through a bare socket. Shared by tests of the server."""

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.client import HTTPResponse
from typing import Any

from m0kit.server.connections import Server, serve
from m0kit.server.guard import App
from m0kit.server.listening import listening
from m0kit.server.metrics import Metrics
from m0kit.server.settings import ModelSettings, Settings

PATIENCE_S = 20.0  # far more than anything here takes


@dataclass
class Served:
    """A server that runs."""

    server: Server
    port: int
    metrics: Metrics
    thread: threading.Thread
    stopped: list[bool]
    clients: "list[Client]" = field(default_factory=list)

    def ask(self, data: bytes = b"") -> "Client":
        client = Client(socket.create_connection(("127.0.0.1", self.port), timeout=PATIENCE_S))
        self.clients.append(client)
        client.send(data)
        return client

    def stop(self) -> None:
        self.server.should_exit = True
        self.thread.join(PATIENCE_S)
        assert not self.thread.is_alive()


class Client:
    """One connection."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock

    def send(self, data: bytes) -> None:
        self.sock.sendall(data)

    def answer(self, method: str = "GET") -> tuple[int, dict[str, str], bytes]:
        """Status, headers and body of the next answer. Of pipelined ones the first takes what follows."""
        response = HTTPResponse(self.sock, method=method)
        response.begin()
        with response:
            return response.status, {name.lower(): value for name, value in response.getheaders()}, response.read()

    def rest(self) -> bytes:
        """All until the server closes, or resets."""
        pieces = []
        with contextlib.suppress(ConnectionResetError):
            while piece := self.sock.recv(1 << 16):
                pieces.append(piece)
        return b"".join(pieces)

    def drip(self, piece: bytes, every_s: float = 0.01) -> bool:
        """Send it again and again. Whether the server put an end to it, before a thousand times that."""
        for _ in range(2000):
            try:
                self.send(piece)
            except OSError:  # a pipe that broke, or was reset
                return True
            time.sleep(every_s)
        return False

    def close(self) -> None:
        self.sock.close()


def until(condition: Callable[[], object]) -> None:
    """Wait for it, as long as it takes."""
    never = threading.Event()
    for _ in range(int(PATIENCE_S / 0.01)):
        if condition():
            return
        never.wait(0.01)
    raise AssertionError("it never came")


def settings_of(**changes: Any) -> Settings:
    return Settings(**{"models": (ModelSettings("none"),), "port": 0, **changes})


@contextlib.contextmanager
def served(app: App, metrics: Metrics | None = None, **changes: Any) -> Iterator[Served]:
    settings = settings_of(**changes)
    metrics = metrics or Metrics()
    stopped: list[bool] = []
    server = serve(app, settings, metrics, on_stop=lambda: stopped.append(True))
    with listening(settings) as sockets:
        thread = threading.Thread(target=server.run, args=(sockets,), daemon=True)
        port = sockets[0].getsockname()[1] if settings.uds is None else 0
        thread.start()
        until(lambda: server.started)
        at = Served(server, port, metrics, thread, stopped)
        try:
            yield at
        finally:
            for client in at.clients:
                client.close()
            server.should_exit = server.force_exit = True
            thread.join(PATIENCE_S)
