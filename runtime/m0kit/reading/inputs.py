"""What a caller may pass as query, document and pair, and what it means. Owns the forms, not the decoding.

    parse_pair(("slm markdown", Path("page.png")))

A str is always text: never sniffed as a path or URL. An image is a PIL image, a path, bytes, a page of a PDF, or
{"image": one of these, a base64 data URI, or an image's bytes in base64}; {"text": str} is text said explicitly;
{"id": str} is a document of the index that a reranker was opened with. In a file of JSON lines or Parquet the string
of an image may also be a path, see `from_file`. No network, ever.
"""

import base64
import binascii
import hashlib
import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final
from urllib.parse import unquote

import numpy as np
from PIL import Image

from m0kit.errors import ImageError, InputError
from m0kit.files import read_regular
from m0kit.reading.formats import MAX_IMAGE_BYTES, image_format
from m0kit.reading.pdf import PdfPage

_SCHEME: Final = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")
_MAX_PATH: Final = 4096  # characters; Linux's limit, and more than others have


@dataclass(frozen=True, slots=True)
class Text:
    """Text, not empty."""

    text: str


@dataclass(frozen=True, slots=True)
class Picture:
    """An image not yet decoded. Equal keys within one call mean the same picture."""

    # The bytes of a file, an image as it is, a file that is read when it is needed, or what reads its bytes then, told
    # where in the call the picture stands.
    source: bytes | Image.Image | Path | Callable[[str], bytes]
    key: str
    ready: bool = False  # a PNG of the very pixels that the model will see
    path: Path | None = None  # where the bytes can be read again


@dataclass(frozen=True, slots=True)
class Known:
    """A document of an index."""

    id: str


Content = Text | Picture | Known


@dataclass(frozen=True, slots=True)
class Pair:
    """One query and one document."""

    query: Content
    document: Content


# A document with its name: id; content, or the InputError that says why there is none; where it came from.
Given = tuple[str, Any, str]


def is_many(value: Any) -> bool:
    """Whether its items can be meant, and not itself."""
    single = (str, bytes, bytearray, memoryview, Mapping, os.PathLike, Image.Image)
    return isinstance(value, Iterable) and not isinstance(value, single)


def check_many(value: Any, what: str, expected: str) -> None:
    """Raises InputError where `value` is one thing and not, as it should be, `expected`: a string is no list."""
    if not is_many(value):
        one = what.removesuffix("s")
        raise InputError(
            f"{what}: expected {expected}, got {type(value).__name__}. "
            f"To pass one {one}, pass a list that holds it: [{one}]."
        )


def as_list(value: Any, what: str, expected: str) -> list[Any]:
    """The items of `value`. Raises InputError as `check_many` does."""
    check_many(value, what, expected)
    return list(value)


def parse_pair(value: Any) -> Pair:
    """(query, document) or {"query": …, "document": …}. Raises InputError, which tells the side."""
    if isinstance(value, Mapping):
        _check_keys(value, {"query", "document"}, "")
        if len(value) < 2:
            raise InputError(f'expected both "query" and "document", got only {_names(value)}.')
        query, document = value["query"], value["document"]
    elif isinstance(value, list | tuple) or (isinstance(value, np.ndarray) and value.ndim == 1):
        if len(value) != 2:
            raise InputError(f"expected (query, document), got {len(value)} items.")
        query, document = value.tolist() if isinstance(value, np.ndarray) else value  # a row of a table
    else:
        raise InputError(
            f"expected (query, document), got {type(value).__name__}. To score one pair, pass a list that holds it."
        )
    return Pair(parse_content(query, "query"), parse_content(document, "document"))


def from_file(value: Any, folder: Path) -> Any:
    """A query or document as `parse_content` takes it, from a value of a JSON or Parquet file in `folder`.

    Null is absent; an image may be {"bytes", "path"}, as Hugging Face datasets have it, with bytes in base64 in JSON.
    The string of an image is a data URI, else the path of a file, relative to `folder`, else an image in base64.
    """
    if not isinstance(value, Mapping):
        return value
    value = {name: part for name, part in value.items() if part is not None}
    if value and value.keys() <= {"bytes", "path"}:
        value = {"image": value}
    image = value.get("image")
    if isinstance(image, Mapping) and image.keys() <= {"bytes", "path"}:
        raw = image.get("bytes")
        if isinstance(raw, str) and (raw := base64_image(raw)) is None:
            raise ImageError('the "bytes" of the image are no image in base64.')
        image = value["image"] = image.get("path") if raw is None else raw
    if not isinstance(image, str) or is_data_uri(image):
        return value
    if not image:
        raise ImageError("the string of the image is empty. Name a file, or give a data URI.")
    refuse_url(image)
    raw = base64_image(image)
    if raw is None and len(image) > _MAX_PATH:
        raise ImageError(f"{shown(image)} ({len(image)} characters) is no path, no data URI and no image in base64.")
    return {**value, "image": folder / image if raw is None or _is_file(folder / image) else raw}


def refuse_url(name: str) -> None:
    """Raises ImageError for what should name a file and is a URL."""
    if _SCHEME.match(name):
        raise ImageError(f"{shown(name)} is a URL, and m0kit fetches nothing. Download it and name the file.")


