"""The schemes under their names: what is stored for a matrix, and how it comes about and back.

Owns the table of parts; the numbers are in `int8`, `int4` and `nf4`. A matrix (N, K) is (out, in), as the checkpoint
has it. A *table* is one whose rows are looked up (the token embedding), not multiplied; it has forms of its own.

    scheme = Scheme("int4", block=128)
    parts = scheme.encode(weight)               # {"packed": …, "scale": …, "zero_point": …}
    scheme.decode(parts, weight.shape)          # float32 again
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from m0kit_quant import int4, int8, nf4
from m0kit_quant.weights import Float32

Parts = dict[str, NDArray[Any]]

FLOATS: Final[Mapping[str, np.dtype[Any]]] = {
    "fp32": np.dtype(np.float32),
    "fp16": np.dtype(np.float16),
    "bf16": np.dtype(ml_dtypes.bfloat16),
}


@dataclass(frozen=True, slots=True)
class Scheme:
    """How one matrix is stored. `block` is int4's; `table` says that rows are looked up."""

    name: str
    block: int | None = None
    table: bool = False

    @property
    def is_float(self) -> bool:
        return self.name in FLOATS

    def layout(self, shape: tuple[int, ...]) -> dict[str, tuple[tuple[int, ...], np.dtype[Any]]]:
        """Shape and type of each part. A float scheme has one part, called ""; raises ValueError for a misfit."""
        f32, u8, s8 = np.dtype(np.float32), np.dtype(np.uint8), np.dtype(np.int8)
        if self.name in FLOATS:
            return {"": (shape, FLOATS[self.name])}
        rows, columns = shape
        if self.name == "int8":
            return {"int8": (shape if self.table else (columns, rows), s8), "scale": ((rows,), f32)}
        if self.name == "nf4" and not self.table:
            num_bytes, num_blocks = nf4.stored_sizes((rows, columns))
            return {"nf4": ((num_bytes,), u8), "absmax": ((num_blocks,), f32)}
        if self.name == "int4" and self.block:
            int4.check_block(self.block, columns)
            blocks = columns // self.block
            zero = (rows, (blocks + 1) // 2)
            return {
                "int4": ((rows, blocks, self.block // 2), u8),
                "scale": ((rows, blocks), f32),
                "zero_point": (zero, u8),
            }
        raise ValueError(f"{self} cannot store {'a table' if self.table else 'a matrix'}")

    def encode(self, weight: Float32, importance: Float32 | None = None) -> Parts:
        """What is stored for `weight`. `importance` (K,) weighs the error of each input (int8, int4).

        Raises ValueError when a float type cannot hold a value.
        """
        if self.name in FLOATS:
            with np.errstate(over="ignore"):
                stored = weight.astype(FLOATS[self.name], copy=False)
            if not np.isfinite(stored).all():
                raise ValueError(f"holds {np.abs(weight).max():g}, which {self.name} cannot")
            return {"": stored}
        if self.name == "int8":
            values, scale = int8.quantize_rows(weight) if self.table else int8.quantize(weight, importance)
            return {"int8": values, "scale": scale}
        if self.name == "nf4":
            packed = nf4.quantize(weight)
            return {"nf4": packed.packed, "absmax": packed.absmax}
        assert self.block is not None
        four = int4.quantize(weight, self.block, importance)
        return {"int4": four.packed, "scale": four.scale, "zero_point": four.zero_point}

    def decode(self, parts: Mapping[str, NDArray[Any]], shape: tuple[int, ...]) -> Float32:
        """The float32 matrix that the stored parts stand for."""
        if self.name in FLOATS:
            return parts[""].astype(np.float32).reshape(shape)
        if self.name == "int8":
            if self.table:
                return np.asarray(parts["int8"].astype(np.float32) * parts["scale"][:, None])
            return int8.dequantize(parts["int8"], parts["scale"])
        if self.name == "nf4":
            return nf4.dequantize(nf4.NF4((shape[0], shape[1]), parts["nf4"], parts["absmax"]))
        return int4.dequantize(int4.Int4(parts["int4"], parts["scale"], parts["zero_point"]))
