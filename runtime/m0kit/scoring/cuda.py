"""Starting ONNX Runtime's CUDA, with what options, and its errors in our words.

Owns where NVIDIA's libraries are found, and what CUDA's error numbers mean to a user. Which GPUs there are, and whether
an artifact fits on one, is `m0kit.scoring.gpus`'. Imports neither onnxruntime nor PyTorch: it is given the module.

    cuda.start(onnxruntime)
    onnxruntime.InferenceSession(…, providers=[("CUDAExecutionProvider", cuda.provider_options(0))])
"""

import ctypes
import re
import sys
import threading
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Final

from m0kit.errors import DeviceError, DeviceLostError, M0kitError
from m0kit.scoring import gpus
from m0kit.scoring.gpus import CUDA, Load

PROVIDER: Final = "CUDAExecutionProvider"
# What a session on CUDA is opened with. ONNX Runtime then refuses a graph of which it gives any node to the host, also
# where it has a kernel and only thinks the host faster (GetCpuPreferredNodes: arithmetic on the output of Shape and the
# like); and where CUDA does not start. CPUExecutionProvider must not be named beside it.
SESSION_CONFIG: Final = {"session.disable_cpu_ep_fallback": "1"}

# The first driver of each CUDA (release notes of the CUDA Toolkit, "minor version compatibility").
_DRIVERS: Final = {12: "525", 13: "580"}
_MISSING: Final = re.compile(r"(\S+\.so[.\d]*): cannot open shared object file")
_TOO_NEW: Final = re.compile(r"version `([\w.]+)' not found")
_starting: Final = threading.Lock()

# What ONNX Runtime's messages say: its allocator where its own limit or the GPU's end is reached, and CUDA's libraries.
_NO_MEMORY: Final = (
    "Failed to allocate memory",
    "is smaller than requested bytes",
    "CUDA failure 2:",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
)
# cudaError_t after which, in the words of CUDA's manual, "the process must be terminated and relaunched", and those
# with which a GPU is lost that fell off its bus or was taken away.
_LOST: Final = (46, 100, 201, 214, 220, 700, 702, 709, 710, 714, 715, 716, 717, 718, 719, 721, 999)
# What the libraries above CUDA say of the same, and what the kernels' own assertions do.
_LOST_WORDS: Final = (
    "CUBLAS_STATUS_EXECUTION_FAILED",
    "CUBLAS_STATUS_INTERNAL_ERROR",
    "CUDNN_STATUS_EXECUTION_FAILED",
    "cudaErrorDevicesUnavailable",
    "device-side",
)
# What it says as it opens a graph, of a node that CUDA cannot take.
_NO_KERNEL: Final = ("fallback to CPU EP has been explicitly disabled", "Could not find an implementation")
_CUDA_FAILURE: Final = re.compile(r"\bCUDA failure (\d+)")


def start(onnxruntime: Any, load: Load = ctypes.CDLL) -> gpus.Devices:
    """Load what CUDA needs from NVIDIA's wheels, or from where the system has it. Thread-safe; again costs little.

    Returns the GPUs that there are, one at least.

    Raises DeviceError that says what is missing or too old, and what to do.
    """
    available = onnxruntime.get_available_providers()
    if PROVIDER not in available:
        hint = both_installed() or "pip install 'm0kit[gpu]' in place of [cpu]."
        raise DeviceError(f"device cuda: this onnxruntime has {', '.join(available)}, not {PROVIDER}. {hint}")
    with _starting:
        # What it prints of libraries that it does not find would stand in the middle of our output. Its own name for
        # `print` is replaced, since other threads may be printing.
        onnxruntime.print = lambda *_: None
        try:
            onnxruntime.preload_dlls()
        finally:
            del onnxruntime.print
    # Every error of CUDA would go to stderr, with this machine's name; it is raised as well.
    onnxruntime.set_default_logger_severity(4)
    needed = str(getattr(onnxruntime, "cuda_version", "") or "").partition(".")[0]
    package = f"onnxruntime-gpu {onnxruntime.__version__}"
    found = gpus.devices(load)
    if found.cuda is not None and needed.isdigit() and found.cuda[0] < int(needed):
        runs = ".".join(map(str, found.cuda))
        oldest = f"{_DRIVERS[int(needed)]} or newer" if int(needed) in _DRIVERS else "a newer one"
        raise DeviceError(
            f"device cuda: the NVIDIA driver{f' {found.driver}' if found.driver else ''} is too old: it runs CUDA up "
            f"to {runs}, and {package} is made for CUDA {needed}. Update the driver to {oldest}; or say device 'cpu'."
        )
    if not found.gpus:
        raise DeviceError(f"device cuda: {found.why}; or say device 'cpu'.")
    if sys.platform == "linux":  # elsewhere the loader does not say what it misses
        _load_provider(Path(onnxruntime.__file__).parent / "capi" / "libonnxruntime_providers_cuda.so", package, load)
    return found


