"""Matrices stored in bitsandbytes' 4 bits, as transformers' save_pretrained of a load_in_4bit model writes them.

Owns what their pieces are called, how they must fit each other, and reading them; the arithmetic is
bitsandbytes'. Its kernels trust what they are given, so nothing reaches them that was not measured first.

For `X.weight` a file holds: X.weight, the codes, two per byte, (bytes / item size, 1) in whatever dtype the
bytes were stored; X.weight.absmax, a scale per block; X.weight.quant_map, the 16 levels; and as JSON in
X.weight.quant_state.bitsandbytes__nf4 (or fp4) shape, dtype and block size. Under double quantisation absmax
is one byte per block, and nested_absmax and nested_quant_map are the scales and the 256 levels of these.
"""

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from m0kit.errors import CheckpointError
from m0kit_export.tensors import DTYPES, Stored
from m0kit_quant.nf4 import bitsandbytes_functional

_PIECE = re.compile(
    r"(?P<weight>.+)\.(?P<part>absmax|quant_map|nested_absmax|nested_quant_map|quant_state\.bitsandbytes__(?:nf4|fp4))"
)
_STATE = "quant_state.bitsandbytes__"
_STATE_BYTES = 4096  # bitsandbytes writes about 170
_DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
_BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
_NESTED_BLOCK_SIZE = 256


@dataclass(frozen=True, slots=True)
class Packed(Stored):
    """A matrix in 4 bits: `shape` and `dtype` are those it was quantised from and is read as."""

    pieces: Mapping[str, Stored]  # "weight", "absmax", "quant_map", and with nested scales their two
    quant_type: str  # "nf4" or "fp4"
    block_size: int
    nested_offset: float | None  # of double quantisation


def join_pieces(stored: list[Stored], read: Callable[[Stored], torch.Tensor]) -> list[Stored]:
    """What the files hold, with the pieces of each 4-bit matrix made one `Packed`; `read` opens one tensor.

    Raises CheckpointError for a piece that is missing, left over, of another shape or dtype, or unreadable.
    """
    groups: dict[str, dict[str, Stored]] = {}
    for tensor in stored:
        if match := _PIECE.fullmatch(tensor.name):
            groups.setdefault(match["weight"], {})[match["part"]] = tensor
    joined: list[Stored] = []
    for tensor in stored:
        if pieces := groups.pop(tensor.name, None):
            joined.append(_join(tensor, pieces, read))
        elif not _PIECE.fullmatch(tensor.name):
            joined.append(tensor)
    if groups:
        weight, pieces = next(iter(groups.items()))
        left = next(iter(pieces.values()))
        raise CheckpointError(f"{left.file} holds {left.name}, but there is no {weight}: the checkpoint is incomplete")
    return joined


def unpack(packed: Packed, read: Callable[[Stored], torch.Tensor]) -> torch.Tensor:
    """The matrix (out, in) in its dtype: level times absmax in fp32, rounded to that dtype, by bitsandbytes.

    Raises CheckpointError when a piece changed since it was measured, DependencyError without bitsandbytes.
    """
    functional = bitsandbytes_functional()
    pieces = {part: _read_piece(piece, read) for part, piece in packed.pieces.items()}
    levels = functional.get_4bit_type(packed.quant_type, device="cpu")
    if not torch.equal(pieces["quant_map"], levels):  # on the CPU, bitsandbytes would not look at them
        raise CheckpointError(
            f"{packed.name} in {packed.file} has levels of its own, not those of {packed.quant_type}: "
            "the file is damaged, or no bitsandbytes wrote it. Fetch it again"
        )
    nested = None
    if packed.nested_offset is not None:
        nested = functional.QuantState(
            absmax=pieces["nested_absmax"],
            code=pieces["nested_quant_map"],
            blocksize=_NESTED_BLOCK_SIZE,
            dtype=torch.float32,
        )
    dtype = next(name for name, spelled in _DTYPES.items() if spelled == packed.dtype)
    state = functional.QuantState(
        absmax=pieces["absmax"],
        # As one row: bitsandbytes 0.50 misplaces the scales of rows that are no multiple of the block (AVX-512).
        shape=torch.Size([math.prod(packed.shape)]),
        code=levels,
        blocksize=packed.block_size,
        quant_type=packed.quant_type,
        dtype=getattr(torch, dtype),
        offset=None if nested is None else torch.tensor(packed.nested_offset),
        state2=nested,
    )
    matrix: torch.Tensor = functional.dequantize_4bit(pieces["weight"].reshape(-1, 1).view(torch.uint8), state)
    return matrix.reshape(packed.shape)