def group_from_file(record: Mapping[str, Any], folder: Path) -> tuple[Any, list[Any]]:
    """Query and documents of a record {"query": …, "documents": […]} or {"query": …, "document": …} of a file.

    Each was parsed, as a sign that it can be; images were not decoded. Keys besides these are the caller's.
    Raises InputError.
    """
    query, document, documents = (record.get(name) for name in ("query", "document", "documents"))
    if query is None or (document is None) == (documents is None):
        names = _names(name for name in record if record[name] is not None)
        raise InputError(f'expected "query" with "document" or "documents", got {names}.')
    if documents is not None and not (isinstance(documents, list) and documents):
        raise InputError(f'"documents" must be a list with something in it, got {shown(documents)}.')
    if documents is None:
        found = [("query", query), ("document", document)]
    else:
        found = [("query", query), *((f"document {i}", document) for i, document in enumerate(documents, 1))]
    contents = []
    for where, value in found:
        try:
            contents.append(from_file(value, folder))
        except ImageError as error:
            raise ImageError(error.reason, where=where) from None
        if isinstance(parse_content(contents[-1], where), Known):
            raise InputError("names a document of an index, and there is none here. Give the document.", where=where)
    return contents[0], contents[1:]


def shown(value: Any) -> str:
    """A value in a message, never at length."""
    told = repr(value[:60] if isinstance(value, str | bytes) else value)
    cut = len(told) > 60 or (isinstance(value, str | bytes) and len(value) > 60)
    return f"{told[:60]}…" if cut else told


def parse_content(value: Any, where: str) -> Content:
    """One query or document. Raises InputError or ImageError naming `where`."""
    if isinstance(value, str):
        return _text(value, where)
    if isinstance(value, Mapping):
        _check_keys(value, {"text", "image", "id"}, where)
        if len(value) != 1:
            raise InputError(
                f'expected {{"text": …}}, {{"image": …}} or {{"id": …}}, got {_names(value)}. '
                "The model was trained on one of them per document.",
                where=where,
            )
        if "id" in value:
            if not isinstance(value["id"], str):
                raise InputError(f'"id" must be a string, got {type(value["id"]).__name__}.', where=where)
            return Known(value["id"])
        if "text" in value:
            if not isinstance(value["text"], str):
                raise InputError(f'"text" must be a string, got {type(value["text"]).__name__}.', where=where)
            return _text(value["text"], where)
        if isinstance(value["image"], str):
            return _file(_image_string(value["image"], where))
        return _picture(value["image"], where)
    return _picture(value, where)


def _text(text: str, where: str) -> Text:
    if not text:
        raise InputError("is empty. Give some text, or leave the pair out.", where=where)
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InputError(
            f"character {error.start} is half of a surrogate pair, not valid Unicode. "
            "Decode the text again from its bytes, or replace it.",
            where=where,
        ) from None
    return Text(text)


def _picture(value: Any, where: str) -> Picture:
    if isinstance(value, Image.Image):
        return Picture(value, f"object {id(value)}")
    if isinstance(value, bytes | bytearray | memoryview):
        return _file(bytes(value))
    if isinstance(value, os.PathLike):
        path = Path(os.fsdecode(value))
        try:
            return replace(_file(read_regular(path, MAX_IMAGE_BYTES)), path=path)
        except OSError as error:
            raise ImageError(f"{error.strerror}.", where=at(where, path)) from None
        except ValueError:  # a null character, or half of a surrogate pair
            raise ImageError(f"{str(path)!r} cannot be the name of a file.", where=where) from None
    if isinstance(value, PdfPage):
        if value.error is not None:
            raise InputError(value.error.reason, where=f"{where}: {value.error.where}" if where else value.error.where)
        return _file(value.png)
    raise InputError(
        f"expected text (str), an image (PIL image, Path, bytes), "
        f'{{"text": …}} or {{"image": …}}; got {type(value).__name__}.',
        where=where,
    )


def _file(raw: bytes) -> Picture:
    return Picture(raw, hashlib.sha256(raw).hexdigest())


def at(where: str, path: Path | None) -> str:
    """The place of an image in a message: its file is named once."""
    return where if path is None or where == str(path) else f"{where}: {path}"


def is_data_uri(text: str) -> bool:
    """Whether it says to be one."""
    return text.lstrip()[:5].lower() == "data:"


def _image_string(text: str, where: str) -> bytes:
    """The bytes of a data URI in base64, or of an image that is base64 itself. The media type is not believed."""
    if not is_data_uri(text):
        raw = base64_image(text)
        if raw is None:
            raise ImageError(
                'a string under "image" must be a data URI (data:image/png;base64,…) or an image in base64. '
                "Pass a file as Path(…); fetch a URL yourself and pass its bytes.",
                where=where,
            )
        return raw
    head, comma, body = text.partition(",")
    if not comma or head.split(";")[-1].strip().lower() != "base64":
        raise ImageError(f"a data URI must be in base64 (data:image/png;base64,…), got {shown(text)}.", where=where)
    raw = from_base64(unquote(body) if "%" in body else body)
    if raw is None:
        raise ImageError("the data URI is not valid base64.", where=where)
    return raw


def base64_image(text: str) -> bytes | None:
    """The bytes of an image in base64, if they begin as one does that m0kit reads."""
    start = from_base64("".join(text[:200].split())[:64])
    return None if start is None or image_format(start) is None else from_base64(text)


def from_base64(text: str) -> bytes | None:
    """Base64 in either alphabet, with blanks or line breaks, padded or not."""
    body = "".join(text.split()).rstrip("=").replace("-", "+").replace("_", "/")
    try:
        return base64.b64decode(body + "=" * (-len(body) % 4), validate=True)
    except (binascii.Error, ValueError):
        return None


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # too long to be a name, or no name at all
        return False


def _check_keys(value: Mapping[Any, Any], known: set[str], where: str) -> None:
    if unknown := [key for key in value if key not in known]:
        raise InputError(
            f"unknown key {_names(unknown)}. Known are {_names(sorted(known, reverse=True))}.", where=where
        )


def _names(keys: Any) -> str:
    return ", ".join(repr(key)[:40] for key in keys) or "nothing"
