"""A check from start to end, and its three forms: a text table, JSON, a self-contained HTML page.

Owns running an artifact over golden cases and rendering what came out. Measuring is in `compare.py`,
limits are in `tolerances.py`.

    report = check(Golden.open(folder), reranker, "fp32", about)
    show(*to_text(report).split("\n")); report.verdict is Verdict.PASS
"""

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any, Final, Protocol

from m0kit.errors import InputError
from m0kit.plain import plain
from m0kit.reranker import best_first
from m0kit_parity.drawing import plot
from m0kit_parity.drawing.table import table
from m0kit_parity.proof.cases import Published
from m0kit_parity.proof.compare import (
    StageResult,
    Verdict,
    as_dict,
    compare_pair,
    compare_ranking,
    compare_scores,
    failed_stage,
    layer_profile,
    overall,
)
from m0kit_parity.proof.golden import Golden, GoldenCase, GoldenPair, Tracer
from m0kit_parity.proof.tolerances import PUBLISHED, STAGES, Table, tolerances

# Stages of a check that have no limit of their own: they say why later stages may differ.
_BEFORE: Final = ("input_pixels", "trace")

_STYLES: Final = {Verdict.PASS: "pass", Verdict.NEAR_TIE: "near", Verdict.FAIL: "fail"}


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
    progress: Callable[[str], None] = lambda _: None,
) -> Report:
    """Trace every recorded pair with `tracer` and compare. Holds one case in memory at a time.

    A pair that the artifact refuses with an InputError is a failure of that pair; other errors pass
    through. Raises ArtifactError for a precision without tolerances, InputError for a damaged folder or
    an unknown case name.
    """
    table = tolerances(precision)
    wanted = tuple(dict.fromkeys(names)) or golden.case_names
    cases = []
    for number, name in enumerate(wanted, 1):
        progress(f"checking {name} ({number} of {len(wanted)})")
        cases.append(_check_case(golden.read(name), tracer, table, layers))
    return Report(about, table, tuple(cases))


def check_published(groups: Sequence[Published], scorer: Scorer, about: Mapping[str, Any]) -> Report:
    """The model card's examples against the scores printed there."""
    cases = []
    for number, published in enumerate(groups, 1):
        query, documents = published.group.query, published.group.documents
        scores = [float(s) for s in scorer.score([(query.value(), d.value()) for d in documents])]
        pairs = tuple(
            PairReport(0, d, (query.label(), document.label()), expected, score, (_score_stage(expected, score),))
            for d, (document, expected, score) in enumerate(zip(documents, published.scores, scores, strict=True))
        )
        ranking = _ranking(0, published.scores, scores, PUBLISHED)
        cases.append(CaseReport(f"published-{number}", published.name, "", pairs, (ranking,)))
    return Report(about, PUBLISHED, tuple(cases))


def _score_stage(expected: float, score: float) -> StageResult:
    return compare_scores([expected], [score], PUBLISHED)[0]


def _check_case(case: GoldenCase, tracer: Tracer, table: Table, layers: bool) -> CaseReport:
    pairs = tuple(_check_pair(pair, tracer, table, layers) for pair in case.pairs)
    rankings = []
    for group in dict.fromkeys(pair.group for pair in pairs):
        mine = [pair for pair in pairs if pair.group == group]
        if len(mine) > 1:
            scores = [math.nan if pair.score is None else pair.score for pair in mine]
            rankings.append(_ranking(group, [pair.reference_score for pair in mine], scores, table))
    return CaseReport(case.name, case.why, case.kind, pairs, tuple(rankings))


def _check_pair(pair: GoldenPair, tracer: Tracer, table: Table, layers: bool) -> PairReport:
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
    stages = (*before, *compare_pair(pair.trace, trace, table, layers))
    profile = layer_profile(pair.trace, trace) if layers else ()
    return PairReport(pair.group, pair.document, labels, pair.trace.score, float(trace.score), stages, profile)


