"""What reading a document once was found to be worth: results as data, as tables and as charts. Measures nothing.

tables({"indexing": indexing(Path("m0-int8"), "fp16", Path("index"), documents=16, repeats=3, threads=2)})
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from m0kit_parity.drawing import plot
from m0kit_parity.drawing.table import Rows

Point = dict[str, float | None]  # seconds by side, or None where it was not measured

_SIDES: Final = ("cached", "uncached")


@dataclass(frozen=True, slots=True)
class Cached:
    """A new query on a document that is kept, and on the same document computed anew; seconds are per pair."""

    kind: str  # text, page
    tokens: int  # of the document's prefix
    suffix: int  # of the query, with the score token
    uncached: float
    cached: float
    faster: float
    difference: float  # of the score of the document whose state was really computed from its uncached score
    transformers: float | None = None  # fp32, once per kind
    faster_than_transformers: float | None = None


@dataclass(frozen=True, slots=True)
class Reading:
    """All records of an index, opened and gathered for the decoder as scoring does, without running it."""

    pages: str  # "cold": the system's copy of the files was let go before; "warm": it was there
    open: float  # seconds
    load: float  # seconds, checksums included
    bytes_per_second: float


@dataclass(frozen=True, slots=True)
class Asking:
    """One query on all pages of an index, by their ids."""

    pages: str  # "cold", "warm" in a fresh process's eyes; "next": a second query, checksums are known
    seconds: float
    loading: float  # of these, in reading records and checking them
    share: float
    lookup: float  # of these, in looking up the pages themselves


@dataclass(frozen=True, slots=True)
class Disk:
    """An index of pages, of which one was computed."""

    pages: int
    tokens: int  # of each
    index_bytes: int
    reading: list[Reading]
    asking: list[Asking]


@dataclass(frozen=True, slots=True)
class Indexing:
    """Documents per second of reading them into an index, and of scoring them once."""

    documents: int
    tokens: int
    indexed: float
    scored: float
    ratio: float  # indexed to scored, median of the turns' ratios
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class CacheSize:
    """A stream of requests through a cache of a given size."""

    percent: int  # of what all documents take
    hits: float  # share of the requests
    seconds: float  # per request, median of the turns' means


@dataclass(frozen=True, slots=True)
class Growth:
    """Seconds of a call as it grows: what grows → how far → side → seconds."""

    seconds: dict[str, dict[int, Point]]
    cache: list[CacheSize]
    stream: str  # what the requests to the cache were


@dataclass(frozen=True, slots=True)
class Many:
    """Very many pairs in one call."""

    pairs: int
    documents: int
    planning: float  # seconds until the first score
    pairs_per_second: float  # of the whole call
    resident: dict[str, float]  # MiB of the process: before, planned, 10 %, 50 %, 100 %


def tables(results: Mapping[str, Any]) -> list[Rows | str]:
    """What was measured, for people; a sentence belongs to the table before it."""
    made: dict[str, Callable[[Any], list[Rows | str]]] = {
        "cached": _cached_tables,
        "disk": _disk_tables,
        "indexing": _indexing_tables,
        "growth": _growth_tables,
        "many": _many_tables,
    }
    return [table for part, result in results.items() for table in made[part](result)]


def charts(results: Mapping[str, Any]) -> list[str]:
    """SVG charts of the parts that have something to draw."""
    drawn = []
    if found := results.get("cached"):
        for kind in dict.fromkeys(r.kind for r in found):
            lines = {side: [(r.suffix, getattr(r, side)) for r in found if r.kind == kind] for side in _SIDES}
            tokens = next(r.tokens for r in found if r.kind == kind)
            label = f"tokens of a query on a {kind} of {tokens} tokens"
            drawn.append(plot.lines(lines, label, "seconds", log_y=True))
    if found := results.get("growth"):
        for what, points in found.seconds.items():
            lines = {side: [(n, p[side]) for n, p in points.items() if p[side] is not None] for side in _SIDES}
            drawn.append(plot.lines({side: line for side, line in lines.items() if line}, what, "seconds", log_y=True))
        label = "percent of the working set that the cache holds"
        drawn.append(plot.lines({"hits": [(c.percent, c.hits) for c in found.cache]}, label, "share of requests"))
        drawn.append(plot.lines({"request": [(c.percent, c.seconds) for c in found.cache]}, label, "seconds"))
    if found := results.get("many"):
        line = [(int(name.split()[0]), value) for name, value in found.resident.items() if name.endswith("%")]
        drawn.append(plot.lines({"resident": line}, f"percent of {found.pairs} pairs", "MiB"))
    return drawn


def _cached_tables(found: Sequence[Cached]) -> list[Rows | str]:
    rows = [["new query on a kept document", "tokens", "cached s", "uncached s", "faster", "score differs"]]
    compared = any(r.transformers is not None for r in found)
    rows[0] += ["transformers fp32 s", "faster"] if compared else []
    for r in found:
        row = [f"{r.kind}, {r.tokens} tokens", str(r.suffix), f"{r.cached:.4f}", f"{r.uncached:.3f}"]
        row += [f"{r.faster:.1f}×", f"{r.difference:.1e}"]
        if r.transformers is not None and r.faster_than_transformers is not None:
            row += [f"{r.transformers:.3f}", f"{r.faster_than_transformers:.1f}×"]
        rows.append(row)
    return [rows, "One document of each kind was computed; the others have copies of its state."]


def _disk_tables(found: Disk) -> list[Rows | str]:
    title = f"index of {found.pages} pages of {found.tokens} tokens"
    rows = [[title, "open s", "load s", "MiB/s"]]
    rows += [[r.pages, f"{r.open:.4f}", f"{r.load:.3f}", f"{r.bytes_per_second / 2**20:.0f}"] for r in found.reading]
    asked = [["one query on all pages", "seconds", "of it loading", "share", "of it looking up"]]
    asked += [
        [a.pages, f"{a.seconds:.3f}", f"{a.loading:.3f}", f"{100 * a.share:.1f} %", f"{a.lookup:.3f}"]
        for a in found.asking
    ]
    told = f"{found.index_bytes / 2**20:.0f} MiB on disk. One page was computed; the others have copies of its state."
    return [rows, asked, told]


def _indexing_tables(found: Indexing) -> list[Rows | str]:
    rows = [
        [f"{found.documents} new texts of {found.tokens} tokens", "documents/s", "against scoring", "range"],
        ["scoring", f"{found.scored:.2f}", "1.00×", ""],
        ["indexing", f"{found.indexed:.2f}", f"{found.ratio:.2f}×", f"{found.low:.2f}–{found.high:.2f}"],
    ]
    return [rows]


def _growth_tables(found: Growth) -> list[Rows | str]:
    made: list[Rows | str] = []
    for what, points in found.seconds.items():
        rows = [[what, "cached s", "uncached s"]]
        for n, sides in points.items():
            rows.append([str(n), *("" if (s := sides[side]) is None else f"{s:.4f}" for side in _SIDES)])
        made.append(rows)
    rows = [["cache, of the working set", "hits", "seconds per request"]]
    rows += [[f"{c.percent} %", f"{100 * c.hits:.0f} %", f"{c.seconds:.4f}"] for c in found.cache]
    return [*made, rows, found.stream]


def _many_tables(found: Many) -> list[Rows | str]:
    rows = [[f"{found.pairs} pairs on {found.documents} documents", "MiB resident"]]
    rows += [[name, f"{value:.0f}"] for name, value in found.resident.items()]
    told = f"{found.pairs_per_second:.0f} pairs per second, the first after {found.planning:.1f} s"
    return [rows, told]
