"""Keeps documents and their computed records on disk: files, durability, locking, limits. Knows nothing of models.

    index.sqlite            the truth: which documents and records there are, and where their bytes lie
    lock.sqlite             locked by the writer for as long as it is open; every system frees that with the process
    segments/000001.kv …    the bytes, only ever appended to; a number is never used for two segments

A *piece* is a record or a document's content (equal contents are kept once); it starts at a multiple of 4096 and has
a checksum that begins with its key, so that no other piece's bytes pass for it. Bytes are appended behind the end that
the database knows and flushed; then one transaction makes them visible. A segment that the database does not know was
left by a killed writer, and the next one removes it; what lies behind a known end it counts as dead, since nothing that
may be mapped is ever made shorter. Space comes back by rewriting: what a segment still holds is appended elsewhere, one
transaction points there, and the file goes; whoever has it mapped keeps its bytes.

With a limit (`max_bytes`) the folder never holds more, not for a moment. The database counts twice, because its
rollback journal may grow as large, and two segments (1/32 of the limit each) stay free: one for what is being
rewritten, one for what the database grows meanwhile. When room is needed, the older half of all record bytes, by
last use, is *cold*. Of the segments that are at least half cold or dead one always exists; the one left alone
longest is rewritten without its cold records. So no record is moved for less than its own size in return, and what
was used recently stays.

Nothing that is done for one document looks at all of them: triggers count what each segment holds, and a record is
marked as cold once for each use. Opening for writing reads the database once, to be sure of it; so does opening for
reading, once per change that it has not seen (`m0kit.verified`).

A folder may come from somebody else, or from a failing disk. The database is only used with exactly the tables below,
and no link is followed in the folder. What the trees of SQLite do not hold twice has a check of its own: a document's
row a sum, a number that nothing else tells its mirror. Each document is so read as what was written, or as damaged.

    with Store.create(folder, {"model": "…"}, max_bytes=20 << 30) as store:
        store.add([Document("a", "text", b"hello", key)], {key: [keys, values]})
    with Store.open(folder) as store:
        record = store.get(key)

In a forked child a store has a connection of its own, for reading only.
"""

import errno
import hashlib
import json
import mmap
import os
import re
import secrets
import sqlite3
import sys
import threading
import time
import zlib
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Self, TypeAlias
from weakref import WeakValueDictionary

import msgspec
import numpy as np
from numpy.typing import NDArray

from m0kit import database, forks, schema
from m0kit.errors import InputError, M0kitError, OutputError, RecordDamagedError, StoreBusyError, StoreError
from m0kit.files import destination, occupied, replacing, sync, sync_path
from m0kit.keeping import segments
from m0kit.keeping.segments import Segments
from m0kit.verified import Memory

FORMAT_VERSION = 3  # raised when an older m0kit could no longer read the folder rightly
INDEX, LOCK = "index.sqlite", "lock.sqlite"
SEGMENT_BYTES = 256 << 20  # rewriting one takes a second or so and as much free space
MIN_LIMIT = 4 << 20  # below that the database alone would crowd the records out
MAX_LIMIT = 1 << 60  # above every disk, and far from where whole numbers end
KEY_BYTES = 32
MAX_NAME_BYTES = 1 << 20  # of an id or a source, which stand in rows: longer than any path
_APPLICATION = 0x6D306B78  # "m0kx", in the database's header
_ALIGN = 4096
_WAIT_S = 600.0  # for another process's transaction: milliseconds, unless the machine is busy; guards against hanging
_WRITER_WAIT_S = 0.5  # for another process that is just trying; a writer stays for longer, and so does its lock
_TOUCH_WAIT_S = 0.05  # noting a use is not worth more
_GROWTH = 128 << 10  # of the database and its journal in one `add`: a split in every tree …
_GROWTH_PER_ROW = 8 << 10  # … and for each document or record, several times what was measured


def _held(row: str, sign: str) -> str:
    """SQL that counts a row of `pieces`, NEW or OLD, into its segment or out of it."""
    room = f"({row}.size + {_ALIGN - 1}) / {_ALIGN} * {_ALIGN}"
    counted = {
        "pieces": "1",
        "records": f"({row}.content = 0)",
        "live": f"{row}.size",
        "taken": room,
        "fixed": f"({row}.content = 1) * ({room})",
        "cold": f"({row}.warm = 0) * ({room})",
    }
    changes = ", ".join(f"{name} = {name} {sign} {value}" for name, value in counted.items())
    return f"UPDATE segments SET {changes} WHERE number = {row}.segment;"


