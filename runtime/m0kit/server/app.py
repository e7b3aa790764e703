"""What answers: the routes that score, and all others behind the guard. Owns the way from a body to a ranking.

Who may ask is the guard's, the forms are `wire`'s, the order of the work is the desk's.

    app = build(settings)      # an ASGI app, to be served by `connections`
"""

import asyncio
import re
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any, Final, TypeVar

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route, Router

from m0kit.errors import M0kitError
from m0kit.server.desk import Outcome
from m0kit.server.forward import Forward
from m0kit.server.guard import DOCUMENTS, Guard, call_of
from m0kit.server.keys import Keys
from m0kit.server.lane import Lane, Task
from m0kit.server.library import Library
from m0kit.server.metrics import Metrics
from m0kit.server.pages import PDFS, page_routes
from m0kit.server.problems import RequestError
from m0kit.server.service import Service
from m0kit.server.settings import Settings
from m0kit.server.telling import Telling
from m0kit.server.wire import answers
from m0kit.server.wire.answers import Told
from m0kit.server.wire.ask import Ask
from m0kit.server.wire.requests import Dialect, parse_rerank, parse_score

_RANKINGS: Final[dict[str, Dialect]] = {"/v1/rerank": "v1", "/v2/rerank": "v2", "/rerank": "plain", "/": "plain"}
_SCORES: Final = ("/score", "/v1/score")
_SMALL: Final = 1 << 16  # bytes of a body that is parsed at once: a thread takes longer to be told
_LINES: Final = "application/x-ndjson"
_TEXTS: Final = re.compile(rb'"texts"\s*:')  # a name, and no text that is one document
_LATE_S: Final = 5.0  # that the writer's own limit comes first
_Found = TypeVar("_Found")


def build(settings: Settings, *, worker: int = 0, writer_socket: Path | None = None) -> "App":
    """The app of one process. `worker`: its number among several, of which 0 writes to the indexes.

    The others pass that on to `writer_socket`. Raises M0kitError where the key file cannot be used.
    """
    return App(settings, None if worker == 0 else writer_socket)


class App:
    """An ASGI app. It opens its artifacts when it starts, and answers /live and /ready meanwhile."""

    def __init__(self, settings: Settings, writer_socket: Path | None = None) -> None:
        self.service = Service(settings, writes=writer_socket is None)
        self._keys = Keys.read(settings.api_key_file) if settings.api_key_file else None
        forward = None
        if writer_socket is not None:
            forward = Forward(writer_socket, settings.request_timeout_s + _LATE_S)
        ranking = [Route(path, self._ranks(dialect), methods=["POST"]) for path, dialect in _RANKINGS.items()]
        scoring = [Route(path, self._score, methods=["POST"]) for path in _SCORES]
        self.routes = [*ranking, *scoring, *Library(self.service).routes(forward), *Telling(self.service).routes()]
        if settings.page:
            self.routes += page_routes(self.service.read, settings.max_documents, settings.request_timeout_s)
        router = Router([*self.routes, *_other_methods(self.routes)], redirect_slashes=False, default=_not_found)
        raw = (*DOCUMENTS, PDFS) if settings.page else DOCUMENTS
        self._guard = Guard(_Started(self.service, router), settings, self.service.metrics, keys=self._keys, raw=raw)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        await self._guard(scope, receive, send)

    @property
    def metrics(self) -> Metrics:
        """What is counted."""
        return self.service.metrics

    @property
    def is_ready(self) -> bool:
        """Whether requests are scored."""
        return self.service.problem is None

    @property
    def failure(self) -> M0kitError | None:
        """Why it will never be ready, or never again."""
        return self.service.failure

    def stop(self) -> None:
        """Let nobody in any more; what was let in is answered."""
        self.service.stop()

    def reread(self) -> None:
        """Read the key file again; one that cannot be used leaves the keys as they are."""
        if self._keys is not None:
            self._keys.reread()

    def _ranks(self, dialect: Dialect) -> Callable[[Request], Awaitable[Response]]:
        async def rank(request: Request) -> Response:
            deadline = self.service.deadline()
            call = call_of(request.scope)
            body = await self.service.read(request)
            call.tei = dialect == "plain" and _TEXTS.search(body) is not None  # for errors of what cannot be read
            ask = await _parsed(body, lambda: parse_rerank(body, dialect))
            call.tei = ask.shape == "tei"
            in_lines = ask.shape == "rerank" and (ask.stream or _LINES in request.headers.get("accept", ""))
            return await self._answer(request, ask, deadline, in_lines=in_lines)

        return rank

    async def _score(self, request: Request) -> Response:
        deadline = self.service.deadline()
        body = await self.service.read(request)
        return await self._answer(request, await _parsed(body, lambda: parse_score(body)), deadline, in_lines=False)

    async def _answer(self, request: Request, ask: Ask, deadline: float, *, in_lines: bool) -> Response:
        call = call_of(request.scope)
        lane = self.service.lane(ask.model)
        sides = await self.service.fetched(request, [*ask.queries, *ask.documents], deadline)
        queries, documents = sides[: len(ask.queries)], sides[len(ask.queries) :]
        tasks = await asyncio.to_thread(lane.weigh, queries, documents, ask, self.service.settings)
        call.counts["documents"] = len(tasks)

        def told(outcomes: Sequence[Outcome]) -> Told:
            tokens = sum(outcome.tokens for outcome in outcomes)
            call.counts |= {"tokens": tokens, "cached": sum(outcome.cached for outcome in outcomes)}
            return answers.told(call.id, lane.names[0], tokens)

        if in_lines:
            return _InLines(self.service, request, ask, lane, tasks, deadline, told)
        outcomes = await self.service.worked(request, lane, tasks, deadline)
        results = [outcome.result for outcome in outcomes if outcome.result is not None]
        return Response(answers.answer(ask, results, told(outcomes)), media_type="application/json")


