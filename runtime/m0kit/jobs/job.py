"""Scoring a large file of candidates into a file of scores, and going on after whatever stopped it.

    score_file("m0-int8", "candidates.jsonl", "scores.parquet", load={"threads": 4})

Owns the order of things, and who tries rows that may end a process. What a row is belongs to `m0kit.jobs.rows`, what
memory holds of them to `windows`, how they become scores to `engine`, or `ray_engine` on a cluster, what is done so far
to `journal`, the finished file to `output`. Results are committed about once a second to the journal beside the output
(`.scores.parquet.partial`), so that the same command, after a kill or a crash, goes on where it was. The output is
written aside and renamed once every row has its result; rows that cannot be scored are also listed in
`scores.parquet.errors.jsonl`. Parquet needs the extra m0kit[parquet]. One output never mixes scores of two kinds. A job
goes on only where the input and all of `dependencies` are as they were; a row whose image file is another one by then
is scored again. Threads, memory and the CPU may change: they move a score by rounding.
"""

import contextlib
import ctypes
import functools
import logging
import multiprocessing
import os
import pickle
import signal
import sys
import time
import warnings
from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

from m0kit.artifact.hub import resolve
from m0kit.errors import InputError, M0kitError, OutputError
from m0kit.files import destination
from m0kit.jobs.engine import Engine, dependencies, ended, local_engine
from m0kit.jobs.journal import FORMAT, Journal, Ranges
from m0kit.jobs.output import Summary, error_file, finish
from m0kit.jobs.parquet import PARQUET_NAMES, is_parquet, require_pyarrow
from m0kit.jobs.rows import Scored, count, identity
from m0kit.jobs.windows import Work
from m0kit.reading.lines import JSON_NAMES
from m0kit.terminal import bar, say

_log = logging.getLogger(__name__)
_Run = Callable[[Work], Generator[Scored | None, None, None]]  # an engine with its artifact and options
PROGRESS_S = 30.0
GRACE_S = 0.5  # who ends the whole job ends its processes within such a time


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
            with _progress(total, resumed, progress) as told:
                run = functools.partial(engine, artifact.absolute(), load)
                is_ours = not getattr(engine, "elsewhere", False)
                for result in _scored(run, source.absolute(), journal, done, is_ours):
                    if result is None:
                        journal.commit()
                        continue
                    if strict and result.error:
                        raise InputError(f"{source}: {result.error}")
                    told(journal.add(result))
            journal.commit()
        if identity(source).items() - facts.items():
            raise InputError(f"{source}: has changed while it was read. Start anew with --overwrite.")
        if changed := [name for name, value in dependencies(artifact, load).items() if value != needed[name]]:
            why = f"{' and '.join(changed)} changed while rows were scored"
            raise OutputError(f"{output}: not written, since {why}. Start anew with --overwrite.")
        if (missing := total - journal.count()) != 0:
            raise OutputError(f"{output}: {missing} of {total} rows have no result. Run the same command again.")
        return finish(journal, source, output, resumed)


def _check_places(source: Path, output: Path) -> None:
    for path, error in ((source, InputError), (output, OutputError)):
        if is_parquet(path):
            require_pyarrow(path)
        elif path.suffix.lower() not in JSON_NAMES:
            known = ", ".join((*JSON_NAMES, *PARQUET_NAMES))
            raise error(f"{path}: JSON lines or Parquet is told from the name, which must end with {known}. Rename it.")
    if not source.is_file():
        raise InputError(f"{source}: {'is not a file' if source.exists() else 'no such file'}. Give a file of pairs.")
    if output.is_dir():
        raise OutputError(f"{output}: is a folder. Give a file's name.")
    if not output.absolute().parent.is_dir():
        raise OutputError(f"{output.parent}: no such folder. Create it, or choose another place.")
    if destination(source) in (output, destination(error_file(output))):
        raise OutputError(f"{source}: is the file that is read. Choose another output.")


