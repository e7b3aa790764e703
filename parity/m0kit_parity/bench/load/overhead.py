"""What a request over HTTP costs beside the call that does the same: `m0kit bench overhead`.

Both sides take turns in one run, on the same artifact with as many threads and the same cache: a server in a process
of its own, and `Reranker` in another one. Each turn is a pair of seconds, and its ratio; which side is first changes
from turn to turn. No document comes twice on a side, so each is read, unless it is warm.
"""

import http.client
import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

import numpy as np

from m0kit import Reranker
from m0kit.errors import M0kitError
from m0kit_parity.bench.load.bodies import Source
from m0kit_parity.bench.load.curve import quantile
from m0kit_parity.bench.load.server import serving
from m0kit_parity.child import Child
from m0kit_parity.drawing.table import Rows

CACHE_BYTES: Final = 1 << 30  # the server's default
_Ask = Callable[[bytes], tuple[float, float, list[float]]]  # a body → seconds, those of processors, scores in order


@dataclass(frozen=True, slots=True)
class Overhead:
    """Of one kind of request; seconds are medians of `turns`."""

    work: str
    turns: int
    server: float
    call: float
    ratio: float  # the median of the turns' ratios, server over call
    low: float  # a quarter of the ratios are below, …
    high: float  # … a quarter above
    difference: float  # the median of the turns' differences
    processor: float  # seconds of processors in all turns, server over call: other programs change it little
    same: bool  # each document got the same score on both sides, in float32 as the call has it


def overheads(
    artifact: Path, works: Sequence[tuple[str, Source, bool]], *, turns: int, threads: int, rest: float = 0.2
) -> list[Overhead]:
    """One for each work: what it is called, the requests, and whether they are cold. Raises M0kitError."""
    found = []
    sides: dict[str, _Ask] = {}
    with (
        Child(partial(_opened, str(artifact), threads)) as call,
        serving(artifact, "--threads", threads) as server,
        _connection(server.url, server.pid) as ask,
    ):
        sides |= {"call": call, "server": ask}
        for name, source, is_cold in works:
            make = source.cold if is_cold else source.warm
            for body in [*([] if is_cold else source.warming()), make(), make()]:
                call(body)
                ask(body)
            pairs: list[tuple[float, float]] = []
            spent = {"call": 0.0, "server": 0.0}
            is_same = True
            for turn in range(turns):
                body = make()
                took: dict[str, float] = {}
                scores: dict[str, list[float]] = {}
                for side in sorted(sides, reverse=turn % 2 == 1):
                    time.sleep(rest)  # threads of an engine spin on for a while, and would slow the other side
                    took[side], processor, scores[side] = sides[side](body)
                    spent[side] += processor
                pairs.append((took["server"], took["call"]))
                is_same = is_same and scores["server"] == scores["call"]
            found.append(_overhead(name, pairs, spent["server"] / spent["call"], is_same))
    return found


def _overhead(work: str, pairs: Sequence[tuple[float, float]], processor: float, is_same: bool) -> Overhead:
    servers, calls = zip(*pairs, strict=True)
    ratios = [server / call for server, call in pairs]
    return Overhead(
        work, len(pairs), statistics.median(servers), statistics.median(calls), statistics.median(ratios),
        quantile(ratios, 0.25) or 0.0, quantile(ratios, 0.75) or 0.0,
        statistics.median(server - call for server, call in pairs), processor, is_same,
    )  # fmt: skip


def _opened(artifact: str, threads: int) -> _Ask:
    """The call's side, in its own process: a body is parsed before the clock runs, as a program has its pairs."""
    reranker = Reranker.load(artifact, threads=threads, cache_bytes=CACHE_BYTES, kv="fp16")

    def call(body: bytes) -> tuple[float, float, list[float]]:
        request = json.loads(body)
        pairs = [(request["query"], document) for document in request["documents"]]
        begun, spent = time.perf_counter(), time.process_time()
        scores = reranker.score(pairs)
        return time.perf_counter() - begun, time.process_time() - spent, scores.tolist()

    return call


@contextmanager
def _connection(url: str, pid: int) -> Iterator[_Ask]:
    import psutil

    process = psutil.Process(pid)
    parts = urlsplit(url)
    connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=600)
    headers = {"Content-Type": "application/json"}

    def spent() -> float:
        times = process.cpu_times()
        return float(times.user + times.system)

    def ask(body: bytes) -> tuple[float, float, list[float]]:
        begun, before = time.perf_counter(), spent()
        connection.request("POST", "/v1/rerank", body, headers)
        response = connection.getresponse()
        answer = response.read()
        seconds, processor = time.perf_counter() - begun, spent() - before
        if response.status != 200:
            raise M0kitError(f"the server answered {response.status} while its overhead was measured.")
        results: list[dict[str, Any]] = json.loads(answer)["results"]
        ranked = sorted(results, key=lambda one: int(one["index"]))
        return seconds, processor, [float(np.float32(one["relevance_score"])) for one in ranked]

    try:
        yield ask
    finally:
        connection.close()


def overhead_table(found: Sequence[Overhead]) -> Rows:
    """A row for each work."""
    rows = [
        ["work", "turns", "server ms", "call ms", "ratio", "quarter below", "above", "difference µs", "processor",
         "same scores"]
    ]  # fmt: skip
    for one in found:
        rows.append(
            [one.work, str(one.turns), f"{1000 * one.server:.2f}", f"{1000 * one.call:.2f}", f"{one.ratio:.3f}",
             f"{one.low:.3f}", f"{one.high:.3f}", f"{1e6 * one.difference:.0f}", f"{one.processor:.3f}",
             "yes" if one.same else "no"]
        )  # fmt: skip
    return rows
