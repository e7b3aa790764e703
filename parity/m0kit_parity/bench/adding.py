"""How fast a store takes records, by how many it holds: `m0kit bench store`. Needs no artifact.

Small records, one in each `add`, as durable as ever: on a disk most of the seconds are its flushes, so processor time
stands beside them. With a limit that is always hit every add makes room; without one none does.
"""

import hashlib
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from m0kit.keeping.store import Store
from m0kit.keeping.tables import MIN_LIMIT
from m0kit_parity.drawing.table import Rows

_SIZE = 3000  # bytes of a record, which takes one page of a segment
_PAGE = 4096


@dataclass(frozen=True, slots=True)
class Adding:
    """What one add cost where there were so many records."""

    records: int
    limited: bool
    per_second: float
    processor_s: float  # of an add, on average
    longest_s: float
    dropped: int  # to keep to the limit, during the adds that were measured
    open_s: float  # for reading


def measure(folder: Path, records: int, limited: bool, adds: int) -> Adding:
    """Fill a new store in `folder` with so many records, or with a limit until it drops some; then time `adds`."""
    limit = max(MIN_LIMIT, records * _PAGE * 5 // 4) if limited else None
    batch = max(1, min(1000, records // 20))
    with Store.create(folder, {}, limit) as store:
        numbers = _numbers()
        filled = dropped = 0
        while filled < records or (limited and dropped < records // 20):
            dropped += store.add([], {next(numbers): [bytes(_SIZE)] for _ in range(batch)})
            filled += batch
        seconds: list[float] = []
        dropped, processor = 0, time.process_time()
        for _ in range(adds):
            start = time.perf_counter()
            dropped += store.add([], {next(numbers): [bytes(_SIZE)]})
            seconds.append(time.perf_counter() - start)
        processor = time.process_time() - processor
    start = time.perf_counter()
    with Store.open(folder):
        opening = time.perf_counter() - start
    return Adding(records, limited, adds / sum(seconds), processor / adds, max(seconds), dropped, opening)


def _numbers() -> Iterator[bytes]:
    number = 0
    while True:
        yield hashlib.sha256(str(number).encode()).digest()
        number += 1


def adding(max_records: int, adds: int) -> list[Adding]:
    """Up by tens from 1,000 records, without a limit and with one that is always hit."""
    counts = [1000]
    while counts[-1] * 10 <= max_records:
        counts.append(counts[-1] * 10)
    found = []
    for limited in (False, True):
        for records in counts:
            with tempfile.TemporaryDirectory() as root:
                found.append(measure(Path(root) / "store", records, limited, adds))
    return found


def adding_table(found: Sequence[Adding]) -> Rows:
    """A row for each."""
    rows = [["records", "limit", "adds/s", "processor ms", "longest ms", "dropped", "open ms"]]
    for one in found:
        processor, longest, opening = (f"{1000 * value:.2f}" for value in (one.processor_s, one.longest_s, one.open_s))
        limit = "hit" if one.limited else "none"
        rows.append([f"{one.records:,}", limit, f"{one.per_second:.0f}", processor, longest, str(one.dropped), opening])
    return rows
