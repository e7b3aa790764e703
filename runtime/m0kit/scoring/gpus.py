"""What NVIDIA GPUs there are, as the driver's own libraries tell: no PyTorch, no nvidia-smi.

Owns what a GPU is, which of them a device string names, and whether an artifact can run on one. Starting ONNX Runtime
on it is `m0kit.scoring.cuda`'s.

    devices().gpus[0].free          # bytes
    named("cuda:0,cuda:1")          # (0, 1)

Functions and numbers are those of NVIDIA's cuda.h and nvml.h, which keep them from version to version.
"""

import ctypes
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

from m0kit.errors import DeviceError
from m0kit.precision import GIGABYTES, supported

Load = Callable[[str], Any]  # a library's file name → its functions; OSError where it cannot be loaded

# CUDA and what manages GPUs; both come with the driver, whose kernel module they speak to.
CUDA, _NVML = ("nvcuda.dll", "nvml.dll") if sys.platform == "win32" else ("libcuda.so.1", "libnvidia-ml.so.1")
NO_DRIVER: Final = (
    f"there is no NVIDIA driver here ({CUDA}). Install the driver for this system; a container gets the host's with "
    "`--gpus all`"
)
# Bytes beside the weights, an allowance that was not measured: what an engine sets aside on a small GPU for libraries,
# work space and inner values of a run (1.4 GB), one document of 10,240 tokens (0.3), and CUDA itself (0.5).
ALLOWANCE: Final = 2_200_000_000
# Compute capabilities: the first that CUDA 13 makes kernels for (Turing: T4, GTX 16xx), and that has bf16 and, in ONNX
# Runtime, flash attention (Ampere). onnxruntime-gpu 1.31.1 has kernels for 7.5, 8.0, 8.6, 8.9, 9.0 and 12.0, and none
# that a driver could compile for others.
_OLDEST: Final = (7, 5)
_AMPERE: Final = (8, 0)

_MAJOR, _MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_…
_TEXT_BYTES: Final = 96  # of a name (cuDeviceGetName ends it where it must), or of a version (NVML's own limit is 80)
# CUresult → what is wrong, where the driver is there.
_WHY: Final = {
    3: "CUDA was started in this process before it was forked. Start processes with spawn, or load after the fork",
    46: "its GPUs are busy or gone: another process may have one to itself (nvidia-smi tells)",
    100: "the NVIDIA driver shows no GPU. See to CUDA_VISIBLE_DEVICES, and to what the container is given (--gpus all)",
    101: "CUDA_VISIBLE_DEVICES names a GPU that is not there",
    802: "the NVIDIA driver is still starting (on machines with NVSwitch: nvidia-fabricmanager must run)",
    803: "the NVIDIA driver was updated, and the old one is still loaded. Restart the machine",
}


@dataclass(frozen=True, slots=True)
class Gpu:
    """An NVIDIA GPU, or a share of one (MIG). None is what the driver does not tell."""

    name: str
    memory: int | None  # bytes
    free: int | None = None  # bytes of these that no process holds
    capability: tuple[int, int] | None = None  # "compute capability": (9, 0) is sm90
    driver: str | None = None  # its version, "580.65.06"

    @property
    def is_too_old(self) -> bool:
        """Whether CUDA 13 has no kernels for it."""
        return self.capability is not None and self.capability < _OLDEST

    @property
    def is_ampere(self) -> bool:
        """Whether it computes in bfloat16, and with flash attention: as new as Ampere."""
        return self.capability is None or self.capability >= _AMPERE


class Devices(NamedTuple):
    """The GPUs that this process may use, in CUDA's order: `gpus[1]` is "cuda:1"."""

    gpus: tuple[Gpu, ...]
    why: str = ""  # there are none
    cuda: tuple[int, int] | None = None  # the newest that the driver runs
    driver: str | None = None


def devices(load: Load = ctypes.CDLL) -> Devices:
    """All that CUDA_VISIBLE_DEVICES leaves, or why there are none. Never raises; takes no memory of a GPU."""
    try:
        cuda = load(CUDA)
    except OSError:
        return Devices((), NO_DRIVER)
    try:
        with _Management(load) as management:
            version = ctypes.c_int()
            newest = None
            if cuda.cuDriverGetVersion(ctypes.byref(version)) == 0 and version.value:
                newest = version.value // 1000, version.value % 1000 // 10
            code, number = cuda.cuInit(0), ctypes.c_int()
            code = code or cuda.cuDeviceGetCount(ctypes.byref(number)) or (0 if number.value else 100)
            if code:
                return Devices((), _why(code), newest, management.driver)
            gpus = tuple(_gpu(cuda, index, management) for index in range(number.value))
            return Devices(gpus, "", newest, management.driver)
    except AttributeError:  # a function that every driver since 2017 has
        return Devices((), f"{CUDA} is none of NVIDIA's drivers, or a very old one. Update the driver")


