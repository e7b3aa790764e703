"""Runs every client on every case, and tells what came of it. Owns the cases; what is right is the tests' to say.

seen = gather(artifact, folder)      # minutes
seen.outcomes["cohere-v2"]["401"]    # → Outcome(error="cohere.UnauthorizedError", text="…", …)
"""

import base64
import json
import os
import subprocess
import threading
import time
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from tests.clients import environments, servers
from tests.runtime.server.wire.recordings import recordings

# By the names that programs give them: the environment, and what people call it with the package whose version it has.
CLIENTS: Final = {
    "cohere-v2": ("newest", "Cohere `ClientV2`", "cohere"),
    "cohere-v1": ("newest", "Cohere `Client`", "cohere"),
    "haystack-cohere": ("newest", "Haystack `CohereRanker`", "cohere-haystack"),
    "haystack-jina": ("newest", "Haystack `JinaRanker`", "jina-haystack"),
    "haystack-vllm": ("newest", "Haystack `VLLMRanker`", "vllm-haystack"),
    "haystack-tei": ("newest", "Haystack `HuggingFaceTEIRanker`", "huggingface-api-haystack"),
    "rerankers-jina": ("newest", "rerankers, as Jina", "rerankers"),
    "rerankers-cohere": ("newest", "rerankers, as Cohere", "rerankers"),
    "rerankers-tei": ("newest", "rerankers, as TEI", "rerankers"),
    "litellm-jina": ("newest", "LiteLLM `jina_ai/`", "litellm"),
    "litellm-cohere": ("newest", "LiteLLM `cohere/`", "litellm"),
    "litellm-vllm": ("newest", "LiteLLM `hosted_vllm/`", "litellm"),
    "litellm-infinity": ("newest", "LiteLLM `infinity/`", "litellm"),
    "litellm-tei": ("newest", "LiteLLM `huggingface/`", "litellm"),
    "xinference": ("newest", "Xinference's client", "xinference-client"),
    "langchain-cohere": ("chains", "LangChain `CohereRerank`", "langchain-cohere"),
    "langchain-jina": ("chains", "LangChain `JinaRerank`", "langchain-community"),
    "llama-index-jina": ("chains", "LlamaIndex `JinaRerank`", "llama-index-postprocessor-jinaai-rerank"),
    "llama-index-cohere": ("chains", "LlamaIndex `CohereRerank`", "llama-index-postprocessor-cohere-rerank"),
    "llama-index-tei": ("chains", "LlamaIndex `TextEmbeddingInference`", "llama-index-postprocessor-tei-rerank"),
    "llama-index-xinference": (
        "chains", "LlamaIndex `XinferenceRerank`", "llama-index-postprocessor-xinference-rerank",
    ),
    "llama-index-siliconflow": (
        "chains", "LlamaIndex `SiliconFlowRerank`", "llama-index-postprocessor-siliconflow-rerank",
    ),
    "infinity-client": ("infinity", "Infinity's client", "infinity-client"),
    "langchain-infinity": ("infinity", "LangChain `InfinityRerank`", "langchain-community"),
    "cohere-js-v2": ("npm", "Cohere `CohereClientV2`, npm", "cohere-ai"),
    "cohere-js-v1": ("npm", "Cohere `CohereClient`, npm", "cohere-ai"),
    "ai-sdk": ("npm", "AI SDK `rerank`, npm", "@ai-sdk/cohere"),
    "langchain-cohere-js": ("npm", "LangChain `CohereRerank`, npm", "@langchain/cohere"),
}  # fmt: skip
# Documents as these take them.
WITH_IMAGES: Final = {
    "cohere-v2": "image", "cohere-v1": "image", "cohere-js-v1": "image", "langchain-jina": "image",
    "litellm-jina": "image", "litellm-cohere": "image", "litellm-vllm": "content", "litellm-infinity": "image",
    "xinference": "image",
}  # fmt: skip
IMAGE_QUERIES: Final = ("litellm-jina", "xinference")
NAME_NO_MODEL: Final = ("haystack-tei", "llama-index-tei", "litellm-tei")
QUERY: Final = "slm markdown"
TEXTS: Final = (
    "Bananas are rich in potassium.",
    "We present ReaderLM-v2, a small language model that writes markdown.",
    "def add(a, b): return a + b",
    "ein kleines Sprachmodell schreibt Markdown – 你好",
)
RECORDED_TEXTS: Final = ("We present ReaderLM-v2, a small language model.", "Bananas are rich in potassium.")
STATUSES: Final = ("401", "404", "413", "422", "429", "503")
_PATIENCE_S: Final = 300  # for one case


@dataclass(frozen=True)
class Outcome:
    """Of one client and case: results in its order, or an error's class and text. `tries`: requests it sent."""

    results: list[dict[str, Any]] | None = None
    error: str | None = None
    text: str = ""
    tries: int | None = None
    seconds: float = 0.0


