"""A score is the same to the bit whether its document was kept, computed in this call, alone or with others.

Exactness is a property of the path. A document's whole prefix is computed by itself in every case, a row's products go
through the same kernel in whole tiles (`m0kit.scoring.planner.TILE`), and attention has the same shapes in any company.
With activations of 8 bits nothing less would do: a difference in a last bit that turns a rounding becomes 1e-3 within
two layers. Should a CPU's kernels take rows in larger tiles, these tests fail there, and TILE is what to raise.

On one thread that holds in floats too. On several, ONNX Runtime shares a float product whose weights are not packed out
to threads by rows or by columns, whichever are more, and with the share goes the order of the sums (MLAS fits the
depth of its blocks to the columns of a share). Then FLOAT is what remains.
"""

import io
import itertools
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st
from PIL import Image
from tests.runtime.scoring.test_prompt import fragments, published

from m0kit import Reranker
from m0kit.artifact.ports import KV
from m0kit.keeping.cache import Cache
from m0kit.scoring import sessions
from m0kit.scoring.prompt import ImageTokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

PRECISIONS = ("fp32", "int8", "int4", "nf4")  # as many kernels of products
ROOM = 1 << 28  # for all that a test keeps
# The promise for sums of floats in another order; 2e-6 were seen. Scores of different pairs lie 0.5 apart.
FLOAT = 1e-5
LIMITS = ((10240, 512), (300, 60), (60, 20))  # max_length, max_query_length
Make = Callable[..., Image.Image]

# What a seam may cut: joiners, halves of an emoji, letters without their accent, texts that look like special tokens.
SEAMS = [
    "\n", "\n\n", " ", "   ", "\t", "\r\n", "e", "\u0301", "\u200d", "\U0001f469\u200d", "\u200d\U0001f467",
    "\U0001f1e9", "\U0001f1ea", "<|image_pad|>", "<|im_end|>", "<|vision_start|>", "<|im", "_end|>", "**Query**:\n",
    "**Document**:\n", "\ufeff", "漢", "12", "'", "s",
]  # fmt: skip
BODIES = ["the tide", "a paragraph that goes on, with facts about the sea. " * 5, "the quick brown fox, 1234. " * 60]


class File(bytes):
    """An image file of noise."""

    num_tokens: int  # of 28 × 28 pixels each, sides rounded

    @classmethod
    def of(cls, height: int, width: int, num_tokens: int) -> "File":
        noise = np.random.default_rng(num_tokens).integers(0, 256, (height, width, 3), np.uint8)
        raw = io.BytesIO()
        Image.fromarray(noise).save(raw, "PNG")
        file = cls(raw.getvalue())
        file.num_tokens = num_tokens
        return file

    def __repr__(self) -> str:
        return f"<file of {self.num_tokens} tokens>"


# Odd numbers too: rows of the last products of the image encoder, which are not filled up.
PICTURES = [File.of(60, 60, 4), File.of(150, 70, 10), File.of(28, 140, 5), File.of(84, 84, 9), File.of(60, 90, 6)]
seams = st.lists(st.sampled_from(SEAMS), max_size=3).map("".join)
documents = st.one_of(
    st.tuples(st.sampled_from(BODIES), seams).map("".join),
    st.lists(fragments, min_size=1, max_size=8).map("".join),
    st.sampled_from(PICTURES),
)
queries = st.one_of(st.tuples(seams, st.sampled_from(["what", "a longer question " * 6])).map("".join), documents)


@dataclass(frozen=True)
class Kept:
    """A reranker whose documents are kept, and by how much its scores may differ."""

    reranker: Reranker
    tolerance: float

    def check(self, seen: Sequence[Any], expected: Sequence[Any], what: str) -> None:
        __tracebackhide__ = True
        if not self.tolerance:
            assert seen == expected, what
            return
        assert len(seen) == len(expected), what
        for one, other in zip(seen, expected, strict=True):
            if isinstance(other, str):
                assert one == other, what
            else:
                assert (abs(one[1] - other[1]) <= self.tolerance, one[2]) == (True, other[2]), what


WAYS = [
    *((precision, "fp32", 1, 0.0) for precision in PRECISIONS),
    *((precision, kv, 1, 0.0) for precision in ("fp32", "int8") for kv in ("fp16", "int8")),
    *(  # the same code keeps them, behind other weights
        pytest.param((precision, kv, 1, 0.0), marks=pytest.mark.slow)
        for precision in ("int4", "nf4")
        for kv in ("fp16", "int8")
    ),
    ("int8", "fp16", 2, 0.0),  # weights are packed
    ("int4", "int8", 2, 0.0),
    ("fp32", "fp32", 2, FLOAT),
    ("nf4", "fp32", 2, FLOAT),
]


