"""What the integrations share: an open reranker, a ranking whose errors name the documents, and waiting for it.

Owns nothing of a framework, and imports none.
"""

import asyncio
import logging
import os
import threading
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Final

from m0kit.errors import DependencyError, InputError
from m0kit.plain import plain
from m0kit.reranker import Reranker, best_first
from m0kit.scoring.schedule import Result

_log: Final = logging.getLogger(__name__)


def missing(error: ImportError, package: str, extra: str) -> ImportError:
    """What to raise where a framework cannot be imported: the sentence that names the extra, or why it is broken."""
    if (error.name or "").partition(".")[0] != package:
        return error  # of a package that the framework itself does not find
    return DependencyError(f"this integration needs {package}. pip install 'm0kit[{extra}]'")


def opened(model: Any, device: str, kwargs: Mapping[str, Any] | None) -> Reranker:
    """A reranker as it is, or that of an artifact's path. Raises TypeError, and what `Reranker.load` raises."""
    if isinstance(model, Reranker):
        return model
    if isinstance(model, str | os.PathLike):
        return Reranker.load(model, device, **(kwargs or {}))
    raise TypeError(f"model: expected a Reranker or the path of an artifact, got {type(model).__name__}.")


def check_top(value: Any, name: str, *, or_all: bool = True) -> None:
    """Raises ValueError for what is not how many of a ranking are wanted."""
    if value is None and or_all:
        return
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        accepted = "1 or more, or None for all" if or_all else "1 or more"
        raise ValueError(f"{name}: got {plain(repr(value))[:40]}, expected {accepted}.")


def rank(
    reranker: Reranker,
    query: Any,
    documents: Sequence[Any],
    places: Sequence[str],
    stop: threading.Event | None = None,
) -> list[tuple[int, Result]]:
    """Indices of the documents with their results, best first; equal ones keep their order.

    `places` name the documents in errors. Between two runs it ends where `stop` is set, and returns nothing.
    Raises InputError where the query or a document cannot be scored: none is left out of a ranking.
    """
    results: dict[int, Result] = {}
    try:
        for index, result in reranker.stream([(query, document) for document in documents], on_error="raise"):
            results[index] = result
            if stop is not None and stop.is_set():
                return []
    except InputError as error:
        raise _placed(error, places) from None
    if any("query" in result.truncated for result in results.values()):
        _log.warning("the query was too long and was cut")
    for index, place in enumerate(places):
        if "document" in results[index].truncated:
            _log.warning("%s was too long and was cut", plain(place))
    order = best_first([results[index].logit for index in range(len(documents))])
    return [(index, results[index]) for index in order]


async def arank(
    reranker: Reranker, query: Any, documents: Sequence[Any], places: Sequence[str]
) -> list[tuple[int, Result]]:
    """`rank` in a thread. A task that is cancelled ends the work there before its next run."""
    stop = threading.Event()
    try:
        return await asyncio.to_thread(partial(rank, reranker, query, documents, places, stop))
    finally:
        stop.set()


def _placed(error: InputError, places: Sequence[str]) -> InputError:
    """The error of a pair with the framework's name of its document: "documents[3] (id 7): page.png: …"."""
    if error.pair is None:
        return error
    side, _, rest = error.where.partition(": ")
    if error.side is None:
        side, rest = "", error.where
    place = "query" if side == "query" else places[error.pair]
    where = ": ".join(part for part in (place, rest) if part)
    return type(error)(*error.reason.split("\n"), where=where)
