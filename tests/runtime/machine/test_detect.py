"""What a system says of itself is read right, and what it does not say is unknown."""

import json
import os
import platform
import shutil
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from m0kit.errors import DependencyError, DeviceError
from m0kit.machine.advice import advise
from m0kit.machine.detect import (
    FEATURES,
    cuda_problem,
    describe,
    detect,
    linux_memory,
    read_cpuinfo,
    read_sysctl,
)
from m0kit.scoring import cuda, gpus, sessions
from m0kit.scoring.gpus import Gpu


def features(arch: str, *present: str) -> dict[str, bool | None]:
    return {name: name in present for name in FEATURES[arch]}


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
        (
            "cpu family : 25\nmodel : 17\nmodel name : AMD\nflags : avx2\n",
            "x86_64",
            "AMD (family 25, model 17)",
            {"avx2"},
        ),
        ("model name : old\nflags : sse4_2 avx\n", "x86_64", "old", set()),
        ("Features\t: fp asimd asimddp sve i8mm\nCPU part\t: 0xd40\n", "arm64", "", {"dotprod", "i8mm"}),
        ("Features\t: fp asimd\n", "arm64", "", set()),
    ],
)
def test_linux_says_which_instructions_there_are(text: str, arch: str, name: str, present: set[str]) -> None:
    assert read_cpuinfo(text, arch) == (name, features(arch, *present))


def test_what_linux_does_not_say_is_unknown() -> None:
    assert read_cpuinfo("", "x86_64") == ("", dict.fromkeys(FEATURES["x86_64"]))
    assert read_cpuinfo(INTEL, "riscv64") == ("Xeon", {})


def test_macos_says_it_through_sysctl() -> None:
    text = (
        "machdep.cpu.brand_string: Apple M2\nhw.memsize: 17179869184\n"
        "hw.optional.arm.FEAT_DotProd: 1\nhw.optional.arm.FEAT_I8MM: 1\n"
    )
    assert read_sysctl(text, "arm64") == ("Apple M2", 2**34, {"dotprod": True, "i8mm": True})
    intel = "hw.optional.avx2_0: 1\nhw.optional.avx512f: 0\n"
    found = {"avx2": True, "avx512": False, "vnni": None, "amx": False}
    assert read_sysctl(intel, "x86_64") == ("", None, found)


MEMINFO = "MemTotal:       16000000 kB\nMemFree:  1 kB\nMemAvailable:    8000000 kB\n"


def test_memory_is_the_machines_without_a_container(tmp_path: Path) -> None:
    assert linux_memory(tree(tmp_path, proc__meminfo=MEMINFO)) == (16_384_000_000, 8_192_000_000)
    assert linux_memory(tmp_path / "empty") == (None, None)


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
    assert linux_memory(root) == (4_000_000_000, 1_600_000_000), "of the group above, files given back"
    tree(root, sys__fs__cgroup__pod__box__memory_dot_max="2000000000\n")
    assert linux_memory(root)[0] == 2_000_000_000, "the smallest limit on the way up"
    tree(root, sys__fs__cgroup__pod__memory_dot_max="99000000000\n")
    tree(root, sys__fs__cgroup__pod__box__memory_dot_max="99000000000\n")
    assert linux_memory(root) == (16_384_000_000, 8_192_000_000), "a limit above the machine is none"


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
    assert linux_memory(root) == (3_000_000_000, 2_200_000_000)
    tree(root, sys__fs__cgroup__memory__memory_dot_limit_in_bytes="9223372036854771712\n")
    assert linux_memory(root) == (16_384_000_000, 8_192_000_000)


def test_cores_are_those_that_may_be_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    root = tree(tmp_path, proc__self__cgroup="0::/\n")
    assert detect(tmp_path, root).cores == 8
    for quota, cores in (("max 100000\n", 8), ("250000 100000\n", 3), ("5000 100000\n", 1), ("9900000 100000\n", 8)):
        tree(root, sys__fs__cgroup__cpu_dot_max=quota)
        assert detect(tmp_path, root).cores == cores
    old = tree(
        tmp_path / "old",
        proc__self__cgroup="5:cpu,cpuacct:/x\n",
        sys__fs__cgroup__cpu__cpu_dot_cfs_quota_us="200000\n",
        sys__fs__cgroup__cpu__cpu_dot_cfs_period_us="100000\n",
    )
    assert detect(tmp_path, old).cores == 2
    tree(old, sys__fs__cgroup__cpu__cpu_dot_cfs_quota_us="-1\n")
    assert detect(tmp_path, old).cores == 8


def test_gpus_are_those_that_cuda_sees(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = gpus.Devices((), gpus.NO_DRIVER)
    monkeypatch.setattr(gpus, "devices", lambda: seen)
    assert detect(root=tmp_path).gpus == ()
    tree(tmp_path, dev__nvidia0="")
    assert detect(root=tmp_path).gpus == (Gpu("an NVIDIA GPU", None),), "a device without the driver's libraries"
    seen = gpus.Devices((Gpu("Tesla T4", 16 * 10**9), Gpu("GTX", 6 * 10**9)))
    assert detect(root=tmp_path).gpus == seen.gpus


def test_why_cuda_is_of_no_use_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(_: Any) -> Any:
        raise DeviceError("device cuda: libcublas.so.13 is missing")

    monkeypatch.setattr(cuda, "both_installed", lambda: "")
    monkeypatch.setattr(cuda, "start", fails)
    assert cuda_problem(["CPUExecutionProvider"]) == ""
    assert cuda_problem(["CUDAExecutionProvider"]) == "device cuda: libcublas.so.13 is missing"
    monkeypatch.setattr(cuda, "start", lambda _: None)
    assert cuda_problem(["CUDAExecutionProvider"]) == ""
    monkeypatch.setattr(cuda, "both_installed", lambda: "both are installed")
    assert cuda_problem(["CPUExecutionProvider"]) == "both are installed"


def test_this_machine_is_seen(tmp_path: Path) -> None:
    seen = detect(tmp_path)
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
    seen = detect(tmp_path / "gone", tmp_path)
    assert (seen.memory, seen.available, seen.gpus, seen.free_disk) == (None, None, (), None)
    assert set(seen.features.values()) <= {None}
    assert advise(seen).precision == "int8"


def test_without_onnxruntime_there_is_no_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> Any:
        raise DependencyError("no")

    monkeypatch.setattr(sessions, "onnxruntime", missing)
    seen = detect()
    assert (seen.onnxruntime, seen.providers) == (None, ())


def test_a_figure_is_told_with_what_it_depends_on() -> None:
    here, told = detect(), describe("click", "no-such-package")
    assert (told["cpu"], told["cores"], told["memory"]) == (here.cpu, here.cores, here.memory)
    assert {name for name, there in here.features.items() if there} == set(told["features"])
    assert told["click"] == version("click")
    assert told["onnxruntime"] == here.onnxruntime
    assert {"m0kit", "numpy", "python", "system"} < set(told)
    assert "no-such-package" not in told
    assert json.loads(json.dumps(told)) == told
