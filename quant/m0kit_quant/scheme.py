"""What a scheme is: how a matrix is stored, how it comes back, and how a graph computes with it as it is stored.

Owns the form that every scheme has; each is a class of its own, in `floats`, `int8`, `int4` and `nf4`, and `schemes`
lists them. A matrix (N, K) is (out, in), as the checkpoint has it. A *table* is one whose rows are looked up (the token
embedding), not multiplied; it may have a form of its own.

    scheme = Int4Scheme(128)
    parts = scheme.encode(weight)               # {"int4": …, "scale": …, "zero_point": …}
    scheme.decode(parts, weight.shape)          # float32 again
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Final, Protocol

import numpy as np
from numpy.typing import DTypeLike, NDArray

from m0kit_quant.feedback import Plane
from m0kit_quant.weights import Float32

Parts = dict[str, NDArray[Any]]
Layout = dict[str, tuple[tuple[int, ...], np.dtype[Any]]]

CONTRIB: Final = "com.microsoft"  # the domain of ONNX Runtime's own operators


class Nodes(Protocol):
    """What of a graph's builder a scheme needs. Values go by name; every method returns the name of its result."""

    def op(self, op_type: str, *inputs: str, out: str | None = None, **attributes: Any) -> str: ...
    def const(self, value: Any, dtype: DTypeLike = np.int64) -> str: ...
    def cast(self, x: str, dtype: DTypeLike, out: str | None = None) -> str: ...
    def once(self, x: str, make: Callable[[str], tuple[str, str]]) -> tuple[str, str]: ...


@dataclass(frozen=True)
class Scheme(ABC):
    """How one matrix is stored. `table`: its rows are looked up. Raises ValueError for a block that is none of it."""

    name: ClassVar[str]
    is_float: ClassVar[bool] = False
    blocks: ClassVar[tuple[int, ...]] = ()  # numbers of inputs that can share a scale, where one is to be chosen
    input_bits: ClassVar[tuple[int, ...]] = ()  # what inputs of a product may be rounded to, where that is to be chosen
    bias: ClassVar[str] = "fp32"  # the scheme of the vector that is added to the product
    takes_feedback: ClassVar[bool] = False  # a plane changes what is stored
    is_half: ClassVar[bool] = False  # products that stay in range are computed in float16

    block: int | None = None  # one of `blocks`
    table: bool = field(default=False, kw_only=True)
    inputs: int | None = field(default=None, kw_only=True)  # one of `input_bits`; None: the first

    def __post_init__(self) -> None:
        if self.inputs is not None and self.inputs not in self.input_bits:
            raise ValueError(f"inputs of {self.inputs} bits are not of {', '.join(map(str, self.input_bits)) or 'any'}")
        if self.blocks and self.block not in self.blocks:
            raise ValueError(f"block {self.block} is not one of {', '.join(map(str, self.blocks))}")

    @abstractmethod
    def layout(self, shape: tuple[int, ...]) -> Layout:
        """Shape and type of each part; raises ValueError for a matrix that it cannot store."""

    @abstractmethod
    def encode(self, weight: Float32, importance: Float32 | Plane | None = None) -> Parts:
        """What is stored for `weight`. `importance` weighs the error of each input (K,), where errors can be weighed.

        A plane of the inputs' second moment weighs them together: what is left over is fed back (`feedback`).
        Raises ValueError when a float type cannot hold a value.
        """

    @abstractmethod
    def decode(self, parts: Mapping[str, NDArray[Any]], shape: tuple[int, ...]) -> Float32:
        """The float32 matrix that the stored parts stand for."""

    @abstractmethod
    def product(self, b: Nodes, x: str, part: Mapping[str, str], shape: tuple[int, int], out: str | None) -> str:
        """x (T, K) float32 by the matrix `shape` (N, K), whose parts go by these names → (T, N) float32."""

    def linear(
        self, b: Nodes, x: str, part: Mapping[str, str], shape: tuple[int, int],
        *, bias: str | None, half: bool, out: str | None,
    ) -> str:  # fmt: skip
        """The product and a bias (N,) in the scheme `bias`; `half`: all of its values are in the range of float16."""
        y = self.product(b, x, part, shape, out if bias is None else None)
        return y if bias is None else b.op("Add", y, bias, out=out)

    def lookup(self, b: Nodes, ids: str, part: Mapping[str, str], shape: tuple[int, int]) -> str:
        """Rows `ids` (T,) of the table `shape` (V, D) → (T, D) float32; no other row is read."""
        raise NotImplementedError(f"{self.name} stores no tables, as its layout says")

    def cuda_linear(
        self, b: Nodes, x: str, part: Mapping[str, str], shape: tuple[int, int],
        *, dtype: np.dtype[Any], scale: float, bias: str | None,
    ) -> str:  # fmt: skip
        """scale · (x (T, K) by the matrix + bias (N,)), x, bias and result in `dtype`, by kernels that CUDA has.

        Nothing between is larger than the result, so that what `scale` brings into the type's range does not leave it
        on the way.
        """
        if scale != 1:
            x = b.op("Mul", x, b.const(scale, dtype))
        y = self.cuda_product(b, x, part, shape, dtype)
        if bias is None:
            return y
        return b.op("Add", y, bias if scale == 1 else b.op("Mul", bias, b.const(scale, dtype)))

    def cuda_rows(
        self, b: Nodes, part: Mapping[str, str], shape: tuple[int, int], rows: NDArray[np.int64]
    ) -> dict[str, str]:
        """The parts of the matrix of these of its rows, in that order. They are put so once, when a graph is opened."""
        return {key: b.op("Gather", stored, b.const(rows), axis=0) for key, stored in part.items()}

    @abstractmethod
    def cuda_product(
        self, b: Nodes, x: str, part: Mapping[str, str], shape: tuple[int, int], dtype: np.dtype[Any]
    ) -> str:
        """x (T, K) by the matrix, both and the result in `dtype`."""

    def cuda_lookup(
        self, b: Nodes, ids: str, part: Mapping[str, str], shape: tuple[int, int], dtype: np.dtype[Any]
    ) -> str:
        """Rows `ids` (T,) of the table `shape` (V, D) → (T, D) in `dtype`."""
        raise NotImplementedError(f"{self.name} stores no tables, as its layout says")

    def shared_scale(self, num_inputs: int) -> int | None:
        """How many inputs of a product are rounded with one scale, max|x| / 127; None where they are not rounded."""
        return None

    def rounded(self, x: Float32) -> Float32:
        """Inputs x (T, K) as the product sees them."""
        return x
