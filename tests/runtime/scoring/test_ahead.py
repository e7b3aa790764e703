"""What is prepared by threads is what is prepared without, in its place, and no thread stays."""

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image

from m0kit import Reranker
from m0kit.errors import InputError
from m0kit.reading.inputs import Picture
from m0kit.scoring import images
from m0kit.scoring.ahead import prepared_ahead
from m0kit.scoring.engine import GraphEngine, Part
from m0kit.scoring.images import Images
from m0kit.scoring.schedule import Schedule

THREADS = 4


@pytest.fixture(autouse=True)
def _no_thread_stays() -> Iterator[None]:
    before = set(threading.enumerate())
    yield
    assert set(threading.enumerate()) <= before


# --- through a reranker ------------------------------------------------------------------------------------


@pytest.fixture
def beside(artifact: Path, monkeypatch: pytest.MonkeyPatch) -> Reranker:
    """As if its engine computed beside its caller: a run is computed when it is waited for."""
    reranker = Reranker.load(artifact, threads=1)
    begin = GraphEngine.begin

    def later(self: GraphEngine, parts: Sequence[Part]) -> Callable[[], list[float]]:
        return lambda: begin(self, parts)()

    for name, value in {"begin": later, "runs_ahead": 1, "prepare_threads": THREADS, "rows": 300}.items():
        monkeypatch.setattr(GraphEngine, name, value)
    reranker.score([("q", "d")])
    return reranker


@pytest.fixture
def mixed(tmp_path: Path, picture: Callable[..., Image.Image]) -> list[Any]:
    """Pairs of all kinds, equal ones and wrong ones among them."""
    page = tmp_path / "page.png"
    picture(140, 112).save(page)
    cut = page.read_bytes()[:-2000]
    documents: list[Any] = ["short", "a long text, " * 60, page, picture(56, 84, 3), "", 7, cut, {"id": "nowhere"}]
    documents += [tmp_path / "gone.png", {"text": "another", "image": cut}]
    return [*((f"query {i}", document) for i in range(4) for document in documents), "no pair", (page, "short")]


def test_the_results_are_those_without_threads(
    artifact: Path, mixed: list[Any], request: pytest.FixtureRequest
) -> None:
    expected = Reranker.load(artifact, threads=1).evaluate(mixed)
    reranker: Reranker = request.getfixturevalue("beside")
    for pairs in (mixed, iter(mixed)):
        results = dict(reranker.stream(pairs))
        assert sorted(results) == list(range(len(mixed)))
        for position, one in enumerate(expected):
            assert str(results[position].error) == str(one.error)
            assert one.error or results[position] == one
    assert sum(result.error is not None for result in expected) == 25
    with pytest.raises(InputError, match=r"^pair 4: document: is empty"):
        reranker.evaluate(mixed, on_error="raise")


def test_a_stream_that_is_left_early_ends_its_threads(beside: Reranker, mixed: list[Any]) -> None:
    stream = beside.stream(mixed * 20)
    next(stream)
    stream.close()


def test_an_interrupt_ends_its_threads(beside: Reranker, mixed: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(_: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(Schedule, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        beside.evaluate(mixed * 20)


def test_runs_begin_before_all_is_prepared(beside: Reranker) -> None:
    made = 0

    def lazy() -> Iterator[tuple[str, str]]:
        nonlocal made
        for made in range(1, 10_001):
            yield f"query {made}", f"document {made % 7} " * 20

    with closing(beside.stream(lazy())) as stream:
        next(stream)
        assert made < 100
    made, pairs = 0, [(f"query {i}", "a document " * 20) for i in range(200)]
    prepare = beside.prompts.build

    def counted(query: Any, document: Any) -> Any:
        nonlocal made
        made += 1
        return prepare(query, document)

    beside.prompts.build = counted  # type: ignore[method-assign]
    with closing(beside.stream(pairs)) as stream:
        next(stream)
        assert made < 100


# --- by itself ---------------------------------------------------------------------------------------------


class Numbers:
    """Prepares a number as its double, on whatever thread; even ones are quick."""

    def __init__(self) -> None:
        self.threads: dict[int, str] = {}

    def is_quick(self, pair: int) -> bool:
        return pair % 2 == 0

    def prepare(self, pair: int) -> Any:
        self.threads[pair] = threading.current_thread().name
        if pair == 13:
            raise InputError("unlucky")
        if pair == 17:
            raise MemoryError
        return SimpleNamespace(number=2 * pair, document=SimpleNamespace(images=()), images=())


class Engine:
    prepare_threads = THREADS

    def has(self, _: Any) -> bool:
        return False


def ahead(pairs: Any, threads: int = THREADS) -> tuple[Numbers, Any]:
    numbers, engine = Numbers(), Engine()
    engine.prepare_threads = threads
    preparer: Any = numbers
    engine_of: Any = engine
    return numbers, prepared_ahead(pairs, preparer, engine_of)


@pytest.mark.parametrize("threads", [1, THREADS])
def test_all_come_in_order_and_errors_in_their_place(threads: int) -> None:
    numbers, ready = ahead(range(17), threads)
    told = ["unlucky" if isinstance(one, InputError) else one.number for one in ready]
    assert told == [*range(0, 26, 2), "unlucky", 28, 30, 32]
    here = threading.current_thread().name
    assert {pair for pair, name in numbers.threads.items() if name == here} == set(range(0, 17, min(threads, 2)))


@pytest.mark.parametrize("threads", [1, THREADS])
def test_what_else_is_raised_comes_in_its_place_and_is_the_end(threads: int) -> None:
    numbers, ready = ahead(range(1000), threads)
    for _ in range(17):
        next(ready)
    with pytest.raises(MemoryError):
        next(ready)
    assert list(ready) == []
    assert len(numbers.threads) < 17 + 10 * threads


def test_no_more_is_taken_than_a_few_for_each_thread() -> None:
    taken = 0

    def odd() -> Iterator[int]:
        nonlocal taken
        for taken in range(1, 10_001):
            yield 2 * taken + 101

    _, ready = ahead(odd())
    with closing(ready):
        for told in range(200):
            next(ready)
            assert taken <= told + 2 + 4 * THREADS
    last = taken
    assert list(ready) == []
    assert taken == last


@pytest.mark.parametrize("threads", [1, THREADS])
def test_an_error_of_what_gives_the_pairs_is_raised_and_ends_the_threads(threads: int) -> None:
    def broken() -> Iterator[int]:
        yield from range(100, 140)
        raise OSError("the source is gone")

    _, ready = ahead(broken(), threads)
    with pytest.raises(OSError, match="the source is gone"):
        list(ready)


def test_threads_that_want_one_picture_decode_it_once(
    reranker: Reranker, picture: Callable[..., Image.Image], monkeypatch: pytest.MonkeyPatch
) -> None:
    num_decoded, asked = 0, threading.Semaphore(0)
    resize = images.resize

    def counted(*arguments: Any) -> Any:
        nonlocal num_decoded
        num_decoded += 1
        for _ in range(THREADS - 1):
            asked.acquire()  # until the others are about to ask
        return resize(*arguments)

    monkeypatch.setattr(images, "resize", counted)
    seen, page = Images(reranker.config.image), Picture(picture(90, 120), "page")

    def see(number: int) -> Any:
        if number:
            asked.release()
        return seen.see(page, "document")

    with ThreadPoolExecutor(THREADS) as pool:
        found = list(pool.map(see, range(THREADS)))
    assert len({id(image) for image in found}) == 1
    assert num_decoded == 1
