"""Where something is wrong with an input, and what: told apart, and one text."""

import copy
import pickle
from collections.abc import Callable

import pytest

from m0kit.errors import ImageError, InputError, M0kitError


@pytest.mark.parametrize(
    ("error", "text", "side"),
    [
        (InputError("is empty."), "is empty.", None),
        (InputError("is empty.", where="query"), "query: is empty.", "query"),
        (ImageError("is cut off.", where="document: page.png"), "document: page.png: is cut off.", "document"),
        (InputError("is empty.", where="documents.jsonl"), "documents.jsonl: is empty.", None),
        (InputError("is empty.", where="query", pair=3), "pair 3: query: is empty.", "query"),
        (InputError("expected two.", pair=0), "pair 0: expected two.", None),
        (InputError("first\x1b[2J", "second", where="a\nb"), r"a\nb: first\x1b[2J" "\nsecond", None),
    ],
)
@pytest.mark.parametrize("again", [lambda e: e, copy.copy, lambda e: pickle.loads(pickle.dumps(e))])
def test_a_text_is_composed_of_place_and_reason(
    error: InputError, text: str, side: str | None, again: Callable[[InputError], InputError]
) -> None:
    found = again(error)
    assert type(found) is type(error)
    assert (str(found), found.side) == (text, side)
    assert (found.pair, found.where, found.reason) == (error.pair, error.where, error.reason)
    assert found.said == text.removeprefix(f"pair {error.pair}: ")


def test_an_error_is_given_its_position_once() -> None:
    error = ImageError("is cut off.", where="document: page.png")
    error.__cause__ = OSError("x")
    placed = error.of_pair(7).of_pair(2)
    assert str(placed) == "pair 2: document: page.png: is cut off."
    assert placed.__cause__ is error.__cause__
    assert str(error) == "document: page.png: is cut off."


def test_all_is_one_error_for_who_wants_no_more() -> None:
    assert str(M0kitError(InputError("is empty.", where="query"))) == "query: is empty."
