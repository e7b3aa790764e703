"""The command's results, messages and exit codes, as a shell sees them."""

import base64
import gc
import io
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tests import pdfs

from m0kit import Reranker, __version__
from m0kit.artifact.manifest import read_manifest, write_manifest
from m0kit.cli.commands import main
from m0kit.reading.pdf import PdfPage, pdf_pages
from m0kit.scoring import sessions

Make = Callable[..., Image.Image]
TEXTS = {"notes.txt": "small language models write markdown", "größe.txt": "das Wetter in Oslo\n", "c.py": "x = 1"}


@dataclass
class Done:
    code: int
    out: str
    err: str

    @property
    def lines(self) -> list[str]:
        return self.out.splitlines()

    @property
    def rows(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.lines]


@pytest.fixture
def m0kit(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Done]:
    """Run the command in this process: m0kit("rerank", …, stdin="…")."""

    def run(*args: object, stdin: str | bytes = "") -> Done:
        raw = stdin if isinstance(stdin, bytes) else stdin.encode()
        monkeypatch.setattr(sys, "argv", ["m0kit", *map(str, args)])
        buffer = io.BytesIO(raw)
        buffer.name = "<stdin>"  # type: ignore[attr-defined]
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(buffer))
        capsys.readouterr()
        with pytest.raises(SystemExit) as done:
            main()
        out, err = capsys.readouterr()
        assert "Traceback" not in err
        return Done(int(done.value.code or 0), out, err)

    return run


@pytest.fixture
def documents(tmp_path: Path, picture: Make) -> list[Path]:
    """Three texts and two page images."""
    for name, text in TEXTS.items():
        (tmp_path / name).write_text(text, "utf-8")
    picture(90, 60, 1).save(tmp_path / "page.png")
    picture(60, 90, 2).save(tmp_path / "scan.jpg")
    return [tmp_path / name for name in (*TEXTS, "page.png", "scan.jpg")]


@pytest.fixture
def expected(reranker: Reranker, documents: list[Path]) -> list[float]:
    contents = [*(text.removesuffix("\n") for text in TEXTS.values()), *documents[3:]]
    return [float(s) for s in reranker.score([("slm markdown", content) for content in contents])]


# --- rerank ------------------------------------------------------------------------------------------


def test_rerank_prints_the_best_first(
    m0kit: Callable[..., Done], artifact: Path, documents: list[Path], expected: list[float]
) -> None:
    done = m0kit("rerank", artifact, "--query", "slm markdown", *documents)
    order = sorted(range(5), key=lambda i: -expected[i])
    assert order != list(range(5))
    assert (done.code, done.err) == (0, "")
    assert done.lines == [f"{expected[i]:7.4f}  {documents[i]}" for i in order]


def test_rerank_prints_json(
    m0kit: Callable[..., Done], artifact: Path, documents: list[Path], expected: list[float]
) -> None:
    done = m0kit("rerank", artifact, *documents, "--query", "slm markdown", "--json", "--top-n", "3")
    assert [row["rank"] for row in done.rows] == [1, 2, 3]
    assert [row["index"] for row in done.rows] == sorted(range(5), key=lambda i: -expected[i])[:3]
    for row in done.rows:
        assert set(row) == {"rank", "index", "document", "score"}
        assert row["document"] == str(documents[row["index"]])
        assert row["score"] == pytest.approx(expected[row["index"]], abs=1e-5)


def test_rerank_prints_logits(
    m0kit: Callable[..., Done], artifact: Path, documents: list[Path], reranker: Reranker
) -> None:
    done = m0kit("rerank", artifact, "--query", "q", documents[0], "--raw", "--json", "--threads", "1")
    (logit,) = reranker.score([("q", TEXTS["notes.txt"])], raw=True)
    assert done.rows[0]["score"] == pytest.approx(logit, abs=1e-4)


def test_rerank_takes_an_image_as_query_and_other_limits(
    m0kit: Callable[..., Done], artifact: Path, documents: list[Path], reranker: Reranker
) -> None:
    args = ("rerank", artifact, "--query-image", documents[3], documents[4], "--json")
    (whole,) = reranker.score([(documents[3], documents[4])])
    assert m0kit(*args).rows[0]["score"] == pytest.approx(whole, abs=1e-5)
    small = Reranker.load(artifact, max_pixels=4 * 784).score([(documents[3], documents[4])])[0]
    assert abs(small - whole) > 1e-3
    assert m0kit(*args, "--max-pixels", 4 * 784).rows[0]["score"] == pytest.approx(small, abs=1e-5)


def test_rerank_writes_a_page_beside_its_results(
    m0kit: Callable[..., Done], artifact: Path, documents: list[Path], expected: list[float], tmp_path: Path
) -> None:
    place = tmp_path / "ranking.html"
    plain = m0kit("rerank", artifact, "--query", "slm markdown", *documents, "gone.txt")
    done = m0kit("rerank", artifact, "--query", "slm markdown", *documents, "gone.txt", "--html", place)
    assert done == plain, "the page changes nothing else"
    page = place.read_text("utf-8")
    order = sorted(range(5), key=lambda i: -expected[i])
    places = [page.index(f'<div class="name">{documents[i]}</div>') for i in order]
    assert places == sorted(places)
    assert page.count("<img ") == 2
    assert "<li>gone.txt: No such file or directory.</li>" in page
    assert f"<code>{artifact}</code>" in page
    two = m0kit("rerank", artifact, "--query-image", documents[3], *documents, "--top-n", 1, "--html", place)
    assert len(two.lines) == 1
    assert place.read_text("utf-8").count('<span class="rank">') == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([*(d.name for d in documents), "ranking.html"])


