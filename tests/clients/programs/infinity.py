"""Infinity's client, which takes an httpx that others have left behind, alone and within LangChain.

As in newest.py: what a user writes, then (index, score) for each result.
"""

from asking import answer


def infinity_client(url, key, model, query, documents):
    from infinity_client import AuthenticatedClient
    from infinity_client.api.default import rerank
    from infinity_client.models import RerankInput

    client = AuthenticatedClient(url, token=key, raise_on_unexpected_status=True)
    found = rerank.sync(client=client, body=RerankInput(model=model, query=query, documents=documents))
    return [(one.index, one.relevance_score) for one in found.results]


def langchain_infinity(url, key, model, query, documents):
    from infinity_client import Client
    from langchain_community.document_compressors import InfinityRerank
    from langchain_core.documents import Document

    headers = {"Authorization": f"Bearer {key}"}
    client = Client(url, headers=headers, raise_on_unexpected_status=True)  # else an error is None
    ranker = InfinityRerank(client=client, model=model, top_n=len(documents))
    found = ranker.compress_documents([Document(page_content=text) for text in documents], query)
    return [(documents.index(one.page_content), one.metadata["relevance_score"]) for one in found]


if __name__ == "__main__":
    answer({"infinity-client": infinity_client, "langchain-infinity": langchain_infinity})
