"""docs/clients.md: how each client is pointed at a server, what works and what its errors look like. Owns the page.

Snippets are the programs' own lines, versions the pins', results those of the last `make clients`, kept in seen.json.

    write_seen(seen, SEEN)
    PAGE.write_text(make())
"""

import ast
import json
import re
import textwrap
from pathlib import Path
from typing import Any, Final

from tests.clients.environments import NPM, pins
from tests.clients.gather import CLIENTS, STATUSES, WITH_IMAGES, Seen
from tests.clients.servers import FULL

HERE: Final = Path(__file__).parent
SEEN: Final = HERE / "seen.json"
PAGE: Final = HERE.parents[1] / "docs" / "clients.md"
KEPT: Final = "M0KIT_CLIENTS_SEEN"  # where the tests keep what they saw
SENTENCES: Final = {
    "401": "that API key is none of this server's.",
    "404": "is not served here. Served: small. The server takes other names with --served-model-name.",
    "413": "more than the 262144 that are read of one. Send fewer documents at a time",
    "429": FULL,
    "503": "this server is stopping. Ask another, or later.",
}
# Clients that look at no status, and where a result should be find none: nothing of an answer reaches their users.
HIDDEN: Final = {
    "rerankers-jina": STATUSES,
    "rerankers-cohere": STATUSES,
    "rerankers-tei": STATUSES,
    "llama-index-tei": STATUSES,
    "infinity-client": ("422",),  # expects the list of errors that another framework makes
    "langchain-infinity": ("422",),
}
NOTES: Final = {
    "cohere-v2": "Its types say strings, but objects pass.",
    "cohere-js-v2": "It lets no objects pass; `CohereClient` does.",
    "haystack-jina": "It hangs up after 5 seconds.",
    "haystack-tei": "It takes no name of a model: the server's first one answers.",
    "llama-index-tei": "It takes no name of a model, and sends `auth_token` as it is.",
    "litellm-tei": "It names no model, and asks that nothing be cut: a text over the model's length is an error.",
    "litellm-infinity": "Documents in the answer would have to be bare strings; leave them out.",
    "litellm-vllm": 'A page is `{"content": [{"type": "image_url", …}]}`. LiteLLM itself refuses one as a query.',
    "xinference": "Its first request carries no key but one that stands in the address.",
    "llama-index-xinference": "A key has to stand in the address.",
    "llama-index-cohere": "Without `max_retries` it asks up to ten times over where a server answers 500, 503 or 504.",
    "langchain-jina": "`compress_documents` takes texts; `rerank` also takes images and ids.",
    "infinity-client": "Without `raise_on_unexpected_status` an error is `None`.",
    "rerankers-jina": "An answer without results is a `KeyError`, whatever it says: look into the server's log.",
}
GROUPS: Final = {  # headings, and what the names of clients below them begin with
    "Cohere": ("cohere-v", "cohere-js"),
    "AI SDK": ("ai-sdk",),
    "LangChain": ("langchain",),
    "LlamaIndex": ("llama-index",),
    "Haystack": ("haystack",),
    "LiteLLM": ("litellm",),
    "rerankers": ("rerankers",),
    "Xinference": ("xinference",),
    "Infinity": ("infinity-client",),
}
_BEFORE: Final = 36  # characters of an error's text that are shown before the sentence
_AFTER: Final = 28

_HEAD: Final = """\
# Clients

`m0kit serve` speaks the forms of Jina, Cohere, vLLM, Infinity, Xinference and Text Embeddings Inference (TEI), so that
clients of these ask it as they are, once they know its address. Each client below was run against a server, its ranking
held against `Reranker.score`, and its errors read. `make clients` does all of it again and writes this page.

    m0kit serve m0-int8 --api-key-file keys.txt --index library

Snippets take `url` (`http://127.0.0.1:8080`), `key` (any word where the server wants none), `model`
(`jina-reranker-m0`, or a name given with `--served-model-name`), `query` and `documents`, a list of strings.

Where a client carries objects, a document is also `{"image": "data:image/png;base64,…"}`, or `{"id": "pages/1"}`, a
page that the server's index has read once. The others send texts alone.

## What works
"""
_ERRORS: Final = """
## Errors

What a user sees of each status: the class of the exception, and where in its text the server's sentence begins.
"Hidden": nothing of an answer reaches the user. ×3: it asks three times in all; Cohere's clients and the AI SDK wait as
long as `Retry-After` says. 401 to 422 are answers to a wrong key, an unknown model, a body over `--max-body`, and an
empty text or a file that is no image. 429 and 503 are given by the same app in the tests' own process, where the queue
was made to refuse all work, or which was told to stop.
"""
_OTHERS: Final = """
## Read, not run

These need servers of their own. Their requests were read in their sources, and are replayed in the tests.

| client | where | what to enter |
|---|---|---|
| Dify | Jina; OpenAI-API-compatible | `http://HOST:8080/v1`; its vision models send page images |
| Dify | Text Embeddings Inference; Xinference; Cohere | `http://HOST:8080` |
| RAGFlow | Jina | `http://HOST:8080/v1/rerank` |
| RAGFlow | OpenAI-API-compatible; Xinference; vLLM; Cohere | `http://HOST:8080` |
| Open WebUI | external reranking engine | `http://HOST:8080/v1/rerank` |
| LibreChat | `JINA_API_URL` | `http://HOST:8080/v1/rerank` |
| Milvus | TEI; vLLM: `endpoint` | `http://HOST:8080` |

Dify hangs up after 5 seconds (Jina) or 60, RAGFlow after 30. Open WebUI shows no error at all.
"""