def _ranking(group: int, reference: Sequence[float], scores: Sequence[float], table: Table) -> RankingReport:
    return RankingReport(
        group, tuple(best_first(reference)), tuple(best_first(scores)), compare_ranking(reference, scores, table)
    )


def to_text(report: Report) -> str:
    """A table of cases and stages with the share of each tolerance used, what failed, the verdict."""
    stages = _stages(report)
    limits = [_limit(report.table, stage) for stage in stages]
    rows = [["case", "pairs", *stages, "verdict"], ["", "", *limits, ""]]
    rows += [[c.name, str(len(c.pairs)), *(_cell(c.worst(s)) for s in stages), c.verdict.value] for c in report.cases]
    out = [
        table(rows),
        "",
        "Share of each tolerance used, worst pair of the case; – where a case has no such stage.",
    ]
    out += [plain(f"{verdict}: {where}") for verdict, where in _findings(report)]
    out.append(f"verdict: {report.verdict.value}")
    return "\n".join(out)


def to_dict(report: Report) -> dict[str, Any]:
    """Everything, for strict JSON: figures that are not finite are null."""
    return {
        "verdict": report.verdict.value,
        **report.about,
        "tolerances": {
            stage: {"measure": t.measure, "limit": t.limit, "why": t.why} for stage, t in report.table.items()
        },
        "cases": [
            {
                "name": case.name,
                "why": case.why,
                "kind": case.kind,
                "verdict": case.verdict.value,
                "pairs": [
                    {
                        "group": pair.group,
                        "document": pair.document,
                        "reference_score": pair.reference_score,
                        "score": _finite(pair.score),
                        "verdict": pair.verdict.value,
                        "stages": [as_dict(stage) for stage in pair.stages],
                        "layer_profile": [_finite(value) for value in pair.profile],
                    }
                    for pair in case.pairs
                ],
                "rankings": [
                    {
                        "group": ranking.group,
                        "reference_order": ranking.reference_order,
                        "order": ranking.order,
                        **as_dict(ranking.stage),
                    }
                    for ranking in case.rankings
                ],
            }
            for case in report.cases
        ],
    }


def to_html(report: Report) -> str:
    """One page without scripts or anything to fetch, in light and dark. All text from outside is escaped."""
    stages = _stages(report)
    head = "".join(f"<th>{escape(s)}<br><small>{escape(_limit(report.table, s))}</small></th>" for s in stages)
    body = "".join(
        f'<tr><th scope="row">{escape(c.name)}</th><td>{len(c.pairs)}</td>'
        + "".join(_html_cell(c.worst(s)) for s in stages)
        + f'<td class="{_STYLES[c.verdict]}">{c.verdict.value}</td></tr>'
        for c in report.cases
    )
    findings = "".join(f"<li><b>{v}</b> {escape(where)}</li>" for v, where in _findings(report))
    reasons = "".join(
        f'<tr><th scope="row">{escape(stage)}</th><td>{escape(_limit(report.table, stage))}</td>'
        f"<td>{escape(t.why)}</td></tr>"
        for stage, t in report.table.items()
        if stage in stages
    )
    sections = [
        f'<h1>Parity: <span class="{_STYLES[report.verdict]}">{report.verdict.value}</span></h1>',
        f"<p>{escape(_summary(report))}</p>",
        f"<ul>{findings}</ul>" if findings else "",
        "<h2>Share of each tolerance used</h2>",
        f"<div class='wide'><table><tr><th>case</th><th>pairs</th>{head}<th>verdict</th></tr>{body}</table></div>",
        "<p>Worst pair of each case; – where a case has no such stage.</p>",
        _share_plot(report),
        "<h2>Scores</h2>",
        plot.scatter(_score_marks(report), "reference score", "artifact score"),
        _profile_plot(report),
        "<h2>Cases</h2>",
        "".join(_html_case(case) for case in report.cases),
        f"<h2>Tolerances and their reasons</h2><table>{reasons}</table>",
        about_section(report.about),
    ]
    return (
        "<!DOCTYPE html>\n"
        '<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>Parity: {report.verdict.value}</title><style>{_CSS}</style></head>"
        f"<body>{''.join(sections)}</body></html>\n"
    )


