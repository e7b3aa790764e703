"""What was computed and may be wanted again, in memory, under one limit of bytes. Owns what goes when it is full.

And what is being computed right now: `Once` has one thread do it while the others that want it wait.

Documents' states and images' embeddings differ a hundredfold in size and in what they cost to compute, so the least
recently used one is not the one to let go: Greedy-Dual-Size-Frequency (Cherkasova 1998) lets go what saves the
least work per byte, and ages what was not asked for.

    cache = Cache(1 << 30)
    cache.put(key, state, num_bytes=state.num_bytes, cost=770)
    cache.get(key)
    Once().get([key], cache.peek, compute)
"""

import heapq
import threading
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from m0kit import forks


@dataclass(slots=True)
class _Entry:
    value: Any
    num_bytes: int
    cost: float
    uses: int
    rank: float  # goes first when lowest


class Cache:
    """Values by key. Thread-safe. A value over the limit is not kept."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.num_bytes = 0
        self.hits = self.misses = self.dropped = 0
        self._entries: dict[Any, _Entry] = {}
        self.order: list[tuple[float, int, Any]] = []  # of ranks, some outdated
        self._age = 0.0  # the rank of what went last: newcomers start above it
        self._serial = 0
        self.fork_lock = threading.Lock()
        forks.watch(self)

    def after_fork(self) -> None:
        """The values stay: the child shares their memory."""
        self.fork_lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, key: Any) -> Any:
        """The value, or None."""
        with self.fork_lock:
            entry = self._entries.get(key)
            if entry is None:
                self.misses += 1
                return None
            self.hits += 1
            entry.uses += 1
            self._place(key, entry)
            return entry.value

    def __iter__(self) -> Iterator[Any]:
        return iter(list(self._entries))

    def __contains__(self, key: Any) -> bool:
        """Whether it is there, which counts as no use."""
        return key in self._entries

    def peek(self, key: Any) -> Any:
        """The value, or None; counts as no use."""
        entry = self._entries.get(key)
        return None if entry is None else entry.value

    def put(self, key: Any, value: Any, *, num_bytes: int, cost: float) -> None:
        """Keep a value that takes `num_bytes` and would cost `cost`, in any unit, to compute again."""
        with self.fork_lock:
            if key in self._entries or num_bytes > self.max_bytes:
                return
            entry = _Entry(value, num_bytes, cost, 1, 0.0)
            self._entries[key] = entry
            self.num_bytes += num_bytes
            self._place(key, entry)
            while self.num_bytes > self.max_bytes:
                self._drop()

    def forget(self, key: Any) -> None:
        """Let a value go, where it is there."""
        with self.fork_lock:
            if (known := self._entries.pop(key, None)) is not None:
                self.num_bytes -= known.num_bytes

    def drop_least(self) -> bool:
        """Let the value go that saves the least work per byte, as a newcomer would make it go. False where none is."""
        with self.fork_lock:
            return self._drop()

    def _drop(self) -> bool:
        while self.order:
            rank, _, least = heapq.heappop(self.order)
            known = self._entries.get(least)
            if known is not None and known.rank == rank:
                del self._entries[least]
                self.num_bytes -= known.num_bytes
                self.dropped += 1
                self._age = rank
                return True
        return False

    def _place(self, key: Any, entry: _Entry) -> None:
        entry.rank = self._age + entry.uses * entry.cost / max(entry.num_bytes, 1)
        self._serial += 1
        heapq.heappush(self.order, (entry.rank, self._serial, key))
        if len(self.order) > 4 * len(self._entries) + 64:  # mostly outdated ranks
            self.order = [(e.rank, n, k) for n, (k, e) in enumerate(self._entries.items())]
            self._serial = len(self.order)
            heapq.heapify(self.order)


@dataclass(slots=True, eq=False)
class _Flight:
    """A value that some thread is computing."""

    landed: threading.Event = field(default_factory=threading.Event)
    value: Any = None  # stays None where that thread fails


class Once:
    """Has each value computed by one thread at a time. Thread-safe."""

    def __init__(self) -> None:
        self._flights: dict[Hashable, _Flight] = {}
        self.fork_lock = threading.Lock()
        forks.watch(self)

    def after_fork(self) -> None:
        """Threads that computed something are not there."""
        self.fork_lock = threading.Lock()
        self._flights = {}

    def __len__(self) -> int:
        """Values that are being computed."""
        return len(self._flights)

    def get(
        self,
        keys: Sequence[Hashable],
        known: Callable[[Any], Any],
        compute: Callable[[list[Any]], Sequence[Any]],
    ) -> list[Any]:
        """A value for each key: one that is `known` (not None), or that another thread makes now, or of `compute`.

        `compute` gets all keys that are left at once. Where it raises, it raises here alone: who waited for its values
        goes on by itself. Nobody waits for others before all that others may wait for is done, so no ring of threads
        can.
        """
        found: dict[Hashable, Any] = {}
        while missing := [key for key in dict.fromkeys(keys) if key not in found]:
            own: dict[Hashable, _Flight] = {}
            others: dict[Hashable, _Flight] = {}
            try:
                with self.fork_lock:
                    for key in missing:
                        flight = self._flights.get(key)
                        if flight is None:
                            own[key] = self._flights[key] = _Flight()
                        else:
                            others[key] = flight
                # What landed since the caller looked is known by now.
                found |= {key: value for key in own if (value := known(key)) is not None}
                if new := [key for key in own if key not in found]:
                    found |= zip(new, compute(new), strict=True)
            finally:
                with self.fork_lock:
                    for key, flight in own.items():
                        flight.value = found.get(key)
                        if self._flights.get(key) is flight:
                            del self._flights[key]
                        flight.landed.set()
            for key, flight in others.items():
                flight.landed.wait()
                if flight.value is not None:
                    found[key] = flight.value
        return [found[key] for key in keys]
