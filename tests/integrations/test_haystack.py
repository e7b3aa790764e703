"""The Haystack ranker, with Haystack itself."""

import asyncio
import copy
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tests.integrations.conftest import NOT_HERE, Page

from m0kit.quiet import ENVIRONMENT

pytest.importorskip("haystack", reason=f"haystack-ai {NOT_HERE}")

from haystack import Document, Pipeline
from haystack.components.converters.image import DocumentToImageContent
from haystack.components.retrievers.in_memory import InMemoryBM25Retriever
from haystack.dataclasses import ByteStream, ImageContent
from haystack.document_stores.in_memory import InMemoryDocumentStore

from m0kit import Reranker
from m0kit.errors import ArtifactNotFoundError, ImageError, InputError
from m0kit.integrations.haystack import M0kitRanker

QUERY = "slm markdown"
TEXTS = ["a b", "tide", "a small language model writes markdown", "x = 1"]


def documents() -> list[Document]:
    return [Document(content=text, id=f"d{i}", meta={"i": i}) for i, text in enumerate(TEXTS)]


def scores(found: dict[str, list[Document]]) -> list[tuple[str, float]]:
    return [(document.id, document.score) for document in found["documents"]]


def expected(reranker: Reranker, top: int | None = None) -> list[tuple[str, float]]:
    return [(f"d{one['index']}", one["relevance_score"]) for one in reranker.rerank(QUERY, TEXTS, top_n=top)]


def test_it_returns_the_best_with_their_scores_and_changes_none(reranker: Reranker) -> None:
    given = documents()
    ranker = M0kitRanker(reranker, top_k=3)
    assert scores(ranker.run(QUERY, given)) == expected(reranker, 3)
    assert scores(ranker.run(QUERY, given, top_k=1)) == expected(reranker, 1)
    assert ranker.run(QUERY, given)["documents"][0].meta == {"i": int(expected(reranker)[0][0][1:])}
    assert {document.score for document in given} == {None}
    assert M0kitRanker(reranker).run(QUERY, []) == {"documents": []}


def test_the_async_one_is_the_same(reranker: Reranker, artifact: Path) -> None:
    ranker = M0kitRanker(artifact)
    assert asyncio.run(ranker.run_async(QUERY, documents(), top_k=2)) == ranker.run(QUERY, documents(), top_k=2)
    assert asyncio.run(ranker.run_async(QUERY, [])) == {"documents": []}


def test_logits_and_a_threshold(reranker: Reranker) -> None:
    ranker = M0kitRanker(reranker)
    logits = sorted(reranker.score([(QUERY, text) for text in TEXTS], raw=True).tolist(), reverse=True)
    # A float32 holds seven digits of what is computed.
    assert [score for _, score in scores(ranker.run(QUERY, documents(), scale_score=False))] == pytest.approx(logits)
    ranking = expected(reranker)
    assert scores(ranker.run(QUERY, documents(), score_threshold=ranking[1][1])) == ranking[:2]


@pytest.mark.parametrize("form", ["blob", "blob of no type", "content and blob", "image content"])
def test_an_image_document_is_its_image(reranker: Reranker, page: Page, form: str) -> None:
    blob = ByteStream(page.png, mime_type="image/png")
    forms: dict[str, tuple[Document, list[ImageContent | None] | None]] = {
        "blob": (Document(blob=blob), None),
        "blob of no type": (Document(blob=ByteStream(page.png)), [None]),
        "content and blob": (Document(content="a caption", blob=blob), None),
        "image content": (Document(content="a caption"), [ImageContent(page.base64, mime_type="image/png")]),
    }
    document, images = forms[form]
    (found,) = M0kitRanker(reranker).run(QUERY, [document], image_contents=images)["documents"]
    assert found.score == reranker.rerank(QUERY, [page.image])[0]["relevance_score"]
    assert (found.content, found.blob) == (document.content, document.blob)


def test_text_with_a_blob_that_is_no_image_is_text(reranker: Reranker) -> None:
    document = Document(content="a b", blob=ByteStream(b"%PDF", mime_type="application/pdf"))
    (found,) = M0kitRanker(reranker).run(QUERY, [document])["documents"]
    assert found.score == reranker.rerank(QUERY, ["a b"])[0]["relevance_score"]


def test_an_image_can_ask(reranker: Reranker, page: Page) -> None:
    found = M0kitRanker(reranker).run(ImageContent(page.base64, mime_type="image/png"), documents())
    assert [score for _, score in scores(found)] == [one["relevance_score"] for one in reranker.rerank(page.png, TEXTS)]


