"""Pages of large type to read, with a label for every visual token.

Owns the layout, the looks (fonts and misalignment) and the grading of pages. Of one seed they are the same to the
pixel on every machine: letters are those of `letters`.

    page = draw_page(random.Random(3), rows=[(0, 5), (7, 2)], language="en", look=2)
    page.image                     # PIL, mode "L", 280×112

A page has two or three lines, an adjective and a noun each. A query asks for one pair; a page that has both
words, but not with each other, is the near miss. A typewriter's letter is one patch (14 pixels) wide in
looks 0 to 2, so that the first lesson shows the encoder the same patch for the same letter.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from m0kit_parity.small import corpus
from m0kit_parity.small.letters import PIXEL, SIZES, TYPEWRITER, face

WIDTH: Final = 280  # 10 visual tokens
HEIGHT: Final = 112  # 4 visual tokens
TOKEN: Final = 28  # pixels per visual token and side
PAGE_LANGUAGES: Final = ("en", "de")

_LOOKS: Final[tuple[tuple[str, ...], ...]] = (
    ("DejaVuSansMono",),
    ("DejaVuSansMono",),
    ("DejaVuSansMono", "DejaVuSansMono-Bold"),
    ("DejaVuSansMono", "DejaVuSansMono-Bold", "DejaVuSans", "DejaVuSans-Bold", "DejaVuSerif"),
)

Pair = tuple[int, int]  # adjective, noun


@dataclass(frozen=True, slots=True)
class Page:
    """A drawn page. labels: (4, 10) ints, what stands at the centre of each visual token: index into
    `vocabulary()`, or −1 for paper."""

    image: Image.Image
    labels: NDArray[np.int64]

    @property
    def pixels(self) -> NDArray[np.uint8]:
        """(112, 280) grey levels."""
        return np.asarray(self.image)


def page_word(kind: corpus.Slot, row: int, language: str) -> str:
    """The word as it stands on a page: nouns without their article."""
    return corpus.word(kind, row, language).split()[-1]


@cache
def vocabulary() -> tuple[str, ...]:
    """Every word that stands on pages: adjectives and nouns, English and German; `warm` only once."""
    words = [
        word
        for language in PAGE_LANGUAGES
        for word in (
            *(page_word(0, row, language) for row in range(len(corpus.ADJECTIVES))),
            *(page_word(1, row, language) for row in range(len(corpus.NOUNS))),
        )
    ]
    return tuple(dict.fromkeys(words))


@cache
def _index() -> dict[str, int]:
    return {text: i for i, text in enumerate(vocabulary())}


def draw_page(rng: random.Random, rows: Sequence[Pair], language: str, look: int) -> Page:
    """Draw pairs as lines of text.

    look 0: letters sit exactly on the patch grid. 1: the whole page is shifted by up to three pixels. 2: each
    line by any amount, two weights. 3: proportional fonts too, in several sizes.
    """
    pixels = np.full((HEIGHT, WIDTH), 255, np.uint8)
    labels = np.full((HEIGHT // TOKEN, WIDTH // TOKEN), -1, dtype=np.int64)
    font = rng.choice(_LOOKS[look])
    letters = face(font, TYPEWRITER if "Mono" in font else rng.choice(SIZES))
    shift = (0, 0) if look == 0 else (rng.randint(0, 3), rng.randint(-3, 3))
    lines = sorted(rng.sample(range(HEIGHT // TOKEN), len(rows)))
    space = letters.widths[" "]
    for line, (adjective, noun) in zip(lines, rows, strict=True):
        words = [page_word(0, adjective, language), page_word(1, noun, language)]
        widths = [letters.widths[text] for text in words]
        room = max(0, (WIDTH * PIXEL - sum(widths) - space) // (14 * PIXEL) - 1)
        x = 14 * rng.randint(0, min(room, 6)) + shift[0]
        baseline = line * TOKEN + 21 + shift[1]
        if look >= 2:
            x, baseline = x + rng.randint(0, 10), line * TOKEN + 21 + rng.randint(-3, 4)
        pen = x * PIXEL
        for text, width in zip(words, widths, strict=True):
            letters.put(pixels, text, pen, baseline)
            row = min(max((baseline - 8) // TOKEN, 0), labels.shape[0] - 1)
            for column in range(labels.shape[1]):  # a token belongs to the word that covers most of it
                left, right = max(pen, column * TOKEN * PIXEL), min(pen + width, (column + 1) * TOKEN * PIXEL)
                if right - left >= TOKEN * PIXEL / 3:
                    labels[row, column] = _index()[text]
            pen += width + space
    return Page(Image.fromarray(pixels), labels)


@dataclass(frozen=True, slots=True)
class PageGroup:
    """Two queries over one set of pages. rows[i]: what stands on page i; relevance[q][i]: its grade for query q."""

    queries: tuple[str, str]
    rows: tuple[tuple[Pair, ...], ...]
    language: str
    relevance: tuple[tuple[int, ...], tuple[int, ...]]


def draw_pair(rng: random.Random, held_out: bool, adjective: int | None = None, noun: int | None = None) -> Pair:
    """A pair of the wanted split (corpus.pair_is_held_out)."""
    for attempt in range(600):
        free = attempt >= 300
        pair = (
            rng.randrange(len(corpus.ADJECTIVES)) if adjective is None or free else adjective,
            rng.randrange(len(corpus.NOUNS)) if noun is None or free else noun,
        )
        if corpus.pair_is_held_out(*pair) == held_out:
            return pair
    raise RuntimeError("no such pair")


def grade_page(target: Pair, rows: Sequence[Pair]) -> int:
    """3 for the pair in one line, 1 for both words in different lines, otherwise 0."""
    if target in rows:
        return corpus.FULL_MATCH
    both = any(a == target[0] for a, _ in rows) and any(n == target[1] for _, n in rows)
    return corpus.NEAR_MATCH if both else 0


def page_group(rng: random.Random, candidates: int, hard: bool, held_out: bool = False) -> PageGroup:
    """Two queries and what stands on their candidate pages.

    hard: pages share a word with the first query or have both in different lines, and one query in five is in
    the other language; otherwise the other pages are drawn at random. The second query asks for a pair of one
    of the other pages.
    """
    target = draw_pair(rng, held_out)
    language = rng.choice(PAGE_LANGUAGES)
    rows = [_page_rows(rng, [target], target, held_out)]
    for _ in range(candidates - 1):
        kind = rng.random() if hard else 0.0
        if kind < 0.3:
            main = []
        elif kind < 0.65:
            main = [_near(rng, target, rng.random() < 0.5, held_out)]
        else:
            main = [_near(rng, target, True, held_out), _near(rng, target, False, held_out)]
        rows.append(_page_rows(rng, main, target, held_out))
    second = rng.choice(rows[rng.randrange(1, candidates)])
    rng.shuffle(rows)
    first_query, second_query = _question(rng, target, language, hard), _question(rng, second, language, hard)
    return PageGroup(
        (first_query, second_query),
        tuple(rows),
        language,
        (tuple(grade_page(target, r) for r in rows), tuple(grade_page(second, r) for r in rows)),
    )


def _question(rng: random.Random, target: Pair, language: str, hard: bool) -> str:
    if hard and rng.random() < 0.2:
        language = PAGE_LANGUAGES[1 - PAGE_LANGUAGES.index(language)]
    a, n = page_word(0, target[0], language), page_word(1, target[1], language)
    forms = {"en": ("page with {a} {n}", "find {a} {n}"), "de": ("Seite mit {a} {n}", "suche {a} {n}")}
    return rng.choice(forms[language]).format(a=a, n=n)


def _near(rng: random.Random, target: Pair, keep_adjective: bool, held_out: bool) -> Pair:
    for _ in range(50):
        pair = (
            draw_pair(rng, held_out, adjective=target[0])
            if keep_adjective
            else draw_pair(rng, held_out, noun=target[1])
        )
        if pair != target:
            return pair
    return draw_pair(rng, held_out)  # the split has no other pair with that word


def _page_rows(rng: random.Random, main: Sequence[Pair], target: Pair, held_out: bool) -> tuple[Pair, ...]:
    rows = list(main)
    for _ in range(rng.choice((2, 3)) - len(main)):
        pair = draw_pair(rng, held_out)
        if pair != target:
            rows.append(pair)
    rng.shuffle(rows)
    return tuple(rows)
