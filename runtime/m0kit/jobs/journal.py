"""The results of a job so far, kept beside its output until that is written.

    with Journal(Path("scores.parquet"), facts, overwrite=False) as journal:   # .scores.parquet.partial
        done = journal.resume(strict=False)
        journal.add(Scored(number=0, …))

Owns that SQLite file: what it belongs to, its lock, its rows, and which were in hand when a process died. What a row
is worth and where it goes is a job's.

Who can write to the folder can write to the journal, and m0kit takes over only what it wrote itself: each row has a
seal, a keyed hash over the job and all that the row holds, and so has each note. The key is the user's, see
`m0kit.jobs.keys`. Rows without a right seal are scored again; a journal of another key is refused as another job's.
"""

import contextlib
import functools
import hashlib
import json
import os
import secrets
import sqlite3
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Final

from m0kit.database import ForeignDatabaseError, connect, require_schema
from m0kit.errors import OutputError
from m0kit.jobs.keys import key_file, own_key
from m0kit.jobs.rows import Scored

Ranges = list[tuple[int, int]]  # half-open, ascending

FORMAT: Final = "3"
COMMIT_S = 1.0
_KEY_FACT: Final = "the key of its rows"
_ROWS: Final = (
    "CREATE TABLE rows (row INTEGER PRIMARY KEY, id TEXT, score REAL, logit REAL, truncated TEXT, error TEXT, "
    "files TEXT, seal BLOB)"
)
_SCHEMA: Final = (
    "CREATE TABLE facts (name TEXT PRIMARY KEY, value TEXT)",
    "CREATE TABLE notes (name TEXT PRIMARY KEY, value TEXT, seal BLOB)",
    _ROWS,
)
_MOST_FACTS: Final = 100
# A process that died had many rows in hand, and one of them may be why: they are tried again in parts so much smaller.
PARTS: Final = 16
# So many processes that end with it alone in hand are a row's own doing.
MOST_ENDS: Final = 2


def file_stamp(path: Path | str) -> str:
    """What tells a file from another one under its name; empty where there is none."""
    try:
        found = os.stat(path)
    except (OSError, ValueError):
        return ""
    return f"{found.st_size} {found.st_mtime_ns}"


