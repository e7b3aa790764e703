"""fp32, fp16 and bf16: values as they are, or the nearest of 16 bits, widened where a product cannot take them.

Fp16Scheme().encode(weight)[""].dtype       # float16; ValueError where a value leaves its range
"""

from collections.abc import Mapping
from typing import Any, ClassVar, Final

import ml_dtypes
import numpy as np
from numpy.typing import DTypeLike, NDArray

from m0kit_quant.feedback import Plane
from m0kit_quant.scheme import CONTRIB, Layout, Nodes, Parts, Scheme
from m0kit_quant.weights import Float32


class FloatScheme(Scheme):
    """One part, called "", of a float type."""

    is_float = True
    dtype: ClassVar[np.dtype[Any]]

    def layout(self, shape: tuple[int, ...]) -> Layout:
        return {"": (shape, self.dtype)}

    def encode(self, weight: Float32, importance: Float32 | Plane | None = None) -> Parts:
        with np.errstate(over="ignore"):
            stored = weight.astype(self.dtype, copy=False)
        if not np.isfinite(stored).all():
            raise ValueError(f"holds {np.abs(weight).max():g}, which {self.name} cannot")
        return {"": stored}

    def decode(self, parts: Mapping[str, NDArray[Any]], shape: tuple[int, ...]) -> Float32:
        return parts[""].astype(np.float32).reshape(shape)

    def product(self, b: Nodes, x: str, part: Mapping[str, str], shape: tuple[int, int], out: str | None) -> str:
        return self.linear(b, x, part, shape, bias=None, half=False, out=out)

    def linear(
        self, b: Nodes, x: str, part: Mapping[str, str], shape: tuple[int, int],
        *, bias: str | None, half: bool, out: str | None,
    ) -> str:  # fmt: skip
        """In float16 only where the weights are and the values stay in range; elsewhere weights are widened as used."""
        added = [] if bias is None else [bias]
        if half and self.is_half:
            return b.cast(b.op("Gemm", b.cast(x, self.dtype), part[""], *added, transB=1), np.float32, out)
        if self.bias != "fp32":
            added = [b.cast(vector, np.float32) for vector in added]
        return b.op("Gemm", x, self._widened(b, part[""]), *added, transB=1, out=out)

    def lookup(self, b: Nodes, ids: str, part: Mapping[str, str], shape: tuple[int, int]) -> str:
        return self._widened(b, b.op("Gather", part[""], ids, axis=0))

    def cuda_linear(
        self, b: Nodes, x: str, part: Mapping[str, str], shape: tuple[int, int],
        *, dtype: np.dtype[Any], scale: float, bias: str | None,
    ) -> str:  # fmt: skip
        """In one product where the matrix is stored in the type; what was stored wider is multiplied in float32."""
        if self.dtype != dtype:
            wide = np.dtype(np.float32)
            added = bias if bias is None or dtype == wide else b.cast(bias, wide)
            x, matrix = (x if dtype == wide else b.cast(x, wide)), self._widened(b, part[""])
            y = _cuda_product(b, x, matrix, scale, added, wide)
            return y if dtype == wide else b.cast(y, dtype)
        return _cuda_product(b, x, part[""], scale, bias, dtype)

    def cuda_product(
        self, b: Nodes, x: str, part: Mapping[str, str], shape: tuple[int, int], dtype: np.dtype[Any]
    ) -> str:
        return self.cuda_linear(b, x, part, shape, dtype=dtype, scale=1.0, bias=None)

    def cuda_lookup(
        self, b: Nodes, ids: str, part: Mapping[str, str], shape: tuple[int, int], dtype: np.dtype[Any]
    ) -> str:
        rows = b.op("Gather", part[""], ids, axis=0)
        return rows if self.dtype == dtype else b.cast(rows, dtype)

    def _widened(self, b: Nodes, stored: str) -> str:
        return stored if self.dtype == np.float32 else b.cast(stored, np.float32)


def _cuda_product(b: Nodes, x: str, matrix: str, scale: float, bias: str | None, dtype: DTypeLike) -> str:
    """Gemm would write the bias to all rows first and read it again: a third slower on an H100 than an addition."""
    y = b.op("FusedMatMul", x, matrix, domain=CONTRIB, transB=1, alpha=scale)
    if bias is None:
        return y
    return b.op("Add", y, bias if scale == 1 else b.op("Mul", bias, b.const(scale, dtype)))


class Fp32Scheme(FloatScheme):
    """As it is."""

    name = "fp32"
    dtype = np.dtype(np.float32)


class Fp16Scheme(FloatScheme):
    """11 bits of what lies between 2⁻¹⁴ and 65504."""

    name = bias = "fp16"
    is_half = True
    dtype = np.dtype(np.float16)


class Bf16Scheme(FloatScheme):
    """8 bits, in the range of float32: the published checkpoint unchanged."""

    name = "bf16"
    dtype = np.dtype(ml_dtypes.bfloat16)


FLOATS: Final[Mapping[str, np.dtype[Any]]] = {each.name: each.dtype for each in (Fp32Scheme, Fp16Scheme, Bf16Scheme)}
