"""What stands between the network and the app: who may ask, in what form, and what is seen of it.

Owns the id of a request, the rules for Host, Origin, keys and content types, headers of all answers, the answer to what
the app raises, and the line in the log. It does not own how bytes come in (`connections`), nor what routes there are.

    app = Guard(routes, settings, metrics, keys=Keys.read(path))

The app finds `call_of(scope)`: where it writes what the log shall say, and takes the bytes it holds from.
"""

import asyncio
import base64
import binascii
import ipaddress
import re
import secrets
import time
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final
from urllib.parse import unquote

import msgspec

from m0kit.errors import is_panic
from m0kit.server.bodies import ClientGoneError, Held, Hold, Receive, too_large
from m0kit.server.keys import Keys
from m0kit.server.logs import log
from m0kit.server.metrics import Metrics
from m0kit.server.problems import RequestError
from m0kit.server.settings import Settings

Scope = MutableMapping[str, Any]
Send = Callable[[Any], Awaitable[None]]
App = Callable[[Any, Any, Any], Awaitable[None]]
Headers = list[tuple[bytes, bytes]]

OPEN: Final = ("/live", "/ready", "/health")  # without a key
MAX_HEADERS: Final = 100
MAX_HEAD_BYTES: Final = 32 << 10
_JSON: Final = ("", "application/json", "application/octet-stream")  # what clients call it
_METHODS: Final = frozenset(("GET", "HEAD", "POST", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "CONNECT"))
_QUIET: Final = (*OPEN, "/metrics")  # asked every few seconds
_PIECE: Final = 64 << 10  # of an answer: the next one waits until the client has taken most of those before
_GONE: Final = 499
_ID: Final = re.compile(rb"[A-Za-z0-9_.-]{1,128}")
_TRACE: Final = re.compile(rb"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.*)?")
_HOST: Final = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9_.-]+)(?::([0-9]{1,5}))?")
_ORIGIN: Final = re.compile(r"(https?)://(.+)")
HEADERS: Final = {
    b"x-content-type-options": b"nosniff",
    b"referrer-policy": b"no-referrer",
    b"cache-control": b"no-store",
    b"content-security-policy": b"default-src 'none'; frame-ancestors 'none'",
    b"cross-origin-resource-policy": b"same-origin",
}


@dataclass(frozen=True, slots=True)
class Raw:
    """Routes whose body may be the thing itself. `path`: what theirs begin with; `kinds`: "text/plain", "image/"."""

    method: str
    path: str
    kinds: tuple[str, ...]


DOCUMENTS: Final = (Raw("PUT", "/v1/documents/", ("text/plain", "image/")),)


@dataclass(slots=True)
class Call:
    """A request while it is answered. The app writes `tei` and `counts`."""

    id: str
    hold: Hold
    trace: str | None = None  # of the caller, as 32 hex digits
    traceparent: str | None = None  # to hand on: the same trace, and this request as the parent
    key: str | None = None  # the name of the client's
    tei: bool = False  # errors in the dialect of Text Embeddings Inference
    code: str | None = None  # of the error that it was answered with
    route: str | None = None  # as it is declared; where the app does not say, the router did
    counts: dict[str, int | float] = field(default_factory=dict)  # for the log: documents, images, tokens
    is_counted: bool = False  # by the process that it was passed on to


def call_of(scope: Scope) -> Call:
    """The request's own, where the guard let it in."""
    call: Call = scope["state"]["call"]
    return call


def answer_of(error: RequestError, call: Call) -> tuple[int, dict[str, str], bytes]:
    """Status, headers and body."""
    body = msgspec.json.encode(error.body(call.id, tei=call.tei))
    return error.status, {"Content-Type": "application/json", "Content-Length": str(len(body)), **error.headers}, body


