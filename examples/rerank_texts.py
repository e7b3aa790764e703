"""Order texts by their relevance to a query.

python rerank_texts.py ARTIFACT [QUERY]
"""

import sys

from m0kit import Reranker

TEXTS = [
    "The cup in the harbour is green. The book in the school is small.",
    "There is a cheap loaf of bread at the market.",
    "function sum(items) { return items.reduce((a, b) => a + b, 0); }",
    "In the kitchen you find a large green plate.",
]

query = sys.argv[2] if len(sys.argv) > 2 else "green plate in the kitchen"
with Reranker.load(sys.argv[1]) as reranker:
    for found in reranker.rerank(query, TEXTS, top_n=3):
        print(f"{found['relevance_score']:.4f}  {found['document']}")