def test_an_error_names_the_document(reranker: Reranker) -> None:
    ranker = M0kitRanker(reranker)

    def said(document: Document) -> str:
        with pytest.raises(InputError) as caught:
            ranker.run(QUERY, [*documents(), document])
        assert isinstance(caught.value, ImageError) == (document.blob is not None and "image" in str(document.blob))
        return str(caught.value)

    assert said(Document(id="x")).startswith("documents[4] (id x): has neither text nor an image. Give it content,")
    pdf = Document(id="x", blob=ByteStream(b"%PDF", mime_type="application/pdf"))
    assert said(pdf).startswith("documents[4] (id x): has a blob of application/pdf, no text and no image.")
    broken = Document(id="x", blob=ByteStream(b"\x89PNG", mime_type="image/png"))
    assert said(broken).startswith("documents[4] (id x): ")
    with pytest.raises(InputError, match=r"^query: is empty"):
        ranker.run("", documents())
    with pytest.raises(ValueError, match="image_contents: got 1 for 4 documents"):
        ranker.run(QUERY, documents(), image_contents=[None])


def test_of_documents_with_one_id_the_best_is_ranked(reranker: Reranker) -> None:
    twice = [Document(id="d", content="a b", score=score, meta={"of": score or 0}) for score in (None, -2.0, -1.0)]
    (found,) = M0kitRanker(reranker).run(QUERY, twice)["documents"]
    assert found.meta == {"of": -1.0}


def test_a_path_is_opened_when_it_is_needed_and_closed_again(artifact: Path, tmp_path: Path) -> None:
    ranker = M0kitRanker(tmp_path / "nowhere")
    with pytest.raises(ArtifactNotFoundError, match="nowhere"):
        ranker.warm_up()
    with pytest.raises(ArtifactNotFoundError, match="nowhere"):
        asyncio.run(ranker.warm_up_async())
    ranker = M0kitRanker(str(artifact), model_kwargs={"threads": 1})
    before = ranker.run(QUERY, documents())
    ranker.close()
    assert ranker.run(QUERY, documents()) == before
    assert copy.deepcopy(ranker).run(QUERY, documents()) == before


def test_a_reranker_that_was_given_stays_open(reranker: Reranker) -> None:
    ranker = M0kitRanker(reranker)
    ranker.close()
    assert scores(ranker.run(QUERY, documents())) == expected(reranker)
    with pytest.raises(ValueError, match="cannot be written down"):
        ranker.to_dict()


@pytest.mark.parametrize("bad", [{"model": 7}, {"top_k": 0}, {"top_k": True}])
def test_arguments_are_looked_at(artifact: Path, bad: dict[str, Any]) -> None:
    with pytest.raises((TypeError, ValueError), match="expected"):
        M0kitRanker(**{"model": artifact, **bad})
    with pytest.raises(ValueError, match="top_k: got 0"):
        M0kitRanker(artifact).run(QUERY, documents(), top_k=0)


def pipeline_of(artifact: Path, store: InMemoryDocumentStore) -> Pipeline:
    pipeline = Pipeline()
    pipeline.add_component("retriever", InMemoryBM25Retriever(store, top_k=4))
    pipeline.add_component("ranker", M0kitRanker(artifact, top_k=2, model_kwargs={"threads": 1}))
    pipeline.connect("retriever", "ranker.documents")
    return pipeline


def test_a_pipeline_with_it_is_written_down_and_read_again(artifact: Path, reranker: Reranker) -> None:
    store = InMemoryDocumentStore()
    store.write_documents(documents())
    pipeline = pipeline_of(artifact, store)
    asked = {"retriever": {"query": "markdown tide a x"}, "ranker": {"query": QUERY}}
    found = scores(pipeline.run(asked)["ranker"])
    assert found == expected(reranker, 2)
    assert scores(asyncio.run(pipeline.run_async(asked))["ranker"]) == found
    text = pipeline.dumps()
    assert "m0kit.integrations.haystack.M0kitRanker" in text
    # Haystack makes components of modules only that it knows, or that who loads has named.
    ranker = Pipeline.loads(text, allowed_modules=["m0kit.integrations.haystack"]).get_component("ranker")
    assert (ranker.model, ranker.top_k) == (str(artifact), 2)
    assert scores(ranker.run(QUERY, documents())) == found


def test_pages_of_files_come_from_haystacks_own_converter(artifact: Path, reranker: Reranker, page: Page) -> None:
    pipeline = Pipeline()
    pipeline.add_component("images", DocumentToImageContent(root_path=str(page.path.parent)))
    pipeline.add_component("ranker", M0kitRanker(artifact))
    pipeline.connect("images.image_contents", "ranker.image_contents")
    given = [Document(content=text, meta={"file_path": page.path.name}) for text in ("a caption", "another")]
    found = pipeline.run({"images": {"documents": given}, "ranker": {"query": QUERY, "documents": given}})
    assert [document.content for document in found["ranker"]["documents"]] == ["a caption", "another"]
    assert {document.score for document in found["ranker"]["documents"]} == {
        reranker.rerank(QUERY, [page.png])[0]["relevance_score"]
    }


def test_haystack_reports_nothing_where_m0kit_was_imported_first(tmp_path: Path) -> None:
    script = "import m0kit, haystack.telemetry._telemetry as found; print(found.telemetry)"
    here = {name: value for name, value in os.environ.items() if name not in ENVIRONMENT} | {"HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", script], env=here, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "None\n"), done.stderr
    assert not (tmp_path / ".haystack").exists()
