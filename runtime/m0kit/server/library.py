"""Documents over the wire: read once, kept in the index, named by id from then on. Owns the routes of /v1/documents.

Additions are admitted and take turns like any other work, and are acknowledged when they are on the disk.
"""

import asyncio
import base64
import logging
import unicodedata
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Final

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from m0kit.errors import M0kitError, RecordDamagedError
from m0kit.keeping.store import Store
from m0kit.reading.inputs import Known, Picture
from m0kit.server.desk import Outcome, not_writable
from m0kit.server.forward import Forward
from m0kit.server.guard import call_of
from m0kit.server.lane import Lane
from m0kit.server.problems import RequestError
from m0kit.server.service import Service
from m0kit.server.wire.ask import Side
from m0kit.server.wire.body import parse_body
from m0kit.server.wire.contents import from_raw, parse_side

_log: Final = logging.getLogger(__name__)
_MAX_IDS: Final = 10_000  # of one answer
_MAX_ID: Final = 1024  # bytes of an id over the wire
_Endpoint = Callable[[Request], Awaitable[Response]]


class Library:
    """The routes of one app's documents."""

    def __init__(self, service: Service) -> None:
        self._service = service

    def routes(self, forward: Forward | None) -> list[Route]:
        """`forward` takes what writes, where another process does that."""
        one, many = "/v1/documents/{id:path}", "/v1/documents"
        writing: list[tuple[str, str, Any]] = [("PUT", one, self._put), ("DELETE", one, self._delete)]
        writing.append(("POST", many, self._add))
        return [
            *(Route(path, forward or endpoint, methods=[method]) for method, path, endpoint in writing),
            Route(one, self._get, methods=["GET"]),
            Route(many, self._ids, methods=["GET"]),
        ]

    async def _put(self, request: Request) -> Response:
        deadline = self._service.deadline()
        lane = self._lane(request)
        name = _id(request.path_params["id"], "id")
        body = await self._service.read(request)
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        side = Side(from_raw(body, kind, "body"), "body") if kind.startswith(("text/", "image/")) else _parsed(body)
        (side,) = await self._service.fetched(request, [_no_id(side)], deadline)
        (outcome,) = await self._read(request, lane, [(name, side)], deadline)
        if outcome.error is not None:
            raise outcome.error
        return _json(_told(name, side, outcome))

    async def _add(self, request: Request) -> Response:
        deadline = self._service.deadline()
        body = await self._service.read(request)
        fields = await asyncio.to_thread(parse_body, body)
        model, listed = fields.get("model"), fields.get("documents")
        if model is not None and not isinstance(model, str):
            raise RequestError("INVALID_REQUEST", "is no string.", where="model")
        lane = self._lane(request, model)
        if not isinstance(listed, list) or not listed:
            raise RequestError(
                "INVALID_REQUEST", 'expected a list of {"id": …, "text" or "image": …}.', where="documents"
            )
        if len(listed) > self._service.settings.max_documents:
            what = f"{len(listed)} documents, and {self._service.settings.max_documents} may be in a request."
            raise RequestError("TOO_MUCH", f"{what} Send several requests.", where="documents")
        names: list[str] = []
        parsed: list[Side | RequestError] = []
        for number, each in enumerate(listed):
            where = f"documents[{number}]"
            fields = each if isinstance(each, dict) else {}
            names.append(_id(fields.get("id"), f"{where}.id"))  # without ids nothing could be told of any
            form = {name: value for name, value in fields.items() if name != "id" and value is not None}
            try:
                parsed.append(_no_id(await asyncio.to_thread(parse_side, form, where)))
            except RequestError as error:
                parsed.append(error)
        there = iter(
            await self._service.fetched_each(request, [one for one in parsed if isinstance(one, Side)], deadline)
        )
        found = [one if isinstance(one, RequestError) else next(there) for one in parsed]
        good = [number for number, side in enumerate(found) if isinstance(side, Side)]
        documents = [(names[number], one) for number, one in enumerate(found) if isinstance(one, Side)]
        by_number = dict(zip(good, await self._read(request, lane, documents, deadline), strict=True))
        results: list[dict[str, Any]] = []
        for number, name in enumerate(names):
            given, outcome = found[number], by_number.get(number)
            if isinstance(given, RequestError):
                results.append(_failed(name, given))
            elif outcome is not None and outcome.error is None:
                results.append(_told(name, given, outcome))
            elif outcome is not None and outcome.error is not None:
                results.append(_failed(name, outcome.error))
        statuses = [result.get("status", "failed") for result in results]
        counts = {"read": len(statuses) - statuses.count("known") - statuses.count("failed")}
        counts |= {what: statuses.count(what) for what in ("known", "failed")}
        return _json({"results": results, **counts})

    async def _read(
        self, request: Request, lane: Lane, documents: Sequence[tuple[str, Side]], deadline: float
    ) -> list[Outcome]:
        call = call_of(request.scope)
        call.counts["documents"] = len(documents)
        tasks, refusals = await asyncio.to_thread(lane.weigh_documents, documents, self._service.settings)
        outcomes = await self._service.worked(request, lane, tasks, deadline) if tasks else []
        call.counts["tokens"] = sum(outcome.tokens for outcome in outcomes)
        left = iter(outcomes)
        return [
            Outcome(number, error=refusals[number]) if number in refusals else next(left)
            for number in range(len(documents))
        ]

    async def _get(self, request: Request) -> Response:
        store = self._store(request)
        name = _id(request.path_params["id"], "id")
        document = await _of_store(lambda: store.document(name))
        if document is None:
            raise _absent(name)
        told: dict[str, Any] = {"id": name, "kind": document.kind, "source": document.source}
        if document.kind == "text":
            told["text"] = document.data.decode()
        else:
            told["image"] = f"data:image/png;base64,{base64.b64encode(document.data).decode()}"
        return _json(told)

    async def _delete(self, request: Request) -> Response:
        lane = self._lane(request)
        name = _id(request.path_params["id"], "id")
        removal = asyncio.wrap_future(self._service.desk.remove(lane, [name]))
        try:
            absent = await removal
        except (M0kitError, OSError) as error:
            _log.error("the index could not be written: %s", error)
            raise RequestError("INDEX_FAILED", "the index could not be written; the server's log says why.") from error
        if absent:
            raise _absent(name)
        return _json({"id": name, "deleted": True})

    async def _ids(self, request: Request) -> Response:
        store = self._store(request)
        after, limit = request.query_params.get("after"), request.query_params.get("limit", "1000")
        if not (limit.isascii() and limit.isdigit() and len(limit) < 10 and int(limit) >= 1):
            raise RequestError("INVALID_REQUEST", "expected a whole number from 1 on.", where="limit")
        ids = await _of_store(store.ids)
        start = 0
        if after is not None:
            try:
                start = ids.index(after) + 1
            except ValueError:
                raise _absent(after) from None
        return _json({"ids": ids[start : start + min(int(limit), _MAX_IDS)], "total": len(ids)})

    def _lane(self, request: Request, model: str | None = None) -> Lane:
        """The artifact whose index is meant, to be written to. Raises RequestError."""
        lane = self._service.lane(model or request.query_params.get("model"))
        if lane.writer is None:
            raise not_writable(lane)
        return lane

    def _store(self, request: Request) -> Store:
        lane = self._service.lane(request.query_params.get("model"))
        if lane.reranker.store is None:
            raise not_writable(lane)
        return lane.reranker.store


