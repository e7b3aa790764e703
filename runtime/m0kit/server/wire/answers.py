"""From an `Ask` and its results to JSON. Owns the shapes of answers, as types: the OpenAPI document is made from them.

    answer(ask, results, Told(request_id="…", model="m0-int8", tokens=812, created=1_790_000_000))  # → bytes

A ranking goes by logits, best first, equal ones in the order of the request: two scores may both be 1. Every pair has
its result; a request with a pair that cannot be scored gets none.
"""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import msgspec
from msgspec import UNSET, Struct, UnsetType

from m0kit.reranker import best_first
from m0kit.scoring.schedule import Result
from m0kit.server.problems import RequestError
from m0kit.server.wire.ask import Ask


@dataclass(frozen=True, slots=True)
class Told:
    """What an answer tells of its request besides results."""

    request_id: str
    model: str  # as the server calls it
    tokens: int  # of all prompts, as if each were computed
    created: int  # seconds since 1970


def told(request_id: str, model: str, tokens: int) -> Told:
    """Of an answer that is given now."""
    return Told(request_id, model, tokens, int(time.time()))


class Usage(Struct, frozen=True):
    """Tokens of all prompts."""

    prompt_tokens: int
    total_tokens: int


class Ranked(Struct, frozen=True, omit_defaults=True):
    """One document of a ranking. `truncated`: what lost its end because it was too long."""

    index: int
    relevance_score: float
    document: dict[str, Any] | UnsetType = UNSET
    truncated: list[Literal["document", "query"]] | UnsetType = UNSET


class ApiVersion(Struct, frozen=True):
    """Of Cohere's interface."""

    version: str


class Billed(Struct, frozen=True):
    """What a service would charge for."""

    search_units: int
    total_tokens: int


class Tokens(Struct, frozen=True):
    """As Cohere and Xinference count them; none are written."""

    input_tokens: int
    output_tokens: int


class Meta(Struct, frozen=True):
    """As Cohere's answers have it."""

    api_version: ApiVersion
    billed_units: Billed
    tokens: Tokens


class Ranking(Struct, frozen=True):
    """Answer of /v1/rerank, /v2/rerank and /rerank: documents, best first."""

    id: str
    object: Literal["list", "rerank"]
    created: int
    model: str
    results: list[Ranked]
    usage: Usage
    meta: Meta


class TeiRanked(Struct, frozen=True, omit_defaults=True):
    """One text of the array that Text Embeddings Inference answers with, best first."""

    index: int
    score: float
    text: str | UnsetType = UNSET


class Score(Struct, frozen=True):
    """Of one pair."""

    index: int
    object: Literal["score"]
    score: float


class Scores(Struct, frozen=True):
    """Answer of /score: pairs in the order of the request."""

    id: str
    object: Literal["list"]
    created: int
    model: str
    data: list[Score]
    usage: Usage


class Line(Struct, frozen=True, omit_defaults=True):
    """One document of a ranking that is answered in lines, as soon as it is scored."""

    index: int
    relevance_score: float
    cached: bool  # nothing of the document had to be computed
    ms: float  # from the arrival of the request
    truncated: list[Literal["document", "query"]] | UnsetType = UNSET


class LastLine(Ranking, frozen=True, kw_only=True):
    """The last line, where all went well."""

    done: Literal[True]


def answer(ask: Ask, results: Sequence[Result], told: Told) -> bytes:
    """The JSON of an answer. `results`: one each pair, in the order of the request, none with an error."""
    if ask.shape == "score":
        scores = [Score(index, "score", _score(ask, result)) for index, result in enumerate(results)]
        shape: Any = Scores(told.request_id, "list", told.created, told.model, scores, _usage(told))
    elif ask.shape == "tei":
        shape = [
            TeiRanked(index, _score(ask, results[index]), ask.sent[index]["text"] if ask.sent else UNSET)
            for index in _order(ask, results)
        ]
    else:
        shape = Ranking(**_ranking(ask, results, told))
    return msgspec.json.encode(shape)


def line(ask: Ask, index: int, result: Result, *, cached: bool, ms: float) -> bytes:
    """One line of an answer in lines, with its end."""
    found = Line(index, _score(ask, result), cached, round(ms, 1), _truncated(result))
    return msgspec.json.encode(found) + b"\n"


def last_line(ask: Ask, results: Sequence[Result], told: Told) -> bytes:
    """The line behind all others: what an answer in one would have been."""
    return msgspec.json.encode(LastLine(done=True, **_ranking(ask, results, told))) + b"\n"


def error_line(error: RequestError, request_id: str) -> bytes:
    """The last line in place of a result that does not come: the body of an error."""
    return msgspec.json.encode(error.body(request_id)) + b"\n"


def _ranking(ask: Ask, results: Sequence[Result], told: Told) -> dict[str, Any]:
    return {
        "id": told.request_id,
        "object": ask.kind,
        "created": told.created,
        "model": told.model,
        "results": [
            Ranked(
                index,
                _score(ask, results[index]),
                ask.sent[index] if ask.sent else UNSET,
                _truncated(results[index]),
            )
            for index in _order(ask, results)
        ],
        "usage": _usage(told),
        "meta": Meta(ApiVersion("2"), Billed(1, told.tokens), Tokens(told.tokens, 0)),
    }


def _order(ask: Ask, results: Sequence[Result]) -> list[int]:
    return best_first([result.logit for result in results])[: ask.top_n]


def _score(ask: Ask, result: Result) -> float:
    """Raises RequestError for what is no number: in JSON it would be null, and a client would rank by that."""
    score = result.logit if ask.raw else result.score
    if result.error is not None or not math.isfinite(score):
        raise RequestError("ENGINE_FAILED", "the model gave no number for a pair. Try again later.", retry_after_s=5)
    return score


def _usage(told: Told) -> Usage:
    return Usage(told.tokens, told.tokens)


def _truncated(result: Result) -> Any:
    return list(result.truncated) or UNSET
