"""What a machine is, as far as its system tells: CPU, instructions, memory, GPUs, disk, engine. Looks, changes nothing.

    detect(Path("m0-int8")).features    # {"avx2": True, "avx512": True, "vnni": True, "amx": False}

What a system does not tell is unknown, None, and never guessed. What to do about it is `m0kit.machine.advice`'s.
"""

import contextlib
import ctypes
import math
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Final

from m0kit.errors import DependencyError, DeviceError
from m0kit.scoring import cuda, gpus, sessions
from m0kit.scoring.gpus import Gpu

Features = Mapping[str, bool | None]

# Instructions that the kernels make use of, by architecture.
FEATURES: Final = {"x86_64": ("avx2", "avx512", "vnni", "amx"), "arm64": ("dotprod", "i8mm")}
FEATURE_NAMES: Final = {
    "avx2": "AVX2",
    "avx512": "AVX-512",
    "vnni": "VNNI",
    "amx": "AMX",
    "dotprod": "dotprod",
    "i8mm": "i8mm",
}
# How Linux calls those in /proc/cpuinfo that it calls otherwise.
_FLAGS: Final = {
    "avx512": {"avx512f"},
    "vnni": {"avx512_vnni", "avx_vnni"},
    "amx": {"amx_int8"},
    "dotprod": {"asimddp"},
}


@dataclass(frozen=True, slots=True)
class Machine:
    """What can be known of a machine without installing anything. Bytes; None is unknown."""

    system: str
    arch: str  # "x86_64", "arm64", or what the system calls another one
    cpu: str
    features: Features  # of FEATURES[arch]
    cores: int  # that this process may use
    memory: int | None  # of the machine or of the container, whichever is less
    available: int | None
    gpus: tuple[Gpu, ...]
    onnxruntime: str | None  # None: not installed
    providers: tuple[str, ...]
    free_disk: int | None
    cuda: str = ""  # why ONNX Runtime's CUDA is of no use here, where it or a GPU is there


def detect(folder: Path = Path(), root: Path = Path("/")) -> Machine:
    """This machine. `folder` is where disk space counts, `root` where /proc and /sys are found."""
    version, providers = engine()
    arch, cpu, features, memory, available = _processor_and_memory(root)
    return Machine(
        platform.system(), arch, cpu, features, _cores(root), memory, available, _gpus(root), version, providers,
        _free_disk(folder), cuda_problem(providers),
    )  # fmt: skip


def _processor_and_memory(root: Path) -> tuple[str, str, Features, int | None, int | None]:
    """Architecture, name and instructions of the CPU; bytes of memory, and of these available."""
    arch = {"amd64": "x86_64", "aarch64": "arm64"}.get(platform.machine().lower(), platform.machine().lower())
    system = platform.system()
    cpu = platform.processor() or arch
    found: Features = dict.fromkeys(FEATURES.get(arch, ()), None)
    memory: int | None = None
    available: int | None = None
    if system == "Linux":
        name, found = read_cpuinfo(_text(root / "proc/cpuinfo"), arch)
        cpu = name or cpu
        memory, available = linux_memory(root)
    elif system == "Darwin":
        keys = ("machdep.cpu.brand_string", "hw.memsize", "hw.optional")
        name, memory, found = read_sysctl(_output("/usr/sbin/sysctl", *keys), arch)
        cpu = name or cpu
    elif sys.platform == "win32":
        memory, available, found = _windows(arch)
    return arch, cpu, found, memory, available


def describe(*packages: str) -> dict[str, Any]:
    """What a figure that was measured here depends on, by name; versions of `packages` too, of those that are there."""
    _, cpu, features, memory, _ = _processor_and_memory(Path("/"))
    return {
        "cpu": cpu,
        "features": [name for name, is_there in features.items() if is_there],
        "cores": _cores(Path("/")),
        "memory": memory,
        "system": platform.system(),
        "python": platform.python_version(),
        **versions("m0kit", "onnxruntime", "onnxruntime-gpu", "numpy", *packages),
    }


def versions(*packages: str) -> dict[str, str]:
    """Of those that are installed; nothing is imported."""
    found = {}
    for package in packages:
        with contextlib.suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def read_cpuinfo(text: str, arch: str) -> tuple[str, Features]:
    """Name of the CPU ("" where Linux does not say) and its instructions, from /proc/cpuinfo."""
    fields = _fields(text)
    flags = fields.get("flags", fields.get("Features"))
    known = FEATURES.get(arch, ())
    cpu = fields.get("model name", "")
    if cpu and "cpu family" in fields:  # many a machine in a cloud has no better name than its maker's
        cpu += f" (family {fields['cpu family']}, model {fields.get('model')})"
    return cpu, {name: None if flags is None else bool(_FLAGS.get(name, {name}) & set(flags.split())) for name in known}


def read_sysctl(text: str, arch: str) -> tuple[str, int | None, Features]:
    """Name of the CPU, bytes of memory and instructions, from macOS's sysctl."""
    fields = _fields(text)
    keys = {"avx2": "avx2_0", "avx512": "avx512f", "vnni": "avx512vnni", "dotprod": "arm.FEAT_DotProd"}
    keys["i8mm"] = "arm.FEAT_I8MM"
    states = {"0": False, "1": True}
    found = {name: states.get(fields.get(f"hw.optional.{keys.get(name)}", "")) for name in FEATURES.get(arch, ())}
    if "amx" in found:
        found["amx"] = False  # Intel's: no Mac ever had it
    size = fields.get("hw.memsize", "")
    return fields.get("machdep.cpu.brand_string", ""), int(size) if size.isdigit() else None, found


