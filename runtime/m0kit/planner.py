"""Which rows go into which run, and who looks at whom. Pure integer work; knows nothing of engines.

A *run* is one call of the decoder on packed tokens. Pairs with the same prefix (the same document) form a
group: the prefix stands once in the run, followed by the suffix of each pair. Tables of pieces tell the
graphs' attention which rows ask and which answer (columns: `m0kit_export.graphs`).

    layout = layout_groups([(770, [12, 15])])       # one document of 770 tokens, two queries
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

# Tokens per run. Products are at full speed from a few hundred rows on; more only costs memory.
TOKEN_BUDGET = 1024
# Patches per vision run: one image of the published size, or as many small ones.
PATCH_BUDGET = 3072
# Query rows per attention piece: N² memory becomes rows × N. Fewer are slower, more only cost memory.
PIECE_ROWS = 256


@dataclass(frozen=True, slots=True)
class Item:
    """What the planner knows of a pair. Equal `prefix` means equal prefix tokens and images."""

    prefix: Hashable
    prefix_length: int
    length: int  # of the whole prompt


@dataclass(frozen=True, slots=True)
class Layout:
    """Index tables of one decoder run over T packed tokens with B pairs, int64."""

    num_tokens: int
    pieces: NDArray[np.int64]  # (N, 8) q0 q1 a0 a1 b0 b1 p0 p1
    last_index: NDArray[np.int64]  # (B,) row of each pair's last token
    last_pieces: NDArray[np.int64]  # (B, 8)


def plan_runs(items: Sequence[Item], token_budget: int = TOKEN_BUDGET) -> list[list[list[int]]]:
    """Runs of groups of positions in `items`; every position appears once.

    Groups stand in the order in which their prefixes first appear, so that what pairs share (images) is
    needed over a short stretch only. A run holds at most `token_budget` tokens, or a single prefix with
    at most `token_budget` tokens of suffixes, or a single longer pair.
    """
    groups: dict[Hashable, list[int]] = {}
    for position, item in enumerate(items):
        groups.setdefault(item.prefix, []).append(position)
    runs: list[list[list[int]]] = []
    room = 0
    for members in groups.values():
        for part in _split(items, members, token_budget):
            first = items[part[0]]
            cost = first.prefix_length + sum(items[p].length - first.prefix_length for p in part)
            if not runs or cost > room:
                runs.append([])
                room = token_budget
            runs[-1].append(part)
            room -= cost
    return runs


def _split(items: Sequence[Item], members: Sequence[int], token_budget: int) -> list[list[int]]:
    """Cut the pairs of one prefix into parts of at most `token_budget` suffix tokens."""
    parts: list[list[int]] = []
    room = 0
    for position in members:
        suffix = items[position].length - items[position].prefix_length
        if not parts or suffix > room:
            parts.append([])
            room = token_budget
        parts[-1].append(position)
        room -= suffix
    return parts


def layout_groups(groups: Sequence[tuple[int, Sequence[int]]]) -> Layout:
    """Tables for groups of (prefix length, lengths of the suffixes), packed in that order.

    Where a piece begins depends on its own prefix or suffix alone, so a pair is computed in the same
    pieces whatever else is in the run. A suffix has at least one token, a prefix may have none.
    """
    pieces: list[tuple[int, ...]] = []
    last_index: list[int] = []
    last_pieces: list[tuple[int, ...]] = []
    row = 0
    for prefix_length, suffix_lengths in groups:
        prefix = (row, row + prefix_length)
        for start, end in _cut(*prefix, PIECE_ROWS):
            pieces.append((start, end, 0, 0, prefix[0], end, 0, 0))
        row = prefix[1]
        for suffix_length in suffix_lengths:
            for start, end in _cut(row, row + suffix_length, PIECE_ROWS):
                pieces.append((start, end, *prefix, row, end, 0, 0))
            end = row + suffix_length
            last_pieces.append((len(last_index), len(last_index) + 1, *prefix, row, end, 0, 0))
            last_index.append(end - 1)
            row = end
    return Layout(row, _table(pieces, 8), np.asarray(last_index, np.int64), _table(last_pieces, 8))


def image_rows(patch_counts: Sequence[int]) -> NDArray[np.int64]:
    """(I, 2) first and end row of images of the given numbers of patches, packed."""
    ends = np.cumsum(patch_counts, dtype=np.int64)
    return np.stack([ends - np.asarray(patch_counts, np.int64), ends], axis=1)


def pack_images(patch_counts: Sequence[int], patch_budget: int = PATCH_BUDGET) -> list[list[int]]:
    """Consecutive images per vision run: at most `patch_budget` patches, or one image."""
    packs: list[list[int]] = []
    room = 0
    for position, count in enumerate(patch_counts):
        if not packs or count > room:
            packs.append([])
            room = patch_budget
        packs[-1].append(position)
        room -= count
    return packs


def _cut(start: int, end: int, rows: int) -> list[tuple[int, int]]:
    return [(s, min(s + rows, end)) for s in range(start, end, rows)]


def _table(rows: Sequence[tuple[int, ...]], columns: int) -> NDArray[np.int64]:
    return np.asarray(rows, np.int64).reshape(-1, columns)
