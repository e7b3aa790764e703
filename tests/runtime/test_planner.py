"""Plans hold every pair once and pieces cover every row once, whatever the lengths."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from m0kit.planner import (
    PIECE_ROWS,
    Item,
    image_rows,
    layout_groups,
    pack_images,
    plan_runs,
)

items = st.lists(
    st.builds(
        lambda prefix, suffix: Item(prefix, prefix * 7, prefix * 7 + suffix),
        st.integers(0, 60),
        st.integers(1, 90),
    ),
    max_size=60,
)
groups = st.lists(
    st.tuples(st.integers(0, 700), st.lists(st.integers(1, 600), min_size=1, max_size=4)),
    min_size=1,
    max_size=5,
)


@given(items, st.integers(1, 300))
def test_every_pair_is_in_one_run_and_groups_share_their_prefix(plan: list[Item], budget: int) -> None:
    runs = plan_runs(plan, budget)
    assert Counter(i for run in runs for group in run for i in group) == Counter(range(len(plan)))
    for run in runs:
        for group in run:
            assert len({plan[i].prefix for i in group}) == 1


@given(items, st.integers(1, 300))
def test_a_run_keeps_to_the_budget_or_is_a_single_group_that_cannot(plan: list[Item], budget: int) -> None:
    for run in plan_runs(plan, budget):
        cost = sum(
            plan[group[0]].prefix_length + sum(plan[i].length - plan[i].prefix_length for i in group) for group in run
        )
        if cost > budget:
            assert len(run) == 1
            (group,) = run
            suffixes = cost - plan[group[0]].prefix_length
            assert suffixes <= budget or len(group) == 1


@given(groups)
def test_pieces_cover_every_row_once_and_see_prefix_and_own_rows(
    spec: list[tuple[int, list[int]]],
) -> None:
    layout = layout_groups(spec)
    expected: list[set[int]] = []  # for every row, the rows it may see
    last = []
    row = 0
    for prefix_length, suffixes in spec:
        prefix = set(range(row, row + prefix_length))
        expected += [set(range(row, row + i + 1)) for i in range(prefix_length)]
        row += prefix_length
        for length in suffixes:
            expected += [prefix | set(range(row, row + i + 1)) for i in range(length)]
            row += length
            last.append(row - 1)
    assert layout.num_tokens == row == len(expected)
    assert layout.last_index.tolist() == last
    covered = []
    for q0, q1, a0, a1, b0, b1, p0, p1 in layout.pieces.tolist():
        assert 0 < q1 - q0 <= PIECE_ROWS
        assert (p0, p1) == (0, 0)
        keys = [*range(a0, a1), *range(b0, b1)]
        for i, query in enumerate(range(q0, q1)):
            assert set(keys[: len(keys) - (q1 - q0) + i + 1]) == expected[query]
            covered.append(query)
    assert covered == list(range(row))
    for i, (q0, q1, a0, a1, b0, b1, _, _) in enumerate(layout.last_pieces.tolist()):
        assert (q0, q1) == (i, i + 1)
        assert {*range(a0, a1), *range(b0, b1)} == expected[last[i]]


@given(st.lists(st.integers(1, 2000), min_size=1, max_size=6), st.integers(1, 3000))
def test_images_stand_one_after_the_other_in_packs(counts: list[int], budget: int) -> None:
    table = image_rows(counts)
    assert table.dtype == np.int64
    assert [row for first, end in table.tolist() for row in range(first, end)] == list(range(sum(counts)))
    assert np.diff(table).ravel().tolist() == counts
    packs = pack_images(counts, budget)
    assert [i for pack in packs for i in pack] == list(range(len(counts)))
    assert all(len(pack) == 1 or sum(counts[i] for i in pack) <= budget for pack in packs)


def test_where_a_pair_is_cut_does_not_depend_on_its_neighbours() -> None:
    alone = layout_groups([(300, [270])])
    after = layout_groups([(5, [1]), (300, [270])])
    shift = 6
    moved = after.pieces[2:].copy()
    moved[:, :6] = np.where(moved[:, :6] == 0, 0, moved[:, :6] - shift)
    assert moved[-1].tolist() == alone.pieces[-1].tolist()
    assert np.diff(moved[:, :2], axis=1).tolist() == np.diff(alone.pieces[:, :2], axis=1).tolist()


def test_no_images_take_no_rows() -> None:
    assert image_rows([]).shape == (0, 2)
    assert pack_images([]) == []


@pytest.mark.parametrize("budget", [1, 10_000])
def test_pairs_of_one_document_share_its_prefix_in_a_run(budget: int) -> None:
    plan = [Item("a", 100, 110), Item("b", 50, 60), Item("a", 100, 105)]
    runs = plan_runs(plan, budget)
    if budget == 1:
        assert runs == [[[0]], [[2]], [[1]]]
    else:
        assert runs == [[[0, 2], [1]]]
