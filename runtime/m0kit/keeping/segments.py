"""The files that hold an index's bytes: appended to, mapped and removed, without a step outside of their folder.

Owns their names, how they are opened, and the pieces in them: where one may start, and its checksum. An index may come
from somebody else: a link in it is never followed, not even the folder itself, and only regular files are opened. None
is ever made shorter, since whoever has it mapped would be killed by that.

    segments = Segments(Path("library"))
    with segments.appending(7) as file: …
    mapped = segments.map(7, 4096)

A *piece* is a record or a document's content (equal contents are kept once); it starts at a multiple of 4096 and has
a checksum that begins with its key, so that no other piece's bytes pass for it.
"""

import contextlib
import mmap
import os
import re
import stat
import zlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, Final, NamedTuple
from weakref import WeakValueDictionary

import numpy as np
from numpy.typing import NDArray

from m0kit.errors import StoreError
from m0kit.files import OWN, sync, sync_path

FOLDER: Final = "segments"
ALIGN: Final = 4096
MOST: Final = 10**15  # above every number; names that m0kit would not give are left alone
_NAME: Final = re.compile(r"\d{6,15}\.kv")
# Names are looked up in an open folder where the system can do that; elsewhere each is looked at before.
IN_FOLDER: Final = {os.open, os.stat, os.unlink} <= os.supports_dir_fd and hasattr(os, "O_NOFOLLOW")


class Piece(NamedTuple):
    """A row of `pieces`: where a piece lies."""

    content: bool  # or 0 and 1
    key: bytes
    segment: int
    start: int
    size: int
    crc: int
    used: float  # seconds since 1970
    warm: int  # 0 for a record that has to go first when room is needed

    def fits(self, view: NDArray[np.uint8] | None) -> bool:
        """Whether these are the bytes that were written."""
        return view is not None and zlib.crc32(view.data, begun(self.content, self.key)) == self.crc


class New(NamedTuple):
    """A piece to be written. Its checksum is computed, but a damaged content's stays what it should be."""

    content: bool
    key: bytes
    buffers: Sequence[memoryview]
    used: float
    warm: int = 1
    crc: int | None = None

    @property
    def size(self) -> int:
        return sum(buffer.nbytes for buffer in self.buffers)


class Segments:
    """The segments of an index, by number. All of it raises StoreError where something is no file of its own."""

    def __init__(self, index: Path) -> None:
        self.folder = index / FOLDER
        self._maps: WeakValueDictionary[int, mmap.mmap] = WeakValueDictionary()  # a map lives as long as its views

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

    def mapped(self, piece: Piece) -> mmap.mmap | None:
        """The segment of a piece; None if it is gone or too short. One thread at a time."""
        end = piece.start + piece.size
        found = self._maps.get(piece.segment)
        if found is None or len(found) < end:
            try:
                found = self.map(piece.segment, end)
            except OSError as error:
                raise StoreError(f"{self.path(piece.segment)}: cannot be read: {error.strerror}.") from error
            if found is not None:
                self._maps[piece.segment] = found
        return found

    def view(self, piece: Piece) -> NDArray[np.uint8] | None:
        """The bytes of a piece (N,); None if its segment is gone or too short. One thread at a time."""
        if not piece.size:
            return np.empty(0, np.uint8)
        found = self.mapped(piece)
        return None if found is None else np.frombuffer(found, np.uint8, piece.size, piece.start)

    def forget(self, *numbers: int) -> None:
        """Map these anew when they are wanted again, or all."""
        for number in numbers or list(self._maps):
            self._maps.pop(number, None)

    def append(
        self, new: Sequence[New], last: tuple[int, int] | None, most: int, unused: Callable[[], int]
    ) -> tuple[list[Piece], dict[int, int]]:
        """Write pieces and flush them: where each lies, and the new end of each segment. Raises OSError.

        They go behind the known end of the `last` segment (number, size) as far as it then has at most `most` bytes, or
        is empty. If there is none, or it is not as long as it should be, and so damaged, they go to `unused` numbers.
        """
        pieces: list[Piece] = []
        ends: dict[int, int] = {}
        if not new:
            return pieces, ends
        number, end = last or (0, 0)
        is_new = last is None or self.size(number) != end
        end = room(end)  # after what a killed writer left
        left = deque(new)
        while left:
            is_new |= end > 0 and end + room(left[0].size) > most
            if is_new:
                number, end = unused(), 0
            with self.appending(number, new=is_new) as file:
                file.seek(end)
                while left and (end == 0 or end + room(left[0].size) <= most):
                    item = left.popleft()
                    crc = begun(item.content, item.key)
                    for buffer in item.buffers:
                        crc = zlib.crc32(buffer, crc)
                        write_whole(file, buffer)
                    write_whole(file, memoryview(bytes(room(item.size) - item.size)))
                    crc = crc if item.crc is None else item.crc
                    pieces.append(Piece(item.content, item.key, number, end, item.size, crc, item.used, item.warm))
                    end += room(item.size)
                    ends[number] = end
                sync(file.fileno())
            is_new = True
        sync_path(self.folder)
        return pieces, ends

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
        if not IN_FOLDER:
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


def room(size: int) -> int:
    """The bytes that a piece of `size` takes in a segment."""
    return -(-size // ALIGN) * ALIGN


def begun(content: bool, key: bytes) -> int:
    """The checksum of a piece before its bytes: of its kind and its key."""
    return zlib.crc32(key, 1 + content)


def write_whole(file: BinaryIO, data: memoryview) -> None:
    """All of it, where a file without a buffer may take a part."""
    while data.nbytes:
        data = data[file.write(data) :]


def _foreign(path: Path, is_link: bool) -> StoreError:
    what = "a link" if is_link else "no regular file" if path.suffix else "no folder"
    return StoreError(f"{path}: is {what}, and an index has only files of its own. Copy it with its files (cp -rL).")
