"""Scoring a large file of candidates into a file of scores, and going on after whatever stopped it.

    score_file("m0-int8", "candidates.jsonl", "scores.parquet", load={"threads": 4})

Owns the windows that bound memory and the finished file; what a row is belongs to `m0kit.jobs.rows`, what is done so
far to `m0kit.jobs.journal`, how rows become scores is an engine's: `local_engine` here, `m0kit.jobs.ray_engine` on a
cluster. Results are committed about once a second to the journal beside the output (`.scores.parquet.partial`), so
that the same command, after a kill or a crash, goes on where it was. The output is written aside and renamed once
every row has its result; rows that cannot be scored are also listed in `scores.parquet.errors.jsonl`. Parquet needs
the extra m0kit[parquet]. One output never mixes scores of two kinds. A job goes on only where the input and all of
`dependencies` are as they were; a row whose image file is another one by then is scored again. Threads, memory and
the CPU may change: they move a score by rounding.
"""

import contextlib
import ctypes
import functools
import itertools
import json
import multiprocessing
import os
import pickle
import signal
import sys
import time
import warnings
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from tqdm import tqdm

import m0kit
from m0kit.artifact.hub import resolve
from m0kit.artifact.manifest import read_manifest
from m0kit.errors import (
    ArtifactError,
    DependencyError,
    DeviceError,
    InputError,
    M0kitError,
    OutputError,
    StoreError,
    is_panic,
)
from m0kit.files import OWN, destination, named_errors, sync, sync_path
from m0kit.jobs.journal import FORMAT, Journal, Ranges, Scored, file_stamp
from m0kit.jobs.rows import PARQUET_NAMES, Row, count, identity, is_parquet, open_parquet, parquet, read
from m0kit.keeping.store import Store
from m0kit.reading.lines import JSON_NAMES
from m0kit.reranker import Reranker
from m0kit.scoring.sessions import engine_version
from m0kit.terminal import say

# What a window may hold: enough rows to meet most pairs of a document, little enough to stay in memory.
_WINDOW_ROWS = 8192
_WINDOW_BYTES = 256 << 20
# A window holds its images decoded: RGB at the published limit, 768 visual tokens of 28×28 pixels.
_IMAGE_BYTES = 768 * 28 * 28 * 3
_WRITE_ROWS = 1 << 16
_PROGRESS_S = 30.0
_GRACE_S = 0.5  # who ends the whole job ends its processes within such a time
_ENDED = (
    "the process was ended while this row was scored (twice). See to its text or image, or score it on a machine "
    "with more memory."
)


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
    size: int | None = None  # rows of a window, at most
    watch: Callable[[list[Row]], object] | None = None  # told of a window before it is given; stays in this process

    def __reduce__(self) -> tuple[Any, ...]:
        return Work, (self.source, self.done, self.size)

    def __iter__(self) -> Iterator[list[Row]]:
        for window in self._windows():
            if self.watch is not None:
                self.watch(window)
            yield window

    def _windows(self) -> Iterator[list[Row]]:
        most = min(_WINDOW_ROWS, self.size or _WINDOW_ROWS)
        window: list[Row] = []
        contents: dict[_Key, Any] = {}  # equal ones are kept once
        num_bytes = 0
        for row in self._rows():
            keys = {name: _key(value) for name, value in row.pair.items()}
            cost = sum(_cost(key) for key in set(keys.values()) if key not in contents)
            if window and (len(window) == most or num_bytes + cost > _WINDOW_BYTES):
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
            elif end == sys.maxsize:
                return


# (artifact, options of Reranker.load, work) → results in any order; None is a good moment to commit. Where a process
# died, the engine is also run in a forked child, unless it has an attribute `elsewhere`, which says that it scores in
# other processes, whose end is its own business.
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
    yield from _isolated(reranker, readable)


