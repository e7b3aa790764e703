"""Every snippet of README.md, CONTRIBUTING.md and docs/ does what it says, on the small checkpoint.

Commands are read from the pages themselves, run in a folder that holds files of the names they use, and must succeed.
What takes hardware or minutes is held against the options of its command instead, and says why in a table here; a
snippet that is new is run, or fails. What the pages name exists, and what there is they name.
"""

import base64
import glob
import importlib.util
import io
import json
import os
import re
import shlex
import shutil
import subprocess
import tomllib
from collections.abc import Iterator
from contextlib import chdir
from dataclasses import dataclass
from pathlib import Path

import click
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from PIL import Image, ImageDraw
from tests import pdfs

from m0kit import Reranker
from m0kit.artifact.ports import PAGE_TOKENS
from m0kit.cli.commands import cli
from m0kit.machine.advice import NEEDS
from m0kit.opening import GPU_VARIABLE
from m0kit.scoring import gpus
from m0kit.scoring.cuda_engine import POOL_VARIABLE
from m0kit_export.adapter import AdapterSpec
from m0kit_export.export import export_artifact, quantize_artifact
from m0kit_export.graphs import check_recipe
from m0kit_parity.proof.tolerances import tolerances
from m0kit_parity.samples.checkpoints import model_config
from m0kit_parity.small.files import SMALL
from m0kit_quant.recipe import Recipe

ROOT = Path(__file__).parents[1]
GENERATED = {"docs/figures.md", "docs/clients.md"}  # by `make figures` and `make clients`, with what was run


@dataclass(frozen=True)
class Page:
    """A page and what stands in it."""

    name: str
    text: str

    @property
    def fenced(self) -> list[tuple[str, str]]:
        """Kinds and texts of the blocks between lines of ```."""
        return re.findall(r"^```(\w*)\n(.*?)^```$", self.text, re.DOTALL | re.MULTILINE)

    @property
    def unfenced(self) -> str:
        return re.sub(r"^```.*?^```$", "", self.text, flags=re.DOTALL | re.MULTILINE)

    @property
    def indented(self) -> list[str]:
        """Lines of indented blocks, which are commands; a comment behind one is not part of it."""
        # Lines that go on a list's item are indented too, by two.
        lines = re.findall(r"^    (\S.*)$", self.unfenced, re.MULTILINE)
        return [" ".join(line.partition("  #")[0].split()) for line in lines]

    @property
    def inline(self) -> list[str]:
        """Code in a line, which a line's end may break."""
        return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", self.unfenced)]

    @property
    def anchors(self) -> set[str]:
        """Of its headings, as GitHub makes them."""
        titles = re.findall(r"^#+ (.*)$", self.unfenced, re.MULTILINE)
        return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def pages_of(*patterns: str) -> list[Page]:
    paths = sorted(path for pattern in patterns for path in ROOT.glob(pattern))
    return [Page(path.relative_to(ROOT).as_posix(), path.read_text("utf-8")) for path in paths]


README = pages_of("README.md")[0]
PAGES = pages_of("*.md", "docs/*.md")
# CHANGELOG.md also names commands as they were, and docs/figures.md those that it was made by, which take an hour.
RUN = [page for page in PAGES if page.name not in {"CHANGELOG.md", *GENERATED}]
INDENTED = {line for page in RUN for line in page.indented}
INLINE = {span for page in RUN for span in page.inline}
COMMANDS = sorted(line for line in INDENTED | INLINE if line.startswith("m0kit "))
OTHERS = sorted(
    {line for line in INDENTED if not line.startswith("m0kit ")}
    | {line for line in INLINE if line.startswith(("pip ", "python ", "make ", "optimum-cli "))}
)

