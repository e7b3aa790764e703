"""From bodies of several dialects to an `Ask`. Owns the names of their fields and what each means.

    parse_rerank(b'{"query": "slm", "documents": ["a", {"image": "https://…"}]}', "v1")

Fields that nobody here knows are ignored, nulls are absent, booleans and whole numbers may be strings: so clients send
them. How many documents there may be is for the caller to say.
"""

from collections.abc import Sequence
from typing import Any, Final, Literal

import msgspec

from m0kit.reading.inputs import shown
from m0kit.server.problems import RequestError
from m0kit.server.wire.ask import Ask, Echo, Side
from m0kit.server.wire.body import kind_of, parse_body
from m0kit.server.wire.contents import Sent, parse_documents, parse_side

# Of /v1/rerank (Jina, Cohere's first, Xinference), /v2/rerank (Cohere's second), and of /rerank and / (vLLM, Infinity,
# or Text Embeddings Inference, which calls documents `texts`).
Dialect = Literal["v1", "v2", "plain"]
# What vLLM calls queries and documents of scores.
SCORE_NAMES: Final = (
    ("queries", "documents"),
    ("queries", "items"),
    ("data_1", "data_2"),
    ("text_1", "text_2"),
)
_UNNAMED: Final = ("", "default", "default/not-specified")  # models of clients that were told none


def parse_rerank(body: bytes, dialect: Dialect) -> Ask:
    """What a request to rank asks for. Raises RequestError."""
    fields = parse_body(body)
    is_tei = dialect == "plain" and "texts" in fields
    name = "texts" if is_tei else "documents"
    query = parse_side(_required(fields, "query", "a query, as text or an image"), "query")
    echo = _echo(fields, dialect, is_tei=is_tei)
    documents = parse_documents(_documents(fields, name), name, echo, _rank_fields(fields))
    return Ask(
        queries=[query],
        documents=[document.side for document in documents],
        shape="tei" if is_tei else "rerank",
        kind="rerank" if dialect == "plain" else "list",
        top_n=_top_n(fields, dialect),
        echo=echo,
        sent=[document.shown for document in documents if document.shown is not None],
        stream=not is_tei and _flag(fields, "stream") is True,
        **_common(fields),
    )


def parse_score(body: bytes) -> Ask:
    """What a request for scores of pairs asks for: one query on all documents, or as many as these.

    Raises RequestError.
    """
    fields = parse_body(body)
    names = next((names for names in SCORE_NAMES if all(name in fields for name in names)), None)
    if names is None:
        expected = ", ".join(f"{one} and {other}" for one, other in SCORE_NAMES)
        raise RequestError("INVALID_REQUEST", f"the body has no pairs to score. Give two of these: {expected}.")
    queries = _sides(fields[names[0]], names[0])
    documents: Sequence[Sent] = parse_documents(fields[names[1]], names[1])
    if len(queries) not in (1, len(documents)):
        raise RequestError(
            "INVALID_REQUEST",
            f"has {len(queries)} and {names[1]} {len(documents)}. Give one of {names[0]} for all, or as many.",
            where=names[0],
        )
    sides = [document.side for document in documents]
    return Ask(queries=queries, documents=sides, shape="score", echo="none", **_common(fields))


def _common(fields: dict[str, Any]) -> dict[str, Any]:
    """What all dialects may say."""
    _check_direction(fields, "truncation_direction")
    _check_direction(fields, "truncation_side")
    model = fields.get("model")
    if model is not None and not isinstance(model, str):
        raise RequestError("INVALID_REQUEST", f"is {kind_of(model)}. Give a name as a string.", where="model")
    prompt = _whole(fields, "truncate_prompt_tokens", least=-1)
    return {
        "model": None if model in _UNNAMED else model,
        "raw": _flag(fields, "raw_scores") is True or _flag(fields, "use_activation") is False,
        "max_query_tokens": _whole(fields, "max_tokens_per_query") or None,
        "max_document_tokens": _whole(fields, "max_tokens_per_doc") or None,
        "max_prompt_tokens": None if prompt in (None, -1, 0) else prompt,
        "must_fit": False in (_flag(fields, "truncation"), _flag(fields, "truncate")),
    }


def _required(fields: dict[str, Any], name: str, what: str) -> Any:
    if name not in fields:
        raise RequestError("INVALID_REQUEST", f"is missing. Give {what}.", where=name)
    return fields[name]


def _documents(fields: dict[str, Any], name: str) -> Any:
    if name == "documents" and name not in fields and "texts" in fields:
        raise RequestError(
            "INVALID_REQUEST", "is missing. Send `texts` to /rerank, or call them documents.", where=name
        )
    return _required(fields, name, "a list of documents")


def _sides(value: Any, where: str) -> list[Side]:
    """A list of queries, or one in its place."""
    if not isinstance(value, list):
        return [parse_side(value, where)]
    if not value:
        raise RequestError("INVALID_REQUEST", "is empty. Give one query at least.", where=where)
    return [parse_side(each, f"{where}[{number}]") for number, each in enumerate(value)]


def _echo(fields: dict[str, Any], dialect: Dialect, *, is_tei: bool) -> Echo:
    """vLLM returns documents in any case, and so its users read them; Cohere's second version does when asked."""
    asked = _flag(fields, "return_text" if is_tei else "return_documents")
    if is_tei:
        return "texts" if asked else "none"
    if asked is None:
        return "none" if dialect == "v2" else "texts"
    return "all" if asked else "none"


def _top_n(fields: dict[str, Any], dialect: Dialect) -> int | None:
    found = _whole(fields, "top_n")
    if found == 0 and dialect != "plain":
        raise RequestError("INVALID_REQUEST", "is 0. Give 1 or more, or leave it out for all.", where="top_n")
    return found or None


def _rank_fields(fields: dict[str, Any]) -> list[str]:
    found = fields.get("rank_fields", [])
    if not isinstance(found, list) or not all(isinstance(name, str) for name in found):
        raise RequestError(
            "INVALID_REQUEST", f"is {shown(found)}. Give a list of names of fields.", where="rank_fields"
        )
    return found


def _check_direction(fields: dict[str, Any], name: str) -> None:
    side = fields.get(name, "right")
    if not isinstance(side, str) or side.lower() != "right":
        raise RequestError(
            "INVALID_REQUEST", f'is {shown(side)}. Texts lose their end, as was published: "right".', where=name
        )


def _flag(fields: dict[str, Any], name: str) -> bool | None:
    """A boolean, in any of its spellings; None where there is none."""
    if name not in fields:
        return None
    try:
        return msgspec.convert(fields[name], bool, strict=False)
    except msgspec.ValidationError:
        raise RequestError("INVALID_REQUEST", f"is {shown(fields[name])}. Give true or false.", where=name) from None


def _whole(fields: dict[str, Any], name: str, least: int = 0) -> int | None:
    """A whole number, in any of its spellings; None where there is none."""
    if name not in fields:
        return None
    try:
        found = msgspec.convert(fields[name], int, strict=False)
    except msgspec.ValidationError:
        found = least - 1
    if found < least:
        raise RequestError(
            "INVALID_REQUEST", f"is {shown(fields[name])}. Give a whole number, {least} or more.", where=name
        )
    return found
