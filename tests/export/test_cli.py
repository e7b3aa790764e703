"""`m0kit export` and `m0kit quantize`: results, messages and exit codes, as a shell sees them."""

import hashlib
import json
import os
import subprocess
import sys
import tomllib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import onnx
import pytest
from PIL import Image
from tests.export import tiny_model
from tests.export.test_merge import save_adapter
from tests.export.without import TORCH, m0kit_without

from m0kit import Reranker
from m0kit.artifact.manifest import read_manifest, verify_files
from m0kit.cli.commands import main
from m0kit.precision import SCHEMES
from m0kit_export.export import export_artifact, quantize_artifact
from m0kit_quant.recipe import Recipe


@dataclass
class Done:
    code: int
    out: str
    err: str


def m0kit_process(*args: object, **environment: str) -> Done:
    """A process of its own, stderr not a terminal."""
    command = [sys.executable, "-m", "m0kit", *map(str, args)]
    done = subprocess.run(command, capture_output=True, check=False, env={**os.environ, **environment})
    assert b"Traceback" not in done.stderr
    return Done(done.returncode, done.stdout.decode(), done.stderr.decode())


@pytest.fixture
def m0kit(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Callable[..., Done]:
    """Run the command in this process."""

    def run(*args: object) -> Done:
        monkeypatch.setattr(sys, "argv", ["m0kit", *map(str, args)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as done:
            main()
        out, err = capfd.readouterr()
        assert "Traceback" not in err
        return Done(int(done.value.code or 0), out, err)

    return run


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, model: tiny_model.Reranker) -> Path:
    return tiny_model.write_checkpoint(tmp_path_factory.mktemp("cli") / "base", tiny_model.published_tensors(model))


@pytest.fixture(scope="module")
def adapter(base: Path, model: tiny_model.Reranker) -> Path:
    return save_adapter(base.with_name("lora"), model, {"target_modules": ["q_proj", "v_proj"]})


def test_export_writes_an_artifact_and_says_so_without_a_bar_on_a_pipe(tmp_path: Path, tiny: Path) -> None:
    out = tmp_path / "out"
    done = m0kit_process("export", tiny, "-o", out)
    assert (done.code, done.out) == (0, f"{out}: {read_manifest(out).num_bytes / 2**20:.1f} MiB, fp32\n")
    assert "\r" not in done.err
    assert "\x1b" not in done.err
    *phases, licence = done.err.splitlines()
    assert [line.partition(":")[0] for line in phases] == [
        "writing",
        "reading back",
        "computing known answers",
        "hashing",
    ]
    assert licence == "licence of the weights: cc-by-nc-4.0"
    verify_files(out, read_manifest(out))
    (score,) = Reranker.load(out, threads=1).score([("q", "d")])
    assert 0 < score < 1


@pytest.mark.skipif(os.name != "posix", reason="needs a pseudo-terminal")
def test_progress_on_a_terminal_is_a_bar_with_bytes_and_time_left(tmp_path: Path, tiny: Path) -> None:
    import pty
    import termios

    reader, terminal = pty.openpty()
    termios.tcsetwinsize(terminal, (24, 100))
    command = [sys.executable, "-m", "m0kit", "export", str(tiny), "-o", str(tmp_path / "out")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=terminal) as process:
        os.close(terminal)
        shown = b""
        while True:
            try:
                piece = os.read(reader, 4096)
            except OSError:  # the other end is closed
                break
            if not piece:
                break
            shown += piece
        process.communicate()
    os.close(reader)
    assert process.returncode == 0
    assert b"\rwriting:   0%" in shown
    assert b"B/s]" in shown
    assert b"writing: 0." not in shown  # the line for pipes


def test_json_names_artifact_size_fingerprint_and_origin(
    m0kit: Callable[..., Done], tmp_path: Path, base: Path, adapter: Path
) -> None:
    out = tmp_path / "out"
    done = m0kit("export", base, "-o", out, "--adapter", adapter, "--adapter", f"{adapter}:0.25", "--json")
    told = json.loads(done.out)
    manifest = read_manifest(out)
    assert done.code == 0
    assert told == {
        "artifact": str(out),
        "bytes": sum(path.stat().st_size for path in out.iterdir() if path.name != "manifest.json"),
        "scheme": "fp32",
        "fingerprint": manifest.fingerprint,
        "provenance": manifest.provenance,
    }
    assert [(a["name"], a["weight"]) for a in told["provenance"]["adapters"]] == [("lora", 1.0), ("lora", 0.25)]


def test_adapters_and_their_weights_reach_the_result(
    m0kit: Callable[..., Done], tmp_path: Path, base: Path, adapter: Path
) -> None:
    fingerprints = set()
    for number, options in enumerate([[], ["--adapter", adapter], ["--adapter", f"{adapter}:0.5"]]):
        done = m0kit("export", base, "-o", tmp_path / str(number), *options, "--json")
        assert done.code == 0
        fingerprints.add(json.loads(done.out)["fingerprint"])
    assert len(fingerprints) == 3


def test_precision_and_overwrite(m0kit: Callable[..., Done], tmp_path: Path, base: Path) -> None:
    out = tmp_path / "out"
    assert m0kit("export", base, "-o", out).code == 0
    done = m0kit("export", base, "-o", out, "--precision", "fp16")
    assert (done.code, done.out) == (1, "")
    assert done.err == f"error: {out}: exists and is not empty. Choose another folder, or --overwrite.\n"
    done = m0kit("export", base, "-o", out, "--precision", "fp16", "--overwrite")
    assert (done.code, read_manifest(out).scheme) == (0, "fp16")


def test_what_is_left_out_is_said(m0kit: Callable[..., Done], tmp_path: Path, model: tiny_model.Reranker) -> None:
    tensors = tiny_model.published_tensors(model)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    base = tiny_model.write_checkpoint(tmp_path / "base", tensors)
    done = m0kit("export", base, "-o", tmp_path / "out")
    assert "left out, scoring does not use it: lm_head.weight\n" in done.err
    assert "licence of the weights: not stated by the checkpoint\n" in done.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["/nowhere"], "error: there is no folder '/nowhere'"),
        (["BASE", "--revision", "v1"], "error: revision 'v1' was given with 'BASE', which is no hub id"),
        (["BASE", "--adapter", "/nowhere"], "error: there is no adapter folder '/nowhere'"),
        (
            ["BASE", "--adapter", "ADAPTER:nan"],
            "error: adapter 'ADAPTER:nan': 'ADAPTER' is here, but 'nan' is no weight",
        ),
        (["BASE", "--adapter", "x" * 5000], "error: there is no adapter folder"),
        (["BASE", "--adapter", "BASE"], "error: base has no adapter_config.json"),
        (["ADAPTER"], "error: lora has no config.json"),
    ],
)
def test_errors_are_one_line_and_exit_code_1(
    m0kit: Callable[..., Done], tmp_path: Path, base: Path, adapter: Path, arguments: list[str], message: str
) -> None:
    given = [a.replace("BASE", str(base)).replace("ADAPTER", str(adapter)) for a in arguments]
    done = m0kit("export", *given, "-o", tmp_path / "out")
    assert (done.code, done.out) == (1, "")
    assert done.err.startswith(message.replace("BASE", str(base)).replace("ADAPTER", str(adapter)))
    assert done.err.count("\n") == 1
    assert not list(tmp_path.iterdir())


