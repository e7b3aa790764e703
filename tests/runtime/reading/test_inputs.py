"""What may be passed and what it means; everything else is an InputError that names the place."""

import base64
import io
import os
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from m0kit.errors import ImageError, InputError
from m0kit.reading.inputs import Pair, Picture, Text, from_file, group_from_file, parse_content, parse_pair, shown
from m0kit.scoring.image import resize
from m0kit_parity.samples.checkpoints import model_config

RAW = b"any bytes: decoding is not done here"
PNG = b"\x89PNG\r\n\x1a\n" + bytes(range(256))
URI = "data:image/png;base64," + base64.b64encode(RAW).decode()


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("slm markdown", "slm markdown"),
        ({"text": "slm"}, "slm"),
        (" ", " "),
        ("page.png", "page.png"),
        ("https://example.org/page.png", "https://example.org/page.png"),
        (URI, URI),
        ("<|image_pad|>", "<|image_pad|>"),
        ("a\0b", "a\0b"),
    ],
)
def test_a_string_is_always_text(value: Any, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("page.png").write_bytes(RAW)
    assert parse_content(value, "here") == Text(text)


def test_bytes_paths_and_data_uris_of_one_file_are_one_picture(tmp_path: Path) -> None:
    path = tmp_path / "page.png"
    path.write_bytes(RAW)

    class OwnPath:
        def __fspath__(self) -> str:
            return str(path)

    same = [RAW, bytearray(RAW), memoryview(RAW), path, OwnPath()]
    pictures = [parse_content(value, "here") for value in [*same, *({"image": v} for v in [*same, URI])]]
    assert all(isinstance(p, Picture) and p.source == RAW for p in pictures)
    assert len({p.key for p in pictures if isinstance(p, Picture)}) == 1
    other = parse_content(RAW + b"!", "here")
    assert isinstance(other, Picture)
    assert other.key not in {p.key for p in pictures if isinstance(p, Picture)}


def test_a_pil_image_is_kept_as_it_is_and_known_by_identity() -> None:
    image = Image.new("RGB", (3, 4))
    for value in (image, {"image": image}):
        assert parse_content(value, "here") == parse_content(image, "here") == Picture(image, f"object {id(image)}")
    assert parse_content(image.copy(), "here") != parse_content(image, "here")


@pytest.mark.parametrize(
    "value",
    [
        ("q", "d"),
        ["q", "d"],
        {"query": "q", "document": "d"},
        OrderedDict(document={"text": "d"}, query="q"),
    ],
)
def test_a_pair_is_two_in_order_or_two_by_name(value: Any) -> None:
    assert parse_pair(value) == Pair(Text("q"), Text("d"))


class _BytesPath:
    def __fspath__(self) -> bytes:
        return b"nowhere.png"


REFUSED_CONTENT: list[tuple[Any, str]] = [
    ("", "here: is empty. Give some text, or leave the pair out."),
    ({"text": ""}, "here: is empty."),
    ("a\ud800", "here: character 1 is half of a surrogate pair, not valid Unicode. Decode the text again"),
    ({"text": 5}, 'here: "text" must be a string, got int.'),
    ({"text": None}, 'here: "text" must be a string, got NoneType.'),
    ({}, 'here: expected {"text": …}, {"image": …} or {"id": …}, got nothing.'),
    ({"text": "a", "image": RAW}, "{\"image\": …} or {\"id\": …}, got 'text', 'image'. The model was"),
    ({"image": {"url": "x"}}, "here: expected text (str), an image (PIL image, Path, bytes), "),
    ({"url": "x"}, "here: unknown key 'url'. Known are 'text', 'image', 'id'."),
    ({"image": RAW, "detail": 1, 3: 4}, "here: unknown key 'detail', 3. Known are 'text', 'image', 'id'."),
    ({"x" * 1000: 1}, "here: unknown key '" + "x" * 39 + ". Known"),
    (None, '{"text": …} or {"image": …}; got NoneType.'),
    (3.5, "got float."),
    (["a"], "got list."),
    ({"image": None}, "got NoneType."),
]
REFUSED_IMAGES: list[tuple[Any, str]] = [
    (
        {"image": "page.png"},
        'here: a string under "image" must be a data URI (data:image/png;base64,…) or an image in base64. Pass a file',
    ),
    ({"image": "https://example.org/a.png"}, "fetch a URL yourself and pass its bytes."),
    ({"image": "aGk="}, "must be a data URI (data:image/png;base64,…) or an image in base64."),
    ({"image": "data:image/png,raw"}, "here: a data URI must be in base64 (data:image/png;base64,…), got 'data:image"),
    ({"image": "data:image/png;base64"}, "here: a data URI must be in base64"),
    ({"image": "data:image/png;base64;charset=x,aGk="}, "here: a data URI must be in base64"),
    ({"image": "data:image/png;base64,a"}, "here: the data URI is not valid base64."),
    ({"image": "data:image/png;base64,aGk=é"}, "here: the data URI is not valid base64."),
    (Path("/nowhere/page.png"), f"here: {Path('/nowhere/page.png')}: No such file or directory."),
    (Path("a\0b"), r"here: 'a\x00b' cannot be the name of a file."),
    (Path("\ud800.png"), r"here: '\ud800.png' cannot be the name of a file."),
    (_BytesPath(), "here: nowhere.png: No such file or directory."),
]


@pytest.mark.parametrize(("value", "message"), REFUSED_CONTENT + REFUSED_IMAGES)
def test_content_that_cannot_be_read_is_named(value: Any, message: str) -> None:
    with pytest.raises(InputError) as caught:
        parse_content(value, "here")
    assert str(caught.value).startswith("here")
    assert message in str(caught.value)
    assert (type(caught.value) is ImageError) == any(value is v for v, _ in REFUSED_IMAGES)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (("q",), "expected (query, document), got 1 items."),
        (("q", "d", 0.5), "expected (query, document), got 3 items."),
        ((), "expected (query, document), got 0 items."),
        ("qd", "expected (query, document), got str. To score one pair, pass a list that holds it."),
        (None, "expected (query, document), got NoneType."),
        ({"query": "q"}, 'expected both "query" and "document", got only \'query\'.'),
        ({}, 'expected both "query" and "document", got only nothing.'),
        ({"query": "q", "doc": "d"}, "unknown key 'doc'. Known are 'query', 'document'."),
        (("", "d"), "query: is empty."),
        (("q", {"text": 1}), 'document: "text" must be a string'),
        ({"query": "q", "document": 3}, "document: expected text"),
        ({"query": b"", "document": ""}, "document: is empty"),
    ],
)
def test_a_pair_of_another_shape_is_named(value: Any, message: str) -> None:
    with pytest.raises(InputError) as caught:
        parse_pair(value)
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize("make", [Path.mkdir, lambda p: p.symlink_to(p), lambda p: (p.parent / "f").write_text("")])
def test_a_path_that_is_no_readable_file_is_an_image_error(make: Callable[[Path], object], tmp_path: Path) -> None:
    path = tmp_path / "page.png"
    make(path)
    if not os.path.lexists(path):
        path = tmp_path / "f" / "page.png"
    with pytest.raises(ImageError, match=f"^here: {path}: ([A-Z][a-z ]+|is a folder)"):
        parse_content(path, "here")


