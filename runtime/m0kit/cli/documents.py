"""The documents that the arguments of a command name: files, folders, patterns, `-`. Owns their ids.

    for name, content, source in read(find(["pages/", "notes/*.txt", "chunks.jsonl", "-"]), tell): ...

A folder stands for all files below it, in the order of their paths, hidden ones left out; a pattern that the shell
left as it is, for the files it matches; `-` for one document from stdin. A file of JSON lines (.jsonl, .ndjson) holds
a document a line, {"id": …, "text": …} or {"id": …, "image": …}; a PDF holds one a page; any other file is one, see
`m0kit.reading.formats`. A file's id is its path as given; that of a line its `id`, or `file:line` where that is null or
missing; that of a page `file#page=3`. So an argument names pages too: `file#page=3`, `file#page=3-5`, `file#page=3-`.
"""

import glob
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

import click

from m0kit.errors import DependencyError, FormatError, InputError
from m0kit.files import open_regular
from m0kit.plain import plain
from m0kit.reading import formats
from m0kit.reading.inputs import Given, from_file, refuse_url, shown
from m0kit.reading.lines import is_json_lines, lines, records
from m0kit.reading.pdf import PdfPage, pdf_pages, require_pypdfium2

STDIN: Final = "-"
_UNWRITABLE: Final = re.compile(r"[\n\r\ud800-\udfff]")  # on a line of UTF-8
_OF_PAGES: Final = re.compile(r"(.+)#page=(\d{1,9})(-(\d{1,9})?)?", re.DOTALL)
_WANTED: Final = '{"id": …, "text": …} or {"id": …, "image": …}'


@dataclass(frozen=True, slots=True)
class Found:
    """A file that an argument names, or why it names none."""

    name: str
    path: Path | None = None  # None: stdin, or an error
    is_named: bool = False  # by the argument itself, and so may be a pipe; what was found must be a file
    is_listed: bool = False  # found in a folder, where files of other formats are passed over
    pages: tuple[int, int | None] = (1, None)  # of a PDF, the first and the last; None: to its end
    error: InputError | None = None


def find(arguments: Sequence[str]) -> list[Found]:
    """The files, in the order of the arguments. An argument that names none is one of them, with its error."""
    return [file for argument in arguments for file in _found(argument)]


@dataclass(frozen=True, slots=True)
class Pages:
    """A PDF of which nothing was read so far."""

    name: str
    _draw: Callable[[], Iterator[PdfPage]]

    def documents(self) -> Iterator[Given]:
        """Its pages, each drawn when it is asked for, or why there are none."""
        try:
            for page in self._draw():
                one = f"{self.name}#page={page.number}"
                yield one, page.error or page, one
        except InputError as error:  # of the file as a whole
            yield self.name, error, self.name


def read(found: Iterable[Found], passed: list[tuple[str, str]]) -> Iterator[Given]:
    """The documents of these files. Those of a folder that are neither text nor images go to `passed`, with why."""
    for name, content, source in survey(found, passed):
        if isinstance(content, Pages):
            yield from content.documents()
        else:
            yield name, content, source


def survey(found: Iterable[Found], passed: list[tuple[str, str]]) -> Iterator[Given]:
    """As `read`, but a PDF is one of them, with `Pages` as its content: a thousand pages are more than memory holds."""
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


def count(found: Sequence[Found]) -> int:
    """Documents in these files, about, for a bar; 0 where there are PDFs, whose pages nobody has counted."""
    if any(file.path is not None and file.path.suffix.lower() == ".pdf" for file in found):
        return 0
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
    if not os.path.lexists(argument) and (match := _OF_PAGES.fullmatch(argument)):
        return [_some_pages(argument, match[1], int(match[2]), match[3] is not None, match[4])]
    return _at(Path(argument), is_named=True)


def _some_pages(argument: str, name: str, first: int, is_range: bool, last: str | None) -> Found:
    """Pages of a PDF that an argument names."""
    to = int(last) if last else None if is_range else first
    if first < 1 or (to is not None and to < first):
        return _none(argument, "pages count from 1, and the last is not before the first: paper.pdf#page=3-5.")
    path = Path(name)
    try:
        if path.is_file() and not _is_pdf(path, click.format_filename(name)):
            return _none(argument, "names pages, and the file is no PDF.")
    except InputError as error:
        return Found(name, error=error)
    return Found(name, path, is_named=True, pages=(first, to))


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
    """The document in a file, or why there is none; of a PDF `Pages`."""
    place = click.format_filename(file.name)
    try:
        if file.path is not None:
            if _is_pdf(file.path, place):
                require_pypdfium2(place)
                first, last = file.pages
                return Pages(file.name, partial(pdf_pages, file.path, place, first_page=first, last_page=last))
            return formats.read(file.path, named=file.is_named)
        raw = sys.stdin.buffer.read(formats.MAX_IMAGE_BYTES + 1)
        if len(raw) > formats.MAX_IMAGE_BYTES:
            return InputError(f"{STDIN}: has more than the {formats.MAX_IMAGE_BYTES >> 20} MiB that are read of it.")
        if not formats.is_pdf(raw, STDIN):
            return formats.parse(raw, STDIN)
        require_pypdfium2(STDIN)
        return Pages(STDIN, partial(pdf_pages, raw, STDIN))
    except InputError as error:
        return error
    except DependencyError as error:  # a format that is not read here, as others are nowhere
        return FormatError(error)


def _is_pdf(path: Path, place: str) -> bool:
    try:
        with open_regular(path) as opened:
            return formats.is_pdf(opened.read(1024) or b"", place, path.suffix.lower())
    except InputError:
        raise
    except (OSError, ValueError):  # a pipe, or what is said where it is read
        return False


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
