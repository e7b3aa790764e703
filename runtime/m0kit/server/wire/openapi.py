"""The OpenAPI document: every route, what it takes and what it answers with. Owns that description, and no route.

    msgspec.json.encode(openapi("0.1.0", keys=True, page=True))

Answers of rankings and scores are described by their own types; requests by what is read of them, since that is more
than a type says: whole numbers may be strings, documents have six forms, and unknown fields are ignored.
"""

from collections.abc import Sequence
from typing import Any, Final

import msgspec

from m0kit.server.problems import STATUS
from m0kit.server.wire.answers import LastLine, Line, Ranking, Scores, TeiRanked

Schema = dict[str, Any]

JSON: Final = "application/json"
LINES: Final = "application/x-ndjson"
_SAID: Final = {
    400: "The body is not JSON",
    401: "No key, or a wrong one",
    403: "The Host or Origin header is not one that is served",
    404: "There is no such model, document, index or path",
    405: "The path has no such method",
    408: "The body came too slowly",
    413: "The body is too large",
    415: "The body is of another type or encoding",
    422: "A field or a document cannot be taken, or there are too many",
    431: "The head of the request is too large",
    429: "Too much work waits: try again after the seconds of Retry-After",
    500: "A fault of the server",
    503: "The server starts, stops, or cannot score: try again after the seconds of Retry-After",
    504: "It took longer than a request may",
}
assert set(_SAID) == set(STATUS.values())
# Errors that any route may answer with: the guard's, whatever is behind it. Those with a body and those that score have
# more.
_ANY: Final = (400, 401, 403, 405, 413, 415, 431, 500)
_READING: Final = (404, 408, 422, 503)
_SCORING: Final = (*_READING, 429, 504)