class Guard:
    """An ASGI app around another one, and what it raises becomes an answer."""

    def __init__(
        self,
        app: App,
        settings: Settings,
        metrics: Metrics,
        *,
        keys: Keys | None = None,
        raw: Sequence[Raw] = DOCUMENTS,
    ) -> None:
        """Without `keys`, whoever reaches it may ask."""
        self._app, self._settings, self._metrics, self._keys, self._raw = app, settings, metrics, keys, tuple(raw)
        self._held = Held(settings.max_held_bytes)
        self._names = {"localhost", *map(_normal, (settings.host, *settings.allowed_hosts))}
        self._is_everywhere = settings.uds is None and _is_unspecified(settings.host)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
        elif scope["type"] == "http":
            await self._answer(scope, receive, send)
        else:
            await send({"type": "websocket.close", "code": 1008})  # before it was accepted: 403

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        begun = time.monotonic()
        call = _call(scope["headers"], self._held)
        scope.setdefault("state", {})["call"] = call
        wire = _Wire(scope, receive, send, call)
        gone = False
        try:
            self._check(scope, call)
            await self._app(scope, wire.receive, wire.send)
        except RequestError as error:
            await self._refuse(error, scope, call, wire)
        except ClientGoneError:
            gone = True
            if not call.is_counted:
                self._metrics.cancelled()
        except asyncio.CancelledError:  # the time for shutting down is over
            message = "this server is stopping, and the request was not done in time. Ask another one."
            await self._refuse(RequestError("STOPPING", message, retry_after_s=1), scope, call, wire)
            raise
        except BaseException as error:
            if not (isinstance(error, Exception) or is_panic(error)):
                raise
            log("error", "a request failed", error=error, id=call.id, trace=call.trace)
            message = f"something is wrong with this server; the request may be right. Its log has more of {call.id}."
            await self._refuse(RequestError("INTERNAL_ERROR", message), scope, call, wire)
        finally:
            call.hold.give_back()
            self._note(scope, call, wire, _GONE if gone else wire.status, time.monotonic() - begun)

    async def _refuse(self, error: RequestError, scope: Scope, call: Call, wire: "_Wire") -> None:
        call.code = error.code
        if error.status in (401, 403, 408, 413, 415, 429, 431, 503) and scope["path"] not in OPEN:
            self._metrics.rejected(error.code.lower())
        if wire.status:
            return  # it has begun, and ends without its end: so the client sees that something is missing
        status, headers, body = answer_of(error, call)
        told = [(name.lower().encode("ascii"), value.encode("latin-1")) for name, value in headers.items()]
        is_page = b"text/html" in b",".join(_all(scope["headers"], b"accept"))
        if status == 401 and (is_page or b"script" in _all(scope["headers"], b"sec-fetch-dest")):
            # So a browser asks for one, or takes that of the URL. Chromium reads one challenge of each header.
            told.append((b"www-authenticate", b'Basic realm="m0kit", charset="UTF-8"'))
        await wire.send({"type": "http.response.start", "status": status, "headers": told})
        await wire.send({"type": "http.response.body", "body": body})

    def _note(self, scope: Scope, call: Call, wire: "_Wire", status: int, seconds: float) -> None:
        route = call.route or getattr(scope.get("route"), "path", None) or "other"
        client = scope.get("client")
        if not call.is_counted:
            self._metrics.request(route, status, seconds)
        fields: dict[str, Any] = {
            **call.counts,
            "id": call.id,
            "trace": call.trace,
            "method": scope["method"] if scope["method"] in _METHODS else "other",
            "route": route,
            "status": status,
            "code": call.code,
            "ms": seconds * 1000,
            "bytes_in": wire.bytes_in,
            "bytes_out": wire.bytes_out,
            "key": call.key,
            "client": client[0] if client else None,
            "passed_on": call.is_counted or None,
        }
        log("debug" if route in _QUIET and status < 500 else "info", "request", **fields)

    def _check(self, scope: Scope, call: Call) -> None:
        """Whether the app may see it. Raises RequestError."""
        headers: Headers = scope["headers"]
        _check_head(scope)
        path = _path(scope)
        host = self._check_host(scope, _all(headers, b"host"))
        _check_origin(scope["method"], headers, host)
        if self._keys is not None and path not in OPEN:
            call.key = self._check_key(self._keys, headers)
        self._check_content(scope["method"], path, headers)

    def _check_host(self, scope: Scope, given: list[bytes]) -> tuple[str, str | None]:
        """Its name and port. Another site's name in it is how a page of that site would reach this machine."""
        host = _parse_host(given[0].decode("latin-1")) if len(given) == 1 else None
        if host is None:
            what = "no" if not given else "an unreadable" if len(given) == 1 else "more than one"
            raise RequestError("BAD_HTTP", f"the request has {what} Host header. Send one name or address.")
        name, server = host[0], scope.get("server")
        if name in self._names or (server and name == _normal(str(server[0]))):
            return host
        # A page can make a browser send any name that its own domain resolves, but never a bare address.
        if (address := _address(name)) and (address.is_loopback or self._is_everywhere):
            return host
        raise RequestError(
            "FORBIDDEN_HOST",
            f"the Host header says {name}, which is none of this server's names. Where it is one, start the server "
            f"with --allowed-host {name}.",
        )

    def _check_key(self, keys: Keys, headers: Headers) -> str:
        given = _keys_in(headers)
        names = [keys.name_of(key) for key in given[:4]]
        if (name := next(filter(None, names), None)) is not None:
            return name
        if given:
            raise RequestError("AUTH_INVALID_API_KEY", "that API key is none of this server's.")
        message = "this server wants an API key. Send `Authorization: Bearer KEY` or `X-API-Key: KEY`."
        raise RequestError("AUTH_REQUIRED", message)

    def _check_content(self, method: str, path: str, headers: Headers) -> None:
        for encoding in b",".join(_all(headers, b"content-encoding")).lower().split(b","):
            if encoding.strip() not in (b"", b"identity"):
                message = "a body with a Content-Encoding is not read. Send it as it is."
                raise RequestError("UNSUPPORTED_ENCODING", message)
        if method in ("POST", "PUT", "PATCH"):
            types = _all(headers, b"content-type")
            kind = types[0].partition(b";")[0].strip().lower().decode("latin-1") if types else ""
            routes = [raw for raw in self._raw if method == raw.method and path.startswith(raw.path)]
            kinds = [kind for raw in routes for kind in raw.kinds]
            if len(types) > 1 or not (kind in _JSON or any(_is_of(kind, each) for each in kinds)):
                accepted = ", ".join(["application/json", *(f"{each}*" if each[-1] == "/" else each for each in kinds)])
                message = f"the body's Content-Type is {kind or 'there twice'}; accepted is {accepted}."
                raise RequestError("UNSUPPORTED_TYPE", message)
        length = b"".join(_all(headers, b"content-length")[:1])
        if length.isdigit() and int(length[:20]) > self._settings.max_body_bytes:
            raise too_large(int(length[:20]), self._settings.max_body_bytes)


