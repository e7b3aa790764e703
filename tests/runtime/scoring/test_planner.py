"""Packs keep order and budgets; pieces cover every row once and show it exactly the keys it may see, in order."""

from collections.abc import Iterator, Sequence
from itertools import accumulate, pairwise
from unittest.mock import patch

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from m0kit.scoring import planner
from m0kit.scoring.planner import PIECE_ROWS, PIECE_SCORES, TILE, Group, Layout, image_rows, layout_groups, pack

Key = tuple[str, int]  # a row of the run or of the pasts


@st.composite
def some_group(draw: st.DrawFn) -> Group:
    """Any share of the prefix may be used, the whole of it most often."""
    length = draw(st.integers(0, 700))
    used = st.one_of(st.just(length), st.integers(0, length))
    suffixes = draw(st.lists(st.tuples(used, st.integers(1, 600)), max_size=4))
    return Group(length, suffixes, kept=draw(st.booleans()))


groups = st.lists(some_group(), min_size=1, max_size=5).filter(
    lambda groups: any(group.suffixes or (group.length and not group.kept) for group in groups)
)


def keys_seen(layout: Layout) -> Iterator[tuple[int, list[Key], int]]:
    """(row, what it sees in order, number of its past) by the rule of the graphs, in the order of the table."""
    for q0, q1, a0, a1, b0, b1, p0, p1, past in layout.pieces.tolist():
        assert q0 < q1
        assert b1 == q1
        keys: list[Key] = [("past", i) for i in range(p0, p1)]
        keys += [("run", i) for i in [*range(a0, a1), *range(b0, b1)]]
        for i, row in enumerate(range(q0, q1)):
            yield row, keys[: len(keys) - (q1 - q0) + i + 1], past


def keys_wanted(groups: Sequence[Group]) -> tuple[list[tuple[list[Key], int]], list[int]]:
    """For every row of the run the keys before and at it and the number of its past; the last rows of the pairs."""
    wanted: list[tuple[list[Key], int]] = []
    last: list[int] = []
    starts = list(accumulate((group.length * group.kept for group in groups), initial=0))
    numbers = list(accumulate((group.kept for group in groups), initial=0))
    for group, start, number in zip(groups, starts[:-1], numbers[:-1], strict=True):
        if group.kept:
            prefix: list[Key] = [("past", start + i) for i in range(group.length)]
        else:
            prefix = [("run", len(wanted) + i) for i in range(group.length)]
            wanted += [(prefix[: i + 1], 0) for i in range(group.length)]
        for used, length in group.suffixes:
            own: list[Key] = [("run", len(wanted) + i) for i in range(length)]
            wanted += [(prefix[:used] + own[: i + 1], number if group.kept else 0) for i in range(length)]
            last.append(len(wanted) - 1)
    return wanted, last


# --- layouts -------------------------------------------------------------------------------------------


@given(groups)
@example([Group(8, [(5, 3)], kept=True), Group(6, [(6, 2)]), Group(4, [(4, 1), (0, 2)], kept=True)])
@example([Group(300, [])])
def test_every_row_sees_its_prefix_and_its_own_rows_up_to_itself(groups: list[Group]) -> None:
    layout = layout_groups(groups)
    wanted, last = keys_wanted(groups)
    fill = [([("run", row)], 0) for row in range(len(wanted), len(wanted) + layout.fill)]
    assert layout.pieces.dtype == layout.last_pieces.dtype == layout.last_index.dtype == np.int64
    assert layout.pieces.shape[1] == layout.last_pieces.shape[1] == 9
    assert layout.num_tokens == len(wanted)
    rows, keys, pasts = zip(*keys_seen(layout), strict=True)
    assert list(rows) == list(range(len(wanted) + layout.fill))
    assert list(zip(keys, pasts, strict=True)) == wanted + fill
    assert (np.diff(layout.pieces[:, :2]) <= PIECE_ROWS).all()
    # The last rows, asked for once more.
    assert layout.num_pairs == len(last)
    assert layout.last_index[: len(last)].tolist() == last
    for i, (q0, q1, a0, a1, b0, b1, p0, p1, past) in enumerate(layout.last_pieces[: len(last)].tolist()):
        assert (q0, q1) == (i, i + 1)
        seen = [("past", i) for i in range(p0, p1)] + [("run", i) for i in [*range(a0, a1), *range(b0, b1)]]
        assert (seen, past) == wanted[last[i]]


