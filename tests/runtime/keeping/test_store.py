"""What a store was told to keep it keeps, whatever happens to the process, the disk or the neighbours.

Run as a program this file is the process that gets killed: see `serve`.
"""

import errno
import gc
import hashlib
import itertools
import json
import os
import random
import resource
import shutil
import signal
import sqlite3
import stat
import struct
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from m0kit import database, files
from m0kit.errors import InputError, M0kitError, OutputError, RecordDamagedError, StoreBusyError, StoreError
from m0kit.keeping import catalogue
from m0kit.keeping import segments as segment_files
from m0kit.keeping import store as module
from m0kit.keeping.catalogue import Catalogue, sum_of
from m0kit.keeping.store import Store, StoredDocument
from m0kit.keeping.tables import FORMAT_VERSION, MAX_NAME_BYTES, MIN_LIMIT
from m0kit.verified import cache_folder

SEGMENT = 128 << 10  # small, so that segments fill up and get rewritten
ALIGN = 4096
MEMORY = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None

# What is stored follows from a name, so that another process can tell what it should read.


def key_of(name: str) -> bytes:
    return hashlib.sha256(f"record {name}".encode()).digest()


def record_of(name: str, size: int | None = None) -> bytes:
    rng = random.Random(name)
    return rng.randbytes(rng.choice([1, 4095, 4096, 4097, rng.randrange(60_000)]) if size is None else size)


def document_of(doc: str, name: str) -> StoredDocument:
    rng = random.Random(f"content {name}")
    if rng.random() < 0.5:
        return StoredDocument(doc, "text", f"text é {rng.random()}".encode() * rng.randrange(3), key_of(name), name)
    return StoredDocument(doc, "image", rng.randbytes(rng.randrange(9000)), key_of(name), name)


def put(store: Store, *names: str, size: int | None = None) -> int:
    """Add documents d‹name› with their records."""
    documents = [document_of(f"d{name}", name) for name in names]
    return store.add(documents, {key_of(name): [record_of(name, size)] for name in names})


def content(store: Store, name: str) -> bytes | None:
    record = store.get(key_of(name))
    return None if record is None else record.tobytes()


def folder_bytes(folder: Path) -> int:
    return sum(os.path.getsize(os.path.join(at, name)) for at, _, names in os.walk(folder) for name in names)


def segments(folder: Path) -> list[Path]:
    return sorted((folder / "segments").iterdir())


def segments_there(folder: Path) -> list[tuple[int, int]]:
    """(number, size in bytes) of the files."""
    return [(int(path.stem), path.stat().st_size) for path in segments(folder)]


def known_segments(store: Store) -> Any:
    """(number, size in bytes) of what the database says."""
    return store.catalogue.segments()


def clock_of(patch: pytest.MonkeyPatch, now: Callable[[], float]) -> SimpleNamespace:
    """What stores take for the time from now on."""
    clock = SimpleNamespace(time=now, perf_counter=now)
    for used_by in (module, catalogue):
        patch.setattr(used_by, "time", clock)
    return clock


def refuses(error: type[M0kitError], match: str, action: Callable[[], object]) -> None:
    """The error is of that class exactly and its message has the words."""
    with pytest.raises(error, match=match) as caught:
        action()
    assert type(caught.value) is error


@pytest.fixture
def tmp_path() -> Iterator[Path]:
    """In memory where there is such a place: no test can see whether a flush reached a disk, but all wait for it."""
    with tempfile.TemporaryDirectory(dir=MEMORY) as root:
        yield Path(root)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "index"


@pytest.fixture(autouse=True)
def _small_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SEGMENT_BYTES", SEGMENT)


# Keeping and finding


def test_reading_ahead_changes_nothing_and_needs_nothing(folder: Path) -> None:
    with Store.create(folder, {}) as store:
        put(store, "a", "b")
        store.add([document_of("empty", "e")], {key_of("e"): []})
    with Store.open(folder) as store:
        store.prefetch(key_of(name) for name in ("a", "unknown", "e", "b"))
        assert content(store, "a") == record_of("a")
        for path in segments(folder):
            path.unlink()
        store.prefetch([key_of("b")])
    with Store.open(folder) as store:
        store.prefetch([key_of("b")])  # its segment is gone: `get` says so
        refuses(RecordDamagedError, "not what was written", lambda: store.get(key_of("b")))


def test_the_hash_of_a_document_is_told_without_reading_it(folder: Path) -> None:
    with Store.create(folder, {}) as store:
        store.add([StoredDocument("a", "text", b"data", key_of("a"))], {key_of("a"): []})
        for path in segments(folder):
            path.write_bytes(b"")
        assert store.content("a") == hashlib.sha256(b"data").digest()
        assert store.content("b") is None


@pytest.mark.parametrize("exists", [True, False])
def test_a_link_means_the_place_it_leads_to(folder: Path, tmp_path: Path, exists: bool) -> None:
    folder.symlink_to("place")
    if exists:
        (tmp_path / "place").mkdir()
    with Store.create(folder, {}) as store:
        put(store, "a")
    assert folder.is_symlink()
    for path in (folder, tmp_path / "place"):
        with Store.open(path) as store:
            assert content(store, "a") == record_of("a")


def test_what_was_added_is_read(folder: Path) -> None:
    array = np.arange(24, dtype=np.float16).reshape(4, 6)
    scalar = np.array(1.5, np.float32)
    buffers: list[Any] = [b"ab", bytearray(b"cd"), memoryview(b"efgh")[::2], array[:, ::2], np.empty((0, 3)), scalar]
    expected = b"abcdeg" + array[:, ::2].tobytes() + np.float32(1.5).tobytes()
    documents = [
        StoredDocument("é\n", "text", "größe 字".encode(), key_of("a"), "a.txt"),
        StoredDocument("page", "image", bytes(range(256)), key_of("b")),
        StoredDocument("empty", "text", b"", key_of("a")),
    ]
    with Store.create(folder, {"artifact": "x", "n": [1, None]}) as store:
        assert store.add(documents, {key_of("a"): buffers, key_of("b"): []}) == 0
    with Store.open(str(folder)) as store:
        record = store.get(key_of("a"))
        assert record is not None
        assert record.dtype == np.uint8
        assert record.shape == (len(expected),)
        assert record.tobytes() == expected
        with pytest.raises(ValueError, match="read-only"):
            record[0] = 0
        assert content(store, "b") == b""
        assert store.get(key_of("c")) is None
        assert store.document("nobody") is None
        assert [store.document(document.id) for document in documents] == documents
        assert store.ids() == ["é\n", "page", "empty"]
        assert len(store) == 3
        assert store.has([key_of("a"), key_of("c")]) == {key_of("a")}
        assert store.identity == {"artifact": "x", "n": [1, None]}
        assert store.max_bytes is None
        assert store.verify().clean


def test_a_record_is_mapped_and_its_view_outlives_everything(folder: Path) -> None:
    with Store.create(folder, {}) as store:
        put(store, "a", "b", size=50_000)
        view, again = store.get(key_of("a")), store.get(key_of("a"))
        assert view is not None
        assert again is not None
        assert np.shares_memory(view, again)
        store.remove(["da", "db"])
        assert segments(folder) == []
    assert view.tobytes() == record_of("a", 50_000)


def test_a_replaced_document_keeps_its_place_and_leaves_nothing_behind(folder: Path) -> None:
    with Store.create(folder, {}) as store:
        put(store, "a", "b")
        new = StoredDocument("da", "text", b"new", key_of("c"))
        store.add([new], {key_of("c"): [b"c"]})
        assert store.ids() == ["da", "db"]
        assert store.document("da") == new
        assert store.has(map(key_of, "abc")) == {key_of("b"), key_of("c")}
        assert store.stats().live_bytes == sum(len(d.data) for d in [new, document_of("db", "b")]) + 1 + len(
            record_of("b")
        )


def test_records_and_contents_that_others_need_stay(folder: Path) -> None:
    with Store.create(folder, {}) as store:
        first = document_of("first", "a")
        store.add([first, document_of("second", "a")], {key_of("a"): [b"shared"]})
        live = store.stats().live_bytes
        assert live == 6 + len(first.data), "equal contents are kept once"
        assert store.remove(["first", "nobody", "first"]) == ["nobody"]
        assert store.stats().live_bytes == live
        assert content(store, "a") == b"shared"
        assert store.remove(["second"]) == []
        assert store.get(key_of("a")) is None
        assert store.stats().live_bytes == 0


def test_a_record_that_is_there_is_not_written_again(folder: Path) -> None:
    with Store.create(folder, {}) as store:
        put(store, "a", size=10_000)
        before = [path.read_bytes() for path in segments(folder)]
        store.add([document_of("other", "a")], {key_of("a"): [b"something else"]})
        assert [path.read_bytes() for path in segments(folder)] == before
        assert content(store, "a") == record_of("a", 10_000)


def test_of_documents_with_the_same_id_in_one_call_the_last_counts(folder: Path) -> None:
    with Store.create(folder, {}) as store:
        store.add([StoredDocument("x", "text", b"1", key_of("a")), StoredDocument("x", "text", b"2", key_of("b"))], {})
        document = store.document("x")
        assert document is not None
        assert document.data == b"2"
        assert store.stats().live_bytes == 1
        assert store.verify().pending == ("x",)


