"""A prepared pair: known by its content, and what it will cost."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from m0kit import Reranker
from m0kit.errors import ImageError, InputError
from m0kit.index import add, open_index
from m0kit.reading.inputs import Known, Picture, Text, parse_content
from m0kit.scoring import images
from m0kit.scoring.prepare import ENCODING_COST, Preparer


@pytest.fixture
def preparer(reranker: Reranker) -> Preparer:
    return reranker.begin()[0]


def png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def test_a_document_is_known_by_its_content(preparer: Preparer, tmp_path: Path) -> None:
    image = Image.effect_noise((90, 60), 80).convert("RGB")
    (tmp_path / "page.png").write_bytes(png(image))
    forms = [image, image.copy(), png(image), {"image": tmp_path / "page.png"}]
    prepared = [preparer.prepare(("query", form)) for form in forms]
    assert len({one.document for one in prepared}) == 1
    assert len({one.document.images for one in prepared}) == 1  # one object, decoded and encoded once
    texts = [preparer.prepare(("query", text)).document for text in ("a", {"text": "a"}, "b")]
    assert texts[0] == texts[1] != texts[2]
    assert prepared[0].document not in texts


def test_what_nobody_waits_for_is_forgotten(preparer: Preparer) -> None:
    image = Image.new("RGB", (56, 56))
    first = preparer.prepare(("query", image)).document.images[0].digest()
    image.putpixel((3, 3), (9, 9, 9))  # nobody waits for it: it is another image
    assert preparer.prepare(("query", image)).document.images[0].digest() != first


def test_another_image_never_takes_the_place_of_one_that_waits(preparer: Preparer) -> None:
    """Of equal pixels one object is kept; the identities of both stay taken while their pairs wait."""
    kept = preparer.prepare(("query", Image.new("RGB", (56, 56))))
    for seed in range(50):
        preparer.prepare(("query", Image.new("RGB", (56, 56))))
        other = preparer.prepare(("query", Image.new("RGB", (56, 56), (seed + 1, 0, 0))))
        assert other.document != kept.document


@pytest.mark.parametrize("size", [(56, 56), (300, 200), (2000, 3000), (30, 900)])
def test_an_image_costs_what_its_header_says(preparer: Preparer, size: tuple[int, int]) -> None:
    image = Image.new("RGB", size)
    tokens = preparer.prepare(("query", image)).document.images[0].num_tokens
    for form in (image, png(image)):
        assert preparer.estimate(parse_content(form, "document")) == (1 + ENCODING_COST) * tokens


def test_the_estimate_decodes_nothing(preparer: Preparer) -> None:
    whole = png(Image.effect_noise((800, 600), 90))
    cut = parse_content(whole[: len(whole) // 2], "document")
    assert preparer.estimate(cut) == preparer.estimate(parse_content(whole, "document"))
    with pytest.raises(ImageError, match="cut off"):
        preparer.prepare(("query", whole[: len(whole) // 2]))


def test_a_text_costs_about_its_tokens_and_never_more_than_a_prompt(preparer: Preparer, reranker: Reranker) -> None:
    for text in ("a few words of English", "def f(x): return x + 1", "一篇关于潮汐的短文。"):
        prepared = preparer.prepare(("q", text))
        own = prepared.document.length - preparer.prepare(("q", "a")).document.length
        assert own <= 4 * preparer.estimate(Text(text))
    assert preparer.estimate(Text("long " * 10**6)) == reranker.config.prompt.max_length


def test_a_document_of_an_index_costs_what_it_is(artifact: Path, reranker: Reranker, tmp_path: Path) -> None:
    kept = Reranker.load(artifact, threads=1, kv="fp16")
    given: list[Any] = [("text", "some text", ""), ("page", Image.new("RGB", (280, 280)), "")]
    with open_index(tmp_path / "library", kept) as store:
        add(kept, store, given)
    preparer, _ = Reranker.load(artifact, threads=1, index=tmp_path / "library").begin()
    assert preparer.estimate(Known("text")) == preparer.estimate(Text("some text"))
    page = parse_content(given[1][1], "document")
    assert isinstance(page, Picture)
    assert preparer.estimate(Known("page")) == preparer.estimate(page)
    with pytest.raises(InputError, match="has no document 'nope'"):
        preparer.estimate(Known("nope"))


def test_a_document_of_an_index_is_read_once_for_as_long_as_it_is_the_same(
    artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By all calls; its pixels, which may not stay, are read again where they are wanted, and are those or none."""
    kept = Reranker.load(artifact, threads=1, kv="fp16")
    page, text = Image.effect_noise((90, 60), 80).convert("RGB"), "some text"
    with open_index(tmp_path / "library", kept) as store:
        add(kept, store, [("text", text, ""), ("page", page, "")])
    reranker = Reranker.load(artifact, threads=1, index=tmp_path / "library")
    assert reranker.store is not None
    pairs: list[Any] = [("query", {"id": "text"}), ("query", {"id": "page"}), ({"id": "page"}, {"id": "text"})]
    first = [reranker.begin()[0].prepare(pair) for pair in pairs]
    read = reranker.store.document_reads
    num_bytes = read.num_bytes
    limited = reranker.with_limits(max_query_length=100)
    for again in ([one.begin()[0].prepare(pair) for pair in pairs] for one in (reranker, limited)):
        assert [one.document for one in again] == [one.document for one in first]
        assert read.num_bytes == num_bytes
        (image,) = again[1].document.images
        np.testing.assert_array_equal(image.pixels().values, first[1].document.images[0].pixels().values)
        num_bytes = read.num_bytes
    late = reranker.begin()[0].prepare(pairs[1])
    with open_index(tmp_path / "library", kept) as store:
        add(kept, store, [("text", page, ""), ("page", text, "")])
    changed = [reranker.begin()[0].prepare(pair).document for pair in pairs[:2]]
    assert changed == [first[1].document, first[0].document]
    with pytest.raises(ImageError, match=r"^document: was changed while it was being scored"):
        late.document.images[0].require()


