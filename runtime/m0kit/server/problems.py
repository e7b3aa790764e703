"""What a request is answered with where it gets no result. Owns codes, their status, and the body of an error.

    raise RequestError("MODEL_NOT_FOUND", "…", where="model")

Clients look for our sentence under different names: `detail` (LangChain, LlamaIndex, Haystack), `message` (Cohere,
AI SDK), `error.message` (vLLM, LiteLLM), `error` as a string (TEI). A body has all of them at once.
"""

import math
from collections.abc import Sequence
from typing import Any, Final, Literal, get_args

from m0kit.errors import M0kitError

Code = Literal[
    "BAD_HTTP",
    "BAD_JSON",
    "AUTH_REQUIRED",
    "AUTH_INVALID_API_KEY",
    "FORBIDDEN_HOST",
    "FORBIDDEN_ORIGIN",
    "NOT_FOUND",
    "MODEL_NOT_FOUND",
    "DOCUMENT_NOT_FOUND",
    "NO_INDEX",
    "METHOD_NOT_ALLOWED",
    "TOO_SLOW",
    "BODY_TOO_LARGE",
    "UNSUPPORTED_TYPE",
    "UNSUPPORTED_ENCODING",
    "INVALID_REQUEST",
    "INVALID_INPUT",
    "TOO_MUCH",
    "FETCH_FAILED",
    "OVERLOADED",
    "HEADERS_TOO_LARGE",
    "INTERNAL_ERROR",
    "NOT_READY",
    "STOPPING",
    "TOO_MANY_CONNECTIONS",
    "ENGINE_FAILED",
    "INDEX_FAILED",
    "DEADLINE_EXCEEDED",
]
STATUS: Final[dict[Code, int]] = {
    "BAD_HTTP": 400,  # no request that this server understands as one
    "BAD_JSON": 400,
    "AUTH_REQUIRED": 401,
    "AUTH_INVALID_API_KEY": 401,
    "FORBIDDEN_HOST": 403,
    "FORBIDDEN_ORIGIN": 403,
    "NOT_FOUND": 404,
    "MODEL_NOT_FOUND": 404,
    "DOCUMENT_NOT_FOUND": 404,
    "NO_INDEX": 404,
    "METHOD_NOT_ALLOWED": 405,
    "TOO_SLOW": 408,
    "BODY_TOO_LARGE": 413,
    "UNSUPPORTED_TYPE": 415,
    "UNSUPPORTED_ENCODING": 415,
    "INVALID_REQUEST": 422,  # its form: a field that is missing, or of another type
    "INVALID_INPUT": 422,  # what is in it: a document that cannot be scored
    "TOO_MUCH": 422,  # over a limit of documents, images, pixels or tokens
    "FETCH_FAILED": 422,  # an image that is named by URL, and could not be had from there
    "OVERLOADED": 429,
    "HEADERS_TOO_LARGE": 431,
    "INTERNAL_ERROR": 500,
    "NOT_READY": 503,
    "STOPPING": 503,
    "TOO_MANY_CONNECTIONS": 503,
    "ENGINE_FAILED": 503,
    "INDEX_FAILED": 503,
    "DEADLINE_EXCEEDED": 504,
}
assert set(STATUS) == set(get_args(Code))
_TYPES: Final = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}


class RequestError(M0kitError):
    """Why a request gets no result. Its text is for the user of the client: ours alone, never a library's."""

    def __init__(
        self,
        code: Code,
        message: object,
        *,
        where: str = "",
        retry_after_s: float | None = None,
        others: Sequence[tuple[str, str]] = (),
        allowed: Sequence[str] = (),
    ) -> None:
        """`where`: the part of the request, "documents[3].image"; `others`: more of them, each with what is wrong.

        `allowed`: the methods that a path takes.
        """
        super().__init__(f"{where}: {message}" if where else message)
        self.code, self.where, self.retry_after_s, self.others = code, where, retry_after_s, tuple(others)
        self.allowed = tuple(allowed)

    @property
    def status(self) -> int:
        """Of HTTP."""
        return STATUS[self.code]

    @property
    def headers(self) -> dict[str, str]:
        """Those that an answer has besides its own."""
        found: dict[str, str] = {}
        if self.retry_after_s is not None:
            found["Retry-After"] = str(max(1, math.ceil(self.retry_after_s)))
        if self.allowed:
            found["Allow"] = ", ".join(self.allowed)
        if self.status == 401:
            found["WWW-Authenticate"] = "Bearer"
        return found

    def body(self, request_id: str, *, tei: bool = False) -> dict[str, Any]:
        """As JSON. `tei`: `error` is the sentence itself, as clients of Text Embeddings Inference read it."""
        message = str(self)
        kind = _TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        error: Any = {"message": message, "type": kind, "param": self.where or None, "code": self.code}
        body: dict[str, Any] = {"detail": message, "message": message, "code": self.code, "request_id": request_id}
        body["error"] = message if tei else error
        if tei:
            body["error_type"] = {422: "validation", 429: "overloaded", 503: "unhealthy"}.get(self.status, "backend")
        if self.where:
            told = [(self.where, message), *self.others]
            body["errors"] = [{"field": field, "message": text} for field, text in told]
        return body
