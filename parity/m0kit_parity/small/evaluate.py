"""Ranking quality: nDCG, BM25 and chance, and the held-out evaluation set of the small checkpoint.

Owns the metrics, the drawing of the evaluation set and its files.

    items = read_set(folder / "eval", "pages")
    scores, values = measure(model.score, items)          # nDCG@10 of each query

text.jsonl holds all six languages, across.jsonl queries whose documents are all in other languages. A line
is {"query": str, "documents": [str | {"image": path}], "relevance": [int]} with ten documents; image paths
are relative to the folder of the file.
"""

import json
import math
import random
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from PIL import Image

from m0kit.reading.lines import json_object, lines
from m0kit.reranker import best_first
from m0kit_parity.small import corpus, pages

KINDS: Final = ("text", "across", "code", "pages")
CANDIDATES: Final = 10
EVALUATION_SEED: Final = 90_001
EVALUATION_LOOK: Final = 3


@dataclass(frozen=True, slots=True)
class Item:
    """One query of an evaluation set. A document is a text or the path of an image."""

    query: str
    documents: tuple[str | Path, ...]
    relevance: tuple[int, ...]


def dcg(grades: Sequence[int], k: int) -> float:
    """Discounted cumulative gain with gains 2^grade − 1 (Burges et al. 2005)."""
    return math.fsum((2**grade - 1) / math.log2(rank + 2) for rank, grade in enumerate(grades[:k]))


def ndcg_at_k(scores: Sequence[float], relevance: Sequence[int], k: int = 10) -> float:
    """nDCG@k of ranking by falling score; equal scores keep the order of the documents.

    Raises ValueError when no document is relevant: the measure is not defined then.
    """
    best = dcg(sorted(relevance, reverse=True), k)
    if best == 0:
        raise ValueError("nDCG needs at least one relevant document")
    return dcg([relevance[i] for i in best_first(scores)], k) / best


def chance_ndcg(relevance: Sequence[int], k: int = 10) -> float:
    """Expected nDCG@k of a random order: every rank holds the mean gain."""
    best = dcg(sorted(relevance, reverse=True), k)
    mean_gain = math.fsum(2**grade - 1 for grade in relevance) / len(relevance)
    return math.fsum(mean_gain / math.log2(rank + 2) for rank in range(min(k, len(relevance)))) / best


_WORD: Final = re.compile(r"\w+")


def bm25(query: str, documents: Sequence[str], k1: float = 1.2, b: float = 0.75) -> list[float]:
    """Okapi BM25 scores (Robertson and Zaragoza 2009), lower-cased words, collection = the documents given."""
    bags = [Counter(_WORD.findall(document.lower())) for document in documents]
    mean_length = max(sum(sum(bag.values()) for bag in bags) / len(bags), 1e-9)
    scores = []
    for bag in bags:
        norm = k1 * (1 - b + b * sum(bag.values()) / mean_length)
        total = 0.0
        for term in _WORD.findall(query.lower()):
            holding = sum(term in other for other in bags)
            idf = math.log(1 + (len(bags) - holding + 0.5) / (holding + 0.5))
            total += idf * bag[term] * (k1 + 1) / (bag[term] + norm)
        scores.append(total)
    return scores


def text_items(count: int, seed: int = EVALUATION_SEED, across: bool = False) -> Iterator[Item]:
    """Held-out text groups of the hardest level with at most two full matches and four near misses each."""
    rng = random.Random(f"{seed}/{'across' if across else 'text'}")
    while count:
        group = corpus.text_group(rng, corpus.MAX_LEVEL, CANDIDATES, held_out=True, across=across)
        if group.relevance.count(corpus.FULL_MATCH) <= 2 and group.relevance.count(corpus.NEAR_MATCH) <= 4:
            count -= 1
            yield Item(group.query, group.documents, group.relevance)


def code_items(count: int, seed: int = EVALUATION_SEED) -> Iterator[Item]:
    """Held-out code groups whose queries name the language."""
    rng = random.Random(f"{seed}/code")
    while count:
        group = corpus.code_group(rng, CANDIDATES, held_out=True, named=True)
        if group.relevance.count(corpus.FULL_MATCH) <= 2 and group.relevance.count(corpus.NEAR_MATCH) <= 5:
            count -= 1
            yield Item(group.query, group.documents, group.relevance)


def page_groups(count: int, seed: int = EVALUATION_SEED) -> Iterator[pages.PageGroup]:
    """Held-out page groups, two queries each."""
    rng = random.Random(f"{seed}/pages")
    while count:
        group = pages.page_group(rng, CANDIDATES, hard=True, held_out=True)
        if all(r.count(corpus.FULL_MATCH) <= 2 for r in group.relevance):
            count -= 1
            yield group


def draw_group(group: pages.PageGroup, seed: str, look: int) -> list[Image.Image]:
    """The pages of a group."""
    rng = random.Random(seed)
    return [pages.draw_page(rng, rows, group.language, look).image for rows in group.rows]


def write_sets(
    folder: Path, text: int = 60, across: int = 30, code: int = 40, page_sets: int = 20, look: int = EVALUATION_LOOK
) -> None:
    """Draw the sets and write them with their pages."""
    (folder / "pages").mkdir(parents=True, exist_ok=True)
    written: dict[str, list[str]] = {kind: [] for kind in KINDS}

    def add(kind: str, query: str, documents: Sequence[object], relevance: Sequence[int]) -> None:
        row = {"query": query, "documents": list(documents), "relevance": list(relevance)}
        written[kind].append(json.dumps(row, ensure_ascii=False))

    for item in text_items(text):
        add("text", item.query, [str(d) for d in item.documents], item.relevance)
    for item in text_items(across, across=True):
        add("across", item.query, [str(d) for d in item.documents], item.relevance)
    for item in code_items(code):
        add("code", item.query, [str(d) for d in item.documents], item.relevance)
    for number, group in enumerate(page_groups(page_sets)):
        names = []
        for i, image in enumerate(draw_group(group, f"{EVALUATION_SEED}/draw/{number}", look)):
            names.append(f"pages/{number:02d}-{i}.png")
            image.save(folder / names[-1], optimize=True)
        for query, relevance in zip(group.queries, group.relevance, strict=True):
            add("pages", query, [{"image": name} for name in names], relevance)
    for kind, rows in written.items():
        (folder / f"{kind}.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")


def read_set(folder: Path, kind: str) -> list[Item]:
    """The items of one set."""
    items = []
    for _, line in lines(folder / f"{kind}.jsonl"):
        row = json_object(line, "a query with its documents")
        documents = tuple(d if isinstance(d, str) else folder / d["image"] for d in row["documents"])
        items.append(Item(row["query"], documents, tuple(row["relevance"])))
    return items


def measure(
    score: Callable[[str, Sequence[str | Path]], Sequence[float]], items: Sequence[Item]
) -> tuple[list[list[float]], list[float]]:
    """Scores of every document and nDCG@10 of every query. score: (query, documents) → a number for each."""
    scores = [list(score(item.query, item.documents)) for item in items]
    return scores, [ndcg_at_k(s, item.relevance, 10) for s, item in zip(scores, items, strict=True)]


def bm25_text(query: str, documents: Sequence[str | Path]) -> list[float]:
    """BM25 of what it can see: of a page image it sees an empty text, so pages keep their (random) order."""
    return bm25(query, [d if isinstance(d, str) else "" for d in documents])
