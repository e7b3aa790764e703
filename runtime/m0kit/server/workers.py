"""A server's processes: one, or several and who watches over them. Owns starting, replacing and ending them.

    sys.exit(run(settings))

One is served in this process. Of several each opens its artifacts itself: weights that are mapped from files are in
memory once, and a process that ends takes no other with it. All accept from one listening socket, which stays open
while a worker is replaced, so that no connection is refused. (With SO_REUSEPORT each would have a queue of its own, and
what waits in that of a worker that is killed would be lost; two servers could also share a port by mistake.) Worker 0
alone writes to indexes; the others pass such requests on to it.

A worker is `python -m m0kit.server.workers`, which reads what it is to do from its stdin, and stops when that ends:
that is when its parent did, however it did. It has one more pipe to say that it is ready.
"""

import contextlib
import os
import selectors
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import msgspec
from prometheus_client import multiprocess, values

from m0kit.errors import DeviceLostError, M0kitError
from m0kit.server.listening import address, listening
from m0kit.server.logs import log
from m0kit.server.settings import Settings
from m0kit.server.worker import BROKEN_OFF, BUILDER, INTERRUPTED, STDERR, notify, serve_here, set_up_logs
from m0kit.terminal import LOST, ended, say
from m0kit.terminal import run as run_command

_FIRST_WAIT_S, _LONGEST_WAIT_S = 0.5, 10.0  # before a worker is started again
# A worker that ends before it was ready for so long, so many times in a row, will go on like that.
_STEADY_S: Final = 60.0
_MOST_ENDS: Final = 5
_MARGIN_S: Final = 5.0  # beyond the time for finishing, to close what is open
_READY: Final = b"\0"  # what a worker says when it is
_LONGEST_SOCKET: Final = 100  # bytes of a Unix socket's path; systems take 104 to 108


class _Order(msgspec.Struct):
    """What a worker is told."""

    settings: Settings
    builder: str
    number: int
    sockets: list[tuple[int, int]]  # descriptors, with their families
    ready: int  # a descriptor to write to
    writer: Path | None


def run(settings: Settings, shown: Sequence[str] = (), builder: str = BUILDER) -> int:
    """Serve until a signal says to stop; returns the exit code.

    `shown`: what to say of the artifacts when they are ready. `builder`: module:function of the app, which every
    process calls itself. 0 after SIGTERM where all that was accepted was finished, 143 where not; 1 or another where
    workers do not stay alive. Raises KeyboardInterrupt after SIGINT; M0kitError where an address is taken, a
    certificate or an artifact cannot be used. Where logs are JSON, that is a line of them and exit code 1 instead.
    """
    set_up_logs(settings, None)
    try:
        return _run(settings, shown, builder)
    except M0kitError as error:
        if settings.log_format != "json":
            raise
        log("error", str(error))
        return 1


def _run(settings: Settings, shown: Sequence[str], builder: str) -> int:
    with listening(settings) as sockets:

        def ready() -> None:
            _announce(settings, address(settings, sockets), shown)
            notify("READY=1")

        if settings.workers == 1:
            return serve_here(settings, sockets, builder, ready)
        return _Supervisor(settings, sockets, builder, ready).run()


def _announce(settings: Settings, place: str, shown: Sequence[str]) -> None:
    """Where it is, what it serves and who may ask, for a person; a log in JSON has it as one line."""
    keys = "none: whoever reaches this address may ask"
    if settings.api_key_file is not None:
        keys = f"those of {settings.api_key_file}"
    if settings.log_format == "json":
        log("info", "ready", address=place, workers=settings.workers, keys=settings.api_key_file is not None)
        return
    many = f", {settings.workers} workers" if settings.workers > 1 else ""
    say(f"serving at {place}{many}; Ctrl-C stops it")
    for line in shown:
        say(f"  model  {line}")
    say(f"  keys   {keys}")
    if settings.page and settings.uds is None:
        say(f"  page   {place}/")


@dataclass(slots=True, eq=False)
class _Worker:
    """A place for a worker, and the process that has it now."""

    number: int
    process: "subprocess.Popen[bytes] | None" = None
    ready: int = -1  # the end to read of the pipe by which it says so, and by which its end is seen
    said: bytes = b""  # there, before its end: why it will not be ready
    ready_since: float | None = None
    num_ends: int = 0  # in a row, before it was steady
    start_at: float | None = 0.0  # None: not to be started


