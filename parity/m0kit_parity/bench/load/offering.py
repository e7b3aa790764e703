"""Requests that come when they come, whether or not the last one was answered (an open loop), and what became of each.

Owns arrivals and the clock. A latency counts from the moment at which a request was meant to come: a server that is
slow, or a generator that is late, makes it longer and hides nothing (no coordinated omission).

    samples = await offer(client, requests, arrivals(rate=20, seconds=10, seed=0))
"""

import asyncio
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from m0kit_parity.bench.load.client import Answer, Client

_OVERLOADED: Final = 429
_LEAST_RETRY_S: Final = 0.05  # a client that obeys a Retry-After of nothing still takes a breath


@dataclass(frozen=True, slots=True)
class Sample:
    """One request's fate. Seconds."""

    at: float  # at which it was meant to come, since the beginning
    late: float  # by how much the generator sent it later
    seconds: float  # from `at` to the end of the last answer
    status: int  # of the last answer: `client.LOST` and `client.HUNG` among them
    tries: int
    told: bool  # every 429 said when to come again
    tokens: int = 0  # of the answer, as the server counts them


def arrivals(rate: float, seconds: float, seed: int) -> list[float]:
    """Moments of a Poisson process: as many of so many independent people would come."""
    draw, found, at = random.Random(seed), list[float](), 0.0
    while (at := at + draw.expovariate(rate)) < seconds:
        found.append(at)
    return found


async def offer(
    client: Client, requests: Sequence[bytes], moments: Sequence[float], *, retry_within_s: float | None = None
) -> list[Sample]:
    """Send each request at its moment; all are awaited, in the order of their moments.

    `retry_within_s`: obey Retry-After, as often as that leaves a request younger than so many seconds.
    """
    begun = time.perf_counter()

    async def one(request: bytes, at: float) -> Sample:
        late = time.perf_counter() - begun - at
        tries, is_told = 0, True
        while True:
            answer = await client.ask(request)
            tries += 1
            age = time.perf_counter() - begun - at
            if answer.status != _OVERLOADED:
                break
            wait = _wait(answer)
            is_told = is_told and wait is not None
            if retry_within_s is None or wait is None or age + wait > retry_within_s:
                break
            await asyncio.sleep(max(wait, _LEAST_RETRY_S))
        return Sample(at, late, age, answer.status, tries, is_told, _tokens(answer))

    tasks: list[asyncio.Task[Sample]] = []
    for request, at in zip(requests, moments, strict=True):
        if (wait := at - (time.perf_counter() - begun)) > 0:
            await asyncio.sleep(wait)
        tasks.append(asyncio.create_task(one(request, at)))
    return [await task for task in tasks]


async def saturate(client: Client, make: Callable[[], bytes], seconds: float, clients: int = 16) -> float:
    """Requests a second that are answered with 200 while so many clients always ask (a closed loop): the capacity.

    What is begun in the time counts by the part of its own time that lies within.
    """
    begun = time.perf_counter()
    done = 0.0

    async def one() -> None:
        nonlocal done
        while (start := time.perf_counter() - begun) < seconds:
            answer = await client.ask(make())
            end = time.perf_counter() - begun
            if answer.status == 200:
                done += 1.0 if end <= seconds else (seconds - start) / (end - start)
            elif answer.status == _OVERLOADED:
                await asyncio.sleep(_wait(answer) or _LEAST_RETRY_S)

    await asyncio.gather(*(one() for _ in range(clients)))
    return done / seconds


def _wait(answer: Answer) -> float | None:
    given = answer.retry_after
    return float(given) if given is not None and given.isascii() and given.isdigit() else None


def _tokens(answer: Answer) -> int:
    if answer.status != 200:
        return 0
    try:
        found = answer.json()
    except ValueError:  # another server's
        return 0
    usage = found.get("usage") if isinstance(found, dict) else None
    return int(usage.get("total_tokens", 0)) if isinstance(usage, dict) else 0