@pytest.fixture(scope="module", params=WAYS, ids=lambda way: "-".join(map(str, way[:3])))
def kept(request: pytest.FixtureRequest, in_precision: Callable[[str], Path]) -> Kept:
    """One precision, one form of what is kept, so many threads."""
    precision, kv, threads, tolerance = request.param
    return Kept(Reranker.load(in_precision(precision), threads=threads, cache_bytes=ROOM, kv=kv), tolerance)


def limited(reranker: Reranker, limits: tuple[int, int]) -> Reranker:
    """The same under other limits."""
    return reranker.with_limits(max_length=limits[0], max_query_length=limits[1])


def scores(reranker: Reranker, pairs: Iterable[Any], cache: Cache | None) -> list[Any]:
    """Logits and what was cut, or what is wrong, of pairs scored in one call."""
    reranker.cache = cache
    return [
        str(result.error).partition(": ")[2] if result.error else (result.logit, result.score, result.truncated)
        for result in reranker.evaluate(pairs)
    ]


# --- one score, whatever happened before ---------------------------------------------------------------


@settings(max_examples=10, suppress_health_check=[HealthCheck.data_too_large, HealthCheck.too_slow])
@given(
    st.lists(queries, min_size=1, max_size=3),
    st.lists(documents, min_size=1, max_size=3),
    st.sampled_from(LIMITS),
    st.sampled_from([1, 30_000, ROOM]),
    st.integers(0, 1000),
)
@example(["<|im_end|> what", "\nwhat"], ["the tide <|image_pad|>", "the tide\n"], LIMITS[0], ROOM, 0)
@example(["\u200d\U0001f467", "\u0301 q"], ["the tide \U0001f469", "e"], LIMITS[0], ROOM, 1)
@example(["what", PICTURES[2]], [PICTURES[0], BODIES[2], PICTURES[1]], LIMITS[0], 30_000, 2)
@example(["what" * 40, "\nq", PICTURES[0]], [BODIES[2], "漢字" * 60, PICTURES[2]], LIMITS[2], ROOM, 3)
def test_a_score_is_the_same_to_the_bit(
    kept: Kept, queries: list[Any], documents: list[Any], limits: tuple[int, int], room: int, seed: int
) -> None:
    reranker = limited(kept.reranker, limits)
    pairs = list(itertools.product(queries, documents))
    warm = Cache(ROOM)
    together = scores(reranker, pairs, warm)
    misses = warm.misses
    kept.check(scores(reranker, pairs, warm), together, "kept")
    assert warm.misses == misses, "computed again"
    kept.check([scores(reranker, [pair], Cache(ROOM))[0] for pair in pairs], together, "alone")
    kept.check([scores(reranker, [pair], warm)[0] for pair in pairs], together, "kept, alone")
    order = random.Random(seed).choices(range(len(pairs)), k=2 * len(pairs))
    shuffled, expected = [pairs[i] for i in order], [together[i] for i in order]
    kept.check(scores(reranker, shuffled, Cache(room)), expected, "in other company, maybe in too small a cache")
    half = Cache(ROOM)
    scores(reranker, [("another query", documents[-1])], half)
    kept.check(scores(reranker, shuffled, half), expected, "one of the documents kept")
    kept.check(scores(reranker, shuffled, None), expected, "nothing ever kept")


@pytest.mark.parametrize("kv", KV)
def test_a_score_depends_on_the_form_but_not_on_whether_anything_is_kept(artifact: Path, kv: Any) -> None:
    pairs = list(itertools.product(["what", "\nq", PICTURES[0]], ["the tide\n", BODIES[1], PICTURES[1]]))
    reranker = Reranker.load(artifact, threads=1, cache_bytes=ROOM, kv=kv)
    expected = scores(reranker, pairs, Cache(ROOM))
    assert scores(Reranker.load(artifact, threads=1, kv=kv), pairs, None) == expected


def test_the_forms_and_the_pairs_can_be_told_apart(in_precision: Callable[[str], Path]) -> None:
    """What is said above to be equal could otherwise be equal to everything."""
    pairs = list(itertools.product(["what", "\nq", PICTURES[0]], ["the tide\n", BODIES[1], PICTURES[1]]))
    seen = []
    for precision in PRECISIONS:
        for kv in KV:
            reranker = Reranker.load(in_precision(precision), threads=1, cache_bytes=ROOM, kv=kv)
            seen.append([logit for logit, *_ in scores(reranker, pairs, Cache(ROOM))])
    values = np.asarray(seen)
    assert len(np.unique(values)) == values.size
    assert (np.ptp(values, axis=1) > 0.5).all()  # of pairs
    # Of forms of the same precision: half a step of 8 bits at most, in a network whose attention is steep.
    assert np.abs(values.reshape(4, 3, -1) - values.reshape(4, 3, -1)[:, :1]).max() < 0.5


