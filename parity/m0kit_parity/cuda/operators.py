"""com.microsoft operators of the CUDA graphs in numpy, beside attention: products, fused norms, activations, rotation.

Owns each operator's form and the list of all. The specification is ONNX Runtime's schema; where numbers of 16 bits are
rounded is what its CUDA kernels do (see `arithmetic`), and is said at each operator.

    ReferenceEvaluator(model, new_ops=[*OPERATORS, *STANDARD])
"""

import math
from typing import Any, ClassVar, Final

import numpy as np
from numpy.typing import NDArray

from m0kit_parity.cuda.arithmetic import (
    Array,
    by_step,
    multiplied_and_added,
    normalised,
    product,
    rotated,
    rounded,
    sigmoid,
    widened,
)
from m0kit_parity.cuda.attention import MultiHeadAttention, PagedAttention
from m0kit_parity.cuda.operator import Operator
from m0kit_quant.nf4 import LEVELS

UInt8 = NDArray[np.uint8]


class FusedMatMul(Operator):
    """alpha · A @ B, their last two axes swapped where asked; rounded once."""

    fixed: ClassVar = {"transBatchA": 0, "transBatchB": 0}

    def _run(self, a: Array, b: Array, *, alpha: float = 1.0, transA: int = 0, transB: int = 0) -> tuple[Array]:
        self.of_one_type(A=a, B=b)
        a, b = (x.swapaxes(-1, -2) if swap else x for x, swap in ((a, transA), (b, transB)))
        return (product(a, b, alpha=alpha),)