def test_a_page_that_cannot_be_written_is_said_before_anything_is_read(
    m0kit: Callable[..., Done], tmp_path: Path
) -> None:
    done = m0kit("rerank", tmp_path, "--query", "q", "gone.txt", "--html", tmp_path / "gone" / "r.html")
    assert done.code == 1
    assert done.err == f"error: {tmp_path}/gone/r.html: there is no folder {tmp_path}/gone. Choose another file.\n"


def test_the_page_of_an_index_names_its_documents(
    m0kit: Callable[..., Done], artifact: Path, documents: list[Path], tmp_path: Path
) -> None:
    assert m0kit("index", "add", artifact, tmp_path / "library", *documents).code == 0
    done = m0kit("rerank", artifact, "--index", tmp_path / "library", "--query", "q", "--html", tmp_path / "r.html")
    page = (tmp_path / "r.html").read_text("utf-8")
    assert done.code == 0
    assert page.count("in the index") == page.count('<span class="rank">') == 5


def test_a_document_that_cannot_be_scored_comes_last_and_the_others_are_there(
    m0kit: Callable[..., Done], artifact: Path, documents: list[Path], tmp_path: Path
) -> None:
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "broken.png").write_bytes(documents[3].read_bytes()[:200])
    (tmp_path / "empty").mkdir()
    bad = [tmp_path / "missing.png", tmp_path / "empty.txt", tmp_path / "broken.png", tmp_path / "empty"]
    done = m0kit("rerank", artifact, "--query", "q", bad[0], documents[0], *bad[1:], documents[3])
    assert done.code == 3
    assert [line.split()[0] for line in done.lines[2:]] == ["error"] * 4
    assert [line.split()[1] for line in done.lines[2:]] == [str(path) for path in bad]
    assert {line.split()[1] for line in done.lines[:2]} == {str(documents[0]), str(documents[3])}
    said = done.err.splitlines()
    assert [line.split(": ")[:2] for line in said] == [["error", str(path)] for path in bad]
    assert all(line.count(str(path)) == 1 for line, path in zip(said, bad, strict=True))
    for line, words in zip(
        said, ("No such file", "document: is empty", "damaged or cut off", "the folder holds no file"), strict=True
    ):
        assert words in line
    rows = m0kit("rerank", artifact, "--query", "q", bad[0], documents[0], "--json").rows
    assert set(rows[1]) == {"rank", "index", "document", "error"}
    assert "score" in rows[0]


def test_strict_stops_at_the_first(m0kit: Callable[..., Done], artifact: Path, documents: list[Path]) -> None:
    done = m0kit("rerank", artifact, "--query", "q", documents[0], "missing.png", "--strict")
    assert (done.code, done.out) == (1, "")
    assert done.err == "error: missing.png: No such file or directory.\n"
    (documents[0].parent / "broken.png").write_bytes(documents[3].read_bytes()[:200])
    done = m0kit("rerank", artifact, "--query", "q", documents[0], documents[0].parent / "broken.png", "--strict")
    assert (done.code, done.out) == (1, "")
    assert done.err.startswith(f"error: {documents[0].parent / 'broken.png'}: the PNG file")


def test_what_is_cut_is_noted_on_stderr(m0kit: Callable[..., Done], artifact: Path, tmp_path: Path) -> None:
    path = tmp_path / "long.txt"
    path.write_text("z" * 9800)
    done = m0kit("rerank", artifact, "--query", "q", path)
    assert (done.code, len(done.lines)) == (0, 1)
    assert done.err == f"note: {path}: the document was too long and was cut\n"


def test_a_name_that_is_not_utf8_is_printed_all_the_same(artifact: Path, tmp_path: Path) -> None:
    path = os.fsencode(tmp_path) + b"/caf\xe9.txt"
    with open(path, "wb") as file:
        file.write(b"text")
    args = [sys.executable, "-m", "m0kit", "rerank", str(artifact), "--query", "q", path]
    environment = {**os.environ, "PYTHONIOENCODING": "utf-8:strict"}
    plain = subprocess.run([*args], capture_output=True, text=True, check=True, env=environment)
    assert plain.stdout.endswith("caf\ufffd.txt\n")
    as_json = subprocess.run(
        [*args, path + b".no", "--json"], capture_output=True, text=True, check=False, env=environment
    )
    assert as_json.returncode == 3
    rows = [json.loads(line) for line in as_json.stdout.splitlines()]
    assert os.fsencode(rows[0]["document"]) == path


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ([], "Missing argument 'ARTIFACT'"),
        (["ARTIFACT", "--query", "q"], "Give documents, or --index"),
        (["ARTIFACT", "doc"], "Give either --query or --query-image"),
        (["ARTIFACT", "-", "--query", "q", "--index", "i", "--candidates", "-"], "Stdin can be a document, or --cand"),
        (["ARTIFACT", "doc", "--query", "q", "--query-image", "i.png"], "Give either --query or --query-image"),
        (["ARTIFACT", "doc", "--query", "q", "--top-n", "0"], "--top-n"),
        (["ARTIFACT", "doc", "--query", "q", "--threads", "0"], "--threads"),
        (["ARTIFACT", "doc", "--query", "q", "--max-pixels", "many"], "--max-pixels"),
        (["ARTIFACT", "doc", "--query", "q", "--max-pixels", "100"], "--max-pixels: min_pixels (3136) must not exceed"),
        (["ARTIFACT", "doc", "--query", "q", "--trust-remote-code"], "No such option"),
    ],
)
def test_wrong_usage_is_said_with_code_2(
    m0kit: Callable[..., Done], artifact: Path, args: list[str], said: str
) -> None:
    done = m0kit("rerank", *(artifact if arg == "ARTIFACT" else arg for arg in args))
    assert (done.code, done.out) == (2, "")
    assert said in done.err


