"""What a file may ask of the machine is known before it is decoded: small files of much work are refused, by name."""

import ast
import io
import struct
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import m0kit
import m0kit_export
import m0kit_parity
import m0kit_quant
from m0kit.errors import ImageError
from m0kit.reading.decoding import MAX_DECODED_PIXELS, load, open_image
from m0kit.reading.inputs import parse_content
from m0kit.scoring.image import resize
from m0kit_parity.samples.checkpoints import model_config

WHERE = "pair 3: document"
SIDE = 9400  # of a square just under the limit of pixels


def test_an_image_is_opened_in_one_place() -> None:
    """Where Pillow may choose the format itself it knows some that run programs."""
    found = []
    for package in (m0kit, m0kit_export, m0kit_quant, m0kit_parity):
        folder = Path(str(package.__file__)).parent
        for path in folder.rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text("utf-8"))):
                if isinstance(node, ast.Attribute) and node.attr == "open" and "Image" in ast.unparse(node.value):
                    found.append(f"{folder.name}/{path.name}: {ast.unparse(node)}")
                assert not (isinstance(node, ast.alias) and node.name in ("ImageFile", "EpsImagePlugin", "ImageGrab"))
    assert found == ["m0kit/decoding.py: Image.open"]


# --- generators: files that ask for much -------------------------------------------------------------


def jpeg(width: int, height: int, scans: int, *, components: int = 1, kind: int = 0xC2, before: bytes = b"") -> bytes:
    """A JPEG whose scans hold nothing; `kind` is the marker of its frame, progressive by default."""
    frame = struct.pack(">BHHB", 8, height, width, components)
    frame += b"".join(bytes([i + 1, 0x11, 0]) for i in range(components))
    first = bytes([components, *(b for i in range(components) for b in (i + 1, 0))])
    first += b"\0\0\0" if kind == 0xC2 else b"\0\x3f\0"
    body = before + segment(0xDB, b"\0" + b"\1" * 64) + segment(kind, frame)
    body += segment(0xC4, b"\x00\1" + bytes(15) + b"\0") + segment(0xC4, b"\x10\1\1" + bytes(14) + b"\xe0\0")
    body += segment(0xDA, first) + b"\0" * 20
    body += (segment(0xDA, b"\1\1\0\1\x3f\0") + b"\x7f\xfe" * 8) * (scans - 1)
    return b"\xff\xd8" + body + b"\xff\xd9"


def segment(marker: int, body: bytes) -> bytes:
    return b"\xff" + bytes([marker]) + struct.pack(">H", len(body) + 2) + body


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(width: int, height: int, extra: bytes = b"") -> bytes:
    rows = zlib.compress((b"\0" + bytes(3 * width)) * height) if width * height < 10**6 else zlib.compress(bytes(999))
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + extra + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def run_length_bmp(width: int, height: int) -> bytes:
    """One pixel of each row, then its end: the rest is left for the reader to fill."""
    colours = bytes(1024)
    body = b"\1\0\0\0" * height
    start = 14 + 40 + len(colours)
    head = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 8, 1, len(body), 0, 0, 0, 0)
    return b"BM" + struct.pack("<IHHI", start + len(body), 0, 0, start) + head + colours + body


def tiff(tags: dict[int, list[int]], data: bytes = b"") -> bytes:
    """Little-endian, all values in 32 bits; the data stand behind the tags, and a value of −1 is their place."""
    ends = 8 + 2 + 12 * len(tags) + 4
    place = ends + sum(4 * len(values) for values in tags.values() if len(values) > 1)
    entries = body = b""
    for tag, values in sorted(tags.items()):
        raw = struct.pack(f"<{len(values)}I", *(place if value == -1 else value for value in values))
        entries += struct.pack("<HHI", tag, 4, len(values)) + (
            raw if len(raw) == 4 else struct.pack("<I", ends + len(body))
        )
        body += raw if len(raw) > 4 else b""
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4) + body + data


def grey_tiff(width: int, height: int, compression: int, extra: dict[int, list[int]], data: bytes = b"") -> bytes:
    return tiff({256: [width], 257: [height], 258: [8], 259: [compression], 262: [1], 277: [1], **extra}, data)


