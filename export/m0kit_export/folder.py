"""The folder of a checkpoint: one that is here, or a copy from the hub.

Cheap, so that it can come before PyTorch.

    find_folder("jinaai/jina-reranker-m0")

Owns nothing but the message when there is none.
"""

import os
from pathlib import Path

from m0kit.artifact.hub import resolve
from m0kit.errors import CheckpointError


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
