"""Images by URL, from hosts that the operator allows. Owns that nothing else is reached, and how much may come.

    fetcher = Fetcher(settings.image_hosts, settings.max_image_bytes)
    data = await fetcher.fetch("https://images.example.org/page.png", "documents[3].image")

A request that names a URL has this server ask for it, from where this server stands: so a URL is a question to
`m0kit.server.image_hosts` first. A URL is read in one place and one way, and only as far as all programs read it alike;
its host is looked up once, the addresses are held against the rules, one of them is connected to, and the socket is
asked whom it reached before a byte is sent. There are no cookies, keys, proxies, compression or pools to carry
something from one request to another.
"""

import asyncio
import contextlib
import re
import socket
import ssl
import string
from collections.abc import AsyncIterator, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property, partial
from typing import Any, Final, NamedTuple
from urllib.parse import quote, urljoin

import h11

from m0kit.reading.formats import FORMATS, image_format
from m0kit.server.image_hosts import ImageHosts, normal
from m0kit.server.logs import log
from m0kit.server.problems import Code, RequestError

TIMEOUT_S: Final = 10.0  # for one image, redirects with it
MAX_REDIRECTS: Final = 3
MAX_FETCHES: Final = 16  # at a time, of all requests
MAX_HEAD_BYTES: Final = 16 << 10  # of an answer
_CONNECT_S: Final = 3.0  # for one address of several
_MOST_ADDRESSES: Final = 4
_MOST_NAMES: Final = 4  # looked up at a time; the system gives up on one after some seconds
_MAX_PIECES: Final = 1 << 16  # of a body: chunks of a byte would be work for minutes
_MAX_NOTES: Final = 8  # answers like 103 before the answer
_PIECE: Final = 64 << 10
_HEAD: Final = 4096  # bytes that tell an image's format
_PORTS: Final = {"http": 80, "https": 443}
# No more of RFC 3986 than what all programs read alike: names and addresses of ASCII, no user, no backslash.
_URL: Final = re.compile(
    r"([Hh][Tt][Tt][Pp][Ss]?)://(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9.-]+)(?::([1-9][0-9]{0,4}))?([/?][^#]*)?(?:#.*)?",
    re.DOTALL,
)
_CONTROL: Final = re.compile(r"[\x00-\x1f\x7f\\]")
_HEADERS: Final = (
    ("User-Agent", "m0kit"), ("Accept", "image/*"), ("Accept-Encoding", "identity"), ("Connection", "close"),
)  # fmt: skip


