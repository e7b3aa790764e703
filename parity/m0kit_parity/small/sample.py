"""The sample sets of the server's page: pages and texts of our own making, and what to ask about them.

Owns what is drawn and written. Needs the DejaVu fonts of the system; the page has the file that comes of it.

    python -m m0kit_parity.small.sample runtime/m0kit/server/page/sample.json

One set is of pages such as people have, small enough to be read in seconds on a CPU. The other is of the small
checkpoint's world, so that it ranks that one too: pages as it never saw them it ranks by chance.
"""

import base64
import io
import json
import random
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Final

from PIL import Image, ImageDraw, ImageFont

from m0kit_parity.small.letters import FONTS
from m0kit_parity.small.pages import draw_page

WIDTH: Final = 504  # 18 × 25 visual tokens
HEIGHT: Final = 700
_INK, _FAINT, _LINE, _BLUE, _WASH = "#1b1f24", "#5a636e", "#b9c0c9", "#2563c9", "#e9edf3"
_COLOURS: Final = 12  # of a page's palette: edges of letters in grey and in blue

_PAGE_QUERIES: Final = (
    "What did the new brake pads cost?",
    "Which month had the most rain?",
    "When does the last bus go to the harbour?",
    "When is the library open?",
    "Wie lange kocht die Suppe?",
)
_PAGE_TEXTS: Final = (
    (
        "warranty.txt",
        "The frame is covered for ten years, everything that turns for two. Keep the invoice: without it no part is "
        "replaced. Brake pads, chains and tyres wear, and are not covered.",
    ),
    ("library.txt", "المكتبة مفتوحة كل يوم من التاسعة صباحا حتى السادسة مساء."),
)
_NOTE_QUERIES: Final = (
    "find lost key",
    "suche rot Tasse",
    "where is the white drum?",
    "find the broken lamp in the cellar",
)
# Adjective and noun of each line, as `corpus` counts them.
_NOTES: Final[tuple[tuple[str, tuple[tuple[int, int], ...]], ...]] = (
    ("en", ((12, 8), (4, 7))),
    ("en", ((12, 25), (1, 8), (8, 29))),
    ("de", ((0, 13), (2, 9))),
    ("de", ((0, 15), (11, 13))),
    ("en", ((10, 14), (5, 24))),
)
_NOTE_TEXTS: Final = (
    ("market.txt", "Там на рынке есть белый барабан. Говорят, зелёная собака стоит в парке."),
    ("museum.txt", "También en el museo hay algo: la cuchara, rota. Aquí el tambor en la iglesia está negro."),
    ("kitchen.txt", "The cup in the kitchen is yellow. There is a broken lamp in the cellar."),
    ("hotel.txt", "Hier ist die Lampe im Hotel groß. Ganz verloren ist der Schlüssel im Wald."),
)


def sample() -> list[dict[str, Any]]:
    """What the page reads: of each set `name`, `queries`, and `documents` with a name and a text or a PNG in base64."""
    drawn = {"invoice.png": _invoice, "rain.png": _rain, "timetable.png": _timetable, "recipe.png": _recipe}
    pages = {name: _page(draw) for name, draw in {**drawn, "floor plan.png": _plan}.items()}
    rng = random.Random(0)
    notes = {
        f"note {i}.png": draw_page(rng, rows, language, 2).image for i, (language, rows) in enumerate(_NOTES, start=1)
    }
    return [
        {"name": "Pages", "queries": list(_PAGE_QUERIES), "documents": _documents(pages, _PAGE_TEXTS)},
        {"name": "Notes", "queries": list(_NOTE_QUERIES), "documents": _documents(notes, _NOTE_TEXTS)},
    ]


def _documents(images: dict[str, Image.Image], texts: Iterable[tuple[str, str]]) -> list[dict[str, str]]:
    found = [{"name": name, "image": _png(image)} for name, image in images.items()]
    return found + [{"name": name, "text": text} for name, text in texts]


def _page(draw: Callable[[ImageDraw.ImageDraw], None]) -> Image.Image:
    image = Image.new("RGB", (WIDTH, HEIGHT), "white")
    draw(ImageDraw.Draw(image))
    return image.quantize(_COLOURS, dither=Image.Dither.NONE)


def _png(image: Image.Image) -> str:
    image.save(file := io.BytesIO(), "PNG", optimize=True)
    return base64.b64encode(file.getvalue()).decode()


def _font(size: int, weight: str = "") -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(str(FONTS / f"DejaVuSans{weight}.ttf"), size)


def _write(
    draw: ImageDraw.ImageDraw, at: tuple[int, int], text: str, size: int = 15, fill: str = _INK, anchor: str = "ls"
) -> None:
    draw.text(at, text, font=_font(size), fill=fill, anchor=anchor)


def _heading(draw: ImageDraw.ImageDraw, title: str, under: str) -> None:
    draw.text((40, 74), title, font=_font(27, "-Bold"), fill=_INK, anchor="ls")
    _write(draw, (40, 102), under, 15, _FAINT)
    draw.line((40, 122, WIDTH - 40, 122), fill=_LINE, width=2)


def _lines(draw: ImageDraw.ImageDraw, top: int, lines: Iterable[str], step: int = 27) -> None:
    for i, line in enumerate(lines):
        _write(draw, (40, top + step * i), line)


