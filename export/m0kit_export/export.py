"""Checkpoint and adapters → artifact, one tensor at a time: written aside, read back, renamed.

Owns the order of the steps and the safety of the result; what the graphs compute is `graphs`, how
adapters merge is `merge`, what the folder contains is `m0kit.artifact`.

    export_artifact("jinaai/jina-reranker-m0", Path("m0-fp32"), adapters=[AdapterSpec.parse("./my-lora")])
"""

import os
import platform
import shutil
import signal
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from types import FrameType
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
    with _interruptible(), _written_aside(output, num_bytes + _SPARE_BYTES, overwrite) as folder:
        # None: no bar where stderr is no terminal, a log file above all; there each phase is one line
        disable = None if progress else True
        with tqdm(total=num_bytes, unit="B", unit_scale=True, disable=disable, mininterval=0.5) as bar:
            _begin("writing", bar, num_bytes, progress)
            for name, graph in graphs.items():
                _write_weights(folder / f"{name}.onnx.data", graph, stack, bar)
                (folder / f"{name}.onnx").write_bytes(graph.model.SerializeToString(deterministic=True))
            _begin("reading back", bar, num_bytes, progress)
            for name in graphs:
                _check_weights(folder, f"{name}.onnx", stack, bar)
            shutil.copyfile(checkpoint.tokenizer_file, folder / TOKENIZER)
            sizes = {path: path.stat().st_size for path in sorted(folder.iterdir())}
            _begin("hashing", bar, sum(sizes.values()), progress)
            files = {path.name: FileEntry(size, sha256_of(path, bar.update)) for path, size in sizes.items()}
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


@contextmanager
def _interruptible() -> Iterator[None]:
    """Ctrl-C ends the block as KeyboardInterrupt, whatever else comes out of it.

    One that arrives inside torch's own code comes out as a ValueError, as if the file were damaged.
    """
    before, pressed = signal.getsignal(signal.SIGINT), False

    def note(number: int, frame: FrameType | None) -> None:
        nonlocal pressed
        pressed = True
        if callable(before):
            before(number, frame)

    if not callable(before) or threading.current_thread() is not threading.main_thread():
        yield  # nobody to interrupt: Ctrl-C is ignored, or goes to the main thread
        return
    signal.signal(signal.SIGINT, note)
    try:
        yield
    except Exception:
        if pressed:
            raise KeyboardInterrupt from None
        raise
    finally:
        signal.signal(signal.SIGINT, before)


def _begin(phase: str, bar: Any, num_bytes: int, progress: bool) -> None:
    bar.reset(num_bytes)
    bar.set_description(phase)
    if progress and bar.disable:
        print(f"{phase}: {num_bytes / 2**20:.1f} MiB", file=sys.stderr, flush=True)


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
    try:
        aside = _make_room(output, num_bytes, overwrite)
        try:
            yield aside
            _flush(aside)
            _put_in_place(aside, output)
            _flush(aside.parent)
        finally:
            shutil.rmtree(aside, ignore_errors=True)
    except OutputError:
        raise
    except PermissionError as error:
        raise OutputError(f"{output}: no permission to write there.") from error
    except OSError as error:
        raise OutputError(f"{output}: cannot be written ({os.strerror(error.errno or 0)}).") from error


def _make_room(output: Path, num_bytes: int, overwrite: bool) -> Path:
    """See that `output` may be written and fits; returns a new empty folder beside it."""
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        if not overwrite:
            raise OutputError(f"{output}: exists and is not empty. Choose another folder, or --overwrite.")
        if not (output / MANIFEST).is_file():
            raise OutputError(f"{output}: is not an artifact, so it is not overwritten. Choose another folder.")
    if output.is_mount():
        raise OutputError(f"{output}: is a mount point, which no folder can replace. Choose a folder inside it.")
    parent = output.absolute().parent
    parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(parent).free
    if free < num_bytes:
        raise OutputError(
            f"{output}: the artifact takes {num_bytes / 2**30:.2f} GiB; {free / 2**30:.2f} GiB are free there."
        )
    aside = Path(tempfile.mkdtemp(prefix=f".{output.name}.unfinished-", dir=parent))
    aside.chmod(0o755)
    return aside


def _put_in_place(aside: Path, output: Path) -> None:
    """Rename; what is there gives way, and comes back if that fails."""
    if not output.exists():
        aside.rename(output)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{output.name}.old-", dir=aside.parent))
    kept = old / "artifact"
    try:
        output.rename(kept)
        aside.rename(output)
    finally:
        if kept.exists() and not output.exists():
            kept.rename(output)
        shutil.rmtree(old, ignore_errors=True)  # not reached when the old one could not come back


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
