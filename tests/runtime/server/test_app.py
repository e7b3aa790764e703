"""The whole app on the tiny artifact, in this process: what is asked by HTTP is what `Reranker` scores."""

import base64
import contextlib
import json
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

pytest.importorskip("starlette")
pytest.importorskip("uvicorn")
pytest.importorskip("prometheus_client")

from starlette.testclient import TestClient
from tests.runtime.server.conftest import png
from tests.runtime.server.serving import served, until

from m0kit.errors import DeviceLostError
from m0kit.reranker import Reranker
from m0kit.server.app import App, build
from m0kit.server.settings import ModelSettings, Settings

TEXTS = ["a document on foxes", "a document on dogs", "猫についての文書", "a document on foxes"]


def settings_of(artifact: Path, index: Path | None = None, **changes: Any) -> Settings:
    return Settings((ModelSettings(str(artifact), ("m0",), index, threads=1),), **changes)


@contextlib.contextmanager
def opened(app: App) -> Iterator[TestClient]:
    with TestClient(app, base_url="http://127.0.0.1") as client:
        while not (app.is_ready or app.failure):
            time.sleep(0.01)
        yield client


@pytest.fixture(scope="module")
def client(artifact: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    index = tmp_path_factory.mktemp("index") / "library"
    with opened(build(settings_of(artifact, index, max_documents=20))) as client:
        yield client


@pytest.fixture(scope="module")
def alone(artifact: Path) -> Reranker:
    return Reranker.load(artifact, threads=1, kv="fp16")


def data_uri(image: Image.Image) -> str:
    return f"data:image/png;base64,{base64.b64encode(png(image)).decode()}"


def by_index(answer: Any) -> list[float]:
    ranked = sorted(answer["results"], key=lambda result: result["index"])
    return [result["relevance_score"] for result in ranked]


@pytest.mark.parametrize("path", ["/v1/rerank", "/v2/rerank", "/rerank", "/"])
def test_scores_are_those_of_a_reranker(
    client: TestClient, alone: Reranker, picture: Callable[..., Image.Image], path: str
) -> None:
    image = picture(60, 90)
    answer = client.post(path, json={"query": "foxes", "documents": [*TEXTS, {"image": data_uri(image)}]})
    assert answer.status_code == 200, answer.text
    expected = [float(score) for score in alone.score([("foxes", document) for document in [*TEXTS, image]])]
    assert by_index(answer.json()) == pytest.approx(expected, abs=1e-6)  # float32 against float64 of one sigmoid
    scores = [result["relevance_score"] for result in answer.json()["results"]]
    assert scores == sorted(scores, reverse=True)
    order = [result["index"] for result in answer.json()["results"]]
    assert order.index(0) < order.index(3)  # the same text: ties go by index


def test_texts_are_answered_as_a_bare_array_and_pairs_in_their_order(client: TestClient, alone: Reranker) -> None:
    array = client.post("/rerank", json={"query": "foxes", "texts": TEXTS[:2], "return_text": True}).json()
    assert {one["index"]: one["text"] for one in array} == dict(enumerate(TEXTS[:2]))
    queries, documents = ["foxes", "dogs"], TEXTS[:2]
    data = client.post("/score", json={"text_1": queries, "text_2": documents}).json()["data"]
    expected = [float(score) for score in alone.score(list(zip(queries, documents, strict=True)))]
    assert [one["score"] for one in data] == pytest.approx(expected, abs=1e-6)
    raw = client.post("/v1/rerank", json={"query": "foxes", "documents": TEXTS[:1], "raw_scores": True}).json()
    logit = float(alone.score([("foxes", TEXTS[0])], raw=True)[0])
    assert by_index(raw) == pytest.approx([logit], abs=1e-5)


def test_lines_come_one_by_one_and_the_last_has_the_order(client: TestClient) -> None:
    body = {"query": "foxes", "documents": TEXTS}
    whole = client.post("/v1/rerank", json=body).json()
    with client.stream("POST", "/v1/rerank", json=body, headers={"accept": "application/x-ndjson"}) as streamed:
        assert streamed.headers["content-type"].startswith("application/x-ndjson")
        lines = [json.loads(line) for line in streamed.iter_lines()]
    assert sorted(line["index"] for line in lines[:-1]) == [0, 1, 2, 3]
    assert all(line["cached"] for line in lines[:-1])
    assert lines[-1]["done"] is True
    assert lines[-1]["results"] == whole["results"]


def test_a_document_is_put_named_found_replaced_and_deleted(
    client: TestClient, alone: Reranker, picture: Callable[..., Image.Image]
) -> None:
    page = picture(100, 80, 3)
    joined = client.put("/v1/documents/%D9%85%DB%8C%E2%80%8C%D8%AE", json={"text": "an id with a zero-width joiner"})
    assert joined.json()["id"] == "می\u200cخ"
    assert client.delete("/v1/documents/%D9%85%DB%8C%E2%80%8C%D8%AE").status_code == 200
    put = client.put("/v1/documents/a%2Fpage%201", content=png(page), headers={"content-type": "image/png"})
    assert (put.status_code, put.json()["kind"], put.json()["status"]) == (200, "image", "read")
    again = client.put("/v1/documents/a%2Fpage%201", json={"image": data_uri(page)})
    assert again.json()["status"] == "known"
    assert client.put("/v1/documents/b", json={"text": TEXTS[0]}).json()["status"] == "read"
    ranked = client.post("/v1/rerank", json={"query": "foxes", "documents": [{"id": "a/page 1"}, {"id": "b"}]})
    expected = [float(score) for score in alone.score([("foxes", page), ("foxes", TEXTS[0])])]
    assert by_index(ranked.json()) == pytest.approx(expected, abs=1e-6)
    assert client.get("/v1/documents/b").json()["text"] == TEXTS[0]
    assert client.get("/v1/documents").json() == {"ids": ["a/page 1", "b"], "total": 2}
    assert client.put("/v1/documents/b", json={"text": "another"}).json()["status"] == "replaced"
    assert client.delete("/v1/documents/b").json() == {"id": "b", "deleted": True}
    gone = client.post("/v1/rerank", json={"query": "foxes", "documents": [{"id": "b"}]})
    assert (gone.status_code, gone.json()["code"]) == (422, "INVALID_INPUT")
    assert "documents[0]" in gone.json()["detail"]
    assert client.delete("/v1/documents/b").json()["code"] == "DOCUMENT_NOT_FOUND"


@pytest.mark.parametrize("name", ["", "a\nb", "a\u2028b", "a" * 1025, 7, None])
def test_what_cannot_be_an_id_is_told(client: TestClient, name: Any) -> None:
    told = client.post("/v1/documents", json={"documents": [{"id": name, "text": "one"}]})
    assert (told.status_code, told.json()["code"]) == (422, "INVALID_REQUEST")
    assert "documents[0].id" in told.json()["detail"]


def test_of_many_documents_a_bad_one_fails_alone(client: TestClient) -> None:
    answer = client.post("/v1/documents", json={"documents": [
        {"id": "c1", "text": "one"},
        {"id": "c2", "image": base64.b64encode(b"no image").decode()},
        {"id": "c3", "id2": 1},
        {"id": "c4", "text": "four"},
    ]})  # fmt: skip
    assert answer.status_code == 200
    told = answer.json()
    assert (told["read"], told["known"], told["failed"]) == (2, 0, 2)
    assert [result.get("status") for result in told["results"]] == ["read", None, None, "read"]
    assert "documents[1].image" in told["results"][1]["error"]["message"]
    assert {"c1", "c4"} <= set(client.get("/v1/documents").json()["ids"])


@pytest.mark.parametrize(
    ("path", "body", "status", "code", "place"),
    [
        ("/v1/rerank", {"documents": ["a"]}, 422, "INVALID_REQUEST", "query"),
        ("/v1/rerank", {"query": "q", "documents": []}, 422, "INVALID_REQUEST", "documents"),
        ("/v1/rerank", {"query": "q", "documents": ["a"] * 21}, 422, "TOO_MUCH", "documents"),
        ("/v1/rerank", {"query": "q", "documents": ["a"], "model": "x"}, 404, "MODEL_NOT_FOUND", "model"),
        ("/v1/rerank", {"query": "q", "documents": ["a", {"image": "AAAA"}]}, 422, "INVALID_INPUT", "documents[1]"),
        ("/v1/rerank", {"query": "q", "documents": [{"image": "https://a.example/b"}]}, 422, "INVALID_INPUT", "[0]"),
        ("/score", {"text_1": ["a", "b"], "text_2": ["c", "d", "e"]}, 422, "INVALID_REQUEST", "text_1"),
    ],
)
def test_what_is_wrong_is_named(client: TestClient, path: str, body: Any, status: int, code: str, place: str) -> None:
    answer = client.post(path, json=body)
    told = answer.json()
    assert (answer.status_code, told["code"]) == (status, code), told
    assert place in told["detail"]
    assert told["detail"] == told["message"] == told["error"]["message"]


def test_what_it_tells_of_itself(client: TestClient, artifact: Path) -> None:
    info = client.get("/info").json()
    assert next(iter(info["model_type"])) == "reranker"  # Dify's plugin looks at the first key
    assert (info["index"], info["limits"]["max_documents"]) == (True, 20)
    models = client.get("/v1/models").json()["data"]
    assert [model["id"] for model in models] == ["m0"]
    assert client.get("/v1/models/jina-reranker-m0").json()["model_name"] == "m0"
    assert client.get("/v1/cluster/auth").json() == {"auth": False}
    metrics = client.get("/metrics").text
    assert "m0kit_model_info{" in metrics
    assert str(artifact) not in metrics + json.dumps(info)
    assert client.get("/ready").json() == {"status": "ready"}


def test_a_path_or_method_that_is_none_is_told(client: TestClient) -> None:
    assert client.get("/v3/rerank").json()["code"] == "NOT_FOUND"
    refused = client.get("/v1/rerank")
    assert (refused.status_code, refused.headers["allow"]) == (405, "POST")


def test_an_artifact_that_cannot_be_opened_is_live_and_never_ready(tmp_path: Path) -> None:
    app = build(settings_of(tmp_path / "nowhere"))
    with opened(app) as client:
        assert client.get("/live").status_code == 200
        ready = client.get("/ready")
        assert (ready.status_code, ready.json()["code"]) == (503, "ENGINE_FAILED")
        assert str(tmp_path) not in ready.text
        assert "nowhere" in str(app.failure)


def test_a_lost_device_ends_what_waits_and_the_process_is_told(artifact: Path) -> None:
    app = build(settings_of(artifact))
    with opened(app) as client:
        lane = next(iter(app.service.lanes.values()))

        def lost() -> Any:
            raise DeviceLostError("the GPU is gone")

        app.service.desk.schedule_of(lane).step = lost  # type: ignore[method-assign]
        for _ in range(2):
            answer = client.post("/v1/rerank", json={"query": "q", "documents": ["a"]})
            assert (answer.status_code, answer.json()["code"]) == (503, "ENGINE_FAILED")
        assert app.failure is not None
        assert client.get("/ready").status_code == 503


def test_while_stopping_nobody_is_let_in_and_who_is_in_is_answered(artifact: Path) -> None:
    app = build(settings_of(artifact))
    with opened(app) as client:
        schedule = app.service.desk.schedule_of(next(iter(app.service.lanes.values())))
        step, runs, may = schedule.step, threading.Event(), threading.Event()

        def slow() -> Any:
            runs.set()
            may.wait()
            return step()

        schedule.step = slow  # type: ignore[method-assign]
        found: list[Any] = []
        asking = threading.Thread(
            target=lambda: found.append(client.post("/v1/rerank", json={"query": "q", "documents": ["a"]}))
        )
        asking.start()
        runs.wait()
        app.stop()
        late = client.post("/v1/rerank", json={"query": "q", "documents": ["b"]})
        assert (late.status_code, late.json()["code"]) == (503, "STOPPING")
        assert late.headers["retry-after"]
        may.set()
        asking.join()
        assert found[0].status_code == 200


def test_a_prompt_is_cut_where_a_request_says_so(client: TestClient, alone: Reranker) -> None:
    long = "a long document " * 50
    cut = client.post("/v1/rerank", json={"query": "foxes", "documents": [long], "truncate_prompt_tokens": 60})
    limited = alone.with_limits(max_length=60, max_query_length=30)
    assert by_index(cut.json()) == pytest.approx([limited.evaluate([("foxes", long)])[0].score], abs=1e-6)
    assert cut.json()["results"][0]["truncated"] == ["document"]
    few = client.post("/v1/rerank", json={"query": "foxes", "documents": [long], "truncate_prompt_tokens": 1})
    assert (few.status_code, few.json()["code"]) == (422, "INVALID_REQUEST")
    assert "truncate_prompt_tokens" in few.json()["detail"]


def test_who_hangs_up_has_its_work_ended_and_finds_what_was_read(
    artifact: Path, picture: Callable[..., Image.Image]
) -> None:
    pages = [picture(300, 200, seed) for seed in range(8)]
    body = json.dumps({"query": "foxes", "documents": [{"image": data_uri(page)} for page in pages]}).encode()
    head = "POST /v1/rerank HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: application/json\r\n"
    request = f"{head}content-length: {len(body)}\r\n\r\n".encode() + body
    app = build(settings_of(artifact))
    with served(app, app.metrics) as at:
        until(lambda: app.is_ready)
        desk = app.service.desk
        schedule = desk.schedule_of(next(iter(app.service.lanes.values())))
        step, first_ran, may = schedule.step, threading.Event(), threading.Event()

        def one_run_then_wait() -> Any:
            if first_ran.is_set():
                may.wait()
            done = step()
            if done:
                first_ran.set()
            return done

        schedule.step = one_run_then_wait  # type: ignore[method-assign]
        app.service.lane(None).reranker.engine.rows = 100  # a page or two in a run
        client = at.ask(request)
        first_ran.wait()
        client.close()
        until(lambda: b"cancelled_total 1.0" in app.metrics.render()[0])
        may.set()
        until(lambda: desk.num_requests == 0)
        assert desk.num_queued == 0
        status, _, answer = at.ask(request).answer("POST")
        assert status == 200
        assert len(json.loads(answer)["results"]) == 8
        cache = app.service.lane(None).reranker.cache
        assert cache is not None
        assert cache.hits >= 1  # what was read for the one who left
