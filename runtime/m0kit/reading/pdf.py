"""The pages of a PDF as images. Owns limits, the process that draws them, and what is said where one cannot be drawn.

    for page in pdf_pages(Path("paper.pdf")):
        reranker.score([("slm markdown", page)])  # a page is a document; page.png has its bytes

Needs the extra m0kit[pdf]. What draws is `pdf_child`, in a process for each PDF: a page that crashes it, hangs or takes
too much memory costs that page. Nothing that comes of it is believed: numbers and sizes are what was asked for, and
the PNG is an image from elsewhere, as any other.
"""

import importlib.util
import math
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Generator, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Self

from m0kit.errors import DependencyError, InputError, M0kitError
from m0kit.files import read_regular
from m0kit.reading import pdf_child
from m0kit.reading.pdf_child import ASK, COUNT, DAMAGED, FRAME, LOCKED, MAX_SIDE, PAGE, READY, UNDRAWN
from m0kit.terminal import ended

MAX_PDF_BYTES: Final = 256 << 20
DPI: Final = 150
# Four times what the model sees of an image (602,112): A4 at 150 dpi has 2.2 million.
MAX_PAGE_PIXELS: Final = 4 * 768 * 28 * 28
MAX_PAGES: Final = 2000
MOST_PAGES: Final = (1 << 31) - 1  # that a PDF can have
PAGE_S: Final = 20  # of CPU; a page of text takes 0.05, one of a large map some seconds
TOTAL_S: Final = 600  # of CPU, for one process
MEMORY_BYTES: Final = 1 << 30  # address space of the process, besides the file
MAX_DEATHS: Final = 3  # of that process for one file; it is started again behind the page
_CLOCK: Final = 10  # seconds of the clock for one of CPU: a busy machine decides nothing
_END_S: Final = 5.0  # for a process that has closed its pipe
_POINTS: Final = 72  # in an inch
_MORE_BYTES: Final = 1 << 16  # of a PNG, besides 4 for each pixel


@dataclass(frozen=True, slots=True)
class PdfPage:
    """A page, drawn; a document for `Reranker` in all its methods. With `error` it has no pixels, and raises it there.

    `png` holds (height, width) pixels, 8 bits each, in RGB, or grey where no pixel has a colour.
    """

    number: int  # from 1
    count: int  # of the file
    width: int
    height: int
    png: bytes = field(repr=False)
    error: InputError | None = None


def pdf_pages(
    source: bytes | str | os.PathLike[str],
    where: str = "",
    *,
    first_page: int = 1,
    last_page: int | None = None,
    dpi: float = DPI,
    max_pixels: int = MAX_PAGE_PIXELS,
    max_pages: int = MAX_PAGES,
    page_s: int = PAGE_S,
    total_s: int = TOTAL_S,
) -> Generator[PdfPage, None, None]:
    """The pages of a PDF (its bytes, or the path of a file), each drawn when it is asked for and one ahead.

    They are those from `first_page`, from 1, to `last_page`, both included; None, or more than there are: to the end.
    A page has `dpi` pixels an inch, or fewer where it would have more than `max_pixels`. It may take `page_s` seconds
    of CPU, and all together `total_s`. Closing the generator ends the process that draws.
    `where` names the PDF in errors, its path by default. A page that cannot be drawn comes with its error, and costs
    the others nothing. Raises InputError for a file that cannot be read, is no PDF or damaged, needs a password, has
    none of these pages or more of them than `max_pages`, or whose pages take too long or keep crashing; ValueError for
    limits that allow nothing; DependencyError without pypdfium2.
    """
    if not (0 < dpi < math.inf and min(max_pixels, max_pages, page_s, total_s) >= 1):
        raise ValueError("dpi, max_pixels, max_pages, page_s and total_s must be positive.")
    if not 1 <= first_page <= (MOST_PAGES if last_page is None else min(last_page, MOST_PAGES)):
        raise ValueError(f"pages {first_page} to {last_page}: they count from 1, and the last is not before the first.")
    if isinstance(source, bytes | bytearray | memoryview):
        data = bytes(source)
        if len(data) > MAX_PDF_BYTES:
            raise InputError(f"has more than the {MAX_PDF_BYTES >> 20} MiB that are read of a PDF.", where=where)
    else:
        path = Path(source)
        where = where or str(path)
        try:
            data = read_regular(path, MAX_PDF_BYTES)
        except OSError as error:
            raise InputError(f"{error.strerror}.", where=where) from None
        except ValueError:  # a null character, or half of a surrogate pair
            raise InputError("cannot be the name of a file.", where=where) from None
    require_pypdfium2(where)
    last = min(last_page or MOST_PAGES, MOST_PAGES)
    return _pages(_Asked(data, where, dpi / _POINTS, max_pixels, max_pages, page_s, total_s, first_page, last))


def require_pypdfium2(where: str = "") -> None:
    """Raises DependencyError naming the extra where PDFs cannot be read."""
    if importlib.util.find_spec("pypdfium2") is None:
        place = f"{where}: " if where else ""
        raise DependencyError(f"{place}reading PDFs needs pypdfium2. pip install 'm0kit[pdf]', or give pages as PNG.")


@dataclass(frozen=True, slots=True)
class _Asked:
    data: bytes
    where: str
    scale: float  # pixels a point
    max_pixels: int
    max_pages: int
    page_s: int
    total_s: int
    first: int
    last: int

    def place(self, number: int) -> str:
        return f"{self.where}#page={number}" if self.where else f"page {number}"

    def packed(self, first: int) -> bytes:
        limits = (self.page_s, self.total_s, MEMORY_BYTES, len(self.data))
        return ASK.pack(first, self.last, self.max_pages, self.max_pixels, self.scale, *limits)


