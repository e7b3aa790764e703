"""Every recorded request gets from the whole app, field by field, what the model itself says of its documents.

A request that carries a key goes to an app that wants one, with the headers that were recorded.
"""

import base64
import io
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tests.runtime.server.wire.recordings import Recording, check_read, recordings

pytest.importorskip("starlette", reason="m0kit[serve] is not installed")

from starlette.testclient import TestClient
from tests.runtime.server.serving import until

from m0kit import Reranker
from m0kit.server.app import build
from m0kit.server.settings import ModelSettings, Settings

KEY = "a-key-of-a-test-that-opens-nothing"
NAME = "tiny"
Scored = Callable[[Recording, bool], np.ndarray[Any, np.dtype[np.float32]]]
# A run's other rows change a sum in its last bits, and in which runs pairs come is not the same.
CLOSE = 1e-6


@pytest.fixture(scope="module")
def clients(tiny_artifact: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[bool, TestClient]]:
    """Of two apps on the artifact: one that wants a key, and one that does not."""
    keys = tmp_path_factory.mktemp("keys") / "keys.txt"
    keys.write_text(KEY + "\n")
    models = (ModelSettings(str(tiny_artifact), names=(NAME,), threads=1),)
    with ExitStack() as stack:
        found = {}
        for wants_key in (True, False):
            app = build(Settings(models, api_key_file=keys if wants_key else None))
            client = stack.enter_context(TestClient(app, base_url="http://127.0.0.1"))
            until(lambda app=app: app.is_ready or app.failure)
            assert app.failure is None
            found[wants_key] = client
        yield found


@pytest.fixture(scope="module")
def scored(tiny_artifact: Path) -> Iterator[Scored]:
    """What Reranker.score gives for a recording's pairs, in its order."""
    with Reranker.load(tiny_artifact, threads=1, kv="fp16", cache_bytes=1 << 20) as reranker:

        def score(recording: Recording, raw: bool) -> np.ndarray[Any, np.dtype[np.float32]]:
            queries, documents = sides(recording)
            return reranker.score(list(zip(queries * len(documents), documents, strict=False)), raw=raw)

        yield score


def sides(recording: Recording) -> tuple[list[Any], list[Any]]:
    """Queries and documents as Python has them: a string, or an image."""
    query, documents = recording.means["query"], recording.means["documents"]
    pages = iter(pages_in(recording.body))  # a body names a query before its documents

    def side(meant: Any) -> Any:
        return meant if isinstance(meant, str) else next(pages)

    return [side(one) for one in (query if isinstance(query, list) else [query])], [side(one) for one in documents]


def pages_in(value: Any) -> Iterator[Image.Image]:
    """The images of a body, in its order."""
    if isinstance(value, dict):
        for name in sorted(value, key=lambda name: name != "query"):
            yield from pages_in(value[name])
    elif isinstance(value, list):
        for each in value:
            yield from pages_in(each)
    elif isinstance(value, str) and "iVBORw0KGgo" in value:
        yield Image.open(io.BytesIO(base64.b64decode(value.rpartition(",")[2])))


def send(clients: dict[bool, TestClient], recording: Recording) -> Any:
    basic = base64.b64encode(f"key:{KEY}".encode()).decode()
    headers = {
        name: value.replace("Basic KEY", f"Basic {basic}").replace("KEY", KEY)
        for name, value in recording.headers.items()
    }
    client = clients["KEY" in recording.headers.get("authorization", "")]
    answer = client.request(recording.method, recording.path, json=recording.body, headers=headers)
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"] == "application/json"
    return answer


def results_of(recording: Recording, scores: Any, logits: Any) -> list[dict[str, Any]]:
    """The results that an answer must have, in its order."""
    means = {"top_n": None, "raw": False, "shape": "rerank", "echo": "texts", **recording.means}
    told = [float(value) for value in (logits if means["raw"] else scores)]
    if means["shape"] == "score":
        return [{"index": i, "object": "score", "score": value} for i, value in enumerate(told)]
    best = sorted(range(len(told)), key=lambda i: (-logits[i], i))[: means["top_n"]]
    name = "score" if means["shape"] == "tei" else "relevance_score"
    found: list[dict[str, Any]] = [{"index": i, name: told[i]} for i in best]
    for result in found:
        if means["echo"] == "none":
            continue
        if means["shape"] == "tei":
            result["text"] = recording.body["texts"][result["index"]]
        else:
            meant = means["documents"][result["index"]]
            result["document"] = shown(recording, result["index"], meant, echo=means["echo"])
    return found


