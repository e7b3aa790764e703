"""The artifact: a folder with graphs, tokenizer and one manifest. Owns its format, reading and checking.

Who writes one (`m0kit_export`) fills a `Manifest` and calls `write_manifest` last, in a folder not yet in
its final place. Who reads one calls `read_manifest`, then `verify_files` before any engine opens a file.

    manifest = read_manifest(Path("m0-fp32"))
    verify_files(Path("m0-fp32"), manifest)

A folder may come from anybody. Its manifest must be strict JSON of the very form that the types here are, hold its own
hash, and fit together; beside it only files are read that it lists by a plain name, whose size and hash are as it
says, and graphs that read no other file.
"""

import hashlib
import json
import math
import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from stat import S_ISREG
from typing import Annotated, Any, Final, Literal, NotRequired, Required, TypedDict

from msgspec import Meta

from m0kit.artifact.external import external_tensors
from m0kit.artifact.ports import KV, GraphPorts, check_ports, cuda_type, data_name
from m0kit.artifact.signature import required, signer
from m0kit.config import ModelConfig
from m0kit.errors import (
    ArtifactDamagedError,
    ArtifactError,
    ArtifactNotFoundError,
    ArtifactVersionError,
)
from m0kit.files import read_regular, sha256_of, writing
from m0kit.precision import SCHEMES
from m0kit.schema import exactly, fitting, parse
from m0kit.verified import Memory

FORMAT = "m0kit-artifact"
FORMAT_VERSION = 3  # raised when an older m0kit could no longer read the folder rightly
MANIFEST = "manifest.json"
TOKENIZER = "tokenizer.json"
MANIFEST_BYTES: Final = 8 << 20  # one of the full model has 60 KB
TOKENIZER_BYTES: Final = 64 << 20  # 7 to 11 MB; tokenizers takes some ten times as much to open it
GRAPH_BYTES: Final = 4 << 20  # 0.4 MB: weights are beside it; ONNX Runtime takes half a minute to open so much
_MOST_FILES: Final = 1000  # 9
# What a file may be called on every system: no separators, drives, streams, device names, nothing hidden.
_PLAIN: Final = re.compile(
    r"(?!(?i:con|prn|aux|nul|com\d|lpt\d)(?:\.|$))[A-Za-z0-9_](?:[A-Za-z0-9_.+-]{0,198}[A-Za-z0-9_+-])?"
)
# Tolerances beyond so many times the largest known logit, or 1, would let anything pass; up to 3 have been needed.
_MOST_TOLERANCE: Final = 100
_MOST_LETTERS: Final = 100_000  # of a known answer; 1,000 for its picture
_RULES = 1  # for graphs; raised when graphs that were verified before must be looked at again


@dataclass(frozen=True, slots=True)
class FileEntry:
    """One file of the folder."""

    size: Annotated[int, Meta(ge=0)]  # bytes
    sha256: Annotated[str, Meta(pattern="^[0-9a-f]{64}$")]


@dataclass(frozen=True, slots=True)
class KnownAnswer:
    """A tiny pair and its logit, which the exporter computed without the engine that scores."""

    query: str
    document: str | Mapping[str, str]  # a text, or {"image": a data URI}
    logit: float

    def __post_init__(self) -> None:
        document = self.document
        if isinstance(document, Mapping) and (
            set(document) != {"image"} or not str(document["image"]).startswith("data:image/")
        ):
            raise ValueError('a document of a known answer is a text or {"image": a data URI}')
        text = document["image"] if isinstance(document, Mapping) else document
        if len(self.query) > _MOST_LETTERS or len(text) > _MOST_LETTERS:
            raise ValueError(f"a known answer has a text of more than {_MOST_LETTERS} characters")
        if not math.isfinite(self.logit):
            raise ValueError("the logit of a known answer is not finite")

    @property
    def is_image(self) -> bool:
        return not isinstance(self.document, str)


@dataclass(frozen=True, slots=True)
class KnownAnswers:
    """What an engine must come out at before it is trusted."""

    pairs: Annotated[tuple[KnownAnswer, ...], Meta(min_length=1, max_length=100)]  # 5; each start may pay for them
    tolerance: Mapping[str, float]  # how far a right logit may be off, by the form in which documents are kept
    why: str  # the reason of the tolerance

    def __post_init__(self) -> None:
        most = _MOST_TOLERANCE * max(1.0, *(abs(pair.logit) for pair in self.pairs))
        if set(self.tolerance) != set(KV) or not all(0 < value <= most for value in self.tolerance.values()):
            raise ValueError(f"tolerance must have {', '.join(KV)}, each a number above 0 and at most {most:g}")


