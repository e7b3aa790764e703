"""int8: 7-bit signed weights with a scale per output, against activations with a scale per row.

Owns the numbers; how a graph spells the product is `m0kit_export.builder`. The product that both must equal:

    q = clip(round(x / a) + 128, 0, 255), a = max|x| / 127     each row of x by itself (uint8, zero point 128)
    y = ((q − 128) · v) · a · s                                 v int8 (K, N), sums in int32

A row's scale comes from that row alone, so a score never depends on its neighbours. Weights keep to |v| ≤ 64:
CPUs without VNNI add two products u8·s8 in 16 bits (VPMADDUBSW, which saturates), and 255·64 + 255·64 = 32,640
is the largest that fits there, so the integers are exact on every CPU.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from os import cpu_count

import numpy as np
from numpy.typing import NDArray

from m0kit_quant.weights import Float32

LIMIT = 64  # largest |v|: twice 255 · 64 is below 2^15
LEVELS = 127  # steps of an activation on either side of zero
ZERO_POINT = 128
SMALLEST = 1e-30  # a row of zeros, or of less than this, gets it as its max|x|: nothing is divided by (nearly) zero

# Fractions of the largest |w| of an output that become LIMIT; the one with the smallest squared error wins.
_FRACTIONS = np.linspace(0.6, 1.0, 9, dtype=np.float32)
_BLOCK_VALUES = 1 << 20  # values that one thread works on at a time: some 10 MB with its temporaries


def quantize(weight: Float32, importance: Float32 | None = None) -> tuple[NDArray[np.int8], Float32]:
    """weight (N, K) → values (K, N) int8 with |v| ≤ 64, scale (N,) float32: weight.T ≈ values · scale.

    Per output the clipping that leaves the smallest squared error, each input weighed by `importance` (K,)
    (its mean square in calibration). A row of zeros has scale 1.
    """
    values = np.empty((weight.shape[1], weight.shape[0]), np.int8)
    scale = np.empty(weight.shape[0], np.float32)

    def fill(first: int, end: int) -> None:
        # A transposed view would be summed in another order, and might round to another scale.
        q, scale[first:end] = _search(np.ascontiguousarray(weight[first:end]), importance)
        values[:, first:end] = q.T

    by_rows(fill, *weight.shape)
    return values, scale


def dequantize(values: NDArray[np.int8], scale: Float32) -> Float32:
    """The weight (N, K) that the stored values stand for."""
    return (values.astype(np.float32) * scale).T


def quantize_rows(table: Float32) -> tuple[NDArray[np.int8], Float32]:
    """table (V, D) → values (V, D) int8, scale (V,): for rows that are looked up and never multiplied as integers."""
    values = np.empty(table.shape, np.int8)
    scale = np.empty(table.shape[0], np.float32)

    def fill(first: int, end: int) -> None:
        rows = table[first:end]
        peak = np.abs(rows).max(axis=1)
        floor = np.maximum(peak, np.float32(SMALLEST)) / np.float32(LEVELS)
        scale[first:end] = np.where(peak > 0, floor, np.float32(1))
        values[first:end] = np.rint(rows / scale[first:end, None])

    by_rows(fill, *table.shape)
    return values, scale


def quantize_activation(x: Float32) -> tuple[NDArray[np.uint8], Float32]:
    """x (T, K) → q (T, K) uint8 around 128, a (T, 1): what the graph does, rounding half to even as ONNX has it."""
    a = np.maximum(np.abs(x).max(axis=1, keepdims=True), np.float32(SMALLEST)) * np.float32(1 / LEVELS)
    return np.clip(np.rint(x / a) + ZERO_POINT, 0, 255).astype(np.uint8), a


def product(x: Float32, values: NDArray[np.int8], scale: Float32) -> Float32:
    """The exact model of the product: x (T, K) → (T, N), sums in int64, one rounding per scale."""
    q, a = quantize_activation(x)
    sums = (q.astype(np.int64) - ZERO_POINT) @ values.astype(np.int64)
    return np.asarray((sums.astype(np.float64) * scale).astype(np.float32) * a, np.float32)


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
