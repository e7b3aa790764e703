"""Workloads have the sizes they claim, kept documents score as they should, and every part gives sane data.

What the figures are is nobody's business here: machines differ.
"""

import json
import random
import shutil
import sys
import time
from collections import namedtuple
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import numpy as np
import pytest
from click.testing import CliRunner, Result

from m0kit import Reranker
from m0kit.errors import InputError, OutputError
from m0kit.keeping.states import State
from m0kit.keeping.store import Store
from m0kit.scoring.engine import GraphEngine
from m0kit.scoring.prompt import ImageTokens, PromptBuilder
from m0kit_parity.bench import reuse
from m0kit_parity.bench.commands import bench
from m0kit_parity.bench.workloads import page_of
from m0kit_parity.samples.checkpoints import model_config


@pytest.fixture(autouse=True)
def _no_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody looks at the seconds, so engines need no rest between turns."""
    monkeypatch.setattr(time, "sleep", lambda _: None)


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many documents each call of `GraphEngine.compute` was given, where it was given any.

    Those of known answers are not among them, whether or not another test has had them asked before.
    """
    calls: list[int] = []
    compute = GraphEngine.compute

    def counting(self: GraphEngine, documents: Sequence[Any]) -> list[State]:
        if documents:
            calls.append(len(documents))
        return compute(self, documents)

    monkeypatch.setattr(GraphEngine, "compute", counting)
    monkeypatch.setattr(Reranker, "try_answers", lambda *_, **__: [])
    return calls


# --- workloads -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", [64, 128, 256, 768])
def test_documents_and_queries_have_exactly_the_tokens_asked_for(tokens: int, prompts: PromptBuilder) -> None:
    texts = [reuse.text_document(prompts, tokens, seed) for seed in range(8)]
    assert len(set(texts)) == 8
    rng = random.Random(0)
    for document in (*texts, ImageTokens(tokens)):
        for suffix in reuse.SUFFIXES:
            prompt = prompts.build(reuse.query_of(suffix, rng), document)
            assert len(prompt.suffix) == suffix
            assert prompt.prefix_length == len(prompt.document.prefix)
            assert isinstance(document, ImageTokens) or len(prompt.document.prefix) == tokens


def test_sizes_keep_to_the_limits_of_the_artifact(prompts: PromptBuilder) -> None:
    config = model_config("tiny")
    assert reuse.fitting(config, prompts, 768) == (768, 768)
    short = replace(config, prompt=replace(config.prompt, max_length=400, max_query_length=64))
    text, page = reuse.fitting(short, prompts, 768)
    assert text == 336, "the limit of a document's text, 400 − 64"
    around = len(prompts.document(ImageTokens(0)).prefix)
    assert 400 - 24 - around - 16 < page <= 400 - 24 - around
    small = replace(config, image=replace(config.image, max_pixels=100 * 28 * 28))
    assert reuse.fitting(small, prompts, 768)[1] == 96


@pytest.mark.parametrize("kv", ["fp32", "fp16", "int8"])
@pytest.mark.parametrize("length", [3, 70, 200])
def test_a_stretched_state_has_the_form_of_a_real_one_and_memory_of_its_own(
    kv: Any, length: int, tiny_artifact: Path
) -> None:
    reranker = Reranker.load(tiny_artifact, threads=1, cache_bytes=1 << 30, kv=kv)
    state = reuse.read_one(reranker, "a text of some tokens, not many")
    made = reuse.stretched(state, length)
    raw = np.frombuffer(b"".join(part.tobytes() for part in made.buffers), np.uint8)
    again = State.from_bytes(raw, reranker.config.decoder, kv)
    assert again.length == made.length == length
    last = (length - 1) % state.length
    for mine, theirs, original in zip(made.buffers, again.buffers, state.buffers, strict=True):
        assert mine.dtype == original.dtype
        assert not np.shares_memory(mine, original)
        np.testing.assert_array_equal(mine, theirs)
    np.testing.assert_array_equal(made.kv[:, :, :, -1], state.kv[:, :, :, last])
    np.testing.assert_array_equal(made.table, state.table)


def test_kept_documents_are_not_computed_again(tiny_artifact: Path, computed: list[int]) -> None:
    reranker = Reranker.load(tiny_artifact, threads=1, cache_bytes=1 << 30)
    contents = ["one text", "another text, somewhat longer", page_of(48)]
    state = reuse.read_one(reranker, contents[0])
    reuse.keep(reranker, contents[1:], state)
    assert np.isfinite(reranker.score([("q", content) for content in contents])).all()
    assert computed == [1]


