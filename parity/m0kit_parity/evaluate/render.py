"""An evaluation as a text table, JSON, and a self-contained page. Owns the three forms, no figure.

show_text(to_text(evaluation))
"""

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any, Final

from m0kit.cli.page import Contents, Grade, about, mark, page, text, verdict
from m0kit.cli.page import table as html_table
from m0kit.plain import plain
from m0kit.reranker import best_first
from m0kit_parity.drawing import plot
from m0kit_parity.drawing.table import shown, table
from m0kit_parity.evaluate.compare import ALL
from m0kit_parity.evaluate.intervals import LEAST, Interval
from m0kit_parity.evaluate.quality import LIMITS, Change, Evaluation, Verdict

_GRADES: Final[Mapping[Verdict, Grade]] = {  # the gravest first
    "over the limit": "fail",
    "perhaps over the limit": "near",
    "cannot tell": "near",
    "within the limit": "pass",
}
_UNSURE: Final = ("cannot tell", "perhaps over the limit")
_MOST_ERRORS: Final = 50  # on the page; the text has all
_MOST_DOCUMENTS: Final = 10  # of a query that changed
_FEW: Final = 10  # changed queries, with fewer of which an interval is too narrow


def tables(evaluation: Evaluation) -> list[list[list[str]]]:
    """Quality of each set, bytes, memory and seconds of each workload; first row the heading, strings all."""
    found = []
    judged = evaluation.judged
    baseline = evaluation.baseline
    for name, count in evaluation.sets.items():
        heading = ["max |Δ|", "mean |Δ|", "Spearman", "same first"]
        rows = [
            [f"{name}, {count} queries", "scheme", *(["nDCG@10", "loss, points", "95 %"] if judged else []), *heading]
        ]
        for a in evaluation.artifacts:
            q = a.quality[name]
            ndcg = [shown(q.ndcg, ".4f"), shown(q.loss, ".2f"), span(q.interval)] if judged else []
            deltas = [shown(q.max_delta, ".2g"), shown(q.mean_delta, ".2g"), shown(q.spearman, ".4f")]
            rows.append([a.label, a.scheme, *ndcg, *deltas, shown(q.same_first, ".1%")])
        if judged:
            rows.append(["(chance)", "", f"{evaluation.chance[name]:.4f}", *[""] * 6])
        found.append(rows)
    rows = [["on disk", "scheme", "MB", f"of {baseline.label}"]]
    for a in evaluation.artifacts:
        rows.append([a.label, a.scheme, f"{a.num_bytes / 1e6:.1f}", f"{a.num_bytes / baseline.num_bytes:.1%}"])
    found.append(rows)
    for load in dict.fromkeys(load for a in evaluation.artifacts for load in a.memory):
        rows = [[f"memory: {load}", "scheme", "after load MiB", "peak MiB", "private peak MiB"]]
        for a in evaluation.artifacts:
            m = a.memory.get(load)
            cells = ["–"] * 3 if m is None else [f"{v:.0f}" for v in (m.loaded, m.peak, m.private)]
            rows.append([a.label, a.scheme, *cells])
        found.append(rows)
    for load in dict.fromkeys(load for a in evaluation.artifacts for load in a.seconds):
        rows = [[f"speed: {load}", "scheme", "seconds", f"× {baseline.label}", "range"]]
        for a in evaluation.artifacts:
            r = a.seconds.get(load)
            if r is None:
                cells = ["–"] * 3
            else:
                cells = [f"{r.seconds:.3f}", f"{r.ratio:.2f}×", "–" if a is baseline else f"{r.low:.2f}–{r.high:.2f}"]
            rows.append([a.label, a.scheme, *cells])
        found.append(rows)
    return found


def span(interval: Interval | None) -> str:
    """An interval in a cell, to the hundredth; a dash where there is none."""
    return "–" if interval is None else "[{:.2f}, {:.2f}]".format(*(round(end, 2) + 0.0 for end in interval))


def notes_of(evaluation: Evaluation) -> list[str]:
    """What a reader of the tables must know, a sentence each."""
    notes = []
    if evaluation.judged and len(evaluation.artifacts) > 1:
        last = [(a.label, a.quality[list(evaluation.sets)[-1]]) for a in evaluation.artifacts[1:]]
        few = [f"{label}: {q.changed}" for label, q in last if q.max_delta and (q.changed or 0) < _FEW]
        notes.append(
            "Points below 0 are gained. 95 %: what may be lost on other queries like these (a paired bootstrap); none "
            f"of fewer than {LEAST} queries, those over the same drawn pages counting as one."
            + (f" It is too narrow where few queries changed their nDCG ({', '.join(few)})." if few else "")
        )
    if not evaluation.judged:
        notes.append(
            'Without "relevance" in the file, quality is agreement with the baseline '
            f"({evaluation.baseline.label}) only, whether the baseline ranks well or not."
        )
    if ALL in evaluation.sets:
        notes.append(f"In “{ALL}” every query counts the same.")
    if any(a.memory for a in evaluation.artifacts):
        notes.append("Peaks count pages of mapped weights, which the system takes back when memory is short.")
    else:
        notes.append("Memory was not measured: that reads /proc, so it needs Linux.")
    if any(a.seconds for a in evaluation.artifacts):
        notes.append(f"× is how many times as fast as {evaluation.baseline.label}, median and range over the turns.")
    if evaluation.errors:
        notes.append(f"{len(evaluation.errors)} lines or measurements failed and are left out.")
    return notes