# Beginnings of commands of which only the options are looked at, and why.
PARSED = {
    "m0kit bench": "minutes of measuring, or a full checkpoint; tests/parity/bench runs small ones",
    "m0kit checkpoint small|small-massive|tiny|wide|full": "the five are not one command; tests/parity runs them",
    "m0kit evaluate ARTIFACT --kv": "170 queries, several times; tests/parity/evaluate runs smaller ones",
    "m0kit evaluate m0-fp32/ m0-int8/ --draw": "1,700 queries; tests/parity/evaluate draws some",
    "m0kit figures": "an hour; tests/parity/figures measures a little",
    "m0kit serve": "serves until it is stopped; tests/runtime/server/test_workers.py starts and stops it",
    "m0kit parity published": "needs the inputs of the model card; tests/parity/proof makes some",
}
# The CPU stands for GPUs, which these tests have none of; what they compute is held in tests/parity/cuda.
GPU = {"--device": "cpu", "--gpu-bytes": None, "--pool-bytes": None}
# What keeps a command to seconds: timing and most built-in cases are left to tests of their own.
SHORTENED = {
    "m0kit evaluate": ["--no-speed"],
    "m0kit parity record": ["--cases", "text_text", "--cases", "image_text"],
    "m0kit parity check": [],
    "m0kit parity run": ["--cases", "text_text", "--cases", "image_text"],
}
# Pages whose Python needs packages that are not here.
ELSEWHERE_RUN = {
    "docs/integrations.md": "tests/integrations/test_page.py runs it in the environments of `make integrations`"
}
# Lines of other programs: what stands for them in the tests.
ELSEWHERE = {
    "make ": "targets are looked up below",
    "pip install ": "extras are looked up below; tests/installed installs [cpu]",
    "python -m m0kit_parity.bench.workers": "tests/parity/bench/test_workers.py measures two workers",
    "python -m m0kit_parity.gpu.check": "tests/parity/gpu runs it on a tiny checkpoint",
    "curl ": "tests/runtime/server/test_serving_page.py sends them",
    "optimum-cli export m0": "tests/export/test_optimum.py runs it",
    "python -m m0kit_parity.bench.load.peer": "needs sentence-transformers; tests/parity/bench makes its model",
    "python -m m0kit_parity.small.massive": "a quarter of an hour; tests/parity/test_massive.py trains for seconds",
    "python -m m0kit_parity.small.train": "an hour; tests/parity/test_small.py trains for seconds",
    "python tests/artifacts/make.py": "tests/artifacts/test_artifacts.py makes one of them",
    "python -m tests.fuzz": "tests/fuzz/test_fuzz.py runs it",
    "export M0KIT_REQUIRE_SIGNATURE": "tests/runtime/artifact/test_signature.py sets it",
    "cd examples/web && npm ci": "tests/examples runs it",
    "node artifact_web.mjs": "tests/examples runs it",
}


def page_image(text: str) -> Image.Image:
    image = Image.new("RGB", (200, 120), "white")
    ImageDraw.Draw(image).text((10, 40), text, "black")
    return image


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with all that the commands name."""
    folder = tmp_path_factory.mktemp("docs")
    (folder / "jinaai").mkdir()
    for name in ("CHECKPOINT", "jinaai/jina-reranker-m0"):
        (folder / name).symlink_to(SMALL / "base")
    for name in ("my-lora", "a", "b"):
        (folder / name).symlink_to(SMALL / "adapters" / "code")
    code = AdapterSpec(SMALL / "adapters" / "code")
    export_artifact(SMALL / "base", folder / "m0-fp32", adapters=[code], progress=False)
    export_artifact(SMALL / "base", folder / "ARTIFACT", progress=False)
    for precision in ("int8", "int4", "fp16"):
        output, recipe = folder / f"m0-{precision}", Recipe.default(precision)
        quantize_artifact(folder / "m0-fp32", output, recipe=recipe, progress=False)
    (folder / "mine.toml").write_text(recipes()[0], "utf-8")
    for name in ("pages", "manuals"):
        (folder / name).mkdir()
    for name in ("paper.png", "page.png", "page2.jpg", "pages/1.png", "pages/2.png"):
        page_image(name).save(folder / name)
    for name in ("notes.txt", "manuals/a.txt", "manuals/b.txt"):
        (folder / name).write_text(f"{name}: a small language model writes markdown", "utf-8")
    for name in ("paper.pdf", "manuals/guide.pdf"):
        (folder / name).write_bytes(pdfs.pdf([pdfs.text(f"{name} {number}") for number in (1, 2)], size=(200, 120)))
    pairs = [{"query": "slm markdown", "document": {"image": "page.png"}}]
    pairs += [{"query": f"question {i}", "document": f"answer {i} of some words"} for i in range(4)]
    documents = ["a small model", "the tide", {"image": "page.png"}]
    judged = {"query": "slm markdown", "documents": documents, "relevance": [2, 0, 1]}
    chunks = [{"id": "c17", "text": "a chunk on markdown"}, {"id": "c18", "text": "another"}]
    for name, rows in (("pairs", pairs), ("candidates", pairs), ("judged", [judged]), ("chunks", chunks)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    table = pa.table({"query": ["slm markdown"] * 2, "document": ["a model", "tide"]})
    pq.write_table(table, folder / "candidates.parquet")
    (folder / "ids.txt").write_text("pages/1.png\nc17\n", "utf-8")
    if shutil.which("ssh-keygen"):
        key = folder / "home" / ".ssh" / "id_ed25519"
        key.parent.mkdir(parents=True)
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(key)], check=True)
        public = key.with_name("id_ed25519.pub").read_text().split()[:2]
        (folder / "signers").write_text(" ".join(["alice@example.com", *public]) + "\n")
        with chdir(folder):
            run(["sign", "m0-fp32", "--key", str(key)])
    with chdir(folder):
        run(["index", "add", "m0-int8", "library", "pages/1.png", "chunks.jsonl"])
        run(["index", "add", "m0-fp16", "gpu-library", "pages/1.png", "chunks.jsonl"])
        run(["parity", "record", "CHECKPOINT", "-o", "golden", "--cases", "text_text"])
    return folder


@pytest.fixture
def workplace(prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The same in links, so that no command changes what the next one reads; an index is a copy."""
    for path in prepared.iterdir():
        (tmp_path / path.name).symlink_to(path.resolve())
    for name in ("library", "gpu-library"):
        (tmp_path / name).unlink()
        shutil.copytree(prepared / name, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(prepared / "home"))
    monkeypatch.setenv("M0KIT_REQUIRE_SIGNATURE", "")  # a command that sets it is undone with this
    return tmp_path


