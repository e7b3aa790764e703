"""Every machine gets one recommendation, by the rules; what a system says of itself is read right."""

import json
import os
import platform
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from m0kit.artifact.manifest import read_manifest
from m0kit.errors import ArtifactError, DependencyError
from m0kit.machine import advice as doctor
from m0kit.machine.advice import FEATURES, NEEDS, Gpu, Machine, advise, fit
from m0kit.precision import SCHEMES, supported
from m0kit.scoring import sessions

GB = 10**9
CPU = ("CPUExecutionProvider",)
CUDA = ("CUDAExecutionProvider", "CPUExecutionProvider")


def machine(**known: Any) -> Machine:
    """A laptop with VNNI, 16 GB and much free disk, except for what is `known` of it."""
    flags = {"avx2": True, "avx512": True, "vnni": True, "amx": False}
    usual = Machine("Linux", "x86_64", "a CPU", flags, 8, 16 * GB, 12 * GB, (), "1.32.0", CPU, 100 * GB)
    return replace(usual, **known)


def features(arch: str, *present: str) -> dict[str, bool | None]:
    return {name: name in present for name in FEATURES[arch]}


# --- rules ---------------------------------------------------------------------------------------------

RULES = [
    # what machine, precision, device, a word of the reason
    ({}, "int8", "cpu", "VNNI"),
    ({"features": features("x86_64", "avx2")}, "int8", "cpu", "AVX2"),
    ({"features": features("x86_64", "avx2", "vnni", "amx")}, "int8", "cpu", "AMX"),
    ({"arch": "arm64", "features": features("arm64", "dotprod", "i8mm")}, "int8", "cpu", "i8mm"),
    ({"arch": "riscv64", "features": {}}, "int8", "cpu", "size"),
    ({"memory": int(4.8 * GB)}, "int8", "cpu", "4.8 GB are there"),
    ({"memory": int(4.8 * GB) - 1}, "int4", "cpu", "int8 wants 4.8 GB"),
    ({"memory": GB // 2}, "int4", "cpu", "smallest"),
    ({"memory": None}, "int8", "cpu", "size"),
    ({"free_disk": 2 * GB}, "int4", "cpu", "disk has no room"),
    ({"free_disk": None}, "int8", "cpu", "VNNI"),
    ({"providers": CUDA, "gpus": (Gpu("T4", 16 * GB),)}, "fp16", "cuda", "T4 through CUDA with 16.0 GB"),
    ({"providers": CUDA, "gpus": (Gpu("GTX", 6 * GB),)}, "int4", "cuda", "with 6.0 GB"),
    ({"providers": CUDA, "gpus": (Gpu("MX", 2 * GB),)}, "int8", "cpu", "VNNI"),
    ({"providers": CUDA, "gpus": (Gpu("Jetson", None),)}, "fp16", "cuda", "Jetson"),
    ({"providers": CUDA, "gpus": (Gpu("MX", 2 * GB), Gpu("T4", 16 * GB))}, "fp16", "cuda", "T4"),
    ({"providers": CUDA, "gpus": (Gpu("T4", 16 * GB),), "free_disk": 3 * GB}, "int4", "cuda", "T4"),
    ({"providers": CUDA, "gpus": ()}, "int8", "cpu", "VNNI"),
    ({"providers": CPU, "gpus": (Gpu("T4", 16 * GB),)}, "int8", "cpu", "VNNI"),
    ({"onnxruntime": None, "providers": ()}, "int8", "cpu", "VNNI"),
]


@pytest.mark.parametrize(("known", "precision", "device", "word"), RULES)
def test_the_rules(known: dict[str, Any], precision: str, device: str, word: str) -> None:
    advice = advise(machine(**known))
    assert (advice.precision, advice.device) == (precision, device)
    assert word in advice.why


sizes = st.none() | st.integers(0, 200 * GB)
machines = st.sampled_from(["x86_64", "arm64", "ppc64le"]).flatmap(
    lambda arch: st.builds(
        Machine,
        st.sampled_from(["Linux", "Darwin", "Windows", ""]),
        st.just(arch),
        st.text(max_size=5),
        st.fixed_dictionaries({name: st.sampled_from([True, False, None]) for name in FEATURES.get(arch, ())}),
        st.integers(1, 256),
        sizes,
        sizes,
        st.lists(st.builds(Gpu, st.just("gpu"), sizes), max_size=2).map(tuple),
        st.sampled_from([None, "1.22.1", "1.30.0", "1.32.0", "2.0", "odd"]),
        st.sampled_from([(), CPU, CUDA, ("CoreMLExecutionProvider", *CPU)]),
        sizes,
    )
)


@given(machines)
def test_every_machine_gets_one_recommendation_and_a_reason_against_each_other_precision(any_machine: Machine) -> None:
    advice = advise(any_machine)
    assert {advice.precision, *advice.others} == set(NEEDS)
    assert advice.precision not in advice.others
    assert advice.why
    assert all(against.why for against in advice.others.values())
    assert all("None" not in text for text in (advice.why, *advice.notes, *(o.why for o in advice.others.values())))
    need, has = NEEDS[advice.precision], any_machine
    if advice.device == "cuda":
        assert "CUDAExecutionProvider" in has.providers
        assert need.gpu is not None
        assert any(gpu.memory is None or gpu.memory >= need.gpu * GB for gpu in has.gpus)
    elif has.memory is not None and has.memory >= NEEDS["int8"].peak * GB:
        assert has.memory >= need.peak * GB, "never more than the machine holds"
    if has.free_disk is not None and has.free_disk >= NEEDS["int4"].disk * GB:
        assert has.free_disk >= need.disk * GB
    json.dumps(advice.notes)


@given(machines, st.sampled_from([*NEEDS, "int2"]), st.integers(0, 10 * GB))
def test_every_artifact_gets_a_verdict_with_reasons(any_machine: Machine, scheme: str, num_bytes: int) -> None:
    result = fit(any_machine, scheme, num_bytes)
    assert result.why
    if result.verdict == "suits":
        assert scheme in NEEDS
        if any_machine.memory is not None:
            assert any_machine.memory >= num_bytes * NEEDS[scheme].peak / NEEDS[scheme].disk


def test_the_table_has_the_precisions_and_kernels_that_the_runtime_has() -> None:
    assert set(NEEDS) == set(SCHEMES)
    assert {name for name, need in NEEDS.items() if need.gpu is not None} == set(supported("cuda"))


def test_less_memory_never_asks_for_a_larger_precision() -> None:
    order = [advise(machine(memory=gb * GB)).precision for gb in range(32)]
    assert [NEEDS[name].peak for name in order] == sorted(NEEDS[name].peak for name in order)
    on_gpu = [advise(machine(providers=CUDA, gpus=(Gpu("g", gb * GB),))) for gb in range(32)]
    assert [a.precision for a in on_gpu if a.device == "cuda"] == ["int4"] * 3 + ["fp16"] * 25


def test_reasons_against_are_those_of_the_machine() -> None:
    cpu = advise(machine()).others
    assert cpu["fp32"].possible
    assert "computes in fp32" in cpu["fp16"].why
    assert "less memory" in cpu["int4"].why
    assert "QLoRA" in cpu["nf4"].why
    gpu = advise(machine(providers=CUDA, gpus=(Gpu("T4", 16 * GB),))).others
    assert not gpu["int8"].possible
    assert "no CUDA kernels" in gpu["int8"].why
    little = advise(machine(providers=CUDA, gpus=(Gpu("GTX", 6 * GB),))).others
    assert little["fp16"] == doctor.Against(False, "needs about 7 GB of GPU memory, there are 6.0 GB")
    small = advise(machine(memory=2 * GB)).others
    assert "read again and again" in small["int8"].why
    assert "wants 4.8 GB of memory, here are 4.0 GB" in advise(machine(memory=4 * GB)).others["int8"].why
    assert not advise(machine(memory=GB // 4)).others["int8"].possible
    full = advise(machine(free_disk=3 * GB)).others
    assert full["fp32"] == doctor.Against(False, "takes 8.9 GB of disk, 3.0 GB are free")


NOTES = [
    ({"onnxruntime": None}, "not installed: pip install 'm0kit"),
    ({"onnxruntime": "1.29.1"}, "1.29.1 is too old: artifacts need 1.30"),
    ({"gpus": (Gpu("T4", 16 * GB),)}, "T4 is not used: .* pip install 'm0kit.gpu.'"),
    ({"providers": CUDA}, "no NVIDIA driver answered"),
    ({"providers": CUDA, "gpus": (Gpu("MX", 2 * GB),)}, "MX is not used: its memory"),
    ({"providers": CUDA, "gpus": (Gpu("Jetson", None),)}, "memory is unknown; fp16 needs about 7 GB"),
    ({"providers": ("CoreMLExecutionProvider", *CPU)}, "not considered: CoreMLExecutionProvider"),
    ({"free_disk": GB}, "int4 takes 1.45 GB of disk, 1.0 GB are free"),
    ({"features": features("x86_64")}, "this CPU has no instructions"),
    ({"features": dict.fromkeys(FEATURES["arm64"])}, "it is unknown whether this CPU has"),
    ({"memory": None}, "the memory is unknown; int8 wants 4.8 GB"),
    ({"memory": GB}, "even the smallest takes about 1.7 GB"),
    ({"available": GB}, "only 1.0 GB of memory are free now; scoring a page takes 2.4 GB"),
]


@pytest.mark.parametrize(("known", "note"), NOTES)
def test_what_else_is_worth_knowing_is_said_where_it_holds(known: dict[str, Any], note: str) -> None:
    assert [text for text in advise(machine(**known)).notes if re.search(note, text)]
    assert advise(machine()).notes == ()
    assert advise(machine(providers=("AzureExecutionProvider", *CPU))).notes == ()


def test_onnxruntime_is_held_to_its_oldest_version() -> None:
    verdicts = {
        version: fit(machine(onnxruntime=version), "int8", GB).verdict for version in ("1.29.9", "1.30.0", "2.0")
    }
    assert verdicts == {"1.29.9": "cannot run", "1.30.0": "suits", "2.0": "suits"}


FITS = [
    # what machine, precision, GB, verdict, a word of the reason
    ({}, "int8", 2.6, "suits", "int8 on the CPU"),
    ({}, "fp32", 8.9, "works", "int8 on the CPU suits this machine better. fp32: exact"),
    ({"memory": 4 * GB, "available": 4 * GB}, "int4", 1.45, "suits", "int4 on the CPU"),
    ({"memory": 4 * GB}, "fp32", 8.9, "works", "read from disk again and again"),
    ({"memory": GB // 4}, "int8", 2.6, "cannot run", "0.6 GB of private memory, the machine has 0.2 GB"),
    ({"available": GB}, "int8", 2.6, "works", "only 1.0 GB of memory are free now"),
    ({"memory": 4 * GB, "available": 4 * GB}, "int8", 0.02, "suits", "int8 on the CPU"),
    ({"free_disk": 0}, "int8", 2.6, "suits", "int8 on the CPU"),
    ({"providers": CUDA, "gpus": (Gpu("T4", 16 * GB),)}, "int8", 2.6, "works", "no CUDA kernels"),
    ({"providers": CUDA, "gpus": (Gpu("T4", 16 * GB),)}, "fp16", 4.45, "suits", "fp16 on the GPU"),
    ({"providers": CUDA, "gpus": (Gpu("T4", 6 * GB),)}, "fp16", 4.45, "works", "int4 on the GPU"),
    ({}, "int2", 1.0, "works", "knows nothing of the precision int2"),
    ({"onnxruntime": None}, "int8", 2.6, "cannot run", "not installed"),
]


@pytest.mark.parametrize(("known", "scheme", "gigabytes", "verdict", "word"), FITS)
def test_an_artifact_is_held_against_the_machine(
    known: dict[str, Any], scheme: str, gigabytes: float, verdict: str, word: str
) -> None:
    result = fit(machine(**known), scheme, int(gigabytes * GB))
    assert result.verdict == verdict
    assert word in " ".join(result.why)


# --- looking -------------------------------------------------------------------------------------------


def tree(root: Path, **files: str) -> Path:
    """Files below root; __ stands for a slash and _dot_ for a dot."""
    for name, text in files.items():
        path = root / name.replace("__", "/").replace("_dot_", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


INTEL = (
    "processor\t: 0\nmodel name\t: Xeon\nflags\t\t: fpu avx2 avx512f avx512_vnni amx_int8 amx_tile\n\nprocessor\t: 1\n"
)


@pytest.mark.parametrize(
    ("text", "arch", "name", "present"),
    [
        (INTEL, "x86_64", "Xeon", {"avx2", "avx512", "vnni", "amx"}),
        ("model name : Alder\nflags : avx2 avx_vnni\n", "x86_64", "Alder", {"avx2", "vnni"}),
        ("model name : old\nflags : sse4_2 avx\n", "x86_64", "old", set()),
        ("Features\t: fp asimd asimddp sve i8mm\nCPU part\t: 0xd40\n", "arm64", "", {"dotprod", "i8mm"}),
        ("Features\t: fp asimd\n", "arm64", "", set()),
    ],
)
def test_linux_says_which_instructions_there_are(text: str, arch: str, name: str, present: set[str]) -> None:
    assert doctor.read_cpuinfo(text, arch) == (name, features(arch, *present))


def test_what_linux_does_not_say_is_unknown() -> None:
    assert doctor.read_cpuinfo("", "x86_64") == ("", dict.fromkeys(FEATURES["x86_64"]))
    assert doctor.read_cpuinfo(INTEL, "riscv64") == ("Xeon", {})


def test_macos_says_it_through_sysctl() -> None:
    text = (
        "machdep.cpu.brand_string: Apple M2\nhw.memsize: 17179869184\n"
        "hw.optional.arm.FEAT_DotProd: 1\nhw.optional.arm.FEAT_I8MM: 1\n"
    )
    assert doctor.read_sysctl(text, "arm64") == ("Apple M2", 2**34, {"dotprod": True, "i8mm": True})
    intel = "hw.optional.avx2_0: 1\nhw.optional.avx512f: 0\n"
    found = {"avx2": True, "avx512": False, "vnni": None, "amx": False}
    assert doctor.read_sysctl(intel, "x86_64") == ("", None, found)


MEMINFO = "MemTotal:       16000000 kB\nMemFree:  1 kB\nMemAvailable:    8000000 kB\n"


def test_memory_is_the_machines_without_a_container(tmp_path: Path) -> None:
    assert doctor.linux_memory(tree(tmp_path, proc__meminfo=MEMINFO)) == (16_384_000_000, 8_192_000_000)
    assert doctor.linux_memory(tmp_path / "empty") == (None, None)


def test_memory_is_the_containers_where_that_is_less(tmp_path: Path) -> None:
    root = tree(
        tmp_path,
        proc__meminfo=MEMINFO,
        proc__self__cgroup="0::/pod/box\n",
        sys__fs__cgroup__pod__memory_dot_max="4000000000\n",
        sys__fs__cgroup__pod__memory_dot_current="3000000000\n",
        sys__fs__cgroup__pod__memory_dot_stat="anon 1\ninactive_file 500000000\nactive_file 100000000\n",
        sys__fs__cgroup__pod__box__memory_dot_max="max\n",
    )
    assert doctor.linux_memory(root) == (4_000_000_000, 1_600_000_000), "of the group above, files given back"
    tree(root, sys__fs__cgroup__pod__box__memory_dot_max="2000000000\n")
    assert doctor.linux_memory(root)[0] == 2_000_000_000, "the smallest limit on the way up"
    tree(root, sys__fs__cgroup__pod__memory_dot_max="99000000000\n")
    tree(root, sys__fs__cgroup__pod__box__memory_dot_max="99000000000\n")
    assert doctor.linux_memory(root) == (16_384_000_000, 8_192_000_000), "a limit above the machine is none"


def test_memory_is_read_from_older_control_groups_too(tmp_path: Path) -> None:
    root = tree(
        tmp_path,
        proc__meminfo=MEMINFO,
        proc__self__cgroup="5:cpu,cpuacct:/x\n4:memory:/docker/1\n0::/\n",
        # the folder that a container sees is not the one that the host names
        sys__fs__cgroup__memory__memory_dot_limit_in_bytes="3000000000\n",
        sys__fs__cgroup__memory__memory_dot_usage_in_bytes="1000000000\n",
        sys__fs__cgroup__memory__memory_dot_stat="inactive_file 1\ntotal_inactive_file 200000000\n",
    )
    assert doctor.linux_memory(root) == (3_000_000_000, 2_200_000_000)
    tree(root, sys__fs__cgroup__memory__memory_dot_limit_in_bytes="9223372036854771712\n")
    assert doctor.linux_memory(root) == (16_384_000_000, 8_192_000_000)


def test_cores_are_those_that_may_be_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    root = tree(tmp_path, proc__self__cgroup="0::/\n")
    assert doctor._cores(root) == 8
    for quota, cores in (("max 100000\n", 8), ("250000 100000\n", 3), ("5000 100000\n", 1), ("9900000 100000\n", 8)):
        tree(root, sys__fs__cgroup__cpu_dot_max=quota)
        assert doctor._cores(root) == cores
    old = tree(
        tmp_path / "old",
        proc__self__cgroup="5:cpu,cpuacct:/x\n",
        sys__fs__cgroup__cpu__cpu_dot_cfs_quota_us="200000\n",
        sys__fs__cgroup__cpu__cpu_dot_cfs_period_us="100000\n",
    )
    assert doctor._cores(old) == 2
    tree(old, sys__fs__cgroup__cpu__cpu_dot_cfs_quota_us="-1\n")
    assert doctor._cores(old) == 8


def test_gpus_are_those_the_driver_names() -> None:
    text = "NVIDIA H100 80GB HBM3, 81559\nNVIDIA GB10, [N/A]\n"
    assert doctor.read_nvidia_smi(text) == (Gpu("NVIDIA H100 80GB HBM3", 81559 * 2**20), Gpu("NVIDIA GB10", None))
    assert doctor.read_nvidia_smi("") == ()
    assert doctor.read_nvidia_smi("No devices were found\n") == ()


@pytest.mark.skipif(os.name != "posix", reason="the stand-ins are shell scripts")
def test_a_driver_that_fails_is_no_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = tmp_path / "bin" / "nvidia-smi"
    tool.parent.mkdir()
    monkeypatch.setenv("PATH", str(tool.parent), prepend=os.pathsep)

    def write(script: str) -> None:
        tool.write_text(f"#!/bin/sh\n{script}\n")
        tool.chmod(0o755)

    write("echo 'Tesla T4, 15360'")
    assert doctor._gpus(tmp_path) == (Gpu("Tesla T4", 15360 * 2**20),)
    write("echo 'NVIDIA-SMI has failed, no driver'; exit 9")
    assert doctor._gpus(tmp_path) == ()
    tree(tmp_path, dev__nvidia0="")
    assert doctor._gpus(tmp_path) == (Gpu("an NVIDIA GPU", None),), "a device without its tool"

    def hangs(*_: Any, timeout: float, **__: Any) -> Any:
        raise subprocess.TimeoutExpired("nvidia-smi", timeout)

    monkeypatch.setattr(subprocess, "run", hangs)
    assert doctor._output("nvidia-smi") == ""


def test_this_machine_is_seen(tmp_path: Path) -> None:
    seen = doctor.detect(tmp_path)
    import onnxruntime

    assert seen.onnxruntime == onnxruntime.__version__
    assert "CPUExecutionProvider" in seen.providers
    assert 1 <= seen.cores <= (os.cpu_count() or 1)
    assert seen.free_disk == pytest.approx(shutil.disk_usage(tmp_path).free, rel=0.5)  # others write meanwhile
    assert seen.system == platform.system()
    if sys.platform == "linux":
        assert seen.memory is not None
        assert seen.available is not None
        assert 0 < seen.available <= seen.memory
        assert set(seen.features) == set(FEATURES.get(seen.arch, ()))


def test_nothing_on_an_unreadable_system_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "system", lambda: "Linux")
    monkeypatch.setenv("PATH", str(tmp_path))
    seen = doctor.detect(tmp_path / "gone", tmp_path)
    assert (seen.memory, seen.available, seen.gpus, seen.free_disk) == (None, None, (), None)
    assert set(seen.features.values()) <= {None}
    assert advise(seen).precision == "int8"


def test_without_onnxruntime_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> Any:
        raise DependencyError("no")

    monkeypatch.setattr(sessions, "_onnxruntime", missing)
    assert doctor._engine() == (None, ())
    done = CliRunner().invoke(doctor.doctor, [])
    assert done.exit_code == 1
    assert "note: onnxruntime is not installed" in done.stdout


# --- the command ---------------------------------------------------------------------------------------


def test_the_command_tells_people_and_programs_the_same(tiny_artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = machine(features={**features("x86_64", "avx2"), "vnni": None}, memory=None, gpus=(Gpu("T4", None),))
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
