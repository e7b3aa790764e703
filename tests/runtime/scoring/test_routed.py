"""Several engines are one: each document is one engine's, results come in order, and what one loses is its own."""

import hashlib
import random
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from m0kit import Reranker
from m0kit.artifact.manifest import read_manifest
from m0kit.config import ModelConfig
from m0kit.errors import DeviceLostError
from m0kit.scoring.engine import GraphEngine, Part
from m0kit.scoring.prepare import Document, Prepared
from m0kit.scoring.prompt import Prompt, PromptDocument
from m0kit.scoring.routed import RoutedEngine
from m0kit.scoring.schedule import Schedule

TIMEOUT_S = 300  # only against hanging


@dataclass
class State:
    num_bytes: int
    is_finite: bool = True


@dataclass
class Numbers:
    """Its logit of a pair is the number that its query is. Notes whose documents it sees."""

    config: Any = None
    salt: bytes = b""
    keeps: bool = False
    low_memory: bool = False
    rows: int = 1024
    past_bytes: int = 10_000
    runs_ahead: int = 1
    prepare_threads: int = 4
    kept: str = "what is kept"
    seen: set[bytes] = field(default_factory=set)
    runs: list[int] = field(default_factory=list)  # pairs of each
    ended: int = 0
    at_begin: Callable[[], object] = lambda: None
    at_end: Callable[[], object] = lambda: None
    rested: int = 0
    is_closed: bool = False

    def find(self, document: Document) -> State | None:
        return State(document.length) if self.has(document) else None

    def has(self, document: Document) -> bool:
        return self.keeps and document.key in self.seen

    def prefetch(self, documents: Iterable[Document]) -> None:
        self.seen |= {document.key for document in documents}

    def states(self, documents: Sequence[Document]) -> list[State]:
        assert len(documents) == 1 or sum(document.length for document in documents) <= self.rows
        self.seen |= {document.key for document in documents}
        return [State(document.length) for document in documents]

    def compute(self, documents: Sequence[Document]) -> list[int]:
        self.states(documents)
        return [document.length for document in documents]

    def encode(self, images: Sequence[Any]) -> None:
        for image in images:
            image.embeds = self

    def begin(self, parts: Sequence[Part]) -> Callable[[], list[float]]:
        self.at_begin()
        rows = sum(pair.num_rows for part in parts for pair in part.pairs)
        rows += sum(part.document.length for part in parts if part.state is None)
        past = sum(part.state.num_bytes for part in parts if part.state is not None)
        assert len(parts) == 1 or (rows <= self.rows and past <= self.past_bytes)
        self.seen |= {part.document.key for part in parts}
        self.runs.append(sum(len(part.pairs) for part in parts))

        def wait() -> list[float]:
            self.ended += 1
            self.at_end()
            return [float(pair.prompt.suffix[0]) for part in parts for pair in part.pairs]

        return wait

    def rest(self, used: Iterable[Document]) -> None:
        self.rested += len(list(used)) + 1

    def close(self) -> None:
        self.is_closed = True


@dataclass
class Image:
    pixels: int
    embeds: Any = None

    def digest(self) -> bytes:
        return hashlib.sha256(b"%d" % self.pixels).digest()


def document(number: int, length: int = 10) -> Document:
    return Document(hashlib.sha256(b"%d" % number).digest(), np.zeros(length, np.int64), ())


def pair(number: int, of: Document, rows: int = 5) -> Prepared:
    begun = PromptDocument(of.prefix, "", 0, truncated=False, num_pads=0)
    return Prepared(of, Prompt(begun, of.length, np.full(rows, number, np.int64), -1, query_truncated=False), ())


def part(number: int, of: Document) -> Part:
    return Part(of, [pair(number, of)])


def one_of_each(routed: RoutedEngine) -> list[Document]:
    """A document of each engine, in their order."""
    found: dict[int, Document] = {}
    for number in range(100):
        found.setdefault(routed.index_of(document(number).key), document(number))
    return [found[index] for index in range(len(routed.engines))]


@settings(max_examples=200)
@given(st.integers(1, 4), st.randoms(use_true_random=False))
def test_logits_come_in_order_and_documents_stay_where_they_are(number: int, rng: random.Random) -> None:
    engines = [Numbers(rows=rng.choice([20, 200]), past_bytes=rng.choice([20, 10_000])) for _ in range(number)]
    routed = RoutedEngine(engines)
    assert routed.rows == sum(engine.rows for engine in engines)
    documents = [document(i, rng.choice([1, 10, 300])) for i in range(20)]
    count = 0
    for _ in range(rng.randint(1, 4)):
        parts, wanted = [], []
        for some in rng.sample(documents, rng.randint(1, 12)):
            numbers = list(range(count, count + rng.randint(1, 5)))
            count, wanted = numbers[-1] + 1, wanted + numbers
            state = State(some.length) if rng.random() < 0.5 else None
            parts.append(Part(some, [pair(i, some, rng.choice([1, 30])) for i in numbers], state))
        assert routed.begin(parts)() == wanted
    assert sum(sum(engine.runs) for engine in engines) == count
    for i, engine in enumerate(engines):
        for other in engines[i + 1 :]:
            assert not engine.seen & other.seen
    routed.close()
    assert all(engine.is_closed for engine in engines)


