"""The artifact: a folder with graphs, tokenizer and one manifest. Owns its format, reading and checking.

Who writes one (`m0kit_export`) fills a `Manifest` and calls `write_manifest` last, in a folder not yet in
its final place. Who reads one calls `read_manifest`, then `verify_files` before any engine opens a file.

    manifest = read_manifest(Path("m0-fp32"))
    verify_files(Path("m0-fp32"), manifest)
"""

import hashlib
import json
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final, Literal, get_args

from m0kit.config import ModelConfig
from m0kit.errors import (
    ArtifactDamagedError,
    ArtifactError,
    ArtifactNotFoundError,
    ArtifactVersionError,
)
from m0kit.files import sync
from m0kit.precision import SCHEMES
from m0kit.verified import Memory

FORMAT = "m0kit-artifact"
FORMAT_VERSION = 1  # raised when an older m0kit could no longer read the folder rightly
MANIFEST = "manifest.json"
TOKENIZER = "tokenizer.json"
GRAPHS = ("vision", "decoder", "head")
Kept = Literal["fp32", "fp16", "int8"]  # how the decoder's keys and values of a document may be kept
KV: Final[tuple[Kept, ...]] = get_args(Kept)
_CHUNK = 1 << 20


@dataclass(frozen=True, slots=True)
class FileEntry:
    """One file of the folder."""

    size: int  # bytes
    sha256: str


@dataclass(frozen=True, slots=True)
class KnownAnswer:
    """A tiny pair and its logit, which the exporter computed without the engine that scores."""

    query: str
    document: str | Mapping[str, str]  # a text, or {"image": a data URI}
    logit: float

    @property
    def is_image(self) -> bool:
        return not isinstance(self.document, str)


@dataclass(frozen=True, slots=True)
class KnownAnswers:
    """What an engine must come out at before it is trusted."""

    pairs: tuple[KnownAnswer, ...]
    tolerance: Mapping[str, float]  # how far a right logit may be off, by the form in which documents are kept
    why: str  # the reason of the tolerance


@dataclass(frozen=True, slots=True)
class Manifest:
    """All the runtime needs to know of a model, and where it came from."""

    model: ModelConfig
    scheme: str  # the precision's name: "fp32", "fp16", "bf16", "int8", "int4", "nf4", or a recipe's own
    graphs: Mapping[str, Any]  # name → {"inputs": [{name, dtype, shape}], "outputs": […]}
    files: Mapping[str, FileEntry]
    provenance: Mapping[str, Any]  # base, adapters with hashes, licence, tool versions
    recipe: Mapping[str, Any]  # which scheme stores which matrix: {"precision", "device", "equalize", "weights": […]}
    known_answers: KnownAnswers | None = None  # None: exported before there were any

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

        Where the weights came from is not in it: the same weights from elsewhere are the same.
        """
        scoring = {name: value for name, value in _content(self).items() if name != "provenance"}
        return _sha256_of_json(scoring)


def decoder_name(kv: str) -> str:
    """The decoder's graph for pasts kept so: all of them read the data file of "decoder"."""
    return "decoder" if kv == "fp32" else f"decoder.kv-{kv}"


