"""The LlamaIndex postprocessor, with LlamaIndex itself."""

import asyncio
from pathlib import Path
from typing import Any

import pytest
from tests.integrations.conftest import NOT_HERE, Page

pytest.importorskip("llama_index.core", reason=f"llama-index-core {NOT_HERE}")

from llama_index.core import MockEmbedding, VectorStoreIndex
from llama_index.core.callbacks import CallbackManager, CBEventType, EventPayload, LlamaDebugHandler
from llama_index.core.instrumentation import get_dispatcher
from llama_index.core.instrumentation.event_handlers import BaseEventHandler
from llama_index.core.instrumentation.events.rerank import ReRankEndEvent, ReRankStartEvent
from llama_index.core.llms import MockLLM
from llama_index.core.schema import (
    ImageDocument,
    ImageNode,
    MediaResource,
    MetadataMode,
    Node,
    NodeWithScore,
    QueryBundle,
    TextNode,
)

from m0kit import Reranker
from m0kit.errors import ArtifactNotFoundError, ImageError, InputError
from m0kit.integrations.llama_index import M0kitRerank

QUERY = "slm markdown"
TEXTS = ["a b", "tide", "a small language model writes markdown", "x = 1"]


def nodes() -> list[NodeWithScore]:
    return [NodeWithScore(node=TextNode(text=text, id_=f"n{i}"), score=0.5) for i, text in enumerate(TEXTS)]


def test_it_returns_the_best_with_their_scores_and_keeps_the_nodes(reranker: Reranker) -> None:
    given = nodes()
    found = M0kitRerank(reranker).postprocess_nodes(given, query_str=QUERY)
    expected = reranker.rerank(QUERY, TEXTS, top_n=2)
    assert [(one.node_id, one.score) for one in found] == [
        (f"n{one['index']}", one["relevance_score"]) for one in expected
    ]
    assert {one.score for one in given} == {0.5}
    assert found[0].node is given[expected[0]["index"]].node


def test_the_async_one_is_the_same(reranker: Reranker) -> None:
    postprocessor = M0kitRerank(reranker, top_n=3)
    found = asyncio.run(postprocessor.apostprocess_nodes(nodes(), QueryBundle(QUERY)))
    assert found == postprocessor.postprocess_nodes(nodes(), QueryBundle(QUERY))
    assert len(found) == 3


@pytest.mark.parametrize("form", ["base64", "path", "document", "bytes", "resource path", "uri"])
def test_an_image_node_is_its_image(reranker: Reranker, page: Page, form: str) -> None:
    forms = {
        "base64": lambda: ImageNode(text="a caption", image=page.base64),
        "path": lambda: ImageNode(text="a caption", image_path=str(page.path)),
        "document": lambda: ImageDocument(image=page.png),
        "bytes": lambda: Node(image_resource=MediaResource(data=page.png)),
        "resource path": lambda: Node(
            text_resource=MediaResource(text="a caption"), image_resource=MediaResource(path=page.path)
        ),
        "uri": lambda: ImageNode(image=f"data:image/png;base64,{page.base64}"),
    }
    (found,) = M0kitRerank(reranker).postprocess_nodes([NodeWithScore(node=forms[form]())], query_str=QUERY)
    assert found.score == reranker.rerank(QUERY, [page.image])[0]["relevance_score"]


def test_a_node_without_an_image_is_its_text_with_its_metadata(reranker: Reranker) -> None:
    text = TextNode(text="a b", metadata={"title": "tide", "key": "x"}, excluded_embed_metadata_keys=["key"])
    given = [NodeWithScore(node=node) for node in (text, ImageNode(text="a caption"))]
    found = M0kitRerank(reranker).postprocess_nodes(given[:1], query_str=QUERY)
    assert found[0].score == reranker.rerank(QUERY, ["title: tide\n\na b"])[0]["relevance_score"]
    plain = M0kitRerank(reranker, metadata_mode=MetadataMode.NONE).postprocess_nodes(given, query_str=QUERY)
    assert {one.score for one in plain} == {
        one["relevance_score"] for one in reranker.rerank(QUERY, ["a b", "a caption"])
    }


