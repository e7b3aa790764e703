"""What a server writes down: nothing of what it was sent, in any field, form of log or way to fail."""

import base64
import io
import json
import logging
import warnings
from collections.abc import Callable, Iterator
from typing import Any, Literal

import pytest
from PIL import Image, PngImagePlugin

pytest.importorskip("uvicorn", reason="m0kit[serve] is not installed")

from tests.runtime.server.asking import KEY, Answer, Asker
from tests.runtime.server.origins import OK, Origin
from tests.runtime.server.serving import until

from m0kit.errors import InputError, RecordDamagedError, StoreError
from m0kit.keeping.store import Store
from m0kit.scoring import image as images
from m0kit.scoring.engine import GraphEngine
from m0kit.scoring.prepare import Preparer
from m0kit.server import lane as lanes
from m0kit.server.logs import LOGGER, set_up

SECRET = "SECRET"
FORMS: tuple[Literal["text", "json"], ...] = ("text", "json")


def _image() -> bytes:
    about = PngImagePlugin.PngInfo()
    about.add_text("SECRET", "SECRET of an image")
    Image.new("RGB", (40, 40), "teal").save(file := io.BytesIO(), "PNG", pnginfo=about)
    return file.getvalue()


IMAGE = _image()
ENCODED = base64.b64encode(IMAGE).decode()


class Lines:
    """What is written from now on."""

    def __init__(self, form: str, stream: io.StringIO) -> None:
        self.form, self._stream = form, stream

    @property
    def count(self) -> int:
        return self._stream.getvalue().count("\n")

    def take(self) -> list[str]:
        found = self._stream.getvalue().splitlines()
        self._stream.seek(0)
        self._stream.truncate()
        return found


@pytest.fixture(params=FORMS)
def lines(request: pytest.FixtureRequest, capfd: pytest.CaptureFixture[str]) -> Iterator[Lines]:
    root = logging.getLogger()
    ours = logging.getLogger("m0kit")
    before = root.handlers[:], root.level, LOGGER.level, ours.handlers, ours.propagate
    set_up(request.param, "debug", stream := io.StringIO())
    ours.handlers, ours.propagate = [], True
    yield Lines(request.param, stream)
    root.handlers[:], ours.handlers, ours.propagate = before[0], before[3], before[4]
    root.setLevel(before[1])
    LOGGER.setLevel(before[2])
    out, err = capfd.readouterr()  # and nothing beside the log either
    assert SECRET not in out + err


def post(asker: Asker, path: str, value: Any, **headers: str) -> Answer:
    return asker.ask("POST", path, body=json.dumps(value).encode(), **headers)


def rank(asker: Asker, **fields: Any) -> Answer:
    return post(asker, "/v1/rerank", {"query": "SECRET query", "documents": ["SECRET document"], **fields})


def held(lines: Lines, least: int) -> list[str]:
    """What was written: `least` lines or more, in their form, with nothing in them of what was sent."""
    until(lambda: lines.count >= least)  # a request's own comes after its answer
    found = lines.take()
    for line in found:
        assert SECRET.lower() not in line.lower(), line
        assert ENCODED[60:90] not in line
        assert base64.b64encode(b"SECRET of").decode()[:10] not in line
        if lines.form == "json":
            assert {"time", "level", "event"} <= set(json.loads(line))
        else:
            assert line[10] == "T"
    return found


