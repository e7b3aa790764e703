"""Workloads are exactly as large as they say, ratios are what a clock says, and every command runs.

What the figures are is nobody's business here: machines differ.
"""

import json
import os
import re
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import pytest
from click.testing import CliRunner, Result

from m0kit import Reranker
from m0kit.errors import DependencyError, M0kitError
from m0kit.scoring.prompt import PromptBuilder
from m0kit_export.export import export_artifact
from m0kit_parity.bench import commands as bench
from m0kit_parity.drawing.plot import lines
from m0kit_parity.samples import checkpoints


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
    timed = {name: bench.timed(run, clock) for name, run in sides.items()}
    times = bench.take_turns(timed, 3, rest=0)
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


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_size_whose_process_crashes_is_a_row(tiny_artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ask = bench.measure_memory

    def crash(artifact: Path, pairs: list[Any], *options: Any) -> Any:
        if isinstance(pairs[0][1], bytes):
            raise M0kitError(f"{artifact}: the process measuring memory was ended by SIGKILL.")
        return ask(artifact, pairs, *options)

    monkeypatch.setattr(bench, "measure_memory", crash)
    words = ["memory", str(tiny_artifact), "--max-tokens", "256", "--max-visual-tokens", "192", "--threads", "1"]
    done = CliRunner().invoke(bench.bench, [*words, "--json"])
    assert done.exit_code == 3, done.output
    facts = json.loads(done.stdout)
    assert facts["mebibytes"]["text"]["256"]["peak"] > 0
    assert facts["mebibytes"]["page"] == {}
    assert "SIGKILL" in facts["failed"]["page"]["192"]
    done = CliRunner().invoke(bench.bench, words)
    assert done.exit_code == 3
    assert re.search(r"^192( +failed){4}$", done.stdout, re.MULTILINE)


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
    from m0kit_parity.bench.peers import NAMES

    assert tuple(bench.PEERS) == NAMES


# --- sides that crash --------------------------------------------------------------------------------------

# In a file of its own, which a fresh process can import: each side counts its calls and notes them in a file.
FAKES = """
import os, pathlib, sys
from functools import partial

def make(name, folder, fail=None, on="", times=1, at_once=False):
    if at_once:
        fail()
    calls = []
    def run(pairs):
        calls.append(pairs)
        with open(pathlib.Path(folder) / "calls", "a") as file:
            file.write(f"{name} {os.getpid()} {pairs[0][1]}\\n")
        if fail and str(pairs[0][1]).startswith(on) and len(calls) >= times:
            fail()
        return 2.0 if name == "transformers fp32" else 1.0
    return run

def leave():
    print("garbage", flush=True)
    sys.exit(3)

def fall():
    raise KeyError("weights")

def peer(checkpoint, name, threads, scratch):
    return make(name, pathlib.Path(checkpoint), os.abort)

def tried(folder):
    with open(pathlib.Path(folder) / "tried", "a") as file:
        file.write("once\\n")
    os.abort()

def look_for(folder, name):
    pid = next(int(line.split()[1]) for line in open(pathlib.Path(folder) / "calls") if line.startswith(name))
    os.kill(pid, 0)
"""


@pytest.fixture
def fakes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    (tmp_path / "m0kit_test_fakes.py").write_text(FAKES)
    monkeypatch.syspath_prepend(tmp_path)
    import m0kit_test_fakes  # type: ignore[import-not-found, unused-ignore]

    yield m0kit_test_fakes
    del sys.modules["m0kit_test_fakes"]


LOADS: dict[str, list[Any]] = {"short": [("q", "short text")], "long": [("q", "long text")], "page": [("q", b"image")]}


@pytest.mark.skipif(os.name != "posix", reason="signals")
@pytest.mark.parametrize("how", ["abort", "exit", "raise"])
def test_a_side_that_crashes_is_a_row_and_the_others_go_on(how: str, fakes: Any, tmp_path: Path) -> None:
    fail, said = {
        "abort": (os.abort, "bad: its process was ended by SIGABRT."),
        "exit": (fakes.leave, "bad: its process ended with exit code 3."),
        "raise": (fakes.fall, "bad: KeyError: 'weights'"),
    }[how]
    makers = {
        "int8": partial(fakes.make, "int8", tmp_path),
        "bad": partial(fakes.make, "bad", tmp_path, fail, "short", times=2),
        "transformers fp32": partial(fakes.make, "transformers fp32", tmp_path),
    }
    loads = {name: load for name, load in LOADS.items() if name != "page"}
    results = bench.side_by_side(makers, loads, 2, rest=0)
    assert [(r.workload, r.side, isinstance(r, bench.Missing)) for r in results] == [
        ("short", "int8", False), ("short", "bad", True), ("short", "transformers fp32", False),
        ("long", "int8", False), ("long", "bad", False), ("long", "transformers fp32", False),
    ]  # fmt: skip
    assert isinstance(results[1], bench.Missing)
    assert results[1].error == said
    assert [r.ratio for r in results if isinstance(r, bench.Timing)] == [2.0, 1.0, 2.0, 2.0, 1.0]
    calls = [line.split()[0] for line in (tmp_path / "calls").read_text().splitlines()]
    three, two = ["int8", "bad", "transformers"], ["int8", "transformers"]
    assert calls == [*three, *three, *two, *three * 3], "what failed waits for the next workload"


@pytest.mark.skipif(os.name != "posix", reason="signals")
def test_a_side_that_cannot_be_opened_is_missing_everywhere_and_tried_once(fakes: Any, tmp_path: Path) -> None:
    makers = {
        "int8": partial(fakes.make, "int8", tmp_path),
        "llama-q8_0": partial(fakes.make, "llama-q8_0", tmp_path, partial(fakes.tried, tmp_path), at_once=True),
        "transformers fp32": partial(fakes.make, "transformers fp32", tmp_path),
    }
    results = bench.side_by_side(makers, LOADS, 1, rest=0)
    missing = [r for r in results if isinstance(r, bench.Missing)]
    assert [(r.workload, r.side) for r in missing] == [("short", "llama-q8_0"), ("long", "llama-q8_0")]
    assert {r.error for r in missing} == {"llama-q8_0: its process was ended by SIGABRT."}
    assert (tmp_path / "tried").read_text() == "once\n"


@pytest.mark.skipif(os.name != "posix", reason="signals")
def test_without_what_it_is_compared_with_a_side_has_its_seconds(fakes: Any, tmp_path: Path) -> None:
    makers = {
        "int8": partial(fakes.make, "int8", tmp_path),
        "transformers fp32": partial(fakes.make, "transformers fp32", tmp_path, os.abort),
    }
    ours, theirs = bench.side_by_side(makers, {"short": LOADS["short"]}, 1, rest=0)
    assert isinstance(ours, bench.Missing)
    assert isinstance(theirs, bench.Missing)
    assert (ours.seconds, theirs.seconds) == (1.0, None)
    assert "nothing to compare with" in ours.error
    assert "SIGABRT" in theirs.error


def test_a_side_that_is_no_longer_asked_gives_its_memory_back(fakes: Any, tmp_path: Path) -> None:
    """By the page llama.cpp's process, which takes no images, is gone."""
    makers = {
        "llama-f16": partial(fakes.make, "llama-f16", tmp_path),
        "transformers fp32": partial(
            fakes.make, "transformers fp32", tmp_path, partial(fakes.look_for, tmp_path, "llama"), "b'image"
        ),
    }
    *before, last = bench.side_by_side(makers, LOADS, 1, rest=0)
    assert [type(r) for r in before] == [bench.Timing] * 4
    assert isinstance(last, bench.Missing)
    assert "ProcessLookupError" in last.error


def test_pairs_says_which_peer_crashed_and_exits_with_3(
    monkeypatch: pytest.MonkeyPatch, fakes: Any, tmp_path: Path
) -> None:
    write = checkpoints.write_checkpoint
    monkeypatch.setattr(bench, "workloads", lambda _prompts: {"short": LOADS["short"]})
    monkeypatch.setattr(checkpoints, "write_checkpoint", lambda folder, _shape, **_options: write(folder, "tiny"))
    monkeypatch.setattr(bench, "require_packages", lambda _names: None)
    monkeypatch.setattr(bench, "open_peer", fakes.peer)
    options = ["--repeats", "1", "--threads", "1", "--precision", "fp32", "--peer", "llama-q8_0"]
    done = CliRunner().invoke(bench.bench, ["pairs", *options, "--json"])
    assert done.exit_code == 3, done.output
    ours, theirs, peer = json.loads(done.stdout)["results"]
    assert ours["ratio"] > 0
    assert theirs["ratio"] == 1
    assert peer == {
        "workload": "short", "side": "llama-q8_0", "error": "llama-q8_0: its process was ended by SIGABRT.",
        "seconds": None,
    }  # fmt: skip
    done = CliRunner().invoke(bench.bench, ["pairs", *options])
    assert done.exit_code == 3
    assert re.search(r"^  llama-q8_0 +failed +– +–$", done.stdout, re.MULTILINE)
    assert done.stdout.endswith("llama-q8_0: its process was ended by SIGABRT.\n")


def test_a_package_that_a_peer_needs_is_asked_for_before_pytorch_is_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    done = CliRunner().invoke(bench.bench, ["pairs", "--peer", "llama-f16"])
    assert isinstance(done.exception, DependencyError)
    assert str(done.exception) == "the peer llama-f16 needs llama-cpp-python. pip install llama-cpp-python"
