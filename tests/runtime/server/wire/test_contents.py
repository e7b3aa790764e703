"""Queries and documents in all forms that clients send: what each means, and the place of what cannot be meant."""

import base64
import json
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from m0kit.reading.inputs import Known, Picture, Text
from m0kit.server.problems import RequestError
from m0kit.server.wire.ask import Link
from m0kit.server.wire.contents import MAX_URL, from_raw, parse_documents, parse_side

PNG = b"\x89PNG\r\n\x1a\n" + bytes(range(256))  # the beginning of one is enough: nothing is decoded here
LETTERS = base64.b64encode(PNG).decode()
URI = f"data:image/png;base64,{LETTERS}"
URL = "https://example.org/a.png"
TEXT_PART = {"type": "text", "text": "slm"}
URI_PART = {"type": "image_url", "image_url": {"url": URI}}
URL_PART = {"type": "image_url", "image_url": {"url": URL, "detail": "low"}}
# Texts that mean something to somebody, and text to us.
TRICKY = (
    URI, URL, LETTERS, "/etc/passwd", "file:///etc/passwd", "page.png", "null", "true", "{}", '{"image": "x"}', "\0",
    " ", "\n", "<|image_pad|>", "<|vision_start|><|image_pad|><|vision_end|>", "\ufeff", "é", "数据库", "🙂",
)  # fmt: skip


def told(value: Any) -> Any:
    """What a side means, as short as it can be said."""
    content = parse_side(value, "here").content
    if isinstance(content, Text):
        return content.text
    if isinstance(content, Picture):
        return content.source
    return {"link": content.url} if isinstance(content, Link) else {"id": content.id}


@pytest.mark.parametrize(
    ("value", "means", "where"),
    [
        ("slm", "slm", ""),
        ({"text": "slm"}, "slm", ".text"),
        ({"text": "slm", "image": None, "title": "t", "url": URL, "id": "a"}, "slm", ".text"),
        ({"image": URI}, PNG, ".image"),
        ({"image": LETTERS}, PNG, ".image"),
        ({"image": URI, "text": None}, PNG, ".image"),
        ({"image": URI, "text": ""}, PNG, ".image"),  # as our own answers have it
        ({"image": f"  data:;base64,{LETTERS}"}, PNG, ".image"),
        ({"image": f"DATA:text/plain;charset=x;BASE64,{LETTERS}"}, PNG, ".image"),
        ({"image": "data:image/png;base64," + LETTERS.replace("+", "%2B").replace("/", "%2f")}, PNG, ".image"),
        ({"image": URL}, {"link": URL}, ".image"),
        ({"image": "HTTP://[::1]/a"}, {"link": "HTTP://[::1]/a"}, ".image"),
        ({"url": URL}, {"link": URL}, ".url"),
        ({"url": URI}, PNG, ".url"),
        ({"bytes": LETTERS}, PNG, ".bytes"),
        ({"bytes": "aGk="}, b"hi", ".bytes"),  # what is no image is refused when it is opened
        ({"id": "page-1"}, {"id": "page-1"}, ".id"),
        ({"id": ""}, {"id": ""}, ".id"),
        ({"url": URL, "id": "a"}, {"link": URL}, ".url"),
        ({"content": "slm"}, "slm", ".content"),
        ({"content": [TEXT_PART]}, "slm", ".content"),
        ({"content": [TEXT_PART, {"type": "text", "text": "two\nlines"}]}, "slm\ntwo\nlines", ".content"),
        ({"content": [URI_PART]}, PNG, ".content[0].image_url"),
        ({"content": [{"type": "image_url", "image_url": URI}]}, PNG, ".content[0].image_url"),
        ({"content": [{**URL_PART, "text": None}]}, {"link": URL}, ".content[0].image_url"),
    ],
)  # fmt: skip
def test_each_form_has_one_meaning(value: Any, means: Any, where: str) -> None:
    assert told(value) == means
    assert parse_side(value, "documents[3]").where == f"documents[3]{where}"


@given(st.text(st.characters(exclude_categories=["Cs"]), min_size=1) | st.sampled_from(TRICKY))
def test_a_string_is_text_whatever_it_looks_like(text: str) -> None:
    assert told(text) == told({"text": text}) == told({"content": [{"type": "text", "text": text}]}) == text
    (alone,) = parse_documents(text, "documents")
    assert alone.side.content == Text(text)


