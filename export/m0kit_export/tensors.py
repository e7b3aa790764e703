"""Safetensors files: what a header says, and one tensor at a time, mapped. Never opens a pickle.

    read_header(path)["model.norm.weight"]      # ((1536,), "BF16")
    read_tensor(path, "model.norm.weight")      # CheckpointError where it holds a NaN

Owns what is taken for a file of tensors; which tensors a model has is `names`, what they are for is `checkpoint`.
"""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Final, TypedDict

import torch
from msgspec import Meta
from safetensors import SafetensorError, safe_open

from m0kit.errors import CheckpointError
from m0kit.files import open_regular
from m0kit.schema import fitting, parse

DTYPES: Final = {  # as a header spells them
    "U8": torch.uint8,
    "I8": torch.int8,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}
FLOATS: Final = ("F32", "F16", "BF16")  # those that weights may have

# Each ten times, or more, what the published model, or a fine-tune of it, has.
_MAX_HEADER_BYTES: Final = 4 << 20  # 100 kB, and ten times that where a trainer tells its story in the metadata
_MAX_NAME: Final = 512  # letters of a tensor's name: 100, in the wrappers of a trainer


@dataclass(frozen=True, slots=True)
class Stored:
    """A tensor in a file, as the file's header describes it."""

    file: str
    name: str  # in the file
    shape: tuple[int, ...]
    dtype: str  # as the header spells it


class _Tensor(TypedDict):
    """A tensor in the header of a safetensors file."""

    dtype: str
    shape: Annotated[list[Annotated[int, Meta(ge=0, lt=1 << 31)]], Meta(max_length=8)]


def read_header(path: Path) -> dict[str, tuple[tuple[int, ...], str]]:
    """Name → (shape, safetensors dtype) of a safetensors file. Raises CheckpointError that names the file."""
    reason = "truncated, damaged or a placeholder of a download that never finished"
    try:
        with open_regular(path) as file:
            size, there = int.from_bytes(file.read(8), "little"), os.fstat(file.fileno()).st_size
            if size > _MAX_HEADER_BYTES and size < there:
                raise ValueError(f"its header has {size} bytes, of which {_MAX_HEADER_BYTES} are read")  # noqa: TRY301
            header = parse(file.read(size)) if size < there else {}
        with safe_open(path, framework="pt") as mapped:  # its checks are those of where the values are
            mapped.keys()
        tensors = fitting({**header, "__metadata__": None}, dict[str, _Tensor | None])
    except OSError as error:
        reason = error.strerror or reason
    except SafetensorError:
        pass
    except ValueError as error:
        reason = str(error)
    else:
        if long := next((name for name in tensors if len(name) > _MAX_NAME), None):
            raise CheckpointError(
                f"{path.name} holds a tensor whose name has {len(long)} letters ({long[:40]}…), of which m0kit reads "
                f"{_MAX_NAME}. Save it without what was wrapped around the model"
            )
        return {name: (tuple(tensor["shape"]), tensor["dtype"]) for name, tensor in tensors.items() if tensor}
    raise CheckpointError(f"{path.name} is not a readable safetensors file: {reason}. Fetch it again")


def read_tensor(path: Path, name: str) -> torch.Tensor:
    """One tensor of a safetensors file, memory-mapped. Raises CheckpointError on NaN, infinity or damage."""
    tensor = read_raw(path, name)
    check_finite(tensor, name, path.name)
    return tensor


def check_tensors(path: Path, names: Sequence[str]) -> None:
    """Raises CheckpointError on NaN, infinity or damage in any of these tensors of a file, which is opened once."""
    for name, tensor in _read_all(path, names):
        check_finite(tensor, name, path.name)


def read_raw(path: Path, name: str) -> torch.Tensor:
    """As `read_tensor`, whatever values it holds."""
    return next(tensor for _, tensor in _read_all(path, [name]))


def _read_all(path: Path, names: Sequence[str]) -> Iterator[tuple[str, torch.Tensor]]:
    name = next(iter(names), "its header")
    try:
        with safe_open(path, framework="pt") as file:
            for name in names:
                yield name, file.get_tensor(name)
    except (SafetensorError, AttributeError, OSError, OverflowError, RuntimeError, TypeError, ValueError):
        raise CheckpointError(
            f"cannot read {name} from {path.name}: the file changed or is damaged. Fetch it again"
        ) from None


def check_finite(tensor: torch.Tensor, name: str, file: str) -> None:
    """Raises CheckpointError that names the tensor and the file it is of."""
    # In pieces: the mask of the whole embedding would be a quarter of a gigabyte.
    if not all(bool(torch.isfinite(piece).all()) for piece in torch.split(tensor.reshape(-1), 1 << 24)):
        raise CheckpointError(
            f"{name} in {file} holds NaN or infinite values: the training diverged or the file is "
            "damaged. Export an earlier state, or fetch it again"
        )