RECIPE = """
precision = "half and half"

[[weights]]
match = "model.layers.*.mlp.*"
scheme = "int8"

[[weights]]
match = "*"
scheme = "fp16"
"""


@pytest.fixture
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("recipe") / "half.toml"
    path.write_text(RECIPE)
    return path


@pytest.fixture
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pairs")
    Image.effect_noise((56, 56), 64).save(folder / "page.png")
    rows = [{"query": "a", "documents": ["b", {"image": "page.png"}]}, {"query": "c", "document": "d"}]
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder / "pairs.jsonl"


@pytest.mark.parametrize("command", ["export", "quantize"])
@pytest.mark.parametrize("precision", SCHEMES)
def test_every_precision_is_written_by_its_default_recipe(
    m0kit: Callable[..., Done], tmp_path: Path, tiny: Path, tiny_artifact: Path, command: str, precision: str
) -> None:
    source = {"export": tiny, "quantize": tiny_artifact}[command]
    done = m0kit(command, source, "-o", tmp_path / "out", "--precision", precision)
    manifest = read_manifest(tmp_path / "out")
    assert (done.code, done.out) == (0, f"{tmp_path / 'out'}: {manifest.num_bytes / 2**20:.1f} MiB, {precision}\n")
    assert done.err.endswith("licence of the weights: cc-by-nc-4.0\n")
    assert Recipe.from_dict(manifest.recipe, "manifest") == Recipe.default(precision)
    verify_files(tmp_path / "out", manifest)