class _Supervisor:
    """Who watches over several."""

    def __init__(
        self, settings: Settings, sockets: Sequence[socket.socket], builder: str, told: Callable[[], object]
    ) -> None:
        if os.name != "posix":
            raise M0kitError(f"--workers {settings.workers}: this system cannot hand sockets on. Start one worker.")
        self._settings, self._sockets, self._builder, self._told = _shared(settings), sockets, builder, told
        self._workers = [_Worker(number) for number in range(settings.workers)]
        self._selector = selectors.DefaultSelector()
        self._is_told = False
        self._code: int | None = None  # where it is stopping
        self._failure: M0kitError | None = None  # why it never began
        self._kill_at: float | None = None  # those that have not ended by then
        self._folder = Path()
        self._has_terminal = os.isatty(STDERR)

    def run(self) -> int:
        with self._signals() as wake, self._private_folder():
            self._selector.register(wake, selectors.EVENT_READ)
            try:
                while self._code is None or any(worker.process for worker in self._workers):
                    self._start_due()
                    for key, _ in self._selector.select(self._wait_s()):
                        if key.data is None:
                            for number in wake.recv(4096):
                                self._signal(number)
                        else:
                            self._hear(key.data)
                    if self._kill_at is not None and time.monotonic() >= self._kill_at:
                        self._kill()
            finally:
                self._kill()
        if self._failure is not None:
            raise self._failure
        if self._code == INTERRUPTED:
            raise KeyboardInterrupt
        return self._code

    # --- workers ---

    def _start_due(self) -> None:
        for worker in self._startable:
            if worker.start_at is not None and worker.start_at <= time.monotonic():
                try:
                    self._start(worker)
                except OSError as error:  # no memory, too many processes
                    log("error", f"worker cannot be started: {os.strerror(error.errno or 0)}", worker=worker.number)
                    self._again(worker)

    @property
    def _startable(self) -> "list[_Worker]":
        """Those that may be started: an index that is not there yet is made by the one that writes, alone."""
        if self._code is not None:
            return []
        is_made = all(_is_made(model.index) for model in self._settings.models if model.index is not None)
        return self._workers if is_made or self._workers[0].ready_since is not None else self._workers[:1]

    def _start(self, worker: _Worker) -> None:
        """Raises OSError where there can be no further process."""
        worker.start_at, worker.ready_since, worker.said = None, None, b""
        own, theirs = os.pipe()
        sockets = [(each.fileno(), int(each.family)) for each in self._sockets]
        has_index = any(model.index is not None for model in self._settings.models)
        writer = self._folder / "writer" if has_index else None
        order = _Order(self._settings, self._builder, worker.number, sockets, theirs, writer)
        environment = {name: value for name, value in os.environ.items() if name != "NOTIFY_SOCKET"}
        environment["PROMETHEUS_MULTIPROC_DIR"] = str(self._folder / "metrics")
        try:
            process = subprocess.Popen(
                [sys.executable, "-P", "-m", "m0kit.server.workers"],
                stdin=subprocess.PIPE,
                pass_fds=[theirs, *(number for number, _ in sockets)],
                env=environment,
                process_group=0,  # Ctrl-C is for this process alone, which then tells them
            )
        except BaseException:
            os.close(own)
            raise
        finally:
            os.close(theirs)
        worker.process, worker.ready = process, own
        self._selector.register(own, selectors.EVENT_READ, worker)
        assert process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it has ended already
            process.stdin.write(msgspec.json.encode(order, enc_hook=str) + b"\n")
            process.stdin.flush()
        log("info", "worker started", worker=worker.number, pid=process.pid)

    def _hear(self, worker: _Worker) -> None:
        """It is ready, or will not be, or has ended."""
        if said := os.read(worker.ready, 1 << 16):
            worker.said += said
            if worker.said != _READY:
                return
            worker.ready_since = time.monotonic()
            log("info", "worker ready", worker=worker.number)
            if not self._is_told and all(each.ready_since is not None for each in self._workers):
                self._is_told = True
                self._told()
            return
        self._selector.unregister(worker.ready)
        os.close(worker.ready)
        assert worker.process is not None
        code = worker.process.wait()
        assert worker.process.stdin is not None
        with contextlib.suppress(OSError):
            worker.process.stdin.close()
        worker.process = None
        multiprocess.mark_process_dead(  # type: ignore[no-untyped-call]  # its gauges, not what it counted
            worker.number, str(self._folder / "metrics")
        )
        self._ended(worker, code)

    def _ended(self, worker: _Worker, code: int) -> None:
        if self._code is not None:
            log("info", f"worker {ended(code)}", worker=worker.number)
            self._code = self._code or (0 if code in (0, -signal.SIGTERM) else BROKEN_OFF)
            return
        why = worker.said.removeprefix(_READY).decode()
        if code > 0 and not self._is_told and worker.ready_since is None:
            if why:
                self._failure = (DeviceLostError if code == LOST else M0kitError)(why)
            log("info" if why else "error", f"worker {ended(code)}", worker=worker.number)
            self._stop(code)  # another would say the same
            return
        log("error", f"worker {ended(code)}{f': {why}' if why else ''}", worker=worker.number)
        self._again(worker)

    def _again(self, worker: _Worker) -> None:
        """Have it started again after a while, unless it ends every time."""
        now = time.monotonic()
        is_steady = worker.ready_since is not None and now - worker.ready_since >= _STEADY_S
        worker.num_ends = 1 if is_steady else worker.num_ends + 1
        if worker.num_ends > _MOST_ENDS:
            log("error", f"worker ended {worker.num_ends} times soon after its start; giving up", worker=worker.number)
            self._stop(1)
        else:
            worker.start_at = now + min(_FIRST_WAIT_S * 2 ** (worker.num_ends - 1), _LONGEST_WAIT_S)

    # --- the end ---

    def _stop(self, code: int) -> None:
        """Have all finish what they accepted."""
        if self._code is None:
            notify("STOPPING=1")
        self._code = code
        self._kill_at = time.monotonic() + self._settings.shutdown_timeout_s + _MARGIN_S
        self._send(signal.SIGTERM)
        for each in self._sockets:
            each.close()  # who comes now is refused at once, and may ask another server

    def _kill(self) -> None:
        for worker in self._workers:
            if worker.process is not None:
                log("warning", "worker did not finish in time and is killed", worker=worker.number)
        self._send(signal.SIGKILL)
        self._kill_at = None

    def _send(self, number: int) -> None:
        for worker in self._workers:
            if worker.process is not None:
                worker.process.send_signal(number)

    # --- signals ---

    @contextlib.contextmanager
    def _signals(self) -> Iterator[socket.socket]:
        """A socket on which the numbers of signals come."""
        wake, end = socket.socketpair()
        with wake, end:
            for each in (wake, end):
                each.setblocking(False)
            handled = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
            before = {number: signal.signal(number, lambda *_: None) for number in handled}
            descriptor = signal.set_wakeup_fd(end.fileno())
            try:
                yield wake
            finally:
                signal.set_wakeup_fd(descriptor)
                for number, handler in before.items():
                    signal.signal(number, handler)

    def _signal(self, number: int) -> None:
        is_alone = self._has_terminal and not os.isatty(STDERR)  # it was closed
        if number == signal.SIGHUP and not is_alone:
            self._send(signal.SIGHUP)
        elif number == signal.SIGINT and self._code == INTERRUPTED:
            self._kill()  # the second time
        elif self._code is None:
            log("info", "stopping", seconds=self._settings.shutdown_timeout_s)
            self._stop(INTERRUPTED if number == signal.SIGINT else 0)

    def _wait_s(self) -> float | None:
        """Until there is something to do without being told."""
        times = [worker.start_at for worker in self._startable if worker.start_at is not None]
        times += [self._kill_at] if self._kill_at is not None else []
        return max(0.0, min(times) - time.monotonic()) if times else None

    @contextlib.contextmanager
    def _private_folder(self) -> Iterator[None]:
        """What processes of this user share: counts, and the writer's socket."""
        self._folder = Path(tempfile.mkdtemp(prefix="m0kit-"))  # 0700
        try:
            if len(os.fsencode(self._folder / "writer")) > _LONGEST_SOCKET:
                raise M0kitError(f"{self._folder}: is too long a path for a socket. Set TMPDIR to a shorter one.")
            (self._folder / "metrics").mkdir()
            yield
        finally:
            shutil.rmtree(self._folder, ignore_errors=True)


