"""Latency and answers against offered load: `m0kit bench serve`. Owns the steps and their summary.

Capacity is measured first, by clients that always ask; loads are multiples of it. Between two steps the server is
left alone until it has done all.
"""

import asyncio
import json
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Final

from m0kit.errors import M0kitError
from m0kit_parity.bench.load.bodies import Source
from m0kit_parity.bench.load.client import HUNG, LOST, Client
from m0kit_parity.bench.load.offering import Sample, arrivals, offer, saturate
from m0kit_parity.bench.load.server import Point
from m0kit_parity.drawing.table import Rows, shown

LOADS: Final = (0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 10.0)
_SHARES: Final = (0.50, 0.95, 0.99)


@dataclass(frozen=True, slots=True)
class Step:
    """One offered load. Seconds are of requests answered with 200, from the moment they were meant to come."""

    load: float  # times the capacity
    offered: float  # requests a second
    done: float  # answered with 200, a second, until the last answer
    tokens: float  # a second, of these
    requests: int
    p50: float | None
    p95: float | None
    p99: float | None
    refused_p99: float | None  # seconds to a 429
    statuses: dict[str, int]
    told: bool  # every 429 said when to come again
    tries: float  # on average
    late_p99: float  # of the generator: above some milliseconds it measures itself
    rss: float | None  # MiB, the most while it lasted
    private: float | None


@dataclass(frozen=True, slots=True)
class Curve:
    """All steps of one kind of request."""

    kind: str
    temper: str  # cold, warm
    capacity: float  # requests a second
    steps: tuple[Step, ...]


def measure(
    url: str, source: Source, *, is_cold: bool, loads: Sequence[float], seconds: float, clients: int, seed: int,
    path: str = "/v1/rerank", key: str | None = None, patience_s: float = 180, retry_within_s: float | None = None,
    points: Sequence[Point] = (),
) -> Curve:  # fmt: skip
    """One curve. `points` grow while it is measured: the server's memory. Raises M0kitError."""
    make = source.cold if is_cold else source.warm

    async def all_of_it() -> Curve:
        async with Client(url, key=key, patience_s=patience_s) as client:

            def request() -> bytes:
                return client.request("POST", path, make())

            if not is_cold:
                await warm(client, source, path)
            await _checked(client, request())
            capacity = await saturate(client, _ahead(request, clients), max(2.0, seconds / 2), clients)
            if not capacity:
                raise M0kitError("the server answered no request while its capacity was measured. Give it longer.")
            steps = []
            for number, load in enumerate(loads):
                moments = arrivals(load * capacity, seconds, seed + number)
                requests = [request() for _ in moments]
                since = len(points)
                begun = time.perf_counter()
                samples = await offer(client, requests, moments, retry_within_s=retry_within_s)
                lasted = max(seconds, time.perf_counter() - begun)
                steps.append(summary(load, load * capacity, samples, lasted, points[since:]))
            return Curve(source.kind, "cold" if is_cold else "warm", capacity, tuple(steps))

    return asyncio.run(all_of_it())


async def warm(client: Client, source: Source, path: str) -> None:
    """Have each document that warm requests draw from read once. Raises M0kitError."""
    if source.kind == "ids":
        await add_all(client, source.additions())
    for body in source.warming():
        await _checked(client, client.request("POST", path, body))


async def add_all(client: Client, additions: Iterable[tuple[str, bytes]]) -> None:
    """PUT documents into the index. Raises M0kitError for one that is refused."""
    for name, body in additions:
        await _checked(client, client.request("PUT", f"/v1/documents/{name}", body))


async def _checked(client: Client, request: bytes) -> None:
    answer = await client.ask(request)
    if answer.status != 200:
        try:
            why = str(answer.json().get("detail"))
        except (json.JSONDecodeError, AttributeError):
            why = "it said nothing"
        raise M0kitError(f"the server answers {answer.status} before there is any load: {why}")


def _ahead(make: Callable[[], bytes], count: int) -> Callable[[], bytes]:
    """Some made beforehand, so that the first are sent at once."""
    ready = [make() for _ in range(4 * count)]
    return lambda: ready.pop() if ready else make()


def summary(load: float, offered: float, samples: Sequence[Sample], lasted: float, points: Sequence[Point]) -> Step:
    """What became of the requests of a step that took `lasted` seconds in all."""
    good = [one.seconds for one in samples if one.status == 200]
    refused = [one.seconds for one in samples if one.status == 429]
    p50, p95, p99 = (quantile(good, share) for share in _SHARES)
    return Step(
        load, offered, len(good) / lasted, sum(one.tokens for one in samples) / lasted, len(samples), p50, p95, p99,
        quantile(refused, 0.99), statuses_of(samples), all(one.told for one in samples),
        statistics.fmean(one.tries for one in samples) if samples else 0.0,
        quantile([one.late for one in samples], 0.99) or 0.0,
        max((point.rss for point in points), default=None), max((point.private for point in points), default=None),
    )  # fmt: skip


def statuses_of(samples: Iterable[Sample]) -> dict[str, int]:
    """How many of each; connections that were lost, and requests that nobody answered, by these words."""
    words = {LOST: "lost", HUNG: "hung"}
    counts = Counter(words.get(one.status, str(one.status)) for one in samples)
    return dict(sorted(counts.items()))


def quantile(values: Sequence[float], share: float) -> float | None:
    """The least value that so many are not above; None of none."""
    ranked = sorted(values)
    return ranked[min(len(ranked) - 1, int(share * len(ranked)))] if ranked else None


def curve_table(curve: Curve) -> Rows:
    """A row for each load."""
    rows = [
        ["load", "offered/s", "done/s", "tokens/s", "p50 ms", "p95 ms", "p99 ms", "200", "429", "others", "lost",
         "429 p99 ms", "tries", "late ms", "RSS MiB", "private"]
    ]  # fmt: skip
    for step in curve.steps:
        told = dict(step.statuses)
        good, refused = told.pop("200", 0), told.pop("429", 0)
        lost = told.pop("lost", 0) + told.pop("hung", 0)
        p50, p95, p99, refused_p99 = (
            shown(None if value is None else 1000 * value, ".1f")
            for value in (step.p50, step.p95, step.p99, step.refused_p99)
        )
        rows.append(
            [f"{step.load:g}×", f"{step.offered:.1f}", f"{step.done:.1f}", f"{step.tokens:.0f}", p50, p95, p99,
             str(good), str(refused), str(sum(told.values())), str(lost), refused_p99, f"{step.tries:.2f}",
             f"{1000 * step.late_p99:.1f}", shown(step.rss, ".0f"), shown(step.private, ".0f")]
        )  # fmt: skip
    return rows
