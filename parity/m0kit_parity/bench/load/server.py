"""`m0kit serve` as a process that is measured: started, watched and ended. Owns no request.

with serving(Path("m0-int8"), "--threads", 2) as server, watched(server.pid) as points:
    server.url
points[-1].rss
"""

import importlib.util
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from m0kit.errors import DependencyError, M0kitError
from m0kit.terminal import ended

_OPEN_S: Final = 600.0  # for a large artifact on a busy machine
_END_S: Final = 60.0
_LOOK_S: Final = 0.05
_MEBI: Final = 1 << 20
_AT: Final = "serving at "


@dataclass(frozen=True, slots=True)
class Server:
    """One that runs."""

    url: str
    pid: int
    log: Path


@dataclass(frozen=True, slots=True)
class Point:
    """A server's processes together at a moment. MiB; pages of weights that several map are counted for each."""

    seconds: float  # since it was first looked at
    rss: float
    private: float  # of it, not of files: what the server itself holds
    files: int  # descriptors
    threads: int
    processes: int


def require_psutil() -> None:
    """Raises DependencyError."""
    if importlib.util.find_spec("psutil") is None:
        raise DependencyError("watching a server's memory needs psutil. pip install psutil")


@contextmanager
def serving(artifact: Path, *options: object, command: Sequence[object] | None = None) -> Iterator[Server]:
    """The server once it is ready. Raises M0kitError where it does not come to that, or does not end well.

    `command` in place of `m0kit serve`: another server, which says "serving at URL" on stderr too.
    """
    words = command or ["-m", "m0kit", "serve", artifact, "--port", 0, "--log-level", "warning", *options]
    with tempfile.TemporaryDirectory(prefix="m0kit-load-") as folder:
        log = Path(folder) / "stderr"
        with log.open("wb") as errors:
            process = subprocess.Popen(
                [sys.executable, *map(str, words)] if command is None else [*map(str, words)],
                stdin=subprocess.DEVNULL, stdout=errors, stderr=errors,
            )  # fmt: skip
        try:
            with _ended_together():
                yield Server(_url(process, log), process.pid, log)
            if process.poll() is not None:
                raise M0kitError(f"the server {ended(process.returncode)}: {_last(log)}")
            process.send_signal(signal.SIGTERM)
            if (code := process.wait(_END_S)) not in (0, -signal.SIGTERM):
                raise M0kitError(f"the server {ended(code)} when it was stopped: {_last(log)}")
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()


@contextmanager
def _ended_together() -> Iterator[None]:
    """SIGTERM ends what is measured too: it becomes an exception here, for who waits for the server's end."""

    def leave(number: int, _: object) -> None:
        raise SystemExit(128 + number)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _url(process: "subprocess.Popen[bytes]", log: Path) -> str:
    end = time.monotonic() + _OPEN_S
    while time.monotonic() < end:
        for line in log.read_text(errors="replace").splitlines():
            if line.startswith(_AT):
                return line.removeprefix(_AT).partition(";")[0].partition(",")[0].strip()
        if process.poll() is not None:
            raise M0kitError(f"the server {ended(process.returncode)}: {_last(log)}")
        time.sleep(_LOOK_S)
    raise M0kitError(f"the server was not ready within {_OPEN_S:g} seconds: {_last(log)}")


def _last(log: Path) -> str:
    lines = log.read_text(errors="replace").strip().splitlines()
    return lines[-1] if lines else "it said nothing"


@contextmanager
def watched(pid: int, every_s: float = 0.25) -> Iterator[list[Point]]:
    """Points of a process and those it started, as they come, until the end."""
    points: list[Point] = []
    over = threading.Event()
    begun = time.monotonic()

    def watch() -> None:
        while True:
            if (point := look(pid, begun)) is not None:
                points.append(point)
            if over.wait(every_s):
                return

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield points
    finally:
        over.set()
        thread.join()


def look(pid: int, begun: float) -> Point | None:
    """One point; None where the process has gone."""
    import psutil

    try:
        first = psutil.Process(pid)
        processes = [first, *first.children(recursive=True)]
    except psutil.NoSuchProcess:
        return None
    rss = private = files = threads = count = 0
    for process in processes:
        try:
            with process.oneshot():
                memory = process.memory_info()
                rss, private = rss + memory.rss, private + memory.rss - getattr(memory, "shared", 0)
                files, threads, count = files + process.num_fds(), threads + process.num_threads(), count + 1
        except psutil.NoSuchProcess:
            continue
    return Point(time.monotonic() - begun, rss / _MEBI, private / _MEBI, files, threads, count)


def workers_of(pid: int) -> list[int]:
    """Processes of a server's workers, the oldest first; of a server that serves itself none."""
    import psutil

    found: list[Any] = psutil.Process(pid).children()
    return [process.pid for process in sorted(found, key=lambda one: one.create_time())]


def kill(pid: int) -> None:
    """As an operator's `kill -9`, or the system short of memory, does."""
    os.kill(pid, signal.SIGKILL)


def wait_for(condition: Callable[[], object], seconds: float, what: str) -> None:
    """Raises M0kitError where it does not come true in time."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            raise M0kitError(f"{what}: not within {seconds:g} seconds.")
        time.sleep(_LOOK_S)
