"""The page says what was measured where, and what is known is not measured again."""

import json
from pathlib import Path
from typing import Any

import pytest

from m0kit_parity.figures.page import Measured, Page

ABOUT: dict[str, Any] = {
    "cpu": "A CPU", "features": ["avx2"], "cores": 2, "memory": 24 * 10**9, "m0kit": "0.1.0", "onnxruntime": "1.32.0",
    "threads": 2, "quick": False,
}  # fmt: skip
TEXTS = {"a": ("First", "What it is."), "b": ("Second", "What that is.")}


def page_with(folder: Path, **about: Any) -> Page:
    page = Page.read(folder)
    page.figures["a"] = Measured({**ABOUT, **about}, "2026-01-02", [[["x", "s"], ["1", "2.5"]], "A sentence."])
    page.write(TEXTS)
    return Page.read(folder)


def test_each_table_stands_with_version_machine_and_date(tmp_path: Path) -> None:
    page_with(tmp_path)
    text = (tmp_path / "figures.md").read_text("utf-8")
    assert text.startswith("# Figures\n\nThis page is made by `make figures`")
    assert "## First\n\nWhat it is.\n\n| x | s |\n| --- | --- |\n| 1 | 2.5 |\n\nA sentence.\n\n*m0kit 0.1.0; " in text
    assert "onnxruntime 1.32.0; A CPU; avx2; 2 cores; 24 GB; 2 threads; 2026-01-02*" in text
    assert "## Second\n\nWhat that is.\n\nNot measured yet." in text


@pytest.mark.parametrize(
    ("kept", "asked", "known"),
    [
        ({}, {}, True),
        ({}, {"quick": True}, True),
        ({"quick": True}, {"quick": True}, True),
        ({"quick": True}, {}, False),
        ({}, {"m0kit": "0.2.0"}, False),
        ({}, {"cpu": "Another"}, False),
        ({}, {"threads": 4, "quick": True}, False),
    ],
)
def test_a_figure_is_known_for_its_version_and_machine(
    kept: dict[str, Any], asked: dict[str, Any], known: bool, tmp_path: Path
) -> None:
    page = page_with(tmp_path, **kept)
    assert page.has("a", {**ABOUT, **asked}) is known
    assert not page.has("b", {**ABOUT, **asked})


def test_a_figure_without_its_plot_is_not_known(tmp_path: Path) -> None:
    page = page_with(tmp_path)
    page.figures["a"] = Measured(ABOUT, "2026-01-02", [], ["a.svg"])
    assert not page.has("a", ABOUT)
    (tmp_path / "a.svg").touch()
    assert page.has("a", ABOUT)
    page.write(TEXTS)
    assert "![plot](a.svg)" in (tmp_path / "figures.md").read_text("utf-8")


def test_what_is_no_longer_published_goes(tmp_path: Path) -> None:
    page = page_with(tmp_path)
    page.write({"b": TEXTS["b"]})
    assert json.loads((tmp_path / "figures.json").read_text("utf-8")) == {}
