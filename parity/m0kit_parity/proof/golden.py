"""The golden folder: what PyTorch computed, kept so that an artifact can be checked without PyTorch.

Owns the folder's format, reading and writing. Knows neither PyTorch nor the runtime: whatever has a
`.trace(pair, layers)` can be recorded.

    record(Path("golden"), cases, reference, model=config, ...)
    Golden.open(Path("golden")).read("tiny")

    golden/
      manifest.json   format version; the command that makes it again; provenance (versions, hashes, seed);
                      the model's dimensions and image settings; cases with their inputs and scores;
                      size and sha256 of every other file
      <case>.npz      the arrays of all its pairs, named <group>.<document>.<stage>
      norm.npy        the gain of the final norm, for artifacts whose stream is in another basis
      inputs/         texts and images exactly as they were given, named by their hash

Logits and scores stand in the manifest as hexadecimal floats, which lose nothing.
"""

import hashlib
import io
import json
import math
import re
import struct
import tokenize
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Final, Literal, Protocol, TypedDict

import numpy as np
from msgspec import Meta
from numpy.typing import NDArray

from m0kit.config import ModelConfig
from m0kit.errors import CheckpointError, InputError, OutputError
from m0kit.files import named_errors, occupied, read_regular, replacing
from m0kit.schema import fitting, parse
from m0kit.trace import Trace
from m0kit_parity.proof.cases import Case, Content

FORMAT: Final = "m0kit golden"
VERSION: Final = 1

_NORM: Final = "norm.npy"
_ARRAYS: Final = ("token_ids", "positions", "grid_thw", "hidden", "layers")
_LISTS: Final = ("patches", "image_embeds")
_ENDINGS: Final = {b"\x89PNG": ".png", b"\xff\xd8": ".jpg", b"GIF8": ".gif", b"RIFF": ".webp"}
_FILE_NAME: Final = re.compile(r"(inputs/)?[\w-][\w.-]{0,255}")
_ARRAY_NAME: Final = re.compile(
    rf"\d{{1,9}}\.\d{{1,9}}\.(?:{'|'.join(_ARRAYS)}|(?:{'|'.join(_LISTS)})\.\d{{1,9}})\.npy"
)
# A pair takes some 500 bytes of it, so this is 100,000 pairs.
_MAX_MANIFEST_BYTES: Final = 64 << 20
# What the arrays of one pair may unpack to. Two images of 768 visual tokens and a full prompt are 39 MB in the
# published model; the file they are packed in says nothing, since white pages come to 1 : 120.
_PAIR_BYTES: Final = 128 << 20
# What numpy and zipfile raise on an archive that somebody made.
_BAD_ARCHIVE: Final = (
    *(ArithmeticError, EOFError, LookupError, MemoryError, OSError, RuntimeError, SyntaxError, TypeError, ValueError),
    *(struct.error, tokenize.TokenError, zipfile.BadZipFile, zlib.error),
)


class _File(TypedDict):
    bytes: Annotated[int, Meta(ge=0)]
    sha256: str


class _Input(TypedDict):
    form: Literal["text", "file", "pillow"]
    file: str
    pixels_sha256: str | None


class _Document(TypedDict):
    input: _Input
    logit: str
    score: str


class _Group(TypedDict):
    query: _Input
    documents: Annotated[list[_Document], Meta(min_length=1)]


class _Case(TypedDict):
    name: str
    why: str
    kind: str
    file: str
    groups: Annotated[list[_Group], Meta(min_length=1)]


class Manifest(TypedDict):
    """The form of manifest.json."""

    command: str
    created: str
    provenance: dict[str, Any]  # what is used of it has its form in `origin`
    model: dict[str, Any]
    layers: bool
    cases: list[_Case]
    files: dict[str, _File]


class Tracer(Protocol):
    """Either side: `Reference` and `Reranker`."""

    def trace(self, pair: tuple[Any, Any], layers: bool = False) -> Trace:
        """Every stage of one (query, document)."""


