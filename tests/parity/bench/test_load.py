"""The generator of load against a server of a few lines: what it counts is what happened."""

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from m0kit.artifact.manifest import read_manifest
from m0kit.errors import InputError, M0kitError
from m0kit_parity.bench.load.bodies import KINDS, Sizes, Source
from m0kit_parity.bench.load.client import HUNG, LOST, Client
from m0kit_parity.bench.load.curve import curve_table, measure, quantile, statuses_of, summary
from m0kit_parity.bench.load.killing import kill_under_load, killed_table
from m0kit_parity.bench.load.offering import Sample, arrivals, offer, saturate
from m0kit_parity.bench.load.overhead import overhead_table, overheads
from m0kit_parity.bench.load.peer import write_model
from m0kit_parity.bench.load.server import serving, watched
from m0kit_parity.bench.load.soak import soak, soak_table
from m0kit_parity.drawing.table import table

Answers = Callable[[int], tuple[bytes, float]]  # of the number of a request: what is sent, and after how long


def said(status: int, body: bytes = b"{}", *headers: bytes) -> bytes:
    return b"\r\n".join([b"HTTP/1.1 %d X" % status, b"Content-Length: %d" % len(body), *headers, b"", b""]) + body


GOOD = said(200, b'{"usage": {"total_tokens": 7}}')


def against(answers: Answers, use: Callable[[Client], Any], patience_s: float = 20) -> Any:
    """What `use` gives of a client of a server that answers each request so."""
    number = -1

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal number
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                length = head.lower().partition(b"content-length: ")[2].partition(b"\r")[0]
                await reader.readexactly(int(length or 0))
                number += 1
                data, wait = answers(number)
                await asyncio.sleep(wait)
                writer.write(data)
                if not data.startswith(b"HTTP") or data.endswith(b"cut"):
                    return
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    async def both() -> Any:
        async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
            port = server.sockets[0].getsockname()[1]
            async with Client(f"http://127.0.0.1:{port}", patience_s=patience_s) as client:
                return await use(client)

    return asyncio.run(both())


def test_each_answer_is_told_apart_and_a_connection_that_ends_is_lost() -> None:
    sent = [said(200), said(429, b"{}", b"Retry-After: 3"), said(503, b"x", b"Connection: close"), b"", b"HTTP/1.1 cut"]

    async def ask(client: Client) -> list[tuple[int, str | None]]:
        request = client.request("POST", "/v1/rerank", b"{}")
        found = [await client.ask(request) for _ in sent]
        assert client.num_opened == 3  # kept while it may be, and never after it was lost
        return [(one.status, one.retry_after) for one in found]

    found = against(lambda number: (sent[number], 0), ask)
    assert found == [(200, None), (429, "3"), (503, None), (LOST, None), (LOST, None)]


def test_what_is_not_answered_is_said_to_hang() -> None:
    async def ask(client: Client) -> int:
        return (await client.ask(client.request("GET", "/"))).status

    assert against(lambda _: (said(200), 60), ask, patience_s=0.1) == HUNG


def test_a_latency_counts_from_the_moment_that_was_meant_whatever_the_server_does() -> None:
    """Each waits for none before it, though all take longer than the time between two."""

    async def ask(client: Client) -> list[Sample]:
        samples = await offer(client, [client.request("GET", "/")] * 20, [0.01 * number for number in range(20)])
        assert client.num_opened > 10
        return samples

    samples = against(lambda _: (GOOD, 0.3), ask)
    assert [one.at for one in samples] == [0.01 * number for number in range(20)]
    assert all(one.seconds >= 0.3 for one in samples)
    assert all(one.tokens == 7 and one.status == 200 for one in samples)


def test_a_retry_is_obeyed_and_counted_and_its_time_is_the_requests() -> None:
    sent = [said(429, b"{}", b"Retry-After: 1"), GOOD, said(429)]

    async def ask(client: Client) -> list[Sample]:
        request = client.request("GET", "/")
        first = await offer(client, [request], [0.0], retry_within_s=30)
        return first + await offer(client, [request], [0.0], retry_within_s=30)

    obeyed, untold = against(lambda number: (sent[number], 0), ask)
    assert (obeyed.status, obeyed.tries, obeyed.told) == (200, 2, True)
    assert obeyed.seconds >= 1
    assert (untold.status, untold.tries, untold.told) == (429, 1, False)  # it was not said when


def test_arrivals_are_the_same_for_a_seed_and_as_many_as_wanted() -> None:
    found = arrivals(50, 100, 3)
    assert found == arrivals(50, 100, 3) != arrivals(50, 100, 4)
    assert found == sorted(found)
    assert 0 < found[0] < found[-1] < 100
    assert abs(len(found) - 5000) < 5 * 5000**0.5  # five times the spread of a Poisson count


def test_capacity_counts_what_lies_within_the_time() -> None:
    async def ask(client: Client) -> float:
        return await saturate(client, lambda: client.request("GET", "/"), 0.5, clients=2)

    assert 0 < against(lambda _: (GOOD, 0.2), ask) <= 2 / 0.2
    refused = against(lambda _: (said(503), 0.01), ask)
    assert refused == 0