# --- parts ---------------------------------------------------------------------------------------------


def test_cached_documents_score_as_uncached_ones(tiny_artifact: Path, tiny: Path, computed: list[int]) -> None:
    sizes = {"documents": 3, "tokens": 160, "repeats": 2, "page_repeats": 1, "threads": 1}
    results = reuse.cached(tiny_artifact, "fp32", **sizes, checkpoint=tiny)
    assert [(r.kind, r.suffix) for r in results] == [(kind, n) for kind in ("text", "page") for n in (4, 12, 24)]
    assert computed == [1, 1], "one document of each kind"
    for r in results:
        assert r.difference == 0.0, "in fp32 a kept document's score is the same to the bit"
        assert r.cached > 0
        assert r.faster == pytest.approx(r.uncached / r.cached)
        assert r.transformers is not None
        assert r.faster_than_transformers == pytest.approx(r.transformers / r.cached)
    assert {r.tokens for r in results if r.kind == "text"} == {160}


def test_what_rounding_of_states_costs_is_seen(tiny_artifact: Path) -> None:
    sizes = {"documents": 1, "tokens": 96, "repeats": 1, "page_repeats": 1, "threads": 1}
    results = reuse.cached(tiny_artifact, "int8", **sizes)
    assert any(r.difference > 0 for r in results)
    # 8 bits of keys and values on random weights: hundredths at most. A document in another's place differs as much
    # as two random scores do.
    assert max(r.difference for r in results) < 0.05
    assert all(r.transformers is None for r in results)


def test_an_index_of_pages_is_read_and_asked_from_disk(
    tiny_artifact: Path, tmp_path: Path, computed: list[int]
) -> None:
    found = reuse.disk(tiny_artifact, "fp16", tmp_path / "i", pages=4, tokens=96, repeats=2, threads=1)
    assert computed == [1], "one page is read, the others' states are found in the index"
    with Store.open(tmp_path / "i") as store:
        assert store.ids() == [f"page {i}" for i in range(4)]
        assert store.stats().records == 4
        assert store.verify().clean
    temperatures = ["cold", "warm"] if sys.platform == "linux" else [r.pages for r in found.reading]
    assert [r.pages for r in found.reading] == temperatures
    assert [a.pages for a in found.asking] == [*temperatures, "next"]
    for r in found.reading:
        assert min(r.open, r.load, r.bytes_per_second) > 0
    for a in found.asking:
        assert 0 < a.share < 1
        assert 0 < a.loading < a.seconds
        assert 0 < a.lookup < a.seconds  # medians of other runs than those of loading, so they need not add up
    assert found.index_bytes > 4 * found.tokens * 3 * 2 * 2 * 16 * 2, "more than the states: layers, K and V, heads…"


