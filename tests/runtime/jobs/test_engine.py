"""What a library raises on a row costs that row alone; where nothing can be scored, none is blamed."""

from pathlib import Path
from typing import Any

import pytest
from tests.runtime.jobs.pretending import read, texts

from m0kit import Reranker
from m0kit.errors import DeviceLostError, M0kitError
from m0kit.jobs.job import score_file

ONE = {"threads": 1}
SAME = 1e-5  # fp32 noise of another batch, as in test_reranker


class OfRust(BaseException):
    """As pyo3 raises a panic."""


OfRust.__name__ = "PanicException"


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (MemoryError(), "there is not enough memory for it"),
        (OverflowError("x"), "it cannot be scored (OverflowError)."),
        (OfRust("x"), "it cannot be scored (PanicException)."),
        (M0kitError("the decoder graph failed."), "the decoder graph failed."),
    ],
)
def test_what_a_library_raises_on_a_row_is_that_rows_error(
    artifact: Path, source: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException, said: str
) -> None:
    rows = texts(50)
    poison = {rows[3]["query"], rows[30]["query"]}
    whole = Reranker.stream

    def stream(self: Reranker, pairs: Any, **options: Any) -> Any:
        for position, result in whole(self, pairs, **options):
            if pairs[position][0 if isinstance(pairs[position], tuple) else "query"] in poison:
                raise error
            yield position, result

    score_file(artifact, source, source.parent / "wanted.jsonl", load=ONE)
    monkeypatch.setattr(Reranker, "stream", stream)
    score_file(artifact, source, source.parent / "out.jsonl", load=ONE)
    for number, (row, wanted) in enumerate(
        zip(*(read(source.parent / f"{n}.jsonl") for n in ("out", "wanted")), strict=True)
    ):
        if rows[number]["query"] in poison:
            assert row["error"].startswith(f"line {number + 1}: {said}")
        else:
            assert row["score"] == pytest.approx(wanted["score"], abs=SAME)


@pytest.mark.parametrize(
    "error", [MemoryError(), M0kitError("the graph failed"), ZeroDivisionError(), KeyboardInterrupt()]
)
def test_where_nothing_can_be_scored_no_row_is_blamed(
    artifact: Path, source: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    def stream(*_: Any, **options: Any) -> Any:
        raise error
        yield

    with monkeypatch.context() as patch:
        patch.setattr(Reranker, "stream", stream)
        with pytest.raises(type(error)):
            score_file(artifact, source, source.parent / "out.jsonl", load=ONE)
    assert score_file(artifact, source, source.parent / "out.jsonl", load=ONE).errors == 0


def test_a_lost_gpu_is_no_rows_error_and_what_was_scored_before_is_kept(
    artifact: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, output = Reranker.stream, source.parent / "out.jsonl"

    def stream(self: Reranker, pairs: Any, **options: Any) -> Any:
        for number, found in enumerate(whole(self, pairs, **options)):
            if number == 30:
                raise DeviceLostError("the GPU cuda:0 was lost")
            yield found

    with monkeypatch.context() as patch:
        patch.setattr(Reranker, "stream", stream)
        with pytest.raises(DeviceLostError):
            score_file(artifact, source, output, load=ONE)
    done = score_file(artifact, source, output, load=ONE)
    assert (done.resumed, done.rows, done.errors) == (30, 50, 0)
