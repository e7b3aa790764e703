import asyncio
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

pytest.importorskip("starlette", reason="m0kit[serve] is not installed")

from tests.runtime.server.conftest import Watcher, asked, outcomes_of, png

from m0kit import Reranker
from m0kit.errors import DeviceLostError
from m0kit.scoring.ahead import prepared_and_drawn
from m0kit.scoring.prepare import Preparer
from m0kit.server.desk import Desk
from m0kit.server.lane import Lane, Task
from m0kit.server.problems import RequestError
from m0kit.server.settings import ModelSettings, Settings
from m0kit.server.wire.ask import Side

TEXTS = ["a first text", "another one, somewhat longer than the first", "three", "the fourth " * 30]


class PanicException(BaseException):
    """As libraries in Rust raise theirs."""

    __module__ = "pyo3_runtime"


class Gate:
    """Stands before each run of a desk and lets so many through."""

    def __init__(self, line_schedule: Any) -> None:
        self._step, self._runs = line_schedule.step, threading.Semaphore(0)
        self.asked = threading.Event()
        line_schedule.step = self._wait

    def _wait(self) -> Any:
        self.asked.set()
        self._runs.acquire()
        return self._step()

    def open(self) -> None:
        self._runs.release(1_000_000)


@pytest.fixture
def gate(desk: Desk, lane: Lane) -> Gate:
    return Gate(desk.schedule_of(lane))


async def soon(condition: Callable[[], bool]) -> None:
    for _ in range(2000):
        if condition():
            return
        await asyncio.sleep(0.01)
    raise AssertionError("it never came true")


def weighed(lane: Lane, limits: Settings, query: Any, documents: Any, **options: Any) -> list[Task]:
    ask = asked(query, documents, **options)
    return lane.weigh(ask.queries, ask.documents, ask, limits)


def test_scores_are_those_of_a_reranker_with_the_same_form_of_states(
    desk: Desk, lane: Lane, limits: Settings, artifact: Path, picture: Callable[..., Image.Image]
) -> None:
    documents = [*TEXTS, png(picture(60, 90)), png(picture(200, 100, 1))]
    found = asyncio.run(outcomes_of(desk, lane, weighed(lane, limits, "a query", documents)))
    alone = Reranker.load(artifact, threads=1, kv="fp16")
    assert [one.result.logit for one in found if one.result] == alone.score(
        [("a query", document) for document in documents], raw=True
    ).tolist()
    assert [one.cached for one in found] == [False] * 6
    assert all(one.tokens > 10 for one in found)


def test_asked_again_documents_are_cached_and_score_the_same(desk: Desk, lane: Lane, limits: Settings) -> None:
    first = asyncio.run(outcomes_of(desk, lane, weighed(lane, limits, "a query", TEXTS)))
    tasks = weighed(lane, limits, "a query", TEXTS)
    assert sum(task.cost for task in tasks) < 100
    again = asyncio.run(outcomes_of(desk, lane, tasks))
    assert [one.cached for one in again] == [True] * 4
    assert [one.result for one in again] == [one.result for one in first]


def test_requests_at_once_compute_a_document_once(
    desk: Desk, lane: Lane, limits: Settings, watcher: Watcher, gate: Gate
) -> None:
    async def both() -> Any:
        first = asyncio.create_task(outcomes_of(desk, lane, weighed(lane, limits, "one", TEXTS)))
        await soon(gate.asked.is_set)
        second = asyncio.create_task(outcomes_of(desk, lane, weighed(lane, limits, "two", TEXTS)))
        await asyncio.sleep(0)
        gate.open()
        return await first, await second

    found = asyncio.run(both())
    assert [len(some) for some in found] == [4, 4]
    rows = sum(lane.preparer.document(side.content, "")[0].length for side in asked("q", TEXTS).documents)
    assert rows < watcher.rows < rows + 8 * 20  # and the queries


