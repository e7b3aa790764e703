"""Which tokens of a run are in which pages, and who sees them: PagedAttention's tables. Pure integer work.

A run has *sequences*: rows of a document's prefix that earlier runs did not write, and the suffix of each pair. The
operator writes the keys of all rows of a run to their slots before it reads any, so a suffix may follow a prefix of
the same run. Each token of a document is in a page of the document's own, where no suffix may overwrite it:

- the first suffix that follows the whole prefix is written behind it: into the free slots of its last page, which
  nobody reads after this run, and into private pages after that;
- any other begins in a private page. Where it begins inside a page, that is a copy of the document's, made on the
  device before the run, so what is copied must have been written by an earlier run (`first_suffixes`);
- whole pages before that are shared by all.

Free slots and private pages are a run's own: one run at a time may be on a pool.

    part = PagedPart(770, [(770, 12), (769, 15)], state.pages.numbers, written=770)     # one document, two queries
    layout = layout_pages([part], take=lambda num_pages: claim(pool, cache, num_pages))

P tokens of a page, S sequences, M pages of a sequence, B pairs.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from m0kit.keeping.pages import PAGE_TOKENS, Pages

# Tables have a multiple of this many columns, so that runs of similar documents have tables of one width: a page image
# of the published size and its query need 7, the longest prompt 81. Empty columns cost four bytes a sequence.
TABLE_COLUMNS: Final = 8
# What stands in a table where there is no page: PagedAttention takes a negative number for none in all its kernels.
NO_PAGE: Final = -1


@dataclass(frozen=True, slots=True)
class PagedPart:
    """What a run has of one document: the rest of its prefix, and the suffixes of some pairs."""

    length: int  # tokens of the prefix once the run is done
    suffixes: Sequence[tuple[int, int]]  # how many tokens of the prefix it follows, its own tokens (at least one)
    pages: Sequence[int]  # the document's own, in order, for `length` tokens at least
    written: int = 0  # tokens of the prefix that earlier runs wrote; the others are rows of this one

    @property
    def num_rows(self) -> int:
        """Rows of the run."""
        return self.length - self.written + sum(rows for _, rows in self.suffixes)


@dataclass(frozen=True, slots=True)
class PagedLayout:
    """Tables of one decoder run. Its rows are, part by part, the new ones of the prefix and then its suffixes'.

    To be held until the run is done: with it go the private pages.
    """

    cumulative: NDArray[np.int32]  # (S + 1,) first row of each sequence, and the end; S may be 0: then nothing is run
    past: NDArray[np.int32]  # (S,) tokens before a sequence's rows, which are in its pages already or are this run's
    block_table: NDArray[np.int32]  # (S, M) its pages, then `NO_PAGE`
    metadata: NDArray[np.int32]  # (2,) most rows of a sequence, most tokens of one with its past
    last_index: NDArray[np.int64]  # (B,) row of each pair's last token
    copies: Sequence[tuple[int, int]]  # (from, to) pages to be copied on the device before the run
    private: Pages  # that suffixes were given for this run
    prefix_rows: Sequence[slice]  # for each part its prefix's rows, which are tokens `written` … `length`
    suffix_rows: Sequence[Sequence[slice]]  # for each part the rows of each suffix

    @property
    def num_tokens(self) -> int:
        """Rows of the run."""
        return int(self.cumulative[-1])


class Step(NamedTuple):
    """A part in one of the consecutive runs that it takes."""

    part: PagedPart
    indexes: Sequence[int]  # of its suffixes among those of the whole part


def private_pages(part: PagedPart, page_tokens: int = PAGE_TOKENS) -> int:
    """Pages that its suffixes take in one run, besides those of the document."""
    return sum(place.num_private for place in _places(part, page_tokens))


def first_suffixes(part: PagedPart, page_tokens: int = PAGE_TOKENS) -> list[int]:
    """Which of its suffixes, by index, may be in the run that writes the rest of its prefix: all where nothing is left.

    One may follow the whole prefix; others only what needs no copy, or what earlier runs wrote. The rest wait for the
    next run, in which all may be.
    """
    places = _places(part, page_tokens)
    return [
        i
        for i, ((used, _), place) in enumerate(zip(part.suffixes, places, strict=True))
        if not place.copies or used <= part.written
    ]


def split_part(part: PagedPart, max_rows: int, page_tokens: int = PAGE_TOKENS) -> list[Step]:
    """The consecutive runs in which a part is computed, each of `max_rows` rows at most or of one suffix alone.

    A longer prefix is written in chunks of `max_rows`, which depend on nothing but its length; suffixes come with the
    last chunk as far as they may (`first_suffixes`) and as they fit. Others' parts may be in the same runs. Where
    there is nothing to do there is no run.
    """
    steps = []
    written = part.written
    while part.length - written > max_rows:
        steps.append(Step(replace(part, length=written + max_rows, written=written, suffixes=()), []))
        written += max_rows
    left = list(range(len(part.suffixes)))
    while left or written < part.length:
        rest = replace(part, written=written, suffixes=[part.suffixes[i] for i in left])
        room = max_rows - (part.length - written)
        indexes: list[int] = []
        for i in [left[j] for j in first_suffixes(rest, page_tokens)]:
            rows = part.suffixes[i][1]
            if rows > room and (indexes or written < part.length):
                break
            indexes.append(i)
            room -= rows
        steps.append(Step(replace(rest, suffixes=[part.suffixes[i] for i in indexes]), indexes))
        left = [i for i in left if i not in indexes]
        written = part.length
    return steps


def layout_pages(
    parts: Sequence[PagedPart], take: Callable[[int], Pages], page_tokens: int = PAGE_TOKENS
) -> PagedLayout:
    """Tables for the parts of one run, each of another document, in that order.

    `take` is called once, with the number of private pages, before anything else; what it raises is raised. Suffixes
    must be such as `first_suffixes` allows.
    """
    owned = [page for part in parts for page in part.pages]
    assert len(owned) == len(set(owned)), "two parts have the same page, which both would write to"
    places_of = [_places(part, page_tokens) for part in parts]
    private = take(sum(place.num_private for places in places_of for place in places))
    fresh = iter(private.numbers)
    sequences: list[tuple[int, int, list[int]]] = []  # rows, past, pages
    copies: list[tuple[int, int]] = []
    last_index: list[int] = []
    prefix_rows: list[slice] = []
    suffix_rows: list[list[slice]] = []
    row = 0
    for part, places in zip(parts, places_of, strict=True):
        assert len(part.pages) * page_tokens >= part.length >= max((used for used, _ in part.suffixes), default=0)
        prefix_rows.append(slice(row, row + part.length - part.written))
        if part.written < part.length:
            needed = part.pages[: -(-part.length // page_tokens)]
            sequences.append((part.length - part.written, part.written, list(needed)))
            row += part.length - part.written
        suffix_rows.append([])
        for (used, rows), place in zip(part.suffixes, places, strict=True):
            own = [next(fresh) for _ in range(place.num_private)]
            if place.copies:
                assert used <= part.written, "what is copied before the run must have been written by an earlier one"
                copies.append((part.pages[place.num_shared], own[0]))
            sequences.append((rows, used, [*part.pages[: place.num_shared], *own]))
            suffix_rows[-1].append(slice(row, row + rows))
            row += rows
            last_index.append(row - 1)
    most = max((len(pages) for _, _, pages in sequences), default=0)
    width = most + -most % TABLE_COLUMNS
    table = [pages + [NO_PAGE] * (width - len(pages)) for _, _, pages in sequences]
    num_rows = np.asarray([rows for rows, _, _ in sequences], np.int32)
    past = np.asarray([before for _, before, _ in sequences], np.int32)
    return PagedLayout(
        cumulative=np.concatenate([[0], np.cumsum(num_rows)]).astype(np.int32),
        past=past,
        block_table=np.asarray(table, np.int32).reshape(len(sequences), width),
        metadata=np.asarray([num_rows.max(initial=0), (past + num_rows).max(initial=0)], np.int32),
        last_index=np.asarray(last_index, np.int64),
        copies=copies,
        private=private,
        prefix_rows=prefix_rows,
        suffix_rows=suffix_rows,
    )


class _Place(NamedTuple):
    """Where a suffix is written."""

    num_shared: int  # pages of the document that are its first ones
    num_private: int  # that come after those
    copies: bool  # whether the first private one begins as a copy of the document's next


def _places(part: PagedPart, page_tokens: int) -> list[_Place]:
    places = []
    behind = False  # whether the free slots behind the prefix are given away
    for used, rows in part.suffixes:
        num_pages = -(-(used + rows) // page_tokens)
        whole, inside = divmod(used, page_tokens)
        if used == part.length and not behind:
            behind = True
            shared, copies = -(-used // page_tokens), False
        else:
            shared, copies = whole, inside > 0
        places.append(_Place(shared, num_pages - shared, copies))
    return places
