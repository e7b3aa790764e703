"""What this machine has found to be right before, so that it is not checked at every start. Owns that memory's place.

Three kinds of things are remembered: files whose hash was compared, databases of an index that were sound, and known
answers that an engine got right. It is a small file in the user's cache folder, and only ever best effort: without a
home, or with nothing that may be written, everything is simply checked again.

    memory = Memory.load()
    if not memory.knows_answers(key): …; memory.remember_answers(key)
    memory.save()
"""

import contextlib
import json
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from m0kit.files import writing

_WAIT_S: Final = 0.5  # for another process that remembers something; what is not remembered is checked again
# Verdicts are a line each; of more than so many the oldest are forgotten.
_MOST_ANSWERS: Final = 1000


def cache_folder() -> Path | None:
    """Where m0kit may keep what can be made again, by the rules of platformdirs; None where the user has no home.

    XDG_CACHE_HOME counts on every system, if it is absolute.
    """
    named = os.environ.get("XDG_CACHE_HOME", "")
    if os.path.isabs(named):
        return Path(named) / "m0kit"
    # An empty HOME would become the root of the disk; without HOME an unknown user's home stays "~".
    home = "" if os.environ.get("HOME") == "" else os.path.expanduser("~")
    if not os.path.isabs(home):
        return None
    if sys.platform == "win32":
        local = os.environ.get("LOCALAPPDATA", "")
        return Path(local if os.path.isabs(local) else os.path.join(home, "AppData", "Local"), "m0kit", "Cache")
    return Path(home, "Library/Caches" if sys.platform == "darwin" else ".cache", "m0kit")


@dataclass(slots=True)
class Memory:
    """Files by path, with what they were when they were looked at; answers by a key of all that they depend on."""

    path: Path | None
    files: dict[str, list[Any]]  # path → [sha256, or what a database is of; size, mtime, ctime, inode]
    answers: list[str]
    _files_now: dict[str, list[Any]] = field(default_factory=dict)
    _answers_now: list[str] = field(default_factory=list)

    @classmethod
    def load(cls) -> "Memory":
        folder = cache_folder()
        path = None if folder is None else folder / "verified.json"
        return cls(path, *_read(path))

    def knows_file(self, path: str, stamp: list[Any]) -> bool:
        return self.files.get(path) == stamp

    def remember_file(self, path: str, stamp: list[Any]) -> None:
        self.files[path] = self._files_now[path] = stamp

    def knows_answers(self, key: str) -> bool:
        return key in self.answers

    def remember_answers(self, key: str) -> None:
        self.answers.append(key)
        self._answers_now.append(key)

    def save(self, wait_s: float = _WAIT_S) -> None:
        """Write what is new beside what other processes have written meanwhile; files that are gone are left out.

        Others that write are waited for so long, and then nothing is remembered.
        """
        if self.path is None or not (self._files_now or self._answers_now):
            return
        with contextlib.suppress(OSError):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with writing(self.path, private=True, wait_s=wait_s) as file:
                files, answers = _read(self.path)
                files = {path: stamp for path, stamp in (files | self._files_now).items() if os.path.exists(path)}
                answers = list(dict.fromkeys([*answers, *self._answers_now]))[-_MOST_ANSWERS:]
                file.write(json.dumps({"files": files, "answers": answers}).encode())


def _read(path: Path | None) -> tuple[dict[str, list[Any]], list[str]]:
    """What is remembered; nothing where it cannot be read or is not what m0kit wrote."""
    try:
        raw = json.loads(path.read_text("utf-8")) if path else {}
    except (OSError, ValueError, RecursionError):
        raw = {}
    files, answers = (raw.get("files"), raw.get("answers")) if isinstance(raw, dict) else (None, None)
    return files if isinstance(files, dict) else {}, answers if isinstance(answers, list) else []
