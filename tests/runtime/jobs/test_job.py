"""A job's output is the same whatever stopped it on the way, and nothing looks finished that is not."""

import base64
import contextlib
import functools
import itertools
import json
import os
import random
import resource
import shutil
import signal
import sqlite3
import subprocess
import sys
import tracemalloc
from collections.abc import Callable, Generator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tests.alone import optional
from tests.runtime.jobs.pretending import (
    Rows,
    StoppedError,
    leftovers,
    never,
    png,
    pretended,
    read,
    stopping,
    texts,
    write,
)

from m0kit import Reranker
from m0kit.artifact.manifest import read_manifest, write_manifest
from m0kit.cli.commands import cli
from m0kit.errors import DependencyError, DeviceLostError, InputError, M0kitError, OutputError
from m0kit.index import add, open_index
from m0kit.jobs import job as jobs
from m0kit.jobs import output as output_file
from m0kit.jobs import windows as windows_file
from m0kit.jobs.engine import Engine, local_engine
from m0kit.jobs.job import score_file
from m0kit.jobs.output import Summary
from m0kit.jobs.rows import Scored
from m0kit.jobs.windows import Work
from m0kit.reading import lines
from m0kit.terminal import run

pa, pq = optional("pyarrow"), optional("pyarrow.parquet")

Make = Callable[..., Image.Image]
ONE = {"threads": 1}
# fp32 noise of another batch, as in test_reranker: an interrupted job packs its rows differently.
SAME = 1e-5


# --- what is read and written ------------------------------------------------------------------------


@pytest.mark.parametrize("kind_in", ["jsonl", "parquet"])
@pytest.mark.parametrize("kind_out", ["jsonl", "parquet"])
def test_scores_are_the_rerankers_own_for_all_kinds_of_pairs(
    artifact: Path, reranker: Reranker, tmp_path: Path, pages: dict[str, bytes], kind_in: str, kind_out: str
) -> None:
    uri = "data:image/png;base64," + base64.b64encode(pages["scan.png"]).decode()
    by_path, by_uri, text = {"image": "page.png"}, {"image": uri}, {"text": "markdown 漢字"}
    rows = [
        {"id": i, "query": query, "document": document, "other": i}
        for i, (query, document) in enumerate([(text, text), (text, by_path), (by_uri, text), (by_path, by_uri)] * 3)
    ]
    meant = {id(text): "markdown 漢字", id(by_path): pages["page.png"], id(by_uri): pages["scan.png"]}
    wanted = [(meant[id(row["query"])], meant[id(row["document"])]) for row in rows]
    output = tmp_path / f"out.{kind_out}"
    done = score_file(artifact, write(tmp_path / f"in.{kind_in}", rows), output, load=ONE)
    assert done == Summary(rows=12, resumed=0, errors=0, truncated=0, error_file=None)
    found = read(output)
    assert [list(row) for row in found] == [["row", "id", "score", "logit", "truncated", "error"]] * 12
    assert [(row["row"], row["id"]) for row in found] == [(i, i) for i in range(12)]
    assert np.array_equal(np.float32([row["score"] for row in found]), reranker.score(wanted))
    assert np.array_equal(np.float32([row["logit"] for row in found]), reranker.score(wanted, raw=True))
    assert {row["truncated"] for row in found} == {row["error"] for row in found} == {None}
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize(
    "form",
    [
        lambda raw: {"bytes": raw, "path": "of no meaning.png"},
        lambda _: {"bytes": None, "path": "page.png"},
        lambda raw: {"image": {"bytes": raw, "path": None}, "text": None},
        lambda _: {"image": {"bytes": None, "path": "page.png"}},
        lambda raw: {"image": raw},
        lambda raw: raw,
    ],
)
def test_images_in_parquet_come_in_the_forms_that_datasets_have(
    artifact: Path, reranker: Reranker, tmp_path: Path, pages: dict[str, bytes], form: Callable[[bytes], Any]
) -> None:
    rows = [{"query": "markdown", "document": form(pages["page.png"])}]
    score_file(artifact, write(tmp_path / "in.parquet", rows), tmp_path / "out.parquet", load=ONE)
    (row,) = read(tmp_path / "out.parquet")
    assert "id" not in row
    assert row["score"] == reranker.score([("markdown", pages["page.png"])])[0]


@pytest.mark.parametrize("text", [
    b'\xef\xbb\xbf{"query": "q", "document": "d"}\n{"query": "q", "document": "e"}\n',
    b'{"query": "q", "document": "d"}\r\n{"query": "q", "document": "e"}\r\n',
    b'\n \n{"query": "q", "document": "d"}\n\n\n{"query": "q", "document": "e"}',
])  # fmt: skip
def test_marks_line_ends_and_blank_lines_are_no_rows(artifact: Path, tmp_path: Path, text: bytes) -> None:
    (tmp_path / "in.jsonl").write_bytes(text)
    done = score_file(artifact, tmp_path / "in.jsonl", tmp_path / "out.jsonl", engine=pretended)
    assert (done.rows, done.errors) == (2, 0)


def test_a_line_too_long_for_memory_is_a_bad_row(
    artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lines, "MAX_LINE_BYTES", 100)
    good = {"query": "q", "document": "d"}
    source = write(tmp_path / "in.jsonl", [good, {"query": "q", "document": "d" * 1000}, good])
    score_file(artifact, source, tmp_path / "out.jsonl", engine=pretended)
    assert ["longer than" in (row["error"] or "") for row in read(tmp_path / "out.jsonl")] == [False, True, False]


