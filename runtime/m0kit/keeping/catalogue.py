"""An index's database: which documents and pieces there are, and where their bytes lie.

Owns every statement on its `tables`, who may write (`lock.sqlite`), transactions, and whether it is sound. Does not own
the bytes (`segments`), nor when anything is added, moved or dropped (`store`).

    catalogue = Catalogue(folder, writable=True)
    with catalogue.transaction() as emptied:
        catalogue.publish(pieces, {7: 4096})
    piece = catalogue.piece(False, key)

Nothing that is done for one document looks at all of them. Opening for writing reads the database once, to be sure of
it; so does opening for reading, once per change that it has not seen (`m0kit.verified`). It may come from somebody
else, or from a failing disk, and is only used with exactly those tables. In a forked child it has a connection of its
own, for reading only.
"""

import json
import os
import sqlite3
import sys
import threading
import time
import zlib
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Annotated, Any, Final, Literal, NamedTuple

import msgspec

from m0kit import database, forks, schema
from m0kit.errors import M0kitError, OutputError, StoreBusyError, StoreError
from m0kit.keeping import tables
from m0kit.keeping.segments import MOST, Piece, room
from m0kit.keeping.tables import MAX_LIMIT, OWNERLESS, RECORDS_BY_USE
from m0kit.verified import Memory

INDEX, LOCK = "index.sqlite", "lock.sqlite"
WAIT_S = 600.0  # for another process's transaction: milliseconds, unless the machine is busy; guards against hanging
_WRITER_WAIT_S: Final = 0.5  # for another process that is just trying; a writer stays for longer, and so does its lock
_TOUCH_WAIT_S: Final = 0.05  # noting a use is not worth more
_USE: Final = "UPDATE pieces SET used = ?, warm = 1 WHERE content = 0 AND key = ?"
# UnicodeDecodeError comes of a message that names what is damaged, MemoryError of a row that claims to be huge.
_SQLITE_RAISES: Final = (sqlite3.Error, UnicodeDecodeError, MemoryError)


class Described(NamedTuple):
    """A row of `documents`: all but its place. In a damaged database it may hold anything."""

    id: str
    kind: Literal["text", "image"]
    key: bytes
    content: bytes  # sha256 of the document's data
    source: str
    sum: int

    @property
    def is_own(self) -> bool:
        """Whether this is what was written."""
        fields = self[:-1]
        return [*map(type, fields)] == [str, str, bytes, bytes, str] and sum_of(*fields) == self.sum


_DESCRIBED: Final = ", ".join(Described._fields)


class _Meta(msgspec.Struct, forbid_unknown_fields=True):
    """What the table `meta` says, as JSON."""

    identity: dict[str, Any]
    max_bytes: Annotated[int, msgspec.Meta(ge=tables.MIN_LIMIT, le=MAX_LIMIT)] | None
    id: Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{16}$")]


