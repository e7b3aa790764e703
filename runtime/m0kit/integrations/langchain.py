"""A LangChain document compressor: the most relevant of the documents that a retriever found, best first.

    retriever = ContextualCompressionRetriever(base_compressor=M0kitRerank(model="m0-int8"), base_retriever=…)

Owns what a LangChain document is to the model. Needs the extra m0kit[langchain].
"""

from collections.abc import Mapping, Sequence
from typing import Any, Final

from m0kit.integrations.ranking import arank, check_top, missing, opened, rank
from m0kit.reranker import Reranker
from m0kit.scoring.schedule import Result

try:
    from langchain_core.callbacks import Callbacks
    from langchain_core.documents import BaseDocumentCompressor, Document
    from pydantic import ConfigDict, PrivateAttr
except ImportError as error:
    raise missing(error, "langchain_core", "langchain") from None

SCORE: Final = "relevance_score"  # where LangChain's own compressors put it


class M0kitRerank(BaseDocumentCompressor):  # type: ignore[misc]
    """Orders documents by relevance to a query, with m0kit in this process.

    A document is its `page_content`; with something under `image_key` in its metadata it is that image: bytes, base64,
    a data URI, a PIL image or a `Path`. A string is never the path of a file: who wants that says so with a `Path`.
    Results are copies with `metadata["relevance_score"]`, 0 to 1.

    Raises what `Reranker.load` raises, TypeError for a `model` that is neither, ValueError for a `top_n` below 1.
    """

    model_config = ConfigDict(arbitrary_types_allowed=True, extra="forbid", protected_namespaces=())

    model: Any
    """A Reranker, or the path of an artifact, which is opened at once."""
    top_n: int | None = 3
    """How many documents to return; None: all."""
    device: str = "cpu"
    """Where a path is opened: "cpu", "cuda", "cuda:1"."""
    model_kwargs: dict[str, Any] | None = None
    """Further arguments of `Reranker.load` for a path: threads, cache_bytes, index, …"""
    image_key: str | None = "image"
    """The key of the metadata that holds a document's image; None: every document is its text."""

    _reranker: Reranker = PrivateAttr()

    def __init__(self, **values: Any) -> None:
        super().__init__(**values)
        check_top(self.top_n, "top_n")
        self._reranker = opened(self.model, self.device, self.model_kwargs)

    def compress_documents(
        self,
        documents: Sequence[Document],
        query: str,
        callbacks: Callbacks = None,  # noqa: ARG002
    ) -> list[Document]:
        """The `top_n` most relevant, best first. Raises InputError naming a document that cannot be scored."""
        return self._best(documents, rank(self._reranker, query, *self._contents(documents)))

    async def acompress_documents(
        self,
        documents: Sequence[Document],
        query: str,
        callbacks: Callbacks = None,  # noqa: ARG002
    ) -> list[Document]:
        """The same; a task that is cancelled ends the work."""
        return self._best(documents, await arank(self._reranker, query, *self._contents(documents)))

    def rerank(self, documents: Sequence[Any], query: Any, *, top_n: int | None = -1) -> list[dict[str, Any]]:
        """[{"index", "relevance_score"}], best first, as JinaRerank and CohereRerank have it.

        Documents and query may also be strings and what else `Reranker` takes ({"image": …}, a `Path`). `top_n`: None
        for all; by default that of the compressor.
        """
        if top_n == -1:
            top_n = self.top_n
        check_top(top_n, "top_n")
        ranking = rank(self._reranker, query, *self._contents(documents))[:top_n]
        return [{"index": index, SCORE: result.score} for index, result in ranking]

    def _contents(self, documents: Sequence[Any]) -> tuple[list[Any], list[str]]:
        """What the model is given, and how each is called in an error."""
        contents, places = [], []
        for index, document in enumerate(documents):
            place, content = f"documents[{index}]", document
            if isinstance(document, Document):
                place += f" (id {document.id})" if document.id is not None else ""
                image = document.metadata.get(self.image_key) if self.image_key is not None else None
                content = document.page_content if image is None else _image(image)
                place += "" if image is None else f": metadata[{self.image_key!r}]"
            contents.append(content)
            places.append(place)
        return contents, places

    def _best(self, documents: Sequence[Document], ranking: Sequence[tuple[int, Result]]) -> list[Document]:
        best = []
        for index, result in ranking[: self.top_n]:
            document = documents[index]
            metadata = {**document.metadata, SCORE: result.score}
            best.append(document.model_copy(update={"metadata": metadata}))
        return best


def _image(value: Any) -> Any:
    return value if isinstance(value, Mapping) else {"image": value}
