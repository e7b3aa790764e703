"""The work of all requests, on one thread: who is let in, whose turn it is, and what becomes of it.

Owns admission by cost before any work, fairness between requests, deadlines and cancelling. What is run together is
the schedule's: here it is kept filled with a run or two, so that who comes late waits for no more than those.

    desk = Desk(observer, queue_s=60)
    desk.open(lane)
    async for outcomes in desk.work(lane, tasks, deadline):    # RequestError where there is too much already
        ...                                                    # leaving early cancels what is left

Requests take turns by the work they were given, not by their number (start-time fair queueing: Goyal, Vin and Cheng
1996): each pair is worth its cost in tokens, and the request that has been given least is next, a new one at once.
Pairs on one document go together, whoever asked: its state is computed once.
"""

import asyncio
import contextlib
import heapq
import itertools
import logging
import math
import os
import threading
import time
from collections import Counter, defaultdict, deque
from collections.abc import AsyncGenerator, Callable, Hashable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Final, Literal, Protocol

from m0kit.errors import (
    DeviceLostError,
    InputError,
    M0kitError,
    PoolFullError,
    StoreError,
    WrongAnswerError,
    is_panic,
)
from m0kit.index import stored_form
from m0kit.keeping.store import StoredDocument
from m0kit.reading.inputs import Known, Pair
from m0kit.scoring.ahead import prepared_and_drawn
from m0kit.scoring.engine import RunStats, not_finite
from m0kit.scoring.planner import pack
from m0kit.scoring.prepare import Document, Prepared
from m0kit.scoring.schedule import Result, Schedule
from m0kit.server.lane import Lane, Task, refused
from m0kit.server.problems import RequestError
from m0kit.server.writer import Writer

_log: Final = logging.getLogger(__name__)
# Throughput is that of the last so many seconds of work: a minute of pages says little of an hour ago.
_MEMORY_S: Final = 60.0
# Cost a second that is believed in before any was measured: that of a fair CPU.
_FIRST_RATE: Final = 1000.0
# Bytes of states that were computed and wait to be written.
_MAX_UNWRITTEN: Final = 256 << 20
_FAILED: Final = "the model could not be run on this request; the server's log says why. Try again later."


# Reading images and texts; runs of documents alone; runs with pairs.
Stage = Literal["prepare", "prefix", "suffix"]


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a task of a request."""

    position: int
    result: Result | None = None  # of a pair
    status: str = ""  # of a document for the index: "read", "known", "replaced"
    tokens: int = 0  # of the prompt, or the document
    cached: bool = False  # the document's state was there
    seconds: float = 0.0  # since its turn came
    error: RequestError | None = None  # of a document for the index: it costs the others nothing


class Observer(Protocol):
    """Who is told of the work: `m0kit.server.metrics`."""

    def waited(self, seconds: float) -> None:
        """A request's first task had its turn after so long."""

    def stage(self, stage: Stage, seconds: float) -> None:
        """One of these took so long once."""

    def batch(self, tokens: int, most: int) -> None:
        """A run of the decoder computed so many tokens, of those that it may have."""

    def documents(self, kind: Literal["text", "image"], count: int = 1) -> None:
        """Documents were answered, or read."""

    def tokens(self, kind: Literal["text", "visual"], count: int) -> None:
        """Tokens of prompts that were answered, and documents that were read."""


@dataclass(eq=False, slots=True)
class _Job:
    """One request's work."""

    tasks: deque[tuple[int, Task]]
    tell: Callable[[list[Outcome] | RequestError], None]  # from any thread
    begun: float
    cost: int  # of what is not done
    left: int
    documents: Counter[Hashable]  # keys of those in `tasks`
    is_over: bool = False
    has_waited: bool = False
    tickets: set[int] = field(default_factory=set)  # in the schedule


