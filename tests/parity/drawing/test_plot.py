"""Charts are well-formed, escape every text, and put values where they belong."""

import re
from itertools import combinations, pairwise
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest

from m0kit_parity.drawing import plot

NASTY = "<b onclick='x'>&\"]]>"
SVG = "{http://www.w3.org/2000/svg}"


def points(svg: str) -> list[list[tuple[float, float]]]:
    found = ET.fromstring(svg).iter(f"{SVG}polyline")
    return [[(float(x), float(y)) for x, y in (p.split(",") for p in e.attrib["points"].split())] for e in found]


def dots(svg: str) -> list[tuple[float, float]]:
    return [(float(e.attrib["cx"]), float(e.attrib["cy"])) for e in ET.fromstring(svg).iter(f"{SVG}circle")]


def texts(svg: str) -> list[str]:
    return [e.text or "" for e in ET.fromstring(svg).iter(f"{SVG}text")]


@pytest.mark.parametrize(
    "svg",
    [
        plot.shares({NASTY: [plot.Mark(0.5, 0, NASTY)]}, NASTY),
        plot.bars([plot.Bar(NASTY, 1, NASTY, 2, {NASTY: 1}, (0, 2))], NASTY),
        plot.scatter([plot.Mark(0.5, 0.5, NASTY)], NASTY, NASTY),
        plot.lines({NASTY: [(0, 1), (1, 2)]}, NASTY, NASTY),
    ],
    ids=["shares", "bars", "scatter", "lines"],
)
def test_every_text_is_escaped_and_comes_back_whole(svg: str) -> None:
    root = ET.fromstring(svg)  # well-formed, or this raises
    assert NASTY in {e.text for e in root.iter()}
    assert "<b" not in svg
    known = ("svg", "title", "text", "line", "circle", "rect", "polyline")
    assert {e.tag for e in root.iter()} <= {SVG + name for name in known}


@pytest.mark.parametrize("log_y", [False, True])
def test_a_chart_needs_nothing_from_outside(log_y: bool) -> None:
    svg = plot.lines({"a": [(0, 1e-6), (1, 1e-3)]}, "x", "y", log_y=log_y)
    assert not re.search(r"href|src=|url\(|<script|<style|@import", svg)


def test_equal_factors_are_equal_distances_on_a_log_axis() -> None:
    svg = plot.lines({"a": [(0, 1e-6), (1, 1e-5), (2, 1e-4), (3, 1e-3)]}, "x", "y", log_y=True)
    ((_, *_), *_) = (line,) = points(svg)
    steps = [a[1] - b[1] for a, b in pairwise(line)]
    assert all(step == pytest.approx(steps[0], abs=0.2) and step > 0 for step in steps)
    assert {"10⁻⁶", "10⁻³"} <= set(texts(svg))


def test_equal_differences_are_equal_distances_on_a_plain_axis() -> None:
    (line,) = points(plot.lines({"a": [(0, 0), (10, 5), (20, 10)]}, "x", "y"))
    assert line[1][0] - line[0][0] == pytest.approx(line[2][0] - line[1][0], abs=0.2)
    assert line[0][1] - line[1][1] == pytest.approx(line[1][1] - line[2][1], abs=0.2)
    assert line[0][1] > line[2][1]


def test_shares_lie_on_one_plain_axis_with_the_limit_in_view() -> None:
    svg = plot.shares({name: [plot.Mark(x, 0, "")] for name, x in (("a", 0), ("b", 0.5), ("c", 1))}, "share")
    (a, _), (b, _), (c, _) = dots(svg)
    assert b - a == pytest.approx(c - b, abs=0.2)
    assert limits(svg) == [pytest.approx(c, abs=0.2)]
    few = plot.shares({"a": [plot.Mark(0.001, 0, "")]}, "share")
    assert limits(few) == limits(svg), "whatever is drawn, the axis is the same"
    assert {"0 %", "100 %"} <= set(texts(few))


def limits(svg: str) -> list[float]:
    """Where the lines of limits cross the axis."""
    found = (e for e in ET.fromstring(svg).iter(f"{SVG}line") if e.attrib["stroke"] == "var(--fail)")
    return [float(e.attrib["x1"]) for e in found]


def test_what_is_beyond_the_axis_or_no_number_sits_on_its_edge() -> None:
    marks = [plot.Mark(x, 0, "") for x in (0, 1.5, 1e4, float("inf"), float("nan"))]
    xs = [x for x, _ in dots(plot.shares({"a": marks}, "share"))]
    assert xs[0] < xs[1] == xs[2] == xs[3] == xs[4]


def test_a_verdict_has_a_form_besides_its_colour() -> None:
    svg = plot.scatter([plot.Mark(0.5, 0.5, "", style) for style in ("pass", "near", "fail")], "x", "y")
    forms = [e.tag.removeprefix(SVG) for e in ET.fromstring(svg) if e.find(f"{SVG}title") is not None]
    assert forms == ["circle", "rect", "polygon"]


