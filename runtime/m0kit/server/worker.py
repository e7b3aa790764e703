"""One process that serves. Owns its signals, when it is ready or never will be, and how it ends.

    serve_here(settings, sockets, "m0kit.server.app:build", told=print)     # an exit code

SIGTERM: what was accepted is finished, then the end. SIGHUP: `app.reread()`, or as SIGTERM where it says that the
terminal is gone. An app that cannot be ready any more ends the process, for a new one to be started.
"""

import asyncio
import contextlib
import importlib
import logging
import os
import signal
import socket
import warnings
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Protocol, cast

from m0kit.errors import M0kitError
from m0kit.server.connections import serve
from m0kit.server.listening import unix_socket
from m0kit.server.logs import log, set_up
from m0kit.server.metrics import Metrics
from m0kit.server.settings import Settings
from m0kit.terminal import LOST

BUILDER: Final = "m0kit.server.app:build"
INTERRUPTED, BROKEN_OFF = 130, 143  # exit codes
STDERR: Final = 2
_LOOK_S: Final = 0.1  # between looks at whether it is ready


class App(Protocol):
    """What is served: an ASGI app with lifespan, which begins to load models there and answers meanwhile."""

    def __call__(self, scope: Any, receive: Any, send: Any) -> Awaitable[None]: ...

    metrics: Metrics

    @property
    def is_ready(self) -> bool: ...

    @property
    def failure(self) -> M0kitError | None:
        """Why it will never be ready again."""

    def stop(self) -> None:
        """Let nobody in any more."""

    def reread(self) -> None:
        """SIGHUP came: read keys again."""


Build = Callable[..., App]  # (settings, *, worker: int, writer_socket: Path | None)


def serve_here(
    settings: Settings,
    sockets: Sequence[socket.socket],
    builder: str,
    told: Callable[[], object],
    *,
    number: int | None = None,
    writer: Path | None = None,
) -> int:
    """Serve until a signal says to stop; returns the exit code: 0, 143 where requests were broken off, or LOST.

    `told` is called once all models are ready. `number`: which worker this is of several, of which 0 also listens at
    `writer`. Raises KeyboardInterrupt for SIGINT, M0kitError for what is never going to be ready.
    """
    set_up_logs(settings, number)
    app = build_of(builder)(settings, worker=number or 0, writer_socket=writer)
    with contextlib.ExitStack() as stack:
        if writer is not None and number == 0:
            sockets = [*sockets, stack.enter_context(unix_socket(writer))]
        code = asyncio.run(_serve(app, settings, sockets, told))
    if code == INTERRUPTED:
        raise KeyboardInterrupt
    return code


def build_of(builder: str) -> Build:
    """What "module:function" names."""
    module, _, name = builder.partition(":")
    return cast(Build, getattr(importlib.import_module(module), name))


def set_up_logs(settings: Settings, number: int | None) -> None:
    """Lines of this process, each with the worker's number where there are several."""
    set_up(settings.log_format, settings.log_level)
    ours = logging.getLogger("m0kit")
    ours.handlers, ours.propagate = [], True  # a command shows its own as notes
    warnings.filterwarnings("ignore", module="PIL")  # of a client's image, which is answered for in the request

    def name(record: logging.LogRecord) -> bool:
        record.fields = {"worker": number, **getattr(record, "fields", {})}
        return True

    if number is not None:
        for handler in logging.getLogger().handlers:
            handler.addFilter(name)


async def _serve(app: App, settings: Settings, sockets: Sequence[socket.socket], told: Callable[[], object]) -> int:
    server = serve(app, settings, app.metrics, on_stop=app.stop)
    signals: list[int] = []

    def stop(number: int) -> None:
        if not signals:
            notify("STOPPING=1")
        signals.append(number)
        server.should_exit = True
        server.force_exit = signals.count(signal.SIGINT) > 1

    has_terminal = os.isatty(STDERR)

    def hang_up(number: int) -> None:
        stop(number) if has_terminal and not os.isatty(STDERR) else app.reread()

    handlers: dict[int, Callable[[int], object]] = {signal.SIGTERM: stop, signal.SIGINT: stop}
    if hasattr(signal, "SIGHUP"):
        handlers[signal.SIGHUP] = hang_up
    was_ready = False

    async def watch() -> M0kitError:
        """Until it fails; `told` is called once it is ready."""
        nonlocal was_ready
        while (failure := app.failure) is None:
            if app.is_ready and not was_ready:
                was_ready = True
                told()
            await asyncio.sleep(_LOOK_S)
        return failure

    with _handled(handlers):
        watching = asyncio.create_task(watch())
        watching.add_done_callback(lambda _: setattr(server, "should_exit", True))
        await server.serve(list(sockets))
        failure = watching.result() if watching.done() else None
        watching.cancel()
    if failure is not None:
        if not was_ready:
            raise failure
        log("error", str(failure))
        return LOST
    if signal.SIGINT in signals:
        return INTERRUPTED
    return BROKEN_OFF if server.broke_off else 0


def notify(state: str) -> None:
    """Tell systemd, where it started this and wants to know (sd_notify(3)). Workers are not told where."""
    place = os.environ.get("NOTIFY_SOCKET", "")
    if place[:1] not in ("/", "@"):
        return
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as told:
        told.connect("\0" + place[1:] if place.startswith("@") else place)
        told.sendall(state.encode())


@contextlib.contextmanager
def _handled(handlers: Mapping[int, Callable[[int], object]]) -> Iterator[None]:
    """Signals as calls in the event loop."""
    loop = asyncio.get_running_loop()

    def handle(number: int, _: object) -> None:
        loop.call_soon_threadsafe(handlers[number], number)

    before = {number: signal.signal(number, handle) for number in handlers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
