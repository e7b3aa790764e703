"""LangChain's and LlamaIndex's rerankers, which hold Cohere's client back at its version 5.

As in newest.py: what a user writes, then (index, score) for each result.
"""

from asking import answer


def langchain_cohere(url, key, model, query, documents):
    from langchain_cohere import CohereRerank
    from langchain_core.documents import Document

    ranker = CohereRerank(model=model, base_url=url, cohere_api_key=key, top_n=len(documents))
    found = ranker.compress_documents([Document(text) for text in documents], query)
    return [(documents.index(one.page_content), one.metadata["relevance_score"]) for one in found]


def langchain_jina(url, key, model, query, documents):
    from langchain_community.document_compressors import JinaRerank, jina_rerank

    jina_rerank.JINA_API_URL = f"{url}/v1/rerank"  # it has no parameter for it
    ranker = JinaRerank(model=model, jina_api_key=key)
    found = ranker.rerank(documents, query, top_n=len(documents))
    return [(one["index"], one["relevance_score"]) for one in found]


def llama_index_jina(url, key, model, query, documents):
    from llama_index.core.schema import NodeWithScore, TextNode
    from llama_index.postprocessor.jinaai_rerank import JinaRerank

    ranker = JinaRerank(model=model, base_url=f"{url}/v1", api_key=key, top_n=len(documents))
    nodes = [NodeWithScore(node=TextNode(text=text)) for text in documents]
    found = ranker.postprocess_nodes(nodes, query_str=query)
    return [(documents.index(one.text), one.score) for one in found]


def llama_index_cohere(url, key, model, query, documents):
    from llama_index.core.schema import NodeWithScore, TextNode
    from llama_index.postprocessor.cohere_rerank import CohereRerank

    ranker = CohereRerank(model=model, base_url=url, api_key=key, top_n=len(documents), max_retries=1)
    nodes = [NodeWithScore(node=TextNode(text=text)) for text in documents]
    found = ranker.postprocess_nodes(nodes, query_str=query)
    return [(documents.index(one.text), one.score) for one in found]


def llama_index_tei(url, key, model, query, documents):
    from llama_index.core.schema import NodeWithScore, TextNode
    from llama_index.postprocessor.tei_rerank import TextEmbeddingInference

    ranker = TextEmbeddingInference(base_url=url, auth_token=f"Bearer {key}", top_n=len(documents))
    nodes = [NodeWithScore(node=TextNode(text=text)) for text in documents]
    found = ranker.postprocess_nodes(nodes, query_str=query)
    return [(documents.index(one.text), one.score) for one in found]


def llama_index_xinference(url, key, model, query, documents):
    from llama_index.core.schema import NodeWithScore, TextNode
    from llama_index.postprocessor.xinference_rerank import XinferenceRerank

    at = url.replace("://", f"://key:{key}@")  # it has no parameter for a key
    ranker = XinferenceRerank(model=model, base_url=at, top_n=len(documents))
    nodes = [NodeWithScore(node=TextNode(text=text)) for text in documents]
    found = ranker.postprocess_nodes(nodes, query_str=query)
    return [(documents.index(one.text), one.score) for one in found]


def llama_index_siliconflow(url, key, model, query, documents):
    from llama_index.core.schema import NodeWithScore, TextNode
    from llama_index.postprocessor.siliconflow_rerank import SiliconFlowRerank

    ranker = SiliconFlowRerank(model=model, base_url=f"{url}/v1/rerank", api_key=key, top_n=len(documents))
    nodes = [NodeWithScore(node=TextNode(text=text)) for text in documents]
    found = ranker.postprocess_nodes(nodes, query_str=query)
    return [(documents.index(one.text), one.score) for one in found]


if __name__ == "__main__":
    answer({
        "langchain-cohere": langchain_cohere,
        "langchain-jina": langchain_jina,
        "llama-index-jina": llama_index_jina,
        "llama-index-cohere": llama_index_cohere,
        "llama-index-tei": llama_index_tei,
        "llama-index-xinference": llama_index_xinference,
        "llama-index-siliconflow": llama_index_siliconflow,
    })  # fmt: skip