def saved(kind: str, width: int, height: int) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (width, height), (9, 9, 9)).save(out, kind, **({"lossless": True} if kind == "WEBP" else {}))
    return out.getvalue()


def other_claim(avif: bytes, width: int, height: int) -> bytes:
    start = avif.index(b"ispe") + 8
    return avif[:start] + struct.pack(">II", width, height) + avif[start + 8 :]


def frames_again(avif: bytes, times: int) -> bytes:
    """The one image's frame so many times, as those are that come before the one that is shown."""
    start = avif.index(b"mdat") + 4
    sequence = avif[start + 2 :][: 2 + avif[start + 3]]  # behind a delimiter
    frame = avif[start + 2 + len(sequence) :]
    if avif[start] != 0x12:
        sequence, frame = avif[start : start + 2 + avif[start + 1]], avif[start + 2 + avif[start + 1] :]
    more = frame * (times - 1)
    place = avif.index(b"iloc") + 4 + 4 + 2 + 2 + 2 + 2 + 2  # version, widths, items, id, source, extents
    place += 4
    (length,) = struct.unpack_from(">I", avif, place)
    grown = avif[:place] + struct.pack(">I", length + len(more)) + avif[place + 4 :]
    box = start - 8
    grown = grown[:box] + struct.pack(">I", len(avif) - box + len(more)) + grown[box + 4 :]
    return grown + more


