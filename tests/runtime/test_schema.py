"""JSON from elsewhere is strict, or refused with a reason."""

import json
from typing import Any

import pytest

from m0kit.schema import parse


def nested(depth: int) -> str:
    return "[" * depth + "]" * depth


def test_what_is_nested_as_deep_as_no_file_is_is_refused_before_anything_walks_through_it() -> None:
    assert parse(nested(100)) == json.loads(nested(100))
    for depth in (101, 900, 100_000):
        with pytest.raises(ValueError, match="it is nested too deeply"):
            parse(nested(depth))
    assert len(parse("[" + ",".join(["[1]"] * 1000) + "]")) == 1000  # many, and not deep


@pytest.mark.parametrize("digits", [20, 31, 40])
def test_numbers_of_more_than_64_bits_are_taken_only_where_it_is_said(digits: int) -> None:
    text = "9" * digits
    with pytest.raises(ValueError, match="more than 64 bits"):
        parse(text)
    value: Any = parse(text, wide=True)
    assert value == int(text)
    with pytest.raises(ValueError, match="more than 40 digits"):
        parse("9" * 41, wide=True)
