"""Artifacts of one model side by side: their scores, and the processes that measure them.

Owns the run. One thing is measured at a time, and one artifact is open at a time: first the scores, here; then memory,
a fresh process per artifact and workload, because a peak never falls again; then seconds, a fresh process per
artifact, workload and turn. Artifacts take turns, so that a slow minute of the machine is everyone's. Keeping
all of them open would be quicker, but where they don't fit in memory together each run would push the others'
weights out, and reading them back would be counted as scoring. So each process runs once uncounted first.

    evaluation, notes = compare([Path("m0-fp32"), Path("m0-int8")], builtin_sets(), threads=4)
"""

import itertools
import statistics
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Final, TypeVar

import numpy as np

from m0kit.artifact.manifest import TOKENIZER, Manifest, read_manifest
from m0kit.artifact.ports import Kept
from m0kit.errors import ArtifactError, InputError, M0kitError, ScoreError
from m0kit.reranker import Reranker
from m0kit.scoring.engine import sigmoid
from m0kit.scoring.schedule import Result
from m0kit.terminal import bar
from m0kit_parity.bench import timing
from m0kit_parity.bench.measure import Memory, measure_memory, measure_seconds
from m0kit_parity.bench.workloads import QUERY, Pair, page_of, prompts_of, text_of
from m0kit_parity.evaluate.intervals import Interval, interval, resampled
from m0kit_parity.evaluate.judged import Query
from m0kit_parity.evaluate.quality import Change, Evaluation, Measured, changes_of, losses_of, quality_of
from m0kit_parity.small.evaluate import chance_ndcg

ALL: Final = "all sets"
TEXT_TOKENS: Final = 256
VISUAL_TOKENS: Final = 768
TIMED_PAIRS: Final = 4
_STATUS: Final = Path("/proc/self/status")
_T = TypeVar("_T")
Key = tuple[str, int]  # set, query within it


