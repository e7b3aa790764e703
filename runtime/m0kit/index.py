"""An index: documents that were read once, kept on disk with what the decoder needs of them.

Owns the way from documents to a store; what a document's state is belongs to `m0kit.reranker` and
`m0kit.keeping.states`, files and durability to `m0kit.keeping.store`.

    with open_index("library", reranker) as store:
        add(reranker, store, [("page-1", Path("page.png"), "page.png")])
"""

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from m0kit.errors import InputError, StoreError
from m0kit.keeping.store import Store, StoredDocument
from m0kit.opening import check_identity
from m0kit.reading.inputs import Given, Known, Picture, Text, check_many, parse_content
from m0kit.reranker import Reranker
from m0kit.scoring.engine import not_finite
from m0kit.scoring.image import to_png
from m0kit.scoring.planner import pack
from m0kit.scoring.prepare import Document
from m0kit.scoring.schedule import LOW_MEMORY_VISUAL_TOKENS


@dataclass(slots=True)
class Added:
    """What `add` did with the documents it was given: each is one of read, known, repeated and failed."""

    read: int = 0  # computed and kept
    known: int = 0  # kept, and what it says was there already, under this id or another
    repeated: int = 0  # given before in this call, with the same id and content
    replaced: int = 0  # of those read or known: another content was there under this id
    tokens: int = 0  # of those read
    dropped: int = 0  # states of other documents that went to keep to the limit
    failed: list[tuple[str, str]] = field(default_factory=list)  # id or place, and why
    truncated: list[str] = field(default_factory=list)  # ids of documents that were cut to the model's length


def open_index(path: str | os.PathLike[str], reranker: Reranker, max_bytes: int | None = None) -> Store:
    """The index for writing, made where there is none. Raises StoreError when it is another artifact's."""
    folder = Path(path)
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return Store.create(folder, reranker.identity, max_bytes)
    store = Store.open(folder, writable=True)
    try:
        check_identity(store, reranker)
        _check_limit(store, max_bytes)
    except BaseException:
        store.close()
        raise
    return store


def _check_limit(store: Store, max_bytes: int | None) -> None:
    if max_bytes is not None and max_bytes != store.max_bytes:
        limit = "no limit" if store.max_bytes is None else f"a limit of {store.max_bytes} bytes"
        raise StoreError(f"{store.path}: was made with {limit}, not {max_bytes} bytes. Leave the limit out.")


def add(
    reranker: Reranker,
    store: Store,
    documents: Iterable[Given],
    tick: Callable[[int], object] = lambda _: None,
    *,
    again: bool = False,
) -> Added:
    """Read documents and keep them; what is there already is not computed `again`. `tick` is told how many are done.

    A document that cannot be read costs the others nothing; nor does one whose id was given before in this call with
    another content, which is an error. A document that the store has under the same id is replaced, and counted. Each
    run of the decoder is durable once it is done.
    Raises InputError for `documents` that are no list, StoreError, OutputError.
    """
    check_many(documents, "documents", "a list of (id, content, source)")
    done = Added()
    for batch in _batches(reranker, store, documents, done, tick):
        _read(reranker, store, batch, done, tick, again)
    return done


def stored_form(name: str, content: Text | Picture, document: Document, source: str = "") -> StoredDocument:
    """What a store keeps of a document itself: text, or the pixels that the model sees."""
    if isinstance(content, Text):
        return StoredDocument(name, "text", content.text.encode(), document.key, source)
    (image,) = document.images
    return StoredDocument(name, "image", to_png(image.pixels()), document.key, source)


def _parsed(value: Any, name: str) -> Text | Picture:
    if isinstance(value, InputError):
        raise value
    content = value if isinstance(value, Text | Picture) else parse_content(value, name)
    if isinstance(content, Known):
        raise InputError(f"{name}: give the document itself, as text or image.")
    return content


def _batches(
    reranker: Reranker, store: Store, documents: Iterable[Given], done: Added, tick: Callable[[int], object]
) -> Iterator[dict[Document, list[StoredDocument]]]:
    """As many documents as one run takes; in low memory as many as may be encoded before the decoder takes over."""
    budget = LOW_MEMORY_VISUAL_TOKENS if reranker.low_memory else reranker.engine.rows
    preparer, _ = reranker.begin()
    batch: dict[Document, list[StoredDocument]] = {}
    num_tokens = num_documents = 0
    given: dict[str, tuple[bytes, str]] = {}  # id → hash of its content, and where it came from
    for name, value, source in documents:
        where = name if source in ("", name) else f"{source}: {name}"
        try:
            content = _parsed(value, where)
            document, begun = preparer.document(content, where)
            stored = stored_form(name, content, document, source)
            digest = hashlib.sha256(stored.data).digest()
            is_new = _is_new(name, digest, where, source, given)
        except InputError as error:
            done.failed.append((name, str(error)))
            tick(1)
            continue
        if not is_new:
            done.repeated += 1
            tick(1)
            continue
        done.replaced += store.content(name) not in (None, digest)
        if begun.truncated:
            done.truncated.append(name)
        batch.setdefault(document, []).append(stored)
        num_tokens, num_documents = num_tokens + document.length, num_documents + 1
        if num_tokens >= budget or num_documents >= reranker.engine.rows:
            yield batch
            batch, num_tokens, num_documents = {}, 0, 0
    if batch:
        yield batch


def _is_new(name: str, digest: bytes, where: str, source: str, given: dict[str, tuple[bytes, str]]) -> bool:
    """Whether this id has not come yet; raises InputError when it came with another content."""
    is_new = name not in given
    before, first = given.setdefault(name, (digest, source))
    if before != digest:
        raise InputError(f"{where}: its id stands for another document already ({first}). Give each its own.")
    return is_new


def _read(
    reranker: Reranker,
    store: Store,
    owners: Mapping[Document, Sequence[StoredDocument]],
    done: Added,
    tick: Callable[[int], object],
    again: bool,
) -> None:
    engine = reranker.engine
    there = set() if again else store.has([document.key for document in owners])
    known = [stored for document, some in owners.items() if document.key in there for stored in some]
    if known:
        done.dropped += store.add(known, {})
        done.known += len(known)
        tick(len(known))
    new = [document for document in owners if document.key not in there]
    if reranker.low_memory:
        engine.encode([image for document in new for image in document.images])
    for run in pack(((document, [document.length]) for document in new), [engine.rows]):
        states = dict(zip(run, engine.compute(run), strict=True))
        for document in run:
            if not states[document].is_finite:
                del states[document]
                done.failed += [(s.id, f"{s.id}: {not_finite(engine.kept)}") for s in owners[document]]
        some = [stored for document in states for stored in owners[document]]
        done.dropped += store.add(some, {document.key: state.buffers for document, state in states.items()})
        done.read += len(states)
        done.known += len(some) - len(states)  # given more than once
        done.tokens += sum(document.length for document in states)
        tick(sum(len(owners[document]) for document in run))