def _isolated(reranker: Reranker, rows: Sequence[Row]) -> Iterator[Scored]:
    """The results of rows that could be read; what a library raises on one of them is that row's error."""
    stamp = functools.cache(file_stamp)
    files = [{str(path): stamp(path) for path in _image_files(row)} for row in rows]  # before they are read
    named = [json.dumps(stamps) if stamps else None for stamps in files]
    left = dict.fromkeys(range(len(rows)))
    try:
        for position, result in reranker.stream([row.pair for row in rows]):
            row = rows[position]
            del left[position]
            if result.error is None:
                cut = ",".join(result.truncated) or None
                yield Scored(row.number, row.id, result.score, result.logit, cut, None, named[position])
            else:
                message = f"{row.place}: {result.error.said}"
                yield Scored(row.number, row.id, None, None, None, _plain(message), named[position])
    except BaseException as error:  # an input is data, and nothing that it makes a library do may stop a job
        if not left or not _may_be_of_a_row(error):
            raise
        failed = error.with_traceback(None)  # which holds what filled the memory
    if not left:
        return
    try:
        reranker.score([("a", "a")])
    except Exception:
        raise failed from None  # it was no row: nothing can be scored
    if len(left) > 1:
        rest = [rows[position] for position in left]
        for part in (rest[: len(rest) // 2], rest[len(rest) // 2 :]):
            yield from _isolated(reranker, part)
    else:
        (position,) = left
        row, why = rows[position], _reason(failed)
        yield Scored(row.number, row.id, None, None, None, _plain(f"{row.place}: {why}"), named[position])


def _may_be_of_a_row(error: BaseException) -> bool:
    """Not what is wrong with the artifact, the index or the machine, and not an interruption."""
    if isinstance(error, ArtifactError | StoreError | OutputError | DeviceError | DependencyError):
        return False
    return isinstance(error, Exception) or is_panic(error)


def _reason(error: BaseException) -> str:
    if isinstance(error, M0kitError):
        return str(error)
    if isinstance(error, MemoryError):
        return "there is not enough memory for it. Shorten the text, or shrink the image."
    return f"it cannot be scored ({type(error).__name__})."


def dependencies(artifact: Path, load: Mapping[str, Any]) -> dict[str, str]:
    """What scores depend on besides the input, with the options of Reranker.load: name → value.

    Versions of ONNX Runtime may round otherwise, and a page depends on what decodes it. Raises
    ArtifactError, StoreError, DependencyError.
    """
    manifest = read_manifest(artifact, require_signature=load.get("require_signature"))
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
        done = journal.resume(strict=strict)
        _tell(journal)
        resumed = sum(end - start for start, end in done)
        if resumed < total:
            with _Progress(total, resumed, progress) as told:
                for result in _scored(engine, artifact.absolute(), load, source.absolute(), journal, done):
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


# --- rows that end a process -------------------------------------------------------------------------


def _tell(journal: Journal) -> None:
    if journal.num_foreign:
        warnings.warn(
            f"{journal.path}: {journal.num_foreign} of its rows were written or changed by another hand than this "
            "job's, and are scored again.",
            stacklevel=3,
        )
    if not journal.is_lasting:
        warnings.warn(
            f"{journal.path}: there is no folder to keep the key in by which scores are known again: if this job is "
            "stopped, it can only begin anew. Set HOME or XDG_CACHE_HOME to a folder that may be written.",
            stacklevel=3,
        )


def ended(row: Row) -> Scored:
    """The result of a row that ends each process it is scored in."""
    return Scored(row.number, row.id, None, None, None, _plain(f"{row.place}: {_ENDED}"))


def _scored(
    engine: Engine, artifact: Path, load: Mapping[str, Any], source: Path, journal: Journal, done: Ranges
) -> Iterator[Scored | None]:
    """The results of the rows that are left; first of those that earlier processes had in hand when they died."""
    can_fork = hasattr(os, "fork")
    left, is_whole = journal.suspects(), False
    while left[1] and not getattr(engine, "elsewhere", False):
        if condemned := journal.condemned():
            for (row,) in Work(source, _others(condemned), 1):
                yield ended(row)
        else:
            size, rows = left
            work = Work(source, _others(rows), size)
            is_whole = yield from (_forked if can_fork else _here)(engine, artifact, load, work, journal, True)
        before, left = left, journal.suspects()
        done = journal.done()
        if is_whole and left == before:  # the engine leaves them out
            break
    yield from _here(engine, artifact, load, Work(source, done), journal, False)


def _here(
    engine: Engine, artifact: Path, load: Mapping[str, Any], work: Work, journal: Journal, apart: bool
) -> Generator[Scored | None, None, bool]:
    watched = replace(work, watch=lambda window: journal.begin([row.number for row in window], apart=apart))
    with contextlib.closing(engine(artifact, load, watched)) as results:
        yield from results
    return True


def _forked(
    engine: Engine, artifact: Path, load: Mapping[str, Any], work: Work, journal: Journal, apart: bool
) -> Generator[Scored | None, None, bool]:
    """What the engine makes of the work in a child of this process; returns whether that came to the end of it.

    That tells a row that ends its process from somebody who ends the job: then this process is gone as well.
    """
    receiver, sender = multiprocessing.Pipe(duplex=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of threads, on which the child does not depend
        child = os.fork()
    if child == 0:
        receiver.close()
        _be_child(engine, artifact, load, work, sender)
    sender.close()
    signal_number, is_whole = 0, False
    try:
        with contextlib.suppress(EOFError):
            while not is_whole:
                kind, said = receiver.recv()
                if kind == "window":
                    journal.begin(said, apart=apart)
                elif kind == "error":
                    raise said
                elif kind == "result":
                    yield said
                else:
                    is_whole = True
    finally:
        receiver.close()
        signal_number = _end_of(child, is_whole)
    if is_whole:
        return True
    time.sleep(_GRACE_S)
    in_hand = journal.in_hand()
    if not in_hand or signal_number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        raise M0kitError(
            f"the process in which rows are tried apart was ended (signal {signal_number}) before it came to one. "
            "See whether there is memory enough, then run the same command again."
        )
    journal.died(in_hand, apart=apart)
    return False


def _be_child(engine: Engine, artifact: Path, load: Mapping[str, Any], work: Work, sender: Any) -> NoReturn:
    try:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # the parent's to answer
            signal.signal(number, signal.SIG_IGN)
        if sys.platform == "linux":
            ctypes.CDLL(None).prctl(1, int(signal.SIGKILL))  # PR_SET_PDEATHSIG: not to outlive it
        watched = replace(work, watch=lambda window: sender.send(("window", [row.number for row in window])))
        for result in engine(artifact, load, watched):
            sender.send(("result", result))
        sender.send(("end", None))
    except BaseException as error:
        with contextlib.suppress(BaseException):
            sender.send(("error", _portable(error)))
    finally:
        os._exit(0)


def _portable(error: BaseException) -> BaseException:
    try:
        same: BaseException = pickle.loads(pickle.dumps(error))
    except Exception:  # whatever its parts raise
        return M0kitError(f"{type(error).__name__}: {error}")
    return same


def _end_of(child: int, is_whole: bool) -> int:
    """The signal that ended it, or 0; one that has more to say than anybody reads is ended here."""
    try:
        ended, status = os.waitpid(child, 0 if is_whole else os.WNOHANG)
        if not ended:
            time.sleep(_GRACE_S)  # whoever closed its pipe is about to end
            ended, status = os.waitpid(child, os.WNOHANG)
        if not ended:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return 0
    except (ChildProcessError, ProcessLookupError):  # somebody else has waited for it
        return 0
    return os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0


def _others(ranges: Ranges) -> Ranges:
    """All numbers that are not in these."""
    bounds = [0, *(bound for pair in ranges for bound in pair), sys.maxsize]
    return [(start, end) for start, end in zip(bounds[::2], bounds[1::2], strict=True) if start < end]


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
    if destination(source) in (destination(output), destination(error_file(output))):
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
        with named_errors(listed):
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
        aside.unlink(missing_ok=True)  # a link that lies there is not followed
        with open(os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL | OWN, 0o666), "wb") as file:
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
            say(f"{self._done} of {self._total} rows{before}, {rate:.1f} rows/s{left}")

    def __enter__(self) -> "_Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()
