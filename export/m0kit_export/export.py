"""Checkpoint and adapters → artifact, one tensor at a time: written aside, read back, renamed.

Owns the order of the steps and the safety of the result; what the graphs compute is `graphs`, how
adapters merge is `merge`, what the folder contains is `m0kit.artifact`.

    export_artifact("jinaai/jina-reranker-m0", Path("m0-fp32"), adapters=[AdapterSpec.parse("./my-lora")])
"""

import os
import platform
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx.external_data_helper import ExternalDataInfo
from tqdm import tqdm

from m0kit.artifact import MANIFEST, TOKENIZER, FileEntry, Manifest, sha256_of, write_manifest
from m0kit.errors import CheckpointError, OutputError
from m0kit_export.builder import Graph, Port, Weight, as_numpy
from m0kit_export.checkpoint import Checkpoint, open_checkpoint
from m0kit_export.graphs import build_graphs
from m0kit_export.merge import AdapterSpec, AdapterStack

Scheme = Literal["fp32", "fp16"]
SCHEMES: dict[str, type[np.floating[Any]]] = {"fp32": np.float32, "fp16": np.float16}
_SPARE_BYTES = 64 << 20  # for the tokenizer, graphs, manifest and the file system's own needs
_CHUNK = 16 << 20


def export_artifact(
    source: str | Path,
    output: Path,
    *,
    adapters: Sequence[AdapterSpec] = (),
    scheme: Scheme = "fp32",
    revision: str | None = None,
    cache_dir: Path | None = None,
    overwrite: bool = False,
    progress: bool = True,
) -> Manifest:
    """Write the artifact of a checkpoint (folder or hub id) with its adapters merged in order.

    Every weight is read back from the finished file and compared bit by bit with what was meant. The
    folder appears under its name only when it is whole. Peak memory is a few copies of the largest tensor.

    Raises CheckpointError, AdapterError, OutputError.
    """
    checkpoint = open_checkpoint(source, revision, cache_dir)
    stack = AdapterStack.open(adapters, checkpoint)
    graphs = build_graphs(checkpoint.config, SCHEMES[scheme])
    _check_complete(checkpoint, graphs)
    num_bytes = sum(graph.data_bytes for graph in graphs.values())
    with _written_aside(output, num_bytes + _SPARE_BYTES, overwrite) as folder:
        bar = tqdm(total=num_bytes, unit="B", unit_scale=True, disable=not progress, mininterval=0.5)
        with bar:
            bar.set_description("writing")
            for name, graph in graphs.items():
                _write_weights(folder / f"{name}.onnx.data", graph, stack, bar)
                (folder / f"{name}.onnx").write_bytes(graph.model.SerializeToString(deterministic=True))
            bar.reset()
            bar.set_description("reading back")
            for name in graphs:
                _check_weights(folder, f"{name}.onnx", stack, bar)
            shutil.copyfile(checkpoint.tokenizer_file, folder / TOKENIZER)
            bar.reset()
            bar.set_description("hashing")
            files = {
                path.name: FileEntry(path.stat().st_size, sha256_of(path, bar.update))
                for path in sorted(folder.iterdir())
            }
        manifest = Manifest(
            model=checkpoint.config,
            scheme=scheme,
            graphs={name: _ports(graph) for name, graph in graphs.items()},
            files=files,
            provenance=_provenance(checkpoint, stack),
        )
        for path in folder.iterdir():
            _flush(path)
        write_manifest(folder, manifest)
    return manifest


def _check_complete(checkpoint: Checkpoint, graphs: dict[str, Graph]) -> None:
    """No tensor of the checkpoint is forgotten, none is made up."""
    used = {weight.name for graph in graphs.values() for weight in graph.weights}
    if odd := sorted(used.symmetric_difference(checkpoint.names)):
        raise CheckpointError(f"{checkpoint.source}: graphs and checkpoint differ in the tensors {odd[:5]}.")


