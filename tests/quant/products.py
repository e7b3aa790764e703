"""What each scheme's product must come out at, in numpy: graphs and kernels are held against these. Not a test file."""

import numpy as np
from numpy.typing import NDArray

from m0kit_quant.int4 import Int4
from m0kit_quant.int4 import dequantize as dequantize_int4
from m0kit_quant.int8 import LEVELS, ZERO_POINT, quantize_activation
from m0kit_quant.nf4 import NF4
from m0kit_quant.nf4 import dequantize as dequantize_nf4
from m0kit_quant.weights import Float32


def int8(x: Float32, values: NDArray[np.int8], scale: Float32) -> Float32:
    """The exact model of the product: x (T, K) → (T, N), sums in int64, one rounding per scale."""
    q, a = quantize_activation(x)
    sums = (q.astype(np.int64) - ZERO_POINT) @ values.astype(np.int64)
    return np.asarray((sums.astype(np.float64) * scale).astype(np.float32) * a, np.float32)


def int4(x: Float32, stored: Int4) -> Float32:
    """The exact model of the product: x (T, K) → (T, N); activations rounded to int8 per row and block, float64 sums.

    A block of activations has scale max|x| / 127 and rounds half to even.
    """
    num_rows, (num_outputs, num_blocks, half) = len(x), stored.packed.shape
    blocks = x.reshape(num_rows, num_blocks, 2 * half)
    a = np.abs(blocks).max(axis=2, keepdims=True) / np.float32(LEVELS)
    rounded = np.rint(np.divide(blocks, a, out=np.zeros_like(blocks), where=a > 0))
    y = np.zeros((num_rows, num_outputs))
    w = dequantize_int4(stored).reshape(num_outputs, num_blocks, 2 * half).astype(np.float64)
    for i in range(num_blocks):
        y += (rounded[:, i].astype(np.float64) @ w[:, i].T) * a[:, i]
    return y.astype(np.float32)


def nf4(activations: Float32, weight: NF4) -> Float32:
    """activations (T, in) times the transposed matrix: (T, out), as ONNX Runtime's MatMulBnb4 has it in fp32.

    The operator, too, writes the whole matrix out in fp32 and multiplies; only the order of its sums is its own.
    """
    result: Float32 = activations @ dequantize_nf4(weight).T
    return result
