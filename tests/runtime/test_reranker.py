"""Scores depend on the pair alone, whatever the call around it; every name users know gives the same scores."""

import base64
import gc
import io
import math
import random
import re
import sys
import threading
import time
import warnings
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from inspect import Parameter, signature
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tests.alone import optional

from m0kit import Reranker, Result
from m0kit.artifact.ports import KV
from m0kit.errors import DependencyError, ImageError, InputError, M0kitError, ScoreError
from m0kit.keeping.cache import Cache
from m0kit.reranker import best_first
from m0kit.scoring import sessions
from m0kit.scoring.engine import GraphEngine, sigmoid
from m0kit.scoring.prepare import Document

if TYPE_CHECKING:
    from m0kit_parity.reference import Reference

torch = optional("torch")

# fp32 noise of another batch; the tiny model's scores of different pairs lie 1e-2 to 1 apart.
SAME = 1e-5
Make = Callable[..., Image.Image]


def png(image: Image.Image) -> bytes:
    out = io.BytesIO()
    image.save(out, "PNG")
    return out.getvalue()


@pytest.fixture(scope="module")
def pairs(picture: Make) -> list[Any]:
    """All four kinds, shared documents and images, long and short, cut seams."""
    pages = [picture(60, 90, 1), picture(150, 70, 2), png(picture(100, 100, 3))]
    long = "a paragraph that goes on and on, with facts: " + "the sea, the rain, the tide. " * 40
    return [
        ("slm markdown", "small language models write markdown"),
        ("slm markdown", "the weather in Oslo"),
        ("\nnewline first", "the weather in Oslo"),
        ("слово", long),
        ("slm markdown", long),
        ("slm markdown", pages[0]),
        ("another question", pages[0]),
        (pages[1], pages[0]),
        (pages[1], "a text for an image"),
        (pages[2], pages[1]),
        ({"image": pages[2]}, {"text": "a text for an image"}),
        {"query": "q", "document": "d"},
        (pages[0], pages[0]),
    ]


@pytest.fixture(scope="module")
def alone(reranker: Reranker, pairs: list[Any]) -> list[float]:
    """Each pair scored in a call of its own."""
    return [float(reranker.score([pair])[0]) for pair in pairs]


# --- what a score depends on -------------------------------------------------------------------------


def test_scores_are_the_references_and_differ_between_pairs(
    reranker: Reranker, reference: "Reference", pairs: list[Any], alone: list[float]
) -> None:
    assert np.abs(np.asarray(alone) - reference.score(pairs)).max() < 1e-4  # the tolerance of parity in fp32
    gaps = np.diff(np.sort(alone))
    assert np.ptp(alone) > 0.3
    assert gaps.min() > 2 * SAME  # so that a mixed-up order would show below


@settings(max_examples=25)
@given(st.lists(st.integers(0, 12), min_size=1, max_size=20))
def test_a_score_depends_on_neither_order_nor_company(
    reranker: Reranker, pairs: list[Any], alone: list[float], chosen: list[int]
) -> None:
    scores = reranker.score([pairs[i] for i in chosen])
    assert (scores.dtype, scores.shape) == (np.float32, (len(chosen),))
    np.testing.assert_allclose(scores, [alone[i] for i in chosen], atol=SAME, rtol=0)


def test_nor_on_a_company_of_hundreds(reranker: Reranker, pairs: list[Any], alone: list[float]) -> None:
    chosen = [i for i in range(len(pairs)) for _ in range(20)]
    random.Random(0).shuffle(chosen)
    np.testing.assert_allclose(reranker.score(pairs[i] for i in chosen), np.take(alone, chosen), atol=SAME, rtol=0)


def test_a_call_without_pairs_has_no_scores(reranker: Reranker) -> None:
    assert reranker.score([]).shape == (0,)
    assert reranker.evaluate([]) == []
    assert reranker.rank("q", []) == reranker.rerank("q", []) == reranker.compute_score([]) == []
    assert np.asarray(reranker.predict([])).shape == (0,)


def test_every_form_of_a_file_gives_one_score(reranker: Reranker, picture: Make, tmp_path: Path) -> None:
    image = picture(70, 50, 4)
    path = tmp_path / "page.png"
    path.write_bytes(png(image))
    uri = "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()
    forms = [image, path, path.read_bytes(), bytearray(path.read_bytes()), Image.open(path)]
    forms += [{"image": form} for form in [*forms, uri]]
    scores = reranker.score([("query", form) for form in forms])
    assert np.ptp(scores) <= SAME
    assert abs(scores[0] - reranker.score([("query", picture(70, 50, 5))])[0]) > 100 * SAME


def test_the_order_of_the_images_counts(reranker: Reranker, picture: Make) -> None:
    one, two = picture(60, 60, 1), picture(60, 60, 2)
    forward, back = reranker.score([(one, two), (two, one)])
    assert abs(forward - back) > 100 * SAME


def test_threads_share_a_reranker(reranker: Reranker, pairs: list[Any], alone: list[float]) -> None:
    seen: list[Any] = [None] * 4
    start = threading.Barrier(4)

    def work(number: int) -> None:
        start.wait()
        for _ in range(3):
            seen[number] = reranker.score(pairs[number:] + pairs[:number])

    workers = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    for number, scores in enumerate(seen):
        np.testing.assert_allclose(scores, alone[number:] + alone[:number], atol=SAME, rtol=0)


# --- work done once ----------------------------------------------------------------------------------


class Counting:
    """Opens graphs that note what they were given."""

    def __init__(self) -> None:
        self.runs: list[tuple[str, Mapping[str, Any]]] = []

    def __call__(self, folder: Path, name: str) -> sessions.Graph:
        inner = sessions.open_graph(folder, name, threads=1)

        class Noting:
            def run(_, feeds: Mapping[str, Any], outputs: Sequence[str]) -> dict[str, Any]:  # noqa: N805
                self.runs.append((name, feeds))
                return inner.run(feeds, outputs)

        return Noting()

    def rows(self, name: str, port: str) -> int:
        return sum(len(feeds[port]) for run, feeds in self.runs if run == name)


