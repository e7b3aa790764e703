"""Every size is measured, and one that fails is a row. What the figures are is nobody's business here."""

import json
import re
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import pytest
from click.testing import CliRunner
from tests.parity.bench.running import invoke

from m0kit.errors import M0kitError
from m0kit_parity.bench import growth
from m0kit_parity.bench.commands import bench


def test_growth_measures_every_size(tiny_artifact: Path, tmp_path: Path) -> None:
    sizes = ("--repeats", 1, "--max-tokens", 128, "--max-visual-tokens", 96, "--threads", 1)
    plot = tmp_path / "g.svg"
    done = json.loads(invoke("growth", tiny_artifact, *sizes, "--plot", plot, "--json").stdout)
    assert {kind: list(points) for kind, points in done["seconds"].items()} == {
        "pairs of 128 tokens": ["1", "2", "4", "8", "16", "32"],
        "tokens of a text pair": ["64", "128"],
        "visual tokens of a page": ["48", "96"],
    }
    assert all(seconds > 0 for points in done["seconds"].values() for seconds in points.values())
    assert done["about"]["threads"] == 1
    ET.parse(plot)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_measures_every_size_in_a_process_of_its_own(tiny_artifact: Path) -> None:
    sizes = ("--max-tokens", 256, "--max-visual-tokens", 192, "--threads", 1)
    done = json.loads(invoke("memory", tiny_artifact, *sizes, "--json").stdout)
    for points in (done["mebibytes"]["text"]["256"], done["mebibytes"]["page"]["192"]):
        assert 0 < points["loaded"] <= points["peak"]
        assert 0 < points["private"] <= points["peak"]
        assert points["seconds"] > 0


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_size_whose_process_crashes_is_a_row(tiny_artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ask = growth.measure_memory

    def crash(artifact: Path, pairs: list[Any], *options: Any) -> Any:
        if isinstance(pairs[0][1], bytes):
            raise M0kitError(f"{artifact}: the process measuring memory was ended by SIGKILL.")
        return ask(artifact, pairs, *options)

    monkeypatch.setattr(growth, "measure_memory", crash)
    words = ["memory", str(tiny_artifact), "--max-tokens", "256", "--max-visual-tokens", "192", "--threads", "1"]
    done = CliRunner().invoke(bench, [*words, "--json"])
    assert done.exit_code == 3, done.output
    facts = json.loads(done.stdout)
    assert facts["mebibytes"]["text"]["256"]["peak"] > 0
    assert facts["mebibytes"]["page"] == {}
    assert "SIGKILL" in facts["failed"]["page"]["192"]
    done = CliRunner().invoke(bench, words)
    assert done.exit_code == 3
    assert re.search(r"^192( +failed){4}$", done.stdout, re.MULTILINE)