def test_phases_of_a_quantisation_are_lines_on_a_pipe(
    m0kit: Callable[..., Done], tmp_path: Path, tiny_artifact: Path, pairs: Path
) -> None:
    done = m0kit("quantize", tiny_artifact, "-o", tmp_path / "out", "--precision", "int8", "--calibrate", pairs)
    assert done.code == 0
    *phases, licence = done.err.splitlines()
    written = ["writing", "reading back", "computing known answers", "hashing"]
    # First what is run on the pairs: the same in fp32, in the basis of the recipe.
    assert [line.partition(":")[0] for line in phases] == [
        *written,
        "equalizing",
        "looking for outlying columns",
        *written,
    ]
    assert licence.startswith("licence")
    assert "\r" not in done.err


@pytest.mark.parametrize("command", ["export", "quantize"])
def test_a_recipe_file_says_how_each_matrix_is_stored(
    m0kit: Callable[..., Done], tmp_path: Path, tiny: Path, tiny_artifact: Path, recipe: Path, command: str
) -> None:
    source = {"export": tiny, "quantize": tiny_artifact}[command]
    done = m0kit(command, source, "-o", tmp_path / "out", "--recipe", recipe, "--json")
    assert (done.code, json.loads(done.out)["scheme"]) == (0, "half and half")
    manifest = read_manifest(tmp_path / "out")
    assert manifest.schemes == ("fp16", "int8")
    assert Recipe.from_dict(manifest.recipe, "manifest") == Recipe.read(recipe)
    names = {t.name for t in onnx.load(tmp_path / "out" / "decoder.onnx", load_external_data=False).graph.initializer}
    assert {"model.layers.0.mlp.up_proj.weight.int8", "model.layers.0.self_attn.q_proj.weight"} <= names
    assert "model.layers.0.self_attn.q_proj.weight.int8" not in names


def test_the_device_chooses_among_the_default_recipes(m0kit: Callable[..., Done], tmp_path: Path, tiny: Path) -> None:
    for device in ("cpu", "cuda"):
        options = ["--precision", "int4", "--device", device]
        assert m0kit("export", tiny, "-o", tmp_path / device, *options).code == 0
        assert Recipe.from_dict(read_manifest(tmp_path / device).recipe, "m") == Recipe.default("int4", device)
    assert Recipe.default("int4", "cpu") != Recipe.default("int4", "cuda")


def test_what_is_meant_for_a_gpu_runs_on_both(m0kit: Callable[..., Done], tmp_path: Path, tiny: Path) -> None:
    for precision in ("fp16", "int8"):
        done = m0kit("export", tiny, "-o", tmp_path / precision, "--precision", precision, "--device", "cuda")
        assert (done.code, "slowly" in done.err) == (0, False)
        assert "cuda" in read_manifest(tmp_path / precision).runs
        assert 0 < Reranker.load(tmp_path / precision).score([("a query", "a text")])[0] < 1
    done = m0kit("export", tiny, "-o", tmp_path / "fp32", "--device", "cuda")
    assert done.code == 0
    assert "note: fp32 has no graphs for CUDA: it runs there by the portable ones, slowly." in done.err
    assert "cuda" not in read_manifest(tmp_path / "fp32").runs


def test_calibration_reaches_the_weights_and_the_manifest(
    m0kit: Callable[..., Done], tmp_path: Path, tiny: Path, tiny_artifact: Path, pairs: Path
) -> None:
    told = []
    for command, source in (("export", tiny), ("quantize", tiny_artifact)):
        out = tmp_path / command
        done = m0kit(command, source, "-o", out, "--precision", "int8", "--calibrate", pairs, "--json")
        assert done.code == 0
        told.append(json.loads(done.out))
    assert told[0]["fingerprint"] == told[1]["fingerprint"]
    sha256 = hashlib.sha256(pairs.read_bytes()).hexdigest()
    assert told[0]["provenance"]["calibration"] == {"pairs": {"text": 2, "image": 1}, "sha256": sha256}
    done = m0kit("export", tiny, "-o", tmp_path / "plain", "--precision", "int8", "--json")
    assert json.loads(done.out)["fingerprint"] != told[0]["fingerprint"]
    assert {path.name for path in tmp_path.iterdir()} == {"export", "quantize", "plain"}


