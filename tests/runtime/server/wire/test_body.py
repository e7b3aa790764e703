"""What is JSON here: as strict as elsewhere in m0kit, whichever of its two readers says so."""

import json
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from m0kit import schema
from m0kit.server.problems import RequestError
from m0kit.server.wire.body import MAX_SIGNS, kind_of, parse_body


@pytest.mark.parametrize(
    ("body", "fields"),
    [
        (b"{}", {}),
        (b' {"a": 1, "b": null} ', {"a": 1}),
        (b'{"a": {"b": null}}', {"a": {"b": None}}),
        (b'\xef\xbb\xbf{"a": 1}', {"a": 1}),
        (b'{"a": "\\u003a:\\u003A", "b:c": ":"}', {"a": ":::", "b:c": ":"}),
        (b'{"a": "\\\\u003a"}', {"a": "\\u003a"}),
        (b'{"a": "\\ud83d\\ude00"}', {"a": "😀"}),
        (b'{"a": 9223372036854775807, "b": 1e300}', {"a": 2**63 - 1, "b": 1e300}),
        (b'{"a": ' + b"[" * 98 + b"]" * 98 + b"}", {"a": json.loads("[" * 98 + "]" * 98)}),
    ],
)
def test_an_object_is_its_fields_and_null_is_absent(body: bytes, fields: dict[str, Any]) -> None:
    assert parse_body(body) == fields


@pytest.mark.parametrize(
    ("body", "code", "said"),
    [
        (b"", "BAD_JSON", "the body is empty. Send a JSON object."),
        (b"{", "BAD_JSON", "it is not JSON (line 1, column 2)"),
        (b"{}{}", "BAD_JSON", "it is not JSON (line 1, column 3)"),
        (b'{"a": 01}', "BAD_JSON", "it is not JSON"),
        (b'{"a": 1,}', "BAD_JSON", "it is not JSON"),
        (b"query=slm", "BAD_JSON", "it is not JSON (line 1, column 1)"),
        (b'{"a": "\xff"}', "BAD_JSON", "it is not text in UTF-8"),
        (b'{"a": "\xed\xa0\x80"}', "BAD_JSON", "it is not text in UTF-8"),
        (b'{"a": 1, "a": 2}', "BAD_JSON", "it has the key 'a' twice"),
        (b'{"a": [{"b": 1, "b": 1}]}', "BAD_JSON", "it has the key 'b' twice"),
        (b'{"a:": "::", "a:": "::"}', "BAD_JSON", "it has the key 'a:' twice"),
        (b'{"a": 1, "\\u0061": ":"}', "BAD_JSON", "it has the key 'a' twice"),
        (b'{"a": NaN}', "BAD_JSON", "it holds NaN, which is no number"),
        (b'{"a": -Infinity}', "BAD_JSON", "it holds -Infinity, which is no number"),
        (b'{"a": 1e999}', "BAD_JSON", "it holds a number that is too large"),
        (b'{"a": 9223372036854775808}', "BAD_JSON", "it holds a whole number of more than 64 bits"),
        (b'{"a": ' + b"9" * 5000 + b"}", "BAD_JSON", "it holds a whole number of more than 64 bits"),
        (b"[" * 101 + b"]" * 101, "BAD_JSON", "it is nested too deeply"),
        (b"[" * 100_000 + b"]" * 100_000, "BAD_JSON", "it is nested too deeply"),
        (b"[1]", "INVALID_REQUEST", "the body is a list. Send a JSON object."),
        (b'"slm"', "INVALID_REQUEST", "the body is a string."),
        (b"true", "INVALID_REQUEST", "the body is a boolean."),
        (b"null", "INVALID_REQUEST", "the body is null."),
        (b"1.5", "INVALID_REQUEST", "the body is a number."),
    ],
)
def test_what_is_no_object_of_json_is_an_error_that_says_why(body: bytes, code: str, said: str) -> None:
    with pytest.raises(RequestError) as caught:
        parse_body(body)
    assert caught.value.code == code
    assert said in str(caught.value)
    assert "msgspec" not in str(caught.value)


