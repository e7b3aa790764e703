"""The finished file of a job, and the list of rows that could not be scored.

    done = finish(journal, Path("candidates.jsonl"), Path("scores.parquet"), resumed=0)

Owns the form of both, JSON lines or Parquet, and what is told of a finished job. Each is written aside and renamed when
it is whole; the journal goes last.
"""

import contextlib
import itertools
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from m0kit.errors import OutputError
from m0kit.files import named_errors, writing
from m0kit.jobs.journal import Journal
from m0kit.jobs.parquet import is_parquet, open_parquet
from m0kit.jobs.rows import Scored, writable

WRITE_ROWS = 1 << 16  # of Parquet at a time


@dataclass(frozen=True, slots=True)
class Summary:
    """What a finished job did."""

    rows: int
    resumed: int  # of them were in the journal of an earlier run
    errors: int  # could not be scored
    truncated: int
    error_file: Path | None  # lists the errors, where there are any


def error_file(output: Path) -> Path:
    """Where the rows that could not be scored are listed."""
    return output.with_name(f"{output.name}.errors.jsonl")


def finish(journal: Journal, source: Path, output: Path, resumed: int) -> Summary:
    """Write the output aside, put it in its place, delete the journal. Raises OutputError."""
    num_errors = journal.count("error IS NOT NULL")
    listed = error_file(output)
    # Before the output: whoever sees that has the right list beside it.
    if num_errors:
        with _writing(listed) as file:
            for result in journal.results("error IS NOT NULL"):
                _write_json(file, {"row": result.number, "id": _id(result), "error": result.error})
    else:
        with named_errors(listed):
            listed.unlink(missing_ok=True)
    has_id = journal.count("id IS NOT NULL") > 0
    with _writing(output, journal.claim_output) as file:
        if is_parquet(output):
            _write_parquet(file, journal.results(), _id_type(source, journal, has_id))
        else:
            for result in journal.results():
                _write_json(file, _line(result, has_id))
    num_cut = journal.count("truncated IS NOT NULL")
    summary = Summary(journal.count(), resumed, num_errors, num_cut, listed if num_errors else None)
    journal.delete()
    return summary


@contextlib.contextmanager
def _writing(path: Path, ready: Callable[[], object] = lambda: None) -> Iterator[BinaryIO]:
    try:
        with writing(path, ready=ready) as file:
            yield file
    except OutputError as error:
        if not isinstance(error.__cause__, OSError):
            raise
        todo = "No score is lost: see to space and permissions there, then run the same command again."
        raise OutputError(f"{error} {todo}") from error.__cause__


def _write_json(file: BinaryIO, line: Mapping[str, Any]) -> None:
    file.write(json.dumps(line, allow_nan=False).encode() + b"\n")


def _line(result: Scored, has_id: bool) -> dict[str, Any]:
    return {
        "row": result.number,
        **({"id": _id(result)} if has_id else {}),
        "score": _float32(result.score),
        "logit": _float32(result.logit),
        "truncated": result.truncated,
        "error": result.error,
    }


def _id(result: Scored) -> Any:
    return json.loads(result.id or "null")


def _float32(value: float | None) -> float | None:
    """The shortest number that is the same in float32."""
    return None if value is None else float(str(np.float32(value)))


def _write_parquet(file: BinaryIO, results: Iterator[Scored], id_type: Any) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    ids = [] if id_type is None else [("id", id_type)]
    schema = pa.schema(
        [("row", pa.int64()), *ids, ("score", pa.float32()), ("logit", pa.float32()), ("truncated", pa.string()),
         ("error", pa.string())]
    )  # fmt: skip
    with pq.ParquetWriter(file, schema) as writer:
        while chunk := list(itertools.islice(results, WRITE_ROWS)):
            names = ("score", "logit", "truncated", "error")
            columns = {"row": [r.number for r in chunk]} | {n: [getattr(r, n) for r in chunk] for n in names}
            if id_type is not None:
                values = [_id(r) for r in chunk]
                if pa.types.is_string(id_type):
                    values = [_text(value) for value in values]
                elif pa.types.is_floating(id_type):
                    values = [None if value is None else float(value) for value in values]  # "inf" is text in JSON
                columns["id"] = values
            writer.write_table(pa.Table.from_pydict(columns, schema))


def _id_type(source: Path, journal: Journal, has_id: bool) -> Any:
    """The Arrow type of the ids: the input's own where it is a plain one, what holds them all, or string."""
    import pyarrow as pa

    if is_parquet(source):
        with open_parquet(source) as table:
            own = table.id_type()
        if own is None:
            return None
        is_plain = pa.types.is_integer(own) or pa.types.is_floating(own) or pa.types.is_boolean(own)
        return own if is_plain else pa.string()
    if not has_id:
        return None
    kinds = set()
    for result in journal.results("id IS NOT NULL"):
        value = _id(result)
        fits = not isinstance(value, int) or -(2**63) <= value < 2**63
        kinds.add(type(value) if fits else str)
    types = {int: pa.int64(), float: pa.float64(), bool: pa.bool_()}
    return types.get(kinds.pop(), pa.string()) if len(kinds) == 1 else pa.string()


def _text(value: Any) -> str | None:
    return None if value is None else writable(value if isinstance(value, str) else json.dumps(value))
