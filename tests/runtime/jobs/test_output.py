"""The finished file has a row for each, whole or not at all, and what could not be scored is listed beside it."""

import errno
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.alone import optional
from tests.runtime.jobs.pretending import leftovers, never, pretended, read, write

from m0kit import Reranker
from m0kit.errors import OutputError
from m0kit.jobs.job import score_file

pa, pq = optional("pyarrow"), optional("pyarrow.parquet")

ONE = {"threads": 1}
SAME = 1e-5  # fp32 noise of another batch, as in test_reranker


@pytest.mark.parametrize("exists", [True, False])
def test_an_output_that_is_a_link_means_the_file_it_leads_to(
    artifact: Path, source: Path, tmp_path: Path, exists: bool
) -> None:
    (tmp_path / "disk").mkdir()
    place, link = tmp_path / "disk" / "scores.jsonl", tmp_path / "out.jsonl"
    if exists:
        place.write_text("of before")
    link.symlink_to(place)
    score_file(artifact, source, link, load=ONE, overwrite=exists)
    assert link.is_symlink()
    assert len(place.read_text().splitlines()) == 50
    assert [path.name for path in place.parent.iterdir()] == ["scores.jsonl"]


@pytest.mark.parametrize("kind_in", ["jsonl", "parquet"])
def test_what_was_cut_is_said(artifact: Path, tmp_path: Path, kind_in: str) -> None:
    rows = [{"query": "w " * 5000, "document": "d " * 20000}, {"query": "q", "document": "d " * 20000}]
    done = score_file(artifact, write(tmp_path / f"in.{kind_in}", rows), tmp_path / "out.parquet", load=ONE)
    assert done.truncated == 2
    assert [row["truncated"] for row in read(tmp_path / "out.parquet")] == ["document,query", "document"]


@pytest.mark.parametrize(
    ("ids", "kind", "wanted"),
    [
        ([3, 1, None], "int64", [3, 1, None]),
        (["b", "a", "\ud800"], "string", ["b", "a", "\\ud800"]),
        ([1.5, 2.0, 3.0], "double", [1.5, 2.0, 3.0]),
        ([True, False, None], "bool", [True, False, None]),
        ([1, "a", {"b": [2]}], "string", ["1", "a", '{"b": [2]}']),
        ([1, 2**63, None], "string", ["1", str(2**63), None]),
    ],
)
def test_ids_of_json_lines_keep_their_type_where_parquet_has_one(
    artifact: Path, tmp_path: Path, ids: list[Any], kind: str, wanted: list[Any]
) -> None:
    source = write(tmp_path / "in.jsonl", [{"id": i, "query": "q", "document": "d"} for i in ids])
    score_file(artifact, source, tmp_path / "out.parquet", engine=pretended)
    column = pq.read_table(tmp_path / "out.parquet").column("id")
    assert (str(column.type), column.to_pylist()) == (kind, wanted)
    score_file(artifact, source, tmp_path / "out.jsonl", engine=pretended)
    assert [row["id"] for row in read(tmp_path / "out.jsonl")] == ids


@pytest.mark.parametrize(
    ("ids", "kind", "wanted"),
    [
        (lambda: pa.array([3, None], pa.int32()), "int32", [3, None]),
        (lambda: pa.array([2**64 - 1, None], pa.uint64()), "uint64", [2**64 - 1, None]),
        (lambda: pa.array([None, None], pa.string()), "string", [None, None]),
        (lambda: pa.array(["b", "a"]).dictionary_encode(), "string", ["b", "a"]),
        (lambda: pa.array([b"\x01\xff", None]), "string", ["01ff", None]),
        (lambda: pa.array([0, None], pa.timestamp("s")), "string", ["1970-01-01 00:00:00", None]),
    ],
)
def test_ids_of_parquet_keep_theirs_where_it_is_plain(
    artifact: Path, tmp_path: Path, ids: Callable[[], Any], kind: str, wanted: list[Any]
) -> None:
    pq.write_table(pa.table({"id": ids(), "query": ["q"] * 2, "document": ["d"] * 2}), tmp_path / "in.parquet")
    score_file(artifact, tmp_path / "in.parquet", tmp_path / "out.parquet", engine=pretended)
    column = pq.read_table(tmp_path / "out.parquet").column("id")
    assert (str(column.type), column.to_pylist()) == (kind, wanted)