class Catalogue:
    """The open database of an index. Thread-safe: each statement by itself, or a transaction as a whole.

    Everything raises StoreError for a damaged database and StoreBusyError when another process keeps it locked; what
    writes raises OutputError for no space or no permission.
    """

    def __init__(self, path: Path, writable: bool) -> None:
        self.path = path
        self.writable = writable
        self.fork_lock = threading.RLock()  # around each use of a connection; a transaction holds it to its end
        self.writing = threading.RLock()  # one writing operation at a time; reading goes on meanwhile
        self._is_behind = False  # opened in a process of which this one is a forked child
        self._is_open = False
        self._writer: sqlite3.Connection | None = None
        self._db: sqlite3.Connection | None = None
        self._noting: sqlite3.Connection | None = None  # a reader's, for `touch` alone
        self._memory = Memory.load()
        self._sound: list[Any] | None = None  # stamp of the database when it was known to be sound
        try:
            with self._guarded():
                if writable:
                    self._writer = database.connect(path / LOCK, writing=True, wait_s=_WRITER_WAIT_S)
                    self._writer.execute("BEGIN EXCLUSIVE")
                else:
                    database.require_own(path / LOCK)
                self._db = database.connect(path / INDEX, writing=writable, wait_s=WAIT_S)
            self.check(whole=writable)  # a writer could make damage worse
            meta = self._meta()
        except BaseException:
            self.close()
            raise
        self.identity, self.max_bytes, self._id = meta.identity, meta.max_bytes, meta.id
        self._is_open = True
        forks.watch(self)

    @staticmethod
    def create(folder: Path, path: Path, values: Mapping[str, Any]) -> None:
        """Make the database of an empty index in `folder`, which is to become `path`."""
        try:
            (folder / LOCK).touch()
            db = database.connect(folder / INDEX, writing=True, wait_s=0)
            try:
                db.executescript(f"BEGIN; {tables.SCHEMA}")
                rows = [(name, json.dumps(value)) for name, value in values.items()]
                db.executemany("INSERT INTO meta VALUES (?, ?, ?)", [(*row, sum_of(*row)) for row in rows])
                db.execute("COMMIT")
            finally:
                db.close()
        except sqlite3.Error as error:
            raise _translated(path, error, writing=True) from error

    def after_fork(self) -> None:
        """Leave the connections to the parent: SQLite's must not be used in a child, nor closed there."""
        forks.abandon((self._db, self._noting, self._writer))
        self.fork_lock, self.writing = threading.RLock(), threading.RLock()
        self._is_behind |= self._db is not None
        self._db = self._noting = self._writer = None

    def close(self) -> None:
        """Let the files go, and remember that the database was sound."""
        if self._let_go():
            self._memory.save()

    def __del__(self) -> None:
        # One that nobody holds any more lets its files go; Python 3.13 would warn that it did not. The collector may
        # run inside another one's `save`, in this very thread: so nobody is waited for.
        if hasattr(self, "_sound") and self._let_go():
            self._memory.save(wait_s=0)

    def _let_go(self) -> bool:
        """Close the connections. Whether there is something new to remember."""
        with self.fork_lock:
            self._is_behind = False
            for connection in (self._noting, self._db, self._writer):
                if connection is not None:
                    connection.close()
            self._db = self._noting = self._writer = None
            place, sound, self._sound = str(self.path / INDEX), self._sound, None
        if sound is None or sys.is_finalizing() or self._memory.knows_file(place, sound):
            return False
        self._memory.remember_file(place, sound)
        return True

    # Connections and transactions

    def connection(self) -> sqlite3.Connection:
        """The connection that statements run on, to be used under `fork_lock`. Raises StoreError for a closed index."""
        if self._db is None and self._is_behind:
            self.writable = False  # the lock for writing is the parent's
            self._db = database.connect(self.path / INDEX, writing=False, wait_s=WAIT_S)
        if self._db is None:
            raise StoreError(f"{self.path}: this index has been closed. Open it again.")
        return self._db

    def must_write(self) -> None:
        """Raises StoreError where it is open for reading only."""
        if self._is_behind:
            raise StoreError(
                f"{self.path}: was opened before this process was forked, and may only be read here. Open it again "
                "once the parent has closed it."
            )
        if not self.writable:
            raise StoreError(f"{self.path}: opened for reading. Open it with writable=True.")

    @contextmanager
    def _guarded(self) -> Iterator[None]:
        try:
            yield
        except _SQLITE_RAISES as error:
            raise _translated(self.path, error, self.writable) from error

    def rows(self, query: str, *values: object) -> list[Any]:
        """All rows that a query finds."""
        with self.fork_lock:
            try:
                return self.connection().execute(query, values).fetchall()
            except _SQLITE_RAISES as error:
                if not (self._is_open and isinstance(error, sqlite3.Error) and database.needs_rollback(error)):
                    raise _translated(self.path, error, self.writable) from error
            with self._guarded():
                # The database was whole when this was opened: so the writer lived beside us, and this is no stranger's
                # journal.
                with suppress(sqlite3.Error):
                    database.connect(self.path / INDEX, writing=True, wait_s=WAIT_S).close()
                return self.connection().execute(query, values).fetchall()

    @contextmanager
    def transaction(self) -> Iterator[list[int]]:
        """Committed at the end, rolled back if anything goes wrong. Gives a list that then has the emptied segments.

        Segments with no more pieces are forgotten by then, so that their files may go.
        """
        emptied: list[int] = []
        with self.fork_lock, self._guarded(), self._committed(self.connection()):
            yield emptied
            empty = "pieces = 0 AND NOT EXISTS (SELECT 1 FROM pieces WHERE segment = number)"
            emptied += [number for (number,) in self.rows(f"SELECT number FROM segments WHERE {empty}")]
            if emptied:
                self.connection().execute(f"DELETE FROM segments WHERE {empty}")

    def vacuum(self) -> None:
        """Give the database's free pages back to the file system."""
        with self.fork_lock, self._guarded(), self._changing():
            self.connection().execute("VACUUM")

    @contextmanager
    def _committed(self, db: sqlite3.Connection) -> Iterator[None]:
        """A transaction: committed at the end, rolled back if anything goes wrong."""
        db.execute("BEGIN IMMEDIATE")
        try:
            with self._changing():
                yield
                db.execute("COMMIT")
        except BaseException:
            if db.in_transaction:
                db.execute("ROLLBACK")
            raise

    @contextmanager
    def _changing(self) -> Iterator[None]:
        """A sound database that only we change stays sound, and need not be looked at again for that."""
        is_sound = self._sound is not None and self._sound == _stamp(self.path / INDEX)
        self._sound = None
        yield
        self._sound = _stamp(self.path / INDEX) if is_sound else None

    def check(self, whole: bool) -> None:
        """Whether the database is ours, of our format, not cut off, and sound in all that it holds.

        The latter is looked at once per change, or now with `whole`.
        """
        place = self.path / INDEX
        stamp = _stamp(place)
        whole |= stamp != self._sound and not self._memory.knows_file(str(place), stamp)
        if self.rows("PRAGMA application_id")[0][0] != tables.APPLICATION:
            raise StoreError(f"{place}: not the database of an index, or damaged. Make the index again.")
        version = self.rows("PRAGMA user_version")[0][0]
        if version != (known := tables.FORMAT_VERSION):
            way = "Update m0kit" if version > known else "It is of an older m0kit: make the index again"
            raise StoreError(f"{self.path}: format version {version}; this m0kit reads {known}. {way}.")
        with self.fork_lock, self._guarded():
            database.require_schema(self.connection(), tables.SCHEMA)
        if self._is_cut_off() or (whole and not self.is_sound()):
            raise index_damaged(self.path)
        self._sound = stamp if stamp == _stamp(place) else None

    def _is_cut_off(self) -> bool:
        with self.fork_lock, self._guarded():
            db = self.connection()
            db.execute("BEGIN")  # nobody changes the file until it ends
            try:
                db.execute("SELECT 1 FROM meta").fetchone()
                ((pages,),), ((size,),) = (
                    db.execute(f"PRAGMA {what}").fetchall() for what in ("page_count", "page_size")
                )
                return size_of(self.path / INDEX) < int(pages * size)
            finally:
                if db.in_transaction:
                    db.execute("ROLLBACK")

    def is_sound(self) -> bool:
        """Whether the trees are, every piece has its segment and lies in it, and what was counted is so."""
        if self.rows("PRAGMA integrity_check(1)") != [("ok",)] or self.rows("PRAGMA foreign_key_check"):
            return False
        return not any(self.rows(query) for query in tables.UNSOUND)

    def _meta(self) -> _Meta:
        """The identity and the limit, as given to `create`, and the index's own id."""
        rows = self.rows("SELECT name, value, sum FROM meta LIMIT 10")
        try:
            values = {name: schema.parse(value) for name, value, total in rows if sum_of(name, value) == total}
            return schema.fitting(values, _Meta)
        except (ValueError, TypeError, AttributeError):
            raise index_damaged(self.path) from None

    # What it says

    def edition(self) -> str:
        """Of this very index; another one once an id came to mean something else, or nothing."""
        for (changes,) in self.rows("SELECT value FROM counts WHERE name = 'changes'"):
            return f"{self._id}.{changes}"
        raise index_damaged(self.path)

    def ids(self) -> list[str]:
        """Of all documents, in the order in which they were first added."""
        return [row[0] for row in self.rows("SELECT id FROM documents ORDER BY place")]

    def described(self, document_id: object) -> Described | None:
        """What is said of a document, if there is one."""
        try:
            if not isinstance(document_id, str) or len(document_id.encode()) > tables.MAX_NAME_BYTES:
                return None
        except UnicodeEncodeError:
            return None
        found = self.rows(f"SELECT {_DESCRIBED} FROM documents WHERE id = ?", document_id)
        return Described._make(found[0]) if found else None

    def all_described(self) -> Iterator[tuple[bool, bool, Described]]:
        """What is said of each document, behind whether there are a record and a content of it."""
        place = -(1 << 63)
        there = "EXISTS (SELECT 1 FROM pieces WHERE content = {} AND key = documents.{})"
        asked = f"place, {there.format(0, 'key')}, {there.format(1, 'content')}, {_DESCRIBED}"
        while rows := self.rows(f"SELECT {asked} FROM documents WHERE place > ? ORDER BY place LIMIT 1000", place):
            place = rows[-1][0]
            for _, has_record, has_content, *row in rows:
                yield bool(has_record), bool(has_content), Described._make(row)

    def owners(self, content: bool, key: bytes) -> tuple[str, ...]:
        """Ids of the documents that need a piece."""
        column = "content" if content else "key"
        rows = self.rows(f"SELECT id FROM documents WHERE {column} = ? ORDER BY place", key)
        return tuple(row[0] for row in rows)

    def num_ownerless(self) -> int:
        """Of contents that no document needs."""
        return int(self.rows(f"SELECT COUNT(*) FROM pieces WHERE {OWNERLESS}")[0][0])

    def piece(self, content: bool, key: bytes) -> Piece | None:
        """Where a piece lies, if there is one."""
        found = self.rows("SELECT * FROM pieces WHERE content = ? AND key = ?", content, key)
        return self._piece(found[0]) if found else None

    def _piece(self, row: Sequence[Any]) -> Piece:
        """A row of `pieces`, which has the types that it should have."""
        content, key, segment, start, size, crc, used, _ = row
        if not (
            type(key) is bytes
            and type(content) is type(segment) is type(start) is type(size) is type(crc) is int
            and type(used) is float
            and 0 <= start <= MAX_LIMIT
            and 0 <= size <= MAX_LIMIT
            and 0 < segment < MOST
        ):
            raise index_damaged(self.path)
        return Piece._make(row)

    def pieces(self, segment: int) -> list[Piece]:
        """In the order in which they lie."""
        rows = self.rows("SELECT * FROM pieces WHERE segment = ?", segment)
        return sorted(map(self._piece, rows), key=lambda piece: piece.start)

    def has_pieces(self, segment: int) -> bool:
        return bool(self.rows("SELECT 1 FROM pieces WHERE segment = ? LIMIT 1", segment))

    def segments(self, after: int = 0) -> list[tuple[int, int]]:
        """(number, size) of each with a number above `after`, in order."""
        return self.rows("SELECT number, size FROM segments WHERE number > ? ORDER BY number", after)

    def last_segment(self) -> tuple[int, int] | None:
        """(number, size) of the one with the highest number."""
        return next(iter(self.rows("SELECT number, size FROM segments ORDER BY number DESC LIMIT 1")), None)

    def highest_number(self) -> int:
        """That any segment has or had, as far as that can be told."""
        found = self.rows(
            "SELECT MAX(value) FROM counts WHERE name = 'segment' UNION ALL SELECT MAX(number) FROM segments "
            "UNION ALL SELECT MAX(segment) FROM pieces"
        )
        return max(row[0] or 0 for row in found)

    def dead(self) -> list[tuple[int, int]]:
        """(segment, dead bytes) where there are any, most first."""
        return self.rows("SELECT number, size - taken AS dead FROM segments WHERE dead > 0 ORDER BY dead DESC")

    def held(self, *columns: str) -> list[int]:
        """Of all segments together: sums of columns of their table."""
        sums = ", ".join(f"COALESCE(SUM({column}), 0)" for column in columns)
        return list(self.rows(f"SELECT {sums} FROM segments")[0])

    def kinds(self) -> dict[str, int]:
        """How many documents there are of each kind."""
        return dict(self.rows("SELECT name, value FROM counts WHERE name IN ('text', 'image') AND value > 0"))

    def uses(self) -> tuple[float | None, float | None]:
        """The oldest and the newest last use of a record, in seconds since 1970."""
        by_use = f"SELECT used FROM {RECORDS_BY_USE} ORDER BY warm {{0}}, used {{0}} LIMIT 1"
        oldest, newest = (next(iter(self.rows(by_use.format(way))), (None,))[0] for way in ("ASC", "DESC"))
        return oldest, newest

    def disk_bytes(self) -> int:
        """Of the segments and of the database's file."""
        return self.held("size")[0] + size_of(self.path / INDEX)

    # What changes it, in a transaction

    def touch(self, keys: Iterable[bytes]) -> None:
        """Note that records were used now, in a transaction of its own, or not if that would mean waiting."""
        rows = [(time.time(), key) for key in keys]
        with self.fork_lock:
            db = self.connection()
            with suppress(sqlite3.Error, UnicodeDecodeError):
                if self.writable:
                    db.execute(f"PRAGMA busy_timeout = {_TOUCH_WAIT_S * 1000:.0f}")
                else:
                    # Who has a journal is writing, or was killed, and rolling that back is a writer's.
                    if os.path.lexists(self.path / f"{INDEX}-journal"):
                        return
                    if self._noting is None:
                        self._noting = database.connect(self.path / INDEX, writing=True, wait_s=_TOUCH_WAIT_S)
                    db = self._noting
                try:
                    with self._committed(db):
                        db.executemany(_USE, rows)
                finally:
                    if self.writable:
                        db.execute(f"PRAGMA busy_timeout = {WAIT_S * 1000:.0f}")

    def publish(self, pieces: Iterable[Piece], ends: Mapping[int, int]) -> None:
        """Make pieces visible, in segments that end where is said."""
        db = self.connection()
        db.executemany(
            "INSERT INTO segments (number, size, mirror) VALUES (?, ?, -?) "
            "ON CONFLICT (number) DO UPDATE SET size = excluded.size, mirror = excluded.mirror",
            [(number, end, end) for number, end in ends.items()],
        )
        highest = "UPDATE counts SET value = ?, mirror = -? WHERE name = 'segment' AND value < ?"
        db.executemany(highest, [(number,) * 3 for number in ends])
        # Not "OR REPLACE", for which no trigger runs.
        changed = ", ".join(f"{name} = excluded.{name}" for name in Piece._fields[2:])
        db.executemany(
            f"INSERT INTO pieces VALUES (?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT (content, key) DO UPDATE SET {changed}",
            pieces,
        )

    def lengthen(self, ends: Iterable[tuple[int, int]]) -> None:
        """Count what lies behind the known end of segments, up to another end, as dead."""
        rows = [(end, end, number) for number, end in ends]
        self.connection().executemany("UPDATE segments SET size = ?, mirror = -? WHERE number = ?", rows)

    def describe(
        self, documents: Sequence[tuple[str, str, bytes, bytes, str]], used: Iterable[bytes], now: float
    ) -> None:
        """Add documents, of which all but the sum is given, or replace them; note that records were `used` now."""
        db = self.connection()
        replaced = [row for document_id, *_ in documents if (row := self.described(document_id)) is not None]
        changed = ", ".join(f"{name} = excluded.{name}" for name in Described._fields[1:])
        db.executemany(
            f"INSERT INTO documents ({_DESCRIBED}) VALUES (?, ?, ?, ?, ?, ?) ON CONFLICT (id) DO UPDATE SET {changed}",
            [(*fields, sum_of(*fields)) for fields in documents],
        )
        db.executemany(_USE, [(now, key) for key in used])
        self._drop_unneeded(replaced)

    def remove(self, ids: Iterable[str]) -> list[str]:
        """Remove documents, and records that no other document needs; return the ids that were not there."""
        gone, absent = [], []
        for document_id in dict.fromkeys(ids):
            if (row := self.described(document_id)) is None:
                absent.append(document_id)
            else:
                gone.append(row)
                self.connection().execute("DELETE FROM documents WHERE id = ?", (document_id,))
        self._drop_unneeded(gone)
        return absent

    def drop_records(self, keys: Iterable[bytes]) -> None:
        self.connection().executemany("DELETE FROM pieces WHERE content = 0 AND key = ?", [(key,) for key in keys])

    def drop_unused(self, excess: int, before: float | None) -> list[bytes]:
        """Drop records, least recently used first, that take `excess` bytes, and all last used before that time."""
        keys: list[bytes] = []
        by_use = f"SELECT key, size, used FROM {RECORDS_BY_USE} ORDER BY warm, used"
        for key, size, used in self.connection().execute(by_use):
            if excess <= 0 and (before is None or not used < before):
                break
            keys.append(key)
            excess -= room(size)
        self.drop_records(keys)
        return keys

    def _drop_unneeded(self, gone: Iterable[Described]) -> None:
        """Drop the records and contents of documents that are gone, unless others need them."""
        own = [row for row in gone if row.is_own]  # what a damaged row names may be another's
        for content, column in enumerate(("key", "content")):
            self.connection().executemany(
                f"DELETE FROM pieces WHERE content = {content} AND key = ? "
                f"AND NOT EXISTS (SELECT 1 FROM documents WHERE {column} = ?)",
                [(getattr(row, column),) * 2 for row in own],
            )

    def drop_ownerless(self) -> None:
        """Drop the contents that no document needs."""
        self.connection().execute(f"DELETE FROM pieces WHERE {OWNERLESS}")

    def cool(self, keep: Collection[bytes] = ()) -> None:
        """Mark the older half of what records take as cold, by last use, apart from `keep`."""
        db = self.connection()
        db.executemany(
            "UPDATE pieces SET warm = 1 WHERE content = 0 AND warm = 0 AND key = ?", [(key,) for key in keep]
        )
        taken, cold = db.execute("SELECT SUM(taken - fixed), SUM(cold) FROM segments").fetchone()
        missing = ((taken or 0) - self.room_of(keep)) / 2 - (cold or 0)
        marked: list[tuple[bytes]] = []
        if missing > 0:
            for key, size in db.execute(f"SELECT key, size FROM {RECORDS_BY_USE} AND warm = 1 ORDER BY used"):
                if key not in keep:
                    marked.append((key,))
                    missing -= room(size)
                if missing <= 0:
                    break
        db.executemany("UPDATE pieces SET warm = 0 WHERE content = 0 AND key = ?", marked)

    def coldest(self) -> tuple[int, set[bytes]]:
        """Of the segments that are at least half cold or dead the one left alone longest, and its cold records."""
        db = self.connection()
        found = db.execute("SELECT number, size, size - taken + cold FROM segments").fetchall()
        shares = {number: min(gain / max(size, 1), 0.5) for number, size, gain in found}
        most = max(shares.values(), default=0)
        if most <= 0:  # only asked when there is something to gain
            raise index_damaged(self.path)
        newest = "SELECT MAX(used) FROM pieces WHERE segment = ? AND warm = 0"
        uses = {n: db.execute(newest, (n,)).fetchone()[0] or 0.0 for n in shares if shares[n] == most}
        number = min(uses, key=lambda number: (uses[number], number))
        cold = db.execute("SELECT key FROM pieces WHERE segment = ? AND warm = 0", (number,))
        return number, {key for (key,) in cold}

    def room_of(self, keys: Collection[bytes]) -> int:
        """Bytes that these records take in segments."""
        find = "SELECT size FROM pieces WHERE content = 0 AND key = ?"
        return sum(room(size) for key in keys for (size,) in self.rows(find, key))


