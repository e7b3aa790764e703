"""Pairs prepared while an engine computes, by as many threads as it says. Owns the threads, and how far they are ahead.

    with closing(prepared_ahead(pairs, preparer, engine)) as ready:
        for prepared in ready: ...                 # in the order of the pairs; an InputError in the place of one

What is done with them is the caller's, in one thread. Closed, or left by an error, it ends its threads.
"""

from collections import deque
from collections.abc import Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import Any, Final

from m0kit.errors import InputError
from m0kit.scoring.engine import Engine
from m0kit.scoring.images import SeenImage
from m0kit.scoring.prepare import Prepared, Preparer

# Pairs ahead for each thread: with eight of them some 30 pages, of which an engine may take ten at a time.
_AHEAD: Final = 4

Ready = Prepared | InputError


def prepared_ahead(pairs: Iterable[Any], preparer: Preparer, engine: Engine) -> Generator[Ready, None, None]:
    """Each pair as `Preparer.prepare` has it, or the InputError that it raises. Whatever else one raises, comes in its
    place too, and is the end.

    With more than one thread, images have their pixels where the engine will want them. Of `pairs` no more are taken
    than a few for each thread, and none once this is closed.
    """
    if engine.prepare_threads == 1:
        for pair in pairs:
            yield _prepared(pair, preparer)
        return
    window: deque[Ready | Future[Ready]] = deque()
    pool = ThreadPoolExecutor(engine.prepare_threads, "m0kit-prepare")
    try:
        for pair in pairs:
            if not preparer.is_quick(pair):
                window.append(pool.submit(prepared_and_drawn, pair, preparer, engine))
            elif _undrawn(ready := _prepared(pair, preparer), engine):
                window.append(pool.submit(_drawn, ready, engine))
            else:  # a thread would take longer to be told of it
                window.append(ready)
            while window and (len(window) > _AHEAD * engine.prepare_threads or _is_there(window[0])):
                yield _result(window.popleft())
        while window:
            yield _result(window.popleft())
    finally:
        pool.shutdown(cancel_futures=True)


def _prepared(pair: Any, preparer: Preparer) -> Ready:
    try:
        return preparer.prepare(pair)
    except InputError as error:
        return error


def _undrawn(ready: Ready, engine: Engine) -> list[SeenImage]:
    """Images without pixels that the engine will want."""
    if isinstance(ready, InputError):
        return []
    images = ready.images if engine.has(ready.document) else ready.document.images + ready.images
    return [image for image in images if not image.is_drawn]


def _drawn(ready: Ready, engine: Engine) -> Ready:
    for image in _undrawn(ready, engine):
        with suppress(InputError):  # told when its pairs are run
            image.require()
    return ready


def prepared_and_drawn(pair: Any, preparer: Preparer, engine: Engine) -> Ready:
    """A pair as `Preparer.prepare` has it, its images with the pixels that the engine will want, or its InputError."""
    return _drawn(_prepared(pair, preparer), engine)


def _is_there(one: Ready | Future[Ready]) -> bool:
    return not isinstance(one, Future) or one.done()


def _result(one: Ready | Future[Ready]) -> Ready:
    return one.result() if isinstance(one, Future) else one