@dataclass(eq=False, slots=True)
class _Turn:
    """A task whose turn came."""

    job: _Job
    position: int
    task: Task
    begun: float
    rows: int = 0  # of runs to come, as counted in the line
    cached: bool = False
    document: Document | None = None
    stored: StoredDocument | None = None
    tokens: int = 0
    visual: int = 0  # of them of images


class _Line:
    """What waits for one artifact. All but `queued` belongs to the thread that runs."""

    def __init__(self, lane: Lane) -> None:
        self.lane, self.engine = lane, lane.reranker.engine
        _, self.schedule = lane.reranker.begin()
        self.writer = Writer(lane.writer) if lane.writer is not None else None
        self.queued = 0  # cost of all that was let in and is not done
        self.rate = _Rate()
        self.num_jobs = 0
        self.since = 0.0  # time that is not counted in the rate yet, while there is a job
        self.clock = 0.0
        self.turns: list[tuple[float, int, _Job]] = []  # a heap: who was given least is first
        self.same: defaultdict[Hashable, set[_Job]] = defaultdict(set)  # jobs with a task on the document
        self.preparing: set[_Turn] = set()
        self.tickets: dict[int, _Turn] = {}
        self.rows = 0  # of runs to come, of all whose turn came
        self.counted: dict[Document, int] = {}  # how many of them wait for a state, counted once
        self.reads: deque[_Turn] = deque()
        self.unwritten = 0  # bytes
        self.is_reads_turn = False
        self.is_lost = False

    @property
    def has_room(self) -> bool:
        """Whether another task may have its turn: what was given out fills less than the runs to come."""
        ahead = 4 * self.engine.prepare_threads if self.engine.prepare_threads > 1 else 2
        most = self.engine.rows * (1 + self.engine.runs_ahead)
        return self.rows < most and len(self.preparing) < ahead and self.unwritten < _MAX_UNWRITTEN


class _Rate:
    """Cost that is done in a second of work, lately."""

    def __init__(self) -> None:
        self._cost = self._seconds = 0.0

    def add(self, cost: float, seconds: float) -> None:
        keep = math.exp(-seconds / _MEMORY_S)
        self._cost = self._cost * keep + cost
        self._seconds = self._seconds * keep + seconds

    @property
    def value(self) -> float:
        return self._cost / self._seconds if self._cost > 0 else _FIRST_RATE