@given(st.binary(min_size=1, max_size=80), st.booleans(), st.booleans(), st.integers(0, 20))
def test_base64_comes_in_either_alphabet_padded_or_not_and_in_lines(
    raw: bytes, other: bool, bare: bool, width: int
) -> None:
    letters = base64.b64encode(raw).decode()
    if other:
        letters = letters.replace("+", "-").replace("/", "_")
    if bare:
        letters = letters.rstrip("=")
    if width:
        letters = "\r\n".join(letters[i : i + width] for i in range(0, len(letters), width))
    assert told({"bytes": letters}) == told({"image": f"data:image/webp;base64,{letters}"}) == raw


@pytest.mark.parametrize(
    ("value", "where", "said"),
    [
        (None, "", "is null. Give a string, or an object with one of text, image, url, bytes, id and content."),
        (True, "", "is a boolean."),
        (7, "", "is a number."),
        (["slm"], "", "is a list."),
        ({}, "", "has nothing."),
        ({"title": "t", "\x1b[2J": 1}, "", r"has 'title', '\x1b[2J'."),
        ({"image": None}, "", "has nothing."),
        ("", "", "is empty. Give some text."),
        ({"text": ""}, ".text", "is empty."),
        ({"text": 7}, ".text", "is a number. Give a string."),
        ({"text": ["slm"]}, ".text", "is a list. Give a string."),
        ({"text": "a", "image": URI}, "", "has text and image. The model was trained on one of them per document"),
        ({"text": "", "image": ""}, ".image", "is not a data URI"),
        ({"image": URI, "bytes": LETTERS}, "", "has image and bytes."),
        ({"image": {"url": URL}}, ".image", "is an object. Give a string."),
        ({"image": ""}, ".image", "is not a data URI (data:image/png;base64,…), an image in base64, or an http(s)"),
        ({"image": "page.png"}, ".image", "No files are opened: send what is in them."),
        ({"image": "file:///etc/passwd"}, ".image", "No files are opened"),
        ({"image": "//example.org/a.png"}, ".image", "No files are opened"),
        ({"image": "ftp://example.org/a.png"}, ".image", "No files are opened"),
        ({"image": " http://example.org/a.png"}, ".image", "is not a data URI"),
        ({"image": base64.b64encode(b"no image").decode()}, ".image", "is not a data URI"),
        ({"image": "data:image/svg+xml;utf8,<svg/>"}, ".image", "a data URI must be in base64"),
        ({"image": "data:image/png;base64"}, ".image", "a data URI must be in base64"),
        ({"image": "data:image/png;base64,"}, ".image", "holds no bytes. Send an image."),
        ({"image": "data:image/png;base64,%%%"}, ".image", "the data URI is not valid base64."),
        ({"image": "data:image/png;base64,iVBOR=w0K"}, ".image", "the data URI is not valid base64."),
        ({"url": "page.png"}, ".url", "is not an http(s) URL, or a data URI"),
        ({"url": LETTERS}, ".url", "is not an http(s) URL"),
        ({"url": URL + "a" * MAX_URL}, ".url", f"more than the {MAX_URL} that are taken."),
        ({"bytes": "%%%"}, ".bytes", "is not an image in base64."),
        ({"bytes": ""}, ".bytes", "holds no bytes."),
        ({"bytes": [1, 2]}, ".bytes", "is a list. Give a string."),
        ({"id": 7}, ".id", "is a number. Give a string."),
        ({"content": []}, ".content", "is an empty list. Give a list of parts, or a string."),
        ({"content": {}}, ".content", "is an object."),
        ({"content": ""}, ".content", "is empty."),
        ({"content": ["slm"]}, ".content[0]", "is a string. A part is"),
        ({"content": [TEXT_PART, {"type": "video_url"}]}, ".content[1]", "is of the type 'video_url'."),
        ({"content": [{"type": ["text"]}]}, ".content[0]", "is of the type ['text']."),
        ({"content": [{"type": "text"}]}, ".content[0].text", "is null. Give a string."),
        ({"content": [{"type": "text", "text": ""}]}, ".content", "is empty."),
        ({"content": [{"type": "image_url", "image_url": {}}]}, ".content[0].image_url", "is null."),
        ({"content": [{"type": "image_url", "image_url": "page.png"}]}, ".content[0].image_url", "No files"),
        ({"content": [TEXT_PART, URI_PART]}, ".content", "has text and an image."),
        ({"content": [URI_PART, URI_PART]}, ".content", "has 2 images. Send each as a document of its own."),
        ("\ud800", "", "holds half of a surrogate pair"),
        ({"id": "\udfff"}, ".id", "holds half of a surrogate pair"),
        ({"image": "http://\ud800"}, ".image", "holds half of a surrogate pair"),
        ({"content": [{"type": "text", "text": "\ud800"}]}, ".content[0].text", "holds half of a surrogate pair"),
    ],
)  # fmt: skip
def test_what_has_no_meaning_is_refused_with_its_place(value: Any, where: str, said: str) -> None:
    with pytest.raises(RequestError) as caught:
        parse_side(value, "documents[3]")
    assert (caught.value.code, caught.value.where) == ("INVALID_INPUT", f"documents[3]{where}")
    assert str(caught.value).startswith(f"documents[3]{where}: ")
    assert said in str(caught.value)


