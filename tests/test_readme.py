"""Every snippet of the README does what it says, on the small checkpoint; what it names exists.

Commands are read from the README itself, run in a folder that holds files of the names it uses, and must succeed. What
takes hardware or minutes is held against the options of its command instead, and says why in a table here; a snippet
that is new is run, or fails.
"""

import base64
import glob
import io
import json
import re
import shlex
import shutil
import tomllib
from contextlib import chdir
from pathlib import Path

import click
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from PIL import Image, ImageDraw

from m0kit import Reranker
from m0kit.cli.commands import cli
from m0kit_export.adapter import AdapterSpec
from m0kit_export.export import export_artifact, quantize_artifact
from m0kit_export.graphs import check_recipe
from m0kit_parity.samples.checkpoints import model_config
from m0kit_parity.small.files import SMALL
from m0kit_quant.recipe import Recipe

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text("utf-8")
FENCED = re.findall(r"^```(\w*)\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)
_UNFENCED = re.sub(r"^```.*?^```$", "", README, flags=re.DOTALL | re.MULTILINE)
# Indented blocks, and code in a line, which a line's end may break; a comment behind a command is not part of it.
INDENTED = [" ".join(line.partition("  #")[0].split()) for line in re.findall(r"^    (\S.*)$", _UNFENCED, re.MULTILINE)]
INLINE = [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", _UNFENCED)]
COMMANDS = sorted({line for line in [*INDENTED, *INLINE] if line.startswith("m0kit ")})
OTHERS = sorted(
    {line for line in INDENTED if not line.startswith("m0kit ")}
    | {line for line in INLINE if line.startswith(("pip ", "python ", "make ", "optimum-cli "))}
)

# Beginnings of commands of which only the options are looked at, and why.
PARSED = {
    "m0kit bench": "minutes of measuring, or a full checkpoint; test_bench.py and test_reuse.py run small ones",
    "m0kit checkpoint full": "4.4 GB",
    "m0kit checkpoint small|tiny|wide|full": "the four are not one command; tests/parity/test_cli.py runs them",
    "m0kit export full/": "a full checkpoint",
    "m0kit evaluate ARTIFACT --kv": "170 queries, several times; tests/parity/test_evaluate.py runs smaller ones",
    "m0kit evaluate fp32/": "170 queries of six artifacts; likewise",
    "m0kit parity published": "needs the inputs of the model card; tests/parity/test_cli.py makes some",
}
# What keeps a command to seconds: timing and most built-in cases are left to tests of their own.
SHORTENED = {
    "m0kit evaluate": ["--no-speed"],
    "m0kit parity record": ["--cases", "text_text", "--cases", "image_text"],
    "m0kit parity check": [],
    "m0kit parity run": ["--cases", "text_text", "--cases", "image_text"],
}
# Lines of other programs: what stands for them in the tests.
ELSEWHERE = {
    "make ": "targets are looked up below",
    "pip install ": "extras are looked up below; tests/installed installs [cpu]",
    "optimum-cli export m0": "tests/export/test_optimum.py runs it",
    "python -m m0kit_parity.small.train": "an hour; tests/parity/test_small.py trains for seconds",
}


def page(text: str) -> Image.Image:
    image = Image.new("RGB", (200, 120), "white")
    ImageDraw.Draw(image).text((10, 40), text, "black")
    return image


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with all that the README's commands name."""
    folder = tmp_path_factory.mktemp("readme")
    (folder / "jinaai").mkdir()
    for name in ("CHECKPOINT", "jinaai/jina-reranker-m0"):
        (folder / name).symlink_to(SMALL / "base")
    for name in ("my-lora", "a", "b"):
        (folder / name).symlink_to(SMALL / "adapters" / "code")
    code = AdapterSpec(SMALL / "adapters" / "code")
    export_artifact(SMALL / "base", folder / "m0-fp32", adapters=[code], progress=False)
    export_artifact(SMALL / "base", folder / "ARTIFACT", progress=False)
    for precision in ("int8", "int4"):
        output, recipe = folder / f"m0-{precision}", Recipe.default(precision)
        quantize_artifact(folder / "m0-fp32", output, recipe=recipe, progress=False)
    for name in ("pages", "manuals"):
        (folder / name).mkdir()
    for name in ("paper.png", "page.png", "page2.jpg", "pages/1.png", "pages/2.png"):
        page(name).save(folder / name)
    for name in ("notes.txt", "manuals/a.txt", "manuals/b.txt"):
        (folder / name).write_text(f"{name}: a small language model writes markdown", "utf-8")
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
    with chdir(folder):
        run(["index", "add", "m0-int8", "library", "pages/1.png", "chunks.jsonl"])
        run(["parity", "record", "CHECKPOINT", "-o", "golden", "--cases", "text_text"])
    return folder


@pytest.fixture
def workplace(prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The same in links, so that no command changes what the next one reads; an index is a copy."""
    for path in prepared.iterdir():
        (tmp_path / path.name).symlink_to(path.resolve())
    (tmp_path / "library").unlink()
    shutil.copytree(prepared / "library", tmp_path / "library")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(words: list[str]) -> None:
    done = CliRunner().invoke(cli, words)
    assert done.exit_code == 0, f"m0kit {shlex.join(words)}: {done.output}{done.exception!r}"


def row_of(table: dict[str, object], line: str) -> str | None:
    """The longest beginning of the line that the table has."""
    return max((start for start in table if line.startswith(start)), key=len, default=None)


def command_of(words: list[str]) -> tuple[click.Command, list[str]]:
    """The command that the words name, and the words behind its name."""
    command: click.Command = cli
    context = click.Context(cli, info_name="m0kit")
    while isinstance(command, click.Group) and words:
        found = command.get_command(context, words[0].split("|")[0])
        assert found is not None, f"no command {words[0]}"
        words = words[1:]
        context = click.Context(found, parent=context, info_name=found.name)
        command = found
    return command, words


def test_the_readme_has_commands() -> None:
    assert len(COMMANDS) >= 10


@pytest.mark.parametrize("line", COMMANDS)
def test_a_command_and_its_options_exist(line: str) -> None:
    command, words = command_of(shlex.split(line)[1:])
    known = {option for parameter in command.params for option in parameter.opts}
    unknown = [word for word in words if word.startswith("-") and word not in known]
    assert not unknown, f"{line}: {unknown}, known are {sorted(known)}"


def words_of(line: str) -> list[str]:
    """What follows "m0kit", with one of the forms where any will do."""
    return ["rslora" if word == "FORM" else word for word in shlex.split(line)[1:]]


def is_mention(line: str) -> bool:
    """A command's name, perhaps with options, as a sentence speaks of it: what it must be given is left out."""
    command, words = command_of(words_of(line))
    if line in INDENTED or isinstance(command, click.Group):
        return line not in INDENTED
    try:
        command.make_context("m0kit", words)
    except click.MissingParameter:
        return True
    except click.ClickException:
        return all(word.startswith("-") for word in words)
    return False


@pytest.mark.parametrize("line", [line for line in COMMANDS if not is_mention(line) and row_of(PARSED, line) is None])
def test_a_command_runs(line: str, workplace: Path) -> None:
    words = words_of(line)
    if "-o" in words:  # written anew, not into what is there for the others
        output = Path(words[words.index("-o") + 1].rstrip("/"))
        if output.is_symlink():
            output.unlink()
    # The shell's part.
    words = [name for word in words for name in (sorted(glob.glob(word)) if "*" in word else [word])]
    shortened = row_of(SHORTENED, line)
    run([*words, *(SHORTENED[shortened] if shortened else [])])


@pytest.mark.parametrize("line", OTHERS)
def test_a_line_of_another_program_is_known(line: str) -> None:
    assert row_of(ELSEWHERE, line), f"{line}: say in this file's tables what stands for it"


def test_the_tables_name_only_what_is_there() -> None:
    assert not [start for start in PARSED if not any(line.startswith(start) for line in COMMANDS)]
    assert not [start for start in ELSEWHERE if not any(line.startswith(start) for line in OTHERS)]


def test_fenced_snippets_are_of_kinds_that_run() -> None:
    assert {kind for kind, _ in FENCED} <= {"python", "toml"}


def test_the_python_runs(workplace: Path) -> None:
    raw = io.BytesIO()
    page("data").save(raw, "PNG")
    uri = "data:image/png;base64," + base64.b64encode(raw.getvalue()).decode()
    names: dict[str, object] = {}
    for kind, text in FENCED:
        if kind == "python":
            exec(compile(text.replace("data:image/png;base64,…", uri), "README.md", "exec"), names)
    assert isinstance(names["reranker"], Reranker)


@pytest.mark.parametrize("text", [text for kind, text in FENCED if kind == "toml"])
def test_a_recipe_can_be_used(text: str, workplace: Path) -> None:
    (workplace / "mine.toml").write_text(text, "utf-8")
    run(["quantize", "m0-fp32", "-o", "mine", "--recipe", "mine.toml"])
    run(["inspect", "mine", "--verify"])


def test_targets_and_extras_exist() -> None:
    makefile = (ROOT / "Makefile").read_text("utf-8")
    for target in re.findall(r"^    make ([\w-]+)", README, re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["optional-dependencies"]
    named = set(re.findall(r"\[(\w+)\]'", README))
    assert {"cpu", "gpu", "export", "optimum", "dev"} <= named <= set(extras)


def test_links_lead_to_files() -> None:
    links = re.findall(r"\]\((?!http)([^)#]+)\)", README)
    assert links
    assert not [link for link in links if not (ROOT / link).is_file()]


def test_methods_that_it_names_exist() -> None:
    example = "\n".join(text for kind, text in FENCED if kind == "python")
    used = set(re.findall(r"(?:Reranker|reranker)\.(\w+)\(", example))
    assert {"load", "score", "rerank"} <= used
    for name in [*used, "predict", "rank", "compute_score", "evaluate"]:
        assert callable(getattr(Reranker, name))
        assert f"`{name}`" in README or name in used


def test_the_recipe_stores_the_small_checkpoint_and_fits_the_published_model(tmp_path: Path) -> None:
    (text,) = re.findall(r"```toml\n(.*?)```", README, re.DOTALL)
    (tmp_path / "mine.toml").write_text(text, "utf-8")
    recipe = Recipe.read(tmp_path / "mine.toml")
    check_recipe(recipe, model_config("full"))
    export_artifact(SMALL / "base", tmp_path / "mine", recipe=recipe, progress=False)
    good, bad = Reranker.load(tmp_path / "mine").score([("a red bicycle", "red bicycle"), ("a red bicycle", "x = 1")])
    assert 0 < bad < 1
    assert 0 < good < 1
