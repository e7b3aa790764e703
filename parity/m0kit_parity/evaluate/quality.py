"""How well one artifact ranks, in numbers. Owns figures and what an evaluation holds; nDCG is `small/evaluate.py`'s.

quality_of(queries, logits, baseline).ndcg
"""

import itertools
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

import numpy as np
from numpy.typing import NDArray

from m0kit.artifact.ports import Kept
from m0kit.reranker import best_first
from m0kit_parity.bench.measure import Memory
from m0kit_parity.bench.timing import Timing
from m0kit_parity.evaluate.intervals import Interval
from m0kit_parity.evaluate.judged import Query
from m0kit_parity.small.evaluate import ndcg_at_k

# Points of nDCG@10 that a precision may lose against fp32, and why so many. One without a limit is only shown.
_SAME = "16 bits move scores by less than documents differ that are told apart, so only ties may turn over"
_FOUR = "what a quarter of int8's memory may cost: less than between one checkpoint and the next"
LIMITS: Final[Mapping[str, tuple[float, str]]] = {
    "fp16": (0.1, _SAME),
    "bf16": (0.1, _SAME),
    "int8": (0.2, "the default for CPUs must rank as fp32 does: what 1,700 queries can just tell from nothing"),
    "int4": (1.0, _FOUR),
    "nf4": (1.0, _FOUR),
}
_MOST_CHANGED: Final = 3  # queries of each artifact
# "perhaps over the limit": a loss is certain, and not whether it is over the limit.
Verdict = Literal["within the limit", "over the limit", "cannot tell", "perhaps over the limit"]


@dataclass(frozen=True, slots=True)
class Quality:
    """How one artifact ranks one set; None where there are no judgements or no baseline to compare with."""

    ndcg: float | None  # nDCG@10, mean over queries
    loss: float | None  # points (hundredths of nDCG) below the baseline
    interval: Interval | None  # of the loss, 95 %; None also where queries are too few to tell (intervals.LEAST)
    changed: int | None  # queries whose nDCG@10 is not the baseline's: what the interval rests on
    max_delta: float | None  # of the scores, |artifact − baseline|
    mean_delta: float | None
    spearman: float | None  # rank correlation with the baseline's scores, mean over queries
    same_first: float | None  # share of queries whose first document is the baseline's


@dataclass(frozen=True, slots=True)
class Measured:
    """All of one artifact. `seconds` compares with the baseline: `ratio` 2 is twice as fast."""

    label: str
    path: str
    scheme: str
    num_bytes: int
    fingerprint: str
    quality: Mapping[str, Quality]  # by set
    memory: Mapping[str, Memory]  # by workload; without those that failed
    seconds: Mapping[str, Timing]
    kv: Kept = "fp32"  # how documents were kept


@dataclass(frozen=True, slots=True)
class Change:
    """A query that an artifact ranks otherwise than the baseline, with the scores of its documents, in their order."""

    artifact: str
    query: Query
    before: tuple[float, ...]
    after: tuple[float, ...]
    ndcg: tuple[float, float] | None  # before and after; None without judgements
    spearman: float


@dataclass(frozen=True, slots=True)
class Evaluation:
    """The whole comparison, baseline first."""

    about: Mapping[str, Any]
    sets: Mapping[str, int]  # queries of each set, all of them together last if there are several
    chance: Mapping[str, float]  # nDCG@10 of a random order; empty without judgements
    artifacts: tuple[Measured, ...]
    errors: tuple[str, ...]
    changes: tuple[Change, ...] = ()  # of each artifact the largest, largest first
    exact: bool = False  # the baseline holds the checkpoint's own values, as fp32 would, whatever its scheme

    def limit(self, artifact: Measured) -> float | None:
        """Points of nDCG@10 that an artifact may lose; None where there is no limit, or nothing to hold against it."""
        is_exact = self.exact or self.baseline.scheme == "fp32"
        if not self.judged or artifact is self.baseline or not is_exact or artifact.kv != "fp32":
            return None
        return LIMITS[artifact.scheme][0] if artifact.scheme in LIMITS else None

    def verdict(self, artifact: Measured) -> Verdict | None:
        """Whether what an artifact loses is within its limit, over all queries; None where it has no limit."""
        limit = self.limit(artifact)
        return None if limit is None else verdict_of(artifact.quality[list(self.sets)[-1]].interval, limit)

    @property
    def baseline(self) -> Measured:
        return self.artifacts[0]

    @property
    def judged(self) -> bool:
        return bool(self.chance)