def _pages(asked: _Asked) -> Generator[PdfPage, None, None]:
    first, last, deaths = asked.first, 0, 0
    while deaths == 0 or first <= last:
        with _Process(asked, first) as process:
            count = process.count()
            if asked.first > count:
                raise InputError(f"has {_many(count)}, and no page {asked.first}.", where=asked.where)
            last = min(count, asked.last)
            if last - asked.first >= asked.max_pages:
                most = f"{_many(asked.max_pages)} of a PDF {'is' if asked.max_pages == 1 else 'are'} read"
                raise InputError(f"has {_many(count)}; {most}. Split it, or name some of them.", where=asked.where)
            while first <= last:
                page = process.page(first, count)
                first += 1
                yield page
                if process.died:
                    break
            else:
                return
        deaths += 1
        if deaths == MAX_DEATHS and first <= last:
            raise InputError(
                f"{deaths} pages took too long or ended the process that draws them, so those behind page {first - 1} "
                "were not tried. Save the file again, or give its pages as PNG.",
                where=asked.where,
            )


def _many(pages: int) -> str:
    return f"{pages} page{'' if pages == 1 else 's'}"


class _Process:
    """What draws from page `first` on. Its words are read here, and nowhere else."""

    def __init__(self, asked: _Asked, first: int) -> None:
        self._asked, self._first = asked, first
        self.died = False
        self._late = self._has_ended = False
        path = os.pathsep.join(filter(None, sys.path))  # pypdfium2 is found there as it is here
        self._child = subprocess.Popen(
            [sys.executable, "-P", pdf_child.__file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": path},
        )
        assert self._child.stdin is not None
        assert self._child.stdout is not None
        self._stdin, self._stdout = self._child.stdin, self._child.stdout

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._end()

    def count(self) -> int:
        """How many pages the file has. Raises InputError, or M0kitError where it is not the file's fault."""
        where = self._asked.where
        with self._watched():
            with suppress(BrokenPipeError):  # what it says, or how it ended, tells more
                self._stdin.write(self._asked.packed(self._first))
                self._stdin.write(self._asked.data)
                self._stdin.close()
            if self._frame()[0] != READY:
                raise M0kitError(
                    f"{where}: the process that draws pages {ended(self._end())} before it began. See whether there is "
                    "memory enough, and whether python -c 'import pypdfium2' works."
                )
            kind, count, *_ = self._frame()
        if kind == COUNT and count:
            return count
        if kind == COUNT:
            raise InputError("has no pages.", where=where)
        if kind == LOCKED:
            raise InputError("needs a password. Save it without one.", where=where)
        if kind == DAMAGED:
            raise InputError("is no PDF, or so damaged that it cannot be opened. Save it again.", where=where)
        raise InputError(f"{self._death()} Save it again.", where=where)

    def page(self, number: int, count: int) -> PdfPage:
        """The next page. Raises InputError where all of them took too long."""
        with self._watched():
            kind, named, width, height, size = self._frame()
            most = self._asked.max_pixels + 2 * MAX_SIDE  # sides are rounded up
            is_sound = named == number and width > 0 and height > 0 and size <= 4 * width * height + _MORE_BYTES
            if kind == PAGE and is_sound and width * height <= most and len(png := self._read(size)) == size:
                return PdfPage(number, count, width, height, png)
        if kind == UNDRAWN and named == number:
            why = "is damaged and cannot be drawn."
        else:
            self.died = True
            why = self._death()
        place = self._asked.place(number)
        return PdfPage(number, count, 0, 0, b"", InputError(f"{why} Save it again, or give it as PNG.", where=place))

    def _frame(self) -> tuple[bytes, int, int, int, int]:
        raw = self._read(FRAME.size)
        return FRAME.unpack(raw) if len(raw) == FRAME.size else (b"", 0, 0, 0, 0)

    def _read(self, size: int) -> bytes:
        raw = self._stdout.read(size)
        self._has_ended = len(raw) < size
        return raw

    def _death(self) -> str:
        """Why there is no more to read. Raises InputError where all pages took too long together."""
        has_ended = self._has_ended
        code = self._end()
        if code == -getattr(signal, "SIGXCPU", 0):
            raise InputError(
                f"its pages take more than {self._asked.total_s} seconds to draw. Split it.", where=self._asked.where
            )
        if self._late or code == -getattr(signal, "SIGPROF", 0):
            return f"takes more than {self._asked.page_s} seconds to draw."
        how = ended(code) if has_ended else "answered what is no page"
        return (
            f"cannot be drawn: the process that does {how}, so it is damaged, or takes more than the "
            f"{MEMORY_BYTES >> 20} MiB that it may."
        )

    @contextmanager
    def _watched(self) -> Iterator[None]:
        """The process is ended when it has not done by the clock what is waited for in here."""

        def late() -> None:
            self._late = True
            self._child.kill()

        timer = threading.Timer(_CLOCK * self._asked.page_s, late)
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()

    def _end(self) -> int:
        """The exit code of the process, which is ended now where it has not ended itself."""
        if self._has_ended:
            with suppress(subprocess.TimeoutExpired):
                self._child.wait(_END_S)
        self._child.kill()
        for pipe in (self._stdin, self._stdout):
            with suppress(OSError):
                pipe.close()
        return self._child.wait()