def linux_memory(root: Path) -> tuple[int | None, int | None]:
    """Total and available bytes, of the machine or of the container (cgroup v1 or v2), whichever is less."""
    fields = dict(re.findall(r"^(\w+):\s+(\d+) kB$", _text(root / "proc/meminfo"), re.MULTILINE))
    total = int(fields["MemTotal"]) * 1024 if "MemTotal" in fields else None
    available = int(fields["MemAvailable"]) * 1024 if "MemAvailable" in fields else None
    for folder in _cgroups(root, "memory"):
        limit = _number(folder / "memory.max", folder / "memory.limit_in_bytes")
        if limit is None:  # or a huge number in v1, which is never the least
            continue
        total = limit if total is None else min(total, limit)
        used = _number(folder / "memory.current", folder / "memory.usage_in_bytes") or 0
        stat: dict[str, str] = dict(re.findall(r"^(\w+) (\d+)$", _text(folder / "memory.stat"), re.MULTILINE))
        # Pages of files are counted as used and given back when memory is short.
        kinds = ("inactive_file", "active_file")
        given_back = sum(int(stat.get(f"total_{kind}", stat.get(kind, "0"))) for kind in kinds)
        left = min(limit, max(0, limit - used + given_back))
        available = left if available is None else min(available, left)
    return total, available


def _cgroups(root: Path, controller: str) -> Iterator[Path]:
    """Folders of this process's control groups, own group first, up to the root of each hierarchy."""
    for line in _text(root / "proc/self/cgroup").splitlines():
        _, controllers, path = (*line.split(":", 2), "", "")[:3]
        if controllers and controller not in controllers.split(","):
            continue
        base = root / "sys/fs/cgroup" / (controllers and controller)
        parts = [part for part in path.split("/") if part not in ("", "..")]
        for depth in range(len(parts), -1, -1):
            yield base.joinpath(*parts[:depth])


def _cores(root: Path) -> int:
    """Cores that this process may use: its affinity, and the container's share of time rounded up."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    for folder in _cgroups(root, "cpu"):
        quota, _, period = _text(folder / "cpu.max").partition(" ")
        quota = quota or _text(folder / "cpu.cfs_quota_us")
        period = period or _text(folder / "cpu.cfs_period_us")
        if quota.strip().isdigit() and period.strip().isdigit() and int(period):
            cores = min(cores, math.ceil(int(quota) / int(period)))
    return max(1, cores)


def cuda_problem(providers: Sequence[str]) -> str:
    """Why ONNX Runtime's CUDA is of no use here; "" where it starts, or where there is no reason but its package."""
    if cuda.PROVIDER not in providers:
        return cuda.both_installed()
    try:
        cuda.start(sessions.onnxruntime())
    except DeviceError as error:
        return str(error)
    return ""


def _gpus(root: Path) -> tuple[Gpu, ...]:
    # Containers may have the device without the driver's libraries.
    return gpus.devices().gpus or ((Gpu("an NVIDIA GPU", None),) if (root / "dev/nvidia0").exists() else ())


def engine() -> tuple[str | None, tuple[str, ...]]:
    """ONNX Runtime's version and execution providers; None where it is not installed."""
    try:
        ort = sessions.onnxruntime()
    except DependencyError:
        return None, ()
    return str(ort.__version__), tuple(ort.get_available_providers())


def _free_disk(folder: Path) -> int | None:
    try:
        return shutil.disk_usage(folder).free
    except OSError:
        return None


if sys.platform == "win32":

    class _MemoryStatus(ctypes.Structure):
        """MEMORYSTATUSEX, https://learn.microsoft.com/windows/win32/api/sysinfoapi/ns-sysinfoapi-memorystatusex"""

        _fields_ = (
            ("length", ctypes.c_uint32),
            ("load", ctypes.c_uint32),
            *((name, ctypes.c_uint64) for name in ("total", "available", "a", "b", "c", "d", "e")),
        )

    def _windows(arch: str) -> tuple[int | None, int | None, Features]:
        """Total and available bytes, instructions; Windows tells AVX2, AVX-512 and dotprod only."""
        kernel = ctypes.windll.kernel32
        status = _MemoryStatus(length=ctypes.sizeof(_MemoryStatus))
        known = bool(kernel.GlobalMemoryStatusEx(ctypes.byref(status)))
        numbers = {"avx2": 40, "avx512": 41, "dotprod": 43}  # PF_…_INSTRUCTIONS_AVAILABLE
        found = {
            name: bool(kernel.IsProcessorFeaturePresent(numbers[name])) if name in numbers else None
            for name in FEATURES.get(arch, ())
        }
        return (status.total if known else None), (status.available if known else None), found


def _fields(text: str) -> dict[str, str]:
    """What stands in lines of "name: value"."""
    lines = (line.partition(":") for line in text.splitlines())
    return {name.strip(): value.strip() for name, _, value in lines}


def _text(path: Path) -> str:
    try:
        return path.read_text("utf-8", "replace")
    except OSError:
        return ""


def _number(*paths: Path) -> int | None:
    """The number in the first of the files that has one."""
    texts = (_text(path).strip() for path in paths)
    return next((int(text) for text in texts if text.isdigit()), None)


def _output(*command: str) -> str:
    """What a command prints; nothing if it is not there, fails, or hangs as a driver may."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout
    except (OSError, subprocess.SubprocessError, UnicodeDecodeError):
        return ""
