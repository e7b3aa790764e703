"""Bodies of requests while they come in. Owns limits of bytes and time, and how many bytes are held by all at once.

held = Held(512 << 20)
hold = Hold(held)
body = await read_body(receive, 64 << 20, 20.0, hold)
hold.give_back()
"""

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any, Final

from m0kit.server.problems import RequestError

Receive = Callable[[], Awaitable[dict[str, Any]]]
# As slow as a body may come, after as long as any piece of it may take: 64 MiB in a little more than an hour.
MIN_BYTES_PER_S: Final = 16 << 10
_RETRY_S: Final = 2.0  # until some of the bodies that are held are answered


class ClientGoneError(Exception):
    """The client has hung up, so there is nobody to answer. 499 in logs and metrics, as nginx counts it."""


class Held:
    """Bytes of bodies that are read or worked on, of all requests together. Of one thread: the event loop's."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes, self.num_bytes = max_bytes, 0


class Hold:
    """One request's part of them."""

    def __init__(self, held: Held) -> None:
        self._held, self.num_bytes = held, 0

    def take(self, num_bytes: int) -> None:
        """Raises RequestError (OVERLOADED) where it would be more than all together may hold."""
        if self._held.num_bytes + num_bytes > self._held.max_bytes:
            message = "this server holds as many bytes of requests as it may. Try again in a moment."
            raise RequestError("OVERLOADED", message, retry_after_s=_RETRY_S)
        self._held.num_bytes += num_bytes
        self.num_bytes += num_bytes

    def give_back(self) -> None:
        """All that was taken; once more does nothing."""
        self._held.num_bytes -= self.num_bytes
        self.num_bytes = 0


def too_large(num_bytes: int | None, max_bytes: int) -> RequestError:
    """A body over the limit; None where it is still coming in."""
    size = "more bytes" if num_bytes is None else f"{num_bytes} bytes, more"
    return RequestError(
        "BODY_TOO_LARGE",
        f"the body has {size} than the {max_bytes} that are read of one. Send fewer documents at a time, or smaller "
        "images; documents that are in the index can be named by their id.",
    )


async def read_body(receive: Receive, max_bytes: int, timeout_s: float, hold: Hold) -> bytes:
    """A whole body. Each piece may take `timeout_s`; after that long, it also has to have come at MIN_BYTES_PER_S.

    Raises RequestError (BODY_TOO_LARGE, TOO_SLOW, OVERLOADED), ClientGoneError. What was taken of `hold` stays taken.
    """
    body = bytearray()  # and no list: pieces of one byte would be forty each
    begun = time.monotonic()
    while True:
        try:
            async with asyncio.timeout(timeout_s):
                message = await receive()
        except TimeoutError:
            raise RequestError("TOO_SLOW", f"nothing more of the body came for {timeout_s:g} seconds.") from None
        if message["type"] == "http.disconnect":
            raise ClientGoneError
        piece = message.get("body", b"")
        if len(body) + len(piece) > max_bytes:
            raise too_large(None, max_bytes)
        hold.take(len(piece))
        body += piece
        if not message.get("more_body", False):
            return bytes(body)
        if time.monotonic() - begun > timeout_s + len(body) / MIN_BYTES_PER_S:
            raise RequestError("TOO_SLOW", f"the body came at less than {MIN_BYTES_PER_S} bytes a second.")