def _stages(report: Report) -> list[str]:
    seen = {stage.stage for case in report.cases for stage in case.stages}
    return [stage for stage in (*_BEFORE, *STAGES) if stage in seen]


def _limit(table: Table, stage: str) -> str:
    if stage not in table or table[stage].measure == "exact":
        return "exact"
    return f"≤ {table[stage].limit:.0e} {table[stage].measure[:3]}".replace("e-0", "e-")


def _cell(result: StageResult | None) -> str:
    if result is None:
        return "–"
    if result.measure == "exact":
        return "exact" if result.verdict is Verdict.PASS else "FAIL"
    if not math.isfinite(result.share):
        return "FAIL"
    percent = 100 * result.share
    shown = f"{percent:.2g} %" if percent < 10 else f"{percent:.0f} %"
    return f"{shown} !" if result.verdict is Verdict.FAIL else shown


def _findings(report: Report) -> Iterable[tuple[str, str]]:
    """Everything that did not pass: (verdict, where and what)."""
    for case in report.cases:
        for pair in case.pairs:
            for stage in pair.stages:
                if stage.verdict is not Verdict.PASS:
                    where = f"{case.name}, query {pair.group}, document {pair.document}"
                    yield stage.verdict.value, f"{where}: {stage.stage}: {_amount(stage)}{stage.worst}"
        for ranking in case.rankings:
            if ranking.stage.verdict is not Verdict.PASS:
                where = f"{case.name}, query {ranking.group}"
                yield ranking.stage.verdict.value, f"{where}: ranking: {ranking.stage.worst}"


def _amount(stage: StageResult) -> str:
    if stage.measure == "exact" or not math.isfinite(stage.value):
        return ""
    return f"{stage.value:.3g} of {stage.limit:g} ({stage.measure}) "


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _summary(report: Report) -> str:
    """What was held against what, in a line."""
    about = report.about
    where = ", ".join(str(about[key]) for key in ("scheme", "engine", "device") if key in about)
    made = about.get("golden", {}).get("provenance", {}).get("checkpoint", {}).get("source")
    reference = about.get("reference") or (f"PyTorch on {made}" if made else "PyTorch")
    pairs = sum(len(case.pairs) for case in report.cases)
    artifact = f"{about.get('artifact', 'the artifact')}{f' ({where})' if where else ''}"
    return f"{artifact} against {reference}: {pairs} pairs in {len(report.cases)} cases."


def about_section(about: Mapping[str, Any]) -> str:
    """Versions, hashes and commands, folded: whoever needs them opens it."""
    return (
        "<h2>About</h2><details><summary>Versions, hashes and how this was made</summary>"
        f"<div class='wide'><table class='about'>{_about_rows(about)}</table></div></details>"
    )


def _about_rows(about: Mapping[str, Any], prefix: str = "") -> str:
    rows = ""
    for name, value in about.items():
        label = f"{prefix}{name}"
        if isinstance(value, Mapping):
            rows += _about_rows(value, f"{label} · ")
        elif value not in (None, [], ()):
            text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, allow_nan=False)
            rows += f'<tr><th scope="row">{escape(label)}</th><td><code>{escape(text)}</code></td></tr>'
    return rows


def _html_cell(result: StageResult | None) -> str:
    if result is None:
        return "<td>–</td>"
    style = _STYLES[result.verdict]
    return f'<td class="{style}" title="{escape(result.worst)}">{escape(_cell(result))}</td>'


def _share_plot(report: Report) -> str:
    rows = {
        stage: [
            plot.Mark(
                result.share,
                0,
                f"{case.name}: {_cell(result)} {result.worst}",
                _STYLES[result.verdict],
            )
            for case in report.cases
            for result in case.stages
            if result.stage == stage
        ]
        for stage in _stages(report)
    }
    note = (
        "<p>One dot per pair; the dashed line is the limit. What differs by nothing sits on the left edge, "
        "what cannot be measured on the right.</p>"
    )
    return plot.strips(rows, "share of tolerance", 1e-5, 100.0, 1.0) + note


