"""What a file that someone names holds: text or an image. Owns the rule for text, and what tells formats apart.

    read(Path("notes.txt"))  # → its text
    read(Path("page.png"))   # → the path, an image; not decoded here

A file is what its content is, and its name must not deny it: text that is called .png, or an image that is called
.txt, is an error. Valid UTF-8 without a null byte is text; an image is known by its first bytes.
"""

import re
from pathlib import Path
from typing import Final

from m0kit.errors import FormatError, ImageError, InputError
from m0kit.files import open_regular

# Formats that are handed to Pillow; the others it knows are rare, or run programs (EPS), or are lists of other files.
FORMATS: Final = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF")
# Of a file of text: as much as of a line of JSON. A prompt keeps a megabyte of one at most.
MAX_TEXT_BYTES: Final = 256 << 20
# Of an image: 8 bytes (four channels of 16 bits) for each of the 89 million pixels that are decoded, and a third more.
MAX_IMAGE_BYTES: Final = 1 << 30
MARK: Final = b"\xef\xbb\xbf"  # UTF-8's byte order mark
_HEAD_BYTES: Final = 4096  # enough to tell any format
_IMAGE_NAMES: Final = frozenset({
    ".png", ".apng", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".gif", ".bmp", ".dib", ".tif", ".tiff", ".ppm",
    ".pgm", ".pbm", ".pnm", ".avif",
})  # fmt: skip
_PLAIN_PPM_NAMES: Final = frozenset((".ppm", ".pgm", ".pbm", ".pnm"))  # images that may be written in letters
_TEXT_NAMES: Final = frozenset({
    ".txt", ".text", ".md", ".markdown", ".rst", ".html", ".htm", ".xml", ".json", ".csv", ".tsv", ".log", ".tex",
})  # fmt: skip
_OTHER_NAMES: Final = frozenset({
    ".pdf", ".ps", ".eps", ".doc", ".docx", ".odt", ".rtf", ".xls", ".xlsx", ".ods", ".ppt", ".pptx", ".odp", ".epub",
    ".mobi", ".djvu", ".svg", ".svgz", ".heic", ".heif", ".jxl", ".jp2", ".ico", ".psd", ".xcf", ".mp3", ".mp4",
    ".m4a", ".mov", ".avi", ".mkv", ".webm", ".wav", ".flac", ".ogg", ".zip", ".gz", ".tgz", ".bz2", ".xz", ".zst",
    ".7z", ".rar", ".tar", ".jar", ".whl", ".parquet", ".pq", ".arrow", ".feather", ".sqlite", ".sqlite3", ".npy",
    ".npz", ".safetensors", ".onnx", ".gguf", ".ttf", ".otf", ".woff", ".woff2",
})  # fmt: skip
_PDF: Final = b"%PDF-"
_PDF_HEAD_BYTES: Final = 1024  # where others, and PDFium, look for the mark
_A_PDF: Final = "a PDF"
_LETTERS: Final = ((_PDF, _A_PDF), (b"{\\rtf", "RTF"), (b"%!PS", "PostScript"))  # formats written in letters
_OTHERS: Final = (
    (b"PK\x03\x04", "a ZIP archive, as Office documents are"),
    (b"\xd0\xcf\x11\xe0", "an Office document"),
    (b"\x1f\x8b", "compressed (gzip)"),
    (b"BZh", "compressed (bzip2)"),
    (b"\xfd7zXZ", "compressed (xz)"),
    (b"\x28\xb5\x2f\xfd", "compressed (Zstandard)"),
    (b"7z\xbc\xaf", "a 7-Zip archive"),
    (b"Rar!", "a RAR archive"),
    (b"PAR1", "Parquet"),
    (b"SQLite format 3", "an SQLite database"),
    (b"8BPS", "a Photoshop file"),
    (b"\x00\x00\x01\x00", "an icon"),
    (b"\x00\x00\x00\x0cJXL ", "JPEG XL"),
    (b"\x00\x00\x00\x0cjP  ", "JPEG 2000"),
)
_POINTER: Final = b"version https://git-lfs.github.com/spec/"
_WHAT_TO_DO: Final = "m0kit reads text, images and PDFs: render its pages to PNG, or take its text out."
_PAGES: Final = "One text or image is read here: give a page of it as PNG."


