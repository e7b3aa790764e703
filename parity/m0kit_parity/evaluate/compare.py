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
from functools import partial
from pathlib import Path
from typing import Any, Final, TypeVar

import numpy as np

from m0kit.artifact.manifest import TOKENIZER, Manifest, read_manifest
from m0kit.artifact.ports import Kept
from m0kit.errors import ArtifactError, InputError, M0kitError, ScoreError
from m0kit.reranker import Reranker
from m0kit.scoring.engine import sigmoid
from m0kit.terminal import bar
from m0kit_parity.bench import timing
from m0kit_parity.bench.measure import Memory, measure_memory, measure_seconds
from m0kit_parity.bench.workloads import QUERY, Pair, page_of, prompts_of, text_of
from m0kit_parity.evaluate.judged import Query
from m0kit_parity.evaluate.quality import Change, Evaluation, Measured, changes_of, quality_of
from m0kit_parity.small.evaluate import chance_ndcg

ALL: Final = "all sets"
TEXT_TOKENS: Final = 256
VISUAL_TOKENS: Final = 768
TIMED_PAIRS: Final = 4
_STATUS: Final = Path("/proc/self/status")
_T = TypeVar("_T")
Key = tuple[str, int]  # set, query within it


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
    with bar(total=len(sides) * sum(map(len, sets.values())), unit="query", desc="scoring", leave=False) as told:
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
    memory: dict[tuple[str, int], list[Memory]] = {}
    seconds: dict[tuple[str, int], list[float]] = {}
    if _STATUS.is_file():
        watch = partial(measure_memory, threads=threads, max_pixels=max_pixels)
        memory = _measured("memory", watch, artifacts, loads, 1, strict, problems)
    if speed:
        clock = partial(measure_seconds, threads=threads, max_pixels=max_pixels)
        seconds = _measured("speed", clock, artifacts, loads, repeats, strict, problems)
    timings: list[timing.Timing] = []
    for load in loads:
        if (load, 0) in seconds:  # without the baseline there is nothing to compare with
            mine = {label: seconds[load, i] for i, label in enumerate(labels) if (load, i) in seconds}
            timings += timing.compare(load, mine, labels[0])
    measured: list[Measured] = []
    changes: list[Change] = []
    bias = manifests[0].model.prompt.logit_bias
    for side, (i, kv) in enumerate(sides):
        manifest, is_kept = manifests[i], side >= len(artifacts)
        label = f"{labels[i]}, documents in {kv}" if is_kept else labels[i]
        quality = {}
        for name, rows in groups.items():
            queries = [query for _, query in rows]
            ours, theirs = ([logits[k][key] for key, _ in rows] for k in (side, 0))
            quality[name] = quality_of(queries, ours, theirs if side else None, lambda logit: sigmoid(logit - bias))
        changes += changes_of(label, queries, ours, theirs, lambda logit: sigmoid(logit - bias))  # of the last: all
        measured.append(
            Measured(
                label,
                str(artifacts[i]),
                manifest.scheme,
                manifest.num_bytes,
                manifest.fingerprint,
                quality,
                {load: memory[load, i][0] for load in loads if (load, i) in memory and not is_kept},
                {t.workload: t for t in timings if t.side == labels[i] and not is_kept},
                kv,
            )
        )
    chance = {
        name: statistics.fmean(chance_ndcg(query.relevance) for _, query in rows if query.relevance)
        for name, rows in groups.items()
        if any(query.relevance for _, query in rows)
    }
    counts = {name: len(rows) for name, rows in groups.items()}
    found = Evaluation(dict(about or {}), counts, chance, tuple(measured), tuple(problems), tuple(changes))
    return found, list(notes)


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
        mine = [pair for pair in pairs if any(map(_is_image, pair)) == wanted]
        if mine:
            picked = np.linspace(0, len(mine) - 1, min(TIMED_PAIRS, len(mine))).round().astype(int)
            loads[f"{len(picked)} of the file's {kind} pairs"] = [mine[i] for i in picked]
    return loads


def _is_image(content: Any) -> bool:
    return not isinstance(content, str) and not (isinstance(content, Mapping) and "text" in content)


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
