"""An app for tests of processes, and how processes are started and asked. It does what files in a folder say.

The folder stands where the artifact does: `broken` and `crash` end a process at its start, `go` lets /wait answer.
"""

import asyncio
import contextlib
import http.client
import json
import os
import re
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route, Router

from m0kit.errors import M0kitError
from m0kit.server.guard import Guard
from m0kit.server.metrics import Metrics
from m0kit.server.settings import Settings

ROOT: Final = Path(__file__).parents[3]
PATIENCE_S: Final = 60.0  # far more than anything here takes on a machine that is busy
# What a shell would start, with the toy in the place of the app. Waits and tries are few.
_SCRIPT: Final = """
import json, sys
from pathlib import Path
from m0kit.server import workers
from m0kit.server.settings import ModelSettings, Settings
from m0kit.terminal import run
workers._FIRST_WAIT_S, workers._LONGEST_WAIT_S, workers._MARGIN_S, workers._MOST_ENDS = 0.01, 0.01, 0.2, 2
given = json.loads(sys.argv[1])
given["uds"] = Path(given["uds"]) if "uds" in given else None
settings = Settings((ModelSettings(given.pop("artifact")),), port=0, **given)
sys.exit(run(lambda: workers.run(settings, (), "tests.runtime.server.toy:build")))
"""


class Toy:
    """An app as `m0kit.server.worker` wants one."""

    def __init__(self, settings: Settings, worker: int) -> None:
        self._folder, self._worker = Path(settings.models[0].artifact), worker
        if self._has("crash"):
            os.kill(os.getpid(), signal.SIGKILL)
        self.metrics = Metrics()
        self.failure = M0kitError("the toy is broken. Mend it.") if self._has("broken") else None
        routes = [Route("/who", self._who), Route("/wait", self._wait), Route("/lose", self._lose)]
        self._guard = Guard(Router(routes), settings, self.metrics)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        await self._guard(scope, receive, send)

    @property
    def is_ready(self) -> bool:
        return self.failure is None

    def stop(self) -> None:
        pass

    def reread(self) -> None:
        pass

    def _has(self, name: str) -> bool:
        return (self._folder / name).exists()

    async def _who(self, _: Request) -> JSONResponse:
        return JSONResponse({"worker": self._worker, "pid": os.getpid()})

    async def _wait(self, request: Request) -> JSONResponse:
        (self._folder / "waiting").touch()
        while not self._has("go"):
            await asyncio.sleep(0.01)
        return await self._who(request)

    async def _lose(self, request: Request) -> JSONResponse:
        self.failure = M0kitError("the toy's device is lost.")
        return await self._who(request)


def build(settings: Settings, *, worker: int = 0, writer_socket: Path | None = None) -> Toy:
    return Toy(settings, worker)


# --- from outside --------------------------------------------------------------------------------------------


@dataclass
class Answer:
    status: int
    headers: http.client.HTTPMessage
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


class Process:
    """A server that runs, what it says, and who of its workers is asked."""

    def __init__(self, command: Sequence[str], **environment: str) -> None:
        clean = {name: value for name, value in os.environ.items() if not name.startswith("M0KIT_")}
        path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env={**clean, "PYTHONPATH": path, **environment},
            text=True,
        )
        self.said: list[str] = []
        self.tls: ssl.SSLContext | None = None
        self._news = threading.Condition()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            with self._news:
                self.said.append(line.rstrip("\n"))
                self._news.notify_all()

    def find(self, pattern: str, times: int = 1) -> re.Match[str]:
        """The match of the last line with it, once it was said so often."""

        def matches() -> list[re.Match[str]]:
            return [found for line in self.said if (found := re.search(pattern, line))]

        with self._news:
            done = self._news.wait_for(lambda: len(matches()) >= times or self._has_ended, PATIENCE_S)
            assert done, f"{pattern!r} was not said in:\n" + "\n".join(self.said)
            found = matches()
        assert len(found) >= times, f"{pattern!r} was not said in:\n" + "\n".join(self.said)
        return found[-1]

    @property
    def _has_ended(self) -> bool:
        return not self._reader.is_alive()

    @property
    def port(self) -> int:
        return int(self.find(r"serving at https?://127\.0\.0\.1:(\d+)")[1])

    def pid(self, worker: int) -> int:
        """Of the process that has that worker's place now."""
        return int(self.find(rf"worker started worker={worker} pid=(\d+)")[1])

    def send(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def end(self) -> int:
        """Its exit code, once it has ended by itself."""
        code = self.process.wait(PATIENCE_S)
        self._reader.join(PATIENCE_S)
        assert self.process.stdout is not None
        self.process.stdout.close()
        return code

    def connect(self, worker: int | None = None) -> http.client.HTTPConnection:
        """A fresh connection, on which that worker answers: the others are halted until it has done so once."""
        port = self.port  # when all are ready
        others = [] if worker is None else [self.pid(number) for number in (0, 1) if number != worker]
        with halted(others):
            if self.tls is not None:
                connection: http.client.HTTPConnection = http.client.HTTPSConnection(
                    "127.0.0.1", port, timeout=PATIENCE_S, context=self.tls
                )
            else:
                connection = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE_S)
            connection.connect()
            if worker is not None:
                connection.request("GET", "/live")
                connection.getresponse().read()
        return connection

    def ask(
        self, path: str, method: str = "GET", body: Any = None, *, worker: int | None = None,
        on: http.client.HTTPConnection | None = None, **headers: str,
    ) -> Answer:  # fmt: skip
        """One request, on a connection of its own where none is given."""
        connection = on or self.connect(worker)
        told = {name.replace("_", "-"): value for name, value in headers.items()}
        if not isinstance(body, bytes | None):
            body, told["content-type"] = json.dumps(body).encode(), "application/json"
        connection.request(method, path, body, told)
        response = connection.getresponse()
        answer = Answer(response.status, response.headers, response.read())
        if on is None:
            connection.close()
        return answer


@contextlib.contextmanager
def halted(pids: Sequence[int]) -> Iterator[None]:
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    try:
        until(lambda: all(state(pid) == "T" for pid in pids))
        yield
    finally:
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)


def state(pid: int) -> str:
    """Of a process, as the system calls it: R, S, T where it is halted, Z; "" where there is none."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return ""


def until(condition: Any) -> None:
    end = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.01)


@contextlib.contextmanager
def running(command: Sequence[str], **environment: str) -> Iterator[Process]:
    """A command, which is killed where a test has not ended it."""
    process = Process(command, **environment)
    try:
        yield process
    finally:
        if process.process.poll() is None:
            process.process.kill()
        process.end()


@contextlib.contextmanager
def toys(
    folder: Path, workers: int = 1, environment: dict[str, str] | None = None, **settings: Any
) -> Iterator[Process]:
    """A server of toys."""
    given = {"artifact": str(folder), "workers": workers, **settings}
    with running([sys.executable, "-c", _SCRIPT, json.dumps(given)], **(environment or {})) as process:
        yield process


class UnixConnection(http.client.HTTPConnection):
    """HTTP over a socket in a file."""

    def __init__(self, path: Path) -> None:
        super().__init__("localhost", timeout=PATIENCE_S)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.connect(str(self._path))
