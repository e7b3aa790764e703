"""`m0kit doctor`: which precision suits this machine, and why. Looks, advises, changes nothing.

Owns what is known of a machine (`detect`), what the full model needs in each precision (`NEEDS`) and the rules
between the two (`advise`, `fit`: pure, so that they can be tested over machines nobody has at hand).

    m0kit doctor                  which precision to export for this machine
    m0kit doctor m0-int8          whether that artifact suits it, and comes out right on it

What a system does not tell is said to be unknown and never guessed. GB are 10⁹ bytes. Exit code 1 when nothing can
be scored here: no usable ONNX Runtime, or an artifact that cannot run or whose known answers come out wrong.
"""

import ctypes
import math
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final, Literal

import click

from m0kit.artifact.answers import Answer, summary
from m0kit.artifact.manifest import Manifest, read_manifest
from m0kit.cli.options import artifact_argument
from m0kit.errors import DependencyError, WrongAnswerError
from m0kit.precision import provider_of
from m0kit.reranker import Reranker
from m0kit.scoring import sessions
from m0kit.terminal import show, show_json

Device = Literal["cpu", "cuda"]
Features = Mapping[str, bool | None]


@dataclass(frozen=True, slots=True)
class Need:
    """What the full model (2.4 billion parameters) takes in one precision, in GB."""

    disk: float
    peak: float  # resident on the CPU while scoring a page of 768 visual tokens, mapped weights counted
    private: float  # with memory="low", what of the peak cannot be given back to the system
    gpu: float | None  # GPU memory; None: there are no CUDA kernels


# Disk, peak and private: measured, README. GPU: the weights and 2.5 GB for CUDA
# itself and inner values (an allowance, not measured).
NEEDS: Final[Mapping[str, Need]] = {
    "fp32": Need(8.9, 8.3, 0.35, 11.4),
    "fp16": Need(4.45, 5.1, 1.4, 7.0),
    "bf16": Need(4.45, 5.1, 1.4, 7.0),
    "int8": Need(2.24, 2.4, 0.35, None),
    "int4": Need(1.45, 1.7, 1.0, 4.0),
    "nf4": Need(1.4, 1.6, 0.4, 3.9),
}
# From here on int8's peak leaves the rest of the system as much again as it needs itself.
INT8_MEMORY: Final = 4.8
OLDEST_ONNXRUNTIME: Final = (1, 30)  # as in pyproject.toml, with the reason there
_OPENED: Final = 0.15  # GB of a process that opened an artifact of any size; measured, README

# Azure's is in every wheel and computes elsewhere.
_KNOWN_PROVIDERS: Final = ("CPUExecutionProvider", "CUDAExecutionProvider", "AzureExecutionProvider")

# Instructions that the kernels make use of, by architecture.
FEATURES: Final = {"x86_64": ("avx2", "avx512", "vnni", "amx"), "arm64": ("dotprod", "i8mm")}
_NAMES: Final = {
    "avx2": "AVX2",
    "avx512": "AVX-512",
    "vnni": "VNNI",
    "amx": "AMX",
    "dotprod": "dotprod",
    "i8mm": "i8mm",
}
# How Linux calls them in /proc/cpuinfo.
_FLAGS: Final = {
    "avx2": {"avx2"},
    "avx512": {"avx512f"},
    "vnni": {"avx512_vnni", "avx_vnni"},
    "amx": {"amx_int8"},
    "dotprod": {"asimddp"},
    "i8mm": {"i8mm"},
}


@dataclass(frozen=True, slots=True)
class Gpu:
    """An NVIDIA GPU; memory in bytes, None where the driver does not tell."""

    name: str
    memory: int | None


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


@dataclass(frozen=True, slots=True)
class Against:
    """Why a precision is not the one."""

    possible: bool
    why: str


@dataclass(frozen=True, slots=True)
class Advice:
    """The one precision recommended, and why not each of the others."""

    precision: str
    device: Device
    why: str
    others: Mapping[str, Against]
    notes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Fit:
    """Whether an artifact suits a machine. "works": it runs, and the reasons say what would be better."""

    verdict: Literal["suits", "works", "cannot run"]
    why: tuple[str, ...]