def _load_provider(library: Path, package: str, load: Load) -> None:
    """Raises DeviceError that names the library it needs and does not find in any wheel, nor in the system."""
    seen: set[str] = set()
    while True:
        try:
            load(str(library))
        except OSError as error:
            said = str(error)
        else:
            return
        if "Provider_GetHost" in said:  # which ONNX Runtime gives it as it loads it: all else is there
            return
        match = _MISSING.search(said)
        if match is None:
            new = _TOO_NEW.search(said)
            why = f"this system's libraries are too old for it ({new[1]} is missing)" if new else "it cannot be loaded"
            raise DeviceError(f"device cuda: {library}: {why}. {both_installed() or f'Install {package} again.'}")
        missing = Path(match[1]).name
        if missing == library.name:
            raise DeviceError(f"device cuda: {library} is missing. {both_installed() or f'Install {package} again.'}")
        # Wheels may lie elsewhere than onnxruntime does, where pip installed some for one user or into one environment.
        other = next(_in_wheels(missing), None)
        if other is None or missing in seen:
            raise DeviceError(_missing(missing, package))
        seen.add(missing)
        try:
            load(str(other))
        except OSError:
            raise DeviceError(_missing(missing, package)) from None


def _in_wheels(name: str) -> Iterator[Path]:
    """Files of that name, or pattern, in NVIDIA's wheels on Python's path."""
    for entry in filter(None, dict.fromkeys(sys.path)):
        yield from sorted(Path(entry).glob(f"nvidia/*/lib/{name}"))


def _missing(name: str, package: str) -> str:
    if name == CUDA:
        return f"device cuda: {gpus.NO_DRIVER}; or say device 'cpu'."
    stem = name.partition(".so")[0]
    other = next(_in_wheels(f"{stem}.so.*"), None)
    wrong = f" (there is {other.name}, which is of another CUDA)" if other else ""
    return (
        f"device cuda: {name} is missing{wrong}, which {package} needs. pip install 'm0kit[gpu]' brings it; "
        "or say device 'cpu'."
    )


def both_installed() -> str:
    """What to do where both of onnxruntime's packages are installed, of which one overwrites the other; else ""."""
    found = []
    for name in ("onnxruntime", "onnxruntime-gpu"):
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            return ""
    return (
        f"{' and '.join(found)} are both installed, and overwrite each other's files. "
        "pip uninstall both, then pip install 'm0kit[gpu]'."
    )


def provider_options(device_id: int = 0, memory_limit: int | None = None) -> dict[str, str]:
    """Options of CUDAExecutionProvider for one GPU. `memory_limit`: bytes that the session's own arena may take.

    Weights and inner values come from that arena; CUDA itself, its libraries and what a caller allocates do not.
    """
    options = {
        "device_id": str(device_id),
        "use_tf32": "0",  # products of float32 keep all of its 24 bits
        "arena_extend_strategy": "kSameAsRequested",  # not twice as much whenever a longer prompt comes
        "enable_skip_layer_norm_strict_mode": "1",  # norms are summed in float32
    }
    if memory_limit is not None:
        options["gpu_mem_limit"] = str(memory_limit)
    return options


def told(error: Exception, device_id: int = 0, load: Load = ctypes.CDLL) -> M0kitError:
    """What ONNX Runtime raised on CUDA, in our words: DeviceLostError where the process must be started again."""
    if isinstance(error, M0kitError):
        return error
    text = str(error)
    if any(words in text for words in _NO_MEMORY):
        free = gpus.free_memory(device_id, load)
        return M0kitError(
            f"the memory of the GPU cuda:{device_id} ran out"
            f"{'' if free is None else f' ({free / 1e9:.1f} GB are free beside what this process holds)'}. Lower "
            "max_pixels or the length of the documents, or how much is kept in its memory, end what else uses it, or "
            "take an artifact in int4."
        )
    match = _CUDA_FAILURE.search(text)
    code = int(match[1]) if match else 0
    if code in _LOST or any(words in text for words in _LOST_WORDS):
        return DeviceLostError(
            f"the GPU cuda:{device_id} was lost while it computed{f' (CUDA error {code})' if code else ''}. This "
            "process cannot use it any more: start it again. If it comes again, see what nvidia-smi and the "
            "system's log tell of that GPU (Xid)."
        )
    if code == 35:  # cudaErrorInsufficientDriver
        return DeviceError("the NVIDIA driver is too old for this onnxruntime-gpu. `m0kit doctor` says what it needs.")
    if code == 209:  # cudaErrorNoKernelImageForDevice
        return DeviceError(
            f"onnxruntime-gpu has no kernels for the GPU cuda:{device_id}, which is too old or too new for it. "
            "Say device 'cpu', or install another version."
        )
    if any(words in text for words in _NO_KERNEL):
        return DeviceError(
            "this onnxruntime-gpu has no CUDA kernel for one of the graph's nodes, and m0kit does not move work to the "
            "host's CPU by itself. Install the version that m0kit[gpu] names, or say device 'cpu'."
        )
    return M0kitError(
        f"ONNX Runtime failed on the GPU cuda:{device_id} ({type(error).__name__}"
        f"{f', CUDA error {code}' if code else ''}). Score it on the CPU to see whether it is this input."
    )
