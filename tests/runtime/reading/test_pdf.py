"""The pages of PDFs: what is drawn, what it is bounded by, and what is said where a page or a file cannot be read."""

import importlib.util
import io
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tests.pdfs import box, locked, pdf, stream, text

from m0kit import PdfPage, Reranker, pdf_pages
from m0kit.errors import DependencyError, InputError, M0kitError
from m0kit.reading import pdf as pdf_module
from m0kit.reading import pdf_child

THREE = pdf([text("slm markdown"), text("page two"), text("the third")])
A4_AT_150 = (1240, 1755)  # 595 × 842 points, sides rounded up


def image_of(page: PdfPage) -> Image.Image:
    assert page.error is None
    image = Image.open(io.BytesIO(page.png))
    assert image.size == (page.width, page.height)
    return image


def drawn(source: Any, **options: Any) -> list[PdfPage]:
    return list(pdf_pages(source, "a.pdf", **options))


def refused(source: Any, **options: Any) -> str:
    with pytest.raises(InputError) as caught:
        drawn(source, **options)
    return str(caught.value)


def test_every_page_comes_in_order_with_its_number() -> None:
    pages = drawn(THREE)
    assert [(page.number, page.count) for page in pages] == [(1, 3), (2, 3), (3, 3)]
    assert {(page.width, page.height) for page in pages} == {A4_AT_150}
    assert len({page.png for page in pages}) == 3


def test_a_file_is_named_by_its_path_and_read_like_its_bytes(tmp_path: Path) -> None:
    path = tmp_path / "paper.pdf"
    path.write_bytes(THREE)
    for source in (path, str(path)):
        assert [page.png for page in pdf_pages(source)] == [page.png for page in drawn(THREE)]
    with pytest.raises(InputError, match=r"none\.pdf: No such file or directory\.$"):
        pdf_pages(tmp_path / "none.pdf")
    with pytest.raises(InputError, match="cannot be the name of a file"):
        pdf_pages("a\0b")
    (tmp_path / "bad.pdf").write_bytes(b"%PDF-1.7 and no more")
    with pytest.raises(InputError, match=f"^{path.with_name('bad.pdf')}: is no PDF, or so damaged"):
        list(pdf_pages(path.with_name("bad.pdf")))


def test_a_page_is_drawn_upright_in_its_colours_on_white() -> None:
    """A red square from the origin of PDFs, which is below, is at the foot of the picture."""
    (page,) = drawn(pdf([box(0, 0, 72, 72)]), dpi=72)
    pixels = np.asarray(image_of(page))
    assert pixels.shape == (842, 595, 3)
    assert (pixels[-70:, :70] == (255, 0, 0)).all()
    assert (pixels[:-74, 74:] == 255).all()


def test_a_page_without_a_colour_is_grey() -> None:
    grey, coloured = drawn(pdf([text("a"), box(10, 10, 1, 1)]))
    assert (image_of(grey).mode, image_of(coloured).mode) == ("L", "RGB")


@pytest.mark.parametrize(("turn", "corner"), [(0, (-1, 0)), (90, (0, 0)), (180, (0, -1)), (270, (-1, -1))])
def test_a_page_is_turned_as_it_says(turn: int, corner: tuple[int, int]) -> None:
    (page,) = drawn(pdf([box(0, 0, 20, 20)], page=f"/Rotate {turn}"), dpi=72)
    assert (page.width > page.height) == (turn in (90, 270))
    pixels = np.asarray(image_of(page))
    assert tuple(pixels[corner]) == (255, 0, 0)
    assert (pixels == (255, 0, 0)).all(-1).sum() == pytest.approx(400, abs=45)  # an edge's pixels may be half covered


def test_only_what_the_crop_box_shows_is_drawn() -> None:
    (page,) = drawn(pdf([box(0, 0, 150, 150)], page="/CropBox [100 100 300 200]"), dpi=72)
    assert (page.width, page.height) == (200, 100)
    pixels = np.asarray(image_of(page))
    assert tuple(pixels[-1, 0]) == (255, 0, 0)
    assert tuple(pixels[0, -1]) == (255, 255, 255)


@pytest.mark.parametrize("size", [(595, 842), (14_400, 14_400), (14_400, 30), (3, 3), (0.5, 20_000)])
def test_a_page_of_any_size_has_no_more_pixels_than_it_may(size: tuple[float, float]) -> None:
    for options in ({}, {"dpi": 20_000}, {"max_pixels": 1000}):
        (page,) = drawn(pdf([text("a")], size=size), **options)
        most = options.get("max_pixels", pdf_module.MAX_PAGE_PIXELS)
        assert page.width * page.height <= most + 2 * pdf_child.MAX_SIDE
        assert image_of(page).getbbox() is not None


def test_a_page_is_a_document_and_scores_as_its_png_does(committed: Path) -> None:
    reranker = Reranker.load(committed / "fp32", threads=1)
    page, *_ = pages = drawn(THREE)
    assert reranker.score([("q", page)]) == reranker.score([("q", page.png)])
    assert reranker.score([(page, "a text")]) == reranker.score([(page.png, "a text")])
    assert [one["index"] for one in reranker.rerank("q", pages)] == [
        one["index"] for one in reranker.rerank("q", [page.png for page in pages])
    ]


