"""One hop to the process that writes: what is passed on, and what is said where that ends badly."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("h11")

from m0kit.server.bodies import ClientGoneError, Held, Hold
from m0kit.server.forward import Forward
from m0kit.server.guard import Call
from m0kit.server.problems import RequestError

Handle = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]
OK = b"HTTP/1.1 200 OK\r\ncontent-length: 4\r\nkeep-alive: 1\r\nx-own: yes\r\nx-request-id: the-writer-s\r\n\r\ndone"


class Client:
    """What a request is to an app: pieces of a body, then silence or the end; and what it is answered."""

    def __init__(self, *pieces: bytes, hangs_up: bool = False, **scope: Any) -> None:
        self.call = Call("the-id", Hold(Held(1)))
        self.scope: dict[str, Any] = {
            "type": "http", "method": "PUT", "path": "/v1/documents/a b", "raw_path": b"/v1/documents/a%20b",
            "query_string": b"model=m", "headers": [(b"host", b"here"), (b"connection", b"keep-alive")],
            "state": {"call": self.call}, **scope,
        }  # fmt: skip
        self.answer: list[dict[str, Any]] = []
        last = len(pieces) - 1
        self._messages = [{"type": "http.request", "body": p, "more_body": i < last} for i, p in enumerate(pieces)]
        if hangs_up:
            self._messages.append({"type": "http.disconnect"})

    async def receive(self) -> dict[str, Any]:
        if self._messages:
            return self._messages.pop(0)
        await asyncio.Event().wait()
        raise AssertionError

    async def send(self, message: Any) -> None:
        self.answer.append(message)

    @property
    def body(self) -> bytes:
        return b"".join(message.get("body", b"") for message in self.answer)


@contextlib.asynccontextmanager
async def writer(place: Path, handle: Handle) -> AsyncIterator[None]:
    async def handled(reader: asyncio.StreamReader, answer: asyncio.StreamWriter) -> None:
        try:
            await handle(reader, answer)
        finally:
            answer.close()

    async with await asyncio.start_unix_server(handled, place):
        yield


def passed(place: Path, client: Client, handle: Handle, timeout_s: float = 60) -> None:
    """Pass it on to a writer that does this."""

    async def go() -> None:
        async with writer(place, handle):
            await Forward(place, timeout_s)(client.scope, client.receive, client.send)

    asyncio.run(go())


def test_a_request_goes_as_it_came_but_for_what_is_of_one_connection(tmp_path: Path) -> None:
    seen = b""

    async def handle(reader: asyncio.StreamReader, answer: asyncio.StreamWriter) -> None:
        nonlocal seen
        seen = await reader.readuntil(b"0\r\n\r\n")
        answer.write(OK)
        await answer.drain()

    headers = [(b"host", b"here"), (b"x-api-key", b"k"), (b"connection", b"x"), (b"te", b"y"), (b"x-request-id", b"z")]
    client = Client(b"one", b"", b"two", headers=headers, root_path="/m0", raw_path=b"/m0/v1/documents/a%20b")
    passed(tmp_path / "s", client, handle)
    head, _, body = seen.partition(b"\r\n\r\n")
    assert head.split(b"\r\n") == [
        b"PUT /v1/documents/a%20b?model=m HTTP/1.1", b"host: here", b"x-api-key: k", b"x-request-id: the-id",
        b"transfer-encoding: chunked", b"connection: close",
    ]  # fmt: skip
    assert body == b"3\r\none\r\n3\r\ntwo\r\n0\r\n\r\n"
    start = client.answer[0]
    assert (start["status"], client.body, client.answer[-1]["more_body"]) == (200, b"done", False)
    assert [name for name, _ in start["headers"]] == [b"content-length", b"x-own", b"x-request-id"]
    assert client.call.is_counted


def test_an_answer_may_come_before_the_body_was_taken(tmp_path: Path) -> None:
    """A body that is too large is refused by its head; the writer then forgets what still comes."""

    async def handle(reader: asyncio.StreamReader, answer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        answer.write(OK)
        answer.write_eof()
        await reader.read()

    client = Client(*[b"x" * 65536] * 200)
    passed(tmp_path / "s", client, handle)
    assert client.body == b"done"


def refused(place: Path, client: Client, handle: Handle, timeout_s: float = 60) -> RequestError:
    with pytest.raises(RequestError) as error:
        passed(place, client, handle, timeout_s)
    assert not client.call.is_counted  # so that somebody counts it
    return error.value


def test_where_nobody_listens_the_client_is_told_when_to_come_again(tmp_path: Path) -> None:
    client = Client(b"")
    with pytest.raises(RequestError) as error:
        asyncio.run(Forward(tmp_path / "s", 60)(client.scope, client.receive, client.send))
    assert (error.value.code, error.value.retry_after_s) == ("NOT_READY", 5)
    assert not client.call.is_counted


@pytest.mark.parametrize("said", [b"", OK[:30], OK[:-2]])
def test_where_the_writer_ends_the_client_is_told_so(said: bytes, tmp_path: Path) -> None:
    async def handle(reader: asyncio.StreamReader, answer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        answer.write(said)
        await answer.drain()

    client = Client(b"a body")
    assert refused(tmp_path / "s", client, handle).code == "INDEX_FAILED"
    assert not any(message.get("more_body") is False for message in client.answer)


def test_what_takes_too_long_is_told_so(tmp_path: Path) -> None:
    async def handle(reader: asyncio.StreamReader, answer: asyncio.StreamWriter) -> None:
        await reader.read()

    assert refused(tmp_path / "s", Client(b"a body"), handle, timeout_s=0.05).code == "DEADLINE_EXCEEDED"


def test_a_client_that_hangs_up_takes_its_request_at_the_writer_with_it(tmp_path: Path) -> None:
    ended = asyncio.Event()

    async def handle(reader: asyncio.StreamReader, answer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        await reader.read()
        ended.set()

    async def go() -> None:
        client = Client(b"", hangs_up=True)
        async with writer(tmp_path / "s", handle):
            with pytest.raises(ClientGoneError):
                await Forward(tmp_path / "s", 60)(client.scope, client.receive, client.send)
            await ended.wait()
        assert client.answer == []
        assert client.call.is_counted

    asyncio.run(go())