def _tell(journal: Journal) -> None:
    if journal.num_foreign:
        _log.warning(
            "%s: %d of its rows were written or changed by another hand than this job's, and are scored again.",
            journal.path,
            journal.num_foreign,
        )
    if not journal.is_lasting:
        _log.warning(
            "%s: there is no folder to keep the key in by which scores are known again: if this job is stopped, it can "
            "only begin anew. Set HOME or XDG_CACHE_HOME to a folder that may be written.",
            journal.path,
        )


# --- rows that end a process -------------------------------------------------------------------------


def _scored(run: _Run, source: Path, journal: Journal, done: Ranges, is_ours: bool) -> Iterator[Scored | None]:
    """The results of the rows that are left; first of those that earlier processes had in hand when they died."""
    can_fork = hasattr(os, "fork")
    left, is_whole = journal.suspects(), False
    while left[1] and is_ours:
        if condemned := journal.condemned():
            for (row,) in Work(source, _others(condemned), 1):
                yield ended(row)
        else:
            size, rows = left
            work = Work(source, _others(rows), size)
            is_whole = yield from (_forked if can_fork else _here)(run, work, journal, True)
        before, left = left, journal.suspects()
        done = journal.done()
        if is_whole and left == before:  # the engine leaves them out
            break
    yield from _here(run, Work(source, done), journal, False)


def _here(run: _Run, work: Work, journal: Journal, apart: bool) -> Generator[Scored | None, None, bool]:
    watched = replace(work, watch=lambda window: journal.begin([row.number for row in window], apart=apart))
    with contextlib.closing(run(watched)) as results:
        yield from results
    return True


def _forked(run: _Run, work: Work, journal: Journal, apart: bool) -> Generator[Scored | None, None, bool]:
    """What the engine makes of the work in a child of this process; returns whether that came to the end of it.

    That tells a row that ends its process from somebody who ends the job: then this process is gone as well.
    """
    receiver, sender = multiprocessing.Pipe(duplex=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of threads, on which the child does not depend
        child = os.fork()
    if child == 0:
        receiver.close()
        _be_child(run, work, sender)
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
    time.sleep(GRACE_S)
    in_hand = journal.in_hand()
    if not in_hand or signal_number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        raise M0kitError(
            f"the process in which rows are tried apart was ended (signal {signal_number}) before it came to one. "
            "See whether there is memory enough, then run the same command again."
        )
    journal.died(in_hand, apart=apart)
    return False


def _be_child(run: _Run, work: Work, sender: Any) -> NoReturn:
    try:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # the parent's to answer
            signal.signal(number, signal.SIG_IGN)
        if sys.platform == "linux":
            ctypes.CDLL(None).prctl(1, int(signal.SIGKILL))  # PR_SET_PDEATHSIG: not to outlive it
        watched = replace(work, watch=lambda window: sender.send(("window", [row.number for row in window])))
        for result in run(watched):
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
            time.sleep(GRACE_S)  # whoever closed its pipe is about to end
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


# --- progress ----------------------------------------------------------------------------------------


@contextlib.contextmanager
def _progress(total: int, resumed: int, shown: bool) -> Iterator[Callable[[int], None]]:
    """How far a job is, on stderr: a bar on a terminal, a line now and then elsewhere. It is told of rows done."""
    started = told = time.monotonic()
    done, in_lines = resumed, shown and not sys.stderr.isatty()
    before = f" ({resumed} from before)" if resumed else ""
    note = f"{resumed} rows from before" if resumed else ""
    with bar(total=total, initial=resumed, unit="row", desc=note, shown=shown) as drawn:

        def update(num_rows: int) -> None:
            nonlocal done, told
            done += num_rows
            drawn.update(num_rows)
            now = time.monotonic()
            if in_lines and now - told >= PROGRESS_S:
                told = now
                rate = (done - resumed) / (now - started)
                left = f", {(total - done) / rate / 60:.0f} min left" if rate else ""
                say(f"{done} of {total} rows{before}, {rate:.1f} rows/s{left}")

        yield update