def to_text(evaluation: Evaluation) -> str:
    """Aligned tables and the sentences below them."""
    parts = [table(rows) for rows in tables(evaluation)]
    notes = notes_of(evaluation)
    if evaluation.judged and len(evaluation.artifacts) > 1:
        _, word, sentence = _verdict(evaluation)
        notes.insert(0, f"{word}. {sentence}")
    return "\n\n".join([*parts, "\n".join(plain(note, None) for note in notes)])  # labels are names of folders


def to_json(evaluation: Evaluation) -> dict[str, Any]:
    """All figures as plain values; contents of queries are left out."""
    facts = asdict(replace(evaluation, changes=()))
    del facts["changes"]
    return {
        **facts,
        "judged": evaluation.judged,
        "limits": {a.label: evaluation.limit(a) for a in evaluation.artifacts},
        "verdicts": {a.label: evaluation.verdict(a) for a in evaluation.artifacts},
    }


def to_html(evaluation: Evaluation, sections: Sequence[str] = ()) -> str:
    """One page without scripts or anything to fetch, in light and dark. All text from outside is escaped.

    `sections`: more of HTML, about the same artifacts.
    """
    figures = []
    for heading, *rows in tables(evaluation):
        figures.append(html_table(map(text, heading), [list(map(text, row)) for row in rows], "figures"))
    limits = [[text(scheme), f"{points:g}", text(why)] for scheme, (points, why) in LIMITS.items()]
    left_out = "".join(f"<li>{text(error)}</li>" for error in evaluation.errors[:_MOST_ERRORS])
    more = f"<p>And {len(evaluation.errors) - _MOST_ERRORS} more.</p>" if len(evaluation.errors) > _MOST_ERRORS else ""
    return page(
        f"Evaluation against {evaluation.baseline.label}",
        [
            f"<h1>Evaluation against {text(evaluation.baseline.label)}</h1>",
            verdict(*_verdict(evaluation)),
            _overview(evaluation),
            f'<div class="plots">{"".join(charts(evaluation))}</div>',
            *_changes(evaluation),
            *sections,
            f"<h2>Left out</h2><ul>{left_out}</ul>{more}" if left_out else "",
            "<h2>Figures</h2>",
            *figures,
            *(f"<p>{text(note)}</p>" for note in notes_of(evaluation)),
            "<h2>Limits</h2><details><summary>What each precision may lose against fp32, and why</summary>",
            html_table(["precision", "points of nDCG@10", "reason"], limits),
            "</details>",
            about(evaluation.about),
        ],
    )


def _verdict(evaluation: Evaluation) -> tuple[Grade, str, str]:
    """Which artifact keeps within its limit, in a sentence."""
    name = list(evaluation.sets)[-1]  # all sets, or the only one
    others = evaluation.artifacts[1:]
    if not others:
        return "none", "Nothing to compare", "with the baseline alone."
    if not evaluation.judged:
        least = min(others, key=lambda a: a.quality[name].spearman or 0)
        agreement = (
            f"{least.label} agrees least, with a rank correlation of {shown(least.quality[name].spearman, '.4f')}"
        )
        return "none", "Not judged", f"The file says nothing of relevance. {agreement}."
    told: dict[Verdict | None, list[str]] = {verdict: [] for verdict in (*_GRADES, None)}  # the gravest first
    for a in others:
        limit, found, q = evaluation.limit(a), evaluation.verdict(a), a.quality[name]
        notes = [f"limit {limit:g}"] if limit is not None else []
        notes += [found] if found in _UNSURE else []
        words = [a.label, "loses", shown(q.loss, ".2f"), "points", *([span(q.interval)] if q.interval else [])]
        told[found].append(" ".join([*words, *([f"({', '.join(notes)})"] if notes else [])]))
    gravest = next((verdict for verdict, who in told.items() if who), None)
    sentences = [one for verdict, who in told.items() if verdict or not gravest for one in who]
    sentence = f"Of nDCG@10, {name}: {', '.join(sentences)}."
    if evaluation.errors:
        sentence += f" {len(evaluation.errors)} lines or measurements failed and are left out."
    if gravest is None:
        return "none", "No limit applies", sentence
    return _GRADES[gravest], gravest[0].upper() + gravest[1:], sentence


