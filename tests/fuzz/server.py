"""What m0kit reads that came over a wire: surfaces of the server. Owns their seeds, and what must hold of an answer.

They are in the table of `surfaces`, which says how one is made. An app is opened in each child that takes inputs: the
threads that it has are none of the process that forks.
"""

import asyncio
import base64
import contextlib
import functools
import io
import itertools
import json
import math
import os
import re
import runpy
import shutil
import signal
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from random import Random
from typing import Any, Final
from unittest import mock

from tests.fuzz import mutate
from tests.fuzz.runner import Files, Surface, Wrong, committed, remove_at_end

# In an error only where something of this process leaked; inputs do not hold them.
_LEAKS: Final = ("Traceback", "site-packages", "object at 0x", "m0kit-fuzz-artifact", "msgspec", ".cpp:", "PIL.")
_RANKINGS: Final = {"/v1/rerank": "v1", "/v2/rerank": "v2", "/rerank": "plain", "/": "plain"}
_JSON: Final = "content-type: application/json"
# Of a request's target and headers, what HTTP lets through.
_TARGET: Final = re.compile(r"[^!-~]")
_HEADER: Final = re.compile(r"([!#$%&'*+.^_`|~0-9A-Za-z-]+):[ \t]*([\t -~\x80-\xff]*?)[ \t]*")


def _image(name: str = "page.png") -> bytes:
    raw = committed("image")[name]["input"]
    assert isinstance(raw, bytes)
    return raw


def _uri(raw: bytes, kind: str = "image/png") -> str:
    return f"data:{kind};base64,{base64.b64encode(raw).decode()}"


def _file(files: Files, name: str) -> bytes:
    content = files[name]
    assert isinstance(content, bytes)
    return content


@functools.cache
def _served() -> Path:
    """The folder of the artifact that is served; it stays until the process ends, which removes it."""
    import onnxruntime  # noqa: F401  (before children are forked)
    from tests.fuzz.surfaces import artifact

    from m0kit.server import app  # noqa: F401

    folder = Path(tempfile.mkdtemp(prefix="m0kit-fuzz-artifact-"))
    remove_at_end(str(folder))
    for name, content in artifact().items():
        (folder / name).write_bytes(content)
    return folder


class _OfChild:
    """What is opened once in each process, and ends with it."""

    def __init__(self, opens: Callable[[contextlib.ExitStack], Any]) -> None:
        self._opens, self._owner, self._opened, self._kept = opens, 0, None, contextlib.ExitStack()

    def __call__(self) -> Any:
        if self._owner != os.getpid():
            self._opened = self._opens(self._kept)
            self._owner = os.getpid()
        return self._opened


# --- requests ------------------------------------------------------------------------------------------------


