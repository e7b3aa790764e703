"""The pure functions of the page's script, run by node."""

import ast
import base64
import csv
import io
import json
import shutil
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("starlette")

from m0kit.server import pages

APP = Path(pages.__file__).with_name("page") / "app.js"
NODE = shutil.which("node")
pytestmark = pytest.mark.skipif(NODE is None, reason="there is no node on this machine")
PNG = b"\x89PNG\r\n\x1a\n" + bytes(20)
INFO = {
    "formats": ["PNG", "JPEG"],
    "limits": {
        "max_body_bytes": 1000,
        "max_documents": 3,
        "max_images": 2,
        "max_image_bytes": 3 << 20,
        "max_image_pixels": 2_000_000,
        "max_request_pixels": 3_000_000,
    },
    "models": [{"name": "m0", "precision": "int8", "device": "cpu"}],
}


SERVING = """
const app = require(process.argv[1]);
const real = (value) => (value?.base64 === undefined ? value : new Uint8Array(Buffer.from(value.base64, "base64")));
require("readline").createInterface({ input: process.stdin }).on("line", (line) => {
  const [name, ...of] = JSON.parse(line);
  console.log(JSON.stringify(app[name](...of.map(real))));
});
"""


@cache
def node() -> subprocess.Popen[str]:
    assert NODE is not None
    return subprocess.Popen([NODE, "-e", SERVING, str(APP)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


@pytest.fixture(scope="module", autouse=True)
def ended() -> Iterator[None]:
    yield
    with node():
        node().terminate()
    node.cache_clear()


def call(name: str, *arguments: Any) -> Any:
    """What a function of the script gives; bytes become a Uint8Array."""
    process = node()
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(json.dumps((name, *arguments), default=_bytes) + "\n")
    process.stdin.flush()
    return json.loads(process.stdout.readline())


def calls(*wanted: tuple[Any, ...]) -> list[Any]:
    return [call(*one) for one in wanted]


def _bytes(value: bytes) -> dict[str, str]:
    return {"base64": base64.b64encode(value).decode()}


class TestWhatAFileIs:
    @pytest.mark.parametrize(
        ("data", "name", "kind"),
        [
            (PNG, "a.png", "image PNG"),
            (b"\xff\xd8\xff\xe0 and so on", "photo", "image JPEG"),
            (b"RIFF\x80\x01\0\0WEBPVP8 ", "a.webp", "image WEBP"),
            (b"GIF89a\x80\x01", "a.gif", "image GIF"),
            (b"II*\0\x80\xff", "a.tif", "image TIFF"),
            (b"\0\0\0\x20ftypavif\xff", "a.avif", "image AVIF"),
            (b"%PDF-1.7\n\x80", "a.pdf", "pdf"),
            (b"\0 before the mark %PDF-1.4", "scan.PDF", "pdf"),
            ("Žluťoučký kůň".encode(), "a.txt", "text"),
            (b"BM is how this text begins", "a.txt", "text"),
            (b"<html><p>a page</p></html>", "a.html", "text"),
        ],
    )
    def test_it_is_told_by_its_content(self, data: bytes, name: str, kind: str) -> None:
        found = call("sniff", data, name)
        assert " ".join(found[key] for key in ("kind", "format") if key in found) == kind

    @pytest.mark.parametrize(
        ("data", "name", "why"),
        [
            (b"", "a.txt", "is empty."),
            (b" \n ", "a.txt", "has no text in it."),
            (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "drawing", "is an SVG drawing. Save it as PNG."),
            (b"<?xml version='1.0'?><svg/>", "a.xml", "is an SVG drawing. Save it as PNG."),
            (b"text", "a.svg", "is an SVG drawing. Save it as PNG."),
            (b"404 not found", "a.png", "is called an image, but holds text. Rename it."),
            (b"PK\x03\x04\x80", "a.docx", "is neither text in UTF-8, nor a page image, nor a PDF."),
            ("Ж".encode("utf-16"), "a.txt", "is neither text in UTF-8, nor a page image, nor a PDF."),
        ],
    )
    def test_what_is_refused_says_why(self, data: bytes, name: str, why: str) -> None:
        assert call("sniff", data, name) == {"why": why}

    def test_line_ends_become_those_of_unix(self) -> None:
        assert call("sniff", b"\xef\xbb\xbfone\r\ntwo\rthree", "a.txt") == {"kind": "text", "text": "one\ntwo\nthree"}


class TestLimits:
    def test_an_image_is_held_against_those_of_the_server(self) -> None:
        small = {"format": "PNG", "bytes": 1000, "pixels": 1000}
        assert call("imageProblem", small, INFO) == ""
        assert call("imageProblem", {**small, "format": "TIFF"}, INFO) == "is TIFF; the server reads PNG, JPEG."
        assert (
            call("imageProblem", {**small, "bytes": 5 << 20}, INFO) == "has 5 MiB; the server takes 3 MiB for an image."
        )
        found = call("imageProblem", {**small, "pixels": 8_123_456}, INFO)
        assert found == "has 8.1 megapixels; the server takes 2. Make it smaller."

    @pytest.mark.parametrize(
        ("documents", "what"),
        [
            ([{"text": "a"}] * 4, "4 documents; the server takes 3 documents"),
            ([{"bytes": 1, "pixels": 1}] * 3, "3 images; the server takes 2 images"),
            ([{"bytes": 1, "pixels": 1_600_000}] * 2, "4 megapixels; the server takes 3 megapixels"),
            ([{"bytes": 700, "pixels": 1}], "2 KiB; the server takes 1 KiB"),
            ([{"text": "ж" * 450}], "2 KiB; the server takes 1 KiB"),
        ],
    )
    def test_a_request_is_refused_before_it_is_sent(self, documents: list[dict[str, Any]], what: str) -> None:
        found = call("requestProblem", {"text": "q"}, documents, INFO)
        assert found == f"These are {what} in one request. Remove some."

    def test_what_need_not_be_sent_again_is_said_where_the_server_keeps(self) -> None:
        images, texts = [{"bytes": 700, "pixels": 1}], [{"text": "a"}] * 4
        found = calls(*(("requestProblem", {"text": "q"}, one, {**INFO, "index": True}) for one in (images, texts)))
        assert [one.partition("request. ")[2] for one in found] == [
            "Remove some, or keep them on the server first.",
            "Remove some.",
        ]

    def test_what_the_server_keeps_weighs_its_name_alone(self) -> None:
        kept = [{"bytes": 5000, "pixels": 9_000_000, "kept": "page"}] * 3
        assert call("requestProblem", {"text": "q"}, kept, INFO) == ""

    def test_a_server_that_names_no_limit_has_none(self) -> None:
        assert call("requestProblem", {"text": "q"}, [{"text": "a"}] * 5000, {}) == ""


class TestRanking:
    def test_it_is_by_score_then_as_the_documents_came_and_the_unscored_are_last(self) -> None:
        scores = [0.2, None, 0.9, 0.2, None, 0]
        documents = [{"name": i} if score is None else {"name": i, "score": score} for i, score in enumerate(scores)]
        assert [one["name"] for one in call("ranked", documents)] == [2, 0, 3, 5, 1, 4]

    def test_lines_come_in_any_pieces(self) -> None:
        assert call("lines", '{"index":1}\n\n{"index":2}\n{"ind') == [[{"index": 1}, {"index": 2}], '{"ind']

    def test_totals_are_one_line(self) -> None:
        documents = [{"score": 0.5, "cached": True}, {"score": 0.1, "cached": False}, {"score": None}]
        said = call("totals", documents, 4000, INFO, "m0")
        assert said == "2 documents in 4.0 s · 0.5 documents/s · 1 cached, 1 computed · m0, int8, cpu"

    def test_times_and_sizes_are_short(self) -> None:
        wanted = [("duration", ms) for ms in (3.21, 412.4, 3400, 123456)] + [("size", n) for n in (1, 1536, 5 << 20)]
        assert calls(*wanted) == ["3.2 ms", "412 ms", "3.4 s", "123 s", "1 KiB", "2 KiB", "5 MiB"]


class TestErrors:
    def test_the_sentence_is_found_under_any_of_its_names(self) -> None:
        bodies = [{"message": "m"}, {"detail": "m"}, {"error": {"message": "m"}}, {"error": "m"}]
        assert [found["message"] for found in calls(*(("told", body, 422) for body in bodies))] == ["m"] * 4
        assert call("told", None, 502)["message"] == "Something before the server does not reach it."
        assert call("told", None, 418)["message"] == "The server answered 418, and did not say why."

    def test_it_names_what_it_is_about(self) -> None:
        body = {"message": "documents[3].image: bad", "errors": [{"field": "documents[3].image", "message": "bad"}]}
        assert call("told", body)["fields"] == body["errors"]
        fields = ("documents[3].image", "documents[12]", "query", "documents", None)
        assert calls(*(("documentIndex", field) for field in fields)) == [3, 12, None, None, None]

    def test_when_to_come_back_is_a_number_or_a_date(self) -> None:
        date, now = "Fri, 27 Nov 2026 12:00:30 GMT", 1795780800000
        wanted = [("retryAfter", value, now) for value in ("7", date, "soon", None, "999999")]
        assert calls(*wanted) == [7, 30, None, None, 3600]


class TestTakingAway:
    def test_no_cell_is_a_formula(self) -> None:
        evil = ["=1+1", "+1", "-1", "@SUM(A1)", "\t=1", "\r=1", " =1", '=HYPERLINK("x")', "plain", 'a "b", c\n', -0.5]
        cells = calls(*(("cell", text) for text in evil))
        read = [next(csv.reader(io.StringIO(cell, newline="")))[0] for cell in cells]
        assert read == [f"'{text}" for text in evil[:8]] + ["plain", 'a "b", c\n', "-0.5"]
        assert [cell[0] for cell in cells[:8]] == ['"'] * 8

    def test_rows_have_ranks_and_leave_out_what_has_no_score(self) -> None:
        documents = [
            {"name": "b.pdf", "kind": "image", "page": 2, "pages": 9, "score": 0.25, "cached": True, "ms": 4},
            {"name": "a,b.txt", "kind": "text", "text": "=one", "score": 0.5, "ms": 12.5},
            {"name": "c", "kind": "text", "text": "", "score": None},
        ]
        found = call("csv", call("rows", documents))
        assert list(csv.reader(io.StringIO(found, newline=""))) == [
            ["rank", "score", "name", "page", "pages", "kind", "cached", "ms", "text"],
            ["1", "0.5", "a,b.txt", "", "", "text", "false", "12.5", "'=one"],
            ["2", "0.25", "b.pdf", "2", "9", "image", "true", "4", ""],
        ]

    def test_a_kept_page_has_a_readable_name_that_is_its_own(self) -> None:
        name = call("keptName", {"name": "a/b\n.pdf", "page": 3}, "0123456789abcdef" * 4)
        assert name == "a_b_.pdf page 3 0123456789abcdef0123456789abcdef"
        assert calls(("shownName", name), ("shownName", "given by others")) == ["a_b_.pdf page 3", "given by others"]


EVIL = 'it\'s $HOME `id` \\ "quoted" $(id) END_OF_REQUEST\n\u2028 ж 😀'


class TestCode:
    """What is copied is run, against a curl and a server that tell what they were given."""

    def request(self, url: str, *, auth: bool) -> dict[str, Any]:
        documents = [
            {"value": EVIL},
            {"file": "-it's $HOME.png"},
            {"pdf": "scan `id`.pdf", "page": 2},
            {"pdf": "scan `id`.pdf", "page": 1},
            {"value": {"id": EVIL}},
            {"value": {"image": "QUJD"}},
        ]
        return {"url": url, "model": "m0-$x", "auth": auth, "query": {"value": EVIL}, "documents": documents}

    def wanted(self) -> dict[str, Any]:
        documents = [EVIL, {"image": "UE5H"}, {"image": "data:2"}, {"image": "data:1"}, {"id": EVIL}, {"image": "QUJD"}]
        return {"model": "m0-$x", "query": EVIL, "documents": documents, "return_documents": False}

    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        (tmp_path / "-it's $HOME.png").write_bytes(b"PNG")
        (tmp_path / "scan `id`.pdf").write_bytes(b"%PDF")
        return tmp_path

    @pytest.mark.skipif(shutil.which("sh") is None, reason="there is no shell on this machine")
    def test_curl(self, folder: Path) -> None:
        curl = folder / "curl"
        curl.write_text(
            "#!/bin/sh\nprintf '%s\\n' \"$@\" >> arguments\n"
            'case "$*" in *pdf*) [ "$(cat)" = %PDF ] && printf \'{"page":%s,"image":"data:%s"}\\n\' 1 1 2 2 ;; '
            "*) cat > sent ;; esac\n"
        )
        curl.chmod(0o700)
        code = call("curl", self.request("http://it's/", auth=True))
        environment = {"PATH": f"{folder}:/usr/bin:/bin", "M0KIT_API_KEY": "k", "HOME": "/home"}
        done = subprocess.run(["sh", "-e", "-c", code], cwd=folder, env=environment, capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (0, "")
        assert json.loads((folder / "sent").read_text("utf-8")) == self.wanted()
        arguments = (folder / "arguments").read_text().splitlines()
        assert arguments.count("Authorization: Bearer k") == 2
        assert [one for one in arguments if one.startswith("http")] == ["http://it's/pdf", "http://it's/v1/rerank"]

    def test_python(self, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        sent: list[Any] = []

        def answer(request: Any) -> io.BytesIO:
            sent.append(request)
            if request.full_url.endswith("pdf"):
                return io.BytesIO(b'{"page":1,"image":"data:1"}\n{"page":2,"image":"data:2"}\n')
            return io.BytesIO(b'{"results": [{"index": 3, "relevance_score": 0.5}]}')

        monkeypatch.setattr("urllib.request.urlopen", answer)
        monkeypatch.setenv("M0KIT_API_KEY", "k")
        monkeypatch.chdir(folder)
        code = call("python", self.request("http://127.0.0.1:1/", auth=True))
        ast.parse(code)
        exec(compile(code, "copied", "exec"), {})
        assert [request.full_url for request in sent] == ["http://127.0.0.1:1/pdf", "http://127.0.0.1:1/v1/rerank"]
        assert json.loads(sent[-1].data) == self.wanted()
        assert {request.get_header("Authorization") for request in sent} == {"Bearer k"}
        assert capsys.readouterr().out == "3 0.5\n"

    def test_sources_are_named_only_where_they_are_on_disk(self) -> None:
        sides = [
            {"text": "t", "file": "a.txt"},
            {"bytes": 3, "file": "a.png"},
            {"bytes": 3, "file": "", "pdf": "a.pdf", "page": 3},
            {"bytes": 3, "file": ""},
            {"bytes": 3, "file": "a.png", "kept": "id"},
        ]
        assert calls(*(("source", side, "QUJD") for side in sides)) == [
            {"value": "t"},
            {"file": "a.png"},
            {"pdf": "a.pdf", "page": 3},
            {"value": {"image": "QUJD"}},
            {"value": {"id": "id"}},
        ]
