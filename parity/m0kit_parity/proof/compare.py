"""Two traces in, one result per stage out: how much of each tolerance was used. Pure functions on numpy.

Owns the measuring and the three verdicts; limits are in `tolerances.py`, rendering is in `report.py`,
and where traces come from is not known here.

    >>> from m0kit_parity.proof.tolerances import tolerances
    >>> compare_scores([0.7, 0.2], [0.7, 0.2], tolerances("fp32"))[1].verdict
    <Verdict.PASS: 'pass'>
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import numpy as np
from numpy.typing import NDArray

from m0kit.reranker import best_first
from m0kit.trace import Trace
from m0kit_parity.proof.tolerances import RELATIVE_FLOOR, STAGES, Table, Tolerance


class Verdict(StrEnum):
    """Worst last. A near-tie is no failure: the reference itself can hardly tell the two documents apart."""

    PASS = "pass"
    NEAR_TIE = "near-tie"
    FAIL = "fail"


@dataclass(frozen=True, slots=True)
class StageResult:
    """One stage of one pair (or the ranking of one query) against its tolerance."""

    stage: str
    measure: str  # exact, relative or absolute, as defined in tolerances.py
    value: float  # what was measured; infinite where nothing could be (shape, type, NaN)
    limit: float
    share: float  # value / limit; for exact stages 0 or infinite
    verdict: Verdict
    worst: str  # where the largest difference is, or what is wrong


def overall(verdicts: Iterable[Verdict]) -> Verdict:
    """The worst of them; PASS for none."""
    return max(verdicts, key=list(Verdict).index, default=Verdict.PASS)


def compare_pair(reference: Trace, trace: Trace, table: Table, layers: bool = False) -> tuple[StageResult, ...]:
    """Every stage of one pair except ranking and what another graph gives, in the order of STAGES.

    A pair without images on both sides has no stages for patches and image embeddings. The hidden states
    per layer are compared only if `layers`; then both traces must have them.
    """
    measured: dict[str, Callable[[Tolerance], tuple[float, str]]] = {
        "token_ids": lambda t: _tensor(reference.token_ids, trace.token_ids, t),
        "positions": lambda t: _tensor(reference.positions, trace.positions, t),
        "grid_thw": lambda t: _tensor(reference.grid_thw, trace.grid_thw, t),
        "patches": lambda t: _tensors(reference.patches, trace.patches, t),
        "image_embeds": lambda t: _tensors(reference.image_embeds, trace.image_embeds, t),
        "layers": lambda t: _optional(reference.layers, trace.layers, t),
        "hidden": lambda t: _tensor(reference.hidden, trace.hidden, t),
        "logit": lambda t: _tensor(np.asarray(reference.logit), np.asarray(trace.logit), t),
        "score": lambda t: _tensor(np.asarray(reference.score), np.asarray(trace.score), t),
    }
    if not layers:
        del measured["layers"]
    for stage, tensors in (
        ("patches", (*reference.patches, *trace.patches)),
        ("image_embeds", (*reference.image_embeds, *trace.image_embeds)),
    ):
        if not tensors:
            del measured[stage]
    return tuple(_judge(stage, table[stage], *measured[stage](table[stage])) for stage in STAGES if stage in measured)


def compare_portable(
    reference: Sequence[NDArray[np.float32]], embeds: Sequence[NDArray[np.float32]], table: Table
) -> StageResult:
    """Image embeddings (V, D) of one pair that the portable graph gives, beside those of its trace."""
    tolerance = table["portable_embeds"]
    return _judge("portable_embeds", tolerance, *_tensors(tuple(reference), tuple(embeds), tolerance))


def compare_ranking(reference: Sequence[float], scores: Sequence[float], table: Table) -> StageResult:
    """The order of one query's documents by falling score; equal scores keep the order of the documents.

    Two documents that changed places are a near-tie if their reference scores differ by less than the
    ranking limit, and a failure otherwise. `value` is the largest such difference.
    """
    tolerance = table["ranking"]
    if len(reference) != len(scores):
        return _judge("ranking", tolerance, math.inf, f"{len(scores)} scores, expected {len(reference)}")
    if not all(map(math.isfinite, (*reference, *scores))):
        return _judge("ranking", tolerance, math.inf, "a score is not a finite number")
    expected, place = best_first(reference), {d: p for p, d in enumerate(best_first(scores))}
    swaps = [
        (reference[better] - reference[worse], better, worse)
        for i, better in enumerate(expected)
        for worse in expected[i + 1 :]
        if place[better] > place[worse]
    ]
    if not swaps:
        return StageResult("ranking", tolerance.measure, 0.0, tolerance.limit, 0.0, Verdict.PASS, "")
    value, better, worse = max(swaps)
    near = value < tolerance.limit
    return StageResult(
        "ranking",
        tolerance.measure,
        value,
        tolerance.limit,
        value / tolerance.limit,
        Verdict.NEAR_TIE if near else Verdict.FAIL,
        f"document {worse} is placed before document {better}, whose reference score is {value:.2g} higher",
    )


def compare_scores(
    reference: Sequence[float], scores: Sequence[float], table: Table
) -> tuple[StageResult, StageResult]:
    """Scores alone, without traces: (score of the worst document, ranking)."""
    value, worst = _tensor(
        np.asarray(reference, dtype=np.float64), np.asarray(scores, dtype=np.float64), table["score"]
    )
    return _judge("score", table["score"], value, worst), compare_ranking(reference, scores, table)


def layer_profile(reference: Trace, trace: Trace) -> tuple[float, ...]:
    """The relative measure after each decoder layer, for a plot; empty unless both sides have the layers."""
    r, a = reference.layers, trace.layers
    if r is None or a is None or r.shape != a.shape:
        return ()
    return tuple(float(v) for v in _relative(r, a).max(axis=-1))


def failed_stage(stage: str, measure: str, what: str) -> StageResult:
    """A stage that could not be measured at all, for instance because the artifact refused the pair."""
    return StageResult(stage, measure, math.inf, 0.0, math.inf, Verdict.FAIL, what)


def _judge(stage: str, tolerance: Tolerance, value: float, worst: str) -> StageResult:
    if math.isnan(value):
        value = math.inf
    exact = math.inf if value else 0.0
    share = value / tolerance.limit if tolerance.limit else exact
    # NaN compares false with everything, so passing is what has to be shown, not failing.
    verdict = Verdict.PASS if value <= tolerance.limit else Verdict.FAIL
    return StageResult(stage, tolerance.measure, value, tolerance.limit, share, verdict, worst)


def _optional(reference: NDArray[Any] | None, value: NDArray[Any] | None, tolerance: Tolerance) -> tuple[float, str]:
    if reference is None or value is None:
        side = "reference" if reference is None else "artifact"
        return math.inf, f"the {side} gives no hidden states per layer"
    return _tensor(reference, value, tolerance)


def _tensors(
    reference: Sequence[NDArray[Any]], values: Sequence[NDArray[Any]], tolerance: Tolerance
) -> tuple[float, str]:
    """The worst of a pair's images."""
    if len(reference) != len(values):
        return math.inf, f"{len(values)} images, expected {len(reference)}"
    worst, where = 0.0, ""
    for image, (r, a) in enumerate(zip(reference, values, strict=True)):
        value, text = _tensor(r, a, tolerance)
        if value > worst:
            worst, where = value, f"image {image}: {text}"
    return worst, where


