"""`m0kit evaluate`: artifacts of one model side by side, how well each ranks and what it costs.

Owns the comparison: the judged queries, agreement with the first artifact (the baseline), the processes that
measure, and the three forms of the result. nDCG and the built-in sets are `small/evaluate.py`'s.

    m0kit evaluate m0-fp32 m0-int8 m0-int4 --pairs judged.jsonl --html report.html

A line of judged.jsonl is {"query": …, "documents": […], "relevance": [whole numbers]}; query and documents are
strings (text), {"text": …} or {"image": path or data URI}, paths relative to the file.

One thing is measured at a time, and one artifact is open at a time: first the scores, here; then memory, a
fresh process per artifact and workload, because a peak never falls again; then seconds, a fresh process per
artifact, workload and turn. Artifacts take turns, so that a slow minute of the machine is everyone's. Keeping
all of them open would be quicker, but where they don't fit in memory together each run would push the others'
weights out, and reading them back would be counted as scoring. So each process runs once uncounted first.

Exit codes: 0 all well, 3 some lines or measurements failed and the others are reported; others as for every command.
"""

import itertools
import math
import os
import re
import statistics
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from html import escape
from pathlib import Path
from typing import Any, Final

import click
import numpy as np
from numpy.typing import NDArray

from m0kit.artifact.hub import resolve
from m0kit.artifact.manifest import TOKENIZER, Manifest, read_manifest
from m0kit.artifact.ports import Kept
from m0kit.cli.options import PARTLY, require_place, tell
from m0kit.errors import ArtifactError, InputError, M0kitError, OutputError, ScoreError
from m0kit.reading.inputs import group_from_file, shown
from m0kit.reading.lines import records
from m0kit.reranker import Reranker
from m0kit.scoring.engine import sigmoid
from m0kit.terminal import bar, say, show, show_json
from m0kit_parity.bench import commands as bench
from m0kit_parity.bench.measure import Memory, Pair, measure_memory, measure_seconds
from m0kit_parity.drawing import plot
from m0kit_parity.proof import report
from m0kit_parity.small import evaluate as ranking

ALL: Final = "all sets"
TEXT_TOKENS: Final = 256
VISUAL_TOKENS: Final = 768
# Of a judged file, each kind of pair is timed on this many pairs, spread over the file: a page takes the full
# model most of a minute, and each turn of each artifact runs them twice.
TIMED_PAIRS: Final = 4
_MAX_GRADE: Final = 30  # gains are 2^grade − 1; judgements go up to 4 or 5, so more is a mistake in the file
_STATUS: Final = Path("/proc/self/status")

Key = tuple[str, int]  # set, query within it


@dataclass(frozen=True, slots=True)
class Query:
    """One query with its documents, in the forms that `Reranker` takes; `where` names its line."""

    where: str
    query: Any
    documents: tuple[Any, ...]
    relevance: tuple[int, ...] | None  # None: not judged


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
    seconds: Mapping[str, bench.Timing]


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


# --- judged queries ------------------------------------------------------------------------------------


def read_judged(path: Path) -> tuple[list[Query], dict[str, str]]:
    """The queries of a judged file, and what is wrong with its other lines: line → error.

    Judgements are optional for a file as a whole: once one line has them, all must. Raises InputError for a
    file that cannot be read or has no usable line.
    """
    queries: list[Query] = []
    errors: dict[str, str] = {}
    for number, record in records(path, '{"query": …, "documents": […], "relevance": […]}'):
        where = f"{path}: line {number}"
        try:
            if isinstance(record, InputError):
                raise record
            queries.append(_query(record, where, path.parent))
        except InputError as error:
            errors[where] = f"{where}: {error}"
    if any(query.relevance for query in queries):
        for query in queries:
            if query.relevance is None:
                errors[query.where] = (
                    f'{query.where}: no "relevance", which other lines of the file have. Add it, or leave the line out.'
                )
        queries = [query for query in queries if query.relevance]
    if not queries:
        first = next(iter(errors.values()), f"{path} is empty")
        raise InputError(f"no query that can be used: {first}")
    return queries, errors


