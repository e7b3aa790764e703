"""A row that cannot be read costs itself, and carries its id through."""

import json
import os
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from tests.alone import optional

from m0kit.errors import InputError
from m0kit.jobs.rows import count, identity, read

pa, pq = optional("pyarrow"), optional("pyarrow.parquet")


@pytest.mark.parametrize("kind", ["fifo", "device", "folder"])
@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_what_is_no_file_is_refused_by_name(tmp_path: Path, kind: str, suffix: str) -> None:
    path = tmp_path / f"in{suffix}"
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        path.mkdir()
    for reading in (count, lambda path: list(read(path, 0)), identity):
        with pytest.raises(InputError, match=rf"in{suffix}: .*is a (device, a pipe or a socket|folder)"):
            reading(path)


def ids_of(path: Path, ids: Any) -> list[tuple[str | None, str | None]]:
    pq.write_table(pa.table({"id": ids, "query": ["q"] * len(ids), "document": ["d"] * len(ids)}), path)
    return [(row.id, row.error) for row in read(path, 0)]


INF = float("inf")


@pytest.mark.parametrize(
    ("values", "wanted"),
    [
        (lambda: pa.array([INF, -INF, float("nan"), 1.5]), ['"inf"', '"-inf"', None, "1.5"]),
        (lambda: pa.array([INF, 1.5], pa.float32()), ['"inf"', "1.5"]),
        (lambda: pa.array([{"a": INF}, {"a": 1.0}]), ["\"{'a': inf}\"", '{"a": 1.0}']),
        (lambda: pa.array([Decimal("1.10"), Decimal("-99999.99")]), ['"1.10"', '"-99999.99"']),
        (lambda: pa.array([1, 1_600_000_000_000_000_001], pa.timestamp("ns")),
         ['"1970-01-01 00:00:00.000000001"', '"2020-09-13 12:26:40.000000001"']),
        (lambda: pa.array([2**62, 0], pa.timestamp("ms")), [None, '"1970-01-01 00:00:00"']),
        (lambda: pa.array([-(2**62), 0], pa.timestamp("us", "UTC")),
         ['"-13097-06-28 09:59:32.612096Z"', '"1970-01-01 00:00:00+00:00"']),
        (lambda: pa.array([2**31 - 1, 0], pa.date32()), [None, '"1970-01-01"']),
        (lambda: pa.array([2**62 // 86_400_000 * 86_400_000, 0], pa.date64()), [None, '"1970-01-01"']),
        (lambda: pa.array([2**63 - 1, 1], pa.duration("s")), ['"9223372036854775807"', '"0:00:01"']),
        (lambda: pa.array([[1, 2], None]), ["[1, 2]", None]),
        (lambda: pa.array([b"\xff", b""]), ['"ff"', '""']),
        (lambda: pa.array([2**64 - 1, 0], pa.uint64()), ["18446744073709551615", "0"]),
    ],
)  # fmt: skip
def test_any_id_of_parquet_is_carried_through_or_its_rows_error(tmp_path: Path, values: Any, wanted: Any) -> None:
    for (found, error), expected in zip(ids_of(tmp_path / "in.parquet", values()), wanted, strict=True):
        assert found == expected
        if error is not None:
            assert error.startswith("row 0: its id (")
            assert error.endswith(") has no value that can be read. Write it as text.")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[" * 900 + "]" * 900, None),
        ("[" * 100_000 + "]" * 100_000, "nested too deeply"),
        (json.dumps("x" * (2 << 20)), "its id has 2097154 letters, and may have 1048576. Give a shorter one."),
        ("1e999", None),
        ("-0", None),
        ("9" * 4000, None),
    ],
)
def test_any_id_of_json_lines_is_carried_through_or_its_rows_error(tmp_path: Path, text: str, said: str | None) -> None:
    path = tmp_path / "in.jsonl"
    path.write_text(f'{{"query": "q", "document": "d", "id": {text}}}\n{{"query": "q", "document": "d"}}\n')
    first, last = read(path, 0)
    assert last.error is None
    assert said in (first.error or "") if said else (first.error is None and first.id is not None)