def test_documents_are_spread_and_a_key_chooses_the_same_everywhere() -> None:
    routed = RoutedEngine([Numbers(), Numbers(), Numbers()])
    counts = np.bincount([routed.index_of(document(i).key) for i in range(3000)])
    assert counts.min() > 900
    assert [routed.index_of(document(i).key) for i in range(12)] == [0, 1, 1, 1, 1, 2, 0, 2, 0, 0, 0, 1]


def test_all_begin_before_one_is_waited_for() -> None:
    both = threading.Barrier(2)
    engines = [Numbers(at_begin=lambda: both.wait(TIMEOUT_S)) for _ in range(2)]
    routed = RoutedEngine(engines)
    wait = routed.begin([part(i, one) for i, one in enumerate(one_of_each(routed))])
    assert [engine.ended for engine in engines] == [0, 0]
    assert wait() == [0, 1]


def lost() -> None:
    raise DeviceLostError("the GPU cuda:0 was lost")


def test_a_lost_gpu_is_told_when_the_others_have_ended_and_costs_its_own_documents() -> None:
    engines = [Numbers(at_end=lost), Numbers(), Numbers()]
    routed = RoutedEngine(engines)
    documents = one_of_each(routed)
    wait = routed.begin([part(i, one) for i, one in enumerate(documents)])
    with pytest.raises(DeviceLostError, match="cuda:0"):
        wait()
    assert [engine.ended for engine in engines] == [1, 1, 1]
    assert routed.begin([part(i, one) for i, one in enumerate(documents[1:])])() == [0, 1]


def test_an_engine_that_cannot_begin_lets_the_others_begin() -> None:
    engines = [Numbers(), Numbers(at_begin=lost)]
    routed = RoutedEngine(engines)
    with pytest.raises(DeviceLostError):
        routed.begin([part(i, one) for i, one in enumerate(one_of_each(routed))])
    assert [engine.runs for engine in engines] == [[1], []]


def test_a_schedule_goes_on_with_the_documents_of_those_that_are_left() -> None:
    config: Any = type("Config", (), {"prompt": type("Prompt", (), {"logit_bias": 0.0})})
    engines = [Numbers(config, at_end=lost), Numbers(config)]
    routed = RoutedEngine(engines)
    schedule, documents = Schedule(routed), one_of_each(routed)
    schedule.add(pair(7, documents[0]))
    assert schedule.step() == []  # it is in flight
    with pytest.raises(DeviceLostError):
        schedule.step()
    ticket = schedule.add(pair(8, documents[1]))
    done = {}
    while len(schedule):
        done.update(schedule.step())
    assert done[ticket].logit == 8


def test_what_is_kept_is_asked_of_the_engine_that_has_it() -> None:
    engines = [Numbers(keeps=True, rows=25), Numbers(keeps=True, rows=25)]
    routed = RoutedEngine(engines)
    documents = [document(i, 10 + i % 3) for i in range(20)]
    assert not any(routed.has(one) for one in documents)
    assert [state.num_bytes for state in routed.states(documents)] == [one.length for one in documents]
    assert all(routed.has(one) for one in documents)
    assert all((found := routed.find(one)) is not None and found.num_bytes == one.length for one in documents)
    assert engines[0].seen | engines[1].seen == {one.key for one in documents}
    assert not engines[0].seen & engines[1].seen
    assert routed.compute(documents) == [one.length for one in documents]
    routed.prefetch(iter([document(99)]))
    assert engines[routed.index_of(document(99).key)].has(document(99))
    routed.rest(iter(documents[:3]))
    assert sum(engine.rested for engine in engines) == 3 + 2


def test_images_are_encoded_once_by_one_for_all() -> None:
    """They have no document yet, and what comes out is in the computer's memory."""
    engines = [Numbers(), Numbers()]
    images = [Image(number) for number in range(20)]
    RoutedEngine(engines).encode(images)  # type: ignore[arg-type]
    assert {id(image.embeds) for image in images} == {id(engine) for engine in engines}
    again = [Image(number) for number in range(20)]
    RoutedEngine(engines).encode(again)  # type: ignore[arg-type]
    assert [image.embeds is other.embeds for image, other in zip(images, again, strict=True)] == [True] * 20


def test_scores_are_those_of_one_engine(artifact: Path) -> None:
    config: ModelConfig = read_manifest(artifact).model
    pairs = [(f"query {i % 3}", f"document {i % 7} " * (i % 5 + 1)) for i in range(20)]
    with Reranker.load(artifact, threads=1) as reranker:
        wanted = reranker.results(pairs)
        own = reranker.engine
        engines: list[Any] = [GraphEngine(config, own.graphs, kv=own.kv, salt=own.salt) for _ in range(2)]
        routed: Any = RoutedEngine(engines)
        runs: list[list[int]] = [[], []]
        for engine, seen in zip(engines, runs, strict=True):
            engine.on_run = lambda stats, seen=seen: seen.append(stats.pairs)
        reranker.engine = routed
        found = reranker.results(pairs)
        reranker.engine = own
    assert found == wanted
    assert sum(map(sum, runs)) == len(pairs)
    assert all(runs)
