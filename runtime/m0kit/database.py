"""SQLite files that may come from somebody else: opened so that nothing beside them is touched and nothing is endless.

    db = connect(path, writing=False, wait_s=5)
    require_schema(db, SQL)

SQLite follows what it finds beside a database: a journal that names another file has it deleted, a `-shm` that is a
link has its target overwritten. m0kit attaches no databases and uses no write-ahead log, so a database whose files
could do that is refused before SQLite sees it. Who only reads has no right to roll back: that is a writer's.

A statement may take as many steps as the size of the file explains, so that no structure in it, however it is tied
into circles, keeps one busy for ever; it ends with sqlite3.OperationalError, "interrupted".
"""

import functools
import math
import os
import sqlite3
import stat
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Final
from weakref import WeakValueDictionary

from m0kit import forks
from m0kit.files import OWN

# https://www.sqlite.org/fileformat2.html, sections 1.3 and 3: the header, and the end of a journal with a
# super-journal's name: its length, a checksum, and the journal's magic number.
_HEADER: Final = b"SQLite format 3\0"
_JOURNAL_MAGIC: Final = bytes.fromhex("d9d505f920a163d7")
# What m0kit's own databases stay far below, so that a claim in a file costs no more than this.
_LIMITS: Final = {
    sqlite3.SQLITE_LIMIT_LENGTH: 16 << 20,  # bytes of a row; the longest that m0kit writes has some 2 MiB
    sqlite3.SQLITE_LIMIT_SQL_LENGTH: 100_000,  # of a statement, those of the schema among them: 3,000 at most
    sqlite3.SQLITE_LIMIT_COLUMN: 100,
    sqlite3.SQLITE_LIMIT_EXPR_DEPTH: 100,
    sqlite3.SQLITE_LIMIT_TRIGGER_DEPTH: 10,
}
# Steps of SQLite's machine. Looking through a whole index takes 2 for each byte of it; 10⁸ take some 3 seconds.
STEPS: Final = 20_000_000
_STEPS_PER_BYTE: Final = 100
_LOOK_EVERY: Final = 1_000_000


class ForeignDatabaseError(sqlite3.DatabaseError):
    """A database that m0kit did not write. The message names the file and what is wrong with it."""


class _File:
    """A database's file, open for reading. It stays open while this process has a connection to the database.

    A process that closes any descriptor of a file gives up all its locks on it, those of SQLite's too.
    """

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor

    def __del__(self) -> None:
        os.close(self.descriptor)


class _Files:
    """The files of all databases that this process has connections to, each open once."""

    def __init__(self) -> None:
        self.fork_lock = threading.RLock()
        self._files: WeakValueDictionary[tuple[int, int], _File] = WeakValueDictionary()

    def after_fork(self) -> None:
        self.fork_lock = threading.RLock()

    def open(self, path: Path, writing: bool) -> _File | None:
        """The file of the database at `path`; None where there is none. Raises ForeignDatabaseError."""
        file = None
        with self.fork_lock:
            try:
                found = os.lstat(path)
                _require_regular(path, found)
                place = found.st_dev, found.st_ino
                file = self._files.get(place) or _File(os.open(path, os.O_RDONLY | OWN))
                _require_own_file(path, file.descriptor, writing)
                self._files[place] = file
            except FileNotFoundError:
                return None
            except OSError as error:
                raise ForeignDatabaseError(f"{path}: cannot be read: {error.strerror}") from error
            except ForeignDatabaseError:
                del file  # or the traceback keeps it open
                raise
            return file


_files: Final = _Files()
forks.watch(_files)


