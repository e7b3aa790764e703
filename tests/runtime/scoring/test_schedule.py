"""What waits is run once, together, under limits; what others do meanwhile changes no score."""

import itertools
import math
import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from m0kit import Reranker, Result
from m0kit.artifact.manifest import read_manifest
from m0kit.config import ModelConfig
from m0kit.errors import ImageError, InputError
from m0kit.scoring.engine import Part, RunStats
from m0kit.scoring.images import SeenImage
from m0kit.scoring.prepare import Document, Prepared
from m0kit.scoring.prompt import Prompt, PromptDocument
from m0kit.scoring.schedule import Schedule

PER_TOKEN = 1000  # bytes of a state


@pytest.mark.parametrize("options", [{}, {"kv": "fp16"}, {"memory": "low"}, {"cache_bytes": 1 << 24}])
def test_two_requests_share_their_work_and_one_may_leave(artifact: Path, options: dict[str, Any]) -> None:
    """Requests come and go between steps; each score is the lone one to the bit, what they share is computed once."""
    text, page = "a document that both ask about, " * 20, Image.effect_noise((140, 112), 90).convert("RGB")
    asked: list[Any] = [("what", text), ("what", page), *((f"{i} " * 400, text) for i in range(4))]
    other: list[Any] = [("which", text), ("which", page.copy()), ("who", "a text of its own")]
    alone = Reranker.load(artifact, threads=1, **options)
    expected = [alone.evaluate([pair])[0] for pair in asked + other]
    reranker, runs = Reranker.load(artifact, threads=1, **options), list[RunStats]()
    reranker.engine.on_run = runs.append
    encoded = Encoded(reranker)
    preparer, schedule = reranker.begin()
    lengths = {d.key: d.length for d in (preparer.prepare(pair).document for pair in asked + other)}
    first = [schedule.add(preparer.prepare(pair)) for pair in asked]
    done = dict(schedule.step())
    second = [schedule.add(preparer.prepare(pair)) for pair in other]
    schedule.cancel(first[-1])
    while len(schedule):
        done |= schedule.step()
    assert done == dict(zip(first[:-1] + second, expected[:5] + expected[6:], strict=True))
    assert encoded.images == 1
    if reranker.engine.keeps:  # else a document whose pairs take several runs is computed in each of them
        assert sum(stats.rows for stats in runs if stats.pairs == 0) == sum(lengths.values())


class Encoded:
    """Counts the images that a reranker encodes."""

    def __init__(self, reranker: Reranker) -> None:
        self.images = 0
        self._graph = reranker.engine.graphs.vision
        reranker.engine.graphs = reranker.engine.graphs._replace(vision=self)

    def run(self, feeds: Any, outputs: Sequence[str]) -> dict[str, Any]:
        self.images += len(feeds["images"])
        return self._graph.run(feeds, outputs)


# --- streams -------------------------------------------------------------------------------------------


def test_a_stream_needs_no_list(reranker: Reranker) -> None:
    """Of 100,000 pairs that are made when they are asked for, few are made before the first result."""
    made = 0

    def lazy() -> Iterator[tuple[str, str]]:
        nonlocal made
        for made in range(1, 100_001):
            yield f"query {made}", f"document {made % 7}"

    stream = reranker.stream(lazy())
    position, result = next(stream)
    assert result.error is None
    assert made < 500
    expected = reranker.evaluate([(f"query {position + 1}", f"document {(position + 1) % 7}")])[0]
    assert abs(result.logit - expected.logit) < 1e-5
    for _ in range(300):
        next(stream)
    assert made < 3000  # as many wait as were run
    stream.close()


