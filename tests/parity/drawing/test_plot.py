"""Charts are well-formed, escape every text, and put values where they belong."""

import re
from itertools import pairwise
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
        plot.strips({NASTY: [plot.Mark(0.5, 0, NASTY)]}, NASTY, 1e-3, 10, 1),
        plot.scatter([plot.Mark(0.5, 0.5, NASTY)], NASTY, NASTY),
        plot.lines({NASTY: [(0, 1), (1, 2)]}, NASTY, NASTY),
    ],
    ids=["strips", "scatter", "lines"],
)
def test_every_text_is_escaped_and_comes_back_whole(svg: str) -> None:
    root = ET.fromstring(svg)  # well-formed, or this raises
    assert NASTY in {e.text for e in root.iter()}
    assert "<b" not in svg
    assert not [e for e in root.iter() if e.tag not in {SVG + t for t in ("svg", "title", "text", "line", "circle",
                                                                          "polyline")}]  # fmt: skip


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


def test_strips_share_one_log_axis_with_the_limit_in_its_place() -> None:
    svg = plot.strips({"a": [plot.Mark(0.01, 0, "")], "b": [plot.Mark(1, 0, "")], "c": [plot.Mark(100, 0, "")]},
                      "share", 1e-4, 1e4, 1)  # fmt: skip
    (a, _), (b, _), (c, _) = dots(svg)
    assert b - a == pytest.approx(c - b, abs=0.2)
    limit = next(e for e in ET.fromstring(svg).iter(f"{SVG}line") if e.attrib["stroke"] == "var(--fail)")
    assert float(limit.attrib["x1"]) == pytest.approx(b, abs=0.2)


def test_zero_and_infinity_sit_on_the_edges_of_a_log_axis() -> None:
    marks = [plot.Mark(x, 0, "") for x in (0, 1e-9, 1e-4, 1e4, float("inf"), float("nan"))]
    xs = [x for x, _ in dots(plot.strips({"a": marks}, "share", 1e-4, 1e4, 1))]
    assert xs[0] == xs[1] == xs[2] < xs[3] == xs[4] == xs[5]


def test_equal_scores_lie_on_the_diagonal_of_a_scatter() -> None:
    svg = plot.scatter([plot.Mark(v, v, "") for v in (0.1, 0.5, 0.9)], "x", "y")
    diagonal = next(e for e in ET.fromstring(svg).iter(f"{SVG}line") if "stroke-dasharray" in e.attrib)
    x1, y1, x2, y2 = (float(diagonal.attrib[k]) for k in ("x1", "y1", "x2", "y2"))
    for x, y in dots(svg):
        assert y == pytest.approx(y1 + (x - x1) * (y2 - y1) / (x2 - x1), abs=0.2)


@pytest.mark.parametrize(("low", "high"), [(0, 1), (0, 27), (3, 3), (-4, 2), (0, 1e-7), (128, 10240)])
def test_ticks_are_few_round_and_inside(low: float, high: float) -> None:
    ticks = plot._ticks(low, high)
    assert 1 <= len(ticks) <= 11
    assert all(low - 1e-9 <= tick <= high + 1e-9 for tick in ticks)
    assert all(len(f"{tick:g}") <= 7 for tick in ticks)


def test_charts_are_stacked_in_one_well_formed_file(tmp_path: Path) -> None:
    charts = [plot.lines({"a & b": [(0, 1), (1, 2)]}, "x", "y"), plot.lines({"c": [(0, 1)]}, "x", "y")]
    plot.write_plot(tmp_path / "p.svg", charts)
    root = ET.parse(tmp_path / "p.svg").getroot()
    inner = [e for e in root if e.tag.endswith("svg")]
    tops = [float(e.attrib["y"]) for e in inner]
    assert len(inner) == 2
    assert tops[1] >= tops[0] + float(inner[0].attrib["height"])
    text = (tmp_path / "p.svg").read_text()
    assert "var(" not in text, "few viewers of SVG files know variables"