def _why(code: int) -> str:
    return _WHY.get(code, f"the NVIDIA driver does not start (CUDA error {code}). See what nvidia-smi tells")


def _gpu(cuda: Any, index: int, management: "_Management") -> Gpu:
    device, memory, major, minor = ctypes.c_int(), ctypes.c_size_t(), ctypes.c_int(), ctypes.c_int()
    name, bus = ctypes.create_string_buffer(_TEXT_BYTES), ctypes.create_string_buffer(_TEXT_BYTES)
    if cuda.cuDeviceGet(ctypes.byref(device), index):
        return Gpu("an NVIDIA GPU", None)
    cuda.cuDeviceGetName(name, _TEXT_BYTES, device)
    has_memory = cuda.cuDeviceTotalMem_v2(ctypes.byref(memory), device) == 0
    known = [
        cuda.cuDeviceGetAttribute(ctypes.byref(found), which, device) == 0
        for found, which in ((major, _MAJOR), (minor, _MINOR))
    ]
    is_on_bus = cuda.cuDeviceGetPCIBusId(bus, _TEXT_BYTES, device) == 0
    total = memory.value if has_memory else None
    return Gpu(
        name.value.decode("utf-8", "replace") or "an NVIDIA GPU",
        total,
        management.free(bus.value, total) if is_on_bus else None,
        (major.value, minor.value) if all(known) else None,
        management.driver,
    )


class _Management:
    """NVML, which may be missing: free memory without a context, which would itself take some 0.3 GB."""

    def __init__(self, load: Load) -> None:
        self.driver: str | None = None
        try:
            self._nvml = load(_NVML)
            self._is_there = self._nvml.nvmlInit_v2() == 0
        except (OSError, AttributeError):
            self._is_there = False

    def __enter__(self) -> "_Management":
        version = ctypes.create_string_buffer(_TEXT_BYTES)
        if self._is_there and self._nvml.nvmlSystemGetDriverVersion(version, _TEXT_BYTES) == 0:
            self.driver = version.value.decode("ascii", "replace")
        return self

    def __exit__(self, *_: object) -> None:
        if self._is_there:
            self._nvml.nvmlShutdown()

    def free(self, bus: bytes, total: int | None) -> int | None:
        """By the place on the bus: NVML counts all GPUs of the machine, whatever CUDA_VISIBLE_DEVICES says."""
        handle, memory = ctypes.c_void_p(), (ctypes.c_ulonglong * 3)()  # nvmlMemory_t: total, free, used
        if not self._is_there or total is None:
            return None
        if self._nvml.nvmlDeviceGetHandleByPciBusId_v2(bus, ctypes.byref(handle)):
            return None
        if self._nvml.nvmlDeviceGetMemoryInfo(handle, memory):
            return None
        # A share of a GPU (MIG) is on its bus; what is free of the whole says nothing of the share. The driver keeps
        # some hundred MB of a whole one for itself.
        return None if total < 0.9 * memory[0] else min(int(memory[1]), total)


def free_memory(device_id: int = 0, load: Load = ctypes.CDLL) -> int | None:
    """Bytes free on a GPU as this process sees them, a share of one (MIG) too; None where it cannot be asked.

    Makes CUDA's context on it where there is none yet (0.3 s, some 0.3 GB), and leaves one that is there as it is.
    """
    device, context = ctypes.c_int(), ctypes.c_void_p()
    free, total = ctypes.c_size_t(), ctypes.c_size_t()
    try:
        cuda = load(CUDA)
        if cuda.cuInit(0) or cuda.cuDeviceGet(ctypes.byref(device), device_id):
            return None
        if cuda.cuDevicePrimaryCtxRetain(ctypes.byref(context), device):
            return None
        try:
            if cuda.cuCtxPushCurrent_v2(context):
                return None
            code = cuda.cuMemGetInfo_v2(ctypes.byref(free), ctypes.byref(total))
            cuda.cuCtxPopCurrent_v2(ctypes.byref(ctypes.c_void_p()))
        finally:
            cuda.cuDevicePrimaryCtxRelease_v2(device)
    except (OSError, AttributeError):
        return None
    return None if code else free.value