def request() -> Surface:
    """A request to the real app: its head, and a body of any form."""
    from tests.runtime.server.inside import inside
    from tests.runtime.server.wire.recordings import recordings

    from m0kit.server.problems import STATUS
    from m0kit.server.wire.requests import parse_rerank, parse_score

    folder = _served()

    def opened(kept: contextlib.ExitStack) -> Any:
        for left in Path(tempfile.gettempdir()).glob("library-*"):
            shutil.rmtree(left)
        index = Path(tempfile.gettempdir(), f"library-{os.getpid()}")
        app = kept.enter_context(inside(folder, index, max_documents=300))
        app.ask("PUT", "/v1/documents/page", _image(), {"content-type": "image/png"})
        app.ask("PUT", "/v1/documents/text", b"a text", {"content-type": "text/plain"})
        return app

    app = _OfChild(opened)

    def target(given: Path) -> object:
        first, *lines = (given / "head").read_bytes().decode("latin-1").split("\n")
        method, _, wanted = first.partition(" ")
        wanted = "/" + _TARGET.sub("", wanted).removeprefix("/").partition("#")[0]
        headers = dict(found.groups() for line in lines if (found := _HEADER.fullmatch(line)))
        body = (given / "body").read_bytes()
        answer = app().ask(re.sub(r"\W", "", method)[:20] or "X", wanted, body, headers)
        path = wanted.partition("?")[0]
        if answer.status >= 500:
            raise Wrong(f"{answer.status} for {method} {wanted:.80}")
        if answer.status >= 400:
            told = json.loads(answer.body)
            if STATUS[told["code"]] != answer.status or told["detail"] != told["message"]:
                raise Wrong("an error has not the form of one")
            if any(leak in told["detail"] and leak.encode() not in body for leak in _LEAKS):
                raise Wrong(f"an error says what is none of its client's: {told['detail']:.200}")
        elif path in _RANKINGS and method == "POST":
            ask = parse_rerank(body, _RANKINGS[path])  # type: ignore[arg-type]
            _check_ranking(ask, answer)
        elif path in ("/score", "/v1/score") and method == "POST":
            ask = parse_score(body)
            data = json.loads(answer.body)["data"]
            if [one["index"] for one in data] != list(range(max(len(ask.queries), len(ask.documents)))):
                raise Wrong("not each pair has a score in its place")
            _check_scores([one["score"] for one in data], ask.raw)
        return answer.body.decode("latin-1")

    page = _uri(_image())
    texts = {"query": "slm markdown", "documents": ["a text", "another"]}
    heads: dict[str, bytes] = {
        name: f"{line}\n{_JSON}".encode()
        for name, line in {
            "v1": "POST /v1/rerank", "v2": "POST /v2/rerank", "plain": "POST /rerank", "root": "POST /",
            "score": "POST /score", "v1-score": "POST /v1/score", "add": "POST /v1/documents",
            "put": "PUT /v1/documents/a%20b", "get": "GET /v1/documents/page", "delete": "DELETE /v1/documents/text",
            "list": "GET /v1/documents?limit=2&after=page", "models": "GET /v1/models", "model": "GET /v1/models/m0",
            "info": "GET /info", "metrics": "GET /metrics", "openapi": "GET /openapi.json", "ready": "GET /ready",
            "page": "GET /", "other": "BREW /v1/rerank", "nowhere": "POST /v1/nowhere",
        }.items()
    }  # fmt: skip
    heads |= {
        "put-image": b"PUT /v1/documents/c\ncontent-type: image/png",
        "put-text": b"PUT /v1/documents/d?model=jina-reranker-m0\ncontent-type: text/plain; charset=utf-8",
        "lines": heads["v1"] + b"\naccept: application/x-ndjson\nx-request-id: r-1",
        "bearer": heads["v1"] + b"\nauthorization: Bearer x\norigin: http://127.0.0.1",
        "trace": heads["v1"] + b"\ntraceparent: 00-" + b"a" * 32 + b"-" + b"b" * 16 + b"-01",
    }
    bodies: dict[str, tuple[str, Any]] = {
        "whole-texts": ("v1", texts),
        "whole-page": ("v1", {"query": {"image": page}, "documents": [{"image": page}, "x", {"text": "y"}]}),
        "whole-parts": ("plain", {"query": "q", "documents": {"content": [
            {"type": "image_url", "image_url": {"url": page}}, {"type": "image_url", "image_url": page}]}}),
        "whole-ids": ("v2", {"query": {"id": "text"}, "documents": [{"id": "page"}, {"bytes": _uri(_image())[22:]}]}),
        "whole-lines": ("lines", {**texts, "return_documents": "true", "top_n": "1"}),
        "whole-tei": ("root", {"query": "q", "texts": ["a", "b"], "raw_scores": True, "return_text": True}),
        "whole-score": ("score", {"queries": ["q", "r"], "documents": ["a", "b"], "truncate_prompt_tokens": 20}),
        "whole-one": ("v1-score", {"text_1": "q", "text_2": ["a", {"content": [{"type": "text", "text": "b"}]}]}),
        "whole-add": ("add", {"documents": [{"id": "n", "text": "a text"}, {"id": "o", "image": page}]}),
        "whole-put": ("put", {"text": "a text"}),
        "fields": ("v1", {"query": "q", "documents": [{"title": "a", "body": "b"}], "rank_fields": ["title", "body"]}),
        "limits": ("v1", {**texts, "max_tokens_per_doc": 3, "max_tokens_per_query": 1, "truncation": False}),
        "url": ("v1", {"query": "q", "documents": [{"url": "http://127.0.0.1/x"}]}),
        "model": ("v1", {**texts, "model": "another"}),
    }  # fmt: skip
    seeds: dict[str, Files] = {
        name: {"head": heads[head], "body": json.dumps(body).encode()} for name, (head, body) in bodies.items()
    }
    seeds |= {f"head-{name}": {"head": head, "body": b""} for name, head in heads.items()}
    seeds["whole-put-image"] = {"head": heads["put-image"], "body": _image("page.webp")}
    seeds["whole-put-text"] = {"head": heads["put-text"], "body": "ein Text über 数据库".encode()}
    for number, recording in enumerate(recordings()):
        told = "\n".join([f"{recording.method} {recording.path}", *(f"{k}: {v}" for k, v in recording.headers.items())])
        body = b"" if recording.body is None else json.dumps(recording.body).encode()
        seeds[f"recorded-{number:03}"] = {"head": told.encode("latin-1"), "body": body}

    def mutated(random: Random, files: Files) -> Files:
        kind = random.random()
        if kind < 0.75:
            return {**files, "body": mutate.json_tree(random, _file(files, "body"))}
        if kind < 0.85:  # the same body to another route
            return {**files, "head": random.choice(list(heads.values()))}
        head = mutate.text(random, _file(files, "head").decode("latin-1"))
        return {**files, "head": head.encode("latin-1", "replace")}

    return Surface({**seeds, **committed("request")}, mutated, target)