def _is_made(index: Path) -> bool:
    try:
        return index.is_dir() and any(index.iterdir())
    except OSError:
        return True  # a worker says what is wrong


def _shared(settings: Settings) -> Settings:
    """Each worker gets its part of the cores where nothing else is said."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = max(1, cores // settings.workers)
    return replace(settings, models=tuple(replace(m, threads=m.threads or threads) for m in settings.models))


# --- in a worker -------------------------------------------------------------------------------------------


def _work() -> int:
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # until there is something to read again
    with open(0, "rb", buffering=0, closefd=False) as given:
        line = bytearray()
        while not line.endswith(b"\n"):
            if not (piece := given.read(1 << 16)):
                return 1  # the parent has gone
            line += piece
    order = msgspec.json.decode(line, type=_Order, dec_hook=lambda kind, value: kind(value))
    threading.Thread(target=_watch_parent, args=(order.settings.shutdown_timeout_s,), daemon=True).start()
    # By its number, so that the one in its place counts on in the same files.
    values.ValueClass = values.MultiProcessValue(lambda: order.number)  # type: ignore[no-untyped-call]
    sockets = [socket.socket(family, socket.SOCK_STREAM, fileno=number) for number, family in order.sockets]

    def tell(what: bytes) -> None:
        with contextlib.suppress(OSError):
            os.write(order.ready, what)

    try:
        return serve_here(
            order.settings, sockets, order.builder, lambda: tell(_READY), number=order.number, writer=order.writer
        )
    except M0kitError as error:  # said once, by the parent
        tell(str(error).encode(errors="replace"))
        return LOST if isinstance(error, DeviceLostError) else 1


def _watch_parent(timeout_s: float) -> None:
    """As if SIGTERM had come when the parent is gone; and where that does not help, the end."""
    while os.read(0, 1):
        pass
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(timeout_s + _MARGIN_S)
    os._exit(1)


if __name__ == "__main__":
    sys.exit(run_command(_work))