# --- which ---------------------------------------------------------------------------------------------


def named(device: str) -> tuple[int, ...]:
    """The GPUs that a device string names: "cuda" is (0,), "cuda:0,cuda:1" is (0, 1); () where it names no GPU at all.

    Raises DeviceError for one that names a GPU beside something else, or twice.
    """
    parts = [part.strip() for part in device.split(",")]
    found = [re.fullmatch(r"(?:cuda|CUDAExecutionProvider)(?::(\d{1,4}))?", part, re.ASCII) for part in parts]
    if not any(found):
        return ()
    for part, match in zip(parts, found, strict=True):
        if match is None:
            raise DeviceError(
                f"device {device!r}: {part!r} cannot stand beside GPUs, as it would compute other scores. "
                "Name GPUs alone: cuda:0,cuda:1."
            )
    ids = tuple(int(match[1] or 0) for match in found if match)
    if len(set(ids)) < len(ids):
        raise DeviceError(f"device {device!r} names a GPU twice. Name each once: cuda:0,cuda:1.")
    return ids


def chosen(device_id: int, found: Devices) -> Gpu:
    """The GPU of that number. Raises DeviceError where there is none."""
    if not found.gpus:
        raise DeviceError(f"device cuda: {found.why}; or say device 'cpu'.")
    if device_id >= len(found.gpus):
        there = ", ".join(f"cuda:{index} ({gpu.name})" for index, gpu in enumerate(found.gpus))
        raise DeviceError(
            f"device 'cuda:{device_id}' is not there; there are {there}. "
            "CUDA_VISIBLE_DEVICES may hide others, and numbers those that are left from 0."
        )
    return found.gpus[device_id]


# --- whether it fits -----------------------------------------------------------------------------------


def problem(gpu: Gpu, schemes: tuple[str, ...], num_bytes: int, limit: int | None = None) -> str:
    """Why weights of `num_bytes`, stored in these schemes, the main one first, do not run on a GPU; "" where they do.

    `limit`: the bytes of the GPU's memory that this process may take. What is not known speaks for the GPU.
    """
    has = ".".join(map(str, gpu.capability or ()))
    if gpu.is_too_old:
        return f"{gpu.name} is too old (compute capability {has}; CUDA 13 has kernels from 7.5 on). Take another device"
    if "bf16" in schemes and not gpu.is_ampere:
        return f"{gpu.name} has no bf16 (compute capability {has}; it came with 8.0). Export it in fp16"
    room = _room(gpu, limit)
    if room is None or num_bytes + ALLOWANCE <= room:
        return ""
    allowed = "is free" if limit is None or room != limit else "is allowed"
    told = f"it takes {(num_bytes + ALLOWANCE) / 1e9:.1f} GB on {gpu.name}, of which {room / 1e9:.1f} GB {allowed}"
    if fitting := fits(gpu, schemes[0], num_bytes, limit):
        return f"{told}. Export it in {fitting[0]}, which fits, or free memory of that GPU"
    return f"{told}, too little for any precision. Free memory of that GPU, or take another device"


def check(gpu: Gpu, schemes: tuple[str, ...], num_bytes: int, what: str, limit: int | None = None) -> None:
    """Raises DeviceError that names `what` where `problem` finds one."""
    if said := problem(gpu, schemes, num_bytes, limit):
        raise DeviceError(f"{what}: {said}.")


def fits(gpu: Gpu, scheme: str, num_bytes: int, limit: int | None = None) -> tuple[str, ...]:
    """The precisions in which a model runs on a GPU, largest first, if it takes `num_bytes` in `scheme`."""
    whole = num_bytes / GIGABYTES.get(scheme, GIGABYTES["fp16"])
    return tuple(
        name
        for name, size in sorted(GIGABYTES.items(), key=lambda item: -item[1])
        if name in supported("cuda") and _fits(gpu, name, size * whole, limit)
    )


def _fits(gpu: Gpu, name: str, num_bytes: float, limit: int | None) -> bool:
    room = _room(gpu, limit)
    can = not gpu.is_too_old and (name != "bf16" or gpu.is_ampere)
    return can and (room is None or num_bytes + ALLOWANCE <= room)


def _room(gpu: Gpu, limit: int | None) -> int | None:
    """Bytes that this process may take."""
    free = gpu.memory if gpu.free is None else gpu.free
    return min((size for size in (free, limit) if size is not None), default=None)