def test_an_empty_query_is_empty_and_not_missing(
    m0kit: Callable[..., Done], artifact: Path, documents: list[Path]
) -> None:
    done = m0kit("rerank", artifact, "--query", "", documents[0])
    assert (done.code, done.err.count("\n")) == (1, 1)
    assert "--query: is empty" in done.err


# --- documents -----------------------------------------------------------------------------------------


class TestPdfs:
    """Each page is a document, drawn when its turn comes."""

    @pytest.fixture
    def paper(self, tmp_path: Path) -> Path:
        pytest.importorskip("pypdfium2", reason="needs m0kit[pdf]")
        (path := tmp_path / "paper.pdf").write_bytes(pdfs.pdf([pdfs.text(f"page {i}\nslm markdown") for i in range(3)]))
        return path

    def test_pages_are_ranked_as_their_images_are(
        self, m0kit: Callable[..., Done], artifact: Path, reranker: Reranker, documents: list[Path], paper: Path
    ) -> None:
        done = m0kit("rerank", artifact, "--query", "q", documents[0], paper, documents[3], "--json")
        pages = list(pdf_pages(paper))
        contents = [next(iter(TEXTS.values())).removesuffix("\n"), *pages, documents[3]]
        scores = {row["document"]: row["score"] for row in done.rows}
        names = [str(documents[0]), *(f"{paper}#page={page.number}" for page in pages), str(documents[3])]
        expected = reranker.score([("q", content) for content in contents]).tolist()
        assert [scores[name] for name in names] == pytest.approx(expected, abs=1e-5)
        assert [row["score"] for row in done.rows] == sorted(scores.values(), reverse=True)
        assert sorted(row["index"] for row in done.rows) == [0, 1, 2, 3, 4]

        second = m0kit("rerank", artifact, "--query", "q", f"{paper}#page=2", "--json")
        assert [row["document"] for row in second.rows] == [names[2]]
        assert second.rows[0]["score"] == pytest.approx(scores[names[2]], abs=1e-5)
        piped = m0kit("rerank", artifact, "--query", "q", "-", "--json", stdin=paper.read_bytes())
        assert {row["document"] for row in piped.rows} == {f"-#page={number}" for number in (1, 2, 3)}

    def test_a_pdf_that_cannot_be_read_costs_itself_alone(
        self, m0kit: Callable[..., Done], artifact: Path, paper: Path, tmp_path: Path
    ) -> None:
        (shut := tmp_path / "shut.pdf").write_bytes(pdfs.locked([pdfs.text("a")]))
        (part := tmp_path / "part.pdf").write_bytes(paper.read_bytes().replace(b"12 0 obj", b"99 0 obj"))
        done = m0kit("rerank", artifact, "--query", "q", shut, part, paper)
        assert done.code == 3
        assert len(done.lines) == 1 + 3 + 3
        assert done.err.splitlines() == [
            f"error: {shut}: needs a password. Save it without one.",
            f"error: {part}#page=2: is damaged and cannot be drawn. Save it again, or give it as PNG.",
        ]
        strict = m0kit("rerank", artifact, "--query", "q", paper, part, "--strict")
        assert (strict.code, strict.lines) == (1, [])
        assert (
            strict.err == f"error: {part}#page=2: is damaged and cannot be drawn. Save it again, or give it as PNG.\n"
        )

    def test_a_page_of_the_ranking_shows_them(
        self, m0kit: Callable[..., Done], artifact: Path, paper: Path, tmp_path: Path
    ) -> None:
        place = tmp_path / "ranking.html"
        assert m0kit("rerank", artifact, "--query", "q", paper, "--html", place).code == 0
        assert place.read_text("utf-8").count('<img class="thumbnail"') == 3

    def test_pages_that_were_ranked_are_not_held(
        self, m0kit: Callable[..., Done], artifact: Path, monkeypatch: pytest.MonkeyPatch, paper: Path
    ) -> None:
        """One page is there at a time, in a few hands; what waits to be run is bounded by bytes."""
        paper.write_bytes(pdfs.pdf([pdfs.text(f"page {i}") for i in range(30)], size=(60, 60)))
        held: list[int] = []

        def there() -> int:
            return sum(type(one) is PdfPage for one in gc.get_objects())

        before = there()  # what other tests left

        def counted(*args: Any, **options: Any) -> Any:
            for page in pdf_pages(*args, **options):
                yield page
                del page
                held.append(there() - before)

        monkeypatch.setattr("m0kit.cli.documents.pdf_pages", counted)
        assert len(m0kit("rerank", artifact, "--query", "q", paper).lines) == 30
        assert len(held) == 30
        assert max(held) <= 4

    def test_an_index_knows_pages_by_their_names(
        self, m0kit: Callable[..., Done], artifact: Path, paper: Path, tmp_path: Path
    ) -> None:
        library = tmp_path / "library"
        added = m0kit("index", "add", artifact, library, paper, "--kv", "fp32", "--json")
        assert json.loads(added.out)["read"] == 3
        asked = m0kit("rerank", artifact, "--index", library, "--query", "q", "--json")
        direct = m0kit("rerank", artifact, "--query", "q", paper, "--json")
        assert {row["document"]: row["score"] for row in asked.rows} == {
            row["document"]: pytest.approx(row["score"], abs=1e-5) for row in direct.rows
        }


