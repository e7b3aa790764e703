"""The rows of a job that still need a score, a window at a time. Owns what a window may hold, and its order.

    for window in Work(Path("candidates.jsonl"), done=[(0, 100)]): ...

What a row is belongs to `m0kit.jobs.rows`.
"""

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from m0kit.jobs.rows import Row, read

# What a window may hold: enough rows to meet most pairs of a document, little enough to stay in memory.
WINDOW_ROWS = 8192
WINDOW_BYTES = 256 << 20
# A window holds its images decoded: RGB at the published limit, 768 visual tokens of 28×28 pixels.
IMAGE_BYTES = 768 * 28 * 28 * 3

_Key = tuple[str, str | bytes | Path] | None


@dataclass(frozen=True, slots=True)
class Work:
    """The rows that still need a score; iterating reads the file, window by window. Can be pickled.

    A window's rows stand by document, in the order in which the documents first appear.
    """

    source: Path
    done: Sequence[tuple[int, int]]  # half-open ranges of row numbers, ascending
    size: int | None = None  # rows of a window, at most
    watch: Callable[[list[Row]], object] | None = None  # told of a window before it is given; stays in this process

    def __reduce__(self) -> tuple[Any, ...]:
        return Work, (self.source, self.done, self.size)

    def __iter__(self) -> Iterator[list[Row]]:
        for window in self._windows():
            if self.watch is not None:
                self.watch(window)
            yield window

    def _windows(self) -> Iterator[list[Row]]:
        most = min(WINDOW_ROWS, self.size or WINDOW_ROWS)
        window: list[Row] = []
        contents: dict[_Key, Any] = {}  # equal ones are kept once
        num_bytes = 0
        for row in self._rows():
            keys = {name: _key(value) for name, value in row.pair.items()}
            cost = sum(_cost(key) for key in set(keys.values()) if key not in contents)
            if window and (len(window) == most or num_bytes + cost > WINDOW_BYTES):
                yield _by_document(window)
                window, contents, num_bytes = [], {}, 0
                cost = sum(_cost(key) for key in set(keys.values()))
            pair = {
                name: value if (key := keys[name]) is None else contents.setdefault(key, value)
                for name, value in row.pair.items()
            }
            window.append(replace(row, pair=pair))
            num_bytes += cost
        if window:
            yield _by_document(window)

    def _rows(self) -> Iterator[Row]:
        done = iter([*self.done, (sys.maxsize, sys.maxsize)])
        start, end = next(done)
        for row in read(self.source, first=end if start == 0 else 0):
            while row.number >= end:
                start, end = next(done)
            if row.number < start:
                yield row
            elif end == sys.maxsize:
                return


def _key(value: Any) -> _Key:
    """What equal contents share: ("text" or "image", its source). None for what is neither."""
    if isinstance(value, str):
        value = {"text": value}
    elif isinstance(value, bytes):
        value = {"image": value}
    if not isinstance(value, Mapping) or len(value) != 1:
        return None
    ((kind, source),) = value.items()
    return (kind, source) if isinstance(source, str | bytes | Path) else None


def _cost(key: _Key) -> int:
    """Bytes that a content takes in memory, about."""
    if key is None:
        return 0
    kind, source = key
    return (0 if isinstance(source, Path) else len(source)) + (IMAGE_BYTES if kind == "image" else 0)


def _by_document(window: Sequence[Row]) -> list[Row]:
    groups: dict[Any, list[Row]] = {}
    for row in window:
        groups.setdefault(_key(row.pair.get("document")), []).append(row)
    return [row for group in groups.values() for row in group]
