"""A check sees what the artifact does, and its three forms say the same."""

import dataclasses
import html.parser
import json
import math
import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import numpy as np
import pytest

from m0kit import plain
from m0kit.cli.page import Contents
from m0kit.config import DecoderConfig, ImageConfig, ModelConfig, PromptConfig, VisionConfig
from m0kit.errors import ArtifactError, DeviceError, InputError
from m0kit.trace import Trace
from m0kit_parity.drawing import plot
from m0kit_parity.proof.cases import Case, Content, Group, Published, draw_page, encode, text_content
from m0kit_parity.proof.compare import Verdict
from m0kit_parity.proof.golden import Golden, record
from m0kit_parity.proof.render import to_html, to_json, to_text
from m0kit_parity.proof.report import Report, check, check_published
from m0kit_quant.rotate import spread

MODEL = ModelConfig(
    DecoderConfig(32, 2, 2, 1, 16, 64, 1e-6, 1e6, (2, 3, 3), 512, 1024),
    VisionConfig(2, 32, 2, 64, 3, 14, 2, 2, 1e-6, 1e4),
    ImageConfig(3136, 602112, (0.5, 0.5, 0.5), (0.3, 0.3, 0.3), 1 / 255, 14, 2, 2),
    PromptConfig(500, 501, 502),
)
NORM = np.linspace(0.5, 2, 32, dtype=np.float32)  # the gain of the final one
NASTY = "<script>alert('x')</script> & \"quotes\""
PAGE = Content("file", encode(draw_page(["page"], (56, 56))))
CASES = (
    Case(
        "texts",
        f"because {NASTY}",
        "text-text",
        False,
        (Group(text_content(NASTY), (text_content("0.7"), text_content("0.69985"), text_content("0.1"))),),
    ),
    Case("pages", "pictures", "text-image", False, (Group(text_content("0.4"), (PAGE,)),)),
)


class Fake:
    """A text document is its own score; `change` is applied to what comes out."""

    def __init__(self, change: Any = lambda trace, _pair: trace) -> None:
        self.change = change

    def trace(self, pair: tuple[Any, Any], layers: bool = False) -> Trace:
        images = sum(not isinstance(content, str) for content in pair)
        score = float(pair[1]) if isinstance(pair[1], str) else 0.4
        trace = Trace(
            token_ids=np.arange(9),
            positions=np.arange(27).reshape(3, 9),
            grid_thw=np.array([[1, 2, 2]] * images, dtype=np.int64).reshape(images, 3),
            patches=tuple(np.ones((4, 1176), np.float32) for _ in range(images)),
            image_embeds=tuple(np.ones((1, 32), np.float32) for _ in range(images)),
            hidden=np.ones(32, np.float32),
            logit=2.65 + math.log(score / (1 - score)),
            score=score,
            layers=np.ones((2, 32), np.float32) if layers else None,
        )
        return self.change(trace, pair)


@pytest.fixture
def golden(tmp_path: Path) -> Golden:
    record(
        tmp_path / "golden",
        CASES,
        Fake(),
        model=MODEL,
        command="m0kit parity record x",
        provenance={},
        norm=NORM,
        layers=True,
    )
    return Golden.open(tmp_path / "golden")


def run(golden: Golden, change: Any = lambda trace, _pair: trace, **options: Any) -> Report:
    return check(golden, Fake(change), options.pop("precision", "fp32"), {"artifact": f"here {NASTY}"}, **options)


def in_another_basis(trace: Trace, _pair: Any) -> Trace:
    """As an artifact with `rotate` in its recipe gives it: hidden states without the gain of the final norm."""
    turn = lambda rows: spread(rows.T, 32).T.astype(np.float32)  # noqa: E731
    return dataclasses.replace(
        trace,
        image_embeds=tuple(map(turn, trace.image_embeds)),
        hidden=turn(trace.hidden[None] / NORM)[0],
        layers=turn(trace.layers),
    )


def test_what_comes_in_another_basis_is_turned_back(golden: Golden) -> None:
    report = run(golden, in_another_basis, layers=True, rotated=True)
    assert report.verdict is Verdict.PASS
    assert {s.stage for case in report.cases for s in case.stages} >= {"image_embeds", "layers", "hidden"}
    failed = {
        s.stage for case in run(golden, in_another_basis, layers=True).cases for s in case.stages if s.value > 1e-4
    }
    assert failed == {"image_embeds", "layers", "hidden"}


