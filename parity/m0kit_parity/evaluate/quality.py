"""How well one artifact ranks, in numbers. Owns figures and what an evaluation holds; nDCG is `small/evaluate.py`'s.

quality_of(queries, logits, baseline).ndcg
"""

import itertools
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from m0kit_parity.bench.commands import Timing
from m0kit_parity.bench.measure import Memory
from m0kit_parity.evaluate.judged import Query
from m0kit_parity.small.evaluate import ndcg_at_k


@dataclass(frozen=True, slots=True)
class Quality:
    """How one artifact ranks one set; None where there are no judgements or no baseline to compare with."""

    ndcg: float | None  # nDCG@10, mean over queries
    loss: float | None  # points (hundredths of nDCG) below the baseline
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


@dataclass(frozen=True, slots=True)
class Evaluation:
    """The whole comparison, baseline first."""

    about: Mapping[str, Any]
    sets: Mapping[str, int]  # queries of each set, all of them together last if there are several
    chance: Mapping[str, float]  # nDCG@10 of a random order; empty without judgements
    artifacts: tuple[Measured, ...]
    errors: tuple[str, ...]

    @property
    def baseline(self) -> Measured:
        return self.artifacts[0]

    @property
    def judged(self) -> bool:
        return bool(self.chance)


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

    Documents are ranked by them, since scores near 0 and 1 are equal to rounding; `score` makes one's score.
    """
    ndcg = _mean_ndcg(queries, logits)
    if baseline is None:
        return Quality(ndcg, None, None, None, None, None)
    before = _mean_ndcg(queries, baseline)
    both = zip(itertools.chain(*logits), itertools.chain(*baseline), strict=True)
    deltas = np.abs([score(logit) - score(before) for logit, before in both])
    return Quality(
        ndcg,
        None if ndcg is None or before is None else 100 * (before - ndcg),
        float(deltas.max()),
        float(deltas.mean()),
        statistics.fmean(spearman(a, b) for a, b in zip(logits, baseline, strict=True)),
        statistics.fmean(float(np.argmax(a) == np.argmax(b)) for a, b in zip(logits, baseline, strict=True)),
    )


def _mean_ndcg(queries: Sequence[Query], scores: Sequence[Sequence[float]]) -> float | None:
    values = [ndcg_at_k(s, q.relevance) for q, s in zip(queries, scores, strict=True) if q.relevance]
    return statistics.fmean(values) if values else None
