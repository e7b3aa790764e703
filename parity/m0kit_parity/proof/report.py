"""A check from start to end: an artifact over golden cases, and the verdicts.

Owns running it and what came out. Measuring is in `compare.py`, limits in `tolerances.py`, the forms in `render.py`.

    check(Golden.open(folder), reranker, "fp32", about).verdict is Verdict.PASS
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from m0kit.errors import InputError
from m0kit.reranker import best_first
from m0kit_parity.proof.basis import turned_back
from m0kit_parity.proof.cases import Content, Published
from m0kit_parity.proof.compare import (
    StageResult,
    Verdict,
    compare_pair,
    compare_portable,
    compare_ranking,
    compare_scores,
    failed_stage,
    layer_profile,
    overall,
)
from m0kit_parity.proof.golden import Golden, GoldenCase, GoldenPair, Tracer
from m0kit_parity.proof.portable import Encoder
from m0kit_parity.proof.tolerances import PUBLISHED, Table, tolerances


class Scorer(Protocol):
    """What the published examples need of a `Reranker`."""

    def score(self, pairs: Sequence[tuple[Any, Any]]) -> Any:
        """One score per pair, in the order of the pairs."""


@dataclass(frozen=True, slots=True)
class PairReport:
    """All stages of one pair."""

    group: int  # query, counted within the case
    document: int  # counted within the query
    labels: tuple[str, str]  # query and document in a few words
    reference_score: float
    score: float | None  # None when the artifact gave no trace
    stages: tuple[StageResult, ...]
    profile: tuple[float, ...] = ()  # relative difference after each decoder layer, if asked for
    pictures: tuple[str, str] = ("", "")  # of query and document, if asked for: HTML for what is an image

    @property
    def verdict(self) -> Verdict:
        return overall(stage.verdict for stage in self.stages)


@dataclass(frozen=True, slots=True)
class RankingReport:
    """The order of one query's documents, best first, as document numbers."""

    group: int
    reference_order: tuple[int, ...]
    order: tuple[int, ...]
    stage: StageResult


@dataclass(frozen=True, slots=True)
class CaseReport:
    """One case: its pairs and, for every query with several documents, the ranking."""

    name: str
    why: str
    kind: str
    pairs: tuple[PairReport, ...]
    rankings: tuple[RankingReport, ...]

    @property
    def stages(self) -> tuple[StageResult, ...]:
        return (*(s for pair in self.pairs for s in pair.stages), *(r.stage for r in self.rankings))

    @property
    def verdict(self) -> Verdict:
        return overall(stage.verdict for stage in self.stages)

    def worst(self, stage: str) -> StageResult | None:
        """The result of `stage` that used most of its tolerance; None where the case has no such stage."""
        found = [s for s in self.stages if s.stage == stage]
        return max(found, key=lambda s: (list(Verdict).index(s.verdict), s.share), default=None)


@dataclass(frozen=True, slots=True)
class Report:
    """The whole check. `about` says what was compared (plain JSON values), shown as it is."""

    about: Mapping[str, Any]
    table: Table
    cases: tuple[CaseReport, ...]

    @property
    def verdict(self) -> Verdict:
        return overall(case.verdict for case in self.cases)


def check(
    golden: Golden,
    tracer: Tracer,
    precision: str,
    about: Mapping[str, Any],
    *,
    names: Sequence[str] = (),
    layers: bool = False,
    rotated: bool = False,
    portable: Encoder | None = None,
    picture: Callable[[Any], str] = lambda _: "",
    progress: Callable[[str], None] = lambda _: None,
) -> Report:
    """Trace every recorded pair with `tracer` and compare. Holds one case in memory at a time.

    `rotated`: the artifact's stream is in another basis (`m0kit_quant.rotate`), out of which its trace is turned back.
    `portable`: the portable image encoder, where the tracer runs another; it is held against the same images.
    `picture` makes of an image what a page shows of it.

    A pair that the artifact refuses with an InputError is a failure of that pair; other errors pass
    through. Raises ArtifactError for a precision without tolerances, InputError for a damaged folder or
    an unknown case name.
    """
    table = tolerances(precision)
    if rotated:
        tracer, portable = turned_back(tracer, portable, golden.norm())
    wanted = tuple(dict.fromkeys(names)) or golden.case_names
    cases = []
    for number, name in enumerate(wanted, 1):
        progress(f"checking {name} ({number} of {len(wanted)})")
        cases.append(_check_case(golden.read(name), tracer, table, layers, portable, picture))
    return Report(about, table, tuple(cases))


