"""Opening a graph in ONNX Runtime and running it. The one file that imports onnxruntime.

graph = open_graph(Path("m0-fp32"), "head", device="cpu", threads=2)
graph.run({"hidden": hidden}, ["logit"])
"""

import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Protocol

import numpy as np
from numpy.typing import NDArray

from m0kit import forks
from m0kit.artifact.ports import GraphPorts, Port, data_name, difference
from m0kit.errors import ArtifactDamagedError, DependencyError, DeviceError, M0kitError
from m0kit.quiet import silence_onnxruntime
from m0kit.scoring import cuda, gpus

Array = NDArray[Any]
# ONNX Runtime's names of the kinds of ports that there are, and numpy's.
_TYPES: Final = {
    "tensor(float)": "float32",
    "tensor(float16)": "float16",
    "tensor(int64)": "int64",
    "tensor(uint8)": "uint8",
}


class Graph(Protocol):
    """A graph ready to run, in whatever engine."""

    def run(self, feeds: Mapping[str, Array], outputs: Sequence[str]) -> dict[str, Array]:
        """Compute the outputs named; the others are not computed where an engine can leave them out."""
        ...


class GraphOpener(Protocol):
    """How an engine opens one graph of an artifact."""

    def __call__(self, folder: Path, name: str, /, *, also: Sequence[str] = ()) -> Graph:
        """`name` is a portable graph's; `also` makes inner float32 results outputs as well."""
        ...


class OnnxRuntimeGraph:
    """One graph in an ONNX Runtime session. Thread-safe, as sessions are; in a forked child it must be opened again."""

    def __init__(
        self, session: Any, name: str, run_options: Any, ports: GraphPorts | None = None, gpu: int | None = None
    ) -> None:
        """`ports`: what must come out, where that is known. `gpu`: the number of the GPU that it runs on."""
        self.session = session
        self._gpu = gpu
        self._name = name
        self._run_options = run_options
        self._inputs = ports.inputs if ports else ()
        self._outputs = {port.name: port for port in ports.outputs} if ports else {}
        forks.watch(self)

    def after_fork(self) -> None:
        """The session's threads are the parent's."""
        forks.abandon(self.session)
        self.session = None

    def run(self, feeds: Mapping[str, Array], outputs: Sequence[str]) -> dict[str, Array]:
        """Raises M0kitError when the engine fails, out of memory above all, and in a forked child.

        Raises ArtifactDamagedError where something comes out in another shape than the graph's ports tell.
        """
        if self.session is None:
            raise M0kitError(f"the {self._name} graph was opened before this process was forked. Open it again here.")
        try:
            results = self.session.run(list(outputs), dict(feeds), self._run_options)
        except Exception as error:  # it raises its own, and whatever the C++ library beneath it throws
            if self._gpu is not None:
                raise cuda.told(error, self._gpu) from error
            shapes = ", ".join(f"{n} {a.shape}" for n, a in feeds.items() if not n.startswith("past"))
            raise M0kitError(
                f"the {self._name} graph failed in ONNX Runtime ({type(error).__name__}) on {shapes}. "
                "If memory ran out, lower max_pixels or the length of the documents."
            ) from error
        found = dict(zip(outputs, results, strict=True))
        self._check(feeds, found)
        return found

    def _check(self, feeds: Mapping[str, Array], found: Mapping[str, Array]) -> None:
        sizes = {
            letter: size
            for port in self._inputs
            for letter, size in zip(port.shape, feeds[port.name].shape, strict=True)
        }
        for name, array in found.items():
            port = self._outputs.get(name)
            if port is None:
                continue
            shape = tuple(size if isinstance(size, int) else sizes.get(size, -1) for size in port.shape)
            fits = len(shape) == array.ndim and all(a in (b, -1) for a, b in zip(shape, array.shape, strict=True))
            if array.dtype.name != port.dtype or not fits:
                raise ArtifactDamagedError(
                    f"the {self._name} graph gives {name} as {array.dtype.name} {list(array.shape)}, and it should be "
                    f"{port.dtype} {list(port.shape)}. Export the artifact again."
                )