def builtin_sets() -> dict[str, list[Query]]:
    """The evaluation sets of the small checkpoint, by name."""
    from m0kit_parity.small.files import SMALL

    return {
        kind: [
            Query(f"{kind}, line {number}", item.query, item.documents, item.relevance)
            for number, item in enumerate(ranking.read_set(SMALL / "eval", kind), 1)
        ]
        for kind in ranking.KINDS
    }


def _query(record: Mapping[str, Any], where: str, folder: Path) -> Query:
    # A misspelt "relevance" would be taken for a line without judgements.
    if unknown := [key for key in record if key not in ("query", "documents", "relevance", "id")]:
        raise InputError(f'unknown key {shown(unknown[0])}. Known are "query", "documents", "relevance", "id".')
    query, documents = group_from_file(record, folder)
    relevance = record.get("relevance")
    if len(documents) < 2:
        raise InputError('"documents" must be a list of two or more: with fewer there is no order.')
    if relevance is None:
        return Query(where, query, tuple(documents), None)
    if not isinstance(relevance, list) or len(relevance) != len(documents):
        count = f"{len(relevance)} entries" if isinstance(relevance, list) else type(relevance).__name__
        raise InputError(f'"relevance" must have one number for each of {len(documents)} documents, not {count}.')
    if wrong := [grade for grade in relevance if type(grade) is not int or not 0 <= grade <= _MAX_GRADE]:
        raise InputError(f'"relevance" must be whole numbers from 0 to {_MAX_GRADE}, got {shown(wrong[0])}.')
    if not any(relevance):
        raise InputError("no document is relevant, so nDCG is not defined. Mark one, or leave the line out.")
    return Query(where, query, tuple(documents), tuple(relevance))


# --- quality -------------------------------------------------------------------------------------------


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
    values = [ranking.ndcg_at_k(s, q.relevance) for q, s in zip(queries, scores, strict=True) if q.relevance]
    return statistics.fmean(values) if values else None


def _score(
    artifact: Path, kv: Kept, sets: Mapping[str, Sequence[Query]], threads: int, told: Any, strict: bool,
    errors: dict[Key, str], notes: dict[str, None],
) -> dict[Key, list[float]]:  # fmt: skip
    """Logits of every query that is not in `errors`; adds to `errors` and `notes`. The artifact is closed on return."""
    reranker = Reranker.load(artifact, threads=threads, kv=kv)
    logits: dict[Key, list[float]] = {}
    for name, queries in sets.items():
        for number, query in enumerate(queries):
            told.update()
            if (name, number) in errors:
                continue
            results = reranker.evaluate([(query.query, document) for document in query.documents])
            for i, result in enumerate(results):
                where = f"{query.where}, document {i + 1}"
                if result.error:
                    message = result.error.said
                    if isinstance(result.error, ScoreError):
                        message = f"{artifact}: {message}"
                    errors.setdefault((name, number), f"{where}: {message}")
                notes |= dict.fromkeys(f"{where}: the {what} was too long and was cut" for what in result.truncated)
            if strict and (name, number) in errors:
                raise InputError(errors[name, number])
            logits[name, number] = [result.logit for result in results]
    return logits


# --- cost ----------------------------------------------------------------------------------------------


def builtin_workloads(artifact: Path) -> dict[str, list[Pair]]:
    """A text and a page, both of an exact size."""
    prompts = bench.prompts_of(artifact)
    return {
        f"text, {TEXT_TOKENS} tokens": [(bench.QUERY, bench.text_of(prompts, TEXT_TOKENS))],
        f"page, {VISUAL_TOKENS} visual tokens": [(bench.QUERY, bench.page_of(VISUAL_TOKENS))],
    }


