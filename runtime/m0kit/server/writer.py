"""Additions to an index while it is served: one thread, which writes all that waits in one go.

Owns the order of writes and when one is told to be there: after it is on the disk. What a document's state is, and
when it is computed, is the desk's.

    writer = Writer(store)
    writer.add(stored, state.buffers, told)    # told("read"), "known" or "replaced"; or the error
    writer.remove(["page-1"]).result()         # ids that were not there
"""

import hashlib
import queue
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from typing import Final, NamedTuple

from m0kit.keeping.store import Buffer, Store, StoredDocument

Told = Callable[[str | Exception], None]
_MOST: Final = 64  # additions in one transaction


class _Addition(NamedTuple):
    document: StoredDocument
    buffers: Sequence[Buffer] | None  # of its state; None where that is there
    told: Told


class _Removal(NamedTuple):
    ids: list[str]
    done: "Future[list[str]]"


class Writer:
    """Writes to a store from a thread of its own. Thread-safe."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._waiting: queue.SimpleQueue[_Addition | _Removal | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="m0kit-index", daemon=True)
        self._thread.start()

    def add(self, document: StoredDocument, buffers: Sequence[Buffer] | None, told: Told) -> None:
        """Have a document written; `told` is called by the writing thread."""
        self._waiting.put(_Addition(document, buffers, told))

    def remove(self, ids: list[str]) -> "Future[list[str]]":
        """Have documents removed, after what was added before."""
        done: Future[list[str]] = Future()
        self._waiting.put(_Removal(ids, done))
        return done

    def close(self) -> None:
        """Write what waits, and end."""
        self._waiting.put(None)
        self._thread.join()

    def _run(self) -> None:
        while True:
            batch: list[_Addition] = []
            one = self._waiting.get()
            while isinstance(one, _Addition):
                batch.append(one)
                if len(batch) == _MOST:
                    break
                try:
                    one = self._waiting.get_nowait()
                except queue.Empty:
                    break
            if batch:
                self._add(batch)
            if one is None:
                return
            if isinstance(one, _Removal):
                try:
                    one.done.set_result(self._store.remove(one.ids))
                except Exception as error:  # told to who asked
                    one.done.set_exception(error)

    def _add(self, batch: Sequence[_Addition]) -> None:
        try:
            told = self._written(batch)
        except Exception as error:  # perhaps of one of them alone
            if len(batch) > 1:
                for one in batch:
                    self._add([one])
                return
            told = [error]
        for addition, status in zip(batch, told, strict=True):
            with suppress(Exception):  # who asked may be gone, and others must still be told
                addition.told(status)

    def _written(self, batch: Sequence[_Addition]) -> list[str | Exception]:
        """Write in one transaction. What each is: "read", "replaced" another content, or "known" as it is."""
        before = {one.document.id: self._store.content(one.document.id) for one in batch}
        statuses: list[str | Exception] = []
        for one in batch:
            digest = hashlib.sha256(one.document.data).digest()
            there = before[one.document.id]
            statuses.append("replaced" if there not in (None, digest) else "known" if one.buffers is None else "read")
            before[one.document.id] = digest
        records = {one.document.key: one.buffers for one in batch if one.buffers is not None}
        self._store.add([one.document for one in batch], records)
        return statuses