def test_what_waits_is_bounded_however_long_the_list(reranker: Reranker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("m0kit.reranker.WAITING_BYTES", 50_000)
    pairs = [(f"query {i}", f"document {i // 3}") for i in range(200)]
    most = 0
    add = Schedule.add

    def watched(self: Schedule, prepared: Prepared) -> int:
        nonlocal most
        ticket = add(self, prepared)
        most = max(most, self.num_bytes)
        return ticket

    monkeypatch.setattr(Schedule, "add", watched)
    positions = [position for position, _ in reranker.stream(pairs)]
    assert sorted(positions) == list(range(200))
    assert 50_000 < most < 60_000


def test_an_error_of_a_lazy_pair_is_told_with_its_position(reranker: Reranker) -> None:
    stream = reranker.stream(pair for pair in [("q", "d"), ("", "d"), ("q", 7)])
    results = dict(stream)
    assert results[0].error is None
    assert str(results[1].error) == "pair 1: query: is empty. Give some text, or leave the pair out."
    assert isinstance(results[2].error, InputError)
    assert (results[1].error.pair, results[1].error.side) == (1, "query")  # type: ignore[union-attr]
    assert (results[2].error.pair, results[2].error.side) == (2, "document")
    assert results[2].error.reason.startswith("expected text (str)")


# --- the schedule by itself, on an engine of numbers -----------------------------------------------------


@dataclass
class State:
    """What stands for a state."""

    num_bytes: int
    is_finite: bool = True


@dataclass
class Numbers:
    """An engine whose logit of a pair is the number that its query is; what it is asked for is held against limits."""

    config: ModelConfig
    keeps: bool = True
    low_memory: bool = False
    rows: int = 1024
    past_bytes: int = 2048 * PER_TOKEN  # less than the longest
    runs_ahead: int = 0
    prepare_threads: int = 1
    kept: str = "what is kept"
    bad: frozenset[bytes] = frozenset()  # documents whose states are not finite
    there: dict[bytes, State] = field(default_factory=dict)
    computed: Counter[bytes] = field(default_factory=Counter)
    num_runs: int = 0
    in_flight: int = 0
    registers: bool = False  # documents of a run are there from then on
    fails: Callable[[], bool] = lambda: False  # a run, when it is waited for

    def find(self, document: Document) -> State | None:
        return self.there.get(document.key)

    def has(self, document: Document) -> bool:
        return document.key in self.there

    def prefetch(self, documents: Iterable[Document]) -> None:
        assert len(list(documents)) <= 16

    def states(self, documents: Sequence[Document]) -> list[State]:
        assert self.keeps
        assert len(documents) == 1 or sum(document.length for document in documents) <= self.rows
        self.computed.update(document.key for document in documents)
        return [State(PER_TOKEN * d.length, d.key not in self.bad) for d in documents]

    def encode(self, images: Sequence[SeenImage]) -> None:
        assert not images

    def begin(self, parts: Sequence[Part]) -> Callable[[], list[float]]:
        assert self.in_flight <= self.runs_ahead
        self.num_runs += 1
        self.in_flight += 1
        suffixes = sum(pair.num_rows for part in parts for pair in part.pairs)
        rows = suffixes + sum(part.document.length for part in parts if part.state is None)
        past = sum(part.state.num_bytes for part in parts if part.state is not None)
        assert len(parts) == 1 or rows <= self.rows
        assert suffixes <= self.rows or len(parts[0].pairs) == 1
        assert len(parts) == 1 or past <= self.past_bytes
        if self.registers:
            new = [part.document for part in parts if part.state is None]
            assert not self.there.keys() & {document.key for document in new}
            self.there |= {document.key: State(PER_TOKEN * document.length) for document in new}
        else:
            assert all((part.state is not None) == self.keeps for part in parts)

        def wait() -> list[float]:
            self.in_flight -= 1
            if self.fails():
                raise MemoryError
            return [float(pair.prompt.suffix[0]) for part in parts for pair in part.pairs]

        return wait

    def rest(self, used: Iterable[Document]) -> None:
        list(used)


@pytest.fixture(scope="module")
def config(artifact: Path) -> ModelConfig:
    return read_manifest(artifact).model


def prepared(number: int, document: int, length: int, rows: int) -> Prepared:
    prefix = np.zeros(length, np.int64)
    begun = PromptDocument(prefix, "", 0, 0, truncated=False)
    prompt = Prompt(begun, length, np.full(rows, number, np.int64), -1, query_truncated=False)
    return Prepared(Document(bytes([document]), prefix, ()), prompt, ())


@settings(max_examples=300)
@given(st.randoms(use_true_random=False), st.booleans(), st.booleans())
def test_every_pair_is_done_once_or_cancelled(config: ModelConfig, rng: random.Random, keeps: bool, low: bool) -> None:
    lengths = [rng.choice([1, 20, 300, 1024, 3000]) for _ in range(12)]
    bad = frozenset(bytes([i]) for i in range(12) if keeps and rng.random() < 0.1)
    engine = Numbers(config, keeps=keeps, low_memory=low, bad=bad)
    engine.there = {bytes([i]): State(PER_TOKEN * lengths[i]) for i in range(12) if keeps and rng.random() < 0.2}
    schedule = Schedule(engine)
    waiting: dict[int, tuple[int, bytes]] = {}
    cancelled: set[int] = set()
    done: dict[int, Result] = {}
    numbers = itertools.count(1)
    for _ in range(rng.randint(1, 120)):
        act = rng.random()
        if act < 0.7:
            number, document = next(numbers), rng.randrange(12)
            ticket = schedule.add(prepared(number, document, lengths[document], rng.choice([1, 7, 200, 1500])))
            waiting[ticket] = number, bytes([document])
        elif act < 0.8 and waiting:
            ticket = rng.choice(list(waiting))
            schedule.cancel(ticket)
            cancelled |= {ticket} - done.keys()
        else:
            done |= check_new(schedule.step(), done)
    while len(schedule):
        done |= check_new(schedule.step(), done)
    assert done.keys() == waiting.keys() - cancelled
    for ticket, result in done.items():
        number, key = waiting[ticket]
        if key in bad and key not in engine.there:
            assert isinstance(result.error, InputError)
            assert math.isnan(result.logit)
        else:
            assert result.logit == number
    assert (schedule.num_bytes, schedule.num_rows, len(schedule)) == (0, 0, 0)
    assert not engine.computed.keys() & engine.there.keys()


def check_new(some: Sequence[tuple[int, Result]], done: dict[int, Result]) -> dict[int, Result]:
    new = dict(some)
    assert len(new) == len(some)
    assert not new.keys() & done.keys()
    return new


def test_a_state_is_computed_once_for_all_that_wait(config: ModelConfig) -> None:
    engine = Numbers(config)
    schedule = Schedule(engine)
    for number in range(1, 60):
        schedule.add(prepared(number, number % 3, 700, 100))
    while len(schedule):
        schedule.step()
    assert engine.computed == {bytes([i]): 1 for i in range(3)}


def test_a_step_is_one_run(config: ModelConfig) -> None:
    engine = Numbers(config)
    schedule = Schedule(engine)
    for number in range(1, 40):
        schedule.add(prepared(number, number % 9, 600, 30))
    while len(schedule):
        before = engine.num_runs + len(engine.computed)
        schedule.step()
        assert engine.num_runs + len(engine.computed) == before + 1


def test_an_engine_that_fails_costs_the_pairs_of_its_run(config: ModelConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Numbers(config, keeps=False)
    schedule = Schedule(engine)
    tickets = [schedule.add(prepared(number, number, 1000, 20)) for number in range(1, 4)]

    def failing(_: Any) -> Any:
        raise MemoryError

    for name in ("begin", "states"):
        with monkeypatch.context() as patch:
            patch.setattr(engine, name, failing)
            with pytest.raises(MemoryError):
                schedule.step()
        engine.keeps = True  # the next one fails while it computes a state
    done = dict(itertools.chain.from_iterable(iter(lambda: schedule.step() if len(schedule) else None, None)))
    assert list(done) == tickets[2:]
    assert (schedule.num_bytes, schedule.num_rows) == (0, 0)


# --- an engine that computes beside it -------------------------------------------------------------------


@settings(max_examples=300)
@given(st.randoms(use_true_random=False))
def test_a_run_in_flight_changes_no_result_and_fails_alone(config: ModelConfig, rng: random.Random) -> None:
    """As with an engine that computes at once: each pair is done once, cancelled, or of a run that failed."""
    lengths = [rng.choice([1, 20, 300, 1024, 3000]) for _ in range(12)]
    often = rng.choice([0, 0, 0.3])
    keeps = rng.random() < 0.3
    engine = Numbers(
        config,
        keeps=keeps,
        rows=rng.choice([100, 1024, 8192]),
        runs_ahead=rng.randint(0, 2),
        registers=not keeps and rng.random() < 0.7,
        fails=lambda: rng.random() < often,
    )
    schedule = Schedule(engine)
    asked: dict[int, int] = {}
    gone: set[int] = set()
    done: dict[int, Result] = {}

    def step() -> None:
        before = len(schedule)
        try:
            new = check_new(schedule.step(), done)
        except MemoryError:
            assert often
            assert len(schedule) <= before  # fewer, unless all of that run were cancelled
        else:
            assert len(schedule) == before - len(new)
            done.update(new)
        assert engine.in_flight <= engine.runs_ahead

    for number in range(rng.randint(1, 80)):
        document = rng.randrange(12)
        asked[schedule.add(prepared(number, document, lengths[document], rng.choice([1, 7, 200, 1500])))] = number
        if rng.random() < 0.1:
            ticket = rng.choice(list(asked))
            schedule.cancel(ticket)
            gone |= {ticket} - done.keys()
        if rng.random() < 0.3:
            step()
    while len(schedule):
        step()
    assert not done.keys() & gone
    assert often or done.keys() == asked.keys() - gone
    assert all(result.logit == asked[ticket] for ticket, result in done.items())
    assert (schedule.num_bytes, schedule.num_rows) == (0, 0)


def test_a_run_is_begun_before_the_one_before_is_waited_for(config: ModelConfig) -> None:
    engine = Numbers(config, keeps=False, runs_ahead=1)
    schedule = Schedule(engine)
    tickets = [schedule.add(prepared(number, number, 600, 30)) for number in range(3)]
    told = []
    while len(schedule):
        told.append(([ticket for ticket, _ in schedule.step()], engine.num_runs, engine.in_flight))
    assert told == [([], 1, 1), (tickets[:1], 2, 1), (tickets[1:2], 3, 1), (tickets[2:], 3, 0)]


def test_an_error_in_flight_is_raised_where_it_is_waited_for(config: ModelConfig) -> None:
    failing = iter([True, False, False])
    engine = Numbers(config, keeps=False, runs_ahead=1, fails=lambda: next(failing))
    schedule = Schedule(engine)
    tickets = [schedule.add(prepared(number, number, 600, 30)) for number in range(3)]
    assert schedule.step() == []
    with pytest.raises(MemoryError):
        schedule.step()
    assert len(schedule) == 2
    assert [ticket for ticket, _ in schedule.step() + schedule.step()] == tickets[1:]


def test_what_is_done_is_told_though_a_run_beside_it_failed(config: ModelConfig) -> None:
    """A pair whose image is gone is done in the step that raises for others, and told by the next."""

    class Gone:
        def require(self) -> None:
            raise InputError("is gone")

    engine = Numbers(config, keeps=False, fails=lambda: True)
    schedule = Schedule(engine)
    image: Any = Gone()
    lost = replace(prepared(1, 1, 100, 10), images=(image,))
    ticket, _ = schedule.add(lost), schedule.add(prepared(2, 2, 100, 10))
    with pytest.raises(MemoryError):
        schedule.step()
    assert len(schedule) == 1
    assert [ticket for ticket, _ in schedule.step()] == [ticket]


def test_closing_forgets_what_is_in_flight(config: ModelConfig) -> None:
    engine = Numbers(config, keeps=False, runs_ahead=2, fails=lambda: True)
    schedule = Schedule(engine)
    for number in range(4):
        schedule.add(prepared(number, number, 600, 30))
    schedule.step()
    schedule.step()
    schedule.close()
    assert (len(schedule), schedule.step(), engine.in_flight) == (0, [], 2)


@pytest.mark.parametrize("runs_ahead", [0, 1])
def test_documents_that_are_there_need_no_rows(config: ModelConfig, runs_ahead: int) -> None:
    """An engine that computes beside is asked at once, since who fills its runs goes by the rows that wait."""
    engine = Numbers(config, keeps=False, runs_ahead=runs_ahead, registers=True)
    schedule = Schedule(engine)
    schedule.add(prepared(1, 1, 600, 30))
    assert schedule.num_rows == 630
    while len(schedule):
        schedule.step()
    assert schedule.num_rows == 0
    schedule.add(prepared(2, 1, 600, 30))
    schedule.add(prepared(3, 1, 600, 30))
    assert schedule.num_rows == (60 if runs_ahead else 660)
    schedule.step()
    assert schedule.num_rows == 0


def test_documents_of_one_run_are_computed_together(config: ModelConfig) -> None:
    engine = Numbers(config)
    schedule = Schedule(engine)
    for number in range(1, 4):
        schedule.add(prepared(number, number, 300, 30))
    assert schedule.step() == []
    assert len(engine.computed) == 3


def test_all_pairs_of_a_document_are_told_at_once_that_it_cannot_be_kept(config: ModelConfig) -> None:
    engine = Numbers(config, bad=frozenset([b"\1"]))
    schedule = Schedule(engine)
    tickets = [schedule.add(prepared(number, 1, 300, 30)) for number in range(1, 4)]
    assert [ticket for ticket, result in schedule.step() if result.error] == tickets
    assert engine.computed == {b"\1": 1}


class Gone:
    """An image whose file went."""

    num_tokens = 4

    def require(self) -> None:
        raise ImageError("is gone.", where="document")


@pytest.mark.parametrize("keeps", [True, False])
def test_an_image_that_went_costs_the_pairs_on_it_and_no_run(config: ModelConfig, keeps: bool) -> None:
    engine = Numbers(config, keeps=keeps)
    schedule = Schedule(engine)
    pair = prepared(1, 1, 300, 30)
    gone: Any = Gone()
    document = Document(b"gone", pair.document.prefix, (gone,))
    tickets = [schedule.add(Prepared(document, pair.prompt, ())) for _ in range(3)]
    assert [ticket for ticket, result in schedule.step() if result.error] == tickets
    assert not engine.computed
    assert not engine.num_runs