# --- rules ---------------------------------------------------------------------------------------------


def advise(machine: Machine) -> Advice:
    """Exactly one precision for the full model on any machine."""
    device, precision, why = _choose(machine)
    others = {name: _against(name, machine, precision, device) for name in NEEDS if name != precision}
    return Advice(precision, device, why, others, tuple(_notes(machine, precision, device)))


def fit(machine: Machine, scheme: str, num_bytes: int) -> Fit:
    """Whether an artifact of `num_bytes` in the precision `scheme` suits the machine."""
    if problem := _engine_problem(machine):
        return Fit("cannot run", (problem,))
    # Of a precision not in the table nothing better is known than int8's needs.
    need = NEEDS.get(scheme, NEEDS["int8"])
    why = []
    # A model of half the size sees a machine twice as large. Its own disk space is already taken.
    scale = need.disk * 1e9 / max(1, num_bytes)
    gpus = tuple(replace(g, memory=None if g.memory is None else int(g.memory * scale)) for g in machine.gpus)
    held = None if machine.memory is None else int(machine.memory * scale)
    advice = advise(replace(machine, memory=held, gpus=gpus, free_disk=None))
    private, peak = (_OPENED * 1e9 + num_bytes * gb / need.disk for gb in (need.private, need.peak))
    if machine.memory is not None and machine.memory < private:
        needs = f"it needs {_gb(private)} of private memory, the machine has {_gb(machine.memory)}"
        return Fit("cannot run", (f"{needs}. Run it on a larger one.",))
    if machine.memory is not None and machine.memory < peak:
        why.append(
            f"its weights do not stay in {_gb(machine.memory)} of memory (it takes about {_gb(peak)}), so they are "
            "read from disk again and again: slow"
        )
    elif machine.available is not None and machine.available < peak:
        why.append(f"it takes about {_gb(peak)} and only {_gb(machine.available)} of memory are free now")
    if scheme not in NEEDS:
        why.append(f"this m0kit knows nothing of the precision {scheme}")
    elif scheme != advice.precision:
        reason = _character(scheme, advice.precision, advice.device)
        why.append(f"{advice.precision} on the {_device(advice.device)} suits this machine better. {scheme}: {reason}")
    if why:
        return Fit("works", tuple(why))
    return Fit("suits", (f"{scheme} on the {_device(advice.device)} is what suits this machine",))


def _choose(machine: Machine) -> tuple[Device, str, str]:
    gpu = _usable_gpu(machine)
    if gpu:
        held = math.inf if gpu.memory is None else gpu.memory / 1e9
        for name in ("fp16", "int4"):
            if held >= (NEEDS[name].gpu or math.inf) and _room(machine, name):
                has = (
                    "" if gpu.memory is None else f" with {_gb(gpu.memory)}; {name} needs about {NEEDS[name].gpu:g} GB"
                )
                return "cuda", name, f"{gpu.name} through CUDA{has}"
    fast = _fast(machine)
    if not _room(machine, "int8"):
        return "cpu", "int4", f"the smallest; for int8's {NEEDS['int8'].disk:g} GB the disk has no room"
    if machine.memory is not None and machine.memory < INT8_MEMORY * 1e9:
        held = machine.memory
        return "cpu", "int4", f"with {_gb(held)} of memory the smallest; int8 wants {INT8_MEMORY:g} GB"
    size = f"a third of fp32's size; {_gb(machine.memory)} are there" if machine.memory else "a third of fp32's size"
    return "cpu", "int8", f"{size}{f'; {fast} for its products' if fast else ''}"


def _usable_gpu(machine: Machine) -> Gpu | None:
    """The largest GPU that this ONNX Runtime can use; one of unknown size only where none is known."""
    if "CUDAExecutionProvider" not in machine.providers:
        return None
    return max(machine.gpus, key=lambda gpu: gpu.memory or 0, default=None)


def _room(machine: Machine, name: str) -> bool:
    return machine.free_disk is None or machine.free_disk >= NEEDS[name].disk * 1e9