@pytest.mark.parametrize(
    "raw", [b"\xef\xbb\xbfone\ntwo", b"one\ntwo\n", b"one\r\ntwo\r\n", b"\xef\xbb\xbfone\r\ntwo\r\n"]
)
def test_an_editor_changes_no_score(
    m0kit: Callable[..., Done], artifact: Path, reranker: Reranker, tmp_path: Path, raw: bytes
) -> None:
    (tmp_path / "x.txt").write_bytes(raw)
    done = m0kit("rerank", artifact, "--query", "q", tmp_path / "x.txt", "--json")
    assert done.rows[0]["score"] == pytest.approx(reranker.score([("q", "one\ntwo")])[0], abs=1e-5)


@pytest.mark.parametrize("name", ["page.png", "scan.JPG", "paper.pdf", "a.docx"])
def test_what_a_name_promises_and_the_content_denies_is_an_error(
    m0kit: Callable[..., Done], artifact: Path, documents: list[Path], name: str
) -> None:
    path = documents[0].with_name(name)
    for text, words in (
        ("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "Git LFS pointer"),
        ("<html>404</html>", "web page"),
        ("slm markdown", "holds text"),
    ):
        path.write_text(text)
        done = m0kit("rerank", artifact, "--query", "slm markdown", documents[0], path)
        assert done.code == 3
        assert [line.split()[1] for line in done.lines] == [str(documents[0]), str(path)]
        assert done.err.startswith(f"error: {path}: ")
        assert words in done.err


def test_a_folder_stands_for_its_files_and_says_which_it_passes_over(
    m0kit: Callable[..., Done], artifact: Path, documents: list[Path], expected: list[float]
) -> None:
    folder = documents[0].parent
    below = folder / "below"
    below.mkdir()
    for name in ("paper.docx", "other.docx"):
        (below / name).write_bytes(b"PK\x03\x04\xff")
    (below / ".hidden.txt").write_text("hidden")
    (below / "broken.png").write_text("no image")
    (below / "again").symlink_to(folder)  # a circle
    done = m0kit("rerank", artifact, "--query", "slm markdown", folder, "--json")
    assert done.code == 3
    scores = {row["document"]: row["score"] for row in done.rows if "score" in row}
    assert scores == {str(path): pytest.approx(s, abs=1e-5) for path, s in zip(documents, expected, strict=True)}
    note, error = done.err.splitlines()
    assert note.startswith(f"note: {below / 'other.docx'}, {below / 'paper.docx'}: is a ZIP archive")
    assert error.startswith(f"error: {below / 'broken.png'}: ")
    (below / "broken.png").unlink()
    assert m0kit("rerank", artifact, "--query", "slm markdown", folder).code == 0
    assert m0kit("rerank", artifact, "--query", "q", below / "paper.docx").code == 1


def test_a_pattern_that_the_shell_left_is_matched(
    m0kit: Callable[..., Done], artifact: Path, documents: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(documents[0].parent)
    Path("[1].txt").write_text("a name that looks like a pattern")
    Path("deep/er").mkdir(parents=True)
    Path("deep/er/page.png").write_bytes(documents[3].read_bytes())
    args = ("rerank", artifact, "--query", "q", "--json")
    assert {row["document"] for row in m0kit(*args, "*.[jp][pn]g").rows} == {"page.png", "scan.jpg"}
    assert {row["document"] for row in m0kit(*args, "**/page.png").rows} == {"page.png", "deep/er/page.png"}
    assert [row["document"] for row in m0kit(*args, "[1].txt").rows] == ["[1].txt"]
    none = m0kit(*args, "*.tiff", "notes.txt")
    assert (none.code, none.err) == (3, "error: *.tiff: no file matches.\n")
    empty = m0kit(*args, "", "notes.txt")
    assert empty.code == 3
    assert "an empty name" in empty.err


def test_a_dash_is_one_document_from_stdin(
    m0kit: Callable[..., Done], artifact: Path, documents: list[Path], expected: list[float]
) -> None:
    for i in (1, 3):
        raw = documents[i].read_bytes()
        done = m0kit("rerank", artifact, "--query", "slm markdown", "-", "--json", stdin=raw)
        assert done.rows == [{"rank": 1, "index": 0, "document": "-", "score": pytest.approx(expected[i], abs=1e-5)}]
    done = m0kit("rerank", artifact, "--query", "slm markdown", "-", stdin=b"%PDF-1.7")
    why = "is no PDF, or so damaged" if find_spec("pypdfium2") else "reading PDFs needs pypdfium2"
    assert (done.code, done.err.startswith(f"error: -: {why}")) == (1, True), done.err


def test_json_lines_hold_documents(
    m0kit: Callable[..., Done], artifact: Path, documents: list[Path], reranker: Reranker
) -> None:
    for name in ("chunks.jsonl", "chunks.NDJSON"):
        file = documents[0].with_name(name)
        rows = [{"id": "c1", "text": "chunk"}, {"id": 2, "image": "page.png"}, {"text": "x"}, {"id": "c4"}]
        file.write_text(jsonl(*rows) + "no json\n")
        done = m0kit("rerank", artifact, "--query", "q", file, "--json")
        assert done.code == 3
        scores = reranker.score([("q", "chunk"), ("q", documents[3]), ("q", "x")])
        assert {row["document"]: row["score"] for row in done.rows[:3]} == {
            name: pytest.approx(score, abs=1e-5) for name, score in zip(("c1", "2", f"{file}:3"), scores, strict=True)
        }
        assert [row["document"] for row in done.rows[3:]] == ["c4", f"{file}:5"]
        first, second = done.err.splitlines()
        assert first.startswith(f"error: {file}:4: c4: document: expected")
        assert second.startswith(f"error: {file}:5: the line is not JSON")


def test_every_line_under_json_is_json(m0kit: Callable[..., Done], artifact: Path, documents: list[Path]) -> None:
    bad = documents[0].with_name("nonsense.png")
    bad.write_text("text")
    done = m0kit("rerank", artifact, "--query", "q", *documents, bad, "no.txt", "--json")

    def refused(name: str) -> None:
        raise AssertionError(name)

    rows = [json.loads(line, parse_constant=refused) for line in done.lines]
    assert [("score" in row, "error" in row) for row in rows] == [(True, False)] * 5 + [(False, True)] * 2


def test_a_query_that_is_no_image_is_said_once_before_anything_is_loaded(
    m0kit: Callable[..., Done], documents: list[Path]
) -> None:
    done = m0kit("rerank", "no artifact", "--query-image", "gone.png", *documents)
    assert (done.code, done.err) == (1, "error: gone.png: No such file or directory.\n")
    done = m0kit("rerank", "no artifact", "--query-image", documents[0], *documents)
    assert (done.code, done.err) == (1, f"error: --query-image: {documents[0]}: holds text. Give that with --query.\n")


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["nowhere"], "error: nowhere: no such folder. Give the folder that `m0kit export` wrote.\n"),
        (["."], "error: .: there is no manifest.json"),
        (["ARTIFACT", "--device", "tpu"], "error: device 'tpu' is not known. Say cpu, cuda"),
        (
            ["ARTIFACT", "--device", "NoSuchExecutionProvider"],
            "error: device 'NoSuchExecutionProvider': this onnxruntime has",
        ),
    ],
)
def test_an_error_is_one_line_on_stderr_with_code_1(
    m0kit: Callable[..., Done], artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    args: list[str], said: str,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    rest = [artifact if arg == "ARTIFACT" else arg for arg in args]
    done = m0kit("rerank", *rest, "doc", "--query", "q")
    assert (done.code, done.out, done.err.count("\n")) == (1, "", 1)
    assert done.err.startswith(said)


def test_options_are_read_from_the_environment_and_a_flag_wins(
    m0kit: Callable[..., Done], artifact: Path, documents: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("M0KIT_RERANK_DEVICE", "from-the-environment")
    args = ("rerank", artifact, "--query", "q", documents[0])
    done = m0kit(*args)
    assert done.code == 1
    assert "device 'from-the-environment' is not known" in done.err
    assert m0kit(*args, "--device", "cpu").code == 0
    assert m0kit("score", artifact, stdin='{"query": "q", "document": "d"}').code == 0
    monkeypatch.setenv("M0KIT_SCORE_RAW", "1")
    assert m0kit("score", artifact, stdin='{"query": "q", "document": "d"}').rows[0]["score"] != pytest.approx(
        Reranker.load(artifact).score([("q", "d")])[0], abs=1e-3
    )


# --- score -------------------------------------------------------------------------------------------


def jsonl(*pairs: object) -> str:
    return "".join(json.dumps(pair) + "\n" for pair in pairs)


def test_score_reads_a_file_whose_images_are_beside_it(
    m0kit: Callable[..., Done], artifact: Path, documents: list[Path], reranker: Reranker
) -> None:
    file = documents[0].parent / "pairs.jsonl"
    image, scan = documents[3], documents[4]
    file.write_text(
        jsonl(
            {"query": "slm", "document": "page.png"},
            {"query": "slm", "document": {"image": "page.png"}},
            {"query": {"image": "scan.jpg"}, "document": {"image": str(image)}},
            {"query": {"text": "größe"}, "document": {"text": "漢字"}},
        )
    )
    done = m0kit("score", artifact, file)
    wanted = reranker.score([("slm", "page.png"), ("slm", image), (scan, image), ("größe", "漢字")])
    assert (done.code, done.err) == (0, "")
    assert [row["score"] for row in done.rows] == pytest.approx(wanted.tolist(), abs=1e-5)


def test_score_reads_stdin_with_images_relative_to_where_one_is(
    m0kit: Callable[..., Done],
    artifact: Path,
    documents: list[Path],
    reranker: Reranker,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(documents[0].parent)
    text = jsonl({"query": "slm größe", "document": {"image": "page.png"}})
    wanted = reranker.score([("slm größe", documents[3])], raw=True)
    for args in (("-",), ()):
        done = m0kit("score", artifact, *args, "--raw", stdin=text)
        assert [row["score"] for row in done.rows] == pytest.approx(wanted.tolist(), abs=1e-4)
    done = m0kit("score", artifact, stdin="")
    assert (done.code, done.out, done.err) == (0, "", "note: nothing was given to be scored\n")


def test_where_nothing_at_all_can_be_scored_the_exit_code_is_that_of_an_error(
    m0kit: Callable[..., Done], artifact: Path, documents: list[Path], tmp_path: Path
) -> None:
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text(jsonl({"query": "", "document": "d"}, {"query": "q"}), "utf-8")
    said = "error: nothing could be scored\n"
    done = m0kit("score", artifact, pairs)
    assert (done.code, len(done.rows), done.err.endswith(said)) == (1, 2, True)
    done = m0kit("rerank", artifact, "--query", "q", tmp_path / "none.png", tmp_path / "nor.png")
    assert (done.code, len(done.lines), done.err.endswith(said)) == (1, 2, True)
    done = m0kit("score", artifact, pairs, "-o", tmp_path / "out.jsonl")
    assert (done.code, done.err.endswith(said)) == (1, True)
    assert len((tmp_path / "out.jsonl").read_text("utf-8").splitlines()) == 2
    pairs.write_text(jsonl({"query": "", "document": "d"}, {"query": "q", "document": "d"}), "utf-8")
    for more in ([], ["-o", tmp_path / "out.jsonl", "--overwrite"]):
        done = m0kit("score", artifact, pairs, *more)
        assert (done.code, said in done.err) == (3, False)


def test_an_input_that_holds_nothing_is_well_and_said(
    m0kit: Callable[..., Done], artifact: Path, tmp_path: Path
) -> None:
    (tmp_path / "pairs.jsonl").write_text("\n\n")
    done = m0kit("score", artifact, tmp_path / "pairs.jsonl", "-o", tmp_path / "out.jsonl")
    assert (done.code, done.err.splitlines()[-1]) == (0, "note: nothing was given to be scored")
    assert (tmp_path / "out.jsonl").read_text() == ""


@pytest.mark.parametrize("encoding", ["utf-8", "latin-1"])
def test_stdin_is_utf8_whatever_the_locale_says(artifact: Path, reranker: Reranker, encoding: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "m0kit", "score", str(artifact)],
        input='{"query": "größe", "document": "漢字"}'.encode(),
        capture_output=True,
        check=True,
        env={**os.environ, "PYTHONIOENCODING": encoding},
    )
    assert json.loads(done.stdout)["score"] == pytest.approx(reranker.score([("größe", "漢字")])[0], abs=1e-5)


def test_score_marks_lines_by_their_number_in_the_file(m0kit: Callable[..., Done], artifact: Path) -> None:
    good = {"query": "q", "document": "d"}
    bad = [{"query": "", "document": "d"}, {"query": "q", "document": {"image": "no.png"}}, {"query": "q"}, "text", 5,
           {"query": "q", "document": {"image": "\ud800.png"}}]  # fmt: skip
    done = m0kit("score", artifact, stdin="\n\n" + jsonl(good, *bad, good))
    assert done.code == 3
    assert [set(row) for row in done.rows] == [{"score"}, *[{"error"}] * len(bad), {"score"}]
    said = done.err.splitlines()
    assert [line.split(": ")[1] for line in said] == [f"line {4 + i}" for i in range(len(bad))]
    assert "query: is empty" in done.rows[1]["error"]
    assert "no.png: No such file" in done.rows[2]["error"]
    assert m0kit("score", artifact, "--strict", stdin=jsonl(good, bad[0])).code == 1


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (b"no json", "line 3: the line is not JSON (character 1)"),
        (b"[" * 100_000, "line 3: the line is not JSON that can be read: it is nested too deeply."),
        (b'{"query": "caf\xe9", "document": "d"}', "line 3: the line is not UTF-8 text (byte 15 is 0xE9)."),
        (b'{"query": "q", "document": NaN}', "line 3: the line is not JSON: it holds NaN."),
        (b'{"query": "q", "query": "r", "document": "d"}', "line 3: the line has the key 'query' twice."),
        (b'["q", "d"]', 'line 3: expected {"query": \u2026, "document": \u2026}, got list.'),
    ],
)
def test_a_line_that_is_not_json_costs_that_line(
    m0kit: Callable[..., Done], artifact: Path, tmp_path: Path, line: bytes, said: str
) -> None:
    good = b'{"query": "q", "document": "a\xe2\x80\xa8b"}'
    raw = b"\xef\xbb\xbf" + good + b"\r\n\r\n" + line + b"\n" + good
    done = m0kit("score", artifact, stdin=raw)
    assert done.code == 3
    assert [set(row) for row in done.rows] == [{"score"}, {"error"}, {"score"}]
    assert done.rows[1]["error"].startswith(said)
    assert done.err.startswith(f"error: {said}")
    assert done.err.count("\n") == 1
    file = tmp_path / "pairs.jsonl"
    file.write_bytes(raw)
    named = m0kit("score", artifact, file)
    assert named.rows[1]["error"].startswith(f"{file}: {said}")
    assert named.err.startswith(f"error: {file}: {said}")
    assert named.rows[0] == pytest.approx(done.rows[0], abs=1e-5)
    strict = m0kit("score", artifact, file, "--strict")
    assert (strict.code, strict.out, strict.err.count("\n")) == (1, "", 1)


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-32"])
def test_pairs_in_another_encoding_are_named_as_a_whole(
    m0kit: Callable[..., Done], artifact: Path, encoding: str
) -> None:
    done = m0kit("score", artifact, stdin='{"query": "q", "document": "d"}\n'.encode(encoding) * 2)
    assert (done.code, done.out) == (1, "")
    assert done.err == f"error: <stdin>: is {encoding[:6].upper()}. Save it as UTF-8.\n"