class _Rule(TypedDict):
    """Of a recipe; `m0kit_quant.recipe` owns what it means."""

    match: Required[str]
    scheme: Required[str]
    block: NotRequired[int | list[int]]
    inputs: NotRequired[int]


class _Recipe(TypedDict):
    precision: Required[str]
    device: NotRequired[str]
    rotate: NotRequired[bool]  # not there: false
    equalize: NotRequired[bool]
    widen: NotRequired[bool]  # not there: false
    feedback: NotRequired[bool]  # not there: false
    weights: Required[Annotated[list[_Rule], Meta(min_length=1)]]


class _Adapter(TypedDict, total=False):
    name: str | None
    path: str | None
    weight: float
    licence: str | None
    left_out: list[str]
    sha256: dict[str, str] | None


class _Provenance(TypedDict, total=False):
    """What m0kit reads of it; the rest is for people."""

    base: str | None
    licence: str | None
    base_files: dict[str, str] | None
    adapters: list[_Adapter]
    dropped_tensors: list[str]


@dataclass(frozen=True, slots=True)
class Manifest:
    """All the runtime needs to know of a model, and where it came from."""

    model: ModelConfig
    scheme: str  # the precision's name: "fp32", "fp16", "bf16", "int8", "int4", "nf4", or a recipe's own
    graphs: Mapping[str, GraphPorts]
    runs: Mapping[str, Mapping[str, str]]  # set → portable graph → the graph that runs in its place there
    files: Mapping[str, FileEntry]
    provenance: Mapping[str, Any]  # base, adapters with hashes, licence, tool versions
    recipe: Mapping[str, Any]  # which scheme stores which matrix, and what was done to them before: a `_Recipe`
    known_answers: KnownAnswers | None = None  # None: nothing to check an engine by

    @property
    def schemes(self) -> tuple[str, ...]:
        """The schemes that its matrices are stored in."""
        return tuple(sorted({str(rule["scheme"]) for rule in self.recipe["weights"]}))

    @property
    def licence(self) -> str:
        """The weights' licence, as the checkpoint states it."""
        return str(self.provenance.get("licence") or "not stated by the checkpoint")

    @property
    def num_bytes(self) -> int:
        return sum(entry.size for entry in self.files.values())

    @property
    def fingerprint(self) -> str:
        """sha256 over all that a score depends on, files and settings: what a cached value may be keyed by.

        That is the whole manifest, with the version of its format, but for two entries that no score depends on and
        that differ between exports of the same weights. `provenance`: the same weights from elsewhere, or by other
        versions of tools, are the same. `known_answers`: the files whose answers they are have hashes here, and their
        last digits are sums of floats, which another CPU's export rounds otherwise.
        """
        scoring = {"format_version": FORMAT_VERSION, **_content(self)}
        return _sha256_of_json({k: v for k, v in scoring.items() if k not in ("provenance", "known_answers")})


def read_manifest(
    folder: Path, *, require_signature: str | os.PathLike[str] | Literal[False] | None = None
) -> Manifest:
    """Read and check `folder/manifest.json`. Hashes of files are not checked here.

    `require_signature`: a file of trusted signers, one of whom must have signed it; by default the one that
    M0KIT_REQUIRE_SIGNATURE names, if it does. False is for what this process wrote itself.

    Raises ArtifactNotFoundError, ArtifactVersionError, ArtifactDamagedError, SignatureError; ArtifactError for another
    kind of file or one that may not be read; DependencyError where signatures cannot be checked.
    """
    return read_signed(folder, require_signature=require_signature)[0]


