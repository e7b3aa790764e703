"""Scoring a large file of candidates into a file of scores, and going on after whatever stopped it.

    score_file("m0-int8", "candidates.jsonl", "scores.parquet", load={"threads": 4})

Owns the windows that bound memory and the finished file; what a row is belongs to `m0kit.rows`, what is done so far to
`m0kit.journal`, how rows become scores is an engine's: `local_engine` here, `m0kit.ray_engine` on a cluster. Results
are committed about once a second to the journal beside the output (`.scores.parquet.partial`), so that the same
command, after a kill or a crash, goes on where it was. The output is written
aside and renamed once every row has its result; rows that cannot be scored are also listed in
`scores.parquet.errors.jsonl`. Parquet needs the extra m0kit[parquet].

One output never mixes scores of two kinds. A job goes on only where the input and all of `dependencies` are as they
were; a row whose image file is another one by then is scored again. Threads, memory and the CPU may change: they move
a score by rounding.
"""

import contextlib
import functools
import itertools
import json
import os
import sys
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

import m0kit
from m0kit.artifact import read_manifest
from m0kit.errors import InputError, OutputError
from m0kit.files import destination, sync, sync_path
from m0kit.hub import resolve
from m0kit.inputs import unplaced
from m0kit.journal import FORMAT, Journal, Scored, file_stamp
from m0kit.lines import JSON_NAMES
from m0kit.reranker import Reranker
from m0kit.rows import PARQUET_NAMES, Row, count, identity, is_parquet, open_parquet, parquet, read
from m0kit.sessions import engine_version
from m0kit.store import Store

# What a window may hold: enough rows to meet most pairs of a document, little enough to stay in memory.
_WINDOW_ROWS = 8192
_WINDOW_BYTES = 256 << 20
# A window holds its images decoded: RGB at the published limit, 768 visual tokens of 28×28 pixels.
_IMAGE_BYTES = 768 * 28 * 28 * 3
_WRITE_ROWS = 1 << 16
_PROGRESS_S = 30.0


@dataclass(frozen=True, slots=True)
class Summary:
    """What a finished job did."""

    rows: int
    resumed: int  # of them were in the journal of an earlier run
    errors: int  # could not be scored
    truncated: int
    error_file: Path | None  # lists the errors, where there are any


@dataclass(frozen=True, slots=True)
class Work:
    """The rows that still need a score; iterating reads the file, window by window. Can be pickled.

    A window's rows stand by document, in the order in which the documents first appear.
    """

    source: Path
    done: Sequence[tuple[int, int]]  # half-open ranges of row numbers, ascending

    def __iter__(self) -> Iterator[list[Row]]:
        window: list[Row] = []
        contents: dict[_Key, Any] = {}  # equal ones are kept once
        num_bytes = 0
        for row in self._rows():
            keys = {name: _key(value) for name, value in row.pair.items()}
            cost = sum(_cost(key) for key in set(keys.values()) if key not in contents)
            if window and (len(window) == _WINDOW_ROWS or num_bytes + cost > _WINDOW_BYTES):
                yield _by_document(window)
                window, contents, num_bytes = [], {}, 0
                cost = sum(_cost(key) for key in set(keys.values()))
            pair = {
                name: value if (key := keys[name]) is None else contents.setdefault(key, value)
                for name, value in row.pair.items()
            }
            window.append(replace(row, pair=pair))
            num_bytes += cost
        if window:
            yield _by_document(window)

    def _rows(self) -> Iterator[Row]:
        done = iter([*self.done, (sys.maxsize, sys.maxsize)])
        start, end = next(done)
        for row in read(self.source, first=end if start == 0 else 0):
            while row.number >= end:
                start, end = next(done)
            if row.number < start:
                yield row


# (artifact, options of Reranker.load, work) → results in any order; None is a good moment to commit.
Engine = Callable[[Path, Mapping[str, Any], Work], Generator[Scored | None, None, None]]


def local_engine(artifact: Path, load: Mapping[str, Any], work: Work) -> Generator[Scored | None, None, None]:
    """Score in this process."""
    reranker = Reranker.load(artifact, **load)
    for window in work:
        yield from score_rows(reranker, window)
        yield None


