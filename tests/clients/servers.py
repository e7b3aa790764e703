"""The servers that real clients ask: `m0kit serve` itself, and the same app where it is full, stops, or is read along.

    with small(folder) as artifact, real(artifact, folder) as url: …

A state that lasts no longer than a moment is held: of an app in this process the desk refuses all work, as it does
where too much waits, or it is told to stop. Guard, routes, connections and the form of errors are the server's own.
"""

import contextlib
import json
import os
import re
import subprocess
import sys
import time
import urllib.request
from collections.abc import AsyncGenerator, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from tests.runtime.server.serving import served

from m0kit.server.app import App, build
from m0kit.server.problems import RequestError
from m0kit.server.settings import ModelSettings, Settings

KEY: Final = "0kit-a-key-that-only-opens-a-test"
WRONG_KEY: Final = "0kit-a-key-that-opens-nothing-here"
NAME: Final = "small"
MAX_BODY: Final = 256 << 10
PAGE_ID: Final = "pages/1"
ROOT: Final = Path(__file__).parents[2]
_PATIENCE_S: Final = 120.0
# As the desk says it (m0kit.server.desk), which no load can be held at.
FULL: Final = "with this request the server has work for 61 s, and 60 is its limit. Try again in 1 s."


@dataclass(frozen=True)
class Request:
    """One as it came."""

    method: str
    path: str
    headers: dict[str, str]
    raw: bytearray = field(default_factory=bytearray)

    @property
    def body(self) -> Any:
        """As JSON; None where there is none."""
        return json.loads(self.raw) if self.raw else None


@dataclass
class Asked:
    """Requests of one app."""

    seen: list[Request] = field(default_factory=list)

    def take(self) -> list[Request]:
        """Those since the last time."""
        found, self.seen = self.seen, []
        return found


@contextlib.contextmanager
def real(artifact: Path, folder: Path, page: bytes) -> Iterator[str]:
    """`m0kit serve` in a process of its own, with a key and an index that holds a page; its URL."""
    keys = write_keys(folder)
    words = [sys.executable, "-m", "m0kit", "serve", f"{NAME}={artifact}", "--port", "0", "--threads", "1"]
    words += ["--api-key-file", str(keys), "--index", str(folder / "index"), "--max-body", str(MAX_BODY)]
    log = folder / "serve.log"
    with log.open("wb") as out, subprocess.Popen(words, stdout=out, stderr=out, cwd=ROOT, env=environment()) as process:
        try:
            _until(lambda: process.poll() is not None or "serving at" in log.read_text("utf-8"))
            found = re.search(r"serving at (http://\S+?)[;,]", log.read_text("utf-8"))
            assert found, log.read_text("utf-8")
            url = found[1]
            put = urllib.request.Request(
                f"{url}/v1/documents/{PAGE_ID}", page, {"Authorization": f"Bearer {KEY}", "Content-Type": "image/png"},
                method="PUT",
            )  # fmt: skip
            with urllib.request.urlopen(put, timeout=60) as answer:
                assert answer.status in (200, 201), answer.status
            yield url
        finally:
            process.terminate()
            process.wait(60)


@contextlib.contextmanager
def full(artifact: Path, folder: Path) -> Iterator[tuple[str, Asked]]:
    """An app that has more work than it may have: 429."""
    app = _app(artifact, folder)

    async def refuse(*_: Any) -> AsyncGenerator[Any]:
        raise RequestError("OVERLOADED", FULL, retry_after_s=1)
        yield

    app.service.desk.work = refuse  # type: ignore[method-assign]
    with _here(app) as (url, asked):
        yield url, asked


@contextlib.contextmanager
def stopping(artifact: Path, folder: Path) -> Iterator[tuple[str, Asked]]:
    """An app that lets nobody in any more, though its connections are still open: 503."""
    app = _app(artifact, folder)
    with _here(app) as (url, asked):
        app.stop()
        yield url, asked


@contextlib.contextmanager
def read_along(artifact: Path, folder: Path) -> Iterator[tuple[str, Asked]]:
    """An app that answers, and tells what came."""
    with _here(_app(artifact, folder)) as (url, asked):
        yield url, asked


@contextlib.contextmanager
def _here(app: App) -> Iterator[tuple[str, Asked]]:
    asked = Asked()

    async def reading(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await app(scope, receive, send)
            return
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        request = Request(scope["method"], scope["path"], headers)
        asked.seen.append(request)

        async def hear() -> Any:
            message = await receive()
            request.raw.extend(message.get("body", b""))
            return message

        await app(scope, hear, send)

    with served(reading, app.metrics) as at:
        _until(lambda: app.is_ready or app.failure)
        assert app.failure is None
        yield f"http://127.0.0.1:{at.port}", asked


def _app(artifact: Path, folder: Path) -> App:
    return build(Settings((ModelSettings(str(artifact), names=(NAME,), threads=1),), api_key_file=write_keys(folder)))


def _until(condition: Callable[[], object]) -> None:
    """Wait for it: several programs start at a time here."""
    for _ in range(int(_PATIENCE_S / 0.1)):
        if condition():
            return
        time.sleep(0.1)
    raise AssertionError("it never came")


def write_keys(folder: Path) -> Path:
    path = folder / "keys.txt"
    path.write_text(f"clients: {KEY}\n", "utf-8")
    path.chmod(0o600)
    return path


def environment() -> dict[str, str]:
    """Of this process, for another that imports m0kit as it does."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path), "OMP_NUM_THREADS": "1"}