def read(path: Path, *, named: bool = False) -> str | Path | bytes:
    """The text of a file; for an image the path, or what came through a pipe, as a file `named` by a person may be one.

    Raises FormatError for what is neither, ImageError for an image's name without an image, InputError for the rest.
    """
    suffix = path.suffix.lower()
    try:
        with path.open("rb") if named else open_regular(path) as file:
            is_pipe = named and not path.is_file()  # what comes through a pipe comes once
            raw = file.read(_HEAD_BYTES) or b""
            text = _is_text(raw, cut=True)
            most = MAX_TEXT_BYTES if text else MAX_IMAGE_BYTES
            if text or (is_pipe and image_format(raw)):
                raw += file.read(most + 1 - len(raw)) or b""
    except OSError as error:
        raise InputError(f"{path}: {error.strerror or 'cannot be read'}.") from None
    except ValueError:  # a null character, or half of a surrogate pair
        raise InputError(f"{str(path)!r} cannot be the name of a file.") from None
    if len(raw) > most:
        raise InputError(f"{path}: has more than the {most >> 20} MiB that are read of it.")
    found = parse(raw, str(path), suffix)
    return found if isinstance(found, str) or is_pipe else path


def parse(raw: bytes, place: str, suffix: str = "") -> str | bytes:
    """The text that a file's bytes hold, or the bytes if they are an image; `suffix` is how its name ends.

    Raises as `read` does, naming `place`.
    """
    if (what := _foreign(raw, suffix)) is not None:
        raise FormatError(f"{place}: is {what}. {_PAGES if what == _A_PDF else _WHAT_TO_DO}")
    image = image_format(raw)
    if _is_text(raw) and not (suffix in _PLAIN_PPM_NAMES and image):
        if suffix in _IMAGE_NAMES | _OTHER_NAMES or raw.removeprefix(MARK).startswith(_POINTER):
            kind = ImageError if suffix in _IMAGE_NAMES else InputError
            but = f"its name ends with {suffix}, but " if suffix else ""
            raise kind(f"{place}: {but}it holds {_letters(raw)}." if raw else f"{place}: {but}it is empty.")
        return text_of(raw)
    if image and suffix in _TEXT_NAMES | _OTHER_NAMES:
        raise InputError(f"{place}: its name ends with {suffix}, but it holds an image ({image}). Rename it.")
    if image or suffix in _IMAGE_NAMES:
        return raw
    if (said := not_utf8(raw)) is not None:
        raise InputError(f"{place}: {said}")
    raise FormatError(f"{place}: is neither text nor an image. Accepted: {', '.join(FORMATS)}.")


def text_of(raw: bytes) -> str:
    r"""What a text file says: UTF-8 without its byte order mark, every line end as \n, and the last one left out.

    The same text, whatever an editor or git makes of its file. Raises UnicodeDecodeError.
    """
    text = raw.removeprefix(MARK).decode("utf-8")
    return text.replace("\r\n", "\n").replace("\r", "\n").removesuffix("\n")


def read_text(path: Path) -> str:
    """The text of a file, by the same rules. Raises InputError for an image."""
    found = read(path)
    if isinstance(found, str):
        return found
    raise InputError(f"{path}: is an image. Give a text file in UTF-8.")


def image_format(raw: bytes) -> str | None:
    """The name of a format in FORMATS that these bytes begin as. Text may look like PPM."""
    if raw.startswith(b"\x89PNG\r\n"):
        return "PNG"
    if raw.startswith(b"\xff\xd8\xff"):
        return "JPEG"
    if raw.startswith((b"GIF87a", b"GIF89a")):
        return "GIF"
    if raw[:4] == b"RIFF" and raw[8:12] == b"WEBP":
        return "WEBP"
    if raw[:2] == b"BM" and int.from_bytes(raw[14:18], "little") in (12, 40, 52, 56, 64, 108, 124):  # size of a header
        return "BMP"
    if raw.startswith((b"II*\x00", b"MM\x00*", b"II+\x00", b"MM\x00+")):
        return "TIFF"
    if raw[4:8] == b"ftyp" and b"avi" in _brands(raw):
        return "AVIF"
    return "PPM" if re.match(rb"P[1-6]\s(?:\s|#[^\n]*\n)*\d", raw) else None


def is_pdf(head: bytes, place: str, suffix: str = "") -> bool:
    """Whether a file is a PDF, by its first bytes; one that is called .pdf may have others before the mark.

    Raises InputError naming `place` where its name says that it is something else.
    """
    if not head.removeprefix(MARK).startswith(_PDF):
        return suffix == ".pdf" and _PDF in head[:_PDF_HEAD_BYTES]
    if suffix in (_TEXT_NAMES | _IMAGE_NAMES | _OTHER_NAMES) - {".pdf"}:
        raise InputError(f"{place}: its name ends with {suffix}, but it holds a PDF. Rename it.")
    return True


