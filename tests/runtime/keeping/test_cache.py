"""The cache keeps what was put, stays under its limit, and lets go what saves the least work per byte."""

import random
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from m0kit.keeping.cache import Cache, Once

KEYS = [f"key {i}" for i in range(12)]
LIMIT = 100


class Model(RuleBasedStateMachine):
    """Greedy-Dual-Size-Frequency written down once more, with a search of everything in place of a heap.

    An entry's rank is the age of the cache when it was last asked for plus uses × cost / bytes; the lowest
    goes, and the cache is then as old as its rank.
    """

    def __init__(self) -> None:
        super().__init__()
        self.cache = Cache(LIMIT)
        self.values: dict[str, tuple[object, int, float, int]] = {}  # value, bytes, cost, uses
        self.ranks: dict[str, float] = {}
        self.age = 0.0
        self.hits = self.misses = self.dropped = 0

    def place(self, key: str) -> None:
        _, num_bytes, cost, uses = self.values[key]
        self.ranks[key] = self.age + uses * cost / max(num_bytes, 1)

    @rule(key=st.sampled_from(KEYS), num_bytes=st.integers(0, 60), cost=st.integers(0, 50))
    def put(self, key: str, num_bytes: int, cost: float) -> None:
        value = object()
        self.cache.put(key, value, num_bytes=num_bytes, cost=cost)
        if key in self.values:
            return
        self.values[key] = value, num_bytes, cost, 1
        self.place(key)
        gone = self.values.keys() - set(self.cache)
        if gone:
            left = [rank for known, rank in self.ranks.items() if known not in gone]
            last = max(self.ranks[known] for known in gone)
            assert not left or last <= min(left), "what went was worth more than what stayed"
            kept = sum(entry[1] for known, entry in self.values.items() if known not in gone)
            spared = [kept + self.values[known][1] for known in gone if self.ranks[known] == last]
            assert max(spared) > LIMIT, "one went too many"
            self.age = last
            self.dropped += len(gone)
        for known in gone:
            del self.values[known], self.ranks[known]

    @rule(key=st.sampled_from(KEYS), num_bytes=st.integers(LIMIT + 1, 10**12))
    def put_too_large(self, key: str, num_bytes: int) -> None:
        before = len(self.cache)
        self.cache.put(key, object(), num_bytes=num_bytes, cost=1e9)
        assert len(self.cache) == before

    @rule(key=st.sampled_from(KEYS), times=st.integers(1, 40))
    def get(self, key: str, times: int) -> None:
        for _ in range(times):
            seen = self.cache.get(key)
            if key in self.values:
                value, num_bytes, cost, uses = self.values[key]
                assert seen is value
                self.values[key] = value, num_bytes, cost, uses + 1
                self.place(key)
                self.hits += 1
            else:
                assert seen is None
                self.misses += 1

    @rule()
    def drop_least(self) -> None:
        assert self.cache.drop_least() == bool(self.values)
        gone = self.values.keys() - set(self.cache)
        assert len(gone) == bool(self.values)
        for known in gone:
            self.age = self.ranks.pop(known)
            assert self.age <= min(self.ranks.values(), default=self.age), "what went was worth more than what stayed"
            del self.values[known]
            self.dropped += 1

    @invariant()
    def it_holds_what_it_should_and_no_more_than_its_limit(self) -> None:
        assert set(self.cache) == self.values.keys()
        assert len(self.cache) == len(self.values)
        assert self.cache.num_bytes == sum(entry[1] for entry in self.values.values()) <= LIMIT
        assert (self.cache.hits, self.cache.misses, self.cache.dropped) == (self.hits, self.misses, self.dropped)

    @invariant()
    def what_it_notes_does_not_grow_with_the_number_of_questions(self) -> None:
        assert len(self.cache.order) <= 4 * len(KEYS) + 64


Model.TestCase.settings = settings(max_examples=150, stateful_step_count=60)
TestModel = Model.TestCase


def fill(cache: Cache, count: int, num_bytes: int = 10, cost: float = 1.0, name: str = "filler") -> None:
    for i in range(count):
        cache.put((name, i), i, num_bytes=num_bytes, cost=cost)


def test_what_costs_much_per_byte_outlives_what_is_large_and_cheap() -> None:
    cache = Cache(100)
    cache.put("small and costly", 1, num_bytes=5, cost=50)
    cache.put("large and cheap", 2, num_bytes=60, cost=6)
    fill(cache, 8, cost=2)
    assert cache.get("small and costly") == 1
    assert cache.get("large and cheap") is None


def test_what_is_asked_for_often_outlives_what_came_later() -> None:
    """The least recently used one would go here."""
    cache = Cache(100)
    cache.put("frequent", 1, num_bytes=10, cost=1)
    for _ in range(20):
        cache.get("frequent")
    fill(cache, 50)
    assert cache.get("frequent") == 1
    assert cache.dropped == 41