class Url(NamedTuple):
    """What is asked for, and of whom."""

    scheme: str
    host: str  # as `image_hosts.normal` writes it
    port: int
    target: str  # path and query, with nothing but ASCII

    @property
    def authority(self) -> str:
        """Host and port, as a URL and the Host header have them."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == _PORTS[self.scheme] else f"{host}:{self.port}"

    @property
    def text(self) -> str:
        """The whole, without a fragment."""
        return f"{self.scheme}://{self.authority}{self.target}"


class _NotFetchedError(Exception):
    """Why not, in the words of a RequestError, whose place the caller knows."""

    def __init__(self, message: str, code: Code = "FETCH_FAILED") -> None:
        super().__init__(message)
        self.message, self.code = message, code


class Fetcher:
    """Fetches for all requests of a process, on its event loop."""

    def __init__(
        self, image_hosts: Iterable[str], max_bytes: int, *, timeout_s: float = TIMEOUT_S, cafile: str | None = None
    ) -> None:
        """`max_bytes` of an image; `cafile`: certificates to trust in place of the system's. Raises ValueError."""
        self._hosts, self._max_bytes, self._timeout_s = ImageHosts(image_hosts), max_bytes, timeout_s
        self._cafile = cafile
        self._places = asyncio.Semaphore(MAX_FETCHES)
        self._names = ThreadPoolExecutor(_MOST_NAMES, "m0kit-names")

    def close(self) -> None:
        """End its threads, without waiting for what the system is still looking up."""
        self._names.shutdown(wait=False, cancel_futures=True)

    async def fetch(self, url: str, where: str) -> bytes:
        """The file of an image. `where`: its place in the request, for the RequestError that this raises."""
        try:
            async with self._places:
                end = asyncio.get_running_loop().time() + self._timeout_s
                try:
                    async with asyncio.timeout_at(end):
                        return await self._followed(_parse(url))
                except TimeoutError:
                    what = f"could not be fetched within {self._timeout_s:g} seconds. Send the image itself."
                    raise _NotFetchedError(what) from None
        except _NotFetchedError as error:
            raise RequestError(error.code, error.message, where=where) from None

    async def _followed(self, url: Url) -> bytes:
        for _ in range(MAX_REDIRECTS + 1):
            found = await self._asked(url)
            if isinstance(found, bytes):
                return found
            there = _parse(urljoin(url.text, found), "redirects to a URL that")
            if (url.scheme, there.scheme) == ("https", "http"):
                raise _NotFetchedError("redirects from https to http, which is not followed.")
            url = there
        raise _NotFetchedError(f"redirects more than {MAX_REDIRECTS} times. Give the URL that it leads to.")

    async def _asked(self, url: Url) -> bytes | str:
        """The image, or where it is instead."""
        if not self._hosts.knows(url.host, url.port):
            raise _NotFetchedError(
                f"is at {url.authority:.300}, where this server fetches nothing. Send the image itself; who runs the "
                "server allows hosts with --image-host.",
                "INVALID_INPUT",
            )
        async with self._connected(url) as (reader, writer):
            try:
                return await _exchange(url, reader, writer, self._max_bytes)
            except (OSError, h11.RemoteProtocolError):
                raise _NotFetchedError(f"got no whole answer from {url.host:.300}. Send the image itself.") from None

    @contextlib.asynccontextmanager
    async def _connected(self, url: Url) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
        sock = await self._reached(url)
        try:
            secured: dict[str, Any] = {}
            if url.scheme == "https":
                secured = {"ssl": self._tls, "server_hostname": url.host}
            reader, writer = await asyncio.open_connection(sock=sock, **secured)
        except ssl.SSLCertVerificationError:
            sock.close()
            raise _NotFetchedError(f"is at {url.host:.300}, whose certificate is not trusted here.") from None
        except OSError:
            sock.close()
            raise _NotFetchedError(f"is at {url.host:.300}, with which no TLS connection could be made.") from None
        except BaseException:
            sock.close()
            raise
        try:
            yield reader, writer
        finally:
            writer.transport.abort()  # nothing more is wanted, and nothing of it waited for

    async def _reached(self, url: Url) -> socket.socket:
        """A socket that is connected to an address the host may have; nothing was sent yet."""
        loop = asyncio.get_running_loop()
        look_up = partial(socket.getaddrinfo, url.host, url.port, type=socket.SOCK_STREAM)
        try:
            found = await loop.run_in_executor(self._names, look_up)
        except (OSError, UnicodeError):
            raise _NotFetchedError(f"is at {url.host:.300}, whose address is not known here.") from None
        there = list(dict.fromkeys((family, address) for family, _, _, _, address in found))
        allowed = [(family, address) for family, address in there if self._may_reach(url, str(address[0]))]
        if not allowed:
            raise _refused(url, [str(address[0]) for _, address in there])
        for family, address in allowed[:_MOST_ADDRESSES]:
            sock = socket.socket(family, socket.SOCK_STREAM)
            try:
                sock.setblocking(False)
                async with asyncio.timeout(_CONNECT_S):
                    await loop.sock_connect(sock, address)
                reached = str(sock.getpeername()[0])
            except OSError:  # TimeoutError is one
                sock.close()
                continue
            except BaseException:
                sock.close()
                raise
            if not self._may_reach(url, reached):  # whatever the system made of the address
                sock.close()
                raise _refused(url, [reached])
            return sock
        raise _NotFetchedError(f"is at {url.host:.300}, which does not answer. Send the image itself.")

    def _may_reach(self, url: Url, address: str) -> bool:
        return self._hosts.allows(url.host, url.port, address)

    @cached_property
    def _tls(self) -> ssl.SSLContext:
        return ssl.create_default_context(cafile=self._cafile)


