"""JSON, and TOML, that may come from somebody else: what is read of it, and that it has the form it should have.

    raw = parse(data)                         # strict JSON, or ValueError that says what is wrong
    entry = fitting(raw["file"], FileEntry)   # a dataclass, or ValueError that names the field
    entry = exactly(raw["file"], FileEntry)   # the same, and no field more

Owns what m0kit takes for JSON wherever a program wrote it: a key stands once, numbers are finite and of at most 64
bits, text is valid Unicode. The forms themselves are types, each where its format is owned.
"""

import json
import math
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final, TypeVar

import msgspec

T = TypeVar("T")

_INT_DIGITS: Final = 19  # of 2⁶³
_FLOAT_LETTERS: Final = 40  # twice what a float64 can tell apart
_DOTS: Final = 100  # of a line of TOML: a key with so many parts takes its reader the square of their number
_DEPTH: Final = 100  # ten times what any file has; more, and what looks at the value ends in a RecursionError


def parse(data: bytes | str, *, wide: bool = False) -> Any:
    """The value of a JSON text in UTF-8. Raises ValueError with a reason that can stand in a message.

    `wide`: whole numbers of up to 40 digits are taken too. transformers writes 10³⁰ for "no limit".
    """
    with _in_words():
        text = data if isinstance(data, str) else data.decode("utf-8-sig")
        try:
            value = json.loads(
                text,
                object_pairs_hook=_unique,
                parse_constant=_constant,
                parse_int=_wide if wide else _whole,
                parse_float=_number,
            )
        except json.JSONDecodeError as error:
            raise ValueError(f"it is not JSON (line {error.lineno}, column {error.colno})") from error
        if text.count("[") + text.count("{") > _DEPTH:  # else it cannot be
            _check_depth(value)
        if "\\ud" in text or "\\uD" in text:  # else nothing in it can be half of a pair
            json.dumps(value, ensure_ascii=False).encode()
    return value


def parse_toml(data: bytes) -> dict[str, Any]:
    """The table of a TOML text in UTF-8. Raises ValueError with a reason that can stand in a message."""
    with _in_words():
        text = data.decode("utf-8-sig")
        if any(line.count(".") > _DOTS for line in text.splitlines()):
            raise ValueError(f"a line in it has more than {_DOTS} dots")
        try:
            return tomllib.loads(text)
        except tomllib.TOMLDecodeError as error:
            raise ValueError(f"not TOML ({error})") from None
        except ValueError as error:
            if "digits" not in str(error):  # Python's limit for those of a whole number
                raise
            raise ValueError("it holds a number of thousands of digits") from None


def fitting(value: Any, form: type[T]) -> T:
    """A value of JSON as a dataclass or another type of msgspec. Raises ValueError that names what does not fit."""
    with _in_words():
        return msgspec.convert(value, form, strict=True)


def exactly(value: Any, form: type[T]) -> T:
    """As `fitting`, and with the very fields of the form: none that it does not know, none left out for a default."""
    found = fitting(value, form)
    with _in_words():
        _same_fields(value, msgspec.to_builtins(found), "$")
    return found


def twice(pairs: list[tuple[str, Any]]) -> str | None:
    """A key that an object of JSON has more than once, if there is one."""
    seen: set[str] = set()
    return next((name for name, _ in pairs if name in seen or seen.add(name)), None)  # type: ignore[func-returns-value]


@contextmanager
def _in_words() -> Iterator[None]:
    """Makes a reason that can stand in a message of what readers and msgspec raise."""
    try:
        yield
    except UnicodeDecodeError:
        raise ValueError("it is not text in UTF-8") from None
    except UnicodeEncodeError:
        raise ValueError("a text in it holds half of a surrogate pair") from None
    except msgspec.ValidationError as error:
        raise ValueError(str(error)) from None
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _same_fields(value: Any, known: Any, place: str) -> None:
    if isinstance(value, dict) and isinstance(known, dict):
        for name in (*value, *known):
            if name not in known:
                raise ValueError(f"Object has the unknown field `{name:.60}` - at `{place}`")
            if name not in value:
                raise ValueError(f"Object missing required field `{name}` - at `{place}`")
        for name, inner in value.items():
            if isinstance(inner, dict | list):
                _same_fields(inner, known[name], f"{place}.{name:.60}")
    elif isinstance(value, list) and isinstance(known, list | tuple):
        for number, (inner, other) in enumerate(zip(value, known, strict=True)):
            if isinstance(inner, dict | list):
                _same_fields(inner, other, f"{place}[{number}]")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs) and (name := twice(pairs)) is not None:
        raise ValueError(f"it has the key {name[:60]!r} twice")
    return found


def _constant(name: str) -> Any:
    raise ValueError(f"it holds {name}, which is no number")


def _whole(text: str) -> int:
    if len(text) > _INT_DIGITS + 1 or not -(2**63) <= int(text) < 2**63:
        raise ValueError(f"it holds a whole number of more than 64 bits ({text[:20]}…)")
    return int(text)


def _wide(text: str) -> int:
    if len(text) > _FLOAT_LETTERS:
        raise ValueError(f"it holds a whole number of more than {_FLOAT_LETTERS} digits ({text[:20]}…)")
    return int(text)


def _check_depth(value: Any) -> None:
    level = [value] if isinstance(value, dict | list) else []
    for _ in range(_DEPTH):
        inner = (each.values() if isinstance(each, dict) else each for each in level)
        level = [item for items in inner for item in items if isinstance(item, dict | list)]
    if level:
        raise ValueError("it is nested too deeply")


def _number(text: str) -> float:
    value = float(text) if len(text) <= _FLOAT_LETTERS else math.inf
    if not math.isfinite(value):
        raise ValueError(f"it holds a number that is too large or too long ({text[:20]}…)")
    return value
