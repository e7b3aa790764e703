"""A checkpoint in several precisions: exported one after another, scored against a baseline, and removed again.

    with Work.open(Path("m0.evaluation")) as work:
        told = evaluate_checkpoint(work, Checkpoint("jinaai/jina-reranker-m0"), ["int8"], sets, "sets' hash", threads=8)
        show_text(to_text(told.evaluation))
        work.finish()

Owns the work folder, the order of the steps, and what is kept of them. On the disk are the baseline and one other
artifact at a time. Each step's result is a file of its own, written aside and renamed, and called by a hash of all that
it depends on: weights, adapters, recipe, versions, queries. So a run that was stopped goes on where it was, and one
that asks for something else takes what is still true. The folder goes when everything was told.

The baseline has the checkpoint's own bits where that can be: bf16 for weights in bf16 without adapters, half of fp32's
disk and the same values, as products on a CPU widen them. Else fp32, which holds fp16's and merged weights as they are.
"""

import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final, TypeVar

import msgspec

from m0kit.artifact.manifest import MANIFEST, read_manifest
from m0kit.artifact.ports import Kept
from m0kit.errors import ArtifactError, InputError, OutputError
from m0kit.files import OWN, destination, lock_file, named_errors, occupied, read_regular, sha256_of, writing
from m0kit.plain import plain
from m0kit.terminal import bar, say
from m0kit_export.adapter import AdapterSpec
from m0kit_export.export import export_artifact
from m0kit_export.graphs import build_graphs
from m0kit_export.sources import CheckpointSource
from m0kit_parity.bench.measure import Memory
from m0kit_parity.bench.timing import Timing
from m0kit_parity.bench.workloads import Pair
from m0kit_parity.evaluate.activations import Activations
from m0kit_parity.evaluate.blame import Blamed, blame, sample, without_places
from m0kit_parity.evaluate.compare import (
    VISUAL_TOKENS,
    Key,
    Scored,
    costs,
    evaluation_of,
    judged_workloads,
    score,
    usable,
)
from m0kit_parity.evaluate.judged import Query
from m0kit_parity.evaluate.quality import Evaluation
from m0kit_parity.evaluate.stored_activations import activations_of
from m0kit_quant.recipe import Recipe

_MARK: Final = "m0kit-evaluation"  # a file that says whose the folder is
_LOCK: Final = "lock"
_SPARE_BYTES: Final = 256 << 20  # for tokenizers, graphs, what is kept of each step, and the file system's own needs
_RECORD_BYTES: Final = 1 << 30
_SHORT: Final = 16  # letters of a hash in a name
_T = TypeVar("_T")

Loads = Callable[[Path], Mapping[str, Sequence[Pair]]]


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """What is exported."""

    name: str  # a folder, or a hub id
    adapters: tuple[AdapterSpec, ...] = ()
    revision: str | None = None


@dataclass(frozen=True, slots=True)
class Told:
    """All that is found of a checkpoint."""

    evaluation: Evaluation
    notes: tuple[str, ...]
    blamed: tuple[Blamed, ...]
    activations: Activations


@dataclass(slots=True)
class _Scores:
    """What one artifact makes of the queries."""

    scheme: str
    num_bytes: int
    fingerprint: str
    bias: float
    logits: dict[str, list[list[float | None] | None]]  # by set, a query at its number; None: was not asked, no number
    errors: list[tuple[str, int, str]]
    notes: list[str]


@dataclass(slots=True)
class _Costs:
    """Memory and seconds of an artifact and of the baseline beside it, by precision and workload."""

    memory: dict[str, dict[str, Memory]]
    seconds: dict[str, dict[str, Timing]]
    problems: list[str] = field(default_factory=list)


