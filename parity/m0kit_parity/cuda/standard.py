"""Standard operators in numpy where onnx's own evaluator rounds 16 bits otherwise than CUDA kernels, or takes none.

Owns which are replaced, and which are onnx's own because those do the same in 16 bits: computed in float32 and rounded
once, which the tests hold of each. SimplifiedLayerNormalization is ONNX Runtime's, in the standard domain.

    ReferenceEvaluator(model, new_ops=[*OPERATORS, *STANDARD])
"""

import math
from typing import ClassVar, Final

import numpy as np
from numpy.typing import NDArray

from m0kit_parity.cuda.arithmetic import BF16, Array, normalised, product, rotated, rounded, sigmoid, widened
from m0kit_parity.cuda.operator import Operator

_NORMAL: Final = np.frompyfunc(lambda x: math.erfc(-x * math.sqrt(0.5)) / 2, 1, 1)  # erfc keeps what is small


class MatMul(Operator):
    """A @ B, rounded once."""

    op_domain = ""

    def _run(self, a: Array, b: Array) -> tuple[Array]:
        self.of_one_type(A=a, B=b)
        return (product(a, b),)


class Gemm(Operator):
    """alpha · A @ B + beta · C, rounded once."""

    op_domain = ""

    def _run(
        self, a: Array, b: Array, c: Array | None = None,
        *, alpha: float = 1.0, beta: float = 1.0, transA: int = 0, transB: int = 0,
    ) -> tuple[Array]:  # fmt: skip
        self.of_one_type(A=a, B=b, C=c)
        return (product(a.T if transA else a, b.T if transB else b, alpha=alpha, added=c, beta=beta),)


class LayerNormalization(Operator):
    """Mean and variance in float32, rounded once."""

    op_domain = ""
    fixed: ClassVar = {"stash_type": 1}

    def _run(
        self, x: Array, scale: Array, bias: Array | None = None, *, axis: int = -1, epsilon: float = 1e-5
    ) -> tuple[Array, Array, Array]:
        self.of_one_type(X=x, Scale=scale, B=bias)
        result, mean, inverse = normalised(x, scale, bias, epsilon, axis=axis, centred=True)
        return rounded(result, x.dtype), mean, inverse


class RMSNormalization(Operator):
    """Mean square in float32, rounded once; the result has the type of `scale`."""

    op_domain = ""
    fixed: ClassVar = {"stash_type": 1}

    def _run(self, x: Array, scale: Array, *, axis: int = -1, epsilon: float = 1e-5) -> tuple[Array]:
        result, _, _ = normalised(x, scale, None, epsilon, axis=axis, centred=False)
        return (rounded(result, scale.dtype),)


class SimplifiedLayerNormalization(Operator):
    """RMSNorm with 1/deviation as a second result. X and `scale` may differ in type, the result has that of `scale`."""

    op_domain = ""
    fixed: ClassVar = {"stash_type": 1}

    def _run(self, x: Array, scale: Array, *, axis: int = -1, epsilon: float = 1e-5) -> tuple[Array, Array]:
        result, _, inverse = normalised(x, scale, None, epsilon, axis=axis, centred=False)
        return rounded(result, scale.dtype), inverse


class RotaryEmbedding(Operator):
    """Heads turned by tables; rounded as `arithmetic.rotated` says."""

    op_domain = ""

    def _run(
        self,
        x: Array,  # (B, S, H·C) or (B, H, S, C)
        cos_cache: Array,  # (B, S, R/2), or (positions, R/2) with position_ids
        sin_cache: Array,
        position_ids: NDArray[np.int64] | None = None,  # (B, S)
        *,
        num_heads: int = 0,
        rotary_embedding_dim: int = 0,
        interleaved: int = 0,
    ) -> tuple[Array]:
        self.of_one_type(X=x, cos_cache=cos_cache, sin_cache=sin_cache)
        cos, sin = (table if position_ids is None else table[position_ids] for table in (cos_cache, sin_cache))
        by_head = x  # (B, H, S, C)
        if x.ndim == 3:
            by_head = x.reshape(*x.shape[:2], num_heads, x.shape[2] // num_heads).swapaxes(1, 2)
        if 2 * cos.shape[-1] != (rotary_embedding_dim or by_head.shape[-1]):
            raise ValueError(
                f"{self.told}: tables of {cos.shape[-1]} columns turn {2 * cos.shape[-1]} channels, "
                f"not {rotary_embedding_dim or by_head.shape[-1]}"
            )
        turned = rotated(by_head, cos[:, None], sin[:, None], interleaved=interleaved == 1)
        return ((turned.swapaxes(1, 2) if x.ndim == 3 else turned).reshape(x.shape),)


class Sigmoid(Operator):
    """float16 in float32 and rounded once; bfloat16 at every step: `arithmetic.sigmoid` says what that loses."""

    op_domain = ""

    def _run(self, x: Array) -> tuple[Array]:
        return (sigmoid(x) if x.dtype == BF16 else rounded(sigmoid(widened(x)), x.dtype),)


class Gelu(Operator):
    """x · Φ(x) with Φ, the normal distribution, in float32; float16 is rounded once, bfloat16 at Φ(x), too."""

    op_domain = ""
    fixed: ClassVar = {"approximate": "none"}

    def _run(self, x: Array) -> tuple[Array]:
        wide = widened(x)
        with np.errstate(all="ignore"):
            normal = np.asarray(_NORMAL(wide)).astype(wide.dtype)
            if x.dtype == BF16:
                normal = widened(rounded(normal, BF16))
            return (rounded(wide * normal, x.dtype),)


class Softmax(Operator):
    """In float32 and rounded once."""

    op_domain = ""

    def _run(self, x: Array, *, axis: int = -1) -> tuple[Array]:
        wide = widened(x)
        with np.errstate(all="ignore"):
            share = np.exp(wide - wide.max(axis=axis, keepdims=True))
            return (rounded(share / share.sum(axis=axis, keepdims=True), x.dtype),)


class DequantizeLinear(Operator):
    """Integers · scale along one axis, rounded to the type of the scale."""

    op_domain = ""

    def _run(
        self, x: NDArray[np.int8], scale: Array, zero_point: NDArray[np.int8] | None = None, *, axis: int = 1
    ) -> tuple[Array]:
        self.refuse(zero_point=zero_point)
        by_axis = scale.reshape([-1 if i == axis % x.ndim else 1 for i in range(x.ndim)])
        return (rounded(x.astype(np.float32) * widened(by_axis), scale.dtype),)


STANDARD: Final[tuple[type[Operator], ...]] = (
    MatMul, Gemm, LayerNormalization, RMSNormalization, SimplifiedLayerNormalization, RotaryEmbedding, Sigmoid, Gelu,
    Softmax, DequantizeLinear,
)  # fmt: skip

ONNX: Final = frozenset(
    {
        *("Abs", "Add", "Clip", "Cos", "Div", "Erf", "Exp", "Log", "Max", "Min", "Mul", "Neg", "Pow", "Reciprocal"),
        *("ReduceMax", "Relu", "Sin", "Sqrt", "Sub", "Tanh", "Cast", "Where"),
        *("Concat", "Expand", "Gather", "GatherElements", "GatherND", "Identity", "Pad", "Reshape", "ScatterElements"),
        *("ScatterND", "Slice", "Split", "Squeeze", "Tile", "Transpose", "Unsqueeze"),
        *("Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual", "And", "Not", "Or"),
        *("BitShift", "BitwiseAnd", "Constant", "ConstantOfShape", "Range", "Shape", "Size"),  # not of 16 bits
    }
)
