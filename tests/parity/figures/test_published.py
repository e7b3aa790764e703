"""Every figure is made of the benchmarks' own results; here on the tiny checkpoint, where one takes seconds.

What the figures are is nobody's business here: machines differ.
"""

import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from m0kit.precision import SCHEMES
from m0kit_parity.figures import published
from m0kit_parity.figures.workshop import QUICK, WHOLE, Workshop
from m0kit_parity.samples import checkpoints

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")

TINY = replace(
    QUICK, big="tiny", loads=("64 ",), queries=1, drawn=4, calibration=1, cases=("tiny", "image_text"),
    memory=(256, 192), seconds=(64, 48), documents=2, pages=2, tokens=96, asked=2,
)  # fmt: skip
# Heading and first column of a figure's first table.
FIRST = {
    "pairs": (["", "text, 64 tokens"], ["m0kit fp32", "m0kit int8", "m0kit int4", "m0kit nf4", "transformers fp32"]),
    "precisions": (None, ["fp32", "fp16", "bf16", "int8", "int4", "nf4", "fp32, adapter on the embedding"]),
    "depth": (None, ["m0kit int8", "m0kit int4", "transformers fp32"]),
    "quality": (None, [*SCHEMES, *(f"{precision} calibrated" for precision in ("int8", "int4", "nf4"))]),
    "kept": (["kept in", "a token of the published model"], ["fp32", "fp16", "int8"]),
    "reuse": (None, ["text, 96 tokens"] * 3 + ["page, 121 tokens"] * 3),
    "reuse-growth": (None, ["1", "2", "4", "8", "16", "32", "64"]),
    "many": (["200 pairs on 100 documents", "MiB resident"], ["before", "planned", "10 %", "50 %", "100 %"]),
    "small-machine": (None, ["m0kit index add, 24 texts", "m0kit rerank --index"]),
    "memory": (None, ["256"]),
    "growth": (None, ["1", "2", "4", "8", "16", "32"]),
    "parity": (None, ["tiny, 3 decoder layers and 2 vision blocks: random", "small: trained, with its `code` adapter"]),
    "ranking": (["", "text", "across", "code", "pages"], None),
    "answers": (None, None),
    "installed": (["package", "MB"], None),
}


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    return Workshop(tmp_path_factory.mktemp("work"), TINY, 1)


def test_every_figure_has_a_test() -> None:
    assert list(FIRST) == list(published.FIGURES)


# Those of many exports, or of PyTorch.
LONG = ("pairs", "precisions", "depth", "quality", "kept", "reuse", "parity", "answers")


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n in LONG)) for n in FIRST])
def test_a_figure_is_measured(name: str, shop: Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = checkpoints.write_checkpoint
    if name == "pairs":  # full width takes a minute
        monkeypatch.setattr(published, "write_checkpoint", lambda folder, _shape, **_options: write(folder, "tiny"))
        monkeypatch.setattr(published, "PEERS", {})
    if name == "depth":
        monkeypatch.setattr(published, "DEEP", ("64 ",))
    before = set(shop.folder.iterdir())
    parts, plots = published.measure(name, shop, tmp_path)
    heading, first = FIRST[name]
    rows: Any = parts[0]
    assert heading is None or list(rows[0]) == heading
    assert first is None or [row[0] for row in rows[1:]] == first
    assert all(isinstance(cell, str) for part in parts if not isinstance(part, str) for row in part for cell in row)
    assert all(len({len(row) for row in part}) == 1 for part in parts if not isinstance(part, str))
    assert plots == [plot for figure, plot in published.PLOTS.items() if figure == name]
    assert all((tmp_path / plot).read_text().startswith("<svg") for plot in plots)
    left = {path.name for path in set(shop.folder.iterdir()) - before}
    assert all(name.startswith(("big", "small", "massive", "calibration")) for name in left), "the rest is forgotten"


@pytest.mark.parametrize("name", published.FIGURES)
def test_the_page_says_by_which_command_a_figure_is_had(name: str) -> None:
    title, text = published.text_of(name)
    assert title
    assert not title.endswith(".")
    assert re.search(r"`(m0kit|pip|python)", text)
    assert "\n " not in text


def test_a_quick_run_is_smaller_in_everything() -> None:
    assert QUICK.queries is not None
    for name in (
        "layers",
        "repeats",
        "drawn",
        "calibration",
        "documents",
        "pages",
        "tokens",
        "asked",
        "memory",
        "seconds",
    ):
        assert getattr(QUICK, name) < getattr(WHOLE, name), name
