"""No page is ever in two hands and none is lost, whoever takes, keeps, drops and releases them, in whatever order."""

import copy
import gc
import pickle
import random
import threading
import time
from collections.abc import Callable, Iterable
from typing import Any, Final

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from m0kit.errors import InputError, M0kitError, PoolFullError
from m0kit.keeping.cache import Cache
from m0kit.keeping.pages import Pages, PageState, Pool, claim, too_large

NUM_PAGES, PAGE_BYTES, NUM_SCHEDULES, NUM_DOCUMENTS = 24, 10, 3, 12
CACHE: Final = "the cache"
HANGS_S = 60.0  # for what would wait for ever where a destructor takes a lock


class Model:
    """What every page is held by, written down once more; a page that nobody holds is free."""

    def __init__(self) -> None:
        self.holders: dict[int, set[object]] = {page: set() for page in range(NUM_PAGES)}

    def free(self) -> set[int]:
        return {page for page, holders in self.holders.items() if not holders}

    def hold(self, pages: Iterable[int], holder: object) -> None:
        for page in pages:
            self.holders[page].add(holder)

    def release(self, holder: object) -> None:
        for holders in self.holders.values():
            holders.discard(holder)


class Work:
    """Schedules that share a pool and a cache do something at random, and the model says what must come of it."""

    def __init__(self, rng: random.Random, cache_bytes: int) -> None:
        self.rng, self.model = rng, Model()
        self.pool, self.cache = Pool(NUM_PAGES), Cache(cache_bytes)
        self.states: dict[tuple[int, int], PageState] = {}  # that schedules hold, by a number of their own
        self.kept: dict[int, tuple[int, ...]] = {}  # the pages of what the cache holds, by key
        self.serial = 0
        self.refused = self.dropped = 0

    def step(self) -> None:
        """One operation of one schedule."""
        schedule = self.rng.randrange(NUM_SCHEDULES)
        operations = (self.take, self.claim, self.put, self.get, self.release, self.drop)
        self.rng.choices(operations, (2, 4, 6, 3, 8, 1))[0](schedule)
        assert self.pool.num_free == len(self.model.free())

    def take(self, schedule: int) -> None:
        num_pages = self.rng.randint(0, 6)
        pages = self.pool.take(num_pages)
        assert (pages is None) == (num_pages > len(self.model.free()))
        if pages is not None:
            self.hold(schedule, pages, num_pages)

    def claim(self, schedule: int) -> None:
        num_pages = self.rng.randint(0, 9) if self.rng.random() < 0.98 else NUM_PAGES + self.rng.randint(0, 1)
        before = len(self.model.free())
        kept = dict(self.kept)
        try:
            pages = claim(self.pool, self.cache, num_pages)
        except PoolFullError:
            self.refused += 1
            self.forget()
            assert num_pages > NUM_PAGES or not self.kept, "something could still go"
            assert num_pages > len(self.model.free())
            assert num_pages <= NUM_PAGES or len(kept) == len(self.kept), "dropped in vain"
            return
        gone = self.forget()
        self.dropped += len(gone)
        free = self.model.free()
        assert len(free) >= num_pages
        assert not gone or before < num_pages
        only = [[page for page in kept[key] if self.model.holders[page] == set()] for key in gone]
        assert not gone or min(len(free) - len(pages) for pages in only) < num_pages, "one went too many"
        self.hold(schedule, pages, num_pages)

    def hold(self, schedule: int, pages: Pages, num_pages: int) -> None:
        assert len(set(pages.numbers)) == len(pages) == num_pages
        assert set(pages.numbers) <= self.model.free(), "in two hands"
        self.add(schedule, PageState(pages, len(pages) * 128, PAGE_BYTES))

    def add(self, schedule: int, state: PageState) -> None:
        self.serial += 1
        self.states[schedule, self.serial] = state
        self.model.hold(state.pages.numbers, (schedule, self.serial))

    def put(self, schedule: int) -> None:
        """Into the cache, which may let others go, or not take it."""
        if own := self.own(schedule):
            key, state = self.rng.randrange(NUM_DOCUMENTS), self.states[self.rng.choice(own)]
            self.cache.put(key, state, num_bytes=state.num_bytes, cost=self.rng.randint(1, 99))
            if self.cache.peek(key) is state and key not in self.kept:
                self.kept[key] = state.pages.numbers
                self.model.hold(state.pages.numbers, (CACHE, key))
            self.forget()

    def get(self, schedule: int) -> None:
        key = self.rng.randrange(NUM_DOCUMENTS)
        state = self.cache.get(key)
        assert (state is not None) == (key in self.kept)
        if state is not None:
            assert state.pages.numbers == self.kept[key]
            self.add(schedule, state)

    def release(self, schedule: int) -> None:
        if own := self.own(schedule):
            place = self.rng.choice(own)
            if self.rng.random() < 0.02:  # what hangs in a ring is found by the collector
                ring: list[Any] = [self.states.pop(place)]
                ring.append(ring)
                del ring
                gc.collect(0)
            else:
                del self.states[place]
            self.model.release(place)

    def drop(self, _: int) -> None:
        assert self.cache.drop_least() == bool(self.kept)
        assert len(self.forget()) <= 1

    def own(self, schedule: int) -> list[tuple[int, int]]:
        return [place for place in self.states if place[0] == schedule]

    def forget(self) -> set[int]:
        """Follow what the cache let go. Returns the keys."""
        gone = self.kept.keys() - set(self.cache)
        for key in gone:
            del self.kept[key]
            self.model.release((CACHE, key))
        return gone

    def end(self) -> None:
        self.states.clear()
        while self.cache.drop_least():
            pass
        assert not self.cache.num_bytes
        assert self.pool.num_free == NUM_PAGES
        everything = self.pool.take(NUM_PAGES)
        assert everything is not None
        assert sorted(everything.numbers) == list(range(NUM_PAGES))