def test_text_in_parquet_that_is_not_unicode_is_a_bad_row(artifact: Path, tmp_path: Path) -> None:
    raw = pa.array([b"d", b"caf\xe9", b"e"])
    table = pa.table({"query": ["q"] * 3, "document": raw.view(pa.string())})
    pq.write_table(table, tmp_path / "in.parquet")
    score_file(artifact, tmp_path / "in.parquet", tmp_path / "out.jsonl", engine=pretended)
    assert ["UTF-8" in (row["error"] or "") for row in read(tmp_path / "out.jsonl")] == [False, True, False]


# --- what is refused ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "raw", "said"),
    [
        ("in.csv", b"query,document", "in.csv: JSON lines or Parquet is told from the name"),
        ("in.parquet", b"PAR1 torn", "in.parquet: cannot be read as Parquet"),
        ("in.jsonl", '{"query": "q"}'.encode("utf-16"), "in.jsonl: is UTF-16"),
        ("nowhere.jsonl", None, "nowhere.jsonl: no such file"),
    ],
)
def test_an_input_that_is_none_is_refused(
    artifact: Path, tmp_path: Path, name: str, raw: bytes | None, said: str
) -> None:
    if raw is not None:
        (tmp_path / name).write_bytes(raw)
    with pytest.raises(InputError, match=said):
        score_file(artifact, tmp_path / name, tmp_path / "out.jsonl", engine=never)
    assert {path.name for path in tmp_path.iterdir()} <= {name}


@pytest.mark.parametrize(("columns", "said"), [
    ({"query": ["q"], "text": ["d"]}, "no column 'document', only 'query', 'text'"),
    ({"Query": ["q"]}, "no column 'query' and no column 'document'"),
])  # fmt: skip
def test_parquet_without_the_columns_is_refused(
    artifact: Path, tmp_path: Path, columns: dict[str, list[str]], said: str
) -> None:
    pq.write_table(pa.table(columns), tmp_path / "in.parquet")
    with pytest.raises(InputError, match=said):
        score_file(artifact, tmp_path / "in.parquet", tmp_path / "out.jsonl", engine=never)
    assert leftovers(tmp_path) == []


def test_parquet_damaged_in_the_middle_costs_the_rows_there(artifact: Path, tmp_path: Path) -> None:
    source = tmp_path / "in.parquet"
    rows = [{"query": f"{i} q", "document": f"{i} d"} for i in range(2000)]
    pq.write_table(pa.Table.from_pylist(rows), source, row_group_size=500, compression="none", use_dictionary=False)
    raw = bytearray(source.read_bytes())
    at = pq.ParquetFile(source).metadata.row_group(2).column(0).data_page_offset
    raw[at + 60 : at + 100] = b"\xff" * 40
    source.write_bytes(raw)
    done = score_file(artifact, source, tmp_path / "out.jsonl", engine=pretended)
    assert done.rows == 2000
    for row in read(tmp_path / "out.jsonl"):
        is_bad = 1000 <= row["row"] < 1500
        assert (row["error"] == f"row {row['row']}: the file is damaged here. Write it again.") == is_bad
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize(
    ("output", "said"),
    [
        ("out.txt", "told from the name"),
        ("in.jsonl", "is the file that is read"),
        ("folder.jsonl", "is a folder"),
        ("nowhere/out.jsonl", "no such folder"),
    ],
)
def test_an_output_that_cannot_be_is_refused(artifact: Path, source: Path, output: str, said: str) -> None:
    (source.parent / "folder.jsonl").mkdir()
    before = source.read_bytes()
    with pytest.raises(OutputError, match=said):
        score_file(artifact, source, source.parent / output, engine=never, overwrite=True)
    assert source.read_bytes() == before


