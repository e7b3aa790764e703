"""A secret of this user, by which m0kit knows again what it wrote itself. Owns the file it is kept in.

It lies beside what was verified, in the user's cache folder (`journal.key`), for that user's eyes alone, and is made
once. It never leaves the machine; whoever has it can write scores that are taken for m0kit's.
"""

import contextlib
import os
import secrets
import stat
from pathlib import Path
from typing import Final

from m0kit.errors import OutputError
from m0kit.files import OWN, writing
from m0kit.verified import cache_folder

_NAME: Final = "journal.key"
_BYTES: Final = 32


def key_file() -> Path | None:
    """Where the secret is kept; None where the user has no home."""
    folder = cache_folder()
    return None if folder is None else folder / _NAME


def own_key() -> bytes | None:
    """The secret, made where there is none; None where it cannot be kept: no home, or nothing may be written there.

    One that others could read, or that is a link, is no secret: another takes its place.
    """
    path = key_file()
    if path is None:
        return None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return _read(path) or _made(path)
    except OSError:
        return None


def _read(path: Path) -> bytes | None:
    try:
        descriptor = os.open(path, os.O_RDONLY | OWN)
    except OSError:
        return None
    with open(descriptor, "rb") as file:
        found = os.fstat(descriptor)
        is_ours = not hasattr(os, "getuid") or (found.st_uid == os.getuid() and not found.st_mode & 0o077)
        key = file.read(_BYTES + 1) if stat.S_ISREG(found.st_mode) and is_ours else b""
    return key if len(key) == _BYTES else None


def _made(path: Path) -> bytes | None:
    """A new one, or that of a process which was faster."""
    with contextlib.suppress(OutputError), writing(path, private=True) as file:  # whoever is at it has made one by then
        file.write(_read(path) or secrets.token_bytes(_BYTES))
    return _read(path)
