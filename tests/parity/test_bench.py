"""Workloads are exactly as large as they say, ratios are what a clock says, and every command runs.

What the figures are is nobody's business here: machines differ.
"""

import json
import sys
from functools import partial
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest
from click.testing import CliRunner, Result

from m0kit import Reranker
from m0kit.prompt import PromptBuilder
from m0kit_export.export import export_artifact
from m0kit_parity import bench, checkpoints
from m0kit_parity.plot import lines


@pytest.mark.parametrize("num_tokens", [64, 65, 67, 128, 256, 601, 1024, 4096])
def test_a_text_makes_a_prompt_of_exactly_the_length_asked_for(num_tokens: int, prompts: PromptBuilder) -> None:
    for seed in range(3):
        text = bench.text_of(prompts, num_tokens, seed)
        assert len(prompts.build(bench.QUERY, text).token_ids) == num_tokens
    assert bench.text_of(prompts, num_tokens, 0) != text


def test_a_prompt_too_short_for_its_headers_is_refused(prompts: PromptBuilder) -> None:
    with pytest.raises(ValueError, match="at least, not 5"):
        bench.text_of(prompts, 5)


@pytest.mark.parametrize("visual_tokens", [4, 48, 96, 192, 384, 767, 768])
def test_a_page_makes_exactly_the_visual_tokens_asked_for(visual_tokens: int, tiny_artifact: Path) -> None:
    reranker = Reranker.load(tiny_artifact, threads=1)
    trace_grid = reranker.trace((bench.QUERY, bench.page_of(visual_tokens))).grid_thw
    assert trace_grid.prod() == 4 * visual_tokens
    assert bench.page_of(visual_tokens, 1) != bench.page_of(visual_tokens)


@pytest.mark.parametrize("prompts", ["real"], indirect=True)  # the headers alone fill 24 tokens of the small one
def test_workloads_are_those_that_are_promised(prompts: PromptBuilder) -> None:
    loads = bench.workloads(prompts)
    assert {name: len(load) for name, load in loads.items()} == {
        "text, 64 tokens": 1,
        "text, 256 tokens": 1,
        "text, 1024 tokens": 1,
        "page, 768 visual tokens": 1,
        "8 texts, 24–600 tokens": 8,
        "32 texts, 24–600 tokens": 32,
    }
    for load in list(loads.values())[4:]:
        lengths = [len(prompts.build(*pair).token_ids) for pair in load]
        assert len(set(lengths)) > len(lengths) // 2
        assert 24 <= min(lengths) <= max(lengths) <= 600


def test_sides_take_turns_and_the_first_turn_does_not_count() -> None:
    calls: list[str] = []

    def clock() -> float:
        """On which our n-th call takes n seconds, theirs 10·n, and nothing else takes time."""
        return float(sum((i // 2 + 1) * (10 if call == "theirs" else 1) for i, call in enumerate(calls)))

    sides = {name: partial(calls.append, name) for name in ("ours", "theirs")}
    times = bench.take_turns(sides, 3, clock, rest=0)
    assert calls == ["ours", "theirs"] * 4
    assert times == {"ours": [2, 3, 4], "theirs": [20, 30, 40]}


def test_a_ratio_is_the_median_over_turns() -> None:
    ours, theirs = bench.compare("x", {"ours": [1.0, 2.0, 1.0], "theirs": [2.0, 2.0, 3.0]}, "theirs")
    assert (ours.seconds, ours.ratio, ours.low, ours.high) == (1.0, 2.0, 1.0, 3.0)
    assert (theirs.seconds, theirs.ratio, theirs.low, theirs.high) == (2.0, 1.0, 1.0, 1.0)


def test_columns_line_up() -> None:
    assert bench.table([["name", "s"], ["a", "12.5"]]) == "name     s\na     12.5"


def test_charts_are_stacked_in_one_well_formed_file(tmp_path: Path) -> None:
    charts = [lines({"a & b": [(0, 1), (1, 2)]}, "x", "y"), lines({"c": [(0, 1)]}, "x", "y")]
    bench.write_plot(tmp_path / "p.svg", charts)
    root = ET.parse(tmp_path / "p.svg").getroot()
    inner = [e for e in root if e.tag.endswith("svg")]
    tops = [float(e.attrib["y"]) for e in inner]
    assert len(inner) == 2
    assert tops[1] >= tops[0] + float(inner[0].attrib["height"])
    text = (tmp_path / "p.svg").read_text()
    assert "var(" not in text, "few viewers of SVG files know variables"


def test_the_range_of_sizes_doubles_and_ends_where_it_should() -> None:
    assert bench._doubling(64, 300) == [64, 128, 256, 300]
    assert bench._doubling(64, 64) == [64]


def invoke(*arguments: object) -> Result:
    done = CliRunner().invoke(bench.bench, [str(a) for a in arguments], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done


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


def test_ranking_is_measured_beside_bm25_and_chance(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from m0kit_parity.small import evaluate

    read = evaluate.read_set
    monkeypatch.setattr(evaluate, "read_set", lambda folder, kind: read(folder, kind)[:3])
    export_artifact(small, tmp_path / "a", progress=False)
    done = json.loads(invoke("ranking", tmp_path / "a", "--threads", 1, "--json").stdout)
    assert set(done) == set(evaluate.KINDS)
    assert done["text"]["m0kit"] > done["text"]["chance"]
    assert invoke("ranking", tmp_path / "a", "--threads", 1).stdout.startswith("nDCG@10")


def test_pairs_compares_both_sides(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the tiny shape and vocabulary, because the wide one takes a minute to write."""
    write = checkpoints.write_checkpoint
    loads = {f"text, {n} tokens": [(bench.QUERY, f"a text, {n}")] for n in (64, 256)}
    monkeypatch.setattr(bench, "workloads", lambda _prompts: loads)
    monkeypatch.setattr(checkpoints, "write_checkpoint", lambda folder, _shape, **_options: write(folder, "tiny"))
    options = ("--repeats", 1, "--only", "64 tokens", "--threads", 1, "--precision", "int8", "--precision", "fp32")
    done = json.loads(invoke("pairs", *options, "--json").stdout)
    sides = {r["side"]: r for r in done["results"]}
    assert list(sides) == ["int8", "fp32", "transformers fp32"]
    assert {r["workload"] for r in done["results"]} == {"text, 64 tokens"}
    for result in sides.values():
        assert result["ratio"] == pytest.approx(sides["transformers fp32"]["seconds"] / result["seconds"])
    assert done["about"]["repeats"] == 1


def test_the_peers_are_those_there_are() -> None:
    from m0kit_parity.peers import NAMES

    assert bench.PEERS == NAMES