class Opened:
    """A graph that is opened when it is needed, and takes the place of its rival where it has one.

    Who scores texts alone never pays for the vision encoder. A rival that another thread is running lives until
    that run ends. A forked child opens it again: an engine's threads do not come along.
    """

    def __init__(self, opener: Callable[[], Graph]) -> None:
        self.rival: Opened | None = None
        self._opener = opener
        self._lock = threading.Lock()
        self._graph: Graph | None = None
        self.is_closed = False
        forks.watch(self)

    def after_fork(self) -> None:
        forks.abandon(self._graph)
        self._graph = None
        self._lock = threading.Lock()

    def close(self) -> None:
        """Let it go for good."""
        with self._lock:
            self.is_closed = True
            self._graph = None

    def give_way(self) -> None:
        """Let it go until it is needed again."""
        self._graph = None

    def open(self) -> Graph:
        """The graph. Raises M0kitError after `close`, and what opening it raises."""
        with self._lock:
            if self.is_closed:
                raise M0kitError("this reranker was closed meanwhile. Load the artifact again.")
            graph = self._graph
            if graph is None:
                if self.rival is not None:
                    self.rival.give_way()  # before, so that the two are never there together
                graph = self._graph = self._opener()
        return graph

    def run(self, feeds: Mapping[str, Array], outputs: Sequence[str]) -> dict[str, Array]:
        """As `Graph.run`."""
        return self.open().run(feeds, outputs)


def open_graph(
    folder: Path,
    name: str,
    *,
    device: str = "cpu",
    threads: int | None = None,
    prepack: bool = False,
    also: Sequence[str] = (),
    model: bytes | None = None,
    ports: Mapping[str, GraphPorts] | None = None,
    runs: Mapping[str, str] | None = None,
) -> OnnxRuntimeGraph:
    """Open `folder/{name}.onnx` on a device: "cpu", "cuda", "cuda:1", or an execution provider's full name.

    Weights stay in the memory-mapped data file: ONNX Runtime's private, repacked copies of them are
    switched off (measured: no slower from 256 rows on). `also` makes inner float32 results of the graph
    outputs as well. `ports` are those that the manifest tells of each graph; others are an error. `runs`: graphs of the
    device's set by the names of those in whose place they are opened.
    Raises DependencyError, DeviceError, ArtifactDamagedError; M0kitError where a GPU's memory runs out.
    """
    name = (runs or {}).get(name, name)
    ort = onnxruntime()
    gpu = _gpu(device)
    if gpu is not None:
        gpus.chosen(gpu, cuda.start(ort))
    providers = _providers(ort, device, gpu)
    options = ort.SessionOptions()
    if threads is not None:
        options.intra_op_num_threads = threads
    options.enable_mem_pattern = False  # patterns are kept per shape; here every run has its own
    # Threads that spin on after a run would take the cores from the graph that runs next.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    if not prepack:
        options.add_session_config_entry("session.disable_prepacking", "1")
    # Layout optimisation and constant folding would keep float16 weights in private memory, widened to float32;
    # so they are widened as they are used. A float32 graph has no use for either.
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.log_severity_level = 4  # it would print errors to stderr by itself, names of nodes as they are, and raise
    # What was checked is ONNX; a file that also passes for ONNX Runtime's own format would not be read as that.
    options.add_session_config_entry("session.load_model_format", "ONNX")
    path = folder / f"{name}.onnx"
    opened: str | bytes = str(path)
    if also or model is not None:
        # Outputs of a protobuf message that is read after another of its kind are added to it.
        opened = (path.read_bytes() if model is None else model) + _outputs_message(also)
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder))
        data = folder / data_name(name)
        if data.is_symlink() and data.stat().st_size:  # from a hub's cache: for a model in memory it follows no links
            content = np.memmap(data, np.uint8, mode="r")
            options.add_external_initializers_from_files_in_memory([data.name], [content], [content.size])
    try:
        # With its `enable_fallback` it would print, and take the host's CPU, where CUDA fails now or in a run.
        session = ort.InferenceSession(
            opened, options, providers=providers, disabled_optimizers=["ConstantFolding"], enable_fallback=False
        )
    except Exception as error:  # it raises its own, and whatever the C++ library beneath it throws
        if gpu is not None:
            raise cuda.told(error, gpu) from error
        raise ArtifactDamagedError(
            f"{path}: ONNX Runtime {ort.__version__} cannot open it ({type(error).__name__}). "
            "It needs version 1.30 or newer; export the artifact again if it still does not open."
        ) from error
    wanted = providers[0] if isinstance(providers[0], str) else providers[0][0]
    if wanted not in session.get_providers():
        raise DeviceError(
            f"device {device!r}: {wanted} is in this onnxruntime but did not start; its libraries or its "
            "driver are missing. m0kit does not fall back to the CPU by itself; say device 'cpu' for that."
        )
    run_options = ort.RunOptions()
    if wanted == "CPUExecutionProvider":
        # The arena spares a run fresh pages for every inner value (a sixth of a page image's time); what it
        # grew to is given back when this run or the next ends, so that a long prompt does not cost for ever.
        run_options.add_run_config_entry("memory.enable_memory_arena_shrinkage", "cpu:0")
    if ports is None:
        return OnnxRuntimeGraph(session, name, run_options, gpu=gpu)
    _check_ports(path, session, ports[name])
    return OnnxRuntimeGraph(session, name, run_options, ports[name], gpu)