def test_a_summary_says_how_many_got_what() -> None:
    samples = [Sample(0.0, 0.001, 0.1 * number, 200, 1, True, 5) for number in range(1, 101)]
    samples += [Sample(0.0, 0.0, 0.01, status, 1, status != 429) for status in (429, 503, LOST, HUNG)]
    step = summary(2.0, 10.0, samples, 20.0, [])
    assert step.statuses == {"200": 100, "429": 1, "503": 1, "hung": 1, "lost": 1} == statuses_of(samples)
    assert (step.p50, step.p95, step.p99) == pytest.approx((5.1, 9.6, 10.0))
    assert (step.done, step.tokens, step.told, step.rss) == (5.0, 25.0, False, None)
    assert quantile([], 0.5) is None


@pytest.mark.parametrize("kind", KINDS)
def test_requests_of_a_kind_are_the_same_for_a_seed_and_cold_ones_have_no_document_twice(kind: Any) -> None:
    sizes = Sizes(texts=3, pages=1, ids=4, words=(2, 5), visual_tokens=16, kept=4)
    one, other = (Source(kind, sizes, seed=1) for _ in range(2))
    assert [one.warm() for _ in range(3)] == [other.warm() for _ in range(3)]
    if kind == "ids":
        with pytest.raises(ValueError, match="kept"):
            one.cold()
        return
    bodies = [json.loads(one.cold()) for _ in range(5)]
    documents = [json.dumps(document) for body in bodies for document in body["documents"]]
    assert len(documents) == len(set(documents)) == 5 * {"tiny": 1, "texts": 3, "pages": 1, "mixed": 4}[kind]
    if kind != "tiny":
        warm = [json.dumps(document) for document in json.loads(one.warm())["documents"]]
        assert set(warm) <= {json.dumps(document) for document in one.kept.values()}


def test_a_curve_of_a_real_server(committed: Path) -> None:
    pytest.importorskip("uvicorn", reason="m0kit[serve] is not installed")
    with serving(committed / "fp32", "--threads", 1) as server:
        source = Source("mixed", Sizes(2, 1, 4, (2, 5), 16, 4))
        curve = measure(server.url, source, is_cold=False, loads=[0.5], seconds=0.5, clients=2, seed=0)
    (step,) = curve.steps
    assert step.statuses.keys() <= {"200"}
    assert curve.capacity > 0
    assert table(curve_table(curve)).splitlines()[1].startswith("0.5×")


def test_a_request_is_scored_as_the_call_scores_it(committed: Path) -> None:
    pytest.importorskip("uvicorn", reason="m0kit[serve] is not installed")
    pytest.importorskip("psutil")
    sizes = Sizes(2, 1, 4, (2, 5), 16, 2)
    works = [("cold", Source("mixed", sizes), True), ("warm", Source("mixed", sizes), False)]
    found = overheads(committed / "fp32", works, turns=3, threads=1, rest=0)
    assert [(one.work, one.turns, one.same) for one in found] == [("cold", 3, True), ("warm", 3, True)]
    assert all(one.low <= one.ratio <= one.high for one in found)
    assert [line.split()[-1] for line in table(overhead_table(found)).splitlines()[1:]] == ["yes", "yes"]


def test_workers_are_killed_and_what_was_acknowledged_is_looked_for(tmp_path: Path, committed: Path) -> None:
    pytest.importorskip("uvicorn", reason="m0kit[serve] is not installed")
    pytest.importorskip("psutil")
    options = ["--workers", 2, "--threads", 1, "--index", tmp_path / "index"]
    with serving(committed / "fp32", *options) as server:
        source = Source("tiny", Sizes())
        found = kill_under_load(server.url, server.pid, source, rate=5, seconds=2, kills=1)
    assert (found.kills, len(found.replaced_s), found.missing) == (1, 1, ())
    assert "hung" not in {*found.rankings, *found.additions}
    assert len(table(killed_table(found)).splitlines()) == 3


def test_a_day_has_all_kinds_of_requests_and_says_what_they_got(tmp_path: Path, committed: Path) -> None:
    pytest.importorskip("uvicorn", reason="m0kit[serve] is not installed")
    pytest.importorskip("psutil")
    with (
        serving(committed / "fp32", "--threads", 1, "--index", tmp_path / "index") as server,
        watched(server.pid, every_s=0.02) as points,
    ):
        sizes = Sizes(texts=2, pages=1, ids=2, words=(2, 5), visual_tokens=16, kept=10)
        found = soak(server.url, points, requests=200, clients=2, sizes=sizes)
    assert sum(found.statuses.values()) >= 200
    assert found.statuses.keys() >= {"200", "404", "422", "gone"}
    assert found.unexpected == {}
    assert [part.requests for part in found.parts] == list(range(20, 220, 20))
    assert len(table(soak_table(found)).splitlines()) == 11


def test_the_peer_has_the_sizes_of_the_artifact(tmp_path: Path, committed: Path) -> None:
    transformers = pytest.importorskip("transformers")
    write_model(committed / "fp32", tmp_path)
    decoder = read_manifest(committed / "fp32").model.decoder
    config = transformers.AutoConfig.from_pretrained(tmp_path)
    assert (config.hidden_size, config.num_hidden_layers) == (decoder.hidden_size, decoder.num_layers)
    assert (config.vocab_size, config.num_labels) == (decoder.vocab_size, 1)
    assert transformers.AutoTokenizer.from_pretrained(tmp_path)("a text").input_ids


def test_what_is_no_server_is_said(committed: Path) -> None:
    with pytest.raises(InputError, match="no URL"):
        Client("https://127.0.0.1")
    with pytest.raises(M0kitError, match="ended with exit code 2"), serving(committed / "fp32", "--port-of-call", 1):
        pass