def score_rows(reranker: Reranker, rows: Sequence[Row]) -> Iterator[Scored]:
    """The results of rows, in the order of the work."""
    readable = []
    for row in rows:
        if row.error is None:
            readable.append(row)
        else:
            yield Scored(row.number, row.id, None, None, None, _plain(row.error))
    stamp = functools.cache(file_stamp)
    files = [{str(path): stamp(path) for path in _image_files(row)} for row in readable]  # before they are read
    for position, result in reranker.stream([row.pair for row in readable]):
        row, named = readable[position], json.dumps(files[position]) if files[position] else None
        if result.error is None:
            cut = ",".join(result.truncated) or None
            yield Scored(row.number, row.id, result.score, result.logit, cut, None, named)
        else:
            message = f"{row.place}: {unplaced(result.error)[1]}"
            yield Scored(row.number, row.id, None, None, None, _plain(message), named)


def dependencies(artifact: Path, load: Mapping[str, Any]) -> dict[str, str]:
    """What scores depend on besides the input, with the options of Reranker.load: name → value.

    Versions of ONNX Runtime may round otherwise, and a page depends on what decodes it. Raises
    ArtifactError, StoreError, DependencyError.
    """
    manifest = read_manifest(artifact)
    kv, edition = load.get("kv"), None
    if load.get("index") is not None:
        with Store.open(load["index"]) as store:
            kv, edition = kv or store.identity.get("kv"), store.edition
    own_engine = load.get("open_graph")
    facts = {
        "the artifact": manifest.fingerprint,
        "the index": edition,
        "kv": kv or "fp32",
        "max_pixels": load.get("max_pixels") or manifest.model.image.max_pixels,
        "max_length": load.get("max_length") or manifest.model.prompt.max_length,
        "device": str(load.get("device") or "cpu").split(":")[0],
        "open_graph": own_engine and getattr(own_engine, "__qualname__", type(own_engine).__qualname__),
        "onnxruntime": engine_version(),
        "m0kit": m0kit.__version__,
        **{name: version(name) for name in ("pillow", "tokenizers")},
    }
    return {name: str(value) for name, value in facts.items()}


def score_file(
    artifact: str | os.PathLike[str],
    source: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    load: Mapping[str, Any] | None = None,
    engine: Engine = local_engine,
    overwrite: bool = False,
    strict: bool = False,
    progress: bool = False,
) -> Summary:
    """Score every row of `source` into `output`, going on where an earlier run of the same job was stopped.

    The same job is one whose input and `dependencies` are the same; another one's journal is refused.

    Formats go by the names: .jsonl (.ndjson) or .parquet (.pq). A row has `query` and `document`: a string is
    text, {"text": …} too, {"image": …} is a path relative to the file, a data URI, base64, bytes, or {"bytes",
    "path"}; null is absent, other keys are ignored. An `id` is carried through. The output has a row per row, in
    order: `row` (from 0), `id`, `score`, `logit` (float32), `truncated`, `error`, which begins with the line (or row).
    A row that cannot be scored costs only itself, or with `strict` stops the job.
    `artifact` may be a hub id; `load` are options of Reranker.load. An output that is a link means the file it leads
    to. `overwrite` replaces a finished output and a journal of another job; a job that was itself begun with it goes
    on.
    Raises OutputError, InputError, DependencyError, and what Reranker.load raises.
    """
    load = dict(load or {})
    artifact = resolve(artifact, load.pop("revision", None), what="artifact")
    source, output = Path(source), destination(Path(output))
    if load.get("index") is not None:
        load["index"] = Path(load["index"]).absolute()  # an engine may be in another folder
    _check_places(source, output)
    needed = dependencies(artifact, load)
    facts = {"the journal's format": FORMAT, **identity(source), **needed}
    with Journal(output, facts, overwrite) as journal:
        total = count(source)
        if strict:
            journal.forget_errors()  # they are tried again
        journal.forget_changed_files()
        done = journal.ranges()
        resumed = sum(end - start for start, end in done)
        if resumed < total:
            work = Work(source.absolute(), done)
            results = engine(artifact.absolute(), load, work)
            with contextlib.closing(results), _Progress(total, resumed, progress) as told:
                for result in results:
                    if result is None:
                        journal.commit()
                        continue
                    if strict and result.error:
                        raise InputError(f"{source}: {result.error}")
                    told.update(journal.add(result))
            journal.commit()
        if identity(source).items() - facts.items():
            raise InputError(f"{source}: has changed while it was read. Start anew with --overwrite.")
        if changed := [name for name, value in dependencies(artifact, load).items() if value != needed[name]]:
            why = f"{' and '.join(changed)} changed while rows were scored"
            raise OutputError(f"{output}: not written, since {why}. Start anew with --overwrite.")
        if (missing := total - journal.count()) != 0:
            raise OutputError(f"{output}: {missing} of {total} rows have no result. Run the same command again.")
        return _finish(journal, source, output, resumed)