def test_both_ways_to_score_read_the_same_in_a_line(
    m0kit: Callable[..., Done], artifact: Path, documents: list[Path]
) -> None:
    raw = documents[3].read_bytes()
    content = base64.b64encode(raw).decode()
    lines = [
        {"id": 7, "query": "q", "document": "d", "label": 1},
        {"id": None, "query": "q", "document": {"text": "d", "image": None}},
        {"id": ["a", 1], "query": "q", "document": {"image": "page.png"}},
        {"id": "b", "query": "q", "document": {"image": content}},
        {"id": "c", "query": "q", "document": {"bytes": content, "path": None}},
        {"id": "d", "query": "q", "document": {"image": {"bytes": None, "path": "page.png"}}},
        {"id": "e", "query": "q", "document": None},
        {"id": "f", "query": "q", "documents": ["d"]},
        {"id": "g", "query": "q", "document": {"image": "https://example.org/a.png"}},
        {"id": "h", "query": "q", "document": {"image": "no.png"}},
        {"id": "i", "query": "q", "document": {"image": content[:-9] + "!" + content[-9:]}},
        {"id": 1e999, "query": "q", "document": "d"},
    ]
    file, output = documents[0].with_name("pairs.jsonl"), documents[0].with_name("out.jsonl")
    file.write_text("\ufeff" + jsonl(*lines).replace("Infinity", "1e999"), "utf-8")
    printed = m0kit("score", artifact, file)
    assert printed.code == m0kit("score", artifact, file, "-o", output).code == 3
    written = [json.loads(line) for line in output.read_text("utf-8").splitlines()]
    for number, (one, other) in enumerate(zip(printed.rows, written, strict=True), 1):
        assert one.get("id") == other["id"]
        if other["error"]:
            assert one["error"] == f"{file}: {other['error']}"
            assert other["error"].startswith(f"line {number}: ")
            assert len(other["error"]) < 300
        else:
            assert one["score"] == pytest.approx(other["score"], abs=1e-5)
    assert [row["error"] is None for row in written] == [True] * 6 + [False] * 5 + [True]
    assert len({row["score"] for row in written[2:6]}) == 1
    assert "has no 'document', got 'id', 'query', 'documents'." in written[7]["error"]