def test_a_large_request_does_not_starve_a_small_one(desk: Desk, lane: Lane, limits: Settings, gate: Gate) -> None:
    many = [f"document {i} " * 60 for i in range(60)]
    ends: list[str] = []

    async def ask(name: str, documents: list[str]) -> None:
        await outcomes_of(desk, lane, weighed(lane, limits, "q", documents))
        ends.append(name)

    async def both() -> None:
        large = asyncio.create_task(ask("large", many))
        await soon(gate.asked.is_set)
        small = asyncio.create_task(ask("small", TEXTS[:3]))
        await asyncio.sleep(0)
        gate.open()
        await asyncio.gather(large, small)

    asyncio.run(both())
    assert ends == ["small", "large"]


def test_a_request_that_is_left_is_forgotten_and_what_was_done_is_kept(
    desk: Desk, lane: Lane, limits: Settings
) -> None:
    documents = [f"document {i} " * 100 for i in range(12)]

    async def leave() -> int:
        deadline = asyncio.get_running_loop().time() + 60
        work = desk.work(lane, weighed(lane, limits, "q", documents), deadline)
        some = await anext(work)
        await work.aclose()
        await soon(lambda: desk.num_requests == 0)
        return len(some)

    num_done = asyncio.run(leave())
    assert (desk.num_queued, desk.num_requests) == (0, 0)
    again = asyncio.run(outcomes_of(desk, lane, weighed(lane, limits, "q", documents)))
    assert 1 <= num_done <= sum(one.cached for one in again) < 12


def test_a_deadline_ends_a_request_and_its_work(desk: Desk, lane: Lane, limits: Settings, gate: Gate) -> None:
    async def late() -> None:
        with pytest.raises(RequestError, match="0 of 4 documents were done") as caught:
            await outcomes_of(desk, lane, weighed(lane, limits, "q", TEXTS), 0.05)
        assert (caught.value.status, caught.value.code) == (504, "DEADLINE_EXCEEDED")
        gate.open()
        await soon(lambda: desk.num_requests == 0)

    asyncio.run(late())
    assert desk.num_queued == 0


def test_more_work_than_may_wait_is_refused_before_any(lane: Lane, limits: Settings, watcher: Watcher) -> None:
    desk = Desk(watcher, queue_s=0.001)
    desk.open(lane)
    asyncio.run(outcomes_of(desk, lane, weighed(lane, limits, "q", TEXTS)))  # now it is known how long work takes
    gate = Gate(desk.schedule_of(lane))

    async def too_much() -> None:
        first = asyncio.create_task(outcomes_of(desk, lane, weighed(lane, limits, "q", ["new " * 300])))
        await soon(gate.asked.is_set)
        with pytest.raises(RequestError, match="Try again in") as caught:
            await outcomes_of(desk, lane, weighed(lane, limits, "q", ["other " * 300]))
        assert (caught.value.status, caught.value.code) == (429, "OVERLOADED")
        assert int(caught.value.headers["Retry-After"]) >= 1
        gate.open()
        assert len(await first) == 1  # what was let in is answered
        await soon(lambda: desk.num_requests == 0)

    asyncio.run(too_much())
    desk.close()


def test_what_a_request_takes_besides_its_runs_counts_where_it_is_told_how_long_work_waits(
    desk: Desk, lane: Lane, limits: Settings, gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    slowly_s = 0.1

    def slowly(*given: Any) -> Any:
        time.sleep(slowly_s)
        return prepared_and_drawn(*given)

    monkeypatch.setattr("m0kit.server.desk.prepared_and_drawn", slowly)
    gate.open()
    for number in range(3):
        asyncio.run(outcomes_of(desk, lane, weighed(lane, limits, "q", [f"text {number}"])))

    async def one_more() -> float:
        asking = asyncio.create_task(outcomes_of(desk, lane, weighed(lane, limits, "q", ["text 3"])))
        await soon(lambda: desk.num_requests == 1)
        seconds = desk.queued_s
        await asking
        return seconds

    assert asyncio.run(one_more()) >= slowly_s


def test_a_document_that_cannot_be_scored_fails_its_request_alone_and_is_named(
    desk: Desk, lane: Lane, limits: Settings, picture: Callable[..., Image.Image]
) -> None:
    whole = png(picture(60, 90))
    cut_off = whole[: len(whole) // 2]

    async def both() -> Any:
        good = asyncio.create_task(outcomes_of(desk, lane, weighed(lane, limits, "q", TEXTS)))
        with pytest.raises(RequestError, match=r"^documents\[2\]: the PNG file .* is damaged") as caught:
            await outcomes_of(desk, lane, weighed(lane, limits, "q", ["one", "two", cut_off]))
        assert (caught.value.status, caught.value.code, caught.value.where) == (422, "INVALID_INPUT", "documents[2]")
        return await good

    assert len(asyncio.run(both())) == 4


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"max_documents": 2}, "4 documents, and 2 may"),
        ({"max_images": 1}, "more than 1 images"),
        ({"max_image_bytes": 100}, "over the limit of 100"),
        ({"max_image_pixels": 5000}, "60×90|90×60"),
        ({"max_request_pixels": 10_000}, "over 10000 pixels"),
        ({"max_request_tokens": 20}, "the work of"),
    ],
)
def test_limits_are_held_before_anything_is_decoded(
    lane: Lane, picture: Callable[..., Image.Image], changed: dict[str, int], said: str
) -> None:
    limits = replace(Settings((ModelSettings("nowhere"),)), **changed)  # type: ignore[arg-type]
    documents = ["a text", png(picture(60, 90)), png(picture(60, 90, 1)), "another"]
    with pytest.raises(RequestError, match=said) as caught:
        weighed(lane, limits, "q", documents)
    assert (caught.value.status, caught.value.code) == (422, "TOO_MUCH")