class _Wire:
    """The two ends of one request: counts bytes, and gives every answer its headers."""

    def __init__(self, scope: Scope, receive: Receive, send: Send, call: Call) -> None:
        self._scope, self._receive, self._send, self._call = scope, receive, send, call
        lengths = [value for name, value in scope["headers"] if name in (b"content-length", b"transfer-encoding")]
        self._is_read = all(value == b"0" for value in lengths)
        self.status = self.bytes_in = self.bytes_out = 0  # 0: no answer yet

    async def receive(self) -> dict[str, Any]:
        message = await self._receive()
        self.bytes_in += len(message.get("body", b""))
        self._is_read = self._is_read or not message.get("more_body", False)
        return message

    async def send(self, message: dict[str, Any]) -> None:
        if message["type"] == "http.response.start":
            headers = message.get("headers", [])
            length = int(next((value for name, value in headers if name.lower() == b"content-length"), b"0"))
            if length > 2 * _PIECE:  # it waits here for a client that may take it slowly, as a body does
                self._call.hold.take(length)
            self.status = message["status"]
            await self._send({**message, "headers": self._complete(headers)})
            return
        body = message.get("body", b"")
        self.bytes_out += len(body)
        while len(body) > 2 * _PIECE:
            piece, body = bytes(body[:_PIECE]), memoryview(body)[_PIECE:]
            await self._send({"type": "http.response.body", "body": piece, "more_body": True})
        await self._send({**message, "body": bytes(body)})

    def _complete(self, given: Headers) -> Headers:
        headers = [
            (name, value)
            for name, value in ((name.lower(), value) for name, value in given)
            if not name.startswith(b"access-control-") and name not in (b"x-request-id", b"server", b"traceparent")
        ]
        names = {name for name, _ in headers}
        headers += [(name, value) for name, value in HEADERS.items() if name not in names]
        headers.append((b"x-request-id", self._call.id.encode("ascii")))
        if self._call.traceparent:
            headers.append((b"traceparent", self._call.traceparent.encode("ascii")))
        if not self._is_read and b"connection" not in names:  # what still comes is no other request
            headers.append((b"connection", b"close"))
        return headers


def _call(headers: Headers, held: Held) -> Call:
    given = _all(headers, b"x-request-id")
    known = len(given) == 1 and _ID.fullmatch(given[0])
    call = Call(given[0].decode("ascii") if known else secrets.token_hex(16), Hold(held))
    parents = _all(headers, b"traceparent")
    found = _TRACE.fullmatch(parents[0]) if len(parents) == 1 else None
    if found and _is_trace(*found.groups()):
        call.trace = found[2].decode("ascii")
        call.traceparent = f"00-{call.trace}-{secrets.token_hex(8)}-{found[4].decode('ascii')}"
    return call


