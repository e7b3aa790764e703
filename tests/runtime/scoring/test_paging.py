"""On a device that does as the tables say, every row sees its document and its own tokens, and no document changes."""

import random
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from itertools import zip_longest
from typing import Any, Final

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from m0kit.errors import PoolFullError
from m0kit.keeping.cache import Cache
from m0kit.keeping.pages import Pages, PageState, Pool, claim
from m0kit.scoring.paging import (
    NO_PAGE,
    TABLE_COLUMNS,
    PagedLayout,
    PagedPart,
    first_suffixes,
    layout_pages,
    private_pages,
    split_part,
)

Int64 = NDArray[np.int64]
Suffixes = Sequence[tuple[int, int]]

GARBAGE: Final = -7  # where no token that anybody may see was written
SMALL: Final = 4  # tokens of a page, so that few tokens cross many
LENGTHS: Final = (0, 1, 3, 4, 5, 8, 9, 14, 16, 27)  # of documents: pages that are empty, full, and anything between


class Device:
    """Pages whose slots hold the identities of tokens, and what PagedAttention does with them."""

    def __init__(self, num_pages: int, page_tokens: int) -> None:
        self.memory = np.full((num_pages, page_tokens), GARBAGE, np.int64)

    def run(self, layout: PagedLayout, tokens: Int64) -> list[Int64]:
        """Write all new tokens, then return for each row what it sees, in order."""
        pages_of, ends = layout.block_table, layout.past + np.diff(layout.cumulative)
        self._check(layout, len(tokens), ends)
        for source, target in layout.copies:
            self.memory[target] = self.memory[source]
        page_tokens = self.memory.shape[1]
        places = [np.arange(past, end) for past, end in zip(layout.past, ends, strict=True)]
        pages = [row[place // page_tokens] for row, place in zip(pages_of, places, strict=True)]
        if places:
            page, slot = np.concatenate(pages), np.concatenate(places) % page_tokens
            assert (page >= 0).all(), "a token has no page"
            assert len({*zip(page.tolist(), slot.tolist(), strict=True)}) == len(tokens), "two tokens in one place"
            self.memory[page, slot] = tokens
        seen = []
        for row, past, end in zip(pages_of, layout.past, ends, strict=True):
            needed = row[: -(-end // page_tokens)]
            assert (needed >= 0).all(), "a page is missing"
            assert (row[len(needed) :] == NO_PAGE).all(), "more pages than it has tokens for"
            keys = self.memory[needed].reshape(-1)
            seen += [keys[: i + 1] for i in range(past, end)]
        self.memory[list(layout.private.numbers)] = GARBAGE  # nobody may need them any more
        return seen

    def _check(self, layout: PagedLayout, num_tokens: int, ends: Any) -> None:
        num_sequences = len(layout.past)
        tables = (layout.cumulative, layout.past, layout.block_table, layout.metadata)
        assert all(table.dtype == np.int32 for table in tables)
        assert layout.last_index.dtype == np.int64
        assert layout.cumulative.shape == (num_sequences + 1,)
        assert layout.block_table.shape[0] == num_sequences
        assert layout.block_table.shape[1] % TABLE_COLUMNS == 0
        num_new = np.diff(layout.cumulative)
        assert (num_new > 0).all()
        assert (layout.cumulative[0], layout.cumulative[-1]) == (0, num_tokens)
        assert layout.num_tokens == num_tokens
        assert layout.metadata.tolist() == [max(num_new, default=0), max(ends, default=0)]
        targets = [target for _, target in layout.copies]
        assert len({*targets}) == len(targets)
        assert {*targets} <= {*layout.private.numbers}


class Engine:
    """What an engine on a device does with its pool: keeps documents, computes what is missing, in few runs."""

    def __init__(self, texts: Sequence[Int64], *, num_pages: int, page_tokens: int, max_rows: int) -> None:
        self.texts, self.page_tokens, self.max_rows = texts, page_tokens, max_rows
        self.pool, self.cache = Pool(num_pages, page_tokens), Cache(num_pages)
        self.device = Device(num_pages, page_tokens)
        self.held: list[tuple[int, PageState]] = []  # by schedules, whatever becomes of them in the cache
        self.num_runs = self.num_refused = 0
        self._next_token = 1_000_000

    def call(self, wanted: Sequence[tuple[int, Suffixes]]) -> None:
        """Score suffixes of documents, and check all that comes of it; where the pool is too small, nothing does."""
        try:
            self._call(wanted)
        except PoolFullError:
            self.num_refused += 1
        self.check_kept()

    def _call(self, wanted: Sequence[tuple[int, Suffixes]]) -> None:
        states = [(document, self.cache.get(document)) for document, _ in wanted]
        steps = []
        for i, (document, suffixes) in enumerate(wanted):
            length = len(self.texts[document])
            written = 0 if states[i][1] is None else length
            if states[i][1] is None:
                pages = claim(self.pool, self.cache, self.pool.pages_for(length))
                states[i] = document, PageState(pages, length, 1)
            part = PagedPart(length, suffixes, states[i][1].pages.numbers, written)
            steps.append([(document, *step) for step in split_part(part, self.max_rows, self.page_tokens)])
            assert sorted(i for _, _, indexes in steps[-1] for i in indexes) == list(range(len(suffixes)))
        for together in zip_longest(*steps):
            self.run([(document, part) for document, part, _ in filter(None, together)])
        for document, state in states:
            if state.num_bytes:
                self.cache.put(document, state, num_bytes=state.num_bytes, cost=state.length)

    def run(self, parts: Sequence[tuple[int, PagedPart]]) -> None:
        """One run, of which every row must see what it should."""
        self.num_runs += 1
        take = partial(claim, self.pool, self.cache)
        layout = layout_pages([part for _, part in parts], take, self.page_tokens)
        assert len(layout.private) == sum(private_pages(part, self.page_tokens) for _, part in parts)
        tokens, wanted, last = [], [], []
        rows = []
        for i, (document, part) in enumerate(parts):
            text = self.texts[document]
            tokens.append(text[part.written : part.length])
            wanted += [text[: place + 1] for place in range(part.written, part.length)]
            rows.append(layout.prefix_rows[i])
            for (used, num_rows), own_rows in zip(part.suffixes, layout.suffix_rows[i], strict=True):
                own = np.arange(self._next_token, self._next_token + num_rows)
                self._next_token += num_rows
                tokens.append(own)
                wanted += [np.concatenate([text[:used], own[: place + 1]]) for place in range(num_rows)]
                last.append(len(wanted) - 1)
                rows.append(own_rows)
        packed = np.concatenate([np.zeros(0, np.int64), *tokens])
        assert [row for some in rows for row in range(some.start, some.stop)] == list(range(len(packed)))
        seen = self.device.run(layout, packed)
        assert layout.last_index.tolist() == last
        for found, should in zip(seen, wanted, strict=True):
            np.testing.assert_array_equal(found, should)
        self.check_kept()

    def check_kept(self) -> None:
        """All that is kept or held is still there, token by token."""
        for document, state in [*((key, self.cache.peek(key)) for key in self.cache), *self.held]:
            there = self.device.memory[list(state.pages.numbers)].reshape(-1)[: state.length]
            np.testing.assert_array_equal(there, self.texts[document])

    def hold(self, document: int) -> None:
        if (state := self.cache.peek(document)) is not None:
            self.held.append((document, state))

    def end(self) -> None:
        self.held.clear()
        while self.cache.drop_least():
            pass
        assert self.pool.num_free == self.pool.num_pages


def texts(lengths: Sequence[int]) -> list[Int64]:
    """A document of each length, no token of which is in another."""
    return [np.arange(length) + 10_000 * i for i, length in enumerate(lengths)]


# --- a device that follows the tables ----------------------------------------------------------------------


@st.composite
def some_part(draw: st.DrawFn, document: int) -> tuple[int, Suffixes]:
    """Any share of the prefix may be used, the whole of it most often."""
    length = LENGTHS[document]
    used = st.one_of(st.just(length), st.integers(0, length))
    return document, draw(st.lists(st.tuples(used, st.integers(1, 9)), max_size=4))


@st.composite
def some_call(draw: st.DrawFn) -> list[tuple[int, Suffixes]]:
    documents = draw(st.lists(st.integers(0, len(LENGTHS) - 1), min_size=1, max_size=4, unique=True))
    return [draw(some_part(document)) for document in documents]


operations = st.lists(
    st.one_of(
        some_call().map(lambda call: ("call", call)),
        st.integers(0, len(LENGTHS) - 1).map(lambda document: ("hold", document)),
        st.just(("release", None)),
        st.just(("drop", None)),
    ),
    min_size=1,
    max_size=12,
)


@given(operations, st.integers(8, 40), st.integers(1, 40))
@example([("call", [(6, [(9, 2), (9, 3), (5, 7), (4, 1), (8, 1)])])] * 2, 20, 40)
@settings(max_examples=300)
def test_every_row_sees_its_document_and_its_own_tokens(
    operations: list[tuple[str, Any]], num_pages: int, max_rows: int
) -> None:
    engine = Engine(texts(LENGTHS), num_pages=num_pages, page_tokens=SMALL, max_rows=max_rows)
    for name, what in operations:
        if name == "call":
            engine.call(what)
        elif name == "hold":
            engine.hold(what)
        elif name == "release":
            del engine.held[:1]
        else:
            engine.cache.drop_least()
    engine.end()


@pytest.mark.parametrize("page_tokens", [SMALL, 128])
def test_documents_stay_whole_among_hundreds_of_calls(page_tokens: int) -> None:
    rng = random.Random(page_tokens)
    scale = page_tokens // SMALL
    lengths = [length * scale + rng.randrange(scale) for length in (*LENGTHS, *LENGTHS)]
    engine = Engine(texts(lengths), num_pages=50, page_tokens=page_tokens, max_rows=12 * scale)
    for _ in range(150):
        call = []
        for document in rng.sample(range(len(lengths)), rng.randint(1, 5)):
            length = lengths[document]
            used = [length if rng.random() < 0.6 else rng.randint(0, length) for _ in range(rng.randint(0, 4))]
            call.append((document, [(one, rng.randint(1, 3 * scale)) for one in used]))
        engine.call(call)
        engine.hold(rng.randrange(len(lengths)))
        if rng.random() < 0.9 or len(engine.held) > 4:
            del engine.held[: rng.randint(1, 2)]
    # Most calls were done, in some more runs, and some documents had to go for them.
    assert engine.num_refused < 50
    assert engine.num_runs > 200
    assert engine.cache.dropped > 50
    engine.end()


# --- where suffixes go -------------------------------------------------------------------------------------


def laid_out(parts: Sequence[PagedPart], first_private: int = 100) -> PagedLayout:
    """With private pages from a number on, which are asked for once."""
    pool = Pool(first_private + 100, SMALL)
    held = pool.take(first_private)
    asked: list[int] = []

    def take(num_pages: int) -> Pages:
        asked.append(num_pages)
        return claim(pool, None, num_pages)

    layout = layout_pages(parts, take, SMALL)
    assert held is not None
    assert asked == [len(layout.private)]
    return layout


def table(layout: PagedLayout) -> list[list[int]]:
    return [[page for page in row if page != NO_PAGE] for row in layout.block_table.tolist()]


def test_a_new_document_and_its_query_are_two_sequences_on_the_same_pages() -> None:
    layout = laid_out([PagedPart(6, [(6, 2)], (7, 3))])
    assert (layout.cumulative.tolist(), layout.past.tolist()) == ([0, 6, 8], [0, 6])
    assert table(layout) == [[7, 3], [7, 3]]  # the free slots behind the prefix are enough
    assert (layout.metadata.tolist(), layout.last_index.tolist()) == ([6, 8], [7])
    assert (layout.copies, layout.private.numbers) == ([], ())
    assert (layout.prefix_rows, layout.suffix_rows) == ([slice(0, 6)], [[slice(6, 8)]])


def test_of_queries_on_a_kept_document_one_goes_behind_it_and_others_into_copies_of_its_last_page() -> None:
    layout = laid_out([PagedPart(6, [(6, 3), (6, 1), (6, 7)], (7, 3), written=6)])
    assert (layout.cumulative.tolist(), layout.past.tolist()) == ([0, 3, 4, 11], [6, 6, 6])
    assert table(layout) == [[7, 3, 100], [7, 101], [7, 102, 103, 104]]
    assert layout.copies == [(3, 101), (3, 102)]
    assert layout.metadata.tolist() == [7, 13]


def test_a_query_on_a_part_of_a_document_never_writes_to_its_pages() -> None:
    layout = laid_out([PagedPart(6, [(5, 1), (6, 1), (3, 4), (4, 1), (0, 1)], (7, 3), written=6)])
    assert table(layout) == [[7, 100], [7, 3], [101, 102], [7, 103], [104]]
    assert layout.copies == [(3, 100), (7, 101)]  # at 4 and 0 a page begins: there is nothing to be copied


def test_behind_whole_pages_nothing_is_copied() -> None:
    layout = laid_out([PagedPart(8, [(8, 1), (8, 5)], (7, 3), written=8)])
    assert table(layout) == [[7, 3, 100], [7, 3, 101, 102]]
    assert layout.copies == []


def test_documents_without_queries_are_written_and_kept_ones_have_no_rows() -> None:
    layout = laid_out([PagedPart(5, [], (1, 2)), PagedPart(4, [], (3,), written=4), PagedPart(3, [(3, 1)], (4,), 3)])
    assert (layout.cumulative.tolist(), layout.past.tolist()) == ([0, 5, 6], [0, 3])
    assert table(layout) == [[1, 2], [4]]
    assert layout.prefix_rows == [slice(0, 5), slice(5, 5), slice(5, 5)]
    assert layout.suffix_rows == [[], [], [slice(5, 6)]]


@pytest.mark.parametrize("parts", [[], [PagedPart(4, [], (3,), written=4)]])
def test_a_run_of_nothing_has_empty_tables(parts: list[PagedPart]) -> None:
    layout = laid_out(parts)
    assert layout.num_tokens == 0
    assert (layout.cumulative.shape, layout.past.shape) == ((1,), (0,))
    assert (layout.block_table.shape, layout.last_index.shape) == ((0, 0), (0,))
    assert layout.metadata.tolist() == [0, 0]


@pytest.mark.parametrize(("num_pages", "width"), [(1, 8), (7, 8), (8, 8), (9, 16), (81, 88)])
def test_tables_have_few_widths(num_pages: int, width: int) -> None:
    layout = laid_out([PagedPart(num_pages * SMALL, [], range(num_pages))])
    assert layout.block_table.shape == (1, width)
    assert layout.block_table[0, num_pages:].tolist() == [NO_PAGE] * (width - num_pages)


def test_what_the_pool_raises_is_raised_and_nothing_is_taken() -> None:
    pool = Pool(3, SMALL)
    pages = claim(pool, None, 2)
    part = PagedPart(6, [(6, 1), (6, 9)], pages.numbers, written=6)
    with pytest.raises(PoolFullError):
        layout_pages([part], partial(claim, pool, None), SMALL)
    assert pool.num_free == 1


# --- which may be in a run ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("written", "first"),
    [
        (0, [1, 3, 5]),  # the one behind the prefix, and those that begin a page
        (4, [1, 3, 5, 6]),  # what is copied for 3 was written by an earlier run
        (5, [0, 1, 3, 5, 6]),
        (6, [0, 1, 2, 3, 4, 5, 6]),
    ],
)
def test_with_the_rest_of_a_prefix_go_suffixes_that_need_no_copy_of_it(written: int, first: list[int]) -> None:
    suffixes = [(5, 1), (6, 1), (6, 1), (4, 2), (6, 2), (0, 9), (3, 1)]
    part = PagedPart(6, suffixes, (7, 3), written)
    assert first_suffixes(part, SMALL) == first
    laid_out([replace(part, suffixes=[suffixes[i] for i in first])])
    for other in {*range(len(suffixes))} - {*first}:
        with pytest.raises(AssertionError, match="written by an earlier one"):
            laid_out([replace(part, suffixes=[suffixes[i] for i in (*first, other)])])


def test_two_parts_of_one_document_are_not_in_one_run() -> None:
    part = PagedPart(6, [(6, 1)], (7, 3), written=6)
    with pytest.raises(AssertionError, match="the same page"):
        laid_out([part, part])


@st.composite
def some_unwritten(draw: st.DrawFn) -> PagedPart:
    length = draw(st.integers(0, 60))
    used = st.one_of(st.just(length), st.integers(0, length))
    suffixes = draw(st.lists(st.tuples(used, st.integers(1, 20)), max_size=6))
    return PagedPart(length, suffixes, range(-(-length // SMALL)), draw(st.sampled_from([0, length])))


@given(some_unwritten(), st.integers(1, 80))
def test_a_part_is_split_into_runs_of_few_rows_each_written_before_it_is_needed(part: PagedPart, max_rows: int) -> None:
    steps = split_part(part, max_rows, SMALL)
    written = part.written
    for i, (step, indexes) in enumerate(steps):
        assert step.num_rows > 0
        assert step.num_rows <= max_rows or (len(indexes) == 1 and step.written == part.length)
        assert step.written == written
        assert step.length == part.length if step.suffixes else step.length > written or i > 0
        assert [part.suffixes[j] for j in indexes] == list(step.suffixes)
        laid_out([step])  # refuses what may not be in this run
        written = step.length
    assert written == part.length
    assert sorted(j for _, indexes in steps for j in indexes) == list(range(len(part.suffixes)))


@given(some_unwritten())
def test_where_there_is_room_two_runs_are_enough(part: PagedPart) -> None:
    steps = split_part(part, 10_000, SMALL)
    needed = bool(part.num_rows) + (len(first_suffixes(part, SMALL)) < len(part.suffixes))
    assert len(steps) == needed
    if steps:
        assert list(steps[0].indexes) == first_suffixes(part, SMALL)


@given(some_unwritten(), some_unwritten(), st.integers(1, 80))
def test_chunks_depend_on_the_documents_length_alone(part: PagedPart, other: PagedPart, max_rows: int) -> None:
    others = [(min(used, part.length), rows) for used, rows in other.suffixes]

    def chunks(suffixes: Suffixes) -> list[tuple[int, int]]:
        steps = split_part(replace(part, suffixes=suffixes), max_rows, SMALL)
        return [(step.written, step.length) for step, _ in steps if step.written < step.length]

    assert chunks(part.suffixes) == chunks(others) == chunks([])
    assert all(end - start == max_rows for start, end in chunks([])[:-1])
