"""Every program in examples/ runs, and those without m0kit come to its scores."""

import ast
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import pytest
from PIL import Image

from m0kit import Reranker
from m0kit_export.export import export_artifact
from m0kit_parity.small.files import SMALL

EXAMPLES = Path(__file__).parents[2] / "examples"
PAGES = SMALL / "eval" / "pages"
# Of a score. The graphs and what is fed are the same; float32 values are added up in another order, by other sizes of
# pieces and other settings, in WebAssembly by other kernels too. Measured: 6e-7, there 2e-6.
TOLERANCE = 1e-5
TEXTS = [
    ("green plate in the kitchen", "In the kitchen you find a large green plate."),
    ("where is the image?", "a text may spell <|image_pad|> and 港 🙂 and stay a text"),
    ("x", "word " * 700),  # several pieces in m0kit, one here
]
# What npm says where there is no way to its registry.
_UNREACHABLE = ("ENOTFOUND", "EAI_AGAIN", "ECONNREFUSED", "ECONNRESET", "ETIMEDOUT", "ENETUNREACH", "ENOTCACHED")


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("examples") / "small-fp32"
    export_artifact(SMALL / "base", folder, progress=False)
    return folder


@pytest.fixture(scope="module")
def reranker(artifact: Path) -> Reranker:
    return Reranker.load(artifact, threads=1)


def run(name: str, *arguments: object) -> str:
    """What the program prints; it must not fail."""
    return told([sys.executable, str(EXAMPLES / name), *map(str, arguments)])


def told(command: Sequence[str], folder: Path | None = None) -> str:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, encoding="utf-8", check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def module(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


def page(name: str, size: tuple[int, int] | None = None) -> Image.Image:
    with Image.open(PAGES / name) as image:
        return image.convert("RGB").resize(size or image.size)


def test_every_example_stands_in_the_docs() -> None:
    usage = (EXAMPLES.parent / "docs" / "usage.md").read_text("utf-8")
    programs = [
        path for path in EXAMPLES.rglob("*") if path.suffix in (".py", ".mjs") and "node_modules" not in path.parts
    ]
    assert len(programs) >= 6
    assert not [path for path in programs if f"../{path.relative_to(EXAMPLES.parent).as_posix()}" not in usage]


def test_texts_are_reranked(artifact: Path) -> None:
    best, *others = run("rerank_texts.py", artifact).splitlines()
    assert best.endswith("In the kitchen you find a large green plate.")
    assert len(others) == 2


def test_pages_are_reranked_and_one_that_is_none_costs_the_others_nothing(artifact: Path, tmp_path: Path) -> None:
    (tmp_path / "none.png").write_text("no image")
    names = [PAGES / "00-8.png", tmp_path / "none.png", PAGES / "00-5.png"]
    lines = run("rerank_pages.py", artifact, "find cheap bread", *names).splitlines()
    assert [line.split()[1] for line in lines] == [str(names[0]), str(names[2])]


def test_documents_of_an_index_are_read_once(artifact: Path, tmp_path: Path) -> None:
    (tmp_path / "cup.txt").write_text("The cup in the harbour is green.")
    arguments = (artifact, tmp_path / "index", PAGES / "00-8.png", tmp_path / "cup.txt")
    first, again = (run("index_and_query.py", *arguments).splitlines() for _ in range(2))
    assert first[0] == "2 read, 0 were there already, 0 failed"
    assert again[0] == "0 read, 2 were there already, 0 failed"
    assert first[1:] == again[1:]
    assert "00-8.png" in first[1]
    assert "cup.txt" in first[2]


def test_a_large_file_is_scored_and_a_bad_line_named(artifact: Path, tmp_path: Path) -> None:
    rows = [{"id": "a", "query": "x", "document": "y"}, {"id": "b", "query": "x"}]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    lines = run("large_file.py", artifact, tmp_path / "in.jsonl", tmp_path / "out.jsonl").splitlines()
    assert lines[0] == "2 rows, 0 of them scored by an earlier run, 1 could not be scored"
    assert lines[1] == f"why not: {tmp_path / 'out.jsonl.errors.jsonl'}"
    first, second = map(json.loads, (tmp_path / "out.jsonl").read_text().splitlines())
    assert 0 < first["score"] < 1
    assert second["score"] is None


def test_the_numpy_example_is_short_and_does_without_m0kit() -> None:
    text = (EXAMPLES / "artifact_numpy.py").read_text("utf-8")
    imported = {
        name
        for node in ast.walk(ast.parse(text))
        for name in ([alias.name for alias in node.names] if isinstance(node, ast.Import) else [])
        + ([str(node.module)] if isinstance(node, ast.ImportFrom) else [])
    }
    assert {name.partition(".")[0] for name in imported} - set(sys.stdlib_module_names) == {
        *("numpy", "onnxruntime", "PIL", "tokenizers")
    }
    assert len(text.splitlines()) <= 100


def test_the_numpy_example_comes_to_m0kit_s_scores(artifact: Path, reranker: Reranker) -> None:
    wide, small = page("00-3.png", (1500, 700)), page("00-2.png", (20, 30))  # above and below the limits of pixels
    pairs = [*TEXTS, ("find cheap bread", page("00-8.png")), (page("00-1.png"), "cheap bread"), (wide, small)]
    example = module("artifact_numpy").Artifact(artifact)
    found = [example.score(*pair) for pair in pairs]
    assert found == pytest.approx([result.score for result in reranker.evaluate(pairs)], abs=TOLERANCE)


def test_the_numpy_example_runs_as_a_program(artifact: Path, reranker: Reranker) -> None:
    query, text = TEXTS[0]
    image = PAGES / "00-8.png"
    lines = run("artifact_numpy.py", artifact, query, text, image).splitlines()
    scores = [float(line.split()[0]) for line in lines]
    assert scores == pytest.approx(reranker.score([(query, text), (query, image)]).tolist(), abs=TOLERANCE)


@pytest.fixture(scope="module")
def web(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The JavaScript example with what its lock file names."""
    node, npm = shutil.which("node"), shutil.which("npm")
    if node is None or npm is None:
        pytest.skip("this machine has no node with npm")
    if int(told([node, "--version"]).removeprefix("v").split(".")[0]) < 20:
        pytest.skip("the node of this machine is older than 20")
    folder = tmp_path_factory.mktemp("web")
    for name in ("package.json", "package-lock.json", "artifact_web.mjs"):
        shutil.copy(EXAMPLES / "web" / name, folder)
    command = [npm, "ci", "--ignore-scripts", "--no-audit", "--no-fund", "--prefer-offline"]
    environment = {**os.environ, "npm_config_update_notifier": "false", "npm_config_fetch_retries": "1"}
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, encoding="utf-8", check=False
    )
    if done.returncode and any(word in done.stderr for word in _UNREACHABLE):
        pytest.skip("npm cannot reach its registry")
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.parametrize(("query", "document"), TEXTS)
def test_the_web_example_comes_to_m0kit_s_scores(
    web: Path, artifact: Path, reranker: Reranker, query: str, document: str
) -> None:
    found = json.loads(told(["node", "artifact_web.mjs", str(artifact), query, document], web))
    (result,) = reranker.evaluate([(query, document)])
    assert found["score"] == pytest.approx(result.score, abs=TOLERANCE)
