"""Which precision suits a machine, and why. Pure, so that it can be tested over machines nobody has at hand.

    advise(detect()).precision                       # "int8"
    fit(detect(), "fp32", 8_900_000_000).verdict     # "works"

Owns what the full model needs in each precision (`NEEDS`) and the rules (`advise`, `fit`); what a machine is belongs to
`m0kit.machine.detect`. GB are 10⁹ bytes.
"""

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Final, Literal

from m0kit.machine.detect import FEATURE_NAMES, Gpu, Machine

Device = Literal["cpu", "cuda"]


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
    if problem := engine_problem(machine):
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
        needs = f"it needs {in_gb(private)} of private memory, the machine has {in_gb(machine.memory)}"
        return Fit("cannot run", (f"{needs}. Run it on a larger one.",))
    if machine.memory is not None and machine.memory < peak:
        why.append(
            f"its weights do not stay in {in_gb(machine.memory)} of memory (it takes about {in_gb(peak)}), so they are "
            "read from disk again and again: slow"
        )
    elif machine.available is not None and machine.available < peak:
        why.append(f"it takes about {in_gb(peak)} and only {in_gb(machine.available)} of memory are free now")
    if scheme not in NEEDS:
        why.append(f"this m0kit knows nothing of the precision {scheme}")
    elif scheme != advice.precision:
        reason = _character(scheme, advice.precision, advice.device)
        why.append(
            f"{advice.precision} on the {device_name(advice.device)} suits this machine better. {scheme}: {reason}"
        )
    if why:
        return Fit("works", tuple(why))
    return Fit("suits", (f"{scheme} on the {device_name(advice.device)} is what suits this machine",))


def _choose(machine: Machine) -> tuple[Device, str, str]:
    gpu = _usable_gpu(machine)
    if gpu:
        held = math.inf if gpu.memory is None else gpu.memory / 1e9
        for name in ("fp16", "int4"):
            if held >= (NEEDS[name].gpu or math.inf) and _room(machine, name):
                has = (
                    ""
                    if gpu.memory is None
                    else f" with {in_gb(gpu.memory)}; {name} needs about {NEEDS[name].gpu:g} GB"
                )
                return "cuda", name, f"{gpu.name} through CUDA{has}"
    fast = _fast(machine)
    if not _room(machine, "int8"):
        return "cpu", "int4", f"the smallest; for int8's {NEEDS['int8'].disk:g} GB the disk has no room"
    if machine.memory is not None and machine.memory < INT8_MEMORY * 1e9:
        held = machine.memory
        return "cpu", "int4", f"with {in_gb(held)} of memory the smallest; int8 wants {INT8_MEMORY:g} GB"
    size = f"a third of fp32's size; {in_gb(machine.memory)} are there" if machine.memory else "a third of fp32's size"
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
    return next((FEATURE_NAMES[name] for name in best if machine.features.get(name)), "")


def _against(name: str, machine: Machine, chosen: str, device: Device) -> Against:
    need = NEEDS[name]
    if not _room(machine, name):
        return Against(False, f"takes {need.disk:g} GB of disk, {in_gb(machine.free_disk or 0)} are free")
    if device == "cuda":
        if need.gpu is None:
            return Against(False, _character(name, chosen, device))
        held = (_usable_gpu(machine) or Gpu("", None)).memory
        if held is not None and held < need.gpu * 1e9:
            return Against(False, f"needs about {need.gpu:g} GB of GPU memory, there are {in_gb(held)}")
        return Against(True, _character(name, chosen, device))
    held = machine.memory
    if held is not None and held < (need.private + _OPENED) * 1e9:
        return Against(False, f"needs {need.private + _OPENED:g} GB of private memory, the machine has {in_gb(held)}")
    if held is not None and held < need.peak * 1e9:
        why = f"takes about {need.peak:g} GB of memory, here are {in_gb(held)}: weights would be read again and again"
        return Against(True, why)
    if name == "int8" and held is not None and held < INT8_MEMORY * 1e9:
        return Against(True, f"larger than int4; wants {INT8_MEMORY:g} GB of memory, here are {in_gb(held)}")
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


def engine_problem(machine: Machine) -> str | None:
    """Why nothing can be scored with the ONNX Runtime that is there; None where it can."""
    if machine.onnxruntime is None:
        return "onnxruntime is not installed: pip install 'm0kit[cpu]', or 'm0kit[gpu]' for NVIDIA (not both)."
    found = re.match(r"(\d+)\.(\d+)", machine.onnxruntime)
    if found and (int(found[1]), int(found[2])) < OLDEST_ONNXRUNTIME:
        oldest = ".".join(map(str, OLDEST_ONNXRUNTIME))
        return f"onnxruntime {machine.onnxruntime} is too old: artifacts need {oldest} or newer. Update it."
    return None


def _notes(machine: Machine, precision: str, device: Device) -> Iterator[str]:
    """What else its user should know."""
    if problem := engine_problem(machine):
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
        yield f"{precision} takes {need.disk:g} GB of disk, {in_gb(machine.free_disk or 0)} are free in this folder."
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
        yield f"only {in_gb(machine.available)} of memory are free now; scoring a page takes {need.peak:g} GB."


def in_gb(num_bytes: float) -> str:
    """For people: "2.4 GB", "12.0 MB"."""
    return f"{num_bytes / 1e9:.1f} GB" if num_bytes >= 1e8 else f"{num_bytes / 1e6:.1f} MB"


def device_name(device: Device) -> str:
    """For people."""
    return {"cpu": "CPU", "cuda": "GPU"}[device]
