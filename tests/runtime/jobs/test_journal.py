"""A journal takes over what this user wrote for this very job, and nothing that another hand put there."""

import contextlib
import itertools
import os
import shutil
import sqlite3
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from m0kit.errors import OutputError
from m0kit.jobs.journal import Journal, to_ranges
from m0kit.jobs.rows import Scored

FACTS = {"the artifact": "a", "the input's size": "9"}


def scored(number: int) -> Scored:
    return Scored(number, f'"r{number}"', number / 8, number / 4, None, None)


@pytest.fixture
def output(tmp_path: Path) -> Path:
    """Of a job that has 20 rows in its journal."""
    (tmp_path / "job").mkdir()
    return begun(tmp_path / "job" / "out.jsonl")


def begun(output: Path, facts: dict[str, str] = FACTS, count: int = 20, overwrite: bool = False) -> Path:
    with Journal(output, facts, overwrite) as journal:
        journal.resume(strict=False)
        for number in range(count):
            journal.add(scored(number))
    return output


def partial(output: Path) -> Path:
    return output.with_name(f".{output.name}.partial")


@contextlib.contextmanager
def another_hand(output: Path) -> Iterator[sqlite3.Connection]:
    with contextlib.closing(sqlite3.connect(partial(output))) as db, db:
        yield db


def taken_over(output: Path, facts: dict[str, str] = FACTS) -> tuple[list[tuple[int, int]], int]:
    """Rows that a resumed job has, and how many it found that are not its own."""
    with Journal(output, facts, False) as journal:
        done = journal.resume(strict=False)
        for result in journal.results():
            assert result == scored(result.number)
        return done, journal.num_foreign


# --- planted scores ----------------------------------------------------------------------------------


def test_what_this_user_wrote_is_taken_over_by_another_process(output: Path) -> None:
    pid = os.fork()
    if pid == 0:
        os._exit(0 if taken_over(output) == ([(0, 20)], 0) else 1)
    assert os.waitpid(pid, 0)[1] == 0
    assert taken_over(output) == ([(0, 20)], 0)


@pytest.mark.parametrize(
    ("sql", "left", "num_foreign"),
    [
        ("UPDATE rows SET score = 1 WHERE row = 3", [(0, 3), (4, 20)], 1),
        ("UPDATE rows SET logit = 9 WHERE row IN (0, 19)", [(1, 19)], 2),
        ("UPDATE rows SET id = '\"x\"' WHERE row = 3", [(0, 3), (4, 20)], 1),
        ("UPDATE rows SET error = 'bad', score = NULL, logit = NULL WHERE row = 3", [(0, 3), (4, 20)], 1),
        ("UPDATE rows SET files = '{}' WHERE row = 3", [(0, 3), (4, 20)], 1),
        ("UPDATE rows SET files = 'no JSON' WHERE row = 3", [(0, 3), (4, 20)], 1),
        ("UPDATE rows SET seal = NULL", [], 20),
        ("UPDATE rows SET seal = 7 WHERE row = 3", [(0, 3), (4, 20)], 1),
        ("UPDATE rows SET seal = (SELECT seal FROM rows WHERE row = 4) WHERE row = 3", [(0, 3), (4, 20)], 1),
        ("INSERT INTO rows SELECT 20, id, score, logit, truncated, error, files, seal FROM rows WHERE row = 3",
         [(0, 20)], 1),
        ("UPDATE rows SET row = row + 1000 WHERE row < 2", [(2, 20)], 2),
        ("UPDATE rows SET score = X'00ff' WHERE row = 3", [(0, 3), (4, 20)], 1),
        ("UPDATE rows SET id = CAST(X'ff' AS TEXT) WHERE row = 3", [(0, 3), (4, 20)], 1),
        ("UPDATE rows SET score = 1e999, logit = -1e999 WHERE row = 3", [(0, 3), (4, 20)], 1),
        ("INSERT INTO rows VALUES (-5, NULL, 0.5, 0, NULL, NULL, NULL, X'00')", [(0, 20)], 1),
        ("DELETE FROM rows WHERE row = 3", [(0, 3), (4, 20)], 0),
    ],
)  # fmt: skip
def test_a_row_that_another_hand_wrote_is_scored_again(
    output: Path, sql: str, left: list[tuple[int, int]], num_foreign: int
) -> None:
    with another_hand(output) as db:
        db.execute(sql)
    assert taken_over(output) == (left, num_foreign)
    assert taken_over(output) == (left, 0)  # it is gone


def test_the_rows_of_two_change_places_and_both_are_scored_again(output: Path) -> None:
    with another_hand(output) as db:
        rows = db.execute("SELECT * FROM rows WHERE row IN (3, 4)").fetchall()
        db.execute("DELETE FROM rows WHERE row IN (3, 4)")
        for row in rows:
            db.execute("INSERT INTO rows VALUES (?, ?, ?, ?, ?, ?, ?, ?)", (7 - row[0], *row[1:]))
    assert taken_over(output) == ([(0, 3), (5, 20)], 2)


