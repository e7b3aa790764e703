"""More than a server can do, workers that are killed, and many requests: nothing is lost, and nothing stays behind."""

import contextlib
import gc
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from http.client import HTTPException
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("uvicorn", reason="m0kit[serve] is not installed")
pytest.importorskip("prometheus_client", reason="m0kit[serve] is not installed")

from tests.runtime.server.serving import PATIENCE_S, Served, served, settings_of, until

from m0kit.keeping.store import Store
from m0kit.server.app import App, build
from m0kit.server.desk import Desk
from m0kit.server.settings import ModelSettings

PRECISION = "fp32"  # of the artifact, which is tiny
DAY = 16  # times that each kind of request comes
MANY = 60  # requests at once
SLOW_S = 0.02  # of a run of the engine that stands for a large one
BEGINNING_S = 120.0  # for processes of a busy machine to start; far more than it takes


def request(method: str, path: str, value: Any = None) -> bytes:
    body = b"" if value is None else json.dumps(value).encode()
    head = [f"{method} {path} HTTP/1.1", "Host: localhost"]
    if body:
        head += ["Content-Type: application/json", f"Content-Length: {len(body)}"]
    return "\r\n".join([*head, "", ""]).encode() + body


def ranking(number: int, *more: str, **fields: str) -> bytes:
    documents = [f"document {number} of many", *more]
    return request("POST", "/v1/rerank", {"query": f"query {number}", "documents": documents, **fields})


class Slow:
    """An engine that takes its time, and runs only while it may."""

    def __init__(self, desk: Desk, app: App) -> None:
        schedule = desk.schedule_of(app.service.lane(None))
        self._step, self.may_run = schedule.step, threading.Event()
        self.may_run.set()
        schedule.step = self._wait  # type: ignore[method-assign]

    def _wait(self) -> Any:
        time.sleep(SLOW_S)
        self.may_run.wait()
        return self._step()


@contextlib.contextmanager
def serving(artifact: Path, index: Path | None = None, **changes: Any) -> Iterator[tuple[Served, App]]:
    models = (ModelSettings(str(artifact), ("m",), index=index, threads=1),)
    app = build(settings_of(models=models, **changes))
    with served(app, app.metrics, models=models, **changes) as at:
        until(lambda: app.is_ready)
        yield at, app


class Crowd:
    """Many clients at once, each with a connection and a thread of its own."""

    def __init__(self, at: Served, requests: list[bytes]) -> None:
        self._at = at
        self.answers: list[tuple[int, dict[str, str], bytes]] = []
        self._pool = ThreadPoolExecutor(len(requests))
        self._asking = [self._pool.submit(self._ask, one) for one in requests]

    def _ask(self, data: bytes) -> None:
        self.answers.append(self._at.ask(data).answer())

    @property
    def statuses(self) -> list[int]:
        return [status for status, _, _ in self.answers]

    def wait(self) -> None:
        for one in self._asking:
            one.result()
        self._pool.shutdown()


def test_of_ten_times_too_much_each_request_is_answered_or_told_when_to_come_again(committed: Path) -> None:
    # A request takes a run at least, so by what was measured five of them fill the time that work may wait.
    with serving(committed / PRECISION, queue_s=5 * SLOW_S) as (at, app):
        desk = app.service.desk
        engine = Slow(desk, app)
        for number in range(3):  # now it is known how long work takes
            assert at.ask(ranking(number)).answer()[0] == 200
        engine.may_run.clear()
        crowd = Crowd(at, [ranking(number) for number in range(3, 3 + MANY)])
        until(lambda: crowd.statuses.count(429) + desk.num_requests == MANY)
        num_accepted = desk.num_requests
        assert crowd.statuses == [429] * (MANY - num_accepted)
        assert 1 <= num_accepted <= 6  # one is always let in, and the others while there is time for them
        assert at.ask(request("GET", "/ready")).answer()[0] == 200
        engine.may_run.set()
        crowd.wait()
        assert Counter(crowd.statuses) == {200: num_accepted, 429: MANY - num_accepted}
        for status, headers, body in crowd.answers:
            if status == 429:
                assert int(headers["retry-after"]) >= 1
                assert json.loads(body)["code"] == "OVERLOADED"
            else:
                assert len(json.loads(body)["results"]) == 1
        assert (desk.num_requests, desk.num_queued) == (0, 0)
        assert at.ask(ranking(MANY + 3)).answer()[0] == 200  # who comes again is served