def test_what_is_quick_has_little_to_tokenise_and_nothing_to_decode(artifact: Path, tmp_path: Path) -> None:
    preparer = Reranker.load(artifact, threads=1).begin()[0]
    page, long = Image.new("RGB", (56, 56)), "a long text " * 100
    quick: list[Any] = [("q", "d"), ["q", {"text": "d"}], {"query": "q", "document": "d"}, ("q", {"id": "d"})]
    slow: list[Any] = [("q", page), ("q", {"image": png(page)}), (tmp_path / "q", "d"), ("q", long), (long, "d")]
    assert [preparer.is_quick(pair) for pair in (*quick, *slow)] == [True] * 4 + [False] * 5
    preparer.prepare(("q", long))
    assert [preparer.is_quick(pair) for pair in (("another", long), ("q", long + "!"))] == [True, False]
    assert not any(preparer.is_quick(wrong) for wrong in ("qd", 7, None, ("q", 7), {"query": "q", "document": {}}))


def test_the_cost_of_a_pair_is_that_of_its_parts(preparer: Preparer) -> None:
    image = Image.new("RGB", (84, 56))
    prepared = preparer.prepare((image, image))
    rows = len(prepared.document.prefix) + len(prepared.prompt.suffix)
    assert prepared.cost == rows + 2 * ENCODING_COST * 6
    assert prepared.num_rows == len(prepared.prompt.suffix)
    assert prepared.num_bytes > prepared.prompt.suffix.nbytes
    np.testing.assert_array_equal(prepared.document.images[0].grid_thw, [1, 4, 6])


def test_images_of_the_same_bytes_in_another_shape_are_other_documents(artifact: Path) -> None:
    preparer, _ = Reranker.load(artifact, threads=1).begin()
    wide, high = (preparer.prepare(("q", Image.new("RGB", size))).document for size in ((112, 56), (56, 112)))
    assert wide != high
    assert wide.images[0] is not high.images[0]


def test_an_image_of_an_index_is_not_decoded_for_a_new_query(
    artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reranker = Reranker.load(artifact, threads=1, kv="fp16")
    with open_index(tmp_path / "library", reranker) as store:
        add(reranker, store, [("page", Image.new("RGB", (280, 280)), "")])
    preparer, _ = Reranker.load(artifact, threads=1, index=tmp_path / "library").begin()
    monkeypatch.setattr(images, "resize", lambda *_: pytest.fail("was decoded"))
    preparer.prepare(("q", {"id": "page"}))
