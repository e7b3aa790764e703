"""The files that hold an index's bytes: appended to, mapped and removed, without a step outside of their folder.

Owns their names and how they are opened. An index may come from somebody else: a link in it is never followed, not
even the folder itself, and only regular files are opened. None is ever made shorter, since whoever has it mapped would
be killed by that.

    segments = Segments(Path("library"))
    with segments.appending(7) as file: …
    mapped = segments.map(7, 4096)
"""

import contextlib
import mmap
import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, Final

from m0kit.errors import StoreError
from m0kit.files import OWN

FOLDER: Final = "segments"
MOST: Final = 10**15  # above every number; names that m0kit would not give are left alone
_NAME: Final = re.compile(r"\d{6,15}\.kv")
# Names are looked up in an open folder where the system can do that; elsewhere each is looked at before.
_IN_FOLDER: Final = {os.open, os.stat, os.unlink} <= os.supports_dir_fd and hasattr(os, "O_NOFOLLOW")


class Segments:
    """The segments of an index, by number. All of it raises StoreError where something is no file of its own."""

    def __init__(self, index: Path) -> None:
        self.folder = index / FOLDER

    def path(self, number: int) -> Path:
        return self.folder / f"{number:06d}.kv"

    def numbers(self) -> list[int]:
        """Of the files that are there, in order. Raises OSError."""
        with self._opened() as folder, os.scandir(self.folder if folder is None else folder) as entries:
            found = []
            for entry in entries:
                if _NAME.fullmatch(entry.name) and entry.name == self.path(number := int(entry.name[:-3])).name:
                    if not entry.is_file(follow_symlinks=False):
                        raise _foreign(self.folder / entry.name, entry.is_symlink())
                    found.append(number)
        return sorted(found)

    def size(self, number: int) -> int:
        """The file's size in bytes; -1 if there is none."""
        try:
            with self._opened() as folder:
                return self._look(folder, number).st_size
        except OSError:
            return -1

    def map(self, number: int, size: int) -> mmap.mmap | None:
        """The file, to be read; None if there is none, or it has less than `size` bytes. Raises OSError."""
        try:
            with self._opened() as folder:
                if self._look(folder, number).st_size < max(size, 1):  # nothing cannot be mapped
                    return None
                descriptor = self._open(folder, number, os.O_RDONLY)
        except FileNotFoundError:
            return None
        try:
            return mmap.mmap(descriptor, 0, access=mmap.ACCESS_READ)
        except ValueError:  # it has become empty, or longer than addresses reach
            return None
        finally:
            os.close(descriptor)

    @contextlib.contextmanager
    def appending(self, number: int, *, new: bool) -> Iterator[BinaryIO]:
        """The file, to be written to: a `new` one, or one that is there. Raises OSError."""
        with self._opened() as folder:
            if not new and self._look(folder, number).st_nlink > 1:
                raise _foreign(self.path(number), is_link=True)
            descriptor = self._open(folder, number, os.O_RDWR | (os.O_CREAT | os.O_EXCL if new else 0))
        with open(descriptor, "r+b", buffering=0) as file:
            yield file

    def unlink(self, number: int) -> None:
        """Raises OSError, also for one that is open on Windows."""
        with self._opened() as folder:
            self._look(folder, number)
            if folder is None:
                os.unlink(self.path(number))
            else:
                os.unlink(self.path(number).name, dir_fd=folder)

    @contextlib.contextmanager
    def _opened(self) -> Iterator[int | None]:
        """The folder's descriptor, or None where names cannot be looked up in one."""
        found = os.lstat(self.folder)
        if not stat.S_ISDIR(found.st_mode):
            raise _foreign(self.folder, stat.S_ISLNK(found.st_mode))
        if not _IN_FOLDER:
            yield None
            return
        descriptor = os.open(self.folder, os.O_RDONLY | os.O_DIRECTORY | OWN)
        try:
            yield descriptor
        finally:
            os.close(descriptor)

    def _look(self, folder: int | None, number: int) -> os.stat_result:
        path = self.path(number)
        found = os.lstat(path) if folder is None else os.stat(path.name, dir_fd=folder, follow_symlinks=False)
        if not stat.S_ISREG(found.st_mode):
            raise _foreign(path, stat.S_ISLNK(found.st_mode))
        return found

    def _open(self, folder: int | None, number: int, flags: int) -> int:
        path = self.path(number)
        if folder is None:
            descriptor = os.open(path, flags | OWN, 0o666)
        else:
            descriptor = os.open(path.name, flags | OWN, 0o666, dir_fd=folder)
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):  # it has changed since the look
            os.close(descriptor)
            raise _foreign(path, is_link=False)
        return descriptor


def _foreign(path: Path, is_link: bool) -> StoreError:
    what = "a link" if is_link else "no regular file" if path.suffix else "no folder"
    return StoreError(f"{path}: is {what}, and an index has only files of its own. Copy it with its files (cp -rL).")
