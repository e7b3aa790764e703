"""What scoring costs as the work grows: seconds, and the memory of a fresh process for each size.

seconds(Path("m0-fp32"), max_tokens=4096, max_visual_tokens=768, repeats=3, threads=2)
"""

import statistics
from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, Final

from m0kit.errors import InputError, M0kitError
from m0kit.reranker import Reranker
from m0kit.terminal import bar
from m0kit_parity.bench.measure import measure_memory
from m0kit_parity.bench.timing import doubling, take_turns, timed
from m0kit_parity.bench.workloads import QUERY, Pair, page_of, prompts_of, text_of
from m0kit_parity.drawing import plot
from m0kit_parity.drawing.table import Rows

_KINDS: Final = {"text": "tokens of a text pair", "page": "visual tokens of a page"}

Seconds = Mapping[str, Mapping[int, float]]  # what grows, how far
Mebibytes = dict[str, dict[int, dict[str, float]]]  # kind of pair, its size, what


def seconds(
    artifact: Path, *, max_tokens: int, max_visual_tokens: int, repeats: int, threads: int
) -> dict[str, dict[int, float]]:
    """Of pairs of one length, of one pair's tokens, of one page's visual tokens: medians."""
    prompts = prompts_of(artifact)
    reranker = Reranker.load(artifact, threads=threads, max_pixels=_pixels(max_visual_tokens))
    loads: dict[str, dict[int, list[Pair]]] = {
        "pairs of 128 tokens": {
            n: [(QUERY, text_of(prompts, 128, seed)) for seed in range(n)] for n in doubling(1, 32)
        },
        _KINDS["text"]: {n: [(QUERY, text_of(prompts, n))] for n in doubling(64, max_tokens)},
        _KINDS["page"]: {n: [(QUERY, page_of(n))] for n in doubling(48, max_visual_tokens)},
    }
    measured: dict[str, dict[int, float]] = {kind: {} for kind in loads}
    for kind, amount in bar([(kind, n) for kind, points in loads.items() for n in points], unit="point"):
        times = take_turns({"m0kit": timed(partial(reranker.score, loads[kind][amount]))}, repeats)
        measured[kind][amount] = statistics.median(times["m0kit"])
    return measured


def seconds_tables(measured: Seconds) -> list[Rows]:
    """One for each thing that grows."""
    return [
        [[kind, "seconds", "per thousand"], *([str(n), f"{s:.3f}", f"{1000 * s / n:.2f}"] for n, s in points.items())]
        for kind, points in measured.items()
    ]


def seconds_charts(measured: Seconds) -> list[str]:
    """Likewise."""
    return [plot.lines({kind: list(points.items())}, kind, "seconds") for kind, points in measured.items()]


def memory(
    artifact: Path, *, max_tokens: int, max_visual_tokens: int, mode: str, threads: int
) -> tuple[Mebibytes, dict[str, dict[int, str]]]:
    """Of one pair as its tokens or pixels grow, and errors of those that failed. Raises InputError without /proc."""
    if not Path("/proc/self/status").is_file():
        raise InputError("m0kit bench memory reads /proc, which this system does not have. Run it on Linux.")
    prompts, pixels = prompts_of(artifact), _pixels(max_visual_tokens)
    measured: Mebibytes = {kind: {} for kind in _KINDS}
    failed: dict[str, dict[int, str]] = {kind: {} for kind in _KINDS}
    points = [("text", n) for n in doubling(256, max_tokens)] + [("page", n) for n in doubling(192, max_visual_tokens)]
    for kind, amount in bar(points, unit="point"):
        document: Any = text_of(prompts, amount) if kind == "text" else page_of(amount)
        try:
            measured[kind][amount] = asdict(measure_memory(artifact, [(QUERY, document)], threads, pixels, mode))
        except M0kitError as error:
            failed[kind][amount] = str(error)
    return measured, failed


def memory_tables(measured: Mebibytes, failed: Mapping[str, Mapping[int, str]]) -> list[Rows]:
    """One for each kind of pair."""
    tables: list[Rows] = []
    for kind, label in _KINDS.items():
        rows = [[label, "after load MiB", "peak MiB", "private peak MiB", "seconds"]]
        for n in sorted({*measured[kind], *failed[kind]}):
            m = measured[kind].get(n)
            cells = [f"{m[k]:.0f}" for k in ("loaded", "peak", "private")] + [f"{m['seconds']:.1f}"] if m else []
            rows.append([str(n), *(cells or ["failed"] * 4)])
        tables.append(rows)
    return tables


def memory_charts(measured: Mebibytes) -> list[str]:
    """Likewise, of what did not fail."""
    return [
        plot.lines({what: [(n, m[what]) for n, m in points.items()] for what in ("peak", "private")}, label, "MiB")
        for kind, label in _KINDS.items()
        if (points := measured[kind])
    ]


def _pixels(visual_tokens: int) -> int:
    """The published limit, or what so many visual tokens take."""
    return max(602_112, visual_tokens * 784)
