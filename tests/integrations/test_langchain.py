"""The LangChain compressor, with LangChain itself."""

import asyncio
import copy
import importlib.util
import pickle
from pathlib import Path
from typing import Any

import pytest
from tests.integrations.conftest import NOT_HERE, Page

pytest.importorskip("langchain_core", reason=f"langchain-core {NOT_HERE}")

from langchain_core.documents import BaseDocumentCompressor, Document
from langchain_core.retrievers import BaseRetriever

from m0kit import Reranker
from m0kit.errors import ArtifactNotFoundError, ImageError, InputError
from m0kit.integrations.langchain import M0kitRerank

QUERY = "slm markdown"
TEXTS = ["a b", "tide", "a small language model writes markdown", "x = 1"]


def documents() -> list[Document]:
    return [Document(text, id=f"d{i}", metadata={"source": f"{i}.txt"}) for i, text in enumerate(TEXTS)]


def test_it_returns_the_best_with_their_scores_and_changes_none(reranker: Reranker) -> None:
    given = documents()
    before = copy.deepcopy(given)
    found = M0kitRerank(model=reranker).compress_documents(given, QUERY)
    expected = reranker.rerank(QUERY, TEXTS, top_n=3)
    assert [document.page_content for document in found] == [one["document"] for one in expected]
    assert [document.metadata["relevance_score"] for document in found] == [one["relevance_score"] for one in expected]
    assert [(one.id, one.metadata["source"]) for one in found] == [
        (f"d{one['index']}", f"{one['index']}.txt") for one in expected
    ]
    assert given == before


def test_it_is_a_compressor_of_langchain_and_works_without_documents(reranker: Reranker) -> None:
    compressor = M0kitRerank(model=reranker, top_n=None)
    assert isinstance(compressor, BaseDocumentCompressor)
    assert compressor.compress_documents([], QUERY) == []
    assert len(compressor.compress_documents(documents(), QUERY, callbacks=[])) == len(TEXTS)


def test_the_async_one_is_the_same(reranker: Reranker) -> None:
    compressor = M0kitRerank(model=reranker, top_n=2)
    found = asyncio.run(compressor.acompress_documents(documents(), QUERY))
    assert found == compressor.compress_documents(documents(), QUERY)
    assert len(found) == 2


@pytest.mark.parametrize("form", ["image", "png", "base64", "uri", "path", "mapping"])
def test_an_image_in_the_metadata_is_the_document(reranker: Reranker, page: Page, form: str) -> None:
    forms: dict[str, Any] = {
        "image": page.image,
        "png": page.png,
        "base64": page.base64,
        "uri": f"data:image/png;base64,{page.base64}",
        "path": page.path,
        "mapping": {"image": page.png},
    }
    document = Document("a caption", metadata={"image": forms[form]})
    (found,) = M0kitRerank(model=reranker).compress_documents([document], QUERY)
    assert found.metadata["relevance_score"] == reranker.rerank(QUERY, [page.image])[0]["relevance_score"]
    assert found.page_content == "a caption"


def test_another_key_or_none_can_hold_the_image(reranker: Reranker, page: Page) -> None:
    document = Document("a caption", metadata={"page": page.png, "image": "a caption of a caption"})
    scores = {
        key: M0kitRerank(model=reranker, image_key=key).compress_documents([document], QUERY)[0].metadata
        for key in ("page", None)
    }
    image, text = (one["relevance_score"] for one in reranker.rerank(QUERY, [page.png, "a caption"]))
    assert {scores["page"]["relevance_score"], scores[None]["relevance_score"]} == {image, text}
    assert scores["page"]["relevance_score"] != scores[None]["relevance_score"]


def test_a_string_is_never_a_file_and_the_document_is_named(reranker: Reranker, page: Page) -> None:
    bad = Document("a caption", id="scan", metadata={"image": str(page.path)})
    with pytest.raises(ImageError, match=r"^documents\[1\] \(id scan\): metadata\['image'\]: a string under"):
        M0kitRerank(model=reranker).compress_documents([Document("a"), bad], QUERY)
    with pytest.raises(InputError, match=r"^documents\[0\]: is empty\."):
        M0kitRerank(model=reranker).compress_documents([Document("")], QUERY)


def test_rerank_takes_what_those_of_jina_and_cohere_take(reranker: Reranker, page: Page) -> None:
    compressor = M0kitRerank(model=reranker, top_n=2)
    mixed = ["some text", Document("a b"), {"image": page.base64}, {"text": "tide"}]
    found = compressor.rerank(mixed, QUERY)
    expected = reranker.rerank(QUERY, ["some text", "a b", page.png, "tide"], return_documents=False)
    assert found == expected[:2]
    assert compressor.rerank(mixed, QUERY, top_n=None) == expected
    assert compressor.rerank(mixed, {"image": page.png}, top_n=1)[0]["relevance_score"] > 0
    with pytest.raises(ValueError, match="top_n: got 0"):
        compressor.rerank(mixed, QUERY, top_n=0)


def test_a_path_is_opened_at_once(artifact: Path, tmp_path: Path) -> None:
    compressor = M0kitRerank(model=str(artifact), model_kwargs={"threads": 1})
    assert len(compressor.compress_documents(documents(), QUERY)) == 3
    with pytest.raises(ArtifactNotFoundError, match="nowhere"):
        M0kitRerank(model=tmp_path / "nowhere")
    with pytest.raises(ValueError, match="top_n: got 0, expected 1 or more"):
        M0kitRerank(model=artifact, top_n=0)
    with pytest.raises(TypeError, match="got list"):
        M0kitRerank(model=[])
    with pytest.raises(ValueError, match="top_k"):  # a name that there is not
        M0kitRerank(model=artifact, top_k=3)


def test_it_can_be_copied_and_pickled(artifact: Path) -> None:
    compressor = M0kitRerank(model=artifact, model_kwargs={"threads": 1})
    expected = compressor.compress_documents(documents(), QUERY)
    for other in (copy.copy(compressor), copy.deepcopy(compressor), pickle.loads(pickle.dumps(compressor))):
        assert other.compress_documents(documents(), QUERY) == expected


@pytest.mark.skipif(importlib.util.find_spec("langchain_classic") is None, reason=f"langchain-classic {NOT_HERE}")
def test_the_retriever_that_compresses_works_with_it(reranker: Reranker) -> None:
    from langchain_classic.retrievers import ContextualCompressionRetriever

    class All(BaseRetriever):
        def _get_relevant_documents(self, query: str, *, run_manager: Any) -> list[Document]:  # noqa: ARG002
            return documents()

    compressor = M0kitRerank(model=reranker, top_n=2)
    retriever = ContextualCompressionRetriever(base_compressor=compressor, base_retriever=All())
    expected = compressor.compress_documents(documents(), QUERY)
    assert retriever.invoke(QUERY) == expected
    assert asyncio.run(retriever.ainvoke(QUERY)) == expected
