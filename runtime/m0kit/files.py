"""Files that are opened only where they are files; files and folders that appear under their name when they are whole.

Owns which files are read at all, hashing them, the work place beside an output, who holds it, flushing and renaming.
What may be replaced is the caller's business.

    with writing(Path("scores.jsonl")) as file:   # .scores.jsonl.unfinished/new
        file.write(b"{}")
    with replacing(Path("m0-fp32")) as new:   # .m0-fp32.unfinished/new
        (new / "manifest.json").write_text("{}")

A work place belongs to whoever locks the file in it. The system frees that lock with the process, however that ends;
so what nobody locks is a dead process's, and the next one that writes the same output clears it away.
"""

import contextlib
import ctypes
import errno
import hashlib
import os
import shutil
import stat
import sys
import time
from collections.abc import Callable, Iterator
from io import BufferedReader
from pathlib import Path
from typing import BinaryIO, Final

from m0kit.errors import M0kitError, OutputError

_PIECE: Final = 1 << 20
# How a file of one's own is opened, where the system knows it: no link is followed, and nothing is waited for.
OWN: Final = sum(getattr(os, flag, 0) for flag in ("O_BINARY", "O_CLOEXEC", "O_NOFOLLOW", "O_NONBLOCK"))
_LOCK: Final = "lock"
_NEW: Final = "new"
_OLD: Final = "old"
# How a file system says that it has no locks, or nothing to flush, as some of those on a network do.
_CANNOT: Final = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL)
_WAIT_S: Final = 10.0  # for another process that writes the same file, which takes it moments
_LOOK_EVERY_S: Final = 0.01


def open_regular(path: str | os.PathLike[str]) -> BufferedReader:
    """A file to read, at the end of its links: a regular one, since others may never end, or never begin.

    Raises OSError, whose `strerror` says so where it is another kind of file.
    """
    _must_be_regular(os.stat(path), path)  # before it is opened, which may be an act by itself
    file = open(os.open(path, os.O_RDONLY | OWN & ~getattr(os, "O_NOFOLLOW", 0)), "rb")  # noqa: SIM115
    try:
        _must_be_regular(os.fstat(file.fileno()), path)
    except BaseException:
        file.close()
        raise
    return file


def read_regular(path: str | os.PathLike[str], max_bytes: int) -> bytes:
    """The bytes of a regular file that has at most so many. Raises OSError, whose `strerror` says what is wrong."""
    pieces, left = [], max_bytes + 1  # it may grow, and some of the system's files do not tell their size
    with open_regular(path) as file:
        while left and (piece := file.read(min(left, _PIECE))):  # which takes as much memory as it is asked for
            pieces.append(piece)
            left -= len(piece)
    if piece is None:  # of a file of the system's that would have been waited for
        raise OSError(errno.EAGAIN, "holds nothing now, and is no file that ends", os.fspath(path))
    data = b"".join(pieces)
    if len(data) > max_bytes:
        raise OSError(errno.EFBIG, f"has more than the {max_bytes} bytes that are read of it", os.fspath(path))
    return data


def sha256_of(path: str | os.PathLike[str], progress: Callable[[int], object] = lambda _: None) -> str:
    """Hash a regular file in pieces, as hex; `progress` is told the bytes of each. Raises OSError."""
    digest = hashlib.sha256()
    with open_regular(path) as file:
        while piece := file.read(_PIECE):
            digest.update(piece)
            progress(len(piece))
    return digest.hexdigest()


def _must_be_regular(found: os.stat_result, path: str | os.PathLike[str]) -> None:
    if not stat.S_ISREG(found.st_mode):
        what = "a folder" if stat.S_ISDIR(found.st_mode) else "a device, a pipe or a socket"
        raise OSError(errno.EINVAL, f"is {what}, and no file", os.fspath(path))


def destination(path: Path) -> Path:
    """The place that a path means: where its links lead, whether there is something yet or not."""
    return Path(os.path.realpath(path))


def occupied(path: Path) -> bool:
    """Whether something is there, at the end of its links, that is no empty folder."""
    return path.exists() and (not path.is_dir() or any(path.iterdir()))


def require_unoccupied(path: Path) -> None:
    """Raises OutputError where something is there already, but for an empty folder."""
    if occupied(path):
        raise OutputError(f"{path}: exists and is not empty. Choose another folder.")


