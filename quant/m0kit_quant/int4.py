"""int4: blocks of 32, 64 or 128 weights along the inputs share a scale and a zero point.

Owns the numbers and the packing of ONNX Runtime's com.microsoft.MatMulNBits: weight ≈ (q − z) · s with q and z
in 0…15, q packed two to a byte, the first in the low half. The product quantises each row of activations block by
block to int8 (accuracy level 4), so here too a row depends on itself alone.

Which scale: the range of a block is shrunk in steps, the scale refitted by least squares, and the smallest error
wins. On normally distributed blocks of 128 the error falls from 0.117 (largest value decides) to 0.095.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from m0kit.precision import SCHEMES
from m0kit_quant.feedback import Plane, fed_back, weighing
from m0kit_quant.int8 import LEVELS, by_rows, unit_of
from m0kit_quant.scheme import CONTRIB, Layout, Nodes, Parts, Scheme
from m0kit_quant.weights import Float32

UInt8 = NDArray[np.uint8]

BLOCKS = (32, 64, 128)
_TOP = 15
_FRACTIONS = np.linspace(0.6, 1.0, 8, dtype=np.float32)


class Int4Scheme(Scheme):
    """Values, scales and zero points of blocks of inputs; the same of a table's rows."""

    name = "int4"
    takes_feedback = True
    blocks = BLOCKS

    def layout(self, shape: tuple[int, ...]) -> Layout:
        block, u8 = self._size, np.dtype(np.uint8)
        check_block(block, shape[1])
        rows, num_blocks = shape[0], shape[1] // block
        return {
            "int4": ((rows, num_blocks, block // 2), u8),
            "scale": ((rows, num_blocks), np.dtype(np.float32)),
            "zero_point": ((rows, (num_blocks + 1) // 2), u8),
        }

    def encode(self, weight: Float32, importance: Float32 | Plane | None = None) -> Parts:
        stored = quantize(weight, self._size, importance)
        return {"int4": stored.packed, "scale": stored.scale, "zero_point": stored.zero_point}

    def decode(self, parts: Mapping[str, NDArray[Any]], shape: tuple[int, ...]) -> Float32:
        return dequantize(Int4(parts["int4"], parts["scale"], parts["zero_point"]))

    def product(self, b: Nodes, x: str, part: Mapping[str, str], shape: tuple[int, int], out: str | None) -> str:
        return b.op(
            *(str(SCHEMES[self.name].operator), x, part["int4"], part["scale"], part["zero_point"]), out=out,
            domain=CONTRIB, K=shape[1], N=shape[0], bits=4, block_size=self._size, accuracy_level=4,
        )  # fmt: skip

    def lookup(self, b: Nodes, ids: str, part: Mapping[str, str], shape: tuple[int, int]) -> str:
        blocks = shape[1] // self._size
        rows = self._nibbles(b, b.op("Gather", part["int4"], ids, axis=0), [-1, blocks, self._size])
        zero = self._nibbles(b, b.op("Gather", part["zero_point"], ids, axis=0), [-1, blocks + blocks % 2, 1])
        if blocks % 2:
            zero = b.op("Slice", zero, b.const([0]), b.const([blocks]), b.const([1]))
        scale = b.op("Reshape", b.op("Gather", part["scale"], ids, axis=0), b.const([-1, blocks, 1]))
        values = b.op("Mul", b.op("Sub", rows, zero), scale)
        return b.op("Reshape", values, b.const([-1, shape[1]]))

    def cuda_product(
        self, b: Nodes, x: str, part: Mapping[str, str], shape: tuple[int, int], dtype: np.dtype[Any]
    ) -> str:
        scale = part["scale"] if dtype == np.float32 else b.cast(part["scale"], dtype)
        return b.op(
            "MatMulNBits", x, part["int4"], scale, part["zero_point"],
            domain=CONTRIB, K=shape[1], N=shape[0], bits=4, block_size=self._size,
        )  # fmt: skip

    def cuda_lookup(
        self, b: Nodes, ids: str, part: Mapping[str, str], shape: tuple[int, int], dtype: np.dtype[Any]
    ) -> str:
        rows = b.op("Reshape", part["int4"], b.const([shape[0], shape[1] // 2]))
        return b.op(
            "GatherBlockQuantized", rows, ids, b.cast(part["scale"], dtype), part["zero_point"],
            domain=CONTRIB, bits=4, block_size=self._size, gather_axis=0, quantize_axis=1,
        )  # fmt: skip

    def shared_scale(self, num_inputs: int) -> int | None:
        return self.block

    def rounded(self, x: Float32) -> Float32:
        blocks = x.reshape(len(x), -1, self._size)
        scale = np.abs(blocks).max(axis=2, keepdims=True) / np.float32(LEVELS)
        return np.asarray(np.rint(blocks / np.where(scale > 0, scale, 1)) * scale, np.float32).reshape(x.shape)

    @property
    def _size(self) -> int:
        assert self.block is not None  # one of `blocks`
        return self.block

    @staticmethod
    def _nibbles(b: Nodes, packed: str, shape: list[int]) -> str:
        """Bytes → float32 values of 0…15 in `shape`, the low half of a byte first."""
        low = b.op("BitwiseAnd", packed, b.const(15, np.uint8))
        high = b.op("BitShift", packed, b.const(4, np.uint8), direction="RIGHT")
        halves = [b.op("Unsqueeze", b.cast(half, np.float32), b.const([-1])) for half in (low, high)]
        return b.op("Reshape", b.op("Concat", *halves, axis=-1), b.const(shape))


class Int4(NamedTuple):
    """A matrix (N, K) of K/b = B blocks a row."""

    packed: UInt8  # (N, B, b/2)
    scale: Float32  # (N, B)
    zero_point: UInt8  # (N, ⌈B/2⌉), packed like the weights; a last half is 8


def quantize(weight: Float32, block: int, importance: Float32 | Plane | None = None) -> Int4:
    """weight (N, K) → 4 bits. `importance` (K,) weighs the squared error of each input; a plane's errors are fed back.

    Raises ValueError when the block does not divide K or is none of 32, 64, 128.
    """
    check_block(block, weight.shape[1])
    plane, importance = weighing(importance)
    num_rows, num_blocks = weight.shape[0], weight.shape[1] // block
    q = np.empty((num_rows, num_blocks, block // 2), np.uint8)
    scale = np.empty((num_rows, num_blocks), np.float32)
    zero = np.empty((num_rows, num_blocks), np.uint8)
    weigh = None if importance is None else np.asarray(importance, np.float32).reshape(1, num_blocks, block)

    def fill(first: int, end: int) -> None:
        # A transposed view would be summed in another order, and might round to another scale.
        w = np.ascontiguousarray(weight[first:end]).reshape(end - first, num_blocks, block)
        values, scale[first:end], zero[first:end] = _search(w, weigh)
        q[first:end] = pack(values)

    by_rows(fill, *weight.shape)
    if plane is not None:

        def nearest(first: int, end: int, column: int, wanted: NDArray[np.float64]) -> tuple[Any, Any]:
            steps = scale[first:end, column // block].astype(np.float64)
            z = zero[first:end, column // block].astype(np.float64)
            found = np.clip(np.rint(wanted / steps) + z, 0, _TOP)
            return found, (found - z) * steps

        q = pack(fed_back(weight, plane, nearest, np.uint8).reshape(num_rows, num_blocks, block))
    return Int4(q, scale, pack(np.pad(zero, ((0, 0), (0, num_blocks % 2)), constant_values=8)))


def dequantize(stored: Int4) -> Float32:
    """The weight (N, K) that the stored values stand for."""
    q = unpack(stored.packed).astype(np.float32)
    zero = unpack(stored.zero_point)[:, : stored.scale.shape[1], None]
    return np.asarray(((q - zero) * stored.scale[..., None]).reshape(len(q), -1), np.float32)


def check_block(block: int, num_inputs: int) -> None:
    """Raises ValueError."""
    if block not in BLOCKS:
        raise ValueError(f"block {block} is not one of {', '.join(map(str, BLOCKS))}")
    if num_inputs % block:
        raise ValueError(f"block {block} does not divide {num_inputs} inputs")


def pack(values: UInt8) -> UInt8:
    """(…, 2n) values of 0…15 → (…, n) bytes, the first of two in the low half."""
    return np.asarray(values[..., ::2] | values[..., 1::2] << 4, np.uint8)


def unpack(packed: UInt8) -> UInt8:
    """(…, n) bytes → (…, 2n) values of 0…15."""
    return np.stack([packed & 15, packed >> 4], axis=-1).reshape(*packed.shape[:-1], -1)


def _search(w: Float32, weigh: Float32 | None) -> tuple[UInt8, Float32, UInt8]:
    """w (N, B, b) → q (N, B, b), scale (N, B), zero point (N, B)."""
    unit = unit_of(np.abs(w).max(axis=2, keepdims=True))
    w = w / unit
    low = np.minimum(w.min(axis=2, keepdims=True), 0)  # zero is always within reach
    high = np.maximum(w.max(axis=2, keepdims=True), 0)
    reach = np.maximum(high - low, np.float32(1))  # less only where all is as good as zero
    best = np.empty(w.shape, np.uint8)
    least = np.full((*w.shape[:2], 1), np.inf, np.float32)
    scale, zero = np.ones_like(least), np.zeros_like(least)
    for fraction in _FRACTIONS[::-1]:
        step = reach * (fraction / _TOP)
        z = np.clip(np.rint(-low * fraction / step), 0, _TOP)
        q = np.clip(np.rint(w / step) + z, 0, _TOP)
        c = q - z
        weighed = c if weigh is None else c * weigh
        norm = np.einsum("nbk,nbk->nb", weighed, c)[..., None]
        fitted = np.einsum("nbk,nbk->nb", weighed, w)[..., None] / np.where(norm > 0, norm, 1)
        fitted = np.where((norm > 0) & (fitted > 0), fitted, step)
        error = np.square(w - c * fitted)
        total = (error if weigh is None else error * weigh).sum(axis=2, keepdims=True)
        better = total < least
        least = np.where(better, total, least)
        scale, zero = np.where(better, fitted, scale), np.where(better, z, zero)
        np.copyto(best, q.astype(np.uint8), where=better)
    return best, np.asarray((scale * unit)[..., 0], np.float32), zero[..., 0].astype(np.uint8)