def judged_workloads(queries: Sequence[Query]) -> dict[str, list[Pair]]:
    """The file's own pairs: a few without and a few with an image, spread evenly over each kind."""
    pairs = [(query.query, document) for query in queries for document in query.documents]
    loads = {}
    for kind, wanted in (("text", False), ("image", True)):
        mine = [pair for pair in pairs if any(map(_is_image, pair)) == wanted]
        if mine:
            picked = np.linspace(0, len(mine) - 1, min(TIMED_PAIRS, len(mine))).round().astype(int)
            loads[f"{len(picked)} of the file's {kind} pairs"] = [mine[i] for i in picked]
    return loads


def _is_image(content: Any) -> bool:
    return not isinstance(content, str) and not (isinstance(content, Mapping) and "text" in content)


# --- all of it -----------------------------------------------------------------------------------------


def compare(
    artifacts: Sequence[Path],
    sets: Mapping[str, Sequence[Query]],
    loads: Mapping[str, Sequence[Pair]] | None = None,
    *,
    threads: int,
    repeats: int = 3,
    speed: bool = True,
    max_pixels: int | None = None,
    strict: bool = False,
    about: Mapping[str, Any] | None = None,
    bad: Sequence[str] = (),
    kvs: Sequence[Kept] = (),
) -> tuple[Evaluation, list[str]]:
    """Score `sets` with every artifact, then measure the workloads; also returns notes on what was cut.

    `loads` None: the file's own pairs, without the lines that could not be scored. A line that one artifact cannot
    score is left out for all; `bad` are errors known before. With `kvs` every artifact also
    ranks with the documents' keys and values kept so; what that takes in memory and time is `m0kit bench reuse`'s.
    Raises ArtifactError when the artifacts are not of one model, InputError when no line is left, and with `strict` at
    the first thing that fails.
    """
    manifests = [read_manifest(path) for path in artifacts]
    check_same_model(artifacts, manifests)
    labels = labels_of(artifacts)
    plain: list[tuple[int, Kept]] = [(i, "fp32") for i in range(len(artifacts))]
    sides = [*plain, *((i, kv) for i in range(len(artifacts)) for kv in kvs)]
    errors: dict[Key, str] = {}
    logits: list[dict[Key, list[float]]] = []
    notes: dict[str, None] = {}
    with _bar(len(sides) * sum(map(len, sets.values())), "query", "scoring") as told:
        for i, kv in sides:
            logits.append(_score(artifacts[i], kv, sets, threads, told, strict, errors, notes))
    every = [((name, n), query) for name, queries in sets.items() for n, query in enumerate(queries)]
    every = [(key, query) for key, query in every if key not in errors]
    if not every:
        raise InputError(f"no query could be scored by every artifact: {next(iter(errors.values()))}")
    groups = {name: [row for row in every if row[0][0] == name] for name in dict.fromkeys(key[0] for key, _ in every)}
    if len(groups) > 1:
        groups[ALL] = every
    if loads is None:
        loads = judged_workloads([query for _, query in every])
    problems = [*bad, *errors.values()]
    memory = _memories(artifacts, loads, threads, max_pixels, strict, problems)
    seconds = _seconds(artifacts, loads, threads, max_pixels, strict, problems, repeats) if speed else {}
    timings: list[bench.Timing] = []
    for load in loads:
        if (load, 0) in seconds:  # without the baseline there is nothing to compare with
            mine = {label: seconds[load, i] for i, label in enumerate(labels) if (load, i) in seconds}
            timings += bench.compare(load, mine, labels[0])
    measured = []
    bias = manifests[0].model.prompt.logit_bias
    for side, (i, kv) in enumerate(sides):
        path, manifest, kept = artifacts[i], manifests[i], side >= len(artifacts)
        quality = {
            name: quality_of(
                [query for _, query in rows],
                [logits[side][key] for key, _ in rows],
                [logits[0][key] for key, _ in rows] if side else None,
                lambda logit: sigmoid(logit - bias),
            )
            for name, rows in groups.items()
        }
        measured.append(
            Measured(
                f"{labels[i]}, documents in {kv}" if kept else labels[i],
                str(path),
                manifest.scheme,
                manifest.num_bytes,
                manifest.fingerprint,
                quality,
                {load: memory[load, i] for load in loads if (load, i) in memory and not kept},
                {t.workload: t for t in timings if t.side == labels[i] and not kept},
            )
        )
    chance = {
        name: statistics.fmean(ranking.chance_ndcg(query.relevance) for _, query in rows if query.relevance)
        for name, rows in groups.items()
        if any(query.relevance for _, query in rows)
    }
    counts = {name: len(rows) for name, rows in groups.items()}
    return Evaluation(dict(about or {}), counts, chance, tuple(measured), tuple(problems)), list(notes)


