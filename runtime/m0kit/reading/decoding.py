"""Opening an image file: the one place where m0kit hands somebody's bytes to Pillow.

    image = open_image(raw, "pair 0: document")  # a PIL image; its header was read and nothing decoded
    load(image, "pair 0: document")              # its pixels

Owns which files are opened and how much decoding one may take, in time and memory; what the pixels mean is `image`'s.
A file is bounded before it is decoded, by what stands in it: the formats on the list, the pixels
that the header claims, and where a format lets a few bytes ask for much work, that work. A file that passes takes some
two seconds and one gibibyte at the limit of pixels, and more only where it is itself as large as that takes.
"""

import io
import struct
from collections.abc import Iterator
from typing import Any, Final

import numpy as np
from PIL import Image, TiffImagePlugin

from m0kit.errors import ImageError
from m0kit.reading.avif import coded_pixels
from m0kit.reading.formats import FORMATS, described

# Pixels of a file, read from its header before anything is decoded: Pillow's own limit for a warning
# (a quarter of a gibibyte in RGB). 4K is a tenth of it.
MAX_DECODED_PIXELS: Final = 89_478_485
# JPEG decodes the whole image once for each scan and colour in it, at 20 to 60 ns for 64 pixels. Encoders write 14 of
# them (libjpeg's script for three colours) to 20: enough for each image up to the limit of pixels.
_MAX_SCAN_PIXELS: Final = 24 * MAX_DECODED_PIXELS
_LEAST_SCAN: Final = 1 << 16  # pixels: what beginning a scan takes, however small the image
# Segments before the first scan. A profile has 255 at most and real files some tens; Pillow copies what it has of EXIF
# for each.
_MAX_SEGMENTS: Final = 4096
# Profiles are unpacked one by one, 2 ms each, and the last one counts; a PNG may hold one.
_MAX_PROFILES: Final = 16
# Pillow writes such pixels one by one in Python, 0.1 µs each. 4K is half of it.
_MAX_RUN_LENGTH_PIXELS: Final = 16_000_000
# Pillow copies a block of up to a mebibyte for each comment among numbers in letters. Real files have one or two.
_MAX_COMMENTS: Final = 1000
# Of a pixel: the library's canvases or planes of 16 bits, what it hands over, and Pillow's own. Within a gibibyte such
# files are decoded, beyond it as far as they are of a size that photographs have: 256 bytes of memory for each byte.
_BYTES_PER_PIXEL: Final = {"WEBP": 16, "AVIF": 16}
_FREE_BYTES: Final = 1 << 30
_BYTES_PER_BYTE: Final = 256
# AVIF holds alpha, a gain map, a small preview, cells that stand over the edge and up to four steps of quality as
# images of their own, and libavif scales a frame that is larger than the header claims.
_MAX_CODED: Final = 8
_LEAST_CODED: Final = 1 << 20
_MAX_LAYERS: Final = 6  # samples of a pixel that Pillow takes
_TILE_BYTE_COUNTS: Final = 325
_MAX_OVERLAP: Final = 8  # how often the parts of a TIFF may read one byte: blank parts are shared at times


def open_image(raw: bytes, where: str) -> Image.Image:
    """An image file, of which only what stands before the pixels was read. Raises ImageError naming `where`."""
    if (why := _refused_unopened(raw)) is not None:
        raise ImageError(f"the image of {len(raw)} bytes {why}. Save it again, as PNG for one.", where=where)
    try:
        image = Image.open(io.BytesIO(raw), formats=FORMATS)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):  # the warning where it is made an error
        raise ImageError(
            f"the image has more than the limit of {MAX_DECODED_PIXELS} pixels. Shrink it.", where=where
        ) from None
    except MemoryError:  # nothing of a file's size is had here but the file
        raise
    except Exception as error:
        raise ImageError(
            f"not an image that can be read ({len(raw)} bytes).{described(raw)} Accepted: {', '.join(FORMATS)}.",
            where=where,
        ) from error
    width, height = image.size
    if width < 1 or height < 1:
        raise ImageError(f"the image has no pixels ({width}×{height}).", where=where)
    if width * height > MAX_DECODED_PIXELS:
        raise ImageError(
            f"an image of {width}×{height} pixels is over the limit of {MAX_DECODED_PIXELS}. Shrink it.", where=where
        )
    try:
        why = _refused(raw, image)
    except Exception as error:  # what Pillow makes of tags of a TIFF when they are asked for
        raise ImageError(_damaged(image), where=where) from error
    if why is not None:
        raise ImageError(
            f"the {image.format} file ({width}×{height}) {why}. Save it again, as PNG for one.", where=where
        )
    return image


