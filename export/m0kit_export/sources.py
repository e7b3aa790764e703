"""Where an artifact's weights come from: a checkpoint with its adapters, or another artifact.

Owns the two readings under the same names, tensor by tensor in float32; merging itself is `merge`.

    source = CheckpointSource.open("jinaai/jina-reranker-m0", [AdapterSpec.parse("./my-lora")])
    source.read("model.norm.weight")
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import onnx
from google.protobuf.message import DecodeError
from onnx.external_data_helper import ExternalDataInfo

from m0kit.artifact.manifest import GRAPH_BYTES, TOKENIZER, TOKENIZER_BYTES, Manifest, read_manifest, verify_files
from m0kit.artifact.ports import GRAPHS
from m0kit.config import ModelConfig
from m0kit.errors import ArtifactDamagedError, ArtifactError
from m0kit.files import read_regular
from m0kit_export.adapter import AdapterSpec, QLora
from m0kit_export.frequencies import Frequencies
from m0kit_export.names import expected_shapes
from m0kit_quant.floats import FLOATS
from m0kit_quant.weights import Float32

if TYPE_CHECKING:  # PyTorch, transformers and PEFT, none of which an artifact needs
    from m0kit_export.checkpoint import Checkpoint
    from m0kit_export.merge import AdapterStack

_FLOATS: Final = {
    onnx.TensorProto.FLOAT: FLOATS["fp32"],
    onnx.TensorProto.FLOAT16: FLOATS["fp16"],
    onnx.TensorProto.BFLOAT16: FLOATS["bf16"],
}


@dataclass(frozen=True)
class CheckpointSource:
    """A checkpoint with adapters merged in order."""

    checkpoint: "Checkpoint"
    adapters: "AdapterStack"
    quantized: Mapping[str, Any] | None = None  # what the manifest says of a base in 4 bits

    @classmethod
    def open(
        cls,
        source: str | Path,
        adapters: Sequence[AdapterSpec] = (),
        revision: str | None = None,
        cache_dir: Path | None = None,
        qlora: QLora | None = None,
    ) -> "CheckpointSource":
        """`qlora`: merge on the base as 4-bit training saw it. Raises CheckpointError, AdapterError."""
        from m0kit_export.checkpoint import open_checkpoint
        from m0kit_export.merge import AdapterStack
        from m0kit_export.qlora import QuantizedBase

        checkpoint, told = open_checkpoint(source, revision, cache_dir), None
        if qlora is not None:
            checkpoint = base = QuantizedBase.of(checkpoint, double_quant=qlora.double_quant, keep=qlora.keep)
            told = base.provenance()
        return cls(checkpoint, AdapterStack.open(adapters, checkpoint), told)

    @property
    def name(self) -> str:
        return self.checkpoint.source

    @property
    def config(self) -> ModelConfig:
        return self.checkpoint.config

    @property
    def names(self) -> tuple[str, ...]:
        return self.checkpoint.names

    @property
    def tokenizer(self) -> bytes:
        return self.checkpoint.tokenizer.encode()

    @property
    def frequencies(self) -> Frequencies:
        return Frequencies.of(self.config)

    def shape(self, name: str) -> tuple[int, ...]:
        return self.checkpoint.shape(name)

    def read(self, name: str) -> Float32:
        return np.asarray(self.adapters.merged(name).numpy(), np.float32)

    def provenance(self) -> dict[str, Any]:
        return {
            "base": self.checkpoint.source,
            "base_files": self.checkpoint.fingerprint(),
            "dropped_tensors": list(self.checkpoint.dropped),
            "adapters": self.adapters.provenance(),
            "licence": self.checkpoint.licence,
            **({"qlora": dict(self.quantized)} if self.quantized else {}),
        }


@dataclass(frozen=True)
class ArtifactSource:
    """An artifact whose matrices are stored as floats; its data files are mapped, not read."""

    folder: Path
    manifest: Manifest
    _shapes: Mapping[str, tuple[int, ...]] = field(repr=False)
    _places: Mapping[str, tuple[Path, np.dtype[Any], tuple[int, ...], int]] = field(repr=False)

    @classmethod
    def open(cls, folder: Path) -> "ArtifactSource":
        """Checks every file against its hash. Raises ArtifactError."""
        manifest = read_manifest(folder)
        if lossy := [scheme for scheme in manifest.schemes if scheme not in FLOATS]:
            raise ArtifactError(
                f"{folder}: holds {', '.join(lossy)} weights, which have lost bits already. "
                "Quantise the fp32 artifact, or export from the checkpoint."
            )
        if manifest.recipe.get("rotate"):
            raise ArtifactError(
                f"{folder}: holds weights in another basis (rotate in its recipe), on which nothing more is built. "
                "Quantise one that was not rotated, or export from the checkpoint."
            )
        verify_files(folder, manifest)  # also that the graphs name no other file, and no bytes beyond its end
        places = {}
        shapes = expected_shapes(manifest.model)
        for graph in GRAPHS:
            for tensor in load_graph(folder, graph).graph.initializer:
                if tensor.data_location == onnx.TensorProto.EXTERNAL:
                    place = ExternalDataInfo(tensor)
                    dtype = _FLOATS.get(tensor.data_type)
                    if dtype is None:
                        raise ArtifactDamagedError(f"{folder}: {tensor.name} is not stored as floats. Export again.")
                    places[tensor.name] = folder / place.location, dtype, tuple(tensor.dims), int(place.offset or 0)
        for name, shape in shapes.items():
            if name not in places or math.prod(places[name][2]) != math.prod(shape):
                raise ArtifactDamagedError(f"{folder}: {name} is missing or has another shape. Export again.")
        return cls(folder, manifest, shapes, places)

    @property
    def name(self) -> str:
        return str(self.folder)

    @property
    def config(self) -> ModelConfig:
        return self.manifest.model

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._places)

    @property
    def tokenizer(self) -> bytes:
        return read_regular(self.folder / TOKENIZER, TOKENIZER_BYTES)

    @property
    def frequencies(self) -> Frequencies:
        return stored_frequencies(self.folder, self.config)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shapes[name]

    def read(self, name: str) -> Float32:
        path, dtype, shape, offset = self._places[name]
        stored = np.memmap(path, dtype, "r", offset, shape)
        return np.asarray(stored, np.float32).reshape(self.shape(name))

    def provenance(self) -> dict[str, Any]:
        was = dict(self.manifest.provenance)
        return {**was, "artifact": {"fingerprint": self.manifest.fingerprint, "scheme": self.manifest.scheme}}


Source = CheckpointSource | ArtifactSource


def stored_frequencies(folder: Path, config: ModelConfig) -> Frequencies:
    """The rotary frequencies of the artifact in `folder`. Raises ArtifactDamagedError when it has none."""
    graphs = {name: load_graph(folder, name) for name in ("vision", "decoder")}
    return Frequencies.stored(graphs, config)


def load_graph(folder: Path, name: str) -> onnx.ModelProto:
    """A graph of a verified artifact, without its data. Raises ArtifactDamagedError for what is no ONNX."""
    path = folder / f"{name}.onnx"
    try:
        return onnx.load_from_string(read_regular(path, GRAPH_BYTES))
    except DecodeError as error:
        raise ArtifactDamagedError(f"{path}: cannot be read as ONNX. Export again.") from error
