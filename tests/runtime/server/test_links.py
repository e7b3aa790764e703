"""Images by URL over HTTP: in each form that a request has for them, with the rest of its rules."""

import base64
import io
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

pytest.importorskip("uvicorn", reason="m0kit[serve] is not installed")

from tests.runtime.server.asking import Answer, Asker
from tests.runtime.server.origins import OK, PNG, Origin
from tests.runtime.server.serving import PATIENCE_S, served, settings_of, until

from m0kit.server.app import build
from m0kit.server.settings import ModelSettings

DATA = f"data:image/png;base64,{base64.b64encode(PNG).decode()}"


@pytest.fixture
def url(asker: Asker, origin: Origin, names: dict[str, list[str]]) -> Iterator[str]:
    names["images.test"] = ["127.0.0.1"]
    origin.heads.clear()
    yield f"http://images.test:{origin.port}/page.png"
    origin.answer, origin.answers = OK, []


def rank(asker: Asker, documents: Any, query: Any = "the tide", path: str = "/v1/rerank") -> Answer:
    return asker.ask("POST", path, body=json.dumps({"query": query, "documents": documents}).encode())


def test_an_image_by_url_scores_as_the_image_itself(asker: Asker, origin: Origin, url: str) -> None:
    forms = [{"image": url}, {"url": url}, {"content": [{"type": "image_url", "image_url": {"url": url}}]}]
    answer = rank(asker, [{"image": DATA}, *forms, "the sea"])
    assert answer.status == 200
    scores = {each["index"]: each["relevance_score"] for each in answer.json["results"]}
    assert scores[0] == scores[1] == scores[2] == scores[3] != scores[4]
    assert len(origin.heads) == 3
    by_query = [rank(asker, ["the sea"], query={"image": one}).json["results"][0] for one in (DATA, url)]
    assert by_query[0]["relevance_score"] == by_query[1]["relevance_score"]


def test_a_text_that_is_a_url_is_a_text(asker: Asker, origin: Origin, url: str) -> None:
    assert rank(asker, [url, {"text": url}, {"id": "x", "text": url}], query=url).status == 200
    assert asker.ask("PUT", "/v1/documents/text", body=url.encode(), content_type="text/plain").status == 200
    assert asker.ask("DELETE", "/v1/documents/text").status == 200
    assert not origin.heads


def test_what_cannot_be_fetched_fails_the_request_and_names_its_place(asker: Asker, url: str) -> None:
    answer = rank(asker, ["the sea", {"image": url}, {"image": "http://evil.test/x.png"}])
    assert (answer.status, answer.code) == (422, "INVALID_INPUT")
    assert answer.json["detail"].startswith("documents[2].image: is at evil.test, where this server fetches nothing")
    assert answer.json["errors"][0]["field"] == "documents[2].image"
    asker_of_query = rank(asker, ["the sea"], query={"image": "http://169.254.169.254/latest"})
    assert asker_of_query.json["error"]["param"] == "query.image"


def test_an_image_that_is_too_large_is_so_by_url_too(asker: Asker, origin: Origin, url: str) -> None:
    Image.new("1", (10_000, 6_000)).save(file := io.BytesIO(), "PNG", compress_level=1)
    origin.answer = b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n" + file.getvalue()
    answer = rank(asker, [{"image": url}])
    assert answer.code == "TOO_MUCH"
    assert "documents[0].image" in answer.json["detail"]


def test_links_are_few_and_so_are_their_bytes(asker: Asker, origin: Origin, url: str) -> None:
    assert rank(asker, [{"image": url}] * 5).code == "TOO_MUCH"  # images in a request
    assert not origin.heads
    Image.effect_noise((180, 180), 90).save(file := io.BytesIO(), "PNG")
    origin.answer = b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n" + file.getvalue()
    assert 16 << 10 < len(file.getvalue()) < 64 << 10  # so that four have more than a body, and one has not
    assert rank(asker, [{"image": url}]).status == 200
    answer = rank(asker, [{"image": url}] * 4)
    assert (answer.code, "the images that are fetched have over" in answer.json["detail"]) == ("TOO_MUCH", True)


def test_documents_by_url_are_read_and_one_that_fails_costs_no_other(asker: Asker, url: str) -> None:
    documents = [
        {"id": "one", "image": url},
        {"id": "two", "image": "http://evil.test/x.png"},
        {"id": "three", "text": url},
    ]
    answer = asker.ask("POST", "/v1/documents", body=json.dumps({"documents": documents}).encode())
    assert answer.status == 200
    one, two, three = answer.json["results"]
    assert (one["status"], one["kind"], three["status"], three["kind"]) == ("read", "image", "read", "text")
    assert two["error"]["code"] == "INVALID_INPUT"
    put = asker.ask("PUT", "/v1/documents/four", body=json.dumps({"image": url}).encode())
    assert (put.status, put.json["kind"]) == (200, "image")
    refused = asker.ask("PUT", "/v1/documents/five", body=b'{"image": "http://[::1]/"}')
    assert refused.code == "INVALID_INPUT"
    got = asker.ask("GET", "/v1/documents/one").json
    assert url not in json.dumps(got)
    for name in ("one", "three", "four"):
        assert asker.ask("DELETE", f"/v1/documents/{name}").status == 200


def test_a_client_that_hangs_up_ends_what_is_fetched_for_it(asker: Asker, origin: Origin, url: str) -> None:
    has_ended = threading.Event()

    def silent(sock: Any) -> None:
        while sock.recv(1):
            pass
        has_ended.set()

    origin.answer = silent
    body = json.dumps({"query": "x", "documents": [{"image": url}]}).encode()
    head = "POST /v1/rerank HTTP/1.1\r\nHost: localhost\r\nX-API-Key: another-key-of-this-server\r\n"
    client = asker.at.ask(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
    until(lambda: origin.heads)
    client.close()
    assert has_ended.wait(PATIENCE_S / 4)  # far sooner than the ten seconds that one image may take


def test_nothing_is_fetched_where_no_host_is_allowed(
    artifact: Path, origin: Origin, names: dict[str, list[str]]
) -> None:
    names["images.test"] = ["127.0.0.1"]
    origin.heads.clear()
    options: dict[str, Any] = {"models": (ModelSettings(str(artifact), ("m0",), threads=1),), "page": False}
    app = build(settings_of(**options))
    with served(app, app.service.metrics, **options) as at:
        until(lambda: app.service.problem is None)
        answer = rank(Asker(at, app), ["the sea", {"image": f"http://images.test:{origin.port}/page.png"}])
        assert answer.code == "INVALID_INPUT"
        assert "documents[1].image: is a URL, and this server fetches nothing" in answer.json["detail"]
        at.stop()
    assert not origin.heads


def test_what_is_fetched_ends_with_the_time_of_the_request(
    artifact: Path, origin: Origin, names: dict[str, list[str]]
) -> None:
    names["images.test"] = ["127.0.0.1"]
    origin.answer = lambda sock: sock.recv(1)
    options: dict[str, Any] = {
        "models": (ModelSettings(str(artifact), ("m0",), threads=1),),
        "image_hosts": (f"images.test:{origin.port}=127.0.0.1",),
        "request_timeout_s": 0.3,
        "page": False,
    }
    app = build(settings_of(**options))
    with served(app, app.service.metrics, **options) as at:
        until(lambda: app.service.problem is None)
        answer = rank(Asker(at, app), [{"image": f"http://images.test:{origin.port}/page.png"}])
        assert (answer.status, answer.code) == (504, "DEADLINE_EXCEEDED")
        at.stop()
    origin.answer = OK
