"""int8: 7-bit signed weights with a scale per output, against activations with a scale per row.

The product that its numbers here and a graph's nodes must both equal:

    q = clip(round(x / a) + 128, 0, 255), a = max|x| / 127     each row of x by itself (uint8, zero point 128)
    y = ((q − 128) · v) · a · s                                 v int8 (K, N), sums in int32

Inputs of 16 bits are two such rows, q and what it leaves of x in units of a / 254, and two such products.

A row's scale comes from that row alone, so a score never depends on its neighbours. Weights keep to |v| ≤ 64:
CPUs without VNNI add two products u8·s8 in 16 bits (VPMADDUBSW, which saturates), and 255·64 + 255·64 = 32,640
is the largest that fits there, so the integers are exact on every CPU.
"""

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from os import cpu_count
from typing import Any

import numpy as np
from numpy.typing import NDArray

from m0kit.precision import SCHEMES
from m0kit_quant.feedback import Plane, fed_back, weighing
from m0kit_quant.scheme import CONTRIB, Layout, Nodes, Parts, Scheme
from m0kit_quant.weights import Float32

LIMIT = 64  # largest |v|: twice 255 · 64 is below 2^15
LEVELS = 127  # steps of an activation on either side of zero
ZERO_POINT = 128
FINER = 1 / 254  # of a: what rounding leaves, a / 2 at most, fills the eight bits again
SMALLEST = 1e-30  # a row of zeros, or of less than this, gets it as its max|x|: nothing is divided by (nearly) zero

# Fractions of the largest |w| of an output that become LIMIT; the one with the smallest squared error wins.
_FRACTIONS = np.linspace(0.6, 1.0, 9, dtype=np.float32)
_BLOCK_VALUES = 1 << 20  # values that one thread works on at a time: some 10 MB with its temporaries


class Int8Scheme(Scheme):
    """Values and the scale of each output. A table's rows are as they lie, in all 8 bits."""

    name = "int8"
    input_bits = (8, 16)
    takes_feedback = True

    def layout(self, shape: tuple[int, ...]) -> Layout:
        values = (shape if self.table else shape[::-1], np.dtype(np.int8))
        return {"int8": values, "scale": (shape[:1], np.dtype(np.float32))}

    def encode(self, weight: Float32, importance: Float32 | Plane | None = None) -> Parts:
        if self.table:
            values, scale = quantize_rows(weight, importance if isinstance(importance, Plane) else None)
        else:
            values, scale = quantize(weight, importance)
        return {"int8": values, "scale": scale}

    def decode(self, parts: Mapping[str, NDArray[Any]], shape: tuple[int, ...]) -> Float32:
        if self.table:
            return np.asarray(parts["int8"].astype(np.float32) * parts["scale"][:, None])
        return dequantize(parts["int8"], parts["scale"])

    def product(self, b: Nodes, x: str, part: Mapping[str, str], shape: tuple[int, int], out: str | None) -> str:
        integers, row_scale = b.once(x, lambda x: activation_nodes(b, x))
        y = self._sum(b, integers, part, 1.0)
        if self.inputs == 16:
            finer, _ = b.once(integers, lambda q: finer_nodes(b, x, q, row_scale))
            y = b.op("Add", y, self._sum(b, finer, part, FINER))
        return b.op("Mul", y, row_scale, out=out)

    def _sum(self, b: Nodes, integers: str, part: Mapping[str, str], unit: float) -> str:
        """Integers (T, K) around their zero point by the matrix, times `unit` → (T, N) float32."""
        return b.op(
            *(str(SCHEMES[self.name].operator), integers, part["int8"], b.const(unit, np.float32), part["scale"]),
            b.const(ZERO_POINT, np.uint8),
            domain=CONTRIB,
        )

    def lookup(self, b: Nodes, ids: str, part: Mapping[str, str], shape: tuple[int, int]) -> str:
        rows = b.cast(b.op("Gather", part["int8"], ids, axis=0), np.float32)
        scale = b.op("Gather", part["scale"], ids, axis=0)
        return b.op("Mul", rows, b.op("Reshape", scale, b.const([-1, 1])))

    def cuda_product(
        self, b: Nodes, x: str, part: Mapping[str, str], shape: tuple[int, int], dtype: np.dtype[Any]
    ) -> str:
        """Weights are widened as they are used, and activations not rounded: CUDA has no products of integers."""
        scale = part["scale"] if dtype == np.float32 else b.cast(part["scale"], dtype)
        matrix = b.op("DequantizeLinear", part["int8"], scale, axis=1)
        return b.op("MatMul", x, matrix)

    def cuda_rows(
        self, b: Nodes, part: Mapping[str, str], shape: tuple[int, int], rows: NDArray[np.int64]
    ) -> dict[str, str]:
        axes = {"int8": 1, "scale": 0}  # values are stored (K, N)
        return {key: b.op("Gather", stored, b.const(rows), axis=axes[key]) for key, stored in part.items()}

    def cuda_lookup(
        self, b: Nodes, ids: str, part: Mapping[str, str], shape: tuple[int, int], dtype: np.dtype[Any]
    ) -> str:
        rows = b.cast(b.op("Gather", part["int8"], ids, axis=0), np.float32)
        scale = b.op("Reshape", b.op("Gather", part["scale"], ids, axis=0), b.const([-1, 1]))
        return b.cast(b.op("Mul", rows, scale), dtype)

    def shared_scale(self, num_inputs: int) -> int | None:
        return None if self.inputs == 16 else num_inputs

    def rounded(self, x: Float32) -> Float32:
        q, scale = quantize_activation(x)
        rounded = (q.astype(np.float32) - ZERO_POINT) * scale
        if self.inputs != 16:
            return rounded
        finer, scale = quantize_rest(x, q, scale)
        return rounded + (finer.astype(np.float32) - ZERO_POINT) * scale


