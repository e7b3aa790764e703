"""An index gives the scores of the documents themselves, whatever happened to it on the way."""

import itertools
import json
import re
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from m0kit import Reranker
from m0kit.cli.commands import cli
from m0kit.cli.documents import Given
from m0kit.errors import InputError, StoreBusyError, StoreError
from m0kit.index import add, open_index
from m0kit.keeping.store import Store
from m0kit.scoring import sessions

QUERIES = ["what is it?", "\n\nwhat", {"image": Image.new("RGB", (70, 90), "blue")}]


def page(seed: int, size: tuple[int, int] = (150, 120)) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), np.uint8)
    return Image.fromarray(pixels)


@pytest.fixture
def documents(tmp_path: Path) -> list[Given]:
    file = tmp_path / "page.png"
    page(1).save(file)
    return [
        ("text", "some text about a small model", "a"),
        ("tail", "ends in a newline\n", "b"),
        ("page", file, "c"),
        ("big", page(2, (400, 300)), "d"),
        ("same", {"text": "some text about a small model"}, "e"),
    ]


@pytest.fixture(params=["fp32", "fp16", "int8"])
def kept(request: pytest.FixtureRequest, artifact: Path) -> Reranker:
    return Reranker.load(artifact, threads=1, kv=request.param)


@pytest.fixture
def library(tmp_path: Path, reranker_fp16: Reranker, documents: list[Given]) -> Path:
    folder = tmp_path / "library"
    with open_index(folder, reranker_fp16) as store:
        add(reranker_fp16, store, documents)
    return folder


@pytest.fixture(scope="module")
def reranker_fp16(artifact: Path) -> Reranker:
    return Reranker.load(artifact, threads=1, kv="fp16")


def run(*arguments: object) -> Any:
    return CliRunner().invoke(cli, [str(a) for a in arguments], catch_exceptions=True)


def pairs_of(documents: list[Given], *, by_id: bool) -> list[Any]:
    return [(query, {"id": name} if by_id else value) for query in QUERIES for name, value, _ in documents]


def test_a_document_of_an_index_scores_as_the_document_itself(
    kept: Reranker, artifact: Path, documents: list[Given], tmp_path: Path
) -> None:
    with open_index(tmp_path / "library", kept) as store:
        done = add(kept, store, documents)
    assert (done.read, done.known, done.failed) == (4, 1, [])
    opened = Reranker.load(artifact, threads=1, index=tmp_path / "library")
    assert opened.kv == kept.kv
    expected = kept.score(pairs_of(documents, by_id=False), raw=True)
    np.testing.assert_array_equal(opened.score(pairs_of(documents, by_id=True), raw=True), expected)
    # given themselves, they are found by what they are
    np.testing.assert_array_equal(opened.score(pairs_of(documents, by_id=False), raw=True), expected)


