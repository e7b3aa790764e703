"""SQLite files that may come from somebody else: opened so that nothing beside them is touched and nothing runs.

    db = connect(path, writing=False, wait_s=5)
    require_schema(db, SQL)

SQLite follows what it finds beside a database: a journal that names another file has it deleted, a `-shm` that is a
link has its target overwritten. m0kit attaches no databases and uses no write-ahead log, so a database whose files
could do that is refused before SQLite sees it. Who only reads has no right to roll back: that is a writer's.
"""

import os
import sqlite3
import stat
from pathlib import Path
from typing import Final

# https://www.sqlite.org/fileformat2.html, sections 1.3 and 3: the header, and the end of a journal with a
# super-journal's name: its length, a checksum, and the journal's magic number.
_HEADER: Final = b"SQLite format 3\0"
_JOURNAL_MAGIC: Final = bytes.fromhex("d9d505f920a163d7")


class ForeignDatabaseError(sqlite3.DatabaseError):
    """A database that m0kit did not write. The message names the file and what is wrong with it."""


def connect(path: Path, *, writing: bool, wait_s: float) -> sqlite3.Connection:
    """A connection without implicit transactions, as durable as SQLite can be.

    `writing` creates the file where there is none. Raises ForeignDatabaseError; sqlite3.Error as SQLite does.
    """
    require_own(path)
    uri = f"{path.absolute().as_uri()}?mode={'rwc' if writing else 'ro'}"
    db = sqlite3.connect(uri, timeout=wait_s, isolation_level=None, check_same_thread=False, uri=True)
    try:
        # EXTRA also flushes the journal's removal: a segment is only unlinked after what replaces it is on disk.
        for setting in ("synchronous = EXTRA", "fullfsync = ON", "cell_size_check = ON", "trusted_schema = OFF"):
            db.execute(f"PRAGMA {setting}")
    except BaseException:
        db.close()
        raise
    return db


def require_own(path: Path) -> None:
    """Raises ForeignDatabaseError for a database, or a file beside it, by which SQLite would touch others."""
    for suffix in ("", "-journal"):
        file = path.with_name(path.name + suffix)
        try:
            if not stat.S_ISREG(os.lstat(file).st_mode):
                raise ForeignDatabaseError(f"{file}: is no regular file, and m0kit writes only those")
        except FileNotFoundError:
            continue
    for suffix in ("-wal", "-shm"):
        if os.path.lexists(file := path.with_name(path.name + suffix)):
            raise ForeignDatabaseError(f"{file}: belongs to a write-ahead log, which m0kit never uses")
    if (head := _read(path, 0, 20)) and (head[:16] != _HEADER or head[18:20] != b"\1\1"):
        raise ForeignDatabaseError(f"{path}: is no database that m0kit wrote")
    journal = path.with_name(f"{path.name}-journal")
    if _read(journal, -8, 8) == _JOURNAL_MAGIC:
        raise ForeignDatabaseError(f"{journal}: names another file, which SQLite would delete")


def require_schema(db: sqlite3.Connection, sql: str) -> None:
    """Raises ForeignDatabaseError where a database has other tables, indexes or triggers than `sql` makes."""
    wanted = sqlite3.connect(":memory:", isolation_level=None)
    try:
        wanted.executescript(sql)
        if _schema(db) != _schema(wanted):
            raise ForeignDatabaseError("its tables are not those that m0kit makes")
    finally:
        wanted.close()


def _schema(db: sqlite3.Connection) -> list[tuple[str, ...]]:
    return sorted(
        tuple(map(str, row)) for row in db.execute("SELECT type, name, tbl_name, sql FROM sqlite_schema LIMIT 1000")
    )


def _read(path: Path, start: int, size: int) -> bytes:
    """Some bytes, from the end where `start` is negative; what there is of them."""
    try:
        with open(path, "rb") as file:
            file.seek(start if start >= 0 else max(os.fstat(file.fileno()).st_size + start, 0))
            return file.read(size)
    except FileNotFoundError:
        return b""
