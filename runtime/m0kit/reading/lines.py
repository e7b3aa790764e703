r"""Files with a line for each item: JSON lines, and plain ones such as ids. Owns lines, encodings and JSON, no meaning.

    for number, record in records(Path("pairs.jsonl"), '{"query": …, "document": …}'): ...

A line ends with \n or \r\n and with nothing else; lines are counted from 1, blank ones too, and are left out. A line
that cannot be read is an error of that line alone; only a file that is not UTF-8 text at all is one of the file.
"""

import io
import itertools
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any, BinaryIO, Final

from m0kit.errors import InputError
from m0kit.files import open_regular
from m0kit.reading.formats import MARK, no_text
from m0kit.schema import twice

JSON_NAMES: Final = (".jsonl", ".ndjson")
MAX_LINE_BYTES = 256 << 20  # more is a file without line ends, and not for memory
# In one line: a value of two letters takes a hundred bytes as Python has it. A text may have as many commas.
MAX_VALUES: Final = 10_000_000


def is_json_lines(path: Path) -> bool:
    """By its name."""
    return path.suffix.lower() in JSON_NAMES


def lines(source: Path | BinaryIO, place: str | None = None) -> Iterator[tuple[int, bytes | None]]:
    """Number, from 1, and content of the lines that are not blank; None for one that is too long.

    Raises InputError for a file that cannot be read, or is not UTF-8 text from its first line on.
    """
    place = place or str(source)
    try:
        opened = open_regular(source) if isinstance(source, Path) else nullcontext(source)
    except OSError as error:
        raise InputError(f"{place}: {error.strerror}.") from None
    except ValueError:  # a null character, or half of a surrogate pair
        raise InputError(f"{place!r} cannot be the name of a file.") from None
    with opened as file:
        number = 0
        # Before a line is looked for: what is no text may have none, and a device no end.
        head = _ahead(file, place).partition(b"\n")[0] if isinstance(file, io.BufferedReader) else b""
        if head and (what := no_text(head) or ("holds null bytes alone." if not head.strip(b"\0") else None)):
            raise InputError(f"{place}: {what}")
        while line := _readline(file, place):
            number += 1
            if number == 1 and (what := no_text(line)):
                raise InputError(f"{place}: {what}")
            whole: bytes | None = line
            if len(line) == MAX_LINE_BYTES and not line.endswith(b"\n"):
                while (rest := _readline(file, place)) and not rest.endswith(b"\n"):
                    pass
                whole = None
            line = line.removeprefix(MARK)  # of the file, or of one that was appended to it
            if line.strip():
                yield number, whole and line
            elif line == b"\n" and isinstance(file, io.BufferedReader):
                number += _pass_blanks(file, place)


def records(
    source: Path | BinaryIO, wanted: str, place: str | None = None, *, first: int = 0
) -> Iterator[tuple[int, Mapping[str, Any] | InputError]]:
    """Number of each line, and its JSON object or what is wrong with it; `wanted` is what it should hold.

    So many as `first` says are left out without a look. Raises as `lines` does.
    """
    for number, line in itertools.islice(lines(source, place), first, None):
        try:
            yield number, json_object(line, wanted)
        except InputError as error:
            yield number, error


def strings(source: Path | BinaryIO, place: str | None = None) -> Iterator[tuple[int, str | InputError]]:
    """Number of each line, and its text or what is wrong with it. Raises as `lines` does."""
    for number, line in lines(source, place):
        try:
            yield number, _decoded(line)
        except InputError as error:
            yield number, error


def json_object(line: bytes | None, wanted: str) -> Mapping[str, Any]:
    """What a line holds; `wanted` is what it should, for the message. Raises InputError."""
    text = _decoded(line)
    if len(text) > MAX_VALUES and sum(map(text.count, ",:[{")) > MAX_VALUES:
        raise InputError(f"the line holds more than {MAX_VALUES} values. Write them as one string, or leave them out.")
    try:
        record = json.loads(text, object_pairs_hook=_unique, parse_constant=_constant)
    except InputError:
        raise
    except json.JSONDecodeError as error:
        raise InputError(f"the line is not JSON (character {error.pos + 1}). Write {wanted} on one line.") from None
    except RecursionError:
        raise InputError("the line is not JSON that can be read: it is nested too deeply.") from None
    except ValueError:  # Python's limit for the digits of a whole number
        raise InputError("the line holds a number of thousands of digits. Write it as a string.") from None
    if not isinstance(record, dict):
        raise InputError(f"expected {wanted}, got {type(record).__name__}.")
    return record


def _readline(file: BinaryIO, place: str) -> bytes:
    try:
        return file.readline(MAX_LINE_BYTES)
    except OSError as error:
        raise InputError(f"{place}: {os.strerror(error.errno or 0)}.") from None


def _pass_blanks(file: io.BufferedReader, place: str) -> int:
    """Read on as long as nothing but line feeds is buffered, and count them: a file may be made of such."""
    passed = 0
    while blanks := len(ahead := _ahead(file, place)) - len(ahead.lstrip(b"\n")):
        passed += len(file.read(blanks))  # which are in memory
    return passed


def _ahead(file: io.BufferedReader, place: str) -> bytes:
    """What is buffered, or comes next."""
    try:
        return file.peek()
    except OSError as error:
        raise InputError(f"{place}: {os.strerror(error.errno or 0)}.") from None


def _decoded(line: bytes | None) -> str:
    if line is None:
        raise InputError(f"the line is longer than {MAX_LINE_BYTES >> 20} MiB. Name large images by their paths.")
    try:
        return line.decode("utf-8").removesuffix("\n").removesuffix("\r")
    except UnicodeDecodeError as error:
        raise InputError(
            f"the line is not UTF-8 text (byte {error.start + 1} is 0x{line[error.start]:02X}). Save it as UTF-8."
        ) from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs) and (name := twice(pairs)) is not None:
        raise InputError(f"the line has the key {name!r} twice. Leave one of them out.")
    return found


def _constant(name: str) -> Any:
    raise InputError(f"the line is not JSON: it holds {name}. Write null.")
