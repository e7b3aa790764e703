"""The bootstrap is what its definition says, holds the true mean as often as it should, and is the same everywhere."""

import itertools
import math
from collections import Counter

import numpy as np
import pytest
from numpy.typing import NDArray

from m0kit_parity.evaluate.intervals import LEAST, RESAMPLES, interval, resampled

Float64 = NDArray[np.float64]


def of(values: Float64, groups: list[str] | None = None, seed: int = 0) -> tuple[float, float]:
    found = interval([resampled(values[:, None], groups or [""] * len(values), seed)], 0)
    assert found is not None
    return found


def differences(rng: np.random.Generator, times: int, queries: int) -> Float64:
    """Most of them nothing, the others of some ten points; the mean is 1.2."""
    lost = np.where(rng.random((times, queries)) < 0.6, 1, -1) * rng.exponential(20, (times, queries))
    return np.where(rng.random((times, queries)) < 0.3, lost, 0.0)


def test_resamples_are_all_ways_to_draw_each_as_often_as_the_others() -> None:
    values = [0.0, 1.0, 10.0]
    part = resampled(np.asarray(values)[:, None], ["", "", ""], 0)
    exact = Counter(sum(draw) for draw in itertools.product(values, repeat=3))
    found = Counter(part.sums[:, 0].tolist())
    assert set(found) == set(exact)
    for total, ways in exact.items():
        share = ways / 27
        # five standard deviations of a share in so many resamples
        assert found[total] / RESAMPLES == pytest.approx(share, abs=5 * math.sqrt(share * (1 - share) / RESAMPLES))
    assert set(part.queries) == {3}


def test_of_many_queries_it_is_that_of_the_normal_distribution() -> None:
    values = np.random.default_rng(1).normal(3, 2, 4000)
    half = 1.96 * values.std() / math.sqrt(len(values))
    # an end is a percentile of RESAMPLES: chance moves it by 1.4 % of the half interval, and this is four times that
    assert of(values) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.06 * half)


def test_it_holds_the_true_mean_as_often_as_it_says() -> None:
    part = resampled(differences(np.random.default_rng(2), 500, 170).T, [""] * 170, 0)
    ends = [interval([part], side) for side in range(500)]
    held = np.mean([low <= 1.2 <= high for low, high in filter(None, ends)])
    assert len(ends) == 500
    # 94 % over many more, as percentiles are a little narrow; chance is 1.1 % of 500, and this is twice that
    assert 0.918 <= held <= 0.962


def test_queries_that_were_drawn_together_count_as_one() -> None:
    values = np.random.default_rng(3).normal(0, 1, 40)
    twice, groups = np.repeat(values, 2), [f"pages {i // 2}" for i in range(80)]
    assert of(twice, groups) == of(values), "the second query of each tells nothing new"
    low, high = of(twice)
    assert high - low < 0.8 * np.ptp(of(values)), "and counted by itself it would seem to"


def test_groups_of_several_sizes_weigh_by_their_queries() -> None:
    groups = ["a", "a", "a", *[""] * 30]
    values = np.asarray([1.0] * 3 + [0.0] * 30)
    part = resampled(values[:, None], groups, 0)
    assert part.groups == 31
    assert set(part.sums[:, 0] / 3) <= set(range(8))
    assert np.array_equal(part.queries, 31 + 2 * part.sums[:, 0] / 3)


def test_sets_are_resampled_each_by_itself() -> None:
    rng = np.random.default_rng(4)
    sets = [rng.normal(mean, 1, 100) for mean in (-5, 5)]
    parts = [resampled(values[:, None], [""] * 100, seed) for seed, values in enumerate(sets)]
    both = interval(parts, 0)
    assert both is not None
    # Half of each always: that the sets differ by ten makes their mean no less sure.
    assert np.ptp(both) == pytest.approx(2 * 1.96 / math.sqrt(200), rel=0.2)
    assert np.ptp(of(np.concatenate(sets))) > 4 * np.ptp(both)


def test_the_sides_of_a_set_get_the_same_resamples() -> None:
    values = differences(np.random.default_rng(5), 2, 50).T
    part = resampled(values, [""] * 50, 7)
    for side in range(2):
        assert np.array_equal(part.sums[:, side], resampled(values[:, side : side + 1], [""] * 50, 7).sums[:, 0])
    assert not np.array_equal(part.sums, resampled(values, [""] * 50, 8).sums)


def test_too_few_queries_have_no_interval() -> None:
    for queries in (1, LEAST - 1):
        assert interval([resampled(np.ones((queries, 1)), [""] * queries, 0)], 0) is None
    assert of(np.ones(LEAST)) == (1, 1)
    pairs = [f"{i // 2}" for i in range(2 * LEAST - 2)]
    assert interval([resampled(np.ones((len(pairs), 1)), pairs, 0)], 0) is None, "groups are counted"
    parts = [resampled(np.ones((LEAST // 2, 1)), [""] * (LEAST // 2), seed) for seed in range(2)]
    assert interval(parts, 0) == (1, 1), "together they are enough"


def test_it_is_the_same_on_every_machine() -> None:
    values = np.arange(60) % 7 - 2.5
    assert of(values) == (-7 / 60, 54 / 60)
    assert of(values, [f"{i // 3}" for i in range(60)], 3) == (-7 / 60, 55 / 60)


def test_sums_are_exact_in_any_order() -> None:
    values = np.random.default_rng(6).normal(0, 10, 1000)
    part = resampled(values[:, None], [""] * 1000, 0)
    assert np.array_equal(part.sums * 2.0**20, np.round(part.sums * 2.0**20))
    assert np.abs(part.sums).max() * 2.0**20 < 2**53