def test_what_is_asked_for_is_counted(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Store.create(folder, {}) as store:
        put(store, "a", "b", size=5000)
        (piece,) = [piece for piece in store.catalogue.pieces(1) if piece.key == key_of("b")]
    with open(segments(folder)[0], "r+b") as file:
        file.seek(piece.start)
        file.write(bytes([record_of("b", 5000)[0] ^ 1]))
    clock = iter(range(100))
    with Store.open(folder) as store:
        clock_of(monkeypatch, lambda: float(next(clock)))
        for name in "aacb":
            with suppress(RecordDamagedError):
                store.get(key_of(name))
        document = store.document("da")
        store.document("dc")
        assert document is not None
        assert store.record_reads == module.Reads(hits=2, misses=1, damaged=1, num_bytes=10_000, seconds=4.0)
        assert store.document_reads == module.Reads(hits=1, misses=1, num_bytes=len(document.data), seconds=2.0)
        assert store.verify().records == 2
        assert store.record_reads.hits == 2, "only what was asked for counts"


def test_stats_count(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = clock_of(monkeypatch, lambda: 1000.5)
    with Store.create(folder, {"a": 1}, max_bytes=MIN_LIMIT) as store:
        assert store.stats().oldest_use is None
        store.add([StoredDocument("t", "text", b"x" * 10, key_of("a"))], {key_of("a"): [b"r" * 5000]})
        clock.time = lambda: 2000.5
        store.add([StoredDocument("i", "image", b"y" * 20, key_of("b"))], {key_of("b"): [b"r" * 100]})
        stats = store.stats()
        assert stats.documents == {"text": 1, "image": 1}
        assert (stats.records, stats.live_bytes, stats.dead_bytes) == (2, 5130, 0)
        assert (stats.oldest_use, stats.newest_use) == (1000.5, 2000.5)
        assert (stats.max_bytes, stats.identity) == (MIN_LIMIT, {"a": 1})
        assert stats.disk_bytes == folder_bytes(folder)
        store.remove(["t"])
        assert store.stats().dead_bytes == 8192 + ALIGN


def test_prune_drops_the_least_recently_used_first(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = clock_of(monkeypatch, lambda: 86400 * 100.5)
    with Store.create(folder, {}) as store:
        put(store, *"abcdefgh", size=30_000)
        for day, name in enumerate("hcagebfd", start=101):
            monkeypatch.setattr(clock, "time", partial(float, 86400 * (day + 0.5)))
            store.touch([key_of(name)])
        assert store.prune() == module.Pruned(0, 0)
        assert store.prune(unused_days=5.5).records == 2
        assert store.has(map(key_of, "abcdefgh")) == set(map(key_of, "agebfd"))
        size = store.stats().disk_bytes
        pruned = store.prune(max_bytes=size - store.stats().dead_bytes - 60_000)
        assert pruned.records == 2
        assert pruned.freed_bytes == size - store.stats().disk_bytes >= 60_000
        assert store.has(map(key_of, "abcdefgh")) == set(map(key_of, "ebfd"))
        assert len(store) == 8
        assert store.verify().pending == ("da", "dc", "dg", "dh")


class Kept(RuleBasedStateMachine):
    """A store without a limit against a dict."""

    max_bytes: int | None = None
    names = st.integers(0, 25).map(str)

    @initialize()
    def create(self) -> None:
        self.patch = pytest.MonkeyPatch()
        self.now = 1e9
        clock_of(self.patch, self.tick)
        self.patch.setattr(module, "SEGMENT_BYTES", SEGMENT)
        self.folder = Path(tempfile.mkdtemp(dir=MEMORY)) / "index"
        self.store = Store.create(self.folder, {}, self.max_bytes)
        self.documents: dict[str, StoredDocument] = {}
        self.records: dict[str, float] = {}  # last use
        self.reader = Store.open(self.folder)

    def tick(self) -> float:
        self.now += 0.25
        return self.now

    def teardown(self) -> None:
        if hasattr(self, "store"):
            self.store.close()
            self.reader.close()
            shutil.rmtree(self.folder.parent)
            self.patch.undo()

    def needed(self) -> set[str]:
        return {document.source for document in self.documents.values()}

    def drop(self, names: set[str]) -> None:
        self.records = {name: used for name, used in self.records.items() if name not in names}

    @rule(ids=st.lists(st.integers(0, 12).map(str), max_size=3), data=st.data())
    def add(self, ids: list[str], data: st.DataObject) -> None:
        documents = [document_of(doc, data.draw(self.names)) for doc in ids]
        names = {document.source for document in documents} | set(data.draw(st.lists(self.names, max_size=2)))
        held_back = data.draw(st.sets(st.sampled_from(sorted(names)))) if names else set()
        before = set(self.records)
        dropped = self.store.add(documents, {key_of(name): [record_of(name)] for name in names - held_back})
        replaced = {self.documents[doc].source for doc in ids if doc in self.documents}
        self.documents |= {document.id: document for document in documents}
        self.records |= {name: self.now for name in names if name not in held_back or name in self.records}
        self.drop(replaced - self.needed())
        self.account(dropped, before, (names - held_back) & set(self.records))

    def account(self, dropped: int, before: set[str], added: set[str]) -> None:  # noqa: ARG002
        assert dropped == 0

    @rule(ids=st.lists(st.integers(0, 14).map(str), max_size=4))
    def remove(self, ids: list[str]) -> None:
        assert self.store.remove(ids) == [doc for doc in dict.fromkeys(ids) if doc not in self.documents]
        gone = {self.documents.pop(doc).source for doc in set(ids) & set(self.documents)}
        self.drop(gone - self.needed())

    @rule(names=st.lists(names, max_size=4), by_reader=st.booleans())
    def touch(self, names: list[str], by_reader: bool) -> None:
        (self.reader if by_reader else self.store).touch(map(key_of, names))
        # Each name takes a tick; the last counts.
        for name, used in zip(names, np.arange(1 - len(names), 1) * 0.25 + self.now, strict=True):
            if name in self.records:
                self.records[name] = used

    @rule(share=st.floats(0, 1))
    def prune_to_a_size(self, share: float) -> None:
        limit = int(folder_bytes(self.folder) * share)
        pruned = self.store.prune(max_bytes=limit)
        left = self.present()
        assert pruned.records == len(self.records) - len(left)
        gone = [used for name, used in self.records.items() if name not in left]
        assert max(gone, default=0) <= min((self.records[name] for name in left), default=self.now)
        assert not left or self.store.catalogue.disk_bytes() <= limit
        self.drop(set(self.records) - left)

    @rule(age_s=st.floats(0, 20))
    def prune_what_is_unused(self, age_s: float) -> None:
        pruned = self.store.prune(unused_days=age_s / 86400)
        old = {name for name, used in self.records.items() if used < self.now - age_s}
        assert pruned.records == len(old)
        self.drop(old)

    @rule()
    def compact(self) -> None:
        before = self.store.catalogue.disk_bytes()
        compacted = self.store.compact()
        assert compacted.damaged == {}
        assert before - self.store.catalogue.disk_bytes() == compacted.freed_bytes
        assert self.store.stats().dead_bytes == 0

    @rule()
    def reopen(self) -> None:
        self.store.close()
        self.store = Store.open(self.folder, writable=True)

    @rule()
    def reopen_reader(self) -> None:
        self.reader.close()
        self.reader = Store.open(self.folder)

    def present(self) -> set[str]:
        return {name for name in map(str, range(26)) if self.store.has([key_of(name)])}

    @invariant()
    def everything_is_there(self) -> None:
        assert self.present() == set(self.records)
        for store in (self.store, self.reader):
            assert store.ids() == list(self.documents)
            for doc, document in self.documents.items():
                assert store.document(doc) == document
            for name in map(str, range(26)):
                assert content(store, name) == (record_of(name) if name in self.records else None)

    @invariant()
    def verify_agrees(self) -> None:
        verified = self.store.verify()
        assert verified.clean
        assert verified.records == len(self.records)
        assert verified.pending == tuple(doc for doc, d in self.documents.items() if d.source not in self.records)

    @invariant()
    def no_file_is_forgotten(self) -> None:
        assert known_segments(self.store) == segments_there(self.folder)


TestKept = Kept.TestCase
TestKept.settings = settings(max_examples=25, stateful_step_count=25)


# Nothing grows with the number of documents


def work_of(store: Store, action: Callable[[], object]) -> int:
    """Hundreds of steps that SQLite takes for it: unlike seconds the same on every machine."""
    db = store.catalogue.connection()
    steps = 0

    def step() -> None:
        nonlocal steps
        steps += 1

    db.set_progress_handler(step, 100)
    action()
    db.set_progress_handler(None, 0)
    return steps


def many(store: Store, start: int, stop: int) -> int:
    """Small records of as many documents."""
    numbers = range(start, stop)
    documents = [StoredDocument(f"d{n}", "text", b"t%d" % n, key_of(str(n))) for n in numbers]
    return store.add(documents, {key_of(str(n)): [b"r%d" % n] for n in numbers})


@pytest.mark.parametrize("max_bytes", [None, 1 << 30])
def test_no_operation_on_a_document_takes_more_work_where_there_are_many(
    folder: Path, monkeypatch: pytest.MonkeyPatch, max_bytes: int | None
) -> None:
    monkeypatch.setattr(module, "SEGMENT_BYTES", 16 << 20)
    work: list[dict[str, int]] = []
    with Store.create(folder, {}, max_bytes) as store, Store.open(folder) as reader:
        count = 0
        for end in (1000, 16_000):
            for start in range(count, end, 1000):
                many(store, start, start + 1000)
            count = end
            actions: dict[str, Callable[[], object]] = {
                "add": lambda count=count: many(store, count, count + 1),
                "again": lambda: many(store, 7, 8),
                "touch": lambda: store.touch([key_of("3")]),
                "stats": store.stats,
                "len": store.__len__,
                "prune": lambda: store.prune(unused_days=1),
                "remove": lambda count=count: store.remove([f"d{count}"]),
                "check": partial(store.catalogue.check, whole=False),
            }
            work.append({name: work_of(store, action) for name, action in actions.items()})
            work[-1]["document"] = work_of(reader, lambda: reader.document("d5"))
            work[-1]["get"] = work_of(reader, lambda: reader.get(key_of("5")))
    for name, steps in work[1].items():
        assert steps <= 2 * work[0][name] + 2, name


def test_making_room_takes_as_much_work_for_a_record_where_there_are_many(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The limit is always hit: what is done for it follows what is added, not what there is."""
    monkeypatch.setattr(module, "SEGMENT_BYTES", 64 << 20)
    work = []
    for limit in (MIN_LIMIT, 8 * MIN_LIMIT):
        place = folder.with_name(str(limit))
        with Store.create(place, {}, limit) as store:
            steps = added = dropped = start = 0
            while dropped < 2 * limit // ALIGN:  # it was filled twice over
                gone = 0

                def add(start: int = start) -> None:
                    nonlocal gone
                    gone = store.add([], {key_of(str(n)): [b"r"] for n in range(start, start + 20)})

                spent = work_of(store, add)
                start, dropped = start + 20, dropped + gone
                if dropped:
                    steps, added = steps + spent, added + 20
                store.touch([key_of(str(n)) for n in range(start - 200, start, 10)])
            assert folder_bytes(place) <= limit
        work.append(steps / added)
    assert work[1] < 1.3 * work[0], work  # trees get a little deeper; it was eight times before


def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Which stores look at their database whole, from now on."""
    looks: list[str] = []
    is_sound = Catalogue.is_sound

    def looking(looked_at: Catalogue) -> bool:
        looks.append("writer" if looked_at.writable else "reader")
        return is_sound(looked_at)

    monkeypatch.setattr(Catalogue, "is_sound", looking)
    return looks


def test_an_index_that_the_collector_closes_waits_for_nobody(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may be collected while this very thread writes what was verified, and would wait for itself."""
    Store.create(folder, {}).close()
    memory = cache_folder() / "verified.json"  # type: ignore[operator]
    memory.unlink(missing_ok=True)
    memory.parent.mkdir(parents=True, exist_ok=True)
    left = Store.open(folder)
    monkeypatch.setattr(files.time, "sleep", lambda _: pytest.fail("waited"))
    with files.writing(memory, private=True) as file:
        del left
        gc.collect()
        file.write(b"{}")
    assert memory.read_bytes() == b"{}"


def test_a_reader_looks_at_a_database_whole_once_per_change(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Store.create(folder, {}) as store:
        put(store, *"abc")
    looks = asked(monkeypatch)
    for _ in range(3):  # the writer left it as it was found sound, and so does who notes a use
        with Store.open(folder) as store:
            assert state_of_names(store, *"abc")
            store.touch([key_of("a")])
    assert looks == []
    with Store.open(folder) as store:
        store.verify()
    assert looks == ["reader"]
    Store.open(folder, writable=True).close()
    assert looks == ["reader", "writer"]
    os.utime(folder / "index.sqlite")
    for _ in range(3):
        Store.open(folder).close()
    assert looks == ["reader", "writer", "reader"]


def test_what_somebody_else_changed_is_looked_at_again(folder: Path) -> None:
    with Store.create(folder, {}) as store, Store.open(folder) as reader:
        put(store, *"abcdefgh")
        with closing(sqlite3.connect(folder / "index.sqlite", isolation_level=None)) as db:
            db.execute("UPDATE segments SET taken = taken + 1")
        store.touch([key_of("a")])  # knows the database as it was before, and must not speak for it now
        reader.touch([key_of("a")])
    for writable in (False, True):
        refuses(StoreError, "the database is damaged", partial(Store.open, folder, writable=writable))


def test_the_first_add_that_meets_the_limit_takes_no_more_work_than_those_after_it(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What has to go then was marked as it came to be old, a little with each add, and not half of all at once."""
    monkeypatch.setattr(module, "SEGMENT_BYTES", 64 << 20)
    with Store.create(folder, {}, 4 * MIN_LIMIT) as store:
        work: list[int] = []  # of adds that made room
        for start in range(0, 20_000, 20):
            dropped = 0

            def add(start: int = start) -> None:
                nonlocal dropped
                dropped = store.add([], {key_of(str(n)): [b"r"] for n in range(start, start + 20)})

            steps = work_of(store, add)
            if dropped:
                work.append(steps)
            if len(work) == 20:
                break
    assert work[0] < 2 * max(work[1:]), work


# Which index it is


def test_an_index_is_another_edition_once_an_id_means_something_else(folder: Path) -> None:
    with Store.create(folder, {}) as store:
        put(store, "a", "b")
        first = store.edition
        put(store, "a", "c")
        store.touch([key_of("a")])
        store.prune(unused_days=0)
        store.compact()
        put(store, "a", "b")
        store.remove(["nobody"])
        with Store.open(folder) as reader:
            assert reader.edition == store.edition == first, "every id that was there means what it did"
            store.add([document_of("da", "b")], {})
            replaced = store.edition
            store.remove(["db"])
            assert reader.edition == store.edition
            assert len({first, replaced, store.edition}) == 3
    with Store.create(folder.with_name("other"), {}) as other:
        put(other, "a", "b")
        assert other.edition != first


# The limit


class Limited(Kept):
    """A store that is always nearly full: the folder never exceeds the limit, not even inside an operation."""

    max_bytes = MIN_LIMIT
    names = st.integers(0, 25).map(str)

    @initialize()
    def create(self) -> None:
        super().create()
        self.fill = 0
        self.peak = 0
        for name in ("write_whole", "sync"):
            self.patch.setattr(segment_files, name, self.measured(getattr(segment_files, name)))
        self.watch()

    def measure(self, *_: object) -> None:
        self.peak = max(self.peak, folder_bytes(self.folder))

    def measured(self, function: Callable[..., None]) -> Callable[..., None]:
        def measuring(*arguments: object) -> None:
            function(*arguments)
            self.measure()

        return measuring

    def watch(self) -> None:
        self.store.catalogue.connection().set_trace_callback(self.measure)

    @rule()
    def reopen(self) -> None:
        super().reopen()
        self.watch()

    @rule(count=st.integers(1, 8), size=st.integers(1, 300_000))
    def pour_in(self, count: int, size: int) -> None:
        """Many records that the model does not follow, beyond that they are whole."""
        for _ in range(count):
            self.fill += 1
            name = f"fill {self.fill}"
            before = set(self.records)
            dropped = self.store.add([], {key_of(name): [record_of(name, size)]})
            assert content(self.store, name) == record_of(name, size), "what was just added stays"
            self.account(dropped, before, set())

    @precondition(lambda self: self.fill > 0)
    @rule()
    def drop_all_but_the_newest(self) -> None:
        self.store.prune(unused_days=1e-6)
        self.drop(set(self.records) - self.present())

    def account(self, dropped: int, before: set[str], added: set[str]) -> None:
        present = self.present()
        assert added <= present
        gone = (before & set(self.records)) - present
        assert len(gone) <= dropped
        self.drop(gone)

    # The records that are poured in take part in these; what they do with ours is told by `Kept`.
    @rule(share=st.floats(0, 1))
    def prune_to_a_size(self, share: float) -> None:
        limit = int(folder_bytes(self.folder) * share)
        self.store.prune(max_bytes=limit)
        assert self.store.stats().records == 0 or self.store.catalogue.disk_bytes() <= limit
        self.drop(set(self.records) - self.present())

    @rule(age_s=st.floats(0, 20))
    def prune_what_is_unused(self, age_s: float) -> None:
        self.store.prune(unused_days=age_s / 86400)
        self.drop({name for name, used in self.records.items() if used < self.now - age_s})

    @invariant()
    def verify_agrees(self) -> None:
        verified = self.store.verify()
        assert verified.clean
        assert verified.pending == tuple(doc for doc, d in self.documents.items() if d.source not in self.records)

    @invariant()
    def the_limit_holds(self) -> None:
        self.measure()
        assert self.peak <= MIN_LIMIT


TestLimited = Limited.TestCase
TestLimited.settings = settings(max_examples=20, stateful_step_count=20)


def test_what_is_used_stays_and_the_drops_are_counted(folder: Path) -> None:
    """A quarter of the records are used between all additions; the others come and go."""
    with Store.create(folder, {}, max_bytes=MIN_LIMIT) as store:
        used = [f"used {n}" for n in range(15)]
        for name in used:
            put(store, name, size=50_000)
        added, dropped = len(used), 0
        for n in range(200):
            store.touch(map(key_of, used))
            before = store.catalogue.rows("SELECT key FROM pieces WHERE content = 0 ORDER BY used")
            dropped += put(store, str(n), size=50_000)
            recent = [key for (key,) in before[len(before) // 2 + 2 :]]  # two, because a second segment may have to go
            assert store.has(recent) == set(recent)
            store.remove([f"d{n}"]) if n % 3 == 0 else None
            added += n % 3 != 0
        assert store.has(map(key_of, used)) == set(map(key_of, used))
        assert store.stats().records == added - dropped
        assert store.stats().disk_bytes > MIN_LIMIT * 0.6, "room is used, not only kept free"
        assert len(store) == len(used) + 133, "documents stay when their records go"
        assert folder_bytes(folder) <= MIN_LIMIT


def test_making_room_writes_no_more_than_it_gives_back(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = 0
    write = segment_files.write_whole

    def counting(file: Any, data: memoryview) -> None:
        nonlocal written
        written += data.nbytes
        write(file, data)

    monkeypatch.setattr(segment_files, "write_whole", counting)
    rng = random.Random(1)
    with Store.create(folder, {}, max_bytes=MIN_LIMIT) as store:
        for n in range(400):
            store.add([], {key_of(str(n)): [record_of(str(n), 20_000)]})
            # The worst case for a log: what is used has nothing to do with what lies together.
            store.touch(key_of(str(rng.randrange(n + 1))) for _ in range(3))
    added = 400 * 20_480
    assert written < 2.1 * added  # a byte moved for each byte added, and the first filling


def test_rewriting_large_segments_keeps_the_limit(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Here what is being moved is more than all else that is kept free."""
    limit, peak = 32 << 20, 0
    monkeypatch.setattr(module, "SEGMENT_BYTES", limit)
    write = segment_files.write_whole

    def measuring(file: Any, data: memoryview) -> None:
        nonlocal peak
        write(file, data)
        peak = max(peak, folder_bytes(folder))

    monkeypatch.setattr(segment_files, "write_whole", measuring)
    with Store.create(folder, {}, max_bytes=limit) as store:
        used: list[bytes] = []
        for n in range(800):
            store.add([], {key_of(str(n)): [bytes(80_000)]})
            if n % 5 < 2:  # so that segments are rewritten with two fifths of their records
                used = [*used, key_of(str(n))][-140:]
            if n % 40 == 0:
                store.touch(used)
        assert limit * 0.8 < peak <= limit


def test_what_can_never_fit_is_refused_and_drops_nothing(folder: Path) -> None:
    with Store.create(folder, {}, max_bytes=MIN_LIMIT) as store:
        put(store, *"abcdefgh", size=300_000)
        refuses(StoreError, "cannot be added: the limit is 4194304", lambda: put(store, "big", size=MIN_LIMIT))
        assert len(store.has(map(key_of, "abcdefgh"))) == 8
        assert store.document("dbig") is None
        names = [f"many {n}" for n in range(15)]
        refuses(StoreError, "Add less at once", lambda: put(store, *names, size=300_000))
        assert len(store.has(map(key_of, "abcdefgh"))) == 8
        assert put(store, "large", size=2_500_000) > 0  # larger than a segment, but it fits
        assert content(store, "large") == record_of("large", 2_500_000)
        assert store.verify().clean


# Killed


class Served:
    """The fork server below, and what it says."""

    def __init__(self, folder: Path, max_bytes: int | None) -> None:
        Store.create(folder, {}, max_bytes).close()
        command = [sys.executable, __file__, "serve", str(folder)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.said: list[dict[str, Any]] = []

    def start(self, seed: int, kill_at: int) -> int:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{seed} {kill_at}\n")
        self.process.stdin.flush()
        return int(self.line().split()[1])

    def line(self) -> str:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, "the server is gone"
        return line

    def until_dead(self) -> list[dict[str, Any]]:
        said: list[dict[str, Any]] = []
        while not (line := self.line()).startswith("dead"):
            said.append(json.loads(line))
        assert line == f"dead {signal.SIGKILL}\n", "it was to be killed, not to fail"
        return said

    def __enter__(self) -> "Served":
        return self

    def __exit__(self, *_: object) -> None:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.close()
        self.process.stdout.close()
        self.process.wait()


def state_of(store: Store) -> dict[str, Any]:
    """Everything, read and compared with what its name says."""
    documents = {}
    for doc in store.ids():
        document = store.document(doc)
        assert document is not None
        assert document == document_of(doc, document.source)
        documents[doc] = document.source
    records = []
    for (key,) in store.catalogue.rows("SELECT key FROM pieces WHERE content = 0"):
        (name,) = [name for name in NAMES if key_of(name) == key]
        assert content(store, name) == record_of(name)
        records.append(name)
    assert store.verify().clean
    return {"documents": documents, "records": sorted(records)}


NAMES = [f"{n}.{version}" for n in range(10) for version in range(3)]


def check_survivor(folder: Path, before: dict[str, Any], said: list[dict[str, Any]], writable: bool) -> dict[str, Any]:
    """The state is the last acknowledged one, or one that the operation in flight may have left."""
    for item in said:
        if "documents" in item:
            before = item
    doing = said[-1] if said and "doing" in said[-1] else None
    with opened_after_a_kill(folder, writable) as store:
        after = state_of(store)
        if writable:
            assert known_segments(store) == segments_there(folder)
    if doing is None:
        assert after == before
        return after
    done = doing["done"]
    assert after["documents"] in (before["documents"], done["documents"])
    records = set(after["records"])
    if doing["doing"] in ("prune", "limited add"):
        assert records <= set(before["records"]) | set(done["records"])
        if after["documents"] != before["documents"]:
            assert records >= set(doing["new"])
    else:
        assert after in (before, done)
    return after


def opened_after_a_kill(folder: Path, writable: bool) -> Store:
    """A reader cannot roll back; it says so, and who does what it says loses nothing."""
    with suppress(StoreError):
        return Store.open(folder, writable=writable)
    assert not writable
    refuses(StoreError, "a process was killed while it was writing", lambda: Store.open(folder))
    Store.open(folder, writable=True).close()
    return Store.open(folder)


@pytest.mark.parametrize("max_bytes", [None, MIN_LIMIT])
def test_killed_at_any_moment_it_keeps_what_it_acknowledged(folder: Path, max_bytes: int | None) -> None:
    """Killed after the n-th line that it said, while it goes on: the test below knows what the kill meets."""
    rng = random.Random(0)
    state: dict[str, Any] = {"documents": {}, "records": []}
    with Served(folder, max_bytes) as server:
        for seed in range(170):
            pid = server.start(seed, 0)
            said = [json.loads(server.line()) for _ in range(rng.randint(1, 9))]
            os.kill(pid, signal.SIGKILL)
            said += server.until_dead()
            state = check_survivor(folder, state, said, writable=rng.random() < 0.5)


@pytest.mark.parametrize("max_bytes", [None, MIN_LIMIT])
def test_killed_at_each_step_of_the_protocol(folder: Path, max_bytes: int | None) -> None:
    """Before each statement, flush and removal, and in the middle of each write, in turn."""
    state: dict[str, Any] = {"documents": {}, "records": []}
    with Served(folder, max_bytes) as server:
        for kill_at in range(1, 121):
            server.start(kill_at % 7, kill_at)
            state = check_survivor(folder, state, server.until_dead(), writable=kill_at % 2 == 0)


# Several processes and threads


def program(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, __file__, *arguments[:1], str(folder), *arguments[1:]]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def test_readers_see_whole_records_while_a_writer_works_and_compacts(folder: Path) -> None:
    rng = random.Random(3)
    with Store.create(folder, {}) as store:
        put(store, *NAMES)
        readers = [program(folder, "read", str(seed)) for seed in range(3)]
        for reader in readers:
            assert reader.stdout is not None
            assert reader.stdout.readline() == "reading\n"
        # Until each has said that it saw enough; one that failed says nothing more either.
        seeing = [threading.Thread(target=reader.stdout.readline) for reader in readers if reader.stdout is not None]
        for thread in seeing:
            thread.start()
        prune = partial(store.prune, max_bytes=400_000)
        while any(thread.is_alive() for thread in seeing):
            names = rng.sample(NAMES, 8)
            store.remove(f"d{name}" for name in names[:5])
            put(store, *names[5:])
            operations: list[Callable[[], object]] = [store.compact, partial(put, store, *NAMES), prune]
            rng.choice(operations)()
        for reader in readers:
            out, _ = reader.communicate("stop\n")
            assert reader.returncode == 0, "a reader met something it should not"
            assert out == "read\n"


def read(folder: Path, seed: int) -> None:
    """Read random records and documents until told to stop; say when many were there, and many not."""
    found = absent = 0
    is_enough = False
    stop = threading.Event()

    def wait() -> None:
        sys.stdin.readline()
        stop.set()

    threading.Thread(target=wait, daemon=True).start()
    rng = random.Random(seed)
    with Store.open(folder) as store:
        print("reading", flush=True)
        while not stop.is_set():
            name = rng.choice(NAMES)
            record, document = content(store, name), store.document(f"d{name}")
            assert record in (None, record_of(name))
            assert document in (None, document_of(f"d{name}", name))
            found, absent = found + (record is not None), absent + (record is None)
            if not is_enough and found > 500 and absent > 50:
                is_enough = True
                print("enough", flush=True)
            if rng.random() < 0.05:
                store.touch([key_of(name)])
                store.stats()
                assert store.verify().clean
    print("read")


def test_there_is_one_writer_and_a_dead_one_does_not_count(folder: Path) -> None:
    with Store.create(folder, {}) as store:
        put(store, "a")
        refuses(StoreBusyError, f"{folder}: another process is writing", lambda: Store.open(folder, writable=True))
        other = program(folder, "hold")
        assert other.communicate()[0] == "StoreBusyError\n"
        with Store.open(folder) as reader:
            assert content(reader, "a") == record_of("a")
    other = program(folder, "hold")
    assert other.stdout is not None
    assert other.stdout.readline() == "held\n"
    refuses(StoreBusyError, "stop it, then try again", lambda: Store.open(folder, writable=True))
    other.kill()
    other.communicate()
    with Store.open(folder, writable=True) as store:
        assert content(store, "a") == record_of("a")


def hold(folder: Path) -> None:
    try:
        with Store.open(folder, writable=True):
            print("held", flush=True)
            sys.stdin.readline()
    except M0kitError as error:
        print(type(error).__name__)


def test_a_reader_waits_for_nothing_when_it_notes_a_use(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Store.create(folder, {}) as store:
        put(store, "a")
    other = sqlite3.connect(folder / "index.sqlite", isolation_level=None)
    connect, waits = database.connect, []
    monkeypatch.setattr(
        database, "connect", lambda *to, wait_s, **how: (waits.append(wait_s), connect(*to, wait_s=wait_s, **how))[1]
    )
    with Store.open(folder) as reader, closing(other):
        other.execute("BEGIN IMMEDIATE")
        before = reader.stats().newest_use
        reader.touch([key_of("a")])
        assert waits[-1] == 0.05
        assert reader.stats().newest_use == before
        other.execute("ROLLBACK")
        reader.touch([key_of("a")])
        assert reader.stats().newest_use != before


def test_a_reader_that_never_ends_holds_a_writer_up_but_breaks_nothing(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(catalogue, "WAIT_S", 0.1)
    with Store.create(folder, {}) as store:
        put(store, "a")
        other = sqlite3.connect(folder / "index.sqlite", isolation_level=None)
        with closing(other):
            other.execute("BEGIN")
            other.execute("SELECT * FROM documents").fetchall()
            refuses(StoreBusyError, "another process", lambda: put(store, "b"))
            refuses(StoreBusyError, "another process", lambda: store.remove(["da"]))
            assert state_of_names(store, "a")
        unharmed(store, folder)


def test_a_reader_follows_a_record_that_moved(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Store.create(folder, {}) as store, Store.open(folder) as reader:
        put(store, "a", "b", size=5000)
        first = store.catalogue.pieces(1)
        store.remove(["da"])
        # What a reader is left with that looked just before `compact` finished.
        looks = iter([piece for piece in first if piece.key == key_of("b")])
        piece = reader.catalogue.piece
        store.compact()
        assert not reader.segments.path(first[0].segment).exists()
        monkeypatch.setattr(reader.catalogue, "piece", lambda *of: next(looks, None) or piece(*of))
        assert content(reader, "b") == record_of("b", 5000)
        assert next(looks, None) is None, "the stale look was used"


def test_threads_share_a_store(folder: Path) -> None:
    failures: list[BaseException] = []

    def reading(store: Store, seed: int) -> None:
        rng = random.Random(seed)
        try:
            for _ in range(150):
                name = rng.choice(NAMES)
                assert content(store, name) in (None, record_of(name))
                store.touch([key_of(name)])
        except BaseException as error:
            failures.append(error)

    def writing(store: Store, seed: int) -> None:
        rng = random.Random(seed)
        try:
            for _ in range(25):
                put(store, *rng.sample(NAMES, 3))
                store.remove([f"d{rng.choice(NAMES)}"])
                store.compact()
        except BaseException as error:
            failures.append(error)

    with Store.create(folder, {}) as store:
        threads = [threading.Thread(target=target, args=(store, n)) for n, target in enumerate([reading, writing] * 2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not failures
        assert store.verify().clean


# Where writing is not possible


def in_child(action: Callable[[], object]) -> None:
    """Run in a forked child; whatever it raises fails the test."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            action()
            status = 0
        except BaseException:
            sys.excepthook(*sys.exc_info())
        finally:
            os._exit(status)
    assert os.waitpid(pid, 0)[1] == 0


def as_nobody(action: Callable[[], object]) -> None:
    """Run in a child without a superuser's rights; whatever it raises fails the test."""

    def run() -> None:
        if os.geteuid() == 0:
            os.setgid(65534)
            os.setuid(65534)
        action()

    in_child(run)


@pytest.fixture
def readable_folder() -> Iterator[Path]:
    """Another user may get there, unlike pytest's own folders."""
    with tempfile.TemporaryDirectory() as root:
        os.chmod(root, 0o755)
        yield Path(root) / "index"
        for at, _, _ in os.walk(root):
            os.chmod(at, 0o755)


def lock_up(folder: Path) -> None:
    for at, _, names in os.walk(folder):
        for name in names:
            os.chmod(os.path.join(at, name), 0o444)
        os.chmod(at, 0o555)


def test_a_folder_that_may_only_be_read_can_be_read(readable_folder: Path) -> None:
    folder = readable_folder
    with Store.create(folder, {}) as store:
        put(store, "a")
    lock_up(folder)

    def check() -> None:
        with Store.open(folder) as store:
            assert state_of_names(store, "a")
            store.touch([key_of("a")])
            assert store.verify().clean
            refuses(StoreError, "opened for reading", lambda: put(store, "b"))
            refuses(StoreError, "writable=True", lambda: store.remove(["da"]))
            refuses(StoreError, "writable=True", store.prune)
            refuses(StoreError, "writable=True", store.compact)
        refuses(OutputError, "cannot be written", lambda: Store.open(folder, writable=True))

    before = (folder / "index.sqlite").read_bytes()
    as_nobody(check)
    assert (folder / "index.sqlite").read_bytes() == before


def state_of_names(store: Store, *names: str) -> bool:
    return all(
        content(store, name) == record_of(name) and store.document(f"d{name}") == document_of(f"d{name}", name)
        for name in names
    )


def kill_in_mid_transaction(folder: Path) -> None:
    """A writer dies that has written half of what it wanted to the database."""
    pid = os.fork()
    if pid == 0:
        db = sqlite3.connect(folder / "index.sqlite", isolation_level=None)
        db.execute("PRAGMA cache_size = 1")  # so that pages go to the file before the end
        db.execute("BEGIN IMMEDIATE")
        db.execute("DELETE FROM documents")
        db.executemany("INSERT INTO meta VALUES (?, ?, 0)", ((str(n), "x" * 500) for n in range(2000)))
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(pid, 0)
    assert (folder / "index.sqlite-journal").stat().st_size > 0


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_an_unfinished_transaction_is_rolled_back_by_who_writes_and_by_nobody_else(readable_folder: Path) -> None:
    folder = readable_folder
    with Store.create(folder, {}) as store:
        put(store, "a")
    kill_in_mid_transaction(folder)
    before = files_of(folder)
    said = "a process was killed while it was writing to it.*`m0kit index prune .* --unused-days 9999`"
    refuses(StoreError, said, lambda: Store.open(folder))
    assert files_of(folder) == before
    lock_up(folder)
    as_nobody(lambda: refuses(StoreError, said, lambda: Store.open(folder)))
    for path in (folder, folder / "segments", *folder.glob("*.sqlite*")):
        path.chmod(0o777 if path.is_dir() else 0o666)
    Store.open(folder, writable=True).close()
    with Store.open(folder) as store:
        assert state_of_names(store, "a")
        assert store.verify().clean
    assert not (folder / "index.sqlite-journal").exists()


def test_a_reader_goes_on_when_the_writer_beside_it_is_killed(folder: Path) -> None:
    """It was there before, so the journal is no stranger's; so do children that were forked while it was open."""
    with Store.create(folder, {}) as store:
        put(store, "a", "b")
    with Store.open(folder) as reader, Store.open(folder) as other:
        assert state_of_names(reader, "a")
        for read in (lambda: state_of_names(reader, "a"), lambda: in_child(lambda: state_of_names(other, "b"))):
            kill_in_mid_transaction(folder)
            reader.touch([key_of("a")])
            assert (folder / "index.sqlite-journal").exists(), "that is not worth rolling back for"
            read()
            assert not (folder / "index.sqlite-journal").exists()
        assert state_of_names(reader, "a", "b")
        assert reader.verify().clean


def test_a_reader_beside_a_killed_writer_that_may_not_write_says_what_to_do(readable_folder: Path) -> None:
    folder = readable_folder
    with Store.create(folder, {}) as store:
        put(store, "a")
    reader = Store.open(folder)
    kill_in_mid_transaction(folder)
    lock_up(folder)
    as_nobody(lambda: refuses(StoreError, "--unused-days 9999", lambda: reader.get(key_of("a"))))
    reader.close()


@pytest.mark.parametrize("name", ["index.sqlite", "lock.sqlite"])
@pytest.mark.parametrize("writable", [False, True])
def test_a_journal_that_names_another_file_deletes_nothing(folder: Path, name: str, writable: bool) -> None:
    with Store.create(folder, {}) as store:
        put(store, "a")
    victim = folder.with_name("victim.txt")
    victim.write_text("dear to somebody")
    place = os.fsencode(victim)
    head = bytes.fromhex("d9d505f920a163d7") + struct.pack(">IIIII", 0, 0, 3, 512, 4096)
    super_journal = struct.pack(">I", (1 << 30) // 4096 + 1) + place + struct.pack(">II", len(place), sum(place))
    (folder / f"{name}-journal").write_bytes(head.ljust(512, b"\0") + super_journal + head[:8])
    refuses(StoreError, "names another file, which SQLite would delete", partial(Store.open, folder, writable=writable))
    assert victim.read_text() == "dear to somebody"


INSIDE = ["index.sqlite", "lock.sqlite", "segments", "segments/000001.kv", "index.sqlite-journal"]


KINDS = ["link", "dangling", "folder", "fifo", "hard link"]
# A folder is one, and has no hard links; a journal is only removed.
ODD = [
    (place, kind)
    for place, kind in itertools.product(INSIDE, KINDS)
    if (place, kind) != ("segments", "folder")
    and (kind != "hard link" or place not in ("segments", "index.sqlite-journal"))
]


@pytest.mark.parametrize(("place", "kind"), ODD)
def test_what_is_no_file_of_the_index_itself_is_neither_read_nor_written(
    folder: Path, tmp_path: Path, place: str, kind: str
) -> None:
    with Store.create(folder, {}) as store:
        put(store, *"abc")
        store.remove(["da"])
    target, victim = folder / place, tmp_path / "victim"
    if not target.exists():
        target.write_bytes(b"")
    if kind == "hard link":
        os.link(target, victim)
    else:
        target.rename(victim)
        make: dict[str, Callable[[], None]] = {
            "link": lambda: target.symlink_to(victim),
            "dangling": lambda: target.symlink_to(tmp_path / "nowhere"),
            "folder": target.mkdir,
            "fifo": lambda: os.mkfifo(target),
        }
        make[kind]()
    before = files_of(victim) if victim.is_dir() else victim.read_bytes()

    def use(writable: bool) -> None:
        with Store.open(folder, writable=writable) as store:
            put(store, "new", size=10) if writable else store.verify()

    for writable in (True,) if kind == "hard link" else (False, True):
        with pytest.raises(
            StoreError, match=r"an index has only files of its own|m0kit writes only|hard link"
        ) as caught:
            use(writable)
        assert str(folder) in str(caught.value)
    assert before == (files_of(victim) if victim.is_dir() else victim.read_bytes())
    assert os.path.lexists(target)
    assert not (tmp_path / "nowhere").exists()


def test_what_becomes_a_link_while_it_is_open_is_not_followed(folder: Path, tmp_path: Path) -> None:
    """By each operation: none trusts what opening has seen."""
    victim = tmp_path / "victim"
    with Store.create(folder, {}) as store:
        put(store, *"abcdefgh", size=30_000)
        store.remove(["da", "de"])
        for path in segments(folder):
            path.rename(victim.with_name(f"victim {path.name}"))
            path.symlink_to(victim.with_name(f"victim {path.name}"))
        before = {path: path.read_bytes() for path in tmp_path.glob("victim *")}
        actions: list[Callable[[], object]] = [
            lambda: store.get(key_of("b")), lambda: store.prefetch([key_of("b")]), store.verify,
            store.compact, lambda: put(store, "new"), lambda: store.prune(max_bytes=0),
        ]  # fmt: skip
        for action in actions:
            refuses(StoreError, "is a link, and an index has only files of its own", action)
        with suppress(StoreError):
            store.remove(store.ids())
        assert before == {path: path.read_bytes() for path in tmp_path.glob("victim *")}
        shutil.move(folder / "segments", tmp_path / "victims")
        (folder / "segments").symlink_to(tmp_path / "victims")
        refuses(StoreError, "segments: is a link", lambda: put(store, "new"))
    assert len(list((tmp_path / "victims").iterdir())) == len(before)


def test_an_index_may_be_reached_through_a_link(folder: Path, tmp_path: Path) -> None:
    with Store.create(folder, {}) as store:
        put(store, "a")
    (tmp_path / "link").symlink_to(folder)
    with Store.open(tmp_path / "link", writable=True) as store:
        put(store, "b")
        assert state_of_names(store, "a", "b")


def unharmed(store: Store, folder: Path) -> None:
    """Nothing of the failed `add` is there, and the store goes on."""
    assert store.ids() == ["da"]
    assert state_of_names(store, "a")
    assert store.has(map(key_of, ["b", "c", "e"])) == set()
    assert {number for number, _ in known_segments(store)} == {number for number, _ in segments_there(folder)}
    assert store.verify().clean
    put(store, "e")
    assert known_segments(store) == segments_there(folder)
    assert state_of_names(store, "a", "e")
    store.remove(["de"])


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EACCES])
@pytest.mark.parametrize("step", ["write_whole", "sync", "sync_path"])
def test_no_step_that_fails_leaves_anything(
    folder: Path, monkeypatch: pytest.MonkeyPatch, step: str, code: int
) -> None:
    function = getattr(segment_files, step)
    left = 0

    def failing(*arguments: Any) -> None:
        nonlocal left
        left -= 1
        if left == 0:
            if step == "write_whole":
                function(arguments[0], arguments[1][: arguments[1].nbytes // 2])
            raise OSError(code, os.strerror(code))
        function(*arguments)

    monkeypatch.setattr(segment_files, step, failing)
    with Store.create(folder, {}) as store:
        put(store, "a")
        failed = 0
        while True:
            left = failed + 1
            try:
                put(store, "b", "c", size=100_000)  # more than a segment
            except OutputError as error:
                message = str(error)
            else:
                break
            assert os.strerror(code) in message
            assert ("Make room" in message) == (code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG))
            failed += 1
            left = 0
            unharmed(store, folder)
        assert failed >= {"write_whole": 8, "sync": 3, "sync_path": 1}[step]
        assert store.ids() == ["da", "db", "dc"]


def test_a_database_that_cannot_grow_changes_nothing(folder: Path) -> None:
    with Store.create(folder, {}) as store:
        put(store, "a")
        db = store.catalogue.connection()
        pages = db.execute("PRAGMA page_count").fetchone()[0]
        db.execute(f"PRAGMA max_page_count = {pages}")
        source = "x" * 50_000
        document = StoredDocument("b", "text", b"b", key_of("b"), source)
        refuses(OutputError, "full", lambda: store.add([document], {key_of("b"): [b"b"]}))
        db.execute("PRAGMA max_page_count = 1000000")
        unharmed(store, folder)


@pytest.mark.parametrize("limit", [20_000, 90_000, 120_000])
def test_a_file_that_may_not_grow_changes_nothing(folder: Path, limit: int) -> None:
    """The system's own limit on file sizes, for segments and database alike."""
    Store.create(folder, {}).close()
    with Store.open(folder, writable=True) as store:
        put(store, "a", size=1000)

    def check() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        with Store.open(folder, writable=True) as store:
            stored = ["a"]

            def fill() -> NoReturn:
                while True:
                    name = f"b{len(stored)}"
                    put(store, name, size=1000)
                    stored.append(name)

            refuses(OutputError, "room", fill)
            assert store.ids() == [f"d{name}" for name in stored]
            assert all(content(store, name) == record_of(name, 1000) for name in stored)
            assert store.verify().clean

    in_child(check)


def test_compaction_that_runs_out_of_space_loses_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Store.create(folder, {}) as store:
        put(store, *NAMES)
        store.remove([f"d{name}" for name in NAMES[::2]])
        expected = state_of(store)
        with monkeypatch.context() as patch:
            patch.setattr(segment_files, "write_whole", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOSPC, "")))
            refuses(OutputError, "Make room", store.compact)
        assert state_of(store) == expected
        store.compact()
        assert state_of(store) == expected
        assert store.stats().dead_bytes == 0


# Damage


@pytest.mark.broad
def test_every_changed_byte_is_found_named_and_healed_by_adding_again(folder: Path) -> None:
    rng = random.Random(5)
    with Store.create(folder, {}) as store:
        put(store, *"abcdef")
        expected = [content(store, name) for name in "abcdef"]
    for _ in range(120):
        with Store.open(folder, writable=True) as store:
            piece = rng.choice([p for n, _ in store.catalogue.segments() for p in store.catalogue.pieces(n) if p.size])
            path = store.segments.path(piece.segment)
            data = bytearray(path.read_bytes())
            data[piece.start + rng.choice([0, piece.size - 1, rng.randrange(piece.size)])] ^= 1 << rng.randrange(8)
            path.write_bytes(data)
            (name,) = [n for n in "abcdef" if n in "".join(store.catalogue.owners(bool(piece.content), piece.key))[1:]]
            verified = store.verify()
            assert not verified.clean
            if piece.content:
                assert verified.contents == (f"d{name}",)
                with pytest.raises(RecordDamagedError, match=f"content of document 'd{name}' is not"):
                    store.document(f"d{name}")
            else:
                assert verified.damaged == {key_of(name): (f"d{name}",)}
                with pytest.raises(RecordDamagedError, match=f"of document 'd{name}' is not"):
                    store.get(key_of(name))
            if rng.random() < 0.3:  # a damaged record goes then, a damaged content stays so
                store.remove(["dz"] if not store.add([document_of("dz", "z")], {key_of("z"): [b"z"]}) else [])
                damaged = store.compact().damaged
                assert damaged in ({}, verified.damaged)
                assert store.verify().contents == verified.contents
            put(store, name)
            assert store.verify().clean
            assert [content(store, name) for name in "abcdef"] == expected


def test_what_a_cut_off_or_missing_segment_held_is_named(folder: Path) -> None:
    with Store.create(folder, {}) as store:
        put(store, *"abcd", size=40_000)
        expected = {name: store.document(f"d{name}") for name in "abcd"}
        assert len(segments(folder)) == 2
    first, second = segments(folder)
    os.truncate(first, 50_000)
    second.unlink()
    with Store.open(folder) as store:
        verified = store.verify()
        assert verified.segments == (first.name, second.name)
        assert verified.records == 4
        assert len(verified.damaged) >= 3
        for key, ids in verified.damaged.items():
            refuses(RecordDamagedError, ids[0], partial(store.get, key))
    with Store.open(folder, writable=True) as store:
        for name in "abcd":
            put(store, name, size=40_000)
        assert {name: store.document(f"d{name}") for name in "abcd"} == expected
        store.compact()
        assert store.verify().clean
        assert [content(store, name) for name in "abcd"] == [record_of(name, 40_000) for name in "abcd"]


def test_compaction_of_what_is_missing_keeps_the_documents_and_says_so(folder: Path) -> None:
    with Store.create(folder, {}) as store:
        put(store, *"abcd", size=40_000)
        store.remove(["da"])
        shutil.rmtree(folder / "segments")
        (folder / "segments").mkdir()
        # Only what lay beside dead bytes is looked at.
        assert store.compact().damaged == {key_of("b"): ("db",)}
        assert store.ids() == ["db", "dc", "dd"]
        assert store.verify().damaged == {key_of("c"): ("dc",), key_of("d"): ("dd",)}
        assert store.verify().pending == ("db",)
        assert set(store.verify().contents) == {f"d{name}" for name in "bcd" if document_of("x", name).data}


def allowed(folder: Path, action: Callable[[], object]) -> None:
    """It works, or one of our errors that names the folder comes of it."""
    message = str(folder)
    try:
        action()
    except (StoreError, OutputError) as error:
        message = str(error)
    assert str(folder) in message


def operate(folder: Path, writable: bool, rng: random.Random) -> None:
    """All that a store can do, in any order."""
    with Store.open(folder, writable=writable) as store:
        actions: list[Callable[[], object]] = [
            store.ids, store.stats, store.verify, lambda: store.has(map(key_of, "ab")),
            *(lambda name=name: store.get(key_of(name)) for name in "abcd"),
            *(lambda name=name: store.document(f"d{name}") for name in "abcd"),
        ]  # fmt: skip
        if writable:
            actions += [
                lambda: put(store, "new"), lambda: put(store, *"abcd"), lambda: store.remove(["da"]),
                lambda: store.prune(max_bytes=30_000), store.compact,
            ]  # fmt: skip
        for action in rng.sample(actions, len(actions)):
            allowed(folder, action)


@pytest.mark.broad
def test_a_damaged_database_is_our_error_whatever_is_wrong(folder: Path, tmp_path: Path) -> None:
    rng = random.Random(6)
    with Store.create(folder, {}, MIN_LIMIT) as store:
        put(store, *"abcdefgh", size=20_000)
    whole = (folder / "index.sqlite").read_bytes()
    for n in range(150):
        damaged = tmp_path / f"damaged {n}"
        shutil.copytree(folder, damaged)
        data = bytearray(whole)
        length = rng.choice([1, 1, 16, 4096])
        start = rng.choice([rng.randrange(100), rng.randrange(len(data))])
        data[start : start + length] = rng.choice([rng.randbytes(length), bytes(length)])
        (damaged / "index.sqlite").write_bytes(data)
        allowed(damaged, partial(operate, damaged, False, rng))
        allowed(damaged, partial(operate, damaged, True, rng))
        shutil.rmtree(damaged)


HELD = tuple("abcdef")


@pytest.fixture
def held(folder: Path) -> Path:
    """An index of six documents in two segments, with dead bytes in one of them."""
    with Store.create(folder, {"artifact": "x"}) as store:
        put(store, *HELD[:3], "gone", size=30_000)
        store.add([StoredDocument("da", "image", b"pixels", key_of("a"), "a.png")], {})
        put(store, *HELD[3:], size=20_000)
        store.remove(["dgone"])
        assert len(segments(folder)) == 2
        assert store.stats().dead_bytes > 0
    return folder


def what_is_right(store: Store) -> set[str]:
    """What is told of a document is its own, or it is damaged. Returns what was told."""
    told: set[str] = set()
    expected = {f"d{name}": document_of(f"d{name}", name) for name in HELD}
    expected["da"] = StoredDocument("da", "image", b"pixels", key_of("a"), "a.png")
    for name in HELD:
        with suppress(StoreError):
            document = store.document(f"d{name}")
            assert document in (None, expected[f"d{name}"])
            told |= {f"document {name}"} if document is not None else set()
        with suppress(StoreError):
            record = store.get(key_of(name))
            size = 30_000 if name in "abc" else 20_000
            assert record is None or record.tobytes() == record_of(name, size)
            told |= {f"record {name}"} if record is not None else set()
    return told


ALL = {f"{what} {name}" for what in ("document", "record") for name in HELD}


def judge(folder: Path) -> str:
    """A damaged index is refused, or what it tells is right; it loses nothing of that in whatever is done with it."""
    before: set[str] = set()
    outcome = "refused"
    with suppress(StoreError), Store.open(folder) as store:
        outcome = "noticed"
        before = what_is_right(store)
        with suppress(StoreError):
            verified = store.verify()
            if before == ALL:
                outcome = "unharmed"
            elif verified.clean:  # whole rows are missing, as after `remove` and `prune`
                for name in HELD:
                    assert f"document {name}" in before or f"d{name}" not in store.ids()
                    assert (
                        f"record {name}" in before or f"d{name}" in {*verified.pending} or f"d{name}" not in store.ids()
                    )
                outcome = "lost"
    with suppress(StoreError, OutputError), Store.open(folder, writable=True) as store:
        # Nothing undamaged goes, but what the rows themselves say is to go first.
        for action in (store.compact, lambda: put(store, "new", size=50), store.compact, lambda: store.prune()):
            allowed(folder, action)
            assert what_is_right(store) >= before
        allowed(folder, lambda: store.prune(max_bytes=100_000))
        allowed(folder, lambda: store.prune(max_bytes=0))
        assert {told for told in what_is_right(store) if told[0] == "d"} >= {told for told in before if told[0] == "d"}
        allowed(folder, lambda: store.remove(store.ids()))
        allowed(folder, store.compact)
    return outcome


@pytest.mark.broad
def test_no_changed_byte_of_the_database_gives_a_document_anothers_state(held: Path, tmp_path: Path) -> None:
    whole = (held / "index.sqlite").read_bytes()
    outcomes: dict[str, int] = {}
    rng = random.Random(8)
    # A database has much empty space: half of the bytes are chosen among those that hold something.
    places = {*range(0, len(whole), len(whole) // 250), *rng.sample([i for i, byte in enumerate(whole) if byte], 450)}
    for place in sorted(places):
        damaged = tmp_path / "damaged"
        shutil.copytree(held, damaged)
        data = bytearray(whole)
        data[place] ^= 1 << rng.randrange(8)
        (damaged / "index.sqlite").write_bytes(data)
        outcome = judge(damaged)
        outcomes[outcome] = outcomes.get(outcome, 0) + 1
        shutil.rmtree(damaged)
    assert set(outcomes) <= {"refused", "noticed", "unharmed"}, outcomes
    assert outcomes["refused"] > 300, outcomes


def changes(db: sqlite3.Connection) -> Iterator[tuple[str, tuple[Any, ...]]]:
    """Statements that each change a field of a row, to another row's or to something near it, or delete a row."""
    for (table,) in db.execute("SELECT name FROM sqlite_schema WHERE type = 'table' ORDER BY name").fetchall():
        columns = [row[1] for row in db.execute(f"PRAGMA table_info({table})")]
        rows = db.execute(f"SELECT * FROM {table} ORDER BY 1, 2").fetchall()
        for n, row in enumerate(rows):
            where = " AND ".join(f"{column} IS ?" for column in columns)
            yield f"DELETE FROM {table} WHERE {where}", row
            for i, column in enumerate(columns):
                others = [rows[(n + 1) % len(rows)][i], rows[(n + 2) % len(rows)][i]]
                if isinstance(row[i], bytes):
                    others += [row[i][:-1] + bytes([row[i][-1] ^ 1])]
                elif isinstance(row[i], str):
                    others += [row[i] + "x", "text", "image"]
                else:
                    others += [row[i] + 1, 0, -1, 1 << 40, (1 << 62) + 1]
                for other in dict.fromkeys(others):
                    yield f"UPDATE {table} SET {column} = ? WHERE {where}", (other, *row)


@pytest.mark.broad
@pytest.mark.parametrize("counted", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_no_changed_field_or_lost_row_gives_a_document_anothers_state(
    held: Path, tmp_path: Path, counted: bool
) -> None:
    """Even where triggers and checks let it pass, or do not see it."""
    with closing(sqlite3.connect(held / "index.sqlite")) as db:
        statements = list(changes(db))
    outcomes: dict[str, list[str]] = {"lost": []}
    for statement, values in statements:
        damaged = tmp_path / "damaged"
        shutil.copytree(held, damaged)
        with closing(sqlite3.connect(damaged / "index.sqlite", isolation_level=None)) as db:
            db.execute("PRAGMA ignore_check_constraints = ON")
            triggers = db.execute("SELECT name, sql FROM sqlite_schema WHERE type = 'trigger'").fetchall()
            for name, _ in [] if counted else triggers:
                db.execute(f"DROP TRIGGER {name}")
            with suppress(sqlite3.IntegrityError, OverflowError):
                db.execute(statement, values)
            for _, sql in [] if counted else triggers:
                db.execute(sql)
        outcomes.setdefault(judge(damaged), []).append(statement)
        shutil.rmtree(damaged)
    # With the triggers it is what `remove` and `prune` do.
    assert {statement[:21] for statement in outcomes.pop("lost", [])} <= {
        "DELETE FROM documents",
        "DELETE FROM pieces WH",
    }
    assert set(outcomes) <= {"refused", "noticed", "unharmed"}
    assert min(map(len, outcomes.values())) > 50, "each of them comes"


def test_a_document_whose_row_is_lost_with_its_count_is_missed(held: Path) -> None:
    """Its content is still there, as no `remove` leaves one, until `compact` drops it."""
    with closing(sqlite3.connect(held / "index.sqlite")) as db, db:
        db.execute("DELETE FROM documents WHERE id = 'db'")  # triggers count it out
    with Store.open(held) as store:
        found = store.verify()
        assert (found.lost, found.clean, store.document("db")) == (1, False, None)
    with Store.open(held, writable=True) as store:
        store.compact()
        assert store.verify().clean
        assert what_is_right(store) == ALL - {"document b"}


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="the system does not say what is open")
def test_a_database_that_cannot_be_opened_is_closed_again(folder: Path) -> None:
    Store.create(folder, {}).close()
    (folder / "index.sqlite").write_bytes(b"not a database" * 1000)
    with pytest.raises(StoreError) as caught:  # its traceback keeps alive what the frames held
        Store.open(folder)
    opened = [str(path.resolve()) for path in Path("/proc/self/fd").iterdir()]
    assert not [name for name in opened if name.startswith(str(folder))], caught.value


@pytest.mark.parametrize("length", [0, 1, 99, 100, 4096, 20_000, 60_000])
def test_a_cut_off_database_is_refused(folder: Path, length: int) -> None:
    with Store.create(folder, {}) as store:
        put(store, "a", "b")
    os.truncate(folder / "index.sqlite", length)
    for writable in (False, True):
        refuses(StoreError, "damaged", partial(Store.open, folder, writable=writable))


@pytest.mark.parametrize("data", [b"", b"not a database" * 1000, b"\0" * 8192])
def test_an_overwritten_database_is_refused(folder: Path, data: bytes) -> None:
    Store.create(folder, {}).close()
    (folder / "index.sqlite").write_bytes(data)
    refuses(StoreError, "damaged", lambda: Store.open(folder))


def test_damage_that_comes_while_it_is_open_is_our_error(folder: Path) -> None:
    with Store.create(folder, {}) as store, Store.open(folder) as reader:
        put(store, *"abcdefgh")
        (folder / "index.sqlite").write_bytes(b"x" * 50_000)
        for action in (reader.ids, reader.verify, lambda: reader.get(key_of("a")), lambda: put(store, "new")):
            refuses(StoreError, "the database is damaged", action)
        reader.touch([key_of("a")])


def test_a_counter_that_is_lost_or_wrong_loses_nothing(folder: Path) -> None:
    """The next number is higher than all that is there, whatever is noted of it."""
    with Store.create(folder, {}) as store:
        for name in "abcd":
            put(store, name, size=100_000)
    assert [number for number, _ in segments_there(folder)] == [1, 2, 3, 4]
    for value in (0, 2, 100, 0):
        with closing(sqlite3.connect(folder / "index.sqlite", isolation_level=None)) as db:
            db.execute("UPDATE counts SET value = ?1, mirror = -?1 WHERE name = 'segment'", (value,))
        with Store.open(folder, writable=True) as store:
            store.remove(["da"])
            (folder / "segments" / "000200.kv").write_bytes(b"somebody's")
            put(store, "a", size=100_000)
            assert all(content(store, name) == record_of(name, 100_000) for name in "abcd")
            store.compact()
            assert all(content(store, name) == record_of(name, 100_000) for name in "abcd")
            assert store.verify().clean


def test_a_number_that_is_used_again_is_not_read_as_what_it_was(folder: Path) -> None:
    """What a reader has mapped is another file by then."""
    with Store.create(folder, {}) as store, Store.open(folder) as reader:
        put(store, "a", size=5000)
        view = reader.get(key_of("a"))
        store.remove(["da"])
        with closing(sqlite3.connect(folder / "index.sqlite", isolation_level=None)) as db:
            db.execute("UPDATE counts SET value = 0, mirror = 0 WHERE name = 'segment'")
        put(store, "b", size=5000)
        assert [path.name for path in segments(folder)] == ["000001.kv"]
        assert content(reader, "b") == record_of("b", 5000)
        assert view is not None
        assert view.tobytes() == record_of("a", 5000)


def test_a_file_that_some_piece_lies_in_is_never_swept_away(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Store.create(folder, {}) as store:
        put(store, "a", "b", size=5000)
        before = segments(folder)[0].read_bytes()
        with closing(sqlite3.connect(folder / "index.sqlite", isolation_level=None)) as db:
            db.execute("DELETE FROM segments")
        with monkeypatch.context() as patch:  # after a failure the folder is looked through again
            patch.setattr(segment_files, "write_whole", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOSPC, "")))
            with pytest.raises((OutputError, StoreError)):
                put(store, "c")
        with suppress(StoreError):
            put(store, "c")
        with suppress(StoreError):
            store.compact()
        assert segments(folder)[0].read_bytes() == before
    refuses(StoreError, "the database is damaged", lambda: Store.open(folder, writable=True))
    assert segments(folder)[0].read_bytes() == before


def test_a_count_that_goes_wrong_while_it_is_open_drops_no_segment(folder: Path) -> None:
    with Store.create(folder, {}) as store:
        put(store, "a", "b", size=5000)
        with closing(sqlite3.connect(folder / "index.sqlite", isolation_level=None)) as db:
            db.execute("UPDATE segments SET pieces = 0")
        put(store, "c")
        assert state_of_names(store, "c")
        assert content(store, "a") == record_of("a", 5000)


@pytest.mark.parametrize("max_bytes", [None, MIN_LIMIT])
def test_segments_that_are_mapped_never_get_shorter(folder: Path, max_bytes: int | None) -> None:
    """A reader would be killed by the system: so it is with what lies behind the end, too."""
    with Store.create(folder, {}, max_bytes) as store:
        put(store, "a", "b", size=5000)
        view = store.get(key_of("a"))
        sizes = dict(segments_there(folder))
        for path in segments(folder):
            with open(path, "ab") as file:
                file.write(b"x" * 100_000)
        for _ in range(3):
            put(store, "c")
            store.remove(["dc"])
        assert all(size >= sizes.get(number, 0) for number, size in segments_there(folder))
        assert view is not None
        assert view.tobytes() == record_of("a", 5000)
    with Store.open(folder, writable=True) as store:
        assert known_segments(store) == segments_there(folder)
        assert store.stats().dead_bytes >= 100_000, "it takes space, so it counts"
        store.compact()
        assert store.stats().dead_bytes == 0
        assert folder_bytes(folder) < 150_000
        assert content(store, "a") == record_of("a", 5000)


def test_what_failed_to_be_written_counts_towards_the_limit(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write, failing = segment_files.write_whole, False

    def writing(file: Any, data: memoryview) -> None:
        write(file, data)
        if failing:
            raise OSError(errno.ENOSPC, "")

    monkeypatch.setattr(segment_files, "write_whole", writing)
    with Store.create(folder, {}, MIN_LIMIT) as store:
        for n in range(150):
            failing = False
            put(store, f"a{n}", size=30_000)
            failing = True
            refuses(OutputError, "Make room", partial(put, store, f"b{n}", size=60_000))
            assert folder_bytes(folder) <= MIN_LIMIT
        failing = False
        assert store.verify().clean
        assert content(store, "a149") == record_of("a149", 30_000)


@pytest.mark.parametrize("size", [1 << 33, 1 << 59])
def test_a_row_that_claims_more_than_there_is_costs_no_memory(folder: Path, size: int) -> None:
    with Store.create(folder, {}) as store:
        put(store, "a", size=5000)
        store.add([StoredDocument("t", "text", b"text", key_of("a"))], {})
    with closing(sqlite3.connect(folder / "index.sqlite", isolation_level=None)) as db:
        db.execute("UPDATE segments SET size = ?1, mirror = -?1", (size + (1 << 20),))
        db.execute("UPDATE pieces SET size = ?", (size,))
    allowed(folder, lambda: operate(folder, False, random.Random(0)))

    def writing() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))
        for seed in range(3):
            allowed(folder, partial(operate, folder, True, random.Random(seed)))

    in_child(writing)


def test_a_meta_table_that_says_something_absurd_is_damaged(folder: Path) -> None:
    Store.create(folder, {"a": 1}, MIN_LIMIT).close()
    values = {
        "max_bytes": [
            "1e400",
            "-1",
            "0",
            "true",
            '"4194304"',
            str(MIN_LIMIT - 1),
            str(1 << 62),
            "9" * 400,
            "NaN",
            "1.5",
        ],
        "identity": ["[]", "null", '{"a": 1, "a": 2}', '{"a": NaN}', "[" * 100_000, '{"a": "\\ud800"}', ""],
        "id": ["1", '"../x"', '""', "null"],
    }
    for name, texts in values.items():
        for text in texts:
            damaged = folder.with_name("damaged")
            shutil.copytree(folder, damaged)
            with closing(sqlite3.connect(damaged / "index.sqlite", isolation_level=None)) as db:
                db.execute("UPDATE meta SET value = ?, sum = ? WHERE name = ?", (text, sum_of(name, text), name))
            for writable in (False, True):
                refuses(StoreError, "the database is damaged", partial(Store.open, damaged, writable=writable))
            shutil.rmtree(damaged)


def test_a_limit_beyond_every_disk_is_refused(folder: Path) -> None:
    for limit in ((1 << 60) + 1, 10**30):
        refuses(StoreError, "larger than any disk", partial(Store.create, folder, {}, limit))
    Store.create(folder, {}, 1 << 60).close()


def test_an_id_may_be_any_text_and_what_cannot_be_one_is_not_there(folder: Path) -> None:
    with Store.create(folder, {}) as store:
        longest = "é" * (MAX_NAME_BYTES // 2)
        store.add([StoredDocument(longest, "text", b"x", key_of("a"), longest)], {})
        assert store.document(longest) is not None
        for name in ("\ud800", "x" * (MAX_NAME_BYTES + 1), "x" * (32 << 20), "\0"):
            assert store.document(name) is None
            assert store.content(name) is None
            assert store.remove([name]) == [name]
        refuses(
            InputError, "expected at most 1048576", partial(StoredDocument, longest + "x", "text", b"", key_of("a"))
        )
        refuses(
            InputError,
            "expected at most 1048576",
            partial(StoredDocument, "a", "text", b"", key_of("a"), longest + "x"),
        )


def test_prune_drops_nothing_for_an_age_that_is_none(folder: Path) -> None:
    with Store.create(folder, {}) as store:
        put(store, "a")
        for days in (float("nan"), float("inf"), 1e300):
            assert store.prune(unused_days=days).records == 0
        assert state_of_names(store, "a")


# Opening and making


def test_what_is_no_index_is_refused(folder: Path, tmp_path: Path) -> None:
    refuses(StoreError, f"{folder}: no such folder", lambda: Store.open(folder))
    refuses(StoreError, "there is no index.sqlite", lambda: Store.open(tmp_path))
    with sqlite3.connect(tmp_path / "index.sqlite") as other:
        other.execute("CREATE TABLE meta (name TEXT, value TEXT)")
    other.close()
    refuses(StoreError, "not the database of an index", lambda: Store.open(tmp_path, writable=True))


@pytest.mark.parametrize(
    ("version", "way"), [(1, "older m0kit: make the index again"), (FORMAT_VERSION + 1, "Update m0kit")]
)
def test_another_version_is_refused_with_the_way_out(folder: Path, version: int, way: str) -> None:
    Store.create(folder, {}).close()
    with sqlite3.connect(folder / "index.sqlite") as db:
        db.execute(f"PRAGMA user_version = {version}")
    db.close()
    for writable in (False, True):
        refuses(StoreError, f"version {version}; .*{way}", partial(Store.open, folder, writable=writable))


def test_only_an_empty_place_becomes_a_store(folder: Path) -> None:
    folder.mkdir()
    Store.create(folder, {"a": 1}).close()
    refuses(OutputError, "exists already", lambda: Store.create(folder, {}))
    file = folder.with_name("file")
    file.write_text("x")
    refuses(OutputError, "exists already", lambda: Store.create(file, {}))
    refuses(OutputError, "cannot be written", lambda: Store.create(file / "below", {}))
    refuses(
        StoreError, f"expected at least {MIN_LIMIT}", lambda: Store.create(folder.with_name("b"), {}, MIN_LIMIT - 1)
    )
    deep = folder.with_name("not") / "there" / "yet"
    with Store.create(deep, {}) as store:
        put(store, "a")
    assert sorted(path.name for path in folder.parent.iterdir()) == ["file", "index", "not"]
    with Store.open(folder) as store:
        assert store.identity == {"a": 1}


def test_a_create_that_fails_or_is_killed_leaves_no_store(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for kill_at in range(1, 200):
        pid = os.fork()
        if pid == 0:
            left = kill_at

            def step(event: str, _: object) -> None:
                nonlocal left
                left -= event.startswith(("open", "os.", "sqlite3.", "fcntl."))
                if left == 0:
                    os.kill(os.getpid(), signal.SIGKILL)

            sys.addaudithook(step)  # every file that is opened, made, renamed …
            Store.create(folder, {"a": 1})
            os._exit(0)
        killed = os.waitpid(pid, 0)[1] == signal.SIGKILL
        if folder.exists():
            with Store.open(folder, writable=True) as store:
                put(store, "a")
                assert store.identity == {"a": 1}
            shutil.rmtree(folder)
        else:
            assert killed
        if not killed:
            break
    assert not killed, "the last one went through"
    assert list(folder.parent.iterdir()) == []  # what the killed ones left, the next one cleared away
    monkeypatch.setattr(files, "sync_path", lambda _: (_ for _ in ()).throw(OSError(errno.ENOSPC, "")))
    refuses(OutputError, "cannot be written", lambda: Store.create(folder, {}))
    assert list(folder.parent.iterdir()) == []


def test_a_killed_writers_leavings_are_swept_and_other_files_are_not(folder: Path) -> None:
    with Store.create(folder, {}) as store:
        put(store, "a")
    (known,) = segments(folder)
    size = known.stat().st_size
    with open(known, "ab") as file:
        file.write(b"x" * 5000)
    (folder / "segments" / "000007.kv").write_bytes(b"x")
    (folder / "segments" / "notes.txt").write_text("mine")
    with Store.open(folder) as store:
        assert store.verify().clean
        assert len(segments(folder)) == 3, "a reader changes nothing"
    with Store.open(folder, writable=True) as store:
        assert [path.name for path in segments(folder)] == ["000001.kv", "notes.txt"]
        assert known.stat().st_size == size + 5000, "it may be mapped somewhere"
        assert store.stats().dead_bytes >= 5000
        put(store, "b", size=10)
        assert len(segments(folder)) == 2, "what is added lies behind it"
        assert state_of_names(store, "a")
        assert content(store, "b") == record_of("b", 10)
        store.compact()
        assert store.stats().dead_bytes == 0
        assert store.verify().clean


def test_numbers_of_segments_are_never_used_again(folder: Path) -> None:
    seen: set[str] = set()
    for _ in range(4):
        with Store.open(folder, writable=True) if folder.exists() else Store.create(folder, {}) as store:
            put(store, "a")
            (path,) = segments(folder)
            assert path.name not in seen
            seen.add(path.name)
            store.remove(["da"])


def test_the_folder_may_have_any_name_and_the_working_folder_may_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with Store.create("ä b?c#d%41", {}) as store:
        monkeypatch.chdir("/")
        put(store, "a")
    with Store.open(tmp_path / "ä b?c#d%41") as store:
        assert state_of_names(store, "a")


def test_others_may_read_what_the_umask_lets_them(folder: Path) -> None:
    before = os.umask(0o022)
    try:
        with Store.create(folder, {}) as store:
            put(store, "a")
    finally:
        os.umask(before)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o755
    assert stat.S_IMODE(segments(folder)[0].stat().st_mode) == 0o644


def test_a_closed_store_says_so(folder: Path) -> None:
    store = Store.create(folder, {})
    store.close()
    store.close()
    for action in (store.ids, store.stats, lambda: put(store, "a"), lambda: store.touch([])):
        refuses(StoreError, "has been closed", action)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"id": ""}, "at least one character"),
        ({"id": "\ud800"}, "not valid UTF-8"),
        ({"source": "\ud800"}, "not valid UTF-8"),
        ({"data": b"\xff"}, "not valid UTF-8"),
        ({"kind": "video"}, 'kind \'video\', expected "text" or "image"'),
        ({"key": b"short"}, "a key of 5 bytes, expected 32"),
    ],
)
def test_a_document_that_cannot_be_kept_is_refused(change: dict[str, Any], match: str) -> None:
    fields: dict[str, Any] = {"id": "a", "kind": "text", "data": b"a", "key": key_of("a")}
    StoredDocument(**fields)
    refuses(InputError, match, lambda: StoredDocument(**(fields | change)))


def test_a_key_that_is_no_key_is_refused(folder: Path) -> None:
    with Store.create(folder, {}) as store:
        refuses(StoreError, "a record's key of 3 bytes", lambda: store.add([], {b"abc": [b""]}))


# The programs


def serve(folder: Path) -> None:
    """Per line "seed kill_at" on stdin: fork a child that works until it is killed; tell its id and its death.

    A light process that forks: a start of Python per kill would take most of the time.
    """
    for line in sys.stdin:
        seed, kill_at = map(int, line.split())
        pid = os.fork()
        if pid == 0:
            try:
                say(f"pid {os.getpid()}")
                work(folder, seed, kill_at)
            finally:
                os._exit(1)
        say(f"dead {os.waitpid(pid, 0)[1]}")


def say(text: str) -> None:
    line = f"{text}\n".encode()
    assert len(line) <= 4096  # a pipe takes that in one piece, or not at all
    os.write(1, line)


def work(folder: Path, seed: int, kill_at: int) -> None:
    """Random operations for ever; each is announced, and acknowledged with the state that it left."""
    module.SEGMENT_BYTES = SEGMENT
    rng = random.Random(seed)
    store = Store.open(folder, writable=True)
    if kill_at:
        kill_at_step(store, kill_at)
    documents: dict[str, str] = {doc: store.document(doc).source for doc in store.ids()}  # type: ignore[union-attr]

    def present() -> list[str]:
        return sorted(name for name in NAMES if store.has([key_of(name)]))

    records = present()
    while True:
        doing = rng.choice(["add", "add", "add", "remove", "prune", "compact", "touch"])
        new = [f"{n}.{rng.randrange(3)}" for n in rng.sample(range(10), rng.randint(1, 4))]
        ids = {name: f"d{name.split('.')[0]}" for name in new}
        done = dict(documents)
        if doing == "add":
            done |= {ids[name]: name for name in new}
            gone = {documents[doc] for doc in ids.values() if doc in documents} - set(done.values())
            after = sorted((set(records) | set(new)) - gone)
        elif doing == "remove":
            done = {doc: name for doc, name in documents.items() if doc not in ids.values()}
            after = sorted(set(records) - (set(documents.values()) - set(done.values())))
        else:
            after = records
        label = "limited add" if doing == "add" and store.max_bytes else doing
        say(json.dumps({"doing": label, "new": new, "done": {"documents": done, "records": after}}))
        if doing == "add":
            store.add([document_of(ids[name], name) for name in new], {key_of(n): [record_of(n)] for n in new})
        elif doing == "remove":
            store.remove(ids.values())
        elif doing == "prune":
            store.prune(max_bytes=int(store.stats().disk_bytes * rng.uniform(0.3, 1)))
        elif doing == "compact":
            store.compact()
        else:
            store.touch(map(key_of, new))
        documents, records = done, present()
        if doing not in ("prune", "add"):
            assert records == after
        say(json.dumps({"documents": documents, "records": records}))


def kill_at_step(store: Store, kill_at: int) -> None:
    left = kill_at

    def step(*_: object) -> None:
        nonlocal left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    def before(function: Callable[..., Any]) -> Callable[..., Any]:
        def stepping(*arguments: object, **named: object) -> object:
            step()
            return function(*arguments, **named)

        return stepping

    def write(file: Any, data: memoryview) -> None:
        half = data.nbytes // 2
        whole_write(file, data[:half])
        step()
        whole_write(file, data[half:])

    whole_write = segment_files.write_whole
    segment_files.write_whole = write
    segment_files.sync = before(segment_files.sync)
    os.unlink = before(os.unlink)
    # Looking is not a step: a child spends most of its statements on it.
    store.catalogue.connection().set_trace_callback(
        lambda statement: None if statement.startswith(("SELECT", "PRAGMA")) else step()
    )


if __name__ == "__main__":
    program_of: dict[str, Callable[..., None]] = {"serve": serve, "hold": hold}
    if sys.argv[1] == "read":
        module.SEGMENT_BYTES = SEGMENT
        read(Path(sys.argv[2]), int(sys.argv[3]))
    else:
        program_of[sys.argv[1]](Path(sys.argv[2]))
