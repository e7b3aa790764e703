"""The three forms say the same, and the page shows what it is given and nothing else."""

import re
from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations
from xml.etree import ElementTree as ET

import pytest

from m0kit_parity.bench.commands import Timing
from m0kit_parity.bench.measure import Memory
from m0kit_parity.evaluate.quality import Evaluation, Measured, Quality
from m0kit_parity.evaluate.render import _scatter, to_html, to_text

SVG = "{http://www.w3.org/2000/svg}"


def result_of(names: Sequence[str], judged: bool = True, speed: bool = True) -> Evaluation:
    artifacts = []
    for i, name in enumerate(names):
        other = (None,) * 5 if i == 0 else (0.1 * i, 0.01, 0.001, 0.99, 0.975)
        quality = Quality(0.9 - i / 1000 if judged else None, *other)
        memory = {"load": Memory(1, 3, 2, 0.1)}
        seconds = {"load": Timing("load", name, 1.0, 1.0 + i, 1.0, 2.0 + i)} if speed else {}
        artifacts.append(Measured(name, f"/{name}", "int8", 10**9 // (i + 1), "f", {"set": quality}, memory, seconds))
    return Evaluation({"cpu": "<b>"}, {"set": 2}, {"set": 0.5} if judged else {}, tuple(artifacts), ())


def test_tables_are_complete_and_aligned() -> None:
    text = to_text(result_of(["a", "bb"]))
    assert re.search(r"^set, 2 queries +scheme +nDCG@10 +loss, points", text)
    assert re.search(r"bb +int8 +0\.8990 +0\.10 +0\.01 +0\.001 +0\.9900 +97\.5%", text)
    assert re.search(r"bb +int8 +500\.0 +50\.0%", text)
    assert re.search(r"bb +int8 +1\.000 +2\.00× +1\.00–3\.00", text)
    assert "\n(chance) " in text
    for block in text.split("\n\n")[:-1]:
        assert len({len(line) for line in block.splitlines()}) == 1


def test_a_file_without_judgements_is_called_agreement_only() -> None:
    text = to_text(result_of(["a", "b"], judged=False))
    assert "agreement with the baseline (a) only" in text
    assert "nDCG" not in text
    assert "chance" not in text
    assert "agreement" not in to_text(result_of(["a", "b"]))


NASTY = "<img src=x onerror='y'>&\""


@pytest.mark.parametrize("judged", [True, False])
def test_the_page_is_self_contained_and_escapes_what_it_shows(judged: bool) -> None:
    evaluation = replace(result_of([NASTY, "b"], judged), errors=(NASTY,))
    page = to_html(evaluation)
    assert "<img" not in page
    assert not re.search(r"<script|<link|@import|url\(|https?://(?!www\.w3\.org/2000/svg)", page)
    assert "prefers-color-scheme: dark" in page
    assert page.count("<svg") == 2
    root = ET.fromstring(page.removeprefix("<!doctype html>\n").replace('<meta charset="utf-8">', "").replace(
        '<meta name="viewport" content="width=device-width, initial-scale=1">', ""))  # fmt: skip
    assert [e.text for e in root.iter("h2")][:2] == ["Quality against size", "Quality against speed"]
    assert not [e for e in root.iter() if {"src", "href"} & set(e.attrib)]
    assert NASTY in [e.text for e in root.iter("li")]
    one = to_html(result_of(["a", "b"], speed=False))
    assert one.count("<svg") == 1
    assert "Speed was not measured." in one


def test_dots_stand_where_their_figures_say_and_names_do_not_cover_each_other() -> None:
    names = ["m0-fp32", "m0-fp16", "m0-int8", "m0-int4", "m0-nf4"]
    crowded = dict.fromkeys(names, 1.0) | {"m0-fp32": 4.0, "m0-fp16": 2.0}
    quality: dict[str, float | None] = dict.fromkeys(names, 0.80) | {"m0-fp32": 0.84, "m0-fp16": 0.82}
    root = ET.fromstring(_scatter(crowded, quality, "GB", "nDCG"))
    dots = [(float(c.attrib["cx"]), float(c.attrib["cy"])) for c in root.iter(f"{SVG}circle")]
    assert dots[0][0] > dots[1][0] > dots[2][0], "larger stands further right"
    assert dots[0][1] < dots[1][1] < dots[2][1], "better stands higher"
    assert dots[0][0] - dots[1][0] == pytest.approx(2 * (dots[1][0] - dots[2][0]), abs=0.3)  # pixels are rounded to 0.1
    boxes = []
    for text in root.iter(f"{SVG}text"):
        if text.text in names:
            x, y, width = float(text.attrib["x"]), float(text.attrib["y"]), 7 * len(text.text or "")
            left = x - width if text.attrib.get("text-anchor") == "end" else x
            boxes.append((left, left + width, y))
            assert left > 0
            assert left + width <= 760
            assert 0 < y < 320
    assert len(boxes) == len(names)
    for a, b in combinations(boxes, 2):
        assert a[1] <= b[0] or b[1] <= a[0] or abs(a[2] - b[2]) >= 13
    one = ET.fromstring(_scatter({"a": 1.0, "b": 2.0}, {"a": 0.5, "b": None}, "x", "y"))
    assert len(list(one.iter(f"{SVG}circle"))) == 1