_SCHEMA = f"""
CREATE TABLE meta (name TEXT PRIMARY KEY, value TEXT NOT NULL, sum INTEGER NOT NULL);
CREATE TABLE counts (
  name TEXT PRIMARY KEY,
  value INTEGER NOT NULL CHECK (typeof(value) = 'integer' AND value BETWEEN 0 AND {segments.MOST}),
  mirror INTEGER NOT NULL CHECK (mirror = -value)
);
-- documents of each kind; how often an id came to mean something else; the highest number that a segment has had
INSERT INTO counts VALUES ('text', 0, 0), ('image', 0, 0), ('changes', 0, 0), ('segment', 0, 0);
CREATE TABLE segments (
  number INTEGER PRIMARY KEY,
  size INTEGER NOT NULL CHECK (typeof(size) = 'integer' AND size BETWEEN 0 AND {MAX_LIMIT}),
  mirror INTEGER NOT NULL CHECK (mirror = -size),
  pieces INTEGER NOT NULL DEFAULT 0, -- in it
  records INTEGER NOT NULL DEFAULT 0, -- of them
  live INTEGER NOT NULL DEFAULT 0, -- bytes of pieces
  taken INTEGER NOT NULL DEFAULT 0, -- filled up to where the next one may start
  fixed INTEGER NOT NULL DEFAULT 0, -- of these, by contents
  cold INTEGER NOT NULL DEFAULT 0 -- of these, by cold records
);
CREATE INDEX segments_empty ON segments (number) WHERE pieces = 0;
CREATE TABLE pieces (
  content INTEGER NOT NULL CHECK (content IN (0, 1)),
  key BLOB NOT NULL CHECK (typeof(key) = 'blob' AND length(key) = {KEY_BYTES}),
  segment INTEGER NOT NULL REFERENCES segments (number),
  start INTEGER NOT NULL CHECK (typeof(start) = 'integer' AND start BETWEEN 0 AND {MAX_LIMIT}),
  size INTEGER NOT NULL CHECK (typeof(size) = 'integer' AND size BETWEEN 0 AND {MAX_LIMIT}),
  crc INTEGER NOT NULL CHECK (typeof(crc) = 'integer'), -- of its kind, its key and its bytes
  used REAL NOT NULL CHECK (typeof(used) = 'real' AND used BETWEEN 0 AND 1e11),
  warm INTEGER NOT NULL CHECK (warm = 1 OR (warm = 0 AND content = 0)),
  PRIMARY KEY (content, key)
) WITHOUT ROWID;
CREATE INDEX pieces_by_segment ON pieces (segment, warm, used);
CREATE INDEX records_by_use ON pieces (warm, used) WHERE content = 0;
CREATE TRIGGER piece_added AFTER INSERT ON pieces BEGIN {_held("NEW", "+")} END;
CREATE TRIGGER piece_dropped AFTER DELETE ON pieces BEGIN {_held("OLD", "-")} END;
CREATE TRIGGER piece_changed AFTER UPDATE ON pieces
WHEN OLD.segment <> NEW.segment OR OLD.size <> NEW.size OR OLD.warm <> NEW.warm
BEGIN {_held("OLD", "-")} {_held("NEW", "+")} END;
CREATE TABLE documents (
  place INTEGER PRIMARY KEY,
  id TEXT NOT NULL UNIQUE CHECK (typeof(id) = 'text' AND id <> ''),
  kind TEXT NOT NULL CHECK (kind IN ('text', 'image')),
  key BLOB NOT NULL CHECK (typeof(key) = 'blob' AND length(key) = {KEY_BYTES}),
  content BLOB NOT NULL CHECK (typeof(content) = 'blob'),
  source TEXT NOT NULL CHECK (typeof(source) = 'text'),
  sum INTEGER NOT NULL CHECK (typeof(sum) = 'integer') -- of all but its place
);
CREATE INDEX documents_by_key ON documents (key);
CREATE INDEX documents_by_content ON documents (content);
CREATE TRIGGER document_added AFTER INSERT ON documents
BEGIN UPDATE counts SET value = value + 1, mirror = mirror - 1 WHERE name = NEW.kind; END;
CREATE TRIGGER document_removed AFTER DELETE ON documents
BEGIN
  UPDATE counts SET value = value - 1, mirror = mirror + 1 WHERE name = OLD.kind;
  UPDATE counts SET value = value + 1, mirror = mirror - 1 WHERE name = 'changes';
END;
CREATE TRIGGER document_replaced AFTER UPDATE ON documents
WHEN OLD.kind <> NEW.kind OR OLD.key <> NEW.key OR OLD.content <> NEW.content
BEGIN
  UPDATE counts SET value = value - 1, mirror = mirror + 1 WHERE name = OLD.kind;
  UPDATE counts SET value = value + 1, mirror = mirror - 1 WHERE name IN ('changes', NEW.kind);
END;
PRAGMA application_id = {_APPLICATION};
PRAGMA user_version = {FORMAT_VERSION};
"""
_ROOM = f"(size + {_ALIGN - 1}) / {_ALIGN} * {_ALIGN}"
_CHECKS = {  # of each table: SQLite holds them against what a writer does, and not for who only reads
    table: " AND ".join(f"({check})" for check in re.findall(r"CHECK \((.*)\),?(?: --.*)?$", columns, re.MULTILINE))
    for table, columns in re.findall(r"CREATE TABLE (\w+) \(\n(.*?)^\)", _SCHEMA, re.MULTILINE | re.DOTALL)
}
# Each finds something only in a database that is not sound: pieces outside of their segment, and wrong counts.
_UNSOUND = (
    *(f"SELECT 1 FROM {table} WHERE ({checks}) IS NOT TRUE LIMIT 1" for table, checks in _CHECKS.items() if checks),
    "SELECT 1 FROM pieces JOIN segments ON number = segment "
    f"WHERE start % {_ALIGN} <> 0 OR start + pieces.size > segments.size LIMIT 1",
    "SELECT number, pieces, records, live, taken, fixed, cold FROM segments EXCEPT SELECT segment, COUNT(*), "
    f"SUM(content = 0), SUM(size), SUM({_ROOM}), SUM((content = 1) * ({_ROOM})), SUM((warm = 0) * ({_ROOM})) "
    "FROM pieces GROUP BY segment",
    "SELECT kind, COUNT(*) FROM documents GROUP BY kind "
    "EXCEPT SELECT name, value FROM counts WHERE name IN ('text', 'image')",
    "SELECT name, value FROM counts WHERE name IN ('text', 'image') AND value <> 0 "
    "EXCEPT SELECT kind, COUNT(*) FROM documents GROUP BY kind",
    "SELECT 1 FROM (SELECT group_concat(name) AS names FROM (SELECT name FROM counts ORDER BY name)) "
    "WHERE names <> 'changes,image,segment,text' OR names IS NULL",
)
# SQLite by itself would read all records and sort them.
_RECORDS_BY_USE = "pieces INDEXED BY records_by_use WHERE content = 0"
_OWNERLESS = "content = 1 AND NOT EXISTS (SELECT 1 FROM documents WHERE documents.content = pieces.key)"
_DESCRIBED = "id, kind, key, content, source, sum"  # all of a document but its place
# UnicodeDecodeError comes of a message that names what is damaged, MemoryError of a row that claims to be huge.
_SQLITE_RAISES = (sqlite3.Error, UnicodeDecodeError, MemoryError)

Buffer: TypeAlias = bytes | bytearray | memoryview | NDArray[Any]


@dataclass(frozen=True, slots=True)
class Document:
    """What a record was computed from. InputError if a field cannot be kept."""

    id: str  # unique in a store
    kind: Literal["text", "image"]
    data: bytes  # text in UTF-8, or a PNG
    key: bytes  # (32,) of the record that holds its state
    source: str = ""  # where it came from, for people

    def __post_init__(self) -> None:
        if not self.id or not isinstance(self.id, str):
            raise InputError(f"document id {self.id!r}: expected a text of at least one character.")
        if self.kind not in ("text", "image"):
            raise InputError(f'document {self.id!r}: kind {self.kind!r}, expected "text" or "image".')
        if len(self.key) != KEY_BYTES:
            raise InputError(f"document {self.id!r}: a key of {len(self.key)} bytes, expected {KEY_BYTES} (a sha256).")
        try:
            longest = max(len(self.id.encode()), len(self.source.encode()))
            if self.kind == "text":
                self.data.decode()
        except UnicodeError:
            raise InputError(f"document {self.id!r}: its id, source or text is not valid UTF-8.") from None
        if longest > MAX_NAME_BYTES:
            raise InputError(
                f"document {self.id!r}: its id or source has {longest} bytes, expected at most {MAX_NAME_BYTES}."
            )


@dataclass(frozen=True, slots=True)
class Pruned:
    """What `prune` did."""

    records: int
    freed_bytes: int  # given back to the file system


@dataclass(frozen=True, slots=True)
class Compacted:
    """What `compact` did."""

    freed_bytes: int  # given back to the file system
    damaged: Mapping[bytes, tuple[str, ...]]  # records that were damaged and are gone → ids of their documents