def _check_ranking(ask: Any, answer: Any) -> None:
    """That a ranking has each document once, best first. Raises Wrong."""
    if answer.headers["content-type"].startswith("application/x-ndjson"):
        *lines, last = map(json.loads, answer.body.splitlines())
        if not last.get("done"):
            raise Wrong("an answer in lines has an error behind a result")
        if sorted(line["index"] for line in lines) != list(range(len(ask.documents))):
            raise Wrong("not each document has a line")
        results = last["results"]
    else:
        told = json.loads(answer.body)
        results = told if ask.shape == "tei" else told["results"]
    indices = [one["index"] for one in results]
    most = len(ask.documents) if ask.top_n is None else min(ask.top_n, len(ask.documents))
    if len(set(indices)) != most or not set(indices) <= set(range(len(ask.documents))):
        raise Wrong("not each document has one result")
    scores = [one["score" if ask.shape == "tei" else "relevance_score"] for one in results]
    _check_scores(scores, ask.raw)
    ranked = list(zip(scores, indices, strict=True))
    if any(one[0] < other[0] for one, other in itertools.pairwise(ranked)):
        raise Wrong("the best does not come first")


def _check_scores(scores: list[Any], raw: bool) -> None:
    for score in scores:
        if not isinstance(score, float) or not math.isfinite(score) or not (raw or 0 <= score <= 1):
            raise Wrong("a score that none can have")


# --- parts of them -------------------------------------------------------------------------------------------


