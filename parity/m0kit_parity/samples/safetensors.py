"""A safetensors file written as its values come, so that no more than a slice is in memory.

The safetensors package writes what is whole in memory. Owns the file's form: the length of the header in 8 bytes, the
header as JSON padded to 8, then the values one tensor after the other.

    write(path, {"norm.weight": (torch.float32, (64,))}, [torch.ones(64)])
"""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from m0kit_export.tensors import DTYPES


def write(path: Path, tensors: Mapping[str, tuple[torch.dtype, Sequence[int]]], values: Iterable[torch.Tensor]) -> int:
    """Write tensors of these types and shapes; returns the bytes of their values.

    `values` are those of all tensors in that order, each flat tensor the whole of one or a slice of it.
    """
    spelled = {dtype: kind for kind, dtype in DTYPES.items()}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (dtype, shape) in tensors.items():
        start, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": spelled[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for part in values:
            file.write(part.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return end