@dataclass(frozen=True, slots=True)
class Scored:
    """One artifact in one form of keeping documents, with all that was measured of it."""

    label: str
    path: str
    scheme: str
    num_bytes: int
    fingerprint: str
    kv: Kept
    logits: Mapping[Key, Sequence[float]]  # of each query one per document; of those that failed, what there is
    memory: Mapping[str, Memory]
    seconds: Mapping[str, timing.Timing]


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
    Raises InputError when no line is left, and with `strict` at the first thing that fails. That the artifacts are of
    one model is for `check_same_model` to say.
    """
    manifests = [read_manifest(path) for path in artifacts]
    labels = labels_of(artifacts)
    plain: list[tuple[int, Kept]] = [(i, "fp32") for i in range(len(artifacts))]
    sides = [*plain, *((i, kv) for i in range(len(artifacts)) for kv in kvs)]
    errors: dict[Key, str] = {}
    logits: list[dict[Key, list[float]]] = []
    notes: dict[str, None] = {}
    num_pairs = sum(len(query.documents) for queries in sets.values() for query in queries)
    with bar(total=len(sides) * num_pairs, unit="pair", desc="scoring", leave=False) as told:
        for i, kv in sides:
            logits.append(score(artifacts[i], kv, sets, threads, told, strict, errors, notes))
    if loads is None:
        loads = judged_workloads([query for _, query in usable(sets, errors)])
    problems = [*bad, *errors.values()]
    memory, timings = costs(
        artifacts, labels, loads, problems, threads=threads, repeats=repeats, speed=speed, max_pixels=max_pixels,
        strict=strict,
    )  # fmt: skip
    found: list[Scored] = []
    for (i, kv), mine in zip(sides, logits, strict=True):
        manifest, is_kept = manifests[i], len(found) >= len(artifacts)
        found.append(
            Scored(
                f"{labels[i]}, documents in {kv}" if is_kept else labels[i],
                str(artifacts[i]),
                manifest.scheme,
                manifest.num_bytes,
                manifest.fingerprint,
                kv,
                mine,
                {} if is_kept else memory[labels[i]],
                {} if is_kept else timings[labels[i]],
            )
        )
    bias = manifests[0].model.prompt.logit_bias
    return evaluation_of(found, sets, errors, bias, about=about, problems=problems), list(notes)


def costs(
    artifacts: Sequence[Path],
    labels: Sequence[str],
    loads: Mapping[str, Sequence[Pair]],
    problems: list[str],
    *,
    threads: int,
    repeats: int = 3,
    speed: bool = True,
    max_pixels: int | None = None,
    strict: bool = False,
) -> tuple[dict[str, dict[str, Memory]], dict[str, dict[str, timing.Timing]]]:
    """Memory, and seconds against the first, of artifacts on workloads: by label, then by workload.

    What failed is in `problems`, and with `strict` raised.
    """
    memory: dict[tuple[str, int], list[Memory]] = {}
    seconds: dict[tuple[str, int], list[float]] = {}
    if _STATUS.is_file():
        watch = partial(measure_memory, threads=threads, max_pixels=max_pixels)
        memory = _measured("memory", watch, artifacts, loads, 1, strict, problems)
    if speed:
        clock = partial(measure_seconds, threads=threads, max_pixels=max_pixels)
        seconds = _measured("speed", clock, artifacts, loads, repeats, strict, problems)
    timings: dict[str, dict[str, timing.Timing]] = {label: {} for label in labels}
    for load in loads:
        if (load, 0) in seconds:  # without the baseline there is nothing to compare with
            mine = {label: seconds[load, i] for i, label in enumerate(labels) if (load, i) in seconds}
            for found in timing.compare(load, mine, labels[0]):
                timings[found.side][load] = found
    held = {
        label: {load: memory[load, i][0] for load in loads if (load, i) in memory} for i, label in enumerate(labels)
    }
    return held, timings


def usable(sets: Mapping[str, Sequence[Query]], errors: Mapping[Key, str]) -> list[tuple[Key, Query]]:
    """The queries without an error. Raises InputError when none is left."""
    every = [((name, n), query) for name, queries in sets.items() for n, query in enumerate(queries)]
    found = [(key, query) for key, query in every if key not in errors]
    if not found:
        raise InputError(f"no query could be scored by every artifact: {next(iter(errors.values()))}")
    return found


def evaluation_of(
    sides: Sequence[Scored],
    sets: Mapping[str, Sequence[Query]],
    errors: Mapping[Key, str],
    bias: float,
    *,
    about: Mapping[str, Any] | None = None,
    problems: Sequence[str] = (),
) -> Evaluation:
    """The comparison of sides, the baseline first; queries in `errors` are left out for all.

    `bias`: of the logits. Raises InputError when no query is left.
    """
    every = usable(sets, errors)
    groups = {name: [row for row in every if row[0][0] == name] for name in dict.fromkeys(key[0] for key, _ in every)}
    intervals = _intervals(groups, [side.logits for side in sides])
    if len(groups) > 1:
        groups[ALL] = every
    measured: list[Measured] = []
    changes: list[Change] = []
    for number, side in enumerate(sides):
        quality = {}
        for name, rows in groups.items():
            queries = [query for _, query in rows]
            ours, theirs = ([each.logits[key] for key, _ in rows] for each in (side, sides[0]))
            found = quality_of(queries, ours, theirs if number else None, lambda logit: sigmoid(logit - bias))
            quality[name] = replace(found, interval=intervals[name][number] if number else None)
        changes += changes_of(
            side.label, queries, ours, theirs, lambda logit: sigmoid(logit - bias)
        )  # of the last: all
        facts = (side.label, side.path, side.scheme, side.num_bytes, side.fingerprint, quality)
        measured.append(Measured(*facts, side.memory, side.seconds, side.kv))
    chance = {
        name: statistics.fmean(chance_ndcg(query.relevance) for _, query in rows if query.relevance)
        for name, rows in groups.items()
        if any(query.relevance for _, query in rows)
    }
    counts = {name: len(rows) for name, rows in groups.items()}
    return Evaluation(dict(about or {}), counts, chance, tuple(measured), tuple(problems), tuple(changes))


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


def builtin_workloads(artifact: Path) -> dict[str, list[Pair]]:
    """A text and a page, both of an exact size."""
    prompts = prompts_of(artifact)
    return {
        f"text, {TEXT_TOKENS} tokens": [(QUERY, text_of(prompts, TEXT_TOKENS))],
        f"page, {VISUAL_TOKENS} visual tokens": [(QUERY, page_of(VISUAL_TOKENS))],
    }


def judged_workloads(queries: Sequence[Query]) -> dict[str, list[Pair]]:
    """The file's own pairs: a few without and a few with an image, spread evenly over each kind."""
    pairs = [(query.query, document) for query in queries for document in query.documents]
    loads = {}
    for kind, wanted in (("text", False), ("image", True)):
        mine = [pair for pair in pairs if any(map(is_image, pair)) == wanted]
        if mine:
            picked = np.linspace(0, len(mine) - 1, min(TIMED_PAIRS, len(mine))).round().astype(int)
            loads[f"{len(picked)} of the file's {kind} pairs"] = [mine[i] for i in picked]
    return loads