def test_without_pyarrow_the_extra_is_named(artifact: Path, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(DependencyError, match=r"m0kit\[parquet\]"):
        score_file(artifact, source, source.parent / "out.parquet", engine=never)


def test_a_finished_output_is_replaced_only_when_asked(artifact: Path, source: Path) -> None:
    output = source.parent / "out.jsonl"
    output.write_text("something else")
    with pytest.raises(OutputError, match=r"exists\. Choose another file, or give --overwrite"):
        score_file(artifact, source, output, engine=never)
    assert leftovers(source.parent) == []
    # The old one stays until the new one is whole; the same command goes on where it was.
    with pytest.raises(StoppedError):
        score_file(artifact, source, output, engine=stopping(20), overwrite=True)
    assert output.read_text() == "something else"
    with pytest.raises(OutputError, match="exists"):
        score_file(artifact, source, output, engine=never)
    assert score_file(artifact, source, output, engine=stopping(30), overwrite=True).resumed == 20
    assert len(read(output)) == 50


def test_an_output_that_appears_meanwhile_is_not_replaced(artifact: Path, source: Path) -> None:
    output = source.parent / "out.jsonl"

    def meddling(artifact: Path, load: Mapping[str, Any], work: Work) -> Generator[Scored | None, None, None]:
        output.write_text("precious")
        yield from pretended(artifact, load, work)

    with pytest.raises(OutputError, match="has appeared meanwhile"):
        score_file(artifact, source, output, engine=meddling)
    assert output.read_text() == "precious"
    output.unlink()
    assert score_file(artifact, source, output, engine=never).resumed == 50


def another_artifact(artifact: Path, folder: Path) -> Path:
    shutil.copytree(artifact, folder)
    manifest = read_manifest(folder)
    head = replace(manifest.files["head.onnx"], sha256="0" * 64)
    write_manifest(folder, replace(manifest, files={**manifest.files, "head.onnx": head}))
    return folder


@pytest.mark.parametrize("change", ["longer", "other bytes", "touched", "artifact", "max_pixels"])
def test_the_journal_of_another_job_is_refused_and_overwritten_when_asked(
    artifact: Path, source: Path, change: str
) -> None:
    output = source.parent / "out.jsonl"
    with pytest.raises(StoppedError):
        score_file(artifact, source, output, engine=stopping(20))
    load: dict[str, Any] = {}
    if change == "longer":
        source.write_text(source.read_text("utf-8") + '{"query": "q", "document": "d"}\n', "utf-8")
        said = "the input's size"
    elif change == "other bytes":
        stat = source.stat()
        source.write_text(source.read_text("utf-8").replace("r49", "s49"), "utf-8")
        os.utime(source, ns=(stat.st_atime_ns, stat.st_mtime_ns))
        said = "different: the input's content"
    elif change == "touched":
        os.utime(source)
        said = "different: the input's time of change"
    elif change == "artifact":
        artifact = another_artifact(artifact, source.parent / "other")
        said = "different: the artifact"
    else:
        load = {"max_pixels": 4000}
        said = r"different: max_pixels \(was \d+, is 4000\)"
    with pytest.raises(OutputError, match=f"{said}.*--overwrite"):
        score_file(artifact, source, output, load=load, engine=never)
    done = score_file(artifact, source, output, load=load, engine=pretended, overwrite=True)
    assert (done.resumed, len(read(output))) == (0, done.rows)


def test_options_that_leave_scores_alone_may_change(artifact: Path, source: Path) -> None:
    output = source.parent / "out.jsonl"
    with pytest.raises(StoppedError):
        score_file(artifact, source, output, engine=stopping(20), load={"threads": 1, "device": "cpu"})
    manifest = read_manifest(artifact)
    # What a setting is counts, not whether it was said; nor where the artifact lies.
    said = {"kv": "fp32", "max_pixels": manifest.model.image.max_pixels, "max_length": manifest.model.prompt.max_length}
    load = {"threads": 2, "memory": "low", "cache_bytes": 1 << 20, **said}
    moved = Path(shutil.copytree(artifact, source.parent / "moved"))
    assert score_file(moved, source, output, engine=stopping(30), load=load).resumed == 20


def library(artifact: Path, folder: Path, kv: Literal["fp16", "int8"], text: str = "markdown") -> Path:
    """An index of the documents "a" and "b"; what was there is gone."""
    shutil.rmtree(folder, ignore_errors=True)
    reranker = Reranker.load(artifact, threads=1, kv=kv)
    with open_index(folder, reranker) as store:
        add(reranker, store, [("a", text, ""), ("b", "Wetter in Oslo", "")])
    return folder


def changes_of_an_index(artifact: Path, folder: Path, change: str) -> None:
    if change == "another kv":
        library(artifact, folder, "int8")
    elif change == "made again":
        library(artifact, folder, "fp16")
    else:
        reranker = Reranker.load(artifact, threads=1, kv="fp16")
        with open_index(folder, reranker) as store:
            if change == "a document replaced":
                add(reranker, store, [("a", "another text", "")])
            elif change == "a document removed":
                store.remove(["a"])
            else:
                add(reranker, store, [("a", "markdown", "elsewhere"), ("c", "a new one", "")])
                store.prune(unused_days=0)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("another kv", r"different: the index \(was [^,]*, is [^,]*\), kv \(was fp16, is int8\)"),
        ("made again", "different: the index"),
        ("a document replaced", "different: the index"),
        ("a document removed", "different: the index"),
        ("a document added", None),
    ],
)
def test_an_index_that_means_something_else_makes_it_another_job(
    artifact: Path, tmp_path: Path, change: str, said: str | None
) -> None:
    source = write(tmp_path / "in.jsonl", [{"query": f"q{i}", "document": {"id": "ab"[i % 2]}} for i in range(20)])
    output, load = tmp_path / "out.jsonl", {"index": library(artifact, tmp_path / "index", "fp16"), **ONE}
    with pytest.raises(StoppedError):
        score_file(artifact, source, output, load=load, engine=stopping(10, local_engine))
    changes_of_an_index(artifact, tmp_path / "index", change)
    if said is None:
        assert score_file(artifact, source, output, load=load).resumed == 10
        return
    with pytest.raises(OutputError, match=f"{said}.*--overwrite"):
        score_file(artifact, source, output, load=load, engine=never)
    score_file(artifact, source, output, load=load, engine=pretended, overwrite=True)


