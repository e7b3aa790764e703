"""Order page images by their relevance to a query; a page that cannot be read costs the others nothing.

python rerank_pages.py ARTIFACT "find cheap bread" pages/*.png
"""

import sys
from pathlib import Path

from m0kit import Reranker

artifact, query, *names = sys.argv[1:]
with Reranker.load(artifact) as reranker:
    results = reranker.evaluate([(query, Path(name)) for name in names])  # a str would be a text

scored = [(result.logit, result.score, name) for name, result in zip(names, results, strict=True) if not result.error]
for _, score, name in sorted(scored, reverse=True):  # by logits: scores of very relevant pages are 1 and 1
    print(f"{score:.4f}  {name}")
for name, result in zip(names, results, strict=True):
    if result.error:
        print(f"not scored: {name}: {result.error}", file=sys.stderr)
