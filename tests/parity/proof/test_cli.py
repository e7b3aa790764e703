"""The command lines: help, exit codes, error texts, strict JSON, and a report page that needs nothing else."""

import html.parser
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from tests.hub import cached

from m0kit.artifact.manifest import read_manifest, write_manifest
from m0kit.cli.commands import cli
from m0kit.errors import AdapterError, ArtifactNotFoundError, CheckpointError, InputError, M0kitError, OutputError
from m0kit_export.adapter import AdapterSpec
from m0kit_export.checkpoint import open_checkpoint
from m0kit_export.export import export_artifact
from m0kit_export.merge import AdapterStack
from m0kit_parity.proof.cli import parity
from m0kit_parity.proof.golden import Golden
from m0kit_parity.samples.cli import adapter, checkpoint
from m0kit_quant.recipe import Recipe

RECORD = ("--cases", "tiny", "--cases", "image_text")


def invoke(command: Any, *arguments: object, error: type[M0kitError] | None = None, code: int = 0) -> Result:
    done = CliRunner().invoke(command, [str(argument) for argument in arguments])
    if error is not None:
        assert isinstance(done.exception, error), done.output
    else:
        assert done.exit_code == code, (done.output, done.exception)
    return done


def strict_json(text: str) -> Any:
    """JSON as every parser takes it: no NaN, no Infinity."""

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is no JSON")

    return json.loads(text, parse_constant=refuse)