def test_an_index_that_changes_on_the_way_is_noticed(artifact: Path, tmp_path: Path) -> None:
    source = write(tmp_path / "in.jsonl", [{"query": f"q{i}", "document": {"id": "a"}} for i in range(20)])
    folder = library(artifact, tmp_path / "index", "fp16")

    def meddling(artifact: Path, load: Mapping[str, Any], work: Work) -> Generator[Scored | None, None, None]:
        yield from local_engine(artifact, load, work)
        changes_of_an_index(artifact, folder, "a document replaced")

    with pytest.raises(OutputError, match="not written, since the index changed while rows were scored"):
        score_file(artifact, source, tmp_path / "out.jsonl", load={"index": folder, **ONE}, engine=meddling)
    assert not (tmp_path / "out.jsonl").exists()


@pytest.mark.parametrize(
    ("load", "said"),
    [
        ({}, r"different: onnxruntime \(was 1\.\S+, is 0\.9\.1\)"),
        ({"kv": "int8"}, r"kv \(was fp32, is int8\)"),
        ({"device": "cuda:1"}, r"device \(was cpu, is cuda\)"),
        ({"max_length": 3000}, "max_length"),
        ({"open_graph": pretended}, r"open_graph \(was None, is pretended\)"),
    ],
)
def test_another_version_or_setting_makes_it_another_job(
    artifact: Path, source: Path, monkeypatch: pytest.MonkeyPatch, load: dict[str, Any], said: str
) -> None:
    output = source.parent / "out.jsonl"
    with pytest.raises(StoppedError):
        score_file(artifact, source, output, engine=stopping(20))
    if not load:
        monkeypatch.setattr("m0kit.jobs.engine.engine_version", lambda: "0.9.1")
    with pytest.raises(OutputError, match=f"{said}.*--overwrite"):
        score_file(artifact, source, output, load=load, engine=never)


def test_a_row_whose_image_is_another_one_by_now_is_scored_again(
    artifact: Path, reranker: Reranker, tmp_path: Path, pages: dict[str, bytes], picture: Make
) -> None:
    documents = [{"image": "page.png"}, {"image": "scan.png"}, {"image": "later.png"}, {"text": "markdown"}]
    source = write(tmp_path / "in.jsonl", [{"query": "Wetter", "document": documents[i % 4]} for i in range(12)])
    output = tmp_path / "out.jsonl"
    with pytest.raises(StoppedError):
        score_file(artifact, source, output, load=ONE, engine=stopping(11, local_engine))
    changed = png(picture(60, 80, 9))
    (tmp_path / "page.png").write_bytes(changed)
    (tmp_path / "later.png").write_bytes(changed)
    (tmp_path / "scan.png").write_bytes(pages["scan.png"])
    os.utime(tmp_path / "scan.png", ns=(0, (tmp_path / "scan.png").stat().st_mtime_ns))
    done = score_file(artifact, source, output, load=ONE)
    assert (done.rows, done.errors) == (12, 0)
    assert done.resumed < 6
    wanted = reranker.score([("Wetter", content) for content in (changed, pages["scan.png"], changed, "markdown")] * 3)
    np.testing.assert_allclose([row["score"] for row in read(output)], wanted, atol=SAME, rtol=0)


def test_a_journal_of_another_format_is_refused_and_overwritten_when_asked(artifact: Path, source: Path) -> None:
    output, journal = source.parent / "out.jsonl", source.parent / ".out.jsonl.partial"
    with sqlite3.connect(journal) as db:
        db.execute("CREATE TABLE facts (name TEXT PRIMARY KEY, value TEXT)")
        db.execute("CREATE TABLE rows (row INTEGER PRIMARY KEY, score REAL)")
        db.execute("INSERT INTO facts VALUES ('the journal''s format', '1'), ('index', 'None')")
    db.close()
    with pytest.raises(OutputError, match=r"is no journal of this version.*Give --overwrite"):
        score_file(artifact, source, output, engine=never)
    assert score_file(artifact, source, output, engine=pretended, overwrite=True).rows == 50


def test_overwrite_starts_anew_what_was_begun_without(artifact: Path, source: Path) -> None:
    output = source.parent / "out.jsonl"
    with pytest.raises(StoppedError):
        score_file(artifact, source, output, engine=stopping(20))
    assert score_file(artifact, source, output, engine=pretended, overwrite=True).resumed == 0


def test_a_damaged_journal_is_said_and_overwritten_when_asked(artifact: Path, source: Path) -> None:
    output = source.parent / "out.jsonl"
    (source.parent / ".out.jsonl.partial").write_bytes(b"no database, but some bytes" * 99)
    with pytest.raises(OutputError, match=r"is no journal .*or a damaged one\. Give --overwrite"):
        score_file(artifact, source, output, engine=never)
    assert score_file(artifact, source, output, engine=pretended, overwrite=True).rows == 50


def test_an_input_that_changes_on_the_way_is_noticed(artifact: Path, source: Path) -> None:
    def meddling(artifact: Path, load: Mapping[str, Any], work: Work) -> Generator[Scored | None, None, None]:
        yield from pretended(artifact, load, work)
        os.utime(source)

    with pytest.raises(InputError, match="has changed while it was read"):
        score_file(artifact, source, source.parent / "out.jsonl", engine=meddling)
    assert not (source.parent / "out.jsonl").exists()