def _check_ports(path: Path, session: Any, told: GraphPorts) -> None:
    """Raises ArtifactDamagedError where the session has other ports than the manifest tells; outputs may be more."""
    inputs, outputs = (
        tuple(Port(port.name, _TYPES.get(port.type, port.type), tuple(port.shape)) for port in found)
        for found in (session.get_inputs(), session.get_outputs())
    )
    for kind, wanted, found in (
        ("inputs", told.inputs, inputs),
        ("outputs", told.outputs, outputs[: len(told.outputs)]),
    ):
        if what := difference(wanted, found):
            raise ArtifactDamagedError(
                f"{path}: has other {kind} than the manifest tells: {what}. Export the artifact again."
            )


def engine_version() -> str:
    """Of ONNX Runtime. Raises DependencyError."""
    return str(onnxruntime().__version__)


def onnxruntime() -> Any:
    """The module, reporting nothing. Raises DependencyError."""
    try:
        import onnxruntime
    except ImportError:
        raise DependencyError(
            "onnxruntime is not installed. pip install 'm0kit[cpu]', or 'm0kit[gpu]' for NVIDIA (not both)."
        ) from None
    silence_onnxruntime(onnxruntime)
    return onnxruntime


def _gpu(device: str) -> int | None:
    """The GPU's number, None for another device. Raises DeviceError for several: a graph is on one."""
    ids = gpus.named(device)
    if len(ids) > 1:
        raise DeviceError(f"device {device!r}: a graph runs on one GPU. Open it on each.")
    return ids[0] if ids else None


def _providers(ort: Any, device: str, gpu: int | None) -> list[Any]:
    available = ort.get_available_providers()
    if device == "cpu":
        chosen: Any = "CPUExecutionProvider"
    elif gpu is not None:
        chosen = (cuda.PROVIDER, cuda.provider_options(gpu))
    elif device.endswith("ExecutionProvider"):
        chosen = device
    else:
        raise DeviceError(f"device {device!r} is not known. Say cpu, cuda, cuda:1, or one of {', '.join(available)}.")
    name = chosen if isinstance(chosen, str) else chosen[0]
    if name not in available:
        raise DeviceError(f"device {device!r}: this onnxruntime has {', '.join(available)}, not {name}.")
    return [chosen] if name == "CPUExecutionProvider" else [chosen, "CPUExecutionProvider"]


def _outputs_message(names: Sequence[str]) -> bytes:
    """A protobuf ModelProto {7: graph} of GraphProto {12: output} entries: names and types, no shapes."""

    def field(number: int, payload: bytes) -> bytes:
        return _varint(number << 3 | 2) + _varint(len(payload)) + payload

    float_tensor = field(1, b"\x08\x01")  # TypeProto.tensor_type.elem_type = FLOAT
    outputs = [field(12, field(1, name.encode()) + field(2, float_tensor)) for name in names]
    return field(7, b"".join(outputs))


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes(out + bytes([value]))
