"""Seconds of sides that take turns, their ratios, and the machine they were measured on. Owns the clock, no workload.

times = take_turns({"ours": timed(ours), "theirs": timed(theirs)}, repeats=3)
compare("a page", times, "theirs")
"""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from m0kit.errors import M0kitError


@dataclass(frozen=True, slots=True)
class Timing:
    """One side of one workload; seconds are the median of its turns."""

    workload: str
    side: str
    seconds: float
    ratio: float  # median of the turns' ratios: how many times faster than the side compared with
    low: float
    high: float


def timed(run: Callable[[], object], clock: Callable[[], float] = time.perf_counter) -> Callable[[], float]:
    """Something to run, as a side that takes turns: it returns its seconds."""

    def seconds() -> float:
        start = clock()
        run()
        return clock() - start

    return seconds


def take_turns(
    sides: Mapping[str, Callable[[], float]], repeats: int, rest: float = 0.3, failed: dict[str, str] | None = None
) -> dict[str, list[float]]:
    """Seconds that each side says it took, over `repeats` turns after one that does not count.

    A rest of so many seconds before each: threads of some engines spin on for a while and would slow the next one.
    With `failed` a side that raises an M0kitError takes no further turns; the error is noted there.
    """
    times: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(repeats + 1):
        for name, run in sides.items():
            if name not in times:
                continue
            time.sleep(rest)
            try:
                seconds = run()
            except M0kitError as error:
                if failed is None:
                    raise
                failed[name] = f"{name}: {error}"
                del times[name]
                continue
            if turn:
                times[name].append(seconds)
    return times


def compare(workload: str, times: Mapping[str, Sequence[float]], baseline: str) -> list[Timing]:
    """Medians of each side, and median and range of its ratios to the baseline turn by turn."""
    timings = []
    for side, seconds in times.items():
        ratios = [b / a for a, b in zip(seconds, times[baseline], strict=True)]
        middle = statistics.median(seconds)
        timings.append(Timing(workload, side, middle, statistics.median(ratios), min(ratios), max(ratios)))
    return timings


def told(about: Mapping[str, Any]) -> str:
    """What a figure depends on (`m0kit.machine.detect.describe`), in a line."""
    return "; ".join(f"{key} {value}" for key, value in about.items())


def doubling(first: int, last: int) -> list[int]:
    """first, twice that, … and last."""
    steps = []
    while first < last:
        steps.append(first)
        first *= 2
    return [*steps, last]