@given(groups)
def test_rows_and_pairs_are_filled_up_to_whole_tiles_by_rows_of_nobody(groups: list[Group]) -> None:
    layout = layout_groups(groups)
    assert 0 <= layout.fill < TILE
    assert (layout.num_tokens + layout.fill) % TILE == 0
    num_filled = len(layout.last_index) - layout.num_pairs
    assert 0 <= num_filled <= TILE
    assert num_filled < TILE or layout.num_pairs == 0
    assert len(layout.last_index) % TILE == 0 < len(layout.last_index) == len(layout.last_pieces)
    for i in range(layout.num_pairs, len(layout.last_index)):
        assert layout.last_index[i] == 0
        assert layout.last_pieces[i].tolist() == [i, i + 1, 0, 0, 0, 1, 0, 0, 0]  # row 0, which sees itself


def test_a_prefix_used_in_part_shows_no_more_of_its_past() -> None:
    layout = layout_groups([Group(10, [(10, 2)], kept=True), Group(20, [(20, 3), (17, 4)], kept=True)])
    assert layout.pieces.tolist() == [
        [0, 2, 0, 0, 0, 2, 0, 10, 0],
        [2, 5, 0, 0, 2, 5, 10, 30, 1],
        [5, 9, 0, 0, 5, 9, 10, 27, 1],
        *([row, row + 1, 0, 0, row, row + 1, 0, 0, 0] for row in (9, 10, 11)),
    ]
    assert layout.last_pieces[:3].tolist() == [
        [0, 1, 0, 0, 0, 2, 0, 10, 0],
        [1, 2, 0, 0, 2, 5, 10, 30, 1],
        [2, 3, 0, 0, 5, 9, 10, 27, 1],
    ]
    assert layout.last_index.tolist() == [1, 4, 8, 0]


def pieces_of_pairs(groups: Sequence[Group]) -> list[list[tuple[int, int, int]]]:
    """For each pair its pieces: rows that ask, rows of the prefix and of its own that answer."""
    layout = layout_groups(groups)
    ends = layout.last_index[: layout.num_pairs] + 1
    lengths = [length for group in groups for _, length in group.suffixes]
    return [
        [
            (q1 - q0, a1 - a0 + p1 - p0, b1 - b0)
            for q0, q1, a0, a1, b0, b1, p0, p1, _ in layout.pieces.tolist()
            if end - length <= q0 < end
        ]
        for end, length in zip(ends.tolist(), lengths, strict=True)
    ]


@given(groups, groups, st.sampled_from([PIECE_SCORES, 100_000, 3000]))
@example([Group(300, [(300, 270)])], [Group(5, [(5, 1)])], PIECE_SCORES)
def test_a_pair_is_cut_alike_in_any_company_and_behind_a_past_as_behind_a_prefix(
    groups: list[Group], others: list[Group], scores: int
) -> None:
    with patch.object(planner, "PIECE_SCORES", scores):
        alone = [piece for group in groups for piece in pieces_of_pairs([group])]
        assert pieces_of_pairs(groups) == alone
        turned = [Group(group.length, group.suffixes, not group.kept) for group in groups]
        assert pieces_of_pairs(turned) == alone
        behind = pieces_of_pairs([*others, *groups])
        assert behind[len(behind) - len(alone) :] == alone
        for number, group in enumerate(groups):  # nor do the other pairs of its document matter
            split = [Group(group.length, [suffix], group.kept) for suffix in group.suffixes]
            assert [p for part in split for p in pieces_of_pairs([part])] == pieces_of_pairs([group]), number


@given(groups, st.sampled_from([100_000, 3000, 500]))
def test_a_piece_makes_no_more_scores_than_allowed_or_has_few_rows(groups: list[Group], scores: int) -> None:
    with patch.object(planner, "PIECE_SCORES", scores):
        for q0, q1, a0, a1, b0, b1, p0, p1, _ in layout_groups(groups).pieces.tolist():
            keys = a1 - a0 + b1 - b0 + p1 - p0
            assert (q1 - q0) * keys <= scores or q1 - q0 <= TILE