def test_bodies_are_held_up_to_a_limit_whatever_comes(committed: Path) -> None:
    more = "a field that nobody reads " * 4000
    size = len(ranking(0, more=more))
    with serving(committed / PRECISION, max_held_bytes=5 * size) as (at, app):
        desk = app.service.desk
        engine = Slow(desk, app)
        engine.may_run.clear()
        crowd = Crowd(at, [ranking(number, more=more) for number in range(MANY)])
        until(lambda: crowd.statuses.count(429) + desk.num_requests == MANY)
        num_accepted = desk.num_requests
        assert num_accepted <= 5
        engine.may_run.set()
        crowd.wait()
        assert Counter(crowd.statuses) == {200: num_accepted, 429: MANY - num_accepted}
        assert all("retry-after" in headers for status, headers, _ in crowd.answers if status == 429)
        for number in range(6):  # what was held is given back
            assert at.ask(ranking(number, more=more)).answer()[0] == 200


def test_a_day_of_requests_leaves_nothing_behind(committed: Path, tmp_path: Path) -> None:
    with serving(committed / PRECISION, tmp_path / "index") as (at, app):

        def day() -> Counter[int]:
            seen: Counter[int] = Counter()
            for number in range(DAY):
                name = f"/v1/documents/d{number % 4}"
                asked = [
                    ranking(number, "a text that comes again"),
                    request("POST", "/v1/rerank", {"query": "q", "documents": [{"id": "d0"}, {"id": "absent"}]}),
                    request("PUT", name, {"text": f"version {number % 3}"}),
                    request("GET", name),
                    request("DELETE", name),
                    request("POST", "/v1/rerank", {"query": "q"}),
                    request("POST", "/v1/rerank", {"query": "q", "documents": [{"image": "no image"}]}),
                    request("GET", "/nowhere"),
                    request("GET", "/metrics"),
                    b"no HTTP at all\r\n\r\n",
                ]
                for data in asked:
                    client = at.ask(data)
                    seen[client.answer()[0]] += 1
                    client.close()
                at.ask(ranking(0, "for a client that hangs up " * 50)).close()
            until(lambda: not app.service.desk.num_requests and not at.server.server_state.connections)
            at.clients.clear()
            return seen

        first, before = day(), there_is()
        again, after = day(), there_is()
    assert first == again
    assert first.keys() == {200, 400, 404, 422}
    # The last of a kind may be held somewhere; what is left of each request would be a day's worth.
    assert not {name: more for name, more in (after - before).items() if more >= DAY}


def there_is() -> Counter[str]:
    """Objects of our classes, threads, and open files where the system tells."""
    gc.collect()
    names = (f"{type(one).__module__}.{type(one).__qualname__}" for one in gc.get_objects())
    found = Counter(name for name in names if name.startswith("m0kit."))
    found["threads"] = threading.active_count()
    found["files"] = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
    return found


# --- workers that are killed -----------------------------------------------------------------------------


@dataclass
class Process:
    """`m0kit serve` in processes of its own, and what it logs."""

    process: "subprocess.Popen[str]"
    port: int = 0
    lines: list[dict[str, Any]] = field(default_factory=list)

    def read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.lines.append(json.loads(line) if line.startswith("{") else {"event": line})

    def events(self, event: str, worker: int | None = None) -> list[dict[str, Any]]:
        return [line for line in self.lines if line["event"] == event and worker in (None, line.get("worker"))]


