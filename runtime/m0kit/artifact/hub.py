"""From the name of an artifact, adapter or checkpoint to a folder: one that is here, or a copy from the hub.

Owns which names are hub ids, which files of a repository are fetched, and what is said when that fails. Downloading,
the cache, the token and HF_HUB_OFFLINE, HF_HOME, HF_ENDPOINT… are huggingface_hub's.

    resolve("./m0-fp32", what="artifact")                       # the folder
    resolve("jinaai/jina-reranker-m0@main", what="checkpoint")  # its snapshot in the hub's cache
"""

import contextlib
import os
import re
from pathlib import Path
from typing import Any, Final, Literal

from m0kit.artifact.manifest import MANIFEST, read_manifest
from m0kit.artifact.signature import SIGNATURE
from m0kit.errors import AdapterError, ArtifactNotFoundError, CheckpointError, M0kitError

What = Literal["artifact", "adapter", "checkpoint"]

_ID: Final = re.compile(r"([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:@([\w.][\w./-]*))?", re.ASCII)
_ERRORS: Final[dict[str, type[M0kitError]]] = {
    "artifact": ArtifactNotFoundError,
    "adapter": AdapterError,
    "checkpoint": CheckpointError,
}
# An artifact's files are those that its manifest lists, and its signature where it has one.
_FILES: Final[dict[str, tuple[str, ...]]] = {
    "adapter": ("adapter_model.safetensors", "*.json", "README.md", "LICENSE*"),
    "checkpoint": ("*.safetensors", "*.json", "merges.txt", "README.md", "LICENSE*"),
}
# Other people's exports and a trainer's states live in sub-folders.
_LEFT_OUT: Final = ("*/*",)


def is_id(name: str | os.PathLike[str]) -> bool:
    """Whether the name is "organisation/name" or "organisation/name@revision", and nothing here is called so.

    A `Path` is always a path.
    """
    return isinstance(name, str) and _ID.fullmatch(name) is not None and not os.path.lexists(name)


def resolve(
    name: str | os.PathLike[str], revision: str | None = None, *, what: What, cache_dir: Path | None = None
) -> Path:
    """The folder that a name stands for. What exists here wins; "organisation/name" is then looked for on the hub.

    Anything else comes back as it is, whether it exists or not, and never leaves this machine. `revision` is a branch,
    tag or commit of a hub id, which can also be given in the name, as "organisation/name@v2".

    Raises ArtifactNotFoundError, AdapterError or CheckpointError, as `what` says, for what cannot be fetched, and for a
    revision of a folder; ArtifactError where the manifest on the hub cannot be used.
    """
    if not is_id(name):
        if revision is not None:
            raise _ERRORS[what](
                f"revision {revision!r} was given with {os.fspath(name)!r}, which is no hub id (organisation/name) "
                "or exists here as a folder. Leave the revision out, or give a hub id."
            )
        return Path(name)
    match = _ID.fullmatch(str(name))
    assert match is not None
    if revision is not None and match[2] is not None:
        raise _ERRORS[what](
            f"{what} {name!r} names a revision, and {revision!r} is given too. Leave one of the two out."
        )
    name, revision = match[1], revision or match[2]
    try:
        return _fetched(name, revision, what, cache_dir)
    except M0kitError:
        raise
    except Exception as error:  # offline, timeouts, a full disk, a proxy's login page: no base class covers them
        raise _ERRORS[what](_reason(error, name, revision, what)) from error


def _fetched(name: str, revision: str | None, what: What, cache_dir: Path | None) -> Path:
    import huggingface_hub as hub  # a fifth of a second that folders do not need

    if what != "artifact":
        folder = hub.snapshot_download(
            name,
            revision=revision,
            cache_dir=cache_dir,
            allow_patterns=list(_FILES[what]),
            ignore_patterns=list(_LEFT_OUT),
        )
        return Path(folder)
    folder = Path(hub.hf_hub_download(name, MANIFEST, revision=revision, cache_dir=cache_dir)).parent
    # Who it is from is asked when it is opened.
    for file in sorted(read_manifest(folder, require_signature=False).files):  # of the commit that the manifest is from
        hub.hf_hub_download(name, file, revision=folder.name, cache_dir=cache_dir)
    with contextlib.suppress(hub.errors.EntryNotFoundError):
        hub.hf_hub_download(name, SIGNATURE, revision=folder.name, cache_dir=cache_dir)
    return folder


def _reason(error: Exception, name: str, revision: str | None, what: What) -> str:
    from huggingface_hub import constants, errors

    where = f"{what} {name!r}" if revision is None else f"{what} {name!r} at revision {revision!r}"
    if isinstance(error, errors.GatedRepoError):
        return f"{where} is gated: accept its terms on its page and log in with `hf auth login`, or set HF_TOKEN."
    if isinstance(error, errors.RevisionNotFoundError):
        return f"{what} {name!r} has no revision {revision!r} on the hub. Check the name of the branch, tag or commit."
    if isinstance(error, errors.RepositoryNotFoundError | errors.HFValidationError):
        return (
            f"{where}: there is no such folder here, and no such repository on the hub that may be read. "
            "Check the name, or log in with `hf auth login`, or set HF_TOKEN."
        )
    if isinstance(error, errors.EntryNotFoundError) and not isinstance(error, errors.LocalEntryNotFoundError):
        missing = f"no {MANIFEST}, or not all that it lists"
        return f"{where}: the repository on the hub holds {missing}. Give one that holds what `m0kit export` wrote."
    if constants.HF_HUB_OFFLINE:
        return (
            f"{where}: HF_HUB_OFFLINE is set, there is no such folder here, and the hub's cache "
            f"({_cache(constants)}) holds no complete copy. Unset it once to fetch one, or give a folder."
        )
    if isinstance(error, OSError) and error.errno is not None and not isinstance(error, ConnectionError):
        return f"{where} cannot be kept in the hub's cache ({_cache(constants)}): {os.strerror(error.errno)}."
    return (
        f"{where}: there is no such folder here, the hub does not answer ({type(error).__name__}), and the hub's cache "
        f"({_cache(constants)}) holds no complete copy. Go online, or give a folder."
    )


def _cache(constants: Any) -> str:
    return str(constants.HF_HUB_CACHE)
