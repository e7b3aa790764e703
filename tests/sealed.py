"""A manifest as somebody else may have written it, with hashes that fit all the same. Not a test file."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any


def edit_manifest(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the raw manifest and write the hash that it has then."""
    path = folder / "manifest.json"
    raw = json.loads(path.read_text("utf-8"))
    raw.pop("sha256", None)
    change(raw)
    raw["sha256"] = hashlib.sha256(json.dumps(raw, sort_keys=True).encode()).hexdigest()
    path.write_text(json.dumps(raw), "utf-8")


def put_file(folder: Path, name: str, content: bytes) -> None:
    """Write a file of the artifact and list it as it is now."""
    (folder / name).write_bytes(content)
    entry = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    edit_manifest(folder, lambda raw: raw["files"].update({name: entry}))
