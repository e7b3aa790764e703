"""The pool of pages on a device: which are free, and when the others come back. Owns no memory, only numbers.

A page holds the keys and values of 128 tokens in every layer (`m0kit.scoring.paging` says which token is where). Pages
are taken as `Pages`, and are free again when nothing holds that handle any more: not the cache, no schedule, no run.
So nothing is let go by hand, and what is dropped from the cache while a run reads it stays until the run is done.

    pool, cache = Pool(512), Cache(512 * page_bytes)
    pages = claim(pool, cache, pool.pages_for(770))          # 7; where too few are free, the cache lets go first
    state = PageState(pages, 770, page_bytes)
    cache.put(key, state, num_bytes=state.num_bytes, cost=770)
"""

import threading
from collections import deque
from dataclasses import dataclass
from typing import Final, NoReturn

from m0kit import forks
from m0kit.errors import InputError, PoolFullError
from m0kit.keeping.cache import Cache

# Tokens of a page: what the flash kernel of PagedAttention reads at once where heads are 128 wide.
PAGE_TOKENS: Final = 128


class Pages:
    """Pages that were taken from a pool. They are free again once nothing holds this object."""

    __slots__ = ("__weakref__", "_returned", "is_lost", "numbers")

    def __init__(self, numbers: tuple[int, ...], returned: deque[tuple[int, ...]]) -> None:
        """Only for pools: they give each number to one handle at a time."""
        self.numbers: Final = numbers
        self.is_lost = False  # what was to write them failed: whoever holds them must not read them
        self._returned = returned

    def __del__(self) -> None:
        # The collector may run this in any thread, inside any call of the pool: so it takes no lock.
        self._returned.append(self.numbers)

    def __len__(self) -> int:
        return len(self.numbers)

    def __reduce__(self) -> NoReturn:
        raise TypeError("pages are not copied or pickled: a second handle would give them back while the first is used")


@dataclass(frozen=True, slots=True, eq=False)
class PageState:
    """A document's keys and values on the device: a `Handle` of the engine that took the pages."""

    pages: Pages
    length: int  # tokens; the last page may have free slots behind them
    page_bytes: int  # of one page in all layers
    is_finite: bool = True  # whether no value overflowed

    @property
    def num_bytes(self) -> int:
        """What it takes of the pool: its last page counts as a whole."""
        return len(self.pages) * self.page_bytes


class Pool:
    """The pages 0 … `num_pages` − 1. Thread-safe."""

    def __init__(self, num_pages: int, page_tokens: int = PAGE_TOKENS) -> None:
        self.num_pages, self.page_tokens = num_pages, page_tokens
        self._free = list(reversed(range(num_pages)))  # what came back last goes first: a GPU may still have it cached
        self._returned: deque[tuple[int, ...]] = deque()  # by handles that died, and not yet among those that are free
        self.fork_lock = threading.Lock()
        forks.watch(self)

    def after_fork(self) -> None:
        """The numbers stay as they are; the device is the parent's alone."""
        self.fork_lock = threading.Lock()

    @property
    def num_free(self) -> int:
        """Pages that nothing holds."""
        with self.fork_lock:
            self._collect()
            return len(self._free)

    def pages_for(self, num_tokens: int) -> int:
        """Pages that so many tokens need."""
        return -(-num_tokens // self.page_tokens)

    def take(self, num_pages: int) -> Pages | None:
        """So many free pages, or None where there are fewer. None at all are an empty handle."""
        with self.fork_lock:
            self._collect()
            kept = len(self._free) - num_pages
            if kept < 0:
                return None
            numbers = tuple(reversed(self._free[kept:]))
            del self._free[kept:]
            return Pages(numbers, self._returned)

    def _collect(self) -> None:
        """Under the lock. Handles may die meanwhile: those are for the next time, or for this one."""
        while self._returned:
            self._free += reversed(self._returned.popleft())


def claim(pool: Pool, cache: Cache | None, num_pages: int) -> Pages:
    """So many pages, for which the cache lets go what is worth least, as long as that may help.

    What a schedule or a run still holds is forgotten by the cache, and its pages are free when that is done. Raises
    PoolFullError where too few are free even so: then runs have to be smaller, or others have to end first.
    """
    while (pages := pool.take(num_pages)) is None:
        if num_pages > pool.num_pages or cache is None or not cache.drop_least():
            raise PoolFullError(
                f"{num_pages} pages of {pool.page_tokens} tokens are needed, and the pool of {pool.num_pages} has "
                f"{pool.num_free} free: what runs or waits to be run holds the others."
            )
    return pages


def too_large(pool: Pool, num_tokens: int, num_pages: int, remedy: str, what: str = "a document") -> InputError:
    """What is wrong with something that fits into no pool of this size. `remedy`: "raise …, or lower max_length"."""
    return InputError(
        f"{what} of {num_tokens:,} tokens needs {num_pages} pages of {pool.page_tokens} tokens, and the pool has "
        f"{pool.num_pages}: {remedy}."
    )
