r"""From the bytes of a body to its fields. Owns what is JSON here, and what a value of it is called in a sentence.

    parse_body(b'{"query": "slm", "top_n": null}')  # → {"query": "slm"}

JSON as everywhere in m0kit (`m0kit.schema`): a key stands once, numbers are finite and of at most 64 bits, text is
valid Unicode. A body may be mostly images, so msgspec reads it, and what it lets pass is looked at afterwards: twelve
times as fast as json, in half the memory. Only what is wrong is read again, to say where.
"""

import json
import re
from typing import Any, Final

import msgspec

from m0kit import schema
from m0kit.server.problems import RequestError

# Commas and opening brackets of a body, outside of its texts: each begins a value, and there are no more values by far.
# A hundred for each of a thousand documents, and more. An empty object is three bytes on the wire and seventy in
# memory, so that without a limit a body of 64 MiB would take one and a half gigabytes.
MAX_SIGNS: Final = 1 << 18
_MAX_DEPTH: Final = 100  # as of other JSON
_STRINGS: Final = 3  # for each sign at most: two, with room
# A string, or such a sign. Nothing is tried twice, whatever the bytes are.
_PART: Final = re.compile(rb'[^",\[{]*+(?:"(?:[^"\\]++|\\.)*+"?+|([,\[{]))', re.DOTALL)


def parse_body(body: bytes) -> dict[str, Any]:
    """The fields of a JSON object, without those that are null. Raises RequestError."""
    if not body:
        raise RequestError("BAD_JSON", "the body is empty. Send a JSON object.")
    if _has_many_values(body):
        raise RequestError(
            "TOO_MUCH",
            f"the body has more than {MAX_SIGNS} commas and brackets outside of its texts. Send fewer documents at "
            "a time.",
        )
    try:
        value = msgspec.json.decode(body)
    except (ValueError, RecursionError):
        value = _read_again(body)
    if not _is_strict(value, body):
        value = _read_again(body)
    if not isinstance(value, dict):
        raise RequestError("INVALID_REQUEST", f"the body is {kind_of(value)}. Send a JSON object.")
    return without_nulls(value)


def without_nulls(value: dict[str, Any]) -> dict[str, Any]:
    """What is null is absent."""
    return {name: each for name, each in value.items() if each is not None}


def kind_of(value: Any) -> str:
    """What a value of JSON is, in a sentence."""
    kinds = {bool: "a boolean", int: "a number", float: "a number", str: "a string", list: "a list", dict: "an object"}
    return kinds.get(type(value), "null")


def _has_many_values(body: bytes) -> bool:
    if body.count(b",") + body.count(b"[") + body.count(b"{") <= MAX_SIGNS:
        return False
    num_signs = 0
    for number, match in enumerate(_PART.finditer(body)):
        num_signs += match.lastindex is not None
        if num_signs > MAX_SIGNS or number > _STRINGS * MAX_SIGNS:
            return True
    return False


def _is_strict(value: Any, body: bytes) -> bool:
    """Whether a value that msgspec read has no key twice, no number of more than 64 bits, and an end to its depth.

    A colon of the body stands behind a key or within a string. Where a key stood twice, one that is counted in the
    body is not among those that were kept.
    """
    if b"\\u003a" in body or b"\\u003A" in body:  # a colon that is not counted in the body
        return False
    num_colons = 0
    level = [value]
    for depth in range(_MAX_DEPTH + 1):
        inner: list[Any] = []
        for each in level:
            if isinstance(each, str):
                num_colons += each.count(":")
            elif depth == _MAX_DEPTH and isinstance(each, dict | list):
                return False
            elif isinstance(each, dict):
                num_colons += len(each)
                inner += each
                inner += each.values()
            elif isinstance(each, list):
                inner += each
            elif isinstance(each, int) and not -(2**63) <= each < 2**63:
                return False
        level = inner
    return num_colons == body.count(b":")


def _read_again(body: bytes) -> Any:
    """The same by a slower reader that says what is wrong; it takes a byte order mark too. Raises RequestError."""
    try:
        return schema.parse(body)
    except ValueError as error:
        reason = str(error)
    if re.search(rb"\\u[dD][89a-fA-F]", body):
        try:
            place = _broken_text(json.loads(body))
        except (ValueError, RecursionError):
            place = None  # it is not the only thing that is wrong
        if place is not None:
            raise RequestError(
                "INVALID_INPUT",
                "holds half of a surrogate pair, not valid Unicode. Decode the text again from its bytes, or replace "
                "that character.",
                where=place,
            )
    raise RequestError("BAD_JSON", f"the body cannot be read: {reason}. Send a JSON object in UTF-8.")


def _broken_text(value: Any, place: str = "") -> str | None:
    """The first place of a text that is not valid Unicode."""
    if isinstance(value, str):
        return place if not is_valid(value) else None
    if isinstance(value, dict):
        for name, each in value.items():
            if not is_valid(name):
                return place or "the body"
            found = _broken_text(each, f"{place}.{name:.60}" if place else f"{name:.60}")
            if found is not None:
                return found
    if isinstance(value, list):
        for number, each in enumerate(value):
            found = _broken_text(each, f"{place}[{number}]")
            if found is not None:
                return found
    return None


def is_valid(text: str) -> bool:
    """Whether it is Unicode: no half of a surrogate pair."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
