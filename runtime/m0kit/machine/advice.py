"""Which precision suits a machine, and why. Pure, so that it can be tested over machines nobody has at hand.

    advise(detect()).precision                       # "int8"
    fit(detect(), "fp32", 8_900_000_000).verdict     # "works"

Owns what the full model needs in each precision (`NEEDS`) and the rules (`advise`, `fit`); what a machine is belongs to
`m0kit.machine.detect`. GB are 10⁹ bytes.
"""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final, Literal

from m0kit.machine.detect import FEATURE_NAMES, Machine
from m0kit.precision import GIGABYTES, supported
from m0kit.scoring import gpus
from m0kit.scoring.gpus import Gpu

Device = Literal["cpu", "cuda"]


@dataclass(frozen=True, slots=True)
class Need:
    """What the full model (2.4 billion parameters) takes in one precision, in GB."""

    disk: float
    peak: float  # resident on the CPU while scoring a page of 768 visual tokens, mapped weights counted
    private: float  # with memory="low", what of the peak cannot be given back to the system

    @property
    def gpu(self) -> float:
        """GPU memory: the weights, and an allowance for all else."""
        return round(self.disk + gpus.ALLOWANCE / 1e9, 1)


# Measured.
NEEDS: Final[Mapping[str, Need]] = {
    "fp32": Need(GIGABYTES["fp32"], 8.3, 0.35),
    "fp16": Need(GIGABYTES["fp16"], 5.1, 1.4),
    "bf16": Need(GIGABYTES["bf16"], 5.1, 1.4),
    "int8": Need(GIGABYTES["int8"], 2.4, 0.35),
    "int4": Need(GIGABYTES["int4"], 1.7, 1.0),
    "nf4": Need(GIGABYTES["nf4"], 1.6, 0.4),
}
# From here on int8's peak leaves the rest of the system as much again as it needs itself.
INT8_MEMORY: Final = 4.8
OLDEST_ONNXRUNTIME: Final = (1, 30)  # as in pyproject.toml, with the reason there
_OPENED: Final = 0.15  # GB of a process that opened an artifact of any size; measured

# Azure's is in every wheel and computes elsewhere; TensorRT's is in every one with CUDA and has libraries of its own.
_KNOWN_PROVIDERS: Final = tuple(f"{name}ExecutionProvider" for name in ("CPU", "CUDA", "Azure", "Tensorrt"))


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


@dataclass(frozen=True, slots=True)
class OnGpu:
    """What of an artifact's model runs on one GPU with what is free there now."""

    device: str  # "cuda:1"
    problem: str  # why not the artifact itself; "" where it runs
    fits: tuple[str, ...]  # the precisions in which it does, largest first


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
    scaled = tuple(replace(g, memory=None if g.memory is None else int(g.memory * scale)) for g in machine.gpus)
    held = None if machine.memory is None else int(machine.memory * scale)
    advice = advise(replace(machine, memory=held, gpus=scaled, free_disk=None))
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


def on_gpus(machine: Machine, schemes: Sequence[str], num_bytes: int) -> tuple[OnGpu, ...]:
    """Each GPU that is seen, for an artifact of `num_bytes` stored in these schemes, the main one first."""
    problem = ""
    if "CUDAExecutionProvider" not in machine.providers:
        problem = "this onnxruntime has no CUDA"
    elif machine.cuda:
        problem = "CUDA does not start"
    elif lacking := [scheme for scheme in schemes if scheme not in supported("cuda")]:
        problem = f"there are no CUDA kernels for {lacking[0]}"
    return tuple(
        OnGpu(
            f"cuda:{index}",
            problem or gpus.problem(gpu, tuple(schemes), num_bytes),
            gpus.fits(gpu, schemes[0], num_bytes),
        )
        for index, gpu in enumerate(machine.gpus)
    )


def _choose(machine: Machine) -> tuple[Device, str, str]:
    gpu = _usable_gpu(machine)
    if gpu:
        held = math.inf if gpu.memory is None else gpu.memory / 1e9
        for name in ("fp16", "int8", "int4"):
            if held >= NEEDS[name].gpu and _room(machine, name):
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
    if "CUDAExecutionProvider" not in machine.providers or machine.cuda:
        return None
    usable = (gpu for gpu in machine.gpus if not gpu.is_too_old)
    return max(usable, key=lambda gpu: gpu.memory or 0, default=None)


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
        gpu = _usable_gpu(machine) or Gpu("", None)
        if name == "bf16" and not gpu.is_ampere:
            return Against(False, f"{gpu.name} has no bf16, which came with compute capability 8.0")
        held = gpu.memory
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
        saves = "only saves memory: weights are widened before a long prompt's products, so it is not faster"
        return {
            "fp32": "twice as large as fp16, which keeps fp32 where half precision would overflow",
            "fp16": f"larger than {chosen}",
            "bf16": "as large as fp16, with three bits less in every weight",
            "int8": saves if chosen == "fp16" else "larger than int4",
            "int4": saves if chosen == "fp16" else "smaller, but rounds more",
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
    if machine.cuda:
        yield machine.cuda
    elif machine.gpus and not cuda:
        yield (
            f"{machine.gpus[0].name} is not used: this onnxruntime has no CUDA. "
            "pip install 'm0kit[gpu]' in place of [cpu], then ask again."
        )
    elif machine.gpus and not _usable_gpu(machine):
        yield f"{machine.gpus[0].name} is not used: CUDA 13 has kernels from compute capability 7.5 on."
    elif machine.gpus and device == "cpu":
        yield f"{machine.gpus[0].name} is not used: its memory, or the disk, is too small for what runs on a GPU."
    if device == "cuda" and (gpu := _usable_gpu(machine)) and not gpu.is_ampere:
        yield (
            f"{gpu.name} is older than Ampere (compute capability 8.0): ONNX Runtime has no flash attention for it. It "
            "computes the same, and long documents more slowly."
        )
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