@contextlib.contextmanager
def writing(
    path: Path, *, private: bool = False, ready: Callable[[], object] = lambda: None, wait_s: float = _WAIT_S
) -> Iterator[BinaryIO]:
    """A new file that takes the name `path` when the block ends well, and vanishes when not.

    What lies there is replaced, of a link the link and not what it leads to; but no device gives way. Another process
    that writes the same file is waited for, up to `wait_s`, before the block, which may so look at what is there.
    `private` is for this user's eyes alone. `ready` is called when the bytes are durable and about to take the name.

    Raises OutputError when another process goes on writing that file, or the file system refuses.
    """
    place = path.absolute()
    if _is_system(place):
        raise OutputError(f"{path}: is a device, whose place no file can take. Name a file.")
    with named_errors(path), _working(place, path, wait_s) as space:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | OWN
        with open(os.open(space / _NEW, flags, 0o600 if private else 0o666), "wb") as file:
            yield file
            file.flush()
            sync(file.fileno())
        ready()
        os.replace(space / _NEW, place)  # closed before: Windows renames nothing that is open
        sync_path(place.parent)


def _is_system(place: Path) -> bool:
    """Whether it is a device, or leads to one or to a pipe, as /dev/stdout does."""
    try:
        mode = os.stat(place).st_mode
    except OSError:
        return False
    return not stat.S_ISREG(mode) and not stat.S_ISDIR(mode) and (place.is_symlink() or not stat.S_ISFIFO(mode))


@contextlib.contextmanager
def replacing(output: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """A new empty folder that takes the place of `output` when the block ends well, and vanishes when not.

    Where `output` is a link, that is the place it leads to. What lies beside the new folder goes in any case, as
    `new.with_name("scratch")` would. Before the block, what a killed process left of this output is cleared away, and
    an old folder that it had already moved comes back. An output that exists is replaced only with `overwrite`, an
    empty folder always.

    Raises OutputError when another process writes this output, or the file system refuses.
    """
    place = destination(output)
    with named_errors(output):
        if Path.cwd().is_relative_to(place):
            raise OutputError(
                f"{output}: holds the folder you are in, so it is not replaced. Choose a folder inside it."
            )
        place.parent.mkdir(parents=True, exist_ok=True)
    with _working(place, output) as space:
        new = space / _NEW
        with named_errors(output):
            new.mkdir()
        yield new
        with named_errors(output):
            flush(new)
            _put(new, place, overwrite)
            sync_path(place.parent)


def recover(output: Path) -> None:
    """Clear away what a killed process left of `output`, and put an old folder back where it had moved one.

    `replacing` does the same; this is for who looks at the output before. Raises OutputError as that does.
    """
    with named_errors(output):
        place = destination(output)
        if _work_place(place).is_dir():
            with _working(place, output):
                pass


@contextlib.contextmanager
def named_errors(output: Path) -> Iterator[None]:
    """What the file system refuses comes out as an OutputError."""
    try:
        yield
    except M0kitError:  # some of ours are OSErrors too
        raise
    except PermissionError as error:
        raise OutputError(f"{output}: no permission to write there.") from error
    except OSError as error:
        raise OutputError(f"{output}: cannot be written ({os.strerror(error.errno or 0)}).") from error


def flush(path: Path) -> None:
    """Make a file, or all that is in a folder, durable."""
    if path.is_dir():
        for inner in path.iterdir():
            flush(inner)
    sync_path(path)


def sync_path(path: Path) -> None:
    """Make one file, or the names in one folder, durable."""
    if sys.platform == "win32" and path.is_dir():
        return  # makes names durable by itself, and cannot open folders
    # Windows flushes only what is open for writing.
    descriptor = os.open(path, os.O_RDWR if sys.platform == "win32" else os.O_RDONLY)
    try:
        sync(descriptor)
    except OSError as error:
        if error.errno not in _CANNOT or not path.is_dir():
            raise
    finally:
        os.close(descriptor)


def sync(descriptor: int) -> None:
    """Make an open file durable."""
    if sys.platform == "darwin":  # where fsync stops at the drive's cache
        import fcntl

        try:
            fcntl.fcntl(descriptor, fcntl.F_FULLFSYNC)
        except OSError as error:
            if error.errno not in _CANNOT:
                raise
        else:
            return
    os.fsync(descriptor)


def exchange(one: Path, other: Path) -> bool:
    """Swap two names so that neither is ever missing; False where the system cannot."""
    names = os.fsencode(one), os.fsencode(other)
    try:
        library = ctypes.CDLL(None)
        if sys.platform == "darwin":
            failed = library.renamex_np(*names, 2)  # RENAME_SWAP
        else:
            failed = library.renameat2(-100, names[0], -100, names[1], 2)  # AT_FDCWD, RENAME_EXCHANGE
    except (OSError, TypeError, AttributeError):  # no such library, no such function
        return False
    return bool(failed == 0)


def lock_file(descriptor: int) -> bool:
    """Lock an open file for this process; False when another one has it. Raises OSError where there are no locks."""
    try:
        if sys.platform == "win32":
            import msvcrt

            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES, errno.EDEADLK):
            return False
        raise
    return True