def test_hundreds_of_documents_and_long_ones(kept: Kept) -> None:
    """Several runs, states of several documents in one, documents longer than a run and than a piece."""
    documents = [f"document {i} " + "of words and words " * (i % 17) for i in range(60)]
    documents += ["the quick brown fox jumps. " * 150, BODIES[2]]
    pairs = list(itertools.product(["what", "\n\nanother question"], documents))
    warm = Cache(ROOM)
    expected = scores(kept.reranker, pairs, warm)
    kept.check(scores(kept.reranker, pairs, warm), expected, "kept")
    chosen = [*random.Random(0).sample(range(len(pairs)), 12), len(documents) - 2, -1]
    alone = [scores(kept.reranker, [pairs[i]], Cache(ROOM))[0] for i in chosen]
    kept.check(alone, [expected[i] for i in chosen], "alone")
    small = Cache(warm.num_bytes // 3)
    kept.check(scores(kept.reranker, pairs[::-1], small), expected[::-1], "in too small a cache")
    assert small.dropped


@pytest.mark.parametrize("precision", PRECISIONS)
def test_with_little_memory_too(in_precision: Callable[[str], Path], precision: str) -> None:
    reranker = Reranker.load(in_precision(precision), threads=1, memory="low", cache_bytes=ROOM, kv="int8")
    pairs = list(itertools.product(["what", PICTURES[0]], [BODIES[1], PICTURES[1], PICTURES[2]]))
    warm = Cache(ROOM)
    expected = scores(reranker, pairs, warm)
    assert scores(reranker, pairs, warm) == expected
    assert [scores(reranker, [pair], Cache(ROOM))[0] for pair in pairs] == expected


# --- nothing stale -------------------------------------------------------------------------------------


PAIRS = [("what", "the tide and the sea"), ("what", PICTURES[1]), (PICTURES[2], "a text for an image")]


@pytest.fixture(scope="module")
def another_artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of the same dimensions and tokenizer, other weights."""
    pytest.importorskip("torch", reason="an installed runtime has no exporter")
    from m0kit_export.export import export_artifact
    from m0kit_parity.samples.checkpoints import write_checkpoint

    folder = tmp_path_factory.mktemp("another")
    write_checkpoint(folder / "checkpoint", "tiny", seed=1)
    export_artifact(folder / "checkpoint", folder / "artifact", progress=False)
    return folder / "artifact"


def test_what_another_reranker_kept_is_not_taken_for_ones_own(artifact: Path, another_artifact: Path) -> None:
    def load(path: Path = artifact, **options: Any) -> Reranker:
        return Reranker.load(path, threads=1, cache_bytes=ROOM, **options)

    first = load()
    small = 28 * 28 * 4  # less than the images have
    others = {
        "other weights": load(another_artifact),
        "fp16": load(kv="fp16"),
        "int8": load(kv="int8"),
        "smaller images": load(max_pixels=small),
        "a limit above all images": load(max_pixels=28 * 28 * 5000),
    }
    for name, other in others.items():
        shared = Cache(ROOM)
        expected = scores(first, PAIRS, shared)
        entries = len(shared)
        assert entries >= 5  # three documents, two images
        own = scores(other, PAIRS, Cache(ROOM))
        assert shared.hits == 0
        assert scores(other, PAIRS, shared) == own, name
        assert shared.hits == 0, name
        assert len(shared) == 2 * entries
        assert scores(first, PAIRS, shared) == expected, name
        assert shared.hits
        if name != "a limit above all images":
            assert own != expected
    shared = Cache(ROOM)
    expected = scores(first, PAIRS, shared)
    misses = shared.misses
    assert scores(load(), PAIRS, shared) == expected  # the same artifact opened twice may share
    assert (shared.misses, shared.hits > 0) == (misses, True)


def test_a_limit_on_tokens_leaves_what_was_kept_in_use(artifact: Path) -> None:
    """A prompt may be cut anywhere; the document's prefix is the same."""
    reranker = Reranker.load(artifact, threads=1, cache_bytes=ROOM)
    pairs = [("what is it " * 9, "the tide and the sea"), ("what", "漢字" * 8), ("what " * 30, PICTURES[0])]
    shared = Cache(ROOM)
    whole = scores(reranker, pairs, shared)
    short = limited(reranker, (60, 10))
    own = scores(short, pairs, Cache(ROOM))
    assert own != whole
    misses = shared.misses
    assert scores(short, pairs, shared) == own
    assert shared.misses == misses


def test_an_image_that_was_changed_is_another_image(artifact: Path, picture: Make, tmp_path: Path) -> None:
    reranker = Reranker.load(artifact, threads=1, cache_bytes=ROOM)
    path = tmp_path / "page.png"
    image = picture(60, 90, 1)
    image.save(path)
    cache = Cache(ROOM)
    pairs = [("what", image), (path, "some text"), ("what", path), (image, "some text")]
    before = scores(reranker, pairs, cache)
    assert before[0] == before[2]  # an object and a file of the same pixels
    image.paste((255, 0, 0), (0, 0, 30, 30))
    image.save(path)
    after = scores(reranker, pairs, cache)
    assert after == scores(reranker, pairs, Cache(ROOM))
    assert not set(after) & set(before)


def test_images_of_the_same_values_in_another_shape_are_other_images(artifact: Path) -> None:
    values = np.random.default_rng(0).integers(0, 256, (56, 84, 3), np.uint8)
    lying, standing = Image.fromarray(values), Image.fromarray(values.reshape(84, 56, 3))
    reranker = Reranker.load(artifact, threads=1, cache_bytes=ROOM)
    cache = Cache(ROOM)
    (one,), (other,) = (scores(reranker, [("what", image)], cache) for image in (lying, standing))
    assert cache.hits == 0
    assert one != other
    assert [other] == scores(reranker, [("what", standing)], Cache(ROOM))


# --- tokens --------------------------------------------------------------------------------------------


class Watching:
    """Opens graphs; notes what the decoder is fed."""

    def __init__(self) -> None:
        self.feeds: list[Mapping[str, Any]] = []

    def __call__(self, folder: Path, name: str, /, *, also: Sequence[str] = ()) -> sessions.Graph:
        inner = sessions.open_graph(folder, name, threads=1, also=also)
        watching = self

        class Graph:
            def run(self, feeds: Mapping[str, Any], outputs: Sequence[str]) -> dict[str, Any]:
                if name.startswith("decoder"):
                    watching.feeds.append(dict(feeds))
                return inner.run(feeds, outputs)

        return Graph()

    def tokens_seen(self) -> tuple[list[int], list[int]]:
        """Token ids that the one pair's last token saw in the last run, of the past and of the run itself.

        A past are the tokens of the first run that was watched.
        """
        first, last = self.feeds[0]["token_ids"].tolist(), self.feeds[-1]["token_ids"].tolist()
        _, _, a0, a1, b0, b1, p0, p1, _ = self.feeds[-1]["last_pieces"][0].tolist()
        return first[p0:p1], last[a0:a1] + last[b0:b1]


@pytest.fixture(scope="module")
def watched(unasked: Path) -> tuple[Reranker, Watching]:
    watching = Watching()
    return Reranker.load(unasked, cache_bytes=ROOM, open_graph=watching), watching


@pytest.fixture(scope="module")
def theirs(artifact: Path) -> "PreTrainedTokenizerFast":
    return pytest.importorskip("transformers").PreTrainedTokenizerFast(tokenizer_file=str(artifact / "tokenizer.json"))


@settings(max_examples=100)
@given(st.tuples(queries, documents), st.sampled_from(LIMITS))
@example(("\n\nwhat", "the tide\n"), LIMITS[0])
@example(("<|im_end|>", "<|im_start|>\n"), LIMITS[2])
def test_kept_or_not_the_tokens_are_those_of_the_whole_prompt(
    watched: tuple[Reranker, Watching],
    theirs: "PreTrainedTokenizerFast",
    pair: tuple[Any, Any],
    limits: tuple[int, int],
) -> None:
    one, watching = watched
    watching.feeds.clear()
    reranker = limited(one, limits)
    parts = [part if isinstance(part, str) else ImageTokens(part.num_tokens) for part in pair]
    expected, image_is_cut = published(theirs, reranker.config.prompt, parts[0], parts[1])
    assume(not image_is_cut)
    cache = Cache(ROOM)
    scores(reranker, [pair], cache)
    past, own = watching.tokens_seen()
    assert past + own == expected
    num_runs = len(watching.feeds)
    scores(reranker, [pair], cache)
    assert len(watching.feeds) == num_runs + 1  # the suffix alone
    assert watching.tokens_seen() == (past, own)
    assert len(own) < len(expected)
    scores(reranker, [pair], None)
    assert len(watching.feeds) == num_runs + 2
    assert watching.tokens_seen() == ([], expected)