def quantize(weight: Float32, importance: Float32 | Plane | None = None) -> tuple[NDArray[np.int8], Float32]:
    """weight (N, K) → values (K, N) int8 with |v| ≤ 64, scale (N,) float32: weight.T ≈ values · scale.

    Per output the clipping that leaves the smallest squared error, each input weighed by `importance` (K,)
    (its mean square in calibration). A row of zeros has scale 1. A plane's errors are fed back.
    """
    plane, importance = weighing(importance)
    values = np.empty((weight.shape[1], weight.shape[0]), np.int8)
    scale = np.empty(weight.shape[0], np.float32)

    def fill(first: int, end: int) -> None:
        # A transposed view would be summed in another order, and might round to another scale.
        q, scale[first:end] = _search(np.ascontiguousarray(weight[first:end]), importance)
        values[:, first:end] = q.T

    by_rows(fill, *weight.shape)
    if plane is not None:
        values = np.ascontiguousarray(_fed_back(weight, scale, plane, LIMIT).T)
    return values, scale


def dequantize(values: NDArray[np.int8], scale: Float32) -> Float32:
    """The weight (N, K) that the stored values stand for."""
    return (values.astype(np.float32) * scale).T


def quantize_rows(table: Float32, plane: Plane | None = None) -> tuple[NDArray[np.int8], Float32]:
    """table (V, D) → values (V, D) int8, scale (V,): for rows that are looked up and never multiplied as integers.

    `plane`: of what the products that take the rows see of an error (D, D); errors are fed back.
    """
    values = np.empty(table.shape, np.int8)
    scale = np.empty(table.shape[0], np.float32)

    def fill(first: int, end: int) -> None:
        rows = table[first:end]
        peak = np.abs(rows).max(axis=1)
        floor = np.maximum(peak, np.float32(SMALLEST)) / np.float32(LEVELS)
        scale[first:end] = np.where(peak > 0, floor, np.float32(1))
        values[first:end] = np.rint(rows / scale[first:end, None])

    by_rows(fill, *table.shape)
    return (values if plane is None else _fed_back(table, scale, plane, LEVELS)), scale


def quantize_activation(x: Float32) -> tuple[NDArray[np.uint8], Float32]:
    """x (T, K) → q (T, K) uint8 around 128, a (T, 1): what the graph does, rounding half to even as ONNX has it."""
    a = np.maximum(np.abs(x).max(axis=1, keepdims=True), np.float32(SMALLEST)) * np.float32(1 / LEVELS)
    return np.clip(np.rint(x / a) + ZERO_POINT, 0, 255).astype(np.uint8), a