def test_documents_are_cut_where_a_request_says_so_and_too_long_ones_refused(
    desk: Desk, lane: Lane, limits: Settings
) -> None:
    long = "word " * 50
    (cut,) = asyncio.run(outcomes_of(desk, lane, weighed(lane, limits, "q", [long], max_document_tokens=5)))
    (whole,) = asyncio.run(outcomes_of(desk, lane, weighed(lane, limits, "q", [long])))
    assert cut.tokens + 30 < whole.tokens
    prompt = lane.reranker.config.prompt
    endless = "word " * (2 * prompt.max_length)
    with pytest.raises(RequestError, match="longer than the model reads"):
        asyncio.run(outcomes_of(desk, lane, weighed(lane, limits, "q", [endless], must_fit=True)))
    assert asyncio.run(outcomes_of(desk, lane, weighed(lane, limits, "q", [endless])))


class TestAdditions:
    def add(self, desk: Desk, lane: Lane, limits: Settings, documents: dict[str, Any]) -> Any:
        sides = [(name, Side(asked("q", [one]).documents[0].content, name)) for name, one in documents.items()]
        return asyncio.run(outcomes_of(desk, lane, lane.weigh_documents(sides, limits)[0]))

    def test_documents_are_read_once_and_known_by_id(
        self, desk: Desk, lane: Lane, limits: Settings, picture: Callable[..., Image.Image]
    ) -> None:
        page = png(picture(60, 90))
        found = self.add(desk, lane, limits, {"a": "some text", "b": page})
        assert [(one.status, one.error) for one in found] == [("read", None), ("read", None)]
        assert lane.writer is not None
        assert sorted(lane.writer.ids()) == ["a", "b"]
        by_id = asyncio.run(outcomes_of(desk, lane, weighed(lane, limits, "q", [{"id": "a"}, {"id": "b"}])))
        whole = asyncio.run(outcomes_of(desk, lane, weighed(lane, limits, "q", ["some text", page])))
        assert [one.cached for one in by_id] == [True, True]
        assert [one.result for one in by_id] == [one.result for one in whole]

    def test_what_is_there_is_said(self, desk: Desk, lane: Lane, limits: Settings) -> None:
        self.add(desk, lane, limits, {"a": "some text"})
        again = self.add(desk, lane, limits, {"a": "some text", "b": "some text"})
        assert [one.status for one in again] == ["known", "known"]
        assert [one.status for one in self.add(desk, lane, limits, {"a": "other text"})] == ["replaced"]

    def test_a_bad_one_costs_itself(self, desk: Desk, lane: Lane, limits: Settings, picture: Any) -> None:
        damaged = png(picture(60, 90))[:-200]
        found = self.add(desk, lane, limits, {"a": "some text", "b": damaged, "c": "more"})
        assert [one.status for one in found] == ["read", "", "read"]
        assert found[1].error is not None
        assert found[1].error.code == "INVALID_INPUT"

    def test_one_that_is_removed_is_no_longer_known(self, desk: Desk, lane: Lane, limits: Settings) -> None:
        self.add(desk, lane, limits, {"a": "some text"})
        assert desk.remove(lane, ["a", "z"]).result() == ["z"]
        with pytest.raises(RequestError, match="has no document 'a'"):
            weighed(lane, limits, "q", [{"id": "a"}])


