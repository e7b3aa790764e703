"""A page holds what it is given as text and small images, whatever stands in them, and asks for nothing else."""

import base64
import hashlib
import io
import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from m0kit.cli import page
from m0kit.errors import OutputError
from m0kit.plain import plain

NASTY = "<script>alert(1)</script>\"'&\x00\x1b[2J\u202e\ud800]]>--></style>"
anything = st.text(st.characters(), min_size=1, max_size=60) | st.just(
    NASTY
)  # control characters and halves of surrogate pairs too


def tree(document: str) -> ET.Element:
    """The page as a browser has it: written as XML, so a text that opened an element would be seen."""
    return ET.fromstring(document.removeprefix("<!DOCTYPE html>\n"))


def sections(words: str) -> list[str]:
    """All that takes text."""
    return [
        page.verdict("pass", words, words),
        page.mark("near", words),
        page.table([page.text(words)], [[page.text(words), page.text(words)]]),
        page.excerpt(words),
        f'<p title="{page.text(words)}"></p>',
        page.about({words: words, "more": {words: [words]}}),
    ]


@given(anything)
def test_no_text_from_outside_becomes_more_than_text(words: str) -> None:
    document = page.page(words, sections(words))
    document.encode()  # Unicode, or this raises
    root = tree(document)
    assert [e.tag for e in root.iter()] == [e.tag for e in tree(page.page("a", sections("a"))).iter()]
    assert not {name for e in root.iter() for name in e.attrib} & {"onclick", "onload", "src", "href", "style"}
    assert root.findtext("head/title") == plain(words)


def test_a_page_allows_its_own_styles_and_images_that_are_data_and_nothing_else() -> None:
    root = tree(page.page("t", []))
    (policy,) = (e.attrib["content"] for e in root.iter("meta") if e.attrib.get("http-equiv"))
    style = base64.b64encode(hashlib.sha256((root.findtext("head/style") or "").encode()).digest()).decode()
    assert policy.split("; ") == [
        "default-src 'none'",
        "img-src data:",
        f"style-src 'sha256-{style}'",
        "base-uri 'none'",
        "form-action 'none'",
    ]
    css = root.findtext("head/style") or ""
    assert "prefers-color-scheme: dark" in css
    assert "@media print" in css
    assert not re.search(r"url\(|@import|expression", css)


def luminance(colour: str) -> float:
    """As WCAG 2 defines it."""
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return sum(weight * c for weight, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_whatever_is_read_stands_out_from_the_paper_in_both_themes(scheme: str) -> None:
    css = tree(page.page("t", [])).findtext("head/style") or ""
    colours = dict(re.findall(r"--([\w-]+): (#\w{6})", css[css.index(f"color-scheme: {scheme};") :].split("}")[0]))
    assert len(colours) == 15
    for name in set(colours) - {"paper", "wash", "grid"}:
        for ground in ("paper", "wash"):
            low, high = sorted(luminance(colours[which]) for which in (name, ground))
            assert (high + 0.05) / (low + 0.05) >= 4.5, (name, ground)  # what WCAG 2 asks of letters


def test_a_verdict_is_said_in_words_and_by_a_mark() -> None:
    marks = [page.verdict(grade, "word", "").split("<b>")[1][0] for grade in ("pass", "near", "fail", "none")]
    assert len(set(marks)) == 4


@pytest.mark.parametrize("size", [(1, 1), (200, 1), (900, 600), (20, 1800)])
@pytest.mark.parametrize("mode", ["RGB", "RGBA", "1"])
def test_a_thumbnail_is_small_whatever_the_image(size: tuple[int, int], mode: str) -> None:
    noise = Image.effect_noise(size, 200).convert(mode)
    html = page.Contents().shown(noise)
    raw = base64.b64decode(html.split("base64,")[1].split('"')[0])
    assert len(raw) <= page.THUMBNAIL_BYTES
    small = Image.open(io.BytesIO(raw))
    assert small.format == "JPEG"
    assert max(small.size) <= page.THUMBNAIL_SIDE
    assert max(small.size) >= min(max(size), page.THUMBNAIL_SIDE) / 4
    wide, narrow = max(size) / min(size), max(small.size) / min(small.size)
    assert narrow == pytest.approx(wide, rel=0.6) or min(small.size) == 1, "not drawn out of shape"


def test_a_thumbnail_is_turned_as_the_model_sees_it_and_tells_nothing_else_of_the_file(tmp_path: Path) -> None:
    image = Image.new("RGB", (300, 100), "red")
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    exif[0x010E] = "where I live"
    image.save(tmp_path / "p.jpg", exif=exif)
    raw = base64.b64decode(page.Contents().shown(tmp_path / "p.jpg").split("base64,")[1].split('"')[0])
    assert Image.open(io.BytesIO(raw)).size[0] < Image.open(io.BytesIO(raw)).size[1]
    assert b"where I live" not in raw


def test_a_page_has_so_many_thumbnails_at_most() -> None:
    contents = page.Contents(max_thumbnails=2)
    shown = [contents.shown(Image.new("RGB", (30, 30))) for _ in range(4)]
    assert ["<img" in html for html in shown] == [True, True, False, False]
    assert all("image" in html for html in shown)


@pytest.mark.parametrize("content", ["", b"no image", Path("gone.png"), {"image": "!"}, 7, {"text": 1}])
def test_what_cannot_be_shown_is_said_so(content: Any) -> None:
    assert page.Contents().shown(content) == '<span class="quiet">cannot be shown</span>'


def test_an_excerpt_is_a_few_lines_of_a_text_however_long_it_is() -> None:
    whole = page.excerpt("word " * 1_000_000)
    assert len(whole) < 500
    assert whole.endswith("…</span>")
    assert page.excerpt("a\n\tb").count("\n") == 1
    assert page.excerpt("\n".join("abcdefgh")).count("\n") == 3
    assert "…" not in page.excerpt("a short one")
    assert page.Contents().shown({"id": "x"}) == '<span class="quiet">in the index</span>'


def test_a_page_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = tmp_path / "p.html"
    page.write(place, page.page(NASTY, [page.excerpt(NASTY)]))
    before = place.read_bytes()
    assert b"<script" not in before
    monkeypatch.setattr("os.fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OutputError, match="No space left"):
        page.write(place, page.page("other", []))
    assert place.read_bytes() == before
    assert list(tmp_path.iterdir()) == [place]


def test_an_image_for_which_memory_runs_out_is_told_of(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(page, "thumbnail", full)
    assert "cannot be shown" in page.Contents().shown(Image.new("RGB", (3, 3)))
