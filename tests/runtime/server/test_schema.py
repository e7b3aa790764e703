"""The real app against its own OpenAPI document, by schemathesis: what fits it, what does not, and series of requests.

Its phases: each boundary and each form of each operation once ("coverage", methods and media types that are not there
among them), random requests that fit and that do not ("fuzzing"), and documents that are made, read and deleted
("stateful"). All of its checks hold but for three that ask more than we promise:

- positive_data_acceptance, that what fits is taken. No schema can say that base64 is an image, or that an id is in the
  index: `refused_for_what_no_schema_says` has the reasons that are left.
- negative_data_rejection, that what does not fit is refused: but for POST /v1/documents, where each document that
  cannot be read has an error of its own beside those that were.
- unsupported_method, that a method which is not there gets 405: but a body of another media type gets 415 before that,
  since the guard looks at it, and knows no routes.

What it does not call wrong, since the document says so: unknown fields, nulls, booleans and whole numbers as strings.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest

pytest.importorskip("starlette", reason="m0kit[serve] is not installed")

from hypothesis import strategies as st
from tests.runtime.server.inside import Inside, inside

from m0kit.server.problems import STATUS
from m0kit.server.wire.openapi import openapi

EXAMPLES = 20  # random ones of each operation, that fit and that do not
# What a document's content, or the state of the server, decides.
OPEN_CODES = ("INVALID_INPUT", "MODEL_NOT_FOUND", "DOCUMENT_NOT_FOUND", "TOO_MUCH")
REASONS = (
    "a whole number of more than 64 bits",  # in a field that nobody knows
    "a number that is too large",
    "it is nested too deeply",
    "tokens are too few for a query, a document and what stands around them.",
    "or as many.",  # pairs of which there are not as many queries as documents
    "bytes, and 1024 are the most.",  # an id: a schema counts characters
)


@pytest.fixture(scope="module")
def app(artifact: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Inside]:
    # Its client names this host, whatever it is told.
    with inside(artifact, tmp_path_factory.mktemp("served") / "index", allowed_hosts=("testserver",)) as one:
        yield one


def refused_for_what_no_schema_says(ctx: Any, response: Any, case: Any) -> None:
    if case.meta is None or not case.meta.generation.mode.is_positive or response.status_code < 400:
        return
    told = json.loads(response.content)
    is_fair = told["code"] in OPEN_CODES or any(reason in told["detail"] for reason in REASONS)
    assert is_fair, f"fits the document and is refused: {told['detail']}"


def error_is_ours(ctx: Any, response: Any, case: Any) -> None:
    """Each error has a code that belongs to its status, and one sentence under the names that clients read."""
    if response.status_code < 400:
        return
    told = json.loads(response.content)
    assert STATUS[told["code"]] == response.status_code
    assert told["detail"] == told["message"]
    assert told["error"] == told["message"] or told["error"]["message"] == told["message"]
    assert told["request_id"] == response.headers["x-request-id"][0]


def _is_meant(check: str, operation: str, answer: Any) -> bool:
    """Whether a check asks more than we promise: see above."""
    if check == "negative_data_rejection" and operation == "POST /v1/documents":
        return answer.status_code == 200 and json.loads(answer.content)["failed"] > 0
    return check == "unsupported_method" and answer.status_code == 415


def test_the_app_does_what_its_document_says(app: Inside) -> None:
    schemathesis = pytest.importorskip("schemathesis", reason="needs schemathesis")
    from schemathesis.config import SchemathesisConfig
    from schemathesis.engine import events, from_schema

    for check in (refused_for_what_no_schema_says, error_is_ours):
        schemathesis.check(check)

    async def requests_alone(scope: Any, receive: Any, send: Any) -> None:
        assert scope["type"] == "http"  # it has started
        await app.app(scope, receive, send)

    schemathesis.openapi.media_type("application/pdf", st.binary(max_size=200).map(b"%PDF-1.7\n".__add__))
    schemathesis.openapi.media_type("image/*", st.binary(max_size=200))
    config = SchemathesisConfig.from_dict({
        "generation": {"max-examples": EXAMPLES, "database": "none", "deterministic": True},
        "operations": [
            {"include-path": "/pdf", "generation": {"max-examples": 3}},  # each starts a process
            # The same endpoints as /rerank and /score have, and the same words in the document: two thousand cases.
            {"include-name": ["POST /", "POST /v1/score"], "phases": {"coverage": {"enabled": False}}},
        ],
        "checks": {"positive_data_acceptance": {"enabled": False}},
        "continue-on-failure": True,
    })  # fmt: skip
    schema = schemathesis.openapi.from_asgi("/openapi.json", requests_alone, config=config)
    tried: dict[str, int] = {}
    wrong: list[str] = []
    for event in from_schema(schema).execute():
        if isinstance(event, events.FatalError | events.NonFatalError):
            wrong.append(f"it cannot be tried: {event}")
        elif isinstance(event, events.ScenarioFinished):
            for name, case in event.recorder.cases.items():
                request = case.value
                tried[request.operation.label] = tried.get(request.operation.label, 0) + 1
                for check in event.recorder.checks.get(name, []):
                    failure, answer = check.failure_info, event.recorder.interactions[name].response
                    if failure is not None and not _is_meant(check.name, request.operation.label, answer):
                        told = f"{check.name}: {failure.failure.title}: {failure.failure.message}"
                        wrong.append(f"{request.method} {request.formatted_path}: {told}\n{request.body!r:.1000}")
    assert not wrong, "\n\n".join(wrong[:5])
    assert set(tried) == {operation.ok().label for operation in schema.get_all_operations()}
    assert min(tried.values()) >= 2, tried
    assert sum(tried.values()) >= 500, tried


def test_every_route_of_the_app_is_in_its_document(app: Inside) -> None:
    document = openapi("0", keys=False, page=True)
    told = {
        (path, method.upper()) for path, one in document["paths"].items() for method in one if method != "parameters"
    }
    there = {
        (route.path.replace(":path", ""), method)
        for route in app.app.routes
        for method in (route.methods or ()) - {"HEAD"}  # type: ignore[attr-defined]
    }
    assert told == there


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [("BREW", "/v1/rerank", "POST"), ("GET", "/score", "POST"), ("OPTIONS", "/rerank", "POST"),
     ("CONNECT", "/info", "GET, HEAD"), ("PATCH", "/v1/documents/a", "DELETE, GET, HEAD, PUT"),
     ("X" * 500, "/v1/documents", "GET, HEAD, POST")],
)  # fmt: skip
def test_a_method_that_a_path_does_not_take_is_refused_in_our_words(
    app: Inside, method: str, path: str, allowed: str
) -> None:
    answer = app.ask(method, path)
    assert (answer.status, answer.headers["allow"]) == (405, allowed)
    told = json.loads(answer.body)
    assert told["code"] == "METHOD_NOT_ALLOWED"
    assert told["detail"] == f"{method[:20]} is not taken here, but {allowed}."


def test_a_pdf_may_be_sent_as_what_it_is(app: Inside) -> None:
    pytest.importorskip("pypdfium2", reason="m0kit[pdf] is not installed")
    answer = app.ask("POST", "/pdf", b"%PDF-1.7", {"content-type": "application/pdf"})
    assert (answer.status, json.loads(answer.body)["code"]) == (422, "INVALID_INPUT")
    answer = app.ask("POST", "/v1/rerank", b"%PDF-1.7", {"content-type": "application/pdf"})
    assert (answer.status, json.loads(answer.body)["code"]) == (415, "UNSUPPORTED_TYPE")


@pytest.mark.parametrize("method", ["PUT", "GET", "DELETE"])
@pytest.mark.parametrize("name", ["%ff", "a%C3", "%ed%a0%80"])
def test_an_id_of_bytes_that_are_no_text_names_no_document(app: Inside, method: str, name: str) -> None:
    answer = app.ask(method, f"/v1/documents/{name}", b'{"text": "slm"}' if method == "PUT" else b"")
    told = json.loads(answer.body)
    assert (answer.status, told["code"]) == (400, "BAD_HTTP")
    assert told["detail"].startswith("the path is not UTF-8 where it is escaped.")


@pytest.mark.parametrize("name", ["a%20b", "a/b", "a%2Fb", "%EF%BF%BD", "..%2f..", "%E6%95%B0"])
def test_an_id_may_be_any_text(app: Inside, name: str) -> None:
    put = json.loads(app.ask("PUT", f"/v1/documents/{name}", b'{"text": "slm"}').body)
    assert put == {"id": unquote(name), "kind": "text", "tokens": put["tokens"], "status": put["status"]}
    got = json.loads(app.ask("GET", f"/v1/documents/{name}").body)
    assert (got["id"], got["text"]) == (unquote(name), "slm")
    ranked = app.ask("POST", "/v1/rerank", json.dumps({"query": "q", "documents": [{"id": unquote(name)}]}).encode())
    assert ranked.status == 200
    assert app.ask("DELETE", f"/v1/documents/{name}").status == 200
    assert app.ask("GET", f"/v1/documents/{name}").status == 404


@pytest.mark.parametrize(
    ("path", "body", "is_tei"),
    [
        ("/rerank", b'{"query": "", "texts": ["a"]}', True),
        ("/rerank", b'{"query": "q", "texts" : [', True),
        ("/", b'{"texts":[]}', True),
        ("/rerank", b'{"query": "q", "documents": ["texts", ""]}', False),
        ("/rerank", b'{"query": "texts", "documents": []}', False),
        ("/v1/rerank", b'{"query": "", "texts": ["a"]}', False),
    ],
)
def test_an_error_has_the_form_of_the_dialect_that_was_spoken(
    app: Inside, path: str, body: bytes, is_tei: bool
) -> None:
    answer = app.ask("POST", path, body)
    assert answer.status in (400, 422)
    assert isinstance(json.loads(answer.body)["error"], str) == is_tei