def _parse(text: str, what: str = "is a URL that") -> Url:
    found = None if _CONTROL.search(text) else _URL.fullmatch(text)
    port = int(found[3]) if found and found[3] else 0
    if found is None or port > 65535:
        raise _NotFetchedError(
            f"{what} is not read here: expected http:// or https://, the name of a host in letters of ASCII, with a "
            "port or without, and a path; no user or password, no backslash.",
            "INVALID_INPUT",
        )
    scheme, target = found[1].lower(), found[4] or "/"
    target = quote(target if target.startswith("/") else f"/{target}", safe=string.punctuation)
    return Url(scheme, normal(found[2]), port or _PORTS[scheme], target)


def _refused(url: Url, addresses: Iterable[str]) -> _NotFetchedError:
    """Operators see the address, who asks does not."""
    log("warning", "an image host has an address that it may not have", host=url.host, address=" ".join(addresses))
    return _NotFetchedError(
        f"is at {url.host:.300}, which is at no address that it may have. Send the image itself; who runs the server "
        "finds more in its log.",
        "INVALID_INPUT",
    )


async def _exchange(
    url: Url, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, max_bytes: int
) -> bytes | str:
    """Ask, and read the answer: an image's file, or a redirect's location."""
    connection = h11.Connection(h11.CLIENT, max_incomplete_event_size=MAX_HEAD_BYTES)
    head = h11.Request(method="GET", target=url.target, headers=[("Host", url.authority), *_HEADERS])
    writer.write((connection.send(head) or b"") + (connection.send(h11.EndOfMessage()) or b""))
    num_notes = num_pieces = 0
    body = bytearray()
    while True:
        event = connection.next_event()
        if event is h11.NEED_DATA:
            connection.receive_data(await reader.read(_PIECE))
        elif isinstance(event, h11.InformationalResponse):
            num_notes += 1
            if num_notes > _MAX_NOTES:
                raise h11.RemoteProtocolError("too many answers before the answer")
        elif isinstance(event, h11.Response):
            location = _look(event, max_bytes)
            if location is not None:
                return location
        elif isinstance(event, h11.Data):
            num_pieces += 1
            if len(body) + len(event.data) > max_bytes:
                raise _too_large(None, max_bytes)
            body += event.data
            if num_pieces == _MAX_PIECES:
                raise _NotFetchedError("comes in pieces that are too small to be taken.")
            if len(body) - len(event.data) < _HEAD:
                _check_format(body, is_whole=False)
        elif isinstance(event, h11.EndOfMessage):
            _check_format(body, is_whole=True)
            return bytes(body)
        else:
            raise h11.RemoteProtocolError("closed before the answer's end")


def _look(answer: h11.Response, max_bytes: int) -> str | None:
    """Whether its body is to be read; else where the image is instead."""
    if answer.status_code in (301, 302, 303, 307, 308):
        try:
            (location,) = _values(answer, b"location")
            return location.decode("utf-8")
        except ValueError:  # none, several, or no text
            raise _NotFetchedError("redirects, but does not say where to.") from None
    if answer.status_code != 200:
        raise _NotFetchedError(f"was answered with status {answer.status_code} by its server.")
    if b",".join(_values(answer, b"content-encoding")).strip().lower() not in (b"", b"identity"):
        raise _NotFetchedError("is sent compressed, though that was not asked for, and is not read.")
    for length in _values(answer, b"content-length"):
        if length.isdigit() and int(length[:20]) > max_bytes:
            raise _too_large(int(length[:20]), max_bytes)
    return None


def _values(answer: h11.Response, name: bytes) -> list[bytes]:
    return [value for key, value in answer.headers if key == name]


def _too_large(num_bytes: int | None, max_bytes: int) -> _NotFetchedError:
    size = f"more than {max_bytes}" if num_bytes is None else f"{num_bytes}"
    return _NotFetchedError(f"has {size} bytes, and {max_bytes} are the most. Shrink the image.", "TOO_MUCH")


def _check_format(body: bytearray, *, is_whole: bool) -> None:
    """An end to what is no image, as soon as that can be told."""
    if (is_whole or len(body) >= _HEAD) and image_format(bytes(body[:_HEAD])) is None:
        formats = ", ".join(FORMATS)
        raise _NotFetchedError(
            f"leads to something that is no image in a format that is read: {formats}.", "INVALID_INPUT"
        )
