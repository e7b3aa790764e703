"""Requests that write to the index, passed on to the one worker that does. Owns one hop over a Unix socket.

    forward = Forward(Path("/tmp/m0kit-x/writer"), timeout_s=300)
    await forward(scope, receive, send)    # an ASGI app: what the writer answers, as it answers it

The request goes as it came, keys and all, since the writer is the same server and asks for the same. Nothing is held:
body and answer pass in pieces. A client that hangs up takes its request at the writer with it.
"""

import asyncio
from collections.abc import Awaitable, Callable, MutableMapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

import h11

from m0kit.server.bodies import ClientGoneError
from m0kit.server.guard import call_of
from m0kit.server.problems import RequestError

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

_CONNECT_S: Final = 5.0
_AGAIN_S: Final = 5.0  # when to come again: a worker takes some seconds to start
_PIECE: Final = 1 << 16
# Of one connection, not of what is passed on (RFC 9110, 7.6.1); and what was settled with this client.
_OWN_HEADERS: Final = frozenset(
    (b"connection", b"keep-alive", b"proxy-connection", b"te", b"trailer", b"transfer-encoding", b"upgrade", b"expect")
)
_TOLD: Final = frozenset((b"x-request-id", b"traceparent"))  # by the guard, whatever came


class Forward:
    """Passes HTTP requests on to a socket. An ASGI app for routes."""

    def __init__(self, socket: Path, timeout_s: float) -> None:
        """`timeout_s`: for all of one request; the writer's own limit should come first."""
        self._socket, self._timeout_s = socket, timeout_s

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Raises RequestError: NOT_READY where nobody listens, INDEX_FAILED where the writer ends in the middle.

        Raises ClientGoneError.
        """
        call = call_of(scope)
        try:
            async with asyncio.timeout(_CONNECT_S):
                reader, writer = await asyncio.open_unix_connection(self._socket)
        except (OSError, TimeoutError):
            raise RequestError(
                "NOT_READY",
                "the process that writes to the index is being started. Try again in some seconds.",
                retry_after_s=_AGAIN_S,
            ) from None
        call.is_counted = True  # once it was taken
        try:
            async with asyncio.timeout(self._timeout_s):
                await _pass(scope, receive, send, reader, writer)
        except TimeoutError:
            call.is_counted = False
            raise RequestError(
                "DEADLINE_EXCEEDED", f"the index took more than {self._timeout_s:g} s. Ask for less at a time."
            ) from None
        except (OSError, h11.RemoteProtocolError):
            call.is_counted = False
            raise RequestError(
                "INDEX_FAILED",
                "the process that writes to the index ended before it answered. Send the request again: what was "
                "written is known then.",
                retry_after_s=_AGAIN_S,
            ) from None
        finally:
            writer.close()
            with suppress(OSError):
                await writer.wait_closed()


async def _pass(
    scope: Message, receive: Receive, send: Send, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
) -> None:
    """Both ways at once: an answer may come before all of the body is sent. Raises ClientGoneError."""
    connection = h11.Connection(h11.CLIENT)
    sending = asyncio.create_task(_send(connection, scope, receive, writer))
    answering = asyncio.create_task(_answer(connection, reader, send))
    try:
        await asyncio.wait((sending, answering), return_when=asyncio.FIRST_COMPLETED)
        if not answering.done() and sending.result():
            raise ClientGoneError
        await answering
    finally:
        for task in (sending, answering):
            task.cancel()
        await asyncio.gather(sending, answering, return_exceptions=True)


async def _send(connection: h11.Connection, scope: Message, receive: Receive, writer: asyncio.StreamWriter) -> bool:
    """The request's head and body. Ends when the client has gone, True, or when the writer takes no more, False."""
    call = call_of(scope)
    headers = [(name, value) for name, value in scope["headers"] if name not in _OWN_HEADERS and name not in _TOLD]
    headers.append((b"x-request-id", call.id.encode()))  # one for both
    if call.traceparent:
        headers.append((b"traceparent", call.traceparent.encode()))
    if not any(name == b"content-length" for name, _ in headers):
        headers.append((b"transfer-encoding", b"chunked"))
    target = scope.get("raw_path") or scope["path"].encode()
    target = target.removeprefix(scope.get("root_path", "").encode())  # to which the writer adds its own
    target += b"?" + scope["query_string"] if scope["query_string"] else b""
    head = h11.Request(method=scope["method"], target=target, headers=[*headers, (b"connection", b"close")])
    try:
        writer.write(connection.send(head) or b"")
        more = True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                return True
            more = message.get("more_body", False)
            writer.write(connection.send(h11.Data(data=message.get("body", b""))) or b"")
            if not more:
                writer.write(connection.send(h11.EndOfMessage()) or b"")
            await writer.drain()
    except OSError:
        return False
    while (await receive())["type"] != "http.disconnect":
        pass
    return True


async def _answer(connection: h11.Connection, reader: asyncio.StreamReader, send: Send) -> None:
    """The writer's answer to the client. Raises h11.RemoteProtocolError where it breaks off."""
    while True:
        event = connection.next_event()
        match event:
            case h11.NEED_DATA:
                connection.receive_data(await reader.read(_PIECE))
            case h11.Response():
                headers = [(name, value) for name, value in event.headers if name not in _OWN_HEADERS]
                await send({"type": "http.response.start", "status": event.status_code, "headers": headers})
            case h11.Data():
                await send({"type": "http.response.body", "body": bytes(event.data), "more_body": True})
            case h11.EndOfMessage():
                await send({"type": "http.response.body", "body": b"", "more_body": False})
                return
            case h11.ConnectionClosed():
                raise h11.RemoteProtocolError("closed before an answer")
