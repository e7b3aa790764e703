"""A server as the page meets one, without a model: answers that tests choose by the words of the query.

with served(Fake(pdf=True).app()) as at: …
"""

import json
import threading
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

import anyio
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route, Router

from m0kit.server.guard import Guard
from m0kit.server.metrics import Metrics
from m0kit.server.pages import PDFS, page_routes
from m0kit.server.problems import RequestError
from m0kit.server.settings import ModelSettings, Settings

LIMITS = {
    "max_body_bytes": 4 << 20,
    "max_documents": 40,
    "max_images": 30,
    "max_image_bytes": 1 << 20,
    "max_image_pixels": 2_000_000,
    "max_request_pixels": 20_000_000,
    "max_request_tokens": 100_000,
}
ONE = {"name": "m0-int8", "aliases": [], "precision": "int8", "device": "cpu", "index": False}


@dataclass
class Fake:
    """What it says of itself, and what it was asked."""

    pdf: bool = True
    models: list[dict[str, Any]] = field(default_factory=lambda: [ONE])
    starting: int = 0  # answers that it is not there yet
    gate: threading.Event | None = None  # a ranking waits for it before its third line
    asked: list[dict[str, Any]] = field(default_factory=list)
    hung_up: int = 0

    def app(self) -> Guard:
        async def read_body(request: Request) -> bytes:
            return await request.body()

        routes = [
            *page_routes(read_body, 40),
            Route("/info", self.info),
            Route("/v1/rerank", self.rerank, methods=["POST"]),
        ]
        return Guard(Router(routes), Settings((ModelSettings("none"),)), Metrics(), raw=(PDFS,))

    async def info(self, _: Request) -> Response:
        if self.starting:
            self.starting -= 1
            raise RequestError("NOT_READY", "the server is opening its models. Try again in a moment.", retry_after_s=1)
        formats = ["PNG", "JPEG", "WEBP", "GIF"]
        about = {"limits": LIMITS, "formats": formats, "pdf": self.pdf, "index": False, "models": self.models}
        return JSONResponse({**about, "version": "0.1.0"})

    async def rerank(self, request: Request) -> Response:
        body = json.loads(await request.body())
        self.asked.append(body)
        query = body["query"] if isinstance(body["query"], str) else "image"
        if "too large" in query:  # as a proxy says it
            return Response("<html><h1>413 Request Entity Too Large</h1>", 413, media_type="text/html")
        if "overloaded" in query and len(self.asked) == 1:
            raise RequestError("OVERLOADED", "The queue is full. Try again in 1 second.", retry_after_s=1)
        if "stopping" in query:
            raise RequestError("STOPPING", "This server is stopping. Ask another, or later.", retry_after_s=5)
        if "wrong" in query and len(body["documents"]) > 2:
            raise RequestError("INVALID_INPUT", "is cut off. Send it again.", where="documents[1].image")
        return StreamingResponse(self.lines(query, body["documents"]), media_type="application/x-ndjson")

    async def lines(self, query: str, documents: list[Any]) -> AsyncIterator[bytes]:
        results = []
        try:
            for i, document in enumerate(documents):
                while i == 2 and "wait" in query and self.gate is not None and not self.gate.is_set():
                    await anyio.sleep(0.01)
                if i == 2 and "midway" in query:
                    error = RequestError("INVALID_INPUT", "cannot be read.", where="documents[2].image")
                    yield json.dumps(error.body("r1")).encode() + b"\n"
                    return
                if i == 2 and "break" in query:
                    return
                result = {"index": i, "relevance_score": score(document, i)}
                results.append(result)
                cached = len(self.asked) > 1
                yield json.dumps({**result, "cached": cached, "ms": 3 if cached else 420}).encode() + b"\n"
        except anyio.get_cancelled_exc_class():
            self.hung_up += 1
            raise
        results.sort(key=lambda one: (-one["relevance_score"], one["index"]))
        yield json.dumps({"done": True, "usage": {"total_tokens": 9}, "results": results}).encode() + b"\n"


def score(document: Any, index: int) -> float:
    """As good as any: from the text's length, or the place of an image."""
    return round(1 / (1 + len(document)), 6) if isinstance(document, str) else round(0.05 + 0.07 * (index % 13), 6)