SCANS = jpeg(SIDE, 400, 90)
COSTLY: dict[str, tuple[Callable[[], bytes], str]] = {
    "a row of pixels": (lambda: png(70_000_000, 1), "too narrow"),
    "a column of pixels": (lambda: png(1, 70_000_000), "too narrow"),
    "a row in PPM": (lambda: b"P6 70000000 1 255\n", "too narrow"),
    "a row in GIF": (lambda: b"GIF89a\xff\xff\1\0\0\0\0,\0\0\0\0\xff\xff\1\0\0\2\1\0\0;", "too narrow"),
    "a row in TIFF": (lambda: grey_tiff(80_000_000, 1, 8, {273: [8], 279: [9]}), "too narrow"),
    "scans": (lambda: jpeg(SIDE, SIDE, 100), "more scans than are decoded at this size"),
    "scans of a small image": (lambda: jpeg(64, 64, 38_000), "more scans than are decoded at this size"),
    "segments": (lambda: jpeg(64, 64, 1, before=segment(0xE1, b"Exif\0\0 ") * 5000), "more than 4096 segments"),
    "segments in a segment": (
        lambda: jpeg(64, 64, 1, before=segment(0xF0, segment(0xE1, b"Exif\0\0 ") * 5000)),
        "more than 4096 segments"),
    "run lengths": (lambda: run_length_bmp(SIDE, SIDE), "compressed by run lengths; such a one may have 16000000"),
    "comments": (lambda: b"P3 600 600 255\n" + b"#\n" * 5000, "more than 1000 comments"),
    "profiles": (
        lambda: png(64, 64, chunk(b"iCCP", b"a\0\0" + zlib.compress(bytes(10**6))) * 50),
        "has 50 colour profiles"),
    "a WebP canvas": (lambda: saved("WEBP", SIDE, SIDE), r"has too few bytes \(\d+\) for so many pixels"),
    "an AVIF frame": (lambda: other_claim(saved("AVIF", 4000, 3000), 64, 64), "frames of more than 8 times its pixels"),
    "AVIF frames that are not shown": (
        lambda: frames_again(saved("AVIF", 2000, 1500), 40), "frames of more than 8 times its pixels"),
    "a TIFF tile": (
        lambda: grey_tiff(64, 64, 8, {322: [40_000], 323: [40_000], 324: [-1], 325: [9]}, bytes(9)),
        "tiles of 40000×40000"),
    "TIFF strips over each other": (
        lambda: grey_tiff(70, 70, 1, {273: [-1] * 9, 278: [69], 279: [4900] * 9}, bytes(4900)), "parts that overlap"),
    "TIFF tiles of a pixel": (
        lambda: grey_tiff(70, 70, 1, {322: [1], 323: [1], 324: [-1] * 4900}, bytes(99)), "in 4900 parts"),
    "TIFF strips of one place": (
        lambda: grey_tiff(70, 5000, 8, {273: [-1] * 5000, 278: [1], 279: [40_000] * 5000}, bytes(40_000)),
        "parts that overlap"),
    "scans in a TIFF": (
        lambda: grey_tiff(SIDE, 400, 7, {273: [-1], 279: [len(SCANS)]}, SCANS * 9), ""),
    "scans in each strip of a TIFF": (
        lambda: grey_tiff(SIDE, SIDE, 7, {273: [-1] * 23 + [8], 278: [400], 279: [len(SCANS)] * 24}, SCANS * 9),
        "more scans than are decoded at this size"),
    "scans in a strip without a length": (
        lambda: grey_tiff(SIDE, SIDE, 7, {273: [-1]}, jpeg(SIDE, SIDE, 100)), "more scans than are decoded"),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("case", COSTLY)
def test_a_small_file_of_much_work_is_refused_before_it_is_decoded(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    make, said = COSTLY[case]
    raw = make()
    assert len(raw) < 1 << 20
    if not said:
        open_image(raw, WHERE)  # one part of those that are refused below
        return

    def decode(*_: object) -> None:
        pytest.fail("decoded")

    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", decode)
    monkeypatch.setattr("PIL.TiffImagePlugin.TiffImageFile.load", decode)
    with pytest.raises(ImageError, match=f"^{WHERE}: .*{said}"):
        resize(parse_content(raw, WHERE), model_config("tiny").image, WHERE)  # type: ignore[arg-type]


def photograph(width: int, height: int) -> Image.Image:
    values = np.random.default_rng(0).integers(0, 256, (height // 8, width // 8, 3), np.uint8)
    return Image.fromarray(values).resize((width, height))


TYPICAL: list[tuple[str, dict[str, object]]] = [
    ("JPEG", {}),
    ("JPEG", {"progressive": True, "optimize": True, "subsampling": 0}),
    ("JPEG", {"restart_marker_rows": 1}),
    *((kind, {}) for kind in ("PNG", "WEBP", "GIF", "BMP", "PPM")),
    ("AVIF", {"speed": 10}),
    *(("TIFF", {"compression": name}) for name in ("raw", "tiff_lzw", "tiff_adobe_deflate", "packbits", "zstd")),
    *(("TIFF", {"compression": "jpeg", "strip_size": size}) for size in (1 << 14, 1 << 16, 1 << 22)),
]


@pytest.mark.parametrize(("kind", "options"), TYPICAL)
def test_what_programs_write_is_decoded(kind: str, options: dict[str, object]) -> None:
    out = io.BytesIO()
    photograph(1600, 1200).save(out, kind, **options)  # type: ignore[arg-type]
    image = open_image(out.getvalue(), WHERE)
    load(image, WHERE)
    assert image.size == (1600, 1200)


def test_a_progressive_image_at_the_limit_of_pixels_may_have_the_scans_that_encoders_write() -> None:
    open_image(jpeg(SIDE, SIDE, 22, components=3), WHERE)
    with pytest.raises(ImageError, match="more scans"):
        open_image(jpeg(SIDE, SIDE, 23, components=3), WHERE)
    assert SIDE * SIDE < MAX_DECODED_PIXELS < (SIDE + 60) ** 2


def test_what_stands_behind_the_end_of_a_jpeg_is_not_decoded() -> None:
    """As further images do, in the files of some cameras."""
    open_image(jpeg(SIDE, SIDE, 2) + jpeg(64, 64, 60), WHERE)
    open_image(jpeg(SIDE, SIDE, 2, before=segment(0xE1, jpeg(64, 64, 60))), WHERE)  # nor what stands in its metadata


def memory_that_is_out(*_: object, **__: object) -> Iterator[None]:
    raise MemoryError


def test_a_lack_of_memory_is_the_files_fault_where_its_pixels_have_room(monkeypatch: pytest.MonkeyPatch) -> None:
    image = open_image(png(50, 50), WHERE)
    monkeypatch.setattr(image, "load", memory_that_is_out)
    with pytest.raises(ImageError, match=rf"^{WHERE}: the PNG file \(50×50\) is damaged"):
        load(image, WHERE)
    monkeypatch.setattr(Image, "new", memory_that_is_out)
    with pytest.raises(MemoryError):
        load(image, WHERE)