def described(raw: bytes) -> str:
    """A sentence on bytes that should be an image and are none; nothing where there is no sign of what they are."""
    if (what := _foreign(raw, "")) is not None:
        return f" They are {what}: render it to PNG."
    return f" They are {_letters(raw)}." if raw and _is_text(raw) else ""


def _letters(raw: bytes) -> str:
    """What text is that stands in the place of a file, and what to do."""
    head = raw[:_HEAD_BYTES].removeprefix(MARK).lstrip().lower()
    if head.startswith(_POINTER):
        return "a Git LFS pointer, not the file itself: run `git lfs pull`"
    if head.startswith((b"<!doctype html", b"<html")):
        return "a web page in place of the file: download it again"
    return "an SVG drawing: render it to PNG" if b"<svg" in head else "text"


def not_utf8(raw: bytes) -> str | None:
    """What text in another encoding than UTF-8 is, and what to do; None for UTF-8 and for what is no text."""
    head = raw[:_HEAD_BYTES]
    what = None
    if head.startswith((b"\xff\xfe\x00\x00", b"\x00\x00\xfe\xff")):
        what = "UTF-32"
    elif head.startswith((b"\xff\xfe", b"\xfe\xff")):
        what = "UTF-16"
    elif head[:1] and (head[1:2] == b"\0" or head[:1] == b"\0"):  # letters and null bytes by turns
        for name, step in (("utf-16-le", 2), ("utf-16-be", 2), ("utf-32-le", 4), ("utf-32-be", 4)):
            some = head[: len(head) // step * step].decode(name, "replace").rstrip("�")
            plain = sum(c.isascii() for c in some)
            if some and plain >= len(some) / 2 and all(c.isprintable() or c in "\r\n\t" for c in some):
                what = name[:6].upper()
    if what is not None:
        return f"is {what}. Save it as UTF-8."
    if b"\0" in raw:
        return None
    try:
        raw.decode("utf-8")
    except UnicodeDecodeError as error:
        controls = sum(byte < 32 and byte not in b"\t\n\f\r\x1b" for byte in head)
        if controls > len(head) / 100:
            return None
        return (
            f"is not UTF-8 text (byte {error.start} is 0x{raw[error.start]:02X}); it may be Latin-1 or Windows-1252. "
            "Save it as UTF-8."
        )
    return None


def no_text(head: bytes) -> str | None:
    """What a file is that should hold lines of text and cannot, by its first bytes; None if there is no sign of it."""
    head = head[:_HEAD_BYTES]
    if (what := _foreign(head, "")) is not None:
        return f"is {what}. Give text in UTF-8."
    if (image := image_format(head)) and not _is_text(head, cut=True):
        return f"is an image ({image}). Give text in UTF-8."
    return not_utf8(head) if b"\0" in head or head.startswith((b"\xff\xfe", b"\xfe\xff")) else None


def _foreign(raw: bytes, suffix: str) -> str | None:
    """The name of a format that is neither text nor one of FORMATS; None if there is no sign of one."""
    for start, what in _LETTERS:
        if raw.removeprefix(MARK).startswith(start):
            return what
    if raw[4:8] == b"ftyp" and b"avi" not in (brands := _brands(raw)):
        return "HEIC" if b"hei" in brands or b"mif1" in brands else "a film or sound"
    if image_format(raw) or _is_text(raw[:_HEAD_BYTES], cut=len(raw) >= _HEAD_BYTES):
        return "an SVG drawing" if suffix == ".svg" and b"<svg" in raw[:_HEAD_BYTES] else None
    for start, what in _OTHERS:
        if raw.startswith(start):
            return what
    return f"a file of the kind {suffix}" if suffix in _OTHER_NAMES else None


def _brands(raw: bytes) -> bytes:
    """The names of formats in the first box of an ISO media file (AVIF, HEIC, MP4)."""
    return raw[8 : min(int.from_bytes(raw[:4]), 256)]


def _is_text(raw: bytes, *, cut: bool = False) -> bool:
    """Valid UTF-8 without a null byte; what is `cut` may end within a character."""
    if b"\0" in raw:
        return False
    try:
        raw.decode("utf-8")
    except UnicodeDecodeError as error:
        return cut and error.start > len(raw) - 4 and error.reason == "unexpected end of data"
    return True
