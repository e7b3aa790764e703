"""The three forms say the same, and the page shows what it is given and nothing else."""

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest
from PIL import Image

from m0kit_parity.bench.measure import Memory
from m0kit_parity.bench.timing import Timing
from m0kit_parity.evaluate.judged import Query
from m0kit_parity.evaluate.quality import LIMITS, Change, Evaluation, Measured, Quality
from m0kit_parity.evaluate.render import to_html, to_json, to_text

SVG = "{http://www.w3.org/2000/svg}"


def result_of(
    names: Sequence[str],
    judged: bool = True,
    speed: bool = True,
    losses: Sequence[float] = (0.1, 0.2, 0.3),
    changes: Sequence[Change] = (),
    half: float | None = 0.05,
    changed: int = 20,
) -> Evaluation:
    """`half`: of each loss's interval; `changed`: queries."""
    artifacts = []
    for i, name in enumerate(names):
        loss = losses[i - 1]
        span = (loss - half, loss + half) if half is not None else None
        other = (None,) * 7 if i == 0 else (loss, span, changed, 0.01, 0.001, 0.99, 0.975)
        quality = Quality(0.9 - i / 1000 if judged else None, *other)
        memory = {"load": Memory(opened=0.1, loaded=1, peak=3, private=2, seconds=0.1)}
        seconds = {"load": Timing("load", name, 1.0, 1.0 + i, 1.0, 2.0 + i)} if speed else {}
        artifacts.append(
            Measured(
                name, f"/{name}", "int8" if i else "fp32", 10**9 // (i + 1), "f", {"set": quality}, memory, seconds
            )
        )
    return Evaluation({"cpu": "<b>"}, {"set": 2}, {"set": 0.5} if judged else {}, tuple(artifacts), (), tuple(changes))


def test_tables_are_complete_and_aligned() -> None:
    text = to_text(result_of(["a", "bb"]))
    assert re.search(r"^set, 2 queries +scheme +nDCG@10 +loss, points +95 %", text)
    assert re.search(r"bb +int8 +0\.8990 +0\.10 +\[0\.05, 0\.15\] +0\.01 +0\.001 +0\.9900 +97\.5%", text)
    assert "\nWithin the limit. Of nDCG@10, set: bb loses 0.10 points [0.05, 0.15] (limit 0.2).\n" in text
    assert re.search(r"bb +int8 +500\.0 +50\.0%", text)
    assert re.search(r"bb +int8 +1\.000 +2\.00× +1\.00–3\.00", text)
    assert "\n(chance) " in text
    for block in text.split("\n\n")[:-1]:
        assert len({len(line) for line in block.splitlines() if "(chance)" not in line}) == 1


def test_a_file_without_judgements_is_called_agreement_only() -> None:
    text = to_text(result_of(["a", "b"], judged=False))
    assert "agreement with the baseline (a) only" in text
    assert "nDCG" not in text
    assert "chance" not in text
    assert "agreement" not in to_text(result_of(["a", "b"]))


NASTY = "<img src=x onerror='y'>&\""


@pytest.mark.parametrize("judged", [True, False])
def test_the_page_is_self_contained_and_escapes_what_it_shows(judged: bool) -> None:
    query = Query(NASTY, NASTY, (NASTY, {"text": NASTY}), (0, 1) if judged else None)
    change = Change("b", query, (0.9, 0.1), (0.1, 0.9), (0.6, 1.0) if judged else None, -1.0)
    evaluation = replace(result_of([NASTY, "b"], judged), errors=(NASTY,), changes=(change,))
    page = to_html(evaluation)
    assert "<img" not in page
    assert not re.search(r"<script|<link|@import|url\(|https?://(?!www\.w3\.org/2000/svg)", page)
    assert "prefers-color-scheme: dark" in page
    assert page.count('<svg class="plot"') == 3
    root = ET.fromstring(page.removeprefix("<!DOCTYPE html>\n"))
    assert not [e for e in root.iter() if {"src", "href", "style"} & set(e.attrib)]
    assert NASTY in [e.text for e in root.iter("li")]
    assert NASTY in [e.text for e in root.iter("span")]
    one = to_html(result_of(["a", "b"], speed=False))
    assert one.count('<svg class="plot"') == 2
    assert "Speed was not measured." in one