class Work:
    """A folder for what a run needs meanwhile, this process's alone."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @classmethod
    @contextmanager
    def open(cls, folder: Path) -> Iterator["Work"]:
        """Make the folder, or take on the one that a stopped run left; what is finished stays in it until `finish`.

        Raises OutputError when something else is there, or another process works in it.
        """
        place = destination(folder)
        with named_errors(folder):
            if occupied(place) and not (place / _MARK).is_file():
                raise OutputError(
                    f"{folder}: exists, and is no folder of an evaluation that was stopped. Choose another with --work."
                )
            place.mkdir(parents=True, exist_ok=True)
            (place / _MARK).touch()
            descriptor = os.open(place / _LOCK, os.O_RDWR | os.O_CREAT | OWN, 0o666)
        work = cls(place)
        try:
            with named_errors(folder):
                if not lock_file(descriptor):
                    raise OutputError(f"{folder}: another process evaluates in it. Wait for it, or say another --work.")
            try:
                yield work
            except BaseException:
                if not work.folder.is_dir():
                    pass  # it is finished: what failed is telling
                elif any(path.suffix == ".json" or (path / MANIFEST).is_file() for path in work.folder.iterdir()):
                    say(f"what is finished is kept in {folder}: the same command goes on from there")
                else:
                    work.finish()
                raise
        finally:
            os.close(descriptor)

    def finish(self) -> None:
        """Remove the folder with all that is in it."""
        shutil.rmtree(self.folder)

    def kept(self, step: str, key: Any, form: type[_T], make: Callable[[], _T]) -> _T:
        """The result of a step: what was kept of it under the same key, else what `make` gives, which is kept."""
        path = self.folder / f"{step}-{_hash(key)}.json"
        try:
            return msgspec.json.decode(read_regular(path, _RECORD_BYTES), type=form)
        except (OSError, msgspec.MsgspecError):
            pass  # there is none, or none that can be read
        made = make()
        with writing(path) as file:
            file.write(msgspec.json.encode(made))
        return made

    def only(self, *names: str) -> None:
        """Remove all artifacts but these."""
        for path in self.folder.iterdir():
            if path.is_dir() and not path.is_symlink() and path.name not in names:
                shutil.rmtree(path)


def evaluate_checkpoint(
    work: Work,
    checkpoint: Checkpoint,
    precisions: Sequence[str],
    sets: Mapping[str, Sequence[Query]],
    sets_key: str,
    *,
    threads: int,
    loads: Loads | None = None,
    repeats: int = 3,
    speed: bool = True,
    strict: bool = False,
    about: Mapping[str, Any] | None = None,
    bad: Sequence[str] = (),
    with_blame: bool = False,
) -> Told:
    """The checkpoint in each precision against its baseline on `sets`, which `sets_key` tells from all others.

    `loads`: workloads for an artifact, whose pages may be larger than the checkpoint's limit; None: the file's own
    pairs. The rest is as of `compare`.
    Raises what export and `compare` raise; OutputError where the disk has no room for the baseline and one more.
    """
    source = CheckpointSource.open(checkpoint.name, checkpoint.adapters, checkpoint.revision)
    baseline = baseline_of(source)
    made_of = [without_places(source.provenance()), version("m0kit"), version("torch"), version("onnxruntime")]
    wanted = list(dict.fromkeys([baseline, *precisions]))
    if wanted == [baseline]:
        raise InputError(
            f"{checkpoint.name}: {baseline} holds the checkpoint's own values, and is what others are compared with. "
            "Name another --precision."
        )
    recipes = {name: Recipe.default(name) for name in wanted}
    keys = {name: [made_of, recipe.to_dict()] for name, recipe in recipes.items()}
    folders = {name: work.folder / f"{name}-{_hash(key)}" for name, key in keys.items()}
    work.only(*(folder.name for folder in folders.values()))
    _require_room(work, source, recipes, folders, baseline)

    def artifact(name: str) -> Path:
        """The folder of an artifact, exported where it is not there; no other but the baseline's is beside it."""
        folder = folders[name]
        if name != baseline:
            work.only(folder.name, folders[baseline].name)
        if not _is_whole(folder):
            say(f"exporting {checkpoint.name} in {name}")
            export_artifact(
                checkpoint.name, folder, adapters=checkpoint.adapters, recipe=recipes[name],
                revision=checkpoint.revision, overwrite=folder.exists(),
            )  # fmt: skip
        return folder

    image, max_pixels = source.config.image, None
    if loads is not None:
        max_pixels = max(image.max_pixels, VISUAL_TOKENS * image.factor**2)
    options = {"threads": threads, "repeats": repeats, "speed": speed, "max_pixels": max_pixels, "strict": strict}
    errors: dict[Key, str] = {}
    scored: dict[str, _Scores] = {}

    def scores(name: str) -> None:
        # What those before could not score is not asked again, so this depends on their errors.
        step = partial(_scores, partial(artifact, name), sets, threads, dict(errors), strict)
        scored[name] = work.kept(f"{name}-scores", [keys[name], sets_key, list(errors.values())], _Scores, step)
        errors.update({(of, number): error for of, number, error in scored[name].errors})

    scores(baseline)
    own = judged_workloads([query for _, query in usable(sets, errors)])
    watch = partial(_activations, partial(artifact, baseline), sets, threads)
    activations = work.kept("activations", [keys[baseline], sets_key], Activations, watch)
    measured: dict[str, _Costs] = {}
    blamed: list[Blamed] = []
    for name in wanted[1:]:
        scores(name)
        both = partial(artifact, baseline), partial(artifact, name)
        key = [keys[baseline], keys[name], sets_key]
        measure = partial(_costs, *both, (baseline, name), loads or (lambda _: own), options)
        measured[name] = work.kept(f"{name}-costs", [*key, options, sorted(own)], _Costs, measure)
        if with_blame:
            found = work.kept(f"{name}-blame", key, Blamed, partial(_blame, *both, sets, threads))
            blamed.append(replace(found, label=name, baseline=baseline))
        work.only(*(folder.name for other, folder in folders.items() if other != name))
    measured[baseline] = measured[wanted[1]]
    sides = []
    for name, mine in scored.items():
        kv: Kept = "fp32"
        facts = (name, checkpoint.name, mine.scheme, mine.num_bytes, mine.fingerprint, kv)
        spent = measured[name]
        sides.append(Scored(*facts, _logits(mine), spent.memory.get(name, {}), spent.seconds.get(name, {})))
    problems = [*bad, *errors.values(), *dict.fromkeys(p for c in measured.values() for p in c.problems)]
    evaluation = evaluation_of(sides, sets, errors, scored[baseline].bias, about=about, problems=problems)
    evaluation = replace(evaluation, exact=True)
    notes = dict.fromkeys(note for found in scored.values() for note in found.notes)
    return Told(evaluation, tuple(notes), tuple(blamed), activations)


