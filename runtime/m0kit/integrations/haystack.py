"""A Haystack ranker: the most relevant of the documents that a retriever found, best first.

    pipeline.add_component("ranker", M0kitRanker(model="m0-int8"))
    pipeline.connect("retriever", "ranker.documents")

Owns what a Haystack document is to the model. Needs the extra m0kit[haystack].
"""

import asyncio
import math
import os
import threading
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Final, Self

from m0kit.errors import InputError
from m0kit.integrations.ranking import arank, check_top, missing, opened, rank
from m0kit.reranker import Reranker
from m0kit.scoring.schedule import Result

try:
    from haystack import Document, component, default_from_dict, default_to_dict
    from haystack.dataclasses import ImageContent
except ImportError as error:
    raise missing(error, "haystack", "haystack") from None

_OPENING: Final = threading.Lock()  # of the file, so that a ranker can be copied


@component
class M0kitRanker:
    """Orders documents by relevance to a query, with m0kit in this process.

    A document is its image, if it has one: an ImageContent in `image_contents` at its place, as DocumentToImageContent
    gives them, or a `blob` whose MIME type is that of an image, or unknown where there is no `content`. Else it is its
    `content`. Results are copies with a `score`, 0 to 1.
    """

    def __init__(
        self,
        model: Reranker | str | os.PathLike[str],
        *,
        top_k: int | None = 10,
        device: str = "cpu",
        scale_score: bool = True,
        score_threshold: float | None = None,
        model_kwargs: dict[str, Any] | None = None,
    ) -> None:
        """`model`: a Reranker, or the path of an artifact, which `warm_up` or the first run opens.

        `top_k`: how many documents to return, None for all; `device`: where a path is opened ("cpu", "cuda", "cuda:1"),
        with `model_kwargs` as further arguments of `Reranker.load`; `scale_score=False` gives logits instead;
        `score_threshold` leaves out what scores less. Raises ValueError for a `top_k` below 1.
        """
        check_top(top_k, "top_k")
        if not isinstance(model, Reranker | str | os.PathLike):
            raise TypeError(f"model: expected a Reranker or the path of an artifact, got {type(model).__name__}.")
        self.model = model if isinstance(model, Reranker) else os.fspath(model)
        self.top_k = top_k
        self.device = device
        self.scale_score = scale_score
        self.score_threshold = score_threshold
        self.model_kwargs = model_kwargs
        self._reranker = model if isinstance(model, Reranker) else None

    def warm_up(self) -> None:
        """Opens the artifact, once. Raises what `Reranker.load` raises."""
        self._opened()

    async def warm_up_async(self) -> None:
        """The same, beside the event loop."""
        await asyncio.to_thread(self._opened)

    def close(self) -> None:
        """Closes what `warm_up` opened; the next run opens it again. A Reranker that was given is its owner's."""
        with _OPENING:
            if self._reranker is not None and self._reranker is not self.model:
                self._reranker.close()
                self._reranker = None

    def to_dict(self) -> dict[str, Any]:
        """For a pipeline that is written down. Raises ValueError for a ranker that was given a Reranker."""
        if isinstance(self.model, Reranker):
            raise ValueError("a ranker that was given a Reranker cannot be written down. Give it the artifact's path.")
        made: dict[str, Any] = default_to_dict(
            self,
            model=self.model,
            top_k=self.top_k,
            device=self.device,
            scale_score=self.scale_score,
            score_threshold=self.score_threshold,
            model_kwargs=self.model_kwargs,
        )
        return made

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Self:
        """A ranker from what `to_dict` made; nothing is opened."""
        made: Self = default_from_dict(cls, data)
        return made

    @component.output_types(documents=list[Document])  # type: ignore[untyped-decorator]
    def run(
        self,
        query: str | ImageContent,
        documents: list[Document],
        image_contents: list[ImageContent | None] | None = None,
        top_k: int | None = None,
        scale_score: bool | None = None,
        score_threshold: float | None = None,
    ) -> dict[str, list[Document]]:
        """{"documents": the `top_k` most relevant, best first}. What is given here goes before what `__init__` took.

        Of documents with one id the one with the highest score is ranked, as Haystack's own rankers do it.
        Raises InputError naming a document that cannot be scored, ValueError for a `top_k` below 1 or for
        `image_contents` that are not as many as the documents.
        """
        check_top(top_k, "top_k")
        unique, contents, places = _contents(documents, image_contents)
        ranking = rank(self._opened(), _query(query), contents, places) if unique else []
        return self._best(unique, ranking, top_k, scale_score, score_threshold)

    @component.output_types(documents=list[Document])  # type: ignore[untyped-decorator]
    async def run_async(
        self,
        query: str | ImageContent,
        documents: list[Document],
        image_contents: list[ImageContent | None] | None = None,
        top_k: int | None = None,
        scale_score: bool | None = None,
        score_threshold: float | None = None,
    ) -> dict[str, list[Document]]:
        """As `run`; a task that is cancelled ends the work."""
        check_top(top_k, "top_k")
        unique, contents, places = _contents(documents, image_contents)
        reranker = await asyncio.to_thread(self._opened) if unique else None
        ranking = await arank(reranker, _query(query), contents, places) if reranker is not None else []
        return self._best(unique, ranking, top_k, scale_score, score_threshold)

    def _opened(self) -> Reranker:
        with _OPENING:
            if self._reranker is None:
                self._reranker = opened(self.model, self.device, self.model_kwargs)
            return self._reranker

    def _best(
        self,
        documents: Sequence[Document],
        ranking: Sequence[tuple[int, Result]],
        top_k: int | None,
        scale_score: bool | None,
        threshold: float | None,
    ) -> dict[str, list[Document]]:
        top_k = self.top_k if top_k is None else top_k
        scale_score = self.scale_score if scale_score is None else scale_score
        threshold = self.score_threshold if threshold is None else threshold
        scores = [(index, result.score if scale_score else result.logit) for index, result in ranking]
        if threshold is not None:
            scores = [(index, score) for index, score in scores if score >= threshold]
        return {"documents": [replace(documents[index], score=score) for index, score in scores[:top_k]]}


