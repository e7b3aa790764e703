"""Read documents once, keep them in an index, and ask about them again and again.

python index_and_query.py ARTIFACT INDEX page.png notes.txt
"""

import sys
from pathlib import Path

from m0kit import Reranker
from m0kit.index import add, open_index

artifact, index, *names = sys.argv[1:]

# Once: the decoder reads each document, and what it computed is kept under the document's id, in half precision.
with Reranker.load(artifact, kv="fp16") as reranker, open_index(index, reranker) as store:
    contents = [Path(name) if name.endswith(".png") else Path(name).read_text("utf-8") for name in names]
    done = add(reranker, store, zip(names, contents, names, strict=True))  # id, content, where it came from
    print(f"{done.read} read, {done.known} were there already, {len(done.failed)} failed")

# As often as you like: only the query is computed.
with Reranker.load(artifact, index=index) as reranker:
    for query in ("find cheap bread", "where is the green cup?"):
        best, *_ = reranker.rerank(query, [{"id": name} for name in names])
        print(f"{query}: {best['document']['id']} ({best['relevance_score']:.4f})")
