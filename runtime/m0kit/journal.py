"""The results of a job so far, kept beside its output until that is written.

    with Journal(Path("scores.parquet"), facts, overwrite=False) as journal:   # .scores.parquet.partial
        journal.add(Scored(number=0, …))

Owns that SQLite file: what it belongs to, its lock, its rows. What a row is worth and where it goes is a job's.
"""

import contextlib
import json
import os
import sqlite3
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from m0kit.errors import OutputError

FORMAT = "2"
_COMMIT_S = 1.0
_ROWS = (
    "CREATE TABLE IF NOT EXISTS rows "
    "(row INTEGER PRIMARY KEY, id TEXT, score REAL, logit REAL, truncated TEXT, error TEXT, files TEXT)"
)


@dataclass(frozen=True, slots=True)
class Scored:
    """What became of one row: score and logit, or an error."""

    number: int
    id: str | None
    score: float | None
    logit: float | None
    truncated: str | None  # "document", "query", "document,query"
    error: str | None
    files: str | None = None  # JSON: {path of an image: what told it from another one before it was read}


def file_stamp(path: Path | str) -> str:
    """What tells a file from another one under its name; empty where there is none."""
    try:
        stat = os.stat(path)
    except (OSError, ValueError):
        return ""
    return f"{stat.st_size} {stat.st_mtime_ns}"


