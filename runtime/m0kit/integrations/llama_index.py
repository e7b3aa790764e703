"""A LlamaIndex node postprocessor: the most relevant of the nodes that a retriever found, best first.

    query_engine = index.as_query_engine(similarity_top_k=20, node_postprocessors=[M0kitRerank(model="m0-int8")])

Owns what a node is to the model. Needs the extra m0kit[llama-index].
"""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from m0kit.errors import ImageError, InputError
from m0kit.integrations.ranking import arank, check_top, missing, opened, rank
from m0kit.reranker import Reranker
from m0kit.scoring.schedule import Result

try:
    from llama_index.core.bridge.pydantic import ConfigDict, Field, PrivateAttr
    from llama_index.core.callbacks import CBEventType, EventPayload
    from llama_index.core.instrumentation import get_dispatcher
    from llama_index.core.instrumentation.events.rerank import ReRankEndEvent, ReRankStartEvent
    from llama_index.core.postprocessor.types import BaseNodePostprocessor
    from llama_index.core.schema import BaseNode, ImageNode, MetadataMode, Node, NodeWithScore, QueryBundle
except ImportError as error:
    raise missing(error, "llama_index", "llama-index") from None

_dispatcher: Final = get_dispatcher(__name__)
_GIVEN: Final = "(a Reranker)"


class M0kitRerank(BaseNodePostprocessor):  # type: ignore[misc]
    """Orders nodes by relevance to a query, with m0kit in this process.

    A node that has an image (`ImageNode`, `ImageDocument`, a `Node` with an `image_resource`) is that image, from its
    base64 or its path, and text beside it is not read; a URL is an error, since m0kit fetches nothing. Any other node
    is its text with the metadata of `metadata_mode`. A query bundle that has an `image_path` and no text is that image.
    Results are new `NodeWithScore`s around the same nodes, scores 0 to 1.

    Raises what `Reranker.load` raises, TypeError for a `model` that is neither, ValueError for a `top_n` below 1.
    """

    model: str = Field(description="The path of the artifact, which is opened at once.")
    top_n: int = Field(description="How many nodes to return.")
    device: str = Field(description='Where a path is opened: "cpu", "cuda", "cuda:1".')
    model_kwargs: dict[str, Any] | None = Field(description="Further arguments of Reranker.load for a path.")
    metadata_mode: MetadataMode = Field(description="Which metadata a text node is read with.")
    keep_retrieval_score: bool = Field(description="Keep the retriever's score in metadata['retrieval_score'].")

    # Beside the names that LlamaIndex's components have, `model_kwargs` is one of theirs too.
    model_config = ConfigDict(arbitrary_types_allowed=True, protected_namespaces=())
    _reranker: Reranker = PrivateAttr()

    def __init__(
        self,
        model: Reranker | str | os.PathLike[str],
        top_n: int = 2,
        *,
        device: str = "cpu",
        model_kwargs: Mapping[str, Any] | None = None,
        metadata_mode: MetadataMode = MetadataMode.EMBED,
        keep_retrieval_score: bool = False,
        **values: Any,
    ) -> None:
        """`model`: a Reranker, or the path of an artifact; `model_kwargs`: see the fields."""
        check_top(top_n, "top_n", or_all=False)
        reranker = opened(model, device, model_kwargs)
        super().__init__(
            model=_GIVEN if isinstance(model, Reranker) else os.fspath(model),
            top_n=top_n,
            device=device,
            model_kwargs=None if model_kwargs is None else dict(model_kwargs),
            metadata_mode=metadata_mode,
            keep_retrieval_score=keep_retrieval_score,
            **values,
        )
        self._reranker = reranker

    @classmethod
    def class_name(cls) -> str:
        """LlamaIndex's name of the class, in what is written down of it."""
        return "M0kitRerank"

    def _postprocess_nodes(
        self, nodes: list[NodeWithScore], query_bundle: QueryBundle | None = None
    ) -> list[NodeWithScore]:
        query = _query(query_bundle)
        if not nodes:
            return []
        _dispatcher.event(self._begun(nodes, query_bundle))
        with self.callback_manager.event(CBEventType.RERANKING, payload=self._payload(nodes, query_bundle)) as event:
            best = self._best(nodes, rank(self._reranker, query, *self._contents(nodes)))
            event.on_end(payload={EventPayload.NODES: best})
        _dispatcher.event(ReRankEndEvent(nodes=best))
        return best

    async def _apostprocess_nodes(
        self, nodes: list[NodeWithScore], query_bundle: QueryBundle | None = None
    ) -> list[NodeWithScore]:
        query = _query(query_bundle)
        if not nodes:
            return []
        _dispatcher.event(self._begun(nodes, query_bundle))
        with self.callback_manager.event(CBEventType.RERANKING, payload=self._payload(nodes, query_bundle)) as event:
            best = self._best(nodes, await arank(self._reranker, query, *self._contents(nodes)))
            event.on_end(payload={EventPayload.NODES: best})
        _dispatcher.event(ReRankEndEvent(nodes=best))
        return best

    def _begun(self, nodes: list[NodeWithScore], query: QueryBundle) -> ReRankStartEvent:
        return ReRankStartEvent(query=query, nodes=nodes, top_n=self.top_n, model_name=self.model)

    def _payload(self, nodes: list[NodeWithScore], query: QueryBundle) -> dict[Any, Any]:
        return {
            EventPayload.NODES: nodes,
            EventPayload.MODEL_NAME: self.model,
            EventPayload.QUERY_STR: query.query_str,
            EventPayload.TOP_K: self.top_n,
        }

    def _contents(self, nodes: Sequence[NodeWithScore]) -> tuple[list[Any], list[str]]:
        """What the model is given, and how each is called in an error."""
        places = [f"nodes[{index}] (id {scored.node.node_id})" for index, scored in enumerate(nodes)]
        contents = []
        for scored, place in zip(nodes, places, strict=True):
            image = _image(scored.node, place)
            contents.append(scored.node.get_content(metadata_mode=self.metadata_mode) if image is None else image)
        return contents, places

    def _best(self, nodes: Sequence[NodeWithScore], ranking: Sequence[tuple[int, Result]]) -> list[NodeWithScore]:
        best = []
        for index, result in ranking[: self.top_n]:
            node = nodes[index].node
            if self.keep_retrieval_score:
                node.metadata["retrieval_score"] = nodes[index].score
            best.append(NodeWithScore(node=node, score=result.score))
        return best


def _query(bundle: QueryBundle | None) -> Any:
    """Raises ValueError where there is none, InputError where it is two things."""
    if bundle is None:
        raise ValueError("query_bundle: there is none. Pass query_bundle or query_str.")
    if not bundle.image_path:
        return bundle.query_str
    if bundle.query_str:
        raise InputError("the bundle has a text and an image, and the model takes one of them.", where="query")
    return Path(bundle.image_path)


def _image(node: BaseNode, place: str) -> Any:
    """A node's image, None where it has none. Raises ImageError for one that would have to be fetched."""
    if isinstance(node, ImageNode):
        data, path, url = node.image, node.image_path, node.image_url
    elif isinstance(node, Node) and node.image_resource is not None:
        resource = node.image_resource
        data, path, url = resource.data, resource.path, resource.url
    else:
        return None
    if data:
        return {"image": data.decode("latin-1") if isinstance(data, bytes) else data}  # in base64, says LlamaIndex
    if path:
        return Path(path)
    if url:
        raise ImageError(
            "its image is a URL, and m0kit fetches nothing. Fetch it, and give the node its bytes in base64.",
            where=place,
        )
    return None