@pytest.mark.filterwarnings("ignore:.*It is left out")
def test_a_bad_line_of_a_calibration_set_costs_that_line_and_is_said(
    m0kit: Callable[..., Done], tmp_path: Path, tiny_artifact: Path, pairs: Path
) -> None:
    good = pairs.read_text("utf-8")
    spoiled = pairs.with_name("spoiled.jsonl")
    spoiled.write_text('{"query": "q", "passage": "d"}\n\n' + good, "utf-8")
    args = ("quantize", tiny_artifact, "--precision", "int8", "--calibrate")
    done = m0kit(*args, spoiled, "-o", tmp_path / "out")
    assert done.code == 3
    sha256 = hashlib.sha256(spoiled.read_bytes()).hexdigest()
    about = {"pairs": {"text": 2, "image": 1}, "sha256": sha256, "left_out_lines": [1]}
    assert read_manifest(tmp_path / "out").provenance["calibration"] == about
    assert m0kit(*args, pairs, "-o", tmp_path / "whole").code == 0
    weights = [(tmp_path / name / "decoder.onnx.data").read_bytes() for name in ("out", "whole")]
    assert weights[0] == weights[1]


def test_qlora_reaches_the_exporter(m0kit: Callable[..., Done], tmp_path: Path, tiny: Path) -> None:
    fingerprints = set()
    for number, options in enumerate([[], ["--qlora", "single"], ["--qlora", "double"]]):
        done = m0kit("export", tiny, "-o", tmp_path / str(number), *options, "--json")
        assert done.code == 0, done.err
        told = json.loads(done.out)
        fingerprints.add(told["fingerprint"])
        assert ("qlora" in told["provenance"]) == bool(options)
    keep = ["--qlora-keep", "score.2", "--qlora-keep", "score.0"]
    done = m0kit("export", tiny, "-o", tmp_path / "kept", "--qlora", "single", *keep, "--json")
    fingerprints.add(json.loads(done.out)["fingerprint"])
    assert len(fingerprints) == 4


@pytest.mark.parametrize("command", ["export", "quantize"])
@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (["--precision", "int4", "--recipe", "RECIPE"], 2, "--precision int4, but the recipe is of half and half"),
        (["--recipe", "RECIPE", "--device", "cuda"], 2, "--device cuda, but the recipe is for cpu"),
        (["--precision", "int9"], 2, "'int9' is not one of 'fp32', 'fp16', 'bf16', 'int8', 'int4', 'nf4'"),
        (["--precision", "int8", "--device", "tpu"], 2, "'tpu' is not one of 'cpu', 'cuda'"),
        (
            ["--recipe", "/nowhere.toml"],
            1,
            "error: /nowhere.toml: cannot be read (No such file or directory). Give a TOML",
        ),
        (["--recipe", "PAIRS"], 1, "pairs.jsonl: not TOML ("),
        (["--precision", "int8", "--calibrate", "RECIPE"], 1, "half.toml: line 2: the line is not JSON"),
        (["--precision", "int8", "--calibrate", "/nowhere"], 1, "error: /nowhere: No such file or directory."),
    ],
)
def test_what_does_not_go_together_or_is_not_there_is_named(
    m0kit: Callable[..., Done],
    tmp_path: Path,
    tiny: Path,
    tiny_artifact: Path,
    recipe: Path,
    pairs: Path,
    command: str,
    options: list[str],
    code: int,
    message: str,
) -> None:
    given = [option.replace("RECIPE", str(recipe)).replace("PAIRS", str(pairs)) for option in options]
    done = m0kit(command, {"export": tiny, "quantize": tiny_artifact}[command], "-o", tmp_path / "out", *given)
    assert (done.code, done.out) == (code, "")
    assert message in done.err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            'match = "model.layers.*.mpl.*"\nscheme = "int8"',
            "the rule 'model.layers.*.mpl.*' matches no matrix of this",
        ),
        ('match = "score.0.weights"\nscheme = "int8"', "(did you mean score.0.weight"),
        ('match = "*"\nscheme = "int7"', "half.toml: rule 1: scheme 'int7' is not known (did you mean int8"),
        ('match = "*"\nscheme = "int4"\nblock = 128', "has 1176 inputs, which no block of 128 divides"),
    ],
)
def test_a_recipe_that_does_not_fit_is_one_line_with_what_comes_near(
    m0kit: Callable[..., Done], tmp_path: Path, tiny: Path, recipe: Path, line: str, message: str
) -> None:
    recipe.write_text(f"precision = 'own'\n[[weights]]\n{line}\n[[weights]]\nmatch = '*'\nscheme = 'fp32'\n")
    done = m0kit("export", tiny, "-o", tmp_path / "out", "--recipe", recipe)
    assert (done.code, done.out) == (1, "")
    assert message in done.err
    assert done.err.startswith("error: ")
    sentence, _, rules = done.err.partition("\n\n")
    assert "\n" not in sentence.removesuffix("\n")
    tomllib.loads(rules)  # what to put into the file, if anything, can be pasted
    assert not list(tmp_path.iterdir())


