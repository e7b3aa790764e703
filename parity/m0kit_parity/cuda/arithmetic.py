"""Arithmetic on numbers of 16 bits as CUDA kernels do it: what is summed is summed in float32 and rounded once.

Owns the steps that several operators share; an operator's form, its inputs and attributes, is that operator's file's.
All of it takes float16, bfloat16 (`ml_dtypes`), float32 and float64; what is summed is float32 then, or wider. What
leaves the range of a type becomes infinite, as in hardware, without a warning.

Where elementwise kernels round is not in any schema. It was read in the machine code of onnxruntime-gpu 1.31.1 for
sm80 (`cuobjdump -sass`), and is said at each function and operator.

    >>> product(np.full((1, 2), 250, np.float16), np.full((2, 1), 250, np.float16))
    array([[inf]], dtype=float16)
"""

from collections.abc import Callable
from typing import Any, Final

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

BF16: Final = np.dtype(ml_dtypes.bfloat16)


def widened(x: Array) -> Array:
    """What is summed with: 16 bits as float32, wider types as they are."""
    return x.astype(np.float32) if x.dtype.itemsize < 4 else x


def rounded(x: Array, dtype: np.dtype[Any]) -> Array:
    """To the nearest of `dtype`, ties to even; infinite beyond its range."""
    with np.errstate(over="ignore", invalid="ignore"):
        return x.astype(dtype, copy=False)


def product(a: Array, b: Array, *, alpha: float = 1.0, added: Array | None = None, beta: float = 1.0) -> Array:
    """alpha · a @ b + beta · added in the type of `a`, as cuBLAS has it: all of it in float32, rounded once."""
    with np.errstate(all="ignore"):
        result = np.matmul(widened(a), widened(b))
        if alpha != 1:
            result = result * np.asarray(alpha, result.dtype)
        if added is not None and beta:
            result = result + widened(added) * np.asarray(beta, result.dtype)
    return rounded(result, a.dtype)


def multiplied_and_added(a: Array, b: Array, c: Array) -> Array:
    """a · b + c in the type of `c`: float16 has one instruction for it and rounds once, bfloat16 the product too."""
    with np.errstate(all="ignore"):
        result = widened(a) * widened(b)
        if c.dtype == BF16:
            result = widened(rounded(result, BF16))
        return rounded(result + widened(c), c.dtype)


def by_step(x: Array, *steps: Callable[[Array], Array]) -> Array:
    """Each step in float32 and rounded to the type of `x`, as elementwise kernels that compute in 16 bits do."""
    for step in steps:
        with np.errstate(all="ignore"):
            x = rounded(step(widened(x)), x.dtype)
    return x


def sigmoid(x: Array) -> Array:
    """1 / (1 + e^-|x|), and 1 less that where x is negative, every step in the type of `x`.

    16 bits lose what is small beside 1: float16 has 0 for all x below -7.6, bfloat16 below -5.5.
    """
    positive = by_step(np.abs(x), lambda v: np.exp(-v), lambda v: 1 + v, lambda v: 1 / v)
    return np.where(x < 0, by_step(positive, lambda v: 1 - v), positive)


def normalised(
    x: Array, scale: Array, bias: Array | None, epsilon: float, *, axis: int = -1, centred: bool
) -> tuple[Array, Array, Array]:
    """LayerNorm (`centred`) or RMSNorm over the axes from `axis` on → result, mean, 1/deviation, in float32 or wider.

    Mean and variance are of the values as they are given; epsilon is in float32, too.
    """
    wide = widened(x)
    axes = tuple(range(axis % x.ndim, x.ndim))
    with np.errstate(all="ignore"):
        mean = wide.mean(axis=axes, keepdims=True) if centred else np.zeros((), wide.dtype)
        apart = wide - mean
        inverse = 1 / np.sqrt(np.square(apart).mean(axis=axes, keepdims=True) + np.asarray(epsilon, wide.dtype))
        result = apart * inverse * widened(scale)
        if bias is not None:
            result = result + widened(bias)
    return result, mean, inverse


def rotated(x: Array, cos: Array, sin: Array, *, interleaved: bool) -> Array:
    """x (…, C) with its first 2·R channels turned by cos and sin (…, R), which are broadcast; the rest as it is.

    Pairs are channels j and R + j, or 2j and 2j + 1 where `interleaved`. The product by sin is rounded by itself.
    """
    half = cos.shape[-1]
    if interleaved:
        first, second = x[..., 0 : 2 * half : 2], x[..., 1 : 2 * half : 2]
    else:
        first, second = x[..., :half], x[..., half : 2 * half]

    with np.errstate(all="ignore"):
        into_first, into_second = (rounded(widened(v) * widened(sin), x.dtype) for v in (-second, first))
    real, imaginary = multiplied_and_added(first, cos, into_first), multiplied_and_added(second, cos, into_second)
    if interleaved:
        turned = np.stack([real, imaginary], axis=-1).reshape(*real.shape[:-1], 2 * half)
    else:
        turned = np.concatenate([real, imaginary], axis=-1)
    return np.concatenate([turned, x[..., 2 * half :]], axis=-1)