def _query(query: Any) -> Any:
    return {"image": query.base64_image} if isinstance(query, ImageContent) else query


def _contents(
    documents: Sequence[Document], image_contents: Sequence[ImageContent | None] | None
) -> tuple[list[Document], list[Any], list[str]]:
    """The documents without those that are there twice, what the model is given of each, and its name in an error."""
    if image_contents is None:
        image_contents = [None] * len(documents)
    if len(image_contents) != len(documents):
        raise ValueError(f"image_contents: got {len(image_contents)} for {len(documents)} documents.")
    chosen: dict[str, int] = {}
    for index, document in enumerate(documents):
        best = chosen.setdefault(document.id, index)
        if _score(document) > _score(documents[best]):
            chosen[document.id] = index
    places = [f"documents[{index}] (id {documents[index].id})" for index in chosen.values()]
    contents = [
        _content(documents[index], image_contents[index], place)
        for index, place in zip(chosen.values(), places, strict=True)
    ]
    return [documents[index] for index in chosen.values()], contents, places


def _score(document: Document) -> float:
    return -math.inf if document.score is None else document.score


def _content(document: Document, image: ImageContent | None, place: str) -> Any:
    """Raises InputError for a document without text and image."""
    if image is not None:
        return {"image": image.base64_image}
    blob = document.blob
    kind = "" if blob is None else blob.mime_type or ""
    if blob is not None and (kind.startswith("image/") or (not kind and document.content is None)):
        return {"image": blob.data}
    if document.content is not None:
        return document.content
    found = f"a blob of {kind}, no text and no image" if blob is not None else "neither text nor an image"
    raise InputError(
        f"has {found}. Give it content, a blob of an image, or its image in image_contents: DocumentToImageContent "
        "makes them of files.",
        where=place,
    )