@dataclass(frozen=True, slots=True)
class Verified:
    """What `verify` found."""

    records: int  # read, the damaged ones among them
    damaged: Mapping[bytes, tuple[str, ...]]  # records that are not what was written → ids of their documents
    contents: tuple[str, ...]  # ids of documents whose own content, or what is said of them, is not what was written
    segments: tuple[str, ...]  # files that are missing or too short
    pending: tuple[str, ...]  # ids of documents without a record: no fault, it is to be computed
    lost: int  # contents whose documents are gone, though nobody removed them

    @property
    def clean(self) -> bool:
        """Whether all that was written is there."""
        return not (self.damaged or self.contents or self.segments or self.lost)


@dataclass(frozen=True, slots=True)
class Stats:
    """What a store holds."""

    documents: Mapping[str, int]  # by kind
    records: int
    live_bytes: int  # of records and contents
    dead_bytes: int  # in segments, given back by `compact` or when room is needed
    disk_bytes: int  # of all files
    max_bytes: int | None
    oldest_use: float | None  # of a record, seconds since 1970
    newest_use: float | None
    identity: Mapping[str, Any]


class _Meta(msgspec.Struct, forbid_unknown_fields=True):
    """What the table `meta` says, as JSON."""

    identity: dict[str, Any]
    max_bytes: Annotated[int, msgspec.Meta(ge=MIN_LIMIT, le=MAX_LIMIT)] | None
    id: Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{16}$")]


class _Piece(NamedTuple):
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
        return view is not None and zlib.crc32(view.data, _begun(self.content, self.key)) == self.crc


class _New(NamedTuple):
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