def _overview(evaluation: Evaluation) -> str:
    """A row for each artifact."""
    name = list(evaluation.sets)[-1]
    speeds, rows = _speeds(evaluation), []
    for a in evaluation.artifacts:
        q, limit = a.quality[name], evaluation.limit(a)
        found = evaluation.verdict(a)
        ranks = [shown(q.ndcg, ".4f"), shown(q.loss, ".2f"), span(q.interval), shown(limit, "g")]
        ranks = ranks if evaluation.judged else []
        grade = "baseline" if a is evaluation.baseline else "–" if found is None else mark(_GRADES[found], found)
        ranks += [shown(q.spearman, ".4f"), shown(q.same_first, ".1%")]
        cost = [f"{a.num_bytes / 1e6:,.1f}", f"{speeds[a.label]:.2f}×" if a.label in speeds else "–"]
        rows.append([text(a.label), grade, text(a.scheme), *ranks, *cost])
    judged = ["nDCG@10", "loss, points", "95 %", "limit"] if evaluation.judged else []
    return html_table(
        ["artifact", "verdict", "scheme", *judged, "Spearman", "same first", "MB", "speed"], rows, "figures"
    )


def charts(evaluation: Evaluation) -> list[str]:
    """Ranking, size and speed, a row for each artifact in each; axes begin at zero."""
    name = list(evaluation.sets)[-1]
    others = evaluation.artifacts[1:]
    found = []
    if others and evaluation.judged:
        rows = []
        for a in others:
            parts = {k: q.loss for k, q in a.quality.items() if k != name and q.loss is not None}
            q = a.quality[name]
            figure = f"{shown(q.loss, '.2f')} {span(q.interval)}"
            rows.append(plot.Bar(a.label, q.loss, figure, evaluation.limit(a), parts, q.interval))
        note = f"Bar: {name}, line: its 95 % interval, rings: each set, dashed: limit. Below 0 is gained."
        found.append(("Ranking lost", plot.bars(rows, "points of nDCG@10 lost", least=1.0), note))
    elif others:
        rows = [plot.Bar(a.label, q.spearman, shown(q.spearman, ".4f")) for a in others for q in [a.quality[name]]]
        note = f"Rank correlation with {evaluation.baseline.label}: 1 is the same order."
        found.append(("Agreement", plot.bars(rows, "Spearman", least=1.0), note))
    unit, size = ("GB", 1e9) if max(a.num_bytes for a in evaluation.artifacts) >= 1e9 else ("MB", 1e6)
    whole = [a for a in evaluation.artifacts if a.kv == "fp32"]
    rows = [plot.Bar(a.label, a.num_bytes / size, f"{a.num_bytes / size:.2f} {unit}") for a in whole]
    found.append(("Size", plot.bars(rows, f"{unit} on disk"), ""))
    speeds = _speeds(evaluation)
    rows = [plot.Bar(label, speed, f"{speed:.2f}×") for label, speed in speeds.items()]
    axis = f"times as fast as {evaluation.baseline.label}"
    note = "Geometric mean over the workloads." if len(evaluation.baseline.seconds) > 1 else ""
    found += [("Speed", plot.bars(rows, axis), note)] if speeds else [("Speed", "", "Speed was not measured.")]
    return [
        f"<figure><h3>{text(title)}</h3>{drawn}<figcaption>{text(note)}</figcaption></figure>"
        for title, drawn, note in found
    ]


def _speeds(evaluation: Evaluation) -> dict[str, float]:
    """Of each artifact that was timed on all workloads, how many times as fast as the baseline it is."""
    loads = set(evaluation.baseline.seconds)
    return {
        a.label: statistics.geometric_mean([r.ratio for r in a.seconds.values()])
        for a in evaluation.artifacts
        if loads and set(a.seconds) == loads
    }


def _changes(evaluation: Evaluation) -> Iterator[str]:
    """The queries whose documents changed places most, of each artifact, with their documents."""
    if len(evaluation.artifacts) > 1:
        yield "<h2>Queries that changed most</h2>"
    contents = Contents()
    for a in evaluation.artifacts[1:]:
        mine = [change for change in evaluation.changes if change.artifact == a.label]
        yield f"<h3>{text(a.label)}</h3>{'' if mine else '<p>No documents changed places.</p>'}"
        yield from (_change(change, contents, " open=''" if change is mine[0] else "") for change in mine)


def _change(change: Change, contents: Contents, opened: str) -> str:
    before, after = ({i: rank for rank, i in enumerate(best_first(side), 1)} for side in (change.before, change.after))
    rows = []
    for i in list(after)[:_MOST_DOCUMENTS]:
        moved = before[i] - after[i]
        arrow = f"{'▲' if moved > 0 else '▼'} {abs(moved)}" if moved else ""
        relevance = [str(change.query.relevance[i])] if change.query.relevance else []
        scores = [f"{change.before[i]:.4f}", f"{change.after[i]:.4f}"]
        rows.append([str(after[i]), arrow, contents.shown(change.query.documents[i]), *relevance, *scores])
    judged = ["relevance"] if change.query.relevance else []
    heading = ["rank", "moved", "document", *judged, "score before", "after"]
    what = f"Spearman {change.spearman:.3f}"
    if change.ndcg:
        what = f"nDCG@10 {change.ndcg[0]:.3f} → {change.ndcg[1]:.3f}"
    rest = len(after) - len(rows)
    more = f"<p><small>And {rest} documents below.</small></p>" if rest > 0 else ""
    return (
        f"<details{opened}><summary>{text(change.query.where)}: {what}</summary>"
        f'<div class="query">{contents.shown(change.query.query)}</div>{html_table(heading, rows)}{more}</details>'
    )