@dataclass
class Seen:
    """Outcomes by client and case; `sent`: what each client sent where it asked what was recorded once."""

    outcomes: dict[str, dict[str, Outcome]] = field(default_factory=dict)
    sent: dict[str, list[servers.Request]] = field(default_factory=dict)


def page() -> bytes:
    """The image of the recordings, PNG."""
    (uri,) = {
        document["image"]
        for recording in recordings()
        if recording.client.startswith("cohere (Python)")
        for document in recording.body["documents"]
        if isinstance(document, dict) and "image" in document
    }
    return base64.b64decode(uri.partition(",")[2])


def shown(client: str) -> dict[str, Any]:
    """A page as a document of a client."""
    uri = "data:image/png;base64," + base64.b64encode(page()).decode()
    if WITH_IMAGES[client] == "content":
        return {"content": [{"type": "image_url", "image_url": {"url": uri}}]}
    return {"image": uri}


def cases(client: str, urls: dict[str, str]) -> dict[str, dict[str, Any]]:
    """What a client is asked, by the names of cases."""
    asked = {"client": client, "url": urls["real"], "key": servers.KEY, "model": servers.NAME, "query": QUERY}
    found: dict[str, dict[str, Any]] = {"text": {"documents": TEXTS}}
    found["recorded"] = {"url": urls["read_along"], "model": "jina-reranker-m0", "documents": RECORDED_TEXTS}
    wrong: Any = ["some text", ""]
    if client in WITH_IMAGES:
        found["image"] = {"documents": [TEXTS[0], shown(client), TEXTS[1]]}
        found["id"] = {"documents": [TEXTS[0], {"id": servers.PAGE_ID}, TEXTS[1]]}
        wrong = json.loads(json.dumps(["some text", shown(client)]).replace("iVBORw0KGgo", "AAAAAAAAAAA"))
    if client in IMAGE_QUERIES:
        found["image query"] = {"query": shown(client), "documents": TEXTS}
    found["401"] = {"key": servers.WRONG_KEY, "documents": TEXTS}
    if client not in NAME_NO_MODEL:
        found["404"] = {"model": "rerank-v3.5", "documents": TEXTS}
    found["413"] = {"documents": [*TEXTS, "a" * (servers.MAX_BODY + 1)]}
    found["422"] = {"documents": wrong}
    found["429"] = {"url": urls["full"], "documents": TEXTS}
    found["503"] = {"url": urls["stopping"], "documents": TEXTS}
    return {name: {**asked, **case} for name, case in found.items()}


def gather(artifact: Path, folder: Path, clients: Iterable[str] = CLIENTS) -> Seen:
    """Raises AssertionError where a program breaks off."""
    seen = Seen()
    with ExitStack() as stack:
        urls = {"real": stack.enter_context(servers.real(artifact, folder, page()))}
        reading = {}
        for name, make in (("full", servers.full), ("stopping", servers.stopping), ("read_along", servers.read_along)):
            urls[name], reading[name] = stack.enter_context(make(artifact, folder))
        for client in clients:
            seen.outcomes[client] = _run(client, cases(client, urls), reading, seen)
    return seen


def _run(
    client: str, asked: dict[str, dict[str, Any]], reading: dict[str, servers.Asked], seen: Seen
) -> dict[str, Outcome]:
    """One process for all cases of a client, one after the other."""
    words, folder = environments.command(CLIENTS[client][0])
    environment = {name: value for name, value in os.environ.items() if name in ("PATH", "HOME", "LANG", "TMPDIR")}
    found: dict[str, Outcome] = {}
    with (
        (folder / f"{client}.log").open("wb") as log,
        subprocess.Popen(
            words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, cwd=folder, env=environment
        ) as process,
    ):
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            for name, case in asked.items():
                begun = time.monotonic()
                process.stdin.write(json.dumps(case).encode() + b"\n")
                process.stdin.flush()
                timer = threading.Timer(_PATIENCE_S, process.kill)
                timer.start()
                line = process.stdout.readline()
                timer.cancel()
                assert line, f"{client} broke off at {name}: see {log.name}"
                seconds = time.monotonic() - begun
                took = {place: each.take() for place, each in reading.items()}
                here = {"429": "full", "503": "stopping"}.get(name)
                told = json.loads(line)
                error = told.get("error") or {"class": None, "text": ""}
                tries = len(took[here]) if here else None
                found[name] = Outcome(told.get("results"), error["class"], error["text"], tries, seconds)
                if name == "recorded":
                    seen.sent[client] = took["read_along"]
        finally:
            process.stdin.close()
            process.wait(_PATIENCE_S)
    return found
