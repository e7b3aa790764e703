"""What the server's tests share: a lane on the tiny artifact with an index, and a desk that someone watches."""

import asyncio
import contextlib
import io
import socket
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

pytest.importorskip("starlette", reason="m0kit[serve] is not installed")

from tests.runtime.server.asking import KEY, MAX_BODY, Asker
from tests.runtime.server.origins import Origin
from tests.runtime.server.serving import served, settings_of, until

from m0kit.reading.inputs import parse_content
from m0kit.server.app import build
from m0kit.server.desk import Desk, Outcome
from m0kit.server.lane import Lane
from m0kit.server.settings import ModelSettings, Settings
from m0kit.server.wire.ask import Ask, Side


class Watcher:
    """An observer that counts."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, Any]] = []

    def waited(self, seconds: float) -> None:
        self.seen.append(("waited", seconds))

    def stage(self, stage: str, seconds: float) -> None:
        self.seen.append((stage, seconds))

    def batch(self, tokens: int, most: int) -> None:
        self.seen.append(("batch", (tokens, most)))

    def documents(self, kind: str, count: int = 1) -> None:
        self.seen.append(("documents", (kind, count)))

    def tokens(self, kind: str, count: int) -> None:
        self.seen.append(("tokens", (kind, count)))

    def count(self, what: str) -> int:
        return sum(name == what for name, _ in self.seen)

    @property
    def rows(self) -> int:
        """Rows that were computed."""
        return sum(value[0] for name, value in self.seen if name == "batch")


@pytest.fixture
def limits() -> Settings:
    return Settings((ModelSettings("nowhere"),))


@pytest.fixture
def lane(artifact: Path, tmp_path: Path) -> Iterator[Lane]:
    with contextlib.closing(
        Lane.open(ModelSettings(str(artifact), index=tmp_path / "library", threads=1), ["m"])
    ) as one:
        yield one


@pytest.fixture
def watcher() -> Watcher:
    return Watcher()


@pytest.fixture
def desk(lane: Lane, watcher: Watcher) -> Iterator[Desk]:
    desk = Desk(watcher, queue_s=60)
    desk.open(lane)
    yield desk
    desk.close()


@pytest.fixture
def names(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[str]]:
    """What the resolver knows; several lookups of "again" give one after the other."""
    known: dict[str, list[str]] = {}

    def look_up(host: str, port: int, *_: Any, **__: Any) -> list[Any]:
        addresses = known.get(host) or ([host] if host.replace(".", "").isdigit() or ":" in host else [])
        if not addresses:
            raise socket.gaierror(socket.EAI_NONAME, "SECRET text of the system")
        if host == "again":
            addresses = [addresses.pop(0)] if len(addresses) > 1 else addresses
        return [
            (socket.AF_INET6, socket.SOCK_STREAM, 6, "", (one, port, 0, 0))
            if ":" in one
            else (socket.AF_INET, socket.SOCK_STREAM, 6, "", (one, port))
            for one in addresses
        ]

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    return known


def png(image: Image.Image) -> bytes:
    image.save(file := io.BytesIO(), "PNG")
    return file.getvalue()


def asked(query: Any, documents: Sequence[Any], **options: Any) -> Ask:
    return Ask(
        [Side(parse_content(query, "query"), "query")],
        [Side(parse_content(one, ""), f"documents[{i}]") for i, one in enumerate(documents)],
        **options,
    )


async def outcomes_of(desk: Desk, lane: Lane, tasks: Any, seconds: float = 60) -> list[Outcome]:
    deadline = asyncio.get_running_loop().time() + seconds
    found = [outcome async for some in desk.work(lane, tasks, deadline) for outcome in some]
    return sorted(found, key=lambda outcome: outcome.position)


@pytest.fixture(scope="module")
def origin() -> Iterator[Origin]:
    one = Origin()
    yield one
    one.close()


@pytest.fixture(scope="module")
def asker(artifact: Path, origin: Origin, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Asker]:
    folder = tmp_path_factory.mktemp("router")
    (folder / "keys").write_text(f"tester: {KEY}\nother: another-key-of-this-server\n")
    (folder / "keys").chmod(0o600)
    options: dict[str, Any] = {
        "models": (ModelSettings(str(artifact), ("m0",), index=folder / "library", threads=1),),
        "api_key_file": folder / "keys",
        "allowed_hosts": ("rerank.test",),
        "image_hosts": (f"images.test:{origin.port}=127.0.0.1",),
        "max_body_bytes": MAX_BODY,
        "max_images": 4,
    }
    app = build(settings_of(**options))
    with served(app, app.service.metrics, **options) as at:
        until(lambda: app.service.problem is None)
        yield Asker(at, app)
        at.stop()