@pytest.fixture
def counting(unasked: Path) -> tuple[Reranker, Counting]:
    opener = Counting()
    return Reranker.load(unasked, open_graph=opener), opener


class Opening:
    """Opens graphs, slowly, and notes which."""

    def __init__(self) -> None:
        self.names: list[str] = []

    def __call__(self, folder: Path, name: str, /, *, also: Sequence[str] = ()) -> sessions.Graph:
        self.names.append(name)
        time.sleep(0.05)  # so that a second thread would come in between
        return sessions.open_graph(folder, name, threads=1, also=also)


def test_texts_alone_never_open_the_vision_encoder(artifact: Path, pairs: list[Any], alone: list[float]) -> None:
    opening = Opening()
    reranker = Reranker.load(artifact, open_graph=opening)
    np.testing.assert_allclose(reranker.score(pairs[:5]), alone[:5], atol=SAME, rtol=0)
    reranker.trace(pairs[0])
    reranker.evaluate([pairs[0], ("query", b"no image")])  # refused before it would be encoded
    assert sorted(opening.names) == ["decoder", "head"]
    for _ in range(2):
        np.testing.assert_allclose(reranker.score(pairs[4:7]), alone[4:7], atol=SAME, rtol=0)
    assert sorted(opening.names) == ["decoder", "head", "vision"]


def test_threads_that_come_first_together_open_each_graph_once(
    artifact: Path, pairs: list[Any], alone: list[float]
) -> None:
    opening = Opening()
    reranker = Reranker.load(artifact, open_graph=opening)
    start = threading.Barrier(4)

    def work(number: int) -> Any:
        start.wait()
        return reranker.score(pairs[5:7])

    with ThreadPoolExecutor(4) as pool:
        for scores in pool.map(work, range(4)):
            np.testing.assert_allclose(scores, alone[5:7], atol=SAME, rtol=0)
    assert sorted(opening.names) == ["decoder", "head", "vision"]


@pytest.mark.parametrize("asked", [False, True])
def test_low_memory_never_holds_vision_encoder_and_decoder_at_once(
    artifact: Path, unasked: Path, pairs: list[Any], alone: list[float], asked: bool
) -> None:
    alive: weakref.WeakValueDictionary[str, Any] = weakref.WeakValueDictionary()
    opened: list[str] = []

    class Held:
        def __init__(self, graph: sessions.Graph) -> None:
            self.run = graph.run

    def opener(folder: Path, name: str, /, *, also: Sequence[str] = ()) -> sessions.Graph:
        opened.append(name)
        assert not ({"vision", "decoder"} - {name}) & set(alive)
        assert name not in alive
        alive[name] = graph = Held(sessions.open_graph(folder, name, threads=1, also=also))
        return graph

    reranker = Reranker.load(artifact if asked else unasked, memory="low", open_graph=opener)
    assert opened == (["head", "decoder"] if asked else ["head"])
    if asked:  # the known answers with an image open each once more, the first time only
        opened.clear()
        reranker.score(pairs)
        assert opened == ["vision", "decoder"] * 2
    for _ in range(2):  # images are encoded before anything is decoded, so each is opened once a call
        opened.clear()
        np.testing.assert_allclose(reranker.score(pairs), alone, atol=SAME, rtol=0)
        assert opened == ["vision", "decoder"]
    reranker.score(pairs[:5])
    assert opened == ["vision", "decoder"]
    assert set(alive) == {"head", "decoder"}


def test_another_memory_is_refused(artifact: Path) -> None:
    with pytest.raises(ValueError, match='memory must be "fast" or "low", got \'tiny\''):
        Reranker.load(artifact, memory="tiny")  # type: ignore[arg-type]


def test_a_graph_that_could_not_be_opened_is_tried_again(artifact: Path, picture: Make, alone: list[float]) -> None:
    """A graph that did not open for want of memory must not leave the reranker in a state of its own."""
    opening, missing = Opening(), [True]

    def opener(folder: Path, name: str, /, *, also: Sequence[str] = ()) -> sessions.Graph:
        if name == "vision" and missing:
            missing.pop()
            raise M0kitError("no memory")
        return opening(folder, name, also=also)

    reranker = Reranker.load(artifact, open_graph=opener)
    with pytest.raises(M0kitError, match="no memory"):
        reranker.score([("slm markdown", picture(60, 90, 1))])
    score = reranker.score([("slm markdown", picture(60, 90, 1))])
    np.testing.assert_allclose(score, alone[5:6], atol=SAME, rtol=0)


def test_an_image_is_encoded_once_per_call(counting: tuple[Reranker, Counting], picture: Make) -> None:
    reranker, graphs = counting
    image, other = picture(56, 84), picture(56, 56)
    raw = png(image)
    reranker.score([(f"query number {i}", image) for i in range(30)])
    assert graphs.rows("vision", "patches") == 4 * 6
    graphs.runs.clear()
    # An object and files, read again and again: the same pixels are one picture.
    reranker.score([("a", raw), (image, "text " * 400), ("b", bytes(bytearray(raw))), (other, image), (image, image)])
    assert graphs.rows("vision", "patches") == 4 * 6 + 4 * 4
    graphs.runs.clear()
    reranker.score([("a", image)])
    assert graphs.rows("vision", "patches") == 4 * 6  # nothing is kept between calls


def test_a_document_is_read_once_for_its_queries(counting: tuple[Reranker, Counting]) -> None:
    reranker, graphs = counting
    document = "the tide comes in and goes out again " * 10
    reranker.score([("zebra", document)])
    one = graphs.rows("decoder", "token_ids")
    graphs.runs.clear()
    reranker.score([("zebra", document)] * 5)
    assert graphs.rows("decoder", "token_ids") < one + 5 * 20
    assert len([name for name, _ in graphs.runs if name == "decoder"]) == 1


