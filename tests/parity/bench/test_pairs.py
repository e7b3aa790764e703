"""Sides are compared in one run, and one that crashes costs the others nothing."""

import json
import os
import re
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from tests.parity.bench.running import invoke

from m0kit.errors import DependencyError
from m0kit_parity.bench import commands, pairs
from m0kit_parity.bench.commands import bench
from m0kit_parity.bench.timing import Timing
from m0kit_parity.bench.workloads import QUERY
from m0kit_parity.samples import checkpoints


def test_pairs_compares_both_sides(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the tiny shape and vocabulary, because the wide one takes a minute to write."""
    write = checkpoints.write_checkpoint
    made = {("64 tokens",): {"text, 64 tokens": [(QUERY, "a text")]}}
    monkeypatch.setattr(commands, "workloads", lambda _prompts, only: made[only])
    monkeypatch.setattr(checkpoints, "write_checkpoint", lambda folder, _shape, **_options: write(folder, "tiny"))
    options = ("--repeats", 1, "--only", "64 tokens", "--threads", 1, "--precision", "int8", "--precision", "fp32")
    done = json.loads(invoke("pairs", *options, "--json").stdout)
    sides = {r["side"]: r for r in done["results"]}
    assert list(sides) == ["int8", "fp32", "transformers fp32"]
    assert {r["workload"] for r in done["results"]} == {"text, 64 tokens"}
    for result in sides.values():
        assert result["ratio"] == pytest.approx(sides["transformers fp32"]["seconds"] / result["seconds"])
    assert done["about"]["repeats"] == 1


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
    results = pairs.side_by_side(makers, loads, 2, rest=0)
    assert [(r.workload, r.side, isinstance(r, pairs.Missing)) for r in results] == [
        ("short", "int8", False), ("short", "bad", True), ("short", "transformers fp32", False),
        ("long", "int8", False), ("long", "bad", False), ("long", "transformers fp32", False),
    ]  # fmt: skip
    assert isinstance(results[1], pairs.Missing)
    assert results[1].error == said
    assert [r.ratio for r in results if isinstance(r, Timing)] == [2.0, 1.0, 2.0, 2.0, 1.0]
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
    results = pairs.side_by_side(makers, LOADS, 1, rest=0)
    missing = [r for r in results if isinstance(r, pairs.Missing)]
    assert [(r.workload, r.side) for r in missing] == [("short", "llama-q8_0"), ("long", "llama-q8_0")]
    assert {r.error for r in missing} == {"llama-q8_0: its process was ended by SIGABRT."}
    assert (tmp_path / "tried").read_text() == "once\n"


@pytest.mark.skipif(os.name != "posix", reason="signals")
def test_without_what_it_is_compared_with_a_side_has_its_seconds(fakes: Any, tmp_path: Path) -> None:
    makers = {
        "int8": partial(fakes.make, "int8", tmp_path),
        "transformers fp32": partial(fakes.make, "transformers fp32", tmp_path, os.abort),
    }
    ours, theirs = pairs.side_by_side(makers, {"short": LOADS["short"]}, 1, rest=0)
    assert isinstance(ours, pairs.Missing)
    assert isinstance(theirs, pairs.Missing)
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
    *before, last = pairs.side_by_side(makers, LOADS, 1, rest=0)
    assert [type(r) for r in before] == [Timing] * 4
    assert isinstance(last, pairs.Missing)
    assert "ProcessLookupError" in last.error


def test_pairs_says_which_peer_crashed_and_exits_with_3(
    monkeypatch: pytest.MonkeyPatch, fakes: Any, tmp_path: Path
) -> None:
    write = checkpoints.write_checkpoint
    monkeypatch.setattr(commands, "workloads", lambda _prompts, _only: {"short": LOADS["short"]})
    monkeypatch.setattr(checkpoints, "write_checkpoint", lambda folder, _shape, **_options: write(folder, "tiny"))
    monkeypatch.setattr(commands, "require_packages", lambda _names: None)
    monkeypatch.setattr(pairs, "open_peer", fakes.peer)
    options = ["--repeats", "1", "--threads", "1", "--precision", "fp32", "--peer", "llama-q8_0"]
    done = CliRunner().invoke(bench, ["pairs", *options, "--json"])
    assert done.exit_code == 3, done.output
    ours, theirs, peer = json.loads(done.stdout)["results"]
    assert ours["ratio"] > 0
    assert theirs["ratio"] == 1
    assert peer == {
        "workload": "short", "side": "llama-q8_0", "error": "llama-q8_0: its process was ended by SIGABRT.",
        "seconds": None,
    }  # fmt: skip
    done = CliRunner().invoke(bench, ["pairs", *options])
    assert done.exit_code == 3
    assert re.search(r"^  llama-q8_0 +failed +– +–$", done.stdout, re.MULTILINE)
    assert done.stdout.endswith("llama-q8_0: its process was ended by SIGABRT.\n")


def test_a_package_that_a_peer_needs_is_asked_for_before_pytorch_is_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    done = CliRunner().invoke(bench, ["pairs", "--peer", "llama-f16"])
    assert isinstance(done.exception, DependencyError)
    assert str(done.exception) == "the peer llama-f16 needs llama-cpp-python. pip install llama-cpp-python"
