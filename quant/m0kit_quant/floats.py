"""fp32, fp16 and bf16: values as they are, or the nearest of 16 bits, widened where a product cannot take them.

Fp16Scheme().encode(weight)[""].dtype       # float16; ValueError where a value leaves its range
"""

from collections.abc import Mapping
from typing import Any, ClassVar, Final

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from m0kit_quant.scheme import Layout, Nodes, Parts, Scheme
from m0kit_quant.weights import Float32


class FloatScheme(Scheme):
    """One part, called "", of a float type."""

    is_float = True
    dtype: ClassVar[np.dtype[Any]]

    def layout(self, shape: tuple[int, ...]) -> Layout:
        return {"": (shape, self.dtype)}

    def encode(self, weight: Float32, importance: Float32 | None = None) -> Parts:
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

    def _widened(self, b: Nodes, stored: str) -> str:
        return stored if self.dtype == np.float32 else b.cast(stored, np.float32)


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
