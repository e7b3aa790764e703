"""The documents that the arguments of a command name: files, folders, patterns, `-`. Owns their ids.

    for name, content, source in read(find(["pages/", "notes/*.txt", "chunks.jsonl", "-"]), tell): ...

A folder stands for all files below it, in the order of their paths, hidden ones left out; a pattern that the shell
left as it is, for the files it matches; `-` for one document from stdin. A file of JSON lines (.jsonl, .ndjson) holds
a document a line, {"id": …, "text": …} or {"id": …, "image": …}; any other file is one, see `m0kit.reading.formats`. A
file's id is its path as given; that of a line its `id`, or `file:line` where that is null or missing.
"""

import glob
import os
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import click

from m0kit.errors import FormatError, InputError
from m0kit.files import open_regular
from m0kit.plain import plain
from m0kit.reading import formats
from m0kit.reading.inputs import Given, from_file, refuse_url, shown
from m0kit.reading.lines import is_json_lines, lines, records

STDIN: Final = "-"
_UNWRITABLE: Final = re.compile(r"[\n\r\ud800-\udfff]")  # on a line of UTF-8
_WANTED: Final = '{"id": …, "text": …} or {"id": …, "image": …}'


@dataclass(frozen=True, slots=True)
class Found:
    """A file that an argument names, or why it names none."""

    name: str
    path: Path | None = None  # None: stdin, or an error
    is_named: bool = False  # by the argument itself, and so may be a pipe; what was found must be a file
    is_listed: bool = False  # found in a folder, where files of other formats are passed over
    error: InputError | None = None


def find(arguments: Sequence[str]) -> list[Found]:
    """The files, in the order of the arguments. An argument that names none is one of them, with its error."""
    return [file for argument in arguments for file in _found(argument)]


def read(found: Iterable[Found], passed: list[tuple[str, str]]) -> Iterator[Given]:
    """The documents of these files. Those of a folder that are neither text nor images go to `passed`, with why."""
    for file in found:
        if file.path is not None and is_json_lines(file.path):
            yield from _lines(file.path, file.name, file.is_named)
            continue
        content = file.error or _content(file)
        if file.is_listed and isinstance(content, FormatError):
            name = plain(click.format_filename(file.name))
            passed.append((name, f"{str(content).removeprefix(f'{plain(file.name)}: ')} It was passed over."))
        else:
            yield file.name, content, file.name


def count(found: Iterable[Found]) -> int:
    """Documents in these files, about: for a bar."""
    return sum(_count(file) for file in found)


def _found(argument: str) -> list[Found]:
    if argument == STDIN:
        return [Found(STDIN)]
    if not argument:
        return [_none(argument, "an empty name. Is a variable of the shell not set?")]
    try:
        refuse_url(argument)
    except InputError as error:
        return [Found(argument, error=InputError(f"{click.format_filename(argument)}: {error}"))]
    if not os.path.lexists(argument) and glob.has_magic(argument):
        matches = sorted(glob.glob(argument, recursive=True))
        return [file for match in matches for file in _at(Path(match))] or [_none(argument, "no file matches.")]
    return _at(Path(argument), is_named=True)


def _at(path: Path, *, is_named: bool = False) -> list[Found]:
    if not path.is_dir():
        return [Found(str(path), path, is_named=is_named)]
    return _below(path) or [_none(str(path), "the folder holds no file.")]


def _below(folder: Path) -> list[Found]:
    """The files below a folder, through links too, and what could not be listed."""
    files_there: list[Found] = []
    seen: set[str] = set()  # links may lead back

    def unlisted(error: OSError) -> None:
        files_there.append(_none(str(error.filename), f"{os.strerror(error.errno or 0)}."))

    for root, folders, names in os.walk(folder, followlinks=True, onerror=unlisted):
        real = os.path.realpath(root)
        folders[:] = [] if real in seen else [name for name in folders if not name.startswith(".")]
        paths = [] if real in seen else [Path(root, name) for name in names if not name.startswith(".")]
        files_there += [Found(str(p), p, is_listed=True) for p in paths if p.is_file() or p.is_symlink()]
        seen.add(real)
    return sorted(files_there, key=lambda file: Path(file.name).parts)


def _none(argument: str, why: str) -> Found:
    return Found(argument, error=InputError(f"{click.format_filename(argument)}: {why}"))


def _content(file: Found) -> Any:
    try:
        if file.path is not None:
            return formats.read(file.path, named=file.is_named)
        raw = sys.stdin.buffer.read(formats.MAX_IMAGE_BYTES + 1)
        if len(raw) <= formats.MAX_IMAGE_BYTES:
            return formats.parse(raw, STDIN)
        return InputError(f"{STDIN}: has more than the {formats.MAX_IMAGE_BYTES >> 20} MiB that are read of it.")
    except InputError as error:
        return error


def _lines(path: Path, name: str, is_named: bool) -> Iterator[Given]:
    try:
        if not is_named:
            open_regular(path).close()
    except OSError as error:
        yield name, InputError(f"{click.format_filename(name)}: {error.strerror}."), name
        return
    try:
        for number, record in records(path, _WANTED, click.format_filename(name)):
            yield _document(record, f"{name}:{number}", path.parent)
    except InputError as error:  # of the file as a whole
        yield name, error, name


def _document(record: Mapping[str, Any] | InputError, place: str, folder: Path) -> Given:
    """A document of a line."""
    name = place
    try:
        if isinstance(record, InputError):
            raise record
        name = _id(record.get("id"), place)
        return name, from_file({kind: record[kind] for kind in ("text", "image") if kind in record}, folder), place
    except InputError as error:
        return name, type(error)(f"{click.format_filename(place)}: {error}"), place


def _id(value: Any, place: str) -> str:
    """A number is known by its digits. Raises InputError for what cannot stand on a line of a file of ids."""
    if value is None:
        return place
    if type(value) is int:
        return str(value)
    if not isinstance(value, str) or not value.strip() or _UNWRITABLE.search(value):
        raise InputError(f'"id" must be a string of one line or a whole number, got {shown(value)}.')
    return value


def _count(file: Found) -> int:
    if file.path is None or not is_json_lines(file.path):
        return 1
    try:
        with open_regular(file.path) as opened:  # what comes through a pipe comes once
            return sum(1 for _ in lines(opened, file.name))
    except (OSError, ValueError):
        return 1
