"""Which of the pairs that wait are run next: the order of the work, under limits of memory.

Owns what waits. Pairs on one document are run together, whoever added them, and its state is computed once for all
that wait for it. A result never depends on what else waits.

    schedule = Schedule(engine)
    ticket = schedule.add(preparer.prepare(pair))
    schedule.step()              # one run of the decoder → [(ticket, Result)]
    schedule.cancel(ticket)      # of one that is no longer wanted

One thread adds, steps and cancels. An engine that computes beside it (`Engine.runs_ahead`) has runs in flight while the
next one is made: their results come some steps later.
"""

import itertools
import math
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Final, Literal, NamedTuple

from m0kit.errors import InputError
from m0kit.scoring.engine import Engine, Handle, Part, not_finite, sigmoid
from m0kit.scoring.images import SeenImage
from m0kit.scoring.prepare import Document, Prepared

# Documents whose states are read from disk ahead of the run that needs them.
READ_AHEAD: Final = 8
# Visual tokens whose embeddings wait for the decoder where it cannot be in memory beside the image encoder: 96 MiB.
LOW_MEMORY_VISUAL_TOKENS: Final = 16_384
OnError = Literal["raise", "mark"]  # what becomes of a call with a pair that cannot be scored


@dataclass(frozen=True, slots=True)
class Result:
    """What became of one pair. With an `error` score and logit are NaN."""

    score: float  # sigmoid(logit − bias), 0 to 1
    logit: float
    error: InputError | None = None
    truncated: tuple[str, ...] = ()  # "document", "query": what lost its end, as the published procedure cuts

    @classmethod
    def failed(cls, error: InputError) -> "Result":
        """Of a pair that cannot be scored."""
        return cls(math.nan, math.nan, error)


Done = list[tuple[int, Result]]  # tickets
_Waiting = dict[Document, dict[int, Prepared]]  # by ticket, in the order in which they came


class _Flight(NamedTuple):
    """A run that was begun."""

    tickets: Sequence[int]
    wait: Callable[[], list[float]]


