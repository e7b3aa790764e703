"""What a request asks for, whatever dialect it came in. Owns the nouns between the wire and the work.

The parsers of bodies give an `Ask`; `answers` says what became of it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from m0kit.reading.inputs import Content

# Which documents stand in the results: all as they were sent, texts alone (an image would go back as it came, a
# hundred megabytes of base64 in a large request), or none.
Echo = Literal["all", "texts", "none"]
# Of an answer: one object with `results` (Jina, Cohere, vLLM), a bare array (Text Embeddings Inference), or one entry
# for each pair in the order of the request (vLLM's /score).
Shape = Literal["rerank", "tei", "score"]


@dataclass(frozen=True, slots=True)
class Link:
    """An image that is to be fetched first."""

    url: str


@dataclass(frozen=True, slots=True)
class Side:
    """A query or document of a request."""

    content: Content | Link
    where: str  # "query", "documents[3].image"


@dataclass(frozen=True, slots=True)
class Ask:
    """One request to score.

    `queries` are one for all documents, or one for each; `documents` one for all queries, or one for each.
    """

    queries: Sequence[Side]
    documents: Sequence[Side]
    shape: Shape = "rerank"
    kind: str = "list"  # `object` of the answer
    model: str | None = None  # as it was named
    top_n: int | None = None
    echo: Echo = "texts"
    # The documents as the answer shows them, one each; none where `echo` is "none".
    sent: Sequence[dict[str, Any]] = field(default=(), repr=False)
    raw: bool = False  # logits in place of scores between 0 and 1
    max_query_tokens: int | None = None
    max_document_tokens: int | None = None
    max_prompt_tokens: int | None = None  # of both and what stands around them
    must_fit: bool = False  # too long is an error, and nothing is cut
    stream: bool = False  # a line of JSON for each result as it comes
