"""Connections: how many, how long they may take, how they end. Owns the sockets, and uvicorn's protocol with timers.

    server = serve(app, settings, metrics)
    with listening(settings) as sockets:
        server.run(sockets)

What a client can do with bytes is bounded here and in `bodies`: a head that does not come, a body that is sent though
nobody reads it, an answer that is not taken, connections without end. No protocol but HTTP/1 is spoken: an Upgrade is
passed over, as HTTP has it.
"""

import asyncio
import contextlib
import secrets
import socket
import sys
from collections.abc import Callable, Iterator
from http import HTTPStatus
from typing import Any, Final

import msgspec

from m0kit.errors import DependencyError
from m0kit.server.guard import HEADERS, MAX_HEAD_BYTES, MAX_HEADERS, App
from m0kit.server.listening import BACKLOG
from m0kit.server.logs import log
from m0kit.server.metrics import Metrics
from m0kit.server.problems import RequestError
from m0kit.server.settings import Settings

try:
    import h11
    import uvicorn
    from uvicorn.config import STARTUP_FAILURE
    from uvicorn.protocols.http.h11_impl import H11Protocol
    from uvicorn.server import ServerState
except ImportError:
    raise DependencyError("a server needs uvicorn. pip install 'm0kit[serve]'.") from None

MIN_TAKEN_PER_S: Final = 4 << 10  # bytes of an answer that a client has to take, once what the system buffers is full
_REFUSED_S: Final = 2.0  # for one connection too many to read why
_CLOSE: Final = (b"connection", b"close")
_LAST_S: Final = 2.0  # for the answers to requests that shutting down broke off
_LOOK_EVERY_S: Final = 0.02


def serve(app: App, settings: Settings, metrics: Metrics, *, on_stop: Callable[[], object] = lambda: None) -> "Server":
    """A server that is not running yet: `run(sockets)`, or `await serve(sockets)` in a loop of one's own.

    It stops when `should_exit` is set, which is for its caller to do when signals come: `on_stop` is called, no
    connection is taken any more, and requests that run have `shutdown_timeout_s`; those that are left are cancelled,
    and may still answer.
    """
    config = uvicorn.Config(
        app,
        loop="asyncio",
        http="h11",
        ws="none",
        interface="asgi3",
        log_config=None,
        access_log=False,
        proxy_headers=False,  # nobody's word for who the client is
        server_header=False,
        root_path=settings.root_path,
        h11_max_incomplete_event_size=MAX_HEAD_BYTES,
        ssl_certfile=settings.tls_cert,
        ssl_keyfile=settings.tls_key,
    )
    return Server(config, settings, metrics, on_stop)