def check_same_model(paths: Sequence[Path], manifests: Sequence[Manifest]) -> None:
    """Raises ArtifactError naming the first two artifacts that are not of one model."""
    for path, manifest in zip(paths, manifests, strict=True):
        first = manifests[0]
        for what, mine, other in (
            ("decoder", manifest.model.decoder, first.model.decoder),
            ("vision encoder", manifest.model.vision, first.model.vision),
            ("tokenizer", manifest.files[TOKENIZER].sha256, first.files[TOKENIZER].sha256),
        ):
            if mine != other:
                raise ArtifactError(
                    f"{paths[0]} and {path} are not of one model: their {what}s differ. "
                    "Compare exports of one checkpoint, or of fine-tunes of it."
                )


def labels_of(paths: Sequence[Path]) -> list[str]:
    """A short name for each artifact: its folder's, the whole path where folders are called the same."""
    names = [path.absolute().name for path in paths]
    longer = [name if names.count(name) == 1 else str(path) for name, path in zip(names, paths, strict=True)]
    seen: Counter[str] = Counter()
    labels = []
    for name in longer:  # one artifact given twice shows how much the machine itself varies
        seen[name] += 1
        labels.append(name if seen[name] == 1 else f"{name} ({seen[name]})")
    return labels


def _memories(
    artifacts: Sequence[Path], loads: Mapping[str, Sequence[Pair]], threads: int, max_pixels: int | None,
    strict: bool, problems: list[str],
) -> dict[tuple[str, int], Memory]:  # fmt: skip
    """(workload, artifact) → memory; what failed is added to `problems`."""
    found: dict[tuple[str, int], Memory] = {}
    if not _STATUS.is_file():
        return found
    with _bar(len(loads) * len(artifacts), "process", "memory") as told:
        for load, pairs in loads.items():
            for i, artifact in enumerate(artifacts):
                try:
                    found[load, i] = measure_memory(artifact, pairs, threads, max_pixels)
                except M0kitError as error:
                    if strict:
                        raise
                    problems.append(f"{load}: {error}")
                told.update()
    return found


def _seconds(
    artifacts: Sequence[Path], loads: Mapping[str, Sequence[Pair]], threads: int, max_pixels: int | None,
    strict: bool, problems: list[str], repeats: int,
) -> dict[tuple[str, int], list[float]]:  # fmt: skip
    """(workload, artifact) → seconds of each turn; an artifact that fails takes no further turns at that workload."""
    found: dict[tuple[str, int], list[float]] = {}
    failed: set[tuple[str, int]] = set()
    with _bar(len(loads) * len(artifacts) * repeats, "process", "speed") as told:
        for load, pairs in loads.items():
            for _ in range(repeats):
                for i, artifact in enumerate(artifacts):
                    told.update()
                    if (load, i) in failed:
                        continue
                    try:
                        found.setdefault((load, i), []).append(measure_seconds(artifact, pairs, threads, max_pixels))
                    except M0kitError as error:
                        if strict:
                            raise
                        problems.append(f"{load}: {error}")
                        failed.add((load, i))
    return {key: times for key, times in found.items() if key not in failed}


