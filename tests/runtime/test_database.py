"""A database from somebody else touches nothing beside itself, and none keeps anybody busy."""

import errno
import os
import sqlite3
import struct
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import pytest

from m0kit import database
from m0kit.database import ForeignDatabaseError, connect, needs_rollback, require_own, require_schema

SCHEMA = "CREATE TABLE mine (a INTEGER); CREATE INDEX mine_by_a ON mine (a);"
MAGIC = bytes.fromhex("d9d505f920a163d7")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A database of 3 pages as m0kit makes it."""
    with closing(connect(tmp_path / "a.sqlite", writing=True, wait_s=0)) as db:
        db.executescript(SCHEMA)
        db.execute("INSERT INTO mine VALUES (1), (2)")
    return tmp_path / "a.sqlite"


def count(db: sqlite3.Connection) -> int:
    return int(db.execute("SELECT COUNT(*) FROM mine").fetchone()[0])


def journal(pages: dict[int, bytes] | None = None, names: Path | None = None) -> bytes:
    """A rollback journal that a killed writer would have left, and the file that it names as its super-journal."""
    pages = pages or {}
    head = MAGIC + struct.pack(">IIIII", len(pages), 0, 3, 512, 4096)
    raw = head.ljust(512, b"\0")
    for number, page in pages.items():
        raw += struct.pack(">I", number) + page + struct.pack(">I", sum(page[i] for i in range(4096 - 200, 0, -200)))
    if names is not None:
        name = os.fsencode(names)
        raw += struct.pack(">I", (1 << 30) // 4096 + 1) + name + struct.pack(">II", len(name), sum(name)) + MAGIC
    return raw


def journal_of(path: Path) -> Path:
    return path.with_name(f"{path.name}-journal")


@pytest.mark.parametrize("writing", [False, True])
def test_a_journal_that_names_another_file_does_not_have_it_deleted(path: Path, writing: bool) -> None:
    victim = path.with_name("victim.txt")

    def plant() -> None:
        victim.write_text("dear to somebody")
        journal_of(path).write_bytes(journal(names=victim))

    plant()
    with closing(sqlite3.connect(path)) as db:
        assert count(db) == 2
    assert not victim.exists(), "that is what SQLite does with it"
    plant()
    with pytest.raises(ForeignDatabaseError, match=r"a\.sqlite-journal: names another file, which SQLite would delete"):
        connect(path, writing=writing, wait_s=0)
    with pytest.raises(ForeignDatabaseError, match="names another file"):
        require_own(path)
    assert victim.read_text() == "dear to somebody"
    assert journal_of(path).exists()


def test_a_journal_without_a_database_does_nothing_either(tmp_path: Path) -> None:
    victim = tmp_path / "victim.txt"
    victim.write_text("dear")
    journal_of(tmp_path / "new.sqlite").write_bytes(journal(names=victim))
    with pytest.raises(ForeignDatabaseError, match="names another file"):
        connect(tmp_path / "new.sqlite", writing=True, wait_s=0)
    assert victim.exists()


@pytest.mark.parametrize("suffix", ["", "-journal", "-wal", "-shm"])
@pytest.mark.parametrize("kind", ["link", "dangling link", "folder", "fifo"])
@pytest.mark.parametrize("writing", [False, True])
def test_nothing_is_opened_through_a_link_or_what_is_no_file(path: Path, suffix: str, kind: str, writing: bool) -> None:
    victim = path.with_name("victim")
    place = path.with_name(path.name + suffix)
    if not suffix:
        place.rename(victim)
    elif kind == "link":
        victim.write_bytes(b"dear to somebody")
    before = victim.read_bytes() if victim.exists() else b""
    make: dict[str, Callable[[], None]] = {
        "link": lambda: place.symlink_to(victim),
        "dangling link": lambda: place.symlink_to(path.with_name("nowhere")),
        "folder": place.mkdir,
        "fifo": lambda: os.mkfifo(place),
    }
    make[kind]()
    with pytest.raises(ForeignDatabaseError, match=f"{place.name}: (is a link|is no file|belongs to a write-ahead)"):
        connect(path, writing=writing, wait_s=0)
    assert os.path.lexists(place)
    assert not path.with_name("nowhere").exists()
    assert not before or victim.read_bytes() == before


def test_a_file_that_has_another_name_is_read_and_not_written(path: Path) -> None:
    os.link(path, path.with_name("other"))
    with closing(connect(path, writing=False, wait_s=0)) as db:
        assert count(db) == 2
    with pytest.raises(ForeignDatabaseError, match="has another name too"):
        connect(path, writing=True, wait_s=0)


def with_log(page: bytes) -> bytes:
    return page[:18] + b"\2\2" + page[20:]


@pytest.mark.parametrize("writing", [False, True])
def test_a_write_ahead_log_is_refused_before_there_is_one(path: Path, writing: bool) -> None:
    path.write_bytes(with_log(path.read_bytes()))
    with pytest.raises(ForeignDatabaseError, match="uses a write-ahead log"):
        connect(path, writing=writing, wait_s=0)
    assert [file.name for file in path.parent.iterdir()] == ["a.sqlite"]


def test_a_write_ahead_log_that_comes_of_a_rollback_is_refused_too(path: Path) -> None:
    journal_of(path).write_bytes(journal({1: with_log(path.read_bytes()[:4096])}))
    with pytest.raises(sqlite3.OperationalError) as caught:
        connect(path, writing=False, wait_s=0)
    assert needs_rollback(caught.value)
    assert path.read_bytes()[18:20] == b"\1\1"
    with pytest.raises(ForeignDatabaseError, match="write-ahead log"):
        connect(path, writing=True, wait_s=0)
    assert path.read_bytes()[18:20] == b"\2\2", "it was rolled back to that"
    assert [file.name for file in path.parent.iterdir()] == ["a.sqlite"]


def test_only_who_writes_rolls_back(path: Path) -> None:
    before = path.read_bytes()
    with closing(connect(path, writing=True, wait_s=0)) as db:
        db.execute("DELETE FROM mine")
    after = path.read_bytes()
    journal_of(path).write_bytes(journal({n + 1: before[4096 * n :][:4096] for n in range(3)}))
    left = journal_of(path).read_bytes()
    with pytest.raises(sqlite3.OperationalError) as caught:
        connect(path, writing=False, wait_s=0)
    assert needs_rollback(caught.value)
    assert not needs_rollback(sqlite3.OperationalError("another"))
    assert (path.read_bytes(), journal_of(path).read_bytes()) == (after, left)
    for _ in range(2):
        with closing(connect(path, writing=True, wait_s=0)) as db:
            assert count(db) == 2
        assert not journal_of(path).exists()
    with closing(connect(path, writing=False, wait_s=0)) as db:
        assert count(db) == 2


def test_a_reader_writes_nothing(path: Path) -> None:
    with closing(connect(path, writing=False, wait_s=0)) as db:
        for statement in ("INSERT INTO mine VALUES (3)", "PRAGMA user_version = 3", "VACUUM"):
            with pytest.raises(sqlite3.OperationalError, match="readonly"):
                db.execute(statement)
    with pytest.raises(sqlite3.OperationalError, match="unable to open"):
        connect(path.with_name("nothing"), writing=False, wait_s=0)
    assert [file.name for file in path.parent.iterdir()] == ["a.sqlite"]


TRIES = """
import sqlite3, sys
db = sqlite3.connect(sys.argv[1], timeout=0, isolation_level=None)
try:
    db.execute("BEGIN IMMEDIATE")