class Store:
    """Documents by id and records by key, in a folder. Made by `create` or `open`; a context manager; thread-safe.

    Everything raises StoreError for a damaged database and StoreBusyError when another process keeps it locked;
    what writes raises OutputError for no space or no permission, and StoreError on a store opened for reading.
    """

    def __init__(self, path: Path, writable: bool) -> None:
        self.path = path
        self.writable = writable
        self._lock = threading.RLock()  # around each use of the connection; a transaction holds it to its end
        self._writing = threading.RLock()  # one writing operation at a time; reading goes on meanwhile
        self._maps: WeakValueDictionary[int, mmap.mmap] = WeakValueDictionary()  # a map lives as long as its views
        self._whole: set[tuple[Any, ...]] = set()  # pieces, without `used` and `warm`, whose checksum was right
        self._segments = Segments(path)
        self._is_behind = False  # opened in a process of which this one is a forked child
        self._is_open = False
        self._is_swept = False
        self._writer: sqlite3.Connection | None = None
        self._db: sqlite3.Connection | None = None
        self._noting: sqlite3.Connection | None = None  # a reader's, for `touch` alone
        self._memory = Memory.load()
        self._sound: list[Any] | None = None  # stamp of the database when it was known to be sound
        try:
            with self._guarded():
                for name in (INDEX, LOCK):
                    database.require_own(path / name, writing=writable)
                if os.path.lexists(self._segments.folder):
                    self._segments.numbers()
                if writable:
                    # SQLite lets a reader "begin exclusively" and only complains later.
                    for place in (path, self._segments.folder, path / INDEX, path / LOCK):
                        _must_be_writable(place)
                    self._writer = database.connect(path / LOCK, writing=True, wait_s=_WRITER_WAIT_S)
                    self._writer.execute("BEGIN EXCLUSIVE")
                self._db = database.connect(path / INDEX, writing=writable, wait_s=_WAIT_S)
            self._check(whole=writable)  # a writer could make damage worse
            meta = self._meta()
            self.identity, self.max_bytes, self._id = meta.identity, meta.max_bytes, meta.id
            if writable:
                with suppress(M0kitError):  # on a full disk it must still be possible to remove something
                    self._sweep()
        except BaseException as error:
            self.close()
            if isinstance(error, OSError) and not isinstance(error, M0kitError):
                raise _unwritable(path, error) if writable else _unreadable(path, error) from error
            raise
        self._is_open = True
        forks.watch(self)
        limited = SEGMENT_BYTES if self.max_bytes is None else self.max_bytes // 32
        self._segment_bytes = min(SEGMENT_BYTES, limited)

    @classmethod
    def create(cls, path: str | Path, identity: Mapping[str, Any], max_bytes: int | None = None) -> Self:
        """Make a store and open it for writing. The folder must not exist, or be empty.

        `identity` (JSON) is kept for the caller to compare. Raises OutputError; StoreError for too small a limit.
        """
        path = destination(Path(path))
        if max_bytes is not None and not MIN_LIMIT <= max_bytes <= MAX_LIMIT:
            what = f"too small, expected at least {MIN_LIMIT}" if max_bytes < MIN_LIMIT else "larger than any disk"
            raise StoreError(f"{path}: a limit of {max_bytes} bytes is {what}.")
        values = {"identity": dict(identity), "max_bytes": max_bytes, "id": secrets.token_hex(8)}
        if occupied(path):
            raise OutputError(f"{path}: exists already. Open it, remove it, or give another folder.")
        # Made aside and renamed, so that a killed `create` leaves nothing that looks like a store.
        with replacing(path) as aside:
            try:
                (aside / segments.FOLDER).mkdir()
                (aside / LOCK).touch()
                db = database.connect(aside / INDEX, writing=True, wait_s=0)
                try:
                    db.executescript(f"BEGIN; {_SCHEMA}")
                    rows = [(name, json.dumps(value)) for name, value in values.items()]
                    db.executemany("INSERT INTO meta VALUES (?, ?, ?)", [(*row, _sum(*row)) for row in rows])
                    db.execute("COMMIT")
                finally:
                    db.close()
            except sqlite3.Error as error:
                raise _translated(path, error, writing=True) from error
            except OSError as error:
                raise _unwritable(path, error) from error
        return cls(path, writable=True)

    @classmethod
    def open(cls, path: str | Path, *, writable: bool = False) -> Self:
        """Open a store: any number of readers, with one writer beside them.

        Raises StoreError if there is none, it is damaged or of another format, or one that was killed while writing
        has to be rolled back by opening it for writing; StoreBusyError for a second writer. The database is looked at
        whole, for reading once per change that this machine has not seen.
        """
        path = Path(os.path.abspath(path))
        if not os.path.lexists(path / INDEX):
            what = f"there is no {INDEX}, so this is not an index" if os.path.isdir(path) else "no such folder"
            raise StoreError(f"{path}: {what}. Give the folder of an index, or make one.")
        return cls(path, writable)

    @property
    def fork_lock(self) -> threading.RLock:
        """Held over a fork, so that no thread is inside SQLite then."""
        return self._lock

    def after_fork(self) -> None:
        """Leave the connections to the parent: SQLite's must not be used in a child, nor closed there."""
        forks.abandon((self._db, self._noting, self._writer))
        self._lock, self._writing = threading.RLock(), threading.RLock()
        self._is_behind |= self._db is not None
        self._db = self._noting = self._writer = None

    def close(self) -> None:
        """Let the files go. Views that `get` gave stay valid."""
        with self._lock:
            self._is_behind = False
            for connection in (self._noting, self._db, self._writer):
                if connection is not None:
                    connection.close()
            self._db = self._noting = self._writer = None
            place, sound, self._sound = str(self.path / INDEX), self._sound, None
            if sound is not None and not sys.is_finalizing() and not self._memory.knows_file(place, sound):
                self._memory.remember_file(place, sound)
                self._memory.save()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        # One that nobody holds any more lets its files go; Python 3.13 would warn that it did not.
        if hasattr(self, "_sound"):
            self.close()

    # Reading

    def __len__(self) -> int:
        return int(self._rows("SELECT COALESCE(SUM(value), 0) FROM counts WHERE name IN ('text', 'image')")[0][0])

    @property
    def edition(self) -> str:
        """Of this very index, wherever it lies; another one once an id of a document means something else or nothing.

        A document with a new id, and what becomes of records, leave it as it is.
        """
        for (changes,) in self._rows("SELECT value FROM counts WHERE name = 'changes'"):
            return f"{self._id}.{changes}"
        raise _damaged(self.path)

    def ids(self) -> list[str]:
        """All ids, in the order in which they were first added."""
        return [row[0] for row in self._rows("SELECT id FROM documents ORDER BY place")]

    def document(self, document_id: str) -> Document | None:
        """The document with that id. Raises RecordDamagedError if it is not what was written."""
        before = None
        while rows := self._described(document_id):
            _, kind, key, content, source, _ = row = rows[0]
            if not _is_own(row):
                raise self._lost(document_id, "what it says of")
            if (data := self._load(True, content)) is not None:
                try:
                    return Document(document_id, kind, data.tobytes(), key, source)
                except InputError:
                    raise self._lost(document_id, "the content of") from None
            if row == before:  # otherwise it was replaced between the two looks
                raise self._lost(document_id, "the content of")
            before = row
        return None

    def content(self, document_id: str) -> bytes | None:
        """The sha256 of the data of the document with that id, without reading it; None if there is none.

        None also where what is said of the document is not what was written: adding it heals it.
        """
        return next((row[3] for row in self._described(document_id) if _is_own(row)), None)

    def _described(self, document_id: str) -> list[Any]:
        """What is said of a document, if there is one."""
        if not _may_be(document_id):
            return []
        return self._rows(f"SELECT {_DESCRIBED} FROM documents WHERE id = ?", document_id)

    def has(self, keys: Iterable[bytes]) -> set[bytes]:
        """Which of the records are there."""
        return {key for key in keys if self._rows("SELECT 1 FROM pieces WHERE content = 0 AND key = ?", key)}

    def get(self, key: bytes) -> NDArray[np.uint8] | None:
        """The record's bytes (N,), read-only and mapped, not copied; None if it is not there.

        Its checksum is verified once per process. Raises RecordDamagedError.
        """
        return self._load(False, key)

    def prefetch(self, keys: Iterable[bytes]) -> None:
        """Ask the system to read these records from the disk while something else is done. Best effort."""
        if not hasattr(mmap, "MADV_WILLNEED"):
            return
        for key in keys:
            for row in self._rows("SELECT * FROM pieces WHERE content = 0 AND key = ?", key):
                piece = self._piece(row)
                if piece.size and (mapped := self._mapped(piece)) is not None:
                    with suppress(OSError):  # where pages are larger than what pieces are aligned to
                        mapped.madvise(mmap.MADV_WILLNEED, piece.start, piece.size)

    def touch(self, keys: Iterable[bytes]) -> None:
        """Note that records were used now. A read-only or busy database is left alone: this only guides `prune`."""
        rows = [(time.time(), key) for key in keys]
        with self._lock:
            db = self._connection()
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
                        db.executemany("UPDATE pieces SET used = ?, warm = 1 WHERE content = 0 AND key = ?", rows)
                finally:
                    if self.writable:
                        db.execute(f"PRAGMA busy_timeout = {_WAIT_S * 1000:.0f}")

    def verify(self, progress: Callable[[int], object] = lambda _: None) -> Verified:
        """Read every piece; `progress` is told the bytes of each. Raises StoreError if the database is damaged.

        What a writer adds or moves meanwhile may be read, or read twice, or not.
        """
        self._check(whole=True)
        with self._lock:  # what was right, or long enough, may not be any more
            self._whole.clear()
            self._maps.clear()
        damaged: dict[bytes, tuple[str, ...]] = {}
        contents: dict[str, None] = {}
        short: list[str] = []
        records = number = 0
        # What is moved meanwhile goes to a higher number. A segment at a time: all pieces may be too many for memory.
        while rows := self._rows("SELECT number, size FROM segments WHERE number > ? ORDER BY number LIMIT 1", number):
            number, size = rows[0]
            for piece in self._pieces(number):
                records += not piece.content
                try:
                    self._load(bool(piece.content), piece.key)
                except RecordDamagedError:
                    owners = self._owners(bool(piece.content), piece.key)
                    if piece.content:
                        contents.update(dict.fromkeys(owners))
                    else:
                        damaged[piece.key] = owners
                progress(piece.size)
            is_short = self._segments.size(number) < size
            if is_short and self._rows("SELECT 1 FROM segments WHERE number = ?", number):
                short.append(self._segments.path(number).name)
        pending: list[str] = []
        place = -(1 << 63)
        there = "EXISTS (SELECT 1 FROM pieces WHERE content = {} AND key = documents.{})"
        asked = f"place, {there.format(0, 'key')}, {there.format(1, 'content')}, {_DESCRIBED}"
        while rows := self._rows(f"SELECT {asked} FROM documents WHERE place > ? ORDER BY place LIMIT 1000", place):
            place = rows[-1][0]
            for _, has_record, has_content, *row in rows:
                if not has_content or not _is_own(row):
                    contents[row[0]] = None
                if not has_record:
                    pending.append(row[0])
        lost = self._rows(f"SELECT COUNT(*) FROM pieces WHERE {_OWNERLESS}")[0][0]
        return Verified(records, damaged, tuple(contents), tuple(short), tuple(pending), lost)

    def stats(self) -> Stats:
        """What the store holds and how much space that takes."""
        kinds = dict(self._rows("SELECT name, value FROM counts WHERE name IN ('text', 'image') AND value > 0"))
        sums = "COALESCE(SUM(records), 0), COALESCE(SUM(live), 0), COALESCE(SUM(size - taken), 0)"
        records, live, dead = self._rows(f"SELECT {sums} FROM segments")[0]
        by_use = f"SELECT used FROM {_RECORDS_BY_USE} ORDER BY warm {{0}}, used {{0}} LIMIT 1"
        oldest, newest = (next(iter(self._rows(by_use.format(way))), (None,))[0] for way in ("ASC", "DESC"))
        files = [Path(folder, name) for folder, _, names in os.walk(self.path) for name in names]
        disk = sum(max(0, _size_of(path)) for path in files)
        return Stats(kinds, records, live, dead, disk, self.max_bytes, oldest, newest, self.identity)

    # Writing

    def add(self, documents: Sequence[Document], records: Mapping[bytes, Sequence[Buffer]]) -> int:
        """Add all or nothing, durably; return how many records had to go to keep to the limit.

        A record is its buffers, one after the other. One that is there is written again only if it is damaged; so
        is a document's content. A document whose id is there is replaced, and keeps its place. Raises StoreError
        if the limit leaves no room even without all other records, OutputError; the store stays usable.
        """
        self._must_write()
        for key in records:
            if len(key) != KEY_BYTES:
                raise StoreError(f"a record's key of {len(key)} bytes, expected {KEY_BYTES} (a sha256).")
        documents = list({document.id: document for document in documents}.values())
        contents = {document.id: hashlib.sha256(document.data).digest() for document in documents}
        now = time.time()
        with self._writing:
            self._sweep()
            new = [_New(True, contents[d.id], [memoryview(d.data)], now) for d in documents]
            new = list({piece.key: piece for piece in new}.values())
            new += [_New(False, key, [_bytes_of(b) for b in buffers], now) for key, buffers in records.items()]
            new = [piece for piece in new if not self._is_whole(piece.content, piece.key)]
            used = {*records, *(document.key for document in documents)}
            texts = sum(len(text.encode()) for d in documents for text in (d.id, d.source))
            growth = _GROWTH + _GROWTH_PER_ROW * (len(documents) + len(records)) + 4 * texts
            dropped = self._make_room(sum(_room(piece.size) for piece in new) + growth, used)
            with self._published(new) as db:
                find = f"SELECT {_DESCRIBED} FROM documents WHERE id = ?"
                replaced = [row for document in documents for row in db.execute(find, (document.id,)).fetchall()]
                described = [(d.id, d.kind, d.key, contents[d.id], d.source) for d in documents]
                db.executemany(
                    f"INSERT INTO documents ({_DESCRIBED}) VALUES (?, ?, ?, ?, ?, ?) "
                    "ON CONFLICT (id) DO UPDATE SET kind = excluded.kind, key = excluded.key, "
                    "content = excluded.content, source = excluded.source, sum = excluded.sum",
                    [(*row, _sum(*row)) for row in described],
                )
                touched = "UPDATE pieces SET used = ?, warm = 1 WHERE content = 0 AND key = ?"
                db.executemany(touched, [(now, key) for key in used])
                _drop_unneeded(db, _needs(replaced))
                if self.max_bytes is not None:
                    _cool(db)  # now, so that it is not much when room is needed
        return dropped

    def remove(self, ids: Iterable[str]) -> list[str]:
        """Remove documents, and records that no other document needs; return the ids that were not there."""
        self._must_write()
        if isinstance(ids, str | bytes | Mapping):
            raise InputError(f"ids: expected a list of ids, got {type(ids).__name__}. Put a single one into a list.")
        absent: list[str] = []
        with self._writing, self._transaction() as db:
            gone: list[Any] = []
            for document_id in dict.fromkeys(ids):
                row = self._described(document_id)
                if not row:
                    absent.append(document_id)
                    continue
                gone += row
                db.execute("DELETE FROM documents WHERE id = ?", (document_id,))
            _drop_unneeded(db, _needs(gone))
        return absent

    def prune(self, *, max_bytes: int | None = None, unused_days: float | None = None) -> Pruned:
        """Drop records, least recently used first: until the folder takes `max_bytes`, and all unused for so long.

        Documents stay: their records are computed again when asked for. Segments that hold nothing more go at once,
        others are rewritten as far as `max_bytes` asks for it.
        """
        self._must_write()
        with self._writing:
            with suppress(M0kitError):
                self._sweep()
            before = self._disk_bytes()
            excess = 0
            if max_bytes is not None:
                excess = before - sum(dead for _, dead in self._dead()) - max_bytes
            since = None if unused_days is None else time.time() - unused_days * 86400
            drop: list[bytes] = []
            with self._transaction() as db:
                for key, size, used in db.execute(f"SELECT key, size, used FROM {_RECORDS_BY_USE} ORDER BY warm, used"):
                    if excess <= 0 and (since is None or not used < since):
                        break
                    drop.append(key)
                    excess -= _room(size)
                _drop_records(db, drop)
            for number, _ in self._dead() if max_bytes is not None else ():  # what is rewritten has no dead bytes
                if max_bytes is None or self._disk_bytes() <= max_bytes:
                    break
                drop += self._rewrite(number)
            return Pruned(len(drop), max(0, before - self._disk_bytes()))

    def compact(self, progress: Callable[[int], object] = lambda _: None) -> Compacted:
        """Rewrite every segment that holds dead bytes, one at a time; `progress` is told the dead bytes of each.

        Damaged records are not carried over. Damaged contents are, as they are: only their document can say so.
        Contents whose documents are lost go.
        """
        self._must_write()
        damaged: dict[bytes, tuple[str, ...]] = {}
        with self._writing:
            with suppress(M0kitError):
                self._sweep()
            before = self._disk_bytes()
            with self._transaction() as db:
                db.execute(f"DELETE FROM pieces WHERE {_OWNERLESS}")
            # The newest first: what the others still hold is appended behind it, and should not move twice.
            for number, dead in sorted(self._dead(), reverse=True):
                for key in self._rewrite(number):
                    damaged[key] = self._owners(False, key)
                progress(dead)
            with suppress(StoreBusyError, OutputError), self._lock, self._guarded(), self._changing():
                self._connection().execute("VACUUM")
            return Compacted(max(0, before - self._disk_bytes()), damaged)

    # The database

    def _connection(self) -> sqlite3.Connection:
        if self._db is None and self._is_behind:
            self.writable = False  # the lock for writing is the parent's
            self._db = database.connect(self.path / INDEX, writing=False, wait_s=_WAIT_S)
        if self._db is None:
            raise StoreError(f"{self.path}: this index has been closed. Open it again.")
        return self._db

    @contextmanager
    def _guarded(self) -> Iterator[None]:
        try:
            yield
        except _SQLITE_RAISES as error:
            raise self._told(error) from error

    def _told(self, error: Exception) -> M0kitError:
        return _translated(self.path, error, self.writable)

    def _rows(self, query: str, *values: object) -> list[Any]:
        with self._lock:
            try:
                return self._connection().execute(query, values).fetchall()
            except sqlite3.OperationalError as error:
                if not (self._is_open and database.needs_rollback(error)):
                    raise self._told(error) from error
            except _SQLITE_RAISES as error:
                raise self._told(error) from error
            with self._guarded():
                # The database was whole when this was opened: so the writer lived beside us, and this is no stranger's
                # journal.
                with suppress(sqlite3.Error):
                    database.connect(self.path / INDEX, writing=True, wait_s=_WAIT_S).close()
                return self._connection().execute(query, values).fetchall()

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with self._lock, self._guarded():
            db = self._connection()
            with self._committed(db):
                yield db
                empty = "pieces = 0 AND NOT EXISTS (SELECT 1 FROM pieces WHERE segment = number)"
                emptied = db.execute(f"SELECT number FROM segments WHERE {empty}").fetchall()
                if emptied:
                    db.execute(f"DELETE FROM segments WHERE {empty}")
        for (number,) in emptied:
            with suppress(OSError, StoreError):  # Windows: still mapped
                self._segments.unlink(number)

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

    def _check(self, whole: bool) -> None:
        """Whether the database is ours, of our format, not cut off, and sound in all that it holds.

        The latter is looked at once per change, or now with `whole`.
        """
        place = self.path / INDEX
        stamp = _stamp(place)
        whole |= stamp != self._sound and not self._memory.knows_file(str(place), stamp)
        if self._rows("PRAGMA application_id")[0][0] != _APPLICATION:
            raise StoreError(f"{place}: not the database of an index, or damaged. Make the index again.")
        version = self._rows("PRAGMA user_version")[0][0]
        if version != FORMAT_VERSION:
            way = "Update m0kit" if version > FORMAT_VERSION else "It is of an older m0kit: make the index again"
            raise StoreError(f"{self.path}: format version {version}; this m0kit reads {FORMAT_VERSION}. {way}.")
        with self._lock, self._guarded():
            database.require_schema(self._connection(), _SCHEMA)
        if self._is_cut_off() or (whole and not self._is_sound()):
            raise _damaged(self.path)
        self._sound = stamp if stamp == _stamp(place) else None

    def _is_cut_off(self) -> bool:
        with self._lock, self._guarded():
            db = self._connection()
            db.execute("BEGIN")  # nobody changes the file until it ends
            try:
                db.execute("SELECT 1 FROM meta").fetchone()
                ((pages,),), ((size,),) = (
                    db.execute(f"PRAGMA {what}").fetchall() for what in ("page_count", "page_size")
                )
                return _size_of(self.path / INDEX) < int(pages * size)
            finally:
                if db.in_transaction:
                    db.execute("ROLLBACK")

    def _is_sound(self) -> bool:
        """Whether the trees are, every piece has its segment and lies in it, and what was counted is so."""
        if self._rows("PRAGMA integrity_check(1)") != [("ok",)] or self._rows("PRAGMA foreign_key_check"):
            return False
        return not any(self._rows(query) for query in _UNSOUND)

    def _meta(self) -> _Meta:
        """The identity and the limit, as given to `create`, and the index's own id."""
        rows = self._rows("SELECT name, value, sum FROM meta LIMIT 10")
        try:
            values = {name: schema.parse(value) for name, value, total in rows if _sum(name, value) == total}
            return schema.fitting(values, _Meta)
        except (ValueError, TypeError, AttributeError):
            raise _damaged(self.path) from None

    def _piece(self, row: Sequence[Any]) -> _Piece:
        """A row of `pieces`, which has the types that it should have."""
        content, key, segment, start, size, crc, used, _ = row
        if not (
            type(key) is bytes
            and type(content) is type(segment) is type(start) is type(size) is type(crc) is int
            and type(used) is float
            and 0 <= start <= MAX_LIMIT
            and 0 <= size <= MAX_LIMIT
            and 0 < segment < segments.MOST
        ):
            raise _damaged(self.path)
        return _Piece._make(row)

    def _pieces(self, segment: int) -> list[_Piece]:
        rows = self._rows("SELECT * FROM pieces WHERE segment = ?", segment)
        return sorted(map(self._piece, rows), key=lambda piece: piece.start)

    def _owners(self, content: bool, key: bytes) -> tuple[str, ...]:
        column = "content" if content else "key"
        rows = self._rows(f"SELECT id FROM documents WHERE {column} = ? ORDER BY place", key)
        return tuple(row[0] for row in rows)

    def _dead(self) -> list[tuple[int, int]]:
        """(segment, dead bytes) where there are any, most first."""
        return self._rows("SELECT number, size - taken AS dead FROM segments WHERE dead > 0 ORDER BY dead DESC")

    def _disk_bytes(self) -> int:
        segments = self._rows("SELECT COALESCE(SUM(size), 0) FROM segments")[0][0]
        return int(segments) + _size_of(self.path / INDEX)

    # The segments

    def _map(self, piece: _Piece) -> NDArray[np.uint8] | None:
        """The bytes of a piece; None if its segment is gone or too short."""
        if not piece.size:
            return np.empty(0, np.uint8)
        mapped = self._mapped(piece)
        return None if mapped is None else np.frombuffer(mapped, np.uint8, piece.size, piece.start)

    def _mapped(self, piece: _Piece) -> mmap.mmap | None:
        """The segment of a piece; None if it is gone or too short."""
        end = piece.start + piece.size
        with self._lock:
            mapped = self._maps.get(piece.segment)
            if mapped is None or len(mapped) < end:
                try:
                    mapped = self._segments.map(piece.segment, end)
                except OSError as error:
                    what = f"{self._segments.path(piece.segment)}: cannot be read: {error.strerror}."
                    raise StoreError(what) from error
                if mapped is not None:
                    self._maps[piece.segment] = mapped
        return mapped

    def _load(self, content: bool, key: bytes) -> NDArray[np.uint8] | None:
        before = None
        while rows := self._rows("SELECT * FROM pieces WHERE content = ? AND key = ?", content, key):
            place = rows[0][:6]
            is_known = place in self._whole
            piece = _Piece._make(rows[0]) if is_known else self._piece(rows[0])
            view = self._map(piece)
            if view is not None and (is_known or piece.fits(view)):
                self._whole.add(place)
                return view
            if place == before:
                raise RecordDamagedError(self._complaint(piece))
            # A writer may have moved it between the two looks, or its number may stand for another file by now.
            before = place
            with self._lock:
                self._maps.pop(piece.segment, None)
        return None

    def _lost(self, document_id: str, what: str) -> RecordDamagedError:
        return RecordDamagedError(
            f"{self.path / INDEX}: {what} document {document_id!r} is not what was written. Add the document again."
        )

    def _complaint(self, piece: _Piece) -> str:
        owners = self._owners(piece.content, piece.key)
        names = ", ".join(map(repr, owners[:5])) + (f" and {len(owners) - 5} more" if len(owners) > 5 else "")
        what = "the content" if piece.content else f"record {piece.key.hex()[:12]}"
        of = f" of {'documents' if len(owners) > 1 else 'document'} {names}" if owners else ""
        return (
            f"{self._segments.path(piece.segment)}: {what}{of} is not what was written (missing, cut off or changed). "
            "Add the document again: what is damaged is then written anew. "
            "If there is more of it, check the disk."
        )

    def _is_whole(self, content: bool, key: bytes) -> bool:
        try:
            return self._load(content, key) is not None
        except RecordDamagedError:
            return False

    def _must_write(self) -> None:
        if self._is_behind:
            raise StoreError(
                f"{self.path}: was opened before this process was forked, and may only be read here. Open it again "
                "once the parent has closed it."
            )
        if not self.writable:
            raise StoreError(f"{self.path}: opened for reading. Open it with writable=True.")

    def _sweep(self) -> None:
        """Make what is on the disk agree with the database, after another writer or a failed operation.

        Segments that it does not know go; what lies behind the end of others is dead bytes of theirs. What cannot go
        (Windows: still mapped) is left for the next time.
        """
        if self._is_swept:
            return
        longer = self._remove_unknown()
        if longer:
            with self._transaction() as db:
                db.executemany("UPDATE segments SET size = ?2, mirror = -?2 WHERE number = ?1", longer)
        self._is_swept = True

    def _remove_unknown(self) -> list[tuple[int, int]]:
        """Remove the segments that the database does not know; of those longer than it knows number and size."""
        known = dict(self._rows("SELECT number, size FROM segments"))
        longer: list[tuple[int, int]] = []
        try:
            numbers = self._segments.numbers()
        except OSError as error:
            raise _unwritable(self.path, error) from error
        for number in numbers:
            if number in known:
                if (size := self._segments.size(number)) > known[number]:
                    longer.append((number, size))
            elif not self._rows("SELECT 1 FROM pieces WHERE segment = ? LIMIT 1", number):
                with suppress(OSError):
                    self._segments.unlink(number)
        return longer

    @contextmanager
    def _published(self, new: Sequence[_New], fresh: bool = False) -> Iterator[sqlite3.Connection]:
        """Append and flush, then a transaction that makes the pieces visible; the body adds to it."""
        try:
            try:
                pieces, ends = self._append(new, fresh)
            except M0kitError:  # some of ours are OSErrors too
                raise
            except OSError as error:
                raise _unwritable(self.path, error) from error
            with self._transaction() as db:
                db.executemany(
                    "INSERT INTO segments (number, size, mirror) VALUES (?1, ?2, -?2) "
                    "ON CONFLICT (number) DO UPDATE SET size = excluded.size, mirror = excluded.mirror",
                    ends.items(),
                )
                highest = "UPDATE counts SET value = ?1, mirror = -?1 WHERE name = 'segment' AND value < ?1"
                db.executemany(highest, [(number,) for number in ends])
                # Not "OR REPLACE", for which no trigger runs.
                changed = ", ".join(f"{name} = excluded.{name}" for name in _Piece._fields[2:])
                db.executemany(
                    "INSERT INTO pieces VALUES (?, ?, ?, ?, ?, ?, ?, ?) "
                    f"ON CONFLICT (content, key) DO UPDATE SET {changed}",
                    pieces,
                )
                yield db
        except BaseException:
            self._is_swept = False
            with suppress(M0kitError):  # no transaction now, which may fail as well: the next operation counts the rest
                self._remove_unknown()
            raise

    def _append(self, new: Sequence[_New], fresh: bool) -> tuple[list[_Piece], dict[int, int]]:
        """Write pieces behind the known end and flush: where each lies, and the new end of each segment.

        `fresh` begins a new segment. So does a segment that is not as long as it should be: it is damaged.
        """
        pieces: list[_Piece] = []
        ends: dict[int, int] = {}
        if not new:
            return pieces, ends
        known = self._rows("SELECT number, size FROM segments ORDER BY number DESC LIMIT 1")
        number, end = known[0] if known else (0, 0)
        is_new = fresh or not known or self._segments.size(number) != end
        end = _room(end)  # after what a killed writer left
        left = deque(new)
        while left:
            is_new |= end > 0 and end + _room(left[0].size) > self._segment_bytes
            if is_new:
                number, end = self._unused_number(), 0
            with self._segments.appending(number, new=is_new) as file:
                file.seek(end)
                while left and (end == 0 or end + _room(left[0].size) <= self._segment_bytes):
                    item = left.popleft()
                    start, crc = end, _begun(item.content, item.key)
                    for buffer in item.buffers:
                        crc = zlib.crc32(buffer, crc)
                        _write(file, buffer)
                    _write(file, memoryview(bytes(_room(item.size) - item.size)))
                    crc = crc if item.crc is None else item.crc
                    pieces.append(_Piece(item.content, item.key, number, start, item.size, crc, item.used, item.warm))
                    end += _room(item.size)
                    ends[number] = end
                sync(file.fileno())
            is_new = True
        sync_path(self._segments.folder)
        return pieces, ends

    def _unused_number(self) -> int:
        """Higher than that of any segment there is or was, as far as that can be told."""
        found = self._rows(
            "SELECT MAX(value) FROM counts WHERE name = 'segment' UNION ALL SELECT MAX(number) FROM segments "
            "UNION ALL SELECT MAX(segment) FROM pieces"
        )
        number = 1 + max(0, *self._segments.numbers(), *(row[0] or 0 for row in found))
        if number >= segments.MOST:
            raise _damaged(self.path)
        return number

    def _rewrite(self, number: int, drop: Collection[bytes] = ()) -> list[bytes]:
        """Append what the segment still holds elsewhere, without the records to `drop`, and let it go.

        Returns the keys of damaged records: they are dropped too.
        """
        new: list[_New] = []
        lost: list[bytes] = []
        for piece in self._pieces(number):
            if not piece.content and piece.key in drop:
                continue
            view = self._map(piece)
            if not piece.content and not piece.fits(view):
                lost.append(piece.key)
                continue
            crc = piece.crc
            if view is None:  # nothing in the place of a content that is missing, and nothing that fits
                view = np.empty(0, np.uint8)
                crc = _begun(True, piece.key) ^ 1
            new.append(_New(piece.content, piece.key, [_bytes_of(view)], piece.used, piece.warm, crc))
        newest = self._rows("SELECT MAX(number) FROM segments")[0][0]
        with self._published(new, fresh=number == newest) as db:
            _drop_records(db, [*drop, *lost])
        if self._rows("SELECT 1 FROM segments WHERE number = ?", number):  # it should be empty now, and so gone
            raise _damaged(self.path)
        return lost

    def _make_room(self, need: int, keep: Collection[bytes]) -> int:
        """Bring the store down to where `need` more bytes keep the limit; return how many records went for it."""
        if self.max_bytes is None:
            return 0
        budget = self.max_bytes - 2 * self._segment_bytes
        counted_twice = _size_of(self.path / INDEX)
        fixed = self._rows("SELECT COALESCE(SUM(fixed), 0) FROM segments")[0][0] + 2 * counted_twice
        fixed += self._room_of(keep)
        if fixed + need > budget:
            raise StoreError(
                f"{self.path}: {need} bytes cannot be added: the limit is {self.max_bytes}, of which "
                f"{2 * self._segment_bytes} are for rewriting and {fixed} are taken by what must stay. "
                "Add less at once, remove documents, or make an index with a higher limit."
            )
        dropped = 0
        # Each turn gives back a record at least, or what was dead in a segment; only damaged counts go on for longer.
        turns = self._rows("SELECT COALESCE(SUM(records), 0) + COUNT(*) FROM segments")[0][0]
        while self._disk_bytes() + counted_twice + need > budget:
            if turns < 0:
                raise _damaged(self.path)
            turns -= 1
            number, cold = self._victim(keep)
            dropped += len(cold) + len(self._rewrite(number, cold))
            counted_twice = _size_of(self.path / INDEX)
        return dropped

    def _room_of(self, keys: Collection[bytes]) -> int:
        find = "SELECT size FROM pieces WHERE content = 0 AND key = ?"
        return sum(_room(size) for key in keys for (size,) in self._rows(find, key))

    def _victim(self, keep: Collection[bytes]) -> tuple[int, set[bytes]]:
        """The segment to rewrite when room is needed, and its cold records (see above)."""
        with self._transaction() as db:  # readers note uses, and so does this
            _cool(db, keep, self._room_of(keep))
            found = db.execute("SELECT number, size, size - taken + cold FROM segments").fetchall()
            shares = {number: min(gain / max(size, 1), 0.5) for number, size, gain in found}
            most = max(shares.values(), default=0)
            if most <= 0:  # only asked when there is something to gain
                raise _damaged(self.path)
            newest = "SELECT MAX(used) FROM pieces WHERE segment = ? AND warm = 0"
            uses = {n: db.execute(newest, (n,)).fetchone()[0] or 0.0 for n in shares if shares[n] == most}
            number = min(uses, key=lambda number: (uses[number], number))
            cold = db.execute("SELECT key FROM pieces WHERE segment = ? AND warm = 0", (number,))
            return number, {key for (key,) in cold}