def test_what_was_asked_for_often_long_ago_goes_in_the_end() -> None:
    cache = Cache(100)
    cache.put("was frequent", 1, num_bytes=10, cost=1)
    for _ in range(20):
        cache.get("was frequent")
    fill(cache, 1000)
    assert cache.get("was frequent") is None


def test_of_equals_the_one_that_came_first_goes_first() -> None:
    cache = Cache(100)
    fill(cache, 13)
    assert [cache.get(("filler", i)) for i in range(13)] == [None] * 3 + list(range(3, 13))


def test_a_second_value_under_a_key_does_not_replace_the_first() -> None:
    cache = Cache(100)
    cache.put("a", 1, num_bytes=10, cost=1)
    cache.put("a", 2, num_bytes=90, cost=9)
    assert (cache.get("a"), cache.num_bytes, len(cache)) == (1, 10, 1)


def test_a_value_as_large_as_the_limit_is_kept_alone() -> None:
    cache = Cache(100)
    fill(cache, 5)
    cache.put("all", 1, num_bytes=100, cost=1000)
    assert (len(cache), cache.num_bytes, cache.get("all")) == (1, 100, 1)


@dataclass(frozen=True)
class Key:
    """A key that lets other threads go on wherever it is looked up."""

    number: int

    def __hash__(self) -> int:
        time.sleep(0)
        return hash(self.number)


def test_threads_share_a_cache() -> None:
    cache = Cache(400)
    start, failures = threading.Barrier(4), []
    num_gets = 2000

    def work() -> None:
        start.wait()
        try:
            for i in range(num_gets):  # all put the same at about the same time
                key = Key((i * 7 + i // 50) % 60)
                value: Any = cache.get(key)
                assert value in (None, ("value of", key.number))
                cache.put(key, ("value of", key.number), num_bytes=10 + key.number % 7, cost=key.number)
        except BaseException as error:  # of a thread: told below
            failures.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures, failures
    assert cache.hits + cache.misses == 4 * num_gets
    assert cache.num_bytes == sum(10 + key.number % 7 for key in cache) <= 400
    assert all(cache.get(key) == ("value of", key.number) for key in list(cache))


# --- computed once ---------------------------------------------------------------------------------------


def together(*works: Callable[[], Any]) -> list[Any]:
    """What works in threads of their own return."""
    with ThreadPoolExecutor(len(works)) as pool:
        return [done.result() for done in [pool.submit(work) for work in works]]


class Wanting:
    """Four threads that want the same values; the first to compute does not end before all have asked."""

    def __init__(self, failure: BaseException | None = None) -> None:
        self.once, self.failure = Once(), failure
        self.kept: dict[str, str] = {}
        self.computed: list[list[str]] = []
        self._asked = threading.Semaphore(0)

    def compute(self, keys: list[str]) -> list[str]:
        self.computed.append(keys)
        if len(self.computed) == 1:
            for _ in range(4):
                self._asked.acquire()
            if self.failure:
                raise self.failure
        self.kept |= {key: key.upper() for key in keys}
        return [self.kept[key] for key in keys]

    def work(self) -> Any:
        self._asked.release()
        try:
            return self.once.get(["a", "b", "a"], self.kept.get, self.compute)
        except BaseException as error:
            return error


def test_what_several_threads_want_is_computed_by_one() -> None:
    wanting = Wanting()
    assert together(*[wanting.work] * 4) == [["A", "B", "A"]] * 4
    assert wanting.computed == [["a", "b"]]
    assert len(wanting.once) == 0


@pytest.mark.parametrize("failure", [ValueError("mine"), KeyboardInterrupt("mine")], ids=repr)
def test_what_fails_fails_for_its_own_thread_alone(failure: BaseException) -> None:
    wanting = Wanting(failure)
    outcomes = together(*[wanting.work] * 4)
    assert outcomes.count(failure) == 1
    assert outcomes.count(["A", "B", "A"]) == 3
    assert wanting.computed == [["a", "b"]] * 2
    assert len(wanting.once) == 0


def test_what_landed_meanwhile_is_not_computed_again() -> None:
    assert Once().get(["a"], lambda key: key.upper(), lambda _: pytest.fail("computed")) == ["A"]


def test_threads_that_want_each_others_values_never_wait_in_a_ring() -> None:
    once, cache = Once(), Cache(1 << 20)
    keys = [f"k{i}" for i in range(12)]

    def compute(some: list[str]) -> list[str]:
        values = [key.upper() for key in some]
        for key, value in zip(some, values, strict=True):
            cache.put(key, value, num_bytes=1, cost=1)
        return values

    def work(seed: int) -> Callable[[], bool]:
        def run() -> bool:
            rng = random.Random(seed)
            for _ in range(300):
                some = rng.sample(keys, rng.randint(1, 12))
                if rng.random() < 0.2:
                    cache.__init__(1 << 20)  # type: ignore[misc]
                if once.get(some, cache.peek, compute) != [key.upper() for key in some]:
                    return False
            return True

        return run

    assert together(*map(work, range(6))) == [True] * 6
    assert len(once) == 0
