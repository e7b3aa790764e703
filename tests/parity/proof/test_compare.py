"""The comparator can fail: every stage, every kind of damage, and only where the damage is."""

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from m0kit.errors import ArtifactError
from m0kit.reranker import best_first
from m0kit.trace import Trace
from m0kit_parity.proof.compare import (
    Verdict,
    as_dict,
    compare_pair,
    compare_portable,
    compare_ranking,
    compare_scores,
    layer_profile,
    overall,
)
from m0kit_parity.proof.tolerances import PUBLISHED, STAGES, Tolerance, tolerances

FP32 = tolerances("fp32")


def make_trace(**changes: Any) -> Trace:
    """A pair with two images of different sizes and three layers, every value different."""
    rng = np.random.RandomState(0)

    def floats(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape).astype(np.float32)

    trace = Trace(
        token_ids=np.arange(20, dtype=np.int64),
        positions=np.arange(60, dtype=np.int64).reshape(3, 20),
        grid_thw=np.array([[1, 4, 2], [1, 2, 2]], dtype=np.int64),
        patches=(floats(8, 1176), floats(4, 1176)),
        image_embeds=(floats(2, 16), floats(1, 16)),
        hidden=floats(16),
        logit=1.25,
        score=0.2,
        layers=floats(3, 16),
    )
    return dataclasses.replace(trace, **changes)


def verdicts(trace: Trace, reference: Trace | None = None, precision: str = "fp32") -> dict[str, Verdict]:
    results = compare_pair(reference or make_trace(), trace, tolerances(precision), layers=True)
    return {result.stage: result.verdict for result in results}


def damaged(stage: str, change: Any) -> Trace:
    """The trace with `change` applied to a copy of one stage's (last) tensor."""
    trace = make_trace()
    value = getattr(trace, stage)
    if isinstance(value, tuple):
        return dataclasses.replace(trace, **{stage: (*value[:-1], change(value[-1].copy()))})
    if isinstance(value, float):
        return dataclasses.replace(trace, **{stage: float(change(np.array([value]))[0])})
    return dataclasses.replace(trace, **{stage: change(value.copy())})


def set_last(amount: float) -> Any:
    def change(tensor: np.ndarray) -> np.ndarray:
        tensor[(-1,) * tensor.ndim] += amount
        return tensor

    return change


PAIR_STAGES = [stage for stage in STAGES if stage not in ("portable_embeds", "ranking")]
TENSORS = [stage for stage in PAIR_STAGES if stage not in ("logit", "score")]


def test_equal_traces_pass_every_stage_and_use_nothing() -> None:
    results = compare_pair(make_trace(), make_trace(), FP32, layers=True)
    assert [r.stage for r in results] == PAIR_STAGES
    assert all(r.verdict is Verdict.PASS and r.share == 0 and r.worst == "" for r in results)


@pytest.mark.parametrize("stage", PAIR_STAGES)
def test_one_changed_value_fails_its_stage_and_no_other(stage: str) -> None:
    found = verdicts(damaged(stage, set_last(1)))
    assert found.pop(stage) is Verdict.FAIL
    assert set(found.values()) == {Verdict.PASS}


@pytest.mark.parametrize("stage", [s for s in PAIR_STAGES if FP32[s].measure != "exact"])
@pytest.mark.parametrize(("part", "verdict"), [(0.9, Verdict.PASS), (1.1, Verdict.FAIL)])
def test_the_limit_is_where_the_table_says(stage: str, part: float, verdict: Verdict) -> None:
    if FP32[stage].measure == "relative":
        tensor = getattr(make_trace(), stage)
        row = np.atleast_2d(tensor[-1] if isinstance(tensor, tuple) else tensor)[-1]
        size = float(np.sqrt(np.mean(np.square(row.astype(np.float64)))))
    else:
        size = 1.0
    amount = part * FP32[stage].limit * size
    result = next(
        r for r in compare_pair(make_trace(), damaged(stage, set_last(amount)), FP32, layers=True) if r.stage == stage
    )
    assert result.verdict is verdict
    # fp32 storage of the damaged value costs up to 6e-8 of it, far under a percent of the share
    assert result.share == pytest.approx(part, rel=1e-2)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("stage", ["patches", "image_embeds", "layers", "hidden", "logit", "score"])
def test_a_value_that_is_not_finite_fails_on_either_side_and_even_on_both(stage: str, bad: float) -> None:
    broken = damaged(stage, set_last(bad))
    assert verdicts(broken)[stage] is Verdict.FAIL
    assert verdicts(make_trace(), reference=broken)[stage] is Verdict.FAIL
    assert verdicts(broken, reference=broken)[stage] is Verdict.FAIL


