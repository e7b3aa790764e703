"""`m0kit doctor` tells people and programs the same, and what cannot run here by its exit code."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from m0kit.artifact.manifest import read_manifest
from m0kit.cli import doctor
from m0kit.errors import ArtifactError, DependencyError
from m0kit.machine.detect import Gpu, Machine
from m0kit.scoring import sessions

GB = 10**9


def machine(**known: Any) -> Machine:
    """A laptop with 16 GB and much free disk, except for what is `known` of it."""
    flags = {"avx2": True, "avx512": False, "vnni": None, "amx": False}
    cpu = ("CPUExecutionProvider",)
    usual = Machine("Linux", "x86_64", "a CPU", flags, 8, 16 * GB, 12 * GB, (), "1.32.0", cpu, 100 * GB)
    return replace(usual, **known)


def test_the_command_tells_people_and_programs_the_same(tiny_artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = machine(memory=None, gpus=(Gpu("T4", None),))
    monkeypatch.setattr(doctor, "detect", lambda _folder: seen)
    text = CliRunner().invoke(doctor.doctor, [str(tiny_artifact)], catch_exceptions=False)
    facts = json.loads(CliRunner().invoke(doctor.doctor, [str(tiny_artifact), "--json"], catch_exceptions=False).stdout)
    assert text.exit_code == 0
    assert "instructions AVX2 yes, AVX-512 no, VNNI unknown, AMX no\n" in text.stdout
    assert "memory       unknown, available 12.0 GB\n" in text.stdout
    assert "gpu          T4 (memory unknown)\n" in text.stdout
    assert f"full model: int8 on the CPU: {facts['advice']['why']}.\n" in text.stdout
    for name, against in facts["advice"]["others"].items():
        assert f"  not {name}: {against['why']}.\n" in text.stdout
    assert [f"note: {note}\n" in text.stdout for note in facts["advice"]["notes"]] == [True, True]
    assert facts["machine"]["features"]["vnni"] is None
    about = facts["artifact"]
    assert (about["scheme"], about["bytes"]) == ("fp32", read_manifest(tiny_artifact).num_bytes)
    assert f"{tiny_artifact}: fp32, " in text.stdout
    assert f": {about['verdict']}\n  {about['why'][0]}\n" in text.stdout


def test_an_artifact_that_cannot_run_here_is_an_exit_code(
    tiny_artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "detect", lambda _folder: machine(memory=10**8))
    done = CliRunner().invoke(doctor.doctor, [str(tiny_artifact)], catch_exceptions=False)
    assert done.exit_code == 1
    assert ": cannot run\n" in done.stdout
    assert CliRunner().invoke(doctor.doctor, []).exit_code == 0
    with pytest.raises(ArtifactError):
        CliRunner().invoke(doctor.doctor, [str(tmp_path)], catch_exceptions=False)


def test_without_onnxruntime_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> Any:
        raise DependencyError("no")

    monkeypatch.setattr(sessions, "onnxruntime", missing)
    done = CliRunner().invoke(doctor.doctor, [])
    assert done.exit_code == 1
    assert "note: onnxruntime is not installed" in done.stdout