class Desk:
    """Takes in the work of requests. Methods that are async belong to one event loop; `close` ends the threads."""

    def __init__(self, observer: Observer, *, queue_s: float, threads: int | None = None) -> None:
        """`queue_s`: how long what is let in may have to wait for its end; `threads` prepare pairs."""
        self._observer, self._queue_s = observer, queue_s
        self._lines: dict[Lane, _Line] = {}
        self._lock = threading.Condition()
        self._jobs: set[_Job] = set()
        self._new: list[tuple[_Line, _Job]] = []
        self._left: list[tuple[_Line, _Job]] = []
        self._ready: list[tuple[_Line, _Turn, Prepared | RequestError | BaseException]] = []
        self._calls: list[Callable[[], None]] = []
        self._serial = itertools.count()
        self._is_open, self._is_closed = True, False
        threads = threads or max(2, min(8, (os.cpu_count() or 2)))
        self._pool = ThreadPoolExecutor(threads, "m0kit-prepare")
        self._thread = threading.Thread(target=self._run, name="m0kit-runs", daemon=True)
        self._thread.start()

    # --- for the event loop ------------------------------------------------------------------------------

    def open(self, lane: Lane) -> None:
        """Take in work on an artifact from now on."""
        line = _Line(lane)

        def ran(stats: RunStats) -> None:
            self._observer.batch(stats.rows, line.engine.rows)
            self._observer.stage("suffix" if stats.pairs else "prefix", stats.seconds)

        if hasattr(line.engine, "on_run"):
            line.engine.on_run = ran
        with self._lock:
            self._lines[lane] = line

    @property
    def num_requests(self) -> int:
        """Those that were let in and have no end yet."""
        return len(self._jobs)

    @property
    def num_queued(self) -> int:
        """Their work, in tokens of the decoder, about."""
        return sum(line.queued for line in list(self._lines.values()))

    @property
    def queued_s(self) -> float:
        """The time that it will take, about."""
        return self._seconds_of(0, None)

    def schedule_of(self, lane: Lane) -> Schedule:
        """What it keeps filled for an artifact: for those who watch its runs."""
        return self._lines[lane].schedule

    def is_lost(self, lane: Lane) -> bool:
        """Whether nothing more can be run on it in this process."""
        return self._lines[lane].is_lost

    @property
    def is_open(self) -> bool:
        """Whether anybody is let in."""
        return self._is_open

    def shut(self) -> None:
        """Let nobody in any more; what was let in is done."""
        self._is_open = False

    async def work(self, lane: Lane, tasks: Sequence[Task], deadline: float) -> AsyncGenerator[list[Outcome]]:
        """Outcomes of all tasks as they come. `deadline`: of the event loop's clock.

        Raises RequestError: before any work OVERLOADED and others, later DEADLINE_EXCEEDED, INVALID_INPUT of a pair
        that cannot be scored, ENGINE_FAILED.
        """
        loop = asyncio.get_running_loop()
        found: asyncio.Queue[list[Outcome] | RequestError] = asyncio.Queue()

        def tell(what: list[Outcome] | RequestError) -> None:
            with contextlib.suppress(RuntimeError):  # the loop has ended
                loop.call_soon_threadsafe(found.put_nowait, what)

        line, job = self._admit(lane, tasks, tell)
        left = len(tasks)
        try:
            while left:
                try:
                    async with asyncio.timeout_at(deadline):
                        outcomes = await found.get()
                except TimeoutError:
                    raise RequestError(
                        "DEADLINE_EXCEEDED",
                        f"{len(tasks) - left} of {len(tasks)} documents were done in the time a request may take. What "
                        "was read is kept while there is room: ask again, or for fewer documents.",
                        retry_after_s=1,
                    ) from None
                if isinstance(outcomes, RequestError):
                    raise outcomes
                left -= len(outcomes)
                yield outcomes
        finally:
            if left:
                self._cancel(line, job)

    def _admit(
        self, lane: Lane, tasks: Sequence[Task], tell: Callable[[list[Outcome] | RequestError], None]
    ) -> tuple[_Line, _Job]:
        cost = sum(task.cost for task in tasks)
        with self._lock:
            line = self._lines[lane]
            if not self._is_open:
                raise RequestError("STOPPING", "the server is stopping. Ask another, or later.", retry_after_s=5)
            if line.is_lost:
                raise _lost()
            seconds = self._seconds_of(cost, line)
            if self._jobs and seconds > self._queue_s:
                wait = seconds - self._queue_s
                raise RequestError(
                    "OVERLOADED",
                    f"with this request the server has work for {seconds:.0f} s, and {self._queue_s:g} is its limit. "
                    f"Try again in {math.ceil(wait)} s.",
                    retry_after_s=wait,
                )
            documents = Counter(task.key for task in tasks)
            job = _Job(deque(enumerate(tasks)), tell, time.monotonic(), cost, len(tasks), documents)
            self._jobs.add(job)
            line.queued += cost
            self._new.append((line, job))
            self._lock.notify()
        return line, job

    def _seconds_of(self, cost: int, line: _Line | None) -> float:
        """Until all that waits would be done, with `cost` more on a line."""
        lines = list(self._lines.values())
        return sum((one.queued + (cost if one is line else 0)) / one.rate.value for one in lines)

    def _cancel(self, line: _Line, job: _Job) -> None:
        with self._lock:
            self._left.append((line, job))
            self._lock.notify()

    def remove(self, lane: Lane, ids: Iterable[str]) -> "Future[list[str]]":
        """Take documents out of the index; gives the ids that were not there. Raises RequestError."""
        line = self._lines[lane]
        if line.writer is None:
            raise not_writable(lane)
        return line.writer.remove(list(ids))

    def close(self) -> None:
        """End the threads. What is not done is told so; what is being run ends first."""
        with self._lock:
            self._is_open, self._is_closed = False, True
            self._lock.notify()
        self._thread.join()
        self._pool.shutdown(cancel_futures=True)
        for line in self._lines.values():
            if line.writer is not None:
                line.writer.close()

    # --- the thread that runs ----------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            self._run_until_closed()
        except (
            BaseException
        ) as error:  # a mistake of ours, or a library's panic; who waits must hear of it, and this process must end
            _log.critical("the thread that runs has ended", exc_info=error)
            with self._lock:
                for line in self._lines.values():
                    line.is_lost = True
        why = RequestError("STOPPING", "the server has stopped. Ask another, or later.", retry_after_s=5)
        with self._lock:
            self._is_open, left = False, list(self._jobs)
        for job in left:
            job.tell(why)
        for line in self._lines.values():
            with contextlib.suppress(Exception):
                line.schedule.close()

    def _run_until_closed(self) -> None:
        while True:
            with self._lock:
                while not (self._is_closed or self._has_news() or any(map(_has_work, self._lines.values()))):
                    self._lock.wait()
                if self._is_closed:
                    return
                new, self._new = self._new, []
                left, self._left = self._left, []
                ready, self._ready = self._ready, []
                calls, self._calls = self._calls, []
                lines = list(self._lines.values())
            for call in calls:
                call()
            for line, job in new:
                self._enter(line, job)
            for line, job in left:
                self._end(line, job)
            for line, turn, prepared in ready:
                self._prepared(line, turn, prepared)
            for line in lines:
                self._feed(line)
                if _can_run(line):
                    self._step(line)

    def _has_news(self) -> bool:
        return bool(self._new or self._left or self._ready or self._calls)

    def _call(self, function: Callable[[], None]) -> None:
        """Have something done by the thread that runs."""
        with self._lock:
            self._calls.append(function)
            self._lock.notify()

    def _enter(self, line: _Line, job: _Job) -> None:
        if not line.num_jobs:
            line.since = time.monotonic()
        line.num_jobs += 1
        if line.is_lost:
            self._fail(line, job, _lost())
            return
        for key in job.documents:
            line.same[key].add(job)
        heapq.heappush(line.turns, (line.clock, next(self._serial), job))

    def _feed(self, line: _Line) -> None:
        """Give turns while runs have room."""
        while line.turns and line.has_room:
            tag, _, job = heapq.heappop(line.turns)
            if job.is_over or not job.tasks:
                continue
            line.clock = max(line.clock, tag)
            position, task = job.tasks.popleft()
            if job.tasks:
                heapq.heappush(line.turns, (line.clock + max(task.cost, 1), next(self._serial), job))
            self._give(line, job, position, task)
            for other in list(line.same.get(task.key, ())):
                self._join(line, other, task.key)

    def _join(self, line: _Line, job: _Job, key: Hashable) -> None:
        """Give the tasks of a request on the same document their turn too: its state will be there."""
        joining = [one for one in job.tasks if one[1].key == key]
        job.tasks = deque(one for one in job.tasks if one[1].key != key)
        for position, task in joining:
            self._give(line, job, position, task)

    def _give(self, line: _Line, job: _Job, position: int, task: Task) -> None:
        now = time.monotonic()
        if not job.has_waited:
            job.has_waited = True
            self._observer.waited(now - job.begun)
        job.documents[task.key] -= 1
        if not job.documents[task.key]:
            self._forget(line, job, task.key)
        turn = _Turn(job, position, task, now, rows=task.rows)
        line.rows += turn.rows
        if isinstance(task.content, Pair) and task.preparer.is_quick(task.content):
            try:
                found = _prepare(line, turn)
            except BaseException as error:  # as of one that a pool's thread prepares: it costs its own request alone
                if not (isinstance(error, Exception) or is_panic(error)):
                    raise
                found = error
            self._prepared(line, turn, found)
            return
        line.preparing.add(turn)

        def done(future: "Future[Any]") -> None:
            error = future.exception()
            with self._lock:
                self._ready.append((line, turn, error if error is not None else future.result()))
                self._lock.notify()

        self._pool.submit(_prepare, line, turn).add_done_callback(done)

    def _forget(self, line: _Line, job: _Job, key: Hashable) -> None:
        jobs = line.same.get(key)
        if jobs is not None:
            jobs.discard(job)
            if not jobs:
                del line.same[key]

    def _prepared(self, line: _Line, turn: _Turn, prepared: Any) -> None:
        line.preparing.discard(turn)
        line.rows -= turn.rows
        turn.rows = 0
        self._observer.stage("prepare", time.monotonic() - turn.begun)
        job = turn.job
        if job.is_over:
            return
        if line.is_lost:
            self._fail(line, job, _lost())
        elif isinstance(prepared, RequestError):
            if isinstance(turn.task.content, Pair):
                self._fail(line, job, prepared)
            else:
                self._done(line, [(turn, Outcome(turn.position, error=prepared))], 0)
        elif isinstance(prepared, BaseException):
            self._log_failure(prepared)
            self._fail(line, job, RequestError("ENGINE_FAILED", _FAILED, retry_after_s=5))
        elif isinstance(prepared, Prepared):
            self._add(line, turn, prepared)
        else:
            turn.document, turn.stored = prepared
            turn.visual = sum(image.num_tokens for image in prepared[0].images)
            turn.tokens = turn.rows = turn.document.length if turn.document else 0
            line.rows += turn.rows
            line.reads.append(turn)

    def _add(self, line: _Line, turn: _Turn, prepared: Prepared) -> None:
        document = prepared.document
        turn.cached = line.engine.has(document)
        turn.rows, turn.tokens = prepared.num_rows, prepared.prompt.prefix_length + prepared.num_rows
        turn.visual = sum(image.num_tokens for image in document.images + prepared.images)
        if not turn.cached:
            turn.document = document
            line.counted[document] = line.counted.get(document, 0) + 1
            if line.counted[document] == 1:
                line.rows += document.length
        line.rows += turn.rows
        ticket = line.schedule.add(prepared)
        line.tickets[ticket] = turn
        turn.job.tickets.add(ticket)

    def _uncount(self, line: _Line, turn: _Turn) -> None:
        """Its rows are needed no longer."""
        line.rows -= turn.rows
        turn.rows = 0
        if turn.document is not None and turn.document in line.counted:
            line.counted[turn.document] -= 1
            if not line.counted[turn.document]:
                del line.counted[turn.document]
                line.rows -= turn.document.length

    def _step(self, line: _Line) -> None:
        """One run: of pairs, or of documents for the index, which take turns."""
        is_read = bool(line.reads) and (line.is_reads_turn or not len(line.schedule))
        line.is_reads_turn = not is_read
        begun = time.monotonic()
        try:
            if is_read:
                self._read(line)
            else:
                self._score(line)
        except Exception as error:  # whatever an engine raises: nothing may end this thread
            self._failed(line, error)
        # What lies between runs is time of the work too: preparing, parsing, threads that wait for each other.
        end = time.monotonic()
        line.rate.add(0, end - line.since)
        line.since = end
        for other in self._lines.values():
            if other is not line:
                other.since += end - begun

    def _score(self, line: _Line) -> None:
        found: list[tuple[_Turn, Outcome]] = []
        worked = 0
        for ticket, result in line.schedule.step():
            turn = line.tickets.pop(ticket)
            worked += turn.task.cost
            turn.job.tickets.discard(ticket)
            self._uncount(line, turn)
            if turn.job.is_over:
                continue
            if result.error is not None:
                self._fail(line, turn.job, refused(result.error, _place(turn.task, result.error)))
            elif turn.task.must_fit and result.truncated:
                what = f"the {result.truncated[0]} is longer than the model reads. Shorten it, or allow truncation."
                self._fail(line, turn.job, RequestError("INVALID_INPUT", what, where=turn.task.places[-1]))
            else:
                seconds = time.monotonic() - turn.begun
                outcome = Outcome(turn.position, result, "", turn.tokens, turn.cached, seconds)
                found.append((turn, outcome))
        self._done(line, found, worked)

    def _read(self, line: _Line) -> None:
        """Compute documents for the index, as many as a run takes, and hand them to the disk."""
        turns: list[_Turn] = []
        rows = 0
        while line.reads and (not turns or rows + line.reads[0].tokens <= line.engine.rows):
            turn = line.reads.popleft()
            self._uncount_read(line, turn)
            if not turn.job.is_over:
                turns.append(turn)
                rows += turn.tokens
        try:
            self._compute_and_hand_over(line, turns)
        except Exception:
            line.reads.extendleft(reversed(turns))  # who waits for them is told with the others
            raise

    def _compute_and_hand_over(self, line: _Line, turns: Sequence[_Turn]) -> None:
        writer, store = line.writer, line.lane.reranker.store
        assert writer is not None
        assert store is not None
        documents = dict.fromkeys(turn.document for turn in turns if turn.document is not None)
        there = store.has([document.key for document in documents])
        new = [document for document in documents if document.key not in there]
        if line.engine.low_memory:
            line.engine.encode([image for document in new for image in document.images])
        states: dict[Document, Any] = {}
        for run in pack(((document, [document.length]) for document in new), [line.engine.rows]):
            states |= dict(zip(run, line.engine.compute(run), strict=True))
        failed: list[tuple[_Turn, Outcome]] = []
        for turn in turns:
            state = states.get(turn.document) if turn.document is not None else None
            if state is not None and not state.is_finite:
                error = refused(not_finite(line.engine.kept), turn.task.places[0])
                failed.append((turn, Outcome(turn.position, error=error)))
                continue
            assert turn.stored is not None
            num_bytes = len(turn.stored.data) + (state.num_bytes if state is not None else 0)
            line.unwritten += num_bytes
            buffers = state.buffers if state is not None else None
            writer.add(turn.stored, buffers, self._on_written(line, turn, num_bytes))
        self._done(line, failed, sum(turn.task.cost for turn in turns))

    def _uncount_read(self, line: _Line, turn: _Turn) -> None:
        line.rows -= turn.rows
        turn.rows = 0

    def _on_written(self, line: _Line, turn: _Turn, num_bytes: int) -> Callable[[str | Exception], None]:
        def written(status: str | Exception) -> None:
            def done() -> None:
                line.unwritten -= num_bytes
                if turn.job.is_over:
                    return
                seconds = time.monotonic() - turn.begun
                if isinstance(status, str):
                    outcome = Outcome(turn.position, None, status, turn.tokens, status == "known", seconds)
                else:
                    self._log_failure(status)
                    outcome = Outcome(turn.position, error=_write_failed(status, turn.task.places[0]))
                self._done(line, [(turn, outcome)], 0)

            self._call(done)

        return written

    # --- ends ----------------------------------------------------------------------------------------------

    def _done(self, line: _Line, found: Sequence[tuple[_Turn, Outcome]], worked: int) -> None:
        """Tell the requests; `worked` is the cost of what was just run."""
        line.rate.add(worked, 0)
        of_jobs: defaultdict[_Job, list[Outcome]] = defaultdict(list)
        for turn, outcome in found:
            job, cost = turn.job, turn.task.cost
            job.left -= 1
            job.cost -= cost
            with self._lock:
                line.queued -= cost
            if outcome.error is None:
                self._observer.documents(_kind(turn))
                self._observer.tokens("text", outcome.tokens - turn.visual)
                self._observer.tokens("visual", turn.visual)
            of_jobs[job].append(outcome)
        for job, outcomes in of_jobs.items():
            if not job.left:
                self._end(line, job)  # before it is told: who asks at once finds nobody waiting
            job.tell(outcomes)

    def _fail(self, line: _Line, job: _Job, error: RequestError) -> None:
        """End a request with an error; what it has in the schedule is forgotten."""
        if not job.is_over:
            self._end(line, job)
            job.tell(error)

    def _end(self, line: _Line, job: _Job) -> None:
        if job.is_over:
            return
        job.is_over = True
        line.num_jobs -= 1
        for key, left in job.documents.items():
            if left:
                self._forget(line, job, key)
        job.tasks.clear()
        for ticket in job.tickets:
            line.schedule.cancel(ticket)
            self._uncount(line, line.tickets.pop(ticket))
        job.tickets.clear()
        with self._lock:
            line.queued -= job.cost
            job.cost = 0
            self._jobs.discard(job)

    def _failed(self, line: _Line, error: Exception) -> None:
        """A run did not end: who had a part in the schedule is told, and it begins anew."""
        self._log_failure(error)
        if isinstance(error, DeviceLostError | WrongAnswerError):
            line.is_lost = True
        why = "the server has too little memory for this now. Try again later."
        told = RequestError(
            "ENGINE_FAILED", why if isinstance(error, MemoryError | PoolFullError) else _FAILED, retry_after_s=5
        )
        for job in {turn.job for turn in [*line.tickets.values(), *line.reads]}:
            self._fail(line, job, told)
        for turn in line.reads:
            self._uncount_read(line, turn)
        line.reads.clear()
        with contextlib.suppress(Exception):
            line.schedule.close()
        if line.is_lost:
            for job in [job for _, _, job in line.turns]:
                self._fail(line, job, told)
        else:
            _, line.schedule = line.lane.reranker.begin()

    def _log_failure(self, error: BaseException) -> None:
        if isinstance(error, M0kitError):
            _log.error("%s", error)
        else:
            _log.error("a run failed", exc_info=error)