# --- windows -----------------------------------------------------------------------------------------


_Key = tuple[str, str | bytes | Path] | None


def _key(value: Any) -> _Key:
    """What equal contents share: ("text" or "image", its source). None for what is neither."""
    if isinstance(value, str):
        value = {"text": value}
    elif isinstance(value, bytes):
        value = {"image": value}
    if not isinstance(value, Mapping) or len(value) != 1:
        return None
    ((kind, source),) = value.items()
    return (kind, source) if isinstance(source, str | bytes | Path) else None


def _cost(key: _Key) -> int:
    """Bytes that a content takes in memory, about."""
    if key is None:
        return 0
    kind, source = key
    return (0 if isinstance(source, Path) else len(source)) + (_IMAGE_BYTES if kind == "image" else 0)


def _by_document(window: Sequence[Row]) -> list[Row]:
    groups: dict[Any, list[Row]] = {}
    for row in window:
        groups.setdefault(_key(row.pair.get("document")), []).append(row)
    return [row for group in groups.values() for row in group]


def _image_files(row: Row) -> Iterator[Path]:
    for content in row.pair.values():
        image = content.get("image") if isinstance(content, Mapping) else None
        if isinstance(image, Path):
            yield image


# --- the finished file -------------------------------------------------------------------------------


def error_file(output: Path) -> Path:
    """Where the rows that could not be scored are listed."""
    return output.with_name(f"{output.name}.errors.jsonl")


def _check_places(source: Path, output: Path) -> None:
    for path, error in ((source, InputError), (output, OutputError)):
        if is_parquet(path):
            parquet(path)
        elif path.suffix.lower() not in JSON_NAMES:
            known = ", ".join((*JSON_NAMES, *PARQUET_NAMES))
            raise error(f"{path}: JSON lines or Parquet is told from the name, which must end with {known}. Rename it.")
    if not source.is_file():
        raise InputError(f"{source}: {'is not a file' if source.exists() else 'no such file'}. Give a file of pairs.")
    if output.is_dir():
        raise OutputError(f"{output}: is a folder. Give a file's name.")
    if not output.absolute().parent.is_dir():
        raise OutputError(f"{output.parent}: no such folder. Create it, or choose another place.")
    if source.resolve() in (output.resolve(), error_file(output).resolve()):
        raise OutputError(f"{source}: is the file that is read. Choose another output.")


def _finish(journal: Journal, source: Path, output: Path, resumed: int) -> Summary:
    """Write the output aside, put it in its place, delete the journal."""
    num_errors = journal.count("error IS NOT NULL")
    listed = error_file(output)
    # Before the output: whoever sees that has the right list beside it.
    if num_errors:
        with _written_aside(listed) as file:
            for result in journal.results("error IS NOT NULL"):
                line = {"row": result.number, "id": json.loads(result.id or "null"), "error": result.error}
                file.write(json.dumps(line, allow_nan=False).encode() + b"\n")
    else:
        listed.unlink(missing_ok=True)
    has_id = journal.count("id IS NOT NULL") > 0
    with _written_aside(output, journal) as file:
        if is_parquet(output):
            _write_parquet(file, journal, _id_type(source, journal, has_id))
        else:
            _write_json(file, journal.results(), has_id)
    summary = Summary(
        journal.count(),
        resumed,
        num_errors,
        journal.count("truncated IS NOT NULL"),
        listed if num_errors else None,
    )
    journal.delete()
    return summary


