"""Drawn queries are always the same, held out, and none of the embedded ones."""

import hashlib
import io
import itertools
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from m0kit_parity.evaluate import drawn
from m0kit_parity.evaluate.drawn import LEAST, SHARES, counts_of, drawn_groups, drawn_sets
from m0kit_parity.evaluate.judged import Query, builtin_sets
from m0kit_parity.small import corpus, evaluate, pages

Sets = dict[str, list[Query]]
# Of 170 drawn: texts, judgements and pixels. It changes where another machine would have other queries.
DIGEST = "20bbc8d37e28d234f9b4f2b3e8db256dff7cd5cc4270c6bd1c2f944a596fb72d"


@pytest.fixture(scope="module")
def sets() -> Sets:
    return drawn_sets(170)


def pixels(document: Any) -> bytes:
    with Image.open(document if isinstance(document, Path) else io.BytesIO(document)) as image:
        assert (image.mode, image.size) == ("L", (pages.WIDTH, pages.HEIGHT))
        return image.tobytes()


def keys(queries: list[Query]) -> Iterator[Any]:
    seen: dict[Any, str] = {}  # pages are decoded once
    for query in queries:
        documents = tuple(
            d if isinstance(d, str) else seen.setdefault(d, hashlib.sha256(pixels(d)).hexdigest())
            for d in query.documents
        )
        yield query.query, documents


def test_they_are_the_same_on_every_machine(sets: Sets) -> None:
    digest = hashlib.sha256()
    for queries in sets.values():
        for query, key in zip(queries, keys(queries), strict=True):
            digest.update(repr((key, query.relevance, query.group)).encode())
    assert digest.hexdigest() == DIGEST


def test_of_fewer_the_first_are_the_same(sets: Sets) -> None:
    for kind, queries in drawn_sets(23).items():
        assert queries == sets[kind][: len(queries)]


def test_as_many_are_drawn_as_are_asked_for_in_the_same_proportions() -> None:
    assert counts_of(1700) == SHARES
    assert counts_of(LEAST) == dict.fromkeys(SHARES, 1)
    assert counts_of(17) == {"text": 6, "across": 4, "code": 4, "pages": 3}
    for count in range(LEAST, 2000):
        found = counts_of(count)
        assert sum(found.values()) == count
        for kind, share in SHARES.items():
            assert found[kind] >= 1
            assert abs(found[kind] - count * share / 1700) < 1


def test_none_is_an_embedded_one_and_none_comes_twice() -> None:
    ours = {kind: list(keys(queries)) for kind, queries in drawn_sets(400).items()}
    theirs = {kind: set(keys(queries)) for kind, queries in builtin_sets().items()}
    assert list(ours) == list(theirs) == list(evaluate.KINDS)
    for kind, found in ours.items():
        assert len(set(found)) == len(found)
        assert not set(found) & theirs[kind]


def test_what_is_embedded_or_came_before_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    real, groups = evaluate.code_items, evaluate.page_groups
    known = evaluate.read_set(drawn.SMALL / "eval", "code")[:2]

    def again(count: int, seed: int = evaluate.EVALUATION_SEED) -> Iterator[Any]:
        for one in itertools.islice(real(count, seed), 3):
            yield from (one, known[0], one, known[1])

    def twice(count: int, seed: int = evaluate.EVALUATION_SEED) -> Iterator[Any]:
        if seed != evaluate.EVALUATION_SEED:
            yield from groups(20)
        for one in itertools.islice(groups(count, seed), 20):
            yield from (one, one)

    wanted = [(item.query, item.documents) for item in itertools.islice(real(3, drawn.SEED), 3)]
    pages_wanted = list(groups(4, drawn.SEED))
    monkeypatch.setattr(evaluate, "code_items", again)
    monkeypatch.setattr(evaluate, "page_groups", twice)
    assert [(query.query, query.documents) for query in drawn_sets(12)["code"]] == wanted
    assert list(itertools.islice(drawn_groups(), 4)) == pages_wanted


def test_they_state_what_training_never_had(monkeypatch: pytest.MonkeyPatch) -> None:
    facts, pipelines, pairs = [], [], []
    tell, write, draw = corpus.statement, corpus.function, pages.draw_page

    def statement(rng: random.Random, fact: corpus.Fact, language: str) -> str:
        facts.append(fact)
        return tell(rng, fact, language)

    def function(rng: random.Random, pipeline: corpus.Pipeline, language: str) -> str:
        pipelines.append(pipeline)
        return write(rng, pipeline, language)

    def draw_page(rng: random.Random, rows: Any, *rest: Any) -> pages.Page:
        pairs.extend(rows)
        return draw(rng, rows, *rest)

    monkeypatch.setattr(corpus, "statement", statement)
    monkeypatch.setattr(corpus, "function", function)
    monkeypatch.setattr(pages, "draw_page", draw_page)
    drawn_sets(170)
    assert len(facts) > 1000
    assert len(pipelines) >= 400
    assert len(pairs) > 300
    assert all(map(corpus.is_held_out, facts))
    assert all(map(corpus.pipeline_is_held_out, pipelines))
    assert all(corpus.pair_is_held_out(*pair) for pair in pairs)


def test_two_queries_over_the_same_pages_are_one_group(sets: Sets) -> None:
    assert not any(query.group for kind in ("text", "across", "code") for query in sets[kind])
    for queries in (sets["pages"], builtin_sets()["pages"]):
        assert len(queries) % 2 == 0
        for first, second in zip(queries[::2], queries[1::2], strict=True):
            assert first.group == second.group != ""
            assert first.documents == second.documents
        assert len({query.group for query in queries}) == len(queries) // 2


def test_each_is_as_hard_as_the_embedded_ones(sets: Sets) -> None:
    """Drawn alike: ten documents, one right at least, and chance finds as much."""
    for kind, queries in sets.items():
        assert all(len(query.documents) == 10 and 3 in (query.relevance or ()) for query in queries)
        chance = [
            np.mean([evaluate.chance_ndcg(query.relevance or ()) for query in some])
            for some in (queries, builtin_sets()[kind])
        ]
        assert chance[0] == pytest.approx(chance[1], abs=0.06)  # two means of some thirty, each with a deviation of 0.1
        assert all(re.fullmatch(rf"drawn {kind}, query \d+", query.where) for query in queries)