def _tensor(reference: NDArray[Any], value: NDArray[Any], tolerance: Tolerance) -> tuple[float, str]:
    """(measure, where the worst value is); infinite for another shape or type, or a value not finite."""
    if reference.shape != value.shape:
        return math.inf, f"shape {value.shape}, expected {reference.shape}"
    if reference.dtype != value.dtype:
        return math.inf, f"type {value.dtype}, expected {reference.dtype}"
    for side, tensor in (("reference", reference), ("artifact", value)):
        if not np.isfinite(tensor).all():
            at = np.argwhere(~np.isfinite(tensor))[0].tolist()
            return math.inf, f"the {side} has a value that is not finite at {at}"
    if not reference.size:
        return 0.0, ""
    if tolerance.measure == "exact":
        different = reference != value
        count = int(different.sum())
        if not count:
            return 0.0, ""
        first = tuple(np.argwhere(different)[0].tolist())
        return float(count), (
            f"{count} of {reference.size} values, first at {list(first)}: {value[first]}, expected {reference[first]}"
        )
    if tolerance.measure == "relative":
        distance = _relative(reference, value)
    else:
        distance = np.abs(value.astype(np.float64) - reference.astype(np.float64))
    flat = int(distance.argmax())
    at = tuple(int(i) for i in np.unravel_index(flat, distance.shape))
    worst = float(distance[at])
    if not worst:
        return 0.0, ""
    where = f"at {list(at)}: " if at else ""
    return worst, f"{where}{value[at]:.7g}, expected {reference[at]:.7g}"


def _relative(reference: NDArray[Any], value: NDArray[Any]) -> NDArray[np.float64]:
    """|a − r| over the root mean square of r's row, shaped like r."""
    wide = reference.astype(np.float64)
    size = np.sqrt(np.mean(np.square(wide), axis=-1, keepdims=True))
    return np.asarray(np.abs(value.astype(np.float64) - wide) / np.maximum(size, RELATIVE_FLOOR))


def as_dict(result: StageResult) -> Mapping[str, Any]:
    """JSON form: infinite figures become null, which strict JSON parsers take."""
    return {
        "stage": result.stage,
        "measure": result.measure,
        "value": result.value if math.isfinite(result.value) else None,
        "limit": result.limit,
        "share": result.share if math.isfinite(result.share) else None,
        "verdict": result.verdict.value,
        "worst": result.worst,
    }
