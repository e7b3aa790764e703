"""Held-out queries of the small checkpoint, as many as are wanted: the same in every run and on every machine.

Owns how many of each set there are, and that none comes twice. What is drawn is `small/evaluate.py`'s, as the embedded
sets are, of another seed: of facts, pairs of words and pipelines that training never had.

    drawn_sets(1700)["pages"]          # 300 queries, two over the same ten pages; a page is a PNG in memory

Where more are drawn, the first of each set stay the same.
"""

import io
import sys
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from itertools import islice
from typing import Final, TypeVar

from PIL import Image

from m0kit.terminal import bar
from m0kit_parity.evaluate.judged import Query
from m0kit_parity.small import evaluate
from m0kit_parity.small.files import SMALL
from m0kit_parity.small.pages import PageGroup

SEED: Final = 90_003  # the embedded sets are of 90,001, and training was watched on 90,002
SHARES: Final[Mapping[str, int]] = {"text": 600, "across": 400, "code": 400, "pages": 300}
LEAST: Final = len(SHARES)  # one of each set
_WHOLE: Final = sum(SHARES.values())
_T = TypeVar("_T")


def drawn_sets(count: int) -> dict[str, list[Query]]:
    """So many queries, `LEAST` or more, in the proportions of `SHARES`, by set. A progress bar is shown."""
    sets: dict[str, list[Query]] = {}
    with bar(total=count, unit="query", desc="drawing", leave=False) as told:
        for kind, number in counts_of(count).items():
            for query in islice(_queries(kind), number):
                sets.setdefault(kind, []).append(query)
                told.update()
    return sets


def counts_of(count: int) -> dict[str, int]:
    """How many queries of each set make so many: its share rounded down, one at least, then one more where most is due.

    `count`: `LEAST` or more.
    """
    found = {kind: max(1, count * share // _WHOLE) for kind, share in SHARES.items()}
    for _ in range(count - sum(found.values())):
        found[max(found, key=lambda kind: count * SHARES[kind] - found[kind] * _WHOLE)] += 1
    return found


def drawn_groups() -> Iterator[PageGroup]:
    """What stands on the pages of one set after the other, without end; none of them is an embedded one."""

    def key(group: PageGroup) -> Hashable:
        return group.queries, group.rows

    embedded = len(evaluate.read_set(SMALL / "eval", "pages")) // 2
    return _fresh(evaluate.page_groups(sys.maxsize, SEED), map(key, evaluate.page_groups(embedded)), key)


def _queries(kind: str) -> Iterator[Query]:
    """Of one set, without end."""
    if kind == "pages":
        for number, group in enumerate(drawn_groups(), 1):
            drawn = evaluate.draw_group(group, f"{SEED}/draw/{number}", evaluate.EVALUATION_LOOK)
            pages, together = tuple(map(_png, drawn)), f"drawn pages {number}"
            for half, (query, relevance) in enumerate(zip(group.queries, group.relevance, strict=True)):
                yield Query(f"drawn pages, query {2 * number - 1 + half}", query, pages, relevance, together)
        return
    if kind == "code":
        items = evaluate.code_items(sys.maxsize, SEED)
    else:
        items = evaluate.text_items(sys.maxsize, SEED, across=kind == "across")

    def key(item: evaluate.Item) -> Hashable:
        return item.query, item.documents

    for number, item in enumerate(_fresh(items, map(key, evaluate.read_set(SMALL / "eval", kind)), key), 1):
        yield Query(f"drawn {kind}, query {number}", item.query, item.documents, item.relevance)


def _fresh(drawn: Iterable[_T], known: Iterable[Hashable], key: Callable[[_T], Hashable]) -> Iterator[_T]:
    """Those that are not known, each once."""
    seen = set(known)
    for one in drawn:
        if key(one) not in seen:
            seen.add(key(one))
            yield one


def _png(page: Image.Image) -> bytes:
    page.save(file := io.BytesIO(), "PNG")
    return file.getvalue()
