"""Several engines as one: a document is always computed by the same of them, which its key chooses.

Owns who computes what. So each GPU keeps its own share of the documents, and a score depends neither on what the others
compute nor on whether one of them is lost: that costs the documents that are its own, until the process ends.

    engine = RoutedEngine([CudaEngine(…), CudaEngine(…)])
    engine.begin(parts)()      # each engine has begun its share before the first is waited for
"""

import contextlib
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, Final, Generic, Protocol, TypeVar

from m0kit import forks
from m0kit.scoring.engine import Engine, Handle, Part
from m0kit.scoring.images import SeenImage
from m0kit.scoring.planner import pack
from m0kit.scoring.prepare import Document

_KEY_BYTES: Final = 8  # of a key, a sha256, which are as good as all of them to choose by
_Item = TypeVar("_Item")
_Found = TypeVar("_Found")


class Whole(Engine, Protocol):
    """An engine with what an index and the end of its work need of it."""

    salt: bytes  # what tells its artifact from another, in keys

    def compute(self, documents: Sequence[Document]) -> Sequence[Any]:
        """States for an index, in the computer's memory."""

    def close(self) -> None:
        """End."""


_Whole = TypeVar("_Whole", bound=Whole)


class RoutedEngine(Generic[_Whole]):
    """Engines of one artifact and one form of what is kept, each on a device of its own. Thread-safe as they are."""

    def __init__(self, engines: Sequence[_Whole]) -> None:
        first = engines[0]
        self.engines, self.config, self.low_memory = tuple(engines), first.config, first.low_memory
        self.salt, self.kept, self.keeps = first.salt, first.kept, first.keeps
        self.rows = sum(engine.rows for engine in engines)
        self.past_bytes = sum(engine.past_bytes for engine in engines)
        self.runs_ahead = max(engine.runs_ahead for engine in engines)
        self.prepare_threads = max(engine.prepare_threads for engine in engines)
        self.after_fork()
        forks.watch(self)

    def after_fork(self) -> None:
        """Threads do not come along."""
        self._threads = ThreadPoolExecutor(len(self.engines), thread_name_prefix="m0kit-routed")

    def index_of(self, key: bytes) -> int:
        """Which engine has what goes by this key, on every machine and in every process."""
        return int.from_bytes(key[:_KEY_BYTES]) % len(self.engines)

    def find(self, document: Document) -> Handle | None:
        return self._of(document).find(document)

    def has(self, document: Document) -> bool:
        return self._of(document).has(document)

    def prefetch(self, documents: Iterable[Document]) -> None:
        for engine, _, share in self._shares(list(documents), lambda document: document.key):
            engine.prefetch(share)

    def states(self, documents: Sequence[Document]) -> list[Handle]:
        return self._gathered(documents, lambda engine, share: engine.states(share))

    def compute(self, documents: Sequence[Document]) -> list[Any]:
        """As `Whole.compute`."""
        return self._gathered(documents, lambda engine, share: engine.compute(share))

    def encode(self, images: Sequence[SeenImage]) -> None:
        """Each image by the engine that its own pixels choose: its embeddings are in the computer's memory, for all."""
        shares = self._shares(images, lambda image: image.digest())
        self._at_once([partial(engine.encode, share) for engine, _, share in shares])

    def begin(self, parts: Sequence[Part]) -> Callable[[], list[float]]:
        """A run of each engine that has a share, or a few, each no larger than the engine takes."""
        shares = self._shares(parts, lambda part: part.document.key)
        begun = self._at_once([partial(_begun, engine, share) for engine, _, share in shares])

        def wait() -> list[float]:
            logits: list[list[float]] = [[] for _ in parts]
            for (_, places, share), found in zip(shares, _ended(begun), strict=True):
                left = iter(found)
                for place, part in zip(places, share, strict=True):
                    logits[place] = [next(left) for _ in part.pairs]
            return [logit for some in logits for logit in some]

        return wait

    def rest(self, used: Iterable[Document]) -> None:
        shares: list[list[Document]] = [[] for _ in self.engines]
        for document in used:
            shares[self.index_of(document.key)].append(document)
        for engine, share in zip(self.engines, shares, strict=True):
            engine.rest(share)  # nothing waits for any of them

    def close(self) -> None:
        """End all of them. Raises what the first raised that could not."""
        with contextlib.ExitStack() as stack:
            stack.callback(self._threads.shutdown)
            for engine in self.engines:
                stack.callback(engine.close)

    def _of(self, document: Document) -> _Whole:
        return self.engines[self.index_of(document.key)]

    def _shares(
        self, items: Sequence[_Item], key: Callable[[_Item], bytes]
    ) -> list[tuple[_Whole, list[int], list[_Item]]]:
        """Engine, places of its items among all, and these, of those that have any."""
        places: list[list[int]] = [[] for _ in self.engines]
        for place, item in enumerate(items):
            places[self.index_of(key(item))].append(place)
        return [
            (engine, own, [items[place] for place in own])
            for engine, own in zip(self.engines, places, strict=True)
            if own
        ]

    def _gathered(
        self, documents: Sequence[Document], compute: Callable[[_Whole, Sequence[Document]], Sequence[_Found]]
    ) -> list[_Found]:
        """What the engines make of their shares, each in runs that it takes, in the order of the documents."""

        def computed(engine: _Whole, share: Sequence[Document]) -> list[_Found]:
            runs = pack(((document, [document.length]) for document in share), [engine.rows])
            return [one for run in runs for one in compute(engine, run)]

        shares = self._shares(documents, lambda document: document.key)
        found: dict[int, _Found] = {}
        works = [partial(computed, engine, share) for engine, _, share in shares]
        for (_, places, _), some in zip(shares, self._at_once(works), strict=True):
            found.update(zip(places, some, strict=True))
        return [found[place] for place in range(len(documents))]

    def _at_once(self, works: Sequence[Callable[[], _Found]]) -> list[_Found]:
        """What these give, each in a thread. Raises what the first of them raised, when all have ended."""
        return _ended([self._threads.submit(work).result for work in works])


def _ended(works: Sequence[Callable[[], _Found]]) -> list[_Found]:
    """What these give, one after the other. Raises what the first of them raised, when all have ended."""
    found: list[_Found] = []
    failed: list[Exception] = []
    for work in works:
        try:
            found.append(work())
        except Exception as error:  # a lost GPU's must not keep the others from ending their own
            failed.append(error)
    if failed:
        raise failed[0]
    return found


def _begun(engine: Engine, parts: Sequence[Part]) -> Callable[[], list[float]]:
    """What waits for runs of these parts, in as many runs as they take."""
    sized = [
        (part, [sum(pair.num_rows for pair in part.pairs) + (part.document.length if part.state is None else 0),
                0 if part.state is None else part.state.num_bytes])
        for part in parts
    ]  # fmt: skip
    waits = [engine.begin(run) for run in pack(sized, [engine.rows, engine.past_bytes])]
    return lambda: [logit for wait in waits for logit in wait()]
