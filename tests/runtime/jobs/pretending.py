"""Files of rows, and engines that have no model, for the tests of jobs. Not a test file."""

import io
import json
import random
from collections.abc import Generator, Mapping
from pathlib import Path
from typing import Any

from PIL import Image
from tests.alone import optional

from m0kit.jobs.engine import Engine
from m0kit.jobs.rows import Scored
from m0kit.jobs.windows import Work

pa, pq = optional("pyarrow"), optional("pyarrow.parquet")

Rows = list[dict[str, Any]]
WORDS = ["small", "language", "models", "write", "markdown", "Wetter", "Oslo", "漢字", "x = 1"]


def write(path: Path, rows: Rows) -> Path:
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=7)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path


def read(path: Path) -> Rows:
    if path.suffix == ".parquet":
        rows: Rows = pq.read_table(path).to_pylist()
        return rows
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def texts(count: int, seed: int = 0) -> Rows:
    rng = random.Random(seed)
    documents = [" ".join(rng.choices(WORDS, k=rng.randint(1, 30))) for _ in range(count // 8 + 1)]
    return [
        {"id": f"r{i}", "query": " ".join(rng.choices(WORDS, k=3)), "document": rng.choice(documents)}
        for i in range(count)
    ]


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def leftovers(folder: Path) -> list[str]:
    """What a job leaves beside its output while it is not finished."""
    return sorted(path.name for path in folder.iterdir() if path.name.startswith("."))


def pretended(artifact: Path, load: Mapping[str, Any], work: Work) -> Generator[Scored | None, None, None]:
    """An engine without a model: a score told from the row's number, an error for each seventh."""
    for window in work:
        for row in reversed(window):
            if row.error or row.number % 7 == 6:
                yield Scored(row.number, row.id, None, None, None, row.error or "seventh")
            else:
                yield Scored(row.number, row.id, row.number / 1000, row.number / 8, None, None)
        yield None


class StoppedError(Exception):
    pass


def stopping(after: int, engine: Engine = pretended, error: Exception | None = None) -> Engine:
    """`engine`, which fails after so many results, with the `error`."""

    def stopped(artifact: Path, load: Mapping[str, Any], work: Work) -> Generator[Scored | None, None, None]:
        left = after
        for result in engine(artifact, load, work):
            if left == 0 and result is not None:
                raise error or StoppedError
            left -= result is not None
            yield result

    return stopped


def never(artifact: Path, load: Mapping[str, Any], work: Work) -> Generator[Scored | None, None, None]:
    raise AssertionError("there was nothing left to score")
    yield