def activation_nodes(b: Nodes, x: str) -> tuple[str, str]:
    """The same in a graph: x (T, K) → its integers (T, K) and the scale of each row (T, 1)."""
    peak = b.op("ReduceMax", b.op("Abs", x), b.const([1]), keepdims=1)
    peak = b.op("Max", peak, b.const(SMALLEST, np.float32))
    scale = b.op("Mul", peak, b.const(1 / LEVELS, np.float32))
    flat = b.op("Reshape", scale, b.const([-1]))
    zero = b.op("Expand", b.const(ZERO_POINT, np.uint8), b.op("Shape", flat))
    return b.op("QuantizeLinear", x, flat, zero, axis=0), scale


def quantize_rest(x: Float32, q: NDArray[np.uint8], a: Float32) -> tuple[NDArray[np.uint8], Float32]:
    """What q and a of x (T, K) leave of it, in the same form: (T, K) uint8 around 128 and its scale (T, 1)."""
    finer = a * np.float32(FINER)
    rest = x - (q.astype(np.float32) - ZERO_POINT) * a
    return np.clip(np.rint(rest / finer) + ZERO_POINT, 0, 255).astype(np.uint8), finer


def finer_nodes(b: Nodes, x: str, integers: str, scale: str) -> tuple[str, str]:
    """The same in a graph: q (T, K) and a (T, 1) of x → the integers of what is left (T, K), and their scale (T,)."""
    coarse = b.op("Reshape", scale, b.const([-1]))
    zero = b.op("Expand", b.const(ZERO_POINT, np.uint8), b.op("Shape", coarse))
    rest = b.op("Sub", x, b.op("DequantizeLinear", integers, coarse, zero, axis=0))
    finer = b.op("Mul", coarse, b.const(FINER, np.float32))
    return b.op("QuantizeLinear", rest, finer, zero, axis=0), finer


def by_rows(fill: Callable[[int, int], None], num_rows: int, width: int) -> None:
    """Call fill(first, end) for stretches of rows, on all cores: numpy computes outside Python's lock."""
    step = max(1, _BLOCK_VALUES // max(width, 1))
    with ThreadPoolExecutor(cpu_count()) as pool:
        for done in [pool.submit(fill, first, min(first + step, num_rows)) for first in range(0, num_rows, step)]:
            done.result()


def unit_of(peak: Float32) -> Float32:
    """The power of two at or below max|w|: what is divided by it can be squared and summed in float32.

    1 for zero; values below SMALLEST are as good as zero, and get that of SMALLEST so that a scale is never subnormal.
    """
    unit = np.ldexp(np.float32(1), np.frexp(np.maximum(peak, np.float32(SMALLEST)))[1] - 1)
    return np.where(peak > 0, unit, np.float32(1)).astype(np.float32)


def _fed_back(weight: Float32, scale: Float32, plane: Plane, most: int) -> NDArray[np.int8]:
    """weight (N, K), scale (N,) → values (N, K) of at most `most`."""

    def nearest(first: int, end: int, _column: int, wanted: NDArray[np.float64]) -> tuple[Any, Any]:
        steps = scale[first:end].astype(np.float64)
        q = np.clip(np.rint(wanted / steps), -most, most)
        return q, q * steps

    return fed_back(weight, plane, nearest, np.int8)


def _search(w: Float32, importance: Float32 | None) -> tuple[NDArray[np.int8], Float32]:
    peak = np.abs(w).max(axis=1, keepdims=True)
    unit = unit_of(peak)
    w = w / unit
    peak = np.where(peak > 0, np.maximum(peak, np.float32(SMALLEST)) / unit, np.float32(LIMIT))
    best, least = np.empty(w.shape, np.int8), np.full((len(w), 1), np.inf, np.float32)
    scale = np.empty((len(w), 1), np.float32)
    for fraction in _FRACTIONS[::-1]:
        tried = peak * (fraction / LIMIT)
        q = np.clip(np.rint(w / tried), -LIMIT, LIMIT)
        error = np.square(w - q * tried)
        total = error.sum(axis=1, keepdims=True) if importance is None else (error @ importance)[:, None]
        better = total < least
        least = np.where(better, total, least)
        scale = np.where(better, tried, scale)
        np.copyto(best, q.astype(np.int8), where=better)
    return best, (scale * unit)[:, 0]