def _fast(machine: Machine) -> str:
    """The best of the CPU's instructions for products of 8-bit integers; "" for none known."""
    best = ("amx", "vnni", "avx2", "i8mm", "dotprod")
    return next((_NAMES[name] for name in best if machine.features.get(name)), "")


def _against(name: str, machine: Machine, chosen: str, device: Device) -> Against:
    need = NEEDS[name]
    if not _room(machine, name):
        return Against(False, f"takes {need.disk:g} GB of disk, {_gb(machine.free_disk or 0)} are free")
    if device == "cuda":
        if need.gpu is None:
            return Against(False, _character(name, chosen, device))
        held = (_usable_gpu(machine) or Gpu("", None)).memory
        if held is not None and held < need.gpu * 1e9:
            return Against(False, f"needs about {need.gpu:g} GB of GPU memory, there are {_gb(held)}")
        return Against(True, _character(name, chosen, device))
    held = machine.memory
    if held is not None and held < (need.private + _OPENED) * 1e9:
        return Against(False, f"needs {need.private + _OPENED:g} GB of private memory, the machine has {_gb(held)}")
    if held is not None and held < need.peak * 1e9:
        why = f"takes about {need.peak:g} GB of memory, here are {_gb(held)}: weights would be read again and again"
        return Against(True, why)
    if name == "int8" and held is not None and held < INT8_MEMORY * 1e9:
        return Against(True, f"larger than int4; wants {INT8_MEMORY:g} GB of memory, here are {_gb(held)}")
    return Against(True, _character(name, chosen, device))


def _character(name: str, chosen: str, device: Device) -> str:
    """What speaks against a precision on a device, whatever the size of model and machine."""
    if name == "nf4":
        return "no smaller than int4; meant for adapters that QLoRA trained on an NF4 base"
    if device == "cuda":
        return {
            "fp32": "twice as large as fp16, which keeps fp32 where half precision would overflow",
            "fp16": "larger than int4",
            "bf16": "as large as fp16, with three bits less in every weight",
            "int8": "its integer products have no CUDA kernels, so they would run on the CPU",
            "int4": "only saves memory: weights are widened before a long prompt's products, so it is not faster",
        }[name]
    return {
        "fp32": f"exact, and the largest; {chosen} is smaller" + (" and faster" if chosen == "int8" else ""),
        "fp16": "the CPU widens its weights and computes in fp32: half the size of fp32, not faster",
        "bf16": "the CPU widens its weights and computes in fp32: half the size of fp32, not faster",
        "int8": "larger than int4",
        "int4": "smaller, but rounds more and is slower on long prompts; for machines with less memory",
    }[name]


def _engine_problem(machine: Machine) -> str | None:
    if machine.onnxruntime is None:
        return "onnxruntime is not installed: pip install 'm0kit[cpu]', or 'm0kit[gpu]' for NVIDIA (not both)."
    found = re.match(r"(\d+)\.(\d+)", machine.onnxruntime)
    if found and (int(found[1]), int(found[2])) < OLDEST_ONNXRUNTIME:
        oldest = ".".join(map(str, OLDEST_ONNXRUNTIME))
        return f"onnxruntime {machine.onnxruntime} is too old: artifacts need {oldest} or newer. Update it."
    return None


def _notes(machine: Machine, precision: str, device: Device) -> Iterator[str]:
    """What else its user should know."""
    if problem := _engine_problem(machine):
        yield problem
    need, cuda = NEEDS[precision], "CUDAExecutionProvider" in machine.providers
    if machine.gpus and not cuda:
        yield (
            f"{machine.gpus[0].name} is not used: this onnxruntime has no CUDA. "
            "pip install 'm0kit[gpu]' in place of [cpu], then ask again."
        )
    if cuda and not machine.gpus:
        yield "this onnxruntime has CUDA, but no NVIDIA driver answered (nvidia-smi)."
    if cuda and machine.gpus and device == "cpu":
        yield f"{machine.gpus[0].name} is not used: its memory, or the disk, is too small for what runs on a GPU."
    if device == "cuda" and (_usable_gpu(machine) or Gpu("", 0)).memory is None:
        yield f"the GPU's memory is unknown; {precision} needs about {need.gpu:g} GB. Take int4 if it has less."
    if others := [p for p in machine.providers if p not in _KNOWN_PROVIDERS]:
        yield f"also there, not considered: {', '.join(others)}."
    if not _room(machine, precision):
        yield f"{precision} takes {need.disk:g} GB of disk, {_gb(machine.free_disk or 0)} are free in this folder."
    if device == "cpu":
        yield from _cpu_notes(machine, need)


