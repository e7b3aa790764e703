"""A day of requests in some minutes, and whether anything grows: `m0kit bench soak`.

Owns what such a day is made of: rankings of texts, pages and ids, additions and removals, requests that are wrong,
clients that hang up, looks at health and numbers. A few clients ask one after another, as fast as they are answered.
"""

import asyncio
import json
import random
import statistics
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from m0kit.terminal import bar
from m0kit_parity.bench.load.bodies import Sizes, Source
from m0kit_parity.bench.load.client import HUNG, LOST, Answer, Client
from m0kit_parity.bench.load.curve import add_all
from m0kit_parity.bench.load.server import Point
from m0kit_parity.drawing.table import Rows

WARM_UP: Final = 0.5  # of the requests: caches fill, one of them with 30,000 short texts
_PARTS: Final = 10  # rows of the table
_PASSING: Final = 8  # documents that come and go; the others stay
# How often each comes in a hundred requests, and the statuses that it may get.
_MIX: Final = {
    "tiny": (38, {200}),
    "texts": (12, {200}),
    "mixed": (4, {200}),
    "ids": (20, {200, 422}),  # 422: one of them was removed meanwhile
    "put": (6, {200}),
    "delete": (2, {200, 404}),
    "get": (4, {200, 404}),
    "wrong": (6, {400, 422}),
    "nowhere": (2, {404}),
    "health": (3, {200}),
    "metrics": (1, {200}),
    "gone": (2, {LOST}),
}


@dataclass(frozen=True, slots=True)
class Part:
    """A part of the day: medians over it."""

    requests: int  # until its end
    seconds: float
    rss: float  # MiB
    private: float
    files: int
    threads: int


@dataclass(frozen=True, slots=True)
class Soak:
    """A whole day."""

    requests: int
    seconds: float
    statuses: dict[str, int]
    unexpected: dict[str, int]  # statuses that a request of that kind should never get
    parts: tuple[Part, ...]
    grown: float  # MiB of private memory from the end of the warm-up to the end of the day


def soak(
    url: str, points: Sequence[Point], *, requests: int, clients: int = 4, seed: int = 0, sizes: Sizes | None = None
) -> Soak:
    """Ask so many times; `points` grow while it lasts. The server needs an index. Raises M0kitError."""
    return asyncio.run(_soak(url, points, requests, clients, seed, sizes or Sizes(3, 1, 8, (5, 25), 16, 64)))


async def _soak(url: str, points: Sequence[Point], requests: int, clients: int, seed: int, sizes: Sizes) -> Soak:
    statuses: Counter[str] = Counter()
    unexpected: Counter[str] = Counter()
    done_at: list[int] = []  # requests that were done when each point was taken
    done = 0
    begun = time.perf_counter()
    async with Client(url) as client:
        day = _Day(client, seed, sizes)
        await add_all(client, day.ids.additions())
        first = len(points)
        with bar(total=requests, desc="soak") as shown:

            async def one() -> None:
                nonlocal done
                while done < requests:
                    done += 1
                    kind, answer = await day.next()
                    statuses[_word(answer.status)] += 1
                    if answer.status not in _MIX[kind][1]:
                        unexpected[f"{kind} {_word(answer.status)}"] += 1
                    shown.update()
                    while len(done_at) < len(points) - first:
                        done_at.append(done)

            await asyncio.gather(*(one() for _ in range(clients)))
    seconds = time.perf_counter() - begun
    parts = _parts(points[first:], done_at, requests)
    warmed = next(part for part in parts if part.requests >= WARM_UP * requests)
    grown = parts[-1].private - warmed.private
    return Soak(requests, seconds, dict(sorted(statuses.items())), dict(unexpected), parts, grown)


class _Day:
    """Requests of all kinds, one after another."""

    def __init__(self, client: Client, seed: int, sizes: Sizes) -> None:
        self._client, self._random = client, random.Random(seed)
        self._sources = {kind: Source(kind, sizes, seed) for kind in ("tiny", "texts", "mixed")}
        self.ids = Source("ids", sizes, seed)
        self._names = list(self.ids.kept)
        self._kinds = [kind for kind, (count, _) in _MIX.items() for _ in range(count)]

    async def next(self) -> tuple[str, Answer]:
        """Ask the next one: its kind, and what came back."""
        kind, ask, path = self._random.choice(self._kinds), self._client.ask, "/v1/rerank"
        request = self._client.request
        passing = kind == "delete" or (kind == "put" and self._random.random() < 0.5)
        name = self._random.choice(self._names[:_PASSING] if passing else self._names)
        match kind:
            case "put":
                return kind, await ask(
                    request("PUT", f"/v1/documents/{name}", json.dumps(self.ids.kept[name]).encode())
                )
            case "delete" | "get":
                return kind, await ask(request(kind.upper(), f"/v1/documents/{name}"))
            case "wrong":
                wrong = [
                    b"{",
                    b'{"query": "q"}',
                    b'{"query": 1, "documents": ["a"]}',
                    b'{"query": "q", "documents": []}',
                ]
                bad = json.dumps({"query": "q", "documents": [{"image": "data:image/png;base64,AAAA"}]}).encode()
                return kind, await ask(request("POST", path, self._random.choice([*wrong, bad])))
            case "nowhere" | "health" | "metrics":
                return kind, await ask(request("GET", f"/{kind}"))
            case "gone":
                asking = asyncio.ensure_future(ask(request("POST", path, self._sources["texts"].cold())))
                await asyncio.sleep(self._random.uniform(0, 0.02))
                asking.cancel()
                await asyncio.gather(asking, return_exceptions=True)
                return kind, Answer(LOST)
            case "ids":
                return kind, await ask(request("POST", path, self.ids.warm()))
            case _:
                source = self._sources[kind]
                body = source.cold() if self._random.random() < 0.5 else source.warm()
                return kind, await ask(request("POST", path, body))


def _word(status: int) -> str:
    return {LOST: "gone", HUNG: "hung"}.get(status, str(status))


def _parts(points: Sequence[Point], done_at: Sequence[int], requests: int) -> tuple[Part, ...]:
    found = []
    for number in range(1, _PARTS + 1):
        least, most = (number - 1) * requests / _PARTS, number * requests / _PARTS
        own = [point for point, done in zip(points, done_at, strict=False) if least < done <= most] or points[-1:]
        found.append(
            Part(
                int(most), own[-1].seconds, statistics.median(point.rss for point in own),
                statistics.median(point.private for point in own), own[-1].files, own[-1].threads,
            )
        )  # fmt: skip
    return tuple(found)


def soak_table(found: Soak) -> Rows:
    """A row for each part of the day."""
    rows = [["requests", "seconds", "RSS MiB", "private MiB", "descriptors", "threads"]]
    for part in found.parts:
        rows.append(
            [f"{part.requests:,}", f"{part.seconds:.0f}", f"{part.rss:.1f}", f"{part.private:.1f}", str(part.files),
             str(part.threads)]
        )  # fmt: skip
    return rows