def run(words: list[str]) -> None:
    done = CliRunner().invoke(cli, words)
    assert done.exit_code == 0, f"m0kit {shlex.join(words)}: {done.output}{done.exception!r}"


def recipes() -> list[str]:
    return [text for page in RUN for kind, text in page.fenced if kind == "toml"]


def row_of(table: dict[str, object], line: str) -> str | None:
    """The longest beginning of the line that the table has."""
    return max((start for start in table if line.startswith(start)), key=len, default=None)


def command_of(words: list[str]) -> tuple[click.Command, list[str]]:
    """The command that the words name, and the words behind its name. Raises UsageError where there is none."""
    command: click.Command = cli
    context = click.Context(cli, info_name="m0kit")
    if words[:1] == ["--require-signature"]:  # of all commands
        words = words[2:]
    while isinstance(command, click.Group) and words and not words[0].startswith("-"):
        found = command.get_command(context, words[0].split("|")[0])
        if found is None:
            raise click.UsageError(f"no command {words[0]}")
        words = words[1:]
        context = click.Context(found, parent=context, info_name=found.name)
        command = found
    return command, words


def commands_of(group: click.Group, name: str = "m0kit") -> Iterator[str]:
    """All commands that there are, by their whole names."""
    context = click.Context(group, info_name=name)
    for word in group.list_commands(context):
        found = group.get_command(context, word)
        yield f"{name} {word}"
        if isinstance(found, click.Group):
            yield from commands_of(found, f"{name} {word}")


def test_the_pages_have_commands() -> None:
    assert len(COMMANDS) >= 30


@pytest.mark.parametrize("line", COMMANDS)
def test_a_command_and_its_options_exist(line: str) -> None:
    command, words = command_of(shlex.split(line)[1:])
    known = {option for parameter in command.params for option in parameter.opts}
    unknown = [word for word in words if word.startswith("-") and word not in known]
    assert not unknown, f"{line}: {unknown}, known are {sorted(known)}"


@pytest.mark.parametrize("name", list(commands_of(cli)))
def test_a_command_that_there_is_stands_in_the_pages(name: str) -> None:
    assert any(f"{line} ".startswith(f"{name} ") for line in COMMANDS), f"say what `{name}` is for, in docs/usage.md"


def words_of(line: str) -> list[str]:
    """What follows "m0kit", as a shell would give it, with one of the forms where any will do."""
    words = ["rslora" if word == "FORM" else os.path.expanduser(word) for word in shlex.split(line)[1:]]
    return [name for word in words for name in (sorted(glob.glob(word)) if "*" in word else [word])]