def _cool(db: sqlite3.Connection, keep: Collection[bytes] = (), kept: int = 0) -> None:
    """Mark the older half of what records take as cold, by last use, apart from `keep`, which takes `kept` bytes."""
    db.executemany("UPDATE pieces SET warm = 1 WHERE content = 0 AND warm = 0 AND key = ?", [(key,) for key in keep])
    taken, cold = db.execute("SELECT SUM(taken - fixed), SUM(cold) FROM segments").fetchone()
    missing = ((taken or 0) - kept) / 2 - (cold or 0)
    marked: list[tuple[bytes]] = []
    if missing > 0:
        for key, size in db.execute(f"SELECT key, size FROM {_RECORDS_BY_USE} AND warm = 1 ORDER BY used"):
            if key not in keep:
                marked.append((key,))
                missing -= _room(size)
            if missing <= 0:
                break
    db.executemany("UPDATE pieces SET warm = 0 WHERE content = 0 AND key = ?", marked)


def _drop_records(db: sqlite3.Connection, keys: Iterable[bytes]) -> None:
    db.executemany("DELETE FROM pieces WHERE content = 0 AND key = ?", [(key,) for key in keys])


def _needs(described: Iterable[Sequence[Any]]) -> list[tuple[bytes, bytes]]:
    """Keys of the record and the content that documents had; what a damaged row names may be another's."""
    return [(row[2], row[3]) for row in described if _is_own(row)]