def sum_of(*parts: str | bytes) -> int:
    """A check over the fields of a row."""
    total = 0
    for part in parts:
        raw = part if isinstance(part, bytes) else part.encode()
        total = zlib.crc32(raw, total ^ len(raw))
    return total


def size_of(path: Path) -> int:
    """The file's size; -1 if there is none."""
    try:
        return os.lstat(path).st_size
    except OSError:
        return -1


def _stamp(path: Path) -> list[Any]:
    """What a file is like as long as nobody changes it; `m0kit.verified` remembers it for a database that is sound."""
    try:
        found = os.lstat(path)
    except OSError:
        return []
    return [f"index {tables.FORMAT_VERSION}", found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino]


def index_damaged(path: Path) -> StoreError:
    """What to say of a database that is not sound."""
    return StoreError(f"{path / INDEX}: the database is damaged. Bring it back from a copy, or make the index again.")


def _translated(path: Path, error: Exception, writing: bool) -> M0kitError:
    """SQLite's errors as ours."""
    if isinstance(error, MemoryError):
        return StoreError(f"{path / INDEX}: takes more memory to read than there is.")
    if isinstance(error, database.ForeignDatabaseError):
        return StoreError(f"{path}: is not used, since something in it is not as m0kit makes it. {error}.")
    if isinstance(error, sqlite3.Error) and database.needs_rollback(error):
        return StoreError(
            f"{path / INDEX}: a process was killed while it was writing to it, and what it left unfinished has to be "
            "rolled back. Opening it for writing does that and loses nothing: "
            f"`m0kit index prune {path} --unused-days 9999`."
        )
    code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_CORRUPT) & 0xFF
    if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
        return StoreBusyError(
            f"{path}: another process is writing to this index. Wait until it has finished or stop it, then try again; "
            "reading is possible meanwhile."
        )
    name = getattr(error, "sqlite_errorname", type(error).__name__)
    if code == sqlite3.SQLITE_FULL:
        return OutputError(f"{path}: the disk is full. Nothing is lost. Make room, then try again.")
    if code in (sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_PERM):
        if writing:
            return OutputError(
                f"{path}: cannot be written ({name}). Nothing is lost. "
                "See to it that there is room and that you may write there, then try again."
            )
        return StoreError(f"{path / INDEX}: cannot be read ({name}). See to it that you may read it.")
    return index_damaged(path)
