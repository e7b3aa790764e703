"""The page of a ranking shows what was ranked, best first, and what could not be, and is bounded."""

import math
import re
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from m0kit.artifact.manifest import read_manifest
from m0kit.cli.ranking import MAX_ROWS, made_by, ranking_page
from m0kit.errors import InputError
from m0kit.plain import plain
from m0kit.scoring.schedule import Result

NASTY = "<img src=x onerror=alert(1)>\"'&\x1b[2J\u202e"


def result(score: float, *cut: str) -> Result:
    return Result(score, math.log(score / (1 - score)) + 2.65, None, cut)


def failed(message: str) -> Result:
    return Result(math.nan, math.nan, InputError(message))


def tree(document: str) -> ET.Element:
    return ET.fromstring(document.removeprefix("<!DOCTYPE html>\n"))


def test_documents_stand_best_first_with_their_scores_and_what_they_hold(tmp_path: Path) -> None:
    Image.new("RGB", (300, 200), "red").save(tmp_path / "p.png")
    given_ = [("a.txt", "the first text"), ("p.png", tmp_path / "p.png"), ("kept", {"id": "kept"}), ("bad", "")]
    results = [result(0.25), result(0.75), result(0.5, "document"), failed("bad: document is empty.")]
    root = tree(ranking_page("the query", given_, results, [1, 2, 0, 3], {"artifact": "m0"}))
    rows = root.findall(".//ol/li")
    assert [row.findtext("div[@class='what']/div[@class='name']") for row in rows] == ["p.png", "kept", "a.txt"]
    assert [row.findtext("div[@class='score']/b") for row in rows] == ["0.7500", "0.5000", "0.2500"]
    assert [float(row.findall(".//rect")[1].attrib["width"]) for row in rows] == [75, 50, 25]
    assert rows[0].find(".//img") is not None
    assert "in the index" in "".join(rows[1].itertext())
    assert "The document was too long and was cut." in "".join(rows[1].itertext())
    assert "the first text" in "".join(rows[2].itertext())
    assert [e.text for e in root.findall(".//ul/li")] == ["bad: document is empty."]
    whole = "".join(root.find("body").itertext())  # type: ignore[union-attr]
    assert whole.startswith("Ranking≈ 3 scored of 4 documents; 1 could not be, see below.Querythe query")
    assert whole.endswith("artifactm0")


@given(st.text(st.characters(), min_size=1, max_size=40) | st.just(NASTY))
def test_no_name_text_or_message_becomes_more_than_text(words: str) -> None:
    def page_of(words: str) -> ET.Element:
        given_ = [(words, words), (words, {"text": words}), (words, {"id": words})]
        results = [result(0.5), failed(words), result(0.1)]
        return tree(ranking_page(words, given_, results, [0, 2, 1], {words: words}))

    root = page_of(words)
    # A text with half of a surrogate pair is not shown at all; any other is in an element of its own.
    assert [e.tag for e in root.iter()] == [e.tag for e in page_of("a").iter()]
    assert not {name for e in root.iter() for name in e.attrib} & {"src", "href", "style", "onerror"}
    assert [e.text for e in root.findall(".//ul/li")] == [plain(words)]


def test_of_thousands_the_best_are_shown_and_it_is_said() -> None:
    count = 3 * MAX_ROWS
    given_ = [(f"document {i}", "text " * 1000) for i in range(count)]
    results = [result(0.5) if i % 3 else failed(f"document {i}: wrong") for i in range(count)]
    order = [i for i in range(count) if i % 3]
    page = ranking_page("q", given_, results, order, {})
    assert page.count("<li>") == 2 * MAX_ROWS
    assert f"<b>≈ {2 * MAX_ROWS} scored</b> of {count} documents" in page
    assert f"The best {MAX_ROWS} are shown." in page
    assert len(page) < 1000 * 2 * MAX_ROWS


@pytest.mark.parametrize(
    ("results", "said"),
    [
        ([], "✗ Nothing scored</b> of 0 documents."),
        ([failed("a: wrong")], "✗ Nothing scored</b> of 1 document."),
        ([result(0.5)], "✓ 1 scored</b> of 1 document."),
    ],
)
def test_the_page_begins_with_how_many_there_are(results: list[Result], said: str) -> None:
    page = ranking_page("q", [("a", "text")] * len(results), results, list(range(len(results))), {})
    assert said in page
    assert ("<ol" in page) == ("✓" in said)


def test_an_image_as_query_is_shown() -> None:
    page = ranking_page(Image.new("RGB", (64, 64)), [("a", "text")], [result(0.5)], [0], {})
    assert re.search(r'<div class="query"><img class="thumbnail" alt="" src="data:image/jpeg;base64,', page)


def test_the_artifact_and_its_versions_are_named_at_the_end(artifact: Path) -> None:
    facts = made_by(artifact, read_manifest(artifact), {"device": "cpu", "threads": None})
    page = ranking_page("q", [("a", "text")], [result(0.5)], [0], facts)
    end = page[page.index('<details class="about">') :]
    for name in ("artifact", "fingerprint", "m0kit", "onnxruntime", "written", "settings · device"):
        assert f">{name}</th>" in end
    assert "threads" not in end, "what was not set"