def _work_place(place: Path) -> Path:
    return place.with_name(f".{place.name}.unfinished")


@contextlib.contextmanager
def _working(place: Path, output: Path, wait_s: float = 0.0) -> Iterator[Path]:
    """The work place for what goes to `place`, cleared, for this process alone; at the end it vanishes."""
    space = _work_place(place)
    with named_errors(output):
        lock = _hold(space, output, wait_s)
    try:
        with named_errors(output):
            _restore(space, place)
        yield space
    finally:
        _leave(space, place, lock)


def _hold(space: Path, output: Path, wait_s: float = 0.0) -> int:
    """Make the work place this process's own, after waiting for another; returns the descriptor of its lock."""
    end = time.monotonic() + wait_s
    while True:
        try:
            space.mkdir()
            made = True
        except FileExistsError:
            made = False
        try:
            if not made and not stat.S_ISDIR(os.lstat(space).st_mode):
                os.unlink(space)  # none of m0kit's, and a link is not followed
                continue
            descriptor = os.open(space / _LOCK, os.O_RDWR | os.O_CREAT | OWN, 0o666)
        except FileNotFoundError:  # whoever had it has just left
            continue
        except OSError:
            with contextlib.suppress(OSError):
                space.rmdir()
            raise
        try:
            free = lock_file(descriptor)
        except OSError as error:
            if error.errno not in _CANNOT:
                os.close(descriptor)
                raise
            free = made  # without locks nobody can tell a killed process's work place from a living one's
        if free:
            with contextlib.suppress(OSError):
                if os.path.samestat(os.fstat(descriptor), os.stat(space / _LOCK)):
                    return descriptor
        os.close(descriptor)  # of a work place that was removed meanwhile, or is another's
        if not free:
            if time.monotonic() >= end:
                raise OutputError(
                    f"{output}: another process is writing it, in {space}. Wait until it has finished, or stop it; "
                    "if there is none, remove that folder."
                )
            time.sleep(_LOOK_EVERY_S)


def _restore(space: Path, place: Path) -> None:
    """An old folder comes back if nothing is in its place; whatever else a dead process left goes."""
    if (space / _OLD).exists() and not os.path.lexists(place):
        (space / _OLD).rename(place)
        sync_path(place.parent)
    _clear(space)


def _clear(space: Path) -> None:
    for path in space.iterdir():
        if path.name == _LOCK:
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def _put(new: Path, place: Path, overwrite: bool) -> None:
    """Rename; what is there gives way, and comes back if that fails."""
    if place.is_dir() and not overwrite:
        with contextlib.suppress(OSError):  # not empty
            place.rmdir()
    if not os.path.lexists(place):
        new.rename(place)
        return
    if not overwrite:
        raise OutputError(f"{place}: exists and is not empty. Choose another folder.")
    if exchange(new, place):
        return
    old = new.with_name(_OLD)
    place.rename(old)
    try:
        new.rename(place)
    except BaseException:
        old.rename(place)
        raise


def _leave(space: Path, place: Path, lock: int) -> None:
    """Remove the work place and let it go; what cannot be removed now goes when this output is written again."""
    if (space / _OLD).exists() and not os.path.lexists(place):  # it could not come back now
        os.close(lock)
        return
    windows = sys.platform == "win32"  # does not remove what is open, here or in another process
    with contextlib.suppress(OSError):
        _clear(space)
    with contextlib.suppress(OSError):
        if not windows:
            os.unlink(space / _LOCK)
    os.close(lock)
    with contextlib.suppress(OSError):
        if windows:
            os.unlink(space / _LOCK)
        space.rmdir()
