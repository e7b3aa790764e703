"""The engine for GPUs on the computer itself: its scores, its pages, what it copies, and what becomes of failed runs.

Mostly in float32, which no GPU is given: there a wrong page, position or row is 1e-2 and more of a logit, and what is
left between two engines are sums in another order.
"""

import gc
import math
import os
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from tests.export.artifacts import artifacts_of

from m0kit import Reranker
from m0kit.artifact.manifest import TOKENIZER, read_manifest
from m0kit.artifact.ports import PAGE_TOKENS
from m0kit.config import ModelConfig
from m0kit.errors import DeviceError, InputError, PoolFullError
from m0kit.keeping.pages import claim
from m0kit.scoring import cuda_engine
from m0kit.scoring.cuda_engine import POOL_VARIABLE, CudaEngine, encoder_size
from m0kit.scoring.device import DeviceGraph, Placed
from m0kit.scoring.engine import Part, RunStats
from m0kit.scoring.prepare import Prepared, Preparer
from m0kit.scoring.prompt import PromptBuilder
from m0kit.scoring.schedule import Result, Schedule
from m0kit_export.cuda import cuda_graphs
from m0kit_export.graphs import build_graphs
from m0kit_parity.cuda.host import HostDevice
from m0kit_parity.proof.tolerances import tolerances
from m0kit_quant.recipe import Recipe

# Sums of float32 in another order, in three layers: 5e-6 of logits that lie 0.5 apart were seen. A score that another
# page, position or row went into is off by 1e-2 at least.
EXACT = 5e-5
# What 16 bits may cost altogether. 2e-3 were seen.
HALF = tolerances("fp16")["logit"].limit
Array = NDArray[Any]
Pair = tuple[Any, Any]
LONG = "a text of many words that is longer than a page of the pool " * 4


def image(height: int, width: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8))


IMAGES = [image(*size, seed) for seed, size in enumerate([(84, 56), (56, 112), (28, 28), (140, 168)])]


class Watched:
    """A graph that calls something before each of its runs, and something else with its outputs afterwards."""

    def __init__(
        self, graph: DeviceGraph, before: Callable[..., object] | None, after: Callable[..., object] | None
    ) -> None:
        self._graph, self._before, self._after = graph, before, after

    def bind(self, values: Mapping[str, Placed]) -> None:
        self._graph.bind(values)

    def run(self, inputs: Mapping[str, Array | Placed], outputs: Mapping[str, Array | Placed]) -> None:
        if self._before:
            self._before(inputs)
        self._graph.run(inputs, outputs)
        if self._after:
            self._after(outputs)


