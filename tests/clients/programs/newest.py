"""Clients whose newest versions fit together: Cohere's own, Haystack's rankers, rerankers, LiteLLM, Xinference's.

Each function is what a user writes, and stands without its last line in docs/clients.md. It gives (index, score) for
each result in the client's order, and where the answer has documents their texts.
"""

from asking import answer


def cohere_v2(url, key, model, query, documents):
    import cohere

    client = cohere.ClientV2(api_key=key, base_url=url)
    answer = client.rerank(model=model, query=query, documents=documents)
    return [(one.index, one.relevance_score) for one in answer.results]


def cohere_v1(url, key, model, query, documents):
    import cohere

    client = cohere.Client(api_key=key, base_url=url)
    answer = client.rerank(model=model, query=query, documents=documents, return_documents=True)
    return [(one.index, one.relevance_score, one.document.text) for one in answer.results]


def haystack_cohere(url, key, model, query, documents):
    from haystack import Document
    from haystack.utils import Secret
    from haystack_integrations.components.rankers.cohere import CohereRanker

    ranker = CohereRanker(model=model, api_key=Secret.from_token(key), api_base_url=url)
    answer = ranker.run(query=query, documents=[Document(content=text) for text in documents])
    return [(documents.index(one.content), one.score) for one in answer["documents"]]


def haystack_jina(url, key, model, query, documents):
    from haystack import Document
    from haystack.utils import Secret
    from haystack_integrations.components.rankers.jina import JinaRanker

    ranker = JinaRanker(model=model, api_key=Secret.from_token(key), base_url=f"{url}/v1/rerank")
    answer = ranker.run(query=query, documents=[Document(content=text) for text in documents])
    return [(documents.index(one.content), one.score) for one in answer["documents"]]


def haystack_vllm(url, key, model, query, documents):
    from haystack import Document
    from haystack.utils import Secret
    from haystack_integrations.components.rankers.vllm import VLLMRanker

    ranker = VLLMRanker(model=model, api_key=Secret.from_token(key), api_base_url=f"{url}/v1")
    answer = ranker.run(query=query, documents=[Document(content=text) for text in documents])
    return [(documents.index(one.content), one.score) for one in answer["documents"]]


def haystack_tei(url, key, model, query, documents):
    from haystack import Document
    from haystack.utils import Secret
    from haystack_integrations.components.rankers.huggingface_api import HuggingFaceTEIRanker

    ranker = HuggingFaceTEIRanker(url=url, token=Secret.from_token(key))
    answer = ranker.run(query=query, documents=[Document(content=text) for text in documents])
    return [(documents.index(one.content), one.score) for one in answer["documents"]]


def rerankers_jina(url, key, model, query, documents):
    from rerankers import Reranker

    ranker = Reranker(model, model_type="jina", api_provider="jina", api_key=key, url=f"{url}/v1/rerank")
    answer = ranker.rank(query=query, docs=documents)
    return [(one.doc_id, one.score) for one in answer.results]


def rerankers_cohere(url, key, model, query, documents):
    from rerankers import Reranker

    ranker = Reranker(model, model_type="cohere", api_provider="cohere", api_key=key, url=f"{url}/v1/rerank")
    answer = ranker.rank(query=query, docs=documents)
    return [(one.doc_id, one.score) for one in answer.results]


def rerankers_tei(url, key, model, query, documents):
    from rerankers import Reranker

    kind = "text-embeddings-inference"
    ranker = Reranker(model, model_type=kind, api_provider=kind, api_key=key, url=f"{url}/rerank")
    answer = ranker.rank(query=query, docs=documents)
    return [(one.doc_id, one.score) for one in answer.results]


def litellm_jina(url, key, model, query, documents):
    import litellm

    answer = litellm.rerank(model=f"jina_ai/{model}", api_base=url, api_key=key, query=query, documents=documents)
    return [(one["index"], one["relevance_score"], one["document"]["text"]) for one in answer.results]


def litellm_cohere(url, key, model, query, documents):
    import litellm

    answer = litellm.rerank(model=f"cohere/{model}", api_base=url, api_key=key, query=query, documents=documents)
    return [(one["index"], one["relevance_score"], one["document"]["text"]) for one in answer.results]


def litellm_vllm(url, key, model, query, documents):
    import litellm

    answer = litellm.rerank(model=f"hosted_vllm/{model}", api_base=url, api_key=key, query=query, documents=documents)
    return [(one["index"], one["relevance_score"], one["document"]["text"]) for one in answer.results]


def litellm_infinity(url, key, model, query, documents):
    import litellm

    answer = litellm.rerank(
        model=f"infinity/{model}", api_base=url, api_key=key, query=query, documents=documents, return_documents=False
    )
    return [(one["index"], one["relevance_score"]) for one in answer.results]


def litellm_tei(url, key, model, query, documents):
    import litellm

    answer = litellm.rerank(model=f"huggingface/{model}", api_base=url, api_key=key, query=query, documents=documents)
    return [(one["index"], one["relevance_score"], one["document"]["text"]) for one in answer.results]


def xinference(url, key, model, query, documents):
    from xinference_client import RESTfulClient

    at = url.replace("://", f"://key:{key}@")  # its first request carries no other key
    client = RESTfulClient(at)
    answer = client.get_model(model).rerank(documents, query, return_documents=True)
    return [(one["index"], one["relevance_score"], one["document"]["text"]) for one in answer["results"]]


if __name__ == "__main__":
    answer({
        "cohere-v2": cohere_v2,
        "cohere-v1": cohere_v1,
        "haystack-cohere": haystack_cohere,
        "haystack-jina": haystack_jina,
        "haystack-vllm": haystack_vllm,
        "haystack-tei": haystack_tei,
        "rerankers-jina": rerankers_jina,
        "rerankers-cohere": rerankers_cohere,
        "rerankers-tei": rerankers_tei,
        "litellm-jina": litellm_jina,
        "litellm-cohere": litellm_cohere,
        "litellm-vllm": litellm_vllm,
        "litellm-infinity": litellm_infinity,
        "litellm-tei": litellm_tei,
        "xinference": xinference,
    })  # fmt: skip