class Journal:
    """The results of a job so far, in SQLite, locked for as long as it is open. Deleted when it is left empty."""

    def __init__(self, output: Path, facts: Mapping[str, str], overwrite: bool) -> None:
        """Raises OutputError for a journal of another job, or one that is in use, and where it cannot be written."""
        self.path = output.with_name(f".{output.name}.partial")
        self.output = output
        self.overwrites = overwrite
        self.is_finishing = False  # an output that is there is this job's own
        self.num_foreign = 0  # rows that this job did not write, and dropped
        key = own_key()
        self.is_lasting = key is not None  # whether another process can go on with it
        key = key or secrets.token_bytes(32)
        facts = {**facts, _KEY_FACT: hashlib.blake2b(b"name", key=key, digest_size=8).hexdigest()}
        job = repr((output.name, sorted(facts.items()))).encode("utf-8", "surrogatepass")
        self._hasher = hashlib.blake2b(key=hashlib.blake2b(job, key=key, digest_size=32).digest(), digest_size=16)
        self._in_hand: set[int] = set()
        self._suspects: dict[int, int] = {}  # row → in parts of how many it is tried
        self._ends: dict[int, int] = {}  # row → processes that ended with it alone in hand
        self._committed = time.monotonic()
        with self._named_errors():
            try:
                self._open(facts)
            except sqlite3.OperationalError:
                raise
            except (sqlite3.DatabaseError, UnicodeDecodeError):  # not a journal, or a damaged one
                if not overwrite:
                    raise
                self._remove("-journal", "-wal", "-shm", "")
                self._open(facts)

    def _open(self, facts: Mapping[str, str]) -> None:
        self._db = connect(self.path, writing=True, wait_s=0)
        try:
            self._begin(facts)
        except BaseException:
            self._db.close()
            raise

    def _begin(self, facts: Mapping[str, str]) -> None:
        self._db.text_factory = lambda raw: raw.decode("utf-8", "replace")  # what is no text has no right seal
        self._db.execute("PRAGMA locking_mode=EXCLUSIVE")  # from the first transaction until it is closed
        self._db.execute("BEGIN EXCLUSIVE")
        if not self.path.exists():  # another job finished, and deleted it, between our opening and our lock
            raise self._busy()
        if self._db.execute("SELECT COUNT(*) FROM (SELECT 1 FROM sqlite_schema LIMIT 1)").fetchone() == (0,):
            for statement in _SCHEMA:
                self._db.execute(statement)
        require_schema(self._db, ";".join(_SCHEMA))
        # Linear in the file, where a walk through pages that name each other may not be.
        if self._db.execute("PRAGMA quick_check(1)").fetchone() != ("ok",):
            raise ForeignDatabaseError(f"{self.path}: is damaged")
        found = dict(self._db.execute("SELECT name, value FROM facts LIMIT ?", (_MOST_FACTS,)))
        # The same command must go on after a kill: --overwrite does not throw away what it began itself.
        if self.overwrites and (found != facts or self._noted("overwrites") != "True"):
            for table in ("facts", "notes"):
                self._db.execute(f"DELETE FROM {table}")
            self._db.execute("DROP TABLE rows")  # much faster than a DELETE
            self._db.execute(_ROWS)
            found = {}
        self.is_finishing = self._noted("finishing") is not None
        if self.output.exists() and not self.overwrites and not self.is_finishing:
            if not found:
                self.delete()
            raise OutputError(f"{self.output}: exists. Choose another file, or give --overwrite to replace it.")
        if found and found != facts:
            raise OutputError(self._differences(found, facts))
        if not found:
            self._db.executemany("INSERT INTO facts VALUES (?, ?)", facts.items())
            self._note("overwrites", str(self.overwrites))
        self._db.execute("COMMIT")
        self._db.execute("BEGIN")

    def _differences(self, found: Mapping[str, str], facts: Mapping[str, str]) -> str:
        names = [name for name in {**facts, **found} if found.get(name) != facts.get(name)]
        if names == [_KEY_FACT]:
            return (
                f"{self.path}: holds scores that another user, or another machine, has written, and they are not taken "
                f"over: this user's key ({key_file() or 'there is no folder to keep one in'}) is not theirs. Go on "
                "where the job was begun, or give --overwrite to start anew."
            )
        told = ", ".join(f"{name} (was {str(found.get(name))[:20]}, is {str(facts.get(name))[:20]})" for name in names)
        return (
            f"{self.path}: holds the scores of another job, which was stopped; different: {told}. "
            "Run that job again to go on with it, or give --overwrite to start anew."
        )

    # --- seals and notes -----------------------------------------------------------------------------

    def _seal(self, values: Sequence[Any]) -> bytes:
        """What only this user can make of these values, for this job."""
        hasher = self._hasher.copy()
        hasher.update(repr(tuple(values)).encode("utf-8", "surrogatepass"))
        return hasher.digest()

    def _note(self, name: str, value: str | None) -> None:
        if value is None:
            self._db.execute("DELETE FROM notes WHERE name = ?", (name,))
        else:
            seal = self._seal(("note", name, value))
            self._db.execute("INSERT OR REPLACE INTO notes VALUES (?, ?, ?)", (name, value, seal))

    def _noted(self, name: str) -> str | None:
        """None also where another hand has written it."""
        row = self._db.execute("SELECT value, seal FROM notes WHERE name = ?", (name,)).fetchone()
        if row is None or row[1] != self._seal(("note", name, row[0])):
            return None
        value: str = row[0]
        return value

    # --- rows ----------------------------------------------------------------------------------------

    def resume(self, *, strict: bool) -> Ranges:
        """The rows whose results are taken over; those of others are dropped, and are to be scored again.

        Dropped are rows that this job did not write, results of images that are others by now or are there by now,
        and with `strict` errors.
        """
        changed = functools.lru_cache(maxsize=1 << 12)(_has_changed)
        dropped: list[tuple[int]] = []
        with self._named_errors():
            for *values, seal in self._db.execute("SELECT * FROM rows"):
                if seal != self._seal(values):
                    self.num_foreign += 1
                elif not (strict and values[5] is not None) and (values[6] is None or not changed(values[6])):
                    continue
                dropped.append((values[0],))
            self._db.executemany("DELETE FROM rows WHERE row = ?", dropped)
            self._take_suspects()
        return self.done()

    def done(self) -> Ranges:
        """The rows that have a result."""
        with self._named_errors():
            return to_ranges(row for (row,) in self._db.execute("SELECT row FROM rows ORDER BY row"))

    def count(self, condition: str = "1") -> int:
        with self._named_errors():
            return int(self._db.execute(f"SELECT COUNT(*) FROM rows WHERE {condition}").fetchone()[0])

    def add(self, result: Scored) -> int:
        """Rows that are new: 1, or 0 for one that was there. Commits when a second has passed."""
        values = (
            int(result.number),
            result.id,
            None if result.score is None else float(result.score),
            None if result.logit is None else float(result.logit),
            result.truncated,
            result.error,
            result.files,
        )
        with self._named_errors():
            added = self._db.execute(
                "INSERT OR IGNORE INTO rows VALUES (?, ?, ?, ?, ?, ?, ?, ?)", (*values, self._seal(values))
            ).rowcount
        for kept in (self._suspects, self._ends):
            kept.pop(result.number, None)
        self._in_hand.discard(result.number)
        if time.monotonic() - self._committed >= COMMIT_S:
            self.commit()
        return added

    def results(self, condition: str = "1") -> Iterator[Scored]:
        """In input order. Raises OutputError for one that has changed since it was written."""
        with self._named_errors():
            for *values, seal in self._db.execute(f"SELECT * FROM rows WHERE {condition} ORDER BY row"):
                if seal != self._seal(values):
                    raise OutputError(
                        f"{self.path}: row {values[0]} was changed by another hand. Run the same command again: it "
                        "scores that row anew."
                    )
                yield Scored(*values)

    def commit(self) -> None:
        with self._named_errors():
            self._db.execute("COMMIT")
            self._db.execute("BEGIN")
        self._committed = time.monotonic()

    # --- rows that may end a process -----------------------------------------------------------------

    def begin(self, rows: Iterable[int], *, apart: bool = False) -> None:
        """Note, durably, that these rows are now in hand, with those that have no result yet.

        `apart`: they are suspects, which are tried in parts. Should the process die, they are suspects when the
        journal is opened again; one that is left, whatever the reason, has none in hand.
        """
        self._in_hand.update(rows)
        with self._named_errors():
            self._note("in hand", json.dumps({"rows": to_ranges(sorted(self._in_hand)), "apart": apart}))
            self._note_suspects()
            self._db.execute("COMMIT")
            self._db.execute("BEGIN")

    def died(self, rows: Iterable[int], *, apart: bool) -> None:
        """A process ended by itself while it had these rows in hand, of which none had a result."""
        lost = sorted(set(rows))
        self._suspects |= dict.fromkeys(lost, max(1, len(lost) // PARTS))
        if apart and len(lost) == 1:
            self._ends[lost[0]] = self._ends.get(lost[0], 0) + 1
        self._in_hand.clear()
        with self._named_errors():
            self._note("in hand", None)
            self._note_suspects()
        self.commit()

    def in_hand(self) -> list[int]:
        """Rows that were begun and have no result."""
        return sorted(self._in_hand)

    def suspects(self) -> tuple[int, Ranges]:
        """Rows to be tried apart next, and how many at a time; first those that fewest processes ended with."""
        size = max(self._suspects.values(), default=0)
        return size, to_ranges(sorted(row for row, parts in self._suspects.items() if parts == size))

    def condemned(self) -> Ranges:
        """Rows that ended one process after another while they alone were in hand."""
        return to_ranges(sorted(row for row, ends in self._ends.items() if ends >= MOST_ENDS))

    def _take_suspects(self) -> None:
        """What earlier processes have left of them."""
        noted = json.loads(self._noted("suspects") or "{}")
        self._suspects = {row: size for size, ranges in noted.get("parts", ()) for row in _numbers(ranges)}
        self._ends = dict(noted.get("ends", ()))
        lost = json.loads(self._noted("in hand") or "null")
        rows = [] if lost is None else self._without_result(_numbers(lost["rows"]))
        kept = set(self._without_result(self._suspects))
        self._suspects = {row: size for row, size in self._suspects.items() if row in kept}
        self._ends = {row: ends for row, ends in self._ends.items() if row in kept}
        if rows:
            self.died(rows, apart=lost["apart"])
        else:
            self._note("in hand", None)

    def _without_result(self, rows: Iterable[int]) -> list[int]:
        query = "SELECT 1 FROM rows WHERE row = ?"
        return [row for row in rows if self._db.execute(query, (row,)).fetchone() is None]

    def _note_suspects(self) -> None:
        sizes = sorted(set(self._suspects.values()))
        parts = [(size, to_ranges(sorted(row for row, of in self._suspects.items() if of == size))) for size in sizes]
        self._note("suspects", json.dumps({"parts": parts, "ends": list(self._ends.items())}) if parts else None)

    # --- its end -------------------------------------------------------------------------------------

    def claim_output(self) -> None:
        """Note that an output that is there from now on is this job's own. Raises OutputError for one that is not."""
        if self.output.exists() and not self.overwrites and not self.is_finishing:
            raise OutputError(f"{self.output}: has appeared meanwhile. Move it away and run the same command again.")
        self.is_finishing = True
        with self._named_errors():
            self._note("finishing", "True")
        self.commit()

    def delete(self) -> None:
        """While the lock is still held; the journal itself last, so that nothing is left without it."""
        self._remove("-journal", "")

    def _remove(self, *suffixes: str) -> None:
        """These names; where one is a link, not what it leads to."""
        for suffix in suffixes:
            path = self.path.with_name(self.path.name + suffix)
            try:
                path.unlink(missing_ok=True)
            except OSError as error:
                raise OutputError(
                    f"{path}: is in the way and cannot be removed ({os.strerror(error.errno or 0)}). Move it away."
                ) from error

    def __enter__(self) -> "Journal":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Keep what is there, also when something went wrong."""
        try:
            with contextlib.suppress(sqlite3.Error):  # what could not be committed is scored again
                self._note("in hand", None)
                self._db.execute("COMMIT")
                if kind is not None and not self.count() and not self._suspects:
                    self.delete()
        finally:
            self._db.close()

    @contextlib.contextmanager
    def _named_errors(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.OperationalError as error:
            if "locked" in str(error):
                raise self._busy() from None
            raise OutputError(
                f"{self.path}: the journal cannot be written ({error}). See to space and permissions there, "
                "then run the same command again: it goes on from what was kept."
            ) from error
        except (sqlite3.DatabaseError, UnicodeDecodeError) as error:  # the latter of SQLite's own message
            raise OutputError(
                f"{self.path}: is no journal of this version of m0kit, or a damaged one. Give --overwrite to remove it "
                f"and start anew. (Found: {str(error).removeprefix(f'{self.path}: ')}.)"
            ) from error
        except OSError as error:
            if isinstance(error, OutputError):
                raise
            raise OutputError(f"{self.path}: cannot be used ({os.strerror(error.errno or 0)}).") from error

    def _busy(self) -> OutputError:
        return OutputError(f"{self.output}: another job is writing it. Wait for that, or choose another file.")


def to_ranges(numbers: Iterable[int]) -> Ranges:
    """Ascending numbers as ranges."""
    ranges: Ranges = []
    start = end = -1
    for number in numbers:
        if number != end:
            ranges.append((start, end))
            start = number
        end = number + 1
    return [*ranges, (start, end)][1:]


def _numbers(ranges: Iterable[tuple[int, int]]) -> Iterator[int]:
    for start, end in ranges:
        yield from range(start, end)


def _has_changed(files: str) -> bool:
    return any(file_stamp(path) != stamp for path, stamp in json.loads(files).items())
