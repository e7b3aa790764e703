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
from m0kit.machine.detect import Machine
from m0kit.scoring import sessions
from m0kit.scoring.gpus import Gpu

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
    assert "gpu          cuda:0 T4 (memory unknown)\ncuda         not in this onnxruntime\n" in text.stdout
    assert f"full model: int8 on the CPU: {facts['advice']['why']}.\n" in text.stdout
    for name, against in facts["advice"]["others"].items():
        assert f"  not {name}: {against['why']}.\n" in text.stdout
    assert [f"note: {note}\n" in text.stdout for note in facts["advice"]["notes"]] == [True, True]
    assert facts["machine"]["features"]["vnni"] is None
    about = facts["artifact"]
    assert (about["scheme"], about["bytes"]) == ("fp32", read_manifest(tiny_artifact).num_bytes)
    assert f"{tiny_artifact}: fp32, " in text.stdout
    assert f": {about['verdict']}\n  {about['why'][0]}\n" in text.stdout


def test_gpus_are_told_with_what_fits_on_them(tiny_artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = (Gpu("H100", 80 * GB, 79 * GB, (9, 0), "580.65.06"), Gpu("T4", 16 * GB, 10**6, (7, 5), "580.65.06"))
    providers = ("CUDAExecutionProvider", "CPUExecutionProvider")
    monkeypatch.setattr(doctor, "detect", lambda _folder: machine(gpus=seen, providers=providers))
    asked: list[str] = []

    def tried_on(_folder: Path, device: str) -> doctor.Tried:
        asked.append(device)
        return doctor.Tried(device, ())

    monkeypatch.setattr(doctor, "tried_on", tried_on)
    said = CliRunner().invoke(doctor.doctor, [str(tiny_artifact)], catch_exceptions=False).stdout
    assert "gpu          cuda:0 H100 (80.0 GB, free 79.0 GB, compute capability 9.0, driver 580.65.06)\n" in said
    assert "gpu          cuda:1 T4 (16.0 GB, free 1.0 MB, compute capability 7.5, driver 580.65.06)\n" in said
    assert "cuda         starts\n" in said
    assert "  cuda:0: it runs there slowly: fp32 has no CUDA graphs. What fits: fp32, fp16, bf16, " in said
    assert asked == ["cpu", "cuda:0"]
    assert "known answers on cuda:0: none in this artifact" in said
    assert "  cuda:1: it takes 2.2 GB on T4, of which 0.0 GB is free, too little for any precision." in said
    facts = json.loads(CliRunner().invoke(doctor.doctor, [str(tiny_artifact), "--json"]).stdout)
    assert facts["machine"]["gpus"][1]["capability"] == [7, 5]
    assert [each["device"] for each in facts["artifact"]["gpus"]] == ["cuda:0", "cuda:1"]
    assert facts["artifact"]["gpus"][1]["fits"] == []


def test_answers_that_are_wrong_on_one_device_are_told_of_that_one(
    tiny_artifact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = (Gpu("H100", 80 * GB, 79 * GB, (9, 0)),)
    providers = ("CUDAExecutionProvider", "CPUExecutionProvider")
    monkeypatch.setattr(doctor, "detect", lambda _folder: machine(gpus=seen, providers=providers))
    wrong = {"cuda:0": "the GPU cuda:0 (H100) computes wrongly"}
    monkeypatch.setattr(doctor, "tried_on", lambda _, device: doctor.Tried(device, (), wrong.get(device, "")))
    done = CliRunner().invoke(doctor.doctor, [str(tiny_artifact)], catch_exceptions=False)
    assert done.exit_code == 1
    assert ": works\n  the GPU cuda:0 (H100) computes wrongly\n  known answers on cpu: " in done.stdout
    assert "cuda:0: it runs" not in done.stdout
    told = json.loads(CliRunner().invoke(doctor.doctor, [str(tiny_artifact), "--json"]).stdout)["artifact"]
    assert (told["verdict"], told["wrong"]) == ("works", wrong)
    wrong["cpu"] = "this CPU does too"
    done = CliRunner().invoke(doctor.doctor, [str(tiny_artifact)], catch_exceptions=False)
    assert ": cannot run\n  this CPU does too\n  the GPU cuda:0 (H100) computes wrongly\n" in done.stdout


def test_a_gpu_may_run_what_the_computer_has_no_memory_for(
    tiny_artifact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    providers = ("CUDAExecutionProvider", "CPUExecutionProvider")
    small = machine(memory=10**8, gpus=(Gpu("H100", 80 * GB, 79 * GB, (9, 0)),), providers=providers)
    monkeypatch.setattr(doctor, "detect", lambda _folder: small)
    monkeypatch.setattr(doctor, "tried_on", lambda _, device: doctor.Tried(device, ()))
    done = CliRunner().invoke(doctor.doctor, [str(tiny_artifact)], catch_exceptions=False)
    assert done.exit_code == 0
    assert ": works\n  on a GPU alone; on the CPU it needs " in done.stdout
    assert "known answers on cpu" not in done.stdout


def test_a_device_that_is_not_there_is_no_answer(tiny_artifact: Path) -> None:
    tried = doctor.tried_on(tiny_artifact, "NonsenseExecutionProvider")
    assert (tried.answers, tried.wrong.startswith("device 'NonsenseExecutionProvider'")) == ((), True)


def test_why_cuda_does_not_start_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = machine(providers=("CUDAExecutionProvider",), cuda="device cuda: libcublas.so.13 is missing")
    monkeypatch.setattr(doctor, "detect", lambda _folder: seen)
    done = CliRunner().invoke(doctor.doctor, [], catch_exceptions=False)
    assert "gpu          no NVIDIA GPU found\ncuda         does not start; see the note\n" in done.stdout
    assert "note: device cuda: libcublas.so.13 is missing\n" in done.stdout
    assert done.exit_code == 0, "the CPU is there"


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