def test_an_error_that_many_lines_share_is_told_once(m0kit: Callable[..., Done], artifact: Path) -> None:
    lines = jsonl(*[{"query": "q", "passage": f"d{i}"} for i in range(1000)])
    done = m0kit("score", artifact, stdin=lines)
    assert len(done.rows) == 1000
    assert done.err == (
        'error: line 1, line 2, line 3 and 997 more: expected "query" and "document"; has no \'document\', '
        "got 'query', 'passage'.\nerror: nothing could be scored\n"
    )
    different = jsonl(*[{"query": "q", "document": {"image": f"{i}.png"}} for i in range(50)])
    done = m0kit("score", artifact, stdin=different)
    assert (len(done.rows), done.err.count("\n")) == (50, 22)
    assert done.err.endswith("error: and 30 more\nerror: nothing could be scored\n")


def test_a_missing_file_of_pairs_is_wrong_usage(m0kit: Callable[..., Done], artifact: Path) -> None:
    done = m0kit("score", artifact, "nowhere.jsonl")
    assert done.code == 2
    assert "nowhere.jsonl" in done.err


# --- inspect -----------------------------------------------------------------------------------------


def test_inspect_shows_licence_and_dimensions(m0kit: Callable[..., Done], artifact: Path) -> None:
    done = m0kit("inspect", artifact)
    facts = {line[:12].strip(): line[13:] for line in done.lines}
    manifest = read_manifest(artifact)
    assert (done.code, done.err) == (0, "")
    assert facts["licence"] == "cc-by-nc-4.0"
    assert facts["decoder"] == "3 layers of width 64, 384 tokens"
    assert facts["images"] == "3136–602112 pixels"
    assert facts["fingerprint"] == manifest.fingerprint
    assert facts["adapters"] == "none"
    assert str(artifact) in facts["artifact"]
    assert "fp32" in facts["artifact"]
    assert "files" not in facts


