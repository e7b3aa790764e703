"""The routes of the page over HTTP: its files and their policy, and PDFs that become images."""

import base64
import hashlib
import io
import json
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

pytest.importorskip("starlette", reason="m0kit[serve] is not installed")
pytest.importorskip("uvicorn", reason="m0kit[serve] is not installed")
pytest.importorskip("pypdfium2", reason="m0kit[pdf] is not installed")

from tests.pdfs import pdf, text
from tests.runtime.server.page.fake import Fake
from tests.runtime.server.serving import PATIENCE_S, Served, served, settings_of, until

from m0kit.reading.pdf import PdfPage
from m0kit.server import pages
from m0kit.server.app import build

SMALL = pdf([text("l", 60, 10, 40), text("oo", 60, 10, 40)], (160, 120))


@pytest.fixture
def server() -> Iterator[Served]:
    with served(Fake().app()) as at:
        yield at


def get(at: Served, path: str, *headers: str) -> tuple[int, dict[str, str], bytes]:
    return at.ask("\r\n".join([f"GET {path} HTTP/1.1", "Host: localhost", *headers, "", ""]).encode()).answer()


def head(size: int, kind: str = "application/pdf") -> bytes:
    return f"POST /pdf HTTP/1.1\r\nHost: localhost\r\nContent-Type: {kind}\r\nContent-Length: {size}\r\n\r\n".encode()


def lines(body: bytes) -> list[dict[str, Any]]:
    return [json.loads(line) for line in body.splitlines()]


def test_the_policy_names_the_style_and_one_script_and_nothing_from_elsewhere(server: Served) -> None:
    status, headers, body = get(server, "/")
    html = body.decode()
    policy = dict(part.strip().split(" ", 1) for part in headers["content-security-policy"].split(";"))
    (style,) = re.findall(r"<style>(.*?)</style>", html, re.DOTALL)
    assert policy["style-src"] == f"'sha256-{base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()}'"
    assert (status, policy["default-src"], policy["script-src"]) == (200, "'none'", "'self'")
    assert re.findall(r"<script[^>]*>", html) == ['<script src="app.js" defer="defer">']
    everything = html + (Path(pages.__file__).parent / "page" / "app.js").read_text("utf-8")
    assert re.findall(r"https?://(?!www\.w3\.org/2000/svg)", everything) == []
    assert re.search(r"\sstyle=|\son\w+=", html) is None


def test_a_pdf_becomes_a_line_of_each_page(server: Served) -> None:
    status, headers, body = server.ask(head(len(SMALL)) + SMALL).answer("POST")
    found = lines(body)
    assert (status, headers["content-type"]) == (200, "application/x-ndjson")
    assert [(line["page"], line["pages"]) for line in found] == [(1, 2), (2, 2)]
    assert found[0]["image"] != found[1]["image"]
    for line in found:
        kind, _, data = line["image"].partition(",")
        assert kind == "data:image/png;base64"
        assert Image.open(io.BytesIO(base64.b64decode(data))).size == (line["width"], line["height"])


@pytest.mark.parametrize(
    ("body", "kind", "status", "code"),
    [
        (b"no PDF", "application/pdf", 422, "INVALID_INPUT"),
        (SMALL[:200], "application/pdf", 422, "INVALID_INPUT"),
        (pdf([text("page")] * 41, (20, 20)), "application/pdf", 422, "INVALID_INPUT"),
        (SMALL, "text/html", 415, "UNSUPPORTED_TYPE"),
    ],
)
def test_what_is_no_pdf_has_an_answer_of_ours(server: Served, body: bytes, kind: str, status: int, code: str) -> None:
    found, _, told = server.ask(head(len(body), kind) + body).answer("POST")
    assert (found, json.loads(told)["code"]) == (status, code)


def test_senders_that_are_slow_hold_up_no_other(server: Served) -> None:
    for _ in range(pages.MAX_PDFS + 1):
        server.ask(head(1000) + b"%PDF-")  # and nothing more
    status, _, body = server.ask(head(len(SMALL)) + SMALL).answer("POST")
    assert (status, len(lines(body))) == (200, 2)


def test_who_hangs_up_leaves_the_place_to_others(server: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    closed: list[int] = []

    def endless(*_: Any, **__: Any) -> Iterator[PdfPage]:
        try:
            while True:
                yield PdfPage(1, 2, 1, 1, bytes(1 << 16))
        finally:
            closed.append(1)

    monkeypatch.setattr(pages, "pdf_pages", endless)
    clients = [server.ask(head(len(SMALL)) + SMALL) for _ in range(pages.MAX_PDFS)]
    for client in clients:
        assert client.sock.recv(1)  # it draws
        client.close()
    until(lambda: len(closed) == pages.MAX_PDFS)
    monkeypatch.undo()
    until(lambda: server.ask(head(len(SMALL)) + SMALL).answer("POST")[0] == 200)


def test_more_at_once_are_told_when_to_come_back(server: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    may_go, begun = threading.Event(), list[int]()
    drawn = pages.pdf_pages

    def waiting(*given: Any, **named: Any) -> Iterator[PdfPage]:
        begun.append(1)
        may_go.wait(PATIENCE_S)
        yield from drawn(*given, **named)

    monkeypatch.setattr(pages, "pdf_pages", waiting)
    first = [server.ask(head(len(SMALL)) + SMALL) for _ in range(pages.MAX_PDFS)]
    until(lambda: len(begun) == pages.MAX_PDFS)
    status, headers, body = server.ask(head(len(SMALL)) + SMALL).answer("POST")
    may_go.set()
    assert (status, headers["retry-after"]) == (429, "5")
    assert "PDFs are being drawn. Try again in 5 seconds." in json.loads(body)["message"]
    assert [client.answer("POST")[0] for client in first] == [200] * pages.MAX_PDFS


def test_with_keys_a_browser_is_told_to_ask_for_one_and_programs_are_not(tmp_path: Path) -> None:
    (tmp_path / "keys").touch(0o600)
    (tmp_path / "keys").write_text("k" * 40)
    settings = settings_of(api_key_file=tmp_path / "keys")
    app = build(settings)
    with served(app, app.service.metrics, api_key_file=tmp_path / "keys") as at:
        for path in ("/", "/app.js", "/sample.json", "/info"):
            assert get(at, path)[0] == 401
            assert get(at, path, "Accept: */*")[1]["www-authenticate"] == "Bearer"
        client = at.ask(b"GET / HTTP/1.1\r\nHost: localhost\r\nAccept: text/html\r\nConnection: close\r\n\r\n")
        challenges = re.findall(rb"(?im)^www-authenticate: (\w+)", client.rest())
        assert challenges == [b"Bearer", b"Basic"]  # each in a header of its own
        basic = base64.b64encode(b"any:" + b"k" * 40).decode()
        assert get(at, "/", f"Authorization: Basic {basic}")[0] == 200
