"""What is answered: each document once, best first and equal ones as they came, and never a number that is none."""

import json
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from m0kit.errors import InputError
from m0kit.reading.inputs import Text
from m0kit.scoring.schedule import Result
from m0kit.server.problems import RequestError
from m0kit.server.wire.answers import Told, answer, error_line, last_line, line
from m0kit.server.wire.ask import Ask, Side

TOLD = Told("r-1", "m0", 42, 1_790_000_000)
# Few values, so that many are equal, and logits far out, where scores are equal that logits tell apart.
LOGITS = st.lists(st.sampled_from([-800.0, -1.0, -0.0, 0.0, 0.5, 40.0, 41.0, 1e30]), min_size=1, max_size=12)


def asking(count: int, **fields: Any) -> Ask:
    documents = [Side(Text(f"d{i}"), f"documents[{i}]") for i in range(count)]
    sent = [{"text": f"d{i}"} for i in range(count)]
    return Ask([Side(Text("q"), "query")], documents, **{"sent": sent, **fields})


def result(logit: float) -> Result:
    return Result(1 / (1 + math.exp(-logit)) if logit > -700 else 0.0, logit)


def order(logits: list[float]) -> list[int]:
    return sorted(range(len(logits)), key=lambda i: (-logits[i], i))


@given(LOGITS, st.none() | st.integers(1, 15), st.booleans())
def test_each_document_comes_once_best_first_and_ties_as_they_came(
    logits: list[float], top_n: int | None, raw: bool
) -> None:
    results = [result(logit) for logit in logits]
    told = json.loads(answer(asking(len(logits), top_n=top_n, raw=raw), results, TOLD))
    assert [one["index"] for one in told["results"]] == order(logits)[:top_n]
    for one in told["results"]:
        assert one["relevance_score"] == (logits[one["index"]] if raw else results[one["index"]].score)
        assert one["document"] == {"text": f"d{one['index']}"}
    lines = json.loads(last_line(asking(len(logits), top_n=top_n, raw=raw), results, TOLD))
    assert lines == {**told, "done": True}


@given(LOGITS, st.booleans())
def test_the_other_shapes_have_the_same_numbers(logits: list[float], raw: bool) -> None:
    results = [result(logit) for logit in logits]
    scores = [one.logit if raw else one.score for one in results]
    tei = json.loads(answer(asking(len(logits), shape="tei", raw=raw), results, TOLD))
    assert tei == [{"index": i, "score": scores[i], "text": f"d{i}"} for i in order(logits)]
    score = json.loads(answer(asking(len(logits), shape="score", raw=raw), results, TOLD))
    assert score["data"] == [{"index": i, "object": "score", "score": scores[i]} for i in range(len(logits))]


@pytest.mark.parametrize("shape", ["rerank", "tei", "score"])
@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("raw", [True, False])
def test_what_is_no_number_is_never_answered(shape: Any, number: float, raw: bool) -> None:
    ask, results = asking(2, shape=shape, raw=raw), [result(1.0), Result(number, number)]
    with pytest.raises(RequestError, match="the model gave no number") as caught:
        answer(ask, results, TOLD)
    assert caught.value.status == 503
    with pytest.raises(RequestError, match="the model gave no number"):
        line(ask, 1, results[1], cached=False, ms=1.0)


def test_a_pair_without_a_result_is_never_answered() -> None:
    with pytest.raises(RequestError, match="the model gave no number"):
        answer(asking(1), [Result.failed(InputError("is empty."))], TOLD)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, {"index": 0, "relevance_score": 0.5, "document": {"text": "d0"}}),
        ({"sent": ()}, {"index": 0, "relevance_score": 0.5}),
    ],
)
def test_what_was_not_asked_for_is_not_there(fields: Any, expected: dict[str, Any]) -> None:
    (one,) = json.loads(answer(asking(1, **fields), [result(0.0)], TOLD))["results"]
    assert one == expected


def test_what_lost_its_end_says_so() -> None:
    (one,) = json.loads(answer(asking(1), [Result(0.5, 0.0, truncated=("document",))], TOLD))["results"]
    assert one["truncated"] == ["document"]


def test_lines_end_with_their_line() -> None:
    said = line(asking(1), 0, result(0.0), cached=True, ms=1.26)
    assert said.endswith(b"\n")
    assert json.loads(said) == {"index": 0, "relevance_score": 0.5, "cached": True, "ms": 1.3}
    said = error_line(RequestError("STOPPING", "this server is stopping."), "r-1")
    assert said.endswith(b"\n")
    assert json.loads(said)["code"] == "STOPPING"