def test_an_image_can_ask(reranker: Reranker, page: Page) -> None:
    bundle = QueryBundle("", image_path=str(page.path))
    found = M0kitRerank(reranker, top_n=9).postprocess_nodes(nodes(), bundle)
    assert [one.score for one in found] == [one["relevance_score"] for one in reranker.rerank(page.image, TEXTS)]
    with pytest.raises(InputError, match=r"^query: the bundle has a text and an image"):
        M0kitRerank(reranker).postprocess_nodes(nodes(), QueryBundle(QUERY, image_path=str(page.path)))
    with pytest.raises(ImageError, match=r"^query: no\.png: No such file"):
        M0kitRerank(reranker).postprocess_nodes(nodes(), QueryBundle("", image_path="no.png"))


def test_an_error_names_the_node(reranker: Reranker) -> None:
    postprocessor = M0kitRerank(reranker)
    bad = ImageNode(image_url="http://127.0.0.1:1/page.png", id_="scan")
    given = [*nodes(), NodeWithScore(node=bad)]
    with pytest.raises(ImageError, match=r"^nodes\[4\] \(id scan\): its image is a URL, and m0kit fetches nothing\."):
        postprocessor.postprocess_nodes(given, query_str=QUERY)
    given = [*nodes(), NodeWithScore(node=ImageNode(image="bm8=", id_="scan"))]
    with pytest.raises(ImageError, match=r"^nodes\[4\] \(id scan\): "):
        postprocessor.postprocess_nodes(given, query_str=QUERY)
    with pytest.raises(InputError, match=r"^nodes\[0\] \(id n\): is empty"):
        postprocessor.postprocess_nodes([NodeWithScore(node=TextNode(text="", id_="n"))], query_str=QUERY)
    with pytest.raises(ValueError, match="query_bundle: there is none"):
        postprocessor.postprocess_nodes(given)
    assert postprocessor.postprocess_nodes([], query_str=QUERY) == []


def test_the_retrievers_score_can_be_kept(reranker: Reranker) -> None:
    found = M0kitRerank(reranker, keep_retrieval_score=True).postprocess_nodes(nodes(), query_str=QUERY)
    assert [one.metadata["retrieval_score"] for one in found] == [0.5, 0.5]


def test_who_listens_is_told(reranker: Reranker) -> None:
    class Kept(BaseEventHandler):
        events: list[Any] = []  # noqa: RUF012 - pydantic copies it

        def handle(self, event: Any, **_: Any) -> None:
            self.events.append(event)

    kept, handler = Kept(), LlamaDebugHandler(print_trace_on_end=False)
    root = get_dispatcher()
    root.add_event_handler(kept)
    try:
        postprocessor = M0kitRerank(reranker, top_n=1, callback_manager=CallbackManager([handler]))
        found = postprocessor.postprocess_nodes(nodes(), query_str=QUERY)
    finally:
        root.event_handlers.remove(kept)
    told = [event for event in kept.events if isinstance(event, ReRankStartEvent | ReRankEndEvent)]
    assert [type(event) for event in told] == [ReRankStartEvent, ReRankEndEvent]
    assert (told[0].top_n, told[1].nodes) == (1, found)
    ((start, end),) = handler.get_event_pairs(CBEventType.RERANKING)
    assert start.payload[EventPayload.TOP_K] == 1
    assert end.payload[EventPayload.NODES] == found


def test_it_is_written_down_and_read_again(artifact: Path, tmp_path: Path) -> None:
    postprocessor = M0kitRerank(artifact, top_n=3, model_kwargs={"threads": 1})
    other = M0kitRerank.from_dict(postprocessor.to_dict())
    assert (other.top_n, other.model, other.model_kwargs) == (3, str(artifact), {"threads": 1})
    assert other.postprocess_nodes(nodes(), query_str=QUERY) == postprocessor.postprocess_nodes(
        nodes(), query_str=QUERY
    )
    with pytest.raises(ArtifactNotFoundError, match="nowhere"):
        M0kitRerank(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="top_n: got None, expected 1 or more"):
        M0kitRerank(artifact, top_n=None)


def test_a_query_engine_works_with_it(reranker: Reranker) -> None:
    index = VectorStoreIndex([one.node for one in nodes()], embed_model=MockEmbedding(embed_dim=2))
    engine = index.as_query_engine(
        llm=MockLLM(), similarity_top_k=4, node_postprocessors=[M0kitRerank(reranker, top_n=2)]
    )
    expected = [f"n{one['index']}" for one in reranker.rerank(QUERY, TEXTS, top_n=2)]
    assert [one.node_id for one in engine.query(QUERY).source_nodes] == expected
    assert [one.node_id for one in asyncio.run(engine.aquery(QUERY)).source_nodes] == expected
