"""Workers killed under load, and whether anything that was promised is missing then: `m0kit bench kill`.

Owns the journal: each document that the server acknowledged, with what was acknowledged. Afterwards the index is asked
for every one of them. A request may end in a broken connection, which its client sees; none may hang.
"""

import asyncio
import json
import random
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from m0kit.errors import M0kitError
from m0kit_parity.bench.load.bodies import Source
from m0kit_parity.bench.load.client import Client
from m0kit_parity.bench.load.curve import statuses_of
from m0kit_parity.bench.load.offering import Sample, arrivals, offer
from m0kit_parity.bench.load.server import kill, workers_of
from m0kit_parity.drawing.table import Rows

_ADDITIONS: Final = 4  # clients that add documents, one after another
_BACK_S: Final = 120.0


@dataclass(frozen=True, slots=True)
class Killed:
    """What became of all that was asked."""

    kills: int
    replaced_s: tuple[float, ...]  # from each kill until another process was in its place
    rankings: dict[str, int]  # statuses, "lost" for broken connections, "hung" for those that nobody answered
    additions: dict[str, int]
    acknowledged: int
    missing: tuple[str, ...]  # ids that were acknowledged, and are not in the index, or not as they were sent


def kill_under_load(
    url: str, pid: int, source: Source, *, rate: float, seconds: float, kills: int, seed: int = 0
) -> Killed:
    """Rank at `rate` and add documents for `seconds`, and kill one worker after another meanwhile. Raises M0kitError.

    `pid` is that of a server with several workers and an index.
    """
    return asyncio.run(_kill(url, pid, source, rate, seconds, kills, seed))


async def _kill(url: str, pid: int, source: Source, rate: float, seconds: float, kills: int, seed: int) -> Killed:
    journal: dict[str, str] = {}
    added: list[Sample] = []
    is_over = asyncio.Event()
    async with Client(url, patience_s=60) as client:
        moments = arrivals(rate, seconds, seed)
        requests = [client.request("POST", "/v1/rerank", source.cold()) for _ in moments]
        adding = [asyncio.create_task(_add(client, number, journal, added, is_over)) for number in range(_ADDITIONS)]
        killing = asyncio.create_task(_kill_each(pid, kills, seconds))
        samples = await offer(client, requests, moments)
        replaced = await killing
        is_over.set()
        await asyncio.gather(*adding)
        await _is_ready(client)
        missing = await _missing(client, journal)
    return Killed(kills, tuple(replaced), statuses_of(samples), statuses_of(added), len(journal), tuple(missing))


async def _kill_each(pid: int, kills: int, seconds: float) -> list[float]:
    """Spread over the time: the oldest worker each time, so that all are, the one that writes too."""
    replaced = []
    for _ in range(kills):
        await asyncio.sleep(seconds / (kills + 1))
        before = workers_of(pid)
        if len(before) < 2:
            raise M0kitError(
                f"the server has {len(before)} workers, and killing one wants two. Start it with --workers 2."
            )
        begun = time.monotonic()
        kill(before[0])
        while len(set(workers_of(pid)) - set(before)) < 1:
            if time.monotonic() - begun > _BACK_S:
                raise M0kitError(f"a worker was killed, and none came in its place for {_BACK_S:g} seconds.")
            await asyncio.sleep(0.02)
        replaced.append(time.monotonic() - begun)
    return replaced


async def _add(
    client: Client, number: int, journal: dict[str, str], added: list[Sample], is_over: asyncio.Event
) -> None:
    """Add documents, some again with another text; note each that is acknowledged."""
    draw = random.Random(number)
    serial = 0
    while not is_over.is_set():
        name = f"{number}-{draw.randrange(serial + 1)}" if draw.random() < 0.3 else f"{number}-{serial}"
        text = f"document {name} of writer {number}, version {serial}"
        serial += 1
        begun = time.perf_counter()
        answer = await client.ask(client.request("PUT", f"/v1/documents/{name}", json.dumps({"text": text}).encode()))
        added.append(Sample(begun, 0.0, time.perf_counter() - begun, answer.status, 1, True))
        if answer.status == 200:
            journal[name] = text
        else:
            # Whether it was written is not known: either text is right from now on, and neither is asked for.
            journal.pop(name, None)
            await asyncio.sleep(0.05)


async def _is_ready(client: Client) -> None:
    end = time.monotonic() + _BACK_S
    good = 0
    while good < 20:  # in a row: every worker answers some of them
        body = json.dumps({"text": "a text"}).encode()
        answer = await client.ask(client.request("PUT", "/v1/documents/last", body))
        good = good + 1 if answer.status == 200 else 0
        if time.monotonic() > end:
            raise M0kitError(f"the server was not ready again within {_BACK_S:g} seconds.")
        await asyncio.sleep(0.02)


async def _missing(client: Client, journal: Mapping[str, str]) -> list[str]:
    missing = []
    for name, text in journal.items():
        answer = await client.ask(client.request("GET", f"/v1/documents/{name}"))
        if answer.status != 200 or answer.json().get("text") != text:
            missing.append(name)
    return missing


def killed_table(found: Killed) -> Rows:
    """Rows of what was asked, and what came of it."""
    names = list(dict.fromkeys([*found.rankings, *found.additions]))
    rows = [["", *names, "acknowledged", "missing"]]
    rows.append(["rankings", *(str(found.rankings.get(name, 0)) for name in names), "–", "–"])
    counts = [str(found.additions.get(name, 0)) for name in names]
    rows.append(["additions", *counts, str(found.acknowledged), str(len(found.missing))])
    return rows