class Schedule:
    """Pairs that wait to be scored."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._tickets = itertools.count()
        self._documents: dict[int, Document] = {}  # by ticket
        self._waiting: _Waiting = {}
        self._encoded: _Waiting = {}  # in low memory those that are run next
        self._states: dict[Document, Handle] = {}  # of documents that wait
        self._counted: set[Document] = set()  # those that wait whose own rows are in `num_rows`
        self._flights: deque[_Flight] = deque()
        self._flying: dict[int, Prepared] = {}  # by ticket, of all flights
        self._done: Done = []  # that nobody was told of yet
        self._ahead: set[Document] = set()  # those that the disk was asked for
        self._used: set[Document] = set()
        self.num_bytes = 0  # what those that wait hold in memory, besides pixels and states
        self.num_rows = 0  # of runs that they still need, states that are not there included

    def __len__(self) -> int:
        """Pairs that wait, those in flight among them."""
        return len(self._documents) + len(self._flying) + len(self._done)

    def add(self, prepared: Prepared) -> int:
        """Have a pair scored by one of the next steps. Returns its ticket."""
        ticket = next(self._tickets)
        document = prepared.document
        if document not in self._waiting and document not in self._encoded:
            self.num_bytes += document.prefix.nbytes
            # What computes at once is asked when a run is made: it may have to look on a disk.
            if not self._engine.runs_ahead or not self._engine.has(document):
                self.num_rows += document.length
                self._counted.add(document)
        self._waiting.setdefault(document, {})[ticket] = prepared
        self._documents[ticket] = document
        self.num_bytes += prepared.num_bytes
        self.num_rows += prepared.num_rows
        return ticket

    def cancel(self, ticket: int) -> None:
        """Forget a pair that waits; one that is done already is none of these."""
        if ticket in self._documents:
            self._take(ticket)
        self._flying.pop(ticket, None)
        self._done = [one for one in self._done if one[0] != ticket]

    def step(self) -> Done:
        """One run of the decoder: for documents without a state, or for as many of the pairs as one run takes.

        Returns what is done now, which may be nothing. Raises what the engine raises; the pairs that it was for are
        then forgotten, and what else is done is told by the next step.
        """
        if self._engine.low_memory and not self._encoded:
            self._encode_ahead()
        chosen = self._next_run()
        if chosen:
            self._begin(chosen)
        if self._flights and (not chosen or len(self._flights) > self._engine.runs_ahead):
            self._collect()
        if not self._documents and not self._flights:
            self._engine.rest(self._used)
            self._used, self._ahead = set(), set()
        done, self._done = self._done, []
        return done

    def close(self) -> None:
        """Forget all that waits. A run in flight ends by itself, and nobody is told of it."""
        for ticket in list(self._documents):
            self._take(ticket)
        self._flights.clear()
        self._flying.clear()
        self._done.clear()
        self._engine.rest(())

    # --- runs ----------------------------------------------------------------------------------------

    def _begin(self, chosen: Sequence[tuple[Document, list[int]]]) -> None:
        run: list[Part] = []
        flying: dict[int, Prepared] = {}
        for document, tickets in chosen:
            state = self._states.get(document)  # before the last of its pairs is taken
            pairs = [self._take(ticket) for ticket in tickets]
            flying.update(zip(tickets, pairs, strict=True))
            run.append(Part(document, pairs, state))
        self._flights.append(_Flight(list(flying), self._engine.begin(run)))
        self._flying |= flying

    def _collect(self) -> None:
        """The results of the run that was begun first."""
        flight = self._flights.popleft()
        pairs = [self._flying.pop(ticket, None) for ticket in flight.tickets]  # None: cancelled meanwhile
        for ticket, pair, logit in zip(flight.tickets, pairs, flight.wait(), strict=True):
            if pair is not None:
                self._done.append((ticket, self._result(pair, logit)))

    # --- which ---------------------------------------------------------------------------------------

    def _next_run(self) -> list[tuple[Document, list[int]]]:
        """The next pairs of documents, by ticket; none where states came first. What cannot be run is done."""
        waiting = self._encoded if self._engine.low_memory else self._waiting
        chosen: list[tuple[Document, list[int]]] = []
        rows, past = self._engine.rows, self._engine.past_bytes
        # Each has a row at least, so that there is an end to it.
        for document in list(itertools.islice(waiting, self._engine.rows)):
            is_there = self._is_there(document, waiting)
            if document not in waiting:
                continue
            if not is_there and self._engine.keeps:
                self._compute([document, *self._others(document, waiting)])
                return []
            state = self._states.get(document)
            tickets, needed = self._first(waiting[document])
            needed, needed_past = (needed + document.length, 0) if state is None else (needed, state.num_bytes)
            if chosen and (needed > rows or needed_past > past):
                break
            chosen.append((document, tickets))
            rows, past = rows - needed, past - needed_past
            if len(tickets) < len(waiting[document]):
                break
        return chosen

    def _is_there(self, document: Document, waiting: _Waiting) -> bool:
        """Whether there is a state. Where there is none, its images are; pairs whose images are not are done."""
        failed = -1
        while document in waiting and failed != len(self._done):  # in the place of those that failed others are run
            failed = len(self._done)
            for ticket in self._first(waiting[document])[0]:
                self._require(waiting[document][ticket].images, [ticket])
        if document in waiting and document not in self._states:
            self._read_ahead(waiting)
            self._used.add(document)
            try:
                state = self._engine.find(document)
            except InputError as error:
                self._fail(list(waiting[document]), error)
                return False
            if state is not None:
                self._states[document] = state
                self._uncount(document)
            else:
                self._require(document.images, list(waiting[document]))
        return document in self._states

    def _first(self, pairs: dict[int, Prepared]) -> tuple[list[int], int]:
        """The tickets of as many pairs as a run takes, one at least, and their rows."""
        tickets: list[int] = []
        rows = 0
        for ticket, pair in pairs.items():
            if tickets and rows + pair.num_rows > self._engine.rows:
                break
            tickets.append(ticket)
            rows += pair.num_rows
        return tickets, rows

    def _others(self, first: Document, waiting: _Waiting) -> list[Document]:
        """Other documents that wait without a state, as many as fit into a run with the `first`."""
        found: list[Document] = []
        room, num_fetched = self._engine.rows - first.length, 0
        for document in list(itertools.islice(waiting, self._engine.rows)):
            if document == first or document in self._states:
                continue
            if document.length > room or num_fetched == READ_AHEAD:  # more than are run soon need no memory yet
                break
            if self._is_there(document, waiting):
                num_fetched += 1
            elif document in waiting:
                found.append(document)
                room -= document.length
        return found

    def _compute(self, documents: Sequence[Document]) -> None:
        try:
            states = self._engine.states(documents)
        except BaseException:
            for ticket in [ticket for document in documents for ticket in self._all(document)]:
                self._take(ticket)
            raise
        for document, state in zip(documents, states, strict=True):
            if state.is_finite:
                self._states[document] = state
                self._uncount(document)
            else:
                self._fail(self._all(document), not_finite(self._engine.kept))

    def _require(self, images: Iterable[SeenImage], tickets: Sequence[int]) -> None:
        try:
            for image in images:
                image.require()
        except InputError as error:
            self._fail(tickets, error)

    def _read_ahead(self, waiting: _Waiting) -> None:
        soon = list(itertools.islice(waiting, 2 * READ_AHEAD))
        if any(document not in self._ahead for document in soon[:READ_AHEAD]):
            self._engine.prefetch([document for document in soon if document not in self._ahead])
            self._ahead.update(soon)

    def _encode_ahead(self) -> None:
        """Take documents as long as their images fit, and have these encoded before the decoder comes."""
        images: list[SeenImage] = []
        visual = 0
        for document in list(self._waiting):
            pairs = self._waiting[document]
            needed = [] if self._engine.has(document) else list(document.images)
            needed += [image for pair in pairs.values() for image in pair.images]
            visual += sum(image.num_tokens for image in needed)
            if self._encoded and visual > LOW_MEMORY_VISUAL_TOKENS:
                break
            images += needed
            self._encoded[document] = self._waiting.pop(document)
        self._engine.encode([image for image in images if _can_be_encoded(image)])

    # --- what waits ----------------------------------------------------------------------------------

    def _all(self, document: Document) -> list[int]:
        return [*self._waiting.get(document, ()), *self._encoded.get(document, ())]

    def _take(self, ticket: int) -> Prepared:
        """One that no longer waits."""
        document = self._documents.pop(ticket)
        waiting = self._encoded if ticket in self._encoded.get(document, ()) else self._waiting
        prepared = waiting[document].pop(ticket)
        self.num_bytes -= prepared.num_bytes
        self.num_rows -= prepared.num_rows
        if not waiting[document]:
            del waiting[document]
            if document not in self._waiting and document not in self._encoded:
                self.num_bytes -= document.prefix.nbytes
                self._uncount(document)
                self._states.pop(document, None)
        return prepared

    def _uncount(self, document: Document) -> None:
        """Its own rows are needed no longer."""
        if document in self._counted:
            self._counted.remove(document)
            self.num_rows -= document.length

    def _fail(self, tickets: Sequence[int], error: InputError) -> None:
        for ticket in tickets:
            self._take(ticket)
            self._done.append((ticket, Result.failed(error)))

    def _result(self, pair: Prepared, logit: float) -> Result:
        if not math.isfinite(logit):
            return Result.failed(not_finite("the model's answer"))
        prompt = pair.prompt
        cut = (("document", prompt.document.truncated), ("query", prompt.query_truncated))
        return Result(
            sigmoid(logit - self._engine.config.prompt.logit_bias),
            logit,
            None,
            tuple(name for name, is_cut in cut if is_cut),
        )


def _can_be_encoded(image: SeenImage) -> bool:
    """Why one cannot is told when its pairs are run."""
    try:
        image.require()
    except InputError:
        return False
    return True