def _place_and_reason(error: str) -> tuple[str, str]:
    """The two parts of a message, so that one that many lines have is told once."""
    parts = re.fullmatch(r"(.*?line \d+(?:, document \d+)?): (.*)", error, re.DOTALL)
    return (parts[1], parts[2]) if parts else ("", error)


def _bar(total: int, unit: str, what: str) -> Any:
    return bar(total=total, unit=unit, desc=what, leave=False)


# --- its three forms -----------------------------------------------------------------------------------


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
    parts = [bench.table(rows) for rows in tables(evaluation)]
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


@click.command()
@click.argument("artifacts", nargs=-1, required=True, metavar="ARTIFACT...")
@click.option(
    "--pairs",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Your own queries and documents, JSON lines, judged or not; the small checkpoint's sets by default.",
)
@click.option(
    "--kv",
    "kvs",
    multiple=True,
    type=click.Choice(["fp16", "int8"]),
    help="Repeatable: also what keeping the documents' keys and values so does to the ranking.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.option("--html", type=click.Path(path_type=Path, dir_okay=False), help="Also write one self-contained page.")
@click.option("--threads", type=click.IntRange(1), default=os.cpu_count(), show_default=True)
@click.option("--repeats", type=click.IntRange(1), default=3, show_default=True, help="Turns of each artifact.")
@click.option("--no-speed", is_flag=True, help="Do not measure seconds.")
@click.option("--strict", is_flag=True, help="Stop at the first line or measurement that fails.")
@click.pass_context
def evaluate(
    ctx: click.Context,
    artifacts: tuple[str, ...],
    pairs: Path | None,
    kvs: tuple[Kept, ...],
    as_json: bool,
    html: Path | None,
    threads: int,
    repeats: int,
    no_speed: bool,
    strict: bool,
) -> None:
    """Compare artifacts of one model: ranking quality, bytes, memory, seconds. The first one is the baseline.

    ARTIFACTs are folders or hub ids, org/name or org/name@revision.

    A line of PAIRS is {"query": …, "documents": […], "relevance": […]}, query and documents each a string (text),
    {"text": …} or {"image": …} with a path relative to the file. Without "relevance", quality is agreement with
    the baseline.
    """
    about = {**bench.machine(), "threads": threads, "repeats": repeats, "pairs": str(pairs or "built-in sets")}
    require_place(html)
    folders = [resolve(artifact, what="artifact") for artifact in artifacts]
    if pairs is None:
        image = read_manifest(folders[0]).model.image
        evaluation, notes = compare(
            folders, builtin_sets(), builtin_workloads(folders[0]), threads=threads, repeats=repeats,
            speed=not no_speed, max_pixels=max(image.max_pixels, VISUAL_TOKENS * image.factor**2), strict=strict,
            about=about, kvs=kvs,
        )  # fmt: skip
    else:
        queries, bad = read_judged(pairs)
        if bad and strict:
            raise InputError(next(iter(bad.values())))
        evaluation, notes = compare(
            folders, {pairs.name: queries}, threads=threads, repeats=repeats, speed=not no_speed, strict=strict,
            about=about, bad=list(bad.values()), kvs=kvs,
        )  # fmt: skip
    say(*(f"note: {note}" for note in notes))
    tell("error", map(_place_and_reason, evaluation.errors))
    if html:
        try:
            html.write_text(to_html(evaluation), "utf-8", "replace")  # names of files need not be Unicode
        except OSError as error:
            raise OutputError(f"{html}: {os.strerror(error.errno or 0)}. Name a file that may be written.") from error
    if as_json:
        show_json({**asdict(evaluation), "judged": evaluation.judged})
    else:
        show(*to_text(evaluation).split("\n"))
    ctx.exit(PARTLY if evaluation.errors else 0)
