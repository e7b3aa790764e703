"""Keeps documents and their computed records on disk: files, durability, locking, limits. Knows nothing of models.

    index.sqlite            the truth: which documents and records there are, and where their bytes lie (`catalogue`)
    lock.sqlite             locked by the writer for as long as it is open; every system frees that with the process
    segments/000001.kv …    the bytes, only ever appended to; a number is never used for two segments (`segments`)

Bytes are appended behind the end that the database knows and flushed; then one transaction makes them visible. A
segment that the database does not know was left by a killed writer, and the next one removes it; what lies behind a
known end it counts as dead, since nothing that may be mapped is ever made shorter. Space comes back by rewriting: what
a segment still holds is appended elsewhere, one transaction points there, and the file goes; whoever has it mapped
keeps its bytes.

With a limit (`max_bytes`) the folder never holds more, not for a moment. The database counts twice, because its
rollback journal may grow as large, and two segments (1/32 of the limit each) stay free: one for what is being
rewritten, one for what the database grows meanwhile. When room is needed, the older half of all record bytes, by
last use, is *cold*. Of the segments that are at least half cold or dead one always exists; the one left alone
longest is rewritten without its cold records. So no record is moved for less than its own size in return, and what
was used recently stays.

A folder may come from somebody else, or from a failing disk: no link is followed in it, and each document is read as
what was written, or as damaged.

    with Store.create(folder, {"model": "…"}, max_bytes=20 << 30) as store:
        store.add([StoredDocument("a", "text", b"hello", key)], {key: [keys, values]})
    with Store.open(folder) as store:
        record = store.get(key)

In a forked child a store is for reading only.
"""

import errno
import hashlib
import mmap
import os
import secrets
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self, TypeAlias, TypeVar

import numpy as np
from numpy.typing import NDArray

from m0kit.errors import InputError, M0kitError, OutputError, RecordDamagedError, StoreBusyError, StoreError
from m0kit.files import destination, occupied, replacing
from m0kit.keeping.catalogue import INDEX, LOCK, Catalogue, Described, index_damaged, size_of
from m0kit.keeping.segments import FOLDER, MOST, New, Piece, Segments, begun, room
from m0kit.keeping.tables import KEY_BYTES, MAX_LIMIT, MAX_NAME_BYTES, MIN_LIMIT

SEGMENT_BYTES = 256 << 20  # rewriting one takes a second or so and as much free space
_GROWTH = 128 << 10  # of the database and its journal in one `add`: a split in every tree …
_GROWTH_PER_ROW = 8 << 10  # … and for each document or record, several times what was measured

Buffer: TypeAlias = bytes | bytearray | memoryview | NDArray[Any]
_Found = TypeVar("_Found")


@dataclass(frozen=True, slots=True)
class StoredDocument:
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


@dataclass(slots=True)
class Reads:
    """How often something was asked for since the store was opened, and what that took."""

    hits: int = 0
    misses: int = 0
    damaged: int = 0
    num_bytes: int = 0  # of what was there
    seconds: float = 0.0


