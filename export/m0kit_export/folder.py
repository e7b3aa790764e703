"""The folder of a checkpoint or an adapter: one that is here, or a copy from the hub; its JSON, hashes and licence.

Cheap, so that it can come before PyTorch. Owns how such files are read, not what stands in them.

    folder = find_folder("jinaai/jina-reranker-m0")
    read_json_object(folder / "config.json")["model_type"]
"""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from m0kit.artifact.hub import resolve
from m0kit.errors import CheckpointError
from m0kit.files import open_regular, read_regular, sha256_of
from m0kit.schema import parse

# Each ten times, or more, what the published model, or a fine-tune of it, has.
_MAX_JSON_BYTES: Final = 16 << 20  # an index of the published model: 100 kB
_MAX_TEXT: Final = 4 << 20  # letters of a README: 1 MB with the results of benchmarks in its front matter
_MAX_LICENCE: Final = 64  # letters of a licence's id: 40
_LICENCE = re.compile(rf"[ \t]*['\"]?([\w.+-]{{1,{_MAX_LICENCE}}})(?![\w.+-])")
_LICENCE_TITLES = {
    "attribution-noncommercial 4.0": "cc-by-nc-4.0",
    "apache license version 2.0": "apache-2.0",
    "mit license": "mit",
}


def find_folder(source: str | Path, revision: str | None = None, cache_dir: Path | None = None) -> Path:
    """What a checkpoint's name stands for; of a hub id, what is needed is fetched. Raises CheckpointError."""
    path = resolve(source, revision, what="checkpoint", cache_dir=cache_dir)
    if not os.path.exists(path):  # unlike Path.exists it also takes a name too long for the file system
        raise CheckpointError(
            f"there is no folder {str(source)!r:.200}, and it is not a hub id of the form 'organisation/name'"
        )
    if not os.path.isdir(path):
        raise CheckpointError(f"{path.name} is a file. Give the folder that holds it")
    if not (path / "config.json").exists():
        raise CheckpointError(f"{path.name} has no config.json. Give the folder that holds it")
    return path


def read_json_object(path: Path, error: type[CheckpointError] = CheckpointError) -> dict[str, Any]:
    """A JSON object from a file. Raises `error` that names the file."""
    where = f"{path.name} in {path.parent.name}"
    try:
        raw = parse(read_regular(path, _MAX_JSON_BYTES))
    except FileNotFoundError:
        raise error(f"{path.parent.name} has no {path.name}. Give the folder that holds it") from None
    except OSError as problem:
        raise error(f"{where}: {problem.strerror or type(problem).__name__}. Fetch it again") from None
    except ValueError as problem:
        raise error(f"{where} is not readable JSON: {problem}. Fetch it again") from None
    if not isinstance(raw, dict):
        raise error(f"{where} holds {type(raw).__name__}, not an object")
    return raw


def file_sha256(path: Path) -> str:
    """sha256 of a file as hex, read in pieces. Raises CheckpointError."""
    try:
        return sha256_of(path)
    except OSError:
        raise CheckpointError(f"cannot read {path.name} in {path.parent.name}") from None


def find_licence(folder: Path, raw: Mapping[str, Any]) -> str | None:
    """Licence id of a model folder: README front matter, then LICENSE, then the config's own field."""
    stated = _front_matter(_read_text(folder / "README.md"))
    licence = stated.get("license")
    if licence == "other":  # the hub's word for a licence outside its list
        licence = stated.get("license_name")
    if licence is not None:
        return licence
    for path in sorted(folder.glob("LICENSE*")):
        text = " ".join(_read_text(path)[: 1 << 16].split()).lower()  # a title stands at the top
        for title, name in _LICENCE_TITLES.items():
            if title in text:
                return name
    named = raw.get("license")
    return named if isinstance(named, str) and len(named) <= _MAX_LICENCE else None


def _front_matter(readme: str) -> dict[str, str]:
    """The licence fields of what stands between two lines of dashes at the top of a model card."""
    first, *lines = readme.splitlines() or [""]
    end = next((number for number, line in enumerate(lines) if line.startswith("---")), None)
    if first.rstrip() != "---" or end is None:
        return {}
    stated = {}
    for line in lines[:end]:
        name, colon, value = line.partition(":")
        if colon and name in ("license", "license_name") and (match := _LICENCE.match(value)):
            stated[name] = match[1]
    return stated


def _read_text(path: Path) -> str:
    """The beginning of a text, which holds the front matter or the title of a licence."""
    try:
        with open_regular(path) as file:
            return file.read(_MAX_TEXT).decode("utf-8-sig", errors="replace")
    except OSError:
        return ""