@pytest.mark.parametrize("other", ["another input", "another output"])
def test_rows_of_another_journal_of_this_user_are_not_taken_over(output: Path, other: str) -> None:
    name, facts = ("x.jsonl", {**FACTS, "the input's size": "8"}) if other == "another input" else ("y.jsonl", FACTS)
    source = begun(output.with_name(name), facts)
    with another_hand(source) as db:
        rows = db.execute("SELECT * FROM rows").fetchall()
    with another_hand(output) as db:
        db.executemany("INSERT OR REPLACE INTO rows VALUES (?, ?, ?, ?, ?, ?, ?, ?)", rows)
    assert taken_over(output) == ([], 20)


def test_a_row_that_another_hand_wrote_is_not_given_out(output: Path) -> None:
    with another_hand(output) as db:
        db.execute("UPDATE rows SET score = 1 WHERE row = 3")
    with Journal(output, FACTS, False) as journal, pytest.raises(OutputError, match="row 3 was changed by another"):
        list(journal.results())


def test_a_journal_of_another_user_is_refused_and_overwritten_when_asked(
    output: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    said = rf"another user, or another machine, .*{tmp_path}/theirs/m0kit/journal\.key.*--overwrite"
    with monkeypatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path / "theirs"))
        with pytest.raises(OutputError, match=said):
            Journal(output, FACTS, False)
    assert taken_over(output) == ([(0, 20)], 0)  # it lost nothing by that
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "theirs"))
    with Journal(output, FACTS, True) as journal:
        assert journal.resume(strict=False) == []


def test_without_a_place_for_a_key_a_journal_is_of_no_use_to_another_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("m0kit.jobs.journal.own_key", lambda: None)
    output = begun(tmp_path / "out.jsonl")
    with pytest.raises(OutputError, match="another user, or another machine"):
        Journal(output, FACTS, False)
    with Journal(output, FACTS, True) as journal:
        assert not journal.is_lasting


@pytest.mark.parametrize("name", ["finishing", "in hand", "suspects"])
def test_a_note_that_another_hand_wrote_is_none(output: Path, name: str) -> None:
    """An output that is there would be taken for this job's own, or rows for such that end processes."""
    value = {"finishing": "True", "in hand": '{"rows": [[20, 21]], "apart": true}',
             "suspects": '{"parts": [[1, [[20, 21]]]], "ends": [[20, 9]]}'}[name]  # fmt: skip
    with another_hand(output) as db:
        db.execute("INSERT INTO notes VALUES (?, ?, (SELECT seal FROM notes))", (name, value))
    with Journal(output, FACTS, False) as journal:
        journal.resume(strict=False)
        assert journal.suspects() == (0, [])
        assert journal.condemned() == []
    output.write_text("precious")
    with pytest.raises(OutputError, match="exists"):
        Journal(output, FACTS, False)


# --- what lies beside it -----------------------------------------------------------------------------


def super_journal(path: Path, victim: Path) -> None:
    """A journal of SQLite whose end names another file, which SQLite would delete."""
    name = os.fsencode(victim) + b"\0"
    magic = bytes.fromhex("d9d505f920a163d7")
    head = magic + struct.pack(">IIIII", 0, 0, 1, 512, 4096)
    tail = struct.pack(">I", 1) + name + struct.pack(">II", len(name), sum(name)) + magic
    path.write_bytes(head.ljust(512, b"\0") + tail)


def planted(output: Path, what: str, victim: Path) -> None:
    path = partial(output)
    beside = path.with_name(f"{path.name}-{what.split()[0]}")
    if what == "journal that names a file":
        super_journal(beside, victim)
    elif what.endswith("that is a link"):
        beside.symlink_to(victim)
    elif what.endswith("that is a fifo"):
        os.mkfifo(beside)
    elif what.endswith("of bytes"):
        beside.write_bytes(b"\x37\x7f\x06\x82" + bytes(100))
    elif what == "a link":
        path.unlink()
        path.symlink_to(victim)
    elif what == "a fifo":
        path.unlink()
        os.mkfifo(path)
    else:
        path.write_bytes(victim.read_bytes())


PLANTED = ["journal that names a file", "journal that is a link", "journal that is a fifo", "wal that is a link",
           "shm that is a link", "wal of bytes", "shm of bytes", "a link", "a fifo", "a text"]  # fmt: skip


@pytest.mark.parametrize("what", PLANTED)
@pytest.mark.parametrize("overwrite", [False, True])
def test_nothing_beside_a_journal_leads_elsewhere(output: Path, tmp_path: Path, what: str, overwrite: bool) -> None:
    victim = tmp_path / "victim"
    victim.write_bytes(b"precious " * 100)
    planted(output, what, victim)
    before = {path.name: path.lstat().st_mtime_ns for path in output.parent.iterdir()}
    if overwrite:
        with Journal(output, FACTS, True) as journal:
            assert journal.resume(strict=False) == []
            journal.add(scored(0))
        assert [path.name for path in output.parent.iterdir()] == [partial(output).name]
    else:
        with pytest.raises(OutputError, match=r"is no journal .* Give --overwrite to remove it and start anew"):
            Journal(output, FACTS, False)
        assert {path.name: path.lstat().st_mtime_ns for path in output.parent.iterdir()} == before
    assert victim.read_bytes() == b"precious " * 100