class RotaryEmbedding(Operator):
    """Heads turned by rows of tables, chosen by position; rounded as `arithmetic.rotated` says.

    `scale` is in the schema, and no kernel reads it.
    """

    fixed: ClassVar = {"scale": 1.0, "is_packed_batching": 0}

    def _run(
        self,
        x: Array,  # (B, S, H·C) or (B, H, S, C)
        position_ids: NDArray[np.int64],  # (B, S), or (1,): of the first token
        cos_cache: Array,  # (positions, R/2)
        sin_cache: Array,  # (positions, R/2)
        *,
        num_heads: int = 0,
        rotary_embedding_dim: int = 0,
        interleaved: int = 0,
    ) -> tuple[Array]:
        self.of_one_type(input=x, cos_cache=cos_cache, sin_cache=sin_cache)
        if position_ids.dtype != np.int64:
            raise ValueError(f"{self.told}: position_ids is {position_ids.dtype}, int64 is needed")
        half = cos_cache.shape[1]
        if rotary_embedding_dim and (rotary_embedding_dim != 2 * half or not num_heads):
            raise ValueError(
                f"{self.told}: rotary_embedding_dim {rotary_embedding_dim} needs num_heads and tables half as wide, "
                f"these have {half} columns"
            )
        by_head = x
        if x.ndim == 3:  # a head is as wide as the rotation unless told otherwise
            heads = num_heads or x.shape[2] // (2 * half)
            by_head = x.reshape(*x.shape[:2], heads, x.shape[2] // heads).swapaxes(1, 2)  # (B, H, S, C)
        num_batches, _, length, width = by_head.shape
        if width < 2 * half or (width > 2 * half and not rotary_embedding_dim):
            raise ValueError(f"{self.told}: heads of {width} do not fit tables of {half} columns")
        if position_ids.shape == (1,):
            position_ids = position_ids + np.arange(length)[None]
        elif position_ids.shape != (num_batches, length):
            raise ValueError(f"{self.told}: position_ids is {list(position_ids.shape)}, not {[num_batches, length]}")
        if position_ids.min(initial=0) < 0 or position_ids.max(initial=0) >= len(cos_cache):
            raise ValueError(f"{self.told}: a position is not in the tables, which have {len(cos_cache)} rows")
        cos, sin = (table[position_ids][:, None] for table in (cos_cache, sin_cache))  # (B, 1, S, R/2)
        turned = rotated(by_head, cos, sin, interleaved=interleaved == 1)
        return ((turned.swapaxes(1, 2) if x.ndim == 3 else turned).reshape(x.shape),)


class QuickGelu(Operator):
    """x · sigmoid(alpha · x), every step rounded: see `arithmetic.sigmoid` for what that loses."""

    def _run(self, x: Array, *, alpha: float = 1.702) -> tuple[Array]:
        factor = rounded(np.asarray(alpha, np.float32), x.dtype)
        gate = sigmoid(by_step(x, lambda v: v * widened(factor)))
        return (by_step(x, lambda v: v * widened(gate)),)


class BiasGelu(Operator):
    """x / 2 · (1 + erf(x / √2)) of x = A + B, every step rounded, the error function's argument and result too.

    It loses what is small beside 1, which Gelu does not.
    """

    def _run(self, a: Array, b: Array) -> tuple[Array]:
        self.of_one_type(A=a, B=b)
        x = by_step(a, lambda v: v + widened(b))
        factor = widened(rounded(np.asarray(math.sqrt(0.5), np.float32), x.dtype))
        gate = by_step(x, lambda v: v * factor, erf, lambda v: 1 + v)
        return (by_step(x, lambda v: v / 2, lambda v: v * widened(gate)),)


class _SkipNorm(Operator):
    """A norm of input + bias + skip, and that sum.

    The sum is rounded as it grows, bias first, whether it is given out or not; mean and variance of it are in float32.
    With the provider option enable_skip_layer_norm_strict_mode the norm is of a sum that is not rounded. CUDA kernels
    give out no mean and no deviation.
    """

    def _normed(
        self, x: Array, skip: Array, gamma: Array, beta: Array | None, bias: Array | None, epsilon: float, centred: bool
    ) -> tuple[Array, Array, Array, Array]:
        self.of_one_type(input=x, skip=skip, gamma=gamma, beta=beta, bias=bias)
        if any(self.onnx_node.output[1:3]):
            raise NotImplementedError(f"{self.told}: mean and inv_std_var are not computed on CUDA, leave them out")
        added = x if bias is None else by_step(x, lambda v: v + widened(bias))
        added = by_step(added, lambda v: v + widened(skip))
        result, mean, inverse = normalised(added, gamma, beta, epsilon, centred=centred)
        return rounded(result, x.dtype), mean, inverse, added


class SkipLayerNormalization(_SkipNorm):
    """LayerNorm of a sum."""

    def _run(
        self, x: Array, skip: Array, gamma: Array, beta: Array | None = None, bias: Array | None = None,
        *, epsilon: float = 1e-12,
    ) -> tuple[Array, Array, Array, Array]:  # fmt: skip
        return self._normed(x, skip, gamma, beta, bias, epsilon, centred=True)


class SkipSimplifiedLayerNormalization(_SkipNorm):
    """RMSNorm of a sum."""

    def _run(
        self, x: Array, skip: Array, gamma: Array, bias: Array | None = None, *, epsilon: float = 1e-12
    ) -> tuple[Array, Array, Array, Array]:
        return self._normed(x, skip, gamma, None, bias, epsilon, centred=False)


class GatedRMSNorm(Operator):
    """RMSNorm of groups of channels, times SiLU of a gate, in float32 and rounded once."""

    fixed: ClassVar = {"activation": "silu"}

    def _run(self, x: Array, scale: Array, gate: Array, *, epsilon: float = 1e-5) -> tuple[Array]:
        """x and gate (…, H·C), scale (C,)."""
        self.of_one_type(X=x, scale=scale, gate=gate)
        groups = x.reshape(*x.shape[:-1], -1, len(scale))
        normed = normalised(groups, scale, None, epsilon, centred=False)[0].reshape(x.shape)
        wide = widened(gate)
        with np.errstate(all="ignore"):
            return (rounded(normed * (wide / (1 + np.exp(-wide))), x.dtype),)


class MatMulNBits(Operator):
    """A @ Bᵀ with B in 4 or 8 bits: zero · scale is rounded, the values are, then the product, and the bias's sum.

    So are many rows computed. For a few there is a kernel that has no matrix in 16 bits, and sums otherwise.
    `accuracy_level` asks CPUs to round A too; CUDA kernels do not.
    """

    fixed: ClassVar = {"weight_prepacked": 0}

    def _run(
        self,
        a: Array,  # (…, K)
        b: UInt8,  # (N, blocks, block_size · bits / 8)
        scales: Array,  # (N, blocks)
        zero_points: Array | None = None,  # (N, ⌈blocks · bits / 8⌉) uint8, or (N, blocks) in the type of A
        g_idx: Array | None = None,
        bias: Array | None = None,  # (N,)
        *,
        K: int,
        N: int,
        block_size: int,
        bits: int = 4,
        accuracy_level: int = 0,  # noqa: ARG002
    ) -> tuple[Array]:
        self.refuse(g_idx=g_idx)
        self.of_one_type(A=a, scales=scales, bias=bias)
        blocks = -(-K // block_size)
        codes = self._unpacked(b, bits).reshape(N, blocks, block_size)
        zero: Any = 1 << bits - 1
        if zero_points is not None:
            unpacked = self._unpacked(zero_points, bits) if zero_points.dtype == np.uint8 else widened(zero_points)
            zero = unpacked.reshape(N, -1)[:, :blocks, None]
        scale = scales.reshape(N, blocks, 1)
        offset = rounded(np.float32(-1) * zero * widened(scale), a.dtype)
        weight = multiplied_and_added(codes, scale, offset).reshape(N, blocks * block_size)[:, :K]
        result = product(a, weight.T)
        return (result if bias is None else by_step(result, lambda v: v + widened(bias)),)

    def _unpacked(self, packed: UInt8, bits: int) -> Array:
        """The codes as float32, the first of a byte in its low half."""
        if bits not in (4, 8):
            raise NotImplementedError(f"{self.told}: bits={bits} is not computed here, only 4 and 8 are")
        return unpacked(packed, bits)


class MatMulBnb4(Operator):
    """A @ Bᵀ with B in NF4, blocks running on from row to row: the levels, then the values are rounded, as A is."""

    fixed: ClassVar = {"transB": 1, "training_mode": 0, "quant_type": 1}

    def _run(self, a: Array, b: UInt8, absmax: Array, *, K: int, N: int, block_size: int) -> tuple[Array]:
        self.of_one_type(A=a, absmax=absmax)
        flat = b.reshape(-1)
        levels = widened(rounded(LEVELS, a.dtype))
        values = levels[np.stack([flat >> 4, flat & 15], axis=-1)].reshape(-1)[: N * K]
        scales = np.repeat(widened(absmax).reshape(-1), block_size)[: N * K]
        weight = rounded(values * scales, a.dtype).reshape(N, K)
        return (product(a, weight.T),)


class GatherBlockQuantized(Operator):
    """Rows of a table in 4 or 8 bits, blocks of a row sharing a scale and a zero point."""

    fixed: ClassVar = {"gather_axis": 0, "quantize_axis": 1}

    def _run(
        self,
        data: UInt8,  # (V, D · bits / 8)
        indices: NDArray[Any],
        scales: Array,  # (V, blocks)
        zero_points: UInt8 | None = None,  # (V, ⌈blocks · bits / 8⌉)
        *,
        block_size: int = 128,
        bits: int = 4,
    ) -> tuple[Array]:
        """(…, D) in the type of the scales; indices are of any shape."""
        if bits not in (4, 8) or data.dtype != np.uint8 or data.ndim != 2:
            raise NotImplementedError(
                f"{self.told}: {data.dtype} {list(data.shape)} in {bits} bits is not computed here, "
                "only uint8 tables of two axes in 4 or 8 bits are"
            )
        codes = unpacked(data[indices], bits)
        scale = widened(scales[indices])
        zero: Any = 1 << bits - 1
        if zero_points is not None:
            zero = unpacked(zero_points[indices], bits)[..., : scale.shape[-1], None]
        blocks = codes.reshape(*scale.shape, block_size) - zero
        return (rounded((blocks * scale[..., None]).reshape(codes.shape), scales.dtype),)


def unpacked(packed: UInt8, bits: int) -> Array:
    """(…, n) bytes → their 1 or 2 codes each as float32, the first of two in the low half."""
    if bits == 4:
        packed = np.stack([packed & 15, packed >> 4], axis=-1).reshape(*packed.shape[:-1], -1)
    return packed.astype(np.float32)


_ERF: Final = np.frompyfunc(math.erf, 1, 1)


def erf(x: Array) -> Array:
    """The error function, in the type of `x`."""
    return np.asarray(_ERF(x)).astype(x.dtype)


OPERATORS: Final[tuple[type[Operator], ...]] = (
    PagedAttention, MultiHeadAttention, FusedMatMul, RotaryEmbedding, QuickGelu, BiasGelu, SkipLayerNormalization,
    SkipSimplifiedLayerNormalization, GatedRMSNorm, MatMulNBits, MatMulBnb4, GatherBlockQuantized,
)  # fmt: skip
