"""A report of a check as a text table, JSON, and a self-contained page. Owns the three forms, no verdict.

show_text(to_text(report))
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Final

from m0kit.cli.page import Grade, about, mark, page, text, verdict
from m0kit.cli.page import table as html_table
from m0kit.plain import plain
from m0kit_parity.drawing import plot
from m0kit_parity.drawing.table import table
from m0kit_parity.proof.compare import StageResult, Verdict, as_dict
from m0kit_parity.proof.report import CaseReport, PairReport, Report
from m0kit_parity.proof.tolerances import STAGES, Table

# Stages of a check that have no limit of their own: they say why later stages may differ.
_BEFORE: Final = ("input_pixels", "trace")
_GRADES: Final[Mapping[Verdict, Grade]] = {Verdict.PASS: "pass", Verdict.NEAR_TIE: "near", Verdict.FAIL: "fail"}
_OPEN: Final = {Verdict.PASS: "", Verdict.NEAR_TIE: ' open=""', Verdict.FAIL: ' open=""'}
_MOST_FINDINGS: Final = 50  # on the page; the text has all
_PROFILES: Final = 6  # cases drawn layer by layer, as many as there are colours


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


def to_json(report: Report) -> dict[str, Any]:
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
    limits = (f"{text(stage)}<small>{text(_limit(report.table, stage))}</small>" for stage in stages)
    heading = ["case", "verdict", "pairs", *limits]
    rows = [
        [text(c.name), _mark(c.verdict), str(len(c.pairs)), *(_html_cell(c.worst(s)) for s in stages)]
        for c in report.cases
    ]
    findings = list(_findings(report))
    listed = "".join(f"<li><b>{text(word)}</b> {text(where)}</li>" for word, where in findings[:_MOST_FINDINGS])
    more = f"<p>And {len(findings) - _MOST_FINDINGS} more.</p>" if len(findings) > _MOST_FINDINGS else ""
    reasons = [
        [text(stage), text(_limit(report.table, stage)), text(t.why)]
        for stage, t in report.table.items()
        if stage in stages
    ]
    return page(
        f"Parity: {report.verdict.value}",
        [
            "<h1>Parity</h1>",
            verdict(_GRADES[report.verdict], report.verdict.value, _sentence(report)),
            f"<p>{text(_summary(report))}</p>",
            f"<ul>{listed}</ul>{more}" if findings else "",
            "<h2>Share of each tolerance used</h2>",
            html_table(heading, rows, "figures"),
            "<p><small>Worst pair of each case; – where a case has no such stage.</small></p>",
            f'<h2>Pair by pair</h2><div class="plots">{"".join(_plots(report, stages))}</div>',
            "<h2>Cases</h2>",
            *(_html_case(case) for case in report.cases),
            "<h2>Tolerances</h2><details><summary>Each limit and its reason</summary>",
            html_table(["stage", "limit", "reason"], reasons),
            "</details>",
            about(report.about),
        ],
    )


def _sentence(report: Report) -> str:
    """The verdict in one sentence."""
    pairs = [(case, pair) for case in report.cases for pair in case.pairs]
    failed = [(case.name, pair) for case, pair in pairs if pair.verdict is Verdict.FAIL]
    total = f"{len(pairs)} pairs in {len(report.cases)} cases"
    if failed:
        name, pair = failed[0]
        stage = next(stage.stage for stage in pair.stages if stage.verdict is Verdict.FAIL)
        return f"{len(failed)} of {total} are out of tolerance, first {stage} in {name}."
    swapped = sum(r.stage.verdict is report.verdict is not Verdict.PASS for case in report.cases for r in case.rankings)
    if swapped:
        wrong = "more than" if report.verdict is Verdict.FAIL else "less than"
        near = f"documents change places whose scores differ by {wrong} the tolerance"
        return f"All {total} are within tolerance, but in {swapped} of the rankings {near}."
    closest = max((pair for _, pair in pairs), key=lambda pair: _worst(pair).share, default=None)
    used = f"; the closest uses {_cell(_worst(closest))} ({_worst(closest).stage})" if closest else ""
    return f"All {total} are within tolerance{used}."


def _plots(report: Report, stages: Sequence[str]) -> Iterator[str]:
    """Shares, scores and, when layers were asked for, what each layer adds."""
    rows = {
        stage: [
            plot.Mark(s.share, 0, f"{case.name}: {_cell(s)} {s.worst}", _GRADES[s.verdict])
            for case in report.cases
            for s in case.stages
            if s.stage == stage
        ]
        for stage in stages
    }
    note = "One mark per pair: a dot passes, a square is a near-tie, a triangle fails; what is beyond sits on the edge."
    yield f"<figure>{plot.shares(rows, 'share of tolerance')}<figcaption>{note}</figcaption></figure>"
    marks = [
        plot.Mark(
            pair.reference_score,
            pair.score,
            f"{case.name}, query {pair.group}, document {pair.document}: "
            f"{pair.score:.6f}, reference {pair.reference_score:.6f}",
            _GRADES[pair.verdict],
        )
        for case in report.cases
        for pair in case.pairs
        if pair.score is not None and math.isfinite(pair.score)
    ]
    note = "Scores of each pair; equal ones lie on the dashed diagonal."
    drawn = plot.scatter(marks, "score of the reference", "score of the artifact")
    yield f"<figure>{drawn}<figcaption>{note}</figcaption></figure>"
    profiles = {
        case.name: max((pair.profile for pair in case.pairs), key=lambda p: max(p, default=0.0), default=())
        for case in report.cases
    }
    worst = sorted((name for name, p in profiles.items() if p), key=lambda name: -max(profiles[name]))[:_PROFILES]
    if worst:
        series = {name: list(enumerate(map(float, profiles[name]))) for name in worst}
        limit = report.table["layers"].limit if "layers" in report.table else None
        drawn = plot.lines(series, "decoder layer", "relative difference of the hidden state", log_y=True, limit=limit)
        note = f"Worst pair of {'each case' if len(worst) < _PROFILES else f'the {_PROFILES} cases that differ most'}."
        yield f"<figure>{drawn}<figcaption>{note}</figcaption></figure>"


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


def _mark(found: Verdict) -> str:
    return mark(_GRADES[found], found.value)


def _html_cell(result: StageResult | None) -> str:
    if result is None:
        return "–"
    return f'<span class="{_GRADES[result.verdict]}" title="{text(result.worst)}">{text(_cell(result))}</span>'


def _worst(pair: PairReport) -> StageResult:
    return max(pair.stages, key=lambda s: (list(Verdict).index(s.verdict), s.share))


def _html_case(case: CaseReport) -> str:
    rows = []
    for pair in case.pairs:
        worst = _worst(pair)
        score = "–" if pair.score is None else f"{pair.score:.6f}"
        inputs = [f"{text(label)}{picture}" for label, picture in zip(pair.labels, pair.pictures, strict=True)]
        closest = mark(_GRADES[pair.verdict], f"{worst.stage} {_cell(worst)}")
        rows.append([str(pair.group), *inputs, f"{pair.reference_score:.6f}", score, closest])
    orders = "".join(
        f"<p>{_mark(r.stage.verdict)} Ranking of query {r.group}: {list(r.order)}, "
        f"reference {list(r.reference_order)} {text(r.stage.worst)}</p>"
        for r in case.rankings
    )
    heading = ["", "query", "document", "reference", "artifact", "closest to its limit"]
    return (
        f"<details{_OPEN[case.verdict]}><summary>{_mark(case.verdict)} "
        f"<b>{text(case.name)}</b> {text(case.why)}</summary>{html_table(heading, rows)}{orders}</details>"
    )