def _is_trace(version: bytes, trace: bytes, parent: bytes, _flags: bytes, more: bytes | None) -> bool:
    """As W3C's Trace Context has it: later versions may have more fields, and ff is none."""
    return bool(trace.strip(b"0") and parent.strip(b"0")) and version != b"ff" and (version != b"00" or not more)


def _all(headers: Headers, name: bytes) -> list[bytes]:
    return [value for given, value in headers if given == name]


def _check_head(scope: Scope) -> None:
    headers: Headers = scope["headers"]
    size = sum(len(name) + len(value) + 4 for name, value in headers) + len(scope.get("query_string", b""))
    size += len(scope.get("raw_path") or b"")
    if len(headers) > MAX_HEADERS or size > MAX_HEAD_BYTES:
        message = f"the head of the request has more than {MAX_HEADERS} headers or {MAX_HEAD_BYTES} bytes."
        raise RequestError("HEADERS_TOO_LARGE", message)
    if _all(headers, b"content-length") and _all(headers, b"transfer-encoding"):
        # Who passed it on may have gone by the other one, and takes what follows for another request.
        raise RequestError("BAD_HTTP", "the request has a Content-Length and a Transfer-Encoding. Send one of them.")


def _path(scope: Scope) -> str:
    """As it was sent, behind the root path: an escaped letter in /live makes it another path, that needs a key."""
    root = scope.get("root_path", "")
    raw = scope.get("raw_path")
    path = (scope["path"] if raw is None else raw.decode("latin-1")).removeprefix(root)
    if not path.startswith("/"):
        raise RequestError("BAD_HTTP", "the request names no path. Send one that begins with /.")
    try:
        unquote(path, errors="strict")
    except UnicodeDecodeError:  # which would be read as another path, and so as another document's id
        raise RequestError(
            "BAD_HTTP", "the path is not UTF-8 where it is escaped. Escape the bytes of UTF-8."
        ) from None
    return str(path)


def _parse_host(text: str) -> tuple[str, str | None] | None:
    found = _HOST.fullmatch(text.strip(" \t"))
    return (_normal(found[1]), found[2]) if found else None


def _normal(name: str) -> str:
    """One writing of a name or address."""
    address = _address(name)
    return str(address) if address else name.lower()


def _address(name: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(name.removeprefix("[").removesuffix("]"))
    except ValueError:
        return None


def _is_unspecified(host: str) -> bool:
    address = _address(host)
    return address is not None and address.is_unspecified


def _check_origin(method: str, headers: Headers, host: tuple[str, str | None]) -> None:
    """A page of another site may not ask through a browser that could reach this server; what is no browser may."""
    wrong = False
    for origin in (given.decode("latin-1") for given in _all(headers, b"origin")):
        found = _ORIGIN.fullmatch(origin.lower())
        theirs = _parse_host(found[2]) if found else None
        usual = {"http": "80", "https": "443"}[found[1]] if found else ""  # ours may be http behind a proxy
        wrong = wrong or theirs is None or (theirs[0], theirs[1] or usual) != (host[0], host[1] or usual)
    for site in _all(headers, b"sec-fetch-site"):
        opens = (
            method in ("GET", "HEAD")
            and _all(headers, b"sec-fetch-mode") == [b"navigate"]
            and _all(headers, b"sec-fetch-dest") == [b"document"]
        )  # somebody follows a link to the page
        wrong = wrong or (site not in (b"same-origin", b"none") and not opens)
    if wrong:
        message = "the request comes from a page of another site, and this server answers its own page alone."
        raise RequestError("FORBIDDEN_ORIGIN", message)


def _keys_in(headers: Headers) -> list[bytes]:
    """What may be a key: all of X-API-Key and Authorization, there with or without Bearer, or a password of Basic."""
    given = [value.strip() for value in _all(headers, b"x-api-key")]
    for value in map(bytes.strip, _all(headers, b"authorization")):
        scheme, _, rest = value.partition(b" ")
        if scheme.lower() == b"bearer":
            given.append(rest.strip())
        elif scheme.lower() == b"basic":
            try:
                given.append(base64.b64decode(rest.strip(), validate=True).partition(b":")[2])
            except binascii.Error:
                given.append(b"")
        else:
            given.append(value)
    return given


def _is_of(kind: str, wanted: str) -> bool:
    """`wanted` with a slash at its end is a whole family."""
    return kind.startswith(wanted) if wanted.endswith("/") else kind == wanted