def sentence(client: str, status: str) -> str:
    """What the server says, in part."""
    if status == "422":
        return "not an image that can be read" if client in WITH_IMAGES else "is empty. Give some text."
    return SENTENCES[status]


def version_of(client: str) -> str:
    """Of the package, as pinned."""
    environment, _, package = CLIENTS[client]
    return pins(environment)[package]


def write_seen(seen: Seen, path: Path) -> None:
    """What the page tells of a run: nothing that another run would tell otherwise."""
    told: dict[str, Any] = {}
    for client, outcomes in seen.outcomes.items():
        found: dict[str, Any] = {"version": version_of(client)}
        for case, outcome in outcomes.items():
            if outcome.results is not None:
                found[case] = True
                continue
            said = sentence(client, case) if case in STATUSES else outcome.text
            found[case] = {"error": outcome.error, "text": _excerpt(outcome.text, said)}
            if outcome.tries is not None and client != "xinference":  # which asks for other things before
                found[case]["tries"] = outcome.tries
        told[client] = found
    path.write_text(json.dumps(told, indent=1, ensure_ascii=False) + "\n", "utf-8")


def make() -> str:
    """The page."""
    seen = json.loads(SEEN.read_text("utf-8"))
    groups = [(title, [c for c in CLIENTS if c.startswith(starts)]) for title, starts in GROUPS.items()]
    lines = [_HEAD, "| client | version | texts | images | ids | a page as query |", "|---|---|---|---|---|---|"]
    for _, clients in groups:
        for client in clients:
            works = [
                "yes" if seen[client].get(case) is True else "–" for case in ("text", "image", "id", "image query")
            ]
            lines.append(f"| {CLIENTS[client][1]} | {_package(client)} | {' | '.join(works)} |")
    lines += ["", "## How", ""]
    for title, clients in groups:
        lines += [f"### {title}", ""]
        for client in clients:
            kind = "javascript" if CLIENTS[client][0] == NPM else "python"
            note = f" {NOTES[client]}" if client in NOTES else ""
            lines += [f"{CLIENTS[client][1]}:{note}" if note else f"{CLIENTS[client][1]}:", "", f"```{kind}"]
            lines += [snippet(client), "```", ""]
    lines[-1:] = [
        _ERRORS,
        f"| client | {' | '.join(STATUSES)} | as it reads (401) |",
        f"|---|{'---|' * len(STATUSES)}---|",
    ]
    for _, clients in groups:
        lines += [_row(client, seen[client]) for client in clients]
    return "\n".join([*lines, _OTHERS])


def snippet(client: str) -> str:
    """The lines of a client's function, but for what it gives back."""
    environment = CLIENTS[client][0]
    if environment == NPM:
        text = (HERE / "programs" / "npm.mjs").read_text("utf-8")
        found = re.search(rf'"{client}": (\w+),', text)
        assert found, client
        body = re.search(rf"async function {found[1]}\(.*?\n(.*?)\n  return ", text, re.DOTALL)
        assert body, client
        imports = [line for line in re.findall(r"^import .*$", text, re.MULTILINE) if _calls(body[1], line)]
        return "\n".join([*imports, "", textwrap.dedent(body[1])])
    text = (HERE / "programs" / f"{environment}.py").read_text("utf-8")
    (function,) = (
        each
        for each in ast.parse(text).body
        if isinstance(each, ast.FunctionDef) and each.name == client.replace("-", "_")
    )
    first, last = function.body[0].lineno, function.body[-1].lineno
    return textwrap.dedent("\n".join(text.splitlines()[first - 1 : last - 1]))


def _calls(body: str, line: str) -> bool:
    """Whether a body calls a name that a line imports."""
    names = re.findall(r"\w+", line.partition(" from ")[0])[1:]
    return any(re.search(rf"(?<![.\w]){name}\(", body) for name in names)


def _package(client: str) -> str:
    _, _, package = CLIENTS[client]
    return f"{package} {version_of(client)}"


def _row(client: str, seen: dict[str, Any]) -> str:
    cells = []
    for status in STATUSES:
        told = seen.get(status)
        if not isinstance(told, dict):
            cells.append("–")  # it names no model
            continue
        tries = f" ×{told['tries']}" if told.get("tries", 1) > 1 else ""
        hidden = ", hidden" if status in HIDDEN.get(client, ()) else ""
        cells.append(f"`{told['error'].removeprefix('builtins.')}`{tries}{hidden}")
    text = seen["401"]["text"].replace("|", "\\|").replace("`", "'")
    return f"| {CLIENTS[client][1]} | {' | '.join(cells)} | {f'`{text}`' if text else '(empty)'} |"


def _excerpt(text: str, said: str) -> str:
    text = " ".join(text.split())
    at = text.find(said)
    if at < 0:
        return text[: _BEFORE + _AFTER]
    before = text[:at] if at <= _BEFORE else "… " + text[at - _BEFORE : at]
    return f"{before}{said[:_AFTER]}" + ("…" if len(said) > _AFTER else "")
