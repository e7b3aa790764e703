"""Draws the pages of one PDF in a process of its own. Owns how a page becomes pixels, and the limits of that process.

PDFium is C++ that reads somebody's bytes, and not for several threads. So `m0kit.reading.pdf` starts this file by its
path, with nothing else of m0kit (importing that takes 0.3 s): `ASK` and the PDF come on stdin, `FRAME`s go to stdout.

    python -P pdf_child.py < ask > frames

A page is drawn as a viewer shows it on white paper: its crop box, turned as it says, with annotations and what forms
were filled in with. No script runs, and nothing that a link or an attachment names is opened.
"""

import contextlib
import io
import math
import signal
import struct
import sys
from typing import Any, BinaryIO, Final

# First page (from 1) and last, most pages, most pixels a page, pixels a point, seconds of CPU a page and in all, bytes
# of memory besides the file, bytes of the file, which follow.
ASK: Final = struct.Struct(">IIIIdIIQQ")
# Kind, a number, width and height in pixels, bytes of what follows.
FRAME: Final = struct.Struct(">cIIII")
READY: Final = b"r"  # nothing of the file was looked at so far
LOCKED: Final = b"l"  # needs a password
DAMAGED: Final = b"d"  # is no PDF that can be opened
COUNT: Final = b"c"  # number: its pages
PAGE: Final = b"p"  # number: which page; a PNG follows
UNDRAWN: Final = b"u"  # number: a page that cannot be drawn
MAX_SIDE: Final = 1 << 15  # pixels; a page of 14,400 points has 30,000 at 150 dpi


def _main(stdin: BinaryIO, stdout: BinaryIO) -> None:
    first, last, most, max_pixels, scale, page_s, total_s, memory, size = ASK.unpack(stdin.read(ASK.size))
    import pypdfium2
    import pypdfium2.raw as pdfium

    _limit(total_s, memory + size)
    _tell(stdout, READY)
    data = stdin.read(size)
    _start(page_s)
    try:
        document = pypdfium2.PdfDocument(data)
        document.init_forms()
        count = len(document)
    except pypdfium2.PdfiumError as error:
        # What it opens and finds no page in has no error.
        codes = {pdfium.FPDF_ERR_SUCCESS: COUNT, pdfium.FPDF_ERR_PASSWORD: LOCKED, pdfium.FPDF_ERR_SECURITY: LOCKED}
        return _tell(stdout, codes.get(error.err_code, DAMAGED))
    _tell(stdout, COUNT, count)
    last = min(last, count)
    for number in range(first, last + 1 if last - first < most else 0):
        _start(page_s)
        try:
            width, height, png = _drawn(document, number - 1, max_pixels, scale)
            _tell(stdout, PAGE, number, width, height, png)
        except (pypdfium2.PdfiumError, MemoryError, ValueError):
            _tell(stdout, UNDRAWN, number)
    return None


def _drawn(document: Any, index: int, max_pixels: int, scale: float) -> tuple[int, int, bytes]:
    """Width, height and PNG of a page."""
    from PIL import ImageChops

    page = document[index]
    try:
        across, down = page.get_size()  # points
        scale = min(scale, math.sqrt(max_pixels / (across * down)), MAX_SIDE / max(across, down))
        bitmap = page.render(scale=scale, prefer_bgrx=True, rev_byteorder=True)
        try:
            image = bitmap.to_pil().convert("RGB")
        finally:
            bitmap.close()
    finally:
        page.close()
    red, green, blue = image.split()
    if not (ImageChops.difference(red, green).getbbox() or ImageChops.difference(red, blue).getbbox()):
        image = red  # the same pixels in a third of the bytes
    image.save(file := io.BytesIO(), "PNG", compress_level=1)
    return (*image.size, file.getvalue())


def _tell(stdout: BinaryIO, kind: bytes, number: int = 0, width: int = 0, height: int = 0, png: bytes = b"") -> None:
    stdout.write(FRAME.pack(kind, number, width, height, len(png)))
    stdout.write(png)
    stdout.flush()


def _limit(total_s: int, memory: int) -> None:
    """For good: seconds of CPU, bytes of memory where the system counts them, no file written and no core."""
    try:
        import resource
    except ImportError:  # Windows; there the parent's clock is what limits
        return
    limits = ((resource.RLIMIT_CPU, total_s), (resource.RLIMIT_AS, memory), (resource.RLIMIT_FSIZE, 0))
    for what, most in (*limits, (resource.RLIMIT_CORE, 0)):
        with contextlib.suppress(ValueError, OSError):
            hard = resource.getrlimit(what)[1]
            resource.setrlimit(what, (most if hard == resource.RLIM_INFINITY else min(most, hard), hard))
    for number in (signal.SIGPROF, signal.SIGXCPU):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent's to answer


def _start(seconds: int) -> None:
    """The process ends when it has computed for so long before this is called again."""
    if hasattr(signal, "setitimer"):
        signal.setitimer(signal.ITIMER_PROF, seconds)


if __name__ == "__main__":
    _main(sys.stdin.buffer, sys.stdout.buffer)