@dataclass(frozen=True, slots=True)
class GoldenPair:
    """A query and one of its documents with what the reference made of them."""

    group: int
    document: int
    inputs: tuple[Content, Content]  # query, document
    drifted: tuple[str, ...]  # which of them Pillow decodes to other pixels here than when recorded
    trace: Trace


@dataclass(frozen=True, slots=True)
class GoldenCase:
    """One recorded case, in memory."""

    name: str
    why: str
    kind: str
    pairs: tuple[GoldenPair, ...]


def record(
    folder: Path,
    cases: Sequence[Case],
    tracer: Tracer,
    *,
    model: ModelConfig,
    command: str,
    provenance: Mapping[str, Any],
    norm: NDArray[np.float32] | None = None,
    layers: bool = False,
    progress: Callable[[str], None] = lambda _: None,
) -> None:
    """Trace every pair and write the folder aside, then rename it into place.

    Holds one case in memory at a time. A golden folder that is there already is replaced; anything else
    at that place is not. `norm` is the gain of the final norm (D,); without it artifacts with `rotate` in their recipe
    cannot be checked. Raises OutputError, InputError for two cases of one name, CheckpointError when the
    reference itself gives a value that is not finite, and whatever `tracer` raises.
    """
    names = [case.name for case in cases]
    if len(set(names)) != len(names) or not names:
        raise InputError(f"cases to record: {', '.join(names) or 'none'}; give each name once, and at least one")
    with replacing(folder, overwrite=True) as aside, named_errors(folder):
        require_free(folder)
        (aside / "inputs").mkdir()
        files: dict[str, dict[str, Any]] = {}
        described = []
        for number, case in enumerate(cases, 1):
            progress(f"recording {case.name} ({number} of {len(cases)})")
            described.append(_record_case(aside, files, case, tracer, layers))
        if norm is not None:
            stream = io.BytesIO()
            np.save(stream, norm, allow_pickle=False)
            _write(aside, files, _NORM, stream.getvalue())
        manifest = {
            "format": FORMAT,
            "version": VERSION,
            "command": command,
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "provenance": dict(provenance),
            "model": model.to_dict(),
            "layers": layers,
            "cases": described,
            "files": files,
        }
        text = json.dumps(manifest, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
        (aside / "manifest.json").write_text(text, "utf-8", "replace")  # names of files need not be Unicode


class Golden:
    """A recorded folder, its manifest read and its other files verified when they are read."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.folder = folder
        self._manifest = manifest

    @classmethod
    def open(cls, folder: Path) -> "Golden":
        """Raises InputError for a missing, foreign or damaged folder, or another format version."""
        path = folder / "manifest.json"
        try:
            manifest = parse(read_regular(path, _MAX_MANIFEST_BYTES))
        except FileNotFoundError as error:
            raise InputError(
                f"{folder}: no golden folder there; make one with: m0kit parity record CHECKPOINT -o {folder}"
            ) from error
        except OSError as error:
            raise InputError(f"{path}: {error.strerror or 'cannot be read'}; record the golden folder again") from error
        except ValueError as error:
            raise InputError(f"{path}: not a readable JSON file ({error}); record the golden folder again") from error
        if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
            raise InputError(f"{folder}: not a golden folder (its manifest.json has another format)")
        if manifest.get("version") != VERSION:
            raise InputError(
                f"{folder}: golden format version {manifest.get('version')!r:.40}, this m0kit reads {VERSION}; "
                f"record it again: {manifest.get('command', 'm0kit parity record')!s:.400}"
            )
        absent = {"command", "created", "provenance", "model", "layers", "cases", "files"} - set(manifest)
        if absent:
            raise InputError(f"{path}: no {', '.join(sorted(absent))}; record the golden folder again")
        try:
            checked = fitting(manifest, Manifest)
        except ValueError as error:
            raise InputError(f"{path}: {error}; record the golden folder again") from error
        names = [case["name"] for case in checked["cases"]]
        if len(set(names)) < len(names):
            raise InputError(f"{path}: two of its cases have one name; record the golden folder again")
        return cls(folder, checked)

    @property
    def command(self) -> str:
        """The command line that makes this folder again."""
        return self._manifest["command"]

    @property
    def created(self) -> str:
        return self._manifest["created"]

    @property
    def provenance(self) -> Mapping[str, Any]:
        return self._manifest["provenance"]

    @property
    def layers(self) -> bool:
        """Whether it holds the hidden state after each decoder layer."""
        return self._manifest["layers"]

    @property
    def case_names(self) -> tuple[str, ...]:
        return tuple(case["name"] for case in self._manifest["cases"])

    def norm(self) -> NDArray[np.float32]:
        """The gain of the final norm (D,). Raises InputError for a folder that was recorded without."""
        if _NORM not in self._manifest["files"]:
            raise InputError(
                f"{self.folder}: holds no gain of the final norm, which an artifact in another basis (rotate in its "
                f"recipe) is compared with; record it again: {self.command}"
            )
        try:
            gain = _array(self._file(_NORM))
        except ValueError as error:
            raise InputError(f"{self.folder}: {_NORM} is damaged ({error}); record it again: {self.command}") from error
        if gain.shape != (_flat(self._manifest["model"]).get("decoder.hidden_size"),) or gain.dtype != np.float32:
            raise InputError(f"{self.folder}: {_NORM} is of another model; record it again: {self.command}")
        return gain

    def require(self, model: ModelConfig, layers: bool = False) -> None:
        """Raises InputError, with the command to record again, unless this folder fits an artifact."""
        ours, theirs = _flat(self._manifest["model"]), _flat(model.to_dict())
        different = [
            f"{name} is {ours.get(name)!r:.60} there and {theirs.get(name)!r:.60} in the artifact"
            for name in sorted({*ours, *theirs})
            if ours.get(name) != theirs.get(name)
        ]
        if different:
            shown = "; ".join(different[:3]) + (f"; and {len(different) - 3} more" if len(different) > 3 else "")
            raise InputError(
                f"{self.folder} was recorded from another model: {shown}. Check an artifact of that model, "
                f"or record again from this artifact's checkpoint; this folder was made by: {self.command}"
            )
        if layers and not self.layers:
            raise InputError(
                f"{self.folder} holds no hidden states per layer; record it again: {self.command} --layers"
            )

    def require_cases(self, names: Sequence[str]) -> None:
        """Raises InputError for the first name that no case has."""
        for name in names:
            if name not in self.case_names:
                raise InputError(f"{self.folder}: no case {name!r}; it holds {', '.join(self.case_names)}")

    def read(self, name: str) -> GoldenCase:
        """One case, every file's hash checked. Raises InputError for a name or file that is not there."""
        self.require_cases([name])
        case = next(case for case in self._manifest["cases"] if case["name"] == name)
        try:
            arrays = _unpacked(self._file(case["file"]), sum(len(group["documents"]) for group in case["groups"]))
            pairs = tuple(self._pairs(case, arrays))
            if arrays:
                raise ValueError(f"an array called {next(iter(arrays))} is of no pair")  # noqa: TRY301
            return GoldenCase(name, case["why"], case["kind"], pairs)
        except InputError:
            raise
        except KeyError as error:
            reason = f"it lacks {error}"
        except (OverflowError, ValueError) as error:
            reason = str(error)
        raise InputError(f"{self.folder}: case {name!r} is damaged ({reason:.200}); record it again: {self.command}")

    def _pairs(self, case: _Case, arrays: dict[str, NDArray[Any]]) -> Iterator[GoldenPair]:
        """The pairs of a case, which take their arrays out of `arrays`."""
        for g, group in enumerate(case["groups"]):
            query, query_drifted = self._input(group["query"])
            for d, entry in enumerate(group["documents"]):
                document, document_drifted = self._input(entry["input"])
                key = f"{g}.{d}"
                trace = Trace(
                    token_ids=arrays.pop(f"{key}.token_ids"),
                    positions=arrays.pop(f"{key}.positions"),
                    grid_thw=arrays.pop(f"{key}.grid_thw"),
                    patches=_numbered(arrays, f"{key}.patches"),
                    image_embeds=_numbered(arrays, f"{key}.image_embeds"),
                    hidden=arrays.pop(f"{key}.hidden"),
                    logit=_finite(entry["logit"]),
                    score=_finite(entry["score"]),
                    layers=arrays.pop(f"{key}.layers", None),
                )
                drifted = ("query",) * query_drifted + ("document",) * document_drifted
                yield GoldenPair(g, d, (query, document), drifted, trace)

    def _input(self, entry: _Input) -> tuple[Content, bool]:
        content = Content(entry["form"], self._file(entry["file"]))
        if content.form == "text":
            content.data.decode()  # or ValueError
        return content, content.pixels_sha256() != entry["pixels_sha256"]

    def _file(self, name: str) -> bytes:
        """A file's bytes if they are what was recorded."""
        expected = self._manifest["files"].get(name)
        if expected is None or not _FILE_NAME.fullmatch(name):
            raise InputError(f"{self.folder}: its manifest does not know a file {name!r:.200}; record it again")
        path, again = self.folder / name, f"record it again: {self.command}"
        try:
            data = read_regular(path, expected["bytes"])
        except OSError as error:
            reason = error.strerror or type(error).__name__
            raise InputError(f"{path}: missing or unreadable ({reason}); {again}") from error
        if hashlib.sha256(data).hexdigest() != expected["sha256"]:
            raise InputError(f"{path}: changed since it was recorded; {again}")
        return data


def _record_case(
    aside: Path, files: dict[str, dict[str, Any]], case: Case, tracer: Tracer, layers: bool
) -> dict[str, Any]:
    arrays: dict[str, NDArray[Any]] = {}
    groups = []
    for g, group in enumerate(case.groups):
        documents = []
        for d, document in enumerate(group.documents):
            trace = tracer.trace((group.query.value(), document.value()), layers=layers)
            where = f"case {case.name}, query {g}, document {d}"
            arrays.update(_arrays(f"{g}.{d}", trace, where))
            documents.append(
                {
                    "input": _write_input(aside, files, document),
                    "logit": float(trace.logit).hex(),
                    "score": float(trace.score).hex(),
                }
            )
        groups.append({"query": _write_input(aside, files, group.query), "documents": documents})
    buffer = io.BytesIO()
    np.savez_compressed(buffer, allow_pickle=False, **arrays)
    name = f"{case.name}.npz"
    _write(aside, files, name, buffer.getvalue())
    return {"name": case.name, "why": case.why, "kind": case.kind, "file": name, "groups": groups}


def _arrays(key: str, trace: Trace, where: str) -> dict[str, NDArray[Any]]:
    arrays = {f"{key}.{name}": getattr(trace, name) for name in _ARRAYS if getattr(trace, name) is not None}
    for name in _LISTS:
        arrays |= {f"{key}.{name}.{i}": tensor for i, tensor in enumerate(getattr(trace, name))}
    values = (*arrays.items(), (f"{key}.logit", trace.logit), (f"{key}.score", trace.score))
    for name, value in values:
        if not np.isfinite(value).all():
            stage = name.removeprefix(f"{key}.")
            raise CheckpointError(
                f"{where}: the reference itself gives a {stage} that is not finite; this checkpoint "
                "cannot be a reference in this precision"
            )
    return arrays


def _write_input(aside: Path, files: dict[str, dict[str, Any]], content: Content) -> dict[str, Any]:
    """Texts and images are shared between pairs by their hash."""
    ending = ".txt"
    if content.form != "text":
        ending = next((e for magic, e in _ENDINGS.items() if content.data.startswith(magic)), ".image")
    name = f"inputs/{content.sha256[:16]}{ending}"
    if name not in files:
        _write(aside, files, name, content.data)
    return {"form": content.form, "file": name, "pixels_sha256": content.pixels_sha256()}


def _write(aside: Path, files: dict[str, dict[str, Any]], name: str, data: bytes) -> None:
    (aside / name).write_bytes(data)
    files[name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def require_free(folder: Path) -> None:
    """A golden folder or an empty one may be replaced; anything else there raises OutputError."""
    if not occupied(folder):
        return
    try:
        manifest = parse(read_regular(folder / "manifest.json", _MAX_MANIFEST_BYTES))
    except (OSError, ValueError):
        manifest = None
    if isinstance(manifest, dict) and manifest.get("format") == FORMAT:
        return
    raise OutputError(f"{folder}: something that is not a golden folder is there; choose another place")


def _unpacked(data: bytes, pairs: int) -> dict[str, NDArray[Any]]:
    """The arrays of a case's file by their names, together no larger than so many pairs have. Raises ValueError."""
    arrays: dict[str, NDArray[Any]] = {}
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            members = archive.infolist()
            _check_members(members, pairs)
            for member in members:
                with archive.open(member) as packed:  # ends after as many bytes as the directory says
                    arrays[member.filename.removesuffix(".npy")] = _array(packed.read())
    except _BAD_ARCHIVE as error:
        raise ValueError(str(error) if type(error) is ValueError else f"its arrays: {type(error).__name__}") from None
    return arrays


def _check_members(members: Sequence[zipfile.ZipInfo], pairs: int) -> None:
    """What an archive's directory says of its members, before one of them is unpacked. Raises ValueError."""
    names = [member.filename for member in members]
    if odd := next((name for name in names if not _ARRAY_NAME.fullmatch(name)), None):
        raise ValueError(f"an array is called {odd!r:.60}")
    if len(set(names)) < len(names):
        raise ValueError("two arrays have one name")
    if any(member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED) for member in members):
        raise ValueError("an array is packed otherwise than by deflate")
    total = sum(member.file_size for member in members)
    if total > pairs * _PAIR_BYTES:
        raise ValueError(f"it would unpack to {total} bytes, of which {pairs} pairs have {pairs * _PAIR_BYTES} at most")


def _array(data: bytes) -> NDArray[Any]:
    """An array from a file of numpy's format, its claims held against its length. Raises ValueError."""
    stream = io.BytesIO(data)
    try:
        version = np.lib.format.read_magic(stream)
        shape, _, dtype = np.lib.format.read_array_header_1_0(stream)
    except _BAD_ARCHIVE:
        raise ValueError("an array is not in numpy's format") from None
    if version != (1, 0):  # as it writes all that have no names of fields
        raise ValueError("an array is of another version of numpy's format")
    if dtype.kind not in "if":
        raise ValueError(f"an array holds {dtype}, which is neither float nor whole number")
    if min(shape, default=0) < 0 or math.prod(shape) * dtype.itemsize != len(data) - stream.tell():
        raise ValueError(f"an array of shape {shape!r:.60} is not as long as that")
    stream.seek(0)
    array: NDArray[Any] = np.lib.format.read_array(stream, allow_pickle=False)
    if not np.isfinite(array).all():
        raise ValueError("an array holds a value that is not finite")
    return array


def _finite(text: str) -> float:
    value = float.fromhex(text)
    if not math.isfinite(value):
        raise ValueError(f"{text:.40} is no score")
    return value


def _numbered(arrays: dict[str, NDArray[Any]], key: str) -> tuple[NDArray[Any], ...]:
    found: list[NDArray[Any]] = []
    while (array := arrays.pop(f"{key}.{len(found)}", None)) is not None:
        found.append(array)
    return tuple(found)


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Nested objects as dotted names, tuples as lists, so that JSON and dataclasses compare equal."""
    if not isinstance(tree, Mapping):
        return {prefix: list(tree) if isinstance(tree, tuple) else tree}
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        flat |= _flat(value, f"{prefix}.{name}" if prefix else name)
    return flat
