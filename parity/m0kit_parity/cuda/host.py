"""The computer itself in a GPU's place: addresses of its own memory, and graphs that numpy runs on them.

Owns a `Device` without a GPU, which counts what is bound and copied. What its graphs compute is what they compute on a
GPU but for the last bits (`m0kit_parity.cuda.operators`), and slowly.

    engine = CudaEngine(config, device := HostDevice(), partial(device.open, folder), "float16", salt=b"")
"""

import ctypes
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from m0kit.scoring.device import Placed, item_size
from m0kit_parity.cuda.reference import CudaReference

Array = NDArray[Any]


class HostDevice:
    """As much memory as it is told to have."""

    def __init__(self, num_bytes: int = 64 << 20) -> None:
        self.counts: Counter[str] = Counter()
        self._left = num_bytes
        self._blocks: dict[int, NDArray[np.uint8]] = {}

    def allocate(self, num_bytes: int) -> int:
        block = np.full(max(num_bytes, 1), 0x7F, np.uint8)  # as halves it is not a number: what is unwritten shows
        self._left -= num_bytes
        self._blocks[block.ctypes.data] = block
        return block.ctypes.data

    def free(self, address: int) -> None:
        self._left += len(self._blocks.pop(address))

    def free_bytes(self) -> int:
        return self._left

    def pinned(self, num_bytes: int) -> NDArray[np.uint8]:
        self.counts["pinned"] += 1
        return np.empty(num_bytes, np.uint8)

    def copy(
        self, target: int, source: int, width: int, rows: int = 1, target_pitch: int = 0, source_pitch: int = 0
    ) -> None:
        self.counts["copies"] += 1
        for row in range(rows):
            places = target + row * (target_pitch or width), source + row * (source_pitch or width)
            ctypes.memmove(*places, width)

    def open(self, folder: Path, name: str) -> "HostGraph":
        self.counts[f"open {name}"] += 1
        return HostGraph(CudaReference(folder / f"{name}.onnx"), name, self.counts)


class HostGraph:
    """A graph of it."""

    def __init__(self, reference: CudaReference, name: str, counts: Counter[str]) -> None:
        self._reference, self._name, self._counts = reference, name, counts
        self._bound: dict[str, Placed] = {}

    def bind(self, values: Mapping[str, Placed]) -> None:
        self._counts["bound once"] += len(values)
        self._bound |= values

    def run(self, inputs: Mapping[str, Array | Placed], outputs: Mapping[str, Array | Placed]) -> None:
        self._counts[f"run {self._name}"] += 1
        self._counts["bound"] += len(inputs) + len(outputs)
        pool = {name: value for name, value in self._bound.items() if name.startswith("past")}
        found = self._reference.run({n: _array(v) for n, v in {**pool, **inputs}.items()}, list(outputs))
        for name, place in outputs.items():
            _array(place)[...] = found[name]


def _array(value: Array | Placed) -> Array:
    """As numpy has it, in place."""
    if not isinstance(value, Placed):
        return value
    size = int(np.prod(value.shape)) * item_size(value.dtype)
    buffer = np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(value.address))
    dtype = np.dtype(ml_dtypes.bfloat16) if value.dtype == "bfloat16" else np.dtype(value.dtype)
    found: Array = buffer.view(dtype).reshape(value.shape)
    return found
