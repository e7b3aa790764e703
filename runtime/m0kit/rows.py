"""Rows of a file of candidates, JSON lines or Parquet: what they hold, in the forms of `m0kit.inputs`.

A row that cannot be read is an error of that row alone. Parquet needs the extra m0kit[parquet].

    for row in read(Path("candidates.jsonl"), first=0): ...
"""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Final

from m0kit.errors import DependencyError, InputError
from m0kit.inputs import from_file, shown
from m0kit.lines import lines, records

PARQUET_NAMES: Final = (".parquet", ".pq")
_READ_ROWS = 256  # of Parquet at a time: they may hold images
_EDGE_BYTES = 1 << 16  # of the input's head and tail that are hashed


@dataclass(frozen=True, slots=True)
class Row:
    """One row of the input."""

    number: int  # from 0; blank lines do not count
    place: str  # for people: "line 3" of JSON lines, from 1, or "row 2" of Parquet, from 0
    id: str | None  # as JSON
    pair: Mapping[str, Any]  # for Reranker.stream
    error: str | None = None  # why the row cannot be read


def read(path: Path, first: int) -> Iterator[Row]:
    """The rows from number `first` on; a few before it may be among them."""
    if is_parquet(path):
        yield from _read_parquet(path, first)
    else:
        yield from read_lines(path, path.parent, first=first)


def read_lines(source: Path | BinaryIO, folder: Path, place: str | None = None, *, first: int = 0) -> Iterator[Row]:
    """The rows of JSON lines, whose paths are relative to `folder`. Raises InputError for what is no text at all."""
    found = records(source, '{"query": …, "document": …}', place, first=first)
    for number, (line, record) in enumerate(found, first):
        yield _row(number, f"line {line}", record, folder)


def _read_parquet(path: Path, first: int) -> Iterator[Row]:
    file, columns = open_parquet(path)
    number = 0
    try:
        for group in range(file.num_row_groups):
            num_rows = file.metadata.row_group(group).num_rows
            if number + num_rows <= first:
                number += num_rows
                continue
            for batch in file.iter_batches(_READ_ROWS, row_groups=[group], columns=columns):
                for record in _records(batch):
                    yield _row(number, f"row {number}", record, path.parent)
                    number += 1
    except (OSError, ValueError) as error:  # Arrow's errors among them
        raise InputError(
            f"{path}: row {number}: the file is damaged ({type(error).__name__}). Write it again."
        ) from error
    finally:
        file.close()


def _records(batch: Any) -> list[Any]:
    """The rows of a batch; for one that is no valid Unicode, what is wrong."""
    try:
        rows: list[Any] = batch.to_pylist()
    except UnicodeDecodeError:
        if batch.num_rows == 1:
            return [InputError("a string of the row is not UTF-8 text.")]
        rows = [record for start in range(batch.num_rows) for record in _records(batch.slice(start, 1))]
    return rows


def open_parquet(path: Path) -> tuple[Any, list[str]]:
    """The opened file and those of its columns that are read."""
    try:
        file = parquet(path).ParquetFile(path)
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read as Parquet ({type(error).__name__}). Write it again.") from error
    names = file.schema_arrow.names
    if missing := [name for name in ("query", "document") if name not in names]:
        file.close()
        raise InputError(
            f"{path}: has no column {' and no column '.join(map(repr, missing))}, only {', '.join(map(repr, names))}. "
            "Rename the columns to query and document."
        )
    return file, [name for name in ("query", "document", "id") if name in names]


def is_parquet(path: Path) -> bool:
    """By its name."""
    return path.suffix.lower() in PARQUET_NAMES


def parquet(path: Path) -> Any:
    """pyarrow.parquet. Raises DependencyError naming `path`."""
    try:
        import pyarrow.parquet as module
    except ImportError:
        raise DependencyError(
            f"{path}: Parquet needs pyarrow. pip install 'm0kit[parquet]', or use JSON lines (.jsonl)."
        ) from None
    return module


def _row(number: int, place: str, record: Mapping[str, Any] | InputError, folder: Path) -> Row:
    if isinstance(record, InputError):
        return Row(number, place, None, {}, f"{place}: {record}")
    row_id, given = _id(record.get("id")), {n: v for n, v in record.items() if v is not None}
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
    if value is None or value != value:
        return None
    try:
        return json.dumps(value, allow_nan=False)
    except (TypeError, ValueError):
        return json.dumps(value.hex() if isinstance(value, bytes) else str(value))


def count(path: Path) -> int:
    """Rows of the input."""
    if not is_parquet(path):
        return sum(1 for _ in lines(path))
    file, _ = open_parquet(path)
    with file:
        return int(file.metadata.num_rows)


def identity(path: Path) -> dict[str, str]:
    """What tells this input from another one, or from itself before a change."""
    try:
        with path.open("rb") as file:
            stat = os.fstat(file.fileno())
            digest = hashlib.sha256(file.read(_EDGE_BYTES))
            file.seek(max(0, stat.st_size - _EDGE_BYTES))
            digest.update(file.read(_EDGE_BYTES))
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {os.strerror(error.errno or 0)}.") from None
    return {
        "the input's size": f"{stat.st_size} bytes",
        "the input's time of change": str(stat.st_mtime_ns),
        "the input's content": digest.hexdigest(),
    }
