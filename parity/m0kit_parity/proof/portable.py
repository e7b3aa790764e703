"""An artifact's portable graphs: in OpenVINO, in ONNX's own reference evaluator, and beside a set's in ONNX Runtime.

With float weights they use standard operators only; running them elsewhere with the same tolerances is the proof.
These engines are for that, not for speed: the evaluator is plain numpy.

    Reranker.load("m0-fp32", open_graph=ENGINES["openvino"])
"""

import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from m0kit.artifact.manifest import Manifest
from m0kit.artifact.ports import data_name
from m0kit.errors import DependencyError, M0kitError
from m0kit.precision import SCHEMES, provider_of
from m0kit.quiet import silence_openvino
from m0kit.scoring.planner import image_rows
from m0kit.scoring.positions import vision_positions
from m0kit.scoring.sessions import Graph, GraphOpener, open_graph
from m0kit.trace import Trace

Array = NDArray[Any]
Encoder = Callable[[Trace], list[NDArray[np.float32]]]  # a trace's images, I × (P, 1176) → I × (V, D)


def require_standard(engine: str, artifact: Path, manifest: Manifest) -> None:
    """Raises M0kitError for an artifact with operators that only ONNX Runtime has, and another engine."""
    operators = {name: operator for name in manifest.schemes if (operator := SCHEMES[name].operator)}
    if ENGINES[engine] is not None and operators:
        named = " and ".join(f"{name} weights (operator com.microsoft.{each})" for name, each in operators.items())
        raise M0kitError(
            f"{artifact}: the engine {engine} cannot run {named}, which only ONNX Runtime has. "
            "Leave --engine out, which is onnxruntime, or give another artifact: fp32, fp16 and bf16 run everywhere."
        )


def portable_encoder(device: str, artifact: Path, manifest: Manifest, threads: int | None) -> Encoder | None:
    """The portable image encoder in ONNX Runtime on the CPU; None where the device runs no other in its place."""
    if "vision" not in manifest.runs.get(provider_of(device), {}):
        return None
    graph = open_graph(artifact, "vision", threads=threads, ports=manifest.graphs)
    merge = manifest.model.image.merge_size

    def encode(trace: Trace) -> list[NDArray[np.float32]]:
        counts = [len(patches) for patches in trace.patches]
        feeds = {
            "patches": np.concatenate(trace.patches),
            "positions": np.concatenate([vision_positions(grid, merge) for grid in trace.grid_thw]),
            "images": image_rows(counts),
        }
        embeds = graph.run(feeds, ["image_embeds"])["image_embeds"]
        return np.split(embeds, np.cumsum(counts)[:-1] // merge**2)

    return encode


@contextmanager
def _named(what: str) -> Iterator[None]:
    """An engine raises what it likes; here it is one sentence, its own text shortened."""
    try:
        yield
    except (M0kitError, MemoryError):
        raise
    except Exception as error:
        text = " ".join(str(error).split())
        raise M0kitError(f"{what}: {type(error).__name__}: {text[:300]}{'…' if len(text) > 300 else ''}") from error


@contextmanager
def _plain_file(folder: Path, name: str) -> Iterator[Path]:
    """A graph with its weights beside it, copied where they are links as in a hub's cache.

    These engines follow no links out of a folder, and onnx takes no second names of a file either.
    """
    path = folder / f"{name}.onnx"
    needed = (path, folder / data_name(name))
    if not any(file.is_symlink() for file in needed):
        yield path
        return
    # Windows keeps files that are still mapped.
    with tempfile.TemporaryDirectory(prefix="m0kit-graph-", ignore_cleanup_errors=True) as aside:
        for file in needed:
            shutil.copyfile(file, Path(aside) / file.name)
        yield Path(aside) / path.name


class _OpenVino:
    """One graph compiled for the CPU in float32; OpenVINO's default could be bfloat16 where the CPU has it."""

    def __init__(self, folder: Path, name: str, also: Sequence[str]) -> None:
        silence_openvino()
        try:
            import openvino
        except ImportError:
            raise DependencyError("the engine openvino needs openvino. pip install 'm0kit[dev]'") from None
        settings = {"INFERENCE_PRECISION_HINT": "f32"}
        self._name = name
        cannot = f"{folder}: the engine openvino cannot open the {name} graph"
        with _named(cannot), _plain_file(folder, name) as path:
            core = openvino.Core()
            model = core.read_model(str(path))
            model.add_outputs(list(also))
            self._model = core.compile_model(model, "CPU", settings)

    def run(self, feeds: Mapping[str, Array], outputs: Sequence[str]) -> dict[str, Array]:
        with _named(f"the {self._name} graph failed in the engine openvino"):
            results = self._model(dict(feeds))
            return {name: np.array(results[self._model.output(name)]) for name in outputs}


class _Evaluator:
    """One graph in ONNX's reference evaluator, weights in memory."""

    def __init__(self, folder: Path, name: str, also: Sequence[str]) -> None:
        try:
            import onnx
            from onnx.reference import ReferenceEvaluator
        except ImportError:
            raise DependencyError("the engine onnx needs onnx. pip install 'm0kit[export]'") from None
        self._name = name
        with _named(f"{folder}: the engine onnx cannot open the {name} graph"):
            with _plain_file(folder, name) as path:
                model = onnx.load(path)
            model.graph.output.extend(onnx.ValueInfoProto(name=result) for result in also)
            self._evaluator = ReferenceEvaluator(model)

    def run(self, feeds: Mapping[str, Array], outputs: Sequence[str]) -> dict[str, Array]:
        with _named(f"the {self._name} graph failed in the engine onnx"):
            results = self._evaluator.run(list(outputs), dict(feeds))
        return dict(zip(outputs, results, strict=True))


def _openvino(folder: Path, name: str, /, *, also: Sequence[str] = ()) -> Graph:
    return _OpenVino(folder, name, also)


def _evaluator(folder: Path, name: str, /, *, also: Sequence[str] = ()) -> Graph:
    return _Evaluator(folder, name, also)


ENGINES: Final[Mapping[str, GraphOpener | None]] = {
    "onnxruntime": None,  # the runtime's own
    "openvino": _openvino,
    "onnx": _evaluator,
}