def baseline_of(source: CheckpointSource) -> str:
    """The precision that holds what a checkpoint with its adapters computes with."""
    matrices = {source.checkpoint.dtype(name) for name in source.names if len(source.shape(name)) > 1}
    return "bf16" if matrices == {"BF16"} and not source.adapters.provenance() else "fp32"


def sets_key_of(file: Path, queries: Sequence[Query]) -> str:
    """A hash of a judged file and of the images that it names; what cannot be read counts as missing."""
    found = hashlib.sha256(sha256_of(file).encode())
    for query in queries:
        for content in (query.query, *query.documents):
            image = content.get("image") if isinstance(content, Mapping) else None
            if isinstance(image, os.PathLike):
                try:
                    found.update(sha256_of(image).encode())
                except OSError:
                    found.update(b"missing")
    return found.hexdigest()


# --- the steps -------------------------------------------------------------------------------------


def _scores(
    artifact: Callable[[], Path],
    sets: Mapping[str, Sequence[Query]],
    threads: int,
    known: Mapping[Key, str],
    strict: bool,
) -> _Scores:
    folder = artifact()
    errors, notes = dict(known), dict[str, None]()
    total = sum(len(query.documents) for queries in sets.values() for query in queries)
    with bar(total=total, unit="pair", desc="scoring", leave=False) as told:
        logits = score(folder, "fp32", sets, threads, told, strict, errors, notes)
    manifest = read_manifest(folder)
    rows: dict[str, list[list[float | None] | None]] = {}
    for name, queries in sets.items():
        rows[name] = []
        for number in range(len(queries)):
            mine = logits.get((name, number))
            rows[name].append(None if mine is None else [x if math.isfinite(x) else None for x in mine])
    new = [(name, number, error) for (name, number), error in errors.items() if (name, number) not in known]
    bias = manifest.model.prompt.logit_bias
    return _Scores(manifest.scheme, manifest.num_bytes, manifest.fingerprint, bias, rows, new, list(notes))


def _logits(found: _Scores) -> dict[Key, list[float]]:
    return {
        (name, number): [math.nan if x is None else x for x in row]
        for name, rows in found.logits.items()
        for number, row in enumerate(rows)
        if row is not None
    }


def _activations(artifact: Callable[[], Path], sets: Mapping[str, Sequence[Query]], threads: int) -> Activations:
    return activations_of(artifact(), sample(sets), threads)


def _costs(
    baseline: Callable[[], Path], artifact: Callable[[], Path], names: tuple[str, str], loads: Loads,
    options: dict[str, Any],
) -> _Costs:  # fmt: skip
    """Both take turns, so that a slow minute of the machine is both's."""
    problems: list[str] = []
    base = baseline()
    memory, seconds = costs([base, artifact()], names, loads(base), problems, **options)
    return _Costs(memory, seconds, problems)


def _blame(
    baseline: Callable[[], Path], artifact: Callable[[], Path], sets: Mapping[str, Sequence[Query]], threads: int
) -> Blamed:
    return blame(baseline(), artifact(), sets, threads=threads)


def _is_whole(folder: Path) -> bool:
    """Whether an export is finished: it appears under its name when it is. Its hashes are checked when it is opened."""
    try:
        read_manifest(folder, require_signature=False)
    except ArtifactError:
        return False
    return True


def _require_room(
    work: Work, source: CheckpointSource, recipes: Mapping[str, Recipe], folders: Mapping[str, Path], baseline: str
) -> None:
    """Raises OutputError where the disk does not take the baseline and the largest of the others."""
    sizes = {}
    for name, recipe in recipes.items():
        graphs = build_graphs(source.config, recipe, frequencies=source.frequencies)
        sizes[name] = sum(graph.data_bytes for graph in graphs.values())
    most = max(size for name, size in sizes.items() if name != baseline)
    there = sum(path.stat().st_size for folder in folders.values() if folder.is_dir() for path in folder.iterdir())
    needed = sizes[baseline] + most + _SPARE_BYTES - there
    free = shutil.disk_usage(work.folder).free
    if free < needed:
        raise OutputError(
            f"{work.folder}: the baseline ({baseline}) and one more artifact take {(needed + there) / 2**30:.1f} GiB; "
            f"{(free + there) / 2**30:.1f} GiB are free there. Choose a larger disk with --work."
        )


def _hash(key: Any) -> str:
    return hashlib.sha256(json.dumps(key, sort_keys=True, default=plain).encode()).hexdigest()[:_SHORT]