@given(st.randoms(use_true_random=False), st.integers(0, NUM_PAGES * PAGE_BYTES))
@settings(max_examples=60)
def test_a_page_is_free_or_in_one_hand(rng: random.Random, cache_bytes: int) -> None:
    work = Work(rng, cache_bytes)
    for _ in range(100):
        work.step()
    work.end()


@pytest.mark.broad
def test_a_hundred_thousand_steps_lose_no_page() -> None:
    work = Work(random.Random(7), NUM_PAGES * PAGE_BYTES)
    for _ in range(100_000):
        work.step()
    # It was full, and emptied, often enough to mean something.
    assert min(work.refused, work.dropped) > 1000
    work.end()


class Number(int):
    """A number of pages that lets other threads go on where it is subtracted from those that are free."""

    def __rsub__(self, other: int) -> int:
        time.sleep(0)
        return other - int(self)


def test_threads_share_a_pool_and_a_cache() -> None:
    pool, cache = Pool(40), Cache(40 * PAGE_BYTES)
    owners: dict[int, object] = {}
    start, failures = threading.Barrier(4), []

    def work(seed: int) -> None:
        rng = random.Random(seed)
        start.wait()
        try:
            for i in range(2000):
                num_pages = Number(rng.randint(0, 12))
                try:
                    pages = claim(pool, cache, num_pages)
                except PoolFullError:
                    continue
                assert len(set(pages.numbers)) == num_pages
                me = object()
                assert all(owners.setdefault(page, me) is me for page in pages.numbers), "in two hands"
                for page in pages.numbers:
                    del owners[page]
                if rng.random() < 0.5:
                    cache.put((seed, i), PageState(pages, 1, PAGE_BYTES), num_bytes=len(pages) * PAGE_BYTES, cost=1)
        except BaseException as error:  # of a thread: told below
            failures.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures, failures
    while cache.drop_least():
        pass
    assert pool.num_free == 40


# --- handles -------------------------------------------------------------------------------------------


def does_not_hang(work: Callable[[], object]) -> None:
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(HANGS_S)
    assert not thread.is_alive()


def test_handles_may_die_inside_a_call_of_the_pool_in_the_same_thread() -> None:
    """The collector runs where it likes."""
    pool = Pool(4)
    held = [pool.take(3)]

    def die() -> None:
        with pool.fork_lock:
            held.clear()

    does_not_hang(die)
    assert not held
    assert pool.num_free == 4


def test_a_forked_child_waits_for_no_thread_of_its_parent() -> None:
    pool = Pool(4)
    with pool.fork_lock:
        pool.after_fork()
        does_not_hang(lambda: pool.take(2))


