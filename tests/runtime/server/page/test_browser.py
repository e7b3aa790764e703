"""The page in a real Chromium, in front of the real server; and of a fake one for what a real one seldom says."""

import base64
import contextlib
import http.client
import importlib.util
import io
import json
import os
import re
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

pytest.importorskip("starlette", reason="m0kit[serve] is not installed")
pytest.importorskip("uvicorn", reason="m0kit[serve] is not installed")
pytest.importorskip("pypdfium2", reason="m0kit[pdf] is not installed")

from tests.pdfs import pdf, text
from tests.runtime.server.page.browser import Browser, missing
from tests.runtime.server.page.fake import Fake
from tests.runtime.server.page.looks import nameless, overflow, thin
from tests.runtime.server.serving import Served, served, settings_of, until

from m0kit.server import pages
from m0kit.server.app import App, build
from m0kit.server.settings import ModelSettings

pytestmark = [pytest.mark.broad, pytest.mark.skipif(bool(missing()), reason=missing() or "there is one")]
TAB, ENTER, ESCAPE, LEFT, RIGHT = "\ue004", "\ue007", "\ue00c", "\ue012", "\ue014"
EVIL = "<img src=x onerror=alert(1)>\"'&amp;.txt"
TEXTS = {"soup.txt": "Lentils boil for twenty minutes.", "bus.txt": "The last bus leaves at midnight."}
MODELS = [{"name": f"m0-{precision}", "precision": precision, "device": "cpu"} for precision in ("int8", "int4")]
WATCH = """
window.violations = [];
document.addEventListener("securitypolicyviolation", (event) => violations.push(event.violatedDirective));
window.urls = new Set();
const { createObjectURL, revokeObjectURL } = URL;
URL.createObjectURL = (blob) => { const url = createObjectURL(blob); urls.add(url); return url; };
URL.revokeObjectURL = (url) => { urls.delete(url); revokeObjectURL(url); };
"""


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with Browser.started(tmp_path_factory.mktemp("chromium")) as browser:
        browser.devtools("Page.addScriptToEvaluateOnNewDocument", source=WATCH)
        browser.devtools("Browser.grantPermissions", permissions=["clipboardReadWrite", "clipboardSanitizedWrite"])
        yield browser


@pytest.fixture
def browser(chromium: Browser) -> Iterator[Browser]:
    """As large and light as ever. A test fails where the browser complains, or the page asks another origin."""
    chromium.resize(1200, 900)
    chromium.prefer(prefers_color_scheme="light", prefers_reduced_motion="reduce")
    chromium.complaints()
    chromium.requests()
    yield chromium
    origin = chromium.run("return location.origin")
    assert chromium.complaints() == []
    assert chromium.run("return window.violations") == []
    asked = {re.sub(r"//.*@", "//", url) for _, url in chromium.requests()}
    assert [url for url in asked if not url.startswith((f"{origin}/", "data:", f"blob:{origin}/"))] == []
    chromium.open("about:blank")


@contextlib.contextmanager
def real(artifact: Path, index: Path | None = None, **changes: Any) -> Iterator[tuple[App, Served]]:
    models = (ModelSettings(str(artifact), names=("tiny",), index=index, threads=1),)
    app = build(settings_of(models=models, **changes))
    with served(app, app.service.metrics, models=models, **changes) as at:
        until(lambda: app.service.problem is None or app.failure)
        assert app.failure is None
        yield app, at