def _drop_unneeded(db: sqlite3.Connection, gone: Sequence[tuple[bytes, bytes]]) -> None:
    """Drop the records and contents of documents that are gone, unless others need them."""
    for position, column in enumerate(("key", "content")):
        db.executemany(
            f"DELETE FROM pieces WHERE content = {position} AND key = ?1 "
            f"AND NOT EXISTS (SELECT 1 FROM documents WHERE {column} = ?1)",
            [(pair[position],) for pair in gone],
        )


def _sum(*parts: str | bytes) -> int:
    """A check over the fields of a row."""
    total = 0
    for part in parts:
        raw = part if isinstance(part, bytes) else part.encode()
        total = zlib.crc32(raw, total ^ len(raw))
    return total


def _is_own(described: Sequence[Any]) -> bool:
    """Whether what is said of a document (`_DESCRIBED`) is what was written."""
    name, kind, key, content, source, total = described
    if not (type(name) is type(kind) is type(source) is str and type(key) is type(content) is bytes):
        return False
    return bool(_sum(name, kind, key, content, source) == total)


def _begun(content: bool, key: bytes) -> int:
    """The checksum of a piece before its bytes: of its kind and its key."""
    return zlib.crc32(key, 1 + content)


def _may_be(document_id: object) -> bool:
    """Whether there may be a document with that id."""
    try:
        return isinstance(document_id, str) and len(document_id.encode()) <= MAX_NAME_BYTES
    except UnicodeEncodeError:
        return False