def test_no_permission_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(path: Path, *_: object) -> bytes:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("m0kit.reading.inputs.read_regular", denied)
    with pytest.raises(ImageError, match=r"page\.png: Permission denied\.$"):
        parse_content(tmp_path / "page.png", "here")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs POSIX")
@pytest.mark.parametrize("form", ["Path", "a file of pairs"])
def test_an_image_is_a_file_of_bounded_size(form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.mkfifo(tmp_path / "fifo")
    with (tmp_path / "sparse").open("wb") as file:
        file.truncate(20 << 30)
    monkeypatch.setattr("m0kit.reading.inputs.MAX_IMAGE_BYTES", 1 << 20)
    pipe = "is a device, a pipe or a socket, and no file"
    cases = [(tmp_path / "fifo", pipe), (Path("/dev/zero"), pipe), (tmp_path, "is a folder, and no file")]
    cases.append((tmp_path / "sparse", "has more than the 1048576 bytes that are read of it"))
    if Path("/proc/kmsg").exists():  # which is read in vain until there is news
        cases.append((Path("/proc/kmsg"), ""))
    for path, said in cases:
        value = path if form == "Path" else from_file({"image": str(path)}, tmp_path)
        with pytest.raises(ImageError, match=f"^here: {path}: {said}"):
            resize(parse_content(value, "here"), model_config("tiny").image, "here")  # type: ignore[arg-type]


leaves = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=5),
    st.text(st.characters(categories=["Cs", "L"]), max_size=3),
    st.binary(max_size=5),
    st.sampled_from([URI, URI[:-2], "data:image/", "data:image/;base64,", Path(), Path("a\0"), _BytesPath()]),
    st.builds(lambda: Image.new("L", (1, 1))),
    st.builds(object),
)
keys = st.sampled_from(["query", "document", "text", "image", "url", 0, None, ("a",)])
anything = st.recursive(
    leaves,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.tuples(inner, inner), st.dictionaries(keys, inner, max_size=3)
    ),
    max_leaves=6,
)


