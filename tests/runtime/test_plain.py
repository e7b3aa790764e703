"""Text from elsewhere on a terminal: everything that acts is escaped, everything that is read stays, in any script."""

import copy
import json
import pickle
import sys
import unicodedata

import pytest

from m0kit.errors import ImageError, M0kitError, RecipeError
from m0kit.plain import plain, to_json


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\x1b[2J", r"\x1b[2J"),
        ("\x1b]8;;http://x\x1b\\link\x07", r"\x1b]8;;http://x\x1b\link\x07"),
        ("a\rb\nc\td", r"a\rb\nc\td"),
        ("\x00\x08\x7f\x80\x9b2J\x9f", r"\x00\x08\x7f\x80\x9b2J\x9f"),
        ("\x85\u2028\u2029", r"\x85\u2028\u2029"),
        ("\u202a\u202b\u202c\u202d\u202e", r"\u202a\u202b\u202c\u202d\u202e"),
        ("\u2066\u2067\u2068\u2069\u200e\u200f\u061c", r"\u2066\u2067\u2068\u2069\u200e\u200f\u061c"),
        ("a\u200bb\u2060c\ufeffd\u00ade", r"a\u200bb\u2060c\ufeffd\xade"),
        ("pay\u200cpal\u200d", r"pay\u200cpal\u200d"),
        ("\u200cک", "\\u200cک"),
        ("a\ufe0fb\U000e0101", r"a\ufe0fb\U000e0101"),
        ("😀\ufe0f\ufe0f\ufe0f", "😀\ufe0f\\ufe0f\\ufe0f"),
        ("🏴\U000e0067\U000e007f", r"🏴\U000e0067\U000e007f"),
        ("\u3164\uffa0\u115f\u034f", r"\u3164\uffa0\u115f\u034f"),
        ("\ud800\udcff", r"\ud800\udcff"),
        ("\ue000\uffff\U0010ffff", r"\ue000\uffff\U0010ffff"),
        (b"\x1b", r"b'\x1b'"),
    ],
    ids=ascii,
)
def test_what_acts_or_hides_is_escaped_as_python_writes_it(text: object, shown: str) -> None:
    assert plain(text) == shown
    assert plain(shown) == shown, "a text that is plain stays as it is"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "größe — “naïve” 10 %",  # with a space that does not break
        r"C:\new\x1b",
        "漢字\u3000かな 한국어",
        "葛\U000e0100城",
        "עברית العربية ٣٤ \u0600١",
        "می\u200cخواهم",
        "क्\u200dष",
        "👨\u200d👩\u200d👧 ❤\ufe0f\u200d🔥 👍🏽 1\ufe0f\u20e3 ☺\ufe0e",
        "e\u0301 ก็",
    ],
    ids=ascii,
)
def test_what_people_read_stays_as_it_is(text: str) -> None:
    assert plain(text) == text
    assert to_json(text) == json.dumps(text, ensure_ascii=False)


def test_of_all_characters_none_that_acts_gets_through_and_once_is_enough() -> None:
    acting = {"Cc", "Cf", "Cs", "Zl", "Zp"}
    drawn = set("\u0600\u0601\u0602\u0603\u0604\u0605\u06dd\u070f\u0890\u0891\u08e2\U000110bd\U000110cd")
    for i in range(sys.maxunicode + 1):
        char = chr(i)
        if unicodedata.category(char) in acting - {"Cf"} or (unicodedata.category(char) == "Cf" and char not in drawn):
            for text in (char, f"a{char}b"):
                assert char not in plain(text), hex(i)
        elif not char.isascii():
            assert plain(plain(char)) == plain(char)


def test_a_long_value_is_cut_in_its_middle_and_says_so() -> None:
    told = plain("\n" * 10 + "é" * 10_000_000 + "end")
    assert told.startswith(r"\n\n")
    assert told.endswith("éend")
    assert "(10000013 characters)" in told
    assert len(told) < 4000
    assert plain("a" * 5000, None) == "a" * 5000
    assert len(plain("a" * 5000, 100)) < 120


@pytest.mark.parametrize("indent", [None, 1])
def test_json_says_the_same_value_in_harmless_characters(indent: int | None) -> None:
    every = "".join(map(chr, range(0x250))) + "".join(map(chr, range(0x2000, 0x2070))) + "\ufeff\ud800é漢😀\U000e0067"
    value = {every: [every, 1.5, None, {"\x9b": "\\\"'/"}]}
    text = to_json(value, indent)
    assert json.loads(text) == value
    for line in text.split("\n"):
        assert plain(line, None) == line
    assert "é漢😀" in text
    with pytest.raises(ValueError, match="JSON"):
        to_json(float("nan"))


def test_a_message_is_one_harmless_line_by_birth_whatever_it_quotes() -> None:
    error = ImageError("a\x1b[2J\nb\u202e: no image")
    assert str(error) == error.args[0] == r"a\x1b[2J\nb\u202e: no image"
    assert str(pickle.loads(pickle.dumps(error))) == str(error)
    assert str(M0kitError(f"place: {error}")) == f"place: {error}", "what was escaped is not escaped again"


def test_lines_below_a_message_stay_lines_and_are_harmless_each() -> None:
    error = RecipeError("Put this there:\n", "", "[[weights]]", 'match = "\x1b[2J\n"')
    assert str(error) == 'Put this there:\\n\n\n[[weights]]\nmatch = "\\x1b[2J\\n"'
    error.add_note("kept")
    for again in (pickle.loads(pickle.dumps(error)), copy.copy(error)):
        assert (type(again), str(again), again.__notes__) == (RecipeError, str(error), ["kept"])


def test_no_message_is_long() -> None:
    assert len(str(M0kitError("word " * 100_000))) < 4000
    assert len(str(M0kitError("\x1b" * 100_000))) < 4000