def test_pages_that_came_back_last_go_first_and_in_order() -> None:
    pool = Pool(8)
    first, second = pool.take(3), pool.take(2)
    assert first is not None
    assert second is not None
    assert (first.numbers, second.numbers) == ((0, 1, 2), (3, 4))
    del first
    third = pool.take(4)
    assert third is not None
    assert third.numbers == (0, 1, 2, 5)


def test_a_handle_outlives_its_pool() -> None:
    pages = Pool(3).take(2)
    gc.collect(0)
    assert pages is not None
    assert pages.numbers == (0, 1)
    del pages


@pytest.mark.parametrize("again", [copy.copy, copy.deepcopy, pickle.dumps])
def test_a_handle_is_never_there_twice(again: Callable[[object], object]) -> None:
    pool = Pool(3)
    pages = pool.take(2)
    with pytest.raises(TypeError, match="not copied or pickled"):
        again(pages)
    del pages
    assert pool.num_free == 3


def test_a_state_takes_whole_pages() -> None:
    pool = Pool(8)
    assert [pool.pages_for(n) for n in (0, 1, 127, 128, 129, 770)] == [0, 1, 1, 1, 2, 7]
    state = PageState(claim(pool, None, pool.pages_for(770)), 770, 1 << 20)
    assert (state.num_bytes, state.is_finite) == (7 << 20, True)


# --- making room ---------------------------------------------------------------------------------------


def kept(pool: Pool, cache: Cache, key: str, num_pages: int, cost: float) -> None:
    state = PageState(claim(pool, cache, num_pages), num_pages * 128, PAGE_BYTES)
    cache.put(key, state, num_bytes=state.num_bytes, cost=cost)


def test_what_is_worth_least_goes_first_and_no_more_than_is_needed() -> None:
    pool, cache = Pool(10), Cache(10 * PAGE_BYTES)
    for key, cost in (("dear", 900), ("cheap", 100), ("middling", 500)):
        kept(pool, cache, key, 3, cost)
    claim(pool, cache, 1)
    assert set(cache) == {"dear", "cheap", "middling"}
    claim(pool, cache, 4)
    assert set(cache) == {"dear", "middling"}
    claim(pool, cache, 5)
    assert set(cache) == {"dear"}


def test_what_a_run_holds_stays_its_own_until_it_is_done() -> None:
    pool, cache = Pool(4), Cache(4 * PAGE_BYTES)
    kept(pool, cache, "read", 3, 1)
    held = cache.get("read")
    with pytest.raises(PoolFullError, match=r"^2 pages of 128 tokens are needed, and the pool of 4 has 1 free: "):
        claim(pool, cache, 2)
    assert len(cache) == 0
    assert held.pages.numbers == (0, 1, 2)
    del held
    assert set(claim(pool, cache, 4).numbers) == {0, 1, 2, 3}


def test_nothing_is_dropped_for_what_can_never_fit() -> None:
    pool, cache = Pool(4), Cache(4 * PAGE_BYTES)
    kept(pool, cache, "kept", 3, 1)
    with pytest.raises(PoolFullError):
        claim(pool, cache, 5)
    assert "kept" in cache


def test_a_pool_without_a_cache_gives_what_it_has() -> None:
    pool = Pool(2)
    pages = claim(pool, None, 2)
    with pytest.raises(M0kitError, match="the pool of 2 has 0 free"):
        claim(pool, None, 1)
    del pages
    assert len(claim(pool, None, 1)) == 1


def test_a_document_larger_than_the_pool_is_told_what_to_raise_or_lower() -> None:
    pool = Pool(64)
    error = too_large(pool, 9728, pool.pages_for(9728), "raise M0KIT_GPU_POOL_BYTES or pool_bytes, or lower max_length")
    assert type(error) is InputError
    assert str(error) == (
        "a document of 9,728 tokens needs 76 pages of 128 tokens, and the pool has 64: "
        "raise M0KIT_GPU_POOL_BYTES or pool_bytes, or lower max_length."
    )
    assert str(too_large(pool, 9740, 77, "…", "a prompt")).startswith("a prompt of 9,740 tokens needs 77 pages of 128")
