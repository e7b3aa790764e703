"""What is told of a Parquet file's pages is what pyarrow decodes, and damaged headers are said."""

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.alone import optional

from m0kit.jobs.pages import Column, page_sizes, read_footer

pa, pq = optional("pyarrow"), optional("pyarrow.parquet")


def written(table: Any, **options: Any) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(table, buffer, **options)
    return buffer.getvalue()


def table(rows: int = 1000) -> Any:
    return pa.table(
        {
            "id": range(rows),
            "document": [f"document {i % 7} " * 9 for i in range(rows)],
            "image": [{"bytes": b"x" * (i % 50), "path": None} for i in range(rows)],
        }
    )


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"compression": "none"},
        {"compression": "zstd", "data_page_version": "2.0"},
        {"row_group_size": 90, "use_dictionary": False},
        {"data_page_size": 100, "write_batch_size": 10},
        {"write_statistics": False, "store_schema": False},
    ],
)
def test_the_footer_and_the_pages_say_what_pyarrow_says(options: dict[str, Any]) -> None:
    raw = written(table(), **options)
    metadata = pq.ParquetFile(io.BytesIO(raw)).metadata
    groups = read_footer(io.BytesIO(raw))
    assert [group.num_rows for group in groups] == [metadata.row_group(i).num_rows for i in range(len(groups))]
    for number, group in enumerate(groups):
        for index, column in enumerate(group.columns):
            wanted = metadata.row_group(number).column(index)
            assert b".".join(column.path).decode() == wanted.path_in_schema
            assert (column.num_values, column.num_bytes) == (wanted.num_values, wanted.total_compressed_size)
            sizes = page_sizes(io.BytesIO(raw), column, 10_000)
            assert sizes.num_values == wanted.num_values
            assert 0 < sizes.num_bytes <= wanted.total_uncompressed_size  # that of the footer has the headers too
            assert (sizes.dictionary > 0) == (wanted.has_dictionary_page and column.path[-1] != b"path")  # all null


def test_a_value_that_rows_share_is_bounded_by_the_page_it_is_in() -> None:
    long = pa.table({"document": ["x" * 100_000] * 500})
    for options, name in (
        ({}, "dictionary"),
        ({"use_dictionary": False, "column_encoding": "DELTA_BYTE_ARRAY"}, "delta"),
    ):
        raw = io.BytesIO(written(long, **options))
        sizes = page_sizes(raw, read_footer(raw)[0].columns[0], 100)
        assert 100_000 <= getattr(sizes, name) < 101_000
    raw = io.BytesIO(written(long, use_dictionary=False, compression="zstd"))
    sizes = page_sizes(raw, read_footer(raw)[0].columns[0], 100)
    assert sizes.num_bytes > 50_000_000
    assert (sizes.dictionary, sizes.delta) == (0, 0)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda raw: raw[:-1], "does not end as Parquet"),
        (lambda _: b"", "does not end as Parquet"),
        (lambda raw: raw[:-8] + b"\xff\xff\xff\xff" + raw[-4:], "does not end as Parquet"),
        (lambda raw: raw[:-8] + b"\0\0\0\0" + raw[-4:], "a header is damaged"),
        (lambda raw: raw[:-200] + b"\xff" * 192 + raw[-8:], "a header is damaged"),
    ],
)
def test_what_is_no_footer_is_said(change: Callable[[bytes], bytes], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        read_footer(io.BytesIO(change(written(table(10)))))


@pytest.mark.parametrize(
    ("column", "said"),
    [
        (Column((b"a",), 1, 4, 10**9), "outside of the file"),
        (Column((b"a",), 1, -1, 10), "outside of the file"),
        (Column((b"a",), 1, 20, -10), "outside of the file"),
        (Column((b"a",), 10**9, 4, 100), "is damaged|outside of its column"),
    ],
)
def test_pages_that_are_not_there_are_said(column: Column, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        page_sizes(io.BytesIO(b"PAR1" + b"\x15\x04" * 100), column, 100)


def test_more_pages_than_there_may_be_are_said() -> None:
    raw = io.BytesIO(written(table(), use_dictionary=False, data_page_size=100, write_batch_size=10))
    with pytest.raises(ValueError, match="more pages than a file of its size has"):
        page_sizes(raw, read_footer(raw)[0].columns[0], 5)


@given(st.binary(max_size=300))
def test_any_bytes_are_a_footer_or_an_error_of_value(raw: bytes) -> None:
    for data in (raw, b"PAR1" + raw + len(raw).to_bytes(4, "little") + b"PAR1"):
        try:
            read_footer(io.BytesIO(data))
            page_sizes(io.BytesIO(data), Column((b"a",), 2**31, 4, len(data) - 4), 1000)
        except ValueError:
            pass


def test_structures_in_structures_have_an_end(tmp_path: Path) -> None:
    deep = b"\x1c" * 100_000
    with pytest.raises(ValueError, match="damaged"):
        read_footer(io.BytesIO(b"PAR1" + deep + len(deep).to_bytes(4, "little") + b"PAR1"))