def read_signed(
    folder: Path, *, require_signature: str | os.PathLike[str] | Literal[False] | None = None
) -> tuple[Manifest, str | None]:
    """`read_manifest`, and who signed it; None where no signature was required."""
    path = folder / MANIFEST
    if not os.path.isdir(folder):  # unlike Path.is_dir it also takes a name too long for the file system
        raise ArtifactNotFoundError(f"{folder}: no such folder. Give the folder that `m0kit export` wrote.")
    try:
        data = read_regular(path, MANIFEST_BYTES)
    except FileNotFoundError:
        raise ArtifactNotFoundError(
            f"{folder}: there is no {MANIFEST}, so this is not a finished artifact. "
            "Give the folder that `m0kit export` wrote, or export again."
        ) from None
    except OSError as error:
        raise ArtifactError(_unreadable(path, error)) from error
    signers = None if require_signature is False else required(require_signature)
    signed_by = None if signers is None else signer(folder, data, signers)
    try:
        raw = parse(data)
    except ValueError as error:
        raise ArtifactDamagedError(
            f"{path}: cannot be read as JSON: {error}. Copy the whole artifact again, or export again."
        ) from error
    if not isinstance(raw, dict) or raw.get("format") != FORMAT:
        raise ArtifactError(f'{path}: not an m0kit manifest (expected "format": "{FORMAT}").')
    version = raw.get("format_version")
    if type(version) is not int or version < 1:
        raise ArtifactDamagedError(f"{path}: format_version is {version!r:.100}, expected a whole number from 1.")
    if version > FORMAT_VERSION:
        raise ArtifactVersionError(
            f"{path}: format version {version}; this m0kit reads {FORMAT_VERSION}. Update m0kit."
        )
    if version < FORMAT_VERSION:
        raise ArtifactVersionError(
            f"{path}: format version {version}; this m0kit reads {FORMAT_VERSION}. Export the artifact again."
        )
    told = raw.pop("sha256", None)
    if told is None:
        raise ArtifactDamagedError(
            f"{path}: has no sha256 of its own, so it was changed. Copy the artifact again, or export again."
        )
    if told != _sha256_of_json(raw):
        raise ArtifactDamagedError(
            f"{path}: has changed since the export (its own sha256 differs). Copy the artifact again, or export again; "
            "limits can be changed when it is loaded."
        )
    try:
        return _manifest(raw), signed_by
    except ValueError as error:
        raise ArtifactDamagedError(f"{path}: {error}. Export again.") from error


def _manifest(raw: dict[str, Any]) -> Manifest:
    """Raises ValueError that names the field which is not as it must be."""
    content = {name: value for name, value in raw.items() if name not in ("format", "format_version")}
    manifest = exactly(content, Manifest)
    for scheme in (rule["scheme"] for rule in exactly(manifest.recipe, _Recipe)["weights"]):
        if scheme not in SCHEMES:
            raise ValueError(f"recipe: scheme {scheme!r:.60} is not known; known are {', '.join(SCHEMES)}")
    try:
        fitting(manifest.provenance, _Provenance)
    except ValueError as error:
        raise ValueError(f"provenance: {error}") from None
    _check_names(manifest.files)
    check_ports(manifest.model, manifest.graphs, manifest.runs, cuda_type(manifest.schemes))
    for name, limit in {
        TOKENIZER: TOKENIZER_BYTES,
        **{f"{graph}.onnx": GRAPH_BYTES for graph in manifest.graphs},
    }.items():
        if name not in manifest.files:
            raise ValueError(f"does not list {name}")
        if (size := manifest.files[name].size) > limit:
            raise ValueError(f"files: {name} has {size} bytes, and at most {limit} are read of it")
    return manifest