def test_rows_that_an_engine_leaves_out_are_noticed_and_rows_that_come_twice_ignored(
    artifact: Path, source: Path
) -> None:
    def doubling(artifact: Path, load: Mapping[str, Any], work: Work) -> Generator[Scored | None, None, None]:
        for result in pretended(artifact, load, work):
            yield result
            if result is not None:
                yield Scored(result.number, None, 0.5, 0.5, None, None)

    def lossy(artifact: Path, load: Mapping[str, Any], work: Work) -> Generator[Scored | None, None, None]:
        yield from (result for result in doubling(artifact, load, work) if result is None or result.number != 3)

    output = source.parent / "out.jsonl"
    with pytest.raises(OutputError, match="1 of 50 rows have no result"):
        score_file(artifact, source, output, engine=lossy)
    assert not output.exists()
    score_file(artifact, source, output, engine=doubling)
    score_file(artifact, source, source.parent / "plain.jsonl", engine=pretended)
    assert output.read_bytes() == (source.parent / "plain.jsonl").read_bytes()


def test_strict_stops_at_a_bad_row_and_keeps_the_others(artifact: Path, tmp_path: Path) -> None:
    source = write(tmp_path / "in.jsonl", [*texts(5), {"query": "q", "document": {"image": "page.png"}}])
    output = tmp_path / "out.jsonl"
    with pytest.raises(InputError, match=r"in\.jsonl: line 6: document: .*page.png: No such file"):
        score_file(artifact, source, output, load=ONE, strict=True)
    assert not output.exists()
    # A run that is not strict keeps the error, a strict one tries again: by then the image may be there.
    with pytest.raises(StoppedError):
        score_file(artifact, source, output, load=ONE, engine=stopping(4, local_engine))
    Image.new("RGB", (60, 60)).save(tmp_path / "page.png")
    done = score_file(artifact, source, output, load=ONE, strict=True)
    assert (done.errors, done.rows) == (0, 6)
    assert done.resumed in (3, 4)


# --- windows -----------------------------------------------------------------------------------------


