"""One artifact that is served: what it is called, what a request on it asks for, and what that will cost.

Owns the limits of a request, held before anything is decoded or run: documents, images, bytes, pixels and tokens are
counted from lengths and headers. When the work is done is the desk's.

    lane = Lane.open(settings.models[0], names=("m0-int8",))
    tasks = lane.weigh(ask, settings)      # RequestError where it is too much, or names what is not there
"""

import logging
from collections.abc import Hashable, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from m0kit.errors import InputError, M0kitError
from m0kit.index import open_index
from m0kit.keeping.store import Store
from m0kit.reading.decoding import open_image
from m0kit.reading.inputs import Content, Known, Pair, Picture, Text
from m0kit.reranker import Reranker
from m0kit.scoring.prepare import ENCODING_COST, Preparer
from m0kit.server.problems import RequestError
from m0kit.server.settings import ModelSettings, Settings
from m0kit.server.wire.ask import Ask, Link, Side

_log: Final = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Task:
    """A pair of a request that may be run, or a document to be read into the index."""

    content: Pair | Content
    places: tuple[str, ...]  # where query and document stand in the request, or the document
    cost: int  # tokens of the decoder, about, documents that are kept left out
    rows: int  # of a run, about
    key: Hashable  # of the document: pairs with the same one share its work
    preparer: Preparer
    must_fit: bool = False
    id: str = ""  # of a document to be read