class _InLines(Response):
    """A ranking in lines of JSON, one as soon as each document has its score."""

    def __init__(
        self, service: Service, request: Request, ask: Ask, lane: Lane, tasks: Sequence[Task], deadline: float,
        told: Callable[[Sequence[Outcome]], Told],
    ) -> None:  # fmt: skip
        super().__init__(media_type=_LINES)
        del self.headers["content-length"]
        self._service, self._request, self._ask, self._lane = service, request, ask, lane
        self._tasks, self._deadline, self._told = tasks, deadline, told

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:  # noqa: ARG002 — its caller's form
        ask, has_begun = self._ask, False

        async def line(data: bytes, *, more: bool = True) -> None:
            nonlocal has_begun
            if not has_begun:
                has_begun = True
                await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            await send({"type": "http.response.body", "body": data, "more_body": more})

        async def tell(outcome: Outcome) -> None:
            assert outcome.result is not None
            found = answers.line(
                ask, outcome.position, outcome.result, cached=outcome.cached, ms=1000 * outcome.seconds
            )
            await line(found)

        try:
            outcomes = await self._service.worked(self._request, self._lane, self._tasks, self._deadline, tell)
        except RequestError as error:
            if not has_begun:
                raise  # its status can still be told
            await line(answers.error_line(error, call_of(scope).id), more=False)
            return
        results = [outcome.result for outcome in outcomes if outcome.result is not None]
        await line(answers.last_line(ask, results, self._told(outcomes)), more=False)


class _Started:
    """The router, which starts and ends the service with the server."""

    def __init__(self, service: Service, router: Router) -> None:
        self._service, self._router = service, router

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "lifespan":
            await self._router(scope, receive, send)
            return
        while True:
            message = await receive()
            if message["type"] == "lifespan.startup":
                self._service.start()
                await send({"type": "lifespan.startup.complete"})
            else:
                await self._service.close()
                await send({"type": "lifespan.shutdown.complete"})
                return


async def _parsed(body: bytes, parse: Callable[[], _Found]) -> _Found:
    return parse() if len(body) < _SMALL else await asyncio.to_thread(parse)


async def _not_found(*_: Any) -> None:
    raise RequestError("NOT_FOUND", "there is nothing at this path. GET /openapi.json lists what there is.")


def _other_methods(routes: Sequence[BaseRoute]) -> list[Route]:
    """For each path a route of all the methods that it does not take, known or not, which says so."""
    taken: dict[str, set[str]] = {}
    for route in routes:
        assert isinstance(route, Route)
        taken.setdefault(route.path, set()).update(route.methods or ())
    return [Route(path, _OtherMethod(methods)) for path, methods in taken.items()]


class _OtherMethod:
    """An ASGI app, to which a route gives every method: names would leave out those that nobody thought of."""

    def __init__(self, taken: set[str]) -> None:
        self._taken = sorted(taken)

    async def __call__(self, scope: Any, *_: Any) -> None:
        what = f"{scope['method']:.20} is not taken here, but {', '.join(self._taken)}."
        raise RequestError("METHOD_NOT_ALLOWED", what, allowed=self._taken)