def test_memory_does_not_grow_with_the_file(artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(windows_file, "WINDOW_ROWS", 500)
    monkeypatch.setattr(output_file, "WRITE_ROWS", 500)
    peaks = []
    for count in (1000, 20_000):
        source = write(tmp_path / f"{count}.jsonl", texts(count))
        tracemalloc.start()
        try:
            score_file(artifact, source, tmp_path / f"{count}.parquet", engine=pretended)
            peaks.append(tracemalloc.get_traced_memory()[1])
        finally:  # without pyarrow it is skipped here
            tracemalloc.stop()
    # 20,000 rows as Python objects are some 10 MB more; small caches may grow.
    assert peaks[1] - peaks[0] < 1 << 20


# --- interruptions -----------------------------------------------------------------------------------


@settings(max_examples=60)
@given(
    count=st.integers(0, 40),
    stops=st.lists(st.integers(0, 12), max_size=5),
    window=st.integers(1, 50),
    kinds=st.tuples(st.sampled_from(["jsonl", "parquet"]), st.sampled_from(["jsonl", "parquet"])),
)
def test_any_split_of_the_work_gives_the_same_output(
    artifact: Path, tmp_path_factory: pytest.TempPathFactory, count: int, stops: list[int], window: int,
    kinds: tuple[str, str],
) -> None:  # fmt: skip
    folder = tmp_path_factory.mktemp("split")
    source = folder / f"in.{kinds[0]}"
    schema = pa.schema([(name, pa.string()) for name in ("id", "query", "document")])
    if kinds[0] == "jsonl":
        write(source, texts(count))
    else:
        pq.write_table(pa.Table.from_pylist(texts(count), schema), source, row_group_size=7)
    wanted = folder / f"wanted.{kinds[1]}"
    score_file(artifact, source, wanted, engine=pretended)
    output = folder / f"out.{kinds[1]}"
    done = 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(windows_file, "WINDOW_ROWS", window)
        for after in stops:
            if done + after >= count:
                break
            with pytest.raises(StoppedError):
                score_file(artifact, source, output, engine=stopping(after))
            done += after
        summary = score_file(artifact, source, output, engine=pretended)
    assert (summary.rows, summary.resumed) == (count, done)
    assert read(output) == read(wanted)
    assert [row["row"] for row in read(output)] == list(range(count))


# Runs the command with small windows, each of which is committed, and nothing that the clock decides. Says how many
# rows are then kept, and after commit number `hold` waits for a line, or for whatever ends it.
COMMAND = """
import os, sys
from m0kit.cli.commands import main
from m0kit.jobs import job, journal, windows

journal.COMMIT_S, job.PROGRESS_S, windows.WINDOW_ROWS = 1e9, 1e9, 100
hold, count, commit = int(sys.argv.pop(1)), 0, journal.Journal.commit

def committed(one):
    global count
    commit(one)
    count += 1
    os.write(1, b"%d\\n" % one.count())
    if count == hold:
        sys.stdin.readline()

journal.Journal.commit = committed
sys.argv[0] = "m0kit"
main()
"""


def command(*args: object, hold: int = 0, **options: Any) -> "subprocess.Popen[str]":
    if any(str(word).endswith(".parquet") for word in args):
        pytest.importorskip("pyarrow")
    words = [sys.executable, "-c", COMMAND, str(hold), "score", *map(str, args), "--threads", "1"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(words, text=True, **(pipes | options))


def acknowledged(child: "subprocess.Popen[str]", commits: int) -> int:
    """The rows that are kept after so many commits, or fewer where the command ends before."""
    assert child.stdout is not None
    said = list(itertools.islice(child.stdout, commits))
    return int(said[-1]) if said else 0


def test_a_job_killed_after_any_commit_goes_on(artifact: Path, tmp_path: Path) -> None:
    rows = texts(1500)
    source = write(tmp_path / "in.jsonl", rows)
    child = command(artifact, source, "-o", tmp_path / "wanted.parquet")
    assert child.communicate()[0].split()[0] == "100"
    wanted = read(tmp_path / "wanted.parquet")
    rng = random.Random(7)
    output, partial = tmp_path / "out.parquet", tmp_path / ".out.parquet.partial"
    for _ in range(12):
        child = command(artifact, source, "-o", output)
        kept = acknowledged(child, rng.randint(1, 4))
        child.kill()
        child.communicate()
        assert not output.exists() or len(read(output)) == len(rows)  # whole, or not there
        if partial.exists():
            with contextlib.closing(sqlite3.connect(partial)) as journal:
                assert journal.execute("SELECT COUNT(*) FROM rows").fetchone()[0] >= kept
        else:  # the last one, and it was quick
            assert output.exists()
            check(output, wanted)
            output.unlink()
    child = command(artifact, source, "-o", output)
    assert child.communicate()[1].startswith(f"{output}: 1500 rows")
    check(output, wanted)
    assert leftovers(tmp_path) == []


def check(output: Path, wanted: Rows) -> None:
    found = read(output)
    assert [(row["row"], row["id"], row["error"]) for row in found] == [
        (row["row"], row["id"], row["error"]) for row in wanted
    ]
    np.testing.assert_allclose([r["score"] for r in found], [r["score"] for r in wanted], atol=SAME, rtol=0)


# Every file operation of a whole job in turn is the last one before the process is killed.
EACH_OPERATION = """
import os, signal, sys
from pathlib import Path
from m0kit.jobs import journal
from m0kit.jobs.job import score_file
from m0kit.jobs.rows import Scored

journal.COMMIT_S = 0
artifact, source, output = map(Path, sys.argv[1:])
count, limit = 0, None

def watch(event, _):
    global count
    if limit is not None and event in ("open", "os.rename", "os.remove", "sqlite3.connect"):
        count += 1
        if count == limit:
            os.kill(os.getpid(), signal.SIGKILL)

sys.addaudithook(watch)

def engine(artifact, load, work):
    for window in work:
        for row in window:
            error = "bad" if row.number == 3 else None
            yield Scored(row.number, row.id, None if error else 0.5, None if error else 0.0, None, error)

score_file(artifact, source, output, engine=engine)
wanted = output.read_bytes()
output.unlink()
kill_at = killed = 0
done = False
while not done:
    kill_at += 1
    pid = os.fork()
    if pid == 0:
        limit = kill_at
        score_file(artifact, source, output, engine=engine)
        os._exit(0)
    done = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    killed += not done
    assert not output.exists() or output.read_bytes() == wanted
    partial = output.with_name(f".{output.name}.partial")
    if not output.exists() or partial.exists():
        score_file(artifact, source, output, engine=engine)
    assert output.read_bytes() == wanted
    assert not [p.name for p in output.parent.iterdir() if p.name.startswith(".")]
    assert output.with_name(f"{output.name}.errors.jsonl").read_text().count("\\n") == 1
    output.unlink()
print(killed)
"""


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_a_kill_before_any_file_operation_is_survived(artifact: Path, tmp_path: Path, kind: str) -> None:
    if kind == "parquet":
        pytest.importorskip("pyarrow")
    source = write(tmp_path / "in.jsonl", texts(8))
    args = [sys.executable, "-c", EACH_OPERATION, str(artifact), str(source), str(tmp_path / f"out.{kind}")]
    done = subprocess.run(args, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 8


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_job_keeps_what_is_done(
    artifact: Path, tmp_path: Path, number: signal.Signals, code: int
) -> None:
    source, output = write(tmp_path / "in.jsonl", texts(4000)), tmp_path / "out.jsonl"
    child = command(artifact, source, "-o", output, hold=3)
    kept = acknowledged(child, 3)
    child.send_signal(number)
    _, said = child.communicate()
    assert child.returncode == code
    assert f"{output}: not finished; the same command goes on with it\n" in said
    assert "Traceback" not in said
    assert leftovers(tmp_path) == [".out.jsonl.partial"]
    done = score_file(artifact, source, output, load=ONE)
    assert (done.resumed, done.rows) == (kept, 4000) == (300, 4000)


def test_two_jobs_never_write_one_output(artifact: Path, source: Path) -> None:
    output = source.parent / "out.jsonl"

    def crowded(artifact: Path, load: Mapping[str, Any], work: Work) -> Generator[Scored | None, None, None]:
        for result in pretended(artifact, load, work):
            yield result
            if result is not None and result.number == 25:
                yield None  # committed: the lock outlives transactions
                for more in ([], ["--overwrite"]):
                    child = command(artifact, source, "-o", output, *more)
                    assert "another job is writing it" in child.communicate()[1]
                    assert child.returncode == 1

    assert score_file(artifact, source, output, engine=crowded).rows == 50


def test_a_journal_that_cannot_grow_is_said_and_kept(artifact: Path, tmp_path: Path) -> None:
    source, output = write(tmp_path / "in.jsonl", texts(3000)), tmp_path / "out.jsonl"

    def small_files() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))

    child = command(artifact, source, "-o", output, preexec_fn=small_files)
    assert "the journal cannot be written" in child.communicate()[1]
    assert child.returncode == 1
    assert not output.exists()
    done = score_file(artifact, source, output, load=ONE)
    assert 0 < done.resumed < done.rows == 3000


def test_a_job_that_did_nothing_leaves_nothing(artifact: Path, source: Path) -> None:
    with pytest.raises(M0kitError):
        score_file(artifact, source, source.parent / "out.jsonl", load={"device": "nonsense"})
    assert leftovers(source.parent) == []


# --- rows that end a process -------------------------------------------------------------------------

# A job whose engine ends its process when it comes to one of some rows, or after so many results.
DEADLY = """
import json, os, sys
from pathlib import Path
from m0kit.jobs import job as jobs
from m0kit.jobs import windows
from m0kit.jobs.job import score_file
from m0kit.jobs.rows import Scored

source, output, settings = Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3])
windows.WINDOW_ROWS, jobs.GRACE_S = settings["window"], 0.1
artifact, end, left = Path(sys.argv[4]), settings["end"], settings.get("left", 1e9)

def engine(artifact, load, work):
    global left
    parent = os.getpid() == job
    for window in work:
        if settings["at once"] and {row.number for row in window} & set(settings["rows"]):
            exec(end)
        for row in window:
            if row.number in settings["rows"]:
                exec(end)
            yield Scored(row.number, row.id, row.number / 1000, row.number / 8, None, None)
            left -= parent
            if left == 0:
                exec(end)
        yield None

job = os.getpid()
score_file(artifact, source, output, engine=engine)
"""


def deadly(source: Path, output: Path, artifact: Path, **settings_: Any) -> "subprocess.CompletedProcess[str]":
    told = {"window": 100, "rows": [], "at once": False, "end": "os.abort()", **settings_}
    words = [sys.executable, "-c", DEADLY, str(source), str(output), json.dumps(told), str(artifact)]
    return subprocess.run(words, capture_output=True, text=True, check=False)


ENDS = {"abort": "os.abort()", "kill": "os.kill(os.getpid(), 9)", "exit": "os._exit(3)"}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="rows are tried in forked processes")
@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize(
    ("rows", "window", "at_once"),
    [
        ([0], 100, False),
        ([49], 100, True),
        ([7], 1, False),
        ([20], 10, True),
        ([3, 30], 100, True),
        ([8, 9], 100, False),
    ],
)
def test_a_row_that_ends_its_process_is_told_the_second_time(
    artifact: Path, source: Path, rows: list[int], window: int, at_once: bool, end: str
) -> None:
    output = source.parent / "out.jsonl"
    options = {"rows": rows, "window": window, "at once": at_once, "end": ENDS[end]}
    assert deadly(source, output, artifact, **options).returncode != 0
    assert not output.exists()
    done = deadly(source, output, artifact, **options)
    assert (done.returncode, output.exists()) == (0, True), done.stderr
    for row in read(output):
        if row["row"] in rows:
            assert row["error"].startswith(
                f"line {row['row'] + 1}: the process was ended while this row was scored (tw"
            )
        else:
            assert (row["score"], row["error"]) == (pytest.approx(row["row"] / 1000), None)
    assert leftovers(source.parent) == []