@pytest.fixture(scope="module")
def server(artifact: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with real(artifact, tmp_path_factory.mktemp("server") / "library") as (_, at):
        yield f"http://127.0.0.1:{at.port}/"


@pytest.fixture
def faked() -> Iterator[Callable[..., tuple[Fake, str]]]:
    with contextlib.ExitStack() as stack:

        def start(**changes: Any) -> tuple[Fake, str]:
            fake = Fake(**changes)
            return fake, f"http://127.0.0.1:{stack.enter_context(served(fake.app())).port}/"

        yield start


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """A folder with a page, two texts and a PDF of three pages."""
    for name, said in TEXTS.items():
        (tmp_path / name).write_text(said)
    (tmp_path / "it's a page.png").write_bytes(png(40, 56))
    (tmp_path / "scan.pdf").write_bytes(pdf([text(word, 60, 10, 40) for word in ("l", "oo", "MWM")], (160, 120)))
    return tmp_path


def png(width: int, height: int, colour: str = "navy") -> bytes:
    Image.new("RGB", (width, height), colour).save(file := io.BytesIO(), "PNG")
    return file.getvalue()


def opened(browser: Browser, url: str) -> None:
    browser.open(url)
    browser.until("document.querySelector('#samples button')")


def give(browser: Browser, *paths: Path) -> None:
    before = len(names(browser))
    browser.type("#files", "\n".join(map(str, paths)))
    browser.until(
        "document.querySelectorAll('.card').length > arguments[0] || document.querySelector('.problem')", before
    )
    browser.until("document.querySelector('#stop').hidden")


def write(browser: Browser, *texts: str) -> None:
    for said in texts:
        browser.run(
            "document.querySelector('#text').value = arguments[0]; document.querySelector('#text-add').click()", said
        )


def ask(browser: Browser, query: str, *, wait: bool = True) -> None:
    browser.run("document.querySelector('#query').value = arguments[0]; document.querySelector('#rank').click()", query)
    if wait:
        browser.until("/documents\\/s/.test(document.querySelector('#totals').textContent)")


def names(browser: Browser) -> list[str]:
    return list(browser.run("return [...document.querySelectorAll('.card .name')].map((one) => one.textContent)"))


def scores(browser: Browser) -> list[str]:
    return list(browser.run("return [...document.querySelectorAll('.card .score')].map((one) => one.textContent)"))


def said(browser: Browser) -> str:
    return str(browser.until("document.querySelector('#problems').innerText"))


def post(url: str, body: Any) -> Any:
    request = urllib.request.Request(f"{url}v1/rerank", json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request) as answer:
        return json.load(answer)


def copied(browser: Browser, button: str) -> str:
    browser.run("return navigator.clipboard.writeText('')")
    browser.click(button)
    return str(browser.until("navigator.clipboard.readText()"))


class TestTheFirstMinute:
    def test_a_sample_is_ranked_as_the_server_ranks_it_and_cached_when_asked_again(
        self, browser: Browser, server: str
    ) -> None:
        opened(browser, server)
        browser.click("#samples button")
        browser.until("document.activeElement.closest('#suggestions')")
        assert not any(scores(browser))
        browser.click("#suggestions button")
        browser.until("/documents\\/s/.test(document.querySelector('#totals').textContent)")
        (sample, *_) = json.loads(urllib.request.urlopen(f"{server}sample.json").read())
        documents = [one.get("text") or {"image": one["image"]} for one in sample["documents"]]
        query = browser.run("return document.querySelector('#query').value")
        assert query == sample["queries"][0]
        wanted = post(server, {"query": query, "documents": documents})["results"]
        assert names(browser) == [sample["documents"][one["index"]]["name"] for one in wanted]
        assert scores(browser) == [f"{one['relevance_score']:.3f}" for one in wanted]
        ask(browser, "something else")
        how = browser.run("return [...document.querySelectorAll('.how')].map((one) => one.textContent)")
        assert [one.split(" · ")[1] for one in how] == ["cached"] * len(documents)
        assert f"{len(documents)} cached, 0 computed" in browser.run(
            "return document.querySelector('#totals').innerText"
        )

    def test_a_server_that_opens_its_models_is_waited_for(
        self, browser: Browser, faked: Callable[..., tuple[Fake, str]]
    ) -> None:
        _, url = faked(starting=1)
        browser.open(url)
        assert "opening its models" in said(browser)
        browser.until("document.querySelector('#samples button')")
        assert browser.run("return document.querySelector('#problems').innerText") == ""

    def test_what_it_may_do_holds_and_would_be_told(self, browser: Browser, server: str) -> None:
        """The checks of the fixture can fail: an image from elsewhere, and text as markup."""
        opened(browser, server)
        browser.run("document.body.append(Object.assign(new Image(), { src: 'http://127.0.0.1:1/x.png' }))")
        browser.until("violations.includes('img-src')")
        assert (
            browser.run(
                "try { document.body.insertAdjacentHTML('beforeend', '<p>'); } catch (error) { return error.name }"
            )
            == "TypeError"
        )
        assert browser.complaints() != []
        assert [url for _, url in browser.requests() if ":1/" in url] != []
        browser.run("violations.length = 0")


class TestDocuments:
    def test_pages_texts_and_each_page_of_a_pdf_are_cards(self, browser: Browser, server: str, files: Path) -> None:
        opened(browser, server)
        give(browser, files / "it's a page.png", files / "scan.pdf", files / "soup.txt")
        assert names(browser) == ["it's a page.png", "scan.pdf", "scan.pdf", "scan.pdf", "soup.txt"]
        places = "return [...document.querySelectorAll('.card')].map((one) => one.querySelector('.small').innerText)"
        assert browser.run(places) == ["", "page 1 of 3", "page 2 of 3", "page 3 of 3", ""]
        assert browser.run("return document.querySelectorAll('.card img').length") == 4
        ask(browser, "soup")
        values = [float(score) for score in scores(browser)]
        assert len(set(values)) == 5  # the pages differ, so that what mixes them up fails
        assert values == sorted(values, reverse=True)

    def test_what_cannot_be_read_is_refused_in_words_and_costs_the_others_nothing(
        self, browser: Browser, server: str, files: Path
    ) -> None:
        (files / "broken.pdf").write_bytes(b"%PDF-1.7 and nothing more")
        (files / "drawing.svg").write_text("<svg xmlns='http://www.w3.org/2000/svg'/>")
        (files / "data.bin").write_bytes(b"\x00\xff\x00")
        opened(browser, server)
        give(browser, files / "broken.pdf", files / "drawing.svg", files / "data.bin", files / "soup.txt")
        assert names(browser) == ["soup.txt"]
        told = said(browser)
        for part in (
            "3 files or pages not added",
            "broken.pdf is no PDF",
            "drawing.svg is an SVG drawing",
            "data.bin is neither",
        ):
            assert part in told

    def test_drop_and_paste(self, browser: Browser, server: str, files: Path) -> None:
        opened(browser, server)
        drop(browser, "#drop", [files / "it's a page.png", files / "soup.txt"])
        browser.until("document.querySelectorAll('.card').length == 2")
        assert names(browser) == ["it's a page.png", "soup.txt"]
        paste(browser, "image/png", png(30, 20))
        paste(browser, "text/plain", b"pasted words")
        browser.until("document.querySelectorAll('.card').length == 4")
        assert names(browser)[2:] == ["pasted 1", "text 2"]
        assert browser.run("return document.querySelectorAll('.over').length") == 0

    def test_an_image_is_asked_with(self, browser: Browser, server: str, files: Path) -> None:
        opened(browser, server)
        give(browser, files / "it's a page.png", files / "soup.txt", files / "bus.txt")
        drop(browser, "#question", [files / "it's a page.png"])
        browser.until("!document.querySelector('#query-image').hidden")
        ask(browser, "")
        raw = base64.b64encode((files / "it's a page.png").read_bytes()).decode()
        documents = [{"image": raw}, *TEXTS.values()]
        wanted = post(server, {"query": {"image": raw}, "documents": documents})["results"]
        assert scores(browser) == [f"{one['relevance_score']:.3f}" for one in wanted]
        browser.click("#query-off")
        assert browser.run("return document.activeElement.id") == "query"

    def test_limits_hold_before_anything_is_sent(
        self, browser: Browser, faked: Callable[..., tuple[Fake, str]], tmp_path: Path
    ) -> None:
        fake, url = faked()
        opened(browser, url)
        (tmp_path / "noise.png").write_bytes(png(8, 8) + os.urandom(1 << 20))
        (tmp_path / "large.png").write_bytes(png(2000, 1001))
        (tmp_path / "a.tiff").write_bytes(b"II*\x00" + bytes(99))
        give(browser, *(tmp_path / name for name in ("noise.png", "large.png", "a.tiff")))
        told = said(browser)
        for part in ("noise.png has 1.1 MiB; the server takes 1 MiB", "large.png has 2.0 megapixels", "a.tiff is TIFF"):
            assert part in told
        write(browser, *("x" * 10 for _ in range(41)))
        ask(browser, "q", wait=False)
        assert "41 documents; the server takes 40 documents in one request" in said(browser)
        assert fake.asked == []

    def test_a_server_without_pdf_says_so(
        self, browser: Browser, artifact: Path, files: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        find = importlib.util.find_spec
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "pypdfium2" else find(name))
        with real(artifact) as (_, at):
            opened(browser, f"http://127.0.0.1:{at.port}/")
            assert "PDF" not in browser.run("return document.querySelector('#drop').innerText")
            give(browser, files / "scan.pdf")
            assert "scan.pdf is a PDF, and this server reads none" in said(browser)

    def test_a_pdf_waits_while_those_of_others_are_drawn(
        self, browser: Browser, server: str, files: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(pages, "MAX_PDFS", 0)
        monkeypatch.setattr(pages, "_RETRY_S", 1)
        opened(browser, server)
        browser.type("#files", str(files / "scan.pdf"))
        browser.until("document.querySelector('#live').textContent.startsWith('scan.pdf waits')")
        monkeypatch.undo()
        browser.until("document.querySelectorAll('.card').length == 3")
        assert browser.run("return document.querySelector('#problems').innerText") == ""

    def test_what_is_removed_while_it_comes_stays_away_and_two_clicks_are_one(
        self, browser: Browser, server: str, files: Path
    ) -> None:
        (files / "long.pdf").write_bytes(pdf([text("l", 60, 10, 40)] * 60, (400, 300)))
        opened(browser, server)
        browser.type("#files", str(files / "long.pdf"))
        browser.until("document.querySelectorAll('.card').length > 1")
        browser.run("document.querySelector('#clear').click()")
        browser.until("document.querySelector('#stop').hidden")
        assert names(browser) == []
        assert browser.run("return urls.size") == 0
        browser.run("for (const _ of [1, 2]) document.querySelector('#samples button').click()")
        browser.until("document.querySelectorAll('.card').length > 1 && document.querySelector('#stop').hidden")
        assert len(set(names(browser))) == len(names(browser))
        assert browser.run("return urls.size === document.querySelectorAll('.card img').length")

    def test_markup_in_names_and_texts_is_text(self, browser: Browser, server: str, tmp_path: Path) -> None:
        name = EVIL.replace("/", "")
        (tmp_path / name).write_text(EVIL)
        opened(browser, server)
        give(browser, tmp_path / name)
        write(browser, "</textarea><script>alert(1)</script>")
        ask(browser, EVIL)
        browser.click(".card .open")
        assert browser.run("return document.querySelectorAll('#cards img, #view img, script:not([src])').length") == 0
        assert set(names(browser)) == {name, "text 1"}
        browser.press(ESCAPE)

    def test_what_is_kept_on_the_server_is_asked_by_name(self, browser: Browser, server: str, files: Path) -> None:
        opened(browser, server)
        give(browser, files / "it's a page.png", files / "bus.txt")
        ask(browser, "midnight")
        before = scores(browser)
        browser.click("#keep")
        browser.until(
            "[...document.querySelectorAll('.card')].every((one) => one.innerText.includes('kept on the server'))"
        )
        opened(browser, server)
        browser.until("!document.querySelector('#recall').hidden")
        browser.click("#recall")
        browser.until(
            "document.querySelectorAll('.card img').length == 1 && document.querySelectorAll('.card').length == 2"
        )
        ask(browser, "midnight")
        assert scores(browser) == before
        assert "2 cached, 0 computed" in browser.run("return document.querySelector('#totals').innerText")


class TestStreaming:
    def test_cards_are_in_order_while_scores_come_in(
        self, browser: Browser, faked: Callable[..., tuple[Fake, str]]
    ) -> None:
        fake, url = faked(gate=threading.Event())
        assert fake.gate is not None
        opened(browser, url)
        write(browser, "the longest of all texts", "a middling one", "short")
        ask(browser, "wait", wait=False)
        browser.until("[...document.querySelectorAll('.card .score')].filter((one) => one.textContent).length == 2")
        assert names(browser) == ["text 2", "text 1", "text 3"]
        assert [bool(score) for score in scores(browser)] == [True, True, False]
        assert (
            browser.run("return document.querySelectorAll('.card')[2].querySelector('.how').textContent") == "waiting"
        )
        fake.gate.set()
        browser.until("/documents\\/s/.test(document.querySelector('#totals').textContent)")
        assert names(browser) == ["text 3", "text 2", "text 1"]

    def test_a_second_question_ends_the_first(self, browser: Browser, faked: Callable[..., tuple[Fake, str]]) -> None:
        fake, url = faked(gate=threading.Event())
        opened(browser, url)
        write(browser, "one text", "another text", "a third")
        ask(browser, "wait", wait=False)
        browser.until("[...document.querySelectorAll('.card .score')].filter((one) => one.textContent).length == 2")
        ask(browser, "now")
        until(lambda: fake.hung_up == 1)
        assert all(scores(browser))
        assert [one["query"] for one in fake.asked] == ["wait", "now"]
        assert browser.run("return document.querySelector('#problems').innerText") == ""

    def test_stop_hangs_up_and_a_double_click_leaves_one_ranking(
        self, browser: Browser, faked: Callable[..., tuple[Fake, str]]
    ) -> None:
        fake, url = faked(gate=threading.Event())
        opened(browser, url)
        write(browser, "one text", "another text", "a third")
        ask(browser, "wait", wait=False)
        browser.until("!document.querySelector('#stop').hidden")
        browser.click("#stop")
        browser.until("/^Stopped after/.test(document.querySelector('#totals').textContent)")
        browser.run(
            "document.querySelector('#query').value = 'now';"
            "for (const _ of [1, 2]) document.querySelector('#rank').click()"
        )
        browser.until("/documents\\/s/.test(document.querySelector('#totals').textContent)")
        assert all(scores(browser))
        until(lambda: fake.hung_up >= 1)

    def test_another_model_and_only_the_best(self, browser: Browser, faked: Callable[..., tuple[Fake, str]]) -> None:
        fake, url = faked(models=MODELS)
        opened(browser, url)
        write(browser, *("x" * n for n in range(1, 6)))
        ask(browser, "q")
        browser.run("const model = document.querySelector('#model'); model.value = 'm0-int4'; model.onchange()")
        assert not any(scores(browser))
        ask(browser, "q")
        assert [one["model"] for one in fake.asked] == ["m0-int8", "m0-int4"]
        assert '"m0-int4"' in copied(browser, "#python")
        browser.run("const top = document.querySelector('#top'); top.value = 3; top.onchange()")
        assert browser.run("return [...document.querySelectorAll('.card')].filter((one) => !one.hidden).length") == 3
        write(browser, "one more")
        assert "1 document not ranked yet" in browser.run("return document.querySelector('#hint').innerText")


class TestErrors:
    @pytest.mark.parametrize(
        ("query", "sentence"),
        [
            ("stopping", "This server is stopping. Ask another, or later."),
            ("too large", "takes no request of this size"),
            ("midway", "text 3: cannot be read."),
            ("break", "The answer broke off after 2 of 3 documents."),
        ],
    )
    def test_they_are_told_in_words(
        self, browser: Browser, faked: Callable[..., tuple[Fake, str]], query: str, sentence: str
    ) -> None:
        _, url = faked()
        opened(browser, url)
        write(browser, "one text", "another text", "a third")
        ask(browser, query, wait=False)
        assert sentence in said(browser)

    def test_an_overloaded_server_is_asked_again_when_it_says(
        self, browser: Browser, faked: Callable[..., tuple[Fake, str]]
    ) -> None:
        fake, url = faked()
        opened(browser, url)
        write(browser, "one text")
        ask(browser, "overloaded", wait=False)
        assert "The queue is full. Try again in 1 second." in said(browser)
        assert "Try again (in 1 s)" in said(browser)
        browser.until("/^Try again$/m.test(document.querySelector('#problems').innerText)")
        browser.click("#problems .row button")
        browser.until("/documents\\/s/.test(document.querySelector('#totals').textContent)")
        assert len(fake.asked) == 2

    def test_a_document_that_cannot_be_scored_is_marked_and_can_be_left_out(
        self, browser: Browser, faked: Callable[..., tuple[Fake, str]]
    ) -> None:
        fake, url = faked()
        opened(browser, url)
        write(browser, "one text", "another text", "a third")
        ask(browser, "wrong", wait=False)
        assert "text 2: is cut off." in said(browser)
        marked = "return document.querySelector('.card.wrong').innerText"
        assert "text 2" in browser.run(marked)
        assert "is cut off. Send it again." in browser.run(marked)
        browser.click("#problems .row button")
        browser.until("/documents\\/s/.test(document.querySelector('#totals').textContent)")
        assert len(fake.asked[-1]["documents"]) == 2

    def test_a_real_server_names_the_image(self, browser: Browser, server: str, files: Path) -> None:
        (files / "cut.png").write_bytes(png(40, 56)[:60])
        opened(browser, server)
        give(browser, files / "soup.txt", files / "cut.png")
        ask(browser, "q", wait=False)
        assert said(browser).startswith("cut.png: ")
        assert "cut.png" in browser.run("return document.querySelector('.card.wrong').innerText")

    def test_a_server_that_has_gone(self, browser: Browser, artifact: Path) -> None:
        with real(artifact) as (_, at):
            opened(browser, f"http://127.0.0.1:{at.port}/")
            write(browser, "one text")
        ask(browser, "q", wait=False)
        assert "The server cannot be reached." in said(browser)


class TestKeys:
    def test_a_key_is_asked_for_kept_in_memory_alone_and_in_no_copy(
        self, browser: Browser, artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        old, new = "old-" + "k" * 40, "new-" + "k" * 40
        keys = tmp_path / "keys"
        keys.touch(0o600)
        keys.write_text(old)
        with real(artifact, api_key_file=keys) as (app, at):
            url = f"http://127.0.0.1:{at.port}/"
            # As if someone had typed it into the browser's own dialog, which comes before there is a page.
            opened(browser, url.replace("//", f"//any:{old}@"))
            write(browser, "one text", "another")
            sent = labels(browser)
            ask(browser, "q")
            keys.write_text(new)
            app.reread()
            ask(browser, "another", wait=False)
            assert "none of this server's" in said(browser)
            assert browser.run("return document.activeElement.id") == "key"
            browser.press(*new, ENTER)
            browser.until("/documents\\/s/.test(document.querySelector('#totals').textContent)")
            code = copied(browser, "#python")
            assert old not in code
            assert new not in code
            monkeypatch.setenv("M0KIT_API_KEY", new)
            assert run_python(code, tmp_path) == ranking(browser, sent)
            kept = (
                "return [document.cookie, localStorage.length, sessionStorage.length, location.href.includes('new-')]"
            )
            assert browser.run(kept) == ["", 0, 0, False]
            browser.complaints()


class TestTakingAway:
    def test_the_copied_programs_give_the_same_ranking(self, browser: Browser, server: str, files: Path) -> None:
        opened(browser, server)
        give(browser, files / "scan.pdf", files / "it's a page.png", files / "soup.txt")
        write(browser, 'it\'s $HOME `id` \\ "quoted" $(id)\nж 😀')
        sent = labels(browser)
        ask(browser, "what's $HOME?")
        wanted = ranking(browser, sent)
        assert run_python(copied(browser, "#python"), files) == wanted
        code = copied(browser, "#curl")
        done = subprocess.run(["sh", "-e", "-c", code], cwd=files, capture_output=True, text=True, check=True)
        results = json.loads(done.stdout)["results"]
        assert [f"{one['relevance_score']:.3f}" for one in results] == [score for _, score in wanted]
        assert [one["index"] for one in results] == [index for index, _ in wanted]

    def test_so_do_those_with_an_image_to_ask_with_and_images_that_are_on_no_disk(
        self, browser: Browser, server: str, files: Path
    ) -> None:
        opened(browser, server)
        give(browser, files / "soup.txt")
        paste(browser, "image/png", png(30, 20))
        drop(browser, "#question", [files / "it's a page.png"])
        browser.until("!document.querySelector('#query-image').hidden")
        sent = labels(browser)
        ask(browser, "")
        assert run_python(copied(browser, "#python"), files) == ranking(browser, sent)

    def test_downloads(self, browser: Browser, server: str) -> None:
        opened(browser, server)
        write(browser, "=1+1", "another text")
        ask(browser, "q")
        browser.click("#json")
        browser.click("#csv")
        place = browser.downloads
        until(lambda: all((place / name).exists() for name in ("ranking.json", "ranking.csv")))
        found = json.loads((place / "ranking.json").read_text("utf-8"))
        assert (found["query"], found["model"]) == ("q", "tiny")
        assert [f"{one['score']:.3f}" for one in found["results"]] == scores(browser)
        assert (place / "ranking.csv").read_text("utf-8-sig").startswith("rank,score,name,")

    def test_where_a_browser_does_not_copy_the_code_is_shown(self, browser: Browser, server: str) -> None:
        opened(browser, server)
        write(browser, "one text")
        ask(browser, "q")
        browser.run("navigator.clipboard.writeText = () => Promise.reject(new Error())")
        browser.click("#curl")
        assert "v1/rerank" in browser.until("document.querySelector('#code-text').value")
        assert nameless(browser) == []
        browser.press(ESCAPE)


class TestForAll:
    def test_the_keyboard_is_enough(self, browser: Browser, server: str) -> None:
        opened(browser, server)
        focus = "return document.activeElement.id || document.activeElement.textContent"
        browser.press(TAB)
        assert browser.run(focus) == "query"
        order = []
        while not browser.run("return document.activeElement.closest('#samples') !== null"):
            browser.press(TAB)
            order.append(browser.run(focus))
        assert order[:4] == ["rank", "query-choose", "choose", "write"]
        assert order[-1] == "Pages"
        browser.press(ENTER)
        browser.until("document.activeElement.closest('#suggestions')")
        browser.press(ENTER)
        browser.until("/documents\\/s/.test(document.querySelector('#totals').textContent)")
        while not browser.run("return document.activeElement.matches('.card .open')"):
            browser.press(TAB)
        browser.press(ENTER)
        assert browser.run("return document.querySelector('#view').open")
        first, second, third = names(browser)[:3]
        assert name(browser) == first
        for key, wanted in ((RIGHT, second), (RIGHT, third), (LEFT, second)):
            browser.press(key)
            assert name(browser) == wanted
        assert browser.run("return document.querySelector('#view').contains(document.activeElement)")
        browser.press(ESCAPE)
        assert not browser.run("return document.querySelector('#view').open")
        browser.until("document.activeElement.ariaLabel === arguments[0]", f"Show {second}")

    def test_each_control_has_a_name_and_each_text_stands_out_and_nothing_is_wider_than_a_phone(
        self, browser: Browser, faked: Callable[..., tuple[Fake, str]]
    ) -> None:
        _, url = faked(models=MODELS)
        opened(browser, url)

        def check(state: str) -> None:
            assert nameless(browser) == [], state
            for theme in ("light", "dark"):
                browser.prefer(prefers_color_scheme=theme, prefers_reduced_motion="reduce")
                assert thin(browser) == [], (state, theme)
            browser.resize(390, 844)
            assert overflow(browser) <= 0, state
            browser.resize(1200, 900)

        check("empty")
        browser.click("#write")
        browser.click("#samples button")
        browser.until("document.querySelectorAll('.card').length > 3")
        write(browser, "unbreakable" * 40)
        check("documents")
        ask(browser, "wrong", wait=False)
        said(browser)
        check("an error")
        ask(browser, "q")
        check("ranked")
        browser.click(".card .open")
        check("in full")
        browser.press(ESCAPE)
        assert thin(browser, 21) != []  # it can fail
        browser.run("document.querySelector('#rank').textContent = ''")
        assert nameless(browser) == ["button"]

    def test_what_happens_is_said_aloud(self, browser: Browser, server: str) -> None:
        opened(browser, server)
        write(browser, "one text", "another")
        live = "return document.querySelector('#live[aria-live=polite]').textContent"
        assert browser.run(live) == "text 2 added, 2 documents in all."
        ask(browser, "q")
        assert "First: " in browser.run(live)
        assert names(browser)[0] in browser.run(live)
        ask(browser, "", wait=False)
        assert browser.run("return document.querySelector('#problems[role=alert]').textContent")
        assert browser.run("return document.querySelector('#query').getAttribute('aria-invalid')") == "true"


class TestMemory:
    def test_urls_of_images_are_given_back(self, browser: Browser, server: str, files: Path) -> None:
        opened(browser, server)
        give(browser, files / "scan.pdf", files / "it's a page.png")
        assert browser.run("return urls.size") == 4
        browser.click(".card .open")
        browser.press(RIGHT, RIGHT)
        assert browser.run("return urls.size") == 5
        browser.press(ESCAPE)
        browser.until("urls.size === 4")
        browser.click(".card .remove")
        assert browser.run("return urls.size") == 3
        browser.click("#clear")
        assert browser.run("return urls.size") == 0
        assert names(browser) == []

    def test_of_a_huge_text_the_beginning_is_shown_and_all_is_sent(
        self, browser: Browser, faked: Callable[..., tuple[Fake, str]], tmp_path: Path
    ) -> None:
        fake, url = faked()
        (tmp_path / "huge.txt").write_text("word " * 600_000)
        opened(browser, url)
        give(browser, tmp_path / "huge.txt")
        browser.click(".card .open")
        assert browser.run("return document.querySelector('#view-page').textContent.length") < 201_000
        browser.press(ESCAPE)
        ask(browser, "q")
        assert len(fake.asked[0]["documents"][0]) == 3_000_000


def test_behind_a_prefix_of_a_proxy(browser: Browser, artifact: Path, tmp_path: Path) -> None:
    with real(artifact, root_path="/m0") as (_, at), prefixed("/m0", at.port) as port:
        opened(browser, f"http://127.0.0.1:{port}/m0/")
        write(browser, "one text", "another")
        sent = labels(browser)
        ask(browser, "q")
        code = copied(browser, "#python")
        assert f'"http://127.0.0.1:{port}/m0/"' in code
        assert run_python(code, tmp_path) == ranking(browser, sent)
        assert {url.split("/")[3] for _, url in browser.requests() if url.startswith("http")} == {"m0"}


def name(browser: Browser) -> str:
    """Of what is shown in full."""
    return str(browser.run("return document.querySelector('#view-title').textContent")).rpartition(" (")[0]


def labels(browser: Browser) -> list[str]:
    return list(browser.run("return [...document.querySelectorAll('.card .open')].map((one) => one.ariaLabel)"))


def ranking(browser: Browser, sent: list[str]) -> list[tuple[int, str]]:
    """Positions in the request, and scores, as they stand; `sent`: the labels before."""
    return [(sent.index(label), score) for label, score in zip(labels(browser), scores(browser), strict=True)]


def run_python(code: str, folder: Path) -> list[tuple[int, str]]:
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=True)
    rows = [line.split() for line in done.stdout.splitlines()]
    return [(int(index), f"{float(score):.3f}") for index, score in rows]


def drop(browser: Browser, selector: str, paths: list[Path]) -> None:
    data = {"items": [], "files": [str(path) for path in paths], "dragOperationsMask": 1}
    box = browser.run("return document.querySelector(arguments[0]).getBoundingClientRect().toJSON()", selector)
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    for kind in ("dragEnter", "dragOver", "drop"):
        browser.devtools("Input.dispatchDragEvent", type=kind, x=x, y=y, data=data)


def paste(browser: Browser, kind: str, raw: bytes) -> None:
    """Put it on the clipboard, and press what pastes."""
    browser.run(
        "const bytes = Uint8Array.from(atob(arguments[1]), (letter) => letter.charCodeAt(0));"
        "document.activeElement.blur();"
        "const blob = new Blob([bytes], { type: arguments[0] });"
        "return navigator.clipboard.write([new ClipboardItem({ [arguments[0]]: blob })])",
        kind,
        base64.b64encode(raw).decode(),
    )
    key = {"key": "v", "code": "KeyV", "modifiers": 2, "windowsVirtualKeyCode": 86}
    before = len(names(browser))
    browser.devtools("Input.dispatchKeyEvent", type="keyDown", commands=["paste"], **key)
    browser.devtools("Input.dispatchKeyEvent", type="keyUp", **key)
    browser.until("document.querySelectorAll('.card').length > arguments[0]", before)


@contextlib.contextmanager
def prefixed(prefix: str, port: int) -> Iterator[int]:
    """A proxy that serves what is at a port under a prefix alone, which it takes away."""

    class Proxy(BaseHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            pass

        def do_GET(self) -> None:
            if not self.path.startswith(f"{prefix}/"):
                self.send_error(404)
                return
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            server = http.client.HTTPConnection("127.0.0.1", port)
            server.request(self.command, self.path.removeprefix(prefix), body, dict(self.headers))
            answer = server.getresponse()
            said = answer.read()
            self.send_response(answer.status)
            for header, value in answer.getheaders():
                if header.lower() not in ("transfer-encoding", "content-length", "connection", "date", "server"):
                    self.send_header(header, value)
            self.send_header("Content-Length", str(len(said)))
            self.end_headers()
            self.wfile.write(said)
            server.close()

        do_POST = do_GET  # noqa: N815 — its base class's form

    proxy = ThreadingHTTPServer(("127.0.0.1", 0), Proxy)
    thread = threading.Thread(target=proxy.serve_forever)
    thread.start()
    try:
        yield proxy.server_port
    finally:
        proxy.shutdown()
        thread.join()
        proxy.server_close()