# --- documents -------------------------------------------------------------------------------------


def test_documents_are_a_list_or_one_in_its_place() -> None:
    assert [one.side.where for one in parse_documents(["a", {"text": "b"}], "texts")] == ["texts[0]", "texts[1].text"]
    assert [one.side.where for one in parse_documents({"text": "b"}, "items")] == ["items.text"]
    assert [one.side.content for one in parse_documents(["a", "a"], "documents")] == [Text("a"), Text("a")]


def test_one_alone_of_several_images_stands_for_as_many() -> None:
    found = parse_documents({"content": [URI_PART, URI_PART]}, "documents", "all")
    assert [one.side.where for one in found] == ["documents.content[0].image_url", "documents.content[1].image_url"]
    assert [one.shown for one in found] == [{"content": [URI_PART], "text": ""}] * 2
    assert len(parse_documents({"content": [TEXT_PART, TEXT_PART]}, "documents")) == 1
    with pytest.raises(RequestError, match="has text and an image"):
        parse_documents({"content": [URI_PART, TEXT_PART]}, "documents")
    with pytest.raises(RequestError, match=r"documents.content\[1\].image_url: is null"):
        parse_documents({"content": [URI_PART, {"type": "image_url"}]}, "documents")


@pytest.mark.parametrize(("value", "code"), [([], "INVALID_REQUEST"), (None, "INVALID_INPUT"), ({}, "INVALID_INPUT")])
def test_no_documents_are_refused(value: Any, code: str) -> None:
    with pytest.raises(RequestError) as caught:
        parse_documents(value, "documents")
    assert (caught.value.code, caught.value.where) == (code, "documents")


def test_an_error_tells_of_ten_documents_at_most() -> None:
    with pytest.raises(RequestError) as caught:
        parse_documents(["a", *[7] * 50, ""], "documents")
    assert caught.value.where == "documents[1]"
    assert [place for place, _ in caught.value.others] == [f"documents[{i}]" for i in range(2, 11)]
    body = caught.value.body("r-1")
    assert body["errors"][0] == {"field": "documents[1]", "message": body["detail"]}
    assert len(body["errors"]) == 10


@pytest.mark.parametrize(
    ("fields", "text", "where"),
    [
        (["title"], "t", "documents[0]"),
        (["title", "body"], "title: t\nbody: b", "documents[0]"),
        (["body", "title", "none"], "body: b\ntitle: t", "documents[0]"),
    ],
)
def test_fields_to_rank_by_make_a_text(fields: list[str], text: str, where: str) -> None:
    (one,) = parse_documents([{"title": "t", "body": "b", "text": "x", "empty": ""}], "documents", "all", fields)
    assert (one.side.content, one.side.where) == (Text(text), where)


@pytest.mark.parametrize(
    ("document", "where", "said"),
    [
        ({"a": 1}, "documents[0]", "has none of the fields to rank by ('title')."),
        ({"title": ""}, "documents[0]", "has none of the fields"),
        ({"title": {"a": 1}}, "documents[0].title", "is an object. Fields to rank by are strings."),
        ({"title": "\ud800"}, "documents[0]", "half of a surrogate pair"),
    ],
)
def test_fields_to_rank_by_have_to_be_there(document: Any, where: str, said: str) -> None:
    with pytest.raises(RequestError) as caught:
        parse_documents([document], "documents", "none", ["title"])
    assert caught.value.where == where
    assert said in str(caught.value)
    assert parse_documents(["slm"], "documents", "none", ["title"])[0].side.content == Text("slm")