def with_score(trace: Trace, score: float) -> Trace:
    return dataclasses.replace(trace, score=score, logit=2.65 + math.log(score / (1 - score)))


def swap_close(trace: Trace, pair: Any) -> Trace:
    """0.7 and 0.69985 change places, each within its own tolerance."""
    return with_score(trace, {0.7: 0.69992, 0.69985: 0.69993}.get(trace.score, trace.score))


def swap_far(trace: Trace, pair: Any) -> Trace:
    return with_score(trace, {0.1: 0.9}.get(trace.score, trace.score))


def test_an_equal_artifact_passes(golden: Golden) -> None:
    report = run(golden)
    assert report.verdict is Verdict.PASS
    assert [case.verdict for case in report.cases] == [Verdict.PASS, Verdict.PASS]
    assert {s.share for case in report.cases for s in case.stages} == {0.0}


@pytest.mark.parametrize(("off", "verdict"), [(0.0, Verdict.PASS), (0.1, Verdict.FAIL)])
def test_the_portable_image_encoder_is_held_against_the_same_reference(
    golden: Golden, off: float, verdict: Verdict
) -> None:
    report = run(golden, portable=lambda trace: [embeds + np.float32(off) for embeds in trace.image_embeds])
    texts, pages = report.cases
    assert (report.verdict, pages.verdict, texts.verdict) == (verdict, verdict, Verdict.PASS)
    found = pages.worst("portable_embeds")
    assert found is not None
    assert found.verdict is verdict
    assert texts.worst("portable_embeds") is None
    assert "portable_embeds" in to_text(report)
    assert run(golden).cases[1].worst("portable_embeds") is None


@pytest.mark.parametrize("field", ["token_ids", "positions", "grid_thw", "hidden"])
def test_a_damaged_stage_fails_the_check_and_is_found_by_name(golden: Golden, field: str) -> None:
    report = run(golden, lambda trace, _pair: dataclasses.replace(trace, **{field: getattr(trace, field) + 1}))
    assert report.verdict is Verdict.FAIL
    assert f"fail: texts, query 0, document 2: {field}: " in to_text(report) or field == "grid_thw"
    assert f"fail: pages, query 0, document 0: {field}: " in to_text(report)


def test_a_swap_of_close_documents_is_a_near_tie_and_one_of_far_ones_a_failure(golden: Golden) -> None:
    near = run(golden, swap_close)
    assert near.verdict is Verdict.NEAR_TIE
    assert near.cases[0].rankings[0].order == (1, 0, 2)
    assert "near-tie: texts, query 0: ranking: document 1 is placed before document 0" in to_text(near)
    assert to_text(near).endswith("verdict: near-tie")
    far = run(golden, swap_far)
    assert far.cases[0].rankings[0].stage.verdict is Verdict.FAIL


def test_a_refused_pair_is_a_failure_of_that_pair_and_the_check_goes_on(golden: Golden) -> None:
    def refuse(trace: Trace, pair: Any) -> Trace:
        if pair[1] == "0.1":
            raise InputError("too odd")
        return trace

    report = run(golden, refuse)
    assert report.verdict is Verdict.FAIL
    assert [pair.score for pair in report.cases[0].pairs] == [0.7, 0.69985, None]
    assert report.cases[0].rankings[0].stage.verdict is Verdict.FAIL
    assert report.cases[1].verdict is Verdict.PASS
    assert "the artifact refused this pair: too odd" in to_text(report)
    plain.to_json(to_json(report))
    to_html(report)


def test_other_errors_of_the_runtime_pass_through(golden: Golden) -> None:
    def gone(trace: Trace, pair: Any) -> Trace:
        raise DeviceError("no such device")

    with pytest.raises(DeviceError):
        run(golden, gone)


def test_inputs_that_decode_differently_here_fail_with_the_reason(golden: Golden) -> None:
    path = golden.folder / "manifest.json"
    path.write_text(re.sub(r'"pixels_sha256": "\w+"', f'"pixels_sha256": "{"0" * 64}"', path.read_text()))
    report = check(Golden.open(golden.folder), Fake(), "fp32", {})
    assert [case.verdict for case in report.cases] == [Verdict.PASS, Verdict.FAIL]
    assert "input_pixels: the document's image is decoded to other pixels" in to_text(report)


