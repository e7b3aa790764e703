r"""Text from elsewhere as text that a terminal only shows. Owns which characters are shown as they are.

A name, a licence or an id may hold escape sequences, line ends, or characters that nobody sees. `plain` writes those as
Python would: \x1b, \n, \u202e. What is left moves no cursor, ends no line, turns no direction and hides nothing, in any
script; a text that is plain already stays as it is, so it may be asked for twice.

    plain("CC BY\x1b[2J 4.0\nfiles  all checked")  # → r"CC BY\x1b[2J 4.0\nfiles  all checked", of one line
    to_json({"licence": "\x9b2J"})                 # → r'{"licence": "\u009b2J"}', the same value
"""

import json
import re
import unicodedata
from typing import Any, Final

MAX_SHOWN: Final = 4000  # characters of a line or message: near what a path may have, and a page of a terminal
MAX_CELL: Final = 100  # of a cell of a table, whose rows are all as wide as the longest

# Letters and marks by their category, by their look nothing: fillers of Hangul, Khmer vowels that are never drawn,
# Mongolian selectors, the joiner of graphemes.
_UNSEEN: Final = "\u034f\u115f\u1160\u17b4\u17b5\u180b\u180c\u180d\u180f\u3164\uffa0"
# Signs that stand before a number or a word and are drawn, though their category is that of the unseen ones.
_DRAWN: Final = frozenset("\u0600\u0601\u0602\u0603\u0604\u0605\u06dd\u070f\u0890\u0891\u08e2\U000110bd\U000110cd")
_JOINERS: Final = "\u200c\u200d"  # Persian and Indic words are spelled with them, families of emoji made
_FIRST_JOINED: Final = "\u0590"  # scripts before it, Latin, Greek and Cyrillic among them, have no use for a joiner
_SELECTORS: Final = "\ufe00-\ufe0f\U000e0100-\U000e01ef"  # of variations
_SELECTOR: Final = re.compile(f"[{_SELECTORS}]")
_RARE: Final = re.compile(f"[{_UNSEEN}{_SELECTORS}]")  # what Python takes for printable, and a look at each decides
_KEYCAPS: Final = "0123456789#*"


def plain(value: object, most: int | None = MAX_SHOWN) -> str:
    r"""What `value` says, as one line of harmless characters: others are escaped as \n, \x1b, \u202e, \U000e0067.

    Longer than `most` characters (None: any number), its middle is left out, and said.
    """
    text = str(value)
    if most is not None and len(text) > most:
        text = f"{text[: most * 3 // 4]}… ({len(text)} characters) …{text[-most // 8 :]}"
    if text.isprintable() and not _RARE.search(text):
        return text
    return "".join(
        char if _is_shown(text, i) else char.encode("unicode_escape").decode("ascii") for i, char in enumerate(text)
    )


def to_json(value: Any, indent: int | None = None) -> str:
    r"""Strict JSON of the same value; characters that are not harmless are \uXXXX. Raises ValueError for NaN."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, indent=indent)
    if text.isprintable() and not _RARE.search(text):
        return text
    return "".join(
        char if char == "\n" or _is_shown(text, i) else json.dumps(char)[1:-1].replace("\x7f", "\\u007f")
        for i, char in enumerate(text)  # a line end is one of the indentation: in strings they are escaped already
    )


def _is_shown(text: str, i: int) -> bool:
    """Whether a terminal shows the character there, and nothing else happens."""
    char = text[i]
    if char in _JOINERS:
        return 0 < i < len(text) - 1 and _takes_joiner(text, i - 1) and _takes_joiner(text, i + 1)
    if _is_selector(char):  # of one form of the character before it
        return i > 0 and (text[i - 1] in _KEYCAPS or (not text[i - 1].isascii() and _is_drawn(text[i - 1])))
    return _is_drawn(char)


def _is_drawn(char: str) -> bool:
    if char.isprintable():
        return char not in _UNSEEN and not _is_selector(char)
    return char in _DRAWN or unicodedata.category(char) == "Zs"


def _takes_joiner(text: str, i: int) -> bool:
    if _is_selector(text[i]):
        return i > 0 and _is_shown(text, i)
    return text[i] >= _FIRST_JOINED and _is_drawn(text[i])


def _is_selector(char: str) -> bool:
    """A variation selector: behind an emoji or a Han character, anywhere else a place to hide things."""
    return _SELECTOR.match(char) is not None