@pytest.mark.parametrize(
    ("body", "where"),
    [
        (b'{"query": "\\ud800"}', "query"),
        (b'{"documents": ["a", {"text": "\\uDFFFa"}]}', "documents[1].text"),
        (b'{"documents": [{"\\udc00": 1}]}', "documents[0]"),
    ],
)
def test_half_of_a_surrogate_pair_is_told_with_its_place(body: bytes, where: str) -> None:
    with pytest.raises(RequestError, match="holds half of a surrogate pair") as caught:
        parse_body(body)
    assert (caught.value.code, caught.value.where, caught.value.status) == ("INVALID_INPUT", where, 422)


def test_half_of_a_surrogate_pair_beside_another_fault_is_an_error_too() -> None:
    with pytest.raises(RequestError, match="it has the key 'a' twice"):
        parse_body(b'{"a": "\\ud800", "a": 1}')


def test_more_values_than_are_taken_are_refused_before_they_take_memory() -> None:
    item, more = b"[],", b'{"query": "q", "documents": ['
    with pytest.raises(RequestError, match="more than 262144 commas and brackets outside of its texts") as caught:
        parse_body(more + item * MAX_SIGNS + b"[]]}")
    assert caught.value.code == "TOO_MUCH"
    assert len(parse_body(more + item * (MAX_SIGNS // 2 - 10) + b"[]]}")["documents"]) == MAX_SIGNS // 2 - 9


@pytest.mark.parametrize("text", ["a, b [c] {d} ", '\\",[{', "\\\\", "ü,"])
def test_signs_within_a_text_are_no_values(text: str) -> None:
    text *= MAX_SIGNS
    assert parse_body(json.dumps({"query": text, "top_n": 1}).encode()) == {"query": text, "top_n": 1}


@pytest.mark.parametrize(
    "body", [b'"' + b"," * 2**20, b'""' * 2**20 + b",", b":" * 2**20 + b"," * 2**19, b'"\\' * 2**19]
)
def test_bytes_that_are_no_json_are_no_work(body: bytes) -> None:
    with pytest.raises(RequestError):
        parse_body(body)


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=True)
    | st.text(st.characters(), max_size=8)
    | st.sampled_from([":", '":', "\\u003a", "{,[", '\\"']),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner, max_size=4),
    max_leaves=12,
)


@given(VALUES, st.booleans())
def test_both_readers_take_the_same(value: Any, escaped: bool) -> None:
    text = json.dumps(value, ensure_ascii=escaped)
    _agree(text.encode("utf-8", "surrogatepass"))


@given(st.lists(st.tuples(st.sampled_from(["a", "b", "a:", ":"]), VALUES), max_size=4))
def test_both_readers_refuse_a_key_that_stands_twice(pairs: list[tuple[str, Any]]) -> None:
    inner = ", ".join(f"{json.dumps(name)}: {json.dumps(value)}" for name, value in pairs)
    _agree(f"{{{inner}}}".encode())


@given(st.binary(max_size=40) | st.text('{}[]",:\\ud80anx1', max_size=20).map(str.encode))
def test_no_bytes_raise_anything_else(body: bytes) -> None:
    _agree(body)


def _agree(body: bytes) -> None:
    """That a body is taken where the other reader of JSON takes it, and read alike."""
    expected, found = _tried(schema.parse, body), _tried(parse_body, body)
    if isinstance(expected, dict):
        assert found == {name: value for name, value in expected.items() if value is not None}
    else:
        assert isinstance(found, RequestError)
        assert (found.code == "INVALID_REQUEST") == (not isinstance(expected, ValueError))


def _tried(read: Callable[[bytes], Any], body: bytes) -> Any:
    try:
        return read(body)
    except (ValueError, RequestError) as error:
        return error


def test_kinds_have_names() -> None:
    assert [kind_of(value) for value in (None, True, 1, 1.5, "", [], {})] == [
        "null",
        "a boolean",
        "a number",
        "a number",
        "a string",
        "a list",
        "an object",
    ]