@pytest.mark.parametrize("stage", TENSORS)
def test_another_shape_fails_even_where_numpy_would_broadcast(stage: str) -> None:
    found = verdicts(damaged(stage, lambda t: t[..., :1]))
    assert found[stage] is Verdict.FAIL


@pytest.mark.parametrize("stage", TENSORS)
def test_another_type_fails_although_the_values_are_equal(stage: str) -> None:
    other = np.int32 if stage in ("token_ids", "positions", "grid_thw") else np.float64
    found = verdicts(damaged(stage, lambda t: t.astype(other)))
    assert found.pop(stage) is Verdict.FAIL
    assert set(found.values()) == {Verdict.PASS}


@pytest.mark.parametrize("stage", ["patches", "image_embeds"])
def test_a_missing_and_a_swapped_image_fail(stage: str) -> None:
    images = getattr(make_trace(), stage)
    assert verdicts(make_trace(**{stage: images[:1]}))[stage] is Verdict.FAIL
    assert verdicts(make_trace(**{stage: images[::-1]}))[stage] is Verdict.FAIL


def test_a_small_wrong_row_is_not_hidden_behind_large_ones() -> None:
    embeds = np.ones((4, 16), dtype=np.float32) * np.array([[1000], [1000], [1000], [0.1]], dtype=np.float32)
    wrong = embeds.copy()
    wrong[3, 5] += 1e-3  # a hundredth of its row, a millionth of the tensor
    found = verdicts(make_trace(image_embeds=(wrong,)), make_trace(image_embeds=(embeds,)))
    assert found["image_embeds"] is Verdict.FAIL


def test_a_row_of_zeros_has_a_defined_share() -> None:
    zeros = make_trace(hidden=np.zeros(16, dtype=np.float32))
    assert verdicts(zeros, zeros)["hidden"] is Verdict.PASS
    assert verdicts(make_trace(hidden=np.full(16, 1e-3, np.float32)), zeros)["hidden"] is Verdict.FAIL


def test_layers_are_compared_only_on_request_and_then_must_be_there() -> None:
    without = make_trace(layers=None)
    assert "layers" not in {r.stage for r in compare_pair(make_trace(), without, FP32)}
    assert verdicts(without)["layers"] is Verdict.FAIL
    assert verdicts(make_trace(), reference=without)["layers"] is Verdict.FAIL


def test_the_layer_profile_is_the_relative_difference_of_each_layer() -> None:
    reference = make_trace(layers=np.full((3, 16), 2, dtype=np.float32))
    layers = np.full((3, 16), 2, dtype=np.float32)
    layers[1, 4] = 2.5
    assert layer_profile(reference, make_trace(layers=layers)) == (0.0, 0.25, 0.0)
    assert layer_profile(reference, make_trace(layers=None)) == ()


def test_a_text_pair_has_no_image_stages_but_an_unexpected_image_fails() -> None:
    text = make_trace(grid_thw=np.zeros((0, 3), dtype=np.int64), patches=(), image_embeds=())
    assert "patches" not in verdicts(text, text)
    assert {verdicts(make_trace(), text)[s] for s in ("grid_thw", "patches", "image_embeds")} == {Verdict.FAIL}


def test_the_worst_place_is_named() -> None:
    result = next(
        r for r in compare_pair(make_trace(), damaged("token_ids", set_last(5)), FP32) if r.stage == "token_ids"
    )
    assert result.worst == "1 of 20 values, first at [19]: 24, expected 19"
    assert (result.value, result.share) == (1, math.inf)
    assert as_dict(result)["share"] is None  # strict JSON has no infinity


@pytest.mark.parametrize(
    ("scores", "verdict"),
    [
        ([0.9, 0.5, 0.49985, 0.1], Verdict.PASS),
        ([0.9, 0.49985, 0.5, 0.1], Verdict.NEAR_TIE),  # 1.5e-4 apart, under twice 1e-4
        ([0.5, 0.9, 0.49985, 0.1], Verdict.FAIL),
        ([0.9, 0.1, 0.2, 0.3], Verdict.FAIL),  # one swap of the last two would be none
        ([0.9, 0.5, 0.49985, math.nan], Verdict.FAIL),
        ([0.9, 0.5, 0.49985], Verdict.FAIL),
    ],
)
def test_a_ranking_passes_ties_or_fails(scores: list[float], verdict: Verdict) -> None:
    assert compare_ranking([0.9, 0.5, 0.49985, 0.1], scores, FP32).verdict is verdict