def side() -> Surface:
    """One document in any form: strings of images, parts and ids above all."""
    from m0kit.reading.inputs import Known, Picture, Text
    from m0kit.server.problems import RequestError
    from m0kit.server.wire.ask import Link
    from m0kit.server.wire.contents import parse_documents

    def target(folder: Path) -> object:
        try:
            value = json.loads((folder / "input").read_bytes())
        except (ValueError, RecursionError):  # what reads bodies is another surface's
            return None
        said: list[object] = []
        for echo in ("all", "texts"):
            try:
                found = parse_documents(value, "documents", echo)  # type: ignore[arg-type]
            except RequestError as error:
                if not error.where.startswith("documents"):
                    raise Wrong("an error names no place") from error
                json.dumps(error.body("r-1")).encode()
                said.append(error)
                continue
            items = value if isinstance(value, list) else [value]
            if isinstance(value, list) and len(found) != len(value):
                raise Wrong("not each document is there")
            for one in found:
                content = one.side.content
                if isinstance(content, Picture):
                    if not (isinstance(content.source, bytes) and content.source):
                        raise Wrong("an image is none that was sent")
                elif isinstance(content, Link):
                    if not content.url.lower().startswith(("http://", "https://")):
                        raise Wrong("a link to something else than the web")
                elif isinstance(content, Text | Known):
                    (content.text if isinstance(content, Text) else content.id).encode()
                if one.shown is None or not isinstance(one.shown["text"], str):
                    raise Wrong("a document is shown without text")
            for each, one in zip(items, found, strict=False):
                if isinstance(each, str) and one.side.content != Text(each):
                    raise Wrong("a string is not its own text")
        return said

    letters = base64.b64encode(_image()).decode()
    url = {"type": "image_url", "image_url": {"url": _uri(_image())}}
    values: dict[str, Any] = {
        "text": "slm markdown", "explicit": {"text": "slm"}, "uri": {"image": _uri(_image())},
        "percent": {"image": "data:image/png;charset=x;base64," + letters.replace("+", "%2B").replace("/", "%2f")},
        "svg": {"image": "data:image/svg+xml;utf8,<svg/>"}, "bare": {"image": letters}, "bytes": {"bytes": letters},
        "letters": {"image": letters.replace("+", "-").replace("/", "_").rstrip("=")},
        "lines": {"image": "\r\n".join(letters[i : i + 76] for i in range(0, len(letters), 76))},
        "url": {"url": "https://example.org/a.png"}, "link": {"image": "HTTP://[::1]/a"}, "id": {"id": "page"},
        "file": {"image": "file:///etc/passwd"}, "path": {"image": "/etc/passwd"}, "both": {"text": "a", "image": "b"},
        "parts": {"content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        "many": {"content": [url, url]},
        "part": {"content": [url]}, "string": {"content": "a"}, "list": ["a", {"image": letters}, {"content": [url]}],
        "more": {"text": "a", "title": "b", "url": "http://x/y", "id": "c", "image": None},
    }  # fmt: skip
    return Surface(
        seeds={**{n: {"input": json.dumps(v).encode()} for n, v in values.items()}, **committed("side")},
        mutate=lambda random, files: {"input": mutate.json_tree(random, _file(files, "input"))},
        target=target,
    )


def header() -> Surface:
    """An image's file as the server weighs it: its header held against the limits, and nothing decoded."""
    from PIL import Image, ImageFile
    from tests.fuzz import surfaces

    from m0kit.errors import InputError
    from m0kit.reading.inputs import Picture, Text, parse_content
    from m0kit.server.lane import Lane
    from m0kit.server.problems import RequestError
    from m0kit.server.settings import ModelSettings, Settings
    from m0kit.server.wire.ask import Ask, Side

    limits = Settings((ModelSettings("none"),), max_image_pixels=1_000_000, max_image_bytes=1 << 16)
    folder = _served()
    lane = _OfChild(lambda _: Lane.open(ModelSettings(str(folder), threads=1), ["m0"]))
    before = Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES, ImageFile.MAXBLOCK

    def decodes(*_: object) -> Any:
        raise Wrong("an image is decoded before it was let in")

    def target(given: Path) -> object:
        raw = (given / "input").read_bytes()
        picture = parse_content(raw, "")
        assert isinstance(picture, Picture)
        where = "documents[0].image"
        query, document = Side(Text("q"), "query"), Side(picture, where)
        try:
            with mock.patch.object(ImageFile.ImageFile, "load", decodes):
                (task,) = lane().weigh([query], [document], Ask([query], [document]), limits)
        except RequestError as error:
            if error.where != where or error.status != 422:
                raise Wrong("an error is not that of the image") from error
            return str(error)
        if len(raw) > limits.max_image_bytes:
            raise Wrong("an image over the limit of bytes is let in")
        try:
            found, _ = lane().preparer.document(picture, "document")
        except InputError as error:
            return str(error)
        with Image.open(io.BytesIO(raw)) as image:
            pixels = image.width * image.height
        if pixels > limits.max_image_pixels:
            raise Wrong("an image over the limit of pixels is let in")
        if found.cost > task.cost + 100:  # what stands around an image in a prompt, and the query
            raise Wrong(f"work of {found.cost} is let in as {task.cost}")
        if before != (Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES, ImageFile.MAXBLOCK):
            raise Wrong("what Pillow does for everybody was changed")
        return None

    seeds = committed("image")
    raws = [_file(files, "input") for files in seeds.values()]
    made = {
        "png-57-bytes": surfaces.png(70_000_000, 1),
        "png-many-pixels": surfaces.png(50_000, 50_000),
        "png-at-the-limit": surfaces.png(1000, 1000),
        "png-over-the-limit": surfaces.png(1001, 1000),
        "png-long": surfaces.png(1, 20_000),
        "jpeg-600-scans": surfaces.scans(_image("progressive.jpg"), 600),
        "svg": b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>',
        "fits": b"SIMPLE  =                    T".ljust(80) + b"END".ljust(2800),
        "eps": surfaces.EPS,
        "psd": b"8BPS\0\1" + bytes(6) + b"\0\3\0\0\0\1\0\0\0\1\0\x08\0\3" + bytes(12),
        "nothing": b"",
    }
    return Surface(
        seeds={**seeds, **{name: {"input": raw} for name, raw in made.items()}, **committed("header")},
        mutate=lambda random, files: {"input": mutate.data(random, _file(files, "input"), raws)[: 1 << 17]},
        target=target,
    )


# --- PDFs ----------------------------------------------------------------------------------------------------


def pdf() -> Surface:
    """A PDF, drawn in this process instead of one of its own; or what such a process may answer ("frames")."""
    import pypdfium2  # noqa: F401  (before children are forked)

    from m0kit.errors import InputError, M0kitError
    from m0kit.reading import pdf as reading
    from m0kit.reading import pdf_child
    from m0kit.reading.pdf_child import COUNT, FRAME, PAGE, READY, UNDRAWN

    most, pixels = 20, 200_000

    class Drawing(io.BytesIO):
        """What is asked for. When it is all there the pages are drawn, in this process."""

        def __init__(self, answer: io.BytesIO) -> None:
            super().__init__()
            self._answer = answer

        def close(self) -> None:
            if not self.closed:
                asked, told = io.BytesIO(self.getvalue()), io.BytesIO()
                super().close()
                with (
                    mock.patch("sys.stdin", mock.Mock(buffer=asked)),
                    mock.patch("sys.stdout", mock.Mock(buffer=told)),
                    mock.patch("resource.setrlimit"),  # the runner's are in force
                    mock.patch.object(signal, "setitimer"),
                    mock.patch.object(signal, "signal"),
                ):
                    runpy.run_path(pdf_child.__file__, run_name="__main__")
                self._answer.write(told.getvalue())
                self._answer.seek(0)

    class Child:
        """In place of a process."""

        def __init__(self, frames: bytes | None) -> None:
            self.stdout = io.BytesIO(frames or b"")
            self.stdin = io.BytesIO() if frames is not None else Drawing(self.stdout)

        def kill(self) -> None:
            pass

        def wait(self, timeout: float | None = None) -> int:  # noqa: ARG002 — as a process has it
            return 1

    def drawn(raw: bytes, is_sound: bool) -> Iterator[Any]:
        try:
            yield from reading.pdf_pages(raw, "PDF", max_pages=most, max_pixels=pixels)
        except M0kitError as error:
            if is_sound and not isinstance(error, InputError):
                raise Wrong(f"a file is said to be the server's fault: {error}") from error
            raise

    def target(folder: Path) -> object:
        path = folder / "frames"
        frames = path.read_bytes() if path.exists() else None
        said: list[object] = []
        with mock.patch.object(reading.subprocess, "Popen", side_effect=lambda *_, **__: Child(frames)):
            for number, page in enumerate(drawn((folder / "input").read_bytes(), frames is None), 1):
                if (page.number, page.count > most) != (number, False) or number > most:
                    raise Wrong("a page of another number, or one too many")
                if page.error is not None:
                    said.append(page.error)
                elif not 0 < page.width * page.height <= pixels + 2 * pdf_child.MAX_SIDE:
                    raise Wrong(f"a page of {page.width}×{page.height}")
        return said

    text = b"BT /F 12 Tf 20 100 Td (slm markdown) Tj ET 1 0 0 rg 10 10 50 20 re f"
    files: dict[str, bytes] = {
        "whole-page": _pdf(text),
        "whole-pages": _pdf(text, text, b"0 0 100 100 re S"),
        "turned": _pdf(text, more=b"/Rotate 90 /UserUnit 5"),
        "huge": _pdf(text, box=b"0 0 14400 14400"),
        "flat": _pdf(text, box=b"0 0 1 1000000"),
        "empty-box": _pdf(text, box=b"0 0 0 0"),
        "negative-box": _pdf(text, box=b"5 5 -5e30 1e38"),
        "deep": _pdf(b"q " * 20_000 + b"Q " * 20_000),
        "no-pages": _pdf(),
        "many-pages": _pdf(*[b""] * 30),
        "locked": _pdf(text).replace(b"/Root", b"/Encrypt << /Filter /Standard /V 1 /R 2 /O (x) /U (x) /P 4 >> /Root"),
        "loop": _pdf(text).replace(b"/Kids [3 0 R", b"/Kids [2 0 R"),
        "no-pdf": b"%!PS",
        "empty": b"",
    }
    png = _image()
    page = FRAME.pack(PAGE, 1, 20, 30, len(png)) + png
    begun = FRAME.pack(READY, 0, 0, 0, 0) + FRAME.pack(COUNT, 2, 0, 0, 0)
    answers = {
        "frames-whole": begun + page + FRAME.pack(UNDRAWN, 2, 0, 0, 0),
        "frames-cut": begun + page[:50],
        "frames-huge": begun + FRAME.pack(PAGE, 1, 2**32 - 1, 2**32 - 1, 2**32 - 1),
        "frames-many": FRAME.pack(READY, 0, 0, 0, 0) + FRAME.pack(COUNT, 2**32 - 1, 0, 0, 0),
        "frames-other": begun + FRAME.pack(PAGE, 2, 20, 30, len(png)) + png,
        "frames-never": b"",
    }
    seeds: dict[str, Files] = {name: {"input": raw} for name, raw in files.items()}
    seeds |= {name: {"input": files["whole-page"], "frames": raw} for name, raw in answers.items()}
    raws = list(files.values())
    change = {
        "input": lambda random, raw: mutate.data(random, raw, raws)[: 1 << 17],
        "frames": lambda random, raw: mutate.data(random, raw, list(answers.values())),
    }

    def mutated(random: Random, given: Files) -> Files:
        name = "frames" if "frames" in given else "input"
        return {**given, name: change[name](random, _file(given, name))}

    return Surface({**seeds, **committed("pdf")}, mutated, target, native_may_die=True)


def _pdf(*pages: bytes, box: bytes = b"0 0 200 150", more: bytes = b"") -> bytes:
    """A PDF of pages with a font, each by what draws it."""
    kids = b" ".join(b"%d 0 R" % (3 + 2 * i) for i in range(len(pages)))
    font = b"<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica >>"
    objects = [b"<< /Type /Catalog /Pages 2 0 R >>", b"<< /Type /Pages /Count %d /Kids [%s] >>" % (len(pages), kids)]
    for i, drawn in enumerate(pages):
        resources = b"<< /Font << /F %s >> >>" % font
        page = b"<< /Type /Page /Parent 2 0 R /MediaBox [%s] /Contents %d 0 R /Resources %s %s >>"
        objects += [
            page % (box, 4 + 2 * i, resources, more),
            b"<< /Length %d >>\nstream\n%s\nendstream" % (len(drawn), drawn),
        ]
    out, places = b"%PDF-1.7\n", []
    for number, one in enumerate(objects, 1):
        places.append(len(out))
        out += b"%d 0 obj\n%s\nendobj\n" % (number, one)
    table = b"".join(b"%010d 00000 n \n" % place for place in places)
    head = b"xref\n0 %d\n0000000000 65535 f \n%s" % (len(objects) + 1, table)
    return out + head + b"trailer << /Size %d /Root 1 0 R >>\nstartxref\n%d\n%%%%EOF\n" % (len(objects) + 1, len(out))


# --- HTTP ----------------------------------------------------------------------------------------------------


def http() -> Surface:
    """Bytes of a connection, in pieces, to the protocol with the guard behind it. The first byte says how large."""
    from tests.runtime.server.serving import settings_of
    from uvicorn.server import ServerState

    from m0kit.server.bodies import read_body
    from m0kit.server.connections import Connection, serve
    from m0kit.server.guard import Guard, call_of
    from m0kit.server.metrics import Metrics

    settings, metrics = settings_of(max_body_bytes=1 << 16), Metrics()

    async def reading(scope: Any, receive: Any, send: Any) -> None:
        if scope["path"] != "/skip":
            body = await read_body(receive, settings.max_body_bytes, 20, call_of(scope).hold)
            assert len(body) <= settings.max_body_bytes
        answer = b"read"
        told = [(b"content-length", b"%d" % len(answer))] if scope["path"] != "/stream" else []
        await send({"type": "http.response.start", "status": 200, "headers": told})
        await send({"type": "http.response.body", "body": answer})

    guard = Guard(reading, settings, metrics)

    async def saying(scope: Any, receive: Any, send: Any) -> None:
        async def told(message: Any) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message["headers"], (b"x-method", scope["method"].encode())]}
            await send(message)

        await guard(scope, receive, told)

    config = serve(saying, settings, metrics).config
    config.load()

    async def fed(pieces: list[bytes]) -> bytes:
        loop = asyncio.get_running_loop()
        wrong: list[dict[str, Any]] = []
        loop.set_exception_handler(lambda _, context: wrong.append(context))
        state = ServerState()
        connection = Connection(config, state, {}, settings, metrics)
        line = _Transport(connection)
        connection.connection_made(line)
        for piece in pieces:
            if line.is_closing():
                break
            connection.data_received(piece)
            await asyncio.sleep(0)
        for _ in range(300):  # turns of the loop: what a request does here takes some ten
            await asyncio.sleep(0)
            if not state.tasks:
                break
        line.lose()
        for _ in range(100):
            await asyncio.sleep(0)
        if state.tasks:
            raise Wrong("a request goes on when its client has gone")
        if wrong:
            raise Wrong(f"the loop was told: {wrong[0].get('exception')!r}")
        return bytes(line.written)

    def target(folder: Path) -> object:
        raw = (folder / "input").read_bytes() or b"\0"
        size = (1, 7, 100, 1 << 16)[raw[0] % 4]
        pieces = [raw[at : at + size] for at in range(1, len(raw), size)]
        written = asyncio.run(fed(pieces))
        for status, headers, body in _answers(written):
            if status >= 500:
                raise Wrong(f"{status} {body[:200]!r}")
            if status >= 400:
                json.loads(body or b"{}")
            if headers.get("content-type") == "application/json" and b"Traceback" in body:
                raise Wrong("an error says too much")
        return written.decode("latin-1")

    host = b"host: localhost\r\n"
    post = b"POST /read HTTP/1.1\r\n" + host + b"content-type: application/json\r\n"
    get = b"GET / HTTP/1.1\r\n" + host + b"\r\n"
    chunks = post + b"transfer-encoding: chunked\r\n\r\n"
    requests: dict[str, bytes] = {
        "whole-get": get,
        "whole-post": post + b"content-length: 5\r\n\r\nhello",
        "whole-chunks": chunks + b"5\r\nhello\r\n1;x=y\r\n!\r\n0\r\nx-end: 1\r\n\r\n",
        "whole-two": get + get,
        "whole-stream": get.replace(b"/ ", b"/stream "),
        "head": get.replace(b"GET", b"HEAD"),
        "old": get.replace(b"1.1", b"1.0"),
        "skip": (post + b"content-length: 5\r\n\r\nhello").replace(b"/read", b"/skip") + get,
        "continue": post + b"content-length: 5\r\nexpect: 100-continue\r\n\r\nhello",
        "upgrade": get[:-2] + b"connection: upgrade\r\nupgrade: h2c, websocket\r\nsec-websocket-version: 13\r\n\r\n",
        "both": post + b"content-length: 3\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n" + get,
        "twice": post + b"content-length: 3\r\ncontent-length: 4\r\n\r\nabcd",
        "negative": post + b"content-length: -1\r\n\r\n",
        "long": post + b"content-length: 99999999999999999999\r\n\r\n",
        "chunk-length": chunks + b"fffffffffffffffffffff\r\n",
        "folded": get[:-2] + b"x-a: b\r\n c\r\n\r\n",
        "absolute": get.replace(b" / ", b" http://localhost/a%00%2e%2e/ "),
        "star": get.replace(b"GET / ", b"OPTIONS * "),
        "authority": get.replace(b"GET / ", b"CONNECT localhost:80 "),
        "many": get[:-2] + b"".join(b"x-%d: y\r\n" % i for i in range(150)) + b"\r\n",
        "wide": get[:-2] + b"x: " + b"y" * 40_000 + b"\r\n\r\n",
        "no-host": b"GET / HTTP/1.1\r\n\r\n",
        "h2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(9),
        "tls": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(32),
        "http-0.9": b"GET /\r\n",
        "blank": b"\r\n\r\n" + get,
        "bare": get.replace(b"\r\n", b"\n"),
    }
    raws = list(requests.values())
    seeds: dict[str, Files] = {
        f"{name}-{size}": {"input": bytes([size]) + raw} for name, raw in requests.items() for size in (1, 3)
    }

    def change(random: Random, files: Files) -> Files:
        raw = _file(files, "input")
        if random.random() < 0.5:
            return {"input": mutate.data(random, raw, raws)[: 1 << 17]}
        lines = raw.split(b"\r\n")  # a line again, gone, from elsewhere, or with other text
        at, other = random.randrange(len(lines)), random.choice(random.choice(raws).split(b"\r\n"))
        changed = mutate.text(random, lines[at].decode("latin-1")).encode("utf-8", "replace")
        lines[at : at + 1] = random.choice(([], [lines[at]] * 2, [other], [lines[at], other], [changed]))
        return {"input": b"\r\n".join(lines)[: 1 << 17]}

    return Surface({**seeds, **committed("http")}, change, target)


