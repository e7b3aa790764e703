"""Bodies of the dialects: what each of their fields means, in any spelling, and the place of what is wrong."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.runtime.server.wire.test_contents import ANYTHING, FORMS, STRINGS, tried

from m0kit.reading.inputs import Text
from m0kit.server.problems import RequestError
from m0kit.server.wire.ask import Ask
from m0kit.server.wire.requests import SCORE_NAMES, Dialect, parse_rerank, parse_score

DIALECTS: tuple[Dialect, ...] = ("v1", "v2", "plain")
RANKING = {"query": "slm", "documents": ["a", "b"]}
SCORING = {"queries": "slm", "documents": ["a", "b"]}


def ranking(dialect: Dialect = "v1", **fields: Any) -> Ask:
    return parse_rerank(json.dumps({**RANKING, **fields}).encode(), dialect)


def scoring(**fields: Any) -> Ask:
    return parse_score(json.dumps({**SCORING, **fields}).encode())


@pytest.mark.parametrize("value", [True, "true", "True", "TRUE", "1", 1])
def test_a_boolean_has_many_spellings(value: Any) -> None:
    assert ranking(raw_scores=value).raw
    assert ranking("v2", return_documents=value).echo == "all"
    assert not ranking(use_activation=value).raw
    assert not ranking(truncation=value, truncate=value).must_fit
    assert ranking(stream=value).stream


@pytest.mark.parametrize("value", [False, "false", "False", "0", 0])
def test_so_has_its_opposite(value: Any) -> None:
    assert not scoring(raw_scores=value).raw
    assert ranking("v1", return_documents=value).echo == "none"
    assert scoring(use_activation=value).raw
    assert ranking(truncation=value).must_fit
    assert ranking(truncate=value).must_fit
    assert not ranking(stream=value).stream


@pytest.mark.parametrize("value", [3, "3", 3.0, "3.0", "0.3e1"])
def test_a_whole_number_has_many_spellings(value: Any) -> None:
    ask = ranking(top_n=value, max_tokens_per_doc=value, max_tokens_per_query=value, truncate_prompt_tokens=value)
    assert (ask.top_n, ask.max_document_tokens, ask.max_query_tokens, ask.max_prompt_tokens) == (3, 3, 3, 3)


@pytest.mark.parametrize("value", [None, 0, "0", -0.0])
def test_no_limit_has_many_spellings(value: Any) -> None:
    ask = ranking(max_tokens_per_doc=value, max_tokens_per_query=value, truncate_prompt_tokens=value)
    assert (ask.max_document_tokens, ask.max_query_tokens, ask.max_prompt_tokens) == (None, None, None)
    assert ranking("plain", top_n=value).top_n is None
    assert ranking(truncate_prompt_tokens=-1).max_prompt_tokens is None


@pytest.mark.parametrize("dialect", ["v1", "v2"])
def test_no_results_at_all_are_asked_for_by_nobody(dialect: Dialect) -> None:
    with pytest.raises(RequestError, match=r"top_n: is 0\. Give 1 or more, or leave it out for all\.") as caught:
        ranking(dialect, top_n=0)
    assert (caught.value.code, caught.value.where) == ("INVALID_REQUEST", "top_n")


@pytest.mark.parametrize(
    ("fields", "where"),
    [
        *[({"top_n": value}, "top_n") for value in (-1, 1.5, "x", "", True, [], {}, "1e400", "9" * 5000, 1e300)],
        ({"max_tokens_per_doc": -1}, "max_tokens_per_doc"),
        ({"max_tokens_per_query": "many"}, "max_tokens_per_query"),
        ({"truncate_prompt_tokens": -2}, "truncate_prompt_tokens"),
        *[({"raw_scores": value}, "raw_scores") for value in ("yes", "", 2, 1.0, [], {}, "null")],
        ({"return_documents": "all"}, "return_documents"),
        ({"use_activation": []}, "use_activation"),
        ({"truncation": "on"}, "truncation"),
        ({"truncation_direction": "Left"}, "truncation_direction"),
        ({"truncation_side": ["right"]}, "truncation_side"),
        ({"model": 7}, "model"),
        ({"rank_fields": "title"}, "rank_fields"),
        ({"rank_fields": ["title", 7]}, "rank_fields"),
        ({"stream": "no"}, "stream"),
    ],
)
def test_what_a_field_cannot_mean_is_refused_with_its_name(fields: dict[str, Any], where: str) -> None:
    with pytest.raises(RequestError) as caught:
        ranking(**fields)
    assert (caught.value.code, caught.value.where, caught.value.status) == ("INVALID_REQUEST", where, 422)
    assert len(str(caught.value)) < 200


def test_what_nobody_knows_is_ignored_and_null_is_absent() -> None:
    names = ("model", "top_n", "return_documents", "max_tokens_per_doc", "rank_fields", "raw_scores", "truncation",
             "truncate_prompt_tokens", "truncation_side", "use_activation", "stream")  # fmt: skip
    others = {"user": "me", "priority": 3, "overlap_tokens": 80, "instruction": {"a": []}, "cache_salt": "x"}
    for dialect in DIALECTS:
        assert ranking(dialect, **others, **dict.fromkeys(names)) == ranking(dialect)


@pytest.mark.parametrize(
    ("dialect", "asked", "echo"),
    [
        ("v1", None, "texts"), ("v1", True, "all"), ("v1", False, "none"),
        ("v2", None, "none"), ("v2", True, "all"), ("v2", False, "none"),
        ("plain", None, "texts"), ("plain", True, "all"), ("plain", False, "none"),
    ],
)  # fmt: skip
def test_documents_come_back_as_each_dialect_has_it(dialect: Dialect, asked: bool | None, echo: str) -> None:
    ask = ranking(dialect, return_documents=asked)
    assert ask.echo == echo
    assert len(ask.sent) == (0 if echo == "none" else 2)
    assert (ask.shape, ask.kind) == ("rerank", "rerank" if dialect == "plain" else "list")


def test_texts_are_of_another_dialect_on_its_path_alone() -> None:
    tei = {"query": "slm", "texts": ["a", "b"], "documents": ["c"], "stream": True}
    ask = parse_rerank(json.dumps({**tei, "return_text": True, "return_documents": False}).encode(), "plain")
    assert (ask.shape, ask.echo, ask.stream) == ("tei", "texts", False)
    assert [side.content for side in ask.documents] == [Text("a"), Text("b")]
    assert parse_rerank(json.dumps(tei).encode(), "plain").echo == "none"
    assert parse_rerank(json.dumps(tei).encode(), "v1").shape == "rerank"
    del tei["documents"]
    with pytest.raises(RequestError, match=r"documents: is missing\. Send `texts` to /rerank"):
        parse_rerank(json.dumps(tei).encode(), "v2")


@pytest.mark.parametrize("name", ["", "default", "default/not-specified", None])
def test_clients_that_were_told_no_model_mean_none(name: Any) -> None:
    assert ranking(model=name).model is None
    assert ranking(model="m0").model == "m0"


@pytest.mark.parametrize("names", SCORE_NAMES)
def test_pairs_have_many_names(names: tuple[str, str]) -> None:
    one, other = names
    ask = parse_score(json.dumps({one: "slm", other: ["a", {"text": "b"}]}).encode())
    assert [side.where for side in ask.queries] == [one]
    assert [side.where for side in ask.documents] == [f"{other}[0]", f"{other}[1].text"]
    assert (ask.shape, ask.echo, list(ask.sent)) == ("score", "none", [])
    each = parse_score(json.dumps({one: ["p", "q"], other: ["a", "b"]}).encode())
    assert [side.where for side in each.queries] == [f"{one}[0]", f"{one}[1]"]
    assert len(parse_score(json.dumps({one: ["p"], other: "a"}).encode()).documents) == 1


@pytest.mark.parametrize(
    ("fields", "where", "said"),
    [
        ({}, "", "the body has no pairs to score. Give two of these: queries and documents, queries and items"),
        ({"queries": "q", "text_2": "a"}, "", "the body has no pairs to score"),
        ({"queries": "q", "documents": None}, "", "the body has no pairs to score"),
        (
            {"queries": ["p", "q"], "items": ["a", "b", "c"]},
            "queries",
            "has 2 and items 3. Give one of queries",
        ),
        ({"queries": [], "items": ["a"]}, "queries", "is empty. Give one query at least."),
        ({"queries": ["q", ""], "items": ["a", "b"]}, "queries[1]", "is empty. Give some text."),
        ({"data_1": "q", "data_2": []}, "data_2", "is empty. Give one document at least."),
        ({"text_1": "q", "text_2": {"image": "x"}}, "text_2.image", "is not a data URI"),
    ],
)
def test_pairs_that_are_none_are_refused(fields: dict[str, Any], where: str, said: str) -> None:
    with pytest.raises(RequestError) as caught:
        parse_score(json.dumps(fields).encode())
    assert caught.value.where == where
    assert said in str(caught.value)


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize(
    ("fields", "where"),
    [
        ({"documents": ["a"]}, "query"),
        ({"query": None, "documents": ["a"]}, "query"),
        ({"query": "q"}, "documents"),
        ({"query": "q", "documents": []}, "documents"),
        ({"query": ["q"], "documents": ["a"]}, "query"),
        ({"query": "q", "documents": ["a", None]}, "documents[1]"),
    ],
)
def test_what_is_missing_is_named(fields: dict[str, Any], where: str, dialect: Dialect) -> None:
    with pytest.raises(RequestError) as caught:
        parse_rerank(json.dumps(fields).encode(), dialect)
    assert caught.value.where == where


# --- anything --------------------------------------------------------------------------------------

FIELDS = (
    "query", "documents", "texts", "queries", "items", "data_1", "data_2", "text_1", "text_2", "model", "top_n",
    "return_documents", "return_text", "raw_scores", "use_activation", "max_tokens_per_doc", "max_tokens_per_query",
    "truncate_prompt_tokens", "truncation", "truncate", "truncation_side", "truncation_direction", "rank_fields",
    "stream",
)  # fmt: skip
SPELLINGS = st.sampled_from(
    [True, False, None, "true", "0", 1, 0, 3, "3", -1, 2.0, 2**63 - 1, "right", "Right", "9" * 40]
)
BODIES = st.fixed_dictionaries(
    {"query": FORMS | STRINGS | ANYTHING},
    optional={
        **{name: st.lists(FORMS | STRINGS, max_size=3) | FORMS | ANYTHING for name in FIELDS[1:9]},
        **dict.fromkeys(FIELDS[9:], SPELLINGS | ANYTHING),
        "other": ANYTHING,
    },
)


def asked(body: bytes, name: str) -> Any:
    return tried(lambda: parse_score(body) if name == "score" else parse_rerank(body, name))  # type: ignore[arg-type]


@given(BODIES, st.sampled_from([*DIALECTS, "score"]))
def test_any_body_asks_for_something_or_has_an_error_that_names_a_field(value: dict[str, Any], name: str) -> None:
    found = asked(json.dumps(value).encode(), name)
    if isinstance(found, RequestError):
        assert found.status in (400, 422)
        first = found.where.partition(".")[0].partition("[")[0]
        assert first in (*FIELDS, "other", "the body", "") or found.where.startswith("other"), found.where
        json.dumps(found.body("r-1"), allow_nan=False).encode()
        return
    assert found.documents
    assert len(found.queries) in (1, len(found.documents))
    assert len(found.sent) == (0 if found.echo == "none" else len(found.documents))
    assert found.top_n is None or found.top_n >= 1
    assert isinstance(found.raw, bool)
    assert isinstance(found.must_fit, bool)


@given(BODIES, st.sampled_from([*DIALECTS, "score"]))
def test_both_readers_of_a_body_ask_for_the_same(value: dict[str, Any], name: str) -> None:
    """The slower one reads a body with an escaped colon, which the faster one leaves to it."""
    value = {**value, "other": ":"}
    fast = json.dumps(value)
    slow = fast[: fast.rindex('":"')] + '"\\u003a"' + fast[fast.rindex('":"') + 3 :]
    assert json.loads(slow) == json.loads(fast) or "NaN" in fast
    one, other = asked(fast.encode(), name), asked(slow.encode(), name)
    if isinstance(one, RequestError):
        assert isinstance(other, RequestError)
        assert (one.code, one.where, str(one)) == (other.code, other.where, str(other))
    else:
        assert one == other