def _check_names(files: Mapping[str, FileEntry]) -> None:
    if len(files) > _MOST_FILES:
        raise ValueError(f"files: lists {len(files)}, and {_MOST_FILES} are the most")
    seen: set[str] = set()
    for name in files:
        if not _PLAIN.fullmatch(name) or ".." in name or name == MANIFEST:
            raise ValueError(f"files: {name!r:.200} is not a plain file name inside the artifact")
        if name.lower() in seen:  # where case does not tell names apart they would be one file
            raise ValueError(f"files: lists {name!r} in two spellings")
        seen.add(name.lower())


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write `folder/manifest.json`, whole and durable. The caller renames the folder into place.

    It holds a hash of its own content, by which `read_manifest` finds it changed.
    """
    raw = {"format": FORMAT, "format_version": FORMAT_VERSION, **_content(manifest)}
    raw["sha256"] = _sha256_of_json(raw)
    with writing(folder / MANIFEST) as file:
        file.write(json.dumps(raw, indent=1, ensure_ascii=False).encode() + b"\n")


def verify_files(folder: Path, manifest: Manifest) -> None:
    """Compare every file with the manifest: regular file, size, sha256; and look what files the graphs read.

    A link counts as the file it leads to, if that lies in the same folder or, in a hub's cache, in the same repository.
    A graph NAME.onnx, or NAME.SET.onnx, may have weights in NAME.onnx.data, within its size, and in no other file.
    A file is looked into once per change: what was verified is remembered with size, times and
    inode in the user's cache folder, so a start does not reread gigabytes. Raises ArtifactDamagedError, and
    ArtifactError for a file that may not be read.
    """
    memory = Memory.load()
    for name, entry in manifest.files.items():
        path = folder / name
        if os.path.islink(path) and not _stays_inside(path):
            raise ArtifactDamagedError(
                f"{path}: is a link to {os.path.realpath(path)}, outside of the artifact. Links may lead to files of "
                "its own folder, or of its repository in a hub's cache. Copy the artifact with the files (cp -L)."
            )
        try:
            stat = path.stat()
        except OSError:
            stat = None
        if stat is None or not S_ISREG(stat.st_mode):
            raise ArtifactDamagedError(f"{path}: is missing. Copy the whole artifact again, or export again.")
        if stat.st_size != entry.size:
            raise ArtifactDamagedError(
                f"{path}: {stat.st_size} bytes, the manifest says {entry.size}. Copy or export again."
            )
        graph = name.removesuffix(".onnx") if name.removesuffix(".onnx") in manifest.graphs else None
        data = manifest.files.get(data_name(graph)) if graph else None
        stamp = [entry.sha256, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]
        stamp += [_RULES, data.size if data else None] if graph else []
        key = os.path.realpath(path)
        if memory.knows_file(key, stamp):
            continue
        try:  # a graph is read once, so that what is looked at is what was hashed
            content = read_regular(path, entry.size) if graph else b""
            digest = hashlib.sha256(content).hexdigest() if graph else sha256_of(path)
        except OSError as error:
            raise ArtifactError(_unreadable(path, error)) from error
        if digest != entry.sha256:
            raise ArtifactDamagedError(
                f"{path}: its content has changed since the export (sha256 differs). Copy or export again."
            )
        if graph:
            try:
                _check_places(content, data_name(graph), data)
            except ValueError as error:
                raise ArtifactDamagedError(f"{path}: {error}. Export again.") from error
        memory.remember_file(key, stamp)
    memory.save()


def _check_places(graph: bytes, name: str, entry: FileEntry | None) -> None:
    """Raises ValueError for a tensor that lies elsewhere than in the data file, or beyond its end."""
    for tensor in external_tensors(graph):
        if tensor.location != name:
            raise ValueError(f"reads the file {tensor.location!r:.200}, and a graph may read {name} alone")
        if entry is None:
            raise ValueError(f"reads the file {name}, which the manifest does not list")
        if tensor.offset + tensor.length > entry.size:
            raise ValueError(
                f"the tensor {tensor.name!r:.100} ends at byte {tensor.offset + tensor.length} of {name}, which has "
                f"{entry.size}"
            )


def _stays_inside(link: Path) -> bool:
    """Whether a link ends in its own folder, or among the blobs of the hub cache's repository that the folder is of."""
    target, folder = Path(os.path.realpath(link)), Path(os.path.realpath(link.parent))
    repository = folder.parent.parent  # models--org--name/snapshots/commit
    is_cache = folder.parent.name == "snapshots" and repository.name.startswith("models--")
    return target.parent == folder or (is_cache and target.parent == repository / "blobs")


def _content(manifest: Manifest) -> dict[str, Any]:
    """The manifest as it stands in its file, but for format and hash."""
    known = manifest.known_answers
    return {
        "scheme": manifest.scheme,
        "recipe": manifest.recipe,
        "model": manifest.model.to_dict(),
        "graphs": {name: asdict(ports) for name, ports in manifest.graphs.items()},
        "runs": {which: dict(graphs) for which, graphs in manifest.runs.items()},
        "files": {n: {"size": e.size, "sha256": e.sha256} for n, e in sorted(manifest.files.items())},
        "provenance": manifest.provenance,
        "known_answers": None if known is None else asdict(known),
    }


def _sha256_of_json(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _unreadable(path: Path, error: OSError) -> str:
    return f"{path}: cannot be read: {error.strerror}. See to it that you may read the artifact's files."