def _invoice(draw: ImageDraw.ImageDraw) -> None:
    _heading(draw, "Invoice 2041", "Two Wheels, bicycle repair, Mill Lane 7")
    rows = (
        ("Brake pads, new", "18.50"),
        ("Chain, new", "32.00"),
        ("Tube, rear wheel", "9.20"),
        ("Work, 1.5 hours", "67.50"),
    )
    draw.rectangle((40, 150, WIDTH - 40, 184), fill=_WASH)
    _write(draw, (52, 173), "What was done")
    _write(draw, (WIDTH - 52, 173), "Euro", anchor="rs")
    for i, (what, cost) in enumerate(rows):
        _write(draw, (52, 217 + 40 * i), what)
        _write(draw, (WIDTH - 52, 217 + 40 * i), cost, anchor="rs")
        draw.line((40, 231 + 40 * i, WIDTH - 40, 231 + 40 * i), fill=_LINE)
    draw.text((52, 390), "To be paid", font=_font(18, "-Bold"), fill=_INK, anchor="ls")
    draw.text((WIDTH - 52, 390), "127.20", font=_font(18, "-Bold"), fill=_INK, anchor="rs")
    _lines(
        draw,
        470,
        ("Please pay within 14 days.", "Next service: in a year or 3000 km.", "Thank you for coming by bicycle."),
    )


def _rain(draw: ImageDraw.ImageDraw) -> None:
    _heading(draw, "Rain by month", "Millimetres, at the harbour")
    months = ("Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec")
    fallen = (62, 48, 51, 44, 58, 71, 66, 74, 83, 97, 138, 91)
    bottom, unit = 560, 2.6
    for level in (0, 50, 100, 150):
        y = round(bottom - unit * level)
        draw.line((80, y, WIDTH - 40, y), fill=_LINE)
        _write(draw, (70, y + 5), str(level), 13, _FAINT, "rs")
    for i, (month, amount) in enumerate(zip(months, fallen, strict=True)):
        x = 88 + 32 * i
        draw.rectangle((x, round(bottom - unit * amount), x + 20, bottom), fill=_BLUE)
        _write(draw, (x + 10, bottom + 22), month, 12, _FAINT, "ms")
    _lines(draw, 632, ("A wet autumn. The whole year: 883 mm.",))


def _timetable(draw: ImageDraw.ImageDraw) -> None:
    _heading(draw, "Bus 7", "Station – Market – Harbour, every day")
    draw.rectangle((40, 150, WIDTH - 40, 184), fill=_WASH)
    columns = (130, 270, 420)
    for x, stop in zip(columns, ("Station", "Market", "Harbour"), strict=True):
        _write(draw, (x, 173), stop, anchor="ms")
    times = ((6, 10), (7, 40), (9, 10), (11, 30), (14, 0), (16, 20), (18, 50), (20, 30), (22, 45))
    for i, (hour, minute) in enumerate(times):
        y = 220 + 38 * i
        for x, later in zip(columns, (0, 9, 21), strict=True):
            total = 60 * hour + minute + later
            _write(draw, (x, y), f"{total // 60}:{total % 60:02}", 16, anchor="ms")
        draw.line((40, y + 13, WIDTH - 40, y + 13), fill=_LINE)
    _lines(draw, 608, ("The last bus leaves the station at 22:45.", "Dogs travel free, bicycles after 9:00."))


def _recipe(draw: ImageDraw.ImageDraw) -> None:
    _heading(draw, "Lentil soup", "For four, 40 minutes")
    _lines(
        draw,
        162,
        ("250 g red lentils", "1 onion, 2 carrots", "1 litre of stock", "1 lemon, cumin, salt"),
    )
    draw.ellipse((330, 150, 460, 190), fill=_WASH, outline=_INK, width=3)
    draw.chord((330, 108, 460, 252), 0, 180, fill=_BLUE, outline=_INK, width=3)
    _lines(
        draw,
        320,
        (
            "1.  Fry the onion with a spoon of cumin.",
            "2.  Add carrots, lentils and the stock.",
            "3.  Let it simmer for 25 minutes.",
            "4.  Mix it, and season with lemon.",
        ),
        36,
    )
    _lines(draw, 500, ("With bread it is a whole meal. It keeps for", "three days, and can be frozen."))


def _plan(draw: ImageDraw.ImageDraw) -> None:
    _heading(draw, "Ground floor", "Town hall, scale 1 : 200")
    rooms = (
        ((50, 160, 260, 340), "Library", "64 m²"),
        ((260, 160, 454, 270), "Office", "36 m²"),
        ((260, 270, 454, 340), "Stairs", ""),
        ((50, 340, 200, 520), "Kitchen", "46 m²"),
        ((200, 340, 454, 520), "Assembly room", "78 m²"),
    )
    for box, name, size in rooms:
        draw.rectangle(box, outline=_INK, width=3)
        x, y = (box[0] + box[2]) // 2, (box[1] + box[3]) // 2
        _write(draw, (x, y), name, 16, anchor="ms")
        _write(draw, (x, y + 22), size, 13, _FAINT, "ms")
    for x in range(280, 440, 12):
        draw.line((x, 310, x, 338), fill=_LINE, width=2)
    draw.line((300, 520, 352, 520), fill="white", width=5)
    _write(draw, (326, 545), "Entrance", 13, _BLUE, "ms")
    _lines(draw, 600, ("All doors are 90 cm wide.", "The lift is beside the stairs."))


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(json.dumps(sample(), ensure_ascii=False, indent=1) + "\n", "utf-8")