def check_published(
    groups: Sequence[Published],
    scorer: Scorer,
    about: Mapping[str, Any],
    *,
    picture: Callable[[Any], str] = lambda _: "",
) -> Report:
    """The model card's examples against the scores printed there."""
    cases = []
    for number, published in enumerate(groups, 1):
        query, documents = published.group.query, published.group.documents
        scores = [float(s) for s in scorer.score([(query.value(), d.value()) for d in documents])]
        pairs = tuple(
            PairReport(
                *(0, d, (query.label(), document.label()), expected, score, (_score_stage(expected, score),)),
                pictures=_pictures((query, document), picture),
            )
            for d, (document, expected, score) in enumerate(zip(documents, published.scores, scores, strict=True))
        )
        ranking = _ranking(0, published.scores, scores, PUBLISHED)
        cases.append(CaseReport(f"published-{number}", published.name, "", pairs, (ranking,)))
    return Report(about, PUBLISHED, tuple(cases))


def _score_stage(expected: float, score: float) -> StageResult:
    return compare_scores([expected], [score], PUBLISHED)[0]


def _check_case(
    case: GoldenCase,
    tracer: Tracer,
    table: Table,
    layers: bool,
    portable: Encoder | None,
    picture: Callable[[Any], str],
) -> CaseReport:
    checked = (_check_pair(pair, tracer, table, layers, portable) for pair in case.pairs)
    pairs = tuple(
        replace(result, pictures=_pictures(pair.inputs, picture))
        for pair, result in zip(case.pairs, checked, strict=True)
    )
    rankings = []
    for group in dict.fromkeys(pair.group for pair in pairs):
        mine = [pair for pair in pairs if pair.group == group]
        if len(mine) > 1:
            scores = [math.nan if pair.score is None else pair.score for pair in mine]
            rankings.append(_ranking(group, [pair.reference_score for pair in mine], scores, table))
    return CaseReport(case.name, case.why, case.kind, pairs, tuple(rankings))


def _pictures(inputs: tuple[Content, Content], picture: Callable[[Any], str]) -> tuple[str, str]:
    query, document = ("" if content.form == "text" else picture(content.value()) for content in inputs)
    return query, document


def _check_pair(pair: GoldenPair, tracer: Tracer, table: Table, layers: bool, portable: Encoder | None) -> PairReport:
    query, document = pair.inputs
    labels = (query.label(), document.label())
    before = tuple(
        failed_stage(
            "input_pixels",
            "exact",
            f"the {side}'s image is decoded to other pixels on this machine than where it was recorded",
        )
        for side in pair.drifted
    )
    try:
        trace = tracer.trace((query.value(), document.value()), layers=layers)
    except InputError as error:
        refused = failed_stage("trace", "exact", f"the artifact refused this pair: {error}")
        return PairReport(pair.group, pair.document, labels, pair.trace.score, None, (*before, refused))
    stages = [*before, *compare_pair(pair.trace, trace, table, layers)]
    if portable is not None and trace.patches:
        stages.append(compare_portable(pair.trace.image_embeds, portable(trace), table))
    profile = layer_profile(pair.trace, trace) if layers else ()
    score = float(trace.score)
    return PairReport(pair.group, pair.document, labels, pair.trace.score, score, tuple(stages), profile)


def _ranking(group: int, reference: Sequence[float], scores: Sequence[float], table: Table) -> RankingReport:
    return RankingReport(
        group, tuple(best_first(reference)), tuple(best_first(scores)), compare_ranking(reference, scores, table)
    )
