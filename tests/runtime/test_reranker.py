"""Scores depend on the pair alone, whatever the call around it; every name users know gives the same scores."""

import base64
import gc
import io
import math
import random
import threading
import time
import warnings
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from m0kit import Reranker, Result, sessions
from m0kit.errors import ImageError, InputError, M0kitError

if TYPE_CHECKING:
    from m0kit_parity.reference import Reference

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
def counting(artifact: Path) -> tuple[Reranker, Counting]:
    opener = Counting()
    return Reranker.load(artifact, open_graph=opener), opener


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


def test_low_memory_never_holds_vision_encoder_and_decoder_at_once(
    artifact: Path, pairs: list[Any], alone: list[float]
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

    reranker = Reranker.load(artifact, memory="low", open_graph=opener)
    assert opened == ["head"]
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
    # One object, one file: apart in memory, the file is one picture however often it is read.
    reranker.score([("a", raw), (image, "text " * 400), ("b", bytes(bytearray(raw))), (other, image), (image, image)])
    assert graphs.rows("vision", "patches") == 2 * 4 * 6 + 4 * 4
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
    with pytest.raises(InputError, match=r"^pair 3: query is empty"):
        reranker.evaluate([*pairs[5:8], ("", "d")], on_error="raise")
    for call in (reranker.score, reranker.predict, reranker.compute_score):
        with pytest.raises(InputError, match=r"^pair 1: "):
            call([pairs[0], ("q", "")])
    assert graphs.runs == []


def test_score_marks_with_nan_and_warns(reranker: Reranker, alone: list[float], pairs: list[Any]) -> None:
    with pytest.warns(UserWarning, match=r"^not scored: pair 1: document is empty") as caught:
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


@pytest.mark.parametrize("logit", [-1e4, -800.0, -5.0, 2.65, 7.0, 800.0, 1e4])
def test_no_logit_is_too_large_for_a_score(reranker: Reranker, logit: float) -> None:
    prompt = reranker._prompts.build("q", "d")
    score = reranker._result(prompt, logit).score
    assert score == pytest.approx(1 / (1 + np.exp(-np.longdouble(logit - 2.65))), abs=1e-12)


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


def test_rank_has_cross_encoders_names(reranker: Reranker, expected: list[float], order: list[int]) -> None:
    ranked = reranker.rank("slm markdown", DOCUMENTS)
    assert [hit["corpus_id"] for hit in ranked] == order
    assert [set(hit) for hit in ranked] == [{"corpus_id", "score"}] * 4
    assert all(hit["score"] == pytest.approx(expected[hit["corpus_id"]], abs=SAME) for hit in ranked)
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
    with pytest.raises(InputError, match=r"^pair 0: query is empty"):
        reranker.trace(("", "d"))


def test_another_engine_can_run_the_graphs(artifact: Path, alone: list[float], pairs: list[Any]) -> None:
    opener = partial(sessions.open_graph, threads=1)
    scores = Reranker.load(str(artifact), open_graph=opener).score(pairs[:2])
    np.testing.assert_allclose(scores, alone[:2], atol=SAME, rtol=0)


def test_a_result_is_complete(reranker: Reranker) -> None:
    (result,) = reranker.evaluate([("q", "d")], progress=True)
    assert isinstance(result, Result)
    assert 0 < result.score < 1
    assert result.logit == pytest.approx(math.log(result.score / (1 - result.score)) + 2.65, abs=1e-5)