@contextlib.contextmanager
def workers(artifact: Path, index: Path) -> Iterator[Process]:
    options = ["--workers", "2", "--threads", "1", "--port", "0", "--log-format", "json", "--index", str(index)]
    command = [sys.executable, "-m", "m0kit", "serve", str(artifact), *options]
    with subprocess.Popen(command, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL, text=True) as process:
        try:
            server = Process(process)
            reading = threading.Thread(target=server.read, daemon=True)
            reading.start()
            wait_long(lambda: server.events("ready") or process.poll() is not None)
            assert process.poll() is None, server.lines
            server.port = int(server.events("ready")[0]["address"].rpartition(":")[2])
            yield server
            process.send_signal(signal.SIGTERM)
            assert process.wait(BEGINNING_S) == 0
            reading.join(PATIENCE_S)
        finally:
            process.kill()


def wait_long(condition: Callable[[], object]) -> None:
    end = time.monotonic() + BEGINNING_S
    while not condition():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.02)


class Writer(threading.Thread):
    """Adds documents one after another, and writes down what was acknowledged."""

    def __init__(self, at: Served, number: int) -> None:
        super().__init__(daemon=True)
        self._at, self._number = at, number
        self.is_over = False
        self.journal: dict[str, str] = {}
        self.ends: Counter[int | str] = Counter()

    def run(self) -> None:
        serial = 0
        while not self.is_over:
            name, text = f"{self._number}-{serial}", f"text {serial} of writer {self._number}"
            serial += 1
            end = self._ask(request("PUT", f"/v1/documents/{name}", {"text": text}))
            if end == 200:
                self.journal[name] = text
            self.ends[end] += 1
            self.ends[self._ask(ranking(serial, text))] += 1

    def _ask(self, data: bytes) -> int | str:
        try:
            with contextlib.closing(self._at.ask(data)) as client:
                return client.answer()[0]
        except TimeoutError:
            return "hung"
        except (OSError, HTTPException):
            return "broken"


@pytest.mark.skipif(os.name != "posix", reason="several workers need sockets that are handed on")
def test_a_killed_worker_is_replaced_and_no_acknowledged_document_is_lost(committed: Path, tmp_path: Path) -> None:
    index = tmp_path / "index"
    with workers(committed / PRECISION, index) as server:
        told = [(line["event"], line.get("worker")) for line in server.lines]
        # Two that both find no index would both make it.
        assert told.index(("worker ready", 0)) < told.index(("worker started", 1))
        at = Served(None, server.port, None, None, [])  # type: ignore[arg-type]  # it is another process
        writers = [Writer(at, number) for number in range(3)]
        for writer in writers:
            writer.start()

        def num_written() -> int:
            return sum(len(writer.journal) for writer in writers)

        for killed in (0, 1):  # 0 is the one that writes to the index
            wanted = num_written() + 20
            wait_long(lambda wanted=wanted: num_written() >= wanted)
            num_ready = len(server.events("worker ready", killed))
            os.kill(server.events("worker started", killed)[-1]["pid"], signal.SIGKILL)
            wait_long(lambda killed=killed, before=num_ready: len(server.events("worker ready", killed)) > before)
        wanted = num_written() + 20
        wait_long(lambda: num_written() >= wanted)
        for writer in writers:
            writer.is_over = True
        for writer in writers:
            writer.join(PATIENCE_S)
            assert not writer.is_alive()
        ends = sum((writer.ends for writer in writers), Counter())
        assert ends.keys() <= {200, 503, "broken"}  # 503: the one that writes is being started
        journal = {name: text for writer in writers for name, text in writer.journal.items()}
        with Store.open(index) as store:
            there = {name: store.document(name) for name in journal}
    assert {name: one.data.decode() for name, one in there.items() if one is not None} == journal
    assert len(server.events("worker was ended by SIGKILL")) == 2