def _stored(weight: Weight, stack: AdapterStack, source: str) -> NDArray[Any]:
    """What the data file shall hold for one weight."""
    values = stack.merged(weight.name).numpy()
    with np.errstate(over="ignore"):
        stored = as_numpy(weight, values)
    if not np.isfinite(stored).all():
        raise CheckpointError(
            f"{source}: {weight.name} holds {np.abs(values).max():g}, which {weight.dtype} cannot; "
            "export it as fp32, or look for the reason in the checkpoint or its adapters."
        )
    return stored


def _write_weights(path: Path, graph: Graph, stack: AdapterStack, bar: Any) -> None:
    with open(path, "wb") as file:
        for weight in graph.weights:
            file.seek(weight.offset)
            file.write(_bytes(_stored(weight, stack, path.stem)).data)
            bar.update(weight.num_bytes)


def _check_weights(folder: Path, name: str, stack: AdapterStack, bar: Any) -> None:
    """Follow the written graph's own references into its data file and compare every value."""
    for tensor in onnx.load(folder / name, load_external_data=False).graph.initializer:
        if tensor.data_location != onnx.TensorProto.EXTERNAL:
            continue
        place = ExternalDataInfo(tensor)
        dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
        weight = Weight(tensor.name, tuple(tensor.dims), dtype, place.offset or 0)
        meant = _bytes(_stored(weight, stack, name))
        with open(folder / place.location, "rb") as file:
            file.seek(weight.offset)
            for start in range(0, len(meant), _CHUNK):
                piece = meant[start : start + _CHUNK]
                if not np.array_equal(np.frombuffer(file.read(len(piece)), np.uint8), piece):
                    raise OutputError(
                        f"{folder / place.location}: {tensor.name} reads back differently from what was "
                        "written. The disk may be failing; export to another place."
                    )
                bar.update(len(piece))


def _bytes(array: NDArray[Any]) -> NDArray[np.uint8]:
    return array.reshape(-1).view(np.uint8)


def _ports(graph: Graph) -> dict[str, Any]:
    def described(port: Port) -> dict[str, Any]:
        return {"name": port.name, "dtype": port.dtype.name, "shape": list(port.shape)}

    return {"inputs": [described(p) for p in graph.inputs], "outputs": [described(p) for p in graph.outputs]}


def _provenance(checkpoint: Checkpoint, stack: AdapterStack) -> dict[str, Any]:
    tools = ("m0kit", "torch", "transformers", "peft", "safetensors", "onnx", "numpy")
    return {
        "base": checkpoint.source,
        "base_files": checkpoint.fingerprint(),
        "dropped_tensors": list(checkpoint.dropped),
        "adapters": stack.provenance(),
        "licence": checkpoint.licence,
        "tools": {"python": platform.python_version(), **{tool: version(tool) for tool in tools}},
    }


@contextmanager
def _written_aside(output: Path, num_bytes: int, overwrite: bool) -> Iterator[Path]:
    """A new folder beside `output` that takes its name when the block ends well, and vanishes when not."""
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        if not overwrite:
            raise OutputError(f"{output}: exists and is not empty. Choose another folder, or --overwrite.")
        if not (output / MANIFEST).is_file():
            raise OutputError(f"{output}: is not an artifact, so it is not overwritten. Choose another folder.")
    parent = output.absolute().parent
    try:
        parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(parent).free
        if free < num_bytes:
            raise OutputError(
                f"{output}: the artifact takes {num_bytes / 2**30:.2f} GiB; {free / 2**30:.2f} GiB are free there."
            )
        aside = Path(tempfile.mkdtemp(prefix=f".{output.name}.unfinished-", dir=parent))
    except PermissionError:
        raise OutputError(f"{output}: no permission to write in {parent}.") from None
    try:
        aside.chmod(0o755)
        yield aside
        _flush(aside)
        if output.exists():
            old = Path(tempfile.mkdtemp(prefix=f".{output.name}.old-", dir=parent))
            output.rename(old / output.name)
            aside.rename(output)
            shutil.rmtree(old)
        else:
            aside.rename(output)
        _flush(parent)
    except OSError as error:
        if isinstance(error, OutputError):
            raise
        raise OutputError(f"{output}: cannot be written ({os.strerror(error.errno or 0)}).") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
