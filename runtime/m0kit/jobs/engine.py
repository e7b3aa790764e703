"""What makes scores of a job's rows: an engine. Owns what one is, the one of this process, and what scores depend on.

    for result in local_engine(Path("m0-int8"), {"threads": 4}, work): ...

Another engine is `m0kit.jobs.ray_engine`. What a library raises on a row is that row's error, and costs no other.
"""

import functools
import json
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import m0kit
from m0kit.artifact.manifest import read_manifest
from m0kit.errors import ArtifactError, DependencyError, DeviceError, M0kitError, OutputError, StoreError, is_panic
from m0kit.jobs.journal import file_stamp
from m0kit.jobs.rows import Row, Scored
from m0kit.jobs.windows import Work
from m0kit.keeping.store import Store
from m0kit.precision import provider_of
from m0kit.reranker import Reranker
from m0kit.scoring.sessions import engine_version

# (artifact, options of Reranker.load, work) → results in any order; None is a good moment to commit. Where a process
# died, the engine is also run in a forked child, unless it has an attribute `elsewhere`, which says that it scores in
# other processes, whose end is its own business.
Engine = Callable[[Path, Mapping[str, Any], Work], Generator[Scored | None, None, None]]


def local_engine(artifact: Path, load: Mapping[str, Any], work: Work) -> Generator[Scored | None, None, None]:
    """Score in this process."""
    reranker = Reranker.load(artifact, **load)
    for window in work:
        yield from score_rows(reranker, window)
        yield None


def score_rows(reranker: Reranker, rows: Sequence[Row]) -> Iterator[Scored]:
    """The results of rows, in the order of the work."""
    readable = []
    for row in rows:
        if row.error is None:
            readable.append(row)
        else:
            yield Scored.failed(row, row.error)
    yield from _isolated(reranker, readable)


def _isolated(reranker: Reranker, rows: Sequence[Row]) -> Iterator[Scored]:
    """The results of rows that could be read; what a library raises on one of them is that row's error."""
    stamp = functools.cache(file_stamp)
    files = [{str(path): stamp(path) for path in row.images()} for row in rows]  # before they are read
    named = [json.dumps(stamps) if stamps else None for stamps in files]
    left = dict.fromkeys(range(len(rows)))
    try:
        for position, result in reranker.stream([row.pair for row in rows]):
            row = rows[position]
            del left[position]
            if result.error is None:
                cut = ",".join(result.truncated) or None
                yield Scored(row.number, row.id, result.score, result.logit, cut, None, named[position])
            else:
                yield Scored.failed(row, f"{row.place}: {result.error.said}", named[position])
    except BaseException as error:  # an input is data, and nothing that it makes a library do may stop a job
        if not left or not _may_be_of_a_row(error):
            raise
        failed = error.with_traceback(None)  # which holds what filled the memory
    if not left:
        return
    try:
        reranker.score([("a", "a")])
    except Exception:
        raise failed from None  # it was no row: nothing can be scored
    if len(left) > 1:
        rest = [rows[position] for position in left]
        for part in (rest[: len(rest) // 2], rest[len(rest) // 2 :]):
            yield from _isolated(reranker, part)
    else:
        (position,) = left
        row = rows[position]
        yield Scored.failed(row, f"{row.place}: {_reason(failed)}", named[position])


def _may_be_of_a_row(error: BaseException) -> bool:
    """Not what is wrong with the artifact, the index or the machine, and not an interruption."""
    if isinstance(error, ArtifactError | StoreError | OutputError | DeviceError | DependencyError):
        return False
    return isinstance(error, Exception) or is_panic(error)


def _reason(error: BaseException) -> str:
    if isinstance(error, M0kitError):
        return str(error)
    if isinstance(error, MemoryError):
        return "there is not enough memory for it. Shorten the text, or shrink the image."
    return f"it cannot be scored ({type(error).__name__})."


def ended(row: Row) -> Scored:
    """The result of a row that ends each process it is scored in."""
    return Scored.failed(
        row,
        f"{row.place}: the process was ended while this row was scored (twice). See to its text or image, or score it "
        "on a machine with more memory.",
    )


def dependencies(artifact: Path, load: Mapping[str, Any]) -> dict[str, str]:
    """What scores depend on besides the input, with the options of Reranker.load: name → value.

    Versions of ONNX Runtime may round otherwise, and a page depends on what decodes it. Raises
    ArtifactError, StoreError, DependencyError.
    """
    manifest = read_manifest(artifact, require_signature=load.get("require_signature"))
    kv, edition = load.get("kv"), None
    if load.get("index") is not None:
        with Store.open(load["index"]) as store:
            kv, edition = kv or store.identity.get("kv"), store.edition
    own_engine = load.get("open_graph")
    facts = {
        "the artifact": manifest.fingerprint,
        "the index": edition,
        "kv": kv or "fp32",
        "max_pixels": load.get("max_pixels") or manifest.model.image.max_pixels,
        "max_length": load.get("max_length") or manifest.model.prompt.max_length,
        "device": provider_of(str(load.get("device") or "cpu")),
        "open_graph": own_engine and getattr(own_engine, "__qualname__", type(own_engine).__qualname__),
        "onnxruntime": engine_version(),
        "m0kit": m0kit.__version__,
        **{name: version(name) for name in ("pillow", "tokenizers")},
    }
    return {name: str(value) for name, value in facts.items()}
