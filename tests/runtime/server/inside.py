"""The real app in this process, without a socket: opened on an artifact, asked, and closed. Shared by tests.

with inside(artifact, index=folder) as app:
    status, headers, body = app.ask("POST", "/v1/rerank", b'{"query": "q", "documents": ["d"]}')
"""

import asyncio
import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import unquote

from m0kit.reranker import Reranker
from m0kit.server.app import App, build
from m0kit.server.settings import ModelSettings, Settings

JSON = {"content-type": "application/json"}


class Answer(NamedTuple):
    """Of HTTP; names of headers are lower case."""

    status: int
    headers: dict[str, str]
    body: bytes


@dataclass(frozen=True)
class Inside:
    """An app that has started. It runs in a loop of its own, in the thread that asks, while it is asked."""

    app: App
    loop: asyncio.AbstractEventLoop

    @property
    def reranker(self) -> Reranker:
        """Of its first artifact."""
        return next(iter(self.app.service.lanes.values())).reranker

    def ask(self, method: str, target: str, body: bytes = b"", headers: Mapping[str, str] = JSON) -> Answer:
        """One request, with Host and Content-Length where they are not given. What the app raises comes out."""
        told = {"host": "127.0.0.1", "content-length": str(len(body)), **headers}
        return self.loop.run_until_complete(_asked(self.app, method, target, told, body))


async def _asked(app: App, method: str, target: str, headers: Mapping[str, str], body: bytes) -> Answer:
    path, _, query = target.partition("?")
    scope = {
        "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "scheme": "http", "root_path": "",
        "method": method, "path": unquote(path), "raw_path": path.encode("latin-1"),
        "query_string": query.encode("latin-1"), "server": ("127.0.0.1", 80), "client": ("127.0.0.1", 1),
        "headers": [(name.lower().encode("latin-1"), value.encode("latin-1")) for name, value in headers.items()],
    }  # fmt: skip
    coming = [{"type": "http.request", "body": body, "more_body": False}]
    sent: list[dict[str, Any]] = []

    async def receive() -> dict[str, Any]:
        if not coming:
            await asyncio.Event().wait()  # the client stays
        return coming.pop()

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    await app(scope, receive, send)
    start, *pieces = sent
    assert start["type"] == "http.response.start"
    assert [piece.get("more_body", False) for piece in pieces] == [True] * (len(pieces) - 1) + [False]
    told = {name.decode("latin-1"): value.decode("latin-1") for name, value in start["headers"]}
    return Answer(start["status"], told, b"".join(piece.get("body", b"") for piece in pieces))


@contextlib.contextmanager
def inside(artifact: Path, index: Path | None = None, **changes: Any) -> Iterator[Inside]:
    """Open an artifact as `m0kit serve` does, with what its settings say by default but for `changes`."""
    model = ModelSettings(str(artifact), ("m0",), index=index, threads=1)
    app = build(Settings(**{"models": (model,), **changes}))
    loop = asyncio.new_event_loop()
    to_app: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
    told: asyncio.Queue[dict[str, Any]] = asyncio.Queue()

    async def tell(what: str) -> None:
        to_app.put_nowait({"type": f"lifespan.{what}"})
        assert (await told.get())["type"] == f"lifespan.{what}.complete"

    life = loop.create_task(app({"type": "lifespan"}, to_app.get, told.put))
    loop.run_until_complete(tell("startup"))
    try:
        while (problem := app.service.problem) is not None:
            assert problem.code == "NOT_READY", app.failure
            loop.run_until_complete(asyncio.sleep(0.01))
        yield Inside(app, loop)
    finally:
        loop.run_until_complete(tell("shutdown"))
        loop.run_until_complete(life)
        loop.run_until_complete(loop.shutdown_default_executor())
        loop.close()
