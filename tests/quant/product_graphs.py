"""One product or one look-up as the exporter spells it, with its stored parts inside, run in ONNX Runtime."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray

from m0kit.artifact.ports import GraphPorts, Port
from m0kit_export.builder import IR_VERSION, OPSET, Builder, Graph
from m0kit_quant.int4 import Int4
from m0kit_quant.recipe import Recipe
from m0kit_quant.scheme import CONTRIB, Parts, Scheme
from m0kit_quant.weights import EMBEDDING

Float32 = NDArray[np.float32]


def recipe_of(scheme: Scheme) -> Recipe:
    """Every matrix alike."""
    rule = {"match": "*", "scheme": scheme.name, **({"block": scheme.block} if scheme.block else {})}
    rule |= {"inputs": scheme.inputs} if scheme.inputs else {}
    return Recipe.from_dict({"precision": scheme.name, "weights": [rule]}, "test")


def linear(scheme: Scheme, parts: Parts, shape: tuple[int, int], x: Float32, also: tuple[str, ...] = ()) -> list[Any]:
    """x (T, K) by the matrix (N, K) → [y (T, N), further results of `also`, by the type of their node]."""
    builder = Builder("one", recipe_of(scheme))
    builder.linear("layer", "x", shape, bias=False, out="y")
    graph = builder.finish(
        GraphPorts((Port("x", "float32", ("T", shape[1])),), (Port("y", "float32", ("T", shape[0])),))
    )
    return run(graph, parts, {"x": x}, also)


def lookup(scheme: Scheme, parts: Parts, shape: tuple[int, int], ids: NDArray[np.int64]) -> Float32:
    """Rows `ids` of the table (V, D)."""
    builder = Builder("one", recipe_of(scheme))
    rows = builder.lookup(EMBEDDING, "ids", shape)
    builder.op("Identity", rows, out="y")
    graph = builder.finish(GraphPorts((Port("ids", "int64", ("T",)),), (Port("y", "float32", ("T", shape[1])),)))
    y: Float32 = run(graph, parts, {"ids": ids})[0]
    return y


def run(
    graph: Graph, parts: Parts, feeds: Mapping[str, NDArray[Any]], also: tuple[str, ...] = (), prepack: bool = True
) -> list[Any]:
    """The graph's results, then those of the first node of each type in `also`."""
    (weight,) = graph.weights
    model = onnx.ModelProto()
    model.CopyFrom(graph.model)
    raw = {part.name: np.ascontiguousarray(parts[part.key]).tobytes() for part in weight.parts}
    for tensor in model.graph.initializer:
        if tensor.name in raw:
            tensor.ClearField("external_data")
            tensor.ClearField("data_location")
            tensor.raw_data = raw[tensor.name]
    inner = [next(node.output[0] for node in model.graph.node if node.op_type == kind) for kind in also]
    kinds = {"QuantizeLinear": onnx.TensorProto.UINT8, "Mul": onnx.TensorProto.FLOAT}
    for name, kind in zip(inner, also, strict=True):
        model.graph.output.append(onnx.helper.make_tensor_value_info(name, kinds[kind], None))
    return list(_session(model, prepack).run(None, dict(feeds)))


def four_bits(stored: Int4, x: Float32, level: int, prepack: bool = True) -> Float32:
    """com.microsoft.MatMulNBits alone, at an accuracy level: x (T, K) → (T, N)."""
    rows, blocks, half = stored.packed.shape
    columns = blocks * half * 2
    arrays = {"w": stored.packed, "s": stored.scale, "z": stored.zero_point}
    node = onnx.helper.make_node(
        "MatMulNBits", ["x", *arrays], ["y"], domain=CONTRIB,
        K=columns, N=rows, bits=4, block_size=2 * half, accuracy_level=level,
    )  # fmt: skip
    ports = [
        onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["T", size])
        for name, size in (("x", columns), ("y", rows))
    ]
    initializers = [onnx.numpy_helper.from_array(array, name) for name, array in arrays.items()]
    graph = onnx.helper.make_graph([node], "one", ports[:1], ports[1:], initializers)
    opsets = [onnx.helper.make_opsetid("", OPSET), onnx.helper.make_opsetid(CONTRIB, 1)]
    model = onnx.helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION)
    y: Float32 = _session(model, prepack).run(None, {"x": x})[0]
    return y


def _session(model: onnx.ModelProto, prepack: bool) -> Any:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    if not prepack:
        options.add_session_config_entry("session.disable_prepacking", "1")
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