class Lane:
    """An open artifact under its names. `store` of the reranker is for reading, `writer` for additions."""

    def __init__(self, names: Sequence[str], reranker: Reranker, writer: Store | None = None) -> None:
        self.names, self.reranker, self.writer = tuple(names), reranker, writer
        self.preparer, _ = reranker.begin()

    @classmethod
    def open(cls, settings: ModelSettings, names: Sequence[str], *, writes: bool = True) -> "Lane":
        """Open artifact and index, which is made where there is none. Raises as `Reranker.load` and `open_index` do.

        An index that cannot be written to, or is another process's to write, is served for reading.
        """

        def load(index: Path | None) -> Reranker:
            return Reranker.load(
                settings.artifact,
                settings.device,
                settings.threads,
                memory=settings.memory,
                max_pixels=settings.max_pixels,
                cache_bytes=settings.cache_bytes,
                kv=settings.kv or (None if index else "fp16"),
                index=index,
                revision=settings.revision,
                gpu_bytes=settings.gpu_bytes,
                pool_bytes=settings.pool_bytes,
            )

        index = settings.index
        if index is not None and not is_made(index):
            with closing(load(None)) as first, closing(open_index(index, first)):
                pass
        reranker = load(index)
        writer = None
        if index is not None and writes:
            try:
                writer = open_index(index, reranker)
            except M0kitError as error:
                _log.warning("%s Documents cannot be added while this server runs.", error)
        return cls(names, reranker, writer)

    def close(self) -> None:
        """Let it go. What is written is written."""
        if self.writer is not None:
            self.writer.close()
        self.reranker.close()

    # --- what a request asks for -----------------------------------------------------------------------

    def weigh(self, queries: Sequence[Side], documents: Sequence[Side], ask: Ask, limits: Settings) -> list[Task]:
        """The pairs of a request, in its order; both sides are there by now. Raises RequestError."""
        num_pairs = max(len(queries), len(documents))
        if num_pairs > limits.max_documents:
            what = f"{num_pairs} documents, and {limits.max_documents} may be in a request. Send several requests."
            raise RequestError("TOO_MUCH", what, where="documents")
        preparer = self._preparer(ask.max_prompt_tokens)
        scales = _Scales(self.reranker, preparer, limits)

        def weighed(side: Side, most: int | None, is_query: bool) -> tuple[Content, int, int]:
            return scales.weight(self._cut(_there(side), most), side.where, is_query)

        of_queries = [weighed(side, ask.max_query_tokens, True) for side in queries]
        of_documents = [weighed(side, ask.max_document_tokens, False) for side in documents]
        tasks = []
        for i in range(num_pairs):
            q, d = min(i, len(queries) - 1), min(i, len(documents) - 1)
            (query, own, query_rows), (document, cost, rows) = of_queries[q], of_documents[d]
            if i and d < i:  # the same one again
                cost = 0
            places = queries[q].where, documents[d].where
            work = own + cost, query_rows + rows
            tasks.append(Task(Pair(query, document), places, *work, _key(document), preparer, ask.must_fit))
        scales.check(sum(task.cost for task in tasks))
        return tasks

    def weigh_documents(
        self, documents: Sequence[tuple[str, Side]], limits: Settings
    ) -> tuple[list[Task], dict[int, RequestError]]:
        """Documents for the index, (id, document), in their order, and why those that cannot be read are none of them.

        Raises RequestError where the whole is too much.
        """
        scales = _Scales(self.reranker, self.preparer, limits)
        tasks: list[Task] = []
        refusals: dict[int, RequestError] = {}
        for number, (name, side) in enumerate(documents):
            try:
                content, cost, rows = scales.weight(_there(side), side.where, False)
            except RequestError as error:
                refusals[number] = error
            else:
                tasks.append(Task(content, (side.where,), max(cost, 1), rows, _key(content), self.preparer, id=name))
        scales.check(sum(task.cost for task in tasks))
        return tasks, refusals

    def _preparer(self, num_tokens: int | None) -> Preparer:
        """Of prompts that have no more tokens than a request wants. Raises RequestError."""
        own = self.reranker.config.prompt
        if num_tokens is None or num_tokens >= own.max_length:
            return self.preparer
        try:
            limited = self.reranker.with_limits(
                max_length=num_tokens, max_query_length=min(own.max_query_length, num_tokens // 2)
            )
        except ValueError:
            what = f"{num_tokens} tokens are too few for a query, a document and what stands around them. Allow more."
            raise RequestError("INVALID_REQUEST", what, where="truncate_prompt_tokens") from None
        return limited.begin()[0]

    def _cut(self, content: Content, num_tokens: int | None) -> Content:
        """A text as far as the request wants it read."""
        if num_tokens is None or not isinstance(content, Text):
            return content
        return Text(self.reranker.prompts.cut(content.text, num_tokens) or content.text[:1])


class _Scales:
    """What a request weighs as it is gone through."""

    def __init__(self, reranker: Reranker, preparer: Preparer, limits: Settings) -> None:
        self._engine, self._store = reranker.engine, reranker.store
        self._preparer, self._limits = preparer, limits
        self._num_images = self._pixels = 0

    def weight(self, content: Content, where: str, is_query: bool) -> tuple[Content, int, int]:
        """A content again, its cost in tokens of the decoder, and its rows. Raises RequestError."""
        try:
            if isinstance(content, Picture):
                self._look(content, where)
            if isinstance(content, Known):
                self._find(content, where)
            if not is_query:
                document = self._preparer.remembered(content, where)
                if document is not None:
                    is_kept = self._engine.has(document)
                    return content, 0 if is_kept else document.cost, 0 if is_kept else document.length
            cost = self._preparer.estimate(content)
        except InputError as error:
            raise refused(error, where) from None
        is_image = isinstance(content, Picture) or (isinstance(content, Known) and is_query)
        return content, cost, cost // (1 + ENCODING_COST) if is_image else cost

    def _look(self, picture: Picture, where: str) -> None:
        """Hold an image's header against the limits. Raises RequestError, InputError."""
        limits = self._limits
        self._num_images += 1
        if self._num_images > limits.max_images:
            what = f"more than {limits.max_images} images are in the request. Send several requests."
            raise RequestError("TOO_MUCH", what, where=where)
        raw = picture.source
        assert isinstance(raw, bytes)  # nothing of a request names a file
        if len(raw) > limits.max_image_bytes:
            what = f"the image has {len(raw)} bytes, over the limit of {limits.max_image_bytes}. Shrink it."
            raise RequestError("TOO_MUCH", what, where=where)
        width, height = open_image(raw, "").size
        if width * height > limits.max_image_pixels:
            what = f"the image has {width}×{height} pixels, over the limit of {limits.max_image_pixels}. Shrink it."
            raise RequestError("TOO_MUCH", what, where=where)
        self._pixels += width * height
        if self._pixels > limits.max_request_pixels:
            what = f"with this image the request has over {limits.max_request_pixels} pixels. Send several requests."
            raise RequestError("TOO_MUCH", what, where=where)

    def _find(self, known: Known, where: str) -> None:
        """Raises RequestError for a document that the index does not have."""
        if self._store is None:
            what = "names a document of an index, and this model is served without one. Send the document itself."
            raise RequestError("INVALID_INPUT", what, where=where)
        if self._store.described(known.id) is None:
            what = f"the index has no document {known.id!r:.200}, or not as it was written. PUT it to /v1/documents."
            raise RequestError("INVALID_INPUT", what, where=where)

    def check(self, cost: int) -> None:
        """Raises RequestError where the whole is too much."""
        most = self._limits.max_request_tokens
        if cost > most:
            raise RequestError(
                "TOO_MUCH",
                f"the request takes the work of {cost} tokens, about, and {most} are the most. Send several requests.",
            )


def is_made(index: Path) -> bool:
    """Whether there is something in its folder, which comes as a whole."""
    return index.is_dir() and any(index.iterdir())


def _there(side: Side) -> Content:
    assert not isinstance(side.content, Link)  # fetched by now
    return side.content


def refused(error: InputError, where: str) -> RequestError:
    """What a request is told of a part of it that cannot be scored."""
    reason = error.reason
    for own in (f"{where}: ", "document: ", "query: "):
        reason = reason.removeprefix(own)
    return RequestError("INVALID_INPUT", reason, where=where)


def _key(content: Content) -> Hashable:
    if isinstance(content, Text):
        return content.text
    return ("image", content.key) if isinstance(content, Picture) else ("id", content.id)