except sqlite3.OperationalError as error:
    sys.exit(str(error))
"""


def test_looking_at_a_file_gives_no_locks_up(path: Path) -> None:
    """A process that closes any descriptor of a file loses its locks on it, those that SQLite took too."""

    def others_are_kept_out() -> bool:
        return b"locked" in subprocess.run([sys.executable, "-c", TRIES, path], capture_output=True).stderr

    with closing(connect(path, writing=True, wait_s=0)) as db:
        db.execute("BEGIN EXCLUSIVE")
        require_own(path)
        with suppress(sqlite3.OperationalError):  # it is locked
            connect(path, writing=False, wait_s=0).close()
        with suppress(sqlite3.OperationalError):
            connect(path, writing=True, wait_s=0).close()
        assert others_are_kept_out()
        db.execute("COMMIT")
        assert not others_are_kept_out()


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="the system does not say what is open")
def test_what_is_closed_or_refused_is_not_open(path: Path) -> None:
    def opened() -> list[str]:
        return [str(file.resolve()) for file in Path("/proc/self/fd").iterdir() if str(path) in str(file.resolve())]

    with closing(connect(path, writing=True, wait_s=0)), closing(connect(path, writing=False, wait_s=0)):
        assert opened()
    assert not opened()
    path.write_bytes(with_log(path.read_bytes()))
    with pytest.raises(ForeignDatabaseError) as caught:  # its traceback keeps alive what the frames held
        connect(path, writing=True, wait_s=0)
    assert not opened(), caught.value
    path.write_bytes(b"no database" * 100)
    with pytest.raises(sqlite3.DatabaseError) as damaged:
        connect(path, writing=True, wait_s=0)
    assert not opened(), damaged.value


# What it holds


def test_a_database_has_the_tables_that_it_should_have(path: Path) -> None:
    with closing(connect(path, writing=True, wait_s=0)) as db:
        require_schema(db, SCHEMA)
        for other in (
            "CREATE TABLE mine (a INTEGER);",
            f"{SCHEMA} CREATE TABLE b (c)",
            SCHEMA.replace("(a)", "(a, a)"),
        ):
            with pytest.raises(ForeignDatabaseError, match="its tables are not those that m0kit makes"):
                require_schema(db, other)
        for foreign in (
            "CREATE VIEW b AS SELECT 1",
            "CREATE TRIGGER b AFTER INSERT ON mine BEGIN DELETE FROM mine; END",
            "CREATE INDEX b ON mine (a + 1)",
            "CREATE VIRTUAL TABLE b USING fts5(a)",
            "ALTER TABLE mine ADD COLUMN b GENERATED ALWAYS AS (a + 1)",
        ):
            db.execute("BEGIN")
            db.execute(foreign)
            with pytest.raises(ForeignDatabaseError, match="its tables"):
                require_schema(db, SCHEMA)
            db.execute("ROLLBACK")
        require_schema(db, SCHEMA)


ENDLESS = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT COUNT(*) AS a FROM n"


@pytest.fixture
def _few_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(database, "STEPS", 1_000_000)


@pytest.mark.usefixtures("_few_steps")
def test_no_statement_is_endless(path: Path) -> None:
    with closing(sqlite3.connect(path)) as made:
        made.executescript(f"CREATE VIEW endless AS {ENDLESS}")
    with closing(connect(path, writing=False, wait_s=0)) as db:
        for _ in range(2):
            with pytest.raises(sqlite3.OperationalError, match="interrupted"):
                db.execute("SELECT * FROM endless").fetchall()
            assert count(db) == 2, "each statement has its own"
        with pytest.raises(ForeignDatabaseError):
            require_schema(db, SCHEMA)


@pytest.mark.usefixtures("_few_steps")
def test_the_larger_a_database_the_more_may_be_done_with_it(path: Path) -> None:
    with closing(connect(path, writing=True, wait_s=0)) as db:
        db.execute("BEGIN")
        db.executemany("INSERT INTO mine VALUES (?)", ((n,) for n in range(200_000)))  # as many as are given
        db.execute("COMMIT")
        assert db.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        assert db.execute("SELECT COUNT(*) FROM (SELECT a FROM mine ORDER BY a % 7, -a)").fetchone() == (200_002,)


def test_a_row_that_claims_to_be_huge_is_refused(path: Path) -> None:
    with closing(connect(path, writing=True, wait_s=0)) as db:
        with pytest.raises(sqlite3.DataError, match="too big"):
            db.execute("SELECT zeroblob(1 << 30)").fetchone()
        assert len(db.execute("SELECT zeroblob(1 << 22)").fetchone()[0]) == 1 << 22


def test_a_file_that_may_not_be_read_is_named(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The system's word is put into its mouth: a superuser may read everything."""
    path.touch()
    real = os.open

    def refusing(name: Any, *rest: Any, **options: Any) -> int:
        if os.fspath(name) == os.fspath(path):
            raise PermissionError(errno.EACCES, "Permission denied", os.fspath(name))
        return real(name, *rest, **options)

    monkeypatch.setattr(os, "open", refusing)
    with pytest.raises(ForeignDatabaseError, match=r"cannot be read: Permission denied"):
        connect(path, writing=False, wait_s=0)