@pytest.fixture(scope="module")
def golden(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cli") / "golden"
    done = invoke(parity, "record", tiny, *RECORD, "-o", folder)
    assert done.stdout == f"{folder}\n"
    assert "recording tiny (1 of 2)" in done.stderr
    return folder


@pytest.fixture(scope="module")
def another_artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An artifact of the same dimensions and other weights."""
    folder = tmp_path_factory.mktemp("other")
    invoke(checkpoint, "tiny", folder / "checkpoint", "--seed", "1")
    export_artifact(folder / "checkpoint", folder / "artifact", progress=False)
    return folder / "artifact"


@pytest.fixture(scope="module")
def wrong_artifact(another_artifact: Path, tiny_artifact: Path) -> Path:
    """An artifact that claims to be of the recorded weights, and is not."""
    folder = another_artifact.with_name("wrong")
    shutil.copytree(another_artifact, folder)
    write_manifest(folder, replace(read_manifest(folder), provenance=read_manifest(tiny_artifact).provenance))
    return folder


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], ["run", "record", "check", "published"]),
        (["--help"], ["run", "record", "check", "published"]),
        (["run", "--help"], ["CHECKPOINT ARTIFACT", "--adapter", "--engine"]),
        (["record", "--help"], ["--adapter", "--heavy", "--layers", "--pairs", "--output"]),
        (["check", "--help"], ["ARTIFACT GOLDEN", "--device", "--html", "--json", "--engine"]),
        (["published", "--help"], ["--inputs"]),
    ],
)
def test_help_names_what_there_is(words: Sequence[str], expected: Sequence[str]) -> None:
    done = CliRunner().invoke(parity, list(words))
    assert done.exit_code == (0 if words else 2)
    assert all(text in done.output for text in expected)


@pytest.mark.parametrize("words", ["parity", "parity run", "parity record", "checkpoint", "adapter", "bench"])
def test_help_is_quick_because_pytorch_is_not_imported_for_it(words: str) -> None:
    name, *rest = words.split()
    script = (
        "import sys\nfor name in ('torch', 'transformers', 'peft', 'onnx', 'safetensors', 'onnxruntime'):\n"
        "    sys.modules[name] = None\n"
        "from m0kit_parity.bench import commands\n"
        "from m0kit_parity.proof import cli\n"
        "from m0kit_parity.samples import cli as samples\n"
        f"command = {{**vars(commands), **vars(samples), **vars(cli)}}[{name!r}]\n"
        f"command.main([*{rest!r}, '--help'], prog_name='m0kit')\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "Usage: m0kit" in done.stdout


def test_every_command_is_registered_with_m0kit() -> None:
    import tomllib

    pyproject = tomllib.loads((Path(__file__).parents[3] / "pyproject.toml").read_text())
    commands = pyproject["project"]["entry-points"]["m0kit.commands"]
    assert (
        commands.items()
        >= {
            "parity": "m0kit_parity.proof.cli:parity",
            "checkpoint": "m0kit_parity.samples.cli:checkpoint",
            "adapter": "m0kit_parity.samples.cli:adapter",
            "bench": "m0kit_parity.bench.commands:bench",
        }.items()
    )
    assert {"parity", "checkpoint", "bench"} <= set(cli.list_commands(None))  # type: ignore[arg-type]


def test_a_check_that_passes_prints_a_table_and_exits_with_nought(golden: Path, tiny_artifact: Path) -> None:
    done = invoke(parity, "check", tiny_artifact, golden)
    stages = ("token_ids", "positions", "patches", "image_embeds", "portable_embeds", "hidden", "logit", "score")
    for stage in (*stages, "ranking"):
        assert stage in done.stdout
    assert "pass" in done.stdout
    assert "opening" in done.stderr
    assert "opening" not in done.stdout


def test_a_check_that_fails_exits_with_one_and_names_what_failed(golden: Path, wrong_artifact: Path) -> None:
    done = invoke(parity, "check", wrong_artifact, golden, code=1)
    assert "fail" in done.stdout
    assert "hidden" in done.stdout


@pytest.mark.parametrize("failing", [False, True])
def test_json_is_strict_and_alone_on_stdout(
    failing: bool, golden: Path, tiny_artifact: Path, wrong_artifact: Path
) -> None:
    artifact = wrong_artifact if failing else tiny_artifact
    done = invoke(parity, "check", artifact, golden, "--json", code=int(failing))
    report = strict_json(done.stdout)
    assert report["verdict"] == ("fail" if failing else "pass")
    assert [case["name"] for case in report["cases"]] == ["tiny", "image_text"]
    assert report["artifact"] == str(artifact)
    assert report["golden"]["command"].startswith("m0kit parity record ")
    assert report["tolerances"]["score"]["limit"] == 1e-4


def test_only_the_cases_asked_for_are_checked(golden: Path, tiny_artifact: Path) -> None:
    done = invoke(parity, "check", tiny_artifact, golden, "--cases", "image_text", "--json")
    assert [case["name"] for case in strict_json(done.stdout)["cases"]] == ["image_text"]


class Page(html.parser.HTMLParser):
    """Every address a page refers to, and every element in it."""

    def __init__(self) -> None:
        super().__init__()
        self.addresses: list[str] = []
        self.tags: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.addresses += [value or "" for name, value in attrs if name in ("href", "src", "data", "action", "poster")]


def test_the_report_page_needs_nothing_from_outside(golden: Path, tiny_artifact: Path, tmp_path: Path) -> None:
    invoke(parity, "check", tiny_artifact, golden, "--html", tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text("utf-8")
    page = Page()
    page.feed(text)
    assert {"html", "table", "svg", "style"} <= page.tags
    assert not page.tags & {"script", "link", "iframe", "object", "embed", "base"}
    assert all(address.startswith("data:image/jpeg;base64,") for address in page.addresses), "only what it holds itself"
    assert len(page.addresses) >= 1
    assert not re.search(r"url\(|@import|javascript:", text)


def test_a_page_that_cannot_be_written_is_an_error(golden: Path, tiny_artifact: Path, tmp_path: Path) -> None:
    arguments = ["check", tiny_artifact, golden, "--html", tmp_path / "no" / "where.html"]
    done = invoke(parity, *arguments, error=OutputError)
    assert "Choose another file" in str(done.exception)


def test_both_halves_in_one_command(tiny: Path, tiny_artifact: Path, tmp_path: Path) -> None:
    """In processes of their own; the recording is kept where asked and checks again."""
    options = ["--cases", "tiny", "-o", tmp_path / "golden", "--json", "--threads", "1"]
    words = ["parity", "run", tiny, tiny_artifact, *options]
    done = subprocess.run(
        [sys.executable, "-m", "m0kit", *map(str, words)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert strict_json(done.stdout)["verdict"] == "pass"
    invoke(parity, "check", tiny_artifact, tmp_path / "golden")


def test_both_halves_look_at_the_artifact_before_minutes_of_pytorch(tiny: Path, tmp_path: Path) -> None:
    done = invoke(parity, "run", tiny, tmp_path / "nowhere", error=M0kitError)
    assert "nowhere" in str(done.exception)
    assert "recording" not in done.stderr


def test_the_command_that_is_kept_makes_the_same_recording_again(tiny: Path, tmp_path: Path) -> None:
    import shlex

    invoke(adapter, tiny, "plain", tmp_path / "my lora")
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text('{"query": "sky", "documents": ["blue", "green"]}\n', "utf-8")
    options = ["--adapter", f"{tmp_path / 'my lora'}:0.5", "--pairs", pairs, "--layers"]
    invoke(parity, "record", tiny, *options, "-o", tmp_path / "g")
    first = Golden.open(tmp_path / "g")
    assert first.provenance["adapters"][0]["weight"] == 0.5
    assert set(first.provenance["adapters"][0]["sha256"]) >= {"adapter_config.json", "adapter_model.safetensors"}
    assert "model.safetensors" in first.provenance["checkpoint"]["fingerprint"]
    before = [pair.trace.score for pair in first.read("pairs").pairs]
    words = shlex.split(first.command)
    assert words[:3] == ["m0kit", "parity", "record"]
    invoke(parity, *words[2:])
    assert [pair.trace.score for pair in Golden.open(tmp_path / "g").read("pairs").pairs] == before
    pairs.write_text("\ufeff" + pairs.read_text("utf-8") + '{"query": "sky"}\n', "utf-8")
    done = invoke(parity, *words[2:], code=3)  # a bad line costs that line
    assert done.stderr.startswith(f'error: {pairs}: line 2: expected "query" with "document" or "documents"')
    assert [pair.trace.score for pair in Golden.open(tmp_path / "g").read("pairs").pairs] == before


@pytest.mark.parametrize(
    ("words", "error", "message"),
    [
        (["record", "TINY", "--cases", "nope", "-o", "OUT"], InputError, "no case is called nope; there are code"),
        (["record", "NOWHERE", "-o", "OUT"], CheckpointError, "nowhere"),
        (["record", "TINY", "--adapter", "NOWHERE", "-o", "OUT"], AdapterError, "there is no adapter folder"),
        (["check", "ARTIFACT", "NOWHERE"], InputError, "make one with: m0kit parity record"),
        (["check", "NOWHERE", "GOLDEN"], M0kitError, "nowhere"),
        (["check", "ARTIFACT", "GOLDEN", "--cases", "code"], InputError, "no case 'code'; it holds tiny, image_text"),
        (["check", "ARTIFACT", "GOLDEN", "--layers"], InputError, "--layers"),
        (["check", "ARTIFACT", "GOLDEN", "--device", "abacus"], M0kitError, "abacus"),
        (["published", "ARTIFACT", "--inputs", "EMPTY"], InputError, "exactly one file each is needed"),
    ],
)
def test_what_cannot_be_done_is_said_in_one_sentence(
    words: list[str], error: type[M0kitError], message: str, tiny: Path, tiny_artifact: Path, golden: Path,
    tmp_path: Path,
) -> None:  # fmt: skip
    (tmp_path / "empty").mkdir()
    places = {
        "TINY": tiny,
        "ARTIFACT": tiny_artifact,
        "GOLDEN": golden,
        "NOWHERE": tmp_path / "nowhere",
        "EMPTY": tmp_path / "empty",
        "OUT": tmp_path / "out",
    }
    done = invoke(parity, *(places.get(word, word) for word in words), error=error)
    assert message in str(done.exception)
    assert not (tmp_path / "out").exists()


def test_an_artifact_of_other_weights_is_told_from_one_that_computes_wrongly(
    golden: Path, another_artifact: Path
) -> None:
    done = invoke(parity, "check", another_artifact, golden, error=InputError)
    assert "was exported from other weights" in str(done.exception)
    assert "m0kit parity record" in str(done.exception)
    assert "opening" not in done.stderr


def test_an_artifact_with_an_adapter_asks_for_the_adapter_before_anything_is_computed(
    tiny: Path, golden: Path, tmp_path: Path
) -> None:
    for name, seed in (("code", 0), ("other", 1)):
        invoke(adapter, tiny, "plain", tmp_path / name, "--seed", seed)
    export_artifact(tiny, tmp_path / "a", adapters=[AdapterSpec(tmp_path / "code")], progress=False)
    done = invoke(parity, "check", tmp_path / "a", golden, error=InputError)
    assert "holds the adapter code, and PyTorch's side has no adapter. Give --adapter" in str(done.exception)
    assert "opening" not in done.stderr
    done = invoke(parity, "run", tiny, tmp_path / "a", error=InputError)
    assert "holds the adapter code, and PyTorch's side has no adapter. Give --adapter" in str(done.exception)
    for given, said in (
        (tmp_path / "other", "PyTorch's side has the adapter other"),
        (f"{tmp_path}/code:0.5", "× 0.5"),
    ):
        words = ["parity", "run", tiny, tmp_path / "a", "--adapter", given, "--cases", "tiny"]
        whole = subprocess.run(
            [sys.executable, "-m", "m0kit", *map(str, words)], capture_output=True, text=True, check=False
        )
        assert (whole.returncode, whole.stdout) == (1, "")
        assert said in whole.stderr
        assert "loading" not in whole.stderr
        assert "Traceback" not in whole.stderr


@pytest.mark.parametrize(
    "words", ["record x", "check", "check a b --engine abacus", "run a", "run a b --nope", "a", "a b", "--nope"]
)
def test_wrong_usage_exits_with_two(words: str) -> None:
    invoke(parity, *words.split(), code=2)


def test_where_a_checkpoint_stands_in_a_commands_place_the_command_is_named() -> None:
    done = invoke(parity, "my-checkpoint", "m0-fp32", code=2)
    assert "No such command 'my-checkpoint'" in done.stderr
    assert "`parity run CHECKPOINT ARTIFACT`" in done.stderr


def test_a_recording_of_another_model_is_refused_with_the_command_that_made_it(golden: Path, tmp_path: Path) -> None:
    from m0kit_parity.small.files import SMALL

    export_artifact(SMALL / "base", tmp_path / "a", progress=False)
    done = invoke(parity, "check", tmp_path / "a", golden, error=InputError)
    assert "recorded from another model" in str(done.exception)
    assert "m0kit parity record" in str(done.exception)


# One process for all: what one of them imports stays, and the first that imports too much is named.
CHEAP = """
import io, json, os, sys, contextlib
from m0kit.cli.commands import main
for words, wanted in json.load(sys.stdin):
    sys.argv = ["m0kit", *words]
    err = io.StringIO()
    with contextlib.redirect_stderr(err), contextlib.redirect_stdout(io.StringIO()):
        try:
            main()
        except SystemExit as done:
            code = done.code
    assert code == (2 if "Error: " in err.getvalue() else 1 if "error: " in err.getvalue() else 0), (words, code)
    assert wanted in err.getvalue(), (words, err.getvalue())
    heavy = {"torch", "transformers", "peft", "accelerate", "onnx", "onnxruntime", "openvino"} & set(sys.modules)
    assert not heavy, (words, heavy)
"""


def test_what_cannot_work_is_told_before_anything_heavy_is_imported(
    tiny: Path, tiny_artifact: Path, golden: Path, tmp_path: Path
) -> None:
    places = {
        "CKPT": tiny, "ART": tiny_artifact, "GOLD": golden, "NONE": tmp_path / "nowhere", "OUT": tmp_path / "out",
        "HERE": tmp_path / "here", "FILE": tmp_path / "file", "PAGE": tmp_path / "no" / "where.svg",
        "INT8": tmp_path / "a",
    }  # fmt: skip
    export_artifact(tiny, places["INT8"], recipe=Recipe.default("int8"), progress=False)
    places["HERE"].mkdir()
    (places["HERE"] / "something").touch()
    places["FILE"].touch()
    table = """
        parity record NONE -o OUT                        | there is no folder
        parity record FILE -o OUT                        | is a file
        parity record CKPT -o HERE                       | not a golden folder
        parity record CKPT -o OUT --adapter NONE         | no adapter folder
        parity record CKPT -o OUT --adapter NONE:0.5     | no adapter folder
        parity record CKPT -o OUT --cases nope           | no case is called nope
        parity record CKPT -o OUT --pairs NONE           | does not exist
        parity run NONE ART                                  | there is no folder
        parity run CKPT NONE                                 | no such folder
        parity run CKPT ART -o HERE                          | not a golden folder
        parity run CKPT ART --html PAGE                      | there is no folder
        parity run CKPT ART --adapter NONE                   | no adapter folder
        parity run CKPT ART --adapter HERE                   | here has no adapter_config.json
        parity run CKPT INT8 --engine openvino               | MatMulIntegerToFloat
        parity check NONE GOLD                           | no such folder
        parity check ART NONE                            | no golden folder
        parity check ART GOLD --cases nope               | no case 'nope'
        parity check ART GOLD --layers                   | no hidden states per layer
        parity check ART GOLD --html PAGE                | there is no folder
        parity check ART GOLD --html HERE                | is a directory
        parity check INT8 GOLD --engine onnx             | MatMulIntegerToFloat
        parity published ART --inputs HERE               | exactly one file each
        checkpoint tiny HERE                             | exists
        checkpoint full FILE                             | exists
        checkpoint tiny OUT --outliers 99999             | not in the range
        adapter NONE plain OUT                           | there is no folder
        adapter CKPT plain HERE                          | exists
        adapter CKPT nope OUT                            | is not one of
        bench pairs --peer nope                          | is not one of
        bench growth NONE                                | no such folder
        bench growth ART --plot PAGE                     | there is no folder
        bench memory NONE                                | no such folder
        bench memory ART --plot PAGE                     | there is no folder
        bench ranking NONE                               | no such folder
        bench reuse NONE                                 | no such folder
        bench reuse ART --plot PAGE                      | there is no folder
        bench reuse ART --tmp NONE                       | does not exist
        evaluate NONE                                    | no such folder
        evaluate ART NONE                                | no such folder
        evaluate ART --html PAGE                         | there is no folder
        evaluate ART --pairs NONE                        | No such file
        rerank NONE --query q FILE                       | no such folder
        rerank ART --query q                             | Give documents
        rerank ART --query q --index NONE FILE           | no such folder
        rerank ART --query q --max-pixels 100 FILE       | --max-pixels
        score NONE FILE                                  | no such folder
        score ART NONE                                   | does not exist
        score ART FILE --workers 2                       | need -o
        score ART FILE -o PAGE                           | must end with
        doctor NONE                                      | no such folder
        inspect NONE                                     | no such folder
        index stats NONE                                 | no such folder
        index add NONE OUT FILE                          | no such folder
        --help                                           |
        parity --help                                    |
        parity run --help                                |
        parity record --help                             |
        bench pairs --help                               |
        bench reuse --help                               |
        evaluate --help                                  |
        checkpoint --help                                |
        adapter --help                                   |
        doctor --help                                    |
    """
    rows = [line.rpartition("|") for line in table.strip().splitlines()]
    lines = [([str(places.get(word, word)) if ":" not in word else f"{tmp_path}/nowhere:0.5" for word in words.split()],
              wanted.strip()) for words, _, wanted in rows]  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", CHEAP], input=json.dumps(lines), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert not places["OUT"].exists()


# --- checkpoint and adapter ------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", ["tiny", "small"])
def test_a_checkpoint_is_written_and_opens(shape: str, tmp_path: Path) -> None:
    done = invoke(checkpoint, shape, tmp_path / "c")
    assert done.stdout == f"{tmp_path / 'c'}\n"
    assert open_checkpoint(tmp_path / "c").config.decoder.num_layers > 1
    done = invoke(checkpoint, shape, tmp_path / "c", error=OutputError)
    assert "exists" in str(done.exception)


@pytest.mark.parametrize("options", [["small"], ["tiny"], ["tiny", "--outliers", "8"]])
def test_a_link_means_the_folder_it_leads_to(options: list[str], tmp_path: Path) -> None:
    (tmp_path / "c").symlink_to(Path("disk") / "checkpoint")
    invoke(checkpoint, options[0], tmp_path / "c", *options[1:])
    assert (tmp_path / "c").is_symlink()
    assert open_checkpoint(tmp_path / "disk" / "checkpoint").config.decoder.num_layers > 1
    assert [path.name for path in (tmp_path / "disk").iterdir()] == ["checkpoint"]


def test_the_seed_of_a_checkpoint_is_an_option(tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 1)):
        invoke(checkpoint, "tiny", tmp_path / name, "--seed", seed)
    a, b = ((tmp_path / name / "model.safetensors").read_bytes() for name in "ab")
    assert a != b


@pytest.mark.parametrize("names", [[], ["--old-names"]])
def test_an_adapter_is_written_and_fits(names: list[str], tiny: Path, tmp_path: Path) -> None:
    done = invoke(adapter, tiny, "dora", tmp_path / "a", *names)
    assert done.stdout == f"{tmp_path / 'a'}\n"
    AdapterStack.open([AdapterSpec(tmp_path / "a")], open_checkpoint(tiny))


def test_an_unknown_shape_or_form_exits_with_two_and_lists_the_known_ones(tiny: Path, tmp_path: Path) -> None:
    assert "'tiny', 'wide', 'full'" in invoke(checkpoint, "huge", tmp_path / "c", code=2).stderr
    assert "'plain', 'rslora', 'dora'" in invoke(adapter, tiny, "lokr", tmp_path / "a", code=2).stderr


# --- what lies in a hub's cache --------------------------------------------------------------------------


@pytest.fixture
def hub(tiny: Path, tiny_artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache with org/checkpoint and org/artifact, offline; the working folder is empty."""
    from huggingface_hub import constants

    cached(tiny, tmp_path / "home", "org/checkpoint", "v2")
    cached(tiny_artifact, tmp_path / "home", "org/artifact")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "home" / "hub"))
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")