@pytest.mark.parametrize("kind_out", ["jsonl", "parquet"])
def test_a_bad_row_costs_only_itself_and_is_listed(
    artifact: Path, reranker: Reranker, tmp_path: Path, kind_out: str
) -> None:
    (tmp_path / "torn.png").write_bytes(b"\x89PNG\r\n\x1a\n torn")
    good = b'{"id": "good", "query": "q", "document": "d"}'
    bad = {
        b"{not json": "not JSON",
        b"[1, 2]": "got list",
        b'"caf\xe9"': "not UTF-8",
        b"[" * 100_000: "not JSON",
        b'{"query": "a", "query": "b", "document": "d"}': "twice",
        b'{"query": "q", "document": "d", "id": NaN}': "holds NaN",
        b'{"id": "i", "document": "d"}': "has no 'query', got 'id', 'document'",
        b'{"query": "q", "document": null}': "has no 'document', got 'query'",
        b"{}": "has no 'query' and no 'document', got nothing",
        b'{"query": "", "document": "d"}': "query: is empty",
        b'{"query": 5, "document": "d"}': "query: expected text",
        b'{"query": "q", "document": {"text": "a", "image": "b"}}': "one of them",
        b'{"query": "q", "document": {"image": "no.png"}}': "No such file",
        b'{"query": "q", "document": {"image": "\\ud800.png"}}': "document",
        b'{"query": "q", "document": {"image": "torn.png"}}': "document",
    }
    source = tmp_path / "in.jsonl"
    source.write_bytes(b"\n".join([good, *bad, good]))
    output = tmp_path / f"out.{kind_out}"
    done = score_file(artifact, source, output, load=ONE)
    assert (done.rows, done.errors) == (len(bad) + 2, len(bad))
    rows = read(output)
    (score,) = reranker.score([("q", "d")])
    assert [rows[0]["score"], rows[-1]["score"]] == pytest.approx([score] * 2, abs=SAME)
    for number, (row, said) in enumerate(zip(rows[1:-1], bad.values(), strict=True), 2):
        assert (row["score"], row["logit"]) == (None, None)
        assert row["error"].startswith(f"line {number}: ")
        assert said in row["error"]
        assert not re.search(r"pair \d", row["error"])  # a position in some call
    assert done.error_file == tmp_path / f"out.{kind_out}.errors.jsonl"
    assert read(done.error_file) == [{"row": row["row"], "id": row["id"], "error": row["error"]} for row in rows[1:-1]]
    assert rows[7]["id"] == "i"
    # A stale list does not outlive the output that it belongs to.
    source.write_bytes(good)
    assert score_file(artifact, source, output, load=ONE, overwrite=True).error_file is None
    assert not (tmp_path / f"out.{kind_out}.errors.jsonl").exists()


@pytest.mark.parametrize("kind_in", ["jsonl", "parquet"])
@pytest.mark.parametrize("kind_out", ["jsonl", "parquet"])
def test_an_empty_input_has_an_empty_output(artifact: Path, tmp_path: Path, kind_in: str, kind_out: str) -> None:
    source = tmp_path / f"in.{kind_in}"
    if kind_in == "jsonl":
        source.touch()
    else:
        pq.write_table(pa.table({"query": pa.array([], pa.string()), "document": pa.array([], pa.string())}), source)
    assert score_file(artifact, source, tmp_path / f"out.{kind_out}", engine=never).rows == 0
    assert read(tmp_path / f"out.{kind_out}") == []
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize("failing", ["fsync", "replace"])
def test_a_disk_that_is_full_at_the_end_costs_no_score(
    artifact: Path, source: Path, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "full")

    output = source.parent / "out.parquet"
    with monkeypatch.context() as patch:
        patch.setattr(os, failing, full)
        with pytest.raises(OutputError, match=r"cannot be written \(No space left on device\)\. No score is lost"):
            score_file(artifact, source, output, engine=pretended)
    assert not output.exists()
    assert leftovers(source.parent) == [".out.parquet.partial"]
    assert score_file(artifact, source, output, engine=never).resumed == 50
    assert len(read(output)) == 50


@pytest.mark.parametrize(
    "name", [".out.jsonl.unfinished", ".out.jsonl.errors.jsonl.unfinished", "out.jsonl.errors.jsonl"]
)
@pytest.mark.parametrize("kind", ["link", "circle", "hard link", "fifo", "folder"])
def test_nothing_is_written_through_what_lies_in_the_way(artifact: Path, source: Path, name: str, kind: str) -> None:
    output, victim, planted = source.parent / "out.jsonl", source.parent / "victim", source.parent / name
    victim.write_text("precious")
    if kind == "link":
        planted.symlink_to(victim)
    elif kind == "circle":
        planted.symlink_to(planted)
    elif kind == "hard link":
        planted.hardlink_to(victim)
    elif kind == "fifo":
        os.mkfifo(planted)
    else:
        planted.mkdir()
    if kind == "folder" and planted.suffix != ".unfinished":  # which is how a killed process leaves its work
        with pytest.raises(OutputError, match=r"cannot be written .*No score is lost"):
            score_file(artifact, source, output, engine=pretended)
        planted.rmdir()
    score_file(artifact, source, output, engine=pretended)
    assert planted.suffix != ".unfinished" or not os.path.lexists(planted)
    assert victim.read_text() == "precious"
    assert len(read(output)) == 50
    assert len(read(source.parent / "out.jsonl.errors.jsonl")) == 7