def read_manifest(folder: Path) -> Manifest:
    """Read and check `folder/manifest.json`. Hashes are not checked here.

    Raises ArtifactNotFoundError, ArtifactVersionError, ArtifactDamagedError; ArtifactError for another kind of
    file or one that may not be read.
    """
    path = folder / MANIFEST
    if not folder.is_dir():
        raise ArtifactNotFoundError(f"{folder}: no such folder. Give the folder that `m0kit export` wrote.")
    try:
        raw = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise ArtifactNotFoundError(
            f"{folder}: there is no {MANIFEST}, so this is not a finished artifact. "
            "Give the folder that `m0kit export` wrote, or export again."
        ) from None
    except OSError as error:
        raise ArtifactError(_unreadable(path, error)) from error
    except (ValueError, RecursionError) as error:
        raise ArtifactDamagedError(
            f"{path}: cannot be read as JSON ({type(error).__name__}). Copy the whole artifact again, or export again."
        ) from error
    if not isinstance(raw, dict) or raw.get("format") != FORMAT:
        raise ArtifactError(f'{path}: not an m0kit manifest (expected "format": "{FORMAT}").')
    version = raw.get("format_version")
    if not isinstance(version, int) or version < 1:
        raise ArtifactDamagedError(f"{path}: format_version is {version!r}, expected a whole number from 1.")
    if version > FORMAT_VERSION:
        raise ArtifactVersionError(
            f"{path}: format version {version}; this m0kit reads up to {FORMAT_VERSION}. Update m0kit."
        )
    told = raw.pop("sha256", None)
    if told != _sha256_of_json(raw) and (told is not None or "known_answers" in raw):  # the first ones had neither
        raise ArtifactDamagedError(
            f"{path}: has changed since the export (its own sha256 differs). Copy the artifact again, or export again; "
            "limits can be changed when it is loaded."
        )
    try:
        files = {str(name): FileEntry(int(entry["size"]), str(entry["sha256"])) for name, entry in raw["files"].items()}
        manifest = Manifest(
            ModelConfig.from_dict(raw["model"]),
            str(raw["scheme"]),
            _object(raw, "graphs"),
            files,
            _object(raw, "provenance"),
            _recipe(raw),
            _known_answers(raw),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ArtifactDamagedError(f"{path}: {type(error).__name__}: {error}. Export again.") from error
    needed = {TOKENIZER, *(f"{name}.onnx" for name in GRAPHS)}
    if missing := sorted(needed - set(files)):
        raise ArtifactDamagedError(f"{path}: does not list {', '.join(missing)}. Export again.")
    for name in files:
        if name != os.path.basename(name) or name in ("", ".", "..", MANIFEST) or "\\" in name or ":" in name:
            raise ArtifactDamagedError(f"{path}: {name!r} is not a plain file name inside the artifact.")
    return manifest


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write `folder/manifest.json` and flush it to disk. The caller renames the folder into place.

    It holds a hash of its own content, by which `read_manifest` finds it changed.
    """
    raw = {"format": FORMAT, "format_version": FORMAT_VERSION, **_content(manifest)}
    raw["sha256"] = _sha256_of_json(raw)
    with open(folder / MANIFEST, "w", encoding="utf-8") as file:
        json.dump(raw, file, indent=1, ensure_ascii=False)
        file.write("\n")
        file.flush()
        sync(file.fileno())


def sha256_of(path: Path, progress: Callable[[int], object] = lambda _: None) -> str:
    """Hash a file in pieces; `progress` is told the bytes of each."""
    digest = hashlib.sha256()
    with open(path, "rb", buffering=0) as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
            progress(len(chunk))
    return digest.hexdigest()


def verify_files(folder: Path, manifest: Manifest) -> None:
    """Compare every file with the manifest: plain file, size, sha256.

    A link counts as the file it leads to, if that lies in the same folder or, in a hub's cache, in the same repository.
    A hash is computed once per change of a file: what was verified is remembered with size, times and
    inode in the user's cache folder, so a start does not reread gigabytes. Raises ArtifactDamagedError, and
    ArtifactError for a file that may not be read.
    """
    memory = Memory.load()
    for name, entry in manifest.files.items():
        path = folder / name
        if path.is_symlink() and not _stays_inside(path):
            raise ArtifactDamagedError(
                f"{path}: is a link to {os.path.realpath(path)}, outside of the artifact. Links may lead to files of "
                "its own folder, or of its repository in a hub's cache. Copy the artifact with the files (cp -L)."
            )
        if not path.is_file():
            raise ArtifactDamagedError(f"{path}: is missing. Copy the whole artifact again, or export again.")
        stat = path.stat()
        if stat.st_size != entry.size:
            raise ArtifactDamagedError(
                f"{path}: {stat.st_size} bytes, the manifest says {entry.size}. Copy or export again."
            )
        stamp = [entry.sha256, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]
        key = str(path.resolve())
        if memory.knows_file(key, stamp):
            continue
        try:
            digest = sha256_of(path)
        except OSError as error:
            raise ArtifactError(_unreadable(path, error)) from error
        if digest != entry.sha256:
            raise ArtifactDamagedError(
                f"{path}: its content has changed since the export (sha256 differs). Copy or export again."
            )
        memory.remember_file(key, stamp)
    memory.save()


def _stays_inside(link: Path) -> bool:
    """Whether a link ends in its own folder, or among the blobs of the hub cache's repository that the folder is of."""
    target, folder = Path(os.path.realpath(link)), Path(os.path.realpath(link.parent))
    repository = folder.parent.parent  # models--org--name/snapshots/commit
    is_cache = folder.parent.name == "snapshots" and repository.name.startswith("models--")
    return target.parent == folder or (is_cache and target.parent == repository / "blobs")


def _content(manifest: Manifest) -> dict[str, Any]:
    """The manifest as it stands in its file, but for format and hash."""
    known = manifest.known_answers
    content = {
        "scheme": manifest.scheme,
        "recipe": manifest.recipe,
        "model": manifest.model.to_dict(),
        "graphs": manifest.graphs,
        "files": {n: {"size": e.size, "sha256": e.sha256} for n, e in sorted(manifest.files.items())},
        "provenance": manifest.provenance,
    }
    return content | ({} if known is None else {"known_answers": asdict(known)})


def _sha256_of_json(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _known_answers(raw: Mapping[str, Any]) -> KnownAnswers | None:
    if "known_answers" not in raw:
        return None
    known = _object(raw, "known_answers")
    pairs = tuple(KnownAnswer(str(p["query"]), p["document"], float(p["logit"])) for p in known["pairs"])
    tolerance: dict[str, float] = {kv: float(known["tolerance"][kv]) for kv in KV}
    if not all(map(math.isfinite, [*tolerance.values(), *(pair.logit for pair in pairs)])):
        raise ValueError("known_answers: a number is not finite")
    return KnownAnswers(pairs, tolerance, str(known["why"]))


def _object(raw: Mapping[str, Any], field: str) -> dict[str, Any]:
    if not isinstance(raw[field], dict):
        raise ValueError(f"{field}: expected an object, got {type(raw[field]).__name__}")
    return dict(raw[field])


def _recipe(raw: Mapping[str, Any]) -> dict[str, Any]:
    if "recipe" in raw:
        recipe = _object(raw, "recipe")
    else:  # before there were recipes one scheme stored everything
        recipe = {"precision": raw["scheme"], "weights": [{"match": "*", "scheme": raw["scheme"]}]}
    if not isinstance(recipe["weights"], list) or not recipe["weights"]:
        raise ValueError("recipe: has no weights")
    for rule in recipe["weights"]:
        if rule["scheme"] not in SCHEMES:
            raise ValueError(f"recipe: scheme {rule['scheme']!r} is not known; known are {', '.join(SCHEMES)}")
    return recipe


def _unreadable(path: Path, error: OSError) -> str:
    return f"{path}: cannot be read: {os.strerror(error.errno or 0)}. See to it that you may read the artifact's files."
