"""Keeps documents and their computed records on disk: files, durability, locking, limits. Knows nothing of models.

    index.sqlite            the truth: which documents and records there are, and where their bytes lie
    lock.sqlite             locked by the writer for as long as it is open; every system frees that with the process
    segments/000001.kv …    the bytes, only ever appended to; a number is never used for two segments

A *piece* is a record or a document's content (equal contents are kept once); it starts at a multiple of 4096 and has
a checksum. Bytes are appended behind the end that the database knows and flushed; then one transaction makes them
visible. What lies behind that end, or in a segment that the database does not know, was left by a killed writer:
the next one sweeps it away. Space comes back by rewriting: what a segment still holds is appended elsewhere, one
transaction points there, and the file goes; whoever has it mapped keeps its bytes.

With a limit (`max_bytes`) the folder never holds more, not for a moment. The database counts twice, because its
rollback journal may grow as large, and two segments (1/32 of the limit each) stay free: one for what is being
rewritten, one for what the database grows meanwhile. When room is needed, the older half of all record bytes, by
last use, is *cold*. Of the segments that are at least half cold or dead one always exists; the one left alone
longest is rewritten without its cold records. So no record is moved for less than its own size in return, and what
was used recently stays.

Nothing that is done for one document looks at all of them: triggers count what each segment holds, and a record is
marked as cold once for each use. Opening for writing reads the database once, to be sure of it; for reading, while it
is small.

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
import threading
import time
import zlib
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self, TypeAlias
from weakref import WeakValueDictionary

import numpy as np
from numpy.typing import NDArray

from m0kit import forks
from m0kit.errors import InputError, M0kitError, OutputError, RecordDamagedError, StoreBusyError, StoreError
from m0kit.files import destination, occupied, replacing, sync, sync_path

FORMAT_VERSION = 2  # raised when an older m0kit could no longer read the folder rightly
INDEX, LOCK, SEGMENTS = "index.sqlite", "lock.sqlite", "segments"
SEGMENT_BYTES = 256 << 20  # rewriting one takes a second or so and as much free space
MIN_LIMIT = 4 << 20  # below that the database alone would crowd the records out
KEY_BYTES = 32
_APPLICATION = 0x6D306B78  # "m0kx", in the database's header
_ALIGN = 4096
_WAIT_S = 600.0  # for another process's transaction: milliseconds, unless the machine is busy; guards against hanging
_WRITER_WAIT_S = 0.5  # for another process that is just trying; a writer stays for longer, and so does its lock
_TOUCH_WAIT_MS = 50  # noting a use is not worth more
_CHECKED_BYTES = 4 << 20  # a database up to that size is looked at whole when it is opened for reading: 30 ms
_GROWTH = 128 << 10  # of the database and its journal in one `add`: a split in every tree …
_GROWTH_PER_ROW = 8 << 10  # … and for each document or record, several times what was measured
_SEGMENT_NAME = re.compile(r"(\d{6,})\.kv")


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
CREATE TABLE meta (name TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE counts (name TEXT PRIMARY KEY, value INTEGER NOT NULL CHECK (typeof(value) = 'integer'));
INSERT INTO counts VALUES ('text', 0), ('image', 0), ('changes', 0);
CREATE TABLE segments (
  number INTEGER PRIMARY KEY AUTOINCREMENT,
  size INTEGER NOT NULL CHECK (typeof(size) = 'integer'),
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
  start INTEGER NOT NULL CHECK (typeof(start) = 'integer'),
  size INTEGER NOT NULL CHECK (typeof(size) = 'integer' AND size >= 0),
  crc INTEGER NOT NULL CHECK (typeof(crc) = 'integer'),
  used REAL NOT NULL CHECK (typeof(used) = 'real'),
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
  place INTEGER PRIMARY KEY AUTOINCREMENT,
  id TEXT NOT NULL UNIQUE CHECK (typeof(id) = 'text' AND id <> ''),
  kind TEXT NOT NULL CHECK (kind IN ('text', 'image')),
  key BLOB NOT NULL CHECK (typeof(key) = 'blob' AND length(key) = {KEY_BYTES}),
  content BLOB NOT NULL CHECK (typeof(content) = 'blob'),
  source TEXT NOT NULL CHECK (typeof(source) = 'text')
);
CREATE INDEX documents_by_key ON documents (key);
CREATE INDEX documents_by_content ON documents (content);
CREATE TRIGGER document_added AFTER INSERT ON documents
BEGIN UPDATE counts SET value = value + 1 WHERE name = NEW.kind; END;
CREATE TRIGGER document_removed AFTER DELETE ON documents
BEGIN
  UPDATE counts SET value = value - 1 WHERE name = OLD.kind;
  UPDATE counts SET value = value + 1 WHERE name = 'changes';
END;
CREATE TRIGGER document_replaced AFTER UPDATE ON documents
WHEN OLD.kind <> NEW.kind OR OLD.key <> NEW.key OR OLD.content <> NEW.content
BEGIN
  UPDATE counts SET value = value - 1 WHERE name = OLD.kind;
  UPDATE counts SET value = value + 1 WHERE name IN ('changes', NEW.kind);
END;
PRAGMA application_id = {_APPLICATION};
PRAGMA user_version = {FORMAT_VERSION};
"""
# SQLite by itself would read all records and sort them.
_RECORDS_BY_USE = "pieces INDEXED BY records_by_use WHERE content = 0"

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
            (self.id + self.source).encode()
            if self.kind == "text":
                self.data.decode()
        except UnicodeError:
            raise InputError(f"document {self.id!r}: its id, source or text is not valid UTF-8.") from None


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
    contents: tuple[str, ...]  # ids of documents whose own content is not what was written
    segments: tuple[str, ...]  # files that are missing or too short
    pending: tuple[str, ...]  # ids of documents without a record: no fault, it is to be computed

    @property
    def clean(self) -> bool:
        """Whether all that was written is there."""
        return not (self.damaged or self.contents or self.segments)


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


