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
from typing import Any, Final

from m0kit.errors import DependencyError, InputError
from m0kit.inputs import beside

JSON_NAMES: Final = (".jsonl", ".ndjson")
PARQUET_NAMES: Final = (".parquet", ".pq")
_MAX_LINE_BYTES = 256 << 20  # of a JSON line; more is a file without line ends, and not for memory
_READ_ROWS = 256  # of Parquet at a time: they may hold images
_EDGE_BYTES = 1 << 16  # of the input's head and tail that are hashed


@dataclass(frozen=True, slots=True)
class Row:
    """One row of the input."""

    number: int  # from 0; blank lines do not count
    id: str | None  # as JSON
    pair: Mapping[str, Any]  # for Reranker.stream
    error: str | None = None  # why the row cannot be read


def read(path: Path, first: int) -> Iterator[Row]:
    """The rows from number `first` on; a few before it may be among them."""
    if is_parquet(path):
        yield from _read_parquet(path, first)
        return
    for number, (_, line) in enumerate(lines(path)):
        if number < first:
            continue
        try:
            yield _row(number, json_object(line, '{"query": …, "document": …}'), path.parent)
        except InputError as error:
            yield Row(number, None, {}, str(error))


def lines(path: Path) -> Iterator[tuple[int, bytes | None]]:
    """Number, from 1, and content of the lines that are not blank; None for one that is too long. Raises InputError."""
    try:
        file = path.open("rb")
    except OSError as error:
        raise InputError(f"{path}: {os.strerror(error.errno or 0)}.") from None
    with file:
        mark = file.read(3)
        if mark[:2] in (b"\xff\xfe", b"\xfe\xff"):
            raise InputError(f"{path}: is UTF-16. Write one pair per line as JSON, in UTF-8.")
        file.seek(3 if mark == b"\xef\xbb\xbf" else 0)
        number = 0
        while line := file.readline(_MAX_LINE_BYTES):
            number += 1
            if len(line) == _MAX_LINE_BYTES and not line.endswith(b"\n"):
                while (rest := file.readline(_MAX_LINE_BYTES)) and not rest.endswith(b"\n"):
                    pass
                yield number, None
            elif line.strip():
                yield number, line


def json_object(line: bytes | None, wanted: str) -> Mapping[str, Any]:
    """What a line holds; `wanted` is what it should, for the message. Raises InputError."""
    if line is None:
        raise InputError(f"the line is longer than {_MAX_LINE_BYTES >> 20} MiB. Name large images by their paths.")
    try:
        record = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError:
        raise InputError("the line is not UTF-8 text.") from None
    except (ValueError, RecursionError):
        raise InputError("the line is not JSON.") from None
    if not isinstance(record, dict):
        raise InputError(f"expected {wanted}, got {type(record).__name__}.")
    return record


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
                    yield (
                        Row(number, None, {}, record) if isinstance(record, str) else _row(number, record, path.parent)
                    )
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
            return ["a string of the row is not UTF-8 text."]
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


def _row(number: int, record: Mapping[str, Any], folder: Path) -> Row:
    names = [name for name in ("query", "document") if record.get(name) is not None]
    return Row(number, _id(record.get("id")), {name: _content(record[name], folder) for name in names})


def _id(value: Any) -> str | None:
    if value is None or value != value:
        return None
    try:
        return json.dumps(value, allow_nan=False)
    except (TypeError, ValueError):
        return json.dumps(value.hex() if isinstance(value, bytes) else str(value))


def _content(value: Any, folder: Path) -> Any:
    """What `m0kit.inputs` takes, from a value of a file: null is absent, images may be {"bytes", "path"}."""
    if not isinstance(value, Mapping):
        return value
    value = {name: part for name, part in value.items() if part is not None}
    if value and value.keys() <= {"bytes", "path"}:  # an image column as Hugging Face datasets write it
        value = {"image": value}
    image = value.get("image")
    if isinstance(image, Mapping):
        raw = image.get("bytes")
        value["image"] = image.get("path") if raw is None else raw
    return beside(folder, value)


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
