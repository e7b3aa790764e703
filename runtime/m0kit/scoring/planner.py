"""Which rows go into which run, and who looks at whom. Pure integer work; knows nothing of engines.

A *run* is one call of the decoder on packed tokens. Pairs with the same document form a group: the document's
prefix stands once in the run, or is a past that was computed before, followed by the suffix of each pair. Tables of
pieces tell the graphs' attention which rows ask and which answer (columns: `m0kit.artifact.ports`).

    layout = layout_groups([Group(770, [(770, 12), (769, 15)])])       # one document of 770 tokens, two queries
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from m0kit.artifact.ports import PIECE_COLUMNS

_T = TypeVar("_T")

# Tokens per run. Products are at full speed from a few hundred rows on; more only costs memory.
TOKEN_BUDGET = 1024
# Patches per vision run: one image of the published size, or as many small ones.
PATCH_BUDGET = 3072
# Query rows per attention piece: N² memory becomes rows × N. Fewer are slower, more only cost memory.
PIECE_ROWS = 256
# Scores of one attention head in a piece: with many keys a piece has fewer rows.
PIECE_SCORES = 1 << 20
# Rows and pairs of a run are filled up to a multiple of this. Products compute rows in tiles, and a last row that is
# alone in its tile goes through another kernel, whose last bit may differ (seen for one row in float32 and for an
# odd last row in 4 bits). So filled up, a row's values do not depend on what else is in the run.
TILE = 4


@dataclass(frozen=True, slots=True)
class Group:
    """A document's prefix and the suffixes of the pairs that share it."""

    length: int  # tokens of the prefix
    suffixes: Sequence[tuple[int, int]]  # how many tokens of the prefix it follows, its own tokens (at least one)
    kept: bool = False  # the prefix is a past; it has no rows in this run


@dataclass(frozen=True, slots=True)
class Layout:
    """Index tables of one decoder run over T packed tokens with B pairs, both filled up; int64."""

    num_tokens: int  # before filling up
    num_pairs: int
    fill: int  # rows at the end that belong to nobody, each of which sees itself alone
    pieces: NDArray[np.int64]  # (N, 9) `PIECE_COLUMNS`
    last_index: NDArray[np.int64]  # (B,) row of each pair's last token
    last_pieces: NDArray[np.int64]  # (B, 9)


def pack(items: Iterable[tuple[_T, Sequence[int]]], budget: Sequence[int]) -> Iterator[list[_T]]:
    """Consecutive items whose costs add up to at most `budget` in each kind, or one item alone. Lazy."""
    packed: list[_T] = []
    left = list(budget)
    for item, costs in items:
        if packed and any(cost > room for cost, room in zip(costs, left, strict=True)):
            yield packed
            packed, left = [], list(budget)
        packed.append(item)
        left = [room - cost for cost, room in zip(costs, left, strict=True)]
    if packed:
        yield packed


def layout_groups(groups: Sequence[Group], tile: int = TILE) -> Layout:
    """Tables for groups packed in that order; the pasts stand one after the other in the same order.

    Where a piece begins depends on its own prefix or suffix alone, so a pair is computed in the same
    pieces whatever else is in the run, and whether its prefix is a past or not.
    """
    pieces: list[tuple[int, ...]] = []
    last_index: list[int] = []
    last_pieces: list[tuple[int, ...]] = []
    row = past_row = past = 0
    for group in groups:
        start = past_row if group.kept else row
        if not group.kept:
            for q0, q1 in _cut(row, group.length, 0):
                pieces.append((q0, q1, 0, 0, start, q1, 0, 0, 0))
            row += group.length
        for used, length in group.suffixes:
            seen = (start, start + used)
            prefix, number = ((0, 0, *seen), past) if group.kept else ((*seen, 0, 0), 0)
            a0, a1, p0, p1 = prefix
            for q0, q1 in _cut(row, length, used):
                pieces.append((q0, q1, a0, a1, row, q1, p0, p1, number))
            index = len(last_index)
            last_pieces.append((index, index + 1, a0, a1, row, row + length, p0, p1, number))
            row += length
            last_index.append(row - 1)
        if group.kept:
            past_row += group.length
            past += 1
    fill, fill_pairs = -row % tile, -len(last_index) % tile or tile * (not last_index)
    pieces += [(r, r + 1, 0, 0, r, r + 1, 0, 0, 0) for r in range(row, row + fill)]
    pairs = range(len(last_index), len(last_index) + fill_pairs)
    filled_pieces = [*last_pieces, *((i, i + 1, 0, 0, 0, 1, 0, 0, 0) for i in pairs)]
    filled_index = [*last_index, *(0 for _ in pairs)]
    return Layout(row, len(last_index), fill, _table(pieces), np.asarray(filled_index, np.int64), _table(filled_pieces))


def image_rows(patch_counts: Sequence[int]) -> NDArray[np.int64]:
    """(I, 2) first and end row of images of the given numbers of patches, packed."""
    ends = np.cumsum(patch_counts, dtype=np.int64)
    return np.stack([ends - np.asarray(patch_counts, np.int64), ends], axis=1)


def _cut(first: int, length: int, before: int) -> Iterator[tuple[int, int]]:
    """Pieces of `length` rows from row `first` on, which see `before` keys and each other."""
    start = 0
    while start < length:
        rows = min(PIECE_ROWS, max(PIECE_SCORES // (before + start + PIECE_ROWS), TILE))
        end = min(start + rows, length)
        yield first + start, first + end
        start = end


def _table(rows: Sequence[tuple[int, ...]]) -> NDArray[np.int64]:
    return np.asarray(rows, np.int64).reshape(-1, len(PIECE_COLUMNS))