class Store:
    """Documents by id and records by key, in a folder. Made by `create` or `open`; a context manager; thread-safe.

    Everything raises StoreError for a damaged database and StoreBusyError when another process keeps it locked;
    what writes raises OutputError for no space or no permission, and StoreError on a store opened for reading.
    """

    def __init__(self, path: Path, writable: bool) -> None:
        self.path = path
        self.record_reads, self.document_reads = Reads(), Reads()  # by `get`; by `document` and `described`
        self.segments = Segments(path)
        self._whole: set[tuple[Any, ...]] = set()  # pieces, without `used` and `warm`, whose checksum was right
        self._is_swept = False
        with _told(path, writable):
            if os.path.lexists(self.segments.folder):
                self.segments.numbers()
        # SQLite lets a reader "begin exclusively" and only complains later.
        for place in (path, self.segments.folder, path / INDEX, path / LOCK) if writable else ():
            with _told(place):
                if os.path.exists(place) and not os.access(place, os.W_OK):
                    raise PermissionError(errno.EACCES, "")
        self.catalogue = Catalogue(path, writable)
        self.identity, self.max_bytes = self.catalogue.identity, self.catalogue.max_bytes
        self._segment_bytes = min(SEGMENT_BYTES, SEGMENT_BYTES if self.max_bytes is None else self.max_bytes // 32)
        if writable:
            try:
                with suppress(M0kitError):  # on a full disk it must still be possible to remove something
                    self._sweep()
            except BaseException:
                self.catalogue.close()  # else it stays locked for as long as the traceback lives
                raise

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
        with replacing(path) as aside, _told(path):
            (aside / FOLDER).mkdir()
            Catalogue.create(aside, path, values)
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
    def writable(self) -> bool:
        return self.catalogue.writable

    def close(self) -> None:
        """Let the files go. Views that `get` gave stay valid."""
        self.catalogue.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # Reading

    def __len__(self) -> int:
        return sum(self.catalogue.kinds().values())

    @property
    def edition(self) -> str:
        """Of this very index, wherever it lies; another one once an id of a document means something else or nothing.

        A document with a new id, and what becomes of records, leave it as it is.
        """
        return self.catalogue.edition()

    def ids(self) -> list[str]:
        """All ids, in the order in which they were first added."""
        return self.catalogue.ids()

    def document(self, document_id: str) -> StoredDocument | None:
        """The document with that id. Raises RecordDamagedError if it is not what was written."""
        return _counted(self.document_reads, lambda: self._document(document_id), lambda document: len(document.data))

    def _document(self, document_id: str) -> StoredDocument | None:
        before = None
        while (row := self.catalogue.described(document_id)) is not None:
            if not row.is_own:
                raise self._lost(document_id, "what it says of")
            if (data := self._load(True, row.content)) is not None:
                try:
                    return StoredDocument(document_id, row.kind, data.tobytes(), row.key, row.source)
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
        row = self._described(document_id)
        return None if row is None else row.content

    def described(self, document_id: str) -> Described | None:
        """What is said of the document with that id, equal for as long as it is the same; None as for `content`."""
        return _counted(self.document_reads, lambda: self._described(document_id), lambda _: 0)

    def _described(self, document_id: str) -> Described | None:
        row = self.catalogue.described(document_id)
        return row if row is not None and row.is_own else None

    def has(self, keys: Iterable[bytes]) -> set[bytes]:
        """Which of the records are there."""
        return {key for key in keys if self.catalogue.piece(False, key) is not None}

    def get(self, key: bytes) -> NDArray[np.uint8] | None:
        """The record's bytes (N,), read-only and mapped, not copied; None if it is not there.

        Its checksum is verified once per process. Raises RecordDamagedError.
        """
        return _counted(self.record_reads, lambda: self._load(False, key), lambda record: record.nbytes)

    def prefetch(self, keys: Iterable[bytes]) -> None:
        """Ask the system to read these records from the disk while something else is done. Best effort."""
        if not hasattr(mmap, "MADV_WILLNEED"):
            return
        for key in keys:
            if (piece := self.catalogue.piece(False, key)) is not None and piece.size:
                with self.catalogue.fork_lock:
                    mapped = self.segments.mapped(piece)
                if mapped is not None:
                    with suppress(OSError):  # where pages are larger than what pieces are aligned to
                        mapped.madvise(mmap.MADV_WILLNEED, piece.start, piece.size)

    def touch(self, keys: Iterable[bytes]) -> None:
        """Note that records were used now. A read-only or busy database is left alone: this only guides `prune`."""
        self.catalogue.touch(keys)

    def verify(self, progress: Callable[[int], object] = lambda _: None) -> Verified:
        """Read every piece; `progress` is told the bytes of each. Raises StoreError if the database is damaged.

        What a writer adds or moves meanwhile may be read, or read twice, or not.
        """
        self.catalogue.check(whole=True)
        with self.catalogue.fork_lock:  # what was right, or long enough, may not be any more
            self._whole.clear()
            self.segments.forget()
        damaged: dict[bytes, tuple[str, ...]] = {}
        contents: dict[str, None] = {}
        short: list[str] = []
        records = last = 0
        # What is moved meanwhile goes to a higher number. A segment at a time: all pieces may be too many for memory.
        while left := self.catalogue.segments(last):
            last, size = left[0]
            for piece in self.catalogue.pieces(last):
                records += not piece.content
                try:
                    self._load(bool(piece.content), piece.key)
                except RecordDamagedError:
                    owners = self.catalogue.owners(bool(piece.content), piece.key)
                    if piece.content:
                        contents.update(dict.fromkeys(owners))
                    else:
                        damaged[piece.key] = owners
                progress(piece.size)
            if self.segments.size(last) < size and last in dict(self.catalogue.segments()):
                short.append(self.segments.path(last).name)
        pending: list[str] = []
        for has_record, has_content, row in self.catalogue.all_described():
            if not has_content or not row.is_own:
                contents[row.id] = None
            if not has_record:
                pending.append(row.id)
        lost = self.catalogue.num_ownerless()
        return Verified(records, damaged, tuple(contents), tuple(short), tuple(pending), lost)

    def stats(self) -> Stats:
        """What the store holds and how much space that takes."""
        records, live, dead = self.catalogue.held("records", "live", "size - taken")
        oldest, newest = self.catalogue.uses()
        files = [Path(folder, name) for folder, _, names in os.walk(self.path) for name in names]
        disk = sum(max(0, size_of(path)) for path in files)
        kinds = self.catalogue.kinds()
        return Stats(kinds, records, live, dead, disk, self.max_bytes, oldest, newest, self.identity)

    # Writing

    def add(self, documents: Sequence[StoredDocument], records: Mapping[bytes, Sequence[Buffer]]) -> int:
        """Add all or nothing, durably; return how many records had to go to keep to the limit.

        A record is its buffers, one after the other. One that is there is written again only if it is damaged; so
        is a document's content. A document whose id is there is replaced, and keeps its place. Raises StoreError
        if the limit leaves no room even without all other records, OutputError; the store stays usable.
        """
        self.catalogue.must_write()
        for key in records:
            if len(key) != KEY_BYTES:
                raise StoreError(f"a record's key of {len(key)} bytes, expected {KEY_BYTES} (a sha256).")
        documents = list({document.id: document for document in documents}.values())
        contents = {document.id: hashlib.sha256(document.data).digest() for document in documents}
        now = time.time()
        with self.catalogue.writing:
            self._sweep()
            new = [New(True, contents[d.id], [memoryview(d.data)], now) for d in documents]
            new = list({piece.key: piece for piece in new}.values())
            new += [New(False, key, [_bytes_of(b) for b in buffers], now) for key, buffers in records.items()]
            new = [piece for piece in new if not self._is_whole(piece.content, piece.key)]
            used = {*records, *(document.key for document in documents)}
            texts = sum(len(text.encode()) for d in documents for text in (d.id, d.source))
            growth = _GROWTH + _GROWTH_PER_ROW * (len(documents) + len(records)) + 4 * texts
            dropped = self._make_room(sum(room(piece.size) for piece in new) + growth, used)
            with self._published(new):
                self.catalogue.describe([(d.id, d.kind, d.key, contents[d.id], d.source) for d in documents], used, now)
                if self.max_bytes is not None:
                    self.catalogue.cool()  # now, so that it is not much when room is needed
        return dropped

    def remove(self, ids: Iterable[str]) -> list[str]:
        """Remove documents, and records that no other document needs; return the ids that were not there."""
        self.catalogue.must_write()
        if isinstance(ids, str | bytes | Mapping):
            raise InputError(f"ids: expected a list of ids, got {type(ids).__name__}. Put a single one into a list.")
        with self.catalogue.writing, self._transaction():
            return self.catalogue.remove(ids)

    def prune(self, *, max_bytes: int | None = None, unused_days: float | None = None) -> Pruned:
        """Drop records, least recently used first: until the folder takes `max_bytes`, and all unused for so long.

        Documents stay: their records are computed again when asked for. Segments that hold nothing more go at once,
        others are rewritten as far as `max_bytes` asks for it.
        """
        self.catalogue.must_write()
        with self.catalogue.writing:
            with suppress(M0kitError):
                self._sweep()
            before = self.catalogue.disk_bytes()
            excess = 0
            if max_bytes is not None:
                excess = before - sum(dead for _, dead in self.catalogue.dead()) - max_bytes
            since = None if unused_days is None else time.time() - unused_days * 86400
            with self._transaction():
                drop = self.catalogue.drop_unused(excess, since)
            for number, _ in self.catalogue.dead() if max_bytes is not None else ():  # what is rewritten has none
                if max_bytes is None or self.catalogue.disk_bytes() <= max_bytes:
                    break
                drop += self._rewrite(number)
            return Pruned(len(drop), max(0, before - self.catalogue.disk_bytes()))

    def compact(self, progress: Callable[[int], object] = lambda _: None) -> Compacted:
        """Rewrite every segment that holds dead bytes, one at a time; `progress` is told the dead bytes of each.

        Damaged records are not carried over. Damaged contents are, as they are: only their document can say so.
        Contents whose documents are lost go.
        """
        self.catalogue.must_write()
        damaged: dict[bytes, tuple[str, ...]] = {}
        with self.catalogue.writing:
            with suppress(M0kitError):
                self._sweep()
            before = self.catalogue.disk_bytes()
            with self._transaction():
                self.catalogue.drop_ownerless()
            # The newest first: what the others still hold is appended behind it, and should not move twice.
            for number, dead in sorted(self.catalogue.dead(), reverse=True):
                for key in self._rewrite(number):
                    damaged[key] = self.catalogue.owners(False, key)
                progress(dead)
            with suppress(StoreBusyError, OutputError):
                self.catalogue.vacuum()
            return Compacted(max(0, before - self.catalogue.disk_bytes()), damaged)

    # What is durable when

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        """A transaction, after which the files of segments that hold nothing more go."""
        with self.catalogue.transaction() as emptied:
            yield
        for number in emptied:
            with suppress(OSError, StoreError):  # Windows: still mapped
                self.segments.unlink(number)

    def _load(self, content: bool, key: bytes) -> NDArray[np.uint8] | None:
        before = None
        while (piece := self.catalogue.piece(content, key)) is not None:
            place = piece[:6]
            with self.catalogue.fork_lock:
                view = self.segments.view(piece)
            if view is not None and (place in self._whole or piece.fits(view)):
                self._whole.add(place)
                return view
            if place == before:
                raise RecordDamagedError(self._complaint(piece))
            # A writer may have moved it between the two looks, or its number may stand for another file by now.
            before = place
            with self.catalogue.fork_lock:
                self.segments.forget(piece.segment)
        return None

    def _lost(self, document_id: str, what: str) -> RecordDamagedError:
        return RecordDamagedError(
            f"{self.path / INDEX}: {what} document {document_id!r} is not what was written. Add the document again."
        )

    def _complaint(self, piece: Piece) -> str:
        owners = self.catalogue.owners(piece.content, piece.key)
        names = ", ".join(map(repr, owners[:5])) + (f" and {len(owners) - 5} more" if len(owners) > 5 else "")
        what = "the content" if piece.content else f"record {piece.key.hex()[:12]}"
        of = f" of {'documents' if len(owners) > 1 else 'document'} {names}" if owners else ""
        return (
            f"{self.segments.path(piece.segment)}: {what}{of} is not what was written (missing, cut off or changed). "
            "Add the document again: what is damaged is then written anew. "
            "If there is more of it, check the disk."
        )

    def _is_whole(self, content: bool, key: bytes) -> bool:
        try:
            return self._load(content, key) is not None
        except RecordDamagedError:
            return False

    def _sweep(self) -> None:
        """Make what is on the disk agree with the database, after another writer or a failed operation.

        Segments that it does not know go; what lies behind the end of others is dead bytes of theirs. What cannot go
        (Windows: still mapped) is left for the next time.
        """
        if self._is_swept:
            return
        longer = self._remove_unknown()
        if longer:
            with self._transaction():
                self.catalogue.lengthen(longer)
        self._is_swept = True

    def _remove_unknown(self) -> list[tuple[int, int]]:
        """Remove the segments that the database does not know; of those longer than it knows number and size."""
        known = dict(self.catalogue.segments())
        longer: list[tuple[int, int]] = []
        with _told(self.path):
            numbers = self.segments.numbers()
        for number in numbers:
            if number in known:
                if (size := self.segments.size(number)) > known[number]:
                    longer.append((number, size))
            elif not self.catalogue.has_pieces(number):
                with suppress(OSError):
                    self.segments.unlink(number)
        return longer

    @contextmanager
    def _published(self, new: Sequence[New], fresh: bool = False) -> Iterator[None]:
        """Append and flush, then a transaction that makes the pieces visible; the body adds to it.

        `fresh` begins a new segment.
        """
        try:
            with _told(self.path):
                last = None if fresh else self.catalogue.last_segment()
                pieces, ends = self.segments.append(new, last, self._segment_bytes, self._unused_number)
            with self._transaction():
                self.catalogue.publish(pieces, ends)
                yield
        except BaseException:
            self._is_swept = False
            with suppress(M0kitError):  # no transaction now, which may fail as well: the next operation counts the rest
                self._remove_unknown()
            raise

    def _unused_number(self) -> int:
        """Higher than that of any segment there is or was, as far as that can be told."""
        number = 1 + max(0, *self.segments.numbers(), self.catalogue.highest_number())
        if number >= MOST:
            raise index_damaged(self.path)
        return number

    def _rewrite(self, number: int, drop: Collection[bytes] = ()) -> list[bytes]:
        """Append what the segment still holds elsewhere, without the records to `drop`, and let it go.

        Returns the keys of damaged records: they are dropped too.
        """
        new: list[New] = []
        lost: list[bytes] = []
        for piece in self.catalogue.pieces(number):
            if not piece.content and piece.key in drop:
                continue
            with self.catalogue.fork_lock:
                view = self.segments.view(piece)
            if not piece.content and not piece.fits(view):
                lost.append(piece.key)
                continue
            crc = piece.crc
            if view is None:  # nothing in the place of a content that is missing, and nothing that fits
                view = np.empty(0, np.uint8)
                crc = begun(True, piece.key) ^ 1
            new.append(New(piece.content, piece.key, [_bytes_of(view)], piece.used, piece.warm, crc))
        with self._published(new, fresh=number == (self.catalogue.last_segment() or (0, 0))[0]):
            self.catalogue.drop_records([*drop, *lost])
        if number in dict(self.catalogue.segments()):  # it should be empty now, and so gone
            raise index_damaged(self.path)
        return lost

    def _make_room(self, need: int, keep: Collection[bytes]) -> int:
        """Bring the store down to where `need` more bytes keep the limit; return how many records went for it."""
        if self.max_bytes is None:
            return 0
        budget = self.max_bytes - 2 * self._segment_bytes
        (fixed, turns), counted_twice = self.catalogue.held("fixed", "records + 1"), size_of(self.path / INDEX)
        fixed += 2 * counted_twice + self.catalogue.room_of(keep)
        if fixed + need > budget:
            raise StoreError(
                f"{self.path}: {need} bytes cannot be added: the limit is {self.max_bytes}, of which "
                f"{2 * self._segment_bytes} are for rewriting and {fixed} are taken by what must stay. "
                "Add less at once, remove documents, or make an index with a higher limit."
            )
        dropped = 0
        while self.catalogue.disk_bytes() + counted_twice + need > budget:
            # Each turn gives back a record, or what was dead in a segment; only damaged counts go on for longer.
            if turns < 0:
                raise index_damaged(self.path)
            turns -= 1
            with self._transaction():  # readers note uses, and so does this
                self.catalogue.cool(keep)
                number, cold = self.catalogue.coldest()
            dropped += len(cold) + len(self._rewrite(number, cold))
            counted_twice = size_of(self.path / INDEX)
        return dropped


@contextmanager
def _told(path: Path, writing: bool = True) -> Iterator[None]:
    """What the system refuses comes out as one of ours."""
    try:
        yield
    except M0kitError:  # some of ours are OSErrors too
        raise
    except OSError as error:
        what = error.strerror or os.strerror(error.errno or 0)
        if not writing:
            what = f"{error.filename or path}: cannot be read: {what}. See to it that you may read it."
            raise StoreError(what) from error
        full = error.errno in (errno.ENOSPC, errno.EFBIG, getattr(errno, "EDQUOT", None))
        advice = "Make room" if full else "See to it that you may write there"
        raise OutputError(f"{path}: cannot be written: {what}. Nothing is lost. {advice}, then try again.") from error


def _counted(reads: Reads, read: Callable[[], _Found | None], num_bytes: Callable[[_Found], int]) -> _Found | None:
    """What is read, counted."""
    start = time.perf_counter()
    try:
        found = read()
    except RecordDamagedError:
        reads.damaged += 1
        raise
    finally:
        reads.seconds += time.perf_counter() - start
    if found is None:
        reads.misses += 1
    else:
        reads.hits += 1
        reads.num_bytes += num_bytes(found)
    return found


def _bytes_of(buffer: Buffer) -> memoryview:
    if isinstance(buffer, bytes | bytearray):
        return memoryview(buffer)
    return np.ascontiguousarray(buffer).reshape(-1).view(np.uint8).data