def verdict_of(interval: Interval | None, limit: float) -> Verdict:
    """What an interval says of a limit, 0 or more. Without an interval, of too few queries, nothing can be told."""
    if interval is None:
        return "cannot tell"
    low, high = interval
    if high <= limit:
        return "within the limit"
    if low > limit:
        return "over the limit"
    return "cannot tell" if low <= 0 else "perhaps over the limit"


def spearman(a: Sequence[float], b: Sequence[float]) -> float:
    """Rank correlation, −1 to 1, equal values sharing the mean of their ranks.

    Where all values of a side are equal it is not defined: 1 if both sides are so (the same order), otherwise
    0 (nothing of the order is left).
    """
    x, y = (_ranks(np.asarray(side, np.float64)) for side in (a, b))
    x, y = x - x.mean(), y - y.mean()
    norm = math.sqrt(float(x @ x) * float(y @ y))
    if norm == 0:
        return float(not x.any() and not y.any())
    return float(x @ y) / norm


def _ranks(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Ranks from 1; equal values share the mean of theirs."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    shared: NDArray[np.float64] = (np.cumsum(counts) - (counts - 1) / 2)[inverse]
    return shared


def quality_of(
    queries: Sequence[Query],
    logits: Sequence[Sequence[float]],
    baseline: Sequence[Sequence[float]] | None,
    score: Callable[[float], float] = lambda logit: logit,
) -> Quality:
    """Quality of `logits` (for each query one per document) against the baseline's; None for the baseline itself.

    Documents are ranked by them, since scores near 0 and 1 are equal to rounding; `score` makes one's score. What needs
    more than these queries, the interval, is not known here.
    """
    ndcg = _mean_ndcg(queries, logits)
    if baseline is None:
        return Quality(ndcg, None, None, None, None, None, None, None)
    losses = losses_of(queries, logits, baseline)
    both = zip(itertools.chain(*logits), itertools.chain(*baseline), strict=True)
    deltas = np.abs([score(logit) - score(before) for logit, before in both])
    return Quality(
        ndcg,
        statistics.fmean(losses) if losses else None,
        None,
        sum(loss != 0 for loss in losses) if losses else None,
        float(deltas.max()),
        float(deltas.mean()),
        statistics.fmean(spearman(a, b) for a, b in zip(logits, baseline, strict=True)),
        statistics.fmean(float(np.argmax(a) == np.argmax(b)) for a, b in zip(logits, baseline, strict=True)),
    )


def losses_of(
    queries: Sequence[Query], logits: Sequence[Sequence[float]], baseline: Sequence[Sequence[float]]
) -> list[float]:
    """Points of nDCG@10 that each query lost, of those that are judged."""
    return [
        100 * (ndcg_at_k(before, query.relevance) - ndcg_at_k(after, query.relevance))
        for query, after, before in zip(queries, logits, baseline, strict=True)
        if query.relevance
    ]


def _mean_ndcg(queries: Sequence[Query], scores: Sequence[Sequence[float]]) -> float | None:
    values = [ndcg_at_k(s, q.relevance) for q, s in zip(queries, scores, strict=True) if q.relevance]
    return statistics.fmean(values) if values else None


def changes_of(
    artifact: str,
    queries: Sequence[Query],
    logits: Sequence[Sequence[float]],
    baseline: Sequence[Sequence[float]],
    score: Callable[[float], float],
) -> list[Change]:
    """The queries whose documents changed places most: by nDCG@10 where they are judged, by Spearman without."""
    found = []
    for query, after, before in zip(queries, logits, baseline, strict=True):
        if best_first(after) == best_first(before):
            continue
        relevance = query.relevance
        ndcg = (ndcg_at_k(before, relevance), ndcg_at_k(after, relevance)) if relevance else None
        sides = tuple(map(score, before)), tuple(map(score, after))
        found.append(Change(artifact, query, *sides, ndcg, spearman(after, before)))
    found.sort(key=lambda c: (-abs(c.ndcg[1] - c.ndcg[0]) if c.ndcg else 0, c.spearman))
    return found[:_MOST_CHANGED]
