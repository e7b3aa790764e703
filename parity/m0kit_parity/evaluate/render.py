"""An evaluation as a text table, JSON, and a self-contained page. Owns the three forms, no figure.

show(*to_text(evaluation).split("\n"))
"""

import statistics
from collections.abc import Mapping, Sequence
from html import escape
from typing import Final

from m0kit_parity.bench.commands import table
from m0kit_parity.drawing import plot
from m0kit_parity.evaluate.compare import ALL
from m0kit_parity.evaluate.quality import Evaluation
from m0kit_parity.proof import report


def tables(evaluation: Evaluation) -> list[list[list[str]]]:
    """Quality of each set, bytes, memory and seconds of each workload; first row the heading, strings all."""
    found = []
    judged = evaluation.judged
    baseline = evaluation.baseline
    for name, count in evaluation.sets.items():
        heading = ["max |Δ|", "mean |Δ|", "Spearman", "same first"]
        rows = [[f"{name}, {count} queries", "scheme", *(["nDCG@10", "loss, points"] if judged else []), *heading]]
        for a in evaluation.artifacts:
            q = a.quality[name]
            ndcg = [_shown(q.ndcg, ".4f"), _shown(q.loss, ".2f")] if judged else []
            deltas = [_shown(q.max_delta, ".2g"), _shown(q.mean_delta, ".2g"), _shown(q.spearman, ".4f")]
            rows.append([a.label, a.scheme, *ndcg, *deltas, _shown(q.same_first, ".1%")])
        if judged:
            rows.append(["(chance)", "", f"{evaluation.chance[name]:.4f}", *[""] * 5])
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


def notes_of(evaluation: Evaluation) -> list[str]:
    """What a reader of the tables must know, a sentence each."""
    notes = []
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
    return "\n\n".join([*parts, "\n".join(notes_of(evaluation))])


def to_html(evaluation: Evaluation) -> str:
    """One page without scripts or anything to fetch, in light and dark. All text from outside is escaped."""
    names = ", ".join(a.label for a in evaluation.artifacts)
    sections = [f"<h1>Evaluation: {escape(names)}</h1>", *charts(evaluation), "<h2>Figures</h2>"]
    for heading, *rows in tables(evaluation):
        head = "".join(f"<th>{escape(cell)}</th>" for cell in heading)
        body = "".join(
            f'<tr><th scope="row">{escape(row[0])}</th>{"".join(f"<td>{escape(c)}</td>" for c in row[1:])}</tr>'
            for row in rows
        )
        sections.append(f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>')
    sections += [f"<p>{escape(note)}</p>" for note in notes_of(evaluation)]
    if evaluation.errors:
        listed = "".join(f"<li>{escape(error)}</li>" for error in evaluation.errors)
        sections.append(f"<h2>Left out</h2><ul>{listed}</ul>")
    sections.append(report.about_section(evaluation.about))
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>Evaluation: {escape(names)}</title><style>{report._CSS}{_CSS}</style></head>"
        f"<body>{''.join(sections)}</body></html>\n"
    )


_CSS: Final = "table { margin: 1rem 0; } td { text-align: right; } circle { stroke: var(--paper); }\n"


def charts(evaluation: Evaluation) -> list[str]:
    """Quality against size and quality against speed, headings and SVG."""
    name = list(evaluation.sets)[-1]  # all sets, or the only one
    if evaluation.judged:
        label = f"nDCG@10, {name}"
        quality = {a.label: a.quality[name].ndcg for a in evaluation.artifacts}
    else:
        label = f"Spearman with {evaluation.baseline.label}"
        quality = {a.label: a.quality[name].spearman for a in evaluation.artifacts} | {evaluation.baseline.label: 1.0}
    unit, size = ("GB", 1e9) if max(a.num_bytes for a in evaluation.artifacts) >= 1e9 else ("MB", 1e6)
    sizes = {a.label: a.num_bytes / size for a in evaluation.artifacts}
    loads = set(evaluation.baseline.seconds)
    speeds = {
        a.label: statistics.geometric_mean([r.ratio for r in a.seconds.values()])
        for a in evaluation.artifacts
        if loads and set(a.seconds) == loads
    }
    found = ["<h2>Quality against size</h2>", _scatter(sizes, quality, f"{unit} on disk", label)]
    if speeds:
        axis = f"times as fast as {evaluation.baseline.label}"
        found += ["<h2>Quality against speed</h2>", _scatter(speeds, quality, axis, label)]
        found.append("<p>Speed is the geometric mean over the workloads.</p>" if len(loads) > 1 else "")
    else:
        found.append("<p>Speed was not measured.</p>")
    return found


def _scatter(xs: Mapping[str, float], ys: Mapping[str, float | None], x_label: str, y_label: str) -> str:
    """A dot with its name for each artifact that has both values."""
    points = [(name, x, y) for name, x in xs.items() if (y := ys[name]) is not None]
    left, right, top, bottom = plot._LEFT, plot._WIDTH - plot._RIGHT, plot._TOP, 320 - plot._BOTTOM
    x_range, y_range = _room([point[1] for point in points]), _room([point[2] for point in points])
    place_x, place_y = plot._scale(*x_range, left, right), plot._scale(*y_range, bottom, top)
    parts = [plot._tick_x(place_x(v), bottom, f"{v:g}") for v in plot._ticks(*x_range)]
    parts += [plot._tick_y(place_y(v), f"{v:g}") for v in plot._ticks(*y_range)]
    taken: list[tuple[float, float, float]] = []  # left, right and baseline of the names so far
    for i, (name, x, y) in enumerate(points):
        dot_x, dot_y, width = place_x(x), place_y(y), 7 * len(name)
        start = dot_x + 10 if dot_x + 10 + width < right else dot_x - 10 - width
        line = dot_y + 4
        step = 14 if dot_y < (top + bottom) / 2 else -14
        while any(abs(line - other) < 14 and start < end and begin < start + width for begin, end, other in taken):
            line += step
        taken.append((start, start + width, line))
        side = f'x="{start:.1f}"' if start > dot_x else f'x="{dot_x - 10:.1f}" text-anchor="end"'
        parts.append(
            f'<circle cx="{dot_x:.1f}" cy="{dot_y:.1f}" r="5" fill="var(--series-{i % 6})">'
            f"<title>{escape(f'{name}: {x:.4g}, {y:.5g}')}</title></circle>"
            f'<text {side} y="{line:.1f}">{escape(name)}</text>'
        )
    return plot._svg(320, parts, x_label, y_label, f"{y_label} against {x_label}")


def _room(values: Sequence[float]) -> tuple[float, float]:
    """The range of an axis, with some air on both sides."""
    low, high = min(values), max(values)
    air = 0.1 * (high - low) or 0.01 * abs(high) or 0.01
    return low - air, high + air


def _shown(value: float | None, form: str) -> str:
    return "–" if value is None else f"{value:{form}}"