def _cpu_notes(machine: Machine, need: Need) -> Iterator[str]:
    if not _fast(machine):
        unknown = not machine.features or None in machine.features.values()
        what = "it is unknown whether this CPU has" if unknown else "this CPU has no"
        yield f"{what} instructions that make products of 8-bit integers fast; the sizes still speak for it."
    if machine.memory is None:
        yield f"the memory is unknown; int8 wants {INT8_MEMORY:g} GB. Take int4 if there is less."
    elif machine.memory < need.peak * 1e9:
        yield (
            f"even the smallest takes about {need.peak:g} GB of memory: on this machine weights are read from disk "
            "again and again, which is slow."
        )
    elif machine.available is not None and machine.available < need.peak * 1e9:
        yield f"only {_gb(machine.available)} of memory are free now; scoring a page takes {need.peak:g} GB."


# --- looking -------------------------------------------------------------------------------------------


def detect(folder: Path = Path(), root: Path = Path("/")) -> Machine:
    """This machine. `folder` is where disk space counts, `root` where /proc and /sys are found."""
    arch = {"amd64": "x86_64", "aarch64": "arm64"}.get(platform.machine().lower(), platform.machine().lower())
    system = platform.system()
    cpu, features = platform.processor() or arch, dict.fromkeys(FEATURES.get(arch, ()), None)
    memory: int | None = None
    available: int | None = None
    found: Features = features
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
    version, providers = _engine()
    return Machine(
        system, arch, cpu, found, _cores(root), memory, available, _gpus(root), version, providers, _free_disk(folder)
    )


def read_cpuinfo(text: str, arch: str) -> tuple[str, Features]:
    """Name of the CPU ("" where Linux does not say) and its instructions, from /proc/cpuinfo."""
    lines = (line.partition(":") for line in text.splitlines())
    fields = {name.strip(): value.strip() for name, _, value in lines}
    flags = fields.get("flags", fields.get("Features"))
    known = FEATURES.get(arch, ())
    if flags is None:
        return fields.get("model name", ""), dict.fromkeys(known)
    return fields.get("model name", ""), {name: bool(_FLAGS[name] & set(flags.split())) for name in known}


def read_sysctl(text: str, arch: str) -> tuple[str, int | None, Features]:
    """Name of the CPU, bytes of memory and instructions, from macOS's sysctl."""
    lines = (line.partition(":") for line in text.splitlines())
    fields = {name.strip(): value.strip() for name, _, value in lines}
    keys = {"avx2": "avx2_0", "avx512": "avx512f", "vnni": "avx512vnni", "dotprod": "arm.FEAT_DotProd"}
    keys["i8mm"] = "arm.FEAT_I8MM"

    def has(name: str) -> bool | None:
        if name == "amx":  # Intel's: no Mac ever had it
            return False
        value = fields.get(f"hw.optional.{keys[name]}")
        return None if value is None else value == "1"

    size = fields.get("hw.memsize", "")
    found = {name: has(name) for name in FEATURES.get(arch, ())}
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


def read_nvidia_smi(text: str) -> tuple[Gpu, ...]:
    """GPUs from lines of "name, MiB"; memory that the driver does not tell, as on shared memory, is None."""
    gpus = []
    for line in text.splitlines():
        name, comma, size = line.rpartition(",")
        if comma:
            gpus.append(Gpu(name.strip(), int(size) * 2**20 if size.strip().isdigit() else None))
    return tuple(gpus)


def _gpus(root: Path) -> tuple[Gpu, ...]:
    # Under WSL the tool is not always on the path.
    tool = shutil.which("nvidia-smi") or shutil.which("nvidia-smi", path=str(root / "usr/lib/wsl/lib"))
    if tool:
        found = read_nvidia_smi(_output(tool, "--query-gpu=name,memory.total", "--format=csv,noheader,nounits"))
        if found:
            return found
    # Containers may have the device without the tool.
    return (Gpu("an NVIDIA GPU", None),) if (root / "dev/nvidia0").exists() else ()