@pytest.mark.usefixtures("hub")
def test_checkpoints_and_artifacts_are_hub_ids_too(golden: Path) -> None:
    invoke(parity, "record", "org/checkpoint", "--revision", "v2", "--cases", "tiny", "-o", "g")
    recorded = json.loads(Path("g/manifest.json").read_text())
    assert recorded["command"] == "m0kit parity record org/checkpoint --revision v2 --cases tiny -o g"
    assert recorded["provenance"]["checkpoint"]["source"] == "org/checkpoint"
    invoke(parity, "check", "org/artifact", "g", "--revision", "main")
    invoke(parity, "check", "org/artifact", golden, "--engine", "onnx", "--cases", "tiny")
    invoke(adapter, "org/checkpoint@v2", "plain", "a")
    invoke(adapter, "org/checkpoint", "plain", "b", "--revision", "v2")
    assert Path("a/adapter_model.safetensors").read_bytes() == Path("b/adapter_model.safetensors").read_bytes()
    invoke(cli, "export", "org/checkpoint", "--revision", "v2", "-o", "x")
    invoke(cli, "quantize", "org/artifact", "-o", "y", "--precision", "fp16")
    invoke(cli, "bench", "ranking", "org/nothing", error=ArtifactNotFoundError)
    done = invoke(parity, "record", "org/checkpoint", "-o", "z", error=CheckpointError)
    assert "checkpoint 'org/checkpoint': HF_HUB_OFFLINE is set" in str(done.exception)


@pytest.mark.usefixtures("hub")
def test_both_halves_take_a_checkpoint_and_an_artifact_from_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch runs in a process of its own, which reads the cache's place from the environment."""
    from huggingface_hub import constants

    monkeypatch.setenv("HF_HUB_CACHE", constants.HF_HUB_CACHE)
    invoke(parity, "run", "org/checkpoint", "org/artifact@main", "--revision", "v2", "--cases", "tiny")


@pytest.mark.usefixtures("hub")
def test_artifacts_of_an_evaluation_have_a_revision_each(tmp_path: Path) -> None:
    Path("pairs.jsonl").write_text(json.dumps({"query": "q", "documents": ["a", "b"], "relevance": [1, 0]}) + "\n")
    artifacts = ("org/artifact", "org/artifact@main")
    done = invoke(cli, "evaluate", *artifacts, "--pairs", "pairs.jsonl", "--no-speed", "--json")
    assert len(strict_json(done.stdout)["artifacts"]) == 2