def load(image: Image.Image, where: str) -> None:
    """Decode an image that was opened. Raises ImageError, and MemoryError only where its pixels have no room."""
    try:
        image.load()
    except MemoryError:
        require_room(image.size)
        raise ImageError(_damaged(image), where=where) from None
    except Exception as error:  # Pillow raises what it likes
        raise ImageError(_damaged(image), where=where) from error


def require_room(size: tuple[int, int]) -> None:
    """Raises MemoryError where so many pixels have no room: then it is the machine's fault, and not the file's."""
    Image.new("RGB", size)


def _damaged(image: Image.Image) -> str:
    width, height = image.size
    return f"the {image.format} file ({width}×{height}) is damaged or cut off. Save it again."


def _refused_unopened(raw: bytes) -> str | None:
    """Why a file is not even opened, as the rest of a sentence."""
    if raw.startswith(b"\xff\xd8") and sum(1 for _ in _segments(raw, _MAX_SEGMENTS + 1)) > _MAX_SEGMENTS:
        return f"has more than {_MAX_SEGMENTS} segments before its pixels"
    if raw.startswith(b"\x89PNG"):
        place = 8
        profiles = 0
        while (place := place + 12) <= len(raw):  # length, name and check
            length, name = struct.unpack_from(">I4s", raw, place - 12)
            place += length
            profiles += name == b"iCCP"
        if profiles > _MAX_PROFILES:
            return f"has {profiles} colour profiles"
    return None


def _refused(raw: bytes, image: Image.Image) -> str | None:
    """Why an image is not decoded: it would take longer, or more memory, than one of its size may."""
    width, height = image.size
    pixels = width * height
    kind = image.format or ""
    needed = _BYTES_PER_PIXEL.get(kind, 0) * pixels
    if needed > _FREE_BYTES + _BYTES_PER_BYTE * len(raw):
        return f"has too few bytes ({len(raw)}) for so many pixels, which take {needed >> 20} MiB to decode"
    if kind == "AVIF" and coded_pixels(raw) > _MAX_CODED * max(pixels, _LEAST_CODED):
        return f"has frames of more than {_MAX_CODED} times its pixels"
    tiles = getattr(image, "tile", [])
    codecs = {tile.codec_name for tile in tiles}
    if "bmp_rle" in codecs and pixels > _MAX_RUN_LENGTH_PIXELS:
        return f"is compressed by run lengths; such a one may have {_MAX_RUN_LENGTH_PIXELS} pixels"
    if "ppm_plain" in codecs and raw.count(b"#") > _MAX_COMMENTS:
        return f"has more than {_MAX_COMMENTS} comments among its numbers"
    if "jpeg" in codecs and _scan_pixels(raw, pixels) > _MAX_SCAN_PIXELS:
        return "has more scans than are decoded at this size"
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        return _refused_tiff(raw, image, tiles)
    return None


