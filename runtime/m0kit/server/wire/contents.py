r"""One query or document as clients send it. Owns the forms, and the name of the place where something is wrong.

    parse_side({"image": "data:image/png;base64,…"}, "documents[3]")  # → Side(Picture(…), "documents[3].image")
    parse_documents(["slm", {"id": "page-1"}], "documents")           # → Sent, two of them

A string is text, always: nothing looks at it. No file is opened that a request names. An image's media type is not
believed; its bytes are decoded later, or refused then.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal, NamedTuple

from m0kit.errors import InputError
from m0kit.reading.inputs import (
    Known,
    Picture,
    Text,
    base64_image,
    from_base64,
    is_data_uri,
    parse_content,
    shown,
)
from m0kit.server.problems import RequestError
from m0kit.server.wire.ask import Echo, Link, Side
from m0kit.server.wire.body import is_valid, kind_of, without_nulls

FORMS: Final = ("text", "image", "bytes", "content")  # of which a document has one
NAMES: Final = ("url", "id")  # which are no content where there is one of the forms: a document may tell its source
MAX_URL: Final = 8192  # characters, as most servers take
_MOST_TOLD: Final = 10  # documents that are wrong, in one answer
_FORMS: Final = "a string, or an object with one of text, image, url, bytes, id and content"


class Sent(NamedTuple):
    """A document of a request, and how an answer shows it."""

    side: Side
    shown: dict[str, Any] | None


@dataclass(frozen=True, slots=True)
class _Part:
    """One of a list of parts, as of a message to a chat model."""

    kind: Literal["text", "image"]
    value: Any
    where: str


def parse_side(value: Any, where: str, rank_fields: Sequence[str] = ()) -> Side:
    """One query or document. `where`: its place, "" for the whole body.

    `rank_fields`: those of an object that make its text, in place of the forms. Raises
    RequestError that names the place.
    """
    if isinstance(value, str):
        return Side(_text(value, where), where)
    if not isinstance(value, dict):
        raise RequestError("INVALID_INPUT", f"is {kind_of(value)}. Give {_FORMS}.", where=where)
    if rank_fields:
        return Side(_fields(value, where, rank_fields), where)
    value = without_nulls(value)
    if value.get("text") == "" and any(name in value for name in FORMS if name != "text"):
        del value["text"]  # as answers show an image
    given = [name for name in FORMS if name in value] or [name for name in NAMES if name in value][:1]
    if not given:
        names = ", ".join(shown(name) for name in list(value)[:5]) or "nothing"
        raise RequestError("INVALID_INPUT", f"has {names}. Give {_FORMS}.", where=where)
    if len(given) > 1:
        raise RequestError(
            "INVALID_INPUT",
            f"has {' and '.join(given)}. The model was trained on one of them per document: send two documents, or "
            "leave one out.",
            where=where,
        )
    (name,) = given
    inner, place = value[name], _at(where, name)
    if name == "content":
        return _content(inner, place)
    if not isinstance(inner, str):
        raise RequestError("INVALID_INPUT", f"is {kind_of(inner)}. Give a string.", where=place)
    if name == "text":
        return Side(_text(inner, place), place)
    if name == "id":
        return Side(Known(_valid(inner, place)), place)
    if name == "bytes":
        return Side(_picture(from_base64(inner), place, "an image in base64"), place)
    return Side(_image(inner, place, bare=name == "image"), place)


def parse_documents(value: Any, where: str, echo: Echo = "none", rank_fields: Sequence[str] = ()) -> list[Sent]:
    """A list of documents, or one in its place. Raises RequestError, which tells of several that are wrong.

    One alone that has several images, and nothing else, stands for as many documents: vLLM once meant that.
    """
    items = value if isinstance(value, list) else _split(value)
    if not items:
        raise RequestError("INVALID_REQUEST", "is empty. Give one document at least.", where=where)
    found: list[Sent] = []
    wrong: list[RequestError] = []
    for number, each in enumerate(items):
        try:
            if isinstance(value, list):
                side = parse_side(each, f"{where}[{number}]", rank_fields)
            elif len(items) > 1:
                side = _content(each["content"], f"{where}.content", first=number)
            else:
                side = parse_side(each, where, rank_fields)
        except RequestError as error:
            wrong.append(error)
            if len(wrong) == _MOST_TOLD:
                break
        else:
            found.append(Sent(side, _shown(each, side, echo)))
    if wrong:
        wrong[0].others = tuple((error.where, str(error)) for error in wrong[1:])
        raise wrong[0]
    return found


def _split(value: Any) -> list[Any]:
    if isinstance(value, dict) and isinstance(parts := value.get("content"), list):
        types = [part.get("type") if isinstance(part, dict) else None for part in parts]
        if len(parts) > 1 and all(each == "image_url" for each in types):
            return [{"content": [part]} for part in parts]
    return [value]


def _shown(sent: Any, side: Side, echo: Echo) -> dict[str, Any] | None:
    """A document in an answer: `text` is a string in any case, since clients refuse it where it is none.

    Of all that was sent, or of no more than what is short: text, a URL, an id.
    """
    if echo == "none":
        return None
    content = side.content
    text = content.text if isinstance(content, Text) else ""
    if echo == "all" and isinstance(sent, dict):
        own = sent.get("text")
        return {**sent, "text": own if isinstance(own, str) else text}
    if isinstance(content, Link):
        return {"text": text, "image": content.url}
    return {"text": text, "id": content.id} if isinstance(content, Known) else {"text": text}


def _fields(value: dict[str, Any], where: str, names: Sequence[str]) -> Text:
    """The text that some fields of an object make: of one its value, of several lines with their names."""
    found: dict[str, str] = {}
    for name in names:
        inner = value.get(name)
        if inner is not None and not isinstance(inner, str):
            place = _at(where, f"{name:.60}")
            raise RequestError("INVALID_INPUT", f"is {kind_of(inner)}. Fields to rank by are strings.", where=place)
        if inner:
            found[name] = inner
    if not found:
        told = ", ".join(shown(name) for name in names[:5])
        raise RequestError("INVALID_INPUT", f"has none of the fields to rank by ({told}).", where=where)
    if len(names) == 1:
        return _text(found[names[0]], where)
    return _text("\n".join(f"{name}: {text}" for name, text in found.items()), where)


def _content(value: Any, where: str, first: int = 0) -> Side:
    """Parts of a message to a chat model: texts, which are joined by line ends, or one image.

    `first`: the number of the first part, where they are some of more.
    """
    if isinstance(value, str):
        return Side(_text(value, where), where)
    if not isinstance(value, list) or not value:
        what = "an empty list" if value == [] else kind_of(value)
        raise RequestError("INVALID_INPUT", f"is {what}. Give a list of parts, or a string.", where=where)
    parts = [_part(each, f"{where}[{number}]") for number, each in enumerate(value, first)]
    images = [part for part in parts if part.kind == "image"]
    if not images:
        return Side(_text("\n".join(part.value for part in parts), where), where)
    if len(images) < len(parts):
        raise RequestError(
            "INVALID_INPUT",
            "has text and an image. The model was trained on one of them per document: send two documents, or leave "
            "one out.",
            where=where,
        )
    if len(images) > 1:
        raise RequestError(
            "INVALID_INPUT", f"has {len(images)} images. Send each as a document of its own.", where=where
        )
    (image,) = images
    return Side(_image(image.value, image.where, bare=True), image.where)


def _part(value: Any, where: str) -> _Part:
    kind = value.get("type") if isinstance(value, dict) else None
    if kind not in ("text", "image_url"):
        what = kind_of(value) if kind is None else f"of the type {shown(kind)}"
        raise RequestError(
            "INVALID_INPUT",
            f'is {what}. A part is {{"type": "text", "text": …}} or '
            '{"type": "image_url", "image_url": {"url": …}}.',
            where=where,
        )
    place = f"{where}.{kind}"
    inner = value.get(kind)
    if kind == "image_url" and isinstance(inner, dict):
        inner = inner.get("url")
    if not isinstance(inner, str):
        raise RequestError("INVALID_INPUT", f"is {kind_of(inner)}. Give a string.", where=place)
    return _Part("text" if kind == "text" else "image", _valid(inner, place), place)


def _at(where: str, name: str) -> str:
    """The place of a field, in an object that may be the whole body."""
    return f"{where}.{name}" if where else name


def _text(text: str, where: str) -> Text:
    if not text:
        raise RequestError("INVALID_INPUT", "is empty. Give some text.", where=where)
    return Text(_valid(text, where))


def _valid(text: str, where: str) -> str:
    if not is_valid(text):
        raise RequestError(
            "INVALID_INPUT",
            "holds half of a surrogate pair, not valid Unicode. Decode the text again from its bytes, or replace "
            "that character.",
            where=where,
        )
    return text


def _image(text: str, where: str, *, bare: bool) -> Picture | Link:
    """What a string that stands for an image is: a data URI, a URL of the web, or base64 (`bare`)."""
    if is_data_uri(text):
        try:
            content = parse_content({"image": text}, where)
        except InputError as error:
            raise RequestError("INVALID_INPUT", error.reason, where=where) from None
        assert isinstance(content, Picture)
        return content if content.source else _picture(b"", where, "")
    accepted = "a data URI (data:image/png;base64,…), an image in base64, or an http(s) URL"
    if not bare:
        accepted = "an http(s) URL, or a data URI (data:image/png;base64,…)"
    if text[:8].lower().startswith(("http://", "https://")):
        if len(text) > MAX_URL:
            reason = f"is a URL of {len(text)} characters, more than the {MAX_URL} that are taken."
            raise RequestError("INVALID_INPUT", f"{reason} Send the image itself.", where=where)
        return Link(_valid(text, where))
    return _picture(base64_image(text) if bare else None, where, accepted)


def _picture(raw: bytes | None, where: str, accepted: str) -> Picture:
    if raw is None:
        raise RequestError(
            "INVALID_INPUT", f"is not {accepted}. No files are opened: send what is in them.", where=where
        )
    if not raw:
        raise RequestError("INVALID_INPUT", "holds no bytes. Send an image.", where=where)
    content = parse_content(raw, where)
    assert isinstance(content, Picture)
    return content


def from_raw(body: bytes, kind: str, where: str) -> Text | Picture:
    """A document that is a body itself, of a media type. Raises RequestError."""
    if kind.startswith("image"):
        return _picture(body, where, "an image's file")
    try:
        return _text(body.decode("utf-8"), where)
    except UnicodeDecodeError:
        raise RequestError("INVALID_INPUT", "is not valid UTF-8.", where=where) from None