json_values = st.recursive(
    st.one_of(st.none(), st.integers(), st.text(max_size=5), st.sampled_from([URI, "a.png", "aGk=", "\0"])),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(
        st.sampled_from(["text", "image", "bytes", "path", "id", "documents"]), inner, max_size=3)),
    max_leaves=6,
)  # fmt: skip


@settings(max_examples=300)
@given(st.dictionaries(st.sampled_from(["query", "document", "documents", "other"]), json_values, max_size=4))
def test_whatever_a_file_holds_only_input_errors_come_out(record: Any) -> None:
    try:
        _, documents = group_from_file(record, Path("/nowhere"))
    except InputError:
        return
    assert documents


@settings(max_examples=500)
@given(anything)
def test_whatever_is_passed_only_input_errors_come_out(value: Any) -> None:
    try:
        assert isinstance(parse_content(value, "there"), Text | Picture)
    except InputError as error:
        if not str(error).startswith("there"):
            raise AssertionError(str(error)) from error
    try:
        assert isinstance(parse_pair(value), Pair)
    except InputError as error:
        if error.side is None and error.said != error.reason:
            raise AssertionError(str(error)) from error


@given(st.text(st.characters(exclude_categories=["Cs"]), min_size=1))
def test_any_valid_text_is_kept_letter_by_letter(text: str) -> None:
    assert parse_content(text, "here") == parse_content({"text": text}, "here") == Text(text)


def wrapped(text: str, width: int = 76) -> str:
    return "\r\n".join(text[i : i + width] for i in range(0, len(text), width))


BASE64 = base64.b64encode(PNG).decode()


@pytest.mark.parametrize(
    "string",
    [
        f"data:image/png;base64,{BASE64}",
        f"data:image/png;base64,{wrapped(BASE64)}\n",
        f" data:image/png;base64, {BASE64}",
        f"data:application/octet-stream;base64,{BASE64}",
        f"data:;base64,{BASE64}",
        f"data:image/png;name=a.png;charset=utf-8;base64,{BASE64}",
        f"DATA:image/png;BASE64,{BASE64}",
        f"data:text/plain;base64,{BASE64}",
        f"data:image/png;base64,{BASE64.rstrip('=')}",
        f"data:image/png;base64,{base64.urlsafe_b64encode(PNG).decode()}",
        f"data:image/png;base64,{BASE64.replace('+', '%2B').replace('/', '%2f').replace('=', '%3D')}",
        BASE64,
        wrapped(BASE64),
        base64.encodebytes(PNG).decode(),
        base64.urlsafe_b64encode(PNG).decode().rstrip("="),
    ],
)
def test_base64_of_an_image_is_taken_as_people_write_it(string: str) -> None:
    assert parse_content({"image": string}, "here") == parse_content(PNG, "here")


