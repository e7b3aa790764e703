"""The command's results, messages and exit codes, as a shell sees them."""

import io
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from m0kit import Reranker, __version__
from m0kit.artifact import read_manifest
from m0kit.cli import main

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
    contents = [*TEXTS.values(), *documents[3:]]
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


def test_a_document_that_cannot_be_scored_comes_last_and_the_others_are_there(
    m0kit: Callable[..., Done], artifact: Path, documents: list[Path], tmp_path: Path
) -> None:
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "broken.png").write_bytes(documents[3].read_bytes()[:200])
    bad = [tmp_path / "missing.png", tmp_path / "empty.txt", tmp_path / "broken.png", tmp_path]
    done = m0kit("rerank", artifact, "--query", "q", bad[0], documents[0], *bad[1:], documents[3])
    assert done.code == 3
    assert [line.split()[0] for line in done.lines[2:]] == ["error"] * 4
    assert [line.split()[1] for line in done.lines[2:]] == [str(path) for path in bad]
    assert {line.split()[1] for line in done.lines[:2]} == {str(documents[0]), str(documents[3])}
    said = done.err.splitlines()
    assert [line.split(": ")[:2] for line in said] == [["error", str(path)] for path in bad]
    for line, words in zip(
        said, ("No such file", "document is empty", "damaged or cut off", "Is a directory"), strict=True
    ):
        assert words in line
    rows = m0kit("rerank", artifact, "--query", "q", bad[0], documents[0], "--json").rows
    assert set(rows[1]) == {"rank", "index", "document", "error"}
    assert "score" in rows[0]


def test_strict_stops_at_the_first(m0kit: Callable[..., Done], artifact: Path, documents: list[Path]) -> None:
    done = m0kit("rerank", artifact, "--query", "q", documents[0], "missing.png", "--strict")
    assert (done.code, done.out) == (1, "")
    assert done.err == "error: pair 1: document: missing.png: No such file or directory.\n"


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
    assert done.code == 3
    assert "query is empty" in done.err


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
    assert m0kit("score", artifact, stdin="").out == ""


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
    assert "query is empty" in done.rows[1]["error"]
    assert "no.png: No such file" in done.rows[2]["error"]
    assert m0kit("score", artifact, "--strict", stdin=jsonl(good, bad[0])).code == 1


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"query": "q", "document": "d"}\n\nno json\n', "error: line 3: not JSON. Write one pair per line.\n"),
        ("[" * 100_000, "error: line 1: not JSON."),
        (b'{"query": "caf\xe9", "document": "d"}', "error: <stdin>: not UTF-8 text."),
    ],
)
def test_what_is_not_json_lines_is_refused_as_a_whole(
    m0kit: Callable[..., Done], artifact: Path, text: str | bytes, said: str
) -> None:
    done = m0kit("score", artifact, stdin=text)
    assert (done.code, done.out) == (1, "")
    assert done.err.startswith(said)


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


def test_inspect_names_the_adapters_that_were_merged(
    m0kit: Callable[..., Done], artifact: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(artifact, copy)
    raw = json.loads((copy / "manifest.json").read_text("utf-8"))
    raw["provenance"]["adapters"] = [
        {"name": "code", "weight": 1.0, "licence": None},
        {"name": "legal", "weight": 0.5, "licence": "mit"},
    ]
    (copy / "manifest.json").write_text(json.dumps(raw), "utf-8")
    facts = {line[:12].strip(): line[13:] for line in m0kit("inspect", copy).lines}
    assert facts["adapters"] == "code, legal × 0.5 (mit)"


def test_inspect_prints_json(m0kit: Callable[..., Done], artifact: Path) -> None:
    (facts,) = m0kit("inspect", artifact, "--json", "--verify").rows
    manifest = read_manifest(artifact)
    assert facts["licence"] == "cc-by-nc-4.0"
    assert facts["model"] == json.loads(json.dumps(manifest.model.to_dict()))
    assert (facts["bytes"], facts["scheme"]) == (manifest.num_bytes, "fp32")
    assert set(facts["graphs"]) == {"vision", "decoder", "decoder.kv-fp16", "decoder.kv-int8", "head"}
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
        "import sys\nfrom m0kit.cli import main\n"
        f"sys.argv = ['m0kit', *{args!r}]\n"
        "try:\n    main()\nexcept SystemExit as done:\n    assert not done.code, done.code\n"
        "heavy = {'torch', 'transformers', 'peft', 'onnx'} & set(sys.modules)\nassert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "Usage:" in done.stdout


def test_without_the_export_extra_the_command_says_what_to_install() -> None:
    script = (
        "import sys\nsys.modules['torch'] = sys.modules['onnx'] = None\nfrom m0kit.cli import main\n"
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