def test_a_page_that_cannot_be_drawn_costs_that_page(committed: Path) -> None:
    pages = drawn(THREE.replace(b"12 0 obj", b"99 0 obj"))
    assert [page.error is None for page in pages] == [True, False, True]
    said = "a.pdf#page=2: is damaged and cannot be drawn. Save it again, or give it as PNG."
    assert str(pages[1].error) == said
    good, bad = Reranker.load(committed / "fp32", threads=1).evaluate([("q", pages[0]), ("q", pages[1])])
    assert good.error is None
    assert str(bad.error) == f"pair 1: document: {said}"


def forms(depth: int) -> dict[int, bytes]:
    """Forms that show the next one twenty times each: 20 ** depth of the last."""
    head = "/Type /XObject /Subtype /Form /BBox [0 0 600 900]"
    found = {
        1000 + i: stream(b"/X Do " * 20, f"{head} /Resources << /XObject << /X {1001 + i} 0 R >> >>")
        for i in range(depth)
    }
    return {**found, 1000 + depth: stream(box(0, 0, 10, 10), head)}


BOMB = "/Resources << /XObject << /X 1000 0 R >> >>"


def test_a_page_that_would_be_drawn_for_ages_costs_that_page() -> None:
    pages = drawn(pdf([text("a"), b"/X Do", text("c")], page=["", BOMB, ""], more=forms(12)), page_s=1)
    assert [page.error is None for page in pages] == [True, False, True]
    assert str(pages[1].error).startswith("a.pdf#page=2: takes more than 1 seconds to draw. Save it again")


def test_a_file_of_such_pages_is_given_up() -> None:
    pages = pdf_pages(pdf([b"/X Do"] * 9, page=BOMB, more=forms(12)), "a.pdf", page_s=1)
    assert [next(pages).number for _ in range(pdf_module.MAX_DEATHS)] == [1, 2, 3]
    with pytest.raises(InputError, match=r"^a\.pdf: 3 pages took too long .* behind page 3 were not tried"):
        next(pages)


def test_all_pages_together_have_their_time() -> None:
    whole = pdf([b"/X Do"] * 9, page=BOMB, more=forms(12))
    assert refused(whole, page_s=60, total_s=1).startswith(
        "a.pdf: its pages take more than 1 seconds to draw. Split it."
    )


@pytest.mark.parametrize(
    ("source", "said"),
    [
        (b"", "is no PDF, or so damaged that it cannot be opened. Save it again."),
        (b"no PDF", "is no PDF, or so damaged"),
        (THREE[:300], "is no PDF, or so damaged"),
        (pdf([]), "has no pages."),
        (locked([text("a")]), "needs a password. Save it without one."),
    ],
    ids=["empty", "text", "cut", "no pages", "locked"],
)
def test_a_file_that_cannot_be_read_is_one_sentence(source: bytes, said: str) -> None:
    assert refused(source).startswith(f"a.pdf: {said}")


def test_a_file_without_a_users_password_opens() -> None:
    (page,) = drawn(locked([text("slm markdown")], b""))
    assert page.png == drawn(pdf([text("slm markdown")]))[0].png


@pytest.mark.parametrize(
    ("first", "last", "numbers"), [(1, None, [1, 2, 3]), (2, 2, [2]), (2, None, [2, 3]), (3, 9, [3]), (1, 2, [1, 2])]
)
def test_some_of_the_pages(first: int, last: int | None, numbers: list[int]) -> None:
    pages = drawn(THREE, first_page=first, last_page=last)
    assert [(page.number, page.count) for page in pages] == [(number, 3) for number in numbers]
    assert [page.png for page in pages] == [drawn(THREE)[number - 1].png for number in numbers]


def test_pages_that_there_are_not() -> None:
    assert refused(THREE, first_page=4) == "a.pdf: has 3 pages, and no page 4."
    for wrong in ({"first_page": 0}, {"first_page": 3, "last_page": 2}, {"first_page": 1 << 31}, {"last_page": 0}):
        with pytest.raises(ValueError, match="they count from 1"):
            pdf_pages(THREE, **wrong)


def test_no_more_pages_are_read_than_may_be() -> None:
    assert (
        refused(THREE, max_pages=2) == "a.pdf: has 3 pages; 2 pages of a PDF are read. Split it, or name some of them."
    )
    assert refused(THREE, max_pages=1, last_page=2).startswith("a.pdf: has 3 pages; 1 page of a PDF is read.")
    assert len(drawn(THREE, max_pages=2, first_page=2)) == 2


def test_a_page_that_ends_the_process_leaves_those_that_were_asked_for() -> None:
    whole = pdf([text("a"), b"/X Do", text("c"), text("d")], page=["", BOMB, "", ""], more=forms(12))
    pages = drawn(whole, page_s=1, first_page=2, last_page=3)
    assert [(page.number, page.error is None) for page in pages] == [(2, False), (3, True)]


