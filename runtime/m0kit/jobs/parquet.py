"""A Parquet file of candidates, as records. Owns what such a file may become in memory; needs the extra m0kit[parquet].

    for number, record in records(Path("candidates.parquet"), first=0): ...

A row that cannot be decoded is an error of that row alone. What its own headers tell is `m0kit.jobs.pages`'.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Final

from m0kit.errors import DependencyError, InputError
from m0kit.files import open_regular
from m0kit.jobs.pages import page_sizes, read_footer

PARQUET_NAMES: Final = (".parquet", ".pq")
_READ_ROWS = 256  # of Parquet at a time: they may hold images
# … and of values that many rows share so many bytes, unless they are read once for all of them: that takes longer, and
# is for dictionaries larger than those that pyarrow writes by itself.
_BATCH_BYTES: Final = 64 << 20
SHARED_BYTES: Final = 2 << 20
# What a Parquet file may become. Compressed text is some 5 to 20 times as long, and a document may stand in many rows.
_EXPANSION: Final = 256
_FREE_BYTES: Final = 1 << 30
_ROW_BYTES: Final = 1 << 16  # … and of each row, more than the model reads of it
_TOLD_EXPANSION: Final = f"{_EXPANSION} times the size of the file and {_FREE_BYTES >> 30} GiB"
_ROWS_PER_BYTE: Final = 8  # a bit a row: what tells two rows apart takes more
_FREE_ROWS: Final = 100_000
_PAGE_BYTES: Final = 256  # a page has a header of some 30, and thousands of rows
_FREE_PAGES: Final = 10_000
_MAX_FIXED_BYTES: Final = 1 << 20  # of a value of fixed length, which nulls take as well
_MAX_DEPTH: Final = 8  # of structs; {"image": {"bytes": …}} has two
# What pyarrow raises of its own and of Python's classes for what it cannot decode or convert.
_OF_ARROW: Final = (
    ValueError,
    TypeError,
    KeyError,
    IndexError,
    NotImplementedError,
    ArithmeticError,
    MemoryError,
    OSError,
)


def is_parquet(path: Path) -> bool:
    """By its name."""
    return path.suffix.lower() in PARQUET_NAMES


def require_pyarrow(path: Path) -> Any:
    """pyarrow.parquet. Raises DependencyError naming `path`."""
    try:
        import pyarrow.parquet as module
    except ImportError:
        raise DependencyError(
            f"{path}: Parquet needs pyarrow. pip install 'm0kit[parquet]', or use JSON lines (.jsonl)."
        ) from None
    return module


def records(path: Path, first: int) -> Iterator[tuple[int, Mapping[str, Any] | InputError]]:
    """Number of each row, as many as the footer says, and what it holds or why that cannot be decoded.

    A few before `first` may be among them. Raises InputError for a file that cannot be read.
    """
    with open_parquet(path) as table:
        number = 0
        for group, num_rows in enumerate(table.num_rows):
            end = number + num_rows
            if end <= first:
                number = end
                continue
            why = "the file is damaged here. Write it again."
            try:
                for batch in table.batches(group):
                    for record in _records(batch)[: end - number]:
                        yield number, record
                        number += 1
            except _TooLargeError as error:
                why = f"{error}. Write values once and not for each row, or use JSON lines."
            except _OF_ARROW as error:
                if isinstance(error, OSError) and error.errno is not None:  # of the disk, not of the file
                    raise InputError(f"{path}: cannot be read: {os.strerror(error.errno)}.") from error
            for missing in range(number, end):
                yield missing, InputError(why)
            number = end


def _records(batch: Any) -> list[Any]:
    """The rows of a batch; for one that has no value in Python, what is wrong."""
    try:
        if not any(map(_is_shared, batch.columns)):
            rows: list[Any] = batch.to_pylist()
            return rows
        columns = {name: _values(column) for name, column in zip(batch.schema.names, batch.columns, strict=True)}
    except _OF_ARROW:
        if batch.num_rows > 1:
            return [record for start in range(batch.num_rows) for record in _records(batch.slice(start, 1))]
        return [_one(batch)]
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


def _one(batch: Any) -> Any:
    """A single row of which a value is none in Python."""
    record = {}
    for name, column in zip(batch.schema.names, batch.columns, strict=True):
        try:
            (record[name],) = _values(column)
        except UnicodeDecodeError:
            return InputError("a string of the row is not UTF-8 text.")
        except _OF_ARROW:
            if name != "id" or (text := _as_text(column)) is None:
                return InputError(f"its {name} ({column.type}) has no value that can be read. Write it as text.")
            record[name] = text
    return record


def _values(column: Any) -> list[Any]:
    """What a column holds, as Python has it; a value of a dictionary is made once."""
    if not _is_shared(column):
        values: list[Any] = column.to_pylist()
        return values
    found: dict[int | None, Any] = {None: None}
    places = column.indices.to_pylist()
    for place in places:
        if place not in found:
            found[place] = column.dictionary[place].as_py()
    return [found[place] for place in places]


def _is_shared(column: Any) -> bool:
    """Whether it is a dictionary with the places of its values."""
    return hasattr(column, "dictionary")


def _as_text(column: Any) -> str | None:
    """A moment between two microseconds, which Python has not."""
    try:
        (text,) = column.cast("string").to_pylist()
    except _OF_ARROW:
        return None
    return text if isinstance(text, str) and "out of range" not in text else None


class _TooLargeError(Exception):
    """What a file would become in memory; with a reason that can stand in a message."""


@dataclass(slots=True)
class Table:
    """An opened Parquet file that is not larger in memory than its size allows."""

    path: Path
    file: Any  # pyarrow.parquet.ParquetFile
    shared: Any  # the same, with what many rows share read once
    columns: list[str]  # those that are read
    num_rows: list[int]  # of each row group
    longest: list[tuple[int, int]]  # in each row group a value that rows share: what `shared` reads once, and others
    left: int  # bytes that may still be decoded

    def batches(self, group: int) -> Iterator[Any]:
        """Record batches of a row group. Raises what Arrow raises, and _TooLargeError."""
        plain, other = self.longest[group]
        source = self.shared if plain > SHARED_BYTES else self.file
        size = max(1, min(_READ_ROWS, _BATCH_BYTES // max(1, other)))
        for batch in source.iter_batches(size, row_groups=[group], columns=self.columns, use_threads=False):
            self.left += _ROW_BYTES * batch.num_rows - _num_bytes(batch)
            if self.left < 0:
                raise _TooLargeError(f"the file has taken more memory than {_TOLD_EXPANSION}")
            yield batch

    def id_type(self) -> Any:
        """The Arrow type of the column id, None where there is none."""
        return self.file.schema_arrow.field("id").type if "id" in self.columns else None

    def __enter__(self) -> "Table":
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()
        self.shared.close()


def _num_bytes(batch: Any) -> int:
    if not any(_is_shared(column) for column in batch.columns):
        return int(batch.get_total_buffer_size())  # faster than nbytes
    used = [c.dictionary.take(c.indices.unique().drop_null()) if _is_shared(c) else c for c in batch.columns]
    return sum(int(column.nbytes) for column in used)


def open_parquet(path: Path) -> Table:
    """The file, whose sizes were looked at. Raises InputError for one that is damaged, or too large in memory."""
    module = require_pyarrow(path)
    try:
        with open_regular(path) as raw:
            size = raw.seek(0, os.SEEK_END)
            file = module.ParquetFile(path, pre_buffer=False)
            try:
                columns = _columns(path, file.schema_arrow)
                shared = [name for name in ("query", "document") if _is_plain(file.schema_arrow.field(name).type)]
                num_rows, longest = _sizes(raw, size, file.metadata.schema, columns, shared)
                twin = module.ParquetFile(path, read_dictionary=shared, pre_buffer=False)
            except BaseException:
                file.close()
                raise
    except InputError:
        raise
    except _TooLargeError as error:
        raise InputError(f"{path}: {error}. Write values once and not for each row, or use JSON lines.") from None
    except OSError as error:
        why = error.strerror if error.errno is not None else "is damaged, or no Parquet at all"
        raise InputError(f"{path}: cannot be read as Parquet: {why}. Write it again.") from error
    except _OF_ARROW as error:
        raise InputError(f"{path}: cannot be read as Parquet ({type(error).__name__}). Write it again.") from error
    return Table(path, file, twin, columns, num_rows, longest, _FREE_BYTES + _EXPANSION * size)


def _columns(path: Path, schema: Any) -> list[str]:
    """Those that are read. Raises InputError where they are not those of candidates."""
    names = schema.names
    if missing := [name for name in ("query", "document") if name not in names]:
        told = ", ".join(map(repr, names[:10])) + (f" and {len(names) - 10} more" if len(names) > 10 else "")
        raise InputError(
            f"{path}: has no column {' and no column '.join(map(repr, missing))}, only {told}. "
            "Rename the columns to query and document."
        )
    for name in ("query", "document", "id"):
        if names.count(name) > 1:
            raise InputError(f"{path}: has the column {name!r} {names.count(name)} times. Leave one of them.")
    for name in ("query", "document"):
        if not _is_content(schema.field(name).type):
            raise InputError(
                f"{path}: column {name!r} is of the type {str(schema.field(name).type)[:60]}; expected text, bytes of "
                "images, or a struct of such."
            )
    return [name for name in ("query", "document", "id") if name in names]


def _is_content(kind: Any, depth: int = 0) -> bool:
    """Whether a value is one thing, and no list of things."""
    import pyarrow as pa

    if isinstance(kind, pa.BaseExtensionType):
        kind = kind.storage_type
    if pa.types.is_struct(kind):
        return depth < _MAX_DEPTH and all(_is_content(field.type, depth + 1) for field in kind)
    return not pa.types.is_nested(kind)


def _is_plain(kind: Any) -> bool:
    import pyarrow.types as of

    kind = kind.value_type if of.is_dictionary(kind) else kind
    return bool(of.is_string(kind) or of.is_large_string(kind) or of.is_binary(kind) or of.is_large_binary(kind))


def _sizes(
    raw: BinaryIO, size: int, schema: Any, columns: Sequence[str], plain: Sequence[str]
) -> tuple[list[int], list[tuple[int, int]]]:
    """Rows of each row group, and the longest values that rows share. Raises ValueError, _TooLargeError."""
    fixed = max((column.length for column in map(schema.column, range(len(schema)))), default=0)
    if fixed > _MAX_FIXED_BYTES:
        raise _TooLargeError(f"has values of a fixed {fixed} bytes, nulls too; read are at most {_MAX_FIXED_BYTES}")
    groups = read_footer(raw)
    num_rows = [group.num_rows for group in groups]
    most = _FREE_ROWS + _ROWS_PER_BYTE * size
    if min(num_rows, default=0) < 0 or sum(num_rows) > most:
        raise _TooLargeError(f"claims {sum(num_rows)} rows in {size} bytes; a file of that size may have {most}")
    wanted, shared = {name.encode() for name in columns}, [(name.encode(),) for name in plain]
    num_bytes = 0
    longest = []
    for group in groups:
        found = [
            (column.path in shared, page_sizes(raw, column, _FREE_PAGES + size // _PAGE_BYTES), column.num_values)
            for column in group.columns
            if column.path[0] in wanted
        ]
        num_values = max((max(sizes.num_values, claimed) for _, sizes, claimed in found), default=0)
        if num_values > most:
            raise _TooLargeError(f"claims {num_values} values in {size} bytes; a file of that size may have {most}")
        num_bytes += sum(sizes.num_bytes for _, sizes, _ in found)
        if num_bytes > _FREE_BYTES + _EXPANSION * size:
            raise _TooLargeError(f"has {size} bytes and would take {num_bytes >> 20} MiB; read are {_TOLD_EXPANSION}")
        once = [sizes.dictionary for is_shared, sizes, _ in found if is_shared]
        others = [max(sizes.delta, 0 if is_shared else sizes.dictionary) for is_shared, sizes, _ in found]
        longest.append((max(once, default=0), max(others, default=0)))
    return num_rows, longest