@pytest.mark.skipif(not hasattr(os, "fork"), reason="rows are tried in forked processes")
def test_rows_in_different_windows_that_end_their_processes_are_found_one_run_after_another(
    artifact: Path, source: Path
) -> None:
    output = source.parent / "out.jsonl"
    options = {"rows": [5, 25, 45], "window": 10, "end": ENDS["kill"]}
    ended = [deadly(source, output, artifact, **options).returncode for _ in range(4)]
    assert ended == [-9, -9, -9, 0]
    assert [row["row"] for row in read(output) if row["error"]] == [5, 25, 45]


@pytest.mark.parametrize("end", ["kill", "abort"])
def test_no_row_is_blamed_for_a_job_that_is_killed_at_any_moment(artifact: Path, source: Path, end: str) -> None:
    """Whatever the rows in hand were, none ended a process of its own."""
    output = source.parent / "out.jsonl"
    for left in random.Random(3).choices(range(1, 12), k=8):
        deadly(source, output, artifact, window=13, end=ENDS[end], left=left)
        if output.exists():
            break
    done = deadly(source, output, artifact)
    assert done.returncode == 0 or output.exists(), done.stderr
    assert [row["error"] for row in read(output)] == [None] * 50


@pytest.mark.skipif(not hasattr(os, "fork"), reason="rows are tried in forked processes")
def test_an_error_of_the_engine_comes_out_of_the_process_in_which_rows_are_tried(artifact: Path, source: Path) -> None:
    output = source.parent / "out.jsonl"
    deadly(source, output, artifact, rows=[20], end=ENDS["kill"])
    with pytest.raises(StoppedError):
        score_file(artifact, source, output, engine=stopping(10))
    with pytest.raises(DependencyError, match="nothing"):
        score_file(artifact, source, output, engine=raising(DependencyError("nothing")))
    assert score_file(artifact, source, output, engine=pretended).rows == 50