def test_what_is_asked_well_is_not_written_down(asker: Asker, lines: Lines, names: Any, origin: Origin) -> None:
    names["images.test"] = ["127.0.0.1"]
    images = [{"image": ENCODED}, {"image": f"data:image/png;base64,{ENCODED}"}]
    images += [{"image": f"http://images.test:{origin.port}/SECRET?SECRET"}]
    lines.take()
    answers = [
        rank(asker, documents=["SECRET one", {"text": "SECRET two"}, *images], user="SECRET", SECRET="SECRET"),
        rank(asker, query={"image": ENCODED}, stream=True),
        rank(asker, documents=[{"SECRET": "SECRET"}], rank_fields=["SECRET"]),
        post(asker, "/v2/rerank", {"query": "SECRET", "documents": ["SECRET"]}),
        post(asker, "/rerank", {"query": "SECRET", "texts": ["SECRET"], "return_text": True}),
        post(asker, "/", {"query": "SECRET", "texts": ["SECRET"]}),
        post(asker, "/score", {"text_1": "SECRET", "text_2": ["SECRET"]}),
        post(asker, "/v1/score", {"queries": "SECRET", "documents": ["SECRET"]}),
        asker.ask("PUT", "/v1/documents/SECRET-1", body=b"SECRET text", content_type="text/plain"),
        asker.ask("PUT", "/v1/documents/SECRET%2F2", body=IMAGE, content_type="image/png"),
        asker.ask("PUT", "/v1/documents/SECRET-3?model=m0&SECRET", body=b'{"text": "SECRET"}'),
        post(asker, "/v1/documents", {"documents": [{"id": "SECRET-4", "text": "SECRET"}]}),
        rank(asker, documents=[{"id": "SECRET-1"}, {"id": "SECRET/2"}]),
        asker.ask("GET", "/v1/documents/SECRET-1"),
        asker.ask("GET", "/v1/documents?after=SECRET-1&limit=1"),
        *(asker.ask("DELETE", f"/v1/documents/SECRET-{name}") for name in (1, 3, 4)),
        asker.ask("DELETE", "/v1/documents/SECRET%2F2"),
        *(asker.ask("GET", f"{path}?SECRET=SECRET") for path in ("/", "/app.js", "/sample.json", "/info", "/metrics")),
        *(asker.ask("GET", path) for path in ("/v1/models", "/v1/models/m0", "/openapi.json", "/v1/cluster/auth")),
        *(asker.ask("GET", path) for path in ("/models", "/live", "/ready", "/health")),
        asker.ask("GET", "/v1/models", user_agent="SECRET", referer="http://localhost/SECRET", cookie="a=SECRET",
                  x_forwarded_for="SECRET", forwarded="for=SECRET", traceparent="SECRET", tracestate="a=SECRET",
                  accept="SECRET/SECRET", x_secret="SECRET"),
        asker.ask("GET", "/v1/models", x_request_id="not an id: SECRET"),
    ]  # fmt: skip
    assert [(answer.status, answer.body) for answer in answers if answer.status != 200] == []
    found = held(lines, len(answers))
    assert sum("/v1/documents/{id:path}" in line for line in found) == 8
    assert sum("tester" in line for line in found) >= len(answers) - 3  # a key has a name