def test_quantising_what_cannot_be_quantised_is_one_line(
    m0kit: Callable[..., Done], tmp_path: Path, tiny: Path, in_precision: Callable[[str], Path]
) -> None:
    for source, message in (
        (in_precision("int4"), "weights, which have lost bits already. Quantise the fp32 artifact, or export from"),
        (tiny, "there is no manifest.json, so this is not a finished artifact"),
        (tmp_path / "nowhere", "no such folder"),
    ):
        done = m0kit("quantize", source, "-o", tmp_path / "out", "--precision", "int8")
        assert (done.code, done.out) == (1, "")
        assert message in done.err
        assert done.err.count("\n") == 1
    done = m0kit("quantize", in_precision("fp16"), "-o", in_precision("fp16"), "--precision", "int8", "--overwrite")
    assert (done.code, done.err.partition(":")[0]) == (1, "error")
    assert "is the artifact that is read" in done.err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["base"],
        ["base", "-o", "out", "--precision", "int3"],
        ["base", "-o", "out", "--qlora", "triple"],
        ["base", "-o", "out", "--qlora-keep", "score.2"],
    ],
)
def test_wrong_usage_exits_with_2(m0kit: Callable[..., Done], arguments: list[str]) -> None:
    done = m0kit("export", *arguments)
    assert (done.code, done.out) == (2, "")
    assert "m0kit export [OPTIONS] CHECKPOINT" in done.err
    if "--qlora-keep" in arguments:
        assert "--qlora-keep goes with --qlora." in done.err


@pytest.mark.parametrize("arguments", [[], ["a"], ["a", "-o", "out"], ["a", "-o", "out", "--precision", ""]])
def test_wrong_usage_of_quantize_exits_with_2(m0kit: Callable[..., Done], arguments: list[str]) -> None:
    done = m0kit("quantize", *arguments)
    assert (done.code, done.out) == (2, "")
    assert "m0kit quantize [OPTIONS] ARTIFACT" in done.err
    if arguments[-1:] == ["out"]:
        assert "Give --precision or --recipe." in done.err


def test_the_commands_do_what_the_functions_do(
    m0kit: Callable[..., Done], tmp_path: Path, tiny: Path, tiny_artifact: Path
) -> None:
    int4 = Recipe.default("int4", "cuda")
    export_artifact(tiny, tmp_path / "meant", recipe=int4, progress=False)
    quantize_artifact(tiny_artifact, tmp_path / "meant too", recipe=int4, progress=False)
    for command, source in (("export", tiny), ("quantize", tiny_artifact)):
        options = ["--precision", "int4", "--device", "cuda"]
        assert m0kit(command, source, "-o", tmp_path / command, *options).code == 0
    assert read_manifest(tmp_path / "export") == read_manifest(tmp_path / "meant")
    assert read_manifest(tmp_path / "quantize") == read_manifest(tmp_path / "meant too")


