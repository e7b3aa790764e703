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
      inputs/         texts and images exactly as they were given, named by their hash

Logits and scores stand in the manifest as hexadecimal floats, which lose nothing.
"""

import hashlib
import io
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final, Literal, Protocol, cast

import numpy as np
from numpy.typing import NDArray

from m0kit.config import ModelConfig
from m0kit.errors import CheckpointError, InputError, OutputError
from m0kit.files import named_errors, occupied, replacing
from m0kit.trace import Trace
from m0kit_parity.cases import Case, Content

FORMAT: Final = "m0kit golden"
VERSION: Final = 1

_ARRAYS: Final = ("token_ids", "positions", "grid_thw", "hidden", "layers")
_LISTS: Final = ("patches", "image_embeds")
_ENDINGS: Final = {b"\x89PNG": ".png", b"\xff\xd8": ".jpg", b"GIF8": ".gif", b"RIFF": ".webp"}
_FILE_NAME: Final = re.compile(r"(inputs/)?[A-Za-z0-9_-][A-Za-z0-9_.-]*")


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
    layers: bool = False,
    progress: Callable[[str], None] = lambda _: None,
) -> None:
    """Trace every pair and write the folder aside, then rename it into place.

    Holds one case in memory at a time. A golden folder that is there already is replaced; anything else
    at that place is not. Raises OutputError, InputError for two cases of one name, CheckpointError when the
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
        (aside / "manifest.json").write_text(text, encoding="utf-8")


class Golden:
    """A recorded folder, its manifest read and its other files verified when they are read."""

    def __init__(self, folder: Path, manifest: Mapping[str, Any]) -> None:
        self.folder = folder
        self._manifest = manifest

    @classmethod
    def open(cls, folder: Path) -> "Golden":
        """Raises InputError for a missing, foreign or damaged folder, or another format version."""
        path = folder / "manifest.json"
        try:
            manifest = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise InputError(
                f"{folder}: no golden folder there; make one with: m0kit parity record CHECKPOINT -o {folder}"
            ) from error
        except (OSError, ValueError) as error:
            raise InputError(f"{path}: not a readable JSON file; record the golden folder again") from error
        if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
            raise InputError(f"{folder}: not a golden folder (its manifest.json has another format)")
        if manifest.get("version") != VERSION:
            raise InputError(
                f"{folder}: golden format version {manifest.get('version')!r}, this m0kit reads {VERSION}; "
                f"record it again: {manifest.get('command', 'm0kit parity record')}"
            )
        absent = {"command", "created", "provenance", "model", "layers", "cases", "files"} - set(manifest)
        if absent:
            raise InputError(f"{path}: no {', '.join(sorted(absent))}; record the golden folder again")
        return cls(folder, manifest)

    @property
    def command(self) -> str:
        """The command line that makes this folder again."""
        return str(self._manifest["command"])

    @property
    def created(self) -> str:
        return str(self._manifest["created"])

    @property
    def provenance(self) -> Mapping[str, Any]:
        return cast(Mapping[str, Any], self._manifest["provenance"])

    @property
    def layers(self) -> bool:
        """Whether it holds the hidden state after each decoder layer."""
        return bool(self._manifest["layers"])

    @property
    def case_names(self) -> tuple[str, ...]:
        return tuple(case["name"] for case in self._manifest["cases"])

    def require(self, model: ModelConfig, layers: bool = False) -> None:
        """Raises InputError, with the command to record again, unless this folder fits an artifact."""
        ours, theirs = _flat(self._manifest["model"]), _flat(model.to_dict())
        different = [
            f"{name} is {ours.get(name)!r} there and {theirs.get(name)!r} in the artifact"
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
        try:
            case = next(case for case in self._manifest["cases"] if case["name"] == name)
            with np.load(io.BytesIO(self._file(case["file"])), allow_pickle=False) as stored:
                arrays = {key: stored[key] for key in stored.files}
            return GoldenCase(name, case["why"], case["kind"], tuple(self._pairs(case, arrays)))
        except (KeyError, TypeError, ValueError) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(f"{self.folder}: case {name!r} is damaged; record it again: {self.command}") from error

    def _pairs(self, case: Mapping[str, Any], arrays: Mapping[str, NDArray[Any]]) -> Iterator[GoldenPair]:
        for g, group in enumerate(case["groups"]):
            query, query_drifted = self._input(group["query"])
            for d, entry in enumerate(group["documents"]):
                document, document_drifted = self._input(entry["input"])
                key = f"{g}.{d}"
                trace = Trace(
                    token_ids=arrays[f"{key}.token_ids"],
                    positions=arrays[f"{key}.positions"],
                    grid_thw=arrays[f"{key}.grid_thw"],
                    patches=_numbered(arrays, f"{key}.patches"),
                    image_embeds=_numbered(arrays, f"{key}.image_embeds"),
                    hidden=arrays[f"{key}.hidden"],
                    logit=float.fromhex(entry["logit"]),
                    score=float.fromhex(entry["score"]),
                    layers=arrays.get(f"{key}.layers"),
                )
                drifted = ("query",) * query_drifted + ("document",) * document_drifted
                yield GoldenPair(g, d, (query, document), drifted, trace)

    def _input(self, entry: Mapping[str, Any]) -> tuple[Content, bool]:
        if entry["form"] not in ("text", "file", "pillow"):
            raise ValueError(f"unknown form {entry['form']!r}")
        content = Content(cast(Literal["text", "file", "pillow"], entry["form"]), self._file(entry["file"]))
        return content, content.pixels_sha256() != entry["pixels_sha256"]

    def _file(self, name: str) -> bytes:
        """A file's bytes if they are what was recorded."""
        expected = self._manifest["files"].get(name)
        if expected is None or not _FILE_NAME.fullmatch(name):
            raise InputError(f"{self.folder}: its manifest does not know a file {name!r}; record it again")
        try:
            data = (self.folder / name).read_bytes()
        except OSError as error:
            raise InputError(f"{self.folder / name}: missing or unreadable; record it again: {self.command}") from error
        if hashlib.sha256(data).hexdigest() != expected["sha256"]:
            raise InputError(f"{self.folder / name}: changed since it was recorded; record it again: {self.command}")
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
        if json.loads((folder / "manifest.json").read_text(encoding="utf-8")).get("format") == FORMAT:
            return
    except (OSError, ValueError, AttributeError):
        pass
    raise OutputError(f"{folder}: something that is not a golden folder is there; choose another place")


def _numbered(arrays: Mapping[str, NDArray[Any]], key: str) -> tuple[NDArray[Any], ...]:
    count = sum(name.startswith(f"{key}.") for name in arrays)
    return tuple(arrays[f"{key}.{i}"] for i in range(count))


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Nested objects as dotted names, tuples as lists, so that JSON and dataclasses compare equal."""
    if not isinstance(tree, Mapping):
        return {prefix: list(tree) if isinstance(tree, tuple) else tree}
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        flat |= _flat(value, f"{prefix}.{name}" if prefix else name)
    return flat
