"""The keys that let a client in. Owns the form of the key file, and comparing; which requests need one is the guard's.

    keys = Keys.read(Path("keys.txt"))
    keys.name_of("u1x9…")  # → "search", or None

One key a line, as `key`, `name: key`, or with `sha256:` and 64 hex digits where the key would stand, so that the file
holds no secret. Blank lines and those that begin with # say nothing. Memory holds hashes alone; what goes to logs is a
key's name, `line-3` where it has none.
"""

import hashlib
import hmac
import os
import re
import stat
from pathlib import Path
from typing import Final, Self

from m0kit.errors import M0kitError
from m0kit.files import read_regular
from m0kit.server.logs import log

MAX_FILE_BYTES: Final = 1 << 18
MAX_KEYS: Final = 1000  # each request is compared with all
MIN_CHARACTERS: Final = 16
_NAMED: Final = re.compile(r"([A-Za-z0-9][A-Za-z0-9_.-]{0,63}):[ \t]+(.*)")
_HASHED: Final = re.compile(r"sha256:([0-9A-Fa-f]{64})")
_KEY: Final = re.compile(r"[!-~]+")  # what is seen of ASCII, which is what a header can carry


class Keys:
    """Those of one file. Each is kept as its name and sha256."""

    def __init__(self, path: Path, hashes: tuple[tuple[str, bytes], ...]) -> None:
        self._path, self._hashes = path, hashes

    @property
    def hashes(self) -> tuple[tuple[str, bytes], ...]:
        """Name and sha256 of each."""
        return self._hashes

    @classmethod
    def read(cls, path: Path) -> Self:
        """Raises M0kitError for a file that cannot be read or has a line that is no key. No message quotes a key."""
        try:
            data = read_regular(path, MAX_FILE_BYTES)
        except OSError as error:
            raise M0kitError(f"{path}: {error.strerror}. Name a file with one key a line.") from None
        found = _parse(path, data)
        if not found:
            raise M0kitError(f"{path}: holds no key. Write one a line, of at least {MIN_CHARACTERS} characters.")
        writable, readable = stat.S_IWGRP | stat.S_IWOTH, stat.S_IRGRP | stat.S_IROTH
        unwanted = writable | (readable if any(is_key for _, _, is_key in found) else 0)  # a hash is no secret
        if os.name == "posix" and os.stat(path).st_mode & unwanted:
            log("warning", f"{path}: others on this machine may read or write it. chmod 600 it.")
        return cls(path, tuple((name, digest) for name, digest, _ in found))

    def reread(self) -> bool:
        """Take the file's keys as they are now. A bad file is logged, and the keys stay as they were: False."""
        try:
            new = type(self).read(self._path)
        except M0kitError as error:
            log("error", f"the keys stay as they were: {error}")
            return False
        self._hashes = new.hashes
        log("info", "keys were read again", keys=len(new.hashes))
        return True

    def name_of(self, key: bytes) -> str | None:
        """Whose key it is, or None. It takes as long whichever it is, and whether it is one."""
        given, found = hashlib.sha256(key).digest(), None
        for name, digest in self._hashes:
            if hmac.compare_digest(given, digest):
                found = name  # and on to the last
        return found


def _parse(path: Path, data: bytes) -> list[tuple[str, bytes, bool]]:
    """Of each its name, its sha256, and whether the file has the key itself. Raises M0kitError."""
    found = []
    for number, raw in enumerate(data.removeprefix(b"\xef\xbb\xbf").splitlines(), 1):
        line = raw.strip()
        if not line or line.startswith(b"#"):
            continue
        if not line.isascii():
            raise M0kitError(f"{path}, line {number}: a key has letters, digits and signs of ASCII alone.")
        named = _NAMED.fullmatch(line.decode("ascii"))
        name, key = named.groups() if named else (f"line-{number}", line.decode("ascii"))
        if hashed := _HASHED.fullmatch(key):
            found.append((name, bytes.fromhex(hashed[1]), False))
        elif key.lower().startswith("sha256:"):
            raise M0kitError(f"{path}, line {number}: sha256: is followed by the 64 hex digits of a key's hash.")
        elif not _KEY.fullmatch(key):
            raise M0kitError(f"{path}, line {number}: is neither a key without blanks nor `name: key`.")
        elif len(key) < MIN_CHARACTERS:
            raise M0kitError(
                f"{path}, line {number}: a key of {len(key)} characters is guessed too easily. Take at least "
                f"{MIN_CHARACTERS}, as `openssl rand -hex 24` makes them."
            )
        else:
            found.append((name, hashlib.sha256(key.encode("ascii")).digest(), True))
    if len(found) > MAX_KEYS:
        raise M0kitError(f"{path}: has {len(found)} keys, and at most {MAX_KEYS} are taken.")
    return found
