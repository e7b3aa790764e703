"""What the routes of one process share: artifacts that are opened while it starts, the desk, and the way of a request.

Owns whether this process is ready, which artifact a request means, its body, its images from elsewhere, and that its
work ends when its client has gone. What is asked and answered is the routes'.

    service = Service(settings, writes=True)
    service.start()
    outcomes = await service.worked(request, service.lane("m0-int8"), tasks, service.deadline())
"""

import asyncio
import contextlib
import logging
import threading
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Sequence
from typing import Any, Final, TypeVar

from starlette.requests import Request

from m0kit.errors import M0kitError
from m0kit.reading.inputs import shown
from m0kit.server.bodies import ClientGoneError, Hold, read_body
from m0kit.server.desk import Desk, Outcome
from m0kit.server.fetching import Fetcher
from m0kit.server.guard import call_of
from m0kit.server.lane import Lane, Task, is_made
from m0kit.server.metrics import CacheCounts, Metrics
from m0kit.server.problems import RequestError
from m0kit.server.settings import ALIASES, Settings
from m0kit.server.wire.ask import Link, Side
from m0kit.server.wire.contents import from_raw

_log: Final = logging.getLogger(__name__)
MAX_FETCHES: Final = 4  # images of one request that are fetched at a time
_Found = TypeVar("_Found")
_LOOK_S: Final = 0.1  # between looks at whether an index is there


class Service:
    """Opens artifacts when it starts, and is asked for them meanwhile."""

    def __init__(self, settings: Settings, *, writes: bool) -> None:
        """`writes`: whether this process adds to indexes. Of several on one index one does."""
        self.settings, self.writes = settings, writes
        self.metrics = Metrics(self._caches)
        self.desk = Desk(self.metrics, queue_s=settings.queue_s)
        self.lanes: dict[str, Lane] = {}  # by each of their names
        self._failure: M0kitError | None = None
        self._is_ready = False
        self._is_stopping = threading.Event()
        self._opening: threading.Thread | None = None
        self._fetcher = Fetcher(settings.image_hosts, settings.max_image_bytes) if settings.image_hosts else None

    # --- beginning and end ---------------------------------------------------------------------------------

    def start(self) -> None:
        """Open the artifacts, in a thread."""
        self._opening = threading.Thread(target=self._open, name="m0kit-open", daemon=True)
        self._opening.start()

    def _open(self) -> None:
        try:
            for number, model in enumerate(self.settings.models):
                while model.index is not None and not self.writes and not is_made(model.index):
                    if self._is_stopping.wait(_LOOK_S):  # the process that writes to it makes it
                        return
                lane = Lane.open(model, model.called, writes=self.writes)
                reranker = lane.reranker
                reranker.try_answers(again=self.settings.warm)
                manifest = reranker.manifest
                self.metrics.model_info(lane.names[0], manifest.scheme, manifest.fingerprint)
                self.desk.open(lane)
                for name in (*lane.names, *(ALIASES if number == 0 else ())):
                    self.lanes.setdefault(name, lane)
                _log.info("model %s is open: %s on %s", lane.names[0], manifest.scheme, reranker.device)
            self._is_ready = True
        except M0kitError as error:
            self._failure = error  # told by the process that ends of it
        except Exception as error:
            _log.exception("an artifact could not be opened")
            self._failure = M0kitError(f"an artifact could not be opened: {type(error).__name__}. See the log.")

    def stop(self) -> None:
        """Let nobody in any more."""
        self._is_ready = False
        self._is_stopping.set()
        self.desk.shut()

    async def close(self) -> None:
        """End what is left, and let the artifacts go."""
        self.stop()
        await asyncio.to_thread(self._close)

    def _close(self) -> None:
        if self._opening is not None:
            self._opening.join()
        self.desk.close()
        if self._fetcher is not None:
            self._fetcher.close()
        for lane in set(self.lanes.values()):
            lane.close()

    @property
    def failure(self) -> M0kitError | None:
        """Why this process will never be ready, or never again."""
        lost = next((lane for lane in set(self.lanes.values()) if self.desk.is_lost(lane)), None)
        if lost is not None:
            return M0kitError(f"model {lost.names[0]} cannot be run in this process any more.")
        return self._failure

    @property
    def problem(self) -> RequestError | None:
        """Why requests are not scored now."""
        if self.failure is not None:
            return RequestError(
                "ENGINE_FAILED", "the model cannot be run; the server's log says why.", retry_after_s=10
            )
        if not self.desk.is_open:
            return RequestError("STOPPING", "this server is stopping. Ask another, or later.", retry_after_s=5)
        if not self._is_ready:
            return RequestError(
                "NOT_READY", "the server is opening its models. Try again in a moment.", retry_after_s=2
            )
        return None

    def _caches(self) -> dict[str, CacheCounts]:
        found: dict[str, CacheCounts] = {}
        self.metrics.queue(self.desk.num_requests, self.desk.num_queued)
        lanes = list({id(lane): lane for lane in list(self.lanes.values())}.values())
        caches = [lane.reranker.cache for lane in lanes]
        memory = [cache for cache in caches if cache is not None]
        if memory:
            found["prefix"] = CacheCounts(
                sum(cache.hits for cache in memory),
                sum(cache.misses for cache in memory),
                sum(cache.dropped for cache in memory),
                sum(cache.num_bytes for cache in memory),
            )
        reads = [lane.reranker.store.record_reads for lane in lanes if lane.reranker.store is not None]
        if reads:
            found["disk"] = CacheCounts(sum(one.hits for one in reads), sum(one.misses for one in reads), 0, 0)
        return found

    # --- for the routes --------------------------------------------------------------------------------------

    def lane(self, model: str | None) -> Lane:
        """The artifact that a request names, or the first. Raises RequestError."""
        if (problem := self.problem) is not None:
            raise problem
        found = self.lanes.get(model) if model else next(iter(self.lanes.values()))
        if found is None:
            served = ", ".join(dict.fromkeys(lane.names[0] for lane in self.lanes.values()))
            raise RequestError(
                "MODEL_NOT_FOUND",
                f"{shown(model)} is not served here. Served: {served}. The server takes other names with "
                f"--served-model-name.",
                where="model",
            )
        return found

    async def read(self, request: Request) -> bytes:
        """A request's body. Raises RequestError, ClientGoneError."""
        settings, hold = self.settings, call_of(request.scope).hold
        return await read_body(_receiving(request), settings.max_body_bytes, settings.read_timeout_s, hold)

    def deadline(self) -> float:
        """Of a request that comes now, by the loop's clock."""
        return asyncio.get_running_loop().time() + self.settings.request_timeout_s

    async def fetched(self, request: Request, sides: Sequence[Side], deadline: float) -> list[Side]:
        """The same with images in the place of links. A client that hangs up ends it.

        Raises RequestError, ClientGoneError.
        """
        found: list[Side] = []
        for one in await self.fetched_each(request, sides, deadline, all_or_none=True):
            assert isinstance(one, Side)
            found.append(one)
        return found

    async def fetched_each(
        self, request: Request, sides: Sequence[Side], deadline: float, *, all_or_none: bool = False
    ) -> list[Side | RequestError]:
        """The same, with why not in the place of what cannot be fetched; `all_or_none` raises that.

        Raises RequestError for the request as a whole, ClientGoneError.
        """
        links = [side for side in sides if isinstance(side.content, Link)]
        if not links:
            return list(sides)
        if len(links) > self.settings.max_images:
            what = f"more than {self.settings.max_images} images are in the request. Send several requests."
            raise RequestError("TOO_MUCH", what, where=links[self.settings.max_images].where)
        fetches = _Fetches(self._fetcher, call_of(request.scope).hold, self.settings.max_body_bytes)

        async def each(side: Side) -> Side | RequestError:
            try:
                return await fetches.side(side)
            except RequestError as error:
                if all_or_none:
                    raise
                return error

        try:
            async with asyncio.timeout_at(deadline):
                return await _while_connected(request, _all(map(each, sides)))
        except TimeoutError:
            raise RequestError(
                "DEADLINE_EXCEEDED",
                "the images could not be fetched in the time that a request may take. Send fewer, or send them "
                "themselves.",
                retry_after_s=1,
            ) from None

    async def worked(
        self, request: Request, lane: Lane, tasks: Sequence[Task], deadline: float,
        tell: Callable[[Outcome], Awaitable[None]] | None = None,
    ) -> list[Outcome]:  # fmt: skip
        """Outcomes in the order of the tasks. A client that hangs up ends it. Raises RequestError, ClientGoneError."""

        async def work() -> list[Outcome]:
            found: list[Outcome | None] = [None] * len(tasks)
            async with contextlib.aclosing(self.desk.work(lane, tasks, deadline)) as all_of_it:
                async for some in all_of_it:
                    for outcome in some:
                        found[outcome.position] = outcome
                        if tell is not None:
                            await tell(outcome)
            return [outcome for outcome in found if outcome is not None]

        return await _while_connected(request, work())