class Journal:
    """The results of a job so far, in SQLite, locked for as long as it is open. Deleted when it is left empty."""

    def __init__(self, output: Path, facts: Mapping[str, str], overwrite: bool) -> None:
        self.path = output.with_name(f".{output.name}.partial")
        self.output = output
        self.overwrites = overwrite
        self.is_finishing = False  # an output that is there is this job's own
        self._committed = time.monotonic()
        with self._named_errors():
            try:
                self._open(facts)
            except sqlite3.OperationalError:
                raise
            except sqlite3.DatabaseError:  # not a journal, or a damaged one
                if not overwrite:
                    raise
                self.delete()
                self._open(facts)

    def _open(self, facts: Mapping[str, str]) -> None:
        self._db = sqlite3.connect(self.path, timeout=0, isolation_level=None)
        try:
            self._begin(facts)
        except BaseException:
            self._db.close()
            raise

    def _begin(self, facts: Mapping[str, str]) -> None:
        self._db.execute("PRAGMA locking_mode=EXCLUSIVE")  # from the first transaction until it is closed
        self._db.execute("BEGIN EXCLUSIVE")
        if not self.path.exists():  # another job finished, and deleted it, between our opening and our lock
            raise self._busy()
        self._db.execute("CREATE TABLE IF NOT EXISTS facts (name TEXT PRIMARY KEY, value TEXT)")
        self._db.execute(_ROWS)
        found = dict(self._db.execute("SELECT name, value FROM facts"))
        finishing, begun = found.pop("finishing", None), found.pop("overwrites", None)
        # The same command must go on after a kill: --overwrite does not throw away what it began itself.
        if self.overwrites and (found != facts or begun != "True"):
            self._db.execute("DELETE FROM facts")
            self._db.execute("DROP TABLE rows")  # it may be another format's
            self._db.execute(_ROWS)
            found, finishing = {}, None
        self.is_finishing = finishing is not None
        if self.output.exists() and not self.overwrites and not self.is_finishing:
            if not found:
                self.delete()
            raise OutputError(f"{self.output}: exists. Choose another file, or give --overwrite to replace it.")
        if found and found != facts:
            raise OutputError(self._differences(found, facts))
        if not found:
            facts = {**facts, "overwrites": str(self.overwrites)}
            self._db.executemany("INSERT INTO facts VALUES (?, ?)", facts.items())
        self._db.execute("COMMIT")
        self._db.execute("BEGIN")

    def _differences(self, found: Mapping[str, str], facts: Mapping[str, str]) -> str:
        names = [name for name in {**facts, **found} if found.get(name) != facts.get(name)]
        if "the journal's format" in names:
            names = ["the journal's format"]  # the others may have other names there
        told = ", ".join(f"{name} (was {str(found.get(name))[:20]}, is {str(facts.get(name))[:20]})" for name in names)
        return (
            f"{self.path}: holds the scores of another job, which was stopped; different: {told}. "
            "Run that job again to go on with it, or give --overwrite to start anew."
        )

    def count(self, condition: str = "1") -> int:
        with self._named_errors():
            return int(self._db.execute(f"SELECT COUNT(*) FROM rows WHERE {condition}").fetchone()[0])

    def ranges(self) -> list[tuple[int, int]]:
        """Half-open ranges of the rows that have a result."""
        ranges: list[tuple[int, int]] = []
        start = end = 0
        with self._named_errors():
            for (row,) in self._db.execute("SELECT row FROM rows ORDER BY row"):
                if row != end:
                    ranges.append((start, end))
                    start = row
                end = row + 1
        return [(first, last) for first, last in [*ranges, (start, end)] if first < last]

    def add(self, result: Scored) -> int:
        """Rows that are new: 1, or 0 for one that was there. Commits when a second has passed."""
        values = (result.number, result.id, result.score, result.logit, result.truncated, result.error, result.files)
        with self._named_errors():
            added = self._db.execute("INSERT OR IGNORE INTO rows VALUES (?, ?, ?, ?, ?, ?, ?)", values).rowcount
        if time.monotonic() - self._committed >= _COMMIT_S:
            self.commit()
        return added

    def commit(self) -> None:
        with self._named_errors():
            self._db.execute("COMMIT")
            self._db.execute("BEGIN")
        self._committed = time.monotonic()

    def claim_output(self) -> None:
        """Note that an output that is there from now on is this job's own. Raises OutputError for one that is not."""
        if self.output.exists() and not self.overwrites and not self.is_finishing:
            raise OutputError(f"{self.output}: has appeared meanwhile. Move it away and run the same command again.")
        self.is_finishing = True
        with self._named_errors():
            self._db.execute("INSERT OR REPLACE INTO facts VALUES ('finishing', 'True')")
        self.commit()

    def forget_errors(self) -> None:
        with self._named_errors():
            self._db.execute("DELETE FROM rows WHERE error IS NOT NULL")

    def forget_changed_files(self) -> None:
        """Drop results of images that are others by now, or that are there by now, so that they are scored again."""

        def has_changed(files: str) -> bool:
            return any(file_stamp(path) != stamp for path, stamp in json.loads(files).items())

        with self._named_errors():
            self._db.create_function("has_changed", 1, has_changed)
            named = "SELECT DISTINCT files FROM rows WHERE files IS NOT NULL"
            self._db.execute(f"DELETE FROM rows WHERE files IN (SELECT files FROM ({named}) WHERE has_changed(files))")

    def results(self, condition: str = "1") -> Iterator[Scored]:
        """In input order."""
        with self._named_errors():
            for values in self._db.execute(f"SELECT * FROM rows WHERE {condition} ORDER BY row"):
                yield Scored(*values)

    def delete(self) -> None:
        """While the lock is still held; the journal itself last, so that nothing is left without it."""
        for name in (f"{self.path.name}-journal", self.path.name):
            self.path.with_name(name).unlink(missing_ok=True)

    def __enter__(self) -> "Journal":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Keep what is there, also when something went wrong."""
        try:
            with contextlib.suppress(sqlite3.Error):  # what could not be committed is scored again
                self._db.execute("COMMIT")
                if kind is not None and not self.count():
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
        except sqlite3.DatabaseError as error:
            raise OutputError(
                f"{self.path}: is no journal, or a damaged one. Give --overwrite to start anew."
            ) from error

    def _busy(self) -> OutputError:
        return OutputError(f"{self.output}: another job is writing it. Wait for that, or choose another file.")