class _Steps:
    """How many steps the statement that runs has taken, against what its database's size explains."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.taken = 0.0

    def look(self) -> bool:
        """SQLite asks whether to stop."""
        self.taken += _LOOK_EVERY
        if self.taken <= STEPS:
            return False
        try:
            return self.taken > STEPS + _STEPS_PER_BYTE * os.stat(self._path).st_size
        except OSError:
            return True


class _Connection(sqlite3.Connection):
    """A connection whose statements end, and that keeps its file open for as long as it has locks."""

    file: _File | None = None
    steps: _Steps

    def execute(self, sql: str, parameters: Any = (), /) -> sqlite3.Cursor:
        self.steps.taken = 0.0
        return _execute(self, sql, parameters)

    def executemany(self, sql: str, parameters: Iterable[Any], /) -> sqlite3.Cursor:
        self.steps.taken = -math.inf  # as many as are given
        return super().executemany(sql, parameters)

    def close(self) -> None:
        super().close()
        self.file = None


_execute = sqlite3.Connection.execute


def connect(path: Path, *, writing: bool, wait_s: float) -> sqlite3.Connection:
    """A connection without implicit transactions, as durable as SQLite can be.

    `writing` creates the file where there is none. Without it, a database whose writer was killed in the middle of a
    transaction cannot be read: sqlite3.OperationalError of which `needs_rollback` is true.
    Raises ForeignDatabaseError; sqlite3.Error as SQLite does.
    """
    path = path.absolute()
    uri = f"{path.as_uri()}?mode={'rwc' if writing else 'ro'}"
    file = require_own(path, writing=writing)  # open before SQLite opens it: nothing is closed while that has locks
    db = sqlite3.connect(
        uri, timeout=wait_s, isolation_level=None, check_same_thread=False, factory=_Connection, uri=True
    )
    try:
        db.file, db.steps = file, _Steps(path)
        db.set_progress_handler(db.steps.look, _LOOK_EVERY)
        for limit, value in _LIMITS.items():
            db.setlimit(limit, value)
        # EXTRA also flushes the journal's removal: a segment is only unlinked after what replaces it is on disk.
        for setting in ("trusted_schema = OFF", "cell_size_check = ON", "synchronous = EXTRA", "fullfsync = ON"):
            db.execute(f"PRAGMA {setting}")
        # By now a killed writer's transaction has been rolled back, to what its journal says was there before.
        db.file = require_own(path, writing=writing)
    except BaseException:
        del file
        db.close()
        raise
    return db


def needs_rollback(error: sqlite3.Error) -> bool:
    """Whether it comes of a transaction whose writer was killed, which only who writes may roll back."""
    return getattr(error, "sqlite_errorcode", 0) == sqlite3.SQLITE_READONLY_ROLLBACK


def require_own(path: Path, *, writing: bool = False) -> _File | None:
    """The database's open file, or None. Raises ForeignDatabaseError where SQLite would touch others by it."""
    for suffix in ("-wal", "-shm"):
        if os.path.lexists(beside := path.with_name(path.name + suffix)):
            raise ForeignDatabaseError(f"{beside}: belongs to a write-ahead log, which m0kit never uses")
    journal = path.with_name(f"{path.name}-journal")
    try:
        _require_regular(journal, os.lstat(journal))
        with open(journal, "rb") as opened:
            opened.seek(max(os.fstat(opened.fileno()).st_size - len(_JOURNAL_MAGIC), 0))
            end = opened.read(len(_JOURNAL_MAGIC))
    except FileNotFoundError:  # or gone meanwhile: a writer has finished
        end = b""
    except OSError as error:
        raise ForeignDatabaseError(f"{journal}: cannot be read: {error.strerror}") from error
    if end == _JOURNAL_MAGIC:
        raise ForeignDatabaseError(f"{journal}: names another file, which SQLite would delete")
    return _files.open(path, writing)


def require_schema(db: sqlite3.Connection, sql: str) -> None:
    """Raises ForeignDatabaseError where a database has other tables, indexes or triggers than `sql` makes.

    To be asked before anything else is: a table may be a view that never ends.
    """
    wanted = _made_by(sql)
    if _schema(db, len(wanted) + 1) != wanted:
        raise ForeignDatabaseError("its tables are not those that m0kit makes")


@functools.cache
def _made_by(sql: str) -> list[tuple[str, ...]]:
    wanted = sqlite3.connect(":memory:", isolation_level=None)
    try:
        wanted.executescript(sql)
        return _schema(wanted, 1000)
    finally:
        wanted.close()


def _schema(db: sqlite3.Connection, most: int) -> list[tuple[str, ...]]:
    rows = db.execute("SELECT type, name, tbl_name, sql FROM sqlite_schema LIMIT ?", (most,))
    return sorted(tuple(map(str, row)) for row in rows)


def _require_own_file(path: Path, descriptor: int, writing: bool) -> None:
    found = os.fstat(descriptor)
    _require_regular(path, found)
    if writing and found.st_nlink > 1:
        raise ForeignDatabaseError(f"{path}: has another name too (a hard link), whose file would be changed")
    if hasattr(os, "pread"):  # forked processes share the place in a file
        head = os.pread(descriptor, 20, 0)
    else:
        os.lseek(descriptor, 0, os.SEEK_SET)
        head = os.read(descriptor, 20)
    if head[:16] == _HEADER and head[18:20] != b"\1\1":
        raise ForeignDatabaseError(f"{path}: uses a write-ahead log, which m0kit never does, or is damaged")


def _require_regular(path: Path, found: os.stat_result) -> None:
    if not stat.S_ISREG(found.st_mode):
        what = "a link" if stat.S_ISLNK(found.st_mode) else "no file"
        raise ForeignDatabaseError(f"{path}: is {what}, and m0kit writes only files of its own")