@contextlib.contextmanager
def _written_aside(path: Path, journal: Journal | None = None) -> Iterator[Any]:
    """A new file that takes the name when the block ends well, and vanishes when not."""
    aside = path.with_name(f".{path.name}.unfinished")
    try:
        with aside.open("wb") as file:
            yield file
            file.flush()
            sync(file.fileno())
        if journal is not None:
            journal.claim_output()
        os.replace(aside, path)
        sync_path(path.absolute().parent)
    except OutputError:
        raise
    except OSError as error:
        raise OutputError(
            f"{path}: cannot be written ({os.strerror(error.errno or 0)}). No score is lost: see to space and "
            "permissions there, then run the same command again."
        ) from error
    finally:
        with contextlib.suppress(OSError):
            aside.unlink(missing_ok=True)


def _write_json(file: Any, results: Iterable[Scored], has_id: bool) -> None:
    for result in results:
        line = {
            "row": result.number,
            **({"id": json.loads(result.id or "null")} if has_id else {}),
            "score": _float32(result.score),
            "logit": _float32(result.logit),
            "truncated": result.truncated,
            "error": result.error,
        }
        file.write(json.dumps(line, allow_nan=False).encode() + b"\n")


def _float32(value: float | None) -> float | None:
    """The shortest number that is the same in float32."""
    return None if value is None else float(str(np.float32(value)))


def _write_parquet(file: Any, journal: Journal, id_type: Any) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    ids = [] if id_type is None else [("id", id_type)]
    schema = pa.schema(
        [("row", pa.int64()), *ids, ("score", pa.float32()), ("logit", pa.float32()), ("truncated", pa.string()),
         ("error", pa.string())]
    )  # fmt: skip
    with pq.ParquetWriter(file, schema) as writer:
        results = journal.results()
        while chunk := list(itertools.islice(results, _WRITE_ROWS)):
            columns: dict[str, list[Any]] = {
                "row": [r.number for r in chunk],
                "score": [r.score for r in chunk],
                "logit": [r.logit for r in chunk],
                "truncated": [r.truncated for r in chunk],
                "error": [r.error for r in chunk],
            }
            if id_type is not None:
                values = [json.loads(r.id or "null") for r in chunk]
                columns["id"] = [_text(v) for v in values] if pa.types.is_string(id_type) else values
            writer.write_table(pa.Table.from_pydict(columns, schema))


def _id_type(source: Path, journal: Journal, has_id: bool) -> Any:
    """The Arrow type of the ids: the input's own where it is a plain one, what holds them all, or string."""
    import pyarrow as pa

    if is_parquet(source):
        file, columns = open_parquet(source)
        with file:
            if "id" not in columns:
                return None
            own = file.schema_arrow.field("id").type
        is_plain = pa.types.is_integer(own) or pa.types.is_floating(own) or pa.types.is_boolean(own)
        return own if is_plain else pa.string()
    if not has_id:
        return None
    kinds = set()
    for result in journal.results("id IS NOT NULL"):
        value = json.loads(result.id or "null")
        fits = not isinstance(value, int) or -(2**63) <= value < 2**63
        kinds.add(type(value) if fits else str)
    types = {int: pa.int64(), float: pa.float64(), bool: pa.bool_()}
    return types.get(kinds.pop(), pa.string()) if len(kinds) == 1 else pa.string()


def _text(value: Any) -> str | None:
    return None if value is None else _plain(value if isinstance(value, str) else json.dumps(value))


def _plain(text: str) -> str:
    """Text that UTF-8 can write."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


# --- progress ----------------------------------------------------------------------------------------


class _Progress:
    """How far a job is: a bar on a terminal, a line now and then elsewhere, on stderr."""

    def __init__(self, total: int, resumed: int, shown: bool) -> None:
        self._total, self._done, self._resumed = total, resumed, resumed
        self._started = self._told = time.monotonic()
        self._lines = shown and not sys.stderr.isatty()
        note = f"{resumed} rows from before" if resumed else None
        self._bar = tqdm(total=total, initial=resumed, unit="row", desc=note, disable=not shown or self._lines)

    def update(self, num_rows: int) -> None:
        self._done += num_rows
        self._bar.update(num_rows)
        now = time.monotonic()
        if self._lines and now - self._told >= _PROGRESS_S:
            self._told = now
            rate = (self._done - self._resumed) / (now - self._started)
            left = f", {(self._total - self._done) / rate / 60:.0f} min left" if rate else ""
            before = f" ({self._resumed} from before)" if self._resumed else ""
            print(f"{self._done} of {self._total} rows{before}, {rate:.1f} rows/s{left}", file=sys.stderr, flush=True)

    def __enter__(self) -> "_Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()