def test_a_failed_run_is_told_and_the_next_request_is_answered(
    desk: Desk, lane: Lane, limits: Settings, caplog: pytest.LogCaptureFixture
) -> None:
    def fails() -> Any:
        raise RuntimeError("what a library says of itself")

    desk.schedule_of(lane).step = fails  # type: ignore[method-assign]
    with pytest.raises(RequestError, match="the model could not be run") as caught:
        asyncio.run(outcomes_of(desk, lane, weighed(lane, limits, "q", TEXTS)))
    assert (caught.value.status, caught.value.code) == (503, "ENGINE_FAILED")
    assert "what a library says" not in str(caught.value)
    assert "what a library says" in caplog.text
    assert len(asyncio.run(outcomes_of(desk, lane, weighed(lane, limits, "q", TEXTS)))) == 4


@pytest.mark.parametrize("error", [RuntimeError("of a library"), MemoryError(), PanicException("of a library")])
@pytest.mark.parametrize("is_quick", [False, True])
def test_a_text_that_cannot_be_read_fails_its_own_request(
    desk: Desk, lane: Lane, limits: Settings, monkeypatch: pytest.MonkeyPatch, error: BaseException, is_quick: bool
) -> None:
    def fails(*_: Any) -> Any:
        raise error

    tasks = weighed(lane, limits, "q", TEXTS)
    with monkeypatch.context() as patch:
        patch.setattr(Preparer, "is_quick", lambda *_: is_quick)
        patch.setattr(Preparer, "prepare", fails)
        with pytest.raises(RequestError, match="the model could not be run"):
            asyncio.run(outcomes_of(desk, lane, tasks))
    assert not desk.is_lost(lane)
    assert len(asyncio.run(outcomes_of(desk, lane, tasks))) == 4


def test_documents_that_cannot_be_computed_are_told_to_all_who_wait(
    desk: Desk, lane: Lane, limits: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any) -> Any:
        raise RuntimeError("of a library")

    sides = [(str(i), Side(asked("q", [text]).documents[0].content, "")) for i, text in enumerate(TEXTS)]
    tasks, _ = lane.weigh_documents(sides, limits)
    with monkeypatch.context() as patch:
        patch.setattr(type(lane.reranker.engine), "compute", fails)
        with pytest.raises(RequestError, match="the model could not be run"):
            asyncio.run(outcomes_of(desk, lane, tasks))
    assert desk.num_queued == 0
    assert [one.status for one in asyncio.run(outcomes_of(desk, lane, tasks))] == ["read"] * 4


def test_a_lost_device_lets_nobody_in(desk: Desk, lane: Lane, limits: Settings) -> None:
    def fails() -> Any:
        raise DeviceLostError("the GPU is gone")

    desk.schedule_of(lane).step = fails  # type: ignore[method-assign]
    for _ in range(2):
        with pytest.raises(RequestError, match="the model could not be run"):
            asyncio.run(outcomes_of(desk, lane, weighed(lane, limits, "q", TEXTS)))
    assert desk.is_lost(lane)


def test_nobody_is_let_in_once_it_is_shut_and_who_is_in_is_answered(
    desk: Desk, lane: Lane, limits: Settings, gate: Gate
) -> None:
    async def stop() -> None:
        first = asyncio.create_task(outcomes_of(desk, lane, weighed(lane, limits, "q", TEXTS)))
        await soon(gate.asked.is_set)
        desk.shut()
        with pytest.raises(RequestError, match="stopping") as caught:
            await outcomes_of(desk, lane, weighed(lane, limits, "q", TEXTS))
        assert (caught.value.status, caught.value.code) == (503, "STOPPING")
        gate.open()
        assert len(await first) == 4
        await soon(lambda: desk.num_requests == 0)

    asyncio.run(stop())