class Server(uvicorn.Server):
    """uvicorn's, with connections of our own and an end that waits no longer than it may."""

    def __init__(
        self, config: uvicorn.Config, settings: Settings, metrics: Metrics, on_stop: Callable[[], object]
    ) -> None:
        super().__init__(config)
        self._settings, self._metrics, self._on_stop = settings, metrics, on_stop
        self.broke_off = False  # requests at the end

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start the app, then take connections. A Unix socket is without TLS: nothing reads along there."""
        await self.lifespan.startup()
        if self.lifespan.should_exit:
            sys.exit(STARTUP_FAILURE)
        loop = asyncio.get_running_loop()
        self.servers: list[asyncio.Server] = []
        for sock in sockets or []:
            tls: dict[str, Any] = {}
            if self.config.ssl and sock.family in (socket.AF_INET, socket.AF_INET6):
                tls = {"ssl": self.config.ssl, "ssl_handshake_timeout": self._settings.read_timeout_s}
            self.servers.append(await loop.create_server(self._connection, sock=sock, backlog=BACKLOG, **tls))
        self.started = True

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """None: uvicorn would keep them to itself until all is over."""
        yield

    def _connection(self) -> "Connection":
        return Connection(self.config, self.server_state, self.lifespan.state, self._settings, self._metrics)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """As `serve` says."""
        self._on_stop()
        for server in self.servers:
            server.close()
        for sock in sockets or []:
            sock.close()
        for connection in self._open:
            connection.shutdown()
        await self._settle(self._settings.shutdown_timeout_s)
        if tasks := list(self.server_state.tasks):
            self.broke_off = True
            log("warning", "requests are broken off, since the time for shutting down is over", requests=len(tasks))
            for task in tasks:
                task.cancel()
            await self._settle(_LAST_S)
        for connection in self._open:
            connection.abort()
        await asyncio.sleep(0)  # they hear that they were lost
        if not self.force_exit:
            await self.lifespan.shutdown()

    @property
    def _open(self) -> "list[Connection]":
        return [each for each in self.server_state.connections if isinstance(each, Connection)]

    async def _settle(self, timeout_s: float) -> None:
        """Until nothing runs and all answers are with the system."""
        loop = asyncio.get_running_loop()
        end = loop.time() + timeout_s
        while not self.force_exit and loop.time() < end:
            if not self.server_state.tasks and not any(each.is_sending for each in self._open):
                return
            await asyncio.sleep(_LOOK_EVERY_S)


class Connection(H11Protocol):
    """One connection. A head may take `read_timeout_s`, from its first byte or from the beginning."""

    def __init__(
        self,
        config: uvicorn.Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        settings: Settings,
        metrics: Metrics,
    ) -> None:
        super().__init__(config, server_state, app_state)
        self._settings, self._metrics = settings, metrics
        self.timeout_keep_alive = settings.keep_alive_s  # type: ignore[assignment]  # that may be a fraction
        self._head_timer: asyncio.TimerHandle | None = None
        self._line: _Line | None = None

    # What asyncio tells

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self._line = _Line(transport, self.loop, self._settings.read_timeout_s, self._is_all_read)
        super().connection_made(self._line)
        if len(self.connections) <= self._settings.max_connections or self._make_room():
            self._watch_head()
            return
        self._metrics.rejected("too_many_connections")
        if len(self.connections) > 2 * self._settings.max_connections:
            self._line.abort()
            return
        message = f"this server has {self._settings.max_connections} connections, and takes no more. Try again soon."
        self._refuse(RequestError("TOO_MANY_CONNECTIONS", message, retry_after_s=1), _REFUSED_S)

    def data_received(self, data: bytes) -> None:
        if not self.transport.is_closing():  # else it is thrown away
            super().data_received(data)
            self._watch_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_head_timer()
        if self._line is not None:
            self._line.lost()
        super().connection_lost(exc)
        self._unset_keepalive_if_required()

    # What uvicorn asks

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.cycle.response_complete and self.conn.their_state is h11.SEND_BODY:
            self.transport.close()  # a body that nobody read, and none of a request that came behind this one
        self._watch_head()

    def timeout_keep_alive_handler(self) -> None:
        self._end()

    def shutdown(self) -> None:
        if self.cycle is None or self.cycle.response_complete:
            self._end()
            return
        self.cycle.keep_alive = False
        if not self.cycle.response_started:
            self.cycle.default_headers = [*self.cycle.default_headers, _CLOSE]

    def send_400_response(self, msg: str) -> None:  # noqa: ARG002
        """What came is no HTTP, in a head or a body; h11's error is being handled."""
        if self.cycle is not None and not self.cycle.response_complete:
            self.cycle.disconnected = True
            self.cycle.message_event.set()
            if self.cycle.response_started:
                self.abort()
                return
        if getattr(sys.exception(), "error_status_hint", 400) == HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE:
            message = f"the head of the request has more than {MAX_HEAD_BYTES} bytes, or {MAX_HEADERS} headers."
            self._refuse(RequestError("HEADERS_TOO_LARGE", message))
        else:
            self._refuse(RequestError("BAD_HTTP", "what came is not HTTP/1.1 as its standard has it."))

    def _should_upgrade(self) -> bool:
        return False

    # What the server asks

    @property
    def is_idle(self) -> bool:
        """Whether it was answered and asks nothing now; one that is being closed makes no room again."""
        done = self.cycle is not None and self.cycle.response_complete
        is_open = not self.transport.is_closing()
        return is_open and done and self.conn.their_state is h11.IDLE and not self.conn.trailing_data[0]

    @property
    def is_sending(self) -> bool:
        """Whether some of an answer is still here."""
        return self._line is not None and self._line.get_write_buffer_size() > 0

    def abort(self) -> None:
        """End it now."""
        if self._line is not None:
            self._line.abort()

    # Its own

    def _make_room(self) -> bool:
        """End one that asks nothing, for this one."""
        idle = next((each for each in self.connections if isinstance(each, Connection) and each.is_idle), None)
        if idle is not None:
            idle.shutdown()
        return idle is not None

    def _is_all_read(self) -> bool:
        """Whether nothing more can come that belongs to a request which has begun."""
        return self.conn.their_state not in (h11.SEND_BODY, h11.ERROR) and not self.conn.trailing_data[0]

    def _end(self) -> None:
        if self._line is not None:
            self._line.end()

    def _watch_head(self) -> None:
        """A timer runs while a head is awaited or has begun; between two requests it is that of keep-alive."""
        waits = not self.transport.is_closing() and self.conn.their_state is h11.IDLE and not self.is_idle
        if not waits:
            self._stop_head_timer()
        elif self._head_timer is None:
            self._unset_keepalive_if_required()
            self._head_timer = self.loop.call_later(self._settings.read_timeout_s, self._head_is_late)

    def _stop_head_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _head_is_late(self) -> None:
        self._head_timer = None
        if self.conn.trailing_data[0]:
            message = f"the head of the request was not there within {self._settings.read_timeout_s:g} seconds."
            self._metrics.rejected("too_slow")
            self._refuse(RequestError("TOO_SLOW", message))
        else:
            self._end()

    def _refuse(self, error: RequestError, most_s: float | None = None) -> None:
        """Answer what never became a request, and close."""
        name = secrets.token_hex(16)
        body = msgspec.json.encode(error.body(name))
        lines = [
            f"HTTP/1.1 {error.status} {HTTPStatus(error.status).phrase}",
            *(f"{name.decode()}: {value.decode()}" for name, value in self.server_state.default_headers),
            "content-type: application/json",
            f"content-length: {len(body)}",
            *(f"{name.decode()}: {value.decode()}" for name, value in HEADERS.items()),
            f"x-request-id: {name}",
            "connection: close",
            *(f"{name}: {value}" for name, value in error.headers.items()),
        ]
        self._stop_head_timer()
        if self._line is not None:
            self._line.write("\r\n".join([*lines, "", ""]).encode("latin-1") + body)
            self._line.close(most_s, is_all_read=False)


