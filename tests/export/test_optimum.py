"""`optimum-cli export m0`, found by optimum itself and run as its users type it."""

import sys
import tomllib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from tests.export import tiny_model
from tests.export.test_merge import save_adapter

from m0kit.artifact.manifest import read_manifest
from m0kit.precision import SCHEMES
from m0kit_export import export
from m0kit_export.adapter import AdapterSpec
from m0kit_export.export import export_artifact
from m0kit_quant.recipe import Recipe

ROOT = Path(__file__).parents[2]


@dataclass
class Done:
    code: int
    out: str
    err: str


@pytest.fixture
def optimum_cli(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Callable[..., Done]:
    # Not "optimum": our own namespace folder makes that importable everywhere.
    optimum = pytest.importorskip("optimum.commands.optimum_cli", reason="optimum is not installed (m0kit[optimum])")

    def run(*args: object) -> Done:
        monkeypatch.setattr(sys, "argv", ["optimum-cli", *map(str, args)])
        capfd.readouterr()
        code: Any = 0
        try:
            optimum.main()
        except SystemExit as done:
            code = done.code
        out, err = capfd.readouterr()
        assert "Traceback" not in err
        return Done(int(code or 0), out, err)

    return run


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model.write_checkpoint(tmp_path_factory.mktemp("optimum") / "base")


def test_the_folder_stays_a_namespace_that_the_wheel_carries() -> None:
    assert [p.name for p in (ROOT / "export/optimum").rglob("*.py")] == ["m0.py"]
    with open(ROOT / "pyproject.toml", "rb") as file:
        targets = tomllib.load(file)["tool"]["hatch"]["build"]["targets"]
    assert "export/optimum" in targets["wheel"]["packages"]


def test_optimum_lists_the_command(optimum_cli: Callable[..., Done]) -> None:
    assert "jina-reranker-m0" in optimum_cli("export", "--help").out
    told = optimum_cli("export", "m0", "--help").out
    for option in (
        "-m MODEL",
        "--dtype {fp32,fp16,bf16,int8,int4,nf4}",
        "PATH[:WEIGHT]",
        "--revision",
        "--cache_dir",
        "--overwrite",
    ):
        assert option in told


def test_its_precisions_are_those_there_are(optimum_cli: Callable[..., Done]) -> None:
    """It spells them out, so that `optimum-cli` starts without importing m0kit."""
    assert f"--dtype {{{','.join(SCHEMES)}}}" in optimum_cli("export", "m0", "--help").out


@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_it_writes_what_the_exporter_writes(
    optimum_cli: Callable[..., Done], tmp_path: Path, base: Path, precision: str
) -> None:
    paths = [
        save_adapter(tmp_path / f"lora{seed}", tiny_model.make_model(), {"target_modules": ["q_proj"]}, seed)
        for seed in (1, 2)
    ]
    options = ["--dtype", precision, "--adapter", paths[0], "--adapter", f"{paths[1]}:0.5"]
    done = optimum_cli("export", "m0", "-m", base, *options, tmp_path / "theirs")
    assert done.code == 0
    assert (
        done.out
        == f"{tmp_path / 'theirs'}: {read_manifest(tmp_path / 'theirs').num_bytes / 2**20:.1f} MiB, {precision}\n"
    )
    assert "licence of the weights: not stated by the checkpoint\n" in done.err
    assert "\r" not in done.err
    specs = [AdapterSpec(paths[0]), AdapterSpec(paths[1], 0.5)]
    export_artifact(str(base), tmp_path / "ours", adapters=specs, recipe=Recipe.default(precision), progress=False)
    assert read_manifest(tmp_path / "theirs") == read_manifest(tmp_path / "ours")


def test_every_option_reaches_the_exporter(
    optimum_cli: Callable[..., Done], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked: dict[str, Any] = {}

    def exported(source: str, output: Path, **options: Any) -> None:
        asked.update(options, source=source, output=output)
        raise KeyboardInterrupt

    monkeypatch.setattr(export, "export_artifact", exported)
    done = optimum_cli(
        "export", "m0", "--model", "a/b", "--revision", "v1", "--cache_dir", tmp_path, "--overwrite", "out"
    )
    assert (done.code, done.err) == (130, "interrupted\n")
    assert asked == {
        "source": "a/b",
        "output": Path("out"),
        "adapters": [],
        "recipe": Recipe.default("fp32"),
        "revision": "v1",
        "cache_dir": tmp_path,
        "overwrite": True,
    }


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["-m", "/nowhere"], "error: there is no folder '/nowhere'"),
        (["-m", "BASE", "--adapter", "/nowhere:0.5"], "error: there is no adapter folder '/nowhere:0.5'"),
        (["-m", "BASE", "--adapter", ""], "error: an adapter is given as PATH or PATH:WEIGHT"),
    ],
)
def test_errors_are_one_line_and_exit_code_1(
    optimum_cli: Callable[..., Done], tmp_path: Path, base: Path, options: list[str], message: str
) -> None:
    given = [option.replace("BASE", str(base)) for option in options]
    done = optimum_cli("export", "m0", *given, tmp_path / "out")
    assert (done.code, done.out) == (1, "")
    assert done.err.startswith(message)
    assert done.err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_what_nobody_expected_is_one_line_too(
    optimum_cli: Callable[..., Done], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise KeyError("weights")

    monkeypatch.setattr(export, "export_artifact", broken)
    done = optimum_cli("export", "m0", "-m", "a/b", tmp_path / "out")
    assert (done.code, done.out, done.err.count("\n")) == (1, "", 1)
    assert done.err.startswith("error: unexpected KeyError: 'weights'")


def test_wrong_usage_exits_with_2(optimum_cli: Callable[..., Done]) -> None:
    done = optimum_cli("export", "m0", "out")
    assert done.code == 2
    assert "-m/--model" in done.err