def test_a_gpu_that_is_lost_leaves_what_is_done_and_the_job_goes_on(
    artifact: Path, source: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """No row is blamed for it, and none is scored twice."""
    output, lost = source.parent / "out.jsonl", DeviceLostError("the GPU cuda:0 was lost while it computed.")
    arguments = ["score", str(artifact), str(source), "-o", str(output)]
    command = functools.partial(cli.main, arguments, standalone_mode=False)
    with monkeypatch.context() as patch:
        patch.setattr("m0kit.jobs.engine.local_engine", stopping(20, error=lost))
        assert run(command) == 75
    assert capsys.readouterr().err.splitlines()[-2:] == [
        f"{output}: not finished; the same command goes on with it",
        f"error: {lost}",
    ]
    assert not output.exists()
    done = score_file(artifact, source, output, engine=pretended)
    assert (done.resumed, done.rows) == (20, 50)
    score_file(artifact, source, source.parent / "wanted.jsonl", engine=pretended)
    assert read(output) == read(source.parent / "wanted.jsonl")


def raising(error: Exception) -> Engine:
    def engine(artifact: Path, load: Mapping[str, Any], work: Work) -> Generator[Scored | None, None, None]:
        raise error
        yield

    return engine


def test_a_planted_score_is_scored_again_and_said(
    artifact: Path, source: Path, caplog: pytest.LogCaptureFixture
) -> None:
    output = source.parent / "out.jsonl"
    with pytest.raises(StoppedError):
        score_file(artifact, source, output, engine=stopping(20))
    with contextlib.closing(sqlite3.connect(source.parent / ".out.jsonl.partial")) as db, db:
        db.execute("UPDATE rows SET score = 0.99, error = NULL WHERE row IN (SELECT row FROM rows LIMIT 2)")
        there = {row for (row,) in db.execute("SELECT row FROM rows")}
        db.execute(f"INSERT INTO rows VALUES ({min(set(range(50)) - there)}, NULL, 0.99, 9, NULL, NULL, NULL, X'00')")
    assert score_file(artifact, source, output, engine=pretended).resumed == 18
    (said,) = caplog.messages
    assert said.startswith(f"{source.parent}/.out.jsonl.partial: 3 of its rows were written or changed by another hand")
    score_file(artifact, source, source.parent / "wanted.jsonl", engine=pretended)
    assert read(output) == read(source.parent / "wanted.jsonl")


def test_a_job_that_cannot_be_gone_on_with_says_so_at_once(
    artifact: Path, source: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("m0kit.jobs.journal.own_key", lambda: None)
    assert score_file(artifact, source, source.parent / "out.jsonl", engine=pretended).rows == 50
    (said,) = caplog.messages
    assert "no folder to keep the key in" in said


# --- the command -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["-o", "out.jsonl", "--raw"], "has the logits too"),
        (["-o", "out.jsonl", "--workers", "2"], "option of --engine ray"),
        (["--engine", "ray"], "need -o"),
        (["--overwrite"], "need -o"),
        (["-o", "out.jsonl", "--max-pixels", "1"], "--max-pixels:"),
    ],
)
def test_options_that_do_not_fit_are_wrong_usage(artifact: Path, source: Path, args: list[str], said: str) -> None:
    child = command(artifact, source, *args, cwd=source.parent)
    assert said in child.communicate()[1]
    assert child.returncode == 2
    assert leftovers(source.parent) == []


def test_a_job_from_stdin_is_wrong_usage(artifact: Path, tmp_path: Path) -> None:
    child = command(artifact, "-o", tmp_path / "out.jsonl", stdin=subprocess.DEVNULL)
    assert "-o needs a file of PAIRS" in child.communicate()[1]
    assert child.returncode == 2


def test_the_command_tells_what_it_did(artifact: Path, source: Path) -> None:
    with open(source, "a", encoding="utf-8") as file:
        file.write("torn\n")
    output = source.parent / "out.parquet"
    child = command(artifact, source, "-o", output)
    _, said = child.communicate()
    assert child.returncode == 3
    assert said == f"{output}: 51 rows, 1 could not be scored: see {output}.errors.jsonl\n"


def test_what_a_job_has_to_say_is_a_note(artifact: Path, source: Path) -> None:
    output = source.parent / "out.jsonl"
    child = command(artifact, source, "-o", output, env={**os.environ, "XDG_CACHE_HOME": "/dev/null"})
    note, done = child.communicate()[1].splitlines()
    assert note.startswith(f"note: {source.parent}/.out.jsonl.partial: there is no folder to keep the key in")
    assert done == f"{output}: 50 rows"


def test_progress_is_lines_where_there_is_no_terminal(
    artifact: Path, source: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(jobs, "PROGRESS_S", 0)
    output = source.parent / "out.jsonl"
    with pytest.raises(StoppedError):
        score_file(artifact, source, output, engine=stopping(20))
    assert capsys.readouterr().err == ""
    score_file(artifact, source, output, engine=pretended, progress=True)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 30
    assert lines[0].startswith("21 of 50 rows (20 from before), ")
    assert lines[-1].startswith("50 of 50 rows (20 from before), ")
    assert "rows/s, 0 min left" in lines[-1]


def test_progress_is_a_bar_on_a_terminal(
    artifact: Path, source: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    score_file(artifact, source, source.parent / "out.jsonl", engine=pretended, progress=True)
    assert "50/50" in capsys.readouterr().err