def test_without_a_way_to_let_files_go_nothing_is_called_cold(
    tiny_artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr("os.posix_fadvise", raising=False)
    found = reuse.disk(tiny_artifact, "fp16", tmp_path / "i", pages=1, tokens=64, repeats=1, threads=1)
    assert [r.pages for r in found.reading] == ["warm"]
    assert [a.pages for a in found.asking] == ["warm", "next"]


def test_an_index_that_would_not_fit_is_not_begun(
    tiny_artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(1 << 40, 0, 100_000))
    with pytest.raises(OutputError, match=r"GiB free.*--tmp.*fewer --pages"):
        reuse.disk(tiny_artifact, "fp16", tmp_path / "i", pages=4, tokens=96, repeats=1, threads=1)
    with Store.open(tmp_path / "i") as store:
        assert store.ids() == []


def test_indexing_reads_every_text_once(tiny_artifact: Path, tmp_path: Path) -> None:
    found = reuse.indexing(tiny_artifact, "fp16", tmp_path / "i", documents=3, repeats=2, threads=1, tokens=64)
    assert found.low <= found.ratio <= found.high
    assert min(found.indexed, found.scored) > 0
    with Store.open(tmp_path / "i") as store:
        assert store.stats().records == 9, "two turns and one that does not count, three texts each, all different"


def test_texts_that_repeat_are_not_taken_for_new_ones(
    tiny_artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reuse, "text_document", lambda *_: "always the same")
    with pytest.raises(InputError, match="2 texts made 1 states"):
        reuse.indexing(tiny_artifact, "fp16", tmp_path / "i", documents=2, repeats=1, threads=1)


def test_growth_goes_through_every_size(tiny_artifact: Path, computed: list[int]) -> None:
    found = reuse.growth(tiny_artifact, "fp16", documents=4, max_tokens=1100, repeats=1, threads=1, most=8)
    documents, queries, tokens = found.seconds.values()
    assert list(documents) == list(queries) == [1, 2, 4, 8]
    assert list(tokens) == [64, 128, 256, 512, 1024, 1100]
    anew = {n: point["uncached"] is not None for n, point in (documents | tokens).items()}
    assert anew == {1: True, 2: True, 4: True, 8: False, 64: True, 128: True, 256: True, 512: True} | {
        1024: False,
        1100: False,
    }, "1024 tokens with the query's at most"
    assert all(point["cached"] for points in found.seconds.values() for point in points.values())
    sizes = {c.percent: c.hits for c in found.cache}
    assert list(sizes) == list(reuse.CACHE_SIZES)
    assert sizes[0] == 0.0
    assert 0 < sizes[25] <= sizes[75] < 1
    assert sizes[100] == sizes[125] == 1.0
    assert "16 requests" in found.stream
    misses = sum(round(16 * (1 - hits)) for hits in sizes.values())
    # Besides: the first text, and for each cache the short text of the run that does not count. Without a cache, too,
    # documents are read apart from their queries, because states are rounded to float16.
    assert sum(computed) == 1 + misses + len(sizes)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_many_pairs_are_counted_and_their_memory_is_watched(tiny_artifact: Path) -> None:
    found = reuse.many(tiny_artifact, queries=20, documents=5, threads=1)
    assert (found.pairs, found.documents) == (100, 5)
    assert list(found.resident) == ["before", "planned", "10 %", "50 %", "100 %"]
    assert min(found.resident.values()) > 0
    assert found.pairs_per_second > 0
    assert 0 < found.planning < 100 / found.pairs_per_second


# --- command -------------------------------------------------------------------------------------------


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(reuse, "QUERIES", 10)
    monkeypatch.setattr(reuse, "DOCUMENTS", 4)
    return


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(bench, ["reuse", *map(str, arguments)], catch_exceptions=False)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_all_parts_go_into_json_and_a_plot(short: None, tiny_artifact: Path, tmp_path: Path) -> None:
    sizes = ("--documents", 2, "--pages", 2, "--max-tokens", 96, "--repeats", 1, "--threads", 1, "--kv", "int8")
    everything = [word for part in reuse.PARTS for word in ("--only", part)]
    plot = tmp_path / "r.svg"
    result = invoke(tiny_artifact, *sizes, *everything, "--tmp", tmp_path, "--plot", plot, "--json")
    assert result.exit_code == 0, result.output
    done = json.loads(result.stdout)
    assert list(done) == ["about", *reuse.PARTS]
    assert done["about"]["kv"] == "int8"
    assert {r["kind"] for r in done["cached"]} == {"text", "page"}
    assert done["disk"]["pages"] == 2
    assert done["indexing"]["documents"] == 2
    assert list(done["growth"]["seconds"]["tokens of a document, one query"]) == ["64", "96"]
    assert done["many"]["pairs"] == 40
    inner = [e for e in ET.parse(plot).getroot() if e.tag.endswith("svg")]
    assert len(inner) == 2 + 3 + 2 + 1, "cached by kind, what grows, hits and seconds of the cache, memory"
    assert "var(" not in plot.read_text()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["r.svg"], "indexes are gone"


def test_parts_are_told_in_tables(tiny_artifact: Path, tmp_path: Path) -> None:
    sizes = ("--documents", 2, "--pages", 2, "--max-tokens", 64, "--repeats", 1, "--threads", 1, "--tmp", tmp_path)
    result = invoke(tiny_artifact, *sizes, "--only", "disk", "--only", "indexing", "--only", "cached")
    assert result.exit_code == 0, result.output
    for words in ("new query on a kept document", "index of 2 pages", "one query on all pages", "2 new texts of 256"):
        assert words in result.stdout
    assert "transformers" not in result.stdout.partition("index of")[0], "only with a checkpoint"


def test_a_plot_of_parts_without_charts_is_refused(tiny_artifact: Path, tmp_path: Path) -> None:
    result = invoke(tiny_artifact, "--only", "disk", "--only", "indexing", "--plot", tmp_path / "p.svg")
    assert result.exit_code == 2
    assert "disk and indexing have nothing to draw" in result.stderr
    assert not (tmp_path / "p.svg").exists()