@pytest.mark.parametrize("name", ["dpi", "max_pixels", "max_pages", "page_s", "total_s"])
def test_limits_that_allow_nothing_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="must be positive"):
        pdf_pages(THREE, **{name: 0})


def test_a_large_file_is_not_read(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(pdf_module, "MAX_PDF_BYTES", 100)
    assert "has more than the 0 MiB that are read of a PDF" in refused(THREE)
    (path := tmp_path / "a.pdf").write_bytes(THREE)
    with pytest.raises(InputError):
        pdf_pages(path)


def test_who_has_seen_enough_ends_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[subprocess.Popen[bytes]] = []

    class Noted(subprocess.Popen[bytes]):
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            started.append(self)

    monkeypatch.setattr(subprocess, "Popen", Noted)
    pages = pdf_pages(pdf([text("a")] * 200))  # more than the pipe holds
    assert next(pages).number == 1
    (child,) = started
    assert child.returncode is None
    pages.close()
    assert child.returncode is not None


def test_without_the_extra_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(DependencyError, match=r"^a\.pdf: reading PDFs needs pypdfium2\. pip install 'm0kit\[pdf\]'"):
        pdf_pages(THREE, "a.pdf")


class TestWhatTheProcessSaysIsNotBelieved:
    """A process that was taken over can at most cost its file's pages."""

    @pytest.fixture
    def child(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
        def said(*frames: bytes, code: int = 0) -> None:
            lines = [f"sys.stdout.buffer.write({b''.join(frames)!r})", "sys.stdout.flush()", f"sys.exit({code})"]
            (tmp_path / "child.py").write_text("import sys\nsys.stdin.buffer.read()\n" + "\n".join(lines))
            monkeypatch.setattr(pdf_child, "__file__", str(tmp_path / "child.py"))

        return said

    def frame(self, kind: bytes, number: int = 0, width: int = 0, height: int = 0, size: int = 0) -> bytes:
        return pdf_child.FRAME.pack(kind, number, width, height, size)

    @pytest.mark.parametrize(
        "page",
        [
            (pdf_child.PAGE, 2, 10, 10, 5),  # another page
            (pdf_child.PAGE, 1, 0, 10, 5),
            (pdf_child.PAGE, 1, 100_000, 100_000, 5),  # more pixels than were asked for
            (pdf_child.PAGE, 1, 10, 10, 1 << 31),  # more bytes than so many pixels take
            (pdf_child.COUNT, 1, 10, 10, 0),
            (b"?", 1, 0, 0, 0),
        ],
    )
    def test_a_page_that_cannot_be_one(self, child: Any, page: Any) -> None:
        start = self.frame(pdf_child.READY) + self.frame(pdf_child.COUNT, 1)
        child(start, self.frame(*page), b"x" * 100)
        (found,) = drawn(THREE)
        assert str(found.error).startswith(
            "a.pdf#page=1: cannot be drawn: the process that does answered what is no page"
        )

    def test_bytes_that_are_no_image(self, child: Any, committed: Path) -> None:
        child(
            self.frame(pdf_child.READY),
            self.frame(pdf_child.COUNT, 1),
            self.frame(pdf_child.PAGE, 1, 10, 10, 4),
            b"\x89PNG",
        )
        (result,) = Reranker.load(committed / "fp32", threads=1).evaluate([("q", page) for page in drawn(THREE)])
        assert result.error is not None

    def test_a_count_that_no_page_follows(self, child: Any) -> None:
        child(self.frame(pdf_child.READY), self.frame(pdf_child.COUNT, 2000))
        pages = pdf_pages(THREE, "a.pdf")
        assert "ended with exit code 0" in str(next(pages).error)
        with pytest.raises(InputError, match="3 pages took too long or ended the process"):
            list(pages)

    def test_a_process_that_does_not_begin_is_not_the_files_fault(self, child: Any) -> None:
        pytest.importorskip("pypdfium2", reason="m0kit[pdf] is not installed")
        child(code=3)
        with pytest.raises(M0kitError, match="ended with exit code 3 before it began") as caught:
            drawn(THREE)
        assert not isinstance(caught.value, InputError)


@settings(max_examples=10)
@given(st.integers(0, len(THREE) - 1), st.binary(min_size=1, max_size=8))
def test_a_damaged_file_is_pages_or_a_sentence(place: int, bytes_there: bytes) -> None:
    pages, said = [], "a.pdf: "
    try:
        pages = drawn(THREE[:place] + bytes_there + THREE[place + len(bytes_there) :])
    except InputError as error:
        said = str(error)
    assert said.startswith("a.pdf: ")
    assert all(page.error is not None or image_of(page) for page in pages)


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the limit may count nothing")
def test_what_draws_has_no_more_memory_than_it_may(monkeypatch: pytest.MonkeyPatch) -> None:
    """With less than it has when it begins it draws nothing, and the caller goes on."""
    monkeypatch.setattr(pdf_module, "MEMORY_BYTES", 1 << 20)
    found: list[PdfPage] = []
    with suppress(InputError):
        found += pdf_pages(THREE, "a.pdf")
    assert all(page.error is not None for page in found)
