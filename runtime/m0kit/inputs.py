"""What a caller may pass as query, document and pair, and what it means. Owns the forms, not the decoding.

    parse_pair(("slm markdown", Path("page.png")), "pair 0")

A str is always text: never sniffed as a path or URL. An image is a PIL image, a path, bytes, or
{"image": one of these or a base64 data URI}; {"text": str} is text said explicitly; {"id": str} is a document of
the index that a reranker was opened with. No network, ever.
"""

import base64
import binascii
import hashlib
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from m0kit.errors import ImageError, InputError


@dataclass(frozen=True, slots=True)
class Text:
    """Text, not empty."""

    text: str


@dataclass(frozen=True, slots=True)
class Picture:
    """An image not yet decoded. Equal keys within one call mean the same picture."""

    source: bytes | Image.Image | Path  # the bytes of a file, an image as it is, a file that is read when it is needed
    key: str
    ready: bool = False  # a PNG of the very pixels that the model will see
    path: Path | None = None  # where the bytes can be read again


@dataclass(frozen=True, slots=True)
class Known:
    """A document of an index."""

    id: str


Content = Text | Picture | Known


def beside(folder: Path, value: Any) -> Any:
    """For content read from a file in `folder`: an image named by a path lies relative to it. All else as it is."""
    if isinstance(value, Mapping) and isinstance(value.get("image"), str) and not value["image"].startswith("data:"):
        return {**value, "image": folder / value["image"]}
    return value


@dataclass(frozen=True, slots=True)
class Pair:
    """One query and one document."""

    query: Content
    document: Content


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


def parse_pair(value: Any, where: str) -> Pair:
    """(query, document) or {"query": …, "document": …}. Raises InputError naming `where`."""
    if isinstance(value, Mapping):
        _check_keys(value, {"query", "document"}, where)
        if len(value) < 2:
            raise InputError(f'{where}: expected both "query" and "document", got only {_names(value)}.')
        query, document = value["query"], value["document"]
    elif isinstance(value, list | tuple) or (isinstance(value, np.ndarray) and value.ndim == 1):
        if len(value) != 2:
            raise InputError(f"{where}: expected (query, document), got {len(value)} items.")
        query, document = value.tolist() if isinstance(value, np.ndarray) else value  # a row of a table
    else:
        raise InputError(
            f"{where}: expected (query, document), got {type(value).__name__}. "
            "To score one pair, pass a list that holds it."
        )
    return Pair(parse_content(query, f"{where}: query"), parse_content(document, f"{where}: document"))


def parse_content(value: Any, where: str) -> Content:
    """One query or document. Raises InputError or ImageError naming `where`."""
    if isinstance(value, str):
        return _text(value, where)
    if isinstance(value, Mapping):
        _check_keys(value, {"text", "image", "id"}, where)
        if len(value) != 1:
            raise InputError(
                f'{where}: expected {{"text": …}}, {{"image": …}} or {{"id": …}}, got {_names(value)}. '
                "The model was trained on one of them per document."
            )
        if "id" in value:
            if not isinstance(value["id"], str):
                raise InputError(f'{where}: "id" must be a string, got {type(value["id"]).__name__}.')
            return Known(value["id"])
        if "text" in value:
            if not isinstance(value["text"], str):
                raise InputError(f'{where}: "text" must be a string, got {type(value["text"]).__name__}.')
            return _text(value["text"], where)
        if isinstance(value["image"], str):
            return _file(_data_uri(value["image"], where))
        return _picture(value["image"], where)
    return _picture(value, where)


def _text(text: str, where: str) -> Text:
    if not text:
        raise InputError(f"{where} is empty. Give some text, or leave the pair out.")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InputError(
            f"{where}: character {error.start} is half of a surrogate pair, not valid Unicode. "
            "Decode the text again from its bytes, or replace it."
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
            return replace(_file(path.read_bytes()), path=path)
        except OSError as error:
            raise ImageError(f"{where}: {path}: {os.strerror(error.errno or 0)}.") from None
        except ValueError:  # a null character, or half of a surrogate pair
            raise ImageError(f"{where}: {str(path)!r} cannot be the name of a file.") from None
    raise InputError(
        f"{where}: expected text (str), an image (PIL image, Path, bytes), "
        f'{{"text": …}} or {{"image": …}}; got {type(value).__name__}.'
    )


def _file(raw: bytes) -> Picture:
    return Picture(raw, hashlib.sha256(raw).hexdigest())


def _data_uri(text: str, where: str) -> bytes:
    """The bytes of data:image/…;base64,…"""
    head, comma, body = text.partition(",")
    if not comma or not head.startswith("data:image/") or not head.endswith(";base64"):
        raise ImageError(
            f'{where}: a string under "image" must be a data URI (data:image/png;base64,…). '
            "Pass a file as Path(…); fetch a URL yourself and pass its bytes."
        )
    try:
        return base64.b64decode(body, validate=True)
    except (binascii.Error, ValueError):
        raise ImageError(f"{where}: the data URI is not valid base64.") from None


def _check_keys(value: Mapping[Any, Any], known: set[str], where: str) -> None:
    if unknown := [key for key in value if key not in known]:
        raise InputError(f"{where}: unknown key {_names(unknown)}. Known are {_names(sorted(known, reverse=True))}.")


def _names(keys: Any) -> str:
    return ", ".join(repr(key)[:40] for key in keys) or "nothing"
