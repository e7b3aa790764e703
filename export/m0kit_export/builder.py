"""A thin ONNX graph builder: nodes, constants, and weights that live in an external data file.

Owns how a graph is put together, not what the model computes (`m0kit_export.graphs` does). Weights are
declared by name, shape and type and get their place in the data file at once; their values are written
later, one at a time, by whoever streams the checkpoint.

    builder = Builder("head", storage=np.float32)
    y = builder.linear("score.0", "hidden", (64, 64), bias=True)
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from numpy.typing import DTypeLike, NDArray
from onnx import TensorProto, helper, numpy_helper

OPSET = 23  # the first with Attention, RMSNormalization and RotaryEmbedding
IR_VERSION = 11  # the IR that came with opset 23
ALIGNMENT = 4096  # a memory page: mapped weights never share a page, and any vector load is aligned

_TYPES: dict[Any, int] = {
    np.dtype(np.float32): TensorProto.FLOAT,
    np.dtype(np.float16): TensorProto.FLOAT16,
    np.dtype(np.int64): TensorProto.INT64,
    np.dtype(np.bool_): TensorProto.BOOL,
}


@dataclass(frozen=True, slots=True)
class Weight:
    """One tensor of the data file. `name` is the checkpoint's; `shape` may flatten the checkpoint's."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    offset: int  # bytes, a multiple of ALIGNMENT

    @property
    def num_bytes(self) -> int:
        return int(np.prod(self.shape)) * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class Port:
    """A graph input or output; dimensions are numbers or names."""

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int | str, ...]

    def proto(self) -> onnx.ValueInfoProto:
        return helper.make_tensor_value_info(self.name, _TYPES[self.dtype], list(self.shape))


@dataclass(frozen=True, slots=True)
class Graph:
    """A finished graph: the model without its values, and what must be written where."""

    model: onnx.ModelProto
    weights: tuple[Weight, ...]
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]

    @property
    def data_bytes(self) -> int:
        return max((w.offset + w.num_bytes for w in self.weights), default=0)