def _lost() -> RequestError:
    return RequestError("ENGINE_FAILED", _FAILED, retry_after_s=10)


def _can_run(line: _Line) -> bool:
    return bool(len(line.schedule) or line.reads)


def _has_work(line: _Line) -> bool:
    return _can_run(line) or bool(line.turns and line.has_room)


def _prepare(line: _Line, turn: _Turn) -> Any:
    """A pair's `Prepared`, a document with what is stored of it, or a RequestError."""
    task = turn.task
    try:
        if isinstance(task.content, Pair):
            ready = prepared_and_drawn(task.content, task.preparer, line.engine)
            if isinstance(ready, InputError):
                return refused(ready, _place(task, ready))
            return ready
        document, _ = task.preparer.document(task.content, task.places[0])
        assert not isinstance(task.content, Known)
        return document, stored_form(task.id, task.content, document)
    except InputError as error:
        return refused(error, task.places[0])


def _place(task: Task, error: InputError) -> str:
    """Where in the request that is which an error of a pair is about."""
    return task.places[0] if error.side == "query" else task.places[-1]


def _kind(turn: _Turn) -> Literal["text", "image"]:
    return "image" if turn.visual else "text"


def not_writable(lane: Lane) -> RequestError:
    """What is said where documents cannot be added."""
    if lane.reranker.store is None:
        return RequestError("NO_INDEX", f"model {lane.names[0]} is served without an index. Start it with --index.")
    return RequestError("INDEX_FAILED", "the index is open for reading only: another process is writing to it.")


def _write_failed(error: Exception, where: str) -> RequestError:
    if isinstance(error, InputError):
        return refused(error, where)
    what = "the index could not take it: it is full, or its disk is; the server's log says why."
    return RequestError("INDEX_FAILED", what if isinstance(error, StoreError | OSError) else _FAILED, where=where)
