"""An artifact's graphs in other engines than ONNX Runtime: OpenVINO, and ONNX's own reference evaluator.

The full-precision artifact uses standard operators only; running it elsewhere with the same tolerances is the
proof. These engines are for that, not for speed: the evaluator is plain numpy.

    Reranker.load("m0-fp32", open_graph=ENGINES["openvino"])
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from m0kit.errors import DependencyError
from m0kit.quiet import silence_openvino
from m0kit.sessions import Graph, GraphOpener

Array = NDArray[Any]


class _OpenVino:
    """One graph compiled for the CPU in float32; OpenVINO's default could be bfloat16 where the CPU has it."""

    def __init__(self, folder: Path, name: str, also: Sequence[str]) -> None:
        silence_openvino()
        try:
            import openvino
        except ImportError:
            raise DependencyError("the engine openvino needs openvino. pip install 'm0kit[dev]'") from None
        settings = {"INFERENCE_PRECISION_HINT": "f32"}
        core = openvino.Core()
        model = core.read_model(str(folder / f"{name}.onnx"))
        model.add_outputs(list(also))
        self._model = core.compile_model(model, "CPU", settings)

    def run(self, feeds: Mapping[str, Array], outputs: Sequence[str]) -> dict[str, Array]:
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
        model = onnx.load(folder / f"{name}.onnx")
        model.graph.output.extend(onnx.ValueInfoProto(name=result) for result in also)
        self._evaluator = ReferenceEvaluator(model)

    def run(self, feeds: Mapping[str, Array], outputs: Sequence[str]) -> dict[str, Array]:
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
