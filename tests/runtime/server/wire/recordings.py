"""Requests of clients as they came over the wire, what each means here, and what its client reads of the answer.

    for recording in recordings():
        check_read(recording, answer)   # a value of JSON

A file of `recorded/` is a client: its version; whether its requests were seen on the wire ("run") or read in its source
("read"); and each request: method, path, headers that matter (KEY stands for a key, behind Basic for a name and a
password that is one), body, `means` (what differs from the defaults of an `Ask`), `reads` (places in the answer, each
with its type, or with = and its very value).
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent / "recorded"
TYPES = {
    "string": str,
    "integer": int,
    "number": int | float,
    "boolean": bool,
    "object": dict,
    "array": list,
}


@dataclass(frozen=True)
class Recording:
    """One request."""

    client: str
    does: str
    method: str
    path: str
    headers: dict[str, str]
    body: Any  # None of a GET
    means: dict[str, Any]
    reads: dict[str, str]

    def __str__(self) -> str:
        return f"{self.client}: {self.does}"


def recordings() -> list[Recording]:
    """All of them."""
    found = []
    for path in sorted(FOLDER.glob("*.json")):
        told = json.loads(path.read_text())
        for request in told["requests"]:
            own = {"body": None, "means": {}, **request}
            found.append(Recording(client=f"{told['client']} {told['version']}", **own))
    return found


def check_read(recording: Recording, answer: Any) -> None:
    """That an answer has what the client reads of it, and a result for each document that it asked for."""
    for place, expected in recording.reads.items():
        values = list(_at(answer, place))
        assert values, f"{recording}: nothing at {place}"
        for value in values:
            if expected.startswith("="):
                assert value == expected[1:], f"{recording}: {place} is {value!r}"
            else:
                told = isinstance(value, TYPES[expected]) and (expected == "boolean" or not isinstance(value, bool))
                assert told, f"{recording}: {place} is {value!r}, not of the type {expected}"
    if recording.means:
        results = answer if isinstance(answer, list) else answer.get("results", answer.get("data"))
        documents = len(recording.means["documents"])
        assert sorted({one["index"] for one in results}) == sorted(one["index"] for one in results)
        assert len(results) == min(recording.means.get("top_n") or documents, documents), str(recording)


def _at(value: Any, place: str) -> Iterator[Any]:
    """The values at "results[].index"."""
    name, _, rest = place.partition(".")
    if name.endswith("[]"):
        items = value[name[:-2]] if name[:-2] else value
        assert items
        inner = list(items)
    else:
        if name not in value:
            return
        inner = [value[name]]
    for each in inner:
        if rest:
            yield from _at(each, rest)
        else:
            yield each