def test_inspect_names_the_adapters_that_were_merged_and_the_sets_of_graphs(
    m0kit: Callable[..., Done], artifact: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(artifact, copy)
    manifest = read_manifest(copy)
    adapters = [
        {"name": "code", "weight": 1.0, "licence": None},
        {"name": "legal", "weight": 0.5, "licence": "mit"},
    ]
    write_manifest(copy, replace(manifest, provenance=dict(manifest.provenance) | {"adapters": adapters}))
    facts = {line[:12].strip(): line[13:] for line in m0kit("inspect", copy).lines}
    assert facts["adapters"] == "code, legal × 0.5 (mit)"
    assert facts["graphs"] == "vision, decoder, head; on cpu vision.cpu"


def test_inspect_prints_json(m0kit: Callable[..., Done], artifact: Path) -> None:
    (facts,) = m0kit("inspect", artifact, "--json", "--verify").rows
    manifest = read_manifest(artifact)
    assert facts["licence"] == "cc-by-nc-4.0"
    assert facts["model"] == json.loads(json.dumps(manifest.model.to_dict()))
    assert (facts["bytes"], facts["scheme"]) == (manifest.num_bytes, "fp32")
    assert set(facts["graphs"]) == {"vision", "decoder", "decoder.kv-fp16", "decoder.kv-int8", "head", "vision.cpu"}
    assert facts["runs"] == {"cpu": {"vision": "vision.cpu"}}
    assert facts["provenance"] == manifest.provenance


def test_inspect_verifies(m0kit: Callable[..., Done], artifact: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(artifact, copy)
    count = len(read_manifest(copy).files)
    assert f"{count} checked, all as exported" in m0kit("inspect", copy, "--verify").out
    with open(copy / "head.onnx.data", "r+b") as file:
        file.write(b"\xff")
    assert m0kit("inspect", copy).code == 0
    done = m0kit("inspect", copy, "--verify")
    assert (done.code, done.out) == (1, "")
    assert done.err.startswith(f"error: {copy / 'head.onnx.data'}: its content has changed")


# --- the command itself ------------------------------------------------------------------------------


def test_help_and_version(m0kit: Callable[..., Done]) -> None:
    done = m0kit("--help")
    assert done.code == 0
    for name in ("rerank", "score", "inspect", "export", "parity", "bench"):
        assert f"\n  {name}" in done.out
    assert m0kit("-h").out == done.out
    assert __version__ in m0kit("--version").out
    assert m0kit("nonsense").code == 2


@pytest.mark.parametrize("args", [["--help"], ["rerank", "--help"], ["export", "--help"], ["parity", "--help"]])
def test_help_needs_no_pytorch(args: list[str]) -> None:
    script = (
        "import sys\nfrom m0kit.cli.commands import main\n"
        f"sys.argv = ['m0kit', *{args!r}]\n"
        "try:\n    main()\nexcept SystemExit as done:\n    assert not done.code, done.code\n"
        "heavy = {'torch', 'transformers', 'peft', 'onnx', 'ml_dtypes'} & set(sys.modules)\nassert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "Usage:" in done.stdout


def test_without_the_export_extra_the_command_says_what_to_install() -> None:
    script = (
        "import sys\nsys.modules['torch'] = sys.modules['onnx'] = None\nfrom m0kit.cli.commands import main\n"
        "sys.argv = ['m0kit', 'export', '.', '-o', 'never']\nmain()\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert "pip install 'm0kit[export]'" in done.stderr
    assert "Traceback" not in done.stderr


def test_it_runs_as_a_module_and_a_closed_pipe_is_no_traceback(artifact: Path, documents: list[Path]) -> None:
    args = [sys.executable, "-m", "m0kit", "rerank", str(artifact), "--query", "q", *map(str, documents)]
    done = subprocess.Popen(args, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert done.stdout is not None
    done.stdout.close()
    assert done.stderr is not None
    with done.stderr:
        assert done.stderr.read() == ""
    assert done.wait() == 1


def test_interrupting_is_said(m0kit: Callable[..., Done], artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Reranker, "load", interrupted)
    done = m0kit("score", artifact, stdin="")
    assert (done.code, done.out, done.err.strip()) == (130, "", "interrupted")


# --- numbers that are none -----------------------------------------------------------------------------


@pytest.fixture
def overflowing(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first pair of every run gets a logit that is not finite."""
    run = sessions.OnnxRuntimeGraph.run

    def spoiled(self: sessions.OnnxRuntimeGraph, feeds: Any, outputs: Any) -> Any:
        out = run(self, feeds, outputs)
        if "logit" in out:
            out["logit"] = np.array([np.nan, *out["logit"][1:]], np.float32)
        return out

    monkeypatch.setattr(sessions.OnnxRuntimeGraph, "run", spoiled)


def strictly(text: str) -> list[dict[str, Any]]:
    """JSON lines as parsers in other languages take them, without NaN."""

    def refuse(word: str) -> None:
        raise AssertionError(word)

    return [json.loads(line, parse_constant=refuse) for line in text.splitlines()]


@pytest.mark.usefixtures("overflowing")
def test_a_logit_that_is_not_finite_is_an_error_of_its_pair_wherever_it_goes(
    m0kit: Callable[..., Done], unasked: Path, tmp_path: Path
) -> None:
    said = "the model's answer is not a finite number"
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text("".join(json.dumps({"query": "q", "document": d}) + "\n" for d in ("one", "two", "three")))
    done = m0kit("score", unasked, pairs)
    assert done.code == 3
    assert [sorted(row) for row in strictly(done.out)] == [["error"], ["score"], ["score"]]
    assert f"line 1: {said}" in done.err
    assert m0kit("score", unasked, pairs, "--strict").code == 1
    output = tmp_path / "scores.jsonl"
    done = m0kit("score", unasked, pairs, "-o", output)
    assert (done.code, "1 could not be scored" in done.err) == (3, True)
    first, *rest = strictly(output.read_text("utf-8"))
    assert (first["score"], first["logit"]) == (None, None)
    assert first["error"].startswith(f"line 1: {said}")
    assert all(row["score"] is not None and row["error"] is None for row in rest)
    (listed,) = strictly((tmp_path / "scores.jsonl.errors.jsonl").read_text("utf-8"))
    assert listed["error"].startswith(f"line 1: {said}")
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text(name)
    done = m0kit("rerank", unasked, "--query", "q", "--json", tmp_path / "a.txt", tmp_path / "b.txt")
    assert done.code == 3
    assert [("error" in row, row["document"][-5:]) for row in strictly(done.out)] == [(False, "b.txt"), (True, "a.txt")]
    done = m0kit("rerank", unasked, "--query", "q", tmp_path / "a.txt", tmp_path / "b.txt")
    assert done.lines[1].split()[0] == "error"