class _Transport(asyncio.Transport):
    """In place of a socket. What is written stays here."""

    def __init__(self, protocol: asyncio.Protocol) -> None:
        super().__init__()
        self._protocol, self._is_closing, self._is_lost = protocol, False, False
        self.written = bytearray()

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return {"peername": ("127.0.0.1", 1), "sockname": ("127.0.0.1", 80)}.get(name, default)

    def is_closing(self) -> bool:
        return self._is_closing

    def get_write_buffer_size(self) -> int:
        return 0

    def write(self, data: Any) -> None:
        if not self._is_closing:
            self.written += data

    def can_write_eof(self) -> bool:
        return True

    def write_eof(self) -> None:
        pass

    def pause_reading(self) -> None:
        pass

    def resume_reading(self) -> None:
        pass

    def close(self) -> None:
        self._is_closing = True
        asyncio.get_running_loop().call_soon(self.lose)

    def abort(self) -> None:
        self.close()

    def lose(self) -> None:
        """The other end has gone."""
        if not self._is_lost:
            self._is_closing = self._is_lost = True
            self._protocol.connection_lost(None)


def _answers(written: bytes) -> list[tuple[int, Mapping[str, str], bytes]]:
    """The answers that a client reads. Raises Wrong where that is no HTTP."""
    found: list[tuple[int, Mapping[str, str], bytes]] = []
    while written:
        head, end, rest = written.partition(b"\r\n\r\n")
        first, *lines = head.decode("latin-1").split("\r\n")
        told = re.fullmatch(r"HTTP/1\.1 ([1-5][0-9][0-9]) [ -~]*", first)
        if not told or not end:
            raise Wrong(f"an answer begins with {first[:60]!r}")
        headers = {}
        for line in lines:
            field = _HEADER.fullmatch(line)
            if field is None:
                raise Wrong(f"an answer has the header {line[:60]!r}")
            headers[field[1].lower()] = field[2]
        status = int(told[1])
        body, written = _body(status, headers, rest)
        found.append((status, headers, body))
    return found


def _body(status: int, headers: Mapping[str, str], rest: bytes) -> tuple[bytes, bytes]:
    if status < 200 or headers.get("x-method") == "HEAD":
        return b"", rest
    if "content-length" in headers:
        length = int(headers["content-length"])
        if len(rest) < length:
            raise Wrong("an answer is cut off")
        return rest[:length], rest[length:]
    body = b""
    while (piece := re.match(rb"([0-9a-fA-F]+)\r\n", rest)) is not None:
        length, rest = int(piece[1], 16), rest[piece.end() :]
        body, rest = body + rest[:length], rest[length + 2 :]
        if not length:
            return body, rest
    if "chunked" in headers.get("transfer-encoding", ""):
        raise Wrong("an answer is cut off")
    return rest, b""  # to a client of HTTP/1.0