def shown(recording: Recording, index: int, meant: Any, *, echo: str) -> dict[str, Any]:
    """A document in an answer: as it was sent where that was asked for; its text in any case, if only an empty one."""
    text = meant if isinstance(meant, str) else ""
    documents = recording.body["documents"]
    sent = documents[index] if isinstance(documents, list) else documents
    if echo == "all" and isinstance(sent, dict):
        return {"text": text, **sent}
    return {"text": text}


def close_to(expected: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The same, with room in numbers that were computed."""
    return [
        {name: pytest.approx(value, abs=CLOSE) if isinstance(value, float) else value for name, value in one.items()}
        for one in expected
    ]


@pytest.mark.parametrize("recording", [one for one in recordings() if one.method == "POST"], ids=str)
def test_a_recorded_request_gets_what_the_model_says(
    recording: Recording, clients: dict[bool, TestClient], scored: Scored
) -> None:
    answer = send(clients, recording)
    found, request_id = answer.json(), answer.headers["x-request-id"]
    check_read(recording, found)
    shape = recording.means.get("shape", "rerank")
    expected = close_to(results_of(recording, scored(recording, False), scored(recording, True)))
    if shape == "tei":
        assert found == expected
        return
    tokens = found["usage"]["total_tokens"]
    assert tokens > 0
    assert isinstance(found["created"], int)
    whole = {
        "id": request_id,
        "object": recording.means.get("kind", "list"),
        "created": found["created"],
        "model": NAME,
        "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
    }
    if shape == "score":
        assert found == {**whole, "data": expected}
        return
    meta = {
        "api_version": {"version": "2"},
        "billed_units": {"search_units": 1, "total_tokens": tokens},
        "tokens": {"input_tokens": tokens, "output_tokens": 0},
    }
    assert found == {**whole, "results": expected, "meta": meta}


@pytest.mark.parametrize("recording", [one for one in recordings() if one.method == "GET"], ids=str)
def test_what_a_client_asks_before_all_else_is_answered(recording: Recording, clients: dict[bool, TestClient]) -> None:
    check_read(recording, send(clients, recording).json())


def test_what_dify_refuses_a_server_by_is_as_it_wants_it(clients: dict[bool, TestClient]) -> None:
    found = clients[False].get("/info").json()
    assert next(iter(found["model_type"])) == "reranker"
    assert found["max_client_batch_size"] >= 1000


def test_the_recordings_tell_documents_apart(scored: Scored) -> None:
    """Else an answer in another order would pass."""
    texts = [one for one in recordings() if one.method == "POST" and len(set(map(str, one.means["documents"]))) > 1]
    assert len(texts) > 40
    for recording in texts:
        logits = scored(recording, True)
        assert abs(float(logits[0] - logits[-1])) > 100 * CLOSE, str(recording)


@pytest.mark.parametrize("path", ["/v1/rerank", "/v2/rerank", "/rerank", "/score", "/info"])
def test_a_recorded_request_with_another_key_gets_nothing(path: str, clients: dict[bool, TestClient]) -> None:
    asked = [one for one in recordings() if one.path == path]
    assert asked
    for recording in asked:
        headers = recording.headers | {"authorization": "Bearer another-key-than-is-known"}
        answer = clients[True].request(recording.method, path, json=recording.body, headers=headers)
        assert (answer.status_code, answer.json()["code"]) == (401, "AUTH_INVALID_API_KEY")


@pytest.mark.parametrize(
    "recording", [one for one in recordings() if isinstance((one.body or {}).get("documents"), list)], ids=str
)
def test_a_client_finds_the_sentence_of_an_error_where_it_looks(
    recording: Recording, clients: dict[bool, TestClient]
) -> None:
    """In `detail` (Jina's), `message` (Cohere's) and `error.message` (vLLM's), all of them at any path."""
    last = len(recording.body["documents"]) - 1
    broken = {**recording.body, "documents": [*recording.body["documents"][:last], 7]}
    answer = clients[False].post(recording.path, json=broken)
    found = answer.json()
    said = f"documents[{last}]: is a number. Give a string, or an object with one of text, image, url, bytes, id and "
    assert (answer.status_code, found["code"]) == (422, "INVALID_INPUT")
    assert found["detail"].startswith(said)
    assert found["message"] == found["error"]["message"] == found["detail"]
    assert found["error"]["param"] == f"documents[{last}]"
    assert found["request_id"] == answer.headers["x-request-id"]


@pytest.mark.parametrize("recording", [one for one in recordings() if "texts" in (one.body or {})], ids=str)
def test_clients_of_tei_find_the_sentence_in_a_string(recording: Recording, clients: dict[bool, TestClient]) -> None:
    answer = clients[False].post(recording.path, json={**recording.body, "texts": ["a text", ""]})
    found = answer.json()
    assert answer.status_code == 422
    assert found["error"] == found["detail"] == "texts[1]: is empty. Give some text."
    assert found["error_type"] == "validation"