def _refused_tiff(raw: bytes, image: TiffImagePlugin.TiffImageFile, tiles: list[Any]) -> str | None:
    width, height = image.size
    pixels = width * height
    tags = image.tag_v2
    if len(tiles) > _MAX_LAYERS * max(width, height, pixels // 256):  # a strip a row, or tiles of 16×16
        return f"is in {len(tiles)} parts, more than an image of its size has"
    if sum((x1 - x0) * (y1 - y0) for x0, y0, x1, y1 in (tile.extents for tile in tiles)) > _MAX_LAYERS * pixels:
        return "has parts that overlap"
    across, down = tags[TiffImagePlugin.IMAGEWIDTH], tags[TiffImagePlugin.IMAGELENGTH]  # before it is turned
    part = (across, min(tags.get(TiffImagePlugin.ROWSPERSTRIP, down), down))
    offsets, counts = TiffImagePlugin.STRIPOFFSETS, TiffImagePlugin.STRIPBYTECOUNTS
    if TiffImagePlugin.TILEWIDTH in tags:
        part = tags[TiffImagePlugin.TILEWIDTH], tags[TiffImagePlugin.TILELENGTH]
        if -(-across // part[0]) * part[0] * -(-down // part[1]) * part[1] > MAX_DECODED_PIXELS:
            return f"is in tiles of {part[0]}×{part[1]}, which have more than {MAX_DECODED_PIXELS} pixels"
        offsets, counts = TiffImagePlugin.TILEOFFSETS, _TILE_BYTE_COUNTS
    lengths = tags.get(counts, ())
    places = zip(tags.get(offsets, ()), lengths, strict=False)
    if sum(min(length, max(len(raw) - start, 0)) for start, length in places) > _MAX_OVERLAP * len(raw):
        return "has parts that overlap"
    is_jpeg = image.info.get("compression") in ("jpeg", "tiff_jpeg")
    if is_jpeg and 4 * _markers(raw) * max(part[0] * part[1], _LEAST_SCAN) > _MAX_SCAN_PIXELS:
        starts = tags.get(offsets, ())
        lengths = lengths if len(lengths) == len(starts) else (0,) * len(starts)
        scans: dict[tuple[int, int], int] = {}
        total = 0
        for place in zip(starts, lengths, strict=True):
            if place not in scans:
                start, length = place
                scans[place] = _scan_pixels(raw[start : start + length] if length else raw[start:], part[0] * part[1])
            total += scans[place]
            if total > _MAX_SCAN_PIXELS:
                return "has more scans than are decoded at this size"
    return None


def _scan_pixels(raw: bytes, pixels: int) -> int:
    """How many pixels a JPEG decodes, each scan and each colour in it counted."""
    each = max(pixels, _LEAST_SCAN)
    if (most := 4 * _markers(raw) * each) <= _MAX_SCAN_PIXELS:  # found at once: a scan has four colours at most
        return most
    total = 0
    for marker, start in _segments(raw, None):
        if marker == 0xDA:
            total += max(raw[start + 2], 1) * each if start + 2 < len(raw) else each
            if total > _MAX_SCAN_PIXELS:
                break
    return total


def _markers(raw: bytes) -> int:
    """How often the marker of a scan stands anywhere: 0.3 ms a megabyte, a third of what `bytes.count` takes."""
    values = np.frombuffer(raw, np.uint8)
    return int(np.count_nonzero(values[1:][values[:-1] == 0xFF] == 0xDA))


def _segments(raw: bytes, most: int | None) -> Iterator[tuple[int, int]]:
    """Marker and place of the segments of a JPEG, up to its end; with `most` so many of those before the first scan."""
    place = 2
    number = 0
    while (place := raw.find(b"\xff", place)) >= 0 and place + 1 < len(raw):
        marker = raw[place + 1]
        if marker in (0, 0xFF):
            place += 1 + (marker == 0)  # a byte of the pixels, or a filler
            continue
        place += 2
        if 0xD0 <= marker <= 0xD8 or 0xF0 <= marker <= 0xFD or marker in (1, 0xC8):  # stand alone, or are errors
            continue
        if marker == 0xD9:
            return
        yield marker, place
        number += 1
        if most is not None and (number >= most or marker == 0xDA):
            return
        if place + 2 <= len(raw):
            place += struct.unpack_from(">H", raw, place)[0]
