"""NF4, the 4-bit scheme of QLoRA: 16 levels that a normal distribution fills evenly, one scale per 64 values.

Owns the layout and its arithmetic. The rounding is that of bitsandbytes to the bit, so that a weight is here what it
was while a QLoRA adapter was trained; written in numpy, so that neither bitsandbytes nor PyTorch is needed. Nothing is
kept of double quantisation: scales stay float32.

    >>> weight = quantize(np.ones((2, 64), np.float32))                 # doctest: +SKIP
    >>> weight.packed.shape, weight.absmax.shape                        # doctest: +SKIP
    ((64,), (2,))

Layout, which is bitsandbytes' and that of com.microsoft MatMulBnb4 (quant_type 1, block_size 64, transB 1):
a matrix (out, in) is read row after row as one line of values. Blocks are 64 of them in a row, so where
`in` is no multiple of 64 a block runs on into the next row. Two values share a byte, the first in its upper
half. A last byte half used holds level 7, which is 0, below.
"""

import importlib.util
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from m0kit.errors import CheckpointError, DependencyError
from m0kit.precision import SCHEMES
from m0kit_quant.feedback import Plane, fed_back
from m0kit_quant.int8 import by_rows
from m0kit_quant.scheme import CONTRIB, Layout, Nodes, Parts, Scheme
from m0kit_quant.weights import Float32

BLOCK_SIZE = 64

# Dettmers et al. 2023, "QLoRA: Efficient Finetuning of Quantized LLMs", appendix E.
LEVELS: Float32 = np.array(
    [
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
        *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
        *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
        *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
    ],
    np.float32,
)
LEVELS.setflags(write=False)
ZERO = 7  # the level that is 0
_PAIRS: Float32 = np.stack([np.repeat(LEVELS, 16), np.tile(LEVELS, 16)], axis=1)  # byte → its two levels (256, 2)

_MIDDLES: Float32 = (LEVELS[:-1] + LEVELS[1:]) / np.float32(2)  # a value above one gets the next level (15,)
_SMALLEST = np.float32(1e-38)  # bitsandbytes' floor of what is divided by

_WITHOUT = "QLoRA and checkpoints stored in 4 bits need bitsandbytes: pip install 'm0kit[nf4]'"
_PIECE = 1 << 20  # values read back at once: a whole embedding has 233 million


