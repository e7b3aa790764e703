"""The data files of an artifact: written weight by weight, compared with what was written, read back as weights.

Owns the bytes between a graph's weights and its file NAME.onnx.data; where each part lies there is the graph's
(`builder`), what it holds is its scheme's.

    with DataFiles(folder, graphs, bar) as files:
        files.write_rest(weights, {})
    check_weights(folder, "head.onnx", files.hashes, bar)
    StoredWeights(folder, graphs).read("score.0.weight")
"""

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO, Final

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx.external_data_helper import ExternalDataInfo

from m0kit.errors import CheckpointError, OutputError
from m0kit_export.builder import Graph, Weight
from m0kit_quant.scheme import Parts
from m0kit_quant.weights import Float32, Weights

_CHUNK: Final = 16 << 20


class DataFiles:
    """The data files of graphs while they are written, weight by weight in any order."""

    def __init__(self, folder: Path, graphs: Mapping[str, Graph], bar: Any) -> None:
        self._bar = bar
        self._paths = {w.name: folder / f"{name}.onnx.data" for name, graph in graphs.items() for w in graph.weights}
        self._missing = {weight.name: weight for graph in graphs.values() for weight in graph.weights}
        self._files: dict[Path, BinaryIO] = {}
        self.hashes: dict[str, str] = {}  # sha256 of each part, by its initializer's name

    def __enter__(self) -> "DataFiles":
        for path in self._paths.values():
            if path not in self._files:
                self._files[path] = open(path, "wb")
        return self

    def __exit__(self, *_: object) -> None:
        for file in self._files.values():
            file.close()

    def write(self, weight: Weight, parts: Parts) -> None:
        """Put what is stored of a weight in its place."""
        file = self._files[self._paths[weight.name]]
        for part in weight.parts:
            stored = parts[part.key]
            if stored.shape != part.shape or stored.dtype != part.dtype:
                raise AssertionError(f"{part.name}: {stored.dtype} {stored.shape} does not fit its place")
            raw = np.ascontiguousarray(stored).reshape(-1).view(np.uint8)
            file.seek(part.offset)
            file.write(raw.data)
            self.hashes[part.name] = hashlib.sha256(raw.data).hexdigest()
            self._bar.update(part.num_bytes)
        del self._missing[weight.name]

    def write_rest(self, weights: Weights, importance: Mapping[str, Float32]) -> None:
        """All that was not written yet. `importance` weighs errors by the matrix's name (`Scheme.encode`).

        Raises CheckpointError for what cannot be stored.
        """
        for weight in list(self._missing.values()):
            self.write(weight, _encoded(weight, weights, importance.get(weight.name)))


def _encoded(weight: Weight, weights: Weights, importance: Float32 | None) -> Parts:
    values = weights.read(weight.name).reshape(weight.shape)
    try:
        return weight.scheme.encode(values, importance)
    except ValueError as error:
        raise CheckpointError(
            f"{weight.name} {error}; store it as fp32, or look for the reason in the checkpoint or its adapters."
        ) from None


def check_weights(folder: Path, name: str, hashes: Mapping[str, str], bar: Any) -> None:
    """Follow the written graph's own references into its data file and compare what is there. Raises OutputError."""
    for tensor in onnx.load(folder / name, load_external_data=False).graph.initializer:
        if tensor.data_location != onnx.TensorProto.EXTERNAL:
            continue
        place = ExternalDataInfo(tensor)
        found, left = hashlib.sha256(), int(place.length or 0)
        with open(folder / place.location, "rb") as file:
            file.seek(place.offset or 0)
            while left and (piece := file.read(min(left, _CHUNK))):
                found.update(piece)
                left -= len(piece)
                bar.update(len(piece))
        if left or found.hexdigest() != hashes[tensor.name]:
            raise OutputError(
                f"{folder / place.location}: {tensor.name} reads back differently from what was "
                "written. The disk may be failing; export to another place."
            )


class StoredWeights:
    """The tensors of an artifact's data files, decoded when asked for; `progress` is told the bytes of each."""

    def __init__(
        self, folder: Path, graphs: Mapping[str, Graph], progress: Callable[[int], object] = lambda _: None
    ) -> None:
        self._progress = progress
        self.weights = {weight.name: weight for graph in graphs.values() for weight in graph.weights}
        self._files = {w.name: folder / f"{name}.onnx.data" for name, graph in graphs.items() for w in graph.weights}

    def read(self, name: str) -> Float32:
        """The whole tensor; matrices are (out, in)."""
        weight = self.weights[name]
        return weight.scheme.decode(self.parts(name), weight.shape)

    def rows(self, name: str, ids: NDArray[np.int64]) -> Float32:
        """Rows of a table (V, D) → (T, D)."""
        weight = self.weights[name]
        parts = {key: part[ids] for key, part in self.parts(name).items()}
        return weight.scheme.decode(parts, (len(ids), weight.shape[1]))

    def parts(self, name: str) -> Parts:
        """What its scheme made of a tensor, mapped."""
        weight, path = self.weights[name], self._files[name]
        self._progress(weight.num_bytes)
        return {p.key: np.asarray(np.memmap(path, p.dtype, "r", p.offset, p.shape)) for p in weight.parts}