@pytest.mark.parametrize(
    ("sent", "everything", "texts"),
    [
        ("slm", {"text": "slm"}, {"text": "slm"}),
        ({"text": "slm", "title": "t"}, {"text": "slm", "title": "t"}, {"text": "slm"}),
        ({"image": URI}, {"text": "", "image": URI}, {"text": ""}),
        ({"text": None, "image": URI}, {"text": "", "image": URI}, {"text": ""}),
        ({"image": URL}, {"text": "", "image": URL}, {"text": "", "image": URL}),
        ({"id": "a"}, {"text": "", "id": "a"}, {"text": "", "id": "a"}),
        ({"bytes": LETTERS}, {"text": "", "bytes": LETTERS}, {"text": ""}),
        ({"content": [TEXT_PART]}, {"text": "slm", "content": [TEXT_PART]}, {"text": "slm"}),
    ],
)
def test_a_document_is_shown_as_it_came_or_by_what_is_short(sent: Any, everything: Any, texts: Any) -> None:
    for echo, expected in (("all", everything), ("texts", texts), ("none", None)):
        (one,) = parse_documents([sent], "documents", echo)  # type: ignore[arg-type]
        assert one.shown == expected


@pytest.mark.parametrize("sent", [{"image": URI}, {"image": URL}, {"text": "slm"}])
def test_what_is_shown_can_be_sent_again(sent: Any) -> None:
    (one,) = parse_documents([sent], "documents", "all")
    (again,) = parse_documents([one.shown], "documents", "all")
    assert again == one


def test_a_body_may_be_a_document_itself() -> None:
    assert from_raw("größer".encode(), "text/plain", "body") == Text("größer")
    picture = from_raw(PNG, "image/png", "body")
    assert isinstance(picture, Picture)
    assert picture.source == PNG
    for body, kind, said in ((b"\xff", "text/plain", "is not valid UTF-8"), (b"", "image/png", "holds no bytes"),
                             (b"", "text/plain", "is empty")):  # fmt: skip
        with pytest.raises(RequestError, match=said):
            from_raw(body, kind, "body")


# --- anything --------------------------------------------------------------------------------------

STRINGS = st.sampled_from([*TRICKY, "", "\ud800", "data:image/png;base64,", "data:,x", "http://", URL * 500]) | st.text(
    max_size=5
)
ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**65), 2**65) | st.floats() | STRINGS,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["type", "text", "image_url", "url", "content"]) | st.text(max_size=2), inner)
    ),
    max_leaves=6,
)
PARTS = st.fixed_dictionaries(
    {}, optional={"type": st.sampled_from(["text", "image_url"]) | ANYTHING, "text": ANYTHING, "image_url": ANYTHING}
)
FORMS = st.fixed_dictionaries(
    {},
    optional=dict.fromkeys(("text", "image", "url", "bytes", "id", "title"), STRINGS | ANYTHING)
    | {"content": st.lists(PARTS | st.sampled_from([TEXT_PART, URI_PART]), max_size=3) | ANYTHING},
)


def check(value: Any, side: Any) -> None:
    """That a side means what its value says."""
    content = side.content
    if isinstance(value, str):
        assert content == Text(value)
        return
    assert isinstance(value, dict)
    if isinstance(content, Text):
        assert content.text == value.get("text") or "content" in value
        content.text.encode()
    elif isinstance(content, Picture):
        assert isinstance(content.source, bytes)
        assert content.source
        assert side.where.rpartition(".")[2] in ("image", "url", "bytes", "image_url")
    elif isinstance(content, Link):
        assert content.url.lower().startswith(("http://", "https://"))
        assert content.url in json.dumps(value, ensure_ascii=False)
    else:
        assert content == Known(value["id"])


def tried(parse: Callable[[], Any]) -> Any:
    try:
        return parse()
    except RequestError as error:
        return error


@given(FORMS | ANYTHING)
def test_anything_has_a_meaning_or_an_error_with_a_place(value: Any) -> None:
    side = tried(lambda: parse_side(value, "query"))
    if isinstance(side, RequestError):
        assert (side.code, side.where.partition(".")[0]) == ("INVALID_INPUT", "query")
        json.dumps(side.body("r-1"), allow_nan=False).encode()
    else:
        check(value, side)


@given(st.lists(FORMS | STRINGS, max_size=4) | FORMS | ANYTHING, st.sampled_from(["all", "texts", "none"]))
def test_any_documents_are_all_there_or_an_error_names_one(value: Any, echo: Any) -> None:
    found = tried(lambda: parse_documents(value, "documents", echo))
    if isinstance(found, RequestError):
        assert all(place.startswith("documents") for place, _ in [(found.where, ""), *found.others])
        return
    if isinstance(value, list):
        assert len(found) == len(value)
        for number, (each, one) in enumerate(zip(value, found, strict=True)):
            check(each, one.side)
            assert one.side.where.startswith(f"documents[{number}]")
    assert all((one.shown is None) == (echo == "none") for one in found)
    assert all(isinstance(one.shown["text"], str) for one in found if one.shown is not None)