class Nf4Scheme(Scheme):
    """Codes and the largest |value| of each block. No tables: blocks run on from row to row."""

    name = "nf4"
    takes_feedback = True

    def layout(self, shape: tuple[int, ...]) -> Layout:
        if self.table:
            raise ValueError(f"{self.name} cannot store a table")
        num_bytes, num_blocks = stored_sizes((shape[0], shape[1]))
        return {"nf4": ((num_bytes,), np.dtype(np.uint8)), "absmax": ((num_blocks,), np.dtype(np.float32))}

    def encode(self, weight: Float32, importance: Float32 | Plane | None = None) -> Parts:
        stored = quantize(weight)
        if isinstance(importance, Plane):
            stored = fed_back_codes(weight, stored, importance)
        return {"nf4": stored.packed, "absmax": stored.absmax}

    def decode(self, parts: Mapping[str, NDArray[Any]], shape: tuple[int, ...]) -> Float32:
        return dequantize(NF4((shape[0], shape[1]), parts["nf4"], parts["absmax"]))

    def product(self, b: Nodes, x: str, part: Mapping[str, str], shape: tuple[int, int], out: str | None) -> str:
        return b.op(
            *(str(SCHEMES[self.name].operator), x, part["nf4"], part["absmax"]), out=out,
            domain=CONTRIB, K=shape[1], N=shape[0], block_size=BLOCK_SIZE, quant_type=1,
        )  # fmt: skip

    def cuda_rows(
        self, b: Nodes, part: Mapping[str, str], shape: tuple[int, int], rows: NDArray[np.int64]
    ) -> dict[str, str]:
        """Where blocks are whole rows' own; elsewhere a block of the matrix is no block of its rows."""
        if shape[1] % BLOCK_SIZE:
            raise NotImplementedError(f"rows of {shape[1]} values are no blocks of {BLOCK_SIZE}")
        widths = {"nf4": shape[1] // 2, "absmax": shape[1] // BLOCK_SIZE}
        by_row = {key: b.op("Reshape", part[key], b.const([shape[0], width])) for key, width in widths.items()}
        chosen = {key: b.op("Gather", table, b.const(rows), axis=0) for key, table in by_row.items()}
        return {key: b.op("Reshape", table, b.const([-1])) for key, table in chosen.items()}

    def cuda_product(
        self, b: Nodes, x: str, part: Mapping[str, str], shape: tuple[int, int], dtype: np.dtype[Any]
    ) -> str:
        absmax = part["absmax"] if dtype == np.float32 else b.cast(part["absmax"], dtype)
        return b.op(
            "MatMulBnb4", x, part["nf4"], absmax,
            domain=CONTRIB, K=shape[1], N=shape[0], block_size=BLOCK_SIZE, quant_type=1,
        )  # fmt: skip


@dataclass(frozen=True, slots=True, eq=False)
class NF4:
    """A quantised matrix."""

    shape: tuple[int, int]  # (out, in)
    packed: NDArray[np.uint8]  # (ceil(out·in / 2),)
    absmax: Float32  # (ceil(out·in / 64),)

    def __post_init__(self) -> None:
        num_bytes, num_blocks = stored_sizes(self.shape)
        _check_part("packed", self.packed, np.uint8, num_bytes)
        _check_part("absmax", self.absmax, np.float32, num_blocks)


def stored_sizes(shape: tuple[int, int]) -> tuple[int, int]:
    """(bytes of `packed`, float32 values of `absmax`) of a matrix (out, in)."""
    size = prod(shape)
    return -(-size // 2), -(-size // BLOCK_SIZE)


def quantize(weight: Float32) -> NF4:
    """Round a float32 matrix (out, in) as bitsandbytes does; memory beyond the result stays at some 30 MB a core.

    Raises CheckpointError for NaN, infinity or an empty matrix.
    """
    if weight.ndim != 2 or weight.dtype != np.float32:
        raise ValueError(f"NF4 takes a float32 matrix, got {weight.dtype} {list(weight.shape)}")
    if weight.size == 0:
        raise CheckpointError(f"a matrix of shape {list(weight.shape)} has nothing to quantise")
    flat = weight.reshape(-1)
    num_bytes, num_blocks = stored_sizes((weight.shape[0], weight.shape[1]))
    packed, absmax = np.empty(num_bytes, np.uint8), np.empty(num_blocks, np.float32)
    whole = flat.size // BLOCK_SIZE * BLOCK_SIZE

    def fill(first: int, end: int) -> None:
        blocks = flat[first * BLOCK_SIZE : end * BLOCK_SIZE].reshape(-1, BLOCK_SIZE)
        absmax[first:end] = largest = np.abs(blocks).max(axis=1)
        reciprocal = np.float32(1) / np.maximum(largest, _SMALLEST)
        with np.errstate(invalid="ignore"):  # of infinities, which are refused below
            codes = _codes(blocks * reciprocal[:, None]).reshape(-1)
        packed[first * BLOCK_SIZE // 2 : end * BLOCK_SIZE // 2] = codes[::2] << 4 | codes[1::2]

    by_rows(fill, whole // BLOCK_SIZE, BLOCK_SIZE)
    if whole < flat.size:  # bitsandbytes divides a last block that is shorter, and keeps what it divided by
        rest = flat[whole:]
        absmax[-1] = divisor = np.maximum(np.abs(rest).max(), _SMALLEST)
        with np.errstate(invalid="ignore"):
            codes = np.append(_codes(rest / divisor), np.uint8(ZERO))[: (len(rest) + 1) // 2 * 2]
        packed[whole // 2 :] = codes[::2] << 4 | codes[1::2]
    if not np.isfinite(absmax).all():
        raise CheckpointError(
            f"a matrix of shape {list(weight.shape)} holds NaN or infinite values, for which NF4 has no level. "
            "Look for the reason in the checkpoint or its adapters"
        )
    return NF4((weight.shape[0], weight.shape[1]), packed, absmax)


def fed_back_codes(weight: Float32, stored: NF4, plane: Plane) -> NF4:
    """The same scales with codes that make up for each other's errors; no longer what bitsandbytes would store."""
    width = weight.shape[1]

    def nearest(first: int, end: int, column: int, wanted: NDArray[np.float64]) -> tuple[Any, Any]:
        scale = np.maximum(stored.absmax[(np.arange(first, end) * width + column) // BLOCK_SIZE], _SMALLEST)
        codes = _codes(np.asarray(wanted / scale, np.float32))
        return codes, LEVELS[codes].astype(np.float64) * scale

    codes = fed_back(weight, plane, nearest, np.uint8).reshape(-1)
    codes = np.append(codes, np.uint8(ZERO))[: (len(codes) + 1) // 2 * 2]
    return NF4(stored.shape, codes[::2] << 4 | codes[1::2], stored.absmax)


def _codes(scaled: Float32) -> NDArray[np.uint8]:
    """Values between -1 and 1 → their levels, 0…15. Fifteen comparisons are three times as fast as a binary search."""
    codes = np.zeros(scaled.shape, np.uint8)
    for middle in _MIDDLES:
        codes += scaled > middle
    return codes


def dequantize(weight: NF4) -> Float32:
    """The float32 matrix (out, in) that the codes stand for: level times absmax, rounded once."""
    size = prod(weight.shape)
    values = np.empty(size, np.float32)
    for start in range(0, size, _PIECE):
        stop = min(start + _PIECE, size)
        levels = _PAIRS[weight.packed[start // 2 : -(-stop // 2)]].reshape(-1)[: stop - start]
        scales = weight.absmax[start // BLOCK_SIZE : -(-stop // BLOCK_SIZE)]
        np.multiply(levels, np.repeat(scales, BLOCK_SIZE)[: stop - start], out=values[start:stop])
    return values.reshape(weight.shape)


def _check_part(name: str, array: NDArray[Any], dtype: type, size: int) -> None:
    if array.dtype != dtype or array.shape != (size,):
        raise ValueError(f"{name} must be {dtype.__name__} [{size}], got {array.dtype} {list(array.shape)}")


def require_bitsandbytes() -> None:
    """Raises DependencyError that names the extra, without importing anything."""
    if importlib.util.find_spec("bitsandbytes") is None:
        raise DependencyError(_WITHOUT)


def bitsandbytes_functional() -> Any:
    """The module bitsandbytes.functional. Raises DependencyError that names the extra."""
    # On CPUs with bf16 instructions it warns that a product we never ask for will be slow.
    notices = logging.getLogger("bitsandbytes.backends.cpu.ops")
    level = notices.level
    notices.setLevel(logging.ERROR)
    try:
        return importlib.import_module("bitsandbytes.functional")
    except ImportError:
        raise DependencyError(_WITHOUT) from None
    finally:
        notices.setLevel(level)