def test_a_folder_in_its_place_is_said(tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    partial(output).mkdir()
    for overwrite, said in ((False, "is no journal"), (True, "cannot be removed")):
        with pytest.raises(OutputError, match=said):
            Journal(output, FACTS, overwrite)


@pytest.mark.parametrize(
    "sql",
    [
        "CREATE TRIGGER t AFTER INSERT ON rows BEGIN UPDATE rows SET score = 1; END",
        "CREATE VIEW v AS SELECT * FROM rows",
        "CREATE INDEX i ON rows (score)",
        "DROP TABLE rows; CREATE VIEW rows AS WITH RECURSIVE r(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM r)"
        " SELECT n AS row, NULL, 1, 1, NULL, NULL, NULL, X'00' FROM r",
        "DROP TABLE facts; CREATE VIEW facts AS WITH RECURSIVE r(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM r)"
        " SELECT n AS name, n AS value FROM r",
    ],
)
def test_nothing_of_another_schema_is_run(output: Path, sql: str) -> None:
    with contextlib.closing(sqlite3.connect(partial(output))) as db:
        db.executescript(sql)
    with pytest.raises(OutputError, match="is no journal"):
        Journal(output, FACTS, False)
    with Journal(output, FACTS, True) as journal:
        assert journal.resume(strict=False) == []


@pytest.mark.broad
def test_flipped_bytes_give_no_score_and_no_other_error(output: Path) -> None:
    """Each byte of the file in turn: the rows are what they were, or are dropped, or the journal is refused."""
    whole = partial(output).read_bytes()
    refused = 0
    for at in itertools.chain(range(120), range(120, len(whole), 7)):
        partial(output).write_bytes(whole[:at] + bytes([whole[at] ^ 0xFF]) + whole[at + 1 :])
        try:
            taken_over(output)
        except OutputError:
            refused += 1
        for path in output.parent.iterdir():
            path.unlink()
    assert refused > 20


# --- rows in hand ------------------------------------------------------------------------------------


def died(output: Path, work: Callable[[Journal], None]) -> None:
    """As if the process had been killed: what is on disk stays as it is."""
    with Journal(output, FACTS, False) as journal:
        journal.resume(strict=False)
        work(journal)
        shutil.copy(partial(output), kept := output.with_name("kept"))
    os.replace(kept, partial(output))


def test_rows_that_were_in_hand_when_a_process_died_are_suspects_in_ever_smaller_parts(output: Path) -> None:
    died(output, lambda journal: journal.begin(range(20, 84)))

    def next_part(journal: Journal) -> None:
        size, rows = journal.suspects()
        found.append((size, rows))
        journal.begin(range(rows[0][0], min(rows[0][0] + size, rows[0][1])), apart=True)

    found: list[tuple[int, list[tuple[int, int]]]] = []
    for _ in range(16):
        died(output, next_part)
    # 64 rows, four at a time; each part in which a process died waits for those in which none did.
    assert found == [(4, [(start, 84)]) for start in range(20, 84, 4)]
    died(output, next_part)
    assert found[-1] == (1, [(20, 84)])


def test_a_row_is_condemned_when_processes_ended_twice_with_it_alone_in_hand(output: Path) -> None:
    for condemned in ([], [], [], [(20, 21)]):
        with Journal(output, FACTS, False) as journal:
            journal.resume(strict=False)
            assert journal.condemned() == condemned
        died(output, lambda journal: journal.begin([20], apart=bool(journal.suspects()[1])))


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, MemoryError])
def test_a_journal_that_is_left_in_whatever_way_has_no_rows_in_hand(output: Path, error: type[BaseException]) -> None:
    for _ in range(3):
        with contextlib.suppress(error), Journal(output, FACTS, False) as journal:
            journal.resume(strict=False)
            assert journal.suspects() == (0, [])
            journal.begin([20])
            raise error


def test_a_row_that_has_a_result_is_no_suspect(output: Path) -> None:
    def work(journal: Journal) -> None:
        journal.begin([20, 21])
        journal.add(scored(20))
        journal.commit()

    died(output, work)
    with Journal(output, FACTS, False) as journal:
        journal.resume(strict=False)
        assert journal.suspects() == (1, [(21, 22)])
        journal.add(scored(21))
        assert journal.suspects() == (0, [])


def test_ranges_are_half_open() -> None:
    assert to_ranges([]) == []
    assert to_ranges([0, 1, 3, 5, 6]) == [(0, 2), (3, 4), (5, 7)]
