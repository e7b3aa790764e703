"""A Parquet file that is small stays small in memory, and what cannot be decoded of it costs its rows alone."""

import datetime as dt
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tests.alone import optional

from m0kit.errors import InputError
from m0kit.jobs import parquet as module
from m0kit.jobs.rows import count, read

pa, pq = optional("pyarrow"), optional("pyarrow.parquet")


def parquet_of(path: Path, columns: dict[str, Any], **options: Any) -> Path:
    pq.write_table(pa.table(columns), path, **options)
    return path


# What takes gigabytes to write is written by a process of its own, which gives them back.
WRITE = """
import sys
import pyarrow as pa
import pyarrow.parquet as pq

LONG = "x" * (21 << 20)

def nulls(count):
    return {"query": pa.nulls(count, pa.string()), "document": pa.nulls(count, pa.string())}

pq.write_table(pa.table(eval(sys.argv[2])), sys.argv[1], compression="zstd", **eval(sys.argv[3]))
"""


def large_of(path: Path, columns: str, options: dict[str, Any]) -> Path:
    """A file of the table that these words say, of which it takes a small part on the disk."""
    pytest.importorskip("pyarrow")
    subprocess.run([sys.executable, "-c", WRITE, str(path), columns, repr(options)], check=True)
    return path


# --- files that stand for more than they are ---------------------------------------------------------


@pytest.mark.parametrize(
    ("columns", "options", "said"),
    [
        ("nulls(10**7)", {"row_group_size": 10**8},
         r"claims 10000000 rows in \d+ bytes; a file of that size may have \d+\. Write values once"),
        ("{'query': ['q'], 'document': ['d'], 'id': pa.array([[None] * 10**6], pa.list_(pa.string()))}", {},
         r"claims 1000000 values in \d+ bytes"),
        ("{'query': ['q'], 'document': pa.array([[None] * 10**6], pa.list_(pa.string()))}", {},
         r"column 'document' is of the type list.*; expected text"),
        ("{'query': ['q'] * 60, 'document': [LONG] * 60}", {"use_dictionary": False, "write_statistics": False},
         r"has \d+ bytes and would take 1260 MiB; read are 256 times the size of the file and 1 GiB"),
        ("{'query': ['q'], 'document': ['d'], 'id': pa.array([None], pa.binary(2 << 20))}", {},
         r"values of a fixed 2097152 bytes"),
    ],
)  # fmt: skip
def test_a_small_file_that_claims_much_is_refused_by_what_it_claims(
    tmp_path: Path, columns: str, options: dict[str, Any], said: str
) -> None:
    path = large_of(tmp_path / "in.parquet", columns, options)
    for reading in (count, lambda path: next(read(path, 0))):
        with pytest.raises(InputError, match=said):
            reading(path)


READ = """
import sys
from pathlib import Path
from m0kit.jobs.rows import count, read
path = Path(sys.argv[1])
total = errors = 0
last = ""
for row in read(path, 0):
    total, errors, last = total + 1, errors + (row.error is not None), row.error or last
print(count(path), total, errors, last)
"""


@pytest.mark.parametrize(
    ("columns", "options", "num_rows", "num_errors"),
    [
        ("{'query': ['q'] * 300, 'document': pa.DictionaryArray.from_arrays([0] * 300, [LONG])}", {}, 300, 0),
        ("{'query': ['q'] * 40, 'document': [{'bytes': LONG.encode()}] * 40}", {}, 40, 0),
        ("{'query': ['q'] * 60, 'document': [{'bytes': LONG.encode()}] * 60}", {}, 60, 12),
        ("{'query': ['q'] * 20, 'document': [LONG] * 20}",
         {"use_dictionary": False, "column_encoding": "DELTA_BYTE_ARRAY"}, 20, 0),
        ("nulls(50_000)", {}, 50_000, 50_000),
        ("{'query': ['q'] * 30, 'document': ['d'] * 30, **{f'c{i}': [0] * 30 for i in range(1000)}}", {}, 30, 0),
        ("{'query': ['q'] * 500, 'document': ['d'] * 500}", {"row_group_size": 1}, 500, 0),
    ],
)  # fmt: skip
def test_a_small_file_takes_little_memory(
    tmp_path: Path, columns: str, options: dict[str, Any], num_rows: int, num_errors: int
) -> None:
    """A 300th of what its values are written out, and none of them is lost but where that is said."""
    path = large_of(tmp_path / "in.parquet", columns, options)

    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_DATA, (2 << 30, 2 << 30))

    words = [sys.executable, "-c", READ, str(path)]
    done = subprocess.run(words, capture_output=True, text=True, check=False, preexec_fn=limited)
    assert done.returncode == 0, done.stderr[-2000:]
    total, read_, errors, *said = done.stdout.split(maxsplit=3)
    assert (int(total), int(read_), int(errors)) == (num_rows, num_rows, num_errors)
    if num_errors == 12:
        assert "the file has taken more memory than 256 times the size of the file and 1 GiB." in said[0]


def test_values_are_the_same_whether_rows_share_them_or_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    documents = [None if i % 11 == 0 else f"document {i % 7}" for i in range(1000)]
    path = parquet_of(tmp_path / "in.parquet", {"id": range(1000), "query": ["q"] * 1000, "document": documents})
    wanted = list(read(path, 0))
    monkeypatch.setattr(module, "SHARED_BYTES", -1)
    assert list(read(path, 0)) == wanted
    assert [row.pair.get("document") for row in wanted] == documents


# --- files that are damaged --------------------------------------------------------------------------


def test_any_flipped_byte_costs_rows_or_the_file_and_nothing_else(tmp_path: Path) -> None:
    path = parquet_of(
        tmp_path / "in.parquet",
        {
            "id": pa.array([dt.datetime(2020, 1, i) for i in range(1, 31)]),
            "query": [f"q{i % 3}" for i in range(30)],
            "document": [{"bytes": b"x" * i, "path": None} for i in range(30)],
        },
        row_group_size=10,
    )
    whole, refused = path.read_bytes(), 0
    for at in range(0, len(whole), 3):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 0x81]) + whole[at + 1 :])
        try:
            found = list(read(path, 0))
            assert [row.number for row in found] == list(range(count(path)))
        except InputError:
            refused += 1
    assert refused > 50


def test_fewer_rows_than_the_footer_says_are_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = parquet_of(tmp_path / "in.parquet", {"query": ["q"] * 10, "document": ["d"] * 10})
    whole = module.Table.batches
    monkeypatch.setattr(module.Table, "batches", lambda *args: (batch.slice(0, 7) for batch in whole(*args)))
    found = list(read(path, 0))
    assert [row.error is None for row in found] == [True] * 7 + [False] * 3
    assert found[-1].error == "row 9: the file is damaged here. Write it again."
