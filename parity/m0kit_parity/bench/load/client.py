"""HTTP/1.1 as a generator of load needs it: requests made beforehand, connections that are kept, answers or their loss.

    async with Client("http://127.0.0.1:8080") as client:
        answer = await client.ask(client.request("POST", "/v1/rerank", body))
        answer.status                                   # 0 where the connection ended before it was whole

There is no limit to the connections: a request never waits for another one's answer. None is sent twice.
"""

import asyncio
import json
import re
from collections import deque
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Final
from urllib.parse import urlsplit

from m0kit.errors import InputError

LOST: Final = 0  # in place of a status: the connection could not be made, or ended before the answer was whole
HUNG: Final = -1  # in place of a status: nothing came in the time that was given
_MAX_HEAD: Final = 64 << 10
_STATUS: Final = re.compile(rb"HTTP/1\.[01] (\d{3}) ")


@dataclass(frozen=True, slots=True)
class Answer:
    """What came back."""

    status: int  # LOST and HUNG among them
    body: bytes = b""
    retry_after: str | None = None

    def json(self) -> Any:
        return json.loads(self.body)


class Client:
    """Of one event loop."""

    def __init__(self, url: str, *, key: str | None = None, patience_s: float = 120.0) -> None:
        """`patience_s`: for one answer. Raises InputError for what is no http URL."""
        try:
            parts = urlsplit(url)
            host, port = parts.hostname, parts.port or 80
        except ValueError:
            host = None
        if host is None or parts.scheme != "http":
            raise InputError(f"{url!r:.100} is no URL of a server. Say http://127.0.0.1:8080.")
        self._host, self._port, self._prefix = host, port, parts.path.rstrip("/")
        self._key, self._patience_s = key, patience_s
        self._idle: deque[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = deque()
        self.num_opened = 0

    async def __aenter__(self) -> "Client":
        return self

    async def __aexit__(self, *_: object) -> None:
        while self._idle:
            await _closed(self._idle.pop()[1])

    def request(self, method: str, path: str, body: bytes = b"", kind: str = "application/json") -> bytes:
        """All bytes of one."""
        lines = [f"{method} {self._prefix}{path} HTTP/1.1", f"Host: {self._host}:{self._port}"]
        if body:
            lines += [f"Content-Type: {kind}", f"Content-Length: {len(body)}"]
        if self._key is not None:
            lines.append(f"Authorization: Bearer {self._key}")
        return "\r\n".join([*lines, "", ""]).encode() + body

    async def ask(self, request: bytes) -> Answer:
        """The answer to it, whatever became of that."""
        writer = None
        try:
            async with asyncio.timeout(self._patience_s):
                reader, writer = await self._connection()
                writer.write(request)
                answer, is_kept = await _read(reader)
        except TimeoutError:
            answer, is_kept = Answer(HUNG), False
        except (OSError, EOFError, ValueError, asyncio.LimitOverrunError):
            answer, is_kept = Answer(LOST), False
        except asyncio.CancelledError:  # the client hangs up
            if writer is not None:
                writer.transport.abort()
            raise
        if writer is not None:
            if is_kept:
                self._idle.append((reader, writer))
            else:
                await _closed(writer)
        return answer

    async def _connection(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        while self._idle:
            reader, writer = self._idle.pop()
            if not reader.at_eof() and not writer.is_closing():
                return reader, writer
            await _closed(writer)
        self.num_opened += 1
        return await asyncio.open_connection(self._host, self._port, limit=_MAX_HEAD)


async def _read(reader: asyncio.StreamReader) -> tuple[Answer, bool]:
    """An answer, and whether the connection may be used again. Raises EOFError, OSError, ValueError."""
    head = await reader.readuntil(b"\r\n\r\n")
    found = _STATUS.match(head)
    length = _header(head, b"content-length")
    if found is None or length is None or not length.isdigit():
        raise ValueError("no answer whose end can be seen")
    body = await reader.readexactly(int(length))
    retry = _header(head, b"retry-after")
    is_kept = (_header(head, b"connection") or b"").lower() != b"close"
    return Answer(int(found[1]), body, retry.decode("latin-1") if retry is not None else None), is_kept


def _header(head: bytes, name: bytes) -> bytes | None:
    found = re.search(rb"\r\n" + name + rb":[ \t]*([^\r]*?)[ \t]*\r\n", head, re.IGNORECASE)
    return found[1] if found else None


async def _closed(writer: asyncio.StreamWriter) -> None:
    writer.close()
    with suppress(OSError):
        await writer.wait_closed()