def test_help_loads_neither_torch_nor_peft(m0kit: Callable[..., Done]) -> None:
    assert "PATH[:WEIGHT]" in m0kit("export", "--help").out
    told = m0kit("quantize", "--help").out
    assert "--calibrate" in told
    assert "--adapter" not in told
    code = "import sys, m0kit_export.cli; sys.exit('torch' in sys.modules or 'peft' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_options_come_from_the_environment_too(
    m0kit: Callable[..., Done], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, base: Path
) -> None:
    monkeypatch.setenv("M0KIT_EXPORT_OUTPUT", str(tmp_path / "out"))
    monkeypatch.setenv("M0KIT_EXPORT_PRECISION", "fp16")
    assert m0kit("export", base).code == 0
    assert read_manifest(tmp_path / "out").scheme == "fp16"


def test_without_the_extra_it_says_what_to_install(tmp_path: Path, base: Path) -> None:
    (tmp_path / "hidden").mkdir()
    (tmp_path / "hidden" / "peft.py").write_text("raise ModuleNotFoundError(\"No module named 'peft'\", name='peft')")
    path = os.pathsep.join([str(tmp_path / "hidden"), os.environ.get("PYTHONPATH", "")])
    done = m0kit_process("export", base, "-o", tmp_path / "out", PYTHONPATH=path)
    assert (done.code, done.err) == (1, "error: this command needs peft. pip install 'm0kit[export]'\n")


CHEAP = {
    "no checkpoint": (["export", "{root}/gone", "-o", "{root}/out"], 1, "there is no folder '{root}/gone'"),
    "an empty folder": (["export", "{root}/empty", "-o", "{root}/out"], 1, "empty has no config.json"),
    "no adapter": (["export", "{tiny}", "--adapter", "{root}/gone", "-o", "{root}/out"], 1, "no adapter folder"),
    "no adapter config": (
        ["export", "{tiny}", "--adapter", "{root}/empty", "-o", "{root}/out"],
        1,
        "empty has no adapter_config.json",
    ),
    "output exists": (["export", "{tiny}", "-o", "{tiny}"], 1, "{tiny}: exists and is not empty"),
    "no device": (
        ["export", "{tiny}", "-o", "{root}/out", "--precision", "int8", "--device", "tpu"],
        2,
        "'tpu' is not",
    ),
    "no recipe": (["export", "{tiny}", "-o", "{root}/out", "--recipe", "{root}/gone"], 1, "gone: cannot be read"),
    "no pairs": (["export", "{tiny}", "-o", "{root}/out", "--calibrate", "{root}/gone"], 1, "gone: No such file"),
    "QLoRA": (["export", "{tiny}", "-o", "{root}/out", "--qlora", "single"], 1, "pip install 'm0kit[nf4]'"),
    "no artifact": (["quantize", "{root}/gone", "-o", "{root}/out", "--precision", "int8"], 1, "gone"),
    "output there": (["quantize", "{artifact}", "-o", "{tiny}", "--precision", "int8"], 1, "exists and is not empty"),
    "no precision": (["quantize", "{artifact}", "-o", "{root}/out"], 2, "Give --precision or --recipe"),
    "no pairs there": (
        ["quantize", "{artifact}", "-o", "{root}/out", "--precision", "int8", "--calibrate", "{root}/gone"],
        1,
        "gone: No such file",
    ),
}


@pytest.mark.parametrize("case", CHEAP)
def test_what_is_cheap_to_see_is_said_before_pytorch_is_imported(
    case: str, tmp_path: Path, tiny: Path, tiny_artifact: Path
) -> None:
    args, code, said = CHEAP[case]
    places = {"root": tmp_path, "tiny": tiny, "artifact": tiny_artifact}
    (tmp_path / "empty").mkdir()
    done = m0kit_without(TORCH, *(arg.format(**places) for arg in args))
    assert done.returncode == code, done.stderr
    assert said.format(**places) in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


def test_a_recipe_that_does_not_fit_is_said_before_an_artifact_is_hashed(
    tmp_path: Path, tiny_artifact: Path, monkeypatch: pytest.MonkeyPatch, m0kit: Callable[..., Done]
) -> None:
    monkeypatch.setattr("m0kit_export.sources.verify_files", lambda *_: pytest.fail("hashed"))
    recipe = tmp_path / "mine.toml"
    recipe.write_text('precision = "x"\n[[weights]]\nmatch = "odd.*"\nscheme = "int8"\n')
    done = m0kit("quantize", tiny_artifact, "-o", tmp_path / "out", "--recipe", recipe)
    assert (done.code, "the recipe says nothing about" in done.err) == (1, True)
