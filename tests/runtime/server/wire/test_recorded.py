"""Every request that a client was seen to send means what it should, and is answered with what that client reads."""

import json
from dataclasses import fields
from typing import Any

import pytest
from tests.runtime.server.wire.recordings import Recording, check_read, recordings

from m0kit.reading.inputs import Known, Picture, Text
from m0kit.scoring.schedule import Result
from m0kit.server.wire.answers import Told, answer
from m0kit.server.wire.ask import Ask, Link, Side
from m0kit.server.wire.requests import Dialect, parse_rerank, parse_score

DIALECTS: dict[str, Dialect] = {"/v1/rerank": "v1", "/v2/rerank": "v2", "/rerank": "plain", "/": "plain"}
POSTS = [recording for recording in recordings() if recording.method == "POST"]


def parse(recording: Recording) -> Ask:
    body = json.dumps(recording.body).encode()
    return parse_rerank(body, DIALECTS[recording.path]) if recording.path in DIALECTS else parse_score(body)


def told(side: Side) -> Any:
    """A side as recordings write it."""
    content = side.content
    if isinstance(content, Text):
        return content.text
    if isinstance(content, Link):
        return {"link": content.url}
    return {"id": content.id} if isinstance(content, Known) else {"image": True}


@pytest.mark.parametrize("recording", POSTS, ids=str)
def test_a_recorded_request_means_what_its_client_meant(recording: Recording) -> None:
    ask = parse(recording)
    means = dict(recording.means)
    query = means.pop("query")
    assert [told(side) for side in ask.queries] == (query if isinstance(query, list) else [query])
    assert [told(side) for side in ask.documents] == means.pop("documents")
    assert all(side.content.source for side in ask.documents if isinstance(side.content, Picture))
    others = [field for field in fields(Ask) if field.name not in ("queries", "documents", "sent")]
    assert {field.name: getattr(ask, field.name) for field in others} == {
        **{field.name: field.default for field in others},
        **means,
    }


@pytest.mark.parametrize("recording", POSTS, ids=str)
def test_a_recorded_request_is_answered_with_what_its_client_reads(recording: Recording) -> None:
    ask = parse(recording)
    results = [Result(0.25, -1.0), Result(0.75, 1.0), Result(0.5, 0.0)][: len(ask.documents)]
    check_read(recording, json.loads(answer(ask, results, Told("r-1", "m0", 42, 1_790_000_000))))


def test_recordings_tell_where_they_come_from_and_hold_no_key() -> None:
    found = recordings()
    assert len({recording.client for recording in found}) >= 20
    for recording in found:
        assert recording.headers.get("authorization", "") in (
            "",
            "KEY",
            "Bearer KEY",
            "Basic KEY",
            "Bearer fake-api-key",
        )
        assert recording.reads
