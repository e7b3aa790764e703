"""Rows of a file of candidates, JSON lines or Parquet: what they hold, in the forms of `m0kit.reading.inputs`, and what
became of them.

A row that cannot be read is an error of that row alone.

    for row in read(Path("candidates.jsonl"), first=0): ...
"""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Final

from m0kit.errors import InputError
from m0kit.files import open_regular
from m0kit.jobs import parquet
from m0kit.jobs.parquet import is_parquet, open_parquet
from m0kit.reading.inputs import from_file, shown
from m0kit.reading.lines import lines, records

_MAX_ID: Final = 1 << 20  # letters as JSON
_EDGE_BYTES = 1 << 16  # of the input's head and tail that are hashed


@dataclass(frozen=True, slots=True)
class Row:
    """One row of the input."""

    number: int  # from 0; blank lines do not count
    place: str  # for people: "line 3" of JSON lines, from 1, or "row 2" of Parquet, from 0
    id: str | None  # as JSON
    pair: Mapping[str, Any]  # for Reranker.stream
    error: str | None = None  # why the row cannot be read

    def images(self) -> Iterator[Path]:
        """Those that are named by their files."""
        for content in self.pair.values():
            image = content.get("image") if isinstance(content, Mapping) else None
            if isinstance(image, Path):
                yield image


@dataclass(frozen=True, slots=True)
class Scored:
    """What became of one row: score and logit, or an error."""

    number: int
    id: str | None
    score: float | None
    logit: float | None
    truncated: str | None  # "document", "query", "document,query"
    error: str | None
    files: str | None = None  # JSON: {path of an image: what told it from another one before it was read}

    @classmethod
    def failed(cls, row: Row, error: str, files: str | None = None) -> "Scored":
        """A row without a score."""
        return cls(row.number, row.id, None, None, None, writable(error), files)


def read(path: Path, first: int) -> Iterator[Row]:
    """The rows from number `first` on; a few before it may be among them."""
    if is_parquet(path):
        for number, record in parquet.records(path, first):
            yield _row(number, f"row {number}", record, path.parent)
    else:
        yield from read_lines(path, path.parent, first=first)


def read_lines(source: Path | BinaryIO, folder: Path, place: str | None = None, *, first: int = 0) -> Iterator[Row]:
    """The rows of JSON lines, whose paths are relative to `folder`. Raises InputError for what is no text at all."""
    found = records(source, '{"query": …, "document": …}', place, first=first)
    for number, (line, record) in enumerate(found, first):
        yield _row(number, f"line {line}", record, folder)


def _row(number: int, place: str, record: Mapping[str, Any] | InputError, folder: Path) -> Row:
    if isinstance(record, InputError):
        return Row(number, place, None, {}, f"{place}: {record}")
    try:
        row_id = _id(record.get("id"))
    except InputError as error:
        return Row(number, place, None, {}, f"{place}: {error}")
    given = {n: v for n, v in record.items() if v is not None}
    if missing := [name for name in ("query", "document") if name not in given]:
        found = ", ".join(map(shown, list(given)[:10])) or "nothing"
        told = f'{place}: expected "query" and "document"; has no {" and no ".join(map(repr, missing))}, got {found}.'
        return Row(number, place, row_id, {}, told)
    pair: dict[str, Any] = {}
    for name in ("query", "document"):
        try:
            pair[name] = from_file(given[name], folder)
        except InputError as error:
            return Row(number, place, row_id, {}, f"{place}: {name}: {error}")
    return Row(number, place, row_id, pair)


def _id(value: Any) -> str | None:
    """As JSON, which has no numbers that are not finite: these are text. Raises InputError."""
    if value is None or value != value:
        return None
    try:
        text = json.dumps(value, allow_nan=False)
    except RecursionError:
        raise InputError("its id is nested too deeply. Write it as text.") from None
    except (TypeError, ValueError):
        text = json.dumps(value.hex() if isinstance(value, bytes) else str(value))
    if len(text) > _MAX_ID:
        raise InputError(f"its id has {len(text)} letters, and may have {_MAX_ID}. Give a shorter one.")
    return text


def writable(text: str) -> str:
    """Text that UTF-8 can write."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def count(path: Path) -> int:
    """Rows of the input."""
    if not is_parquet(path):
        return sum(1 for _ in lines(path))
    with open_parquet(path) as table:
        return sum(table.num_rows)


def identity(path: Path) -> dict[str, str]:
    """What tells this input from another one, or from itself before a change."""
    try:
        with open_regular(path) as file:
            stat = os.fstat(file.fileno())
            digest = hashlib.sha256(file.read(_EDGE_BYTES))
            file.seek(max(0, stat.st_size - _EDGE_BYTES))
            digest.update(file.read(_EDGE_BYTES))
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}.") from None
    return {
        "the input's size": f"{stat.st_size} bytes",
        "the input's time of change": str(stat.st_mtime_ns),
        "the input's content": digest.hexdigest(),
    }
