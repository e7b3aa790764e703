"""Metrics are what their definitions say."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from m0kit_parity.evaluate.intervals import Interval
from m0kit_parity.evaluate.judged import Query
from m0kit_parity.evaluate.quality import quality_of, spearman, verdict_of

few_values = st.lists(st.tuples(*[st.integers(-3, 3).map(float)] * 2), min_size=2, max_size=8)


@given(few_values)
def test_spearman_is_pearson_of_ranks_shared_by_equal_values(pairs: list[tuple[float, float]]) -> None:
    a, b = (list(side) for side in zip(*pairs, strict=True))

    def ranks(values: list[float]) -> list[float]:
        """By counting: those below, and the middle of those that are equal."""
        return [sum(o < v for o in values) + (sum(o == v for o in values) + 1) / 2 for v in values]

    if len(set(a)) > 1 and len(set(b)) > 1:
        expected = np.corrcoef(ranks(a), ranks(b))[0, 1]
        assert spearman(a, b) == pytest.approx(expected, abs=1e-12)  # rounding of sums of eight small numbers
    else:
        assert spearman(a, b) == (len(set(a)) == len(set(b)) == 1)


@given(st.permutations(range(6)))
def test_spearman_without_ties_is_the_formula_of_squared_differences(order: list[int]) -> None:
    squared = sum((i - o) ** 2 for i, o in enumerate(order))
    assert spearman(range(6), order) == pytest.approx(1 - 6 * squared / (6 * 35), abs=1e-12)


def test_spearman_sees_only_the_order() -> None:
    values = [0.1, 0.9, 0.5, 0.4]
    assert spearman(values, [v**3 for v in values]) == pytest.approx(1)
    assert spearman(values, [-v for v in values]) == pytest.approx(-1)


def test_quality_is_measured_against_the_baseline() -> None:
    queries = [Query("line 1", "q", ("a", "b", "c"), (1, 0, 0)), Query("line 2", "q", ("a", "b"), (1, 0))]
    before, after = [[0.9, 0.5, 0.1], [0.6, 0.4]], [[0.5, 0.6, 0.1], [0.6, 0.3]]
    quality = quality_of(queries, after, before)
    second = 1 / math.log2(3)  # the only relevant document at rank 2
    assert quality.ndcg == pytest.approx((second + 1) / 2)
    assert quality.loss == pytest.approx(100 * (1 - (second + 1) / 2))
    assert quality.max_delta == pytest.approx(0.4)
    assert quality.mean_delta == pytest.approx((0.4 + 0.1 + 0 + 0 + 0.1) / 5)
    assert quality.spearman == pytest.approx((0.5 + 1) / 2)
    assert quality.same_first == 0.5
    assert quality.changed == 1
    alone = quality_of(queries, before, None)
    assert (alone.ndcg, alone.loss, alone.max_delta, alone.spearman) == (1.0, None, None, None)


def test_a_better_artifact_loses_less_than_nothing() -> None:
    queries = [Query("line 1", "q", ("a", "b"), (0, 1))]
    loss = quality_of(queries, [[0.1, 0.9]], [[0.9, 0.1]]).loss
    assert loss is not None
    assert loss < 0


def test_without_judgements_there_is_agreement_only() -> None:
    quality = quality_of([Query("line 1", "q", ("a", "b"), None)], [[0.1, 0.9]], [[0.9, 0.1]])
    assert (quality.ndcg, quality.loss, quality.same_first) == (None, None, 0.0)
    assert quality.spearman == pytest.approx(-1)


@pytest.mark.parametrize(
    ("interval", "verdict"),
    [
        ((-0.4, 0.1), "within the limit"),
        ((-0.4, 0.2), "within the limit"),
        ((0.05, 0.2), "within the limit"),  # something is lost, and not too much
        ((0.0, 0.0), "within the limit"),
        ((-0.4, -0.1), "within the limit"),
        ((-0.1, 0.3), "cannot tell"),
        ((0.0, 0.3), "cannot tell"),
        ((0.01, 0.3), "perhaps over the limit"),
        ((0.2, 0.3), "perhaps over the limit"),
        ((0.21, 0.3), "over the limit"),
        (None, "cannot tell"),
    ],
)
def test_what_an_interval_says_of_a_limit(interval: Interval | None, verdict: str) -> None:
    assert verdict_of(interval, 0.2) == verdict


def test_a_limit_of_nothing_may_not_be_passed() -> None:
    assert verdict_of((0.0, 0.0), 0) == "within the limit"
    assert verdict_of((-0.1, 0.1), 0) == "cannot tell"
    assert verdict_of((0.1, 0.2), 0) == "over the limit"