def test_cases_can_be_chosen_and_layers_asked_for(golden: Golden) -> None:
    report = run(golden, names=["pages"], layers=True)
    assert [case.name for case in report.cases] == ["pages"]
    assert report.cases[0].worst("layers") is not None
    assert run(golden).cases[0].worst("layers") is None
    with pytest.raises(InputError, match="it holds texts, pages"):
        run(golden, names=["nope"])


def test_a_precision_without_tolerances_is_refused(golden: Golden) -> None:
    with pytest.raises(ArtifactError, match="int3"):
        run(golden, precision="int3")


def test_half_precision_is_held_to_its_own_limits(golden: Golden) -> None:
    def shift(trace: Trace, pair: Any) -> Trace:
        return with_score(trace, trace.score + 2e-3)

    assert run(golden, shift).verdict is Verdict.FAIL
    assert run(golden, shift, precision="fp16").verdict is Verdict.PASS


def test_the_table_shows_the_share_of_each_tolerance(golden: Golden) -> None:
    def half(trace: Trace, pair: Any) -> Trace:
        return dataclasses.replace(trace, logit=trace.logit + 2e-4, hidden=trace.hidden + np.float32(3e-4))

    lines = to_text(run(golden, half)).splitlines()
    columns = re.split(r"\s{2,}", lines[0])
    texts = dict(zip(columns, re.split(r"\s{2,}", lines[2]), strict=True))
    assert texts["logit"] == "50 %"
    assert texts["hidden"] == "300 % !"
    assert texts["token_ids"] == "exact"
    assert texts["patches"] == "–"
    assert texts["verdict"] == "fail"
    assert "≤ 1e-4 rel" in lines[1]


def test_the_json_is_strict_and_complete(golden: Golden) -> None:
    report = run(golden, lambda t, _: dataclasses.replace(t, score=math.nan), layers=True)
    tree = json.loads(plain.to_json(to_json(report)), parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert tree["verdict"] == "fail"
    assert tree["artifact"] == f"here {NASTY}"
    assert tree["tolerances"]["score"] == {
        "measure": "absolute",
        "limit": 1e-4,
        "why": report.table["score"].why,
    }
    pair = tree["cases"][0]["pairs"][0]
    assert (pair["reference_score"], pair["score"], pair["layer_profile"]) == (0.7, None, [0.0, 0.0])
    assert {s["stage"]: s["verdict"] for s in pair["stages"]}["score"] == "fail"
    assert tree["cases"][0]["rankings"][0]["reference_order"] == [0, 1, 2]


class Balance(html.parser.HTMLParser):
    """Opens and closes of elements, and everything that could fetch or run something."""

    void = frozenset(["meta", "br"])

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.attributes: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}
        if tag not in self.void:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


@pytest.mark.parametrize("change", [lambda t, _: t, swap_close, swap_far])
def test_the_page_is_well_formed_self_contained_and_escaped(golden: Golden, change: Any) -> None:
    report = run(golden, change, layers=True)
    page = to_html(report)
    parser = Balance()
    parser.feed(page)
    parser.close()
    assert parser.open == []
    assert not parser.tags & {"script", "link", "img", "iframe", "object", "base"}
    assert not parser.attributes & {"src", "href", "onload", "onclick", "style"}
    assert "url(" not in page
    assert "@import" not in page
    assert "<script" not in page
    assert "&lt;script&gt;" in page
    assert page.count("<svg") == 3
    assert "prefers-color-scheme: dark" in page
    assert f" {report.verdict.value}</b>" in page[: page.index("</p>")], "the verdict is in words, and first"
    for svg in re.findall(r"<svg.*?</svg>", page, re.DOTALL):
        ET.fromstring(svg)


def test_the_page_begins_with_the_verdict_and_ends_with_hashes_that_are_folded(golden: Golden) -> None:
    report = run(golden, swap_far)
    page = to_html(report)
    parts = ('<p class="verdict fail"><b>✗ fail</b> ', "here ", "<ul><li><b>fail</b>", "<h2>Share", "<svg", "<h2>Cases")
    places = [page.index(part) for part in (*parts, "<h2>Tolerances", '<details class="about">')]
    assert places == sorted(places)
    assert "<code>" not in page[: places[-1]]
    assert page.endswith("</tbody></table></div></details></body></html>\n")


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda t, _: t, "All 4 pairs in 2 cases are within tolerance; the closest uses"),
        (swap_close, "All 4 pairs in 2 cases are within tolerance, but in 1 of the rankings documents change places"),
        (swap_far, "1 of 4 pairs in 2 cases are out of tolerance, first logit in texts."),
    ],
)
def test_the_verdict_is_told_in_one_sentence(golden: Golden, change: Any, sentence: str) -> None:
    assert sentence in to_html(run(golden, change))