def is_image(content: Any) -> bool:
    """Whether a query or document is an image, by its form alone."""
    return not isinstance(content, str) and not (isinstance(content, Mapping) and "text" in content)


def score(
    artifact: Path, kv: Kept, sets: Mapping[str, Sequence[Query]], threads: int, told: Any, strict: bool,
    errors: dict[Key, str], notes: dict[str, None],
) -> dict[Key, list[float]]:  # fmt: skip
    """Logits of every query that is not in `errors`; adds to `errors` and `notes`. The artifact is closed on return.

    All are scored in one call, which fills its runs across queries, and reads a document once that several have.
    """
    wanted = {
        (name, number): query
        for name, queries in sets.items()
        for number, query in enumerate(queries)
        if (name, number) not in errors
    }
    places = [(key, i) for key, query in wanted.items() for i in range(len(query.documents))]
    results: dict[tuple[Key, int], Result] = {}
    with Reranker.load(artifact, threads=threads, kv=kv) as reranker:
        pairs = ((query.query, document) for query in wanted.values() for document in query.documents)
        for position, result in reranker.stream(pairs):
            told.update()
            key, i = places[position]
            results[key, i] = result
            if strict and result.error:
                raise InputError(_said(artifact, wanted[key], i, result.error))
    logits: dict[Key, list[float]] = {}
    for key, query in wanted.items():
        mine = [results[key, i] for i in range(len(query.documents))]
        for i, result in enumerate(mine):
            if result.error:
                errors.setdefault(key, _said(artifact, query, i, result.error))
            where = f"{query.where}, document {i + 1}"
            notes |= dict.fromkeys(f"{where}: the {what} was too long and was cut" for what in result.truncated)
        logits[key] = [result.logit for result in mine]
    return logits


def _said(artifact: Path, query: Query, document: int, error: InputError) -> str:
    """An error of one pair; what the artifact makes of it, and not the line, is told with the artifact."""
    message = f"{artifact}: {error.said}" if isinstance(error, ScoreError) else error.said
    return f"{query.where}, document {document + 1}: {message}"


def _intervals(
    sets: Mapping[str, Sequence[tuple[Key, Query]]], logits: Sequence[Mapping[Key, Sequence[float]]]
) -> dict[str, list[Interval | None]]:
    """Of each set, and of all together, an interval of each side's loss against the first; None without judgements."""
    parts = {}
    for number, (name, rows) in enumerate(sets.items()):
        queries = [query for _, query in rows]
        sides = [[side[key] for key, _ in rows] for side in logits]
        losses = [losses_of(queries, side, sides[0]) for side in sides]
        if losses[0]:
            parts[name] = resampled(np.transpose(losses), [query.group for query in queries], number)
    found = {name: [interval([part], side) for side in range(len(logits))] for name, part in parts.items()}
    every = [interval(list(parts.values()), side) if parts else None for side in range(len(logits))]
    return {**{name: [None] * len(logits) for name in sets}, **found, ALL: every}


def _measured(
    what: str, measure: Callable[[Path, Sequence[Pair]], _T], artifacts: Sequence[Path],
    loads: Mapping[str, Sequence[Pair]], turns: int, strict: bool, problems: list[str],
) -> dict[tuple[str, int], list[_T]]:  # fmt: skip
    """(workload, artifact) → what each turn measured; what failed is in `problems`, and takes no further turns."""
    found: dict[tuple[str, int], list[_T]] = {}
    failed: set[tuple[str, int]] = set()
    with bar(total=len(loads) * len(artifacts) * turns, unit="process", desc=what, leave=False) as told:
        for (load, pairs), _, (i, artifact) in itertools.product(loads.items(), range(turns), enumerate(artifacts)):
            told.update()
            if (load, i) in failed:
                continue
            try:
                found.setdefault((load, i), []).append(measure(artifact, pairs))
            except M0kitError as error:
                if strict:
                    raise
                problems.append(f"{load}: {error}")
                failed.add((load, i))
    return {key: measured for key, measured in found.items() if key not in failed}