class Served:
    """An engine on the computer itself, and what puts pairs through it."""

    def __init__(self, artifact: Path, dtype: str, *, max_length: int = 1024, num_pages: int = 100, **options: Any):
        manifest = read_manifest(artifact)
        prompt = replace(manifest.model.prompt, max_length=max_length, max_query_length=min(512, max_length // 2))
        self.config: ModelConfig = replace(manifest.model, prompt=prompt)
        self.device = HostDevice(1 << 30)
        self.before: dict[str, Callable[..., object]] = {}
        self.after: dict[str, Callable[..., object]] = {}
        decoder = self.config.decoder
        item = 4 if dtype == "float32" else 2
        self.page_bytes = 2 * decoder.num_layers * PAGE_TOKENS * decoder.kv_size * item
        self.engine = CudaEngine(
            self.config, self.device, partial(self._open, artifact), dtype,
            salt=b"", pool_bytes=num_pages * self.page_bytes, **options,
        )  # fmt: skip
        self.preparer = Preparer(self.config, PromptBuilder(artifact / TOKENIZER, prompt), b"")

    def _open(self, artifact: Path, name: str) -> Watched:
        return Watched(
            self.device.open(artifact, name), partial(self._tell, "before", name), partial(self._tell, "after", name)
        )

    def _tell(self, when: str, name: str, values: Mapping[str, Array | Placed]) -> None:
        told: Mapping[str, Callable[..., object]] = getattr(self, when)
        if name in told:
            told[name](values)

    def prepare(self, *pairs: Pair) -> list[Prepared]:
        return [self.preparer.prepare(pair) for pair in pairs]

    def results(self, pairs: Sequence[Pair]) -> list[Result]:
        return through(Schedule(self.engine), self.prepare(*pairs))

    def logits(self, *pairs: Pair) -> list[float]:
        return [result.logit for result in self.results(pairs)]

    def parts(self, *pairs: Pair) -> list[Part]:
        """A run of these, each on its own document."""
        return [Part(prepared.document, [prepared], self.engine.cache.get(prepared.document.key))
                for prepared in self.prepare(*pairs)]  # fmt: skip

    def forget(self) -> None:
        while self.engine.cache.drop_least():
            pass

    def num_held(self) -> int:
        """Pages that somebody holds when nothing runs."""
        self.engine.begin([])()  # what ran before is let go by then
        gc.collect()
        return self.engine.pool.num_pages - self.engine.pool.num_free


def through(schedule: Schedule, prepared: Sequence[Prepared]) -> list[Result]:
    tickets = [schedule.add(one) for one in prepared]
    found: dict[int, Result] = {}
    while len(schedule):
        found.update(schedule.step())
    return [found[ticket] for ticket in tickets]


@pytest.fixture(scope="module")
def fp16(tiny: Path) -> Path:
    return artifacts_of(tiny, "on-gpu")("fp16")


@pytest.fixture(scope="module")
def fp32(tiny_artifact: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The artifact in fp32 with CUDA graphs that compute in float32."""
    folder = tmp_path_factory.mktemp("exact") / "artifact"
    shutil.copytree(tiny_artifact, folder)
    config, recipe = read_manifest(folder).model, Recipe.default("fp32")
    for name, graph in cuda_graphs(config, recipe, build_graphs(config, recipe), dtype="float32").items():
        (folder / f"{name}.cuda.onnx").write_bytes(graph.model.SerializeToString())
    return folder


@pytest.fixture
def serve(fp32: Path) -> Iterator[Callable[..., Served]]:
    opened: list[Served] = []

    def make(**options: Any) -> Served:
        opened.append(Served(fp32, "float32", **options))
        return opened[-1]

    yield make
    for served in opened:
        served.engine.close()


@pytest.fixture
def served(serve: Callable[..., Served]) -> Served:
    return serve()


@pytest.fixture(scope="module")
def on_cpu(tiny_artifact: Path) -> Callable[..., list[float]]:
    reranker = Reranker.load(tiny_artifact, threads=1)
    return lambda *pairs: reranker.score(pairs, raw=True).tolist()


def assert_near(found: Sequence[float], expected: Sequence[float], tolerance: float = EXACT) -> None:
    __tracebackhide__ = True
    assert len(found) == len(expected)
    off = np.abs(np.asarray(found) - np.asarray(expected))
    assert (off <= tolerance).all(), f"{off.max():.1e}, {off.max() / tolerance:.0%} of the tolerance"


PAIRS: list[Pair] = [
    ("q", "a document"),
    ("what is it", LONG),
    ("a query", IMAGES[0]),
    ("a query", IMAGES[3]),
    (IMAGES[1], "a document"),
    (IMAGES[2], IMAGES[3]),
    ("7", "x"),
]


# --- scores --------------------------------------------------------------------------------------------


def test_in_float32_scores_are_the_cpus(served: Served, on_cpu: Callable[..., list[float]]) -> None:
    expected = on_cpu(*PAIRS)
    assert np.ptp(expected) > 1
    assert_near(served.logits(*PAIRS), expected)


def test_in_float16_scores_are_the_cpus_but_for_rounding(fp16: Path) -> None:
    """Beside the graphs for CPUs that keep keys and values in float16, too."""
    half = Served(fp16, "float16")
    assert_near(half.logits(*PAIRS), Reranker.load(fp16, threads=1, kv="fp16").score(PAIRS, raw=True).tolist(), HALF)
    half.engine.close()


def test_a_logit_is_the_same_alone_in_company_and_on_what_is_kept(
    served: Served, on_cpu: Callable[..., list[float]]
) -> None:
    expected = on_cpu(*PAIRS)
    for way in ("first", "kept", "evicted"):
        assert_near([served.logits(pair)[0] for pair in PAIRS], expected)
        assert_near(served.logits(*PAIRS[::-1])[::-1], expected)
        if way != "first":
            served.forget()
    assert served.device.counts["run decoder.cuda"] >= 3 * len(PAIRS)


@pytest.mark.parametrize("document", ["short", LONG, IMAGES[3]], ids=["short", "long", "image"])
def test_queries_on_one_document_do_not_overwrite_it(
    served: Served, on_cpu: Callable[..., list[float]], document: Any
) -> None:
    """All in one call, then once more on what is kept: first suffixes are written behind the document."""
    pairs: list[Pair] = [(query, document) for query in ("q", "what is it " * 20, "another one", IMAGES[0], "z" * 90)]
    expected = on_cpu(*pairs)
    assert np.ptp(expected) > 0.1
    for some in (pairs, pairs[::-1], pairs):
        assert_near(served.logits(*some), expected if some is pairs else expected[::-1])


def test_a_query_may_follow_a_part_of_its_document(served: Served, on_cpu: Callable[..., list[float]]) -> None:
    """As where its text merges into the last tokens: what it repeats of them stays the document's for all others."""
    document, fewer = LONG * 2, (0, 3, 1, 130, 0, 257)
    prepared = served.prepare(*[(f"query {n}", document) for n in range(len(fewer))])
    length = prepared[0].document.length
    assert length % PAGE_TOKENS > 3
    assert length > 2 * PAGE_TOKENS
    shorter = [following(one, length - n) for one, n in zip(prepared, fewer, strict=True)]
    expected = on_cpu(*[(f"query {n}", document) for n in range(len(fewer))])
    for _ in range(2):
        found = [result.logit for result in through(Schedule(served.engine), shorter)]
        assert_near(found, expected)
        alone = [through(Schedule(served.engine), [one])[0].logit for one in shorter[::-1]]
        assert_near(alone[::-1], expected)


def following(prepared: Prepared, used: int) -> Prepared:
    """The same prompt with so many tokens as its document's."""
    prompt = prepared.prompt
    suffix = prompt.token_ids[used:]
    return Prepared(prepared.document, replace(prompt, prefix_length=used, suffix=suffix), prepared.images)


@pytest.mark.parametrize("rows", [1, 7, 50, 130])
def test_a_document_of_more_rows_than_a_run_is_written_in_pieces(
    served: Served, on_cpu: Callable[..., list[float]], rows: int
) -> None:
    """An image of 30 tokens is cut by the smaller ones."""
    served.engine.rows = rows
    pairs: list[Pair] = [("q", LONG[: max(rows, 20) * 3]), ("a query", IMAGES[3]), ("again", IMAGES[3])]
    assert_near(served.logits(*pairs), on_cpu(*pairs))


def test_a_query_of_more_rows_than_a_run_is_a_run(served: Served, on_cpu: Callable[..., list[float]]) -> None:
    served.engine.rows = 5
    pairs: list[Pair] = [("a query of many words " * 6, "a document"), (IMAGES[3], "a document"), ("q", "a document")]
    assert_near(served.logits(*pairs), on_cpu(*pairs))


def test_a_page_that_is_just_full_has_no_room_for_a_query(served: Served, on_cpu: Callable[..., list[float]]) -> None:
    lengths = {}
    for n in range(40, 140):
        document = "xq" + "z" * n
        lengths[served.prepare(("q", document))[0].document.length] = document
    near = [lengths[length] for length in range(PAGE_TOKENS - 2, PAGE_TOKENS + 3)]
    pairs: list[Pair] = [(query, document) for document in near for query in ("q", "what is it", "r")]
    expected = on_cpu(*pairs)
    assert_near(served.logits(*pairs), expected)
    assert_near(served.logits(*pairs), expected)


# --- the pool ------------------------------------------------------------------------------------------


def test_all_pages_are_free_again_when_nothing_is_kept(served: Served) -> None:
    served.logits(*PAIRS)
    assert served.num_held() == sum(len(served.engine.cache.peek(key).pages) for key in served.engine.cache)
    served.forget()
    assert served.num_held() == 0


def test_in_a_pool_that_is_full_runs_wait_and_documents_go(
    serve: Callable[..., Served], on_cpu: Callable[..., list[float]]
) -> None:
    """Seven pages, of which a document takes one to three, and a run two more at most."""
    served = serve(max_length=600, num_pages=7)
    pairs: list[Pair] = [(f"q{i}", f"{i} {LONG[: 40 * (i % 8)]}") for i in range(24)]
    expected = on_cpu(*pairs)
    assert_near(served.logits(*pairs), expected)
    assert_near(served.logits(*pairs[::-1])[::-1], expected)
    assert served.engine.cache.dropped > 20
    served.forget()
    assert served.num_held() == 0


def test_a_run_that_no_pool_has_room_for_is_halved(
    serve: Callable[..., Served], on_cpu: Callable[..., list[float]]
) -> None:
    """Each query has pages of its own: 30 of them would need 30 and more."""
    served = serve(max_length=600, num_pages=7)
    served.engine.rows = 4096
    pairs: list[Pair] = [(f"q{i}", "a document") for i in range(30)]
    expected = on_cpu(*pairs)
    ((document, prepared),) = {one.document: served.prepare(*pairs) for one in served.prepare(pairs[0])}.items()
    assert_near(served.engine.begin([Part(document, prepared)])(), expected)
    assert served.device.counts["run decoder.cuda"] > 4
    many: list[Pair] = [("q", f"document {i}") for i in range(20)]
    assert_near(served.engine.begin(served.parts(*many))(), on_cpu(*many))
    served.forget()
    assert served.num_held() == 0


def test_where_others_hold_all_pages_that_is_said_and_nothing_is_lost(
    serve: Callable[..., Served], on_cpu: Callable[..., list[float]]
) -> None:
    served = serve(max_length=600, num_pages=7)
    held = claim(served.engine.pool, served.engine.cache, 6)
    with pytest.raises(PoolFullError, match="2 pages of 128 tokens are needed"):
        served.logits(("q", LONG))
    assert len(served.engine.cache) == 0
    del held
    assert_near(served.logits(("q", LONG)), on_cpu(("q", LONG)))


def test_pages_that_a_running_run_holds_are_waited_for(
    serve: Callable[..., Served], on_cpu: Callable[..., list[float]]
) -> None:
    """The second run needs what the first has; it is laid out when that is done, and the order stays."""
    served = serve(max_length=600, num_pages=7)
    first, second = served.parts(("q", f"a {LONG}")), served.parts(("q", f"b {LONG}"), ("r", f"c {LONG}"))
    entered, go = threading.Event(), threading.Event()

    def blocked(_: object) -> None:
        entered.set()
        assert go.wait(60)

    served.before["decoder.cuda"] = blocked
    wait = served.engine.begin(first)
    assert entered.wait(60)
    threading.Timer(0.05, go.set).start()
    found = served.engine.begin(second)
    assert_near([*wait(), *found()], on_cpu(("q", f"a {LONG}"), ("q", f"b {LONG}"), ("r", f"c {LONG}")))


@pytest.mark.parametrize("given", ["argument", "variable", "free memory"])
def test_a_pool_that_is_smaller_than_one_document_is_refused_by_name(
    fp32: Path, monkeypatch: pytest.MonkeyPatch, given: str
) -> None:
    config = read_manifest(fp32).model
    device = HostDevice(1 << 20 if given == "free memory" else 1 << 30)
    if given == "variable":
        monkeypatch.setenv(POOL_VARIABLE, "1000000")
    pool_bytes = 1_000_000 if given == "argument" else None
    said = rf"one document of 10,240 tokens takes .* MB.*--pool-bytes.*{POOL_VARIABLE}\).*lower max_length.*int4"
    with pytest.raises(DeviceError, match=said):
        CudaEngine(config, device, partial(device.open, fp32), "float32", salt=b"", pool_bytes=pool_bytes)


def test_the_pool_takes_what_is_free_but_for_runs_and_the_image_encoder(
    fp32: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = read_manifest(fp32).model
    sizes: list[int] = []
    for encoder_bytes in (0, 100 << 20):
        device = HostDevice(4 << 30)
        monkeypatch.setattr(device, "allocate", partial(_counted, sizes))
        monkeypatch.setattr(device, "free", lambda _: None)
        CudaEngine(config, device, partial(device.open, fp32), "float32", salt=b"", encoder_bytes=encoder_bytes).close()
    assert 2 << 30 < sizes[0] < 3 << 30  # three quarters
    assert abs(sizes[0] - sizes[1] - (75 << 20)) < 1 << 20  # but for a part of a page


def _counted(sizes: list[int], num_bytes: int) -> int:
    """Gigabytes that nothing is written to."""
    sizes.append(num_bytes)
    return 4096


def test_a_document_that_is_too_large_for_the_pool_costs_itself_alone(
    fp32: Path, serve: Callable[..., Served], on_cpu: Callable[..., list[float]]
) -> None:
    """As where limits were raised after the pool was made."""
    served = serve(max_length=300, num_pages=5)
    prompt = replace(served.config.prompt, max_length=4096)
    served.preparer = Preparer(served.config, PromptBuilder(fp32 / TOKENIZER, prompt), b"")
    pairs: list[Pair] = [("q", "a document"), ("q", LONG * 4), ("r", LONG * 4), ("q", "another")]
    found = served.results(pairs)
    for result in found[1:3]:
        assert isinstance(result.error, InputError)
        assert f"raise --pool-bytes or {POOL_VARIABLE}, or lower max_length" in str(result.error)
    assert_near([found[0].logit, found[3].logit], on_cpu(pairs[0], pairs[3]))


# --- runs ----------------------------------------------------------------------------------------------


def test_the_pool_is_bound_once_and_never_copied(served: Served) -> None:
    """A run binds ten inputs and a result of the decoder, two of the head; a query on what is kept copies nothing."""
    num_layers, counts = served.config.decoder.num_layers, served.device.counts
    sizes: list[int] = []
    served.before["decoder.cuda"] = lambda inputs: sizes.append(
        sum(array.nbytes for array in inputs.values() if not isinstance(array, Placed))
    )
    assert counts["bound once"] == 4 * num_layers
    served.logits(("q", LONG))
    before = counts.copy()
    for query in ("q", "another", "a third"):
        served.logits((query, LONG))
    took = counts - before
    assert took == {"run decoder.cuda": 3, "run head.cuda": 3, "bound": 3 * 13}
    assert max(sizes[1:]) < 2000  # bytes; a page of this model has 48 KiB
    served.logits(*[(query, LONG) for query in ("q", "another", "a third")])
    assert (counts - before - took)["copies"] == 2  # the last page of the document, for all but the first
    assert counts["bound once"] == 4 * num_layers


def test_where_there_is_nothing_to_compute_no_graph_is_run(served: Served) -> None:
    served.logits(("q", "a document"))
    (part,) = served.parts(("q", "a document"))
    before = served.device.counts.copy()
    assert served.engine.begin([])() == []
    assert served.engine.begin([replace(part, pairs=[])])() == []
    assert not served.device.counts - before


def test_the_next_run_is_laid_out_while_one_is_running(served: Served, on_cpu: Callable[..., list[float]]) -> None:
    running, go = threading.Event(), threading.Event()

    def blocked(_: object) -> None:
        running.set()
        assert go.wait(60)

    served.before["decoder.cuda"] = blocked
    first = served.engine.begin(served.parts(("q", "a document")))
    assert running.wait(60)
    # On the document that the first is only about to write, too.
    second = served.engine.begin(served.parts(("q", IMAGES[3]), ("other", "a document")))
    assert served.device.counts["run decoder.cuda"] == 0
    assert not go.is_set()
    go.set()
    assert_near(second(), on_cpu(("q", IMAGES[3]), ("other", "a document")))  # waited for in any order
    assert_near(first(), on_cpu(("q", "a document")))


def test_pinned_memory_is_used_again(served: Served) -> None:
    for _ in range(5):
        served.logits(*[("q", one) for one in IMAGES])
        served.forget()
    assert served.device.counts["run vision.cuda"] >= 5
    assert served.device.counts["pinned"] <= 2 * len({encoder_size(48), encoder_size(4), encoder_size(120)})


def test_a_querys_image_is_encoded_once_and_read_back(served: Served, on_cpu: Callable[..., list[float]]) -> None:
    """By runs that come one after the other, as later ones are laid out while the first is at work."""
    pairs: list[Pair] = [(IMAGES[0], f"document {i}") for i in range(6)]
    prepared = served.prepare(*pairs)
    found = [served.engine.begin([Part(one.document, [one])])()[0] for one in prepared]
    assert served.device.counts["run vision.cuda"] == 1
    # The pixels there, the embeddings back, and there again for each later run.
    assert served.device.counts["copies"] == 2 + 5
    assert_near(found, on_cpu(*pairs))


def test_a_documents_image_is_encoded_once_and_stays_there(served: Served) -> None:
    served.logits(("q", IMAGES[0]), ("r", IMAGES[0]))
    served.logits(("s", IMAGES[0]))
    assert served.device.counts["run vision.cuda"] == 1


def test_one_image_may_be_query_and_document(served: Served, on_cpu: Callable[..., list[float]]) -> None:
    pairs: list[Pair] = [(IMAGES[0], IMAGES[0]), ("q", IMAGES[0]), (IMAGES[0], IMAGES[1]), (IMAGES[1], IMAGES[0])]
    assert_near(served.logits(*pairs), on_cpu(*pairs))


def test_images_of_a_size_are_encoded_together_and_all_others_apart(
    served: Served, on_cpu: Callable[..., list[float]]
) -> None:
    images = [image(56, 56 + 28 * (i % 2), i) for i in range(7)]
    pairs: list[Pair] = [("q", one) for one in images]
    assert_near(served.logits(*pairs), on_cpu(*pairs))
    assert served.device.counts["run vision.cuda"] == 3  # four, two and one


@pytest.mark.parametrize("extra", [0, 1, 64, 500])
def test_an_image_may_be_filled_up_however_far(
    served: Served, monkeypatch: pytest.MonkeyPatch, on_cpu: Callable[..., list[float]], extra: int
) -> None:
    monkeypatch.setattr(cuda_engine, "encoder_size", lambda size: size + 4 * extra)
    pairs: list[Pair] = [("q", IMAGES[0]), (IMAGES[2], IMAGES[1])]
    assert_near(served.logits(*pairs), on_cpu(*pairs))


@pytest.mark.parametrize("size", [1, 4, 64, 65, 512, 513, 3072, 4096, 4097, 16384])
def test_sizes_of_images_are_few_and_never_smaller(size: int) -> None:
    assert size <= encoder_size(size) <= max(64, 2 * size)
    assert encoder_size(encoder_size(size)) == encoder_size(size)
    assert encoder_size(size) % 4 == 0


def test_a_run_is_told_as_it_was(served: Served) -> None:
    told: list[RunStats] = []
    served.engine.on_run = told.append
    served.logits(("q", "a document"))
    served.logits(("r", "a document"))
    (one,) = served.prepare(("r", "a document"))
    assert [stats.pairs for stats in told] == [1, 1]
    assert [stats.rows - one.num_rows for stats in told] == [one.document.length, 0]
    assert [stats.kept_rows for stats in told] == [0, one.document.length]
    assert [stats.past_bytes for stats in told] == [0, served.page_bytes]


# --- what goes wrong -----------------------------------------------------------------------------------


class Stumbles:
    """Raises at the given runs."""

    def __init__(self, *runs: int) -> None:
        self._left, self._count = set(runs), 0

    def __call__(self, _: object) -> None:
        self._count += 1
        if self._count in self._left:
            raise DeviceError("the GPU stumbled")


@pytest.mark.parametrize("graph", ["vision.cuda", "decoder.cuda", "head.cuda"])
def test_documents_of_a_run_that_failed_are_computed_anew(
    served: Served, on_cpu: Callable[..., list[float]], graph: str
) -> None:
    pairs: list[Pair] = [("q", "a document"), ("q", IMAGES[0])]
    served.before[graph] = Stumbles(1)
    with pytest.raises(DeviceError, match="the GPU stumbled"):
        served.logits(*pairs)
    assert len(served.engine.cache) == 0
    assert served.num_held() == 0
    assert_near(served.logits(*pairs), on_cpu(*pairs))


def test_a_run_on_documents_that_another_failed_to_write_fails_too(
    served: Served, on_cpu: Callable[..., list[float]]
) -> None:
    """It was laid out meanwhile, on pages that hold nothing now."""
    entered, go = threading.Event(), threading.Event()

    def fail(_: object) -> None:
        entered.set()
        assert go.wait(60)
        raise DeviceError("the GPU stumbled")

    served.before["decoder.cuda"] = fail
    first = served.engine.begin(served.parts(("q", "a document")))
    assert entered.wait(60)
    second = served.engine.begin(served.parts(("r", "a document")))
    third = served.engine.begin(served.parts(("q", "another document")))
    del served.before["decoder.cuda"]
    go.set()
    with pytest.raises(DeviceError, match="the GPU stumbled"):
        first()
    with pytest.raises(DeviceError, match=r"the run failed that was to compute a document.*Score its pairs again"):
        second()
    assert_near(third(), on_cpu(("q", "another document")))
    assert_near(served.logits(("r", "a document")), on_cpu(("r", "a document")))


def test_who_still_has_a_document_that_was_never_written_has_it_computed(
    served: Served, on_cpu: Callable[..., list[float]]
) -> None:
    """As a schedule that looked it up while the run was on its way."""
    pair: Pair = ("q", "a document")
    (prepared,) = served.prepare(pair)
    entered, go = threading.Event(), threading.Event()

    def fail(_: object) -> None:
        entered.set()
        assert go.wait(60)
        raise DeviceError("the GPU stumbled")

    served.before["decoder.cuda"] = fail
    wait = served.engine.begin([Part(prepared.document, [prepared])])
    assert entered.wait(60)
    state = served.engine.find(prepared.document)
    assert state is not None
    del served.before["decoder.cuda"]
    go.set()
    with pytest.raises(DeviceError, match="the GPU stumbled"):
        wait()
    assert_near(served.engine.begin([Part(prepared.document, [prepared], state)])(), on_cpu(pair))


def test_a_schedule_goes_on_after_a_run_that_failed(served: Served, on_cpu: Callable[..., list[float]]) -> None:
    """With what waits: queries on a document that a failed run was to write are scored anew."""
    served.engine.rows = 30
    pairs: list[Pair] = [(f"query {i}", "a document") for i in range(8)]
    schedule = Schedule(served.engine)
    tickets = [schedule.add(one) for one in served.prepare(*pairs)]
    served.before["decoder.cuda"] = Stumbles(1)
    found: dict[int, Result] = {}
    failures = 0
    while len(schedule):
        try:
            found.update(schedule.step())
        except DeviceError:
            failures += 1
    assert 1 <= failures <= 2
    assert 0 < len(found) < len(pairs)
    expected = on_cpu(*pairs)
    assert_near(
        [found[ticket].logit for ticket in tickets if ticket in found],
        [logit for ticket, logit in zip(tickets, expected, strict=True) if ticket in found],
    )


class Kept:
    """An index that has one state for all documents."""

    path = "an index"

    def __init__(self, raw: Array) -> None:
        self._raw = raw

    def get(self, _: bytes) -> Array:
        return self._raw

    def prefetch(self, _: object) -> None:
        """It has it."""

    def touch(self, _: object) -> None:
        """It stays."""


def test_a_failed_write_of_a_kept_state_gives_no_scores(
    fp16: Path, on_cpu: Callable[..., list[float]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is copied from the store is waited for by nobody but the run that needs it."""
    served, pair = Served(fp16, "float16"), ("q", "a document")
    (prepared,) = served.prepare(pair)
    (state,) = served.engine.compute([prepared.document])
    raw = np.concatenate([part.reshape(-1).view(np.uint8) for part in state.buffers])
    store: Any = Kept(raw)
    served.engine.store = store

    def copy(*_: object) -> None:
        raise DeviceError("no copy")

    with monkeypatch.context() as patch:
        patch.setattr(served.device, "copy", copy)
        with pytest.raises(DeviceError, match="the run failed that was to compute"):
            served.logits(pair)
    assert served.num_held() == 0
    served.engine.store = None
    assert_near(served.logits(pair), on_cpu(pair), HALF)
    served.engine.close()


def test_an_answer_that_is_no_number_costs_its_pair_alone(served: Served, on_cpu: Callable[..., list[float]]) -> None:
    def spoil(outputs: Mapping[str, Array]) -> None:
        outputs["logit"][1] = math.nan

    served.after["head.cuda"] = spoil
    pairs: list[Pair] = [("q", "a document"), ("r", "another"), ("s", "a third")]
    found = served.results(pairs)
    assert "not a finite number" in str(found[1].error)
    assert math.isnan(found[1].score)
    assert_near([found[0].logit, found[2].logit], on_cpu(pairs[0], pairs[2]))


def test_two_threads_may_share_an_engine(serve: Callable[..., Served], on_cpu: Callable[..., list[float]]) -> None:
    """On the same documents, in a pool that does not hold them all."""
    served = serve(max_length=600, num_pages=12)
    pairs: list[Pair] = [(f"q{i}", f"{i % 9} {LONG[: 30 * (i % 9)]}") for i in range(18)] + [("q", IMAGES[1])]
    expected = on_cpu(*pairs)
    failed: list[BaseException] = []

    def work(turn: int) -> None:
        try:
            order = np.random.default_rng(turn).permutation(len(pairs))
            for _ in range(3):
                assert_near(served.logits(*[pairs[i] for i in order]), [expected[i] for i in order])
        except BaseException as error:  # told by the test
            failed.append(error)

    threads = [threading.Thread(target=work, args=(turn,)) for turn in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    served.forget()
    assert served.num_held() == 0


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_a_forked_child_is_told_that_it_has_no_gpu(served: Served) -> None:
    served.logits(("q", "a document"))
    parts = served.parts(("q", "a document"))
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            served.engine.begin(parts)
        except DeviceError as error:
            code = 0 if "Load the artifact in each process" in str(error) else 2
        finally:
            os._exit(code)
    assert os.waitpid(pid, 0)[1] == 0
    served.logits(("q", "a document"))


def test_closing_ends_the_engines_thread(fp32: Path) -> None:
    def working() -> list[str]:
        return [thread.name for thread in threading.enumerate() if thread.name.startswith("m0kit-gpu")]

    before = working()
    served = Served(fp32, "float32")
    served.logits(("q", "a document"))
    assert len(working()) == len(before) + 1
    served.engine.close()
    assert working() == before