def test_a_swap_at_exactly_the_ranking_limit_fails() -> None:
    limit = FP32["ranking"].limit
    assert compare_ranking([limit, 0.0], [0.0, 1.0], FP32).verdict is Verdict.FAIL
    assert compare_ranking([limit * 0.999, 0.0], [0.0, 1.0], FP32).verdict is Verdict.NEAR_TIE


def test_equal_scores_keep_the_order_of_the_documents() -> None:
    assert best_first([0.5, 0.7, 0.5]) == [1, 0, 2]
    assert compare_ranking([0.5, 0.5], [0.5, 0.5], FP32).verdict is Verdict.PASS
    assert compare_ranking([0.5, 0.5], [0.5, 0.500001], FP32).verdict is Verdict.NEAR_TIE


@given(st.lists(st.floats(0, 1), min_size=2, max_size=8), st.data())
def test_scores_within_their_tolerance_never_fail_the_ranking(reference: list[float], data: st.DataObject) -> None:
    noise = st.floats(-0.99 * FP32["score"].limit, 0.99 * FP32["score"].limit)
    scores = [r + data.draw(noise) for r in reference]
    score, ranking = compare_scores(reference, scores, FP32)
    assert score.verdict is Verdict.PASS
    assert ranking.verdict is not Verdict.FAIL


@given(st.lists(st.floats(0, 1), min_size=2, max_size=8, unique=True), st.randoms())
def test_a_ranking_passes_exactly_when_the_orders_are_equal(reference: list[float], random: Any) -> None:
    scores = reference.copy()
    random.shuffle(scores)
    passed = compare_ranking(reference, scores, FP32).verdict is Verdict.PASS
    assert passed == (best_first(reference) == best_first(scores))


def test_published_scores_are_held_to_their_own_noise() -> None:
    assert compare_scores([0.68, 0.44], [0.689, 0.431], PUBLISHED)[0].verdict is Verdict.PASS
    assert compare_scores([0.68, 0.44], [0.691, 0.44], PUBLISHED)[0].verdict is Verdict.FAIL


@pytest.mark.parametrize(("part", "verdict"), [(0.0, Verdict.PASS), (0.9, Verdict.PASS), (1.1, Verdict.FAIL)])
def test_what_the_portable_graph_gives_is_held_against_the_limit_of_image_embeddings(
    part: float, verdict: Verdict
) -> None:
    assert FP32["portable_embeds"].limit == FP32["image_embeds"].limit
    reference = [np.ones((2, 16), np.float32), np.ones((1, 16), np.float32)]
    embeds = [reference[0], reference[1] + np.float32(part * FP32["portable_embeds"].limit)]
    result = compare_portable(reference, embeds, FP32)
    assert (result.stage, result.verdict) == ("portable_embeds", verdict)
    assert compare_portable(reference, embeds[:1], FP32).verdict is Verdict.FAIL


def test_overall_is_the_worst_verdict() -> None:
    assert overall([]) is Verdict.PASS
    assert overall([Verdict.PASS, Verdict.NEAR_TIE]) is Verdict.NEAR_TIE
    assert overall([Verdict.NEAR_TIE, Verdict.FAIL, Verdict.PASS]) is Verdict.FAIL


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_every_stage_has_a_limit_with_a_reason(precision: str) -> None:
    table = tolerances(precision)
    assert set(table) == set(STAGES)
    assert all(len(t.why) > 20 for t in table.values())
    assert {s for s in STAGES if table[s].measure == "exact"} == {
        "token_ids",
        "positions",
        "grid_thw",
        "patches",
    }


def test_the_fp32_limits_are_the_ones_that_were_asked_for() -> None:
    assert FP32["image_embeds"].limit == FP32["hidden"].limit == FP32["layers"].limit == 1e-4
    assert FP32["score"].limit == 1e-4


def test_a_precision_without_a_table_is_an_error_that_lists_the_others() -> None:
    with pytest.raises(ArtifactError, match=r"'int3'.*fp32, fp16"):
        tolerances("int3")


@pytest.mark.parametrize(("measure", "limit", "why"), [("exact", 1, "x"), ("absolute", 0, "x"), ("absolute", 1, "")])
def test_a_tolerance_without_sense_is_refused(measure: Any, limit: float, why: str) -> None:
    with pytest.raises(ValueError, match=r"limit|reason"):
        Tolerance(measure, limit, why)