def test_nothing_of_a_kept_document_is_computed_again(
    library: Path, artifact: Path, documents: list[Given], monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = Reranker.load(artifact, threads=1, index=library)
    monkeypatch.setattr(opened.engine, "compute", lambda new: pytest.fail("computed") if new else [])
    monkeypatch.setattr(opened.engine.graphs.vision, "run", lambda *_: pytest.fail("the image encoder ran"))
    texts = [("what is it?", {"id": name}) for name, _, _ in documents]
    assert np.isfinite(opened.score(texts)).all()


def test_adding_again_computes_nothing(
    library: Path, reranker_fp16: Reranker, documents: list[Given], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reranker_fp16.engine, "compute", lambda new: pytest.fail("computed") if new else [])
    with open_index(library, reranker_fp16) as store:
        done = add(reranker_fp16, store, documents)
    assert (done.read, done.known) == (0, 5)


def test_a_bad_document_costs_the_others_nothing(tmp_path: Path, reranker_fp16: Reranker) -> None:
    given: list[Given] = [
        ("empty", "", ""), ("good", "text", ""), ("no image", b"nonsense", ""), ("id", {"id": "good"}, ""),
        ("said", InputError("said: what was wrong"), ""),
    ]  # fmt: skip
    with open_index(tmp_path / "library", reranker_fp16) as store:
        done = add(reranker_fp16, store, given)
        assert store.ids() == ["good"]
    assert [name for name, _ in done.failed] == ["empty", "no image", "id", "said"]
    assert all(name in message for name, message in done.failed)


def test_low_memory_keeps_the_same(artifact: Path, library: Path, documents: list[Given], tmp_path: Path) -> None:
    low = Reranker.load(artifact, threads=1, kv="fp16", memory="low")
    with open_index(tmp_path / "other", low) as store:
        assert add(low, store, documents).read == 4
        with Store.open(library) as expected:
            for name in expected.ids():
                one, other = store.document(name), expected.document(name)
                assert one is not None
                assert other is not None
                assert one.key == other.key
                np.testing.assert_array_equal(store.get(one.key), expected.get(other.key))
    by_id = pairs_of(documents, by_id=True)
    opened = Reranker.load(artifact, threads=1, index=library)
    lowly = Reranker.load(artifact, threads=1, index=tmp_path / "other", memory="low")
    np.testing.assert_array_equal(lowly.score(by_id), opened.score(by_id))


# --- an index that does not belong, or is damaged ---------------------------------------------------------


def test_an_index_of_something_else_is_refused(
    library: Path, artifact: Path, tmp_path: Path, in_precision: Callable[[str], Path]
) -> None:
    with pytest.raises(StoreError, match=r"the files of the artifact, precision \(fp32 there, int8 here\)"):
        Reranker.load(in_precision("int8"), threads=1, index=library)
    with pytest.raises(StoreError, match="kv \\(fp16 there, int8 here\\)"):
        Reranker.load(artifact, threads=1, index=library, kv="int8")
    with pytest.raises(StoreError, match="limits of pixels"):
        Reranker.load(artifact, threads=1, index=library, max_pixels=28 * 28 * 8)
    with pytest.raises(StoreError, match="limits of pixels"):
        Reranker.load(artifact, threads=1, index=library, max_length=2000)
    with pytest.raises(StoreError, match="no such folder"):
        Reranker.load(artifact, threads=1, index=tmp_path / "nothing")
    (tmp_path / "folder").mkdir()
    with pytest.raises(StoreError, match="not an index"):
        Reranker.load(artifact, threads=1, index=tmp_path / "folder")
    other = Reranker.load(artifact, threads=1, kv="int8")
    with pytest.raises(StoreError, match="kv"):
        open_index(library, other)


def test_unknown_ids_and_ids_without_an_index(library: Path, artifact: Path, reranker: Reranker) -> None:
    opened = Reranker.load(artifact, threads=1, index=library)
    results = opened.evaluate([("q", {"id": "nope"}), ("q", {"id": "text"}), ("q", {"id": 7})])
    assert "has no document 'nope'" in str(results[0].error)
    assert results[1].error is None
    assert '"id" must be a string' in str(results[2].error)
    assert "none is open" in str(reranker.evaluate([("q", {"id": "text"})])[0].error)


def damage(library: Path) -> None:
    """Change a byte of every piece's pages, and keep the size."""
    for segment in (library / "segments").iterdir():
        raw = bytearray(segment.read_bytes())
        for start in range(0, len(raw), 4096):
            raw[start] ^= 1
        segment.write_bytes(raw)


def damage_states(library: Path, names: list[str]) -> None:
    """Change the middle of these documents' records."""
    with Store.open(library) as store:
        keys = [document.key for name in names if (document := store.document(name))]
        places = [
            store.catalogue.rows("SELECT segment, start, size FROM pieces WHERE content = 0 AND key = ?", k)
            for k in keys
        ]
    for ((number, start, size),) in places:
        with open(library / "segments" / f"{number:06d}.kv", "r+b") as file:
            file.seek(start + size // 2)
            byte = file.read(1)
            file.seek(start + size // 2)
            file.write(bytes([byte[0] ^ 0x40]))


def test_a_document_whose_row_is_lost_is_missed_until_the_index_is_compacted(library: Path) -> None:
    with closing(sqlite3.connect(library / "index.sqlite")) as db, db:
        db.execute("DELETE FROM documents WHERE id = 'page'")
    result = run("index", "verify", library)
    assert result.exit_code == 1
    assert "lost: 1 documents, of which only contents are there; add those again" in result.output
    assert json.loads(run("index", "verify", library, "--json").output)["lost"] == 1
    assert run("index", "compact", library).exit_code == 0
    assert run("index", "verify", library).exit_code == 0


def test_a_damaged_state_is_found_computed_and_reported(
    library: Path,
    artifact: Path,
    reranker_fp16: Reranker,
    documents: list[Given],
    caplog: pytest.LogCaptureFixture,
) -> None:
    expected = reranker_fp16.score(pairs_of(documents, by_id=False))
    damage_states(library, ["page", "tail"])
    opened = Reranker.load(artifact, threads=1, index=library)
    scores = opened.score(pairs_of(documents, by_id=True))
    np.testing.assert_array_equal(scores, expected)
    for name in ("'page'", "'tail'"):
        assert any(name in said and "computed anew" in said for said in caplog.messages)

    result = run("index", "verify", library)
    assert result.exit_code == 1
    assert "damaged: the state of page" in result.output
    result = run("index", "add", artifact, library, "--threads", 1)  # without documents: what has no sound state
    assert (result.exit_code, "2 read" in result.output) == (0, True)
    assert run("index", "verify", library).exit_code == 0
    caplog.clear()
    np.testing.assert_array_equal(
        Reranker.load(artifact, threads=1, index=library).score(pairs_of(documents, by_id=True)), expected
    )
    assert caplog.messages == []


def test_a_document_that_is_itself_damaged_is_an_error_of_that_pair(library: Path, artifact: Path) -> None:
    damage(library)
    results = Reranker.load(artifact, threads=1, index=library).evaluate([("q", {"id": "page"}), ("q", "a text")])
    assert "'page'" in str(results[0].error)
    assert results[1].error is None


def test_what_cannot_be_read_again_is_said_and_costs_the_others_nothing(library: Path, artifact: Path) -> None:
    with Store.open(library) as store:
        ((number, start),) = store.catalogue.rows(
            "SELECT p.segment, p.start FROM pieces p JOIN documents d ON p.content = 1 AND p.key = d.content "
            "WHERE d.id = 'page'"
        )
    with open(library / "segments" / f"{number:06d}.kv", "r+b") as file:
        file.seek(start)
        file.write(b"\0")
    run("index", "prune", library, "--unused-days", 0)
    result = run("index", "add", artifact, library, "--threads", 1)
    assert result.exit_code == 3
    assert "error: page: " in result.stderr
    assert "3 read" in result.stdout
    assert "1 failed" in result.stdout


def test_a_second_writer_is_refused(library: Path, artifact: Path, reranker_fp16: Reranker) -> None:
    with open_index(library, reranker_fp16):
        with pytest.raises(StoreBusyError):
            open_index(library, reranker_fp16)
        result = run("index", "prune", library, "--unused-days", 1)
        assert (result.exit_code, type(result.exception)) == (1, StoreBusyError)
        assert Reranker.load(artifact, threads=1, index=library).score([("q", {"id": "text"})]).shape == (1,)


def test_within_a_limit_what_was_dropped_is_computed_when_asked_for(
    tmp_path: Path, artifact: Path, reranker_fp16: Reranker
) -> None:
    given: list[Given] = [(f"d{i}", f"document {i} " + "with many words " * 60, "") for i in range(12)]
    limit = 4 << 20
    with open_index(tmp_path / "library", reranker_fp16, limit) as store:
        big = reranker_fp16.config.decoder
        one = 2 * 2 * big.num_layers * big.kv_size * 190
        repeats = limit // (one * len(given)) + 2
        given = [(f"{name}-{r}", f"{r} {text}", "") for r in range(repeats) for name, text, _ in given]
        done = add(reranker_fp16, store, given)
        assert store.stats().disk_bytes <= limit
    assert done.dropped > 0
    opened = Reranker.load(artifact, threads=1, index=tmp_path / "library")
    some = [given[0], given[len(given) // 2], given[-1]]
    np.testing.assert_array_equal(
        opened.score([("what", {"id": name}) for name, _, _ in some]),
        reranker_fp16.score([("what", text) for _, text, _ in some]),
    )


# --- the commands ---------------------------------------------------------------------------------------


def test_the_way_from_files_to_a_ranking(tmp_path: Path, artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    page(1).save("page.png")
    Path("note.txt").write_text("a note about nothing", "utf-8")
    lines: list[Any] = [
        {"id": "c1", "text": "chunk"},
        {"id": "c2", "image": "page.png"},
        {"text": "no id"},
        {"id": "c4"},
    ]
    Path("chunks.jsonl").write_text("\n".join([*map(json.dumps, lines), "nonsense", "[]"]), "utf-8")
    result = run("index", "add", artifact, "library", "page.png", "note.txt", "chunks.jsonl", "missing.png", "--json")
    assert result.exit_code == 3
    done = json.loads(result.stdout)
    assert (done["read"], done["known"]) == (4, 1)  # c2 is page.png
    assert [name for name, _ in done["failed"]] == ["c4", "chunks.jsonl:5", "chunks.jsonl:6", "missing.png"]
    stats = json.loads(run("index", "stats", "library", "--json").stdout)
    assert (stats["documents"], stats["records"], stats["identity"]["kv"]) == ({"image": 2, "text": 3}, 4, "fp16")
    assert "documents" in run("index", "stats", "library").output

    everything = run("rerank", artifact, "--index", "library", "--query", "what", "--json", "--threads", 1)
    ranked = [json.loads(line) for line in everything.stdout.splitlines()]
    assert {line["document"] for line in ranked} == {"page.png", "note.txt", "c1", "c2", "chunks.jsonl:3"}
    scores = {line["document"]: line["score"] for line in ranked}
    assert scores["c2"] == scores["page.png"]
    Path("ids.txt").write_text("c1\n\nnope\npage.png\n", "utf-8")
    some = run(
        "rerank", artifact, "--index", "library", "--query", "what", "--candidates", "ids.txt", "--top-n", 2, "--json"
    )
    assert some.exit_code == 3
    assert "'nope'" in some.stderr
    best = [json.loads(line) for line in some.stdout.splitlines()]
    assert len(best) == 2
    assert all(line["score"] == scores[line["document"]] for line in best)

    Path("pairs.jsonl").write_text(json.dumps({"query": "what", "document": {"id": "c1"}}) + "\n", "utf-8")
    scored = run("score", artifact, "pairs.jsonl", "--index", "library")
    assert json.loads(scored.stdout)["score"] == scores["c1"]
    filed = run("score", artifact, "pairs.jsonl", "--index", "library", "-o", "out.jsonl", "--cache", "1M")
    assert filed.exit_code == 0
    assert json.loads(Path("out.jsonl").read_text("utf-8"))["score"] == pytest.approx(scores["c1"], abs=1e-7)

    Path("gone.txt").write_text("c1\nnope\n", "utf-8")
    pruned = run("index", "prune", "library", "--remove", "gone.txt")
    assert (pruned.exit_code, "'nope'" in pruned.stderr) == (3, True)
    assert run("index", "prune", "library", "--unused-days", 0).exit_code == 0
    assert json.loads(run("index", "stats", "library", "--json").stdout)["records"] == 0
    verified = run("index", "verify", "library")
    assert (verified.exit_code, "4 documents have no state" in verified.output) == (0, True)
    assert run("index", "compact", "library").exit_code == 0
    again = run("rerank", artifact, "--index", "library", "--query", "what", "--json", "--threads", 1)
    assert {(line := json.loads(raw))["document"]: line["score"] for raw in again.stdout.splitlines()} == {
        name: score for name, score in scores.items() if name != "c1"
    }


def test_what_is_removed_and_given_back_is_what_is_gone(library: Path, tmp_path: Path) -> None:
    def disk_bytes() -> int:
        return int(json.loads(run("index", "stats", library, "--json").stdout)["disk_bytes"])

    (tmp_path / "some.txt").write_text("big\ntail\n")
    before = disk_bytes()
    with Store.open(library) as store:
        live = store.stats().live_bytes
    removed = run("index", "prune", library, "--remove", tmp_path / "some.txt")
    assert removed.exit_code == 0
    assert (
        f"{library}: 2 documents removed, 2 states dropped, 0 bytes given back; `m0kit index compact" in removed.output
    )
    with Store.open(library) as store:
        assert store.ids() == ["text", "same", "page"]
        dead = store.stats().dead_bytes
        assert dead > (live - store.stats().live_bytes) > 0
    assert f"gives back {_told(dead)} more" in removed.output
    assert disk_bytes() == before
    compacted = run("index", "compact", library)
    assert f"{library}: {_told(before - disk_bytes())} given back" in compacted.output
    assert before - disk_bytes() >= dead

    (tmp_path / "all.txt").write_text("text\npage\nsame\n")
    before = disk_bytes()
    removed = run("index", "prune", library, "--remove", tmp_path / "all.txt")
    told = f"{library}: 3 documents removed, 2 states dropped, {_told(before - disk_bytes())} given back\n"
    assert removed.output == told
    assert disk_bytes() < before
    absent = run("index", "prune", library, "--remove", tmp_path / "all.txt")
    assert (absent.exit_code, "0 documents removed" in absent.stdout) == (1, True)
    assert absent.stderr.endswith("error: nothing could be removed\n")


def _told(num_bytes: int) -> str:
    return f"{num_bytes} bytes" if num_bytes < 2**20 else f"{num_bytes / 2**20:.1f} MiB"


def test_a_size_that_cannot_be_reached_is_said(library: Path) -> None:
    pruned = run("index", "prune", library, "--max-bytes", 10_000)
    assert pruned.exit_code == 0
    assert ": 4 states dropped, " in pruned.stdout
    found = re.fullmatch(r"note: (\d+) bytes are left, of documents themselves and the database\n", pruned.stderr)
    assert found is not None
    assert int(found[1]) > 10_000


def test_where_nothing_at_all_can_be_read_the_exit_code_is_that_of_an_error(tmp_path: Path, artifact: Path) -> None:
    (tmp_path / "docs.jsonl").write_text('{"id": "a"}\nnonsense\n')
    done = run("index", "add", artifact, tmp_path / "library", tmp_path / "docs.jsonl", tmp_path / "none.png")
    assert (done.exit_code, done.stderr.endswith("error: nothing could be read\n")) == (1, True)
    (tmp_path / "docs.jsonl").write_text("")
    assert run("index", "add", artifact, tmp_path / "library", tmp_path / "docs.jsonl").exit_code == 0


def test_no_document_is_lost_or_merged_without_a_word(
    tmp_path: Path, artifact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    lines: list[Any] = [
        {"id": None, "text": "one"},
        {"text": "two"},
        {"id": "a", "text": "three"},
        {"id": "a", "text": "four"},
        {"id": "a", "text": "three"},
        {"id": 1, "text": "five"},
        {"id": "1", "text": "six"},
        {"id": "1", "text": "five"},
        {"id": 1.0, "text": "seven"},
        {"id": True, "text": "eight"},
        {"id": "", "text": "nine"},
        {"id": "x\ny", "text": "ten"},
        {"id": ["a"], "text": "eleven"},
        {"id": "b", "text": "one"},
        {"id": "\ud800", "text": "twelve"},
    ]
    for name in ("all.ndjson", "all.JSONL"):
        Path(name).write_text("".join(json.dumps(line) + "\n" for line in lines), "utf-8")
        library = f"library-{name}"
        result = run("index", "add", artifact, library, name, "--json")
        assert result.exit_code == 3
        done = json.loads(result.stdout)
        with Store.open(Path(library)) as store:
            assert sorted(store.ids()) == ["1", "a", f"{name}:1", f"{name}:2", "b"]
            assert done["read"] + done["known"] == len(store.ids())
        assert (done["read"], done["known"], done["repeated"], done["replaced"]) == (4, 1, 2, 0)
        assert done["read"] + done["known"] + done["repeated"] + len(done["failed"]) == len(lines)
        said = dict.fromkeys(message.split(": ")[0] for _, message in done["failed"])
        assert list(said) == [f"{name}:{n}" for n in (4, 7, 9, 10, 11, 12, 13, 15)]
        assert f"its id stands for another document already ({name}:3)" in done["failed"][0][1]
    again = run("index", "add", artifact, library, name)
    assert "0 read (0 tokens), 5 known already, 2 given twice, 8 failed" in again.stdout
    Path(name).write_text('{"id": "a", "text": "changed"}\n{"id": "b", "text": "one"}\n', "utf-8")
    changed = run("index", "add", artifact, library, name)
    assert (changed.exit_code, "1 read" in changed.stdout) == (0, True)
    assert "1 known already, 1 of them in the place of another content" in changed.stdout


def test_files_of_one_name_in_two_folders_are_two_documents(
    tmp_path: Path, artifact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in ("a", "b/c"):
        Path(folder).mkdir(parents=True)
        Path(folder, "x.txt").write_text(f"of {folder}\n")
        Path(folder, "x.jsonl").write_text('{"text": "line of %s"}\n' % folder)  # noqa: UP031 - braces
    Path("b/paper.docx").write_bytes(b"PK\x03\x04\xff")
    page(1).save("b/page.png")
    done = run("index", "add", artifact, "library", "a", "b", "a/x.txt", "b/**/*.txt")
    assert done.exit_code == 0
    assert "5 read" in done.stdout
    assert "2 given twice" in done.stdout
    assert done.stderr.startswith("note: b/paper.docx: is a ZIP archive")
    with Store.open(Path("library")) as store:
        assert store.ids() == ["a/x.jsonl:1", "a/x.txt", "b/c/x.jsonl:1", "b/c/x.txt", "b/page.png"]
        kept = store.document("a/x.txt")
        assert kept is not None
        assert kept.data == b"of a"


def test_what_is_no_document_is_named_and_costs_the_others_nothing(
    tmp_path: Path, artifact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("pointer.png").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    Path("utf16.jsonl").write_text('{"text": "a"}\n', "utf-16")
    Path("latin.txt").write_text("größe", "latin-1")
    Path("chunks.jsonl").write_text('{"id": "c1", "image": "pointer.png"}\n{"id": "c2", "image": "gone.png"}\n')
    Path("good.txt").write_text("good")
    result = run("index", "add", artifact, "library", *sorted(map(str, Path().iterdir())), "*.tiff", "--json")
    assert result.exit_code == 3
    done = json.loads(result.stdout)
    assert (done["read"], len(done["failed"])) == (1, 6)
    assert [message.split(": ")[0] for _, message in done["failed"]] == [
        "chunks.jsonl:1", "chunks.jsonl:2", "latin.txt", "pointer.png", "utf16.jsonl", "*.tiff",
    ]  # fmt: skip
    told = result.stderr
    for words in ("c1: pointer.png: not an image that can be read", "run `git lfs pull`", "c2: gone.png: No such file",
                  "latin.txt: is not UTF-8", "utf16.jsonl: is UTF-16", "*.tiff: no file matches"):  # fmt: skip
        assert words in told


def test_files_of_ids_are_read_like_all_others(
    library: Path, artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with open_index(library, Reranker.load(artifact, threads=1, kv="fp16")) as store:
        add(Reranker.load(artifact, threads=1, kv="fp16"), store, [("a\u2028b", "odd id", "")])
    Path("ids.txt").write_bytes("\ufefftext\r\n\r\na\u2028b\r\n".encode() + b"caf\xe9\r\ntail")
    args = ("rerank", artifact, "--index", library, "--query", "what", "--candidates", "ids.txt", "--json")
    result = run(*args)
    assert result.exit_code == 3
    ranked = [json.loads(line) for line in result.stdout.splitlines()]
    assert {line["document"] for line in ranked[:3]} == {"text", "a\u2028b", "tail"}
    assert ranked[3]["error"].startswith("ids.txt:4: the line is not UTF-8 text")
    Path("ids.txt").write_text("text\n", "utf-16")
    result = run(*args)
    assert (result.exit_code, str(result.exception)) == (1, "ids.txt: is UTF-16. Save it as UTF-8.")
    Path("gone.txt").write_bytes(b"\xef\xbb\xbftext\r\ncaf\xe9\r\n")
    pruned = run("index", "prune", library, "--remove", "gone.txt")
    assert (pruned.exit_code, pruned.stderr.startswith("error: gone.txt:2: the line is not UTF-8")) == (3, True)
    with Store.open(library) as store:
        assert "text" not in store.ids()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["index", "add", "ARTIFACT", "nothing"], "does not exist yet"),
        (["index", "add", "ARTIFACT", "LIBRARY", "x.txt", "--kv", "int8"], "keeps fp16"),
        (["index", "add", "ARTIFACT", "LIBRARY", "x.txt", "--max-bytes", "lots"], "is not a size"),
        (["index", "add", "ARTIFACT", "LIBRARY", "x.txt", "--max-bytes", "1G"], "Leave the limit out"),
        (["index", "prune", "LIBRARY"], "Say what to drop"),
        (["rerank", "ARTIFACT", "--query", "x"], "Give documents, or --index"),
        (["rerank", "ARTIFACT", "x.txt", "--query", "x", "--candidates", "x.txt"], "give --index too"),
        (["index", "stats", "nothing"], "no such folder"),
    ],
)
def test_wrong_usage_is_said(
    arguments: list[str], message: str, artifact: Path, library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("x.txt").write_text("some text", "utf-8")
    result = run(*({"ARTIFACT": artifact, "LIBRARY": library}.get(a, a) for a in arguments))
    assert result.exit_code in (1, 2)
    assert message in f"{result.output}{result.exception}"
    assert not Path("nothing").exists()


# Runs the command with small batches; says how many documents there are after each that is kept.
KEEPING = """
import os, sys
from m0kit.cli.commands import main
from m0kit.keeping.store import Store
from m0kit.scoring.engine import GraphEngine

GraphEngine.rows, add = 150, Store.add

def acknowledging(store, documents, records):
    dropped = add(store, documents, records)
    os.write(1, b"%d documents\\n" % len(store))
    return dropped

Store.add = acknowledging
sys.argv[0] = "m0kit"
main()
"""


@pytest.mark.skipif(sys.platform == "win32", reason="kills by signal")
def test_a_killed_add_goes_on_where_it_stopped(tmp_path: Path, artifact: Path, reranker_fp16: Reranker) -> None:
    """The store has its own, harder test; here the whole command is killed after the n-th batch that is kept."""
    lines = [json.dumps({"id": f"d{i}", "text": f"document {i} " + "word " * (i * 7 % 200)}) for i in range(60)]
    source, library = tmp_path / "all.jsonl", tmp_path / "library"
    source.write_text("\n".join(lines), "utf-8")
    command = [
        sys.executable,
        "-m",
        "m0kit",
        "index",
        "add",
        str(artifact),
        str(library),
        str(source),
        "--threads",
        "1",
    ]
    whole = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "60 read" in whole.stdout
    expected = Reranker.load(artifact, threads=1, index=library).score([("what", {"id": f"d{i}"}) for i in range(60)])
    broken = tmp_path / "broken"
    command[6] = str(broken)
    killed = [sys.executable, "-c", KEEPING, *command[3:]]
    kept = 0
    for attempt in range(8):
        child = subprocess.Popen(killed, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        assert child.stdout is not None
        said = list(itertools.islice(child.stdout, 1 + 2 * attempt))
        child.kill()
        child.communicate()
        rollback = run("index", "prune", broken, "--unused-days", 9999)  # a reader would say to
        assert (rollback.exit_code, ": 0 states dropped, 0 bytes given back" in rollback.output) == (0, True)
        assert run("index", "verify", broken).exit_code == 0
        with Store.open(broken) as store:
            kept = max(kept, int(said[-1].split()[0]))
            assert len(store) >= kept
    assert kept > 8
    subprocess.run(command, capture_output=True, check=True)
    scores = Reranker.load(artifact, threads=1, index=broken).score([("what", {"id": f"d{i}"}) for i in range(60)])
    np.testing.assert_array_equal(scores, expected)


@pytest.mark.skipif(sys.platform == "win32", reason="kills by signal")
def test_what_a_killed_writer_left_is_rolled_back_by_what_the_error_says(
    library: Path, artifact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(library.parent)
    dying = """
import os, signal, sqlite3, sys
db = sqlite3.connect(sys.argv[1], isolation_level=None)
db.execute("PRAGMA cache_size = 1")
db.execute("BEGIN IMMEDIATE")
db.execute("DELETE FROM documents")
db.executemany("INSERT INTO meta VALUES (?, ?, 0)", ((str(n), "x" * 500) for n in range(2000)))
os.kill(os.getpid(), signal.SIGKILL)
"""
    before = run("index", "stats", "library").output
    commands = [["index", "prune", "library", "--unused-days", "9999"], ["index", "add", artifact, "library", "a.txt"]]
    Path("a.txt").write_text("some text about a small model", "utf-8")
    for command in commands:
        subprocess.run([sys.executable, "-c", dying, "library/index.sqlite"], check=False)
        for reading in (["index", "stats", "library"], ["index", "verify", "library"],
                        ["rerank", artifact, "--index", "library", "--query", "what"]):  # fmt: skip
            result = run(*reading)
            assert (result.exit_code, type(result.exception)) == (1, StoreError)
            assert f"`m0kit {' '.join(map(str, commands[0]))}`" in str(result.exception).replace(f"{Path.cwd()}/", "")
        assert run(*command).exit_code == 0
        assert run("index", "verify", "library").exit_code == 0
        assert command is not commands[0] or run("index", "stats", "library").output == before


def endless(folder: Path) -> None:
    """45 KB that say they are an index, of views that never end."""
    again = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n)"
    with closing(sqlite3.connect(folder / "index.sqlite", isolation_level=None)) as db:
        version = db.execute("PRAGMA user_version").fetchone()[0]
        application = db.execute("PRAGMA application_id").fetchone()[0]
        for kind, name in db.execute(
            "SELECT type, name FROM sqlite_schema WHERE type IN ('trigger', 'table') ORDER BY type DESC"
        ).fetchall():
            db.execute(f"DROP {kind} {name}")
        db.execute(f"CREATE VIEW meta AS {again} SELECT 'id' AS name, i AS value, 0 AS sum FROM n")
        db.execute(f"CREATE VIEW segments AS {again} SELECT i AS number, 0 AS size FROM n")
        db.execute(f"CREATE VIEW documents AS {again} SELECT i AS place, 'a' AS id FROM n WHERE i < 0")
        for n in range(300):
            db.execute(f"CREATE VIEW x{n} AS SELECT * FROM x{n + 1}, x{n + 1}")
        db.execute(f"PRAGMA user_version = {version}")
        db.execute(f"PRAGMA application_id = {application}")


def test_an_endless_index_is_refused_by_every_command(
    library: Path, artifact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(library.parent)
    endless(library)
    for command in (
        ["index", "stats", "library"], ["index", "verify", "library"], ["index", "compact", "library"],
        ["index", "prune", "library", "--max-bytes", "1"], ["index", "add", artifact, "library"],
        ["rerank", artifact, "--index", "library", "--query", "what"],
    ):  # fmt: skip
        result = run(*command)
        assert (result.exit_code, type(result.exception)) == (1, StoreError)
        assert "its tables are not those that m0kit makes" in str(result.exception)


def test_a_state_that_no_m0kit_wrote_is_computed_anew(
    library: Path, artifact: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Whole by its checksum: somebody meant it so."""
    with Store.open(library, writable=True) as store:
        page = store.document("page")
        assert page is not None
        size = state_bytes(store, page.key)
        for n, state in enumerate([b"", b"x", bytes(size + 1), bytes(size * 2)]):
            key = bytes([n]) * 32
            store.add([replace(page, id=f"odd {n}", key=key)], {key: [state]})
    opened = Reranker.load(artifact, threads=1, index=library)
    scores = opened.score([("what", {"id": name}) for name in ("odd 0", "odd 1", "odd 2", "odd 3", "page")])
    assert scores.tolist() == [scores[-1]] * 5
    assert len([said for said in caplog.messages if "a document's state cannot be its own" in said]) == 4


def state_bytes(store: Store, key: bytes) -> int:
    state = store.get(key)
    assert state is not None
    return state.size


def test_a_text_that_is_none_costs_only_itself(library: Path, artifact: Path) -> None:
    with Store.open(library, writable=True) as store:
        text = store.document("text")
        assert text is not None
        # As `add` does, but for the look at the text that Document takes.
        odd = replace(text, id="odd", kind="image", data=b"\xff\xfe")
        object.__setattr__(odd, "kind", "text")
        store.add([odd], {})
    opened = Reranker.load(artifact, threads=1, index=library)
    odd_result, result = opened.evaluate([("what", {"id": "odd"}), ("what", {"id": "text"})])
    assert "the content of document 'odd' is not what was written" in str(odd_result.error)
    assert result.error is None


def test_a_document_whose_state_is_not_finite_is_an_error_and_not_kept(unasked: Path, tmp_path: Path) -> None:
    def opener(folder: Path, name: str, /, *, also: Sequence[str] = ()) -> sessions.Graph:
        inner = sessions.open_graph(folder, name, threads=1, also=also)

        class Graph:
            def run(self, feeds: Mapping[str, Any], outputs: Sequence[str]) -> dict[str, Any]:
                out = inner.run(feeds, outputs)
                if "present.1.value" in out:
                    out["present.1.value"] = np.array(out["present.1.value"])
                    out["present.1.value"][0, 2, 0] = np.inf  # of the first document of the run
                return out

        return Graph()

    overflowing = Reranker.load(unasked, kv="fp16", open_graph=opener)
    with open_index(tmp_path / "library", overflowing) as store:
        done = add(overflowing, store, [("bad", "one", ""), ("bad too", "one", ""), ("good", "two", "")])
        assert store.ids() == ["good"]
    assert (done.read, done.known) == (1, 0)
    assert [name for name, _ in done.failed] == ["bad", "bad too"]
    assert "bad: what is kept of the document (keys and values in fp16) is not a finite number" in done.failed[0][1]


def test_one_thing_is_no_list_of_documents(reranker_fp16: Reranker, library: Path) -> None:
    with Store.open(library, writable=True) as store:
        for one in ("text", b"bytes", {"id": "a", "text": "t"}):
            with pytest.raises(InputError, match=r"^documents: expected a list of \(id, content, source\), got"):
                add(reranker_fp16, store, one)  # type: ignore[arg-type]
            with pytest.raises(InputError, match=r"^ids: expected a list of ids, got"):
                store.remove(one)  # type: ignore[arg-type]
        assert len(store) == 5
