"""Where ONNX Runtime itself places the nodes of m0kit's graphs, held against what `coverage` reads off the table.

Owns the comparison: the tiny model's graphs in every precision, those for CUDA and the portable ones, which hold what
CUDA's must not. Each for CUDA is also opened as the engine opens it, so that a node on the host would be refused. On a
GPU it does the same.

    python -m m0kit_parity.cuda.pretend SITE -m m0kit_parity.cuda.placing
"""

import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx

from m0kit.artifact.ports import set_name
from m0kit.precision import SCHEMES
from m0kit.scoring.cuda import PROVIDER, SESSION_CONFIG
from m0kit.terminal import show
from m0kit_export.cuda import cuda_graphs
from m0kit_export.graphs import build_graphs
from m0kit_parity.cuda.coverage import on_host, uncovered
from m0kit_parity.cuda.zeros import write_graph
from m0kit_parity.samples.checkpoints import model_config
from m0kit_quant.recipe import Recipe


def main() -> int:
    """Print what differs, and how many graphs and nodes were looked at; 1 where something does."""
    import onnxruntime

    onnxruntime.set_default_logger_severity(4)
    differing, num_graphs, num_nodes = [], 0, 0
    for name, model, is_for_cuda in graphs():
        with tempfile.TemporaryDirectory(prefix="m0kit-place-") as folder:
            path = write_graph(Path(folder), "graph", model)
            placed = _placed(onnxruntime, path)
            if is_for_cuda:
                _open(onnxruntime, path, SESSION_CONFIG)  # raises
        expected = _expected(model)
        num_graphs, num_nodes = num_graphs + 1, num_nodes + len(placed)
        on_cpu = {node for node, provider in placed.items() if provider != PROVIDER}
        differing += [f"{name}: {node} is on the CPU" for node in sorted(on_cpu - expected)]
        differing += [f"{name}: {node} is not on the CPU" for node in sorted(expected - on_cpu)]
    show(*differing, f"{num_graphs} graphs, {num_nodes} nodes, {len(differing)} placed otherwise")
    return bool(differing)


def graphs() -> Iterator[tuple[str, onnx.ModelProto, bool]]:
    """The tiny model's, "fp16 decoder.cuda" and so on, and whether it is one for CUDA."""
    config = model_config("tiny")
    for precision in SCHEMES:
        recipe = Recipe.default(precision)
        portable = build_graphs(config, recipe)
        for name, graph in portable.items():
            yield f"{precision} {name}", graph.model, False
        for name, graph in cuda_graphs(config, recipe, portable).items():
            yield f"{precision} {set_name(name, 'cuda')}", graph.model, True


def _expected(model: onnx.ModelProto) -> set[str]:
    """The nodes that are on the host by the table: for want of a kernel, or because all they read is there."""
    told = [*on_host(model), *(complaint for complaint in uncovered(model) if "no CUDA kernel" in complaint)]
    return {text.partition(" (")[0] for text in told}


def _placed(onnxruntime: Any, path: Path) -> dict[str, str]:
    """Each node's provider. Nothing is optimised, so that the nodes are those of the file."""
    session = _open(onnxruntime, path, {"session.record_ep_graph_assignment_info": "1"}, optimised=False)
    parts = session.get_provider_graph_assignment_info()
    return {node.name: part.ep_name for part in parts for node in part.get_nodes()}


def _open(onnxruntime: Any, path: Path, config: dict[str, str], optimised: bool = True) -> Any:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    if not optimised:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    for key, value in config.items():
        options.add_session_config_entry(key, value)
    return onnxruntime.InferenceSession(str(path), options, providers=[PROVIDER])


if __name__ == "__main__":
    sys.exit(main())