def test_what_is_asked_badly_is_not_written_down(asker: Asker, lines: Lines, names: Any, origin: Origin) -> None:
    names |= {"images.test": ["127.0.0.1"], "SECRET.test": ["127.0.0.1"]}
    link = f"http://images.test:{origin.port}/SECRET"
    redirect = b"HTTP/1.1 302 SECRET\r\nLocation: http://SECRET.test/SECRET\r\nX: SECRET\r\n\r\n"
    bad_image = base64.b64encode(IMAGE[:-40] + b"SECRET of").decode()
    lines.take()
    answers = [
        asker.ask("GET", "/v1/models", key="SECRET-but-not-the-one"),
        asker.ask("GET", "/v1/models", key=None, authorization="Basic SECRET"),
        asker.ask("GET", "/v1/models", key=None, x_api_key="SECRET"),
        asker.ask("GET", "/SECRET/SECRET?SECRET"),
        asker.ask("SECRET", "/v1/models"),
        asker.ask("SECRET", "/SECRET"),
        asker.ask("GET", "/v1/models/SECRET"),
        asker.ask("GET", "/v1/models", host="SECRET.test"),
        asker.ask("GET", "/v1/models", host="SECRET SECRET"),
        asker.ask("GET", "/v1/models", origin="http://SECRET.test"),
        asker.ask("POST", "/v1/rerank", body=b"SECRET"),
        asker.ask("POST", "/v1/rerank", body=b'{"SECRET": "SECRET'),
        asker.ask("POST", "/v1/rerank", body=b'{"query": "SECRET", "SECRET": 1, "SECRET": 2}'),
        asker.ask("POST", "/v1/rerank", body=b'{"query": "SECRET \\ud800", "documents": ["SECRET"]}'),
        asker.ask("POST", "/v1/rerank", body=b"SECRET", content_type="SECRET/SECRET"),
        asker.ask("POST", "/v1/rerank", body=b"SECRET", content_encoding="SECRET"),
        asker.ask("POST", "/v1/rerank", body=b"SECRET" * 20_000),
        asker.ask("POST", "/pdf", body=b"%PDF-1.7 SECRET", content_type="application/pdf"),
        asker.ask("PUT", "/v1/documents/SECRET", body=b"SECRET \xff", content_type="text/plain"),
        asker.ask("PUT", "/v1/documents/SECRET", body=b"SECRET", content_type="image/png"),
        asker.ask("PUT", f"/v1/documents/{'SECRET' * 500}", body=b"SECRET", content_type="text/plain"),
        asker.ask("GET", "/v1/documents/SECRET"),
        asker.ask("DELETE", "/v1/documents/SECRET"),
        asker.ask("GET", "/v1/documents?after=SECRET"),
        asker.ask("GET", "/v1/documents?limit=SECRET"),
        rank(asker, model="SECRET"),
        rank(asker, top_n="SECRET"),
        rank(asker, return_documents="SECRET"),
        rank(asker, truncation_side="SECRET"),
        rank(asker, rank_fields=["SECRET"], documents=[{"x": "SECRET"}]),
        rank(asker, documents=[]),
        rank(asker, documents=[{"SECRET": "SECRET"}]),
        rank(asker, documents=[{"image": "SECRET"}]),
        rank(asker, documents=[{"image": "/etc/SECRET.png"}]),
        rank(asker, documents=[{"image": bad_image}]),
        rank(asker, documents=[{"image": "data:SECRET,SECRET"}]),
        rank(asker, documents=[{"id": "SECRET"}]),
        rank(asker, documents=["SECRET " * 8000], truncation=False),
        rank(asker, query={"image": "http://SECRET.test/SECRET"}),
        rank(asker, query={"image": "http://SECRET@images.test/SECRET"}),
    ]
    for answer in (
        redirect,
        b"SECRET\r\n\r\n",
        b"HTTP/1.1 200 SECRET\r\nSECRET: x\r\n\r\nSECRET",
        b"HTTP/1.1 500 SECRET\r\n\r\n",
    ):
        origin.answer = answer
        answers.append(rank(asker, documents=[{"image": link}]))
    origin.answer = OK
    names["images.test"] = ["10.1.2.3"]
    answers.append(rank(asker, documents=[{"image": link}]))
    assert [number for number, answer in enumerate(answers) if answer.status < 400] == []
    found = held(lines, len(answers))
    for code in ("AUTH_INVALID_API_KEY", "BAD_JSON", "INVALID_INPUT", "FETCH_FAILED", "MODEL_NOT_FOUND"):  # but why
        assert any(code in line for line in found), code
    assert sum("an image host has an address that it may not have" in line for line in found) == 1


class FailureError(Exception):
    """Of a library that quotes what it was given."""


QUOTED = "SECRET text of a library"


def _raising(error: BaseException) -> Callable[..., Any]:
    def fail(*_: Any, **__: Any) -> Any:
        raise error from ValueError(QUOTED)

    return fail