class Builder:
    """Collects one graph. Every method that makes a node returns the name of its (first) result.

    `storage` is the type in which matrices are kept, float32 or float16; vectors that belong to
    normalisations are always float32.
    """

    def __init__(self, name: str, storage: DTypeLike) -> None:
        self.name = name
        self.storage = np.dtype(storage)
        self._nodes: list[onnx.NodeProto] = []
        self._constants: dict[tuple[str, tuple[int, ...], bytes], str] = {}
        self._initializers: list[onnx.TensorProto] = []
        self._weights: dict[str, Weight] = {}
        self._end = 0
        self._serial = 0

    # --- nodes -------------------------------------------------------------------------------------

    def op(self, op_type: str, *inputs: str, out: str | None = None, **attributes: Any) -> str:
        """One node with one result."""
        out = out or self._fresh(op_type)
        self._nodes.append(helper.make_node(op_type, list(inputs), [out], name=out, **attributes))
        return out

    def split(self, x: str, sizes: Sequence[int], axis: int = -1) -> list[str]:
        """ONNX Split into parts of the given sizes."""
        outs = [self._fresh("Split") for _ in sizes]
        node = helper.make_node("Split", [x, self.const(list(sizes))], outs, name=outs[0], axis=axis)
        self._nodes.append(node)
        return outs

    def cast(self, x: str, dtype: DTypeLike) -> str:
        return self.op("Cast", x, to=_TYPES[np.dtype(dtype)])

    def const(self, value: Any, dtype: DTypeLike = np.int64) -> str:
        """A small constant, kept inside the graph; equal constants are shared."""
        array = np.asarray(value, dtype)
        key = (array.dtype.str, array.shape, array.tobytes())
        if key not in self._constants:
            self._constants[key] = f"const_{len(self._constants)}"
            self._initializers.append(numpy_helper.from_array(array, self._constants[key]))
        return self._constants[key]

    def loop(self, count: str, initial: str, body: onnx.GraphProto, out: str | None = None) -> str:
        """Run `body` `count` (scalar) times over one carried tensor that starts as `initial`.

        The condition is spelled out as a constant: the ONNX reference evaluator takes a missing one
        for false.
        """
        out = out or self._fresh("Loop")
        always = self.const(True, np.bool_)
        self._nodes.append(helper.make_node("Loop", [count, always, initial], [out], name=out, body=body))
        return out

    # --- weights -----------------------------------------------------------------------------------

    def weight(self, name: str, shape: Sequence[int], dtype: DTypeLike | None = None) -> str:
        """Declare a tensor of the data file under the checkpoint's own name."""
        if name in self._weights:
            raise AssertionError(f"weight {name} is declared twice")
        weight = Weight(name, tuple(shape), np.dtype(dtype or self.storage), self._end)
        self._weights[name] = weight
        self._end = -(-(weight.offset + weight.num_bytes) // ALIGNMENT) * ALIGNMENT
        tensor = TensorProto(name=name, data_type=_TYPES[weight.dtype], dims=weight.shape)
        tensor.data_location = TensorProto.EXTERNAL
        places = {"location": f"{self.name}.onnx.data", "offset": weight.offset, "length": weight.num_bytes}
        for key, value in places.items():
            tensor.external_data.add(key=key, value=str(value))
        self._initializers.append(tensor)
        return name

    def linear(
        self,
        name: str,
        x: str,
        shape: tuple[int, int],
        *,
        bias: bool,
        half: bool = False,
        out: str | None = None,
    ) -> str:
        """x (T, in) → (T, out), float32 in and out; the weight keeps the checkpoint's (out, in) layout.

        With float16 storage the product itself runs in float16 only where `half` says that its values
        stay in range; elsewhere the stored weight is widened first.
        """
        weight = self.weight(f"{name}.weight", shape)
        offset = [self.weight(f"{name}.bias", shape[:1])] if bias else []
        if self.storage == np.float32:
            return self.op("Gemm", x, weight, *offset, transB=1, out=out)
        if half:
            y = self.op("Gemm", self.cast(x, np.float16), weight, *offset, transB=1)
            return self.op("Cast", y, to=TensorProto.FLOAT, out=out)
        wide = [self.cast(tensor, np.float32) for tensor in (weight, *offset)]
        return self.op("Gemm", x, *wide, transB=1, out=out)

    # --- the whole ---------------------------------------------------------------------------------

    def subgraph(
        self,
        name: str,
        inputs: Sequence[onnx.ValueInfoProto],
        outputs: Sequence[onnx.ValueInfoProto],
        start: int,
    ) -> onnx.GraphProto:
        """Take the nodes added since `start` (a value of `mark()`) out and make them a subgraph."""
        nodes, self._nodes = self._nodes[start:], self._nodes[:start]
        return helper.make_graph(nodes, name, list(inputs), list(outputs))

    def mark(self) -> int:
        return len(self._nodes)

    def finish(self, inputs: Sequence[Port], outputs: Sequence[Port]) -> Graph:
        graph = helper.make_graph(
            self._nodes,
            self.name,
            [port.proto() for port in inputs],
            [port.proto() for port in outputs],
            self._initializers,
        )
        model = helper.make_model(
            graph,
            opset_imports=[helper.make_opsetid("", OPSET)],
            ir_version=IR_VERSION,
            producer_name="m0kit",
        )
        return Graph(model, tuple(self._weights.values()), tuple(inputs), tuple(outputs))

    def _fresh(self, op_type: str) -> str:
        self._serial += 1
        return f"{op_type}_{self._serial}"


def as_numpy(weight: Weight, values: NDArray[Any]) -> NDArray[Any]:
    """The values of a tensor in the type and (flattened) shape in which the data file keeps them."""
    return np.ascontiguousarray(values.reshape(weight.shape), weight.dtype)