class _Fetches:
    """The images that one request names by URL: a few at a time, and no more bytes than a body may have."""

    def __init__(self, fetcher: Fetcher | None, hold: Hold, max_bytes: int) -> None:
        self._fetcher, self._hold, self._max_bytes = fetcher, hold, max_bytes
        self._places = asyncio.Semaphore(MAX_FETCHES)
        self._num_bytes = 0

    async def side(self, side: Side) -> Side:
        """The same with the image. Raises RequestError."""
        if not isinstance(side.content, Link):
            return side
        if self._fetcher is None:
            what = "is a URL, and this server fetches nothing. Send the image as a data URI or in base64."
            raise RequestError("INVALID_INPUT", what, where=side.where)
        async with self._places:
            data = await self._fetcher.fetch(side.content.url, side.where)
        self._num_bytes += len(data)
        if self._num_bytes > self._max_bytes:
            what = f"with it, the images that are fetched have over {self._max_bytes} bytes. Send several requests."
            raise RequestError("TOO_MUCH", what, where=side.where)
        self._hold.take(len(data))
        return Side(from_raw(data, "image", side.where), side.where)


async def _all(works: Iterable[Coroutine[Any, Any, _Found]]) -> list[_Found]:
    """What each gives, in order. Where one fails, or this is cancelled, none goes on."""
    tasks = [asyncio.ensure_future(work) for work in works]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _receiving(request: Request) -> Callable[[], Awaitable[dict[str, Any]]]:
    async def receive() -> dict[str, Any]:
        return dict(await request.receive())

    return receive


async def _while_connected(request: Request, work: Coroutine[Any, Any, _Found]) -> _Found:
    """What `work` gives, unless the client hangs up before: then it is cancelled. Raises ClientGoneError."""
    working = asyncio.ensure_future(work)
    listening = asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait((working, listening), return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise ClientGoneError
    finally:
        for task in (working, listening):
            task.cancel()
        await asyncio.gather(working, listening, return_exceptions=True)


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