@pytest.mark.parametrize(
    ("owner", "name", "error"),
    [
        (GraphEngine, "begin", FailureError(QUOTED)),
        (GraphEngine, "begin", MemoryError(QUOTED)),
        (GraphEngine, "compute", FailureError(QUOTED)),
        (Preparer, "prepare", FailureError(QUOTED)),
        (Preparer, "document", FailureError(QUOTED)),
        (Preparer, "estimate", FailureError(QUOTED)),
        (Preparer, "estimate", InputError(QUOTED, where="SECRET")),
        (lanes, "open_image", FailureError(QUOTED)),
        (images, "load", FailureError(QUOTED)),
        (Store, "described", FailureError(QUOTED)),
        (Store, "described", RecordDamagedError(QUOTED)),
        (Store, "document", RecordDamagedError(QUOTED)),
        (Store, "document", FailureError(QUOTED)),
        (Store, "ids", FailureError(QUOTED)),
        (Store, "add", FailureError(QUOTED)),
        (Store, "add", InputError(f"document {QUOTED!r}: is too long")),
        (Store, "content", OSError(28, QUOTED)),
        (Store, "remove", FailureError(QUOTED)),
        (Store, "remove", RecordDamagedError(QUOTED)),
        (Store, "get", RecordDamagedError(QUOTED)),
    ],
)
def test_a_failure_is_written_down_without_what_it_says(
    owner: Any, name: str, error: Exception, asker: Asker, lines: Lines, monkeypatch: pytest.MonkeyPatch
) -> None:
    for path in ("SECRET-1", "SECRET-2"):
        assert asker.ask("PUT", f"/v1/documents/{path}", body=path.encode(), content_type="text/plain").status == 200
    lines.take()
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, _raising(error))
        answers = [
            asker.failed("POST", "/v1/rerank", json.dumps(body).encode())
            for body in (
                {"query": "SECRET", "documents": ["SECRET document of a failure", {"image": ENCODED}]},
                {"query": {"image": ENCODED}, "documents": [{"id": "SECRET-1"}]},
            )
        ]
        answers.append(asker.failed("PUT", "/v1/documents/SECRET-3", json.dumps({"text": f"SECRET {name}"}).encode()))
        answers += [asker.failed(method, "/v1/documents/SECRET-2") for method in ("GET", "DELETE")]
        answers += [asker.failed("GET", "/v1/documents")]
    if not isinstance(error, InputError):  # whose sentences are our own
        assert not any(QUOTED.encode() in answer.body for answer in answers)
    for path in ("SECRET-1", "SECRET-2", "SECRET-3"):
        asker.ask("DELETE", f"/v1/documents/{path}")
    assert rank(asker).status == 200  # and it goes on
    found = held(lines, len(answers))
    if any(answer.status >= 500 for answer in answers):
        assert any(kind in line for line in found for kind in ("level=error", " error ", '"level": "error"'))


def test_a_line_of_a_library_is_its_first_and_quotes_no_error(lines: Lines) -> None:
    logger, error = logging.getLogger("m0kit.scoring.engine"), FailureError(QUOTED)
    error.__cause__ = ValueError(QUOTED)
    logger.warning("%s It was computed anew.", error, exc_info=error)
    logger.warning("%s It was computed anew.", RecordDamagedError("document 'SECRET'"))
    logger.warning("%(what)s", {"what": "a mapping"})
    logging.getLogger("asyncio").error("Task exception was never retrieved\nfuture: <Task %r>", error)
    logging.getLogger("uvicorn.error").critical("Exception in ASGI application\n", exc_info=error)
    logging.getLogger("h11").info("SECRET")
    logging.getLogger("PIL").debug("SECRET")
    logger.warning("%s", StoreError("library: the disk is full"))
    wrong = logging.LogRecord("m0kit.x", logging.ERROR, "", 1, "%s %s", ("SECRET",), None)
    logging.getLogger().handlers[0].handle(wrong)  # cannot be formatted, and is lost
    found = held(lines, 6)
    assert len(found) == 6
    assert "RecordDamagedError" in found[1]
    assert "the disk is full" in found[-1]
    assert "ValueError" in found[0]


def test_warnings_of_libraries_quote_nothing(asker: Asker, lines: Lines) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        rank(asker, documents=["SECRET " * 8000, {"image": ENCODED}])
    assert SECRET not in " ".join(str(one.message) for one in caught)
    held(lines, 1)


def test_the_key_itself_is_nowhere(asker: Asker, lines: Lines) -> None:
    assert KEY.startswith(SECRET)  # so the checks above hold for it too
    asker.ask("GET", "/v1/models")
    assert "tester" in held(lines, 1)[-1]