class _Line(asyncio.Transport):
    """A transport that closes so that the client can read the answer, and that waits for no client for ever.

    A socket that is closed while bytes come in is reset, and the client loses what it has not read. So where not all
    was read, `close` sends its end, and forgets what still comes, for `patience_s` at most.
    """

    def __init__(
        self,
        inner: asyncio.Transport,
        loop: asyncio.AbstractEventLoop,
        patience_s: float,
        is_all_read: Callable[[], bool],
    ) -> None:
        super().__init__()
        self._inner, self._loop, self._patience_s, self._is_all_read = inner, loop, patience_s, is_all_read
        self._is_closing = self._is_lost = False
        self._end_timer: asyncio.TimerHandle | None = None
        self._take_timer: asyncio.TimerHandle | None = None
        self._written = self._taken = 0

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return self._inner.get_extra_info(name, default)

    def is_closing(self) -> bool:
        return self._is_closing or self._inner.is_closing()

    def pause_reading(self) -> None:
        if not self.is_closing():
            self._inner.pause_reading()

    def resume_reading(self) -> None:
        if not self._inner.is_closing():
            self._inner.resume_reading()

    def get_write_buffer_size(self) -> int:
        return 0 if self._is_lost else self._inner.get_write_buffer_size()

    def write(self, data: Any) -> None:
        if self._is_closing:
            return
        self._inner.write(data)
        self._written += len(data)
        if self._take_timer is None and self.get_write_buffer_size():
            self._taken = self._written - self.get_write_buffer_size()
            self._take_timer = self._loop.call_later(self._patience_s, self._look)

    def close(self, most_s: float | None = None, *, is_all_read: bool | None = None) -> None:
        if self.is_closing():
            return
        if self._is_all_read() if is_all_read is None else is_all_read:
            self.end()
            return
        self._is_closing = True
        if self._inner.can_write_eof():
            with contextlib.suppress(OSError):
                self._inner.write_eof()
        self._inner.resume_reading()
        self._end_timer = self._loop.call_later(self._patience_s if most_s is None else most_s, self.end)

    def end(self) -> None:
        """Close without reading any more; what is written still goes out, if it is taken."""
        self._is_closing = True
        self._inner.close()

    def abort(self) -> None:
        self._is_closing = True
        self._inner.abort()

    def lost(self) -> None:
        """There is nothing to wait for any more."""
        self._is_lost = self._is_closing = True
        for timer in (self._end_timer, self._take_timer):
            if timer is not None:
                timer.cancel()

    def _look(self) -> None:
        """Whether the client has taken enough since the last look."""
        self._take_timer = None
        left = self.get_write_buffer_size()
        taken = self._written - left
        if left and taken - self._taken < MIN_TAKEN_PER_S * self._patience_s:
            self.abort()
        elif left:
            self._taken = taken
            self._take_timer = self._loop.call_later(self._patience_s, self._look)