class _Piece(NamedTuple):
    """A row of `pieces`: where a piece lies."""

    content: bool
    key: bytes
    segment: int
    start: int
    size: int
    crc: int
    used: float  # seconds since 1970
    warm: int  # 0 for a record that has to go first when room is needed


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
        self._whole: set[tuple[int, int, int]] = set()  # (segment, start, size) of pieces whose checksum was right
        self._is_behind = False  # opened in a process of which this one is a forked child
        self._writer: sqlite3.Connection | None = None
        self._db: sqlite3.Connection | None = None
        try:
            with self._guarded():
                if writable:
                    # SQLite lets a reader "begin exclusively" and only complains later.
                    for place in (path, path / SEGMENTS, path / INDEX, path / LOCK):
                        _must_be_writable(place)
                    self._writer = _connect(path / LOCK, "rwc", _WRITER_WAIT_S)
                    self._writer.execute("BEGIN EXCLUSIVE")
                # SQLite falls back to reading where writing is not allowed; where it is, even a reader must be
                # able to roll a killed writer's transaction back.
                self._db = _connect(path / INDEX, "rw", _WAIT_S)
            # A writer could make damage worse; a reader meets it, or `verify` does.
            self._check(whole=writable or _size_of(path / INDEX) <= _CHECKED_BYTES)
            self.identity, self.max_bytes, self._id = self._meta()
            if writable:
                self._sweep()
        except BaseException:
            self.close()
            raise
        forks.watch(self)
        limited = SEGMENT_BYTES if self.max_bytes is None else self.max_bytes // 32
        self._segment_bytes = min(SEGMENT_BYTES, limited)

    @classmethod
    def create(cls, path: str | Path, identity: Mapping[str, Any], max_bytes: int | None = None) -> Self:
        """Make a store and open it for writing. The folder must not exist, or be empty.

        `identity` (JSON) is kept for the caller to compare. Raises OutputError; StoreError for too small a limit.
        """
        path = destination(Path(path))
        if max_bytes is not None and max_bytes < MIN_LIMIT:
            raise StoreError(f"{path}: a limit of {max_bytes} bytes is too small, expected at least {MIN_LIMIT}.")
        values = {"identity": dict(identity), "max_bytes": max_bytes, "id": secrets.token_hex(8)}
        if occupied(path):
            raise OutputError(f"{path}: exists already. Open it, remove it, or give another folder.")
        # Made aside and renamed, so that a killed `create` leaves nothing that looks like a store.
        with replacing(path) as aside:
            try:
                (aside / SEGMENTS).mkdir()
                (aside / LOCK).touch()
                db = _connect(aside / INDEX, "rwc", 0)
                try:
                    db.executescript(f"BEGIN; {_SCHEMA}")
                    db.executemany("INSERT INTO meta VALUES (?, ?)", ((n, json.dumps(v)) for n, v in values.items()))
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

        Raises StoreError if there is none, it is damaged or of another format; StoreBusyError for a second writer.
        For reading a database of more than 4 MiB is not looked at whole: `verify` does that, and damage that is met is
        an error.
        """
        path = Path(os.path.abspath(path))
        if not os.path.isfile(path / INDEX):
            what = f"there is no {INDEX}, so this is not an index" if os.path.isdir(path) else "no such folder"
            raise StoreError(f"{path}: {what}. Give the folder of an index, or make one.")
        return cls(path, writable)

    @property
    def fork_lock(self) -> threading.RLock:
        """Held over a fork, so that no thread is inside SQLite then."""
        return self._lock

    def after_fork(self) -> None:
        """Leave the connections to the parent: SQLite's must not be used in a child, nor closed there."""
        forks.abandon((self._db, self._writer))
        self._lock, self._writing = threading.RLock(), threading.RLock()
        self._is_behind |= self._db is not None
        self._db = self._writer = None

    def close(self) -> None:
        """Let the files go. Views that `get` gave stay valid."""
        with self._lock:
            self._is_behind = False
            for connection in (self._db, self._writer):
                if connection is not None:
                    connection.close()
            self._db = self._writer = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        # One that nobody holds any more lets its files go; Python 3.13 would warn that it did not.
        if hasattr(self, "_writer") and hasattr(self, "_db"):
            self.close()

    # Reading

    def __len__(self) -> int:
        return int(self._rows("SELECT SUM(value) FROM counts WHERE name <> 'changes'")[0][0])

    @property
    def edition(self) -> str:
        """Of this very index, wherever it lies; another one once an id of a document means something else or nothing.

        A document with a new id, and what becomes of records, leave it as it is.
        """
        changes = self._rows("SELECT value FROM counts WHERE name = 'changes'")[0][0]
        return f"{self._id}.{changes}"

    def ids(self) -> list[str]:
        """All ids, in the order in which they were first added."""
        return [row[0] for row in self._rows("SELECT id FROM documents ORDER BY place")]

    def document(self, document_id: str) -> Document | None:
        """The document with that id. Raises RecordDamagedError if its content is not what was written."""
        before = None
        while rows := self._rows("SELECT kind, key, source, content FROM documents WHERE id = ?", document_id):
            kind, key, source, content = rows[0]
            if (data := self._load(True, content)) is not None:
                return Document(document_id, kind, data.tobytes(), key, source)
            if rows == before:  # otherwise it was replaced between the two looks
                raise _damaged(self.path)
            before = rows
        return None

    def content(self, document_id: str) -> bytes | None:
        """The sha256 of the data of the document with that id, without reading it; None if there is none."""
        rows = self._rows("SELECT content FROM documents WHERE id = ?", document_id)
        return rows[0][0] if rows else None

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
                piece = _Piece(*row)
                if piece.size and (mapped := self._mapped(piece)) is not None:
                    mapped.madvise(mmap.MADV_WILLNEED, piece.start, piece.size)

    def touch(self, keys: Iterable[bytes]) -> None:
        """Note that records were used now. A read-only or busy database is left alone: this only guides `prune`."""
        rows = [(time.time(), key) for key in keys]
        with self._lock, suppress(sqlite3.Error, UnicodeDecodeError):
            db = self._connection()
            db.execute(f"PRAGMA busy_timeout = {_TOUCH_WAIT_MS}")
            try:
                with _committed(db):
                    db.executemany("UPDATE pieces SET used = ?, warm = 1 WHERE content = 0 AND key = ?", rows)
            finally:
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
        segments: list[str] = []
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
            if _size_of(self._segment(number)) < size and self._rows("SELECT 1 FROM segments WHERE number = ?", number):
                segments.append(self._segment(number).name)
        pending = self._rows(
            "SELECT id FROM documents AS d WHERE NOT EXISTS "
            "(SELECT 1 FROM pieces WHERE content = 0 AND key = d.key) ORDER BY place"
        )
        return Verified(records, damaged, tuple(contents), tuple(segments), tuple(row[0] for row in pending))

    def stats(self) -> Stats:
        """What the store holds and how much space that takes."""
        kinds = dict(self._rows("SELECT name, value FROM counts WHERE name <> 'changes' AND value > 0"))
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
            new = [_New(True, contents[d.id], [memoryview(d.data)], now) for d in documents]
            new = list({piece.key: piece for piece in new}.values())
            new += [_New(False, key, [_bytes_of(b) for b in buffers], now) for key, buffers in records.items()]
            new = [piece for piece in new if not self._is_whole(piece.content, piece.key)]
            used = {*records, *(document.key for document in documents)}
            texts = sum(len(text.encode()) for d in documents for text in (d.id, d.source))
            growth = _GROWTH + _GROWTH_PER_ROW * (len(documents) + len(records)) + 4 * texts
            dropped = self._make_room(sum(_room(piece.size) for piece in new) + growth, used)
            with self._published(new) as db:
                find = "SELECT key, content FROM documents WHERE id = ?"
                replaced = [row for document in documents for row in db.execute(find, (document.id,)).fetchall()]
                db.executemany(
                    "INSERT INTO documents (id, kind, key, content, source) VALUES (?, ?, ?, ?, ?) "
                    "ON CONFLICT (id) DO UPDATE SET kind = excluded.kind, key = excluded.key, "
                    "content = excluded.content, source = excluded.source",
                    [(d.id, d.kind, d.key, contents[d.id], d.source) for d in documents],
                )
                touched = "UPDATE pieces SET used = ?, warm = 1 WHERE content = 0 AND key = ?"
                db.executemany(touched, [(now, key) for key in used])
                _drop_unneeded(db, replaced)
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
            gone: list[tuple[bytes, bytes]] = []
            for document_id in dict.fromkeys(ids):
                row = db.execute("SELECT key, content FROM documents WHERE id = ?", (document_id,)).fetchone()
                if row is None:
                    absent.append(document_id)
                    continue
                gone.append(row)
                db.execute("DELETE FROM documents WHERE id = ?", (document_id,))
            _drop_unneeded(db, gone)
        return absent

    def prune(self, *, max_bytes: int | None = None, unused_days: float | None = None) -> Pruned:
        """Drop records, least recently used first: until the folder takes `max_bytes`, and all unused for so long.

        Documents stay: their records are computed again when asked for. Segments that hold nothing more go at once,
        others are rewritten as far as `max_bytes` asks for it.
        """
        self._must_write()
        with self._writing:
            before = self._disk_bytes()
            excess = 0
            if max_bytes is not None:
                excess = before - sum(dead for _, dead in self._dead()) - max_bytes
            since = None if unused_days is None else time.time() - unused_days * 86400
            drop: list[bytes] = []
            with self._transaction() as db:
                for key, size, used in db.execute(f"SELECT key, size, used FROM {_RECORDS_BY_USE} ORDER BY warm, used"):
                    if excess <= 0 and (since is None or used >= since):
                        break
                    drop.append(key)
                    excess -= _room(size)
                _drop_records(db, drop)
            while max_bytes is not None and self._disk_bytes() > max_bytes and (dead := self._dead()):
                drop += self._rewrite(dead[0][0])
            return Pruned(len(drop), max(0, before - self._disk_bytes()))

    def compact(self, progress: Callable[[int], object] = lambda _: None) -> Compacted:
        """Rewrite every segment that holds dead bytes, one at a time; `progress` is told the dead bytes of each.

        Damaged records are not carried over. Damaged contents are, as they are: only their document can say so.
        """
        self._must_write()
        damaged: dict[bytes, tuple[str, ...]] = {}
        with self._writing:
            before = self._disk_bytes()
            # The newest first: what the others still hold is appended behind it, and should not move twice.
            for number, dead in sorted(self._dead(), reverse=True):
                for key in self._rewrite(number):
                    damaged[key] = self._owners(False, key)
                progress(dead)
            with suppress(StoreBusyError, OutputError), self._lock, self._guarded():
                self._connection().execute("VACUUM")
            return Compacted(max(0, before - self._disk_bytes()), damaged)

    # The database

    def _connection(self) -> sqlite3.Connection:
        if self._db is None and self._is_behind:
            self.writable = False  # the lock for writing is the parent's
            self._db = _connect(self.path / INDEX, "rw", _WAIT_S)
        if self._db is None:
            raise StoreError(f"{self.path}: this index has been closed. Open it again.")
        return self._db

    @contextmanager
    def _guarded(self) -> Iterator[None]:
        try:
            yield
        except (sqlite3.Error, UnicodeDecodeError) as error:  # the latter of a message that names what is damaged
            raise _translated(self.path, error, self.writable) from error

    def _rows(self, query: str, *values: object) -> list[Any]:
        with self._lock, self._guarded():
            return self._connection().execute(query, values).fetchall()

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with self._lock, self._guarded():
            db = self._connection()
            with _committed(db):
                yield db
                emptied = db.execute("SELECT number FROM segments WHERE pieces = 0").fetchall()
                if emptied:
                    db.execute("DELETE FROM segments WHERE pieces = 0")
        for (number,) in emptied:
            with suppress(OSError):  # Windows: still mapped
                self._segment(number).unlink()

    def _check(self, whole: bool) -> None:
        """Whether the database is ours, of our format, not cut off, and with `whole` sound in all that it holds."""
        if self._rows("PRAGMA application_id")[0][0] != _APPLICATION:
            raise StoreError(f"{self.path / INDEX}: not the database of an index, or damaged. Make the index again.")
        version = self._rows("PRAGMA user_version")[0][0]
        if version != FORMAT_VERSION:
            way = "Update m0kit" if version > FORMAT_VERSION else "It is of an older m0kit: make the index again"
            raise StoreError(f"{self.path}: format version {version}; this m0kit reads {FORMAT_VERSION}. {way}.")
        if self._is_cut_off() or (whole and not self._is_sound()):
            raise _damaged(self.path)

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
        """Whether the trees are, every piece has its segment, and what was counted is so."""
        room = f"(size + {_ALIGN - 1}) / {_ALIGN} * {_ALIGN}"
        counts = (
            "SELECT number, pieces, records, live, taken, fixed, cold FROM segments EXCEPT SELECT segment, COUNT(*), "
            f"SUM(content = 0), SUM(size), SUM({room}), SUM((content = 1) * ({room})), SUM((warm = 0) * ({room})) "
            "FROM pieces GROUP BY segment",
            "SELECT name, value FROM counts WHERE name <> 'changes' AND value <> 0 EXCEPT "
            "SELECT kind, COUNT(*) FROM documents GROUP BY kind",
        )
        if self._rows("PRAGMA quick_check(1)") != [("ok",)] or self._rows("PRAGMA foreign_key_check"):
            return False
        return not any(self._rows(query) for query in counts)

    def _meta(self) -> tuple[Mapping[str, Any], int | None, str]:
        """The identity and the limit, as given to `create`, and the index's own id."""
        try:
            meta = {name: json.loads(value) for name, value in self._rows("SELECT name, value FROM meta")}
            identity, max_bytes, own = meta["identity"], meta["max_bytes"], meta["id"]
        except (KeyError, TypeError, json.JSONDecodeError):
            raise _damaged(self.path) from None
        if not isinstance(identity, dict) or not isinstance(max_bytes, int | None) or not isinstance(own, str):
            raise _damaged(self.path)
        return identity, max_bytes, own

    def _pieces(self, segment: int) -> list[_Piece]:
        rows = self._rows("SELECT * FROM pieces WHERE segment = ?", segment)
        return sorted((_Piece(*row) for row in rows), key=lambda piece: piece.start)

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

    def _segment(self, number: int) -> Path:
        return self.path / SEGMENTS / f"{number:06d}.kv"

    def _map(self, piece: _Piece) -> NDArray[np.uint8] | None:
        """The bytes of a piece; None if its segment is gone or too short."""
        mapped = self._mapped(piece)
        if mapped is None:
            return None if piece.start + piece.size else np.empty(0, np.uint8)
        return np.frombuffer(mapped, np.uint8, piece.size, piece.start) if piece.start >= 0 else None

    def _mapped(self, piece: _Piece) -> mmap.mmap | None:
        """The segment of a piece; None if it is gone, empty or too short."""
        end = piece.start + piece.size
        with self._lock:
            mapped = self._maps.get(piece.segment)
            if mapped is None or len(mapped) < end:
                try:
                    with open(self._segment(piece.segment), "rb") as file:
                        if os.fstat(file.fileno()).st_size < max(end, 1):
                            return None
                        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
                except FileNotFoundError:
                    return None
                except OSError as error:
                    what = os.strerror(error.errno or 0)
                    raise StoreError(f"{self._segment(piece.segment)}: cannot be read: {what}.") from error
                self._maps[piece.segment] = mapped
        return mapped

    def _load(self, content: bool, key: bytes) -> NDArray[np.uint8] | None:
        before = None
        while rows := self._rows("SELECT * FROM pieces WHERE content = ? AND key = ?", content, key):
            piece = _Piece(*rows[0])
            place = piece[2:5]  # with the size: an empty piece begins where the next one does
            view = self._map(piece)
            if view is not None and (place in self._whole or zlib.crc32(view.data) == piece.crc):
                self._whole.add(place)
                return view
            if place == before:
                raise RecordDamagedError(self._complaint(piece))
            before = place  # a writer may have moved it between the two looks: ask once more
        return None

    def _complaint(self, piece: _Piece) -> str:
        owners = self._owners(piece.content, piece.key)
        names = ", ".join(map(repr, owners[:5])) + (f" and {len(owners) - 5} more" if len(owners) > 5 else "")
        what = "the content" if piece.content else f"record {piece.key.hex()[:12]}"
        of = f" of {'documents' if len(owners) > 1 else 'document'} {names}" if owners else ""
        return (
            f"{self._segment(piece.segment)}: {what}{of} is not what was written (missing, cut off or changed). "
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
        """Remove what the database does not know. What cannot go (Windows: still mapped) is left for the next time."""
        with suppress(OSError, M0kitError):
            known = dict(self._rows("SELECT number, size FROM segments"))
            for path in (self.path / SEGMENTS).iterdir():
                if (match := _SEGMENT_NAME.fullmatch(path.name)) is None:
                    continue
                with suppress(OSError):
                    end = known.get(int(match[1]))
                    if end is None:
                        path.unlink()
                    elif _size_of(path) > end:
                        os.truncate(path, end)

    @contextmanager
    def _published(self, new: Sequence[_New], fresh: bool = False) -> Iterator[sqlite3.Connection]:
        """Append and flush, then a transaction that makes the pieces visible; the body adds to it."""
        try:
            try:
                pieces, ends = self._append(new, fresh)
            except OSError as error:
                raise _unwritable(self.path, error) from error
            with self._transaction() as db:
                db.executemany(
                    "INSERT INTO segments (number, size) VALUES (?, ?) "
                    "ON CONFLICT (number) DO UPDATE SET size = excluded.size",
                    ends.items(),
                )
                # Not "OR REPLACE", for which no trigger runs.
                changed = ", ".join(f"{name} = excluded.{name}" for name in _Piece._fields[2:])
                db.executemany(
                    "INSERT INTO pieces VALUES (?, ?, ?, ?, ?, ?, ?, ?) "
                    f"ON CONFLICT (content, key) DO UPDATE SET {changed}",
                    pieces,
                )
                yield db
        except BaseException:
            self._sweep()
            raise

    def _append(self, new: Sequence[_New], fresh: bool) -> tuple[list[_Piece], dict[int, int]]:
        """Write pieces behind the known end and flush: where each lies, and the new end of each segment.

        `fresh` begins a new segment. So does a segment that is not as long as it should be: it is damaged.
        """
        last = max((seq for (seq,) in self._rows("SELECT seq FROM sqlite_sequence WHERE name = 'segments'")), default=0)
        known = self._rows("SELECT size FROM segments WHERE number = ?", last)
        number, end = (last, int(known[0][0])) if known else (last + 1, 0)
        if known and (fresh or _size_of(self._segment(last)) != end):
            number, end = last + 1, 0
        pieces: list[_Piece] = []
        ends: dict[int, int] = {}
        left = deque(new)
        while left:
            with open(self._segment(number), "r+b" if end else "wb", buffering=0) as file:
                file.seek(end)
                while left and (end == 0 or end + _room(left[0].size) <= self._segment_bytes):
                    item = left.popleft()
                    start, crc = end, 0
                    for buffer in item.buffers:
                        crc = zlib.crc32(buffer, crc)
                        _write(file, buffer)
                    _write(file, memoryview(bytes(_room(item.size) - item.size)))
                    crc = crc if item.crc is None else item.crc
                    pieces.append(_Piece(item.content, item.key, number, start, item.size, crc, item.used, item.warm))
                    end += _room(item.size)
                    ends[number] = end
                sync(file.fileno())
            number, end = number + 1, 0
        if ends:
            sync_path(self.path / SEGMENTS)
        return pieces, ends

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
            if not piece.content and (view is None or zlib.crc32(view.data) != piece.crc):
                lost.append(piece.key)
                continue
            data = bytes(piece.size) if view is None else view
            new.append(_New(piece.content, piece.key, [_bytes_of(data)], piece.used, piece.warm, piece.crc))
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
        database = _size_of(self.path / INDEX)
        fixed = self._rows("SELECT COALESCE(SUM(fixed), 0) FROM segments")[0][0] + 2 * database
        fixed += self._room_of(keep)
        if fixed + need > budget:
            raise StoreError(
                f"{self.path}: {need} bytes cannot be added: the limit is {self.max_bytes}, of which "
                f"{2 * self._segment_bytes} are for rewriting and {fixed} are taken by what must stay. "
                "Add less at once, remove documents, or make an index with a higher limit."
            )
        dropped = 0
        while self._disk_bytes() + database + need > budget:
            number, cold = self._victim(keep)
            dropped += len(cold) + len(self._rewrite(number, cold))
            database = _size_of(self.path / INDEX)
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
            most = max(shares.values())
            assert most > 0, "only asked when there is something to gain"
            newest = "SELECT MAX(used) FROM pieces WHERE segment = ? AND warm = 0"
            uses = {n: db.execute(newest, (n,)).fetchone()[0] or 0.0 for n in shares if shares[n] == most}
            number = min(uses, key=lambda number: (uses[number], number))
            cold = db.execute("SELECT key FROM pieces WHERE segment = ? AND warm = 0", (number,))
            return number, {key for (key,) in cold}


def _connect(path: Path, mode: str, wait_s: float) -> sqlite3.Connection:
    """A connection without implicit transactions, as durable as SQLite can be."""
    uri = f"{path.as_uri()}?mode={mode}"
    db = sqlite3.connect(uri, timeout=wait_s, isolation_level=None, check_same_thread=False, uri=True)
    try:
        # EXTRA also flushes the journal's removal: a segment is only unlinked after what replaces it is on disk.
        for setting in ("synchronous = EXTRA", "fullfsync = ON", "cell_size_check = ON"):
            db.execute(f"PRAGMA {setting}")
    except BaseException:
        db.close()
        raise
    return db


@contextmanager
def _committed(db: sqlite3.Connection) -> Iterator[None]:
    """A transaction: committed at the end, rolled back if anything goes wrong."""
    db.execute("BEGIN IMMEDIATE")
    try:
        yield
        db.execute("COMMIT")
    except BaseException:
        if db.in_transaction:
            db.execute("ROLLBACK")
        raise


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


def _drop_unneeded(db: sqlite3.Connection, gone: Iterable[tuple[bytes, bytes]]) -> None:
    """Drop the records and contents of documents that are gone, unless others need them."""
    for position, column in enumerate(("key", "content")):
        db.executemany(
            f"DELETE FROM pieces WHERE content = {position} AND key = ?1 "
            f"AND NOT EXISTS (SELECT 1 FROM documents WHERE {column} = ?1)",
            [(pair[position],) for pair in gone],
        )


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
        return path.stat().st_size
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
    what = os.strerror(error.errno or 0)
    return OutputError(f"{path}: cannot be written: {what}. Nothing is lost. {advice}, then try again.")


def _translated(path: Path, error: sqlite3.Error | UnicodeDecodeError, writing: bool) -> M0kitError:
    """SQLite's errors as ours."""
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
        return StoreError(
            f"{path / INDEX}: cannot be read ({name}). See to it that you may read it. If a process was killed while "
            "writing to it, open it once where it may be written."
        )
    return _damaged(path)