class Gathering:
    """Opens graphs whose decoder computes no state before so many threads have asked the cache for one."""

    def __init__(self, count: int, failing: bool = False) -> None:
        self.count, self.failing = count, failing
        self.asked = threading.Semaphore(0)
        self.states: list[int] = []  # rows of each run that makes states

    def __call__(self, folder: Path, name: str, /, *, also: Sequence[str] = ()) -> sessions.Graph:
        inner, gathering = sessions.open_graph(folder, name, threads=1, also=also), self

        class Graph:
            def run(self, feeds: Mapping[str, Any], outputs: Sequence[str]) -> dict[str, Any]:
                if "present.0.key" in outputs:
                    for _ in range(gathering.count):
                        gathering.asked.acquire()
                    gathering.asked.release(gathering.count)
                    gathering.states.append(len(feeds["token_ids"]))
                    if gathering.failing and len(gathering.states) == 1:
                        raise M0kitError("no memory")
                return inner.run(feeds, outputs)

        return Graph()

    def cache(self) -> Cache:
        asked = self.asked

        class Asked(Cache):
            def get(self, key: Any) -> Any:
                value = super().get(key)
                asked.release()
                return value

        return Asked(1 << 26)


@pytest.mark.parametrize("memory", ["fast", "low"])
def test_a_new_document_that_several_threads_ask_about_is_computed_once(
    artifact: Path, unasked: Path, memory: Any
) -> None:
    gathering = Gathering(4)
    reranker = Reranker.load(unasked, cache_bytes=1 << 26, memory=memory, open_graph=gathering)
    reranker.cache = gathering.cache()
    document = "the tide comes in and goes out again " * 10
    with ThreadPoolExecutor(4) as pool:
        scores = list(pool.map(lambda i: reranker.score([(f"query {i}", document)])[0], range(4)))
    assert len(gathering.states) == 1
    expected = Reranker.load(artifact, threads=1).score([(f"query {i}", document) for i in range(4)])
    np.testing.assert_allclose(scores, expected, atol=SAME, rtol=0)


def test_a_thread_that_fails_leaves_the_others_their_document(artifact: Path, unasked: Path) -> None:
    gathering = Gathering(4, failing=True)
    reranker = Reranker.load(unasked, cache_bytes=1 << 26, open_graph=gathering)
    reranker.cache = gathering.cache()

    def work(number: int) -> Any:
        try:
            return float(reranker.score([(f"query {number}", "the tide")])[0])
        except M0kitError as error:
            return str(error)

    with ThreadPoolExecutor(4) as pool:
        outcomes = list(pool.map(work, range(4)))
    assert outcomes.count("no memory") == 1
    assert len(gathering.states) == 2
    assert all(0 < outcome < 1 for outcome in outcomes if isinstance(outcome, float))