def _join(weight: Stored, pieces: Mapping[str, Stored], read: Callable[[Stored], torch.Tensor]) -> Packed:
    states = [part for part in pieces if part.startswith(_STATE)]
    if len(states) != 1:
        raise CheckpointError(
            f"{weight.name} in {weight.file} has {len(states)} quant_states, expected one: "
            "the checkpoint is incomplete or damaged. Fetch it again"
        )
    state = _read_state(pieces[states[0]], states[0].removeprefix(_STATE), read)
    size = math.prod(state["shape"])
    num_blocks = -(-size // state["blocksize"])
    nested = "nested_offset" in state
    storage = weight.dtype if weight.dtype in DTYPES else "U8"  # bnb_4bit_quant_storage
    item = DTYPES[storage].itemsize
    wanted: dict[str, tuple[tuple[int, ...], str]] = {
        "weight": ((-(-size // 2) // item, 1), storage),
        "absmax": ((num_blocks,), "U8" if nested else "F32"),
        "quant_map": ((16,), "F32"),
    }
    if nested:
        wanted["nested_absmax"] = ((-(-num_blocks // _NESTED_BLOCK_SIZE),), "F32")
        wanted["nested_quant_map"] = ((256,), "F32")
    found = {"weight": weight} | {part: piece for part, piece in pieces.items() if part != states[0]}
    if missing := [part for part in wanted if part not in found]:
        raise CheckpointError(
            f"{weight.name}.{missing[0]} is missing, without which the 4 bits of {weight.name} mean nothing: "
            "the checkpoint is incomplete"
        )
    if extra := [piece for part, piece in found.items() if part not in wanted]:
        raise CheckpointError(
            f"{extra[0].file} holds {extra[0].name}, but {weight.name} has no double quantisation. Fetch it again"
        )
    for part, (shape, dtype) in wanted.items():
        piece = found[part]
        if (piece.shape, piece.dtype) != (shape, dtype):
            raise CheckpointError(
                f"{piece.name} in {piece.file} is {piece.dtype} {list(piece.shape)}; for 4-bit weights of shape "
                f"{list(state['shape'])} it must be {dtype} {list(shape)}. Fetch it again"
            )
    if -(-size // 2) % item:
        raise CheckpointError(f"{weight.name} in {weight.file} does not fill whole values of {weight.dtype}")
    return Packed(
        file=weight.file,
        name=weight.name,
        shape=state["shape"],
        dtype=_DTYPES[state["dtype"]],
        pieces=found,
        quant_type=state["quant_type"],
        block_size=state["blocksize"],
        nested_offset=float(state["nested_offset"]) if nested else None,
    )


def _read_state(piece: Stored, quant_type: str, read: Callable[[Stored], torch.Tensor]) -> dict[str, Any]:
    """The JSON of a quant_state, every field checked."""

    def refuse(why: str) -> CheckpointError:
        return CheckpointError(f"{piece.name} in {piece.file} {why}. Fetch it again, or save it unquantised")

    if piece.dtype != "U8" or len(piece.shape) != 1 or piece.shape[0] > _STATE_BYTES:
        raise refuse(f"is {piece.dtype} {list(piece.shape)}, expected a short text as U8")
    try:
        state = json.loads(bytes(read(piece).tolist()))
    except (ValueError, RecursionError):
        raise refuse("is not readable JSON") from None
    if not isinstance(state, dict):
        raise refuse(f"holds {type(state).__name__}, not an object")
    nested = {"nested_blocksize": (_NESTED_BLOCK_SIZE,), "nested_dtype": ("float32",)}
    accepted: dict[str, tuple[Any, ...]] = {
        "quant_type": (quant_type,),
        "blocksize": _BLOCK_SIZES,
        "dtype": tuple(_DTYPES),
        **(nested if any(field.startswith("nested") for field in state) else {}),
    }
    for field, values in accepted.items():
        value = state.get(field)
        if isinstance(value, bool | float) or value not in values:
            raise refuse(f"has {field} {value!r:.40}; known are {', '.join(map(str, values))}")
    shape = state.get("shape")
    if not (isinstance(shape, list) and len(shape) == 2 and all(type(n) is int and 0 < n < 1 << 31 for n in shape)):
        raise refuse(f"has shape {shape!r:.40}, expected that of a matrix")
    known = {*accepted, "shape"}
    if "nested_dtype" in accepted:
        offset = state.get("nested_offset")
        known.add("nested_offset")
        if isinstance(offset, bool) or not isinstance(offset, int | float) or not abs(offset) < 1e30:
            raise refuse(f"has nested_offset {offset!r:.40}, expected a number")
    if unknown := sorted(set(state) - known):
        raise refuse(f"has {unknown[0]!r:.40}, which m0kit does not know")
    return {**state, "shape": tuple(shape)}


def _read_piece(piece: Stored, read: Callable[[Stored], torch.Tensor]) -> torch.Tensor:
    """Its own copy where it is numbers: a file may place them where the kernels' wide loads cannot reach."""
    tensor = read(piece)
    if (tuple(tensor.shape), tensor.dtype) != (piece.shape, DTYPES.get(piece.dtype)):
        raise CheckpointError(
            f"{piece.file} changed while in use: {piece.name} was {piece.dtype} {list(piece.shape)}, now is "
            f"{tensor.dtype} {list(tensor.shape)}. Open the checkpoint again once nothing writes to it"
        )
    return tensor.contiguous().clone()
