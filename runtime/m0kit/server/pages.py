"""The page to try a server with, at `/`. Owns its files' routes, its policy, and PDFs as images for it.

    routes = page_routes(read_body, max_pages=settings.max_documents)

`page/` holds one HTML file with its style, one of JavaScript and the sample sets. Nothing in it comes from outside, and
its policy tells the browser so.
"""

import base64
import hashlib
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Generator
from pathlib import Path
from typing import Any, Final

import msgspec
from anyio import CancelScope
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from m0kit.errors import DependencyError, InputError, M0kitError
from m0kit.reading.pdf import PdfPage, pdf_pages
from m0kit.server.guard import Raw, call_of
from m0kit.server.problems import RequestError

_FOLDER: Final = Path(__file__).with_name("page")
_FILES: Final = {
    "/": ("index.html", "text/html; charset=utf-8"),
    "/app.js": ("app.js", "text/javascript; charset=utf-8"),
    "/sample.json": ("sample.json", "application/json"),
}
PDFS: Final = Raw("POST", "/pdf", ("application/pdf",))
MAX_PDFS: Final = 2  # drawn at a time: each has a process, which may take a gigabyte
_RETRY_S: Final = 5  # until one is done: a page takes a tenth of a second or less


def page_routes(
    read_body: Callable[[Request], Awaitable[bytes]], max_pages: int, timeout_s: float = 300
) -> list[Route]:
    """`GET /`, `/app.js`, `/sample.json`, and `POST /pdf`; all raise RequestError.

    `read_body` gives the body of a request, or raises RequestError where it is too large. `POST /pdf` takes a PDF of
    `max_pages` pages at most as its body, and answers a line of JSON for each: {"page", "pages", "image": a PNG as a
    data URI, "width", "height"}, or {"page", "pages", "error": …} for one that cannot be drawn. Where the others cannot
    be drawn either the last line is an error's body without "page"; so it is after `timeout_s`, since who takes lines
    slowly takes a place from others.
    """
    return [*(_file(path, *of) for path, of in _FILES.items()), _pdf(read_body, max_pages, timeout_s)]


def _file(path: str, name: str, media_type: str) -> Route:
    content = (_FOLDER / name).read_bytes()
    headers = {"Cache-Control": "no-cache", "X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer"}
    if name.endswith(".html"):
        headers["Content-Security-Policy"] = policy(content.decode())

    async def answer(_: Request) -> Response:
        return Response(content, media_type=media_type, headers=headers)

    return Route(path, answer, methods=["GET"], name=name)


def policy(html: str) -> str:
    """What the page may do: run its one file, ask this server, show images it was given."""
    found = re.search(r"<style>(.*?)</style>", html, re.DOTALL)
    assert found is not None
    style = base64.b64encode(hashlib.sha256(found[1].encode()).digest()).decode()
    return (
        "default-src 'none'; script-src 'self'; connect-src 'self'; img-src 'self' data: blob:; "
        "require-trusted-types-for 'script'; trusted-types 'none'; "  # no text becomes markup or code
        f"style-src 'sha256-{style}'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )


def _pdf(read_body: Callable[[Request], Awaitable[bytes]], max_pages: int, timeout_s: float) -> Route:
    drawing: set[object] = set()  # the PDFs in work

    def require_place() -> None:
        if len(drawing) >= MAX_PDFS:
            message = f"{MAX_PDFS} PDFs are being drawn. Try again in {_RETRY_S} seconds."
            raise RequestError("OVERLOADED", message, retry_after_s=_RETRY_S)

    async def answer(request: Request) -> Response:
        require_place()
        body = await read_body(request)
        require_place()  # taken now, and not while it came in: a slow sender holds up no other
        try:
            pages = pdf_pages(body, "PDF", max_pages=max_pages)
        except M0kitError as error:
            raise _problem(error) from None
        drawing.add(place := object())
        end = time.monotonic() + timeout_s

        async def done() -> None:
            with CancelScope(shield=True):  # the process ends, whoever has gone
                await run_in_threadpool(pages.close)
            drawing.discard(place)

        try:
            first = await run_in_threadpool(next, pages)  # what is wrong with the file has a status of its own
        except BaseException as error:
            await done()
            if isinstance(error, M0kitError):
                raise _problem(error) from None
            raise
        return _Lines(_lines(first, pages, call_of(request.scope).id, end), done)

    return Route(PDFS.path, answer, methods=[PDFS.method], name="pdf")


class _Lines(StreamingResponse):
    """Lines of JSON, and what is done when they end, or the client has gone before the first."""

    def __init__(self, lines: AsyncIterator[bytes], done: Callable[[], Awaitable[None]]) -> None:
        super().__init__(lines, media_type="application/x-ndjson")
        self._done = done

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self._done()


async def _lines(first: PdfPage, pages: Generator[PdfPage], request_id: str, end: float) -> AsyncIterator[bytes]:
    page: PdfPage | None = first
    try:
        while page is not None:
            yield _line(_shown(page, request_id))
            if time.monotonic() > end:
                what = "the time for a request is over, and not all pages are drawn. Send fewer pages at a time."
                raise RequestError("DEADLINE_EXCEEDED", what)
            page = await run_in_threadpool(next, pages, None)
    except M0kitError as error:
        yield _line(_problem(error).body(request_id))


def _shown(page: PdfPage, request_id: str) -> dict[str, Any]:
    found: dict[str, Any] = {"page": page.number, "pages": page.count}
    if page.error is not None:
        return {**found, **_problem(page.error).body(request_id)}
    image = f"data:image/png;base64,{base64.b64encode(page.png).decode()}"
    return {**found, "image": image, "width": page.width, "height": page.height}


def _problem(error: M0kitError) -> RequestError:
    """Whose fault it is: the file's, the missing extra's, or this server's."""
    if isinstance(error, RequestError):
        return error
    if isinstance(error, InputError):
        return RequestError("INVALID_INPUT", error)
    return RequestError("NOT_FOUND" if isinstance(error, DependencyError) else "INTERNAL_ERROR", error)


def _line(value: dict[str, Any]) -> bytes:
    return msgspec.json.encode(value) + b"\n"