def test_bars_begin_at_zero_and_what_is_small_looks_small() -> None:
    rows = [plot.Bar("gained", -0.01, "-0.01", 0.2), plot.Bar("lost", 0.02, "0.02", 1.0), plot.Bar("none", None, "–")]
    svg = plot.bars(rows, "points", least=1.0)
    gained, lost = ((float(e.attrib["x"]), float(e.attrib["width"])) for e in ET.fromstring(svg).iter(f"{SVG}rect"))
    assert gained[0] + gained[1] == pytest.approx(lost[0], abs=0.2), "both at zero"
    assert lost[1] == pytest.approx(2 * gained[1], abs=0.3)
    assert lost[1] < plot.WIDTH / 20
    near, far = limits(svg)
    assert far - lost[0] == pytest.approx(5 * (near - lost[0]), abs=0.5)
    assert "0" in texts(svg)


def test_an_interval_is_drawn_from_end_to_end_and_the_axis_has_room_for_it() -> None:
    svg = plot.bars([plot.Bar("a", 1, "1", 2, interval=(-1, 3)), plot.Bar("b", 1, "1")], "points")
    (whisker,) = points(svg)
    (zero, width), _ = ((float(e.attrib["x"]), float(e.attrib["width"])) for e in ET.fromstring(svg).iter(f"{SVG}rect"))
    across = [x for x, _ in whisker]
    assert min(across) == pytest.approx(zero - width, abs=0.2)
    assert max(across) == pytest.approx(zero + 3 * width, abs=0.3)
    assert all(16 <= x <= plot.WIDTH - plot.RIGHT for x in across)


def test_no_label_meets_another() -> None:
    names = [f"an artifact with a rather long name, number {i}" * 3 for i in range(9)]
    charts = [
        plot.bars([plot.Bar(name, 0.5, "-0.47 [-10.20, 10.35]", 1.0) for name in names], "points of nDCG@10 lost"),
        plot.shares({name: [plot.Mark(0.1, 0, "")] for name in names}, "share of tolerance"),
        plot.lines({name[:60]: [(64, 1), (10_240, 12_000)] for name in names}, "tokens", "MiB", limit=7_000),
        plot.scatter([], "x", "y"),
    ]
    for svg in charts:
        boxes = []
        for text in ET.fromstring(svg).iter(f"{SVG}text"):
            x, y, width = float(text.attrib["x"]), float(text.attrib["y"]), 8 * len(text.text or "")
            x -= {"end": width, "middle": width / 2}.get(text.attrib.get("text-anchor", ""), 0)
            boxes.append((x, x + width, y))
        for a, b in combinations(boxes, 2):
            assert a[1] <= b[0] or b[1] <= a[0] or abs(a[2] - b[2]) >= 13, (a, b)


def test_a_limit_is_in_view_however_far_the_lines_are_below() -> None:
    root = ET.fromstring(plot.lines({"a": [(0, 1e-7), (1, 2e-7)]}, "x", "y", log_y=True, limit=1e-4))
    (y,) = (float(e.attrib["y1"]) for e in root.iter(f"{SVG}line") if e.attrib["stroke"] == "var(--fail)")
    assert y < min(y for line in points(ET.tostring(root, "unicode")) for _, y in line) - 100


def test_charts_stand_one_below_the_other_in_a_file_of_their_own(tmp_path: Path) -> None:
    chart = plot.lines({"a": [(0, 1), (1, 2)]}, "x", "y")
    plot.write_plot(tmp_path / "two.svg", [chart, chart])
    whole = (tmp_path / "two.svg").read_text("utf-8")
    first, second = (float(e.attrib["y"]) for e in ET.fromstring(whole) if e.tag == f"{SVG}svg")
    assert second - first > float(ET.fromstring(chart).attrib["viewBox"].split()[3])
    assert "var(" not in whole
    assert sorted(tmp_path.iterdir()) == [tmp_path / "two.svg"]


def test_equal_scores_lie_on_the_diagonal_of_a_scatter() -> None:
    svg = plot.scatter([plot.Mark(v, v, "") for v in (0.1, 0.5, 0.9)], "x", "y")
    diagonal = next(e for e in ET.fromstring(svg).iter(f"{SVG}line") if "stroke-dasharray" in e.attrib)
    x1, y1, x2, y2 = (float(diagonal.attrib[k]) for k in ("x1", "y1", "x2", "y2"))
    for x, y in dots(svg):
        assert y == pytest.approx(y1 + (x - x1) * (y2 - y1) / (x2 - x1), abs=0.2)


@pytest.mark.parametrize(("low", "high"), [(0, 1), (0, 27), (3, 3), (-4, 2), (0, 1e-7), (128, 10240)])
def test_ticks_are_few_round_and_inside(low: float, high: float) -> None:
    ticks = plot.ticks(low, high)
    assert 1 <= len(ticks) <= 11
    assert all(low - 1e-9 <= tick <= high + 1e-9 for tick in ticks)
    assert all(len(f"{tick:g}") <= 7 for tick in ticks)
