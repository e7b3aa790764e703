"""A device as the CUDA engine sees it: memory by addresses, copies, and graphs that run on it.

Owns what a device must be able to do; `m0kit.scoring.cuda_device` does it on a GPU.

    graph.run({"hidden": Placed(address, (8, 1536), "float32")}, {"logit": logits})
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


class Placed(NamedTuple):
    """An array on the device: where it begins, its shape and the name of its type."""

    address: int
    shape: tuple[int, ...]
    dtype: str


class DeviceGraph(Protocol):
    """A graph ready to run on a device."""

    def bind(self, values: Mapping[str, Placed]) -> None:
        """Inputs and outputs that stay where they are from run to run."""

    def run(self, inputs: Mapping[str, "Array | Placed"], outputs: Mapping[str, "Array | Placed"]) -> None:
        """One run, done on return. Arrays are copied from and to the computer's memory."""


class Device(Protocol):
    """What an engine needs of a device."""

    def allocate(self, num_bytes: int) -> int:
        """Memory, until the device is let go."""

    def free(self, address: int) -> None:
        """Give memory back before that."""

    def free_bytes(self) -> int:
        """What could still be allocated."""

    def pinned(self, num_bytes: int) -> NDArray[np.uint8]:
        """Memory of the computer that is copied from and to at full speed."""

    def copy(
        self, target: int, source: int, width: int, rows: int = 1, target_pitch: int = 0, source_pitch: int = 0
    ) -> None:
        """`rows` times `width` bytes, each so far behind the one before; done on return."""

    def open(self, folder: Path, name: str) -> DeviceGraph:
        """A graph of an artifact."""


def item_size(dtype: str) -> int:
    """Bytes of a value."""
    return 2 if dtype == "bfloat16" else np.dtype(dtype).itemsize
