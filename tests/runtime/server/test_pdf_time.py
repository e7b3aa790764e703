"""PDFs that are drawn for the page: an end to one that takes longer than a request may."""

import json

import pytest

pytest.importorskip("starlette", reason="m0kit[serve] is not installed")
pytest.importorskip("pypdfium2", reason="m0kit[pdf] is not installed")

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.testclient import TestClient
from tests.pdfs import pdf, text
from tests.runtime.server.serving import settings_of

from m0kit.server.guard import Guard
from m0kit.server.metrics import Metrics
from m0kit.server.pages import MAX_PDFS, page_routes


async def read(request: Request) -> bytes:
    return await request.body()


def client(timeout_s: float) -> TestClient:
    app = Starlette(routes=page_routes(read, 40, timeout_s))
    return TestClient(Guard(app, settings_of(), Metrics()), base_url="http://localhost")


def test_a_pdf_whose_time_is_over_ends_with_why_and_gives_its_place_back() -> None:
    body = pdf([text(f"page {number}") for number in range(3)])
    with client(0) as late:
        for _ in range(MAX_PDFS + 1):
            lines = [json.loads(line) for line in late.post("/pdf", content=body).text.splitlines()]
            assert [line.get("page") for line in lines] == [1, None]
            assert lines[1]["code"] == "DEADLINE_EXCEEDED"
    with client(60) as early:
        assert len(early.post("/pdf", content=body).text.splitlines()) == 3