def on_cpu(words: list[str]) -> list[str]:
    """The same command without a GPU, except where an artifact is only made for one."""
    if words[0] in ("export", "quantize") or not any(word.startswith("cuda") for word in words):
        return words
    found: list[str] = []
    for option, word in zip(["", *words], words, strict=False):
        if word in GPU or option in GPU:
            stands = GPU[option] if option in GPU else word if GPU[word] else None
            found += [stands] if stands else []
        else:
            found.append(word)
    return found


def test_the_cpu_stands_for_gpus_where_commands_are_run() -> None:
    words = ["score", "m0", "--device", "cuda:0,cuda:1", "--gpu-bytes", "16G", "pairs.jsonl"]
    assert on_cpu(words) == ["score", "m0", "--device", "cpu", "pairs.jsonl"]
    assert on_cpu(words[:2]) == words[:2]
    assert on_cpu(["export", "c", "--device", "cuda"])[-1] == "cuda"


def is_mention(line: str) -> bool:
    """A command's name, perhaps with options, as a sentence speaks of it: what it must be given is left out."""
    if line in INDENTED:
        return False
    words = words_of(line)
    try:
        command, words = command_of(words)
        if isinstance(command, click.Group):
            return True
        command.make_context("m0kit", words)
    except click.MissingParameter:
        return True
    except click.ClickException:
        return all(word.startswith("-") for word in words)
    return False


@pytest.mark.parametrize("line", [line for line in COMMANDS if not is_mention(line) and row_of(PARSED, line) is None])
def test_a_command_runs(line: str, workplace: Path) -> None:
    needs_keys = "sign" in line and not shutil.which("ssh-keygen")
    if needs_keys:
        pytest.skip("this machine has no ssh-keygen")
    words = on_cpu(words_of(line))
    if "-o" in words:  # written anew, not into what is there for the others
        output = Path(words[words.index("-o") + 1].rstrip("/"))
        if output.is_symlink():
            output.unlink()
    shortened = row_of(SHORTENED, line)
    run([*words, *(SHORTENED[shortened] if shortened else [])])


@pytest.mark.parametrize("line", OTHERS)
def test_a_line_of_another_program_is_known(line: str) -> None:
    assert row_of(ELSEWHERE, line), f"{line}: say in this file's tables what stands for it"


def test_the_tables_name_only_what_is_there() -> None:
    assert not [start for start in PARSED if not any(line.startswith(start) for line in COMMANDS)]
    assert not [start for start in ELSEWHERE if not any(line.startswith(start) for line in OTHERS)]
    assert not [name for name in ELSEWHERE_RUN if not (ROOT / name).exists()]


def test_fenced_snippets_are_of_kinds_that_run_or_show() -> None:
    assert {kind for page in RUN for kind, _ in page.fenced} == {"python", "toml", "text"}


PYTHON = [page for page in RUN if page.name not in ELSEWHERE_RUN and any(k == "python" for k, _ in page.fenced)]


@pytest.mark.parametrize("page", PYTHON, ids=lambda page: page.name)
def test_the_python_runs(page: Page, workplace: Path) -> None:
    if "signature" in page.text and not shutil.which("ssh-keygen"):
        pytest.skip("this machine has no ssh-keygen")
    raw = io.BytesIO()
    page_image("data").save(raw, "PNG")
    uri = "data:image/png;base64," + base64.b64encode(raw.getvalue()).decode()
    names: dict[str, object] = {}
    for kind, text in page.fenced:
        if kind == "python":
            exec(compile(text.replace("data:image/png;base64,…", uri), page.name, "exec"), names)
    assert names["Reranker"] is Reranker


@pytest.mark.parametrize("text", recipes())
def test_a_recipe_can_be_used(text: str, workplace: Path) -> None:
    recipe = Recipe.read(workplace / "mine.toml")
    check_recipe(recipe, model_config("full"))
    run(["quantize", "m0-fp32", "-o", "mine", "--recipe", "mine.toml"])
    run(["inspect", "mine", "--verify"])
    good, bad = Reranker.load("mine").score([("a red bicycle", "red bicycle"), ("a red bicycle", "x = 1")])
    assert 0 < bad < 1
    assert 0 < good < 1


def test_the_layers_are_those_that_are_checked() -> None:
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["importlinter"]["contracts"]
    (layers,) = (contract["layers"] for contract in contracts if contract.get("containers") == ["m0kit"])
    (page,) = (page for page in RUN if page.name == "docs/architecture.md")
    (told,) = (text for kind, text in page.fenced if kind == "text")
    checked = re.findall(r"\w+", " ".join(layer for layer in layers if layer != "__main__"))
    assert re.findall(r"\w+", told) == checked