async def _of_store(read: Callable[[], Any]) -> Any:
    try:
        return await asyncio.to_thread(read)
    except RecordDamagedError as error:
        _log.error("%s", error)
        raise RequestError("INDEX_FAILED", "what the index has of it is damaged. Add the document again.") from None
    except (M0kitError, OSError) as error:
        _log.error("the index could not be read: %s", error)
        raise RequestError("INDEX_FAILED", "the index could not be read; the server's log says why.") from error


def _parsed(body: bytes) -> Side:
    fields = parse_body(body)
    return parse_side({name: value for name, value in fields.items() if name not in ("id", "model")}, "")


def _no_id(side: Side) -> Side:
    if isinstance(side.content, Known):
        raise RequestError(
            "INVALID_INPUT", "names a document of the index. Give the document itself.", where=side.where
        )
    return side


def _id(name: Any, where: str) -> str:
    """Raises RequestError for what cannot be an id."""
    if not isinstance(name, str) or not name:
        raise RequestError("INVALID_REQUEST", "expected a string of at least one character.", where=where)
    try:
        size = len(name.encode())
    except UnicodeEncodeError:
        raise RequestError("INVALID_REQUEST", "is not valid Unicode.", where=where) from None
    if any(unicodedata.category(char) in ("Cc", "Zl", "Zp") for char in name):  # of which a path has none
        raise RequestError("INVALID_REQUEST", "has a line end or another control character.", where=where)
    if size > _MAX_ID:
        raise RequestError("INVALID_REQUEST", f"has {size} bytes, and {_MAX_ID} are the most.", where=where)
    return name


def _absent(name: str) -> RequestError:
    return RequestError("DOCUMENT_NOT_FOUND", f"the index has no document {name!r:.200}.", where="id")


def _told(name: str, side: Side, outcome: Outcome) -> dict[str, Any]:
    kind = "image" if isinstance(side.content, Picture) else "text"
    return {"id": name, "kind": kind, "tokens": outcome.tokens, "status": outcome.status}


def _failed(name: str, error: RequestError) -> dict[str, Any]:
    return {"id": name, "error": {"code": error.code, "message": str(error)}}


def _json(value: Any) -> Response:
    return Response(msgspec.json.encode(value), media_type="application/json")