def _score_marks(report: Report) -> list[plot.Mark]:
    return [
        plot.Mark(
            pair.reference_score,
            pair.score,
            f"{case.name}, query {pair.group}, document {pair.document}: "
            f"{pair.score:.6f}, reference {pair.reference_score:.6f}",
            _STYLES[pair.verdict],
        )
        for case in report.cases
        for pair in case.pairs
        if pair.score is not None and math.isfinite(pair.score)
    ]


def _profile_plot(report: Report) -> str:
    """The worst pair of each case, layer by layer, when layers were asked for."""
    worst = {
        case.name: max((pair.profile for pair in case.pairs), key=lambda p: max(p, default=0.0), default=())
        for case in report.cases
    }
    series = {name: list(enumerate(map(float, profile))) for name, profile in worst.items() if profile}
    if not series:
        return ""
    drawn = plot.lines(series, "decoder layer", "relative difference", log_y=True)
    return f"<h2>Hidden state by layer</h2>{drawn}"


def _html_case(case: CaseReport) -> str:
    rows = ""
    for pair in case.pairs:
        worst = max(pair.stages, key=lambda s: (list(Verdict).index(s.verdict), s.share))
        score = "–" if pair.score is None else f"{pair.score:.6f}"
        rows += (
            f"<tr><td>{pair.group}</td><td>{escape(pair.labels[0])}</td><td>{escape(pair.labels[1])}</td>"
            f"<td>{pair.reference_score:.6f}</td><td>{score}</td>"
            f'<td class="{_STYLES[pair.verdict]}">{escape(worst.stage)} {escape(_cell(worst))}</td></tr>'
        )
    orders = "".join(
        f'<p class="{_STYLES[r.stage.verdict]}">Ranking of query {r.group}: {list(r.order)}, '
        f"reference {list(r.reference_order)} {escape(r.stage.worst)}</p>"
        for r in case.rankings
    )
    shown = " open=''" if case.verdict is not Verdict.PASS else ""
    return (
        f'<details{shown}><summary><span class="{_STYLES[case.verdict]}">{case.verdict.value}</span> '
        f"<b>{escape(case.name)}</b> {escape(case.why)}</summary>"
        "<div class='wide'><table><tr><th></th><th>query</th><th>document</th><th>reference</th>"
        f"<th>artifact</th><th>closest to its limit</th></tr>{rows}</table></div>{orders}</details>"
    )


_CSS: Final = """
:root { color-scheme: light dark; --paper: #fdfdfc; --ink: #1d1f22; --faint: #777; --grid: #dfe1e4;
 --pass: #1a7f42; --near: #a66300; --fail: #c22a2a; --series-0: #2f6fd0; --series-1: #c4641a;
 --series-2: #2b8a52; --series-3: #9a47b0; --series-4: #b03a5b; --series-5: #58707f; }
@media (prefers-color-scheme: dark) { :root {
 --paper: #15171a; --ink: #e6e7e9; --faint: #999; --grid: #33373d;
 --pass: #55c57d; --near: #e5a93c; --fail: #ff7a70; --series-0: #7daaf2; --series-1: #f0a060;
 --series-2: #6fd096; --series-3: #cf91e0; --series-4: #ef8aa8; --series-5: #a3bac8; } }
body { background: var(--paper); color: var(--ink); font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto;
 max-width: 70rem; padding: 0 1rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { border-bottom: 1px solid var(--grid); padding: .25rem .6rem; text-align: left; vertical-align: top; }
small { color: var(--faint); font-weight: normal; white-space: nowrap; }
code { overflow-wrap: anywhere; }
svg { display: block; max-width: 48rem; width: 100%; } svg text { fill: var(--ink); font-size: 12px; }
.wide { overflow-x: auto; } .pass { color: var(--pass); } .near { color: var(--near); }
.fail { color: var(--fail); font-weight: bold; }
details { border-top: 1px solid var(--grid); padding: .4rem 0; } summary { cursor: pointer; }
"""
