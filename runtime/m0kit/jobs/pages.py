"""What a Parquet file becomes in memory, told from its own headers before anything is decoded.

    footer = read_footer(file)
    sizes = page_sizes(file, footer[0].columns[0], limit)    # of one column of a row group

Owns footer and page headers, as far as sizes go; they are Thrift in its compact form
(https://parquet.apache.org/docs/file-format/metadata). A file of some kilobytes can stand for gigabytes: pages of zeros
are compressed a thousandfold, a dictionary holds a value once for all rows that have it, runs of nulls take no bytes.
What the footer says of sizes is not what is decoded. pyarrow's own view of a column ends the process where a
field of it is damaged.
"""

import itertools
from dataclasses import dataclass
from typing import Any, BinaryIO, Final

_MAGIC: Final = b"PAR1"
_HEADER_BYTES: Final = 1 << 12  # most are shorter; those with a long value as statistics are read again
_MAX_HEADER_BYTES: Final = 64 << 20
_MAX_DEPTH: Final = 16  # of structures, of which a footer has six
_DICTIONARY, _DATA, _DATA_V2 = 2, 0, 3
_DELTA_BYTE_ARRAY: Final = 7  # a value is told by what differs from the one before it
_DAMAGED: Final = "a header is damaged"


@dataclass(frozen=True, slots=True)
class Column:
    """A column of a row group, as the footer has it."""

    path: tuple[bytes, ...]  # names, from the outermost
    num_values: int
    start: int  # of its first page, in the file
    num_bytes: int


@dataclass(frozen=True, slots=True)
class Group:
    """A row group."""

    num_rows: int
    columns: tuple[Column, ...]


@dataclass(frozen=True, slots=True)
class PageSizes:
    """The pages of a column of a row group."""

    num_bytes: int  # decompressed
    num_values: int
    # A value that many rows share has at most so many bytes; 0 where each row has its own.
    dictionary: int
    delta: int


def read_footer(file: BinaryIO) -> list[Group]:
    """The row groups. Raises ValueError, with a reason that can stand in a message."""
    size = file.seek(0, 2)
    file.seek(max(0, size - 8))
    tail = file.read(8)
    length = int.from_bytes(tail[:4], "little")
    if tail[4:] != _MAGIC or length > size - 12:
        raise ValueError("it does not end as Parquet does")
    file.seek(size - 8 - length)
    try:
        footer = _Reader(file.read(length)).structure(0)
    except IndexError:
        raise ValueError(_DAMAGED) from None
    return [Group(_number(group, 3), tuple(map(_column, _of(group, 1, list)))) for group in _of(footer, 4, list)]


def page_sizes(file: BinaryIO, column: Column, max_pages: int) -> PageSizes:
    """Read the headers of its pages. Raises ValueError as `read_footer` does."""
    if column.num_values == 0:  # which has no page
        return PageSizes(0, 0, 0, 0)
    start, end = column.start, column.start + column.num_bytes
    if not 4 <= start <= end <= file.seek(0, 2):
        raise ValueError("a column lies outside of the file")
    num_bytes = num_values = dictionary = delta = 0
    for number in itertools.count():
        if start >= end or num_values >= column.num_values:
            break
        if number == max_pages:
            raise ValueError("it has more pages than a file of its size has")
        header, length = _header(file, start)
        kind, unpacked, packed = (_number(header, field) for field in (1, 2, 3))
        start += length + packed
        if packed < 0 or unpacked < 0 or start > end:
            raise ValueError("a page lies outside of its column")
        num_bytes += unpacked
        encoding = -1
        if kind in (_DATA, _DATA_V2):
            told = _of(header, 5 if kind == _DATA else 8, dict)
            num_values += max(_number(told, 1), 0)
            encoding = _number(told, 2 if kind == _DATA else 4)
        if kind == _DICTIONARY:
            dictionary = max(dictionary, unpacked)
        elif encoding == _DELTA_BYTE_ARRAY:
            delta = max(delta, unpacked)
    return PageSizes(num_bytes, num_values, dictionary, delta)


def _column(chunk: Any) -> Column:
    told = _of(chunk, 3, dict)
    start, dictionary = _number(told, 9), told.get(11)
    if isinstance(dictionary, int) and 0 < dictionary < start:
        start = dictionary
    return Column(tuple(_of(told, 3, list)), _number(told, 5), start, _number(told, 7))


def _header(file: BinaryIO, start: int) -> tuple[dict[int, Any], int]:
    """The fields of a page's header, and its length."""
    wanted = _HEADER_BYTES
    while True:
        file.seek(start)
        data = file.read(wanted)
        reader = _Reader(data)
        try:
            return reader.structure(0), reader.at
        except IndexError:
            if len(data) < wanted or wanted >= _MAX_HEADER_BYTES:
                raise ValueError(_DAMAGED) from None
            wanted *= 16


def _of(fields: Any, name: int, kind: type) -> Any:
    value = fields.get(name) if isinstance(fields, dict) else None
    if not isinstance(value, kind):
        raise ValueError(_DAMAGED)
    return value


def _number(fields: Any, name: int) -> int:
    value: int = _of(fields, name, int)
    return value


class _Reader:
    """Thrift's compact form. Raises IndexError where the data end, ValueError for what is none."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self.at = 0

    def structure(self, depth: int) -> dict[int, Any]:
        """Field number → value: int, bool, bytes, list or dict; None for a fraction."""
        if depth > _MAX_DEPTH:
            raise ValueError(_DAMAGED)
        fields: dict[int, Any] = {}
        name = 0
        while head := self._byte():
            name = name + (head >> 4) if head >> 4 else self._signed()
            kind = head & 15
            fields[name] = kind == 1 if kind in (1, 2) else self._value(kind, depth)
        return fields

    def _value(self, kind: int, depth: int) -> Any:
        """Takes a byte at least, so that what a list claims is bounded by what is there."""
        if kind in (4, 5, 6):
            return self._signed()
        if kind == 8:
            return self._bytes(self._unsigned())
        if kind == 12:
            return self.structure(depth + 1)
        if kind in (1, 2, 3):
            return self._byte()
        if kind == 7:
            self._bytes(8)
            return None
        if kind not in (9, 10) or depth > _MAX_DEPTH:
            raise ValueError(_DAMAGED)
        head = self._byte()
        count = head >> 4 if head >> 4 < 15 else self._unsigned()
        return [self._value(head & 15, depth + 1) for _ in range(count)]

    def _byte(self) -> int:
        self.at += 1
        return self._data[self.at - 1]

    def _bytes(self, count: int) -> bytes:
        self.at += count
        if self.at > len(self._data):
            raise IndexError
        return self._data[self.at - count : self.at]

    def _unsigned(self) -> int:
        value = 0
        for shift in range(0, 70, 7):
            byte = self._byte()
            value |= (byte & 127) << shift
            if byte < 128:
                return value
        raise ValueError(_DAMAGED)

    def _signed(self) -> int:
        value = self._unsigned()
        return (value >> 1) ^ -(value & 1)
