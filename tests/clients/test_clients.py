"""Real clients get from a real server what the model says, and its errors' own sentences.

Where their environments are not made, which `make clients` does in minutes, there is nothing to run here; the requests
of these clients are replayed in tests/runtime/server/wire/test_replayed.py.
"""

import base64
import io
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from tests.clients import environments, servers
from tests.clients.gather import (
    CLIENTS,
    IMAGE_QUERIES,
    NAME_NO_MODEL,
    QUERY,
    STATUSES,
    TEXTS,
    WITH_IMAGES,
    Seen,
    gather,
    page,
)
from tests.clients.page import HIDDEN, KEPT, sentence, write_seen
from tests.runtime.server.wire.recordings import recordings

from m0kit import Reranker
from m0kit_export.export import export_artifact
from m0kit_parity.small.files import SMALL

if missing := environments.missing():
    pytest.skip(f"make clients makes the environments that are missing: {', '.join(missing)}", allow_module_level=True)

# Whether a client answers with the documents' texts itself: then they are the server's, and compared.
ECHOES = (
    "cohere-v1", "cohere-js-v1", "litellm-jina", "litellm-cohere", "litellm-vllm", "litellm-tei", "xinference",
)  # fmt: skip
# The file of recorded requests that has each client's; its parameters there are of several calls.
RECORDED = {
    "cohere-v2": "cohere (Python)", "cohere-v1": "cohere (Python)", "haystack": "Haystack", "rerankers": "rerankers",
    "litellm": "litellm", "xinference": "xinference-client", "langchain-cohere": "langchain-cohere",
    "langchain-jina": "langchain-community", "llama-index": "llama-index", "infinity-client": "infinity-client",
    "langchain-infinity": "langchain-community", "cohere-js": "cohere-ai", "ai-sdk": "ai with",
    "langchain-cohere-js": "@langchain/cohere",
}  # fmt: skip
# What a caller says or leaves out, and not the client.
CALLERS = ("model", "top_n", "return_documents", "documents", "query", "texts")
# A run's other rows change a sum in its last bits, and in which runs pairs come is not the same.
CLOSE = 1e-6
PAGES = [client for client in CLIENTS if client in WITH_IMAGES]
ERRORS = [
    (client, status) for client in CLIENTS for status in STATUSES if status != "404" or client not in NAME_NO_MODEL
]


@pytest.fixture(scope="module")
def small_artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("small") / "artifact"
    export_artifact(SMALL / "base", folder, progress=False)
    return folder


@pytest.fixture(scope="module")
def seen(small_artifact: Path, tmp_path_factory: pytest.TempPathFactory) -> Seen:
    found = gather(small_artifact, tmp_path_factory.mktemp("served"))
    if place := os.environ.get(KEPT):
        write_seen(found, Path(place))
    return found


@pytest.fixture(scope="module")
def reranker(small_artifact: Path) -> Iterator[Reranker]:
    with Reranker.load(small_artifact, threads=1, kv="fp16", cache_bytes=1 << 20) as found:
        yield found


def ranked(reranker: Reranker, query: Any, documents: list[Any]) -> list[dict[str, Any]]:
    """What an answer has to say: by logits, best first, in the order of the request where they are equal."""
    pairs = [(query, document) for document in documents]
    logits = reranker.score(pairs, raw=True).tolist()
    scores = reranker.score(pairs).tolist()
    assert len({round(score, 4) for score in scores}) == len(scores), "the order would say nothing"
    best = sorted(range(len(pairs)), key=lambda i: -logits[i])
    return [
        {"index": i, "score": scores[i], "text": documents[i] if isinstance(documents[i], str) else ""} for i in best
    ]


def check(seen: Seen, client: str, case: str, expected: list[dict[str, Any]]) -> None:
    outcome = seen.outcomes[client][case]
    assert outcome.results is not None, f"{outcome.error}: {outcome.text}"
    assert [one["index"] for one in outcome.results] == [one["index"] for one in expected]
    assert [one["score"] for one in outcome.results] == pytest.approx([one["score"] for one in expected], abs=CLOSE)
    texts = [one.get("text") for one in outcome.results]
    assert texts == ([one["text"] for one in expected] if client in ECHOES else [None] * len(expected))


@pytest.mark.parametrize("client", CLIENTS)
def test_texts_are_ranked_as_the_model_ranks_them(client: str, seen: Seen, reranker: Reranker) -> None:
    check(seen, client, "text", ranked(reranker, QUERY, list(TEXTS)))


@pytest.mark.parametrize("case", ["image", "id"])
@pytest.mark.parametrize("client", PAGES)
def test_a_page_is_ranked_among_texts_by_its_image_and_by_its_id(
    client: str, case: str, seen: Seen, reranker: Reranker
) -> None:
    check(seen, client, case, ranked(reranker, QUERY, [TEXTS[0], Image.open(io.BytesIO(page())), TEXTS[1]]))


@pytest.mark.parametrize("client", IMAGE_QUERIES)
def test_a_page_may_be_the_query(client: str, seen: Seen, reranker: Reranker) -> None:
    check(seen, client, "image query", ranked(reranker, Image.open(io.BytesIO(page())), list(TEXTS)))


@pytest.mark.parametrize(("client", "status"), ERRORS)
def test_a_user_reads_the_servers_own_sentence(client: str, status: str, seen: Seen) -> None:
    outcome = seen.outcomes[client][status]
    assert outcome.results is None
    is_hidden = status in HIDDEN.get(client, ())
    assert (sentence(client, status) in outcome.text) != is_hidden, f"{outcome.error}: {outcome.text}"
    if status == "422" and not is_hidden:
        assert any(f"{name}[1]" in outcome.text for name in ("documents", "texts"))
    assert "Traceback" not in outcome.text


@pytest.mark.parametrize("client", CLIENTS)
def test_what_a_client_sends_was_recorded(client: str, seen: Seen) -> None:
    """Else the fast suite replays what nobody sends any more."""
    name = RECORDED[max((start for start in RECORDED if client.startswith(start)), key=len)]
    known = [one for one in recordings() if one.client.startswith(name)]
    assert known
    sent = seen.sent[client]
    assert sent
    for request in sent:
        same = [one for one in known if (one.method, one.path) == (request.method, request.path)]
        assert same, f"{request.method} {request.path}"
        if request.method == "POST":
            assert own(request.body) in [own(one.body) for one in same], request.body
            assert set(request.body) & {"documents", "texts"} in [
                set(one.body) & {"documents", "texts"} for one in same
            ]
        key = request.headers.get("authorization", "")
        scheme, _, rest = key.partition(" ")
        assert scheme in ("Bearer", "Basic")
        carried = base64.b64decode(rest).decode() if scheme == "Basic" else rest
        assert carried in (servers.KEY, f"key:{servers.KEY}")


def own(body: dict[str, Any]) -> dict[str, Any]:
    """What a client says of itself."""
    return {name: value for name, value in body.items() if name not in CALLERS}
