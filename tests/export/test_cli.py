"""`m0kit export`: results, messages and exit codes, as a shell sees them."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from tests.export import _tiny
from tests.export.test_merge import save_adapter

from m0kit import Reranker
from m0kit.artifact import read_manifest, verify_files
from m0kit.cli import main


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
def model() -> _tiny.Reranker:
    return _tiny.make_model()


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, model: _tiny.Reranker) -> Path:
    return _tiny.write_checkpoint(tmp_path_factory.mktemp("cli") / "base", _tiny.published_tensors(model))


@pytest.fixture(scope="module")
def adapter(base: Path, model: _tiny.Reranker) -> Path:
    return save_adapter(base.with_name("lora"), model, {"target_modules": ["q_proj", "v_proj"]})


def test_export_writes_an_artifact_and_says_so_without_a_bar_on_a_pipe(tmp_path: Path, tiny: Path) -> None:
    out = tmp_path / "out"
    done = m0kit_process("export", tiny, "-o", out)
    assert (done.code, done.out) == (0, f"{out}: {read_manifest(out).num_bytes / 2**20:.1f} MiB, fp32\n")
    assert "\r" not in done.err
    assert "\x1b" not in done.err
    *phases, licence = done.err.splitlines()
    assert [line.partition(":")[0] for line in phases] == ["writing", "reading back", "hashing"]
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


def test_scheme_and_overwrite(m0kit: Callable[..., Done], tmp_path: Path, base: Path) -> None:
    out = tmp_path / "out"
    assert m0kit("export", base, "-o", out).code == 0
    done = m0kit("export", base, "-o", out, "--precision", "fp16")
    assert (done.code, done.out) == (1, "")
    assert done.err == f"error: {out}: exists and is not empty. Choose another folder, or --overwrite.\n"
    done = m0kit("export", base, "-o", out, "--precision", "fp16", "--overwrite")
    assert (done.code, read_manifest(out).scheme) == (0, "fp16")


def test_what_is_left_out_is_said(m0kit: Callable[..., Done], tmp_path: Path, model: _tiny.Reranker) -> None:
    tensors = _tiny.published_tensors(model)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    base = _tiny.write_checkpoint(tmp_path / "base", tensors)
    done = m0kit("export", base, "-o", tmp_path / "out")
    assert "left out, scoring does not use it: lm_head.weight\n" in done.err
    assert "licence of the weights: not stated by the checkpoint\n" in done.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["/nowhere"], "error: there is no folder '/nowhere'"),
        (["BASE", "--revision", "v1"], "error: revision 'v1' was given with the folder base"),
        (["BASE", "--adapter", "/nowhere"], "error: there is no adapter folder 'nowhere'"),
        (["BASE", "--adapter", "ADAPTER:nan"], "error: there is no adapter folder 'lora:nan'"),
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
    assert done.err.startswith(message)
    assert done.err.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("arguments", [[], ["base"], ["base", "-o", "out", "--precision", "int3"]])
def test_wrong_usage_exits_with_2(m0kit: Callable[..., Done], arguments: list[str]) -> None:
    done = m0kit("export", *arguments)
    assert (done.code, done.out) == (2, "")
    assert "m0kit export [OPTIONS] CHECKPOINT" in done.err


def test_help_loads_neither_torch_nor_peft(m0kit: Callable[..., Done]) -> None:
    assert "PATH[:WEIGHT]" in m0kit("export", "--help").out
    code = "import sys, m0kit_export.cli; sys.exit('torch' in sys.modules or 'peft' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_options_come_from_the_environment_too(
    m0kit: Callable[..., Done], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, base: Path
) -> None:
    monkeypatch.setenv("M0KIT_EXPORT_OUTPUT", str(tmp_path / "out"))
    monkeypatch.setenv("M0KIT_EXPORT_SCHEME", "fp16")
    assert m0kit("export", base).code == 0
    assert read_manifest(tmp_path / "out").scheme == "fp16"


def test_without_the_extra_it_says_what_to_install(tmp_path: Path, base: Path) -> None:
    (tmp_path / "hidden").mkdir()
    (tmp_path / "hidden" / "peft.py").write_text("raise ModuleNotFoundError(\"No module named 'peft'\", name='peft')")
    path = os.pathsep.join([str(tmp_path / "hidden"), os.environ.get("PYTHONPATH", "")])
    done = m0kit_process("export", base, "-o", tmp_path / "out", PYTHONPATH=path)
    assert (done.code, done.err) == (1, "error: this command needs peft. pip install 'm0kit[export]'\n")