def test_a_string_of_a_file_is_a_data_uri_a_path_or_base64_and_a_path_wins(tmp_path: Path) -> None:
    (tmp_path / "page.png").write_bytes(PNG)
    assert from_file({"image": "page.png"}, tmp_path) == {"image": tmp_path / "page.png"}
    assert from_file({"image": URI}, tmp_path) == {"image": URI}
    assert from_file({"image": BASE64}, tmp_path) == {"image": PNG}
    short = base64.b64encode(PNG[:40]).decode().replace("/", "_").rstrip("=")
    assert from_file({"image": short}, tmp_path) == {"image": PNG[:40]}
    (tmp_path / short).write_bytes(PNG)
    assert from_file({"image": short}, tmp_path) == {"image": tmp_path / short}
    assert from_file({"image": "aGk="}, tmp_path) == {"image": tmp_path / "aGk="}
    with pytest.raises(ImageError, match="is a URL, and m0kit fetches nothing"):
        from_file({"image": "https://example.org/a.png"}, tmp_path)
    with pytest.raises(ImageError, match='the "bytes" of the image are no image in base64'):
        from_file({"bytes": "page.png", "path": "page.png"}, tmp_path)
    with pytest.raises(ImageError, match="the string of the image is empty"):  # and not the folder itself
        from_file({"image": ""}, tmp_path)


def test_null_is_absent_and_images_come_as_datasets_write_them(tmp_path: Path) -> None:
    for value, meant in (
        ({"text": "a", "image": None}, {"text": "a"}),
        ({"text": None, "image": "a.png"}, {"image": tmp_path / "a.png"}),
        ({"bytes": PNG, "path": "a.png"}, {"image": PNG}),
        ({"bytes": None, "path": "a.png"}, {"image": tmp_path / "a.png"}),
        ({"image": {"bytes": BASE64, "path": None}}, {"image": PNG}),
        ("a.png", "a.png"),
        ([1], [1]),
    ):
        assert from_file(value, tmp_path) == meant


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"query": "q"}, 'expected "query" with "document" or "documents", got \'query\'.'),
        ({"document": "d", "query": None}, "got 'document'."),
        ({"query": "q", "document": "d", "documents": ["d"]}, "got 'query', 'document', 'documents'."),
        ({"query": "q", "documents": "many"}, "\"documents\" must be a list with something in it, got 'many'."),
        ({"query": "q", "documents": []}, "got []."),
        ({"query": "q", "documents": ["a", ""]}, "document 2: is empty."),
        ({"query": "q", "documents": ["a", {"image": "no.png"}]}, "no.png: No such file or directory."),
        ({"query": "q", "document": {"image": "ftp://x/a.png"}}, "document: 'ftp://x/a.png' is a URL"),
        ({"query": "q", "document": {"id": "c1"}}, "document: names a document of an index, and there is none here."),
    ],
)
def test_a_record_that_is_no_query_with_documents_is_named(record: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        group_from_file(record, tmp_path)
    assert message in str(caught.value)


def test_a_record_holds_one_document_or_several(tmp_path: Path) -> None:
    assert group_from_file({"query": "q", "document": "d", "label": 1}, tmp_path) == ("q", ["d"])
    assert group_from_file({"query": {"text": "q"}, "documents": ["d", "e"]}, tmp_path) == ({"text": "q"}, ["d", "e"])


def test_messages_never_hold_a_long_value(tmp_path: Path) -> None:
    long = "A" * 700_000
    for act in (
        lambda: parse_content(from_file({"image": long}, tmp_path), "here"),
        lambda: parse_content({"image": long}, "here"),
        lambda: parse_content({"image": f"data:{long}"}, "here"),
        lambda: parse_content({"image": {long: 1}}, "here"),
        lambda: parse_content({long: 1}, "here"),
        lambda: group_from_file({"query": "q", "documents": {"a b " * 1000: long}}, tmp_path),
        lambda: group_from_file({long: 1, "query": "q"}, tmp_path),
    ):
        with pytest.raises(InputError) as caught:
            act()
        assert len(str(caught.value)) < 500
    assert shown("x" * 100) == "'" + "x" * 59 + "…"
    assert shown(b"x") == "b'x'"


@given(st.binary())
def test_a_data_uri_gives_back_its_bytes(raw: bytes) -> None:
    uri = "data:image/jpeg;base64," + base64.b64encode(raw).decode()
    assert parse_content({"image": uri}, "here") == parse_content(io.BytesIO(raw).getvalue(), "here")