def test_targets_and_extras_exist() -> None:
    makefile = (ROOT / "Makefile").read_text("utf-8")
    targets = {line.split()[1] for line in OTHERS if line.startswith("make ") and "=" not in line.split()[1]}
    assert {"demo", "test", "check"} <= targets
    assert not [target for target in targets if not re.search(rf"^{target}:", makefile, re.MULTILINE)]
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["optional-dependencies"]
    written = [extras for page in RUN for extras in re.findall(r"\[([\w,-]+)\]'", page.text)]
    named = {extra for extras in written for extra in extras.split(",")}
    assert {"cpu", "gpu", "export", "optimum", "dev"} <= named <= set(extras)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files_and_headings(page: Page) -> None:
    anchors = {other.name: other.anchors for other in PAGES}
    for link in re.findall(r"\]\((?!https?:)([^)]+)\)", page.text):
        place, _, anchor = link.partition("#")
        path = (ROOT / page.name).parent / place if place else ROOT / page.name
        name = Path(os.path.normpath(path)).relative_to(ROOT).as_posix()
        assert path.exists() or name in GENERATED, f"{page.name}: {link}"
        assert not anchor or anchor in anchors[name], f"{page.name}: {link}"


@pytest.mark.parametrize("page", [p for p in PAGES if p.name.startswith("docs/")], ids=lambda page: page.name)
def test_a_page_can_be_reached_from_the_readme(page: Page) -> None:
    assert f"]({page.name}" in README.text


def test_the_readme_is_short() -> None:
    assert len(README.text.splitlines()) <= 150


@pytest.mark.parametrize("page", RUN, ids=lambda page: page.name)
def test_files_that_a_page_names_exist(page: Page) -> None:
    roots = [ROOT, *(ROOT / name for name in ("runtime", "export", "quant", "parity"))]
    named = re.findall(
        r"`((?:[\w-]+/)+[\w-]+\.(?:py|toml|mjs|md|svg)|(?:runtime|export|quant|parity|tests)/(?:\w+/)*)`", page.text
    )
    assert not [name for name in named if name not in GENERATED and not any((root / name).exists() for root in roots)]


def test_the_page_on_gpus_has_the_numbers_of_the_code() -> None:
    (page,) = (page for page in RUN if page.name == "docs/gpu.md")
    allowed = f"some {gpus.ALLOWANCE / 1e9:g} GB for CUDA"
    needs = f"{NEEDS['fp16'].gpu:g} GB for the published model in\n  fp16, {NEEDS['int4'].gpu:g} in int4"
    decoder = model_config("full").decoder
    page_mb = 2 * decoder.num_layers * PAGE_TOKENS * decoder.kv_size * 2 / 1e6
    pages = (
        f"in pages of {PAGE_TOKENS} tokens: {page_mb:.1f} MB a page",
        f"{-(-790 // PAGE_TOKENS) * page_mb:.0f} MB for",
    )
    limits = tolerances("fp16")
    tolerance = f"{limits['logit'].limit:g} of a logit, {limits['score'].limit:g} of a score"
    for told in (allowed, needs, *pages, tolerance, GPU_VARIABLE, POOL_VARIABLE):
        assert told in page.text


def test_methods_that_the_pages_name_exist() -> None:
    (usage,) = (page for page in RUN if page.name == "docs/usage.md")
    rows = re.findall(r"^\| (`\w+`(?:, `\w+`)*) \| .*$", usage.text, re.MULTILINE)
    methods = [name for row in rows for name in re.findall(r"`(\w+)`", row)]
    assert {"score", "predict", "rank", "rerank", "compute_score", "evaluate", "stream"} <= set(methods)
    assert not [name for name in methods if not callable(getattr(Reranker, name, None))]


def test_the_picture_is_what_m0kit_says(prepared: Path, tmp_path: Path) -> None:
    spec = importlib.util.spec_from_file_location("draw", ROOT / "docs" / "draw.py")
    assert spec is not None
    assert spec.loader is not None
    draw = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(draw)
    draw.main(str(prepared / "ARTIFACT"), str(tmp_path / "demo.svg"))
    drawn = (tmp_path / "demo.svg").read_text("utf-8")
    assert drawn == (ROOT / "docs" / "demo.svg").read_text("utf-8"), "python docs/draw.py ARTIFACT draws it again"