def openapi(version: str, *, keys: bool, page: bool) -> dict[str, Any]:
    """The document as JSON. `keys`: whether requests need one; `page`: whether there is a page at `/`."""
    _, answers = msgspec.json.schema_components(
        [Ranking, TeiRanked, Scores, Line, LastLine], ref_template="#/components/schemas/{name}"
    )
    document: dict[str, Any] = {
        "openapi": "3.1.0",
        "info": {
            "title": "m0kit",
            "version": version,
            "summary": "Scores of jina-reranker-m0 for texts and page images.",
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "paths": {**_ranking_paths(), **_library_paths(), **_telling_paths(), **_health_paths()},
        "components": {"schemas": {**answers, **_schemas()}},
    }
    if page:
        for path, operations in _page_paths().items():
            document["paths"].setdefault(path, {}).update(operations)
    if keys:
        document["components"]["securitySchemes"] = {
            "bearer": {"type": "http", "scheme": "bearer"},
            "header": {"type": "apiKey", "in": "header", "name": "X-API-Key"},
            "basic": {"type": "http", "scheme": "basic", "description": "The key is the password."},
        }
        document["security"] = [{"bearer": []}, {"header": []}, {"basic": []}]
    return document


# --- paths ---------------------------------------------------------------------------------------


def _ranking_paths() -> dict[str, Any]:
    ranking = {JSON: _ref("Ranking"), LINES: {"description": "`Line` for each document, then `LastLine` or `Error`."}}
    rerank, rerank_or_tei = {JSON: _ref("Rerank")}, {JSON: {"anyOf": [_ref("RerankPlain"), _ref("RerankTei")]}}
    plain_or_tei = {JSON: {"anyOf": [_ref("Ranking"), {"type": "array", "items": _ref("TeiRanked")}]}}
    scores = {JSON: _ref("Scores")}
    return {
        "/v1/rerank": {
            "post": _operation(
                "rerankV1", "Rank documents, as Jina, Cohere (v1) and Xinference do", 200, ranking, rerank, _SCORING
            )
        },
        "/v2/rerank": {
            "post": _operation("rerankV2", "Rank documents, as Cohere (v2) does", 200, ranking, rerank, _SCORING)
        },
        "/rerank": {
            "post": _operation(
                "rerank",
                "Rank documents, as vLLM and Infinity do; `texts`, as Text Embeddings Inference does",
                200,
                {**plain_or_tei, LINES: ranking[LINES]},
                rerank_or_tei,
                _SCORING,
            )
        },
        "/": {
            "post": _operation(
                "rerankRoot",
                "The same as /rerank",
                200,
                {**plain_or_tei, LINES: ranking[LINES]},
                rerank_or_tei,
                _SCORING,
            )
        },
        "/score": {
            "post": _operation("score", "Score pairs, as vLLM does", 200, scores, {JSON: _ref("Pairs")}, _SCORING)
        },
        "/v1/score": {
            "post": _operation("scoreV1", "The same as /score", 200, scores, {JSON: _ref("Pairs")}, _SCORING)
        },
    }


def _library_paths() -> dict[str, Any]:
    model = {"name": "model", "in": "query", "schema": {"type": "string"}, "description": "Of which the index is."}
    limit = {"name": "limit", "in": "query", "schema": {"type": "integer", "minimum": 1, "maximum": 10**9 - 1}}
    after = {"name": "after", "in": "query", "schema": {"type": "string"}, "description": "The last id of a page."}
    name = {"name": "id", "in": "path", "required": True, "schema": _ID}
    one = {JSON: _ref("NewContent"), "text/plain": _TEXT, "image/*": {}}
    stored = {JSON: _ref("StoredDocument")}
    known = _operation("getDocument", "A document of the index", 200, stored, None, (404, 422, 503))
    gone = _operation("deleteDocument", "Forget a document", 200, {JSON: _ref("Deleted")}, None, (404, 422, 503))
    ids = _operation("listDocuments", "Ids of documents", 200, {JSON: _ref("Ids")}, None, (404, 422, 503))
    return {
        "/v1/documents/{id}": {
            "parameters": [name, model],
            "put": _operation("putDocument", "Read a document once", 200, {JSON: _ref("Put")}, one, _SCORING),
            "get": known,
            "delete": gone,
        },
        "/v1/documents": {
            "parameters": [model],
            "get": {**ids, "parameters": [after, limit]},
            "post": _operation(
                "addDocuments", "Read documents once", 200, {JSON: _ref("Added")}, {JSON: _ref("Documents")}, _SCORING
            ),
        },
    }


def _telling_paths() -> dict[str, Any]:
    models = {JSON: _ref("Models")}
    name = {"name": "name", "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}
    auth = {JSON: {"type": "object", "required": ["auth"], "properties": {"auth": {"type": "boolean"}}}}
    return {
        "/info": {"get": _operation("info", "Limits, formats and models", 200, {JSON: _ref("Info")}, None, (503,))},
        "/models": {"get": _operation("models", "The same as /v1/models", 200, models, None, (503,))},
        "/v1/models": {"get": _operation("modelsV1", "Models by name", 200, models, None, (503,))},
        "/v1/models/{name}": {
            "parameters": [name],
            "get": _operation("model", "One model", 200, {JSON: _ref("Model")}, None, (404, 503)),
        },
        "/v1/cluster/auth": {"get": _operation("auth", "Whether to log in, as Xinference tells", 200, auth)},
        "/openapi.json": {"get": _operation("openapi", "This document", 200, {JSON: {"type": "object"}})},
        "/metrics": {"get": _operation("metrics", "For Prometheus", 200, {"text/plain": {"type": "string"}})},
    }


def _page_paths() -> dict[str, Any]:
    lines = {LINES: {"description": "One for each page, or an `Error` that ends them."}}
    drawn = _operation("drawPdf", "Pages of a PDF as images", 200, lines, {"application/pdf": {}}, (*_READING, 429))
    return {
        "/": {"get": _operation("page", "The page", 200, {"text/html": {}})},
        "/app.js": {"get": _operation("pageScript", "Its script", 200, {"text/javascript": {}})},
        "/sample.json": {"get": _operation("pageSamples", "What it shows at first", 200, {JSON: {"type": "array"}})},
        "/pdf": {"post": drawn},
    }


def _health_paths() -> dict[str, Any]:
    told = {
        "/live": ("live", "Whether the process answers", ()),
        "/ready": ("ready", "Whether requests are scored", (503,)),
        "/health": ("health", "The same as /ready", (503,)),
    }
    return {
        path: {"get": {**_operation(name, summary, 200, {JSON: {"type": "object"}}, None, errors), "security": []}}
        for path, (name, summary, errors) in told.items()
    }


def _operation(
    name: str,
    summary: str,
    status: int,
    answers: dict[str, Schema],
    takes: dict[str, Schema] | None = None,
    errors: Sequence[int] = (),
) -> dict[str, Any]:
    found: dict[str, Any] = {
        "operationId": name,
        "summary": summary,
        "responses": {
            str(status): {
                "description": "Done",
                "headers": {"X-Request-Id": {"schema": {"type": "string"}}},
                "content": _content(answers),
            },
            **{str(code): _error(code) for code in sorted({*_ANY, *errors})},
        },
    }
    if takes is not None:
        found["requestBody"] = {"required": True, "content": _content(takes)}
    return found


def _content(schemas: dict[str, Schema]) -> dict[str, Any]:
    return {kind: {"schema": schema} if schema else {} for kind, schema in schemas.items()}


def _error(status: int) -> dict[str, Any]:
    found: dict[str, Any] = {"description": _SAID[status], "content": _content({JSON: _ref("Error")})}
    if status in (429, 503):
        found["headers"] = {"Retry-After": {"schema": {"type": "integer", "minimum": 1}}}
    return found


# --- schemas -------------------------------------------------------------------------------------


def _ref(name: str) -> Schema:
    return {"$ref": f"#/components/schemas/{name}"}


def _object(required: Sequence[str] = (), **properties: Schema) -> Schema:
    found: Schema = {"type": "object", "properties": properties}
    return {**found, "required": list(required)} if required else found


def _listed(items: Schema) -> Schema:
    return {"type": "array", "items": items, "minItems": 1}


_MOST: Final = 2**63 - 1  # of whole numbers in JSON
_STRING: Final[Schema] = {"type": "string"}
_TEXT: Final[Schema] = {"type": "string", "minLength": 1}
_ID: Final[Schema] = {
    "type": "string",
    "minLength": 1,
    "maxLength": 1024,
    "pattern": r"^[^\u0000-\u001f\u007f-\u009f\u2028\u2029]+$",
    "description": "1024 bytes at most, without line ends and other control characters.",
}
_WHOLE: Final[Schema] = {"type": "integer"}
_NUMBER: Final[Schema] = {"type": "number"}
_FLAG: Final[Schema] = {"type": "boolean"}


def _lax_flag(default: bool | None, description: str) -> Schema:
    found: Schema = {"anyOf": [_FLAG, {"enum": ["true", "false", "1", "0", 1, 0]}, {"type": "null"}]}
    return {**found, "description": description, **({} if default is None else {"default": default})}


def _lax_whole(least: int, description: str) -> Schema:
    told = {"type": "string", "pattern": "^[1-9][0-9]{0,8}$"}
    return {
        "anyOf": [{"type": "integer", "minimum": least, "maximum": _MOST}, told, {"type": "null"}],
        "description": description,
    }


def _or_null(schema: Schema, description: str) -> Schema:
    return {"anyOf": [schema, {"type": "null"}], "description": description}


def _schemas() -> dict[str, Schema]:
    content, contents = _ref("Content"), {"anyOf": [_listed(_ref("Content")), _ref("Content")]}
    common = {
        "model": _or_null(_STRING, "The only one, or the first, where it is left out."),
        "raw_scores": _lax_flag(False, "Logits in place of scores between 0 and 1."),
        "use_activation": _lax_flag(True, "false is raw_scores."),
        "max_tokens_per_query": _lax_whole(0, "A longer query loses its end; 0 is no limit."),
        "max_tokens_per_doc": _lax_whole(0, "A longer document loses its end; 0 is no limit."),
        "truncate_prompt_tokens": _lax_whole(-1, "Of query and document together; -1 is the model's limit."),
        "truncation": _lax_flag(True, "false: what is too long is an error."),
        "truncate": _lax_flag(True, "The same."),
    }
    ranking = {
        "query": content,
        "documents": contents,
        **common,
        "return_documents": _lax_flag(None, "Whether results hold their documents; texts do where it is left out."),
        "rank_fields": _or_null({"type": "array", "items": _STRING}, "Of objects, what their text is made of."),
        "stream": _lax_flag(False, "A line for each document as it is scored, as for Accept: application/x-ndjson."),
    }
    more, any_number = _lax_whole(1, "How many results at most."), _lax_whole(0, "How many at most; 0 is all.")
    tei = {
        "query": content,
        "texts": contents,
        **common,
        "top_n": any_number,
        "return_text": _lax_flag(False, "Whether results hold their texts."),
        "truncation_direction": _or_null({"enum": ["Right", "right"]}, "Texts lose their end."),
    }
    pairs = [("queries", "documents"), ("queries", "items"), ("data_1", "data_2"), ("text_1", "text_2")]
    return {
        "Content": {
            "description": "A query or document. A string is text, whatever it looks like.",
            "anyOf": [_TEXT, _object(("id",), id={**_STRING, "description": "Of a document of the index."}), *_forms()],
        },
        "NewContent": {"description": "A document that is not in the index yet.", "anyOf": _forms()},
        "Rerank": _object(("query", "documents"), **ranking, top_n=more),
        "RerankPlain": _object(("query", "documents"), **ranking, top_n=any_number),
        "RerankTei": _object(("query", "texts"), **tei),
        "Pairs": {
            "anyOf": [_object(pair, **dict.fromkeys(pair, contents), **common) for pair in pairs],
            "description": "One query for all documents, or as many as these. Of several pairs the first one counts.",
        },
        "Error": _object(
            ("detail", "message", "code", "error", "request_id"),
            detail=_STRING,
            message=_STRING,
            code={"enum": list(STATUS)},
            request_id=_STRING,
            error={"anyOf": [_STRING, _object(("message", "type", "code"), message=_STRING, type=_STRING)]},
            error_type=_STRING,
            errors={"type": "array", "items": _object(("field", "message"), field=_STRING, message=_STRING)},
        ),
        **_library_schemas(),
        **_telling_schemas(),
    }


def _forms() -> list[Schema]:
    """What is in an object that holds a query or document itself."""
    parts = {
        "anyOf": [
            _object(("type", "text"), type={"const": "text"}, text=_TEXT),
            _object(
                ("type", "image_url"),
                type={"const": "image_url"},
                image_url={"anyOf": [_object(("url",), url=_TEXT), _TEXT]},
            ),
        ]
    }
    image = "A data URI, an image in base64, or an http(s) URL where its host may be fetched from."
    return [
        _object(("text",), text=_TEXT),
        _object(("image",), image={**_TEXT, "description": image}),
        _object(("url",), url={**_TEXT, "description": "Of an image."}),
        _object(("bytes",), bytes={**_TEXT, "description": "Of an image, in base64."}),
        _object(("content",), content={"anyOf": [_listed(parts), _TEXT]}),
    ]


def _library_schemas() -> dict[str, Schema]:
    status = {"enum": ["read", "known", "replaced"]}
    error = _object(("code", "message"), code={"enum": list(STATUS)}, message=_STRING)
    done = _object(("id",), id=_STRING, kind={"enum": ["text", "image"]}, tokens=_WHOLE, status=status, error=error)
    return {
        "Put": {**done, "required": ["id", "kind", "tokens", "status"]},
        "Added": _object(
            ("results", "read", "known", "failed"),
            results={"type": "array", "items": done},
            read=_WHOLE,
            known=_WHOLE,
            failed=_WHOLE,
        ),
        "StoredDocument": _object(
            ("id", "kind", "source"),
            id=_STRING,
            kind={"enum": ["text", "image"]},
            source=_STRING,
            tokens=_WHOLE,
            text=_STRING,
            image=_STRING,
        ),
        "Deleted": _object(("id", "deleted"), id=_STRING, deleted={"const": True}),
        "Ids": _object(("ids", "total"), ids={"type": "array", "items": _STRING}, total=_WHOLE),
        "Documents": _object(
            ("documents",),
            documents=_listed({"allOf": [_object(("id",), id=_ID), _ref("NewContent")]}),
            model=_or_null(_STRING, "Of which the index is."),
        ),
    }


def _telling_schemas() -> dict[str, Schema]:
    limits = (
        "max_body_bytes", "max_documents", "max_images", "max_image_bytes", "max_image_pixels", "max_request_pixels",
        "max_request_tokens",
    )  # fmt: skip
    own = _object(
        ("name", "aliases", "precision", "device", "index"),
        name=_STRING,
        aliases={"type": "array", "items": _STRING},
        precision=_STRING,
        device=_STRING,
        index=_FLAG,
    )
    model = _object(
        ("id", "object", "model_type"), id=_STRING, object={"const": "model"}, model_type={"const": "rerank"}
    )
    return {
        "Info": _object(
            ("model_id", "model_type", "limits", "formats", "pdf", "index", "keys", "models", "version"),
            model_id=_STRING,
            model_type=_object(("reranker",), reranker={"type": "object"}),
            max_input_length=_WHOLE,
            max_client_batch_size=_WHOLE,
            limits=_object(limits, **dict.fromkeys(limits, _WHOLE)),
            formats={"type": "array", "items": _STRING},
            pdf=_FLAG,
            index=_FLAG,
            keys=_FLAG,
            models={"type": "array", "items": own},
            version=_STRING,
        ),
        "Model": model,
        "Models": _object(("object", "data"), object={"const": "list"}, data={"type": "array", "items": _ref("Model")}),
    }