def test_a_long_document_is_cut_into_fewer_rows_the_further_it_goes() -> None:
    layout = layout_groups([Group(20_000, [(20_000, 300)], kept=False)])
    rows, keys = np.diff(layout.pieces[:, :2])[:, 0], layout.pieces[:, 5]
    rows, keys = rows[keys <= 20_000], keys[keys <= 20_000]
    assert rows.sum() == 20_000
    assert (rows * keys).max() <= PIECE_SCORES
    assert (rows[keys <= PIECE_SCORES // PIECE_ROWS] == PIECE_ROWS).all()  # as many as are worth it while keys are few
    assert (rows[:-1] * (keys[:-1] + PIECE_ROWS) > PIECE_SCORES * 0.9)[keys[:-1] > 5000].all()  # and then, what fits
    assert (np.diff(rows) <= 0).all()
    behind = layout_groups([Group(20_000, [(20_000, 300)], kept=True)])
    assert np.diff(behind.pieces[:, :2])[:, 0].max() == PIECE_SCORES // (20_000 + PIECE_ROWS)


# --- packs ---------------------------------------------------------------------------------------------


@st.composite
def costs_and_budget(draw: st.DrawFn) -> tuple[list[tuple[int, ...]], list[int]]:
    kinds = draw(st.integers(1, 3))
    costs = draw(st.lists(st.tuples(*[st.integers(0, 60)] * kinds), max_size=60))
    return costs, draw(st.lists(st.integers(1, 300), min_size=kinds, max_size=kinds))


@given(costs_and_budget())
def test_packs_hold_all_in_order_and_keep_to_every_budget(case: tuple[list[tuple[int, ...]], list[int]]) -> None:
    costs, budget = case
    packs = list(pack(enumerate(costs), budget))
    assert [i for packed in packs for i in packed] == list(range(len(costs)))
    assert all(packs)

    def fits(chosen: Sequence[int]) -> bool:
        return all(sum(costs[i][kind] for i in chosen) <= room for kind, room in enumerate(budget))

    for packed in packs:
        assert fits(packed) or len(packed) == 1
    for packed, after in pairwise(packs):  # none is ended early
        assert not fits([*packed, after[0]])


def test_an_item_over_the_budget_goes_alone() -> None:
    items = [("a", [1]), ("large", [11]), ("b", [5]), ("c", [5]), ("d", [1])]
    assert list(pack(items, [10])) == [["a"], ["large"], ["b", "c"], ["d"]]


def test_either_budget_ends_a_pack() -> None:
    items = [("a", (1, 9)), ("b", (1, 2)), ("c", (9, 0)), ("d", (1, 1))]
    assert list(pack(items, (10, 10))) == [["a"], ["b", "c"], ["d"]]


def test_packing_takes_one_item_more_than_it_gives() -> None:
    """What costs memory to make is made when its turn comes."""
    taken: list[int] = []

    def items() -> Iterator[tuple[int, list[int]]]:
        for i in range(100):
            taken.append(i)
            yield i, [1]

    packs = pack(items(), [3])
    assert taken == []
    for number in range(1, 4):
        assert next(packs) == [3 * number - 3, 3 * number - 2, 3 * number - 1]
        assert len(taken) == 3 * number + 1


# --- images --------------------------------------------------------------------------------------------


@given(st.lists(st.integers(1, 2000), min_size=1, max_size=6))
def test_images_stand_one_after_the_other(counts: list[int]) -> None:
    table = image_rows(counts)
    assert table.dtype == np.int64
    assert [row for first, end in table.tolist() for row in range(first, end)] == list(range(sum(counts)))
    assert np.diff(table).ravel().tolist() == counts


def test_no_images_take_no_rows() -> None:
    assert image_rows([]).shape == (0, 2)
    assert list(pack([], [1])) == []


@pytest.mark.parametrize("kept", [False, True])
def test_pairs_of_one_document_share_its_prefix(kept: bool) -> None:
    layout = layout_groups([Group(100, [(100, 10), (99, 5), (100, 1)], kept)])
    assert layout.num_tokens == 16 + 100 * (not kept)
