"""One NVIDIA GPU: its memory, copies to and from it, and the sessions of graphs that run on it.

CUDA's own runtime library is called directly, as ONNX Runtime's Python has no memory of a given size, no copies of
columns and no pinned memory. It is there wherever ONNX Runtime's CUDA provider is. Bookkeeping is the engine's.

    device = CudaDevice(0)
    pool = device.allocate(num_bytes)
    head = device.open(folder, "head.cuda")
"""

import ctypes
import os
import sys
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from m0kit.scoring import cuda, gpus
from m0kit.scoring.device import Array, Placed
from m0kit.scoring.sessions import onnxruntime

_KIND: Final = 4  # cudaMemcpyDefault: which side is which, the addresses tell
_BFLOAT16: Final = 16  # of ONNX's types, as numpy has no such


class CudaDevice:
    """One NVIDIA GPU. What goes wrong on it is raised as `cuda.told` has it."""

    def __init__(self, index: int, memory_limit: int | None = None) -> None:
        """`memory_limit`: bytes that this process may take of it in all. Raises DeviceError, DependencyError."""
        self.index = index
        self._ort = onnxruntime()
        self.gpu = gpus.chosen(index, cuda.start(self._ort))
        self._runtime = ctypes.CDLL(_runtime_name(self._ort))  # which is loaded by now
        self._runtime.cudaGetErrorString.restype = ctypes.c_char_p
        self._limit = memory_limit
        self._set()
        # Before CUDA itself took some half a gigabyte, which counts.
        self._before = self.gpu.free or self._memory()[0]
        self._blocks: list[int] = []
        weakref.finalize(self, _release, self._runtime, self._blocks, os.getpid())

    def allocate(self, num_bytes: int) -> int:
        address = ctypes.c_void_p()
        self._set()
        self._check(self._runtime.cudaMalloc(ctypes.byref(address), ctypes.c_size_t(max(num_bytes, 1))))
        self._blocks.append(int(address.value or 0))
        return self._blocks[-1]

    def free(self, address: int) -> None:
        self._set()
        self._blocks.remove(address)
        self._check(self._runtime.cudaFree(ctypes.c_void_p(address)))

    def free_bytes(self) -> int:
        self._set()
        free, _ = self._memory()
        return free if self._limit is None else min(free, self._limit - (self._before - free))

    def pinned(self, num_bytes: int) -> NDArray[np.uint8]:
        address = ctypes.c_void_p()
        self._set()
        self._check(self._runtime.cudaHostAlloc(ctypes.byref(address), ctypes.c_size_t(num_bytes), ctypes.c_uint(0)))
        block = (ctypes.c_uint8 * num_bytes).from_address(int(address.value or 0))
        weakref.finalize(block, _unpin, self._runtime, int(address.value or 0), os.getpid())  # with its last array
        return np.ctypeslib.as_array(block)

    def copy(
        self, target: int, source: int, width: int, rows: int = 1, target_pitch: int = 0, source_pitch: int = 0
    ) -> None:
        sizes = (target_pitch or width, source, source_pitch or width, width, rows)
        self._set()
        self._check(
            self._runtime.cudaMemcpy2D(
                ctypes.c_void_p(target), ctypes.c_size_t(sizes[0]), ctypes.c_void_p(sizes[1]),
                *(ctypes.c_size_t(size) for size in sizes[2:]), ctypes.c_int(_KIND),
            )
        )  # fmt: skip
        # Between two places of the device it would go on behind us, beside the runs of graphs.
        self._check(self._runtime.cudaDeviceSynchronize())

    def open(self, folder: Path, name: str) -> "CudaGraph":
        """Raises DeviceError and what `cuda.told` makes of what goes wrong."""
        ort = self._ort
        options = ort.SessionOptions()
        for key, value in {**cuda.SESSION_CONFIG, "session.load_model_format": "ONNX"}.items():
            options.add_session_config_entry(key, value)
        options.enable_mem_pattern = False  # patterns are kept per shape; here every run has its own
        options.log_severity_level = 4  # it would print errors to stderr by itself, and raise
        # Vectors that are narrowed once, when the graph is opened, need constants folded; no fusion is left to find.
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
        limit = None if self._limit is None else max(self.free_bytes(), 1)
        providers = [(cuda.PROVIDER, cuda.provider_options(self.index, limit))]
        try:
            session = ort.InferenceSession(
                str(folder / f"{name}.onnx"), options, providers=providers, enable_fallback=False
            )
        except Exception as error:  # it raises its own, and whatever the C++ library beneath it throws
            raise cuda.told(error, self.index) from error
        return CudaGraph(ort, session, self.index, self._runtime)

    def _memory(self) -> tuple[int, int]:
        free, total = ctypes.c_size_t(), ctypes.c_size_t()
        self._check(self._runtime.cudaMemGetInfo(ctypes.byref(free), ctypes.byref(total)))
        return free.value, total.value

    def _set(self) -> None:
        """Which GPU is meant is a thread's own."""
        self._check(self._runtime.cudaSetDevice(ctypes.c_int(self.index)))

    def _check(self, code: int) -> None:
        if code:
            name = self._runtime.cudaGetErrorString(ctypes.c_int(code)).decode("utf-8", "replace")
            raise cuda.told(RuntimeError(f"CUDA failure {code}: {name}"), self.index)


class CudaGraph:
    """One graph in a session with all of its nodes on the GPU. For one thread."""

    def __init__(self, ort: Any, session: Any, index: int, runtime: Any) -> None:
        self.session, self._runtime = session, runtime
        self._binding = session.io_binding()
        self._options = ort.RunOptions()
        self._index = index

    def bind(self, values: Mapping[str, Placed]) -> None:
        inputs = {port.name for port in self.session.get_inputs()}
        for name, value in values.items():
            self._bind(self._binding.bind_input if name in inputs else self._binding.bind_output, name, value)

    def run(self, inputs: Mapping[str, Array | Placed], outputs: Mapping[str, Array | Placed]) -> None:
        try:
            for name, value in inputs.items():
                if isinstance(value, Placed):
                    self._bind(self._binding.bind_input, name, value)
                else:
                    self._binding.bind_cpu_input(name, value)
            for name, value in outputs.items():
                if isinstance(value, Placed):
                    self._bind(self._binding.bind_output, name, value)
                else:
                    self._binding.bind_output(name, "cpu", 0, value.dtype, value.shape, value.ctypes.data)
            self.session.run_with_iobinding(self._binding, self._options)
        except Exception as error:  # it raises its own, and whatever the C++ library beneath it throws
            self._runtime.cudaDeviceSynchronize()  # what was queued before may write to pages that go to others now
            raise cuda.told(error, self._index) from error

    def _bind(self, bind: Any, name: str, value: Placed) -> None:
        kind = _BFLOAT16 if value.dtype == "bfloat16" else np.dtype(value.dtype)
        bind(name, "cuda", self._index, kind, value.shape, value.address)


def _runtime_name(ort: Any) -> str:
    major = str(ort.cuda_version).partition(".")[0]
    return f"cudart64_{major}.dll" if sys.platform == "win32" else f"libcudart.so.{major}"


def _unpin(runtime: Any, address: int, process: int) -> None:
    if os.getpid() == process:
        runtime.cudaFreeHost(ctypes.c_void_p(address))


def _release(runtime: Any, blocks: list[int], process: int) -> None:
    if os.getpid() != process:  # a child that was forked ends: CUDA is its parent's
        return
    for address in blocks:
        runtime.cudaFree(ctypes.c_void_p(address))