def _stamp(path: Path) -> list[Any]:
    """What a file is like as long as nobody changes it; `m0kit.verified` remembers it for a database that is sound."""
    try:
        found = os.lstat(path)
    except OSError:
        return []
    return [f"index {FORMAT_VERSION}", found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino]


def _room(size: int) -> int:
    """The bytes that a piece of `size` takes in a segment."""
    return -(-size // _ALIGN) * _ALIGN


def _bytes_of(buffer: Buffer) -> memoryview:
    if isinstance(buffer, bytes | bytearray):
        return memoryview(buffer)
    return np.ascontiguousarray(buffer).reshape(-1).view(np.uint8).data


def _write(file: Any, data: memoryview) -> None:
    while data.nbytes:
        data = data[file.write(data) :]


def _size_of(path: Path) -> int:
    """The file's size; -1 if there is none."""
    try:
        return os.lstat(path).st_size
    except OSError:
        return -1


def _must_be_writable(path: Path) -> None:
    if os.path.exists(path) and not os.access(path, os.W_OK):
        raise _unwritable(path, PermissionError(errno.EACCES, ""))


def _damaged(path: Path) -> StoreError:
    return StoreError(f"{path / INDEX}: the database is damaged. Bring it back from a copy, or make the index again.")


def _unwritable(path: Path, error: OSError) -> OutputError:
    full = error.errno in (errno.ENOSPC, errno.EFBIG, getattr(errno, "EDQUOT", None))
    advice = "Make room" if full else "See to it that you may write there"
    what = error.strerror or os.strerror(error.errno or 0)
    return OutputError(f"{path}: cannot be written: {what}. Nothing is lost. {advice}, then try again.")


def _unreadable(path: Path, error: OSError) -> StoreError:
    return StoreError(f"{error.filename or path}: cannot be read: {error.strerror}. See to it that you may read it.")


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
    return _damaged(path)
