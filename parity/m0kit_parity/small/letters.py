"""Letters of five fonts as grey levels, so that a page is the same to the pixel on every machine.

Owns the file that holds them, how it is made, and how a word is put on a page. What Pillow draws depends on the fonts
of the system, on the version of FreeType and on what shapes a line: none of them is asked.

    python -m m0kit_parity.small.letters      # makes the file anew; needs the DejaVu fonts of the system

Positions are in 64ths of a pixel, and a letter stands on the pixel nearest to its pen, as Pillow with Raqm has it: what
that drew once, the committed evaluation pages, is drawn again to the pixel.
"""

import io
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from m0kit.files import writing

FONTS: Final = Path("/usr/share/fonts/truetype/dejavu")  # of Debian's fonts-dejavu
FILE: Final = Path(__file__).parents[1] / "data" / "letters.npz"
PIXEL: Final = 64  # units of a position
TYPEWRITER: Final = 23.25  # size of letters that are 14 pixels wide: 0.602 em
SIZES: Final = (24.0, 26.0, 28.0)  # of the proportional fonts
_FACES: Final = ("DejaVuSansMono", "DejaVuSansMono-Bold", "DejaVuSans", "DejaVuSans-Bold", "DejaVuSerif")
_GLYPHS: Final = re.compile("ff|.")  # where two letters are one glyph; drawn alone it is the same in all fonts
_LARGEST: Final = 64  # pixels, more than any of the letters has


@dataclass(frozen=True, slots=True)
class Glyph:
    """What a letter darkens: (height, width), 255 is ink; its first column and row from the pen and the baseline."""

    mask: NDArray[np.uint8]
    left: int
    above: int


@dataclass(frozen=True, slots=True)
class Face:
    """A font in one size. `widths` of words and of the space, and `pens` of a word's glyphs, in 64ths of a pixel."""

    widths: Mapping[str, int]
    pens: Mapping[str, Sequence[int]]
    glyphs: Mapping[str, Glyph]

    def put(self, page: NDArray[np.uint8], word: str, x: int, baseline: int) -> None:
        """Draw a word in black on a page, (height, width) grey levels, in place; `x` in 64ths of a pixel.

        What is beyond the edges is left out. Raises KeyError for a word that the file does not have.
        """
        for name, pen in zip(_GLYPHS.findall(word), self.pens[word], strict=True):
            glyph = self.glyphs[name]
            left, top = (x + pen + PIXEL // 2) // PIXEL + glyph.left, baseline - glyph.above
            rows, columns = (_within(*at) for at in zip((top, left), glyph.mask.shape, page.shape, strict=True))
            under, ink = page[rows, columns], glyph.mask[_moved(rows, -top), _moved(columns, -left)]
            under[...] = (under.astype(np.uint32) * (255 - ink) + 127) // 255


def _within(start: int, length: int, end: int) -> slice:
    """The part of a span that lies on a page that ends there."""
    return slice(min(max(start, 0), end), min(max(start + length, 0), end))


def _moved(span: slice, by: int) -> slice:
    return slice(span.start + by, span.stop + by) if span.start < span.stop else slice(0)


@cache
def face(name: str, size: float) -> Face:
    """One of the faces of the file. Raises KeyError where it has no such."""
    return _read()[f"{name} {size:g}"]


@cache
def _read() -> dict[str, Face]:
    with np.load(FILE, allow_pickle=False) as file:
        table, masks = json.loads(file["table"].tobytes()), file["masks"]
    found, place = {}, 0
    for key, kept in table.items():
        glyphs = {}
        for name, (height, width, left, above) in kept["glyphs"].items():
            glyphs[name] = Glyph(masks[place : place + height * width].reshape(height, width), left, above)
            place += height * width
        found[key] = Face(kept["widths"], kept["pens"], glyphs)
    return found


# --- making the file -----------------------------------------------------------------------------------


def make(words: Sequence[str]) -> bytes:
    """The file, of `words` as Pillow with Raqm draws them. Raises OSError where a font is missing."""
    table, masks = {}, []
    for name in _FACES:
        for size in (TYPEWRITER,) if "Mono" in name else SIZES:
            font = ImageFont.truetype(str(FONTS / f"{name}.ttf"), size, layout_engine=ImageFont.Layout.RAQM)
            glyphs = {}
            for glyph in sorted({glyph for word in words for glyph in _GLYPHS.findall(word)}):
                mask, left, above = _drawn(font, glyph)
                glyphs[glyph] = (*mask.shape, left, above)
                masks.append(mask.ravel())
            widths = {word: _units(font.getlength(word)) for word in (" ", *words)}
            table[f"{name} {size:g}"] = {
                "widths": widths, "pens": {word: _pens(font, word) for word in words}, "glyphs": glyphs,
            }  # fmt: skip
    text = np.frombuffer(json.dumps(table, ensure_ascii=False).encode(), np.uint8)
    np.savez_compressed(file := io.BytesIO(), table=text, masks=np.concatenate(masks))
    return file.getvalue()


def _pens(font: ImageFont.FreeTypeFont, word: str) -> list[int]:
    """Where a word's glyphs stand: what is before one takes as much as with it, but for its own width."""
    ends = [(found[0], found.end()) for found in _GLYPHS.finditer(word)]
    return [_units(font.getlength(word[:end])) - _units(font.getlength(glyph)) for glyph, end in ends]


def _drawn(font: ImageFont.FreeTypeFont, glyph: str) -> tuple[NDArray[np.uint8], int, int]:
    image = Image.new("L", (2 * _LARGEST, 2 * _LARGEST))
    ImageDraw.Draw(image).text((_LARGEST, _LARGEST), glyph, font=font, fill=255, anchor="ls")
    ink = np.asarray(image)
    rows, columns = np.flatnonzero(ink.any(axis=1)), np.flatnonzero(ink.any(axis=0))
    mask = ink[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    return mask, int(columns[0]) - _LARGEST, _LARGEST - int(rows[0])


def _units(pixels: float) -> int:
    return round(pixels * PIXEL)


if __name__ == "__main__":
    from m0kit_parity.small.pages import vocabulary  # which draws with what this makes

    with writing(FILE) as made:
        made.write(make(vocabulary()))