def _engine() -> tuple[str | None, tuple[str, ...]]:
    try:
        ort = sessions._onnxruntime()
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


def answers_here(folder: Path, manifest: Manifest) -> list[Answer]:
    """Score all known answers of an artifact on the device that it was made for, or the CPU where that is not there.

    Raises WrongAnswerError, and what Reranker.load raises.
    """
    device = str(manifest.recipe.get("device", "cpu"))
    there = provider_of(device) == "cuda" and "CUDAExecutionProvider" in _engine()[1]
    return Reranker.load(folder, device=device if there else "cpu").try_answers(again=True)


# --- the command ---------------------------------------------------------------------------------------


def _gb(num_bytes: float) -> str:
    return f"{num_bytes / 1e9:.1f} GB" if num_bytes >= 1e8 else f"{num_bytes / 1e6:.1f} MB"


def _device(device: Device) -> str:
    return {"cpu": "CPU", "cuda": "GPU"}[device]


def _rows(machine: Machine) -> Sequence[tuple[str, str]]:
    states = {True: "yes", False: "no", None: "unknown"}
    sizes = {gpu: "memory unknown" if gpu.memory is None else _gb(gpu.memory) for gpu in machine.gpus}
    memory = "unknown" if machine.memory is None else _gb(machine.memory)
    free = "unknown" if machine.available is None else _gb(machine.available)
    return (
        ("cpu", f"{machine.cpu}, {machine.arch}, {machine.system}; {machine.cores} cores usable"),
        ("instructions", ", ".join(f"{_NAMES[n]} {states[v]}" for n, v in machine.features.items()) or "unknown"),
        ("memory", f"{memory}, available {free}"),
        ("gpu", ", ".join(f"{gpu.name} ({size})" for gpu, size in sizes.items()) or "no NVIDIA GPU found"),
        ("onnxruntime", f"{machine.onnxruntime}: {', '.join(machine.providers)}" if machine.onnxruntime else "missing"),
        ("free disk", "unknown" if machine.free_disk is None else _gb(machine.free_disk)),
    )


@click.command()
@artifact_argument(required=False)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.pass_context
def doctor(ctx: click.Context, artifact: Path | None, as_json: bool) -> None:
    """Say which precision suits this machine and why, or whether ARTIFACT does."""
    manifest = read_manifest(artifact) if artifact else None
    machine = detect(artifact or Path())
    advice = advise(machine)
    suited = fit(machine, manifest.scheme, manifest.num_bytes) if manifest else None
    answers: list[Answer] = []
    if artifact and manifest and suited and suited.verdict != "cannot run":
        try:
            answers = answers_here(artifact, manifest)
        except WrongAnswerError as error:
            suited = Fit("cannot run", (str(error),))
    if as_json:
        facts: dict[str, Any] = {"machine": asdict(machine), "advice": asdict(advice)}
        if manifest and suited:
            facts["artifact"] = {"path": str(artifact), "scheme": manifest.scheme, "bytes": manifest.num_bytes}
            facts["artifact"] |= asdict(suited) | {"answers": [asdict(answer) for answer in answers]}
        show_json(facts)
    else:
        for name, value in _rows(machine):
            show(f"{name:12} {value}")
        show("", f"full model: {advice.precision} on the {_device(advice.device)}: {advice.why}.")
        for name, against in advice.others.items():
            show(f"  not {name}{'' if against.possible else ' (impossible here)'}: {against.why}.")
        for note in advice.notes:
            show(f"note: {note}")
        if manifest and suited:
            show("", f"{artifact}: {manifest.scheme}, {_gb(manifest.num_bytes)}: {suited.verdict}")
            for reason in suited.why:
                show(f"  {reason}")
            if suited.verdict != "cannot run":
                show(f"  known answers: {summary(answers)}")
    ctx.exit(1 if _engine_problem(machine) or (suited and suited.verdict == "cannot run") else 0)
