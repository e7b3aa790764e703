"""Pixels and embeddings are there when they are wanted, whatever room there is, and never those of another file."""

import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from m0kit import Reranker
from m0kit.keeping.cache import Cache
from m0kit.reading.inputs import parse_content
from m0kit.scoring import images, sessions
from m0kit.scoring.schedule import Schedule


@pytest.fixture
def pages(tmp_path: Path, picture: Callable[..., Image.Image]) -> list[Path]:
    paths = [tmp_path / f"{i}.png" for i in range(3)]
    for i, path in enumerate(paths):
        picture(90 + 40 * i, 120, i).save(path)
    return paths


def test_pixels_without_room_are_made_again(
    reranker: Reranker, pages: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    pairs: list[Any] = [*(("what", page) for page in pages), (pages[0], "a text"), (Image.open(pages[1]), pages[2])]
    expected = reranker.score(pairs)
    monkeypatch.setattr(images, "PIXEL_BYTES", 0)
    np.testing.assert_array_equal(reranker.score(pairs), expected)


@pytest.mark.parametrize("memory", ["fast", "low"])
def test_a_file_that_changes_meanwhile_costs_its_own_pairs_only(
    artifact: Path, pages: list[Path], monkeypatch: pytest.MonkeyPatch, memory: Any
) -> None:
    reranker = Reranker.load(artifact, threads=1, memory=memory)
    pairs: list[Any] = [("what", page) for page in pages] + [(pages[1], "a text"), ("what", "a text")]
    expected = reranker.score(pairs)
    monkeypatch.setattr(images, "PIXEL_BYTES", 0)
    step = Schedule.step

    def meanwhile(self: Schedule) -> Any:
        pages[1].write_bytes(pages[0].read_bytes())
        pages[2].unlink(missing_ok=True)
        return step(self)

    monkeypatch.setattr(Schedule, "step", meanwhile)
    results = reranker.evaluate(pairs)
    assert [result.error is None for result in results] == [True, False, False, False, True]
    assert "1.png: was changed while it was being scored" in str(results[1].error)
    assert "pair 1" in str(results[1].error)
    assert "2.png: No such file" in str(results[2].error)
    np.testing.assert_array_equal(np.float32([results[0].score, results[4].score]), expected[[0, 4]])


@pytest.mark.parametrize("kv", ["fp32", "fp16"])
def test_an_image_that_comes_again_is_encoded_once(
    artifact: Path, pages: list[Path], monkeypatch: pytest.MonkeyPatch, kv: Any
) -> None:
    kept = Reranker.load(artifact, threads=1, cache_bytes=1 << 24, kv=kv)
    first = kept.score([(pages[0], "a text")])
    monkeypatch.setattr(kept.engine.graphs.vision, "run", lambda *_: pytest.fail("the image encoder ran"))
    other, again = kept.score([(Image.open(pages[0]).convert("RGB"), "another text"), (pages[0], "a text")])
    assert again == first[0]
    assert np.isfinite(other)


def test_an_image_that_several_threads_want_is_encoded_once(artifact: Path, unasked: Path, pages: list[Path]) -> None:
    encoded: list[int] = []
    asked = threading.Semaphore(0)

    def opener(folder: Path, name: str, /, *, also: Sequence[str] = ()) -> sessions.Graph:
        inner = sessions.open_graph(folder, name, threads=1, also=also)

        class Graph:
            def run(self, feeds: Mapping[str, Any], outputs: Sequence[str]) -> dict[str, Any]:
                if name == "vision":
                    for _ in range(4):
                        asked.acquire()
                    encoded.append(len(feeds["images"]))
                    asked.release(4)
                return inner.run(feeds, outputs)

        return Graph()

    class Asked(Cache):
        def get(self, key: Any) -> Any:
            value = super().get(key)
            if key in images_asked:
                asked.release()
            return value

    kept = Reranker.load(unasked, cache_bytes=1 << 24, open_graph=opener)
    document, _ = kept.begin()[0].document(parse_content(pages[0], "page"), "page")
    images_asked = {kept.engine.key(image) for image in document.images}
    kept.cache = Asked(1 << 24)
    with ThreadPoolExecutor(4) as pool:
        # As a query: who asks about one document waits for that as a whole.
        scores = list(pool.map(lambda i: kept.score([(pages[0], f"text {i}")])[0], range(4)))
    assert encoded == [1]
    expected = Reranker.load(artifact, threads=1).score([(pages[0], f"text {i}") for i in range(4)])
    np.testing.assert_allclose(scores, expected, atol=1e-5, rtol=0)


def test_a_file_that_was_seen_is_known_again_without_decoding_it(
    artifact: Path, pages: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By later calls too, where its state is kept; its pixels are made where they are wanted."""
    kept = Reranker.load(artifact, threads=1, cache_bytes=1 << 24)
    pairs: list[Any] = [("what", pages[0]), ("what", pages[1].read_bytes())]
    expected = kept.score(pairs)
    with monkeypatch.context() as patch:
        patch.setattr(images, "resize", lambda *_: pytest.fail("it was decoded"))
        np.testing.assert_array_equal(kept.score([("what", pages[0].read_bytes()), ("what", pages[1])]), expected)
    kept.cache = None
    np.testing.assert_array_equal(kept.score(pairs), Reranker.load(artifact, threads=1).score(pairs))
    changed = pages[2].read_bytes()
    pages[0].write_bytes(changed)
    np.testing.assert_array_equal(kept.score([("what", pages[0])]), kept.score([("what", changed)]))