def test_low_memory_fetches_a_kept_state_once(artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reranker = Reranker.load(artifact, threads=1, memory="low", cache_bytes=1 << 26)
    pairs = [(f"query {i}", f"document {i % 3}") for i in range(6)]
    expected = reranker.score(pairs)
    fetched: Counter[bytes] = Counter()
    find = GraphEngine.find

    def counted(self: GraphEngine, document: Document) -> Any:
        fetched[document.key] += 1
        return find(self, document)

    monkeypatch.setattr(GraphEngine, "find", counted)
    np.testing.assert_array_equal(reranker.score(pairs), expected)
    assert sorted(fetched.values()) == [1, 1, 1]


def test_images_made_on_the_fly_are_not_mistaken_for_each_other(reranker: Reranker, picture: Make) -> None:
    """A lazy data set makes an image when it is asked for; once freed, its identity may be given to the next."""
    made: list[weakref.ref[Image.Image]] = []

    class Lazy(Mapping[str, Any]):
        def __init__(self, seed: int) -> None:
            self.seed = seed

        def __getitem__(self, key: str) -> Any:
            if key == "query":
                return "query"
            assert all(ref() is not None for ref in made)
            image = picture(56, 56, self.seed)
            made.append(weakref.ref(image))
            return image

        def __iter__(self) -> Iterator[str]:
            return iter(("query", "document"))

        def __len__(self) -> int:
            return 2

    expected = [reranker.score([("query", picture(56, 56, seed))])[0] for seed in range(8)]
    np.testing.assert_allclose(reranker.score([Lazy(seed) for seed in range(8)]), expected, atol=SAME, rtol=0)
    assert len(made) == 8
    gc.collect()
    assert all(ref() is None for ref in made)  # and none is kept after the call


def test_generators_are_read_once(reranker: Reranker, pairs: list[Any], alone: list[float]) -> None:
    np.testing.assert_allclose(reranker.score(iter(pairs[:3])), alone[:3], atol=SAME, rtol=0)


# --- what cannot be scored, or only in part ----------------------------------------------------------


def test_a_bad_pair_is_marked_and_costs_the_others_nothing(
    reranker: Reranker, pairs: list[Any], alone: list[float]
) -> None:
    bad = [("", "d"), ("q", b"no image"), ("only one",), None]
    results = reranker.evaluate([pairs[0], bad[0], pairs[7], bad[1], bad[2], pairs[5], bad[3]])
    good = {0: 0, 2: 7, 5: 5}
    for position, result in enumerate(results):
        if position in good:
            assert result.error is None
            assert abs(result.score - alone[good[position]]) <= SAME
        else:
            assert isinstance(result.error, InputError)
            assert str(result.error).startswith(f"pair {position}: ")
            assert math.isnan(result.score)
            assert math.isnan(result.logit)
            assert result.truncated == ()
    assert isinstance(results[3].error, ImageError)


def test_a_bad_pair_raises_before_anything_is_run(counting: tuple[Reranker, Counting], pairs: list[Any]) -> None:
    reranker, graphs = counting
    with pytest.raises(InputError, match=r"^pair 3: query: is empty"):
        reranker.evaluate([*pairs[5:8], ("", "d")], on_error="raise")
    for call in (reranker.score, reranker.predict, reranker.compute_score):
        with pytest.raises(InputError, match=r"^pair 1: "):
            call([pairs[0], ("q", "")])
    assert graphs.runs == []


def test_score_marks_with_nan_and_warns(reranker: Reranker, alone: list[float], pairs: list[Any]) -> None:
    with pytest.warns(UserWarning, match=r"^not scored: pair 1: document: is empty") as caught:
        scores = reranker.score([pairs[0], ("q", "")], on_error="mark")
    assert len(caught) == 1
    assert caught[0].filename == __file__
    assert np.isnan(scores).tolist() == [False, True]


@pytest.fixture(scope="module")
def short(artifact: Path) -> Reranker:
    """A document may have 512 tokens, a prompt 1024."""
    return Reranker.load(artifact, threads=1, max_length=1024)


def test_what_is_cut_is_said(short: Reranker) -> None:
    fits, cut = "z" * 512, "z" * 513
    pairs = [("q", fits), ("q", cut), ("q" * 600, cut), ("q" * 1200, "d"), ("q", "d")]
    results = short.evaluate(pairs)
    said = [(), ("document",), ("document", "query"), ("query",), ()]
    assert [result.truncated for result in results] == said
    assert all(0 < result.score < 1 for result in results)
    with pytest.warns(UserWarning, match="was too long and was cut") as caught:
        short.score(pairs)
    assert [str(w.message) for w in caught] == [
        f"pair {i}: the {what} was too long and was cut" for i, names in enumerate(said) for what in names
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        short.score([pairs[0], pairs[4]])


def test_a_cut_changes_nothing_before_it(short: Reranker) -> None:
    results = short.evaluate([("q" * 1200, "d"), ("q" * 1200 + " and more", "d"), ("q" * 900, "d")])
    assert results[0].score == pytest.approx(results[1].score, abs=SAME)
    assert abs(results[0].score - results[2].score) > 10 * SAME


def test_an_image_too_large_for_the_prompt_is_refused_and_max_pixels_cures_it(
    short: Reranker, artifact: Path, picture: Make
) -> None:
    page = picture(784, 768 // 28 * 28, 3)
    said = r"^pair 0: its images take 15\d\d visual tokens.* 1024 tokens\. Lower max_pixels"
    with pytest.raises(InputError, match=said):
        short.score([(page, picture(784, 756, 9))])
    small = Reranker.load(artifact, max_length=1024, max_pixels=100 * 784)
    assert short.evaluate([("q", page)])[0].error is None
    assert small.evaluate([(page, picture(784, 756, 9))])[0].error is None
    (thw,) = small.trace(("q", page)).grid_thw.tolist()
    assert thw[0] == 1
    assert 60 < thw[1] * thw[2] // 4 <= 100


@pytest.mark.parametrize(
    ("limits", "said"),
    [
        ({"max_pixels": 3135}, r"min_pixels \(3136\) must not exceed max_pixels \(3135\)"),
        ({"max_length": 1023}, r"document limit \(512\) \+ query limit \(512\) must not exceed max_length \(1023\)"),
        ({"max_length": 0}, "max_length"),
    ],
)
def test_limits_that_the_model_cannot_have_are_refused(artifact: Path, limits: dict[str, int], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Reranker.load(artifact, **limits)  # type: ignore[arg-type]


# --- the names users know ----------------------------------------------------------------------------

DOCUMENTS = ["the weather in Oslo", "small language models write markdown", "a", "the tide comes in"]


@pytest.fixture(scope="module")
def expected(reranker: Reranker) -> list[float]:
    return [float(s) for s in reranker.score([("slm markdown", document) for document in DOCUMENTS])]


@pytest.fixture(scope="module")
def order(expected: list[float]) -> list[int]:
    order = sorted(range(4), key=lambda i: -expected[i])
    assert order != list(range(4))
    return order


def test_raw_scores_are_logits(reranker: Reranker, expected: list[float]) -> None:
    logits = reranker.score([("slm markdown", document) for document in DOCUMENTS], raw=True)
    assert logits.dtype == np.float32
    np.testing.assert_allclose(1 / (1 + np.exp(-(logits.astype(np.float64) - 2.65))), expected, atol=1e-6)
    assert np.abs(logits - expected).max() > 0.1


@pytest.mark.parametrize("value", [-1e4, -740.0, -40.0, -36.5, -5.0, 0.0, 7.0, 36.0, 800.0, 1e4])
def test_a_sigmoid_neither_overflows_nor_loses_its_tail(value: float) -> None:
    wide = 1 / (1 + np.exp(-np.longdouble(value)))
    assert sigmoid(value) == pytest.approx(float(wide), rel=1e-15, abs=0)  # four roundings of a double


class Answering:
    """Opens graphs whose head gives the logits in `queue`, and all else what it really gives."""

    def __init__(self, logits: Sequence[float]) -> None:
        self.queue = list(logits)

    def __call__(self, folder: Path, name: str, /, *, also: Sequence[str] = ()) -> sessions.Graph:
        inner, answering = sessions.open_graph(folder, name, threads=1, also=also), self

        class Graph:
            def run(self, feeds: Mapping[str, Any], outputs: Sequence[str]) -> dict[str, Any]:
                out = inner.run(feeds, outputs)
                if name == "head":
                    count = min(len(answering.queue), len(out["logit"]))
                    out["logit"][:count] = [answering.queue.pop(0) for _ in range(count)]
                return out

        return Graph()


def test_pairs_whose_scores_are_equal_to_rounding_are_ranked_by_their_logits(artifact: Path, unasked: Path) -> None:
    logits = [60.0, 70.0, -150.0, 65.0, -140.0, 5.0]
    order = [1, 3, 0, 5, 4, 2]
    documents = [f"document {i}" for i in range(6)]
    for name, index in (("rank", "corpus_id"), ("rerank", "index")):
        reranker = Reranker.load(unasked, open_graph=Answering(logits))
        assert [hit[index] for hit in getattr(reranker, name)("q", documents)] == order
    assert best_first([*logits, math.nan]) == [*order, 6]


# --- numbers that are none ---------------------------------------------------------------------------


class Overflowing:
    """Opens graphs one of which gives `value` for a marked input: an image of so many patches, or that token."""

    def __init__(self, graph: str, value: float, marked: int) -> None:
        self.graph, self.value, self.marked = graph, value, marked

    def __call__(self, folder: Path, name: str, /, *, also: Sequence[str] = ()) -> sessions.Graph:
        inner, overflowing = sessions.open_graph(folder, name, threads=1, also=also), self

        class Graph:
            def run(self, feeds: Mapping[str, Any], outputs: Sequence[str]) -> dict[str, Any]:
                out = {key: np.array(value) for key, value in inner.run(feeds, outputs).items()}
                if name.startswith(overflowing.graph):
                    overflowing.spoil(feeds, out)
                return out

        return Graph()

    def spoil(self, feeds: Mapping[str, Any], out: dict[str, Any]) -> None:
        if self.graph == "vision":
            for first, last in feeds["images"]:
                if last - first == self.marked:
                    out["image_embeds"][first // 4] = self.value
            return
        (rows,) = np.nonzero(feeds["token_ids"] == self.marked)
        with np.errstate(over="ignore"):
            for name, value in out.items():
                if name == "hidden":
                    value[np.isin(feeds["last_index"], rows + 1)] = self.value
                else:  # present.0.key
                    value[:, rows] = self.value


@pytest.fixture(scope="module")
def mark(reranker: Reranker) -> int:
    """The token that "~" is."""
    return int(reranker.trace(("~", "d")).token_ids[-2])


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("memory", ["fast", "low"])
def test_a_logit_that_is_not_finite_is_an_error_of_its_pair(
    artifact: Path, unasked: Path, reranker: Reranker, mark: int, value: float, memory: Any
) -> None:
    pairs = [("good", "the tide"), ("bad ~", "the tide"), ("good", "another"), ("bad ~", "another")]
    expected = reranker.score([pairs[0], pairs[2]])
    overflowing = Reranker.load(unasked, memory=memory, open_graph=Overflowing("decoder", value, mark))
    results = overflowing.evaluate(pairs)
    for i in (1, 3):
        assert type(results[i].error) is ScoreError
        assert re.match(rf"^pair {i}: the model's answer is not a finite number\. .*fp32", str(results[i].error))
        assert math.isnan(results[i].score)
        assert math.isnan(results[i].logit)
    np.testing.assert_allclose([results[0].score, results[2].score], expected, atol=SAME, rtol=0)
    with pytest.warns(UserWarning, match=r"not scored: pair [13]: the model's answer"):
        scores = overflowing.score(pairs, on_error="mark")
    assert np.isnan(scores).tolist() == [False, True, False, True]
    for call in (
        overflowing.score,
        overflowing.predict,
        overflowing.compute_score,
        lambda pairs: list(overflowing.stream(pairs, on_error="raise")),
        lambda _: overflowing.rank("bad ~", ["the tide"]),
        lambda _: overflowing.rerank("bad ~", ["the tide"]),
    ):
        with pytest.raises(ScoreError, match="not a finite number"):
            call(pairs)
    trace = overflowing.trace(pairs[1])
    assert type(trace.error) is ScoreError
    assert not np.isfinite(trace.hidden).all()
    assert math.isnan(trace.score)
    assert overflowing.trace(pairs[0]).error is None


@pytest.mark.parametrize("kv", KV)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_state_that_is_not_finite_is_never_kept(
    artifact: Path, unasked: Path, mark: int, kv: Any, value: float
) -> None:
    opener = Overflowing("decoder", value, mark)
    kept = Reranker.load(unasked, kv=kv, cache_bytes=1 << 26, open_graph=opener)
    expected = Reranker.load(artifact, kv=kv, threads=1).evaluate([("q", "a good one")])[0]
    for _ in range(2):
        bad, good = kept.evaluate([("q", "a bad one ~"), ("q", "a good one")])
        assert type(bad.error) is ScoreError
        assert re.match(rf"^pair 0: what is kept of the document \(keys and values in {kv}\) is not", str(bad.error))
        assert good == expected
        assert len(kept.cache) == 1  # type: ignore[arg-type]


def test_what_fp16_cannot_hold_is_an_error_and_fp32_can(artifact: Path, unasked: Path, mark: int) -> None:
    pair, opener = ("q", "a document ~"), Overflowing("decoder", 1e5, mark)
    (bad,) = Reranker.load(unasked, kv="fp16", open_graph=opener).evaluate([pair])
    assert type(bad.error) is ScoreError
    (good,) = Reranker.load(unasked, cache_bytes=1 << 26, open_graph=opener).evaluate([pair])
    assert good.error is None


def test_an_image_that_overflows_costs_itself_alone_and_is_not_kept(
    artifact: Path, unasked: Path, picture: Make
) -> None:
    bad, good = picture(56, 84), picture(56, 56)
    for options in ({}, {"cache_bytes": 1 << 26}):
        reranker = Reranker.load(unasked, open_graph=Overflowing("vision", math.nan, 24), **options)  # type: ignore[arg-type]
        results = reranker.evaluate([("q", bad), ("q", good), (good, bad), ("q", "a text")])
        assert [type(result.error) for result in results] == [ScoreError, type(None), ScoreError, type(None)]
        expected = Reranker.load(artifact, threads=1).score([("q", good), ("q", "a text")])
        np.testing.assert_allclose([results[1].score, results[3].score], expected, atol=SAME, rtol=0)
    assert reranker.cache is not None
    assert len(reranker.cache) == 3  # two documents, one image


# --- what was cut is said of the pair it was cut from -------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"cache_bytes": 1 << 26}, {"kv": "fp16"}], ids=str)
@pytest.mark.parametrize("turn", [1, -1])
def test_a_whole_document_is_not_called_cut_nor_a_cut_one_whole(
    artifact: Path, options: dict[str, Any], turn: int
) -> None:
    """Their prefixes are equal, so they share a state."""
    short = Reranker.load(artifact, threads=1, max_length=1024, **options)
    whole, cut = "z" * 512, "z" * 513
    pairs = [("q", whole), ("\nq", whole), ("q", cut), ("\nq", cut), ("q", "é"), ("q", "e\u0301")][::turn]
    said = [(), (), ("document",), ("document",), (), ()][::turn]
    for _ in range(2):
        results = short.evaluate(pairs)
        assert [result.truncated for result in results] == said
        alone = [short.evaluate([pair])[0] for pair in pairs]
        assert [result.truncated for result in alone] == said
        np.testing.assert_allclose([r.score for r in results], [r.score for r in alone], atol=SAME, rtol=0)


def test_a_result_that_is_missing_is_never_passed_over(reranker: Reranker, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = Reranker.stream
    monkeypatch.setattr(Reranker, "stream", lambda *args, **options: list(stream(*args, **options))[:-1])
    with pytest.raises(AssertionError):
        reranker.evaluate([("q", "d"), ("q", "e")])


def test_predict_takes_a_list_or_a_single_pair(reranker: Reranker, expected: list[float], picture: Make) -> None:
    scores = reranker.predict([("slm markdown", document) for document in DOCUMENTS], batch_size=1)
    assert isinstance(scores, np.ndarray)
    np.testing.assert_allclose(scores, expected, atol=SAME, rtol=0)
    image = picture(56, 56)
    for pair in (
        ("slm markdown", DOCUMENTS[1]),
        ["slm markdown", DOCUMENTS[1]],
        ({"text": "slm markdown"}, {"text": DOCUMENTS[1]}),
        {"query": "slm markdown", "document": DOCUMENTS[1]},
    ):
        one, many = reranker.predict(pair), reranker.predict([pair])  # type: ignore[arg-type]
        assert isinstance(one, np.float32)
        assert float(one) == pytest.approx(expected[1], abs=SAME)
        assert isinstance(many, np.ndarray)
        assert many.shape == (1,)
    assert isinstance(reranker.predict((image, "text")), np.float32)


# sentence-transformers 6.2.0, CrossEncoder: names in order, with their defaults.
PREDICT = {
    "inputs": Parameter.empty, "prompt_name": None, "prompt": None, "batch_size": 32, "show_progress_bar": None,
    "activation_fn": None, "apply_softmax": False, "convert_to_numpy": True, "convert_to_tensor": False,
    "device": None, "pool": None, "chunk_size": None, "kwargs": Parameter.empty,
}  # fmt: skip
RANK = {
    "query": Parameter.empty, "documents": Parameter.empty, "top_k": None, "return_documents": False,
    "prompt_name": None, "prompt": None, "batch_size": 32, "show_progress_bar": None, "activation_fn": None,
    "device": None, "pool": None, "chunk_size": None,
}  # fmt: skip


@pytest.mark.parametrize(("name", "theirs"), [("predict", PREDICT), ("rank", RANK)])
def test_the_arguments_are_cross_encoders(name: str, theirs: dict[str, Any]) -> None:
    ours = dict(signature(getattr(Reranker, name)).parameters)
    assert ours.pop("older").kind is Parameter.VAR_KEYWORD
    del ours["self"]
    named = {key: default for key, default in theirs.items() if key != "kwargs"}
    assert list(ours) == list(named)
    for key, default in named.items():
        assert default is Parameter.empty or ours[key].default == default, key


@pytest.mark.parametrize(("name", "written"), [("predict", PREDICT), ("rank", RANK)])
def test_the_arguments_written_down_here_are_those_of_the_package(name: str, written: dict[str, Any]) -> None:
    theirs = pytest.importorskip("sentence_transformers", minversion="6.2").CrossEncoder
    found = dict(signature(getattr(theirs, name)).parameters)
    del found["self"]
    assert {key: parameter.default for key, parameter in found.items()} == written


def test_arguments_without_an_effect_have_none(reranker: Reranker, expected: list[float], order: list[int]) -> None:
    pairs = [("slm markdown", document) for document in DOCUMENTS]
    common: dict[str, Any] = {"batch_size": 1, "chunk_size": 7, "num_workers": 2, "show_progress_bar": False}
    for device in ("cpu", "cpu:0", torch.device("cpu")):
        scores = reranker.predict(pairs, None, None, apply_softmax=True, pool=None, device=device, **common)
        np.testing.assert_allclose(scores, expected, atol=SAME, rtol=0)
    common |= dict.fromkeys(("apply_softmax", "convert_to_numpy", "convert_to_tensor"), True)
    assert [hit["corpus_id"] for hit in reranker.rank("slm markdown", DOCUMENTS, **common)] == order


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ({"prompt": "Rank: "}, r"prompt: got 'Rank: '; the prompt is the published one"),
        ({"prompt_name": "query"}, r"prompt_name: got 'query'"),
        ({"pool": {"input": 1}}, r"pool: m0kit starts no processes"),
        ({"device": "cuda:1"}, r"device: got 'cuda:1', but this one was loaded on 'cpu'"),
        ({"device": ["cpu", "cpu"]}, r"device: got \['cpu', 'cpu'\]"),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_name(reranker: Reranker, option: dict[str, Any], said: str) -> None:
    for call in (partial(reranker.predict, [("q", "d")]), partial(reranker.rank, "q", ["d"])):
        with pytest.raises(ValueError, match=f"^{said}"):
            call(**option)
        with pytest.raises(TypeError, match=r"got an unexpected argument 'processing_kwargs'"):
            call(processing_kwargs={})


def test_predict_takes_arrays_generators_and_the_older_name(reranker: Reranker, expected: list[float]) -> None:
    pairs = [("slm markdown", document) for document in DOCUMENTS]
    objects = np.empty((4, 2), object)
    objects[:] = pairs
    for form in (np.array(pairs), objects, (pair for pair in pairs), map(list, pairs), [np.array(p) for p in pairs]):
        scores = reranker.predict(form)
        assert (scores.dtype, scores.shape) == (np.float32, (4,))
        np.testing.assert_allclose(scores, expected, atol=SAME, rtol=0)
    np.testing.assert_allclose(reranker.predict(sentences=pairs), expected, atol=SAME, rtol=0)
    np.testing.assert_allclose(reranker.score(np.array(pairs)), expected, atol=SAME, rtol=0)
    assert reranker.predict(np.array(pairs[0])) == pytest.approx(expected[0], abs=SAME)
    assert [hit["corpus_id"] for hit in reranker.rank("slm markdown", np.array(DOCUMENTS))] == best_first(expected)
    assert [hit["index"] for hit in reranker.rerank("slm markdown", iter(DOCUMENTS))] == best_first(expected)


def test_an_activation_is_applied_to_the_logits(
    reranker: Reranker, order: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    pairs = [("slm markdown", document) for document in DOCUMENTS]
    logits = reranker.score(pairs, raw=True)
    for name in ("activation_fn", "activation_fct"):
        np.testing.assert_array_equal(reranker.predict(pairs, **{name: torch.nn.Identity()}), logits)
    one = reranker.predict(pairs[0], activation_fn=torch.nn.Tanh())
    assert one == pytest.approx(np.tanh(logits[0]), abs=1e-6)  # another shape of products and another tanh
    weighted = reranker.predict(pairs, activation_fn=torch.nn.PReLU(init=2.0))  # has a gradient
    np.testing.assert_allclose(weighted, np.where(logits < 0, 2 * logits, logits))
    turned = reranker.rank("slm markdown", DOCUMENTS, activation_fn=lambda x: -x)
    assert [hit["corpus_id"] for hit in turned] == order[::-1]
    assert [hit["score"] for hit in turned] == [-logits[i] for i in order[::-1]]
    with pytest.raises(ValueError, match=r"^activation_fn: made shape \(\) of logits \(4, 1\)"):
        reranker.predict(pairs, activation_fn=lambda x: x.sum())
    monkeypatch.delitem(sys.modules, "torch")
    seen = reranker.predict(pairs, activation_fn=lambda x: x + 1 if type(x) is np.ndarray else x)
    np.testing.assert_array_equal(seen, logits + 1)


def test_tensors_are_given_where_asked_for_and_where_pytorch_is(
    reranker: Reranker, expected: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    pairs = [("slm markdown", document) for document in DOCUMENTS]
    tensor = reranker.predict(pairs, convert_to_tensor=True, convert_to_numpy=False)
    assert (type(tensor), tensor.dtype, tuple(tensor.shape)) == (torch.Tensor, torch.float32, (4,))
    np.testing.assert_allclose(tensor.numpy(), expected, atol=SAME, rtol=0)
    many = reranker.predict(pairs, convert_to_numpy=False)
    assert [type(one) for one in many] == [torch.Tensor] * 4
    assert torch.equal(torch.stack(many), tensor)
    one = reranker.predict(pairs[0], convert_to_tensor=True)
    assert (type(one), one.dim()) == (torch.Tensor, 0)
    assert tuple(reranker.predict([], convert_to_tensor=True).shape) == (0,)
    monkeypatch.setitem(sys.modules, "torch", None)
    for options in ({"convert_to_tensor": True}, {"convert_to_numpy": False}):
        with pytest.raises(DependencyError, match=r"need PyTorch\. pip install torch, or leave them out"):
            reranker.predict(pairs, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize(("top", "count"), [(None, 4), (0, 0), (1, 1), (4, 4), (9, 4), (np.int64(2), 2)])
def test_a_ranking_is_as_long_as_asked_for(reranker: Reranker, order: list[int], top: Any, count: int) -> None:
    assert [hit["corpus_id"] for hit in reranker.rank("slm markdown", DOCUMENTS, top)] == order[:count]
    assert [hit["index"] for hit in reranker.rerank("slm markdown", DOCUMENTS, top)] == order[:count]


def test_a_negative_length_is_refused(reranker: Reranker) -> None:
    """Python's slices would leave out the worst one."""
    with pytest.raises(ValueError, match=r"^top_k: got -1, expected None for all, or how many"):
        reranker.rank("q", DOCUMENTS, top_k=-1)
    with pytest.raises(ValueError, match=r"^top_n: got -1, expected None for all, or how many"):
        reranker.rerank("q", DOCUMENTS, top_n=-1)


def test_rank_has_cross_encoders_names(reranker: Reranker, expected: list[float], order: list[int]) -> None:
    ranked = reranker.rank("slm markdown", DOCUMENTS)
    assert [hit["corpus_id"] for hit in ranked] == order
    assert [set(hit) for hit in ranked] == [{"corpus_id", "score"}] * 4
    assert all(hit["score"] == pytest.approx(expected[hit["corpus_id"]], abs=SAME) for hit in ranked)
    assert {type(hit["score"]) for hit in ranked} == {float}
    top = reranker.rank("slm markdown", DOCUMENTS, top_k=2, return_documents=True, batch_size=8)
    assert [(hit["corpus_id"], hit["text"]) for hit in top] == [(i, DOCUMENTS[i]) for i in order[:2]]


def test_rerank_has_jinas_and_coheres_names(reranker: Reranker, expected: list[float], order: list[int]) -> None:
    ranked = reranker.rerank("slm markdown", DOCUMENTS)
    assert [(hit["index"], hit["document"]) for hit in ranked] == [(i, DOCUMENTS[i]) for i in order]
    assert all(type(hit["relevance_score"]) is float for hit in ranked)
    assert [hit["relevance_score"] for hit in ranked] == pytest.approx([expected[i] for i in order], abs=SAME)
    bare = reranker.rerank("slm markdown", DOCUMENTS, top_n=3, return_documents=False)
    assert [hit["index"] for hit in bare] == order[:3]
    assert set(bare[0]) == {"index", "relevance_score"}


def test_equal_scores_keep_their_order(reranker: Reranker) -> None:
    assert [hit["index"] for hit in reranker.rerank("q", ["same"] * 5)] == [0, 1, 2, 3, 4]


def test_compute_score_is_the_model_cards(
    reranker: Reranker, expected: list[float], picture: Make, tmp_path: Path
) -> None:
    one = reranker.compute_score(["slm markdown", DOCUMENTS[0]])
    assert type(one) is float
    assert one == pytest.approx(expected[0], abs=SAME)
    many = reranker.compute_score([["slm markdown", document] for document in DOCUMENTS])
    assert isinstance(many, list)
    assert {type(score) for score in many} == {float}
    assert many == pytest.approx(expected, abs=SAME)
    path = tmp_path / "page.png"
    picture(60, 80).save(path)
    wanted = [float(s) for s in reranker.score([("q", path), (path, "q"), (path, path)])]
    got = [
        reranker.compute_score(["q", str(path)], doc_type="image"),
        reranker.compute_score([str(path), "q"], query_type="image"),
        reranker.compute_score([[str(path), picture(60, 80)]], query_type="image", doc_type="image")[0],  # type: ignore[index]
    ]
    assert got == pytest.approx(wanted, abs=SAME)
    as_text = reranker.compute_score(["q", str(path)])
    assert as_text != pytest.approx(wanted[0], abs=100 * SAME)


def test_compute_score_takes_the_cards_limits_for_one_call(reranker: Reranker, short: Reranker) -> None:
    pairs = [["a", "z" * 600], ["another", DOCUMENTS[0]]]
    whole = reranker.compute_score(pairs)
    with pytest.warns(UserWarning, match="pair 0: the document was too long and was cut"):
        cut = reranker.compute_score(pairs, max_length=1024)
    with pytest.warns(UserWarning, match="pair 0: the document was too long and was cut"):
        assert cut == pytest.approx(short.score(pairs).tolist(), abs=SAME)
    assert abs(cut[0] - whole[0]) > 10 * SAME  # type: ignore[index]
    assert reranker.compute_score(pairs, batch_size=1) == whole, "the call left no limit behind"
    with pytest.warns(UserWarning, match="pair 0: the document"):  # 96 − 48 tokens for it, the header besides
        reranker.compute_score([["a", "z" * 49]], max_length=96, max_query_length=48)
    with pytest.raises(ValueError, match="must not exceed max_length"):
        reranker.compute_score(pairs, max_length=64)


def test_compute_score_takes_pairs_by_name_and_names_bad_ones(reranker: Reranker, expected: list[float]) -> None:
    pair = {"query": "slm markdown", "document": DOCUMENTS[0]}
    assert reranker.compute_score([pair, pair]) == pytest.approx([expected[0]] * 2, abs=SAME)
    assert reranker.compute_score(pair) == pytest.approx(expected[0], abs=SAME)  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"^pair 1: expected \(query, document\), got 3 items"):
        reranker.compute_score([["q", "d"], ["q", "d", "x"]])
    with pytest.raises(InputError, match=r"^pair 0: document: .*nowhere\.png: No such file"):
        reranker.compute_score([["q", "nowhere.png"]], doc_type="image")


@pytest.mark.parametrize("argument", [("q",), "qd", ["q"], ("q", "d", "x"), {"query": "q"}, {"text": "q"}])
def test_a_single_pair_of_another_shape_is_an_input_error(reranker: Reranker, argument: Any) -> None:
    for call in (reranker.predict, reranker.compute_score):
        with pytest.raises(InputError, match=r"^pair 0: "):
            call(argument)


# --- the trace ---------------------------------------------------------------------------------------


def test_a_trace_shows_every_stage_of_a_score(reranker: Reranker, pairs: list[Any], alone: list[float]) -> None:
    kinds: Counter[int] = Counter()
    for pair, score in zip(pairs, alone, strict=True):
        trace = reranker.trace(pair)
        config = reranker.config
        kinds[len(trace.patches)] += 1
        assert trace.score == pytest.approx(score, abs=SAME)
        assert trace.score == pytest.approx(1 / (1 + math.exp(2.65 - trace.logit)), abs=1e-9)
        assert trace.token_ids[-1] == config.prompt.score_token_id
        assert trace.positions.shape == (3, len(trace.token_ids))
        assert trace.hidden.shape == (config.decoder.hidden_size,)
        assert trace.grid_thw.shape == (len(trace.patches), 3)
        pads = 0
        for patches, grid, embeds in zip(trace.patches, trace.grid_thw, trace.image_embeds, strict=True):
            assert patches.shape == (grid.prod(), 1176)
            assert embeds.shape == (grid.prod() // 4, config.decoder.hidden_size)
            pads += len(embeds)
        assert (trace.token_ids == config.prompt.image_pad_id).sum() == pads
    assert set(kinds) == {0, 1, 2}


def test_a_trace_has_the_documents_image_first(reranker: Reranker, picture: Make) -> None:
    query, document = picture(56, 84), picture(84, 56)
    assert reranker.trace((query, document)).grid_thw.tolist() == [[1, 6, 4], [1, 4, 6]]


def test_a_trace_of_a_bad_pair_raises(reranker: Reranker) -> None:
    with pytest.raises(InputError, match=r"^pair 0: query: is empty"):
        reranker.trace(("", "d"))


def test_another_engine_can_run_the_graphs(artifact: Path, unasked: Path, alone: list[float], pairs: list[Any]) -> None:
    opener = partial(sessions.open_graph, threads=1)
    scores = Reranker.load(str(unasked), open_graph=opener).score(pairs[:2])
    np.testing.assert_allclose(scores, alone[:2], atol=SAME, rtol=0)


def test_a_result_is_complete(reranker: Reranker) -> None:
    (result,) = reranker.evaluate([("q", "d")], progress=True)
    assert isinstance(result, Result)
    assert 0 < result.score < 1
    assert result.logit == pytest.approx(math.log(result.score / (1 - result.score)) + 2.65, abs=1e-5)