def test_images_are_shown_where_a_page_is_asked_for(golden: Golden) -> None:
    page = to_html(run(golden, picture=Contents().shown))
    assert page.count("<img ") == 1
    assert len(re.findall(r'<img class="thumbnail" alt="" src="data:image/jpeg;base64,[A-Za-z0-9+/=]+"/>', page)) == 1
    assert "<img" not in to_html(run(golden))


def test_the_scatter_has_one_dot_per_scored_pair_in_the_colour_of_its_verdict(golden: Golden) -> None:
    page = to_html(run(golden, swap_far))
    scatter = page[page.index("<title>score of the artifact against") :]
    dots = re.findall(r'<(?:circle|rect|polygon)[^>]* fill="var\(--(\w+)\)"', scatter[: scatter.index("</svg>")])
    assert dots == ["pass", "pass", "fail", "pass"]


class FakeScorer:
    def __init__(self, scores: dict[str, float]) -> None:
        self.scores = scores

    def score(self, pairs: Any) -> list[float]:
        return [self.scores[document] for _, document in pairs]


def published(scores: dict[str, float]) -> Report:
    documents = (text_content("a"), text_content("b"), text_content("c"))
    group = Published("texts", Group(text_content("q"), documents), (0.6839, 0.4432, 0.4548))
    return check_published([group], FakeScorer(scores), {"artifact": "here"})


def test_published_scores_pass_within_their_noise_and_fail_beyond() -> None:
    assert published({"a": 0.68, "b": 0.45, "c": 0.46}).verdict is Verdict.PASS
    assert published({"a": 0.68, "b": 0.451, "c": 0.449}).verdict is Verdict.NEAR_TIE
    failed = published({"a": 0.70, "b": 0.45, "c": 0.46})
    assert failed.verdict is Verdict.FAIL
    assert "published-1, query 0, document 0: score: 0.0161 of 0.01" in to_text(failed)
    assert to_json(failed)["cases"][0]["pairs"][0]["reference_score"] == 0.6839
    to_html(failed)


@pytest.mark.parametrize(
    "svg",
    [
        plot.shares({}, "share"),
        plot.shares(
            {"<a>": [plot.Mark(math.inf, 0, "&", "fail"), plot.Mark(math.nan, 0, ""), plot.Mark(0, 0, "")]}, "s"
        ),
        plot.bars([], "x"),
        plot.bars([plot.Bar("<a>", None, "–"), plot.Bar("b", -2, "-2", 1.0, {"<": 3.0}), plot.Bar("c", 0, "0")], "x"),
        plot.scatter([], "x", "y"),
        plot.scatter([plot.Mark(-3, 7, "<")], "x", "y"),
        plot.lines({}, "x", "y"),
        plot.lines({"one": [(5, 5)]}, "x", "y"),
        plot.lines({"flat": [(0, 0), (1, 0)]}, "x", "y", log_y=True),
        plot.lines({"a": [(0, 1e-7), (27, 1e-5)], "b": [(0, 0), (27, math.nan)]}, "layer", "y", log_y=True),
        plot.lines({"down": [(1, -4), (2, -1)]}, "x", "y"),
        plot.lines({"low": [(1, 0.1), (2, 0.2)]}, "x", "y", limit=7.0),
    ],
)
def test_charts_survive_odd_values_and_stay_inside_their_box(svg: str) -> None:
    root = ET.fromstring(svg)
    _, _, width, height = map(float, root.attrib["viewBox"].split())
    for element in root.iter():
        for name, bound in (("cx", width), ("cy", height), ("x1", width), ("y1", height), ("x", width)):
            if name in element.attrib:
                assert 0 <= float(element.attrib[name]) <= bound
        for x, y in (point.split(",") for point in element.attrib.get("points", "").split()):
            assert 0 <= float(x) <= width
            assert 0 <= float(y) <= height


def test_a_line_chart_puts_values_where_they_belong() -> None:
    root = ET.fromstring(plot.lines({"a": [(0, 1), (10, 100)]}, "x", "y", log_y=True))
    (points,) = (e.attrib["points"] for e in root.iter() if "points" in e.attrib)
    (x0, y0), (x1, y1) = (map(float, point.split(",")) for point in points.split())
    assert x0 < x1
    assert y0 > y1  # up is larger