@pytest.mark.parametrize(
    ("evaluation", "said"),
    [
        (
            result_of(["a", "b"]),
            "✓ Within the limit</b> Of nDCG@10, set: b loses 0.10 points [0.05, 0.15] (limit 0.2).",
        ),
        (
            result_of(["a", "b"], losses=[-0.4]),
            "✓ Within the limit</b> Of nDCG@10, set: b loses -0.40 points [-0.45, -0.35] (limit 0.2).",
        ),
        (
            result_of(["a", "b", "c"], losses=[0.1, 0.26]),
            "✗ Over the limit</b> Of nDCG@10, set: c loses 0.26 points [0.21, 0.31] (limit 0.2), "
            "b loses 0.10 points [0.05, 0.15] (limit 0.2).",
        ),
        (
            result_of(["a", "b", "c"], losses=[0.1, 0.24], half=0.12),
            "≈ Perhaps over the limit</b> Of nDCG@10, set: "
            "c loses 0.24 points [0.12, 0.36] (limit 0.2, perhaps over the limit), "
            "b loses 0.10 points [-0.02, 0.22] (limit 0.2, cannot tell).",
        ),
        (
            result_of(["a", "b", "c"], losses=[-1, 0.004], half=0.3),
            "≈ Cannot tell</b> Of nDCG@10, set: c loses 0.00 points [-0.30, 0.30] (limit 0.2, cannot tell), "
            "b loses -1.00 points [-1.30, -0.70] (limit 0.2).",
        ),
        (
            result_of(["a", "b"], half=None),
            "≈ Cannot tell</b> Of nDCG@10, set: b loses 0.10 points (limit 0.2, cannot tell).",
        ),
        (result_of(["a", "b"], judged=False), "– Not judged</b>"),
        (
            replace(result_of(["a", "b"]), errors=("line 3: wrong",)),
            "(limit 0.2). 1 lines or measurements failed and are left out.",
        ),
        (result_of(["a"]), "– Nothing to compare</b>"),
    ],
)
def test_the_page_begins_with_which_artifact_keeps_its_limit(evaluation: Evaluation, said: str) -> None:
    page = to_html(evaluation)
    assert said in page
    assert page.index(said) < page.index("<table") < page.index("<svg") < page.index('<details class="about">')


def test_an_interval_that_rests_on_few_queries_is_said_to() -> None:
    said = "It is too narrow where few queries changed their nDCG (b: 9)."
    assert said in to_text(result_of(["a", "b"], changed=9))
    assert "(b: 0)" in to_text(result_of(["a", "b"], changed=0)), "scores changed"
    assert "too narrow" not in to_text(result_of(["a", "b"], changed=10))


def test_the_three_forms_have_the_interval_and_the_verdict() -> None:
    evaluation = result_of(["a", "b"], half=0.2)
    found = to_json(evaluation)
    assert found["verdicts"] == {"a": None, "b": "cannot tell"}
    assert found["artifacts"][1]["quality"]["set"]["interval"] == pytest.approx((-0.1, 0.3))
    page = to_html(evaluation)
    assert page.count("[-0.10, 0.30]") == 5, "said, in the overview, at the bar and on it, among the figures"
    assert '<span class="near">≈ cannot tell</span>' in page


def test_limits_are_those_of_precisions_against_fp32() -> None:
    evaluation = result_of(["a", "b"])
    base, other = evaluation.artifacts
    assert evaluation.limit(base) is None
    assert evaluation.limit(other) == LIMITS["int8"][0]
    assert evaluation.limit(replace(other, kv="int8")) is None, "more than the precision is different"
    assert replace(evaluation, artifacts=(replace(base, scheme="int4"), other)).limit(other) is None
    assert result_of(["a", "b"], judged=False).limit(other) is None


def test_a_query_that_changed_is_shown_with_its_documents_in_the_new_order(tmp_path: Path) -> None:
    Image.new("RGB", (400, 300), "red").save(tmp_path / "p.png")
    documents = ("first before", {"image": tmp_path / "p.png"}, "third", {"image": tmp_path / "gone.png"})
    query = Query("pages, line 3", "who?", documents, (0, 2, 0, 0))
    change = Change("b", query, (0.9, 0.8, 0.3, 0.1), (0.5, 0.7, 0.6, 0.1), (0.63, 1.0), 0.2)
    page = to_html(replace(result_of(["a", "b"]), changes=(change,)))
    block = page[page.index("pages, line 3: nDCG@10 0.630 → 1.000") :]
    block = block[: block.index("</details>")]
    marks = ["who?", "▲ 1", "<img ", "▲ 1", "third", "▼ 2", "first before", "cannot be shown"]
    place = 0
    for mark in marks:
        place = block.index(mark, place) + 1
    assert "No documents changed places." in to_html(result_of(["a", "b"]))
    assert to_json(replace(result_of(["a", "b"]), changes=(change,))) == to_json(result_of(["a", "b"]))
